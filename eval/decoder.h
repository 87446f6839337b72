/* SPDX-License-Identifier: Apache-2.0 */
/*
 * decoder.h - a decoder described: numbers (struct tve_spec), weights by slot,
 * and the seams between the files of the forward pass.
 *
 *   spec.c       config.json -> tve_spec, family by family
 *   rope.c       rotary frequencies
 *   model.c      tensors -> slots, shapes checked
 *   linear_layer.c     tiles of weights, adapters, sgemm
 *   linear_split.c     tiles of bf16 weights on AMX
 *   linear_cuda.c      the same tiles on a CUDA device
 *   attention.c  scores, softmax
 *   blocks.c     norms, activations, exp
 *   forward*.c   the order of it all, over a batch of windows
 *   forward_cuda.c     its steps on a CUDA device
 */
#ifndef TVE_MODEL_H
#define TVE_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "tv/adapt.h"
#include "tv/cuda_math.h"
#include "tv/error.h"
#include "tv/eval.h"
#include "tv/format.h"
#include "tv/kernels.h"
#include "tv/model.h"
#include "tv/pool.h"
#include "tv/view.h"

enum tve_norm_type { TVE_RMS, TVE_RMS_PLUS_ONE, TVE_LAYER_NORM };
enum tve_act { TVE_SILU, TVE_GELU, TVE_GELU_TANH, TVE_RELU, TVE_QUICK_GELU };
enum tve_positions { TVE_ROPE, TVE_LEARNED, TVE_ALIBI };
/* Where q, k and v of a head stand in a row of the fused projection. */
enum tve_qkv { TVE_QKV_BLOCKS, TVE_QKV_HEADS };
enum tve_residual {
    TVE_PRE_NORM,     /* h += attn(n1(h)); h += mlp(n2(h)) */
    TVE_PARALLEL,     /* h += attn(n1(h)) + mlp(n2(h)) */
    TVE_SANDWICH,     /* h += n2(attn(n1(h))); h += n4(mlp(n3(h))) */
    TVE_POST_NORM,    /* h = n1(h + attn(h)); h = n2(h + mlp(h)) */
    TVE_NORM_RESIDUAL /* BLOOM's option: the norm's output is the residual */
};

enum tve_rope_type {
    TVE_ROPE_DEFAULT,
    TVE_ROPE_LINEAR,
    TVE_ROPE_DYNAMIC,
    TVE_ROPE_LLAMA3,
    TVE_ROPE_YARN,
    TVE_ROPE_LONG
};
struct tve_rope {
    enum tve_rope_type type;
    size_t dims; /* rotated dimensions of a head */
    double base, factor;
    double original; /* positions that the model was pretrained for */
    double max_positions;
    double low, high; /* llama3 */
    double beta_fast, beta_slow;
    bool truncate;                        /* yarn */
    double scale;                         /* of cos and sin */
    double *long_factors, *short_factors; /* [pairs], owned; TVE_ROPE_LONG */
};
/* Rotated pairs; an odd dimension takes its neighbour along. */
static inline size_t tve_rope_half(const struct tve_rope *r)
{
    return (r->dims + 1) / 2;
}
/* inv_freq [pairs] for a window of n positions. */
void tve_rope_frequencies(const struct tve_rope *r, size_t n, float *inv_freq);
/* Reads rope settings in either spelling. `local`: Gemma 3's second rope. */
TV_NODISCARD enum tv_err tve_rope_load(const json_t *config, bool local,
                                       size_t head_dim, double max_positions,
                                       struct tve_rope *out,
                                       struct tv_error *err);
void tve_rope_free(struct tve_rope *r);

struct tve_layer_spec {
    size_t window; /* keys that a query sees; 0: all before it */
    unsigned rope; /* index of tve_spec.rope */
    float attn_scale;
};

