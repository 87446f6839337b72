#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One bit flips in a store, or in a file that a store links to.

- In the payload of a tensor: `verify` names object and tensor, a merge that
  reads it exits with 12 and names tensor and store, copying it elsewhere does
  not hide it. Every payload byte is as good as another: leaves, headers and
  pages cover all; positions are spread over each tensor.
- Anywhere else in data.mdb (tree pages without checksums of LMDB, records,
  free pages): whatever a command does, it does not give wrong bytes with exit
  0, does not hang, and `verify` reports or the flip changed nothing.
- In a linked file whose checksums are known: the same as in a payload. In its
  header, or with another time of change: exit 12 and the name of the file.
- In what an interrupted merge has finished: going on makes it again.
"""
import json
import os
import random
import shutil
import subprocess

import crashlib
from crashlib import (GROUP, SHARD, Recorder, Table, arguments, check,
                      copy_tree, finish, make_models, read_safetensors, recipe,
                      run, run_json, tree_of, weights_of, work_dir)
from scenarios import World

A = arguments(__doc__, 150)
WORK = work_dir()
MODELS = make_models(os.path.join(WORK, "models"))
STORE = os.path.join(WORK, "store")
COPY = os.path.join(WORK, "copy")
STORED = recipe(os.path.join(WORK, "stored.yml"), MODELS, prefix="store:")
OUT = os.path.join(WORK, "out")
R = Recorder(A.recorder, WORK, WORK)
rng = random.Random(A.seed)
table = Table()
LIMIT = 20 * crashlib.SLOWER  # seconds; LMDB may walk a damaged tree in circles


def flip(path, at, bit):
    """Keeps the time of change: the bit rots, nobody writes."""
    st = os.stat(path)
    with open(path, "r+b") as f:
        f.seek(at)
        b = f.read(1)[0] ^ (1 << bit)
        f.seek(at)
        f.write(bytes([b]))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def fresh_copy():
    shutil.rmtree(COPY, True)
    shutil.copytree(STORE, COPY)
    shutil.rmtree(OUT, True)
    return os.path.join(COPY, "data.mdb")


def attempt(*argv):
    """Exit status, stdout, stderr; None for a command that never ends."""
    try:
        r = subprocess.run([str(a) for a in argv], capture_output=True,
                           text=True, errors="replace", timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return None, "", ""
    return r.returncode, r.stdout, r.stderr


def merge(store, *more):
    shutil.rmtree(OUT, True)
    return attempt(A.tvmerge, "run", STORED, OUT, "--store", store, "--json",
                   "--progress=none", "--threads", "1", *more)


def digest_of(text):
    try:
        return json.loads(text)["digest"]
    except (ValueError, KeyError):
        return None


def verify(store):
    code, out, err = attempt(A.tvstore, "verify", store, "--json")
    try:
        return code, json.loads(out)["problems"]
    except (ValueError, KeyError):
        return code, [{"object": "", "tensor": "", "message": err[-300:]}]


def in_payload(name, tensor, data, at, bit, want):
    """A flip inside the bytes of a tensor."""
    failed = crashlib.failures_now()
    what = f"{name}/{tensor} byte {at} bit {bit}"
    path = fresh_copy()
    for copy in data:
        flip(path, copy + at, bit)
    code, problems = verify(COPY)
    check(code == 12, f"{what}: verify exits {code}")
    check(any(p["object"] == name and p["tensor"] == tensor
              for p in problems), f"{what}: verify says {problems}")
    code, out, err = merge(COPY)
    check(code == 12, f"{what}: merge exits {code}: {err[-300:]}")
    check(tensor in err and "store:" in err,
          f"{what}: merge says {err[-300:]}")
    check(not os.path.exists(os.path.join(OUT, "config.json")),
          f"{what}: a merge of damaged bytes was published")
    if bit == 0:  # who asks for it gets what is there
        code, out, err = merge(COPY, "--no-verify-reads")
        check(code == 0, f"{what}: not skipped: exit {code}: {err[-300:]}")
    code, out, err = attempt(A.tvstore, "export", COPY, name,
                             os.path.join(WORK, "x"))
    check(code == 12, f"{what}: export exits {code}: {err[-200:]}")
    good = crashlib.failures_now() == failed
    table.add("bit flip, payload", "named by verify, merge refused"
              if good else "bad")


def long_value_heads(raw):
    """Flips in what only a writer uses: heads of pages of long values. What no
    writer can open is not as it was written."""
    n = 0
    for page in range(2, len(raw) // 4096):
        head = raw[page * 4096:page * 4096 + 12]
        if head[:8] != page.to_bytes(8, "little") or head[10:] != b"\4\0":
            continue
        flip(fresh_copy(), page * 4096 + 10, 0)
        vcode, problems = verify(COPY)
        code, out, err = attempt(A.tvstore, "rm", COPY, "ft2")
        check(code == vcode and code in (0, 12),
              f"head of page {page}: rm exits {code}, verify {vcode}")
        n += code == 12
        if n == 3:
            return
    check(False, f"only {n} pages of long values")


def anywhere(at, bit, want):
    """A flip in any byte of data.mdb."""
    failed = crashlib.failures_now()
    what = f"data.mdb byte {at} bit {bit}"
    flip(fresh_copy(), at, bit)
    vcode, problems = verify(COPY)
    check(vcode in (0, 12, 10, 4),
          f"{what}: verify exits {vcode}: {problems}")
    code, out, err = merge(COPY)
    wrong = code == 0 and digest_of(out) != want
    check(not wrong, f"{what}: a wrong digest with exit 0")
    if code == 0:
        outcome = "no effect" if vcode == 0 else "found by verify only"
    elif code is None or code < 0:
        # LMDB would not survive a damaged tree: it must not meet one.
        outcome = "hang" if code is None else f"signal {-code}"
        check(False, f"{what}: merge ended with {outcome}; verify exits "
                     f"{vcode}")
    else:
        outcome = f"exit {code}"
        check(code in (1, 4, 10, 12), f"{what}: exit {code}: {err[-200:]}")
        check(vcode != 0, f"{what}: verify finds nothing: {err[-200:]}")
    good = crashlib.failures_now() == failed
    table.add("bit flip, data.mdb", outcome if good else "bad",
              lost=1 if wrong else 0)


def linked_flips(count):
    """Flips in files that a store links to, checksums known or not."""
    store = os.path.join(WORK, "linked")
    models = make_models(os.path.join(WORK, "sources"))
    run(A.tvstore, "init", store, code=0)
    for m in ("base", "ft1", "ft2"):
        run(A.tvstore, "import", store, m, os.path.join(models, m), "--link",
            code=0)
    code, out, err = merge(store)
    want = digest_of(out)
    check(code == 0 and want, f"merge from links: {err}")
    # The first merge has read all of them. One into the store does the same for
    # what is imported again.
    for again in (False, True):
        if again:
            run(A.tvstore, "import", store, "ft1", os.path.join(models, "ft1"),
                "--link", "--force", code=0)
            run(A.tvmerge, "run", STORED, "--into", "m", "--store", store,
                code=0)
        for m in ("base", "ft1", "ft2"):
            for t in run_json(A.tvstore, "ls", store, m, "--json")["tensors"]:
                check(t["checksum"], f"{m}/{t['name']} has no checksum after "
                                     "a merge has read it")
    path = os.path.join(models, "ft1", "model.safetensors")
    with open(path, "rb") as f:
        original = f.read()
    head = 8 + int.from_bytes(original[:8], "little")
    st = os.stat(path)
    for i in range(count):
        failed = crashlib.failures_now()
        where = rng.choice(("payload", "header", "touched"))
        at = rng.randrange(head, len(original)) if where == "payload" else \
            rng.randrange(head)
        what = f"linked file, {where}, byte {at}"
        if where == "touched":
            os.utime(path)
        else:
            flip(path, at, rng.randrange(8))
        if where == "payload":
            # With its task vectors, which are whole, it is not read at all.
            code, out, err = merge(store)
            check(code == 0 and digest_of(out) == want or code == 12,
                  f"{what}: exit {code}, or another digest: {err[-300:]}")
        code, out, err = merge(store, *(
            ["--no-cache"] if where == "payload" else []))
        if where == "payload":
            check(code == 12, f"{what}: exit {code}: {err[-300:]}")
            check("store:ft1" in err, f"{what}: not named: {err[-300:]}")
            code, out, err = attempt(A.tvstore, "export", store, "ft1",
                                     os.path.join(WORK, "x"))
            check(code == 12, f"{what}: export exits {code}: {err[-200:]}")
            vcode, problems = verify(store)
            check(vcode == 12, f"{what}: verify exits {vcode}")
            check(any(p["object"] == "ft1" and p["tensor"]
                      for p in problems), f"{what}: {problems}")
        else:
            check(code == 12, f"{what}: exit {code}: {err[-300:]}")
            check(path in err, f"{what}: the file is not named: {err[-300:]}")
        with open(path, "r+b") as f:
            f.write(original)
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
        good = crashlib.failures_now() == failed
        table.add(f"bit flip, linked {where}",
                  f"exit {code}" if good else "bad")
    code, out, err = merge(store)
    check(code == 0 and digest_of(out) == want,
          f"merge after the file is as it was: {err[-300:]}")


def resumed_flips(count):
    """Flips in tensors that an interrupted merge has finished."""
    out = os.path.join(WORK, "resumed")
    ties = recipe(os.path.join(WORK, "resumed.yml"), MODELS)
    command = [A.tvmerge, "run", ties, out, "--json", "--threads", "1", *SHARD]
    env = {"TV_GROUP_BYTES": GROUP, "TV_PROGRESS": "none"}
    want = json.loads(run(*command, env=env, code=0).stdout)["digest"]
    weights = weights_of(out)
    shutil.rmtree(out)
    calls = R.run(*command, env=env, kill=1 << 40).calls
    fired = 0
    for i in range(6 * count):
        if fired == count:
            break
        failed = crashlib.failures_now()
        shutil.rmtree(out)
        R.run(*command, env=env, kill=calls // 2 + rng.randrange(calls // 3),
              when="before")
        state = os.path.join(out, ".tvmerge")
        journal = os.path.join(state, "journal")
        if not os.path.isdir(journal):
            continue
        saved = os.path.join(WORK, "resumed-saved")
        copy_tree(out, saved)
        r = run(*command, env=env)
        check(r.returncode == 0, f"resume: {r.stderr}")
        n = json.loads(r.stdout)["n_resumed"]
        if n == 0 or json.loads(r.stdout)["already_done"]:
            continue
        copy_tree(saved, out)
        # The journal alone knows which are finished: a byte of every tensor.
        n_flips = 0
        for d in (state, out):
            for f in sorted(os.listdir(d)):
                if not f.endswith(".safetensors"):
                    continue
                for at, size in extents(os.path.join(d, f)):
                    flip(os.path.join(d, f), at + rng.randrange(size),
                         rng.randrange(8))
                    n_flips += 1
        r = run(*command, env=env)
        what = f"{n} finished tensors, {n_flips} flips"
        if check(r.returncode == 0, f"{what}: {r.stderr}"):
            doc = json.loads(r.stdout)
            check(doc["digest"] == want, f"{what}: digest {doc['digest']}")
            check(doc["n_resumed"] == 0, f"{what}: {doc['n_resumed']} resumed")
            check(any(f"{n} tensors" in p["message"]
                      for p in doc["problems"]), f"{what}: {doc}")
        check(weights_of(out) == weights, f"{what}: other bytes")
        good = crashlib.failures_now() == failed
        table.add("bit flip, finished part of a merge",
                  "merged again" if good else "bad",
                  lost=0 if weights_of(out) == weights else 1)
        fired += 1
    check(fired == count, f"only {fired} of {count} merges to go on with")


def piece_flips(count):
    """Flips in side files that lie in pieces, and in what leads to them. Bytes
    of pages that were freed may be hit as well, without any effect."""
    w = World(A, os.path.join(WORK, "world"))
    w.clear()
    for c in w.scenarios["tight"][0] + w.scenarios["tight"][1][:2]:
        run(*c, code=0)
    path = os.path.join(w.store, "data.mdb")
    out = os.path.join(WORK, "exported")
    with open(path, "rb") as f:
        raw = f.read()
    want = {}
    for m in ("base", "m"):
        run(A.tvstore, "export", w.store, m, out, code=0)
        want[m] = tree_of(out)
        shutil.rmtree(out)
    heads = [at for kind in (19, 20) for at in range(0, len(raw), 2)
             if raw[at:at + 4] == bytes((kind, 1, 0, 0))]
    # Pieces that fill a page; heads and last pieces lie in many older leaves.
    full = [at for at in heads if at % 4096 == 16]
    found = 0
    for i in range(count):
        failed = crashlib.failures_now()
        head = rng.choice(heads if i % 4 == 0 else full)
        n = 16 + int.from_bytes(raw[head + 4:head + 8], "little")
        at, bit = head + rng.randrange(min(n, 4080)), rng.randrange(8)
        what = f"piece, byte {at} bit {bit}"
        flip(path, at, bit)
        vcode, problems = verify(w.store)
        check(vcode in (0, 12), f"{what}: verify exits {vcode}: {problems}")
        for m in want:
            code, text, err = attempt(A.tvstore, "export", w.store, m, out)
            check(code == 0 or code == 12 == vcode,
                  f"{what}: export exits {code}, verify {vcode}: {err[-200:]}")
            check(code != 0 or tree_of(out) == want[m],
                  f"{what}: other bytes with exit 0")
            shutil.rmtree(out, True)
        found += vcode == 12
        with open(path, "r+b") as f:
            f.write(raw)
        good = crashlib.failures_now() == failed
        table.add("bit flip, pieces", "bad" if not good else
                  "found" if vcode == 12 else "no effect")
    check(found >= count // 4, f"{found} of {count} flips in use")


def extents(path):
    """[(offset, bytes)] of the tensors of a file."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
    return [(8 + n + t["data_offsets"][0],
             t["data_offsets"][1] - t["data_offsets"][0])
            for k, t in header.items() if k != "__metadata__"]


