/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_forward.c - tiny random models of every family against the logits that
 * transformers gives (tests/data/families, made by
 * tools/families/make_families.py): in both spellings of the config, for any
 * number of threads, any memory and any instruction set; and models that must
 * be refused. With "cuda" all of it on a device, or the emulated one.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "test.h"
#include "tmpdir.h"

#include "cuda_fixture.h"
#include "npy.h"
#include "tinymodel.h"
#include "tv/alloc.h"
#include "tv/eval.h"
#include "tv/sys.h"

static const char *const families[] = {
    "llama",      "llama-linear", "llama-dynamic", "llama3",
    "llama-yarn", "llama-long",   "mistral",       "qwen2",
    "qwen3",      "gemma",        "gemma2",        "gemma3",
    "phi3",       "phi3-long",    "gpt2",          "gpt_neox-serial",
    "bloom-6",    "opt",          "opt-post",
};
#define N_FAMILIES (sizeof(families) / sizeof(families[0]))

struct collect {
    float *logits;
    size_t n, vocab, cap;
};

static enum tv_err collect(void *arg, size_t at, size_t n, const float *logits,
                           struct tv_error *err)
{
    struct collect *const c = arg;

    (void)err;
    assert_int_equal(at, c->n);
    assert_true((at + n) * c->vocab <= c->cap);
    memcpy(c->logits + at * c->vocab, logits, n * c->vocab * sizeof(float));
    c->n += n;
    return TV_OK;
}

static void to_ids(const struct npy *a, int32_t *ids)
{
    for (size_t i = 0; i < a->shape[0] * a->shape[1]; i++)
        ids[i] = (int32_t)((const int64_t *)a->data)[i];
}

/* With "cuda" in front: the same on a device. */
static tvk_cuda *cuda;

/* Logits of the model in dir for its own ids; owned. */
static float *run(const char *dir, const struct npy *ids, size_t vocab,
                  const struct tve_model_options *opt)
{
    struct tv_error err = {0};
    tv_input *in = NULL;
    tve_model *m = NULL;
    int32_t flat[128];
    struct collect c = {.vocab = vocab};
    struct tve_model_options with = {.n_threads = 0};

    if (opt)
        with = *opt;
    with.cuda = cuda;

    assert_true(ids->shape[0] * ids->shape[1] <= 128);
    to_ids(ids, flat);
    c.cap = ids->shape[0] * ids->shape[1] * vocab;
    c.logits = tv_calloc(c.cap, sizeof(float));
    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    assert_ok(tve_model_open(in, NULL, 0, &with, &err, &m), &err);
    assert_int_equal(tve_model_vocab(m), vocab);
    assert_ok(tve_logits(m, flat, ids->shape[0], ids->shape[1], NULL, collect,
                         &c, &err),
              &err);
    assert_int_equal(c.n, ids->shape[0] * ids->shape[1]);
    assert_null(tve_model_not_there(m));
    tve_model_close(m);
    tv_input_close(in);
    return c.logits;
}

static void compare(const char *name, const float *got, const struct npy *want)
{
    const float *const w = want->data;
    const size_t n = want->shape[0] * want->shape[1] * want->shape[2];

    for (size_t i = 0; i < n; i++)
        if (!(fabsf(got[i] - w[i]) <= 2e-4f))
            fail_msg("%s: logit %zu is %g, expected %g", name, i,
                     (double)got[i], (double)w[i]);
}

static char *family_file(const char *family, const char *file)
{
    char relative[128];

    snprintf(relative, sizeof(relative), "families/%s/%s", family, file);
    return test_data(relative);
}

