/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrate.c - get or compute input statistics (tv/calibrate.h).
 *
 *   input 0          the embedding: token counts, from the windows alone
 *   input 1 + site   of a block (statistics.c), in the order of computation
 *
 * What the store has is read when its turn comes; for the rest the model runs
 * once, up to the last block that lacks something. Every input is stored as
 * soon as its block is done: a run that is killed finds these and computes only
 * what is missing, from residual streams that it computes again.
 *
 *   item      kind TV_STAT, score = key of the calibration, name of the first
 *             weight that takes the input; Gram matrices fp32, the rest fp64
 */
#include <string.h>

#include <cblas.h>

#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/checked.h"
#include "tv/derived.h"
#include "tv/split_gemm.h"
#include "tv/text.h"

#include "decoder.h"

#define KEY_TEXT    "tve-statistics"
#define KEY_VERSION 1u /* changes with the numbers */
#define DIRTY_MAX   ((uint64_t)32 << 20)

struct tve_calibration {
    tve_model *m;
    const struct tve_samples *samples;
    enum tve_stat kind;
    tv_store *store;
    enum tve_keep keep;
    uint64_t keep_free;
    char *about;
    struct tv_hash key;
    struct tve_site *sites;
    size_t n_sites;
    struct tve_stat_input *inputs; /* [1 + n_sites] */
    const char *embedding[1];
};

/* ---- opening ------------------------------------------------------------- */

static void add_hash(struct tv_buf *b, struct tv_hash h)
{
    tv_buf_le64(b, h.lo);
    tv_buf_le64(b, h.hi);
}

static enum tv_err make_key(tve_calibration *c, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_buf b;
    struct tv_hash h;

    tv_buf_init(&b, (size_t)1 << 20);
    tv_buf_str(&b, KEY_TEXT);
    tv_buf_le32(&b, KEY_VERSION);
    tv_buf_le32(&b, (uint32_t)c->kind);
    TV_TRY(tv_input_fingerprint(c->m->in, &h, err));
    add_hash(&b, h);
    for (size_t i = 0; i < c->m->n_adapters; i++) {
        const struct tve_model_adapter *const a = &c->m->adapters[i];
        uint64_t weight = 0;

        TV_TRY(tv_input_fingerprint(tv_adapter_input(a->adapter), &h, err));
        add_hash(&b, h);
        memcpy(&weight, &a->weight, sizeof(weight));
        tv_buf_le64(&b, weight);
    }
    add_hash(&b, c->samples->digest);
    tv_buf_str(&b, openblas_get_corename());
    if (c->m->splits)
        tv_buf_str(&b, tvk_split_core());
    if (c->m->device) {
        char core[128];
        tv_buf_str(&b, tvk_cuda_math_core(
                           tvk_cuda_math_device(tve_device_math(c->m->device)),
                           core, sizeof core));
    }
    TV_TRY(tv_buf_ok(&b, err));
    c->key = tv_hash128(b.data, b.n_bytes);
out:
    tv_buf_free(&b);
    return rc;
}

enum tv_err tve_calibration_open(tve_model *m,
                                 const struct tve_samples *samples,
                                 const struct tve_calibration_options *opt,
                                 struct tv_error *err, tve_calibration **out)
{
    enum tv_err rc = TV_OK;
    const struct tve_weight *const embedding = &m->globals[TVE_EMBED].w;
    tve_calibration *c = tv_calloc(1, sizeof(*c));

