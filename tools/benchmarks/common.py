# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: programs, synthetic models, floors, statistics.

A benchmark is one file of this folder with

  HELP                    one line for `tools/bench --help`
  add_arguments(parser)   its own options (common ones are there already)
  run(bench) -> rows      measures; a list of dicts, written to --json as it is
  table(rows) -> lines    Markdown of the rows (see `markdown`)
  SMOKE                   options of `tools/bench smoke`: a dict, None: left out
  ALL                     optional: options of `tools/bench all`, and as "share"
                          its part of the time
  check(rows) -> problems optional: what no noise explains (factors of ten)

and its docstring says what is measured against what. tools/bench finds the
files by itself; adding a benchmark changes no other file.

Machines are shared and noisy. So floors and candidates are interleaved, ratios
are taken within a round, medians are printed with the range, and CPU time
(user + system, which other jobs disturb far less) stands beside wall time.
"""
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

SHAPES = {
    # Llama-3.2-1B
    "1b": {"layers": 16, "hidden": 2048, "kv": 512, "inter": 8192,
           "vocab": 128256},
    # Llama-3.1-8B, two of its layers and an eighth of its vocabulary
    "8b-slice": {"layers": 2, "hidden": 4096, "kv": 1024, "inter": 14336,
                 "vocab": 16032},
    "small": {"layers": 4, "hidden": 1024, "kv": 256, "inter": 2816,
              "vocab": 32000},
    "tiny": {"layers": 2, "hidden": 512, "kv": 128, "inter": 1408,
             "vocab": 4096},
}


def shape_bytes(shape):
    s = SHAPES[shape]
    layer = (2 * s["hidden"] + 2 * s["hidden"] * s["kv"]
             + 2 * s["hidden"] ** 2 + 3 * s["hidden"] * s["inter"])
    return 2 * (s["vocab"] * s["hidden"] + s["layers"] * layer + s["hidden"])


class Bench:
    """Options of one run, its scratch directory and its programs."""

    def __init__(self, options, seconds=None):
        """With `seconds`, rounds end when that time is over."""
        self.options = options
        self.end = seconds and time.monotonic() + seconds
        self.n_rounds = None
        self.own_dir = options.dir is None
        self.scratch = options.dir or tempfile.mkdtemp(prefix="tvbench-")
        os.makedirs(self.scratch, exist_ok=True)

    def close(self):
        if self.own_dir and not self.options.keep:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def rounds(self, share=1.0):
        """As many rounds as asked for, or as fit into a share of the time left;
        always one."""
        now = time.monotonic()
        end = self.end and now + share * (self.end - now)
        n = 0
        while n < self.options.rounds:
            began = time.monotonic()
            yield n
            n += 1
            now = time.monotonic()
            if end and now + (now - began) > end:
                break
        self.n_rounds = min(n, self.n_rounds or n)

    def path(self, *parts):
        return os.path.join(self.scratch, *parts)

    def program(self, name):
        given = self.options.build
        places = [given] if given else [os.path.join(ROOT, d) for d in
                                        ("build", "build-gcc")]
        for d in places:
            for sub in ("cli", "tools", "."):
                p = os.path.join(d, sub, name)
                if os.access(p, os.X_OK):
                    return p
        raise SystemExit(f"bench: {name} not found; build first (./tools/test "
                         "builds into build/) or pass --build DIR")

    def need_disk(self, n_bytes):
        if shutil.disk_usage(self.scratch).free < n_bytes + (1 << 30):
            raise SystemExit(f"bench: needs {n_bytes / 1e9:.0f} GB free in "
                             f"{self.scratch}; choose another place with --dir")

    def models(self, shape, donors=2):
        """A base and fine-tunes of a shape; made once in a scratch directory."""
        d = self.path(f"models-{shape}-{donors}")
        if not os.path.exists(os.path.join(d, f"ft{donors}", "config.json")):
            self.need_disk((donors + 3) * shape_bytes(shape))
            os.makedirs(d, exist_ok=True)
            argv = [self.program("tv_synth"), d, "--donors", str(donors)]
            for k, v in SHAPES[shape].items():
                argv += [f"--{k}", str(v)]
            subprocess.run(argv, check=True)
        return d


def weights_of(model_dir):
    return os.path.join(model_dir, "model.safetensors")


# ---- running programs --------------------------------------------------------

def rss_anon(pid):
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as f:
            for line in f:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Timed:
    """Of a program that has ended: seconds, cpu, peak (RssAnon bytes), out."""

    def __init__(self, argv, watch=True, **kw):
        self.peak = 0
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        t0 = time.monotonic()
        p = subprocess.Popen(argv, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, **kw)

        def look():
            while p.poll() is None:
                self.peak = max(self.peak, rss_anon(p.pid))
                time.sleep(0.005)

        looker = threading.Thread(target=look) if watch else None
        if looker:
            looker.start()
        self.out, errout = p.communicate()
        self.seconds = time.monotonic() - t0
        if looker:
            looker.join()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu = (after.ru_utime + after.ru_stime
                    - before.ru_utime - before.ru_stime)
        if p.returncode:
            raise SystemExit(f"bench: {' '.join(argv)}: exit {p.returncode}\n"
                             f"{errout.decode(errors='replace')}")


def clock(f, *args, **kw):
    t0 = time.monotonic()
    f(*args, **kw)
    return time.monotonic() - t0


# ---- floors ------------------------------------------------------------------

def read_all(files):
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", *files], stdout=null, check=True)


def copy_synced(src, dst):
    subprocess.run(["dd", f"if={src}", f"of={dst}", "bs=16M",
                    "conv=fdatasync", "status=none"], check=True)


def copy_unsynced(src, dst):
    subprocess.run(["dd", f"if={src}", f"of={dst}", "bs=16M", "status=none"],
                   check=True)


def floor(files, scratch, synced=True):
    """Seconds to read all files and to copy the first."""
    copy = os.path.join(scratch, "floor.copy")
    t0 = time.monotonic()
    read_all(files)
    (copy_synced if synced else copy_unsynced)(files[0], copy)
    seconds = time.monotonic() - t0
    os.unlink(copy)
    return seconds


def prime(files, scratch):
    """Gets page cache and free pages back from an idle hypervisor."""
    floor(files, scratch)


def drop_from_cache(files):
    """Makes reads cold, as far as an ordinary user can ask for it."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ---- figures -----------------------------------------------------------------

