/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_inputs.c - model references -> opened, described, fingerprinted models.
 *
 * References compare as strings, places as what is there: `base` and
 * `base+adapter` are two inputs that share one opened model, `m` and `./m` too.
 */
#include "plan_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>
#include <sys/stat.h>

#include "tv/adapt.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

/* ---- opening --------------------------------------------------------------
 */

void plan_opens_close(struct plan_storage *st)
{
    for (size_t i = 0; i < st->n_opens; i++) {
        struct plan_open *const o = &st->opens[i];
        tv_adapter_close(o->adapter);
        tv_arch_free(o->arch);
        tv_input_close(o->input);
        tv_free(o->key);
    }
    tv_free(st->opens);
    st->opens = NULL;
    st->n_opens = 0;
}

/* The config of a model that is taken for one of another class: that class
 * decides what its tensors are, not its model_type. */
static enum tv_err as_class(const char *architecture, char **config,
                            size_t *n_config, struct tv_error *err)
{
    json_t *root = NULL;
    char *text = NULL;
    size_t n = 0;
    enum tv_err rc = TV_OK;

    TV_TRY(tv_json_parse_exact(*config, *n_config, "config.json", err, &root));
    if (json_object_set_new(root, "architectures",
                            json_pack("[s]", architecture)) != 0) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    (void)json_object_del(root, "model_type");
    TV_TRY(tv_json_write_exact(root, err, &text, &n));
    tv_free(*config);
    *config = text;
    *n_config = n;
out:
    json_decref(root);
    return rc;
}

static enum tv_err describe(struct planner *pl, struct plan_open *o,
                            const char *override, struct tv_error *err)
{
    const size_t n = tv_input_count(o->input);
    struct tv_arch_name *names = NULL;
    char *config = NULL;
    size_t n_config = 0;
    bool found = false;
    enum tv_err rc = TV_OK;

    names = tv_calloc(n == 0 ? 1 : n, sizeof(*names));
    if (names == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < n; i++) {
        const struct tv_input_tensor *const t = tv_input_tensor(o->input, i);
        names[i].name = t->name;
        names[i].rank = t->rank;
        names[i].shape = t->shape;
        names[i].dtype = t->dtype;
    }
    TV_TRY(tv_input_side_read(o->input, "config.json", &found, &config,
                              &n_config, err));
    if (found && override != NULL)
        TV_TRY(as_class(override, &config, &n_config, err));
    TV_TRY(tv_arch_describe(found ? config : NULL, found ? n_config : 0, names,
                            n, err, &o->arch));
out:
    tv_free(config);
    tv_free(names);
    return rc;
}

/* Size and time do not show every change of a file; its contents do. */
static enum tv_err add_contents(struct plan_open *o, struct tv_error *err)
{
    unsigned char bytes[32];
    struct tv_hash digest = {0, 0};
    enum tv_err rc = TV_OK;

    TV_TRY(tv_input_digest(o->input, &digest, err));
    tv_hash_put(bytes, o->fingerprint);
    tv_hash_put(bytes + 16, digest);
    o->fingerprint = tv_hash128(bytes, sizeof(bytes));
out:
    return rc;
}

static enum tv_err open_new(struct planner *pl, const struct tv_ref_part *part,
                            bool adapter, const char *override,
                            struct plan_open *o, struct tv_error *err)
{
    const char *const base = pl->r->base.text;
    enum tv_err rc = TV_OK;
    TV_TRY(tv_input_open(part, pl->plan->options.store, err, &o->input));
    if (adapter) {
        if (tv_input_kind(o->input) != TV_KIND_ADAPTER) {
            rc = tv_error_set(err, TV_E_INPUT,
                              "'%s' behind the '+' is no adapter", part->text);
            goto out;
        }
        TV_TRY(tv_adapter_open(o->input, err, &o->adapter));
        TV_TRY(tva_adapter_check(o->adapter,
                                 pl->plan->options.kernels != NULL
                                     ? pl->plan->options.kernels
                                     : tvk_table_best(),
                                 err));
    } else {
        if (tv_input_kind(o->input) == TV_KIND_ADAPTER) {
            rc = tv_error_set(err, TV_E_INPUT,
                              "'%s' is an adapter; write %s+%s%s", part->text,
                              base ? base : "BASE", part->text,
                              base ? "" : ", BASE the model it was trained on");
            goto out;
        }
        if (tv_input_count(o->input) == 0) {
            rc = tv_error_set(err, TV_E_INPUT, "'%s' holds no tensors",
                              part->text);
            goto out;
        }
        TV_TRY(describe(pl, o, override, err));
    }
    TV_TRY(tv_input_fingerprint(o->input, &o->fingerprint, err));
    if (pl->plan->options.verify_inputs)
        TV_TRY(add_contents(o, err));
out:
    return rc;
}

