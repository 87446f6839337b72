/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sgemm.c - tv_sgemm: what OpenBLAS's sgemm gives here, as our programs use it.
 *
 *   tv_sgemm THREADS SECONDS [M N K]
 *
 * Every thread multiplies its own [M, K] by [N, K]^T again and again, one BLAS
 * thread each, until SECONDS of wall time have passed. Prints JSON: GFLOP per
 * second of wall time and per second of CPU time, which other jobs on the
 * machine disturb less. For tools/bench: the peak that the same cores reach in
 * the same run.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cblas.h>

#include "tv/alloc.h"

#define THREADS_MAX 256

struct worker {
    pthread_t thread;
    int m, n, k;
    double seconds, done; /* products */
};

static double now(clockid_t which)
{
    struct timespec t;

    (void)clock_gettime(which, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static float *matrix(int rows, int columns)
{
    const size_t n = (size_t)rows * (size_t)columns;
    float *const p = tv_alloc_aligned(n * sizeof(*p));

    for (size_t i = 0; p && i < n; i++)
        p[i] = (float)(i % 17) / 16.0f - 0.5f;
    return p;
}

static void *work(void *arg)
{
    struct worker *const w = arg;
    float *const a = matrix(w->m, w->k);
    float *const b = matrix(w->n, w->k);
    float *const c = matrix(w->m, w->n);
    const double end = now(CLOCK_MONOTONIC) + w->seconds;

    while (a && b && c && (now(CLOCK_MONOTONIC) < end || w->done < 1)) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, w->m, w->n, w->k,
                    1.0f, a, w->k, b, w->k, 0.0f, c, w->n);
        w->done++;
    }
    tv_free(a);
    tv_free(b);
    tv_free(c);
    return NULL;
}

int main(int argc, char **argv)
{
    static struct worker workers[THREADS_MAX];
    const int n_threads = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 0;
    const double seconds = argc > 2 ? strtod(argv[2], NULL) : 0;
    int shape[3] = {2048, 1024, 2048};
    double flop = 0;
    int started = 0;

    if ((argc != 3 && argc != 6) || n_threads < 1 || n_threads > THREADS_MAX ||
        !(seconds > 0)) {
        (void)fprintf(stderr, "usage: %s THREADS SECONDS [M N K]\n", argv[0]);
        return 2;
    }
    for (int i = 0; i < 3 && argc == 6; i++)
        shape[i] = (int)strtol(argv[3 + i], NULL, 10);
    openblas_set_num_threads(1);
    const double wall0 = now(CLOCK_MONOTONIC);
    const double cpu0 = now(CLOCK_PROCESS_CPUTIME_ID);
    for (; started < n_threads; started++) {
        struct worker *const w = &workers[started];

        w->m = shape[0];
        w->n = shape[1];
        w->k = shape[2];
        w->seconds = seconds;
        if (pthread_create(&w->thread, NULL, work, w) != 0)
            break;
    }
    for (int i = 0; i < started; i++) {
        (void)pthread_join(workers[i].thread, NULL);
        flop += 2.0 * workers[i].done * shape[0] * shape[1] * shape[2];
    }
    const double wall = now(CLOCK_MONOTONIC) - wall0;
    const double cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu0;
    (void)printf("{\"core\": \"%s\", \"threads\": %d, \"gflops\": %.2f, "
                 "\"gflop_per_cpu_second\": %.2f}\n",
                 openblas_get_corename(), started, flop / wall / 1e9,
                 flop / cpu / 1e9);
    return flop > 0 ? 0 : 1;
}
