# SPDX-License-Identifier: Apache-2.0
"""Merge methods against the cost of copying their bytes.

Synthesises a base and two fine-tunes (default: the Llama-3.2-1B shape, bf16,
2.5 GB each), then measures per method: wall and CPU time of `tvmerge run`, and
peak anonymous memory (RssAnon, sampled). Beside it, in the same rounds, the
floor: `cat` of all inputs to /dev/null plus a synced copy of one (`dd
conv=fdatasync`). Ratios below 1 are possible: the floor is serial, the merge
overlaps reading, computing and writing.

A floor is taken once a round for all methods that read as much.

Every output is written once and removed before the clock starts (an idle guest
gives its page cache back).

Methods `lora` (an rslora adapter of rank 16 applied to the base) and `lora_svd`
(eight of them merged into one of rank 16, without the base) make the adapters
they need.
"""
import array
import json
import os
import random
import shutil

from benchmarks import common

HELP = "merge methods against the copy floor"
ORDER = 10

# name: (merge_method, base, shared parameters, parameters of each model)
METHODS = {
    "linear": ("linear", None, {}, [{"weight": 0.6}, {"weight": 0.4}]),
    "task_arithmetic": ("task_arithmetic", "base", {},
                        [{"weight": 0.7}, {"weight": 0.5}]),
    "nearswap": ("nearswap", "ft1", {"t": 0.001}, [{}]),
    "dare_linear": ("dare_linear", "base", {},
                    [{"weight": 0.7, "density": 0.5},
                     {"weight": 0.5, "density": 0.5}]),
    "dare_ties": ("dare_ties", "base", {},
                  [{"weight": 0.7, "density": 0.5},
                   {"weight": 0.5, "density": 0.5}]),
    "ties": ("ties", "base", {}, [{"weight": 1.0, "density": 0.2},
                                  {"weight": 1.0, "density": 0.2}]),
    "breadcrumbs": ("breadcrumbs", "base", {},
                    [{"weight": 0.7, "density": 0.5, "gamma": 0.01},
                     {"weight": 0.5, "density": 0.5, "gamma": 0.01}]),
    "breadcrumbs_ties": ("breadcrumbs_ties", "base", {},
                         [{"weight": 0.7, "density": 0.5, "gamma": 0.01},
                          {"weight": 0.5, "density": 0.5, "gamma": 0.01}]),
    "della": ("della", "base", {},
              [{"weight": 0.7, "density": 0.5, "epsilon": 0.1},
               {"weight": 0.5, "density": 0.5, "epsilon": 0.1}]),
    "della_linear": ("della_linear", "base", {},
                     [{"weight": 0.7, "density": 0.5, "epsilon": 0.1},
                      {"weight": 0.5, "density": 0.5, "epsilon": 0.1}]),
    "consensus": ("consensus", "base", {}, [{"weight": 0.7}, {"weight": 0.5}]),
    "ram": ("ram", "base", {}, [{}, {}]),
    "arcee_fusion": ("arcee_fusion", "base", {}, [{}]),
    "slerp": ("slerp", "ft1", {"t": 0.4}, [{}, {}]),
    "nuslerp": ("nuslerp", "base", {}, [{"weight": 0.6}, {"weight": 0.4}]),
    "multislerp": ("multislerp", "base", {},
                   [{"weight": 0.6}, {"weight": 0.4}]),
    "karcher": ("karcher", None, {}, [{"weight": 0.5}, {"weight": 0.5}]),
    "model_stock": ("model_stock", "base", {}, [{}, {}]),
    "sce": ("sce", "base", {"select_topk": 0.5}, [{}, {}]),
}
ADAPTERS = 8
SMOKE = {"shape": "tiny", "methods": "linear,task_arithmetic,dare_ties,ties"}
ALL = {"share": 36, "methods": "linear,task_arithmetic,nearswap,dare_linear,"
       "dare_ties,ties,breadcrumbs,della,slerp,model_stock,karcher,sce"}


def recipe(method, models):
    """YAML, and the files that it reads."""
    if method == "lora":
        lora = os.path.join(models, "lora-0")
        return (f"merge_method: passthrough\nmodels:\n- model: {models}/base"
                f"+{lora}\n",
                [common.weights_of(os.path.join(models, "base")),
                 os.path.join(lora, "adapter_model.safetensors")])
    if method == "lora_svd":
        dirs = [os.path.join(models, f"lora-{i}") for i in range(ADAPTERS)]
        text = "merge_method: svd\nrank: 16\nmodels:\n" + "".join(
            f"- model: {d}\n  parameters: {{weight: {1 / (1 + i):g}}}\n"
            for i, d in enumerate(dirs))
        return text, [os.path.join(d, "adapter_model.safetensors")
                      for d in dirs]
    name, base, shared, each = METHODS[method]
    # A method whose base is one of the models lists the other ones only, but
    # for slerp, which wants both.
    first = 2 if base == "ft1" and len(each) == 1 else 1
    used = [f"ft{first + i}" for i in range(len(each))]
    lines = [f"merge_method: {name}"]
    if base:
        lines.append(f"base_model: {models}/{base}")
    lines.append("models:")
    for ft, parameters in zip(used, each):
        lines.append(f"- model: {models}/{ft}")
        if parameters:
            lines.append(f"  parameters: {json.dumps(parameters)}")
    if shared:
        lines.append(f"parameters: {json.dumps(shared)}")
    read = ([base] if base and base not in used else []) + used
    return "\n".join(lines) + "\n", [
        common.weights_of(os.path.join(models, n)) for n in read]


