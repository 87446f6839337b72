/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prune.c - see prune.h.
 *
 * Scores are t^2 w_j with a weight per input channel: 1, the diagonal of X^T X
 * (removing t when nothing else moves costs t^2 H_jj / 2) or 1 / U_jj^2 (when
 * the columns to its right may still make up for it). They are compared as fp32
 * bit patterns, which order like them: two histograms give the exact k-th.
 *
 * SparseGPT (Frantar and Alistarh, arXiv 2301.00774) on T in place of the
 * weights, and conjugate gradients on the kept values, are in kernels/layer.c.
 * A Gram matrix that is not positive definite gets ten times the
 * damping, up to four times; then the layer is masked by the diagonal alone.
 *
 * With a CUDA device H and U live there, and only masks by weights are made
 * here; the ladder, the order of steps and what is read again are the same. A
 * square that the device has no memory for is made here, too, and goes there in
 * panels (tvk_cuda_layer_factors).
 */
#include "prune.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "select.h"
#include "tv/alloc.h"
#include "tv/cuda_math.h"
#include "tv/layer.h"

#define HI_BUCKETS 65536u
#define BLOCK_COLS 128u

struct prune {
    const struct tvm_trim_rule *rule;
    float *t;
    size_t rows, cols;
    const struct tvm_stats *stats;
    const struct tvm_prune_again *again;
    double *weight;    /* [cols] of scores */
    uint32_t *buckets; /* [HI_BUCKETS] */
    float *h;          /* [cols, cols]: H or U; NULL: the device has them */
    float *work;
    tvk_cuda_layer *device; /* NULL: none */
    float *diagonal;        /* [cols] with a device: of H damped, then of U */
};

struct rect { /* entries that compete */
    size_t row, rows, col, cols;
};

/* ---- memory -------------------------------------------------------------- */

static bool corrects_by_obs(const struct tvm_trim_rule *r)
{
    return r->correct == TVM_CORRECT_OBS || r->correct == TVM_CORRECT_OBS_CG;
}

/* SparseGPT's loop chooses, but what it leaves is T's own values. */
static bool masks_by_obs(const struct tvm_trim_rule *r)
{
    return !corrects_by_obs(r) && r->score == TVM_SCORE_CHOLESKY &&
           r->compare == TVM_COMPARE_LOOP;
}

static uint64_t work_floats(const struct tvm_trim_rule *r, size_t rows,
                            size_t cols)
{
    const bool obs = corrects_by_obs(r) || masks_by_obs(r);
    /* Rows of T and marks of what is kept beside those of CG. */
    const uint64_t cg = 2 * TVK_CG_ROWS * (uint64_t)cols + tvk_cg_work(cols);
    uint64_t most = tvk_gram_work(cols);

    if (obs && tvk_obs_work(rows, cols) > most)
        most = tvk_obs_work(rows, cols);
    if (r->correct < TVM_CORRECT_CG && !r->rescale && !masks_by_obs(r))
        return most;
    return most > cg ? most : cg;
}

/* Beside a device: rows of T and a diagonal; H and U where it has no memory
 * for them. */
static uint64_t floats_beside(const tvk_cuda *cuda, size_t rows, size_t cols)
{
    const uint64_t few = (TVK_CUDA_CG_ROWS + 1) * (uint64_t)cols;

    if (tvk_cuda_layer_factors(cuda, rows, cols))
        return few;
    return tvk_gram_floats(cols) + few + tvk_gram_work(cols);
}

uint64_t tvm_prune_bytes(const struct tvm_trim_rule *r, size_t rows,
                         size_t cols, const tvk_cuda *cuda)
{
    uint64_t bytes =
        cols * sizeof(double) + (uint64_t)HI_BUCKETS * sizeof(uint32_t);

    if (!tvm_rule_needs_gram(r) || !tvk_layer_built())
        return bytes;
    if (cuda)
        return bytes + floats_beside(cuda, rows, cols) * sizeof(float) +
               tvk_cuda_layer_staging(cols);
    return bytes +
           (tvk_gram_floats(cols) + work_floats(r, rows, cols)) * sizeof(float);
}

/* ---- masks --------------------------------------------------------------- */

/* Not negative, so the bits order like the value; NaN above all. */
static uint32_t score_bits(float t, double weight)
{
    const float score = (float)((double)t * (double)t * weight);
    uint32_t bits = 0;

    memcpy(&bits, &score, sizeof bits);
    bits &= 0x7fffffffu;
    /* What underflows still comes before nothing. */
    return bits == 0 && t != 0.0f ? 1u : bits;
}

