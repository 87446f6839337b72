/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache.c - see cache.h.
 *
 * Key of an item: hash of the rule ("magnitude" and a version that changes with
 * the meaning of a mask), density, number of elements, identity of the base's
 * tensor, identity of the donor's and of every adapter on either. Identity is
 * content where a store knows it, else file and place.
 *
 * Task vectors are made when a mask is used that an earlier run has left: a
 * recipe that runs twice is likely to run again, and only then the place of
 * every value is known before the first tile. One that keeps more than half is
 * left alone: reading the donor is as cheap.
 *
 * Memory: what is being made, waits to be written or is written counts against
 * the budget. What finds no room in it is not kept.
 */
#include "cache.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <jansson.h>

#include "calibrated.h"
#include "gather.h"
#include "prune.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/text.h"

#define RULE          "magnitude"
#define RULE_VERSION  1u
#define DELTA_DENSITY 0.5
#define BUDGET_LEAST  ((uint64_t)3 << 20)
#define DIRTY_MAX     ((uint64_t)32 << 20)
#define ENCODE_BYTES  ((uint64_t)5 << 19) /* bitmap and bytes of a chunk */

#define FLUSH_SECONDS 2.0

_Static_assert(TVM_BLOCK % TV_DELTA_BLOCK == 0, "blocks begin at entry points");

/* What a calibrated mask has in place of sums (struct tv_derived). */
enum { NOTE_DAMPING, NOTE_UNSEEN };

struct tvm_cache_entry { /* one source of one tensor that is trimmed */
    size_t tensor, source;
    struct tv_hash score;
    struct tvm_trim_rule rule;
    bool has_mask, has_delta; /* when the run began; calibrated ones: now */
    bool fresh;               /* calibrated: made by this run */
    /* Calibrated, as the store has it: more damping than asked for (-1: none
     * was enough, 0: no more), inputs that were never seen. */
    double damping, n_unseen;
    _Atomic bool used_mask, used_delta;
};

struct item { /* waits for the writer */
    struct item *next;
    struct tvm_cache_entry *entry;
    struct tv_derived_new p;
    void *owned[2];
    uint64_t bytes;
};

struct tvm_cache {
    const struct tvm_plan *plan;
    tv_store *store;
    struct tvm_cache_entry *entries; /* by tensor */
    size_t n;
    size_t *first; /* [n_tensors + 1] into entries */
    uint64_t staging_max, dirty_max;
    bool writable;
    bool held; /* the lock, from call to call */

    pthread_mutex_t mutex;
    uint64_t staged; /* bytes */
    bool broken;     /* a write failed: no more of them */
    struct item *queue;
    uint64_t queued;
    double t_queued;
    struct tvm_cache_use use;
};

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* ---- keys ---------------------------------------------------------------- */

static uint64_t double_bits(double v)
{
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static void add_hash(struct tv_buf *b, struct tv_hash h)
{
    tv_buf_le64(b, h.lo);
    tv_buf_le64(b, h.hi);
}

/* Everything of a change that its effect depends on. */
static enum tv_err add_change(struct tv_buf *b, const struct tv_adapter_use *a,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_adapter_module *m = a->module;
    const struct tv_input_tensor *const of[] = {m->a, m->b, m->magnitude};
    struct tv_hash h;

    for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
        if (!of[i])
            continue;
        tv_buf_le64(b, i);
        TV_TRY(tv_input_tensor_identity(a->from, of[i], &h, err));
        add_hash(b, h);
    }
    tv_buf_le64(b, m->kind);
    tv_buf_le64(b, m->r);
    tv_buf_le64(b, m->n_experts);
    tv_buf_le64(b, m->transposed);
    tv_buf_le64(b, double_bits(m->scaling));
    tv_buf_le64(b, double_bits(a->weight));
    for (size_t i = 0; i < m->n_rows; i++)
        tv_buf_le64(b, m->rows[i]);
out:
    return rc;
}