static void test_families(void **state)
{
    (void)state;
    for (size_t f = 0; f < N_FAMILIES; f++) {
        char *const ids_path = family_file(families[f], "ids.npy");
        char *const want_path = family_file(families[f], "logits.npy");
        char *const dir = family_file(families[f], "");
        struct npy ids, want;
        /* products on AMX have bits of their own, where there are any */
        const struct tvk_table *const rows[] = {tvk_table_for(TVK_AVX512),
                                                tvk_table_best()};

        npy_read(ids_path, "<i8", &ids);
        npy_read(want_path, "<f4", &want);
        const size_t bytes =
            want.shape[0] * want.shape[1] * want.shape[2] * sizeof(float);
        for (size_t i = 0; i < 2; i++) {
            const struct tve_model_options one = {.n_threads = 1,
                                                  .kernels = rows[i]};
            /* so little that activations go to a scratch file */
            const struct tve_model_options tight = {
                .n_threads = 3, .memory_bytes = 1, .kernels = rows[i]};
            const struct tve_model_options scalar = {
                .n_threads = 2, .kernels = tvk_table_for(TVK_REF)};
            float *const got = run(dir, &ids, want.shape[2], &one);
            compare(families[f], got, &want);
            float *const again = run(dir, &ids, want.shape[2], &tight);
            assert_memory_equal(got, again, bytes);
            tv_free(again);
            if (i == 0) {
                float *const ref = run(dir, &ids, want.shape[2], &scalar);
                assert_memory_equal(got, ref, bytes);
                tv_free(ref);
            }
            tv_free(got);
        }
        tv_free(ids.file);
        tv_free(want.file);
        tv_free(ids_path);
        tv_free(want_path);
        tv_free(dir);
    }
}

/* dir/config.json = text, dir/model.safetensors = the family's. */
static void make_model(const char *dir, const char *family, const char *config,
                       size_t n)
{
    struct tv_error err = {0};
    char *const weights = family_file(family, "model.safetensors");
    char *const link = tv_path_join(dir, "model.safetensors");
    char *const path = tv_path_join(dir, "config.json");

    unlink(link);
    assert_int_equal(symlink(weights, link), 0);
    assert_ok(tv_file_write_atomic(path, config, n, false, &err), &err);
    tv_free(weights);
    tv_free(link);
    tv_free(path);
}

/* Inner activations so wide that a piece of 128 rows, cut for AMX, is more than
 * the slab usually gets: it gets the piece, and comes to an end. */
static void test_wide(void **state)
{
    (void)state;
    struct tv_error err = {0};
    char *const parent = tmpdir_make();
    struct tiny_model tiny;
    tv_input *in = NULL;
    tve_model *m = NULL;
    int32_t ids[128];
    double nll[128];
    const struct tve_window w = {ids, 128, 1};
    const struct tve_model_options opt = {.n_threads = 1,
                                          .memory_bytes = UINT64_C(2) << 30};

    /* never with "cuda": this is about products here */
    tiny_model_init(&tiny);
    tiny.layers = 1;
    tiny.inner = 175000;
    for (int i = 0; i < 128; i++)
        ids[i] = i % 16;
    char *const dir = tiny_model_write(parent, "wide", &tiny);
    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    assert_ok(tve_model_open(in, NULL, 0, &opt, &err, &m), &err);
    assert_ok(tve_score(m, &w, 1, NULL, nll, &err), &err);
    for (int i = 0; i < 127; i++)
        assert_true(isfinite(nll[i]));
    tve_model_close(m);
    tv_input_close(in);
    tv_free(dir);
    tmpdir_remove(parent);
}

static void test_old_spelling(void **state)
{
    (void)state;
    char *const dir = tmpdir_make();
    for (size_t f = 0; f < N_FAMILIES; f++) {
        struct tv_error err = {0};
        char *const ids_path = family_file(families[f], "ids.npy");
        char *const want_path = family_file(families[f], "logits.npy");
        char *const config4 = family_file(families[f], "config4.json");
        char *config = NULL;
        size_t n = 0;
        struct npy ids, want;

        npy_read(ids_path, "<i8", &ids);
        npy_read(want_path, "<f4", &want);
        assert_ok(tv_file_read(config4, 1u << 20, &err, &config, &n), &err);
        assert_null(strstr(config, "rope_parameters"));
        make_model(dir, families[f], config, n);
        float *const got = run(dir, &ids, want.shape[2], NULL);
        compare(families[f], got, &want);
        tv_free(got);
        tv_free(config);
        tv_free(ids.file);
        tv_free(want.file);
        tv_free(ids_path);
        tv_free(want_path);
        tv_free(config4);
    }
    tmpdir_remove(dir);
}

