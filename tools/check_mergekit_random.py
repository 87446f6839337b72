#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Property test: random recipes give what mergekit gives, or both refuse them.

    pip install mergekit==0.1.5      (in an environment of its own)
    check_mergekit_random.py TVMERGE [CASES [SEED]] [--method M] [--keep DIR]

Small random models of some families (ties, shards, types, zero biases, missing
and additional tensors drawn at random) and random recipes over the language:
every method with usual and odd parameters, gradients, filters, conditional
values at each level, models or slices, base models listed or not, types,
tokenizers, adapters, and one thing wrong in some of them. mergekit sorts equal
magnitudes by place here, as compare_mergekit.py --ties does. `--compat mergekit`
must give its tensors bit for bit where README says so, else within the bounds
below; without it, what does not depend on random masks must be near mergekit's
in fp32. Names, types, config.json, index and tokenizer must agree. What one
side alone refuses is printed unless KNOWN says why. Prints differences and
counts; exit 1 if there is a difference. --keep DIR keeps the cases that differ
in DIR, --only N runs case N alone.
"""
import argparse
import collections
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")
import torch  # noqa: E402
import transformers as tf  # noqa: E402
import yaml  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.io.tasks import LoaderCache  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from compare_mergekit import by_place, load_dir  # noqa: E402

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
logging.disable(logging.CRITICAL)

LM = dict(vocab_size=61, num_hidden_layers=4, num_attention_heads=4,
          num_key_value_heads=2, hidden_size=16, intermediate_size=24,
          max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
          pad_token_id=0)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2,
           moe_intermediate_size=12, shared_expert_intermediate_size=12,
           decoder_sparse_step=1)
FAMILIES = {
    "Llama": dict(LM), "Mistral": dict(LM), "Qwen2": dict(LM),
    "Qwen3": dict(LM, head_dim=6), "Gemma": dict(LM, head_dim=6),
    "Gemma2": dict(LM, head_dim=6), "Gemma3Text": dict(LM, head_dim=6),
    "Phi3": dict(LM), "StableLm": dict(LM), "Starcoder2": dict(LM),
    "GPT2": dict(vocab_size=61, n_embd=16, n_layer=4, n_head=4,
                 n_positions=64, bos_token_id=1, eos_token_id=2),
    "GPTNeoX": dict(LM), "Cohere": dict(LM, use_qk_norm=True),
    "Olmo2": dict(LM),
    "Bloom": dict(vocab_size=61, hidden_size=16, n_layer=4, n_head=4),
    "OPT": dict(LM, ffn_dim=24, word_embed_proj_dim=16),
    "Mixtral": dict(LM, **MOE), "Qwen2Moe": dict(LM, **MOE),
    "Qwen3Moe": dict(LM, head_dim=6, **MOE),
}
TIES = {"Llama", "Mistral", "Qwen2", "Qwen3", "Cohere", "Olmo2"}
DTYPES = ["float32", "bfloat16", "float16"]
# method: (fewest, most inputs without base), base: required, may be, none
GTA = ["task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs",
       "breadcrumbs_ties", "della", "della_linear"]
METHODS = {"linear": (1, 3, "may"), "slerp": (1, 1, "yes"),
           "nuslerp": (2, 2, "may"), "multislerp": (1, 3, "may"),
           "karcher": (1, 3, "may"), "model_stock": (2, 3, "yes"),
           "sce": (1, 3, "yes"), "ram": (1, 3, "yes"),
           "ramplus_tl": (1, 3, "yes"), "nearswap": (1, 1, "yes"),
           "arcee_fusion": (1, 1, "yes"), "passthrough": (1, 1, "no"),
           **{m: (1, 3, "yes") for m in GTA}}
# Bit for bit with --compat mergekit; others by (relative error, ulps).
EXACT = {"linear", "passthrough", "task_arithmetic", "nearswap", "ram",
         "ramplus_tl", "ties", "breadcrumbs", "breadcrumbs_ties"}
RANDOM = {"dare_ties", "dare_linear", "della", "della_linear"}
WEIGHT = (0.5, 1, 0.3, 0.7, 1.0, 2, -0.4, 0, 0.0, "1e-1", "0.25", 1e-3)
UNIT = (0.5, 0.3, 0.8, 1, 1.0, 0, 0.1, 0.9, "5e-1", 0.01)
BOOL = (True, False, True, False, 1, 0, "on", "no", "true")
SHARED, OWN = "shared", "own"


def params_of(method):
    """{name: (scope, values, required)}"""
    w = {"weight": (OWN, WEIGHT, True)}
    if method in GTA:
        p = dict(w, normalize=(SHARED, BOOL, False),
                 rescale=(SHARED, BOOL, False),
                 int8_mask=(SHARED, BOOL, False),
                 density=(OWN, UNIT, False))
        p["lambda"] = (SHARED, WEIGHT, False)
        if "bread" in method:
            p["gamma"] = (OWN, (0.01, 0.1, 0.0, 0.3, 0.5), False)
        if "della" in method:
            p["epsilon"] = (OWN, (0.15, 0.05, 0.01, 0.2, 1e-3), False)
            p["density"] = (OWN, (0.5, 0.3, 0.7, 0.6, 1, 0), False)
        return p
    return {
        "linear": dict(w, normalize=(SHARED, BOOL, False)),
        "slerp": {"t": (SHARED, UNIT + (1.2, -0.1), True)},
        "nuslerp": dict(w, nuslerp_row_wise=(SHARED, BOOL, False),
                        nuslerp_flatten=(SHARED, BOOL, False)),
        "multislerp": dict(w, normalize_weights=(SHARED, BOOL, False),
                           eps=(SHARED, (1e-8, 1e-4, 1e-6), False)),
        "karcher": {"max_iter": (SHARED, (10, 1, 3, 0, "2", 4.0), False),
                    "tol": (SHARED, (1e-5, 1e-3, "1e-4", 1e-2), False)},
        "model_stock": {"filter_wise": (SHARED, BOOL, False)},
        "sce": {"select_topk": (SHARED, UNIT, False),
                "int8_mask": (SHARED, BOOL, False)},
        "ram": {"epsilon": (SHARED, (1e-5, 1e-3, 1e-2, 0, 0.1), False)},
        "ramplus_tl": {"epsilon": (SHARED, (1e-5, 1e-3, 1e-2), False),
                       "r": (SHARED, (0.1, 0.5, 1, -0.2), False),
                       "alpha": (SHARED, (0.2, 0.5, 1, 0), False)},
        "nearswap": {"t": (SHARED, (1e-3, 1e-2, 0.1, 0, 1), True)},
        "passthrough": {"scale": (OWN, WEIGHT, False)},
    }.get(method, {})


# ---- models -----------------------------------------------------------------

def words(r, odd):
    """Tokens of a model: the same, or three more of nine, in any order."""
    most = ["<pad>", "<s>", "</s>"] + [f"{chr(97 + i % 26)}{i // 26 or ''}"
                                       for i in range(58)]
    if odd == "vocabulary":
        most += r.sample([f"more{i}" for i in range(9)], r.choice([0, 1, 3]))
        if r.random() < 0.3:
            tail = most[3:]
            r.shuffle(tail)
            most[3:] = tail
    return most


def tokenizer_files(path, tokens):
    vocab = {t: i for i, t in enumerate(tokens)}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.decoder = decoders.Fuse()
    tf.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>",
                               eos_token="</s>", pad_token="<pad>",
                               unk_token="<pad>").save_pretrained(path)


def save_model(r, path, config, tensors, dtype):
    os.makedirs(path)
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as f:
        json.dump(dict(config, **{r.choice(["dtype", "torch_dtype"]): dtype}),
                  f)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    if r.random() < 0.3:
        names = sorted(tensors)
        r.shuffle(names)
        cut = r.randrange(1, len(names))
        shards = {}
        for i, part in enumerate((names[:cut], names[cut:])):
            f = f"model-{i + 1:05}-of-00002.safetensors"
            save_file({n: tensors[n] for n in part}, os.path.join(path, f),
                      {"format": "pt"})
            shards.update({n: f for n in part})
        with open(os.path.join(path, "model.safetensors.index.json"), "w",
                  encoding="utf-8") as f:
            json.dump({"metadata": {}, "weight_map": shards}, f)
    else:
        save_file(tensors, os.path.join(path, "model.safetensors"),
                  {"format": "pt"})


class Zoo:
    """A family's base and three fine-tunes. mergekit remembers models by their
    names: those of a case are of this case alone."""

    def __init__(self, r, root, tag):
        self.family = r.choice(list(FAMILIES))
        settings = dict(FAMILIES[self.family])
        tied = r.random() < 0.4
        if self.family in TIES:
            settings["tie_word_embeddings"] = tied
        if self.family in ("Llama", "Qwen3") and r.random() < 0.3:
            settings["attention_bias"] = True
        torch.manual_seed(r.getrandbits(30))
        config = getattr(tf, self.family + "Config")(**settings)
        model = tf.AutoModelForCausalLM.from_config(config)
        self.layers = 4
        first = os.path.join(root, "first")
        model.to(torch.float32).save_pretrained(first)
        base = load_dir(first)
        if "num_experts" in settings:  # packed, as mergekit writes them
            base = {k: v.clone() for k, v in model.state_dict().items()
                    if k in base or "experts" in k or "mlp.gate." in k}
        with open(os.path.join(first, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
        for key in ("dtype", "torch_dtype", "layer_types"):
            config.pop(key, None)
        if self.family == "GPTNeoX":  # as old checkpoints have it
            for i in range(4):
                at = f"gpt_neox.layers.{i}.attention."
                base[at + "bias"] = torch.ones(1, 1, 8, 8).tril().bool()
                base[at + "masked_bias"] = torch.tensor(-1e4)
                base[at + "rotary_emb.inv_freq"] = torch.ones(1)
        mixed = r.random() < 0.3
        dtype = r.choice(DTYPES)
        self.odd = r.choice(["none"] * 6 + ["extra", "head", "buffer", "equal",
                                            "missing", "shape", "nan",
                                            "vocabulary", "vocabulary"])
        self.refs = []
        self.names = sorted(base)
        self.embed = next(k for k in self.names if "embed_tokens" in k or
                          "wte" in k or "embed_in" in k or
                          "word_embeddings.w" in k)
        for k, v in base.items():
            if not v.is_floating_point() or v.dim() == 0:
                continue
            if v.dim() > 1:
                base[k] = torch.randn_like(v) * r.choice([0.02, 0.3, 1])
            elif r.random() < 0.6:
                base[k] = v + 0.1 * torch.randn_like(v)
        for i in range(4):
            own = dtype if not mixed else r.choice(DTYPES)
            t = {}
            scale = r.choice([0.01, 0.1, 1])
            for k, v in base.items():
                if i and v.dim() and v.is_floating_point() and not (
                        r.random() < 0.1 or self.odd == "equal"):
                    v = v + scale * v.float().std(unbiased=False) * \
                        torch.randn_like(v)
                t[k] = v.to(getattr(torch, own)) if v.is_floating_point() else v
            c = dict(config)
            if i == 1 and self.odd == "extra":
                t["model.extra.weight"] = torch.ones(3)
            if self.odd == "buffer" and r.random() < 0.7:
                t["model.layers.0.self_attn.rotary_emb.inv_freq"] = (
                    torch.ones(2))
            if self.odd == "head" and "lm_head.weight" in t and r.random() < .5:
                del t["lm_head.weight"]
                c["tie_word_embeddings"] = True
            if self.odd == "missing" and i == 2:
                del t[r.choice(sorted(t))]
            if self.odd == "nan" and i != 3:
                for k in r.sample(sorted(t), 3):
                    if t[k].is_floating_point():
                        t[k] = t[k].clone()
                        t[k].view(-1)[:2] = r.choice(
                            [float("nan"), float("inf"), -float("inf")])
            tokens = words(r, self.odd)
            for k in t:
                more = len(tokens) - 61
                if more and t[k].dim() == 2 and t[k].shape[0] == 61:
                    t[k] = torch.cat([t[k], t[k][:more] * 0.5 + 0.01])
            c["vocab_size"] = len(tokens)
            if self.odd == "shape" and i == 2:
                k = r.choice([k for k in sorted(t) if t[k].dim() == 2])
                t[k] = t[k][:-1]
            ref = f"{tag}m{i}"
            path = os.path.join(root, ref)
            save_model(r, path, c, t, own)
            tokenizer_files(path, tokens)
            if r.random() < 0.3:
                with open(os.path.join(path, "generation_config.json"), "w",
                          encoding="utf-8") as f:
                    json.dump({"bos_token_id": 1, "eos_token_id": 2}, f)
            self.refs.append(ref)
        if r.random() < 0.15 and self.odd in ("none", "equal"):
            self.refs[-1] += "+" + self.adapter(r, root, tag)
        shutil.rmtree(first)

    def adapter(self, r, root, tag):
        model = tf.AutoModelForCausalLM.from_pretrained(
            os.path.join(root, "first"))
        linear = sorted({n.split(".")[-1] for n, m in model.named_modules()
                         if isinstance(m, torch.nn.Linear) and
                         "head" not in n} or {"c_attn", "c_fc"})
        rank = r.choice([1, 2, 4])
        peft = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=r.choice([1, 3, 8]), init_lora_weights=False,
            use_rslora=r.random() < 0.3, target_modules=r.sample(
                linear, r.randint(1, len(linear))),
            fan_in_fan_out=self.family == "GPT2"))
        peft.save_pretrained(os.path.join(root, f"{tag}lora"))
        return f"{tag}lora"


# ---- recipes ----------------------------------------------------------------

class Recipes:
    def __init__(self, r, zoo, method):
        self.r, self.zoo, self.method = r, zoo, method
        self.params = params_of(method)

    def some(self, p):
        return self.r.random() < p

    def values(self, values):
        if self.some(0.75):
            return self.r.choice(values)
        n = self.r.choice([1, 2, 2, 3, 4, 5])
        return [self.r.choice(values) for _ in range(n)]

    def filter(self):
        r, name = self.r, self.r.choice(self.zoo.names)
        parts = re.split(r"[._]", name)
        return r.choice([r.choice(parts), name, "*", ".".join(
            name.split(".")[-2:]), "layers.1", ".1.", "mlp", "attn", "norm",
            "nothing", "weight", "bias"])

    def setting(self, values, safe=False):
        """safe: matches every tensor."""
        kind = self.r.random()
        if kind < 0.7:
            return self.values(values)
        if kind < 0.77 and not safe:
            return {"filter": self.filter(), "value": self.values(values)}
        out = [{"filter": self.filter(), "value": self.values(values)}
               for _ in range(self.r.choice([1, 1, 2, 3]))]
        if safe or self.some(0.7):
            out.append({"value": self.values(values)})
        return out

    def shared(self, p):
        out = {}
        for name, (scope, values, required) in self.params.items():
            if scope == SHARED and self.some(p):
                out[name] = self.setting(values)
        return out

    def own(self, p, always=False):
        out = {}
        for name, (scope, values, required) in self.params.items():
            if scope == OWN and (required and always or self.some(p)):
                out[name] = self.setting(values, required and self.some(0.9))
        return out

    def entry(self, ref, is_base):
        e = {"model": ref}
        own = {}
        if not is_base:
            own = self.own(0.5, not self.some(0.03))
        elif self.method in ("linear", "karcher", "slerp") or self.some(0.1):
            own = self.own(0.5, True)
        if self.some(0.05):
            own.update(self.shared(0.5))  # of no effect there
        if own:
            e["parameters"] = own
        return e

    def inputs(self):
        """(references, base or None, whether to list it)"""
        few, many, kind = METHODS[self.method]
        refs = list(self.zoo.refs)
        self.r.shuffle(refs)
        n = self.r.randint(few, many)
        if self.some(0.03):
            n = self.r.randint(0, 3)
        base = refs.pop() if kind == "yes" or kind == "may" and self.some(
            0.35) else None
        if kind == "yes" and self.some(0.02):
            base = None
        return refs[:n], base

    def recipe(self):
        r = self.r
        doc = {"merge_method": self.method}
        donors, base = self.inputs()
        listed = list(donors)
        if base and (self.some(0.5) or self.some(0.3)):
            listed.insert(r.randrange(len(listed) + 1), base)
        if not listed:
            listed = [self.zoo.refs[0]]
        if base:
            doc["base_model"] = base
        if self.some(0.6):
            doc["models"] = [self.entry(m, m == base) for m in listed]
        else:
            doc["slices"] = [self.slice(donors, base)
                             for _ in range(r.choice([1, 1, 2, 3]))]
        top = self.shared(0.4)
        for name, (scope, values, required) in self.params.items():
            if scope == SHARED and required and not self.some(0.04):
                top[name] = self.setting(values, self.some(0.9))
        if self.some(0.15) or "models" in doc and base not in listed and (
                self.method == "linear"):
            top.update(self.own(0.5, True))
        if top:
            doc["parameters"] = top
        if self.some(0.5):
            doc["dtype"] = r.choice(DTYPES)
        if self.some(0.25):
            doc["out_dtype"] = r.choice(DTYPES)
        named = self.zoo.odd == "vocabulary" and self.some(0.9)
        base = ["base"] if "base_model" in doc else []
        if named and self.some(0.6) or self.some(0.06):
            doc["tokenizer_source"] = r.choice(
                ["union", self.zoo.refs[0]] + base)
        elif named or self.some(0.04):
            doc["tokenizer"] = {"source": r.choice(
                ["union", self.zoo.refs[1]] + base), "tokens": {}}
            for t in r.sample(["a", "b", "more1", "more5", "</s>", "new"],
                              r.choice([0, 1, 2])):
                m = r.choice(self.zoo.refs)
                doc["tokenizer"]["tokens"][t] = {
                    "source": r.choice([m, {"kind": "zero"}, {
                        "kind": "model_token", "model": m, "token": "c"}, {
                        "kind": "model_token", "model": m, "token_id": 7}]),
                    "force": self.some(0.5)}
        if self.some(0.07):
            doc["chat_template"] = r.choice(
                ["chatml", "llama3", "alpaca", "exaone", "mistral", "auto",
                 "{% for m in messages %}{{ m.content }}{% endfor %}"])
        if self.some(0.12):
            self.spoil(doc)
        return doc

    def spoil(self, doc):
        """One thing that is odd or wrong."""
        r = self.r
        inputs = doc.get("models") or [
            s for x in doc["slices"] for s in x["sources"]]
        entry = r.choice(inputs)
        name = r.choice(sorted(self.params) or ["weight"])
        bad = r.choice([1.5, -0.2, "abc", None, [], [[1]], True, "nan", 2, "",
                        {"value": 1}, {"filter": "mlp"}, [1, "x"], 0.5,
                        [{"value": []}], "1", [{"filter": 3, "value": 1}]])
        match r.randrange(9):
            case 0 | 1 | 2:
                doc.setdefault("parameters", {})[name] = bad
                entry.setdefault("parameters", {})[name] = bad
            case 3:
                entry["parameters"] = r.choice([None, {}, {"other": 1}, []])
            case 4:
                entry.pop("parameters", None)
                entry["weight"] = 0.5
            case 5:
                inputs.append(dict(entry))
            case 6:
                if "layer_range" in entry:
                    a, b = entry["layer_range"]
                    entry["layer_range"] = r.choice(
                        [[a, b + 3], [b, a], [a, b - 1], [-1, b], [a], None,
                         [0.0, b], [str(a), b]])
                else:
                    entry["layer_range"] = [0, 2]
            case 7:
                doc[r.choice(["dtype", "out_dtype"])] = r.choice(
                    ["bf16", "int8", None])
            case 8:
                doc[r.choice(["unknown", "slices", "name", "modules",
                              "merge_method", "base_model"])] = r.choice(
                    [None, "x", [], {}, 1])

    def slice(self, donors, base):
        r = self.r
        n = r.choice([0, 1, 1, 2, 2, 3, 4]) if self.some(0.2) else r.choice(
            [1, 2, 3])
        a = r.randrange(self.zoo.layers - n + 1)
        refs = donors + ([base] if base and (
            METHODS[self.method][2] == "yes" and not self.some(0.02)
            or self.some(0.5)) else [])
        r.shuffle(refs)
        sources = []
        for m in refs or [self.zoo.refs[0]]:
            at = a if self.some(0.85) else r.randrange(self.zoo.layers - n + 1)
            sources.append(dict(self.entry(m, m == base),
                                layer_range=[at, at + n]))
        out = {"sources": sources}
        if self.some(0.25):
            out["parameters"] = dict(self.shared(0.6), **self.own(0.3))
        if base and self.some(0.05):
            out["base_model"] = r.choice(refs)
        return out


# ---- comparison -------------------------------------------------------------

# Refused by one side alone, and why: README or recipe-spec say so.
KNOWN = [
    ("ours", r"has no such tensor", "tensors that mergekit drops in silence"),
    ("ours", r"is not between|is below|is not above", "bounds of parameters"),
    ("ours", r"weights sum to 0", "mergekit divides by 0"),
    ("theirs", r"weighted sum of the input tensors is zero",
     "multislerp of nothing"),
    ("theirs", r"requires a vocabulary weight", "a tied head has rows too"),
    ("theirs", r"input_value=(None|\{|\[\])", "settings without a value"),
    ("ours", r"is not a number|is neither", "values that no tensor has"),
    ("theirs", r"LoRA not merged|attention.bias required.*\+",
     "mergekit's adapters want a known architecture"),
    ("theirs", r"IndexError: Dimension out of range|p_in >= 0",
     "della of a scalar or NaN"),
    ("theirs", r"bias required but not present",
     "biases that some models have"),
    ("theirs", r"Base input is not present in merge inputs for lm_head",
     "mergekit knows no tie"),
    ("theirs", r"KeyError: \d+", "mergekit wants a row for every token"),
    ("theirs", r"equal to the number of `layer_types`",
     "mergekit leaves layer_types as they were"),
    ("theirs", r"Tensor lm_head.weight required", "mergekit knows no tie"),
]
# Architectures that mergekit infers: tensors outside layers belong to the first
# slice, num_hidden_layers stays.
INFERRED = {"Bloom", "OPT", "Qwen2Moe"}
# Methods that look at a whole tensor: one NaN makes mergekit's result NaN, ours
# has them where the inputs have.
WHOLE = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce",
         "arcee_fusion"} | RANDOM


def refusal_known(side, text):
    return next((why for s, p, why in KNOWN if s == side and
                 re.search(p, text)), None)


def ulps(a, b):
    """Largest distance in units of the larger one's last place."""
    bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[a.dtype]
    low = {torch.float16: 2.0 ** -24}.get(a.dtype, 2.0 ** -126)
    x, y = a.double(), b.double()
    big = torch.maximum(x.abs(), y.abs())
    unit = torch.clamp(2.0 ** torch.floor(torch.log2(big)) * 2.0 ** -bits,
                       min=low)
    return (x - y).abs() / unit


