#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""SIGKILL before, in the middle of and after every call that changes a file.

Commands: those of scenarios.py. After each kill readers see the old state or
the new one, the store verifies, and the same command ends as if nobody had
interrupted it; every fourth time that command is itself killed, again and
again, before it may finish.
"""
import itertools
import os
import random
import signal

import crashlib
from crashlib import Recorder, Table, arguments, check, finish, run, work_dir
from scenarios import ENV, World, acceptable, brief, is_legal

A = arguments(__doc__, 120, [("--scenario", {"default": ""})])
WORK = work_dir()
W = World(A, WORK)
R = Recorder(A.recorder, W.disk, WORK)
table = Table()
rng = random.Random(A.seed)


def look(what, before, after):
    now = W.state()
    ok = check(is_legal(now, before, after, True),
               f"{what}: found {brief(now)}, not {brief(before)} or "
               f"{brief(after)}")
    if now[0] is not None:
        run(A.tvstore, "verify", W.store, code=0)
    return ok, now


def one(name, command, before, after, kept, k, when, fault):
    """False when call k is not reached."""
    what = f"{name}: {' '.join(command[1:3])} killed {when} call {k}"
    failed = crashlib.failures_now()
    r = R.run(*command, env=ENV, kill=k, when=when)
    if r.fired == 0:
        check(r.returncode == 0, f"{what}: exit {r.returncode}: {r.stderr}")
        return False
    # gc works in a child, and its parent lives to say that it was killed.
    check(r.returncode == -signal.SIGKILL or
          "gc" in command and r.returncode == 1,
          f"{what}: exit {r.returncode}: {r.stderr[-200:]}")
    what += f" ({r.where})"
    legal, now = look(what, before, after)
    kills = 1
    if rng.randrange(4) == 0:
        for _ in range(4):
            r = R.run(*command, env=ENV, kill=1 + rng.randrange(40),
                      when=rng.choice(("before", "half", "after")))
            if r.fired == 0:
                check(acceptable(r.returncode, now == after),
                      f"{what}: repeated: exit {r.returncode}: {r.stderr}")
                now = W.state()
                break
            kills += 1
            ok, now = look(what + f" and again at {r.where}", before, after)
            legal = legal and ok
    p = run(*command, env=ENV)
    check(acceptable(p.returncode, now == after),
          f"{what}: repeated: exit {p.returncode}: {p.stderr.strip()[-300:]}")
    now = W.state()
    check(W.statistics() == kept,
          f"{what}: statistics {W.statistics()}, not {kept}")
    check(now == after, f"{what}: ended in {brief(now)}, not {brief(after)}")
    check(not os.path.exists(os.path.join(W.out, ".tvmerge")),
          f"{what}: state left behind")
    if now[0] is not None:
        run(A.tvstore, "verify", W.store, code=0)
    good = crashlib.failures_now() == failed
    table.add(fault, "recovered" if good else "bad", kills,
              0 if legal else 1)
    return True


def calls_of(command, saved):
    """How many calls the command makes; they vary a little with the timing of
    threads."""
    W.load(saved)
    r = R.run(*command, env=ENV, slow=2000)
    check(r.returncode == 0, f"{command}: {r.stderr}")
    return r.calls


def plan():
    """[(scenario, command, state before, state after, statistics after, saved
    disk, calls)]"""
    out = []
    names = A.scenario.split(",") if A.scenario else list(W.scenarios)
    for name in names:
        W.prepare(name)
        for i, command in enumerate(W.scenarios[name][1]):
            saved = W.save(f"{name}-{i}")
            before = W.state()
            n = calls_of(command, saved)
            out.append((name, command, before, W.state(), W.statistics(),
                        saved, n))
    return out


def main():
    jobs = plan()
    every = [(j, k, when) for j in jobs for k, when in
             itertools.product(range(1, j[6] + 1),
                               ("before", "half", "after"))]
    if A.count < len(every):
        every = rng.sample(every, A.count)
    for (name, command, before, after, kept, saved, _), k, when in every:
        W.load(saved)
        one(name, command, before, after, kept, k, when, f"SIGKILL, {name}")
    table.close()
    fired = sum(r["fired"] for r in table.rows.values())
    check(fired >= min(A.count, len(every)) * 2 // 3,
          f"only {fired} kills of {len(every)}")
    finish("kills")


main()