/* NLLs are those of the logits. */
static void test_scores(void **state)
{
    (void)state;
    struct tv_error err = {0};
    char *const ids_path = family_file("gemma2", "ids.npy");
    char *const want_path = family_file("gemma2", "logits.npy");
    char *const dir = family_file("gemma2", "");
    tv_input *in = NULL;
    tve_model *m = NULL;
    struct npy ids, want;
    int32_t flat[128];
    double nll[128];
    size_t k = 0;

    npy_read(ids_path, "<i8", &ids);
    npy_read(want_path, "<f4", &want);
    to_ids(&ids, flat);
    const size_t seq = ids.shape[1], vocab = want.shape[2];
    const struct tve_model_options opt = {.cuda = cuda};
    const struct tve_window w[3] = {
        {flat, seq, 1}, {flat + seq, seq, 20}, {flat, seq - 5, seq - 5}};
    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    assert_ok(tve_model_open(in, NULL, 0, &opt, &err, &m), &err);
    assert_ok(tve_score(m, w, 3, NULL, nll, &err), &err);
    for (size_t b = 0; b < 2; b++) {
        for (size_t i = w[b].score_from; i < seq; i++) {
            const float *const row =
                (const float *)want.data + (b * seq + i - 1) * vocab;
            double sum = 0;
            for (size_t v = 0; v < vocab; v++)
                sum += exp((double)row[v]);
            assert_true(
                fabs(nll[k++] - (log(sum) - (double)row[flat[b * seq + i]])) <
                1e-4);
        }
    }
    tve_model_close(m);
    tv_input_close(in);
    tv_free(ids.file);
    tv_free(want.file);
    tv_free(ids_path);
    tv_free(want_path);
    tv_free(dir);
}

static void test_bad_calls(void **state)
{
    (void)state;
    struct tv_error err = {0};
    char *const dir = family_file("llama", "");
    tv_input *in = NULL;
    tve_model *m = NULL;
    int32_t ids[64] = {0};
    double nll[64];
    const atomic_int cancel = 1;
    const struct tve_progress stop = {.cancel = &cancel};
    struct tve_window w = {ids, 8, 1};

    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    assert_ok(tve_model_open(in, NULL, 0, NULL, &err, &m), &err);
    assert_int_equal(tve_model_positions(m), 48);
    ids[3] = 61;
    assert_code(tve_score(m, &w, 1, NULL, nll, &err), TV_E_INPUT, &err);
    assert_message(&err, "61");
    ids[3] = -1;
    assert_code(tve_score(m, &w, 1, NULL, nll, &err), TV_E_INPUT, &err);
    ids[3] = 0;
    w.n = 49;
    assert_code(tve_score(m, &w, 1, NULL, nll, &err), TV_E_INPUT, &err);
    assert_message(&err, "48 positions");
    w.n = 0;
    assert_code(tve_score(m, &w, 1, NULL, nll, &err), TV_E_INPUT, &err);
    w.n = 8;
    assert_code(tve_score(m, &w, 1, &stop, nll, &err), TV_E_INTERRUPTED, &err);
    assert_ok(tve_score(m, &w, 1, NULL, nll, &err), &err);
    tve_model_close(m);
    tv_input_close(in);
    tv_free(dir);
}

static void test_refused_models(void **state)
{
    (void)state;
    static const struct {
        const char *config;
        enum tv_err code;
        const char *in_message;
    } cases[] = {
        {"{\"model_type\":\"mamba\",\"num_hidden_layers\":3}", TV_E_UNSUPPORTED,
         "mamba"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3}", TV_E_CORRUPT,
         "hidden size"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":12}",
         TV_E_INPUT, "the config asks for"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":4,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"num_key_value_heads\":2,"
         "\"intermediate_size\":36,\"vocab_size\":61,\"head_dim\":10}",
         TV_E_INPUT, "layer 3 has no"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":10,\"hidden_act\":\"mish\"}",
         TV_E_UNSUPPORTED, "mish"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":10,"
         "\"rope_scaling\":{\"rope_type\":\"strange\"}}",
         TV_E_UNSUPPORTED, "strange"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":10,\"rope_theta\":-1}",
         TV_E_CORRUPT, "rope"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":10,"
         "\"rope_scaling\":{\"rope_type\":\"linear\"}}",
         TV_E_CORRUPT, "factor"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":10,\"rope_parameters\":5}",
         TV_E_CORRUPT, "rope_parameters"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":10,\"rms_norm_eps\":-1}",
         TV_E_CORRUPT, "rms_norm_eps"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"hidden_size\":24,"
         "\"num_attention_heads\":4,\"intermediate_size\":36,"
         "\"vocab_size\":61,\"head_dim\":10,\"rms_norm_eps\":\"1e-6\"}",
         TV_E_CORRUPT, "rms_norm_eps"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":3,\"n_embd\":24,\"n_head\":4,"
         "\"n_positions\":48,\"vocab_size\":61,\"n_inner\":-1e300}",
         TV_E_CORRUPT, "n_inner"},
    };
    char *const dir = tmpdir_make();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct tv_error err = {0};
        tv_input *in = NULL;
        tve_model *m = NULL;

        make_model(dir, "llama", cases[i].config, strlen(cases[i].config));
        assert_ok(tv_input_open_path(dir, &err, &in), &err);
        const enum tv_err rc = tve_model_open(in, NULL, 0, NULL, &err, &m);
        if (rc != cases[i].code || !strstr(err.msg, cases[i].in_message))
            fail_msg("case %zu: code %d, \"%s\"", i, (int)rc, err.msg);
        assert_null(m);
        tv_input_close(in);
    }
    tmpdir_remove(dir);
}

