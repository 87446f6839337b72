/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan.c - from a recipe to everything a run needs to know.
 *
 * Reads headers and side files only (and the bytes of the few tensors that are
 * not numbers to merge). Every step reports all its problems and the next one
 * goes on with what is usable, so that one `tvmerge plan` shows everything that
 * is wrong; only steps that would repeat the same problem are left out.
 */
#include "plan_vocab.h"

#include <stdio.h>
#include <string.h>

#include <sys/stat.h>

#include "calibrated.h"
#include "exec.h"
#include "room.h"
#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/checked.h"
#include "tv/sys.h"
#include "tv/text.h"

/* ---- options and lifetime -------------------------------------------------
 */

void tvm_options_init(struct tvm_options *o)
{
    memset(o, 0, sizeof(*o));
    o->memory_bytes = (uint64_t)512 << 20;
    o->copy_tokenizer = true;
    o->write_model_card = true;
    o->sync = true;
    o->verify_reads = true;
    o->lock_timeout_ms = 10000;
}

void tvm_plan_free(struct tvm_plan *p)
{
    if (p == NULL)
        return;
    struct plan_storage *const st = p->storage;
    tv_shards_free(p->shards);
    if (st != NULL) {
        plan_opens_close(st);
        for (size_t i = 0; i < st->n_owned; i++)
            tv_free(st->owned[i]);
        tv_free(st->owned);
        tvm_arena_free(&st->arena);
        tv_free(st);
    }
    tv_free(p->identity);
    tv_free(p);
}

/* ---- inputs and slices ----------------------------------------------------
 */

static enum tv_err add_inputs(struct planner *pl)
{
    const struct tvm_recipe *const r = pl->r;
    size_t n = 1;
    size_t index = 0;
    enum tv_err rc = TV_OK;

    for (size_t s = 0; s < r->n_slices; s++)
        n += r->slices[s].n_sources + 1;
    n += r->vocab.n_tokens + 1;
    pl->cap_refs = n;
    pl->refs = tvm_arena_get(plan_arena(pl), n, sizeof(*pl->refs));
    pl->plan->inputs =
        tvm_arena_get(plan_arena(pl), n, sizeof(*pl->plan->inputs));
    if (pl->refs == NULL || pl->plan->inputs == NULL)
        return plan_oom(pl);
    for (size_t s = 0; s < r->n_slices; s++) {
        for (size_t i = 0; i < r->slices[s].n_sources; i++) {
            if (r->slices[s].sources[i].model.text != NULL)
                TV_TRY(
                    plan_input_add(pl, &r->slices[s].sources[i].model, &index));
        }
        if (r->slices[s].base.text != NULL)
            TV_TRY(plan_input_add(pl, &r->slices[s].base, &index));
    }
    if (r->base.text != NULL)
        TV_TRY(plan_input_add(pl, &r->base, &index));
    if (r->vocab.model.text != NULL)
        TV_TRY(plan_input_add(pl, &r->vocab.model, &index));
    for (size_t i = 0; i < r->vocab.n_tokens; i++) {
        if (r->vocab.tokens[i].model.text != NULL)
            TV_TRY(plan_input_add(pl, &r->vocab.tokens[i].model, &index));
    }
out:
    return rc;
}

static size_t input_index(const struct planner *pl, const char *ref)
{
    size_t i = 0;
    while (i < pl->plan->n_inputs && strcmp(pl->plan->inputs[i].ref, ref) != 0)
        i++;
    return i;
}

/* Two spellings of one place are two models to a recipe; hardly ever meant. */
static void warn_same_place(struct planner *pl, const struct plan_slice *s,
                            const struct tvm_recipe_ref *base)
{
    const struct tvm_plan_input *const in = pl->plan->inputs;
    const size_t b = input_index(pl, base->text);
    if (!pl->refs[b].usable || in[b].n_adapters != 0)
        return;
    for (size_t i = 0; i < s->n; i++) {
        const size_t o = s->input[i];
        if (o == b || o == SIZE_MAX || !pl->refs[o].usable ||
            in[o].n_adapters != 0 || in[o].input != in[b].input)
            continue;
        plan_report(pl, base->text, 1, false, TV_OK, plan_where(pl, base),
                    "base_model '%s' and model '%s' are the same files, but "
                    "count as two models because they are written differently",
                    in[b].ref, in[o].ref);
    }
}

