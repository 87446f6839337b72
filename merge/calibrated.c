/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated.c - see calibrated.h.
 *
 *   plan entries (tensor, source) with a calibrated rule
 *     - in the sink or the store already: nothing to do
 *     - else grouped by (model that runs, whose text, kind of statistics): one
 * pass of the model over the windows; per input of linear layers, every entry
 * that has it:
 *
 *         statistics + T -> prune -> mask words [+ values] -> store or scratch
 *
 * The scratch file is mapped read-only once all is written. Of a merge into a
 * directory it is OUT/.tvmerge/calibrated, and the journal says what is where,
 * with checksums (calibration_state.h): a run that goes on takes what it can
 * verify, so nothing of it needs to be durable. Otherwise it has no name, and
 * ends with the run. Memory: one layer's task vector and statistics; the model
 * gets what the budget leaves.
 */
#include "calibrated.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <sys/mman.h>

#include "calibrated_parts.h"
#include "calibration_state.h"
#include "gather.h"
#include "prune.h"
#include "room.h"
#include "sequential.h"
#include "source.h"
#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/checked.h"
#include "tv/cuda_math.h"
#include "tv/eval.h"
#include "tv/linalg.h"
#include "tv/split_gemm.h"
#include "tv/sys.h"
#include "tv/text.h"

#define SCRATCH_ALIGN 4096u
#define NOTE_SECONDS  1.0 /* of work that a killed run may lose */

struct entry {
    size_t tensor, source;
    struct tvm_trim_rule rule;
    size_t model, owner; /* inputs */
    bool made;           /* or not needed */
    bool lacking;        /* of those that wait for merged blocks: it is for it
                          * that models run */
    bool in_scratch, has_values;
    /* In the scratch file: words, or X^T X for gram_only. */
    struct tvm_kept_mask at;
    struct tvm_damped damped; /* with tensor: it took more damping */
};

struct tvm_calibrated {
    struct entry *entries; /* by tensor, source */
    size_t n;
    size_t *first; /* [n_tensors + 1] */
    int fd;
    bool named; /* a later run may go on with it */
    uint64_t used;
    const unsigned char *map;
    uint64_t mapped; /* bytes */
};

struct work { /* of one group */
    struct tvm_calibrated *c;
    const struct tvm_plan *p;
    struct tvm_cache *cache;
    struct tvm_sink *sink;
    const struct tvm_run_hooks *hooks;
    struct tvm_calibration_use *use;
    bool news;      /* since the journal was told */
    double t_noted; /* then */
    size_t model, owner;
    bool gram, merged; /* merged: behind merged blocks */
    uint64_t n_rows;   /* of the input at hand */
    const char *ref;
};

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* ---- entries ------------------------------------------------------------- */

const char *tvm_rule_name(const struct tvm_trim_rule *r)
{
    static const char *const masks[] = {"magnitude", "importance", "sparsegpt"};
    static const char *const corrected[][4] = {
        {"", "", "magnitude+cg", ""},
        {"", "", "importance+cg", ""},
        {"", "sparsegpt+obs", "sparsegpt+cg", "sparsegpt+obs+cg"}};

    if (r->calibrated && r->counts)
        return "counts";
    if (!r->calibrated || r->correct == TVM_CORRECT_NONE)
        return masks[r->score];
    return corrected[r->score][r->correct];
}

bool tvm_calibrated_rule(const struct tvm_tensor *t, size_t source,
                         struct tvm_trim_rule *rule)
{
    if (t->action != TVM_MERGE || t->n_elems == 0 || !t->method)
        return false;
    if (t->method->needs_gram && (int)source != t->base &&
        t->method->needs_gram(t)) {
        *rule = (struct tvm_trim_rule){.calibrated = true,
                                       .gram_only = true,
                                       .inputs = t->method->gram_inputs};
        return true;
    }
    return t->method->trims && t->method->trims(t, source, rule) &&
           rule->calibrated;
}

void tvm_layer_shape(const struct tvm_tensor *t, size_t *rows, size_t *cols)
{
    *rows = (size_t)t->shape[t->in_first ? 1 : 0];
    *cols = (size_t)t->shape[t->in_first ? 0 : 1];
}

size_t tvm_calibration_owner(const struct tvm_plan *p,
                             const struct tvm_tensor *t, size_t source,
                             const struct tvm_trim_rule *r, size_t *model)
{
    const size_t own = t->sources[source].input;
    const size_t base = t->sources[t->base].input;

    *model = r->inputs == TVM_INPUTS_BASE ? base : own;
    if (p->inputs[own].calibration)
        return own;
    if (r->inputs == TVM_INPUTS_BASE && p->inputs[base].calibration)
        return base;
    return p->n_inputs;
}

bool tvm_calibrated_random(const struct tvm_plan *p, const struct tvm_tensor *t,
                           size_t source, const struct tvm_trim_rule *r)
{
    size_t model = 0;
    const size_t owner = tvm_calibration_owner(p, t, source, r, &model);

    return owner < p->n_inputs && p->inputs[owner].calibration->random;
}

enum tv_err tvm_calibrated_key(const struct tvm_plan *p,
                               const struct tvm_tensor *t, size_t source,
                               const struct tvm_trim_rule *r, struct tv_buf *to,
                               struct tv_error *err)
{
    size_t model = 0;
    const size_t owner = tvm_calibration_owner(p, t, source, r, &model);

    if (owner >= p->n_inputs)
        return tv_error_set(err, TV_E_INTERNAL, "%s: no calibration text",
                            t->name);
    tv_buf_le64(to, p->inputs[model].fingerprint.lo);
    tv_buf_le64(to, p->inputs[model].fingerprint.hi);
    tv_buf_le64(to, p->inputs[owner].calibration_hash.lo);
    tv_buf_le64(to, p->inputs[owner].calibration_hash.hi);
    tv_buf_str(to, tva_linalg_core());
    const char *const products =
        p->options.cuda ? NULL : tvk_split_core_of(p->options.kernels);
    if (products)
        tv_buf_str(to, products);
    /* All that the merged blocks in front can depend on, and more. */
    if (r->inputs == TVM_INPUTS_MERGED) {
        tv_buf_str(to, "merged");
        tv_buf_le64(to, p->weights_hash.lo);
        tv_buf_le64(to, p->weights_hash.hi);
    }
    if (p->options.cuda) {
        char core[128];
        size_t rows = 0;
        size_t cols = 0;
        tv_buf_str(to, tvk_cuda_math_core(p->options.cuda, core, sizeof core));
        tvm_layer_shape(t, &rows, &cols);
        if (tvm_rule_needs_gram(r) &&
            !tvk_cuda_layer_factors(p->options.cuda, rows, cols))
            tv_buf_str(to, "factor by the CPU");
    }
    return TV_OK;
}

