/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/calibrate.h - input statistics of a model over calibration text: which
 * windows of the text, and get or compute, through the cache of a store.
 *
 * Items of a store are found by a key of everything that the numbers depend on:
 * fingerprints of the model and of its adapters with their factors, ids of all
 * windows (so text, tokenizer, BOS, samples, context and seed), kind, OpenBLAS
 * core type, version of the computation. Whatever finds an item reads the bytes
 * that computing it again would give; a store only saves work.
 *
 *   tve_samples_text | _ids | _random
 *                           windows of a task's own text
 *   tve_calibration_open    model + windows + kind -> key, inputs
 *   tve_calibration_run     each wanted input: read or computed
 *
 * Thread rule: each handle is used by one thread at a time.
 */
#ifndef TV_CALIBRATE_H
#define TV_CALIBRATE_H

#include <stdatomic.h>
#include "tv/eval.h"
#include "tv/hash.h"
#include "tv/store.h"

/* ---- windows ------------------------------------------------------------- */

#define TVE_SAMPLES 128u /* defaults */
#define TVE_CONTEXT 512u

struct tve_sampling {
    size_t samples;   /* most windows; 0: TVE_SAMPLES */
    size_t context;   /* ids of a window, BOS among them; 0: TVE_CONTEXT */
    size_t positions; /* tve_model_positions: a default context is cut to it; 0:
                       * no limit */
    int32_t bos;      /* in front of each window of text; -1: none */
};

/* Ids of a window, BOS among them. */
size_t tve_sampling_context(const struct tve_sampling *how);

struct tve_samples {            /* owned: tve_samples_free */
    struct tve_window *windows; /* of ids */
    size_t n;
    int32_t *ids;
    size_t context;        /* as it was used */
    size_t n_available;    /* windows that the texts hold */
    uint64_t n_tokens;     /* of all windows */
    bool random;           /* no text: say so wherever a result shows */
    struct tv_hash digest; /* of windows and ids */
};
void tve_samples_free(struct tve_samples *s); /* also zeroes it */

/* Texts as ids without special tokens: each is cut into consecutive windows of
 * `context` ids (BOS counts; the remainder is dropped); of more windows than
 * `samples` those at floor(i * available / samples) are taken. INPUT when no
 * text fills a window, USAGE for a context below 2. */
TV_NODISCARD enum tv_err tve_samples_text(const struct tve_ids *texts,
                                          size_t n_texts,
                                          const struct tve_sampling *how,
                                          struct tv_error *err,
                                          struct tve_samples *out);
/* Rows of ids [batch, seq] as windows, as they are. */
TV_NODISCARD enum tv_err tve_samples_ids(const int32_t *ids, size_t batch,
                                         size_t seq, struct tv_error *err,
                                         struct tve_samples *out);
/* Ids drawn uniformly from the vocabulary (Philox, by seed), BOS in front. Only
 * for who asks for it: such statistics describe no task. */
TV_NODISCARD enum tv_err tve_samples_random(size_t vocab, uint64_t seed,
                                            const struct tve_sampling *how,
                                            struct tv_error *err,
                                            struct tve_samples *out);

/* ---- get or compute ------------------------------------------------------ */

typedef struct tve_calibration tve_calibration;

enum tve_keep {
    TVE_KEEP_NOT = 0, /* read what the store has, add nothing */
    TVE_KEEP_IF_ROOM, /* add what the quota allows */
    TVE_KEEP_ALL      /* NOSPACE, before the work, when not all fits */
};

struct tve_calibration_options {
    enum tve_stat kind;
    tv_store *store;    /* borrowed; NULL: nothing is found or kept */
    enum tve_keep keep; /* anything but NOT needs a store open for writing */
    uint64_t keep_free; /* bytes of the quota that keeping must leave */
    const char *about;  /* JSON object for lists: what the texts are; NULL:
                         * none. Copied */
};
/* Reads no weights. Model and samples are borrowed while it is open. */
TV_NODISCARD enum tv_err
tve_calibration_open(tve_model *m, const struct tve_samples *samples,
                     const struct tve_calibration_options *opt,
                     struct tv_error *err, tve_calibration **out);
