#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_vocabulary.py TVMERGE TVEVAL [DATA_DIR]

Makes small models with different vocabularies and heads, merges them with
tokenizer blocks, and checks the results: against mergekit where its rules are
kept, row by row by token, and by loading model and tokenizer with transformers
(encode, decode, a forward pass); tveval must read the same tokenizers. Prints
one line per check. With DATA_DIR two tokenizers, their union and what the Rust
library makes of texts with it are written there (tests/data/tokenizers/union*).
For developers: needs torch, transformers, tokenizers and
mergekit from PyPI in a throw-away environment; nothing at run time or in the
test suite does.
"""
import json
import os
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig,
                          LlamaForCausalLM, LlamaTokenizerFast,
                          PreTrainedTokenizerFast)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = ["Hello world, this is a test.", "  two  spaces\nand\ttabs 12345 ",
         "größe naïve 你好 🙂", "<|im_start|>user\nhi<|im_end|>\n",
         "for (i = 0; i < n; i++) sum += x[i];", "the cat sat on the mat"]
failed = 0


def check(name, ok, detail=""):
    global failed
    failed += not ok
    print(f"{'ok ' if ok else 'BAD'} {name} {'' if ok else detail}")


def quiet(f, *args):
    """mergekit logs much."""
    with open(os.devnull, "w") as null:
        saved = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            return f(*args)
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def model(path, vocab, seed, tied=False, dtype=torch.float32, **more):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_hidden_layers=2,
        tie_word_embeddings=tied, **more)
    m = LlamaForCausalLM(config).to(dtype)
    m.save_pretrained(path)
    return path


def list_tokenizer(n, added):
    names = ["<unk>", "<s>", "</s>"] + [f"_tok_{i}" for i in range(3, n)]
    data = {"version": "1.0",
            "model": {"type": "BPE", "vocab": {s: i for i, s in
                                               enumerate(names)},
                      "merges": []}, "added_tokens": []}
    with tempfile.TemporaryDirectory() as p:
        path = os.path.join(p, "tokenizer.json")
        with open(path, "w") as f:
            json.dump(data, f)
        t = LlamaTokenizerFast(tokenizer_file=path)
    t.add_tokens(added)
    return t


def trained(size, corpus, special, byte_level=True):
    t = tokenizers.Tokenizer(models.BPE(byte_fallback=not byte_level))
    if byte_level:
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace()
        t.decoder = decoders.Sequence([decoders.ByteFallback(),
                                       decoders.Metaspace()])
        alphabet = []
        special = special + [f"<0x{i:02X}>" for i in range(256)]
    t.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=size, special_tokens=[], initial_alphabet=alphabet,
        show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token=special[0], eos_token=special[1],
        additional_special_tokens=special[2:])


class Merged:
    def __init__(self, path):
        self.path = path
        self.w = load_file(os.path.join(path, "model.safetensors"))
        with open(os.path.join(path, "config.json")) as f:
            self.config = json.load(f)
        self.tok = AutoTokenizer.from_pretrained(path)
        self.vocab = self.tok.get_vocab()

    def row(self, token, name=EMBED):
        return self.w[name][self.vocab[token]]


class Bench:
    def __init__(self, root, tvmerge, tveval):
        self.root, self.tvmerge, self.tveval = root, tvmerge, tveval
        self.data = None
        self.n = 0

    def run(self, recipe, *options):
        self.n += 1
        path = os.path.join(self.root, f"r{self.n}.yml")
        out = os.path.join(self.root, f"o{self.n}")
        with open(path, "w") as f:
            yaml.safe_dump(recipe, f, sort_keys=False)
        r = subprocess.run([self.tvmerge, "run", path, out, "-q",
                            "--progress=none", *options], cwd=self.root,
                           capture_output=True, text=True)
        return r, out

    def merge(self, name, recipe, *options):
        r, out = self.run(recipe, *options)
        check(f"{name}: exit 0", r.returncode == 0, r.stderr)
        return Merged(out) if r.returncode == 0 else None

    def mergekit(self, recipe):
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
        out = os.path.join(self.root, f"k{self.n}")
        cwd = os.getcwd()
        os.chdir(self.root)
        try:
            quiet(run_merge, MergeConfiguration.model_validate(recipe), out,
                  MergeOptions(write_model_card=False))
        except KeyError as e:  # a token beyond some model's rows
            print(f"    mergekit fails: KeyError {e}")
            return None
        finally:
            os.chdir(cwd)
        return Merged(out)

    def same(self, name, ours, theirs):
        """By token, since ids of unions are in an order of their own there."""
        if theirs is None:
            return
        check(f"{name}: tokens as mergekit",
              set(ours.vocab) == set(theirs.vocab),
              set(ours.vocab) ^ set(theirs.vocab))
        check(f"{name}: vocab_size as mergekit", ours.config["vocab_size"]
              == theirs.config["vocab_size"])
        worst = 0.0
        for key in sorted(theirs.w):
            a, b = ours.w[key].float(), theirs.w[key].float()
            if key in (EMBED, HEAD):
                order = sorted(set(ours.vocab) & set(theirs.vocab))
                n = max(ours.vocab.values()) + 1
                a = torch.cat([a[[ours.vocab[t] for t in order]], a[n:]])
                b = torch.cat([b[[theirs.vocab[t] for t in order]], b[n:]])
            if a.shape != b.shape:
                check(f"{name}: shape of {key}", False, (a.shape, b.shape))
                continue
            worst = max(worst, (a - b).abs().max().item())
        check(f"{name}: rows as mergekit (max difference {worst:.1e})",
              worst < 2e-6)

    def loads(self, name, m):
        lm, info = AutoModelForCausalLM.from_pretrained(
            m.path, output_loading_info=True)
        bad = {k: v for k, v in info.items() if v and k != "error_msgs"}
        n = len(lm.get_input_embeddings().weight)
        check(f"{name}: loads, {n} rows", not bad
              and n == m.config["vocab_size"] and max(m.vocab.values()) < n,
              bad)
        ids = torch.tensor([[1, 2, 3, n - 1]])
        check(f"{name}: finite logits",
              bool(torch.isfinite(lm(ids).logits).all()))
        return lm

    def reads(self, name, m):
        """transformers and tveval give the same ids, and text comes back."""
        bad = []
        for text in TEXTS:
            ids = m.tok(text, add_special_tokens=False)["input_ids"]
            r = subprocess.run([self.tveval, "tokenize", m.path, "--json"],
                               input=text, capture_output=True, text=True)
            doc = json.loads(r.stdout) if r.returncode == 0 else {}
            ours = doc.get("ids", doc.get("tokens"))
            if ours != ids:
                bad.append((text, ids, ours, r.stderr))
            if m.tok.decode(ids, clean_up_tokenization_spaces=False) != text:
                bad.append((text, m.tok.decode(ids)))
        check(f"{name}: tveval reads it alike, text comes back", not bad, bad)


def linear(names, base=None, weight=1.0, **more):
    return {"merge_method": "linear", "dtype": "float32",
            **({"base_model": base} if base else {}),
            "models": [{"model": m, "parameters": {"weight": weight}}
                       for m in names], **more}


def mergekit_cases(b):
    p = b.root
    list_tokenizer(64, []).save_pretrained(model(f"{p}/base", 64, 1))
    list_tokenizer(64, ["<|im_start|>", "<|im_end|>"]).save_pretrained(
        model(f"{p}/chatml", 66, 2))
    list_tokenizer(64, [f"<UNUSED_{i}>" for i in range(4)]).save_pretrained(
        model(f"{p}/padded", 64, 3))
    base, chatml = Merged(f"{p}/base"), Merged(f"{p}/chatml")
    three = ["base", "padded", "chatml"]
    r, _ = b.run(linear(three, "base"))
    check("no block: refused with the block to add", r.returncode == 4
          and "tokenizer: {source: union}" in r.stderr, r.stderr)
    m = b.merge("truncated", linear(three, "base"),
                "--unsafe-truncate-embeddings")
    if m:
        check("truncated: 64 rows", m.w[EMBED].shape[0] == 64
              and m.config["vocab_size"] == 64)
        b.loads("truncated", m)
    cases = {
        "base": (linear(three, "base", tokenizer_source="base"), 64, 64),
        "union": (linear(three, "base", tokenizer_source="union"), 66, 66),
        "model": (linear(three, "base", tokenizer_source="chatml"), 66, 66),
        "slerp union": ({
            "merge_method": "slerp", "base_model": "base", "dtype": "float32",
            "models": [{"model": "base"}, {"model": "chatml"}],
            "parameters": {"t": 0.5}, "tokenizer_source": "union"}, 66, 66),
        "ties union": ({
            "merge_method": "ties", "base_model": "base", "dtype": "float32",
            "models": [{"model": "base"},
                       {"model": "padded", "parameters": {"weight": 0.5}},
                       {"model": "chatml", "parameters": {"weight": 0.5}}],
            "tokenizer_source": "union"}, 66, 66),
        "force": (linear(["base", "chatml"], "base", tokenizer={
            "source": "union", "tokens": {
                "_tok_10": {"source": "chatml", "force": True},
                "_tok_11": {"source": "base", "force": True}}}), 66, 66),
        "model_token": (linear(["base", "chatml"], "base", tokenizer={
            "source": "base", "tokens": {
                "_tok_20": {"source": {"kind": "model_token",
                                       "model": "chatml", "token_id": 64},
                            "force": True},
                "_tok_21": {"source": {"kind": "model_token",
                                       "model": "base", "token": "<s>"},
                            "force": True}}}), 64, 64),
        "zero": (linear(["base", "chatml"], "base", tokenizer={
            "source": "union", "tokens": {
                "_tok_5": {"source": {"kind": "zero"}, "force": True},
                "<|im_end|>": {"source": {"kind": "zero"}}}}), 66, 66),
        "new token": (linear(["base", "chatml"], "base", tokenizer={
            "source": "base", "tokens": {
                "<new>": {"source": {"kind": "model_token", "model": "chatml",
                                     "token": "<|im_end|>"}}}}), 65, 65),
        "pad": (linear(["chatml"], "chatml", tokenizer={
            "source": "base", "pad_to_multiple_of": 16}), 66, 80),
    }
    got = {}
    for name, (recipe, n_tokens, n_rows) in cases.items():
        m = got[name] = b.merge(name, recipe)
        if m is None:
            continue
        check(f"{name}: {n_tokens} tokens, {n_rows} rows",
              len(m.vocab) == n_tokens and m.w[EMBED].shape[0] == n_rows
              and m.w[HEAD].shape[0] == n_rows
              and m.config["vocab_size"] == n_rows)
        b.loads(name, m)
        b.same(name, m, b.mergekit(recipe))
    eq = torch.equal
    u = got["union"]
    for key in (EMBED, HEAD):
        check(f"union: rows of chatml's tokens in {key}", all(
            torch.allclose(u.row(t, key), chatml.row(t, key), atol=1e-6)
            for t in ("<|im_start|>", "<|im_end|>")))
    f = got["force"]
    check("force: rows of the named models",
          eq(f.row("_tok_10"), chatml.row("_tok_10"))
          and eq(f.row("_tok_11"), base.row("_tok_11")))
    f = got["model_token"]
    check("model_token: rows of other tokens",
          eq(f.row("_tok_20"), chatml.w[EMBED][64])
          and eq(f.row("_tok_21"), base.row("<s>")))
    f = got["pad"]
    check("pad: mean of the real rows", torch.allclose(
        f.w[EMBED][66:], f.w[EMBED][:66].mean(0).expand(14, -1), atol=1e-6))
    for src, code in ((["nowhere"], 4), ("tokens", 2)):
        r, _ = b.run(linear(["base"], tokenizer_source=src[0])
                     if code == 4 else
                     linear(["base"], tokenizer={"tokens": [1]}))
        check(f"wrong block: exit {code}", r.returncode == code, r.stderr)


def corpora():
    english = ["the cat sat on the mat and the dog sat on the log"] * 50 + [
        "this is a test of the hello world program, hello there"] * 50
    code = ["for (int i = 0; i < n; i++) { sum += x[i]; }"] * 50 + [
        "if (x == NULL) return -1; while (true) printf(x);"] * 50
    return english, code


def keep(b, m):
    for src, name in ((f"{b.root}/ba", "union-a"), (f"{b.root}/bc", "union-b"),
                      (m.path, "union")):
        with open(f"{src}/tokenizer.json", "rb") as f, \
                open(f"{b.data}/{name}.json", "wb") as g:
            g.write(f.read())
    t = tokenizers.Tokenizer.from_file(f"{m.path}/tokenizer.json")
    texts = TEXTS + corpora()[0][:1] + corpora()[1][:1] + [
        "", " ", "\n\n", "if (hello) return sum; else while (the cat)",
        "<s>hi</s>", "<|im_end|><|im_end|>", "NULL test"]
    with open(f"{b.data}/union.cases.json", "w") as f:
        json.dump([{"text": s, "plain":
                    t.encode(s, add_special_tokens=False).ids,
                    "special": t.encode(s).ids} for s in texts], f,
                  ensure_ascii=False, separators=(",", ":"))
        f.write("\n")


def real_cases(b):
    p = b.root
    english, code = corpora()
    a = trained(300, english, ["<s>", "</s>"])
    a.save_pretrained(model(f"{p}/ba", len(a), 4))
    c = trained(320, code, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    c.save_pretrained(model(f"{p}/bc", len(c) + 12, 5))
    s = trained(400, english, ["<s>", "</s>"], byte_level=False)
    s.save_pretrained(model(f"{p}/sp", len(s), 6))
    ma, mc = Merged(f"{p}/ba"), Merged(f"{p}/bc")
    for method in ("linear", "task_arithmetic"):
        recipe = {**linear(["ba", "bc"], "ba", 0.5, tokenizer_source="union"),
                  "merge_method": method}
        m = b.merge(f"byte-level {method}", recipe)
        if m is None:
            continue
        check(f"byte-level {method}: union of the tokens, ids of the base kept",
              set(m.vocab) == set(ma.vocab) | set(mc.vocab)
              and all(m.vocab[t] == i for t, i in ma.vocab.items()))
        check(f"byte-level {method}: no fewer rows than any input",
              m.w[EMBED].shape[0] >= max(len(m.vocab), mc.w[EMBED].shape[0]))
        only = [t for t in mc.vocab if t not in ma.vocab]
        check(f"byte-level {method}: {len(only)} rows of the donor's tokens",
              all(torch.allclose(m.row(t), mc.row(t), atol=1e-6)
                  for t in only))
        if method == "linear":
            both = [t for t in mc.vocab if t in ma.vocab]
            check(f"byte-level: {len(both)} shared rows are means", all(
                torch.allclose(m.row(t), (ma.row(t) + mc.row(t)) / 2,
                               atol=1e-6) for t in both))
        b.loads(f"byte-level {method}", m)
        b.reads(f"byte-level {method}", m)
        if method == "linear" and b.data:
            keep(b, m)
        ids = m.tok(TEXTS[4], add_special_tokens=False)["input_ids"]
        check("byte-level: merges of both are used", len(ids) < len(
            ma.tok(TEXTS[4], add_special_tokens=False)["input_ids"]))
    r, _ = b.run(linear(["ba", "sp"], "ba", tokenizer_source="union"))
    check("kinds differ: refused", r.returncode == 4
          and "different kinds" in r.stderr, r.stderr)
    m = b.merge("same tokenizer", linear(["ba", "ba/"], "ba",
                                         tokenizer_source="union"))
    if m:
        with open(f"{p}/ba/tokenizer.json", "rb") as f, \
                open(f"{m.path}/tokenizer.json", "rb") as g:
            check("same tokenizer: same bytes", f.read() == g.read())
    m = b.merge("chat", linear(["ba", "bc"], "ba", tokenizer_source="union",
                               chat_template="chatml"))
    if m:
        text = m.tok.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False,
            add_generation_prompt=True)
        check("chat: template of chatml", text == "<|im_start|>user\nhi"
              "<|im_end|>\n<|im_start|>assistant\n", repr(text))
    for name in ("alpaca", "exaone", "llama3", "mistral"):
        m = b.merge(f"chat {name}", linear(["ba"], chat_template=name))
        if m:
            text = m.tok.apply_chat_template(
                [{"role": "user", "content": "hi"},
                 {"role": "assistant", "content": "yes"}], tokenize=False)
            check(f"chat {name}: renders", "hi" in text and "yes" in text,
                  repr(text))


def write(path, doc):
    with open(path, "w") as f:
        json.dump(doc, f, ensure_ascii=False, indent=2)


def gemma_tokenizer(words, added):
    """Metaspace by Replace, byte fallback, merges of single characters."""
    vocab = {s: i for i, s in enumerate(
        ["<pad>", "<eos>", "<bos>", "<unk>"]
        + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581"]
        + [chr(c) for c in range(33, 127)])}
    merges = []
    for w in words:
        for i in range(2, len(w) + 1):
            if w[:i] not in vocab:
                vocab[w[:i]] = len(vocab)
                merges.append([w[:i - 1], w[i - 1]])
    flags = {"single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
    n = len(vocab)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": s, **flags} for i, s in
                         enumerate(["<pad>", "<eos>", "<bos>", "<unk>"])]
        + [{"id": n + i, "content": s, **flags}
           for i, s in enumerate(added)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "},
                       "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "},
                          "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"},
             "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": merges}}


def put(path, seed, rows, tokenizer, config, **files):
    model(path, rows, seed)
    write(f"{path}/tokenizer.json", tokenizer)
    write(f"{path}/tokenizer_config.json",
          {"tokenizer_class": "PreTrainedTokenizerFast",
           "model_max_length": int(1e30), **config})
    for name, text in files.items():
        with open(f"{path}/{name}", "w") as f:
            f.write(text)


def trouble_cases(b):
    """What users of merging tools report most."""
    p = b.root
    # Gemma: byte fallback, ordinary tokens that only one has, chat marks
    words = ["\u2581the", "\u2581cat", "hello", "\u2581world"]
    other = ["\u2581the", "\u2581sum", "\u2581loop", "test"]
    base, donor = gemma_tokenizer(words, []), gemma_tokenizer(
        other, ["<start_of_turn>", "<end_of_turn>"])
    n_base = len(base["model"]["vocab"])
    n_donor = len(donor["model"]["vocab"]) + 2
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    put(f"{p}/g1", 20, n_base + 9, base, special)
    put(f"{p}/g2", 21, n_donor, donor, special)
    m = b.merge("gemma", linear(["g1", "g2"], "g1", 0.5,
                                tokenizer_source="union"))
    if m:
        b.loads("gemma", m)
        b.reads("gemma", m)
        g2 = Merged(f"{p}/g2")
        got = m.tok.tokenize("test sum the")
        check("gemma: words of both", got == ["test", "\u2581sum",
                                              "\u2581the"], got)
        check("gemma: their rows", all(
            torch.equal(m.row(t), g2.row(t))
            for t in ("\u2581sum", "<end_of_turn>", "test")))
        check("gemma: padding not cut", m.w[EMBED].shape[0] >= n_base + 9)
    # Qwen: more rows than tokens, in all models
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    qwen = gemma_tokenizer(words, marks)
    n = len(qwen["model"]["vocab"]) + 3
    for i, name in enumerate(("q1", "q2")):
        put(f"{p}/{name}", 30 + i, n + 100, qwen,
            {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    plain = b.merge("qwen no block", linear(["q1", "q2"], "q1"))
    for source in ("union", "base", "q2"):
        m = b.merge(f"qwen {source}", linear(["q1", "q2"], "q1",
                                             tokenizer_source=source))
        if m and plain:
            check(f"qwen {source}: the same as without a block", all(
                torch.equal(m.w[k], plain.w[k]) for k in plain.w)
                and m.config["vocab_size"] == n + 100)
    m = b.merge("qwen padded", linear(["q1", "q2"], "q1", tokenizer={
        "source": "union", "pad_to_multiple_of": 64}))
    if m:
        check("qwen padded: as asked for", m.config["vocab_size"]
              == (n + 63) // 64 * 64)
        b.loads("qwen padded", m)
    # Mistral: 32000 against 32002 with ChatML, files of older versions; the
    # base's tokenizer has a pad token beyond its embedding
    mistral = gemma_tokenizer(words, ["[PAD]"])
    chat = gemma_tokenizer(words, ["<|im_end|>", "<|im_start|>"])
    n = len(mistral["model"]["vocab"])

    def decoder(t):
        return {str(x["id"]): {k: v for k, v in x.items() if k != "id"}
                for x in t["added_tokens"]}
    put(f"{p}/m1", 40, n, mistral, {
        **special, "pad_token": "[PAD]", "added_tokens_decoder":
        decoder(mistral)}, **{
            "special_tokens_map.json": json.dumps({
                "bos_token": {"content": "<bos>"}, "pad_token": "[PAD]"}),
            "added_tokens.json": json.dumps({"[PAD]": n}),
            "tokenizer.model": "not read"})
    put(f"{p}/m2", 41, n + 2, chat, {
        "bos_token": "<bos>", "eos_token": "<|im_end|>",
        "added_tokens_decoder": decoder(chat),
        "chat_template": "{{ 'x' }}"})
    with open(f"{p}/m2/config.json") as f:
        config = json.load(f)
    write(f"{p}/m2/config.json", {**config, "eos_token_id": n})
    for source, eos in (("union", "<eos>"), ("m2", "<|im_end|>")):
        m = b.merge(f"mistral {source}", {**linear(
            ["m1", "m2"], "m1", 0.5, tokenizer_source=source),
            "merge_method": "task_arithmetic"})
        if not m:
            continue
        check(f"mistral {source}: sizes", m.config["vocab_size"] == n + 2
              and len(m.tok) == n + 2 and "[PAD]" not in m.vocab,
              (m.config["vocab_size"], len(m.tok)))
        check(f"mistral {source}: eos", m.tok.eos_token == eos
              and m.tok.pad_token is None, (m.tok.eos_token,
                                            m.tok.pad_token))
        m2 = Merged(f"{p}/m2")
        check(f"mistral {source}: rows of the marks", all(torch.allclose(
            m.row(t), m2.row(t), atol=1e-6)
            for t in ("<|im_start|>", "<|im_end|>")))
        b.loads(f"mistral {source}", m)
        b.reads(f"mistral {source}", m)
    check("mistral m2: config's eos is the tokenizer's",
          m.config["eos_token_id"] == m.vocab["<|im_end|>"])
    # one file with the ids turned round, sizes equal
    put(f"{p}/m3", 42, n + 2, gemma_tokenizer(
        words, ["<|im_start|>", "<|im_end|>"]), special)
    r, _ = b.run(linear(["m2", "m3"], "m2"))
    check("equal sizes, other ids: warning", r.returncode == 0
          and "merged by number" in r.stderr, r.stderr)
    m = b.merge("turned", linear(["m2", "m3"], "m2",
                                 tokenizer_source="union"))
    m3 = Merged(f"{p}/m3")
    check("turned: by token", torch.allclose(
        m.row("<|im_start|>"), (m2.row("<|im_start|>")
                                + m3.row("<|im_start|>")) / 2, atol=1e-6))


def tied_cases(b):
    p = b.root
    tok = list_tokenizer(64, [])
    for name, tied, seed in (("t1", True, 7), ("t2", True, 8),
                             ("u1", False, 9), ("u2", False, 10)):
        tok.save_pretrained(model(f"{p}/{name}", 64, seed, tied))
    heads = {n: load_file(f"{p}/{n}/model.safetensors") for n in
             ("t1", "t2", "u1", "u2")}
    for x, y in (("t1", "t2"), ("t1", "u1"), ("u1", "t1"), ("u1", "u2")):
        for block in ({}, {"tokenizer_source": "union"}):
            name = f"tied {x}+{y} {'union' if block else ''}"
            m = b.merge(name, linear([x, y], x, **block))
            if m is None:
                continue
            tied = x[0] == "t" and y[0] == "t"
            check(f"{name}: config says {tied}",
                  m.config["tie_word_embeddings"] == tied
                  and (HEAD in m.w) == (not tied))
            lm = b.loads(name, m)
            want = sum(heads[n].get(HEAD, heads[n][EMBED]) for n in (x, y)) / 2
            got = lm.get_output_embeddings().weight
            check(f"{name}: the head is the mean of the heads",
                  torch.allclose(got, want, atol=1e-6))


    def stack(x, y):
        return {"merge_method": "passthrough", "dtype": "float32", "slices": [
            {"sources": [{"model": x, "layer_range": [0, 1]}]},
            {"sources": [{"model": y, "layer_range": [1, 2]}]}]}
    for x, y in (("t1", "t1"), ("t1", "t2"), ("t1", "u1"), ("u1", "t1")):
        name = f"stack {x}/{y}"
        m = b.merge(name, stack(x, y))
        if m is None:
            continue
        lm = b.loads(name, m)
        check(f"{name}: head of {y}, embedding of {x}", torch.equal(
            lm.get_output_embeddings().weight,
            heads[y].get(HEAD, heads[y][EMBED])) and torch.equal(
                lm.get_input_embeddings().weight, heads[x][EMBED]))


def adapter_cases(b):
    """Rows are taken from adapted models: same as from merged copies."""
    import peft
    p = b.root
    lm = AutoModelForCausalLM.from_pretrained(f"{p}/chatml")
    torch.manual_seed(11)
    lora = peft.get_peft_model(lm, peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False,
        target_modules=["embed_tokens", "lm_head", "q_proj"]))
    lora.save_pretrained(f"{p}/lora", save_embedding_layers=False)
    merged = lora.merge_and_unload()
    merged.save_pretrained(f"{p}/chatml-lora")
    Merged(f"{p}/chatml").tok.save_pretrained(f"{p}/chatml-lora")
    block = {"source": "union", "pad_to_multiple_of": 16}
    one = b.merge("adapter", linear(["base", "chatml+lora"], "base",
                                    tokenizer=block))
    two = b.merge("adapter merged", linear(["base", "chatml-lora"], "base",
                                           tokenizer=block))
    if one and two:
        worst = max((one.w[k] - two.w[k]).abs().max().item() for k in two.w)
        moved = (two.w[EMBED][:66]
                 - Merged(f"{p}/base").w[EMBED].mean()).abs().max().item()
        check(f"adapter: rows of the adapted model (max difference "
              f"{worst:.1e})", worst < 1e-6 < moved)


def main():
    tvmerge, tveval = map(os.path.abspath, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as root:
        b = Bench(root, tvmerge, tveval)
        b.data = sys.argv[3] if len(sys.argv) > 3 else None
        mergekit_cases(b)
        real_cases(b)
        trouble_cases(b)
        tied_cases(b)
        adapter_cases(b)
    print(f"{failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
