#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""grammar.py BIN_DIR QUICKSTART

What a recipe may say and what not: values out of bounds, named once and with
their place; dtypes; models taken for another architecture. And README's table
of methods.
"""
import json
import os
import re
import shutil
import sys

from common import check, finish, run_json, temp

BIN, QUICK = map(os.path.abspath, sys.argv[1:3])
TVMERGE = os.path.join(BIN, "tvmerge")
README = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                      "../../README.md")


def save(text):
    with open("r.yml", "w", encoding="utf-8") as f:
        f.write(text)
    return "r.yml"


def plan(text, *options, code=0, what=""):
    with open("r.yml", "w", encoding="utf-8") as f:
        f.write(text)
    p = run_json(TVMERGE, "plan", "r.yml", "--json", *options, code=None)
    errors = [x for x in p["problems"] if x["severity"] == "error"]
    check(p["ok"] == (code == 0) and bool(errors) == (code != 0),
          f"{what or text}: {errors}")
    return p, errors


def place(text, part):
    """file:line:col of a part of a recipe."""
    at = text.index(part)
    line = text.count("\n", 0, at) + 1
    return f"r.yml:{line}:{at - (text.rfind(chr(10), 0, at) + 1) + 1}"


# ---- bounds -------------------------------------------------------------------

WRONG = {  # method: parameters that no tensor may have
    "ties": {"density": ("-0.1", "1.5", "53")},
    "dare_ties": {"density": ("-0.1", "1.01")},
    "dare_linear": {"density": ("2",)},
    "breadcrumbs": {"gamma": ("-0.01", "1.5"), "density": ("1.5",)},
    "breadcrumbs_ties": {"gamma": ("2",)},
    "della": {"density": ("-0.5", "1.5"), "epsilon": ("-0.1", "1.5")},
    "della_linear": {"epsilon": ("-0.1",)},
    "multislerp": {"eps": ("-1e-9",)},
    "karcher": {"max_iter": ("-1", "1000001"), "tol": ("-1e-5",)},
    "sce": {"select_topk": ("-0.1", "1.1")},
    "ram": {"epsilon": ("-1e-5",)},
    "ramplus_tl": {"epsilon": ("-1",), "alpha": ("-0.2",)},
    "nearswap": {"t": ("-0.001",)},
    "task_arithmetic": {"damping": ("0", "1001"), "cg_steps": ("0", "1001")},
    "wudi": {"regularization": ("0",)},
    "consensus": {"agree": ("-1",), "mask_lambda": ("-0.4",)},
}


def recipe_of(method, parameter, value):
    base = "" if method in ("karcher", "multislerp") else "base_model: base\n"
    other = "" if method in ("nearswap",) else \
        "- model: ft-prose\n  parameters: {weight: 0.5}\n"
    return (f"merge_method: {method}\n{base}models:\n- model: ft-code\n"
            f"  parameters: {{weight: 0.5}}\n{other}parameters:\n"
            f"  {parameter}: {value}\n")


def bounds():
    for method, parameters in WRONG.items():
        for name, values in parameters.items():
            for value in values:
                text = recipe_of(method, name, value)
                p, errors = plan(text, code=2, what=f"{method} {name}={value}")
                check(len(errors) == 1 and name in errors[0]["message"] and
                      errors[0]["where"] == place(text, f"{value}\n"),
                      f"{method} {name}={value}: {errors}")
                for inside in (f"[0.5, {value}]",
                               f"[{{filter: mlp, value: {value}}}]"):
                    p, errors = plan(recipe_of(method, name, inside), code=2,
                                     what=f"{method} {name}={inside}")
                    check(any(name in e["message"] and
                              e["where"].startswith("r.yml:")
                              for e in errors), f"{inside}: {errors}")
    # The ends belong to it, and mergekit's own values run.
    for method, name, value in (
            ("ties", "density", "0"), ("ties", "density", "1"),
            ("della", "density", "1"), ("karcher", "max_iter", "0"),
            ("karcher", "tol", "0"), ("sce", "select_topk", "0"),
            ("ram", "epsilon", "0"), ("nearswap", "t", "0"),
            ("breadcrumbs", "gamma", "0")):
        plan(recipe_of(method, name, value), what=f"{method} {name}={value}")


def together():
    """What two parameters make wrong together: once, with a place."""
    text = ("merge_method: della\nbase_model: base\nmodels:\n"
            "- model: ft-code\n  parameters: {weight: 1, density: 0.9}\n"
            "- model: ft-prose\n  parameters: {weight: 1, density: 0.05}\n")
    p, errors = plan(text, code=2)
    check([e["where"] for e in errors] ==
          [place(text, "0.9}"), place(text, "0.05}")], f"della: {errors}")
    text = ("merge_method: linear\nmodels:\n"
            "- {model: base, parameters: {weight: 1}}\n"
            "- {model: ft-code, parameters: {weight: -1}}\n")
    p, errors = plan(text, code=2)
    check([e["where"] for e in errors] == [place(text, "1}}")],
          f"weights that cancel: {errors}")
    # All of them at once, in the order of the recipe.
    text = ("merge_method: ties\nbase_model: base\nmodels:\n"
            "- model: ft-code\n  parameters: {weight: x, density: 1.5}\n"
            "- model: nothing\n  parameters: {density: -1}\n"
            "dtype: bf16\nparameters: {normalize: 3}\n")
    p, errors = plan(text, code=2)
    for part in ("x,", "1.5}", "nothing", "-1}", "bf16", "3}"):
        check(place(text, part) in [e["where"] for e in errors],
              f"{part} is not among {errors}")


LINEAR = ("merge_method: linear\nmodels:\n"
          "- {model: base, parameters: {weight: 1}}\n"
          "- {model: ft-code, parameters: {weight: 1}}\n")


def dtypes():
    for name, stored in (("float16", "F16"), ("bfloat16", "BF16"),
                         ("float32", "F32"), ("float64", "F32")):
        for spelt in (name, "torch." + name):
            for key in ("dtype", "out_dtype"):
                text = LINEAR + f"{key}: {spelt}\n"
                p, _ = plan(text, what=f"{key} {spelt}")
                check({t["dtype"] for t in p["tensors"]} == {stored},
                      f"{key} {spelt}: {p['tensors'][0]}")
                said = [x["where"] for x in p["problems"]
                        if "stored as float32" in x["message"]]
                check(said == ([place(text, spelt)] if name == "float64"
                               else []), f"{key} {spelt}: {p['problems']}")
    # Arithmetic in float64, another dtype to store: nothing to say.
    p, _ = plan(LINEAR + "dtype: float64\nout_dtype: bfloat16\n")
    check({t["dtype"] for t in p["tensors"]} == {"BF16"} and
          not any("float64" in x["message"] for x in p["problems"]),
          f"{p['problems']}")
    p, _ = plan(LINEAR + "dtype: float64\n", "--compat", "mergekit")
    check(any("does not reproduce" in x["message"] for x in p["problems"]),
          f"{p['problems']}")
    _, errors = plan(LINEAR + "dtype: int64\n", code=4)
    check(errors[0]["where"] == "r.yml:5:8" and
          "whole number" in errors[0]["message"], f"{errors}")
    for name, like in (("bf16", "bfloat16"), ("fp64", "float64"),
                       ("torch.half", "float16"), ("floot32", "float32")):
        _, errors = plan(LINEAR + f"out_dtype: {name}\n", code=2)
        check(f"'{like}'" in errors[0]["message"], f"{name}: {errors}")


def overrides():
    """override_architecture: another class decides what the tensors are."""
    shutil.copytree(os.path.join(QUICK, "ft-code"), "other")
    with open("other/config.json") as f:
        config = json.load(f)
    config.update(architectures=["StrangeForCausalLM"], model_type="strange")
    os.chmod("other/config.json", 0o644)
    with open("other/config.json", "w") as f:
        json.dump(config, f)
    with open("base/config.json") as f:
        known = json.load(f)["architectures"][0]
    text = ("merge_method: linear\nmodels:\n"
            "- {model: base, parameters: {weight: 1}}\n"
            "- {model: %s, parameters: {weight: 1}}\n")
    as_known = "{model: other, override_architecture: %s}" % known
    want = run_json(TVMERGE, "run", save(text % "ft-code"), "want", "--json")
    got = run_json(TVMERGE, "run", save(text % as_known), "got", "--json")
    check(want["digest"] == got["digest"], "the same merge")
    # The donor's class becomes the output's.
    run_json(TVMERGE, "run", save(
        "merge_method: passthrough\nmodels:\n- model: " + as_known +
        "\n"), "alone", "--json")
    with open("alone/config.json") as f:
        out = json.load(f)
    check(out == dict(config, architectures=[known]), f"config {out}")
    _, errors = plan(text % as_known + "base_model: {model: other, "
                     "override_architecture: X}\n", code=2)
    check(errors[0]["where"].startswith("r.yml:5:") and
          "elsewhere" in errors[0]["message"], f"{errors}")


def documented():
    """README's table of methods says what the program says."""
    with open(README, encoding="utf-8") as f:
        rows = [[c.strip() for c in line.split("|")[1:-1]]
                for line in f if line.startswith("| `")]
    said = {name: r[1] for r in rows if len(r) == 4
            for name in re.findall(r"`([\w+]+)`", r[0])}
    for m in run_json(TVMERGE, "methods", "--json")["methods"]:
        check(said.get(m["name"], "").startswith(m["base"]),
              f"README says '{said.get(m['name'])}' of the base of "
              f"{m['name']}, 'tvmerge methods' {m['base']}")


def main():
    os.chdir(temp())
    for n in os.listdir(QUICK):
        os.symlink(os.path.join(QUICK, n), n)
    bounds()
    together()
    dtypes()
    overrides()
    documented()
    finish("grammar")


main()
