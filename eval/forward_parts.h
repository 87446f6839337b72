/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward_parts.h - a batch of windows on its way through a model, and what the
 * files of the forward pass know of it (private to forward*.c but
 * forward_cuda.c).
 *
 *   forward.c         the steps: embedding, layers, what the head takes
 *   forward_batch.c   which windows, and the memory for them
 *   forward_walk.c    all windows, one layer after the other
 *   forward_output.c  losses and logits
 *
 * Windows are put into groups (consecutive, equally long, about 2,048 rows) and
 * groups into batches that fit the memory budget. Only batches depend on the
 * budget, and no arithmetic depends on batches.
 *
 *   rows of a batch     h  [rows, hidden]   residual stream
 *                       x  [rows, wide]     input of a block
 *                       y  [rows, wide]     its output
 *                       s  [rows, space]    q, k, v and heads' outputs, or the
 *                                           inner activations of the MLP
 * One block of memory holds all four; a group that exceeds the budget gets it
 * from an unlinked scratch file. With a CUDA device they lie there, if a group
 * has room.
 */
#ifndef TVE_FORWARD_PARTS_H
#define TVE_FORWARD_PARTS_H

#include "tv/calibrate.h"

#include "decoder.h"

#define TVE_GROUP_ROWS 2048u
#define TVE_BATCH_ROWS 65536u

struct tve_batch {
    tve_model *m;
    const struct tve_spec *spec;
    const struct tve_window *windows;
    size_t n_windows, rows;
    size_t *starts;     /* [n_windows + 1] */
    uint32_t *position; /* [rows] */
    int32_t *ids;       /* [rows] */
    struct tve_group *groups;
    size_t n_groups;
    size_t wide, qkv_width, head_width, inner_width, space;
    float *memory;
    size_t memory_bytes;
    bool mapped;
    bool is_there; /* on the device: so are h, x, y and s */
    struct tve_batch_there there;
    float *h, *x, *y, *s;
    size_t longest;
    float *cos_rows[2], *sin_rows[2]; /* [longest, pairs] */
    float *slopes;
    /* what the row work at hand uses */
    const float *w, *b, *w2;
    const float *from;
    float *to;
    size_t n, ld;
    const struct tve_rows *table; /* of embeddings or positions */
    size_t layer;
    const struct tve_tap *tap; /* NULL: nobody looks at inputs */
};

/* Where a batch may be. */
enum tve_place {
    TVE_ANYWHERE, /* on the device, else here */
    TVE_EMBEDDED, /* here, for the embedding alone: h and what x it takes */
    TVE_THERE     /* with a device, nowhere else */
};

/* ---- forward_batch.c ----------------------------------------------------- */

/* What was charged once stays so until the model is closed: batches come and
 * go. */
TV_NODISCARD enum tv_err tve_scratch_charge(tve_model *m, uint64_t bytes,
                                            struct tv_error *err);
/* A scratch file without a name, mapped: charged to the quota, on the disk. */
TV_NODISCARD enum tv_err tve_scratch_map(tve_model *m, size_t bytes,
                                         float **out, struct tv_error *err);
void tve_scratch_unmap(tve_model *m, float *p, size_t bytes);
/* Bytes that a batch's activations may take. */
uint64_t tve_activation_budget(const tve_model *m);
/* Floats of a row of a batch; notes its widths in b. */
size_t tve_batch_row_floats(const struct tve_spec *s, struct tve_batch *b);
/* Of a row of x that the embedding takes. */
size_t tve_batch_embedding_floats(const struct tve_spec *s,
                                  const struct tve_param *globals);
/* Windows of the group that begins at `from`. */
size_t tve_group_windows(const struct tve_window *w, size_t from, size_t n);
/* Fills b with as many groups of w as the budget allows, at least one. With h
 * (of w) that is the residual stream of a batch that is here; else it has its
 * own. Closed by tve_batch_close whatever the result. */
TV_NODISCARD enum tv_err
tve_batch_open(tve_model *m, const struct tve_window *w, size_t n_windows,
               uint64_t budget, float *h, enum tve_place place,
               struct tve_batch *b, struct tv_error *err);
/* A zeroed one: no-op. */
void tve_batch_close(struct tve_batch *b);

/* ---- forward.c ----------------------------------------------------------- */

/* h of the rows, by their ids. */
TV_NODISCARD enum tv_err tve_batch_embed(struct tve_batch *b,
                                         struct tv_error *err);
/* Layer b->layer; b->tap looks at inputs. */
TV_NODISCARD enum tv_err tve_batch_layer(struct tve_batch *b,
                                         struct tv_error *err);
/* Input of the output head in x or y, [rows, *ld]. */
TV_NODISCARD enum tv_err tve_batch_finish(struct tve_batch *b,
                                          const float **out, size_t *ld,
                                          struct tv_error *err);

typedef enum tv_err (*tve_batch_fn)(struct tve_batch *b, void *arg,
                                    struct tv_error *err);

/* Everything up to the output head, batch by batch; then fn. */
TV_NODISCARD enum tv_err tve_run_batches(tve_model *m,
                                         const struct tve_window *w, size_t n,
                                         const struct tve_progress *progress,
                                         tve_batch_fn fn, void *arg,
                                         struct tv_error *err);

#endif