def make_adapters(models, shape, rank=16):
    """rslora adapters on all linear layers of the synthetic base. Values repeat
    after 65,521 (a prime), which costs no less to multiply."""
    s = common.SHAPES[shape]
    h, kv, inter = s["hidden"], s["kv"], s["inter"]
    linear = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h),
              "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
              "mlp.gate_proj": (inter, h), "mlp.up_proj": (inter, h),
              "mlp.down_proj": (h, inter)}
    for n in range(ADAPTERS):
        d = os.path.join(models, f"lora-{n}")
        if os.path.exists(os.path.join(d, "adapter_config.json")):
            continue
        os.makedirs(d, exist_ok=True)
        rng = random.Random(n)
        block = array.array("f", (rng.gauss(0, 0.02) for _ in range(65521)))
        raw, header = block.tobytes(), {}
        end = 0
        for i in range(s["layers"]):
            for name, (out, inp) in linear.items():
                for part, sides in (("A", (rank, inp)), ("B", (out, rank))):
                    size = 4 * sides[0] * sides[1]
                    header[f"base_model.model.model.layers.{i}.{name}."
                           f"lora_{part}.weight"] = {
                        "dtype": "F32", "shape": sides,
                        "data_offsets": [end, end + size]}
                    end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(d, "adapter_model.safetensors"), "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            at = 4 * rng.randrange(1000)
            while end > 0:
                data = raw[at:at + end]
                f.write(data)
                end -= len(data)
                at = 0
        with open(os.path.join(d, "adapter_config.json"), "w",
                  encoding="utf-8") as f:
            json.dump({"peft_type": "LORA", "r": rank, "lora_alpha": 32,
                       "use_rslora": True, "target_modules":
                       sorted(k.split(".")[1] for k in linear)}, f)


def add_arguments(parser):
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="1b")
    parser.add_argument("--methods", default=",".join(METHODS),
                        help="with commas (default: all but lora, lora_svd)")


def run_once(bench, text, out, threads=0, memory="512MiB", more=()):
    """One merge into `out`, which is removed again."""
    path = bench.path("recipe.yml")
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    argv = [bench.program("tvmerge"), "run", path, out, "--json",
            "--progress=none", "--memory", memory, *more]
    if threads:
        argv += ["--threads", str(threads)]
    shutil.rmtree(out, ignore_errors=True)
    t = common.Timed(argv)
    shutil.rmtree(out, ignore_errors=True)
    return t, json.loads(t.out)


def run(bench):
    o = bench.options
    names = o.methods.split(",")
    for n in names:
        if n not in METHODS and n not in ("lora", "lora_svd"):
            raise SystemExit(f"bench: no benchmark for method {n}; there are: "
                             + ", ".join([*METHODS, "lora", "lora_svd"]))
    models = bench.models(o.shape)
    if any(n.startswith("lora") for n in names):
        make_adapters(models, o.shape)
    out = bench.path("out")
    runs = {n: [] for n in names}
    floors = {n: [] for n in names}
    info = {}
    common.prime(recipe("task_arithmetic", models)[1], bench.scratch)
    for _ in bench.rounds():
        seen = {}  # floors of this round, by the size of what is read
        for n in names:
            text, files = recipe(n, models)
            size = sum(map(os.path.getsize, files)), os.path.getsize(files[0])
            if size not in seen:
                seen[size] = common.floor(files, bench.scratch)
            floors[n].append(seen[size])
            t, info[n] = run_once(bench, text, out, o.threads, o.memory)
            runs[n].append(t)
    rows = []
    for n in names:
        seconds = [t.seconds for t in runs[n]]
        moved = info[n]["bytes_read"] + info[n]["bytes_written"]
        rows.append({
            "method": n, "shape": o.shape, "memory": o.memory,
            "threads": o.threads or os.cpu_count(),
            "seconds": common.spread(seconds),
            "cpu_seconds": common.spread([t.cpu for t in runs[n]]),
            "floor_seconds": common.spread(floors[n]),
            "ratio": common.ratios(seconds, floors[n]),
            "peak_anonymous_bytes": max(t.peak for t in runs[n]),
            "bytes_read": info[n]["bytes_read"],
            "bytes_written": info[n]["bytes_written"],
            "phases": info[n].get("seconds"),
            "gb_per_second": moved / common.spread(seconds)["median"] / 1e9})
    return rows


def table(rows):
    return common.markdown(
        ["method", "ratio to the floor", "time, s", "CPU, s", "floor, s",
         "GB/s read+written", "peak anonymous"],
        [[r["method"], common.with_range(r["ratio"]),
          common.with_range(r["seconds"]),
          f"{r['cpu_seconds']['median']:.2f}",
          f"{r['floor_seconds']['median']:.2f}", f"{r['gb_per_second']:.1f}",
          common.mib(r["peak_anonymous_bytes"])] for r in rows])


def check(rows):
    """Tiny models are start-up and sync; a factor of ten is no noise."""
    return [f"{r['method']} took {r['ratio']['min']:.0f} times the floor and "
            f"{r['cpu_seconds']['min']:.1f} s of CPU" for r in rows
            if r["ratio"]["min"] > 40 and r["cpu_seconds"]["min"] > 5]
