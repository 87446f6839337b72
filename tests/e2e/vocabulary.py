#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""vocabulary.py BIN_DIR

The cases of mergekit's own test of tokenizers (64 tokens, 66 with the chat
marks, 80 padded) and of recipe-spec.md, with its rule of rows computed here: the
rows of every output tensor over tokens are checked by token, in plain merges,
stacks and modules. The block that a refusal prints is put into the recipe as it
stands, and must do. Models of a few numbers, made here.
"""
import json
import os
import re
import shutil
import sys

import numpy as np

from common import (check, finish, read_safetensors, run, temp,
                    write_safetensors)

BIN = os.path.abspath(sys.argv[1])
TVMERGE = os.path.join(BIN, "tvmerge")
TVEVAL = os.path.join(BIN, "tveval")
H = 8
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MARKS = ["<|im_start|>", "<|im_end|>"]


def flags(special):
    return {"single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def tokenizer(n, added):
    vocab = {s: i for i, s in enumerate(
        ["<unk>", "<s>", "</s>"] + [f"_tok_{i}" for i in range(3, n)])}
    return {"version": "1.0", "added_tokens": [
        {"id": n + i, "content": s, **flags(True)}
        for i, s in enumerate(added)],
        "model": {"type": "BPE", "vocab": vocab, "merges": []}}


def model(name, rows, tok, seed, tied=False, prefix="", layers=2, **more):
    rng = np.random.default_rng(seed)
    os.mkdir(name)
    shapes = {EMBED: (rows, H), "model.norm.weight": (H,)}
    if not tied:
        shapes[HEAD] = (rows, H)
    for i in range(layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (H,)
        for x in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{x}_proj.weight"] = (H, H)
    if prefix:
        shapes = {prefix + k: s for k, s in shapes.items()}
        shapes["vision_tower.vision_model.post_layernorm.weight"] = (H,)
    write_safetensors(os.path.join(name, "model.safetensors"), {
        k: ("F32", s, rng.standard_normal(s).astype("<f4").tobytes())
        for k, s in shapes.items()}, {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "hidden_size": H, "num_attention_heads": 2, "vocab_size": rows,
              "num_hidden_layers": layers, "torch_dtype": "float32",
              "bos_token_id": 1, "eos_token_id": 2,
              "tie_word_embeddings": tied}
    if prefix:
        config = {"architectures": ["LlavaForConditionalGeneration"],
                  "model_type": "llava", "torch_dtype": "float32",
                  "text_config": config, "vision_config": {
                      "model_type": "clip_vision_model", "hidden_size": H,
                      "num_hidden_layers": 0}}
    config.update(more)
    write(f"{name}/config.json", config)
    write(f"{name}/tokenizer.json", tok)
    write(f"{name}/tokenizer_config.json",
          {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
           "eos_token": "</s>"})
    return name


def write(path, doc):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(doc, f, ensure_ascii=False)


def read(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


class Model:
    def __init__(self, path, prefix=""):
        t = read_safetensors(os.path.join(path, "model.safetensors"))
        self.w = {k: np.frombuffer(b, "<f4").reshape(s)
                  for k, (_, s, b) in t.items()}
        self.config = read(f"{path}/config.json")
        self.text = self.config.get("text_config", self.config)
        tok = read(f"{path}/tokenizer.json")
        self.vocab = dict(tok["model"]["vocab"])
        self.vocab.update({x["content"]: x["id"]
                           for x in tok["added_tokens"]})
        self.prefix = prefix

    def table(self, key):
        k = self.prefix + key
        return self.w[k] if k in self.w else self.w[self.prefix + EMBED]

    def row(self, token, key):
        """None: the token has no row here."""
        i = self.vocab.get(token, 1 << 40)
        table = self.table(key)
        return table[i] if i < len(table) else None


def merge(recipe, *options, code=0, out="out"):
    with open("r.yml", "w", encoding="utf-8") as f:
        f.write(recipe)
    shutil.rmtree(out, True)
    return run(TVMERGE, "run", "r.yml", out, "-q", "--progress=none",
               "--no-sync", *options, code=code)


def block_of(r):
    """What a refusal tells the user to add, as it stands."""
    return re.findall(r"'(tokenizer: \{source: [^ }]+\})'", r.stderr)


def wanted(token, key, models, base, rules):
    """The mean of the models' rows, by the rule of the README."""
    rule = rules.get(token, {})
    rows = [m.row(token, key) for m in models]
    have = [r for r in rows if r is not None]
    default = (have[0] if len(have) == 1 else
               rows[base] if base is not None and rows[base] is not None
               else np.mean(have, 0) if have else np.zeros(H))
    if "row" in rule:
        default = rule["row"](key)
    rows = [default if r is None or rule.get("force") else r for r in rows]
    return np.mean(rows, 0)


