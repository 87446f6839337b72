/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stages.c - several recipes in one file: order, stand-ins, work, removal.
 */
#include "tv/stages.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "recipe.h"
#include "state.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/sys.h"
#include "tv/text.h"

struct storage {
    struct tvm_options options;
    struct tvm_recipe **recipes; /* [n] of the stages */
    struct tvm_stage_ref *refs;  /* [n] of the stages planned so far */
    size_t n_refs;
    struct tvm_plan **replaced; /* [n] plans with stand-ins */
    char *dir;                  /* of the stages; NULL: only planning */
    bool keep;                  /* they stay */
    char *temp;                 /* of the stand-ins, NULL: none yet */
};

static struct storage *storage_of(const struct tvm_stages *s)
{
    return s->storage;
}

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

/* ---- order ----------------------------------------------------------------
 */

static struct tvm_recipe *output_of(struct tvm_recipe *first)
{
    struct tvm_recipe *last = first;
    for (struct tvm_recipe *r = first; r != NULL; r = r->next) {
        if (r->name.text == NULL)
            return r;
        last = r;
    }
    return last;
}

static size_t place_of(const struct tvm_stages *s, const struct tvm_recipe *r)
{
    size_t i = 0;
    while (i < s->n && storage_of(s)->recipes[i] != r)
        i++;
    return i;
}

/* Is all that r needs among the stages? */
static bool is_ready(const struct tvm_stages *s, const struct tvm_recipe *r)
{
    for (size_t i = 0; i < r->n_needs; i++) {
        if (place_of(s, r->needs[i]) == s->n)
            return false;
    }
    return true;
}

/* Documents in the order of the file, each behind those it needs. False: some
 * need each other, which was reported. */
static bool put_in_order(struct tvm_stages *s, struct tvm_recipe *first,
                         const struct tvm_recipe *output)
{
    struct storage *const st = storage_of(s);
    bool more = true;
    while (more) {
        more = false;
        for (struct tvm_recipe *r = first; r != NULL; r = r->next) {
            if (r == output || place_of(s, r) < s->n || !is_ready(s, r))
                continue;
            st->recipes[s->n] = r;
            s->items[s->n++].name = r->name.text;
            more = true;
        }
    }
    for (struct tvm_recipe *r = first; r != NULL; r = r->next) {
        if (r != output && place_of(s, r) == s->n)
            return false;
    }
    return true;
}

/* ---- stand-ins ------------------------------------------------------------
 */

static enum tv_err write_file(const char *dir, const char *name,
                              const void *data, size_t n, uint64_t bytes,
                              struct tv_error *err)
{
    char *const path = tv_path_join(dir, name);
    int fd = -1;
    enum tv_err rc = TV_OK;

    if (path == NULL)
        return no_memory(err);
    fd = tv_sys()->open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot create %s", path);
        goto out;
    }
    TV_TRY(tv_pwrite_all(fd, data, n, 0, path, err));
    if (bytes > n && tv_sys()->ftruncate(fd, (off_t)bytes) != 0)
        rc = tv_error_sys(err, errno, "cannot extend %s", path);
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

/* The result of a plan with holes for its weights. */
static enum tv_err stand_in(struct tvm_stages *s, const struct tvm_plan *p,
                            const char *name, struct tv_error *err,
                            const char **out)
{
    struct storage *const st = storage_of(s);
    char *dir = NULL;
    enum tv_err rc = TV_OK;

    if (st->temp == NULL) {
        char *const temp = tv_asprintf("%s/tvmerge-XXXXXX", P_tmpdir);
        if (temp == NULL)
            return no_memory(err);
        if (mkdtemp(temp) == NULL) {
            rc = tv_error_sys(err, errno, "cannot make a directory %s", temp);
            tv_free(temp);
            return rc;
        }
        st->temp = temp;
    }
    dir = tv_path_join(st->temp, name);
    if (dir == NULL)
        return no_memory(err);
    TV_TRY(tv_dir_make(dir, err));
    for (size_t i = 0; i < p->shards->n; i++)
        TV_TRY(write_file(dir, p->shards->file_names[i], p->shards->headers[i],
                          p->shards->header_bytes[i], p->shards->file_bytes[i],
                          err));
    if (p->shards->index_json != NULL)
        TV_TRY(write_file(dir, "model.safetensors.index.json",
                          p->shards->index_json, p->shards->index_bytes, 0,
                          err));
    for (size_t i = 0; i < p->n_files; i++)
        TV_TRY(write_file(dir, p->files[i].name, p->files[i].data,
                          p->files[i].n, 0, err));
    *out = dir;
    dir = NULL;
out:
    tv_free(dir);
    return rc;
}

