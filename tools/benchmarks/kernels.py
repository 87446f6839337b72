# SPDX-License-Identifier: Apache-2.0
"""Kernels against the memory-bandwidth roofline, for each instruction set.

One thread, arrays larger than any cache, blocks of the engine's size. The
roofline is the time in which memcpy moves the bytes that the kernel must move.
Best of the repeats; a share of 1 means that the kernel waits for memory only.
Instruction sets that the machine does not have are left out.
"""
import json

from benchmarks import common

HELP = "each kernel against the bandwidth roofline"
ORDER = 50
SMOKE = {"mib": 2, "rounds": 3}
ALL = {"share": 3}


def add_arguments(parser):
    parser.add_argument("--mib", type=int, default=64,
                        help="size of each fp32 array")


def run(bench):
    o = bench.options
    t = common.Timed([bench.program("tv_kernel_bench"), "--mib", str(o.mib),
                      "--repeats", str(o.rounds)], watch=False)
    rows = [json.loads(line) for line in t.out.decode().splitlines()]
    reference = {r["kernel"]: r["seconds"] for r in rows if r["isa"] == "ref"}
    for r in rows:
        r["share_of_roofline"] = (r["roofline_seconds"] / r["seconds"]
                                  if r["bytes"] else None)
        r["times_reference"] = reference[r["kernel"]] / r["seconds"]
    return rows


def table(rows):
    sets = list(dict.fromkeys(r["isa"] for r in rows))
    by = {(r["kernel"], r["isa"]): r for r in rows}

    def cells(kernel):
        for isa in sets:
            r = by[kernel, isa]
            yield f"{r['seconds'] / r['elements'] * 1e9:.2f}"
            if isa != "ref":
                share = r["share_of_roofline"]
                yield f"{share:.2f}" if share is not None else "-"
                yield f"{r['times_reference']:.1f}"

    head = ["kernel"]
    for isa in sets:
        head.append(f"{isa}, ns per element")
        if isa != "ref":
            head += ["share of the roofline", "times the reference"]
    return common.markdown(head, [
        [kernel, *cells(kernel)]
        for kernel in dict.fromkeys(r["kernel"] for r in rows)])


def check(rows):
    """Only what a busy machine does not make: best times, far apart."""
    return [f"{r['kernel']} on {r['isa']} is {1 / r['times_reference']:.0f} "
            "times slower than the reference" for r in rows
            if r["times_reference"] < 0.02 and r["seconds"] > 0.5]
