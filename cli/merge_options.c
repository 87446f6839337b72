/* SPDX-License-Identifier: Apache-2.0 */
/*
 * merge_options.c - options of tvmerge run and plan, mergekit's among them,
 * and the way from a command line to a plan.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store_open.h"
#include "tv/alloc.h"
#include "tv/text.h"
#include "tvmerge.h"

enum {
    KEY_STORE = 0x2000,
    KEY_INTO,
    KEY_SEED,
    KEY_SHARD,
    KEY_QUOTA,
    KEY_COMPAT,
    KEY_COPY_TOKENIZER,
    KEY_NO_COPY_TOKENIZER,
    KEY_CARD,
    KEY_NO_CARD,
    KEY_NO_SYNC,
    KEY_FORCE,
    KEY_STRICT,
    KEY_NO_VERIFY_READS,
    KEY_VERIFY_INPUTS,
    KEY_ACCEPT_NUMERICS,
    KEY_LOCK_TIMEOUT,
    KEY_CUDA,
    KEY_TRUST,
    KEY_CRIMES,
    KEY_PICKLE,
    KEY_NO_CACHE,
    KEY_TRUNCATE,
    KEY_NO_TRUNCATE,
    KEY_LORA_DTYPE,
    KEY_TEXT,
    KEY_KEEP_STATISTICS,
    KEY_STAGES,
    KEY_DEFAULT,          /* says what is so anyway */
    KEY_IGNORED = 0x2100, /* to LAST: mergekit's, without effect here */
    KEY_IGNORED_LAST = KEY_IGNORED + 9,
};

