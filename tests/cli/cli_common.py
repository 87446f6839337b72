# SPDX-License-Identifier: Apache-2.0
"""Helpers of the command line tests. stdlib only."""
import array
import atexit
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

for variable in ("TV_STORE", "TV_PROGRESS", "TV_GROUP_BYTES", "NO_COLOR"):
    os.environ.pop(variable, None)
# Programs under ThreadSanitizer are slower; so is what waits for them.
SLOWER = int(os.environ.get("TV_TEST_SLOWER", "1"))
BIN, DATA = map(os.path.abspath, sys.argv[1:3])
TVSTORE, TVMERGE = os.path.join(BIN, "tvstore"), os.path.join(BIN, "tvmerge")
WORK = tempfile.mkdtemp(prefix="tv-cli-")
atexit.register(shutil.rmtree, WORK, True)
failures = checks = 0


def check(ok, what):
    global failures, checks
    checks += 1
    if not ok:
        failures += 1
        print(f"FAIL: {what}", flush=True)
    return ok


def finish():
    print(f"{os.path.basename(sys.argv[0])}: {checks} checks, "
          f"{failures} failed")
    sys.exit(1 if failures or not checks else 0)


def path(name):
    return os.path.join(WORK, name)


def run(*argv, code=0, env=None, **kw):
    e = dict(os.environ, **(env or {}))
    kw.setdefault("stdin", subprocess.DEVNULL)
    kw.setdefault("stdout", subprocess.PIPE)
    kw.setdefault("stderr", subprocess.PIPE)
    r = subprocess.run([str(a) for a in argv], env=e, timeout=120 * SLOWER, **kw)
    err = (r.stderr or b"").decode("utf-8", "replace")
    check(r.returncode == code, f"{' '.join(map(str, argv))}: exit "
          f"{r.returncode}, expected {code}: {err.strip()[-300:]}")
    return r


def is_stopped(p):
    """Every thread of it: a stop reaches those that run only at their next
    entry into the kernel, and until then one may still take a lock."""
    try:
        for task in os.listdir(f"/proc/{p.pid}/task"):
            with open(f"/proc/{p.pid}/task/{task}/stat") as f:
                if f.read().rsplit(")", 1)[1].split()[0] not in "TtZX":
                    return False
    except (FileNotFoundError, ProcessLookupError):
        return p.poll() is not None
    return True


def held(p, ready):
    """Lets p run until ready() and leaves it stopped there, so that nothing
    depends on who is faster; go() lets it run on. False: p ended before. A
    process may be stopped while it holds a lock of the store that readers
    need for an instant: then ready() is asked again."""
    end = time.monotonic() + 120 * SLOWER
    while time.monotonic() < end and p.poll() is None:
        p.send_signal(signal.SIGSTOP)
        while not is_stopped(p) and time.monotonic() < end:
            time.sleep(0.001)
        try:
            if ready():
                return p.poll() is None
        except subprocess.TimeoutExpired:
            pass
        p.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    return False


def go(p, *signals):
    for s in signals:
        p.send_signal(s)
    p.send_signal(signal.SIGCONT)


def document(*argv, code=0, env=None):
    r = run(*argv, "--json", code=code, env=env)
    try:
        doc = json.loads(r.stdout)
    except ValueError:
        check(False, f"{argv}: stdout is no single JSON document: "
              f"{r.stdout[:200]!r}")
        return {}
    check(next(iter(doc)) == "schema", f"{argv}: schema is not first")
    return doc


def read_safetensors(file):
    """{name: (dtype, shape, bytes)}"""
    with open(file, "rb") as f:
        raw = f.read()
    n = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8:8 + n])
    return {k: (v["dtype"], v["shape"],
                raw[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]])
            for k, v in header.items() if k != "__metadata__"}


def write_safetensors(file, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for k, (d, s, b) in tensors.items():
        header[k] = {"dtype": d, "shape": list(s),
                     "data_offsets": [at, at + len(b)]}
        at += len(b)
    h = json.dumps(header).encode()
    h += b" " * (-len(h) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h)
        for _, _, b in tensors.values():
            f.write(b)


def bf16_values(b):
    bits = array.array("H", b)
    if sys.byteorder == "big":
        bits.byteswap()
    return [struct.unpack("<f", struct.pack("<I", v << 16))[0] for v in bits]


def close(a, b, tolerance=1e-9):
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12)


def write(name, text):
    with open(path(name), "w") as f:
        f.write(text)
    return path(name)


def make_model(name, n_tensors, elems, seed):
    """A model of F32 tensors, big enough to be interrupted."""
    d = path(name)
    os.makedirs(d)
    block = bytearray()
    state = seed
    for _ in range(4096):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        block += struct.pack("<f", (state >> 40) / 2**24 - 0.5)
    data = bytes(block) * (elems // 4096)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight":
               ("F32", [elems // 1024, 1024], data) for i in range(n_tensors)}
    write_safetensors(os.path.join(d, "model.safetensors"), tensors)
    return d
