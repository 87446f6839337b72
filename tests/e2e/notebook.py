#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""notebook.py BIN_DIR SYNTH

A notebook with a nearly full disk, scaled down a hundred times: a quota of
200 MB, a base and two fine-tunes of 50 MB each that are linked read-only, and
three merges to outputs (ties, dare_ties, ties with other weights from the
magnitude masks of the first), each checked against a merge without any store
and then removed.

- What the store and the unfinished output have on disk, sampled all the time,
  never exceeds the quota; also when merges are killed and resumed, and when the
  quota is cut down so that derived data has to be evicted.
- Cached masks take at most 1.01 bits per weight, plus 2%.
- A repeated merge uses the cache and gives the same bytes.
"""
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

from common import check, finish, run, run_json, temp

BIN, SYNTH = map(os.path.abspath, sys.argv[1:3])
TVMERGE, TVSTORE = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tvstore")
QUOTA = 200_000_000
WORK = temp()
MODELS, STORE, OUT = (os.path.join(WORK, n) for n in ("models", "store", "out"))
# 23.9 million weights of bf16: 48 MB
SHAPE = ["--layers", "4", "--hidden", "640", "--kv", "320", "--inter", "1792",
         "--vocab", "8192", "--donors", "2"]


class Sampler(threading.Thread):
    """Bytes on disk of the store and the output, as often as it can."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = self.n = 0
        self.over = False

    def run(self):
        while not self.over:
            self.take()
            time.sleep(0.001)

    def take(self):
        total = 0
        for top in (STORE, OUT):
            for d, _, files in os.walk(top):
                for n in [""] + files:
                    try:
                        total += os.lstat(os.path.join(d, n)).st_blocks * 512
                    except FileNotFoundError:
                        pass
        self.n += 1
        self.peak = max(self.peak, total)

    def end(self):
        self.over = True
        self.join()
        return self.peak


def within(what, quota, argv, kills=0, total=1.0):
    """Runs a merge under the sampler, killed and resumed so many times."""
    s = Sampler()
    s.start()
    rng = random.Random(7)
    killed = 0
    for _ in range(20 * kills):
        if killed == kills:
            break
        p = subprocess.Popen(argv, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
        try:
            p.wait(timeout=total * rng.random())
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL)
            p.wait()
            killed += p.returncode != 0
        s.take()
        check(p.returncode in (0, -signal.SIGKILL),
              f"{what}: exit {p.returncode} between kills")
        if p.returncode == 0:
            # Once more from the start.
            if "--into" in argv:
                run(TVSTORE, "rm", STORE, "m")
            shutil.rmtree(OUT, True)
    check(killed == kills, f"{what}: only {killed} kills")
    t0 = time.monotonic()
    doc = run_json(*argv)
    seconds = time.monotonic() - t0
    s.take()
    peak = s.end()
    check(peak <= quota, f"{what}: {peak} bytes on disk, the quota is {quota}")
    used = run_json(TVSTORE, "stat", STORE, "--json")
    check(used["used_bytes"] <= quota, f"{what}: {used}")
    print(f"{what}: {seconds:.2f} s, peak {peak / 1e6:.1f} MB of "
          f"{quota / 1e6:.0f} in {s.n} samples, masks "
          f"{used['kinds']['masks'] / 1e6:.2f} MB, task vectors "
          f"{used['kinds']['task_vectors'] / 1e6:.2f} MB", flush=True)
    doc["took"] = seconds
    return doc, used


def recipe(name, text):
    """Two files: inputs from directories, and the same from the store."""
    paths = []
    for tag, prefix in (("dir", MODELS + "/"), ("store", "store:")):
        paths.append(os.path.join(WORK, f"{name}-{tag}.yml"))
        with open(paths[-1], "w") as f:
            f.write(text.replace("@", prefix))
    return paths


def ties(method, w1, w2):
    return (f"merge_method: {method}\nbase_model: '@base'\nmodels:\n"
            f"- model: '@ft1'\n  parameters: {{weight: {w1}, density: 0.2}}\n"
            f"- model: '@ft2'\n  parameters: {{weight: {w2}, density: 0.3}}\n"
            "dtype: bfloat16\n")


