/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Task arithmetic, TIES and DARE against a plain implementation of
 * their definition: whole tensors in fp64, sorting for the top k.
 */
#include "test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "tv/alloc.h"
#include "tv/checked.h"

#define K 3u /* donors */

static const struct fx_tensor shapes[] = {{"w", TV_BF16, 2, {1100, 700}},
                                          {"f", TV_F32, 2, {90, 1021}},
                                          {"v", TV_F32, 1, {3}}};

struct spec { /* what the oracle needs to know */
    bool top, random, consensus, normalize, rescale;
    double lambda, weight[K], density[K];
    uint64_t seed;
};

struct item {
    double magnitude;
    uint64_t index;
};

static int by_magnitude(const void *a, const void *b)
{
    const struct item *x = a;
    const struct item *y = b;
    if (x->magnitude != y->magnitude)
        return x->magnitude < y->magnitude ? 1 : -1;
    return x->index < y->index ? -1 : x->index > y->index;
}

static void keep_top(bool *keep, const double *d, uint64_t n, double density)
{
    struct item *items = tv_alloc(n * sizeof *items);
    uint64_t k = (uint64_t)(density * (double)n);

    if (k == 0)
        k = 1;
    for (uint64_t i = 0; i < n; i++)
        items[i] = (struct item){(double)fabsf((float)d[i]), i};
    qsort(items, n, sizeof *items, by_magnitude);
    for (uint64_t i = 0; i < n; i++)
        keep[items[i].index] = i < k && items[i].magnitude > 0;
    tv_free(items);
}

static void keep_random(bool *keep, uint64_t n, const struct spec *s, size_t j,
                        const char *name)
{
    const struct tvk_table *ref = tvk_table_for(TVK_REF);
    unsigned char key[12];
    uint64_t *words = tv_calloc(n / 64 + 1, sizeof *words);

    tv_put_le64(key, s->seed);
    tv_put_le32(key + 8, (uint32_t)j);
    (void)ref->philox_mask(words, 0, tv_hash64(key, sizeof key),
                           tv_hash64(name, strlen(name)),
                           (uint64_t)round(s->density[j] * 4294967296.0), n);
    for (uint64_t i = 0; i < n; i++)
        keep[i] = words[i / 64] >> (i % 64) & 1u;
    tv_free(words);
}

/* Sparsified, rescaled and weighted task vector j. */
static double *donor(struct fx *f, const struct spec *s, size_t j,
                     const char *name, const float *base)
{
    uint64_t n = 0;
    float *x = fx_values(f, j + 1, name, &n);
    double *d = tv_alloc(n * sizeof *d);
    bool *keep = tv_alloc(n);
    double all = 0;
    double kept = 0;
    double scale = 1;

    for (uint64_t i = 0; i < n; i++) {
        d[i] = (double)x[i] - (double)base[i];
        keep[i] = true;
    }
    if (s->top && s->density[j] < 1)
        keep_top(keep, d, n, s->density[j]);
    if (s->random && s->density[j] < 1)
        keep_random(keep, n, s, j, name);
    for (uint64_t i = 0; i < n; i++) {
        /* Magnitudes are fp32 (tv/kernels.h). */
        const double m = (double)fabsf((float)d[i]);
        all += m;
        kept += keep[i] ? m : 0;
    }
    if (s->rescale && s->top && s->density[j] < 1)
        scale = all / kept;
    if (s->rescale && s->random && s->density[j] < 1)
        scale = 1 / s->density[j];
    for (uint64_t i = 0; i < n; i++)
        d[i] = keep[i] ? d[i] * scale * s->weight[j] : 0;
    tv_free(keep);
    tv_free(x);
    return d;
}

