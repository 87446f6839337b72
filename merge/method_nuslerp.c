/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_nuslerp.c - slerp of two models with weights, of whole tensors, rows
 * or columns; with a base, of task vectors.
 *
 * t = w_2 / (w_1 + w_2) (1/2 when the sum is below 1e-6 in size); with theta
 * the angle between the vectors v_1 and v_2 (lengths below 1e-7 count as 1e-7):
 *
 *   y = (sin((1-t) theta) v_1 + sin(t theta) v_2) / sin theta
 *   y = (1-t) v_1 + t v_2                 when 1 - cos^2 theta <= 1e-10
 *
 * Shoemake 1985 in mergekit's form, but for the last limit (1e-16 there, which
 * fp32 rounds to 'equal' anyway): rounding leaves opposite vectors, such as
 * two changes of a single entry, up to 1e-12 short of a cosine of -1, and
 * dividing by their sine would make results of any size. The vectors are the
 * whole tensor (nuslerp_flatten), or runs along the last dimension, or, with
 * nuslerp_row_wise, along the first one (mergekit's name for it).
 *
 * Sums along the first dimension are needed for each column of a matrix that
 * arrives in rows, split over workers. They are exact sums of products rounded
 * to a fixed point that the column's largest entries set, hence the same in any
 * order: one pass for the largest entries, one for the sums. A product is held
 * to 2^-41 of the largest one for columns of up to 2^20 entries.
 */
#include "compat_sums.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "gram.h"

enum { P_WEIGHT, P_ROW_WISE, P_FLATTEN, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_WEIGHT] = {.name = "weight",
                  .scope = TVM_NON_BASE,
                  .type = TVM_FLOAT,
                  .required = true,
                  .help = "share of this input"},
    [P_ROW_WISE] = {.name = "nuslerp_row_wise",
                    .scope = TVM_SHARED,
                    .type = TVM_BOOL,
                    .has_default = true,
                    .fallback = 0.0,
                    .help = "without nuslerp_flatten: vectors along the first "
                            "dimension, not the last"},
    [P_FLATTEN] = {.name = "nuslerp_flatten",
                   .scope = TVM_SHARED,
                   .type = TVM_BOOL,
                   .has_default = true,
                   .fallback = 1.0,
                   .help = "the whole tensor is one vector"},
};

#define NORM_MIN     1e-7
#define COLINEAR_MAX 1e-10

enum feed { WHOLE, ROWS, COLUMNS };

struct column { /* of one worker while measuring, then of all */
    float most[2];
    int64_t sum[3]; /* aa, bb, ab in units of the column */
};

struct nuslerp_state {
    struct tvm_gram gram;
    double coef[2];
    bool summing;          /* COLUMNS: the second pass */
    struct column *column; /* [n_workers][columns] */
    double *pair;          /* [columns][2] */
    float *row_delta;      /* [n_workers][2][TVM_BLOCK], ROWS */
};

static enum feed feed_of(const struct tvm_tensor *t)
{
    if (tvm_shared(t, P_FLATTEN) != 0.0 || t->rank < 2)
        return WHOLE;
    return tvm_shared(t, P_ROW_WISE) != 0.0 ? COLUMNS : ROWS;
}

static size_t columns_of(const struct tvm_tensor *t)
{
    /* A scalar has no first dimension to divide by. */
    return t->rank == 0 || t->n_elems == 0 ? 1
                                           : (size_t)(t->n_elems / t->shape[0]);
}

static double t_of(const struct tvm_tensor *t)
{
    double w[2] = {0, 0};
    size_t n = 0;

    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base)
            w[n++] = tvm_of(t, s, P_WEIGHT, N_PARAMS);
    return fabs(w[0] + w[1]) < 1e-6 ? 0.5 : w[1] / (w[0] + w[1]);
}

static int fold(const struct tvm_tensor *t)
{
    if (t->n_sources == 1)
        return 0;
    return tvm_donor_count(t) == 1 ? (t->base == 0 ? 1 : 0) : -1;
}

static uint64_t row_elems(const struct tvm_tensor *t)
{
    return feed_of(t) == ROWS && tvm_donor_count(t) == 2 ? tvm_row_elems(t) : 0;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct nuslerp_state *st)
{
    struct tvm_carver c = {base, 0};
    const struct tvm_tensor *t = job->tensor;
    const uint64_t w = job->n_workers;

    (void)tvm_carve(&c, 1, sizeof *st);
    switch (feed_of(t)) {
    case WHOLE:
        tvm_gram_carve(&st->gram, &c, job, 2, t->base >= 0);
        break;
    case ROWS:
        st->row_delta = tvm_carve(&c, w * 2 * TVM_BLOCK, sizeof *st->row_delta);
        break;
    case COLUMNS:
        st->column = tvm_carve(&c, w * columns_of(t), sizeof *st->column);
        st->pair = tvm_carve(&c, 2 * columns_of(t), sizeof *st->pair);
        break;
    }
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct nuslerp_state st;

    return lay_out(job, NULL, &st);
}

