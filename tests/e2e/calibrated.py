#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""calibrated.py BIN_DIR QUICKSTART

Merges whose masks depend on the inputs of layers: counts of what is kept, the
same bytes for threads, memory, cold and warm store, statistics kept or not,
killed and repeated, within a quota; a second run calibrates nothing; a killed
one goes on with the masks it had made; layers that took more damping are told
by name; embeddings by token counts; errors.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

from common import Sampler, check, finish, read_safetensors, run, run_json, temp

BIN = os.path.abspath(sys.argv[1])
MODELS = os.path.abspath(sys.argv[2])
TVMERGE = os.path.join(BIN, "tvmerge")
TVEVAL = os.path.join(BIN, "tveval")
TVSTORE = os.path.join(BIN, "tvstore")
TEXT = {m: os.path.join(MODELS, "text", f"{m}.calib.txt")
        for m in ("code", "prose")}
CAL = "calibration: {text: %s, samples: 4, context: 48}"


def recipe(path, method, density, weight=1.0, extra="", donors=("code",),
           calibrated=True):
    lines = [f"merge_method: {method}", f"base_model: {MODELS}/base",
             "models:"]
    for d in donors:
        lines += [f"- model: {MODELS}/ft-{d}",
                  f"  parameters: {{weight: {weight}, density: {density}}}"]
        if calibrated:
            lines += ["  " + CAL % TEXT[d]]
    lines += ["dtype: float32"] + ([f"parameters: {{{extra}}}"] if extra else [])
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")
    return path


def values(path):
    return {name: np.frombuffer(raw, np.float32).reshape(shape).astype(float)
            if dtype == "F32" else
            (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16)
            .view(np.float32).reshape(shape).astype(float)
            for name, (dtype, shape, raw) in read_safetensors(path).items()}


def merge(r, out, *options, **kw):
    return run_json(TVMERGE, "run", r, out, "--json", *options, **kw)


def linear(name):
    return ".layers." in name and "_proj." in name


def kept(base, out):
    return {n: out[n] != base[n] for n in out}


def masks(where):
    base = values(f"{MODELS}/base/model.safetensors")
    ft = values(f"{MODELS}/ft-code/model.safetensors")
    before = None
    for density in (0.1, 0.4):
        r = recipe(f"{where}/m.yml", "task_arithmetic", density,
                   extra="sparsify: importance")
        merge(r, f"{where}/m{density}")
        out = values(f"{where}/m{density}/model.safetensors")
        k = kept(base, out)
        for n, mask in k.items():
            if not linear(n):
                check(np.array_equal(out[n], ft[n]), f"{n} is the fine-tune's")
                continue
            check(mask.sum() == int(density * mask.size),
                  f"{n} at {density}: {mask.sum()} of {mask.size}")
            check(np.array_equal(out[n][mask], ft[n][mask]), f"{n} unchanged")
            check(before is None or not (before[n] & ~mask).any(),
                  f"{n}: nested in density")
        before = k
    r = recipe(f"{where}/p.yml", "sparsegpt_linear", 1,
               extra="pattern: 2:4, error_correction: obs+cg")
    merge(r, f"{where}/p")
    out = values(f"{where}/p/model.safetensors")
    for n, mask in kept(base, out).items():
        if linear(n):
            groups = mask.reshape(-1, 4).sum(axis=1)
            check((groups <= 2).all() and (groups == 2).mean() > 0.9,
                  f"{n}: 2 of 4")


