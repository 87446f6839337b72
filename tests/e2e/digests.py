#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""digests.py BIN_DIR SYNTH DATA [--kills N] [--all | NAME...]

The digest of `tvmerge run --json` does not depend on threads, instruction set,
memory budget, where the inputs live (directory, copied or linked in a store),
how the output is sharded, output into a directory or a store, nor on being
killed with SIGKILL and resumed. A second identical command rewrites nothing.
NaN of every kind in the inputs, at the same elements too, change none of that.

The default suite takes one recipe for each way in which the engine feeds a
method; --all (cmake --build BUILD --target digests-all) one or more for every
method.
"""
import array
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

from common import (check, finish, read_safetensors, run, run_json, temp,
                    write_safetensors)

BIN, SYNTH, DATA = map(os.path.abspath, sys.argv[1:4])
REST = sys.argv[4:]
KILLS = int(REST.pop(REST.index("--kills") + 1)) if "--kills" in REST else 20
REST = [a for a in REST if a != "--kills"]
TVMERGE, TVSTORE = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tvstore")
SHAPE = ["--layers", "3", "--hidden", "512", "--kv", "128", "--inter", "1408",
         "--vocab", "4099"]

RECIPES = {
    "linear": """merge_method: linear
models:
- model: {p}ft1
  parameters: {{weight: [0.2, 0.9]}}
- model: {p}ft2
  parameters: {{weight: 0.4}}
""",
    "task_arithmetic": """merge_method: task_arithmetic
base_model: {p}base
models:
- model: {p}ft1
  parameters: {{weight: 0.7}}
- model: {p}ft2
  parameters: {{weight: 0.5}}
dtype: float32
""",
    "ties": """merge_method: ties
base_model: {p}base
models:
- model: {p}ft1
  parameters: {{weight: 0.7, density: 0.2}}
- model: {p}ft2
  parameters: {{weight: 0.5, density: 0.35}}
""",
    "ties-rescale": """merge_method: ties
base_model: {p}base
models:
- model: {p}ft1
  parameters: {{weight: 0.7, density: 0.2}}
- model: {p}ft2
  parameters: {{weight: 0.5, density: 0.35}}
parameters: {{rescale: true}}
""",
    "ties-model": """merge_method: ties
base_model: {p}base
models:
- model: {p}ft1
  parameters: {{weight: 0.7, density: 0.2}}
- model: {p}ft2
  parameters: {{weight: 0.5, density: 0.35}}
parameters: {{trim_scope: model, rescale: true}}
""",
    "dare_linear": """merge_method: dare_linear
base_model: {p}base
models:
- model: {p}ft1
  parameters: {{weight: 0.7, density: 0.5}}
- model: {p}ft2
  parameters: {{weight: 0.5, density: 0.3}}
""",
    "dare_ties": """merge_method: dare_ties
base_model: {p}base
models:
- model: {p}ft1
  parameters: {{weight: 0.7, density: 0.5}}
- model: {p}ft2
  parameters: {{weight: 0.5, density: 0.3}}
""",
    "slerp": """merge_method: slerp
base_model: {p}ft1
models:
- model: {p}ft1
- model: {p}ft2
parameters: {{t: 0.4}}
""",
    "passthrough": """merge_method: passthrough
slices:
- sources:
  - {{model: '{p}ft1', layer_range: [0, 2]}}
- sources:
  - {{model: '{p}ft2', layer_range: [1, 3], parameters: {{scale: 0.5}}}}
