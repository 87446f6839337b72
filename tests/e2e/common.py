# SPDX-License-Identifier: Apache-2.0
"""Helpers of the end-to-end tests: run a program, check, count. stdlib only."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time

# Programs under ThreadSanitizer take several times as long.
SLOWER = int(os.environ.get("TV_TEST_SLOWER", "1"))
failures = 0
checks = 0


def check(ok, what):
    global failures, checks
    checks += 1
    if not ok:
        failures += 1
        print(f"FAIL: {what}", flush=True)
    return ok


def finish(name):
    print(f"{name}: {checks} checks, {failures} failed")
    sys.exit(1 if failures else 0)


def run(*argv, cwd=None, env=None, timeout=300, code=None, stdin=None):
    """Runs a program; with `code`, checks its exit status."""
    e = dict(os.environ)
    e.update(env or {})
    r = subprocess.run([str(a) for a in argv], cwd=cwd, env=e, text=True,
                       capture_output=True, timeout=timeout * SLOWER,
                       input=stdin)
    if code is not None:
        check(r.returncode == code,
              f"{' '.join(map(str, argv))}: exit {r.returncode} instead of "
              f"{code}: {r.stderr.strip()[-300:]}")
    return r


def run_json(*argv, **kw):
    r = run(*argv, code=kw.pop("code", 0), **kw)
    try:
        return json.loads(r.stdout)
    except ValueError:
        check(False, f"{argv}: stdout is no JSON: {r.stdout[:200]!r}")
        return {}


def temp():
    d = tempfile.mkdtemp(prefix="tv-e2e-")
    import atexit
    atexit.register(shutil.rmtree, d, True)
    return d


def read_safetensors(path):
    """{name: (dtype, shape, bytes)} of one file or of a directory's files."""
    if os.path.isdir(path):
        out = {}
        for n in sorted(os.listdir(path)):
            if n.endswith(".safetensors"):
                out.update(read_safetensors(os.path.join(path, n)))
        return out
    with open(path, "rb") as f:
        raw = f.read()
    n = int.from_bytes(raw[:8], "little")
    h = json.loads(raw[8:8 + n])
    h.pop("__metadata__", None)
    return {k: (v["dtype"], tuple(v["shape"]),
                raw[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]])
            for k, v in h.items()}


def write_safetensors(path, tensors, meta=None):
    """tensors: {name: (dtype, shape, bytes)}, in the order given."""
    h, at = {}, 0
    if meta:
        h["__metadata__"] = meta
    for k, (dtype, shape, data) in tensors.items():
        h[k] = {"dtype": dtype, "shape": list(shape),
                "data_offsets": [at, at + len(data)]}
        at += len(data)
    j = json.dumps(h).encode()
    j += b" " * (-len(j) % 8)
    with open(path, "wb") as f:
        f.write(len(j).to_bytes(8, "little") + j)
        for _, _, data in tensors.values():
            f.write(data)


def used(*paths):
    """Allocated bytes; files may come and go meanwhile."""
    total = 0
    for path in paths:
        for d, _, names in os.walk(path):
            for n in [""] + names:
                try:
                    total += os.lstat(os.path.join(d, n)).st_blocks * 512
                except OSError:
                    pass
    return total


class Sampler:
    """The most that a set of directories has taken at any moment."""

    def __init__(self, *paths):
        self.paths, self.peak, self.n, self.stop = paths, 0, 0, False
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def loop(self):
        while not self.stop:
            self.peak = max(self.peak, used(*self.paths))
            self.n += 1
            time.sleep(0.001)

    def end(self):
        self.stop = True
        self.thread.join()
        self.peak = max(self.peak, used(*self.paths))
        return self.peak