def same_bytes(where):
    for i, (method, extra) in enumerate((
            ("ties", "sparsify: importance"),
            ("sparsegpt_ties", ""),
            ("dare_sparsegpt", "error_correction: cg, statistics: base"))):
        r = recipe(f"{where}/r{i}.yml", method, 0.2, 0.5, extra,
                   ("code", "prose"))
        o = f"{where}/o{i}"
        store = f"{where}/s{i}"
        run(TVSTORE, "init", store, code=0)
        first = merge(r, o, "--threads", "1")
        want = first["digest"]
        check(first["calibration"]["models"] > 0, f"{method}: calibrates")
        for memory in ("24MiB", "64MiB", "512MiB"):
            cold = merge(r, o + "c", "--store", store, "--threads", "2",
                         "--memory", memory)
            plan = run_json(TVMERGE, "plan", r, "--threads", "2", "--memory",
                            memory, "--json")["peak_scratch_bytes"]
            check(cold["peak_scratch_bytes"] <= plan <
                  int(memory[:-3]) * 0.9 * 2 ** 20,
                  f"{method}: {cold['peak_scratch_bytes']} bytes of {memory}, "
                  f"planned {plan}")
            if memory != "512MiB":
                shutil.rmtree(o + "c")
                shutil.rmtree(store)
                run(TVSTORE, "init", store, code=0)
        check(cold["digest"] == want, f"{method}: the same with a store")
        warm = merge(r, o + "w", "--store", store)
        use = warm["calibration"]
        check(warm["digest"] == want and use["models"] == 0 and
              use["masks_found"] == cold["calibration"]["masks_made"] > 0,
              f"{method}: masks from the store {use}")
        r = recipe(f"{where}/q{i}.yml", method, 0.2, 0.9, extra,
                   ("code", "prose"))
        other = merge(r, o + "v", "--store", store)
        check(other["calibration"]["models"] == 0,
              f"{method}: other weights, no calibration")
        check(other["digest"] == merge(r, o + "x")["digest"],
              f"{method}: other weights, the same bytes")


def statistics(where):
    store = f"{where}/ks"
    run(TVSTORE, "init", store, code=0)
    a = recipe(f"{where}/ka.yml", "sparsegpt_linear", 0.2)
    b = recipe(f"{where}/kb.yml", "sparsegpt_linear", 0.3)
    merge(a, f"{where}/ka", "--store", store, "--keep-statistics")
    again = merge(b, f"{where}/kb", "--store", store)
    check(again["calibration"]["models"] == 0 and
          again["calibration"]["statistics_found"] > 0,
          f"another density from kept statistics: {again['calibration']}")
    check(again["digest"] == merge(b, f"{where}/kc")["digest"],
          "and the same bytes")


def killed(where):
    r = recipe(f"{where}/kill.yml", "sparsegpt_ties", 0.3, 0.5, "",
               ("code", "prose"))
    want = merge(r, f"{where}/whole")["digest"]
    store = f"{where}/kills"
    run(TVSTORE, "init", store, code=0)
    argv = [TVMERGE, "run", r, f"{where}/parts", "--store", store, "-q"]
    for delay in (0.05, 0.15, 0.3):
        p = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        p.send_signal(signal.SIGKILL)
        p.wait()
    done = merge(r, f"{where}/parts", "--store", store)
    check(done["digest"] == want, "killed and repeated: the same bytes")
    check(run(TVSTORE, "verify", store).returncode == 0, "the store is whole")


def record(out):
    with open(f"{out}/tvmerge.json") as f:
        return json.load(f)["calibration"]


def stop_behind_masks(argv, out, wait):
    """Kills a merge whose masks are made; True when it was not finished. It
    stands still while status looks, however long that takes."""
    p = subprocess.Popen(argv, stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL,
                         env=dict(os.environ, TV_GROUP_BYTES="4096"))
    time.sleep(wait)
    while p.poll() is None:
        p.send_signal(signal.SIGSTOP)
        t0 = time.monotonic()
        s = json.loads(run(TVMERGE, "status", out, "--json").stdout)
        c = s.get("calibration")
        if c and c["made"] == c["masks"] and s["n_done"] > 0:
            p.kill()
            break
        p.send_signal(signal.SIGCONT)
        # Where looking is slow, so is the merge.
        time.sleep(max(0.005, (time.monotonic() - t0) / 5))
    p.wait()
    return (os.path.exists(f"{out}/.tvmerge/journal") and
            not os.path.exists(f"{out}/tvmerge.json"))


