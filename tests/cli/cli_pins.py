#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cli_pins.py BIN_DIR DATA

What unfinished merges hold in a store: inputs are pinned while a merge into a
directory or an object may go on, and no longer; and what 'run' says at its end.
"""
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess

from cli_common import (DATA, SLOWER, TVMERGE, TVSTORE, check, document, finish, go,
                        held, make_model, path, run, write, write_safetensors)

store = path("s")
run(TVSTORE, "init", store, "-q")
for name, seed in (("base", 1), ("other", 2)):
    run(TVSTORE, "import", store, name, make_model(name, 48, 1 << 19, seed),
        "-q")
recipe = write("r.yml", """merge_method: ties
base_model: store:base
models:
- model: store:other
  parameters: {weight: 0.5, density: 0.5}
""")
SLOW = dict(os.environ, TV_CPU="ref", TV_GROUP_BYTES="8MB")


def start(*target, env=None):
    return subprocess.Popen([TVMERGE, "run", recipe, *target, "--store", store,
                             "--threads", "1"], env=env or SLOW,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def worked(p):
    """Long enough, in time of its own, to have finished a tensor."""
    def ready():
        with open(f"/proc/{p.pid}/stat") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[11])
        return ticks >= 0.2 * os.sysconf("SC_CLK_TCK")
    return ready


def is_locked():
    """A merge that keeps something in the store holds its lock for a moment,
    and rm would rather wait than say what is pinned. The holder's name in the
    file comes after the lock, so only the lock tells."""
    with open(os.path.join(store, "writer.lock")) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def begun(out):
    def ready():
        if is_locked():
            return False
        r = subprocess.run([TVMERGE, "status", out, "--json"],
                           capture_output=True, timeout=10 * SLOWER)
        return r.returncode == 0 and json.loads(r.stdout)["n_done"] > 0
    return ready


def listed(name):
    def ready():
        r = subprocess.run([TVSTORE, "ls", store, "--json"],
                           capture_output=True, timeout=10 * SLOWER)
        check(r.returncode == 0, f"ls beside a merge: {r.stderr}")
        return r.returncode != 0 or name in [
            o["name"] for o in json.loads(r.stdout)["objects"]]
    return ready


def refused(what, *words):
    r = run(TVSTORE, "rm", store, "other", code=11)
    err = r.stderr.decode()
    for word in words:
        check(word in err, f"{what}: no {word!r} in {err!r}")


# While it runs, and after a kill, its inputs stay.
out = path("out")
p = start(out)
check(held(p, begun(out)), "nothing to interrupt")
refused("running", "'other'", out)
p.kill()
p.communicate(timeout=60 * SLOWER)
refused("killed", "'other'", out)
run(TVSTORE, "gc", store, "-q")
refused("killed, after gc", out)
r = run(TVSTORE, "import", store, "other", path("base"), "--force", code=11)
check(out in r.stderr.decode(), "import --force over a pinned object")
doc = document(TVMERGE, "run", recipe, out, "--store", store)
check(doc["n_resumed"] > 0, "a killed run goes on")
digest = doc["digest"]
run(TVSTORE, "import", store, "other", path("other"), "--force", "-q")

# A pin whose output is gone, or was made by another plan since, is stale.
out = path("gone")
p = start(out)
check(held(p, begun(out)), "nothing to kill")
p.kill()
p.communicate(timeout=60 * SLOWER)
shutil.rmtree(out)
run(TVSTORE, "gc", store, "-q")
check(document(TVSTORE, "stat", store)["kinds"]["journal"] == 0,
      "gc keeps a dead run")
run(TVSTORE, "import", store, "other", path("other"), "--force", "-q")
p = start(out)
check(held(p, begun(out)), "nothing to kill again")
p.kill()
p.communicate(timeout=60 * SLOWER)
plain = write("plain.yml", f"""merge_method: linear
models:
- model: {path('base')}
  parameters: {{weight: 1}}
