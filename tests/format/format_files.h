/* SPDX-License-Identifier: Apache-2.0 */
/*
 * format_files.h - small model files for the tests of store/format.
 */
#ifndef FORMAT_FILES_H
#define FORMAT_FILES_H

#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/format.h"

struct ff_tensor {
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[4];
    uint64_t seed; /* equal seeds: equal bytes */
};

uint64_t ff_bytes(const struct ff_tensor *t);
/* The bytes of a tensor, owned (tv_free). */
unsigned char *ff_payload(const struct ff_tensor *t);
/* Writes dir/file as safetensors with the tensors in that order. */
void ff_write(const char *dir, const char *file, const struct ff_tensor *t,
              size_t n);
void ff_write_text(const char *dir, const char *file, const char *text);
/* Copies tests/data/SRC to dir/file. */
void ff_copy(const char *src, const char *dir, const char *file);
/* A model directory: config.json, generation_config.json and tokenizer.json,
 * and five tensors. Returns the tensors; *n of them. */
const struct ff_tensor *ff_model(const char *dir, size_t *n);
/* An adapter for that model, rank 2. */
void ff_adapter(const char *dir);

/* A whole file, owned; fails the test when it cannot be read. */
char *ff_read(const char *dir, const char *file, size_t *n);
void ff_assert_same_file(const char *dir_a, const char *dir_b,
                         const char *file);
/* The input must hold exactly these tensors with these bytes. */
void ff_assert_tensors(tv_input *in, const struct ff_tensor *t, size_t n);
struct tv_hash ff_digest(const char *path);
bool ff_exists(const char *dir, const char *file);
/* snprintf that must fit. */
void ff_print(char *dst, size_t cap, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#endif
