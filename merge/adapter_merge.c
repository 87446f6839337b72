/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_merge.c - adapters in, an adapter out.
 *
 *   recipe -> adapters -> modules: the union of what they change, with the
 *   factors of each. cat and svd work on the stacks; a method of the registry
 *   sees small square tensors, one per module, that a plan and run of their own
 *   merge in OUT/.tvmerge (so filters, gradients, seeds and everything else
 *   hold as for models); PEFT's combination types are adapter_peft.c's.
 *
 * A module is held in memory whole, as fp64 factors, and nothing larger.
 */
#include "adapter_merge.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <jansson.h>

#include "tv/adapter_out.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/linalg.h"
#include "tv/sys.h"
#include "tv/text.h"

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* ---- modules ------------------------------------------------------------- */

static int by_target(const void *x, const void *y)
{
    return tv_name_compare(
        (*(const struct tv_adapter_module *const *)x)->target,
        (*(const struct tv_adapter_module *const *)y)->target);
}

static bool same_shape(const struct tv_adapter_module *x,
                       const struct tv_adapter_module *y)
{
    bool same = x->in_features == y->in_features &&
                x->out_features == y->out_features &&
                x->transposed == y->transposed && x->a->rank == y->a->rank;

    for (unsigned d = 1; same && d < x->a->rank; d++)
        same = x->a->shape[d] == y->a->shape[d];
    return same;
}

/* The union of all modules; a module that an adapter lacks counts as zero. */
static enum tv_err collect_modules(struct tvm_adapters *a, struct tv_error *err)
{
    const struct tv_adapter_module **all = NULL;
    size_t n = 0, at = 0;

    for (size_t i = 0; i < a->n_inputs; i++)
        n += tv_adapter_count(a->inputs[i].adapter);
    all = tv_calloc(n + 1, sizeof *all);
    a->modules = tv_calloc(n + 1, sizeof *a->modules);
    a->of = tv_calloc((n + 1) * a->n_inputs, sizeof *a->of);
    if (!all || !a->modules || !a->of) {
        tv_free(all);
        return am_no_memory(err);
    }
    for (size_t i = 0; i < a->n_inputs; i++)
        for (size_t k = 0; k < tv_adapter_count(a->inputs[i].adapter); k++)
            all[at++] = tv_adapter_module(a->inputs[i].adapter, k);
    qsort(all, n, sizeof *all, by_target);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(all[i]->target, all[i - 1]->target) != 0)
            a->modules[a->n_modules++].like = all[i];
    tv_free(all);
    for (size_t m = 0; m < a->n_modules; m++) {
        struct am_module *x = &a->modules[m];
        x->of = &a->of[m * a->n_inputs];
        for (size_t i = 0; i < a->n_inputs; i++) {
            const tv_adapter *ad = a->inputs[i].adapter;
            for (size_t k = 0; k < tv_adapter_count(ad) && !x->of[i]; k++)
                if (strcmp(tv_adapter_module(ad, k)->target, x->like->target) ==
                    0)
                    x->of[i] = tv_adapter_module(ad, k);
            if (!x->of[i])
                continue;
            if (x->cols == 0)
                x->like = x->of[i]; /* names as the first one writes them */
            x->cols += (size_t)x->of[i]->r;
            if (x->of[i]->r > x->max_rank)
                x->max_rank = x->of[i]->r;
            if (!same_shape(x->like, x->of[i]))
                tvm_problem_add(
                    a->problems, true, TV_E_INPUT, "",
                    "%s: module '%s' changes another shape ([%" PRIu64
                    ", %" PRIu64 "]) than in '%s' ([%" PRIu64 ", %" PRIu64 "])",
                    a->inputs[i].ref->text, x->like->module,
                    x->of[i]->out_features, x->of[i]->in_features,
                    a->inputs[0].ref->text, x->like->out_features,
                    x->like->in_features);
        }
    }
    return TV_OK;
}

/* Rank of every module in the output, and of the adapter. */
static void choose_ranks(struct tvm_adapters *a)
{
    uint64_t widest = 0;

    for (size_t i = 0; i < a->n_modules; i++)
        if (a->modules[i].max_rank > widest)
            widest = a->modules[i].max_rank;
    for (size_t i = 0; i < a->n_modules; i++) {
        struct am_module *m = &a->modules[i];
        const uint64_t full = am_least(
            m->cols, am_least(m->like->in_features, m->like->out_features));
        if (a->kind == AM_PEFT)
            m->rank = tvm_peft_rank(a, m, widest);
        else if (a->kind == AM_CAT)
            m->rank = m->cols;
        else if (a->kind == AM_SVD)
            m->rank = am_least(full, a->rank > 0 ? a->rank : widest);
        else
            m->rank = a->rank > 0 ? am_least(full, a->rank) : full;
        if (m->rank > a->out_rank)
            a->out_rank = m->rank;
    }
    if (a->kind == AM_PEFT) /* one rank for all, zeros where there is less */
        for (size_t i = 0; i < a->n_modules; i++)
            a->modules[i].rank = a->out_rank;
}

