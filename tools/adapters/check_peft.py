#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_peft.py BASE ADAPTER_DIR...    (torch, transformers, peft from PyPI)

Loads each adapter into the base with PEFT: no missing or unexpected keys, no
warning about keys, finite logits; prints the largest change of a logit.
"""
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = sys.argv[1]
ids = torch.arange(1, 33).reshape(2, 16)
bad = 0
for d in sys.argv[2:]:
    m = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = m(ids).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pm = PeftModel.from_pretrained(m, d)
    keys = [str(w.message) for w in said if "key" in str(w.message)]
    with torch.no_grad():
        after = pm(ids).logits
    ok = bool(torch.isfinite(after).all()) and not keys
    bad += not ok
    print(f"{d}: {'loads' if ok else 'DOES NOT LOAD'}, logits move by up to "
          f"{float((after - before).abs().max()):.3f} {keys[:1]}")
sys.exit(bad > 0)
