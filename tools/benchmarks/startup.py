# SPDX-License-Identifier: Apache-2.0
"""What happens before the work: starting, opening a large store, planning.

 - start-up: `--version` of each program (goal: 20 ms)
 - opening: `tvstore ls` of a store with one object of many tensors, against the
   same with an empty store (goal: milliseconds)
 - planning: `tvmerge plan` of a ties merge of three models of the Llama-3.1
   405B shape (goal: a second). The files are sparse: headers and no data.
 - tiny merges: `tvmerge run` of 10 KB on a tmpfs by every method that needs no
   text (goal: 50 ms); the method with the longest of its runs is shown
"""
import json
import os
import shutil
import subprocess
import tempfile

from benchmarks import common

HELP = "start-up, opening a store of many tensors, planning a 405B merge"
ORDER = 30
# Three such models of 811 GB have no room in ThreadSanitizer's address space.
SMOKE = {"tensors": 5000, "big_layers": 12, "rounds": 2}
ALL = {"share": 3}

TINY = {"layers": 2, "hidden": 16, "kv": 16, "inter": 24, "vocab": 16,
        "heads": 2}
BIG = {"layers": 126, "hidden": 16384, "kv": 1024, "inter": 53248,
       "vocab": 128256, "heads": 128}


def add_arguments(parser):
    parser.add_argument("--tensors", type=int, default=100000)
    parser.add_argument("--big-layers", type=int, default=BIG["layers"],
                        help="of the model to plan with")


