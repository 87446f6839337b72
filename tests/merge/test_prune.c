/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pruning one layer by its inputs' statistics: masks against sorting, pattern
 * counts, what error correction promises, and the ladder of dampings.
 */
#include "test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_fixture.h"
#include "prune.h"
#include "rng.h"
#include "tv/alloc.h"
#include "tv/layer.h"

#define ROWS 24u
#define COLS 200u
#define N    (ROWS * COLS)

/* With "cuda" in front: the same on a device. */
static tvk_cuda *cuda;

struct layer {
    float t[N], p[N];
    double diag[COLS];
    float gram[COLS * (COLS + 1) / 2];
};

static void again_rows(void *arg, size_t row, size_t n, float *dst)
{
    const struct layer *l = arg;
    memcpy(dst, l->t + row * COLS, n * COLS * sizeof *dst);
}

/* Inputs that differ in size; correlated unless `diagonal`. */
static struct layer *layer_open(uint64_t stream, bool diagonal)
{
    struct layer *l = tv_calloc(1, sizeof *l);
    struct rng r;
    rng_open(&r, stream);
    assert_non_null(l);
    for (size_t i = 0; i < N; i++)
        /* Few values, some of them 0: many are equal. */
        l->t[i] = (float)((int)rng_below(&r, 17) - 8) / 64.0f;
    for (unsigned s = 0; s < 400; s++) {
        float x[COLS];
        const float common = rng_normal(&r);
        for (size_t j = 0; j < COLS; j++)
            x[j] = (rng_normal(&r) + common) * (float)(1 + j % 7);
        size_t at = 0;
        for (size_t i = 0; i < COLS; i++)
            for (size_t j = i; j < COLS; j++, at++)
                if (!diagonal || i == j)
                    l->gram[at] += x[i] * x[j];
    }
    size_t at = 0;
    for (size_t i = 0; i < COLS; at += COLS - i, i++)
        l->diag[i] = (double)l->gram[at];
    return l;
}

static struct tvm_pruned prune(struct layer *l, const struct tvm_trim_rule *r)
{
    const struct tvm_stats stats = {.n = COLS,
                                    .diag =
                                        tvm_rule_needs_gram(r) ? NULL : l->diag,
                                    .gram = l->gram,
                                    .cuda = cuda};
    const struct tvm_prune_again again = {again_rows, l};
    struct tvm_pruned out;
    struct tv_error err;
    memcpy(l->p, l->t, sizeof l->p);
    assert_ok(tvm_prune(r, l->p, ROWS, COLS, &stats, &again, &out, &err), &err);
    uint64_t kept = 0;
    for (size_t i = 0; i < N; i++)
        kept += l->p[i] != 0.0f;
    assert_int_equal(out.n_kept, kept);
    return out;
}

/* tr((T-P) H (T-P)^T), H damped as the rule has it. */
static double loss(const struct layer *l, double damping)
{
    float *h = tv_alloc(COLS * COLS * sizeof *h);
    double sum = 0;
    assert_non_null(h);
    tvm_gram_unpack(h, l->gram, COLS);
    (void)tvk_gram_damp(h, COLS, damping);
    for (size_t r = 0; r < ROWS; r++)
        for (size_t i = 0; i < COLS; i++)
            for (size_t j = 0; j < COLS; j++)
                sum +=
                    ((double)l->t[r * COLS + i] - (double)l->p[r * COLS + i]) *
                    (double)h[i * COLS + j] *
                    ((double)l->t[r * COLS + j] - (double)l->p[r * COLS + j]);
    tv_free(h);
    return sum;
}

struct item {
    float score;
    size_t index;
};

