/* SPDX-License-Identifier: Apache-2.0 */
/*
 * trim_scope of ties: which entries stay, against sorting whole populations.
 *
 * The base is 0, and where one donor has entries the other has none, so a
 * merged element is what its donor keeps there. Values are coarse: the cut
 * falls among many equal magnitudes in several tensors.
 */
#include "test.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "tv/alloc.h"

static const struct fx_tensor shapes[] = {
    {"e", TV_F32, 2, {31, 33}},      {"l.0.a", TV_F32, 2, {700, 301}},
    {"l.0.b", TV_F32, 1, {77}},      {"l.1.a", TV_BF16, 2, {40, 100}},
    {"l.1.b", TV_F32, 2, {65, 129}}, {"l.1.c", TV_F32, 1, {1}}};
#define N_SHAPES (sizeof(shapes) / sizeof(*shapes))
#define DONORS   2u

enum { TENSOR, LAYER, MODEL };

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 31)) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 29)) * UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ (x >> 32);
}

/* Multiples of 1/64 up to 2, larger ones in later layers. */
static float coarse(size_t model, size_t tensor, uint64_t i)
{
    if (model == 0 || i % DONORS != model - 1)
        return 0.0f;
    const uint64_t r = mix(i * 131 + tensor * 7 + model);
    const float v = (float)(r % (tensor < 3 ? 48 : 128)) / 64.0f;
    return r >> 40 & 1 ? v : -v;
}

struct item {
    float magnitude;
    size_t tensor;
    uint64_t index;
};

