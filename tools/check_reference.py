#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The forward pass, tokenizer and statistics against the reference models.

  check_reference.py BIN REFMODELS

BIN holds tveval and tvstore, REFMODELS models/, text/ and goldens/ (made by
transformers in fp32). Per model: logits within 2e-4, per-token NLL within 1e-4,
argmax equal where the two largest differ by more than 1e-3, sums over all
positions, perplexities within 1e-4 relative, the same bytes with one and two
threads; the tokenizer's test strings; X^T X of the golden layers within 1e-5
relative. Needs numpy.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

failed = 0


def check(ok, what):
    global failed
    if not ok:
        failed += 1
        print("FAIL", what, flush=True)


def run(*argv, text=None):
    p = subprocess.run(argv, capture_output=True, input=text)
    if p.returncode:
        sys.exit(f"{' '.join(argv)}: exit {p.returncode}: {p.stderr.decode()}")
    return p.stdout


def reference(models, name):
    model, _, adapter = name.partition("__")
    at = os.path.join(models, model)
    return at + (f"+{os.path.join(models, adapter)}" if adapter else "")


def logits(tveval, ref, ids, work):
    path = os.path.join(work, "ids.npy")
    np.save(path, ids.astype(np.int64))
    out = []
    for threads in ("1", "2"):
        at = os.path.join(work, f"logits{threads}.npy")
        run(tveval, "logits", ref, "--ids", path, "-o", at, "-j", threads)
        with open(at, "rb") as f:
            out.append(f.read())
    check(out[0] == out[1], f"{ref}: other bytes with two threads")
    return np.load(os.path.join(work, "logits1.npy"))


def check_model(tveval, root, name, work):
    g = np.load(os.path.join(root, "goldens/models", name + ".npz"))
    ref = reference(os.path.join(root, "models"), name)
    x = logits(tveval, ref, g["ids"], work)
    last = np.abs(x[:, -1] - g["logits_last"]).max()
    some = np.abs(x[:, g["positions"]] - g["logits_pos"]).max()
    d = x.astype(np.float64)
    top = d.max(-1, keepdims=True)
    lse = np.log(np.exp(d - top).sum(-1)) + top[..., 0]
    nll = lse[:, :-1] - np.take_along_axis(
        d[:, :-1], g["ids"][:, 1:, None].astype(np.int64), 2)[..., 0]
    off = np.abs(nll - g["nll"]).max()
    two = np.sort(x, -1)[..., -2:]
    clear = two[..., 1] - two[..., 0] > 1e-3
    same = (x.argmax(-1) == g["argmax"])[clear].all()
    vocab = x.shape[-1]
    rowsum = np.abs(d.sum(-1) - g["logits_rowsum"]).max() / vocab
    rowsq = np.abs((d * d).sum(-1) / g["logits_rowsq"] - 1).max()
    print(f"{name:18} logits {max(last, some):.1e}, NLL {off:.1e}, row means "
          f"{rowsum:.1e}, row squares {rowsq:.1e}", flush=True)
    check(max(last, some) <= 2e-4, f"{name}: logits")
    check(off <= 1e-4, f"{name}: NLL")
    check(same, f"{name}: argmax")
    check(rowsum <= 2e-4 and rowsq <= 1e-3, f"{name}: all positions")


def find_ppl(doc, domain):
    one = doc.get("ppl", doc)[domain]
    return one["ppl"] if isinstance(one, dict) else one


