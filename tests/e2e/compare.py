#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""compare.py BIN_DIR QUICKSTART

tvmerge compare: the table against tvmerge run and tveval ppl, what is kept,
killed and continued at many moments, refusals.
"""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

from common import check, finish, run, run_json, temp

BIN, QUICK = map(os.path.abspath, sys.argv[1:3])
TVMERGE, TVEVAL, TVSTORE = (os.path.join(BIN, p) for p in
                            ("tvmerge", "tveval", "tvstore"))
TIMES = ("seconds", "eval_seconds", "peak_memory_bytes", "calibration")
METHODS = "ties,dare_ties,tsv"
NAMES = {"ties": "ties_magnitude", "dare_ties": "ties_random", "tsv": "tsv"}

RECIPE = """# weights: {0}
merge_method: "{1}"   # replaced by compare
base_model: base
models:
- model: ft-prose
  parameters: {{weight: {0}, density: 0.4}}
- model: ft-code
  parameters: {{weight: 0.6, density: 0.4}}
- model: base+lora-jargon
  parameters: {{weight: 0.5, density: 0.4}}
out_dtype: bfloat16
"""


def work(tmp, name):
    """A directory with the models, a recipe and short texts."""
    d = os.path.join(tmp, name)
    os.makedirs(d)
    for m in ("base", "ft-prose", "ft-code", "lora-jargon"):
        os.symlink(os.path.join(QUICK, m), os.path.join(d, m))
    for t in ("code", "prose"):
        with open(os.path.join(QUICK, "text", t + ".val.txt")) as f:
            text = f.read(1500)
        with open(os.path.join(d, t + ".txt"), "w") as f:
            f.write(text)
    with open(os.path.join(d, "r.yml"), "w") as f:
        f.write(RECIPE.format(0.6, "task_arithmetic"))
    return d


def command(out, *more):
    return [TVMERGE, "compare", "r.yml", "-o", out, "--text", "code.txt",
            "--text", "prose.txt", "--context", "64", "--methods", METHODS,
            "--threads", "1", "--no-sync", *more]


def rows(doc):
    return {r["name"]: r for r in doc["rows"]}


def figures(doc):
    """Everything but what a clock says."""
    return [{k: v for k, v in r.items() if k not in TIMES}
            for r in doc["rows"]]


def files(d):
    out = {}
    for root, _, names in os.walk(d):
        for n in names:
            path = os.path.join(root, n)
            rel = os.path.relpath(path, d)
            if rel.startswith(".tvcompare") or rel in ("compare.md",
                                                       "compare.json"):
                continue
            with open(path, "rb") as f:
                out[rel] = f.read()
    return out


def table(tmp):
    d = work(tmp, "table")
    doc = run_json(*command("out", "--json"), cwd=d)
    check(doc["schema"] == "tvmerge.compare/1", "schema")
    got = [(r["kind"], r.get("model", r.get("method"))) for r in doc["rows"]]
    check(got == [("base", "base"), ("model", "ft-prose"),
                  ("model", "ft-code"), ("model", "base+lora-jargon"),
                  ("merge", "task_arithmetic"), ("merge", "ties"),
                  ("merge", "dare_ties"), ("merge", "tsv")], f"rows {got}")
    by = rows(doc)
    for method, name in NAMES.items():
        check(name in by and by[name]["out"] == os.path.join("out", name),
              f"{method}: no row {name}")
    # A merge is what run makes of the recipe, its figures are tveval's.
    with open(os.path.join(d, "ties.yml"), "w") as f:
        f.write(RECIPE.format(0.6, "ties"))
    r = run_json(TVMERGE, "run", "ties.yml", "alone", "--json", cwd=d)
    check(r["digest"] == by["ties_magnitude"]["digest"],
          "compare and run give different models")
    for ref, name in (("alone", "ties_magnitude"), ("base", "base0"),
                      ("base+lora-jargon", "model2")):
        e = run_json(TVEVAL, "ppl", ref, "--text", "code.txt", "--text",
                     "prose.txt", "--context", "64", "--json", cwd=d)
        want = [t["ppl"] for t in e["texts"]]
        check([t["ppl"] for t in by[name]["texts"]] == want,
              f"{name}: other perplexities than tveval's")
        mean = math.exp(sum(map(math.log, want)) / len(want))
        check(abs(by[name]["geometric_mean"] - mean) < 1e-9 * mean,
              f"{name}: geometric mean")
    best = min((r for r in doc["rows"] if r["kind"] == "merge"),
               key=lambda r: r["geometric_mean"])
    check(doc["best"] == best["name"], "best")
    for r in doc["rows"]:
        if r["kind"] != "merge":
            continue
        size = sum(len(b) for p, b in files(os.path.join(d, "out")).items()
                   if p.startswith(r["name"] + "/"))
        check(r["disk_bytes"] == size and r["seconds"] > 0 and
              r["peak_memory_bytes"] > 0, f"{r['name']}: cost")
    # Again: the same document and table, from what is known.
    t0 = time.time()
    text = run(*command("out"), cwd=d, code=0)
    check(text.stdout == open(os.path.join(d, "out/compare.md")).read(),
          "stdout is not compare.md")
    check(json.load(open(os.path.join(d, "out/compare.json"))) == doc,
          "a second run changes the document")
    lines = text.stdout.splitlines()
    check(len([x for x in lines if x.startswith("| ")]) == 9 and
          lines[0].startswith("| method | code.txt | prose.txt |"),
          f"table: {lines}")
    check(all(x.count("|") == 8 for x in lines[:10]), "columns of the table")
    # One more method: only that is done.
    more = command("out", "--json")
    more[more.index(METHODS)] = METHODS + ",iso_c"
    doc2 = run_json(*more, cwd=d)
    check(doc2["rows"][:-1] == doc["rows"] and
          doc2["rows"][-1]["name"] == "iso_c", "a method was added")
    return d, doc, time.time() - t0


def kept(tmp, doc):
    d = work(tmp, "keep")
    for keep, left in (("none", []), ("best", [doc["best"]]),
                       ("all", ["task_arithmetic"] + sorted(NAMES.values()))):
        got = run_json(*command("out", "--json", "--keep", keep), cwd=d)
        dirs = sorted(n for n in os.listdir(os.path.join(d, "out"))
                      if os.path.isdir(os.path.join(d, "out", n)) and
                      n != ".tvcompare")
        check(dirs == left, f"--keep {keep} leaves {dirs}")
        for r in got["rows"]:
            check((r.get("out") is not None) == (r["name"] in left),
                  f"--keep {keep}: out of {r['name']} is {r.get('out')}")
        strip = [[{k: v for k, v in r.items() if k != "out"}
                  for r in figures(x)] for x in (got, doc)]
        check(strip[0] == strip[1], f"--keep {keep} changes figures")


def progress(d, running=False):
    """What tvmerge status says of the comparison in d/out, against the records
    that are there."""
    if not os.path.exists(os.path.join(d, "out/.tvcompare/.entries.json")):
        return None
    s = run_json(TVMERGE, "status", "out", "--json", cwd=d)
    done = 0
    for e in s["entries"]:
        record = os.path.join(d, "out/.tvcompare", e["name"] + ".json")
        known = json.load(open(record)) if os.path.exists(record) else {}
        done += "texts" in known
        check((e["state"] == "done") == ("texts" in known) and
              e["geometric_mean"] == known.get("geometric_mean"),
              f"status: {e}, known is {known}")
    check(s["schema"] == "tvmerge.status/1" and s["running"] is running and
          s["n_entries"] == len(s["entries"]) == 8 and s["n_done"] == done and
          s["state"] == ("finished" if done == 8 and not running
                         else "unfinished"), f"status: {s}")
    lines = run(TVMERGE, "status", "out", cwd=d, code=0).stdout.splitlines()
    check(len(lines) == 9 and lines[0].startswith("out: comparison ") and
          lines[0].endswith(f", {done} of 8 entries done"), f"status: {lines}")
    return s


def killed(tmp, doc, reference):
    """SIGKILL at moments spread over the whole run; then it is finished."""
    want = files(os.path.join(reference, "out"))
    want = {k: v for k, v in want.items() if not k.startswith("iso_c/")}
    rng = random.Random(7)
    for keep in ("all", "best"):
        d = work(tmp, "kill-" + keep)
        kills = 0
        while kills < 6:
            p = subprocess.Popen(command("out", "--keep", keep, "-q"), cwd=d,
                                 stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
            try:
                p.wait(timeout=0.02 + 0.25 * rng.random())
                break
            except subprocess.TimeoutExpired:
                p.send_signal(signal.SIGKILL)
                p.wait()
                kills += 1
                progress(d)
        check(kills > 0, "nothing was killed")
        got = run_json(*command("out", "--json", "--keep", keep), cwd=d)
        if keep == "all":
            check(progress(d)["state"] == "finished", "status when finished")
            check(figures(got) == figures(doc), "killed: other figures")
            check(files(os.path.join(d, "out")) == want, "killed: other bytes")
        else:
            check([r["geometric_mean"] for r in got["rows"]] ==
                  [r["geometric_mean"] for r in doc["rows"]],
                  "killed, --keep best: other figures")
            best = {k: v for k, v in want.items()
                    if k.startswith(doc["best"] + "/")}
            check(files(os.path.join(d, "out")) == best,
                  "killed, --keep best: other bytes")


def interrupted(tmp, doc):
    d = work(tmp, "interrupt")
    p = subprocess.Popen(command("out"), cwd=d, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not os.path.exists(os.path.join(d, "out/.tvcompare/base0.json")) \
            and p.poll() is None:
        time.sleep(0.005)
    p.send_signal(signal.SIGSTOP)
    progress(d, running=True)
    p.send_signal(signal.SIGINT)
    p.send_signal(signal.SIGCONT)
    out, err = p.communicate()
    check(p.returncode == 130 and "resume with: " in err and not out,
          f"SIGINT: exit {p.returncode}, {err[-200:]!r}")
    got = run_json(*command("out", "--json"), cwd=d)
    check(figures(got) == figures(doc), "interrupted: other figures")


def refused(tmp):
    d = work(tmp, "refused")
    base = [TVMERGE, "compare", "r.yml"]
    text = ["--text", "code.txt"]
    run(*base, *text, cwd=d, code=2)
    run(*base, "-o", "out", cwd=d, code=2)
    r = run(*base, "-o", "out", *text, "--methods", "ties,tsw", cwd=d, code=2)
    check("tsv" in r.stderr, f"no suggestion: {r.stderr}")
    r = run(*base, "-o", "out", *text, "--methods", "ties_importence", cwd=d,
            code=2)
    check("ties_importance" in r.stderr, f"no suggestion: {r.stderr}")
    run(*base, "r.yml", "-o", "out", *text, "--methods", "ties", cwd=d, code=2)
    run(*base, "-o", "out", *text, "--keep", "some", cwd=d, code=2)
    run(*base, "-o", "out", "--text", "none.txt", "--methods", "ties", cwd=d,
        code=4)
    run(*base, "-o", "base", *text, "--methods", "ties", cwd=d, code=4)
    run(TVMERGE, "compare", "none.yml", "-o", "out", *text, cwd=d, code=4)
    run(*base, "-o", "out", *text, "--methods", "ties", "--quota", "1MB",
        cwd=d, code=5)
    with open(os.path.join(d, "bad.yml"), "w") as f:
        f.write(RECIPE.format(0.6, "ties").replace("ft-code", "ft-none"))
    run(TVMERGE, "compare", "bad.yml", "-o", "out", *text, cwd=d, code=4)
    check(not os.path.exists(os.path.join(d, "out")), "something was written")
    # Another recipe in the same place.
    one = command("out", "--methods", "ties", "--json")
    first = run_json(*one, cwd=d)
    with open(os.path.join(d, "r.yml"), "w") as f:
        f.write(RECIPE.format(0.2, "task_arithmetic"))
    r = run(*one, cwd=d, code=4)
    check("force" in r.stderr, f"no hint: {r.stderr}")
    second = run_json(*one, "--force", cwd=d)
    check(second["rows"][-1]["digest"] != first["rows"][-1]["digest"],
          "--force kept the old merge")
    # Room for one merge at a time is enough when none is kept.
    tight = command("tight", "--json", "--keep", "none", "--quota", "4MB")
    run_json(*tight, cwd=d)
    run(*command("full", "--quota", "4MB"), cwd=d, code=5)


def recipes(tmp):
    """Several recipes as they are written, from a store; without a base."""
    d = work(tmp, "recipes")
    run(TVSTORE, "init", "s.tv", cwd=d, code=0)
    for m in ("base", "ft-prose"):
        run(TVSTORE, "import", "s.tv", m, m, "--link", cwd=d, code=0)
    for i, w in enumerate((0.3, 0.9)):
        with open(os.path.join(d, f"w{i}.yml"), "w") as f:
            f.write("merge_method: ties\nbase_model: store:base\nmodels:\n"
                    "- model: store:ft-prose\n"
                    f"  parameters: {{weight: {w}, density: 0.5}}\n"
                    "parameters: {normalize: false}\n")
    with open(os.path.join(d, "soup.yml"), "w") as f:
        f.write("merge_method: linear\nmodels:\n- model: base\n  parameters: "
                "{weight: 1}\n- model: ft-code\n  parameters: {weight: 1}\n")
    doc = run_json(TVMERGE, "compare", "w0.yml", "w1.yml", "soup.yml", "-o",
                   "out", "--text", "code.txt", "--context", "64", "--store",
                   "s.tv", "--json", cwd=d)
    got = [r["name"] for r in doc["rows"] if r["kind"] == "merge"]
    check(got == ["task_arithmetic", "ties_magnitude", "ties_magnitude-w1",
                  "linear"], f"names {got}")
    check(len({r["digest"] for r in doc["rows"] if "digest" in r}) == 4,
          "merges that are the same")


def calibrated(tmp):
    """The default list, with text for every model's task: as the recipe has it
    and from the command line; what the recipe says of sparsifying."""
    d = work(tmp, "calibrated")
    args = ["--text", "code.txt", "--context", "64", "--threads", "1",
            "--no-sync", "--json"]
    tasks = [x for m, t in (("ft-prose", "prose"), ("ft-code", "code"),
                            ("base+lora-jargon", "prose"))
             for x in ("--text", f"{m}={t}.txt")]
    r = run(TVMERGE, "compare", "r.yml", "-o", "out", *args, cwd=d, code=2)
    check("no calibration text for 'ft-prose'" in r.stderr and
          r.stderr.count("merged by sparsegpt_ties, a method of the default "
                         "list: --methods") == 3, r.stderr)
    # Whatever else is wrong shows at once.
    with open(os.path.join(d, "latin.txt"), "wb") as f:
        f.write(b"caf\xe9 au lait. " * 300)
    for texts, what, n in ((("none.txt", "nor.txt"),
                            ("cannot open none.txt", "cannot open nor.txt"), 5),
                           (("latin.txt",), ("latin.txt: the text is not "
                                             "UTF-8",), 4)):
        more = [x for t in texts for x in ("--text", t)]
        r = run(TVMERGE, "compare", "r.yml", "-o", "bad", *args[:-1], *more,
                cwd=d, code=2)
        check(all(w in r.stderr for w in what) and
              "no calibration text for" in r.stderr and
              f"{n} problems" in r.stderr, r.stderr)
        r = run(TVMERGE, "compare", "r.yml", "-o", "bad", *args[:-1], *more,
                *tasks, cwd=d, code=4 if len(texts) > 1 else 12)
        check(all(w in r.stderr for w in what), r.stderr)
    check(not os.path.exists(os.path.join(d, "bad")), "nothing is written")
    doc = run_json(TVMERGE, "compare", "r.yml", "-o", "out", *args, *tasks,
                   cwd=d)
    got = [r["name"] for r in doc["rows"] if r["kind"] == "merge"]
    check(got == ["task_arithmetic", "ties_magnitude", "ties_random",
                  "ties_sparsegpt"], f"names {got}")
    with open(os.path.join(d, "s.yml"), "w") as f:
        f.write(RECIPE.format(0.6, "sparsegpt_ties"))
    alone = run_json(TVMERGE, "run", "s.yml", "alone", "--json", *tasks,
                     cwd=d)
    check(alone["digest"] == rows(doc)["ties_sparsegpt"]["digest"],
          "sparsegpt_ties: compare and run give different models")
    # Where nothing is left out the names say too much, and the table so.
    check(not any(r.get("keeps_all") for r in doc["rows"]), "densities")
    with open(os.path.join(d, "n.yml"), "w") as f:
        f.write(RECIPE.format(0.6, "ties").replace(", density: 0.4", ""))
    argv = [TVMERGE, "compare", "n.yml", "-o", "dense", "--methods",
            "ties,sparsegpt_ties,tsv", *args]
    doc = run_json(*argv, cwd=d)
    check([r["keeps_all"] for r in doc["rows"] if r["kind"] == "merge"] ==
          [False, True, True, False], "no density")
    r = run(*argv[:-1], cwd=d, code=0)
    check("| ties_sparsegpt (density 1) |" in r.stdout and
          "| tsv |" in r.stdout and "names no density below 1" in r.stdout,
          r.stdout)
    # Several recipes are what they say they are; methods are what their names
    # say.
    for name, method, sparsify in (("a", "task_arithmetic", "random"),
                                   ("b", "ties", "random")):
        with open(os.path.join(d, name + ".yml"), "w") as f:
            f.write(RECIPE.format(0.6, method) +
                    f"parameters: {{sparsify: {sparsify}}}\n")
    doc = run_json(TVMERGE, "compare", "a.yml", "b.yml", "-o", "two", *args,
                   cwd=d)
    got = [r["name"] for r in doc["rows"] if r["kind"] == "merge"]
    check(got == ["task_arithmetic", "linear_random", "ties_random"],
          f"names {got}")
    doc = run_json(TVMERGE, "compare", "b.yml", "-o", "one", "--methods",
                   "ties,dare_linear", *args, cwd=d)
    got = [r["name"] for r in doc["rows"] if r["kind"] == "merge"]
    check(got == ["task_arithmetic", "ties_magnitude", "linear_random"],
          f"names {got}")


def shared(tmp):
    """What one merge finds out of the inputs serves the next, without a store
    of the user's; killed at any moment too. <merge>_<sparsify> names."""
    d = work(tmp, "shared")
    tasks = [x for m, t in (("ft-prose", "prose"), ("ft-code", "code"),
                            ("base+lora-jargon", "prose"))
             for x in ("--text", f"{m}={t}.txt")]
    names = ["ties_importance", "linear_importance", "ties_sparsegpt",
             "linear_sparsegpt"]
    argv = [TVMERGE, "compare", "r.yml", "-o", "out", "--text", "code.txt",
            "--context", "64", "--no-sync", "--json", "--methods",
            ",".join(names), *tasks]
    doc = run_json(*argv, cwd=d)
    by = rows(doc)
    check([r["name"] for r in doc["rows"] if r["kind"] == "merge"] ==
          ["task_arithmetic"] + names, f"names {list(by)}")
    for name in names:
        use = by[name]["calibration"]
        first = name.startswith("ties")
        check((use["models"] > 0) == first and
              use["masks_made" if first else "masks_found"] > 0 and
              use["masks_found" if first else "masks_made"] == 0,
              f"{name}: {use}")
    # Other weights: nothing is calibrated, in another place with that store.
    check(os.path.isdir(os.path.join(d, "out/.tvcompare/store")), "no store")
    with open(os.path.join(d, "r.yml"), "w") as f:
        f.write(RECIPE.format(0.3, "task_arithmetic"))
    other = list(argv)
    other[other.index("out")] = "other"
    got = run_json(*other, "--store", "out/.tvcompare/store", cwd=d)
    check(all(rows(got)[n]["calibration"]["models"] == 0 for n in names),
          "other weights calibrate again")
    check(not os.path.exists(os.path.join(d, "other/.tvcompare/store")),
          "two stores")
    # Under a quota there is none; a damaged one is begun anew.
    plain = list(argv)
    plain[plain.index("out")] = "plain"
    without = run_json(*plain, "--quota", "100MB", cwd=d)
    check(not os.path.exists(os.path.join(d, "plain/.tvcompare/store")),
          "a store under --quota")
    os.mkdir(os.path.join(d, "plain/.tvcompare/store"))
    with open(os.path.join(d, "plain/.tvcompare/store/data.mdb"), "w") as f:
        f.write("no store " * 4096)
    more = list(plain)
    more[more.index("--methods") + 1] += ",ties"
    run_json(*more, cwd=d)
    run(TVSTORE, "verify", "plain/.tvcompare/store", cwd=d, code=0)
    got = run_json(*other, "--force", cwd=d)
    check([r.get("digest") for r in got["rows"]] ==
          [r.get("digest") for r in without["rows"]],
          "a shared store changes bytes")
    rng = random.Random(11)
    kills = 0
    other[other.index("other")] = "killed"
    while kills < 4:
        p = subprocess.Popen(other, cwd=d, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
        try:
            p.wait(timeout=0.02 + 0.3 * rng.random())
            break
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL)
            p.wait()
            kills += 1
    check(kills > 0, "nothing was killed")
    got = run_json(*other, cwd=d)
    check([{k: v for k, v in r.items() if k != "out"} for r in figures(got)] ==
          [{k: v for k, v in r.items() if k != "out"}
           for r in figures(without)], "killed: other figures")


def bad_texts(tmp):
    """Texts that cannot be scored are found before anything is merged."""
    d = work(tmp, "texts")
    for name, data, code, what in (("empty", b"", 4, "tokens"),
                                   ("short", b"one two\n", 4, "tokens"),
                                   ("latin1", b"caf\xe9 " * 300, 12, "UTF-8")):
        with open(os.path.join(d, name + ".txt"), "wb") as f:
            f.write(data)
        r = run(*command("out", "--text", name + ".txt"), cwd=d, code=code)
        check(name + ".txt" in r.stderr and what in r.stderr, r.stderr)
        check(not os.path.exists(os.path.join(d, "out")), f"{name}: written")


tmp = temp()
reference, doc, _ = table(tmp)
kept(tmp, doc)
killed(tmp, doc, reference)
interrupted(tmp, doc)
refused(tmp)
recipes(tmp)
calibrated(tmp)
shared(tmp)
bad_texts(tmp)
shutil.rmtree(tmp, True)
finish("compare")
