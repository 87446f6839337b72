/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_compare.c - tvmerge compare: several merges of one set of inputs, and
 * what each is worth.
 *
 *   OUT/NAME/               a merge, as tvmerge run makes it
 *   OUT/.tvcompare/NAME.json  what is known of an entry: of a merge first its
 *                           cost, then with the perplexities all of it
 *   OUT/.tvcompare/lock     held while somebody works here
 *   OUT/compare.md, .json   the table, once everything is known
 *
 * Entries are done one after the other: the base, every other model, plain
 * task arithmetic, then the merges. A record is written whole or not at all
 * (rename), and a merge resumes by its own journal, so after a kill the same
 * command goes on where it was. A record carries a hash of everything its
 * figures depend on; one that belongs to something else is refused.
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "compare.h"
#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"
#include "tvmerge.h"

#define STATE_DIR ".tvcompare"

/* ---- opening and closing ------------------------------------------------- */

static enum tv_err no_memory(struct tvc *c)
{
    return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
}

static enum tv_err take_lock(struct tvc_compare *p)
{
    struct tvc *c = p->c;
    char *path = tv_path_join(p->state, "lock");

    if (!path)
        return no_memory(c);
    p->lock = tv_sys()->open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    const int failed = errno;
    if (p->lock < 0) {
        const enum tv_err rc =
            tv_error_sys(&c->err, failed, "cannot open %s", path);
        tv_free(path);
        return rc;
    }
    tv_free(path);
    if (flock(p->lock, LOCK_EX | LOCK_NB) != 0)
        return tv_error_set(&c->err, TV_E_LOCKED,
                            "another comparison works on %s", p->opts->out);
    return TV_OK;
}

/* ---- records ------------------------------------------------------------- */

static char *record_path(const struct tvc_compare *p, const struct entry *e)
{
    char *name = tv_alloc(strlen(e->name) + 6);
    char *path = NULL;

    if (name) {
        (void)snprintf(name, strlen(e->name) + 6, "%s.json", e->name);
        path = tv_path_join(p->state, name);
    }
    tv_free(name);
    return path;
}

/* What an earlier run found out. CHANGED when it was about something else. */
static enum tv_err record_load(struct tvc_compare *p, struct entry *e)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    char *path = record_path(p, e);
    char *text = NULL;
    char hex[33];
    size_t n = 0;

    if (!path) {
        rc = no_memory(c);
        goto out;
    }
    if (!tv_path_exists(path))
        goto out;
    TV_TRY(tv_file_read(path, 16u << 20, &c->err, &text, &n));
    e->record = json_loadb(text, n, 0, NULL);
    const char *key = json_string_value(json_object_get(e->record, "key"));
    if (!key) {
        rc = tv_error_set(&c->err, TV_E_CORRUPT, "%s is damaged", path);
        tv_error_hint(&c->err, "remove it: its figures are taken again");
        goto out;
    }
    if (strcmp(key, tv_hash_hex(e->key, hex)) == 0)
        goto out;
    json_decref(e->record);
    e->record = NULL;
    if (!p->opts->options.force) {
        rc = tv_error_set(&c->err, TV_E_CHANGED,
                          "%s: what %s holds of '%s' was taken of other "
                          "inputs, recipes, texts or settings",
                          p->opts->out, STATE_DIR, e->name);
        tv_error_hint(&c->err, "give another OUT, or --force to begin again");
    }
out:
    tv_free(path);
    tv_free(text);
    return rc;
}

static enum tv_err record_save(struct tvc_compare *p, struct entry *e)
{
    enum tv_err rc = TV_OK;
    char *path = record_path(p, e);
    size_t n = 0;
    char *text = tvc_compare_text(e->record, &n);

    if (!path || !text)
        rc = no_memory(p->c);
    else
        rc = tv_file_write_atomic(path, text, n, p->opts->options.sync,
                                  &p->c->err);
    tv_free(text);
    tv_free(path);
    return rc;
}

/* Sets a member; takes the reference. */
static void put(struct tvc_compare *p, struct entry *e, const char *key,
                json_t *value)
{
    if (!e->record) {
        char hex[33];
        e->record = json_pack("{s:s}", "key", tv_hash_hex(e->key, hex));
    }
    if (json_object_set_new(e->record, key, value) != 0)
        p->oom = true;
}

static bool has(const struct entry *e, const char *key)
{
    return json_object_get(e->record, key) != NULL;
}

/* ---- what is compared ---------------------------------------------------- */

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