def check_ppl(tveval, root, name, *more):
    golden = os.path.join(root, "goldens/models", name + ".ppl.json")
    if more:
        golden = os.path.join(root, "goldens/base_hf_nobos_ppl.json")
    with open(golden, encoding="utf-8") as f:
        doc = json.load(f)
    domains = ("code", "prose", "dict")
    texts = [a for d in domains
             for a in ("--text", os.path.join(root, "text", d + ".val.txt"))]
    got = [json.loads(run(
        tveval, "ppl", reference(os.path.join(root, "models"), name),
        "--tokenizer", os.path.join(root, "models/base"), *texts, "--context",
        "256", "-j", threads, "--json", *more))["texts"]
        for threads in ("1", "2")]
    worst = 0
    for i, d in enumerate(domains):
        want = find_ppl(doc, d)
        worst = max(worst, abs(got[0][i]["ppl"] / want - 1))
        check(got[0][i]["nll_mean"] == got[1][i]["nll_mean"],
              f"{name}, {d}: another value with two threads")
    print(f"{name:18} perplexities {worst:.1e}"
          f"{' without BOS' if more else ''}", flush=True)
    check(worst <= 1e-4, f"{name}: perplexity")


def check_tokenizer(tveval, root, work):
    with open(os.path.join(root, "goldens/tokenizer_2048.json"),
              encoding="utf-8") as f:
        strings = json.load(f)
    path = os.path.join(work, "text.txt")
    base = os.path.join(root, "models/base")
    for s in strings:
        if "file" in s:
            got = run(tveval, "tokenize", base, "--text",
                      os.path.join(root, s["file"])).split()
            ids = np.array([int(i) for i in got], "<u2")
            check(hashlib.sha256(ids.tobytes()).hexdigest()
                  == s["sha256_le_u16"], f"tokens of {s['file']}")
            continue
        with open(path, "wb") as f:
            f.write(s["text"].encode())
        for key, more in (("ids", []), ("ids_with_special", ["--special"])):
            got = run(tveval, "tokenize", base, "--text", path, *more).split()
            check([int(i) for i in got] == s[key],
                  f"tokens of {s['text']!r}")
    print(f"{len(strings)} strings and files tokenised", flush=True)


def read_hessians(path):
    """{name: array} of a safetensors file of fp32 and int32."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        head = json.loads(f.read(n))
        data = f.read()
    kinds = {"F32": np.float32, "I32": np.int32, "I64": np.int64}
    return {k: np.frombuffer(data, kinds[v["dtype"]],
                             (v["data_offsets"][1] - v["data_offsets"][0])
                             // np.dtype(kinds[v["dtype"]]).itemsize,
                             v["data_offsets"][0]).reshape(v["shape"])
            for k, v in head.items() if k != "__metadata__"}


def check_gram(tveval, tvstore, root, work):
    golden = read_hessians(os.path.join(root,
                                        "goldens/sparsegpt/hessians.safetensors"))
    ids = os.path.join(work, "calib.npy")
    np.save(ids, golden["calib_ids"].astype(np.int64))
    store, out = os.path.join(work, "store"), os.path.join(work, "gram")
    run(tvstore, "init", store)
    run(tveval, "calibrate", os.path.join(root, "models/base"), "--ids", ids,
        "--stat", "gram", "--store", store, "-o", out, "--json")
    for name, want in golden.items():
        if not name.endswith(".XtX"):
            continue
        layer = name[:-len(".XtX")]
        path = os.path.join(out, layer + ".weight.npy")
        got = np.load(path).astype(np.float64)
        off = np.linalg.norm(got - want) / np.linalg.norm(want)
        print(f"X^T X of {layer}: {off:.1e}", flush=True)
        check(off <= 1e-5, f"X^T X of {layer}")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    bins, root = map(os.path.abspath, sys.argv[1:])
    tveval = os.path.join(bins, "tveval")
    names = sorted(n[:-4] for n in
                   os.listdir(os.path.join(root, "goldens/models"))
                   if n.endswith(".npz"))
    with tempfile.TemporaryDirectory() as work:
        check_tokenizer(tveval, root, work)
        for name in names:
            check_model(tveval, root, name, work)
            check_ppl(tveval, root, name)
        check_ppl(tveval, root, "base", "--bos", "none")
        check_gram(tveval, os.path.join(bins, "tvstore"), root, work)
    print(f"{failed} checks failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
