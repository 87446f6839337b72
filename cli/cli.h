/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cli.h - what the commands of all three tools share: the command table, the
 * common options, exit statuses.
 *
 * A tool is a table of commands; tvc_main parses, sets up and calls one. A
 * command gets its positional arguments in pos[] (count already checked), its
 * own options in the struct behind opt, and returns its exit status, mostly
 * through tvc_done or tvc_fail.
 */
#ifndef TVC_CLI_H
#define TVC_CLI_H

#include <argp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "print.h"
#include "tv/cuda.h"
#include "tv/error.h"
#include "tv/kernels.h"

struct tvc;

struct tvc_command {
    const char *name, *summary;
    const char *args_doc;              /* "STORE [NAME]" */
    const char *text;                  /* more help, may be NULL */
    const char *examples;              /* one per line, without indent */
    const struct argp_option *options; /* own ones, NULL: none */
    size_t opt_bytes;                  /* struct behind tvc.opt, zeroed */
    void (*init)(struct tvc *c);       /* sets defaults; may be NULL */
    /* One own option. 0, ARGP_ERR_UNKNOWN, or tvc_bad (c->err filled). */
    error_t (*option)(struct tvc *c, int key, const char *arg);
    size_t min_pos, max_pos;
    bool cancellable; /* polls tvc_cancel_flag: see signals.h */
    int (*run)(struct tvc *c);
};

struct tvc_tool {
    const char *name, *summary;
    const struct tvc_command *const *commands;
    size_t n_commands;
    /* "TOOL ARGS" without a command means this one when is_short says so of
     * the first argument; NULL: no short form. */
    const struct tvc_command *short_form;
    bool (*is_short)(const char *arg);
    const char *short_usage; /* "RECIPE OUT [OPTION...]" */
    const char *examples;
};

enum tvc_device { TVC_DEVICE_AUTO = 0, TVC_DEVICE_CPU, TVC_DEVICE_CUDA };

struct tvc {
    struct tvc_print out;
    const struct tvc_tool *tool;
    const struct tvc_command *cmd;
    int argc; /* the whole command line, as typed */
    char **argv;
    const char **pos;
    size_t n_pos;
    void *opt;
    unsigned threads; /* 0: the cores we may use */
    uint64_t memory_bytes;
    enum tvc_device device;
    int device_index;             /* of TVC_DEVICE_CUDA */
    uint64_t device_memory_bytes; /* --device-memory; 0: 80% of what is free */
    uint64_t device_factor_bytes; /* what a run goes by that goes on; or 0 */
    tvk_cuda *cuda;               /* opened by tvc_device_open or _for */
    bool auto_tried;              /* --device auto has looked for one */
    const struct tvk_table *kernels; /* capped by TV_CPU */
    struct tv_error err;
    /* private to args.c */
    const struct tvc_command *parsing;
    int command_at; /* index of the command's name */
    int stopped_at; /* where argp was when it gave up */
    bool want_help, want_usage, want_version;
};

int tvc_main(const struct tvc_tool *tool, int argc, char **argv);

/* ---- for option callbacks ---------------------------------------------------
 */

/* Fills c->err with USAGE and returns the error_t to hand on. */
error_t tvc_bad(struct tvc *c, const char *fmt, ...) TV_PRINTF(2, 3);
/* Index of arg in words; -1 with c->err set when it is none of them. */
int tvc_choose(struct tvc *c, const char *what, const char *arg,
               const char *const *words, size_t n);
/* Parsers of option values; messages name the option. */
error_t tvc_parse_size(struct tvc *c, const char *option, const char *arg,
                       bool mergekit_b, uint64_t *out);
/* Of --out-shard-size; 0 is no limit, as for mergekit. */
/* A size; "none" and 0 are no quota. */
error_t tvc_parse_quota(struct tvc *c, const char *option, const char *arg,
                        uint64_t *out);
error_t tvc_parse_shard(struct tvc *c, const char *arg, uint64_t *out);
error_t tvc_parse_u64(struct tvc *c, const char *option, const char *arg,
                      uint64_t max, uint64_t *out);
/* Seconds, also "500ms"; at most a day. */
error_t tvc_parse_ms(struct tvc *c, const char *option, const char *arg,
                     unsigned *ms);

/* ---- exit statuses
 * ------------------------------------------------------------ */

/* The one table from error codes to exit statuses (tv/error.h). */
int tvc_exit_status(enum tv_err code);
/* Prints e and gives its status. */
int tvc_fail(struct tvc *c, const struct tv_error *e);
/* Prints c->err (INTERRUPTED) and how to go on; gives its status. */
int tvc_interrupted(struct tvc *c);
/* Flushes stdout; gives `status`, or 1 when output was lost. */
int tvc_done(struct tvc *c, int status);

/* The command line, quoted for a shell; owned, NULL when out of memory. */
char *tvc_command_line(const struct tvc *c);
/* --version. */
void tvc_version(struct tvc *c);
/* Worker threads: --threads, else the cores we may use. */
unsigned tvc_threads(const struct tvc *c);
/* The CUDA device that --device cuda means, opened by the first call; borrowed
 * until the command ends. Else *out is the one of tvc_device_for, or NULL. */
TV_NODISCARD enum tv_err tvc_device_open(struct tvc *c, tvk_cuda **out);
/* The same for matrix work and forward passes on n_elems parameters, which auto
 * too gives to a GPU: where there is one that computes what it should, with a
 * GiB of memory, and the work is more than its start (TV_CUDA_LEAST=0: always).
 * Fails (c->err filled) only where one was asked for. */
TV_NODISCARD enum tv_err tvc_device_for(struct tvc *c, uint64_t n_elems,
                                        tvk_cuda **out);
/* The kernel table for element-wise work: the GPU's with --device cuda, else
 * the CPU's (auto too: moving the data costs more than the CPU's work). */
TV_NODISCARD enum tv_err tvc_device_kernels(struct tvc *c,
                                            const struct tvk_table **out);
/* Its name, "cpu" or "cuda:N", once it is known. Filled. */
void tvc_device_name(const struct tvc *c, char *dst, size_t cap);
/* TV_STORE, NULL when unset or empty. */
const char *tvc_default_store(void);

#endif
