#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""roundtrip.py BIN_DIR MODEL_DIR...

`tvstore import` (copied and linked) then `export`: every tensor and side file
byte-identical; ls, info, cat agree with what is in the file.
"""
import os
import struct
import sys

from common import check, finish, read_safetensors, run, run_json, temp

BIN = os.path.abspath(sys.argv[1])
TVSTORE = os.path.join(BIN, "tvstore")
SIDE = ("config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "adapter_config.json")


def npy(data):
    """(descr, shape, payload) of an .npy document, version 1."""
    n = struct.unpack("<H", data[8:10])[0]
    h = eval(data[10:10 + n].decode())  # a dict literal by definition
    return h["descr"], tuple(h["shape"]), data[10 + n:]


def raw(*argv):
    import subprocess
    r = subprocess.run([str(a) for a in argv], capture_output=True)
    check(r.returncode == 0, f"{argv}: {r.stderr[-200:]}")
    return r.stdout


def one(model, work):
    name = os.path.basename(model.rstrip("/"))
    store = os.path.join(work, "s-" + name)
    run(TVSTORE, "init", store, code=0)
    run(TVSTORE, "import", store, name, model, code=0)
    want = read_safetensors(model) if any(
        f.endswith(".safetensors") for f in os.listdir(model)) else None
    links = ["copied"]
    if want is not None:
        run(TVSTORE, "import", store, name + "-linked", model, "--link",
            code=0)
        links.append("linked")
    for kind in links:
        obj = name if kind == "copied" else name + "-linked"
        out = os.path.join(work, f"x-{obj}")
        run(TVSTORE, "export", store, obj, out, code=0)
        got = read_safetensors(out)
        if want is None:
            want = got
            continue
        check(got.keys() == want.keys(), f"{obj}: tensor names")
        check(all(got[k] == want[k] for k in want if k in got),
              f"{obj}: tensor bytes")
        for f in SIDE:
            a, b = os.path.join(model, f), os.path.join(out, f)
            if os.path.exists(a):
                check(os.path.exists(b) and
                      open(a, "rb").read() == open(b, "rb").read(),
                      f"{obj}: {f}")
        ls = run_json(TVSTORE, "ls", store, obj, "--json")
        check(ls.get("schema") == "tvstore.ls/1", f"{obj}: ls schema")
        check({t["name"]: (t["dtype"], tuple(t["shape"]), t["bytes"])
               for t in ls.get("tensors", [])} ==
              {k: (v[0], v[1], len(v[2])) for k, v in want.items()},
              f"{obj}: ls")
    for k in list(want)[:4] + list(want)[-2:]:
        dtype, shape, data = want[k]
        check(raw(TVSTORE, "cat", store, f"{name}/{k}", "--format", "raw")
              == data, f"{name}/{k}: cat raw")
        descr, sh, payload = npy(raw(TVSTORE, "cat", store, f"{name}/{k}",
                                     "--format", "npy"))
        check(sh == shape, f"{name}/{k}: npy shape {sh}")
        if dtype == "BF16":
            n = len(data) // 2
            wide = struct.pack(f"<{n}I", *(u << 16 for u in struct.unpack(
                f"<{n}H", data)))
            check(descr == "<f4" and payload == wide, f"{name}/{k}: npy bf16")
            descr, sh, payload = npy(raw(
                TVSTORE, "cat", store, f"{name}/{k}", "--format", "npy",
                "--bits"))
            check(descr == "<u2" and payload == data, f"{name}/{k}: --bits")
        elif dtype == "F32":
            check(descr == "<f4" and payload == data, f"{name}/{k}: npy f32")
        info = run_json(TVSTORE, "info", store, f"{name}/{k}", "--json")
        check(tuple(info.get("shape", ())) == shape
              and info.get("dtype") == dtype, f"{name}/{k}: info {info}")
    run(TVSTORE, "verify", store, code=0)


work = temp()
for m in sys.argv[2:]:
    one(os.path.abspath(m), work)
finish("roundtrip")
