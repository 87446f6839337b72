# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow: donors, threads, size, cold cache, large models.

 - 16 donors against 2, time per byte read and written (goal: at most 1.2)
 - 1 thread against 2 (goal where compute-bound: 1.6 times as fast)
 - sizes, time per byte and peak memory
 - reads from a cold page cache against warm ones
 - a slice of the Llama-3.1 70B shape (sparse files): one of its layers merged
   with the embeddings; only with --large, as it writes 6 GB
"""
import os
import shutil

from benchmarks import common, merge, startup

HELP = "donors, threads, sizes, cold cache"
ORDER = 40
SMOKE = {"shape": "tiny", "donors": 4}
ALL = {"share": 10}

LARGE = {"layers": 80, "hidden": 8192, "kv": 1024, "inter": 28672,
         "vocab": 128256, "heads": 64}


def add_arguments(parser):
    parser.add_argument("--shape", choices=sorted(common.SHAPES),
                        default="small")
    parser.add_argument("--donors", type=int, default=16)
    parser.add_argument("--large", action="store_true")


def recipe(models, method, donors):
    each = ("{weight: 0.5, density: 0.2}" if method == "ties" else
            "{weight: 0.5}")
    return (f"merge_method: {method}\nbase_model: {models}/base\nmodels:\n"
            + "".join(f"- model: {models}/ft{i}\n  parameters: {each}\n"
                      for i in range(1, donors + 1)))


def run(bench):
    o = bench.options
    out = bench.path("out")
    models = bench.models(o.shape, o.donors)
    files = [common.weights_of(os.path.join(models, d))
             for d in ("base", *(f"ft{i}" for i in range(1, o.donors + 1)))]
    common.prime(files, bench.scratch)
    rows = []

    def compare(what, a, b, use=lambda t, doc: t.seconds):
        """Ratio of runs b to runs a, taken in turn."""
        x, y, peaks = [], [], [0, 0]
        for _ in bench.rounds(1 / (6 - min(len(rows), 5))):
            for i, (runs, f) in enumerate(((x, a), (y, b))):
                t, doc = f()
                runs.append(use(t, doc))
                peaks[i] = max(peaks[i], t.peak)
        rows.append({"what": what, "shape": o.shape,
                     "ratio": common.ratios(y, x),
                     "peak_anonymous_bytes": peaks})

    def once(text, **kw):
        return lambda: merge.run_once(bench, text, out, **kw)

    def cost(t, doc):
        return t.cpu / (doc["bytes_read"] + doc["bytes_written"])

    def wall(t, doc):
        return t.seconds / (doc["bytes_read"] + doc["bytes_written"])

    two = recipe(models, "task_arithmetic", 2)
    many = recipe(models, "task_arithmetic", o.donors)
    compare(f"{o.donors} donors to 2, time per byte", once(two), once(many),
            wall)
    compare(f"{o.donors} donors to 2, CPU per byte", once(two), once(many),
            cost)
    ties = recipe(models, "ties", 2)
    compare("1 thread to 2, ties", once(ties, threads=2),
            once(ties, threads=1))
    small = bench.models("tiny")
    compare(f"shape {o.shape} to tiny, CPU per byte",
            once(recipe(small, "task_arithmetic", 2)), once(two), cost)

    def cold():
        common.drop_from_cache(files[:3])
        return merge.run_once(bench, two, out)

    compare("cold page cache to warm, task_arithmetic", once(two), cold)
    if o.large:
        rows.append(large_slice(bench, out))
    return rows


def large_slice(bench, out):
    bench.need_disk(8 << 30)
    d = bench.path("large")
    shutil.rmtree(d, ignore_errors=True)
    for name in ("base", "ft1"):
        startup.write_model(os.path.join(d, name), LARGE)
    text = ("merge_method: task_arithmetic\n"
            f"base_model: {d}/base\nslices:\n- sources:\n"
            f"  - {{model: {d}/base, layer_range: [40, 41]}}\n"
            f"  - {{model: {d}/ft1, layer_range: [40, 41], "
            "parameters: {weight: 0.5}}\n")
    t, doc = merge.run_once(bench, text, out)
    shutil.rmtree(d)
    return {"what": "one layer and embeddings of a 70B shape",
            "seconds": t.seconds, "bytes_written": doc["bytes_written"],
            "peak_anonymous_bytes": [t.peak, t.peak],
            "ratio": common.spread([1.0])}


def table(rows):
    return common.markdown(
        ["what", "ratio", "peak anonymous"],
        [[r["what"], common.with_range(r["ratio"]) if "seconds" not in r else
          f"{r['seconds']:.1f} s, {r['bytes_written'] / 1e9:.1f} GB written",
          " and ".join(common.mib(p) for p in r["peak_anonymous_bytes"])]
         for r in rows])
