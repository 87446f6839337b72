#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""modules.py BIN_DIR

`modules:` recipes on a small model of the LLaVA kind and on one with an encoder
and a decoder: each module by its own models, slices and parameters, what is not
named copied, layers and config.json counted per module.
"""
import json
import os
import shutil
import sys

import numpy as np

from common import check, finish, read_safetensors, run, run_json, temp, \
    write_safetensors

BIN = os.path.abspath(sys.argv[1])
TVMERGE = os.path.join(BIN, "tvmerge")
LM, TOWER, H = 3, 2, 8


def layer(prefix, i):
    return {f"{prefix}{i}.self_attn.q_proj.weight": (H, H),
            f"{prefix}{i}.mlp.up_proj.weight": (2 * H, H),
            f"{prefix}{i}.input_layernorm.weight": (H,)}


def llava():
    shapes = {"language_model.model.embed_tokens.weight": (16, H),
              "language_model.model.norm.weight": (H,),
              "language_model.lm_head.weight": (16, H),
              "multi_modal_projector.linear_1.weight": (H, H),
              "multi_modal_projector.linear_1.bias": (H,),
              "vision_tower.vision_model.embeddings.patch_embedding.weight":
              (H, 3, 2, 2)}
    for i in range(LM):
        shapes.update(layer("language_model.model.layers.", i))
    for i in range(TOWER):
        shapes.update(layer("vision_tower.vision_model.encoder.layers.", i))
    return shapes, {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava", "dtype": "float32",
        "text_config": {"model_type": "llama", "hidden_size": H,
                        "num_hidden_layers": LM, "num_attention_heads": 2,
                        "vocab_size": 16, "intermediate_size": 2 * H,
                        "layer_kinds": ["a", "b", "c"]},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": H,
                          "num_hidden_layers": TOWER,
                          "num_attention_heads": 2}}


def save(name, shapes, config, seed):
    rng = np.random.default_rng(seed)
    os.mkdir(name)
    write_safetensors(os.path.join(name, "model.safetensors"), {
        n: ("F32", s, rng.standard_normal(s).astype("<f4").tobytes())
        for n, s in shapes.items()}, {"format": "pt"})
    with open(os.path.join(name, "config.json"), "w") as f:
        json.dump(config, f, indent=2)


def load(name):
    t = read_safetensors(os.path.join(name, "model.safetensors"))
    return {n: np.frombuffer(b, "<f4").reshape(s).astype("f8")
            for n, (_, s, b) in t.items()}


def merge(text, code=0):
    with open("r.yml", "w", encoding="utf-8") as f:
        f.write(text)
    shutil.rmtree("out", True)
    p = run_json(TVMERGE, "plan", "r.yml", "out", "--json", code=code)
    r = run(TVMERGE, "run", "r.yml", "out", "-q")
    check(r.returncode == code, f"exit {r.returncode}: {r.stderr[-400:]}")
    check(p["ok"] == (code == 0), f"plan: {p['problems']}")
    if code:
        check(not os.path.exists("out"), "leaves nothing behind")
        return p, {}, {}
    with open("out/config.json") as f:
        return p, load("out"), json.load(f)


def close(got, want, what):
    check(got.shape == want.shape and
          np.allclose(got, want, rtol=0, atol=1e-6), f"{what} differs")


TEXT = ("merge_method: linear\nmodules:\n  text_decoder:\n    models:\n"
        "    - {model: a, parameters: {weight: 0.25}}\n"
        "    - {model: b, parameters: {weight: 0.75}}\n")


LINEAR = ("merge_method: linear\nmodels:\n"
          "- {model: a, parameters: {weight: 0.25}}\n"
          "- {model: b, parameters: {weight: 0.75}}\n")


def text_only(a, b):
    """The text module merged, the rest copied."""
    for key in ("text_decoder", "language_model",
                "language_model.model.layers"):
        p, out, config = merge(TEXT.replace("text_decoder", key))
        check(set(out) == set(a), f"{key}: tensors {set(a) ^ set(out)}")
        for n in a:
            text = n.startswith("language_model")
            close(out[n], 0.25 * a[n] + 0.75 * b[n] if text else a[n], n)
        check(config == llava()[1], "config.json as it was")
        check(any("vision_tower" in x["message"] and "copied" in x["message"]
                  for x in p["problems"]), f"{p['problems']}")
        how = {t["name"]: (t["method"], t["action"]) for t in p["tensors"]}
        check(how["multi_modal_projector.linear_1.bias"] ==
              ("passthrough", "copy"), f"{how}")
    # base_model gives the rest.
    p, out, _ = merge("base_model: b\n" + TEXT)
    close(out["multi_modal_projector.linear_1.bias"],
          b["multi_modal_projector.linear_1.bias"], "the base's projector")


def each(a, b):
    """Scopes of parameters, gradients over a module's own layers."""
    _, out, _ = merge(
        "merge_method: task_arithmetic\nbase_model: a\n"
        "parameters: {weight: 0.5}\nmodules:\n  text_decoder:\n"
        "    parameters: {weight: [0, 1]}\n    models: [{model: b}]\n"
        "  vision_tower:\n    models:\n"
        "    - {model: b, parameters: {weight: [1, 0]}}\n"
        "    parameters: {weight: 9}\n"
        "  multi_modal_projector:\n    models: [{model: b}]\n")
    for n in a:
        w = 0.5
        if n.startswith("language_model"):
            w = (int(n.split(".")[3]) / (LM - 1) if ".layers." in n else 0)
        elif n.startswith("vision_tower"):
            w = (1 - int(n.split(".")[4]) / (TOWER - 1)
                 if ".layers." in n else 1)
        close(out[n], a[n] + w * (b[n] - a[n]), n)
    # `models:` at the top counts the layers of every module too.
    _, out, _ = merge("merge_method: task_arithmetic\nbase_model: a\n"
                      "models:\n- {model: b, parameters: {weight: [0, 1]}}\n")
    n = "vision_tower.vision_model.encoder.layers.1.mlp.up_proj.weight"
    close(out[n], b[n], n)