struct tve_spec {
    size_t n_layers, hidden, n_heads, n_kv, head_dim, inner, vocab, embed_dim;
    size_t max_positions; /* 0: no limit */
    enum tve_norm_type norm;
    float eps;
    enum tve_positions positions;
    size_t position_offset; /* rows of the position table before position 0 */
    enum tve_qkv qkv;
    enum tve_residual residual;
    enum tve_act act;
    bool gated, tied, qk_norm, transposed, norm_affine;
    float embed_scale;         /* 1: none */
    float attn_cap, logit_cap; /* 0: none */
    struct tve_rope rope[2];
    struct tve_layer_spec *layers; /* [n_layers], owned */
};
TV_NODISCARD enum tv_err tve_spec_load(const char *config, size_t n,
                                       const struct tv_arch *arch,
                                       struct tve_spec *out,
                                       struct tv_error *err);
void tve_spec_free(struct tve_spec *s);

/* ---- weights ------------------------------------------------------------- */

enum tve_slot {         /* of a layer */
                TVE_N1, /* before attention (POST_NORM: behind it) */
                TVE_N2, /* before the MLP; sandwich: behind attention */
                TVE_N3, /* sandwich: before the MLP */
                TVE_N4, /* sandwich: behind the MLP */
                TVE_NQ,
                TVE_NK,
                TVE_Q,
                TVE_K,
                TVE_V,
                TVE_QKV,
                TVE_O,
                TVE_GATE,
                TVE_UP,
                TVE_GATE_UP,
                TVE_DOWN,
                TVE_SLOTS
};
enum tve_slot_global {
    TVE_EMBED,
    TVE_POSITION,
    TVE_EMBED_NORM,
    TVE_PROJECT_IN,
    TVE_PROJECT_OUT,
    TVE_FINAL_NORM,
    TVE_HEAD,
    TVE_GLOBALS
};

struct tve_weight {
    const struct tv_input_tensor *t; /* NULL: the model has none */
    size_t rows, cols;               /* as stored */
    struct tv_adapter_use *changes;  /* owned; what adapters do to it */
    size_t n_changes;
};
struct tve_param { /* a module: weight and bias */
    struct tve_weight w, b;
};

struct tve_replaced { /* tve_model_replace; data[0] NULL: the model's own */
    const unsigned char *data[1];
    enum tv_dtype dtype;
};

struct tve_device; /* linear_cuda.c */
struct tve_splits; /* linear_split.c */

struct tve_model {
    tv_input *in;
    struct tve_replaced *replaced; /* per tensor of in; NULL: none ever was */
    struct tve_model_adapter *adapters; /* [n_adapters], owned copy */
    size_t n_adapters;
    struct tv_arch *arch;
    struct tve_spec spec;
    struct tve_param *layers; /* [n_layers * TVE_SLOTS] */
    struct tve_param globals[TVE_GLOBALS];
    const struct tvk_table *kernels;
    const struct tve_row_ops *rows;
    tv_pool *pool;
    struct tve_device *device; /* where products are; NULL: here */
    struct tve_splits *splits; /* products on AMX; NULL: none */
    uint64_t memory_bytes;
    char *scratch_dir;
    tv_store *quota_of; /* scratch files count against its quota */
    uint64_t scratch_bytes, charged_bytes; /* mapped now; told the store */
    bool skip_verify;
    unsigned char *verified; /* per tensor of in: leaves were checked */
};

static inline struct tve_param *tve_layer_param(const tve_model *m,
                                                size_t layer, enum tve_slot s)
{
    return &m->layers[layer * TVE_SLOTS + (size_t)s];
}

/* A view of t whose stored checksums hold. */
TV_NODISCARD enum tv_err tve_view(tve_model *m, const struct tv_input_tensor *t,
                                  struct tv_view *out, struct tv_error *err);
/* A whole small weight as owned fp32 (tv_free), adapters applied; *out NULL
 * when the model has none. */
TV_NODISCARD enum tv_err tve_load(tve_model *m, const struct tve_weight *w,
                                  float **out, struct tv_error *err);

