/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_ties.c - does the output have a head of its own?
 *
 * A tied input's head is its embedding, whatever a stored copy is called. The
 * output is tied when all models that give its head are tied and are the ones
 * that give its embedding; then no head is written. Otherwise it is written,
 * tied inputs lend their embedding to it, and the config says untied. An input
 * whose config says tied but that stores a head with other values counts as
 * untied: loaders disagree about such files, and only so nothing is lost.
 */
#include "plan_parts.h"

#include <string.h>

#include "tv/alloc.h"

/* Index of the first tensor of a role that is no bias, SIZE_MAX: none. */
static size_t find_role(const struct tv_arch *a, enum tv_role role)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        if (a->tensors[i].role == role && !a->tensors[i].is_bias &&
            a->tensors[i].vocab_dim == 0)
            return i;
    }
    return SIZE_MAX;
}

/* Could a model of this class have a head? */
static bool is_generator(const char *architecture)
{
    return strstr(architecture, "CausalLM") != NULL ||
           strstr(architecture, "LMHeadModel") != NULL;
}

/* A language model whose config says untied, but that stores no head: saved
 * with a wrong flag. Loaders would begin with a random head; a class that no
 * table knows may have one by another name. */
static bool lost_head(const struct tv_arch *a, const struct plan_ref *ref)
{
    return !a->tied && a->has_config && !a->inferred &&
           ref->embed != SIZE_MAX && ref->head == SIZE_MAX &&
           is_generator(a->architecture);
}

static enum tv_err look_at(struct planner *pl, size_t input)
{
    struct plan_ref *const ref = &pl->refs[input];
    const struct tvm_plan_input *const in = &pl->plan->inputs[input];
    struct tvm_source s[2];
    struct tv_error e;
    bool equal = false;
    enum tv_err rc = TV_OK;

    ref->embed = find_role(in->arch, TV_ROLE_EMBED);
    ref->head = find_role(in->arch, TV_ROLE_LM_HEAD);
    ref->tied = in->arch->tied && ref->embed != SIZE_MAX;
    if (lost_head(in->arch, ref)) {
        plan_report(pl, "untied, but without a head", 5, false, TV_OK, in->ref,
                    "config.json of '%s' says that its head is not tied to its "
                    "embedding, but it stores none: its embedding is its head",
                    in->ref);
        ref->tied = true;
        return TV_OK;
    }
    if (!ref->tied || ref->head == SIZE_MAX)
        return TV_OK;
    memset(s, 0, sizeof(s));
    tv_error_clear(&e);
    s[0].input = s[1].input = input;
    s[0].tensor = tv_input_tensor(in->input, ref->embed);
    s[1].tensor = tv_input_tensor(in->input, ref->head);
    if (s[0].tensor->dtype == s[1].tensor->dtype)
        rc = plan_views_equal(pl, &s[0], &s[1], &e, &equal);
    if (rc != TV_OK && plan_fatal(rc)) {
        if (pl->err != NULL)
            *pl->err = e;
        return rc;
    }
    if (rc != TV_OK)
        plan_report(pl, "unreadable tensors", 20, true, rc, in->ref, "%s",
                    e.msg);
    else if (!equal)
        plan_report(pl, "tied, but not equal", 5, false, TV_OK, in->ref,
                    "config.json of '%s' says that its head is tied to its "
                    "embedding, but it stores '%s' with other values, which "
                    "are used",
                    in->ref, s[1].tensor->name);
    ref->tied = rc != TV_OK || equal;
    return TV_OK;
}

/* Do two slices have the same models in the same order? */
static bool same_inputs(const struct plan_slice *a, const struct plan_slice *b)
{
    if (a->n != b->n)
        return false;
    for (size_t i = 0; i < a->n; i++) {
        if (a->input[i] != b->input[i])
            return false;
    }
    return true;
}

/* The first or last slice of the module that has the embedding. */
static const struct plan_slice *end_slice(const struct planner *pl, bool last)
{
    for (size_t i = 0; i < pl->n_slices; i++) {
        const struct plan_slice *const s = &pl->slices[i];
        for (size_t k = 0; k < s->n && (last ? s->is_last : s->is_first); k++) {
            const size_t in = s->input[k];
            if (s->usable[k] && pl->refs[in].embed != SIZE_MAX &&
                plan_in_slice(
                    s, pl->plan->inputs[in].arch,
                    &pl->plan->inputs[in].arch->tensors[pl->refs[in].embed]))
                return s;
        }
    }
    return &pl->slices[last ? pl->n_slices - 1 : 0];
}

enum tv_err plan_ties_make(struct planner *pl)
{
    const struct plan_slice *last = NULL;
    bool all = true;
    bool any_tied = false;
    bool any_head = false;
    enum tv_err rc = TV_OK;

    for (size_t n = 0; n < pl->plan->n_inputs; n++) {
        /* The donor first: its name for the head is the output's. */
        const size_t i = n == 0               ? pl->st->donor
                         : n <= pl->st->donor ? n - 1
                                              : n;
        if (!pl->refs[i].usable)
            continue;
        TV_TRY(look_at(pl, i));
        if (pl->refs[i].head != SIZE_MAX && pl->head_name == NULL)
            pl->head_name =
                pl->plan->inputs[i].arch->tensors[pl->refs[i].head].name;
    }
    last = end_slice(pl, true);
    for (size_t i = 0; i < last->n; i++) {
        const struct plan_ref *ref = NULL;
        if (!last->usable[i])
            continue;
        ref = &pl->refs[last->input[i]];
        all = all && ref->tied;
        any_tied = any_tied || ref->tied;
        any_head =
            any_head || (!ref->tied && ref->head != SIZE_MAX) ||
            is_generator(pl->plan->inputs[last->input[i]].arch->architecture);
    }
    pl->tied = any_tied && all && same_inputs(end_slice(pl, false), last);
    /* A donor that did not open is an error already, and has no names. */
    pl->lend_head =
        any_tied && !pl->tied && any_head && pl->refs[pl->st->donor].usable;
    if (pl->lend_head && pl->head_name == NULL)
        pl->head_name = pl->plan->inputs[pl->st->donor].arch->head_name;
    if (pl->lend_head && all)
        plan_note(pl, "head of a stack", 1, "",
                  "the models are tied, but the last slice is of others than "
                  "the first: its embedding becomes a head of its own");
out:
    return rc;
}
