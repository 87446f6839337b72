#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes small tokenizers of every supported kind and what `tokenizers` gives.

    pip install tokenizers
    make_tokenizers.py OUT TRAINING_TEXT...

OUT/NAME.json is a tokenizer, OUT/NAME.cases.json a list of {"text", "plain",
"special"}: ids without and with what the post-processor adds. Texts are mixed
UTF-8: many scripts, combining marks, runs of spaces, added tokens.
check_tokenizers.py compares larger texts.
"""
import json
import random
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as P
from tokenizers import processors, trainers

RANGES = [(0x20, 0x7e)] * 6 + [
    (9, 13), (0xa0, 0x17f), (0x370, 0x3ff), (0x400, 0x4ff), (0x5d0, 0x5ea),
    (0x620, 0x64a), (0x900, 0x97f), (0xe00, 0xe5b), (0x1100, 0x11ff),
    (0x2000, 0x206f), (0x2460, 0x24ff), (0x3040, 0x30ff), (0x4e00, 0x9fff),
    (0xac00, 0xd7a3), (0x1f300, 0x1f64f), (0x1d400, 0x1d7ff), (0x300, 0x36f),
    (0xff00, 0xffef), (0xfb00, 0xfb06), (0x1e00, 0x1eff), (0x10000, 0x100ff)]
BITS = ["'s", "'LL", "n't", " don't", "1234567", "  \n  \n", "\r\n", "\t\t x",
        "▁", "▁▁a", "<|x|>", "<s>", "</s>", " <mask> ", "<MASK>", "foo<nw>bar",
        "<nw> ", "word", "Word ", "<|endoftext|>", "keyword", "<|x|>foo"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"


def mixed(rng, n):
    out = []
    used = length = 0
    while length < n:
        a, b = rng.choice(RANGES)
        for _ in range(rng.randint(1, 9)):
            c = chr(rng.randint(a, b))
            # unassigned characters differ between versions of Unicode
            if unicodedata.category(c) not in ("Cn", "Cs", "Co"):
                out.append(c)
        r = rng.random()
        if r < .3:
            out.append(" " * rng.randint(1, 5))
        elif r < .36:
            out.append("\n" * rng.randint(1, 3))
        elif r < .45:
            out.append(rng.choice(BITS))
        length += sum(map(len, out[used:]))
        used = len(out)
    return "".join(out)


def byte_level(**k):
    return P.ByteLevel(add_prefix_space=False, **k)


def split(pattern, behavior="isolated"):
    return P.Split(Regex(pattern), behavior)


SPECS = {
    "gpt2": dict(pre=byte_level()),
    "gpt2-prefix": dict(pre=P.ByteLevel(add_prefix_space=True)),
    "llama3": dict(pre=P.Sequence([split(LLAMA3), byte_level(use_regex=False)]),
                   ignore_merges=True),
    "qwen2": dict(norm=normalizers.NFC(),
                  pre=P.Sequence([split(QWEN2), byte_level(use_regex=False)])),
    "bloom": dict(pre=P.Sequence([split(BLOOM), byte_level(use_regex=False)])),
    "starcoder": dict(pre=P.Sequence([P.Digits(individual_digits=True), byte_level()])),
    "falcon": dict(pre=P.Sequence([P.Punctuation("contiguous"), byte_level(),
                                   P.Digits(), split("[0-9][0-9][0-9]")])),
    "llama2": dict(norm=normalizers.Sequence([normalizers.Prepend("▁"),
                                              normalizers.Replace(" ", "▁")]),
                   sp=True, fallback=True),
    "mistral": dict(pre=P.Metaspace(prepend_scheme="first", split=False), sp=True,
                    fallback=True),
    "metaspace": dict(pre=P.Metaspace(prepend_scheme="always", split=True), sp=True),
    "gemma": dict(norm=normalizers.Replace(" ", "▁"),
                  pre=P.Split(" ", "merged_with_previous"), sp=True, fallback=True),
    "suffix": dict(norm=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(),
                                              normalizers.Strip()]),
                   pre=P.WhitespaceSplit(), sp=True, suffix="</w>"),
    "prefix": dict(norm=normalizers.Sequence([normalizers.NFD(), normalizers.Replace(
        Regex("[\\u0300-\\u036f]"), ""), normalizers.Lowercase()]),
        pre=P.Sequence([P.Whitespace(), P.Punctuation("merged_with_next")]), sp=True,
        prefix="##"),
    "removed": dict(norm=normalizers.NFKD(),
                    pre=P.Sequence([P.Punctuation("merged_with_previous"),
                                    P.Split("e", "contiguous"),
                                    split("[aeiou]+", "removed")]), sp=True),
}


def make(name, train):
    s = SPECS[name]
    sp = s.get("sp", False)
    kw = dict(unk_token="<unk>") if sp else {}
    affix = {}
    if "prefix" in s:
        affix["continuing_subword_prefix"] = s["prefix"]
    if "suffix" in s:
        affix["end_of_word_suffix"] = s["suffix"]
    t = Tokenizer(models.BPE(fuse_unk=sp and "suffix" not in s,
                             byte_fallback=s.get("fallback", False),
                             ignore_merges=s.get("ignore_merges", False), **kw, **affix))
    if "norm" in s:
        t.normalizer = s["norm"]
    if name in ("llama2", "gemma"):
        t.pre_tokenizer = P.Split("▁", "merged_with_next")
    elif name == "mistral":
        t.pre_tokenizer = P.Metaspace(split=True)
    else:
        t.pre_tokenizer = s["pre"]
    special = (["<unk>"] if sp else []) + ["<s>", "</s>"]
    if s.get("fallback"):
        special += ["<0x%02X>" % i for i in range(256)]
    t.train_from_iterator(train, trainers.BpeTrainer(
        vocab_size=len(special) + 700, special_tokens=special, show_progress=False,
        initial_alphabet=[] if sp else P.ByteLevel.alphabet(), limit_alphabet=400, **affix))
    js = json.loads(t.to_str())
    js["pre_tokenizer"] = None
    js["added_tokens"] = [a for a in js["added_tokens"] if not a["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(js))
    if "pre" in s:
        t.pre_tokenizer = s["pre"]
    lower = name in ("suffix", "prefix")
    t.add_special_tokens([AddedToken("<|x|>", special=True),
                          AddedToken("<|endoftext|>", special=True)])
    t.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True),
                  AddedToken("<nw>", single_word=True),
                  AddedToken("word", single_word=True),
                  AddedToken("zebra" if lower else "Word", normalized=True, rstrip=True),
                  AddedToken("  ", normalized=False), AddedToken("    ", normalized=False),
                  AddedToken("<|x|>foo", normalized=False)])
    bos, eos = t.token_to_id("<s>"), t.token_to_id("</s>")
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B",
                                      special_tokens=[("<s>", bos), ("</s>", eos)])])
    js = json.loads(t.to_str())
    if len(name) % 2 and all(" " not in a + b for a, b in js["model"]["merges"]):
        js["model"]["merges"] = [" ".join(m) for m in js["model"]["merges"]]
    return js


def main():
    out, files = sys.argv[1], sys.argv[2:]
    real = "".join(open(f, encoding="utf-8").read() for f in files)
    rng = random.Random(5)
    train = [real[i:i + 2000] for i in range(0, len(real), 2000)]
    train += [mixed(rng, 300) for _ in range(60)]
    texts = ["", " ", "a", "Hello world", "  leading", "trailing  ", "\n\n\n",
             "é e\u0301 ﬁ İstanbul ẞ", "─" * 100, "aaaa" * 30]
    texts += [real[i:i + 400] for i in rng.sample(range(len(real) - 400), 3)]
    texts += [mixed(rng, 400) for _ in range(6)]
    for name in SPECS:
        js = make(name, train)
        t = Tokenizer.from_str(json.dumps(js))
        with open(f"{out}/{name}.json", "w", encoding="utf-8") as f:
            json.dump(js, f, ensure_ascii=False, separators=(",", ":"))
            f.write("\n")
        cases = [dict(text=x, plain=t.encode(x, add_special_tokens=False).ids,
                      special=t.encode(x).ids) for x in texts]
        with open(f"{out}/{name}.cases.json", "w", encoding="utf-8") as f:
            json.dump(cases, f, ensure_ascii=False, separators=(",", ":"))
            f.write("\n")
        print(name, len(js["model"]["vocab"]), "tokens")


if __name__ == "__main__":
    main()
