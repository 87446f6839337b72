/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/format.h - model files: references, readers, adapters, writers, import
 * and export.
 *
 * A tv_input is one opened model or adapter, wherever it lives: a Hugging Face
 * directory (safetensors single or sharded, or pytorch_model.bin), a single
 * file, or an object of a store. Opening reads headers only. Everything found
 * in a file is hostile until checked; limits below are refused with CORRUPT
 * and a message that names file and tensor.
 *
 * Thread rule: a tv_input is immutable after opening; tv_input_view and
 * tv_input_release may be called from any thread.
 */
#ifndef TV_FORMAT_H
#define TV_FORMAT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"
#include "tv/hash.h"
#include "tv/store.h"
#include "tv/view.h"

#define TV_ST_HEADER_MAX  (32u << 20) /* bytes of a safetensors header */
#define TV_ST_TENSORS_MAX (1u << 18)  /* tensors per file */
#define TV_JSON_MAX       (64u << 20) /* bytes of any JSON side file */
#define TV_JSON_DEPTH_MAX 64u         /* nesting of JSON we accept */

/* ---- references ------------------------------------------------------------
 * PART[@REV][+ADAPTER[@REV][*WEIGHT]]...; cli.md, 'A model reference is':
 * store:NAME, else the whole string as an existing path, else split at + and @,
 * else ORG/NAME in the local Hugging Face cache. Resolution does not open
 * anything. */
struct tv_ref_part {
    char *text;     /* as written, without @REV and *WEIGHT */
    char *revision; /* NULL when none */
    double weight;  /* adapters: factor, 1 when not written */
    char *path;     /* resolved file or directory; NULL for store:NAME */
    char *object;   /* NAME of store:NAME, else NULL */
};
struct tv_ref { /* owned: tv_ref_free */
    char *text; /* the whole reference as written */
    struct tv_ref_part model;
    struct tv_ref_part *adapters;
    size_t n_adapters;
};
/* INPUT (exit 4) when a part is found nowhere, with where it was looked for
 * and, for hub names, the hint `hf download ORG/NAME`; USAGE when malformed. */
TV_NODISCARD enum tv_err tv_ref_resolve(const char *text, struct tv_error *err,
                                        struct tv_ref **out);
void tv_ref_free(struct tv_ref *r);

/* ---- inputs ---------------------------------------------------------------
 */

typedef struct tv_input tv_input;

struct tv_input_tensor { /* borrowed from the input */
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
    uint64_t n_elems, bytes;
    bool contiguous; /* false: strided in a .bin; its view is a copy */
    bool linked;     /* a store's entry for bytes of a file outside */
    bool checksum_known;
    struct tv_hash checksum;
    size_t file;     /* index for tv_input_file (file inputs) */
    uint64_t offset; /* absolute byte offset in that file */
};

struct tv_input_file { /* borrowed from the input */
    const char *path;  /* absolute */
    uint64_t bytes, mtime_ns, inode;
    struct tv_hash header_digest;
    uint64_t header_bytes; /* 0 for .bin */
};

/* Opens a model: PART.path or, for PART.object, the object of `store` (may be
 * NULL when not needed). Directories: index.json wins over a single file,
 * safetensors over .bin; a directory with adapter_config.json is an adapter. */
TV_NODISCARD enum tv_err tv_input_open(const struct tv_ref_part *part,
                                       tv_store *store, struct tv_error *err,
                                       tv_input **out);
/* The same for a plain path. */
TV_NODISCARD enum tv_err
tv_input_open_path(const char *path, struct tv_error *err, tv_input **out);
void tv_input_close(tv_input *in);
/* From here on a stored object is read from one snapshot, so that it may be
 * removed meanwhile. That keeps every page which the store frees from being
 * used again: pins (tv_object_hold) are better where they can be had. */
TV_NODISCARD enum tv_err tv_input_freeze(tv_input *in, struct tv_error *err);