/* ---- planning -------------------------------------------------------------
 */

static bool is_output(const struct tvm_stages *s, size_t i)
{
    return i + 1 == s->n;
}

static void stage_options(const struct tvm_stages *s, size_t i,
                          struct tvm_options *o)
{
    const struct storage *const st = storage_of(s);
    *o = st->options;
    o->stages = st->refs;
    o->n_stages = st->n_refs;
    o->of_several = true;
    if (is_output(s, i))
        return;
    o->out_dir = s->items[i].dir;
    o->into = NULL;
    o->copy_tokenizer = true;
}

static bool is_finished(const char *dir, const struct tvm_plan *p)
{
    struct tvm_status status;
    return dir != NULL && tvm_status(dir, &status, NULL) == TV_OK &&
           status.state == TVM_FINISHED && status.plan_hash.lo == p->hash.lo &&
           status.plan_hash.hi == p->hash.hi;
}

/* Can the results that a stage needs be named? */
static bool inputs_planned(const struct tvm_stages *s, size_t i)
{
    const struct tvm_recipe *const r = storage_of(s)->recipes[i];
    for (size_t k = 0; k < r->n_needs; k++) {
        const size_t at = place_of(s, r->needs[k]);
        if (at >= i || s->items[at].plan == NULL)
            return false;
    }
    return true;
}

static enum tv_err plan_one(struct tvm_stages *s, size_t i,
                            struct tvm_problems *problems, struct tv_error *err)
{
    struct storage *const st = storage_of(s);
    struct tvm_stage *const one = &s->items[i];
    const size_t errors = problems->n_errors;
    struct tvm_plan *plan = NULL;
    struct tvm_options o;
    const char *place = one->dir;
    enum tv_err rc = TV_OK;

    if (!inputs_planned(s, i))
        return TV_OK;
    stage_options(s, i, &o);
    TV_TRY(tvm_plan_make(st->recipes[i], &o, problems, err, &plan));
    /* The output is shown whatever is wrong with it; what others are planned
     * with must be right. */
    if (!is_output(s, i) &&
        (problems->n_errors > errors || st->recipes[i]->has_errors ||
         plan->shards == NULL)) {
        tvm_plan_free(plan);
        goto out;
    }
    one->plan = plan;
    one->needed = true;
    if (is_output(s, i))
        goto out;
    if (st->options.force || !is_finished(one->dir, plan))
        TV_TRY(stand_in(s, plan, one->name, err, &place));
    else
        one->needed = false;
    st->refs[st->n_refs].name = one->name;
    st->refs[st->n_refs].plan_hash = plan->hash;
    st->refs[st->n_refs++].dir = place;
out:
    return rc;
}

/* What is there already, and what only that needs, is not made. */
static void find_needed(struct tvm_stages *s)
{
    const struct storage *const st = storage_of(s);
    struct tvm_stage *const last = &s->items[s->n - 1];

    if (last->plan != NULL && !st->options.force && !st->options.into &&
        is_finished(st->options.out_dir, last->plan))
        last->needed = false;
    for (size_t i = s->n - 1; i-- > 0;) {
        bool wanted = st->keep;
        for (size_t k = i + 1; k < s->n; k++) {
            const struct tvm_recipe *const r = st->recipes[k];
            for (size_t j = 0; j < r->n_needs && s->items[k].needed; j++)
                wanted = wanted || r->needs[j] == st->recipes[i];
        }
        s->items[i].needed = s->items[i].needed && wanted;
    }
}

