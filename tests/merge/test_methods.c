/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Small cases worked out by hand for the methods that are no task arithmetic,
 * and the properties of all of them that a user relies on.
 */
#include "test.h"

#include <math.h>
#include <string.h>

#include "fixture.h"
#include "tv/alloc.h"

/* Tensor v holds the cases; w is large enough for several tiles; s has no
 * dimension to divide by. */
static const struct fx_tensor shapes[] = {{"v", TV_F32, 2, {2, 4}},
                                          {"w", TV_F32, 2, {700, 257}},
                                          {"s", TV_F32, 0, {0}}};
#define N_SHAPES (sizeof(shapes) / sizeof(*shapes))

static float noise(size_t model, uint64_t i)
{
    return (float)sin((double)(i + 1) * (0.37 + 0.11 * (double)model)) * 0.01f;
}

/* Base 0; donors as in `rows` below, w: base and unrelated task vectors. */
static const float rows[4][8] = {
    {0, 0, 0, 0, 0, 0, 0, 0},
    {3, 0, 1, 0, 2, 0, 0, 0},
    {0, 4, 1, 0, 2, 0, 0, 1},
    {0, 0, -3, 0, 2, 0, 0, 0},
};

static float cases(size_t model, size_t tensor, uint64_t i)
{
    if (tensor == 0)
        return rows[model][i];
    return 0.1f * noise(7, i) + (model > 0 ? noise(model, i) : 0.0f);
}

/* Of all models that are no base: */
static size_t first_donor;

static float same(size_t model, size_t tensor, uint64_t i)
{
    return cases(model >= first_donor ? 1 : 0, tensor, i);
}

static float unchanged(size_t model, size_t tensor, uint64_t i)
{
    (void)model;
    return cases(2, tensor, i);
}

static void merge(struct fx *f, size_t n_models, fx_fill fill,
                  const char *method, int base, const struct fx_param *params,
                  size_t n_params)
{
    fx_open(f);
    for (size_t i = 0; i < n_models; i++)
        fx_model(f, shapes, N_SHAPES, fill);
    fx_plan(f, method, base, params, n_params, TV_DTYPE_NONE);
}

static void expect(struct fx *f, const double *want)
{
    uint64_t n = 0;
    float *y = fx_merged(f, "v", &n);

    assert_int_equal(n, 8);
    for (size_t i = 0; i < 8; i++)
        if (fabs((double)y[i] - want[i]) > 1e-6 * fabs(want[i]) + 1e-7)
            fail_msg("element %zu: %.9g instead of %.9g", i, (double)y[i],
                     want[i]);
    tv_free(y);
    fx_close(f);
}

static void nearswap_moves_where_near(void **state)
{
    const struct fx_param p[] = {{"t", FX_ALL, 2.0}};
    /* w = min(1, 2 / |d|): 3 -> 2/3 * 3, 1 and 2 -> taken whole. */
    const double want[8] = {2, 0, 1, 0, 2, 0, 0, 0};
    struct fx f;

    (void)state;
    merge(&f, 2, cases, "nearswap", 0, p, 1);
    expect(&f, want);
}

static void ram_averages_only_what_is_shared(void **state)
{
    const struct fx_param p[] = {{"epsilon", FX_ALL, 1.5}};
    /* |d| <= 1.5 is not active; the third column: only -3. */
    const double want[8] = {3, 4, -3, 0, 2, 0, 0, 0};
    struct fx f;

    (void)state;
    merge(&f, 4, cases, "ram", 0, p, 1);
    expect(&f, want);
}

static void consensus_keeps_what_matters_to_several(void **state)
{
    const struct fx_param p[] = {{"weight", 3, 0.5},
                                 {"mask_lambda", FX_ALL, 0.5},
                                 {"mask_lambda", 3, 2.0},
                                 {"lambda", FX_ALL, 0.25}};
    /* D: 3 0 0; 0 4 0; 1 1 -1.5; 2 2 1; 0 1 0. Sums 3, 4, 0.5, 5, 1.
     * Columns 0, 1, 7: one model each. Third: 1 >= 0.5 * 0.5 twice,
     * 1.5 < 2 * 2. Fifth: 2 >= 0.5 * 3 twice, 1 < 2 * 4. */
    const double want[8] = {0, 0, 0.125, 0, 1.25, 0, 0, 0};
    const double all[8] = {0.75, 1, 0.125, 0, 1.25, 0, 0, 0.25};
    struct fx f;

    (void)state;
    merge(&f, 4, cases, "consensus", 0, p, 4);
    expect(&f, want);
    /* One model is enough: nothing is dropped here. */
    const struct fx_param one[] = {
        p[0], p[1], p[2], p[3], {"agree", FX_ALL, 1}};
    merge(&f, 4, cases, "consensus", 0, one, 5);
    expect(&f, all);
}

