/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tveval.h - the commands of tveval, and opening what they evaluate.
 */
#ifndef TVC_TVEVAL_H
#define TVC_TVEVAL_H

#include "cli.h"
#include "tv/eval.h"
#include "tv/format.h"
#include "tv/store.h"

extern const struct tvc_command tvc_cmd_ppl, tvc_cmd_logits, tvc_cmd_tokenize,
    tvc_cmd_calibrate;

/* A model reference, opened with its adapters. */
struct tvc_subject {
    struct tv_ref *ref;
    tv_store *store; /* owned; NULL: none needed, or borrowed */
    tv_input *input;
    tv_input **adapter_inputs; /* [ref->n_adapters] */
    struct tve_model_adapter *adapters;
    size_t n_adapters;
    tv_store *kept_in; /* where `kept` are pinned; borrowed */
    uint64_t *kept;    /* objects */
    size_t n_kept;
};
/* store: --store, NULL takes TV_STORE. Reads headers only. */
TV_NODISCARD enum tv_err tvc_subject_open(struct tvc *c, const char *text,
                                          const char *store,
                                          struct tvc_subject *s);
/* The same in a store that is open already: borrowed. */
TV_NODISCARD enum tv_err tvc_subject_open_in(struct tvc *c, const char *text,
                                             tv_store *store,
                                             struct tvc_subject *s);
void tvc_subject_close(struct tvc_subject *s);
/* The model of a subject, with the options of the command line. */
TV_NODISCARD enum tv_err tvc_subject_model(struct tvc *c, struct tvc_subject *s,
                                           tve_model **out);
/* After work: a note where a device could not do all of it. */
void tvc_subject_told(struct tvc *c, const tve_model *model);
/* Before work on windows of n ids: opens the model anew with fewer threads
 * where --memory is too little for all; BUDGET, with the number, where it is
 * too little for one. */
TV_NODISCARD enum tv_err tvc_subject_fit(struct tvc *c, struct tvc_subject *s,
                                         enum tve_pass pass, size_t n,
                                         tve_model **model);

/* INPUT when it is an adapter alone, which nothing can run. */
TV_NODISCARD enum tv_err tvc_subject_runs(struct tvc *c,
                                          const struct tvc_subject *s);

/* A file of text, owned; "-": stdin. */
TV_NODISCARD enum tv_err tvc_text_read(const char *path, char **text, size_t *n,
                                       struct tv_error *err);

/* --bos ID|none into *bos: -1 none, -2 when it was not given. */
error_t tvc_parse_bos(struct tvc *c, const char *arg, int32_t *bos);

struct tvc_ids { /* integers of an .npy file; tvc_ids_free */
    int32_t *ids;
    size_t batch, seq; /* a vector is one batch */
    bool rows;         /* two dimensions */
};
/* int64 or int32, C order, at most two dimensions. CORRUPT, INPUT. */
TV_NODISCARD enum tv_err tvc_ids_read(const char *path, struct tvc_ids *out,
                                      struct tv_error *err);
void tvc_ids_free(struct tvc_ids *ids);

#define TVC_NPY_HEADER 128u
/* What stands in front of a numpy array in C order, padded with spaces. descr:
 * "<f4", "<f8"; at most 3 dimensions. */
void tvc_npy_header(char dst[TVC_NPY_HEADER], const char *descr,
                    const size_t *shape, size_t n_dims);

/* tve_progress that feeds a progress bar (struct tvc_progress *). */
void tvc_eval_step(void *arg, uint64_t done, uint64_t total);

#endif
