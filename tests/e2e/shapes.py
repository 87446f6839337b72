#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""shapes.py BIN_DIR QUICKSTART

The shapes of recipe that mergekit's own examples and issues have: all parse
and plan without a problem, and what they mean is what the plan says.
"""
import os
import sys

from common import check, finish, run_json, temp

BIN, QUICK = map(os.path.abspath, sys.argv[1:3])
TVMERGE = os.path.join(BIN, "tvmerge")
TIES = "merge_method: ties\nbase_model: base\n"
CODE = "- model: ft-code\n  parameters: "

SHAPES = {
    "base listed without parameters":
        TIES + "models:\n- model: base\n" + CODE +
        "{weight: 0.5, density: 0.5}\n",
    "gradients":
        TIES + "models:\n" + CODE +
        "{density: [1, 0.7, 0.1], weight: [0, 0.3, 0.7, 1]}\n",
    "filters in a list":
        TIES + "models:\n" + CODE + "\n    density: 0.5\n    weight:\n"
        "    - {filter: mlp, value: 0.5}\n    - {value: 0}\n",
    "slerp with filters and gradients":
        "merge_method: slerp\nbase_model: base\nslices:\n- sources:\n"
        "  - {model: base, layer_range: [0, 4]}\n"
        "  - {model: ft-code, layer_range: [0, 4]}\nparameters:\n  t:\n"
        "  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}\n"
        "  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}\n  - value: 0.5\n"
        "dtype: bfloat16\n",
    "stack with silenced copies":
        "merge_method: passthrough\nslices:\n- sources:\n"
        "  - {model: base, layer_range: [0, 3]}\n- sources:\n"
        "  - model: base\n    layer_range: [1, 4]\n    parameters:\n"
        "      scale:\n      - {filter: o_proj, value: 0.0}\n"
        "      - {filter: down_proj, value: 0.0}\n      - {value: 1.0}\n",
    "a trailing slice of no layers":
        "merge_method: passthrough\nslices:\n- sources:\n"
        "  - {model: base, layer_range: [0, 4]}\n- sources:\n"
        "  - {model: ft-code, layer_range: [4, 4]}\n",
    "globals":
        TIES + "models:\n" + CODE + "{weight: 1, density: 0.5}\n"
        "parameters: {normalize: true, int8_mask: true}\ndtype: float16\n",
    "tokenizer_source: union":
        "merge_method: linear\nmodels:\n- {model: base, parameters: "
        "{weight: 1}}\n" + CODE + "{weight: 1}\ntokenizer_source: union\n",
    "tokenizer_source: base":
        TIES + "models:\n" + CODE + "{weight: 1}\ntokenizer_source: base\n",
    "tokenizer_source: a path":
        TIES + "models:\n" + CODE + "{weight: 1}\n"
        "tokenizer_source: ./base\n",
    "tokens with force":
        TIES + "models:\n" + CODE + "{weight: 1}\ntokenizer:\n"
        "  source: union\n  tokens:\n    '<|end_of_text|>':\n"
        "      source: ft-code\n      force: true\n",
    "adapters":
        "merge_method: linear\nmodels:\n- model: base+lora-jargon\n"
        "  parameters: {weight: 1.0}\n- model: {model: {path: "
        "ft-code}, lora: {path: lora-jargon}}\n  parameters: {weight: 0.5}\n",
    "flow style":
        "{merge_method: linear, models: [{model: base, parameters: {weight: "
        "0.5}}, {model: ft-code, parameters: {weight: 0.5}}]}\n",
    "JSON":
        '{"merge_method": "task_arithmetic", "base_model": "base",\n'
        ' "models": [{"model": "ft-code", "parameters": {"weight": 1.5e0}}]}\n',
    "numbers that YAML 1.1 calls text":
        TIES + "models:\n" + CODE + "{weight: 1e-4, density: '0.5'}\n"
        "parameters: {normalize: 'off'}\n",
    "what is empty or null is not there":
        TIES + "models:\n" + CODE + "{weight: 1}\nslices: []\n"
        "modules: {}\ntokenizer: null\nparameters: ~\nout_dtype: null\n",
    "anchors and merge keys":
        "merge_method: passthrough\nscale: &s\n  parameters:\n    scale:\n"
        "    - {filter: q_proj, value: 0.7071}\n    - {value: 1.0}\n"
        "slices:\n- sources:\n  - {model: base, layer_range: [0, 2]}\n"
        "- sources:\n  - model: base\n    layer_range: [1, 4]\n"
        "    <<: *s\n",
    "the one module by name, flags as numbers, an empty tokenizer":
        "merge_method: della_linear\nbase_model: base\nmodules:\n"
        "  default:\n    slices:\n    - sources:\n"
        "      - layer_range: [0, 4]\n        model: ft-code\n"
        "        parameters: {density: 0.5, epsilon: 0.4, weight: [1, 0.2]}\n"
        "      - {layer_range: [0, 4], model: base}\n"
        "parameters: {lambda: 1.0, normalize: 1.0, int8_mask: 1.0}\n"
        "tokenizer: {}\n",
    "an adapter of the base":
        "merge_method: task_arithmetic\nbase_model: base+lora-jargon\n"
        "models:\n- {model: ft-code, parameters: {weight: 1}}\n",
    "other people's parameters":
        "merge_method: model_stock\nbase_model: base\nmodels:\n"
        "- {model: ft-code, parameters: {weight: [2, 1]}}\n"
        "- {model: ft-prose}\nparameters: {random_seed: 145}\n"
        "dtype: float32\nout_dtype: bfloat16\nchat_template: chatml\n",
    "tiny tolerances":
        "merge_method: karcher\nmodels: [{model: base}, {model: ft-code}]\n"
        "parameters: {tol: 1e-10, max_iter: 1200}\ndtype: torch.float32\n",
    "dead keys":
        TIES + "name: it\nmodels:\n" + CODE + "{weight: 1}\n"
        "input_model_parameters: {}\nconsensus_method: sum\n",
}


def plan(text, code=0):
    with open("r.yml", "w", encoding="utf-8") as f:
        f.write(text)
    return run_json(TVMERGE, "plan", "r.yml", "--json", code=code)


def find(p, name):
    return next((t for t in p["tensors"] if t["name"] == name), None)


def main():
    work = temp()
    os.chdir(work)
    for n in os.listdir(QUICK):
        os.symlink(os.path.join(QUICK, n), n)
    plans = {}
    for what, text in SHAPES.items():
        p = plans[what] = plan(text)
        check(p.get("ok") is True and
              not [x for x in p["problems"] if x["severity"] == "error"],
              f"{what}: {p.get('problems')}")
    p = plans["stack with silenced copies"]
    layers = {t["name"].split(".")[2] for t in p["tensors"]
              if ".layers." in t["name"]}
    check(len(layers) == 6, f"a stack of 3 + 3 layers has {len(layers)}")
    p = plans["a trailing slice of no layers"]
    for name, of in (("model.norm.weight", "ft-code"),
                     ("model.embed_tokens.weight", "base")):
        t = find(p, name)
        check(t is not None and [of] == [
            i if isinstance(i, str) else i.get("ref", i.get("model"))
            for i in t["inputs"]], f"{name} of {of}: {t}")
    p = plans["dead keys"]
    check(sum("no effect" in x["message"] for x in p["problems"]) >= 3,
          "dead keys are noted")
    # What a Windows path names is not here, but it is a recipe.
    plan("merge_method: linear\nmodels:\n- model: 'C:\\models\\a'\n"
             "  parameters: {weight: 1}\n", code=4)
    finish("shapes")


main()