def spread(values):
    return {"median": statistics.median(values), "min": min(values),
            "max": max(values), "n": len(values)}


def ratios(a, b):
    return spread([x / y for x, y in zip(a, b)])


def with_range(s, digits=2):
    return (f"{s['median']:.{digits}f} "
            f"({s['min']:.{digits}f}-{s['max']:.{digits}f})")


def mib(n_bytes):
    return f"{n_bytes / 2**20:.0f} MiB"


def markdown(head, rows):
    """Lines of a table; `rows` are lists of strings."""
    return (["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            + ["| " + " | ".join(r) + " |" for r in rows])


def machine():
    isa, cpu = "", platform.processor() or "unknown processor"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            text = f.read()
        cpu = re.search(r"model name\s*: (.*)", text).group(1).strip()
        flags = set(re.search(r"flags\s*: (.*)", text).group(1).split())
        isa = ("AVX-512" if {"avx512f", "avx512bw"} <= flags else
               "AVX2" if "avx2" in flags else "")
    except (OSError, AttributeError):
        pass
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "isa": isa, "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": pages, "date": time.strftime("%Y-%m-%d")}


def write_json(path, name, argv, rows):
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"schema": f"tvbench.{name}/1", "command": argv,
                   "machine": machine(), "rows": rows}, f, indent=2)
        f.write("\n")


def say(text):
    print(text, file=sys.stderr, flush=True)
