/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/dtype.h - element types of tensors and the byte sizes they imply.
 *
 * The set is that of safetensors; the store holds all of them bit for bit,
 * arithmetic exists for F32, F16 and BF16 only. Numbers are part of the store
 * format: append only.
 */
#ifndef TV_DTYPE_H
#define TV_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum tv_dtype {
    TV_DTYPE_NONE = 0,
    TV_BOOL = 1,
    TV_U8 = 2,
    TV_I8 = 3,
    TV_I16 = 4,
    TV_U16 = 5,
    TV_I32 = 6,
    TV_U32 = 7,
    TV_I64 = 8,
    TV_U64 = 9,
    TV_F16 = 10,
    TV_BF16 = 11,
    TV_F32 = 12,
    TV_F64 = 13,
    TV_C64 = 14,
    TV_F8_E4M3 = 15,
    TV_F8_E5M2 = 16,
    TV_F8_E8M0 = 17,
    TV_F8_E4M3FNUZ = 18,
    TV_F8_E5M2FNUZ = 19,
    TV_F6_E2M3 = 20,
    TV_F6_E3M2 = 21,
    TV_F4 = 22,
    TV_DTYPE_COUNT = 23
};

#define TV_RANK_MAX 8u    /* dimensions of a tensor */
#define TV_NAME_MAX 4096u /* bytes of a tensor name, without the NUL */

/* Safetensors spelling ("BF16"); the spelling of all our output. */
const char *tv_dtype_name(enum tv_dtype t);
/* Recipe/torch spelling ("bfloat16"); NULL where torch has none. */
const char *tv_dtype_torch_name(enum tv_dtype t);
/* Exact safetensors spelling; TV_DTYPE_NONE when unknown. */
enum tv_dtype tv_dtype_from_name(const char *name);
/* torch spelling, with or without "torch."; TV_DTYPE_NONE when unknown. */
enum tv_dtype tv_dtype_from_torch(const char *name);
/* Bits per element (4, 6, 8, 16, ...); 0 for NONE. */
unsigned tv_dtype_bits(enum tv_dtype t);
/* True for F16, BF16, F32: the types that merge arithmetic takes. */
bool tv_dtype_is_math(enum tv_dtype t);
/* True for every floating-point type, narrow ones included. */
bool tv_dtype_is_float(enum tv_dtype t);

/* Elements of a shape [rank]; TV_E_CORRUPT on overflow. A scalar has one. */
TV_NODISCARD enum tv_err tv_shape_elems(const uint64_t *shape, unsigned rank,
                                        uint64_t *n_elems,
                                        struct tv_error *err);
/* Bytes of n_elems; TV_E_CORRUPT on overflow or a broken last byte. */
TV_NODISCARD enum tv_err tv_dtype_bytes(enum tv_dtype t, uint64_t n_elems,
                                        uint64_t *bytes, struct tv_error *err);
/* "[2048, 192]" into dst; returns dst. cap >= 24*rank + 3. */
char *tv_shape_format(const uint64_t *shape, unsigned rank, char *dst,
                      size_t cap);

#ifdef __cplusplus
}
#endif
#endif
