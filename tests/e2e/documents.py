#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""documents.py BIN_DIR QUICKSTART

A recipe of several documents: the same bytes as its documents one by one, in
any order, killed and resumed; stages go as soon as they are used; everything
wrong with any document is listed before anything is made.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from common import check, finish, run, run_json, temp

BIN, QUICK = map(os.path.abspath, sys.argv[1:3])
TVMERGE = os.path.join(BIN, "tvmerge")
DOCS = {
    "first": "name: first\nmerge_method: linear\nmodels:\n"
             "- {model: base, parameters: {weight: 0.5}}\n"
             "- {model: ft-code, parameters: {weight: 0.5}}\n",
    "second": "name: second\nmerge_method: slerp\nbase_model: first\n"
              "models:\n- model: first\n- model: ft-prose\n"
              "parameters: {t: 0.3}\ndtype: float32\n",
    "third": "name: third\nmerge_method: passthrough\nslices:\n- sources:\n"
             "  - {model: second, layer_range: [0, 4]}\n- sources:\n"
             "  - {model: second, layer_range: [2, 4]}\n",
    "": "merge_method: dare_linear\nbase_model: third\nmodels:\n"
        "- model: {model: {path: third}, lora: {path: lora-jargon}}\n"
        "  parameters: {weight: 0.7, density: 0.5}\n",
}


def write(path, *docs):
    with open(path, "w", encoding="utf-8") as f:
        f.write("---\n".join(docs))


def fill(d):
    shutil.rmtree(d, True)
    os.mkdir(d)
    for n in os.listdir(QUICK):
        os.symlink(os.path.join(QUICK, n), os.path.join(d, n))
    os.chdir(d)


def sizes(*dirs):
    return {os.path.join(d, n): os.stat(os.path.join(d, n)).st_mtime_ns
            for top in dirs for d, _, names in os.walk(top) for n in names}


def one_by_one():
    for name, text in DOCS.items():
        write("one.yml", text)
        last = run_json(TVMERGE, "run", "one.yml", name or "by-hand", "--json",
                        "--random-seed", "7")
    for name in DOCS:
        shutil.rmtree(name or "nothing", True)
    return last["digest"]


def together(want):
    docs = list(DOCS.values())
    for order in (docs, docs[::-1], [docs[3], docs[0], docs[2], docs[1]]):
        write("all.yml", *order)
        p = run_json(TVMERGE, "plan", "all.yml", "out", "--json",
                     "--random-seed", "7")
        check([d["name"] for d in p["documents"]] ==
              ["first", "second", "third"], f"documents {p['documents']}")
        check(not os.path.exists("out") and not os.path.exists("out.stages"),
              "plan writes something")
        r = run_json(TVMERGE, "run", "all.yml", "out", "--json",
                     "--random-seed", "7")
        check(r["digest"] == want, "the same bytes as one by one")
        check(not os.path.exists("out.stages"), "stages are gone")
        before = sizes("out")
        r = run_json(TVMERGE, "run", "all.yml", "out", "--json",
                     "--random-seed", "7")
        check(r["already_done"] and r["n_resumed"] == r["n_tensors"] and
              sizes("out") == before and not os.path.exists("out.stages"),
              "the same command again makes nothing")
        shutil.rmtree("out")
    run(TVMERGE, "run", "all.yml", "out", "--random-seed", "7", code=0)
    r = run(TVMERGE, "run", "all.yml", "out", "--random-seed", "8")
    check(r.returncode == 4 and "seed" in r.stderr,
          f"another seed is refused: {r.returncode} {r.stderr[-300:]}")
    shutil.rmtree("out")
    shutil.rmtree("out.stages", True)