enum tv_kind tv_input_kind(const tv_input *in);
const char *tv_input_label(const tv_input *in);  /* for messages */
bool tv_input_is_store(const tv_input *in);      /* an object of a store */
uint64_t tv_input_object_id(const tv_input *in); /* 0 for files */
const char *tv_input_dir(const tv_input *in);    /* NULL for store objects */
size_t tv_input_count(const tv_input *in);
/* Tensors in layer order (tv_name_compare). */
const struct tv_input_tensor *tv_input_tensor(const tv_input *in, size_t i);
/* By name, O(log n); NULL when absent. */
const struct tv_input_tensor *tv_input_find(const tv_input *in,
                                            const char *name);
size_t tv_input_file_count(const tv_input *in);
const struct tv_input_file *tv_input_file(const tv_input *in, size_t i);

/* A view of one tensor; release it before closing the input. For strided .bin
 * tensors the view is an owned copy of t->bytes. */
TV_NODISCARD enum tv_err tv_input_view(tv_input *in,
                                       const struct tv_input_tensor *t,
                                       struct tv_error *err,
                                       struct tv_view *out);
void tv_input_release(tv_input *in, struct tv_view *v); /* zeroed view: no-op */

/* Side files (config.json, tokenizer*, ...): names, then bytes. */
size_t tv_input_side_count(const tv_input *in);
const char *tv_input_side_name(const tv_input *in, size_t i);
/* Owned bytes (tv_free), NUL-terminated; *found false when there is none. */
TV_NODISCARD enum tv_err tv_input_side_read(tv_input *in, const char *name,
                                            bool *found, char **data, size_t *n,
                                            struct tv_error *err);
/* Fingerprint (design.md): files: size, mtime_ns, inode, header digest; store
 * objects: tensor names and checksums. Side files are covered by content of
 * config.json and adapter_config.json. */
TV_NODISCARD enum tv_err tv_input_fingerprint(tv_input *in, struct tv_hash *out,
                                              struct tv_error *err);
/* The same for the contents of one tensor (its name does not count): checksum
 * of an inline tensor of a store, else the file it lies in and the place there.
 */
TV_NODISCARD enum tv_err
tv_input_tensor_identity(tv_input *in, const struct tv_input_tensor *t,
                         struct tv_hash *out, struct tv_error *err);
/* Are the files that it was opened from, or that its linked tensors lie in, the
 * ones that they were (size, mtime_ns, inode)? CORRUPT names the first that is
 * not. */
TV_NODISCARD enum tv_err tv_input_unchanged(tv_input *in, struct tv_error *err);
/* Reads everything and gives the model digest of tv/hash.h; CORRUPT when a
 * checksum that is known does not match. */
TV_NODISCARD enum tv_err tv_input_digest(tv_input *in, struct tv_hash *out,
                                         struct tv_error *err);

/* ---- adapters --------------------------------------------------------------
 * PEFT LoRA as a list of changes, each of one base tensor W:
 *
 *   LOW_RANK  W + s B A for [out, in] weights, its transpose where the base is
 *             stored [in, out] (fan_in_fan_out, embeddings), per expert for
 *             stacked experts; s = alpha/r, or alpha/sqrt(r) with use_rslora,
 *             by rank and alpha patterns. With a magnitude m (DoRA) every
 *             output row of that sum is scaled to the norm m.
 *   ADD       W + s a                      (lora_bias)
 *   REPLACE   a                            (modules_to_save, trained biases)
 *   ROWS      a[i] in the place of row rows[i]  (trainable tokens)
 *
 * Several changes of one tensor by one adapter apply in this order: REPLACE,
 * ROWS, ADD, LOW_RANK. What is not handled is refused by name. */
typedef struct tv_adapter tv_adapter;

