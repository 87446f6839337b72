/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_statistics.c - sums over inputs of linear layers against those that
 * transformers' inputs give (tests/data/statistics, made by
 * tools/families/make_statistics.py): fused, shared and transposed projections,
 * more channels than a tile and more tokens than a chunk; for any number of
 * threads and any memory; and calls that must fail.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "test.h"

#include "cuda_fixture.h"
#include "npy.h"
#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/eval.h"

#define MAX_IDS 1280u

static const char *const models[] = {
    "families/llama", "families/phi3", "families/gpt2",
    "families/gpt_neox-serial", "quickstart/base"};
#define N_MODELS (sizeof(models) / sizeof(models[0]))

struct opened {
    tv_input *in;
    tve_model *m;
    int32_t ids[MAX_IDS];
    struct tve_window windows[8];
    size_t n_windows;
};

/* With "cuda" in front: the same on a device. */
static tvk_cuda *cuda;

static void open_model(struct opened *o, const char *name,
                       const struct tve_model_options *opt)
{
    struct tv_error err = {0};
    char *const dir = test_data(name);
    char relative[128];
    size_t seq = 256;
    struct tve_model_options with = {.n_threads = 0};

    if (opt)
        with = *opt;
    with.cuda = cuda;

    memset(o, 0, sizeof(*o));
    o->n_windows = 5;
    if (strncmp(name, "families/", 9) == 0) {
        struct npy ids;
        (void)snprintf(relative, sizeof(relative), "%s/ids.npy", name);
        char *const path = test_data(relative);
        npy_read(path, "<i8", &ids);
        o->n_windows = ids.shape[0];
        seq = ids.shape[1];
        assert_true(o->n_windows <= 8 && o->n_windows * seq <= MAX_IDS);
        for (size_t i = 0; i < o->n_windows * seq; i++)
            o->ids[i] = (int32_t)((const int64_t *)ids.data)[i];
        tv_free(ids.file);
        tv_free(path);
    } else {
        for (size_t i = 0; i < MAX_IDS; i++)
            o->ids[i] = (int32_t)((i * 37 + 11) % 2045);
    }
    for (size_t i = 0; i < o->n_windows; i++)
        o->windows[i] = (struct tve_window){o->ids + i * seq, seq, 1};
    assert_ok(tv_input_open_path(dir, &err, &o->in), &err);
    assert_ok(tve_model_open(o->in, NULL, 0, &with, &err, &o->m), &err);
    tv_free(dir);
}

static void close_model(struct opened *o)
{
    tve_model_close(o->m);
    tv_input_close(o->in);
}

struct collect { /* all sums, one input after the other */
    enum tve_stat kind;
    double *sums;
    size_t n, n_inputs;
    size_t channels[64];
    char first[64][96]; /* name of an input's first tensor */
    size_t n_tensors[64];
    uint64_t n_rows;
    size_t stop_at; /* inputs; 0: never */
};

static enum tv_err collect(void *arg, const struct tve_stat_input *in,
                           struct tv_error *err)
{
    struct collect *const c = arg;
    const size_t n = tve_stat_size(c->kind, in->n);

    if (c->stop_at > 0 && c->n_inputs == c->stop_at)
        return tv_error_set(err, TV_E_NOSPACE, "the callback has enough");
    assert_true(c->n_inputs < 64);
    c->channels[c->n_inputs] = in->n;
    c->n_tensors[c->n_inputs] = in->n_tensors;
    (void)snprintf(c->first[c->n_inputs++], sizeof(c->first[0]), "%s",
                   in->tensors[0]);
    c->n_rows = in->n_rows;
    c->sums = tv_realloc(c->sums, (c->n + n) * sizeof(double));
    assert_non_null(c->sums);
    assert_int_equal(in->kind, c->kind);
    assert_true(c->kind == TVE_STAT_GRAM ? !in->sums : !in->gram);
    for (size_t i = 0; i < n; i++)
        c->sums[c->n + i] =
            c->kind == TVE_STAT_GRAM ? (double)in->gram[i] : in->sums[i];
    c->n += n;
    return TV_OK;
}