static enum tv_err slice_sources(struct planner *pl, struct plan_slice *s,
                                 const struct tvm_recipe_ref *base)
{
    const struct tvm_recipe_slice *const rs = s->recipe;
    const size_t cap = rs->n_sources + 1;

    s->input = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->input));
    s->from = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->from));
    s->parameters = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->parameters));
    s->usable = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->usable));
    if (s->input == NULL || s->from == NULL || s->parameters == NULL ||
        s->usable == NULL)
        return plan_oom(pl);
    s->base = -1;
    for (size_t i = 0; i < rs->n_sources; i++) {
        const char *const ref = rs->sources[i].model.text;
        s->input[i] = ref == NULL ? SIZE_MAX : input_index(pl, ref);
        s->from[i] = rs->sources[i].from;
        s->parameters[i] = rs->sources[i].parameters;
        if (base->text != NULL && ref != NULL && strcmp(ref, base->text) == 0)
            s->base = (int)i;
    }
    s->n = rs->n_sources;
    if (base->text != NULL && s->base < 0 && rs->whole) {
        s->base = (int)s->n;
        s->input[s->n++] = input_index(pl, base->text);
    }
    for (size_t i = 0; i < s->n; i++)
        s->usable[i] = s->input[i] != SIZE_MAX && pl->refs[s->input[i]].usable;
    if (base->text != NULL)
        warn_same_place(pl, s, base);
    return TV_OK;
}

/* The first module (or the one of that name) whose depth differs between two
 * models of one architecture; NULL: none. *other is b's. */
static const struct tv_arch_module *
other_depth(const struct tv_arch *a, const struct tv_arch *b,
            const char *module, const struct tv_arch_module **other)
{
    for (size_t i = 0; i < a->n_modules; i++) {
        if (module != NULL && strcmp(module, a->modules[i].name) != 0)
            continue;
        for (size_t k = 0; k < b->n_modules; k++) {
            *other = &b->modules[k];
            if (strcmp(a->modules[i].name, b->modules[k].name) == 0 &&
                a->modules[i].n_layers != b->modules[k].n_layers)
                return &a->modules[i];
        }
    }
    return NULL;
}

/* `models:`: every model is used whole, so all need the same depth. */
static void whole_layers(struct planner *pl, struct plan_slice *s)
{
    size_t first = s->n;
    for (size_t i = 0; i < s->n; i++) {
        if (!s->usable[i])
            continue;
        const struct tvm_plan_input *const in = &pl->plan->inputs[s->input[i]];
        const struct tv_arch_module *m = NULL;
        const struct tv_arch_module *o = NULL;
        if (first == s->n) {
            first = i;
            s->n_layers = plan_slice_depth(s, in->arch);
            continue;
        }
        m = other_depth(in->arch, pl->plan->inputs[s->input[first]].arch,
                        s->module, &o);
        if (m == NULL)
            continue;
        s->usable[i] = false;
        if (pl->agree)
            plan_report(pl, "layer counts", 20, true, TV_E_INPUT,
                        plan_where(pl, pl->refs[s->input[i]].where),
                        "'%s' has %lld layers%s%s, '%s' has %lld", in->ref,
                        (long long)m->n_layers,
                        m->name[0] == '\0' ? "" : " of ", m->name,
                        pl->plan->inputs[s->input[first]].ref,
                        (long long)o->n_layers);
    }
}

static void ranged_layers(struct planner *pl, struct plan_slice *s)
{
    const struct tvm_recipe_slice *const rs = s->recipe;
    for (size_t i = s->n; i-- > 0;) {
        if (rs->sources[i].has_range)
            s->n_layers = rs->sources[i].to - rs->sources[i].from;
    }
    for (size_t i = 0; i < s->n; i++) {
        const struct tvm_recipe_source *const src = &rs->sources[i];
        if (!src->has_range) /* reported with the recipe */
            s->usable[i] = false;
        if (!s->usable[i])
            continue;
        if (src->to - src->from != s->n_layers) /* reported too */
            s->usable[i] = false;
        const struct tv_arch *const a = pl->plan->inputs[s->input[i]].arch;
        if (s->module == NULL && !a->modules[0].is_main) {
            s->usable[i] = false;
            plan_report(pl, "stacks of several", 1, true, TV_E_UNSUPPORTED,
                        plan_where(pl, &pl->r->slices[0].sources[0].model),
                        "'%s' has several stacks of layers (%s, %s, ...), and "
                        "'slices:' does not say which; use 'modules:'",
                        src->model.text, a->modules[0].name,
                        a->modules[a->n_modules > 1 ? 1 : 0].name);
            continue;
        }
        const int64_t n = plan_slice_depth(s, a);
        if (src->to <= n)
            continue;
        const struct tvm_recipe_ref at = {"", src->range_line, src->range_col};
        s->usable[i] = false;
        plan_report(pl, "layer ranges", 20, true, TV_E_INPUT,
                    plan_where(pl, &at),
                    "layer_range [%lld, %lld] goes past the end of '%s', "
                    "which has %lld layers%s%s",
                    (long long)src->from, (long long)src->to, src->model.text,
                    (long long)n, s->module == NULL ? "" : " of ",
                    s->module == NULL ? "" : s->module);
    }
}

