/* SPDX-License-Identifier: Apache-2.0 */
/*
 * perplexity.c - cuts a text into windows by one of the protocols of tv/eval.h
 * and averages what tve_score gives. Sums are fp64 in the order of the text.
 *
 * gptq: the loop of GPTQ, SparseGPT and Wanda (all windows equally long, so the
 * mean of their means is the mean over tokens). llamacpp: llama.cpp's
 * `perplexity` (second half of each window). stride: transformers' guide to
 * perplexity of fixed-length models, counting each id exactly once.
 */
#include <math.h>
#include <string.h>
#include <time.h>

#include "decoder.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/eval.h"

static const char *const names[TVE_PROTOCOL_COUNT] = {"windows", "gptq",
                                                      "llamacpp", "stride"};

const char *tve_protocol_name(enum tve_protocol p)
{
    return (unsigned)p < TVE_PROTOCOL_COUNT ? names[p] : "unknown";
}

int tve_protocol_from_name(const char *name, enum tve_protocol *p)
{
    for (int i = 0; i < TVE_PROTOCOL_COUNT; i++) {
        if (!strcmp(name, names[i])) {
            *p = (enum tve_protocol)i;
            return 0;
        }
    }
    return -1;
}

bool tve_protocol_special(enum tve_protocol p)
{
    return p != TVE_WINDOWS;
}

size_t tve_protocol_context(enum tve_protocol p, size_t positions)
{
    const size_t most = p == TVE_LLAMACPP ? 512 : 2048;

    return positions > 0 && positions < most ? positions : most;
}

struct cut {
    struct tve_window *w;
    size_t n;
    int32_t *ids; /* windows with a BOS in front live here */
};

/* Pieces of `take` ids, BOS in front of or instead of the first. */
static enum tv_err cut_pieces(const int32_t *ids, size_t n_ids, size_t take,
                              bool in_front, int32_t bos, size_t score_from,
                              struct cut *c, struct tv_error *err)
{
    const size_t len = take + (in_front ? 1 : 0);
    size_t total = 0, bytes = 0;

    c->n = n_ids / take;
    if (c->n == 0) {
        (void)tv_error_set(err, TV_E_INPUT,
                           "the text has %zu tokens, too few for one window "
                           "of %zu",
                           n_ids, take);
        if (n_ids > 1)
            tv_error_hint(err, "a longer text, or a --context of less than %zu",
                          len);
        return TV_E_INPUT;
    }
    c->w = tv_calloc(c->n, sizeof(*c->w));
    if (bos >= 0 && tv_mul_size(c->n, len, &total) &&
        tv_mul_size(total, sizeof(*c->ids), &bytes))
        c->ids = tv_alloc(bytes);
    if (!c->w || (bos >= 0 && !c->ids))
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < c->n; i++) {
        const int32_t *from = ids + i * take;

        if (bos >= 0) {
            int32_t *const to = c->ids + i * len;
            memcpy(to + (in_front ? 1 : 0), from, take * sizeof(*to));
            to[0] = bos;
            from = to;
        }
        c->w[i] = (struct tve_window){from, len, score_from};
    }
    return TV_OK;
}

static enum tv_err cut_stride(const int32_t *ids, size_t n_ids, size_t context,
                              size_t stride, struct cut *c,
                              struct tv_error *err)
{
    size_t end_before = 0;

    if (n_ids < 2)
        return tv_error_set(err, TV_E_INPUT,
                            "the text has %zu tokens, at least 2 are needed",
                            n_ids);
    c->w = tv_calloc(n_ids / stride + 1, sizeof(*c->w));
    if (!c->w)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t at = 0; at < n_ids && end_before < n_ids; at += stride) {
        const size_t end = n_ids - at < context ? n_ids : at + context;
        size_t from = end_before - at;

        if (at == 0)
            from = 1;
        c->w[c->n++] = (struct tve_window){ids + at, end - at, from};
        end_before = end;
    }
    return TV_OK;
}

static size_t stride_for(const struct tve_ppl_options *opt, size_t context)
{
    if (opt->stride)
        return opt->stride;
    return context > 2 ? context / 2 : 1;
}

static enum tv_err cut_text(const int32_t *ids, size_t n_ids,
                            const struct tve_ppl_options *opt, size_t context,
                            struct cut *c, struct tv_error *err)
{
    const bool has_bos = opt->bos >= 0;
    const size_t stride = stride_for(opt, context);

