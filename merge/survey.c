/* SPDX-License-Identifier: Apache-2.0 */
/*
 * survey.c - see survey.h.
 *
 * Populations are worked through in output order, so what is held at any time
 * is the state of one. Inputs are read through the same readers, in the same
 * blocks, as by exec.c: both see the same numbers. Nothing is verified or
 * counted here, the merge reads everything again and does that.
 */
#include "survey.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "method.h"
#include "source.h"
#include "tv/alloc.h"
#include "tv/pool.h"

#define TILE_ELEMS ((uint64_t)16 * TVK_LEAF)

struct member { /* a tensor and its population */
    size_t tensor;
    enum tvm_reach reach;
    const char *key; /* the first n_key bytes name it */
    size_t n_key;
};

struct tvm_survey {
    struct tvm_plan *plan;
    struct tvm_cut *cuts;
    const struct tvk_table *k;
    const struct tvm_run_hooks *hooks;
    struct member *members; /* population by population */
    size_t n_members;
    size_t *tensors; /* the same, indices only */
    unsigned n_workers;
    size_t src_floats, l_floats; /* of a worker */
    float *scratch;              /* [n_workers] of both */
    struct tvm_reader *readers;  /* [most sources] */
    void *state;
    tv_pool *pool;
    /* Of the tensor being read: */
    struct tvm_group *group;
    size_t at;
    const bool *wanted;
    atomic_bool stop;
};

/* ---- populations --------------------------------------------------------- */

static bool is_member(const struct tvm_tensor *t)
{
    return t->action == TVM_MERGE && t->n_elems > 0 &&
           t->method->reach != NULL && t->method->reach(t) != TVM_REACH_TENSOR;
}

/* The name up to its layer number: what all tensors of a layer share. */
static size_t layer_prefix(const struct tvm_tensor *t)
{
    const char *at = t->name;

    while (t->layer >= 0 && *at != '\0') {
        char *end = NULL;
        const bool digit = *at >= '0' && *at <= '9';
        if (digit && strtoll(at, &end, 10) == (long long)t->layer &&
            (*end == '.' || *end == '\0'))
            return (size_t)(end - t->name);
        at += strcspn(at, ".");
        at += *at == '.';
    }
    return strlen(t->name);
}

static int member_compare(const void *a, const void *b)
{
    const struct member *const x = a;
    const struct member *const y = b;
    const size_t n = x->n_key < y->n_key ? x->n_key : y->n_key;
    const int c = memcmp(x->key, y->key, n);

    if (x->reach != y->reach)
        return x->reach < y->reach ? -1 : 1;
    if (c != 0)
        return c;
    if (x->n_key != y->n_key)
        return x->n_key < y->n_key ? -1 : 1;
    return x->tensor < y->tensor ? -1 : x->tensor > y->tensor;
}

static bool same_population(const struct member *a, const struct member *b)
{
    return a->reach == b->reach && a->n_key == b->n_key &&
           memcmp(a->key, b->key, a->n_key) == 0;
}

/* members [n_tensors]; returns how many there are. */
static size_t find_members(const struct tvm_plan *p, struct member *members)
{
    size_t n = 0;

    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        if (!is_member(t))
            continue;
        struct member m = {i, t->method->reach(t), t->name, 0};
        if (m.reach == TVM_REACH_LAYER)
            m.n_key = layer_prefix(t);
        members[n++] = m;
    }
    qsort(members, n, sizeof *members, member_compare);
    return n;
}

static size_t population_end(const struct member *m, size_t from, size_t n)
{
    size_t end = from + 1;
    while (end < n && same_population(&m[from], &m[end]))
        end++;
    return end;
}

static uint64_t leaves_of(const struct tvm_tensor *t)
{
    return t->n_elems / TVK_LEAF + (t->n_elems % TVK_LEAF != 0);
}

