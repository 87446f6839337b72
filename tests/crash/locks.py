#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two processes on one store or one output, and signals.

A writer is stopped (SIGSTOP) at some call that changes a file. Meanwhile a
second writer waits --lock-timeout and exits with 11, commands that read work,
`rm` of what the writer reads is refused. Then the writer goes on and ends as if
it had been alone; or it gets SIGINT or SIGTERM first: it commits what is
finished, says how to go on, exits with 130 or 143, and the same command
resumes. A second signal ends it at once, and it is resumable all the same.
"""
import os
import random
import signal
import subprocess
import time

import crashlib
from crashlib import (Recorder, Table, arguments, check, finish, run_json,
                      work_dir)
from scenarios import ENV, World, acceptable, brief

A = arguments(__doc__, 40)
WORK = work_dir()
W = World(A, WORK)
R = Recorder(A.recorder, W.disk, WORK)
table = Table()
rng = random.Random(A.seed)
SOON = ["--lock-timeout", "0.05"]
WAIT = 15 * crashlib.SLOWER  # seconds that nothing here takes unless it waits for a lock


def stopped(command, k):
    """Starts the command and waits until call k stops it; None: it ended."""
    if os.path.exists(R.stat):
        os.unlink(R.stat)
    e = dict(os.environ)
    e.update(ENV)
    e.update({"LD_PRELOAD": R.library, "TVREC_DIR": W.disk,
              "TVREC_STAT": R.stat, "TVREC_STOP": str(k),
              "TVREC_SLOW": "2000"})
    p = subprocess.Popen([str(a) for a in command], env=e, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while True:
        pid, status = os.waitpid(p.pid, os.WUNTRACED | os.WNOHANG)
        if pid == 0:
            time.sleep(0.002)
        elif os.WIFSTOPPED(status):
            return p
        else:
            p.returncode = os.waitstatus_to_exitcode(status)
            out, err = p.communicate()
            check(p.returncode == 0, f"{command}: {p.returncode}: {err}")
            return None


def go_on(p, *signals):
    for s in signals:
        p.send_signal(s)
    p.send_signal(signal.SIGCONT)
    out, err = p.communicate(timeout=60 * crashlib.SLOWER)
    return p.returncode, out, err


def readers(what, store):
    """Commands that read work while a writer holds everything."""
    try:
        read_all(what, store)
    except subprocess.TimeoutExpired as e:
        check(False, f"{what}: a reader waits for the writer: "
                     f"{' '.join(e.cmd[1:6])}")


def run(*argv, **kw):
    return crashlib.run(*argv, timeout=WAIT, **kw)


def read_all(what, store):
    t0 = time.monotonic()
    if store:
        for argv in (["ls"], ["ls", "--json"], ["stat"], ["verify"]):
            run(A.tvstore, argv[0], W.store, *argv[1:], code=0)
        run(A.tvstore, "info", W.store, "base", code=0)
        run(A.tvstore, "export", W.store, "base",
            os.path.join(WORK, "x"), "--force", code=0)
        run(A.tvmerge, "plan", W.stored, "--store", W.store, code=0)
    else:
        s = run_json(A.tvmerge, "status", W.out, "--json")
        check(s.get("running") is True, f"{what}: status says {s}")
    check(time.monotonic() - t0 < 20, f"{what}: readers had to wait")


def merge_beside():
    """A merge that reads the store. It pins its inputs, for which it may wait
    until the writer ends a transaction: so it is only begun here."""
    return subprocess.Popen(
        [A.tvmerge, "run", W.stored, os.path.join(WORK, "y"), "--store",
         W.store, "--force", "--progress=none", *SOON],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused(what, argv):
    r = run(*argv, *SOON, env=ENV)
    check(r.returncode == 11,
          f"{what}: {' '.join(map(str, argv[1:4]))}: exit {r.returncode} "
          f"instead of 11: {r.stderr[-200:]}")


def jobs():
    """[(name, prepare, command, other writers, has a store)]"""
    into = W.all_linked()
    other_import = W.imported("x", model="ft1")
    mine = W.imported("mine", models=W.other, model="base")
    return [
        ("import", into, mine,
         [other_import, W.tvstore("rm", W.store, "base"),
          W.tvstore("gc", W.store), W.run_into("n")], True),
        ("into", into, W.run_into(),
         [other_import, W.run_into(), W.tvstore("rm", W.store, "base")],
         True),
        ("run", [], W.run_out(), [W.run_out(), W.run_out("--force")], False),
    ]


def holds_lock(job):
    """Is it after taking its lock and before giving it back?"""
    path = os.path.join(W.store, "writer.lock") if job[4] else \
        os.path.join(W.out, ".tvmerge", "lock")
    r = subprocess.run(["flock", "-n", path, "true"], capture_output=True) \
        if os.path.exists(path) else None
    return r is not None and r.returncode != 0


def one(job, saved, after, k):
    name, _, command, others, has_store = job
    failed = crashlib.failures_now()
    what = f"{name} stopped at call {k}"
    W.load(saved)
    p = stopped(command, k)
    if p is None:
        return False
    how = rng.choice(("alone", "alone", "SIGINT", "SIGTERM", "twice"))
    beside = None
    try:
        if holds_lock(job):
            for argv in others:
                refused(what, argv)
            readers(what, has_store)
            beside = merge_beside() if has_store else None
    finally:
        if how == "alone":
            code, out, err = go_on(p)
        elif how == "twice":
            code, out, err = go_on(p, signal.SIGINT, signal.SIGTERM)
        else:
            code, out, err = go_on(p, getattr(signal, how))
    if beside:
        try:
            _, said = beside.communicate(timeout=60 * crashlib.SLOWER)
        except subprocess.TimeoutExpired:
            beside.kill()
            said = "it never ended"
        check(beside.returncode == 0, f"{what}: a merge that reads the store: "
                                      f"exit {beside.returncode}: {said}")
    if how == "alone":
        check(code == 0, f"{what}: exit {code} after going on: {err[-300:]}")
    else:
        # It may have been over already, or ended by the second signal.
        right = {"SIGINT": (0, 130), "SIGTERM": (0, 143),
                 "twice": (0, 130, 143)}[how]
        check(code in right, f"{what}, {how}: exit {code}: {err[-300:]}")
        if code and how != "twice":
            check("resume with" in err or "same command continues" in err,
                  f"{what}, {how}: no word on how to go on: {err[-300:]}")
            check(not os.path.exists(os.path.join(W.out, "config.json")),
                  f"{what}, {how}: config.json in an unfinished output")
        if code:
            ended = W.state() == after  # just before the signal
            r = run(*command, env=ENV)
            check(acceptable(r.returncode, ended),
                  f"{what}, {how}: repeated: exit {r.returncode}: "
                  f"{r.stderr[-300:]}")
    now = W.state()
    check(now == after, f"{what}, {how}: ended in {brief(now)}, not "
                        f"{brief(after)}")
    good = crashlib.failures_now() == failed
    table.add("two processes" if how == "alone" else f"signal, {how}",
              f"exit {code}" if good else "bad")
    return True


def pinned():
    """`rm` of what an interrupted merge into the store still needs."""
    W.clear()
    for c in W.all_linked():
        run(*c, env=ENV, code=0)
    r = R.run(*W.run_into(), env=ENV, kill=60, slow=2000)
    check(r.fired == 1, "the merge was not killed")
    r = run(A.tvstore, "rm", W.store, "ft1")
    check(r.returncode == 11 and "'m'" in r.stderr,
          f"rm of a pinned object: exit {r.returncode}: {r.stderr}")
    run(A.tvstore, "gc", W.store, code=0)
    run(*W.run_into(), env=ENV, code=0)
    run(A.tvstore, "rm", W.store, "ft1", code=0)


def main():
    pinned()
    prepared = []
    for job in jobs():
        W.clear()
        for c in job[1]:
            run(*c, env=ENV, code=0)
        saved = W.save(job[0])
        r = R.run(*job[2], env=ENV, slow=2000)
        check(r.returncode == 0, f"{job[0]}: {r.stderr}")
        prepared.append((job, saved, W.state(), r.calls))
    done = 0
    for i in range(A.count):
        job, saved, after, calls = prepared[i % len(prepared)]
        done += one(job, saved, after, 1 + rng.randrange(calls))
    table.close()
    check(done > A.count // 2, f"only {done} times a writer was stopped")
    finish("locks")


main()
