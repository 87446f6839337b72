/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/kernels.h - every arithmetic operation of the toolkit, as a table.
 *
 * kernels/ref is scalar and is the specification; the AVX2 and AVX-512 rows
 * give the same bits for the same arguments (tests/kernels/test_variants.c).
 * Pure functions on pointers and counts: no allocation, no I/O, no errors, no
 * globals. Any n from 0; any element-aligned pointer; nothing is read or
 * written outside [0, n).
 *
 * Numerics, binding for all rows:
 *  - Element-wise arithmetic is carried in fp64 and rounded once to fp32 (round
 *    to nearest, ties to even). fp32 inputs are exact in fp64, a difference of
 *    two of them almost always is; so cancellation between task vectors costs
 *    nothing, and the result is within 1 ulp of an fp64 oracle everywhere.
 *    It is free: these kernels wait for memory. Every operation below is a
 *    separate IEEE multiply, add or divide in the order written; never fused.
 *  - Magnitudes are compared as fp32: m = |fp32(x - b)|, one rounding; its bit
 *    pattern (31 bits) orders like the number. Every NaN has the magnitude
 *    0x7f800001, right above infinity, whatever its payload.
 *  - Reductions are fp64 in a fixed shape (struct tvk_dots) that depends on the
 *    element index only.
 *  - Subnormals are kept (no FTZ/DAZ). NaN payloads are not specified
 *    (merge/ writes none).
 *
 * Masks are bit sets: element i is bit (i & 63) of word i >> 6, that is the
 * words of a roaring bitset container. Bits past n in the last word are written
 * as 0 and ignored when read.
 */
#ifndef TV_KERNELS_H
#define TV_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"

