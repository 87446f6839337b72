/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_device.c - see tv/cuda.h: the device handle over the driver's table.
 *
 * The primary context is used, so that libraries of CUDA (cuBLAS, cuSOLVER),
 * which use it too, see the same memory and streams. Kernels are found by name
 * once and remembered.
 *
 * Knows nothing of operations: those are in cuda_row.c and the .cu files.
 */
#include "cuda/cuda_parts.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tv/alloc.h"

/* Share of the free memory that is used when nothing is said. */
#define DEFAULT_SHARE 0.8

void tvk_cuda_options_init(struct tvk_cuda_options *o)
{
    *o = (struct tvk_cuda_options){
        .least_elems = TVK_CUDA_LEAST,
        .staging_bytes = TVK_CUDA_STAGING,
    };
}

/* ---- what there is ------------------------------------------------------- */

/* The driver and device `index`, or why not. */
static const struct tvk_cuda_api *find(int index, tvk_cu_device *device,
                                       struct tv_error *err)
{
    const char *why = "";
    const struct tvk_cuda_api *api = tvk_cuda_driver(&why);
    int n = 0;

    if (api == NULL) {
        (void)tv_error_set(err, TV_E_UNSUPPORTED, "%s", why);
        return NULL;
    }
    if (api->device_count(&n) != TVK_CU_OK || n < 1) {
        (void)tv_error_set(err, TV_E_UNSUPPORTED,
                           "the CUDA driver finds no GPU");
        return NULL;
    }
    if (index < 0 || index >= n ||
        api->device_get(device, index) != TVK_CU_OK) {
        (void)tv_error_set(err, TV_E_UNSUPPORTED,
                           "there is no CUDA device %d: %d found", index, n);
        return NULL;
    }
    return api;
}

enum tv_err tvk_cuda_find(int index, struct tv_error *err)
{
    tvk_cu_device device = 0;

    if (tvk_cuda_image() == NULL)
        return tv_error_set(err, TV_E_UNSUPPORTED, "%s",
                            tvk_cuda_image_missing());
    return find(index, &device, err) ? TV_OK : TV_E_UNSUPPORTED;
}

static void look(const struct tvk_cuda_api *api, tvk_cu_device device,
                 int index, struct tvk_cuda_info *info)
{
    size_t total = 0;

    *info = (struct tvk_cuda_info){.index = index};
    /* What cannot be told stays 0 or empty: it is for people. */
    if (api->device_name(info->name, (int)sizeof info->name, device) !=
        TVK_CU_OK)
        info->name[0] = '\0';
    info->name[sizeof info->name - 1] = '\0';
    (void)api->device_attribute(&info->major, TVK_CU_ATTR_MAJOR, device);
    (void)api->device_attribute(&info->minor, TVK_CU_ATTR_MINOR, device);
    (void)api->driver_version(&info->driver_version);
    if (api->device_total(&total, device) == TVK_CU_OK)
        info->total_bytes = total;
}

const char *tvk_cuda_describe(int index, char *dst, size_t cap)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_info info;
    tvk_cu_device device = 0;
    const struct tvk_cuda_api *api = NULL;

    if (tvk_cuda_image() == NULL)
        (void)tv_error_set(&err, TV_E_UNSUPPORTED, "%s",
                           tvk_cuda_image_missing());
    else
        api = find(index, &device, &err);
    if (api == NULL) {
        (void)snprintf(dst, cap, "none (%s)", err.msg);
        return dst;
    }
    look(api, device, index, &info);
    (void)snprintf(dst, cap,
                   "%s (compute %d.%d, %" PRIu64 " MiB, driver %d.%d)",
                   info.name, info.major, info.minor, info.total_bytes >> 20,
                   info.driver_version / 1000, info.driver_version % 1000 / 10);
    return dst;
}

/* ---- errors -------------------------------------------------------------- */

static const char *name_of(const tvk_cuda *d, tvk_cu_result code)
{
    const char *name = NULL;

    if (d->api->error_name(code, &name) != TVK_CU_OK || name == NULL)
        return "unknown error";
    return name;
}

/* The first one is remembered. */
static enum tv_err broken(tvk_cuda *d, const struct tv_error *mine,
                          struct tv_error *err)
{
    (void)pthread_mutex_lock(&d->mutex);
    if (d->trouble.code == TV_OK)
        d->trouble = *mine;
    (void)pthread_mutex_unlock(&d->mutex);
    if (err != NULL)
        *err = *mine;
    return TV_E_IO;
}