static const char *count_rule(size_t min, size_t max, char *dst, size_t cap)
{
    if (min == max)
        (void)snprintf(dst, cap, "exactly %zu model%s", min,
                       min == 1 ? "" : "s");
    else if (max >= TVK_DONORS_MAX)
        (void)snprintf(dst, cap, "at least %zu model%s", min,
                       min == 1 ? "" : "s");
    else
        (void)snprintf(dst, cap, "%zu to %zu models", min, max);
    return dst;
}

/* Base and number of models, for the whole slice. */
static void check_roles(struct planner *pl, struct plan_slice *s,
                        const struct tvm_recipe_ref *base)
{
    const struct tvm_method *const m = pl->r->method;
    const struct tvm_recipe_ref slice_at = {"", s->recipe->line,
                                            s->recipe->col};
    const struct tvm_recipe_ref method_at = {"", pl->r->method_line,
                                             pl->r->method_col};
    char rule[64];
    size_t n = s->n;

    if (m == NULL || (base->line != 0 && base->text == NULL) ||
        s->recipe->n_sources == 0 || s->recipe->n_sources > TVK_DONORS_MAX) {
        /* Reported with the recipe. */
        s->broken = true;
        return;
    }
    if (m->base == TVM_BASE_REQUIRED && base->text == NULL) {
        s->broken = true;
        plan_report(pl, "no base model", 1, true, TV_E_USAGE,
                    plan_where(pl, &method_at),
                    "%s needs base_model, the model that the others were made "
                    "from",
                    m->name);
        return;
    }
    if (base->text != NULL && s->base < 0 && !m->base_counts &&
        m->base != TVM_BASE_NONE) {
        s->broken = true;
        plan_report(pl, "slices without the base", 20, true, TV_E_USAGE,
                    plan_where(pl, &slice_at),
                    "base_model '%s' must be one of the sources of this slice",
                    base->text);
        return;
    }
    if (!m->base_counts && m->base != TVM_BASE_NONE && s->base >= 0)
        n--;
    if (n >= m->min_donors && n <= m->max_donors)
        return;
    s->broken = true;
    plan_report(pl, "numbers of models", 20, true, TV_E_USAGE,
                plan_where(pl, &slice_at), "%s takes %s%s, there %s %zu%s",
                m->name,
                count_rule(m->min_donors, m->max_donors, rule, sizeof(rule)),
                m->base == TVM_BASE_NONE         ? ""
                : m->base_counts && s->base >= 0 ? ", the base counted"
                : s->base >= 0                   ? " beside the base"
                                                 : "",
                n == 1 ? "is" : "are", n,
                s->base >= 0 && (size_t)s->base >= s->recipe->n_sources &&
                        m->base_counts
                    ? " (base_model is not in the list and counts as one more)"
                    : "");
}

/* Layers of the modules in the output; that of the main one is the model's. */
static enum tv_err count_layers(struct planner *pl)
{
    const struct tv_arch *const a =
        pl->plan->n_inputs > 0 && pl->refs[pl->st->donor].usable
            ? pl->plan->inputs[pl->st->donor].arch
            : NULL;
    int64_t n = 0;