static double merged(const struct spec *s, double *const *d, uint64_t i)
{
    double sum = 0;
    double divisor = 0;
    double m = 0;

    for (size_t j = 0; j < K; j++)
        sum += d[j][i];
    for (size_t j = 0; j < K; j++) {
        const bool agrees = sum >= 0 ? d[j][i] > 0 : d[j][i] < 0;
        if (s->consensus && !agrees)
            continue;
        m += d[j][i];
        divisor += s->weight[j];
    }
    if (fabs(divisor) < 1e-8)
        divisor = 1;
    if (s->normalize)
        m /= divisor;
    return m * s->lambda;
}

static void compare(struct fx *f, const struct spec *s, const char *name)
{
    uint64_t n = 0;
    double *d[K];
    float *base = fx_values(f, 0, name, &n);
    float *y = fx_read(f->plan.options.out_dir, name, &n);

    for (size_t j = 0; j < K; j++)
        d[j] = donor(f, s, j, name, base);
    for (uint64_t i = 0; i < n; i++) {
        const double want = (double)base[i] + merged(s, d, i);
        /* Half an ulp of fp32 for the rounding, a little for other orders of
         * summation in the rescale factor. */
        if (fabs((double)y[i] - want) > fabs(want) * 0x1p-23 + 1e-12)
            fail_msg("%s[%llu]: %.9g, want %.17g", name, (unsigned long long)i,
                     (double)y[i], want);
    }
    for (size_t j = 0; j < K; j++)
        tv_free(d[j]);
    tv_free(base);
    tv_free(y);
}

static void check(struct fx *f, const char *method, const struct spec *s)
{
    struct fx_param p[2 * K + 3] = {{"normalize", FX_ALL, s->normalize},
                                    {"rescale", FX_ALL, s->rescale},
                                    {"lambda", FX_ALL, s->lambda}};

    for (size_t j = 0; j < K; j++) {
        p[3 + 2 * j] = (struct fx_param){"weight", (int)j + 1, s->weight[j]};
        p[4 + 2 * j] = (struct fx_param){"density", (int)j + 1, s->density[j]};
    }
    fx_plan(f, method, 0, p, 2 * K + 3, TV_F32);
    f->plan.options.seed = s->seed;
    (void)fx_run(f);
    for (size_t t = 0; t < 3; t++)
        compare(f, s, shapes[t].name);
}

static int set_up(void **state)
{
    struct fx *f = malloc(sizeof *f);
    fx_open(f);
    for (size_t i = 0; i <= K; i++)
        fx_model(f, shapes, 3, NULL);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    fx_close(*state);
    free(*state);
    return 0;
}

static void task_arithmetic(void **state)
{
    const struct spec plain = {
        .lambda = 1, .weight = {0.5, -0.25, 2}, .density = {1, 0.1, 0.5}};
    const struct spec normal = {.normalize = true,
                                .lambda = 0.4,
                                .weight = {0.5, 0.25, 2},
                                .density = {1, 1, 1}};
    check(*state, "task_arithmetic", &plain);
    check(*state, "task_arithmetic", &normal);
}

static void ties(void **state)
{
    struct spec s = {.top = true,
                     .consensus = true,
                     .normalize = true,
                     .lambda = 1,
                     .weight = {0.5, 0.25, 1},
                     .density = {0.2, 0.03, 0.9}};
    check(*state, "ties", &s);
    s.normalize = false;
    s.rescale = true;
    s.weight[1] = -0.7;
    check(*state, "ties", &s);
    s.rescale = false;
    s.density[0] = 1e-9; /* still keeps one */
    s.density[2] = 1;
    check(*state, "ties", &s);
}

static void dare(void **state)
{
    struct spec s = {.random = true,
                     .rescale = true,
                     .lambda = 1,
                     .weight = {0.5, 0.25, 1},
                     .density = {0.5, 0.1, 0.9},
                     .seed = 42};
    check(*state, "dare_linear", &s);
    s.rescale = false;
    check(*state, "dare_linear", &s);
    s.consensus = true;
    s.rescale = true;
    s.seed = 0;
    check(*state, "dare_ties", &s);
    s.normalize = true;
    s.density[0] = 1;
    check(*state, "dare_ties", &s);
}

