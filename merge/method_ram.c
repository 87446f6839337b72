/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_ram.c - averages task vectors where several are active, keeps them
 * whole where only one is.
 *
 * Entry e of d_i is active when |d_i(e)| > epsilon; cnt(e) counts the active.
 *
 *   y = base + sum over active i of d_i / cnt
 *
 * ramplus_tl scales the entries that only model i changes by
 *   L_i = 1 + r clip(rho_i, 0, alpha),
 *   rho_i = #(active, shared) / max(#(active, alone), epsilon)
 * with counts over the tensor. "Reinforced Agent Merging", arXiv 2601.13572;
 * the tensor-local form is mergekit's.
 */
#include "compat.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum { P_EPSILON, P_R, P_ALPHA, N_PARAMS };
#define N_RAM 1u

static const struct tvm_param params[N_PARAMS] = {
    [P_EPSILON] = {.name = "epsilon",
                   .scope = TVM_SHARED,
                   .type = TVM_FLOAT,
                   .has_default = true,
                   .fallback = 1e-5,
                   TVM_FROM(0.0),
                   .help = "smaller changes do not count"},
    [P_R] = {.name = "r",
             .scope = TVM_SHARED,
             .type = TVM_FLOAT,
             .has_default = true,
             .fallback = 0.1,
             .help = "how strongly unshared changes are raised"},
    [P_ALPHA] = {.name = "alpha",
                 .scope = TVM_SHARED,
                 .type = TVM_FLOAT,
                 .has_default = true,
                 .fallback = 0.2,
                 TVM_FROM(0.0),
                 .help = "most of the ratio shared to unshared that counts"},
};

struct counts {
    uint64_t shared, alone;
};

struct ram_state {
    double raise[TVK_DONORS_MAX]; /* by donor */
    struct counts *counts;        /* [n_workers][n_sources], ramplus_tl */
};

static bool is_plus(const struct tvm_tensor *t)
{
    return t->method->n_params == N_PARAMS;
}

static int fold(const struct tvm_tensor *t)
{
    return t->base >= 0 && t->n_sources == 1 ? t->base : -1;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct ram_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    if (is_plus(job->tensor))
        st->counts = tvm_carve(&c, job->n_workers * job->tensor->n_sources,
                               sizeof *st->counts);
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct ram_state st;

    return lay_out(job, NULL, &st);
}

static struct counts *counts_of(const struct tvm_job *job, unsigned worker)
{
    const struct ram_state *st = job->state;
    return st->counts + worker * job->tensor->n_sources;
}

static bool next_phase(struct tvm_job *job)
{
    struct ram_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    size_t donor = 0;

    if (job->phase == 0)
        (void)lay_out(job, st, st);
    if (!is_plus(t)) {
        for (size_t i = 0; i < TVK_DONORS_MAX; i++)
            st->raise[i] = 1.0;
        return false;
    }
    if (job->phase == 0)
        return true;
    for (size_t s = 0; s < t->n_sources; s++) {
        uint64_t shared = 0;
        uint64_t alone = 0;
        if ((int)s == t->base)
            continue;
        for (unsigned w = 0; w < job->n_workers; w++) {
            shared += counts_of(job, w)[s].shared;
            alone += counts_of(job, w)[s].alone;
        }
        const double least = tvm_shared(t, P_EPSILON);
        const double by = (double)alone > least ? (double)alone : least;
        /* Nothing active at all: no ratio, and nothing that it could raise. */
        double rho = shared > 0 ? (double)shared / by : 0.0;
        rho = fmin(fmax(rho, 0.0), tvm_shared(t, P_ALPHA));
        st->raise[donor++] = 1.0 + tvm_shared(t, P_R) * rho;
    }
    return false;
}