def language_model(prefix, head):
    shapes = {prefix + "embed_tokens.weight": (16, H),
              prefix + "norm.weight": (H,), head: (16, H)}
    for i in range(LM):
        shapes.update(layer(prefix + "layers.", i))
    return shapes


TEXT_CONFIG = {"hidden_size": H, "num_hidden_layers": LM,
               "num_attention_heads": 2, "vocab_size": 16,
               "intermediate_size": 2 * H, "tie_word_embeddings": False,
               "layer_kinds": ["t", "u", "v"]}
# class, its language model's prefix and head, the rest, config.json, and the
# type and class of the language model alone. Qwen2-VL had its numbers at the
# top at first, beside vision_config.
LARGER = {
    "llava": ("LlavaForConditionalGeneration", "language_model.model.",
              "language_model.lm_head.weight",
              {"multi_modal_projector.linear_1.weight": (H, H),
               "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight":
               (H, H)},
              {"text_config": dict(TEXT_CONFIG, model_type="llama"),
               "vision_config": {"num_hidden_layers": 1}},
              "llama", "LlamaForCausalLM"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "model.",
                 "lm_head.weight",
                 {"visual.patch_embed.proj.weight": (H, 3, 2, 2, 2),
                  "visual.blocks.0.attn.qkv.weight": (3 * H, H),
                  "visual.merger.ln_q.weight": (H,)},
                 dict(TEXT_CONFIG, vision_config={"depth": 1}),
                 "qwen2", "Qwen2ForCausalLM"),
    "gemma3": ("Gemma3ForConditionalGeneration", "model.language_model.",
               "lm_head.weight",
               {"model.multi_modal_projector.mm_input_projection_weight":
                (H, H),
                "model.vision_tower.head.probe": (1, 1, H),
                "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (H, H)},
               {"text_config": dict(TEXT_CONFIG, model_type="gemma3_text"),
                "vision_config": {"num_hidden_layers": 1}},
               "gemma3_text", "Gemma3ForCausalLM"),
}


def language_model_alone():
    """A language model's fine-tune goes into the text module of a larger one,
    under its names; the rest is copied, and nothing is dropped."""
    for kind, (cls, prefix, head, rest, config, text, text_cls) in \
            LARGER.items():
        v, t = kind + "-v", kind + "-t"
        save(v, {**language_model(prefix, head), **rest},
             dict(config, architectures=[cls], model_type=kind), 7)
        save(t, language_model("model.", "lm_head.weight"),
             dict(TEXT_CONFIG, architectures=[text_cls], model_type=text), 8)
        a, b = load(v), load(t)
        recipe = TEXT.replace("model: a", f"model: {v}").replace(
            "model: b", f"model: {t}")
        for text_recipe in (recipe, f"base_model: {v}\n" + recipe):
            _, out, c = merge(text_recipe)
            check(set(out) == set(a), f"{kind}: {set(out) ^ set(a)}")
            for n in a:
                own = n.replace(prefix, "model.", 1)
                own = "lm_head.weight" if n == head else own
                close(out[n], a[n] if n in rest else
                      0.25 * a[n] + 0.75 * b[own], f"{kind} {n}")
            check(c["architectures"] == [cls], f"{kind}: {c}")
        # Its layers stacked with the larger one's; what config.json says of
        # each comes from where it came from.
        _, out, c = merge(
            "merge_method: passthrough\nmodules:\n  text_decoder:\n"
            "    slices:\n"
            f"    - sources: [{{model: {v}, layer_range: [0, 2]}}]\n"
            f"    - sources: [{{model: {t}, layer_range: [0, 3]}}]\n")
        part = "layers.{}.mlp.up_proj.weight"
        for i, (m, k) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1), (b, 2)]):
            close(out[prefix + part.format(i)],
                  m[(prefix if m is a else "model.") + part.format(k)],
                  f"{kind}: layer {i}")
        said = c.get("text_config", c)
        check(said["num_hidden_layers"] == 5 and
              said["layer_kinds"] == list("tutuv"), f"{kind}: {c}")
        check(set(rest) <= set(out), f"{kind}: the rest is there")
        # Nothing else of a larger model can be made of it.
        for wrong in (LINEAR.replace("model: a", f"model: {v}").replace(
                "model: b", f"model: {t}"),
                recipe.replace(f"model: {v}", "model: x").replace(
                    f"model: {t}", f"model: {v}").replace(
                    "model: x", f"model: {t}")):
            p, _, _ = merge(wrong, 4)
            check(any("through 'modules: {text_decoder" in x["message"]
                      for x in p["problems"]), f"{kind}: {p['problems']}")


