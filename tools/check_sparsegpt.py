#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Hold kernels/layer.c against the reference results for SparseGPT.

    tools/check_sparsegpt.py SHARED

SHARED holds refmodels/ with models/base, models/ft-code and
goldens/sparsegpt. Compiles kernels/layer.c by itself (cc, pkg-config openblas)
and prints, per layer and density, errors beside the stored ones: the OBS loop
of C, a mask by U of C and, as a check of this script alone, a mask by
magnitude; the last two masks are made by numpy. bf16 differences have many
equal magnitudes: of ties the first go, as in the stored results (the other
choice moves a magnitude error by up to 1%). Exit 1 when an error is off by more
than 1% or T_hat by more than 1e-4 (relative Frobenius), when U^T U is off
H^-1 by more than 1e-5 (spectral norms), or when CG raises the damped loss. CG has no stored result: its loss after 0, 1, 3 and 10 steps is
shown over that of an exact solve per row in numpy.
Needs Debian's python3-numpy only.
"""
import ctypes
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = 128


class Obs(ctypes.Structure):
    _fields_ = [("density", ctypes.c_double), ("n_pruned", ctypes.c_uint),
                ("group", ctypes.c_uint)]


def compiled(folder):
    """The functions of layer.c as a library of their own."""
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "openblas"],
                           check=True, capture_output=True, text=True)
    path = folder / "layer.so"
    subprocess.run(["cc", "-O2", "-std=c17", "-ffp-contract=off", "-shared",
                    "-fPIC", "-DTVK_HAVE_OPENBLAS=1",
                    f"-I{ROOT}/kernels/include", f"{ROOT}/kernels/layer.c",
                    f"{ROOT}/kernels/gram_factor.c",
                    "-o", path, *flags.stdout.split(), "-lm"], check=True)
    lib = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double
    lib.tvk_gram_damp.argtypes = [pointer, size, number]
    lib.tvk_gram_damp.restype = number
    lib.tvk_gram_factor.argtypes = [pointer, size, pointer]
    for room in (lib.tvk_gram_floats, lib.tvk_gram_work):
        room.argtypes = [size]
        room.restype = size
    lib.tvk_obs_work.argtypes = [size, size]
    lib.tvk_obs_work.restype = size
    lib.tvk_obs_prune.argtypes = [pointer, pointer, size, size, pointer,
                                  pointer]
    lib.tvk_obs_prune.restype = ctypes.c_uint64
    lib.tvk_cg_work.argtypes = [size]
    lib.tvk_cg_work.restype = size
    lib.tvk_cg_rows.argtypes = [pointer] * 4 + [size, size, ctypes.c_uint,
                                                pointer]
    lib.tvk_cg_rows.restype = None
    return lib


def tensor(path, name):
    """One tensor of a safetensors file; bf16 comes as fp32."""
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        at = json.loads(f.read(length))[name]
        begin, end = at["data_offsets"]
        f.seek(8 + length + begin)
        raw = f.read(end - begin)
    if at["dtype"] == "BF16":
        bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(at["shape"])
    assert at["dtype"] == "F32", at["dtype"]
    return np.frombuffer(raw, np.float32).reshape(at["shape"]).copy()


def factor(lib, gram, damping):
    """Damped H and U in fp32, from C."""
    h = np.ascontiguousarray(gram, np.float32).copy()
    lib.tvk_gram_damp(h.ctypes.data, len(h), damping)
    n = len(h)
    room = np.empty(lib.tvk_gram_floats(n), np.float32)
    u = room[:n * n].reshape(n, n)
    u[:] = h
    work = np.empty(lib.tvk_gram_work(n), np.float32)
    if lib.tvk_gram_factor(u.ctypes.data, n, work.ctypes.data) != 0:
        sys.exit("H is not positive definite")
    return h, u


def inverse_error(h, u):
    """|U^T U - H^-1| / |H^-1|, spectral norms."""
    inv = np.linalg.inv(h.astype(np.float64))
    u = u.astype(np.float64)
    return np.linalg.norm(u.T @ u - inv, 2) / np.linalg.norm(inv, 2)


def obs(lib, t, u, density):
    """T_hat and the number of entries kept, from C."""
    p = np.ascontiguousarray(t, np.float32).copy()
    work = np.empty(lib.tvk_obs_work(*t.shape), np.float32)
    how = Obs(density, 0, 0)
    n = lib.tvk_obs_prune(p.ctypes.data, u.ctypes.data, *t.shape,
                          ctypes.byref(how), work.ctypes.data)
    return p, n


def cg(lib, p, t, keep, h, steps):
    p = p.astype(np.float32).copy()
    t = np.ascontiguousarray(t, np.float32)
    marks = np.ascontiguousarray(keep, np.uint8)
    work = np.empty(lib.tvk_cg_work(len(h)), np.float32)
    for at in range(0, len(t), 64):
        n = min(64, len(t) - at)
        lib.tvk_cg_rows(p[at:].ctypes.data, t[at:].ctypes.data,
                        marks[at:].ctypes.data, h.ctypes.data, n, len(h),
                        steps, work.ctypes.data)
    return p


def loss(t, p, gram):
    d = t.astype(np.float64) - p
    return float(np.sum((d @ gram) * d))


def keep_largest(score, n):
    """Without the smallest ones in stable order: of ties the first ones go."""
    keep = np.ones(score.size, bool)
    keep[np.argsort(score.ravel(), kind="stable")[:score.size - n]] = False
    return keep.reshape(score.shape)


def exact(t, keep, h):
    """The best values of the kept entries, row by row in fp64."""
    best = np.zeros(t.shape)
    for r, row in enumerate(keep):
        inner = h[np.ix_(row, row)]
        best[r, row] = np.linalg.solve(inner, (t[r] @ h)[row])
    return best


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    models = pathlib.Path(sys.argv[1]) / "refmodels"
    goldens = models / "goldens" / "sparsegpt"
    stored = json.loads((goldens / "sparsegpt.json").read_text())
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        lib = compiled(pathlib.Path(folder))
        for name, layer in stored["layers"].items():
            both = [tensor(models / "models" / m / "model.safetensors",
                           name + ".weight") for m in ("ft-code", "base")]
            t = both[0].astype(np.float64) - both[1]
            gram = tensor(goldens / "hessians.safetensors", name + ".XtX")
            gram = gram.astype(np.float64)
            h, u = factor(lib, gram * (2 / stored["n"]), 0.01)
            whole = loss(t, 0 * t, gram)
            off = np.abs(u.astype(np.float64).T @ u @ h - np.eye(len(h))).max()
            inverse = inverse_error(h, u)
            bad += inverse > 1e-5
            print(f"{name} {t.shape}: |U^T U - H^-1| / |H^-1| {inverse:.1e}, "
                  f"|U^T U H - 1| {off:.1e}")
            for density, kinds in layer["density"].items():
                kept = int(kinds["magnitude"]["nnz"])
                p, n = obs(lib, t, u, float(density))
                want = kinds["sparsegpt_obs_corrected"]
                got = {"sparsegpt_obs_corrected": loss(t, p, gram),
                       "magnitude": loss(t, t * keep_largest(abs(t), kept),
                                         gram),
                       "importance_global_cholU_nocorr": loss(
                           t, t * keep_largest((t / u.diagonal()) ** 2, kept),
                           gram)}
                for kind, value in got.items():
                    ratio = value / kinds[kind]["err"]
                    bad += abs(ratio - 1) > 0.01
                    print(f"  d {density} {kind}: {value / whole:.5f}, "
                          f"{ratio:.6f} of the stored")
                if n != want["nnz"]:
                    print(f"  d {density}: kept {n}, not {want['nnz']}")
                mask = keep_largest(t ** 2 * h.diagonal(), kept)
                best = loss(t, exact(t, mask, h.astype(np.float64)), h)
                path = [loss(t, cg(lib, t * mask, t, mask, h, k), h)
                        for k in (0, 1, 3, 10)]
                bad += any(b > a for a, b in zip(path, path[1:]))
                print(f"  d {density} CG 0/1/3/10 steps, damped loss over the "
                      "exact one: " + " ".join(f"{x / best:.4f}" for x in path))
            head = name + ".That_obs_d0.3[:32]"
            want = tensor(goldens / "that.safetensors", head)
            got = obs(lib, t, u, 0.3)[0][:32]
            off = np.linalg.norm(got - want) / np.linalg.norm(want)
            bad += off > 1e-4
            print(f"  T_hat at 0.3: off by {off:.1e}")
    print("failed" if bad else "passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