    *out = NULL;
    if (!c)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    c->m = m;
    c->samples = samples;
    c->kind = opt->kind;
    c->store = opt->store;
    c->keep = opt->store ? opt->keep : TVE_KEEP_NOT;
    c->keep_free = opt->keep_free;
    c->about = tv_strdup(opt->about ? opt->about : "{}");
    if (!c->about) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tve_check_windows(m, samples->windows, samples->n, err));
    TV_TRY(make_key(c, err));
    TV_TRY(tve_sites(m, &c->sites, &c->n_sites, err));
    c->inputs = tv_calloc(c->n_sites + 1, sizeof(*c->inputs));
    if (!c->inputs) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    c->embedding[0] = embedding->t->name;
    c->inputs[0] = (struct tve_stat_input){.kind = TVE_STAT_COUNTS,
                                           .tensors = c->embedding,
                                           .n_tensors = 1,
                                           .n = embedding->rows};
    for (size_t i = 0; i < c->n_sites; i++)
        c->inputs[1 + i] =
            (struct tve_stat_input){.kind = c->kind,
                                    .layer = c->sites[i].layer,
                                    .tensors = c->sites[i].tensors,
                                    .n_tensors = c->sites[i].n_tensors,
                                    .n = c->sites[i].n};
    for (size_t i = 0; i <= c->n_sites; i++) {
        c->inputs[i].n_rows = samples->n_tokens;
        if (tve_stat_size(c->inputs[i].kind, c->inputs[i].n) == 0) {
            rc = tv_error_set(err, TV_E_BUDGET,
                              "statistics of the %zu inputs of \"%s\" have no "
                              "size",
                              c->inputs[i].n, c->inputs[i].tensors[0]);
            goto out;
        }
    }
    *out = c;
    c = NULL;
out:
    tve_calibration_close(c);
    return rc;
}

void tve_calibration_close(tve_calibration *c)
{
    if (!c)
        return;
    tv_free(c->about);
    tv_free(c->sites);
    tv_free(c->inputs);
    tv_free(c);
}

struct tv_hash tve_calibration_key(const tve_calibration *c)
{
    return c->key;
}

size_t tve_calibration_count(const tve_calibration *c)
{
    return c->n_sites + 1;
}

const struct tve_stat_input *tve_calibration_input(const tve_calibration *c,
                                                   size_t i)
{
    return &c->inputs[i];
}

size_t tve_calibration_find(const tve_calibration *c, const char *tensor)
{
    for (size_t i = 0; i <= c->n_sites; i++)
        for (size_t k = 0; k < c->inputs[i].n_tensors; k++)
            if (strcmp(c->inputs[i].tensors[k], tensor) == 0)
                return i;
    return c->n_sites + 1;
}

/* ---- items --------------------------------------------------------------- */

static size_t entries(const struct tve_stat_input *in)
{
    return tve_stat_size(in->kind, in->n);
}

static enum tv_dtype dtype_of(const struct tve_stat_input *in)
{
    return in->kind == TVE_STAT_GRAM ? TV_F32 : TV_F64;
}

static size_t bytes_of(const struct tve_stat_input *in)
{
    return entries(in) * (tv_dtype_bits(dtype_of(in)) / 8u);
}

static struct tv_derived_key item_key(const tve_calibration *c, size_t i)
{
    return (struct tv_derived_key){
        .kind = TV_STAT, .score = c->key, .tensor = c->inputs[i].tensors[0]};
}

/* ---- a run --------------------------------------------------------------- */

struct run {
    tve_calibration *c;
    const bool *want;
    bool *found;   /* [1 + n_sites] */
    bool *missing; /* wanted and not found */
    size_t next;   /* inputs below were handed out */
    void *buffer;  /* of what is read */
    tve_stat_fn fn;
    void *arg;
    struct tve_calibration_use *use;
};

static bool wanted(const struct run *r, size_t i)
{
    return !r->want || r->want[i];
}