static enum tv_err add_source(struct tv_buf *b, const struct tvm_plan *p,
                              const struct tvm_source *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_hash h;
    if (s->gather) {
        add_hash(b, s->gather->rows->hash);
        for (size_t i = 0; i < s->gather->n_from; i++)
            TV_TRY(add_source(b, p, &s->gather->from[i], err));
        goto out;
    }
    TV_TRY(tv_input_tensor_identity(p->inputs[s->input].input, s->tensor, &h,
                                    err));
    add_hash(b, h);
    tv_buf_le64(b, s->n_adapters);
    for (size_t i = 0; i < s->n_adapters; i++)
        TV_TRY(add_change(b, &s->adapters[i], err));
out:
    return rc;
}

/* What a calibrated mask depends on beside base and donor. */
static enum tv_err add_rule(struct tv_buf *b, const struct tvm_plan *p,
                            const struct tvm_tensor *t,
                            const struct tvm_cache_entry *e,
                            struct tv_error *err)
{
    const struct tvm_trim_rule *r = &e->rule;

    tv_buf_str(b, r->counts ? "counts" : "calibrated");
    tv_buf_le32(b, TVM_CALIBRATED_VERSION);
    tv_buf_le32(b, (uint32_t)r->score);
    if (r->group > 0) {
        tv_buf_le32(b, r->n_kept);
        tv_buf_le32(b, r->group);
    } else {
        tv_buf_le64(b, double_bits(r->density));
        tv_buf_le32(b, (uint32_t)r->compare);
    }
    tv_buf_le32(b, (uint32_t)r->correct);
    tv_buf_le32(b, r->rescale);
    tv_buf_le64(b, tvm_rule_needs_gram(r) ? double_bits(r->damping) : 0);
    tv_buf_le32(b, r->correct >= TVM_CORRECT_CG ? r->cg_steps : 0);
    return tvm_calibrated_key(p, t, e->source, r, b, err);
}

static enum tv_err score_of(const struct tvm_plan *p,
                            const struct tvm_cache_entry *e,
                            struct tv_hash *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = &p->tensors[e->tensor];
    struct tv_buf b;
    tv_buf_init(&b, 1u << 20);
    if (e->rule.calibrated) {
        TV_TRY(add_rule(&b, p, t, e, err));
    } else {
        tv_buf_str(&b, RULE);
        tv_buf_le32(&b, RULE_VERSION);
        tv_buf_le64(&b, double_bits(e->rule.density));
    }
    tv_buf_le64(&b, t->n_elems);
    TV_TRY(add_source(&b, p, &t->sources[t->base], err));
    TV_TRY(add_source(&b, p, &t->sources[e->source], err));
    TV_TRY(tv_buf_ok(&b, err));
    *out = tv_hash128(b.data, b.n_bytes);
out:
    tv_buf_free(&b);
    return rc;
}

static struct tv_derived_key key_of(const struct tvm_cache *c,
                                    const struct tvm_cache_entry *e,
                                    enum tv_derived_kind kind)
{
    return (struct tv_derived_key){.kind = kind,
                                   .score = e->score,
                                   .tensor = c->plan->tensors[e->tensor].name};
}

/* What people are told of it: owned by the caller. */
static char *about_of(const struct tvm_plan *p, const struct tvm_cache_entry *e)
{
    const struct tvm_tensor *t = &p->tensors[e->tensor];
    const char *base = p->inputs[t->sources[t->base].input].ref;
    const char *donor = p->inputs[t->sources[e->source].input].ref;
    json_t *doc =
        json_pack("{s:s, s:s, s:s, s:f}", "rule", tvm_rule_name(&e->rule),
                  "donor", donor, "base", base, "density", e->rule.density);
    if (doc && e->rule.calibrated &&
        tvm_calibrated_random(p, t, e->source, &e->rule) &&
        json_object_set_new(doc, "random", json_true()) != 0) {
        json_decref(doc);
        doc = NULL;
    }
    char *text = doc ? tv_json_text(doc, JSON_COMPACT) : NULL;
    json_decref(doc);
    return text;
}

/* ---- opening ------------------------------------------------------------- */