struct tve_rows { /* rows of a weight, adapters applied */
    const tve_model *m;
    const struct tve_weight *w;
    struct tv_view view;
    struct tva_patch patch;
    float **scratch; /* [threads] */
    bool replaced;   /* the view is nobody's */
};
TV_NODISCARD enum tv_err tve_rows_open(struct tve_rows *r, tve_model *m,
                                       const struct tve_weight *w,
                                       struct tv_error *err);
void tve_rows_close(struct tve_rows *r);
/* n elements from element `at`; any thread, by its number. */
void tve_rows_read(const struct tve_rows *r, unsigned worker, uint64_t at,
                   size_t n, float *dst);

/* ---- linear layers ------------------------------------------------------- */

/* Rows of activations that one sgemm call takes: [start, start + n). */
struct tve_group {
    size_t start, n;
};

struct tve_linear { /* one projection in a call of tve_linear_run */
    const struct tve_param *p;
    const float *x; /* [rows, ldx] */
    size_t ldx;
    float *y; /* [rows, ldy]; written from its column 0 */
    size_t ldy;
};
/* y = x W^T + b for all projections and groups. Every projection's in and out
 * come from its weight. */
TV_NODISCARD enum tv_err tve_linear_run(tve_model *m,
                                        const struct tve_linear *items,
                                        size_t n_items,
                                        const struct tve_group *groups,
                                        size_t n_groups, struct tv_error *err);
size_t tve_linear_in(const tve_model *m, const struct tve_param *p);
size_t tve_linear_out(const tve_model *m, const struct tve_param *p);
/* Output features of one tile; depends on the shape only. */
size_t tve_tile_rows(size_t in, size_t out);

/* Output head over tiles: fn gets logits [n, n_out] of one tile and group. */
struct tve_head_tile {
    const float *logits; /* [n, n_out] */
    size_t tile, out0, n_out, row0, n;
};
typedef void (*tve_head_fn)(void *arg, const struct tve_head_tile *tile);
TV_NODISCARD enum tv_err tve_head_run(tve_model *m, const struct tve_param *p,
                                      const float *x, size_t ldx,
                                      const struct tve_group *groups,
                                      size_t n_groups, tve_head_fn fn,
                                      void *arg, struct tv_error *err);

/* ---- on AMX -------------------------------------------------------------- */

/* *out NULL without error where there is no AMX. */
TV_NODISCARD enum tv_err tve_splits_open(struct tv_error *err,
                                         struct tve_splits **out);
void tve_splits_close(struct tve_splits *s); /* NULL allowed */
/* Bytes of activations that are split at a time, and the least of them. */
uint64_t tve_split_slab(const tve_model *m);
uint64_t tve_split_least(const tve_model *m);
/* Of a worker's buffer for tiles of a weight. */
size_t tve_split_tile_floats(const tve_model *m, size_t in, size_t out);

/* ---- on a CUDA device ---------------------------------------------------- */

TV_NODISCARD enum tv_err tve_device_open(tvk_cuda *cuda, struct tv_error *err,
                                         struct tve_device **out);
void tve_device_close(struct tve_device *d); /* NULL allowed */
/* Gives back what it keeps between calls. */
void tve_device_shrink(struct tve_device *d);
/* Host memory that it pins: two tiles of weights and two of outputs, of 2^21
 * elements each. */
#define TVE_DEVICE_PINNED (4u * (8u << 20))
/* Of that, what a walk pins. */
uint64_t tve_device_host_bytes(const tve_model *m);
tvk_cuda_math *tve_device_math(const struct tve_device *d);
bool tve_is_replaced(const tve_model *m, const struct tv_input_tensor *t);

/* Activations of a batch on the device. There the addresses of h, x, y and s
 * take the place of host pointers: nobody follows them here. Steps join the
 * device's stream and return at once. */
