#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""experts.py BIN_DIR

Checkpoints of one mixture of experts that store its experts one by one, and all
of a layer packed into one tensor, in one merge: the output has the layout of
the base, and its bytes are those of the same merge with every input stored in
that layout, whatever the method, budget and threads, from files and stores.
"""
import json
import os
import sys

import numpy as np

from common import (check, finish, read_safetensors, run, run_json, temp,
                    write_safetensors)

BIN = os.path.abspath(sys.argv[1])
TVMERGE, TVSTORE = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tvstore")
N_LAYERS, E, H, INNER, V = 3, 5, 24, 20, 40
FIRST_DENSE = 1
NAMES = {  # layout: block, gate, up, down of one expert
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "each": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
CLASSES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
           "deepseek_v3": "DeepseekV3ForCausalLM", "odd_moe": "OddForCausalLM"}


def bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x8000) >> 16).astype(np.uint16)


def model(seed, kind):
    """Logical tensors: plain ones by name, experts by (layer, part)."""
    r = np.random.default_rng(seed)
    plain = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,),
             "lm_head.weight": (V, H)}
    experts = {}
    for i in range(N_LAYERS):
        p = f"model.layers.{i}."
        plain[p + "input_layernorm.weight"] = (H,)
        plain[p + "self_attn.q_proj.weight"] = (H, H)
        if kind == "deepseek_v3" and i < FIRST_DENSE:
            for n in ("gate_proj", "up_proj"):
                plain[p + f"mlp.{n}.weight"] = (INNER, H)
            plain[p + "mlp.down_proj.weight"] = (H, INNER)
            continue
        if kind != "mixtral":
            plain[p + "mlp.shared_experts.up_proj.weight"] = (INNER, H)
        experts[i] = {n: r.standard_normal((E,) + s) for n, s in
                      [("gate", (INNER, H)), ("up", (INNER, H)),
                       ("down", (H, INNER))]}
        experts[i]["router"] = r.standard_normal((E, H))
    return {k: r.standard_normal(s) for k, s in plain.items()}, experts


def save(path, m, kind, layout, dtype="BF16", damage=None):
    plain, experts = m
    out = dict(plain)
    for i, x in experts.items():
        p = f"model.layers.{i}."
        if layout == "packed":
            out[p + "mlp.experts.gate_up_proj"] = np.concatenate(
                [x["gate"], x["up"]], 1)
            out[p + "mlp.experts.down_proj"] = x["down"]
            out[p + "mlp.gate.weight"] = x["router"]
            continue
        block, gate, up, down = NAMES[layout]
        out[p + block + ".gate.weight"] = x["router"]
        for e in range(E):
            for n, key in ((gate, "gate"), (up, "up"), (down, "down")):
                out[p + f"{block}.experts.{e}.{n}.weight"] = x[key][e]
    if damage:
        damage(out)
    os.makedirs(path, exist_ok=True)
    raw = {k: (dtype, v.shape, (bf16(v) if dtype == "BF16" else
                                v.astype(np.float32)).tobytes())
           for k, v in sorted(out.items())}
    write_safetensors(os.path.join(path, "model.safetensors"), raw,
                      {"format": "pt"})
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump({"architectures": [CLASSES[kind]], "model_type": kind,
                   "num_hidden_layers": N_LAYERS, "hidden_size": H,
                   "num_attention_heads": 4, "vocab_size": V,
                   "torch_dtype": "bfloat16"}, f)


METHODS = {
    "linear": "merge_method: linear\nmodels:\n"
              "- {model: BASE, parameters: {weight: 0.4}}\n"
              "- {model: A, parameters: {weight: 0.6}}\n",
    "ties": "merge_method: ties\nbase_model: BASE\nmodels:\n"
            "- {model: A, parameters: {weight: 0.7, density: 0.4}}\n"
            "- {model: B, parameters: {weight: 0.5, density: 0.6}}\n",
    "dare_ties": "merge_method: dare_ties\nbase_model: BASE\nmodels:\n"
                 "- {model: A, parameters: {weight: 0.7, density: 0.4}}\n"
                 "- {model: B, parameters: {weight: 0.5, density: 0.6}}\n",
    "slerp": "merge_method: slerp\nbase_model: BASE\nmodels:\n"
             "- {model: BASE}\n- {model: A}\nparameters: {t: 0.3}\n",
    "stack": "merge_method: passthrough\nslices:\n"
             "- sources: [{model: BASE, layer_range: [0, 2]}]\n"
             "- sources: [{model: A, layer_range: [1, 3]}]\n",
}


def merge(name, recipe, *options, code=0):
    with open("r.yml", "w") as f:
        f.write(recipe)
    out = run_json(TVMERGE, "run", "r.yml", name, "--json", "--force",
                   "--no-write-model-card", "--progress=none", "--no-sync", *options,
                   code=code)
    return out.get("digest")


def refs(recipe, base, a, b):
    words = {"BASE": base, "A": a, "B": b}
    for k, v in words.items():
        recipe = recipe.replace("model: " + k, "model: " + v)
    return recipe


def conversions():
    for kind in ("mixtral", "qwen3_moe", "deepseek_v3", "odd_moe"):
        one = "mixtral" if kind == "mixtral" else "each"
        for seed, m in enumerate(("base", "a", "b"), 1):
            for layout in (one, "packed"):
                save(f"{kind}/{m}-{layout}", model(seed, kind), kind, layout,
                     "F32" if m == "b" else "BF16")
        for name, recipe in METHODS.items():
            if kind != "qwen3_moe" and name not in ("linear", "ties"):
                continue
            for out in (one, "packed"):
                other = "packed" if out == one else one
                base = f"{kind}/base-{out}"
                want = merge("want", refs(recipe, base, f"{kind}/a-{out}",
                                          f"{kind}/b-{out}"))
                for a, b in ((other, out), (other, other)):
                    got = merge("got", refs(recipe, base, f"{kind}/a-{a}",
                                            f"{kind}/b-{b}"))
                    check(want and got == want,
                          f"{kind} {name} in {out}: a {a}, b {b}")
                check(set(read_safetensors("got")) ==
                      set(read_safetensors("want")),
                      f"{kind} {name} in {out}: names")


def ways():
    """Budget, threads, kernels, stores, --into: one digest."""
    for out, other in (("packed", "each"), ("each", "packed")):
        recipe = refs(METHODS["ties"], f"qwen3_moe/base-{out}",
                      f"qwen3_moe/a-{other}", f"qwen3_moe/b-{other}")
        want = merge("got", recipe)
        for options in (("--threads", "1"), ("--threads", "3"),
                        ("--memory", "16MiB", "--threads", "2")):
            check(merge("got", recipe, *options) == want, f"{out} {options}")
        store = f"s-{out}"
        run(TVSTORE, "init", store, code=0)
        run(TVSTORE, "import", store, "a", f"qwen3_moe/a-{other}",
            code=0)
        run(TVSTORE, "import", store, "b", f"qwen3_moe/b-{other}",
            "--link", code=0)
        stored = refs(METHODS["ties"], f"qwen3_moe/base-{out}", "store:a",
                      "store:b")
        for _ in range(2):  # the second one finds its masks in the store
            check(merge("got", stored, "--store", store) == want,
                  f"{out}: from a store")
        into = run_json(TVMERGE, "run", "r.yml", "--into", "m", "--store",
                        store, "--json", "--progress=none")
        check(into.get("digest") == want, f"{out}: into a store")


def bare_files():
    """Without config.json the names alone say that the models are alike."""
    recipe = refs(METHODS["linear"], "qwen3_moe/base-packed/model.safetensors",
                  "qwen3_moe/a-each/model.safetensors", "")
    want = merge("want", refs(METHODS["linear"], "qwen3_moe/base-packed",
                              "qwen3_moe/a-packed", ""))
    check(merge("got", recipe) == want, "bare files")


def statics():
    """ERNIE 4.5: a correction that has another name in each layout; Hunyuan:
    a router with a name of its own."""
    def add(layout):
        def more(t):
            r = np.random.default_rng(9)
            for i in range(N_LAYERS):
                p = f"model.layers.{i}.mlp."
                t[p + "gate.wg.weight"] = t.pop(p + "gate.weight")
                at = "gate.moe_statics" if layout == "packed" else "moe_statics"
                t[p + at + ".e_score_correction_bias"] = (
                    r.standard_normal((1, E)))
        return more
    for seed, m in enumerate("ab", 1):
        for layout in ("each", "packed"):
            save(f"odd/{m}-{layout}", model(seed, "odd_moe"), "odd_moe",
                 layout, damage=add(layout))
    for out, other in (("each", "packed"), ("packed", "each")):
        want = merge("want", refs(METHODS["linear"], f"odd/a-{out}",
                                  f"odd/b-{out}", ""))
        got = merge("got", refs(METHODS["linear"], f"odd/a-{out}",
                                f"odd/b-{other}", ""))
        check(want and got == want, f"odd routers in {out}")


def in_first():
    """gpt-oss and Llama 4 pack their experts [experts, in, out], the first
    gate and up in turns and with biases: merged as they are, and not taken
    apart by rows."""
    shapes = {
        "gpt_oss": {"mlp.router.weight": (E, H), "mlp.router.bias": (E,),
                    "mlp.experts.gate_up_proj": (E, H, 2 * INNER),
                    "mlp.experts.gate_up_proj_bias": (E, 2 * INNER),
                    "mlp.experts.down_proj": (E, INNER, H),
                    "mlp.experts.down_proj_bias": (E, H),
                    "self_attn.sinks": (4,)},
        "llama4_text": {"feed_forward.router.weight": (E, H),
                        "feed_forward.experts.gate_up_proj": (E, H, 2 * INNER),
                        "feed_forward.experts.down_proj": (E, INNER, H),
                        "feed_forward.shared_expert.up_proj.weight":
                            (INNER, H)},
    }
    classes = {"gpt_oss": "GptOssForCausalLM",
               "llama4_text": "Llama4ForCausalLM"}
    values = {}
    for kind, layer in shapes.items():
        for m, seed in (("a", 1), ("b", 2), ("each", 3)):
            r = np.random.default_rng(seed)
            names = {"model.embed_tokens.weight": (V, H),
                     "model.norm.weight": (H,), "lm_head.weight": (V, H)}
            for i in range(N_LAYERS):
                p = f"model.layers.{i}."
                names[p + "input_layernorm.weight"] = (H,)
                names.update({p + k: v for k, v in layer.items()})
                if m != "each":
                    continue
                at = "mlp" if kind == "gpt_oss" else "feed_forward"
                for n in ("gate_up_proj", "down_proj"):
                    for x in (n, n + "_bias"):
                        names.pop(f"{p}{at}.experts.{x}", None)
                for e in range(E):
                    x = f"{p}{at}.experts.{e}."
                    names[x + "gate_proj.weight"] = (INNER, H)
                    names[x + "up_proj.weight"] = (INNER, H)
                    names[x + "down_proj.weight"] = (H, INNER)
            t = {k: r.standard_normal(s).astype(np.float32)
                 for k, s in names.items()}
            os.makedirs(f"{kind}/{m}", exist_ok=True)
            write_safetensors(f"{kind}/{m}/model.safetensors",
                              {k: ("F32", v.shape, v.tobytes())
                               for k, v in t.items()}, {"format": "pt"})
            with open(f"{kind}/{m}/config.json", "w") as f:
                json.dump({"architectures": [classes[kind]],
                           "model_type": kind, "num_hidden_layers": N_LAYERS,
                           "hidden_size": H, "num_attention_heads": 4,
                           "vocab_size": V, "tie_word_embeddings": False}, f)
            values[m] = t
        merge("got", refs(METHODS["linear"], f"{kind}/a", f"{kind}/b", ""))
        got = read_safetensors("got")
        check(set(got) == set(values["a"]) and all(
            np.allclose(np.frombuffer(got[k][2], np.float32).reshape(v.shape),
                        0.4 * v + 0.6 * values["b"][k], atol=1e-6)
            for k, v in values["a"].items()), f"{kind}: the mean")
        for a, b in (("a", "each"), ("each", "a")):
            with open("r.yml", "w") as f:
                f.write(refs(METHODS["linear"], f"{kind}/{a}", f"{kind}/{b}",
                             ""))
            r = run(TVMERGE, "run", "r.yml", "never", code=4)
            check("[experts, in, out]" in r.stderr and
                  not os.path.exists("never"), f"{kind} {a}, {b}: {r.stderr}")


def refusals():
    """What cannot be put in the other form is refused with a reason."""
    p = "model.layers.1.mlp.experts."

    def lose(t):
        del t[p + "3.up_proj.weight"]

    def narrow(t):
        t[p + "2.down_proj.weight"] = t[p + "2.down_proj.weight"][:, 1:]

    def odd(t):
        t[p + "gate_up_proj"] = t[p + "gate_up_proj"][:, 1:]

    def fewer(t):
        for n in ("gate_up_proj", "down_proj"):
            t[p + n] = t[p + n][1:]

    m = model(2, "qwen3_moe")
    for layout, damage, says in (
            ("each", lose, "some are missing"),
            ("each", narrow, "shapes or dtypes differ"),
            ("packed", odd, "not [experts, rows, columns]"),
            ("packed", fewer, "no such tensor")):
        save("bad", m, "qwen3_moe", layout, damage=damage)
        base = "each" if layout == "packed" else "packed"
        with open("r.yml", "w") as f:
            f.write(refs(METHODS["linear"], f"qwen3_moe/base-{base}", "bad",
                         ""))
        r = run(TVMERGE, "run", "r.yml", "never", code=4)
        check(says in r.stderr, f"{damage.__name__}: {r.stderr[:300]}")
        check(not os.path.exists("never"), f"{damage.__name__}: no output")


def main():
    os.chdir(temp())
    conversions()
    ways()
    bare_files()
    statics()
    in_first()
    refusals()
    finish("experts")


main()