static void set_coefs(double aa, double bb, double ab, double t, double *coef)
{
    const double na = sqrt(aa);
    const double nb = sqrt(bb);
    double c =
        ab / (na > NORM_MIN ? na : NORM_MIN) / (nb > NORM_MIN ? nb : NORM_MIN);

    c = c > 1.0 ? 1.0 : c < -1.0 ? -1.0 : c;
    /* Written so that a NaN takes this branch. */
    if (!(1.0 - c * c > COLINEAR_MAX)) {
        coef[0] = 1.0 - t;
        coef[1] = t;
        return;
    }
    const double theta = acos(c);
    const double s = sin(theta);
    coef[0] = sin((1.0 - t) * theta) / s;
    coef[1] = sin(t * theta) / s;
}

/* ---- columns ------------------------------------------------------------- */

/* Products of a column are rounded to multiples of 2^-this. */
static int point_of(const struct column *c, size_t a, size_t b, uint64_t rows)
{
    int e = 0;
    int r = 0;

    (void)frexp((double)c->most[a] * (double)c->most[b], &e);
    (void)frexp((double)rows, &r);
    return 61 - e - r;
}

static void join_most(const struct tvm_job *job, struct nuslerp_state *st,
                      size_t columns)
{
    for (unsigned w = 1; w < job->n_workers; w++)
        for (size_t i = 0; i < columns; i++) {
            const struct column *more = &st->column[w * columns + i];
            for (int v = 0; v < 2; v++)
                if (more->most[v] > st->column[i].most[v])
                    st->column[i].most[v] = more->most[v];
        }
    for (unsigned w = 1; w < job->n_workers; w++)
        for (size_t i = 0; i < columns; i++)
            memcpy(st->column[w * columns + i].most, st->column[i].most,
                   sizeof(st->column[i].most));
}

static double column_sum(const struct tvm_job *job,
                         const struct nuslerp_state *st, size_t columns,
                         size_t i, size_t which)
{
    const size_t a = which == 1;
    const size_t b = which > 0;
    int64_t sum = 0;

    for (unsigned w = 0; w < job->n_workers; w++)
        sum += st->column[w * columns + i].sum[which];
    return ldexp((double)sum,
                 -point_of(&st->column[i], a, b, job->tensor->shape[0]));
}

static void measure_columns(struct tvm_job *job, const struct tvm_tile *tile,
                            const float *const *v, const float *base, size_t n)
{
    struct nuslerp_state *st = job->state;
    const size_t columns = columns_of(job->tensor);
    const uint64_t rows = job->tensor->shape[0];
    struct column *mine = st->column + tile->worker * columns;
    size_t at = (size_t)(tile->start % columns);

    for (size_t i = 0; i < n; i++, at = at + 1 == columns ? 0 : at + 1) {
        struct column *c = &mine[at];
        const double b = base ? (double)base[i] : 0.0;
        const double x[2] = {(double)v[0][i] - b, (double)v[1][i] - b};
        if (!st->summing) {
            for (int k = 0; k < 2; k++)
                if ((float)fabs(x[k]) > c->most[k])
                    c->most[k] = (float)fabs(x[k]);
            continue;
        }
        /* A column with an entry that is not finite has no angle. */
        if (!isfinite(c->most[0]) || !isfinite(c->most[1]))
            continue;
        const double p[3] = {x[0] * x[0], x[1] * x[1], x[0] * x[1]};
        for (size_t k = 0; k < 3; k++)
            if (isfinite(p[k]) && p[k] != 0.0)
                c->sum[k] +=
                    llrint(ldexp(p[k], point_of(c, k == 1, k > 0, rows)));
    }
}

static void set_pairs(struct tvm_job *job)
{
    struct nuslerp_state *st = job->state;
    const size_t columns = columns_of(job->tensor);
    const double t = t_of(job->tensor);

    for (size_t i = 0; i < columns; i++) {
        const struct column *c = &st->column[i];
        double *pair = &st->pair[2 * i];
        if (!isfinite(c->most[0]) || !isfinite(c->most[1])) {
            set_coefs(NAN, NAN, NAN, t, pair);
            continue;
        }
        set_coefs(column_sum(job, st, columns, i, 0),
                  column_sum(job, st, columns, i, 1),
                  column_sum(job, st, columns, i, 2), t, pair);
    }
}