    switch (opt->protocol) {
    case TVE_WINDOWS:
        return cut_pieces(ids, n_ids, has_bos ? context - 1 : context, has_bos,
                          opt->bos, 1, c, err);
    case TVE_GPTQ:
        return cut_pieces(ids, n_ids, context, false, -1, 1, c, err);
    case TVE_LLAMACPP:
        /* the id behind the middle is the first whose prediction counts */
        return cut_pieces(ids, n_ids, context, false, opt->bos, context / 2 + 1,
                          c, err);
    case TVE_STRIDE:
        return cut_stride(ids, n_ids, context, stride, c, err);
    case TVE_PROTOCOL_COUNT:
        break;
    }
    return tv_error_set(err, TV_E_USAGE, "unknown protocol");
}

/* What no text can make right, before the text is looked at. */
static enum tv_err check_options(const tve_model *m,
                                 const struct tve_ppl_options *opt,
                                 size_t context, struct tv_error *err)
{
    const size_t least = opt->protocol == TVE_LLAMACPP ? 3 : 2;
    const size_t stride = stride_for(opt, context);
    const bool uses_bos =
        opt->protocol == TVE_WINDOWS || opt->protocol == TVE_LLAMACPP;

    if (context < least || context > INT32_MAX)
        return tv_error_set(err, TV_E_USAGE,
                            "a context of %zu tokens: --context takes %zu and "
                            "more for protocol %s",
                            context, least, tve_protocol_name(opt->protocol));
    if (opt->protocol == TVE_STRIDE && stride > context)
        return tv_error_set(err, TV_E_USAGE,
                            "--stride %zu is more than the context of %zu "
                            "tokens",
                            stride, context);
    /* A short text may do with less than the context. */
    if (opt->protocol != TVE_STRIDE && !tve_model_takes(m, context)) {
        (void)tv_error_set(err, TV_E_INPUT,
                           "a context of %zu tokens, but the model has %zu "
                           "positions",
                           context, tve_model_positions(m));
        tv_error_hint(err, "--context takes up to %zu for this model",
                      tve_model_positions(m));
        return TV_E_INPUT;
    }
    if (uses_bos && opt->bos >= 0 && (size_t)opt->bos >= tve_model_vocab(m)) {
        (void)tv_error_set(err, TV_E_INPUT,
                           "BOS %ld is outside the vocabulary (%zu)",
                           (long)opt->bos, tve_model_vocab(m));
        tv_error_hint(err, "--bos ID|none");
        return TV_E_INPUT;
    }
    return TV_OK;
}

static double seconds(void)
{
    struct timespec t = {0, 0};

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static size_t context_for(const tve_model *m, const struct tve_ppl_options *opt)
{
    return opt->context
               ? opt->context
               : tve_protocol_context(opt->protocol, tve_model_positions(m));
}

enum tv_err tve_perplexity_check(const tve_model *m, const int32_t *ids,
                                 size_t n_ids,
                                 const struct tve_ppl_options *opt,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct cut c = {NULL, 0, NULL};

    TV_TRY(check_options(m, opt, context_for(m, opt), err));
    TV_TRY(cut_text(ids, n_ids, opt, context_for(m, opt), &c, err));
    rc = tve_check_windows(m, c.w, c.n, err);
out:
    tv_free(c.w);
    tv_free(c.ids);
    return rc;
}

enum tv_err tve_perplexity(tve_model *m, const int32_t *ids, size_t n_ids,
                           const struct tve_ppl_options *opt,
                           const struct tve_progress *progress,
                           struct tve_ppl *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct cut c = {NULL, 0, NULL};
    const size_t context = context_for(m, opt);
    double *nll = NULL;
    size_t n = 0;
    double sum = 0, squares = 0, mean = 0;
    const double start = seconds();

    TV_TRY(check_options(m, opt, context, err));
    TV_TRY(cut_text(ids, n_ids, opt, context, &c, err));
    for (size_t i = 0; i < c.n; i++)
        n += c.w[i].n - c.w[i].score_from;
    nll = tv_calloc(n ? n : 1, sizeof(*nll));
    if (!nll) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tve_score(m, c.w, c.n, progress, nll, err));
    for (size_t i = 0; i < n; i++)
        sum += nll[i];
    mean = sum / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (nll[i] - mean) * (nll[i] - mean);
    memset(out, 0, sizeof(*out));
    out->n_tokens = n_ids;
    out->n_scored = n;
    out->context = context;
    out->nll_mean = mean;
    out->ppl = exp(mean);
    if (n > 1)
        out->ppl_stderr =
            out->ppl * sqrt(squares / ((double)n - 1) / (double)n);
    out->seconds = seconds() - start;
out:
    tv_free(nll);
    tv_free(c.w);
    tv_free(c.ids);
    return rc;
}