enum tv_change_kind {
    TV_CHANGE_REPLACE = 0,
    TV_CHANGE_ROWS = 1,
    TV_CHANGE_ADD = 2,
    TV_CHANGE_LOW_RANK = 3
};
struct tv_adapter_module { /* one change */
    const char *module;    /* "model.layers.0.self_attn.q_proj" */
    const char *target;    /* name looked for in the base: module + ".weight" */
    enum tv_change_kind kind;
    const struct tv_input_tensor *a, *b;     /* LOW_RANK: (r, in), (out, r) with
                                              * further dimensions of the input
                                              * folded into `in`; else a alone */
    const struct tv_input_tensor *magnitude; /* DoRA: (out), else NULL */
    uint64_t r, in_features, out_features;   /* LOW_RANK */
    uint64_t n_experts; /* LOW_RANK on stacked experts: A is (r*E, in) with the
                         * expert outermost, B (out, r*E) with it innermost;
                         * else 0 */
    double alpha, scaling;
    bool transposed; /* base stored [in, out]; of experts: tv_adapter_turned */
    const uint64_t *rows; /* ROWS */
    size_t n_rows;
};
/* A change with the factor that a reference gives it. */
struct tv_adapter_use {
    const struct tv_adapter_module *module;
    tv_input *from; /* owns the change's tensors */
    double weight;  /* of the reference; W + weight * (changed W - W) */
};
TV_NODISCARD enum tv_err tv_adapter_open(tv_input *in, struct tv_error *err,
                                         tv_adapter **out); /* borrows in */
void tv_adapter_close(tv_adapter *a);
tv_input *tv_adapter_input(const tv_adapter *a);
/* Changes in layer order. */
size_t tv_adapter_count(const tv_adapter *a);
const struct tv_adapter_module *tv_adapter_module(const tv_adapter *a,
                                                  size_t i);
/* Which base tensor each change is of: targets[i] = index of the tensor in
 * `base` (longest suffix match of the change's target). INPUT (exit 4) naming
 * the module when one has no target or the shapes do not fit. */
TV_NODISCARD enum tv_err tv_adapter_bind(const tv_adapter *a,
                                         const tv_input *base, size_t *targets,
                                         struct tv_error *err);
/* Is the change's product stored transposed, [in, out], in this base tensor?
 * Only of tensors that tv_adapter_bind found to fit. */
bool tv_adapter_turned(const struct tv_adapter_module *m,
                       const struct tv_input_tensor *base);

/* ---- safetensors writing ---------------------------------------------------
 */

struct tv_st_entry {
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    const uint64_t *shape;
    uint64_t bytes;
    size_t shard;    /* filled by tv_shards_plan */
    uint64_t offset; /* filled: absolute byte offset in the shard file */
};
struct tv_shards { /* owned: tv_shards_free */
    size_t n;
    char **file_names; /* final names: model.safetensors or model-0000x-of */
    char **headers;    /* bytes at the start of each file */
    size_t *header_bytes;
    uint64_t *file_bytes; /* whole size of each file */
    char *index_json;     /* NULL for one shard */
    size_t index_bytes;
    uint64_t total_bytes; /* tensor bytes */
};
/* Lays entries out in the order given: a new shard starts when the next tensor
 * would pass max_shard_bytes (0: 5 GB); a larger tensor has its own. Stem is
 * "model" or "adapter_model". */
TV_NODISCARD enum tv_err tv_shards_plan(struct tv_st_entry *entries, size_t n,
                                        const char *stem,
                                        uint64_t max_shard_bytes,
                                        struct tv_error *err,
                                        struct tv_shards **out);
void tv_shards_free(struct tv_shards *s);

/* ---- JSON ------------------------------------------------------------------
 * Parses an object (limits as above; UTF-8; duplicate keys refused): CORRUPT
 * with label, or NOMEM. NaN and Infinity, as Python writes them, become strings
 * that are no numbers to anybody. The only way to parse: jansson's own parser
 * goes wrong without memory instead of failing. json_decref(*out) of jansson.
 */
struct json_t;
TV_NODISCARD enum tv_err tv_json_parse(const char *data, size_t n,
                                       const char *label, struct tv_error *err,
                                       struct json_t **out);