""")
run(TVMERGE, "run", plain, out, "--force", "-q")
check(document(TVSTORE, "info", store, "other")["n_tensors"] == 48, "info")
run(TVSTORE, "rm", store, "other", "-q")
run(TVSTORE, "import", store, "other", path("other"), "-q")

# A refused run leaves no pin.
taken = path("taken")
os.makedirs(taken)
write("taken/precious", "x")
run(TVMERGE, "run", recipe, taken, "--store", store, code=4)
run(TVSTORE, "import", store, "other", path("other"), "--force", "-q")

# A read-only store is no obstacle.
frozen = path("frozen")
shutil.copytree(store, frozen)
for f in os.listdir(frozen):
    os.chmod(os.path.join(frozen, f), 0o444)
os.chmod(frozen, 0o555)
r = run(TVMERGE, "run", recipe, path("from-frozen"), "--store", frozen,
        "--json")
check(json.loads(r.stdout)["digest"] == digest, "read-only store: digest")
os.chmod(frozen, 0o755)

# Ctrl-C long before a group is full keeps what is finished.
out = path("ctrl-c")
p = start(out, env=dict(os.environ, TV_CPU="ref"))
check(held(p, worked(p)), "no start")
go(p, signal.SIGINT)
p.communicate(timeout=60 * SLOWER)
check(p.returncode == 130, f"ctrl-c: exit {p.returncode}")
doc = document(TVMERGE, "run", recipe, out, "--store", store)
check(doc["n_resumed"] > 0 and doc["digest"] == digest, f"ctrl-c: {doc}")

# Removing an unfinished object removes its run.
p = start("--into", "m9")
check(held(p, listed("m9")), "into: no start")
p.kill()
p.communicate(timeout=60 * SLOWER)
r = run(TVSTORE, "rm", store, "other", code=11)
check(b"'m9'" in r.stderr, f"into: {r.stderr}")
run(TVSTORE, "rm", store, "m9", "-q")
run(TVSTORE, "import", store, "other", path("other"), "--force", "-q")

# --into tells a repetition from another plan.
first = document(TVMERGE, "run", recipe, "--into", "m", "--store", store)
again = document(TVMERGE, "run", recipe, "--into", "m", "--store", store)
check(first["digest"] == digest and first["n_resumed"] == 0, "into: first")
check(again["n_resumed"] == again["n_tensors"] == 48
      and again["digest"] == digest, f"into: again {again}")
r = run(TVMERGE, "run", recipe, "--into", "m", "--store", store,
        "--random-seed", "5", code=4)
check(b'seed was "0", is "5"' in r.stderr, f"into: {r.stderr}")
run(TVSTORE, "export", store, "m", path("exported"), "-q")
with open(path("exported/tvmerge.json")) as f:
    record = json.load(f)
check(record["digest"] == digest and record["seed"] == 0
      and record["plan_hash"] == first["plan_hash"], "exported record")

# NaN in the inputs: done, said, and with --strict an exit status.
bad = path("bad")
os.makedirs(bad)
write_safetensors(os.path.join(bad, "model.safetensors"), {
    "w": ("F32", [4], struct.pack("<4f", 1, float("nan"), 2, float("inf")))})
nan = write("nan.yml", f"""merge_method: linear
models:
- model: {bad}
  parameters: {{weight: 1}}
