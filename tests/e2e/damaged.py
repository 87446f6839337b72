#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""damaged.py BIN_DIR QUICKSTART

Every kind of recipe with each of its models missing or damaged: planning ends
with an error that names the model, never with a signal, whatever else of the
recipe still wants to look at that model. Nothing is written.
"""
import collections
import os
import shutil
import sys

from common import check, finish, run, temp

BIN, QUICK = map(os.path.abspath, sys.argv[1:3])
TVMERGE = os.path.join(BIN, "tvmerge")
HAS = {"BASE": "base", "M1": "ft-code", "M2": "ft-prose", "LORA": "lora-jargon"}
CALIBRATION = (f"  calibration: {{text: {QUICK}/text/code.calib.txt, "
               "samples: 2, context: 32}\n")


def list_of(method, base, calibrated, *more):
    text = f"merge_method: {method}\n"
    if base:
        text += "base_model: BASE\n"
    text += "models:\n"
    for m in ("M1", "M2"):
        text += f"- model: {m}\n" + (CALIBRATION if calibrated else "")
        text += "  parameters: {weight: 1, density: 0.5}\n"
    return text + "".join(more)


def recipes():
    for m in ("ties", "sce", "nuslerp", "model_stock", "tsv", "emr", "cabs"):
        yield m, list_of(m, True, False)
    for m in ("linear", "karcher"):
        yield m, list_of(m, False, False)
    for s in ("own", "base", "merged"):
        yield f"sparsegpt, {s}", list_of("sparsegpt_ties", True, True,
                                         f"parameters: {{statistics: {s}}}\n")
    for m in ("regmean", "regmean++"):
        yield m, list_of(m, True, True)
    yield "slerp", ("merge_method: slerp\nbase_model: M1\nmodels:\n"
                    "- model: M1\n- model: M2\nparameters: {t: 0.5}\n")
    yield "fusion", ("merge_method: arcee_fusion\nbase_model: BASE\nmodels:\n"
                     "- model: M1\n")
    yield "module", ("merge_method: linear\nmodules:\n"
                     "  text_decoder:\n    models:\n"
                     "    - {model: M1, parameters: {weight: 1}}\n"
                     "    - {model: M2, parameters: {weight: 1}}\n")
    yield "stack", ("merge_method: passthrough\nslices:\n"
                    "- sources: [{model: M1, layer_range: [0, 2]}]\n"
                    "- sources: [{model: M2, layer_range: [1, 3]}]\n")
    yield "tokens", list_of("linear", False, False,
                            "tokenizer: {source: union}\n")
    yield "documents", ("name: half\nmerge_method: linear\nmodels:\n"
                        "- {model: M1, parameters: {weight: 1}}\n"
                        "- {model: BASE, parameters: {weight: 1}}\n---\n"
                        "merge_method: ties\nbase_model: BASE\nmodels:\n"
                        "- {model: half, parameters: {weight: 1}}\n"
                        "- {model: M2, parameters: {weight: 1}}\n")
    yield "adapter", ("merge_method: linear\nmodels:\n"
                      "- {model: BASE+LORA, parameters: {weight: 1}}\n"
                      "- {model: M1, parameters: {weight: 1}}\n")
    yield "svd", ("merge_method: svd\nrank: 4\noutput: adapter\nmodels:\n"
                  "- {model: LORA}\n")


def damage(kind, path):
    shutil.rmtree("bad", True)
    if kind == "missing":
        return
    shutil.copytree(path, "bad")
    for name in os.listdir("bad"):
        f = os.path.join("bad", name)
        if kind == "cut" and name.endswith(".safetensors"):
            os.truncate(f, os.path.getsize(f) - 5000)
        if kind == "config" and name.endswith("config.json"):
            with open(f, "w", encoding="utf-8") as out:
                out.write('{"architectures": [1,')


def main():
    os.chdir(temp())
    codes = collections.Counter()
    for kind in ("missing", "cut", "config"):
        for who, folder in HAS.items():
            damage(kind, os.path.join(QUICK, folder))
            for name, text in recipes():
                if who not in text:
                    continue
                for w, f in HAS.items():
                    text = text.replace(w, "./bad" if w == who
                                        else os.path.join(QUICK, f))
                with open("r.yml", "w", encoding="utf-8") as out:
                    out.write(text)
                r = run(TVMERGE, "plan", "r.yml", "out")
                codes[r.returncode] += 1
                check(r.returncode in (4, 12) and "bad" in r.stderr and
                      not os.path.exists("out"),
                      f"{name}, {who} {kind}: exit {r.returncode}: "
                      f"{r.stderr[-300:]}")
    check(codes[4] > 40 and codes[12] > 80, f"{codes}")
    print(dict(codes))
    finish("damaged")


main()