/* The same for a document that is to be written again: numbers that jansson
 * would round or refuse (fractions, exponents, more than 18 digits) stand in
 * the tree as strings that only tv_json_write_exact understands. */
TV_NODISCARD enum tv_err tv_json_parse_exact(const char *data, size_t n,
                                             const char *label,
                                             struct tv_error *err,
                                             struct json_t **out);
/* Text of a value, flags of jansson's encoder: owned (tv_free), NUL-terminated;
 * NULL when out of memory. The only way to write: jansson's own functions leave
 * out the name of a key whose memory could not be had, and go on. */
char *tv_json_text(const struct json_t *json, size_t flags);
/* Owned text (tv_free), NUL-terminated, indented by two, a newline behind. */
TV_NODISCARD enum tv_err tv_json_write_exact(const struct json_t *json,
                                             struct tv_error *err, char **out,
                                             size_t *n_out);

/* ---- JSON edits ------------------------------------------------------------
 * Changes top-level keys of a JSON document and keeps the rest; numbers stay as
 * they are written. With no effective change the bytes come back as they were.
 */
enum tv_edit_kind { TV_EDIT_INT, TV_EDIT_STRING, TV_EDIT_BOOL, TV_EDIT_REMOVE };
struct tv_json_edit {
    const char *key;
    enum tv_edit_kind kind;
    int64_t i;
    const char *s;
    bool only_if_present;
};
TV_NODISCARD enum tv_err tv_json_edit(const char *data, size_t n,
                                      const struct tv_json_edit *edits,
                                      size_t n_edits, struct tv_error *err,
                                      char **out, size_t *n_out);

/* ---- output directories --------------------------------------------------
 * May an output go to `dir`, whatever --force says? EXISTS when it is no
 * directory, or lies below a file, or is a store, or in one, or a comparison.
 * *exists: it is there. */
TV_NODISCARD enum tv_err tv_out_dir_check(const char *dir, struct tv_error *err,
                                          bool *exists);
/* INPUT when tensors of the store (NULL: none) lie in files of `dir`. */
TV_NODISCARD enum tv_err tv_out_dir_links(const char *dir, tv_store *store,
                                          struct tv_error *err);
/* Of any model or adapter: what loads them would take these files for a part of
 * another one in the same directory. Weights include their index. */
bool tv_out_is_config(const char *name);
bool tv_out_is_weights(const char *name);

/* ---- import and export ------------------------------------------------------
 * Progress: bytes done of total; cancel is polled between tensors (may be
 * NULL): INTERRUPTED, resumable. */
struct tv_transfer {
    bool link, force;
    uint64_t shard_bytes; /* export; 0: 5 GB */
    unsigned lock_timeout_ms;
    bool sync; /* export: fsync outputs */
    tv_bytes_fn progress;
    void *progress_arg;
    const atomic_int *cancel;
    /* results */
    size_t n_tensors, n_resumed;
    uint64_t bytes, bytes_shared; /* shared: already stored */
};
/* Copies (or links) a model or adapter into the store under `name`, tensors of
 * content that is there already once; `link`: only safetensors. A name that is
 * half there, of the same source, is gone on with. Takes the store's lock:
 * LOCKED. EXISTS for a name that is there without `force`, UNSUPPORTED for what
 * cannot be linked, CHANGED when the source is not what a half import began
 * with, NOSPACE (the message names a quota that is enough), CORRUPT. */
TV_NODISCARD enum tv_err tv_import(tv_store *s, const char *name,
                                   tv_input *from, struct tv_transfer *t,
                                   struct tv_error *err);
/* Writes an object as a model or adapter directory: tensors and side files byte
 * for byte, what makes it loadable last. NOTFOUND; EXISTS for a directory that
 * is not empty without `force`; CORRUPT names a tensor whose checksum does not
 * match. Several at once are fine. */
TV_NODISCARD enum tv_err tv_export(tv_store *s, const char *name,
                                   const char *dir, struct tv_transfer *t,
                                   struct tv_error *err);
#endif