static enum tv_err plan_recipe(struct tvc_compare *p, const struct entry *e,
                               uint64_t quota, struct tvc_merge *m)
{
    struct tvc *c = p->c;
    struct tvm_options o = p->opts->options;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&m->problems);
    o.out_dir = e->dir ? e->dir : p->opts->out;
    o.quota_bytes = quota;
    rc = tvm_recipe_load_as(e->recipe, e->as_method, e->as_sparsify,
                            &m->problems, &c->err, &m->recipe);
    if (m->recipe && tvm_recipe_next(m->recipe))
        rc = tv_error_set(&c->err, TV_E_UNSUPPORTED,
                          "%s: recipes of several documents are not compared; "
                          "run them, then compare what they give",
                          e->recipe);
    else if (m->recipe)
        rc = tvm_plan_make(m->recipe, &o, &m->problems, &c->err, &m->plan);
    /* Listed problems speak for themselves. */
    return m->problems.n_errors > 0 ? TV_OK : rc;
}

/* Takes over what is new of a recipe's problems: several methods over one
 * recipe have most of them in common. */
static void keep_problems(struct tvc_compare *p, const struct tvm_problems *of)
{
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
        if (x->is_note)
            tvm_problem_note(&p->problems, x->where, "%s", x->message);
        else
            tvm_problem_add(&p->problems, x->is_error, x->code, x->where, "%s",
                            x->message);
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

static void hash_settings(const struct tvc_compare *p, struct tv_buf *b)
{
    const struct compare_opts *o = p->opts;

    tv_buf_fmt(b, "protocol %s context %zu stride %zu bos %ld tokenizer ",
               tve_protocol_name(o->ppl.protocol), o->ppl.context,
               o->ppl.stride, (long)o->ppl.bos);
    tv_buf_fmt(b, "%s", o->tokenizer ? o->tokenizer : "");
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
        return no_memory(p->c);
    if (e->kind == ENTRY_MERGE) {
        e->dir = tv_path_join(p->opts->out, e->name);
        if (!e->dir)
            return no_memory(p->c);
    }
    tv_buf_init(&b, 1u << 20);
    tv_buf_fmt(&b, "%s %d ", what, (int)e->kind);
    tv_buf_add(&b, &of, sizeof of);
    hash_settings(p, &b);
    e->key = tv_hash128(b.data, b.n_bytes);
    const bool failed = b.failed;
    tv_buf_free(&b);
    return failed ? no_memory(p->c) : TV_OK;
}

/* The models of a plan that are not entries yet, the base first. */
static enum tv_err add_models(struct tvc_compare *p, const struct tvm_plan *pl)
{
    enum tv_err rc = TV_OK;
    const int base = base_of(pl);

    if (base >= 0 && !p->base) {
        p->base = tv_strdup(pl->inputs[base].ref);
        if (!p->base)
            return no_memory(p->c);
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
            return no_memory(p->c);
        e->kind = (int)at == base ? ENTRY_BASE : ENTRY_DONOR;
        e->ref = tv_strdup(in->ref);
        if (!e->ref)
            return no_memory(p->c);
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

    TV_TRY(plan_recipe(p, &probe, p->opts->options.quota_bytes, &m));
    keep_problems(p, &m.problems);
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
        rc = no_memory(p->c);
        goto out;
    }
    *e = probe;
    e->plan = m.plan->hash;
    e->method = tv_strdup(m.plan->method_name);
    if (!e->method) {
        rc = no_memory(p->c);
        goto out;
    }
    (void)label_of(m.plan, label, sizeof label);
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

/* What a method that was asked for by name means, whatever the recipe says of
 * sparsifying. NULL: leave it. */
static const char *sparsify_of(const char *method)
{
    if (strcmp(method, "ties") == 0)
        return "magnitude";
    if (strcmp(method, "task_arithmetic") == 0)
        return "none";
    return strstr(method, "sparsegpt") ? "sparsegpt" : NULL;
}

static enum tv_err collect(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct compare_opts *o = p->opts;
    struct tvc *c = p->c;

    if (o->n_methods == 0 && c->n_pos == 1)
        TV_TRY(tvc_compare_methods(c, tvm_method_find("sparsegpt_ties")
                                          ? TVC_COMPARE_METHODS
                                          : "ties,dare_ties"));
    /* Models and plain task arithmetic of every recipe that has a base. */
    for (size_t i = 0; i < c->n_pos; i++) {
        struct tvc_merge m = {0};
        const struct entry probe = {.recipe = c->pos[i]};
        bool based = false;
        rc = plan_recipe(p, &probe, 0, &m);
        if (rc == TV_OK) {
            keep_problems(p, &m.problems);
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
    if (p->problems.n_errors > 0)
        goto out;
    for (size_t i = 0; i < o->n_methods; i++)
        TV_TRY(add_merge(p, c->pos[0], o->methods[i],
                         sparsify_of(o->methods[i]), true));
    for (size_t i = 0; o->n_methods == 0 && i < c->n_pos; i++)
        TV_TRY(add_merge(p, c->pos[i], NULL, NULL, true));
out:
    return rc;
}

/* ---- figures ------------------------------------------------------------- */

static enum tv_err encode_all(struct tvc_compare *p, tve_tokenizer *t,
                              struct tve_ids *ids)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < p->opts->n_texts; i++) {
        rc = tve_tokenizer_encode(t, p->text[i], p->text_bytes[i],
                                  tve_protocol_special(p->opts->ppl.protocol),
                                  &ids[i], &p->c->err);
        if (rc != TV_OK) {
            tv_error_context(&p->c->err, "%s", p->opts->texts[i]);
            break;
        }
    }
    return rc;
}

/* A model's own tokenizer, else the base's. */
static enum tv_err tokenizer_for(struct tvc_compare *p, tv_input *input,
                                 int32_t *bos, tve_tokenizer **out)
{
    struct tvc *c = p->c;
    enum tv_err rc =
        tve_tokenizer_of(input, p->opts->tokenizer, bos, &c->err, out);

    if (rc != TV_E_INPUT || p->opts->tokenizer || !p->base)
        return rc;
    struct tvc_subject base = {0};
    tv_error_clear(&c->err);
    rc = tvc_subject_open_in(c, p->base, p->opts->options.store, &base);
    if (rc == TV_OK)
        rc = tve_tokenizer_of(base.input, NULL, bos, &c->err, out);
    tvc_subject_close(&base);
    return rc;
}

static json_t *text_json(const char *file, const struct tve_ppl *r)
{
    return json_pack("{s:o, s:o, s:o, s:o, s:o}", "file", tvc_json_string(file),
                     "tokens_scored", tvc_json_u64(r->n_scored), "nll_mean",
                     tvc_json_real(r->nll_mean), "ppl", tvc_json_real(r->ppl),
                     "stderr", tvc_json_real(r->ppl_stderr));
}

static enum tv_err score(struct tvc_compare *p, struct entry *e)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    const struct compare_opts *o = p->opts;
    struct tvc_subject s = {0};
    tve_model *model = NULL;
    tve_tokenizer *tokenizer = NULL;
    struct tve_ids *ids = tv_calloc(o->n_texts, sizeof *ids);
    struct tve_ppl_options ppl = o->ppl;
    json_t *texts = json_array();
    double logs = 0;
    int32_t bos = -1;
    const double t0 = tvc_seconds();

    if (!ids || !texts) {
        rc = no_memory(c);
        goto out;
    }
    TV_TRY(
        tvc_subject_open_in(c, e->dir ? e->dir : e->ref, o->options.store, &s));
    TV_TRY(tokenizer_for(p, s.input, &bos, &tokenizer));
    if (ppl.bos == -2)
        ppl.bos = bos;
    TV_TRY(encode_all(p, tokenizer, ids));
    TV_TRY(tvc_subject_model(c, &s, &model));
    for (size_t i = 0; i < o->n_texts; i++) {
        struct tvc_progress *bar =
            tvc_progress_begin(&c->out, e->name, "tokens");
        const struct tve_progress progress = {tvc_eval_step, bar,
                                              tvc_cancel_flag()};
        struct tve_ppl r;
        rc = tve_perplexity(model, ids[i].ids, ids[i].n, &ppl, &progress, &r,
                            &c->err);
        tvc_progress_end(bar);
        if (rc != TV_OK) {
            tv_error_context(&c->err, "%s", o->texts[i]);
            goto out;
        }
        logs += r.nll_mean;
        (void)json_array_append_new(texts, text_json(o->texts[i], &r));
        put(p, e, "context", tvc_json_u64(r.context));
    }
    put(p, e, "geometric_mean", tvc_json_real(exp(logs / (double)o->n_texts)));
    put(p, e, "eval_seconds", tvc_json_real(tvc_seconds() - t0));
    put(p, e, "bos", ppl.bos < 0 ? json_null() : json_integer(ppl.bos));
    put(p, e, "texts", json_incref(texts));
    TV_TRY(record_save(p, e));
out:
    json_decref(texts);
    for (size_t i = 0; ids && i < o->n_texts; i++)
        tve_ids_free(&ids[i]);
    tv_free(ids);
    tve_model_close(model);
    tve_tokenizer_close(tokenizer);
    tvc_subject_close(&s);
    if (rc != TV_OK && rc != TV_E_INTERRUPTED)
        tv_error_context(&c->err, "%s", e->name);
    return rc;
}

/* ---- merges -------------------------------------------------------------- */

static void on_progress(void *arg, const struct tvm_progress *g)
{
    tvc_progress_set(arg, g->n_done, g->n_tensors, g->bytes_done,
                     g->bytes_total);
}

/* Sizes of the files of an entry's directory: unlike blocks, the same on every
 * file system. */
static enum tv_err size_of(struct tvc_compare *p, const struct entry *e,
                           uint64_t *bytes)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    *bytes = 0;
    TV_TRY(tv_dir_list(e->dir, &p->c->err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        struct stat st;
        char *path = tv_path_join(e->dir, names[i]);
        if (!path) {
            rc = no_memory(p->c);
            goto out;
        }
        if (tv_sys()->stat(path, &st) == 0 && S_ISREG(st.st_mode))
            *bytes += (uint64_t)st.st_size;
        tv_free(path);
    }
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* What the quota leaves for an entry's directory. */
static enum tv_err room_for(struct tvc_compare *p, const struct entry *e,
                            uint64_t *room)
{
    enum tv_err rc = TV_OK;
    const uint64_t quota = p->opts->options.quota_bytes;
    uint64_t used = 0;
    uint64_t own = 0;

    *room = 0;
    if (quota == 0)
        goto out;
    TV_TRY(tv_disk_used(p->opts->out, &used, &p->c->err));
    TV_TRY(tv_disk_used(e->dir, &own, &p->c->err));
    used -= own;
    if (used >= quota)
        rc = tv_error_set(&p->c->err, TV_E_NOSPACE,
                          "%s takes %llu bytes already, --quota allows %llu",
                          p->opts->out, (unsigned long long)used,
                          (unsigned long long)quota);
    *room = used < quota ? quota - used : 1;
out:
    return rc;
}

static enum tv_err merge(struct tvc_compare *p, struct entry *e)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    struct tvc_merge m = {0};
    struct tvm_result r = {0};
    uint64_t room = 0;
    uint64_t disk = 0;
    char hex[33];

    TV_TRY(room_for(p, e, &room));
    TV_TRY(plan_recipe(p, e, room, &m));
    if (m.problems.n_errors > 0) {
        for (size_t i = 0; i < m.problems.n; i++)
            if (m.problems.items[i].is_error) {
                rc = tv_error_set(&c->err, tvm_problems_code(&m.problems), "%s",
                                  m.problems.items[i].message);
                break;
            }
        goto out;
    }
    if (!m.plan || !tv_hash_equal(m.plan->hash, e->plan)) {
        rc = tv_error_set(&c->err, TV_E_CHANGED,
                          "the inputs change while they are compared");
        goto out;
    }
    struct tvc_progress *bar = tvc_progress_begin(&c->out, e->name, "tensors");
    const struct tvm_run_hooks hooks = {
        .progress = on_progress, .arg = bar, .cancel = tvc_cancel_flag()};
    rc = tvm_run(m.plan, &hooks, &r, &c->err);
    tvc_progress_end(bar);
    TV_TRY(rc);
    if (has(e, "digest"))
        goto out; /* made again to be kept: its figures are there */
    TV_TRY(size_of(p, e, &disk));
    put(p, e, "seconds",
        r.already_done ? json_null() : tvc_json_real(r.seconds));
    put(p, e, "peak_memory_bytes",
        r.already_done ? json_null() : tvc_json_u64(r.peak_scratch_bytes));
    put(p, e, "disk_bytes", tvc_json_u64(disk));
    put(p, e, "digest", json_string(tv_hash_hex(r.digest, hex)));
    TV_TRY(record_save(p, e));
out:
    if (rc != TV_OK && rc != TV_E_INTERRUPTED)
        tv_error_context(&c->err, "%s", e->name);
    tvc_merge_free(&m);
    return rc;
}

static double mean_of(const struct entry *e)
{
    const json_t *v = json_object_get(e->record, "geometric_mean");

    return json_is_number(v) ? json_number_value(v) : INFINITY;
}

/* The best merge so far, NULL when there is none. */
static struct entry *best_of(struct tvc_compare *p)
{
    struct entry *best = NULL;

    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        if (e->kind == ENTRY_MERGE && has(e, "texts") &&
            (!best || mean_of(e) < mean_of(best)))
            best = e;
    }
    return best;
}

