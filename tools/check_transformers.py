#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_transformers.py TVMERGE MODEL_DIR RECIPE...

Merges each recipe (model names relative to MODEL_DIR) and loads the result with
transformers: no missing or unexpected weights, logits finite. For developers:
needs torch and transformers from PyPI in a throw-away environment; nothing at
run time or in the test suite does.
"""
import os
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModelForCausalLM


def main():
    tvmerge, models = map(os.path.abspath, sys.argv[1:3])
    bad = 0
    for recipe in map(os.path.abspath, sys.argv[3:]):
        name = os.path.basename(recipe)
        with tempfile.TemporaryDirectory() as tmp:
            out = os.path.join(tmp, "out")
            r = subprocess.run([tvmerge, "run", recipe, out, "-q",
                                "--progress=none"], cwd=models,
                               capture_output=True, text=True)
            if r.returncode:
                print(f"{name}: exit {r.returncode}: {r.stderr.strip()}")
                bad += 1
                continue
            model, info = AutoModelForCausalLM.from_pretrained(
                out, output_loading_info=True)
            ids = torch.arange(1, 33)[None]
            logits = model.float()(ids).logits
            ok = bool(torch.isfinite(logits).all()) and not (
                info["missing_keys"] or info["unexpected_keys"]
                or info["mismatched_keys"])
            bad += not ok
            print(f"{name}: {'loads' if ok else 'BAD'}, "
                  f"{sum(p.numel() for p in model.parameters())} parameters, "
                  f"{info}")
    return bad != 0


if __name__ == "__main__":
    sys.exit(main())
