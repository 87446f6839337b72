#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""compare_mergekit.py TVMERGE REFMODELS [METHOD...] - the same recipes through mergekit and through us.

Runs every method x {float32, bfloat16} x 3 parameter sets x {llama, gpt2}
through mergekit and through TVMERGE, with and without --compat mergekit, and
prints one line per case: elements of the result that are not the same bits, and
the largest error relative to the change (|ours - theirs| / |theirs - base|, both
as norms over a tensor; the worst tensor counts). REFMODELS is a directory with
the models base, ft-code, ft-prose and gpt2; the fine-tunes of gpt2 are made
here, by seeded noise.

Needs mergekit 0.1.5 with torch, from a virtual environment of its own: this is
no test of the default suite, and nothing else here needs Python packages.
Example: VENV/bin/python tools/compare_mergekit.py build/cli/tvmerge \\
         refmodels/models task_arithmetic linear
"""
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


DENSE = ({"density": 0.5}, {"density": 0.3}, {"density": 0.8})
# method: (number of donors, is there a base, parameter sets)
CASES = {
    "linear": (2, False, [{EACH: [{"weight": 0.3}, {"weight": 0.6}]},
                          {EACH: [{"weight": 1}, {"weight": -0.4}],
                           SHARED: {"normalize": False}},
                          {EACH: [{"weight": [0, 1]}, {"weight": 0.5}]}]),
    "slerp": (1, True, [{SHARED: {"t": t}} for t in (0.5, 0.2, [0, 1])]),
    "nuslerp": (2, False, [{EACH: [{"weight": a}, {"weight": b}]}
                           for a, b in ((0.5, 0.5), (0.9, 0.3), (1, 2))]),
    "multislerp": (2, True, [{EACH: [{"weight": a}, {"weight": b}]}
                             for a, b in ((0.5, 0.5), (0.9, 0.3), (1, 2))]),
    "karcher": (2, False, [{}, {SHARED: {"max_iter": 3}},
                           {SHARED: {"tol": 1e-3}}]),
    "task_arithmetic": (2, True, gta()),
    "ties": (2, True, gta(*DENSE)),
    "dare_ties": (2, True, gta(*DENSE)),
    "dare_linear": (2, True, gta(*DENSE)),
    "breadcrumbs": (2, True, gta(*({**d, "gamma": 0.05} for d in DENSE))),
    "breadcrumbs_ties": (2, True, gta(*({**d, "gamma": 0.02}
                                        for d in DENSE))),
    "della": (2, True, gta(*({**d, "epsilon": 0.1} for d in DENSE))),
    "della_linear": (2, True, gta(*({**d, "epsilon": 0.1} for d in DENSE))),
    "model_stock": (2, True, [{}, {SHARED: {"filter_wise": True}}, {}]),
    "sce": (2, True, [{}, {SHARED: {"select_topk": 0.5}},
                      {SHARED: {"select_topk": 0.1}}]),
    "ram": (2, True, [{}, {SHARED: {"epsilon": 1e-3}},
                      {SHARED: {"epsilon": 1e-2}}]),
    "ramplus_tl": (2, True, [{}, {SHARED: {"epsilon": 1e-3}},
                             {SHARED: {"r": 0.5, "alpha": 0.5}}]),
    "nearswap": (1, True, [{SHARED: {"t": t}} for t in (1e-3, 1e-2, 0.1)]),
    "arcee_fusion": (1, True, [{}, {}, {}]),
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
    donors, based, sets = CASES[method]
    params = sets[number]
    entries = []
    for i in range(donors):
        e = {"model": models[i + 1]}
        own = dict(params.get(ALL, {}))
        if EACH in params:
            own.update(params[EACH][i])
        if own:
            e["parameters"] = own
        entries.append(e)
    doc = {"merge_method": method, "models": entries, "dtype": dtype}
    if based:
        doc["base_model"] = models[0]
    if SHARED in params:
        doc["parameters"] = params[SHARED]
    return doc


def load_dir(path):
    out = {}
    for f in sorted(os.listdir(path)):
        if f.endswith(".safetensors"):
            out.update(load_file(os.path.join(path, f)))
    return out


def compare(theirs, ours, base):
    """(text, is bit-exact)"""
    if set(theirs) != set(ours):
        return f"names differ: {sorted(set(theirs) ^ set(ours))[:2]}", False
    different = total = 0
    worst = 0.0
    for k, a in theirs.items():
        b = ours[k]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{k}: {a.dtype} {b.dtype}", False
        wide = torch.int16 if a.element_size() == 2 else torch.int32
        different += (a.view(wide) != b.view(wide)).sum().item()
        total += a.numel()
        change = (a.double() - base[k].double()).norm().item()
        error = (a.double() - b.double()).norm().item()
        if error > 0:
            worst = max(worst, error / change if change > 0 else float("inf"))
    if different == 0:
        return "exact", True
    return f"{100.0 * different / total:.3f}% {worst:.1e}", False


def main():
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    tvmerge, refmodels = map(os.path.abspath, sys.argv[1:3])
    methods = sys.argv[3:] or list(CASES)
    known = subprocess.run([tvmerge, "methods", "-q"], capture_output=True,
                           text=True).stdout.split()
    work = tempfile.mkdtemp(prefix="compare-mergekit-")
    families = {
        "llama": [os.path.join(refmodels, n)
                  for n in ("base", "ft-code", "ft-prose")],
        "gpt2": make_gpt2(refmodels, work),
    }
    torch.set_num_threads(1)
    print("| method | model | dtype | set | default | --compat mergekit |")
    print("|---|---|---|---|---|---|")
    for method in methods:
        if method not in known:
            print(f"| {method} | | | | not in this build | |")
            continue
        for family, models in families.items():
            base = load_dir(models[0])
            for dtype in ("float32", "bfloat16"):
                for number in range(3):
                    doc = recipe(method, models, number, dtype)
                    path = os.path.join(work, "r.yml")
                    with open(path, "w", encoding="utf-8") as f:
                        yaml.safe_dump(doc, f, sort_keys=False)
                    peer = os.path.join(work, "peer")
                    cells = []
                    try:
                        run_merge(MergeConfiguration.model_validate(doc), peer,
                                  MergeOptions(random_seed=SEED, quiet=True,
                                               copy_tokenizer=False,
                                               write_model_card=False))
                        theirs = load_dir(peer)
                    except Exception as e:  # its own refusals are a result
                        cells = [f"mergekit: {type(e).__name__}"] * 2
                    for compat in ([], ["--compat", "mergekit"]):
                        if len(cells) == 2:
                            break
                        out = os.path.join(work, "out")
                        r = subprocess.run(
                            [tvmerge, "run", path, out, "--random-seed",
                             str(SEED), "--no-copy-tokenizer",
                             "--no-write-model-card", "-q"] + compat,
                            capture_output=True, text=True)
                        if r.returncode:
                            cells.append(f"exit {r.returncode} "
                                         f"{r.stderr.strip()[-60:]}")
                        else:
                            cells.append(compare(theirs, load_dir(out),
                                                 base)[0])
                        shutil.rmtree(out, ignore_errors=True)
                    shutil.rmtree(peer, ignore_errors=True)
                    print(f"| {method} | {family} | {dtype} | {number + 1} | "
                          f"{cells[0]} | {cells[1]} |", flush=True)
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