/* Drops the outputs that are scored and not wanted any more. */
static enum tv_err tidy(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    const struct entry *best = best_of(p);

    if (p->opts->keep == KEEP_ALL)
        goto out;
    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        if (e->kind != ENTRY_MERGE || !has(e, "texts") ||
            (p->opts->keep == KEEP_BEST && e == best))
            continue;
        TV_TRY(tv_dir_remove(e->dir, &p->c->err));
    }
out:
    return rc;
}

static enum tv_err is_there(struct tvc_compare *p, const struct entry *e,
                            bool *there)
{
    struct tvm_status s = {0};
    const enum tv_err rc = tvm_status(e->dir, &s, &p->c->err);

    *there = rc == TV_OK && s.state == TVM_FINISHED;
    return rc;
}

static enum tv_err do_all(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    bool there = false;

    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        const bool scored = has(e, "texts");
        if (scored && (e->kind != ENTRY_MERGE || p->opts->keep != KEEP_ALL))
            continue;
        if (e->kind == ENTRY_MERGE) {
            TV_TRY(is_there(p, e, &there));
            if (!there || !has(e, "digest"))
                TV_TRY(merge(p, e));
        }
        if (!scored)
            TV_TRY(score(p, e));
        TV_TRY(tidy(p));
    }
    struct entry *best = best_of(p);
    if (p->opts->keep == KEEP_BEST && best) {
        /* It is gone when an earlier run was told to keep nothing. */
        TV_TRY(is_there(p, best, &there));
        if (!there)
            TV_TRY(merge(p, best));
    }
    TV_TRY(tidy(p));
