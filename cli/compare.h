/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compare.h - what the parts of tvmerge compare share.
 *
 *   cmd_compare.c      the command: place, lock, store, order of work
 *   compare_options.c  its command line
 *   compare_entries.c  what is compared
 *   compare_records.c  what is known of an entry
 *   compare_run.c      scores and merges
 *   compare_report.c   tables
 */
#ifndef TVC_COMPARE_H
#define TVC_COMPARE_H

#include "eval_options.h"
#include "status.h"
#include "tv/eval.h"
#include "tvmerge.h"

#define TVC_COMPARE_METHODS     "ties,dare_ties,sparsegpt_ties"
#define TVC_COMPARE_TEXTS_MAX   64u
#define TVC_COMPARE_METHODS_MAX 64u

enum keep { KEEP_ALL = 0, KEEP_BEST, KEEP_NONE };

struct compare_opts {
    struct tvm_options options;
    struct tvc_eval_opts eval;
    const char *out, *store_path;
    const char *texts[TVC_COMPARE_TEXTS_MAX];
    size_t n_texts;
    /* For calibration. No memory of the heap here: nothing runs after an
     * option that is wrong. */
    struct tvm_text tasks[TVC_COMPARE_TEXTS_MAX];
    char task_names[TVC_COMPARE_TEXTS_MAX][256];
    size_t n_tasks;
    char method_list[4096]; /* cut at its commas */
    struct wanted {
        const char *method, *sparsify; /* NULL: as the recipe says */
    } methods[TVC_COMPARE_METHODS_MAX];
    size_t n_methods;
    enum keep keep;
    bool store_given;
    bool default_methods; /* nobody asked for others */
};

enum entry_kind { ENTRY_BASE = 0, ENTRY_DONOR, ENTRY_MERGE };

struct entry { /* a line of the table */
    enum entry_kind kind;
    char *name;            /* of its record, and of a merge's directory */
    char *dir;             /* of a merge, else NULL */
    char *ref;             /* of a model, else NULL */
    char *method;          /* of a merge */
    const char *recipe;    /* borrowed from the command line */
    const char *as_method; /* merge_method instead of the recipe's, or NULL */
    const char *as_sparsify;
    bool random;    /* calibrated with random tokens */
    bool keeps_all; /* named after a way to sparsify, but density is 1 */
    struct tv_hash plan, key;
    json_t *record; /* NULL: nothing is known yet */
};

struct tvc_compare {
    struct tvc *c;
    struct compare_opts *opts;
    struct tvm_problems problems;
    char *state; /* OUT/.tvcompare */
    char *base;  /* ref of the base model, NULL when there is none */
    int lock;
    bool has_plain, oom;
    char device[128]; /* the GPU that scores, "" for none */
    struct entry *entries;
    size_t n_entries, n_donors;
    char **text;         /* [n_texts] */
    struct tve_ids *ids; /* [n_texts] of the tokenizer ids_of; NULL: none yet */
    struct tv_hash ids_of;
    tv_store *shared; /* ours, in OUT/.tvcompare; NULL: a given one, or none */
    size_t *text_bytes;
    struct tv_hash *text_hash;
};

extern const struct argp_option tvc_compare_options[];
void tvc_compare_init(struct tvc *c);
error_t tvc_compare_option(struct tvc *c, int key, const char *arg);
/* Adds a list of methods separated by commas; USAGE for unknown ones. */
TV_NODISCARD enum tv_err tvc_compare_methods(struct tvc *c, const char *list);
/* What must not be missing, and what does not go together. USAGE. */
TV_NODISCARD enum tv_err tvc_compare_check(struct tvc *c);

enum tv_err tvc_compare_oom(struct tvc *c);

/* Plans everything: p->entries, p->problems. */
TV_NODISCARD enum tv_err tvc_compare_collect(struct tvc_compare *p);
/* The plan of an entry; problems are in m->problems and give TV_OK. */
TV_NODISCARD enum tv_err tvc_compare_plan(struct tvc_compare *p,
                                          const struct entry *e, uint64_t quota,
                                          struct tvc_merge *m);

/* What an earlier run found out, into e->record. CHANGED when it was about
 * something else. */
TV_NODISCARD enum tv_err tvc_record_load(struct tvc_compare *p,
                                         struct entry *e);
TV_NODISCARD enum tv_err tvc_record_save(struct tvc_compare *p,
                                         struct entry *e);
/* Leaves the list of all entries for tvmerge status. */
TV_NODISCARD enum tv_err tvc_records_list(struct tvc_compare *p);
/* Sets a member; takes the reference. */
void tvc_record_put(struct tvc_compare *p, struct entry *e, const char *key,
                    json_t *value);
bool tvc_record_has(const struct entry *e, const char *key);

/* Can the models be scored at all, on these texts? Before hours are spent on
 * merging. */
TV_NODISCARD enum tv_err tvc_compare_models(struct tvc_compare *p);
void tvc_compare_ids_free(struct tvc_compare *p);
/* Does what is not done yet. */
TV_NODISCARD enum tv_err tvc_compare_all(struct tvc_compare *p);
/* The best merge so far, NULL when there is none. */
struct entry *tvc_compare_best(struct tvc_compare *p);

/* A document as text [n], owned; NULL when out of memory. */
char *tvc_compare_text(const json_t *doc, size_t *n);
/* Writes OUT/compare.md and compare.json, prints one of them. */
TV_NODISCARD enum tv_err tvc_compare_report(struct tvc_compare *p,
                                            const struct entry *best);

#endif