def disk():
    """Stages take room only while they are needed."""
    chain = "".join(
        f"---\nname: s{i + 1}\nmerge_method: linear\nmodels:\n"
        f"- {{model: s{i}, parameters: {{weight: 0.5}}}}\n"
        f"- {{model: ft-code, parameters: {{weight: 0.5}}}}\n"
        for i in range(5))
    write("chain.yml", "name: s0\nmerge_method: passthrough\n"
          "models: [{model: base}]\n" + chain)
    p = run_json(TVMERGE, "plan", "chain.yml", "out", "--json")
    one = p["bytes_written"] / 6
    check(2 * one < p["peak_disk_bytes"] < 3.5 * one,
          f"peak {p['peak_disk_bytes']} of six results of {one}")
    quota = str(p["peak_disk_bytes"])
    # However much is missing, the number is the one of all documents.
    for small in ("100KB", str(p["bytes_written"] // 4)):
        r = run(TVMERGE, "plan", "chain.yml", "out", "--quota", small,
                code=5)
        check("together need " in r.stderr and f"({quota} bytes)" in r.stderr
              and r.stderr.count("error:") == 1, f"quota {small}: {r.stderr}")
    r = run(TVMERGE, "run", "chain.yml", "out", "--quota",
            str(p["peak_disk_bytes"] - 1))
    check(r.returncode == 5 and "stages" in r.stderr and
          not os.path.exists("out.stages"), f"quota: {r.stderr[-300:]}")
    child = subprocess.Popen([TVMERGE, "run", "chain.yml", "out", "-q",
                              "--quota", quota])
    most = 0
    while child.poll() is None:
        used = 0
        for top in ("out", "out.stages"):
            for d, _, names in os.walk(top):
                for n in names:
                    try:
                        used += os.stat(os.path.join(d, n)).st_blocks * 512
                    except OSError:
                        pass
        most = max(most, used)
        time.sleep(0.005)
    check(child.returncode == 0 and most <= int(quota) + (64 << 10),
          f"at one moment {most} bytes of {quota}")
    shutil.rmtree("out")


def kept():
    """--intermediate-dir: stages stay, and are not made again."""
    write("all.yml", *DOCS.values())
    run(TVMERGE, "run", "all.yml", "out", "--intermediate-dir", "mid", code=0)
    check(sorted(os.listdir("mid")) == ["first", "second", "third"],
          f"kept {os.listdir('mid')}")
    before = sizes("mid")
    shutil.rmtree("out")
    write("all.yml", *list(DOCS.values())[:3],
          DOCS[""].replace("0.7", "0.6"))
    r = run_json(TVMERGE, "run", "all.yml", "out", "--intermediate-dir", "mid",
                 "--json")
    check(sizes("mid") == before and
          not any(d["made"] for d in r["documents"]), "stages are used again")
    # Killed between a stage's tvmerge.json and its config.json, which is the
    # last thing that a merge adds.
    os.remove("mid/third/config.json")
    s = run_json(TVMERGE, "status", "mid/third", "--json")
    check(s["state"] == "unfinished", f"no config.json yet: {s}")
    r = run_json(TVMERGE, "run", "all.yml", "out2", "--intermediate-dir", "mid",
                 "--json")
    check(os.path.exists("mid/third/config.json") and
          os.path.exists("out2/config.json"), "the stage gets its config.json")
    shutil.rmtree("out2")
    # A stage that is another one now is refused, not overwritten.
    write("all.yml", DOCS["first"].replace("0.5", "0.4", 1),
          *list(DOCS.values())[1:])
    r = run(TVMERGE, "run", "all.yml", "out2", "--intermediate-dir", "mid")
    check(r.returncode == 4 and "first" in r.stderr, f"{r.stderr[-300:]}")
    run(TVMERGE, "run", "all.yml", "out2", "--intermediate-dir", "mid",
        "--force", code=0)
    shutil.rmtree("mid")
    shutil.rmtree("out")
    shutil.rmtree("out2")


def killed(want, n):
    rng = random.Random(5)
    write("all.yml", *DOCS.values())
    argv = [TVMERGE, "run", "all.yml", "out", "--random-seed", "7", "-q"]
    env = dict(os.environ, TV_GROUP_BYTES="100000")
    t0 = time.monotonic()
    subprocess.run(argv, env=env, check=True)
    whole = time.monotonic() - t0
    for _ in range(n):
        shutil.rmtree("out")
        for _ in range(2):
            child = subprocess.Popen(argv, env=env)
            try:
                child.wait(rng.random() * whole)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.wait()
                check(not os.path.exists("out/config.json") or
                      os.path.exists("out/tvmerge.json"),
                      "no config.json in a half result")
        r = run_json(*argv[:-1], "--json", env={"TV_GROUP_BYTES": "100000"})
        check(r["digest"] == want and not os.path.exists("out.stages"),
              "killed and resumed: the same bytes, no stages")


WRONG = {  # what: documents, exit code, what the message says
    "a circle": (["name: a\nmerge_method: passthrough\nmodels: "
                  "[{model: b}]\n",
                  "name: b\nmerge_method: passthrough\nmodels: "
                  "[{model: a}]\n",
                  "merge_method: passthrough\nmodels: [{model: b}]\n"],
                 2, ["w.yml:1:7", "w.yml:5:7", "own result"]),
    "itself": (["name: a\nmerge_method: passthrough\nmodels: "
                "[{model: a}]\n", "merge_method: passthrough\nmodels: "
                "[{model: a}]\n"], 2, ["w.yml:1:7"]),
    "one name twice": (["name: a\nmerge_method: passthrough\nmodels: "
                        "[{model: base}]\n"] * 2 +
                       ["merge_method: passthrough\nmodels: [{model: a}]\n"],
                       2, ["w.yml:5:7", "line 1"]),
    "two outputs": (["merge_method: passthrough\nmodels: [{model: base}]\n"] *
                    2, 2, ["w.yml:4:1"]),
    "a bad name": (["name: ../a\nmerge_method: passthrough\nmodels: "
                    "[{model: base}]\n",
                    "merge_method: passthrough\nmodels: [{model: base}]\n"],
                   2, ["w.yml:1:7", "letters"]),
    "errors in all of them":
        (["name: a\nmerge_method: linera\nmodels: [{model: base}]\n",
          "name: b\nmerge_method: linear\nmodels:\n- {model: base, parameters: "
          "{weight: x}}\n",
          "merge_method: ties\nmodels:\n- {model: nope, parameters: "
          "{weight: 1}}\n"], 2, ["w.yml:2:15", "w.yml:8:38", "nope"]),
    "a range that a stage does not have":
        (["name: a\nmerge_method: passthrough\nslices:\n- sources:\n"
          "  - {model: base, layer_range: [0, 3]}\n",
          "merge_method: passthrough\nslices:\n- sources:\n"
          "  - {model: a, layer_range: [0, 4]}\n"], 4, ["w.yml:10:", "3 layers"]),
}


def multi():
    """tools/mergekit-multi: mergekit's command line for the same."""
    tool = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..",
                        "tools", "mergekit-multi")
    env = {"TVMERGE": TVMERGE}
    write("named.yml", DOCS["first"], DOCS["second"])
    run(tool, "-I", "st", "named.yml", "--random-seed", "7", "--quiet",
        code=0, env=env)
    check(sorted(os.listdir("st")) == ["first", "second"] and
          os.path.exists("st/second/config.json"), f"{os.listdir('st')}")
    write("all.yml", *DOCS.values())
    r = run(tool, "all.yml", "-I", "st", env=env)
    check(r.returncode == 2 and "--out-path" in r.stderr, r.stderr[-300:])
    before = sizes("st/first")
    run(tool, "all.yml", "--intermediate-dir=st", "--out-path", "final",
        "--lazy", "--quiet", "--random-seed", "7", code=0, env=env)
    check(sizes("st/first") == before and
          os.path.exists("final/config.json") and
          sorted(os.listdir("st")) == ["first", "second", "third"],
          "mergekit-multi: all in their places")
    shutil.rmtree("st")
    shutil.rmtree("final")


def wrong():
    for what, (docs, code, words) in WRONG.items():
        write("w.yml", *docs)
        for command in ("plan", "run"):
            r = run(TVMERGE, command, "w.yml", "out")
            check(r.returncode == code, f"{what}: {command} exits "
                  f"{r.returncode}: {r.stderr[-300:]}")
            for w in words:
                check(w in r.stderr, f"{what}: no '{w}' in {r.stderr[-500:]}")
            check(not os.path.exists("out") and
                  not os.path.exists("out.stages"), f"{what}: leaves something")
    # A stage that nobody uses is no error.
    write("w.yml", DOCS["first"], "merge_method: passthrough\n"
          "models: [{model: base}]\n")
    r = run(TVMERGE, "run", "w.yml", "out", code=0)
    check("no other document uses 'first'" in r.stderr and
          not os.path.exists("out.stages"), r.stderr[-300:])
    shutil.rmtree("out")
    # How far: OUT itself comes last.
    write("one.yml", DOCS["first"])
    os.mkdir("out.stages")
    run(TVMERGE, "run", "one.yml", "out.stages/first", code=0)
    for out in ("out", "out/"):
        r = run_json(TVMERGE, "status", out, "--json")
        check(r["state"] == "unfinished" and
              [(d["name"], d["state"]) for d in r["documents"]] ==
              [("first", "finished")], f"status of documents: {r}")
        r = run(TVMERGE, "status", out, code=0)
        check("document first: finished" in r.stdout, r.stdout)
    shutil.rmtree("out.stages")
    r = run(TVMERGE, "status", "out")
    check(r.returncode == 10 and "holds no merge" in r.stderr, r.stderr[-300:])
    # OUT by its dots: the stages stand beside it all the same.
    here = os.getcwd()
    write("dots.yml", *(re.sub(r"(model|path): (base|ft-code|ft-prose|"
                               r"lora-jargon)", rf"\1: {here}/\2", d)
                        for d in DOCS.values()))
    for out in (".", "./", "../in/."):
        os.mkdir("in")
        r = run(TVMERGE, "run", "../dots.yml", out, cwd="in")
        check(r.returncode == 0 and not os.path.exists("in.stages"),
              f"OUT {out}: {r.returncode} {r.stderr[-300:]}")
        check("config.json" in os.listdir("in") and
              not [n for n in os.listdir("in") if "stages" in n],
              f"OUT {out}: {os.listdir('in')}")
        shutil.rmtree("in")
    multi()
    # A directory that is not ours stays.
    write("all.yml", *DOCS.values())
    os.makedirs("out.stages/second")
    with open("out.stages/second/mine", "w") as f:
        f.write("x")
    r = run(TVMERGE, "run", "all.yml", "out")
    check(r.returncode == 4 and os.path.exists("out.stages/second/mine"),
          f"{r.returncode}: {r.stderr[-300:]}")
    shutil.rmtree("out.stages")
    # Another merge in OUT is refused before any stage is made.
    run(TVMERGE, "run", "all.yml", "out", code=0)
    write("all.yml", DOCS["first"].replace("0.5", "0.4", 1),
          *list(DOCS.values())[1:])
    r = run(TVMERGE, "run", "all.yml", "out")
    check(r.returncode == 4 and not os.path.exists("out.stages"),
          f"changed: {r.returncode}: {r.stderr[-300:]}")
    shutil.rmtree("out")
    # Two without a name: said once, without a warning about no name.
    write("all.yml", DOCS[""], DOCS[""])
    r = run(TVMERGE, "plan", "all.yml")
    check(r.returncode == 2 and "(null)" not in r.stderr, r.stderr[-300:])


def numerics():
    """The result of another BLAS core type is taken when that is accepted."""
    write("tsv.yml", DOCS["first"], "merge_method: iso_c\nbase_model: first\n"
          "models:\n- model: ft-code\n- model: ft-prose\n")
    env = {"OPENBLAS_CORETYPE": "Nehalem"}
    run_json(TVMERGE, "run", "tsv.yml", "out", "--json")
    run_json(TVMERGE, "run", "tsv.yml", "other", "--json", env=env)
    with open("out/tvmerge.json") as a, open("other/tvmerge.json") as b:
        if json.load(a)["identity"]["blas"] == \
                json.load(b)["identity"]["blas"]:
            return
    r = run(TVMERGE, "run", "tsv.yml", "out", env=env)
    check(r.returncode == 4 and "--accept-numerics" in r.stderr, r.stderr)
    r = run_json(TVMERGE, "run", "tsv.yml", "out", "--accept-numerics",
                 "--json", env=env)
    check(r["already_done"], "not taken as it is")
    r = run(TVMERGE, "run", "tsv.yml", "out", "--accept-numerics",
            "--random-seed", "8", env=env)
    check(r.returncode == 4 and "seed" in r.stderr, r.stderr)
    shutil.rmtree("out")


def main():
    fill(os.path.join(temp(), "w"))
    want = one_by_one()
    together(want)
    disk()
    kept()
    killed(want, 4)
    shutil.rmtree("out")
    numerics()
    wrong()
    finish("documents")


main()