struct tve_batch_there {
    float *memory;
    tvk_cuda_ptr position, cosine[2], sine[2], slopes, work;
    tvk_cuda_ptr index, targets, losses; /* [rows] */
};
static inline tvk_cuda_ptr tve_there(const float *p)
{
    return (tvk_cuda_ptr)(uintptr_t)p;
}
/* false: none, or a batch did not fit before (its activations are here then) */
bool tve_there_wanted(const tve_model *m);
void tve_there_give_up(tve_model *m, const struct tv_error *why);
/* Rows of `floats` each that fit, in groups of up to `group` rows and windows
 * of up to `longest` ids; 0: not one. `walk`: into half of what is left, as who
 * looks at inputs needs the device too, and no head follows. BUDGET: not even
 * the tiles of weights fit. */
TV_NODISCARD enum tv_err tve_there_rows(tve_model *m, size_t floats,
                                        size_t longest, size_t group, bool walk,
                                        size_t *out, struct tv_error *err);
/* BUDGET, with the number, when a group of `rows` rows in windows of `longest`
 * ids does not fit; looks only. TV_OK without a device. */
TV_NODISCARD enum tv_err tve_there_fits(const tve_model *m, size_t floats,
                                        size_t rows, size_t longest, bool walk,
                                        struct tv_error *err);
/* What a batch on the device begins with. */
struct tve_there_start {
    size_t rows, floats, longest, group;
    const uint32_t *position;               /* [rows] */
    const float *cos_rows[2], *sin_rows[2]; /* [longest, pairs] or NULL */
    const float *slopes;                    /* [n_heads] or NULL */
};
/* Memory of the device until the next one is opened. */
TV_NODISCARD enum tv_err tve_there_open(tve_model *m,
                                        const struct tve_there_start *s,
                                        struct tve_batch_there *out,
                                        struct tv_error *err);
/* Host memory that is pinned; false: it cannot be. */
bool tve_there_pin(tve_model *m, size_t bytes, float **out);
void tve_there_unpin(tve_model *m, float *p);
/* [rows, n] from and to the host; the device is idle behind it. */
TV_NODISCARD enum tv_err tve_there_put(tve_model *m, float *to,
                                       const float *from, size_t floats,
                                       struct tv_error *err);
TV_NODISCARD enum tv_err tve_there_get(tve_model *m, float *to,
                                       const float *from, size_t floats,
                                       struct tv_error *err);
/* Who looks at inputs of a walk needs so much of the device at least. */
void tve_there_look(tve_model *m, uint64_t bytes);
/* So many bytes for who looks at inputs; lost when more are asked for, after
 * the stream was waited for. */
TV_NODISCARD enum tv_err tve_there_work(tve_model *m, size_t bytes,
                                        tvk_cuda_ptr *out,
                                        struct tv_error *err);
TV_NODISCARD enum tv_err tve_there_sync(tve_model *m, struct tv_error *err);
/* Rows of the table (ids [rows]), scaled by the spec, to [rows, embed_dim];
 * they are read here, unless the table is there. */
TV_NODISCARD enum tv_err tve_there_embed(tve_model *m,
                                         const struct tve_batch_there *b,
                                         const int32_t *ids, size_t rows,
                                         float *to, struct tv_error *err);
/* h += the first `longest` positions' rows; room [longest, hidden]. */
TV_NODISCARD enum tv_err tve_there_positions(tve_model *m,
                                             const struct tve_batch_there *b,
                                             float *h, float *room, size_t rows,
                                             size_t longest,
                                             struct tv_error *err);
/* to = norm(from), both [rows, ld]. */
TV_NODISCARD enum tv_err tve_there_norm(tve_model *m, const struct tve_param *p,
                                        const float *from, float *to, size_t ld,
                                        size_t rows, struct tv_error *err);
/* h [rows, hidden] += from, or = from, [rows, ld]. */
TV_NODISCARD enum tv_err tve_there_add(tve_model *m, float *h,
                                       const float *from, size_t ld,
                                       size_t rows, struct tv_error *err);
TV_NODISCARD enum tv_err tve_there_copy(tve_model *m, float *h,
                                        const float *from, size_t ld,
                                        size_t rows, struct tv_error *err);
TV_NODISCARD enum tv_err tve_there_act(tve_model *m, float *s, size_t ld,
                                       size_t rows, struct tv_error *err);
