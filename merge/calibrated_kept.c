/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_kept.c - the scratch file that holds what found no room in the
 * store, and what an interrupted run has made.
 *
 * The file only grows, in parts that begin at whole pages, and is mapped
 * read-only once all is written. Of a merge into a directory it is
 * OUT/.tvmerge/calibrated, and the journal says what is where, with checksums
 * (calibration_state.h): a run that goes on takes what it can verify, so
 * nothing of it needs to be durable. Otherwise it has no name, and ends with
 * the run.
 */
#include "calibrated_entries.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sys/mman.h>

#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

#define NOTE_SECONDS 1.0 /* of work that a killed run may lose */

char *tvm_scratch_path(const struct tvm_options *o, const char *what,
                       const void *unique)
{
    const char *tmp = getenv("TMPDIR");

    if (o->out_dir && !o->into)
        return tv_asprintf("%s/.tvmerge/%s.%ld", o->out_dir, what,
                           (long)getpid());
    return tv_asprintf("%s/tvmerge-%s.%ld.%p", tmp && *tmp ? tmp : P_tmpdir,
                       what, (long)getpid(), unique);
}

/* Its name where a later run may find it, owned; NULL: none, or no memory. */
static char *lasting_path(const struct tvm_options *o)
{
    return o->out_dir && !o->into
               ? tv_asprintf("%s/.tvmerge/" TVM_CALIBRATED_FILE, o->out_dir)
               : NULL;
}

enum tv_err calibrated_open(struct tvm_calibrated *c, const struct tvm_plan *p,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = NULL;

    if (c->fd >= 0)
        return TV_OK;
    c->named = p->options.out_dir && !p->options.into;
    path = c->named ? lasting_path(&p->options)
                    : tvm_scratch_path(&p->options, "calibrated", c);
    if (!path)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    c->fd = tv_sys()->open(
        path, O_RDWR | O_CREAT | (c->named ? O_TRUNC : O_EXCL) | O_CLOEXEC,
        0600);
    if (c->fd < 0)
        rc = tv_error_sys(err, errno, "cannot create scratch file %s", path);
    else if (!c->named)
        (void)tv_sys()->unlink(path);
    tv_free(path);
    return rc;
}

enum tv_err calibrated_put(struct tvm_calibrated *c, const void *data,
                           uint64_t n, uint64_t *at, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    *at = c->used;
    TV_TRY(tv_pwrite_all(c->fd, data, (size_t)n, c->used,
                         "the scratch file of masks", err));
    c->used = (c->used + n + CALIBRATED_ALIGN - 1) / CALIBRATED_ALIGN *
              CALIBRATED_ALIGN;
out:
    return rc;
}

void calibrated_unmap(struct tvm_calibrated *c)
{
    if (c->map)
        (void)tv_sys()->munmap((void *)(uintptr_t)c->map, (size_t)c->mapped);
    c->map = NULL;
    c->mapped = 0;
}

enum tv_err calibrated_map(struct tvm_calibrated *c, struct tv_error *err)
{
    if (c->fd < 0 || c->used == c->mapped)
        return TV_OK;
    calibrated_unmap(c);
    if (c->used == 0)
        return TV_OK;
    /* Whole pages: readers may look past the last word of a mask. */
    if (tv_sys()->ftruncate(c->fd, (off_t)c->used) != 0)
        return tv_error_sys(err, errno, "the scratch file of masks");
    void *at =
        tv_sys()->mmap(NULL, (size_t)c->used, PROT_READ, MAP_SHARED, c->fd, 0);
    if (at == MAP_FAILED)
        return tv_error_sys(err, errno, "mapping the scratch file of masks");
    c->map = at;
    c->mapped = c->used;
    return TV_OK;
}

/* ---- what an interrupted run has made ------------------------------------ */

void calibrated_name_damped(const struct tvm_plan *p,
                            struct calibrated_entry *e)
{
    const struct tvm_tensor *t = &p->tensors[e->tensor];

    e->damped.tensor = t->name;
    e->damped.donor = p->inputs[t->sources[e->source].input].ref;
}

/* Bytes [at, at + n) of the map, put to h; false: there are none. */
static bool add_part(tv_hasher *h, const struct tvm_calibrated *c, uint64_t at,
                     uint64_t n)
{
    if (at % CALIBRATED_ALIGN != 0 || at > c->mapped || n > c->mapped - at)
        return false;
    tv_hasher_add(h, c->map + at, (size_t)n);
    return true;
}