/* Equal for equal places, however they are spelt, taken for the same class;
 * owned. */
static char *place_key(const struct tv_ref_part *part, const char *override)
{
    const char *const as = override == NULL ? "" : override;
    struct stat st;
    if (part->object != NULL)
        return tv_asprintf("%s store:%s", as, part->object);
    if (tv_sys()->stat(part->path, &st) != 0)
        return tv_asprintf("%s %s", as, part->path);
    return tv_asprintf("%s inode:%llu:%llu", as, (unsigned long long)st.st_dev,
                       (unsigned long long)st.st_ino);
}

/* The open entry of a place, made at its first use. A failure is remembered,
 * so that it is reported once. */
static enum tv_err open_find(struct planner *pl, const struct tv_ref_part *part,
                             bool adapter, const char *override,
                             struct tv_error *err, size_t *index)
{
    struct plan_storage *const st = pl->st;
    char *key = NULL;
    enum tv_err rc = TV_OK;

    key = place_key(part, override);
    if (key == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < st->n_opens; i++) {
        if (strcmp(st->opens[i].key, key) == 0 &&
            (st->opens[i].failed ||
             (st->opens[i].adapter != NULL) == adapter)) {
            *index = i;
            goto out;
        }
    }
    if (st->n_opens == st->cap_opens) {
        const size_t cap = st->cap_opens == 0 ? 8 : 2 * st->cap_opens;
        struct plan_open *const more =
            tv_realloc(st->opens, cap * sizeof(*more));
        if (more == NULL) {
            rc = plan_oom(pl);
            goto out;
        }
        st->opens = more;
        st->cap_opens = cap;
    }
    struct plan_open *const o = &st->opens[st->n_opens];
    memset(o, 0, sizeof(*o));
    o->key = key;
    key = NULL;
    *index = st->n_opens++;
    rc = open_new(pl, part, adapter, override, o, err);
    o->failed = rc != TV_OK;
out:
    tv_free(key);
    return rc;
}

/* ---- adapters -------------------------------------------------------------
 */