/* ---- passes -------------------------------------------------------------- */

static bool next_phase(struct tvm_job *job)
{
    struct nuslerp_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const enum feed feed = feed_of(t);

    if (job->phase == 0) {
        (void)lay_out(job, st, st);
        return tvm_donor_count(t) == 2 && feed != ROWS;
    }
    if (feed == COLUMNS && !st->summing) {
        join_most(job, st, columns_of(t));
        st->summing = true;
        return true;
    }
    if (feed == COLUMNS) {
        set_pairs(job);
        return false;
    }
    const double *g = tvm_gram_sum(&st->gram, job);
    set_coefs(g[0], g[3], g[1], t_of(t), st->coef);
    return false;
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    const struct nuslerp_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *base = t->base >= 0 ? x[t->base] : NULL;
    const float *v[2];

    (void)tvm_donors(t, x, v);
    if (feed_of(t) == COLUMNS)
        measure_columns(job, tile, v, base, n);
    else
        tvm_gram_add(&st->gram, job, tile, v, base, n);
}

static void mix(const struct tvm_job *job, const double *coef,
                const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const float *v[2];
    const struct tvk_gta sum = {
        .n_donors = 2, .coef = coef, .weight = coef, .lambda = 1.0};

    (void)tvm_donors(t, x, v);
    if (t->base >= 0)
        job->k->gta(dst, x[t->base], v, NULL, &sum, n);
    else
        job->k->weighted_sum(dst, v, coef, 2, 1.0, n);
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct nuslerp_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const size_t columns = columns_of(t);
    const float *v[2];

    if (feed_of(t) == WHOLE) {
        mix(job, st->coef, x, dst, n);
        return;
    }
    (void)tvm_donors(t, x, v);
    size_t at = (size_t)(tile->start % columns);
    for (size_t i = 0; i < n; i++, at = at + 1 == columns ? 0 : at + 1) {
        const double *c = &st->pair[2 * at];
        const double b = t->base >= 0 ? (double)x[t->base][i] : 0.0;
        const double m =
            c[0] * ((double)v[0][i] - b) + c[1] * ((double)v[1][i] - b);
        dst[i] = t->base >= 0 && m == 0.0 ? x[t->base][i] : (float)(b + m);
    }
}

static void combine_row(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, float *dst,
                        size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const struct nuslerp_state *st = job->state;
    float *scratch = st->row_delta + (size_t)tile->worker * 2 * TVM_BLOCK;
    const float *v[2];
    double g[4];
    double coef[2];

    (void)row;
    (void)tvm_donors(t, x, v);
    tvm_gram_row(job->k, v, 2, t->base >= 0 ? x[t->base] : NULL, n, scratch, g);
    set_coefs(g[0], g[3], g[1], t_of(t), coef);
    mix(job, coef, x, dst, n);
}

/* ---- --compat mergekit ----------------------------------------------------
 * y = (f_0 v_0 + f_1 v_1) / by, or without `by` where the two are colinear. */

struct factors {
    float f[2], by; /* by 0: none */
};

struct compat_state {
    struct nuslerp_state columns;
    struct tvm_compat_sums sums;
    unsigned step;
    float norm[2];
    struct factors factors;
    float *delta;                   /* [n_workers][2][TVM_BLOCK] */
    float *column_norm;             /* [columns][2], COLUMNS */
    struct factors *column_factors; /* [columns], COLUMNS */
};

static size_t compat_lay_out(const struct tvm_job *job, void *base,
                             struct compat_state *st)
{
    struct tvm_carver c = {base, 0};
    const struct tvm_tensor *t = job->tensor;
    const size_t columns = columns_of(t);
    const uint64_t w = job->n_workers;

    (void)tvm_carve(&c, 1, sizeof *st);
    st->delta = tvm_carve(&c, w * 2 * TVM_BLOCK, sizeof *st->delta);
    if (feed_of(t) == WHOLE)
        tvm_compat_sums_carve(&st->sums, &c, job, 2);
    if (feed_of(t) == COLUMNS) {
        st->columns.column =
            tvm_carve(&c, w * columns, sizeof *st->columns.column);
        st->column_norm = tvm_carve(&c, 2 * columns, sizeof *st->column_norm);
        st->column_factors = tvm_carve(&c, columns, sizeof *st->column_factors);
    }
    return c.used;
}

static size_t compat_state_bytes(const struct tvm_job *job)
{
    struct compat_state st;

    return compat_lay_out(job, NULL, &st);
}

