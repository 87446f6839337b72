#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""compat.py BIN_DIR

--compat mergekit against the same steps written with numpy: fp32 operations
each rounded to the compute dtype, MT19937 (numpy's own) in the order in which
mergekit works through the tensors. Bits must be equal, and equal for every
number of threads, tile size and instruction set. That these steps are
mergekit's own is what tools/compare_mergekit.py shows, with mergekit beside it.
"""
import os
import subprocess
import sys
import time

import numpy as np

from common import (check, finish, read_safetensors, run, run_json, temp,
                    write_safetensors)

BIN = os.path.abspath(sys.argv[1])
TVMERGE = os.path.join(BIN, "tvmerge")
SEED = 7
F = np.float32
# In the order of mergekit: names as text. The large one has several tiles.
SHAPES = {"lm_head.weight": (31, 64), "model.embed_tokens.weight": (31, 64),
          "model.layers.0.mlp.up_proj.weight": (1500, 800),
          "model.layers.1.mlp.up_proj.weight": (3, 5),
          "model.layers.10.mlp.up_proj.weight": (64, 64),
          "model.layers.2.mlp.up_proj.weight": (7, 9)}


def bf16(x):
    u = np.ascontiguousarray(x, F).view(np.uint32).astype(np.uint64)
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16 << 16
    return u.astype(np.uint32).view(F)


def same(x):
    return np.asarray(x, F)


def names():
    have = dict(SHAPES)
    for i in range(11):
        have.setdefault(f"model.layers.{i}.mlp.up_proj.weight", (4, 4))
    return sorted(have.items())


def make(path, seed, scale, start=None):
    rng = np.random.default_rng(seed)
    out = {k: bf16(rng.standard_normal(s) * scale +
                   (0 if start is None else start[k])) for k, s in names()}
    write_safetensors(path, {
        k: ("BF16", v.shape, (v.view(np.uint32) >> 16).astype("<u2").tobytes())
        for k, v in out.items()})
    return out


def values(path):
    out = {}
    for k, (d, s, b) in read_safetensors(path).items():
        a = np.frombuffer(b, "<u2").astype(np.uint32) << 16 if d == "BF16" \
            else np.frombuffer(b, "<u4")
        out[k] = a.view(F).reshape(s)
    return out


class Stream:
    def __init__(self):
        self.mt = np.random.MT19937()
        self.mt._legacy_seeding(SEED)

    def mask(self, shape, p):
        n = int(np.prod(shape))
        u = (self.mt.random_raw(n) & 0xffffff).astype(F) * F(2.0 ** -24)
        p = np.asarray(p, F)
        return (u < (p.ravel() if p.ndim else p)).astype(F).reshape(shape)


def linear(b, xs, c, w, normalize):
    acc = np.zeros_like(b)
    for x, wi in zip(xs, w):
        acc = (x.astype(np.float64) * np.float64(F(wi)) + acc).astype(F)
    total = F(0)
    for wi in w:
        total += F(wi)
    return c(acc / total if normalize else acc)


def gta(b, xs, c, w, masks, rescale, consensus, normalize, lam):
    big = []
    wc = [c(F(v)) for v in w]
    for x, m, v in zip(xs, masks, wc):
        d = c(x - b)
        if m is not None:
            kept = d * m
            if rescale:
                a = c(F(np.abs(d).sum(dtype=np.float64)))
                k = c(F(np.abs(kept).sum(dtype=np.float64)))
                if a >= 1e-7 and k >= 1e-7:
                    kept = c(kept * c(a / k))
            d = kept
        big.append(c(d * v))
    if consensus:
        s = np.zeros_like(b)
        for d in big:
            s = s + d
        sign = np.where(c(s) >= 0, F(1), F(-1))
        agree = [(np.sign(d) == sign).astype(F) for d in big]
        div = np.zeros_like(b)
        for v, m in zip(wc, agree):
            div = div + v * m
        div = c(div)
        div = np.where(div == 0, F(1), div)
        big = [d * m for d, m in zip(big, agree)]
    else:
        div = F(0)
        for v in wc:
            div = div + v
        div = c(div)
    y = np.zeros_like(b)
    for d in big:
        y = y + d
    y = c(y)
    if normalize:
        y = c(y / div)
    if lam != 1:
        y = c(y * F(lam))
    return c(b + y)


def nearswap(b, x, c, t):
    w = c(F(1) / np.maximum(c(np.abs(b - x)), c(F(1e-6))))
    w = np.clip(c(w * F(t)), F(0), F(1))
    return c(c(w * x) + c(c(F(1) - w) * b))


def ram(b, xs, c, eps):
    d = [c(x - b) for x in xs]
    on = [np.abs(v) > c(F(eps)) for v in d]
    count = np.maximum(sum(o.astype(F) for o in on), F(1))
    y = np.zeros_like(b)
    for v, o in zip(d, on):
        y = y + np.where(o, c(v / count), F(0))
    return c(b + c(y))


def ramplus(b, xs, c, eps, r, alpha):
    d = [c(x - b) for x in xs]
    on = [np.abs(v) > c(F(eps)) for v in d]
    count = sum(o.astype(int) for o in on)
    y = np.zeros_like(b)
    for v, o in zip(d, on):
        shared, alone = (o & (count > 1)).sum(), (o & (count == 1)).sum()
        rho = F(shared) / np.maximum(F(alone), F(eps))
        by = F(1) + F(r) * min(max(rho, F(0)), F(alpha))
        one = np.where(count == 1, v * by, c(v / np.maximum(count, 1).astype(F)))
        y = y + np.where(o, one, F(0))
    return b + y  # fp32 from lambda on


def arcee_fusion(b, x, c, stream):
    """exp and log right to the last bit, where torch's are not; its samples."""
    def share(v):
        e = np.exp((v - v.max(-1, keepdims=True)).astype(np.float64)).astype(F)
        e = e * (F(1) / e.sum(-1, keepdims=True, dtype=np.float64).astype(F))
        return c(c(e) + F(1e-8))
    p, q = share(x), share(b)
    by = c(p * c(np.log(c(p / q).astype(np.float64)).astype(F)))
    kl = c(by.sum(-1, keepdims=True, dtype=np.float64).astype(F))
    imp = c(np.abs(c(x - b)) * kl)
    some = imp.ravel()
    if some.size > 1000000:
        some = some[stream.mt.random_raw(1000000) % some.size]
    some = np.sort(some)
    q1, q2, q3 = (some[int(a * (some.size - 1))] for a in (0.25, 0.5, 0.75))
    at = c(q2 + c(c(q3 - q1) * F(1.5)))
    return b + c(x - b) * (imp >= at).astype(F)


def outliers(d, density, gamma):
    """As --compat cuts equal magnitudes: by lowest index from above."""
    m = np.abs(d).ravel()
    target, top = int(density * m.size), int(gamma * m.size)
    bot = max(0, m.size - target - top)
    order = np.argsort(-m, kind="stable")[::-1]
    keep = np.zeros(m.size, F)
    keep[order[bot:bot + target]] = 1
    return keep.reshape(d.shape)


def slerp(a, b, c, t):
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    th = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    return c(F(np.sin((1 - t) * th) / np.sin(th)) * a
             + F(np.sin(t * th) / np.sin(th)) * b)


def total(v):
    return F(np.sum(v, dtype=np.float64))


def norm(v):
    return F(np.sqrt(np.sum(np.square(v, dtype=np.float64))))


def fsum(parts):
    """torch's sum over a few models: fp32 in order."""
    s = np.zeros_like(parts[0])
    for p in parts:
        s = s + p
    return s


def sin(c, x):
    return c(F(np.sin(np.float64(x))))


def model_stock(b, xs, c):
    d = [c(x - b) for x in xs]
    n, cos = len(d), []
    for i in range(n):
        for j in range(i + 1, n):
            by = max(c(c(norm(d[i])) * c(norm(d[j]))), c(F(1e-6)))
            cos.append(np.clip(c(c(total(c(d[i] * d[j]))) / by), F(-1), F(1)))
    m = c(fsum(cos) / F(len(cos)))
    t = c(c(F(n) * m) / c(F(1) + c(F(n - 1) * m)))
    mean = np.zeros_like(b)
    for x in xs:
        mean = c(mean + x)
    return c(c(t * c(mean / F(n))) + c(c(F(1) - t) * b))


def nuslerp(b, xs, c, w, axis):
    """axis: along which a vector runs; None: all of the tensor."""
    v = [c(x - b) for x in xs]
    if axis is None or v[0].ndim < 2:
        rows = [x.reshape(1, -1) for x in v]
    else:
        rows = [np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
                for x in v]
    t, out = w[1] / (w[0] + w[1]), np.empty_like(rows[0])
    for i, (p, q) in enumerate(zip(*rows)):
        u = [c(x / max(c(norm(x)), c(F(1e-7)))) for x in (p, q)]
        cos = np.clip(c(total(c(u[0] * u[1]))), F(-1), F(1))
        if c(F(1) - c(cos * cos)) <= 1e-16:
            out[i] = c(c(p * F(1 - t)) + c(q * F(t)))
            continue
        th = c(F(np.arccos(np.float64(cos))))
        f = [sin(c, c(F(s) * th)) for s in (1 - t, t)]
        out[i] = c(c(c(f[0] * p) + c(f[1] * q)) / sin(c, th))
    if axis is None or v[0].ndim < 2:
        out = out.reshape(b.shape)
    else:
        out = np.moveaxis(out.reshape(np.moveaxis(v[0], axis, -1).shape), -1,
                          axis)
    return c(b + out)


def multislerp(b, xs, c, w):
    v = [c(x - b) for x in xs]
    wc = [c(F(x)) for x in w]
    s = c(fsum(wc))
    wc = [c(x / s) for x in wc]
    length = [c(norm(x)) for x in v]
    u = [c(x / c(n + F(1e-8))) for x, n in zip(v, length)]
    m = c(fsum([c(x * y) for x, y in zip(u, wc)]))
    m = c(m / c(norm(m)))
    dot = [c(total(c(x * m))) for x in u]
    t = c(fsum([c(c(x - c(m * y)) * z) for x, y, z in zip(u, dot, wc)]))
    a = c(c(norm(t)) + F(1e-8))
    y = c(c(m * c(F(np.cos(np.float64(a))))) + c(t * c(sin(c, a) / a)))
    y = c(y * c(fsum([c(x * z) for x, z in zip(length, wc)])))
    return c(y + b)


def karcher(xs, c, max_iter, tol):
    n = [norm(x) for x in xs]
    u = [c(x / y) for x, y in zip(xs, n)]
    al = F(1 / len(xs))
    m = np.zeros_like(xs[0])
    for x in u:
        m = c(m + c(x * al))
    m = c(m / norm(m))
    for _ in range(max_iter):
        t = np.zeros_like(m)
        for x in u:
            dot = np.clip(c(F(np.sum(m.astype(np.float64) * x))), F(-1), F(1))
            th = c(F(np.arccos(np.float64(dot))))
            if th < tol:
                continue
            t = c(t + c(c(x - c(m * dot)) * c(al * c(th / sin(c, th)))))
        r = norm(t)
        if r < tol:
            break
        m = c(c(m * c(F(np.cos(np.float64(r)))))
              + c(c(t / r) * sin(c, r)))
        m = c(m / norm(m))
    return c(m * c(fsum([al * x for x in n])))


def sce(b, xs, c, top):
    d = [c(x - b) for x in xs]
    v = c(F(np.var(np.stack(d).astype(np.float64), axis=0))).ravel()
    k = int(F(np.count_nonzero(v)) * F(top))
    keep = np.zeros(v.size, F)
    keep[np.argsort(-v, kind="stable")[:k]] = 1
    d = [x * keep.reshape(b.shape) for x in d]
    w = [c(F(np.float64(total(c(x * x))) / x.size)) for x in d]
    s = c(fsum(w))
    w = [c(F(1 / len(w))) if abs(s) < 1e-6 else c(x / s) for x in w]
    sign = np.where(c(fsum(d)) >= 0, F(1), F(-1))
    e = [x * (np.sign(y) == sign).astype(F) for x, y in zip(w, d)]
    y = c(fsum([c(x * z) for x, z in zip(d, e)]))
    return c(b + c(y / np.maximum(c(fsum(e)), c(F(1e-6)))))


def della(d, c, density, eps, stream):
    rows = np.abs(d).reshape(-1, d.shape[-1])
    order = np.argsort(rows, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(rows.shape[1])[None, :], axis=1)
    r = c(c(c(rank.astype(F)) + F(1)) - F(1))
    p = c(c(F(density - eps)) + c(c(r / r.max()) * F(2) * F(eps)))
    return stream.mask(p.shape, p).reshape(d.shape)


def expect_fusion(base, each):
    """bf16 hides how rows are summed."""
    s = Stream()
    want = {k: arcee_fusion(base[k], each[k][0], bf16, s) for k in sorted(base)}
    text = "merge_method: arcee_fusion\nbase_model: base.safetensors\n" \
        "models:\n- model: x0.safetensors\n"
    expect("arcee_fusion", text + "dtype: bfloat16\n", want)
    kinds = {d for d, _, _ in read_safetensors("out0").values()}
    check(kinds == {"F32"}, f"arcee_fusion is fp32 for mergekit: {kinds}")
    expect("arcee_fusion to bf16", text + "out_dtype: bfloat16\n",
           {k: bf16(v) for k, v in want.items()})


def recipe(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def entries(w, density=None):
    s = "models:\n"
    for i, v in enumerate(w):
        s += f"- model: x{i}.safetensors\n  parameters:\n    weight: {v}\n"
        if density:
            s += f"    density: {density[i]}\n"
    return s


def expect(what, text, want):
    recipe("r.yml", text)
    digest = None
    for n, (more, env) in enumerate([
            ([], {}), (["--threads", "1"], {"TV_CPU": "ref"}),
            (["--threads", "4", "--memory", "32MiB"], {"TV_CPU": "avx2"})]):
        r = run_json(TVMERGE, "run", "r.yml", f"out{n}", "--compat", "mergekit",
                     "--random-seed", SEED, "--force", "--json", *more, env=env)
        digest = digest or r.get("digest")
        check(r.get("digest") == digest, f"{what}: bytes with {more} {env}")
    got = values("out0")
    check(set(got) == set(want), f"{what}: names")
    for k, v in want.items():
        bad = (got[k].view(np.uint32) != v.view(np.uint32)).sum()
        check(bad == 0, f"{what}: {k}: {bad} of {v.size} elements differ")


def reducing(base, each, based):
    """bf16 hides how sums over a tensor are made."""
    c, three = bf16, entries([0.7, 0.4, 0.2])
    head = f"dtype: bfloat16\n{based}"
    two = "models:\n- {model: x0.safetensors, parameters: {weight: 0.7}}\n" \
        "- {model: x1.safetensors, parameters: {weight: 0.4}}\n"
    plain = "models:\n" + "".join(f"- model: x{i}.safetensors\n"
                                  for i in range(3))
    expect("model_stock", f"merge_method: model_stock\n{head}{plain}",
           {k: model_stock(base[k], each[k], c) for k in base})
    for axis, flat, row in ((None, True, False), (-1, False, False),
                            (0, False, True)):
        expect(f"nuslerp {axis}", f"merge_method: nuslerp\n{head}{two}"
               f"parameters: {{nuslerp_flatten: {flat}, "
               f"nuslerp_row_wise: {row}}}\n",
               {k: nuslerp(base[k], each[k][:2], c, [0.7, 0.4], axis)
                for k in base})
    expect("multislerp", f"merge_method: multislerp\n{head}{three}",
           {k: multislerp(base[k], each[k], c, [0.7, 0.4, 0.2])
            for k in base})
    expect("karcher", f"merge_method: karcher\ndtype: bfloat16\n{plain}"
           "parameters: {max_iter: 4}\n",
           {k: karcher(each[k], c, 4, 1e-5) for k in base})
    expect("sce", f"merge_method: sce\n{head}{plain}"
           "parameters: {select_topk: 0.3}\n",
           {k: sce(base[k], each[k], c, 0.3) for k in base})
    w, dens, s, want = [0.7, -0.2, 0.4], [0.3, 1.0, 0.6], Stream(), {}
    for k in sorted(base):
        m = [None if q >= 1 else della(c(x - base[k]), c, q, 0.2, s)
             for x, q in zip(each[k], dens)]
        want[k] = gta(base[k], each[k], c, w, m, True, True, True, 1)
    expect("della", f"merge_method: della\n{head}{entries(w, dens)}"
           "parameters: {epsilon: 0.2}\n", want)


def main():
    os.chdir(temp())
    base = make("base.safetensors", 1, 1.0)
    xs = [make(f"x{i}.safetensors", 2 + i, 0.05, base) for i in range(3)]
    each = {k: [x[k] for x in xs] for k in base}
    based = "base_model: base.safetensors\n"

    for dtype, c in (("float32", same), ("bfloat16", bf16)):
        for norm in (True, False):
            w = [0.3, 0.5, 0.9]
            expect(f"linear {dtype} {norm}",
                   f"merge_method: linear\ndtype: {dtype}\n{entries(w)}"
                   f"parameters: {{normalize: {norm}}}\n",
                   {k: linear(base[k], each[k], c, w, norm) for k in base})
        w = [0.7, -0.2, 0.4]
        expect(f"task_arithmetic {dtype}",
               f"merge_method: task_arithmetic\ndtype: {dtype}\n{based}"
               f"{entries(w)}parameters: {{lambda: 1.3}}\n",
               {k: gta(base[k], each[k], c, w, [None] * 3, False, False, False,
                       1.3) for k in base})
        expect(f"ties without trimming {dtype}",
               f"merge_method: ties\ndtype: {dtype}\n{based}{entries(w)}",
               {k: gta(base[k], each[k], c, w, [None] * 3, False, True, True,
                       1) for k in base})
        expect(f"nearswap {dtype}",
               f"merge_method: nearswap\ndtype: {dtype}\n{based}models:\n"
               "- model: x1.safetensors\nparameters: {t: 0.03}\n",
               {k: nearswap(base[k], each[k][1], c, 0.03) for k in base})
        expect(f"ram {dtype}",
               f"merge_method: ram\ndtype: {dtype}\n{based}models:\n"
               "- model: x0.safetensors\n- model: x1.safetensors\n"
               "- model: x2.safetensors\nparameters: {epsilon: 0.04}\n",
               {k: ram(base[k], each[k], c, 0.04) for k in base})
        expect(f"ramplus_tl {dtype}",
               f"merge_method: ramplus_tl\ndtype: {dtype}\n{based}models:\n"
               "- model: x0.safetensors\n- model: x1.safetensors\n"
               "- model: x2.safetensors\n"
               "parameters: {epsilon: 0.04, r: 0.5, alpha: 0.7}\n",
               {k: ramplus(base[k], each[k], c, 0.04, 0.5, 0.7)
                for k in base})
        if dtype == "bfloat16":  # hides how the dot product was summed
            expect(f"slerp {dtype}",
                   f"merge_method: slerp\ndtype: {dtype}\n{based}models:\n"
                   "- model: x1.safetensors\nparameters: {t: 0.3}\n",
                   {k: slerp(base[k], each[k][1], c, 0.3)
                    for k in base})
        dens = [0.3, 1.0, 0.4]
        expect(f"breadcrumbs_ties {dtype}",
               f"merge_method: breadcrumbs_ties\ndtype: {dtype}\n{based}"
               f"{entries(w, dens)}parameters: {{gamma: 0.05}}\n",
               {k: gta(base[k], each[k], c, w,
                       [None if d >= 1 else outliers(c(x - base[k]), d, 0.05)
                        for x, d in zip(each[k], dens)],
                       False, True, False, 1) for k in base})
        # fp32 sums of a million numbers are torch's own; bf16 hides them.
        rescale = dtype == "bfloat16"
        dens = [0.3, 1.0, 0.0]
        s, want = Stream(), {}
        for k in sorted(base):
            m = [None if d >= 1 else s.mask(base[k].shape, c(F(d)))
                 for d in dens]
            want[k] = gta(base[k], each[k], c, w, m, rescale, True, False, 1)
        expect(f"dare_ties {dtype}",
               f"merge_method: dare_ties\ndtype: {dtype}\n{based}"
               f"{entries(w, dens)}parameters: {{rescale: {rescale}}}\n", want)

    expect_fusion(base, each)
    reducing(base, each, based)
    # Another arithmetic is another merge.
    run(TVMERGE, "run", "r.yml", "out0", "--random-seed", SEED, code=4)
    plan = run_json(TVMERGE, "plan", "r.yml", "--compat", "mergekit", "--json")
    check(not any("rescale divides" in p["message"] for p in plan["problems"]),
          "a compatible plan speaks of other arithmetic")
    recipe("s.yml", "merge_method: consensus\n" + based +
           "models:\n- model: x0.safetensors\n- model: x1.safetensors\n")
    plan = run_json(TVMERGE, "plan", "s.yml", "--compat", "mergekit", "--json")
    check(sum("keeps this program's arithmetic" in p["message"]
              for p in plan["problems"]) == 1, "consensus has no variant: say so")
    # A run that ended half-way goes on where it was.
    r = run_json(TVMERGE, "run", "r.yml", "whole", "--compat", "mergekit",
                 "--random-seed", SEED, "--json")
    env = {"TV_GROUP_BYTES": "1"}
    for i in range(6):
        p = subprocess.Popen([TVMERGE, "run", "r.yml", "half", "--compat",
                              "mergekit", "--random-seed", str(SEED), "-q"],
                             env={**os.environ, **env})
        time.sleep(0.01 * (i + 1))
        p.kill()
        p.wait()
    again = run_json(TVMERGE, "run", "r.yml", "half", "--compat", "mergekit",
                     "--random-seed", SEED, "--json", env=env)
    check(again["digest"] == r["digest"], "resumed digest")
    finish("compat")


main()