static size_t count_entries(const struct tvm_plan *p)
{
    size_t n = 0;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        if (t->action != TVM_MERGE || t->n_elems == 0 || !t->method->trims)
            continue;
        for (size_t s = 0; s < t->n_sources; s++) {
            struct tvm_trim_rule rule;
            n += t->method->trims(t, s, &rule);
        }
    }
    return n;
}

static enum tv_err fill_entries(struct tvm_cache *c, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = c->plan;
    size_t n = 0;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        c->first[i] = n;
        if (t->action != TVM_MERGE || t->n_elems == 0 || !t->method->trims)
            continue;
        for (size_t s = 0; s < t->n_sources; s++) {
            struct tvm_cache_entry *e = &c->entries[n];
            if (!t->method->trims(t, s, &e->rule))
                continue;
            e->tensor = i;
            e->source = s;
            TV_TRY(score_of(p, e, &e->score, err));
            n++;
        }
    }
    c->first[p->n_tensors] = n;
out:
    return rc;
}

/* A merge into a directory only reads the store, and readers never wait: where
 * another process is writing, nothing is pinned, noted or kept. A merge into
 * the store holds the lock already. */
static bool may_write(struct tvm_cache *c)
{
    return c->writable &&
           (c->held || c->plan->options.into ||
            tv_store_lock(c->store, "tvmerge run", 0, NULL) == TV_OK);
}

static void has_written(struct tvm_cache *c)
{
    if (!c->held && !c->plan->options.into)
        tv_store_unlock(c->store);
}

bool tvm_cache_hold(struct tvm_cache *c, bool on)
{
    if (!c)
        return false;
    if (on) {
        c->held = may_write(c);
        return c->held;
    }
    const bool held = c->held;
    c->held = false;
    if (held)
        has_written(c);
    return true;
}

static enum tv_err look_up(struct tvm_cache *c, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    struct tv_derived d;
    struct tv_derived_key *pins = tv_calloc(2 * c->n + 1, sizeof *pins);
    size_t n_pins = 0;
    if (!pins)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    TV_TRY(tv_read_begin(c->store, err, &r));
    for (size_t i = 0; i < c->n; i++) {
        struct tvm_cache_entry *e = &c->entries[i];
        const struct tv_derived_key mask = key_of(c, e, TV_MASK);
        const struct tv_derived_key delta = key_of(c, e, TV_DELTA);
        TV_TRY(tv_derived_find(r, &mask, &e->has_mask, &d, err));
        e->has_mask = e->has_mask && (!e->rule.needs_sums || d.has_sums);
        if (!e->has_mask)
            continue;
        pins[n_pins++] = mask;
        if (e->rule.calibrated && !d.has_sums) {
            const double damping = d.notes[NOTE_DAMPING];
            const double unseen = d.notes[NOTE_UNSEEN];
            e->damping = isfinite(damping) ? damping : 0;
            e->n_unseen = unseen >= 0 && unseen < 1e15 ? unseen : 0;
        }
        TV_TRY(tv_derived_find(r, &delta, &e->has_delta, &d, err));
        if (e->has_delta)
            pins[n_pins++] = delta;
    }
    tv_read_end(r);
    r = NULL;
    if (n_pins == 0 || !may_write(c))
        goto out;
    rc = tv_derived_pin(c->store, pins, n_pins, err);
    has_written(c);
    if (rc == TV_E_NOSPACE) { /* they may go: so be it */
        tv_error_clear(err);
        rc = TV_OK;
    }
out:
    tv_read_end(r);
    tv_free(pins);
    return rc;
}

static void cache_free(struct tvm_cache *c)
{
    if (!c)
        return;
    (void)pthread_mutex_destroy(&c->mutex);
    tv_free(c->entries);
    tv_free(c->first);
    tv_free(c);
}

