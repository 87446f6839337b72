# SPDX-License-Identifier: Apache-2.0
"""Pruning one layer by SparseGPT, beside the same in PyTorch.

One layer of the 1B shape (8192 inputs, 2048 outputs): Cholesky factor and
triangular inverse, then the loop over blocks of 128 inputs. Ours uses one
thread; PyTorch (--torch PYTHON; left out without) uses --torch-threads and
works as the published code does: potrf, potri, potrf, then one rank-1 update a
column. Alternated in rounds; the share of the peak is of sgemm with the loop's
shape, in CPU seconds of the same process.
"""
import json
import os
import statistics

from benchmarks import common

HELP = "SparseGPT on one layer, beside PyTorch"
ORDER = 60
SMOKE = {"cols": 256, "rows": 128, "rounds": 1, "torch": None}
ALL = {"share": 6}

TORCH = r"""
import json, sys, time, resource
import torch
cols, rows, density, threads = (int(sys.argv[1]), int(sys.argv[2]),
                                float(sys.argv[3]), int(sys.argv[4]))
torch.set_num_threads(threads)
torch.manual_seed(1)
f = torch.rand(cols, 64) * 2 - 1
h = f @ f.T
h += torch.diag(4 + torch.rand(cols))
del f
w = torch.rand(rows, cols) * 2 - 1
def now():
    u = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), u.ru_utime + u.ru_stime
def end(t, step):
    b = now()
    print(json.dumps({"step": step, "seconds": b[0] - t[0],
                      "cpu": b[1] - t[1]}), flush=True)
h += torch.eye(cols) * 0.01 * torch.mean(torch.diag(h))
t = now()
u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)),
                          upper=True)
end(t, "factor")
t = now()
for i1 in range(0, cols, 128):
    i2 = min(i1 + 128, cols)
    w1 = w[:, i1:i2].clone()
    e1 = torch.zeros_like(w1)
    u1 = u[i1:i2, i1:i2]
    score = w1 ** 2 / torch.diag(u1).reshape(1, -1) ** 2
    limit = torch.sort(score.flatten())[0][int(score.numel() * (1 - density))]
    mask = score <= limit
    for i in range(i2 - i1):
        c = w1[:, i]
        q = c.clone()
        q[mask[:, i]] = 0
        e = (c - q) / u1[i, i]
        w1[:, i:] -= e.unsqueeze(1).matmul(u1[i, i:].unsqueeze(0))
        w1[:, i] = q
        e1[:, i] = e
    w[:, i1:i2] = w1
    w[:, i2:] -= e1.matmul(u[i1:i2, i2:])
end(t, "loop")
"""

# Inputs and outputs of the linear layers of a block of the 1B shape.
BLOCK = ((2048, (2048, 512, 512)), (2048, (2048,)), (2048, (8192, 8192)),
         (8192, (2048,)))
LAYERS = 16


def add_arguments(parser):
    parser.add_argument("--cols", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--density", type=float, default=0.2)
    venv = os.environ.get("TV_VENV")
    parser.add_argument("--torch", metavar="PYTHON",
                        default=f"{venv}/bin/python" if venv else None,
                        help="a Python that has torch (default: of $TV_VENV)")
    parser.add_argument("--torch-threads", type=int, default=1)


def steps(argv):
    t = common.Timed(argv, watch=False)
    out = {}
    for line in t.out.decode().splitlines():
        s = json.loads(line)
        out.setdefault(s["step"], []).append(s)
    return out


def run(bench):
    o = bench.options
    size = [str(o.cols), str(o.rows), str(o.density)]
    rows = []
    for r in bench.rounds():
        ours = steps([bench.program("tv_obs_bench"), *size])
        row = {"round": r, "cols": o.cols, "rows": o.rows,
               "density": o.density, "ours": ours}
        if o.torch:
            row["torch_threads"] = o.torch_threads
            row["torch"] = steps([o.torch, "-c", TORCH, *size,
                                  str(o.torch_threads)])
        rows.append(row)
    return rows


def rate(step):
    return step["flops"] / step["cpu"]


def figures(row):
    ours = row["ours"]
    peak = max(rate(s) for s in ours["sgemm"])
    both = {"flops": 0, "cpu": 0, "seconds": 0}
    out = {}
    for name in ("factor", "loop"):
        s = ours[name][0]
        for k in both:
            both[k] += s[k]
        out[name] = s
    out["both"] = both
    return {n: {"seconds": s["seconds"], "cpu": s["cpu"],
                "share": rate(s) / peak} for n, s in out.items()}, peak


def model_seconds(row):
    """CPU seconds for all layers of the 1B shape at the measured rates."""
    ours = row["ours"]
    f, loop = rate(ours["factor"][0]), rate(ours["loop"][0])
    return LAYERS * sum(2 / 3 * n ** 3 / f + sum(outs) * n * n / loop
                        for n, outs in BLOCK)


def table(rows):
    body = []
    for name in ("factor", "loop", "both"):
        mine = [figures(r)[0][name] for r in rows]
        line = [name, f"{statistics.median(m['cpu'] for m in mine):.2f}",
                common.with_range(common.spread([m["share"] for m in mine]))]
        if "torch" in rows[0]:
            parts = ("factor", "loop") if name == "both" else (name,)
            other = [sum(r["torch"][p][0]["cpu"] for p in parts) for r in rows]
            wall = [sum(r["torch"][p][0]["seconds"] for p in parts)
                    for r in rows]
            line += [f"{statistics.median(other):.2f}",
                     common.with_range(common.ratios(
                         other, [m["cpu"] for m in mine])),
                     common.with_range(common.ratios(
                         wall, [m["seconds"] for m in mine]))]
        body.append(line)
    head = ["step", "CPU s", "share of sgemm's peak"]
    if "torch" in rows[0]:
        head += ["PyTorch, CPU s", "PyTorch / ours, CPU", "wall"]
    memory = [r["ours"]["memory"][0] for r in rows]
    return common.markdown(head, body) + [
        "",
        f"peak memory {common.mib(memory[0]['peak_bytes'])}, "
        f"{memory[0]['peak_bytes'] / memory[0]['bound_bytes']:.2f} of X^T X "
        "and one task vector",
        f"sgemm {max(figures(r)[1] for r in rows) / 1e9:.0f} GFLOP per CPU "
        "second; all linear layers of the 1B shape: "
        f"{statistics.median(model_seconds(r) for r in rows):.0f} CPU seconds "
        "a model"]
