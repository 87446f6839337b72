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

#include <string.h>

#include "tv/alloc.h"
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
        pl->st->donor = plan_input_index(pl, ref);
}

static enum tv_err make(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    enum tv_err rc = TV_OK;

    TV_TRY(plan_add_inputs(pl));
    choose_donor(pl);
    TV_TRY(plan_inputs_agree(pl));
    TV_TRY(plan_make_slices(pl));
    TV_TRY(plan_check_out_place(pl));
    plan_check_required(pl);
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
    TV_TRY(plan_lay_out(pl));
    if (all_usable(pl) && pl->r->method != NULL)
        TV_TRY(plan_files_make(pl));
    if (pl->problems->n_errors == 0 && !pl->oom)
        TV_TRY(plan_identity_make(pl));
    TV_TRY(plan_check_room(pl));
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