    for (size_t i = 0; i < pl->n_slices; i++) {
        struct plan_slice *const s = &pl->slices[i];
        if (s->is_first)
            n = 0;
        s->out_from = n;
        if (n > INT64_MAX - s->n_layers)
            return tv_error_set(pl->err, TV_E_USAGE, "too many layers");
        n += s->n_layers;
        for (size_t k = i; s->is_last; k--) {
            pl->slices[k].n_out = n;
            if (pl->slices[k].is_first)
                break;
        }
        if (s->is_last && (s->module == NULL || a == NULL ||
                           strcmp(s->module, a->modules[0].name) == 0))
            pl->n_layers = n;
    }
    return TV_OK;
}

static enum tv_err make_slices(struct planner *pl)
{
    const struct tvm_recipe *const r = pl->r;
    enum tv_err rc = TV_OK;

    TV_TRY(plan_modules_make(pl));
    for (size_t i = 0; i < pl->n_slices; i++) {
        static const struct tvm_recipe_ref none = {NULL, 0, 0};
        struct plan_slice *const s = &pl->slices[i];
        const struct tvm_recipe_ref *const base = s->is_copy ? &none
                                                  : s->recipe->base.line != 0
                                                      ? &s->recipe->base
                                                      : &r->base;
        TV_TRY(slice_sources(pl, s, base));
        if (s->recipe->whole)
            whole_layers(pl, s);
        else
            ranged_layers(pl, s);
        for (size_t k = 0; k < s->n; k++)
            s->broken = s->broken || !s->usable[k];
        if (s->is_copy)
            continue;
        check_roles(pl, s, base);
        if (r->method != NULL && r->method->base == TVM_BASE_NONE)
            s->base = -1;
    }
    TV_TRY(count_layers(pl));
out:
    return rc;
}

/* Is a parameter given at some level, whatever its filters match? */
static bool is_given(const struct planner *pl, const struct plan_slice *s,
                     size_t source, const char *name)
{
    const struct tvm_recipe_slice *const rs = s->recipe;
    return (source < rs->n_sources &&
            (rs->sources[source].bad_parameters ||
             !tvm_node_is_null(tvm_node_find(s->parameters[source], name)))) ||
           rs->bad_parameters || pl->r->bad_parameters ||
           (s->of != NULL &&
            (s->of->bad_parameters ||
             !tvm_node_is_null(tvm_node_find(s->of->parameters, name)))) ||
           !tvm_node_is_null(tvm_node_find(rs->parameters, name)) ||
           !tvm_node_is_null(tvm_node_find(pl->r->parameters, name));
}

/* Required parameters of sources that no tensor can be asked about, because
 * the models do not open or do not fit together. */
static void check_required(struct planner *pl)
{
    const struct tvm_method *const m = pl->r->method;
    if (m == NULL)
        return;
    for (size_t i = 0; i < pl->n_slices; i++) {
        const struct plan_slice *const s = &pl->slices[i];
        if (s->is_copy)
            continue;
        for (size_t k = 0; k < s->recipe->n_sources; k++) {
            const struct tvm_recipe_ref *const ref =
                &s->recipe->sources[k].model;
            if (ref->text == NULL || (pl->agree && s->usable[k]))
                continue;
            for (size_t j = 0; j < m->n_params; j++) {
                const struct tvm_param *const p = &m->params[j];
                if (!p->required || p->scope == TVM_SHARED ||
                    (p->scope == TVM_NON_BASE && s->base == (int)k) ||
                    is_given(pl, s, k, p->name))
                    continue;
                plan_report(pl, "missing parameters", 20, true, TV_E_USAGE,
                            plan_where(pl, ref),
                            "missing required parameter '%s' for '%s'", p->name,
                            ref->text);
            }
        }
        bool any = false;
        for (size_t k = 0; k < s->n; k++)
            any = any || (pl->agree && s->usable[k]);
        for (size_t j = 0; j < m->n_params && !any; j++) {
            const struct tvm_param *const p = &m->params[j];
            const struct tvm_recipe_ref at = {"", pl->r->method_line,
                                              pl->r->method_col};
            char cause[128];
            if (!p->required || p->scope != TVM_SHARED ||
                is_given(pl, s, SIZE_MAX, p->name))
                continue;
            (void)snprintf(cause, sizeof(cause), "missing parameter '%s'",
                           p->name);
            plan_report(pl, cause, 1, true, TV_E_USAGE, plan_where(pl, &at),
                        "missing required parameter '%s' of %s", p->name,
                        m->name);
        }
    }
}

/* ---- layout, space, memory ------------------------------------------------
 */