/* Heads of q, then of k: norms (where the model has them), rotation. */
TV_NODISCARD enum tv_err tve_there_heads(tve_model *m,
                                         const struct tve_batch_there *b,
                                         size_t layer, float *qkv, size_t ld,
                                         size_t rows, struct tv_error *err);
struct tve_attention;
/* All windows, as tve_attention_run; groups hold windows of one length. */
TV_NODISCARD enum tv_err
tve_there_attention(tve_model *m, const struct tve_batch_there *b,
                    const struct tve_attention *a, const size_t *starts,
                    size_t n_windows, const struct tve_group *groups,
                    size_t n_groups, struct tv_error *err);
struct tve_linear;
TV_NODISCARD enum tv_err
tve_there_linear(tve_model *m, const struct tve_linear *items, size_t n_items,
                 const struct tve_group *groups, size_t n_groups,
                 struct tv_error *err);
/* Losses of rows of x, group by group, into losses [rows]. */
struct tve_there_losses {
    tvk_cuda_ptr x, losses, targets;
    size_t ldx;
    const struct tve_group *groups;
    size_t n_groups;
};
TV_NODISCARD enum tv_err tve_there_losses(tve_model *m,
                                          const struct tve_there_losses *a,
                                          struct tv_error *err);
/* The same for the input [rows, ld] of the output head, whose scored rows are
 * gathered in `room` [rows, ld]; nll [scored] in the order of windows. */
struct tve_scored {
    const float *x;
    float *room;
    size_t ld;
    const struct tve_window *windows;
    const size_t *starts;
    size_t n_windows;
    const struct tve_group *groups;
    size_t n_groups;
};
TV_NODISCARD enum tv_err tve_there_score(tve_model *m,
                                         const struct tve_batch_there *b,
                                         const struct tve_scored *s,
                                         double *nll, struct tv_error *err);

/* ---- looking at inputs --------------------------------------------------- */

/* fn sees the input x [rows, ldx] of every call of linear layers, which all
 * items share, before their outputs are made; its error ends the run. `there`:
 * x is on the device (tve_there), made by what its stream still does. */
struct tve_tap {
    enum tv_err (*fn)(void *arg, const struct tve_linear *items, size_t n_items,
                      const struct tve_group *groups, size_t n_groups,
                      bool there, struct tv_error *err);
    void *arg;
};
struct tve_walk_progress { /* rows that have passed; its error ends the run */
    enum tv_err (*step)(void *arg, uint64_t rows, struct tv_error *err);
    void *arg;
};
/* All windows side by side, layer by layer, without the output head. Windows
 * are borrowed. `reserve` bytes of the memory budget are left to others;
 * residual streams of more than `most` bytes, or than half of the rest, lie in
 * a scratch file. With a device its layers are computed there, on as many rows
 * as it has room for; BUDGET when that is not even a group. */
struct tve_walk;
TV_NODISCARD enum tv_err tve_walk_open(tve_model *m, const struct tve_window *w,
                                       size_t n, uint64_t reserve,
                                       uint64_t most, struct tv_error *err,
                                       struct tve_walk **out);
void tve_walk_close(struct tve_walk *k);
/* Charges what such a walk will map to the store's quota, before the work. */
TV_NODISCARD enum tv_err tve_walk_admit(tve_model *m,
                                        const struct tve_window *w, size_t n,
                                        uint64_t reserve, struct tv_error *err);
/* BUDGET, with the number, when a device has no room for a group of n windows
 * of `context` ids. */
TV_NODISCARD enum tv_err tve_walk_fits(const tve_model *m, size_t n,
                                       size_t context, struct tv_error *err);
struct tve_scratch; /* tv/calibrate.h */
/* At most so many bytes of scratch files, for n windows of `context` ids, also
 * where less is reserved: residual streams, and one batch beside them; bytes of
 * heap for all that takes, the reserve counted. `look`:
 * there will be calls of tve_walk_look. */
void tve_walk_scratch(const tve_model *m, size_t n, size_t context,
                      uint64_t reserve, uint64_t most, bool look,
                      struct tve_scratch *out);
