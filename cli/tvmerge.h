/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tvmerge.h - the commands of tvmerge, and the options that run and plan
 * share.
 */
#ifndef TVC_TVMERGE_H
#define TVC_TVMERGE_H

#include "cli.h"
#include "tv/merge.h"
#include "tv/stages.h"

extern const struct tvc_command tvc_cmd_run, tvc_cmd_plan, tvc_cmd_status,
    tvc_cmd_methods, tvc_cmd_extract, tvc_cmd_layers, tvc_cmd_compare;

struct tvc_merge_opts {
    struct tvm_options options; /* store and kernels are set by _prepare */
    const char *store_path;     /* --store, else TV_STORE */
    bool store_given;
    const char *ignored[24]; /* mergekit's flags that change nothing here */
    size_t n_ignored;
    unsigned refused; /* bits: of mergekit's that are not taken */
    bool cuda_wanted;
    bool peft;                  /* --compat peft */
    struct tvm_text texts[128]; /* names owned: tvc_merge_opts_free */
    size_t n_texts;
    const char *stages_dir; /* --intermediate-dir, NULL: beside OUT */
};
extern const struct argp_option tvc_merge_options[];
void tvc_merge_init(struct tvc *c);
error_t tvc_merge_option(struct tvc *c, int key, const char *arg);
/* Checks the combination, opens the store, completes options; for plan,
 * neither OUT nor --into is needed. USAGE, NOTFOUND, ... The store is closed by
 * the caller (options.store). */
TV_NODISCARD enum tv_err tvc_merge_prepare(struct tvc *c, bool planning);

/* --text NAME=FILE */
error_t tvc_option_text(struct tvc *c, const char *arg);
void tvc_merge_opts_free(struct tvc_merge_opts *o);

/* The recipe and plan of a command line, with everything found wrong. */
struct tvc_merge {
    struct tvm_problems problems;
    tvm_recipe *recipe;
    struct tvm_plan *plan;     /* of the output, the stages' if there are any */
    struct tvm_stages *stages; /* of a file of several documents, else NULL */
};
/* Loads and plans. Problems of recipe and inputs are in m->problems and give
 * TV_OK; other failures are in c->err. */
TV_NODISCARD enum tv_err tvc_merge_plan(struct tvc *c, struct tvc_merge *m);
void tvc_merge_free(struct tvc_merge *m);

/* A recipe whose output is an adapter is run or planned here: *handled, and
 * *status the exit status. */
TV_NODISCARD enum tv_err tvc_adapters(struct tvc *c, bool planning,
                                      bool *handled, int *status);
json_t *tvc_adapter_result_json(const char *schema, const char *out,
                                const struct tvm_result *r);
void tvc_adapter_summary(struct tvc *c, const char *out,
                         const struct tvm_result *r);

/* [{"name","method","dir","tensors","bytes","made"}] of the documents before
 * the output; NULL when the recipe is one document. New reference. */
json_t *tvc_stages_json(const struct tvc_merge *m);

/* Warnings and errors on stderr (nothing with --json); notes: those too that
 * only a plan shows. */
void tvc_problems_print(struct tvc *c, const struct tvm_problems *p,
                        bool notes);
/* [{"severity","where","message","code","note"}]; warnings or all. New
 * reference. */
json_t *tvc_problems_json(const struct tvm_problems *p, bool notes);
/* Adds what was found out about OUT, if that is an error, and clears it. */
void tvc_place_problem(struct tvm_problems *p, enum tv_err rc,
                       struct tv_error *e);
/* Prints the verdict on a list with errors; gives the exit status. */
int tvc_problems_fail(struct tvc *c, const struct tvm_problems *p);

#endif