enum tv_err tvm_cache_open(const struct tvm_plan *p, uint64_t budget,
                           struct tv_error *err, struct tvm_cache **out)
{
    enum tv_err rc = TV_OK;
    struct tvm_cache *c = NULL;
    *out = NULL;
    if (!p->options.store || p->options.no_cache)
        return TV_OK;
    const size_t n = count_entries(p);
    const uint64_t own = n * (sizeof(struct tvm_cache_entry) +
                              2 * sizeof(struct tv_derived_key)) +
                         p->n_tensors * sizeof(size_t) + sizeof *c;
    if (n == 0 || budget < BUDGET_LEAST || own > budget / 4)
        return TV_OK;
    c = tv_calloc(1, sizeof *c);
    if (!c)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    (void)pthread_mutex_init(&c->mutex, NULL);
    c->plan = p;
    c->store = p->options.store;
    c->n = n;
    c->dirty_max = budget / 4 < DIRTY_MAX ? budget / 4 : DIRTY_MAX;
    c->staging_max = budget - own - c->dirty_max;
    c->staging_max -=
        c->staging_max / 2 < ENCODE_BYTES ? c->staging_max / 2 : ENCODE_BYTES;
    c->writable = !tv_store_is_read_only(c->store);
    c->entries = tv_calloc(n + 1, sizeof *c->entries);
    c->first = tv_calloc(p->n_tensors + 1, sizeof *c->first);
    if (!c->entries || !c->first) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(fill_entries(c, err));
    TV_TRY(look_up(c, err));
    *out = c;
    c = NULL;
out:
    cache_free(c);
    return rc;
}

static void item_free(struct item *it)
{
    tv_free(it->owned[0]);
    tv_free(it->owned[1]);
    tv_free((void *)(uintptr_t)it->p.about);
    tv_free(it);
}

void tvm_cache_close(struct tvm_cache *c, bool write)
{
    if (!c)
        return;
    struct tv_derived_key *keys = tv_calloc(2 * c->n + 1, sizeof *keys);
    size_t n = 0;
    for (size_t i = 0; keys && i < c->n; i++) {
        /* The mask last: it must not go before its task vector. */
        if (c->entries[i].used_delta)
            keys[n++] = key_of(c, &c->entries[i], TV_DELTA);
        if (c->entries[i].used_mask)
            keys[n++] = key_of(c, &c->entries[i], TV_MASK);
    }
    if (write && keys && may_write(c)) {
        /* When it fails: the pins end with this process. */
        if (tv_derived_release(c->store, keys, n, NULL) != TV_OK)
            c->broken = true;
        has_written(c);
    }
    tv_free(keys);
    while (c->queue) {
        struct item *it = c->queue;
        c->queue = it->next;
        item_free(it);
    }
    cache_free(c);
}

void tvm_cache_stats(struct tvm_cache *c, struct tvm_cache_use *out)
{
    *out = (struct tvm_cache_use){.masks_used = 0};
    if (c)
        *out = c->use;
}

/* ---- tensors ------------------------------------------------------------- */

/* Takes bytes of the budget, if there are so many left. */
static bool take(struct tvm_cache *c, struct tvm_cached *t, uint64_t bytes)
{
    (void)pthread_mutex_lock(&c->mutex);
    const bool ok = !c->broken && c->staged <= c->staging_max &&
                    bytes <= c->staging_max - c->staged;
    if (ok)
        c->staged += bytes;
    (void)pthread_mutex_unlock(&c->mutex);
    if (ok)
        t->bytes += bytes;
    return ok;
}

static void give(struct tvm_cache *c, uint64_t bytes)
{
    (void)pthread_mutex_lock(&c->mutex);
    c->staged -= bytes;
    (void)pthread_mutex_unlock(&c->mutex);
}

static uint64_t words_bytes(uint64_t n_elems)
{
    return (n_elems + 63) / 64 * sizeof(uint64_t);
}

