/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_calibration.c - which text stands for which model's task.
 *
 * --text NAME=FILE wins over the model's own `calibration:` in the recipe, and
 * that over the recipe's. Texts are read whole once at planning: masks and the
 * plan depend on what they say, not on their names.
 */
#include "plan_parts.h"

#include <stdio.h>
#include <string.h>

#include "calibrated.h"
#include "tv/alloc.h"
#include "tv/cuda_math.h"
#include "tv/sys.h"
#include "tv/text.h"

#define TEXT_BYTES_MAX ((uint64_t)1 << 32)

/* Is a model meant by this name: the reference, or its last part? */
static bool names(const char *name, const char *ref)
{
    size_t end = strlen(ref);
    if (strcmp(name, ref) == 0)
        return true;
    while (end > 1 && ref[end - 1] == '/')
        end--;
    size_t from = end;
    while (from > 0 && ref[from - 1] != '/' && ref[from - 1] != ':')
        from--;
    return strlen(name) == end - from &&
           strncmp(name, ref + from, end - from) == 0;
}

static const struct tvm_calibration *of_recipe(const struct planner *pl,
                                               const char *ref)
{
    const struct tvm_recipe *const r = pl->r;
    for (size_t s = 0; s < r->n_slices; s++)
        for (size_t i = 0; i < r->slices[s].n_sources; i++) {
            const struct tvm_recipe_source *const src =
                &r->slices[s].sources[i];
            if (src->calibration != NULL && src->model.text != NULL &&
                strcmp(src->model.text, ref) == 0)
                return src->calibration;
        }
    return r->calibration;
}

static enum tv_err of_options(struct planner *pl, struct tvm_plan_input *in,
                              bool *used)
{
    const struct tvm_options *const o = &pl->plan->options;
    const struct tvm_calibration *const before = in->calibration;
    struct tvm_calibration *c = NULL;

    for (size_t i = 0; i < o->n_texts; i++) {
        if (!names(o->texts[i].name, in->ref))
            continue;
        used[i] = true;
        if (c == NULL) {
            c = tvm_arena_get(plan_arena(pl), 1, sizeof(*c));
            if (c == NULL)
                return plan_oom(pl);
            c->texts =
                tvm_arena_get(plan_arena(pl), o->n_texts, sizeof(*c->texts));
            c->places =
                tvm_arena_get(plan_arena(pl), o->n_texts, sizeof(*c->places));
            if (c->texts == NULL || c->places == NULL)
                return plan_oom(pl);
            c->samples = before != NULL ? before->samples : 0;
            c->context = before != NULL ? before->context : 0;
        }
        c->texts[c->n_texts] =
            tvm_arena_strdup(plan_arena(pl), o->texts[i].path);
        c->places[c->n_texts] = tvm_arena_fmt(
            plan_arena(pl), "--text %s=%s", o->texts[i].name, o->texts[i].path);
        if (c->texts[c->n_texts] == NULL || c->places[c->n_texts] == NULL)
            return plan_oom(pl);
        c->n_texts++;
    }
    if (c != NULL)
        in->calibration = c;
    return TV_OK;
}

enum tv_err plan_calibration_find(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    const struct tvm_options *const o = &plan->options;
    bool *used = NULL;
    enum tv_err rc = TV_OK;

    used = tv_calloc(o->n_texts + 1, sizeof(*used));
    if (used == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < plan->n_inputs; i++) {
        plan->inputs[i].calibration = of_recipe(pl, plan->inputs[i].ref);
        TV_TRY(of_options(pl, &plan->inputs[i], used));
    }
    for (size_t i = 0; i < o->n_texts; i++) {
        if (!used[i])
            plan_report(pl, "texts for nobody", 5, true, TV_E_USAGE, "",
                        "--text %s=%s: the recipe has no model '%s'",
                        o->texts[i].name, o->texts[i].path, o->texts[i].name);
    }
out:
    tv_free(used);
    return rc;
}

enum tv_err tvm_text_read(const struct tvm_calibration *cal, size_t text,
                          struct tv_error *err, char **data, size_t *n)
{
    const char *const path = cal->texts[text];
    enum tv_err rc = TV_OK;

    *data = NULL;
    rc = tv_file_read(path, TEXT_BYTES_MAX, err, data, n);
    if (rc == TV_E_IO) /* as if it were not there */
        err->code = rc = TV_E_INPUT;
    if (rc == TV_OK && *n == 0)
        rc = tv_error_set(err, TV_E_INPUT, "%s is empty", path);
    else if (rc == TV_OK && !tv_utf8_valid(*data, *n))
        rc = tv_error_set(err, TV_E_CORRUPT, "%s is not UTF-8", path);
    if (rc != TV_OK) {
        tv_free(*data);
        *data = NULL;
    }
    return rc;
}