/* Bytes that one module takes at most. */
static uint64_t module_bytes(const struct tvm_adapters *a,
                             const struct am_module *m)
{
    const uint64_t sides = m->like->in_features + m->like->out_features;
    const uint64_t cols = m->cols;
    uint64_t n = 8 * (4 * sides * cols + 12 * cols * cols) +
                 4 * sides * (m->rank + m->max_rank) + (1u << 20);

    if (a->kind == AM_PEFT)
        n += tvm_peft_bytes(a, m);
    return n;
}

/* Bytes of the merge; reports a budget that is too small. */
static void measure(struct tvm_adapters *a)
{
    const uint64_t each = tv_dtype_bits(a->dtype) / 8u;

    for (size_t i = 0; i < a->n_modules; i++) {
        const struct am_module *m = &a->modules[i];
        const uint64_t bytes = module_bytes(a, m);
        if (bytes > a->scratch)
            a->scratch = bytes;
        a->bytes_written +=
            (m->like->in_features + m->like->out_features) * m->rank * each;
        for (size_t k = 0; k < a->n_inputs; k++)
            if (m->of[k])
                a->bytes_read += m->of[k]->a->bytes + m->of[k]->b->bytes;
    }
    if (a->scratch > a->options.memory_bytes) {
        char b[32], c[32];
        tvm_problem_add(a->problems, true, TV_E_BUDGET, "",
                        "this merge needs at least --memory %s, it is %s",
                        tv_format_bytes_arg(a->scratch, b, sizeof b),
                        tv_format_bytes(a->options.memory_bytes, c, sizeof c));
    }
}

/* ---- planning ------------------------------------------------------------ */

static void identify(struct tvm_adapters *a)
{
    struct tv_buf b;

    tv_buf_init(&b, 64u << 20);
    tv_buf_str(&b, "tvmerge.adapter/1");
    tv_buf_le64(&b, a->peft);
    tv_buf_le64(&b, a->options.seed);
    for (size_t i = 0; i < a->n_inputs; i++) {
        tv_buf_le64(&b, a->inputs[i].fingerprint.lo);
        tv_buf_le64(&b, a->inputs[i].fingerprint.hi);
    }
    tv_buf_add(&b, a->text, a->n_text);
    a->hash = tv_hash128(b.data ? b.data : "", b.n_bytes);
    tv_buf_free(&b);
}

static uint64_t disk_of(const struct tvm_adapters *a)
{
    return 2 * a->bytes_written + (1u << 20);
}

static void too_little(struct tvm_adapters *a, const char *what, uint64_t have)
{
    char text[160], need[32], there[32];

    (void)snprintf(text, sizeof text,
                   "%s: the output needs %s (%llu bytes), %s are available",
                   what, tv_format_bytes_up(disk_of(a), need, sizeof need),
                   (unsigned long long)disk_of(a),
                   tv_format_bytes(have, there, sizeof there));
    am_problem(a, NULL, TV_E_NOSPACE, text);
}

static enum tv_err check_room(struct tvm_adapters *a, struct tv_error *err)
{
    const uint64_t quota = a->options.quota_bytes;
    uint64_t disk = 0;
    char *place = NULL;

    if (quota != 0 && disk_of(a) > quota)
        too_little(a, "quota", quota);
    if (!a->options.out_dir)
        return TV_OK;
    place = tv_path_existing(a->options.out_dir);
    if (!place)
        return am_no_memory(err);
    if (tv_dir_check_writable(place, NULL) == TV_OK &&
        tv_disk_free(place, &disk, NULL) == TV_OK && disk_of(a) > disk)
        too_little(a, "disk", disk);
    tv_free(place);
    return TV_OK;
}

enum tv_err tvm_adapters_plan(const char *path, const struct tvm_options *o,
                              bool peft, struct tvm_problems *problems,
                              struct tv_error *err, struct tvm_adapters **out)
{
    struct tvm_adapters *a = tv_calloc(1, sizeof *a);
    const struct tvm_node *root = NULL;
    enum tv_err rc = TV_OK;