static void emr_elects_and_rebuilds(void **state)
{
    /* Sums 3, 4, -1, 6, 1: the largest of their sign. */
    const double unified[8] = {1.5, 2, -1.5, 0, 1, 0, 0, 0.5};
    /* Model 2 keeps 4, 2 and 1: |d| is 4 + 1 + 2 + 1 in v, u there 7. The
     * factor is of the whole output: w and s count too. */
    const struct fx_param p[] = {{"lambda", FX_ALL, 0.5}};
    const struct fx_param task[] = {{"task", FX_ALL, 2}};
    struct fx f;
    uint64_t n = 0;
    double all = 0;
    double kept = 0;

    (void)state;
    merge(&f, 4, cases, "emr", 0, p, 1);
    expect(&f, unified);
    merge(&f, 4, cases, "emr", 0, task, 1);
    for (size_t t = 0; t < N_SHAPES; t++) {
        float *x[4];
        for (size_t m = 0; m < 4; m++)
            x[m] = fx_values(&f, m, shapes[t].name, &n);
        for (uint64_t i = 0; i < n; i++) {
            double d[4] = {0};
            double sum = 0;
            double u = 0;
            for (size_t m = 1; m < 4; m++) {
                d[m] = (double)x[m][i] - (double)x[0][i];
                sum += d[m];
            }
            for (size_t m = 1; m < 4; m++)
                if (d[m] * sum > 0 && fabs(d[m]) > fabs(u))
                    u = d[m];
            all += fabs(d[2]);
            kept += d[2] * u > 0 ? fabs(u) : 0;
        }
        for (size_t m = 0; m < 4; m++)
            tv_free(x[m]);
    }
    const double l = all / kept;
    const double want[8] = {0, 4 * l, 0, 0, 2 * l, 0, 0, l};
    expect(&f, want);
}

static void cabs_gives_each_place_to_one(void **state)
{
    /* Groups of 4, two places for model 1, one for the others. First group:
     * model 1 takes 3 and 1, model 2 takes 4, model 3 finds nothing but 0.
     * Second: model 1 takes 2, model 2 what is left, 1. */
    const struct fx_param p[] = {{"weight", 1, 1.0}, {"weight", 2, 0.5},
                                 {"weight", 3, 9.0}, {"m", FX_ALL, 4},
                                 {"n", FX_ALL, 1},   {"n", 1, 2}};
    const double want[8] = {3, 2, 1, 0, 2, 0, 0, 0.5};
    struct fx f;

    (void)state;
    merge(&f, 4, cases, "cabs", 0, p, 6);
    expect(&f, want);
}

/* How many places of each group each model has. */
static void cabs_is_balanced(void **state)
{
    const struct fx_param p[] = {
        {"weight", FX_ALL, 1.0}, {"m", FX_ALL, 32}, {"n", 1, 5}, {"n", 2, 11}};
    struct fx f;
    float *x[3];
    uint64_t n = 0;

    (void)state;
    merge(&f, 3, cases, "cabs", 0, p, 4);
    float *y = fx_merged(&f, "w", &n);
    for (size_t m = 0; m < 3; m++)
        x[m] = fx_values(&f, m, "w", &n);
    for (uint64_t g = 0; g < n; g += 32) {
        const uint64_t len = n - g < 32 ? n - g : 32;
        uint64_t count[3] = {0};
        for (uint64_t i = g; i < g + len; i++)
            count[y[i] == x[1][i] ? 1 : y[i] == x[2][i] ? 2 : 0]++;
        assert_int_equal(count[1], 5 * len / 32);
        assert_int_equal(count[2], 11 * len / 32);
    }
    tv_free(y);
    for (size_t m = 0; m < 3; m++)
        tv_free(x[m]);
    fx_close(&f);
}

/* Models 0 and 1, then the Fisher information of 1 and of 0. */
static float fishers(size_t model, size_t tensor, uint64_t i)
{
    static const float f[2][8] = {{1, 0, 2, 0, 3, 0, 0, 1},
                                  {3, 1, 2, 0, 1, 0, -1, 0}};
    if (tensor != 0)
        return model < 2 ? cases(model + 1, tensor, i) : fabsf(noise(model, i));
    return model < 2 ? rows[model + 1][i] : f[model - 2][i];
}

static void fisher_weighs_by_information(void **state)
{
    const struct fx_param p[] = {
        {"fisher_of", 2, 2}, {"fisher_of", 3, 1}, {"weight", 1, 2}};
    /* (F_a a + 2 F_b b) / (F_a + 2 F_b): a is rows[1] with {3, 1, ...}, b
     * rows[2] with {1, 0, ...}. Without information (a + 2 b) / 3. */
    const double want[8] = {9.0 / 5, 0, 1, 0, 2, 0, 0, 1};
    struct fx f;

    (void)state;
    merge(&f, 4, fishers, "fisher", -1, p, 3);
    expect(&f, want);
}

