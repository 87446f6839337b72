#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""device.py BIN_DIR QUICKSTART FAKE_CUDA_DIR

A merge by sparsegpt_ties from its texts to its weights with --device cuda, on
the emulated device (tests/support/fake_cuda.c): beside the CPU's within I2 of
methods.md, also with the least memory that the plan asks for; killed, its
device lost, or without device memory at any moment it ends with the documented
status and goes on to the same bytes.
"""
import json
import os
import re
import shutil
import sys

import numpy as np

from common import check, finish, read_safetensors, run, run_json, temp

BIN = os.path.abspath(sys.argv[1])
MODELS = os.path.abspath(sys.argv[2])
TVMERGE = os.path.join(BIN, "tvmerge")
TVEVAL = os.path.join(BIN, "tveval")
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


def compare(name, cpu, gpu):
    """I2: 99.9% of a mask; where all of it is equal, deltas within 1e-4."""
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


def beside_the_cpu(where):
    for name, donors, settings in (
            ("one", ("code",), ""),
            ("cg", ("code",), "error_correction: obs+cg, rescale: true"),
            ("nm", ("code",), "pattern: 2:4"),
            ("two", ("code", "prose"), "")):
        r = recipe(f"{where}/{name}.yml", donors, settings)
        merge(r, f"{where}/{name}.cpu", "--device", "cpu")
        merge(r, f"{where}/{name}.gpu", "--device", "cuda")
        compare(name, f"{where}/{name}.cpu", f"{where}/{name}.gpu")


def device_of(out):
    with open(f"{out}/tvmerge.json") as f:
        return re.findall('"device": "(Fake[^"]*)', f.read())


def least_memory(where):
    """Refused with a number before anything is written; with it, it runs."""
    r, cpu, out = f"{where}/cg.yml", f"{where}/cg.cpu", f"{where}/least"
    p = merge(r, out, "--device", "cuda", "--device-memory", "5000000", code=5)
    needed = re.search(r"needs (\d+) bytes of device memory", p.stderr)
    if not check(needed and not os.path.exists(out), f"refused: {p.stderr}"):
        return
    merge(r, out, "--device", "cuda", "--device-memory",
          str(int(needed[1]) - 1), code=5)
    merge(r, out, "--device", "cuda", "--device-memory", needed[1],
          FAKE_CUDA_MEMORY=needed[1])
    compare(f"with {needed[1]} bytes", cpu, out)
    # What that changes is part of the plan.
    check(device_of(out) == ["Fake GPU 0, 28 of 28 factors by the CPU"],
          f"the device is {device_of(out)}")
    # Which it decided when it began: with other memory it goes on, or is
    # finished, as it is.
    p = run(TVMERGE, r, out, "--device", "cuda", env=DEVICE)
    check("complete already" in p.stderr, p.stderr)
    more, less = f"{where}/more", ("--device-memory", needed[1])
    lost = {"FAKE_CUDA_LOSE": "900", "TV_GROUP_BYTES": "1"}
    merge(r, more, "--device", "cuda", "-j", "1", code=1, **lost)
    p = merge(r, more, "--device", "cuda", *less, code=5)
    check("began with more" in p.stderr, p.stderr)
    p = run(TVMERGE, "plan", r, "--device", "cuda", "--device-memory", "11M",
            env=DEVICE)
    check("layers come to the device in parts" in p.stdout + p.stderr,
          f"plan says that layers come in parts: {p.stdout}{p.stderr}")
    merge(r, more, "--device", "cuda", "--device-memory", "40M")
    same(more, f"{where}/cg.gpu", "begun with all memory, ended with less")
    shutil.rmtree(more)
    merge(r, more, "--device", "cuda", *less, "-j", "1", code=1, **lost)
    merge(r, more, "--device", "cuda")
    same(more, out, "begun with little memory, ended with all")
    shutil.rmtree(more)
    merge(r, more, "--device", "cuda", "-j", "1", code=1, **lost)
    merge(r, more, "--device", "cuda", *less, "--accept-numerics")
    check(device_of(more) == ["Fake GPU 0"], "accepted")


def full_for(where, r, want, times):
    """One allocation finds nothing: what is spare goes, and it is asked for
    again. Two: smaller forms, or exit 5 and going on."""
    out, ended = f"{where}/once", {0: 0, 5: 0}
    for n in (1, 3, 8, 21, 24, 40) if times == 1 else (3, 21, 40):
        p = run(TVMERGE, r, out, "-q", "-j", "1", "--device", "cuda",
                env={**DEVICE, "FAKE_CUDA_FULL": str(n),
                     "FAKE_CUDA_FULL_FOR": str(times)})
        if not check(p.returncode in (ended if times > 1 else (0,)),
                     f"full {times}x at {n}: exit {p.returncode}: {p.stderr}"):
            continue
        ended[p.returncode] += 1
        if p.returncode == 5:
            check("device memory" in p.stderr, p.stderr)
            merge(r, out, "--device", "cuda")
        same(out, want, f"full {times}x at {n}")
        shutil.rmtree(out)
    print(f"full {times}x: {ended}")


def perplexity_full(where):
    """A pass goes on, with weights that do not stay, or on fewer rows."""
    text = f"{where}/few.txt"
    with open(f"{MODELS}/text/prose.val.txt") as f, open(text, "w") as g:
        g.write(f.read(300))

    def ppl(**env):
        p = run(TVEVAL, "ppl", f"{MODELS}/base", "--context", "32", "--text",
                text, "--json", "--progress=none", "--device", "cuda",
                env={**DEVICE, **env})
        return json.loads(p.stdout)["texts"][0]["ppl"]

    want = ppl()
    for n in (1, 4, 16):
        check(ppl(FAKE_CUDA_FULL=str(n), FAKE_CUDA_FULL_FOR="1") == want,
              f"perplexity, full once at {n}")
    for n in (9, 25):
        check(ppl(FAKE_CUDA_FULL=str(n), FAKE_CUDA_FULL_FOR="2") == want,
              f"perplexity, full twice at {n}")


def sweep(where, r, want, what, code, said, options=(), **env):
    """A fault at call 1, 2, 5, ... until a run ends without meeting it."""
    (fault, _), = [(k, v) for k, v in env.items() if v is None]
    n, fired, out = 1, 0, f"{where}/{what}"
    while True:
        env[fault] = str(n)
        p = run(TVMERGE, r, out, "-q", "-j", "1", "--device", "cuda", *options,
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
            check(state == "unfinished", f"{what} at {n}: {state}")
        if n % 2 == 0:  # goes on; else the next fault meets what there is
            merge(r, out, "--device", "cuda", *options)
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
    least_memory(where)
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
    full_for(where, r, want, 1)
    full_for(where, r, want, 2)
    perplexity_full(where)
    # The same with factors by the CPU, H and U in panels.
    little = ("--device-memory", "9100000")
    merge(r, f"{where}/little", "--device", "cuda", *little)
    for fault, code, said in (("FAKE_CUDA_KILL", -9, ""),
                              ("FAKE_CUDA_LOSE", 1, "LAUNCH_FAILED")):
        n = sweep(where, r, f"{where}/little", f"{fault} with little memory",
                  code, said, little, **{fault: None})
        check(n > 6, f"{fault} with little memory: {n} times")
    finish("device")


main()