#ifdef __cplusplus
extern "C" {
#define TVK_RESTRICT
#else
#define TVK_RESTRICT restrict
#endif

/* Elements that one leaf of a reduction covers. Tiles are multiples of it. */
#define TVK_LEAF       65536u
/* Most donors of one element-wise operation; planning refuses more. */
#define TVK_DONORS_MAX 128u
/* Buckets of the two magnitude histograms: bits 30..15, then bits 14..0. */
#define TVK_HIST_HI    65536u
#define TVK_HIST_LO    32768u

/* TVK_AMX has the entries of TVK_AVX512: tiles do products (tv/split_gemm.h).
 */
enum tvk_isa {
    TVK_REF = 0,
    TVK_AVX2 = 1,
    TVK_AVX512 = 2,
    TVK_AMX = 3,
    TVK_ISA_COUNT = 4
};

/* Accumulators of one leaf or of a subtree; all zero is the empty sum. */
struct tvk_dots {
    double aa, bb, ab;
};

/* What tvk_table::stats gathers; merge two with tvk_stats_merge (in order). */
struct tvk_stats {
    double sum, sum_sq; /* over finite elements */
    float min, max;     /* over finite elements; +inf/-inf when none; a
                         * zero is +0 */
    uint64_t n_nonfinite, n_zero;
};

/* Odds of an element by its rank (rank_mask): least + span at the highest, both
 * from 0, their sum at most 1. */
struct tvk_odds {
    double least, span;
};
/* Scratch of rank_mask: per element, and besides. */
#define TVK_RANK_EACH  16u
#define TVK_RANK_FIXED 24576u

/* Sorts keys [n] below 2^31, equal ones by index: three stable counting passes
 * over entries [2 * n]; the result [n] is in the returned half of them. */
struct tvk_ranked {
    uint32_t key, at;
};
const struct tvk_ranked *tvk_rank_sort(struct tvk_ranked *entries,
                                       const uint32_t *keys, size_t n);

/* Parameters of the generalised task arithmetic merge (TIES, DARE, ...). */
struct tvk_gta {
    size_t n_donors;      /* 0 gives the base */
    const double *coef;   /* [n_donors] weight times rescale factor */
    const double *weight; /* [n_donors] weight, for the divisor */
    int consensus;        /* elect signs, merge the agreeing entries */
    int normalize;        /* divide by the weights that took part */
    double lambda;        /* applied last */
};

struct tvk_table {
    enum tvk_isa isa;
    const char *name; /* "ref", "avx2", "avx512", "amx", "cuda" */
    /* NULL where nothing can go wrong (the CPU's rows). Else TV_OK, or why the
     * device is not to be used any more: what its functions returned is right
     * (the CPU finished it), but the caller has to stop. Any thread. */
    enum tv_err (*trouble)(struct tv_error *err);

    /* ---- conversion -------------------------------------------------------
     * src [n] of the named type -> dst [n] fp32, exact. dst and src must not
     * overlap. bf16/f16 NaNs stay NaN (quiet). src may be any alignment, also
     * unaligned to its element (safetensors files). Conversions return how many
     * elements of dst are NaN or infinite: nearly free here, a pass of its own
     * elsewhere. */
    uint64_t (*bf16_to_f32)(float *TVK_RESTRICT dst,
                            const void *TVK_RESTRICT src, size_t n);
    uint64_t (*f16_to_f32)(float *TVK_RESTRICT dst,
                           const void *TVK_RESTRICT src, size_t n);
    /* fp32 -> 16 bit, ties to even, overflow to infinity, NaN to a quiet NaN
     * (sign kept, payload truncated, quiet bit set). dst any alignment. */
    uint64_t (*f32_to_bf16)(void *TVK_RESTRICT dst,
                            const float *TVK_RESTRICT src, size_t n);
    uint64_t (*f32_to_f16)(void *TVK_RESTRICT dst,
                           const float *TVK_RESTRICT src, size_t n);
    /* src[i] = p0 + p1 + p2, piece j in dst[j * plane + i], plane at least n:
     * each the bf16 nearest to what the ones before leave, ties to even, so the
     * sum is exact for |src[i]| of 2^-110 and above and within 2^-134 below.
     * p0 is truncated where it would round to infinity; of NaN and infinity p0
     * is what f32_to_bf16 gives and the others are +0. */
    void (*split_bf16)(uint16_t *TVK_RESTRICT dst, size_t plane,
                       const float *TVK_RESTRICT src, size_t n);

    /* ---- linear -----------------------------------------------------------
     */
    /* dst[i] = fp32((((w0*x0[i]) + w1*x1[i]) + ...) / divisor); accumulation
     * starts from w0*x0; divisor == 1 divides by nothing. n_inputs 1.. */
    void (*weighted_sum)(float *TVK_RESTRICT dst, const float *const *x,
                         const double *w, size_t n_inputs, double divisor,
                         size_t n);

    /* ---- task vectors -----------------------------------------------------
     */
    /* dst[i] = fp32(x[i] - b[i]) */
    void (*delta)(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                  const float *TVK_RESTRICT b, size_t n);
    /* With D_j = kept(j,i) ? (x_j[i]-b[i])*coef_j : 0 for donors j in order:
     *   no consensus: m = sum D_j;   divisor = sum of all weight_j,
     *                 |divisor| < 1e-8 counts as 1
     *   consensus:    S = sum D_j; positive when S >= 0; m = sum of the D_j > 0
     *                 (or < 0) that agree; divisor = sum of their weight_j, 0
     *                 counts as 1
     *   normalize:    m = m / divisor        lambda != 1: m = m * lambda
     *   dst[i] = fp32(b[i] + m), but b[i] itself, bit for bit, when m == 0.
     * Sums start at +0 and run in donor order. masks[j] == NULL keeps all;
     * masks itself may be NULL. Zero D_j never agree. */
    void (*gta)(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const uint64_t *const *masks,
                const struct tvk_gta *p, size_t n);

    /* With d = x[i]-b[i] and w = t / |d|, |d| at least 1e-6 and w at most 1:
     * dst[i] = fp32(b[i] + w*d). */
    void (*nearswap)(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *TVK_RESTRICT x, double t, size_t n);
    /* d_j = x_j[i]-b[i] is active when |d_j| > epsilon (a NaN is). With one
     * active j: dst[i] = fp32(b[i] + alone[j]*d_j); with more: fp32(b[i] +
     * (sum of the active d_j in order) / count); with none: b[i]. */
    void (*ram)(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const double *alone, size_t n_donors,
                double epsilon, size_t n);

    /* ---- several task vectors against each other ---------------------------
     * With d_j = x_j[i]-b[i] and e_j = d_j - d_0, sums in donor order from +0:
     * mean = (sum over j >= 1 of e_j) / n_donors,
     * dst[i] = fp32((sum of (e_j - mean)^2) / n_donors). n_donors 1.. */
    void (*variance)(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *const *x, size_t n_donors, size_t n);
    /* With d_j = x_j[i]-b[i]: V = sum of all d_j; m = sum of the weight_j*d_j
     * whose d_j is above zero when V >= 0, else of those whose is below; w the
     * sum of their weight_j, at least 1e-6. dst[i] = fp32(b[i] + m / w), but
     * b[i] bit for bit when m == 0 or, mask given, its bit is 0; NaN when V
     * is. */
    void (*elect)(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                  const float *const *x, const uint64_t *mask,
                  const double *weight, size_t n_donors, size_t n);
    /* y[i] = +0 where its bit is 0 */
    void (*keep)(float *TVK_RESTRICT y, const uint64_t *mask, size_t n);

    /* ---- rows as distributions ---------------------------------------------
     * Any n; sums in lanes as in dots. exp and log are ours (kernels/ref/
     * divergence.c), as libm's differ between machines.
     * highest: the largest element that is no NaN, -inf when there is none; a
     * zero is +0.
     * softmax: e[i] = exp(x[i] - most), 0 below exp(-700); returns their sum.
     * divergence: sum of p log(p / q), p = e[i]*(1/sum_e) + 1e-8, q of f. */
    float (*highest)(const float *x, size_t n);
    double (*softmax)(double *TVK_RESTRICT e, const float *TVK_RESTRICT x,
                      double most, size_t n);
    double (*divergence)(const double *e, const double *f, double sum_e,
                         double sum_f, size_t n);
    /* dst[i] = fp32(|x[i]-b[i]| * by) */
    void (*change_by)(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                      const float *TVK_RESTRICT b, double by, size_t n);

    /* ---- exact top-k by magnitude ------------------------------------------
     * With m(i) = bits of |fp32(x[i]-b[i])| (b == NULL: of |x[i]|):
     * hist_hi: hist[m >> 15]++ for all i        (hist [TVK_HIST_HI])
     * hist_lo: hist[m & 0x7fff]++ where m >> 15 == hi (hist [TVK_HIST_LO])
     * hist_range: hist[m - first]++ where first <= m < first + width (hist
     *            [width]; first at least 1, first + width at most 2^31);
     *            returns the number of i with m >= first + width
     * count_eq: number of i with m == pattern
     * magnitudes: dst[i] = m(i); returns the largest, 0 when n is 0
     * topk_mask: bit i = m > pattern, or m == pattern and fewer than eq_limit
     *            equal elements came before, *eq_seen included; *eq_seen is
     *            advanced by the equal elements met. Sets nothing where m == 0.
     *            Returns the number of bits set. */
    void (*hist_hi)(uint32_t *TVK_RESTRICT hist, const float *x, const float *b,
                    size_t n);
    void (*hist_lo)(uint32_t *TVK_RESTRICT hist, uint32_t hi, const float *x,
                    const float *b, size_t n);
    uint64_t (*hist_range)(uint32_t *TVK_RESTRICT hist, uint32_t first,
                           uint32_t width, const float *x, const float *b,
                           size_t n);
    uint64_t (*count_eq)(const float *x, const float *b, uint32_t pattern,
                         size_t n);
    uint32_t (*magnitudes)(uint32_t *TVK_RESTRICT dst, const float *x,
                           const float *b, size_t n);
    uint64_t (*topk_mask)(uint64_t *TVK_RESTRICT mask, const float *x,
                          const float *b, uint32_t pattern, uint64_t *eq_seen,
                          uint64_t eq_limit, size_t n);

    /* ---- bf16 as it lies in files -------------------------------------------
     * The operations of these names on bf16 [n], anywhere in memory (any
     * alignment), without fp32 copies: what they do to the numbers that
     * bf16_to_f32 makes of them. b is not NULL. gta_bf16 rounds its result like
     * f32_to_bf16 and returns what that does. hist_range_bf16 and gta_bf16
     * ask for what comes next in memory; the others are for what is there. */
    uint64_t (*hist_range_bf16)(uint32_t *TVK_RESTRICT hist, uint32_t first,
                                uint32_t width, const void *x, const void *b,
                                size_t n);
    uint64_t (*topk_mask_bf16)(uint64_t *TVK_RESTRICT mask, const void *x,
                               const void *b, uint32_t pattern,
                               uint64_t *eq_seen, uint64_t eq_limit, size_t n);
    uint64_t (*gta_bf16)(void *TVK_RESTRICT dst, const void *b,
                         const void *const *x, const uint64_t *const *masks,
                         const struct tvk_gta *p, size_t n);
    uint64_t (*count_nonfinite_bf16)(const void *x, size_t n);

    /* ---- random masks ------------------------------------------------------
     * Philox4x32-10 (Salmon et al., SC 2011; Random123). Element e = start + i
     * takes word (e & 3) of philox(counter = {lo32(e>>2), hi32(e>>2),
     * lo32(name_hash), hi32(name_hash)}, key = {lo32(key), hi32(key)}); bit i
     * is set iff word < threshold (threshold up to 2^32: everything kept).
     * start is a multiple of 64. Returns the number of bits set. */
    uint64_t (*philox_mask)(uint64_t *TVK_RESTRICT mask, uint64_t start,
                            uint64_t key, uint64_t name_hash,
                            uint64_t threshold, size_t n);

    /* The words themselves, of elements [start, start + n), any start. */
    void (*philox_words)(uint32_t *TVK_RESTRICT dst, uint64_t start,
                         uint64_t key, uint64_t name_hash, size_t n);

    /* Bit i is set iff keys[i] is not 0 and words[i] is below the odds of its
     * rank r (entries of a lower key, and those of the same one before it):
     * p = least + span * r / (n - 1), n == 1: least; below round(p * 2^32), in
     * fp64 as written. keys as from magnitudes, the largest of them `most`; n
     * below 2^32; scratch TVK_RANK_EACH * n + TVK_RANK_FIXED bytes, aligned to
     * 64; may not overlap the rest. */
    void (*rank_mask)(uint64_t *TVK_RESTRICT mask, const uint32_t *keys,
                      const uint32_t *words, const struct tvk_odds *odds,
                      void *TVK_RESTRICT scratch, uint32_t most, size_t n);

    /* ---- reductions -------------------------------------------------------
     * One leaf: n <= TVK_LEAF elements. Sixteen fp64 lanes, element i into lane
     * i & 15 in index order, lanes added pairwise (0+8, 1+9, ...; then 0+4,
     * ...; 0+2, 1+3; 0+1). b may equal a. */
    void (*dots)(struct tvk_dots *out, const float *a, const float *b,
                 size_t n);
    /* sum over a leaf of |fp32(x-b)|, b NULL: |x|; with mask only its bits;
     * lanes as in dots. */
    double (*abs_sum)(const float *x, const float *b, const uint64_t *mask,
                      size_t n);
    /* Both, of all and of what the mask has. */
    void (*abs_sums)(double *all, double *kept, const float *x, const float *b,
                     const uint64_t *mask, size_t n);
    /* As abs_sum, of the squares of fp32(x-b). */
    double (*square_sum)(const float *x, const float *b, const uint64_t *mask,
                         size_t n);
    /* Elements that are NaN or infinite. */
    uint64_t (*count_nonfinite)(const float *x, size_t n);
    /* One leaf; sums in lanes as in dots. */
    void (*stats)(struct tvk_stats *out, const float *x, size_t n);

    /* ---- low rank ----------------------------------------------------------
     * Adds scale * L R to a row-major matrix [rows, cols]: for the n elements
     * from flat position `start`, element (r, c):
     *   y[i] = fp32(y[i] + scale * (sum over k in order of L[r,k]*R[k,c]))
     * sum in fp64 from +0, each product exact in fp64. L is [rows, rank] with
     * row stride rank; R is [rank, cols] with row stride cols. y in place. */
    void (*lowrank_add)(float *TVK_RESTRICT y, const float *TVK_RESTRICT l,
                        const float *TVK_RESTRICT r, double scale, size_t rank,
                        uint64_t cols, uint64_t start, size_t n);
};

/* Best row that this machine runs, never above cap. Built once, thread-safe. */
const struct tvk_table *tvk_table_for(enum tvk_isa cap);
/* The row for the whole machine. */
const struct tvk_table *tvk_table_best(void);
/* True when CPU and operating system support the row. */
int tvk_isa_supported(enum tvk_isa isa);
/* "ref", "avx2", "avx512", "amx" -> isa; returns 0, or -1 for an unknown name.
 */
int tvk_isa_from_name(const char *name, enum tvk_isa *isa);
/* Space-separated features in use ("avx2 f16c avx512f ..."), filled. */
const char *tvk_cpu_features(char *dst, size_t cap);

/* Sum of n leaves in a fixed binary tree: the left part is the largest power of
 * two below n. Independent of who computed which leaf. */
struct tvk_dots tvk_dots_tree(const struct tvk_dots *leaves, size_t n);
double tvk_sum_tree(const double *leaves, size_t n);

/* log(x), below 1e-15 off and the same bits on every machine: the logarithm of
 * table.divergence. */
double tvk_log(float x);

/* table.philox_words of the reference row. */
void tvk_philox_words(uint32_t *dst, uint64_t start, uint64_t key,
                      uint64_t name_hash, size_t n);
void tvk_stats_merge(struct tvk_stats *into, const struct tvk_stats *more);

/* Converts n elements of a math dtype to/from fp32 through the table's
 * functions (F32 is copied). dtype must satisfy tv_dtype_is_math. Returns the
 * elements of dst that are not finite. */
uint64_t tvk_to_f32(const struct tvk_table *k, enum tv_dtype t, float *dst,
                    const void *src, size_t n);
uint64_t tvk_from_f32(const struct tvk_table *k, enum tv_dtype t, void *dst,
                      const float *src, size_t n);

#ifdef __cplusplus
}
#endif
#endif
