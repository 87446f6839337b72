/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_tokenize.c - tveval tokenize: the token ids of a text.
 */
#include <string.h>

#include "eval_options.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"

enum { KEY_TEXT = 0x540, KEY_SPECIAL, KEY_STORE };

struct opts {
    const char *text, *tokenizer, *store;
    bool special, given;
};

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_TEXT:
        if (o->given)
            return tvc_bad(c, "--text is given twice: one text is tokenized");
        o->text = arg;
        o->given = true;
        if (strcmp(arg, "-") == 0)
            o->text = NULL; /* stdin, as without the option */
        return 0;
    case KEY_SPECIAL:
        o->special = true;
        return 0;
    case TVC_KEY_TOKENIZER:
        o->tokenizer = arg;
        return 0;
    case KEY_STORE:
        o->store = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static bool is_json_file(const char *path)
{
    const size_t n = strlen(path);

    return n > 5 && strcmp(path + n - 5, ".json") == 0 &&
           tv_path_exists(path) && !tv_path_is_dir(path);
}

/* A directory may hold a tokenizer and no weights: then REF itself is it. So is
 * a tokenizer.json. */
static enum tv_err open_tokenizer(struct tvc *c, tve_tokenizer **out)
{
    const struct opts *o = c->opt;
    enum tv_err rc = TV_OK;
    struct tvc_subject s = {0};
    const char *path = o->tokenizer;
    char *own = NULL;
    int32_t bos = -1;

    if (!path && tv_path_is_dir(c->pos[0])) {
        own = tv_path_join(c->pos[0], "tokenizer.json");
        if (!own) {
            rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
            goto out;
        }
        if (tv_path_exists(own))
            path = c->pos[0];
    } else if (!path && is_json_file(c->pos[0])) {
        path = c->pos[0];
    }
    if (!path)
        TV_TRY(tvc_subject_open(c, c->pos[0], o->store, &s));
    TV_TRY(tve_tokenizer_of(s.input, path, &bos, &c->err, out));
out:
    tv_free(own);
    tvc_subject_close(&s);
    return rc;
}

static void document(struct tvc *c, const struct tve_ids *ids)
{
    const struct opts *o = c->opt;
    tvc_out_json_ids(
        &c->out,
        json_pack("{s:s, s:o, s:o, s:b, s:o}", "schema", "tveval.tokenize/1",
                  "model", tvc_json_string(c->pos[0]), "file",
                  o->text ? tvc_json_string(o->text) : json_null(), "special",
                  o->special, "n_tokens", tvc_json_u64(ids->n)),
        "ids", ids->ids, ids->n);
}

static int run(struct tvc *c)
{
    const struct opts *o = c->opt;
    enum tv_err rc = TV_OK;
    struct tve_ids ids = {NULL, 0, 0};
    tve_tokenizer *t = NULL;
    char *text = NULL;
    size_t n = 0;

    TV_TRY(open_tokenizer(c, &t));
    TV_TRY(tvc_text_read(o->text ? o->text : "-", &text, &n, &c->err));
    rc = tve_tokenizer_encode(t, text, n, o->special, &ids, &c->err);
    if (rc != TV_OK) {
        tv_error_context(&c->err, "%s", o->text ? o->text : "stdin");
        goto out;
    }
    if (c->out.json) {
        document(c, &ids);
    } else {
        tvc_out_ids(&c->out, ids.ids, ids.n, " ");
        tvc_out(&c->out, "\n");
    }
out:
    tve_ids_free(&ids);
    tve_tokenizer_close(t);
    tv_free(text);
    if (rc != TV_OK)
        return tvc_fail(c, &c->err);
    return tvc_done(c, 0);
}

static const struct argp_option options[] = {
    {"text", KEY_TEXT, "FILE", 0, "A text in UTF-8 (default, and -: stdin)", 0},
    {"special", KEY_SPECIAL, NULL, 0,
     "Add what the tokenizer puts around a text (BOS, ...)", 0},
    TVC_OPTION_TOKENIZER(0),
    {"store", KEY_STORE, "STORE", 0, "Store of store:NAME references", 0},
    {0},
};

const struct tvc_command tvc_cmd_tokenize = {
    .name = "tokenize",
    .summary = "token ids of a text",
    .args_doc = "REF",
    .text = "REF is a model reference, a directory that holds nothing but a "
            "tokenizer,\nor its tokenizer.json.",
    .examples = "tveval tokenize ./merged --text wiki.txt\n"
                "echo Hello | tveval tokenize ./merged --special --json",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .option = option,
    .min_pos = 1,
    .max_pos = 1,
    .run = run,
};
