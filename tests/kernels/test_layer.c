/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_layer.c - pruning and correcting one layer's task vector.
 *
 * U against H by its definition, the blockwise loop against OBS as Hassibi and
 * Stork write it (the inverse of what is left is downdated column by column, in
 * fp64), refinement against its own loss, and the counts that n:m and density
 * promise.
 */
#include "test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "rng.h"
#include "tv/layer.h"

/* Buffers of one case; freed by case_close. */
struct layer_case {
    size_t rows, cols;
    float *t, *h, *u, *p, *work;
    uint8_t *keep;
};

static void *zeroed(size_t n, size_t each)
{
    void *p = calloc(n + 1, each);

    assert_non_null(p);
    return p;
}

/* H = X^T X of 2 * cols correlated inputs, damped; `diagonal`: only that. */
static void case_open(struct layer_case *c, size_t rows, size_t cols,
                      int diagonal, uint64_t stream)
{
    struct rng r;
    float *x = zeroed(cols, sizeof *x);
    const size_t longest = rows > cols ? rows : cols;

    rng_open(&r, stream);
    *c = (struct layer_case){.rows = rows, .cols = cols};
    c->t = zeroed(rows * cols, sizeof *c->t);
    c->p = zeroed(rows * cols, sizeof *c->p);
    c->keep = zeroed(rows * cols, sizeof *c->keep);
    c->h = zeroed(cols * cols, sizeof *c->h);
    c->u = zeroed(tvk_gram_floats(cols), sizeof *c->u);
    c->work = zeroed(tvk_obs_work(rows, cols) + tvk_cg_work(longest) +
                         tvk_gram_work(cols),
                     sizeof *c->work);
    for (size_t i = 0; i < rows * cols; i++)
        c->t[i] = rng_normal(&r);
    for (size_t k = 0; k < 2 * cols; k++) {
        const float common = rng_normal(&r);

        for (size_t j = 0; j < cols; j++)
            x[j] = rng_normal(&r) + 0.5f * common;
        for (size_t i = 0; i < cols; i++)
            for (size_t j = 0; j < cols; j++)
                if (!diagonal || i == j)
                    c->h[i * cols + j] += x[i] * x[j];
    }
    (void)tvk_gram_damp(c->h, cols, 0.01);
    memcpy(c->u, c->h, cols * cols * sizeof *c->u);
    assert_int_equal(tvk_gram_factor(c->u, cols, c->work), 0);
    memcpy(c->p, c->t, rows * cols * sizeof *c->p);
    free(x);
}

static void case_close(struct layer_case *c)
{
    free(c->t);
    free(c->p);
    free(c->keep);
    free(c->h);
    free(c->u);
    free(c->work);
}

/* tr((T-P) H (T-P)^T) of row r in fp64. */
static double row_loss(const struct layer_case *c, size_t r)
{
    double sum = 0;

    for (size_t i = 0; i < c->cols; i++)
        for (size_t j = 0; j < c->cols; j++) {
            const size_t a = r * c->cols + i, b = r * c->cols + j;

            sum += ((double)c->t[a] - (double)c->p[a]) *
                   (double)c->h[i * c->cols + j] *
                   ((double)c->t[b] - (double)c->p[b]);
        }
    return sum;
}

static double loss(const struct layer_case *c)
{
    double sum = 0;

    for (size_t r = 0; r < c->rows; r++)
        sum += row_loss(c, r);
    return sum;
}

/* ---- the factor ---- */

static void test_factor(void **state)
{
    (void)state;
    static const size_t sizes[] = {1, 2, 7, 64, 150};

    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        struct layer_case c;
        const size_t n = sizes[s];

        case_open(&c, 1, n, 0, s);
        /* U^T U H = 1 */
        for (size_t i = 0; i < n; i++) {
            double row[150] = {0};

            for (size_t k = 0; k <= i; k++)
                for (size_t j = k; j < n; j++)
                    row[j] += (double)c.u[k * n + i] * (double)c.u[k * n + j];
            for (size_t j = 0; j < n; j++) {
                double sum = 0;

                for (size_t k = 0; k < n; k++)
                    sum += row[k] * (double)c.h[k * n + j];
                if (fabs(sum - (i == j)) > 1e-5)
                    fail_msg("n %zu: (U^T U H)[%zu,%zu] is %g", n, i, j, sum);
                if (j < i && c.u[i * n + j] != 0)
                    fail_msg("n %zu: U is not upper at %zu,%zu", n, i, j);
            }
        }
        case_close(&c);
    }
}

