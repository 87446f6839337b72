#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every system call and every allocation of small commands fails once.

Commands: init, import (copied, linked), run, run --into. Faults: EIO of each
call, reading ones included; ENOSPC of each call that writes, once and from
there on for ever; a write that transfers half and then fails; EIO for ever
(what a disk does that has died); NULL from each malloc, calloc, realloc and
aligned_alloc of whatever library, after main has begun.

Each time: an exit status that says what happened (or 0 where the program can
do without), a message, nothing half done in sight of readers, and the same
command then ends as if nothing had happened. --step N takes every N-th fault of
each command, the same ones each time; --count N as many as make about N; --count
0 all. --only takes the faults of that name, or of which it is a part; --command
one command; --part I/N every N-th fault from the I-th on, for N drivers side by
side.
"""
import errno
import os

import crashlib
from crashlib import Recorder, Table, arguments, check, finish, run, work_dir
from scenarios import ENV, World, acceptable, brief, is_legal

A = arguments(__doc__, 200, [("--only", {"default": ""}),
                             ("--command", {"default": ""}),
                             ("--step", {"type": int, "default": 0}),
                             ("--part", {"default": "0/1"})])
WORK = work_dir()
W = World(A, WORK)
R = Recorder(A.recorder, W.disk, WORK)
ALL = Recorder(A.recorder, "/", WORK)  # inputs and recipes as well
table = Table()
ends_well = set()  # (command, sum of the bytes that it was repeated on)

ONCE, FOR_EVER = 1, 0
IO, FULL = (1,), (5,)
# What an input that cannot be read may be called.
READS = (1, 2, 4, 10, 12)


class Fault:
    """settings(k): for the recorder. codes: statuses that are right."""

    def __init__(self, name, recorder, codes, settings, count):
        self.name, self.recorder, self.codes = name, recorder, codes
        self.settings, self.count = settings, count


FAULTS = [
    Fault("EIO, any call", ALL, READS,
          lambda k: dict(fail=k, errno=errno.EIO, reads=1), "calls"),
    Fault("EIO for ever", R, IO,
          lambda k: dict(fail=k, errno=errno.EIO, repeat=FOR_EVER), "calls"),
    Fault("ENOSPC", R, FULL,
          lambda k: dict(fail=k, errno=errno.ENOSPC), "calls"),
    Fault("ENOSPC for ever", R, FULL,
          lambda k: dict(fail=k, errno=errno.ENOSPC, repeat=FOR_EVER),
          "calls"),
    Fault("short write, then ENOSPC", R, FULL + IO,
          lambda k: dict(fail=k, errno=errno.ENOSPC, short=1,
                         repeat=FOR_EVER), "calls"),
    Fault("no memory", R, IO, lambda k: dict(alloc=k), "allocs"),
]


def commands():
    """[(name, commands that prepare, command)]"""
    tight = W.scenarios["tight"][1]
    return [("init", [], W.init()),
            ("import", [W.init()], W.imported("base")),
            ("link", [W.init()], W.imported("base", "--link")),
            ("run", [], W.run_out()),
            ("run-store", W.all_linked(), W.run_stored()),
            ("into", W.all_linked(), W.run_into()),
            # Long values in pieces: put, and replaced by one that is shorter.
            ("tight", W.all_tight(), tight[0]),
            ("again-tight", W.all_tight() + tight[:2], tight[2])]


def inject(name, command, before, after, saved, fault, k):
    what = f"{name}, {fault.name} at {k}"
    failed = crashlib.failures_now()
    W.load(saved)
    r = fault.recorder.run(*command, env=ENV, **fault.settings(k))
    fired = r.allocs_fired if fault.count == "allocs" else r.fired
    if fired == 0:
        check(r.returncode == 0, f"{what}: exit {r.returncode} without fault")
        return False
    what += f" ({r.where})" if fault.count == "calls" else ""
    now = W.state()
    legal = check(is_legal(now, before, after, True),
                  f"{what}: found {brief(now)}")
    if r.returncode == 0:
        check(now == after, f"{what}: exit 0, but {brief(now)}")
    else:
        check(r.returncode in fault.codes,
              f"{what}: exit {r.returncode}: {r.stderr.strip()[-300:]}")
        check("error" in r.stderr,
              f"{what}: exit {r.returncode} without a message: {r.stderr}")
    if now[0] is not None:
        W.verify()
    # Most faults come before anything is written: what the command makes of
    # the same bytes is known then.
    key = (name, W.sum_of())
    if key not in ends_well:
        p = run(*command, env=ENV)
        check(acceptable(p.returncode, now == after),
              f"{what}: repeated: exit {p.returncode}: "
              f"{p.stderr.strip()[-300:]}")
        now = W.state()
        check(now == after, f"{what}: ended in {brief(now)}")
        check(not os.path.exists(os.path.join(W.out, ".tvmerge")),
              f"{what}: state left behind")
        if now[0] is not None:
            W.verify()
    good = crashlib.failures_now() == failed
    if good:
        ends_well.add(key)
    table.add(f"{fault.name}, {name}",
              f"exit {r.returncode}" if good else "bad",
              lost=0 if legal else 1)
    return True


def chosen():
    same = [f for f in FAULTS if f.name == A.only]
    return same or [f for f in FAULTS if A.only in f.name]


def main():
    jobs = []
    every = 0
    W.remember()
    for name, prepare, command in commands():
        if A.command and A.command != name:
            continue
        W.clear()
        for c in prepare:
            run(*c, env=ENV, code=0)
        saved = W.save(name)
        before = W.state()
        for fault in chosen():
            W.load(saved)
            far = 1 << 40
            r = fault.recorder.run(*command, env=ENV, **fault.settings(far))
            check(r.returncode == 0, f"{name}: {r.stderr}")
            n = r.allocs if fault.count == "allocs" else r.calls
            print(f"{name}, {fault.name}: {n} possible", flush=True)
            every += n
            jobs.append((n, (name, command, before, W.state(), saved, fault)))
    step = A.step or (max(1, every // A.count) if A.count else 1)
    part, parts = map(int, A.part.split("/"))
    tried = fired = 0
    # How many calls a merge makes depends on which thread is faster: the
    # position in the list must not, else a count that differs moves all that
    # come after it.
    for i, (n, job) in enumerate(jobs):
        for k in range(1 + i * 7 % step + part * step, n + 1, step * parts):
            tried += 1
            fired += inject(*job, k)
    table.close()
    print(f"{fired} of {every} possible faults")
    check(tried > 0 and fired >= tried * 9 // 10,
          f"only {fired} of {tried} fired")
    finish("syscalls")


main()
