/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compare_entries.c - what a comparison is of: models, plain task arithmetic,
 * merges; their names, places and keys.
 *
 * Everything is planned here, before anything is done, so that all problems of
 * all recipes show at once.
 */
#include <stdio.h>
#include <string.h>

#include "compare.h"
#include "tv/adapters.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

static struct entry *entry_add(struct tvc_compare *p)
{
    struct entry *const more =
        tv_realloc(p->entries, (p->n_entries + 1) * sizeof *more);

    if (!more)
        return NULL;
    p->entries = more;
    more[p->n_entries] = (struct entry){.kind = ENTRY_MERGE};
    return &more[p->n_entries++];
}

static bool name_taken(const struct tvc_compare *p, const char *name)
{
    for (size_t i = 0; i < p->n_entries; i++)
        if (p->entries[i].name && strcmp(p->entries[i].name, name) == 0)
            return true;
    return false;
}

/* A file name that is nobody's yet: what is no letter, digit or one of ._-
 * becomes '-'. */
static char *free_name(const struct tvc_compare *p, const char *wish)
{
    const size_t cap = strlen(wish) + 24;
    char *name = tv_alloc(cap);

    if (!name)
        return NULL;
    (void)snprintf(name, cap, "%s", wish);
    for (char *q = name; *q; q++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                    "0123456789._-",
                    *q))
            *q = '-';
    if (name[0] == '.' || name[0] == '\0')
        name[0] = '-';
    const size_t n = strlen(name);
    for (unsigned i = 2; name_taken(p, name); i++)
        (void)snprintf(name + n, cap - n, "-%u", i);
    return name;
}

/* "dir/sub/file.yml" -> "file", owned. */
static char *stem_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *from = slash ? slash + 1 : path;
    const char *dot = strrchr(from, '.');
    const size_t n = dot && dot > from ? (size_t)(dot - from) : strlen(from);
    char *stem = tv_alloc(n + 1);

    if (stem) {
        memcpy(stem, from, n);
        stem[n] = '\0';
    }
    return stem;
}

enum tv_err tvc_compare_plan(struct tvc_compare *p, const struct entry *e,
                             uint64_t quota, struct tvc_merge *m)
{
    struct tvc *c = p->c;
    struct tvm_options o = p->opts->options;
    bool adapter = false;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&m->problems);
    o.out_dir = e->dir ? e->dir : p->opts->out;
    o.quota_bytes = quota;
    TV_TRY(tvm_adapters_wanted(e->recipe, &o, &adapter, &c->err));
    if (adapter) {
        rc = tv_error_set(&c->err, TV_E_UNSUPPORTED,
                          "%s gives an adapter, and compare scores models",
                          e->recipe);
        tv_error_hint(&c->err, "'tvmerge run' merges it, 'tveval ppl BASE+OUT' "
                               "scores it");
        goto out;
    }
    rc = tvm_recipe_load_as(e->recipe, e->as_method, e->as_sparsify,
                            &m->problems, &c->err, &m->recipe);
    if (m->recipe && tvm_recipe_next(m->recipe))
        rc = tv_error_set(&c->err, TV_E_UNSUPPORTED,
                          "%s: recipes of several documents are not compared; "
                          "run them, then compare what they give",
                          e->recipe);
    else if (m->recipe)
        rc = tvm_plan_make(m->recipe, &o, &m->problems, &c->err, &m->plan);
out:
    /* Listed problems speak for themselves. */
    return m->problems.n_errors > 0 ? TV_OK : rc;
}

/* Takes over what is new of a recipe's problems: several methods over one
 * recipe have most of them in common. method: the one that it is merged by
 * though the recipe does not say so; NULL: as it is written. */
static void keep_problems(struct tvc_compare *p, const struct tvm_problems *of,
                          const char *method)
{
    char whose[160] = "";

    for (size_t i = 0; i < of->n; i++) {
        const struct tvm_problem *x = &of->items[i];
        bool known = false;
        for (size_t k = 0; k < p->problems.n && !known; k++) {
            const struct tvm_problem *y = &p->problems.items[k];
            known = strcmp(x->where, y->where) == 0 &&
                    strcmp(x->message, y->message) == 0;
        }
        if (known)
            continue;
        if (method && x->is_error)
            (void)snprintf(whose, sizeof whose, " (merged by %.64s%s)", method,
                           p->opts->default_methods
                               ? ", a method of the default list: --methods "
                                 "names others"
                               : "");
        if (x->is_note)
            tvm_problem_note(&p->problems, x->where, "%s", x->message);
        else
            tvm_problem_add(&p->problems, x->is_error, x->code, x->where,
                            "%s%s", x->message, x->is_error ? whose : "");
    }
}