static float hole(size_t model, size_t tensor, uint64_t i)
{
    return model == 1 && i % 8 == 3 ? NAN : cases(model, tensor, i);
}

static void nan_is_not_hidden(void **state)
{
    static const char *const names[] = {"consensus", "emr", "cabs"};
    const struct fx_param p[] = {{"weight", FX_ALL, 1.0}};

    (void)state;
    for (size_t k = 0; k < 3; k++) {
        struct fx f;
        uint64_t n = 0;
        merge(&f, 3, hole, names[k], 0, p, 1);
        float *y = fx_merged(&f, "v", &n);
        for (size_t i = 0; i < 8; i++)
            assert_true((i == 3) == (isnan(y[i]) != 0));
        tv_free(y);
        fx_close(&f);
    }
}

static float doubled(size_t model, size_t tensor, uint64_t i)
{
    return model == 0 ? 0.0f : 4.0f * noise(model + tensor, i);
}

static float plain(size_t model, size_t tensor, uint64_t i)
{
    return doubled(model, tensor, i) / 4.0f;
}

static void ramplus_raises_what_is_alone(void **state)
{
    const struct fx_param p[] = {
        {"epsilon", FX_ALL, 0.5}, {"r", FX_ALL, 0.5}, {"alpha", FX_ALL, 0.8}};
    /* Shared to alone: 2 to 1, 2 to 2, 2 to nothing: all clipped to 0.8. */
    const double want[8] = {3 * 1.4, 4 * 1.4, -1.0 / 3.0, 0, 2, 0, 0, 1.4};
    struct fx f;

    (void)state;
    merge(&f, 4, cases, "ramplus_tl", 0, p, 3);
    expect(&f, want);
}

static void sce_selects_weighs_and_erases(void **state)
{
    const struct fx_param p[] = {{"select_topk", FX_ALL, 0.75}};
    /* Variances are positive in columns 0, 1, 2 of the first row and in the
     * last element; k = trunc(4 * 0.75) = 3 drops the last. Squares of what is
     * left: 9 + 1, 16 + 1, 9. The third column votes 1 + 1 - 3 < 0. */
    const double want[8] = {3, 4, -3, 0, 0, 0, 0, 0};
    struct fx f;

    (void)state;
    merge(&f, 4, cases, "sce", 0, p, 1);
    expect(&f, want);
}

static void sce_weighs_by_energy(void **state)
{
    /* Energies 14, 22, 13: where all agree the weights cancel. */
    const double want[8] = {3, 4, -3, 0, 2, 0, 0, 1};
    struct fx f;

    (void)state;
    merge(&f, 4, cases, "sce", 0, NULL, 0);
    expect(&f, want);
}

/* Opposite task vectors: variances are squares, all votes 0, which counts as
 * positive. Heads of blocks are what a selection may take a sample of. */
static float step_of_one, step_of_heads;

static float step_at(uint64_t i)
{
    const float v = i % 3 == 0 ? 0.0f : i % 5 == 1 ? 2.0f : 1.0f;
    return v * step_of_one * (i % 2048 < 256 ? step_of_heads : 1.0f);
}

static float opposite_steps(size_t model, size_t tensor, uint64_t i)
{
    (void)tensor;
    return model == 0 ? 0.0f : model == 1 ? step_at(i) : -step_at(i);
}

static void check_steps(float one, float heads)
{
    static const struct fx_tensor large[] = {{"w", TV_F32, 2, {2100, 1000}}};
    const struct fx_param p[] = {{"select_topk", FX_ALL, 0.5}};
    struct fx f;
    uint64_t n = 0;
    uint64_t n_nonzero = 0;
    uint64_t n_above = 0;

    step_of_one = one;
    step_of_heads = heads;
    fx_open(&f);
    for (size_t i = 0; i < 3; i++)
        fx_model(&f, large, 1, opposite_steps);
    fx_plan(&f, "sce", 0, p, 1, TV_DTYPE_NONE);
    f.plan.options.threads = 3;
    float *y = fx_merged(&f, "w", &n);
    for (uint64_t i = 0; i < n; i++) {
        n_nonzero += step_at(i) != 0.0f;
        n_above += step_at(i) > one;
    }
    uint64_t left = (uint64_t)((double)n_nonzero * 0.5) - n_above;
    for (uint64_t i = 0; i < n; i++) {
        const float v = step_at(i);
        const bool in = v > one || (v == one && left > 0);
        left -= v == one && left > 0;
        if (y[i] != (in ? v : 0.0f))
            fail_msg("element %llu of %g: %g", (unsigned long long)i, (double)v,
                     (double)y[i]);
    }
    tv_free(y);
    fx_close(&f);
}

