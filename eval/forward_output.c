/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward_output.c - what comes out of a forward pass: losses of scored ids, or
 * logits in chunks; and the memory that either takes at least.
 */
#include "forward_parts.h"

#include <math.h>
#include <string.h>

#include "tv/alloc.h"

#define CHUNK_LOGITS (16u << 20) /* elements that a sink gets at once */

struct partial { /* of one row and tile: sum of exp(logit - max) */
    double sum;
    float max;
};

/* ---- what cannot go to a file -------------------------------------------- */

/* Rows of a group of windows of n ids. */
static size_t group_rows(size_t n)
{
    return n == 0 || n >= TVE_GROUP_ROWS ? n : TVE_GROUP_ROWS / n * n;
}

/* Rows of logits that a sink gets at once. */
static size_t logits_rows(size_t vocab, size_t seq)
{
    size_t n = CHUNK_LOGITS / vocab;
    n = n < 1 ? 1 : n > TVE_GROUP_ROWS ? TVE_GROUP_ROWS : n;
    return n < seq ? n : seq ? seq : 1;
}

static uint64_t tile_floats(const tve_model *m, const struct tve_param *p)
{
    const size_t in = tve_linear_in(m, p), out = tve_linear_out(m, p);
    const uint64_t floats = (uint64_t)tve_tile_rows(in, out) * in;
    const size_t split = tve_split_tile_floats(m, in, out);

    return floats > split ? floats : split;
}

uint64_t tve_model_least(const tve_model *m, enum tve_pass pass, size_t n,
                         unsigned n_threads)
{
    const struct tve_spec *const s = &m->spec;
    const struct tve_param *const head = &m->globals[TVE_HEAD];
    const size_t head_rows = tve_tile_rows(head->w.cols, head->w.rows);
    uint64_t rows = group_rows(n);
    uint64_t worker = tve_attention_floats(n), shared = 0;

    for (size_t i = 0; i < s->n_layers * TVE_SLOTS; i++) {
        const struct tve_param *const p = &m->layers[i];
        if (p->w.t && p->w.t->rank == 2 && tile_floats(m, p) > worker)
            worker = tile_floats(m, p);
    }
    if (pass == TVE_PASS_LOGITS) {
        rows = logits_rows(s->vocab, n);
        shared = rows * s->vocab;
    } else if (pass == TVE_PASS_SCORES) {
        const uint64_t n_tiles = (head->w.rows + head_rows - 1) / head_rows;
        shared = rows * n_tiles * (sizeof(struct partial) / sizeof(float));
    }
    if (pass != TVE_PASS_STATISTICS &&
        tile_floats(m, head) + head_rows * rows > worker)
        worker = tile_floats(m, head) + head_rows * rows;
    for (int r = 0; r < 2; r++)
        shared += 2 * (uint64_t)n * tve_rope_half(&s->rope[r]);
    return (n_threads * worker + shared) * sizeof(float) + tve_split_least(m);
}

/* ---- scores -------------------------------------------------------------- */

struct scores {
    const struct tve_batch *b;
    size_t vocab, n_tiles, rows; /* rows that are scored, in this group */
    struct partial *parts;       /* [rows, n_tiles] */
    int32_t *targets;            /* [rows] */
    float *target_logits;        /* [rows] */
    double *nll;                 /* where the next batch's go */
};

static void score_tile(void *arg, const struct tve_head_tile *t)
{
    const struct scores *const s = arg;
    const size_t left = s->vocab > t->out0 ? s->vocab - t->out0 : 0;
    const size_t n = left < t->n_out ? left : t->n_out;

    for (size_t i = 0; i < t->n; i++) {
        /* the tile belongs to this worker until it returns */
        float *const row = (float *)(uintptr_t)t->logits + i * t->n_out;
        const size_t r = t->row0 + i;
        const size_t target = (size_t)s->targets[r];
        struct partial *const p = &s->parts[r * s->n_tiles + t->tile];

        if (target >= t->out0 && target < t->out0 + n)
            s->target_logits[r] = row[target - t->out0];
        p->max = s->b->m->rows->max_row(row, n);
        p->sum = s->b->m->rows->exp_row(row, n, p->max);
    }
}

static double row_nll(const struct scores *s, size_t row)
{
    const struct partial *const p = &s->parts[row * s->n_tiles];
    float max = p[0].max;
    double sum = 0;

    for (size_t t = 1; t < s->n_tiles; t++)
        max = p[t].max > max ? p[t].max : max;
    for (size_t t = 0; t < s->n_tiles; t++)
        sum += p[t].sum * exp((double)p[t].max - (double)max);
    return (double)max + log(sum) - (double)s->target_logits[row];
}