static struct tvm_group group_of(const struct tvm_plan *p,
                                 const struct member *m, size_t n,
                                 const size_t *tensors, unsigned n_workers)
{
    struct tvm_group g = {.plan = p, .tensors = tensors, .n = n};

    g.n_workers = n_workers;
    for (size_t i = 0; i < n; i++) {
        const uint64_t leaves = leaves_of(&p->tensors[m[i].tensor]);
        if (leaves > g.most_leaves)
            g.most_leaves = leaves;
    }
    return g;
}

/* ---- memory -------------------------------------------------------------- */

static void worker_floats(const struct tvm_plan *p, const struct member *m,
                          size_t n, size_t *src, size_t *l)
{
    size_t most = 1;

    *l = 0;
    for (size_t i = 0; i < n; i++) {
        const struct tvm_tensor *t = &p->tensors[m[i].tensor];
        if (t->n_sources > most)
            most = t->n_sources;
        for (size_t s = 0; s < t->n_sources; s++) {
            const size_t floats = tvm_source_l_floats(t, s);
            if (floats > *l)
                *l = floats;
        }
    }
    *src = most * TVM_BLOCK;
    *l = (*l + 15) / 16 * 16;
}

static size_t most_state(const struct tvm_plan *p, const struct member *m,
                         size_t n, const size_t *tensors, unsigned n_workers)
{
    size_t most = 1;

    for (size_t at = 0, end = 0; at < n; at = end) {
        end = population_end(m, at, n);
        const struct tvm_group g =
            group_of(p, &m[at], end - at, tensors + at, n_workers);
        const size_t bytes =
            p->tensors[m[at].tensor].method->surveyor->bytes(&g);
        if (bytes > most)
            most = bytes;
    }
    return most;
}

static uint64_t most_readers(const struct tvm_plan *p, const struct member *m,
                             size_t n)
{
    uint64_t most = 0;

    for (size_t i = 0; i < n; i++) {
        const struct tvm_tensor *t = &p->tensors[m[i].tensor];
        uint64_t bytes = t->n_sources * sizeof(struct tvm_reader);
        for (size_t s = 0; s < t->n_sources; s++)
            bytes += tvm_source_bytes(t, s);
        if (bytes > most)
            most = bytes;
    }
    return most;
}

/* The most workers that fit, at least one; *total is what they take. */
static unsigned choose_workers(const struct tvm_plan *p, const struct member *m,
                               size_t n, const size_t *tensors, uint64_t budget,
                               uint64_t *total)
{
    unsigned workers =
        p->options.threads > 0 ? p->options.threads : tv_cpu_count();
    size_t src = 0;
    size_t l = 0;

    worker_floats(p, m, n, &src, &l);
    const uint64_t readers = most_readers(p, m, n);
    for (;;) {
        *total = readers + most_state(p, m, n, tensors, workers) +
                 (uint64_t)workers * (src + l) * sizeof(float) + (64u << 10);
        if (*total <= budget || workers == 1)
            return workers;
        workers--;
    }
}

static size_t *indices_of(const struct member *m, size_t n)
{
    size_t *const all = tv_calloc(n + 1, sizeof *all);
    for (size_t i = 0; all != NULL && i < n; i++)
        all[i] = m[i].tensor;
    return all;
}

uint64_t tvm_survey_scratch(const struct tvm_plan *p, bool *fits,
                            uint64_t *needed)
{
    struct member *const members = tv_calloc(p->n_tensors + 1, sizeof *members);
    size_t *tensors = NULL;
    uint64_t total = 0;

    *fits = true;
    *needed = 0;
    /* Without room for this list a run will say so. */
    const size_t n = members == NULL ? 0 : find_members(p, members);
    if (n > 0 && (tensors = indices_of(members, n)) != NULL) {
        (void)choose_workers(p, members, n, tensors, 0, needed);
        (void)choose_workers(p, members, n, tensors, p->options.memory_bytes,
                             &total);
        *fits = total <= p->options.memory_bytes;
    }
    tv_free(tensors);
    tv_free(members);
    return total;
}

