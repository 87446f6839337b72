#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Property test: tveval computes what transformers does, for random settings.

    pip install torch transformers numpy
    check_random.py TVEVAL [PER_FAMILY [SEED [FAMILY...]]]

For every family a number of tiny random models (default 4): sizes, ties,
biases, activations, rope variants, windows and caps drawn from what the family
allows, weights in bf16, fp16 or fp32, config.json in the spelling of
transformers 4 or 5. Logits within 2e-4 absolute of fp32 (relative where they
exceed 10), argmax equal where the two largest differ by more than 1e-3.
"""
import json
import os
import random
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers as tf

from make_families import spell4

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()


def rope(r, dim):
    kind = r.choice(["default", "linear", "dynamic", "llama3", "yarn",
                     "longrope"])
    p = {"rope_type": kind, "rope_theta": r.choice([10000.0, 500000.0, 1e6])}
    if kind != "default":
        p["factor"] = r.choice([1.5, 4.0, 8.0])
    if kind == "llama3":
        p.update(low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=16)
    if kind == "longrope":
        p["original_max_position_embeddings"] = 16
        for name in ("short_factor", "long_factor"):
            p[name] = [r.uniform(1, 6) for _ in range(dim // 2)]
        if r.random() < 0.3:
            p["attention_factor"] = 1.3
    if kind == "yarn":
        p["original_max_position_embeddings"] = r.choice([16, 12])
        if r.random() < 0.3:
            p["truncate"] = False
        if r.random() < 0.3:
            p.update(mscale=1.0, mscale_all_dim=r.choice([0.5, 1.0]))
        if r.random() < 0.5:
            p.update(beta_fast=16.0, beta_slow=2.0)
        if r.random() < 0.3:
            p["attention_factor"] = 1.2
    return p


def common(r, head=None):
    heads = r.choice([1, 2, 4, 6])
    kv = r.choice([k for k in (1, 2, 3, 4, 6) if heads % k == 0 and k <= heads])
    dim = head or r.choice([8, 12, 16, 20])
    return dict(vocab_size=r.choice([61, 97, 130]), hidden_size=heads * dim,
                num_hidden_layers=r.choice([1, 2, 4]), num_attention_heads=heads,
                num_key_value_heads=kv, intermediate_size=r.choice([20, 36, 70]),
                max_position_embeddings=r.choice([16, 48, 64]), bos_token_id=1,
                eos_token_id=2, pad_token_id=0,
                tie_word_embeddings=r.random() < 0.5)


def llama(r):
    c = common(r)
    dim = c["hidden_size"] // c["num_attention_heads"]
    if r.random() < 0.4:
        dim = c["head_dim"] = r.choice([6, 10, 24])
    c.update(rope_parameters=rope(r, dim), attention_bias=r.random() < 0.4,
             mlp_bias=r.random() < 0.3, rms_norm_eps=r.choice([1e-5, 1e-6]),
             hidden_act=r.choice(["silu", "silu", "gelu", "relu",
                                  "gelu_pytorch_tanh"]))
    return "LlamaConfig", c


def mistral(r):
    c = common(r)
    c.update(sliding_window=r.choice([None, 5, 16, 100]),
             rope_parameters=rope(r, c["hidden_size"] //
                                  c["num_attention_heads"]))
    return "MistralConfig", c


def qwen2(r):
    c = common(r)
    use = r.random() < 0.6
    c.update(use_sliding_window=use, sliding_window=r.choice([4, 9]),
             max_window_layers=r.choice([0, 1, 3]),
             rope_parameters=rope(r, c["hidden_size"] //
                                  c["num_attention_heads"]))
    if use and r.random() < 0.5:
        c["layer_types"] = [r.choice(["sliding_attention", "full_attention"])
                            for _ in range(c["num_hidden_layers"])]
    return "Qwen2Config", c


def qwen3(r):
    c = common(r)
    dim = r.choice([8, 14])
    c.update(head_dim=dim, attention_bias=r.random() < 0.3,
             rope_parameters=rope(r, dim))
    if r.random() < 0.3:
        c.update(use_sliding_window=True, sliding_window=r.choice([4, 9]),
                 max_window_layers=r.choice([0, 1, 3]))
    return "Qwen3Config", c


def gemma(r):
    c = common(r)
    c.update(head_dim=r.choice([8, 12]), tie_word_embeddings=True)
    return "GemmaConfig", c


def gemma2(r):
    c = common(r)
    c.update(head_dim=r.choice([8, 12]), sliding_window=r.choice([4, 12]),
             query_pre_attn_scalar=r.choice([8, 24]), tie_word_embeddings=True,
             attn_logit_softcapping=r.choice([None, 5.0, 50.0]),
             final_logit_softcapping=r.choice([None, 4.0, 30.0]),
             hidden_activation=r.choice(["gelu_pytorch_tanh", "gelu", "silu"]))
    return "Gemma2Config", c


def gemma3(r):
    c = common(r)
    dim = r.choice([8, 12])
    full = rope(r, dim)
    full.pop("truncate", None)  # transformers looks for it one level above
    c.update(head_dim=dim, sliding_window=r.choice([4, 12]),
             query_pre_attn_scalar=r.choice([8, 24]), tie_word_embeddings=True,
             num_hidden_layers=4,
             layer_types=[r.choice(["sliding_attention", "full_attention"])
                          for _ in range(4)],
             final_logit_softcapping=r.choice([None, 5.0]),
             rope_parameters={
                 "full_attention": full,
                 "sliding_attention": {"rope_type": "default",
                                       "rope_theta": r.choice([1e4, 5e4])}})
    return "Gemma3TextConfig", c


def phi3(r):
    c = common(r)
    c.update(sliding_window=r.choice([None, 9]),
             rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                              "partial_rotary_factor":
                              r.choice([1.0, 0.5])})
    if r.random() < 0.4:
        half = c["hidden_size"] // c["num_attention_heads"] // 2
        c.update(original_max_position_embeddings=16,
                 max_position_embeddings=64,
                 rope_parameters={
                     "rope_type": "longrope", "rope_theta": 10000.0,
                     "partial_rotary_factor": 1.0,
                     "original_max_position_embeddings": 16,
                     **{k: [r.uniform(1, 6) for _ in range(half)]
                        for k in ("short_factor", "long_factor")}})
    return "Phi3Config", c


def gpt2(r):
    heads = r.choice([1, 2, 4])
    return "GPT2Config", dict(
        vocab_size=r.choice([61, 97]), n_embd=heads * r.choice([8, 12]),
        n_layer=r.choice([1, 3]), n_head=heads, n_positions=64,
        n_inner=r.choice([None, 40]), bos_token_id=1, eos_token_id=2,
        scale_attn_weights=r.random() < 0.8,
        scale_attn_by_inverse_layer_idx=r.random() < 0.4,
        activation_function=r.choice(["gelu_new", "gelu", "relu"]),
        tie_word_embeddings=r.random() < 0.7)


def gpt_neox(r):
    c = common(r, head=r.choice([8, 16]))
    c.pop("num_key_value_heads")
    c.update(use_parallel_residual=r.random() < 0.5,
             attention_bias=r.random() < 0.7,
             hidden_act=r.choice(["gelu", "gelu_new"]),
             rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                              "partial_rotary_factor":
                              r.choice([0.25, 0.5, 1.0])})
    return "GPTNeoXConfig", c


def bloom(r):
    heads = r.choice([1, 2, 3, 6, 8])
    return "BloomConfig", dict(
        vocab_size=97, hidden_size=heads * 8, n_layer=r.choice([1, 3]),
        n_head=heads, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        apply_residual_connection_post_layernorm=r.random() < 0.5)


def opt(r):
    c = common(r)
    hidden = c["hidden_size"]
    post = r.random() < 0.4
    return "OPTConfig", dict(
        vocab_size=c["vocab_size"], hidden_size=hidden,
        num_hidden_layers=c["num_hidden_layers"], ffn_dim=36,
        num_attention_heads=c["num_attention_heads"],
        max_position_embeddings=64, do_layer_norm_before=not post,
        word_embed_proj_dim=r.choice([hidden, 16]), enable_bias=r.random() < 0.7,
        layer_norm_elementwise_affine=r.random() < 0.8, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
        activation_function=r.choice(["relu", "gelu"]))


FAMILIES = [llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, phi3, gpt2,
            gpt_neox, bloom, opt]


def make(r, kind, settings, dtype, out, seed):
    torch.manual_seed(seed)
    config = getattr(tf, kind)(**settings)
    model = tf.AutoModelForCausalLM.from_config(config,
                                                attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(p + 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (1.3 / p.shape[-1] ** 0.5))
    model.to(dtype).save_pretrained(out)
    model = tf.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager").eval()
    most = getattr(config, "max_position_embeddings", 64)
    n = min(most, r.choice([1, 8, 17, 40, 64]))
    ids = torch.randint(0, config.vocab_size, (r.choice([1, 2, 5]), n))
    with torch.no_grad():
        return ids.numpy().astype(np.int64), model(ids).logits.float().numpy()


def compare(tveval, out, ids, want):
    np.save(os.path.join(out, "ids.npy"), ids)
    at = os.path.join(out, "got.npy")
    p = subprocess.run([tveval, "logits", out, "--ids",
                        os.path.join(out, "ids.npy"), "-o", at],
                       capture_output=True, text=True)
    if p.returncode:
        return f"exit {p.returncode}: {p.stderr.strip()[-200:]}"
    got = np.load(at)
    if got.shape != want.shape:
        return f"shape {got.shape}, not {want.shape}"
    off = np.abs(got - want).max() / max(1.0, np.abs(want).max() / 10)
    two = np.sort(want, -1)[..., -2:]
    clear = two[..., 1] - two[..., 0] > 1e-3
    if off > 2e-4:
        return f"off by {off:.1e}, logits up to {np.abs(want).max():.1f}"
    if not (got.argmax(-1) == want.argmax(-1))[clear].all():
        return "another argmax"
    return off


def main():
    tveval = os.path.abspath(sys.argv[1])
    each = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    failed = 0
    for family in FAMILIES:
        if len(sys.argv) > 4 and family.__name__ not in sys.argv[4:]:
            continue
        worst = 0
        for i in range(each):
            r = random.Random(f"{seed} {family.__name__} {i}")
            kind, settings = family(r)
            dtype = r.choice([torch.bfloat16, torch.float16, torch.float32])
            four = r.random() < 0.5 and "layer_types" not in settings
            with tempfile.TemporaryDirectory() as out:
                ids, want = make(r, kind, settings, dtype, out, i)
                path = os.path.join(out, "config.json")
                if four:
                    with open(path, encoding="utf-8") as f:
                        config = spell4(json.load(f))
                    with open(path, "w", encoding="utf-8") as f:
                        json.dump(config, f)
                result = compare(tveval, out, ids, want)
            if isinstance(result, str):
                failed += 1
                print(f"FAIL {family.__name__} {i}: {result}\n  {settings} "
                      f"{dtype}{' transformers 4' if four else ''}", flush=True)
            else:
                worst = max(worst, result)
        print(f"{family.__name__}: {each} models, {worst:.1e}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
