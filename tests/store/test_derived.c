/* SPDX-License-Identifier: Apache-2.0 */
/* test_derived.c - masks, task vectors and statistics in a store: exact, small,
 * evictable, never in the way of user data. */
#include "store_fixture.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faults.h"
#include "lmdb_seam.h"
#include "rng.h"
#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/sys.h"

#define ABOUT "{\"donor\":\"ft\",\"base\":\"base\",\"density\":0.2}"

static struct tv_hash score_of(uint64_t seed)
{
    return tv_hash128(&seed, sizeof seed);
}

/* Owned words: a fifth of n elements. */
static uint64_t *words_of(uint64_t seed, uint64_t n)
{
    uint64_t *w = (uint64_t *)tv_calloc((size_t)(n / 64 + 1), sizeof *w);
    struct rng r;
    assert_non_null(w);
    rng_open(&r, seed);
    for (uint64_t i = 0; i < (n + 63) / 64; i++) {
        /* 1/4 - 1/16 of the bits */
        w[i] = rng_u64(&r) & rng_u64(&r) & ~(rng_u64(&r) & rng_u64(&r));
        if (n - i * 64 < 64)
            w[i] &= (UINT64_C(1) << (n % 64)) - 1;
    }
    return w;
}

static uint64_t bits(const uint64_t *w, uint64_t n)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < (n + 63) / 64; i++)
        count += (uint64_t)__builtin_popcountll(w[i]);
    return count;
}

static struct tv_derived_new mask_new(uint64_t seed, const char *tensor,
                                      const uint64_t *words, uint64_t n)
{
    return (struct tv_derived_new){
        .key = {.kind = TV_MASK, .score = score_of(seed), .tensor = tensor},
        .about = ABOUT,
        .n_elems = n,
        .words = words};
}

static bool put_mask(struct fx *f, uint64_t seed, const char *tensor,
                     uint64_t n)
{
    uint64_t *w = words_of(seed, n);
    struct tv_derived_new p = mask_new(seed, tensor, w, n);
    assert_ok(tv_derived_store(f->s, &p, 1, 1u << 20, 0, &f->err), &f->err);
    tv_free(w);
    return p.stored;
}

static bool has(struct fx *f, enum tv_derived_kind kind, uint64_t seed,
                const char *tensor)
{
    tv_read *r = NULL;
    struct tv_derived d;
    bool found = false;
    const struct tv_derived_key key = {kind, score_of(seed), tensor};
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_derived_find(r, &key, &found, &d, &f->err), &f->err);
    tv_read_end(r);
    return found;
}

static void check_mask(struct fx *f, uint64_t seed, const char *tensor,
                       uint64_t n)
{
    tv_read *r = NULL;
    tv_mask *m = NULL;
    bool found = false;
    uint64_t scratch[64];
    uint64_t *w = words_of(seed, n);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_mask_open(r, score_of(seed), tensor, &found, &f->err, &m),
              &f->err);
    assert_true(found);
    assert_int_equal(tv_mask_set(m), bits(w, n));
    for (uint64_t at = 0; at < n; at += 4096) {
        const uint64_t left = n - at;
        const uint32_t some = left < 4096 ? (uint32_t)left : 4096;
        const uint64_t *got = tv_mask_words(m, at, some, scratch);
        const uint32_t last = some % 64;
        for (uint32_t i = 0; i < some / 64; i++)
            assert_true(got[i] == w[at / 64 + i]);
        if (last != 0)
            assert_true(((got[some / 64] ^ w[at / 64 + some / 64]) &
                         ((UINT64_C(1) << last) - 1)) == 0);
    }
    tv_mask_close(m);
    tv_read_end(r);
    tv_free(w);
}

static void masks_come_back(void **state)
{
    struct fx *f = (struct fx *)*state;
    static const uint64_t sizes[] = {1,     100,    4096,
                                     70000, 262144, (1u << 23) + 70001};
    struct tv_store_stat st;
    uint64_t n = 0;
    for (uint64_t i = 0; i < 6; i++) {
        char name[32];
        (void)snprintf(name, sizeof name, "layers.%d.w", (int)i);
        assert_true(put_mask(f, i, name, sizes[i]));
        n += sizes[i];
    }
    /* Again: it is there already. */
    assert_true(put_mask(f, 3, "layers.3.w", sizes[3]));
    fx_close(f);
    fx_open(f, NULL);
    for (uint64_t i = 0; i < 6; i++) {
        char name[32];
        (void)snprintf(name, sizeof name, "layers.%d.w", (int)i);
        check_mask(f, i, name, sizes[i]);
    }
    assert_false(has(f, TV_MASK, 77, "layers.3.w"));
    assert_false(has(f, TV_MASK, 3, "layers.4.w"));
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.n_masks, 6);
    assert_int_equal(st.n_task_vectors, 0);
    assert_true((double)st.masks * 8 <= 1.01 * 1.02 * (double)n);
    fx_verify(f);
}

