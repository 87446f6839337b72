#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Files that a store links to are truncated, replaced, changed or taken away,
before a command and while it runs; and media that cannot be written.

Linked inputs: exit 12 and the name of the file, nothing published; when the
file is as it was, the same command ends with the right digest. Plain inputs of
a merge (not in a store) the same while it runs, whatever error it is. A mapped
file that loses its pages while they are read raises SIGBUS: the program says
which file and exits with 12.

Read-only media (a mount, needs root): commands that read work, those that
write say so and exit with 1.
"""
import os
import random
import shutil
import signal
import subprocess
import time

import crashlib
from crashlib import (Recorder, Table, arguments, check, finish,
                      private_mounts, run, run_json, work_dir)
from scenarios import ENV, World

A = arguments(__doc__, 40)
WORK = work_dir()
W = World(A, WORK)
R = Recorder(A.recorder, W.disk, WORK)
table = Table()
rng = random.Random(A.seed)
FILE = os.path.join(W.models, "ft1", "model.safetensors")
SAVED = os.path.join(WORK, "ft1.saved")


def put_back():
    """The file as it was: bytes, times, and the inode where it is there."""
    st = os.stat(SAVED)
    with open(SAVED, "rb") as f:
        data = f.read()
    if os.path.exists(FILE + ".moved"):
        os.rename(FILE + ".moved", FILE)
    with open(FILE, "r+b") as f:
        f.write(data)
        f.truncate(len(data))
    os.utime(FILE, ns=(st.st_atime_ns, st.st_mtime_ns))


def truncate(n):
    st = os.stat(FILE)
    os.truncate(FILE, n)
    os.utime(FILE, ns=(st.st_atime_ns, st.st_mtime_ns))


def gone():
    os.rename(FILE, FILE + ".moved")


def replaced():
    """Another inode with the same bytes, size and times."""
    gone()
    shutil.copy2(SAVED, FILE)


def unreplaced():
    if os.path.exists(FILE + ".moved") and os.path.exists(FILE):
        os.unlink(FILE)


SIZE = os.path.getsize(FILE)
DAMAGE = {
    "empty": lambda: truncate(0),
    "header cut": lambda: truncate(100),
    "one byte short": lambda: truncate(SIZE - 1),
    "half": lambda: truncate(SIZE // 2),
    "grown": lambda: truncate(SIZE + 1),
    "touched": lambda: os.utime(FILE),
    "gone": gone,
    "replaced": replaced,
}


def before_a_command():
    """Of linked inputs: each command that reads the tensors."""
    W.clear()
    for c in W.all_linked():
        run(*c, env=ENV, code=0)
    commands = {
        "run": W.merge(W.stored, W.out, "--store", W.store),
        "into": W.run_into(),
        "export": W.tvstore("export", W.store, "ft1",
                            os.path.join(W.disk, "x")),
        "cat": W.tvstore("cat", W.store, "ft1/model.norm.weight"),
        "verify": W.tvstore("verify", W.store),
    }
    for damage, do in DAMAGE.items():
        for name, argv in commands.items():
            failed = crashlib.failures_now()
            what = f"{name}, linked file {damage}"
            do()
            r = run(*argv, env=ENV)
            unreplaced()
            put_back()
            check(r.returncode == 12,
                  f"{what}: exit {r.returncode}: {r.stderr.strip()[-300:]}")
            check(FILE in r.stderr + r.stdout,
                  f"{what}: the file is not named: {r.stderr.strip()[-300:]}")
            check(not os.path.exists(os.path.join(W.out, "config.json")),
                  f"{what}: something was published")
            good = crashlib.failures_now() == failed
            table.add(f"linked file {damage}",
                      f"exit {r.returncode}" if good else "bad")
    for name, argv in commands.items():
        run(*argv, env=ENV, code=0)


def while_running(count):
    """The file shrinks while a merge is stopped between two tensors."""
    cases = [("plain", [], W.run_out()),
             ("linked", W.all_linked(),
              W.merge(W.stored, W.out, *crashlib.SHARD, "--store", W.store))]
    for i in range(count):
        name, prepare, argv = cases[i % 2]
        failed = crashlib.failures_now()
        W.clear()
        for c in prepare:
            run(*c, env=ENV, code=0)
        r = R.run(*argv, env=ENV, slow=2000)
        want = W.output()
        total = r.calls
        shutil.rmtree(W.out)
        k = rng.randrange(total // 4, total)
        n = rng.choice((0, 4096, SIZE // 2 // 4096 * 4096))
        what = f"{name} input cut to {n} at call {k}"
        if os.path.exists(R.stat):
            os.unlink(R.stat)
        e = dict(os.environ)
        e.update(ENV)
        e.update({"LD_PRELOAD": R.library, "TVREC_DIR": W.disk,
                  "TVREC_STOP": str(k), "TVREC_SLOW": "2000"})
        p = subprocess.Popen([str(a) for a in argv], env=e, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while True:
            pid, status = os.waitpid(p.pid, os.WUNTRACED | os.WNOHANG)
            if pid:
                break
            time.sleep(0.002)
        if not os.WIFSTOPPED(status):
            p.returncode = os.waitstatus_to_exitcode(status)
            p.communicate()
            continue
        truncate(n)
        p.send_signal(signal.SIGCONT)
        out, err = p.communicate(timeout=60 * crashlib.SLOWER)
        put_back()
        if p.returncode == 0:
            # Everything had been read.
            check(W.output() == want, f"{what}: wrong bytes with exit 0")
        else:
            check(p.returncode == 12, f"{what}: exit {p.returncode}: {err}")
            check(FILE in err, f"{what}: the file is not named: {err}")
        r = run(*argv, env=ENV)
        check(r.returncode == 0, f"{what}: repeated: {r.stderr[-300:]}")
        check(W.output() == want, f"{what}: other bytes when repeated")
        good = crashlib.failures_now() == failed
        table.add(f"{name} input truncated while merging",
                  f"exit {p.returncode}" if good else "bad")


def read_only():
    if not private_mounts():
        print("left out: read-only media: no right to mount")
        return
    W.clear()
    for c in [W.init(), W.imported("base"), W.imported("ft1", "--link"),
              W.imported("ft2"), W.run_into()]:
        run(*c, env=ENV, code=0)
    want = run_json(A.tvstore, "info", W.store, "m", "--json")["digest"]
    for lock in (True, False):
        if not lock:
            # A store on a medium may come without the table of readers.
            os.unlink(os.path.join(W.store, "lock.mdb"))
        subprocess.run(["mount", "--bind", W.disk, W.disk], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", W.disk], check=True)
        try:
            s, x = W.store, os.path.join(WORK, "ro-out")
            what = f"read-only media, {'with' if lock else 'without'} lock.mdb"
            failed = crashlib.failures_now()
            for argv in (["ls", s], ["ls", s, "m"], ["info", s, "m"],
                         ["cat", s, "m/model.norm.weight"],
                         ["export", s, "m", x], ["stat", s], ["verify", s],
                         ["quota", s]):
                run(A.tvstore, *argv, code=0)
                shutil.rmtree(x, True)
            run(A.tvmerge, "plan", W.stored, x, "--store", s, code=0)
            doc = run_json(A.tvmerge, "run", W.stored, x, "--store", s,
                           "--json", "--progress=none")
            check(doc.get("digest") == want, f"{what}: run says {doc}")
            shutil.rmtree(x, True)
            for argv, code in ((W.imported("new", model="ft1"), 1),
                               (W.tvstore("rm", s, "base"), 1),
                               (W.tvstore("gc", s), 1),
                               (W.tvstore("quota", s, "1GB"), 1),
                               (W.run_into("n"), 1),
                               (W.tvstore("init", os.path.join(W.disk, "new")),
                                1),
                               # Planning sees that OUT cannot be made.
                               (W.run_out(), 4)):
                r = run(*argv)
                check(r.returncode == code, f"{what}: {argv[1:3]}: exit "
                      f"{r.returncode}: {r.stderr[-200:]}")
                check("read-only" in r.stderr.lower(),
                      f"{what}: {argv[1:3]}: no word of it: {r.stderr[-200:]}")
            good = crashlib.failures_now() == failed
            table.add("read-only media", "as it should be" if good else "bad",
                      16)
        finally:
            subprocess.run(["umount", W.disk], check=True)


def main():
    shutil.copy2(FILE, SAVED)
    before_a_command()
    while_running(A.count)
    read_only()
    table.close()
    finish("sources")


main()