bool tvm_calibrated_walks(const struct tvm_plan *p)
{
    struct tvm_trim_rule r;

    for (size_t i = 0; i < p->n_tensors; i++)
        for (size_t s = 0; s < p->tensors[i].n_sources; s++)
            if (tvm_calibrated_rule(&p->tensors[i], s, &r) &&
                r.inputs == TVM_INPUTS_MERGED)
                return true;
    return false;
}

static uint64_t kept_most(const struct tvm_trim_rule *r, uint64_t n)
{
    const double kept = r->density * (double)n + 65536.0;
    return kept < (double)n ? (uint64_t)kept : n;
}

/* Bytes for one entry; statistics as tvm_prune takes them included. */
static uint64_t entry_bytes(const struct tvm_plan *p,
                            const struct tvm_tensor *t,
                            const struct tvm_trim_rule *r)
{
    size_t rows = 0;
    size_t cols = 0;

    if (r->gram_only)
        return 0;
    tvm_layer_shape(t, &rows, &cols);
    /* A table is never in memory as a whole. */
    uint64_t bytes =
        (r->counts ? cols * sizeof(double) : t->n_elems * sizeof(float)) +
        t->n_elems / 8 + tvm_prune_bytes(r, rows, cols, p->options.cuda) +
        2 * TVM_BLOCK * sizeof(float);
    if (tvm_rule_makes_values(r))
        bytes += kept_most(r, t->n_elems) * sizeof(float) +
                 (t->n_elems / TV_DELTA_BLOCK + 2) * sizeof(uint64_t);
    for (size_t s = 0; s < t->n_sources; s++)
        bytes +=
            tvm_source_bytes(t, s) + tvm_source_l_floats(t, s) * sizeof(float);
    return bytes;
}

static uint64_t stat_bytes(const struct tvm_tensor *t,
                           const struct tvm_trim_rule *r)
{
    size_t rows = 0;
    size_t cols = 0;

    tvm_layer_shape(t, &rows, &cols);
    return tvm_rule_needs_gram(r) ? (uint64_t)cols * (cols + 1) / 2 * 12
                                  : cols * sizeof(double);
}

bool tvm_calibrated_wanted(const struct tvm_plan *p, uint64_t *needed,
                           uint64_t *disk)
{
    bool any = false;
    uint64_t most_entry = 0;
    uint64_t most_stat = 0;

    *disk = 0;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        struct tvm_trim_rule r;
        for (size_t s = 0; s < t->n_sources; s++) {
            if (!tvm_calibrated_rule(t, s, &r))
                continue;
            any = true;
            if (entry_bytes(p, t, &r) > most_entry)
                most_entry = entry_bytes(p, t, &r);
            if (stat_bytes(t, &r) > most_stat)
                most_stat = stat_bytes(t, &r);
            if (r.gram_only) {
                /* Layers that share their inputs share this. */
                *disk += stat_bytes(t, &r) / 3 + SCRATCH_ALIGN;
                continue;
            }
            *disk += t->n_elems / 8 + SCRATCH_ALIGN;
            if (tvm_rule_makes_values(&r))
                *disk += kept_most(&r, t->n_elems) * sizeof(float) +
                         t->n_elems / 64 + 2 * SCRATCH_ALIGN;
        }
    }
    *needed = most_entry + most_stat + TVM_MODEL_LEAST;
    if (any && tvm_calibrated_walks(p))
        *disk += tvm_sequential_disk(p);
    return any;
}

/* Models that run over a text: one after the other, or all of those that walk
 * through merged blocks together. */
struct pass {
    size_t model, owner;
    bool gram, merged;
    uint64_t entry; /* bytes of the largest */
};

static void add_pass(struct pass *all, size_t *n, const struct pass *one)
{
    size_t i = 0;

    while (i < *n && !(all[i].model == one->model && all[i].gram == one->gram &&
                       all[i].merged == one->merged &&
                       (one->merged || all[i].owner == one->owner)))
        i++;
    if (i == *n) {
        all[(*n)++] = *one;
        return;
    }
    if (one->entry > all[i].entry)
        all[i].entry = one->entry;
}

enum tv_err tvm_calibrated_scratch(const struct tvm_plan *p, uint64_t *bytes,
                                   uint64_t *heap, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct pass *all = NULL;
    struct tvm_sequential_text *texts = NULL;
    size_t n = 0;
    size_t n_texts = 0;
    uint64_t reserve = 0;
    uint64_t together = 0;
    struct tvm_trim_rule r;

    *bytes = *heap = 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        n += p->tensors[i].n_sources;
    all = tv_calloc(n + 1, sizeof *all);
    texts = tv_calloc(n + 1, sizeof *texts);
    if (!all || !texts) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    n = 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        for (size_t s = 0; s < p->tensors[i].n_sources; s++) {
            const struct tvm_tensor *t = &p->tensors[i];
            if (!tvm_calibrated_rule(t, s, &r))
                continue;
            struct pass one = {.gram = tvm_rule_needs_gram(&r),
                               .merged = r.inputs == TVM_INPUTS_MERGED,
                               .entry = entry_bytes(p, t, &r)};
            one.owner = tvm_calibration_owner(p, t, s, &r, &one.model);
            if (one.owner < p->n_inputs)
                add_pass(all, &n, &one);
        }
    for (size_t i = 0; i < n; i++) {
        const uint64_t memory = p->options.memory_bytes;
        struct tve_scratch x;
        if (all[i].merged) {
            texts[n_texts++] =
                (struct tvm_sequential_text){all[i].model, all[i].gram};
            reserve = all[i].entry > reserve ? all[i].entry : reserve;
            continue;
        }
        TV_TRY(tvm_layer_scratch(
            p, all[i].model, p->inputs[all[i].owner].calibration, all[i].gram,
            memory > all[i].entry ? memory - all[i].entry : 1, NULL, err, &x));
        if (x.streams + x.batch > *bytes)
            *bytes = x.streams + x.batch;
        if (x.heap + all[i].entry > *heap)
            *heap = x.heap + all[i].entry;
    }
    TV_TRY(tvm_sequential_scratch(p, texts, n_texts, reserve, &together, err));
    *bytes = together > *bytes ? together : *bytes;
    /* Models that walk together share what there is. */
    if (n_texts > 0 || *heap > p->options.memory_bytes)
        *heap = p->options.memory_bytes;
out:
    tv_free(texts);
    tv_free(all);
    return rc;
}