static void sce_of_equal_variances(void **state)
{
    (void)state;
    check_steps(1.0f, 1.0f);
    check_steps(1.1f, 1.0f);     /* no atom (select.h) */
    check_steps(1.0f, 0x1p-10f); /* a sample that misleads */
}

static void model_stock_by_tensor_and_row(void **state)
{
    /* Two donors. Tensor: <d1, d2> = 1 + 4, norms sqrt 14 and sqrt 22. Rows:
     * 1 / sqrt(10 * 17) and 4 / sqrt(4 * 5). */
    const double c[3] = {5 / sqrt(14.0 * 22.0), 1 / sqrt(170.0),
                         4 / sqrt(20.0)};
    struct fx f;

    (void)state;
    for (int by_row = 0; by_row < 2; by_row++) {
        const struct fx_param p[] = {{"filter_wise", FX_ALL, by_row}};
        double want[8];
        for (size_t i = 0; i < 8; i++) {
            const double cos = by_row ? c[1 + i / 4] : c[0];
            want[i] = 2 * cos / (1 + cos) *
                      ((double)rows[1][i] + (double)rows[2][i]) / 2;
        }
        merge(&f, 3, cases, "model_stock", 0, p, 1);
        expect(&f, want);
    }
}

/* Slerp with t = 1/4 of (a, b) given their products. */
static double arc(double aa, double bb, double ab, double a, double b)
{
    const double th = acos(ab / sqrt(aa * bb));
    return (sin(0.75 * th) * a + sin(0.25 * th) * b) / sin(th);
}

static void nuslerp_by_tensor_row_and_column(void **state)
{
    struct fx f;

    (void)state;
    for (int mode = 0; mode < 3; mode++) {
        const struct fx_param p[] = {{"weight", 1, 3.0},
                                     {"weight", 2, 1.0},
                                     {"nuslerp_flatten", FX_ALL, mode == 0},
                                     {"nuslerp_row_wise", FX_ALL, mode == 2}};
        double want[8];
        for (size_t i = 0; i < 8; i++) {
            const double a = (double)rows[1][i];
            const double b = (double)rows[2][i];
            if (mode == 0)
                want[i] = arc(14, 22, 5, a, b);
            else if (mode == 1)
                want[i] = i < 4 ? arc(10, 17, 1, a, b) : arc(4, 5, 4, a, b);
            else
                /* Columns: (3,2) (0,2); (0,0) (4,0); (1,0) twice; (0,0) (0,1).
                 * An empty vector makes no angle: cos 0. */
                want[i] = i % 4 == 0   ? arc(13, 4, 4, a, b)
                          : i % 4 == 2 ? 0.75 * a + 0.25 * b
                                       : sin(0.75 * acos(0.0)) * a +
                                             sin(0.25 * acos(0.0)) * b;
        }
        merge(&f, 3, cases, "nuslerp", 0, p, 4);
        expect(&f, want); /* the base is 0 */
    }
}

/* Two opposite changes of one entry of a column: no angle can be told from
 * their cosine, so they are averaged, whatever the rounding of the sums. */
static float opposite(size_t model, size_t tensor, uint64_t i)
{
    const uint64_t column = i % 257;
    const float b = noise(3, i);

    if (tensor != 1 || model == 0 || i / 257 != column)
        return b;
    return b + (model == 1 ? 1.0f : -0.7f) * noise(5, i + 1);
}

static void nuslerp_of_opposite_columns_stays_between(void **state)
{
    struct fx f;
    uint64_t n = 0;

    (void)state;
    for (int by_column = 0; by_column < 2; by_column++) {
        const struct fx_param p[] = {{"weight", 1, 1.0},
                                     {"weight", 2, 1.0},
                                     {"nuslerp_flatten", FX_ALL, 0},
                                     {"nuslerp_row_wise", FX_ALL, by_column}};
        merge(&f, 3, opposite, "nuslerp", 0, p, 4);
        float *y = fx_merged(&f, "w", &n);
        for (uint64_t i = 0; i < n; i++)
            if (!(fabsf(y[i]) < 0.05f))
                fail_msg("element %llu is %g", (unsigned long long)i,
                         (double)y[i]);
        tv_free(y);
        fx_close(&f);
    }
}