def check_rows(what, out, models, base, rules=None):
    for key in (EMBED, HEAD):
        if out.prefix + key not in out.w:
            continue
        bad = [t for t in out.vocab if not np.allclose(
            out.row(t, key), wanted(t, key, models, base, rules or {}),
            atol=1e-6)]
        check(not bad, f"{what}: {key}: rows of {bad[:5]}")


def linear(names, base, block, dtype="dtype: float32\n"):
    return (f"merge_method: linear\n{dtype}parameters: {{weight: 1}}\n"
            + (f"base_model: {base}\n" if base else "")
            + "models: [" + ", ".join(f"{{model: {n}}}" for n in names) + "]\n"
            + block + "\n")


def sizes():
    """Tokens and rows as in mergekit's test."""
    model("base", 64, tokenizer(64, []), 1)
    model("chatml", 66, tokenizer(64, MARKS), 2)
    # tokens that its embedding has no rows for
    model("padded", 64, tokenizer(64, [f"<UNUSED_{i}>" for i in range(4)]), 3)
    base, chatml, padded = Model("base"), Model("chatml"), Model("padded")
    three = ["base", "padded", "chatml"]
    models = [base, padded, chatml]

    def zero(key):
        return np.zeros(H)

    def of(m, token):
        return lambda key: m.table(key)[token]
    cases = [
        ("base", three, "tokenizer_source: base", 64, 64, {}),
        ("union", three, "tokenizer_source: union", 66, 66, {}),
        ("a model", three, "tokenizer_source: chatml", 66, 66, {}),
        ("default source", three, "tokenizer: {pad_to_multiple_of: 1}", 66, 66,
         {}),
        ("pad", three, "tokenizer: {source: union, pad_to_multiple_of: 16}",
         66, 80, {}),
        ("force", three, "tokenizer: {tokens: {"
         "_tok_10: {source: chatml, force: true}, "
         "_tok_11: {source: base, force: true}, "
         "<|im_start|>: {source: chatml, force: true}}}", 66, 66,
         {"_tok_10": {"row": of(chatml, 10), "force": True},
          "_tok_11": {"row": of(base, 11), "force": True}}),
        ("zero", three, "tokenizer: {tokens: {"
         "_tok_5: {source: {kind: zero}, force: true}, "
         "<|im_end|>: {source: {kind: zero}}}}", 66, 66,
         {"_tok_5": {"row": zero, "force": True}, "<|im_end|>": {"row": zero}}),
        ("model_token", three, "tokenizer: {source: base, tokens: {"
         "_tok_20: {source: {kind: model_token, model: chatml, token_id: 64}, "
         "force: true}, _tok_21: {source: {kind: model_token, model: base, "
         "token: <s>}, force: true}, _tok_22: {source: {kind: model_token, "
         "model: chatml, token: \"<|im_end|>\"}}}}", 64, 64,
         {"_tok_20": {"row": of(chatml, 64), "force": True},
          "_tok_21": {"row": of(base, 1), "force": True}}),
        ("new tokens", three, "tokenizer: {source: base, tokens: {"
         "<new>: {source: {kind: model_token, model: chatml, token: "
         "\"<|im_end|>\"}}, \"<|im_start|>\": {source: chatml}, <null>: "
         "{source: null}}}", 67, 67,
         {"<new>": {"row": of(chatml, 65)}}),
    ]
    for what, names, block, n_tokens, n_rows, rules in cases:
        merge(linear(names, "base", block))
        out = Model("out")
        check(len(out.vocab) == n_tokens, f"{what}: {len(out.vocab)} tokens")
        check(out.config["vocab_size"] == n_rows
              and all(len(out.w[k]) == n_rows for k in (EMBED, HEAD)),
              f"{what}: {len(out.w[EMBED])} rows")
        check_rows(what, out, models, 0, rules)
        for key in (EMBED, HEAD):
            rows = out.w[key]
            check(np.allclose(rows[n_tokens:], rows[:n_tokens].mean(0),
                              atol=1e-6), f"{what}: padding of {key}")
    # a task vector of zeros leaves the donor's row
    merge("merge_method: ties\nbase_model: base\ndtype: float32\nmodels: ["
          "{model: chatml, parameters: {weight: 0.5}}]\n"
          "tokenizer_source: union\n")
    out = Model("out")
    check(all(np.array_equal(out.row(t, k), chatml.row(t, k)) for t in MARKS
              for k in (EMBED, HEAD)), "ties: rows of the donor's own tokens")