/* ---- passes -------------------------------------------------------------- */

static bool cancelled(const struct tvm_survey *s)
{
    return s->hooks != NULL && s->hooks->cancel != NULL &&
           *s->hooks->cancel != 0;
}

static const struct tvm_tensor *tensor_at(const struct tvm_survey *s)
{
    return &s->plan->tensors[s->group->tensors[s->at]];
}

static void run_tile(void *arg, size_t item, unsigned worker)
{
    struct tvm_survey *const s = arg;
    const struct tvm_tensor *t = tensor_at(s);
    float *const src =
        s->scratch + (size_t)worker * (s->src_floats + s->l_floats);
    float *const l = src + s->src_floats;
    const uint64_t first = (uint64_t)item * TILE_ELEMS;
    const uint64_t end =
        t->n_elems - first < TILE_ELEMS ? t->n_elems : first + TILE_ELEMS;
    const float *x[TVK_DONORS_MAX + 1];

    if (atomic_load(&s->stop))
        return;
    if (cancelled(s))
        atomic_store(&s->stop, true);
    for (uint64_t at = first; at < end; at += TVM_BLOCK) {
        const size_t n = end - at < TVM_BLOCK ? (size_t)(end - at) : TVM_BLOCK;
        for (size_t i = 0; i < t->n_sources; i++)
            x[i] = s->wanted[i] ? tvm_reader_block(&s->readers[i], s->k, at, n,
                                                   src + i * TVM_BLOCK, l, NULL)
                                : NULL;
        t->method->surveyor->measure(s->group, s->at, at, worker, x, n);
    }
}

static enum tv_err run_tensor(struct tvm_survey *s, struct tv_error *err)
{
    const struct tvm_tensor *t = tensor_at(s);
    const struct tvm_surveyor *by = t->method->surveyor;
    bool wanted[TVK_DONORS_MAX + 1] = {false};
    bool any = false;
    size_t n_open = 0;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < t->n_sources; i++) {
        wanted[i] = (int)i != t->base && by->wants(s->group, t, i);
        any = any || wanted[i];
    }
    if (!any)
        goto out;
    if (t->base >= 0)
        wanted[t->base] = true;
    memset(s->readers, 0, t->n_sources * sizeof *s->readers);
    for (size_t i = 0; i < t->n_sources; i++) {
        n_open = i + 1;
        if (wanted[i])
            TV_TRY(tvm_reader_open(&s->readers[i], s->plan, t, i, s->k,
                                   s->plan->options.verify_reads, err));
    }
    s->wanted = wanted;
    tv_pool_run(
        s->pool,
        (size_t)(t->n_elems / TILE_ELEMS + (t->n_elems % TILE_ELEMS != 0)),
        run_tile, s);
    if (atomic_load(&s->stop))
        TV_TRY(tv_error_set(err, TV_E_INTERRUPTED, "interrupted"));
    if (by->end_tensor != NULL)
        by->end_tensor(s->group, s->at);
out:
    for (size_t i = 0; i < n_open; i++)
        if (wanted[i])
            tvm_reader_close(&s->readers[i]);
    s->wanted = NULL;
    return rc;
}

static enum tv_err run_group(struct tvm_survey *s, struct tvm_group *g,
                             struct tvm_cut *cuts, struct tv_error *err)
{
    struct tvm_plan *const p = s->plan;
    const struct tvm_surveyor *by = p->tensors[g->tensors[0]].method->surveyor;
    enum tv_err rc = TV_OK;

    g->k = s->k;
    g->state = s->state;
    memset(s->state, 0, by->bytes(g));
    s->group = g;
    for (g->phase = 0; by->next(g); g->phase++)
        for (s->at = 0; s->at < g->n; s->at++)
            TV_TRY(run_tensor(s, err));
    for (size_t i = 0; i < g->n; i++) {
        struct tvm_tensor *t = &p->tensors[g->tensors[i]];
        by->give(g, i, cuts);
        t->cuts = cuts;
        cuts += t->n_sources;
    }
out:
    s->group = NULL;
    return rc;
}