/* Large enough for the selection to begin with a sample of the head of every
 * block. In donor 1 heads are like the rest; in donor 2 they are smaller, in
 * donor 3 larger than all others, so that the sample misleads. */
static float heads(size_t model, size_t tensor, uint64_t i)
{
    const uint64_t mixed = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    const float v = 1.0f + (float)(mixed >> 44) * 0x1p-20f;

    (void)tensor;
    if (model == 0)
        return 0.0f;
    if (model == 1 || i % 2048 >= 256)
        return mixed & 1 ? v : -v;
    return model == 2 ? v * 0x1p-10f : v * 0x1p10f;
}

static void samples(void **state)
{
    static const struct fx_tensor one[] = {{"w", TV_F32, 2, {2100, 1000}}};
    struct fx f;
    struct spec s = {.top = true,
                     .consensus = true,
                     .normalize = true,
                     .rescale = true,
                     .lambda = 1,
                     .weight = {0.5, 0.25, 1},
                     .density = {0.2, 0.2, 0.2}};

    (void)state;
    fx_open(&f);
    for (size_t i = 0; i <= K; i++)
        fx_model(&f, one, 1, heads);
    struct fx_param p[2 * K + 3] = {{"normalize", FX_ALL, s.normalize},
                                    {"rescale", FX_ALL, s.rescale},
                                    {"lambda", FX_ALL, s.lambda}};
    for (size_t j = 0; j < K; j++) {
        p[3 + 2 * j] = (struct fx_param){"weight", (int)j + 1, s.weight[j]};
        p[4 + 2 * j] = (struct fx_param){"density", (int)j + 1, s.density[j]};
    }
    fx_plan(&f, "ties", 0, p, 2 * K + 3, TV_F32);
    (void)fx_run(&f);
    compare(&f, &s, "w");
    fx_close(&f);
}

/* Equal magnitudes at the cut are kept by lowest index; zeros never. With
 * values that heap up in 16-bit models and others (select.h, atoms). */
static float step_of_one = 1.0f;

static float steps(size_t model, size_t tensor, uint64_t i)
{
    const float one = step_of_one;

    (void)tensor;
    if (model == 0)
        return 0.0f;
    return i % 3 == 0 ? 0.0f : i % 5 == 1 ? 2.0f * one : i % 2 ? one : -one;
}

static void equal_of(uint64_t rows)
{
    const struct fx_tensor one[] = {{"w", TV_F32, 2, {rows, 1000}}};
    struct fx f;
    uint64_t n = 0;

    fx_open(&f);
    fx_model(&f, one, 1, steps);
    fx_model(&f, one, 1, steps);
    for (int big = 0; big < 2; big++) {
        const double density = big ? 0.95 : 0.4;
        const struct fx_param p[] = {{"weight", FX_ALL, 1},
                                     {"density", FX_ALL, density},
                                     {"normalize", FX_ALL, 0}};
        fx_plan(&f, "ties", 0, p, 3, TV_DTYPE_NONE);
        f.plan.options.threads = 3;
        f.plan.options.memory_bytes = 16u << 20;
        float *y = fx_merged(&f, "w", &n);
        uint64_t twos = 0;
        for (uint64_t i = 0; i < n; i++)
            twos += steps(1, 0, i) == 2.0f * step_of_one;
        uint64_t left = (uint64_t)(density * (double)n) - twos;
        for (uint64_t i = 0; i < n; i++) {
            const float d = steps(1, 0, i);
            float want = d;
            if (fabsf(d) == step_of_one) {
                want = left > 0 ? d : 0.0f;
                left -= left > 0;
            }
            assert_true(y[i] == want);
        }
        tv_free(y);
    }
    fx_close(&f);
}

