#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""extract.py BIN_DIR QUICKSTART ADAPTERS

tvmerge extract-lora: factors are the best of their rank (full SVD), or as good
within 1e-4 (randomized); the energy reported is the energy kept; at full rank
with embeddings and norms base+adapter is the fine-tune again; a low-rank
fine-tune comes back as it was, [in, out] matrices too.
"""
import json
import os
import shutil
import sys

import numpy as np

from common import check, finish, read_safetensors, run, run_json, temp
from values import load

BIN, QUICK, DATA = map(os.path.abspath, sys.argv[1:4])
TVMERGE = os.path.join(BIN, "tvmerge")
BASE, FT = os.path.join(QUICK, "base"), os.path.join(QUICK, "ft-code")


def extract(out, *options, model=FT, base=BASE, code=0):
    return run_json(TVMERGE, "extract-lora", "--model", model, "--base", base,
                    out, "--json", *options, code=code)


def apply(base, adapter, out):
    with open("a.yml", "w") as f:
        f.write("merge_method: passthrough\nmodels:\n"
                f"- model: {base}+{adapter}\nout_dtype: float32\n")
    run(TVMERGE, "run", "a.yml", out, code=0)
    return load(out)


def size(x):
    return np.sqrt(sum((v ** 2).sum() for v in x.values()))


def optimal():
    base, ft = load(BASE), load(FT)
    for i, how in enumerate(("full", "randomized")):
        r = extract(f"x{i}", "--rank", "4", "--svd", how)
        got = apply(BASE, f"x{i}", f"y{i}")
        check(len(r["layers"]) > 10, "layers are listed")
        for x in r["layers"]:
            k = x["name"] + ".weight"
            d = ft[k] - base[k]
            s = np.linalg.svd(d, compute_uv=False)
            best = np.sqrt((s[4:] ** 2).sum())
            e = np.linalg.norm(got[k] - ft[k])
            check(x["randomized"] == (how == "randomized"), f"{k}: how")
            check(e <= best * (1 + 1e-4) + 1e-6 * np.linalg.norm(base[k]),
                  f"{k}, {how}: {e} instead of {best}")
            energy = (s[:4] ** 2).sum() / (s ** 2).sum()
            check(abs(x["energy"] - energy) < 1e-4, f"{k}: energy")
    r = extract("eps", "--rank", "64", "--sv-epsilon", "0.2")
    for x in r["layers"]:
        k = x["name"] + ".weight"
        s = np.linalg.svd(ft[k] - base[k], compute_uv=False)
        check(x["rank"] == (s > 0.2 * s[0]).sum(), f"{k}: rank by epsilon")


def whole():
    base, ft = load(BASE), load(FT)
    r = extract("all", "--rank", "4096", "--embeddings", "--norms")
    check(r["n_left_out"] == 0, "nothing is left out")
    got = apply(BASE, "all", "all-y")
    e = size({k: got[k] - ft[k] for k in ft}) / size(
        {k: ft[k] - base[k] for k in ft})
    check(e < 2e-6, f"full rank: {e:.1e}")
    for k in ft:
        if "norm" in k or "embed" in k:
            check((got[k] == ft[k]).all(), f"{k} is the fine-tune's")
    again = extract("all", "--rank", "4096", "--embeddings", "--norms")
    check(again["already_done"] and again["digest"] == r["digest"], "again")
    run(TVMERGE, "extract-lora", "--model", FT, "--base", BASE, "--rank", "3",
        "all", code=4)
    small = extract("small", "--rank", "4096", "--embeddings", "--norms",
                    "--memory", "16MiB", "--threads", "1")
    check(small["digest"] == r["digest"], "digest with 16 MiB")


def low_rank():
    """What PEFT merged comes out again, with its rank."""
    for case in ("plain", "conv1d", "patterns"):
        d = os.path.join(DATA, case)
        base, merged = d + "/base.safetensors", d + "/merged.safetensors"
        r = extract(case, "--rank", "12", "--sv-epsilon", "1e-4", model=merged,
                    base=base)
        check(all(x["rank"] <= 5 and x["energy"] > 1 - 1e-9
                  for x in r["layers"]), f"{case}: {r['layers'][:2]}")
        b, w = load(base), load(merged)
        got = {k: v for k, v in b.items()}
        with open(case + "/adapter_config.json") as f:
            c = json.load(f)
        t = load(case)
        for x in r["layers"]:
            p = "base_model.model." + x["name"]
            m = t[p + ".lora_B.weight"] @ t[p + ".lora_A.weight"]
            k = x["name"] + ".weight"
            k = k if k in b else k[len("transformer."):]
            got[k] = b[k] + (m.T if c["fan_in_fan_out"] else m)
        e = size({k: got[k] - w[k] for k in w}) / size(
            {k: w[k] - b[k] for k in w})
        check(e < 2e-6, f"{case}: {e:.1e}")


def norms_with_biases():
    """PEFT loads whole modules: one that changed has weight and bias, whichever
    of them did."""
    base = os.path.join(os.path.dirname(DATA), "families", "gpt2")
    file = os.path.join("ln", "model.safetensors")
    shutil.copytree(base, "ln")
    with open(file, "r+b") as f:
        os.chmod(file, 0o644)
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
        changed = sorted(k for k in header if ".ln_" in k)[:3] + [
            k for k in header if k.endswith("attn.c_attn.weight")][:1]
        for k in changed:
            f.seek(8 + n + header[k]["data_offsets"][0])
            f.write(b"\x00\x3f" * 2)
    r = extract("lna", "--rank", "4", "--norms", model="ln", base=base)
    check(len(r["layers"]) == 1, "one matrix changed")
    keys = set(read_safetensors("lna/adapter_model.safetensors"))
    modules = {k.rsplit(".", 1)[0] for k in keys if ".lora_" not in k}
    with open("lna/adapter_config.json") as f:
        saved = json.load(f)["modules_to_save"]
    check(len(saved) == len(set(saved)) == len(modules), f"modules: {saved}")
    for m in modules:
        check({m + ".weight", m + ".bias"} <= keys, f"{m}: weight and bias")
    got, want = apply(base, "lna", "lny"), load("ln")
    for k in want:
        check(np.allclose(got[k], want[k], atol=1e-6), f"{k} comes back")


def no_matrix():
    """Only a norm changed: PEFT reads no adapter of rank 0, or without any
    module, so that one matrix gets a product of zeros."""
    shutil.copytree(BASE, "n", copy_function=shutil.copyfile)
    (file,) = (os.path.join("n", f) for f in os.listdir("n")
               if f.endswith(".safetensors"))
    with open(file, "r+b") as f:
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
        f.seek(8 + n + header["model.norm.weight"]["data_offsets"][0])
        f.write(b"\x00\x3f" * 2)
    r = extract("na", "--rank", "4", "--norms", model="n")
    check(r["layers"] == [], "no matrix changed")
    with open("na/adapter_config.json") as f:
        c = json.load(f)
    check(c["r"] == c["lora_alpha"] == len(c["target_modules"]) == 1, f"{c}")
    check(c["modules_to_save"] == ["model.norm"], "the norm is saved")
    keys = [k for k in read_safetensors("na/adapter_model.safetensors")
            if ".lora_" in k]
    check(len(keys) == 2, f"one product: {keys}")
    got, want = apply(BASE, "na", "ny"), load("n")
    check(all((got[k] == want[k]).all() for k in want), "comes back")


def wrong():
    for code, more in ((2, ["--model", FT, "--base", BASE]),
                       (2, ["--model", FT, "--rank", "4"]),
                       (2, ["--model", FT, "--base", BASE, "--rank", "0"]),
                       (4, ["--model", BASE, "--base", BASE, "--rank", "4"]),
                       (4, ["--model", FT, "--base", "nothing", "--rank", "4"]),
                       (4, ["--model", DATA + "/plain/base.safetensors",
                            "--base", BASE, "--rank", "4"]),
                       (4, ["--model", DATA + "/plain/adapter", "--base", BASE,
                            "--rank", "4"])):
        run(TVMERGE, "extract-lora", *more, "no", code=code)
        check(not os.path.exists("no/adapter_config.json"), f"{more}: output")


os.chdir(temp())
optimal()
whole()
low_rank()
norms_with_biases()
no_matrix()
wrong()
finish("extract")
