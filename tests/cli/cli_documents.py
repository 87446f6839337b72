#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cli_documents.py BIN_DIR DATA

Every --json document has the members of the contract, and what the tools say
about tensors is what an independent reader of the files says.
"""
import ast
import math
import os
import struct

from cli_common import (DATA, TVMERGE, TVSTORE, bf16_values, check, close,
                        document, finish, path, read_safetensors, run, write,
                        write_safetensors)


def has(doc, what, *keys):
    for k in keys:
        check(k in doc, f"{what}: no member {k}")


store = path("s")
doc = document(TVSTORE, "init", store, "--quota", "64MiB")
check(doc["quota_bytes"] == 64 << 20, "init: quota")
for name, src in (("base", "base"), ("code", "ft-code"),
                  ("jargon", "lora-jargon")):
    doc = document(TVSTORE, "import", store, name, os.path.join(DATA, src))
    has(doc, "import", "name", "n_tensors", "bytes", "seconds")
document(TVSTORE, "import", store, "linked", os.path.join(DATA, "ft-prose"),
         "--link")

# ---- ls, info, cat against the file ------------------------------------------
doc = document(TVSTORE, "ls", store)
check([o["name"] for o in doc["objects"]] == ["base", "code", "jargon",
                                              "linked"], "ls: names in order")
for o in doc["objects"]:
    has(o, "ls", "name", "kind", "architecture", "n_tensors", "bytes",
        "linked", "complete")
    check(o["complete"] is True and o["linked"] is (o["name"] == "linked"),
          f"ls: state of {o['name']}")
    check(o["kind"] == ("adapter" if o["name"] == "jargon" else "model"),
          f"ls: kind of {o['name']}")

expected = read_safetensors(os.path.join(DATA, "base", "model.safetensors"))
doc = document(TVSTORE, "ls", store, "base")
has(doc, "ls NAME", "object", "tensors")
check({t["name"] for t in doc["tensors"]} == set(expected), "ls: tensors")
for t in doc["tensors"]:
    d, s, b = expected[t["name"]]
    check((t["dtype"], t["shape"], t["bytes"]) == (d, s, len(b)),
          f"ls: {t['name']}")
    check(t["storage"] == "inline" and len(t["checksum"]) == 32,
          f"ls: storage of {t['name']}")
layers = [t["name"] for t in doc["tensors"] if ".layers." in t["name"]]
check([int(n.split(".")[2]) for n in layers]
      == sorted(int(n.split(".")[2]) for n in layers), "ls: layer order")
doc = document(TVSTORE, "ls", store, "linked")
check(all(t["storage"] == "linked" for t in doc["tensors"]), "ls: linked")

name = "model.layers.0.self_attn.k_proj.weight"
values = bf16_values(expected[name][2])
rows, cols = expected[name][1]
doc = document(TVSTORE, "info", store, f"base/{name}", "--stats")
stats = doc["stats"]
check(stats["min"] == min(values) and stats["max"] == max(values),
      "info: min, max")
check(close(stats["mean"], math.fsum(values) / len(values)), "info: mean")
check(close(stats["norm"], math.sqrt(math.fsum(v * v for v in values))),
      "info: norm")
check(stats["n_nonfinite"] == 0, "info: non-finite")
doc = document(TVSTORE, "info", store, "base", "--stats")
has(doc, "info", "digest", "architecture", "dtypes", "files")
check(len(doc["tensors"]) == len(expected), "info: all tensors")
check(doc["digest"] != document(
    TVSTORE, "info", store, "code")["digest"], "info: digests")


def read_npy(data):
    check(data[:8] == b"\x93NUMPY\x01\x00", "npy: magic")
    n = struct.unpack_from("<H", data, 8)[0]
    check((10 + n) % 64 == 0 and data[9 + n] == 10, "npy: padding")
    head = ast.literal_eval(data[10:10 + n].decode())
    return head["descr"], head["fortran_order"], head["shape"], data[10 + n:]


def cat(*argv):
    return run(TVSTORE, "cat", store, *argv).stdout


raw = expected[name][2]
check(cat(f"base/{name}", "--format", "raw") == raw, "cat: raw")
descr, order, shape, data = read_npy(cat(f"base/{name}", "--format", "npy"))
check((descr, order, shape) == ("<f4", False, (rows, cols)), "npy: header")
check(list(struct.unpack(f"<{len(values)}f", data)) == values, "npy: values")
descr, order, shape, data = read_npy(cat(f"base/{name}", "--format", "npy",
                                         "--bits"))
check((descr, data) == ("<u2", raw), "npy: bits")
for text, r, c in (("3:5", slice(3, 5), slice(None)),
                   (":,7:9", slice(None), slice(7, 9)),
                   ("-2:,-3:-1", slice(-2, None), slice(-3, -1)),
                   ("60:70,100:", slice(60, 70), slice(100, None)),
                   ("5:3,:", slice(5, 3), slice(None))):
    want = [values[i * cols + j] for i in range(rows)[r] for j in
            range(cols)[c]]
    descr, order, shape, data = read_npy(
        cat(f"base/{name}", "--format", "npy", "--slice", text))
    check(shape == (len(range(rows)[r]), len(range(cols)[c])),
          f"slice {text}: shape {shape}")
    check(list(struct.unpack(f"<{len(want)}f", data)) == want,
          f"slice {text}: values")
    lines = cat(f"base/{name}", "--slice", text).decode().split()
    check([struct.unpack("<f", struct.pack("<f", float(x)))[0]
           for x in lines] == want, f"slice {text}: text")

# ---- other dtypes, three dimensions ---------------------------------------------
odd = {
    "f16": ("F16", [2, 2], struct.pack("<4e", 1, -2, 0.5, 65504)),
    "f64": ("F64", [3], struct.pack("<3d", 0.1, -1e300, math.pi)),
    "i32": ("I32", [2], struct.pack("<2i", -7, 2**31 - 1)),
    "u64": ("U64", [1], struct.pack("<Q", 2**64 - 1)),
    "bool": ("BOOL", [3], b"\1\0\1"),
    "f8": ("F8_E4M3", [4], b"\0\x38\x40\x7f"),
    "f32": ("F32", [2, 3, 4], struct.pack("<24f", *range(24))),
    "nan": ("F32", [4], struct.pack("<4f", 1, math.nan, math.inf, -3)),
    "scalar": ("F32", [], struct.pack("<f", 2.5)),
    "none": ("F32", [0, 4], b""),
}
write_safetensors(path("odd.safetensors"), odd)
run(TVSTORE, "import", store, "odd", path("odd.safetensors"))
for key, want in (("f16", "1 -2\n0.5 65504\n"),
                  ("f64", "0.1\n-1e+300\n3.141592653589793\n"),
                  ("i32", "-7\n2147483647\n"),
                  ("u64", "18446744073709551615\n"), ("bool", "1\n0\n1\n"),
                  ("f8", "0x00\n0x38\n0x40\n0x7f\n"),
                  ("nan", "1\nnan\ninf\n-3\n"), ("scalar", "2.5\n"),
                  ("none", "")):
    got = cat(f"odd/{key}").decode()
    check(got == want, f"text of {key}: {got!r}")
for key, descr in (("f16", "<f2"), ("f64", "<f8"), ("i32", "<i4"),
                   ("u64", "<u8"), ("bool", "|b1"), ("f32", "<f4"),
                   ("scalar", "<f4"), ("none", "<f4")):
    d, _, shape, data = read_npy(cat(f"odd/{key}", "--format", "npy"))
    check((d, list(shape), data) == (descr, odd[key][1], odd[key][2]),
          f"npy of {key}: {d} {shape}")
check(read_npy(cat("odd/f8", "--format", "npy", "--bits"))[0] == "|u1",
      "npy of f8 as bits")
run(TVSTORE, "cat", store, "odd/f8", "--format", "npy", code=4)
_, _, shape, data = read_npy(cat("odd/f32", "--format", "npy", "--slice",
                                 "1:,1:3,-2:"))
check(shape == (1, 2, 2) and struct.unpack("<4f", data) == (18, 19, 22, 23),
      "slice in three dimensions")
stats = document(TVSTORE, "info", store, "odd/nan",
                 "--stats")["stats"]
check((stats["min"], stats["max"], stats["n_nonfinite"]) == (-3, 1, 2),
      "stats with non-finite values")
stats = document(TVSTORE, "info", store, "odd/i32",
                 "--stats")["stats"]
check(stats["min"] == -7, "stats of integers")
check(document(TVSTORE, "info", store, "odd/f8",
               "--stats")["stats"] is None, "stats of 8-bit floats")

# ---- diff ------------------------------------------------------------------------
changed = dict(odd)
changed["f32"] = ("F32", [2, 3, 4],
                  struct.pack("<24f", *[x + (x == 5) for x in range(24)]))
changed["f64"] = ("F64", [3], struct.pack("<3d", 0.1, 1e300, math.pi))
changed["i32"] = ("I32", [1, 2], odd["i32"][2])
changed["bool"] = ("BOOL", [3], b"\1\1\1")
changed["f16"] = ("F32", [2, 2], struct.pack("<4f", 1, -2, 0.5, 65504))
del changed["u64"]
changed["new"] = ("U8", [1], b"x")
write_safetensors(path("changed.safetensors"), changed)
doc = document(TVSTORE, "diff", store, "store:odd", path("changed.safetensors"),
               code=3)
by = {t["name"]: t for t in doc["tensors"]}
check(doc["equal"] is False and doc["n_different"] == 7
      and doc["n_tensors"] == 11, f"diff: counts {doc['n_different']}")
for key, status in (("nan", "equal"), ("f8", "equal"), ("f32", "different"),
                    ("f64", "different"), ("i32", "shape"), ("f16", "dtype"),
                    ("bool", "different"), ("u64", "only-a"),
                    ("new", "only-b"), ("none", "equal")):
    check(by[key]["status"] == status, f"diff: {key} {by[key]['status']}")
check(by["f32"]["max_abs"] == 1 and by["f32"]["differing_elements"] == 1
      and close(by["f32"]["relative_frobenius"],
                1 / math.sqrt(sum(x * x for x in range(24)))), "diff: f32")
a, b = list(range(24)), [x + (x == 5) for x in range(24)]
check(close(by["f32"]["cosine"], sum(x * y for x, y in zip(a, b))
            / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))),
      "diff: cosine")
check(by["f64"]["max_abs"] == 2e300 and by["bool"]["differing_elements"] == 1
      and by["bool"]["max_abs"] is None, "diff: f64, bool")
check(by["f16"]["differing_elements"] == 0 and by["nan"]["n_nonfinite"] == 2,
      "diff: f16, nan")
one = document(TVSTORE, "diff", store, "store:base", "store:code", "-j1",
               code=3)
two = document(TVSTORE, "diff", store, "store:base", "store:code", "-j2",
               code=3, env={"TV_CPU": "ref"})
check(one == two, "diff: threads or kernels change the numbers")
theirs = read_safetensors(os.path.join(DATA, "ft-code", "model.safetensors"))
pair = {t["name"]: t for t in one["tensors"]}[name]
other = bf16_values(theirs[name][2])
check(close(pair["max_abs"], max(abs(x - y) for x, y in zip(values, other)))
      and pair["differing_elements"] == sum(
          raw[i:i + 2] != theirs[name][2][i:i + 2]
          for i in range(0, len(raw), 2)), "diff: bf16")
check(close(pair["relative_frobenius"],
            math.sqrt(sum((x - y)**2 for x, y in zip(values, other))
                      / sum(x * x for x in values)), 1e-6), "diff: frobenius")

# ---- the rest --------------------------------------------------------------------
doc = document(TVSTORE, "stat", store)
has(doc, "stat", "quota_bytes", "used_bytes", "file_bytes", "kinds",
    "dedup_saved_bytes")
has(doc["kinds"], "stat", "weights", "adapters", "masks", "statistics",
    "task_vectors", "outputs", "journal", "free")
check(doc["quota_bytes"] == 64 << 20 and doc["used_bytes"] > 4000000,
      "stat: values")
check(document(TVSTORE, "quota", store, "1GB")["quota_bytes"] == 10**9,
      "quota")
doc = document(TVSTORE, "verify", store)
check(doc["ok"] is True and doc["problems"] == [], "verify")
check(document(TVSTORE, "export", store, "code", path("out"))["n_tensors"]
      == 38, "export")
check(document(TVSTORE, "rm", store, "odd")["name"] == "odd", "rm")
has(document(TVSTORE, "gc", store), "gc", "freed_bytes")

recipe = write("r.yml", f"""merge_method: dare_ties
base_model: store:base
models:
- model: {DATA}/ft-prose+store:jargon
  parameters: {{weight: 0.3, density: [0.5, 0.7]}}