def main():
    run(A.tvstore, "init", STORE, code=0)
    for m in ("base", "ft1", "ft2"):
        run(A.tvstore, "import", STORE, m, os.path.join(MODELS, m), code=0)
    code, out, err = merge(STORE)
    want = digest_of(out)
    check(code == 0 and want, f"merge: {err}")
    with open(os.path.join(STORE, "data.mdb"), "rb") as f:
        raw = f.read()

    places = []
    for m in ("base", "ft1", "ft2"):
        for name, (_, _, data) in read_safetensors(
                os.path.join(MODELS, m)).items():
            # A page that was freed may still hold an older copy.
            at = [i for i in range(0, len(raw), 64) if
                  raw[i:i + 16] == data[:16] and
                  raw[i:i + len(data)] == data]
            if check(at, f"{m}/{name} is not in data.mdb in one piece"):
                places.append((m, name, at, len(data)))
    for i in range(A.count // 3):
        m, name, data, n = rng.choice(places)
        at = rng.choice((0, n - 1, rng.randrange(n)))
        in_payload(m, name, data, at, rng.randrange(8), want)
    long_value_heads(raw)
    pages = len(raw) // 4096
    for i in range(A.count // 3):
        # Heads of pages are where a tree breaks; elsewhere most is payload.
        page = rng.randrange(pages)
        inside = rng.randrange(64) if rng.random() < 0.6 else \
            rng.randrange(4096)
        anywhere(page * 4096 + inside, rng.randrange(8), want)
    linked_flips(A.count // 3)
    piece_flips(A.count // 6)
    resumed_flips(max(2, A.count // 20))
    table.close()
    finish("bitflips")


main()