/* Looks every wanted input up, pins and counts those that are there. */
static enum tv_err look_up(struct run *r, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tve_calibration *const c = r->c;
    struct tv_derived_key *keys = NULL;
    tv_read *read = NULL;
    size_t n = 0;

    keys = tv_calloc(c->n_sites + 1, sizeof(*keys));
    if (!keys) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (c->store)
        TV_TRY(tv_read_begin(c->store, err, &read));
    for (size_t i = 0; i <= c->n_sites; i++) {
        const struct tv_derived_key key = item_key(c, i);
        struct tv_derived d;

        if (!wanted(r, i))
            continue;
        if (read)
            TV_TRY(tv_derived_find(read, &key, &r->found[i], &d, err));
        r->found[i] = r->found[i] && d.n_elems == entries(&c->inputs[i]) &&
                      d.dtype == dtype_of(&c->inputs[i]);
        r->missing[i] = !r->found[i];
        if (r->found[i])
            keys[n++] = key;
    }
    tv_read_end(read);
    read = NULL;
    r->use->n_found = n;
    if (n > 0 && c->keep != TVE_KEEP_NOT) {
        TV_TRY(tv_derived_pin(c->store, keys, n, err));
        TV_TRY(tv_derived_used(c->store, keys, n, err));
    }
out:
    tv_read_end(read);
    tv_free(keys);
    return rc;
}

/* All that is missing has to fit the quota. */
static enum tv_err admit(const struct run *r, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t bytes = 0;

    for (size_t i = 0; i <= r->c->n_sites; i++)
        if (r->missing[i] &&
            !tv_add_u64(bytes, (uint64_t)bytes_of(&r->c->inputs[i]) + 4096,
                        &bytes))
            bytes = UINT64_MAX / 2;
    if (r->c->keep != TVE_KEEP_ALL || bytes == 0)
        goto out;
    if (!tv_add_u64(bytes, r->c->keep_free, &bytes))
        bytes = UINT64_MAX / 2;
    rc = tv_derived_reserve(r->c->store, bytes, bytes / 64, err);
out:
    return rc;
}

/* The buffer for what is read, within what the sums of a block leave. */
static enum tv_err make_buffer(struct run *r, struct tv_error *err)
{
    const tve_calibration *const c = r->c;
    size_t most = 0, block = 0, sums = 0;

    for (size_t i = 0; i <= c->n_sites; i++) {
        const struct tve_stat_input *const in = &c->inputs[i];
        size_t bytes = 0;

        if (r->found[i] && r->fn && bytes_of(in) > most)
            most = bytes_of(in);
        if (i > 1 && in->layer != c->inputs[i - 1].layer)
            block = 0;
        if (i > 0 && r->missing[i] &&
            (!tv_mul_size(entries(in), sizeof(double), &bytes) ||
             !tv_add_size(block, bytes, &block)))
            block = SIZE_MAX; /* tve_statistics refuses it */
        sums = block > sums ? block : sums;
    }
    if (most == 0)
        return TV_OK;
    if (sums <= c->m->memory_bytes && most > c->m->memory_bytes - sums)
        return tv_error_set(err, TV_E_BUDGET,
                            "a statistic of %zu bytes and sums of %zu bytes do "
                            "not fit into a memory budget of %llu bytes",
                            most, sums, (unsigned long long)c->m->memory_bytes);
    r->buffer = tv_alloc_aligned(most);
    return r->buffer ? TV_OK : tv_error_set(err, TV_E_NOMEM, "out of memory");
}

/* Hands out what the store has of the inputs before `end`. */
static enum tv_err hand_out(struct run *r, size_t end, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const tve_calibration *const c = r->c;
    tv_read *read = NULL;

    for (; r->next < end; r->next++) {
        struct tve_stat_input in = c->inputs[r->next];
        bool found = false;

        if (!r->found[r->next] || !r->fn)
            continue;
        TV_TRY(tv_read_begin(c->store, err, &read));
        TV_TRY(tv_stat_read(read, c->key, in.tensors[0], dtype_of(&in),
                            entries(&in), &found, &in.n_rows, r->buffer, err));
        tv_read_end(read);
        read = NULL;
        if (!found) { /* only of a store that nothing may be pinned in */
            rc = tv_error_set(err, TV_E_IO,
                              "statistics of \"%s\" were removed from the "
                              "store; repeat the command",
                              in.tensors[0]);
            goto out;
        }
        if (in.kind == TVE_STAT_GRAM)
            in.gram = r->buffer;
        else
            in.sums = r->buffer;
        TV_TRY(r->fn(r->arg, &in, err));
    }
out:
    tv_read_end(read);
    return rc;
}