static void lists_are_in_layer_order(void **state)
{
    struct fx *f = (struct fx *)*state;
    tv_read *r = NULL;
    struct tv_derived_list *l = NULL;
    assert_true(put_mask(f, 1, "layers.10.w", 70000));
    assert_true(put_mask(f, 2, "layers.9.w", 70000));
    uint64_t *w = words_of(3, 100);
    struct tv_derived_new other = mask_new(3, "a", w, 100);
    other.about = "{\"donor\":\"another\"}";
    assert_ok(tv_derived_store(f->s, &other, 1, 1u << 20, 0, &f->err), &f->err);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_derived_list(r, &f->err, &l), &f->err);
    assert_int_equal(l->n, 3);
    size_t at = strcmp(l->items[0].key.tensor, "a") == 0 ? 1 : 0;
    assert_string_equal(l->items[at].key.tensor, "layers.9.w");
    assert_string_equal(l->items[at].about, ABOUT);
    assert_string_equal(l->items[at + 1].key.tensor, "layers.10.w");
    assert_int_equal(l->items[at].group, l->items[at + 1].group);
    assert_string_equal(l->items[at == 1 ? 0 : 2].about, other.about);
    tv_derived_list_free(l);
    tv_read_end(r);
    tv_free(w);
}

static uint16_t value_at(uint64_t i)
{
    return (uint16_t)(i * 2654435761u >> 7);
}

/* Stores the task vector of a mask that words_of makes. */
static void put_delta(struct fx *f, uint64_t seed, const char *tensor,
                      uint64_t n, uint64_t dirty, bool *stored)
{
    uint64_t *w = words_of(seed, n);
    const uint64_t n_blocks = (n + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
    uint64_t *before =
        (uint64_t *)tv_calloc((size_t)n_blocks + 1, sizeof *before);
    uint16_t *values = (uint16_t *)tv_calloc((size_t)bits(w, n) + 1, 2);
    uint64_t k = 0;
    assert_true(before != NULL && values != NULL);
    for (uint64_t i = 0; i < n; i++) {
        if (i % TV_DELTA_BLOCK == 0)
            before[i / TV_DELTA_BLOCK] = k;
        if (w[i / 64] >> (i % 64) & 1)
            values[k++] = value_at(i);
    }
    before[n_blocks] = k;
    struct tv_derived_new p = {
        .key = {.kind = TV_DELTA, .score = score_of(seed), .tensor = tensor},
        .about = ABOUT,
        .n_elems = n,
        .dtype = TV_BF16,
        .values = values,
        .before = before,
        .n_nonfinite = 5};
    assert_ok(tv_derived_store(f->s, &p, 1, dirty, 0, &f->err), &f->err);
    *stored = p.stored;
    tv_free(values);
    tv_free(before);
    tv_free(w);
}

static void task_vectors_come_back(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t n = (1u << 20) + 5000;
    tv_read *r = NULL;
    tv_delta *d = NULL;
    struct tv_derived info;
    bool found = false, stored = false;
    struct tv_store_stat st;
    const struct tv_derived_key key = {TV_DELTA, score_of(1), "w"};
    assert_true(put_mask(f, 1, "w", n));
    put_delta(f, 1, "w", n, 1u << 16, &stored); /* several batches */
    assert_true(stored);
    uint64_t *w = words_of(1, n);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_derived_find(r, &key, &found, &info, &f->err), &f->err);
    assert_true(found);
    assert_int_equal(info.n_set, bits(w, n));
    assert_int_equal(info.n_nonfinite, 5);
    assert_ok(tv_delta_open(r, key.score, "w", &found, &f->err, &d), &f->err);
    assert_true(found);
    assert_int_equal(tv_delta_dtype(d), TV_BF16);
    for (uint64_t at = 0; at < n; at += TV_DELTA_BLOCK) {
        size_t count = 0, k = 0;
        const uint16_t *v =
            (const uint16_t *)tv_delta_values(d, at, TV_DELTA_BLOCK, &count);
        for (uint64_t i = at; i < n && i < at + TV_DELTA_BLOCK; i++)
            if (w[i / 64] >> (i % 64) & 1)
                assert_int_equal(v[k++], value_at(i));
        assert_int_equal(k, count);
    }
    tv_delta_close(d);
    tv_read_end(r);
    fx_verify(f);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.n_task_vectors, 1);
    assert_true(st.task_vectors > 2 * bits(w, n));
    tv_free(w);
}

