#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes tiny random models with transformers and the logits they give.

    pip install torch transformers numpy
    make_families.py OUT [NAME...]

OUT/NAME/ gets config.json, config4.json (the same in the spelling of
transformers 4), model.safetensors, ids.npy (int64 [batch, seq]) and
logits.npy (fp32 [batch, seq, vocab], eager attention). Every case switches on
what its family adds to the arithmetic; weights are scaled up so that attention
is far from uniform and norms are far from 1. `tveval logits OUT/NAME --ids
OUT/NAME/ids.npy` must agree within 2e-4. tests/data/families holds the output
(bfloat16 weights, which both sides read exactly).
"""
import json
import os
import sys

import numpy as np
import torch
import transformers as tf

V = 61
COMMON = dict(vocab_size=V, hidden_size=24, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, intermediate_size=36,
              max_position_embeddings=48, bos_token_id=1, eos_token_id=2,
              pad_token_id=0)


def rope(kind, **more):
    return dict(rope_type=kind, rope_theta=10000.0, **more)


CASES = {
    "llama": ("LlamaConfig", dict(head_dim=10, attention_bias=True, mlp_bias=True)),
    "llama-linear": ("LlamaConfig", dict(rope_parameters=rope("linear", factor=4.0))),
    "llama-dynamic": ("LlamaConfig", dict(max_position_embeddings=16,
                                          rope_parameters=rope("dynamic", factor=3.0))),
    "llama3": ("LlamaConfig", dict(tie_word_embeddings=True, rope_parameters=rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=12))),
    "llama-yarn": ("LlamaConfig", dict(head_dim=12, rope_parameters=rope(
        "yarn", factor=4.0, original_max_position_embeddings=12))),
    "llama-long": ("LlamaConfig", dict(rope_parameters=rope(
        "longrope", factor=1.5, short_factor=[1.0, 1.1, 1.3],
        long_factor=[1.0, 1.9, 3.7], original_max_position_embeddings=16))),
    "mistral": ("MistralConfig", dict(sliding_window=7)),
    "qwen2": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=5,
                                  max_window_layers=1, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(head_dim=8)),
    "gemma": ("GemmaConfig", dict(head_dim=8)),
    "gemma2": ("Gemma2Config", dict(head_dim=8, sliding_window=6,
                                    query_pre_attn_scalar=11,
                                    attn_logit_softcapping=5.0,
                                    final_logit_softcapping=4.0)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=8, sliding_window=6,
                                        query_pre_attn_scalar=9, num_hidden_layers=4,
                                        layer_types=["sliding_attention",
                                                     "full_attention",
                                                     "sliding_attention",
                                                     "full_attention"])),
    "phi3": ("Phi3Config", dict(sliding_window=9)),
    "phi3-long": ("Phi3Config", dict(
        max_position_embeddings=48, original_max_position_embeddings=16,
        rope_parameters=rope("longrope", short_factor=[1.0, 1.1, 1.3],
                             long_factor=[1.0, 1.9, 3.7],
                             original_max_position_embeddings=16))),
    "gpt2": ("GPT2Config", dict(n_embd=24, n_layer=3, n_head=4, n_positions=48,
                                scale_attn_by_inverse_layer_idx=True)),
    "gpt_neox-serial": ("GPTNeoXConfig", dict(use_parallel_residual=False)),
    "bloom-6": ("BloomConfig", dict(hidden_size=24, n_layer=3, n_head=6,
                                    apply_residual_connection_post_layernorm=True)),
    "opt": ("OPTConfig", dict(ffn_dim=36, word_embed_proj_dim=24)),
    "opt-post": ("OPTConfig", dict(ffn_dim=36, word_embed_proj_dim=16,
                                   do_layer_norm_before=False)),
}


def spell4(config):
    """The same settings as transformers 4 wrote them."""
    c = dict(config)
    c["torch_dtype"] = c.pop("dtype")
    c["transformers_version"] = "4.46.0"
    r = c.pop("rope_parameters", None)
    if not r:
        return c
    if "full_attention" in r:
        c["rope_local_base_freq"] = r["sliding_attention"]["rope_theta"]
        c["sliding_window_pattern"] = c.pop("layer_types").index("full_attention") + 1
        r = r["full_attention"]
    r = dict(r)
    theta = r.pop("rope_theta")
    if c["model_type"] == "gpt_neox":
        c["rotary_emb_base"] = theta
        c["rotary_pct"] = r.pop("partial_rotary_factor")
    else:
        c["rope_theta"] = theta
    part = r.pop("partial_rotary_factor", None)
    if part is not None:
        c["partial_rotary_factor"] = part
    c["rope_scaling"] = r if r["rope_type"] != "default" else None
    c.pop("layer_types", None)
    return c


def make(name, out):
    kind, extra = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(tf, kind)(**{**COMMON, **extra})
    config._attn_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(p + 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (1.6 / p.shape[-1] ** 0.5))
    model = model.to(torch.bfloat16)
    model.save_pretrained(out)
    model = tf.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager").eval()
    gen = torch.Generator().manual_seed(7)
    ids = torch.randint(0, V, (2, 33), generator=gen)
    with torch.no_grad():
        logits = model(ids).logits.float().numpy()
    np.save(os.path.join(out, "ids.npy"), ids.numpy().astype(np.int64))
    np.save(os.path.join(out, "logits.npy"), logits.astype(np.float32))
    path = os.path.join(out, "generation_config.json")
    if os.path.exists(path):
        os.remove(path)
    with open(os.path.join(out, "config.json")) as f:
        config4 = spell4(json.load(f))
    with open(os.path.join(out, "config4.json"), "w") as f:
        json.dump(config4, f, indent=2, sort_keys=True)
        f.write("\n")
    print(name, sum(p.numel() for p in model.parameters()), "parameters,",
          "logits up to %.2f" % np.abs(logits).max())


def main():
    names = sys.argv[2:] or list(CASES)
    for name in names:
        out = os.path.join(sys.argv[1], name)
        os.makedirs(out, exist_ok=True)
        make(name, out)


if __name__ == "__main__":
    main()