/* Windows of the model in dir, scored on a device of its own; place: what
 * tve_model_not_there says. */
static enum tv_err score_on(const char *family, uint64_t bytes,
                            unsigned long lose_at, size_t most_uploads,
                            const struct tve_window *w, size_t n, double *nll,
                            bool *all_there, struct tv_error *err)
{
    struct tvk_cuda_options o = cuda_device_options();
    struct fake_cuda f = {.total_bytes = 80u << 20, .lose_at = lose_at};
    struct fake_cuda before = {.used_bytes = 0}; /* the other device's */
    struct tve_model_options opt = {.n_threads = 2};
    char *const dir = family_file(family, "");
    tv_input *in = NULL;
    tve_model *m = NULL;

    o.memory_bytes = bytes;
    if (fake_set) {
        fake_set(&f);
        fake_get(&before);
    }
    assert_ok(tvk_cuda_open(&o, err, &opt.cuda), err);
    assert_ok(tv_input_open_path(dir, err, &in), err);
    enum tv_err rc = tve_model_open(in, NULL, 0, &opt, err, &m);
    if (rc == TV_OK)
        rc = tve_score(m, w, n, NULL, nll, err);
    if (rc == TV_OK && lose_at == 0 && bytes >= 60u << 20) {
        /* With weights that stayed; all that travels is ids and losses. */
        double *const again = tv_calloc(n * w[0].n, sizeof(*again));

        if (fake_set)
            fake_set(&f);
        assert_ok(tve_score(m, w, n, NULL, again, err), err);
        for (size_t i = 0, k = 0; i < n; i++)
            for (size_t p = w[i].score_from; p < w[i].n; p++, k++)
                assert_true(again[k] == nll[k]);
        if (fake_get) {
            fake_get(&f);
            assert_true(f.uploaded_bytes < most_uploads);
        }
        tv_free(again);
    }
    *all_there = m && !tve_model_not_there(m);
    if (fake_get) {
        fake_get(&f);
        assert_true(f.most_bytes - before.used_bytes <= bytes);
    }
    tve_model_close(m);
    tv_input_close(in);
    tvk_cuda_close(opt.cuda);
    if (fake_get) {
        fake_get(&f);
        assert_int_equal(f.used_bytes, before.used_bytes);
        assert_int_equal(f.n_pinned, before.n_pinned);
    }
    tv_free(dir);
    return rc;
}

/* Batches, too little memory for one, for anything; a lost device. Losses are
 * the CPU's. */