static void equal_magnitudes(void **state)
{
    (void)state;
    equal_of(2000);
    equal_of(2100);
    step_of_one = 1.1f;
    equal_of(2100);
}

/* Numbers of bf16, some of them infinite. */
static float halves(size_t model, size_t tensor, uint64_t i)
{
    const uint64_t mixed = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    const uint64_t more = (mixed ^ mixed >> 29) * (2 * model + 3);
    uint32_t u = 0;
    float v = (float)(int32_t)(mixed >> 32) * 0x1p-31f +
              (float)(int32_t)(more >> 32) * 0x1p-33f;

    (void)tensor;
    if (model == 0)
        v = (float)(int32_t)(mixed >> 32) * 0x1p-31f;
    else if (model == 2 && i % 70001 == 5)
        v = INFINITY;
    memcpy(&u, &v, sizeof u);
    u &= 0xffff0000u;
    memcpy(&v, &u, sizeof v);
    return v;
}

/* Passes over bf16 as it lies in files give what those over fp32 do. */
static void bf16_as_it_is(void **state)
{
    static const char *const methods[] = {"ties",      "task_arithmetic",
                                          "dare_ties", "breadcrumbs",
                                          "ties",      "breadcrumbs_ties"};
    static const struct fx_param p[] = {{"weight", FX_ALL, 0.75},
                                        {"density", FX_ALL, 0.3},
                                        {"lambda", FX_ALL, 0.9}};

    (void)state;
    for (size_t m = 0; m < sizeof methods / sizeof *methods; m++) {
        float *merged[2] = {NULL};
        struct tv_error err;
        uint64_t n_bad[2] = {0};
        uint64_t n = 0;
        for (int wide = 0; wide < 2; wide++) {
            const struct fx_tensor one[] = {
                {"w", wide ? TV_F32 : TV_BF16, 2, {m < 4 ? 2100 : 67, 1001}}};
            struct fx f;
            fx_open(&f);
            for (int i = 0; i < 3; i++)
                fx_model(&f, one, 1, halves);
            fx_plan(&f, methods[m], 0, p, 3, TV_BF16);
            struct tvm_result r;
            assert_ok(tvm_run(&f.plan, NULL, &r, &err), &err);
            merged[wide] = fx_read(f.plan.options.out_dir, "w", &n);
            n_bad[wide] = r.n_nonfinite_in;
            fx_close(&f);
        }
        assert_int_equal(n_bad[0], n_bad[1]);
        assert_true(n_bad[0] > 0);
        assert_memory_equal(merged[0], merged[1], n * sizeof(float));
        tv_free(merged[0]);
        tv_free(merged[1]);
    }
}

/* Zero task vectors give the base bit for bit, -0 included. */
static float signed_zeros(size_t model, size_t tensor, uint64_t i)
{
    (void)model;
    (void)tensor;
    return i % 3 == 0 ? -0.0f : (float)i * 1e-3f;
}

static void zero_deltas_give_the_base(void **state)
{
    static const struct fx_tensor one[] = {{"w", TV_F32, 1, {100000}}};
    static const char *const methods[] = {"task_arithmetic", "ties",
                                          "dare_linear", "dare_ties"};
    static const struct fx_param p[] = {{"weight", FX_ALL, 0.7},
                                        {"density", FX_ALL, 0.4},
                                        {"rescale", FX_ALL, 1}};
    struct fx f;
    struct tv_error err;
    struct tv_hash base;

    (void)state;
    fx_open(&f);
    for (int i = 0; i < 3; i++)
        fx_model(&f, one, 1, signed_zeros);
    assert_ok(tv_input_digest(f.input[0], &base, &err), &err);
    for (size_t m = 0; m < 4; m++) {
        fx_plan(&f, methods[m], 0, p, 3, TV_DTYPE_NONE);
        assert_true(tv_hash_equal(fx_run(&f), base));
    }
    fx_close(&f);
}

