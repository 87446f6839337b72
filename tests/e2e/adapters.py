#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""adapters.py BIN_DIR ADAPTERS

One adapter per PEFT variant (tools/adapters/make_adapters.py): base+adapter
written in fp32 equals what PEFT's merge_and_unload gave, 1e-6 of the delta; a
weight scales the delta; bytes do not depend on threads, instruction set or
memory; an adapter in a store gives the same and comes back as it was. Adapters
whose base is another are refused by name, damaged ones with the tensor's name.
Earlier versions of PEFT do not write all variants: those are tried that exist.
"""
import json
import os
import shutil
import sys

import numpy as np

from common import (check, finish, read_safetensors, run, run_json, temp,
                    write_safetensors)

BIN, DATA = map(os.path.abspath, sys.argv[1:3])
TVMERGE, TVSTORE = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tvstore")
LIMIT = 1e-6
# One of each kind of change is also tried with threads, from a store, ...
THOROUGH = {"plain", "rslora", "patterns", "dora", "dora_conv1d", "conv1d",
            "conv2d", "embedding", "experts", "experts_transposed",
            "lora_bias", "trainable_tokens", "modules_to_save", "bin"}


def values(path):
    return {k: np.frombuffer(b, np.float32).astype(np.float64).reshape(s)
            for k, (_, s, b) in read_safetensors(path).items()}


def merge(ref, out, *more, code=0, env=None):
    with open("r.yml", "w") as f:
        f.write("merge_method: passthrough\nmodels:\n"
                f"- model: '{ref}'\nout_dtype: float32\n")
    return run_json(TVMERGE, "run", "r.yml", out, "--json", *more, code=code,
                    env=env)


def error(a, b, base):
    num = sum(((a[k] - b[k]) ** 2).sum() for k in base)
    den = sum(((b[k] - base[k]) ** 2).sum() for k in base)
    return (num / den) ** 0.5


def one(name):
    d = os.path.join(DATA, name)
    ref = f"{d}/base.safetensors+{d}/adapter"
    base, want = (values(os.path.join(d, f + ".safetensors"))
                  for f in ("base", "merged"))
    digest = merge(ref, name)["digest"]
    got = values(name)
    e = error(got, want, base)
    check(e <= LIMIT, f"{name}: relative error of the delta {e:.2e}")
    untouched = [k for k in base if (want[k] == base[k]).all()]
    check(all((got[k] == base[k]).all() for k in untouched),
          f"{name}: tensors without a change")
    if name not in THOROUGH:
        return
    for i, (more, env) in enumerate([(["--threads", "1"], {"TV_CPU": "ref"}),
                                     (["--threads", "3", "--memory", "16MiB"],
                                      {"TV_CPU": "avx2"})]):
        check(merge(ref, f"{name}-{i}", *more, env=env)["digest"] == digest,
              f"{name}: digest with {more} {env}")
    merge(ref + "*0.25", name + "-w")
    quarter = {k: base[k] + 0.25 * (want[k] - base[k]) for k in base}
    e = error(values(name + "-w"), quarter, base)
    check(e <= 4 * LIMIT, f"{name}: weight 0.25, error {e:.2e}")
    run(TVSTORE, "import", "s", name + ".base", d + "/base.safetensors", code=0)
    run(TVSTORE, "import", "s", name, d + "/adapter", code=0)
    stored = merge(f"store:{name}.base+store:{name}", name + "-s", "--store",
                   "s")
    check(stored["digest"] == digest, f"{name}: digest from a store")
    run(TVSTORE, "export", "s", name, name + "-x", code=0)
    for f in os.listdir(d + "/adapter"):
        if f.endswith(".bin"):
            continue
        with open(f"{d}/adapter/{f}", "rb") as a, open(f"{name}-x/{f}",
                                                      "rb") as b:
            a, b = a.read(), b.read()
        if f.endswith(".safetensors"):
            a, b = (read_safetensors(x) for x in (d + "/adapter", name + "-x"))
        check(a == b, f"{name}: {f} came back changed")


def described():
    """ls and info: ranks, scalings and norms; export with adapters."""
    for name in ("plain", "rslora", "patterns", "conv1d", "conv2d", "embedding",
                 "experts", "experts_transposed", "lora_bias", "dora"):
        d = os.path.join(DATA, name)
        if not os.path.isdir(d):
            continue
        base, merged = (values(os.path.join(d, f + ".safetensors"))
                        for f in ("base", "merged"))
        a = run_json(TVSTORE, "info", "s", name, "--json")["adapter"]
        check(run_json(TVSTORE, "ls", "s", name, "--json")["adapter"] == a,
              f"{name}: ls and info agree")
        total = sum(((merged[k] - base[k]) ** 2).sum() for k in base) ** 0.5
        if name == "dora":
            check(a["norm"] is None and a["modules"][0]["kind"] == "dora",
                  "the norm of DoRA needs the base")
            continue
        check(a["norm"] is None if name == "embedding" else
              abs(a["norm"] - total) <= 2e-6 * total,
              f"{name}: norm {a['norm']} instead of {total}")
        for m in a["modules"]:
            k = m["target"]
            if k in base and m["norm"] is not None:
                want = ((merged[k] - base[k]) ** 2).sum() ** 0.5
                check(abs(m["norm"] - want) <= 2e-6 * want, f"{name}: {k}")
    p = run_json(TVSTORE, "info", "s", "plain", "--json")["adapter"]
    check((p["rank"], p["alpha"], sorted(p["target_modules"])) ==
          (3, 5, ["down_proj", "q_proj", "v_proj"]), "rank, alpha, targets")
    check(abs(p["scaling"] - 5 / 3) < 1e-12, "scaling")
    a = run_json(TVSTORE, "info", "s", "patterns", "--json")["adapter"]
    check(a["rank"] is None and a["modules"][0]["rank"] > 0, "ranks differ")
    text = run(TVSTORE, "info", "s", "plain", code=0).stdout
    check("targets" in text and "down_proj" in text, "info as text")
    run(TVSTORE, "export", "s", "plain.base+plain*0.5", "half", code=0)
    r = run(TVSTORE, "diff", "s", "half/model.safetensors",
            "store:plain.base+store:plain*0.5", code=0)
    check("all equal" in r.stdout, "export with an adapter")
    run(TVSTORE, "export", "s", "plain.base+nothing", "no", code=4)
    check(not os.path.exists("no"), "nothing is exported")


def refused(name):
    d = os.path.join(DATA, name)
    with open("r.yml", "w") as f:
        f.write("merge_method: passthrough\nmodels:\n"
                f"- model: {d}/base.safetensors+{d}/adapter\n")
    for out in ("plan", "run"):
        r = run(TVMERGE, out, "r.yml", "no", code=4)
        check("init_lora_weights" in r.stderr + r.stdout, f"{name}: {out}")
    check(not os.path.exists("no"), f"{name}: something was written")


def damaged(case, tensor, change, code, *words):
    d = os.path.join(DATA, case)
    if not os.path.isdir(d):
        return
    shutil.rmtree("bad", ignore_errors=True)
    shutil.copytree(d + "/adapter", "bad")
    t = read_safetensors("bad")
    k = next(k for k in sorted(t) if tensor in k)
    dtype, shape, data = t[k]
    a = np.frombuffer(data, np.float32).reshape(shape).copy()
    a = change(a)
    t[k] = (dtype, a.shape, a.tobytes())
    write_safetensors("bad/adapter_model.safetensors", t)
    with open("r.yml", "w") as f:
        f.write("merge_method: passthrough\nmodels:\n"
                f"- model: {d}/base.safetensors+bad\n")
    for cmd in ("plan", "run"):
        r = run(TVMERGE, cmd, "r.yml", "no", code=code)
        text = r.stderr + r.stdout
        module = k.split("base_model.model.")[-1].split(".lora_")[0]
        check(all(w in text for w in (module, *words)),
              f"{case}/{tensor}: {cmd} does not name it: {text[-200:]}")
    check(not os.path.exists("no"), f"{case}/{tensor}: something was written")


def poke(value):
    def change(a):
        a.flat[a.size // 2] = value
        return a
    return change


def several():
    """Weighted sums of adapters of every kind are sums of task vectors."""
    names = ["plain", "dora", "bias_all", "modules_to_save",
             "trainable_tokens", "lora_bias", "embedding"]
    names = [n for n in names if os.path.isdir(os.path.join(DATA, n))]
    d = [os.path.join(DATA, n) for n in names]
    base = values(d[0] + "/base.safetensors")
    weights = [0.5, -0.25, 1, 0.125, 2, 0.3, 0.7]
    merge(d[0] + "/base.safetensors" +
          "".join(f"+{x}/adapter*{w}" for x, w in zip(d, weights)), "several")
    want = {k: v.copy() for k, v in base.items()}
    for x, w in zip(d, weights):
        one_base = values(x + "/base.safetensors")
        check(all((one_base[k] == base[k]).all() for k in base), "one base")
        merged = values(x + "/merged.safetensors")
        for k in base:
            want[k] += w * (merged[k] - base[k])
    e = error(values("several"), want, base)
    check(e <= 2 * LIMIT, f"several adapters: error {e:.2e}")


os.chdir(temp())
run(TVSTORE, "init", "s", code=0)
for case in sorted(os.listdir(DATA)):
    if case.endswith("_refused"):
        refused(case)
    elif os.path.isdir(os.path.join(DATA, case)):
        one(case)
several()
described()
damaged("plain", "v_proj.lora_A", poke(np.nan), 12, "finite")
damaged("plain", "v_proj.lora_B", poke(np.inf), 12, "finite")
damaged("dora", "magnitude_vector", poke(np.nan), 12, "finite")
damaged("dora", "magnitude_vector", lambda a: a[1:], 12)
damaged("embedding", "lora_embedding_A", poke(-np.inf), 12, "finite")
damaged("plain", "v_proj.lora_A", lambda a: a[:-1], 12)
damaged("plain", "v_proj.lora_A", lambda a: a[:, 1:], 4)
damaged("lora_bias", "lora_B.bias", lambda a: a[1:], 12)
damaged("trainable_tokens", "trainable_tokens", lambda a: a[1:], 12)
with open(os.path.join(DATA, "plain/adapter/adapter_config.json")) as f:
    check(json.load(f)["peft_type"] == "LORA", "a PEFT file")
finish("adapters")
