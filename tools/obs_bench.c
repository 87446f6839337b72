/* SPDX-License-Identifier: Apache-2.0 */
/*
 * obs_bench.c - pruning one layer by SparseGPT, step by step.
 *
 *   tv_obs_bench [COLS [ROWS [DENSITY]]]
 *
 * One line of JSON per step: floating-point operations, seconds, CPU seconds;
 * a product of the size that the loop makes, before and after the steps, is
 * the peak that they are held against. Then the peak of resident memory.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <sys/resource.h>

#include <cblas.h>

#include "tv/alloc.h"
#include "tv/layer.h"

#define FEATURES 64u

struct step {
    double wall, cpu;
};

static double clock_of(clockid_t id)
{
    struct timespec ts;
    (void)clock_gettime(id, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static struct step begin(void)
{
    return (struct step){clock_of(CLOCK_MONOTONIC),
                         clock_of(CLOCK_PROCESS_CPUTIME_ID)};
}

static void end(struct step from, const char *what, double flops)
{
    const struct step to = begin();
    printf("{\"step\": \"%s\", \"flops\": %.0f, \"seconds\": %.6f, \"cpu\": "
           "%.6f}\n",
           what, flops, to.wall - from.wall, to.cpu - from.cpu);
    (void)fflush(stdout);
}

/* A number in [-1, 1). */
static float draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 32) / 2147483648.0f;
}

/* Correlated inputs: a few common features and what each has of its own. */
static void make_gram(float *h, float *features, size_t n, uint64_t *state)
{
    for (size_t i = 0; i < n * FEATURES; i++)
        features[i] = draw(state);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)n, (blasint)n,
                (blasint)FEATURES, 1.0f, features, (blasint)FEATURES, features,
                (blasint)FEATURES, 0.0f, h, (blasint)n);
    for (size_t i = 0; i < n; i++)
        h[i * n + i] += 4.0f + 4.0f * draw(state) * draw(state);
}

/* Two of the loop's products. */
static void peak(float *t, const float *h, size_t rows, size_t cols,
                 float *work)
{
    const size_t k = cols < TVK_OBS_GROUP ? cols : TVK_OBS_GROUP;
    const struct step from = begin();
    for (int i = 0; i < 2; i++)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)rows,
                    (blasint)cols, (blasint)k, 0.0f, work, (blasint)k, h,
                    (blasint)cols, 1.0f, t, (blasint)cols);
    for (int i = 0; i < 2; i++)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)rows,
                    (blasint)cols, (blasint)k, 1e-9f, work, (blasint)k, h,
                    (blasint)cols, 1.0f, t, (blasint)cols);
    end(from, "sgemm", 4.0 * (double)rows * (double)cols * (double)k);
}

static int run(size_t cols, size_t rows, double density)
{
    const double n = (double)cols;
    const double m = (double)rows;
    uint64_t state = 1;
    int status = 1;
    float *h = tv_alloc_aligned(tvk_gram_floats(cols) * sizeof *h);
    float *t = tv_alloc_aligned(rows * cols * sizeof *t);
    const size_t n_work = tvk_gram_work(cols) > tvk_obs_work(rows, cols)
                              ? tvk_gram_work(cols)
                              : tvk_obs_work(rows, cols);
    float *work = tv_alloc_aligned(n_work * sizeof *work);
    float *features = tv_alloc_aligned(cols * FEATURES * sizeof *features);
    struct rusage use;

    if (!h || !t || !work || !features)
        goto out;
    openblas_set_num_threads(1);
    make_gram(h, features, cols, &state);
    tv_free(features);
    features = NULL;
    for (size_t i = 0; i < rows * cols; i++)
        t[i] = draw(&state);
    memset(work, 0, n_work * sizeof *work);
    peak(t, h, rows, cols, work);
    (void)tvk_gram_damp(h, cols, 0.01);
    struct step from = begin();
    if (tvk_gram_factor(h, cols, work) != 0)
        goto out;
    /* n^3 / 3 in fp64, which counts twice against a peak in fp32, and as much
     * in fp32. */
    end(from, "factor", n * n * n);
    from = begin();
    const struct tvk_obs how = {.density = density};
    const uint64_t kept = tvk_obs_prune(t, h, rows, cols, &how, work);
    end(from, "loop", m * n * n);
    peak(t, h, rows, cols, work);
    (void)getrusage(RUSAGE_SELF, &use);
    printf(
        "{\"step\": \"memory\", \"peak_bytes\": %.0f, \"bound_bytes\": %.0f, "
        "\"kept\": %llu}\n",
        (double)use.ru_maxrss * 1024.0, (n * n + m * n) * 4.0,
        (unsigned long long)kept);
    status = 0;
out:
    tv_free(features);
    tv_free(work);
    tv_free(t);
    tv_free(h);
    return status;
}

int main(int argc, char **argv)
{
    const long cols = argc > 1 ? strtol(argv[1], NULL, 10) : 8192;
    const long rows = argc > 2 ? strtol(argv[2], NULL, 10) : 2048;
    const double density = argc > 3 ? strtod(argv[3], NULL) : 0.2;

    if (cols < 1 || cols > (long)TVK_LAYER_COLS || rows < 1 || rows > 1 << 20 ||
        !(density > 0.0) || density > 1.0) {
        (void)fprintf(stderr, "usage: tv_obs_bench [COLS [ROWS [DENSITY]]]\n");
        return 2;
    }
    return run((size_t)cols, (size_t)rows, density);
}