/* The last stage that needs stage i, i itself when none does. */
static size_t last_user(const struct tvm_stages *s, size_t i)
{
    const struct storage *const st = storage_of(s);
    size_t last = i;
    for (size_t k = i + 1; k < s->n; k++) {
        const struct tvm_recipe *const r = st->recipes[k];
        for (size_t j = 0; j < r->n_needs && s->items[k].needed; j++) {
            if (r->needs[j] == st->recipes[i])
                last = k;
        }
    }
    return last;
}

static void add_up(struct tvm_stages *s)
{
    const bool keep = storage_of(s)->keep;
    for (size_t i = 0; i < s->n; i++) {
        const struct tvm_stage *const one = &s->items[i];
        uint64_t disk = 0;
        if (one->plan == NULL || !one->needed)
            continue;
        s->bytes_read += one->plan->bytes_read;
        s->bytes_written += one->plan->bytes_written;
        if (one->plan->peak_scratch_bytes > s->peak_scratch_bytes)
            s->peak_scratch_bytes = one->plan->peak_scratch_bytes;
        disk = one->plan->peak_disk_bytes;
        for (size_t k = 0; k < i; k++) {
            if (s->items[k].plan != NULL &&
                (s->items[k].needed || keep || last_user(s, k) > k) &&
                (keep || last_user(s, k) >= i) &&
                !tv_add_u64(disk, s->items[k].plan->peak_disk_bytes, &disk))
                disk = UINT64_MAX;
        }
        if (disk > s->peak_disk_bytes)
            s->peak_disk_bytes = disk;
    }
}

static bool all_planned(const struct tvm_stages *s)
{
    size_t i = 0;
    while (i < s->n && s->items[i].plan != NULL)
        i++;
    return i == s->n;
}

/* Of all of them, with the number that is enough, whatever else is wrong. */
static void check_room(struct tvm_stages *s, struct tvm_problems *problems)
{
    const struct storage *const st = storage_of(s);
    const uint64_t quota = st->options.quota_bytes;
    uint64_t disk = 0;
    uint64_t used = 0;
    char *parent = NULL;
    char a[32];
    char b[32];

    if (quota != 0 && s->peak_disk_bytes > quota)
        tvm_problem_add(problems, true, TV_E_NOSPACE, "",
                        "quota: stages and output together need %s (%llu "
                        "bytes), %s are allowed",
                        tv_format_bytes_up(s->peak_disk_bytes, a, sizeof(a)),
                        (unsigned long long)s->peak_disk_bytes,
                        tv_format_bytes(quota, b, sizeof(b)));
    if (st->dir == NULL)
        return;
    parent = tv_strdup(st->dir);
    while (parent != NULL && !tv_path_exists(parent)) {
        char *const slash = strrchr(parent, '/');
        if (slash == NULL || slash == parent)
            (void)snprintf(parent, 2, "%s", slash == NULL ? "." : "/");
        else
            *slash = '\0';
    }
    /* What stages and output have allocated is used again. */
    if (parent != NULL && tv_disk_free(parent, &disk, NULL) == TV_OK &&
        tv_disk_used(st->dir, &used, NULL) == TV_OK &&
        tv_add_u64(disk, used, &disk) &&
        (st->options.out_dir == NULL ||
         (tv_disk_used(st->options.out_dir, &used, NULL) == TV_OK &&
          tv_add_u64(disk, used, &disk))) &&
        s->peak_disk_bytes > disk)
        tvm_problem_add(problems, true, TV_E_NOSPACE, "",
                        "disk: stages and output together need %s (%llu "
                        "bytes), %s are available",
                        tv_format_bytes(s->peak_disk_bytes, a, sizeof(a)),
                        (unsigned long long)s->peak_disk_bytes,
                        tv_format_bytes(disk, b, sizeof(b)));
    tv_free(parent);
}