def printed():
    """No block: refused with one that does."""
    model("t66", 66, tokenizer(64, MARKS), 4, tied=True)
    model("va", 65, tokenizer(64, ["<image>"]), 5, prefix="language_model.")
    model("vb", 66, tokenizer(64, MARKS), 6, prefix="language_model.")
    two = "models: [{model: base}, {model: %s, parameters: {weight: 0.5}}]\n"
    stack = ("merge_method: passthrough\nslices:\n"
             "- sources: [{model: base, layer_range: [0, 2]}]\n"
             "- sources: [{model: chatml, layer_range: [1, 2]}]\n")
    inner = ("merge_method: linear\nparameters: {weight: 1}\nbase_model: va\n"
             "modules:\n  text_decoder: {models: [{model: va}, {model: %s}]}\n")
    recipes = {
        "linear": linear(["base", "chatml"], None, ""),
        "base": linear(["base", "chatml"], "base", ""),
        "ties": "merge_method: ties\nbase_model: base\n" + two % "chatml",
        "slerp": "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
                 + two % "chatml",
        "tied": linear(["base", "t66"], None, ""),
        "tied first": linear(["t66", "base"], None, ""),
        "stack": stack,
        "stack turned": stack.replace("base", "x").replace("chatml", "base")
        .replace("x", "chatml"),
        "tied stack": stack.replace("chatml", "t66"),
        "other config": "base_model: base\nmerge_method: passthrough\nslices:\n"
                        "- sources: [{model: chatml, layer_range: [0, 2]}]\n",
        "two modules": linear(["va", "vb"], None, ""),
        "a module": inner % "chatml",
    }
    for what, recipe in recipes.items():
        r = merge(recipe, code=4)
        blocks = block_of(r)
        # Who has no base is not told of one.
        keep = ("base" if "base_model" in recipe else
                re.search("model: ([^,}]+)", recipe)[1])
        check(set(blocks) == {"tokenizer: {source: union}",
                              f"tokenizer: {{source: {keep}}}"},
              f"{what}: no block in {r.stderr[-300:]}")
        check(f"keep only the tokens of '{keep}'" in r.stderr or
              "base_model: va" in recipe, f"{what}: {r.stderr[-300:]}")
        for block in sorted(set(blocks)):
            merge(recipe + block + "\n")
            if not check(os.path.exists("out/config.json"),
                         f"{what}: {block} does not do"):
                continue
            prefix = "language_model." if "module" in what else ""
            out = Model("out", prefix)
            n = out.text["vocab_size"]
            check(max(out.vocab.values()) < n and all(
                len(out.table(k)) == n for k in (EMBED, HEAD)),
                f"{what}: {block}: sizes")
            bare = all(len(out.row(t, k)) and np.any(out.row(t, k))
                       for t in out.vocab for k in (EMBED, HEAD))
            check(bare, f"{what}: {block}: a token without a row")
    # a stack: embedding of the first, head of the last, the rest by token
    merge(stack + "tokenizer: {source: union}\n")
    out, base, chatml = Model("out"), Model("base"), Model("chatml")
    for key, m, other in ((EMBED, base, chatml), (HEAD, chatml, base)):
        for t in out.vocab:
            row = m.row(t, key)
            check(np.array_equal(out.row(t, key),
                                 other.row(t, key) if row is None else row),
                  f"stack: {key} of {t}")
    # cut off, as mergekit does
    for what in ("linear", "tied", "stack", "two modules", "a module"):
        merge(recipes[what], "--unsafe-truncate-embeddings")
        out = Model("out", "language_model." if "module" in what else "")
        n = out.text["vocab_size"]
        check(n == (65 if "module" in what else 64) and all(
            len(out.table(k)) == n for k in (EMBED, HEAD)),
            f"{what}: truncated to {n}")


