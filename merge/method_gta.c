/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_gta.c - generalised task arithmetic: base plus a combination of
 * sparsified, weighted task vectors d_i = x_i - base, with or without sign
 * election (the formula is tvk_table::gta).
 *
 * Rows of the family: task arithmetic, TIES, DARE; each file cites its paper.
 * The names of the common parameters and their meaning are mergekit's (Goddard
 * et al. 2024, arXiv 2403.13257).
 *
 * Here is what the parameters of a tensor ask for; how the largest entries are
 * found is in gta_select.c.
 */
#include "method_gta.h"

#include <math.h>

#include "gta_parts.h"

const char *const gta_sparsifiers[] = {"none",       "magnitude", "random",
                                       "importance", "sparsegpt", NULL};
const char *const gta_corrections[] = {"auto", "none",   "obs",
                                       "cg",   "obs+cg", NULL};
const char *const gta_compares[] = {"auto",  "layer", "row",
                                    "block", "loop",  NULL};
const char *const gta_inputs[] = {"own", "base", "merged", NULL};
const char *const gta_others[] = {"dense", "magnitude", NULL};
const char *const gta_embeddings[] = {"others", "counts", NULL};
const char *const gta_patterns[] = {"none", "1:2",  "1:4",  "2:4",   "3:4",
                                    "1:8",  "2:8",  "4:8",  "6:8",   "2:16",
                                    "4:16", "8:16", "8:32", "16:32", NULL};
static const unsigned patterns[][2] = {
    {0, 0}, {1, 2}, {1, 4},  {2, 4},  {3, 4},  {1, 8},  {2, 8},
    {4, 8}, {6, 8}, {2, 16}, {4, 16}, {8, 16}, {8, 32}, {16, 32}};

const struct gta_detail *gta_detail_of(const struct tvm_tensor *t)
{
    return t->method->detail;
}

enum gta_sparsify gta_sparsify_of(const struct tvm_tensor *t)
{
    static const enum gta_sparsify by_choice[] = {
        GTA_NONE, GTA_MAGNITUDE, GTA_RANDOM, GTA_IMPORTANCE, GTA_SPARSEGPT};

    if (!gta_detail_of(t)->choose || !t->shared_set[GTA_SPARSIFY])
        return gta_detail_of(t)->sparsify;
    return by_choice[(size_t)tvm_shared(t, GTA_SPARSIFY)];
}

double gta_weight_of(const struct tvm_tensor *t, size_t source)
{
    return tvm_of(t, source, GTA_WEIGHT, t->method->n_params);
}

bool gta_by_statistics(const struct tvm_tensor *t)
{
    return gta_sparsify_of(t) == GTA_IMPORTANCE ||
           gta_sparsify_of(t) == GTA_SPARSEGPT;
}

/* Is it thinned by statistics of what comes in? */
static bool has_statistics(const struct tvm_tensor *t)
{
    return gta_by_statistics(t) &&
           (t->has_inputs ||
            (t->is_embedding && tvm_shared(t, GTA_EMBEDDINGS) != 0.0));
}

static double density_of(const struct tvm_tensor *t, size_t source)
{
    if (gta_by_statistics(t) && t->has_inputs) {
        const unsigned *p = patterns[(size_t)tvm_shared(t, GTA_PATTERN)];
        if (p[1] > 0)
            return (double)p[0] / (double)p[1];
    }
    return tvm_of(t, source, GTA_DENSITY, t->method->n_params);
}

enum gta_keep gta_keep_of(const struct tvm_tensor *t, size_t source)
{
    const double density = density_of(t, source);

    if (gta_sparsify_of(t) == GTA_NONE || density >= 1.0)
        return GTA_KEEP_ALL;
    if (gta_by_statistics(t) && !has_statistics(t) &&
        tvm_shared(t, GTA_OTHERS) == 0.0)
        return GTA_KEEP_ALL;
    if (!(density > 0.0))
        return GTA_KEEP_NONE;
    if (gta_sparsify_of(t) == GTA_OUTLIERS &&
        density * (double)t->n_elems < 1.0)
        return GTA_KEEP_NONE;
    return gta_sparsify_of(t) == GTA_RANDOM ? GTA_KEEP_RANDOM : GTA_KEEP_TOP;
}

