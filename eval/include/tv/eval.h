/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/eval.h - what a model is worth: tokenizer, forward pass, perplexity; and
 * statistics of its layers' inputs.
 *
 * A tve_model runs a decoder-only transformer in fp32 over the weights of an
 * opened tv_input, plus adapters that are added to each weight as it is
 * converted; nothing is merged or copied. It works layer by layer over a batch
 * of windows, so that a model larger than memory is read once per batch.
 *
 * Numerics: linear layers are sgemm calls of OpenBLAS on blocks whose shapes
 * depend on the model and the windows only, one BLAS thread each, or, with
 * kernels of TVK_AMX, for bf16 weights products of tv/split_gemm.h; softmax and
 * norms sum in fp64 in index order. So results are the same bytes for any
 * number of threads and any memory budget, on one BLAS core type and with one
 * tvk_split_core_of().
 *
 * Thread rule: each handle is used by one thread at a time; different handles
 * are independent. Nothing here knows of merging.
 */
#ifndef TV_EVAL_H
#define TV_EVAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/cuda.h"
#include "tv/error.h"
#include "tv/format.h"
#include "tv/kernels.h"
#include "tv/pool.h"

/* ---- tokenizer -------------------------------------------------------------
 * tokenizer.json of the Hugging Face `tokenizers` library: byte-level and
 * SentencePiece-like BPE. Parts that are not handled are refused by name
 * (UNSUPPORTED). Truncation and padding settings are ignored. */
typedef struct tve_tokenizer tve_tokenizer;

struct tve_ids { /* growable; tve_ids_free */
    int32_t *ids;
    size_t n, cap;
};
void tve_ids_free(struct tve_ids *ids); /* also zeroes it */

/* json [n] is not kept. */
TV_NODISCARD enum tv_err tve_tokenizer_open(const char *json, size_t n,
                                            struct tv_error *err,
                                            tve_tokenizer **out);
void tve_tokenizer_close(tve_tokenizer *t);
/* Appends the ids of text [n] to *out. `special` adds what the post-processor
 * adds (BOS, ...); added tokens written out in the text always count as such.
 * CORRUPT, with the byte offset, when text is not UTF-8. */
TV_NODISCARD enum tv_err tve_tokenizer_encode(tve_tokenizer *t,
                                              const char *text, size_t n,
                                              bool special, struct tve_ids *out,
                                              struct tv_error *err);
/* Id of a token by its exact content, -1 when there is none. */
int32_t tve_tokenizer_id(const tve_tokenizer *t, const char *content);
/* Largest id + 1. */
size_t tve_tokenizer_vocab(const tve_tokenizer *t);
/* XXH3-128 of tokenizer.json, for reports. */
struct tv_hash tve_tokenizer_hash(const tve_tokenizer *t);

/* The tokenizer that belongs to a model: `path` (a tokenizer.json or a
 * directory with one) when not NULL, else the model's own side file. INPUT
 * when there is none. *bos is BOS by cli.md's rule: tokenizer_config.json's
 * bos_token, else config.json's bos_token_id; -1 when the model has none. */
TV_NODISCARD enum tv_err tve_tokenizer_of(tv_input *model, const char *path,
                                          int32_t *bos, struct tv_error *err,
                                          tve_tokenizer **out);

/* config.json's bos_token_id alone; -1 when there is none. */
TV_NODISCARD enum tv_err tve_bos_of(tv_input *model, int32_t *bos,
                                    struct tv_error *err);

/* ---- models -------------------------------------------------------------- */

typedef struct tve_model tve_model;

struct tve_model_options {
    unsigned n_threads;    /* 0: tv_cpu_count() */
    uint64_t memory_bytes; /* activations beyond it go to a scratch file;
                            * 0: 512 MiB */
    const struct tvk_table *kernels; /* NULL: tvk_table_best() */
    const char *scratch_dir;         /* for that file; NULL: the system's */
    tv_store *quota_of; /* that file counts against its quota; borrowed, NULL:
                         * none */
    bool skip_verify;   /* do not check stored payloads' checksums */
    tvk_cuda *cuda;     /* the forward pass and X^T X are computed there, within
                         * rounding of the CPU's; borrowed. NULL: none */
};

