#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/adapters: one small adapter per PEFT variant, with what
PEFT itself makes of it.

    make_adapters.py OUT        (needs torch, transformers and peft from PyPI)

Earlier versions of PEFT (0.10 was tried) write what they know; the cases they
do not know are named and left out.

Per case: base.safetensors, adapter/ as save_pretrained writes it, and
merged.safetensors, the result of merge_and_unload() in fp32. Weights are random
(fixed seeds) and adapters as large as the weights, so that an error in the
delta is not hidden behind them. tests/e2e/adapters.py reads the files; it needs
none of these packages.
"""
import contextlib
import json
import os
import shutil
import sys

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, LlamaForCausalLM

OUT = sys.argv[1]
LINEAR = ["q_proj", "v_proj", "down_proj"]


def llama():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=24, hidden_size=12, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        attention_bias=True, tie_word_embeddings=False))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=24, n_positions=8, n_embd=12, n_layer=1, n_head=2))


class Experts(torch.nn.Module):
    """Stacked as [expert, out, in], or transposed."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        turn = (lambda a, b: (b, a)) if transposed else (lambda a, b: (a, b))
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(3, *turn(14, 9)))
        self.down_proj = torch.nn.Parameter(torch.zeros(3, *turn(9, 7)))


class Custom(torch.nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Module()])
        for name, part in parts.items():
            self.model.layers[0].add_module(name, part)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return x


def fill(model, seed):
    """Everything random, adapters too: a fresh LoRA B is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)


def plain_names(model):
    return {k: v.detach().clone().contiguous()
            for k, v in model.state_dict().items()
            if not k.endswith(("attn.bias", "masked_bias", "inv_freq"))}


def case(name, model, edit=None, save=None, **config):
    d = os.path.join(OUT, name)
    shutil.rmtree(d, ignore_errors=True)
    os.makedirs(d)
    fill(model, 1)
    base = plain_names(model)
    if model.__class__.__name__.endswith("LMHeadModel"):
        base.pop("lm_head.weight", None)
    save_file(base, os.path.join(d, "base.safetensors"))
    config.setdefault("r", 3)
    config.setdefault("lora_alpha", 5)
    unknown = set(config) - set(LoraConfig.__dataclass_fields__)
    if unknown:
        shutil.rmtree(d)
        print(f"{name}: PEFT {peft.__version__} has no {sorted(unknown)}")
        return
    try:
        pm = get_peft_model(model, LoraConfig(lora_dropout=0.0, **config))
    except (TypeError, ValueError, RuntimeError) as e:
        shutil.rmtree(d)
        print(f"{name}: PEFT {peft.__version__} says {e}")
        return
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for n, p in sorted(pm.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.6)
    pm.save_pretrained(os.path.join(d, "adapter"), **(save or {}))
    for junk in ("README.md",):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(d, "adapter", junk))
    merged = plain_names(pm.merge_and_unload())
    merged = {k: v for k, v in merged.items() if k in base}
    assert set(merged) == set(base), set(merged) ^ set(base)
    save_file(merged, os.path.join(d, "merged.safetensors"))
    if edit:
        edit(os.path.join(d, "adapter"))
    delta = sum(float((merged[k].double() - base[k].double()).norm() ** 2)
                for k in base) ** 0.5
    print(f"{name}: |delta| {delta:.3f}")


def rename_default(d):
    """As files of early versions: the adapter's name inside the keys."""
    path = os.path.join(d, "adapter_model.safetensors")
    t = load_file(path)
    t = {k.replace(".lora_A.weight", ".lora_A.default.weight")
         .replace(".lora_B.weight", ".lora_B.default.weight")
         .replace("magnitude_vector", "magnitude_vector.default.weight"): v
         for k, v in t.items()}
    save_file(t, path)


def to_bin(d):
    path = os.path.join(d, "adapter_model.safetensors")
    torch.save(load_file(path), os.path.join(d, "adapter_model.bin"))
    os.remove(path)


def set_key(**kw):
    def edit(d):
        path = os.path.join(d, "adapter_config.json")
        c = json.load(open(path))
        c.update(kw)
        json.dump(c, open(path, "w"), indent=2)
    return edit


case("plain", llama(), target_modules=LINEAR)
case("rslora", llama(), target_modules=LINEAR, use_rslora=True)
case("patterns", llama(), target_modules=LINEAR,
     rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 5},
     alpha_pattern={"layers.0.mlp.down_proj": 7, "q_proj": 2})