enum tvm_reach gta_reach(const struct tvm_tensor *t)
{
    if (!gta_detail_of(t)->scoped || gta_sparsify_of(t) != GTA_MAGNITUDE ||
        tvm_shared(t, GTA_SCOPE) == 0.0)
        return TVM_REACH_TENSOR;
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base && gta_keep_of(t, s) == GTA_KEEP_TOP)
            return (enum tvm_reach)tvm_shared(t, GTA_SCOPE);
    return TVM_REACH_TENSOR;
}

bool gta_is_scoped(const struct tvm_tensor *t)
{
    return gta_reach(t) != TVM_REACH_TENSOR;
}

size_t gta_count_donors(const struct tvm_tensor *t, size_t *n_top,
                        size_t *n_random)
{
    size_t n = 0;
    *n_top = 0;
    *n_random = 0;
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        n++;
        if (gta_keep_of(t, s) == GTA_KEEP_TOP)
            *n_top += gta_sparsify_of(t) == GTA_OUTLIERS ? 2 : 1;
        if (gta_keep_of(t, s) == GTA_KEEP_RANDOM)
            (*n_random)++;
    }
    return n;
}

static void check_statistics(const struct tvm_tensor *t,
                             struct tvm_problems *problems)
{
    if (!gta_by_statistics(t))
        return;
    const double correct = tvm_shared(t, GTA_CORRECT);

    if (gta_detail_of(t)->mergekit)
        tvm_param_problem(t, GTA_SPARSIFY, SIZE_MAX, problems,
                          "--compat mergekit: mergekit has no sparsify: %s",
                          gta_sparsifiers[(size_t)tvm_shared(t, GTA_SPARSIFY)]);
    if (gta_sparsify_of(t) == GTA_IMPORTANCE &&
        (correct == 1.0 + TVM_CORRECT_OBS ||
         correct == 1.0 + TVM_CORRECT_OBS_CG))
        tvm_param_problem(t, GTA_CORRECT, SIZE_MAX, problems,
                          "error_correction: obs chooses entries itself: write "
                          "sparsify: sparsegpt");
    if (gta_sparsify_of(t) == GTA_IMPORTANCE &&
        tvm_shared(t, GTA_COMPARE) == 1.0 + TVM_COMPARE_LOOP)
        tvm_param_problem(
            t, GTA_COMPARE, SIZE_MAX, problems,
            "importance_scope: loop is SparseGPT's: write sparsify: "
            "sparsegpt");
}

void gta_check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    size_t n_top = 0;
    size_t n_random = 0;

    tvm_check_finite(t, problems);
    (void)gta_count_donors(t, &n_top, &n_random);
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base || gta_detail_of(t)->mergekit ||
            gta_keep_of(t, s) != GTA_KEEP_RANDOM ||
            tvm_shared(t, GTA_RESCALE) == 0.0)
            continue;
        tvm_problem_note(problems, t->name,
                         "rescale divides by density, as in the DARE paper; "
                         "mergekit since 0.1.5 matches L1 norms instead");
        break;
    }
    check_statistics(t, problems);
    if (gta_detail_of(t)->mergekit && gta_is_scoped(t))
        tvm_param_problem(t, GTA_SCOPE, SIZE_MAX, problems,
                          "mergekit has no trim_scope: it cannot be combined "
                          "with --compat mergekit");
    /* The histograms count in 32 bits. */
    if (n_top > 0 && t->n_elems > UINT32_MAX)
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "%s of a tensor with more than 2^32 elements is not "
                        "supported",
                        t->method->name);
}

