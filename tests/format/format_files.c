/* SPDX-License-Identifier: Apache-2.0 */
/*
 * format_files.c - small model files for the tests of store/format.
 */
#include "format_files.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "rng.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

#define N_MAX 16

uint64_t ff_bytes(const struct ff_tensor *t)
{
    uint64_t n = 0;
    uint64_t bytes = 0;

    assert_ok(tv_shape_elems(t->shape, t->rank, &n, NULL), NULL);
    assert_ok(tv_dtype_bytes(t->dtype, n, &bytes, NULL), NULL);
    return bytes;
}

unsigned char *ff_payload(const struct ff_tensor *t)
{
    const uint64_t n = ff_bytes(t);
    unsigned char *p = tv_alloc((size_t)n + 1);
    struct rng r;

    assert_non_null(p);
    rng_open(&r, t->seed);
    rng_bytes(&r, p, (size_t)n);
    return p;
}

void ff_write(const char *dir, const char *file, const struct ff_tensor *t,
              size_t n)
{
    struct tv_st_entry e[N_MAX];
    struct tv_shards *s = NULL;
    struct tv_error err;
    char *whole = NULL;

    assert_true(n <= N_MAX);
    memset(e, 0, sizeof e);
    for (size_t i = 0; i < n; i++) {
        e[i].name = t[i].name;
        e[i].dtype = t[i].dtype;
        e[i].rank = t[i].rank;
        e[i].shape = t[i].shape;
        e[i].bytes = ff_bytes(&t[i]);
    }
    assert_ok(tv_shards_plan(e, n, "model", 0, &err, &s), &err);
    assert_int_equal(s->n, 1);
    whole = tv_alloc((size_t)s->file_bytes[0]);
    assert_non_null(whole);
    memcpy(whole, s->headers[0], s->header_bytes[0]);
    for (size_t i = 0; i < n; i++) {
        unsigned char *p = ff_payload(&t[i]);

        memcpy(whole + e[i].offset, p, (size_t)e[i].bytes);
        tv_free(p);
    }
    tv_free(tmpdir_write(dir, file, whole, (size_t)s->file_bytes[0]));
    tv_free(whole);
    tv_shards_free(s);
}

void ff_write_text(const char *dir, const char *file, const char *text)
{
    tv_free(tmpdir_write(dir, file, text, strlen(text)));
}

void ff_copy(const char *src, const char *dir, const char *file)
{
    char *path = test_data(src);
    char *data = NULL;
    size_t n = 0;
    struct tv_error err;

    assert_ok(tv_file_read(path, 1 << 24, &err, &data, &n), &err);
    tv_free(tmpdir_write(dir, file, data, n));
    tv_free(data);
    tv_free(path);
}

const struct ff_tensor *ff_model(const char *dir, size_t *n)
{
    static const struct ff_tensor tensors[] = {
        {"model.embed_tokens.weight", TV_BF16, 2, {32, 8}, 1},
        {"model.layers.0.self_attn.q_proj.weight", TV_BF16, 2, {12, 8}, 2},
        {"model.layers.1.self_attn.q_proj.weight", TV_BF16, 2, {12, 8}, 3},
        {"model.norm.weight", TV_F32, 1, {8}, 4},
        {"model.step", TV_I64, 0, {0}, 5},
    };

    ff_write(dir, "model.safetensors", tensors, 5);
    ff_write_text(dir, "config.json",
                  "{\n  \"architectures\": [\n    \"LlamaForCausalLM\"\n  ],\n"
                  "  \"rms_norm_eps\": 1e-05\n}\n");
    ff_write_text(dir, "generation_config.json", "{\"eos_token_id\": 2}");
    ff_write_text(dir, "tokenizer.json", "{\"version\": \"1.0\"}\n");
    *n = 5;
    return tensors;
}

void ff_adapter(const char *dir)
{
    static const struct ff_tensor tensors[] = {
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
         TV_F32,
         2,
         {2, 8},
         11},
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
         TV_F32,
         2,
         {12, 2},
         12},
    };

    ff_write(dir, "adapter_model.safetensors", tensors, 2);
    ff_write_text(dir, "adapter_config.json",
                  "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4}");
    ff_write_text(dir, "README.md", "# adapter\n");
}

char *ff_read(const char *dir, const char *file, size_t *n)
{
    char *path = tv_path_join(dir, file);
    char *data = NULL;
    struct tv_error err;

    assert_non_null(path);
    assert_ok(tv_file_read(path, 1 << 24, &err, &data, n), &err);
    tv_free(path);
    return data;
}

void ff_assert_same_file(const char *dir_a, const char *dir_b, const char *file)
{
    size_t n_a = 0;
    size_t n_b = 0;
    char *a = ff_read(dir_a, file, &n_a);
    char *b = ff_read(dir_b, file, &n_b);

    assert_int_equal(n_a, n_b);
    assert_memory_equal(a, b, n_a);
    tv_free(a);
    tv_free(b);
}

void ff_assert_tensors(tv_input *in, const struct ff_tensor *t, size_t n)
{
    assert_int_equal(tv_input_count(in), n);
    for (size_t i = 0; i < n; i++) {
        const struct tv_input_tensor *x = tv_input_find(in, t[i].name);
        struct tv_view v;
        struct tv_error err;
        unsigned char *want = ff_payload(&t[i]);
        unsigned char *got = NULL;

        memset(&v, 0, sizeof v);
        assert_non_null(x);
        assert_string_equal(x->name, t[i].name);
        assert_int_equal(x->dtype, t[i].dtype);
        assert_int_equal(x->rank, t[i].rank);
        for (unsigned d = 0; d < x->rank; d++)
            assert_int_equal(x->shape[d], t[i].shape[d]);
        assert_int_equal(x->bytes, ff_bytes(&t[i]));
        assert_ok(tv_input_view(in, x, &err, &v), &err);
        assert_int_equal(v.bytes, x->bytes);
        got = tv_alloc((size_t)v.bytes + 1);
        assert_non_null(got);
        if (v.bytes > 0) {
            tv_view_copy(&v, 0, v.bytes, got);
            assert_memory_equal(got, want, (size_t)v.bytes);
        }
        tv_input_release(in, &v);
        tv_free(got);
        tv_free(want);
    }
}

struct tv_hash ff_digest(const char *path)
{
    struct tv_error err;
    tv_input *in = NULL;
    struct tv_hash h = {0, 0};

    assert_ok(tv_input_open_path(path, &err, &in), &err);
    assert_ok(tv_input_digest(in, &h, &err), &err);
    tv_input_close(in);
    return h;
}

bool ff_exists(const char *dir, const char *file)
{
    char *path = tv_path_join(dir, file);
    bool yes = false;

    assert_non_null(path);
    yes = tv_path_exists(path);
    tv_free(path);
    return yes;
}

void ff_print(char *dst, size_t cap, const char *fmt, ...)
{
    va_list ap;
    int n = 0;

    va_start(ap, fmt);
    n = vsnprintf(dst, cap, fmt, ap);
    va_end(ap);
    assert_true(n >= 0 && (size_t)n < cap);
}
