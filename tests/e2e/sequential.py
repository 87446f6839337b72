#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""sequential.py BIN_DIR QUICKSTART

Statistics of the model merged so far (statistics: merged, regmean++) against
the same computed here: a slow forward pass in numpy, fp64, block by block.
Then: the same bytes for threads, memory, cold and warm store, SIGKILL; masks of
one chain are not taken for those of another; refusals.
"""
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np

from common import check, finish, run, run_json, temp, used
from values import load, windows

BIN, QUICK = map(os.path.abspath, sys.argv[1:3])
TVMERGE, TVEVAL, TVSTORE = (os.path.join(BIN, p)
                            for p in ("tvmerge", "tveval", "tvstore"))
SAMPLES, CONTEXT = 4, 48
DONORS = {"ft-prose": "prose", "ft-code": "code"}
CONFIG = json.load(open(os.path.join(QUICK, "base/config.json")))
HEADS, KV = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
DIM, LAYERS = CONFIG["head_dim"], CONFIG["num_hidden_layers"]
EPS = CONFIG["rms_norm_eps"]


# ---- a forward pass ---------------------------------------------------------

def norm(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w


def rotate(x):
    """x [windows, heads, positions, DIM]"""
    angle = np.arange(x.shape[2])[:, None] * CONFIG["rope_parameters"][
        "rope_theta"] ** (-np.arange(0, DIM, 2) / DIM)[None]
    c, s = np.cos(angle), np.sin(angle)
    a, b = x[..., :DIM // 2], x[..., DIM // 2:]
    return np.concatenate((a * c - b * s, b * c + a * s), -1)


def block(w, layer, h):
    """(h behind the block, {weight: its inputs [tokens, n]})"""
    p = f"model.layers.{layer}."
    seen = {}

    def linear(name, x):
        seen[f"{p}{name}.weight"] = x.reshape(-1, x.shape[-1])
        return x @ w[f"{p}{name}.weight"].T

    def heads(x, n):
        return x.reshape(*x.shape[:2], n, DIM).transpose(0, 2, 1, 3)

    x = norm(h, w[p + "input_layernorm.weight"])
    q = rotate(heads(linear("self_attn.q_proj", x), HEADS))
    k = rotate(heads(linear("self_attn.k_proj", x), KV))
    v = heads(linear("self_attn.v_proj", x), KV)
    k, v = (np.repeat(y, HEADS // KV, 1) for y in (k, v))
    s = q @ k.transpose(0, 1, 3, 2) / np.sqrt(DIM)
    s = np.where(np.tril(np.ones(s.shape[-2:], bool)), s, -np.inf)
    s = np.exp(s - s.max(-1, keepdims=True))
    o = (s / s.sum(-1, keepdims=True)) @ v
    o = o.transpose(0, 2, 1, 3).reshape(*h.shape[:2], -1)
    h = h + linear("self_attn.o_proj", o)
    x = norm(h, w[p + "post_attention_layernorm.weight"])
    g = linear("mlp.gate_proj", x)
    return h + linear("mlp.down_proj",
                      g / (1 + np.exp(-g)) * linear("mlp.up_proj", x)), seen


def merge_in_sequence(base, donors, texts, plain, linear):
    """plain(name), linear(name, inputs of each donor) -> merged weight."""
    out = {"model.embed_tokens.weight": plain("model.embed_tokens.weight")}
    streams = [out["model.embed_tokens.weight"][t] for t in texts]
    for layer in range(LAYERS):
        seen = [block(d, layer, h)[1] for d, h in zip(donors, streams)]
        for name in base:
            if f".layers.{layer}." in name:
                out[name] = linear(name, [s[name] for s in seen]) \
                    if name in seen[0] else plain(name)
        streams = [block(out, layer, h)[0] for h in streams]
    out["model.norm.weight"] = plain("model.norm.weight")
    return out


# ---- what it is compared with -------------------------------------------------

def recipe(path, method, extra, weights=(0.6, 0.5), density=0.3,
           samples=SAMPLES, context=CONTEXT):
    lines = [f"merge_method: {method}", "base_model: base", "models:"]
    for (d, t), w in zip(DONORS.items(), weights):
        p = f"weight: {w}"
        if density:
            p += f", density: {density}"
        lines += [f"- model: {d}", f"  parameters: {{{p}}}",
                  f"  calibration: {{text: text/{t}.calib.txt, "
                  f"samples: {samples}, context: {context}}}"]
    lines += [f"parameters: {{{extra}}}", "out_dtype: float32"]
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")
    return path


def merge(r, out, *options, **kw):
    return run_json(TVMERGE, "run", r, out, "--json", *options, cwd=QUICK,
                    **kw)


MASKS = "sparsify: importance, statistics: merged"


def masks(where, base, donors, texts):
    def delta(name, i):
        return donors[i][name] - base[name]

    def plain(name):
        return base[name] + 0.6 * delta(name, 0) + 0.5 * delta(name, 1)

    def linear(name, x):
        out = base[name].copy()
        for i, w in enumerate((0.6, 0.5)):
            t = delta(name, i)
            score = t * t * (x[i] * x[i]).sum(0)
            keep = np.argsort(-score.ravel(), kind="stable")
            keep = keep[:int(0.3 * t.size)]
            out.ravel()[keep] += w * t.ravel()[keep]
        return out

    r = recipe(f"{where}/m.yml", "task_arithmetic", MASKS)
    merge(r, f"{where}/m")
    got = load(f"{where}/m")
    want = merge_in_sequence(base, donors, texts, plain, linear)
    total = differ = 0
    for name, x in want.items():
        same = np.abs(got[name] - x) <= 1e-6 * np.abs(x).max()
        total += x.size
        differ += (~same).sum()
        check(same.mean() > 0.999, f"{name}: {1 - same.mean():.2e} differ")
    own = recipe(f"{where}/own.yml", "task_arithmetic", "sparsify: importance")
    merge(own, f"{where}/own")
    other = load(f"{where}/own")
    moved = max((np.abs(other[n] - x) > 1e-6 * np.abs(x).max()).mean()
                for n, x in want.items() if ".layers.3." in n)
    check(moved > 0.003, f"own inputs give other masks: {moved:.1e}")
    print(f"masks: {differ} of {total} differ from numpy's; "
          f"{moved:.1e} of a layer from the models' own")


def regmean(where, base, donors, texts):
    ws, off = (0.6, 0.5), 0.9

    def plain(name):
        return base[name] + sum(
            w * (d[name] - base[name]) for w, d in zip(ws, donors)) / sum(ws)

    def linear(name, x):
        grams = [y.T @ y / len(y) for y in x]
        grams = [g * off + np.diag(np.diag(g)) * (1 - off) for g in grams]
        h = sum(w * g for w, g in zip(ws, grams))
        h += 1e-8 * np.trace(h) / len(h) * np.eye(len(h))
        m = plain(name)
        r = sum(w * (d[name] - m) @ g for w, d, g in zip(ws, donors, grams))
        return m + np.linalg.solve(h, r.T).T

    r = recipe(f"{where}/r.yml", "regmean++", f"non_diagonal: {off}", ws, None)
    merge(r, f"{where}/r")
    got = load(f"{where}/r")
    want = merge_in_sequence(base, donors, texts, plain, linear)
    worst = max(np.linalg.norm(got[n] - x) / np.linalg.norm(x - base[n])
                for n, x in want.items())
    check(worst < 1e-4, f"regmean++: a delta is {worst:.1e} off")
    check(merge(r, f"{where}/r2", "--threads", "1", "--memory",
                "64MiB")["digest"] ==
          merge(r, f"{where}/r")["digest"], "regmean++: threads, memory")
    r = recipe(f"{where}/r0.yml", "regmean", f"non_diagonal: {off}", ws, None)
    merge(r, f"{where}/r0")
    other = load(f"{where}/r0")
    n = "model.layers.3.mlp.down_proj.weight"
    moved = np.linalg.norm(other[n] - got[n]) / np.linalg.norm(
        got[n] - base[n])
    check(moved > 1e-3, f"regmean is another method: {moved:.1e}")
    print(f"regmean++: worst delta {worst:.1e} off numpy's, "
          f"{moved:.1e} from regmean's")


# ---- the same bytes -----------------------------------------------------------

def same_bytes(where):
    store = f"{where}/s"
    run(TVSTORE, "init", store, code=0)
    for i, (method, extra) in enumerate((
            ("ties", MASKS), ("sparsegpt_ties", "statistics: merged"))):
        r = recipe(f"{where}/b{i}.yml", method, extra)
        own = recipe(f"{where}/w{i}.yml", method,
                     extra.replace("merged", "own"))
        o = f"{where}/b{i}-"
        want = merge(r, o + "1", "--threads", "1")["digest"]
        # What the models' own inputs give lies in the same store already.
        mine = merge(own, o + "own", "--store", store)["digest"]
        cold = merge(r, o + "c", "--store", store, "--threads", "2",
                     "--memory", "24MiB")
        check(cold["digest"] == want != mine, f"{method}: cold store")
        check(cold["calibration"]["models"] == 2, f"{method}: calibrates")
        warm = merge(r, o + "w", "--store", store)
        use = warm["calibration"]
        check(warm["digest"] == want and use["models"] == 0 and
              use["masks_found"] == cold["calibration"]["masks_made"],
              f"{method}: warm store {use}")
        check(merge(own, o + "own2", "--store", store)["digest"] == mine,
              f"{method}: own masks are still those")
        # Another weight is another chain of merged blocks.
        r = recipe(f"{where}/v{i}.yml", method, extra, (0.9, 0.5))
        other = merge(r, o + "v", "--store", store)
        check(other["calibration"]["models"] == 2 and
              other["digest"] == merge(r, o + "x")["digest"] != want,
              f"{method}: other weights")


def killed(where):
    for i, (method, extra, density) in enumerate((
            ("sparsegpt_ties", "statistics: merged", 0.3),
            ("regmean++", "non_diagonal: 0.9", None))):
        r = recipe(f"{where}/k{i}.yml", method, extra, density=density)
        want = merge(r, f"{where}/k{i}")["digest"]
        for with_store in (False, True):
            out = f"{where}/k{i}-{with_store}"
            options = ["--store", f"{where}/s"] if with_store else []
            for delay in (0.1, 0.35):
                p = subprocess.Popen([TVMERGE, "run", r, out, "-q", *options],
                                     cwd=QUICK, stderr=subprocess.DEVNULL)
                time.sleep(delay)
                p.send_signal(signal.SIGKILL)
                p.wait()
            check(merge(r, out, *options)["digest"] == want,
                  f"{method}: killed and repeated, the same bytes")
    check(run(TVSTORE, "verify", f"{where}/s").returncode == 0,
          "the store is whole")


def into_a_store(where):
    store = f"{where}/s"
    r = recipe(f"{where}/i.yml", "ties", MASKS)
    a = merge(r, f"{where}/i")["digest"]
    b = run_json(TVMERGE, "run", r, "--into", "m", "--store", store, "--json",
                 cwd=QUICK)
    check(b["digest"] == a, "into a store: the same tensors")


def on_disk(pid, out):
    """(bytes of the output and of files without a name, of those that only
    hold activations: mapped, and closed)."""
    held = mapped = 0
    try:
        for n in os.listdir(f"/proc/{pid}/fd"):
            if "/tveval-scratch." in os.readlink(f"/proc/{pid}/fd/{n}"):
                continue  # being mapped
            st = os.stat(f"/proc/{pid}/fd/{n}")
            if stat.S_ISREG(st.st_mode) and st.st_nlink == 0:
                held += st.st_blocks * 512
        with open(f"/proc/{pid}/maps") as f:
            for line in f:
                if "/tveval-scratch." in line:
                    a, b = line.split()[0].split("-")
                    mapped += int(b, 16) - int(a, 16)
    except OSError:
        pass
    return used(out) + held + mapped, mapped


def activations(where):
    """Those that do not fit into --memory are disk: planned, and refused under
    a quota without room for them; a run never takes more than was planned."""
    for name, method, extra, n_many in (
            ("merged", "task_arithmetic", MASKS, 32),
            ("own", "task_arithmetic", "sparsify: importance", 64),
            ("gram", "regmean++", "non_diagonal: 0.9", 32)):
        density = None if name == "gram" else 0.3
        few, many = (recipe(f"{where}/a{name}{n}.yml", method, extra,
                            density=density, samples=n, context=256)
                     for n in (4, n_many))
        out = f"{where}/a{name}"
        memory = ["--memory", "24MiB", "--threads", "1"]
        disk, most = (run_json(TVMERGE, "plan", r, out, "--json", *memory,
                               cwd=QUICK)["peak_disk_bytes"]
                      for r in (few, many))
        room = run_json(TVMERGE, "plan", many, out, "--json",
                        cwd=QUICK)["peak_disk_bytes"]
        streams = n_many * 256 * CONFIG["hidden_size"] * 4
        check(most >= room + streams * (1 if name == "own" else 2) and
              most >= disk, f"{name}: {disk}, {most}, with memory {room}")
        e = run(TVMERGE, "run", many, out, *memory, "--quota", most - 1,
                cwd=QUICK, code=5)
        check("quota" in e.stderr and str(most) in e.stderr, e.stderr)
        check(not os.path.exists(out), "something was written")
        peak = seen = 0
        for _ in range(5):  # until one was looked at in time
            shutil.rmtree(out, True)
            p = subprocess.Popen([TVMERGE, "run", many, out, *memory, "-q",
                                  "--quota", str(most)], cwd=QUICK)
            while p.poll() is None:
                total, mapped = on_disk(p.pid, out)
                peak, seen = max(peak, total), max(seen, mapped)
                time.sleep(0.001)
            check(p.returncode == 0, f"{name}: exit {p.returncode}")
            if seen >= streams:
                break
        check(streams <= seen and peak <= most,
              f"{name}: peak {peak} of {most}, activations {seen}")
        print(f"activations ({name}): {seen}, peak {peak} of {most}, "
              f"{disk} for few, {room} with memory")


def refusals(where):
    r = f"{where}/bad.yml"
    with open(r, "w") as f:
        f.write("merge_method: task_arithmetic\nbase_model: base\nslices:\n"
                "- sources:\n  - {model: base, layer_range: [1, 3]}\n"
                "  - {model: ft-code, layer_range: [1, 3], "
                "parameters: {weight: 1, density: 0.5}}\n"
                f"parameters: {{{MASKS}}}\n"
                "calibration: {text: text/code.calib.txt}\n")
    e = run(TVMERGE, "run", r, f"{where}/bad", cwd=QUICK, code=4)
    check("merged so far" in e.stderr and "ft-code" in e.stderr, e.stderr)
    r = recipe(r, "ties", MASKS)
    e = run(TVMERGE, "plan", r, "--memory", "16MiB", cwd=QUICK, code=5)
    check("--memory" in e.stderr, e.stderr)
    e = run(TVMERGE, "layers", r, cwd=QUICK, code=4)
    check("statistics" in e.stderr, e.stderr)
    check(not os.path.exists(f"{where}/bad"), "something was written")


def begin(r, out, env):
    """Kills a run of r that has begun and is not finished."""
    for i in range(10):
        shutil.rmtree(out, True)
        p = subprocess.Popen([TVMERGE, "run", r, out, "-q"], cwd=QUICK,
                             env={**os.environ, **env})
        while not os.path.exists(f"{out}/.tvmerge/journal") and \
                p.poll() is None:
            time.sleep(0.002)
        time.sleep(0.05 * (9 - i) / 9)  # whatever the machine
        p.send_signal(signal.SIGKILL)
        p.wait()
        if os.path.exists(f"{out}/.tvmerge/journal") and \
                not os.path.exists(f"{out}/config.json"):
            return True
    return False


def numerics(where):
    """Another BLAS core type: refused, unless that is accepted."""
    other = {"OPENBLAS_CORETYPE": "Nehalem"}
    r = recipe(f"{where}/n.yml", "regmean++", "non_diagonal: 0.9",
               density=None)
    merge(r, f"{where}/n1")
    merge(r, f"{where}/n2", env=other)
    cores = [json.load(open(f"{where}/{n}/tvmerge.json"))["identity"]["blas"]
             for n in ("n1", "n2")]
    if cores[0] == cores[1]:
        print(f"one BLAS core type here ({cores[0]}): not checked further")
        return
    e = run(TVMERGE, "run", r, f"{where}/n1", cwd=QUICK, env=other, code=4)
    check("blas" in e.stderr and "--accept-numerics" in e.stderr, e.stderr)
    done = merge(r, f"{where}/n1", "--accept-numerics", env=other)
    check(done["n_resumed"] == done["n_tensors"], "a finished one is taken")
    out = f"{where}/n3"
    if not begin(r, out, {}):
        print("too fast to be killed in between: not checked further")
        return
    e = run(TVMERGE, "run", r, out, cwd=QUICK, env=other, code=4)
    check("blas" in e.stderr and cores[0] in e.stderr and
          "--accept-numerics" in e.stderr, e.stderr)
    merge(r, out, "--accept-numerics", env=other)
    check(json.load(open(f"{out}/tvmerge.json"))["identity"]["blas"] ==
          cores[0], "it is still the merge that was begun")
    a, b = load(out), load(f"{where}/n1")
    off = max(np.abs(a[n] - x).max() for n, x in b.items())
    check(off < 1e-4, f"accepted numerics are {off:.1e} off")
    # What does not use BLAS is the same merge everywhere.
    r = f"{where}/plain.yml"
    with open(r, "w") as f:
        f.write("merge_method: linear\nmodels:\n- {model: ft-code, "
                "parameters: {weight: 1}}\n- {model: ft-prose, "
                "parameters: {weight: 2}}\n")
    merge(r, f"{where}/n4")
    merge(r, f"{where}/n4", env=other)


def main():
    where = temp()
    base, *donors = (load(os.path.join(QUICK, m)) for m in ("base", *DONORS))
    texts = [windows(TVEVAL, QUICK, t, SAMPLES, CONTEXT) for t in DONORS.values()]
    refusals(where)
    masks(where, base, donors, texts)
    regmean(where, base, donors, texts)
    same_bytes(where)
    into_a_store(where)
    activations(where)
    killed(where)
    numerics(where)
    finish("sequential")


main()