static void test_factor_refuses(void **state)
{
    (void)state;
    static const float bad[][4] = {
        {1, 2, 2, 1}, {0, 0, 0, 0}, {1, NAN, NAN, 1}, {INFINITY, 0, 0, 1}};
    float *const work = zeroed(tvk_gram_work(2), sizeof *work);
    float *const h = zeroed(tvk_gram_floats(2), sizeof *h);

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        memcpy(h, bad[i], sizeof bad[i]);
        assert_int_equal(tvk_gram_factor(h, 2, work), -1);
    }
    assert_int_equal(tvk_gram_factor(h, 0, work), 0);
    free(h);
    free(work);
}

/* Inputs that have nearly all in common: a few features, and `own` of each. */
static void common_gram(float *h, size_t n, float own, uint64_t stream)
{
    enum { FEATURES = 4 };
    struct rng r;
    float *const f = zeroed(n * FEATURES, sizeof *f);

    rng_open(&r, stream);
    for (size_t i = 0; i < n * FEATURES; i++)
        f[i] = rng_normal(&r);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++) {
            float sum = i == j ? own * (1.5f + f[i] / (1 + fabsf(f[i]))) : 0;

            for (size_t k = 0; k < FEATURES; k++)
                sum += f[i * FEATURES + k] * f[j * FEATURES + k];
            h[i * n + j] = h[j * n + i] = sum;
        }
    free(f);
}

/* inv = h^-1 by elimination without pivots. */
static void invert(const float *h, size_t n, double *inv)
{
    double *const a = zeroed(n * n, sizeof *a);

    for (size_t i = 0; i < n * n; i++) {
        a[i] = (double)h[i];
        inv[i] = i % (n + 1) == 0;
    }
    for (size_t k = 0; k < n; k++) {
        const double pivot = a[k * n + k];

        for (size_t j = 0; j < n; j++) {
            a[k * n + j] /= pivot;
            inv[k * n + j] /= pivot;
        }
        for (size_t i = 0; i < n; i++) {
            const double x = a[i * n + k];

            for (size_t j = 0; i != k && j < n; j++) {
                a[i * n + j] -= x * a[k * n + j];
                inv[i * n + j] -= x * inv[k * n + j];
            }
        }
    }
    free(a);
}

/* U^T U = H^-1 to 1e-5 where fp32 by itself gives 1e-3. */
static void test_factor_of_bad_conditions(void **state)
{
    (void)state;
    static const size_t sizes[] = {2, 3, 6, 7, 64, 131};

    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const size_t n = sizes[s];
        float *const h = zeroed(n * n, sizeof *h);
        float *const u = zeroed(tvk_gram_floats(n), sizeof *u);
        float *const work = zeroed(tvk_gram_work(n), sizeof *work);
        double *const inv = zeroed(n * n, sizeof *inv);
        double off = 0, all = 0;

        common_gram(h, n, 1e-4f, s);
        memcpy(u, h, n * n * sizeof *h);
        invert(h, n, inv);
        assert_int_equal(tvk_gram_factor(u, n, work), 0);
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++) {
                double sum = 0;

                for (size_t k = 0; k <= i && k <= j; k++)
                    sum += (double)u[k * n + i] * (double)u[k * n + j];
                off += (sum - inv[i * n + j]) * (sum - inv[i * n + j]);
                all += inv[i * n + j] * inv[i * n + j];
                assert_true(j >= i || u[i * n + j] == 0);
            }
        if (!(sqrt(off / all) <= 1e-6))
            fail_msg("n %zu: U^T U is %g off H^-1", n, sqrt(off / all));
        free(inv);
        free(work);
        free(u);
        free(h);
    }
}