static uint32_t bits_at(const struct prune *p, size_t row, size_t col)
{
    return score_bits(p->t[row * p->cols + col], p->weight[col]);
}

/* Sets all but the k highest scores of a part to 0. */
static void keep_highest(const struct prune *p, const struct rect *of,
                         uint64_t k)
{
    const uint64_t n = (uint64_t)of->rows * of->cols;
    const size_t row_end = of->row + of->rows;
    const size_t col_end = of->col + of->cols;
    uint64_t count = 0;
    uint64_t left = k;

    if (k >= n)
        return;
    memset(p->buckets, 0, HI_BUCKETS * sizeof *p->buckets);
    for (size_t r = of->row; r < row_end; r++)
        for (size_t c = of->col; c < col_end; c++)
            p->buckets[bits_at(p, r, c) >> 16]++;
    const uint32_t hi =
        (uint32_t)tvm_hist_find(p->buckets, HI_BUCKETS, &left, &count);
    memset(p->buckets, 0, HI_BUCKETS * sizeof *p->buckets);
    for (size_t r = of->row; r < row_end; r++)
        for (size_t c = of->col; c < col_end; c++) {
            const uint32_t bits = bits_at(p, r, c);
            if (bits >> 16 == hi)
                p->buckets[bits & 0xffffu]++;
        }
    const uint32_t limit =
        hi << 16 |
        (uint32_t)tvm_hist_find(p->buckets, HI_BUCKETS, &left, &count);
    uint64_t skip = p->rule->as_sparsegpt ? count - left : 0;
    for (size_t r = of->row; r < row_end; r++)
        for (size_t c = of->col; c < col_end; c++) {
            const uint32_t bits = bits_at(p, r, c);
            if (bits > limit)
                continue;
            if (bits == limit && skip == 0 && left > 0) {
                left--;
                continue;
            }
            skip -= bits == limit && skip > 0;
            p->t[r * p->cols + c] = 0.0f;
        }
}

/* n_kept of every group columns of a row. */
static void keep_pattern(const struct prune *p)
{
    const size_t group = p->rule->group;
    const unsigned n_pruned = p->rule->group - p->rule->n_kept;

    for (size_t r = 0; r < p->rows; r++)
        for (size_t c = 0; c < p->cols; c += group) {
            const size_t n = p->cols - c < group ? p->cols - c : group;
            const struct rect of = {r, 1, c, n};
            uint32_t bits[64];
            bool drop[64] = {false};
            assert(n <= 64);
            for (size_t i = 0; i < n; i++)
                bits[i] = bits_at(p, of.row, c + i);
            for (size_t i = 0; i < n; i++) {
                unsigned n_less = 0;
                for (size_t j = 0; j < n; j++)
                    n_less +=
                        bits[j] < bits[i] || (bits[j] == bits[i] && j > i);
                drop[i] = n_less < n_pruned;
            }
            for (size_t i = 0; i < n; i++)
                if (drop[i])
                    p->t[r * p->cols + c + i] = 0.0f;
        }
}

static uint64_t kept_count(const struct prune *p, uint64_t n)
{
    const double density = p->rule->density;
    if (p->rule->as_sparsegpt)
        return n - (uint64_t)floor((double)n * (1.0 - density));
    const uint64_t k = (uint64_t)(density * (double)n);
    return k > 0 ? k : 1;
}

static void mask(const struct prune *p)
{
    struct rect of = {0, p->rows, 0, p->cols};

    if (p->rule->group > 0) {
        keep_pattern(p);
        return;
    }
    switch (p->rule->compare) {
    case TVM_COMPARE_LAYER:
        keep_highest(p, &of, kept_count(p, (uint64_t)p->rows * p->cols));
        break;
    case TVM_COMPARE_ROW:
        of.rows = 1;
        for (; of.row < p->rows; of.row++)
            keep_highest(p, &of, kept_count(p, p->cols));
        break;
    case TVM_COMPARE_BLOCK:
        for (; of.col < p->cols; of.col += BLOCK_COLS) {
            of.cols =
                p->cols - of.col < BLOCK_COLS ? p->cols - of.col : BLOCK_COLS;
            keep_highest(p, &of, kept_count(p, (uint64_t)p->rows * of.cols));
        }
        break;
    case TVM_COMPARE_LOOP: /* without its factor */
        keep_highest(p, &of, kept_count(p, (uint64_t)p->rows * p->cols));
        break;
    }
}