int gta_fold(const struct tvm_tensor *t)
{
    const double lambda = tvm_shared(t, GTA_LAMBDA);
    const bool normalize = tvm_shared(t, GTA_NORMALIZE) != 0.0;
    size_t n_donors = 0;
    size_t donor = 0;
    bool none = true;

    if (t->base < 0)
        return -1;
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        n_donors++;
        donor = s;
        none = none && (gta_weight_of(t, s) == 0.0 ||
                        gta_keep_of(t, s) == GTA_KEEP_NONE);
    }
    if (none || lambda == 0.0)
        return t->base;
    if (n_donors != 1 || gta_keep_of(t, donor) != GTA_KEEP_ALL)
        return -1;
    const double w = gta_weight_of(t, donor);
    if (normalize)
        return lambda == 1.0 && fabs(w) >= 1e-8 ? (int)donor : -1;
    return w * lambda == 1.0 ? (int)donor : -1;
}

/* ---- random numbers and trimming ----------------------------------------- */

uint64_t gta_draws(const struct tvm_tensor *t)
{
    uint64_t n = 0;

    if (gta_sparsify_of(t) != GTA_RANDOM)
        return 0;
    /* A density of 0 draws as well. */
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base &&
            tvm_of(t, s, GTA_DENSITY, t->method->n_params) < 1.0)
            n += t->n_elems;
    return n;
}

static enum tvm_correct correct_of(const struct tvm_tensor *t)
{
    const size_t c = (size_t)tvm_shared(t, GTA_CORRECT);

    if (c > 0)
        return (enum tvm_correct)(c - 1);
    return gta_sparsify_of(t) == GTA_SPARSEGPT ? TVM_CORRECT_OBS
                                               : TVM_CORRECT_NONE;
}

static enum tvm_compare compare_of(const struct tvm_tensor *t)
{
    const size_t c = (size_t)tvm_shared(t, GTA_COMPARE);

    if (c > 0)
        return (enum tvm_compare)(c - 1);
    return gta_sparsify_of(t) == GTA_SPARSEGPT ? TVM_COMPARE_LOOP
                                               : TVM_COMPARE_LAYER;
}

/* Not what several tensors trim together: masks are of one by itself. */
bool gta_trims(const struct tvm_tensor *t, size_t source,
               struct tvm_trim_rule *rule)
{
    if (t->base < 0 || (int)source == t->base ||
        gta_keep_of(t, source) != GTA_KEEP_TOP ||
        gta_sparsify_of(t) == GTA_OUTLIERS || gta_is_scoped(t))
        return false;
    *rule = (struct tvm_trim_rule){.density = density_of(t, source)};
    if (!has_statistics(t)) {
        rule->needs_sums =
            tvm_shared(t, GTA_RESCALE) != 0.0 && !gta_by_statistics(t);
        return true;
    }
    const unsigned *p = patterns[(size_t)tvm_shared(t, GTA_PATTERN)];
    rule->calibrated = true;
    if (!t->has_inputs) {
        /* One-hot inputs: X^T X is its diagonal, the counts, so all ways to
         * prune by it come to the same mask, and no block changes it. */
        rule->counts = true;
        rule->score = TVM_SCORE_DIAGONAL;
        rule->inputs = tvm_shared(t, GTA_INPUTS) == TVM_INPUTS_BASE
                           ? TVM_INPUTS_BASE
                           : TVM_INPUTS_OWN;
        return true;
    }
    rule->score = gta_sparsify_of(t) == GTA_SPARSEGPT ? TVM_SCORE_CHOLESKY
                                                      : TVM_SCORE_DIAGONAL;
    rule->compare = compare_of(t);
    rule->n_kept = p[0];
    rule->group = p[1];
    rule->correct = correct_of(t);
    rule->rescale = tvm_shared(t, GTA_RESCALE) != 0.0;
    rule->damping = tvm_shared(t, GTA_DAMPING);
    if (tvm_shared(t, GTA_CG_STEPS) >= 1.0)
        rule->cg_steps = (unsigned)fmin(tvm_shared(t, GTA_CG_STEPS), 1000.0);
    rule->inputs = (enum tvm_inputs_of)tvm_shared(t, GTA_INPUTS);
    return true;
}
