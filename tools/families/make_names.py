#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the tensor names of the families of check_families.py.

    make_names.py OUT [NAME...]

OUT/NAME.json: config (as transformers saves it), and for every tensor of the
checkpoint [shape, role, part, module, layer, vocabulary axis, tied to]; layer 1
of three and experts 1 and 2 of four are left out. Names
and shapes are those that transformers writes, once as transformers 4 names
them and, where that differs, once as transformers 5 does (NAME.5.json). What
is expected of them is worked out here, from names, sizes and what transformers
ties, and not with the tables of store/model: tests/model/test_names.c compares
the two. tests/data/architectures holds the output.
"""
import json
import os
import re
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import check_families as cf
import torch

# In layers, then outside: the first that matches the end of a module's name.
LAYER = [
    (r"rotary_emb\.inv_freq$|masked_bias$", "buffer"),
    (r"embed_tokens$", "embed"), (r"shared_head\.head$", "lm_head"),
    (r"relative_attention_bias$", "position"),
    (r"(q|k)_(layer)?norm(\.norms\.\d+)?$|(q|kv)_a_layernorm$", "other_norm"),
    (r"pre_feedforward_layernorm$|post_feedforward_layernorm$|"
     r"post_self_attn_layernorm$|post_mlp_layernorm$|enorm$|hnorm$|"
     r"shared_head\.norm$|mixer\.norm$|encoder_attn_layer_norm$|"
     r"layer\.\d+\.output\.LayerNorm$|output_layer_norm$", "other_norm"),
    (r"decoder.*layer\.1\.layer_norm$", "other_norm"),
    (r"input_layernorm$|ln_1$|ln_attn$|self_attn_layer_norm$|"
     r"(?<!post_)attention_layernorm$|layers\.\d+\.norm$|layer\.0\.layer_norm$",
     "input_norm"),
    (r"post_attention_layernorm$|ln_2$|ln_mlp$|final_layer_norm$|"
     r"feedforward_layernorm$|layer\.[12]\.layer_norm$|sa_layer_norm$|"
     r"attention\.output\.LayerNorm$", "post_attn_norm"),
    (r"q_a_proj$|q_b_proj$|\bq_proj$|\.q$|self\.query$|q_lin$", "attn_q"),
    (r"kv_a_proj_with_mqa$|\bk_proj$|\.k$|self\.key$|k_lin$", "attn_k"),
    (r"kv_b_proj$|\bv_proj$|\.v$|self\.value$|v_lin$", "attn_v"),
    (r"qkv_proj$|query_key_value$|c_attn$", "attn_qkv"),
    (r"attn\.o_proj$|attn\.out_proj$|attn\.dense$|attention\.dense$|"
     r"attn\.c_proj$|Attention\.o$|attention\.output\.dense$|out_lin$",
     "attn_o"),
    (r"mlp\.gate$|moe\.gate$|router(\.layer)?$|shared_expert_gate$|"
     r"e_score_correction_bias$", "router"),
    (r"gate_up_proj$|input_linear$", "mlp_gate_up"),
    (r"gate_proj$|\.w1$|wi_0$", "mlp_gate"),
    (r"up_proj$|\.w3$|wi$|wi_1$|fc1$|c_fc$|h_to_4h$|in_proj$|"
     r"intermediate\.dense$|ffn\.lin1$", "mlp_up"),
    (r"down_proj$|\.w2$|wo$|fc2$|mlp\.c_proj$|4h_to_h$|out_proj$|"
     r"output_linear$|\d\.output\.dense$|ffn\.lin2$", "mlp_down"),
    (r"mixer\.|act_fn\.|eh_proj$|attn\.sinks$", "other"),
]
OUTSIDE = [
    (r"position_ids$|inv_freq$", "buffer"),
    (r"position_embeddings$|embed_positions$|wpe$", "position"),
    (r"embeddings_layernorm$|embeddings\.LayerNorm$", "embed_norm"),
    (r"^lm_head$|embed_out$|predictions\.(decoder|bias)$|vocab_projector$|"
     r"proj_out$|lm_head\.(decoder|bias)$", "lm_head"),
    (r"transform\.LayerNorm$|lm_head\.layer_norm$|vocab_layer_norm$|"
     r"\.norm$|norm_f$|ln_f$|final_layer_?norm$|"
     r"(encoder|decoder)\.layer_norm$", "final_norm"),
    (r"embed_tokens$|embed_in$|wte$|word_embeddings$|shared$|"
     r"backbone\.embeddings$", "embed"),
    (r".", "other"),
]
STACK = re.compile(r"(?:^|\.)(?:layers|h|block|encoder\.layer|"
                   r"transformer\.layer)\.(\d+)\.")
PRE = {"embed", "position", "embed_norm"}


def module_of(family, name):
    if family == "t5":
        first = name.split(".")[0]
        return first if first in ("encoder", "decoder") else "shared"
    if family == "whisper":
        return "encoder" if ".encoder." in name else "decoder"
    return ""


def family_of(name):
    for start, family in (("gpt2", "gpt2"), ("gpt_neox", "gpt_neox"),
                          ("gpt_bigcode", "gpt_bigcode"), ("bloom", "bloom"),
                          ("opt", "opt"), ("falcon_mamba", "mamba"),
                          ("falcon", "falcon"), ("mamba", "mamba"),
                          ("bert", "bert"), ("roberta", "bert"),
                          ("xlm", "bert"), ("distilbert", "bert"),
                          ("t5", "t5"), ("whisper", "whisper")):
        if name.startswith(start):
            return family
    return "phi" if name == "phi" else "llama"


def role_of(name, layer_end):
    module = re.sub(r"\.(weight|bias)$|(?<=_proj)_bias$", "", name)
    if re.search(r"\.attention\.(bias|masked_bias)$|\.attn\.bias$", name):
        return "buffer"
    if name == "lm_head.bias" or name.endswith("predictions.bias"):
        return "lm_head"
    for pattern, role in LAYER if layer_end else OUTSIDE:
        if re.search(pattern, module):
            return role
    return "unknown"


def describe(family, tensors, embed):
    out = {}
    for name, shape in sorted(tensors.items()):
        m = STACK.search(name)
        if m and m.group(1) == "1" or re.search(r"experts\.[12]\.", name):
            continue  # like those before and behind
        layer = int(m.group(1)) if m else -1
        role = role_of(name, m is not None)
        if role == "unknown":
            raise ValueError(f"no role for {name}")
        part = "layer" if m else "pre" if role in PRE or (
            role == "buffer" or (role == "other" and (
                "embed" in name or "project_in" in name or
                re.search(r"\.conv[12]\.", name)))) else "post"
        vocab = shape.index(cf.V) if cf.V in shape else -1
        to = embed if role == "lm_head" and len(shape) == 2 else None
        out[name] = [list(shape), role, part, module_of(family, name), layer,
                     vocab, to]
    return out


def write(out, name, config, tensors, n):
    family = family_of(name)
    text = config.to_dict()
    embed = [k for k, s in sorted(tensors.items())
             if role_of(k, STACK.search(k) is not None) == "embed"][0]
    doc = {"family": family, "n_layers": n, "tied": tied(text),
        "config": {k: v for k, v in text.items()
                   if isinstance(v, (int, str)) or k == "architectures"},
        "tensors": describe(family, tensors, embed)}
    with open(out, "w") as f:
        json.dump(doc, f, separators=(",", ":"), sort_keys=True)
        f.write("\n")


def tied(config):
    return bool(config.get("tie_word_embeddings", True))


def main():
    out = sys.argv[1]
    os.makedirs(out, exist_ok=True)
    for name in sys.argv[2:] or cf.CASES:
        config, cls = cf.make(name)
        with tempfile.TemporaryDirectory() as d:
            torch.manual_seed(1)
            m = cls(config)
            first = None
            for tag, original in (("", True), (".5", False)):
                m.save_pretrained(d, save_original_format=original)
                names = {k: list(v.shape) for k, v in cf.tensors(d).items()}
                if names == first:
                    continue
                first = names
                with open(os.path.join(d, "config.json")) as f:
                    saved = json.load(f)
                config.to_dict = lambda s=saved: s
                path = os.path.join(out, name + tag + ".json")
                write(path, name, config, names,
                      saved.get("encoder_layers", 3))
        print(name, len(first))


if __name__ == "__main__":
    main()
