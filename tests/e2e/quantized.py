#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""quantized.py BIN_DIR

Checkpoints whose weights are quantised (fp8 with block scales, MXFP4, GPTQ,
bitsandbytes, compressed-tensors, ...): codes and scales are never merged as if
they were weights, and the refusal says what was found. Layers can be stacked,
since that copies them.
"""
import json
import os
import shutil
import sys

import numpy as np

from common import (check, finish, read_safetensors, run, run_json, temp,
                    write_safetensors)

BIN = os.path.abspath(sys.argv[1])
TVMERGE, TVEVAL = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tveval")
H, V, N = 8, 12, 3
SIZE = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1, "U8": 1,
        "F8_E4M3": 1}


def kinds():
    """What stands in place of one projection's weight, by kind."""
    p = "mlp.down_proj"
    return {
        "fp8": ({p + ".weight": ("F8_E4M3", (H, H)),
                 p + ".weight_scale_inv": ("F32", (1, 1))},
                {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        "gptq": ({p + ".qweight": ("I32", (1, H)),
                  p + ".qzeros": ("I32", (1, 1)),
                  p + ".scales": ("F16", (1, H)),
                  p + ".g_idx": ("I32", (H,))},
                 {"quant_method": "gptq", "bits": 4}),
        "awq": ({p + ".qweight": ("I32", (H, 1)),
                 p + ".qzeros": ("I32", (1, 1)),
                 p + ".scales": ("F16", (1, H))},
                {"quant_method": "awq", "bits": 4}),
        "bitsandbytes": ({p + ".weight": ("U8", (H * H // 2, 1)),
                          p + ".weight.absmax": ("F32", (1,)),
                          p + ".weight.quant_map": ("F32", (16,)),
                          p + ".weight.quant_state.bitsandbytes__nf4":
                              ("U8", (24,))},
                         {"load_in_4bit": True}),
        "int8": ({p + ".weight": ("I8", (H, H)), p + ".SCB": ("F32", (H,))},
                 {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "mxfp4": ({"mlp.experts.gate_up_proj_blocks": ("U8", (2, H, 1, 4)),
                   "mlp.experts.gate_up_proj_scales": ("U8", (2, H, 1)),
                   "mlp.experts.down_proj_blocks": ("U8", (2, H, 1, 4)),
                   "mlp.experts.down_proj_scales": ("U8", (2, H, 1))},
                  {"quant_method": "mxfp4"}),
        "compressed": ({p + ".weight": ("I8", (H, H)),
                        p + ".weight_scale": ("BF16", (H, 1))},
                       {"quant_method": "compressed-tensors"}),
        # Every number is a float: only the names tell.
        "fake": ({p + ".weight": ("BF16", (H, H)),
                  p + ".weight_scale": ("BF16", (H, 1))}, None),
    }


def save(path, seed, part, said, config=True):
    r = np.random.default_rng(seed)
    names = {"model.embed_tokens.weight": ("BF16", (V, H)),
             "model.norm.weight": ("BF16", (H,)),
             "lm_head.weight": ("BF16", (V, H))}
    for i in range(N):
        p = f"model.layers.{i}."
        names[p + "input_layernorm.weight"] = ("BF16", (H,))
        names[p + "self_attn.q_proj.weight"] = ("BF16", (H, H))
        names.update({p + k: v for k, v in part.items()})
    out = {}
    for k, (dtype, shape) in names.items():
        n = int(np.prod(shape)) * SIZE[dtype]
        data = r.integers(0, 56, n, np.uint8).tobytes()  # all finite
        out[k] = (dtype, shape, data)
    shutil.rmtree(path, True)
    os.makedirs(path)
    write_safetensors(os.path.join(path, "model.safetensors"), out,
                      {"format": "pt"})
    if not config:
        return
    c = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
         "num_hidden_layers": N, "hidden_size": H, "num_attention_heads": 2,
         "intermediate_size": H, "vocab_size": V,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    if said:
        c["quantization_config"] = said
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(c, f)


def merge(recipe, code, plan_only=False):
    with open("r.yml", "w") as f:
        f.write(recipe)
    shutil.rmtree("out", True)
    p = run_json(TVMERGE, "plan", "r.yml", "out", "--json", code=code)
    if plan_only:
        return p, None
    r = run(TVMERGE, "run", "r.yml", "out", "--progress=none", "--no-sync",
            code=code)
    check(p.get("ok") == (code == 0) and os.path.exists("out") == (code == 0),
          f"plan and run agree: {p.get('problems')} {r.stderr[-300:]}")
    return p, r


RECIPES = {
    "linear": "merge_method: linear\nmodels:\n- {model: A, parameters: "
              "{weight: 0.5}}\n- {model: B, parameters: {weight: 0.5}}\n",
    "ties": "merge_method: ties\nbase_model: A\nmodels:\n- {model: B, "
            "parameters: {weight: 1, density: 0.5}}\n",
    "slerp": "merge_method: slerp\nbase_model: A\nmodels:\n- model: A\n"
             "- model: B\nparameters: {t: 0.5}\n",
    "scaled": "merge_method: passthrough\nmodels:\n- {model: B, parameters: "
              "{scale: [{filter: down_proj, value: 0.5}, {filter: experts, "
              "value: 0.5}, {value: 1}]}}\n",
    "cast": "merge_method: passthrough\ndtype: float32\nmodels:\n- model: B\n",
}
STACK = ("merge_method: passthrough\nslices:\n"
         "- sources: [{model: A, layer_range: [0, 2]}]\n"
         "- sources: [{model: B, layer_range: [1, 3]}]\n")


def pair(recipe, a, b):
    return recipe.replace("model: A", f"model: {a}").replace(
        "model: B", f"model: {b}")


def refused():
    for kind, (part, said) in kinds().items():
        save("a", 1, part, said)
        save("b", 2, part, said)
        for name, recipe in RECIPES.items():
            p, _ = merge(pair(recipe, "a", "b"), 4, name not in
                         ("linear", "scaled"))
            text = " ".join(x["message"] for x in p["problems"])
            check("is quantised" in text and "codes and scales" in text and
                  "model.layers.0.mlp." in text, f"{kind} {name}: {text}")
            check(len(p["problems"]) <= 8, f"{kind} {name}: says it "
                  f"{len(p['problems'])} times")
        # The names alone, and config.json alone.
        for m in "ab":
            save(m, 1 + (m == "b"), part, None)
            save(m + "0", 1 + (m == "b"), part, None, config=False)
        merge(pair(RECIPES["linear"], "a", "b"), 4, True)
        merge(pair(RECIPES["linear"], "a0", "b0/model.safetensors"), 4, True)
        if not said:
            continue
        save("plain", 1, {}, None)
        save("b", 2, {"mlp.down_proj.weight": ("F8_E4M3", (H, H))}, said)
        p, _ = merge(pair(RECIPES["linear"], "b", "b/../b"), 4, True)
        text = " ".join(x["message"] for x in p["problems"])
        check("quantization_config" in text and "'b'" in text,
              f"{kind} by config.json alone: {text}")


def left_behind():
    """Weights that are floats again under a config.json that still speaks of
    codes: merged, and the output does not say so."""
    for kind, (_, said) in kinds().items():
        if not said:
            continue
        save("a", 1, {}, said)
        save("b", 2, {}, None)
        for recipe in (RECIPES["linear"], RECIPES["ties"], STACK):
            p, _ = merge(pair(recipe, "a", "b"), 0)
            text = [x["message"] for x in p["problems"]
                    if x["severity"] == "warning"]
            check(sum("weights are not quantised" in t and "'a'" in t
                      for t in text) == 1, f"{kind}: {text}")
            with open("out/config.json") as f:
                c = json.load(f)
            check("quantization_config" not in c, f"{kind}: {c}")


def equal_codes():
    """They make no weights of the scales either."""
    part, said = kinds()["int8"]
    save("a", 1, part, said)
    save("b", 1, part, said)
    merge(pair(RECIPES["linear"], "a", "b"), 4)


def mixed():
    """A plain base and a quantised fine-tune: said as such, not as tensors
    that are missing."""
    part, said = kinds()["gptq"]
    save("plain", 1, {"mlp.down_proj.weight": ("BF16", (H, H))}, None)
    save("b", 2, part, said)
    for recipe in (RECIPES["ties"], STACK):
        p, _ = merge(pair(recipe, "plain", "b"), 4)
        check(len(p["problems"]) == 1 and "'b' is quantised (gptq" in
              p["problems"][0]["message"], f"one problem: {p['problems']}")


def stacked():
    for kind, (part, said) in kinds().items():
        save("a", 1, part, said)
        save("b", 2, part, said)
        p, _ = merge(pair(STACK, "a", "b"), 0)
        a, b, out = (read_safetensors(x) for x in ("a", "b", "out"))
        want = {}
        for i, (m, k) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
            want.update({n.replace(f".{k}.", f".{i}.", 1): t
                         for n, t in m.items() if f".layers.{k}." in n})
        check(all(out[n] == t for n, t in want.items()) and
              len(out) == len(want) + 3, f"{kind}: layers as they are")
        with open("out/config.json") as f:
            c = json.load(f)
        check(c.get("quantization_config") == said and
              c["num_hidden_layers"] == 4, f"{kind}: {c}")


def others():
    part, said = kinds()["fp8"]
    save("a", 1, part, said)
    save("b", 2, part, said)
    r = run(TVMERGE, "extract-lora", "--model", "a", "--base", "b", "--rank",
            "2", "lora", code=4)
    check("is quantised (fp8" in r.stderr, r.stderr)
    if os.path.exists(TVEVAL):
        np.save("ids.npy", np.zeros((1, 4), np.int64))
        r = run(TVEVAL, "logits", "a", "--ids", "ids.npy", code=4)
        check("is quantised (fp8" in r.stderr, r.stderr)


def plain():
    """bitsandbytes' settings that say no are not a quantised model."""
    said = {"load_in_4bit": False, "load_in_8bit": False}
    save("a", 1, {}, said)
    save("b", 2, {}, said)
    merge(pair(RECIPES["linear"], "a", "b"), 0)


def rounded_in_use():
    """BitNet's weights are floats, and its config has to say how they are
    used."""
    said = {"quant_method": "bitnet", "quantization_mode": "online"}
    save("a", 1, {}, said)
    save("b", 2, {}, said)
    p, _ = merge(pair(RECIPES["linear"], "a", "b"), 0)
    with open("out/config.json") as f:
        check(json.load(f).get("quantization_config") == said and
              not any("quantis" in x["message"] for x in p["problems"]),
              f"bitnet: {p['problems']}")


def main():
    os.chdir(temp())
    plain()
    refused()
    left_behind()
    rounded_in_use()
    equal_codes()
    mixed()
    stacked()
    others()
    finish("quantized")


main()