static int bound_compare(const void *a, const void *b)
{
    const struct plan_bound *const x = a;
    const struct plan_bound *const y = b;
    if (x->target != y->target)
        return x->target < y->target ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* Modules of all adapters of one reference, by target tensor. */
static enum tv_err bind_adapters(struct planner *pl, struct plan_ref *ref,
                                 const struct tvm_plan_input *in,
                                 struct tv_error *err)
{
    struct plan_bound *all = NULL;
    size_t *targets = NULL;
    size_t n = 0;
    size_t at = 0;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < in->n_adapters; i++)
        n += tv_adapter_count(in->adapters[i]);
    all = tvm_arena_get(plan_arena(pl), n, sizeof(*all));
    ref->low_rank = tvm_arena_get(plan_arena(pl), n, sizeof(*ref->low_rank));
    targets = tv_calloc(n == 0 ? 1 : n, sizeof(*targets));
    if (all == NULL || ref->low_rank == NULL || targets == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    for (size_t i = 0; i < in->n_adapters; i++) {
        tv_adapter *const a = in->adapters[i];
        /* Bound also at weight 0: an adapter that does not fit is a mistake
         * whatever its factor. */
        TV_TRY(tv_adapter_bind(a, in->input, targets, err));
        for (size_t m = 0; m < tv_adapter_count(a); m++) {
            if (in->adapter_weights[i] == 0)
                continue;
            all[at].target = targets[m];
            all[at].order = at;
            all[at].low_rank.module = tv_adapter_module(a, m);
            all[at].low_rank.from = tv_adapter_input(a);
            all[at].low_rank.weight = in->adapter_weights[i];
            at++;
        }
    }
    qsort(all, at, sizeof(*all), bound_compare);
    for (size_t i = 0; i < at; i++)
        ref->low_rank[i] = all[i].low_rank;
    ref->bound = all;
    ref->n_bound = at;
out:
    tv_free(targets);
    return rc;
}

/* Of the model and, behind it, each adapter with its factor. */
static struct tv_hash join_fingerprints(const struct plan_storage *st,
                                        size_t model, const size_t *adapters,
                                        const double *weights, size_t n)
{
    struct tv_hash h = st->opens[model].fingerprint;
    for (size_t i = 0; i < n; i++) {
        unsigned char bytes[40];
        uint64_t w = 0;
        memcpy(&w, &weights[i], sizeof(w));
        tv_hash_put(bytes, h);
        tv_hash_put(bytes + 16, st->opens[adapters[i]].fingerprint);
        for (unsigned k = 0; k < 8; k++)
            bytes[32 + k] = (unsigned char)((w >> (8 * k)) & 0xff);
        h = tv_hash128(bytes, sizeof(bytes));
    }
    return h;
}

/* ---- references -----------------------------------------------------------
 */

static void report_open(struct planner *pl, const struct tvm_recipe_ref *ref,
                        const struct tv_error *e)
{
    /* NOTFOUND is for names on a command line. */
    const enum tv_err code = e->code == TV_E_NOTFOUND ? TV_E_INPUT : e->code;
    plan_report(pl, ref->text, 1, true, code, plan_where(pl, ref), "%s%s%s%s",
                e->msg, e->hint[0] == '\0' ? "" : " (", e->hint,
                e->hint[0] == '\0' ? "" : ")");
}

/* A reference to something that is not on disk under its own name and has the
 * form ORG/NAME came out of the hub cache. */
static bool is_hub_name(const struct tv_ref_part *part)
{
    const char *const s = part->text;
    const char *const slash = strchr(s, '/');
    return part->object == NULL && slash != NULL && slash != s &&
           slash[1] != '\0' && strchr(slash + 1, '/') == NULL && s[0] != '.' &&
           s[0] != '~' && !tv_path_exists(s);
}

/* A branch moves; the snapshot's folder has the commit's name. */
static void keep_commit(struct planner *pl, struct plan_ref *ref,
                        const char *path)
{
    static const char parent[] = "/snapshots/";
    const char *last = NULL;
    for (const char *s = path; s != NULL && (s = strstr(s, parent)) != NULL;)
        last = s += sizeof(parent) - 1;
    if (last == NULL)
        return;
    ref->revision = tvm_arena_strndup(plan_arena(pl), last, strcspn(last, "/"));
    pl->oom = pl->oom || ref->revision == NULL;
}

static const struct tvm_stage_ref *stage_of(const struct planner *pl,
                                            const char *ref)
{
    const struct tvm_options *const o = &pl->plan->options;
    for (size_t i = 0; i < o->n_stages; i++) {
        if (tvm_recipe_means(ref, o->stages[i].name))
            return &o->stages[i];
    }
    return NULL;
}

/* A document whose name is almost that of the model. */
static void hint_stage(const struct planner *pl, const char *ref,
                       struct tv_error *e)
{
    const struct tvm_options *const o = &pl->plan->options;
    char name[80];
    const size_t n = strcspn(ref, "+@");

    if (n >= sizeof(name))
        return;
    memcpy(name, ref, n);
    name[n] = '\0';
    for (size_t i = 0; i < o->n_stages; i++) {
        if (tv_suggest(name, &o->stages[i].name, 1) != NULL)
            tv_error_hint(e,
                          "did you mean '%s', the result of another "
                          "document?",
                          o->stages[i].name);
    }
}

/* A path as seen from the recipe, which is somewhere else. */
static void hint_beside(const struct planner *pl, const char *ref,
                        struct tv_error *e)
{
    const char *const slash = strrchr(pl->r->path, '/');
    char *path = NULL;

    if (slash == NULL || ref[0] == '/')
        return;
    path = tv_asprintf("%.*s%.*s", (int)(slash + 1 - pl->r->path), pl->r->path,
                       (int)strcspn(ref, "+@"), ref);
    if (path != NULL && tv_path_exists(path))
        tv_error_hint(e,
                      "paths are relative to the current directory, not to the "
                      "recipe: '%s' is there",
                      path);
    tv_free(path);
}

/* The reference with the place in the place of the name; a result has no
 * revisions. NULL: out of memory. */
static const char *stage_text(struct planner *pl,
                              const struct tvm_stage_ref *stage,
                              const char *ref)
{
    const char *const adapters = strchr(ref, '+');
    return tvm_arena_fmt(plan_arena(pl), "%s%s", stage->dir,
                         adapters == NULL ? "" : adapters);
}

/* Where a model of the hub cache came from, for its card and for who asks
 * again. */
static void note_hub(struct planner *pl, struct plan_ref *ref,
                     const struct tv_ref_part *model)
{
    if (is_hub_name(model)) {
        ref->hub = tvm_arena_strdup(plan_arena(pl), model->text);
        pl->oom = pl->oom || ref->hub == NULL;
    }
    if (model->revision != NULL) {
        ref->revision = tvm_arena_strdup(plan_arena(pl), model->revision);
        pl->oom = pl->oom || ref->revision == NULL;
    }
    if (ref->hub != NULL)
        keep_commit(pl, ref, model->path);
}

/* The adapters of a reference; opened[i] is the index of the i-th. *failed: one
 * could not be, which was reported when it was first met. */
static enum tv_err open_adapters(struct planner *pl,
                                 const struct tv_ref *parsed,
                                 struct tvm_plan_input *in, size_t *opened,
                                 bool *failed, struct tv_error *e)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < in->n_adapters && !*failed; i++) {
        TV_TRY(open_find(pl, &parsed->adapters[i], true, NULL, e, &opened[i]));
        *failed = pl->st->opens[opened[i]].failed;
        in->adapters[i] = pl->st->opens[opened[i]].adapter;
        in->adapter_weights[i] = parsed->adapters[i].weight;
    }
