#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cli_signals.py BIN_DIR DATA

Ctrl-C saves and says how to go on, twice leaves at once; SIGUSR1 answers; a
second writer waits and gives up; a mapped file that shrinks is named.
"""
import json
import os
import re
import signal
import subprocess

from cli_common import (SLOWER, TVMERGE, TVSTORE, check, document, finish, go,
                        held, make_model, path, run, write)

a = make_model("a", 96, 1 << 19, 1)
b = make_model("b", 96, 1 << 19, 2)
recipe = write("my recipe.yml", f"""merge_method: ties
base_model: {a}
models:
- model: {b}
  parameters: {{weight: 0.5, density: 0.5}}
""")
SLOW = dict(os.environ, TV_CPU="ref", TV_GROUP_BYTES="8MB")


def start(out, *more):
    return subprocess.Popen([TVMERGE, "run", recipe, out, "--threads", "1",
                             *more], env=SLOW, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def begun(out, p):
    """Stops the merge when it has something to lose and work left."""
    def ready():
        r = subprocess.run([TVMERGE, "status", out, "--json"],
                           capture_output=True, timeout=10 * SLOWER)
        return r.returncode == 0 and json.loads(r.stdout)["n_done"] > 0
    return held(p, ready)


want = document(TVMERGE, "run", recipe, path("whole"))["digest"]

for sig, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143),
                    (signal.SIGHUP, 143)):
    out = path(f"out{sig}")
    p = start(out)
    check(begun(out, p), f"{sig.name}: nothing to interrupt")
    go(p, sig)
    err = p.communicate(timeout=60 * SLOWER)[1].decode()
    check(p.returncode == status, f"{sig.name}: exit {p.returncode} {err}")
    found = re.search(r"^resume with: (.*)$", err, re.M)
    check(found, f"{sig.name}: no way to resume in {err!r}")
    check(not os.path.exists(os.path.join(out, "config.json")),
          f"{sig.name}: looks finished")
    state = document(TVMERGE, "status", out)
    check(state["state"] == "unfinished" and state["running"] is False
          and 0 < state["n_done"] < state["n_tensors"] == 96,
          f"{sig.name}: status {state}")
    if found:
        r = subprocess.run(["sh", "-c", found.group(1)], capture_output=True)
        check(r.returncode == 0, f"{sig.name}: resuming: {r.stderr}")
        doc = document(TVMERGE, "run", recipe, out)
        check(doc["n_resumed"] == 96, f"{sig.name}: nothing was resumed")
        check(doc["digest"] == want, f"{sig.name}: other bytes")

# Twice: at once, and still resumable.
out = path("twice")
p = start(out, "--json")
check(begun(out, p), "twice: nothing to interrupt")
go(p, signal.SIGINT)
p.send_signal(signal.SIGINT)
p.communicate(timeout=60 * SLOWER)
check(p.returncode == 130, f"twice: exit {p.returncode}")
check(document(TVMERGE, "run", recipe, out)["digest"] == want,
      "twice: other bytes")

# With --json the hint is in the document.
out = path("json")
p = start(out, "--json")
check(begun(out, p), "json: nothing to interrupt")
go(p, signal.SIGINT)
o, e = p.communicate(timeout=60 * SLOWER)
doc = json.loads(e)["error"]
check(p.returncode == 130 and o == b"" and doc["code"] == "interrupted"
      and doc["hint"].startswith("resume with: "), f"json: {e}")

# SIGUSR1 prints a line, whatever the style; status sees the run.
out = path("usr1")
p = start(out, "--progress=none")
check(begun(out, p), "usr1: nothing to ask")
check(document(TVMERGE, "status", out)["running"] is True, "status: running")
r = run(TVMERGE, "run", recipe, out, "--lock-timeout", "100ms", "-q", code=11)
check(b"error" in r.stderr, "second run on one directory")
go(p, signal.SIGUSR1)
err = p.communicate(timeout=60 * SLOWER)[1].decode()
check(p.returncode == 0 and re.search(r"^merge \d+/96 tensors  \d+%", err,
                                      re.M), f"usr1: {err}")

# A writer waits for --lock-timeout, then 11; readers work meanwhile.
store = path("s")
run(TVSTORE, "init", store, "-q")
run(TVSTORE, "import", store, "a", a, "-q")
p = subprocess.Popen([TVMERGE, "run", recipe, "--into", "m", "--store", store,
                      "--threads", "1"], env=dict(os.environ, TV_CPU="ref"),
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL)


def locked():
    global r
    r = subprocess.run([TVSTORE, "gc", store, "--lock-timeout", "50ms"],
                       capture_output=True, timeout=10 * SLOWER)
    return r.returncode == 11


check(held(p, locked) and b"error" in r.stderr,
      f"locked: {r.returncode} {r.stderr}")
r = run(TVSTORE, "quota", store, "1GB", "--lock-timeout", "50ms", code=11)
go(p)
run(TVSTORE, "ls", store)
run(TVSTORE, "quota", store)
p.send_signal(signal.SIGINT)
check(p.wait(60) in (130, 0), f"into: {p.returncode}")
run(TVSTORE, "verify", store, "-q")
check(document(TVMERGE, "run", recipe, "--into", "m", "--store",
               store)["digest"] == want, "into: other bytes")

# An import is interrupted and goes on.
p = subprocess.Popen([TVSTORE, "import", store, "b", b],
                     stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)


def importing():
    with open(os.path.join(store, "writer.lock")) as f:
        return f"process {p.pid})" in f.read()


check(held(p, importing), "import: nothing to interrupt")
go(p, signal.SIGINT)
p.communicate(timeout=60 * SLOWER)
check(p.returncode in (130, 0), f"import: {p.returncode}")
if p.returncode == 130:
    run(TVSTORE, "import", store, "b", b)
check(document(TVSTORE, "diff", store, "store:b", b)["equal"] is True,
      "import: bytes")

# SIGBUS: the input shrinks under a run that reads it.
out = path("bus")
p = start(out)
check(begun(out, p), "bus: nothing to disturb")
os.truncate(os.path.join(a, "model.safetensors"), 100000)
go(p)
err = p.communicate(timeout=60 * SLOWER)[1].decode()
check(p.returncode == 12 and "a/model.safetensors" in err,
      f"bus: exit {p.returncode}: {err}")
check(not os.path.exists(os.path.join(out, "config.json")), "bus: finished")
finish()
