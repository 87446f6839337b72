/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear_parts.h - what linear_layer.c, linear_cuda.c, linear_split.c and
 * forward_cuda.c share: weights ready to be cut into tiles, a run over them,
 * what is kept on the device (private to these four).
 */
#ifndef TVE_LINEAR_PARTS_H
#define TVE_LINEAR_PARTS_H

#include "decoder.h"
#include "tv/cuda_eval.h"
#include "tv/split_gemm.h"

struct tve_job { /* one weight, ready to be cut into tiles */
    const struct tve_linear *item;
    struct tve_rows rows;
    float *bias;
    size_t in, out, tile_rows, n_tiles, first_tile;
    bool columns;     /* stored [in, out] */
    tvk_split *split; /* of the model; NULL: sgemm */
};

struct tve_run {
    const tve_model *m;
    tve_model *model; /* the same, to load small weights; on the device */
    struct tve_job *jobs;
    size_t n_jobs;
    const struct tve_group *groups;
    size_t n_groups;
    float **tiles; /* per worker */
    float **logits;
    unsigned char *done; /* per tile: linear_split.c has done it */
    tve_head_fn head;
    void *arg;
};

/* The weight of j->item, and its shape. Also closed when opening failed. */
TV_NODISCARD enum tv_err tve_job_open(tve_model *m, const struct tve_param *p,
                                      struct tve_job *j, struct tv_error *err);
void tve_job_close(struct tve_job *j);
void tve_add_bias(float *y, size_t ldy, size_t rows, const float *bias,
                  size_t n);
/* Bias, and the head's function, for rows [row, row + n) of a tile: y [n, ldy]
 * is where its outputs are. */
void tve_finish_tile(const struct tve_run *r, const struct tve_job *j,
                     size_t index, size_t n_out, size_t row, size_t n, float *y,
                     size_t ldy);
/* All tiles that can be done on AMX. */
TV_NODISCARD enum tv_err tve_split_run(struct tve_run *r, size_t n_tiles,
                                       struct tv_error *err);
/* All jobs of the run on the device. */
TV_NODISCARD enum tv_err tve_device_run(struct tve_device *d, struct tve_run *r,
                                        struct tv_error *err);

/* ---- on the device ------------------------------------------------------- */

struct tve_pair { /* two buffers here and there */
    size_t bytes;
    void *host[2];
    tvk_cuda_ptr device[2];
};
struct tve_piece { /* device memory that grows when it must */
    size_t bytes;
    tvk_cuda_ptr at;
};
struct tve_kept { /* a norm's weight or a bias, fp32 */
    const struct tv_input_tensor *t;
    struct tve_piece piece;
    bool replaced; /* it was when this was read: read it again */
};

struct tve_resident { /* a weight whose tiles stay, one behind the other */
    const struct tv_input_tensor *t;
    struct tve_piece piece; /* 0 bytes: there was no room */
    size_t n_there;         /* tiles, from the first */
    bool raw;               /* 16 bits, of this type; else fp32 */
    enum tv_dtype dtype;
};

struct tve_device {
    tvk_cuda *cuda;
    tvk_cuda_math *math;
    struct tve_pair weights, outputs;
    struct tve_piece raw[2]; /* tiles of 16-bit weights */
    struct tve_piece logits; /* one tile of them */
    struct tve_piece batch;  /* activations, forward_cuda.c */
    struct tve_piece work;   /* of who looks at them, who needs so much: */
    uint64_t look_bytes;
    struct tve_kept *kept; /* [n_kept, cap_kept] */
    size_t n_kept, cap_kept;
    size_t n_tiles;  /* so far: their parity names the buffers */
    size_t n_queued; /* of them, since the stream was waited for */
    bool keeps;      /* weights have room to stay */
    struct tve_resident *residents; /* [n_residents, cap_residents] */
    size_t n_residents, cap_residents;
    bool host_only; /* activations did not fit: they stay on the host */
    struct tv_error why;
};

TV_NODISCARD enum tv_err tve_piece_need(struct tve_device *d,
                                        struct tve_piece *p, size_t bytes,
                                        const char *what, struct tv_error *err);
/* Buffers for tiles of every weight of the model, and of logits. */
TV_NODISCARD enum tv_err tve_device_buffers(struct tve_device *d,
                                            const tve_model *m, bool logits,
                                            struct tv_error *err);
/* Of them, there. */
uint64_t tve_device_buffer_bytes(const tve_model *m, bool logits);
/* Bytes of all weights as they would stay, of those that do. */
uint64_t tve_device_weight_bytes(const tve_model *m);
uint64_t tve_device_resident_bytes(const struct tve_device *d);
/* The table if its first `rows` rows are there; else NULL. */
const struct tve_resident *tve_device_table(const struct tve_device *d,
                                            const tve_model *m,
                                            const struct tve_weight *w,
                                            size_t rows);
/* A whole small weight on the device, kept there; 0 when the model has none. */
TV_NODISCARD enum tv_err tve_device_param(struct tve_device *d, tve_model *m,
                                          const struct tve_weight *w,
                                          tvk_cuda_ptr *out,
                                          struct tv_error *err);

#endif
