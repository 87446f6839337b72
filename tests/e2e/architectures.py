#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""architectures.py BIN_DIR

What a merge may not lose in silence: biases that the output's config.json does
not announce, layers of another module, what config.json says about layers by
number, tensors under another of their names. Models of a few numbers, made
here.
"""
import json
import os
import sys

import numpy as np

from common import (check, finish, read_safetensors, run, run_json, temp,
                    write_safetensors)

BIN = os.path.abspath(sys.argv[1])
TVMERGE = os.path.join(BIN, "tvmerge")
H, V = 8, 12
LINEAR = ("merge_method: linear\nmodels:\n- {model: A, parameters: {weight: "
          "0.5}}\n- {model: B, parameters: {weight: 0.5}}\n")


def save(path, names, config, seed=1):
    """names: {name: shape}; a number in place of a shape fills with it."""
    r = np.random.default_rng(seed)
    out = {}
    for k, s in names.items():
        v = (r.standard_normal(s) if isinstance(s, tuple)
             else np.full((H,), s))
        out[k] = ("F32", v.shape, v.astype(np.float32).tobytes())
    os.makedirs(path, exist_ok=True)
    write_safetensors(os.path.join(path, "model.safetensors"), out,
                      {"format": "pt"})
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f)


def values(path, name):
    dtype, shape, data = read_safetensors(path)[name]
    return np.frombuffer(data, np.float32).reshape(shape)


def merge(recipe, out="out", code=0, *options):
    with open("r.yml", "w") as f:
        f.write(recipe)
    return run(TVMERGE, "run", "r.yml", out, "--force", "--progress=none",
               "--no-sync", "--no-write-model-card", *options, code=code)


def config_of(out="out"):
    with open(os.path.join(out, "config.json")) as f:
        return json.load(f)


def pair(recipe, a="a", b="b"):
    return recipe.replace("model: A", f"model: {a}").replace(
        "model: B", f"model: {b}")


def llama(n, biases=False, prefix="model.", head="lm_head.weight"):
    t = {prefix + "embed_tokens.weight": (V, H), prefix + "norm.weight": (H,),
         head: (V, H)}
    for i in range(n):
        p = f"{prefix}layers.{i}."
        t[p + "input_layernorm.weight"] = float(i)
        for x in "qkvo":
            t[p + f"self_attn.{x}_proj.weight"] = (H, H)
            if biases:
                t[p + f"self_attn.{x}_proj.bias"] = (H,)
    return t


def config(cls, kind, n, **more):
    return dict({"architectures": [cls], "model_type": kind, "hidden_size": H,
                 "num_attention_heads": 2, "vocab_size": V,
                 "num_hidden_layers": n, "torch_dtype": "float32",
                 "tie_word_embeddings": False}, **more)


def biases():
    c = config("LlamaForCausalLM", "llama", 2)
    save("plain", llama(2), c)
    save("biased", llama(2, True), dict(c, attention_bias=True), 2)
    r = merge(pair(LINEAR, "plain", "biased"), code=4)
    check("loaders would ignore it" in r.stderr and
          "q_proj.bias" in r.stderr, f"a bias without a config: {r.stderr}")
    r = merge(pair(LINEAR, "biased", "plain"))
    check("only 1 of 2 models have biases" in r.stderr, "biases of some")
    check(config_of()["attention_bias"] is True, "the config says so")
    name = "model.layers.1.self_attn.q_proj.bias"
    check(np.array_equal(values("out", name), values("biased", name)),
          "they are the model's that has them")
    merge("merge_method: task_arithmetic\nbase_model: plain\nmodels:\n"
          "- {model: biased, parameters: {weight: 1}}\n", code=4)


def buffers():
    """Rotary caches, which old checkpoints store, in any of the models."""
    c = config("LlamaForCausalLM", "llama", 2)
    cache = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (2,)
             for i in range(2)}
    save("without", llama(2), c)
    save("with", dict(llama(2), **cache), c, 2)
    for base, other in (("without", "with"), ("with", "without")):
        for method, p in (("ties", "{weight: 1, density: 0.5}"),
                          ("linear", "{weight: 1}"), ("slerp", "{t: 0.5}"),
                          ("model_stock", "{}")):
            more = (f"- model: {base}\n- model: copy\n"
                    if method == "model_stock" else
                    f"- {{model: {base}, parameters: {p}}}\n")
            save("copy", llama(2), c, 3)
            merge(f"merge_method: {method}\nbase_model: {base}\nmodels:\n"
                  f"{more}- {{model: {other}, parameters: {p}}}\n"
                  "parameters: {t: 0.5}\n")
            for k in cache:
                check(np.array_equal(values("out", k), values("with", k)),
                      f"{method}: {k} when {base} is the base")


def neox(n, head, mask):
    t = {"gpt_neox.embed_in.weight": (V, H),
         "gpt_neox.final_layer_norm.weight": (H,),
         "gpt_neox.final_layer_norm.bias": (H,), head: (V, H)}
    for i in range(n):
        p = f"gpt_neox.layers.{i}."
        for m, s in (("attention.query_key_value", (3 * H, H)),
                     ("attention.dense", (H, H)),
                     ("mlp.dense_h_to_4h", (4 * H, H)),
                     ("mlp.dense_4h_to_h", (H, 4 * H))):
            t[p + m + ".weight"], t[p + m + ".bias"] = s, (s[0],)
        t[p + "input_layernorm.weight"] = t[p + "input_layernorm.bias"] = (H,)
        if mask:
            t[p + "attention.bias"] = (1, 1, 4, 4)
    return t


def gpt_neox():
    """A directory and a bare file; the head under either name."""
    c = config("GPTNeoXForCausalLM", "gpt_neox", 2)
    for mask in (False, True):
        save("old", neox(2, "embed_out.weight", mask), c)
        save("new", neox(2, "lm_head.weight", mask), c, 2)
        for a, b in (("old", "old/model.safetensors"),
                     ("old/model.safetensors", "old"),
                     ("old/model.safetensors", "new/model.safetensors"),
                     ("old", "new"), ("new", "old")):
            merge(pair(LINEAR, a, b))
            head = ("lm_head.weight" if a.startswith("new")
                    else "embed_out.weight")
            names = read_safetensors("out")
            check(set(names) == set(read_safetensors(a.split("/")[0])),
                  f"{a}, {b}: names")
            x = values(a.split("/")[0], head)
            y = values(b.split("/")[0], "lm_head.weight"
                       if b.startswith("new") else "embed_out.weight")
            check(np.allclose(values("out", head), (x + y) / 2, atol=1e-6),
                  f"{a}, {b}: head")


def vlm(n, n_vision, seed, path):
    t = {k: v for k, v in llama(n, prefix="language_model.model.",
                                head="language_model.lm_head.weight").items()}
    for i in range(n_vision):
        p = f"vision_tower.vision_model.encoder.layers.{i}."
        for x in "qkv":
            t[p + f"self_attn.{x}_proj.weight"] = (H, H)
        t[p + "mlp.fc1.weight"], t[p + "mlp.fc2.weight"] = (H, H), (H, H)
        t[p + "layer_norm1.weight"] = float(i)
    t["multi_modal_projector.linear_1.weight"] = (H, H)
    text = {k: v for k, v in config("", "llama", n,
                                    layer_types=list("abcdefgh")[:n]).items()
            if k not in ("architectures", "torch_dtype")}
    save(path, t, {"architectures": ["LlavaForConditionalGeneration"],
                   "model_type": "llava", "torch_dtype": "float32",
                   "text_config": text, "tie_word_embeddings": False,
                   "vision_config": {"num_hidden_layers": n_vision,
                                     "hidden_size": H}}, seed)


def modalities():
    """The vision tower has more layers and is never taken for the decoder."""
    vlm(3, 5, 1, "va")
    vlm(3, 5, 2, "vb")
    merge("merge_method: passthrough\nslices:\n"
          "- sources: [{model: va, layer_range: [0, 2]}]\n"
          "- sources: [{model: vb, layer_range: [1, 3]}]\n")
    c = config_of()
    check(c["text_config"]["num_hidden_layers"] == 4, "layers of the decoder")
    check(c["text_config"]["layer_types"] == ["a", "b", "b", "c"],
          "lists of the decoder")
    check(c["vision_config"]["num_hidden_layers"] == 5, "of the tower")
    name = "language_model.model.layers.{}.self_attn.q_proj.weight"
    for at, (model, layer) in enumerate((("va", 0), ("va", 1), ("vb", 1),
                                         ("vb", 2))):
        check(np.array_equal(values("out", name.format(at)),
                             values(model, name.format(layer))),
              f"decoder layer {at}")
    tower = {k for k in read_safetensors("va") if "vision" in k}
    check(tower == {k for k in read_safetensors("out") if "vision" in k},
          "the tower is there once")
    for k in tower:
        check(np.array_equal(values("out", k), values("va", k)), k)
    # A gradient runs over the layers of each module.
    merge("merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
          "- {model: va, parameters: {weight: [0, 1]}}\n"
          "- {model: vb, parameters: {weight: 0}}\n")
    for name, n in (("language_model.model.layers.{}.input_layernorm.weight",
                     3),
                    ("vision_tower.vision_model.encoder.layers.{}."
                     "layer_norm1.weight", 5)):
        for i in range(n):
            check(np.allclose(values("out", name.format(i)), i * i / (n - 1)),
                  f"gradient of {name.format(i)}")


def heads():
    """The head of a stack of tied models has the name that its class knows."""
    for kind, cls, head in (("llama", "LlamaForCausalLM", "lm_head"),
                            ("biogpt", "BioGptForCausalLM",
                             "output_projection"),
                            ("modernbert-decoder",
                             "ModernBertDecoderForCausalLM", "decoder")):
        c = config(cls, kind, 2, tie_word_embeddings=True)
        t = llama(2)
        del t["lm_head.weight"]
        save("ha", t, c)
        save("hb", t, c, 2)
        save("hu", dict(t, **{head + ".weight": (V, H)}),
             dict(c, tie_word_embeddings=False), 3)
        merge("merge_method: passthrough\nslices:\n"
              "- sources: [{model: ha, layer_range: [0, 2]}]\n"
              "- sources: [{model: hb, layer_range: [1, 2]}]\n")
        check(np.array_equal(values("out", head + ".weight"),
                             values("hb", "model.embed_tokens.weight")) and
              config_of()["tie_word_embeddings"] is False, f"{kind}: a stack")
        for a, b in (("ha", "hu"), ("hu", "ha")):
            merge(pair(LINEAR, a, b))
            check(np.allclose(values("out", head + ".weight"),
                              (values("ha", "model.embed_tokens.weight") +
                               values("hu", head + ".weight")) / 2, atol=1e-6)
                  and config_of()["tie_word_embeddings"] is False,
                  f"{kind}: tied and untied {a} {b}")


def wrong_flags():
    """A head that the config does not announce, and the other way round."""
    c = config("LlamaForCausalLM", "llama", 2)
    t = llama(2)
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    save("right", t, c)
    save("stores", t, dict(c, tie_word_embeddings=True), 2)
    save("lacks", {k: s for k, s in t.items() if k != head}, c, 3)
    alone = "merge_method: passthrough\nmodels: [{model: A}]\n"
    for model, source, tied, says in (("stores", head, False, "other values"),
                                      ("lacks", embed, True, "stores none")):
        r = merge(alone.replace("A", model))
        check(says in r.stderr and
              config_of()["tie_word_embeddings"] is tied and
              (head in read_safetensors("out")) is not tied,
              f"{model} alone: {r.stderr}")
        for a, b in (("right", model), (model, "right")):
            r = merge(pair(LINEAR, a, b))
            check(says in r.stderr and np.allclose(
                values("out", head), (values("right", head) +
                                      values(model, source)) / 2, atol=1e-6)
                and config_of()["tie_word_embeddings"] is False,
                f"{a}, {b}: {r.stderr}")


def rows():
    """More rows than vocab_size: no loader takes the model."""
    save("many", llama(2), config("LlamaForCausalLM", "llama", 2,
                                  vocab_size=V - 2))
    save("even", llama(2), config("LlamaForCausalLM", "llama", 2), 2)
    for a, b, says in (("many", "even", True), ("even", "many", False)):
        r = merge(pair(LINEAR, a, b))
        check(("does not load" in r.stderr) is says, f"{a}, {b}: {r.stderr}")


def spellings():
    """One model as transformers 4 and 5 name it, and without a prefix."""
    vlm(3, 4, 1, "va")
    vlm(3, 4, 2, "vb")
    new = {}
    for k, (dtype, shape, data) in read_safetensors("vb").items():
        k = k.replace("language_model.lm_head", "lm_head")
        k = k.replace("language_model.model.", "model.language_model.")
        if k.startswith(("vision_tower", "multi_modal")):
            k = "model." + k.replace("vision_model.", "")
        new[k] = (dtype, shape, data)
    os.makedirs("vn", exist_ok=True)
    write_safetensors("vn/model.safetensors", new, {"format": "pt"})
    with open("vn/config.json", "w") as f:
        json.dump(config_of("vb"), f)
    save("la", llama(2), config("LlamaForCausalLM", "llama", 2))
    save("lb", llama(2), config("LlamaForCausalLM", "llama", 2), 2)
    save("lp", llama(2, prefix=""), config("LlamaForCausalLM", "llama", 2), 2)
    for a, plain, other in (("va", "vb", "vn"), ("la", "lb", "lp")):
        for recipe in (LINEAR, "merge_method: passthrough\nslices:\n"
                       "- sources: [{model: A, layer_range: [0, 2]}]\n"
                       "- sources: [{model: B, layer_range: [1, 2]}]\n"):
            merge(pair(recipe, a, plain), "want")
            merge(pair(recipe, a, other))
            check(read_safetensors("out") == read_safetensors("want"),
                  f"{other} beside {a}")
        merge(pair(LINEAR, other, a))
        check(set(read_safetensors("out")) == set(read_safetensors(other)),
              f"the names of {other}, which is first")


def unknown():
    """An architecture that nobody knows: every tensor is there, and plan and
    model card say what was taken for what."""
    names = {"net.tok_emb.weight": (V, H), "net.scale": (), "unembed.weight": (V, H),
             "aux.7.x": (3,)}
    for i in range(3):
        names[f"net.blocks.{i}.0.w"] = (H, H)
        names[f"net.blocks.{i}.1.w"] = (H,)
    kind = {"model_type": "wholly-new", "vocab_size": V, "d": H}
    for path, seed in (("ua", 1), ("ub", 2)):
        save(path, names, kind, seed)
        t = read_safetensors(path)
        t["counter"] = ("I64", (1,), (5).to_bytes(8, "little"))
        write_safetensors(os.path.join(path, "model.safetensors"), t)
    with open("r.yml", "w") as f:
        f.write(pair(LINEAR, "ua", "ub"))
    p = run_json(TVMERGE, "plan", "r.yml", "uo", "--json")
    said = [x["message"] for x in p["problems"]]
    want = ("no table of names has 'wholly-new': 3 layers in 'net.blocks.', "
            "embedding 'net.tok_emb.weight' and head 'unembed.weight' are told by "
            "names and shapes")
    check(want in said, f"inferred: plan says {said}")
    check({(t["name"], t["action"]) for t in p["tensors"]}
          == {(n, "merge") for n in names} | {("counter", "copy")},
          "inferred: the plan has every tensor")
    run(TVMERGE, "run", "r.yml", "uo", "-q", "--no-sync", code=0)
    for n in names:
        check(np.allclose(values("uo", n), (values("ua", n)
                                            + values("ub", n)) / 2),
              f"inferred: {n} is the mean")
    with open("uo/README.md", encoding="utf-8") as f:
        card = f.read()
    check(want in card, "inferred: the model card says so")
    check("11 tensors: 10 merged, 1 copied from one model." in card
          and "no weights, copied: `counter`" in card,
          f"the model card counts tensors: {card[-900:]}")
    # never another number in silence
    t = read_safetensors("ub")
    t["counter"] = ("I64", (1,), (6).to_bytes(8, "little"))
    write_safetensors(os.path.join("ub", "model.safetensors"), t)
    r = merge(pair(LINEAR, "ua", "ub"), code=4)
    check("counter" in r.stderr, r.stderr)


def tokenizer_memory():
    """What aligning large tokenizers takes is in the plan."""
    words = {f"word{i:06}-{'x' * 40}": i for i in range(20000)}
    for path in ("ma", "mb"):
        save(path, {"model.embed_tokens.weight": (20000, H),
                    "model.norm.weight": (H,), "lm_head.weight": (20000, H)},
             config("LlamaForCausalLM", "llama", 1, vocab_size=20000))
        with open(f"{path}/tokenizer.json", "w") as f:
            json.dump({"version": "1.0", "model": {
                "type": "WordLevel", "unk_token": "?", "vocab": words},
                "added_tokens": []}, f)
    with open("r.yml", "w") as f:
        f.write(pair(LINEAR, "ma", "mb") + "tokenizer_source: union\n")
    plan = run_json(TVMERGE, "plan", "r.yml", "--json", "--threads", "1")
    least = 8 * os.path.getsize("ma/tokenizer.json")
    check(plan.get("peak_scratch_bytes", 0) >= least,
          f"{plan.get('peak_scratch_bytes')} of {least} bytes")


def t5(n_encoder, n_decoder, path, seed):
    t = {"shared.weight": (V, H)}
    for stack, n in (("encoder", n_encoder), ("decoder", n_decoder)):
        for i in range(n):
            t[f"{stack}.block.{i}.layer.0.SelfAttention.q.weight"] = (H, H)
            t[f"{stack}.block.{i}.layer.0.layer_norm.weight"] = float(i)
        t[f"{stack}.final_layer_norm.weight"] = (H,)
    save(path, t, {"architectures": ["T5ForConditionalGeneration"],
                   "model_type": "t5", "num_layers": n_encoder, "d_model": H,
                   "num_decoder_layers": n_decoder, "num_heads": 2,
                   "vocab_size": V, "tie_word_embeddings": True}, seed)


def two_stacks():
    t5(2, 4, "ta", 1)
    t5(2, 4, "tb", 2)
    t5(2, 3, "tc", 2)
    r = merge("merge_method: passthrough\nslices:\n"
              "- sources: [{model: ta, layer_range: [0, 2]}]\n"
              "- sources: [{model: tb, layer_range: [0, 2]}]\n", "never", 4)
    check("modules:" in r.stderr, f"a stack of T5: {r.stderr}")
    r = merge(pair(LINEAR, "ta", "tc"), "never", 4)
    check("layers of decoder" in r.stderr, f"another depth: {r.stderr}")
    merge(pair(LINEAR, "ta", "tb"))
    check(set(read_safetensors("out")) == set(read_safetensors("ta")),
          "every layer of the longer stack")
    merge("merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
          "- {model: ta, parameters: {weight: [0, 1]}}\n"
          "- {model: tb, parameters: {weight: 0}}\n")
    for i in range(4):
        name = f"decoder.block.{i}.layer.0.layer_norm.weight"
        check(np.allclose(values("out", name), i * i / 3), f"gradient: {name}")


def deepseek(n, dense, path, seed, extra=True):
    t = llama(n)
    for i in range(n):
        p = f"model.layers.{i}.mlp."
        if i < dense:
            t[p + "up_proj.weight"] = (H, H)
        else:
            t[p + "gate.weight"] = (2, H)
            for e in range(2):
                t[p + f"experts.{e}.up_proj.weight"] = (H, H)
    if extra:  # a layer that predicts one more token
        t[f"model.layers.{n}.eh_proj.weight"] = (H, H)
        t[f"model.layers.{n}.self_attn.o_proj.weight"] = (H, H)
    save(path, t, config("DeepseekV3ForCausalLM", "deepseek_v3", n,
                         first_k_dense_replace=dense,
                         num_nextn_predict_layers=int(extra)), seed)


def numbers():
    deepseek(4, 2, "da", 1)
    deepseek(4, 2, "db", 2)
    merge("merge_method: passthrough\nslices:\n"
          "- sources: [{model: da, layer_range: [0, 1]}]\n"
          "- sources: [{model: db, layer_range: [2, 4]}]\n")
    c = config_of()
    check((c["num_hidden_layers"], c["first_k_dense_replace"]) == (3, 1),
          f"leading dense layers: {c}")
    out = read_safetensors("out")
    check({k for k in out if ".layers.3." in k} ==
          {"model.layers.3.eh_proj.weight",
           "model.layers.3.self_attn.o_proj.weight"},
          "the layer behind the last one stays behind it")
    check(np.array_equal(values("out", "model.layers.3.eh_proj.weight"),
                         values("db", "model.layers.4.eh_proj.weight")),
          "... as the last slice's model has it")
    r = merge("merge_method: passthrough\nslices:\n"
              "- sources: [{model: da, layer_range: [0, 3]}]\n"
              "- sources: [{model: db, layer_range: [1, 4]}]\n", "never", 4)
    check("first_k_dense_replace" in r.stderr, f"dense behind: {r.stderr}")
    merge(pair(LINEAR, "da", "db"))
    check(set(read_safetensors("out")) == set(read_safetensors("da")),
          "a merge has the layer behind the last one")

    def qwen(path, **more):
        save(path, llama(4), config("Qwen2ForCausalLM", "qwen2", 4, **more))

    def stack(a, first, b, second, code=0):
        return merge(
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: {a}, layer_range: {first}}}]\n"
            f"- sources: [{{model: {b}, layer_range: {second}}}]\n",
            "never" if code else "out", code)

    qwen("qa", max_window_layers=4, use_sliding_window=False)
    stack("qa", [0, 3], "qa", [1, 4])
    check(config_of()["max_window_layers"] == 6, "all are windowless")
    qwen("qb", max_window_layers=2, use_sliding_window=True)
    stack("qb", [0, 1], "qb", [1, 4])
    check(config_of()["max_window_layers"] == 2, "the same two")
    stack("qb", [0, 2], "qb", [1, 4])
    check(config_of()["max_window_layers"] == 3, "one more")
    r = stack("qb", [0, 3], "qb", [1, 4])
    check("max_window_layers" in r.stderr, "a window in between: warned")
    # As many numbers as layers are no list with one entry per layer.
    qwen("qm", moe_layers=[0, 1, 2, 3], time_step_limit=[0.0, float("inf")])
    stack("qm", [0, 3], "qm", [1, 4])
    check(config_of()["moe_layers"] == list(range(6)), "all of them")
    check(config_of()["time_step_limit"] == [0.0, float("inf")],
          "Infinity, as Python writes it")
    qwen("qm", moe_layers=[1, 3], interleave_moe_layer_step=2)
    stack("qm", [0, 3], "qm", [1, 4])
    check(config_of()["moe_layers"] == [1, 3, 5], "Llama 4's experts")
    for start, end, first, second, want in (
            (1, 3, [0, 4], [2, 4], (1, 5)), (1, -1, [0, 4], [2, 4], (1, -1)),
            (0, 2, [0, 2], [1, 4], (0, 3)), (1, 3, [0, 2], [0, 2], None),
            (0, 2, [0, 4], [1, 3], None)):
        qwen("qe", moe_layer_start_index=start, moe_layer_end_index=end)
        stack("qe", first, "qe", second, 0 if want else 4)
        c = config_of()
        check(not want or (c["moe_layer_start_index"],
                           c["moe_layer_end_index"]) == want,
              f"ERNIE's experts: {start} {end} {first} {second}: {c}")
    qwen("qp", hidden_size_per_layer_input=8)
    r = stack("qp", [0, 3], "qp", [1, 4], 4)
    check("hidden_size_per_layer_input" in r.stderr, "pieces of layers")
    stack("qp", [0, 3], "qp", [3, 4])
    qwen("qc", mlp_only_layers=[0, 3], decoder_sparse_step=1)
    stack("qc", [0, 2], "qc", [2, 4])
    check(config_of()["mlp_only_layers"] == [0, 3], "the same layers")
    stack("qc", [0, 4], "qc", [2, 4])
    check(config_of()["mlp_only_layers"] == [0, 3, 5], "repeated ones")
    qwen("qd", decoder_sparse_step=2)
    r = stack("qd", [0, 3], "qd", [2, 4], 4)
    check("decoder_sparse_step" in r.stderr, "a period that is broken")
    stack("qd", [0, 2], "qd", [0, 2])
    # A family without a known count of layers would not load.
    t = {k.replace("model.layers", "net.cells"): v
         for k, v in llama(3).items()}
    c = config("OddModel", "odd", 3)
    c["n_cells"] = c.pop("num_hidden_layers")
    save("odd", t, c)
    r = stack("odd", [0, 2], "odd", [1, 3], 4)
    check("would not load" in r.stderr, f"an unknown count: {r.stderr}")


def main():
    os.chdir(temp())
    biases()
    buffers()
    gpt_neox()
    modalities()
    heads()
    wrong_flags()
    rows()
    spellings()
    two_stacks()
    numbers()
    tokenizer_memory()
    unknown()
    finish("architectures")


main()