static int base_of(const struct tvm_plan *plan)
{
    for (size_t i = 0; i < plan->n_tensors; i++)
        if (plan->tensors[i].base >= 0)
            return (int)plan->tensors[i].sources[plan->tensors[i].base].input;
    return -1;
}

/* <merge>_<sparsify>, or the method's name where nothing is left out. */
static const char *label_of(const struct tvm_plan *plan, char *dst, size_t cap)
{
    static const struct {
        const char *method, *merge, *sparsify;
    } known[] = {
        {"task_arithmetic", "linear", NULL},
        {"ties", "ties", "magnitude"},
        {"dare_linear", "linear", "random"},
        {"dare_ties", "ties", "random"},
        {"breadcrumbs", "linear", "outliers"},
        {"breadcrumbs_ties", "ties", "outliers"},
        {"della", "ties", "della"},
        {"della_linear", "linear", "della"},
        {"sparsegpt_ties", "ties", "sparsegpt"},
        {"ties_sparsegpt", "ties", "sparsegpt"},
        {"sparsegpt_linear", "linear", "sparsegpt"},
        {"dare_sparsegpt", "linear", "sparsegpt"},
    };

    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(plan->method_name, known[i].method) != 0)
            continue;
        const char *chosen = tvm_plan_choice(plan, "sparsify");
        if (!chosen || strcmp(chosen, "none") == 0)
            chosen = known[i].sparsify;
        if (!chosen)
            break;
        (void)snprintf(dst, cap, "%s_%s", known[i].merge, chosen);
        return dst;
    }
    (void)snprintf(dst, cap, "%s", plan->method_name);
    return dst;
}

/* Does the method leave something out, and is it told to keep all? */
static bool keeps_all(const struct tvm_plan *plan)
{
    const char *chosen = tvm_plan_choice(plan, "sparsify");
    const char *pattern = tvm_plan_choice(plan, "pattern");
    struct tvm_method_info info;
    size_t at = 0;

    if ((chosen && strcmp(chosen, "none") == 0) ||
        (pattern && strcmp(pattern, "none") != 0))
        return false;
    for (size_t i = 0; i < plan->n_tensors; i++) {
        const struct tvm_tensor *t = &plan->tensors[i];
        if (t->action != TVM_MERGE || !t->method)
            continue;
        tvm_method_info(t->method, &info);
        at = 0;
        while (at < info.n_params &&
               strcmp(info.params[at].name, "density") != 0)
            at++;
        if (at == info.n_params)
            return false;
        for (size_t s = 0; s < t->n_sources; s++)
            if ((int)s != t->base &&
                t->per_source[s * info.n_params + at] < 1.0)
                return false;
    }
    return true;
}

static void hash_settings(const struct tvc_compare *p, struct tv_buf *b)
{
    const struct compare_opts *o = p->opts;

    tv_buf_fmt(b, "protocol %s context %zu stride %zu bos %ld tokenizer ",
               tve_protocol_name(o->eval.ppl.protocol), o->eval.ppl.context,
               o->eval.ppl.stride, (long)o->eval.ppl.bos);
    tv_buf_fmt(b, "%s", o->eval.tokenizer ? o->eval.tokenizer : "");
    if (p->device[0])
        tv_buf_fmt(b, " device %s ", p->device);
    for (size_t i = 0; i < o->n_texts; i++)
        tv_buf_add(b, &p->text_hash[i], sizeof p->text_hash[i]);
}

/* Name, place and key of an entry; `what`: what it is about. */
static enum tv_err entry_finish(struct tvc_compare *p, struct entry *e,
                                const char *wish, const char *what,
                                struct tv_hash of)
{
    struct tv_buf b;

    e->name = free_name(p, wish);
    if (!e->name)
        return tvc_compare_oom(p->c);
    if (e->kind == ENTRY_MERGE) {
        e->dir = tv_path_join(p->opts->out, e->name);
        if (!e->dir)
            return tvc_compare_oom(p->c);
    }
    tv_buf_init(&b, 1u << 20);
    tv_buf_fmt(&b, "%s %d ", what, (int)e->kind);
    tv_buf_add(&b, &of, sizeof of);
    hash_settings(p, &b);
    e->key = tv_hash128(b.data, b.n_bytes);
    const bool failed = b.failed;
    tv_buf_free(&b);
    return failed ? tvc_compare_oom(p->c) : TV_OK;
}

/* The models of a plan that are not entries yet, the base first. */
static enum tv_err add_models(struct tvc_compare *p, const struct tvm_plan *pl)
{
    enum tv_err rc = TV_OK;
    const int base = base_of(pl);

