/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sequential.c - see sequential.h.
 *
 *   stage 0      what embeds ids     merged, then every text is embedded
 *   stage 1 + l  block l             looked at, merged, passed
 *
 * One region of the scratch file holds the tensors of the stage at hand: those
 * of the one before are not read any more. Stages are run by the engine that
 * runs the plan (exec.h), into a sink that is this region, with every other
 * tensor marked as done.
 */
#include "sequential.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include <sys/mman.h>

#include "calibrated_parts.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

#define ALIGN 64u

struct run { /* of one text */
    tve_model *m;
    struct tve_samples samples;
    tve_sequence *sequence;
    struct tvm_sequential *s; /* and its number, for what calls back */
    size_t text;
};

struct region { /* a sink; first, so that it is one */
    struct tvm_sink sink;
    int fd;
    uint64_t bytes;
    const unsigned char *map;
    uint64_t *at; /* [n_tensors] */
};

/* ---- stages -------------------------------------------------------------- */

/* stage[i] of tensor i of the plan: the same for all models that pass
 * tvm_sequential_check. */
static size_t *find_stages(const struct tvm_plan *p, const tve_model *m)
{
    size_t *stage = tv_calloc(p->n_tensors + 1, sizeof *stage);

    for (size_t i = 0; stage && i < p->n_tensors; i++)
        stage[i] = tve_model_stage(m, p->tensors[i].name);
    return stage;
}

static bool same_shape(const struct tvm_tensor *t,
                       const struct tv_input_tensor *x)
{
    return t->rank == x->rank &&
           memcmp(t->shape, x->shape, t->rank * sizeof *t->shape) == 0;
}

static const struct tvm_tensor *output_of(const struct tvm_plan *p,
                                          const char *name)
{
    for (size_t i = 0; i < p->n_tensors; i++)
        if (strcmp(p->tensors[i].name, name) == 0)
            return &p->tensors[i];
    return NULL;
}

/* Is the tensor, where it comes from this model, the one of that name? */
static bool takes_itself(const struct tvm_tensor *t, size_t input)
{
    for (size_t s = 0; s < t->n_sources; s++)
        if (t->sources[s].input == input &&
            (t->sources[s].gather ||
             strcmp(t->sources[s].tensor->name, t->name) != 0))
            return false;
    return true;
}

enum tv_err tvm_sequential_check(const struct tvm_plan *p, size_t input,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan_input *in = &p->inputs[input];
    tve_model *m = NULL;

    TV_TRY(tvm_layer_model(p, input, TVM_MODEL_LEAST, err, &m));
    if (p->n_draws > 0) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "statistics of the model merged so far cannot be "
                          "taken with --compat mergekit");
        goto out;
    }
    for (size_t i = 0; i < tv_input_count(in->input); i++) {
        const struct tv_input_tensor *x = tv_input_tensor(in->input, i);
        const struct tvm_tensor *t = NULL;
        if (tve_model_stage(m, x->name) == SIZE_MAX)
            continue;
        t = output_of(p, x->name);
        if (t && same_shape(t, x) && takes_itself(t, input))
            continue;
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "statistics of the model merged so far need an "
                          "output that is built like '%s': %s %s",
                          in->ref, x->name,
                          !t                  ? "is not in it"
                          : !same_shape(t, x) ? "has another shape in it"
                                              : "is in another place in it");
        goto out;
    }
out:
    tve_model_close(m);
    return rc;
}

/* ---- the region ---------------------------------------------------------- */

static enum tv_err put(struct tvm_sink *s, size_t t, uint64_t off,
                       const void *data, size_t n, struct tv_error *err)
{
    const struct region *const r = (const struct region *)(const void *)s;

    return tv_pwrite_all(r->fd, data, n, r->at[t] + off,
                         "the scratch file of merged blocks", err);
}

static enum tv_err no_commit(struct tvm_sink *s, const size_t *tensors,
                             size_t n, struct tv_error *err)
{
    (void)s;
    (void)tensors;
    (void)n;
    (void)err;
    return TV_OK;
}

static const struct tvm_sink_ops region_ops = {.write = put,
                                               .commit = no_commit};

/* Places the tensors of a stage; returns the bytes they take. */
static uint64_t place(const struct tvm_plan *p, const size_t *stage, size_t at,
                      struct region *r)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < p->n_tensors; i++) {
        r->sink.done[i].done = stage[i] != at;
        if (stage[i] != at)
            continue;
        r->at[i] = bytes;
        bytes += (p->tensors[i].bytes + ALIGN - 1) / ALIGN * ALIGN;
    }
    return bytes;
}