def write_sparse(path, tensors, data=None):
    """A safetensors file of bf16 tensors {name: shape} that takes no disk."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape,
                        "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        if data:
            f.write(data[:end])
        f.truncate(8 + len(text) + end)


def llama(s):
    h, kv, inter = s["hidden"], s["kv"], s["inter"]
    tensors = {"model.embed_tokens.weight": [s["vocab"], h],
               "lm_head.weight": [s["vocab"], h], "model.norm.weight": [h]}
    for i in range(s["layers"]):
        for name, shape in {
                "input_layernorm": [h], "post_attention_layernorm": [h],
                "mlp.gate_proj": [inter, h], "mlp.up_proj": [inter, h],
                "mlp.down_proj": [h, inter], "self_attn.q_proj": [h, h],
                "self_attn.k_proj": [kv, h], "self_attn.v_proj": [kv, h],
                "self_attn.o_proj": [h, h]}.items():
            tensors[f"model.layers.{i}.{name}.weight"] = shape
    return tensors


def write_model(d, s):
    os.makedirs(d)
    write_sparse(common.weights_of(d), llama(s))
    with open(os.path.join(d, "config.json"), "w", encoding="utf-8") as f:
        json.dump({"architectures": ["LlamaForCausalLM"],
                   "model_type": "llama", "hidden_act": "silu",
                   "hidden_size": s["hidden"], "vocab_size": s["vocab"],
                   "intermediate_size": s["inter"],
                   "num_hidden_layers": s["layers"],
                   "num_attention_heads": s["heads"],
                   "num_key_value_heads": s["kv"] // (s["hidden"]
                                                      // s["heads"]),
                   "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
                  f)


def best_of(rounds, argv):
    runs = [common.Timed(argv, watch=False) for _ in range(rounds)]
    return ([t.seconds for t in runs], [t.cpu for t in runs])


def many_tensors(bench, tvstore):
    d = bench.path("many")
    shutil.rmtree(d, ignore_errors=True)
    os.makedirs(d)
    n = bench.options.tensors
    # All alike in size and none in content: equal tensors are kept once.
    write_sparse(common.weights_of(d), {f"t.{i:06d}": [8] for i in range(n)},
                 b"".join(i.to_bytes(16, "little") for i in range(n)))
    stores = []
    for name, source in (("empty", None), ("full", d)):
        store = bench.path(f"{name}.tvs")
        shutil.rmtree(store, ignore_errors=True)
        common.Timed([tvstore, "init", store])
        if source:
            common.Timed([tvstore, "import", store, "many", source,
                          "--progress=none"])
        stores.append(store)
    shutil.rmtree(d)
    return stores


def tiny_recipes(tvmerge, d):
    """{method: its recipe} for those that merge models and nothing else."""
    methods = json.loads(subprocess.run(
        [tvmerge, "methods", "--json"], check=True, capture_output=True).stdout)
    recipes = {}
    for m in methods["methods"]:
        if m["needs_statistics"] or m["name"] == "fisher":
            continue
        given = {p["name"] for p in m["parameters"]}
        own = ", ".join(f"{k}: 0.5" for k in ("weight", "density")
                        if k in given)
        path = os.path.join(d, m["name"] + ".yml")
        for donors in (("ft1", "ft2"), ("ft1",)):
            with open(path, "w", encoding="utf-8") as f:
                f.write(f"merge_method: {m['name']}\n")
                if m["base"] == "required":
                    f.write(f"base_model: {d}/base\n")
                if "t" in given:
                    f.write("parameters: {t: 0.4}\n")
                f.write("models:\n" + "".join(
                    f"- {{model: {d}/{x}, parameters: {{{own}}}}}\n"
                    for x in donors))
            if not subprocess.run([tvmerge, "plan", path],
                                  capture_output=True).returncode:
                recipes[m["name"]] = path
                break
    return recipes


def tiny_merges(bench, tvmerge):
    """(how many methods, the slowest, its runs)"""
    d = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK)
                         else bench.path())
    out = os.path.join(d, "out")
    for i, name in enumerate(("base", "ft1", "ft2")):
        where = os.path.join(d, name)
        write_model(where, TINY)
        values = b"".join((0x3c00 + (k * 37 + i * (k % 5)) % 0x300)
                          .to_bytes(2, "little") for k in range(1 << 13))
        write_sparse(common.weights_of(where), llama(TINY), values)
    runs = {}
    for name, recipe in tiny_recipes(tvmerge, d).items():
        runs[name] = []
        for _ in range(bench.options.rounds):
            shutil.rmtree(out, ignore_errors=True)
            runs[name].append(common.Timed([tvmerge, "run", recipe, out, "-q"],
                                           watch=False))
    shutil.rmtree(d)
    slowest = max(runs, key=lambda m: max(t.seconds for t in runs[m]))
    return (len(runs), slowest, ([t.seconds for t in runs[slowest]],
                                 [t.cpu for t in runs[slowest]]))


def run(bench):
    rounds = bench.options.rounds
    rows = []

    def add(what, runs):
        seconds, cpu = runs
        rows.append({"what": what, "seconds": common.spread(seconds),
                     "cpu_seconds": common.spread(cpu)})

    tvstore, tvmerge = bench.program("tvstore"), bench.program("tvmerge")
    for name in ("tvstore", "tvmerge", "tveval"):
        add(f"{name} --version",
            best_of(rounds, [bench.program(name), "--version"]))
    empty, full = many_tensors(bench, tvstore)
    add("tvstore ls, empty store", best_of(rounds, [tvstore, "ls", empty]))
    add(f"tvstore ls, store of {bench.options.tensors} tensors",
        best_of(rounds, [tvstore, "ls", full]))
    for path in (empty, full):
        shutil.rmtree(path)
    big = bench.path("big")
    shutil.rmtree(big, ignore_errors=True)
    for name in ("base", "ft1", "ft2"):
        write_model(os.path.join(big, name),
                    {**BIG, "layers": bench.options.big_layers})
    recipe = bench.path("big.yml")
    with open(recipe, "w", encoding="utf-8") as f:
        f.write(f"merge_method: ties\nbase_model: {big}/base\nmodels:\n")
        for name in ("ft1", "ft2"):
            f.write(f"- model: {big}/{name}\n"
                    "  parameters: {weight: 1, density: 0.2}\n")
    # It says that the disk has no room for the result; that is a plan, too.
    fewer = (f"{bench.options.big_layers} layers of the "
             if bench.options.big_layers != BIG["layers"] else "")
    add(f"tvmerge plan, {fewer}405B shape, 3 models",
        best_of(rounds, ["sh", "-c", '"$0" plan "$1" "$2" --json >"$3" || '
                         'grep -q bytes_written "$3"', tvmerge, recipe,
                         bench.path("big-out"), bench.path("plan.json")]))
    shutil.rmtree(big)
    n, slowest, runs = tiny_merges(bench, tvmerge)
    add(f"tvmerge run, 10 KB on a tmpfs, {slowest} (slowest of {n} methods)",
        runs)
    return rows


def table(rows):
    return common.markdown(
        ["what", "time, ms", "CPU, ms"],
        [[r["what"], common.with_range(
            {k: v * 1e3 for k, v in r["seconds"].items()}, 1),
          f"{r['cpu_seconds']['min'] * 1e3:.0f}"] for r in rows])


def check(rows):
    return [f"{r['what']} used {r['cpu_seconds']['min']:.1f} s of CPU"
            for r in rows if r["cpu_seconds"]["min"] > 10]