const struct argp_option tvc_merge_options[] = {
    {"store", KEY_STORE, "STORE", 0,
     "Store for store:NAME and --into (default: $TV_STORE)", 0},
    {"into", KEY_INTO, "NAME", 0, "Merge into this object of the store", 0},
    {"random-seed", KEY_SEED, "N", 0, "Seed of random masks (default: 0)", 0},
    {"out-shard-size", KEY_SHARD, "SIZE", 0,
     "Most bytes per safetensors file (default: 5GB; 0: no limit)", 0},
    {"quota", KEY_QUOTA, "SIZE", 0,
     "Most bytes that OUT may take on disk meanwhile (default, 0 and none: no "
     "limit)",
     0},
    {"compat", KEY_COMPAT, "TOOL", 0,
     "Reproduce another tool's arithmetic: mergekit, for models (roundings, "
     "random stream); peft, for adapters",
     0},
    {"no-copy-tokenizer", KEY_NO_COPY_TOKENIZER, NULL, 0,
     "Leave the tokenizer files out", 0},
    {"no-write-model-card", KEY_NO_CARD, NULL, 0, "Write no README.md", 0},
    {"intermediate-dir", KEY_STAGES, "DIR", 0,
     "Recipes of several documents: make the named ones in DIR/NAME and keep "
     "them (default: beside OUT, while they are needed)",
     0},
    {"no-sync", KEY_NO_SYNC, NULL, 0,
     "Do not wait for the disk: faster, but a power cut may cost the run", 0},
    {"force", KEY_FORCE, NULL, 0, "Replace what OUT or NAME holds", 0},
    {"strict", KEY_STRICT, NULL, 0,
     "NaN or infinity in the inputs is an error (exit code 3)", 0},
    {"no-verify-reads", KEY_NO_VERIFY_READS, NULL, 0,
     "Do not check checksums of stored tensors", 0},
    {"verify-inputs", KEY_VERIFY_INPUTS, NULL, 0,
     "Read all inputs first; identify them by content", 0},
    {"accept-numerics", KEY_ACCEPT_NUMERICS, NULL, 0,
     "Go on with a merge that another BLAS core type or device began (matrix "
     "methods, statistics): bytes may differ in their last bits",
     0},
    {"no-cache", KEY_NO_CACHE, NULL, 0,
     "Neither use nor keep masks and task vectors in the store", 0},
    {"text", KEY_TEXT, "NAME=FILE", 0,
     "Calibration text of model NAME, for methods that look at the inputs of "
     "layers; may be repeated",
     0},
    {"keep-statistics", KEY_KEEP_STATISTICS, NULL, 0,
     "Keep the statistics of calibration in the store, as far as its quota "
     "goes",
     0},
    {"lock-timeout", KEY_LOCK_TIMEOUT, "SECONDS", 0,
     "How long to wait for another writer (default: 10)", 0},
    {NULL, 0, NULL, 0, "Taken as mergekit has them:", 1},
    {"copy-tokenizer", KEY_COPY_TOKENIZER, NULL, 0, "The default", 1},
    {"write-model-card", KEY_CARD, NULL, 0, "The default", 1},
    {"unsafe-truncate-embeddings", KEY_TRUNCATE, NULL, 0,
     "Without a tokenizer block: keep the first rows that all models have", 1},
    {"cuda", KEY_CUDA, NULL, 0, "Use the GPU where there is one", 1},
    {"lora-merge-dtype", KEY_LORA_DTYPE, "DTYPE", 0,
     "With --compat mergekit: what adapters are merged into (default: the "
     "model's)",
     1},
    {"lazy-unpickle", KEY_IGNORED, NULL, 0, "No effect", 1},
    {"low-cpu-memory", KEY_IGNORED + 1, NULL, 0, "No effect", 1},
    {"lora-merge-cache", KEY_IGNORED + 2, "DIR", 0, "No effect", 1},
    {"transformers-cache", KEY_IGNORED + 3, "DIR", 0,
     "No effect: the Hugging Face cache is found by HF_HUB_CACHE and HF_HOME",
     1},
    {"read-to-gpu", KEY_IGNORED + 4, NULL, 0, "No effect", 1},
    {"multi-gpu", KEY_IGNORED + 5, NULL, 0, "No effect", 1},
    {"gpu-rich", KEY_IGNORED + 6, NULL, 0, "No effect", 1},
    {"async-write", KEY_IGNORED + 7, NULL, 0, "No effect", 1},
    {"write-threads", KEY_IGNORED + 8, "N", 0, "No effect", 1},
    {"clone-tensors", KEY_IGNORED + 9, NULL, 0, "No effect", 1},
    {"safe-serialization", KEY_DEFAULT, NULL, 0, "The default", 1},
    {"no-safe-serialization", KEY_PICKLE, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-cuda", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-quiet", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-lazy-unpickle", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-low-cpu-memory", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-read-to-gpu", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-multi-gpu", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-gpu-rich", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-async-write", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-clone-tensors", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-trust-remote-code", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-allow-crimes", KEY_DEFAULT, NULL, OPTION_HIDDEN, NULL, 1},
    {"no-unsafe-truncate-embeddings", KEY_NO_TRUNCATE, NULL, OPTION_HIDDEN,
     NULL, 1},
    {"trust-remote-code", KEY_TRUST, NULL, OPTION_HIDDEN, NULL, 1},
    {"allow-crimes", KEY_CRIMES, NULL, OPTION_HIDDEN, NULL, 1},
    {0}};

void tvc_merge_init(struct tvc *c)
{
    struct tvc_merge_opts *o = c->opt;
    *o = (struct tvc_merge_opts){0};
    tvm_options_init(&o->options);
    o->store_path = tvc_default_store();
}

static error_t ignored(struct tvc_merge_opts *o, int key)
{
    const struct argp_option *e = tvc_merge_options;
    while (e->key != key)
        e++;
    if (o->n_ignored < sizeof o->ignored / sizeof *o->ignored)
        o->ignored[o->n_ignored++] = e->name;
    return 0;
}

static error_t option_lora_dtype(struct tvc *c, const char *arg)
{
    static const enum tv_dtype all[] = {TV_BF16, TV_F16, TV_F32};
    const char *name = strncmp(arg, "torch.", 6) == 0 ? arg + 6 : arg;
    struct tvc_merge_opts *o = c->opt;

    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (strcmp(name, tv_dtype_torch_name(all[i])) != 0)
            continue;
        o->options.lora_dtype = all[i];
        return 0;
    }
    return tvc_bad(c,
                   "--lora-merge-dtype: '%s' is not float16, bfloat16 or "
                   "float32",
                   arg);
}

