#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""matrix.py BIN_DIR

Methods of matrix scope against the formulas of their papers in numpy (fp64
singular value decompositions, which the programs do not take), on layers of
every shape; what becomes of other tensors; the memory that plans ask for; the
same bytes for any number of threads.
"""
import json
import os
import sys

import numpy as np

from common import (check, finish, read_safetensors, run, run_json, temp,
                    write_safetensors)

BIN = os.path.abspath(sys.argv[1])
TVMERGE = os.path.join(BIN, "tvmerge")
D, MLP, KV, VOCAB = 48, 110, 24, 64
LAYER = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (KV, D),
         "self_attn.v_proj": (KV, D), "self_attn.o_proj": (D, D),
         "mlp.gate_proj": (MLP, D), "mlp.up_proj": (MLP, D),
         "mlp.down_proj": (D, MLP)}
OTHER = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,),
         "lm_head.weight": (VOCAB, D),
         "model.layers.0.input_layernorm.weight": (D,),
         "model.layers.0.post_attention_layernorm.weight": (D,)}
MATRICES = {f"model.layers.0.{k}.weight": v for k, v in LAYER.items()}
SHAPES = {**OTHER, **MATRICES}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
          "hidden_size": D, "intermediate_size": MLP, "num_hidden_layers": 1,
          "num_attention_heads": 4, "num_key_value_heads": 2,
          "vocab_size": VOCAB, "max_position_embeddings": 64,
          "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def save(path, tensors, config=CONFIG):
    os.makedirs(path)
    write_safetensors(os.path.join(path, "model.safetensors"),
                      {k: ("F32", v.shape, v.astype("<f4").tobytes())
                       for k, v in tensors.items()})
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f)


def load(path):
    return {k: np.frombuffer(raw, "<f4").reshape(shape).astype(np.float64)
            for k, (_, shape, raw) in read_safetensors(path).items()}


# ---- the papers -----------------------------------------------------------


def polar(m, eps=1e-5):
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    r = s > eps * s[0]
    return u[:, r] @ vt[r]


def tsv(ts):
    if ts[0].shape[0] < ts[0].shape[1]:
        return tsv([t.T for t in ts]).T
    k = max(1, min(ts[0].shape) // len(ts))
    us, ss, vs = [], [], []
    for t in ts:
        u, s, vt = np.linalg.svd(t, full_matrices=False)
        n = min(k, int((s > s[0] * 2.0 ** -20).sum()))
        us.append(u[:, :n]), ss.append(s[:n]), vs.append(vt[:n].T)
    u, s, v = (np.concatenate(x, axis=-1) for x in (us, ss, vs))
    return polar(u) @ np.diag(s) @ polar(v).T


def iso_c(ts):
    u, s, vt = np.linalg.svd(sum(ts), full_matrices=False)
    r = s > s[0] * 2.0 ** -20
    return s[r].sum() / len(s) * u[:, r] @ vt[r]


def wudi(ts, reg=0.01):
    cs = [t.T @ t / (t * t).sum() for t in ts]
    e = reg * np.trace(sum(cs)) / ts[0].shape[1]
    a = sum(cs) + e * np.eye(ts[0].shape[1])
    b = sum(t @ c for t, c in zip(ts, cs)) + e * sum(ts)
    return np.linalg.solve(a, b.T).T


METHODS = {"tsv": tsv, "iso_c": iso_c, "wudi": wudi}

# ---- cases ----------------------------------------------------------------


def recipe(path, method, n, weights=None, params=None):
    lines = [f"merge_method: {method}", "base_model: base", "models:"]
    for i in range(n):
        lines.append(f"- model: ft{i}")
        if weights:
            lines.append(f"  parameters: {{weight: {weights[i]}}}")
    if params:
        lines.append("parameters: {" + ", ".join(
            f"{k}: {v}" for k, v in params.items()) + "}")
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")


def relative(got, want, base):
    return np.linalg.norm(got - base - want) / np.linalg.norm(want)


def compare(where, name, base, fts, out, weights, lam, function):
    ws = weights or [1.0] * len(fts)
    got = load(out)
    worst = 0.0
    for k in SHAPES:
        ts = [w * (ft[k] - base[k]) for w, ft in zip(ws, fts)]
        want = function(ts) if k in MATRICES else sum(ts) / len(ts)
        r = relative(got[k], lam * want, base[k])
        worst = max(worst, r)
        check(r < 1e-4, f"{where}: {name} of {k} is {r:.2e} off")
    return worst


def models(where, n, rank=None, seed=1, transposed=False):
    rng = np.random.default_rng(seed)
    base = {k: 0.05 * rng.standard_normal(s) for k, s in SHAPES.items()}
    fts = []
    for _ in range(n):
        ft = {}
        for k, s in SHAPES.items():
            d = rng.standard_normal(s)
            if rank and len(s) == 2:
                d = rng.standard_normal((s[0], rank)) @ \
                    rng.standard_normal((rank, s[1]))
            ft[k] = base[k] + 0.01 * d * (1 + rng.random(s[-1]))
        fts.append(ft)
    os.makedirs(where)
    save(os.path.join(where, "base"), base)
    for i, ft in enumerate(fts):
        save(os.path.join(where, f"ft{i}"), ft)
    return load(os.path.join(where, "base")), [
        load(os.path.join(where, f"ft{i}")) for i in range(n)]


def formulas(tmp):
    worst = {}
    for label, n, rank, weights, lam in (
            ("one", 1, None, None, 1.0), ("two", 2, None, [0.5, 1.25], 1.0),
            ("three", 3, None, None, 0.7), ("many", 30, None, None, 1.0),
            ("low-rank", 3, 5, None, 1.0)):
        where = os.path.join(tmp, label)
        base, fts = models(where, n, rank)
        for name, function in METHODS.items():
            path = os.path.join(where, name + ".yml")
            recipe(path, name, n, weights, {"lambda": lam})
            out = os.path.join(where, name)
            run(TVMERGE, "run", path, out, cwd=where, code=0)
            w = compare(label, name, base, fts, out, weights, lam, function)
            worst[name] = max(w, worst.get(name, 0.0))
    print("worst relative error of a delta:",
          {k: f"{v:.1e}" for k, v in worst.items()})


def special(tmp):
    where = os.path.join(tmp, "special")
    base, fts = models(where, 2)
    k = next(iter(MATRICES))
    # No change at all; the same change twice; a value that is no number.
    same = {**base, k: fts[0][k]}
    save(os.path.join(where, "none"), base)
    save(os.path.join(where, "still"), base)
    save(os.path.join(where, "again"), fts[0])
    hole = {n: x.copy() for n, x in same.items()}
    hole[k][3, 4] = np.nan
    save(os.path.join(where, "hole"), hole)
    for name in METHODS:
        for label, pair in (("none", ("none", "still")),
                            ("again", ("ft0", "again")),
                            ("hole", ("ft0", "hole")),
                            ("half", ("ft0", "none"))):
            path = os.path.join(where, f"{name}-{label}.yml")
            with open(path, "w") as f:
                f.write(f"merge_method: {name}\nbase_model: base\nmodels:\n" +
                        "".join(f"- model: {m}\n" for m in pair))
            out = os.path.join(where, f"{name}-{label}")
            run(TVMERGE, "run", path, out, cwd=where, code=0)
            got = load(out)
            if label == "none":
                check(all(np.array_equal(got[x], base[x]) for x in got),
                      f"{name}: no task vector, but not the base")
            elif label == "hole":
                check(np.isnan(got[k]).sum() == 1 and np.isnan(got[k][3, 4]),
                      f"{name}: one NaN became {np.isnan(got[k]).sum()}")
            elif label == "half":
                check(all(np.isfinite(got[x]).all() for x in got),
                      f"{name}: a model without changes gives NaN")
            else:
                t = fts[0][k] - base[k]
                want = METHODS[name]([t, t])
                r = relative(got[k], want, base[k])
                check(r < 1e-4, f"{name}: the same model twice: {r:.2e}")


def gpt2(tmp):
    """Conv1D keeps weights as [in, out]: WUDI's sides are its inputs'."""
    where = os.path.join(tmp, "gpt2")
    os.makedirs(where)
    rng = np.random.default_rng(3)
    name = "h.0.mlp.c_fc.weight"
    shapes = {"wte.weight": (VOCAB, D), "wpe.weight": (32, D),
              "ln_f.weight": (D,), "ln_f.bias": (D,), name: (D, 4 * D),
              "h.0.mlp.c_fc.bias": (4 * D,),
              "h.0.mlp.c_proj.weight": (4 * D, D), "h.0.mlp.c_proj.bias": (D,),
              "h.0.attn.c_attn.weight": (D, 3 * D),
              "h.0.attn.c_attn.bias": (3 * D,),
              "h.0.attn.c_proj.weight": (D, D), "h.0.attn.c_proj.bias": (D,)}
    for i in (1, 2):
        for b in ("weight", "bias"):
            shapes[f"h.0.ln_{i}.{b}"] = (D,)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
              "n_embd": D, "n_layer": 1, "n_head": 4, "n_positions": 32,
              "vocab_size": VOCAB}
    base = {k: 0.05 * rng.standard_normal(s) for k, s in shapes.items()}
    for m in ("base", "ft0", "ft1"):
        d = 0.01 if m != "base" else 0.0
        save(os.path.join(where, m),
             {k: v + d * rng.standard_normal(v.shape) for k, v in base.items()},
             config)
    b, f0, f1 = (load(os.path.join(where, m)) for m in ("base", "ft0", "ft1"))
    path = os.path.join(where, "r.yml")
    recipe(path, "wudi", 2)
    run(TVMERGE, "run", path, os.path.join(where, "out"), cwd=where, code=0)
    got = load(os.path.join(where, "out"))
    for k in (name, "h.0.mlp.c_proj.weight", "h.0.attn.c_attn.weight"):
        want = wudi([(f[k] - b[k]).T for f in (f0, f1)]).T
        r = relative(got[k], want, b[k])
        check(r < 1e-4, f"wudi of {k} [in, out] is {r:.2e} off")


def engine(tmp):
    where = os.path.join(tmp, "three")
    for name in METHODS:
        path = os.path.join(where, name + ".yml")
        plan = run_json(TVMERGE, "plan", path, "--json", cwd=where)
        check(any("mean of the task vectors" in p["message"]
                  for p in plan["problems"]),
              f"{name}: the plan does not say what becomes of other tensors")
        digests = set()
        for i, extra in enumerate((["--threads", "1"], ["--threads", "2"],
                                   ["--threads", "5"],
                                   ["--memory", "8MiB", "--threads", "1"])):
            out = os.path.join(where, f"{name}-{i}")
            r = run_json(TVMERGE, "run", path, out, "--json", *extra,
                         cwd=where)
            digests.add(r.get("digest"))
        check(len(digests) == 1, f"{name}: {len(digests)} digests over threads")


def budget(tmp):
    """One matrix of 1,500 columns does not fit 16 MiB, and the plan says so."""
    where = os.path.join(tmp, "budget")
    os.makedirs(where)
    n = 1500
    rng = np.random.default_rng(2)
    w = rng.standard_normal((n, n)).astype("<f4")
    for m in ("base", "ft0", "ft1"):
        os.makedirs(os.path.join(where, m))
        write_safetensors(
            os.path.join(where, m, "model.safetensors"),
            {"layers.0.proj.weight": ("F32", (n, n), w.tobytes())})
    for name in METHODS:
        path = os.path.join(where, name + ".yml")
        recipe(path, name, 2)
        r = run(TVMERGE, "run", path, os.path.join(where, name), "--memory",
                "16MiB", cwd=where, code=5)
        check("memory" in r.stderr, f"{name}: {r.stderr.strip()}")
        check(not os.path.exists(os.path.join(where, name)),
              f"{name}: something was written")


tmp = temp()
formulas(tmp)
special(tmp)
gpt2(tmp)
engine(tmp)
budget(tmp)
finish("matrix")
