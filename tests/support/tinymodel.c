/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tinymodel.c - safetensors framing by hand: u64 header length, JSON, data.
 */
#include "tinymodel.h"

#include "test.h"

#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/sys.h"
#include "tv/text.h"

struct file {
    json_t *header;
    struct tv_buf data;
};

void tiny_model_init(struct tiny_model *m)
{
    memset(m, 0, sizeof(*m));
    m->architecture = "LlamaForCausalLM";
    m->model_type = "llama";
    m->config = true;
    m->dtype_key = "torch_dtype";
    m->layers = 2;
    m->hidden = 8;
    m->inner = 12;
    m->vocab = 16;
    m->dtype = TV_BF16;
    m->seed = 1;
}

double tiny_value(uint64_t seed, const char *tensor, uint64_t i)
{
    uint64_t h = seed * 0x9e3779b97f4a7c15u + i;
    for (const char *c = tensor; *c != '\0'; c++)
        h = (h ^ (unsigned char)*c) * 0x100000001b3u;
    h ^= h >> 29;
    h *= 0xbf58476d1ce4e5b9u;
    h ^= h >> 32;
    return ((double)(h % 129) - 64.0) / 64.0;
}

static void put_value(struct tv_buf *b, enum tv_dtype t, double v)
{
    const float f = (float)v;
    uint32_t bits = 0;
    unsigned char two[2];
    memcpy(&bits, &f, sizeof(bits));
    if (t == TV_F32) {
        tv_buf_le32(b, bits);
        return;
    }
    if (t == TV_BF16) {
        tv_put_le16(two, (uint16_t)(bits >> 16));
    } else {
        /* Multiples of 1/64 up to 1: normal halves, nothing to round. */
        const uint32_t sign = bits >> 31;
        const uint32_t exponent = (bits >> 23) & 0xff;
        const uint32_t half =
            v == 0 ? 0 : (exponent - 127 + 15) << 10 | ((bits >> 13) & 0x3ff);
        assert_int_equal(t, TV_F16);
        tv_put_le16(two, (uint16_t)(sign << 15 | half));
    }
    tv_buf_add(b, two, 2);
}

static void entry(struct file *f, const char *name, enum tv_dtype t,
                  const uint64_t *shape, unsigned rank, uint64_t from)
{
    json_t *const dims = json_array();
    for (unsigned d = 0; d < rank; d++)
        assert_int_equal(
            json_array_append_new(dims, json_integer((json_int_t)shape[d])), 0);
    json_t *const e = json_pack("{s:s, s:o, s:[I,I]}", "dtype",
                                tv_dtype_name(t), "shape", dims, "data_offsets",
                                (json_int_t)from, (json_int_t)f->data.n_bytes);
    assert_non_null(e);
    assert_int_equal(json_object_set_new(f->header, name, e), 0);
}

static void tensor(struct file *f, const char *name, enum tv_dtype t,
                   uint64_t seed, unsigned rank, uint64_t a, uint64_t b)
{
    const uint64_t shape[2] = {a, b};
    const uint64_t from = f->data.n_bytes;
    const uint64_t n = rank == 2 ? a * b : a;
    for (uint64_t i = 0; i < n; i++)
        put_value(&f->data, t, tiny_value(seed, name, i));
    entry(f, name, t, shape, rank, from);
}

static void weight(struct file *f, const struct tiny_model *m, const char *name,
                   unsigned rank, uint64_t rows, uint64_t cols)
{
    if (m->skip != NULL && strcmp(m->skip, name) == 0)
        return;
    if (m->narrow != NULL && strcmp(m->narrow, name) == 0)
        rows--;
    tensor(f, name, m->dtype, m->seed, rank, rows, cols);
}

static void file_open(struct file *f)
{
    f->header = json_object();
    tv_buf_init(&f->data, 64u << 20);
}

static void file_write(struct file *f, const char *dir, const char *name)
{
    struct tv_buf all;
    const size_t n = json_dumpb(f->header, NULL, 0, JSON_COMPACT);
    char *const text = tv_alloc(n);
    assert_non_null(text);
    assert_int_equal(json_dumpb(f->header, text, n, JSON_COMPACT), n);
    tv_buf_init(&all, 128u << 20);
    tv_buf_le64(&all, n);
    tv_buf_add(&all, text, n);
    tv_buf_add(&all, f->data.data, f->data.n_bytes);
    assert_false(all.failed);
    tv_free(tmpdir_write(dir, name, all.data, all.n_bytes));
    tv_buf_free(&all);
    tv_buf_free(&f->data);
    json_decref(f->header);
    tv_free(text);
}

static void write_text(const char *dir, const char *name, const char *text)
{
    tv_free(tmpdir_write(dir, name, text, strlen(text)));
}

static char *make_dir(const char *parent, const char *name)
{
    struct tv_error err;
    char *const path = tv_path_join(parent, name);
    assert_non_null(path);
    assert_ok(tv_dir_make(path, &err), &err);
    return path;
}