out:
    return rc;
}

/* Opens the parts of a reference; `e` says why not. */
static enum tv_err
open_parts(struct planner *pl, const struct tvm_recipe_ref *where,
           const struct tv_ref *parsed, const struct tvm_stage_ref *stage,
           struct plan_ref *ref, struct tvm_plan_input *in, struct tv_error *e)
{
    const struct tvm_recipe_override *const override =
        tvm_recipe_override_of(pl->r, where->text);
    const size_t n = parsed->n_adapters;
    size_t *adapters = NULL;
    size_t model = 0;
    bool failed = false;
    enum tv_err rc = TV_OK;

    TV_TRY(open_find(pl, &parsed->model, false,
                     override == NULL ? NULL : override->architecture, e,
                     &model));
    if (pl->st->opens[model].failed)
        goto out;
    if (stage != NULL)
        pl->st->opens[model].fingerprint = stage->plan_hash;
    in->n_adapters = n;
    in->adapters = tvm_arena_get(plan_arena(pl), n, sizeof(*in->adapters));
    in->adapter_weights =
        tvm_arena_get(plan_arena(pl), n, sizeof(*in->adapter_weights));
    adapters = tv_calloc(n + 1, sizeof(*adapters));
    if (in->adapters == NULL || in->adapter_weights == NULL ||
        adapters == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    TV_TRY(open_adapters(pl, parsed, in, adapters, &failed, e));
    if (failed)
        goto out;
    in->input = pl->st->opens[model].input;
    in->arch = pl->st->opens[model].arch;
    in->fingerprint = join_fingerprints(pl->st, model, adapters,
                                        in->adapter_weights, in->n_adapters);
    TV_TRY(bind_adapters(pl, ref, in, e));
    ref->usable = true;
out:
    tv_free(adapters);
    return rc;
}

static enum tv_err open_ref(struct planner *pl,
                            const struct tvm_recipe_ref *where,
                            struct plan_ref *ref, struct tvm_plan_input *in)
{
    const struct tvm_stage_ref *const stage = stage_of(pl, where->text);
    const char *const text =
        stage == NULL ? where->text : stage_text(pl, stage, where->text);
    struct tv_ref *parsed = NULL;
    struct tv_error e;
    enum tv_err rc = TV_OK;

