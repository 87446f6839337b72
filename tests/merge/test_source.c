/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Readers: adapters on the fly, inputs in a store, damage found on reading.
 */
#include "test.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "fixture.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

#define ROWS 700u
#define COLS 333u
#define RANK 5u

static const struct fx_tensor model[] = {{"w", TV_BF16, 2, {ROWS, COLS}},
                                         {"big", TV_BF16, 2, {1300, 1024}}};
static const struct fx_tensor factors[] = {{"a", TV_F32, 2, {RANK, COLS}},
                                           {"b", TV_BF16, 2, {ROWS, RANK}},
                                           {"ta", TV_F16, 2, {RANK, ROWS}},
                                           {"tb", TV_F32, 2, {COLS, RANK}}};

static const struct fx_param one[] = {{"scale", FX_ALL, 1}};

/* W + scale * B A, or the transposed product, in fp64. */
static void adapters_are_added(void **state)
{
    struct fx f;
    uint64_t n = 0;

    (void)state;
    fx_open(&f);
    fx_model(&f, model, 2, NULL);
    fx_model(&f, factors, 4, NULL);
    float *w = fx_values(&f, 0, "w", &n);
    float *a = fx_values(&f, 1, "a", &n);
    float *b = fx_values(&f, 1, "b", &n);
    float *ta = fx_values(&f, 1, "ta", &n);
    float *tb = fx_values(&f, 1, "tb", &n);
    const struct tv_adapter_module plain = {.module = "w",
                                            .kind = TV_CHANGE_LOW_RANK,
                                            .a = tv_input_find(f.input[1], "a"),
                                            .b = tv_input_find(f.input[1], "b"),
                                            .r = RANK,
                                            .in_features = COLS,
                                            .out_features = ROWS,
                                            .scaling = 2.0};
    const struct tv_adapter_module turned = {
        .module = "w",
        .kind = TV_CHANGE_LOW_RANK,
        .a = tv_input_find(f.input[1], "ta"),
        .b = tv_input_find(f.input[1], "tb"),
        .r = RANK,
        .in_features = ROWS,
        .out_features = COLS,
        .scaling = -1.0,
        .transposed = true};
    const struct tv_adapter_use both[] = {{&plain, f.input[1], 0.5},
                                          {&turned, f.input[1], 3.0}};
    f.n_models = 1;
    fx_plan(&f, "passthrough", -1, one, 1, TV_F32);
    f.n_models = 2;
    f.plan.options.memory_bytes = 16u << 20;
    f.plan.tensors[1].sources[0].adapters = both;
    f.plan.tensors[1].sources[0].n_adapters = 2;
    assert_string_equal(f.plan.tensors[1].name, "w");
    float *y = fx_merged(&f, "w", &n);
    assert_int_equal(n, ROWS * COLS);
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t r = i / COLS;
        const uint64_t c = i % COLS;
        double p = 0;
        double q = 0;
        for (uint64_t k = 0; k < RANK; k++) {
            p += (double)b[r * RANK + k] * (double)a[k * COLS + c];
            q += (double)ta[k * ROWS + r] * (double)tb[c * RANK + k];
        }
        const float first = (float)((double)w[i] + 1.0 * p);
        assert_true(y[i] == (float)((double)first - 3.0 * q));
    }
    tv_free(y);
    tv_free(w);
    tv_free(a);
    tv_free(b);
    tv_free(ta);
    tv_free(tb);
    fx_close(&f);
}

/* Imports model m into a store and opens it from there. */
static tv_input *stored(struct fx *f, tv_store *store, size_t m,
                        const char *name)
{
    struct tv_error err;
    struct tv_transfer t = {.sync = true};
    char object[64];
    char text[80];
    struct tv_ref_part part = {.object = object, .weight = 1.0};
    tv_input *in = NULL;

    (void)snprintf(object, sizeof object, "%s", name);
    (void)snprintf(text, sizeof text, "store:%s", name);
    part.text = text;
    assert_ok(tv_import(store, name, f->input[m], &t, &err), &err);
    assert_ok(tv_input_open(&part, store, &err, &in), &err);
    return in;
}