static void name_damped(const struct tvm_plan *p, struct entry *e)
{
    const struct tvm_tensor *t = &p->tensors[e->tensor];

    e->damped.tensor = t->name;
    e->damped.donor = p->inputs[t->sources[e->source].input].ref;
}

static enum tv_err collect(struct tvm_calibrated *c, const struct tvm_plan *p,
                           struct tvm_cache *cache,
                           struct tvm_calibration_use *use,
                           struct tv_error *err)
{
    size_t n = 0;
    struct tvm_trim_rule r;

    for (size_t i = 0; i < p->n_tensors; i++)
        for (size_t s = 0; s < p->tensors[i].n_sources; s++)
            n += tvm_calibrated_rule(&p->tensors[i], s, &r);
    c->entries = tv_calloc(n + 1, sizeof *c->entries);
    c->first = tv_calloc(p->n_tensors + 1, sizeof *c->first);
    if (!c->entries || !c->first)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        c->first[i] = c->n;
        for (size_t s = 0; s < t->n_sources; s++) {
            struct entry *e = &c->entries[c->n];
            if (!tvm_calibrated_rule(t, s, &e->rule))
                continue;
            e->tensor = i;
            e->source = s;
            e->owner = tvm_calibration_owner(p, t, s, &e->rule, &e->model);
            e->made = !e->rule.gram_only && tvm_cache_has(cache, i, s);
            use->n_found += e->made;
            if (e->made && tvm_cache_damped(cache, i, s, &e->damped))
                name_damped(p, e);
            c->n++;
        }
    }
    c->first[p->n_tensors] = c->n;
    return TV_OK;
}

/* What is left to do, behind what store and journal have. */
static void mark(struct tvm_calibrated *c, const struct tvm_plan *p,
                 const struct tvm_sink *sink)
{
    const bool walks = tvm_calibrated_walks(p);

    for (size_t i = 0; i < c->n; i++) {
        struct entry *e = &c->entries[i];
        const bool done = e->made || sink->done[e->tensor].done;
        e->lacking = !done && e->rule.inputs == TVM_INPUTS_MERGED;
        /* Those of finished tensors too: blocks are merged once more for the
         * ones behind them. */
        if (!walks)
            e->made = done;
    }
}

/* ---- scratch ------------------------------------------------------------- */

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

static enum tv_err open_scratch(struct tvm_calibrated *c,
                                const struct tvm_plan *p, struct tv_error *err)
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

