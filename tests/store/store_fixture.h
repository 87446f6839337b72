/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_fixture.h - a store in a scratch directory, and tensors whose bytes are
 * a function of a seed, so that any test can tell whether they are right.
 */
#ifndef STORE_FIXTURE_H
#define STORE_FIXTURE_H

#include "test.h"

#include "tv/store.h"

struct fx {
    char *dir;  /* scratch directory */
    char *path; /* of the store in it */
    tv_store *s;
    struct tv_error err;
};

int fx_setup(void **state);    /* creates and opens a store */
int fx_teardown(void **state); /* also checks that nothing is held */
void fx_open(struct fx *f, const struct tv_store_options *opt);
void fx_close(struct fx *f);

/* Bytes of a seed. */
void fx_bytes(uint64_t seed, void *dst, size_t n);
/* A description of [rows, cols] (cols 0: rank 1; both 0: scalar). shape [2]. */
struct tv_tensor_desc fx_desc(const char *name, enum tv_dtype dtype,
                              uint64_t rows, uint64_t cols, uint64_t *shape);
uint64_t fx_desc_bytes(const struct tv_tensor_desc *d);
/* A one-chunk view of bytes; `one` is the table that it points to. */
struct tv_view fx_view(const struct tv_tensor_desc *d, const void *bytes,
                       const unsigned char *one[1]);
/* Plain C, usable in children: copies the tensor of a seed into an object. */
enum tv_err fx_copy_in(tv_batch **b, uint64_t object,
                       const struct tv_tensor_desc *d, uint64_t seed,
                       struct tv_error *err);
/* TV_OK when object/name has exactly the bytes of the seed and good leaves. */
enum tv_err fx_compare(tv_read *r, uint64_t object, const char *name,
                       uint64_t seed, struct tv_error *err);

/* One complete object `name` of two tensors "w" (seed) and "v" (seed + 1). */
enum tv_err fx_object(tv_store *s, const char *name, uint64_t seed,
                      uint64_t rows, struct tv_error *err);
enum tv_err fx_object_compare(tv_store *s, const char *name, uint64_t seed,
                              struct tv_error *err);
enum tv_err fx_remove(tv_store *s, const char *name, struct tv_error *err);
/* Verify without a callback, asserted. */
void fx_verify(struct fx *f);

#endif
