#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""errors.py BIN_DIR DATA

Every malformed input and every recipe error: the documented exit code, a
message that names file, line or tensor, and nothing left behind.
"""
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

from common import (SLOWER, check, finish, read_safetensors, run, run_json,
                    temp, write_safetensors)

BIN, DATA = map(os.path.abspath, sys.argv[1:3])
TVMERGE, TVSTORE = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tvstore")
WORK = temp()


def expect(what, argv, code, *words, out=None, cwd=DATA, env=None):
    r = run(*argv, cwd=cwd, env=env)
    check(r.returncode == code, f"{what}: exit {r.returncode} instead of "
          f"{code}: {r.stderr.strip()[-400:]}")
    for w in words:
        check(w in r.stderr, f"{what}: no '{w}' in: {r.stderr.strip()[-400:]}")
    if out is not None:
        left = os.listdir(out) if os.path.isdir(out) else []
        check(not left, f"{what}: left {left} behind")
    return r


# ---- recipes -----------------------------------------------------------------

def recipe(what, text, code, *words, warn=False):
    path = os.path.join(WORK, "r.yml")
    with open(path, "w") as f:
        f.write(text)
    out = os.path.join(WORK, "out")
    shutil.rmtree(out, True)
    r = expect(what, [TVMERGE, "run", path, out, "--progress=none"], code,
               *words, out=None if warn else out)
    shutil.rmtree(out, True)
    p = run(TVMERGE, "plan", path, "--json", cwd=DATA)
    check(p.returncode == code, f"{what}: plan exits {p.returncode}")
    try:
        doc = json.loads(p.stdout)
        check(doc["ok"] == (code == 0), f"{what}: plan ok {doc['ok']}")
        sev = "warning" if warn else "error"
        check(any(x["severity"] == sev for x in doc["problems"]),
              f"{what}: no {sev} among {doc['problems']}")
    except ValueError:
        check(False, f"{what}: plan printed {p.stdout[:100]!r}")
    return r


TA = """merge_method: task_arithmetic
base_model: base
models:
- model: ft-prose
  parameters: {weight: 0.5}
- model: ft-code
  parameters: {weight: 0.5}
