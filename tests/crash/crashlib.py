# SPDX-License-Identifier: Apache-2.0
"""What the crash drivers share: small models, programs under recorder.c, the
state of stores and outputs, and the table of injections."""
import argparse
import atexit
import ctypes
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)),
                                os.pardir, "e2e"))
from common import (SLOWER, check, finish, read_safetensors, run,  # noqa
                    run_json, write_safetensors)
import common  # noqa

SKIP = 77
SHARD = ["--out-shard-size", "24kB"]
GROUP = "8kB"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
          "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 2,
          "vocab_size": 96, "tie_word_embeddings": True,
          "torch_dtype": "bfloat16"}


def arguments(doc, count, more=()):
    p = argparse.ArgumentParser(description=doc)
    p.add_argument("bin", help="directory of tvstore and tvmerge")
    p.add_argument("recorder", help="the LD_PRELOAD library")
    p.add_argument("--count", type=int, default=count,
                   help="about how many injections")
    p.add_argument("--seed", type=int, default=1)
    for name, kw in more:
        p.add_argument(name, **kw)
    a = p.parse_args()
    a.bin, a.recorder = os.path.abspath(a.bin), os.path.abspath(a.recorder)
    a.tvmerge = os.path.join(a.bin, "tvmerge")
    a.tvstore = os.path.join(a.bin, "tvstore")
    a.tveval = os.path.join(a.bin, "tveval")
    return a


def work_dir():
    """Memory where there is some: the order of calls matters, not a disk."""
    shm = "/dev/shm"
    base = None
    if not os.environ.get("TMPDIR") and os.path.isdir(shm) \
            and os.access(shm, os.W_OK) \
            and shutil.disk_usage(shm).free > (1 << 29):
        base = shm
    d = os.path.realpath(tempfile.mkdtemp(prefix="tv-crash-", dir=base))
    atexit.register(shutil.rmtree, d, True)
    return d


def private_mounts():
    """Mounts of this process and its children only: they go with it, however
    it ends. False where that is not allowed."""
    if os.geteuid() != 0:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"],
                          capture_output=True).returncode == 0


# ---- models ----

def bf16(rng, n, scale):
    return b"".join(struct.pack("<f", rng.gauss(0, scale))[2:]
                    for _ in range(n))


def add_bf16(rng, data, scale):
    out = []
    for i in range(0, len(data), 2):
        x = struct.unpack("<f", b"\0\0" + data[i:i + 2])[0]
        out.append(struct.pack("<f", x + rng.gauss(0, scale))[2:])
    return b"".join(out)


def shapes(config):
    h, m, v = (config["hidden_size"], config["intermediate_size"],
               config["vocab_size"])
    yield "model.embed_tokens.weight", (v, h)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (h,)
        for k in "qkvo":
            yield p + f"self_attn.{k}_proj.weight", (h, h)
        yield p + "post_attention_layernorm.weight", (h,)
        for k in ("gate", "up"):
            yield p + f"mlp.{k}_proj.weight", (m, h)
        yield p + "mlp.down_proj.weight", (h, m)
    yield "model.norm.weight", (h,)


def make_models(path, config=CONFIG, seed=7, names=("ft1", "ft2")):
    """base and fine-tunes, bf16, about 50 kB each; norms are shared."""
    rng = random.Random(seed)
    base = {}
    for name, shape in shapes(config):
        n = 1
        for x in shape:
            n *= x
        base[name] = ("BF16", shape, bf16(rng, n, 0.05))
    for model in ("base",) + tuple(names):
        d = os.path.join(path, model)
        os.makedirs(d)
        t = base if model == "base" else {
            k: (v if "norm" in k else
                (v[0], v[1], add_bf16(rng, v[2], 0.01)))
            for k, v in base.items()}
        write_safetensors(os.path.join(d, "model.safetensors"), t,
                          {"format": "pt"})
        with open(os.path.join(d, "config.json"), "w") as f:
            json.dump(config, f)
        with open(os.path.join(d, "tokenizer.json"), "w") as f:
            json.dump({"version": "1.0", "model": {"type": "BPE"}}, f)
    return path


def recipe(path, models, method="ties", density=0.4, prefix=None):
    """ties over the three models; prefix "store:" takes them from a store."""
    ref = (lambda m: prefix + m) if prefix else \
        (lambda m: os.path.join(models, m))
    with open(path, "w") as f:
        f.write(f"merge_method: {method}\nbase_model: {ref('base')}\n"
                "models:\n"
                f"- model: {ref('ft1')}\n"
                f"  parameters: {{weight: 0.7, density: {density}}}\n"
                f"- model: {ref('ft2')}\n"
                f"  parameters: {{weight: 0.5, density: 0.6}}\n")
    return path