/* Scaling all task vectors by a power of two scales the result exactly; base 0
 * makes the merged task vector visible. */
static float scale_of_model = 1.0f;
static float scaled(size_t model, size_t tensor, uint64_t i)
{
    (void)tensor;
    if (model == 0)
        return 0.0f;
    return (float)sin((double)(i * 7 + model)) * scale_of_model;
}

static void powers_of_two_scale_through(void **state)
{
    static const struct fx_tensor one[] = {{"w", TV_F32, 1, {100000}}};
    static const char *const methods[] = {"task_arithmetic", "ties",
                                          "dare_linear", "dare_ties"};
    static const struct fx_param p[] = {{"weight", FX_ALL, 0.7},
                                        {"density", FX_ALL, 0.4}};
    struct fx f[2];
    uint64_t n = 0;

    (void)state;
    for (int b = 0; b < 2; b++) {
        scale_of_model = b ? 0.125f : 1.0f;
        fx_open(&f[b]);
        for (int i = 0; i < 3; i++)
            fx_model(&f[b], one, 1, scaled);
    }
    for (size_t m = 0; m < 4; m++) {
        fx_plan(&f[0], methods[m], 0, p, 2, TV_DTYPE_NONE);
        fx_plan(&f[1], methods[m], 0, p, 2, TV_DTYPE_NONE);
        float *y = fx_merged(&f[0], "w", &n);
        float *z = fx_merged(&f[1], "w", &n);
        for (uint64_t i = 0; i < n; i++)
            assert_true(z[i] == 0.125f * y[i]);
        tv_free(y);
        tv_free(z);
    }
    fx_close(&f[0]);
    fx_close(&f[1]);
}

/* One infinite entry must not spoil the others through the rescale factor. */
static float one_infinite(size_t model, size_t tensor, uint64_t i)
{
    (void)tensor;
    if (model == 0)
        return 1.0f;
    return i == 77 ? INFINITY : 1.0f + (float)(i % 10) * 0.125f;
}

static void infinities_do_not_spread(void **state)
{
    static const struct fx_tensor one[] = {{"w", TV_F32, 1, {1000}}};
    static const struct fx_param p[] = {{"weight", FX_ALL, 1},
                                        {"density", FX_ALL, 0.5},
                                        {"rescale", FX_ALL, 1}};
    struct fx f;
    struct tv_error err;
    struct tvm_result r;
    uint64_t n = 0;

    (void)state;
    fx_open(&f);
    fx_model(&f, one, 1, one_infinite);
    fx_model(&f, one, 1, one_infinite);
    fx_plan(&f, "ties", 0, p, 3, TV_DTYPE_NONE);
    assert_ok(tvm_run(&f.plan, NULL, &r, &err), &err);
    assert_int_equal(r.n_nonfinite_in, 1);
    assert_int_equal(r.n_nonfinite_out, 1);
    float *y = fx_read(f.plan.options.out_dir, "w", &n);
    for (uint64_t i = 0; i < n; i++)
        assert_true(i == 77 ? isinf(y[i]) : isfinite(y[i]));
    tv_free(y);
    /* Strict: the same, but said so; the result is kept. */
    fx_out(&f, "strict");
    f.plan.options.strict = true;
    assert_code(tvm_run(&f.plan, NULL, &r, &err), TV_E_NONFINITE, &err);
    tv_free(fx_read(f.plan.options.out_dir, "w", &n));
    fx_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(task_arithmetic),
        cmocka_unit_test(ties),
        cmocka_unit_test(samples),
        cmocka_unit_test(dare),
        cmocka_unit_test(equal_magnitudes),
        cmocka_unit_test(bf16_as_it_is),
        cmocka_unit_test(zero_deltas_give_the_base),
        cmocka_unit_test(powers_of_two_scale_through),
        cmocka_unit_test(infinities_do_not_spread),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