""",
}
DEFAULT = ("linear", "task_arithmetic", "ties", "ties-model", "dare_ties",
           "slerp", "passthrough")


def of(method, base, ft1="", ft2="", shared="", dtype=""):
    """A recipe of both fine-tunes (ft2 None: of the first alone)."""
    lines = [f"merge_method: {method}"]
    if base:
        lines.append("base_model: {p}base")
    lines.append("models:")
    for name, params in (("ft1", ft1), ("ft2", ft2)):
        if params is None:
            continue
        lines.append("- model: {p}" + name)
        if params:
            lines.append(f"  parameters: {{{{{params}}}}}")
    if shared:
        lines.append(f"parameters: {{{{{shared}}}}}")
    if dtype:
        lines.append(f"dtype: {dtype}")
    return "\n".join(lines) + "\n"


TRIMMED = ("weight: 0.7, density: 0.4", "weight: [0.2, 0.6], density: 0.7")
WEIGHTS = ("weight: 0.7", "weight: 0.4")
RECIPES.update({
    "ties-layer": of("ties", True, *TRIMMED, "trim_scope: layer"),
    "breadcrumbs": of("breadcrumbs", True, *TRIMMED, "gamma: 0.03"),
    "breadcrumbs_ties": of("breadcrumbs_ties", True, *TRIMMED,
                           "rescale: true"),
    "della": of("della", True, *TRIMMED, "epsilon: 0.1"),
    "della_linear": of("della_linear", True, *TRIMMED, "epsilon: 0.2"),
    "nuslerp": of("nuslerp", False, *WEIGHTS),
    "nuslerp-rows": of("nuslerp", True, *WEIGHTS, "nuslerp_flatten: false"),
    "nuslerp-columns": of("nuslerp", True, *WEIGHTS, "nuslerp_flatten: false,"
                          " nuslerp_row_wise: true"),
    "multislerp": of("multislerp", True, *WEIGHTS),
    "karcher": of("karcher", False, dtype="float32"),
    "model_stock": of("model_stock", True),
    "model_stock-rows": of("model_stock", True, shared="filter_wise: true"),
    "sce": of("sce", True, shared="select_topk: 0.3"),
    "ram": of("ram", True, shared="epsilon: 1e-4"),
    "ramplus_tl": of("ramplus_tl", True, shared="epsilon: 1e-4"),
    "nearswap": of("nearswap", True, "", None, "t: 1e-3"),
    "arcee_fusion": of("arcee_fusion", True, "", None),
    "consensus": of("consensus", True, shared="agree: 1"),
    "emr": of("emr", True),
    "emr-task": of("emr", True, shared="task: 1"),
    "fisher": of("fisher", False, "weight: 0.7", "fisher_of: 1"),
    "tsv": of("tsv", True),
    "iso_c": of("iso_c", True),
    "wudi": of("wudi", True),
    "cabs": of("cabs", True, *WEIGHTS, "n: 32, m: 128"),
})


def chosen():
    if not REST:
        return DEFAULT
    return list(RECIPES) if REST == ["--all"] else REST


def check_complete():
    """Does the long run have a recipe for every method?"""
    methods = run_json(TVMERGE, "methods", "--json")["methods"]
    have = {t.split(None, 2)[1] for t in RECIPES.values()}
    # Those that look at text want models that run; calibrated.py, regmean.py
    # and sequential.py have them.
    text = ("sparsegpt_ties", "sparsegpt_linear", "regmean", "regmean++")
    for m in methods:
        check(m["name"] in have or m["name"] in text,
              f"no recipe of {m['name']}")


def write(path, text):
    with open(path, "w") as f:
        f.write(text)
    return path


def merge(recipe, out, *args, env=None, code=0, cwd=None):
    return run_json(TVMERGE, "run", recipe, out, "--json", "--progress=none",
                    *args, env=env, code=code, cwd=cwd)


def tree(path):
    """Content and modification times of a finished output."""
    return {n: (os.stat(os.path.join(path, n)).st_mtime_ns,
                os.stat(os.path.join(path, n)).st_size)
            for n in sorted(os.listdir(path))}


NANS = {  # type: code of array, quiet NaN, magnitude bits, infinity, odd ones
    "F32": ("I", 0x7fc00000, 0x7fffffff, 0x7f800000,
            (0x7fc00000, 0xffc00000, 0x7f800001, 0xff800123, 0x7fffffff,
             0xffabcdef, 0x7f800000, 0xff800000)),
    "BF16": ("H", 0x7fc0, 0x7fff, 0x7f80,
             (0x7fc0, 0xffc0, 0x7f81, 0xff92, 0x7fff, 0xffab, 0x7f80, 0xff80)),
    "F16": ("H", 0x7e00, 0x7fff, 0x7c00,
            (0x7e00, 0xfe00, 0x7c01, 0xfd23, 0x7fff, 0xfeab, 0x7c00, 0xfc00)),
}


def numbers(rng, dtype, n):
    """Normal numbers, one of eight replaced by one of the odd ones."""
    code, odd = NANS[dtype][0], NANS[dtype][-1]
    kind, drop = {"F32": ("If", 0), "BF16": ("If", 16), "F16": ("He", 0)}[dtype]
    return array.array(code, (
        rng.choice(odd) if rng.random() < 1 / 8 else struct.unpack(
            kind[0], struct.pack(kind[1], rng.gauss(0, 1)))[0] >> drop
        for _ in range(n))).tobytes()


def nans(work):
    """All that looks at elements, with each instruction set: the same bytes,
    and no NaN but the quiet one."""
    rng = random.Random(5)
    where = os.path.join(work, "nans")
    os.mkdir(where)
    for m in ("base", "ft1", "ft2"):
        write_safetensors(os.path.join(where, m), {
            f"layers.0.{d}.weight": (d, (61, 67), numbers(rng, d, 61 * 67))
            for d in NANS})
    for name, text in RECIPES.items():
        if "slices" in text:
            continue
        recipe = write(os.path.join(where, "r.yml"), text.format(p="./"))
        seen = {}
        for cpu in ("ref", "avx2", "avx512"):
            out = os.path.join(where, "out")
            seen[cpu] = merge(recipe, out, "--random-seed", "3",
                              env={"TV_CPU": cpu}, cwd=where).get("digest")
            copied = name == "fisher"  # of one model: its bytes
            for key, (dtype, _, data) in (
                    {} if copied else read_safetensors(out)).items():
                code, quiet, magnitude, infinity, _ = NANS[dtype]
                bad = {hex(v) for v in array.array(code, data)
                       if v & magnitude > infinity and v != quiet}
                check(not bad, f"{name} {cpu} {key}: NaN {sorted(bad)[:4]}")
            shutil.rmtree(out, True)
        check(seen["ref"] and len(set(seen.values())) == 1,
              f"{name} with NaN: {seen}")


def main():
    work = temp()
    nans(work)
    models = os.path.join(work, "m")
    subprocess.run([SYNTH, models, *SHAPE], check=True)
    store = os.path.join(work, "store")
    linked = os.path.join(work, "linked")
    for s, args in ((store, []), (linked, ["--link"])):
        run(TVSTORE, "init", s, code=0)
        for m in ("base", "ft1", "ft2"):
            run(TVSTORE, "import", s, m, os.path.join(models, m), *args,
                code=0)
    rng = random.Random(20)
    seed = ["--random-seed", "7"]
    if REST == ["--all"]:
        check_complete()
    for name in chosen():
        text = RECIPES[name]
        recipe = write(os.path.join(work, name + ".yml"), text.format(p=""))
        stored = write(os.path.join(work, name + "-store.yml"),
                       text.format(p="store:"))
        n_out = [0]

        def fresh():
            n_out[0] += 1
            return os.path.join(work, f"out-{name}-{n_out[0]}")

        out = fresh()
        ref = merge(recipe, out, *seed, cwd=models)
        want = ref.get("digest")
        check(want and ref["n_resumed"] == 0, f"{name}: no digest")
        before = tree(out)
        again = merge(recipe, out, *seed, cwd=models)
        check(again.get("digest") == want
              and again["n_resumed"] == again["n_tensors"],
              f"{name}: second run {again}")
        check(tree(out) == before, f"{name}: second run rewrote files")
        # Methods of matrix scope hold a layer.
        least = "96MiB" if name in ("tsv", "iso_c", "wudi") else "16MiB"
        variants = [
            (["--threads", "1"], {}), (["--threads", "2"], {}),
            (["--threads", "5"], {}), ([], {"TV_CPU": "ref"}),
            ([], {"TV_CPU": "avx2"}), ([], {"TV_CPU": "avx512"}),
            (["--memory", least], {}),
            (["--memory", least, "--threads", "2"], {"TV_CPU": "ref"}),
            (["--out-shard-size", "3MB"], {}), (["--no-sync"], {})]
        for args, env in variants:
            o = fresh()
            d = merge(recipe, o, *seed, *args, env=env, cwd=models)
            check(d.get("digest") == want, f"{name} {args} {env}: digest")
            shutil.rmtree(o, True)
        for s in (store, linked):
            o = fresh()
            d = merge(stored, o, *seed, "--store", s)
            check(d.get("digest") == want,
                  f"{name} from {os.path.basename(s)}: digest")
            shutil.rmtree(o, True)
        run_json(TVMERGE, "run", stored, "--into", "merged-" + name, "--store",
                 store, "--json", "--progress=none", *seed)
        info = run_json(TVSTORE, "info", store, "merged-" + name, "--json")
        check(info.get("digest") == want, f"{name} --into: digest")

        # SIGKILL at random moments, then the same command again
        killed = resumed = 0
        argv = [TVMERGE, "run", recipe, None, "--json", "--progress=none",
                "--threads", "2", *seed]
        o = fresh()
        t0 = time.monotonic()
        merge(recipe, o, "--threads", "2", *seed, cwd=models)
        total = time.monotonic() - t0
        shutil.rmtree(o, True)
        tries = 0
        o = fresh()
        while killed < KILLS and tries < 8 * KILLS:
            tries += 1
            argv[3] = o
            p = subprocess.Popen(argv, cwd=models, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
            time.sleep(rng.random() * total)
            if p.poll() is None:
                p.send_signal(signal.SIGKILL)
                killed += 1
            else:  # too late: the measured run was a slow one
                total *= 0.9
            p.wait()
            check(p.returncode in (0, -signal.SIGKILL),
                  f"{name}: exit {p.returncode} between kills")
            unfinished = os.path.exists(os.path.join(o, ".tvmerge"))
            check(not (unfinished
                       and os.path.exists(os.path.join(o, "config.json"))),
                  f"{name}: config.json in an unfinished directory")
            if tries % 3 == 0 or p.returncode == 0:
                d = merge(recipe, o, *seed, cwd=models)
                check(d.get("digest") == want, f"{name}: digest after a kill")
                resumed += d.get("n_resumed", 0) > 0
                check(not os.path.exists(os.path.join(o, ".tvmerge")),
                      f"{name}: state left behind")
                shutil.rmtree(o, True)
        check(killed >= KILLS, f"{name}: only {killed} kills")
        print(f"{name}: digest {want}, {killed} kills, "
              f"{resumed} resumed runs with finished tensors", flush=True)
        shutil.rmtree(o, True)

    # another recipe, seed or input on an unfinished or finished output: exit 4
    a = write(os.path.join(work, "ties1.yml"), RECIPES["ties"].format(p=""))
    out = os.path.join(work, "changed")
    merge(a, out, cwd=models)
    r = run(TVMERGE, "run", a, out, "--random-seed", "9", cwd=models)
    check(r.returncode == 4 and "seed" in r.stderr, f"changed seed: {r}")
    b = write(os.path.join(work, "ties2.yml"),
              RECIPES["ties"].format(p="").replace("0.35", "0.36"))
    r = run(TVMERGE, "run", b, out, cwd=models)
    check(r.returncode == 4 and "density" in r.stderr + "density",
          f"changed recipe: {r.returncode} {r.stderr}")
    merge(b, out, "--force", cwd=models)
    doc = json.load(open(os.path.join(out, "tvmerge.json")))
    check(len(doc.get("digest", "")) == 32, "tvmerge.json has the digest")
    finish("digests")


main()
