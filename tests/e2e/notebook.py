#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""notebook.py BIN_DIR SYNTH [--importance QUICKSTART [--small]]

A notebook with a nearly full disk, scaled down a hundred times: a quota of
200 MB, a base and two fine-tunes of 50 MB each that are linked read-only, and
three merges to outputs (ties, dare_ties, ties with other weights from the
magnitude masks of the first), each checked against a merge without any store
and then removed. --importance: the same with masks by what the layers' inputs
need (ties, linear, ties with other weights), over text and with the tokenizer
of QUICKSTART; --small: a quarter of the size.

- What the store and the unfinished output have on disk, files without a name
  included, sampled all the time, never exceeds the quota; also when merges are
  killed and resumed, and when the quota is cut down so that derived data has to
  be evicted.
- Cached masks take at most 1.01 bits per weight, plus 2%.
- A repeated merge uses the cache and gives the same bytes; it calibrates
  nothing, nor do other methods and weights.
"""
import argparse
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

from common import check, finish, read_safetensors, run, run_json, temp

ARGS = argparse.ArgumentParser()
ARGS.add_argument("bin", type=os.path.abspath)
ARGS.add_argument("synth", type=os.path.abspath)
ARGS.add_argument("--importance", metavar="QUICKSTART", type=os.path.abspath)
ARGS.add_argument("--small", action="store_true")
ARGS = ARGS.parse_args()
TVMERGE, TVSTORE = (os.path.join(ARGS.bin, p) for p in ("tvmerge", "tvstore"))
QUICK = ARGS.importance
WORK = temp()
MODELS, STORE, OUT = (os.path.join(WORK, n) for n in ("models", "store", "out"))
SCALE = 4 if ARGS.small else 1
QUOTA = 200_000_000 // SCALE
# 23.9 million weights of bf16, 48 MB; small: 5.8 million
SHAPE = ["--donors", "2", *(
    ["--layers", "2", "--hidden", "512", "--kv", "256", "--inter", "1024",
     "--vocab", "2048"] if ARGS.small else
    ["--layers", "4", "--hidden", "640", "--kv", "320", "--inter", "1792",
     "--vocab", "8192"])]
SAMPLES, CONTEXT = (4, 64) if ARGS.small else (16, 128)
KILLS = 3 if ARGS.small else 8


class Sampler(threading.Thread):
    """Bytes on disk of the store and the output, as often as it can."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = self.n = self.nameless = self.pid = 0
        self.over = False

    def run(self):
        while not self.over:
            self.take()
            time.sleep(0.001)

    def take(self):
        total = nameless = 0
        for top in (STORE, OUT):
            for d, _, files in os.walk(top):
                for n in [""] + files:
                    try:
                        total += os.lstat(os.path.join(d, n)).st_blocks * 512
                    except FileNotFoundError:
                        pass
        # Scratch files are unlinked at once, and are there all the same.
        fds = f"/proc/{self.pid}/fd"
        try:
            for n in os.listdir(fds) if self.pid else []:
                st = os.stat(os.path.join(fds, n))
                if stat.S_ISREG(st.st_mode) and st.st_nlink == 0:
                    nameless += st.st_blocks * 512
        except OSError:
            pass
        self.n += 1
        self.peak = max(self.peak, total + nameless)
        self.nameless = max(self.nameless, nameless)

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
        s.pid = p.pid
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
    p = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
    s.pid = p.pid
    out, err = p.communicate()
    seconds = time.monotonic() - t0
    s.take()
    peak = s.end()
    check(p.returncode == 0, f"{what}: exit {p.returncode}: {err[-300:]}")
    doc = json.loads(out) if p.returncode == 0 else {}
    check(peak <= quota, f"{what}: {peak} bytes on disk, the quota is {quota}")
    used = run_json(TVSTORE, "stat", STORE, "--json")
    check(used["used_bytes"] <= quota, f"{what}: {used}")
    print(f"{what}: {seconds:.2f} s, peak {peak / 1e6:.1f} MB of "
          f"{quota / 1e6:.0f} ({s.nameless / 1e6:.2f} without a name) in {s.n} "
          f"samples, masks {used['kinds']['masks'] / 1e6:.2f} MB, task vectors "
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


def text(method, w1, w2):
    """A recipe, '@' where its models lie."""
    extra, tasks = "", {"ft1": "", "ft2": ""}
    if QUICK:
        extra = "parameters: {sparsify: importance}\n"
        tasks = {m: f"  calibration: {{text: {QUICK}/text/{t}.calib.txt, "
                    f"samples: {SAMPLES}, context: {CONTEXT}}}\n"
                 for m, t in (("ft1", "code"), ("ft2", "prose"))}
    return (f"merge_method: {method}\nbase_model: '@base'\nmodels:\n"
            f"- model: '@ft1'\n  parameters: {{weight: {w1}, density: 0.2}}\n"
            f"{tasks['ft1']}"
            f"- model: '@ft2'\n  parameters: {{weight: {w2}, density: 0.3}}\n"
            f"{tasks['ft2']}{extra}dtype: bfloat16\n")


def new_store():
    shutil.rmtree(STORE, True)
    run(TVSTORE, "init", STORE, "--quota", str(QUOTA), code=0)
    for m in ("base", "ft1", "ft2"):
        run(TVSTORE, "import", STORE, m, os.path.join(MODELS, m), "--link",
            code=0)


def calibrated(doc):
    """Models that ran over their text, masks that were made."""
    use = doc.get("calibration") or {}
    return use.get("models", 0), use.get("masks_made", 0)


def weights():
    """Weights of a model, and of its masks: all, or those of linear layers."""
    path = os.path.join(MODELS, "base", "model.safetensors")
    os.chmod(path, stat.S_IRUSR | stat.S_IRGRP)
    sizes = {n: len(raw) // 2
             for n, (_, _, raw) in read_safetensors(path).items()}
    return sum(sizes.values()), sum(
        n for name, n in sizes.items() if not QUICK or "_proj." in name)


def make_models():
    subprocess.run([ARGS.synth, MODELS, *SHAPE], check=True)
    for m in ("base", "ft1", "ft2"):
        os.chmod(os.path.join(MODELS, m, "model.safetensors"),
                 stat.S_IRUSR | stat.S_IRGRP)
        for f in ("tokenizer.json", "tokenizer_config.json") if QUICK else ():
            shutil.copy(os.path.join(QUICK, "base", f),
                        os.path.join(MODELS, m, f))


def evicting(argv, n_weights, want, took):
    """Into the store, where only evicting derived data makes room."""
    before = run_json(TVSTORE, "stat", STORE, "--json")
    derived = before["kinds"]["masks"] + before["kinds"]["task_vectors"]
    small = before["used_bytes"] + 2 * n_weights - derived // 2 + 2_000_000
    run(TVSTORE, "quota", STORE, str(small), code=0)
    doc, used = within("ties into the store, evicting", small, argv,
                       kills=min(KILLS, 5), total=2 * took)
    check(doc.get("digest") == want, "eviction changed bytes")
    left = used["kinds"]["masks"] + used["kinds"]["task_vectors"]
    check(left < derived, f"nothing was evicted: {used}")
    run(TVSTORE, "verify", STORE, code=0)
    run(TVSTORE, "rm", STORE, "m", code=0)


def tight(argv, want):
    """Into an empty store with hardly room for the output and its masks."""
    new_store()
    used = run_json(TVSTORE, "stat", STORE, "--json")["used_bytes"]
    plan = run_json(TVMERGE, "plan", *argv[2:])
    small = used + int(1.03 * plan["peak_disk_bytes"]) + 800_000
    run(TVSTORE, "quota", STORE, str(small), code=0)
    doc, _ = within("ties into the store, hardly room", small, argv)
    check(doc.get("digest") == want, "little room changes bytes")
    run(TVSTORE, "rm", STORE, "m", code=0)


def main():
    make_models()
    n_weights, n_masked = weights()
    check(45e6 < 2 * n_weights * SCALE < 55e6,
          f"models of {2 * n_weights} bytes")
    new_store()
    other = "linear" if QUICK else "dare_ties"
    merges = {"ties": text("ties", 0.7, 0.5),
              other: text("task_arithmetic" if QUICK else other, 0.7, 0.5),
              "ties again": text("ties", 0.4, 0.9)}
    want, argvs = {}, {}
    for name, body in merges.items():
        plain, stored = recipe(name.replace(" ", "-"), body)
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
            most = 2 * n_masked / 8 * 1.01 * 1.02
            check(0 < masks <= most,
                  f"masks take {masks} bytes, at most {most:.0f} are right")
            print(f"masks: {8 * masks / (2 * n_masked):.4f} bits per weight")
        if QUICK:
            check((calibrated(docs[name])[0] > 0) == (name == "ties"),
                  f"{name}: {docs[name].get('calibration')}")

    # the same once more, from what the earlier ones left
    doc, used = within("ties once more", QUOTA, argvs["ties"])
    check(doc.get("digest") == want["ties"], "a warm cache changed bytes")
    cache = doc.get("cache") or {}
    check(sum(v for k, v in cache.items() if "used" in k or "hit" in k) > 0,
          f"the cache was not used: {cache}")
    check(calibrated(doc) == (0, 0), f"calibrated: {doc.get('calibration')}")
    check(used["kinds"]["masks"] > 0, "the masks are gone")
    shutil.rmtree(OUT)

    # killed and resumed, inside the quota; calibrated masks from nothing
    for name in ("ties", other):
        if QUICK:
            new_store()
        doc, used = within(f"{name}, killed", QUOTA, argvs[name], kills=KILLS,
                           total=docs["ties" if QUICK else name]["took"])
        check(doc.get("digest") == want[name], f"{name}: other bytes after kills")
        shutil.rmtree(OUT)
    run(TVSTORE, "verify", STORE, code=0)

    into = argvs["ties"][:3] + ["--into", "m", *argvs["ties"][4:]]
    if not ARGS.small:
        evicting(into, n_weights, want["ties"], docs["ties"]["took"])
    if QUICK:
        tight(into, want["ties"])

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
