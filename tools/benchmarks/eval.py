# SPDX-License-Identifier: Apache-2.0
"""The forward pass against transformers and against sgemm.

`tveval ppl` over random ids on a synthetic model (default: the Llama-3.2-1B
shape, bf16 weights, windows of 512 tokens, 2,048 tokens in all). Beside it, in
the same rounds on the same number of threads:

  transformers  the same ids through the same model in fp32 (virtual environment
                of TV_VENV with torch and transformers; left out where that is
                missing): forward pass and loss, without loading
  sgemm         tv_sgemm: OpenBLAS alone on the shape of our calls; on
                processors with AMX ours does not use it for these weights
                (TV_CPU=avx512 makes it), so the share can exceed 1

Ours includes reading and converting the weights, but not start-up. Tokens per
second of wall time say what a user sees; operations per second of CPU time are
disturbed less by other jobs. FLOP: 2 per weight of a linear layer and token,
and causal attention. Weights are random, so perplexities mean nothing.
"""
import json
import os
import random
import struct
import subprocess

from benchmarks import common

HELP = "forward pass against transformers and the sgemm peak"
ORDER = 30
SMOKE = {"shape": "tiny", "tokens": 512, "context": 256, "no_peer": True}
ALL = {"share": 10}

PEER = r"""
import json, os, resource, sys, time
import torch
from transformers import AutoModelForCausalLM
model, ids, threads, context = sys.argv[1:5]
torch.set_num_threads(int(threads))
def cpu():
    u = resource.getrusage(resource.RUSAGE_SELF)
    return u.ru_utime + u.ru_stime
with open(ids, encoding="ascii") as f:
    ids = torch.tensor(json.load(f)).view(-1, int(context))
m = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
m.eval()
with torch.inference_mode():
    m(ids[:1, :16])
    t0, c0 = time.monotonic(), cpu()
    loss = m(ids, labels=ids).loss.item()
    t1, c1 = time.monotonic(), cpu()
print(json.dumps({"seconds": t1 - t0, "cpu": c1 - c0}))
"""


def add_arguments(parser):
    parser.add_argument("--shape", default="1b", choices=list(common.SHAPES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--no-peer", action="store_true",
                        help="leave transformers out")


def write_ids(path, ids):
    head = ("{'descr': '<i8', 'fortran_order': False, "
            f"'shape': ({len(ids)},), }}")
    head += " " * (-(len(head) + 11) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head))
                + head.encode() + struct.pack(f"<{len(ids)}q", *ids))


def operations(shape, tokens, context):
    """FLOP of a forward pass with all logits."""
    s = common.SHAPES[shape]
    layer = (2 * s["hidden"] * s["kv"] + 2 * s["hidden"] ** 2
             + 3 * s["hidden"] * s["inter"])
    attention = s["layers"] * 4 * s["hidden"] * (context + 1) / 2
    return tokens * (2 * (s["layers"] * layer + s["hidden"] * s["vocab"])
                     + attention)


def python_with_peer():
    venv = os.environ.get("TV_VENV")
    python = os.path.join(venv, "bin", "python") if venv else "python3"
    try:
        subprocess.run([python, "-c", "import torch, transformers"],
                       check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return python


def run(bench):
    o = bench.options
    threads = o.threads or len(os.sched_getaffinity(0))
    tokens = o.tokens // o.context * o.context
    if tokens == 0:
        raise SystemExit("bench: --tokens must fill one --context")
    model = os.path.join(bench.models(o.shape), "base")
    rng = random.Random(1)
    ids = [rng.randrange(common.SHAPES[o.shape]["vocab"])
           for _ in range(tokens)]
    npy, js = bench.path("ids.npy"), bench.path("ids.json")
    write_ids(npy, ids)
    with open(js, "w", encoding="ascii") as f:
        json.dump(ids, f)
    script = bench.path("peer.py")
    with open(script, "w", encoding="ascii") as f:
        f.write(PEER)
    python = None if o.no_peer else python_with_peer()
    if not python and not o.no_peer:
        common.say("bench: no torch and transformers (TV_VENV); without them")
    flop = operations(o.shape, tokens, o.context)
    kernels = json.loads(common.Timed(
        [bench.program("tveval"), "--version", "--json"]).out)["kernels"]
    ours, peers, gemms, memory, peer_memory, cpu = [], [], [], 0, 0, []
    for _ in bench.rounds():
        gemms.append(json.loads(common.Timed(
            [bench.program("tv_sgemm"), str(threads),
             "0.2" if o.shape == "tiny" else "5"]).out))
        t = common.Timed(
            [bench.program("tveval"), "ppl", model, "--ids", npy, "--bos",
             "none", "--context", str(o.context), "--threads", str(threads),
             "--memory", o.memory, "--json", "--progress=none"])
        ours.append(json.loads(t.out)["tokens_per_second"] * tokens
                    / json.loads(t.out)["texts"][0]["tokens_scored"])
        cpu.append(t.cpu)
        memory = max(memory, t.peak)
        if python:
            t = common.Timed([python, script, model, js, str(threads),
                              str(o.context)])
            peers.append(json.loads(t.out))
            peer_memory = max(peer_memory, t.peak)
    rate = [x / tokens * flop / 1e9 for x in ours]
    row = {
        "shape": o.shape, "tokens": tokens, "context": o.context,
        "threads": threads, "memory": o.memory, "flop": flop,
        "core": gemms[0]["core"], "kernels": kernels,
        "tokens_per_second": common.spread(ours),
        "cpu_seconds": common.spread(cpu),
        "gflops": common.spread(rate),
        "sgemm_gflops": common.spread([g["gflops"] for g in gemms]),
        "of_sgemm": common.ratios(rate, [g["gflops"] for g in gemms]),
        "of_sgemm_cpu": common.ratios(
            [flop / 1e9 / c for c in cpu],
            [g["gflop_per_cpu_second"] for g in gemms]),
        "peak_anonymous_bytes": memory}
    if peers:
        theirs = [tokens / p["seconds"] for p in peers]
        row.update({
            "transformers_tokens_per_second": common.spread(theirs),
            "of_transformers": common.ratios(ours, theirs),
            "of_transformers_cpu": common.ratios([p["cpu"] for p in peers],
                                                 cpu),
            "transformers_anonymous_bytes": peer_memory})
    return [row]


def table(rows):
    out = []
    for r in rows:
        peer = "transformers_tokens_per_second" in r
        out.append([
            f"{r['shape']}, {r['tokens']} tokens, {r['threads']} threads, "
            f"{r['kernels']}",
            common.with_range(r["tokens_per_second"], 1),
            common.with_range(r["transformers_tokens_per_second"], 1)
            if peer else "-",
            common.with_range(r["of_transformers"]) if peer else "-",
            common.with_range(r["of_transformers_cpu"]) if peer else "-",
            common.with_range(r["of_sgemm"]),
            common.with_range(r["of_sgemm_cpu"]),
            common.mib(r["peak_anonymous_bytes"]) + (
                f" ({common.mib(r['transformers_anonymous_bytes'])})"
                if peer else "")])
    return common.markdown(
        ["model", "tokens/s", "transformers fp32", "ratio", "ratio, CPU time",
         "of sgemm", "of sgemm, CPU time", "peak anonymous (transformers)"],
        out)


def check(rows):
    return [f"{r['of_sgemm_cpu']['max']:.3f} of sgemm" for r in rows
            if r["of_sgemm_cpu"]["max"] < 0.02]