static bool all_done(const struct tvm_tensor_done *done, const struct member *m,
                     size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!done || !done[m[i].tensor].done)
            return false;
    return true;
}

static enum tv_err set_up(struct tvm_survey *s, struct tv_error *err)
{
    const struct tvm_plan *p = s->plan;
    size_t most = 1;
    size_t n_cuts = 0;
    uint64_t total = 0;

    for (size_t i = 0; i < s->n_members; i++) {
        const struct tvm_tensor *t = &p->tensors[s->members[i].tensor];
        n_cuts += t->n_sources;
        if (t->n_sources > most)
            most = t->n_sources;
    }
    s->tensors = indices_of(s->members, s->n_members);
    if (s->tensors == NULL)
        goto no_memory;
    s->n_workers = choose_workers(p, s->members, s->n_members, s->tensors,
                                  p->options.memory_bytes, &total);
    worker_floats(p, s->members, s->n_members, &s->src_floats, &s->l_floats);
    s->cuts = tv_calloc(n_cuts, sizeof *s->cuts);
    s->readers = tv_calloc(most, sizeof *s->readers);
    s->scratch = tv_alloc_aligned(
        (size_t)s->n_workers * (s->src_floats + s->l_floats) * sizeof(float));
    s->state = tv_alloc_aligned(
        most_state(p, s->members, s->n_members, s->tensors, s->n_workers));
    if (s->cuts && s->readers && s->scratch && s->state)
        return tv_pool_open(s->n_workers, err, &s->pool);
no_memory:
    return tv_error_set(err, TV_E_NOMEM,
                        "out of memory for looking at several tensors");
}

static void drop_scratch(struct tvm_survey *s)
{
    tv_pool_close(s->pool);
    tv_free(s->state);
    tv_free(s->scratch);
    tv_free(s->readers);
    s->pool = NULL;
    s->state = NULL;
    s->scratch = NULL;
    s->readers = NULL;
}

enum tv_err tvm_survey_run(struct tvm_plan *p,
                           const struct tvm_tensor_done *done,
                           const struct tvm_run_hooks *hooks,
                           struct tv_error *err, struct tvm_survey **out)
{
    struct tvm_survey *s = NULL;
    struct tvm_cut *cuts = NULL;
    enum tv_err rc = TV_OK;

    *out = NULL;
    s = tv_calloc(1, sizeof *s);
    if (s == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    s->plan = p;
    s->hooks = hooks;
    s->k = p->options.kernels ? p->options.kernels : tvk_table_best();
    atomic_init(&s->stop, false);
    s->members = tv_calloc(p->n_tensors + 1, sizeof *s->members);
    if (s->members == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    s->n_members = find_members(p, s->members);
    if (all_done(done, s->members, s->n_members))
        goto out;
    TV_TRY(set_up(s, err));
    cuts = s->cuts;
    for (size_t at = 0, end = 0; at < s->n_members; at = end) {
        end = population_end(s->members, at, s->n_members);
        struct tvm_group g = group_of(p, &s->members[at], end - at,
                                      s->tensors + at, s->n_workers);
        if (!all_done(done, &s->members[at], end - at))
            TV_TRY(run_group(s, &g, cuts, err));
        for (size_t i = at; i < end; i++)
            cuts += p->tensors[s->members[i].tensor].n_sources;
    }
    drop_scratch(s); /* the merge has the memory to itself */
    *out = s;
    s = NULL;
out:
    tvm_survey_close(s);
    return rc;
}

void tvm_survey_close(struct tvm_survey *s)
{
    if (s == NULL)
        return;
    for (size_t i = 0; i < s->n_members; i++)
        s->plan->tensors[s->members[i].tensor].cuts = NULL;
    drop_scratch(s);
    tv_free(s->cuts);
    tv_free(s->tensors);
    tv_free(s->members);
    tv_free(s);
}
