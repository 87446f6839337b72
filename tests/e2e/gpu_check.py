#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gpu_check.py TOOL BUILD_DIR

tools/gpu-check to its end on the emulated device, but for what is in the suite
anyway (kernels, goldens): no step fails or is left out, every target is named
and none is held to, and the report says that it is of an emulation.
"""
import os
import re
import sys

from common import check, finish, run, temp

TOOL, BUILD = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])


def main():
    report = os.path.join(temp(), "report")
    r = run(TOOL, "--emulate", "--build", BUILD, "--steps",
            "merges evaluation times", "--report", report, code=0)
    with open(report) as f:
        text = f.read()
    print(text)
    check("FAILED" not in text and "skipped" not in text, "nothing fails")
    check(len(re.findall(r"^ok ", text, re.M)) == 12, "all steps run")
    check(text.count("EMULATED: no GPU") == 2, "the report is marked")
    check("== 0 failed" in text, "and ends")
    targets = re.findall(r"target (.*): .*, not held to it: emulated", text)
    check(len(targets) == 6 and "reached" not in text, f"targets: {targets}")
    check(r.stdout == text, "the report is what was shown")
    # Without a device nothing is claimed.
    r = run(TOOL, "--build", BUILD, "--steps", "merges", code=77,
            env={"FAKE_CUDA_DEVICES": "0",
                 "LD_LIBRARY_PATH": f"{BUILD}/tests/support/fake_cuda"})
    check("nothing was checked" in r.stdout, "no device: said so")
    check(len(re.findall("^skipped .*: no CUDA device$", r.stdout, re.M)) == 5,
          "no device: every step is skipped")
    finish("gpu_check")


main()
