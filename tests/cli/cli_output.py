#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""cli_output.py BIN_DIR DATA

Where output goes, and what happens when it cannot: closed pipes, full disks,
closed descriptors, colours, terminals, hostile names, progress styles.
"""
import errno
import json
import os
import pty
import subprocess

from cli_common import (DATA, TVMERGE, TVSTORE, check, finish, make_model,
                        path, run, write, write_safetensors)

store = path("s")
run(TVSTORE, "init", store, "-q")
run(TVSTORE, "import", store, "base", os.path.join(DATA, "base"), "-q")

# ---- stdout that nobody reads, or that is full --------------------------------------
embed = "base/model.embed_tokens.weight"
p = subprocess.Popen([TVSTORE, "cat", store, embed], stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE)
p.stdout.read(10)
p.stdout.close()
err = p.stderr.read()
check(p.wait() == 0 and err == b"", f"closed pipe: {p.returncode} {err}")
if os.path.exists("/dev/full"):
    with open("/dev/full", "wb") as full:
        for args in (["ls", store], ["ls", store, "--json"], ["--help"],
                     ["cat", store, embed]):
            r = run(TVSTORE, *args, code=1, stdout=full)
            check(b"standard output" in r.stderr, f"full disk: {r.stderr}")
r = subprocess.run(["sh", "-c", '"$0" ls "$1" >&-', TVSTORE, store],
                   capture_output=True)
check(r.returncode == 1 and b"standard output" in r.stderr,
      f"stdout closed: {r.returncode} {r.stderr}")
r = subprocess.run(["sh", "-c", '"$0" import "$1" code "$2" >&- 2>&- <&-',
                    TVSTORE, store, os.path.join(DATA, "ft-code")])
check(r.returncode == 0, f"all closed: {r.returncode}")
run(TVSTORE, "verify", store, "-q")

# ---- names that try things ------------------------------------------------------------
evil = "a\x1b[2Jb\nfake line\x07\u202ec"
write_safetensors(path("evil.safetensors"), {evil: ("U8", [1], b"x")})
run(TVSTORE, "import", store, "evil", path("evil.safetensors"))
for args in (["ls", store, "evil"], ["ls", store, "evil", "-q"],
             ["diff", store, "store:evil", "store:base"],
             ["info", store, f"evil/{evil}"]):
    r = subprocess.run([TVSTORE, *args], capture_output=True)
    out = r.stdout + r.stderr
    check(b"\x1b" not in out and b"\x07" not in out
          and "\u202e".encode() not in out, f"{args[0]}: controls get through")
    check(not any(x.startswith(b"fake") for x in out.splitlines()),
          f"{args[0]}: a name breaks a line")
doc = json.loads(run(TVSTORE, "ls", store, "evil", "--json").stdout)
check(doc["tensors"][0]["name"] == evil, "json: the true name")
r = subprocess.run([os.fsencode(TVSTORE), b"ls", os.fsencode(store),
                    b"bad\xff\x1bname", b"--json"], capture_output=True)
check(r.returncode in (2, 10) and "error" in json.loads(r.stderr.decode()),
      f"json error with bytes that are no UTF-8: {r.stderr!r}")


# ---- colours and terminals --------------------------------------------------------------
def on_terminal(argv, env):
    """Runs with stderr on a terminal; gives status and what it showed."""
    master, slave = pty.openpty()
    e = {"PATH": os.environ["PATH"], "TERM": "xterm", **env}
    p = subprocess.Popen(argv, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=slave, env=e)
    os.close(slave)
    shown = b""
    while True:
        try:
            more = os.read(master, 65536)
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            more = b""
        if not more:
            break
        shown += more
    os.close(master)
    return p.wait(), shown


wrong = [TVSTORE, "ls", path("nothing")]
RED = b"\x1b[1;31m"
check(RED in on_terminal(wrong, {})[1], "colour on a terminal")
check(RED not in on_terminal(wrong, {"NO_COLOR": "1"})[1], "NO_COLOR")
check(RED not in on_terminal(wrong, {"TERM": "dumb"})[1], "TERM=dumb")
check(RED not in on_terminal(wrong + ["--color=never"], {})[1], "never")
check(RED in run(*wrong, "--color=always", code=10).stderr, "always")
check(RED not in run(*wrong, code=10).stderr, "no colour in a pipe")

# ---- progress -----------------------------------------------------------------------------
a = make_model("a", 48, 1 << 19, 1)
b = make_model("b", 48, 1 << 19, 2)
recipe = write("r.yml", f"""merge_method: ties
base_model: {a}
models:
- model: {b}
  parameters: {{weight: 0.5, density: 0.5}}
""")
slow = {"TV_CPU": "ref"}
status, shown = on_terminal([TVMERGE, recipe, path("o1"), "--threads", "1"],
                            slow)
check(status == 0, f"bar: exit {status}")
check(b"\r" in shown and b"\x1b[K" in shown and b"/48 tensors" in shown
      and b"MB/s" in shown and b"eta" in shown and b"rss" in shown,
      f"bar: {shown[:300]!r}")
r = run(TVMERGE, recipe, path("o2"), "--threads", "1", env=slow)
check(b"\r" not in r.stderr and b"\x1b" not in r.stderr,
      "no bar without a terminal")
r = run(TVMERGE, recipe, path("o3"), "--progress=json", "-q", env=slow)
lines = [json.loads(x) for x in r.stderr.splitlines() if x[:1] == b"{"]
check(lines and lines[-1]["event"] == "progress"
      and lines[-1]["items_done"] == lines[-1]["items_total"] == 48
      and lines[-1]["bytes_done"] == lines[-1]["bytes_total"],
      f"json progress: {lines[-1:]}")
r = run(TVMERGE, recipe, path("o4"), env={"TV_PROGRESS": "json", **slow})
check(b'"event"' in r.stderr, "TV_PROGRESS")
r = run(TVMERGE, recipe, path("o5"), "--json", env=slow)
check(r.stderr == b"" and json.loads(r.stdout)["n_tensors"] == 48,
      f"--json: stderr is empty: {r.stderr[:200]!r}")
recipe = write("q.yml", "merge_method: passthrough\nmodels:\n"
               f"- model: {DATA}/base\n")
r = run(TVMERGE, recipe, path("o6"), "-q")
check(r.stderr == b"" and r.stdout == b"", "-q is quiet")
finish()