def stacks(a, b):
    p, out, config = merge(
        "merge_method: passthrough\nmodules:\n  text_decoder:\n    slices:\n"
        "    - sources: [{model: a, layer_range: [0, 2]}]\n"
        "    - sources: [{model: b, layer_range: [0, 3]}]\n"
        "  vision_tower:\n    slices:\n"
        "    - sources: [{model: b, layer_range: [1, 2]}]\n")
    text, tower = "language_model.model.", "vision_tower.vision_model.encoder."
    part = "layers.{}.mlp.up_proj.weight"
    for i, (m, k) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1), (b, 2)]):
        close(out[text + part.format(i)], m[text + part.format(k)],
              f"layer {i}")
    close(out[tower + part.format(0)], b[tower + part.format(1)], "tower")
    check(sum(".mlp.up_proj." in n for n in out) == 6, "six layers in all")
    close(out[text + "norm.weight"], b[text + "norm.weight"], "last norm")
    close(out[text + "embed_tokens.weight"], a[text + "embed_tokens.weight"],
          "embedding")
    n = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    close(out[n], b[n], n)
    check(config["text_config"]["num_hidden_layers"] == 5 and
          config["vision_config"]["num_hidden_layers"] == 1 and
          config["text_config"]["layer_kinds"] == list("ababc"),
          f"config {config}")