/* y = U^T U x */
static void by_factor(const float *u, size_t n, const double *x, double *y)
{
    memset(y, 0, n * sizeof *y);
    for (size_t i = 0; i < n; i++) {
        double sum = 0;

        for (size_t j = i; j < n; j++)
            sum += (double)u[i * n + j] * x[j];
        for (size_t j = i; j < n; j++)
            y[j] += (double)u[i * n + j] * sum;
    }
}

/* Large ones, of both kinds of inverse. With M = U^T U, M x is off by M (x - H
 * M x). */
static void test_factor_of_large(void **state)
{
    (void)state;
    static const struct {
        size_t n;
        float own;
    } cases[] = {{512, 1.0f}, {777, 1.0f}, {512, 1e-3f}, {777, 1e-3f}};

    for (size_t s = 0; s < sizeof cases / sizeof *cases; s++) {
        const size_t n = cases[s].n;
        float *const h = zeroed(n * n, sizeof *h);
        float *const u = zeroed(tvk_gram_floats(n), sizeof *u);
        float *const work = zeroed(tvk_gram_work(n), sizeof *work);
        double *const v = zeroed(4 * n, sizeof *v);
        double *const x = v, *const y = v + n, *const r = y + n;
        double off = 0, all = 0;
        struct rng rng;

        common_gram(h, n, cases[s].own, s);
        memcpy(u, h, n * n * sizeof *h);
        assert_int_equal(tvk_gram_factor(u, n, work), 0);
        rng_open(&rng, s);
        for (size_t i = 0; i < n; i++)
            x[i] = (double)rng_normal(&rng);
        by_factor(u, n, x, y);
        for (size_t i = 0; i < n; i++) {
            r[i] = x[i];
            for (size_t j = 0; j < n; j++)
                r[i] -= (double)h[i * n + j] * y[j];
        }
        by_factor(u, n, r, r + n);
        for (size_t i = 0; i < n; i++) {
            off += r[n + i] * r[n + i];
            all += y[i] * y[i];
        }
        if (!(sqrt(off / all) <= 1e-5))
            fail_msg("n %zu: U^T U x is %g off", n, sqrt(off / all));
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < i; j++)
                assert_true(u[i * n + j] == 0);
        free(v);
        free(work);
        free(u);
        free(h);
    }
}

/* A dead column counts neither in the mean nor as free of charge. */
static void test_damp(void **state)
{
    (void)state;
    float h[9] = {2, 1, 0, 1, 4, 0, 0, 0, 0};
    const float want[9] = {2.3f, 1, 0, 1, 4.3f, 0, 0, 0, 3.3f};

    assert_true(fabs(tvk_gram_damp(h, 3, 0.1) - 0.3) < 1e-12);
    for (size_t i = 0; i < 9; i++)
        assert_true(fabsf(h[i] - want[i]) < 1e-6f);

    float none[4] = {0, 0, 0, 0};
    assert_true(tvk_gram_damp(none, 2, 0.5) == 0.5);
    assert_true(none[0] == 1.5f && none[3] == 1.5f);
}

/* ---- the loop ---- */

/* OBS by its definition: of the columns not yet passed, `inv` is the inverse of
 * their part of H; passing one takes a rank-1 term away. Masks are chosen per
 * block by t^2 / inv_jj, where inv_jj belongs to the columns j and after it. */
