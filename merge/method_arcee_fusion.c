/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_arcee_fusion.c - takes over the entries whose importance stands out.
 *
 *   importance = |x - b| * KL(row),  KL(row) = sum p log(p / q) over the last
 *     dimension, p = softmax(x row) + 1e-8, q the same of the base
 *   threshold = median + 1.5 (third quartile - first quartile)
 *   y = x where importance >= threshold, else b
 *
 * with order statistics sorted[floor(q (n - 1))]. Arcee Fusion, arcee.ai 2025;
 * mergekit. Deviation: mergekit draws a million samples of larger tensors; here
 * the quartiles are exact for any size, by histograms of the bit patterns.
 *
 * Passes: rows (divergences), HIGH and LOW (quartiles), combine. Importances
 * are compared as fp32.
 */
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "select.h"

#define QUARTILES 3

struct arcee_state {
    unsigned step; /* 0 rows, 1 HIGH, 2 LOW */
    float threshold;
    uint64_t k[QUARTILES];
    uint32_t hi[QUARTILES];
    double *kl;     /* [n_rows] */
    uint32_t *hist; /* [n_workers][TVK_HIST_HI]; LOW: of three buckets */
    double *exps;   /* [n_workers][2][row] */
};

#define LOW_WORDS ((size_t)QUARTILES * TVK_HIST_LO)

static int fold(const struct tvm_tensor *t)
{
    return t->n_sources == 1 ? 0 : -1;
}

static uint64_t n_rows(const struct tvm_tensor *t)
{
    return t->n_elems / tvm_row_elems(t);
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct arcee_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    st->kl = tvm_carve(&c, n_rows(job->tensor), sizeof *st->kl);
    st->hist = tvm_carve(&c, job->n_workers * LOW_WORDS, sizeof *st->hist);
    st->exps = tvm_carve(&c, 2 * job->n_workers * tvm_row_elems(job->tensor),
                         sizeof *st->exps);
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct arcee_state st;

    return lay_out(job, NULL, &st);
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    if (t->n_elems > 1000000)
        tvm_problem_note(problems, t->name,
                         "exact quartiles; mergekit estimates them from a "
                         "million random samples");
    if (t->n_elems > UINT32_MAX)
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "arcee_fusion of a tensor with more than 2^32 elements "
                        "is not supported");
}

static const float *other(const struct tvm_job *job, const float *const *x)
{
    return x[1 - job->tensor->base];
}

static void measure_row(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, size_t n)
{
    struct arcee_state *st = job->state;
    const struct tvk_table *k = job->k;
    const float *b = x[job->tensor->base];
    const float *a = other(job, x);
    double *exp_a = st->exps + (size_t)tile->worker * 2 * n;
    double *exp_b = exp_a + n;
    const double sum_a = k->softmax(exp_a, a, (double)k->highest(a, n), n);
    const double sum_b = k->softmax(exp_b, b, (double)k->highest(b, n), n);

    st->kl[row] = k->divergence(exp_a, exp_b, sum_a, sum_b, n);
}

/* Importances of a block. */
static void importance(const struct tvm_job *job, const struct tvm_tile *tile,
                       const float *const *x, float *out, size_t n)
{
    const struct arcee_state *st = job->state;
    const uint64_t len = tvm_row_elems(job->tensor);
    const float *b = x[job->tensor->base];
    const float *a = other(job, x);
    uint64_t row = tile->start / len;
    uint64_t left = len - tile->start % len;

    for (size_t at = 0; at < n; row++, left = len) {
        const size_t here = n - at < left ? n - at : (size_t)left;
        job->k->change_by(out + at, a + at, b + at, st->kl[row], here);
        at += here;
    }
}

/* A divergence is not negative, but its rounded sum may be; then the order of
 * magnitudes is not that of the numbers. Rows without divergence count as 0. */
static void clamp_rows(struct tvm_job *job)
{
    struct arcee_state *st = job->state;
    const uint64_t rows = n_rows(job->tensor);

    for (uint64_t r = 0; r < rows; r++)
        if (st->kl[r] < 0.0)
            st->kl[r] = 0.0;
}

static void after_high(struct tvm_job *job)
{
    struct arcee_state *st = job->state;
    static const double at[QUARTILES] = {0.25, 0.5, 0.75};
    const uint64_t n = job->tensor->n_elems;

    tvm_hist_join(st->hist, LOW_WORDS, job->n_workers, TVK_HIST_HI);
    for (int i = 0; i < QUARTILES; i++) {
        uint64_t unused = 0;
        /* Rank from the top. */
        st->k[i] = n - (uint64_t)(at[i] * (double)(n - 1));
        st->hi[i] = tvm_hist_find(st->hist, TVK_HIST_HI, &st->k[i], &unused);
    }
    memset(st->hist, 0, job->n_workers * LOW_WORDS * sizeof *st->hist);
}

static void after_low(struct tvm_job *job)
{
    struct arcee_state *st = job->state;
    float quartile[QUARTILES];

    tvm_hist_join(st->hist, LOW_WORDS, job->n_workers, (uint32_t)LOW_WORDS);
    for (int i = 0; i < QUARTILES; i++) {
        uint64_t unused = 0;
        const uint32_t bits =
            st->hi[i] << 15 | tvm_hist_find(st->hist + (size_t)i * TVK_HIST_LO,
                                            TVK_HIST_LO, &st->k[i], &unused);
        memcpy(&quartile[i], &bits, sizeof(bits));
    }
    st->threshold = (float)((double)quartile[1] +
                            1.5 * ((double)quartile[2] - (double)quartile[0]));
}

static bool next_phase(struct tvm_job *job)
{
    struct arcee_state *st = job->state;

    if (job->tensor->n_sources != 2) {
        st->step = 3;
        return false;
    }
    if (job->phase == 0) {
        (void)lay_out(job, st, st);
        return true;
    }
    if (st->step == 0)
        clamp_rows(job);
    if (st->step == 1)
        after_high(job);
    if (st->step == 2)
        after_low(job);
    st->step++;
    return st->step < 3;
}

static bool row_pass(const struct tvm_job *job)
{
    const struct arcee_state *st = job->state;
    return st->step == 0;
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    struct arcee_state *st = job->state;
    uint32_t *hist = st->hist + tile->worker * LOW_WORDS;
    float v[TVM_BLOCK];

    importance(job, tile, x, v, n);
    if (st->step == 1) {
        job->k->hist_hi(hist, v, NULL, n);
        return;
    }
    for (size_t i = 0; i < QUARTILES; i++)
        job->k->hist_lo(hist + i * TVK_HIST_LO, st->hi[i], v, NULL, n);
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct arcee_state *st = job->state;
    float v[TVM_BLOCK];

    if (job->tensor->n_sources != 2) {
        memcpy(dst, x[0], n * sizeof *dst);
        return;
    }
    importance(job, tile, x, v, n);
    const float *a = other(job, x);
    const float *b = x[job->tensor->base];
    for (size_t i = 0; i < n; i++)
        dst[i] = v[i] >= st->threshold ? a[i] : b[i];
}

const struct tvm_method tvm_method_arcee_fusion = {
    .name = "arcee_fusion",
    .summary = "entries of the other model whose importance stands out",
    .paper = "Arcee Fusion, arcee.ai 2025; mergekit",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 1,
    .max_donors = 1,
    .missing = TVM_MISSING_COPY_ONLY,
    .check = check,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = combine,
    .row_elems = tvm_row_elems,
    .row_pass = row_pass,
    .measure_row = measure_row,
};