/* Rows of x that predict scored ids, moved together in place, per group. */
static enum tv_err score_batch(struct tve_batch *b, void *arg,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct scores *const s = arg;
    const struct tve_param *const head = &b->m->globals[TVE_HEAD];
    const float *from = NULL;
    float *x = NULL;
    size_t ld = 0, w = 0;
    const size_t tile_rows = tve_tile_rows(head->w.cols, head->w.rows);

    s->b = b;
    s->vocab = b->spec->vocab;
    /* tiles behind the vocabulary (spare rows) are never looked at */
    s->n_tiles = (head->w.rows + tile_rows - 1) / tile_rows;
    TV_TRY(tve_batch_finish(b, &from, &ld, err));
    if (b->is_there) {
        const struct tve_scored there = {
            .x = from,
            .room = from == b->y ? b->x : b->y,
            .ld = ld,
            .windows = b->windows,
            .starts = b->starts,
            .n_windows = b->n_windows,
            .groups = b->groups,
            .n_groups = b->n_groups,
        };
        TV_TRY(tve_there_score(b->m, &b->there, &there, s->nll, err));
        for (size_t i = 0; i < b->n_windows; i++)
            s->nll += b->windows[i].n > b->windows[i].score_from
                          ? b->windows[i].n - b->windows[i].score_from
                          : 0;
        goto out;
    }
    x = (float *)(uintptr_t)from;
    for (size_t g = 0; g < b->n_groups; g++) {
        const struct tve_group *const group = &b->groups[g];
        struct tve_group scored = {group->start, 0};
        const size_t first = w;

        for (; w < b->n_windows && b->starts[w] < group->start + group->n;
             w++) {
            const struct tve_window *const win = &b->windows[w];
            for (size_t k = win->score_from; k < win->n; k++)
                memmove(x + (scored.start + scored.n++) * ld,
                        x + (b->starts[w] + k - 1) * ld, ld * sizeof(*x));
        }
        if (scored.n == 0)
            continue;
        tv_free(s->parts);
        tv_free(s->targets);
        tv_free(s->target_logits);
        s->parts = tv_calloc(scored.n * s->n_tiles, sizeof(*s->parts));
        s->targets = tv_calloc(scored.n, sizeof(*s->targets));
        s->target_logits = tv_calloc(scored.n, sizeof(*s->target_logits));
        if (!s->parts || !s->targets || !s->target_logits) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
        s->rows = 0;
        for (size_t i = first; i < w; i++)
            for (size_t k = b->windows[i].score_from; k < b->windows[i].n; k++)
                s->targets[s->rows++] = b->windows[i].ids[k];
        const struct tve_group all = {0, scored.n};
        TV_TRY(tve_head_run(b->m, head, x + scored.start * ld, ld, &all, 1,
                            score_tile, s, err));
        for (size_t i = 0; i < s->rows; i++)
            *s->nll++ = row_nll(s, i);
    }
out:
    return rc;
}

enum tv_err tve_score(tve_model *m, const struct tve_window *w,
                      size_t n_windows, const struct tve_progress *progress,
                      double *nll, struct tv_error *err)
{
    struct scores s = {.nll = nll};
    const enum tv_err rc =
        tve_run_batches(m, w, n_windows, progress, score_batch, &s, err);

    tv_free(s.parts);
    tv_free(s.targets);
    tv_free(s.target_logits);
    return rc;
}

/* ---- logits -------------------------------------------------------------- */

struct logits {
    tve_logits_fn sink;
    void *arg;
    size_t at, vocab;
    float *rows; /* [chunk, vocab] */
    size_t chunk;
};

static void logits_tile(void *arg, const struct tve_head_tile *t)
{
    const struct logits *const l = arg;
    const size_t left = l->vocab > t->out0 ? l->vocab - t->out0 : 0;
    const size_t n = left < t->n_out ? left : t->n_out;

    for (size_t i = 0; i < t->n && n > 0; i++)
        memcpy(l->rows + (t->row0 + i) * l->vocab + t->out0,
               t->logits + i * t->n_out, n * sizeof(float));
}

static enum tv_err logits_batch(struct tve_batch *b, void *arg,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct logits *const l = arg;
    const float *x = NULL;
    float *host = NULL; /* rows of x that came back from the device */
    size_t ld = 0;

    TV_TRY(tve_batch_finish(b, &x, &ld, err));
    if (b->is_there) {
        host = tv_alloc_aligned(l->chunk * ld * sizeof(*host));
        if (!host) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    /* Chunks begin at windows, so that batches do not show in them. */
    for (size_t w = 0; w < b->n_windows; w++) {
        for (size_t k = 0; k < b->windows[w].n; k += l->chunk) {
            const size_t left = b->windows[w].n - k;
            const struct tve_group g = {0, left < l->chunk ? left : l->chunk};
            const float *const rows = x + (b->starts[w] + k) * ld;

            if (host)
                TV_TRY(tve_there_get(b->m, host, rows, g.n * ld, err));
            TV_TRY(tve_head_run(b->m, &b->m->globals[TVE_HEAD],
                                host ? host : rows, ld, &g, 1, logits_tile, l,
                                err));
            TV_TRY(l->sink(l->arg, l->at, g.n, l->rows, err));
            l->at += g.n;
        }
    }
out:
    tv_free(host);
    return rc;
}

enum tv_err tve_logits(tve_model *m, const int32_t *ids, size_t batch,
                       size_t seq, const struct tve_progress *progress,
                       tve_logits_fn sink, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_window *const w = tv_calloc(batch ? batch : 1, sizeof(*w));
    struct logits l = {.sink = sink, .arg = arg, .vocab = m->spec.vocab};

    l.chunk = logits_rows(l.vocab, seq);
    l.rows = tv_alloc_aligned(l.chunk * l.vocab * sizeof(float));
    if (!w || !l.rows) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < batch; i++)
        w[i] = (struct tve_window){ids + i * seq, seq, 1};
    rc = tve_run_batches(m, w, batch, progress, logits_batch, &l, err);
out:
    tv_free(l.rows);
    tv_free(w);
    return rc;
}