enum tv_err tvk_cuda_refused(tvk_cuda *d, tvk_cu_result code, const char *call,
                             struct tv_error *err)
{
    struct tv_error mine = {.code = TV_OK};

    if (code == TVK_CU_NO_MEMORY)
        return tv_error_set(err, TV_E_BUDGET,
                            "CUDA device %d (%s) has no memory left: %s",
                            d->info.index, d->info.name, call);
    (void)tv_error_set(&mine, TV_E_IO, "CUDA device %d (%s): %s: %s (%d)",
                       d->info.index, d->info.name, call, name_of(d, code),
                       (int)code);
    return broken(d, &mine, err);
}

enum tv_err tvk_cuda_broken(tvk_cuda *d, const char *call, int code,
                            struct tv_error *err)
{
    struct tv_error mine = {.code = TV_OK};

    (void)tv_error_set(&mine, TV_E_IO, "CUDA device %d (%s): %s: status %d",
                       d->info.index, d->info.name, call, code);
    return broken(d, &mine, err);
}

enum tv_err tvk_cuda_trouble(tvk_cuda *d, struct tv_error *err)
{
    if (d == NULL)
        return TV_OK;
    (void)pthread_mutex_lock(&d->mutex);
    const enum tv_err rc = d->trouble.code;
    if (rc != TV_OK && err != NULL)
        *err = d->trouble;
    (void)pthread_mutex_unlock(&d->mutex);
    return rc;
}

enum tv_err tvk_cuda_enter(tvk_cuda *d, struct tv_error *err)
{
    const enum tv_err rc = tvk_cuda_trouble(d, err);

    if (rc != TV_OK)
        return rc;
    const tvk_cu_result code = d->api->context_use(d->context);
    if (code != TVK_CU_OK)
        return tvk_cuda_refused(d, code, "cuCtxSetCurrent", err);
    return TV_OK;
}

/* ---- the device ---------------------------------------------------------- */

static enum tv_err load_code(tvk_cuda *d, const struct tvk_cuda_options *o,
                             struct tv_error *err)
{
    const void *const image = o->image ? o->image : tvk_cuda_image();

    if (image == NULL)
        return tv_error_set(err, TV_E_UNSUPPORTED, "%s",
                            tvk_cuda_image_missing());
    const tvk_cu_result code = d->api->module_load(&d->module, image);
    if (code == TVK_CU_OK)
        return TV_OK;
    d->module = NULL;
    if (code == TVK_CU_NO_MEMORY)
        return tvk_cuda_refused(d, code, "cuModuleLoadData", err);
    if (code == TVK_CU_NO_CODE)
        return tv_error_set(
            err, TV_E_UNSUPPORTED,
            "CUDA device %d (%s): this program has no code for compute %d.%d",
            d->info.index, d->info.name, d->info.major, d->info.minor);
    /* A driver takes code of compilers of its own age or older. */
    return tv_error_set(
        err, TV_E_UNSUPPORTED,
        "CUDA device %d (%s): its driver (of CUDA %d.%d) does not take this "
        "program's code, of a compiler that may be newer: cuModuleLoadData: %s "
        "(%d)",
        d->info.index, d->info.name, d->info.driver_version / 1000,
        d->info.driver_version % 1000 / 10, name_of(d, code), (int)code);
}

static enum tv_err take_budget(tvk_cuda *d, const struct tvk_cuda_options *o,
                               struct tv_error *err)
{
    size_t free_bytes = 0;
    size_t total = 0;

    const tvk_cu_result code = d->api->mem_info(&free_bytes, &total);
    if (code != TVK_CU_OK)
        return tvk_cuda_refused(d, code, "cuMemGetInfo", err);
    d->info.budget_bytes = o->memory_bytes;
    if (o->memory_bytes == 0)
        d->info.budget_bytes = (uint64_t)(DEFAULT_SHARE * (double)free_bytes);
    d->info.factor_bytes =
        o->factor_bytes > 0 ? o->factor_bytes : d->info.budget_bytes;
    return TV_OK;
}