def goes_on(where, name, r, want, spoil=None):
    """The masks of a killed merge are taken where they are as they were."""
    out = f"{where}/{name}"
    argv = [TVMERGE, "run", r, out, "-q", "--threads", "1"]
    t0 = time.monotonic()
    run(*argv, code=0, env={"TV_GROUP_BYTES": "4096"})
    wait = (time.monotonic() - t0) / 2
    shutil.rmtree(out)
    for _ in range(8):
        if stop_behind_masks(argv, out, wait):
            break
        shutil.rmtree(out, True)
        wait /= 2
    else:
        check(False, f"{name}: not to be stopped")
        return
    file = f"{out}/.tvmerge/calibrated"
    if spoil:
        spoil(file)
    before = run_json(TVMERGE, "status", out, "--json")
    text = run(TVMERGE, "status", out, code=0).stdout
    done = merge(r, out)
    use = done["calibration"]
    check(done["digest"] == want["digest"] and done["n_resumed"] > 0,
          f"{name}: the same bytes")
    n = use["masks_resumed"]
    check((n == want["n"] and use["models"] == 0) if not spoil else
          n < want["n"], f"{name}: {use}, {want['n']} masks")
    check(record(out) == want["record"] and
          before["calibration"]["damped"] == want["record"]["damped"] and
          ("more damping" in text) == bool(want["record"]["damped"]),
          f"{name}: {record(out)} {text}")
    shutil.rmtree(out)


def flip(file):
    with open(file, "r+b") as f:
        f.seek(100)
        b = f.read(1)
        f.seek(100)
        f.write(bytes([b[0] ^ 1]))


def damped(where):
    """X^T X of fewer tokens than inputs is singular; with hardly any damping
    the ladder is climbed, and what it came to is told, also by masks of the
    store and of an interrupted run."""
    r = recipe(f"{where}/d.yml", "sparsegpt_linear", 0.3, 0.5,
               "damping: 1.0e-9, error_correction: obs+cg", ("code", "prose"))
    with open(r) as f:
        text = f.read().replace("samples: 4, context: 48",
                                "samples: 1, context: 24")
    with open(r, "w") as f:
        f.write(text)
    out, store = f"{where}/d", f"{where}/ds"
    e = run(TVMERGE, "run", r, out, code=0)
    check("layers took more damping" in e.stderr, e.stderr)
    shutil.rmtree(out)
    first = merge(r, out)
    rec = record(out)
    use = first["calibration"]
    check(rec["masks"] == use["masks_made"] and
          len(rec["damped"]) == use["layers_damped"] +
          use["layers_uncorrected"] > 0, f"{rec} {use}")
    for d in rec["damped"]:
        check(linear(d["tensor"]) and d["donor"].startswith(MODELS) and
              1 <= d["raised"] <= 4 and d["unseen_inputs"] >= 0 and
              (d["damping"] is None or
               abs(d["damping"] / (1e-9 * 10 ** d["raised"]) - 1) < 1e-9),
              f"{d}")
    s = run_json(TVMERGE, "status", out, "--json")["calibration"]
    check(s["damped"] == rec["damped"] and s["made"] == s["masks"], f"{s}")
    check("more damping" in run(TVMERGE, "status", out, code=0).stdout, "text")
    run(TVSTORE, "init", store, code=0)
    for o in ("dc", "dw"):
        d = merge(r, f"{where}/{o}", "--store", store)
        check(d["digest"] == first["digest"] and record(f"{where}/{o}") == rec,
              f"{o}: {record(f'{where}/{o}')}")
    check(d["calibration"]["masks_found"] == rec["masks"], f"{d}")
    run(TVMERGE, "run", r, "--into", "m", "--store", store, code=0)
    run(TVSTORE, "export", store, "m", f"{where}/de", code=0)
    check(record(f"{where}/de") == rec, "of an object")
    want = {"digest": first["digest"], "record": rec, "n": rec["masks"]}
    goes_on(where, "dk", r, want)
    goes_on(where, "df", r, want, flip)
    goes_on(where, "dt", r, want, lambda f: os.truncate(f, 5000))
    goes_on(where, "du", r, want, os.unlink)
    doc = run_json(TVMERGE, "layers", r, "--densities", "0.3", "--layer",
                   "model.layers.0.", "--json")
    took = {(e["name"], e["donor"]): e["damping"] for e in doc["layers"]
            if e["method"] == "obs" and e["damping"]}
    names = {(d["tensor"], d["donor"]) for d in rec["damped"]
             if d["tensor"].startswith("model.layers.0.")}
    check(set(took) == names and
          all("unseen_inputs" in e for e in doc["layers"]), f"{took} {names}")
    # Masks alone need no X^T X; so nothing is damped.
    r = recipe(f"{where}/dn.yml", "ties", 0.3, 0.5, "sparsify: importance",
               ("code", "prose"))
    first = merge(r, f"{where}/dn")
    rec = record(f"{where}/dn")
    check(rec == {"masks": first["calibration"]["masks_made"],
                  "random": False, "damped": []}, f"{rec}")
    goes_on(where, "di", r, {"digest": first["digest"], "record": rec,
                             "n": rec["masks"]})