const char *tvm_text_lacks(const struct tvm_text_extent *x, char *dst,
                           size_t cap)
{
    if (!x->fits)
        (void)snprintf(dst, cap,
                       "a 'context' of %zu tokens, but the model has %zu "
                       "positions",
                       x->window, x->positions);
    else if (!x->fills)
        (void)snprintf(dst, cap,
                       "%zu tokens do not fill a window of %zu: more text, or "
                       "a smaller 'context', is needed",
                       x->n_tokens, x->window);
    return x->fits && x->fills ? NULL : dst;
}

/* A text that is no good, as the user asked for it. */
static void report_text(struct planner *pl, const struct tvm_plan_input *in,
                        size_t text, enum tv_err code, const char *why)
{
    plan_report(pl, "calibration texts", 20, true, code,
                in->calibration->places[text], "calibration text of '%s': %s",
                in->ref, why);
}

/* One text. Its problems are reported. */
static enum tv_err hash_text(struct planner *pl,
                             const struct tvm_plan_input *in, size_t text,
                             struct tv_buf *to)
{
    struct tv_error e;
    char *data = NULL;
    size_t n = 0;

    tv_error_clear(&e);
    enum tv_err rc = tvm_text_read(in->calibration, text, &e, &data, &n);
    if (rc != TV_OK && plan_fatal(rc)) {
        *pl->err = e;
        goto out;
    }
    if (rc != TV_OK) {
        report_text(pl, in, text, rc, e.msg);
        rc = TV_OK;
        goto out;
    }
    const struct tv_hash h = tv_hash128(data, n);
    tv_buf_le64(to, h.lo);
    tv_buf_le64(to, h.hi);
out:
    tv_free(data);
    return rc;
}

/* What the text says, and how it is cut. */
static enum tv_err hash_texts(struct planner *pl, struct tvm_plan_input *in)
{
    const struct tvm_calibration *const c = in->calibration;
    struct tv_buf b;
    enum tv_err rc = TV_OK;

    tv_buf_init(&b, 1u << 20);
    tv_buf_le64(&b, c->random);
    tv_buf_le64(&b, c->samples != 0 ? c->samples : 128);
    tv_buf_le64(&b, c->context);
    if (c->random)
        tv_buf_le64(&b, pl->plan->options.seed);
    for (size_t i = 0; i < c->n_texts; i++)
        TV_TRY(hash_text(pl, in, i, &b));
    if (b.failed) {
        rc = plan_oom(pl);
        goto out;
    }
    in->calibration_hash = tv_hash128(b.data, b.n_bytes);
    in->calibrated = true;
    if (c->random)
        plan_report(pl, "random calibration", 1, false, TV_OK, "",
                    "calibration with random tokens, as asked: such statistics "
                    "describe no task");
out:
    tv_buf_free(&b);
    return rc;
}

/* A model that cannot run, or not over this text. */
static enum tv_err report_model(struct planner *pl, size_t model,
                                enum tv_err rc, const struct tv_error *e)
{
    if (plan_fatal(rc)) {
        *pl->err = *e;
        return rc;
    }
    plan_report(pl, e->msg, 1, true, rc, plan_where(pl, pl->refs[model].where),
                "%s", e->msg);
    return TV_OK;
}

static enum tv_err check_window(struct planner *pl, size_t model, size_t owner)
{
    const struct tvm_plan_input *const in = &pl->plan->inputs[owner];
    struct tvm_text_extent x;
    struct tv_error e;
    char why[160];

    tv_error_clear(&e);
    if (in->calibration->n_texts == 0 && !in->calibration->random)
        return TV_OK; /* the recipe was told so */
    const enum tv_err rc =
        tvm_calibrated_texts(pl->plan, model, in->calibration, &x, &e);
    if (rc != TV_OK)
        return report_model(pl, model, rc, &e);
    if (!tvm_text_lacks(&x, why, sizeof(why)))
        return TV_OK;
    if (in->calibration->n_texts > 0)
        report_text(pl, in, 0, TV_E_INPUT, why);
    else
        plan_report(pl, why, 1, true, TV_E_INPUT,
                    plan_where(pl, pl->refs[owner].where),
                    "calibration of '%s': %s", in->ref, why);
    return TV_OK;
}

