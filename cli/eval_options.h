/* SPDX-License-Identifier: Apache-2.0 */
/*
 * eval_options.h - options of everything that scores or runs a model over text:
 * one row each, for tveval ppl, calibrate, tokenize and tvmerge compare.
 *
 * A command lists the rows that it has in its own array of options, keeps a
 * struct tvc_eval_opts, and gives keys that it does not know to
 * tvc_eval_option.
 */
#ifndef TVC_EVAL_OPTIONS_H
#define TVC_EVAL_OPTIONS_H

#include "cli.h"
#include "tv/eval.h"

struct tvc_eval_opts {
    struct tve_ppl_options ppl; /* bos -2: not given */
    const char *tokenizer;      /* NULL: the model's own */
};

enum {
    TVC_KEY_PROTOCOL = 0x2300,
    TVC_KEY_CONTEXT,
    TVC_KEY_STRIDE,
    TVC_KEY_TOKENIZER,
    TVC_KEY_BOS
};

/* How a text is cut and scored. */
#define TVC_OPTIONS_PROTOCOL(group)                                            \
    {"protocol",                                                               \
     TVC_KEY_PROTOCOL,                                                         \
     "NAME",                                                                   \
     0,                                                                        \
     "windows (default), gptq, llamacpp or stride",                            \
     group},                                                                   \
        {"context",                                                            \
         TVC_KEY_CONTEXT,                                                      \
         "N",                                                                  \
         0,                                                                    \
         "Tokens of a window (default: the model's limit, at most 2048; 512 "  \
         "for llamacpp)",                                                      \
         group},                                                               \
    {                                                                          \
        "stride", TVC_KEY_STRIDE, "N", 0,                                      \
            "Protocol stride: tokens between windows (default: half the "      \
            "context)",                                                        \
            group                                                              \
    }
#define TVC_OPTION_TOKENIZER(group)                                            \
    {                                                                          \
        "tokenizer", TVC_KEY_TOKENIZER, "PATH", 0,                             \
            "tokenizer.json or a directory with one, instead of the model's",  \
            group                                                              \
    }
#define TVC_OPTION_BOS(group)                                                  \
    {                                                                          \
        "bos", TVC_KEY_BOS, "ID|none", 0, "Token that begins each window",     \
            group                                                              \
    }

void tvc_eval_init(struct tvc_eval_opts *o);
/* One of the above; ARGP_ERR_UNKNOWN for others. */
error_t tvc_eval_option(struct tvc *c, int key, const char *arg,
                        struct tvc_eval_opts *o);
/* A number from 1 on. */
error_t tvc_parse_count(struct tvc *c, const char *option, const char *arg,
                        size_t *out);
#endif