def counts_of(domain):
    """How often each token occurs in the windows that CAL asks for."""
    with open(f"{MODELS}/base/config.json") as f:
        config = json.load(f)
    ids = run_json(TVEVAL, "tokenize", f"{MODELS}/base", "--text",
                   TEXT[domain], "--json")["ids"]
    all_of = [ids[i:i + 47] for i in range(0, len(ids) - 46, 47)]
    counts = np.zeros(config["vocab_size"])
    for i in range(4):
        for t in [config["bos_token_id"]] + all_of[i * len(all_of) // 4]:
            counts[t] += 1
    return counts


def largest(t, counts, density):
    """The mask of t^2 counts, with tokens that do not occur as the others do on
    average."""
    weight = np.where(counts > 0, counts, counts[counts > 0].mean())
    score = (t ** 2 * weight[:, None]).astype(np.float32).ravel()
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score, kind="stable")[:int(density * score.size)]] = True
    return mask.reshape(t.shape) & (t != 0)


def embeddings(where):
    """Whatever prunes the layers, and from whosever inputs: rows of a table are
    one-hot inputs, so token counts are all of X^T X."""
    name = "model.embed_tokens.weight"
    base = values(f"{MODELS}/base/model.safetensors")[name]
    ft = {d: values(f"{MODELS}/ft-{d}/model.safetensors")[name]
          for d in ("code", "prose")}
    want = base.copy()
    for d, w in (("code", 0.5), ("prose", 0.5)):
        t = (ft[d] - base).astype(np.float32).astype(float)
        want += w * np.where(largest(t, counts_of(d), 0.25), t, 0)
    for i, extra in enumerate(("sparsify: importance", "sparsify: sparsegpt",
                               "sparsify: importance, error_correction: cg, "
                               "statistics: base, pattern: 2:4",
                               "sparsify: importance, statistics: merged")):
        r = recipe(f"{where}/e{i}.yml", "task_arithmetic", 0.25, 0.5,
                   extra + ", embeddings: counts", ("code", "prose"))
        out, store = f"{where}/e{i}", f"{where}/es{i}"
        first = merge(r, out, "--threads", "2")
        got = values(f"{out}/model.safetensors")
        e = np.abs(got[name] - want).max()
        check(e < 1e-6, f"{extra}: {e} from numpy")
        check(np.abs(got["model.norm.weight"] - base_norm(0.5)).max() < 1e-6,
              "the norm is dense")
        run(TVSTORE, "init", store, code=0)
        cold = merge(r, out + "c", "--store", store, "--memory", "24MiB")
        warm = merge(r, out + "w", "--store", store)
        check(first["digest"] == cold["digest"] == warm["digest"] and
              warm["calibration"]["models"] == 0 and
              warm["calibration"]["masks_found"] ==
              first["calibration"]["masks_made"], f"{extra}: {warm}")
        plain = recipe(f"{where}/ep{i}.yml", "task_arithmetic", 0.25, 0.5,
                       extra, ("code", "prose"))
        check(merge(plain, out + "p")["digest"] != first["digest"] and
              record(out + "p")["masks"] + 2 == record(out)["masks"],
              f"{extra}: others by default")
        for o in ("", "c", "w", "p"):
            shutil.rmtree(out + o)
    gathered(where, name, base, ft["code"])