/* Appends; *at is where it begins. */
static enum tv_err put_scratch(struct tvm_calibrated *c, const void *data,
                               uint64_t n, uint64_t *at, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    *at = c->used;
    TV_TRY(tv_pwrite_all(c->fd, data, (size_t)n, c->used,
                         "the scratch file of masks", err));
    c->used = (c->used + n + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
out:
    return rc;
}

static void unmap_scratch(struct tvm_calibrated *c)
{
    if (c->map)
        (void)tv_sys()->munmap((void *)(uintptr_t)c->map, (size_t)c->mapped);
    c->map = NULL;
    c->mapped = 0;
}

static enum tv_err map_scratch(struct tvm_calibrated *c, struct tv_error *err)
{
    if (c->fd < 0 || c->used == c->mapped)
        return TV_OK;
    unmap_scratch(c);
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

/* Bytes [at, at + n) of the map, put to h; false: there are none. */
static bool add_part(tv_hasher *h, const struct tvm_calibrated *c, uint64_t at,
                     uint64_t n)
{
    if (at % SCRATCH_ALIGN != 0 || at > c->mapped || n > c->mapped - at)
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
                     const struct entry *e, const struct tvm_kept_mask *k,
                     tv_hasher *h, struct tv_hash *out, uint64_t *end)
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
    c->used = ((uint64_t)st.st_size + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN *
              SCRATCH_ALIGN;
    TV_TRY(map_scratch(c, err));
    c->used = 0;
    TV_TRY(tv_hasher_open(err, &h));
    for (size_t i = 0; i < was->n_kept; i++) {
        const struct tvm_kept_mask *k = &was->kept[i];
        struct entry *e = k->entry < c->n ? &c->entries[k->entry] : NULL;
        struct tv_hash sum;
        uint64_t end = 0;
        if (!e || e->made || !sum_kept(c, p, e, k, h, &sum, &end) ||
            !tv_hash_equal(sum, k->checksum))
            continue;
        e->at = *k;
        e->made = e->in_scratch = true;
        e->has_values = k->values_at > 0;
        use->n_resumed += !e->rule.gram_only;
        end = (end + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
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
        struct entry *e = &c->entries[i];
        struct entry named = *e;
        name_damped(p, &named);
        for (size_t k = 0; k < was->n_damped && !e->damped.tensor; k++) {
            const struct tvm_damped *d = &was->damped[k];
            if (strcmp(d->tensor, named.damped.tensor) != 0 ||
                strcmp(d->donor, named.damped.donor) != 0)
                continue;
            e->damped = *d;
            name_damped(p, e);
        }
    }
}

static enum tv_err take_over(struct tvm_calibrated *c, const struct tvm_plan *p,
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
        const struct entry *e = &c->entries[i];
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

static void count_damped(const struct tvm_calibrated *c,
                         struct tvm_calibration_use *use)
{
    for (size_t i = 0; i < c->n; i++) {
        const struct tvm_damped *d = &c->entries[i].damped;
        if (!d->tensor)
            continue;
        use->n_damped += d->damping > 0;
        use->n_uncorrected += !(d->damping > 0);
        if (d->damping > use->most_damping)
            use->most_damping = d->damping;
    }
}

/* Tells the journal: `at_once`, or when there is news after a second. */
static enum tv_err tell_journal(struct work *w, bool at_once,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_calibration_state s = {.n_masks = 0};
    char *text = NULL;

    if (!at_once && (!w->news || now() - w->t_noted < NOTE_SECONDS))
        return TV_OK;
    TV_TRY(fill_state(w->c, w->p, w->sink, &s, err));
    text = tvm_calibration_state_make(&s);
    if (!text) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(w->sink->ops->note(w->sink, text, err));
    w->news = false;
    w->t_noted = now();
out:
    tv_free(text);
    tvm_calibration_state_free(&s);
    return rc;
}

/* ---- one layer ----------------------------------------------------------- */

/* fp32 differences of n stored elements from start, into dst. */
static void read_delta(const struct tvm_layer *l, uint64_t start, size_t n,
                       float *dst)
{
    for (size_t done = 0; done < n; done += TVM_BLOCK) {
        const size_t some = n - done < TVM_BLOCK ? n - done : TVM_BLOCK;
        const float *b = tvm_reader_block(&l->base, l->k, start + done, some,
                                          l->block, l->l_scratch, NULL);
        const float *x =
            tvm_reader_block(&l->donor, l->k, start + done, some,
                             l->block + TVM_BLOCK, l->l_scratch, NULL);
        for (size_t i = 0; i < some; i++)
            dst[done + i] = x[i] - b[i];
    }
}

/* Rows [row, row + n) of T [out, in]. */
void tvm_layer_rows(void *arg, size_t row, size_t n, float *dst)
{
    struct tvm_layer *const l = arg;
    float some[TVM_BLOCK];

    if (!l->t->in_first) {
        read_delta(l, (uint64_t)row * l->cols, n * l->cols, dst);
        return;
    }
    /* Stored [in, out]: row r of T is column r. */
    for (size_t c = 0; c < l->cols; c++)
        for (size_t r = 0; r < n; r += TVM_BLOCK) {
            const size_t part = n - r < TVM_BLOCK ? n - r : TVM_BLOCK;
            read_delta(l, (uint64_t)c * l->rows + row + r, part, some);
            for (size_t i = 0; i < part; i++)
                dst[(r + i) * l->cols + c] = some[i];
        }
}

/* Of element i as it is stored. */
static float pruned_at(const struct tvm_layer *l, const float *t, uint64_t i)
{
    if (!l->t->in_first)
        return t[i];
    return t[(size_t)(i % l->rows) * l->cols + (size_t)(i / l->rows)];
}

static void take_words(const struct tvm_layer *l, const float *t,
                       uint64_t *words)
{
    for (uint64_t i = 0; i < l->t->n_elems; i++)
        if (pruned_at(l, t, i) != 0.0f)
            words[i / 64] |= (uint64_t)1 << (i % 64);
}

/* The donor that has these differences; packed, in stored order. */
static void take_values(const struct tvm_layer *l, const float *t,
                        const uint64_t *words, float *values, uint64_t *before)
{
    uint64_t at = 0;

    for (uint64_t from = 0; from < l->t->n_elems; from += TV_DELTA_BLOCK) {
        const uint64_t left = l->t->n_elems - from;
        const size_t n = left < TV_DELTA_BLOCK ? (size_t)left : TV_DELTA_BLOCK;
        const float *b = tvm_reader_block(&l->base, l->k, from, n, l->block,
                                          l->l_scratch, NULL);
        before[from / TV_DELTA_BLOCK] = at;
        for (size_t i = 0; i < n; i++)
            if (words[(from + i) / 64] >> ((from + i) % 64) & 1u)
                values[at++] = b[i] + pruned_at(l, t, from + i);
    }
    before[(l->t->n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK] = at;
}

enum tv_err tvm_layer_open(struct tvm_layer *l, const struct tvm_plan *p,
                           const struct tvm_tensor *t, size_t source,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool verify = p->options.verify_reads;
    size_t floats = tvm_source_l_floats(t, source);

    *l = (struct tvm_layer){.p = p, .t = t};
    l->k = p->options.kernels ? p->options.kernels : tvk_table_best();
    if (tvm_source_l_floats(t, (size_t)t->base) > floats)
        floats = tvm_source_l_floats(t, (size_t)t->base);
    tvm_layer_shape(t, &l->rows, &l->cols);
    l->block = tv_alloc_aligned((2 * TVM_BLOCK + floats + 16) * sizeof(float));
    if (!l->block)
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
    l->l_scratch = l->block + 2 * TVM_BLOCK;
    TV_TRY(tvm_reader_open(&l->base, p, t, (size_t)t->base, l->k, verify, err));
    TV_TRY(tvm_reader_open(&l->donor, p, t, source, l->k, verify, err));
out:
    return rc;
}

void tvm_layer_close(struct tvm_layer *l)
{
    tvm_reader_close(&l->donor);
    tvm_reader_close(&l->base);
    tv_free(l->block);
}

static enum tv_err put_part(struct tvm_calibrated *c, const void *data,
                            uint64_t n, tv_hasher *h, uint64_t *at,
                            struct tv_error *err)
{
    tv_hasher_add(h, data, (size_t)n);
    return put_scratch(c, data, n, at, err);
}

static enum tv_err keep(struct work *w, struct entry *e, const uint64_t *words,
                        uint64_t n_words, const float *values,
                        const uint64_t *before, uint64_t n_blocks,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_hasher *h = NULL;

    e->made = true;
    w->news = true;
    w->use->n_made++;
    if (!w->sink->busy &&
        tvm_cache_add(w->cache, e->tensor, e->source, words, values, before,
                      e->damped.tensor ? &e->damped : NULL,
                      tvm_room_spare(tvm_room_left(w->p, w->sink->done))))
        goto out;
    TV_TRY(open_scratch(w->c, w->p, err));
    TV_TRY(tv_hasher_open(err, &h));
    e->at.entry = (size_t)(e - w->c->entries);
    TV_TRY(put_part(w->c, words, n_words * sizeof *words, h, &e->at.words_at,
                    err));
    if (values) {
        e->at.n_values = before[n_blocks];
        TV_TRY(put_part(w->c, before, (n_blocks + 1) * sizeof *before, h,
                        &e->at.before_at, err));
        TV_TRY(put_part(w->c, values, before[n_blocks] * sizeof *values, h,
                        &e->at.values_at, err));
        e->has_values = true;
    }
    e->at.checksum = tv_hasher_value(h);
    e->in_scratch = true;
out:
    tv_hasher_close(h);
    return rc;
}

static void note(const struct work *w, struct entry *e,
                 const struct tvm_pruned *got)
{
    if (!tvm_rule_needs_gram(&e->rule))
        return;
    if (got->uncorrected || got->n_raised > 0) {
        e->damped =
            (struct tvm_damped){.damping = got->uncorrected ? 0 : got->damping,
                                .n_raised = got->n_raised,
                                .n_unseen = got->n_unseen};
        name_damped(w->p, e);
    }
}

static void read_table(void *arg, uint64_t start, size_t n, float *dst)
{
    read_delta(arg, start, n, dst);
}

/* How often the token of each row occurs, where rows are gathered from the
 * model's own and others; NULL: no memory. */
static double *gathered_counts(const struct tvm_source *s,
                               const struct tvm_stats *stats, size_t n_rows)
{
    double *counts = tv_calloc(n_rows + 1, sizeof *counts);
    const struct tvm_rows *rows = s->gather->rows;

    for (size_t i = 0; counts && i < rows->n_runs; i++) {
        const struct tvm_run *r = &rows->runs[i];
        for (uint64_t k = 0; r->kind == TVM_RUN_ROWS && k < r->n; k++)
            if (s->gather->from[r->from].input == s->input &&
                r->row + k < stats->n && r->first + k < n_rows)
                counts[r->first + k] = stats->diag[r->row + k];
    }
    return counts;
}

static enum tv_err verify(const struct tvm_source *s,
                          const struct tvm_reader *r, struct tv_error *err)
{
    return s->gather ? tvm_gather_verify(r, 0, 1, err)
                     : tvm_reader_verify(r, 0, r->view.bytes, err);
}

static enum tv_err make_by_counts(struct work *w, struct entry *e,
                                  const struct tvm_stats *stats,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = &w->p->tensors[e->tensor];
    const uint64_t n_words = (t->n_elems + 63) / 64;
    const struct tvm_source *s =
        &t->sources[e->rule.inputs == TVM_INPUTS_BASE ? (size_t)t->base
                                                      : e->source];
    struct tvm_stats of = {.n = stats->n, .diag = stats->diag};
    struct tvm_layer l;
    struct tvm_pruned got;
    double *counts = NULL;
    uint64_t *words = NULL;
    float *block = NULL;

    TV_TRY(tvm_layer_open(&l, w->p, t, e->source, err));
    words = tv_calloc((size_t)n_words, sizeof *words);
    block = tv_alloc(TVM_BLOCK * sizeof *block);
    if (s->gather) {
        counts = gathered_counts(s, stats, l.cols);
        of = (struct tvm_stats){.n = l.cols, .diag = counts};
    }
    if (!words || !block || !of.diag) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
        goto out;
    }
    if (of.n != l.cols) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "%s: counts of %zu tokens for %zu rows", t->name,
                          of.n, l.cols);
        goto out;
    }
    if (w->p->options.verify_reads) {
        TV_TRY(verify(&t->sources[t->base], &l.base, err));
        TV_TRY(verify(&t->sources[e->source], &l.donor, err));
    }
    const struct tvm_prune_table table = {read_table, &l, block, TVM_BLOCK};
    TV_TRY(tvm_prune_by_counts(&e->rule, t->n_elems, l.rows, &of, &table, words,
                               &got, err));
    rc = keep(w, e, words, n_words, NULL, NULL, 0, err);
out:
    if (rc != TV_OK)
        tv_error_context(err, "calibration");
    tv_free(counts);
    tv_free(block);
    tv_free(words);
    tvm_layer_close(&l);
    return rc;
}

static enum tv_err make(struct work *w, struct entry *e,
                        const struct tvm_stats *stats, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = &w->p->tensors[e->tensor];
    const uint64_t n_words = (t->n_elems + 63) / 64;
    const uint64_t n_blocks =
        (t->n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
    struct tvm_layer l;
    struct tvm_pruned got;
    float *delta = NULL;
    float *values = NULL;
    uint64_t *words = NULL;
    uint64_t *before = NULL;

    TV_TRY(tvm_layer_open(&l, w->p, t, e->source, err));
    if (stats->n != l.cols) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "%s: statistics of %zu inputs for %zu columns",
                          t->name, stats->n, l.cols);
        goto out;
    }
    delta = tv_alloc_aligned((size_t)t->n_elems * sizeof *delta);
    words = tv_calloc((size_t)n_words, sizeof *words);
    if (!delta || !words)
        goto no_memory;
    if (w->p->options.verify_reads) {
        TV_TRY(tvm_reader_verify(&l.base, 0, l.base.view.bytes, err));
        TV_TRY(tvm_reader_verify(&l.donor, 0, l.donor.view.bytes, err));
    }
    const struct tvm_prune_again again = {tvm_layer_rows, &l};
    tvm_layer_rows(&l, 0, l.rows, delta);
    TV_TRY(
        tvm_prune(&e->rule, delta, l.rows, l.cols, stats, &again, &got, err));
    note(w, e, &got);
    take_words(&l, delta, words);
    if (tvm_rule_makes_values(&e->rule)) {
        values = tv_alloc((size_t)(got.n_kept + 1) * sizeof *values);
        before = tv_calloc((size_t)n_blocks + 1, sizeof *before);
        if (!values || !before)
            goto no_memory;
        take_values(&l, delta, words, values, before);
    }
    TV_TRY(keep(w, e, words, n_words, values, before, n_blocks, err));
    goto out;
no_memory:
    rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
out:
    if (rc != TV_OK)
        tv_error_context(err, "calibration");
    tv_free(before);
    tv_free(values);
    tv_free(words);
    tv_free(delta);
    tvm_layer_close(&l);
    return rc;
}

static bool wants(const struct work *w, const struct entry *e)
{
    /* A diagonal by itself is fp64, that of a Gram matrix fp32. */
    return !e->made && e->model == w->model && e->owner == w->owner &&
           (e->rule.counts || tvm_rule_needs_gram(&e->rule) == w->gram) &&
           (e->rule.inputs == TVM_INPUTS_MERGED) == w->merged;
}

static const char *weight_name(const struct work *w, const struct entry *e)
{
    const struct tvm_tensor *t = &w->p->tensors[e->tensor];
    const size_t s =
        e->rule.inputs == TVM_INPUTS_BASE ? (size_t)t->base : e->source;
    return t->sources[s].tensor->name;
}

/* Those that take X^T X as it is. One copy for all of them. */
static enum tv_err keep_gram(struct work *w, const struct tvm_stats *stats,
                             const char *const *tensors, size_t n_tensors,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t at = UINT64_MAX;
    tv_hasher *h = NULL;
    struct tv_hash sum = {0, 0};

    for (size_t i = 0; i < n_tensors; i++)
        for (size_t k = 0; k < w->c->n; k++) {
            struct entry *e = &w->c->entries[k];
            size_t rows = 0;
            size_t cols = 0;
            if (!wants(w, e) || !e->rule.gram_only ||
                strcmp(weight_name(w, e), tensors[i]) != 0)
                continue;
            tvm_layer_shape(&w->p->tensors[e->tensor], &rows, &cols);
            if (stats->n != cols) {
                rc = tv_error_set(err, TV_E_INTERNAL,
                                  "%s: statistics of %zu inputs for %zu "
                                  "columns",
                                  tensors[i], stats->n, cols);
                goto out;
            }
            if (at == UINT64_MAX) {
                TV_TRY(open_scratch(w->c, w->p, err));
                TV_TRY(tv_hasher_open(err, &h));
                TV_TRY(put_part(w->c, stats->gram,
                                (uint64_t)cols * (cols + 1) / 2 * sizeof(float),
                                h, &at, err));
                sum = tv_hasher_value(h);
            }
            e->at = (struct tvm_kept_mask){.entry = k,
                                           .words_at = at,
                                           .n_rows = w->n_rows,
                                           .checksum = sum};
            e->made = true;
            e->in_scratch = true;
            w->news = true;
        }
out:
    tv_hasher_close(h);
    return rc;
}

static enum tv_err see(void *arg, const struct tvm_stats *stats,
                       const char *const *tensors, size_t n_tensors,
                       struct tv_error *err)
{
    struct work *const w = arg;
    enum tv_err rc = TV_OK;

    if (w->gram)
        TV_TRY(keep_gram(w, stats, tensors, n_tensors, err));
    for (size_t i = 0; i < n_tensors; i++)
        for (size_t k = 0; k < w->c->n; k++) {
            struct entry *e = &w->c->entries[k];
            if (wants(w, e) && strcmp(weight_name(w, e), tensors[i]) == 0)
                TV_TRY(e->rule.counts ? make_by_counts(w, e, stats, err)
                                      : make(w, e, stats, err));
        }
    rc = tell_journal(w, false, err);
out:
    return rc;
}

/* ---- running a model ----------------------------------------------------- */

enum tv_err tvm_layer_model(const struct tvm_plan *p, size_t input,
                            uint64_t memory, struct tv_error *err,
                            tve_model **out)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan_input *in = &p->inputs[input];
    const char *tmp = getenv("TMPDIR");
    char *scratch = NULL;
    struct tve_model_adapter *adapters = NULL;
    struct tve_model_options opt = {
        .n_threads = p->options.threads,
        .memory_bytes = memory,
        .kernels = p->options.kernels,
        .cuda = p->options.cuda,
        .scratch_dir = tmp && *tmp ? tmp : NULL,
        .skip_verify = !p->options.verify_reads,
    };

    *out = NULL;
    adapters = tv_calloc(in->n_adapters + 1, sizeof *adapters);
    if (p->options.out_dir && !p->options.into)
        scratch = tv_asprintf("%s/.tvmerge", p->options.out_dir);
    if (!adapters) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (scratch && tv_path_is_dir(scratch))
        opt.scratch_dir = scratch;
    for (size_t i = 0; i < in->n_adapters; i++)
        adapters[i] =
            (struct tve_model_adapter){in->adapters[i], in->adapter_weights[i]};
    rc = tve_model_open(in->input, adapters, in->n_adapters, &opt, err, out);
    if (rc != TV_OK)
        tv_error_context(err, "calibration of '%s'", in->ref);
out:
    tv_free(scratch);
    tv_free(adapters);
    return rc;
}