/* on[i]: is the change more than epsilon? As mergekit rounds, if asked to. */
static void find_active(const struct tvm_job *job, const float *x,
                        const float *base, unsigned char *on, size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const double eps = tvm_shared(t, P_EPSILON);
    float d[TVM_BLOCK];

    if (t->compute == TV_DTYPE_NONE) {
        for (size_t i = 0; i < n; i++)
            on[i] = fabs((double)x[i] - (double)base[i]) > eps;
        return;
    }
    const float least = tvm_compat_round1(job->k, t->compute, eps);
    for (size_t i = 0; i < n; i++)
        d[i] = x[i] - base[i];
    tvm_compat_round(job->k, t->compute, d, n);
    for (size_t i = 0; i < n; i++)
        on[i] = fabsf(d[i]) > least;
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    struct counts *mine = counts_of(job, tile->worker);
    const float *base = x[t->base];
    unsigned char count[TVM_BLOCK] = {0};

    unsigned char on[TVM_BLOCK];

    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        find_active(job, x[s], base, on, n);
        for (size_t i = 0; i < n; i++)
            count[i] = (unsigned char)(count[i] + on[i]);
    }
    for (size_t s = 0; s < t->n_sources; s++) {
        uint64_t shared = 0;
        uint64_t alone = 0;
        if ((int)s == t->base)
            continue;
        find_active(job, x[s], base, on, n);
        for (size_t i = 0; i < n; i++) {
            const bool active = on[i] != 0;
            shared += active && count[i] > 1;
            alone += active && count[i] == 1;
        }
        mine[s].shared += shared;
        mine[s].alone += alone;
    }
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct ram_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *donors[TVK_DONORS_MAX];
    const size_t n_donors = tvm_donors(t, x, donors);

    (void)tile;
    job->k->ram(dst, x[t->base], donors, st->raise, n_donors,
                tvm_shared(t, P_EPSILON), n);
}

/* ---- --compat mergekit ----------------------------------------------------
 * ramplus_tl's factors are fp32 for torch, so from there on everything is. */

/* What is added for an active entry. */
static float compat_term(float d, unsigned count, float raise)
{
    return count == 1 ? d * raise : d / (float)count;
}

/* Rounds all, or with count only what several models share. */
static void round_terms(const struct tvk_table *k, const struct tvm_tensor *t,
                        const unsigned char *count, float *d, size_t n)
{
    float rounded[TVM_BLOCK];

    memcpy(rounded, d, n * sizeof *d);
    tvm_compat_round(k, t->compute, rounded, n);
    for (size_t i = 0; i < n; i++)
        d[i] = count == NULL || count[i] > 1 ? rounded[i] : d[i];
}

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *const t = job->tensor;
    const struct tvk_table *const k = job->k;
    const float *const base = x[t->base];
    const float eps =
        tvm_compat_round1(k, t->compute, tvm_shared(t, P_EPSILON));
    const struct ram_state *const st = job->state;
    unsigned char count[TVM_BLOCK] = {0};
    float d[TVM_BLOCK];
    const bool plus = is_plus(t);

    (void)tile;
    if (t->n_sources == 1) {
        memcpy(dst, base, n * sizeof *dst);
        return;
    }
    /* Two rounds over the donors: a count first, then the sum. */
    memset(dst, 0, n * sizeof *dst);
    for (unsigned round = 0; round < 2; round++) {
        size_t donor = 0;
        for (size_t s = 0; s < t->n_sources; s++) {
            if ((int)s == t->base)
                continue;
            const float raise = (float)st->raise[donor++];
            for (size_t i = 0; i < n; i++)
                d[i] = x[s][i] - base[i];
            tvm_compat_round(k, t->compute, d, n);
            for (size_t i = 0; i < n; i++) {
                const bool active = fabsf(d[i]) > eps;
                if (round == 0)
                    count[i] = (unsigned char)(count[i] + active);
                else
                    d[i] = active ? compat_term(d[i], count[i], raise) : 0.0f;
            }
            if (round == 0)
                continue;
            round_terms(k, t, plus ? count : NULL, d, n);
            for (size_t i = 0; i < n; i++)
                dst[i] += d[i];
        }
    }
    if (!plus)
        tvm_compat_round(k, t->compute, dst, n);
    for (size_t i = 0; i < n; i++)
        dst[i] = base[i] + dst[i];
    if (!plus)
        tvm_compat_round(k, t->compute, dst, n);
}

static const struct tvm_method compat = {
    .name = "ram",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_RAM,
    .check = tvm_check_finite,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .combine = compat_combine,
};

static const struct tvm_method compat_plus = {
    .name = "ramplus_tl",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = tvm_check_finite,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = compat_combine,
    .compat_wide = true,
};

const struct tvm_method tvm_method_ram = {
    .name = "ram",
    .summary = "task vectors averaged where shared, whole where not",
    .paper = "Reinforced Agent Merging, arXiv 2601.13572",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_RAM,
    .check = tvm_check_finite,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .combine = combine,
    .compat = &compat,
};

const struct tvm_method tvm_method_ramplus_tl = {
    .name = "ramplus_tl",
    .summary = "ram, with what only one model changes raised",
    .paper = "Reinforced Agent Merging, arXiv 2601.13572",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = tvm_check_finite,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = combine,
    .compat = &compat_plus,
};