""")
doc = document(TVMERGE, "run", nan, path("nan1"))
check(doc["n_nonfinite_in"] == 2 and any("NaN" in p["message"] and
      p["severity"] == "warning" for p in doc["problems"]), f"nan: {doc}")
r = run(TVMERGE, "run", nan, path("nan2"), "--strict", "--json", code=3)
strict = json.loads(r.stdout)
check(strict["schema"] == "tvmerge.run/1" and strict["digest"] == doc["digest"]
      and b"NaN" in r.stderr, f"strict: {r.stdout} {r.stderr}")

# Where OUT cannot be.
r = run(TVMERGE, "run", nan, "", code=2)
check(b"OUT is empty" in r.stderr, f"empty OUT: {r.stderr}")
run(TVMERGE, "run", nan, os.path.join(nan, "below"), code=4)
run(TVMERGE, "run", nan, os.path.join(nan, "far", "below"), code=4)

# An import that a quota refuses says what it needs and leaves nothing.
big = path("big")
os.makedirs(big)
write_safetensors(os.path.join(big, "model.safetensors"), {
    f"model.layers.{i}.w": ("U8", [1 << 20], os.urandom(1 << 20))
    for i in range(30)})
small = path("small")
run(TVSTORE, "init", small, "--quota", "20MB", "-q")
with open(os.path.join(small, "data.mdb"), "rb") as f:
    untouched = f.read()
r = run(TVSTORE, "import", small, "big", big, code=5)
check(b"'big' takes up to 30.0 MiB" in r.stderr, f"quota: {r.stderr}")
with open(os.path.join(small, "data.mdb"), "rb") as f:
    check(f.read() == untouched, "quota: refused after work had begun")
run(TVSTORE, "rm", small, "big", code=10)
doc = document(TVSTORE, "stat", small)
check(doc["kinds"]["weights"] == 0 and doc["used_bytes"] <= 20 * 10**6,
      f"quota: {doc}")
# The quota that it names is enough, and no more than that: what is there
# already counts, so does what many small tensors take beside their bytes.
many = path("many")
os.makedirs(many)
write_safetensors(os.path.join(many, "model.safetensors"), {
    f"model.layers.{i}.w": ("U8", [n], os.urandom(n))
    for i, n in enumerate([3000] * 1000 + [700] * 1000 + [1 << 20] * 8)})
for name, src, quota, least, most in (
        ("big", big, "20MB", 11, 16), ("many", many, "10MB", 3, 25),
        ("base", os.path.join(DATA, "base"), "2MB", 0.2, 3)):
    tight = path("tight-" + name)
    run(TVSTORE, "init", tight, "--quota", quota, "-q")
    r = run(TVSTORE, "import", tight, name, src, code=5)
    text = r.stderr.decode()
    said = re.search(r": ([\d.]+) ([KM]iB) are missing to stay within", text)
    raised = re.search(r"'(tvstore quota .*? (\d+)MiB)' gives", text)
    if check(said and raised, f"{name}: {text}"):
        missing = float(said[1]) / (1 if said[2] == "MiB" else 1024)
        check(least <= missing <= most, f"{name}: {missing} MiB are missing")
        run(TVSTORE, *raised[1].split()[1:], "-q")
        run(TVSTORE, "import", tight, name, src, "-q")
        used = document(TVSTORE, "stat", tight)["used_bytes"]
        check(used <= int(raised[2]) << 20, f"{name}: {used} are used")

run(TVSTORE, "quota", small, "60MB", "-q")
run(TVSTORE, "import", small, "big", big, "-q")
check(document(TVSTORE, "diff", small, "store:big", big)["equal"] is True,
      "quota: bytes")
# What the store holds already takes no room, and derived data make some.
run(TVSTORE, "quota", small, "40MB", "-q")
run(TVSTORE, "import", small, "again", big, "-q")
run(TVSTORE, "rm", small, "again", "-q")
caching = path("caching")
run(TVSTORE, "init", caching, "-q")
for name in ("base", "other"):
    run(TVSTORE, "import", caching, name, path(name), "--link", "-q")
run(TVMERGE, "run", recipe, path("cached"), "--store", caching, "-q")
doc = document(TVSTORE, "stat", caching)
derived = doc["kinds"]["masks"] + doc["kinds"]["task_vectors"]
check(derived > 2 * 10**6, f"derived data: {doc}")
limit = doc["used_bytes"] + 8 * 10**6
run(TVSTORE, "quota", caching, str(limit), "-q")
fits = path("fits")
os.makedirs(fits)
write_safetensors(os.path.join(fits, "model.safetensors"), {
    "w": ("U8", [8 * 10**6 + derived // 3],
          os.urandom(8 * 10**6 + derived // 3))})
run(TVSTORE, "import", caching, "fits", fits, "-q")
after = document(TVSTORE, "stat", caching)
check(after["used_bytes"] <= limit and after["kinds"]["masks"] +
      after["kinds"]["task_vectors"] < derived, f"import beside a cache: {after}")
check(document(TVSTORE, "diff", caching, "store:fits", fits)["equal"] is True,
      "import beside a cache: bytes")
# A complete object survives a refused replacement.
run(TVSTORE, "quota", small, "35MB", "-q")
more = path("more")
os.makedirs(more)
write_safetensors(os.path.join(more, "model.safetensors"), {
    f"model.layers.{i}.w": ("U8", [1 << 20], os.urandom(1 << 20))
    for i in range(30)})
run(TVSTORE, "import", small, "big", more, "--force", code=5)
check(document(TVSTORE, "diff", small, "store:big", big)["equal"] is True,
      "quota: the old one is gone")
finish()