out:
    return rc;
}

/* ---- the whole ----------------------------------------------------------- */

static enum tv_err read_texts(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    const struct compare_opts *o = p->opts;

    p->text = tv_calloc(o->n_texts, sizeof *p->text);
    p->text_bytes = tv_calloc(o->n_texts, sizeof *p->text_bytes);
    p->text_hash = tv_calloc(o->n_texts, sizeof *p->text_hash);
    if (!p->text || !p->text_bytes || !p->text_hash)
        return no_memory(p->c);
    for (size_t i = 0; i < o->n_texts; i++) {
        TV_TRY(tv_file_read(o->texts[i], UINT64_C(1) << 34, &p->c->err,
                            &p->text[i], &p->text_bytes[i]));
        p->text_hash[i] = tv_hash128(p->text[i], p->text_bytes[i]);
    }
out:
    return rc;
}

/* Can the models be scored at all? Before hours are spent on merging. */
static enum tv_err check_models(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;

    for (size_t i = 0; i < p->n_entries; i++) {
        const struct entry *e = &p->entries[i];
        struct tvc_subject s = {0};
        tve_tokenizer *tokenizer = NULL;
        tve_model *model = NULL;
        int32_t bos = -1;
        if (e->kind == ENTRY_MERGE)
            continue;
        rc = tvc_subject_open_in(c, e->ref, p->opts->options.store, &s);
        if (rc == TV_OK)
            rc = tokenizer_for(p, s.input, &bos, &tokenizer);
        if (rc == TV_OK)
            rc = tvc_subject_model(c, &s, &model);
        tve_model_close(model);
        tve_tokenizer_close(tokenizer);
        tvc_subject_close(&s);
        if (rc != TV_OK) {
            tv_error_context(&c->err, "%s", e->ref);
            goto out;
        }
    }
out:
    return rc;
}

