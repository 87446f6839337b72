#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""device.py BIN_DIR QUICKSTART FAKE_CUDA_DIR

A merge by sparsegpt_ties from its texts to its weights with --device cuda, on
the emulated device (tests/support/fake_cuda.c): beside the CPU's within I2 of
methods.md; killed, its device lost, or without device memory at any moment it
ends with the documented status and goes on to the same bytes.
"""
import os
import shutil
import sys

import numpy as np

from common import check, finish, read_safetensors, run, run_json, temp

BIN = os.path.abspath(sys.argv[1])
MODELS = os.path.abspath(sys.argv[2])
TVMERGE = os.path.join(BIN, "tvmerge")
DEVICE = {"LD_LIBRARY_PATH": os.path.abspath(sys.argv[3])}


def recipe(path, donors, settings, samples=4, context=48):
    lines = ["merge_method: sparsegpt_ties", f"base_model: {MODELS}/base",
             "dtype: float32", "parameters: {density: 0.3, weight: 1, %s}" %
             settings, "models:"]
    for d in donors:
        lines += [f"- model: {MODELS}/ft-{d}",
                  "  calibration: {text: %s/text/%s.calib.txt, samples: %d, "
                  "context: %d}" % (MODELS, d, samples, context)]
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")
    return path


def deltas(path):
    def values(p):
        out = {}
        for name, (dtype, shape, raw) in read_safetensors(p).items():
            x = np.frombuffer(raw, np.float32) if dtype == "F32" else (
                np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(
                    np.float32)
            out[name] = x.reshape(shape).astype(np.float64)
        return out
    base = values(f"{MODELS}/base")
    return {n: x - base[n] for n, x in values(path).items()}


def merge(r, out, *options, code=0, **env):
    return run(TVMERGE, r, out, "-q", *options, code=code,
               env={**DEVICE, **env})


def same(a, b, what):
    with open(f"{a}/model.safetensors", "rb") as f, \
         open(f"{b}/model.safetensors", "rb") as g:
        check(f.read() == g.read(), what)


def beside_the_cpu(where):
    """I2: 99.9% of a mask; where all of it is equal, deltas within 1e-4."""
    for name, donors, settings in (
            ("one", ("code",), ""),
            ("cg", ("code",), "error_correction: obs+cg, rescale: true"),
            ("nm", ("code",), "pattern: 2:4"),
            ("two", ("code", "prose"), "")):
        r = recipe(f"{where}/{name}.yml", donors, settings)
        cpu, gpu = f"{where}/{name}.cpu", f"{where}/{name}.gpu"
        merge(r, cpu, "--device", "cpu")
        merge(r, gpu, "--device", "cuda")
        a, b = deltas(cpu), deltas(gpu)
        other = total = 0
        worst = 0.0
        for n in a:
            swapped = np.count_nonzero((a[n] != 0) != (b[n] != 0))
            other += swapped
            total += a[n].size
            if swapped == 0 and np.any(a[n]):
                worst = max(worst, np.linalg.norm(a[n] - b[n]) /
                            np.linalg.norm(a[n]))
        print(f"{name}: {other} of {total} entries chosen otherwise, relative "
              f"difference at most {worst:.1e}")
        check(other <= 1e-3 * total, f"{name}: {other} of {total} are chosen "
              "otherwise")
        check(worst <= 1e-4, f"{name}: relative difference {worst}")


def sweep(where, r, want, what, code, said, status="unfinished", **env):
    """A fault at call 1, 2, 5, ... until a run ends without meeting it."""
    (fault, _), = [(k, v) for k, v in env.items() if v is None]
    n, fired, out = 1, 0, f"{where}/{what}"
    while True:
        env[fault] = str(n)
        p = run(TVMERGE, r, out, "-q", "-j", "1", "--device", "cuda",
                env={**DEVICE, **env})
        if p.returncode == 0:
            break
        fired += 1
        if not check(p.returncode == code and said in p.stderr,
                     f"{what} at {n}: exit {p.returncode}: {p.stderr}"):
            break
        check(not os.path.exists(f"{out}/config.json"), f"{what}: no result")
        if os.path.exists(out):
            state = run_json(TVMERGE, "status", out, "--json")["state"]
            check(state == status, f"{what} at {n}: {state}")
        if n % 2 == 0:  # goes on; else the next fault meets what there is
            merge(r, out, "--device", "cuda")
            same(out, want, f"{what} at {n}, finished")
            shutil.rmtree(out)
        n = n * 2 + fired % 2
    same(out, want, f"{what}: met no more")
    shutil.rmtree(out)
    print(f"{what}: {fired} times")
    return fired


def main():
    where = temp()
    beside_the_cpu(where)
    r = recipe(f"{where}/short.yml", ("code",), "", 1, 16)
    want = f"{where}/want"
    merge(r, want, "--device", "cuda")
    n = sweep(where, r, want, "killed", -9, "", FAKE_CUDA_KILL=None)
    check(n > 6, f"killed {n} times")
    n = sweep(where, r, want, "lost", 1, "CUDA_ERROR_LAUNCH_FAILED",
              FAKE_CUDA_LOSE=None)
    check(n > 6, f"lost {n} times")
    n = sweep(where, r, want, "full", 5, "device memory", FAKE_CUDA_FULL=None)
    check(n > 3, f"full {n} times")
    finish("device")


main()