static int by_magnitude(const void *a, const void *b)
{
    const struct item *x = a;
    const struct item *y = b;
    if (x->magnitude != y->magnitude)
        return x->magnitude < y->magnitude ? 1 : -1;
    if (x->tensor != y->tensor)
        return x->tensor < y->tensor ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* Which population tensor i belongs to. */
static size_t population(int scope, const struct tvm_tensor *t, size_t i)
{
    if (scope == MODEL)
        return 0;
    return scope == LAYER && t->layer >= 0 ? 1000 + (size_t)t->layer : i;
}

static double density_of(const struct fx_param *params, size_t n, size_t donor)
{
    double d = 1.0;
    for (size_t i = 0; i < n; i++)
        if (strcmp(params[i].name, "density") == 0 &&
            (params[i].source == FX_ALL ||
             (size_t)params[i].source == donor + 1))
            d = params[i].value;
    return d;
}

/* want [n_tensors][elements]: adds what the donor keeps of one population. */
static void keep(struct fx *f, int scope, size_t which, size_t donor,
                 double density, bool rescale, double **want)
{
    const struct tvm_plan *p = &f->plan;
    struct item *items = NULL;
    uint64_t n = 0;
    double all = 0;
    double kept = 0;

    for (size_t t = 0; t < p->n_tensors; t++)
        if (population(scope, &p->tensors[t], t) == which)
            n += p->tensors[t].n_elems;
    items = tv_calloc(n + 1, sizeof *items);
    n = 0;
    for (size_t t = 0; t < p->n_tensors; t++) {
        uint64_t m = 0;
        if (population(scope, &p->tensors[t], t) != which)
            continue;
        float *x = fx_values(f, donor + 1, p->tensors[t].name, &m);
        for (uint64_t i = 0; i < m; i++)
            items[n++] = (struct item){fabsf(x[i]), t, i};
        tv_free(x);
    }
    qsort(items, n, sizeof *items, by_magnitude);
    uint64_t k = (uint64_t)(density * (double)n);
    k = k == 0 ? 1 : k;
    for (uint64_t i = 0; i < n; i++) {
        all += (double)items[i].magnitude;
        kept += i < k ? (double)items[i].magnitude : 0;
    }
    for (uint64_t i = 0; i < k && i < n; i++) {
        double *at = &want[items[i].tensor][items[i].index];
        if (items[i].magnitude > 0)
            *at = (rescale ? all / kept : 1.0) * (double)items[i].magnitude;
    }
    tv_free(items);
}

static void check(int scope, const struct fx_param *params, size_t n_params,
                  bool rescale)
{
    struct fx f;
    double *want[N_SHAPES];

    fx_open(&f);
    for (size_t i = 0; i <= DONORS; i++)
        fx_model(&f, shapes, N_SHAPES, coarse);
    fx_plan(&f, "ties", 0, params, n_params, TV_DTYPE_NONE);
    const struct tvm_plan *p = &f.plan;
    for (size_t t = 0; t < p->n_tensors; t++)
        want[t] = tv_calloc(p->tensors[t].n_elems, sizeof **want);
    for (size_t d = 0; d < DONORS; d++) {
        const double density = density_of(params, n_params, d);
        for (size_t t = 0; t < p->n_tensors; t++) {
            const size_t which = population(scope, &p->tensors[t], t);
            bool first = true;
            for (size_t i = 0; i < t; i++)
                first = first && population(scope, &p->tensors[i], i) != which;
            if (first)
                keep(&f, scope, which, d, density, rescale, want);
        }
    }
    f.plan.options.threads = 1;
    const struct tv_hash one = fx_run(&f);
    f.plan.options.threads = 5;
    f.plan.options.memory_bytes = 16u << 20;
    const struct tv_hash five = fx_run(&f);
    f.plan.options.kernels = tvk_table_for(TVK_REF);
    const struct tv_hash ref = fx_run(&f);
    assert_memory_equal(&one, &five, sizeof one);
    assert_memory_equal(&one, &ref, sizeof one);
    for (size_t t = 0; t < p->n_tensors; t++) {
        uint64_t n = 0;
        float *y = fx_read(f.plan.options.out_dir, p->tensors[t].name, &n);
        for (uint64_t i = 0; i < n; i++) {
            const double w = want[t][i];
            const double off = fabs(fabs((double)y[i]) - w);
            if (off > w * (p->tensors[t].dtype == TV_BF16 ? 4e-3 : 1e-7))
                fail_msg("%s[%llu] is %g instead of %g", p->tensors[t].name,
                         (unsigned long long)i, (double)y[i], w);
        }
        tv_free(y);
        tv_free(want[t]);
    }
    fx_close(&f);
}

static void keeps_exactly_k_of_a_population(void **state)
{
    (void)state;
    for (int scope = TENSOR; scope <= MODEL; scope++) {
        const struct fx_param p[] = {{"weight", FX_ALL, 1.0},
                                     {"trim_scope", FX_ALL, scope},
                                     {"density", 1, 0.13},
                                     {"density", 2, 0.31}};
        check(scope, p, 4, false);
    }
}

/* More than what is not zero: everything but zeros stays. One entry of all. */
static void keeps_no_zeros_and_at_least_one(void **state)
{
    (void)state;
    for (int scope = LAYER; scope <= MODEL; scope++) {
        const struct fx_param p[] = {{"weight", FX_ALL, 1.0},
                                     {"trim_scope", FX_ALL, scope},
                                     {"density", 1, 0.9},
                                     {"density", 2, 1e-9}};
        check(scope, p, 4, false);
    }
}

static void rescales_by_the_population(void **state)
{
    (void)state;
    for (int scope = LAYER; scope <= MODEL; scope++) {
        const struct fx_param p[] = {{"weight", FX_ALL, 1.0},
                                     {"trim_scope", FX_ALL, scope},
                                     {"rescale", FX_ALL, 1.0},
                                     {"density", 1, 0.2},
                                     {"density", 2, 0.45}};
        check(scope, p, 5, true);
    }
}

static void interrupted_before_the_first_tensor(void **state)
{
    const struct fx_param p[] = {{"weight", FX_ALL, 1.0},
                                 {"trim_scope", FX_ALL, MODEL},
                                 {"density", FX_ALL, 0.2}};
    const atomic_int cancel = 1;
    const struct tvm_run_hooks hooks = {.cancel = &cancel};
    struct tvm_result r;
    struct tv_error err;
    struct fx f;

    (void)state;
    fx_open(&f);
    for (size_t i = 0; i <= DONORS; i++)
        fx_model(&f, shapes, N_SHAPES, coarse);
    fx_plan(&f, "ties", 0, p, 3, TV_DTYPE_NONE);
    const struct tv_hash want = fx_run(&f);
    fx_out(&f, "again");
    assert_int_equal(tvm_run(&f.plan, &hooks, &r, &err), TV_E_INTERRUPTED);
    assert_ok(tvm_run(&f.plan, NULL, &r, &err), &err);
    assert_memory_equal(&r.digest, &want, sizeof want);
    fx_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_exactly_k_of_a_population),
        cmocka_unit_test(keeps_no_zeros_and_at_least_one),
        cmocka_unit_test(rescales_by_the_population),
        cmocka_unit_test(interrupted_before_the_first_tensor),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