struct tve_model_adapter { /* all borrowed while the model is open */
    tv_adapter *adapter;
    double weight;
};

/* Describes and checks the model; reads no weights. `in` and the adapters are
 * borrowed. UNSUPPORTED for a family without a forward pass, INPUT for missing
 * or misshapen tensors, CORRUPT for an impossible config. */
TV_NODISCARD enum tv_err
tve_model_open(tv_input *in, const struct tve_model_adapter *adapters,
               size_t n_adapters, const struct tve_model_options *opt,
               struct tv_error *err, tve_model **out);
void tve_model_close(tve_model *m);
/* From here on the weight is read from data instead: all elements of the
 * tensor, in the shape and order that the model stores them, of any dtype that
 * math is done in; adapters do not change it. Borrowed until it is replaced
 * again or the model closed; NULL gives the model's own back. */
TV_NODISCARD enum tv_err tve_model_replace(tve_model *m, const char *tensor,
                                           enum tv_dtype dtype,
                                           const void *data,
                                           struct tv_error *err);
/* What a model may be asked for. */
enum tve_pass { TVE_PASS_STATISTICS, TVE_PASS_SCORES, TVE_PASS_LOGITS };
/* Bytes that a pass over windows of n ids takes with so many threads beside
 * activations, which may lie in the scratch file: a smaller memory budget would
 * not be kept. */
uint64_t tve_model_least(const tve_model *m, enum tve_pass pass, size_t n,
                         unsigned n_threads);
/* When a forward pass needs a tensor of the input: 0, to embed; 1 + l, in block
 * l; SIZE_MAX: behind the last block, or never. */
size_t tve_model_stage(const tve_model *m, const char *tensor);
size_t tve_model_vocab(const tve_model *m); /* ids that it takes: below it */
/* Most positions that the model was made for; 0 when it does not say. */
size_t tve_model_positions(const tve_model *m);
/* Can it run over so many? Beyond its positions where these stretch. */
bool tve_model_takes(const tve_model *m, size_t n_positions);

/* Why activations are not where they should be: with a device whose memory did
 * not suffice for the smallest batch, linear layers alone were computed there,
 * the rest here. Borrowed until the model closes; NULL when all is well, also
 * without a device. */
const char *tve_model_not_there(const tve_model *m);

/* ---- forward pass -------------------------------------------------------- */

struct tve_progress {
    /* in tokens; may be NULL */
    void (*step)(void *arg, uint64_t done, uint64_t total);
    void *arg;
    const atomic_int *cancel; /* may be NULL; polled between layers */
};

struct tve_window {
    const int32_t *ids; /* [n] */
    size_t n;
    size_t score_from; /* ids [score_from, n) are predicted and scored; >= 1 */
};

/* Negative log-likelihoods (natural log) of the scored ids of every window, in
 * order, into nll [sum of n - score_from]. INPUT for ids outside the vocabulary
 * or windows beyond learned positions; INTERRUPTED when cancelled. */
TV_NODISCARD enum tv_err tve_score(tve_model *m, const struct tve_window *w,
                                   size_t n_windows,
                                   const struct tve_progress *progress,
                                   double *nll, struct tv_error *err);

/* Logits of batch x seq ids. The sink gets rows in order: logits [n, vocab] of
 * flat positions [at, at + n), borrowed during the call; its error ends the
 * run. */
typedef enum tv_err (*tve_logits_fn)(void *arg, size_t at, size_t n,
                                     const float *logits, struct tv_error *err);
TV_NODISCARD enum tv_err tve_logits(tve_model *m, const int32_t *ids,
                                    size_t batch, size_t seq,
                                    const struct tve_progress *progress,
                                    tve_logits_fn sink, void *arg,
                                    struct tv_error *err);

/* ---- input statistics -------------------------------------------------------
 * What calibrated methods ask of a model: how large, and how correlated, the
 * inputs of its linear layers are over all tokens of some windows. Projections
 * of the same input (q, k and v; gate and up) share one. Blocks only: the
 * output head has none, and an embedding's inputs are token counts. */