static enum tv_err lay_out(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    struct tv_st_entry *entries = NULL;
    struct tv_error e;
    enum tv_err rc = TV_OK;

    if (plan->options.into != NULL)
        return TV_OK;
    tv_error_clear(&e);
    entries = tv_calloc(plan->n_tensors, sizeof(*entries));
    if (entries == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < plan->n_tensors; i++) {
        const struct tvm_tensor *const t = &plan->tensors[i];
        entries[i].name = t->name;
        entries[i].dtype = t->dtype;
        entries[i].rank = t->rank;
        entries[i].shape = t->shape;
        entries[i].bytes = t->bytes;
    }
    rc = tv_shards_plan(entries, plan->n_tensors, "model",
                        plan->options.shard_bytes, &e, &plan->shards);
    if (rc != TV_OK && !plan_fatal(rc)) {
        plan_report(pl, "shards", 1, true, rc, "", "%s", e.msg);
        rc = TV_OK;
        goto out;
    }
    if (rc != TV_OK) {
        if (pl->err != NULL)
            *pl->err = e;
        goto out;
    }
    for (size_t i = 0; i < plan->n_tensors; i++) {
        plan->tensors[i].shard = entries[i].shard;
        plan->tensors[i].offset = entries[i].offset;
    }
out:
    tv_free(entries);
    return rc;
}

static uint64_t add_capped(uint64_t a, uint64_t b)
{
    uint64_t sum = UINT64_MAX;
    (void)tv_add_u64(a, b, &sum);
    return sum;
}

static void report_space(struct planner *pl, const char *what, uint64_t need,
                         uint64_t have)
{
    char a[32];
    char b[32];
    char c[32];
    plan_report(pl, what, 1, true, TV_E_NOSPACE, "",
                "%s: the output needs %s (%llu bytes), %s are available; %s "
                "(%llu bytes) are missing",
                what, tv_format_bytes_up(need, a, sizeof(a)),
                (unsigned long long)need, tv_format_bytes(have, b, sizeof(b)),
                tv_format_bytes_up(need - have, c, sizeof(c)),
                (unsigned long long)(need - have));
}

/* What a full store could give back, for people. */
static const char *what_could_go(tv_store *store, char dst[160])
{
    tv_read *r = NULL;
    struct tv_derived_room room = {0};
    char a[32];
    dst[0] = '\0';
    if (tv_read_begin(store, NULL, &r) == TV_OK &&
        tv_derived_room(r, &room, NULL) == TV_OK && room.evictable > 0)
        (void)snprintf(dst, 160,
                       "; %s of derived data could go ('tvstore gc --derived', "
                       "then 'tvstore compact')",
                       tv_format_bytes(room.evictable, a, sizeof(a)));
    tv_read_end(r);
    return dst;
}

/* The quota of a store bounds it and the output directory together. */
static void check_shared_quota(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    struct tv_store_stat st;
    char go[160];
    char a[32];
    char b[32];
    char c[32];
    if (plan->options.store == NULL || tvm_room_is_finished(plan) ||
        tv_store_stat(plan->options.store, &st, NULL) != TV_OK ||
        st.quota_bytes == 0)
        return;
    uint64_t missing = 0;
    if (tv_store_charge_check(plan->options.store, plan->peak_disk_bytes,
                              &missing, NULL) != TV_OK ||
        missing == 0)
        return;
    plan_report(pl, "shared quota", 1, true, TV_E_NOSPACE, "",
                "quota of the store (%s): it takes %s and the output needs "
                "%llu bytes; %s are missing%s",
                tv_format_bytes(st.quota_bytes, a, sizeof(a)),
                tv_format_bytes(st.used_bytes, b, sizeof(b)),
                (unsigned long long)plan->peak_disk_bytes,
                tv_format_bytes_up(missing, c, sizeof(c)),
                what_could_go(plan->options.store, go));
}

