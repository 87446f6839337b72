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
 *
 * With --compat mergekit every step is rounded to the compute dtype, sums of
 * rounded terms may be negative (importances order by sign then), and of large
 * tensors mergekit's own samples are taken.
 */
#include "compat.h"
#include "method.h"
#include "mt.h"

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
    uint32_t *hist; /* [n_workers][hist_words]; HIGH uses TVK_HIST_HI of them */
    double *exps;   /* [n_workers][2][row] */
    uint32_t *samples; /* [SAMPLES] elements, ascending; NULL: all */
};

/* Of mergekit: how many it looks at when there are more, and from how many on
 * torch takes two numbers of its generator for each. */
#define SAMPLES   1000000u
#define WIDE_FROM (UINT64_C(1) << 28)

/* Does the tensor go by mergekit's roundings? */
static bool is_compat(const struct tvm_tensor *t)
{
    return t->compute != TV_DTYPE_NONE;
}

static bool is_sampled(const struct tvm_tensor *t)
{
    return is_compat(t) && t->n_elems > SAMPLES;
}

/* What LOW finds: 15 bits of a magnitude, or 16 of a number with its sign. */
static unsigned low_bits(const struct tvm_tensor *t)
{
    return is_compat(t) ? 16 : 15;
}

static size_t hist_words(const struct tvm_tensor *t)
{
    return (size_t)QUARTILES << low_bits(t);
}

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
    st->hist = tvm_carve(&c, job->n_workers * hist_words(job->tensor),
                         sizeof *st->hist);
    st->exps = tvm_carve(&c, 2 * job->n_workers * tvm_row_elems(job->tensor),
                         sizeof *st->exps);
    st->samples = is_sampled(job->tensor)
                      ? tvm_carve(&c, SAMPLES, sizeof *st->samples)
                      : NULL;
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct arcee_state st;

    return lay_out(job, NULL, &st);
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    if (t->n_elems > SAMPLES && !is_compat(t))
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

/* ---- mergekit's steps ---------------------------------------------------- */

/* p [n], in the compute dtype. torch's exp has errors of its own, which 16 bits
 * hide but for one element in 10^5. */
static void compat_softmax(const struct tvm_job *job, double *p, const float *x,
                           size_t n)
{
    const struct tvk_table *k = job->k;
    const enum tv_dtype c = job->tensor->compute;
    const float most = k->highest(x, n);
    float v[TVM_BLOCK];
    double sum = 0.0;

    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t here = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        for (size_t i = 0; i < here; i++)
            v[i] = x[at + i] - most;
        (void)k->softmax(p + at, v, 0.0, here);
        for (size_t i = 0; i < here; i++)
            sum += (double)(float)p[at + i];
    }
    const float by = 1.0f / (float)sum;
    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t here = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        for (size_t i = 0; i < here; i++)
            v[i] = (float)p[at + i] * by;
        tvm_compat_round(k, c, v, here);
        for (size_t i = 0; i < here; i++)
            v[i] += 1e-8f;
        tvm_compat_round(k, c, v, here);
        for (size_t i = 0; i < here; i++)
            p[at + i] = (double)v[i];
    }
}

static double compat_divergence(const struct tvm_job *job, const double *p,
                                const double *q, size_t n)
{
    const struct tvk_table *k = job->k;
    const enum tv_dtype c = job->tensor->compute;
    float v[TVM_BLOCK];
    double sum = 0.0;

    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t here = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        for (size_t i = 0; i < here; i++)
            v[i] = (float)p[at + i] / (float)q[at + i];
        tvm_compat_round(k, c, v, here);
        for (size_t i = 0; i < here; i++)
            v[i] = (float)tvk_log(v[i]);
        tvm_compat_round(k, c, v, here);
        for (size_t i = 0; i < here; i++)
            v[i] *= (float)p[at + i];
        tvm_compat_round(k, c, v, here);
        for (size_t i = 0; i < here; i++)
            sum += (double)v[i];
    }
    return (double)tvm_compat_round1(k, c, sum);
}

/* The first half of an importance, then the second but its rounding. */
static void compat_change(const struct tvm_job *job, float *out, const float *a,
                          const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = fabsf(a[i] - b[i]);
    tvm_compat_round(job->k, job->tensor->compute, out, n);
}

static void compat_times(float *out, float kl, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] *= kl;
}