static void run(struct opened *o, enum tve_stat kind, struct collect *c)
{
    struct tv_error err = {0};

    memset(c, 0, sizeof(*c));
    c->kind = kind;
    assert_ok(tve_statistics(o->m, o->windows, o->n_windows, kind, NULL,
                             collect, c, &err),
              &err);
}

static double at(const double *gram, size_t n, size_t i, size_t j)
{
    return i <= j ? gram[i * n - i * (i + 1) / 2 + j]
                  : gram[j * n - j * (j + 1) / 2 + i];
}

static double probe(size_t i)
{
    return ((double)((7 * i) % 11) - 5) / 5;
}

static void test_against_transformers(void **state)
{
    (void)state;
    for (size_t f = 0; f < N_MODELS; f++) {
        char relative[128];
        struct opened o;
        struct collect gram, diag;
        struct npy want;
        const double *g = NULL, *d = NULL, *w = NULL;

        (void)snprintf(relative, sizeof(relative), "statistics/%s.npy",
                       strrchr(models[f], '/') + 1);
        char *const path = test_data(relative);
        npy_read(path, "<f8", &want);
        open_model(&o, models[f], NULL);
        run(&o, TVE_STAT_GRAM, &gram);
        run(&o, TVE_STAT_DIAG, &diag);
        assert_int_equal(gram.n_rows, o.n_windows * o.windows[0].n);
        assert_int_equal(diag.n, want.shape[0]);
        g = gram.sums;
        d = diag.sums;
        w = want.data;
        for (size_t k = 0; k < gram.n_inputs; k++) {
            const size_t n = gram.channels[k];
            double off = 0, norm = 0, trace = 0;

            for (size_t i = 0; i < n; i++) {
                double sum = 0;
                for (size_t j = 0; j < n; j++)
                    sum += at(g, n, i, j) * probe(j);
                off += (sum - w[i]) * (sum - w[i]);
                norm += w[i] * w[i];
                trace += d[i];
                assert_true(fabs(at(g, n, i, i) - d[i]) <= 2e-6 * d[i]);
            }
            if (!(sqrt(off) <= 1e-5 * sqrt(norm)) || !(trace > 0))
                fail_msg("%s, %s: off by %g of %g", models[f], gram.first[k],
                         sqrt(off), sqrt(norm));
            g += tve_stat_size(TVE_STAT_GRAM, n);
            d += n;
            w += n;
        }
        tv_free(gram.sums);
        tv_free(diag.sums);
        tv_free(want.file);
        tv_free(path);
        close_model(&o);
    }
}

static void test_names(void **state)
{
    (void)state;
    static const struct {
        const char *first;
        size_t n, channels;
    } want[4] = {{"model.layers.2.self_attn.q_proj.weight", 3, 24},
                 {"model.layers.2.self_attn.o_proj.weight", 1, 40},
                 {"model.layers.2.mlp.gate_proj.weight", 2, 24},
                 {"model.layers.2.mlp.down_proj.weight", 1, 36}};
    struct opened o;
    struct collect c;

    open_model(&o, "families/llama", NULL);
    run(&o, TVE_STAT_DIAG, &c);
    assert_int_equal(c.n_inputs, 12);
    for (size_t i = 0; i < 4; i++) {
        assert_string_equal(c.first[8 + i], want[i].first);
        assert_int_equal(c.n_tensors[8 + i], want[i].n);
        assert_int_equal(c.channels[8 + i], want[i].channels);
    }
    tv_free(c.sums);
    close_model(&o);
}

/* Threads, a budget that leaves activations to the scratch file. */
static void test_same_bytes(void **state)
{
    (void)state;
    const size_t block =
        (3 * tve_stat_size(TVE_STAT_GRAM, 128) + /* rounded up to 64 bytes */
         tve_stat_size(TVE_STAT_GRAM, 352) + 4 * 8) *
        sizeof(double);
    /* products on AMX have bits of their own, where there are any */
    const struct tvk_table *const rows[] = {tvk_table_for(TVK_AVX512),
                                            tvk_table_best()};
    for (int turn = 0; turn < 4; turn++) {
        const int kind = turn % 2;
        const struct tvk_table *const k = rows[turn / 2];
        const struct tve_model_options ways[] = {
            {.n_threads = 1, .kernels = k},
            {.n_threads = 2, .kernels = k},
            {.n_threads = 3, .memory_bytes = block, .kernels = k},
            {.n_threads = 2, .kernels = turn < 2 ? tvk_table_for(TVK_REF) : k},
        };
        struct collect first = {.sums = NULL};
        for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
            struct opened o;
            struct collect c;

            open_model(&o, "quickstart/base", &ways[i]);
            run(&o, kind ? TVE_STAT_GRAM : TVE_STAT_DIAG, &c);
            close_model(&o);
            if (i == 0) {
                first = c;
                continue;
            }
            assert_int_equal(c.n, first.n);
            assert_memory_equal(c.sums, first.sums, c.n * sizeof(double));
            tv_free(c.sums);
        }
        tv_free(first.sums);
    }
}