static bool put_stat(struct fx *f, uint64_t seed, const char *tensor,
                     enum tv_dtype dtype, uint64_t n, uint64_t dirty)
{
    const size_t bytes = (size_t)n * tv_dtype_bits(dtype) / 8u;
    unsigned char *values = (unsigned char *)tv_alloc(bytes + 1);
    assert_non_null(values);
    fx_bytes(seed, values, bytes);
    struct tv_derived_new p = {
        .key = {.kind = TV_STAT, .score = score_of(seed), .tensor = tensor},
        .about = "{\"type\":\"statistics\"}",
        .n_elems = n,
        .dtype = dtype,
        .values = values,
        .n_rows = 1000 + seed};
    assert_ok(tv_derived_store(f->s, &p, 1, dirty, 0, &f->err), &f->err);
    tv_free(values);
    return p.stored;
}

static void check_stat(struct fx *f, uint64_t seed, const char *tensor,
                       enum tv_dtype dtype, uint64_t n)
{
    const size_t bytes = (size_t)n * tv_dtype_bits(dtype) / 8u;
    unsigned char *want = (unsigned char *)tv_alloc(bytes + 1);
    unsigned char *got = (unsigned char *)tv_alloc(bytes + 1);
    tv_read *r = NULL;
    uint64_t n_rows = 0;
    bool found = false;
    assert_non_null(want);
    assert_non_null(got);
    fx_bytes(seed, want, bytes);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_stat_read(r, score_of(seed), tensor, dtype, n, &found, &n_rows,
                           got, &f->err),
              &f->err);
    assert_true(found);
    assert_int_equal(n_rows, 1000 + seed);
    assert_memory_equal(got, want, bytes);
    tv_read_end(r);
    tv_free(want);
    tv_free(got);
}

static void statistics_come_back(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t large = 5u * (1u << 19) + 77; /* three chunks */
    struct tv_store_stat st;
    struct tv_derived info;
    tv_read *r = NULL;
    uint64_t n_rows = 7;
    bool found = true;
    double one = 0;
    assert_true(put_stat(f, 1, "layers.0.q", TV_F64, 100, 1u << 20));
    assert_true(put_stat(f, 2, "layers.0.q", TV_F32, large, 1u << 16));
    assert_true(put_stat(f, 3, "layers.1.q", TV_F64, 1, 1u << 20));
    fx_close(f);
    fx_open(f, NULL);
    check_stat(f, 1, "layers.0.q", TV_F64, 100);
    check_stat(f, 2, "layers.0.q", TV_F32, large);
    check_stat(f, 3, "layers.1.q", TV_F64, 1);
    /* Another size, type, name or key is another thing. */
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_stat_read(r, score_of(3), "layers.1.q", TV_F64, 2, &found,
                           &n_rows, &one, &f->err),
              &f->err);
    assert_false(found);
    assert_ok(tv_stat_read(r, score_of(3), "layers.1.q", TV_F32, 1, &found,
                           &n_rows, &one, &f->err),
              &f->err);
    assert_false(found);
    assert_ok(tv_stat_read(r, score_of(3), "layers.2.q", TV_F64, 1, &found,
                           &n_rows, &one, &f->err),
              &f->err);
    assert_false(found);
    assert_int_equal(n_rows, 7);
    assert_true(one == 0);
    const struct tv_derived_key key = {TV_STAT, score_of(2), "layers.0.q"};
    assert_ok(tv_derived_find(r, &key, &found, &info, &f->err), &f->err);
    assert_true(found);
    assert_int_equal(info.n_elems, large);
    assert_int_equal(info.n_rows, 1002);
    assert_int_equal(info.dtype, TV_F32);
    tv_read_end(r);
    assert_false(has(f, TV_MASK, 2, "layers.0.q"));
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.n_statistics, 3);
    assert_int_equal(st.n_masks, 0);
    assert_true(st.statistics >= 4 * large + 8 * 101 &&
                st.statistics < 4 * large + 8 * 101 + 4096);
    fx_verify(f);
}

/* Statistics, masks and uses without dropping pins, in one order of use. */
static void statistics_are_evicted_in_turn(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t quota = 2u << 20;
    const uint64_t n = 16384; /* 128 KiB each, as the masks */
    uint64_t used = 0;
    assert_ok(tv_store_quota_set(f->s, quota, &f->err), &f->err);
    for (uint64_t i = 0; i < 8; i++)
        assert_true(i % 2 ? put_mask(f, i, "w", n * 64)
                          : put_stat(f, i, "w", TV_F64, n, 1u << 20));
    fx_close(f);
    fx_open(f, NULL);
    const struct tv_derived_key pin = {TV_STAT, score_of(2), "w"};
    assert_ok(tv_derived_pin(f->s, &pin, 1, &f->err), &f->err);
    const struct tv_derived_key touched = {TV_STAT, score_of(0), "w"};
    assert_ok(tv_derived_used(f->s, &touched, 1, &f->err), &f->err);
    assert_ok(tv_derived_reserve(f->s, 10u << 17, 0, &f->err), &f->err);
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used <= quota);
    assert_false(has(f, TV_MASK, 1, "w"));
    assert_false(has(f, TV_MASK, 3, "w"));
    assert_true(has(f, TV_STAT, 2, "w")); /* pinned */
    assert_true(has(f, TV_STAT, 0, "w")); /* used last */
    uint64_t gone = 0;
    assert_ok(tv_derived_evict_all(f->s, &gone, &f->err), &f->err);
    assert_true(has(f, TV_STAT, 2, "w"));
    check_stat(f, 2, "w", TV_F64, n);
    assert_ok(tv_derived_release(f->s, NULL, 0, &f->err), &f->err);
    assert_ok(tv_derived_evict_all(f->s, &gone, &f->err), &f->err);
    assert_int_equal(gone, 1);
    fx_verify(f);
}