static uint64_t n_blocks(uint64_t n_elems)
{
    return (n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
}

/* Makes room for a task vector whose mask is known. */
static void prepare_values(struct tvm_cache *c, const struct tvm_tensor *t,
                           struct tvm_cached *out, size_t source)
{
    struct tvm_cached_source *s = &out->src[source];
    const struct tvm_source *from = &t->sources[source];
    const uint64_t blocks = n_blocks(t->n_elems);
    uint64_t scratch[TV_DELTA_BLOCK / 64];
    uint64_t count = 0;
    /* With adapters, or means for rows, the donor's values are nobody's stored
     * values. */
    s->dtype =
        from->n_adapters > 0 || from->gather ? TV_F32 : from->tensor->dtype;
    const uint64_t value_bytes =
        tv_mask_set(s->mask) * (tv_dtype_bits(s->dtype) / 8u);
    const uint64_t before_bytes = (blocks + 1) * sizeof *s->before;
    if (!take(c, out, value_bytes + before_bytes))
        return;
    s->values = tv_alloc((size_t)value_bytes + 1);
    s->before = tv_alloc((size_t)before_bytes);
    if (!s->values || !s->before) {
        tv_free(s->values);
        tv_free(s->before);
        s->values = NULL;
        s->before = NULL;
        return;
    }
    for (uint64_t b = 0; b < blocks; b++) {
        const uint64_t first = b * TV_DELTA_BLOCK;
        const uint64_t left = t->n_elems - first;
        const uint32_t n =
            left < TV_DELTA_BLOCK ? (uint32_t)left : TV_DELTA_BLOCK;
        const uint64_t *w = tv_mask_words(s->mask, first, n, scratch);
        s->before[b] = count;
        for (uint32_t i = 0; i < (n + 63) / 64; i++)
            count += (uint64_t)__builtin_popcountll(w[i]);
    }
    s->before[blocks] = count;
}

static enum tv_err begin_known(struct tvm_cache *c, struct tvm_cached *out,
                               const struct tvm_tensor *t, size_t source,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_cached_source *s = &out->src[source];
    struct tvm_cache_entry *e = s->entry;
    struct tv_derived d;
    bool found = false;
    /* A calibrated mask is not to be had otherwise. */
    if (!e->rule.calibrated && !take(c, out, tv_mask_open_bytes(t->n_elems)))
        goto out;
    const struct tv_derived_key mask = key_of(c, e, TV_MASK);
    TV_TRY(tv_derived_find(out->read, &mask, &found, &d, err));
    if (!found || d.n_elems != t->n_elems ||
        (e->rule.needs_sums && !d.has_sums))
        goto out;
    TV_TRY(tv_mask_open(out->read, e->score, t->name, &found, err, &s->mask));
    out->trim[source] = (struct tvm_trim){.known = true,
                                          .has_sums = d.has_sums,
                                          .sum_all = d.sum_all,
                                          .sum_kept = d.sum_kept};
    const struct tv_derived_key delta = key_of(c, e, TV_DELTA);
    TV_TRY(tv_derived_find(out->read, &delta, &found, &d, err));
    if (found && d.n_elems == t->n_elems && tv_dtype_is_math(d.dtype)) {
        TV_TRY(tv_delta_open(out->read, e->score, t->name, &found, err,
                             &s->delta));
        atomic_store(&s->n_nonfinite, d.n_nonfinite);
    } else if (tvm_rule_makes_values(&e->rule)) {
        tv_mask_close(s->mask); /* useless without its values */
        s->mask = NULL;
        out->trim[source].known = false;
    } else if (c->writable && !found && !e->fresh &&
               e->rule.density <= DELTA_DENSITY) {
        prepare_values(c, t, out, source);
    }
out:
    return rc;
}

/* Makes room for a mask in the making. */
static void prepare_mask(struct tvm_cache *c, const struct tvm_tensor *t,
                         struct tvm_cached *out, size_t source)
{
    const uint64_t bytes = words_bytes(t->n_elems);
    if (c->writable && take(c, out, bytes))
        out->src[source].words = tv_calloc(1, (size_t)bytes);
}

enum tv_err tvm_cached_begin(struct tvm_cache *c, size_t tensor,
                             struct tvm_cached *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    *out = (struct tvm_cached){.n = 0};
    if (!c || c->first[tensor] == c->first[tensor + 1])
        return TV_OK;
    const struct tvm_tensor *t = &c->plan->tensors[tensor];
    out->src = tv_calloc(t->n_sources, sizeof *out->src);
    out->trim = tv_calloc(t->n_sources, sizeof *out->trim);
    if (!out->src || !out->trim) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
        goto out;
    }
    out->n = t->n_sources;
    TV_TRY(tv_read_begin(c->store, err, &out->read));
    for (size_t i = c->first[tensor]; i < c->first[tensor + 1]; i++) {
        struct tvm_cache_entry *e = &c->entries[i];
        out->src[e->source].entry = e;
        if (e->has_mask)
            TV_TRY(begin_known(c, out, t, e->source, err));
        if (!out->src[e->source].mask && !e->rule.calibrated)
            prepare_mask(c, t, out, e->source);
    }
out:
    if (rc != TV_OK) {
        tv_error_context(err, "%s", t->name);
        tvm_cached_end(c, tensor, out, false);
    }
    return rc;
}