static enum tv_err region_open(struct region *r, const struct tvm_plan *plan,
                               struct tvm_plan *part, const size_t *stage,
                               size_t n_stages, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = NULL;

    r->sink = (struct tvm_sink){.ops = &region_ops,
                                .plan = part,
                                .commit_bytes = UINT64_MAX,
                                .busy = true};
    r->sink.done = tv_calloc(part->n_tensors + 1, sizeof *r->sink.done);
    r->at = tv_calloc(part->n_tensors + 1, sizeof *r->at);
    if (!r->sink.done || !r->at) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < n_stages; i++) {
        const uint64_t bytes = place(part, stage, i, r);
        r->bytes = bytes > r->bytes ? bytes : r->bytes;
    }
    path = tvm_scratch_path(&plan->options, "merged", r);
    if (!path) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    r->fd = tv_sys()->open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (r->fd < 0) {
        rc = tv_error_sys(err, errno, "cannot create scratch file %s", path);
        goto out;
    }
    (void)tv_sys()->unlink(path);
    if (r->bytes == 0)
        goto out;
    if (tv_sys()->ftruncate(r->fd, (off_t)r->bytes) != 0) {
        rc = tv_error_sys(err, errno, "the scratch file of merged blocks");
        goto out;
    }
    void *at =
        tv_sys()->mmap(NULL, (size_t)r->bytes, PROT_READ, MAP_SHARED, r->fd, 0);
    if (at == MAP_FAILED)
        rc = tv_error_sys(err, errno, "mapping merged blocks");
    else
        r->map = at;
out:
    tv_free(path);
    return rc;
}

static void region_close(struct region *r)
{
    if (r->map)
        (void)tv_sys()->munmap((void *)(uintptr_t)r->map, (size_t)r->bytes);
    if (r->fd >= 0)
        (void)tv_sys()->close(r->fd);
    tv_free(r->sink.done);
    tv_free(r->at);
}

/* Merges a stage and gives it to all models. */
static enum tv_err merge_stage(const struct tvm_sequential *s,
                               struct tvm_plan *part, struct region *r,
                               const size_t *stage, size_t at,
                               const struct run *runs, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    (void)place(part, stage, at, r);
    TV_TRY(
        tvm_exec_part(part, &r->sink, s->cache, s->calibrated, s->hooks, err));
    for (size_t i = 0; i < part->n_tensors; i++)
        for (size_t k = 0; stage[i] == at && k < s->n_texts; k++)
            if (part->tensors[i].bytes > 0)
                TV_TRY(tve_model_replace(runs[k].m, part->tensors[i].name,
                                         part->tensors[i].dtype,
                                         r->map + r->at[i], err));
out:
    return rc;
}

/* ---- texts --------------------------------------------------------------- */

static bool wants(void *arg, const char *tensor)
{
    const struct run *const r = arg;

    return r->s->wants(r->s->arg, r->text, tensor);
}

static enum tv_err see(void *arg, const struct tve_stat_input *in,
                       struct tv_error *err)
{
    const struct run *const r = arg;

    return r->s->see(r->s->arg, r->text, in, err);
}

/* Blocks up to the last one that lacks something. */
static size_t count_blocks(const struct tvm_sequential *s,
                           const struct run *runs)
{
    size_t n = 0;

    for (size_t k = 0; k < s->n_texts; k++) {
        const tv_input *in = s->plan->inputs[s->texts[k].input].input;
        for (size_t i = 0; i < tv_input_count(in); i++) {
            const char *name = tv_input_tensor(in, i)->name;
            const size_t stage = tve_model_stage(runs[k].m, name);
            if (stage != SIZE_MAX && stage > n && s->lacks(s->arg, k, name))
                n = stage;
        }
    }
    return n;
}

static enum tv_err open_models(struct tvm_sequential *s, struct run *runs,
                               uint64_t memory, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t k = 0; k < s->n_texts; k++) {
        const size_t input = s->texts[k].input;
        struct run *const r = &runs[k];
        r->s = s;
        r->text = k;
        TV_TRY(tvm_layer_model(s->plan, input, memory, err, &r->m));
        TV_TRY(tvm_layer_samples(s->plan, input, r->m,
                                 s->plan->inputs[input].calibration,
                                 &r->samples, err));
        s->n_tokens += r->samples.n_tokens;
        s->random = s->random || r->samples.random;
    }
out:
    return rc;
}