void tve_calibration_close(tve_calibration *c);

/* Of everything that the numbers depend on: to be hashed into keys of what is
 * made from them. Does not depend on the store. */
struct tv_hash tve_calibration_key(const tve_calibration *c);

/* Inputs in the order of computation: the embedding's token counts, then those
 * of every block. sums and gram are NULL. */
size_t tve_calibration_count(const tve_calibration *c);
const struct tve_stat_input *tve_calibration_input(const tve_calibration *c,
                                                   size_t i);
/* The input that this weight takes; count when it has none. */
size_t tve_calibration_find(const tve_calibration *c, const char *tensor);

struct tve_calibration_use { /* of a run */
    size_t n_found, n_computed, n_kept, n_left_out;
};
/* Calls fn (may be NULL: only fill the store) for every input i with want[i]
 * (NULL: all), in order, with numbers that do not depend on whether the store
 * had them. The model runs as far as the last one that it has not, one block's
 * sums in memory at a time; each block is durable in the store before the next
 * begins, so a killed run continues with the same bytes. When it may keep,
 * items that it finds are pinned until tv_derived_release(store). use may be
 * NULL. Errors of
 * tve_statistics; NOSPACE. */
TV_NODISCARD enum tv_err
tve_calibration_run(tve_calibration *c, const bool *want,
                    const struct tve_progress *progress, tve_stat_fn fn,
                    void *arg, struct tve_calibration_use *use,
                    struct tv_error *err);

/* ---- block by block --------------------------------------------------------
 * For inputs that depend on weights which are made on the way (sequential
 * calibration): the residual streams of all windows in front of a block.
 *
 *   for each block: look (statistics of its inputs), make its new weights,
 *                   tve_model_replace them, advance (runs the block with them)
 *
 * Nothing of this is looked for or kept in a store. Model and samples are
 * borrowed; several sequences may share a model. Between calls a sequence holds
 * its residual streams alone. */
typedef struct tve_sequence tve_sequence;

struct tve_sequence_options {
    enum tve_stat kind;
    /* Longer residual streams lie in a scratch file (so do those that exceed
     * half of the model's memory). */
    uint64_t stream_bytes;
    /* Does anybody look at the inputs of this weight? NULL: at all of them. */
    bool (*wants)(void *arg, const char *tensor);
    void *arg;
    const atomic_int *cancel; /* not 0: advancing is INTERRUPTED; may be NULL
                               */
};
/* What lies in scratch files, at most, also when the model has more memory; and
 * on the heap, as it is. */
struct tve_scratch {
    uint64_t heap;    /* bytes: sums, activations, workers; no tokenizer */
    uint64_t streams; /* bytes of residual streams, as long as the pass takes */
    uint64_t batch;   /* bytes of activations, while a batch is computed */
};
/* BUDGET, with the number, when a device has no room for the smallest batch.
 * For n windows of `context` ids: of a sequence with such streams, or (opt
 * NULL) of a calibration of that kind. Reads no weights. */
TV_NODISCARD enum tv_err
tve_calibration_scratch(tve_model *m, enum tve_stat kind, size_t n,
                        size_t context, const struct tve_sequence_options *opt,
                        struct tv_error *err, struct tve_scratch *out);
/* Embeds. Errors of tve_statistics. */
TV_NODISCARD enum tv_err
tve_sequence_open(tve_model *m, const struct tve_samples *samples,
                  const struct tve_sequence_options *opt, struct tv_error *err,
                  tve_sequence **out);
void tve_sequence_close(tve_sequence *s);
size_t tve_sequence_layer(const tve_sequence *s); /* the next block */
/* Statistics of the wanted inputs of the next block, with its weights as they
 * are now; in a block all of them see the inputs that these weights make. */
TV_NODISCARD enum tv_err tve_sequence_look(tve_sequence *s, tve_stat_fn fn,
                                           void *arg, struct tv_error *err);
/* Past the next block; not beyond the last. After an error only close. */
TV_NODISCARD enum tv_err tve_sequence_advance(tve_sequence *s,
                                              struct tv_error *err);

#endif