static void karcher_of_two_is_the_middle(void **state)
{
    struct fx f;
    double want[8];

    (void)state;
    /* The middle of the arc, as long as the inputs are on average. */
    const double na = sqrt(14.0);
    const double nb = sqrt(22.0);
    const double m = sqrt(2 + 2 * 5 / (na * nb));
    for (size_t i = 0; i < 8; i++)
        want[i] = (na + nb) / 2 *
                  ((double)rows[1][i] / na + (double)rows[2][i] / nb) / m;
    fx_open(&f);
    /* Model 0 is empty: it has no direction and halves nothing but the
     * length. */
    for (int i = 0; i < 3; i++)
        fx_model(&f, shapes, N_SHAPES, cases);
    fx_plan(&f, "karcher", -1, NULL, 0, TV_DTYPE_NONE);
    for (size_t i = 0; i < 8; i++)
        want[i] *= 2.0 / 3.0;
    expect(&f, want);
}

static void multislerp_of_two_keeps_the_mean_length(void **state)
{
    const struct fx_param p[] = {{"weight", 1, 1.0}, {"weight", 2, 3.0}};
    struct fx f;
    double want[8];

    (void)state;
    /* The weighted mean of the unit vectors, T being 0, at the weighted
     * length. */
    const double na = sqrt(14.0);
    const double nb = sqrt(22.0);
    const double wa = 0.25 / na;
    const double wb = 0.75 / nb;
    const double m = sqrt(wa * wa * 14 + wb * wb * 22 + 2 * wa * wb * 5);
    for (size_t i = 0; i < 8; i++)
        want[i] = (0.25 * na + 0.75 * nb) *
                  (wa * (double)rows[1][i] + wb * (double)rows[2][i]) / m;
    merge(&f, 3, cases, "multislerp", 0, p, 2);
    expect(&f, want);
}

static void arcee_fusion_takes_what_stands_out(void **state)
{
    struct fx f;
    uint64_t n = 0;

    (void)state;
    merge(&f, 2, cases, "arcee_fusion", 0, NULL, 0);
    /* Importances: 3 k, k (row 1) and 2 q (row 2), the other five are 0:
     * quartiles 0, 0 and sorted[5]. */
    float *y = fx_merged(&f, "v", &n);
    for (size_t i = 0; i < 8; i++)
        assert_true(y[i] == rows[1][i] || y[i] == 0.0f);
    assert_true(y[0] == 3.0f);
    tv_free(y);
    fx_close(&f);
}

static void breadcrumbs_drops_both_ends(void **state)
{
    /* Eight entries: 3, 2, 1 and zeros. gamma drops one, density keeps two. */
    const struct fx_param p[] = {{"weight", FX_ALL, 1.0},
                                 {"density", FX_ALL, 0.25},
                                 {"gamma", FX_ALL, 0.125}};
    const double want[8] = {0, 0, 1, 0, 2, 0, 0, 0};
    struct fx f;

    (void)state;
    merge(&f, 2, cases, "breadcrumbs", 0, p, 3);
    expect(&f, want);
}

/* How often the smallest and the largest quarter of the rows stay. */
static void della_keeps_large_entries_more_often(void **state)
{
    const struct fx_param p[] = {{"weight", FX_ALL, 1.0},
                                 {"density", FX_ALL, 0.5},
                                 {"epsilon", FX_ALL, 0.4},
                                 {"rescale", FX_ALL, 0.0}};
    struct fx f;
    uint64_t n = 0;
    double kept[2] = {0, 0};
    double count[2] = {0, 0};

    (void)state;
    merge(&f, 2, cases, "della_linear", 0, p, 4);
    float *y = fx_merged(&f, "w", &n);
    float *b = fx_values(&f, 0, "w", &n);
    float *x = fx_values(&f, 1, "w", &n);
    /* |sin| is below sin(pi/8) for a quarter of the angles, above sin(3 pi/8)
     * for another. */
    for (uint64_t i = 0; i < n; i++) {
        const float d = fabsf(x[i] - b[i]);
        const int end = d < 0.003826f ? 0 : d > 0.009239f ? 1 : -1;
        if (end < 0)
            continue;
        count[end] += 1;
        kept[end] += y[i] != b[i];
    }
    assert_true(fabs(kept[0] / count[0] - 0.2) < 0.01);
    assert_true(fabs(kept[1] / count[1] - 0.8) < 0.01);
    tv_free(y);
    tv_free(b);
    tv_free(x);
    fx_close(&f);
}

/* ---- properties ---------------------------------------------------------- */

enum {             /* what holds, methods.md (e) */
       BASED = 1,  /* no change gives the base, bit for bit */
       EQUAL = 2,  /* equal donors give themselves */
       SCALES = 4, /* 2^k times the changes, 2^k times the result */
       NEGATES = 8,
       ORDER = 16 /* of the donors does not matter */
};