enum tv_err tvm_calibrated_check(const struct tvm_plan *p, size_t input,
                                 const struct tvm_trim_rule *r,
                                 struct tv_error *err)
{
    if (r->inputs == TVM_INPUTS_MERGED)
        return tvm_sequential_check(p, input, err);
    tve_model *m = NULL;
    const enum tv_err rc = tvm_layer_model(p, input, TVM_MODEL_LEAST, err, &m);

    tve_model_close(m);
    return rc;
}

static enum tv_err on_input(void *arg, const struct tve_stat_input *in,
                            struct tv_error *err)
{
    struct work *const w = arg;
    const struct tvm_stats stats = {.n = in->n,
                                    .diag = in->sums,
                                    .gram = in->gram,
                                    .cuda = w->p->options.cuda};

    w->n_rows = in->n_rows;
    return see(w, &stats, in->tensors, in->n_tensors, err);
}

static void on_step(void *arg, uint64_t done, uint64_t total)
{
    const struct work *const w = arg;

    if (w->hooks && w->hooks->calibrating)
        w->hooks->calibrating(w->hooks->arg, w->ref, done, total);
}

/* Inputs that entries of the group need. */
static enum tv_err mark_wanted(const struct work *w, const tve_calibration *c,
                               bool **out, struct tv_error *err)
{
    const size_t n = tve_calibration_count(c);
    bool *want = tv_calloc(n + 1, sizeof *want);

    *out = want;
    if (!want)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < w->c->n; i++) {
        const struct entry *e = &w->c->entries[i];
        if (!wants(w, e))
            continue;
        const size_t at = tve_calibration_find(c, weight_name(w, e));
        if (at == n)
            return tv_error_set(
                err, TV_E_UNSUPPORTED,
                "%s: running '%s' does not show the inputs of this tensor",
                w->p->tensors[e->tensor].name, w->ref);
        want[at] = true;
    }
    return TV_OK;
}