/* ---- statistics ---------------------------------------------------------- */

void tvm_gram_unpack(float *h, const float *gram, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        memcpy(h + i * n + i, gram, (n - i) * sizeof *h);
        gram += n - i;
    }
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < i; j++)
            h[i * n + j] = h[j * n + i];
}

static double diagonal(const struct tvm_stats *s, size_t j)
{
    /* Row j of the triangle begins behind j rows of n, n - 1, ... entries. */
    return s->diag ? s->diag[j] : (double)s->gram[j * s->n - j * (j - 1) / 2];
}

/* An input that was never seen weighs as much as the others do on average: its
 * entries compete by magnitude, and rare features are not lost. */
static void weigh_by_diagonal(const struct prune *p)
{
    double sum = 0;
    size_t n_live = 0;

    for (size_t j = 0; j < p->cols; j++) {
        p->weight[j] = diagonal(p->stats, j);
        if (p->weight[j] > 0) {
            sum += p->weight[j];
            n_live++;
        }
    }
    for (size_t j = 0; j < p->cols; j++)
        if (!(p->weight[j] > 0))
            p->weight[j] = n_live > 0 ? sum / (double)n_live : 1.0;
}

/* H, its diagonal damped, where it is worked on. */
static enum tv_err put_gram(const struct prune *p, double damping,
                            struct tv_error *err)
{
    if (p->h) {
        tvm_gram_unpack(p->h, p->stats->gram, p->cols);
        (void)tvk_gram_damp(p->h, p->cols, damping);
        return p->device ? tvk_cuda_layer_square(p->device, p->h, err) : TV_OK;
    }
    for (size_t j = 0; j < p->cols; j++)
        p->diagonal[j] = (float)diagonal(p->stats, j);
    (void)tvk_diagonal_damp(p->diagonal, p->cols, damping);
    return tvk_cuda_layer_gram(p->device, p->stats->gram, p->diagonal, err);
}

static enum tv_err factor_once(const struct prune *p, bool *definite,
                               struct tv_error *err)
{
    if (!p->h)
        return tvk_cuda_layer_factor(p->device, definite, p->diagonal, err);
    *definite = tvk_gram_factor(p->h, p->cols, p->work) == 0;
    if (!p->device || !*definite)
        return TV_OK;
    return tvk_cuda_layer_square(p->device, p->h, err);
}

/* H becomes U. *took: the damping that it took, 0 when none did, and how often
 * it was raised. */
static enum tv_err factor(const struct prune *p, double *took,
                          unsigned *n_raised, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    double damping = p->rule->damping;

    *took = 0;
    *n_raised = 0;
    for (unsigned i = 0; i <= TVM_LADDER_MAX && *took == 0;
         i++, damping *= 10.0) {
        bool definite = false;

        TV_TRY(put_gram(p, damping, err));
        TV_TRY(factor_once(p, &definite, err));
        *n_raised = i;
        if (definite)
            *took = damping;
    }
out:
    return rc;
}

/* U_jj, behind factor(). */
static double factor_at(const struct prune *p, size_t j)
{
    return (double)(p->h ? p->h[j * p->cols + j] : p->diagonal[j]);
}

/* ---- correction ---------------------------------------------------------- */

/* T's own values where something is kept. */
static void restore(const struct prune *p)
{
    float *const t = p->work;

    for (size_t row = 0; row < p->rows; row += TVK_CG_ROWS) {
        const size_t n =
            p->rows - row < TVK_CG_ROWS ? p->rows - row : TVK_CG_ROWS;
        float *const kept = p->t + row * p->cols;
        p->again->rows(p->again->arg, row, n, t);
        for (size_t i = 0; i < n * p->cols; i++)
            kept[i] = kept[i] != 0.0f ? t[i] : 0.0f;
    }
}

/* Rows that are corrected at a time. */
static size_t tile_rows(const struct prune *p, size_t row)
{
    const size_t most = p->device ? TVK_CUDA_CG_ROWS : TVK_CG_ROWS;

    return p->rows - row < most ? p->rows - row : most;
}