def base_norm(weight):
    n = "model.norm.weight"
    all_of = [values(f"{MODELS}/{m}/model.safetensors")[n]
              for m in ("base", "ft-code", "ft-prose")]
    return all_of[0] + weight * (all_of[1] - all_of[0]) + \
        weight * (all_of[2] - all_of[0])


def gathered(where, name, base, ft):
    """Rows in another order than the model's own are counted by their token."""
    r = f"{where}/eg.yml"
    with open(r, "w") as f:
        f.write(f"merge_method: task_arithmetic\nbase_model: {MODELS}/base\n"
                f"models:\n- model: {MODELS}/ft-code\n  {CAL % TEXT['code']}\n"
                "parameters: {sparsify: importance, embeddings: counts, "
                "weight: 1, density: 0.25}\ndtype: float32\n"
                "tokenizer: {source: base, pad_to_multiple_of: 1000}\n")
    merge(r, f"{where}/eg")
    got = values(f"{where}/eg/model.safetensors")[name]
    n, more = len(base), len(got) - len(base)
    check(len(got) % 1000 == 0 and more > 0, f"{got.shape}")
    counts = np.concatenate((counts_of("code"), np.zeros(more)))
    pad = [np.vstack((x, np.repeat(x.mean(0)[None], more, 0)))
           for x in (base, ft)]
    t = (pad[1] - pad[0]).astype(np.float32).astype(float)
    want = pad[0] + np.where(largest(t, counts, 0.25), t, 0)
    differ = (np.abs(got - want) > 1e-6)[:n].sum()
    check(differ <= 2, f"gathered rows: {differ} of {n * got.shape[1]}")
    shutil.rmtree(f"{where}/eg")


def random_tokens(where):
    """Statistics that describe no task are told wherever they count."""
    r = recipe(f"{where}/rt.yml", "ties", 0.2, 0.5, "sparsify: importance",
               ("code", "prose"), calibrated=False)
    with open(r, "a") as f:
        f.write("calibration: {random: true, samples: 4, context: 32}\n")
    out, store = f"{where}/rt", f"{where}/rts"
    run(TVSTORE, "init", store, code=0)
    e = run(TVMERGE, "run", r, out, "--store", store, code=0)
    check("random tokens" in e.stderr, e.stderr)
    check(record(out)["random"], f"{record(out)}")
    check(run_json(TVMERGE, "status", out, "--json")["calibration"]["random"]
          and "random tokens" in run(TVMERGE, "status", out, code=0).stdout,
          "status")
    info = run(TVSTORE, "mask", "ls", store, "--json", code=0).stdout
    check("random" in info, info)
    argv = [TVMERGE, "compare", r, "-o", f"{where}/rtc", "--text",
            TEXT["code"], "--context", "64", "--methods"]
    doc = run_json(*argv, "ties,sparsegpt_ties", "--json")
    check([x["random"] for x in doc["rows"] if x["kind"] == "merge"] ==
          [False, False, True], f"{doc['rows']}")
    with open(f"{where}/rtc/compare.md") as f:
        check("| ties_sparsegpt (random calibration) |" in f.read(), "table")


