#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up, at every amount of room, on real file systems.

A small tmpfs and an ext4 image on a loop device (both need root and are left
out without it) and the file size limit of the process (which does not). A
filler leaves so many bytes; the command ends with exit 5, or 0 when they are
enough; readers see the old state; the filler goes and the same command ends as
on an empty disk. The amounts go from nothing to a little more than the command
needs, so that each stage meets the full disk: admission, journal, shards,
payloads, side files, the last commit.
"""
import os
import random
import resource
import subprocess

import crashlib
from crashlib import (Table, arguments, check, finish, private_mounts, run,
                      skip, work_dir)
from scenarios import ENV, World, acceptable, brief, is_legal

A = arguments(__doc__, 90, [("--only", {"default": ""})])
WORK = work_dir()
rng = random.Random(A.seed)
table = Table()
STEP = 4096


class Mounted:
    """A file system of a few MB at WORK/<name>."""

    def __init__(self, name, *argv):
        self.name = name
        self.path = os.path.join(WORK, name)
        os.makedirs(self.path)
        for a in argv:
            r = subprocess.run(a, capture_output=True, text=True)
            if r.returncode:
                self.why = f"{a[0]}: {r.stderr.strip()}"
                self.close()
                return
        self.why = None

    def close(self):
        subprocess.run(["umount", self.path], capture_output=True)

    def free(self):
        s = os.statvfs(self.path)
        return s.f_bavail * s.f_frsize

    def leave(self, n):
        """Fills all but about n bytes."""
        more = self.free() - n
        if more <= 0:
            return
        fd = os.open(self.filler(), os.O_WRONLY | os.O_CREAT, 0o600)
        at = os.fstat(fd).st_size
        # The file system needs some blocks for itself.
        while more > 0:
            try:
                os.posix_fallocate(fd, at, more)
                break
            except OSError:
                more -= STEP
        os.close(fd)

    def filler(self):
        return os.path.join(self.path, "filler")

    def unfill(self):
        if os.path.exists(self.filler()):
            os.unlink(self.filler())

    def limited(self, n, command):
        self.leave(n)
        r = run(*command, env=ENV)
        self.after = self.free()
        self.unfill()
        return r


class Limited:
    """Not a full disk, but the longest file that the process may write."""
    name, why = "file size limit", None

    def __init__(self):
        self.path = os.path.join(WORK, "limited")
        os.makedirs(self.path)

    def close(self):
        pass

    def limited(self, n, command):
        e = dict(os.environ)
        e.update(ENV)
        return subprocess.run(
            [str(a) for a in command], env=e, text=True, capture_output=True,
            timeout=120 * crashlib.SLOWER, preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (n, n)))


def file_systems():
    if not A.only or A.only == "limit":
        yield Limited()
    if not private_mounts():
        print("left out: tmpfs and ext4: no right to mount")
        return
    if not A.only or A.only == "tmpfs":
        d = os.path.join(WORK, "tmpfs")
        yield Mounted("tmpfs", ["mount", "-t", "tmpfs", "-o", "size=3m",
                                "none", d])
    if not A.only or A.only == "ext4":
        d, image = os.path.join(WORK, "ext4"), os.path.join(WORK, "image")
        with open(image, "wb") as f:
            f.truncate(16 << 20)
        yield Mounted("ext4",
                      ["mkfs.ext4", "-q", "-m", "0", "-b", "4096", image],
                      ["mount", "-o", "loop", image, d])


def commands(w):
    """[(name, commands that prepare, command, bytes that are enough)]"""
    return [("import", [w.init()], w.imported("base"), 400 << 10),
            ("run", [], w.run_out(), 500 << 10),
            ("run-force", [w.run_out()], w.merge(w.dare, w.out, "--force"),
             500 << 10),
            ("run-store", w.all_linked(), w.run_stored(), 600 << 10),
            ("into", w.all_linked(), w.run_into(), 600 << 10)]


def one(fs, w, name, command, before, after, saved, n):
    what = f"{name} on {fs.name} with {n} bytes"
    failed = crashlib.failures_now()
    w.load(saved)
    r = fs.limited(n, command)
    now = w.state()
    legal = check(is_legal(now, before, after, True),
                  f"{what}: found {brief(now)}")
    if r.returncode == 0:
        check(now == after, f"{what}: exit 0, but {brief(now)}")
    else:
        check(r.returncode == 5,
              f"{what}: exit {r.returncode}: {r.stderr.strip()[-300:]}")
    if now[0] is not None:
        w.verify()
    p = run(*command, env=ENV)
    check(acceptable(p.returncode, now == after),
          f"{what}: repeated: exit {p.returncode}: {p.stderr.strip()[-300:]}")
    now = w.state()
    check(now == after, f"{what}: ended in {brief(now)}, not {brief(after)}")
    check(not os.path.exists(os.path.join(w.out, ".tvmerge")),
          f"{what}: state left behind")
    good = crashlib.failures_now() == failed
    if r.returncode:
        table.add(f"full: {fs.name}, {name}",
                  f"exit {r.returncode}" if good else "bad",
                  lost=0 if legal else 1)
    return r.returncode


def main():
    jobs, closing = [], []
    try:
        for fs in file_systems():
            if fs.why:
                print(f"left out: {fs.name}: {fs.why}")
                continue
            closing.append(fs)
            w = World(A, os.path.join(WORK, "w-" + fs.name.split()[-1]),
                      fs.path)
            w.remember()
            for name, prepare, command, enough in commands(w):
                w.clear()
                for c in prepare:
                    run(*c, env=ENV, code=0)
                saved, before = w.save(name), w.state()
                run(*command, env=ENV, code=0)
                after = w.state()
                jobs += [(fs, w, name, command, before, after, saved, n)
                         for n in range(0, enough + STEP, STEP)]
        if A.count and A.count < len(jobs):
            jobs = rng.sample(jobs, A.count)
        codes = [one(*j) for j in jobs]
        check(any(codes) and not all(codes),
              "the disk was never full, or always")
    finally:
        for fs in closing:
            fs.close()
    table.close()
    if not closing:
        skip("no file system to fill")
    finish("diskfull")


main()
