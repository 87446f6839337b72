#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A recipe of three documents, killed and failed at each call that changes a
file.

Wherever it is cut, no output and no stage has a config.json before everything
else is there; the same command then ends in the same bytes, side files and all,
and leaves no stages. Faults: SIGKILL before, in the middle of and after the
call; EIO and ENOSPC, once and from there on for ever. Without --count the last
calls of each document are taken, where one document hands over to the next:
what its record, its side files and its journal are written with. --count N: N
of all; 0: all.
"""
import errno
import os
import random
import shutil
import signal

from crashlib import (GROUP, SHARD, Recorder, Table, arguments, check, finish,
                      make_models, run, tree_of, work_dir)
import crashlib
from fsmodel import read_log

A = arguments(__doc__, -1, [("--last", {"type": int, "default": 3})])
WORK = work_dir()
DISK = os.path.join(WORK, "disk")
OUT = os.path.join(DISK, "out")
R = Recorder(A.recorder, DISK, WORK)
ENV = {"TV_PROGRESS": "none"}
# How many groups there are depends on the time, and so do the numbers of calls.
if A.count >= 0:
    ENV["TV_GROUP_BYTES"] = GROUP
table = Table()

KILLS = ("before", "half", "after")
FAILS = [("EIO", errno.EIO, 1, (1,)), ("EIO for ever", errno.EIO, 0, (1,)),
         ("ENOSPC", errno.ENOSPC, 1, (5,)),
         ("ENOSPC for ever", errno.ENOSPC, 0, (5,))]


def recipe(path, models):
    """A chain: whatever one stage lacks, the next one has from nobody else."""
    base, ft1, ft2 = (os.path.join(models, m) for m in ("base", "ft1", "ft2"))
    with open(path, "w") as f:
        f.write(f"name: one\nmerge_method: ties\nbase_model: {base}\n"
                "models:\n"
                f"- {{model: {ft1}, parameters: {{weight: 0.7, density: 0.4}}}}"
                f"\n- {{model: {ft2}, parameters: {{weight: 0.5, density: 0.6}}"
                "}\n---\nname: two\nmerge_method: passthrough\nslices:\n"
                "- sources: [{model: one, layer_range: [0, 2]}]\n"
                "- sources: [{model: one, layer_range: [1, 2]}]\n"
                "---\nmerge_method: linear\nmodels:\n"
                "- {model: two, parameters: {weight: 0.5}}\n"
                "parameters: {normalize: false}\n")
    return path


def clear():
    shutil.rmtree(DISK, True)
    os.makedirs(DISK)


def whole(path):
    """All files but the record, which tells when and how long."""
    t = tree_of(path) or {}
    return {k: v for k, v in t.items() if k != "tvmerge.json"}


def look(what, want):
    """What calls itself a model is one, and has a record."""
    good = True
    for name, d in (("", OUT), ("one", OUT + ".stages/one"),
                    ("two", OUT + ".stages/two")):
        if os.path.exists(os.path.join(d, "config.json")):
            now = {k: v for k, v in whole(d).items()
                   if not k.startswith(".tvmerge")}
            good &= check(now == want[name], f"{what}: '{name}' holds "
                          f"{sorted(now)}, not {sorted(want[name])}")
            good &= check(os.path.exists(os.path.join(d, "tvmerge.json")),
                          f"{what}: '{name}' has no record")
    return good


def again(what, command, want, digest):
    p = run(*command, env=ENV)
    if not check(p.returncode == 0, f"{what}: repeated: exit {p.returncode}: "
                 f"{p.stderr.strip()[-300:]}"):
        return
    check(whole(OUT) == want[""], f"{what}: ended with {sorted(whole(OUT))}")
    check('"digest": "%s"' % digest in p.stdout, f"{what}: another digest")
    check(sorted(os.listdir(DISK)) == ["out"],
          f"{what}: left behind {os.listdir(DISK)}")


def one(command, want, digest, k, fault):
    clear()
    if fault in KILLS:
        name, what = "SIGKILL", f"killed {fault} call {k}"
        r = R.run(*command, env=ENV, kill=k, when=fault)
        codes = (-signal.SIGKILL,)
    else:
        name, no, repeat, codes = fault
        what = f"{name} at call {k}"
        r = R.run(*command, env=ENV, fail=k, errno=no, repeat=repeat)
    if r.fired == 0:
        check(r.returncode == 0, f"{what}: exit {r.returncode}")
        return False
    failed = crashlib.failures_now()
    what += f" ({r.where})"
    check(r.returncode in codes or (r.returncode == 0 and fault not in KILLS),
          f"{what}: exit {r.returncode}: {r.stderr.strip()[-300:]}")
    legal = look(what, want)
    again(what, command, want, digest)
    good = crashlib.failures_now() == failed
    table.add(f"{name}, stages", ("recovered" if fault in KILLS else
                                  f"exit {r.returncode}") if good else "bad",
              lost=0 if legal and good else 1)
    return True


def last_calls(events, n):
    """The calls about the record and the config.json of each document, and all
    until what comes next has begun."""
    out = set()
    for e in events:
        if any(os.path.basename(p).startswith(n) for p in (e.path, e.path2)
               for n in ("tvmerge.json", "config.json")):
            out |= set(range(e.call, e.call + A.last))
    return {k for k in out if k <= n}


def main():
    models = make_models(os.path.join(WORK, "models"))
    file = recipe(os.path.join(WORK, "recipe.yml"), models)
    command = [A.tvmerge, "run", file, OUT, *SHARD, "--json", "--threads", "1"]
    clear()
    kept = os.path.join(WORK, "kept")
    run(*command, "--intermediate-dir", kept, env=ENV, code=0)
    want = {"": whole(OUT), "one": whole(os.path.join(kept, "one")),
            "two": whole(os.path.join(kept, "two"))}
    for name, files in want.items():
        check({"config.json", "tokenizer.json"} < set(files),
              f"'{name}' has {sorted(files)}")
    clear()
    log = os.path.join(WORK, "log")
    r = R.run(*command, env=ENV, log=log, fail=1 << 40)
    check(r.returncode == 0, r.stderr)
    check(whole(OUT) == want[""], "kept stages change nothing")
    digest = r.stdout.split('"digest": "')[1].split('"')[0]
    events = read_log(log)
    faults = [*KILLS, *FAILS]
    if A.count < 0:
        calls = sorted(last_calls(events, r.calls))
        # Every call is killed one way and fails another, in turn.
        jobs = [(k, KILLS[i % 3]) for i, k in enumerate(calls)] + \
            [(k, FAILS[i % 4]) for i, k in enumerate(calls)]
        print(f"of {r.calls} calls: {calls}")
    else:
        jobs = [(k, f) for k in range(1, r.calls + 1) for f in faults]
        if A.count:
            jobs = random.Random(A.seed).sample(jobs, min(A.count, len(jobs)))
    fired = sum(one(command, want, digest, k, f) for k, f in jobs)
    table.close()
    check(fired >= len(jobs) * (7 if A.count >= 0 else 9) // 10,
          f"{fired} of {len(jobs)} fired")
    finish("stages")


main()