/* An OUT that holds something else is not ours to fill. */
static enum tv_err check_place(const struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    char **names = NULL;
    size_t n = 0;

    if (!tv_path_exists(p->opts->out) || tv_path_is_dir(p->state))
        goto out;
    TV_TRY(tv_dir_list(p->opts->out, &c->err, &names, &n));
    if (n > 0)
        rc = tv_error_set(&c->err, TV_E_EXISTS,
                          "%s is not empty and no comparison", p->opts->out);
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* A store from the environment that is not there is no fault of a command line
 * that does not name it. */
static enum tv_err open_store(struct tvc_compare *p)
{
    struct tvc *c = p->c;
    struct compare_opts *o = p->opts;

    if (!o->store_path)
        return TV_OK;
    const enum tv_err rc =
        tvc_store_open(c, o->store_path, false, &c->err, &o->options.store);
    if (rc != TV_E_NOTFOUND || o->store_given)
        return rc;
    tvc_warn(&c->out, "TV_STORE: %s", c->err.msg);
    tv_error_clear(&c->err);
    return TV_OK;
}

static enum tv_err begin(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    struct compare_opts *o = p->opts;
    struct tvm_options *m = &o->options;

    p->lock = -1;
    p->state = tv_path_join(o->out, STATE_DIR);
    if (!p->state)
        return no_memory(c);
    m->memory_bytes = c->memory_bytes;
    m->threads = tvc_threads(c);
    TV_TRY(tvc_device_kernels(c, &m->kernels));
    m->texts = o->tasks;
    m->n_texts = o->n_tasks;
    TV_TRY(read_texts(p));
    TV_TRY(open_store(p));
    TV_TRY(check_place(p));
    TV_TRY(collect(p));
    if (p->problems.n_errors > 0)
        goto out;
    TV_TRY(check_models(p));
    TV_TRY(tv_dir_make(p->state, &c->err));
    TV_TRY(take_lock(p));
    for (size_t i = 0; i < p->n_entries; i++)
        TV_TRY(record_load(p, &p->entries[i]));
out:
    return rc;
}

static void finish(struct tvc_compare *p)
{
    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        tv_free(e->name);
        tv_free(e->dir);
        tv_free(e->ref);
        tv_free(e->method);
        json_decref(e->record);
    }
    tv_free(p->entries);
    for (size_t i = 0; p->text && i < p->opts->n_texts; i++)
        tv_free(p->text[i]);
    tv_free(p->text);
    tv_free(p->text_bytes);
    tv_free(p->text_hash);
    tv_free(p->base);
    tv_free(p->state);
    if (p->lock >= 0)
        (void)tv_sys()->close(p->lock);
    tvm_problems_free(&p->problems);
    tv_store_close(p->opts->options.store);
}