error_t tvc_option_text(struct tvc *c, const char *arg)
{
    struct tvc_merge_opts *o = c->opt;
    const char *const at = strchr(arg, '=');

    if (!at || at == arg || at[1] == '\0')
        return tvc_bad(c, "--text: '%s' is not NAME=FILE", arg);
    if (o->n_texts == sizeof o->texts / sizeof *o->texts)
        return tvc_bad(c, "--text: too many texts");
    char *const name = tv_strdup(arg);
    if (!name)
        return ENOMEM;
    name[at - arg] = '\0';
    o->texts[o->n_texts++] = (struct tvm_text){name, at + 1};
    return 0;
}

static error_t option_compat(struct tvc *c, const char *arg)
{
    static const char *const tools[] = {"mergekit", "peft"};
    struct tvc_merge_opts *o = c->opt;
    const int i = tvc_choose(c, "--compat", arg, tools, 2);

    if (i < 0)
        return EINVAL;
    if (i == 1)
        o->peft = true;
    else
        o->options.compat_mergekit = true;
    return 0;
}

/* mergekit's switches for what there is no switch for here. All that are given
 * are told at once, for command lines carry them together. */
static enum tv_err refused(struct tvc *c)
{
    static const char *const why[] = {
        "--allow-crimes: what does not fit together is refused ('tokenizer:' "
        "joins vocabularies, 'override_architecture:' takes one class for "
        "another)",
        "--trust-remote-code: no code that comes with a model is run",
        "--no-safe-serialization: only safetensors are written",
    };
    const struct tvc_merge_opts *o = c->opt;
    char text[256] = "";
    size_t at = 0;
    size_t n = 0;

    for (size_t i = 0; i < sizeof why / sizeof *why; i++)
        if (o->refused & (1u << i))
            at += (size_t)snprintf(text + at, sizeof text - at, "%s%s",
                                   n++ ? "; " : "", why[i]);
    if (n == 0)
        return TV_OK;
    (void)tv_error_set(&c->err, TV_E_USAGE, "%s", text);
    tv_error_hint(&c->err, "leave %s out: nothing needs %s here",
                  n > 1 ? "them" : "it", n > 1 ? "them" : "it");
    return TV_E_USAGE;
}

static error_t option_flag(struct tvc_merge_opts *o, int key)
{
    struct tvm_options *m = &o->options;
    switch (key) {
    case KEY_COPY_TOKENIZER:
        m->copy_tokenizer = true;
        return 0;
    case KEY_NO_COPY_TOKENIZER:
        m->copy_tokenizer = false;
        return 0;
    case KEY_CARD:
        m->write_model_card = true;
        return 0;
    case KEY_NO_CARD:
        m->write_model_card = false;
        return 0;
    case KEY_NO_SYNC:
        m->sync = false;
        return 0;
    case KEY_FORCE:
        m->force = true;
        return 0;
    case KEY_STRICT:
        m->strict = true;
        return 0;
    case KEY_NO_VERIFY_READS:
        m->verify_reads = false;
        return 0;
    case KEY_VERIFY_INPUTS:
        m->verify_inputs = true;
        return 0;
    case KEY_ACCEPT_NUMERICS:
        m->accept_numerics = true;
        return 0;
    case KEY_KEEP_STATISTICS:
        m->keep_statistics = true;
        return 0;
    case KEY_NO_CACHE:
        m->no_cache = true;
        return 0;
    case KEY_TRUNCATE:
        m->truncate_embeddings = true;
        return 0;
    case KEY_CUDA:
        o->cuda_wanted = true;
        return 0;
    case KEY_NO_TRUNCATE:
        m->truncate_embeddings = false;
        return 0;
    case KEY_DEFAULT:
        return 0;
    default:
        return key >= KEY_IGNORED && key <= KEY_IGNORED_LAST ? ignored(o, key)
                                                             : ARGP_ERR_UNKNOWN;
    }
}

