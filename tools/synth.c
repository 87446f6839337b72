/* SPDX-License-Identifier: Apache-2.0 */
/*
 * synth.c - writes Llama-shaped models of any size for benchmarks.
 *
 *   tv_synth DIR [--layers N] [--hidden N] [--kv N] [--inter N] [--vocab N]
 *            [--donors N] [--seed N]
 *
 * DIR/base and DIR/ft1..ftN, bf16, one safetensors file each. Base weights are
 * Gaussian with sigma 0.02; donors add a Gaussian task vector of sigma 0.002.
 * Values depend on (seed, model, tensor, element) only, so a benchmark can be
 * repeated elsewhere. Needs no model library: this exists because merges must
 * be measured on models larger than any that a repository can hold.
 */
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"
#include "tv/text.h"

#define BLOCK_ELEMS (1u << 20)
#define TABLE_BITS  16u

struct shape_args {
    unsigned long layers, hidden, kv, inter, vocab, donors, seed;
};

/* SplitMix64 (Steele, Lea, Flood 2014): a counter in, 64 mixed bits out. */
static uint64_t mix64(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Quantiles of the standard normal distribution by bisection on erf: slow and
 * exact enough, done once for 2^16 entries. */
static void fill_normal_table(float *table)
{
    const unsigned n = 1u << TABLE_BITS;
    for (unsigned i = 0; i < n / 2; i++) {
        const double p = (i + 0.5) / n;
        double lo = -6.0, hi = 0.0;
        for (int step = 0; step < 50; step++) {
            const double mid = 0.5 * (lo + hi);
            if (0.5 * (1.0 + erf(mid / sqrt(2.0))) < p)
                lo = mid;
            else
                hi = mid;
        }
        table[i] = (float)lo;
        table[n - 1 - i] = (float)-lo;
    }
}

static uint16_t to_bf16(float v)
{
    uint32_t u = 0;
    memcpy(&u, &v, sizeof u);
    u += 0x7fffu + ((u >> 16) & 1u);
    return (uint16_t)(u >> 16);
}

static void fill_block(uint16_t *dst, size_t n, uint64_t first, uint64_t base,
                       uint64_t donor, int is_donor, const float *table)
{
    for (size_t i = 0; i < n; i += 4) {
        const uint64_t e = first + i;
        const uint64_t w = mix64(base + e);
        const uint64_t d = is_donor ? mix64(donor + e) : 0;
        for (size_t j = 0; j < 4 && i + j < n; j++) {
            float v = 0.02f * table[(w >> (16 * j)) & 0xffffu];
            if (is_donor)
                v += 0.002f * table[(d >> (16 * j)) & 0xffffu];
            dst[i + j] = to_bf16(v);
        }
    }
}

static char *add_entry(struct tv_st_entry *e, uint64_t *shape, uint64_t rows,
                       uint64_t cols, char *name)
{
    shape[0] = rows;
    shape[1] = cols;
    *e = (struct tv_st_entry){.name = name,
                              .dtype = TV_BF16,
                              .rank = cols ? 2 : 1,
                              .shape = shape,
                              .bytes = rows * (cols ? cols : 1) * 2};
    return name;
}

static int write_model(const char *dir, const struct shape_args *a, int model,
                       const float *table)
{
    struct tv_error err = {0};
    const size_t n = 2 + 9 * a->layers;
    struct tv_st_entry *entries = tv_calloc(n, sizeof *entries);
    uint64_t(*shapes)[2] = tv_calloc(n, sizeof *shapes);
    uint16_t *block = tv_alloc(BLOCK_ELEMS * sizeof *block);
    struct tv_shards *shards = NULL;
    int rc = 1, fd = -1;
    char *path = NULL;
    if (!entries || !shapes || !block)
        goto out;
    size_t k = 0;
    add_entry(&entries[k], shapes[k], a->vocab, a->hidden,
              tv_asprintf("model.embed_tokens.weight"));
    k++;
    for (unsigned long l = 0; l < a->layers; l++) {
        const struct {
            const char *name;
            uint64_t rows, cols;
        } t[9] = {{"input_layernorm", a->hidden, 0},
                  {"mlp.down_proj", a->hidden, a->inter},
                  {"mlp.gate_proj", a->inter, a->hidden},
                  {"mlp.up_proj", a->inter, a->hidden},
                  {"post_attention_layernorm", a->hidden, 0},
                  {"self_attn.k_proj", a->kv, a->hidden},
                  {"self_attn.o_proj", a->hidden, a->hidden},
                  {"self_attn.q_proj", a->hidden, a->hidden},
                  {"self_attn.v_proj", a->kv, a->hidden}};
        for (size_t i = 0; i < 9; i++, k++)
            add_entry(&entries[k], shapes[k], t[i].rows, t[i].cols,
                      tv_asprintf("model.layers.%lu.%s.weight", l, t[i].name));
    }
    add_entry(&entries[k], shapes[k], a->hidden, 0,
              tv_asprintf("model.norm.weight"));
    k++;
    if (tv_shards_plan(entries, n, "model", UINT64_MAX / 2, &err, &shards) ||
        tv_dir_make(dir, &err)) {
        fprintf(stderr, "tv_synth: %s\n", err.msg);
        goto out;
    }
    path = tv_path_join(dir, shards->file_names[0]);
    if (!path)
        goto out;
    fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
    if (fd < 0 || tv_pwrite_all(fd, shards->headers[0], shards->header_bytes[0],
                                0, path, &err)) {
        fprintf(stderr, "tv_synth: %s: %s\n", path, err.msg);
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        const uint64_t elems = entries[i].bytes / 2;
        const uint64_t base = mix64(mix64(a->seed) + i) << 8;
        const uint64_t donor =
            mix64(mix64(a->seed + (uint64_t)model * 1000003u) + i) << 8;
        for (uint64_t at = 0; at < elems; at += BLOCK_ELEMS) {
            const size_t m =
                elems - at < BLOCK_ELEMS ? (size_t)(elems - at) : BLOCK_ELEMS;
            fill_block(block, m, at, base, donor, model > 0, table);
            if (tv_pwrite_all(fd, block, m * 2, entries[i].offset + at * 2,
                              path, &err)) {
                fprintf(stderr, "tv_synth: %s\n", err.msg);
                goto out;
            }
        }
    }
    struct tv_buf cfg;
    tv_buf_init(&cfg, 4096);
    tv_buf_fmt(&cfg,
               "{\n  \"architectures\": [\n    \"LlamaForCausalLM\"\n  ],\n"
               "  \"bos_token_id\": 1,\n  \"eos_token_id\": 2,\n"
               "  \"hidden_act\": \"silu\",\n  \"hidden_size\": %lu,\n"
               "  \"intermediate_size\": %lu,\n"
               "  \"max_position_embeddings\": 4096,\n"
               "  \"model_type\": \"llama\",\n"
               "  \"num_attention_heads\": %lu,\n"
               "  \"num_hidden_layers\": %lu,\n"
               "  \"num_key_value_heads\": %lu,\n  \"rms_norm_eps\": 1e-05,\n"
               "  \"rope_theta\": 500000.0,\n"
               "  \"tie_word_embeddings\": true,\n"
               "  \"torch_dtype\": \"bfloat16\",\n  \"vocab_size\": %lu\n}\n",
               a->hidden, a->inter, a->hidden / 64 ? a->hidden / 64 : 1,
               a->layers, a->kv / 64 ? a->kv / 64 : 1, a->vocab);
    tv_free(path);
    path = tv_path_join(dir, "config.json");
    if (!path || tv_buf_ok(&cfg, &err) ||
        tv_file_write_atomic(path, cfg.data, cfg.n_bytes, false, &err))
        fprintf(stderr, "tv_synth: %s\n", err.msg);
    else
        rc = 0;
    tv_buf_free(&cfg);
out:
    if (fd >= 0 && close(fd))
        rc = 1;
    for (size_t i = 0; entries && i < n; i++)
        tv_free((void *)(uintptr_t)entries[i].name);
    tv_shards_free(shards);
    tv_free(path);
    tv_free(block);
    tv_free(shapes);
    tv_free(entries);
    return rc;
}

int main(int argc, char **argv)
{
    /* Llama-3.2-1B */
    struct shape_args a = {.layers = 16,
                           .hidden = 2048,
                           .kv = 512,
                           .inter = 8192,
                           .vocab = 128256,
                           .donors = 2,
                           .seed = 0};
    static const struct option opts[] = {
        {"layers", required_argument, NULL, 'l'},
        {"hidden", required_argument, NULL, 'h'},
        {"kv", required_argument, NULL, 'k'},
        {"inter", required_argument, NULL, 'i'},
        {"vocab", required_argument, NULL, 'v'},
        {"donors", required_argument, NULL, 'd'},
        {"seed", required_argument, NULL, 's'},
        {NULL, 0, NULL, 0}};
    for (int c = 0; (c = getopt_long(argc, argv, "", opts, NULL)) != -1;) {
        unsigned long *const to = c == 'l'   ? &a.layers
                                  : c == 'h' ? &a.hidden
                                  : c == 'k' ? &a.kv
                                  : c == 'i' ? &a.inter
                                  : c == 'v' ? &a.vocab
                                  : c == 'd' ? &a.donors
                                  : c == 's' ? &a.seed
                                             : NULL;
        if (!to)
            return 2;
        *to = strtoul(optarg, NULL, 10);
    }
    if (optind != argc - 1) {
        fprintf(stderr, "usage: tv_synth DIR [--layers N] [--hidden N] "
                        "[--kv N] [--inter N] [--vocab N] [--donors N] "
                        "[--seed N]\n");
        return 2;
    }
    float *table = tv_alloc((1u << TABLE_BITS) * sizeof *table);
    if (!table)
        return 1;
    fill_normal_table(table);
    int rc = 0;
    for (int m = 0; m <= (int)a.donors && rc == 0; m++) {
        char *dir = m == 0 ? tv_path_join(argv[optind], "base")
                           : tv_asprintf("%s/ft%d", argv[optind], m);
        rc = dir ? write_model(dir, &a, m, table) : 1;
        tv_free(dir);
    }
    tv_free(table);
    return rc;
}
