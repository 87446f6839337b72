#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cli_busy.py BIN_DIR DATA

What a plan says about the place that it is for is what a run would say, with
the same exit status: another merge, finished or not, other files, a run that
is at work there, in a directory and in a store. Who waits says for whom, and
tvmerge status shows merges into a store as it shows those into directories.
"""
import json
import os
import signal
import subprocess

from cli_common import (DATA, SLOWER, TVMERGE, TVSTORE, check, document, finish,
                        go, held, make_model, path, run, write)


def recipe(name, weight, document=""):
    return write(name, f"""{document}merge_method: linear
models:
- {{model: {DATA}/base, parameters: {{weight: 1}}}}
- {{model: {DATA}/ft-code, parameters: {{weight: {weight}}}}}
""")


def tree(d):
    return sorted(os.path.join(b, f) for b, _, fs in os.walk(d) for f in fs)


def alike(what, code, *argv, message):
    """plan and run refuse alike; plan leaves everything as it is."""
    before = tree(path("."))
    p = run(TVMERGE, "plan", *argv, code=code)
    check(tree(path(".")) == before, f"{what}: plan has changed something")
    doc = document(TVMERGE, "plan", *argv, code=code)
    check(doc["ok"] is (code == 0), f"{what}: ok in the document")
    if code:
        check(any(message in x["message"] for x in doc["problems"]),
              f"{what}: {doc['problems']}")
    r = run(TVMERGE, "run", *argv, "--lock-timeout", "0", code=code)
    for text in (p.stderr.decode(), r.stderr.decode()):
        check(not code or message in text, f"{what}: {text}")


one, two = recipe("one.yml", 1), recipe("two.yml", 2)
out = path("out")
run(TVMERGE, "run", one, out, "-q")
alike("another merge", 4, two, out, message="holds the result of another merge")
run(TVMERGE, "plan", two, out, "--force")
run(TVMERGE, "plan", two)
run(TVMERGE, "plan", one, out)

os.mkdir(path("mine"))
write("mine/notes.txt", "hello")
alike("other files", 4, one, path("mine"), message="it holds notes.txt")
alike("a file", 4, one, path("one.yml"), message="is not a directory")
os.truncate(os.path.join(out, "model.safetensors"), 100)
alike("a file of the merge is short", 4, one, out,
      message="model.safetensors is missing or has another size")

# Several documents: the place of the output is looked at first.
several = write("several.yml", open(recipe("a.yml", 1, "name: half\n")).read()
                + "---\n" + open(recipe("b.yml", 3)).read())
alike("documents, other files", 4, several, path("mine"),
      message="it holds notes.txt")
check(not os.path.exists(path("mine.stages")), "documents: stages were made")

# A store's object.
store = path("s")
run(TVSTORE, "init", store, "-q")
run(TVSTORE, "import", store, "base", os.path.join(DATA, "base"), "-q")
alike("an object", 4, one, "--into", "base", "--store", store,
      message="which is no merge")
run(TVMERGE, "run", one, "--into", "m", "--store", store, "-q")
alike("another merge in the store", 4, two, "--into", "m", "--store", store,
      message="the result of another merge")

# A merge that is at work, then one that was stopped.
big = [make_model("x", 48, 1 << 18, 1), make_model("y", 48, 1 << 18, 2)]


def slow(name, weight):
    return write(name, f"""merge_method: ties
base_model: {big[0]}
models:
- {{model: {big[1]}, parameters: {{weight: {weight}, density: 0.5}}}}
""")


one, two = slow("slow1.yml", 1), slow("slow2.yml", 2)
for where in ((path("busy"),), ("--into", "busy", "--store", store)):
    lock = os.path.join(store, "writer.lock") if len(where) > 1 else \
        os.path.join(path("busy"), ".tvmerge", "lock")
    p = subprocess.Popen([TVMERGE, "run", one, *where, "--threads", "1", "-q"],
                         env=dict(os.environ, TV_CPU="ref",
                                  TV_GROUP_BYTES="2MB"),
                         stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def locked():
        try:
            with open(lock) as f:
                return f"(process {p.pid})" in f.read()
        except FileNotFoundError:
            return False

    def begun():
        if not locked():
            return False
        r = subprocess.run([TVMERGE, "status", *state, "--json"],
                           capture_output=True, timeout=10 * SLOWER)
        return r.returncode == 0 and json.loads(r.stdout)["n_done"] > 0

    into = len(where) > 1
    state = ("--store", store, "--into", "busy") if into else where
    work = "tvmerge run --into busy" if into else "tvmerge run"
    check(held(p, begun), "nothing is at work")
    if into:
        check(document(TVMERGE, "status", *state)["running"] is True,
              "status --into: running")
        for args in ((store,), ("--store", store)):
            doc = document(TVMERGE, "status", *args)
            check([(m["name"], m["running"], m["n_tensors"], m["directory"])
                   for m in doc["merges"]] == [("busy", True, 48, False)],
                  f"status of a store: {doc}")
    for r in (one, two):
        alike("busy", 11, r, *where, message=f"{work} (process {p.pid})")
    r = run(TVMERGE, "run", one, *where, "--lock-timeout", "50ms", code=11)
    check(f"by {work} (process {p.pid}): waiting 0.05 s at most"
          in r.stderr.decode(), f"who waits says for whom: {r.stderr}")
    go(p, signal.SIGINT)
    p.communicate(timeout=60 * SLOWER)
    check(p.returncode in (0, 130), f"exit {p.returncode}")
    if p.returncode == 130:
        alike("another unfinished merge", 4, two, *where,
              message="an unfinished merge")
        doc = document(TVMERGE, "status", *state)
        check(doc["state"] == "unfinished" and doc["running"] is False and
              0 < doc["n_done"] < doc["n_tensors"] == 48 and
              doc["bytes_done"] == doc["n_done"] << 20 and
              doc["bytes_total"] == 48 << 20, f"status: {doc}")
        if into:
            text = run(TVMERGE, "status", "--store", store).stdout.decode()
            check(text == f"store:busy: unfinished, {doc['n_done']} of 48 "
                  f"tensors, {doc['n_done']}.0 MiB of 48.0 MiB\n", text)
        run(TVMERGE, "plan", one, *where)
    run(TVMERGE, "run", one, *where, "-q")
    doc = document(TVMERGE, "status", *state)
    check(doc["state"] == "finished" and doc["n_done"] == 48,
          f"status when finished: {doc}")

text = run(TVMERGE, "status", store).stdout.decode()
check(text == f"{store}: no unfinished merge\n", text)
run(TVMERGE, "status", "--store", store, "--into", "nobody", code=10)
run(TVMERGE, "status", env={"TV_STORE": store})
for argv in ((), ("--into", "m"), (path("busy"), "--store", store)):
    run(TVMERGE, "status", *argv, code=2)
finish()