static void obs_by_definition(const struct layer_case *c, double density,
                              double *t)
{
    const size_t n = c->cols;
    double *inv = zeroed(n * n, sizeof *inv);
    double *first = zeroed(n, sizeof *first);
    double *rest = zeroed(n * n * n, sizeof *rest);
    uint8_t *gone = zeroed(c->rows * n, sizeof *gone);

    /* Gauss-Jordan on a positive definite matrix needs no pivoting. */
    for (size_t i = 0; i < n * n; i++)
        inv[i] = (double)c->h[i];
    for (size_t k = 0; k < n; k++) {
        const double pivot = 1 / inv[k * n + k];

        inv[k * n + k] = 1;
        for (size_t j = 0; j < n; j++)
            inv[k * n + j] *= pivot;
        for (size_t i = 0; i < n; i++) {
            const double f = inv[i * n + k];

            if (i == k)
                continue;
            inv[i * n + k] = 0;
            for (size_t j = 0; j < n; j++)
                inv[i * n + j] -= f * inv[k * n + j];
        }
    }
    for (size_t k = 0; k < n; k++) {
        memcpy(rest + k * n * n, inv, n * n * sizeof *inv);
        first[k] = inv[k * n + k];
        for (size_t i = k + 1; i < n; i++)
            for (size_t j = k + 1; j < n; j++)
                inv[i * n + j] -= inv[i * n + k] * inv[k * n + j] / first[k];
    }
    for (size_t b = 0; b < n; b += TVK_OBS_BLOCK) {
        const size_t end = b + TVK_OBS_BLOCK < n ? b + TVK_OBS_BLOCK : n;
        const size_t n_gone =
            (size_t)((double)(c->rows * (end - b)) * (1 - density));

        for (size_t k = 0; k < n_gone; k++) {
            size_t least = SIZE_MAX;
            double low = INFINITY;

            for (size_t r = 0; r < c->rows; r++)
                for (size_t j = b; j < end; j++) {
                    const size_t at = r * n + j;
                    const double score = t[at] * t[at] / first[j];

                    if (!gone[at] && score < low) {
                        low = score;
                        least = at;
                    }
                }
            assert_true(least != SIZE_MAX);
            gone[least] = 1;
        }
        for (size_t r = 0; r < c->rows; r++)
            for (size_t j = b; j < end; j++) {
                const double *left = rest + j * n * n;
                const double e = t[r * n + j] / first[j];

                if (!gone[r * n + j])
                    continue;
                for (size_t k = j; k < n; k++)
                    t[r * n + k] -= e * left[j * n + k];
                t[r * n + j] = 0;
            }
    }
    free(inv);
    free(first);
    free(rest);
    free(gone);
}

static void check_loop(size_t rows, size_t cols, double density)
{
    struct layer_case c;
    double off = 0, norm = 0;

    case_open(&c, rows, cols, 0, rows * 1000 + cols);
    double *want = zeroed(rows * cols, sizeof *want);
    for (size_t i = 0; i < rows * cols; i++)
        want[i] = (double)c.t[i];
    obs_by_definition(&c, density, want);
    const struct tvk_obs how = {.density = density};
    const uint64_t n = tvk_obs_prune(c.p, c.u, rows, cols, &how, c.work);
    uint64_t n_set = 0;
    for (size_t i = 0; i < rows * cols; i++) {
        off += pow((double)c.p[i] - want[i], 2);
        norm += want[i] * want[i];
        n_set += c.p[i] != 0;
    }
    if (sqrt(off) > 1e-4 * sqrt(norm))
        fail_msg("%zu x %zu at %g: off by %g", rows, cols, density,
                 sqrt(off / norm));
    assert_true(n == n_set);
    free(want);
    case_close(&c);
}

static void test_loop(void **state)
{
    (void)state;
    check_loop(1, 1, 0.0);
    check_loop(3, 5, 0.5);
    check_loop(9, 40, 0.2);
    check_loop(4, 128, 0.3);
    check_loop(5, 150, 0.1); /* two blocks, the last one short */
}