/* Hands what was made over to the queue, or drops it. */
static void queue_item(struct tvm_cache *c, struct tvm_cache_entry *e,
                       struct tvm_cached *t, struct tv_derived_new p, void *a,
                       void *b, uint64_t bytes)
{
    struct item *it = tv_calloc(1, sizeof *it);
    char *about = about_of(c->plan, e);
    if (!it || !about) {
        tv_free(it);
        tv_free(about);
        tv_free(a);
        tv_free(b);
        return;
    }
    p.about = about;
    *it = (struct item){.entry = e, .p = p, .owned = {a, b}, .bytes = bytes};
    t->bytes -= bytes; /* goes on counting, for the queue */
    (void)pthread_mutex_lock(&c->mutex);
    if (!c->queue)
        c->t_queued = now();
    it->next = c->queue;
    c->queue = it;
    c->queued += bytes;
    (void)pthread_mutex_unlock(&c->mutex);
}

static void end_source(struct tvm_cache *c, size_t tensor, struct tvm_cached *t,
                       size_t source, bool done)
{
    struct tvm_cached_source *s = &t->src[source];
    const struct tvm_tensor *pt = &c->plan->tensors[tensor];
    struct tv_derived_new p = {.n_elems = pt->n_elems};
    if (done && s->mask) {
        atomic_store(&s->entry->used_mask, true);
        if (s->delta)
            atomic_store(&s->entry->used_delta, true);
        (void)pthread_mutex_lock(&c->mutex);
        c->use.masks_used++;
        c->use.task_vectors_used += s->delta != NULL;
        (void)pthread_mutex_unlock(&c->mutex);
    }
    if (done && s->words) {
        p.key = key_of(c, s->entry, TV_MASK);
        p.words = s->words;
        p.has_sums = t->trim[source].has_sums;
        p.sum_all = t->trim[source].sum_all;
        p.sum_kept = t->trim[source].sum_kept;
        queue_item(c, s->entry, t, p, s->words, NULL, words_bytes(pt->n_elems));
        s->words = NULL;
    }
    if (done && s->values) {
        const uint64_t bytes =
            tv_mask_set(s->mask) * (tv_dtype_bits(s->dtype) / 8u) +
            (n_blocks(pt->n_elems) + 1) * sizeof *s->before;
        p.key = key_of(c, s->entry, TV_DELTA);
        p.dtype = s->dtype;
        p.values = s->values;
        p.before = s->before;
        p.n_nonfinite = atomic_load(&s->n_nonfinite);
        queue_item(c, s->entry, t, p, s->values, s->before, bytes);
        s->values = NULL;
        s->before = NULL;
    }
    tv_free(s->words);
    tv_free(s->values);
    tv_free(s->before);
    tv_delta_close(s->delta);
    tv_mask_close(s->mask);
}

void tvm_cached_end(struct tvm_cache *c, size_t tensor, struct tvm_cached *t,
                    bool done)
{
    for (size_t i = 0; c && i < t->n; i++)
        if (t->src[i].entry)
            end_source(c, tensor, t, i, done);
    tv_read_end(t->read);
    tv_free(t->src);
    tv_free(t->trim);
    if (c)
        give(c, t->bytes);
    *t = (struct tvm_cached){.n = 0};
}