/* Rotations that depend on the length of the window: each has its own, as if it
 * had come alone. */
static void test_lengths(void **state)
{
    (void)state;
    struct tv_error err = {0};
    struct opened o;
    struct collect both = {.kind = TVE_STAT_DIAG}, one[2];

    open_model(&o, "families/phi3-long", NULL);
    o.windows[1].n--;
    run(&o, TVE_STAT_DIAG, &both);
    for (size_t i = 0; i < 2; i++) {
        one[i] = (struct collect){.kind = TVE_STAT_DIAG};
        assert_ok(tve_statistics(o.m, &o.windows[i], 1, TVE_STAT_DIAG, NULL,
                                 collect, &one[i], &err),
                  &err);
        assert_int_equal(one[i].n, both.n);
    }
    for (size_t i = 0; i < both.n; i++) {
        const double sum = one[0].sums[i] + one[1].sums[i];
        assert_true(fabs(sum - both.sums[i]) <= 1e-12 * sum);
    }
    tv_free(both.sums);
    tv_free(one[0].sums);
    tv_free(one[1].sums);
    close_model(&o);
}

static void test_refused(void **state)
{
    (void)state;
    struct tv_error err = {0};
    const atomic_int cancel = 1;
    const struct tve_progress stop = {.cancel = &cancel};
    const struct tve_model_options small = {
        .n_threads = 1,
        .memory_bytes = (2 * tve_stat_size(TVE_STAT_GRAM, 24) +
                         tve_stat_size(TVE_STAT_GRAM, 40)) *
                        sizeof(double)};
    struct opened o;
    struct collect c = {.stop_at = 5};

    open_model(&o, "families/llama", NULL);
    assert_code(tve_statistics(o.m, o.windows, 0, TVE_STAT_DIAG, NULL, collect,
                               &c, &err),
                TV_E_INPUT, &err);
    assert_code(tve_statistics(o.m, o.windows, o.n_windows, TVE_STAT_DIAG, NULL,
                               collect, &c, &err),
                TV_E_NOSPACE, &err);
    assert_message(&err, "has enough");
    assert_int_equal(c.n_inputs, 5);
    c.stop_at = 0;
    assert_code(tve_statistics(o.m, o.windows, o.n_windows, TVE_STAT_DIAG,
                               &stop, collect, &c, &err),
                TV_E_INTERRUPTED, &err);
    o.ids[1] = 61;
    assert_code(tve_statistics(o.m, o.windows, o.n_windows, TVE_STAT_DIAG, NULL,
                               collect, &c, &err),
                TV_E_INPUT, &err);
    assert_message(&err, "61");
    tv_free(c.sums);
    close_model(&o);
    open_model(&o, "families/llama", &small);
    c = (struct collect){.kind = TVE_STAT_GRAM};
    assert_code(tve_statistics(o.m, o.windows, o.n_windows, TVE_STAT_GRAM, NULL,
                               collect, &c, &err),
                TV_E_BUDGET, &err);
    assert_message(&err, "layer 0");
    close_model(&o);
    assert_int_equal(tve_stat_size(TVE_STAT_GRAM, SIZE_MAX), 0);
    assert_int_equal(tve_stat_size(TVE_STAT_GRAM, SIZE_MAX / 2), 0);
}

static enum tv_err count(void *arg, const struct tve_stat_input *in,
                         struct tv_error *err)
{
    (void)err;
    *(size_t *)arg += in->n_tensors;
    return TV_OK;
}

/* Batches on the device: the same bits; too little for one: refused, with the
 * number, as planning does. */