static void test_device_memory(void **state)
{
    enum { N = 50, LENGTH = 48 };
    static const char *const some[] = {"llama3", "gemma3"};
    /* of ids, positions, targets and rotations; llama3's head is its own, so
     * that its embeddings are read here */
    static const size_t uploads[] = {300000, 60000};
    int32_t ids[N * LENGTH];
    struct tve_window w[N];
    static double want[N * LENGTH], got[N * LENGTH], again[N * LENGTH];
    struct tv_error err = {0};
    bool all_there = false;
    size_t n = 0;

    (void)state;
    if (!cuda)
        skip();
    for (size_t i = 0; i < (size_t)N * LENGTH; i++)
        ids[i] = (int32_t)(i * 7919 % 61);
    for (size_t i = 0; i < N; i++) {
        /* of several lengths and beginnings */
        w[i] =
            (struct tve_window){ids + i * LENGTH, i < 45 ? LENGTH : 31 + i % 3,
                                i % 5 == 0 ? 20 : 1};
        n += w[i].n - w[i].score_from;
    }
    for (size_t f = 0; f < sizeof(some) / sizeof(some[0]); f++) {
        char *const dir = family_file(some[f], "");
        tv_input *in = NULL;
        tve_model *m = NULL;

        assert_ok(tv_input_open_path(dir, &err, &in), &err);
        assert_ok(tve_model_open(in, NULL, 0, NULL, &err, &m), &err);
        assert_ok(tve_score(m, w, N, NULL, want, &err), &err);
        tve_model_close(m);
        tv_input_close(in);
        tv_free(dir);
        assert_ok(score_on(some[f], 60u << 20, 0, uploads[f], w, N, got,
                           &all_there, &err),
                  &err);
        assert_true(all_there);
        for (size_t i = 0; i < n; i++)
            assert_true(fabs(got[i] - want[i]) < 1e-4);
        if (f > 0)
            continue;
        /* one group at a time: the same bits */
        assert_ok(
            score_on(some[f], 9000000, 0, 0, w, N, again, &all_there, &err),
            &err);
        assert_true(all_there);
        assert_memory_equal(got, again, n * sizeof(*got));
        /* not one */
        assert_ok(
            score_on(some[f], 7000000, 0, 0, w, N, again, &all_there, &err),
            &err);
        assert_false(all_there);
        for (size_t i = 0; i < n; i++)
            assert_true(fabs(again[i] - want[i]) < 1e-4);
        assert_code(
            score_on(some[f], 4300u << 10, 0, 0, w, N, again, &all_there, &err),
            TV_E_BUDGET, &err);
        assert_message(&err, "--device-memory");
    }
    for (unsigned long at = 1; fake_set; at += 29) {
        const enum tv_err rc =
            score_on(some[0], 60u << 20, at, 0, w, 2, again, &all_there, &err);
        if (rc == TV_OK) {
            assert_true(at > 50);
            break;
        }
        assert_code(rc, TV_E_IO, &err);
        assert_message(&err, "CUDA_ERROR_LAUNCH_FAILED");
    }
}

/* Every allocation of opening and scoring fails once. */
static void test_allocations(void **state)
{
    (void)state;
    char *const dir = family_file("qwen3", "");
    struct tv_error err = {0};
    tv_input *in = NULL;
    const struct tve_model_options opt = {.n_threads = 1};
    static const int32_t ids[6] = {1, 2, 3, 4, 5, 6};
    const struct tve_window w = {ids, 6, 1};

    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    for (uint64_t k = 1;; k++) {
        const uint64_t before = tv_alloc_now();
        tve_model *m = NULL;
        double nll[6];

        tv_alloc_fail_at(k, 1);
        enum tv_err rc = tve_model_open(in, NULL, 0, &opt, &err, &m);
        if (rc == TV_OK)
            rc = tve_score(m, &w, 1, NULL, nll, &err);
        const uint64_t fired = tv_alloc_fired();
        tv_alloc_fail_at(0, 0);
        tve_model_close(m);
        assert_int_equal(tv_alloc_now(), before);
        if (!fired) {
            assert_int_equal(rc, TV_OK);
            assert_true(k > 50);
            break;
        }
        assert_int_equal(rc, TV_E_NOMEM);
    }
    tv_input_close(in);
    tv_free(dir);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_families),
        cmocka_unit_test(test_old_spelling),
        cmocka_unit_test(test_wide),
        cmocka_unit_test(test_scores),
        cmocka_unit_test(test_device_memory),
        cmocka_unit_test(test_bad_calls),
        cmocka_unit_test(test_refused_models),
        cmocka_unit_test(test_allocations),
    };
    if (argc > 1 && strcmp(argv[1], "cuda") == 0)
        cuda = cuda_device_open();
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tvk_cuda_close(cuda);
    return failed;
}