/* More columns than one group: nothing of it may get lost on the way. */
static void test_groups_of_blocks(void **state)
{
    (void)state;
    const size_t rows = 3, cols = TVK_OBS_GROUP + TVK_OBS_BLOCK + 9;
    struct layer_case c;
    uint64_t want = 0;

    case_open(&c, rows, cols, 0, 77);
    const struct tvk_obs how = {.density = 0.5};
    const uint64_t n = tvk_obs_prune(c.p, c.u, rows, cols, &how, c.work);
    for (size_t b = 0; b < cols; b += TVK_OBS_BLOCK) {
        const size_t left = cols - b;
        const size_t n_block =
            rows * (left < TVK_OBS_BLOCK ? left : TVK_OBS_BLOCK);

        want += n_block - n_block / 2;
    }
    assert_true(n == want);
    /* The errors of row r are what U carries: (T - P) = E U with E 0 where
     * kept, so (T - P) U^-1 is 0 there. H (T - P)^T at kept entries of the last
     * column is not disturbed by anything behind it: its gradient is 0. */
    for (size_t r = 0; r < rows; r++) {
        double *e = zeroed(cols, sizeof *e);

        for (size_t j = 0; j < cols; j++) {
            double sum = (double)c.t[r * cols + j] - (double)c.p[r * cols + j];

            for (size_t k = 0; k < j; k++)
                sum -= e[k] * (double)c.u[k * cols + j];
            e[j] = sum / (double)c.u[j * cols + j];
            if (c.p[r * cols + j] != 0 && fabs(e[j]) > 1e-3)
                fail_msg("row %zu column %zu was corrected by %g", r, j, e[j]);
        }
        free(e);
    }
    case_close(&c);
}

static void test_density_ends(void **state)
{
    (void)state;
    struct layer_case c;
    const struct tvk_obs all = {.density = 1}, none = {.density = 0};

    case_open(&c, 6, 33, 0, 5);
    assert_true(tvk_obs_prune(c.p, c.u, 6, 33, &all, c.work) == 6 * 33);
    assert_memory_equal(c.p, c.t, 6 * 33 * sizeof *c.p);
    assert_true(tvk_obs_prune(c.p, c.u, 6, 33, &none, c.work) == 0);
    for (size_t i = 0; i < 6 * 33; i++)
        assert_true(c.p[i] == 0);
    assert_true(tvk_obs_prune(c.p, c.u, 0, 33, &all, c.work) == 0);
    assert_true(tvk_obs_prune(c.p, c.u, 6, 0, &all, c.work) == 0);
    case_close(&c);
}

/* Independent inputs: what is kept stays as it was; and then masks of a lower
 * density lie inside those of a higher one. */
static void test_diagonal(void **state)
{
    (void)state;
    struct layer_case c;
    static const double densities[] = {0.05, 0.1, 0.3, 0.5, 0.9};

    case_open(&c, 17, 200, 1, 6);
    for (size_t d = 0; d < sizeof densities / sizeof *densities; d++) {
        const struct tvk_obs how = {.density = densities[d]};

        memcpy(c.p, c.t, 17 * 200 * sizeof *c.p);
        (void)tvk_obs_prune(c.p, c.u, 17, 200, &how, c.work);
        for (size_t i = 0; i < (size_t)17 * 200; i++) {
            assert_true(c.p[i] == 0 || c.p[i] == c.t[i]);
            assert_true(!c.keep[i] || c.p[i] != 0);
            c.keep[i] = c.p[i] != 0;
        }
    }
    case_close(&c);
}

/* Equal scores: the first in row-major order go. */
static void test_ties(void **state)
{
    (void)state;
    float work[70000];
    float t[4] = {1, -1, 1, 1};
    const float u[4] = {1, 0, 0, 1};
    const struct tvk_obs how = {.density = 0.25};

    assert_true(tvk_obs_work(2, 2) <= 70000);
    assert_true(tvk_obs_prune(t, u, 2, 2, &how, work) == 1);
    assert_true(t[0] == 0 && t[1] == 0 && t[2] == 0 && t[3] == 1);
}