    *out = NULL;
    if (!a)
        return am_no_memory(err);
    a->options = *o;
    a->problems = problems;
    a->peft = peft;
    a->kernels = o->kernels ? o->kernels : tvk_table_best();
    a->path = tv_strdup(path);
    if (!a->path) {
        rc = am_no_memory(err);
        goto out;
    }
    TV_TRY(
        am_parse(path, &a->arena, problems, err, &a->text, &a->n_text, &root));
    if (!root || root->kind != TVM_NODE_MAP)
        goto out;
    am_recipe_read(a, root);
    if (o->into)
        am_problem(
            a, NULL, TV_E_UNSUPPORTED,
            "--into takes models; write the adapter to OUT, then 'tvstore "
            "import'");
    if (!tva_linalg_built() && a->kind != AM_CAT)
        am_problem(a, NULL, TV_E_UNSUPPORTED,
                   "this build has no OpenBLAS, which QR and SVD need");
    TV_TRY(am_open_inputs(a, root, err));
    if (problems->n_errors > 0)
        goto done;
    TV_TRY(collect_modules(a, err));
    if (a->kind == AM_PEFT)
        tvm_peft_check(a);
    choose_ranks(a);
    measure(a);
    if (a->kind == AM_CORE && problems->n_errors == 0)
        TV_TRY(am_plan_cores(a, err));
    TV_TRY(check_room(a, err));
    identify(a);
done:
    *out = a;
    a = NULL;
out:
    tvm_adapters_free(a);
    return rc;
}

void tvm_adapters_free(struct tvm_adapters *a)
{
    if (!a)
        return;
    for (size_t i = 0; i < a->n_inputs; i++) {
        json_decref(a->inputs[i].config);
        tv_adapter_close(a->inputs[i].adapter);
        tv_input_close(a->inputs[i].in);
        tv_ref_free(a->inputs[i].ref);
    }
    tv_free(a->inputs);
    tv_free(a->modules);
    tv_free(a->of);
    for (size_t i = 0; i < 2; i++)
        tv_free(a->shown[i]);
    tvm_arena_free(&a->arena);
    tv_free(a->text);
    tv_free(a->path);
    tv_free(a);
}

void tvm_adapters_info(const struct tvm_adapters *a,
                       struct tvm_adapters_info *out)
{
    *out = (struct tvm_adapters_info){
        .method = a->method ? a->method : "",
        .n_inputs = a->n_inputs,
        .n_modules = a->n_modules,
        .n_tensors = 2 * a->n_modules,
        .bytes_read = a->bytes_read,
        .bytes_written = a->bytes_written,
        .peak_scratch_bytes = a->scratch,
        .peak_disk_bytes = disk_of(a),
    };
}

/* Name of a factor without the adapter's name in it, owned. */
static char *factor_name(const struct tv_input_tensor *t)
{
    static const char part[] = ".default";
    char *s = tv_strdup(t->name);
    char *hit = s ? strstr(s, part) : NULL;

    if (hit && (hit[sizeof part - 1] == '.' || hit[sizeof part - 1] == '\0') &&
        strstr(s, "lora_") < hit)
        memmove(hit, hit + sizeof part - 1, strlen(hit + sizeof part - 1) + 1);
    return s;
}

static void factor_shape(const struct am_module *m, bool b, uint64_t *shape)
{
    const struct tv_input_tensor *t = b ? m->like->b : m->like->a;

    memcpy(shape, t->shape, t->rank * sizeof *shape);
    shape[b ? 1 : 0] = m->rank;
}

void tvm_adapters_tensor(const struct tvm_adapters *a, size_t i,
                         struct tvm_adapters_tensor *out)
{
    struct am_module *m = &a->modules[i / 2];
    const bool b = i % 2 != 0;
    char **keep = &((struct tvm_adapters *)(uintptr_t)a)->shown[b];

    tv_free(*keep);
    *keep = factor_name(b ? m->like->b : m->like->a);
    *out = (struct tvm_adapters_tensor){.name = *keep ? *keep : "",
                                        .dtype = a->dtype,
                                        .rank = b ? m->like->b->rank
                                                  : m->like->a->rank};
    factor_shape(m, b, out->shape);
}

/* ---- running ------------------------------------------------------------- */

static enum tv_err put_module(struct tvm_adapters *a, struct am_module *m,
                              tv_input *merged, tva_out *o,
                              struct tv_error *err)
{
    const size_t rank = (size_t)m->rank;
    float *fa = tv_calloc((size_t)m->like->in_features * rank + 1, sizeof *fa);
    float *fb = tv_calloc((size_t)m->like->out_features * rank + 1, sizeof *fb);
    char *na = factor_name(m->like->a), *nb = factor_name(m->like->b);
    uint64_t shape[TV_RANK_MAX];
    enum tv_err rc = TV_OK;