/* Orders as numbers do, NaN last. */
static uint32_t key_of(float v)
{
    uint32_t bits = 0;

    if (isnan(v))
        return UINT32_MAX;
    memcpy(&bits, &v, sizeof(bits));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static float of_key(uint32_t key)
{
    const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float v = 0.0f;

    memcpy(&v, &bits, sizeof(bits));
    return v;
}

static float compat_threshold(const struct tvm_job *job, const float *quartile)
{
    const enum tv_dtype c = job->tensor->compute;
    float v = tvm_compat_round1(job->k, c, (double)(quartile[2] - quartile[0]));

    v = tvm_compat_round1(job->k, c, (double)(v * 1.5f));
    return tvm_compat_round1(job->k, c, (double)(quartile[1] + v));
}

static void count_one(const struct arcee_state *st, uint32_t *hist, float v)
{
    const uint32_t key = key_of(v);

    if (st->step == 1) {
        hist[key >> 16]++;
        return;
    }
    for (size_t i = 0; i < QUARTILES; i++)
        if (key >> 16 == st->hi[i])
            hist[i << 16 | (key & 0xffffu)]++;
}

/* The first sample from an element on. */
static size_t sample_from(const uint32_t *samples, uint64_t element)
{
    size_t low = 0;
    size_t high = SAMPLES;

    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (samples[middle] < element)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void compat_count(const struct tvm_job *job, const struct tvm_tile *tile,
                         const float *v, size_t n)
{
    const struct arcee_state *st = job->state;
    uint32_t *hist = st->hist + tile->worker * hist_words(job->tensor);

    if (!st->samples) {
        for (size_t i = 0; i < n; i++)
            count_one(st, hist, v[i]);
        return;
    }
    for (size_t s = sample_from(st->samples, tile->start);
         s < SAMPLES && st->samples[s] < tile->start + n; s++)
        count_one(st, hist, v[st->samples[s] - tile->start]);
}

/* Sorts by the bits from `bit` down. */
static void sort_samples(uint32_t *v, size_t n, uint32_t bit)
{
    while (n > 1 && bit > 0) {
        size_t low = 0;
        size_t high = n;
        while (low < high) {
            const uint32_t one = v[low];
            if (!(one & bit)) {
                low++;
                continue;
            }
            v[low] = v[--high];
            v[high] = one;
        }
        bit >>= 1;
        sort_samples(v, low, bit);
        v += low;
        n -= low;
    }
}

static uint64_t draws(const struct tvm_tensor *t)
{
    return !is_sampled(t) || t->n_sources != 2 ? 0
           : t->n_elems >= WIDE_FROM           ? 2 * SAMPLES
                                               : SAMPLES;
}

/* torch.randint */
static void draw_samples(const struct tvm_job *job, uint32_t *samples)
{
    const struct tvm_tensor *t = job->tensor;
    struct tvm_mt mt;

    tvm_mt_stream_seek(job->stream, t->draw_at, &mt);
    for (size_t i = 0; i < SAMPLES; i++) {
        uint64_t r = tvm_mt_next(&mt);
        if (t->n_elems >= WIDE_FROM)
            r = r << 32 | tvm_mt_next(&mt);
        samples[i] = (uint32_t)(r % t->n_elems);
    }
    sort_samples(samples, SAMPLES, 0x80000000u);
}

/* ---- passes -------------------------------------------------------------- */

static void measure_row(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, size_t n)
{
    struct arcee_state *st = job->state;
    const struct tvk_table *k = job->k;
    const float *b = x[job->tensor->base];
    const float *a = other(job, x);
    double *exp_a = st->exps + (size_t)tile->worker * 2 * n;
    double *exp_b = exp_a + n;

    if (is_compat(job->tensor)) {
        compat_softmax(job, exp_a, a, n);
        compat_softmax(job, exp_b, b, n);
        st->kl[row] = compat_divergence(job, exp_a, exp_b, n);
        return;
    }
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
    const bool compat = is_compat(job->tensor);
    uint64_t row = tile->start / len;
    uint64_t left = len - tile->start % len;

    if (compat)
        compat_change(job, out, a, b, n);
    for (size_t at = 0; at < n; row++, left = len) {
        const size_t here = n - at < left ? n - at : (size_t)left;
        if (compat)
            compat_times(out + at, (float)st->kl[row], here);
        else
            job->k->change_by(out + at, a + at, b + at, st->kl[row], here);
        at += here;
    }
    if (compat)
        tvm_compat_round(job->k, job->tensor->compute, out, n);
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
    const uint64_t n = st->samples ? SAMPLES : job->tensor->n_elems;
    const size_t words = hist_words(job->tensor);

    tvm_hist_join(st->hist, words, job->n_workers, TVK_HIST_HI);
    for (int i = 0; i < QUARTILES; i++) {
        uint64_t unused = 0;
        /* Rank from the top. */
        st->k[i] = n - (uint64_t)(at[i] * (double)(n - 1));
        st->hi[i] = tvm_hist_find(st->hist, TVK_HIST_HI, &st->k[i], &unused);
    }
    memset(st->hist, 0, job->n_workers * words * sizeof *st->hist);
}

static void after_low(struct tvm_job *job)
{
    struct arcee_state *st = job->state;
    const unsigned low = low_bits(job->tensor);
    const size_t words = hist_words(job->tensor);
    float quartile[QUARTILES];

    tvm_hist_join(st->hist, words, job->n_workers, (uint32_t)words);
    for (int i = 0; i < QUARTILES; i++) {
        uint64_t unused = 0;
        const uint32_t bits =
            st->hi[i] << low | tvm_hist_find(st->hist + ((size_t)i << low),
                                             1u << low, &st->k[i], &unused);
        if (is_compat(job->tensor))
            quartile[i] = of_key(bits);
        else
            memcpy(&quartile[i], &bits, sizeof(bits));
    }
    if (is_compat(job->tensor)) {
        st->threshold = compat_threshold(job, quartile);
        return;
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
        if (st->samples)
            draw_samples(job, st->samples);
        return true;
    }
    if (st->step == 0 && !is_compat(job->tensor))
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
    uint32_t *hist = st->hist + tile->worker * hist_words(job->tensor);
    float v[TVM_BLOCK];

    importance(job, tile, x, v, n);
    if (is_compat(job->tensor)) {
        compat_count(job, tile, v, n);
        return;
    }
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
    if (!is_compat(job->tensor)) {
        for (size_t i = 0; i < n; i++)
            dst[i] = v[i] >= st->threshold ? a[i] : b[i];
        return;
    }
    for (size_t i = 0; i < n; i++)
        dst[i] = a[i] - b[i];
    tvm_compat_round(job->k, job->tensor->compute, dst, n);
    for (size_t i = 0; i < n; i++)
        dst[i] = b[i] + dst[i] * (v[i] >= st->threshold ? 1.0f : 0.0f);
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
    .compat = &tvm_method_arcee_fusion,
    .compat_wide = true,
    .draws = draws,
};