/* Bytes for the layer that takes most, beside the model. */
static uint64_t most_bytes(const struct work *w)
{
    uint64_t most = 0;

    for (size_t i = 0; i < w->c->n; i++) {
        const struct entry *e = &w->c->entries[i];
        if (!wants(w, e))
            continue;
        const uint64_t bytes =
            entry_bytes(w->p, &w->p->tensors[e->tensor], &e->rule);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static enum tv_err too_little(const struct tvm_plan *p, uint64_t needed,
                              struct tv_error *err)
{
    return tv_error_set(err, TV_E_BUDGET,
                        "calibration needs %llu bytes of memory, --memory "
                        "allows %llu",
                        (unsigned long long)needed,
                        (unsigned long long)p->options.memory_bytes);
}

static enum tv_err run_group(struct work *w, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = w->p;
    const uint64_t most = most_bytes(w);
    struct tve_samples samples = {.n = 0};
    struct tve_calibration_use use = {.n_found = 0};
    struct tve_calibration_options opt = {.store = p->options.store};
    tve_calibration *c = NULL;
    tve_model *m = NULL;
    bool *want = NULL;

    if (p->options.no_cache)
        opt.store = NULL;
    w->ref = p->inputs[w->model].ref;
    if (most + TVM_MODEL_LEAST > p->options.memory_bytes) {
        rc = too_little(p, most + TVM_MODEL_LEAST, err);
        goto out;
    }
    opt.kind = w->gram ? TVE_STAT_GRAM : TVE_STAT_DIAG;
    if (p->options.keep_statistics && !w->sink->busy &&
        tvm_cache_hold(w->cache, true)) {
        opt.keep = TVE_KEEP_IF_ROOM;
        opt.keep_free = tvm_room_spare(tvm_room_left(p, w->sink->done));
    }
    TV_TRY(
        tvm_layer_model(p, w->model, p->options.memory_bytes - most, err, &m));
    TV_TRY(tvm_layer_samples(p, w->model, m, p->inputs[w->owner].calibration,
                             &samples, err));
    TV_TRY(tve_calibration_open(m, &samples, &opt, err, &c));
    TV_TRY(mark_wanted(w, c, &want, err));
    const struct tve_progress progress = {on_step, w,
                                          w->hooks ? w->hooks->cancel : NULL};
    TV_TRY(tve_calibration_run(c, want, &progress, on_input, w, &use, err));
    w->use->n_statistics_found += use.n_found;
    w->use->n_statistics_kept += use.n_kept;
    /* Tokens are counted without running anything. */
    const bool ran = use.n_computed > (want[0] ? 1u : 0u);
    w->use->n_models += ran;
    w->use->n_tokens += ran ? samples.n_tokens : 0;
    w->use->random = w->use->random || samples.random;
out:
    if (opt.keep != TVE_KEEP_NOT)
        tvm_cache_hold(w->cache, false);
    tv_free(want);
    tve_calibration_close(c);
    tve_samples_free(&samples);
    tve_model_close(m);
    return rc;
}

/* ---- behind merged blocks ------------------------------------------------ */

struct walk {
    struct work *w;
    struct tvm_sequential_text *texts; /* [n_entries] at most */
};

static void choose_text(const struct walk *k, size_t text)
{
    k->w->model = k->texts[text].input;
    k->w->owner = k->texts[text].input;
    k->w->gram = k->texts[text].gram;
    k->w->ref = k->w->p->inputs[k->w->model].ref;
}

static bool any_entry(const struct walk *k, size_t text, const char *tensor,
                      bool lacking)
{
    const struct tvm_calibrated *c = k->w->c;

    choose_text(k, text);
    for (size_t i = 0; i < c->n; i++) {
        const struct entry *e = &c->entries[i];
        if (wants(k->w, e) && (e->lacking || !lacking) &&
            strcmp(weight_name(k->w, e), tensor) == 0)
            return true;
    }
    return false;
}

static bool walk_wants(void *arg, size_t text, const char *tensor)
{
    return any_entry(arg, text, tensor, false);
}

static bool walk_lacks(void *arg, size_t text, const char *tensor)
{
    return any_entry(arg, text, tensor, true);
}

static enum tv_err walk_see(void *arg, size_t text,
                            const struct tve_stat_input *in,
                            struct tv_error *err)
{
    const struct walk *const k = arg;

    choose_text(k, text);
    return on_input(k->w, in, err);
}

static enum tv_err walk_ready(void *arg, struct tv_error *err)
{
    const struct walk *const k = arg;

    return map_scratch(k->w->c, err);
}

/* Adds the text of an entry, if it is a new one. */
static void add_text(struct tvm_sequential *s,
                     struct tvm_sequential_text *texts, const struct entry *e)
{
    const bool gram = tvm_rule_needs_gram(&e->rule);

    for (size_t i = 0; i < s->n_texts; i++)
        if (texts[i].input == e->model && texts[i].gram == gram)
            return;
    texts[s->n_texts++] = (struct tvm_sequential_text){e->model, gram};
}

static enum tv_err run_merged(struct work *w, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk k = {.w = w};
    struct tvm_sequential s = {.plan = w->p,
                               .cache = w->cache,
                               .calibrated = w->c,
                               .hooks = w->hooks,
                               .arg = &k,
                               .wants = walk_wants,
                               .lacks = walk_lacks,
                               .see = walk_see,
                               .ready = walk_ready};
    bool lacking = false;

    for (size_t i = 0; i < w->c->n; i++)
        lacking = lacking || w->c->entries[i].lacking;
    if (!lacking)
        return TV_OK;
    k.texts = tv_calloc(w->c->n + 1, sizeof *k.texts);
    if (!k.texts)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    w->merged = true;
    s.texts = k.texts;
    for (size_t i = 0; i < w->c->n; i++) {
        const struct entry *e = &w->c->entries[i];
        if (e->rule.inputs != TVM_INPUTS_MERGED)
            continue;
        add_text(&s, k.texts, e);
        const uint64_t bytes =
            entry_bytes(w->p, &w->p->tensors[e->tensor], &e->rule);
        s.reserve = bytes > s.reserve ? bytes : s.reserve;
    }
    if (s.reserve + TVM_MODEL_LEAST > w->p->options.memory_bytes) {
        rc = too_little(w->p, s.reserve + TVM_MODEL_LEAST, err);
        goto out;
    }
    TV_TRY(tvm_sequential_run(&s, err));
    w->use->n_models += s.n_texts;
    w->use->n_tokens += s.n_tokens;
    w->use->random = w->use->random || s.random;
out:
    w->merged = false;
    tv_free(k.texts);
    return rc;
}

/* ---- all ----------------------------------------------------------------- */

void tvm_calibrated_free(struct tvm_calibrated *c)
{
    if (!c)
        return;
    unmap_scratch(c);
    if (c->fd >= 0)
        (void)tv_sys()->close(c->fd);
    tv_free(c->entries);
    tv_free(c->first);
    tv_free(c);
}

enum tv_err tvm_calibrated_make(const struct tvm_plan *p, struct tvm_sink *sink,
                                struct tvm_cache *cache,
                                const struct tvm_run_hooks *hooks,
                                struct tvm_calibration_use *use,
                                struct tv_error *err,
                                struct tvm_calibrated **out)
{
    enum tv_err rc = TV_OK;
    struct tvm_calibrated *c = NULL;
    uint64_t needed = 0;
    uint64_t disk = 0;
    const double t0 = now();
    struct work w = {
        .p = p, .cache = cache, .sink = sink, .hooks = hooks, .use = use};

    *out = NULL;
    if (!tvm_calibrated_wanted(p, &needed, &disk))
        return TV_OK;
    c = tv_calloc(1, sizeof *c);
    if (!c)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    c->fd = -1;
    w.c = c;
    TV_TRY(collect(c, p, cache, use, err));
    TV_TRY(take_over(c, p, sink, use, err));
    mark(c, p, sink);
    /* Before the first second is over, for those who ask how far it is. */
    TV_TRY(tell_journal(&w, true, err));
    /* Tables go with the layers of their model; those that are left, after. */
    for (size_t i = 0; i < 2 * c->n; i++) {
        const struct entry *e = &c->entries[i % c->n];
        if (e->made || e->rule.inputs == TVM_INPUTS_MERGED ||
            (e->rule.counts && i < c->n))
            continue;
        w.model = e->model;
        w.owner = e->owner;
        w.gram = tvm_rule_needs_gram(&e->rule);
        TV_TRY(run_group(&w, err));
    }
    /* What these have made is part of merged blocks, where both occur. */
    TV_TRY(map_scratch(c, err));
    TV_TRY(run_merged(&w, err));
    TV_TRY(map_scratch(c, err));
    TV_TRY(tell_journal(&w, true, err));
    count_damped(c, use);
    use->seconds = now() - t0;
    *out = c;
    c = NULL;
out:
    /* Stopped or failed: the run that goes on has what there is. */
    if (c && w.news && tell_journal(&w, true, NULL) != TV_OK)
        w.news = false;
    tvm_calibrated_free(c);
    return rc;
}

enum tv_err tvm_calibrated_attach(const struct tvm_calibrated *c,
                                  const struct tvm_plan *p, size_t tensor,
                                  struct tvm_cached *to, struct tv_error *err)
{
    const struct tvm_tensor *t = &p->tensors[tensor];

    if (!c || c->first[tensor] == c->first[tensor + 1] ||
        c->entries[c->first[tensor]].rule.gram_only)
        return TV_OK;
    if (to->n == 0) {
        to->src = tv_calloc(t->n_sources, sizeof *to->src);
        to->trim = tv_calloc(t->n_sources, sizeof *to->trim);
        to->n = t->n_sources;
        if (!to->src || !to->trim)
            return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
    }
    for (size_t i = c->first[tensor]; i < c->first[tensor + 1]; i++) {
        const struct entry *e = &c->entries[i];
        struct tvm_cached_source *s = &to->src[e->source];
        if (e->in_scratch) {
            const unsigned char *m = c->map;
            s->fixed_words = (const void *)(m + e->at.words_at);
            if (e->has_values) {
                s->fixed_before = (const void *)(m + e->at.before_at);
                s->fixed_values = (const void *)(m + e->at.values_at);
            }
            to->trim[e->source] = (struct tvm_trim){.known = true};
        }
        if (!to->trim[e->source].known)
            return tv_error_set(err, TV_E_INTERNAL,
                                "%s: the mask that was made is gone from the "
                                "store; run again",
                                t->name);
    }
    return TV_OK;
}

const float *tvm_calibrated_gram(const struct tvm_calibrated *c, size_t tensor,
                                 size_t source, uint64_t *n_rows)
{
    *n_rows = 0;
    for (size_t i = c ? c->first[tensor] : 0; c && i < c->first[tensor + 1];
         i++) {
        const struct entry *e = &c->entries[i];
        if (e->source != source || !e->rule.gram_only || !e->in_scratch)
            continue;
        *n_rows = e->at.n_rows;
        return (const float *)(const void *)(c->map + e->at.words_at);
    }
    return NULL;
}