/* The two vectors of a block, from element `at` of x on. */
static void compat_vectors(const struct tvm_job *job,
                           const struct tvm_tile *tile, const float *const *x,
                           size_t at, const float **v, size_t n)
{
    const struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    float *d = st->delta + (size_t)tile->worker * 2 * TVM_BLOCK;

    (void)tvm_donors(t, x, v);
    for (size_t i = 0; i < 2; i++) {
        v[i] += at;
        if (t->base < 0)
            continue;
        tvm_compat_sub(job, d + i * TVM_BLOCK, v[i], x[t->base] + at, n);
        v[i] = d + i * TVM_BLOCK;
    }
}

static float compat_norm(const struct tvm_job *job, double squares)
{
    const float norm = tvm_compat_one(job, sqrt(squares));
    const float least = tvm_compat_one(job, NORM_MIN);

    return norm > least ? norm : least;
}

static double compat_dot(const struct tvm_job *job, const float *const *v,
                         const float *norm, size_t n)
{
    float a[TVM_BLOCK];
    float b[TVM_BLOCK];

    tvm_compat_div1(job, a, v[0], norm[0], n);
    tvm_compat_div1(job, b, v[1], norm[1], n);
    tvm_compat_mul(job, a, a, b, n);
    return tvm_compat_total(a, n);
}

static struct factors compat_factors(const struct tvm_job *job, double dot)
{
    const double t = t_of(job->tensor);
    float c = tvm_compat_one(job, dot);

    c = c > 1.0f ? 1.0f : c < -1.0f ? -1.0f : c;
    const float square = tvm_compat_one(job, (double)(c * c));
    if (tvm_compat_one(job, (double)(1.0f - square)) <= 1e-16f)
        return (struct factors){{(float)(1.0 - t), (float)t}, 0.0f};
    const float theta = tvm_compat_one(job, (double)acosf(c));
    const float a = tvm_compat_one(job, (double)((float)(1.0 - t) * theta));
    const float b = tvm_compat_one(job, (double)((float)t * theta));
    return (struct factors){{tvm_compat_one(job, (double)sinf(a)),
                             tvm_compat_one(job, (double)sinf(b))},
                            tvm_compat_one(job, (double)sinf(theta))};
}

/* Products of unit vectors are at most 1 in size. */
static void compat_measure_units(const struct tvm_job *job,
                                 const struct tvm_tile *tile,
                                 const float *const *v, size_t n)
{
    struct compat_state *st = job->state;
    const size_t columns = columns_of(job->tensor);
    struct column *mine = st->columns.column + (size_t)tile->worker * columns;
    size_t at = (size_t)(tile->start % columns);
    int rows = 0;

    (void)frexp((double)job->tensor->shape[0], &rows);
    for (size_t i = 0; i < n; i++, at = at + 1 == columns ? 0 : at + 1) {
        const float *norm = st->column_norm + 2 * at;
        const float a = tvm_compat_one(job, (double)(v[0][i] / norm[0]));
        const float b = tvm_compat_one(job, (double)(v[1][i] / norm[1]));
        const float p = tvm_compat_one(job, (double)(a * b));
        if (isfinite(p))
            mine[at].sum[2] += llrint(ldexp((double)p, 60 - rows));
    }
}

static void compat_column_norms(struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const size_t columns = columns_of(job->tensor);

    for (size_t i = 0; i < columns; i++) {
        for (size_t k = 0; k < 2; k++)
            st->column_norm[2 * i + k] = compat_norm(
                job, isfinite(st->columns.column[i].most[k])
                         ? column_sum(job, &st->columns, columns, i, k)
                         : NAN);
        for (unsigned w = 0; w < job->n_workers; w++)
            st->columns.column[w * columns + i].sum[2] = 0;
    }
}

static void compat_column_factors(struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const size_t columns = columns_of(job->tensor);
    int rows = 0;

    (void)frexp((double)job->tensor->shape[0], &rows);
    for (size_t i = 0; i < columns; i++) {
        int64_t sum = 0;
        for (unsigned w = 0; w < job->n_workers; w++)
            sum += st->columns.column[w * columns + i].sum[2];
        st->column_factors[i] =
            compat_factors(job, ldexp((double)sum, rows - 60));
    }
}

