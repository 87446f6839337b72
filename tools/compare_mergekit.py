#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""compare_mergekit.py [--cache DIR] [--ties] TVMERGE REFMODELS [METHOD...] - the same
recipes through mergekit and through us.

Runs every method x {float32, bfloat16} x 3 parameter sets x {llama, gpt2}
through mergekit and through TVMERGE, with and without --compat mergekit, and
prints one line per case: elements of the result that are not the same bits, and
the largest error relative to the change (|ours - theirs| / |theirs - base|, both
as norms over a tensor; the worst tensor counts). Of methods that cut at a
magnitude the line also says how many of these elements have a model whose
change has exactly the magnitude at a cut: all of those that differ by more than
rounding should. Which of these are kept is decided by torch's sorts, which are
not stable. With --ties torch sorts equal magnitudes as --compat mergekit does,
by place, and these differences have to vanish. Of dare_*, parameter set 1
does not rescale, so that equal results are equal masks (the sums behind L1
factors are torch's own). REFMODELS is a directory with the models base, ft-code,
ft-prose and gpt2; the fine-tunes of gpt2 are made here, by seeded noise.
--cache keeps what mergekit gave in DIR, for the next time.

Needs mergekit 0.1.5 with torch, from a virtual environment of its own: this is
no test of the default suite, and nothing else here needs Python packages.
Example: VENV/bin/python tools/compare_mergekit.py build/cli/tvmerge \\
         refmodels/models task_arithmetic linear
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402
import yaml  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

SEED = 42
EACH = "each"  # parameters of every model but the base
ALL = "all"    # of every model, the base included
SHARED = "shared"
BASED = "based"  # there is a base after all
ORDER = "order"  # which of the models are base and donors


def gta(*more):
    sets = [{EACH: [{"weight": 0.5}, {"weight": 0.5}]},
            {EACH: [{"weight": 0.7}, {"weight": 0.4}],
             SHARED: {"lambda": 1.2}},
            {EACH: [{"weight": [0.2, 0.9]}, {"weight": 0.6}],
             SHARED: {"normalize": True}}]
    for s, extra in zip(sets, more):
        for e in s[EACH]:
            e.update(extra)
    return sets


def unscaled(sets):
    sets[0].setdefault(SHARED, {})["rescale"] = False
    return sets


DENSE = ({"density": 0.5}, {"density": 0.3}, {"density": 0.8})
# method: (number of donors, is there a base, parameter sets)
CASES = {
    "linear": (2, False, [{EACH: [{"weight": 0.3}, {"weight": 0.6}]},
                          {EACH: [{"weight": 1}, {"weight": -0.4}],
                           SHARED: {"normalize": False}},
                          {EACH: [{"weight": [0, 1]}, {"weight": 0.5}]}]),
    "slerp": (1, True, [{SHARED: {"t": t}} for t in (0.5, 0.2, [0, 1])]),
    "nuslerp": (2, False, [
        {EACH: [{"weight": 0.9}, {"weight": 0.3}]},
        {EACH: [{"weight": 1}, {"weight": 2}],
         SHARED: {"nuslerp_flatten": False}},
        {EACH: [{"weight": 0.5}, {"weight": 0.6}], BASED: True,
         SHARED: {"nuslerp_flatten": False, "nuslerp_row_wise": True}}]),
    "multislerp": (2, True, [{EACH: [{"weight": a}, {"weight": b}]}
                             for a, b in ((0.5, 0.5), (0.9, 0.3), (1, 2))]),
    "karcher": (2, False, [{}, {SHARED: {"max_iter": 3}},
                           {SHARED: {"tol": 1e-3}}]),
    "task_arithmetic": (2, True, gta()),
    "ties": (2, True, gta(*DENSE)),
    "dare_ties": (2, True, unscaled(gta(*DENSE))),
    "dare_linear": (2, True, unscaled(gta(*DENSE))),
    "breadcrumbs": (2, True, gta(*({**d, "gamma": 0.05} for d in DENSE))),
    "breadcrumbs_ties": (2, True, gta(*({**d, "gamma": 0.02}
                                        for d in DENSE))),
    "della": (2, True, gta(*({**d, "epsilon": 0.1} for d in DENSE))),
    "della_linear": (2, True, gta(*({**d, "epsilon": 0.1} for d in DENSE))),
    "model_stock": (2, True, [{}, {SHARED: {"filter_wise": True}},
                              {ORDER: [1, 2, 0]}]),
    "sce": (2, True, [{}, {SHARED: {"select_topk": 0.5}},
                      {SHARED: {"select_topk": 0.1}}]),
    "ram": (2, True, [{}, {SHARED: {"epsilon": 1e-3}},
                      {SHARED: {"epsilon": 1e-2}}]),
    "ramplus_tl": (2, True, [{}, {SHARED: {"epsilon": 1e-3}},
                             {SHARED: {"r": 0.5, "alpha": 0.5}}]),
    "nearswap": (1, True, [{SHARED: {"t": t}} for t in (1e-3, 1e-2, 0.1)]),
    "arcee_fusion": (1, True, [{}, {ORDER: [0, 2]}, {ORDER: [1, 2]}]),
    "passthrough": (1, False, [{}, {ALL: {"scale": 0.3}},
                               {ALL: {"scale": [{"filter": "mlp", "value": 0.5},
                                                {"value": 1}]}}]),
}


def make_gpt2(refmodels, work):
    names = [os.path.join(refmodels, "gpt2")]
    for i in (1, 2):
        out = os.path.join(work, f"gpt2-{i}")
        shutil.copytree(names[0], out)
        path = os.path.join(out, "model.safetensors")
        tensors = load_file(path)
        g = torch.Generator().manual_seed(i)
        for k in sorted(tensors):
            v = tensors[k]
            if v.is_floating_point():
                noise = torch.randn(v.shape, generator=g) * 0.02
                tensors[k] = (v.float() + noise * v.float().std()).to(v.dtype)
        save_file(tensors, path, {"format": "pt"})
        names.append(out)
    return names


def recipe(method, models, number, dtype):
    """(recipe, models in their places: base, donors)"""
    donors, based, sets = CASES[method]
    params = sets[number]
    order = params.get(ORDER, range(donors + 1))
    entries = []
    for i in range(donors):
        e = {"model": models[order[i + 1]]}
        own = dict(params.get(ALL, {}))
        if EACH in params:
            own.update(params[EACH][i])
        if own:
            e["parameters"] = own
        entries.append(e)
    doc = {"merge_method": method, "models": entries, "dtype": dtype}
    if based or params.get(BASED):
        doc["base_model"] = models[order[0]]
    if SHARED in params:
        doc["parameters"] = params[SHARED]
    return doc, order


def load_dir(path):
    out = {}
    for f in sorted(os.listdir(path)):
        if f.endswith(".safetensors"):
            out.update(load_file(os.path.join(path, f)))
    return out


def cut_at(doc, name, base, donors):
    """Mask of the elements whose place in a model's order is that of a cut."""
    method = doc["merge_method"]
    dtype = getattr(torch, doc["dtype"])
    b = base[name].to(dtype)
    n = b.numel()
    deltas = [d[name].to(dtype) - b for d in donors]
    at = torch.zeros(n, dtype=torch.bool)
    if method == "sce":
        top = doc.get("parameters", {}).get("select_topk", 1.0)
        v = torch.var(torch.stack(deltas), dim=0, unbiased=False).reshape(-1)
        k = int(torch.count_nonzero(v) * top)
        return v == v.sort(descending=True).values[k - 1] if 0 < k < n else at
    for d, entry in zip(deltas, doc["models"]):
        own = entry["parameters"]
        if own["density"] >= 1:
            continue
        m = d.float().abs().reshape(-1)
        s = m.sort(descending=True).values
        keep = int(own["density"] * n)
        if method == "ties":
            at |= m == s[max(1, keep) - 1]
            continue
        top = int(own["gamma"] * n)
        for edge in (top - 1, top, min(n, top + keep) - 1):
            if 0 <= edge < n:
                at |= m == s[edge]
    return at


def differs_much(a, b, base):
    """By more than the last digit and by more than the tensor's own factors,
    which follow from all that was kept, may differ."""
    x, y, z = (t.double().reshape(-1) for t in (a, b, base))
    ulp = 2.0 ** (-7 if a.element_size() == 2 else -23)
    off, change = (x - y).abs(), torch.maximum((x - z).abs(), (y - z).abs())
    return (off > 1e-3 * change) & (off > 2 * ulp * torch.maximum(x.abs(),
                                                                 y.abs()))


CUTS = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")


def compare(theirs, ours, base, doc, donors):
    """What a cell of the table says."""
    if set(theirs) != set(ours):
        return f"names differ: {sorted(set(theirs) ^ set(ours))[:2]}"
    different = total = large = explained = 0
    worst = 0.0
    for k, a in theirs.items():
        b = ours[k]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{k}: {a.dtype} {b.dtype}"
        wide = torch.int16 if a.element_size() == 2 else torch.int32
        other = (a.contiguous().view(wide) != b.contiguous().view(wide))
        other = other.reshape(-1)
        different += other.sum().item()
        total += a.numel()
        change = (a.double() - base[k].double()).norm().item()
        error = (a.double() - b.double()).norm().item()
        if error > 0:
            worst = max(worst, error / change if change > 0 else float("inf"))
        if doc["merge_method"] in CUTS and other.any():
            big = other & differs_much(a, b, base[k])
            large += big.sum().item()
            explained += (big & cut_at(doc, k, base, donors)).sum().item()
    if different == 0:
        return "exact"
    text = f"{100.0 * different / total:.3f}% {worst:.1e}"
    if doc["merge_method"] in CUTS:
        text += f" ({explained} of {large} large ones at a cut)"
    return text


def by_place():
    """Sorts of equal values by their place: the first is the largest for
    magnitudes that are cut, the smallest for ranks."""
    argsort = torch.argsort

    class Sorted:
        def __init__(self, x, dim, descending):
            i = argsort(x, dim=dim, descending=True, stable=True)
            self.indices = i if descending else i.flip(dim)
            self.values = x.gather(dim, self.indices)

        def __iter__(self):
            return iter((self.values, self.indices))

    def topk(x, k, largest=True):
        i = argsort(x, descending=largest, stable=True)[:k]
        return x[i], i

    torch.sort = lambda x, dim=-1, descending=False: Sorted(x, dim, descending)
    torch.argsort = lambda x, dim=-1, descending=False: argsort(
        x, dim=dim, descending=descending, stable=True)
    torch.topk = topk


def theirs_of(doc, work, cache, ties=False):
    """mergekit's result, or its refusal."""
    key = hashlib.sha256(json.dumps([doc, "ties" if ties else None]).replace(
        work, "").encode()).hexdigest()[:20]
    peer = os.path.join(cache or work, key)
    if not os.path.isdir(peer):
        try:
            run_merge(MergeConfiguration.model_validate(doc), peer + ".part",
                      MergeOptions(random_seed=SEED, quiet=True,
                                   copy_tokenizer=False,
                                   write_model_card=False))
        except Exception as e:  # its own refusals are a result
            shutil.rmtree(peer + ".part", ignore_errors=True)
            return None, f"mergekit: {type(e).__name__}"
        os.rename(peer + ".part", peer)
    tensors = load_dir(peer)
    if not cache:
        shutil.rmtree(peer)
    return tensors, None


def ours_of(tvmerge, path, out, more):
    r = subprocess.run([tvmerge, "run", path, out, "--random-seed", str(SEED),
                        "--no-copy-tokenizer", "--no-write-model-card", "-q",
                        *more], capture_output=True, text=True)
    if r.returncode:
        return None, f"exit {r.returncode} {r.stderr.strip()[-60:]}"
    return load_dir(out), None


def run_case(args, doc, loaded, work):
    path, out = os.path.join(work, "r.yml"), os.path.join(work, "out")
    with open(path, "w", encoding="utf-8") as f:
        yaml.safe_dump(doc, f, sort_keys=False)
    theirs, refusal = theirs_of(doc, work, args.cache, args.ties)
    if theirs is None:
        return [refusal] * 2
    cells = []
    for more in ([], ["--compat", "mergekit"]):
        ours, refusal = ours_of(args.tvmerge, path, out, more)
        cells.append(refusal if ours is None else compare(
            theirs, ours, loaded[0], doc, loaded[1:]))
        shutil.rmtree(out, ignore_errors=True)
    return cells


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--cache", type=os.path.abspath)
    p.add_argument("--ties", action="store_true")
    p.add_argument("tvmerge", type=os.path.abspath)
    p.add_argument("refmodels", type=os.path.abspath)
    p.add_argument("method", nargs="*")
    args = p.parse_args()
    work = tempfile.mkdtemp(prefix="compare-mergekit-")
    families = {
        "llama": [os.path.join(args.refmodels, n)
                  for n in ("base", "ft-code", "ft-prose")],
        "gpt2": make_gpt2(args.refmodels, work),
    }
    torch.set_num_threads(1)
    if args.ties:
        by_place()
    print("| method | model | dtype | set | default | --compat mergekit |")
    print("|---|---|---|---|---|---|")
    for method in args.method or CASES:
        for family, models in families.items():
            loaded = [load_dir(m) for m in models]
            for dtype in ("float32", "bfloat16"):
                for number in range(3):
                    doc, order = recipe(method, models, number, dtype)
                    cells = run_case(args, doc, [loaded[i] for i in order],
                                     work)
                    print(f"| {method} | {family} | {dtype} | {number + 1} | "
                          f"{cells[0]} | {cells[1]} |", flush=True)
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
