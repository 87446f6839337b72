#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""run_oracle.py TVMERGE MODELS [RECIPE...]: merges every recipe of recipes/
with two seeds' worth of options and has oracle.py recompute the result."""
import glob
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))


# Of matrix scope or with input statistics: compared with numpy in
# tests/e2e/matrix.py, regmean.py, calibrated.py and tools/check_sparsegpt.py.
ELSEWHERE = {"tsv", "iso_c", "wudi", "regmean", "regmean++", "sparsegpt_ties",
             "sparsegpt_linear"}


def forgotten(tvmerge, recipes):
    """How many methods have neither a recipe here nor a place elsewhere."""
    known = subprocess.run([tvmerge, "methods", "-q"], capture_output=True,
                           text=True, check=True).stdout.split()
    have = set()
    for path in recipes:
        with open(path, encoding="utf-8") as f:
            have |= {x.split()[1] for x in f if x.startswith("merge_method:")}
    missing = [m for m in known if m not in have | ELSEWHERE]
    if missing:
        print(f"no recipe of {', '.join(missing)}")
    return len(missing)


def main():
    tvmerge, models = map(os.path.abspath, sys.argv[1:3])
    recipes = [os.path.abspath(r) for r in sys.argv[3:]] or sorted(
        glob.glob(os.path.join(HERE, "recipes", "*.yml")))
    failed = 0
    if not sys.argv[3:]:
        failed += forgotten(tvmerge, recipes)
    for recipe in recipes:
        random = "dare" in recipe or "della" in recipe
        for seed in (0, 42) if random else (0,):
            with tempfile.TemporaryDirectory() as tmp:
                out = os.path.join(tmp, "out")
                r = subprocess.run(
                    [tvmerge, "run", recipe, out, "--random-seed", str(seed),
                     "--progress=none", "-q"], cwd=models,
                    capture_output=True, text=True)
                if r.returncode:
                    print(f"{os.path.basename(recipe)}: exit {r.returncode}: "
                          f"{r.stderr.strip()}")
                    failed += 1
                    continue
                failed += subprocess.run(
                    [sys.executable, os.path.join(HERE, "oracle.py"), recipe,
                     out, "--seed", str(seed), "--model-dir",
                     models]).returncode != 0
    print(f"{len(recipes)} recipes, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