/* The order in which 'gone' items disappear when room is asked for. */
static void the_longest_unused_goes_first(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t quota = 2u << 20;
    const uint64_t n = 1u << 20; /* 128 KiB each */
    assert_ok(tv_store_quota_set(f->s, quota, &f->err), &f->err);
    for (uint64_t i = 0; i < 8; i++)
        assert_true(put_mask(f, i, "w", n));
    fx_close(f);
    fx_open(f, NULL);
    struct tv_derived_key touched = {TV_MASK, score_of(0), "w"};
    assert_ok(tv_derived_release(f->s, &touched, 1, &f->err), &f->err);
    struct tv_derived_key pin = {TV_MASK, score_of(1), "w"};
    assert_ok(tv_derived_pin(f->s, &pin, 1, &f->err), &f->err);
    /* Room for one more mask at a time; oldest first is 2, 3, ... */
    uint64_t gone = 1;
    for (uint64_t i = 0; i < 14 && gone < 7; i++) {
        uint64_t used = 0;
        assert_true(put_mask(f, 100 + i, "w", n));
        assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
        assert_true(used <= quota);
        while (gone < 7 && !has(f, TV_MASK, gone + 1, "w"))
            gone++;
        for (uint64_t k = gone + 1; k < 8; k++)
            assert_true(has(f, TV_MASK, k, "w"));
        assert_true(has(f, TV_MASK, 1, "w"));
    }
    assert_int_equal(gone, 7);
    assert_true(has(f, TV_MASK, 0, "w")); /* used later than they */
    /* Own items are not thrown out for one another. */
    bool all = true;
    for (uint64_t i = 0; i < 20; i++)
        all = put_mask(f, 200 + i, "w", n) && all;
    assert_false(all);
    assert_true(has(f, TV_MASK, 1, "w"));
    assert_true(has(f, TV_MASK, 100, "w"));
    fx_verify(f);
}

static void user_data_push_derived_data_out(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t quota = 3u << 20;
    assert_ok(tv_store_quota_set(f->s, quota, &f->err), &f->err);
    uint64_t n = 0;
    while (n < 64 && put_mask(f, n, "w", 1u << 20))
        n++;
    assert_true(n > 8 && n < 64);
    assert_code(fx_object(f->s, "m", 1, 6000, &f->err), TV_E_NOSPACE, &f->err);
    (void)fx_remove(f->s, "m", NULL);
    assert_ok(tv_derived_reserve(f->s, 900000, 0, &f->err), &f->err);
    assert_ok(fx_object(f->s, "m", 1, 6000, &f->err), &f->err);
    assert_true(has(f, TV_MASK, n - 1, "w"));
    assert_false(has(f, TV_MASK, 0, "w"));
    assert_ok(fx_object_compare(f->s, "m", 1, &f->err), &f->err);
    assert_code(tv_derived_reserve(f->s, 10u << 20, 0, &f->err), TV_E_NOSPACE,
                &f->err);
    assert_message(&f->err, "missing");
    assert_ok(fx_object_compare(f->s, "m", 1, &f->err), &f->err);
    fx_verify(f);
}

static void a_reserve_spares_what_is_pinned(void **state)
{
    struct fx *f = (struct fx *)*state;
    assert_ok(tv_store_quota_set(f->s, 2u << 20, &f->err), &f->err);
    for (uint64_t i = 0; i < 6; i++)
        assert_true(put_mask(f, i, "w", 1u << 20));
    struct tv_derived_key pins[2] = {{TV_MASK, score_of(0), "w"},
                                     {TV_MASK, score_of(4), "w"}};
    assert_ok(tv_derived_pin(f->s, pins, 2, &f->err), &f->err);
    assert_code(tv_derived_reserve(f->s, 10u << 20, 0, &f->err), TV_E_NOSPACE,
                &f->err);
    assert_non_null(strstr(f->err.hint, "would not make it"));
    /* Nothing went for what does not fit anyway. */
    for (uint64_t i = 0; i < 6; i++)
        assert_true(has(f, TV_MASK, i, "w"));
    /* What can be had is: all that is not pinned. */
    uint64_t room = 2u << 20;
    while (tv_derived_reserve(f->s, room, 0, NULL) != TV_OK) {
        room -= 16u << 10;
        assert_true(room > 900u << 10);
    }
    for (uint64_t i = 0; i < 6; i++)
        assert_int_equal(has(f, TV_MASK, i, "w"), i == 0 || i == 4);
    /* What can be spared is no reason to refuse. */
    assert_ok(tv_derived_reserve(f->s, 1000, 10u << 20, &f->err), &f->err);
    assert_code(tv_derived_reserve(f->s, 10u << 20, 0, &f->err), TV_E_NOSPACE,
                &f->err);
    assert_non_null(strstr(f->err.hint, "in use"));
    assert_ok(tv_derived_release(f->s, pins, 1, &f->err), &f->err);
    uint64_t n = 0;
    assert_ok(tv_derived_evict_all(f->s, &n, &f->err), &f->err);
    assert_int_equal(n, 2);
    assert_false(has(f, TV_MASK, 0, "w"));
    fx_verify(f);
}