static int by_score(const void *a, const void *b)
{
    const struct item *x = a;
    const struct item *y = b;
    if (x->score != y->score)
        return x->score < y->score ? 1 : -1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* Of the entries of a part, exactly the best ones are there, unchanged. */
static void check_part(const struct layer *l, size_t r0, size_t rows, size_t c0,
                       size_t cols, double density)
{
    struct item *items = tv_alloc(rows * cols * sizeof *items);
    const size_t n = rows * cols;
    size_t k = (size_t)(density * (double)n);
    assert_non_null(items);
    for (size_t i = 0; i < n; i++) {
        const size_t at = (r0 + i / cols) * COLS + c0 + i % cols;
        const double t = (double)l->t[at];
        items[i] = (struct item){(float)(t * t * l->diag[at % COLS]), at};
    }
    qsort(items, n, sizeof *items, by_score);
    for (size_t i = 0; i < n; i++) {
        const float want = i < (k ? k : 1) ? l->t[items[i].index] : 0.0f;
        if (l->p[items[i].index] != want)
            fail_msg("entry %zu of the order: %g instead of %g", i,
                     (double)l->p[items[i].index], (double)want);
    }
    tv_free(items);
}

static void test_masks(void **state)
{
    (void)state;
    struct layer *l = layer_open(1, false);
    for (unsigned d = 0; d < 4; d++) {
        static const double densities[] = {0.0001, 0.1, 0.5, 0.999};
        struct tvm_trim_rule r = {.density = densities[d],
                                  .calibrated = true,
                                  .score = TVM_SCORE_DIAGONAL};
        (void)prune(l, &r);
        check_part(l, 0, ROWS, 0, COLS, r.density);
        r.compare = TVM_COMPARE_ROW;
        (void)prune(l, &r);
        for (size_t row = 0; row < ROWS; row++)
            check_part(l, row, 1, 0, COLS, r.density);
        r.compare = TVM_COMPARE_BLOCK;
        (void)prune(l, &r);
        check_part(l, 0, ROWS, 0, 128, r.density);
        check_part(l, 0, ROWS, 128, COLS - 128, r.density);
    }
    tv_free(l);
}

static void test_patterns(void **state)
{
    (void)state;
    struct layer *l = layer_open(2, false);
    for (size_t i = 0; i < N; i++)
        l->t[i] = l->t[i] == 0.0f ? 1.0f : l->t[i];
    for (unsigned correct = 0; correct < 4; correct++) {
        const struct tvm_trim_rule r = {.calibrated = true,
                                        .score = correct ? TVM_SCORE_CHOLESKY
                                                         : TVM_SCORE_DIAGONAL,
                                        .n_kept = 2,
                                        .group = 4,
                                        .correct = (enum tvm_correct)correct,
                                        .damping = 0.01,
                                        .cg_steps = 2};
        (void)prune(l, &r);
        for (size_t i = 0; i < N; i += 4) {
            unsigned n = 0;
            for (size_t j = 0; j < 4; j++)
                n += l->p[i + j] != 0.0f;
            assert_int_equal(n, 2);
        }
    }
    tv_free(l);
}

/* Each step lowers the damped loss; masks are nested in density. */
static void test_correction(void **state)
{
    (void)state;
    struct layer *l = layer_open(3, false);
    float before[N] = {0};
    static const double densities[] = {0.1, 0.3, 0.6};
    for (unsigned d = 0; d < 3; d++) {
        struct tvm_trim_rule r = {.density = densities[d],
                                  .calibrated = true,
                                  .score = TVM_SCORE_DIAGONAL,
                                  .damping = 0.01,
                                  .cg_steps = 1};
        (void)prune(l, &r);
        const double mask = loss(l, 0.01);
        for (size_t i = 0; i < N; i++)
            assert_true(before[i] == 0.0f || l->p[i] != 0.0f);
        memcpy(before, l->p, sizeof before);
        r.correct = TVM_CORRECT_CG;
        (void)prune(l, &r);
        const double one = loss(l, 0.01);
        r.cg_steps = 4;
        assert_true(prune(l, &r).damping == 0.01);
        const double four = loss(l, 0.01);
        assert_true(one < mask && four < one);
        r.score = TVM_SCORE_CHOLESKY;
        r.correct = TVM_CORRECT_OBS;
        (void)prune(l, &r);
        const double obs = loss(l, 0.01);
        r.correct = TVM_CORRECT_OBS_CG;
        (void)prune(l, &r);
        assert_true(obs < mask && loss(l, 0.01) < obs);
        r.correct = TVM_CORRECT_NONE;
        (void)prune(l, &r);
        const double plain = loss(l, 0.01);
        r.rescale = true;
        (void)prune(l, &r);
        assert_true(loss(l, 0.01) < plain);
    }
    tv_free(l);
}

/* Without correlation nothing can make up for anything. */
static void test_diagonal(void **state)
{
    (void)state;
    struct layer *l = layer_open(4, true);
    float *obs = tv_alloc(sizeof l->p);
    struct tvm_trim_rule r = {.density = 0.3,
                              .calibrated = true,
                              .score = TVM_SCORE_CHOLESKY,
                              .correct = TVM_CORRECT_OBS,
                              .damping = 0.01};
    assert_non_null(obs);
    (void)prune(l, &r);
    memcpy(obs, l->p, sizeof l->p);
    for (size_t i = 0; i < N; i++)
        assert_true(obs[i] == 0.0f || obs[i] == l->t[i]);
    r.correct = TVM_CORRECT_CG;
    r.cg_steps = 3;
    (void)prune(l, &r);
    for (size_t i = 0; i < N; i++)
        assert_true(l->p[i] == 0.0f || l->p[i] == l->t[i]);
    tv_free(obs);
    tv_free(l);
}

static void test_ladder(void **state)
{
    (void)state;
    struct layer *l = layer_open(5, false);
    const struct tvm_trim_rule r = {.density = 0.3,
                                    .calibrated = true,
                                    .score = TVM_SCORE_CHOLESKY,
                                    .correct = TVM_CORRECT_OBS,
                                    .damping = 0.01};
    static const double off[] = {0.5, 1.05, 1.5, 1e9};
    static const double want[] = {0.01, 0.1, 1.0, 0};
    static const unsigned raised[] = {0, 1, 2, 4};
    for (unsigned c = 0; c < 4; c++) {
        /* Pairs of inputs with this correlation: indefinite above 1. */
        size_t at = 0;
        for (size_t i = 0; i < COLS; i++)
            for (size_t j = i; j < COLS; j++, at++)
                l->gram[at] = i == j                     ? 2.0f
                              : j == i + 1 && i % 2 == 0 ? (float)(2 * off[c])
                                                         : 0.0f;
        const struct tvm_pruned got = prune(l, &r);
        assert_true(fabs(got.damping - want[c]) < 1e-12);
        assert_int_equal(got.uncorrected, want[c] == 0);
        assert_int_equal(got.n_raised, raised[c]);
        assert_int_equal(got.n_unseen, 0);
        assert_true(got.n_kept > 0);
    }
    tv_free(l);
}

/* An input that was never seen competes by magnitude. */
static void test_dead(void **state)
{
    (void)state;
    struct layer *l = layer_open(6, false);
    const struct tvm_trim_rule r = {
        .density = 0.1, .calibrated = true, .score = TVM_SCORE_DIAGONAL};
    double sum = 0;
    l->diag[5] = 0;
    for (size_t j = 0; j < COLS; j++)
        sum += l->diag[j];
    (void)prune(l, &r);
    l->diag[5] = sum / (COLS - 1);
    check_part(l, 0, ROWS, 0, COLS, r.density);
    tv_free(l);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_masks),      cmocka_unit_test(test_patterns),
        cmocka_unit_test(test_correction), cmocka_unit_test(test_diagonal),
        cmocka_unit_test(test_ladder),     cmocka_unit_test(test_dead),
    };
    if (argc > 1 && strcmp(argv[1], "cuda") == 0)
        cuda = cuda_device_open();
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tvk_cuda_close(cuda);
    return failed;
}
