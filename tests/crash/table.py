#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""table.py FILE: the rows that the drivers left in FILE, summed by fault."""
import json
import sys

rows = {}
for line in open(sys.argv[1]):
    r = json.loads(line)
    row = rows.setdefault(r["fault"], {"fired": 0, "outcomes": {},
                                       "losses": 0})
    row["fired"] += r["fired"]
    row["losses"] += r["losses"]
    for k, v in r["outcomes"].items():
        row["outcomes"][k] = row["outcomes"].get(k, 0) + v
print("| fault | fired | outcomes | losses |\n|---|---|---|---|")
for fault, row in sorted(rows.items()):
    what = ", ".join(f"{v} {k}" for k, v in
                     sorted(row["outcomes"].items(), key=lambda x: -x[1]))
    print(f"| {fault} | {row['fired']} | {what} | {row['losses']} |")
print(f"| all | {sum(r['fired'] for r in rows.values())} | | "
      f"{sum(r['losses'] for r in rows.values())} |")