    if (!fa || !fb || !na || !nb) {
        rc = am_no_memory(err);
        goto out;
    }
    if (a->kind == AM_PEFT)
        rc = tvm_peft_module(a, m, fa, fb, err);
    else if (a->kind == AM_CAT)
        rc = am_make_cat(a, m, fa, fb, err);
    else if (a->kind == AM_SVD)
        rc = tvm_adapters_svd(a, m, false, fa, fb, err);
    else
        rc = am_make_core(a, m, merged, fa, fb, err);
    TV_TRY(rc);
    factor_shape(m, false, shape);
    TV_TRY(tva_out_tensor(o, a->kernels, na, m->like->a->rank, shape, a->dtype,
                          fa, err));
    factor_shape(m, true, shape);
    TV_TRY(tva_out_tensor(o, a->kernels, nb, m->like->b->rank, shape, a->dtype,
                          fb, err));
out:
    tv_free(nb);
    tv_free(na);
    tv_free(fb);
    tv_free(fa);
    return rc;
}

static void report(const struct tvm_adapters *a,
                   const struct tvm_run_hooks *hooks, size_t n,
                   const char *name)
{
    if (!hooks || !hooks->progress)
        return;
    const struct tvm_progress p = {
        .n_done = 2 * n,
        .n_tensors = 2 * a->n_modules,
        .bytes_done = a->n_modules ? a->bytes_written * n / a->n_modules : 0,
        .bytes_total = a->bytes_written,
        .tensor = name};
    hooks->progress(hooks->arg, &p);
}

enum tv_err tvm_adapters_check(const struct tvm_adapters *a,
                               struct tv_error *err)
{
    const char *const out = a->options.out_dir;
    enum tv_err rc = TV_OK;

    if (!out)
        return TV_OK;
    for (size_t i = 0; i < a->n_inputs; i++)
        TV_TRY(tva_out_apart(out, tv_input_dir(a->inputs[i].in),
                             a->inputs[i].ref->text, err));
    if (a->options.force)
        TV_TRY(tv_out_dir_links(out, a->options.store, err));
    rc = tva_out_check(out, a->hash, a->options.force, err);
out:
    return rc;
}

enum tv_err tvm_adapters_run(struct tvm_adapters *a,
                             const struct tvm_run_hooks *hooks,
                             struct tvm_result *result, struct tv_error *err)
{
    struct tva_out_done done;
    struct tvm_problems problems;
    tva_out *o = NULL;
    tv_input *merged = NULL;
    char *config = NULL;
    const double t0 = now();
    enum tv_err rc = TV_OK;

    *result = (struct tvm_result){.n_tensors = 2 * a->n_modules};
    tvm_problems_init(&problems);
    tv_alloc_peak_reset();
    if (!a->options.out_dir) {
        rc = tv_error_set(err, TV_E_USAGE, "no output named");
        goto out;
    }
    TV_TRY(tvm_adapters_check(a, err));
    TV_TRY(tva_out_open(a->options.out_dir, a->hash, a->options.force,
                        a->options.sync, &done, err, &o));
    if (done.complete) {
        result->already_done = true;
        result->n_resumed = result->n_tensors = done.n_tensors;
        goto out;
    }
    if (a->kind == AM_CORE)
        TV_TRY(am_merge_cores(a, &merged, &problems, err));
    for (size_t i = 0; i < a->n_modules; i++) {
        if (hooks && hooks->cancel && *hooks->cancel != 0) {
            rc = tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
            goto out;
        }
        TV_TRY(put_module(a, &a->modules[i], merged, o, err));
        report(a, hooks, i + 1, a->modules[i].like->module);
    }
    for (size_t i = 0; i < a->n_inputs; i++)
        TV_TRY(tv_input_unchanged(a->inputs[i].in, err));
    result->bytes_read = a->bytes_read;
    result->bytes_written = tva_out_bytes(o);
    TV_TRY(tvm_adapters_config(a, &config, err));
    TV_TRY(tva_out_file(o, "tvmerge_config.yml", a->text, a->n_text, err));
    tv_input_close(merged);
    merged = NULL;
    TV_TRY(tva_out_finish(o, config, strlen(config), &done, err));
out:
    if (rc == TV_OK)
        result->digest = done.digest;
    tv_input_close(merged);
    tva_out_close(o);
    tv_free(config);
    tvm_problems_free(&problems);
    result->seconds = now() - t0;
    result->peak_scratch_bytes = tv_alloc_peak();
    return rc;
}