enum tv_err tvk_cuda_open(const struct tvk_cuda_options *o,
                          struct tv_error *err, tvk_cuda **out)
{
    enum tv_err rc = TV_OK;
    tvk_cu_device device = 0;
    tvk_cuda *d = NULL;

    *out = NULL;
    if (o->image == NULL && tvk_cuda_image() == NULL)
        return tv_error_set(err, TV_E_UNSUPPORTED, "%s",
                            tvk_cuda_image_missing());
    const struct tvk_cuda_api *api = find(o->index, &device, err);
    if (api == NULL)
        return TV_E_UNSUPPORTED;
    d = tv_calloc(1, sizeof *d);
    if (d == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    (void)pthread_mutex_init(&d->mutex, NULL);
    d->api = api;
    d->device = device;
    d->options = *o;
    d->options.image = NULL;
    look(api, device, o->index, &d->info);
    const tvk_cu_result code = api->context_retain(&d->context, device);
    if (code != TVK_CU_OK) {
        d->context = NULL;
        rc = tvk_cuda_refused(d, code, "cuDevicePrimaryCtxRetain", err);
        goto out;
    }
    TV_TRY(tvk_cuda_enter(d, err));
    TV_TRY(take_budget(d, o, err));
    TV_TRY(load_code(d, o, err));
    *out = d;
    d = NULL;
out:
    tvk_cuda_close(d);
    return rc;
}

void tvk_cuda_close(tvk_cuda *d)
{
    if (d == NULL)
        return;
    tvk_cuda_math_close(d->math);
    tvk_cuda_row_free(d->row);
    if (d->context != NULL) {
        /* Whatever fails here, a broken device among it, the process gives
         * everything back when it ends. */
        (void)d->api->context_use(d->context);
        if (d->module != NULL)
            (void)d->api->module_unload(d->module);
        (void)d->api->context_release(d->device);
    }
    (void)pthread_mutex_destroy(&d->mutex);
    tv_free(d);
}

const struct tvk_cuda_info *tvk_cuda_about(const tvk_cuda *d)
{
    return &d->info;
}

uint64_t tvk_cuda_left(tvk_cuda *d)
{
    (void)pthread_mutex_lock(&d->mutex);
    const uint64_t left = d->info.budget_bytes - d->used_bytes;
    (void)pthread_mutex_unlock(&d->mutex);
    return left;
}

uint64_t tvk_cuda_launches(tvk_cuda *d)
{
    (void)pthread_mutex_lock(&d->mutex);
    const uint64_t n = d->n_launches;
    (void)pthread_mutex_unlock(&d->mutex);
    return n;
}

/* ---- memory -------------------------------------------------------------- */

/* Takes bytes of the budget; what was left of it in *left. */
static bool take_bytes(tvk_cuda *d, size_t bytes, uint64_t *left)
{
    (void)pthread_mutex_lock(&d->mutex);
    *left = d->info.budget_bytes - d->used_bytes;
    if (bytes <= *left)
        d->used_bytes += bytes;
    (void)pthread_mutex_unlock(&d->mutex);
    return bytes <= *left;
}

static void give_bytes(tvk_cuda *d, size_t bytes)
{
    (void)pthread_mutex_lock(&d->mutex);
    d->used_bytes -= bytes;
    (void)pthread_mutex_unlock(&d->mutex);
}

enum tv_err tvk_cuda_alloc(tvk_cuda *d, size_t bytes, const char *what,
                           struct tv_error *err, tvk_cuda_ptr *out)
{
    enum tv_err rc = TV_OK;
    tvk_cu_result code = TVK_CU_NO_MEMORY;
    uint64_t left = 0;