    if (text == NULL)
        return plan_oom(pl);
    tv_error_clear(&e);
    rc = tv_ref_resolve(text, &e, &parsed);
    if (rc == TV_E_INPUT && stage == NULL)
        hint_stage(pl, text, &e);
    if (rc == TV_E_INPUT && stage == NULL)
        hint_beside(pl, text, &e);
    if (rc == TV_E_INPUT && where == &pl->r->vocab.model) {
        static const char *const sources[] = {"union", "base"};
        const char *const like = tv_suggest(text, sources, 2);
        if (like != NULL)
            tv_error_hint(&e, "did you mean '%s'?", like);
    }
    if (rc == TV_OK) {
        note_hub(pl, ref, &parsed->model);
        rc = open_parts(pl, where, parsed, stage, ref, in, &e);
    }
    if (rc != TV_OK && !plan_fatal(rc)) {
        report_open(pl, where, &e);
        rc = TV_OK;
    } else if (rc != TV_OK && pl->err != NULL && e.code != TV_OK) {
        /* plan_oom has said it at its own place. */
        *pl->err = e;
    }
    tv_ref_free(parsed);
    return rc;
}

enum tv_err plan_input_add(struct planner *pl, const struct tvm_recipe_ref *ref,
                           size_t *index)
{
    struct tvm_plan *const plan = pl->plan;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < plan->n_inputs; i++) {
        if (strcmp(plan->inputs[i].ref, ref->text) == 0) {
            *index = i;
            return TV_OK;
        }
    }
    if (plan->n_inputs == pl->cap_refs)
        return tv_error_set(pl->err, TV_E_INTERNAL,
                            "more model references than counted");
    struct tvm_plan_input *const in = &plan->inputs[plan->n_inputs];
    struct plan_ref *const extra = &pl->refs[plan->n_inputs];
    in->ref = tvm_arena_strdup(plan_arena(pl), ref->text);
    if (in->ref == NULL)
        return plan_oom(pl);
    extra->where = ref;
    *index = plan->n_inputs++;
    rc = open_ref(pl, ref, extra, in);
    return rc;
}

size_t plan_input_find(const struct planner *pl, const char *ref)
{
    for (size_t i = 0; i < pl->plan->n_inputs; i++) {
        if (strcmp(pl->plan->inputs[i].ref, ref) == 0)
            return i;
    }
    return SIZE_MAX;
}

/* ---- agreement ------------------------------------------------------------
 */

static const char *arch_label(const struct tv_arch *a)
{
    if (a->architecture[0] != '\0')
        return a->architecture;
    return a->family;
}

/* The name with its layer number replaced, since two models of one
 * architecture may differ in depth; experts may be stored in another way. */
static char *name_pattern(const struct tv_arch_tensor *t)
{
    const struct tv_expert e = tv_expert_of(t);
    if (e.part != TV_EXPERT_NONE)
        return tv_asprintf("%.*s*.%s", (int)t->layer_at, t->name,
                           e.part == TV_EXPERT_ROUTER ? "router" : "experts");
    if (t->layer < 0 || t->layer_len == 0)
        return tv_strdup(t->name);
    return tv_asprintf("%.*s*%s", (int)t->layer_at, t->name,
                       t->name + t->layer_at + t->layer_len);
}