struct subject {
    const char *name;
    size_t n_models;
    int base;
    unsigned holds;
    struct fx_param params[3];
    size_t n_params;
};

#define WEIGHT(w)                                                              \
    {                                                                          \
        "weight", FX_ALL, w                                                    \
    }
#define DENSITY(d)                                                             \
    {                                                                          \
        "density", FX_ALL, d                                                   \
    }
#define GTA (BASED | SCALES | NEGATES | ORDER)
static const struct subject subjects[] = {
    {"linear", 3, -1, EQUAL | SCALES | NEGATES | ORDER, {WEIGHT(0.4)}, 1},
    {"slerp", 2, 0, EQUAL, {{"t", FX_ALL, 0.3}}, 1},
    {"passthrough", 1, -1, EQUAL | SCALES | NEGATES, {{NULL, 0, 0}}, 0},
    {"karcher", 3, -1, EQUAL | NEGATES | ORDER, {{NULL, 0, 0}}, 0},
    {"task_arithmetic", 3, 0, GTA | EQUAL, {WEIGHT(0.5)}, 1},
    {"ties", 4, 0, GTA, {WEIGHT(0.5), DENSITY(0.3)}, 2},
    {"ties", 4, 0, GTA, {WEIGHT(0.5), DENSITY(0.3), {"rescale", FX_ALL, 1}}, 3},
    {"ties",
     4,
     0,
     GTA,
     {WEIGHT(0.5), DENSITY(0.3), {"trim_scope", FX_ALL, 2}},
     3},
    {"dare_linear",
     3,
     0,
     BASED | SCALES | NEGATES,
     {WEIGHT(0.5), DENSITY(0.3)},
     2},
    {"dare_ties",
     4,
     0,
     BASED | SCALES | NEGATES,
     {WEIGHT(0.5), DENSITY(0.6)},
     2},
    {"nearswap", 2, 0, BASED | NEGATES, {{"t", FX_ALL, 0.001}}, 1},
    {"consensus", 4, 0, GTA, {{"mask_lambda", FX_ALL, 0.6}}, 1},
    {"emr", 4, 0, GTA | EQUAL, {WEIGHT(1)}, 1},
    {"emr", 4, 0, BASED | EQUAL | SCALES | NEGATES, {{"task", FX_ALL, 2}}, 1},
    {"cabs",
     3,
     0,
     BASED | SCALES | NEGATES,
     {WEIGHT(0.5), {"n", FX_ALL, 100}},
     2},
    {"fisher", 4, -1, EQUAL, {{"fisher_of", 2, 1}, {"fisher_of", 3, 2}}, 2},
    {"ram", 4, 0, GTA | EQUAL, {{"epsilon", FX_ALL, 0.0}}, 1},
    {"ramplus_tl", 4, 0, GTA | EQUAL, {{"epsilon", FX_ALL, 0.0}}, 1},
    {"sce",
     4,
     0,
     BASED | EQUAL | NEGATES | ORDER,
     {{"select_topk", FX_ALL, 1.0}},
     1},
    {"sce", 4, 0, BASED | NEGATES, {{"select_topk", FX_ALL, 0.3}}, 1},
    {"model_stock",
     4,
     0,
     BASED | EQUAL | NEGATES | ORDER,
     {{"filter_wise", FX_ALL, 0}},
     1},
    {"model_stock",
     4,
     0,
     BASED | EQUAL | NEGATES | ORDER,
     {{"filter_wise", FX_ALL, 1}},
     1},
    {"nuslerp",
     3,
     0,
     BASED | EQUAL,
     {{"weight", 1, 0.3}, {"weight", 2, 0.9}, {"nuslerp_flatten", FX_ALL, 1}},
     3},
    {"nuslerp",
     3,
     0,
     BASED | EQUAL,
     {{"weight", 1, 0.3}, {"weight", 2, 0.9}, {"nuslerp_flatten", FX_ALL, 0}},
     3},
    {"nuslerp", 3, 0, BASED | EQUAL | NEGATES | ORDER, {WEIGHT(0.5)}, 1},
    {"multislerp",
     3,
     0,
     BASED | EQUAL,
     {{"weight", 1, 0.3}, {"weight", 2, 0.9}},
     2},
    {"multislerp", 4, 0, BASED | EQUAL | NEGATES | ORDER, {WEIGHT(0.5)}, 1},
    {"arcee_fusion", 2, 0, BASED, {{NULL, 0, 0}}, 0},
    {"breadcrumbs",
     3,
     0,
     GTA,
     {WEIGHT(1), DENSITY(0.6), {"gamma", FX_ALL, 0.1}},
     3},
    {"breadcrumbs_ties",
     4,
     0,
     GTA,
     {WEIGHT(1), DENSITY(0.6), {"rescale", FX_ALL, 1}},
     3},
    {"tsv", 3, 0, BASED | NEGATES | ORDER, {WEIGHT(0.5)}, 1},
    {"iso_c", 3, 0, BASED | NEGATES | ORDER, {WEIGHT(0.5)}, 1},
    {"wudi", 3, 0, BASED | NEGATES | ORDER, {WEIGHT(0.5)}, 1},
    {"della", 3, 0, BASED | NEGATES, {WEIGHT(1), DENSITY(0.6)}, 2},
    {"della_linear", 3, 0, BASED | NEGATES, {WEIGHT(1), DENSITY(0.6)}, 2},
};
#define N_SUBJECTS (sizeof(subjects) / sizeof(*subjects))