error_t tvc_merge_option(struct tvc *c, int key, const char *arg)
{
    struct tvc_merge_opts *o = c->opt;
    struct tvm_options *m = &o->options;
    switch (key) {
    case KEY_STORE:
        o->store_path = arg;
        o->store_given = true;
        return 0;
    case KEY_INTO:
        m->into = arg;
        return 0;
    case KEY_SEED:
        /* JSON documents carry it as an integer. */
        return tvc_parse_u64(c, "--random-seed", arg, INT64_MAX, &m->seed);
    case KEY_SHARD:
        return tvc_parse_shard(c, arg, &m->shard_bytes);
    case KEY_QUOTA:
        return tvc_parse_quota(c, "--quota", arg, &m->quota_bytes);
    case KEY_LOCK_TIMEOUT:
        return tvc_parse_ms(c, "--lock-timeout", arg, &m->lock_timeout_ms);
    case KEY_TEXT:
        return tvc_option_text(c, arg);
    case KEY_COMPAT:
        return option_compat(c, arg);
    case KEY_STAGES:
        o->stages_dir = arg;
        return *arg ? 0 : tvc_bad(c, "--intermediate-dir is empty");
    case KEY_LORA_DTYPE:
        return option_lora_dtype(c, arg);
    case KEY_CRIMES:
        o->refused |= 1u;
        return 0;
    case KEY_TRUST:
        o->refused |= 2u;
        return 0;
    case KEY_PICKLE:
        o->refused |= 4u;
        return 0;
    default:
        return option_flag(o, key);
    }
}

static void notes(struct tvc *c, const struct tvc_merge_opts *o)
{
    char list[256] = "";
    size_t at = 0;
    for (size_t i = 0; i < o->n_ignored && at < sizeof list; i++) {
        const int n = snprintf(list + at, sizeof list - at, "%s--%s",
                               i ? ", " : "", o->ignored[i]);
        at += n > 0 ? (size_t)n : 0;
    }
    if (o->n_ignored)
        tvc_note(&c->out,
                 "%s: no effect here; inputs are read in place and adapters "
                 "applied on the fly",
                 list);
    if (o->cuda_wanted && c->device != TVC_DEVICE_CUDA)
        tvc_note(&c->out, "--cuda: no GPU is used (see --device); the CPU does "
                          "the work");
}

/* Groups of finished tensors that are small: how crash tests get many commits
 * out of a small model. Changes no byte of any result. */
static enum tv_err group_bytes(struct tvc *c, uint64_t *out)
{
    const char *text = getenv("TV_GROUP_BYTES");

    if (!text)
        return TV_OK;
    const enum tv_err rc = tv_parse_bytes(text, false, out, &c->err);
    if (rc != TV_OK)
        tv_error_context(&c->err, "TV_GROUP_BYTES");
    return rc;
}

/* With --device auto a run goes on with the device it began with. Where that is
 * gone, what depends on it is refused by the plan. On a GPU it makes the
 * factors there that it has begun to make there, however much memory is free
 * now. */
static void keep_device(struct tvc *c, const struct tvm_options *m)
{
    struct tvm_status status = {.n_done = 0};
    const struct tvm_device *const d = &status.device;
    uint64_t index = 0;

    if (m->into)
        tvm_into_device(m->store, m->into, &status.device);
    else if (!m->out_dir || tvm_status(m->out_dir, &status, NULL) != TV_OK)
        return;
    if (!m->accept_numerics && !m->force)
        c->device_factor_bytes = d->memory_bytes;
    if (c->device != TVC_DEVICE_AUTO)
        return;
    if (strcmp(d->name, "cpu") == 0)
        c->device = TVC_DEVICE_CPU;
    else if (strncmp(d->name, "cuda:", 5) == 0 &&
             tv_parse_bytes(d->name + 5, false, &index, NULL) == TV_OK &&
             index <= INT_MAX && tvk_cuda_find((int)index, NULL) == TV_OK) {
        c->device = TVC_DEVICE_CUDA;
        c->device_index = (int)index;
    }
}

/* Writable also where only inputs lie in it: they are pinned. A store from the
 * environment that is not there is no fault of a command line that does not
 * name it. */
static enum tv_err open_store(struct tvc *c, bool planning)
{
    struct tvc_merge_opts *o = c->opt;
    struct tvm_options *m = &o->options;

