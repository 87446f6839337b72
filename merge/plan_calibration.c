/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_calibration.c - which text stands for which model's task.
 *
 * --text NAME=FILE wins over the model's own `calibration:` in the recipe, and
 * that over the recipe's. Texts are read whole once at planning: masks and the
 * plan depend on what they say, not on their names.
 */
#include "plan_parts.h"

#include <string.h>

#include "calibrated.h"
#include "tv/alloc.h"
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
            if (c->texts == NULL)
                return plan_oom(pl);
            c->samples = before != NULL ? before->samples : 0;
            c->context = before != NULL ? before->context : 0;
        }
        c->texts[c->n_texts] =
            tvm_arena_strdup(plan_arena(pl), o->texts[i].path);
        if (c->texts[c->n_texts++] == NULL)
            return plan_oom(pl);
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

/* What the text says, and how it is cut. */
static enum tv_err hash_texts(struct planner *pl, struct tvm_plan_input *in)
{
    const struct tvm_calibration *const c = in->calibration;
    struct tv_buf b;
    char *text = NULL;
    size_t n = 0;
    struct tv_error e;
    enum tv_err rc = TV_OK;

    tv_error_clear(&e);
    tv_buf_init(&b, 1u << 20);
    tv_buf_le64(&b, c->random);
    tv_buf_le64(&b, c->samples != 0 ? c->samples : 128);
    tv_buf_le64(&b, c->context);
    if (c->random)
        tv_buf_le64(&b, pl->plan->options.seed);
    for (size_t i = 0; i < c->n_texts; i++) {
        rc = tv_file_read(c->texts[i], TEXT_BYTES_MAX, &e, &text, &n);
        if (rc != TV_OK && plan_fatal(rc)) {
            *pl->err = e;
            goto out;
        }
        if (rc != TV_OK) {
            rc = TV_OK;
            plan_report(pl, "calibration texts", 20, true, TV_E_INPUT, "",
                        "calibration text of '%s': %s", in->ref, e.msg);
            continue;
        }
        const struct tv_hash h = tv_hash128(text, n);
        tv_buf_le64(&b, h.lo);
        tv_buf_le64(&b, h.hi);
        tv_free(text);
        text = NULL;
    }
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
    tv_free(text);
    tv_buf_free(&b);
    return rc;
}

static enum tv_err check_model(struct planner *pl, size_t model)
{
    struct tv_error e;
    tv_error_clear(&e);
    const enum tv_err rc = tvm_calibrated_check(pl->plan, model, &e);
    if (rc == TV_OK)
        return TV_OK;
    if (plan_fatal(rc)) {
        *pl->err = e;
        return rc;
    }
    plan_report(pl, e.msg, 1, true, rc, "", "%s", e.msg);
    return TV_OK;
}

enum tv_err plan_calibration_make(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    bool *seen = NULL;
    enum tv_err rc = TV_OK;

    seen = tv_calloc(plan->n_inputs + 1, sizeof(*seen));
    if (seen == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < plan->n_tensors; i++) {
        const struct tvm_tensor *const t = &plan->tensors[i];
        for (size_t s = 0; s < t->n_sources; s++) {
            struct tvm_trim_rule rule;
            size_t model = 0;
            if (!tvm_calibrated_rule(t, s, &rule))
                continue;
            const size_t owner =
                tvm_calibration_owner(plan, t, s, &rule, &model);
            const char *const ref = plan->inputs[t->sources[s].input].ref;
            if (owner >= plan->n_inputs) {
                plan_report(pl, ref, 1, true, TV_E_USAGE,
                            plan_where(pl, pl->refs[t->sources[s].input].where),
                            "no calibration text for '%s': add 'calibration: "
                            "{text: FILE}' to the model, or --text %s=FILE",
                            ref, ref);
                continue;
            }
            if (!plan->inputs[owner].calibrated)
                TV_TRY(hash_texts(pl, &plan->inputs[owner]));
            if (!seen[model])
                TV_TRY(check_model(pl, model));
            seen[model] = true;
        }
    }
out:
    tv_free(seen);
    return rc;
}