static bool compat_next_phase(struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const enum feed feed = feed_of(t);

    if (job->phase == 0) {
        (void)compat_lay_out(job, st, st);
        return tvm_donor_count(t) == 2 && feed != ROWS;
    }
    st->step++;
    if (feed == WHOLE && st->step == 1) {
        for (size_t i = 0; i < 2; i++)
            st->norm[i] =
                compat_norm(job, tvm_compat_sums_get(&st->sums, job, i));
        return true;
    }
    if (feed == WHOLE) {
        st->factors =
            compat_factors(job, tvm_compat_sums_get(&st->sums, job, 0));
        return false;
    }
    if (st->step == 1) {
        join_most(job, &st->columns, columns_of(t));
        st->columns.summing = true;
        return true;
    }
    if (st->step == 2) {
        compat_column_norms(job);
        return true;
    }
    compat_column_factors(job);
    return false;
}

static void compat_measure(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, size_t n)
{
    const struct compat_state *st = job->state;
    const float *v[2];

    compat_vectors(job, tile, x, 0, v, n);
    if (feed_of(job->tensor) == COLUMNS) {
        if (st->step < 2)
            measure_columns(job, tile, v, NULL, n);
        else
            compat_measure_units(job, tile, v, n);
        return;
    }
    if (st->step == 1) {
        tvm_compat_sums_put(&st->sums, job, tile, 0,
                            compat_dot(job, v, st->norm, n), n);
        return;
    }
    for (size_t i = 0; i < 2; i++)
        tvm_compat_sums_put(&st->sums, job, tile, i,
                            tvm_compat_squares(v[i], n), n);
}

static float compat_value(const struct tvm_job *job, const struct factors *f,
                          float a, float b)
{
    const float x = tvm_compat_one(job, (double)(f->f[0] * a));
    const float y = tvm_compat_one(job, (double)(f->f[1] * b));
    const float sum = tvm_compat_one(job, (double)(x + y));

    return f->by == 0.0f ? sum : tvm_compat_one(job, (double)(sum / f->by));
}

static void compat_mix(const struct tvm_job *job, const struct factors *f,
                       const float *const *v, float *dst, size_t n)
{
    float other[TVM_BLOCK];

    tvm_compat_mul1(job, dst, v[0], f->f[0], n);
    tvm_compat_mul1(job, other, v[1], f->f[1], n);
    tvm_compat_add(job, dst, dst, other, n);
    if (f->by != 0.0f)
        tvm_compat_div1(job, dst, dst, f->by, n);
}

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const size_t columns = columns_of(t);
    const float *v[2];

    if (tvm_donor_count(t) != 2) {
        memcpy(dst, x[fold(t)], n * sizeof *dst);
        return;
    }
    compat_vectors(job, tile, x, 0, v, n);
    if (feed_of(t) == WHOLE)
        compat_mix(job, &st->factors, v, dst, n);
    size_t at = (size_t)(tile->start % columns);
    for (size_t i = 0; feed_of(t) == COLUMNS && i < n;
         i++, at = at + 1 == columns ? 0 : at + 1)
        dst[i] = compat_value(job, &st->column_factors[at], v[0][i], v[1][i]);
    if (t->base >= 0)
        tvm_compat_add(job, dst, x[t->base], dst, n);
}

static void compat_combine_row(struct tvm_job *job, struct tvm_tile *tile,
                               uint64_t row, const float *const *x, float *dst,
                               size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const float *v[2];
    double sum[2] = {0.0, 0.0};
    double dot = 0.0;

    (void)row;
    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        compat_vectors(job, tile, x, at, v, m);
        for (size_t i = 0; i < 2; i++)
            sum[i] += tvm_compat_squares(v[i], m);
    }
    const float norm[2] = {compat_norm(job, sum[0]), compat_norm(job, sum[1])};
    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        compat_vectors(job, tile, x, at, v, m);
        dot += compat_dot(job, v, norm, m);
    }
    const struct factors f = compat_factors(job, dot);
    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        compat_vectors(job, tile, x, at, v, m);
        compat_mix(job, &f, v, dst + at, m);
        if (t->base >= 0)
            tvm_compat_add(job, dst + at, x[t->base] + at, dst + at, m);
    }
}

static const struct tvm_method compat = {
    .name = "nuslerp",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 2,
    .max_donors = 2,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_ONLY,
    .check = tvm_check_finite,
    .fold = fold,
    .state_bytes = compat_state_bytes,
    .next_phase = compat_next_phase,
    .measure = compat_measure,
    .combine = compat_combine,
    .row_elems = row_elems,
    .combine_row = compat_combine_row,
};

const struct tvm_method tvm_method_nuslerp = {
    .name = "nuslerp",
    .summary = "weighted spherical interpolation of two models or task vectors",
    .paper = "Shoemake 1985, doi 10.1145/325334.325242; mergekit",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 2,
    .max_donors = 2,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_ONLY,
    .check = tvm_check_finite,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = combine,
    .row_elems = row_elems,
    .combine_row = combine_row,
    .compat = &compat,
};
