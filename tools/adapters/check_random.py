#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Property test: random adapters give what PEFT makes of them.

    pip install torch transformers peft
    check_random.py TVMERGE [CASES [SEED]]

Small random models with one to three random adapters: ranks, alphas, patterns,
rslora, DoRA, biases, embeddings, modules_to_save, lora_bias, trained tokens,
targets by list, pattern or "all-linear", bases of 16 bit. MODEL+ADAPTER must be
merge_and_unload() in fp32 within 1e-5 of the change, MODEL+A*x+B*y the sum of
the changes; `--compat peft` must be add_weighted_adapter() within 1e-5, all
combination types but for random masks. Prints differences and counts; exit 1 if
there is one.
"""
import argparse
import collections
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")
import torch
import transformers as tf
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
LM = dict(vocab_size=24, hidden_size=12, intermediate_size=20,
          num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
          bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "Llama": (dict(LM, attention_bias=True),
              ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
               "down_proj"], "embed_tokens"),
    "Qwen2": (LM, ["q_proj", "v_proj", "up_proj", "down_proj"],
              "embed_tokens"),
    "GPT2": (dict(vocab_size=24, n_positions=8, n_embd=12, n_layer=2, n_head=2),
             ["c_attn", "c_proj", "c_fc"], "wte"),
    "OPT": (dict(LM, ffn_dim=20, word_embed_proj_dim=12),
            ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
            "embed_tokens"),
}
TYPES = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties",
         "dare_linear_svd", "dare_ties_svd", "magnitude_prune",
         "magnitude_prune_svd"]


def base_model(r, path):
    name = r.choice(sorted(FAMILIES))
    settings, linear, embed = FAMILIES[name]
    settings = dict(settings)
    if name != "OPT":
        settings["tie_word_embeddings"] = r.random() < 0.5
    model = tf.AutoModelForCausalLM.from_config(
        getattr(tf, name + "Config")(**settings))
    fill(model, r.getrandbits(30))
    model.to(r.choice([torch.float32, torch.bfloat16, torch.float16])
             ).save_pretrained(path)
    return name, linear, embed, settings.get("tie_word_embeddings", True)


def load(path):
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def fill(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.4)


def settings_of(r, family, linear, embed, tied, plain):
    """plain: what may be merged into an adapter."""
    targets = r.sample(linear, r.randint(1, len(linear)))
    c = dict(r=r.choice([1, 2, 3, 5]), lora_alpha=r.choice([1, 2, 7, 0.5]),
             use_rslora=r.random() < 0.3, target_modules=targets,
             fan_in_fan_out=family == "GPT2")
    if r.random() < 0.3:
        c["rank_pattern"] = {r.choice(targets): r.choice([1, 4])}
    if r.random() < 0.3:
        c["alpha_pattern"] = {r.choice(targets): r.choice([3, 9])}
    if r.random() < 0.2:
        c["layers_to_transform"] = [r.randrange(2)]
    if plain:
        return c
    kind = r.random()
    if kind < 0.2:
        c["target_modules"] = "|".join(f".*{t}" for t in targets)
    elif kind < 0.3:
        c["target_modules"] = "all-linear"
    if isinstance(c["target_modules"], str):
        c.pop("layers_to_transform", None)
    if r.random() < 0.3:
        c["use_dora"] = True
    elif r.random() < 0.2 and family != "Qwen2":
        c["lora_bias"] = True
    if r.random() < 0.3:
        c["bias"] = r.choice(["all", "lora_only"])
    extra = r.random()
    if isinstance(c["target_modules"], list) and (
            "layers_to_transform" not in c):
        if extra < 0.2 and not c.get("lora_bias"):
            c["target_modules"] = targets + [embed]
        elif extra < 0.35 and not tied:
            c["modules_to_save"] = [embed]
        elif extra < 0.5 and not tied:
            c["modules_to_save"] = ["lm_head"]
        elif extra < 0.6 and not c.get("use_dora"):
            c["trainable_token_indices"] = r.sample(range(24), 3)
    return c


def make(r, base, path, c):
    model = get_peft_model(load(base), LoraConfig(
        init_lora_weights=r.choice([True, "gaussian", False]), **c))
    fill(model, r.getrandbits(30))
    model.save_pretrained(path)
    return model


def tensors_of(path):
    out = {}
    for f in os.listdir(path):
        if f.endswith(".safetensors"):
            out.update(load_file(os.path.join(path, f)))
    return {k: v.double() for k, v in out.items()}


def run(args, doc, out, *more):
    with open("r.yml", "w", encoding="utf-8") as f:
        yaml.safe_dump(doc, f, sort_keys=False)
    p = subprocess.run([args.tvmerge, "run", "r.yml", out, "-q", "--no-sync",
                        "--force", *more], capture_output=True, text=True)
    return p.stderr.strip() if p.returncode else None


def unloaded(base, adapter):
    model = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    return {k: v.detach().double() for k, v in model.state_dict().items()}


def away(got, want, base):
    """The largest error of a tensor, of its change."""
    worst = (0.0, "")
    for k, w in want.items():
        if k not in got:
            if k != "lm_head.weight":
                worst = max(worst, (9.0, f"{k} is missing"))
            continue
        off = (got[k] - w).norm().item()
        change = (w - base[k]).norm().item() if base is not None else (
            w.norm().item())
        worst = max(worst, (off / max(change, 1e-3 * w.norm().item(), 1e-9), k))
    return worst


def whole(args, r, say, base, names):
    before = {k: v.detach().double()
              for k, v in load(base).state_dict().items()}
    after = [unloaded(base, n) for n in names]
    for n, want in zip(names, after):
        no = run(args, {"merge_method": "passthrough", "out_dtype": "float32",
                        "models": [{"model": f"base+{n}"}]}, "out")
        if no:
            say(f"{n} refused: {no[-300:]}")
            return "refused"
        err = away(tensors_of("out"), want, before)
        if err[0] > 1e-5:
            say(f"{n}: {err[0]:.1e} {err[1]}")
    if len(names) > 1:
        w = [r.choice([0.5, 1, -0.3, 2]) for _ in names]
        ref = "base+" + "+".join(f"{n}*{x}" for n, x in zip(names, w))
        no = run(args, {"merge_method": "passthrough", "out_dtype": "float32",
                        "models": [{"model": ref}]}, "out")
        if no:
            say(f"{ref} refused: {no[-300:]}")
            return "refused"
        want = {k: v + sum(x * (a[k] - v) for x, a in zip(w, after))
                for k, v in before.items()}
        err = away(tensors_of("out"), want, before)
        if err[0] > 1e-5:
            say(f"{ref}: {err[0]:.1e} {err[1]}")
    return "merged into the model"


def deltas(model, name):
    return {n: m.get_delta_weight(name).detach().double()
            for n, m in model.named_modules()
            if hasattr(m, "get_delta_weight") and name in m.lora_A}


def combined(args, r, say, base, names):
    kind = r.choice(TYPES)
    w = [r.choice([0.5, 1.0, 0.7, -0.4, 2.0]) for _ in names]
    density = 1.0 if kind.startswith("dare") else r.choice([0.3, 0.5, 0.9])
    more = {}
    if kind not in ("linear", "cat", "svd"):
        more["density"] = density
    if "ties" in kind:
        more["majority_sign_method"] = r.choice(["total", "frequency"])
    rank = r.choice([None, 1, 3, 6]) if "svd" in kind else None
    doc = {"merge_method": kind, "models": [
        {"model": n, "parameters": {"weight": x}} for n, x in zip(names, w)]}
    if more:
        doc["parameters"] = more
    if rank:
        doc["rank"] = rank
    model = PeftModel.from_pretrained(load(base), names[0], names[0])
    for n in names[1:]:
        model.load_adapter(n, n)
    try:
        model.add_weighted_adapter(names, w, "sum", kind, svd_rank=rank,
                                   svd_full_matrices=False, **more)
        no = None
    except Exception as e:
        no = f"{type(e).__name__}: {e}"
    ours = run(args, doc, "sum", "--compat", "peft")
    if no and ours:
        return f"{kind}: both refuse"
    if no:  # layers_to_transform, unequal ranks of different modules
        return f"{kind}: PEFT refuses"
    if ours:
        say(f"{doc} refused: {ours[-300:]}")
        return f"{kind}: refused"
    want = deltas(model, "sum")
    got = deltas(PeftModel.from_pretrained(load(base), "sum", "sum"), "sum")
    first = model.peft_config[names[0]]
    if first.layers_to_transform is not None:  # PEFT loses other layers then
        want, got = ({k: d[k] for k in d if k in want} for d in (want, got))
    if first.use_rslora:  # and scales its own sum once more
        by = model.peft_config["sum"].r ** 0.5
        want = {k: v / by for k, v in want.items()}
    if set(want) != set(got):
        say(f"{doc}: modules {sorted(set(want) ^ set(got))[:3]}")
    err = away(got, want, None)
    if err[0] > 2e-5:
        say(f"{doc}: {err[0]:.1e} {err[1]}")
    return f"{kind}: both accept"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("tvmerge", type=os.path.abspath)
    p.add_argument("cases", nargs="?", type=int, default=60)
    p.add_argument("seed", nargs="?", type=int, default=1)
    p.add_argument("--only", type=int)
    p.add_argument("--keep", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(1)
    counts = collections.Counter()
    for i in range(args.cases):
        if args.only is not None and i != args.only:
            continue
        r = random.Random(f"{args.seed} {i}")
        work = tempfile.mkdtemp(prefix="check-adapters-")
        os.chdir(work)
        found = []
        family, linear, embed, tied = base_model(r, "base")
        plain = r.random() < 0.6
        names, configs = [], []
        same = r.choice([1, 2, 3, 5])
        for n in range(r.choice([1, 2, 2, 3])):
            c = settings_of(r, family, linear, embed, tied, plain)
            if plain and r.random() < 0.7:  # most types want equal ranks
                c["r"] = same
                c.pop("rank_pattern", None)
            try:
                make(r, "base", f"lora{n}", c)
            except Exception as e:
                counts[f"PEFT makes no such adapter ({type(e).__name__})"] += 1
                continue
            names.append(f"lora{n}")
            configs.append(c)
        if names:
            result = whole(args, r, found.append, "base", names)
            counts[result] += 1
            if plain:
                counts[combined(args, r, found.append, "base", names)] += 1
        if found:
            counts["DIFFERENT"] += 1
            print(f"== case {i} {family}")
            for f in found + configs:
                print(f"   {f}", flush=True)
        os.chdir("/")
        if args.keep:
            print(work)
        else:
            shutil.rmtree(work)
    for k, n in sorted(counts.items()):
        print(f"{n:5} {k}")
    return 1 if counts["DIFFERENT"] else 0


if __name__ == "__main__":
    sys.exit(main())
