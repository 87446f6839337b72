#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cli_bigstore.py BIN_DIR DATA

Stores that no transcript can make: an object of more tensors than one step of
removal takes, and trees of LMDB that are damaged.
"""
import os
import random
import shutil
import subprocess

from cli_common import (TVSTORE, check, document, finish, path, run,
                        write_safetensors)

# 300 different contents: one step of removal drops 256.
many = path("many")
os.makedirs(many)
rng = random.Random(1)
write_safetensors(os.path.join(many, "model.safetensors"), {
    f"model.layers.{i}.w": ("U8", [256], rng.randbytes(256))
    for i in range(300)})
store = path("s")
run(TVSTORE, "init", store, "-q")
for _ in range(2):
    run(TVSTORE, "import", store, "many", many, "-q")
    run(TVSTORE, "rm", store, "many", "-q")
    check(document(TVSTORE, "ls", store)["objects"] == [], "rm: it is there")
check(document(TVSTORE, "stat", store)["kinds"]["weights"] == 0,
      "rm: bytes are left")
run(TVSTORE, "rm", store, "many", code=10)

# gc on damaged pages says so and does not die of it.
run(TVSTORE, "import", store, "many", many, "-q")
run(TVSTORE, "gc", store, "-q")
data = os.path.join(store, "data.mdb")
with open(data, "rb") as f:
    good = f.read()
PAGE = 4096
seen = set()
for i in range(60):
    bad = bytearray(good)
    for page in range(2, len(good) // PAGE):
        at = page * PAGE + rng.randrange(64)
        if rng.random() < 0.3:
            bad[at] ^= 1 << rng.randrange(8)
    copy = path("copy")
    shutil.rmtree(copy, True)
    os.makedirs(copy)
    with open(os.path.join(copy, "data.mdb"), "wb") as f:
        f.write(bad)
    r = subprocess.run([TVSTORE, "gc", copy], capture_output=True, timeout=60)
    seen.add(r.returncode)
    check(r.returncode in (0, 1, 4, 10, 12),
          f"gc {i}: exit {r.returncode} {r.stderr[-200:]}")
check(12 in seen, f"gc of damaged trees: {seen}")
finish()