/* A child that pins and waits; the pin counts while it lives. */
static void pins_end_with_their_process(void **state)
{
    struct fx *f = (struct fx *)*state;
    int up[2], down[2];
    char byte = 0;
    uint64_t n = 0;
    assert_true(put_mask(f, 1, "w", 70000));
    fx_close(f);
    assert_int_equal(pipe(up), 0);
    assert_int_equal(pipe(down), 0);
    const pid_t pid = fork();
    if (pid == 0) {
        tv_store *s = NULL;
        const struct tv_derived_key key = {TV_MASK, score_of(1), "w"};
        if (tv_store_open(f->path, NULL, NULL, &s) != TV_OK ||
            tv_derived_pin(s, &key, 1, NULL) != TV_OK ||
            write(up[1], "p", 1) != 1)
            _exit(1);
        (void)!read(down[0], &byte, 1);
        (void)raise(SIGKILL);
        _exit(0);
    }
    assert_int_equal(read(up[0], &byte, 1), 1);
    fx_open(f, NULL);
    assert_ok(tv_derived_evict_all(f->s, &n, &f->err), &f->err);
    assert_int_equal(n, 0);
    assert_true(has(f, TV_MASK, 1, "w"));
    assert_int_equal(write(down[1], "x", 1), 1);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_ok(tv_derived_evict_all(f->s, &n, &f->err), &f->err);
    assert_int_equal(n, 1);
    uint64_t freed = 0;
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
    for (int i = 0; i < 2; i++) {
        (void)close(up[i]);
        (void)close(down[i]);
    }
}

/* A child that reads an object, and counts a scratch file, until it is killed:
 * neither says anything after that. */
static void what_is_read_stays(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_store_stat st;
    int up[2], down[2];
    char byte = 0;
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    bool held = false;
    uint64_t ids[2] = {0, UINT64_C(1) << 60};
    assert_ok(tv_store_quota_set(f->s, 16u << 20, &f->err), &f->err);
    assert_ok(fx_object(f->s, "m", 1, 100, &f->err), &f->err);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_object_find(r, "m", false, &f->err, &o), &f->err);
    ids[0] = o->id;
    tv_object_free(o);
    tv_read_end(r);
    assert_code(tv_object_hold(f->s, ids, 2, &held, &f->err), TV_E_NOTFOUND,
                &f->err);
    assert_false(held);
    assert_ok(tv_object_hold(f->s, ids, 1, &held, &f->err), &f->err);
    assert_true(held);
    assert_code(fx_remove(f->s, "m", &f->err), TV_E_LOCKED, &f->err);
    tv_object_let_go(f->s, ids, 1);
    fx_close(f);
    assert_int_equal(pipe(up), 0);
    assert_int_equal(pipe(down), 0);
    const pid_t pid = fork();
    if (pid == 0) {
        tv_store *s = NULL;
        (void)close(down[1]); /* the end of the parent ends it */
        if (tv_store_open(f->path, NULL, NULL, &s) != TV_OK ||
            tv_object_hold(s, ids, 1, &held, NULL) != TV_OK || !held ||
            tv_store_scratch_set(s, 16u << 20, NULL) == TV_OK ||
            tv_store_scratch_set(s, 5u << 20, NULL) != TV_OK ||
            tv_store_scratch_set(s, 6u << 20, NULL) != TV_OK ||
            write(up[1], "p", 1) != 1)
            _exit(1);
        (void)!read(down[0], &byte, 1);
        (void)raise(SIGKILL);
        _exit(0);
    }
    (void)close(up[1]); /* else its failure is waited for */
    assert_int_equal(read(up[0], &byte, 1), 1);
    fx_open(f, NULL);
    assert_code(fx_remove(f->s, "m", &f->err), TV_E_LOCKED, &f->err);
    assert_message(&f->err, "being read");
    uint64_t freed = 0;
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    assert_code(fx_remove(f->s, "m", &f->err), TV_E_LOCKED, &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.charged_bytes, 6u << 20);
    assert_code(tv_store_scratch_set(f->s, 10u << 20, &f->err), TV_E_NOSPACE,
                &f->err);
    assert_message(&f->err, "scratch file of 10.0 MiB");
    assert_int_equal(write(down[1], "x", 1), 1);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.charged_bytes, 0);
    assert_ok(tv_store_scratch_set(f->s, 9u << 20, &f->err), &f->err);
    assert_ok(tv_store_scratch_set(f->s, 0, &f->err), &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.charged_bytes, 0);
    assert_ok(fx_remove(f->s, "m", &f->err), &f->err);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
    (void)close(up[0]);
    (void)close(down[0]);
    (void)close(down[1]);
}