/* A method that is registered is a subject; those that look at text need models
 * that run (tests/e2e/calibrated.py and regmean.py have them). */
static void no_method_is_forgotten(void **state)
{
    (void)state;
    for (size_t m = 0; m < tvm_method_count(); m++) {
        struct tvm_method_info info;
        bool found = false;
        unsigned holds = 0;
        tvm_method_info(tvm_method_at(m), &info);
        for (size_t i = 0; i < N_SUBJECTS; i++) {
            if (strcmp(subjects[i].name, info.name) != 0)
                continue;
            found = true;
            holds |= subjects[i].holds;
        }
        if (!found && !info.needs_statistics)
            fail_msg("%s has no row in the table of properties", info.name);
        if (found && info.base == TVM_BASE_REQUIRED && !(holds & BASED) &&
            strcmp(info.name, "slerp") != 0)
            fail_msg("%s: without a change, is the base given?", info.name);
    }
}

static void no_change_gives_the_base(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SUBJECTS; i++) {
        const struct subject *s = &subjects[i];
        struct fx f;
        uint64_t n = 0;
        if (!(s->holds & BASED))
            continue;
        merge(&f, s->n_models, unchanged, s->name, s->base, s->params,
              s->n_params);
        float *y = fx_merged(&f, "w", &n);
        float *b = fx_values(&f, 0, "w", &n);
        if (memcmp(y, b, n * sizeof(*y)) != 0)
            fail_msg("%s changes the base without any change", s->name);
        tv_free(y);
        tv_free(b);
        fx_close(&f);
    }
}

static void equal_donors_give_themselves(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SUBJECTS; i++) {
        const struct subject *s = &subjects[i];
        struct fx f;
        uint64_t n = 0;
        if (!(s->holds & EQUAL))
            continue;
        first_donor = s->base == 0 && strcmp(s->name, "slerp") != 0 ? 1 : 0;
        merge(&f, s->n_models, same, s->name, s->base, s->params, s->n_params);
        float *y = fx_merged(&f, "w", &n);
        float *x = fx_values(&f, s->n_models - 1, "w", &n);
        for (uint64_t e = 0; e < n; e++)
            if (fabsf(y[e] - x[e]) > 1.2e-7f * fabsf(x[e]))
                fail_msg("%s: element %llu is %.9g instead of %.9g", s->name,
                         (unsigned long long)e, (double)y[e], (double)x[e]);
        tv_free(y);
        tv_free(x);
        fx_close(&f);
    }
}

static float *tensor_w(const struct subject *s, fx_fill fill, uint64_t *n)
{
    struct fx f;
    float *y = NULL;

    merge(&f, s->n_models, fill, s->name, s->base, s->params, s->n_params);
    y = fx_merged(&f, "w", n);
    fx_close(&f);
    return y;
}

/* Without a base, model 0 is a donor too. */
static float plain_of(size_t model, size_t tensor, uint64_t i)
{
    return plain(model + (first_donor == 0), tensor, i);
}

static float quadrupled(size_t model, size_t tensor, uint64_t i)
{
    return 4.0f * plain_of(model, tensor, i);
}

static float opposed(size_t model, size_t tensor, uint64_t i)
{
    return -plain_of(model, tensor, i);
}

static size_t n_now;

static float turned_round(size_t model, size_t tensor, uint64_t i)
{
    if (model < first_donor)
        return plain_of(model, tensor, i);
    return plain_of(n_now - 1 - (model - first_donor), tensor, i);
}