static enum tv_err keep(struct run *r, size_t i,
                        const struct tve_stat_input *in, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const tve_calibration *const c = r->c;
    const uint64_t part = c->m->memory_bytes / 8;
    struct tv_derived_new item = {
        .key = item_key(c, i),
        .about = c->about,
        .n_elems = entries(in),
        .dtype = dtype_of(in),
        .values = in->kind == TVE_STAT_GRAM ? (const void *)in->gram : in->sums,
        .n_rows = in->n_rows,
    };

    if (c->keep == TVE_KEEP_NOT)
        goto out;
    TV_TRY(tv_derived_store(c->store, &item, 1,
                            part < DIRTY_MAX ? part : DIRTY_MAX, c->keep_free,
                            err));
    if (!item.stored && c->keep == TVE_KEEP_ALL) {
        rc = tv_error_set(err, TV_E_NOSPACE,
                          "no room for the statistics of \"%s\" in the store",
                          item.key.tensor);
        tv_error_hint(err, "what is finished is kept: make room ('tvstore "
                           "quota', 'tvstore rm') and repeat the command");
        goto out;
    }
    r->use->n_kept += item.stored;
    r->use->n_left_out += !item.stored;
out:
    return rc;
}

static enum tv_err computed(struct run *r, size_t i,
                            const struct tve_stat_input *in,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(hand_out(r, i, err));
    r->use->n_computed++;
    TV_TRY(keep(r, i, in, err));
    if (r->fn)
        TV_TRY(r->fn(r->arg, in, err));
    r->next = i + 1;
out:
    return rc;
}

static enum tv_err site_done(void *arg, size_t site,
                             const struct tve_stat_input *in,
                             struct tv_error *err)
{
    return computed(arg, site + 1, in, err);
}

static enum tv_err count_tokens(struct run *r, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_stat_input in = r->c->inputs[0];
    double *const sums = tv_calloc(in.n ? in.n : 1, sizeof(*sums));

    if (!sums)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (uint64_t i = 0; i < r->c->samples->n_tokens; i++)
        sums[r->c->samples->ids[i]]++;
    in.sums = sums;
    TV_TRY(computed(r, 0, &in, err));
out:
    tv_free(sums);
    return rc;
}

enum tv_err tve_calibration_run(tve_calibration *c, const bool *want,
                                const struct tve_progress *progress,
                                tve_stat_fn fn, void *arg,
                                struct tve_calibration_use *use,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_calibration_use own;
    struct run r = {
        .c = c, .want = want, .fn = fn, .arg = arg, .use = use ? use : &own};

    memset(r.use, 0, sizeof(*r.use));
    r.found = tv_calloc(c->n_sites + 1, sizeof(*r.found));
    r.missing = tv_calloc(c->n_sites + 1, sizeof(*r.missing));
    if (!r.found || !r.missing) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(look_up(&r, err));
    /* The scratch file first: statistics have what it leaves of the quota. */
    TV_TRY(tve_site_admit(c->m, c->samples->windows, c->samples->n, c->kind,
                          r.missing + 1, err));
    TV_TRY(admit(&r, err));
    TV_TRY(make_buffer(&r, err));
    if (r.missing[0])
        TV_TRY(count_tokens(&r, err));
    TV_TRY(tve_site_statistics(c->m, c->samples->windows, c->samples->n,
                               c->kind, r.missing + 1, progress, site_done, &r,
                               err));
    TV_TRY(hand_out(&r, c->n_sites + 1, err));
out:
    tv_free(r.found);
    tv_free(r.missing);
    tv_free(r.buffer);
    return rc;
}
