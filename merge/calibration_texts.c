/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibration_texts.c - which windows of which text a model runs over.
 *
 * The planner asks first whether a text will do (tvm_calibrated_texts): as much
 * of it is made tokens of as shows that a window fills, since a text may be
 * long and a plan is made often. The run then takes all of it.
 */
#include <string.h>
#include <sys/stat.h>

#include "calibrated.h"
#include "calibrated_parts.h"
#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/eval.h"
#include "tv/sys.h"

#define BYTES_PER_TOKEN 16u /* of the part that is tried first */

/* Of the model, else of any input that opened: they were made from one base. */
static enum tv_err find_tokenizer(const struct tvm_plan *p, size_t model,
                                  int32_t *bos, tve_tokenizer **out,
                                  struct tv_error *err)
{
    enum tv_err rc =
        tve_tokenizer_of(p->inputs[model].input, NULL, bos, err, out);

    for (size_t i = 0; rc == TV_E_INPUT && i < p->n_inputs; i++)
        if (i != model && p->inputs[i].input &&
            tve_tokenizer_of(p->inputs[i].input, NULL, bos, NULL, out) ==
                TV_OK) {
            tv_error_clear(err);
            rc = TV_OK;
        }
    return rc;
}

static enum tv_err read_texts(const struct tvm_calibration *cal,
                              tve_tokenizer *tokenizer, struct tve_ids *ids,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *text = NULL;
    size_t n = 0;

    for (size_t i = 0; i < cal->n_texts; i++) {
        TV_TRY(tvm_text_read(cal, i, err, &text, &n));
        rc = tve_tokenizer_encode(tokenizer, text, n, false, &ids[i], err);
        if (rc != TV_OK) {
            tv_error_context(err, "%s", cal->texts[i]);
            goto out;
        }
        tv_free(text);
        text = NULL;
    }
out:
    tv_free(text);
    return rc;
}

enum tv_err tvm_layer_samples(const struct tvm_plan *p, size_t model,
                              const tve_model *m,
                              const struct tvm_calibration *cal,
                              struct tve_samples *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_sampling how = {.samples = (size_t)cal->samples,
                               .context = (size_t)cal->context,
                               .positions = tve_model_positions(m),
                               .bos = -1};
    tve_tokenizer *tokenizer = NULL;
    struct tve_ids *ids = NULL;

    if (cal->random) {
        TV_TRY(tve_bos_of(p->inputs[model].input, &how.bos, err));
        rc = tve_samples_random(tve_model_vocab(m), p->options.seed, &how, err,
                                out);
        goto out;
    }
    TV_TRY(find_tokenizer(p, model, &how.bos, &tokenizer, err));
    ids = tv_calloc(cal->n_texts + 1, sizeof *ids);
    if (!ids) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(read_texts(cal, tokenizer, ids, err));
    TV_TRY(tve_samples_text(ids, cal->n_texts, &how, err, out));
out:
    if (rc != TV_OK)
        tv_error_context(err, "calibration of '%s'", p->inputs[model].ref);
    for (size_t i = 0; ids && i < cal->n_texts; i++)
        tve_ids_free(&ids[i]);
    tv_free(ids);
    tve_tokenizer_close(tokenizer);
    return rc;
}

/* ---- planning ------------------------------------------------------------ */

/* Windows that there can be: a token stands for a byte at least, and there may
 * be one that marks the beginning. */
static size_t windows_most(const struct tvm_calibration *cal, size_t context)
{
    const size_t most = cal->samples > 0 ? (size_t)cal->samples : TVE_SAMPLES;
    const size_t piece = context > 2 ? context - 1 : 1;
    uint64_t n = 0;

    if (cal->random)
        return most;
    for (size_t i = 0; i < cal->n_texts; i++) {
        struct stat st;
        if (tv_sys()->stat(cal->texts[i], &st) != 0)
            return most;
        n += ((uint64_t)st.st_size + 2) / piece;
    }
    return n < most ? (size_t)n : most;
}

enum tv_err tvm_layer_scratch(const struct tvm_plan *p, size_t model,
                              const struct tvm_calibration *cal, bool gram,
                              uint64_t memory,
                              const struct tve_sequence_options *opt,
                              struct tv_error *err, struct tve_scratch *out)
{
    enum tv_err rc = TV_OK;
    struct tve_sampling how = {.context = (size_t)cal->context};
    tve_model *m = NULL;

    TV_TRY(tvm_layer_model(p, model, memory, err, &m));
    how.positions = tve_model_positions(m);
    const size_t context = tve_sampling_context(&how);
    TV_TRY(tve_calibration_scratch(m, gram ? TVE_STAT_GRAM : TVE_STAT_DIAG,
                                   windows_most(cal, context), context, opt,
                                   err, out));
out:
    tve_model_close(m);
    return rc;
}

/* Tokens of the first n bytes. */
static enum tv_err count_tokens(tve_tokenizer *t, const char *text, size_t n,
                                size_t *n_tokens, struct tv_error *err)
{
    struct tve_ids ids = {0};
    const enum tv_err rc = tve_tokenizer_encode(t, text, n, false, &ids, err);

    *n_tokens = ids.n;
    tve_ids_free(&ids);
    return rc;
}

/* Tokens of a text; of a long one at least `enough`, if it has them. */
static enum tv_err tokens_of(tve_tokenizer *t,
                             const struct tvm_calibration *cal, size_t i,
                             size_t enough, size_t *n_tokens,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *text = NULL;
    size_t n = 0;

    *n_tokens = 0;
    TV_TRY(tvm_text_read(cal, i, err, &text, &n));
    size_t part = enough * BYTES_PER_TOKEN;
    if (part < n) {
        /* Not within a character. */
        while (part > 0 && ((unsigned char)text[part] & 0xc0) == 0x80)
            part--;
        TV_TRY(count_tokens(t, text, part, n_tokens, err));
    }
    if (*n_tokens < enough)
        TV_TRY(count_tokens(t, text, n, n_tokens, err));
out:
    tv_free(text);
    return rc;
}

enum tv_err tvm_calibrated_texts(const struct tvm_plan *p, size_t model,
                                 const struct tvm_calibration *cal,
                                 struct tvm_text_extent *out,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_sampling how = {.context = (size_t)cal->context, .bos = -1};
    tve_tokenizer *tokenizer = NULL;
    tve_model *m = NULL;

    *out = (struct tvm_text_extent){0};
    TV_TRY(tvm_layer_model(p, model, TVM_MODEL_LEAST, err, &m));
    how.positions = tve_model_positions(m);
    out->window = tve_sampling_context(&how);
    out->fits = tve_model_takes(m, out->window);
    out->positions = how.positions;
    out->fills = cal->random;
    if (cal->random)
        goto out;
    TV_TRY(find_tokenizer(p, model, &how.bos, &tokenizer, err));
    const size_t piece = out->window - (how.bos >= 0 ? 1 : 0);
    for (size_t i = 0; i < cal->n_texts && !out->fills; i++) {
        size_t n = 0;
        TV_TRY(tokens_of(tokenizer, cal, i, piece, &n, err));
        out->n_tokens += n;
        out->fills = n >= piece;
    }
out:
    tve_tokenizer_close(tokenizer);
    tve_model_close(m);
    return rc;
}