static int run(struct tvc *c)
{
    struct compare_opts *o = c->opt;
    struct tvc_compare p = {.c = c, .opts = o, .lock = -1};
    enum tv_err rc = TV_OK;
    int status = 0;

    tvm_problems_init(&p.problems);
    TV_TRY(tvc_compare_check(c));
    TV_TRY(begin(&p));
    tvc_problems_print(c, &p.problems, false);
    if (p.problems.n_errors > 0) {
        status = tvc_problems_fail(c, &p.problems);
        goto out;
    }
    tvc_say(&c->out, "%zu entries on %zu text%s -> %s", p.n_entries, o->n_texts,
            o->n_texts == 1 ? "" : "s", o->out);
    TV_TRY(do_all(&p));
    if (p.oom) {
        rc = no_memory(c);
        goto out;
    }
    TV_TRY(tvc_compare_report(&p, best_of(&p)));
out:
    if (rc == TV_E_INTERRUPTED)
        status = tvc_interrupted(c);
    else if (rc != TV_OK)
        status = tvc_fail(c, &c->err);
    else if (status == 0)
        status = tvc_done(c, 0);
    finish(&p);
    return status;
}

const struct tvc_command tvc_cmd_compare = {
    .name = "compare",
    .summary = "merge by several methods or recipes, and score each",
    .args_doc = "RECIPE... -o OUT --text FILE",
    .text =
        "One RECIPE is merged by every method of --methods (default: "
        "ties,dare_ties,\nsparsegpt_ties); several are merged as they are "
        "written. Each merge goes to\nOUT/<merge>_<sparsify>, and with the "
        "base, every model and plain task\narithmetic it is scored on every "
        "text. The table, in Markdown, is printed and\nkept in "
        "OUT/compare.md, as JSON in OUT/compare.json. Continues after any\n"
        "interruption when repeated; what is known is not done again.",
    .examples =
        "tvmerge compare recipe.yml -o cmp --text prose.txt --text code.txt\n"
        "tvmerge compare recipe.yml -o cmp --text a.txt --methods "
        "ties,tsv,iso_c --keep best\n"
        "tvmerge compare recipe.yml -o cmp --text a.txt --text "
        "ft-code=code.txt\n"
        "tvmerge compare one.yml two.yml -o cmp --text a.txt --json",
    .options = tvc_compare_options,
    .opt_bytes = sizeof(struct compare_opts),
    .init = tvc_compare_init,
    .option = tvc_compare_option,
    .min_pos = 1,
    .max_pos = 64,
    .cancellable = true,
    .run = run,
};
