/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compare_options.c - the command line of tvmerge compare.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "compare.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"

enum {
    KEY_OUT = 'o',
    KEY_TEXT = 0x2200,
    KEY_METHODS,
    KEY_KEEP,
    KEY_STORE,
    KEY_SEED,
    KEY_QUOTA,
    KEY_NO_SYNC,
    KEY_FORCE,
    KEY_NO_CACHE,
    KEY_KEEP_STATISTICS
};

const struct argp_option tvc_compare_options[] = {
    {"out", KEY_OUT, "OUT", 0, "Directory for all results", 0},
    {"text", KEY_TEXT, "FILE", 0,
     "A text in UTF-8 to score with; may be repeated. NAME=FILE, where there "
     "is no such file: text of the task of the model NAME, for methods that "
     "calibrate",
     0},
    {"methods", KEY_METHODS, "LIST", 0,
     "Methods to merge one recipe by (default: " TVC_COMPARE_METHODS "), or "
     "ties_X and linear_X with X one of magnitude, random, importance, "
     "sparsegpt",
     0},
    {"keep", KEY_KEEP, "WHAT", 0,
     "Merged models that stay: all (default), best or none; the others are "
     "removed once they are scored, so that at most two are there",
     0},
    {"store", KEY_STORE, "STORE", 0,
     "Store for store:NAME, masks and statistics (default: $TV_STORE, else "
     "one in OUT/" TVC_COMPARE_STATE ", unless --quota is given)",
     0},
    {"random-seed", KEY_SEED, "N", 0, "Seed of random masks (default: 0)", 0},
    {"quota", KEY_QUOTA, "SIZE", 0,
     "Most bytes that OUT may take on disk (default, 0 and none: no limit)", 0},
    {"force", KEY_FORCE, NULL, 0, "Replace what OUT holds of other inputs", 0},
    {"no-sync", KEY_NO_SYNC, NULL, 0,
     "Do not wait for the disk: faster, but a power cut may cost the run", 0},
    {"no-cache", KEY_NO_CACHE, NULL, 0,
     "Neither use nor keep masks and task vectors in the store", 0},
    {"keep-statistics", KEY_KEEP_STATISTICS, NULL, 0,
     "Keep the statistics of calibration in the store, for other densities and "
     "methods",
     0},
    TVC_OPTIONS_PROTOCOL(1),
    TVC_OPTION_TOKENIZER(1),
    TVC_OPTION_BOS(1),
    {0},
};

void tvc_compare_init(struct tvc *c)
{
    struct compare_opts *o = c->opt;

    tvm_options_init(&o->options);
    o->options.many_methods = true;
    o->store_path = tvc_default_store();
    tvc_eval_init(&o->eval);
}

/* FILE, or NAME=FILE as tvmerge run has it. */
static error_t option_text(struct tvc *c, const char *arg)
{
    struct compare_opts *o = c->opt;
    const char *const at = strchr(arg, '=');

    if (o->n_texts == TVC_COMPARE_TEXTS_MAX ||
        o->n_tasks == TVC_COMPARE_TEXTS_MAX)
        return tvc_bad(c, "more than %u texts", TVC_COMPARE_TEXTS_MAX);
    if (!at || at == arg || at[1] == '\0' || tv_path_exists(arg)) {
        o->texts[o->n_texts++] = arg;
        return 0;
    }
    char *const name = o->task_names[o->n_tasks];
    if ((size_t)(at - arg) >= sizeof o->task_names[0])
        return tvc_bad(c, "--text: the name in '%s' is too long", arg);
    memcpy(name, arg, (size_t)(at - arg));
    o->tasks[o->n_tasks++] = (struct tvm_text){name, at + 1};
    return 0;
}

static error_t option_keep(struct tvc *c, const char *arg)
{
    static const char *const names[] = {"all", "best", "none"};
    struct compare_opts *o = c->opt;

    const int i = tvc_choose(c, "--keep", arg, names, 3);

    if (i < 0)
        return EINVAL;
    o->keep = (enum keep)i;
    return 0;
}