static enum tv_err check_out_dir(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    const uint64_t need = plan->peak_disk_bytes;
    struct tv_error e;
    uint64_t used = 0;
    uint64_t disk = 0;
    char *parent = NULL;

    tv_error_clear(&e);
    if (plan->options.quota_bytes != 0 && !plan->options.of_several &&
        need > plan->options.quota_bytes)
        report_space(pl, "quota", need, plan->options.quota_bytes);
    if (plan->options.out_dir == NULL)
        return TV_OK;
    check_shared_quota(pl);
    parent = tv_path_existing(plan->options.out_dir);
    if (parent == NULL)
        return plan_oom(pl);
    if (!tvm_room_is_finished(plan) &&
        tv_dir_check_writable(parent, &e) != TV_OK)
        plan_report(pl, "OUT", 1, true, e.code, "", "OUT '%s': %s",
                    plan->options.out_dir, e.msg);
    /* What an earlier attempt has allocated there is used again. */
    else if (tv_disk_free(parent, &disk, &e) != TV_OK ||
             tv_disk_used(plan->options.out_dir, &used, &e) != TV_OK)
        plan_report(pl, "disk", 1, false, TV_OK, plan->options.out_dir,
                    "cannot tell how much room there is: %s", e.msg);
    else if (!plan->options.of_several && need > add_capped(disk, used))
        report_space(pl, "disk", need, add_capped(disk, used));
    tv_free(parent);
    return TV_OK;
}

/* ---- OUT and the inputs ---------------------------------------------------
 */