static void use_input(struct fx *f, size_t m, tv_input *in)
{
    tv_input_close(f->input[m]);
    f->input[m] = in;
}

static void flip_payload(const char *store, const float *values)
{
    struct tv_error err;
    char *path = tv_path_join(store, "data.mdb");
    char *data = NULL;
    size_t n = 0;
    uint16_t bits[64];
    unsigned n_found = 0;

    tvk_from_f32(tvk_table_for(TVK_REF), TV_BF16, bits, values, 64);
    assert_ok(tv_file_read(path, 1u << 30, &err, &data, &n), &err);
    for (size_t i = 0; i + sizeof bits <= n; i++)
        if (memcmp(data + i, bits, sizeof bits) == 0) {
            data[i + 100] ^= 4;
            n_found++;
        }
    assert_int_equal(n_found, 1);
    assert_ok(tv_file_write_atomic(path, data, n, false, &err), &err);
    tv_free(data);
    tv_free(path);
}

static void store_inputs_are_the_same_and_checked(void **state)
{
    static const struct fx_param params[] = {{"weight", FX_ALL, 0.5},
                                             {"density", FX_ALL, 0.3}};
    struct fx f;
    struct tv_error err;
    struct tvm_result r;
    tv_store *store = NULL;
    uint64_t n = 0;
    /* Chunks that are no multiple of a leaf or a block. */
    const struct tv_store_options opt = {.dirty_bytes_max = 300000};

    (void)state;
    fx_open(&f);
    for (int i = 0; i < 3; i++)
        fx_model(&f, model, 2, NULL);
    fx_plan(&f, "ties", 0, params, 2, TV_DTYPE_NONE);
    const struct tv_hash want = fx_run(&f);
    float *victim = fx_values(&f, 2, "big", &n);

    char *path = tv_path_join(f.dir, "store");
    assert_ok(tv_store_create(path, 0, &err), &err);
    assert_ok(tv_store_open(path, &opt, &err, &store), &err);
    use_input(&f, 1, stored(&f, store, 1, "one"));
    use_input(&f, 2, stored(&f, store, 2, "two"));
    fx_plan(&f, "ties", 0, params, 2, TV_DTYPE_NONE);
    assert_true(tv_hash_equal(fx_run(&f), want));

    tv_input_close(f.input[1]);
    tv_input_close(f.input[2]);
    tv_store_close(store);
    flip_payload(path, victim + 700000);
    assert_ok(tv_store_open(path, &opt, &err, &store), &err);
    struct tv_ref_part part = {.object = (char *)(uintptr_t) "one",
                               .text = (char *)(uintptr_t) "store:one",
                               .weight = 1.0};
    assert_ok(tv_input_open(&part, store, &err, &f.input[1]), &err);
    part.object = (char *)(uintptr_t) "two";
    part.text = (char *)(uintptr_t) "store:two";
    assert_ok(tv_input_open(&part, store, &err, &f.input[2]), &err);
    fx_plan(&f, "ties", 0, params, 2, TV_DTYPE_NONE);
    fx_out(&f, "damaged");
    assert_code(tvm_run(&f.plan, NULL, &r, &err), TV_E_CORRUPT, &err);
    assert_message(&err, "two");
    assert_message(&err, "big");
    /* Asked not to look, it does not see. */
    f.plan.options.verify_reads = false;
    assert_ok(tvm_run(&f.plan, NULL, &r, &err), &err);
    assert_false(tv_hash_equal(r.digest, want));
    tv_free(victim);
    tv_input_close(f.input[1]);
    tv_input_close(f.input[2]);
    f.input[1] = f.input[2] = NULL;
    tv_store_close(store);
    tv_free(path);
    fx_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(adapters_are_added),
        cmocka_unit_test(store_inputs_are_the_same_and_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
