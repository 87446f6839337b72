#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Power loss at every moment of import, run, run --into and their relatives.

Each scenario is a list of commands on an empty or prepared directory. They are
run once under the recorder; fsmodel.py then builds what the disk may hold at
any point between two calls, and for each such image the store and the outputs
are looked at as a user would after switching on again:

- the store opens and verifies; readers see the state before or after the
  command that was cut off, whole; acknowledged commands are never undone;
- an output with a config.json is complete and is one model, not two;
- tensors whose group was committed are not merged again;
- the same command, and those after it, end in the state of the run that nobody
  interrupted.
"""
import hashlib
import os
import random
import shutil

import crashlib
import fsmodel
from crashlib import (Recorder, Table, arguments, check, copy_tree, finish,
                      run, run_json, work_dir)
from scenarios import ENV, World, acceptable, brief, is_legal

A = arguments(__doc__, 150, [
    ("--scenario", {"default": ""}), ("--keep", {"default": ""}),
    ("--lie", {"action": "store_true",
               "help": "a disk that ignores syncs: damage must be found"})])
WORK = work_dir()
W = World(A, WORK)
table = Table()


# ---- one scenario ----

class Run:
    """The recording of a scenario, and the states between its commands."""

    def __init__(self, name, recorder):
        self.name = name
        self.commands = W.scenarios[name][1]
        W.prepare(name)
        self.initial = W.save("initial")
        log = os.path.join(WORK, "log")
        if os.path.exists(log):
            os.unlink(log)
        self.states = [W.state()]
        for i, c in enumerate(self.commands):
            fsmodel.append_mark(log, f"begin {i}")
            r = recorder.run(*c, env=ENV, log=log, slow=2000)
            check(r.returncode == 0, f"{name}: {c}: {r.stderr}")
            fsmodel.append_mark(log, f"end {i}")
            self.states.append(W.state())
        self.events = fsmodel.read_log(log)
        self.resumes = not any("--force" in c for c in self.commands)

    def disk(self):
        """The model with what was there before."""
        d = fsmodel.Disk(W.disk)

        def load(path, node):
            for n in os.listdir(path):
                p = os.path.join(path, n)
                if os.path.isdir(p):
                    x = fsmodel.Dir()
                    load(p, x)
                else:
                    x = fsmodel.File()
                    with open(p, "rb") as f:
                        x.write(0, f.read())
                    x.sync()
                node.disk[n] = node.now[n] = x
        load(self.initial, d.root)
        return d


def restore(image):
    shutil.rmtree(W.disk, True)
    os.makedirs(W.disk)
    for p, data in image.items():
        p = os.path.join(W.disk, p)
        if data is None:
            os.makedirs(p)
        else:
            with open(p, "wb") as f:
                f.write(data)


def n_resumed(r, image, at):
    """Tensors that a run on this image does not have to do again."""
    restore(image)
    c = r.commands[at]
    if c[1] != "run":
        return 0
    return run_json(*c, env=ENV).get("n_resumed", 0)


class Judge:
    """Looks at images of one scenario."""

    def __init__(self, r):
        self.r = r
        self.seen = set()
        self.bad = 0

    def key(self, image, at):
        h = hashlib.blake2b(repr((at, sorted(
            (k, v is None) for k, v in image.items()))).encode())
        for k in sorted(image):
            h.update(image[k] or b"")
        return h.digest()

    def look(self, image, kind, at, in_flight, least, where):
        """at: commands before it are acknowledged. False: seen before."""
        k = self.key(image, (at, in_flight, least))
        if k in self.seen:
            return False
        self.seen.add(k)
        r = self.r
        restore(image)
        failed = crashlib.failures_now()
        what = f"{r.name}, {kind} at {where}"
        before = r.states[at]
        after = r.states[at + 1] if at < len(r.commands) else before
        now = W.state()
        legal = check(is_legal(now, before, after, in_flight),
                      f"{what}: found {brief(now)}, not "
                      f"{brief(before)} or {brief(after)}")
        if now[0] is not None:
            run(A.tvstore, "verify", W.store, code=0)
        repeated = 0
        for i in range(at, len(r.commands)):
            p = run(*r.commands[i], env=ENV)
            done = i == at and now == after
            check(acceptable(p.returncode, done),
                  f"{what}: {' '.join(r.commands[i][1:3])}: exit "
                  f"{p.returncode}: {p.stderr.strip()[-300:]}")
            if i == at and least and p.returncode == 0:
                try:
                    repeated = crashlib.json.loads(p.stdout)["n_resumed"]
                except ValueError:
                    repeated = -1
                check(repeated >= least,
                      f"{what}: {repeated} tensors kept, {least} were durable")
        if at == len(r.commands) and r.commands[-1][1] == "run":
            run(*r.commands[-1], env=ENV, code=0)
        now = W.state()
        check(now == r.states[-1],
              f"{what}: ended in {brief(now)}, not "
              f"{brief(r.states[-1])}")
        check(not os.path.exists(os.path.join(W.out, ".tvmerge")),
              f"{what}: state left behind")
        if now[0] is not None:
            run(A.tvstore, "verify", W.store, code=0)
        good = crashlib.failures_now() == failed
        if not good:
            self.bad += 1
            if A.keep:
                restore(image)
                to = os.path.join(A.keep, f"{r.name}-{self.bad}")
                copy_tree(W.disk, to)
        outcome = "recovered" if good else "bad"
        if good and repeated:
            outcome = "resumed"
        table.add(f"power loss, {r.name}", outcome,
                  lost=0 if legal and (not least or repeated >= least) else 1)
        return True


def images(d, rng, n):
    """(kind, image) at one moment: the two ends, then n others."""
    yield "nothing lost", d.everything()
    if not d.dirty() and not d.changes:
        return
    yield "all unsynced lost", d.nothing()
    yield "unsynced data lost", d.nothing(names=True)
    for _ in range(n):
        kind = rng.choice(("kept_or_lost", "torn", "one_lost", "one_kept",
                           "names_mixed", "name_lost"))
        yield kind, getattr(d, kind)(rng)


def play(r, judge, cuts, each, most, rng):
    """Goes through the recording once; returns the number of new images."""
    d = r.disk()
    at, in_flight = 0, False
    synced = None       # image of the last commit, its bound not yet known
    least = 0
    made = 0
    for i, e in enumerate(r.events):
        if e.op == fsmodel.MARK:
            at = int(e.path.split()[1]) + e.path.startswith("end")
            in_flight = e.path.startswith("begin")
            least, synced = 0, None
        else:
            d.begin(e)
        if i in cuts:
            if synced is not None and r.resumes and in_flight:
                least = max(least, n_resumed(r, synced, at))
                synced = None
            for kind, image in images(d, rng, each):
                if made >= most:
                    return made
                made += judge.look(image, kind, at, in_flight, least,
                                   f"call {i} of {len(r.events)} ({e.path})")
        if e.op != fsmodel.MARK:
            if not A.lie or e.op not in (fsmodel.SYNC, fsmodel.DATASYNC):
                d.end(e)
            if e.op == fsmodel.WRITE and e.flags & fsmodel.DSYNC:
                synced = d.nothing(names=True)
    return made


def play_all(r, count, rng):
    """Passes over the recording until there are enough different images."""
    judge = Judge(r)
    every = set(range(len(r.events)))
    made = 0
    idle = 0
    while made < count and idle < 3:
        cuts = every
        if count - made < 2 * len(every):
            cuts = set(rng.sample(sorted(every),
                                  min(len(every), (count - made) // 2 + 1)))
        new = play(r, judge, cuts, 2, count - made, rng)
        idle = 0 if new else idle + 1
        made += new
    return made


def main():
    recorder = Recorder(A.recorder, W.disk, WORK)
    names = A.scenario.split(",") if A.scenario else list(W.scenarios)
    total = 0
    for i, name in enumerate(names):
        r = Run(name, recorder)
        n = play_all(r, A.count // len(names), random.Random(A.seed + i))
        total += n
        print(f"{name}: {len(r.events)} calls recorded, {n} images",
              flush=True)
    if A.lie:
        found, crashlib.common.failures = crashlib.failures_now(), 0
        check(found > 0, "the damage that a lying disk does was not found")
        finish("powerloss --lie")
    table.close()
    check(total >= A.count // 2, f"only {total} images")
    finish("powerloss")


if __name__ == "__main__":
    main()
