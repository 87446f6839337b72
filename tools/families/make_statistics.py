#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What transformers says of the inputs of linear layers.

    pip install torch transformers numpy
    make_statistics.py DATA OUT

DATA is tests/data. For every model below, OUT/NAME.npy (fp64) is X^T X v of
every input of a block's linear layers, in the order of computation, one after
the other; shared inputs count once. X is taken over all tokens of the model's
ids; v is ((7 i) mod 11 - 5) / 5 for channel i, so that a wrong or misplaced
entry of X^T X shows. tests/data/statistics holds the output.
"""
import os
import sys

import numpy as np
import torch
import transformers as tf

MODELS = ["families/llama", "families/phi3", "families/gpt2",
          "families/gpt_neox-serial", "quickstart/base"]


def ids_of(data, name):
    path = os.path.join(data, name, "ids.npy")
    if os.path.exists(path):
        return np.load(path)
    return (np.arange(5 * 256).reshape(5, 256) * 37 + 11) % 2045


def main():
    data, out = sys.argv[1:]
    os.makedirs(out, exist_ok=True)
    for name in MODELS:
        model = tf.AutoModelForCausalLM.from_pretrained(
            os.path.join(data, name), dtype=torch.float32,
            attn_implementation="eager").eval()
        seen, probes = [], []

        def look(_, args):
            x = args[0]
            if any(x is other for other in seen):
                return
            seen.append(x)
            x = x.detach().reshape(-1, x.shape[-1]).double().numpy()
            v = ((7 * np.arange(x.shape[1])) % 11 - 5) / 5
            probes.append(x.T @ (x @ v))

        head = model.get_output_embeddings()
        for module in model.modules():
            if (isinstance(module, (torch.nn.Linear, tf.pytorch_utils.Conv1D))
                    and module is not head):
                module.register_forward_pre_hook(look)
        with torch.no_grad():
            model(torch.from_numpy(ids_of(data, name)))
        np.save(os.path.join(out, os.path.basename(name) + ".npy"),
                np.concatenate(probes))
        print(name, len(probes), "inputs")


main()
