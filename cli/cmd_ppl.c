/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_ppl.c - tveval ppl: perplexity of a model on texts.
 *
 * A figure means nothing without how it was taken, so every report names the
 * protocol, the context, the BOS rule, the tokens and the tokenizer.
 */
#include <string.h>

#include "eval_options.h"
#include "progress.h"
#include "signals.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tveval.h"

#define TEXTS_MAX 256u

enum { KEY_TEXT = 0x500, KEY_IDS, KEY_STORE };

struct source {
    const char *path;
    bool ids;
};

struct opts {
    struct source sources[TEXTS_MAX];
    size_t n_sources, n_texts;
    bool stdin_taken;
    struct tvc_eval_opts eval;
    const char *store;
};

static void init(struct tvc *c)
{
    struct opts *o = c->opt;
    tvc_eval_init(&o->eval);
}

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;

    switch (key) {
    case KEY_TEXT:
    case KEY_IDS:
        if (o->n_sources == TEXTS_MAX)
            return tvc_bad(c, "more than %u texts", TEXTS_MAX);
        if (key == KEY_TEXT && strcmp(arg, "-") == 0) {
            if (o->stdin_taken)
                return tvc_bad(c, "--text -: stdin is read once");
            o->stdin_taken = true;
        }
        o->sources[o->n_sources++] = (struct source){arg, key == KEY_IDS};
        o->n_texts += key == KEY_TEXT;
        return 0;
    case KEY_STORE:
        o->store = arg;
        return 0;
    default:
        return tvc_eval_option(c, key, arg, &o->eval);
    }
}

struct job {
    struct tvc *c;
    struct opts *o;
    struct tvc_subject subject;
    tve_model *model;
    tve_tokenizer *tokenizer; /* NULL: only ids */
    struct tve_ids ids[TEXTS_MAX];
    struct tve_ppl results[TEXTS_MAX];
    uint64_t n_scored;
    double seconds;
};

static const char *name_of(const struct source *s)
{
    return !s->ids && strcmp(s->path, "-") == 0 ? "stdin" : s->path;
}

static enum tv_err read_source(struct job *j, const struct source *s,
                               struct tve_ids *ids, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *text = NULL;
    size_t n = 0;
    struct tvc_ids from = {0};

    if (s->ids) {
        TV_TRY(tvc_ids_read(s->path, &from, err));
        /* the arrays are of one type: hand the memory over */
        ids->ids = from.ids;
        ids->n = ids->cap = from.batch * from.seq;
    } else {
        TV_TRY(tvc_text_read(s->path, &text, &n, err));
        rc = tve_tokenizer_encode(j->tokenizer, text, n,
                                  tve_protocol_special(j->o->eval.ppl.protocol),
                                  ids, err);
        if (rc != TV_OK)
            tv_error_context(err, "%s", name_of(s));
    }
out:
    tv_free(text);
    return rc;
}

static enum tv_err score(struct job *j, size_t i, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct source *s = &j->o->sources[i];
    struct tvc_progress *bar = NULL;

    bar = tvc_progress_begin(&j->c->out, "score", "tokens");
    const struct tve_progress progress = {tvc_eval_step, bar,
                                          tvc_cancel_flag()};
    rc = tve_perplexity(j->model, j->ids[i].ids, j->ids[i].n, &j->o->eval.ppl,
                        &progress, &j->results[i], err);
    tvc_progress_end(bar);
    if (rc != TV_OK) {
        tv_error_context(err, "%s", name_of(s));
        return rc;
    }
    j->n_scored += j->results[i].n_scored;
    j->seconds += j->results[i].seconds;
    tve_ids_free(&j->ids[i]);
    return rc;
}

static size_t window_of(const struct job *j)
{
    const struct tve_ppl_options *o = &j->o->eval.ppl;
    return o->context ? o->context
                      : tve_protocol_context(o->protocol,
                                             tve_model_positions(j->model));
}