- model: store:code
  parameters: {{weight: 0.4}}
""")
doc = document(TVMERGE, "plan", recipe, "--store", store)
has(doc, "plan", "ok", "problems", "bytes_read", "bytes_written",
    "peak_scratch_bytes", "peak_disk_bytes", "tensors")
check(doc["ok"] is True and len(doc["tensors"]) == 38, "plan: tensors")
for t in doc["tensors"]:
    has(t, "plan", "name", "method", "parameters", "inputs", "dtype", "shape")
    check(t["method"] == "dare_ties" and len(t["inputs"]) == 3
          and t["parameters"]["weight"][:2] == [0.3, 0.4],
          f"plan: {t['name']}")
plan = doc
doc = document(TVMERGE, "run", recipe, path("merged"), "--store", store,
               "--random-seed", "7")
has(doc, "run", "out", "n_tensors", "n_resumed", "bytes_read",
    "bytes_written", "seconds", "peak_scratch_bytes", "digest")
check(doc["out"] == path("merged") and doc["n_tensors"] == 38
      and doc["n_resumed"] == 0 and doc["seed"] == 7, "run: values")
check(doc["bytes_written"] == plan["bytes_written"], "run: as planned")
again = document(TVMERGE, "run", recipe, path("merged"), "--store", store,
                 "--random-seed", "7")
check(again["n_resumed"] == 38 and again["digest"] == doc["digest"],
      "run: repeated")
run(TVSTORE, "import", store, "merged", path("merged"))
check(document(TVSTORE, "info", store, "merged")["digest"]
      == doc["digest"], "run and info give the same digest")
into = document(TVMERGE, "run", recipe, "--into", "m2", "--store", store,
                "--random-seed", "7")
check(into["digest"] == doc["digest"] and into["out"] is None, "run --into")
r = run(TVMERGE, "run", recipe, path("x"), "--json", code=2)
check(not r.stdout, "a failed run prints no document")

methods = {m["name"]: m for m in
           document(TVMERGE, "methods")["methods"]}
for m in methods.values():
    has(m, "methods", "name", "base", "needs_statistics", "parameters")
    for p in m["parameters"]:
        has(p, "methods", "name", "scope", "type", "default", "required")
check(methods["linear"]["base"] == "optional"
      and methods["ties"]["base"] == "required", "methods: base")
finish()