    if (!o->store_path)
        return TV_OK;
    const enum tv_err rc =
        tvc_store_open(c, o->store_path, planning, &c->err, &m->store);
    if (rc != TV_E_NOTFOUND || o->store_given || m->into)
        return rc;
    tvc_warn(&c->out, "TV_STORE: %s", c->err.msg);
    tv_error_clear(&c->err);
    return TV_OK;
}

enum tv_err tvc_merge_prepare(struct tvc *c, bool planning)
{
    struct tvc_merge_opts *o = c->opt;
    struct tvm_options *m = &o->options;
    enum tv_err rc = refused(c);

    if (rc != TV_OK)
        return rc;
    m->out_dir = c->n_pos > 1 ? c->pos[1] : NULL;
    if (m->out_dir && m->out_dir[0] == '\0')
        return tv_error_set(&c->err, TV_E_USAGE, "OUT is empty");
    if (m->out_dir && m->into)
        return tv_error_set(&c->err, TV_E_USAGE,
                            "OUT and --into exclude each other");
    if (!m->out_dir && !m->into && !planning) {
        (void)tv_error_set(&c->err, TV_E_USAGE, "OUT is missing");
        tv_error_hint(&c->err,
                      "usage: tvmerge %s RECIPE OUT, or RECIPE --into "
                      "NAME --store STORE",
                      c->cmd->name);
        return c->err.code;
    }
    if (m->into && !o->store_path)
        return tv_error_set(&c->err, TV_E_USAGE,
                            "--into needs --store STORE (or TV_STORE)");
    m->texts = o->texts;
    m->n_texts = o->n_texts;
    m->memory_bytes = c->memory_bytes;
    m->threads = tvc_threads(c);
    rc = open_store(c, planning);
    if (rc != TV_OK)
        return rc;
    keep_device(c, m);
    if (o->cuda_wanted && c->device == TVC_DEVICE_AUTO &&
        tvk_cuda_find(c->device_index, NULL) == TV_OK)
        c->device = TVC_DEVICE_CUDA;
    rc = tvc_device_kernels(c, &m->kernels);
    if (rc != TV_OK)
        return rc;
    m->cuda = c->cuda;
    tvc_device_name(c, m->device, sizeof m->device);
    rc = group_bytes(c, &m->group_bytes);
    if (rc == TV_OK)
        notes(c, o);
    return rc;
}

static enum tv_err make_plan(struct tvc *c, struct tvc_merge *m)
{
    const struct tvc_merge_opts *o = c->opt;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&m->problems);
    rc = tvm_recipe_load(c->pos[0], &m->problems, &c->err, &m->recipe);
    if (m->recipe && tvm_recipe_next(m->recipe)) {
        rc = tvm_stages_make(m->recipe, &o->options, o->stages_dir,
                             &m->problems, &c->err, &m->stages);
        if (m->stages)
            m->plan = m->stages->items[m->stages->n - 1].plan;
    } else if (m->recipe) {
        rc = tvm_plan_make(m->recipe, &o->options, &m->problems, &c->err,
                           &m->plan);
    }
    /* Listed problems speak for themselves. */
    if (m->problems.n_errors > 0)
        return TV_OK;
    if (rc == TV_OK && !m->plan)
        return tv_error_set(&c->err, TV_E_INTERNAL,
                            "planning gave neither a plan nor a problem");
    return rc;
}

/* The plan with these options' device in place of m's. */
static bool plan_on_device(struct tvc *c, struct tvc_merge *m)
{
    struct tvc_merge there = {.plan = NULL};

    if (make_plan(c, &there) != TV_OK || there.problems.n_errors > 0) {
        tv_error_clear(&c->err);
        tvc_merge_free(&there);
        return false;
    }
    tvc_merge_free(m);
    *m = there;
    return true;
}

enum tv_err tvc_merge_plan(struct tvc *c, struct tvc_merge *m)
{
    struct tvc_merge_opts *const o = c->opt;
    tvk_cuda *d = NULL;
    enum tv_err rc = make_plan(c, m);