error_t tvc_compare_option(struct tvc *c, int key, const char *arg)
{
    struct compare_opts *o = c->opt;

    switch (key) {
    case KEY_OUT:
        o->out = arg;
        return 0;
    case KEY_TEXT:
        return option_text(c, arg);
    case KEY_METHODS:
        return tvc_compare_methods(c, arg) == TV_OK ? 0 : EINVAL;
    case KEY_KEEP:
        return option_keep(c, arg);
    case KEY_STORE:
        o->store_path = arg;
        o->store_given = true;
        return 0;
    case KEY_SEED:
        return tvc_parse_u64(c, "--random-seed", arg, INT64_MAX,
                             &o->options.seed);
    case KEY_QUOTA:
        return tvc_parse_quota(c, "--quota", arg, &o->options.quota_bytes);
    case KEY_NO_SYNC:
        o->options.sync = false;
        return 0;
    case KEY_FORCE:
        o->options.force = true;
        return 0;
    case KEY_KEEP_STATISTICS:
        o->options.keep_statistics = true;
        return 0;
    case KEY_NO_CACHE:
        o->options.no_cache = true;
        return 0;
    default:
        return tvc_eval_option(c, key, arg, &o->eval);
    }
}

/* What a method that is asked for by name means, whatever the recipe says of
 * sparsifying: its name, or <merge>_<sparsify> as the results are called. */
static bool method_named(const char *name, struct wanted *out)
{
    static const char *const merges[][2] = {{"ties_", "ties"},
                                            {"linear_", "task_arithmetic"}};
    static const char *const ways[] = {"magnitude", "random", "importance",
                                       "sparsegpt"};

    *out = (struct wanted){name, NULL};
    if (strcmp(name, "ties") == 0)
        out->sparsify = "magnitude";
    else if (strcmp(name, "task_arithmetic") == 0)
        out->sparsify = "none";
    else if (strstr(name, "sparsegpt"))
        out->sparsify = "sparsegpt";
    if (tvm_method_find(name))
        return true;
    for (size_t i = 0; i < sizeof merges / sizeof *merges; i++) {
        const size_t n = strlen(merges[i][0]);
        for (size_t k = 0; k < sizeof ways / sizeof *ways; k++)
            if (strncmp(name, merges[i][0], n) == 0 &&
                strcmp(name + n, ways[k]) == 0) {
                *out = (struct wanted){merges[i][1], ways[k]};
                return true;
            }
    }
    return false;
}

static const char *suggest(const char *name)
{
    static const char *const names[] = {
        "ties_magnitude",    "ties_random",     "ties_importance",
        "ties_sparsegpt",    "linear_random",   "linear_magnitude",
        "linear_importance", "linear_sparsegpt"};
    const char *const like = tvm_method_suggest(name);

    return like ? like : tv_suggest(name, names, sizeof names / sizeof *names);
}

enum tv_err tvc_compare_methods(struct tvc *c, const char *list)
{
    struct compare_opts *o = c->opt;

    o->n_methods = 0;
    if (strlen(list) >= sizeof o->method_list)
        return tv_error_set(&c->err, TV_E_USAGE,
                            "--methods: the list is too "
                            "long");
    memcpy(o->method_list, list, strlen(list) + 1);
    for (char *at = o->method_list; at;) {
        char *const comma = strchr(at, ',');
        if (comma)
            *comma = '\0';
        struct wanted w;
        if (!method_named(at, &w)) {
            const char *like = suggest(at);
            (void)tv_error_set(&c->err, TV_E_USAGE,
                               "--methods: unknown method '%s'", at);
            if (like)
                tv_error_hint(&c->err, "did you mean '%s'?", like);
            return TV_E_USAGE;
        }
        if (o->n_methods == TVC_COMPARE_METHODS_MAX)
            return tv_error_set(&c->err, TV_E_USAGE, "more than %u methods",
                                TVC_COMPARE_METHODS_MAX);
        o->methods[o->n_methods++] = w;
        at = comma ? comma + 1 : NULL;
    }
    return TV_OK;
}

enum tv_err tvc_compare_check(struct tvc *c)
{
    const struct compare_opts *o = c->opt;

    if (!o->out || o->out[0] == '\0')
        return tv_error_set(&c->err, TV_E_USAGE,
                            "where to? add -o OUT, a directory");
    if (o->n_texts == 0)
        return tv_error_set(&c->err, TV_E_USAGE,
                            o->n_tasks > 0
                                ? "no text to score with: add --text FILE "
                                  "(--text NAME=FILE calibrates that model)"
                                : "no text: add --text FILE");
    if (o->n_methods > 0 && c->n_pos > 1)
        return tv_error_set(&c->err, TV_E_USAGE,
                            "--methods goes with one recipe, not with %zu",
                            c->n_pos);
    return TV_OK;
}
