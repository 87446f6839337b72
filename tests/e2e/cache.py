#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cache.py BIN_DIR SYNTH DATA

What a store remembers of earlier merges changes nothing but the time: digests
with an empty, warm and evicted cache are equal, for any threads, instruction
set, memory budget and kind of input, adapters included, killed and resumed.
Store and unfinished output together never take more than the quota, sampled
all the while, although the merges need far more room for masks than there is.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

from common import (Sampler, check, finish, run, run_json, temp, used,
                    write_safetensors)

BIN, SYNTH, DATA = map(os.path.abspath, sys.argv[1:4])
TVMERGE, TVSTORE = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tvstore")
SHAPE = ["--layers", "2", "--hidden", "512", "--kv", "128", "--inter", "1408",
         "--vocab", "4099"]


def recipe(name, base, donors, method="ties", more=""):
    text = f"merge_method: {method}\nbase_model: {base}\nmodels:\n"
    for ref, weight, density in donors:
        text += (f"- model: {ref}\n"
                 f"  parameters: {{weight: {weight}, density: {density}}}\n")
    with open(name, "w") as f:
        f.write(text + more)
    return name


def merge(path, out, *more, env=None, code=0):
    return run_json(TVMERGE, "run", path, out, "--json", *more, env=env,
                    code=code)


def cache(doc, *want):
    names = ("masks_used", "masks_stored", "task_vectors_used",
             "task_vectors_stored")
    got = tuple(doc.get("cache", {}).get(n) for n in names)
    check(got == want, f"cache {got}, expected {want}")