def bounded(where):
    """Store and output within the quota at every moment, although masks and
    statistics of so many densities are more than it holds: what was used
    longest ago goes. Killed in between, at figures' moments of their own."""
    store, out = f"{where}/qs", f"{where}/qo"
    r = recipe(f"{where}/q.yml", "sparsegpt_linear", 0.6,
               donors=("code", "prose"))
    plan = run_json(TVMERGE, "plan", r, out, "--json")
    quota = plan["peak_disk_bytes"] + (2 << 20)
    run(TVSTORE, "init", store, "--quota", quota, code=0)
    sampler = Sampler(store, out)
    kills = evicted = made = 0
    for i, density in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.1)):
        r = recipe(f"{where}/q.yml", "sparsegpt_linear", density,
                   donors=("code", "prose"))
        argv = [TVMERGE, "run", r, out, "--store", store, "--json",
                "--keep-statistics", "--threads", "2"]
        if i % 2 == 1:
            p = subprocess.Popen(argv, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL,
                                 env=dict(os.environ, TV_GROUP_BYTES="256kB"))
            time.sleep(0.05 * i)
            p.send_signal(signal.SIGKILL)
            kills += p.wait() == -signal.SIGKILL
        d = run_json(*argv)
        made += d["calibration"]["masks_made"]
        if i % 3 == 0:
            check(d["digest"] == merge(r, f"{where}/qp")["digest"],
                  f"the same bytes under a quota ({density})")
            shutil.rmtree(f"{where}/qp")
        stat = run_json(TVSTORE, "stat", store, "--json")
        check(stat["used_bytes"] <= quota, f"{stat}")
        evicted += stat["n_masks"] < made
        shutil.rmtree(out)
    peak = sampler.end()
    check(peak <= quota, f"{peak} bytes at one moment, the quota is {quota}")
    check(sampler.n > 100 and peak > plan["peak_disk_bytes"] // 3 and
          evicted > 0 and made > 0,
          f"{sampler.n} samples, peak {peak}, {made} masks, {evicted} evicted")
    check(kills > 0, "no run was killed in between")
    run(TVSTORE, "verify", store, "-q", code=0)
    print(f"quota: {sampler.n} samples, peak {peak} of {quota}, {kills} kills, "
          f"{made} masks made")


def layers(where):
    r = recipe(f"{where}/l.yml", "ties", 0.2)
    doc = run_json(TVMERGE, "layers", r, "--densities", "0.1,0.5", "--layer",
                   "model.layers.1.", "--other-text", TEXT["prose"], "--json")
    check(doc["schema"] == "tvmerge.layers/1", "schema")
    seen = {}
    for e in doc["layers"]:
        seen[e["name"], e["density"], e["method"]] = e
        check(e["name"].startswith("model.layers.1.") and e["error"] > 0 and
              e["error_other_text"] > 0 and 0 < e["relative"] < 1.5 and
              e["donor"].endswith("ft-code"), f"{e}")
    check(len(seen) == len(doc["layers"]) == 7 * 2 * 8, "every combination")
    for (name, density, method), e in seen.items():
        other = seen[name, density, "importance"]
        if method in ("cg", "obs", "obs+cg"):
            check(e["error"] < other["error"], f"{name} {density} {method}")
        if method == "random":
            check(e["error"] > other["error"], f"{name} {density} random")
    e = run(TVMERGE, "layers", r, "--densities", "2", code=2)
    check("--densities" in e.stderr, e.stderr)
    # What it needs is told at once, and what is told will do.
    e = run(TVMERGE, "layers", r, "--memory", "1MiB", code=5)
    need = re.search(r"at least --memory (\S+) \((\d+) bytes\)", e.stderr)
    if check(need, f"layers in 1 MiB: {e.stderr}"):
        run(TVMERGE, "layers", r, "--densities", "0.5", "--memory", need[1],
            code=0)
        run(TVMERGE, "layers", r, "--densities", "0.5", "--memory", need[2],
            code=0)
        run(TVMERGE, "layers", r, "--memory", int(need[2]) - 1, code=5)
    r = recipe(f"{where}/ln.yml", "task_arithmetic", 0.2, calibrated=False)
    e = run(TVMERGE, "layers", r, code=2)
    check("no calibration text" in e.stderr, e.stderr)


