/* SPDX-License-Identifier: Apache-2.0 */
/*
 * run.c - one merge from plan to published result.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "calibrated.h"
#include "exec.h"
#include "room.h"
#include "sink.h"
#include "source.h"
#include "survey.h"
#include "tv/alloc.h"
#include "tv/merge.h"

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static int compare_by_name(const void *a, const void *b)
{
    const struct tvm_tensor *x = *(const struct tvm_tensor *const *)a;
    const struct tvm_tensor *y = *(const struct tvm_tensor *const *)b;
    return strcmp(x->name, y->name);
}

static enum tv_err add_up(const struct tvm_plan *p,
                          const struct tvm_tensor_done *done,
                          struct tvm_totals *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor **order = NULL;
    tv_hasher *h = NULL;

    memset(out, 0, sizeof *out);
    TV_TRY(tv_hasher_open(err, &h));
    order = tv_calloc(p->n_tensors + 1, sizeof *order);
    if (!order) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < p->n_tensors; i++) {
        order[i] = &p->tensors[i];
        out->n_nonfinite_in += done[i].n_nonfinite_in;
        out->n_nonfinite_out += done[i].n_nonfinite_out;
    }
    qsort(order, p->n_tensors, sizeof *order, compare_by_name);
    for (size_t i = 0; i < p->n_tensors; i++)
        tv_digest_add(h, order[i]->name, order[i]->dtype, order[i]->shape,
                      order[i]->rank, done[order[i] - p->tensors].checksum);
    out->digest = tv_hasher_value(h);
out:
    tv_free(order);
    tv_hasher_close(h);
    return rc;
}

static enum tv_err run_all(struct tvm_plan *p, struct tvm_sink *sink,
                           const struct tvm_run_hooks *hooks,
                           struct tvm_result *result, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_exec_stats stats = {.bytes_read = 0};
    struct tvm_survey *survey = NULL;
    struct tvm_totals totals;

    if (sink->already_done) {
        totals = sink->totals;
        result->already_done = true;
        result->n_resumed = p->n_tensors;
        goto out;
    }
    for (size_t i = 0; i < p->n_tensors; i++)
        result->n_resumed += sink->done[i].done;
    result->n_remade = sink->n_remade;
    TV_TRY(tvm_room_into(p, err));
    if (sink->ops->files)
        TV_TRY(sink->ops->files(sink, err));
    /* Merged blocks in front of others are merged again, done or not. */
    TV_TRY(tvm_survey_run(p, tvm_calibrated_walks(p) ? NULL : sink->done, hooks,
                          err, &survey));
    rc = tvm_exec(p, sink, hooks, &stats, err);
    result->bytes_read = stats.bytes_read;
    result->bytes_written = stats.bytes_written;
    result->t_read = stats.t_read;
    result->t_compute = stats.t_compute;
    result->t_write = stats.t_write;
    result->t_sync = stats.t_sync;
    result->cache = stats.cache;
    result->calibration = stats.calibration;
    TV_TRY(rc);
    TV_TRY(add_up(p, sink->done, &totals, err));
    const double t0 = now();
    TV_TRY(tvm_inputs_unchanged(p, err));
    TV_TRY(sink->ops->finish(sink, &totals, err));
    result->t_sync += now() - t0;
out:
    tvm_survey_close(survey);
    if (rc == TV_OK) {
        result->digest = totals.digest;
        result->n_nonfinite_in = totals.n_nonfinite_in;
        result->n_nonfinite_out = totals.n_nonfinite_out;
    }
    return rc;
}

uint64_t tvm_run_scratch(const struct tvm_plan *p, bool *fits, uint64_t *needed)
{
    bool fits_survey = true;
    uint64_t needed_survey = 0;
    const uint64_t survey = tvm_survey_scratch(p, &fits_survey, &needed_survey);
    const uint64_t exec = tvm_exec_scratch(p, fits, needed);

    *fits = *fits && fits_survey;
    *needed = needed_survey > *needed ? needed_survey : *needed;
    return survey > exec ? survey : exec;
}

enum tv_err tvm_run_check(struct tvm_plan *p, struct tv_error *err)
{
    if (p->options.into)
        return tvm_sink_into_check(p, err);
    return p->options.out_dir ? tvm_sink_dir_check(p, err) : TV_OK;
}

enum tv_err tvm_run(struct tvm_plan *p, const struct tvm_run_hooks *hooks,
                    struct tvm_result *result, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_sink *sink = NULL;
    char *charged = NULL;
    const double t0 = now();
    bool fits = false;
    uint64_t needed = 0;

    memset(result, 0, sizeof *result);
    result->n_tensors = p->n_tensors;
    tv_alloc_peak_reset();
    (void)tvm_run_scratch(p, &fits, &needed);
    if (!fits) {
        rc = tv_error_set(err, TV_E_BUDGET,
                          "the merge needs %llu bytes of memory, --memory "
                          "allows %llu",
                          (unsigned long long)needed,
                          (unsigned long long)p->options.memory_bytes);
        goto out;
    }
    TV_TRY(tvm_room_take(p, err, &charged));
    if (p->options.into)
        TV_TRY(tvm_sink_into_open(p, err, &sink));
    else if (p->options.out_dir)
        TV_TRY(tvm_sink_dir_open(p, hooks, err, &sink));
    else
        TV_TRY(tv_error_set(err, TV_E_USAGE, "no output named"));
    TV_TRY(run_all(p, sink, hooks, result, err));
    if (p->options.strict &&
        result->n_nonfinite_in + result->n_nonfinite_out > 0)
        rc = tv_error_set(err, TV_E_NONFINITE,
                          "%llu values of the inputs and %llu of the result "
                          "are NaN or infinite",
                          (unsigned long long)result->n_nonfinite_in,
                          (unsigned long long)result->n_nonfinite_out);
out:
    tvm_sink_close(sink);
    tvm_room_give(p, charged, rc == TV_OK || rc == TV_E_NONFINITE);
    result->seconds = now() - t0;
    result->peak_scratch_bytes = tv_alloc_peak();
    return rc;
}