/* ---- tiles --------------------------------------------------------------- */

const uint64_t *tvm_cached_mask(const struct tvm_cached *t, size_t source,
                                uint64_t start, size_t n, uint64_t *scratch)
{
    if (t->n == 0)
        return NULL;
    if (t->src[source].fixed_words)
        return t->src[source].fixed_words + start / 64;
    if (!t->src[source].mask)
        return NULL;
    return tv_mask_words(t->src[source].mask, start, (uint32_t)n, scratch);
}

size_t tvm_cached_expand(const struct tvm_cached *t, size_t source,
                         const struct tvk_table *k, uint64_t start, size_t n,
                         const uint64_t *mask, float *packed, float *dst)
{
    const struct tvm_cached_source *s = &t->src[source];
    const tv_delta *d = s->delta;
    const enum tv_dtype dtype = s->fixed_values ? TV_F32 : tv_delta_dtype(d);
    size_t n_values = 0;
    size_t at = 0;
    const void *values = NULL;
    if (s->fixed_values) {
        const uint64_t first = start / TV_DELTA_BLOCK;
        const uint64_t last = (start + n + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
        values = s->fixed_values + s->fixed_before[first];
        n_values = (size_t)(s->fixed_before[last] - s->fixed_before[first]);
    } else {
        values = tv_delta_values(d, start, n, &n_values);
    }
    tvk_to_f32(k, dtype, packed, values, n_values);
    memset(dst, 0, n * sizeof *dst);
    for (size_t i = 0; i < (n + 63) / 64; i++)
        for (uint64_t w = mask[i]; w != 0 && at < n_values; w &= w - 1)
            dst[i * 64 + (size_t)__builtin_ctzll(w)] = packed[at++];
    return n_values * (tv_dtype_bits(dtype) / 8u);
}

void tvm_cached_keep_mask(struct tvm_cached *t, size_t source, uint64_t start,
                          size_t n, const uint64_t *made)
{
    if (t->n == 0 || !t->src[source].words || !made)
        return;
    memcpy(t->src[source].words + start / 64, made,
           (n + 63) / 64 * sizeof *made);
}

void tvm_cached_keep_values(struct tvm_cached *t, size_t source,
                            const struct tvk_table *k, uint64_t start, size_t n,
                            const uint64_t *mask, const float *x, float *packed)
{
    if (t->n == 0 || !t->src[source].values)
        return;
    struct tvm_cached_source *s = &t->src[source];
    const size_t each = tv_dtype_bits(s->dtype) / 8u;
    const uint64_t from = s->before[start / TV_DELTA_BLOCK];
    size_t at = 0;
    for (size_t i = 0; i < (n + 63) / 64; i++)
        for (uint64_t w = mask[i]; w != 0; w &= w - 1)
            packed[at++] = x[i * 64 + (size_t)__builtin_ctzll(w)];
    tvk_from_f32(k, s->dtype, s->values + from * each, packed, at);
}

/* ---- writing ------------------------------------------------------------- */

static void count_stored(struct tvm_cache *c, const struct tv_derived_new *p)
{
    if (!p->stored)
        return;
    if (p->key.kind == TV_MASK)
        c->use.masks_stored++;
    else
        c->use.task_vectors_stored++;
}

static struct tvm_cache_entry *entry_of(struct tvm_cache *c, size_t tensor,
                                        size_t source)
{
    for (size_t i = c ? c->first[tensor] : 0; c && i < c->first[tensor + 1];
         i++)
        if (c->entries[i].source == source)
            return &c->entries[i];
    return NULL;
}

bool tvm_cache_has(struct tvm_cache *c, size_t tensor, size_t source)
{
    const struct tvm_cache_entry *e = entry_of(c, tensor, source);
    return e && e->has_mask &&
           (e->has_delta || !tvm_rule_makes_values(&e->rule));
}

bool tvm_cache_damped(struct tvm_cache *c, size_t tensor, size_t source,
                      struct tvm_damped *out)
{
    const struct tvm_cache_entry *e = entry_of(c, tensor, source);

    if (!e || !e->has_mask || e->damping == 0 || e->rule.damping <= 0)
        return false;
    *out = (struct tvm_damped){
        .damping = e->damping > 0 ? e->damping : 0,
        .n_raised = e->damping > 0
                        ? (size_t)lround(log10(e->damping / e->rule.damping))
                        : TVM_LADDER_MAX,
        .n_unseen = (size_t)e->n_unseen};
    return true;
}

bool tvm_cache_add(struct tvm_cache *c, size_t tensor, size_t source,
                   const uint64_t *words, const float *values,
                   const uint64_t *before, const struct tvm_damped *damped,
                   uint64_t keep_free)
{
    struct tvm_cache_entry *e = entry_of(c, tensor, source);
    const uint64_t n_elems = e ? c->plan->tensors[tensor].n_elems : 0;
    const size_t n = values ? 2 : 1;
    struct tv_derived_new items[2];
    struct tv_derived_key keys[2];
    char *about = NULL;
    bool stored = false;

    if (!e || c->broken || !may_write(c))
        return false;
    about = about_of(c->plan, e);
    keys[0] = key_of(c, e, TV_MASK);
    keys[1] = key_of(c, e, TV_DELTA);
    items[0] = (struct tv_derived_new){
        .key = keys[0],
        .about = about,
        .n_elems = n_elems,
        .words = words,
    };
    if (damped) {
        items[0].notes[NOTE_DAMPING] =
            damped->damping > 0 ? damped->damping : -1;
        items[0].notes[NOTE_UNSEEN] = (double)damped->n_unseen;
    }
    items[1] = (struct tv_derived_new){.key = keys[1],
                                       .about = about,
                                       .n_elems = n_elems,
                                       .dtype = TV_F32,
                                       .values = values,
                                       .before = before};
    if (about &&
        tv_derived_store(c->store, items, n, c->dirty_max, keep_free, NULL) ==
            TV_OK &&
        items[0].stored && (n == 1 || items[1].stored))
        stored = tv_derived_pin(c->store, keys, n, NULL) == TV_OK;
    for (size_t i = 0; i < n; i++)
        if (about)
            count_stored(c, &items[i]);
    if (stored) {
        e->has_mask = true;
        e->has_delta = values != NULL;
        e->fresh = true;
    }
    has_written(c);
    tv_free(about);
    return stored;
}

bool tvm_cache_pending(struct tvm_cache *c, bool all)
{
    if (!c)
        return false;
    (void)pthread_mutex_lock(&c->mutex);
    const bool yes = c->queue && (all || c->queued >= c->staging_max / 4 ||
                                  now() - c->t_queued >= FLUSH_SECONDS);
    (void)pthread_mutex_unlock(&c->mutex);
    return yes;
}

void tvm_cache_flush(struct tvm_cache *c, uint64_t keep_free)
{
    struct item *list = NULL;
    struct tv_derived_new *all = NULL;
    size_t n = 0;
    (void)pthread_mutex_lock(&c->mutex);
    /* Last in, first out: turned round, masks come in the order of tensors. */
    while (c->queue) {
        struct item *it = c->queue;
        c->queue = it->next;
        it->next = list;
        list = it;
        n++;
    }
    c->queued = 0;
    const bool broken = c->broken;
    (void)pthread_mutex_unlock(&c->mutex);
    if (!broken && n > 0)
        all = tv_calloc(n, sizeof *all);
    if (all && may_write(c)) {
        size_t i = 0;
        for (const struct item *it = list; it; it = it->next)
            all[i++] = it->p;
        const enum tv_err rc =
            tv_derived_store(c->store, all, n, c->dirty_max, keep_free, NULL);
        (void)pthread_mutex_lock(&c->mutex);
        c->broken = c->broken || rc != TV_OK;
        for (i = 0; i < n; i++)
            count_stored(c, &all[i]);
        (void)pthread_mutex_unlock(&c->mutex);
        has_written(c);
    }
    tv_free(all);
    while (list) {
        struct item *it = list;
        list = it->next;
        give(c, it->bytes);
        item_free(it);
    }
}