def place(path, text):
    """file:line:col of a string in a recipe."""
    with open(path) as f:
        for i, line in enumerate(f, 1):
            if text in line:
                return f"{path}:{i}:{line.index(text) + 1}"
    return check(False, f"no {text} in {path}")


def bad_texts(where):
    """Texts that are no good are found by planning, in all commands, with the
    place where they were asked for; nothing is written."""
    good = TEXT["code"]
    for name, data, code, what in (
            ("missing", None, 4, "no such file"),
            ("folder", "dir", 4, "not a regular file"),
            ("empty", b"", 4, "is empty"),
            ("latin1", b"caf\xe9 au lait. " * 300, 12, "not UTF-8"),
            ("cut", "caf\u00e9".encode()[:-1], 12, "not UTF-8"),
            ("short", b"one two three\n", 4, "a window of 48")):
        path = os.path.join(where, name + ".txt")
        if data == "dir":
            os.mkdir(path)
        elif data is not None:
            with open(path, "wb") as f:
                f.write(data)
        texts = path if name == "short" else f"[{good}, {path}]"
        r = f"{where}/{name}.yml"
        with open(r, "w") as f:
            f.write(f"merge_method: ties\nbase_model: {MODELS}/base\nmodels:\n"
                    f"- model: {MODELS}/ft-code\n  parameters: {{weight: 1, "
                    "density: 0.2}\n  calibration:\n    samples: 4\n"
                    f"    context: 48\n    text: {texts}\n"
                    "parameters: {sparsify: importance}\n")
        out = f"{where}/{name}-out"
        for argv in (("run", r, out), ("plan", r), ("plan", r, out),
                     ("compare", r, "-o", out, "--text", good, "--methods",
                      "sparsegpt_ties"), ("layers", r)):
            e = run(TVMERGE, *argv, code=code)
            check(f"{place(r, path)}: " in e.stderr and what in e.stderr,
                  f"{argv[0]}: {e.stderr}")
        doc = run_json(TVMERGE, "plan", r, "--json", code=code)
        check([p["where"] for p in doc["problems"]] == [place(r, path)],
              f"plan --json: {doc['problems']}")
        # An option takes the place of what the recipe says.
        o = recipe(f"{where}/option.yml", "ties", 0.2, 1, "sparsify: importance")
        option = f"ft-code={path}"
        e = run(TVMERGE, "run", o, out, "--text", option, code=code)
        check(f"--text {option}: " in e.stderr, f"option: {e.stderr}")
        check(not os.path.exists(out), f"{name}: something was written")
        # layers wants texts whatever the method.
        r = recipe(f"{where}/any.yml", "ties", 0.2, calibrated=False)
        for text, argv in ((option, []), (f"ft-code={good}",
                                          ["--other-text", path])):
            e = run(TVMERGE, "layers", r, "--text", text, *argv, code=code)
            where_it_is = "--other-text: " if argv else f"--text {option}: "
            check(what.replace("48", "256") in e.stderr and
                  where_it_is in e.stderr, f"layers: {e.stderr}")
    # All of them at once, and a context that the model cannot have.
    r = f"{where}/all.yml"
    with open(r, "w") as f:
        f.write(f"merge_method: ties\nbase_model: {MODELS}/base\nmodels:\n")
        for m, t in (("code", "missing"), ("prose", "empty")):
            f.write(f"- model: {MODELS}/ft-{m}\n  calibration: {{text: "
                    f"{where}/{t}.txt}}\n  parameters: {{density: 0.2}}\n")
        f.write("parameters: {sparsify: importance, weight: 1}\n")
    e = run(TVMERGE, "plan", r, code=4)
    check(e.stderr.count(f"{r}:") == 2, f"both at once: {e.stderr}")
    with open(r, "w") as f:
        f.write(f"merge_method: ties\nbase_model: {MODELS}/base\nmodels:\n"
                f"- model: {MODELS}/ft-code\n  calibration: {{text: {good}, "
                "context: 257}\n  parameters: {density: 0.2, weight: 1}\n"
                "parameters: {sparsify: importance}\n")
    e = run(TVMERGE, "plan", r, code=4)
    check("257 tokens, but the model has 256 positions" in e.stderr and
          f"{place(r, good)}: " in e.stderr,
          f"context: {e.stderr}")