/* Of protocol stride. */
static size_t stride_of(const struct job *j)
{
    const size_t given = j->o->eval.ppl.stride;
    return given ? given : j->results[0].context / 2;
}

static double rate(const struct job *j)
{
    return j->seconds > 0 ? (double)j->n_scored / j->seconds : 0;
}

static void document(const struct job *j, const char *hash)
{
    struct tvc *c = j->c;
    const struct opts *o = j->o;
    json_t *texts = json_array();

    for (size_t i = 0; i < o->n_sources; i++) {
        const struct tve_ppl *p = &j->results[i];
        (void)json_array_append_new(
            texts,
            json_pack("{s:o, s:o, s:o, s:o, s:o, s:o}", "file",
                      tvc_json_string(o->sources[i].path), "tokens",
                      tvc_json_u64(p->n_tokens), "tokens_scored",
                      tvc_json_u64(p->n_scored), "nll_mean",
                      tvc_json_real(p->nll_mean), "ppl", tvc_json_real(p->ppl),
                      "stderr", tvc_json_real(p->ppl_stderr)));
    }
    json_t *const doc = json_pack(
        "{s:s, s:o, s:s, s:o, s:o, s:o, s:o, s:o}", "schema", "tveval.ppl/1",
        "model", tvc_json_string(c->pos[0]), "protocol",
        tve_protocol_name(o->eval.ppl.protocol), "context",
        tvc_json_u64(j->results[0].context), "bos",
        o->eval.ppl.bos < 0 ? json_null() : json_integer(o->eval.ppl.bos),
        "tokenizer_hash", *hash ? json_string(hash) : json_null(), "texts",
        texts, "tokens_per_second", tvc_json_measured(rate(j)));
    if (o->eval.ppl.protocol == TVE_STRIDE)
        (void)json_object_set_new(doc, "stride", tvc_json_u64(stride_of(j)));
    if (c->cuda) {
        char name[32];

        tvc_device_name(c, name, sizeof name);
        (void)json_object_set_new(doc, "device", json_string(name));
        (void)json_object_set_new(doc, "on_device",
                                  json_string(tve_model_not_there(j->model)
                                                  ? "linear layers"
                                                  : "all"));
    }
    tvc_out_json(&c->out, doc);
}

static enum tv_err table(const struct job *j, const char *hash)
{
    static const char *const headers[] = {"TEXT", "PERPLEXITY", "+/-", "NLL",
                                          "TOKENS"};
    struct tvc *c = j->c;
    const struct opts *o = j->o;
    struct tvc_table t;
    char bos[32] = "none";

    if (o->eval.ppl.bos >= 0)
        (void)snprintf(bos, sizeof bos, "%ld", (long)o->eval.ppl.bos);
    tvc_table_begin(&t, "lrrrr", headers);
    for (size_t i = 0; i < o->n_sources; i++) {
        const struct tve_ppl *p = &j->results[i];
        tvc_table_cell(&t, "%s", o->sources[i].path);
        tvc_table_cell(&t, "%.4f", p->ppl);
        tvc_table_cell(&t, "%.4f", p->ppl_stderr);
        tvc_table_cell(&t, "%.6f", p->nll_mean);
        tvc_table_cell(&t, "%llu", (unsigned long long)p->n_scored);
    }
    const enum tv_err rc = tvc_table_end(&c->out, &t, &c->err);
    tvc_out(&c->out, "protocol %s, context %zu, ",
            tve_protocol_name(o->eval.ppl.protocol), j->results[0].context);
    if (o->eval.ppl.protocol == TVE_STRIDE)
        tvc_out(&c->out, "stride %zu, ", stride_of(j));
    tvc_out(&c->out, "BOS %s, tokenizer %s\n", bos,
            *hash ? hash : "none (ids)");
    tvc_say(&c->out, "%.0f tokens per second", rate(j));
    return rc;
}