def calibrated(path, models, statistics="own"):
    """Both donors by SparseGPT, with random tokens for want of a tokenizer."""
    with open(recipe(path, models, "sparsegpt_linear"), "a") as f:
        f.write("calibration: {random: true, samples: 4, context: 16}\n"
                f"parameters: {{statistics: {statistics}, embeddings: counts}}"
                "\n")
    return path


# ---- programs under the recorder ----

class Recorder:
    def __init__(self, library, watched, work):
        self.library, self.watched = library, watched
        self.stat = os.path.join(work, "counts")

    def run(self, *argv, cwd=None, env=None, timeout=120 * SLOWER, **settings):
        """Settings are TVREC_ names in lower case. Returns the process; its
        .calls, .fired, .allocs, .allocs_fired say what happened."""
        if os.path.exists(self.stat):
            os.unlink(self.stat)
        e = dict(os.environ)
        e.update(env or {})
        e.update({"LD_PRELOAD": self.library, "TVREC_DIR": self.watched,
                  "TVREC_STAT": self.stat})
        e.update({"TVREC_" + k.upper(): str(v) for k, v in settings.items()})
        r = subprocess.run([str(a) for a in argv], cwd=cwd, env=e, text=True,
                           capture_output=True, timeout=timeout,
                           errors="replace")
        r.calls = r.fired = r.allocs = r.allocs_fired = 0
        r.where = ""
        if os.path.exists(self.stat):
            with open(self.stat, "rb") as f:
                raw = f.read()
            (r.calls, r.fired, r.allocs,
             r.allocs_fired) = struct.unpack_from("<4Q", raw)
            r.where = "op %d on %s" % (
                struct.unpack_from("<I", raw, 32)[0],
                raw[36:].split(b"\0")[0].decode(errors="replace"))
        return r


# ---- state ----

def objects(tvstore, store):
    """{name: digest} of what a reader sees; None: no store. Reads links: which
    of their checksums are known depends on what has read them."""
    r = run(tvstore, "ls", store, "--json")
    if r.returncode == 10:
        return None
    if not check(r.returncode == 0, f"ls: exit {r.returncode}: {r.stderr}"):
        return {}
    out = {}
    for o in json.loads(r.stdout)["objects"]:
        if not o["complete"]:
            continue
        i = run(tvstore, "info", store, o["name"], "--digest", "--json")
        if check(i.returncode == 0, f"info {o['name']}: {i.stderr}"):
            out[o["name"]] = json.loads(i.stdout)["digest"]
    return out


def tree_of(path):
    """{relative name: hash} below a directory; None when it is not there."""
    if not os.path.isdir(path):
        return None
    out = {}
    for d, _, files in os.walk(path):
        for n in files:
            p = os.path.join(d, n)
            with open(p, "rb") as f:
                out[os.path.relpath(p, path)] = \
                    hashlib.sha256(f.read()).hexdigest()
    return out


def weights_of(path):
    """Names and bytes of a finished output, as a loader finds them."""
    return {k: (v[0], v[1], hashlib.sha256(v[2]).hexdigest())
            for k, v in read_safetensors(path).items()}


def copy_tree(src, dst):
    """A copy with the times of the original: fingerprints still match."""
    shutil.rmtree(dst, True)
    if os.path.isdir(src):
        shutil.copytree(src, dst, symlinks=True)


# ---- table ----

class Table:
    """Rows: fault, injections that fired, outcomes, losses. Printed, and
    appended to the file of TV_CRASH_TABLE for tests/crash/torture."""

    def __init__(self):
        self.rows = {}

    def add(self, fault, outcome, n=1, lost=0):
        row = self.rows.setdefault(fault, {"fired": 0, "outcomes": {},
                                           "losses": 0})
        row["fired"] += n
        row["outcomes"][outcome] = row["outcomes"].get(outcome, 0) + n
        row["losses"] += lost

    def fired(self, fault):
        return self.rows.get(fault, {}).get("fired", 0)

    def close(self):
        for fault, row in self.rows.items():
            what = ", ".join(f"{v} {k}" for k, v in
                             sorted(row["outcomes"].items(),
                                    key=lambda x: -x[1]))
            print(f"{fault}: {row['fired']} fired; {what}; losses "
                  f"{row['losses']}", flush=True)
        path = os.environ.get("TV_CRASH_TABLE")
        if path:
            with open(path, "a") as f:
                for fault, row in self.rows.items():
                    f.write(json.dumps({"fault": fault, **row}) + "\n")


def failures_now():
    return common.failures


def skip(why):
    print(f"skipped: {why}")
    sys.exit(SKIP)
