/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_space.c - where the output goes: shards, memory, disk and quotas, and
 * that OUT is not the place of something that is still needed.
 */
#include "plan_vocab.h"

#include <stdio.h>
#include <string.h>

#include <sys/stat.h>

#include "calibrated.h"
#include "exec.h"
#include "room.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/derived.h"
#include "tv/sys.h"
#include "tv/text.h"

enum tv_err plan_lay_out(struct planner *pl)
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

/* ---- OUT and the inputs -------------------------------------------------- */

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

enum tv_err plan_check_out_place(struct planner *pl)
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

/* ---- all of it ----------------------------------------------------------- */

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

enum tv_err plan_check_room(struct planner *pl)
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