/* OUT by a name that something can be put behind; owned. */
static char *name_of_out(const char *out)
{
    char real[PATH_MAX];
    size_t n = strlen(out);

    while (n > 1 && out[n - 1] == '/')
        n--;
    const bool dots = (n >= 1 && out[n - 1] == '.') &&
                      (n == 1 || out[n - 2] == '/' ||
                       (out[n - 2] == '.' && (n == 2 || out[n - 3] == '/')));
    /* A place that is not there is found out about later. */
    if (dots && realpath(out, real) != NULL)
        return tv_strdup(real);
    return tv_asprintf("%.*s", (int)n, out);
}

char *tvm_stages_dir(const char *out)
{
    char *const name = name_of_out(out);
    char *const dir = name == NULL ? NULL : tv_asprintf("%s.stages", name);
    tv_free(name);
    return dir;
}

/* Without a directory for them, stages stand beside the output. */
static enum tv_err choose_dir(struct tvm_stages *s, const char *dir,
                              struct tvm_problems *problems,
                              struct tv_error *err)
{
    struct storage *const st = storage_of(s);
    const char *const out = st->options.out_dir;

    st->keep = dir != NULL;
    if (dir != NULL) {
        st->dir = tv_strdup(dir);
    } else if (out != NULL) {
        st->dir = tvm_stages_dir(out);
    } else {
        if (st->options.into != NULL)
            tvm_problem_add(problems, true, TV_E_USAGE, "",
                            "several documents merged --into a store need "
                            "--intermediate-dir DIR for the stages");
        return TV_OK;
    }
    if (st->dir == NULL)
        return no_memory(err);
    for (size_t i = 0; i + 1 < s->n; i++) {
        s->items[i].dir = tv_path_join(st->dir, s->items[i].name);
        if (s->items[i].dir == NULL)
            return no_memory(err);
    }
    return TV_OK;
}

static void warn_unused(struct tvm_stages *s, struct tvm_problems *problems)
{
    const struct storage *const st = storage_of(s);
    for (size_t i = 0; i + 1 < s->n && !st->keep; i++) {
        const struct tvm_recipe_ref *const name = &st->recipes[i]->name;
        char where[TVM_WHERE_MAX];
        bool used = false;
        for (size_t k = i + 1; k < s->n; k++) {
            for (size_t j = 0; j < st->recipes[k]->n_needs; j++)
                used = used || st->recipes[k]->needs[j] == st->recipes[i];
        }
        /* One without a name was reported. */
        if (!used && name->text != NULL)
            tvm_problem_add(problems, false, TV_OK,
                            tvm_where(where, sizeof(where),
                                      st->recipes[i]->path, name->line,
                                      name->col),
                            "no other document uses '%s': it is not made "
                            "(--intermediate-dir DIR makes and keeps it)",
                            name->text);
    }
}

enum tv_err tvm_stages_make(tvm_recipe *first, const struct tvm_options *o,
                            const char *dir, struct tvm_problems *problems,
                            struct tv_error *err, struct tvm_stages **out)
{
    struct tvm_recipe *const output = output_of(first);
    struct tvm_stages *s = NULL;
    struct storage *st = NULL;
    size_t n = 0;
    bool ordered = false;
    enum tv_err rc = TV_OK;

    *out = NULL;
    for (const struct tvm_recipe *r = first; r != NULL; r = r->next)
        n++;
    s = tv_calloc(1, sizeof(*s));
    st = tv_calloc(1, sizeof(*st));
    if (s == NULL || st == NULL) {
        tv_free(st);
        rc = no_memory(err);
        goto out;
    }
    s->storage = st;
    st->options = *o;
    s->items = tv_calloc(n, sizeof(*s->items));
    st->recipes = tv_calloc(n, sizeof(*st->recipes));
    st->refs = tv_calloc(n, sizeof(*st->refs));
    st->replaced = tv_calloc(n, sizeof(struct tvm_plan *));
    if (s->items == NULL || st->replaced == NULL || st->recipes == NULL ||
        st->refs == NULL) {
        rc = no_memory(err);
        goto out;
    }
    ordered = put_in_order(s, first, output);
    st->recipes[s->n++] = output;
    TV_TRY(choose_dir(s, dir, problems, err));
    if (ordered)
        warn_unused(s, problems);
    for (size_t i = 0; i < s->n; i++)
        TV_TRY(plan_one(s, i, problems, err));
    find_needed(s);
    add_up(s);
    if (all_planned(s))
        check_room(s, problems);
    *out = s;
    s = NULL;
out:
    tvm_stages_free(s);
    return rc;
}