    if (base >= 0 && !p->base) {
        p->base = tv_strdup(pl->inputs[base].ref);
        if (!p->base)
            return tvc_compare_oom(p->c);
    }
    for (size_t i = 0; i <= pl->n_inputs; i++) {
        /* Once for the base, then for all. */
        const size_t at = i == 0 ? (size_t)(base < 0 ? 0 : base) : i - 1;
        const struct tvm_plan_input *in = &pl->inputs[at];
        char wish[64];
        bool known = at >= pl->n_inputs;
        for (size_t k = 0; k < p->n_entries && !known; k++)
            known =
                p->entries[k].ref && strcmp(p->entries[k].ref, in->ref) == 0;
        if (known)
            continue;
        struct entry *e = entry_add(p);
        if (!e)
            return tvc_compare_oom(p->c);
        e->kind = (int)at == base ? ENTRY_BASE : ENTRY_DONOR;
        e->ref = tv_strdup(in->ref);
        if (!e->ref)
            return tvc_compare_oom(p->c);
        (void)snprintf(wish, sizeof wish, "%s%zu",
                       e->kind == ENTRY_BASE ? "base" : "model",
                       e->kind == ENTRY_BASE ? (size_t)0 : p->n_donors++);
        TV_TRY(entry_finish(p, e, wish, in->ref, in->fingerprint));
    }
out:
    return rc;
}

static enum tv_err add_merge(struct tvc_compare *p, const char *recipe,
                             const char *method, const char *sparsify,
                             bool models_too)
{
    enum tv_err rc = TV_OK;
    struct tvc_merge m = {0};
    const struct entry probe = {.kind = ENTRY_MERGE,
                                .recipe = recipe,
                                .as_method = method,
                                .as_sparsify = sparsify};
    char label[96];

    TV_TRY(tvc_compare_plan(p, &probe, p->opts->options.quota_bytes, &m));
    keep_problems(p, &m.problems, method);
    if (m.problems.n_errors > 0 || !m.plan)
        goto out;
    if (models_too)
        TV_TRY(add_models(p, m.plan));
    /* The same merge twice says nothing new. */
    for (size_t i = 0; i < p->n_entries; i++)
        if (p->entries[i].kind == ENTRY_MERGE &&
            tv_hash_equal(p->entries[i].plan, m.plan->hash))
            goto out;
    struct entry *e = entry_add(p);
    if (!e) {
        rc = tvc_compare_oom(p->c);
        goto out;
    }
    *e = probe;
    e->plan = m.plan->hash;
    e->method = tv_strdup(m.plan->method_name);
    if (!e->method) {
        rc = tvc_compare_oom(p->c);
        goto out;
    }
    (void)label_of(m.plan, label, sizeof label);
    for (size_t i = 0; i < m.plan->n_inputs; i++)
        e->random = e->random || (m.plan->inputs[i].calibrated &&
                                  m.plan->inputs[i].calibration->random);
    e->keeps_all = strcmp(label, m.plan->method_name) != 0 && keeps_all(m.plan);
    if (name_taken(p, label)) {
        char *stem = stem_of(recipe);
        char both[192];
        (void)snprintf(both, sizeof both, "%.80s-%.100s", label,
                       stem ? stem : "");
        tv_free(stem);
        rc = entry_finish(p, e, both, label, m.plan->hash);
    } else {
        rc = entry_finish(p, e, label, label, m.plan->hash);
    }
out:
    tvc_merge_free(&m);
    return rc;
}

enum tv_err tvc_compare_collect(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct compare_opts *o = p->opts;
    struct tvc *c = p->c;
    const size_t before = p->problems.n_errors; /* of texts */

    if (o->n_methods == 0 && c->n_pos == 1) {
        o->default_methods = true;
        TV_TRY(tvc_compare_methods(c, tvm_method_find("sparsegpt_ties")
                                          ? TVC_COMPARE_METHODS
                                          : "ties,dare_ties"));
    }
    /* Models and plain task arithmetic of every recipe that has a base. */
    for (size_t i = 0; i < c->n_pos; i++) {
        struct tvc_merge m = {0};
        const struct entry probe = {.recipe = c->pos[i]};
        bool based = false;
        rc = tvc_compare_plan(p, &probe, 0, &m);
        if (rc == TV_OK) {
            keep_problems(p, &m.problems, NULL);
            if (m.problems.n_errors == 0 && m.plan) {
                based = base_of(m.plan) >= 0;
                rc = add_models(p, m.plan);
            }
        }
        tvc_merge_free(&m);
        TV_TRY(rc);
        if (based && !p->has_plain) {
            p->has_plain = true;
            TV_TRY(add_merge(p, c->pos[i], "task_arithmetic", "none", false));
        }
    }
    if (p->problems.n_errors > before)
        goto out;
    for (size_t i = 0; i < o->n_methods; i++)
        TV_TRY(add_merge(p, c->pos[0], o->methods[i].method,
                         o->methods[i].sparsify, true));
    for (size_t i = 0; o->n_methods == 0 && i < c->n_pos; i++)
        TV_TRY(add_merge(p, c->pos[i], NULL, NULL, true));
out:
    return rc;
}
