# SPDX-License-Identifier: Apache-2.0
"""import, export and verify of a store against copying and reading the bytes.

Each round imports one model into a new store, verifies it, exports it, and
does the same with plain tools: `dd bs=16M conv=fdatasync` of the model (import
and export, which sync) and `cat` to /dev/null (verify, which reads and hashes
all). Figures are rates as a share of the plain tool's: 1 is as fast.
"""
import os
import shutil

from benchmarks import common

HELP = "import, export and verify of a store against cp and cat"
ORDER = 20
SMOKE = {"shape": "tiny"}
ALL = {"share": 14}


def add_arguments(parser):
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="1b")


def run(bench):
    o = bench.options
    tvstore = bench.program("tvstore")
    model = os.path.join(bench.models(o.shape), "base")
    weights = common.weights_of(model)
    n = os.path.getsize(weights)
    bench.need_disk(4 * n)
    store, copy, out = (bench.path(p) for p in ("bench.tvs", "copy", "out"))
    seconds = {k: [] for k in ("import", "verify", "export", "copy", "read")}
    cpu = {k: [] for k in ("import", "verify", "export")}

    def primed(f, *argv):
        """Whoever writes first after memory went back to a hypervisor pays for
        getting it again, up to four times its own time: nobody does here."""
        common.prime([weights], bench.scratch)
        return f(*argv)

    def timed(what, *argv):
        t = common.Timed([tvstore, *argv, "--progress=none", "--quiet"])
        seconds[what].append(t.seconds)
        cpu[what].append(t.cpu)

    for _ in bench.rounds():
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        seconds["copy"].append(
            primed(common.clock, common.copy_synced, weights, copy))
        os.unlink(copy)
        common.Timed([tvstore, "init", store])
        primed(timed, "import", "import", store, "base", model)
        seconds["read"].append(common.clock(common.read_all, [weights]))
        timed("verify", "verify", store)
        primed(timed, "export", "export", store, "base", out)
    for path in (store, out):
        shutil.rmtree(path, ignore_errors=True)
    return [{"operation": what, "shape": o.shape, "bytes": n,
             "seconds": common.spread(seconds[what]),
             "cpu_seconds": common.spread(cpu[what]),
             "against": plain,
             "rate": common.ratios(seconds[plain], seconds[what])}
            for what, plain in (("import", "copy"), ("export", "copy"),
                                ("verify", "read"))]


def table(rows):
    return common.markdown(
        ["operation", "share of the rate of", "", "time, s", "CPU, s", "GB/s"],
        [[r["operation"], {"copy": "a synced copy", "read": "`cat`"}[
            r["against"]], common.with_range(r["rate"]),
          common.with_range(r["seconds"]),
          f"{r['cpu_seconds']['median']:.2f}",
          f"{r['bytes'] / r['seconds']['median'] / 1e9:.2f}"] for r in rows])


def check(rows):
    return [f"{r['operation']} of {r['bytes']} bytes used "
            f"{r['cpu_seconds']['min']:.1f} s of CPU" for r in rows
            if r["cpu_seconds"]["min"] > 5]