static void test_n_of_m(void **state)
{
    (void)state;
    static const unsigned shapes[][2] = {
        {2, 4}, {4, 8}, {1, 2}, {3, 4}, {16, 64}};

    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        struct layer_case c;
        const struct tvk_obs how = {
            .density = 0.5, .n_pruned = shapes[s][0], .group = shapes[s][1]};

        case_open(&c, 5, 192, 0, 30 + s);
        (void)tvk_obs_prune(c.p, c.u, 5, 192, &how, c.work);
        for (size_t at = 0; at < (size_t)5 * 192; at += how.group) {
            unsigned n_zero = 0;

            for (size_t j = 0; j < how.group; j++)
                n_zero += c.p[at + j] == 0;
            assert_int_equal(n_zero, how.n_pruned);
        }
        case_close(&c);
    }
}

/* ---- refinement ---- */

static void test_refine(void **state)
{
    (void)state;
    struct layer_case c;
    const size_t rows = TVK_CG_ROWS, cols = 96;

    case_open(&c, rows, cols, 0, 8);
    const struct tvk_obs how = {.density = 0.3};
    (void)tvk_obs_prune(c.p, c.u, rows, cols, &how, c.work);
    for (size_t i = 0; i < rows * cols; i++)
        c.keep[i] = c.p[i] != 0;
    for (int start = 0; start < 2; start++) {
        float *from = zeroed(rows * cols, sizeof *from);
        double before[TVK_CG_ROWS];

        for (size_t i = 0; i < rows * cols; i++)
            from[i] = c.keep[i] ? (start == 0 ? c.t[i] : c.p[i]) : 0;
        memcpy(c.p, from, rows * cols * sizeof *from);
        for (size_t r = 0; r < rows; r++)
            before[r] = row_loss(&c, r);
        for (unsigned k = 0; k <= 40; k = k < 4 ? k + 1 : 2 * k) {
            memcpy(c.p, from, rows * cols * sizeof *from);
            tvk_cg_rows(c.p, c.t, c.keep, c.h, rows, cols, k, c.work);
            for (size_t r = 0; r < rows; r++) {
                const double now = row_loss(&c, r);

                if (now > before[r] * (1 + 1e-6))
                    fail_msg("row %zu after %u steps: %.9g, was %.9g", r, k,
                             now, before[r]);
                before[r] = now;
            }
            for (size_t i = 0; i < rows * cols; i++)
                assert_true(c.keep[i] || c.p[i] == 0);
        }
        /* At the optimum the gradient of a kept value is 0. */
        for (size_t r = 0; r < rows; r++)
            for (size_t j = 0; j < cols; j++) {
                double slope = 0;

                for (size_t i = 0; i < cols; i++)
                    slope += ((double)c.t[r * cols + i] -
                              (double)c.p[r * cols + i]) *
                             (double)c.h[i * cols + j];
                if (c.keep[r * cols + j] &&
                    fabs(slope) > 1e-3 * (double)c.h[j * cols + j])
                    fail_msg("row %zu column %zu has slope %g", r, j, slope);
            }
        free(from);
    }
    case_close(&c);
}

static void test_product(void **state)
{
    (void)state;
    struct layer_case c;
    double tt = 1, tp = 2, pp = 3;

    case_open(&c, 9, 50, 0, 9);
    for (size_t i = 0; i < 9 * 50; i += 2)
        c.p[i] = 0;
    tvk_gram_product(c.t, c.p, c.h, 9, 50, &tt, &tp, &pp, c.work);
    const double want = loss(&c);
    assert_true(fabs((tt - 1) - 2 * (tp - 2) + (pp - 3) - want) < 1e-4 * want);
    case_close(&c);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_factor),
        cmocka_unit_test(test_factor_refuses),
        cmocka_unit_test(test_factor_of_bad_conditions),
        cmocka_unit_test(test_factor_of_large),
        cmocka_unit_test(test_damp),
        cmocka_unit_test(test_loop),
        cmocka_unit_test(test_groups_of_blocks),
        cmocka_unit_test(test_density_ends),
        cmocka_unit_test(test_diagonal),
        cmocka_unit_test(test_ties),
        cmocka_unit_test(test_n_of_m),
        cmocka_unit_test(test_refine),
        cmocka_unit_test(test_product),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
