# SPDX-License-Identifier: Apache-2.0
"""The commands that the crash drivers interrupt, the directories they work in,
and what those may hold afterwards."""
import hashlib
import json
import os
import shutil

from crashlib import (GROUP, SHARD, calibrated, check, copy_tree, make_models,
                      objects, recipe, run, weights_of, write_safetensors)

ENV = {"TV_GROUP_BYTES": GROUP, "TV_PROGRESS": "none"}
SMALL = ["--memory", "256KiB"]  # of import: a batch is at least 64 KiB


class World:
    """Inputs, one store, one output directory; commands are lists of words."""

    def __init__(self, args, work, disk=None):
        self.work, self.tools = work, args
        self.memo = None
        self.disk = disk or os.path.join(work, "disk")
        self.store = os.path.join(self.disk, "store")
        self.out = os.path.join(self.disk, "out")
        os.makedirs(work, exist_ok=True)
        self.models = make_models(os.path.join(work, "models"))
        self.other = make_models(os.path.join(work, "other"), seed=8)
        self.ties = recipe(os.path.join(work, "ties.yml"), self.models)
        self.dare = recipe(os.path.join(work, "dare.yml"), self.models,
                           "dare_ties")
        self.stored = recipe(os.path.join(work, "stored.yml"), self.models,
                             prefix="store:")
        self.masks = calibrated(os.path.join(work, "masks.yml"), self.models)
        self.merged = calibrated(os.path.join(work, "merged.yml"), self.models,
                                 "merged")
        # With tokenizers of several pages: long values.
        for i, path in enumerate(("long", "shorter")):
            path = os.path.join(work, path)
            setattr(self, os.path.basename(path), make_models(path))
            for m in ("base", "ft1", "ft2"):
                with open(os.path.join(path, m, "tokenizer.json"), "w") as f:
                    json.dump({"version": "1.0", "words": "word " *
                               (9000 - 4000 * i)}, f)
        os.makedirs(os.path.join(work, "gone"))
        write_safetensors(os.path.join(work, "gone", "model.safetensors"), {
            f"t{i}": ("U8", (60000,), bytes([i]) * 60000) for i in range(24)})
        self.scenarios = self.make_scenarios()

    # ---- commands ----

    def tvstore(self, *a):
        return [self.tools.tvstore, *a]

    def merge(self, *a):
        return [self.tools.tvmerge, "run", *a, "--json", "--threads", "1"]

    def init(self):
        return self.tvstore("init", self.store)

    def imported(self, name, *more, models=None, model=None):
        return self.tvstore("import", self.store, name,
                            os.path.join(models or self.models, model or name),
                            *SMALL, *more)

    def run_out(self, *more):
        return self.merge(self.ties, self.out, *SHARD, *more)

    def run_into(self, name="m", *more):
        return self.merge(self.stored, "--into", name, "--store", self.store,
                          *more)

    def run_stored(self, *more):
        return self.merge(self.stored, self.out, *SHARD, "--store",
                          self.store, *more)

    def calibrate(self):
        return [self.tools.tveval, "calibrate",
                os.path.join(self.models, "base"), "--store", self.store,
                "--random-tokens", "--samples", "6", "--context", "32",
                "--stat", "gram", "--threads", "1", "--json"]

    def all_linked(self):
        return [self.init()] + [self.imported(m, "--link")
                                for m in ("base", "ft1", "ft2")]

    def all_tight(self):
        """Many free pages, and a quota that lets the file grow no more: long
        values are put in pieces."""
        return self.all_linked() + [
            self.imported("gone", models=self.work),
            self.tvstore("rm", self.store, "gone"),
            self.tvstore("gc", self.store),
            self.tvstore("quota", self.store, "1MiB")]

    def make_scenarios(self):
        """name: (commands that prepare, commands to interrupt)"""
        out = {
            "import": ([], [
                self.init(), self.imported("base"), self.imported("ft1"),
                self.imported("base", "--force", models=self.other),
                self.imported("ft2", "--link")]),
            "run": ([], [self.run_out()]),
            "run-force": ([self.run_out()],
                          [self.merge(self.dare, self.out, "--force")]),
            # The store keeps masks and task vectors of what it is used for.
            "run-store": (self.all_linked(), [self.run_stored()]),
            "into": (self.all_linked(), [self.run_into()]),
            "into-force": (self.all_linked() +
                           [self.imported("m", model="ft2")], [
                self.merge(self.dare, "--into", "m", "--store", self.store,
                           "--force"),
                self.tvstore("rm", self.store, "base"),
                self.tvstore("gc", self.store)]),
        }
        out["tight"] = (self.all_tight(), [
            self.imported("base", "--link", "--force", models=self.long),
            self.run_into(),
            self.imported("base", "--link", "--force", models=self.shorter),
            self.tvstore("rm", self.store, "m"),
            self.tvstore("gc", self.store)])
        if os.path.exists(self.tools.tveval):
            out["calibrate"] = ([self.init()], [self.calibrate()])
            out["masks"] = ([], [self.merge(self.masks, self.out, *SHARD)])
            out["merged"] = ([], [self.merge(self.merged, self.out, *SHARD)])
        if "compact" in run(self.tools.tvstore, "--help").stdout:
            out["compact"] = (
                [self.init(), self.imported("base"), self.imported("ft1"),
                 self.imported("ft2"), self.tvstore("rm", self.store, "ft1")],
                [self.tvstore("compact", self.store)])
        return out

    def prepare(self, name):
        """A fresh disk with what the scenario starts from."""
        self.clear()
        for c in self.scenarios[name][0]:
            run(*c, env=ENV, code=0)

    def clear(self):
        if os.path.ismount(self.disk):
            for n in os.listdir(self.disk):
                p = os.path.join(self.disk, n)
                if os.path.isdir(p) and not os.path.islink(p):
                    shutil.rmtree(p, True)
                else:
                    os.unlink(p)
            return
        shutil.rmtree(self.disk, True)
        os.makedirs(self.disk)

    def save(self, name):
        to = os.path.join(self.work, "saved-" + name)
        copy_tree(self.disk, to)
        return to

    def load(self, saved):
        self.clear()
        shutil.copytree(saved, self.disk, symlinks=True, dirs_exist_ok=True)

    # ---- what is there ----

    def statistics(self):
        """Number and bytes; (0, 0) without a store. Not part of state():
        they may be there in part, and go when room is needed."""
        r = run(self.tools.tvstore, "stat", self.store, "--json")
        if r.returncode != 0:
            return (0, 0)
        doc = json.loads(r.stdout)
        return doc["n_statistics"], doc["kinds"]["statistics"]

    def output(self):
        if not os.path.exists(os.path.join(self.out, "config.json")):
            return None
        try:
            return weights_of(self.out)
        except Exception as e:  # whatever a damaged file makes a reader do
            return f"unreadable: {e!r}"

    def sum_of(self):
        """Of all bytes that state and verify look at."""
        h = hashlib.blake2b()
        for d, _, files in sorted(os.walk(self.disk)):
            for n in sorted(files):
                if n not in ("lock.mdb", "writer.lock"):
                    p = os.path.join(d, n)
                    h.update(p.encode() + b"\0")
                    with open(p, "rb") as f:
                        h.update(f.read())
        return h.digest()

    def remember(self):
        """From here on, equal bytes are looked at once: for drivers with
        thousands of faults that change nothing."""
        self.memo = {}

    def verify(self):
        """Only when there is a store."""
        key = None if self.memo is None else (self.sum_of(), "verify")
        if key is None or key not in self.memo:
            r = run(self.tools.tvstore, "verify", self.store)
            check(r.returncode in (0, 10), f"verify: exit {r.returncode}: "
                  f"{r.stdout[-200:]}{r.stderr[-200:]}")
            if key and r.returncode in (0, 10):
                self.memo[key] = True

    def state(self):
        key = None if self.memo is None else (self.sum_of(), "state")
        if key is None or key not in self.memo:
            now = self.look()
            if key is None:
                return now
            self.memo[key] = now
        return self.memo[key]

    def look(self):
        """What readers see: objects with digests, the output's tensors."""
        return (objects(self.tools.tvstore, self.store)
                if os.path.isdir(self.store) else None, self.output())


def is_legal(now, before, after, in_flight):
    """The old state or the new one. An output that is being replaced may be
    gone, never half there."""
    if now == before or (in_flight and now == after):
        return True
    store, out = now
    return (in_flight and out is None and
            store in (before[0], after[0]) and before[1] != after[1])


def acceptable(code, done):
    """Exit status of a repeated command; done: it had already ended."""
    return code == 0 or (done and code in (4, 10))


def brief(state):
    store, out = state
    return (f"store {store}, output " +
            ("none" if out is None else out if isinstance(out, str) else
             "%08x" % (hash(repr(sorted(out.items()))) & 0xffffffff)))
