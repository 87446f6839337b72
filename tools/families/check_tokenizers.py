#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Property test: tveval tokenises random mixed UTF-8 as `tokenizers` does.

    pip install tokenizers
    check_tokenizers.py TVEVAL DIR [BYTES [SEED]]

DIR holds NAME.json files (make_tokenizers.py). Every one gets its own text of
about BYTES bytes (default 1000000); exit status 1 when any id differs.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time

from make_tokenizers import SPECS, mixed
from tokenizers import Tokenizer


def main():
    tveval, where = sys.argv[1:3]
    n = int(sys.argv[3]) if len(sys.argv) > 3 else 1000000
    rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
    failed = 0
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "text")
        for name in SPECS:
            text = mixed(rng, n // 2)
            with open(path, "w", encoding="utf-8", newline="") as f:
                f.write(text)
            want = Tokenizer.from_file(f"{where}/{name}.json").encode(
                text, add_special_tokens=False).ids
            start = time.time()
            run = subprocess.run(
                [tveval, "tokenize", "--tokenizer", f"{where}/{name}.json", where,
                 "--text", path, "--json"], capture_output=True, check=False)
            seconds = time.time() - start
            got = json.loads(run.stdout)["ids"] if run.returncode == 0 else None
            ok = got == want
            failed += not ok
            print(f"{name}: {len(text.encode())} bytes, {len(want)} ids,",
                  "same" if ok else "DIFFERENT " + run.stderr.decode()[:200],
                  f"({seconds:.2f} s)")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