/* Commits that a child survives, then it dies in the middle of an item. */
static int commits_left;

static int dying_commit(MDB_txn *txn)
{
    static const struct tv_lmdb_table *real;
    (void)real;
    if (commits_left-- == 0)
        _exit(42);
    return mdb_txn_commit(txn);
}

static void half_an_item_is_invisible(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t n = 3u << 23;
    int status = 0;
    bool met = false;
    fx_close(f);
    for (int left = 0; left < 8; left++) {
        const pid_t pid = fork();
        if (pid == 0) {
            struct tv_lmdb_table t = *tv_lmdb();
            tv_store *s = NULL;
            if (tv_store_open(f->path, NULL, NULL, &s) != TV_OK)
                _exit(1);
            uint64_t *w = words_of(1, n);
            struct tv_derived_new p = mask_new(1, "w", w, n);
            commits_left = left;
            t.txn_commit = dying_commit;
            tv_lmdb_replace(&t);
            if (tv_derived_store(s, &p, 1, 1u << 20, 0, NULL) != TV_OK)
                _exit(1);
            _exit(p.stored ? 0 : 3);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFEXITED(status));
        fx_open(f, NULL);
        if (WEXITSTATUS(status) == 0) {
            assert_true(has(f, TV_MASK, 1, "w"));
            fx_close(f);
            break;
        }
        assert_int_equal(WEXITSTATUS(status), 42);
        assert_false(has(f, TV_MASK, 1, "w"));
        struct tv_store_stat st;
        assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
        assert_int_equal(st.n_masks, 0);
        met = met || st.masks > 0; /* some of it is there */
        fx_verify(f);
        if (left % 2 == 1) { /* else the next one drops it */
            uint64_t freed = 0;
            assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
            assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
            assert_int_equal(st.masks, 0);
        }
        fx_close(f);
    }
    assert_true(met);
    fx_open(f, NULL);
    check_mask(f, 1, "w", n);
    fx_verify(f);
}

static void masks_take_their_task_vectors_along(void **state)
{
    struct fx *f = (struct fx *)*state;
    bool stored = false;
    uint64_t n = 0;
    assert_true(put_mask(f, 1, "w", 70000));
    put_delta(f, 1, "w", 70000, 1u << 20, &stored);
    assert_true(stored);
    struct tv_derived_key pin = {TV_DELTA, score_of(1), "w"};
    assert_ok(tv_derived_pin(f->s, &pin, 1, &f->err), &f->err);
    assert_ok(tv_derived_evict_all(f->s, &n, &f->err), &f->err);
    assert_int_equal(n, 0);
    assert_ok(tv_derived_release(f->s, NULL, 0, &f->err), &f->err);
    assert_ok(tv_derived_evict_all(f->s, &n, &f->err), &f->err);
    assert_false(has(f, TV_MASK, 1, "w"));
    assert_false(has(f, TV_DELTA, 1, "w"));
    struct tv_store_stat st;
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.masks + st.task_vectors, 0);
    fx_verify(f);
}

/* Flips one byte of the data file where `word` of the mask lies. */
static void flip(struct fx *f, const void *needle, size_t n)
{
    char *data = NULL;
    size_t bytes = 0;
    char *path = tv_path_join(f->path, "data.mdb");
    assert_ok(tv_file_read(path, 1u << 30, &f->err, &data, &bytes), &f->err);
    char *at = (char *)memmem(data, bytes, needle, n);
    assert_non_null(at);
    const char wrong = (char)(*at ^ 4);
    const int fd = open(path, O_WRONLY);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, &wrong, 1, at - data), 1);
    assert_int_equal(close(fd), 0);
    tv_free(data);
    tv_free(path);
}

static unsigned n_found;

static void on_problem(void *arg, const char *object, const char *tensor,
                       const char *what)
{
    (void)arg;
    (void)object;
    n_found += strcmp(tensor, "layers.1.w") == 0 && strstr(what, "checksum");
}