/* Rows [row, row + n) of T to work, marks of what is kept behind them. */
static enum tv_err refine(const struct prune *p, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    float *const t = p->work;

    for (size_t row = 0; row < p->rows; row += tile_rows(p, row)) {
        const size_t n = tile_rows(p, row);
        float *const kept = p->t + row * p->cols;

        p->again->rows(p->again->arg, row, n, t);
        if (p->device) {
            TV_TRY(tvk_cuda_layer_refine(p->device, kept, t, n,
                                         p->rule->cg_steps, err));
            continue;
        }
        uint8_t *const keep = (uint8_t *)(t + TVK_CG_ROWS * p->cols);
        for (size_t i = 0; i < n * p->cols; i++)
            keep[i] = kept[i] != 0.0f;
        tvk_cg_rows(kept, t, keep, p->h, n, p->cols, p->rule->cg_steps,
                    t + 2 * TVK_CG_ROWS * p->cols);
    }
out:
    return rc;
}

/* The factor for which what is kept comes nearest to T. */
static enum tv_err rescale(const struct prune *p, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    float *const t = p->work;
    double tt = 0, tp = 0, pp = 0;

    for (size_t row = 0; row < p->rows; row += tile_rows(p, row)) {
        const size_t n = tile_rows(p, row);
        const float *const kept = p->t + row * p->cols;

        p->again->rows(p->again->arg, row, n, t);
        if (p->device)
            TV_TRY(tvk_cuda_layer_product(p->device, t, kept, n, &tt, &tp, &pp,
                                          err));
        else
            tvk_gram_product(t, kept, p->h, n, p->cols, &tt, &tp, &pp,
                             t + 2 * TVK_CG_ROWS * p->cols);
    }
    if (!(pp > 0.0) || !(tp > 0.0))
        goto out;
    const double g = tp / pp;
    for (size_t i = 0; i < p->rows * p->cols; i++)
        p->t[i] = (float)((double)p->t[i] * g);
out:
    return rc;
}

static enum tv_err prune_with_gram(const struct prune *p,
                                   struct tvm_pruned *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_trim_rule *const r = p->rule;
    const bool obs = corrects_by_obs(r) || masks_by_obs(r);

    out->damping = r->damping;
    if (obs || r->score == TVM_SCORE_CHOLESKY)
        TV_TRY(factor(p, &out->damping, &out->n_raised, err));
    if (out->damping == 0) {
        out->uncorrected = true;
        weigh_by_diagonal(p);
        mask(p);
        goto out;
    }
    if (obs) {
        const struct tvk_obs how = {
            .density = r->density,
            .n_pruned = r->group > 0 ? r->group - r->n_kept : 0,
            .group = r->group,
        };
        if (p->device)
            TV_TRY(tvk_cuda_layer_obs(p->device, p->t, &how, err));
        else
            (void)tvk_obs_prune(p->t, p->h, p->rows, p->cols, &how, p->work);
        if (masks_by_obs(r))
            restore(p);
    } else {
        for (size_t j = 0; j < p->cols && r->score == TVM_SCORE_CHOLESKY; j++) {
            const double u = factor_at(p, j);
            p->weight[j] = 1.0 / (u * u);
        }
        mask(p);
    }
    if (r->correct < TVM_CORRECT_CG && !r->rescale)
        goto out;
    TV_TRY(put_gram(p, out->damping, err));
    if (r->correct >= TVM_CORRECT_CG)
        TV_TRY(refine(p, err));
    if (r->rescale)
        TV_TRY(rescale(p, err));
out:
    return rc;
}