"""
recipe("unknown method", TA.replace("task_arithmetic", "task_arithmetics"), 2,
       "r.yml:1", "task_arithmetic")
recipe("dash in method", "merge_method: dare-ties\nmodels:\n- model: base\n",
       2, "dare_ties")
recipe("missing weight", TA.replace("  parameters: {weight: 0.5}\n", "", 1), 2,
       "weight", "ft-prose")
recipe("missing base", TA.replace("base_model: base\n", ""), 2, "base")
recipe("model not found", TA.replace("ft-code", "ft-cod"), 4, "ft-cod")
recipe("unknown key", TA + "normalise: true\n", 0, "normalise", warn=True)
recipe("misspelt parameter", TA + "parameters: {lamda: 0.5}\n", 0, "lamda",
       "lambda", warn=True)
recipe("bad yaml", "merge_method: [linear\nmodels: }\n", 2, "r.yml:")
recipe("tab", "merge_method: linear\n\tmodels: 3\n", 2, "r.yml:2")
recipe("duplicate key", TA + "base_model: base\n", 2, "r.yml:8", "base_model")
recipe("empty", "", 2, "r.yml")
recipe("a list", "- a\n- b\n", 2, "r.yml:1")
recipe("no models", "merge_method: linear\n", 2, "models")
recipe("models and slices", TA + "slices:\n- sources:\n  - model: base\n"
       "    layer_range: [0, 2]\n", 2, "slices")
recipe("bad dtype", TA + "dtype: bf16\n", 2, "bf16", "bfloat16")
recipe("normalize not a bool", TA + "parameters: {normalize: 0.5}\n", 2,
       "normalize")
recipe("weight not a number", TA.replace("0.5}", "abc}", 1), 2, "r.yml:5",
       "weight")
recipe("duplicate model", TA.replace("ft-code", "ft-prose"), 2, "ft-prose")
recipe("slerp needs two", "merge_method: slerp\nbase_model: base\nmodels:\n"
       "- model: base\nparameters: {t: 0.5}\n", 2, "slerp")
recipe("slerp needs t", "merge_method: slerp\nbase_model: base\nmodels:\n"
       "- model: base\n- model: ft-code\n", 2, "'t'")
recipe("passthrough of two", "merge_method: passthrough\nmodels:\n"
       "- model: base\n- model: ft-code\n", 2, "passthrough")
recipe("layer range beyond", "merge_method: passthrough\nslices:\n- sources:\n"
       "  - model: base\n    layer_range: [0, 9]\n", 4, "9")
recipe("unequal ranges", "merge_method: linear\nslices:\n- sources:\n"
       "  - {model: base, layer_range: [0, 2], parameters: {weight: 1}}\n"
       "  - {model: ft-code, layer_range: [0, 3], parameters: {weight: 1}}\n",
       2, "range")
recipe("zero weight sum", "merge_method: linear\nmodels:\n"
       "- {model: base, parameters: {weight: 1}}\n"
       "- {model: ft-code, parameters: {weight: -1}}\n", 2, "weight")


def at_once(what, text, *said):
    """Every problem once, with its place in the recipe."""
    err = recipe(what, text, 2, *said).stderr
    for s in said:
        check(err.count(s) == 1, f"{what}: {err.count(s)} times '{s}'")
    errors = [x for x in err.splitlines()
              if "error: " in x and not x.startswith("tvmerge:")]
    check(len(errors) == len(said), f"{what}: {len(errors)} errors: {err}")


TWO = """base_model: base
models:
- model: ft-prose
  parameters: {{{0}}}
- model: ft-code
  parameters: {{{1}}}