/* On a base of 0 the merged change is the result itself. */
static void changes_scale_negate_and_commute(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_SUBJECTS; k++) {
        const struct subject *s = &subjects[k];
        uint64_t n = 0;
        uint64_t changed = 0;
        uint64_t even = 0; /* elected by a sum of exactly 0 */
        first_donor = s->base == 0 ? 1 : 0;
        n_now = s->n_models;
        float *y = tensor_w(s, plain_of, &n);
        float *by4 = s->holds & SCALES ? tensor_w(s, quadrupled, &n) : NULL;
        float *minus = s->holds & NEGATES ? tensor_w(s, opposed, &n) : NULL;
        float *turned = s->holds & ORDER ? tensor_w(s, turned_round, &n) : NULL;
        for (uint64_t i = 0; i < n; i++) {
            const float off = turned ? fabsf(turned[i] - y[i]) : 0.0f;
            changed += y[i] != 0.0f;
            if (by4 && by4[i] != 4.0f * y[i])
                fail_msg("%s (%zu) does not scale", s->name, k);
            even += minus && y[i] != 0.0f && minus[i] == y[i];
            if (minus && minus[i] != -y[i] && minus[i] != y[i])
                fail_msg("%s (%zu) does not negate: %.9g, %.9g", s->name, k,
                         (double)y[i], (double)minus[i]);
            if (off > 2.4e-7f * fabsf(y[i]) + 1e-10f)
                fail_msg("%s (%zu) depends on the order: %.9g, %.9g", s->name,
                         k, (double)y[i], (double)turned[i]);
        }
        if (even > n / 10000)
            fail_msg("%s (%zu) does not negate", s->name, k);
        if (changed < n / 50 && s->holds > (BASED | EQUAL))
            fail_msg("%s (%zu) changes nothing", s->name, k);
        tv_free(y);
        tv_free(by4);
        tv_free(minus);
        tv_free(turned);
    }
}

static void masks_are_nested_in_density(void **state)
{
    static const char *const names[] = {"ties", "dare_linear"};
    static const double densities[] = {0.1, 0.35, 0.8};

    (void)state;
    first_donor = 1;
    for (size_t k = 0; k < 2; k++) {
        float *before = NULL;
        for (size_t d = 0; d < 3; d++) {
            const struct subject s = {
                names[k],
                2,
                0,
                0,
                {WEIGHT(1), DENSITY(densities[d]), {"rescale", FX_ALL, 0}},
                3};
            uint64_t n = 0;
            float *y = tensor_w(&s, plain_of, &n);
            for (uint64_t i = 0; before && i < n; i++)
                assert_true(before[i] == 0.0f || y[i] == before[i]);
            tv_free(before);
            before = y;
        }
        tv_free(before);
    }
}

static void bytes_do_not_depend_on_threads_or_memory(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SUBJECTS; i++) {
        const struct subject *s = &subjects[i];
        struct fx f;
        struct tv_hash one;
        merge(&f, s->n_models, cases, s->name, s->base, s->params, s->n_params);
        f.plan.options.threads = 1;
        one = fx_run(&f);
        f.plan.options.threads = 3;
        f.plan.options.memory_bytes = 20u << 20;
        const struct tv_hash three = fx_run(&f);
        f.plan.options.kernels = tvk_table_for(TVK_REF);
        const struct tv_hash ref = fx_run(&f);
        assert_memory_equal(&one, &three, sizeof(one));
        assert_memory_equal(&one, &ref, sizeof(one));
        fx_close(&f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nearswap_moves_where_near),
        cmocka_unit_test(ram_averages_only_what_is_shared),
        cmocka_unit_test(consensus_keeps_what_matters_to_several),
        cmocka_unit_test(nan_is_not_hidden),
        cmocka_unit_test(emr_elects_and_rebuilds),
        cmocka_unit_test(fisher_weighs_by_information),
        cmocka_unit_test(cabs_gives_each_place_to_one),
        cmocka_unit_test(cabs_is_balanced),
        cmocka_unit_test(ramplus_raises_what_is_alone),
        cmocka_unit_test(sce_selects_weighs_and_erases),
        cmocka_unit_test(sce_weighs_by_energy),
        cmocka_unit_test(sce_of_equal_variances),
        cmocka_unit_test(model_stock_by_tensor_and_row),
        cmocka_unit_test(nuslerp_by_tensor_row_and_column),
        cmocka_unit_test(nuslerp_of_opposite_columns_stays_between),
        cmocka_unit_test(karcher_of_two_is_the_middle),
        cmocka_unit_test(multislerp_of_two_keeps_the_mean_length),
        cmocka_unit_test(arcee_fusion_takes_what_stands_out),
        cmocka_unit_test(breadcrumbs_drops_both_ends),
        cmocka_unit_test(della_keeps_large_entries_more_often),
        cmocka_unit_test(no_method_is_forgotten),
        cmocka_unit_test(no_change_gives_the_base),
        cmocka_unit_test(equal_donors_give_themselves),
        cmocka_unit_test(changes_scale_negate_and_commute),
        cmocka_unit_test(masks_are_nested_in_density),
        cmocka_unit_test(bytes_do_not_depend_on_threads_or_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