static int run(struct tvc *c)
{
    struct job *j = tv_calloc(1, sizeof *j);
    struct opts *o = c->opt;
    enum tv_err rc = TV_OK;
    char hash[33] = "";
    int32_t bos = -1;

    if (!j) {
        (void)tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        return tvc_fail(c, &c->err);
    }
    j->c = c;
    j->o = o;
    if (o->n_sources == 0) {
        rc = tv_error_set(&c->err, TV_E_USAGE, "no text: add --text FILE");
        goto out;
    }
    if (o->eval.ppl.stride && o->eval.ppl.protocol != TVE_STRIDE)
        tvc_warn(&c->out, "--stride changes protocol stride only, not %s",
                 tve_protocol_name(o->eval.ppl.protocol));
    TV_TRY(tvc_subject_open(c, c->pos[0], o->store, &j->subject));
    TV_TRY(tvc_subject_runs(c, &j->subject));
    if (o->n_texts > 0) {
        TV_TRY(tve_tokenizer_of(j->subject.input, o->eval.tokenizer, &bos,
                                &c->err, &j->tokenizer));
        (void)tv_hash_hex(tve_tokenizer_hash(j->tokenizer), hash);
    } else {
        TV_TRY(tve_bos_of(j->subject.input, &bos, &c->err));
    }
    if (o->eval.ppl.bos == -2)
        o->eval.ppl.bos = bos;
    TV_TRY(tvc_subject_model(c, &j->subject, &j->model));
    TV_TRY(tvc_subject_fit(c, &j->subject, TVE_PASS_SCORES, window_of(j),
                           &j->model));
    /* What cannot be scored is said before hours of scoring. */
    for (size_t i = 0; i < o->n_sources; i++) {
        TV_TRY(read_source(j, &o->sources[i], &j->ids[i], &c->err));
        rc = tve_perplexity_check(j->model, j->ids[i].ids, j->ids[i].n,
                                  &o->eval.ppl, &c->err);
        if (rc != TV_OK)
            tv_error_context(&c->err, "%s", name_of(&o->sources[i]));
        TV_TRY(rc);
    }
    for (size_t i = 0; i < o->n_sources; i++)
        TV_TRY(score(j, i, &c->err));
    tvc_subject_told(c, j->model);
    if (c->out.json)
        document(j, hash);
    else
        TV_TRY(table(j, hash));
out:
    tve_tokenizer_close(j->tokenizer);
    tve_model_close(j->model);
    tvc_subject_close(&j->subject);
    for (size_t i = 0; i < o->n_sources; i++)
        tve_ids_free(&j->ids[i]);
    tv_free(j);
    if (rc != TV_OK)
        return tvc_fail(c, &c->err);
    return tvc_done(c, 0);
}

static const struct argp_option options[] = {
    {"text", KEY_TEXT, "FILE", 0, "A text in UTF-8 (-: stdin); may be repeated",
     0},
    {"ids", KEY_IDS, "FILE.npy", 0,
     "Token ids instead of a text (int64 or int32)", 0},
    TVC_OPTIONS_PROTOCOL(0),
    TVC_OPTION_TOKENIZER(0),
    TVC_OPTION_BOS(0),
    {"store", KEY_STORE, "STORE", 0, "Store of store:NAME references", 0},
    {0},
};

const struct tvc_command tvc_cmd_ppl = {
    .name = "ppl",
    .summary = "perplexity of a model on texts",
    .args_doc = "REF",
    .text = "REF is a model reference; REF+ADAPTER applies the adapter on "
            "the fly.\nProtocol windows: the text is cut into pieces of N-1 "
            "tokens, each begins\nwith BOS and is scored from its first "
            "token. Figures of different protocols\ndo not compare.",
    .examples = "tveval ppl ./merged --text wiki.txt\n"
                "tveval ppl ./base+./lora --text a.txt --text b.txt --json\n"
                "tveval ppl ./merged --text wiki.txt --protocol llamacpp\n"
                "tveval ppl store:merged --store models.tv --text wiki.txt",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .init = init,
    .option = option,
    .min_pos = 1,
    .max_pos = 1,
    .cancellable = true,
    .run = run,
};