static int string_compare(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

struct patterns {
    char **items;
    size_t n;
};

static void patterns_free(struct patterns *p)
{
    for (size_t i = 0; i < p->n; i++)
        tv_free(p->items[i]);
    tv_free(p->items);
    p->items = NULL;
    p->n = 0;
}

static enum tv_err patterns_make(struct planner *pl, const struct tv_arch *a,
                                 struct patterns *out)
{
    size_t kept = 0;
    out->n = 0;
    out->items = tv_calloc(a->n_tensors + 1, sizeof(*out->items));
    if (out->items == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < a->n_tensors; i++) {
        /* Biases of linear layers are optional in some families, which names
         * alone do not tell; where they are not, their absence is an error of
         * its own. */
        if (a->tensors[i].optional || a->tensors[i].role == TV_ROLE_BUFFER ||
            (a->tensors[i].is_bias && a->tensors[i].role >= TV_ROLE_ATTN_Q &&
             a->tensors[i].role <= TV_ROLE_ROUTER))
            continue;
        out->items[out->n] = name_pattern(&a->tensors[i]);
        if (out->items[out->n] == NULL)
            return plan_oom(pl);
        out->n++;
    }
    qsort(out->items, out->n, sizeof(*out->items), string_compare);
    for (size_t i = 0; i < out->n; i++) {
        if (kept > 0 && strcmp(out->items[kept - 1], out->items[i]) == 0)
            tv_free(out->items[i]);
        else
            out->items[kept++] = out->items[i];
    }
    out->n = kept;
    return TV_OK;
}

/* The first name that only one of the two has; NULL when the sets are equal. */
static const char *first_difference(const struct patterns *a,
                                    const struct patterns *b, bool *in_a)
{
    size_t i = 0;
    size_t j = 0;
    while (i < a->n || j < b->n) {
        const int c = i == a->n   ? 1
                      : j == b->n ? -1
                                  : strcmp(a->items[i], b->items[j]);
        if (c == 0) {
            i++;
            j++;
            continue;
        }
        *in_a = c < 0;
        return c < 0 ? a->items[i] : b->items[j];
    }
    return NULL;
}

static enum tv_err same_names(struct planner *pl, size_t a, size_t b)
{
    struct patterns pa = {NULL, 0};
    struct patterns pb = {NULL, 0};
    const char *name = NULL;
    bool in_a = false;
    enum tv_err rc = TV_OK;

    TV_TRY(patterns_make(pl, pl->plan->inputs[a].arch, &pa));
    TV_TRY(patterns_make(pl, pl->plan->inputs[b].arch, &pb));
    name = first_difference(&pa, &pb, &in_a);
    if (name != NULL) {
        pl->agree = false;
        plan_report(pl, "tensor names", 20, true, TV_E_INPUT,
                    plan_where(pl, pl->refs[b].where),
                    "'%s' and '%s' are not the same architecture: only '%s' "
                    "has a tensor '%s'",
                    pl->plan->inputs[a].ref, pl->plan->inputs[b].ref,
                    pl->plan->inputs[in_a ? a : b].ref, name);
    }
out:
    patterns_free(&pa);
    patterns_free(&pb);
    return rc;
}

static bool same_class(const struct tv_arch *a, const struct tv_arch *b)
{
    if (a->architecture[0] != '\0' && b->architecture[0] != '\0')
        return strcmp(a->architecture, b->architecture) == 0;
    return strcmp(a->family, b->family) == 0;
}

/* ---- quantised weights ----------------------------------------------------
 *
 * They can be copied as they are (layers stacked), and nothing else. */

static void report_quantized(struct planner *pl, size_t input)
{
    const struct tvm_plan_input *const in = &pl->plan->inputs[input];
    struct tv_error e;
    tv_error_clear(&e);
    if (tv_arch_check_plain(in->arch, in->ref, &e) != TV_OK)
        report_open(pl, pl->refs[input].where, &e);
}

static bool has_file(const char *dir, const char *name)
{
    char *const path = tv_path_join(dir, name);
    const bool yes = path != NULL && tv_path_exists(path);
    tv_free(path);
    return yes;
}

/* Two models in one directory, one of which is meant. */
static void warn_two_models(struct planner *pl)
{
    static const char whole[] = "model.safetensors";
    static const char index[] = "model.safetensors.index.json";

    for (size_t i = 0; i < pl->plan->n_inputs; i++) {
        const struct tvm_plan_input *const in = &pl->plan->inputs[i];
        const char *const dir =
            pl->refs[i].usable ? tv_input_dir(in->input) : NULL;
        if (dir != NULL && tv_path_is_dir(tv_input_label(in->input)) &&
            has_file(dir, whole) && has_file(dir, index))
            plan_report(pl, "two models in one", 5, false, TV_OK,
                        plan_where(pl, pl->refs[i].where),
                        "'%s' holds %s and %s: what the index names is read; "
                        "transformers would load the other",
                        in->ref, whole, index);
    }
}

/* True when that is an error for this recipe, reported. */
static bool refuse_quantized(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    const bool copies = pl->r->method != NULL &&
                        strcmp(pl->r->method->name, "passthrough") == 0;
    const char *first = NULL;
    bool any = false;
    bool mixed = false;

    for (size_t i = 0; i < plan->n_inputs; i++) {
        const char *how = NULL;
        if (!pl->refs[i].usable)
            continue;
        if (plan->inputs[i].arch->quantized_before)
            plan_report(pl, "quantised before", 3, false, TV_OK,
                        plan_where(pl, pl->refs[i].where),
                        "config.json of '%s' has a quantization_config, but "
                        "its weights are not quantised: they are taken as they "
                        "are, and the output has no such key",
                        plan->inputs[i].ref);
        how = plan->inputs[i].arch->quantized;
        any = any || how != NULL;
        how = how == NULL ? "" : how;
        mixed = mixed || (first != NULL && strcmp(first, how) != 0);
        first = how;
    }
    if (!any || (copies && !mixed))
        return false;
    for (size_t i = 0; i < plan->n_inputs; i++) {
        if (pl->refs[i].usable && plan->inputs[i].arch->quantized != NULL)
            report_quantized(pl, i);
    }
    return true;
}

void plan_quantized_check(struct planner *pl)
{
    for (size_t i = 0; i < pl->plan->n_tensors; i++) {
        const struct tvm_tensor *const t = &pl->plan->tensors[i];
        const struct tvm_source *const s =
            t->n_sources == 0 ? NULL : &t->sources[0];
        if (s == NULL || pl->plan->inputs[s->input].arch->quantized == NULL ||
            (t->action == TVM_COPY && t->method != NULL &&
             t->method->fold != NULL && t->method->fold(t) >= 0))
            continue;
        report_quantized(pl, s->input);
        plan_report(pl, "more than a copy", 3, true, TV_E_INPUT, t->name,
                    "quantised weights can only be copied, but this tensor "
                    "would be scaled, converted or put in another order");
    }
}

/* A language model alone, for the text module of a larger one: modules are put
 * together one by one then, and its names are those of that module. */
static bool is_text_for(const struct planner *pl, size_t input)
{
    const struct tv_arch *const a = pl->plan->inputs[input].arch;
    const struct tv_arch *d = NULL;
    if (pl->r->n_modules == 0 || input == pl->st->donor ||
        !pl->refs[pl->st->donor].usable)
        return false;
    d = pl->plan->inputs[pl->st->donor].arch;
    return d->n_modules > 1 && d->modules[0].is_main && a->n_modules == 1 &&
           !d->inferred && !a->inferred && strcmp(d->family, a->family) == 0;
}

enum tv_err plan_inputs_agree(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    struct tv_buf list;
    size_t first = plan->n_inputs;
    bool classes_differ = false;
    bool larger = false;
    bool alone = false;
    enum tv_err rc = TV_OK;

    warn_two_models(pl);
    pl->agree = !refuse_quantized(pl);
    if (!pl->agree)
        return TV_OK;
    tv_buf_init(&list, 1u << 16);
    for (size_t i = 0; i < plan->n_inputs; i++) {
        const struct tv_arch *const b = plan->inputs[i].arch;
        if (!pl->refs[i].usable || is_text_for(pl, i))
            continue;
        tv_buf_fmt(&list, "%s'%s' is %s", list.n_bytes == 0 ? "" : ", ",
                   plan->inputs[i].ref, arch_label(b));
        larger = larger || (b->n_modules > 1 && b->modules[0].is_main);
        alone = alone || b->n_modules == 1;
        if (first == plan->n_inputs) {
            first = i;
            continue;
        }
        const struct tv_arch *const a = plan->inputs[first].arch;
        if (a == b)
            continue;
        if (a->has_config && b->has_config && !a->inferred && !b->inferred) {
            classes_differ = classes_differ || !same_class(a, b);
        } else {
            TV_TRY(same_names(pl, first, i));
        }
    }
    if (classes_differ) {
        pl->agree = false;
        plan_report(pl, "architectures", 1, true, TV_E_INPUT, "",
                    "the models have different architectures: %s%s",
                    list.failed ? "(too many to list)" : list.data,
                    larger && alone
                        ? " (a language model goes into a larger one through "
                          "'modules: {text_decoder: ...}', the larger one "
                          "first or as base_model)"
                        : "");
    }
out:
    tv_buf_free(&list);
    return rc;
}