def two_stacks():
    """Whisper: encoder and decoder, with their own counts in config.json."""
    shapes = {"model.encoder.embed_positions.weight": (16, H),
              "model.encoder.layer_norm.weight": (H,),
              "model.decoder.embed_tokens.weight": (16, H),
              "model.decoder.embed_positions.weight": (16, H),
              "model.decoder.layer_norm.weight": (H,)}
    for i in range(2):
        for stack in ("encoder", "decoder"):
            shapes[f"model.{stack}.layers.{i}.fc1.weight"] = (2 * H, H)
    config = {"architectures": ["WhisperForConditionalGeneration"],
              "model_type": "whisper", "d_model": H, "encoder_layers": 2,
              "decoder_layers": 2, "vocab_size": 16, "torch_dtype": "float32"}
    save("w", shapes, config, 3)
    w = load("w")
    stack = ("    slices:\n    - sources: [{model: w, layer_range: [0, 2]}]\n"
             "    - sources: [{model: w, layer_range: [1, 2]}]\n")
    for names in (["encoder"], ["decoder"], ["encoder", "decoder"]):
        p, out, c = merge("merge_method: passthrough\nmodules:\n" + "".join(
            f"  {n}:\n{stack}" for n in names))
        for n in ("encoder", "decoder"):
            layers = 3 if n in names else 2
            check(c[n + "_layers"] == layers and
                  sum(f".{n}.layers." in t for t in out) == layers,
                  f"{names}: {c}")
            close(out[f"model.{n}.layers.{layers - 1}.fc1.weight"],
                  w[f"model.{n}.layers.1.fc1.weight"], n)
    # Which of the two, a list of slices does not say.
    p, _, _ = merge("merge_method: passthrough\nslices:\n"
                    "- sources: [{model: w, layer_range: [0, 2]}]\n", 4)
    check(any("modules:" in x["message"] for x in p["problems"]),
          f"{p['problems']}")


WRONG = {
    "unknown module": (TEXT.replace("text_decoder", "text_encoder"), 4,
                       "r.yml:3:3", "text_decoder (also language_model, "
                       "text_model)"),
    "named twice": (TEXT + "  language_model:\n    models: [{model: a, "
                    "parameters: {weight: 1}}]\n", 2, "r.yml:7:3", "one module"),
    "range": ("merge_method: passthrough\nmodules:\n  vision_tower:\n"
              "    slices:\n    - sources: [{model: a, layer_range: [0, 3]}]\n",
              4, "r.yml:5:", "2 layers of vision_tower"),
    "both": (TEXT + "    slices:\n    - sources: [{model: a, layer_range: "
             "[0, 2]}]\n", 2, "r.yml:7:5", "not both"),
    "neither": ("merge_method: linear\nmodules:\n  text_decoder: "
                "{parameters: {}}\n", 2, "r.yml:3:", "missing"),
    "models beside": (TEXT + "models: [{model: a}]\n", 2, "r.yml:7:1",
                      "either"),
    "no map": ("merge_method: linear\nmodules: [a]\n", 2, "r.yml:2:10", "map"),
    "no weight": (TEXT.replace(", parameters: {weight: 0.75}", ""), 2,
                  "r.yml:6:", "weight"),
    "no base": (TEXT.replace("linear", "ties"), 2, "r.yml:1:15", "base_model"),
    "misspelt": (TEXT + "    paramters: {}\n", 0, "r.yml:7:5", "parameters"),
}


def wrong():
    for what, (text, code, where, word) in WRONG.items():
        p, _, _ = merge(text, code)
        check(any(x["where"].startswith(where) and word in x["message"]
                  for x in p["problems"]), f"{what}: {p['problems']}")


def plain():
    """A model of one stack: its one module is called default."""
    shapes = {"model.embed_tokens.weight": (16, H), "model.norm.weight": (H,),
              "lm_head.weight": (16, H)}
    for i in range(LM):
        shapes.update(layer("model.layers.", i))
    config = dict(llava()[1]["text_config"], model_type="mystery",
                  architectures=["MysteryForCausalLM"])
    save("p", shapes, config, 5)
    save("q", shapes, config, 6)
    p, q = load("p"), load("q")
    for key in ("default", "text_decoder"):
        _, out, _ = merge(TEXT.replace("text_decoder", key).replace(
            "model: a", "model: p").replace("model: b", "model: q"))
        for n in p:
            close(out[n], 0.25 * p[n] + 0.75 * q[n], n)
    bad, _, _ = merge(TEXT.replace("text_decoder", "vision_tower").replace(
        "model: a", "model: p").replace("model: b", "model: q"), 4)
    check(any("it has: default or text_decoder (also language_model, "
              "text_model)" in x["message"] for x in bad["problems"]),
          f"{bad['problems']}")


def main():
    os.chdir(temp())
    save("a", *llava(), 1)
    save("b", *llava(), 2)
    a, b = load("a"), load("b")
    text_only(a, b)
    each(a, b)
    stacks(a, b)
    wrong()
    plain()
    language_model_alone()
    two_stacks()
    finish("modules")


main()