static bool same_inode(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Is `dir` the directory `place` or one above it? Links are followed. */
static enum tv_err is_above(struct planner *pl, const struct stat *dir,
                            const char *place, bool *yes)
{
    struct tv_buf path;
    struct stat here;
    struct stat before;
    enum tv_err rc = TV_OK;

    *yes = false;
    tv_buf_init(&path, 1u << 16);
    tv_buf_str(&path, place);
    for (unsigned i = 0; i < 1000 && !*yes; i++) {
        if (path.failed) {
            rc = plan_oom(pl);
            break;
        }
        if (tv_sys()->stat(path.data, &here) != 0 ||
            (i > 0 && same_inode(&here, &before)))
            break;
        *yes = same_inode(dir, &here);
        before = here;
        tv_buf_str(&path, "/..");
    }
    tv_buf_free(&path);
    return rc;
}

/* Tensors of a store may be read from files that lie in OUT, which only
 * --force replaces. */
static enum tv_err check_out_links(struct planner *pl, const char *out)
{
    struct tv_error e = {0};
    enum tv_err rc = TV_OK;

    if (!pl->plan->options.force)
        return TV_OK;
    rc = tv_out_dir_links(out, pl->plan->options.store, &e);
    if (rc != TV_E_INPUT) {
        if (rc != TV_OK && pl->err)
            *pl->err = e;
        return rc;
    }
    plan_report(pl, "OUT and the inputs", 5, true, TV_E_INPUT, "",
                "OUT '%s': %s", out, e.msg);
    return TV_OK;
}

/* Writing into an input, or replacing what holds it, would destroy it. */
static enum tv_err check_out_place(struct planner *pl)
{
    const char *const out = pl->plan->options.out_dir;
    char *parent = NULL;
    struct stat place;
    enum tv_err rc = TV_OK;

    if (out == NULL || pl->plan->options.into != NULL)
        return TV_OK;
    parent = tv_path_existing(out);
    if (parent == NULL)
        return plan_oom(pl);
    const bool exists = tv_path_exists(out);
    if (tv_sys()->stat(parent, &place) != 0)
        goto out;
    for (size_t i = 0; i < pl->st->n_opens; i++) {
        const struct plan_open *const o = &pl->st->opens[i];
        const char *const dir =
            o->input == NULL ? NULL : tv_input_dir(o->input);
        struct stat in;
        bool inside = false;
        bool around = false;
        if (dir == NULL || tv_sys()->stat(dir, &in) != 0)
            continue;
        /* A directory beside a single file is no part of that file. */
        if (tv_path_is_dir(tv_input_label(o->input)))
            TV_TRY(is_above(pl, &in, parent, &inside));
        if (exists)
            TV_TRY(is_above(pl, &place, dir, &around));
        if (!inside && !around)
            continue;
        plan_report(pl, "OUT and the inputs", 5, true, TV_E_INPUT, "",
                    "OUT '%s' %s the input '%s'", out,
                    inside && around ? "is the directory of"
                    : inside         ? "lies inside"
                                     : "holds",
                    tv_input_label(o->input));
    }
    TV_TRY(check_out_links(pl, out));
out:
    tv_free(parent);
    return rc;
}

/* user is UINT64_MAX when nobody can tell. */
static struct tv_derived_room room_in_quota(tv_store *store)
{
    tv_read *r = NULL;
    struct tv_derived_room room = {.evictable = 0};
    if (tv_read_begin(store, NULL, &r) != TV_OK ||
        tv_derived_room(r, &room, NULL) != TV_OK)
        room = (struct tv_derived_room){.user = UINT64_MAX};
    tv_read_end(r);
    return room;
}

static enum tv_err check_store(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    struct tv_store_stat st;
    struct tv_error e;
    uint64_t disk = 0;
    uint64_t need = plan->peak_disk_bytes;
    enum tv_err rc = TV_OK;

    tv_error_clear(&e);
    if (plan->options.store == NULL) {
        plan_report(pl, "store", 1, true, TV_E_USAGE, "",
                    "writing into a store needs the store");
        return TV_OK;
    }
    rc = tv_store_stat(plan->options.store, &st, &e);
    if (rc != TV_OK) {
        plan_report(pl, "store", 1, true, rc, "", "%s", e.msg);
        return TV_OK;
    }
    const uint64_t there = tvm_room_there(plan);
    need = need > there ? need - there : 0;
    if (st.quota_bytes != 0) {
        /* Derived data make room for a merge. What lies in the store must leave
         * its reserve alone; scratch files beside it need not. */
        const uint64_t inside = tvm_room_inside(plan);
        const struct tv_derived_room room = room_in_quota(plan->options.store);
        const uint64_t spare =
            add_capped(add_capped(st.free_bytes, room.trash),
                       add_capped(st.masks, st.task_vectors));
        const uint64_t live =
            add_capped(st.used_bytes > spare ? st.used_bytes - spare : 0,
                       st.charged_bytes);
        const uint64_t all = st.quota_bytes > live ? st.quota_bytes - live : 0;
        if (inside > room.user)
            report_space(pl, "quota of the store", inside, room.user);
        else if (need > all)
            report_space(pl, "quota of the store", need, all);
    }
    if (tv_disk_free(tv_store_path(plan->options.store), &disk, &e) == TV_OK &&
        need > add_capped(disk, st.free_bytes))
        report_space(pl, "disk", need, add_capped(disk, st.free_bytes));
    return TV_OK;
}

static enum tv_err check_room(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    bool fits = true;
    uint64_t needed = 0;
    uint64_t calibration = 0;
    uint64_t scratch = 0;
    uint64_t heap = 0;
    char a[32];
    char b[32];

    plan->peak_disk_bytes = tvm_room_output(plan);
    if (pl->r->method != NULL)
        plan->peak_scratch_bytes = tvm_run_scratch(plan, &fits, &needed);
    /* Tokenizers are gone before the run begins. */
    if (pl->vocab != NULL && pl->vocab->most_bytes + pl->vocab->kept_bytes >
                                 plan->peak_scratch_bytes)
        plan->peak_scratch_bytes =
            pl->vocab->most_bytes + pl->vocab->kept_bytes;
    if (pl->problems->n_errors == 0 &&
        tvm_calibrated_wanted(plan, &calibration, &scratch)) {
        uint64_t activations = 0;
        const enum tv_err rc =
            tvm_calibrated_scratch(plan, &activations, &heap, pl->err);
        if (rc != TV_OK)
            return rc;
        plan->peak_disk_bytes =
            add_capped(plan->peak_disk_bytes, add_capped(scratch, activations));
        if (calibration > needed)
            needed = calibration;
        fits = fits && calibration <= plan->options.memory_bytes;
        if (heap > plan->peak_scratch_bytes)
            plan->peak_scratch_bytes = heap;
    }
    if (!fits)
        plan_report(pl, "memory", 1, true, TV_E_BUDGET, "",
                    "this merge needs at least --memory %s (%llu bytes), it "
                    "is %s",
                    tv_format_bytes_arg(needed, a, sizeof(a)),
                    (unsigned long long)needed,
                    tv_format_bytes(plan->options.memory_bytes, b, sizeof(b)));
    return plan->options.into != NULL ? check_store(pl) : check_out_dir(pl);
}

/* ---- planning -------------------------------------------------------------
 */

static enum tv_err copy_options(struct planner *pl, const struct tvm_options *o)
{
    struct tvm_plan *const plan = pl->plan;
    plan->options = *o;
    if (o->out_dir != NULL) {
        plan->options.out_dir = tvm_arena_strdup(plan_arena(pl), o->out_dir);
        if (plan->options.out_dir == NULL)
            return plan_oom(pl);
    }
    if (o->into != NULL) {
        plan->options.into = tvm_arena_strdup(plan_arena(pl), o->into);
        if (plan->options.into == NULL)
            return plan_oom(pl);
    }
    if (plan->options.memory_bytes == 0)
        plan->options.memory_bytes = (uint64_t)512 << 20;
    return TV_OK;
}

static bool all_usable(const struct planner *pl)
{
    for (size_t i = 0; i < pl->plan->n_inputs; i++) {
        if (!pl->refs[i].usable)
            return false;
    }
    return true;
}

/* Does the output come out at the size planned here, or at more when what is
 * wrong has been repaired? */
static bool size_known(const struct planner *pl)
{
    if (pl->r->bad_dtype || pl->plan->n_tensors == 0)
        return false;
    for (size_t i = 0; i < pl->n_slices; i++) {
        const struct plan_slice *const s = &pl->slices[i];
        bool any = false;
        for (size_t k = 0; k < s->n && !any; k++)
            any = s->usable[k];
        if (!any)
            return false;
    }
    return true;
}

/* Who gives config.json: the base, else the first model. */
static void choose_donor(struct planner *pl)
{
    const struct tvm_recipe *const r = pl->r;
    const char *ref = r->base.text;

    if (ref == NULL && r->n_slices > 0 && r->slices[0].n_sources > 0)
        ref = r->slices[0].sources[0].model.text;
    if (ref != NULL)
        pl->st->donor = input_index(pl, ref);
}

static enum tv_err make(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    enum tv_err rc = TV_OK;

    TV_TRY(add_inputs(pl));
    choose_donor(pl);
    TV_TRY(plan_inputs_agree(pl));
    TV_TRY(make_slices(pl));
    TV_TRY(check_out_place(pl));
    check_required(pl);
    if (plan->n_inputs > 0 && pl->refs[pl->st->donor].usable)
        plan->architecture = plan->inputs[pl->st->donor].arch->architecture;
    if (!pl->agree)
        goto out;
    TV_TRY(plan_layout_make(pl));
    TV_TRY(plan_vocab_make(pl));
    TV_TRY(plan_calibration_find(pl));
    TV_TRY(plan_tensors_make(pl));
    plan_quantized_check(pl);
    if (pl->oom)
        goto out;
    TV_TRY(plan_calibration_make(pl));
    if (pl->problems->n_errors == 0 && plan->n_tensors == 0) {
        plan_report(pl, "output", 1, true, TV_E_INPUT, "",
                    "the output would have no tensors");
        goto out;
    }
    if (!size_known(pl))
        goto out;
    TV_TRY(lay_out(pl));
    if (all_usable(pl) && pl->r->method != NULL)
        TV_TRY(plan_files_make(pl));
    if (pl->problems->n_errors == 0 && !pl->oom)
        TV_TRY(plan_identity_make(pl));
    TV_TRY(check_room(pl));
out:
    /* Nothing can be said of how tensors are made. */
    if (pl->r->method == NULL)
        plan->n_tensors = 0;
    return rc;
}

enum tv_err tvm_plan_make(const tvm_recipe *r, const struct tvm_options *o,
                          struct tvm_problems *problems, struct tv_error *err,
                          struct tvm_plan **out)
{
    struct planner pl;
    enum tv_err rc = TV_OK;

    *out = NULL;
    memset(&pl, 0, sizeof(pl));
    pl.r = r;
    pl.problems = problems;
    pl.err = err;
    pl.plan = tv_calloc(1, sizeof(*pl.plan));
    pl.st = tv_calloc(1, sizeof(*pl.st));
    if (pl.plan == NULL || pl.st == NULL) {
        tv_free(pl.st);
        rc = plan_oom(&pl);
        goto out;
    }
    pl.plan->storage = pl.st;
    pl.plan->recipe = r;
    pl.plan->method_name = r->method == NULL ? "" : r->info.name;
    pl.plan->architecture = "";
    TV_TRY(copy_options(&pl, o));
    TV_TRY(make(&pl));
    plan_report_rest(&pl);
    if (pl.oom) {
        rc = plan_oom(&pl);
        goto out;
    }
    *out = pl.plan;
    pl.plan = NULL;
out:
    plan_vocab_free(pl.vocab);
    plan_layout_free(&pl);
    tv_free(pl.causes);
    tvm_plan_free(pl.plan);
    return rc;
}
