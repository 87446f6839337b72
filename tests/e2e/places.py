#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""places.py BIN_DIR QUICKSTART

Where outputs may go. plan says what run will say of OUT, with the same exit
status, for models and for adapters; no --force writes into a store or a
comparison; what --force replaces leaves no file behind, whichever kind of
output was there before.
"""
import json
import os
import shutil
import sys

from common import check, finish, run, run_json, temp

BIN, DATA = map(os.path.abspath, sys.argv[1:3])
TVMERGE, TVSTORE = os.path.join(BIN, "tvmerge"), os.path.join(BIN, "tvstore")
WORK = temp()
os.chdir(WORK)
for name in ("base", "ft-code", "lora-jargon"):
    shutil.copytree(os.path.join(DATA, name), name)
with open("model.yml", "w") as f:
    f.write("merge_method: linear\nmodels:\n"
            "- {model: base, parameters: {weight: 1}}\n"
            "- {model: ft-code, parameters: {weight: 1}}\n")
with open("adapter.yml", "w") as f:
    f.write("merge_method: cat\nmodels:\n"
            "- {model: lora-jargon, parameters: {weight: 0.5}}\n")
with open("other.yml", "w") as f:
    f.write("merge_method: cat\nmodels:\n"
            "- {model: lora-jargon, parameters: {weight: 2}}\n")
RECIPES = ("model.yml", "adapter.yml")


def tree(d):
    return {os.path.join(p, n): os.stat(os.path.join(p, n)).st_mtime_ns
            for p, _, names in os.walk(d) for n in names}


def refused(what, recipe, out, *words, options=(), code=4):
    """run and plan refuse OUT alike, and nothing changes in it."""
    before = tree(out)
    r = run(TVMERGE, "run", recipe, out, *options, code=code)
    p = run(TVMERGE, "plan", recipe, out, *options, code=code)
    lines = [x.strip() for x in r.stderr.splitlines()
             if x.startswith(("tvmerge: error:", "  hint:"))]
    check(lines, f"{what}: run says nothing: {r.stderr}")
    message = lines[0] if lines else "?"
    hint = lines[1][len("hint: "):] if len(lines) > 1 else ""
    check(message in p.stderr and hint in p.stderr,
          f"{what}: plan says {p.stderr!r}, run {r.stderr!r}")
    for w in words:
        check(w in r.stderr, f"{what}: no {w!r} in {r.stderr!r}")
    j = run(TVMERGE, "plan", recipe, out, "--json", *options, code=code)
    doc = json.loads(j.stdout)
    check(not doc["ok"] and any(x["severity"] == "error"
                                for x in doc["problems"]),
          f"{what}: plan --json {doc['problems']}")
    check(tree(out) == before, f"{what}: {out} was written")


def accepted(what, recipe, out, *options):
    before = tree(out)
    run(TVMERGE, "plan", recipe, out, *options, code=0)
    check(tree(out) == before, f"{what}: plan wrote")


def fresh(d):
    shutil.rmtree(d, True)
    return d


# ---- what is no place ----------------------------------------------------------

run(TVSTORE, "init", "store", "-q", code=0)
run(TVSTORE, "import", "store", "base", "base", "-q", code=0)
run(TVSTORE, "import", "store", "lora", "lora-jargon", "-q", code=0)
os.makedirs("comparison/.tvcompare")
os.mkdir("foreign")
open("foreign/mine.txt", "w").close()
open("file", "w").close()
os.makedirs("store/a/b")
os.makedirs("lmdb/deep")
open("lmdb/data.mdb", "w").close()
for recipe in RECIPES:
    kind = recipe.split(".")[0]
    for force in ((), ("--force",)):
        n = f"{kind}{' --force' if force else ''}"
        refused(f"{n} over a store", recipe, "store", "is a store",
                options=force)
        refused(f"{n} over a comparison", recipe, "comparison",
                "comparison", "hint:", options=force)
        refused(f"{n} over a file", recipe, "file", "not a directory",
                options=force)
        refused(f"{n} in a store", recipe, "store/new/out", "inside a store",
                options=force)
        refused(f"{n} deep in a store", recipe, "store/a/b/c/out",
                "inside a store", options=force)
        refused(f"{n} over what lies deep in a store", recipe, "store/a/b",
                "inside a store", options=force)
        refused(f"{n} below a file", recipe, "file/out", "not a directory",
                options=force)
    # Others use LMDB too: what only has a data.mdb is no store.
    accepted(f"{kind} below a database of another program", recipe,
             "lmdb/deep/out")
    # Its owner may write there, and still nothing new.
    refused(f"{kind} where no files are kept", recipe, "/proc/x", "/proc")
    refused(f"{kind} over other files", recipe, "foreign", "mine.txt",
            "--force")
    accepted(f"{kind} --force over other files", recipe, "foreign", "--force")
    accepted(f"{kind} into a new directory", recipe, "new/deep")
    check(not os.path.exists("new"), "plan made a directory")
for force in ((), ("--force",)):
    refused(f"adapter over its input {force}", "adapter.yml", "lora-jargon",
            "is the directory of the input", options=force)
r = run(TVSTORE, "verify", "store", code=0)
for name in ("base", "lora"):
    for force in ((), ("--force",)):
        for place, word in (("store", "is a store"),
                            ("comparison", "comparison")):
            before = tree(place)
            r = run(TVSTORE, "export", "store", name, place, *force, code=4)
            check(word in r.stderr, f"export {force}: {r.stderr}")
            check(set(tree(place)) == set(before), f"export wrote into {place}")
for place, word in (("store", "is a store"), ("comparison", "comparison")):
    for force in ((), ("--force",)):
        before = tree(place)
        r = run(TVMERGE, "extract-lora", "--model", "ft-code", "--base",
                "base", "--rank", "2", place, *force, code=4)
        check(word in r.stderr, f"extract-lora {force}: {r.stderr}")
        check(tree(place) == before, f"extract-lora wrote into {place}")


# ---- one kind over the other ---------------------------------------------------

def files(d):
    return sorted(os.listdir(d))


run(TVMERGE, "run", "model.yml", "model", "-q", code=0)
run(TVMERGE, "run", "adapter.yml", "adapter", "-q", code=0)
MODEL, ADAPTER = files("model"), files("adapter")
check("adapter_config.json" not in MODEL and "config.json" not in ADAPTER,
      f"files: {MODEL}, {ADAPTER}")
with open("adapter/tvmerge.json") as f:
    listed = {x["name"]: x["bytes"] for x in json.load(f)["files"]}
check(set(listed) == set(ADAPTER) - {"tvmerge.json"} and
      all(os.path.getsize(f"adapter/{k}") == v for k, v in listed.items()),
      f"record of an adapter lists {listed}")
refused("adapter over a model", "adapter.yml", "model", "another", "--force")
refused("model over an adapter", "model.yml", "adapter",
        "the result of another merge, an adapter\n", "--force")
refused("adapter over another", "other.yml", "adapter", "another", "--force")
accepted("the same adapter again", "adapter.yml", "adapter")
accepted("the same model again", "model.yml", "model")
for first, second, want in (("model.yml", "adapter.yml", ADAPTER),
                            ("adapter.yml", "model.yml", MODEL),
                            ("adapter.yml", "other.yml", ADAPTER)):
    what = f"{second} --force over {first}"
    fresh("over")
    run(TVMERGE, "run", first, "over", "-q", "--out-shard-size", "500KB",
        code=0)
    with open("over/mine.txt", "w") as f:
        f.write("kept")
    accepted(what, second, "over", "--force")
    run(TVMERGE, "run", second, "over", "-q", "--force", code=0)
    check(files("over") == sorted(want + ["mine.txt"]),
          f"{what}: {files('over')}")
    again = run_json(TVMERGE, "run", second, "over", "--json")
    check(again["already_done"], f"{what}: again {again}")
# Adapters whose record lists nothing (written before it did).
for second, want in (("model.yml", MODEL), ("other.yml", ADAPTER)):
    fresh("over")
    run(TVMERGE, "run", "adapter.yml", "over", "-q", code=0)
    with open("over/tvmerge.json") as f:
        record = json.load(f)
    record["files"] = []
    with open("over/tvmerge.json", "w") as f:
        json.dump(record, f)
    accepted("an adapter of before", "adapter.yml", "over")
    run(TVMERGE, "run", second, "over", "-q", "--force", code=0)
    check(files("over") == want, f"{second} over an old one: {files('over')}")
# Models that no merge made.
shutil.copytree("ft-code", "copy")
run(TVMERGE, "run", "adapter.yml", "copy", "-q", "--force", code=0)
check(not {"config.json", "model.safetensors"} & set(files("copy")),
      f"adapter --force over a model: {files('copy')}")

# ---- what is damaged or unfinished ---------------------------------------------

shutil.copytree("adapter", "cut")
with open("cut/adapter_model.safetensors", "r+b") as f:
    f.truncate(1000)
refused("a cut adapter", "adapter.yml", "cut", "adapter_model.safetensors",
        "--force")
run(TVMERGE, "run", "adapter.yml", "cut", "-q", "--force", code=0)
check(files("cut") == ADAPTER, f"after --force: {files('cut')}")
with open("cut/tvmerge.json", "w") as f:
    f.write("{")
refused("a damaged record", "adapter.yml", "cut", "tvmerge.json", code=12)
run(TVMERGE, "run", "adapter.yml", "cut", "-q", "--force", code=0)

# An unfinished merge of models is not swept away by an adapter's.
os.makedirs("begun/.tvmerge/journal")
refused("adapter over an unfinished merge", "adapter.yml", "begun",
        "unfinished", "--force")
run(TVMERGE, "run", "adapter.yml", "begun", "-q", "--force", code=0)
check(files("begun") == ADAPTER, f"begun: {files('begun')}")

# What fails on the way leaves nothing, and nothing of others goes.
run(TVMERGE, "extract-lora", "--model", "base", "--base", "base", "--rank", "2",
    "nothing", code=4)
check(not os.path.exists("nothing"), "a failed extraction left a directory")
os.mkdir("mine")
run(TVMERGE, "extract-lora", "--model", "base", "--base", "base", "--rank", "2",
    "mine", code=4)
check(files("mine") == [], f"a failed extraction left {files('mine')}")
os.makedirs("begun2/.tvmerge/journal")
run(TVMERGE, "extract-lora", "--model", "base", "--base", "base", "--rank", "2",
    "begun2", "--force", code=4)
check(os.path.isdir("begun2/.tvmerge/journal"), "the journal of another went")

finish("places")
