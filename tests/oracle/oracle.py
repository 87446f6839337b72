#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""fp64 oracle of the merge methods, written from the method definitions only.

  oracle.py RECIPE OUT [--seed N] [--model-dir DIR] [--max-ulp 1.0]

Recomputes every tensor of the merged directory OUT in fp64 with numpy, from the
models that RECIPE names (relative to --model-dir), and compares bit patterns:
element-wise methods must be within max-ulp of the output type at every element,
methods with reductions within 1e-6 of the delta (relative Frobenius) or 1 ulp. Exit 0 when all
tensors hold, 1 otherwise; the last line is a summary.

Conventions that this file pins (and tvmerge must share):
  * top-k keeps k = max(1, trunc(density * n)) entries by |fp32(x - base)|,
    equal magnitudes in index order, zeros never count; with trim_scope layer
    or model of all tensors of a layer or of the output together, in the order
    of the output (numbers in names as numbers);
  * DARE keeps an element iff its Philox4x32-10 word is below
    round(density * 2^32) and divides by the density;
  * a reference base+adapter is W + scaling * B A.
Where a result cancels to nothing, fp64 itself is only good to 2^-52 of the
terms: that much is allowed on top.
It knows nothing of tvmerge's code: parameters, slices and masks are resolved
here a second time. Needs numpy, PyYAML, xxhash.
"""
import argparse
import json
import os
import re
import sys

import numpy as np
import xxhash
import yaml

METHODS = {
    # name: (consensus, sparsifier, normalize, rescale)
    "task_arithmetic": (False, None, False, False),
    "ties": (True, "magnitude", True, False),
    "dare_ties": (True, "random", False, True),
    "dare_linear": (False, "random", False, True),
    "breadcrumbs": (False, "outliers", False, False),
    "breadcrumbs_ties": (True, "outliers", False, False),
    "della": (True, "della", True, True),
    "della_linear": (False, "della", False, True),
}


# Methods whose parameters of an input are counted without the base.
BY_DONOR = set(METHODS) | {"nuslerp", "multislerp", "consensus", "emr",
                           "cabs"}
# Within 1e-6 of the delta or 1 ulp.
REDUCING = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce",
            "arcee_fusion")


# ---- safetensors ------------------------------------------------------------

def bf16_to_f64(u):
    return (u.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def read_file(path):
    with open(path, "rb") as f:
        raw = f.read()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    header.pop("__metadata__", None)
    out = {}
    for name, h in header.items():
        a, b = h["data_offsets"]
        out[name] = (h["dtype"], tuple(h["shape"]), raw[8 + n + a:8 + n + b])
    return out


def read_model(path):
    if os.path.isfile(path):
        return read_file(path)
    out = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            out.update(read_file(os.path.join(path, name)))
    return out


def values(entry):
    dtype, shape, raw = entry
    if dtype == "BF16":
        v = bf16_to_f64(np.frombuffer(raw, np.uint16))
    elif dtype == "F16":
        v = np.frombuffer(raw, np.float16).astype(np.float64)
    elif dtype == "F32":
        v = np.frombuffer(raw, np.float32).astype(np.float64)
    else:
        raise SystemExit(f"oracle: dtype {dtype}")
    return v.reshape(shape)


# ---- models -----------------------------------------------------------------

class Model:
    def __init__(self, ref, root):
        self.ref = ref
        parts = ref.split("+")
        full = os.path.join(root, ref)
        path, adapters = (full, []) if os.path.exists(full) else (
            os.path.join(root, parts[0]), parts[1:])
        self.tensors = read_model(path)
        self.config = {}
        cfg = os.path.join(path, "config.json")
        if os.path.exists(cfg):
            with open(cfg) as f:
                self.config = json.load(f)
        self.deltas = {}
        for a in adapters:
            self.add_adapter(os.path.join(root, a))

    def add_adapter(self, path):
        with open(os.path.join(path, "adapter_config.json")) as f:
            cfg = json.load(f)
        factors = read_model(path)
        for key in factors:
            if not key.endswith(".lora_A.weight"):
                continue
            stem = key[:-len(".lora_A.weight")]
            a = values(factors[key])
            b = values(factors[stem + ".lora_B.weight"])
            r = a.shape[0]
            alpha = cfg["lora_alpha"]
            scale = alpha / np.sqrt(r) if cfg.get("use_rslora") else alpha / r
            name = stem[len("base_model.model."):] + ".weight"
            d = scale * (b @ a)
            if cfg.get("fan_in_fan_out"):
                d = d.T
            self.deltas[name] = self.deltas.get(name, 0.0) + d

    def value(self, name):
        v = values(self.tensors[name])
        if name in self.deltas:
            # The engine's sources are fp32.
            v = (v + self.deltas[name]).astype(np.float32).astype(np.float64)
        return v

    def dtype(self, name):
        return self.tensors[name][0]

    def layers(self):
        for k in ("num_hidden_layers", "n_layer"):
            if k in self.config:
                return self.config[k]
        best = 0
        for n in self.tensors:
            i = layer_of(n)
            best = max(best, -1 if i is None else i[0])
        return best + 1


def layer_of(name):
    """(layer, prefix, suffix) of the first number between dots, or None."""
    parts = name.split(".")
    for i, p in enumerate(parts):
        if p.isdigit():
            return int(p), ".".join(parts[:i]), ".".join(parts[i + 1:])
    return None


POST = ("norm", "lm_head", "ln_f", "embed_out", "final_layer_norm")


def part_of(name):
    if layer_of(name):
        return "layer"
    last = name.replace(".weight", "").replace(".bias", "").split(".")[-1]
    return "post" if last in POST else "pre"


# ---- parameters -------------------------------------------------------------

def number(v):
    """YAML 1.1 reads 1e-4 as text; a parameter of type float takes it."""
    if isinstance(v, str):
        try:
            return float(v)
        except ValueError:
            return v
    return v


def interpolate(v, t):
    if not isinstance(v, list):
        return number(v)
    v = [number(x) for x in v]
    s = t * (len(v) - 1)
    if any(isinstance(x, (bool, str)) for x in v):
        return v[int(s)]
    i = int(np.floor(s))
    f = s - i
    return (1 - f) * v[i] + f * v[min(i + 1, len(v) - 1)]


def setting(s, name, t):
    """Value of one setting for a tensor, or None when it does not apply."""
    if isinstance(s, dict):
        s = [s]
    if isinstance(s, list) and s and isinstance(s[0], dict):
        for e in s:
            f = e.get("filter")
            if f is None or f == "*" or f in name:
                return interpolate(e["value"], t)
        return None
    if s is None or s == []:
        return None
    return interpolate(s, t)


def lookup(scopes, key, name, t, fallback=None):
    for s in scopes:
        if s and key in s:
            v = setting(s[key], name, t)
            if v is not None:
                return v
    return fallback


# ---- Philox -----------------------------------------------------------------

def philox(counter, key):
    m0, m1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    lo32 = np.uint64(0xFFFFFFFF)
    c = [x.astype(np.uint64) for x in counter]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = m0 * c[0], m1 * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), p1 & lo32,
             (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), p0 & lo32]
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def philox_words(n, seed, donor, name):
    key = xxhash.xxh3_64_intdigest(
        seed.to_bytes(8, "little") + donor.to_bytes(4, "little"))
    h = xxhash.xxh3_64_intdigest(name.encode())
    groups = np.arange((n + 3) // 4, dtype=np.uint64)
    z = np.zeros_like(groups)
    c = [groups & np.uint64(0xFFFFFFFF), groups >> np.uint64(32),
         z + np.uint64(h & 0xFFFFFFFF), z + np.uint64(h >> 32)]
    return np.stack(philox(c, (key & 0xFFFFFFFF, key >> 32)), 1).ravel()[:n]


def dare_mask(n, seed, donor, name, density):
    return philox_words(n, seed, donor, name) < np.uint64(
        int(np.floor(density * 2.0 ** 32 + 0.5)))


# ---- methods ----------------------------------------------------------------

def f32(v):
    return v.astype(np.float32).astype(np.float64)


def topk(d, density):
    """0/1 mask of the entries kept by magnitude."""
    m = np.abs(f32(d)).ravel()
    if density >= 1:
        return np.ones(d.shape, bool)
    keep = np.zeros(m.size, bool)
    if density > 0:
        k = max(1, int(density * m.size))
        keep[np.argsort(-m, kind="stable")[:k]] = True
        keep &= m > 0
    return keep.reshape(d.shape)


def name_key(name):
    """Layer order: runs of digits compare as numbers."""
    return [(0, int(p), p) if p.isdigit() else (1, 0, p)
            for p in re.split(r"(\d+)", name) if p]


def scoped_masks(jobs, scope, get_of):
    """{(output name, donor): (mask, factor)} for ties over several tensors.
    jobs: (name, layer key, base, donors) in the order of the output."""
    pools = {}
    for name, layer, b, donors in jobs:
        for i, (ref, x) in enumerate(donors):
            density = get_of(name)("density", i, 1.0)
            if 0 < density < 1:
                key = (ref, layer if scope == "layer" else "")
                pools.setdefault(key, []).append((name, i, x - b, density))
    out = {}
    for parts in pools.values():
        densities = {p[3] for p in parts}
        sizes = [p[2].size for p in parts]
        k = densities.pop() * sum(sizes) if len(densities) == 1 else sum(
            p[3] * n for p, n in zip(parts, sizes))
        m = np.concatenate([np.abs(f32(p[2])).ravel() for p in parts])
        keep = np.zeros(m.size, bool)
        keep[np.argsort(-m, kind="stable")[:max(1, int(k))]] = True
        keep &= m > 0
        factor = m.sum() / m[keep].sum() if m[keep].sum() >= 1e-7 else 1.0
        for (name, i, d, _), k in zip(parts, np.split(
                keep, np.cumsum(sizes)[:-1])):
            out[name, i] = (k.reshape(d.shape), factor)
    return out


def outliers(d, density, gamma):
    """Ascending by magnitude: without the largest and the smallest; ties go to
    the lowest index."""
    if density >= 1:
        return np.ones(d.shape, bool)
    m = np.abs(f32(d)).ravel()
    target, top = int(density * m.size), int(gamma * m.size)
    bot = max(0, m.size - target - top)
    order = np.argsort(-m, kind="stable")[::-1]
    keep = np.zeros(m.size, bool)
    keep[order[bot:bot + target]] = True
    return (keep & (m > 0)).reshape(d.shape)


def della_mask(d, density, eps, seed, donor, name):
    if density <= 0:
        return np.zeros(d.shape, bool)
    m = np.abs(f32(d)).reshape(-1, d.shape[-1])
    n = m.shape[1]
    rank = np.empty(m.shape)
    at = np.argsort(m, axis=1, kind="stable")
    np.put_along_axis(rank, at, np.arange(n, dtype=float)[None, :], axis=1)
    p = (density - eps) + 2 * eps * rank / (n - 1) if n > 1 else rank + density
    words = philox_words(d.size, seed, donor, name).reshape(m.shape)
    return (words < np.floor(p * 2.0 ** 32 + 0.5).astype(np.uint64)).reshape(
        d.shape)


def gta(method, b, donors, get, name, seed, chosen,
        scoped=None):
    consensus, sparsifier, norm_default, rescale_default = METHODS[method]
    if chosen is not None:
        sparsifier = None if chosen == "none" else chosen
    normalize = bool(get("normalize", None, norm_default))
    rescale = bool(get("rescale", None, rescale_default))
    lam = get("lambda", None, 1.0)
    parts, weights = [], []
    for i, x in enumerate(donors):
        w = get("weight", i, None)
        density = get("density", i, 1.0)
        d = x - b
        if scoped and (name, i) in scoped:
            mask, factor = scoped[name, i]
            d = np.where(mask, d * factor if rescale else d, 0.0)
        elif sparsifier in ("magnitude", "outliers", "della") and density < 1:
            if sparsifier == "magnitude":
                mask = topk(d, density)
            elif sparsifier == "outliers":
                mask = outliers(d, density, get("gamma", i, 0.01))
            else:
                mask = della_mask(d, density, get("epsilon", i, 0.15), seed, i,
                                  name)
            kept = np.where(mask, d, 0.0)
            if rescale:
                before = np.abs(f32(d)).sum()
                after = np.abs(f32(kept)).sum()
                if before >= 1e-7 and after >= 1e-7:
                    kept = kept * (before / after)
            d = kept
        elif sparsifier == "random" and density < 1:
            if density <= 0:
                d = np.zeros_like(d)
            else:
                m = dare_mask(d.size, seed, i, name, density).reshape(d.shape)
                d = np.where(m, d / density if rescale else d, 0.0)
        parts.append(d * w)
        weights.append(w)
    if not parts:
        return b
    total = sum(parts)
    if consensus:
        sign = np.where(total >= 0, 1.0, -1.0)
        agree = [(np.sign(p) == sign) for p in parts]
        mixed = sum(np.where(a, p, 0.0) for a, p in zip(agree, parts))
        div = sum(np.where(a, w, 0.0) for a, w in zip(agree, weights))
        # 0.1 + 0.2 - 0.3 is 0 but for rounding.
        div = np.where(np.abs(div) <= 2.0 ** -44 * sum(map(abs, weights)), 1.0,
                       div)
    else:
        mixed = total
        div = sum(weights)
        div = 1.0 if abs(div) < 1e-8 else div
    if normalize:
        mixed = mixed / div
    return b + mixed * lam


def slerp(t, a, b):
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    na, nb = (1.0 if na <= 1e-8 else na), (1.0 if nb <= 1e-8 else nb)
    c = float(np.clip(np.dot(a.ravel() / na, b.ravel() / nb), -1, 1))
    if abs(c) > 0.9995:
        return (1 - t) * a + t * b
    th = np.arccos(c)
    return (np.sin((1 - t) * th) * a + np.sin(t * th) * b) / np.sin(th)


def combine(coefs, vectors, b):
    y = sum(c * v for c, v in zip(coefs, vectors))
    return y if b is None else b + y


def norm(v):
    return float(np.linalg.norm(v.ravel()))


def nuslerp(t, v0, v1, axis):
    """Slerp of unnormalised vectors along axis (None: everything)."""
    def total(x):
        return x.sum() if axis is None else x.sum(axis=axis, keepdims=True)
    n0 = np.maximum(np.sqrt(total(v0 * v0)), 1e-7)
    n1 = np.maximum(np.sqrt(total(v1 * v1)), 1e-7)
    c = np.clip(total(v0 * v1) / n0 / n1, -1, 1)
    line = 1 - c * c <= 1e-16
    th = np.arccos(np.where(line, 0.0, c))
    s = np.where(line, 1.0, np.sin(th))
    ball = (np.sin((1 - t) * th) * v0 + np.sin(t * th) * v1) / s
    return np.where(line, (1 - t) * v0 + t * v1, ball)


def multislerp(w, xs, b, normalize, eps):
    v = [x - b if b is not None else x for x in xs]
    w = np.array(w, np.float64)
    if normalize:
        w = w / w.sum()
    lengths = [norm(x) for x in v]
    u = [x / (n + eps) for x, n in zip(v, lengths)]
    m = combine(w, u, None)
    if norm(m) < eps:
        return combine(w, v, b)
    m = m / norm(m)
    tangent = combine(w, [x - float((x * m).sum()) * m for x in u], None)
    a = norm(tangent) + eps
    y = m * np.cos(a) + tangent * (np.sin(a) / a)
    y = y * float(sum(wi * n for wi, n in zip(w, lengths)))
    return y if b is None else b + y


def karcher(xs, max_iter, tol):
    lengths = [norm(x) for x in xs]
    u = [x / n for x, n in zip(xs, lengths) if n > tol]
    if not u:
        return np.zeros_like(xs[0])
    m = sum(u) / len(u)
    m = u[0] if norm(m) < tol else m / norm(m)
    for _ in range(max_iter):
        tangent = np.zeros_like(m)
        for x in u:
            dot = float(np.clip((x * m).sum(), -1, 1))
            th = np.arccos(dot)
            if th >= tol:
                tangent = tangent + th / np.sin(th) * (x - dot * m) / len(u)
        step = norm(tangent)
        if step < tol:
            break
        m = np.cos(step) * m + np.sin(step) * tangent / step
        m = m / norm(m)
    return m * (sum(lengths) / len(xs))


def model_stock(b, xs, filter_wise):
    rows = b.ndim > 1 and filter_wise
    d = [(x - b).reshape(-1, b.shape[-1]) if rows else (x - b).reshape(1, -1)
         for x in xs]
    cos = []
    for i in range(len(d)):
        for j in range(i + 1, len(d)):
            n = np.linalg.norm(d[i], axis=1) * np.linalg.norm(d[j], axis=1)
            cos.append(np.clip((d[i] * d[j]).sum(1) / np.maximum(n, 1e-6),
                               -1, 1))
    c = np.mean(cos, axis=0)[:, None]
    by = 1 + (len(d) - 1) * c
    t = np.where(np.abs(by) < 1e-6, 0.0, len(d) * c / by)
    return b + (t * (sum(d) / len(d))).reshape(b.shape)


def sce(b, xs, topk_fraction):
    d = [x - b for x in xs]
    if topk_fraction <= 0:
        return b
    if topk_fraction < 1:
        first = [x - d[0] for x in d]
        mean = sum(first) / len(d)
        var = f32(sum((x - mean) ** 2 for x in first) / len(d)).ravel()
        k = int(np.count_nonzero(var) * topk_fraction)
        keep = np.zeros(var.size, bool)
        keep[np.argsort(-var, kind="stable")[:k]] = True
        keep &= var > 0
        d = [np.where(keep.reshape(b.shape), x, 0.0) for x in d]
    g = np.array([float((x * x).mean()) for x in d])
    g = np.full(len(d), 1 / len(d)) if g.sum() < 1e-6 else g / g.sum()
    sign = np.where(sum(d) >= 0, 1.0, -1.0)
    agree = [np.sign(x) == sign for x in d]
    mixed = sum(np.where(a, w * x, 0.0) for a, w, x in zip(agree, g, d))
    by = sum(np.where(a, w, 0.0) for a, w in zip(agree, g))
    return b + mixed / np.maximum(by, 1e-6)


def ram(b, xs, eps, plus):
    d = [x - b for x in xs]
    active = [np.abs(x) > eps for x in d]
    count = sum(a.astype(int) for a in active)
    y = np.zeros_like(b)
    for x, a in zip(d, active):
        raise_by = 1.0
        if plus:
            rho = (a & (count > 1)).sum() / max((a & (count == 1)).sum(), eps)
            raise_by = 1 + plus[0] * min(max(float(rho), 0.0), plus[1])
        y = y + np.where(a & (count == 1), raise_by * x, 0.0) + np.where(
            a & (count > 1), x / np.maximum(count, 1), 0.0)
    return b + y


def consensus(b, weighted, mask_lambda, lam, agree):
    s = sum(weighted)
    votes = sum((np.abs(d) >= l * np.abs(s - d)).astype(int)
                for d, l in zip(weighted, mask_lambda))
    return np.where(votes >= agree, b + lam * s, b)


def emr_unified(ds):
    s = sum(ds)
    u = np.zeros_like(s)
    for d in ds:
        u = np.where((s > 0) & (d > u) | (s < 0) & (d < u), d, u)
    return u


def cabs(b, weighted, ns, m):
    """weighted: (weight, x - b) of the models in turn."""
    size = b.size
    taken = np.zeros(size, bool)
    out = np.zeros(size)
    for (w, d), n in zip(weighted, ns):
        flat = d.ravel()
        mag = np.where(taken, 0.0, np.abs(f32(flat)))
        for at in range(0, size, m):
            g = mag[at:at + m]
            k = n * g.size // m
            k = 1 if k == 0 and n > 0 else k
            top = at + np.argsort(-g, kind="stable")[:k]
            top = top[mag[top] > 0]
            out[top] = w * flat[top]
            taken[top] = True
    return out.reshape(b.shape)


def nearswap(b, x, t):
    w = np.clip(t / np.maximum(np.abs(x - b), 1e-6), 0, 1)
    return w * x + (1 - w) * b


def arcee_fusion(b, x):
    def softmax(v):
        e = np.exp(v - v.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) + 1e-8
    p, q = softmax(x), softmax(b)
    kl = np.maximum((p * np.log(p / q)).sum(axis=-1, keepdims=True), 0.0)
    imp = f32(np.abs(x - b) * kl)
    order = np.sort(imp.ravel())
    q1, med, q3 = (order[int(f * (order.size - 1))] for f in (.25, .5, .75))
    return np.where(imp >= f32(np.array(med + 1.5 * (q3 - q1))), x, b)


# ---- recipe -----------------------------------------------------------------

def slices_of(recipe, model):
    base = recipe.get("base_model")
    if "slices" in recipe:
        return recipe["slices"]
    models = list(recipe["models"])
    if base is not None and all(m["model"] != base for m in models):
        models.append({"model": base})
    return [{"sources": [dict(m, layer_range=[0, model(m["model"]).layers()])
                         for m in models]}]


def parts_of(recipe, out, sl, t, srcs):
    """(base, its index or None, indices of the others, parameter lookup)"""
    base = sl.get("base_model", recipe.get("base_model"))
    shared = [sl.get("parameters"), recipe.get("parameters")]
    bi = next((i for i, (s, _) in enumerate(srcs) if s["model"] == base), None)
    donors = [i for i in range(len(srcs)) if i != bi]

    def get(key, donor, fallback):
        if donor is None:
            return lookup(shared, key, out, t, fallback)
        s, n = srcs[donors[donor] if recipe["merge_method"] in BY_DONOR
                    else donor]
        return lookup([s.get("parameters")] + shared, key, n, t, fallback)
    return base, bi, donors, get


def expected(recipe, root, seed):
    """Yields (output name, dtype, fp64 value, base value or None)."""
    cache = {}

    def model(ref):
        if ref not in cache:
            cache[ref] = Model(ref, root)
        return cache[ref]

    method = recipe["merge_method"]
    slices = slices_of(recipe, model)
    jobs = []  # (output name, slice, t, [(source, its tensor name)])
    at = 0
    for si, sl in enumerate(slices):
        srcs = sl["sources"]
        first = model(srcs[0]["model"])
        r0 = srcs[0]["layer_range"]
        count = r0[1] - r0[0]
        for name in sorted(first.tensors):
            lay = layer_of(name)
            if not lay:
                continue
            if not r0[0] <= lay[0] < r0[1]:
                continue
            k = lay[0] - r0[0]
            t = k / (count - 1) if count > 1 else 1.0
            out = f"{lay[1]}.{at + k}.{lay[2]}"
            jobs.append((out, sl, t, [
                (s, f"{lay[1]}.{s['layer_range'][0] + k}.{lay[2]}")
                for s in srcs]))
        for name in sorted(first.tensors):
            p = part_of(name)
            if (p == "pre" and si == 0) or (
                    p == "post" and si == len(slices) - 1):
                jobs.append((name, sl, 0.0, [(s, name) for s in srcs]))
        at += count
    # Tied models, but the ends of the stack come from different ones: the
    # output has a head of its own, made of the last slice's embeddings.
    ends = [[s["model"] for s in slices[i]["sources"]] for i in (0, -1)]
    if ends[0] != ends[1] and "lm_head.weight" not in model(
            ends[1][0]).tensors:
        jobs.append(("lm_head.weight", slices[-1], 0.0,
                     [(s, "model.embed_tokens.weight")
                      for s in slices[-1]["sources"]]))
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    scope = (recipe.get("parameters") or {}).get("trim_scope", "tensor")
    task = (recipe.get("parameters") or {}).get("task", 0)
    scoped, factor = None, 1.0
    if method == "ties" and scope != "tensor" or method == "emr" and task:
        gets, whole = {}, []
        for out, sl, t, srcs in sorted(jobs, key=lambda j: name_key(j[0])):
            base, bi, donors, get = parts_of(recipe, out, sl, t, srcs)
            xs = [model(s["model"]).value(n) for s, n in srcs]
            layer = layer_of(out)
            gets[out] = get
            whole.append((out, f"{layer[1]}.{layer[0]}" if layer else out,
                          xs[bi], [(srcs[i][0]["model"], xs[i])
                                   for i in donors]))
        if method == "ties":
            scoped = scoped_masks(whole, scope, gets.get)
        else:
            total = kept = 0.0
            for out, _, b, donors in whole:
                ds = [gets[out]("weight", i, 1.0) * (x - b)
                      for i, (_, x) in enumerate(donors)]
                u = emr_unified(ds)
                total += np.abs(ds[task - 1]).sum()
                kept += np.abs(u[ds[task - 1] * u > 0]).sum()
            factor = total / kept
    for out, sl, t, srcs in jobs:
        base, bi, donors, get = parts_of(recipe, out, sl, t, srcs)
        xs = [model(s["model"]).value(n) for s, n in srcs]
        kinds = {model(s["model"]).dtype(n) for s, n in srcs}
        dtype = kinds.pop() if len(kinds) == 1 else "F32"
        for key in ("dtype", "out_dtype"):
            if recipe.get(key):
                dtype = names[recipe[key].replace("torch.", "")]
        b = xs[bi] if bi is not None else None
        if method in METHODS:
            y = gta(method, b, [xs[i] for i in donors], get, out, seed,
                    (recipe.get("parameters") or {}).get("sparsify"), scoped)
        elif method == "linear":
            w = [get("weight", i, None) for i in range(len(xs))]
            y = sum(wi * x for wi, x in zip(w, xs))
            if get("normalize", None, True):
                y = y / sum(w)
        elif method == "slerp":
            y = slerp(get("t", None, None), b, xs[donors[0]])
        elif method == "nuslerp":
            w = [get("weight", i, None) for i in range(2)]
            t2 = 0.5 if abs(sum(w)) < 1e-6 else w[1] / sum(w)
            v = [xs[i] - b if b is not None else xs[i] for i in donors]
            axis = 0 if get("nuslerp_row_wise", None, False) else -1
            if get("nuslerp_flatten", None, True) or v[0].ndim < 2:
                axis = None
            y = nuslerp(t2, v[0], v[1], axis)
            y = y if b is None else b + y
        elif method == "multislerp":
            y = multislerp([get("weight", i, None)
                            for i in range(len(donors))],
                           [xs[i] for i in donors], b,
                           get("normalize_weights", None, True),
                           get("eps", None, 1e-8))
        elif method == "karcher":
            y = karcher(xs, get("max_iter", None, 10), get("tol", None, 1e-5))
        elif method == "model_stock":
            y = model_stock(b, [xs[i] for i in donors],
                            get("filter_wise", None, False))
        elif method == "sce":
            y = sce(b, [xs[i] for i in donors], get("select_topk", None, 1.0))
        elif method in ("ram", "ramplus_tl"):
            y = ram(b, [xs[i] for i in donors], get("epsilon", None, 1e-5),
                    (get("r", None, 0.1), get("alpha", None, 0.2))
                    if method == "ramplus_tl" else None)
        elif method == "consensus":
            y = consensus(b, [get("weight", i, 1.0) * (xs[i] - b)
                              for i in donors],
                          [get("mask_lambda", i, 0.4) for i in donors],
                          get("lambda", None, 1.0), get("agree", None, 2))
        elif method == "emr":
            ds = [get("weight", i, 1.0) * (xs[d] - b)
                  for i, d in enumerate(donors)]
            u = emr_unified(ds)
            if task:
                u = np.where(ds[task - 1] * u > 0, factor * u, 0.0)
            y = b + get("lambda", None, 1.0) * u
        elif method == "fisher":
            of = [get("fisher_of", i, 0) for i in range(len(xs))]
            top = by = plain = weights = 0.0
            for i, x in enumerate(xs):
                if of[i]:
                    continue
                w = get("weight", i, 1.0)
                f = w * (np.maximum(xs[of.index(i + 1)], 0)
                         + get("floor", None, 0.0))
                top, by, plain = top + f * x, by + f, plain + w * x
                weights += w
            y = np.where(by != 0, top / np.where(by != 0, by, 1),
                         plain / weights)
        elif method == "cabs":
            y = b + get("lambda", None, 1.0) * cabs(
                b, [(get("weight", i, None), xs[d] - b)
                    for i, d in enumerate(donors)],
                [int(get("n", i, 64)) for i in range(len(donors))],
                get("m", None, 256))
        elif method == "nearswap":
            y = nearswap(b, xs[donors[0]], get("t", None, None))
        elif method == "arcee_fusion":
            y = arcee_fusion(b, xs[donors[0]])
        elif method == "passthrough":
            y = xs[0]
            scale = get("scale", 0, None)
            if scale is not None:
                y = y * scale
        else:
            raise SystemExit(f"oracle: method {method}")
        yield out, dtype, y, b


# ---- comparison -------------------------------------------------------------

MANT = {"F32": 24, "BF16": 8, "F16": 11}
EMIN = {"F32": -126, "BF16": -126, "F16": -14}


def ulp(v, dtype):
    """Size of one unit in the last place at |v|."""
    e = np.maximum(np.frexp(np.abs(v))[1] - 1, EMIN[dtype])
    return np.ldexp(1.0, e - (MANT[dtype] - 1))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("recipe")
    ap.add_argument("out")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--model-dir", default=".")
    ap.add_argument("--max-ulp", type=float, default=1.0)
    a = ap.parse_args()
    with open(a.recipe) as f:
        recipe = yaml.safe_load(f)
    got = read_model(a.out)
    bad, worst, worst_name, n = [], 0.0, "-", 0
    names = set()
    slerping = recipe["merge_method"] in REDUCING
    for name, dtype, want, base in expected(recipe, a.model_dir, a.seed):
        names.add(name)
        if name not in got:
            bad.append(f"{name}: missing")
            continue
        if got[name][0] != dtype or got[name][1] != want.shape:
            bad.append(f"{name}: {got[name][:2]} instead of {dtype, want.shape}")
            continue
        v = values(got[name])
        noise = np.ldexp(np.abs(base if base is not None else want), -50)
        err = np.maximum(np.abs(v - want) - noise, 0) / ulp(want, dtype)
        n += v.size
        e = float(err.max()) if err.size else 0.0
        if slerping and e > a.max_ulp:
            rel = np.linalg.norm(v - want) / max(np.linalg.norm(
                want - base if base is not None else want), 1e-300)
            if rel <= 1e-6:
                e = 0.0
        if e > worst:
            worst, worst_name = e, name
        if not e <= a.max_ulp:
            i = int(err.argmax())
            bad.append(f"{name}[{i}]: {v.ravel()[i]!r} instead of "
                       f"{want.ravel()[i]!r} ({e:.2f} ulp, "
                       f"{int((err > a.max_ulp).sum())} elements)")
    extra = set(got) - names
    if extra:
        bad.append(f"unexpected tensors: {sorted(extra)[:3]}")
    for b in bad[:20]:
        print(b)
    print(f"{os.path.basename(a.recipe)}: {len(names)} tensors, {n} elements, "
          f"worst {worst:.3f} ulp ({worst_name}), {len(bad)} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
