#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""regmean.py BIN_DIR QUICKSTART

RegMean against a numpy solve: inputs of the first layer's q, k and v follow
from embedding and norm alone, so their statistics are computed here from the
tokens. Other tensors, resuming, threads, refusals.
"""
import json
import os
import sys

import numpy as np

from common import check, finish, run, run_json, temp
from values import load, windows

BIN, QUICK = map(os.path.abspath, sys.argv[1:3])
TVMERGE, TVEVAL = (os.path.join(BIN, p) for p in ("tvmerge", "tveval"))
SAMPLES, CONTEXT = 6, 64
EPS = json.load(open(os.path.join(QUICK, "base/config.json")))["rms_norm_eps"]
MODELS = {"ft-prose": "prose", "ft-code": "code"}

RECIPE = """merge_method: regmean
base_model: base
models:
- model: ft-prose
  parameters: {{weight: {w}}}
  calibration: {{text: [text/prose.calib.txt], samples: {s}, context: {c}}}
- model: ft-code
  calibration: {{text: [text/code.calib.txt], samples: {s}, context: {c}}}
parameters: {{non_diagonal: {off}}}
out_dtype: float32
"""


def inputs(model, domain):
    """What q, k and v of the first layer see: [tokens, hidden]."""
    w = windows(TVEVAL, QUICK, domain, SAMPLES, CONTEXT)
    x = model["model.embed_tokens.weight"][w.ravel()]
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x * model["model.layers.0.input_layernorm.weight"]


def recipe(tmp, name, w, off):
    path = os.path.join(tmp, name + ".yml")
    with open(path, "w") as f:
        f.write(RECIPE.format(w=w, s=SAMPLES, c=CONTEXT, off=off))
    return path


def formulas(tmp, base, fts):
    worst = 0.0
    for i, (w, off) in enumerate(((1.0, 0.9), (0.3, 1.0))):
        path = recipe(tmp, f"r{i}", w, off)
        out = os.path.join(tmp, f"out{i}")
        run(TVMERGE, "run", path, out, "--threads", "1", cwd=QUICK, code=0)
        got = load(out)
        ws = (w, 1.0)
        grams = []
        for ft, domain in zip(fts, MODELS.values()):
            x = inputs(ft, domain)
            g = x.T @ x / len(x)
            grams.append(g * off + np.diag(np.diag(g)) * (1 - off))
        h = sum(a * g for a, g in zip(ws, grams))
        for k in ("q", "k", "v"):
            name = f"model.layers.0.self_attn.{k}_proj.weight"
            r = sum(a * ft[name] @ g for a, ft, g in zip(ws, fts, grams))
            want = np.linalg.solve(h, r.T).T - base[name]
            if off == 1.0:
                # Fewer tokens than a full rank takes: the same minimum, as a
                # pull towards the mean finds it.
                m = sum(a * ft[name] for a, ft in zip(ws, fts)) / sum(ws)
                e = 1e-8 * np.trace(h) / len(h)
                r = sum(a * (ft[name] - m) @ g
                        for a, ft, g in zip(ws, fts, grams))
                want = m - base[name] + np.linalg.solve(
                    h + e * np.eye(len(h)), r.T).T
            d = np.linalg.norm(got[name] - base[name] - want) / \
                np.linalg.norm(want)
            worst = max(worst, d)
            check(d < 1e-4, f"weight {w}, non_diagonal {off}: {name} is "
                            f"{d:.2e} off")
        for name in ("model.embed_tokens.weight", "model.norm.weight",
                     "model.layers.1.input_layernorm.weight"):
            want = sum(a * (ft[name] - base[name])
                       for a, ft in zip(ws, fts)) / sum(ws)
            d = np.abs(got[name] - base[name] - want).max()
            check(d < 1e-6, f"{name} is no weighted mean: {d:.2e}")
        check(all(np.isfinite(x).all() for x in got.values()), "not finite")
        down = "model.layers.2.mlp.down_proj.weight"
        mean = sum(a * (ft[down] - base[down])
                   for a, ft in zip(ws, fts)) / sum(ws)
        check(np.linalg.norm(got[down] - base[down] - mean) >
              1e-3 * np.linalg.norm(mean), f"{down} is the mean")
    print(f"worst relative error of a delta: {worst:.1e}")


def same_bytes(tmp):
    path = recipe(tmp, "same", 1.0, 0.9)
    digests = {run_json(TVMERGE, "run", path, os.path.join(tmp, f"same{i}"),
                        "--json", *extra, cwd=QUICK)["digest"]
               for i, extra in enumerate((["--threads", "1"],
                                          ["--threads", "3"],
                                          ["--threads", "1", "--memory",
                                           "64MiB"]))}
    check(len(digests) == 1, f"{len(digests)} digests")


def refusals(tmp):
    path = recipe(tmp, "plain", 1.0, 0.9)
    with open(path) as f:
        text = "".join(x for x in f if "calibration" not in x)
    with open(path, "w") as f:
        f.write(text)
    out = os.path.join(tmp, "none")
    r = run(TVMERGE, "run", path, out, cwd=QUICK, code=2)
    check("calibration" in r.stderr and "--text" in r.stderr, r.stderr)
    for bad in ("{non_diagonal: 1.5}", "{regularization: 0}",
                "{weight: -1}"):
        with open(path, "w") as f:
            f.write(text.replace("{non_diagonal: 0.9}", bad).replace(
                "  parameters: {weight: 1.0}\n", ""))
        run(TVMERGE, "run", path, out, "--text",
            "ft-prose=text/prose.calib.txt", "--text",
            "ft-code=text/code.calib.txt", cwd=QUICK, code=2)
    check(not os.path.exists(out), "something was written")


tmp = temp()
base, *fts = (load(os.path.join(QUICK, m)) for m in ("base", *MODELS))
formulas(tmp, base, fts)
same_bytes(tmp)
refusals(tmp)
finish("regmean")