/* ---- work -----------------------------------------------------------------
 */

/* The real place of a stage that stood somewhere else for planning. */
static void use_real(struct tvm_stages *s, size_t i)
{
    struct storage *const st = storage_of(s);
    for (size_t k = 0; k < st->n_refs; k++) {
        if (strcmp(st->refs[k].name, s->items[i].name) != 0 ||
            st->refs[k].dir == s->items[i].dir)
            continue;
        tv_free((void *)(uintptr_t)st->refs[k].dir);
        st->refs[k].dir = s->items[i].dir;
    }
}

/* A plan with the inputs as they are now, the same but for what stand-ins
 * cannot tell. */
static enum tv_err plan_again(struct tvm_stages *s, size_t i,
                              struct tv_error *err)
{
    struct tvm_stage *const one = &s->items[i];
    struct tvm_problems found;
    struct tvm_plan *plan = NULL;
    struct tvm_options o;
    enum tv_err rc = TV_OK;

    if (storage_of(s)->recipes[i]->n_needs == 0)
        return TV_OK;
    tvm_problems_init(&found);
    stage_options(s, i, &o);
    TV_TRY(tvm_plan_make(storage_of(s)->recipes[i], &o, &found, err, &plan));
    for (size_t k = 0; k < found.n && found.n_errors > 0; k++) {
        if (!found.items[k].is_error ||
            found.items[k].code != tvm_problems_code(&found))
            continue;
        rc = tv_error_set(err, found.items[k].code, "%s%s%s",
                          found.items[k].where,
                          found.items[k].where[0] == '\0' ? "" : ": ",
                          found.items[k].message);
        goto out;
    }
    /* Whoever shows progress may still look at it. */
    tvm_plan_free(storage_of(s)->replaced[i]);
    storage_of(s)->replaced[i] = one->plan;
    one->plan = plan;
    plan = NULL;
out:
    tvm_plan_free(plan);
    tvm_problems_free(&found);
    return rc;
}

/* Does a directory hold a merge, finished or not? */
static bool is_ours(const char *dir)
{
    struct tvm_status status;
    return tvm_status(dir, &status, NULL) == TV_OK &&
           status.state != TVM_ABSENT;
}

/* Removes a stage at once: under its name there is all of it or nothing, or
 * whoever comes after a kill would plan with half of it. A name with a dot in
 * front is no stage's. */
static enum tv_err remove_stage(const struct tvm_stages *s, size_t i,
                                struct tv_error *err)
{
    const char *const dir = s->items[i].dir;
    char *const gone =
        tv_asprintf("%s/.%s.gone", storage_of(s)->dir, s->items[i].name);
    enum tv_err rc = TV_OK;

    if (gone == NULL)
        return no_memory(err);
    if (tv_path_exists(gone)) /* left by a kill */
        TV_TRY(tv_dir_remove(gone, err));
    if (!is_ours(dir))
        goto out;
    if (tv_sys()->rename(dir, gone) != 0) {
        rc = tv_error_sys(err, errno, "cannot remove %s", dir);
        goto out;
    }
    TV_TRY(tv_dir_remove(gone, err));
out:
    tv_free(gone);
    return rc;
}

/* Stages that nobody needs from here on go. */
static enum tv_err remove_used(struct tvm_stages *s, size_t done,
                               struct tv_error *err)
{
    const struct storage *const st = storage_of(s);
    enum tv_err rc = TV_OK;

