/* SPDX-License-Identifier: Apache-2.0 */
/*
 * samples.c - which windows a model is calibrated on (tv/calibrate.h).
 *
 * Texts are cut as for perplexity (windows of N - 1 ids behind BOS, remainders
 * dropped), then thinned evenly, so that a part of a long text stands for all
 * of it. Nothing here is random unless random tokens are asked for.
 */
#include <string.h>

#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/checked.h"
#include "tv/text.h"

#define RANDOM_NAME UINT64_C(0x74766572616e646d) /* of the Philox stream */

void tve_samples_free(struct tve_samples *s)
{
    tv_free(s->windows);
    tv_free(s->ids);
    memset(s, 0, sizeof(*s));
}

/* Memory for n windows of `seq` ids each, which windows point into. */
static enum tv_err make(size_t n, size_t seq, struct tve_samples *out,
                        struct tv_error *err)
{
    size_t total = 0;

    memset(out, 0, sizeof(*out));
    if (n <= SIZE_MAX / sizeof(*out->windows) && tv_mul_size(n, seq, &total)) {
        out->windows = tv_calloc(n ? n : 1, sizeof(*out->windows));
        out->ids = tv_calloc(total ? total : 1, sizeof(*out->ids));
    }
    if (!out->windows || !out->ids) {
        tve_samples_free(out);
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    }
    for (size_t i = 0; i < n; i++)
        out->windows[i] = (struct tve_window){out->ids + i * seq, seq, 1};
    out->n = out->n_available = n;
    out->context = seq;
    out->n_tokens = total;
    return TV_OK;
}

static enum tv_err digest(struct tve_samples *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_hasher *h = NULL;
    unsigned char word[8];

    TV_TRY(tv_hasher_open(err, &h));
    tv_put_le64(word, s->n);
    tv_hasher_add(h, word, sizeof(word));
    for (size_t i = 0; i < s->n; i++) {
        const struct tve_window *const w = &s->windows[i];

        tv_put_le64(word, w->n);
        tv_hasher_add(h, word, sizeof(word));
        for (size_t k = 0; k < w->n; k++) {
            tv_put_le32(word, (uint32_t)w->ids[k]);
            tv_hasher_add(h, word, 4);
        }
    }
    s->digest = tv_hasher_value(h);
out:
    tv_hasher_close(h);
    return rc;
}

size_t tve_sampling_context(const struct tve_sampling *how)
{
    if (how->context > 0)
        return how->context;
    return how->positions > 0 && how->positions < TVE_CONTEXT ? how->positions
                                                              : TVE_CONTEXT;
}

static enum tv_err context_of(const struct tve_sampling *how, size_t *out,
                              struct tv_error *err)
{
    *out = tve_sampling_context(how);
    if (*out < 2)
        return tv_error_set(err, TV_E_USAGE,
                            "a context of %zu tokens: at least 2", *out);
    return TV_OK;
}

static size_t samples_of(const struct tve_sampling *how)
{
    return how->samples > 0 ? how->samples : TVE_SAMPLES;
}

enum tv_err tve_samples_text(const struct tve_ids *texts, size_t n_texts,
                             const struct tve_sampling *how,
                             struct tv_error *err, struct tve_samples *out)
{
    enum tv_err rc = TV_OK;
    const size_t lead = how->bos >= 0 ? 1 : 0;
    size_t context = 0, available = 0, n_ids = 0, n = 0;

    memset(out, 0, sizeof(*out));
    TV_TRY(context_of(how, &context, err));
    const size_t piece = context - lead;
    for (size_t t = 0; t < n_texts; t++) {
        available += texts[t].n / piece;
        n_ids += texts[t].n;
    }
    if (available == 0)
        return tv_error_set(err, TV_E_INPUT,
                            "%zu tokens of text do not fill a window of %zu",
                            n_ids, context);
    n = available < samples_of(how) ? available : samples_of(how);
    TV_TRY(make(n, context, out, err));
    out->n_available = available;
    for (size_t i = 0, t = 0, before = 0; i < n; i++) {
        /* i * available / n without overflow */
        const size_t at =
            available / n * i + (size_t)((uint64_t)(available % n) * i / n);
        int32_t *const ids = out->ids + i * context;

        while (at - before >= texts[t].n / piece)
            before += texts[t++].n / piece;
        if (lead)
            ids[0] = how->bos;
        memcpy(ids + lead, texts[t].ids + (at - before) * piece,
               piece * sizeof(*ids));
    }
    TV_TRY(digest(out, err));
out:
    if (rc != TV_OK)
        tve_samples_free(out);
    return rc;
}

enum tv_err tve_samples_ids(const int32_t *ids, size_t batch, size_t seq,
                            struct tv_error *err, struct tve_samples *out)
{
    enum tv_err rc = TV_OK;

    memset(out, 0, sizeof(*out));
    if (batch == 0 || seq == 0)
        return tv_error_set(err, TV_E_INPUT, "no token ids");
    TV_TRY(make(batch, seq, out, err));
    memcpy(out->ids, ids, (size_t)out->n_tokens * sizeof(*ids));
    TV_TRY(digest(out, err));
out:
    if (rc != TV_OK)
        tve_samples_free(out);
    return rc;
}

enum tv_err tve_samples_random(size_t vocab, uint64_t seed,
                               const struct tve_sampling *how,
                               struct tv_error *err, struct tve_samples *out)
{
    enum tv_err rc = TV_OK;
    size_t context = 0;
    unsigned char word[8];
    uint32_t draws[256];

    memset(out, 0, sizeof(*out));
    if (vocab == 0 || vocab > INT32_MAX)
        return tv_error_set(err, TV_E_INPUT, "a vocabulary of %zu tokens",
                            vocab);
    TV_TRY(context_of(how, &context, err));
    TV_TRY(make(samples_of(how), context, out, err));
    out->random = true;
    tv_put_le64(word, seed);
    const uint64_t key = tv_hash64(word, sizeof(word));
    for (uint64_t at = 0; at < out->n_tokens; at += 256) {
        const size_t n =
            out->n_tokens - at < 256 ? (size_t)(out->n_tokens - at) : 256;

        tvk_philox_words(draws, at, key, RANDOM_NAME, n);
        for (size_t i = 0; i < n; i++)
            out->ids[at + i] = (int32_t)((uint64_t)draws[i] * vocab >> 32);
    }
    for (size_t i = 0; how->bos >= 0 && i < out->n; i++)
        out->ids[i * context] = how->bos;
    TV_TRY(digest(out, err));
out:
    if (rc != TV_OK)
        tve_samples_free(out);
    return rc;
}