/* Can the model run, and over the text of `owner`? */
static enum tv_err check_model(struct planner *pl, size_t model, size_t owner,
                               const struct tvm_trim_rule *rule, bool has_text)
{
    struct tv_error e;

    tv_error_clear(&e);
    const enum tv_err rc = tvm_calibrated_check(pl->plan, model, rule, &e);
    if (rc != TV_OK)
        return report_model(pl, model, rc, &e);
    return has_text ? check_window(pl, model, owner) : TV_OK;
}

/* ---- a device ------------------------------------------------------------ */

/* Is this layer worked on by the plan's device? Then its shape as y = T x. */
static bool takes_device(const struct tvm_plan *plan,
                         const struct tvm_tensor *t,
                         const struct tvm_trim_rule *r, size_t *rows,
                         size_t *cols)
{
    *rows = (size_t)t->shape[t->in_first ? 1 : 0];
    *cols = (size_t)t->shape[t->in_first ? 0 : 1];
    return plan->options.cuda && tvm_rule_needs_gram(r) && !r->gram_only;
}

uint64_t tvm_plan_device_elems(const struct tvm_plan *p)
{
    struct tvm_trim_rule r;
    uint64_t n = 0;

    for (size_t i = 0; i < p->n_tensors; i++)
        for (size_t s = 0; s < p->tensors[i].n_sources; s++)
            if (tvm_calibrated_rule(&p->tensors[i], s, &r))
                n += p->tensors[i].n_elems;
    return n;
}

size_t plan_host_factors(const struct tvm_plan *plan, size_t *n_all)
{
    size_t n = 0;

    *n_all = 0;
    for (size_t i = 0; i < plan->n_tensors; i++)
        for (size_t s = 0; s < plan->tensors[i].n_sources; s++) {
            struct tvm_trim_rule r;
            size_t rows = 0;
            size_t cols = 0;
            if (!tvm_calibrated_rule(&plan->tensors[i], s, &r) ||
                !takes_device(plan, &plan->tensors[i], &r, &rows, &cols))
                continue;
            ++*n_all;
            n += !tvk_cuda_layer_factors(plan->options.cuda, rows, cols);
        }
    return n;
}

struct beyond { /* layers that the device has no memory for */
    size_t n;
    uint64_t most; /* what the largest of them needs */
    const char *name;
    /* and those that come in parts */
    size_t n_parts;
    uint64_t most_whole;
    const char *name_whole;
};

/* What a device must have for this tensor's statistics. */
static void check_device(struct planner *pl, const struct tvm_tensor *t,
                         const struct tvm_trim_rule *r, struct beyond *b)
{
    const tvk_cuda *const cuda = pl->plan->options.cuda;
    size_t rows = 0;
    size_t cols = 0;
    struct tv_error e;

    if (!takes_device(pl->plan, t, r, &rows, &cols))
        return;
    tv_error_clear(&e);
    if (tvk_cuda_math_find(&e) != TV_OK) {
        plan_report(pl, e.msg, 1, true, e.code, "", "%s", e.msg);
        return;
    }
    const uint64_t needed = tvk_cuda_layer_least(cuda, rows, cols);
    const uint64_t whole = tvk_cuda_layer_bytes(cuda, rows, cols);
    const uint64_t there = tvk_cuda_about(cuda)->budget_bytes;
    if (whole > there && needed <= there) {
        b->n_parts++;
        b->name_whole = whole > b->most_whole ? t->name : b->name_whole;
        b->most_whole = whole > b->most_whole ? whole : b->most_whole;
    }
    if (needed <= there)
        return;
    b->n++;
    if (needed > b->most) {
        b->most = needed;
        b->name = t->name;
    }
}

static void report_beyond(struct planner *pl, const struct beyond *b)
{
    const struct tvk_cuda_info *about = NULL;

    if (b->n == 0 && b->n_parts == 0)
        return;
    about = tvk_cuda_about(pl->plan->options.cuda);
    if (b->n_parts > 0)
        plan_note(pl, "layers in parts", 1, b->name_whole,
                  "%zu layers come to the device in parts, which is slower: "
                  "the largest takes %llu bytes of device memory as a whole, "
                  "%llu are there (--device-memory)",
                  b->n_parts, (unsigned long long)b->most_whole,
                  (unsigned long long)about->budget_bytes);
    if (b->n == 0)
        return;
    plan_report(pl, "layers beyond the device", 1, true, TV_E_BUDGET, b->name,
                "the layer needs %llu bytes of device memory, %llu are there "
                "(--device-memory); %zu layers in all do not fit%s",
                (unsigned long long)b->most,
                (unsigned long long)about->budget_bytes, b->n,
                about->factor_bytes > about->budget_bytes
                    ? "; the merge began with more and goes on as it began "
                      "(--accept-numerics: with what there is)"
                    : "");
}