static enum tv_err open_sequences(struct tvm_sequential *s, struct run *runs,
                                  uint64_t streams, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t k = 0; k < s->n_texts; k++) {
        const struct tve_sequence_options opt = {
            .kind = s->texts[k].gram ? TVE_STAT_GRAM : TVE_STAT_DIAG,
            .stream_bytes = streams / s->n_texts,
            .wants = wants,
            .arg = &runs[k],
            .cancel = s->hooks ? s->hooks->cancel : NULL,
        };
        TV_TRY(tve_sequence_open(runs[k].m, &runs[k].samples, &opt, err,
                                 &runs[k].sequence));
    }
out:
    return rc;
}

static void close_runs(const struct tvm_sequential *s, struct run *runs)
{
    for (size_t k = 0; runs && k < s->n_texts; k++) {
        tve_sequence_close(runs[k].sequence);
        tve_samples_free(&runs[k].samples);
        tve_model_close(runs[k].m);
    }
    tv_free(runs);
}

static void tell(const struct tvm_sequential *s, size_t block, size_t n_blocks)
{
    if (s->hooks && s->hooks->calibrating)
        s->hooks->calibrating(s->hooks->arg, "the merged model",
                              s->n_tokens * block / n_blocks, s->n_tokens);
}

enum tv_err tvm_sequential_run(struct tvm_sequential *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan part;
    struct region r = {.fd = -1};
    struct run *runs = tv_calloc(s->n_texts + 1, sizeof *runs);
    size_t *stage = NULL;
    size_t n_blocks = 0;
    const uint64_t streams = tvm_exec_part_plan(s->plan, &part);
    const uint64_t memory = s->plan->options.memory_bytes;
    const uint64_t held = streams + s->reserve;

    if (!runs) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(open_models(s, runs, memory > held ? memory - held : 0, err));
    stage = find_stages(s->plan, runs[0].m);
    if (!stage) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    n_blocks = count_blocks(s, runs);
    if (n_blocks == 0)
        goto out;
    /* Nothing runs through the last one merged. */
    TV_TRY(region_open(&r, s->plan, &part, stage, n_blocks, err));
    TV_TRY(merge_stage(s, &part, &r, stage, 0, runs, err));
    TV_TRY(open_sequences(s, runs, streams, err));
    for (size_t b = 0; b < n_blocks; b++) {
        tell(s, b, n_blocks);
        for (size_t k = 0; k < s->n_texts; k++)
            TV_TRY(tve_sequence_look(runs[k].sequence, see, &runs[k], err));
        TV_TRY(s->ready(s->arg, err));
        if (b + 1 == n_blocks)
            break;
        TV_TRY(merge_stage(s, &part, &r, stage, 1 + b, runs, err));
        for (size_t k = 0; k < s->n_texts; k++)
            TV_TRY(tve_sequence_advance(runs[k].sequence, err));
    }
    tell(s, n_blocks, n_blocks);
out:
    if (rc != TV_OK)
        tv_error_context(err, "statistics of the model merged so far");
    close_runs(s, runs);
    region_close(&r);
    tv_free(stage);
    return rc;
}

enum tv_err tvm_sequential_scratch(const struct tvm_plan *p,
                                   const struct tvm_sequential_text *texts,
                                   size_t n_texts, uint64_t reserve,
                                   uint64_t *bytes, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan part;
    const uint64_t streams = tvm_exec_part_plan(p, &part);
    const uint64_t memory = p->options.memory_bytes;
    const uint64_t held = streams + reserve;
    uint64_t batch = 0;

    *bytes = 0;
    for (size_t k = 0; k < n_texts; k++) {
        const size_t input = texts[k].input;
        const struct tve_sequence_options opt = {.stream_bytes =
                                                     streams / n_texts};
        struct tve_scratch x;
        TV_TRY(tvm_layer_scratch(
            p, input, p->inputs[input].calibration, texts[k].gram,
            memory > held ? memory - held : 1, &opt, err, &x));
        *bytes += x.streams;
        batch = x.batch > batch ? x.batch : batch;
    }
    *bytes += batch;
out:
    return rc;
}

uint64_t tvm_sequential_disk(const struct tvm_plan *p)
{
    uint64_t most = 0;
    uint64_t bytes = 0;

    /* Layers stand together in the plan. */
    for (size_t i = 0; i < p->n_tensors; i++) {
        if (i > 0 && p->tensors[i].layer != p->tensors[i - 1].layer)
            bytes = 0;
        bytes += p->tensors[i].bytes + ALIGN;
        most = bytes > most ? bytes : most;
    }
    return most;
}