static void damage_is_named(void **state)
{
    struct fx *f = (struct fx *)*state;
    tv_read *r = NULL;
    tv_mask *m = NULL;
    bool found = false;
    uint64_t freed = 0, n = 0;
    assert_true(put_mask(f, 1, "layers.1.w", 131072));
    uint64_t *w = words_of(1, 131072);
    fx_close(f);
    flip(f, w + 100, 64);
    tv_free(w);
    fx_open(f, NULL);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_code(tv_mask_open(r, score_of(1), "layers.1.w", &found, &f->err, &m),
                TV_E_CORRUPT, &f->err);
    assert_message(&f->err, "layers.1.w");
    assert_null(m);
    tv_read_end(r);
    n_found = 0;
    assert_code(tv_store_verify(f->s, 0, on_problem, NULL, NULL, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_int_equal(n_found, 1);
    assert_ok(tv_derived_evict_all(f->s, &n, &f->err), &f->err);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
    assert_true(put_mask(f, 1, "layers.1.w", 131072));
    check_mask(f, 1, "layers.1.w", 131072);
}

static void damaged_statistics_are_named(void **state)
{
    struct fx *f = (struct fx *)*state;
    unsigned char bytes[65536], got[65536];
    tv_read *r = NULL;
    bool found = false;
    uint64_t freed = 0, n = 0, n_rows = 0;
    assert_true(put_stat(f, 1, "layers.1.w", TV_F64, 8192, 1u << 20));
    fx_bytes(1, bytes, sizeof bytes);
    fx_close(f);
    flip(f, bytes + 800, 64);
    fx_open(f, NULL);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_code(tv_stat_read(r, score_of(1), "layers.1.w", TV_F64, 8192, &found,
                             &n_rows, got, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_message(&f->err, "layers.1.w");
    tv_read_end(r);
    n_found = 0;
    assert_code(tv_store_verify(f->s, 0, on_problem, NULL, NULL, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_int_equal(n_found, 1);
    assert_ok(tv_derived_evict_all(f->s, &n, &f->err), &f->err);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
    assert_true(put_stat(f, 1, "layers.1.w", TV_F64, 8192, 1u << 20));
    check_stat(f, 1, "layers.1.w", TV_F64, 8192);
}

static void charges_count(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_store_stat st;
    const uint64_t quota = 5u << 20;
    char *out = tv_path_join(f->dir, "out");
    char *work = tv_path_join(out, ".tvmerge");
    assert_ok(tv_store_quota_set(f->s, quota, &f->err), &f->err);
    assert_code(tv_store_charge_set(f->s, out, 5u << 20, &f->err), TV_E_NOSPACE,
                &f->err);
    assert_message(&f->err, "missing");
    assert_ok(tv_dir_make(out, &f->err), &f->err);
    assert_ok(tv_dir_make(work, &f->err), &f->err);
    assert_ok(tv_store_charge_set(f->s, out, 2u << 20, &f->err), &f->err);
    assert_ok(tv_store_charge_set(f->s, out, 3u << 20, &f->err), &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.charged_bytes, 3u << 20);
    /* What is left of the quota is the store's. */
    fx_close(f);
    fx_open(f, NULL);
    uint64_t n = 0;
    while (n < 64 && put_mask(f, n, "w", 1u << 20))
        n++;
    assert_true(n > 1 && n < 14);
    assert_code(fx_object(f->s, "m", 1, 20000, &f->err), TV_E_NOSPACE, &f->err);
    (void)fx_remove(f->s, "m", NULL);
    uint64_t used = 0;
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used + (3u << 20) <= quota);
    /* A larger one makes the file smaller; a reader would be in the way. */
    tv_read *r = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_code(tv_store_charge_set(f->s, out, 9u << 19, &f->err), TV_E_NOSPACE,
                &f->err);
    tv_read_end(r);
    fx_close(f);
    fx_open(f, NULL);
    uint64_t missing = 1;
    assert_ok(tv_store_charge_check(f->s, 9u << 19, &missing, &f->err),
              &f->err);
    assert_int_equal(missing, 0);
    assert_ok(tv_store_charge_set(f->s, out, 9u << 19, &f->err), &f->err);
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used + (9u << 19) <= quota);
    assert_true(has(f, TV_MASK, n - 1, "w") || n < 3);
    assert_false(has(f, TV_MASK, 0, "w"));
    fx_verify(f);
    assert_ok(tv_store_charge_check(f->s, quota, &missing, &f->err), &f->err);
    assert_true(missing > 0);
    assert_code(tv_store_charge_set(f->s, out, quota, &f->err), TV_E_NOSPACE,
                &f->err);
    /* The run has ended without saying so: it does not count any more, and the
     * next charge forgets it. */
    assert_ok(tv_dir_remove(work, &f->err), &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.charged_bytes, 0);
    char *other = tv_path_join(f->dir, "other");
    char *other_work = tv_path_join(other, ".tvmerge");
    assert_ok(tv_dir_make(other, &f->err), &f->err);
    assert_ok(tv_dir_make(other_work, &f->err), &f->err);
    assert_ok(tv_store_charge_set(f->s, other, 1u << 20, &f->err), &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.charged_bytes, 1u << 20);
    assert_ok(tv_store_charge_clear(f->s, other, &f->err), &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.charged_bytes, 0);
    fx_verify(f);
    tv_free(other_work);
    tv_free(other);
    tv_free(work);
    tv_free(out);
}

/* Stores, reads, pins and drops items: what every failing allocation must
 * leave whole. */
static enum tv_err whole_life(void *arg, struct tv_error *err)
{
    struct fx *f = (struct fx *)arg;
    enum tv_err rc = TV_OK;
    static uint64_t words[200000 / 64 + 1];
    tv_read *r = NULL;
    tv_mask *m = NULL;
    struct tv_derived_list *l = NULL;
    bool found = false, stat_found = false;
    uint64_t n = 0, n_rows = 0;
    float sums[100] = {1}, got[100];
    struct tv_derived_new p = mask_new(1, "w", words, 200000);
    struct tv_derived_new q = {
        .key = {.kind = TV_STAT, .score = score_of(1), .tensor = "w"},
        .about = "{}",
        .n_elems = 100,
        .dtype = TV_F32,
        .values = sums};
    for (size_t i = 0; i < 200000 / 64; i++)
        words[i] = UINT64_C(0x1001001001001001) << (i % 7);
    TV_TRY(tv_derived_store(f->s, &p, 1, 1u << 16, 0, err));
    TV_TRY(tv_derived_store(f->s, &q, 1, 1u << 16, 0, err));
    TV_TRY(tv_derived_used(f->s, &q.key, 1, err));
    TV_TRY(tv_derived_pin(f->s, &p.key, 1, err));
    TV_TRY(tv_read_begin(f->s, err, &r));
    TV_TRY(tv_derived_list(r, err, &l));
    TV_TRY(tv_mask_open(r, p.key.score, "w", &found, err, &m));
    TV_TRY(tv_stat_read(r, q.key.score, "w", TV_F32, 100, &stat_found, &n_rows,
                        got, err));
    if (!found || !stat_found || l->n != 2 ||
        l->items[0].pinned == l->items[1].pinned)
        rc = tv_error_set(err, TV_E_INTERNAL, "it is not there");
out:
    tv_derived_list_free(l);
    tv_mask_close(m);
    tv_read_end(r);
    if (rc == TV_OK)
        rc = tv_derived_release(f->s, NULL, 0, err);
    if (rc == TV_OK)
        rc = tv_derived_evict_all(f->s, &n, err);
    return rc;
}

static void allocations_may_fail(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t n = faults_loop_alloc(whole_life, f, true);
    assert_in_range(n, 20, 10000);
    uint64_t freed = 0;
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
    assert_ok(whole_life(f, &f->err), &f->err);
}

/* A reader of old makes freed pages unusable: nothing is stored, nothing
 * grows. */
static void old_readers_do_not_push_it_over(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t quota = 2u << 20;
    tv_read *old = NULL;
    uint64_t used = 0;
    assert_ok(tv_store_quota_set(f->s, quota, &f->err), &f->err);
    for (uint64_t i = 0; i < 8; i++)
        assert_true(put_mask(f, i, "w", 1u << 20));
    fx_close(f);
    fx_open(f, NULL);
    assert_ok(tv_read_begin(f->s, &f->err, &old), &f->err);
    for (uint64_t i = 0; i < 20; i++)
        (void)put_mask(f, 100 + i, "w", 1u << 20);
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used <= quota);
    /* Nor is more thrown out than what would do. */
    uint64_t n = 0;
    for (uint64_t i = 0; i < 8; i++)
        n += has(f, TV_MASK, i, "w");
    assert_true(n >= 4);
    tv_read_end(old);
    fx_close(f);
    fx_open(f, NULL);
    bool all = true;
    for (uint64_t i = 0; i < 4; i++)
        all = put_mask(f, 200 + i, "w", 1u << 20) && all;
    assert_true(all);
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used <= quota);
    fx_verify(f);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, fx_setup, fx_teardown)
    const struct CMUnitTest tests[] = {
        T(masks_come_back),
        T(lists_are_in_layer_order),
        T(task_vectors_come_back),
        T(statistics_come_back),
        T(statistics_are_evicted_in_turn),
        T(the_longest_unused_goes_first),
        T(user_data_push_derived_data_out),
        T(a_reserve_spares_what_is_pinned),
        T(pins_end_with_their_process),
        T(what_is_read_stays),
        T(half_an_item_is_invisible),
        T(masks_take_their_task_vectors_along),
        T(damage_is_named),
        T(damaged_statistics_are_named),
        T(charges_count),
        T(old_readers_do_not_push_it_over),
        T(allocations_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