static void write_config(const char *dir, const struct tiny_model *m)
{
    struct tv_buf b;
    tv_buf_init(&b, 1u << 16);
    tv_buf_fmt(&b,
               "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n"
               "  \"hidden_size\": %u,\n  \"intermediate_size\": %u,\n"
               "  \"num_attention_heads\": 2,\n  \"num_hidden_layers\": %u,\n"
               "  \"vocab_size\": %u,\n  \"rms_norm_eps\": 1e-05,\n"
               "  \"tie_word_embeddings\": %s",
               m->architecture, m->model_type, m->hidden, m->inner, m->layers,
               m->vocab, m->tied ? "true" : "false");
    if (m->dtype_key != NULL)
        tv_buf_fmt(&b, ",\n  \"%s\": \"%s\"", m->dtype_key,
                   tv_dtype_torch_name(m->dtype));
    if (m->config_more != NULL)
        tv_buf_fmt(&b, ",\n  %s", m->config_more);
    tv_buf_str(&b, "\n}\n");
    assert_false(b.failed);
    write_text(dir, "config.json", b.data);
    tv_buf_free(&b);
}

char *tiny_model_write(const char *parent, const char *name,
                       const struct tiny_model *m)
{
    static const char *const square[] = {"q_proj", "k_proj", "v_proj",
                                         "o_proj"};
    struct file f;
    char s[128];
    char *const dir = make_dir(parent, name);

    file_open(&f);
    weight(&f, m, "model.embed_tokens.weight", 2, m->vocab, m->hidden);
    for (unsigned l = 0; l < m->layers; l++) {
        const unsigned h = m->hidden;
        (void)snprintf(s, sizeof(s), "model.layers.%u.input_layernorm.weight",
                       l);
        weight(&f, m, s, 1, h, 0);
        for (unsigned i = 0; i < 4; i++) {
            (void)snprintf(s, sizeof(s), "model.layers.%u.self_attn.%s.weight",
                           l, square[i]);
            weight(&f, m, s, 2, h, h);
        }
        (void)snprintf(s, sizeof(s),
                       "model.layers.%u.post_attention_layernorm.weight", l);
        weight(&f, m, s, 1, h, 0);
        (void)snprintf(s, sizeof(s), "model.layers.%u.mlp.gate_proj.weight", l);
        weight(&f, m, s, 2, m->inner, h);
        (void)snprintf(s, sizeof(s), "model.layers.%u.mlp.up_proj.weight", l);
        weight(&f, m, s, 2, m->inner, h);
        (void)snprintf(s, sizeof(s), "model.layers.%u.mlp.down_proj.weight", l);
        weight(&f, m, s, 2, h, m->inner);
    }
    weight(&f, m, "model.norm.weight", 1, m->hidden, 0);
    if (!m->tied || m->keep_head)
        weight(&f, m, "lm_head.weight", 2, m->vocab, m->hidden);
    for (unsigned i = 0; i < m->n_extra; i++) {
        const struct tiny_extra *const e = &m->extra[i];
        const uint64_t from = f.data.n_bytes;
        uint64_t n = tv_dtype_bits(e->dtype) / 8;
        for (unsigned d = 0; d < e->rank; d++)
            n *= e->shape[d];
        for (uint64_t k = 0; k < n; k++)
            tv_buf_add(&f.data,
                       e->data == NULL ? "" : (const char *)e->data + k, 1);
        entry(&f, e->name, e->dtype, e->shape, e->rank, from);
    }
    file_write(&f, dir, "model.safetensors");
    if (m->config)
        write_config(dir, m);
    if (m->tokenizer) {
        write_text(dir, "tokenizer.json", "{\"version\": \"1.0\"}\n");
        write_text(dir, "tokenizer_config.json", "{}\n");
    }
    return dir;
}

char *tiny_adapter_write(const char *parent, const char *name,
                         const struct tiny_model *base, unsigned r,
                         double alpha, uint64_t seed)
{
    static const char *const modules[] = {"q_proj", "v_proj"};
    struct file f;
    char s[160];
    char *const dir = make_dir(parent, name);

    file_open(&f);
    for (unsigned l = 0; l < base->layers; l++) {
        for (unsigned i = 0; i < 2; i++) {
            (void)snprintf(s, sizeof(s),
                           "base_model.model.model.layers.%u.self_attn.%s."
                           "lora_A.weight",
                           l, modules[i]);
            tensor(&f, s, TV_F32, seed, 2, r, base->hidden);
            (void)snprintf(s, sizeof(s),
                           "base_model.model.model.layers.%u.self_attn.%s."
                           "lora_B.weight",
                           l, modules[i]);
            tensor(&f, s, TV_F32, seed, 2, base->hidden, r);
        }
    }
    file_write(&f, dir, "adapter_model.safetensors");
    (void)snprintf(s, sizeof(s),
                   "{\"peft_type\": \"LORA\", \"r\": %u, \"lora_alpha\": %g, "
                   "\"target_modules\": [\"q_proj\", \"v_proj\"]}\n",
                   r, alpha);
    write_text(dir, "adapter_config.json", s);
    return dir;
}