def same(a, b):
    return (a == b) | ~(a.isfinite() | b.isfinite())


def tensor_differs(method, a, b, compat, exact):
    """a: theirs, b: ours."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype}{list(a.shape)}, ours {b.dtype}{list(b.shape)}"
    if not a.is_floating_point():
        return None if torch.equal(a, b) else "other integers"
    off = ~same(a, b)
    if not off.any():
        return None
    if (a.isfinite() != b.isfinite()).any():
        n = (a.isfinite() != b.isfinite()).sum().item()
        return f"{n} of {a.numel()} finite on one side only"
    share = off.float().mean().item()
    if compat and exact:
        return f"{share:.2%} not the same bits, {ulps(a, b).max():.1f} ulp"
    wide = 2.0 ** {torch.float32: -18, torch.bfloat16: -6,
                   torch.float16: -9}[a.dtype]
    if method in WHOLE - RANDOM:  # lengths and angles in torch's fp32
        wide = max(wide, 1e-3)
    size = a.double().abs()
    far = (a.double() - b.double()).abs() > wide * (size.mean() + size) + 1e-9
    if not compat and far.sum() < 3:  # an fp32 magnitude at a cut
        return None
    if method == "arcee_fusion":
        return f"{share:.2%} differ" if share > 0.35 else None
    if far.any():
        err = ((a.double() - b.double()).norm() / a.double().norm()).item()
        return (f"{far.float().mean().item():.2%} far "
                f"({share:.2%} differ), relative {err:.1e}")
    return None


def said(tokenizer):
    """What the template makes of a conversation."""
    if not tokenizer.chat_template:
        return None
    talk = [{"role": r, "content": c} for r, c in (
        ("user", " Hi there "), ("assistant", "Hello."), ("user", "Bye\n"))]
    return [tokenizer.apply_chat_template(t, tokenize=False,
                                          add_generation_prompt=g)
            for t in (talk, [{"role": "system", "content": "Be brief"}] + talk)
            for g in (False, True)]


def config_of(path):
    c = tf.AutoConfig.from_pretrained(path).to_dict()
    for key in ("transformers_version", "_name_or_path", "dtype",
                "torch_dtype", "architectures"):
        c.pop(key, None)
    return c


def index_wrong(path):
    at = os.path.join(path, "model.safetensors.index.json")
    files = [f for f in os.listdir(path) if f.endswith(".safetensors")]
    if not os.path.exists(at):
        return None if files == ["model.safetensors"] else f"no index: {files}"
    with open(at, encoding="utf-8") as f:
        index = json.load(f)
    total = 0
    where = {}
    for name in files:
        with safe_open(os.path.join(path, name), "pt") as f:
            for k in f.keys():
                where[k] = name
                t = f.get_tensor(k)
                total += t.numel() * t.element_size()
    if where != index["weight_map"]:
        return "index and shards differ"
    if index["metadata"]["total_size"] != total:
        return f"total_size {index['metadata']['total_size']}, not {total}"
    return None


class Case:
    def __init__(self, args, work, doc, seed, zoo):
        self.args, self.work, self.doc, self.seed = args, work, doc, seed
        self.zoo = zoo
        self.found = []

    def say(self, text):
        self.found.append(text)

    def theirs(self, doc, name="theirs"):
        out = os.path.join(self.work, name)
        shutil.rmtree(out, ignore_errors=True)
        try:
            config = MergeConfiguration.model_validate(
                yaml.safe_load(yaml.safe_dump(doc)))
            for ref in config.referenced_models():  # takes random numbers
                ref.merged("loras")
            run_merge(config, out, MergeOptions(
                random_seed=self.seed, quiet=True, write_model_card=False,
                lora_merge_cache="loras"))
        except Exception as e:
            return None, f"{type(e).__name__}: {e}"
        return out, None

    def ours(self, name, *more):
        out = os.path.join(self.work, name)
        shutil.rmtree(out, ignore_errors=True)
        p = subprocess.run(
            [self.args.tvmerge, "run", "r.yml", out, "--random-seed",
             str(self.seed), "-q", "--no-sync", "-j", "1", *more],
            capture_output=True, text=True, cwd=self.work)
        if p.returncode < 0 or p.returncode not in (0, 2, 4):
            self.say(f"exit {p.returncode}: {p.stderr.strip()[-300:]}")
        return (None, p.stderr.strip()) if p.returncode else (out, None)

    def tensors(self, theirs, ours, compat):
        a, b = load_dir(theirs), load_dir(ours)
        stack = len(self.doc.get("slices", [])) > 1
        odd, method = self.zoo.odd, self.doc["merge_method"]
        biases = any(k not in a and k.endswith("_proj.bias") for k in b)
        for k in list(b):  # both as README has it
            if k in a and k.endswith(("masked_bias", "inv_freq",
                                      "attention.bias")):  # cast by them
                del a[k], b[k]
            elif k not in a and (
                    k.endswith(("inv_freq", "_proj.bias")) or "extra" in k or
                    (stack or odd == "head") and k == "lm_head.weight"):
                del b[k]
            elif k == "lm_head.weight" and odd == "head" and (
                    self.zoo.family in INFERRED or method in RANDOM or
                    self.zoo.family == "Cohere"):
                del a[k], b[k], a[self.zoo.embed], b[self.zoo.embed]
            elif k in a and not b[k].is_floating_point():
                a[k] = a[k].to(b[k].dtype)
            elif stack and self.zoo.family in INFERRED and not re.search(
                    r"\.\d\.", k):
                del a[k], b[k]
        if set(a) != set(b):
            self.say(f"tensors of one side only: theirs "
                     f"{sorted(set(a) - set(b))[:4]}, ours "
                     f"{sorted(set(b) - set(a))[:4]}")
        if method in RANDOM and (biases or odd == "vocabulary" or stack and (
                self.zoo.family in INFERRED) or self.same_place()):
            return  # masks of other places in the stream
        if odd == "nan" and (method in WHOLE or not compat or method in (
                "ram", "ramplus_tl")):
            return
        exact = method in EXACT and "rescale" not in self.text
        rows = self.rows(theirs, ours)
        for k in sorted(set(a) & set(b)):
            if rows and a[k].dim() == 2 and a[k].shape[0] == len(rows):
                b[k] = b[k][rows]
            if not compat:
                a[k] = a[k].to(b[k].dtype)
            if method.startswith("della") and a[k].dim() > 2:
                continue
            d = tensor_differs(method, a[k], b[k], compat, exact)
            if d:
                self.say(f"{'compat' if compat else 'default'} {k}: {d}")
                break

    def rows(self, theirs, ours):
        """Ours by token in the order of theirs, which is of no fixed order."""
        if "tokenizer" not in " ".join(self.doc):
            return None
        x, y = (tf.AutoTokenizer.from_pretrained(p).get_vocab()
                for p in (theirs, ours))
        at = sorted(x, key=x.get)
        return [y[t] for t in at] if set(x) == set(y) else None

    def same_place(self):
        """Whether mergekit's random numbers have no order: that of the names
        of tensors, the greatest of the inputs."""
        at = [max(int(x["layer_range"][0]) for x in s["sources"]) + i
              for s in self.doc.get("slices", [])
              for i in range(int(s["sources"][0]["layer_range"][1]) -
                             int(s["sources"][0]["layer_range"][0]))]
        return len(set(at)) < len(at)

    def files(self, theirs, ours):
        b = config_of(ours)
        try:
            a = config_of(theirs)
        except AttributeError:  # they write "torch.float16"
            a = b
        stack = "slices" in self.doc or self.zoo.odd == "head"
        for k in sorted(set(a) | set(b)):
            if stack and (k == "tie_word_embeddings" or self.zoo.family in
                          INFERRED and re.search("layer", k)):
                continue
            if a.get(k) != b.get(k) and not re.search("_token_id", k):
                self.say(f"config {k}: {a.get(k)!r}, ours {b.get(k)!r}")
        wrong = index_wrong(ours)
        if wrong:
            self.say(wrong)
        a, b = ({f for f in os.listdir(p) if "safetensors" not in f}
                for p in (theirs, ours))
        if "base_model" not in self.doc:  # theirs are of any model
            a.discard("generation_config.json")
        if a - b:
            self.say(f"files that we lack: {sorted(a - b)}")
        if "tokenizer.json" in a & b:
            x, y = (tf.AutoTokenizer.from_pretrained(p)
                    for p in (theirs, ours))
            if set(x.get_vocab()) != set(y.get_vocab()):
                self.say("vocabularies differ")
            if said(x) != said(y) and self.doc.get("chat_template", "")[:2] in (
                    "", "{%", "au"):  # of others white space differs
                self.say(f"chat_template: {said(x)!r}, ours {said(y)!r}")
            if x.special_tokens_map != y.special_tokens_map:
                self.say(f"special tokens: {x.special_tokens_map}, ours "
                         f"{y.special_tokens_map}")

    def run(self):
        self.text = yaml.safe_dump(self.doc, sort_keys=False)
        with open(os.path.join(self.work, "r.yml"), "w",
                  encoding="utf-8") as f:
            f.write(self.text)
        theirs, no = self.theirs(self.doc)
        compat, ours_no = self.ours("compat", "--compat", "mergekit")
        if no and ours_no:
            return "both refuse"
        if no or ours_no:
            side = "theirs" if no else "ours"
            why = refusal_known(side, no or ours_no)
            if why:
                return f"{side} refuses: {why}"
            self.say(f"{side} refuses: {(no or ours_no)[-400:]}")
            return f"{side} refuses"
        self.tensors(theirs, compat, True)
        self.files(theirs, compat)
        plain, no = self.ours("plain")
        if no:
            self.say(f"refused without --compat: {no[-300:]}")
        elif self.comparable():
            theirs, no = self.theirs(dict(self.doc, dtype="float32",
                                          out_dtype="float32"), "fp32")
            if theirs:
                self.tensors(theirs, plain, False)
        return "both accept"

    def comparable(self):
        """Whether the default arithmetic is near mergekit's in fp32: no masks
        of another generator, no differences of rounding errors."""
        return self.doc["merge_method"] not in RANDOM | {"arcee_fusion"} and (
            "+" not in self.text)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--method", choices=sorted(METHODS))
    p.add_argument("--keep", type=os.path.abspath)
    p.add_argument("--only", type=int, help="this case alone")
    p.add_argument("tvmerge", type=os.path.abspath)
    p.add_argument("cases", nargs="?", type=int, default=100)
    p.add_argument("seed", nargs="?", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(1)
    by_place()
    counts = collections.Counter()
    for i in range(args.cases):
        if args.only is not None and i != args.only:
            continue
        r = random.Random(f"{args.seed} {i}")
        work = tempfile.mkdtemp(prefix="check-mergekit-")
        os.chdir(work)
        zoo = Zoo(r, work, f"c{i}")
        method = args.method or r.choice(sorted(METHODS))
        case = Case(args, work, Recipes(r, zoo, method).recipe(),
                    r.randrange(1000), zoo)
        result = case.run()
        counts[result] += 1
        if case.found:
            counts["DIFFERENT"] += 1
            print(f"== case {i} {zoo.family} odd={zoo.odd}: {result}")
            for f in case.found:
                print(f"   {f}")
            print("   " + case.text.replace("\n", "\n   "), flush=True)
            if args.keep:
                shutil.copytree(work, os.path.join(args.keep, str(i)),
                                dirs_exist_ok=True)
        LoaderCache.loaders.clear()
        os.chdir("/")
        shutil.rmtree(work)
    for k, n in sorted(counts.items()):
        print(f"{n:5} {k}")
    return 1 if counts["DIFFERENT"] else 0


if __name__ == "__main__":
    sys.exit(main())
