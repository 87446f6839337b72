# SPDX-License-Identifier: Apache-2.0
"""Against mergekit on the same files, without the final sync on both sides.

Needs a virtual environment with mergekit, named by --venv or TV_VENV; without
one there is nothing to compare, and the table says so. mergekit runs with
--lazy-unpickle and its other defaults, on the CPU, into a directory of its own;
peak memory is anonymous (RssAnon) for both. mergekit is slow: one round unless
--rounds says otherwise.
"""
import os
import shutil

from benchmarks import common, merge

HELP = "against mergekit, where installed"
ORDER = 60
SMOKE = None
ALL = {"share": 30, "rounds": 1}


def add_arguments(parser):
    parser.add_argument("--venv", default=os.environ.get("TV_VENV"))
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="1b")
    parser.add_argument("--methods", default="linear,task_arithmetic,dare_ties,"
                        "ties")
    parser.set_defaults(rounds=1)


def run(bench):
    o = bench.options
    peer = o.venv and os.path.join(o.venv, "bin", "mergekit-yaml")
    if not peer or not os.access(peer, os.X_OK):
        common.say("bench: no mergekit-yaml; name its environment by --venv")
        return []
    models = bench.models(o.shape)
    out = bench.path("out")
    rows = []
    for method in o.methods.split(","):
        text, files = merge.recipe(method, models)
        common.prime(files, bench.scratch)
        ours, theirs = [], []
        for _ in bench.rounds():
            ours.append(merge.run_once(bench, text, out, more=["--no-sync"])[0])
            shutil.rmtree(out, ignore_errors=True)
            theirs.append(common.Timed(
                [peer, bench.path("recipe.yml"), out, "--lazy-unpickle"],
                env={**os.environ, "HF_HUB_OFFLINE": "1"}))
            shutil.rmtree(out, ignore_errors=True)
        rows.append({
            "method": method, "shape": o.shape,
            "seconds": common.spread([t.seconds for t in ours]),
            "peer_seconds": common.spread([t.seconds for t in theirs]),
            "times": common.ratios([t.seconds for t in theirs],
                                   [t.seconds for t in ours]),
            "cpu_times": common.ratios([t.cpu for t in theirs],
                                       [t.cpu for t in ours]),
            "peak_anonymous_bytes": max(t.peak for t in ours),
            "peer_peak_anonymous_bytes": max(t.peak for t in theirs)})
    return rows


def table(rows):
    if not rows:
        return ["mergekit was not installed."]
    return common.markdown(
        ["method", "times as fast", "less CPU time", "seconds",
         "mergekit, seconds", "peak anonymous", "mergekit's"],
        [[r["method"], common.with_range(r["times"], 1),
          f"{r['cpu_times']['median']:.1f}x",
          f"{r['seconds']['median']:.1f}", f"{r['peer_seconds']['median']:.1f}",
          common.mib(r["peak_anonymous_bytes"]),
          common.mib(r["peer_peak_anonymous_bytes"])] for r in rows])
