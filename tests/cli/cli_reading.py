#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cli_reading.py BIN_DIR DATA

What tveval holds while it reads models of a store, and no longer: they can be
neither removed nor replaced, or that changes nothing; its scratch file counts
against the quota; a --memory that cannot be kept is refused.
"""
import fcntl
import json
import os
import signal
import subprocess

from cli_common import (BIN, DATA, SLOWER, TVSTORE, check, document, finish,
                        go, held, path, run)

TVEVAL = os.path.join(BIN, "tveval")
BASE = os.path.join(DATA, "base")
TEXT = ["--text", os.path.join(DATA, "text", "code.val.txt")]
SLOW = dict(os.environ, TV_CPU="ref")
store = path("s")
run(TVSTORE, "init", store, "-q")
run(TVSTORE, "import", store, "lm", BASE, "-q")
run(TVSTORE, "import", store, "lora", os.path.join(DATA, "lora-jargon"), "-q")


def start(argv):
    return subprocess.Popen(argv, env=SLOW, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def worked(p):
    """Past opening its inputs, in time of its own, and not stopped within a
    transaction of the store, for whose end every writer would wait."""
    def ready():
        with open(f"/proc/{p.pid}/stat") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[11])
        with open(os.path.join(store, "writer.lock")) as f:
            locked = f.read() != ""
        if ticks < 0.1 * os.sysconf("SC_CLK_TCK") or locked:
            return False
        # 11: the test itself has the lock of writers.
        return subprocess.run([TVSTORE, "gc", store, "--lock-timeout", "0"],
                              capture_output=True,
                              timeout=5 * SLOWER).returncode in (0, 11)
    return ready


def at_work(argv, what):
    """argv, stopped while it works. On a busy machine it may be over before
    this test has its turn: then once more, without what it has kept."""
    for _ in range(5):
        p = start(argv)
        if held(p, worked(p)):
            return p
        p.communicate(timeout=120 * SLOWER)
        run(TVSTORE, "gc", store, "--derived", "-q")
    check(False, f"{argv[1]}: {what}")
    return p


def figures(out):
    """What does not depend on the time it took."""
    doc = json.loads(out)
    return [doc.get(k) for k in ("texts", "key", "n_inputs", "bytes")]


def finished(p, want, what):
    go(p)
    out, err = p.communicate(timeout=120 * SLOWER)
    check(p.returncode == 0 and figures(out) == want,
          f"{what}: exit {p.returncode}: {err[-300:]} {out[-300:]}")


ppl = [TVEVAL, "ppl", "store:lm+store:lora", "--store", store, *TEXT, "-j", "1",
       "--json", "-q"]
calibrate = [TVEVAL, "calibrate", "store:lm", "--store", store, *TEXT,
             "--samples", "32", "-j", "1", "--json", "-q"]
for argv in (ppl, calibrate):
    name = argv[1]
    want = figures(run(*argv, env=SLOW).stdout)
    run(TVSTORE, "gc", store, "--derived", "-q")
    p = at_work(argv, "nothing to hold")
    r = run(TVSTORE, "rm", store, "lm", code=11)
    check(b"'lm' is being read" in r.stderr, f"{name}: {r.stderr}")
    run(TVSTORE, "import", store, "lm", os.path.join(DATA, "ft-code"),
        "--force", "-q", code=11)
    run(TVSTORE, "gc", store, "-q")
    run(TVSTORE, "rm", store, "lm", "-q", code=11)
    run(TVSTORE, "compact", store, "--lock-timeout", "0", code=11)
    finished(p, want, f"{name} beside rm")
    # Killed, it holds nothing.
    run(TVSTORE, "gc", store, "--derived", "-q")
    p = at_work(argv, "nothing to kill")
    run(TVSTORE, "rm", store, "lm", "-q", code=11)
    p.send_signal(signal.SIGKILL)
    p.communicate(timeout=60 * SLOWER)
    run(TVSTORE, "rm", store, "lm", "-q")
    run(TVSTORE, "verify", store, "-q")
    run(TVSTORE, "import", store, "lm", BASE, "-q")
    # Where nobody can be told, because another command is at work in the
    # store, what it reads may go: it has a snapshot.
    with open(os.path.join(store, "writer.lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        p = start(argv)
        check(held(p, worked(p)), f"{name}: nothing behind a lock")
    run(TVSTORE, "rm", store, "lm", "-q")
    run(TVSTORE, "gc", store, "-q")
    for n in range(3):  # pages that are free are written over
        run(TVSTORE, "import", store, f"other{n}",
            os.path.join(DATA, "ft-code"), "-q")
        run(TVSTORE, "rm", store, f"other{n}", "-q")
    finished(p, want, f"{name} behind a lock")
    run(TVSTORE, "import", store, "lm", BASE, "-q")
    run(TVSTORE, "verify", store, "-q")

# The scratch file: residual streams of 32 windows of 256 tokens, 128 floats,
# and what a group of them needs.
SCRATCH = 32 * 256 * 128 * 4
small = path("small")
run(TVSTORE, "init", small, "--quota", "3MB", "-q")
scratch = [TVEVAL, "calibrate", BASE, "--store", small, *TEXT, "--samples",
           "32", "-j", "1", "--memory", "12MiB", "--json", "-q"]
r = run(*scratch, code=5)
check(b"no room for a scratch file of 11.5 MiB" in r.stderr, f"{r.stderr}")
stat = document(TVSTORE, "stat", small)
check(stat["n_statistics"] == 0 and stat["reserved_bytes"] == 0,
      f"refused after the work: {stat}")
run(TVSTORE, "quota", small, "16MB", "-q")
p = start(scratch)
check(held(p, lambda: document(TVSTORE, "stat", small)["reserved_bytes"] > 0),
      "nothing was charged")
stat = document(TVSTORE, "stat", small)
check(SCRATCH < stat["reserved_bytes"]
      and stat["used_bytes"] + stat["reserved_bytes"] <= 16 * 10**6,
      f"while it runs: {stat}")
p.send_signal(signal.SIGKILL)
p.communicate(timeout=60 * SLOWER)
check(document(TVSTORE, "stat", small)["reserved_bytes"] == 0,
      "a killed process keeps its scratch file")
# With the same arithmetic, which the key of a statistic names: what the killed
# one has kept is found.
doc = json.loads(run(*scratch, env=SLOW).stdout)
check(figures(run(*calibrate, env=SLOW).stdout)[2:] == figures(
    json.dumps(doc))[2:], f"{doc}")
stat = document(TVSTORE, "stat", small)
check(stat["reserved_bytes"] == 0 and stat["n_statistics"] == doc["n_inputs"],
      f"at its end: {stat}")

# Too little memory is said before the work; a little more is enough, with as
# many threads as fit.
for argv in ([TVEVAL, "ppl", BASE, *TEXT],
             [TVEVAL, "calibrate", BASE, *TEXT, "--store", path("s")]):
    r = run(*argv, "--memory", "64KiB", "-q", code=5)
    words = r.stderr.decode().split()
    check("bytes)," in words, f"no number: {r.stderr}")
    least = int(words[words.index("bytes),") - 1].lstrip("("))
    check(64 << 10 < least < 16 << 20, f"{least} bytes are needed")
    run(*argv, "--memory", str(least - 1), "-q", "-j", "4", code=5)
    a = run(*argv, "--memory", str(least), "-q", "-j", "4", "--json")
    b = run(*argv, "-q", "-j", "1", "--json")
    check(figures(a.stdout) == figures(b.stdout), f"{argv[1]} in {least} bytes")
finish()