    *out = 0;
    if (bytes == 0)
        return tvk_cuda_trouble(d, err);
    rc = tvk_cuda_enter(d, err);
    if (rc != TV_OK)
        return rc;
    bool mine = take_bytes(d, bytes, &left);
    if (mine)
        code = d->api->mem_alloc(out, bytes);
    if (code == TVK_CU_NO_MEMORY) {
        /* Once more, without what is kept for later calls only. */
        tvk_cuda_row_reclaim(d->row);
        if (!mine)
            mine = take_bytes(d, bytes, &left);
        if (mine)
            code = d->api->mem_alloc(out, bytes);
    }
    if (mine && code == TVK_CU_OK)
        return TV_OK;
    *out = 0;
    if (!mine)
        return tv_error_set(err, TV_E_BUDGET,
                            "%s needs %zu bytes of device memory, %" PRIu64
                            " of %" PRIu64 " are left (--device-memory)",
                            what, bytes, left, d->info.budget_bytes);
    give_bytes(d, bytes);
    if (code != TVK_CU_NO_MEMORY)
        return tvk_cuda_refused(d, code, "cuMemAlloc", err);
    return tv_error_set(err, TV_E_BUDGET,
                        "%s needs %zu bytes of device memory, and CUDA device "
                        "%d (%s) has them not",
                        what, bytes, d->info.index, d->info.name);
}

void tvk_cuda_free(tvk_cuda *d, tvk_cuda_ptr at, size_t bytes)
{
    if (at == 0)
        return;
    /* A refusal shows in the next call that can tell. */
    (void)d->api->context_use(d->context);
    (void)d->api->mem_free(at);
    give_bytes(d, bytes);
}

/* Memory is pinned by the page, and two pinned ranges must not share one: so
 * whole pages, with where the allocation begins right in front of them. Pages
 * have 64 KiB on some machines. */
static size_t page_bytes(void)
{
    const long n = sysconf(_SC_PAGESIZE);

    return n > 4096 ? (size_t)n : 4096;
}

static size_t pages(size_t bytes)
{
    const size_t page = page_bytes();

    return (bytes > 0 ? bytes + page - 1 : page) / page * page;
}

enum tv_err tvk_cuda_pin(tvk_cuda *d, size_t bytes, struct tv_error *err,
                         void **out)
{
    *out = NULL;
    const enum tv_err rc = tvk_cuda_enter(d, err);
    if (rc != TV_OK)
        return rc;
    const size_t page = page_bytes();
    unsigned char *raw = NULL;
    if (bytes < SIZE_MAX - 3 * page)
        raw = tv_alloc(pages(bytes) + page + sizeof raw);
    if (raw == NULL)
        return tv_error_set(err, TV_E_NOMEM,
                            "out of memory (%zu bytes of staging)", bytes);
    const uintptr_t first = (uintptr_t)raw + sizeof raw;
    unsigned char *const p = raw + sizeof raw + (page - first % page) % page;
    const tvk_cu_result code =
        d->api->host_register(p, pages(bytes), TVK_CU_HOST_PORTABLE);
    if (code != TVK_CU_OK) {
        tv_free(raw);
        if (code == TVK_CU_NO_MEMORY)
            return tv_error_set(err, TV_E_NOMEM,
                                "%zu bytes of memory cannot be pinned", bytes);
        return tvk_cuda_refused(d, code, "cuMemHostRegister", err);
    }
    memcpy(p - sizeof raw, &raw, sizeof raw);
    *out = p;
    return TV_OK;
}

void tvk_cuda_unpin(tvk_cuda *d, void *p)
{
    unsigned char *raw = NULL;

    if (p == NULL)
        return;
    memcpy(&raw, (unsigned char *)p - sizeof raw, sizeof raw);
    /* Also of a broken device: memory that stays registered must not come back
     * as something else. */
    (void)d->api->context_use(d->context);
    (void)d->api->host_unregister(p);
    tv_free(raw);
}

/* ---- streams ------------------------------------------------------------- */

enum tv_err tvk_cuda_stream_open(tvk_cuda *d, struct tv_error *err,
                                 tvk_cuda_stream **out)
{
    *out = NULL;
    const enum tv_err rc = tvk_cuda_enter(d, err);
    if (rc != TV_OK)
        return rc;
    tvk_cuda_stream *s = tv_calloc(1, sizeof *s);
    if (s == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    s->device = d;
    const tvk_cu_result code =
        d->api->stream_create(&s->raw, TVK_CU_STREAM_APART);
    if (code != TVK_CU_OK) {
        tv_free(s);
        return tvk_cuda_refused(d, code, "cuStreamCreate", err);
    }
    *out = s;
    return TV_OK;
}

void tvk_cuda_settle(tvk_cuda_stream *s)
{
    (void)s->device->api->context_use(s->device->context);
    (void)s->device->api->stream_sync(s->raw);
}

void tvk_cuda_stream_close(tvk_cuda_stream *s)
{
    if (s == NULL)
        return;
    tvk_cuda_settle(s);
    (void)s->device->api->stream_destroy(s->raw);
    tv_free(s);
}

void *tvk_cuda_stream_raw(const tvk_cuda_stream *s)
{
    return (void *)s->raw;
}

/* `code` of a call that did not wait. */
static enum tv_err done(tvk_cuda_stream *s, tvk_cu_result code,
                        const char *call, struct tv_error *err)
{
    if (code == TVK_CU_OK)
        return TV_OK;
    return tvk_cuda_refused(s->device, code, call, err);
}

enum tv_err tvk_cuda_upload(tvk_cuda_stream *s, tvk_cuda_ptr to,
                            const void *from, size_t bytes,
                            struct tv_error *err)
{
    const enum tv_err rc = tvk_cuda_enter(s->device, err);

    if (rc != TV_OK || bytes == 0)
        return rc;
    return done(s, s->device->api->upload(to, from, bytes, s->raw),
                "cuMemcpyHtoDAsync", err);
}

enum tv_err tvk_cuda_download(tvk_cuda_stream *s, void *to, tvk_cuda_ptr from,
                              size_t bytes, struct tv_error *err)
{
    const enum tv_err rc = tvk_cuda_enter(s->device, err);

    if (rc != TV_OK || bytes == 0)
        return rc;
    return done(s, s->device->api->download(to, from, bytes, s->raw),
                "cuMemcpyDtoHAsync", err);
}

enum tv_err tvk_cuda_copy(tvk_cuda_stream *s, tvk_cuda_ptr to,
                          tvk_cuda_ptr from, size_t bytes, struct tv_error *err)
{
    const enum tv_err rc = tvk_cuda_enter(s->device, err);

    if (rc != TV_OK || bytes == 0)
        return rc;
    return done(s, s->device->api->copy(to, from, bytes, s->raw),
                "cuMemcpyDtoDAsync", err);
}

enum tv_err tvk_cuda_fill(tvk_cuda_stream *s, tvk_cuda_ptr at,
                          unsigned char value, size_t bytes,
                          struct tv_error *err)
{
    const enum tv_err rc = tvk_cuda_enter(s->device, err);

    if (rc != TV_OK || bytes == 0)
        return rc;
    return done(s, s->device->api->fill(at, value, bytes, s->raw),
                "cuMemsetD8Async", err);
}

/* The kernel called `name`, remembered, for one launch. */
static enum tv_err function_of(tvk_cuda *d, const char *name,
                               struct tv_error *err, tvk_cu_function *out)
{
    tvk_cu_result code = TVK_CU_OK;

    (void)pthread_mutex_lock(&d->mutex);
    d->n_launches++;
    for (unsigned i = 0; i < d->n_functions; i++)
        if (strcmp(d->functions[i].name, name) == 0) {
            *out = d->functions[i].function;
            goto unlock;
        }
    code = d->api->module_function(out, d->module, name);
    if (code == TVK_CU_OK && d->n_functions < TVK_CUDA_FUNCTIONS_MAX) {
        d->functions[d->n_functions].name = name;
        d->functions[d->n_functions++].function = *out;
    }
unlock:
    (void)pthread_mutex_unlock(&d->mutex);
    if (code == TVK_CU_OK)
        return TV_OK;
    return tvk_cuda_refused(d, code, name, err);
}

enum tv_err tvk_cuda_launch(tvk_cuda_stream *s, const char *name,
                            unsigned grid_x, unsigned grid_y, unsigned block,
                            size_t shared, void *args, struct tv_error *err)
{
    tvk_cuda *d = s->device;
    tvk_cu_function f = NULL;
    void *params[] = {args};

    enum tv_err rc = tvk_cuda_enter(d, err);
    if (rc == TV_OK)
        rc = function_of(d, name, err, &f);
    if (rc != TV_OK)
        return rc;
    return done(s,
                d->api->launch(f, grid_x, grid_y, 1, block, 1, 1,
                               (unsigned)shared, s->raw, params, NULL),
                name, err);
}

enum tv_err tvk_cuda_sync(tvk_cuda_stream *s, struct tv_error *err)
{
    const enum tv_err rc = tvk_cuda_enter(s->device, err);

    if (rc != TV_OK)
        return rc;
    return done(s, s->device->api->stream_sync(s->raw), "cuStreamSynchronize",
                err);
}