"""
at_once("cabs", "merge_method: cabs\nparameters: {m: 3}\n" +
        TWO.format("weight: 1, n: -1", "weight: 1"),
        "r.yml:2:17: error: m is 3", "r.yml:6:30: error: parameter 'n'")
at_once("cabs n of m", "merge_method: cabs\nparameters: {m: 16}\n" +
        TWO.format("weight: 1", "weight: 1, n: 32"),
        "r.yml:5:10: error: n of model 1 is 64",
        "r.yml:8:30: error: n of model 2 is 32")
at_once("emr task", "merge_method: emr\nparameters: {task: 9}\n" +
        TWO.format("weight: 1", "weight: 1"), "r.yml:2:20: error: task is 9")
at_once("emr task below 0", "merge_method: emr\nparameters: {task: -2}\n" +
        TWO.format("weight: 1", "weight: 1"),
        "r.yml:2:20: error: parameter 'task'")
at_once("weights that cancel", "merge_method: linear\nmodels:\n"
        "- {model: base, parameters: {weight: 1}}\n"
        "- {model: ft-code, parameters: {weight: -1}}\n",
        "r.yml:3:38: error: the weights")
at_once("weights that cancel on a sphere", "merge_method: multislerp\n" +
        TWO.format("weight: 1", "weight: -1"), "r.yml:5:24: error: the weights")
at_once("fisher of nobody", "merge_method: fisher\nmodels:\n"
        "- {model: base, parameters: {weight: -1}}\n"
        "- {model: ft-code, parameters: {fisher_of: 7}}\n",
        "r.yml:3:38: error: parameter 'weight'",
        "r.yml:3:11: error: entry 1 needs",
        "r.yml:4:44: error: entry 2 is the Fisher")
at_once("fisher of nobody", "merge_method: fisher\nmodels:\n"
        "- {model: base}\n"
        "- {model: ft-code, parameters: {fisher_of: 7}}\n",
        "r.yml:3:11: error: entry 1 needs",
        "r.yml:4:44: error: entry 2 is the Fisher")
r = recipe("all at once", "merge_method: task_arithmetic\nbase_model: nope1\n"
           "models:\n- model: nope2\n  parameters: {weight: 1}\n"
           "- model: nope3\n  parameters: {weight: 1}\n", 4, "nope1", "nope2",
           "nope3")
deep = "merge_method: linear\nmodels: " + "[" * 100000
recipe("deep nesting", deep, 2, "r.yml")
recipe("aliases", "a: &a [x, x, x, x, x, x, x, x, x]\n"
       + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n"
                 for p, c in zip("abcdefgh", "bcdefghi"))
       + "merge_method: linear\nmodels: *i\n", 2, "r.yml")
recipe("many aliases", "a: &a 1\nb: [" + "*a, " * 100000 + "1]\n", 2, "r.yml")
expect("recipe file missing", [TVMERGE, "run", "nope.yml",
                               os.path.join(WORK, "out")], 4, "nope.yml",
       out=os.path.join(WORK, "out"))
ok = os.path.join(WORK, "ok.yml")
with open(ok, "w") as f:
    f.write(TA)
for out in (ok + "/out", "/proc/nothing/here", "/sys/out"):
    for more in ([], ["--json"]):
        expect("no place for OUT", [TVMERGE, "run", ok, out, *more], 4,
               os.path.dirname(out) if out[1] != "p" else "/proc")
    expect("no place for OUT", [TVMERGE, "plan", ok, out], 4, out)
# A tmpfs without a limit says that it has no blocks, and keeps files; mounted
# where nobody else sees it, by whoever may.
free = os.path.join(WORK, "free")
os.makedirs(free)
r = subprocess.run(["unshare", "-m", "sh", "-c",
                    'mount -t tmpfs -o size=0,nr_inodes=0 none "$1" || exit 99;'
                    ' exec "$2" run "$3" "$1/out" -q', "sh", free, TVMERGE, ok],
                   cwd=DATA, capture_output=True, text=True,
                   timeout=60 * SLOWER)
check(r.returncode in (0, 1, 99), f"tmpfs: {r.returncode} {r.stderr}")
check(r.returncode != 1 or "unshare" in r.stderr, f"tmpfs: {r.stderr}")
expect("no arguments", [TVMERGE], 2)
expect("unknown option", [TVMERGE, "run", "--randomseed", "3"], 2,
       "randomseed")
expect("unknown command", [TVMERGE, "rum", "a", "b"], 2, "run")
expect("unknown command", [TVSTORE, "improt"], 2, "import")
expect("bad TV_CPU", [TVMERGE, "methods"], 2, "sse9", env={"TV_CPU": "sse9"})
expect("no such store", [TVSTORE, "ls", os.path.join(WORK, "nostore")], 10)
store = os.path.join(WORK, "store")
run(TVSTORE, "init", store, code=0)
expect("no such object", [TVSTORE, "ls", store, "nope"], 10, "nope")
expect("init twice", [TVSTORE, "init", store], 4, store)
run(TVSTORE, "import", store, "base", os.path.join(DATA, "base"), code=0)
expect("import twice", [TVSTORE, "import", store, "base",
                        os.path.join(DATA, "base")], 4, "base")
expect("bad object name", [TVSTORE, "import", store, "a/b",
                           os.path.join(DATA, "base")], 2, "a/b")
expect("import of nothing", [TVSTORE, "import", store, "x",
                             os.path.join(WORK, "nothing")], 4, "nothing")

# ---- shapes -------------------------------------------------------------------
other = os.path.join(WORK, "other")
shutil.copytree(os.path.join(DATA, "ft-code"), other)
st = os.path.join(other, "model.safetensors")
os.chmod(st, 0o644)
t = read_safetensors(st)
k = "model.layers.2.mlp.up_proj.weight"
d, s, b = t[k]
t[k] = (d, (s[0] - 1, s[1]), b[:-2 * s[1]])
write_safetensors(st, t, {"format": "pt"})
recipe("shape mismatch", TA.replace("ft-code", other), 4, k)
del t[k]
write_safetensors(st, t, {"format": "pt"})
recipe("missing tensor", TA.replace("ft-code", other), 4, k)
neox = os.path.join(WORK, "neox")
os.mkdir(neox)
write_safetensors(os.path.join(neox, "model.safetensors"), {
    "gpt_neox.embed_in.weight": ("F32", (2, 2), b"\0" * 16)})
recipe("other family", TA.replace("ft-code", neox), 4, neox)

# ---- safetensors headers --------------------------------------------------------
GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def header(h):
    j = h if isinstance(h, bytes) else json.dumps(h).encode()
    return struct.pack("<Q", len(j)) + j


def bad(what, data, *words, code=12):
    d = os.path.join(WORK, "bad")
    shutil.rmtree(d, True)
    os.mkdir(d)
    p = os.path.join(d, "model.safetensors")
    with open(p, "wb") as f:
        f.write(data)
    expect(what, [TVSTORE, "import", store, "bad", d], code,
           "model.safetensors", *words)
    expect(what + " (link)", [TVSTORE, "import", store, "bad", d, "--link"],
           code, "model.safetensors", *words)
    names = [o["name"] for o in run_json(TVSTORE, "ls", store,
                                         "--json")["objects"]]
    check("bad" not in names, f"{what}: object visible")
    with open(os.path.join(WORK, "b.yml"), "w") as f:
        f.write(f"merge_method: passthrough\nmodels:\n- model: {d}\n")
    expect(what + " (merge)", [TVMERGE, "run", os.path.join(WORK, "b.yml"),
                               os.path.join(WORK, "out")], code,
           "model.safetensors", out=os.path.join(WORK, "out"))


E = GOOD["a"]
bad("empty file", b"")
bad("seven bytes", b"\1\0\0\0\0\0\0")
bad("header longer than the file", struct.pack("<Q", 1000) + b"{}")
bad("huge header length", struct.pack("<Q", 1 << 63) + b"{}")
# Both are beyond the limits (32 MiB, 2^18 tensors) and refused before they are
# looked at: quickly, and in less memory than they have bytes.
bad("header of 100 MB", header(b"{" + b" " * (100 << 20) + b"}"), "limit")
bad("a million tensors", header(b"{" + b",".join(
    b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i
    for i in range(1000000)) + b"}"), "limit")
bad("300,000 tensors", header(b"{" + b",".join(
    b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i
    for i in range(300000)) + b"}"), "members")
bad("not JSON", header(b"{nope}") + b"\0" * 8)
bad("not an object", header(b"[]"))
bad("not UTF-8", header(b'{"\xff\xfe": 1}'))
bad("NUL padding", header(json.dumps(GOOD).encode() + b"\0\0") + b"\0" * 8)
bad("duplicate name", header(
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}') + b"\0" * 8, "a")
bad("duplicate field", header(
    b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
    + b"\0" * 8)
bad("truncated payload", header(GOOD) + b"\0" * 7)
bad("bytes after the last tensor", header(GOOD) + b"\0" * 9)
bad("hole", header({"a": E, "b": dict(E, data_offsets=[12, 20])})
    + b"\0" * 20, "b")
bad("overlap", header({"a": E, "b": dict(E, data_offsets=[4, 12])})
    + b"\0" * 12)
bad("end before begin", header({"a": dict(E, data_offsets=[8, 0])})
    + b"\0" * 8, "a")
bad("size is not the shape's", header({"a": dict(E, shape=[3])}) + b"\0" * 8,
    "a")
bad("shape overflow", header({"a": dict(E, shape=[1 << 40, 1 << 40])})
    + b"\0" * 8, "a")
bad("negative dimension", header({"a": dict(E, shape=[-2])}) + b"\0" * 8, "a")
bad("float dimension", header({"a": dict(E, shape=[2.0])}) + b"\0" * 8, "a")
bad("unknown dtype", header({"a": dict(E, dtype="F33")}) + b"\0" * 8, "a")
bad("lower-case dtype", header({"a": dict(E, dtype="f32")}) + b"\0" * 8, "a")
bad("no dtype", header({"a": {"shape": [2], "data_offsets": [0, 8]}})
    + b"\0" * 8, "a")
bad("metadata is no string map", header(dict(GOOD, __metadata__={"x": 1}))
    + b"\0" * 8)
bad("lone surrogate", header(b'{"\\ud800":{"dtype":"F32","shape":[2],'
                             b'"data_offsets":[0,8]}}') + b"\0" * 8)
bad("NUL in a name", header(b'{"a\\u0000b":{"dtype":"F32","shape":[2],'
                            b'"data_offsets":[0,8]}}') + b"\0" * 8)
bad("empty name", header({"": E}) + b"\0" * 8)
bad("nesting", header(b"[" * 100000))
bad("rank", header({"a": dict(E, shape=[1] * 40 + [2])}) + b"\0" * 8, "a")
bad("many tensors on one range", header(
    {f"t{i}": E for i in range(2000)}) + b"\0" * 8)
million = b"{" + b",".join(
    b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i
    for i in range(300000)) + b"}"
bad("too many tensors", header(million), )
bad("a 100 MB header", header(b" " * 100_000_000))

# ---- index, pickle, adapter ------------------------------------------------------


def fresh_dir(name, files):
    d = os.path.join(WORK, name)
    shutil.rmtree(d, True)
    os.mkdir(d)
    for n, data in files.items():
        with open(os.path.join(d, n), "wb") as f:
            f.write(data if isinstance(data, bytes) else data.encode())
    return d


def bad_dir(what, files, code, *words):
    d = fresh_dir("bad", files)
    expect(what, [TVSTORE, "import", store, "bad", d], code, *words)


ST = header(GOOD) + b"\0" * 8
bad_dir("index names a missing shard", {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors"}})}, 4,
    "model-00001-of-00002.safetensors")
bad_dir("index leaves the directory", {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "../model.safetensors"}})}, 12, "index")
bad_dir("index of a tensor that is not there", {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"b": "m.safetensors"}}), "m.safetensors": ST}, 12,
    "b")
bad_dir("index is no JSON", {"model.safetensors.index.json": "{",
                             "m.safetensors": ST}, 12, "index")
bad_dir("nothing to import", {"readme.txt": "x"}, 4)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch " + os.path.join(WORK, "pwned"),))


def bin_file(pkl, extra=()):
    p = os.path.join(WORK, "m.bin")
    with zipfile.ZipFile(p, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", pkl)
        for n, d in extra:
            z.writestr(n, d)
    with open(p, "rb") as f:
        return f.read()


for what, pkl in (("os.system", pickle.dumps(Evil(), 2)),
                  ("deep pickle", b"\x80\x02" + b"]" * 200000 + b"."),
                  ("truncated pickle", b"\x80\x02}q\0"),
                  ("no dictionary", pickle.dumps([1, 2], 2)),
                  ("memo bomb", b"\x80\x02}" + b"r\xff\xff\xff\x7f" + b"."),
                  ("protocol 5", pickle.dumps({"a": 1}, 5))):
    bad_dir("pickle: " + what, {"pytorch_model.bin": bin_file(pkl)}, 12,
            "pytorch_model.bin")
check(not os.path.exists(os.path.join(WORK, "pwned")), "pickle was executed")
bad_dir("a .bin that is no zip", {"pytorch_model.bin": b"\x80\x02." * 9}, 12,
        "pytorch_model.bin")

lora = os.path.join(DATA, "lora-jargon")
cfg = json.load(open(os.path.join(lora, "adapter_config.json")))
w = read_safetensors(os.path.join(lora, "adapter_model.safetensors"))


def adapter(what, code, *words, config=None, tensors=None):
    d = fresh_dir("ad", {"adapter_config.json": json.dumps(config or cfg)})
    write_safetensors(os.path.join(d, "adapter_model.safetensors"),
                      tensors or w)
    recipe(what, f"merge_method: passthrough\nmodels:\n- model: base+{d}\n",
           code, *words)


first = next(k for k in w if k.endswith("lora_A.weight"))
adapter("lora_A without lora_B", 12, "lora_B",
        tensors={k: v for k, v in w.items()
                 if k != first.replace("lora_A", "lora_B")})
adapter("dora", 4, "dora", config=dict(cfg, use_dora=True))
adapter("not LoRA", 4, "IA3", config=dict(cfg, peft_type="IA3"))
adapter("adapter of another model", 4,
        "decoder.block", tensors={
            k.replace("model.layers", "decoder.block"): v
            for k, v in w.items()})
bad_rank = dict(w)
d_, s_, b_ = w[first]
bad_rank[first] = (d_, (s_[0] - 1, s_[1]), b_[:-len(b_) // s_[0]])
adapter("wrong rank", 12, "lora_", tensors=bad_rank)

# ---- damage ---------------------------------------------------------------------
size = os.path.getsize(os.path.join(store, "data.mdb"))
tensor = read_safetensors(os.path.join(DATA, "base"))
needle = tensor["model.layers.1.mlp.up_proj.weight"][2][:64]
raw = open(os.path.join(store, "data.mdb"), "rb").read()
at = raw.find(needle)
check(at > 0, "payload found in data.mdb")
with open(os.path.join(store, "data.mdb"), "r+b") as f:
    f.seek(at + 100)
    b = f.read(1)
    f.seek(at + 100)
    f.write(bytes([b[0] ^ 4]))
expect("verify names the tensor", [TVSTORE, "verify", store], 12)
v = run(TVSTORE, "verify", store)
check("model.layers.1.mlp.up_proj.weight" in v.stdout + v.stderr,
      f"verify: {v.stdout} {v.stderr}")
with open(os.path.join(WORK, "d.yml"), "w") as f:
    f.write("merge_method: linear\nmodels:\n- model: store:base\n"
            "  parameters: {weight: 1}\n- model: " + DATA
            + "/ft-code\n  parameters: {weight: 1}\n")
expect("merge of damaged data", [TVMERGE, "run", os.path.join(WORK, "d.yml"),
                                 os.path.join(WORK, "dmg"), "--store", store],
       12, "model.layers.1.mlp.up_proj.weight")
check(not os.path.exists(os.path.join(WORK, "dmg", "config.json")),
      "damaged merge left config.json")
link = os.path.join(WORK, "linked")
src = os.path.join(WORK, "src")
shutil.copytree(os.path.join(DATA, "ft-code"), src)
os.chmod(os.path.join(src, "model.safetensors"), 0o644)
run(TVSTORE, "init", link, code=0)
run(TVSTORE, "import", link, "m", src, "--link", code=0)
with open(os.path.join(src, "model.safetensors"), "r+b") as f:
    f.truncate(os.path.getsize(os.path.join(src, "model.safetensors")) - 4096)
with open(os.path.join(WORK, "l.yml"), "w") as f:
    f.write("merge_method: passthrough\nmodels:\n- model: store:m\n")
expect("truncated link", [TVMERGE, "run", os.path.join(WORK, "l.yml"),
                          os.path.join(WORK, "lo"), "--store", link], 12,
       "model.safetensors")
os.unlink(os.path.join(src, "model.safetensors"))
expect("link gone", [TVSTORE, "cat", link, "m/model.norm.weight"], 12,
       "model.safetensors")
finish("errors")
