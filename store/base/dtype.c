/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dtype.c - one row per element type; everything else reads the row.
 *
 * The spellings are those of the safetensors reference reader and of torch.
 * Sizes come from untrusted headers, so every product is checked, in the order
 * in which the reference reader multiplies: a shape that overflows before it
 * meets a zero is refused by both.
 */
#include "tv/dtype.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tv/checked.h"

struct dtype_row {
    const char *name;
    const char *torch; /* NULL: torch has no element type of this kind */
    unsigned bits;
    bool is_float;
};

static const struct dtype_row rows[TV_DTYPE_COUNT] = {
    [TV_DTYPE_NONE] = {"NONE", NULL, 0, false},
    [TV_BOOL] = {"BOOL", "bool", 8, false},
    [TV_U8] = {"U8", "uint8", 8, false},
    [TV_I8] = {"I8", "int8", 8, false},
    [TV_I16] = {"I16", "int16", 16, false},
    [TV_U16] = {"U16", "uint16", 16, false},
    [TV_I32] = {"I32", "int32", 32, false},
    [TV_U32] = {"U32", "uint32", 32, false},
    [TV_I64] = {"I64", "int64", 64, false},
    [TV_U64] = {"U64", "uint64", 64, false},
    [TV_F16] = {"F16", "float16", 16, true},
    [TV_BF16] = {"BF16", "bfloat16", 16, true},
    [TV_F32] = {"F32", "float32", 32, true},
    [TV_F64] = {"F64", "float64", 64, true},
    [TV_C64] = {"C64", "complex64", 64, false},
    [TV_F8_E4M3] = {"F8_E4M3", "float8_e4m3fn", 8, true},
    [TV_F8_E5M2] = {"F8_E5M2", "float8_e5m2", 8, true},
    [TV_F8_E8M0] = {"F8_E8M0", "float8_e8m0fnu", 8, true},
    [TV_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", "float8_e4m3fnuz", 8, true},
    [TV_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", "float8_e5m2fnuz", 8, true},
    [TV_F6_E2M3] = {"F6_E2M3", NULL, 6, true},
    [TV_F6_E3M2] = {"F6_E3M2", NULL, 6, true},
    [TV_F4] = {"F4", NULL, 4, true},
};

static const struct dtype_row *row_of(enum tv_dtype t)
{
    const unsigned i = (unsigned)t;
    return &rows[i < (unsigned)TV_DTYPE_COUNT ? i : (unsigned)TV_DTYPE_NONE];
}

const char *tv_dtype_name(enum tv_dtype t)
{
    return row_of(t)->name;
}

const char *tv_dtype_torch_name(enum tv_dtype t)
{
    return row_of(t)->torch;
}

enum tv_dtype tv_dtype_from_name(const char *name)
{
    if (!name)
        return TV_DTYPE_NONE;
    for (unsigned i = 1; i < (unsigned)TV_DTYPE_COUNT; i++)
        if (strcmp(rows[i].name, name) == 0)
            return (enum tv_dtype)i;
    return TV_DTYPE_NONE;
}

enum tv_dtype tv_dtype_from_torch(const char *name)
{
    static const char prefix[] = "torch.";
    if (!name)
        return TV_DTYPE_NONE;
    if (strncmp(name, prefix, sizeof prefix - 1) == 0)
        name += sizeof prefix - 1;
    for (unsigned i = 1; i < (unsigned)TV_DTYPE_COUNT; i++)
        if (rows[i].torch && strcmp(rows[i].torch, name) == 0)
            return (enum tv_dtype)i;
    return TV_DTYPE_NONE;
}

unsigned tv_dtype_bits(enum tv_dtype t)
{
    return row_of(t)->bits;
}

bool tv_dtype_is_math(enum tv_dtype t)
{
    return t == TV_F16 || t == TV_BF16 || t == TV_F32;
}

bool tv_dtype_is_float(enum tv_dtype t)
{
    return row_of(t)->is_float;
}

enum tv_err tv_shape_elems(const uint64_t *shape, unsigned rank,
                           uint64_t *n_elems, struct tv_error *err)
{
    if (rank > TV_RANK_MAX)
        return tv_error_set(err, TV_E_CORRUPT,
                            "a shape of %u dimensions; at most %u are allowed",
                            rank, TV_RANK_MAX);
    uint64_t n = 1;
    for (unsigned i = 0; i < rank; i++) {
        if (!tv_mul_u64(n, shape[i], &n)) {
            char text[24 * TV_RANK_MAX + 3];
            return tv_error_set(
                err, TV_E_CORRUPT,
                "the number of elements of shape %s "
                "overflows 64 bits",
                tv_shape_format(shape, rank, text, sizeof text));
        }
    }
    *n_elems = n;
    return TV_OK;
}

enum tv_err tv_dtype_bytes(enum tv_dtype t, uint64_t n_elems, uint64_t *bytes,
                           struct tv_error *err)
{
    const struct dtype_row *row = row_of(t);
    uint64_t n_bits = 0;
    if (row->bits == 0)
        return tv_error_set(err, TV_E_CORRUPT, "unknown element type %d",
                            (int)t);
    if (!tv_mul_u64(n_elems, row->bits, &n_bits))
        return tv_error_set(err, TV_E_CORRUPT,
                            "%" PRIu64 " elements of %s overflow 64 bits",
                            n_elems, row->name);
    if (n_bits % 8 != 0)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%" PRIu64 " elements of %s (%u bits each) do not "
                            "fill a whole number of bytes",
                            n_elems, row->name, row->bits);
    *bytes = n_bits / 8;
    return TV_OK;
}

static size_t put_number(char *dst, uint64_t n)
{
    char digits[20];
    size_t len = 0;
    do {
        digits[len++] = (char)('0' + n % 10);
        n /= 10;
    } while (n > 0);
    for (size_t i = 0; i < len; i++)
        dst[i] = digits[len - 1 - i];
    return len;
}

/* Listings have very many shapes, and printf is slow where a library has
 * registered conversions of its own (libquadmath does, behind OpenBLAS). */
char *tv_shape_format(const uint64_t *shape, unsigned rank, char *dst,
                      size_t cap)
{
    size_t used = 0;
    if (cap == 0)
        return dst;
    for (unsigned i = 0; i <= rank; i++) {
        char piece[24];
        size_t n = 0;
        if (i == 0)
            piece[n++] = '[';
        if (i == rank) {
            piece[n++] = ']';
        } else {
            if (i > 0) {
                piece[n++] = ',';
                piece[n++] = ' ';
            }
            n += put_number(piece + n, shape[i]);
        }
        if (n >= cap - used)
            break;
        memcpy(dst + used, piece, n);
        used += n;
    }
    dst[used] = '\0';
    return dst;
}