def qwen():
    """More rows than tokens: never fewer without being asked."""
    tok = tokenizer(61, ["<|endoftext|>"] + MARKS)
    for i, rows in enumerate((152, 152, 128)):
        model(f"q{i}", rows, tok, 10 + i)
    q = [Model(f"q{i}") for i in range(3)]
    merge(linear(["q0", "q1"], "q0", ""))
    plain = Model("out")
    for source in ("union", "base", "q1"):
        merge(linear(["q0", "q1"], "q0", f"tokenizer_source: {source}"))
        out = Model("out")
        check(all(np.array_equal(out.w[k], plain.w[k]) for k in plain.w)
              and out.config == plain.config, f"qwen {source}: as without")
        with open("q0/tokenizer.json", "rb") as f, \
                open("out/tokenizer.json", "rb") as g:
            check(f.read() == g.read(), f"qwen {source}: same tokenizer.json")
    for source, names, rows in (("union", ("q0", "q2"), 152),
                                ("union", ("q2", "q0"), 152),
                                ("base", ("q2", "q0"), 128),
                                ("q0", ("q2", "q0"), 152)):
        merge(linear(names, names[0], f"tokenizer_source: {source}"))
        out = Model("out")
        check(len(out.w[EMBED]) == rows == out.config["vocab_size"],
              f"qwen {names} {source}: {len(out.w[EMBED])} rows")
        check_rows(f"qwen {names} {source}", out,
                   [q[int(n[1])] for n in names], 0)
    r = merge(linear(["q0", "q1"], "q0",
                     "tokenizer: {source: union, pad_to_multiple_of: 64}"))
    r = run(TVMERGE, "plan", "r.yml", "out2", code=0)
    check("64 rows instead of 152" in r.stderr + r.stdout,
          "qwen: fewer rows are told")
    check(len(Model("out").w[EMBED]) == 64, "qwen: 64 rows as asked")


def around():
    """Ids of what a tokenizer writes around a text, of padding and of unknown
    words follow their tokens, or go with them."""
    tok = tokenizer(64, ["<x>", "<bos>", "<pad>"])
    tok["padding"] = {"strategy": "BatchLongest", "pad_id": 66, "pad_type_id": 0,
                      "pad_token": "<pad>"}
    tok["model"]["unk_token"] = "<pad>"
    special = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [special, text],
                "pair": [special, text], "special_tokens": {
                    "<bos>": {"id": "<bos>", "ids": [65],
                              "tokens": ["<bos>"]}}}
    tok["post_processor"] = {"type": "Sequence", "processors": [
        {"type": "ByteLevel"}, template]}
    roberta = json.loads(json.dumps(tok))
    roberta["post_processor"] = {"type": "RobertaProcessing", "cls":
                                 ["<s>", 1], "sep": ["<bos>", 65]}
    for name, t, seed in (("p64", tok, 30), ("r64", roberta, 31)):
        model(name, 64, t, seed)
    model("p65", 65, tokenizer(64, ["<bos>"]), 32)
    merge(linear(["p64"], "p64", "tokenizer_source: base"))
    out = read("out/tokenizer.json")
    check(out["post_processor"]["processors"][1] == {
        **template, "single": [text], "pair": [text], "special_tokens": {}},
        f"a template without its token: {out['post_processor']}")
    check(out["padding"] is None and out["model"]["unk_token"] is None,
          "padding and unknown words without their token")
    merge(linear(["p64", "p65"], "p64", "tokenizer_source: union"))
    out = read("out/tokenizer.json")
    check(Model("out").vocab["<bos>"] == 64 and
          out["post_processor"]["processors"][1]["single"] == [special, text]
          and out["post_processor"]["processors"][1]["special_tokens"]
          ["<bos>"]["ids"] == [64], f"a template: {out['post_processor']}")
    merge(linear(["r64", "p65"], "r64", "tokenizer_source: union"))
    check(read("out/tokenizer.json")["post_processor"]["sep"]
          == ["<bos>", 64], "a pair of token and id")
    merge(linear(["r64"], "r64", "tokenizer_source: base"))
    check(read("out/tokenizer.json")["post_processor"] is None,
          "a pair without its token")


def words(text):
    r = run(TVEVAL, "tokenize", text[0], "--json", stdin=text[1], code=0)
    doc = json.loads(r.stdout)
    return doc.get("ids", doc.get("tokens"))


def text():
    """Text without the new tokens is split as before; the marks are one."""
    data = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..",
                        "data", "tokenizers")
    for name in ("a", "b"):
        tok = read(os.path.join(data, f"union-{name}.json"))
        model(f"w{name}", 350, tok, 20)
    merge(linear(["wa", "wb"], "wa", "tokenizer_source: base"))
    for s in ("Hello world, the cat sat.", "größe 你好 🙂", "  a\n\tb "):
        check(words(("out", s)) == words(("wa", s)), f"base: ids of {s!r}")
    merge(linear(["wa", "wb"], "wa", "tokenizer_source: union"))
    out, a = Model("out"), Model("wa")
    check(all(out.vocab[t] == i for t, i in a.vocab.items()),
          "union: the base's ids")
    check(words(("out", "<|im_end|>")) == [out.vocab["<|im_end|>"]],
          "union: a mark is one token")


def main():
    os.chdir(temp())
    sizes()
    printed()
    qwen()
    around()
    if os.path.exists(TVEVAL):
        text()
    finish("vocabulary")


main()
