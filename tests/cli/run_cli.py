#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""run_cli.py BIN_DIR DATA CASE

Replays a transcript: commands with the stdout, stderr and exit status they
must have. One command per `$ ` line, run by sh in a fresh directory where
$DATA names the test data and the programs are on PATH. Then, in any order:

    text        a line of stdout
    2> text     a line of stderr
    => N        the exit status, 0 when not given

`<*>` matches any text within a line, `<n>` a number, `<x>` hexadecimal digits;
a line `...` matches any lines, `<>` is an empty one. `#` begins a comment.
"""
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile

WILD = {"<*>": ".*", "<n>": r"[-+0-9.,e]+", "<x>": "[0-9a-f]+", "<>": ""}


def pattern(lines):
    out = []
    for line in lines:
        if line == "...":
            out.append(r"(?:[^\n]*\n)*?")
            continue
        parts = re.split("(<\\*>|<n>|<x>|<>)", line)
        out.append("".join(WILD.get(p, re.escape(p)) for p in parts) + r"\n")
    return "".join(out)


def steps(path):
    step = None
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            line = line.rstrip("\n")
            if line.startswith("#"):
                continue
            if line.startswith("$ "):
                if step:
                    yield step
                step = {"line": number, "sh": line[2:], "out": [], "err": [],
                        "exit": 0}
            elif step is None:
                if line:
                    sys.exit(f"{path}:{number}: text before the first command")
            elif line.startswith("=> "):
                step["exit"] = int(line[3:])
            elif line.startswith("2> "):
                step["err"].append(line[3:])
            elif line:
                step["out"].append(line)
    if step:
        yield step


def differs(what, expected, actual):
    if re.fullmatch(pattern(expected), actual):
        return False
    print(f"  {what} differs:")
    for line in difflib.unified_diff(expected, actual.splitlines(), "expected",
                                     "actual", lineterm=""):
        print(f"    {line}")
    return True


def main():
    bin_dir, data, case = map(os.path.abspath, sys.argv[1:4])
    work = tempfile.mkdtemp(prefix="tv-cli-")
    # What takes long on a busy machine must not show it.
    env = {"PATH": bin_dir + os.pathsep + os.environ["PATH"], "DATA": data,
           "TV_PROGRESS": "none",
           "HOME": work, "LC_ALL": "C", "TERM": "dumb"}
    for key in ("FAKE_CUDA", "ASAN_OPTIONS", "UBSAN_OPTIONS", "LSAN_OPTIONS",
                "TSAN_OPTIONS"):
        if key in os.environ:
            env[key] = os.environ[key]
    failed = count = 0
    try:
        for step in steps(case):
            r = subprocess.run(["sh", "-c", step["sh"]], cwd=work, env=env,
                               stdin=subprocess.DEVNULL, capture_output=True,
                               timeout=240)
            out = r.stdout.decode("utf-8", "backslashreplace")
            err = r.stderr.decode("utf-8", "backslashreplace")
            bad = r.returncode != step["exit"]
            if bad:
                print(f"  exit status {r.returncode}, expected {step['exit']}")
            bad |= differs("stdout", step["out"], out)
            bad |= differs("stderr", step["err"], err)
            if bad:
                print(f"FAIL {case}:{step['line']}: {step['sh']}")
            failed += bad
            count += 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{os.path.basename(case)}: {count} commands, {failed} failed")
    sys.exit(1 if failed or not count else 0)


if __name__ == "__main__":
    main()