    if (st->keep || st->dir == NULL)
        return TV_OK;
    for (size_t i = 0; i < done; i++) {
        if (last_user(s, i) <= done)
            TV_TRY(remove_stage(s, i, err));
    }
    /* Empty after the last one; what is not ours in it stays. */
    if (is_output(s, done))
        (void)tv_sys()->rmdir(st->dir);
out:
    return rc;
}

enum tv_err tvm_stages_check(const struct tvm_stages *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t i = s->n; i-- > 0;) {
        const struct tvm_stage *const one = &s->items[i];
        if (one->plan == NULL || (!one->needed && !is_output(s, i)))
            continue;
        rc = tvm_run_check(one->plan, err);
        if (rc != TV_OK) {
            if (one->name != NULL)
                tv_error_context(err, "stage '%s'", one->name);
            break;
        }
    }
    return rc;
}

/* An output that would be refused is refused before the stages are made, not
 * behind them. Who is at work there may have ended by then. */
static enum tv_err check_output(const struct tvm_stages *s,
                                struct tv_error *err)
{
    enum tv_err rc = tvm_run_check(s->items[s->n - 1].plan, err);

    if (rc == TV_E_LOCKED) {
        tv_error_clear(err);
        rc = TV_OK;
    }
    return rc;
}

enum tv_err tvm_stages_run(struct tvm_stages *s, size_t i,
                           const struct tvm_run_hooks *hooks,
                           struct tv_error *err)
{
    struct tvm_stage *const one = &s->items[i];
    enum tv_err rc = i == 0 ? check_output(s, err) : TV_OK;

    if (rc != TV_OK)
        return rc;
    /* The output is asked even when it is there: it says so. */
    if (one->needed && !is_output(s, i))
        TV_TRY(tv_dir_make(storage_of(s)->dir, err));
    if (one->needed)
        TV_TRY(plan_again(s, i, err));
    if (one->needed || is_output(s, i))
        rc = tvm_run(one->plan, hooks, &one->result, err);
    /* The output will have met them too. */
    if (rc == TV_E_NONFINITE && !is_output(s, i))
        rc = TV_OK;
    if (rc != TV_OK && rc != TV_E_NONFINITE)
        goto out;
    if (!is_output(s, i))
        use_real(s, i);
    const enum tv_err rm = remove_used(s, i, rc == TV_OK ? err : NULL);
    if (rc == TV_OK)
        rc = rm;
out:
    if (rc != TV_OK && one->name != NULL)
        tv_error_context(err, "stage '%s'", one->name);
    return rc;
}

void tvm_stages_free(struct tvm_stages *s)
{
    struct storage *const st = s == NULL ? NULL : s->storage;
    if (s == NULL)
        return;
    for (size_t i = 0; s->items != NULL && i < s->n; i++)
        tvm_plan_free(s->items[i].plan);
    for (size_t k = 0; st != NULL && st->refs != NULL && k < st->n_refs; k++) {
        bool borrowed = false;
        for (size_t i = 0; i < s->n; i++)
            borrowed = borrowed || s->items[i].dir == st->refs[k].dir;
        if (!borrowed)
            tv_free((void *)(uintptr_t)st->refs[k].dir);
    }
    for (size_t i = 0; s->items != NULL && i < s->n; i++)
        tv_free((void *)(uintptr_t)s->items[i].dir);
    if (st != NULL) {
        /* Nothing to be done about a temporary directory that stays. */
        if (st->temp != NULL && tv_dir_remove(st->temp, NULL) != TV_OK)
            st->keep = true;
        tv_free(st->temp);
        tv_free(st->dir);
        for (size_t i = 0; st->replaced != NULL && i < s->n; i++)
            tvm_plan_free(st->replaced[i]);
        tv_free(st->replaced);
        tv_free(st->refs);
        tv_free(st->recipes);
        tv_free(st);
    }
    tv_free(s->items);
    tv_free(s);
}