/* The next layer; tap and progress may be NULL. After an error only close. */
TV_NODISCARD enum tv_err
tve_walk_layer(struct tve_walk *k, const struct tve_tap *tap,
               const struct tve_walk_progress *progress, struct tv_error *err);
/* The same, but its outputs are thrown away and the layer is still the next. */
TV_NODISCARD enum tv_err tve_walk_look(struct tve_walk *k,
                                       const struct tve_tap *tap,
                                       struct tv_error *err);

/* An input that one or several linear layers of a block share. */
#define TVE_SHARED_MAX 3u
struct tve_site {
    size_t layer;
    const struct tve_param *params[TVE_SHARED_MAX];
    const char *tensors[TVE_SHARED_MAX];
    size_t n_tensors;
    size_t n; /* channels */
};
/* All of the model's, in the order of computation; owned, tv_free. */
TV_NODISCARD enum tv_err tve_sites(const tve_model *m, struct tve_site **out,
                                   size_t *n, struct tv_error *err);
/* tve_statistics of sites with want[i] (NULL: all); the walk ends behind the
 * last of them. fn gets the site's number. */
typedef enum tv_err (*tve_site_fn)(void *arg, size_t site,
                                   const struct tve_stat_input *in,
                                   struct tv_error *err);
TV_NODISCARD enum tv_err
tve_site_statistics(tve_model *m, const struct tve_window *w, size_t n_windows,
                    enum tve_stat kind, const bool *want,
                    const struct tve_progress *progress, tve_site_fn fn,
                    void *arg, struct tv_error *err);
/* tve_walk_admit for them; BUDGET as tve_statistics. */
TV_NODISCARD enum tv_err tve_site_admit(tve_model *m,
                                        const struct tve_window *w,
                                        size_t n_windows, enum tve_stat kind,
                                        const bool *want, struct tv_error *err);
TV_NODISCARD enum tv_err tve_check_windows(const tve_model *m,
                                           const struct tve_window *w, size_t n,
                                           struct tv_error *err);

/* ---- arithmetic of rows -------------------------------------------------- */

/* Same bits in every row of the table. */
struct tve_row_ops {
    /* exp(x - max) in place over [n]; returns the sum in fp64. */
    double (*exp_row)(float *x, size_t n, float max);
    float (*max_row)(const float *x, size_t n);
    /* dst may be x. w, b [n] or NULL. */
    void (*norm_row)(enum tve_norm_type type, float eps, const float *w,
                     const float *b, const float *x, float *dst, size_t n);
    /* x = act(x) in place; then, with gate_by, x *= gate_by. */
    void (*act_row)(enum tve_act act, float *x, const float *gate_by, size_t n);
    /* Rotates the first 2 * half dimensions of a head. */
    void (*rotate)(float *x, const float *cos_row, const float *sin_row,
                   size_t half);
    /* x = cap * tanh(x / cap), with an absolute error of 1e-7 cap. */
    void (*cap_row)(float *x, size_t n, float cap);
};
extern const struct tve_row_ops tve_rows_ref;
#ifdef TVE_ROWS_X86
extern const struct tve_row_ops tve_rows_avx2, tve_rows_avx512;
#endif

/* ---- attention ----------------------------------------------------------- */

struct tve_attention {
    size_t n_heads, n_kv, head_dim, window;
    const float *qkv; /* rows of all windows */
    size_t ld;
    size_t q0, q_step, k0, k_step, v0, v_step; /* floats inside a row */
    float scale, cap;
    const float *slopes; /* [n_heads], NULL: no ALiBi */
    float *out;          /* [rows, n_heads * head_dim] */
    size_t ld_out;
};
/* What a worker takes for windows of n. */
uint64_t tve_attention_floats(size_t n);
/* All heads of all windows; starts [n_windows + 1] are row numbers. */
TV_NODISCARD enum tv_err
tve_attention_run(tve_model *m, const struct tve_attention *a,
                  const size_t *starts, size_t n_windows, struct tv_error *err);
#endif