def errors(where):
    r = recipe(f"{where}/none.yml", "ties", 0.2, 0.5, "sparsify: importance",
               ("code", "prose"), calibrated=False)
    e = run(TVMERGE, "run", r, f"{where}/none", code=2)
    check(e.stderr.count("no calibration text for") == 2 and
          "--text" in e.stderr, f"both models are named: {e.stderr}")
    check(not os.path.exists(f"{where}/none"), "nothing written")
    texts = [x for d in ("code", "prose")
             for x in ("--text", f"ft-{d}={TEXT[d]}")]
    run(TVMERGE, "plan", r, *texts, code=0)
    e = run(TVMERGE, "plan", r, *texts, "--text", "nobody=x", code=2)
    check("no model 'nobody'" in e.stderr, e.stderr)
    e = run(TVMERGE, "plan", r, *texts[:2], "--text", "ft-prose=missing.txt",
            code=4)
    check("missing.txt" in e.stderr, e.stderr)
    e = run(TVMERGE, "plan", r, *texts, "--memory", "16MiB", code=5)
    check("--memory" in e.stderr, e.stderr)
    e = run(TVMERGE, "plan", r, *texts, "--compat", "mergekit", code=2)
    # A model that cannot be opened is nobody's tokenizer (ft-prose has none of
    # its own and takes the first that an input has).
    bad = f"{where}/bad"
    for broken in ("ft-code", "base"):
        shutil.rmtree(bad, True)
        shutil.copytree(f"{MODELS}/{broken}", bad)
        for f in os.listdir(bad):
            if f.endswith(".safetensors"):
                os.truncate(f"{bad}/{f}", os.path.getsize(f"{bad}/{f}") - 5000)
        with open(r) as f:
            lines = f.read().replace(f"{MODELS}/{broken}", bad)
        with open(f"{where}/broken.yml", "w") as f:
            f.write(lines)
        named = [x.replace(f"{broken}=", "bad=") for x in texts]
        for argv in (("plan", f"{where}/broken.yml"),
                     ("run", f"{where}/broken.yml", f"{where}/broken"),
                     ("layers", f"{where}/broken.yml")):
            e = run(TVMERGE, *argv, *named, code=12)
            check("bad" in e.stderr and "error" in e.stderr, e.stderr)
        check(not os.path.exists(f"{where}/broken"), "nothing written")
    for bad, what in (("error_correction: obs", "sparsify: sparsegpt"),
                      ("sparsify: importanc", "did you mean 'importance'"),
                      ("damping: 0", "damping")):
        r = recipe(f"{where}/bad.yml", "ties", 0.2, 0.5,
                   bad if bad[0] == "s" else "sparsify: importance, " + bad)
        e = run(TVMERGE, "plan", r, code=2)
        check(what in e.stderr, f"{bad}: {e.stderr}")


def main():
    where = temp()
    errors(where)
    bad_texts(where)
    layers(where)
    masks(where)
    same_bytes(where)
    statistics(where)
    killed(where)
    damped(where)
    embeddings(where)
    random_tokens(where)
    bounded(where)
    finish("calibrated")


main()