case("patterns_rslora", llama(), target_modules=LINEAR, use_rslora=True,
     rank_pattern={"^model.*v_proj": 2}, alpha_pattern={"v_proj": 9})
case("regex", llama(), target_modules=r".*\.1\.mlp\.(up|gate)_proj")
case("all_linear", llama(), target_modules="all-linear",
     layers_to_transform=None)
case("layers", llama(), target_modules=LINEAR, layers_to_transform=[1])
case("default_keys", llama(), target_modules=LINEAR, edit=rename_default)
case("bin", llama(), target_modules=LINEAR, edit=to_bin)
case("dora", llama(), target_modules=LINEAR, use_dora=True)
case("dora_rslora_default", llama(), target_modules=LINEAR, use_dora=True,
     use_rslora=True, edit=rename_default)
case("dora_conv1d", gpt2(), target_modules=["c_attn", "c_proj"],
     fan_in_fan_out=True, use_dora=True)
case("dora_embedding", llama(), target_modules=["embed_tokens", "q_proj"],
     use_dora=True)
case("conv1d", gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
case("embedding", llama(), target_modules=["embed_tokens", "k_proj"])
case("lora_bias", llama(), target_modules=["q_proj", "o_proj"], lora_bias=True)
case("bias_all", llama(), target_modules=["q_proj"], bias="all")
case("bias_lora_only", llama(), target_modules=["q_proj", "o_proj"],
     bias="lora_only")
case("modules_to_save", llama(), target_modules=["q_proj"],
     modules_to_save=["lm_head", "norm"])
case("trainable_tokens", llama(), target_modules=["q_proj"],
     trainable_token_indices=[3, 17])
case("trainable_tokens_map", llama(), target_modules=["q_proj"],
     trainable_token_indices={"embed_tokens": [20, 1, 5]})
case("conv2d", Custom(conv=torch.nn.Conv2d(4, 6, 3),
                      point=torch.nn.Conv2d(6, 5, 1)),
     target_modules=["conv", "point"])
case("dora_conv2d", Custom(conv=torch.nn.Conv2d(4, 6, 3)),
     target_modules=["conv"], use_dora=True)
case("experts", Custom(experts=Experts(False)), target_modules=[],
     target_parameters=["experts.gate_up_proj", "experts.down_proj"])
case("experts_transposed", Custom(experts=Experts(True)), target_modules=[],
     target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2)
case("experts_one", Custom(experts=Experts(False)), target_modules=[],
     target_parameters=["experts.down_proj"], use_rslora=True)
case("gaussian", llama(), target_modules=LINEAR, init_lora_weights="gaussian")


def converted(kind):
    """PiSSA and OLoRA converted to plain LoRA on the untouched base."""
    d = os.path.join(OUT, kind + "_converted")
    shutil.rmtree(d, ignore_errors=True)
    os.makedirs(d)
    model = llama()
    fill(model, 1)
    base = plain_names(model)
    save_file(base, os.path.join(d, "base.safetensors"))
    pm = get_peft_model(model, LoraConfig(
        r=2, lora_alpha=3, target_modules=LINEAR, init_lora_weights=kind))
    first = os.path.join(d, "init")
    pm.peft_config["default"].init_lora_weights = True
    pm.save_pretrained(first)
    pm.peft_config["default"].init_lora_weights = kind
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for n, p in sorted(pm.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.6)
    pm.save_pretrained(os.path.join(d, "adapter"),
                       path_initial_model_for_weight_conversion=first)
    merged = plain_names(pm.merge_and_unload())
    save_file({k: merged[k] for k in base},
              os.path.join(d, "merged.safetensors"))
    # The same adapter unconverted must be refused: its base is another.
    bad = os.path.join(OUT, kind + "_refused")
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(os.path.join(d, "adapter"), os.path.join(bad, "adapter"))
    set_key(init_lora_weights=kind)(os.path.join(bad, "adapter"))
    shutil.copy(os.path.join(d, "base.safetensors"), bad)
    shutil.rmtree(first)
    for x in (d, bad):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(x, "adapter", "README.md"))


for which in ("pissa", "olora"):
    try:
        converted(which)
    except (TypeError, ValueError, RuntimeError) as error:
        shutil.rmtree(os.path.join(OUT, which + "_converted"))
        print(f"{which}: PEFT {peft.__version__} says {error}")
with open(os.path.join(OUT, "VERSIONS"), "w") as f:
    f.write(f"peft {peft.__version__}, torch {torch.__version__}; "
            "tools/adapters/make_adapters.py\n")