static uint64_t value_blocks(const struct tvm_tensor *t)
{
    return (t->n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
}

/* Of what the map has of an entry; *end: behind it. False: not all of it. */
static bool sum_kept(const struct tvm_calibrated *c, const struct tvm_plan *p,
                     const struct calibrated_entry *e,
                     const struct tvm_kept_mask *k, tv_hasher *h,
                     struct tv_hash *out, uint64_t *end)
{
    const struct tvm_tensor *t = &p->tensors[e->tensor];
    size_t rows = 0;
    size_t cols = 0;
    uint64_t n = (t->n_elems + 63) / 64 * sizeof(uint64_t);
    bool ok = e->rule.gram_only == (k->n_rows > 0) &&
              tvm_rule_makes_values(&e->rule) == (k->values_at > 0);

    tv_hasher_reset(h);
    if (e->rule.gram_only) {
        tvm_layer_shape(t, &rows, &cols);
        n = (uint64_t)cols * (cols + 1) / 2 * sizeof(float);
    }
    *end = k->words_at + n;
    ok = ok && add_part(h, c, k->words_at, n);
    if (ok && k->values_at > 0) {
        n = (value_blocks(t) + 1) * sizeof(uint64_t);
        ok = add_part(h, c, k->before_at, n) && k->n_values <= t->n_elems &&
             add_part(h, c, k->values_at, k->n_values * sizeof(float));
        *end = k->values_at + k->n_values * sizeof(float);
    }
    *out = tv_hasher_value(h);
    return ok;
}

/* Takes over what is where the journal has it, and as it was. */
static enum tv_err take_kept(struct tvm_calibrated *c, const struct tvm_plan *p,
                             const struct tvm_calibration_state *was,
                             struct tvm_calibration_use *use,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = lasting_path(&p->options);
    tv_hasher *h = NULL;
    struct stat st;

    if (was->n_kept == 0 || !path)
        goto out;
    c->fd = tv_sys()->open(path, O_RDWR | O_CLOEXEC, 0600);
    if (c->fd < 0) /* whatever became of it */
        goto out;
    c->named = true;
    if (tv_sys()->fstat(c->fd, &st) != 0) {
        rc = tv_error_sys(err, errno, "cannot look at %s", path);
        goto out;
    }
    /* The last part of a killed run is not padded yet; mapping does it. */
    c->used = ((uint64_t)st.st_size + CALIBRATED_ALIGN - 1) / CALIBRATED_ALIGN *
              CALIBRATED_ALIGN;
    TV_TRY(calibrated_map(c, err));
    c->used = 0;
    TV_TRY(tv_hasher_open(err, &h));
    for (size_t i = 0; i < was->n_kept; i++) {
        const struct tvm_kept_mask *k = &was->kept[i];
        struct calibrated_entry *e =
            k->entry < c->n ? &c->entries[k->entry] : NULL;
        struct tv_hash sum;
        uint64_t end = 0;
        if (!e || e->made || !sum_kept(c, p, e, k, h, &sum, &end) ||
            !tv_hash_equal(sum, k->checksum))
            continue;
        e->at = *k;
        e->made = e->in_scratch = true;
        e->has_values = k->values_at > 0;
        use->n_resumed += !e->rule.gram_only;
        end =
            (end + CALIBRATED_ALIGN - 1) / CALIBRATED_ALIGN * CALIBRATED_ALIGN;
        c->used = end > c->used ? end : c->used;
    }
out:
    tv_hasher_close(h);
    tv_free(path);
    return rc;
}

/* Of finished tensors as well, whose masks may be gone. */
static void take_damped(struct tvm_calibrated *c, const struct tvm_plan *p,
                        const struct tvm_calibration_state *was)
{
    for (size_t i = 0; i < c->n; i++) {
        struct calibrated_entry *e = &c->entries[i];
        struct calibrated_entry named = *e;
        calibrated_name_damped(p, &named);
        for (size_t k = 0; k < was->n_damped && !e->damped.tensor; k++) {
            const struct tvm_damped *d = &was->damped[k];
            if (strcmp(d->tensor, named.damped.tensor) != 0 ||
                strcmp(d->donor, named.damped.donor) != 0)
                continue;
            e->damped = *d;
            calibrated_name_damped(p, e);
        }
    }
}

enum tv_err calibrated_take_over(struct tvm_calibrated *c,
                                 const struct tvm_plan *p,
                                 const struct tvm_sink *sink,
                                 struct tvm_calibration_use *use,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_calibration_state was;

    TV_TRY(tvm_calibration_state_parse(sink->calibration, &was, err));
    take_damped(c, p, &was);
    rc = take_kept(c, p, &was, use, err);
    tvm_calibration_state_free(&was);
out:
    return rc;
}

/* ---- for the run that goes on -------------------------------------------- */

static enum tv_err fill_state(struct tvm_calibrated *c,
                              const struct tvm_plan *p,
                              const struct tvm_sink *sink,
                              struct tvm_calibration_state *s,
                              struct tv_error *err)
{
    s->n_masks = c->n;
    s->damped = tv_calloc(c->n + 1, sizeof *s->damped);
    s->kept = tv_calloc(c->n + 1, sizeof *s->kept);
    if (!s->damped || !s->kept)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < c->n; i++) {
        const struct calibrated_entry *e = &c->entries[i];
        s->random =
            s->random || tvm_calibrated_random(p, &p->tensors[e->tensor],
                                               e->source, &e->rule);
        s->n_made += e->made || sink->done[e->tensor].done;
        if (e->damped.tensor)
            s->damped[s->n_damped++] = e->damped;
        if (e->in_scratch && c->named)
            s->kept[s->n_kept++] = e->at;
    }
    return TV_OK;
}

enum tv_err calibrated_tell(struct calibrated_work *w, bool at_once,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_calibration_state s = {.n_masks = 0};
    char *text = NULL;

    if (!at_once && (!w->news || calibrated_now() - w->t_noted < NOTE_SECONDS))
        return TV_OK;
    TV_TRY(fill_state(w->c, w->p, w->sink, &s, err));
    text = tvm_calibration_state_make(&s);
    if (!text) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(w->sink->ops->note(w->sink, text, err));
    w->news = false;
    w->t_noted = calibrated_now();
out:
    tv_free(text);
    tvm_calibration_state_free(&s);
    return rc;
}