enum tve_stat {
    TVE_STAT_DIAG,  /* sums [n]: of squares of each channel */
    TVE_STAT_GRAM,  /* gram [n (n + 1) / 2]: the upper triangle of X^T X, row by
                     * row: (0,0) ... (0,n-1) (1,1) ... */
    TVE_STAT_COUNTS /* sums [n]: how often each token occurs, the diagonal that
                     * an embedding's one-hot inputs have (tv/calibrate.h) */
};
/* Entries for n channels; 0 when there is no such size. */
size_t tve_stat_size(enum tve_stat kind, size_t n);

struct tve_stat_input { /* all borrowed during the call */
    enum tve_stat kind;
    size_t layer;
    const char *const *tensors; /* weights that take this input */
    size_t n_tensors;
    size_t n;           /* channels */
    uint64_t n_rows;    /* tokens */
    const double *sums; /* TVE_STAT_DIAG, TVE_STAT_COUNTS; else NULL */
    const float *gram;  /* TVE_STAT_GRAM; else NULL */
};
/* Its error ends the run. */
typedef enum tv_err (*tve_stat_fn)(void *arg, const struct tve_stat_input *in,
                                   struct tv_error *err);
/* Calls fn for every input, in the order of computation; sums of one block are
 * in memory at a time. Products are summed in fp32 over at most 1,024 tokens,
 * the rest in fp64; a Gram matrix is rounded to fp32 at the end. All windows go
 * through the model side by side, so that a block is finished before the next
 * begins (residual streams beyond the memory budget lie in the scratch file).
 * kind: not TVE_STAT_COUNTS. Errors of tve_score; BUDGET when the sums of a
 * block alone exceed the budget. */
TV_NODISCARD enum tv_err
tve_statistics(tve_model *m, const struct tve_window *w, size_t n_windows,
               enum tve_stat kind, const struct tve_progress *progress,
               tve_stat_fn fn, void *arg, struct tv_error *err);

/* ---- perplexity -------------------------------------------------------------
 * windows   ids without special tokens, cut into pieces of N-1 ids, BOS in
 *           front of each (no BOS: pieces of N, the first id not scored)
 * gptq      ids with special tokens, cut into pieces of N, first not scored
 * llamacpp  ids with special tokens, pieces of N whose first id is replaced by
 *           BOS; only ids behind the middle are scored
 * stride    pieces of N that begin every `stride` ids; each id is scored once,
 *           with as much context as there is
 * Remainders are dropped, but for stride. */
enum tve_protocol {
    TVE_WINDOWS = 0,
    TVE_GPTQ = 1,
    TVE_LLAMACPP = 2,
    TVE_STRIDE = 3,
    TVE_PROTOCOL_COUNT = 4
};
const char *tve_protocol_name(enum tve_protocol p);
/* 0, or -1 for an unknown name. */
int tve_protocol_from_name(const char *name, enum tve_protocol *p);
/* True when the protocol wants the post-processor's special tokens. */
bool tve_protocol_special(enum tve_protocol p);
/* Context when the user gives none: 512 for llamacpp, else
 * min(positions, 2048). */
size_t tve_protocol_context(enum tve_protocol p, size_t positions);

struct tve_ppl_options {
    enum tve_protocol protocol;
    size_t context; /* N; 0: tve_protocol_context */
    size_t stride;  /* TVE_STRIDE only; 0: half the context */
    int32_t bos;    /* -1: none */
};
struct tve_ppl {
    uint64_t n_tokens; /* in the text */
    uint64_t n_scored;
    size_t context;
    double nll_mean, ppl;
    double ppl_stderr; /* ppl times the standard error of nll_mean */
    double seconds;
};
/* Would it score them? Runs nothing. As tve_perplexity fails. */
TV_NODISCARD enum tv_err tve_perplexity_check(const tve_model *m,
                                              const int32_t *ids, size_t n_ids,
                                              const struct tve_ppl_options *opt,
                                              struct tv_error *err);
/* ids as the protocol wants them (tve_protocol_special). INPUT when the text is
 * too short for one window, USAGE for an impossible context. */
TV_NODISCARD enum tv_err tve_perplexity(tve_model *m, const int32_t *ids,
                                        size_t n_ids,
                                        const struct tve_ppl_options *opt,
                                        const struct tve_progress *progress,
                                        struct tve_ppl *out,
                                        struct tv_error *err);
#endif