enum tv_err tvm_prune(const struct tvm_trim_rule *r, float *t, size_t rows,
                      size_t cols, const struct tvm_stats *stats,
                      const struct tvm_prune_again *again,
                      struct tvm_pruned *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool gram = tvm_rule_needs_gram(r);
    size_t n_work = 0;
    struct prune p = {.rule = r,
                      .t = t,
                      .rows = rows,
                      .cols = cols,
                      .stats = stats,
                      .again = again};

    *out = (struct tvm_pruned){.n_kept = 0};
    assert(stats->n == cols && (!gram || stats->gram));
    p.weight = tv_calloc(cols + 1, sizeof *p.weight);
    p.buckets = tv_calloc(HI_BUCKETS, sizeof *p.buckets);
    if (!p.weight || !p.buckets)
        goto no_memory;
    if (gram && stats->cuda) {
        n_work = TVK_CUDA_CG_ROWS * cols;
        if (tvk_gram_work(cols) > n_work)
            n_work = tvk_gram_work(cols);
        TV_TRY(tvk_cuda_layer_open(stats->cuda, rows, cols, err, &p.device));
        p.diagonal = tv_alloc((cols + 1) * sizeof *p.diagonal);
        if (!p.diagonal)
            goto no_memory;
    } else if (gram) {
        n_work = (size_t)work_floats(r, rows, cols);
    }
    if (gram && (!p.device || tvk_cuda_layer_on_host(p.device))) {
        p.h = tv_alloc_aligned(tvk_gram_floats(cols) * sizeof *p.h);
        if (!p.h)
            goto no_memory;
    }
    if (gram) {
        p.work = tv_alloc_aligned(n_work * sizeof *p.work + 64);
        if (!p.work)
            goto no_memory;
    }
    for (size_t j = 0; j < cols; j++)
        p.weight[j] = 1.0;
    if (r->score == TVM_SCORE_DIAGONAL)
        weigh_by_diagonal(&p);
    if (gram)
        TV_TRY(prune_with_gram(&p, out, err));
    else
        mask(&p);
    for (size_t i = 0; i < rows * cols; i++)
        out->n_kept += t[i] != 0.0f;
    for (size_t j = 0; j < cols; j++)
        out->n_unseen += !(diagonal(stats, j) > 0);
    goto out;
no_memory:
    rc = tv_error_set(err, TV_E_NOMEM, "out of memory for a layer [%zu, %zu]",
                      rows, cols);
out:
    tvk_cuda_layer_close(p.device);
    tv_free(p.diagonal);
    tv_free(p.work);
    tv_free(p.h);
    tv_free(p.buckets);
    tv_free(p.weight);
    return rc;
}

/* ---- token embeddings ---------------------------------------------------- */

/* Counts all scores: by their high half, or by the low one of those in hi. */
static void count_scores(const struct prune *p, uint64_t n_elems,
                         const struct tvm_prune_table *table, uint32_t hi,
                         bool low)
{
    memset(p->buckets, 0, HI_BUCKETS * sizeof *p->buckets);
    for (uint64_t at = 0; at < n_elems; at += table->at_once) {
        const uint64_t left = n_elems - at;
        const size_t n = left < table->at_once ? (size_t)left : table->at_once;
        table->read(table->arg, at, n, table->block);
        for (size_t i = 0; i < n; i++) {
            const uint32_t bits =
                score_bits(table->block[i], p->weight[(at + i) / p->cols]);
            if (!low)
                p->buckets[bits >> 16]++;
            else if (bits >> 16 == hi)
                p->buckets[bits & 0xffffu]++;
        }
    }
}

enum tv_err tvm_prune_by_counts(const struct tvm_trim_rule *r, uint64_t n_elems,
                                size_t cols, const struct tvm_stats *stats,
                                const struct tvm_prune_table *table,
                                uint64_t *words, struct tvm_pruned *out,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct prune p = {.rule = r, .cols = stats->n, .stats = stats};
    uint64_t count = 0;
    uint64_t left = kept_count(&p, n_elems);

    *out = (struct tvm_pruned){.n_kept = 0};
    assert(stats->diag && n_elems == (uint64_t)cols * stats->n);
    p.weight = tv_calloc(stats->n + 1, sizeof *p.weight);
    p.buckets = tv_calloc(HI_BUCKETS, sizeof *p.buckets);
    if (!p.weight || !p.buckets) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory for %zu tokens",
                          stats->n);
        goto out;
    }
    weigh_by_diagonal(&p);
    for (size_t j = 0; j < stats->n; j++)
        out->n_unseen += !(stats->diag[j] > 0);
    p.cols = cols;
    count_scores(&p, n_elems, table, 0, false);
    const uint32_t hi =
        (uint32_t)tvm_hist_find(p.buckets, HI_BUCKETS, &left, &count);
    count_scores(&p, n_elems, table, hi, true);
    const uint32_t limit = hi << 16 | (uint32_t)tvm_hist_find(
                                          p.buckets, HI_BUCKETS, &left, &count);
    for (uint64_t at = 0; at < n_elems; at += table->at_once) {
        const uint64_t some = n_elems - at;
        const size_t n = some < table->at_once ? (size_t)some : table->at_once;
        table->read(table->arg, at, n, table->block);
        for (size_t i = 0; i < n; i++) {
            const uint32_t bits =
                score_bits(table->block[i], p.weight[(at + i) / cols]);
            const bool tie = bits == limit && left > 0;
            left -= tie;
            if (bits == 0 || !(bits > limit || tie))
                continue;
            words[(at + i) / 64] |= (uint64_t)1 << ((at + i) % 64);
            out->n_kept++;
        }
    }
out:
    tv_free(p.buckets);
    tv_free(p.weight);
    return rc;
}