def same_bytes(tmp):
    os.chdir(tmp)
    run(SYNTH, "models", *SHAPE, "--donors", "2", code=0)
    run(TVSTORE, "init", "s", code=0)
    for m in ("base", "ft1", "ft2"):
        run(TVSTORE, "import", "s", m, f"models/{m}", "--link", "-q", code=0)
    r = recipe("dir.yml", "models/base", [("models/ft1", 0.7, 0.2),
                                          ("models/ft2", 0.5, 0.35)])
    linked = recipe("linked.yml", "store:base", [("store:ft1", 0.7, 0.2),
                                                 ("store:ft2", 0.5, 0.35)])
    sweep = recipe("sweep.yml", "store:base", [("store:ft1", 0.3, 0.2),
                                               ("store:ft2", 0.9, 0.35)])
    none = merge(r, "out-none")
    cache(none, 0, 0, 0, 0)
    want, n = none["digest"], none["n_tensors"] * 2
    first = merge(r, "out-cold", "--store", "s")
    cache(first, 0, n, 0, 0)
    second = merge(r, "out-masks", "--store", "s", "--threads", "1")
    cache(second, n, 0, 0, n)
    # Linking a file says nothing new about it: the same keys.
    third = merge(linked, "out-vectors", "--store", "s")
    cache(third, n, 0, n, 0)
    check(third["bytes_read"] < second["bytes_read"],
          "task vectors are read in place of the donors")
    for d in (first, second, third):
        check(d["digest"] == want, "digest with cache")
    for isa in ("ref", "avx2", "avx512"):
        d = merge(linked, f"out-{isa}", "--store", "s", env={"TV_CPU": isa})
        check(d["digest"] == want, f"digest with {isa}")
    small = merge(linked, "out-16", "--store", "s", "--memory", "16MiB")
    check(small["digest"] == want, "digest in 16 MiB")
    check(small["peak_scratch_bytes"] <= 16 << 20, "16 MiB are kept to")
    d = run_json(TVMERGE, "run", linked, "--into", "m", "--store", "s",
                 "--json")
    check(d["digest"] == want, "digest of --into")
    cache(d, n, 0, n, 0)
    other = merge(sweep, "out-sweep", "--store", "s")
    cache(other, n, 0, n, 0)
    check(other["digest"] == merge(sweep, "out-sweep0", "--store", "s",
                                   "--no-cache")["digest"], "digest of a sweep")
    again = merge(r, "out-cold", "--store", "s")
    check(again["already_done"], "a finished merge is left alone")

    ls = run_json(TVSTORE, "mask", "ls", "s", "--json")
    check(len(ls["sets"]) == 2, "two sets of masks")
    weights = sum(x["elements"] for x in ls["sets"])
    check(sum(x["bytes"] for x in ls["sets"]) * 8 <= 1.01 * 1.02 * weights,
          "masks cost a bit per weight")
    stat = run_json(TVSTORE, "stat", "s", "--json")
    check(stat["n_masks"] == n and stat["n_task_vectors"] == n, "stat counts")
    check(stat["kinds"]["masks"] == sum(x["bytes"] for x in ls["sets"]),
          "stat and mask ls agree")
    for x in ls["sets"]:
        check(abs(x["density"] - x["about"]["density"]) < 1e-3, "density")
        info = run_json(TVSTORE, "mask", "info", "s", x["id"], "--json")
        check(len(info["tensors"]) == n // 2, "a mask per tensor")
        check(sum(t["kept"] for t in info["tensors"]) == x["kept"], "kept")
    run(TVSTORE, "mask", "info", "s", "nobody", code=10)
    run(TVSTORE, "mask", "info", "s", code=2)
    run(TVSTORE, "mask", "size", "s", code=2)

    before = run_json(TVSTORE, "stat", "s", "--json")["file_bytes"]
    gc = run_json(TVSTORE, "gc", "s", "--derived", "--json")
    check(gc["n_evicted"] == 2 * n and gc["freed_bytes"] > stat["kinds"]
          ["task_vectors"], "gc --derived drops them")
    run_json(TVSTORE, "compact", "s", "--json")
    after = run_json(TVSTORE, "stat", "s", "--json")
    check(after["kinds"]["masks"] == 0 and after["file_bytes"] < before,
          "compact gives the pages back")
    run(TVSTORE, "verify", "s", "-q", code=0)
    d = merge(linked, "out-after", "--store", "s")
    cache(d, 0, n, 0, 0)
    check(d["digest"] == want, "digest with an evicted cache")


def nested(tmp):
    """Masks are nested in density: their overlap is that of their sizes."""
    os.chdir(tmp)
    run(TVSTORE, "init", "n", code=0)
    for d in (0.1, 0.4):
        merge(recipe("n.yml", "models/base", [("models/ft1", 1, d)]),
              f"n{d}", "--store", "n")
    o = run_json(TVSTORE, "mask", "overlap", "n", "--json")
    check(len(o["pairs"]) == 1, "one pair")
    p = o["pairs"][0]
    check(abs(p["jaccard"] - 0.25) < 1e-3, f"Jaccard {p['jaccard']}")
    ls = run_json(TVSTORE, "mask", "ls", "n", "--json")["sets"]
    check(p["both"] == min(x["kept"] for x in ls) and
          p["either"] == max(x["kept"] for x in ls), "nested masks")


def adapters(tmp):
    os.chdir(tmp)
    run(TVSTORE, "init", "a", code=0)
    r = recipe("a.yml", f"{DATA}/base",
               [(f"{DATA}/ft-code", 0.6, 0.2),
                (f"{DATA}/base+{DATA}/lora-jargon", 0.5, 0.3)],
               more="parameters: {rescale: true}\n")
    want = merge(r, "a0")["digest"]
    for i in range(1, 4):
        check(merge(r, f"a{i}", "--store", "a")["digest"] == want,
              "digest with adapters")
    u = merge(r, "a4", "--store", "a")["cache"]
    check(u["task_vectors_used"] == u["masks_used"] > 0, "vectors of adapters")


def bounded(tmp):
    """Store and output within the quota, sampled; with kills in between."""
    os.chdir(tmp)
    model = os.path.getsize("models/ft1/model.safetensors")
    quota = int(model + (3 << 20))
    run(TVSTORE, "init", "q", "--quota", quota, code=0)
    for m in ("base", "ft1", "ft2"):
        run(TVSTORE, "import", "q", m, f"models/{m}", "--link", "-q", code=0)
    sampler = Sampler("q", "qout")
    rnd = random.Random(5)
    kills = evicted = 0
    stored = 0
    for i, density in enumerate([0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.2,
                                 0.9, 0.95, 0.05]):
        r = recipe("q.yml", "store:base", [("store:ft1", 0.7, density),
                                           ("store:ft2", 0.5, density)])
        plain = recipe("plain.yml", "models/base",
                       [("models/ft1", 0.7, density),
                        ("models/ft2", 0.5, density)])
        want = merge(plain, "plain")["digest"] if i % 4 == 0 else None
        shutil.rmtree("plain", True)
        argv = [TVMERGE, "run", r, "qout", "--store", "q", "--json",
                "--threads", "2"]
        if i % 3 == 1:
            p = subprocess.Popen(argv, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL,
                                 env=dict(os.environ, TV_GROUP_BYTES="1MB"))
            time.sleep(rnd.uniform(0.005, 0.08))
            p.send_signal(signal.SIGKILL)
            kills += p.wait() == -signal.SIGKILL
        d = run_json(*argv)
        stored += d["cache"]["masks_stored"] + d["cache"]["task_vectors_stored"]
        if want:
            check(d["digest"] == want, f"digest under a quota ({density})")
        sets = run_json(TVSTORE, "mask", "ls", "q", "--json")["sets"]
        evicted += len(sets) < 2 * (i + 1)
        shutil.rmtree("qout")
    peak = sampler.end()
    check(peak <= quota, f"{peak} bytes at one moment, the quota is {quota}")
    check(sampler.n > 200 and peak > model, "sampled while something was there")
    check(stored > 100 and evicted > 0, f"stored {stored}, evicted {evicted}")
    run(TVSTORE, "verify", "q", "-q", code=0)
    print(f"quota: {sampler.n} samples, peak {peak} of {quota}, {kills} kills, "
          f"{stored} items stored")

    # What cannot fit is refused before the work, with numbers.
    run(TVSTORE, "quota", "q", used("q") + model // 2, code=0)
    e = run(TVMERGE, "run", r, "qout", "--store", "q", code=5)
    check("missing" in e.stderr and "could go" in e.stderr, "what is missing")
    check(not os.path.exists("qout"), "nothing was written")
    p = run_json(TVMERGE, "plan", r, "qout", "--store", "q", "--json", code=5)
    check(not p["ok"] and p["peak_disk_bytes"] > model, "plan says so too")

    # User data push derived data out.
    run(TVSTORE, "quota", "q", used("q") + model, code=0)
    d = run_json(TVMERGE, "run", r, "--into", "m", "--store", "q", "--json")
    check(d.get("n_tensors", 0) > 0, "a merge into the store finds room")
    stat = run_json(TVSTORE, "stat", "q", "--json")
    check(stat["used_bytes"] <= stat["quota_bytes"], "within the quota")
    run(TVSTORE, "verify", "q", "-q", code=0)


def lowered(tmp):
    """A quota below the size of the file, or little above it: a merge into the
    store is refused while it is planned, or ends; derived data can go."""
    os.chdir(tmp)
    run(SYNTH, "small", "--layers", "2", "--hidden", "256", "--kv", "128",
        "--inter", "512", "--vocab", "2048", "--donors", "2", code=0)
    run(TVSTORE, "init", "f", code=0)
    for m in ("base", "ft1", "ft2"):
        run(TVSTORE, "import", "f", m, f"small/{m}", "--link", "-q", code=0)
    refs = [("store:ft1", 0.7), ("store:ft2", 0.5)]
    for density in (0.2, 0.3, 0.4, 0.5):
        r = recipe("f.yml", "store:base", [(*d, density) for d in refs])
        for _ in range(2):  # masks, then task vectors
            merge(r, "fout", "--store", "f")
            shutil.rmtree("fout")
    r = recipe("f.yml", "store:base", [(*d, 0.1) for d in refs])
    into = [r, "--into", "m", "--store", "g"]
    stat = run_json(TVSTORE, "stat", "f", "--json")
    kinds = stat["kinds"]
    shutil.copytree("f", "g")
    need = run_json(TVMERGE, "plan", *into, "--json")["peak_disk_bytes"]
    least = stat["used_bytes"] + need - sum(
        kinds[k] for k in ("masks", "task_vectors", "free"))
    check(least + (2 << 20) < stat["file_bytes"], "more goes than is needed")
    codes = []
    for quota in [least + k * 200000 for k in range(-1, 10)] + \
            [stat["file_bytes"] + k * 20000 for k in (-1, 4, 5, 9)]:
        shutil.rmtree("g")
        shutil.copytree("f", "g")
        run(TVSTORE, "quota", "g", quota, code=0)
        p = run(TVMERGE, "plan", *into)
        e = run(TVMERGE, "run", *into)
        codes.append(p.returncode)
        check(p.returncode in (0, 5) and e.returncode == p.returncode,
              f"quota {quota}: plan {p.returncode}, run {e.returncode}: "
              f"{e.stderr[-200:]}")
        check(p.returncode == 0 or "missing" in e.stderr and
              len(run_json(TVSTORE, "ls", "g", "--json")["objects"]) == 3,
              f"quota {quota}: refused before the work: {e.stderr[-200:]}")
        run(TVSTORE, "gc", "g", "--derived", code=0)
    check(codes[0] == 5 and codes[-1] == 0 and codes == sorted(codes)[::-1],
          f"refused, then not: {codes}")
    run(TVSTORE, "verify", "g", "-q", code=0)
    # Derived data make room for a side file, too.
    shutil.rmtree("g")
    shutil.copytree("f", "g")
    with open("small/ft1/tokenizer.json", "w") as f:
        json.dump({"model": {"type": "BPE"}, "x": "y" * 2000000}, f)
    run(TVSTORE, "quota", "g", stat["file_bytes"] + 200000, code=0)
    run(TVSTORE, "import", "g", "more", "small/ft1", "--link", "-q", code=0)
    check(used("g") <= stat["file_bytes"] + 200000, "within the quota")


def shreds(store):
    """Free pages of a store in short runs only: between each two tensors of a
    model that went lies one that another model has too."""
    rng = random.Random(11)
    kept, gone = {}, {}
    for i in range(120):
        rows = (25, 3, 50, 9)[i % 4]
        gone[f"x{i:03}a"] = ("BF16", (rows, 2048), rng.randbytes(rows * 4096))
        kept[f"x{i:03}a"] = gone[f"x{i:03}a"]
        gone[f"x{i:03}b"] = ("BF16", (rows, 2048), rng.randbytes(rows * 4096))
    for name, tensors in (("gone", gone), ("kept", kept)):
        os.makedirs(name)
        write_safetensors(os.path.join(name, "model.safetensors"), tensors)
        shutil.copy("small/base/config.json", name)
        run(TVSTORE, "import", store, name, name, "-q", code=0)
    run(TVSTORE, "rm", store, "gone", code=0)
    run(TVSTORE, "gc", store, code=0)


def fragmented(tmp):
    """Where free pages lie apart, chunks are made as small as they have to be,
    and side files are cut; what has no room in pieces either is refused while
    it is planned."""
    os.chdir(tmp)
    for d in ("f", "g", "small"):
        shutil.rmtree(d, True)
    run(SYNTH, "small", "--layers", "2", "--hidden", "256", "--kv", "128",
        "--inter", "512", "--vocab", "6000", "--donors", "2", code=0)
    run(TVSTORE, "init", "f", code=0)
    shreds("f")
    r = recipe("f.yml", "small/base", [("small/ft1", 0.7, 1),
                                       ("small/ft2", 0.5, 1)],
               "task_arithmetic")
    into = [r, "--into", "m", "--store", "g"]
    size = run_json(TVSTORE, "stat", "f", "--json")["file_bytes"]
    free = run_json(TVSTORE, "stat", "f", "--json")["kinds"]["free"]
    for words in (0, 600000):
        if words:
            with open("small/base/tokenizer.json", "w") as f:
                json.dump({"model": {"type": "BPE"}, "x": "y" * words}, f)
        shutil.rmtree("g", True)
        shutil.copytree("f", "g")
        need = run_json(TVMERGE, "plan", *into, "--json")["peak_disk_bytes"]
        digest = run_json(TVMERGE, "run", *into, "--json")["digest"]
        check(need + (1 << 20) < free, "nothing has to grow")
        codes = []
        for quota in [size + k * 400000 for k in range(-3, 6)] + \
                [size - free + need * 3 // 4, 2 * size]:
            what = f"fragmented, {words}, quota size{quota - size:+}"
            shutil.rmtree("g")
            shutil.copytree("f", "g")
            run(TVSTORE, "quota", "g", quota, code=0)
            p = run(TVMERGE, "plan", *into)
            e = run(TVMERGE, "run", *into, "--json")
            codes.append(p.returncode)
            check(p.returncode in (0, 5) and e.returncode == p.returncode,
                  f"{what}: plan {p.returncode}, run {e.returncode}: "
                  f"{e.stderr[-200:]}")
            if e.returncode == 0:
                check(json.loads(e.stdout)["digest"] == digest,
                      f"{what}: another digest")
                check(used("g") <= max(quota, size + (64 << 10)),
                      f"{what}: takes size{used('g') - size:+}")
            run(TVSTORE, "verify", "g", "-q", code=0)
        check(codes[3] == 0 and codes[-2] == 5 and codes[-1] == 0, f"{words}: {codes}")


def record(tmp):
    """The record of a merge, which is put last, and the state of the run find
    room wherever free pages lie: what plan lets run ends, within the quota."""
    os.chdir(tmp)
    for d in ("f", "g", "gone", "kept"):
        shutil.rmtree(d, True)
    rng = random.Random(3)

    def model(name, tensors):
        os.makedirs(name)
        write_safetensors(os.path.join(name, "model.safetensors"), tensors)
        with open(os.path.join(name, "config.json"), "w") as f:
            json.dump({"architectures": ["LlamaForCausalLM"],
                       "model_type": "llama", "hidden_size": 64,
                       "num_hidden_layers": 4000, "vocab_size": 100}, f)

    gone = {f"t{i:04}": ("BF16", (14000,), rng.randbytes(28000))
            for i in range(900)}
    model("gone", gone)
    model("kept", {k: gone[k] for k in list(gone)[1::2]})
    for name in ("many", "more"):
        model(name, {f"model.layers.{i}.weight":
                     ("BF16", (16, 16), rng.randbytes(64) + bytes(448))
                     for i in range(722)})
    run(TVSTORE, "init", "f", code=0)
    for name in ("gone", "kept"):
        run(TVSTORE, "import", "f", name, name, "-q", code=0)
    run(TVSTORE, "rm", "f", "gone", code=0)
    run(TVSTORE, "gc", "f", code=0)
    r = recipe("record.yml", "many", [("more", 0.5, 1)], "task_arithmetic")
    into = [r, "--into", "m", "--store", "g"]
    size = run_json(TVSTORE, "stat", "f", "--json")["file_bytes"]
    digest = None
    for quota in (size - 400000, size - 50000, size + 20000, size + 100000,
                  2 * size):
        what = f"record, quota size{quota - size:+}"
        shutil.rmtree("g", True)
        shutil.copytree("f", "g")
        run(TVSTORE, "quota", "g", quota, code=0)
        there = used("g")
        run(TVMERGE, "plan", *into, code=0)
        d = run_json(TVMERGE, "run", *into, "--json")
        digest = digest or d.get("digest")
        check(d.get("digest") == digest, f"{what}: another digest")
        check(used("g") <= max(quota, there),
              f"{what}: takes {used('g') - there:+}")
        run(TVSTORE, "verify", "g", "-q", code=0)
        run(TVMERGE, "plan", *into, code=0)
        done = run_json(TVMERGE, "run", *into, "--json")
        check(done.get("already_done") and done.get("digest") == digest,
              f"{what}: the record is read again")


def main():
    tmp = temp()
    for part in (same_bytes, nested, adapters, bounded, lowered, fragmented,
                 record):
        t = time.time()
        part(tmp)
        print(f"{part.__name__}: {time.time() - t:.1f} s", flush=True)
    finish("cache")


main()
