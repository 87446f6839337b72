#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""adapter_merge.py BIN_DIR ADAPTERS

Adapters in, an adapter out: cat is the weighted sum; svd is as near to it as
Eckart and Young allow; task arithmetic in Core Space is the sum again; PEFT's
combination types equal their definition written down here in numpy; random
masks by their statistics. The same command twice, another recipe, damage,
and inputs that cannot be merged.
"""
import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np

from common import check, finish, read_safetensors, run, run_json, temp

BIN, DATA = map(os.path.abspath, sys.argv[1:3])
TVMERGE = os.path.join(BIN, "tvmerge")


def adapter(d):
    """{module: (scaling, A, B)} in fp64; plain names and patterns only."""
    with open(os.path.join(d, "adapter_config.json")) as f:
        c = json.load(f)
    out = {}
    t = {k.replace(".default.", "."): np.frombuffer(b, np.float32)
         .astype(np.float64).reshape(s)
         for k, (_, s, b) in read_safetensors(d).items()}
    for k, a in t.items():
        if not k.endswith(".lora_A.weight"):
            continue
        m = k[len("base_model.model."):-len(".lora_A.weight")]

        def pattern(key, fallback):
            for p, v in (c.get(key) or {}).items():
                if m == p or m.endswith("." + p):
                    return v
            return fallback
        r = pattern("rank_pattern", c["r"])
        alpha = pattern("alpha_pattern", c["lora_alpha"])
        check(r == a.shape[0], f"{d}: rank of {m}")
        s = alpha / r ** 0.5 if c.get("use_rslora") else alpha / r
        out[m] = (s, a, t[k.replace("lora_A", "lora_B")])
    return out


def deltas(d):
    return {m: s * b @ a for m, (s, a, b) in adapter(d).items()}


def norm(x):
    return sum((v ** 2).sum() for v in x.values()) ** 0.5


def away(got, want):
    check(set(got) == set(want), f"modules {set(got) ^ set(want)}")
    return norm({m: got[m] - want[m] for m in want}) / norm(want)


def recipe(method, inputs, more="", name="r.yml", **parameters):
    text = f"merge_method: {method}\nmodels:\n"
    for d, p in inputs:
        text += f"- model: {d}\n  parameters: {json.dumps(p)}\n"
    if parameters:
        text += f"parameters: {json.dumps(parameters)}\n"
    with open(name, "w") as f:
        f.write(text + more)
    return name


def merge(out, *args, options=(), code=0, **kw):
    r = recipe(*args, **kw)
    return run_json(TVMERGE, "run", r, out, "--json", *options, code=code)


SRC = {n: f"{DATA}/{n}/adapter" for n in ("plain", "rslora", "patterns",
                                          "default_keys", "layers", "dora")}
W = [("plain", 0.7), ("rslora", -0.4), ("patterns", 1.5), ("layers", 0.25)]
INPUTS = [(SRC[n], {"weight": w}) for n, w in W]
D = {n: deltas(SRC[n]) for n, _ in W}
MODULES = set().union(*D.values())
SHAPE = {m: next(d[m] for d in D.values() if m in d).shape for m in MODULES}
TOTAL = {m: sum((w * D[n][m] for n, w in W if m in D[n]),
                np.zeros(SHAPE[m])) for m in MODULES}


def exact():
    merge("cat", "cat", INPUTS)
    e = away(deltas("cat"), TOTAL)
    check(e <= 1e-7, f"cat: {e:.1e}")
    for rank in (2, 5, 8):
        merge("svd", "svd", INPUTS, options=["--force"],
              more=f"output: adapter\nrank: {rank}\n")
        got = deltas("svd")
        for m, want in TOTAL.items():
            s = np.linalg.svd(want, compute_uv=False)
            best = np.sqrt((s[rank:] ** 2).sum())
            e = np.linalg.norm(got[m] - want)
            check(e <= best * (1 + 1e-5) + 1e-6 * np.linalg.norm(want),
                  f"svd rank {rank}, {m}: {e} instead of {best}")
    for method, more in (("task_arithmetic", {}),
                         ("linear", {"normalize": False}),
                         ("ties", {"normalize": False, "density": 1.0})):
        merge("core", method, INPUTS[:1] if method == "ties" else INPUTS,
              options=["--force"], **more)
        want = TOTAL if method != "ties" else {
            m: 0.7 * v for m, v in D["plain"].items()}
        e = away(deltas("core"), want)
        check(e <= 1e-6, f"{method} in Core Space: {e:.1e}")
    merge("core", "task_arithmetic", INPUTS, options=["--force"],
          more="rank: 2\n")
    a, b = deltas("core"), {}
    merge("svd", "svd", INPUTS, options=["--force"], more="rank: 2\n")
    b = deltas("svd")
    check(away(a, b) <= 1e-5, "Core Space at a rank is the truncated sum")
    merge("core", "ties", [(d, {"weight": 1, "density": 0.5})
                           for d, _ in INPUTS], options=["--force"])
    got = deltas("core")
    check(set(got) == MODULES and 0 < norm(got), "ties in Core Space")
    one = merge("threads", "dare_ties", [(d, {"weight": 1, "density": 0.5})
                                         for d, _ in INPUTS],
                options=["--threads", "1", "--random-seed", "3"])["digest"]
    for i, opts in enumerate((["--threads", "3"], ["--memory", "64MiB"])):
        check(merge(f"threads{i}", "dare_ties",
                    [(d, {"weight": 1, "density": 0.5}) for d, _ in INPUTS],
                    options=["--random-seed", "3", *opts])["digest"] == one,
              f"digest with {opts}")


# ---- PEFT's definitions -----------------------------------------------------
def prune(x, density):
    keep = np.argsort(-np.abs(x), axis=None, kind="stable")
    y = np.zeros(x.size)
    k = keep[:int(density * x.size)]
    y[k] = x.ravel()[k]
    return y.reshape(x.shape)


def combine(kind, x, w, density, frequency):
    if kind in ("ties", "magnitude_prune"):
        x = [prune(v, density) for v in x]
    x, w = np.stack(x), np.asarray(w).reshape(-1, 1, 1)
    if kind != "ties":
        return (w * x).sum(0)
    vote = (np.sign(x) if frequency else x).sum(0)
    agree = np.sign(x) == np.where(vote >= 0, 1, -1)
    return (w * x * agree).sum(0) / np.maximum(agree.sum(0), 1)


def by_peft(kind, names, density=1.0, rank=3, frequency=False):
    out = {}
    src = [(adapter(SRC[n]), w) for n, w in names]
    for m in set().union(*(a for a, _ in src)):
        have = [(a[m], w) for a, w in src if m in a]
        on = kind.replace("_svd", "")
        if kind in ("svd", "ties_svd", "magnitude_prune_svd"):
            on = {"svd": "linear"}.get(kind, on)
            x = combine(on, [s * b @ a for (s, a, b), _ in have],
                        [w for _, w in have], density, frequency)
            u, s, vt = np.linalg.svd(x, full_matrices=False)
            out[m] = u[:, :rank] * s[:rank] @ vt[:rank]
            continue
        c = [s * w for (s, _, _), w in have]
        a = combine(on, [a for (_, a, _), _ in have],
                    np.sign(c) * np.sqrt(np.abs(c)), density, frequency)
        b = combine(on, [b for (_, _, b), _ in have], np.sqrt(np.abs(c)),
                    density, frequency)
        out[m] = b @ a
    return out


def peft():
    two = [("plain", 0.7), ("default_keys", -0.5)]
    inputs = [(SRC[n], {"weight": w}) for n, w in two]
    for kind in ("linear", "ties", "magnitude_prune", "svd", "ties_svd",
                 "magnitude_prune_svd"):
        for frequency in ((False, True) if "ties" in kind else (False,)):
            p = {"density": 0.4} if "ties" in kind or "prune" in kind else {}
            if frequency:
                p["majority_sign_method"] = "frequency"
            merge("peft", kind, inputs, options=["--force", "--compat",
                                                 "peft"], **p)
            e = away(deltas("peft"), by_peft(kind, two, p.get("density", 1.0),
                                             3, frequency))
            check(e <= 2e-6, f"PEFT's {kind} {p}: {e:.1e}")
    merge("peft", "cat", INPUTS, options=["--force", "--compat", "peft"])
    check(away(deltas("peft"), TOTAL) <= 1e-7, "PEFT's cat")
    # The exact modes against linear, at the same rank.
    merge("svd", "svd", inputs, options=["--force"], more="rank: 3\n")
    true = {m: 0.7 * v - 0.5 * deltas(SRC["default_keys"])[m]
            for m, v in D["plain"].items()}
    exact_error, linear = away(deltas("svd"), true), away(
        by_peft("linear", two), true)
    check(exact_error < 0.75 * linear,
          f"svd {exact_error:.2f}, PEFT's linear {linear:.2f} of the sum")
    # Random ones: kept part and mean over seeds.
    kept, mean, n = [], None, 16
    a = adapter(SRC["plain"])
    for seed in range(n):
        merge("dare", "dare_linear", [(SRC["plain"], {"weight": 1}),
                                      (SRC["layers"], {"weight": 0})],
              options=["--force", "--no-sync", "--compat", "peft",
                       "--random-seed", seed], density=0.6)
        t = adapter("dare")
        kept += [(t[m][1] != 0).mean() for m in a]
        x = {m: t[m][1] for m in a}
        mean = x if mean is None else {m: mean[m] + x[m] for m in a}
    check(abs(np.mean(kept) - 0.6) < 0.02, f"dare keeps {np.mean(kept):.3f}")
    want = {m: s ** 0.5 * f for m, (s, f, _) in a.items()}
    e = away({m: v / n for m, v in mean.items()}, want)
    check(e < 1.6 * (0.4 / 0.6 / n) ** 0.5, f"mean of dare: {e:.3f}")


def again():
    r = recipe("cat", INPUTS)
    first = run_json(TVMERGE, "run", r, "again", "--json")
    check(first["n_resumed"] == 0, "nothing resumed")
    before = os.stat("again/adapter_model.safetensors").st_mtime_ns
    second = run_json(TVMERGE, "run", r, "again", "--json")
    check(second["n_resumed"] == second["n_tensors"] == first["n_tensors"] and
          second["digest"] == first["digest"], "the same command again")
    check(os.stat("again/adapter_model.safetensors").st_mtime_ns == before,
          "nothing rewritten")
    check(not os.path.exists("again/.tvmerge"), "no state is left")
    run(TVMERGE, "run", recipe("svd", INPUTS), "again", code=4)
    os.mkdir("foreign")
    with open("foreign/x", "w"):
        pass
    run(TVMERGE, "run", r, "foreign", code=4)
    plan = run_json(TVMERGE, "plan", recipe("svd", INPUTS, "rank: 2\n"),
                    "--json")
    check(plan["ok"] and len(plan["tensors"]) == 2 * len(MODULES), "plan")
    check(all(2 in t["shape"] for t in plan["tensors"]), "planned ranks")


def killed():
    """Killed anywhere, the same command gives the same bytes, and nothing
    loads before."""
    r = recipe("ties", [(d, {"weight": 1, "density": 0.5}) for d, _ in INPUTS])
    want = run_json(TVMERGE, "run", r, "whole", "--json")
    rng = random.Random(5)
    for i in range(5):
        p = subprocess.Popen([TVMERGE, "run", r, "killed", "-q"])
        time.sleep(rng.random() * 1.2 * want["seconds"])
        p.kill()
        p.wait()
        if os.path.exists("killed/adapter_config.json"):
            break
    got = run_json(TVMERGE, "run", r, "killed", "--json")
    check(got["digest"] == want["digest"], "digest after kills")
    check(sorted(os.listdir("killed")) == sorted(os.listdir("whole")),
          "files after kills")
    status = run_json(TVMERGE, "status", "killed", "--json")
    check(status["digest"] == want["digest"], f"status: {status}")


def replaced():
    """Killed while --force replaces an adapter: what loads is one of the two
    with its own recipe, and either command makes its own whole."""
    def of(weight):
        return recipe("cat", [(SRC["plain"], {"weight": weight})])

    def whose():
        with open("replaced/tvmerge_config.yml") as f:
            text = f.read()
        if not os.path.exists("replaced/adapter_config.json"):
            return None
        d = run_json(TVMERGE, "status", "replaced", "--json").get("digest")
        check(("0.75" in text) == (d == want[0.75]),
              f"the recipe of another adapter:\n{text}")
        return d

    want = {}
    for w in (0.5, 0.75):
        want[w] = run_json(TVMERGE, "run", of(w), "replaced", "--force",
                           "--json")["digest"]
    n_killed = 0
    for call in ("unlink", "rename"):
        for at in range(1, 5):
            run(TVMERGE, "run", of(0.5), "replaced", "--force", "-q", code=0)
            r = run("strace", "-f", "-o", "/dev/null", "-e", "inject=" + call +
                    f":signal=SIGKILL:when={at}", TVMERGE, "run", of(0.75),
                    "replaced", "--force", "-q")
            n_killed += r.returncode in (-9, 137)
            whose()
            run(TVMERGE, "run", of(0.5), "replaced")
            check(whose() in (want[0.5], want[0.75], None), f"{call} {at}")
            got = run_json(TVMERGE, "run", of(0.75), "replaced", "--force",
                           "--json")
            check(got["digest"] == want[0.75], f"{call} {at}: {got}")
    check(n_killed >= 4, f"only {n_killed} kills")


def wrong():
    def no(code, word, method, inputs, more="", options=(), **p):
        recipe(method, inputs, more, **p)
        for what in (["plan", "r.yml"], ["run", "r.yml", "no"]):
            r = run(TVMERGE, *what, *options, code=code)
            check(word in r.stderr + r.stdout,
                  f"{method}: {word!r} not in {r.stderr[-200:]}")
        check(not os.path.exists("no"), f"{word}: something was written")

    no(4, "lora_magnitude_vector", "cat", [(SRC["dora"], {"weight": 1})])
    no(2, "merges no adapters", "tise", INPUTS)
    no(2, "--compat peft", "magnitude_prune", INPUTS)
    no(2, "no combination type", "karcher", INPUTS,
       options=["--compat", "peft"])
    no(2, "density", "ties", INPUTS, options=["--compat", "peft"])
    no(4, "different ranks", "linear", INPUTS, options=["--compat", "peft"])
    no(2, "'rank' must be", "svd", INPUTS, "rank: 0\n")
    no(2, "cat keeps every rank", "cat", INPUTS, "rank: 3\n")
    no(2, "weight", "ties", [(d, {"density": 0.5}) for d, _ in INPUTS],
       "output: adapter\n")
    no(2, "must be one number", "cat", [(SRC["plain"], {"weight": [0, 1]})])
    no(4, "is no adapter", "cat", [(DATA + "/plain/base.safetensors",
                                    {"weight": 1})], "output: adapter\n")
    no(4, "conv1d", "cat", INPUTS + [(DATA + "/conv1d/nothing", {})],
       "output: adapter\n")
    no(5, "--memory", "svd", INPUTS, options=["--memory", "1KiB"])
    no(5, "quota", "cat", INPUTS, options=["--quota", "1KB"])


def warned():
    """What nothing reads is said, with its place and what was meant."""
    def warns(place, words, method, more="", options=(), **p):
        extra = "".join(f", {k}: {v}" for k, v in p.items())
        text = (f"merge_method: {method}\nmodels:\n" + "".join(
            f"- model: {d}\n  parameters: {{{w}{extra}}}\n"
            for d, w in ((SRC["plain"], "weight: 1"),
                         (SRC["rslora"], "weight: 1"))) + more)
        with open("r.yml", "w") as f:
            f.write(text)
        plan = run_json(TVMERGE, "plan", "r.yml", "--json", *options)
        found = [x["message"] for x in plan["problems"]
                 if x["where"] == place and x["severity"] == "warning"]
        check(len(found) == 1 and all(w in found[0] for w in words),
              f"{method} at {place}: {plan['problems']}")
        r = run(TVMERGE, "run", "r.yml", "warned", *options, code=0)
        check(r.stderr.count(place) == 1, f"run says it once: {r.stderr}")
        shutil.rmtree("warned")

    at = f"- model: {SRC['plain']}\n  parameters: {{weight: 1, "
    col = len(at.split("\n")[1]) + 1
    warns(f"r.yml:4:{col}", ["'wieght'", "'weight'"], "cat", wieght=2)
    warns(f"r.yml:4:{col}", ["'density'"], "svd", density=0.5)
    warns("r.yml:7:1", ["'ranks'", "'rank'"], "svd", "ranks: 3\n")
    warns("r.yml:7:14", ["'density'"], "cat", "parameters: {density: 0.5}\n")
    warns(f"r.yml:4:{col}", ["'densty'", "'density'"], "ties", densty=0.5)
    warns("r.yml:7:14", ["'lamda'", "'lambda'"], "ties",
          "parameters: {lamda: 0.5}\n")
    warns("r.yml:7:1", ["'merge_metod'", "'merge_method'"], "linear",
          "merge_metod: 3\n")
    warns("r.yml:7:28", ["unknown parameter 'sign'"], "ties_svd",
          "parameters: {density: 0.5, sign: total}\n",
          ["--compat", "peft"])


os.chdir(temp())
exact()
peft()
again()
killed()
replaced()
wrong()
warned()
finish("adapter_merge")