    if (rc != TV_OK || m->problems.n_errors > 0 || !m->plan ||
        c->device != TVC_DEVICE_AUTO || c->cuda)
        return rc;
    rc = tvc_device_for(c, tvm_plan_device_elems(m->plan), &d);
    if (rc != TV_OK || !d)
        return rc;
    o->options.cuda = d;
    tvc_device_name(c, o->options.device, sizeof o->options.device);
    if (plan_on_device(c, m))
        return TV_OK;
    /* It has not enough memory for this one. */
    o->options.cuda = NULL;
    (void)snprintf(o->options.device, sizeof o->options.device, "cpu");
    return TV_OK;
}

void tvc_merge_opts_free(struct tvc_merge_opts *o)
{
    for (size_t i = 0; i < o->n_texts; i++)
        tv_free((void *)(uintptr_t)o->texts[i].name);
    o->n_texts = 0;
    tv_store_close(o->options.store);
    o->options.store = NULL;
}

void tvc_merge_free(struct tvc_merge *m)
{
    if (m->stages)
        tvm_stages_free(m->stages);
    else
        tvm_plan_free(m->plan);
    tvm_recipe_free(m->recipe);
    tvm_problems_free(&m->problems);
    *m = (struct tvc_merge){0};
}

json_t *tvc_stages_json(const struct tvc_merge *m)
{
    if (!m->stages)
        return NULL;
    json_t *a = json_array();
    for (size_t i = 0; i + 1 < m->stages->n; i++) {
        const struct tvm_stage *x = &m->stages->items[i];
        (void)json_array_append_new(
            a,
            json_pack("{s:o, s:s, s:o, s:o, s:o, s:b}", "name",
                      tvc_json_string(x->name), "method",
                      x->plan ? x->plan->method_name : "", "dir",
                      x->dir ? tvc_json_string(x->dir) : json_null(), "tensors",
                      tvc_json_u64(x->plan ? x->plan->n_tensors : 0), "bytes",
                      tvc_json_u64(x->plan ? x->plan->bytes_written : 0),
                      "made", (int)x->needed));
    }
    return a;
}

void tvc_problems_print(struct tvc *c, const struct tvm_problems *p, bool notes)
{
    for (size_t i = 0; i < p->n; i++) {
        if (p->items[i].is_note && (!notes || c->out.quiet))
            continue;
        tvc_problem(&c->out,
                    p->items[i].is_error  ? TVC_ERROR
                    : p->items[i].is_note ? TVC_NOTE
                                          : TVC_WARNING,
                    p->items[i].where, p->items[i].message);
    }
}

json_t *tvc_problems_json(const struct tvm_problems *p, bool notes)
{
    json_t *a = json_array();
    for (size_t i = 0; i < p->n; i++) {
        const struct tvm_problem *x = &p->items[i];
        if (x->is_note && !notes)
            continue;
        (void)json_array_append_new(
            a, json_pack("{s:s, s:o, s:o, s:o, s:b}", "severity",
                         x->is_error ? "error" : "warning", "where",
                         tvc_json_string(x->where), "message",
                         tvc_json_string(x->message), "code",
                         x->is_error ? json_string(tv_err_name(x->code))
                                     : json_null(),
                         "note", (int)x->is_note));
    }
    return a;
}

int tvc_problems_fail(struct tvc *c, const struct tvm_problems *p)
{
    const struct tvm_problem *first = NULL;
    const enum tv_err code = tvm_problems_code(p);
    for (size_t i = 0; i < p->n && !first; i++)
        if (p->items[i].is_error && p->items[i].code == code)
            first = &p->items[i];
    struct tv_error e = {0};
    if (p->n_errors == 1 && first)
        (void)tv_error_set(&e, code, "%s%s%s", first->where,
                           *first->where ? ": " : "", first->message);
    else
        (void)tv_error_set(&e, code, "%zu problems; nothing was written",
                           p->n_errors);
    if (c->out.json)
        tvc_error_full(&c->out, &e, tvc_problems_json(p, true));
    else if (p->n_errors > 1)
        tvc_error(&c->out, &e);
    return tvc_done(c, tvc_exit_status(code));
}