/* Why nothing looks at the inputs of layers. */
static void why_unused(const struct planner *pl, char *dst, size_t cap)
{
    const char *const name = pl->plan->method_name;
    const char *const chosen = tvm_plan_choice(pl->plan, "sparsify");

    bool merges = false;

    for (size_t i = 0; i < pl->plan->n_tensors; i++)
        merges = merges || pl->plan->tensors[i].action == TVM_MERGE;
    if (!merges || (chosen != NULL && (strcmp(chosen, "importance") == 0 ||
                                       strcmp(chosen, "sparsegpt") == 0)))
        (void)snprintf(dst, cap, "no density below 1, so nothing is left out");
    else if (chosen == NULL)
        (void)snprintf(dst, cap,
                       "%s looks at no inputs of layers; ties and "
                       "task_arithmetic with 'sparsify: importance' or "
                       "'sparsegpt' do, and regmean",
                       name);
    else
        (void)snprintf(dst, cap,
                       "%s keeps %s%s here; 'sparsify: importance' or "
                       "'sparsegpt' would look at the inputs of layers",
                       name, strcmp(chosen, "none") == 0 ? "" : "by ",
                       strcmp(chosen, "none") == 0 ? "everything" : chosen);
}

/* Texts that somebody has named, and no tensor of this merge asks for. */
static void warn_unused(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    const struct tvm_calibration *c = NULL;
    const struct tvm_recipe_ref *whose = NULL;
    char why[240];

    for (size_t i = 0; i < plan->n_inputs; i++) {
        if (plan->inputs[i].calibrated)
            return;
        if (c == NULL && plan->inputs[i].calibration != NULL) {
            c = plan->inputs[i].calibration;
            whose = pl->refs[i].where;
        }
    }
    if (c == NULL || plan->options.many_methods || pl->problems->n_errors > 0)
        return;
    why_unused(pl, why, sizeof(why));
    plan_report(pl, "calibration for nothing", 1, false, TV_OK,
                c->n_texts > 0 ? c->places[0] : plan_where(pl, whose),
                "the calibration text is not used: %s", why);
}

enum tv_err plan_calibration_make(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    const size_t n = plan->n_inputs;
    /* [model, owner, 2]: as it is, and behind merged blocks; then [owner]: a
     * text is no good */
    bool *seen = NULL;
    struct beyond beyond = {.n = 0};
    enum tv_err rc = TV_OK;

    seen = tv_calloc((2 * n + 1) * n + 1, sizeof(*seen));
    if (seen == NULL)
        return plan_oom(pl);
    bool *const bad = seen + 2 * n * n;
    for (size_t i = 0; i < plan->n_tensors; i++) {
        const struct tvm_tensor *const t = &plan->tensors[i];
        for (size_t s = 0; s < t->n_sources; s++) {
            struct tvm_trim_rule rule;
            size_t model = 0;
            if (!tvm_calibrated_rule(t, s, &rule))
                continue;
            check_device(pl, t, &rule, &beyond);
            const size_t owner =
                tvm_calibration_owner(plan, t, s, &rule, &model);
            const char *const ref = plan->inputs[t->sources[s].input].ref;
            if (owner >= n) {
                plan_report(pl, ref, 1, true, TV_E_USAGE,
                            plan_where(pl, pl->refs[t->sources[s].input].where),
                            "no calibration text for '%s': add 'calibration: "
                            "{text: FILE}' to the model, or --text %s=FILE",
                            ref, ref);
                continue;
            }
            if (!plan->inputs[owner].calibrated) {
                const size_t before = pl->problems->n_errors;
                TV_TRY(hash_texts(pl, &plan->inputs[owner]));
                bad[owner] = pl->problems->n_errors > before;
            }
            if (!plan->inputs[model].input) /* reported where it was opened */
                continue;
            bool *const done = &seen[2 * (model * n + owner) +
                                     (rule.inputs == TVM_INPUTS_MERGED)];
            if (!*done)
                TV_TRY(check_model(pl, model, owner, &rule, !bad[owner]));
            *done = true;
        }
    }
    report_beyond(pl, &beyond);
    warn_unused(pl);
out:
    tv_free(seen);
    return rc;
}