def main():
    subprocess.run([SYNTH, MODELS, *SHAPE], check=True)
    n_weights = 0
    for m in ("base", "ft1", "ft2"):
        f = os.path.join(MODELS, m, "model.safetensors")
        n_weights = os.path.getsize(f) // 2
        os.chmod(f, stat.S_IRUSR | stat.S_IRGRP)
    check(45e6 < 2 * n_weights < 55e6, f"models of {2 * n_weights} bytes")
    run(TVSTORE, "init", STORE, "--quota", str(QUOTA), code=0)
    for m in ("base", "ft1", "ft2"):
        run(TVSTORE, "import", STORE, m, os.path.join(MODELS, m), "--link",
            code=0)

    merges = {"ties": ties("ties", 0.7, 0.5),
              "dare_ties": ties("dare_ties", 0.7, 0.5),
              "ties again": ties("ties", 0.4, 0.9)}
    want, argvs = {}, {}
    for name, text in merges.items():
        plain, stored = recipe(name.replace(" ", "-"), text)
        p = os.path.join(WORK, "plain")
        want[name] = run_json(TVMERGE, "run", plain, p, "--json",
                              "--progress=none")["digest"]
        shutil.rmtree(p)
        argvs[name] = [TVMERGE, "run", stored, OUT, "--store", STORE, "--json",
                       "--progress=none"]
    docs = {}
    for name, argv in argvs.items():
        plan = run_json(TVMERGE, "plan", *argv[2:])
        check(plan.get("ok") and plan["peak_disk_bytes"] <= QUOTA,
              f"{name}: plan says {plan.get('peak_disk_bytes')}")
        docs[name], used = within(name, QUOTA, argv)
        check(docs[name].get("digest") == want[name],
              f"{name}: not the bytes of a merge without a store")
        check(os.path.exists(os.path.join(OUT, "config.json")),
              f"{name}: no config.json")
        shutil.rmtree(OUT)
        if name == "ties":
            masks = used["kinds"]["masks"]
            most = 2 * n_weights / 8 * 1.01 * 1.02
            check(0 < masks <= most,
                  f"masks take {masks} bytes, at most {most:.0f} are right")

    # the same once more, from what the earlier ones left
    doc, used = within("ties once more", QUOTA, argvs["ties"])
    check(doc.get("digest") == want["ties"], "a warm cache changed bytes")
    cache = doc.get("cache") or {}
    check(sum(v for k, v in cache.items() if "used" in k or "hit" in k) > 0,
          f"the cache was not used: {cache}")
    check(used["kinds"]["masks"] > 0, "the masks are gone")
    shutil.rmtree(OUT)

    # killed and resumed, inside the quota
    for name in ("ties", "dare_ties"):
        doc, used = within(f"{name}, killed", QUOTA, argvs[name], kills=8,
                           total=docs[name]["took"])
        check(doc.get("digest") == want[name], f"{name}: other bytes after kills")
        shutil.rmtree(OUT)
    run(TVSTORE, "verify", STORE, code=0)

    # Into the store, where only evicting derived data makes room.
    before = run_json(TVSTORE, "stat", STORE, "--json")
    derived = before["kinds"]["masks"] + before["kinds"]["task_vectors"]
    small = before["used_bytes"] + 2 * n_weights - derived // 2 + 2_000_000
    run(TVSTORE, "quota", STORE, str(small), code=0)
    argv = argvs["ties"][:3] + ["--into", "m", *argvs["ties"][4:]]
    doc, used = within("ties into the store, evicting", small, argv, kills=5,
                       total=2 * docs["ties"]["took"])
    check(doc.get("digest") == want["ties"], "eviction changed bytes")
    left = used["kinds"]["masks"] + used["kinds"]["task_vectors"]
    check(left < derived, f"nothing was evicted: {used}")
    run(TVSTORE, "verify", STORE, code=0)
    run(TVSTORE, "rm", STORE, "m", code=0)

    # Not even the output fits: refused before the work, with the number.
    now = run_json(TVSTORE, "stat", STORE, "--json")["used_bytes"]
    run(TVSTORE, "quota", STORE, str(now + 1_000_000), code=0)
    r = run(*argvs["ties"])
    check(r.returncode == 5, f"an output beyond the quota: exit "
          f"{r.returncode}: {r.stderr[-300:]}")
    check(not os.path.exists(OUT), "a refused merge left its output behind")
    check("quota" in r.stderr, f"a refusal without a reason: {r.stderr}")
    finish("notebook")


main()