static void test_against_less_memory(void **state)
{
    enum { N = 60, LENGTH = 48 };
    static int32_t ids[N * LENGTH];
    struct tve_window w[N];
    struct tv_error err = {0};
    char *const dir = test_data("families/llama");
    tvk_cuda *const roomy = cuda;

    (void)state;
    if (!cuda) {
        tv_free(dir);
        skip();
    }
    for (size_t i = 0; i < (size_t)N * LENGTH; i++)
        ids[i] = (int32_t)(i * 7919 % 61);
    for (size_t i = 0; i < N; i++)
        w[i] = (struct tve_window){ids + i * LENGTH, LENGTH, 1};
    for (int kind = 0; kind < 2; kind++) {
        struct collect first = {.sums = NULL};
        const size_t memory[] = {0, 9000000, 6000000};

        for (size_t i = 0; i < 3; i++) {
            struct tvk_cuda_options o = cuda_device_options();
            struct tve_model_options opt = {.n_threads = 2, .cuda = roomy};
            struct collect c = {.kind = kind ? TVE_STAT_GRAM : TVE_STAT_DIAG};
            struct tve_scratch scratch;
            tvk_cuda *tight = NULL;
            tv_input *in = NULL;
            tve_model *m = NULL;

            o.memory_bytes = memory[i];
            if (i > 0)
                assert_ok(tvk_cuda_open(&o, &err, &tight), &err);
            opt.cuda = tight ? tight : roomy;
            assert_ok(tv_input_open_path(dir, &err, &in), &err);
            assert_ok(tve_model_open(in, NULL, 0, &opt, &err, &m), &err);
            const enum tv_err planned = tve_calibration_scratch(
                m, c.kind, N, LENGTH, NULL, &err, &scratch);
            assert_int_equal(planned, i == 2 ? TV_E_BUDGET : TV_OK);
            if (i == 2)
                assert_message(&err, "--device-memory");
            tv_error_clear(&err);
            tv_alloc_peak_reset();
            const uint64_t before = tv_alloc_now();
            const enum tv_err rc =
                tve_statistics(m, w, N, c.kind, NULL, collect, &c, &err);
            assert_code(rc, i == 2 ? TV_E_BUDGET : TV_OK, &err);
            const uint64_t used = tv_alloc_peak() - before;
            /* Activations of layers are the device's, and not counted here. */
            if (i < 2) {
                assert_in_range(used, 1, scratch.heap + (128u << 10));
                assert_in_range(scratch.heap, 1, used + (128u << 10));
            }
            if (i == 1) {
                assert_int_equal(c.n, first.n);
                assert_memory_equal(c.sums, first.sums, c.n * sizeof(double));
            }
            tve_model_close(m);
            tv_input_close(in);
            tvk_cuda_close(tight);
            if (i == 0)
                first = c;
            else
                tv_free(c.sums);
        }
        tv_free(first.sums);
    }
    tv_free(dir);
}

/* Every allocation fails once. */
static void test_allocations(void **state)
{
    (void)state;
    const struct tve_model_options opt = {.n_threads = 1};
    struct tv_error err = {0};
    struct opened o;

    open_model(&o, "families/gpt2", &opt);
    for (uint64_t k = 1;; k++) {
        const uint64_t before = tv_alloc_now();
        size_t n = 0;

        tv_alloc_fail_at(k, 1);
        const enum tv_err rc = tve_statistics(
            o.m, o.windows, o.n_windows, TVE_STAT_GRAM, NULL, count, &n, &err);
        const uint64_t fired = tv_alloc_fired();
        tv_alloc_fail_at(0, 0);
        assert_int_equal(tv_alloc_now(), before);
        if (!fired) {
            assert_int_equal(rc, TV_OK);
            assert_int_equal(n, 3 * 4);
            assert_true(k > 10);
            break;
        }
        assert_int_equal(rc, TV_E_NOMEM);
    }
    close_model(&o);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_transformers),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_against_less_memory),
        cmocka_unit_test(test_allocations),
    };
    if (argc > 1 && strcmp(argv[1], "cuda") == 0)
        cuda = cuda_device_open();
    if (argc > 2)
        cmocka_set_test_filter(argv[2]);
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tvk_cuda_close(cuda);
    return failed;
}
