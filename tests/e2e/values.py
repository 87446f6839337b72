# SPDX-License-Identifier: Apache-2.0
"""What e2e scripts compute with numpy: the values of a model's tensors, and the
windows of text that calibration makes of a file."""
import json
import os

import numpy as np

from common import read_safetensors, run_json


def load(path):
    """{name: fp64 array} of a file or of a directory's files."""
    out = {}
    for k, (dtype, shape, raw) in read_safetensors(path).items():
        if dtype == "BF16":
            x = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            x = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype])
        out[k] = x.reshape(shape).astype(np.float64)
    return out


def windows(tveval, quick, domain, samples, context):
    """[samples, context] ids of a text of the bundled models, BOS first."""
    ids = run_json(tveval, "tokenize", "base", "--text",
                   f"text/{domain}.calib.txt", "--json", cwd=quick)["ids"]
    with open(os.path.join(quick, "base/config.json")) as f:
        bos = json.load(f)["bos_token_id"]
    n = context - 1
    all_of = [ids[i:i + n] for i in range(0, len(ids) - n + 1, n)]
    take = [all_of[i * len(all_of) // samples] for i in range(samples)]
    return np.array([[bos] + w for w in take])
