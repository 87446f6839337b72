/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/parse.h - bounds-safe parsers of untrusted files, over memory.
 *
 * What tv_input_open does with the bytes of one file, without the file: for
 * fuzzers, tests, and programs that have a file in memory. No parser reads
 * outside [data, data + n), executes anything, or allocates more than a small
 * multiple of n. `label` names the file in messages.
 *
 * Thread rule: pure functions; results belong to the caller.
 */
#ifndef TV_PARSE_H
#define TV_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"
#include "tv/hash.h"

#define TV_INDEX_FILES_MAX   4096u       /* shards of one model */
#define TV_INDEX_TENSORS_MAX (1u << 20)  /* tensors of one model */
#define TV_PICKLE_MAX        (32u << 20) /* bytes of data.pkl */
#define TV_PICKLE_NODES_MAX  (1u << 22)  /* values made by one pickle */
#define TV_PICKLE_STACK_MAX  (1u << 20)
#define TV_PICKLE_DEPTH_MAX  64u /* open marks, and tuples in tuples */

struct tv_parsed_tensor {
    char *name;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
    uint64_t stride[TV_RANK_MAX]; /* elements; row-major when contiguous */
    bool contiguous;
    uint64_t n_elems, bytes;
    uint64_t offset; /* absolute byte offset of element 0 */
    uint64_t span;   /* bytes from offset to the end of the last element */
};

struct tv_parsed_file {             /* owned: tv_parsed_free */
    struct tv_parsed_tensor *items; /* in file order (offset, then name) */
    size_t n;
    struct tv_hash header_digest; /* safetensors: of the first header_bytes;
                                     .bin: of the pickle */
    uint64_t header_bytes;        /* safetensors: 8 + header; .bin: 0 */
};
void tv_parsed_free(struct tv_parsed_file *p); /* NULL allowed */

/* A whole .safetensors file. CORRUPT names tensor and position. */
TV_NODISCARD enum tv_err tv_safetensors_parse(const void *data, uint64_t n,
                                              const char *label,
                                              struct tv_error *err,
                                              struct tv_parsed_file **out);
/* A whole torch.save zip file (pytorch_model.bin). UNSUPPORTED when built
 * without minizip. */
TV_NODISCARD enum tv_err tv_torch_parse(const void *data, uint64_t n,
                                        const char *label, struct tv_error *err,
                                        struct tv_parsed_file **out);

/* The pickle inside such a file: a flat dict of tensors. `find` gives the bytes
 * of storage `key` ([*offset, *offset + *bytes) of the file), false when there
 * is none. header_* of the result are left 0. */
typedef bool (*tv_storage_fn)(void *arg, const char *key, uint64_t *offset,
                              uint64_t *bytes);
TV_NODISCARD enum tv_err tv_pickle_parse(const void *data, size_t n,
                                         const char *label, tv_storage_fn find,
                                         void *arg, struct tv_error *err,
                                         struct tv_parsed_file **out);

/* model.safetensors.index.json and pytorch_model.bin.index.json. */
struct tv_index_entry {
    const char *name; /* tensor; borrowed from the index */
    size_t file;
};
struct tv_index { /* owned: tv_index_free */
    char **files; /* plain file names, sorted */
    size_t n_files;
    struct tv_index_entry *items; /* sorted bytewise by name */
    size_t n;
    void *storage;
};
/* `suffix` (".safetensors", ".bin"): what every file name must end with. */
TV_NODISCARD enum tv_err tv_index_parse(const char *data, size_t n,
                                        const char *label, const char *suffix,
                                        struct tv_error *err,
                                        struct tv_index **out);
void tv_index_free(struct tv_index *x); /* NULL allowed */

/* adapter_config.json. */
struct tv_lora_pattern {
    char *pattern; /* regular expression as written */
    double value;
    void *code; /* compiled */
    bool joint; /* see tv_lora_config.joint_patterns */
};
struct tv_lora_names {
    char **items;
    size_t n;
};
struct tv_lora_tokens { /* trainable_token_indices of one module */
    char *module;       /* NULL: the input embedding */
    uint64_t *ids;
    size_t n;
};
struct tv_lora_config { /* owned: tv_lora_config_free */
    char *label;        /* of its file, for messages */
    uint64_t r;
    double alpha;
    bool rslora, fan_in_fan_out, dora, lora_bias;
    bool bias; /* trained biases are in the file: all or lora_only */
    struct tv_lora_pattern *ranks, *alphas;
    size_t n_ranks, n_alphas;
    bool joint_patterns; /* PEFT before 0.14: one key is looked up in both */
    struct tv_lora_names saved;      /* modules_to_save */
    struct tv_lora_names parameters; /* target_parameters */
    struct tv_lora_tokens *tokens;
    size_t n_tokens;
};
/* UNSUPPORTED, naming the key, for every variant whose arithmetic is not one of
 * adapter.c's. */
TV_NODISCARD enum tv_err tv_lora_config_parse(const char *data, size_t n,
                                              const char *label,
                                              struct tv_error *err,
                                              struct tv_lora_config **out);
void tv_lora_config_free(struct tv_lora_config *c); /* NULL allowed */
/* Rank and alpha of one module: the first pattern that matches it, else the
 * global value. */
TV_NODISCARD enum tv_err tv_lora_config_for(const struct tv_lora_config *c,
                                            const char *module, uint64_t *r,
                                            double *alpha,
                                            struct tv_error *err);
#endif
