/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_cuda.c - a CUDA driver made of host memory, for tests without a GPU.
 *
 * A shared library with the functions that cuda_abi.h names, so that all of
 * kernels/cuda runs as it is: dlopen, staging, tiles, streams, running out of
 * memory, losing the device. Kernels are the host build of cu_ops.h,
 * cu_matrix.h and cu_eval.h under an emulated grid: blocks one after the other,
 * in each block phase by phase, in each phase thread by thread.
 *
 * It is stricter than a device, so that luck does not hide mistakes:
 *  - nothing on a stream happens before somebody waits for it (unless host
 *    memory is not pinned, where the driver may wait too): memory that is
 *    changed too early gives wrong results; or, with FAKE_CUDA_EAGER, all of it
 *    happens at once: what is right on a device is right both ways;
 *  - every other launch runs blocks and threads backwards;
 *  - every copy must lie in an allocation; memory starts as garbage;
 *  - what a device would not tell ends the process, with the reason: calls of a
 *    thread that has no context, pinned memory that changes or goes while it is
 *    copied from, copies on two streams of which one writes what the other
 *    touches, something left behind when the context goes.
 *
 * Environment, read by cuInit:
 *   FAKE_CUDA_DEVICES  how many there are (default 1)
 *   FAKE_CUDA_MEMORY   bytes of each (default 64 MiB)
 *   FAKE_CUDA_LOSE     the device is lost at the N-th launch
 *   FAKE_CUDA_KILL     the process is, by SIGKILL
 *   FAKE_CUDA_FULL     the N-th allocation of memory finds none,
 *   FAKE_CUDA_FULL_FOR and so do this many from it on (default all)
 *   FAKE_CUDA_EAGER    1: work is done when it is asked for
 *   FAKE_CUDA_MAJOR    of the compute capability (default 7)
 */
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cu_eval.h"
#include "cuda/cu_matrix.h"
#include "cuda/cu_ops.h"
#include "cuda/cuda_abi.h"
#include "fake_cuda.h"

#define INVALID    1
#define NO_CONTEXT 201 /* CUDA_ERROR_INVALID_CONTEXT */
#define NEWER_PTX  222 /* CUDA_ERROR_UNSUPPORTED_PTX_VERSION */
#define PINNED     712 /* CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED */
#define LOST       719 /* CUDA_ERROR_LAUNCH_FAILED */
#define SHARED_MAX (48u << 10)
#define ARGS_MAX   4096u
#define N_DEVICES  4

#define EXPORT     __attribute__((visibility("default")))

/* ---- the emulated grid --------------------------------------------------- */

struct grid {
    uint32_t n_blocks, n_threads;
    bool backwards;
    unsigned char *shared;
};

static struct tvk_cu_place place(const struct grid *g, uint32_t block,
                                 uint32_t thread)
{
    const struct tvk_cu_place at = {
        g->backwards ? g->n_blocks - 1 - block : block,
        g->backwards ? g->n_threads - 1 - thread : thread, g->n_blocks,
        g->n_threads};
    return at;
}

#define PHASE(call)                                                            \
    for (uint32_t thread = 0; thread < g->n_threads; thread++) {               \
        const struct tvk_cu_place at = place(g, block, thread);                \
        call;                                                                  \
    }
#define EMULATE_ELEMENTS(name, args, body)                                     \
    static void run_##name(const struct grid *g, const void *given)            \
    {                                                                          \
        const struct args *const a = given;                                    \
        for (uint32_t block = 0; block < g->n_blocks; block++)                 \
            PHASE(body(&at, a))                                                \
    }
#define SHARED(type, n)                                                        \
    type *const shared = (type *)(void *)g->shared;                            \
    memset(g->shared, 0xa5, (n) * sizeof(type))
#define EMULATE_BLOCKS2(name, args, type, n, phase0, phase1)                   \
    static void run_##name(const struct grid *g, const void *given)            \
    {                                                                          \
        const struct args *const a = given;                                    \
        for (uint32_t block = 0; block < g->n_blocks; block++) {               \
            SHARED(type, n);                                                   \
            PHASE(phase0(&at, shared, a))                                      \
            PHASE(phase1(&at, shared, a))                                      \
        }                                                                      \
    }
#define EMULATE_BLOCKS3(name, args, type, n, phase0, phase1, phase2)           \
    static void run_##name(const struct grid *g, const void *given)            \
    {                                                                          \
        const struct args *const a = given;                                    \
        for (uint32_t block = 0; block < g->n_blocks; block++) {               \
            SHARED(type, n);                                                   \
            PHASE(phase0(&at, shared, a))                                      \
            PHASE(phase1(&at, shared, a))                                      \
            PHASE(phase2(&at, shared, a))                                      \
        }                                                                      \
    }
TVK_CU_KERNELS(EMULATE_ELEMENTS, EMULATE_BLOCKS2, EMULATE_BLOCKS3)
TVK_CU_MATRIX_KERNELS(EMULATE_ELEMENTS, EMULATE_BLOCKS2, EMULATE_BLOCKS3)
TVK_CU_EVAL_KERNELS(EMULATE_ELEMENTS, EMULATE_BLOCKS2, EMULATE_BLOCKS3)

struct kernel {
    const char *name;
    size_t args_bytes;
    void (*run)(const struct grid *g, const void *args);
};
#define ROW_ELEMENTS(name, args, body)           {#name, sizeof(struct args), run_##name},
#define ROW_BLOCKS2(name, args, type, n, p0, p1) ROW_ELEMENTS(name, args, p0)
#define ROW_BLOCKS3(name, args, type, n, p0, p1, p2)                           \
    ROW_ELEMENTS(name, args, p0)
static const struct kernel kernels[] = {
    TVK_CU_KERNELS(ROW_ELEMENTS, ROW_BLOCKS2, ROW_BLOCKS3)
        TVK_CU_MATRIX_KERNELS(ROW_ELEMENTS, ROW_BLOCKS2, ROW_BLOCKS3)
            TVK_CU_EVAL_KERNELS(ROW_ELEMENTS, ROW_BLOCKS2, ROW_BLOCKS3)};
#define N_KERNELS                       (sizeof kernels / sizeof *kernels)
/* What a kernel may have without being asked for more. */
#define FITS(name, args)                _Static_assert(sizeof(struct args) <= ARGS_MAX, #name);
#define FITS_ELEMENTS(name, args, body) FITS(name, args)
#define FITS_BLOCKS2(name, args, type, n, p0, p1)                              \
    FITS(name, args)                                                           \
    _Static_assert((n) * sizeof(type) <= SHARED_MAX, #name);
#define FITS_BLOCKS3(name, args, type, n, p0, p1, p2)                          \
    FITS_BLOCKS2(name, args, type, n, p0, p1)
TVK_CU_KERNELS(FITS_ELEMENTS, FITS_BLOCKS2, FITS_BLOCKS3)
TVK_CU_MATRIX_KERNELS(FITS_ELEMENTS, FITS_BLOCKS2, FITS_BLOCKS3)
TVK_CU_EVAL_KERNELS(FITS_ELEMENTS, FITS_BLOCKS2, FITS_BLOCKS3)

/* ---- the driver's state -------------------------------------------------- */

struct range { /* device memory, or pinned host memory */
    struct range *next;
    unsigned char *at;
    size_t bytes;
};
enum kind { COPY, FILL, LAUNCH, CALL };
struct action { /* not done yet */
    struct action *next;
    enum kind kind;
    unsigned char *to;
    const unsigned char *from;
    size_t bytes;
    unsigned char value;
    const struct kernel *kernel;
    fake_cuda_work *work; /* of a library */
    struct grid grid;
    uint64_t check; /* of what a copy from pinned memory reads */
    bool is_checked;
    _Alignas(16) unsigned char args[ARGS_MAX];
};
struct stream {
    struct stream *next;
    struct action *first, **last;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct range *memory, *pinned;
static size_t n_devices = 1, total_bytes = 64u << 20, major = 7;
static size_t used_bytes, most_bytes, n_pinned;
static size_t pinned_bytes, most_pinned_bytes, uploaded_bytes;
static unsigned long lose_at, kill_at, n_launches;
static unsigned long full_at, full_for, n_allocs;
static unsigned n_streams, most_streams; /* with work waiting */
static struct stream *streams;           /* all of them */
static bool is_lost, is_eager;
static unsigned n_retained;
static _Thread_local bool has_context;

static size_t number(const char *name, size_t fallback)
{
    const char *const text = getenv(name);
    return text && *text ? (size_t)strtoull(text, NULL, 10) : fallback;
}

/* Mistakes that a device would answer with wrong numbers, if at all. */
static void must(bool is_right, const char *what)
{
    if (is_right)
        return;
    (void)fprintf(stderr, "fake_cuda: %s\n", what);
    abort();
}

/* FNV-1a, of every byte of the first and last 4 KiB and of some between. */
static uint64_t check_of(const unsigned char *p, size_t bytes)
{
    uint64_t h = 14695981039346656037u;

    for (size_t i = 0; i < bytes; i += i < 4096 || bytes - i <= 4096 ? 1 : 61)
        h = (h ^ p[i]) * 1099511628211u;
    return h;
}

static bool overlap(const unsigned char *a, size_t n_a, const unsigned char *b,
                    size_t n_b)
{
    return a && b && a < b + n_b && b < a + n_a;
}

/* Does one of two copies or fills write what the other reads or writes? */
static bool collide(const struct action *a, const struct action *b)
{
    return a->kind < LAUNCH && b->kind < LAUNCH &&
           (overlap(a->to, a->bytes, b->to, b->bytes) ||
            overlap(a->to, a->bytes, b->from, b->bytes) ||
            overlap(a->from, a->bytes, b->to, b->bytes));
}

/* Nobody waits to copy from or to memory that goes. Mutex held. */
static void must_be_idle(const unsigned char *p, size_t bytes, const char *what)
{
    for (const struct stream *s = streams; s && !is_lost; s = s->next)
        for (const struct action *a = s->first; a; a = a->next)
            must(a->kind >= LAUNCH || (!overlap(a->to, a->bytes, p, bytes) &&
                                       !overlap(a->from, a->bytes, p, bytes)),
                 what);
}

static bool within(const struct range *r, const void *p, size_t bytes)
{
    const unsigned char *const at = p;
    for (; r; r = r->next)
        if (at >= r->at && at <= r->at + r->bytes &&
            bytes <= r->bytes - (size_t)(at - r->at))
            return true;
    return false;
}

static bool range_add(struct range **list, void *at, size_t bytes)
{
    struct range *const r = malloc(sizeof *r);
    if (!r)
        return false;
    *r = (struct range){*list, at, bytes};
    *list = r;
    return true;
}

/* Bytes of the range that begins at `at`, which is taken out; 0: none does. */
static size_t range_drop(struct range **list, const void *at)
{
    for (; *list; list = &(*list)->next)
        if ((*list)->at == at) {
            struct range *const r = *list;
            const size_t bytes = r->bytes;
            *list = r->next;
            free(r);
            return bytes;
        }
    return 0;
}

static void act(const struct action *a)
{
    must(!a->is_checked || check_of(a->from, a->bytes) == a->check,
         "pinned memory was changed before it was copied");
    if (a->kind == COPY)
        memcpy(a->to, a->from, a->bytes);
    else if (a->kind == FILL)
        memset(a->to, a->value, a->bytes);
    else if (a->kind == CALL)
        a->work(a->args);
    else
        a->kernel->run(&a->grid, a->args);
}

/* Does what is waiting. Mutex held. */
static tvk_cu_result drain(struct stream *s)
{
    static _Alignas(64) unsigned char shared[SHARED_MAX];

    while (s->first) {
        struct action *const a = s->first;
        s->first = a->next;
        if (a->kind >= LAUNCH && ++n_launches == lose_at)
            is_lost = true;
        if (a->kind >= LAUNCH && n_launches == kill_at)
            (void)raise(SIGKILL);
        a->grid.shared = shared;
        a->grid.backwards = n_launches % 2 == 1;
        if (!is_lost)
            act(a);
        free(a);
        if (!s->first)
            n_streams--;
    }
    s->last = &s->first;
    return is_lost ? LOST : TVK_CU_OK;
}

/* Adds to a stream; copies `a`. Mutex held. */
static tvk_cu_result push(struct stream *s, const struct action *a, bool wait)
{
    if (is_lost)
        return LOST;
    for (const struct stream *other = streams; other; other = other->next)
        for (const struct action *b = other->first; b && other != s;
             b = b->next)
            must(!collide(a, b), "copies on two streams collide");
    struct action *const mine = malloc(sizeof *mine);
    if (!mine)
        return TVK_CU_NO_MEMORY;
    *mine = *a;
    mine->next = NULL;
    mine->is_checked = a->kind == COPY && !wait && !is_eager &&
                       within(pinned, a->from, a->bytes);
    if (mine->is_checked)
        mine->check = check_of(a->from, a->bytes);
    if (!s->first && ++n_streams > most_streams)
        most_streams = n_streams;
    *s->last = mine;
    s->last = &mine->next;
    return wait || is_eager ? drain(s) : TVK_CU_OK;
}

static tvk_cu_result locked(tvk_cu_result code)
{
    (void)pthread_mutex_unlock(&mutex);
    return code;
}

/* Takes the mutex, for a call that needs a context. */
static void lock(void)
{
    must(has_context, "a thread without a context calls the driver");
    (void)pthread_mutex_lock(&mutex);
    must(n_retained > 0, "the context is gone");
}

static void *address(tvk_cu_ptr p)
{
    return (void *)(uintptr_t)p;
}

/* ---- for tests ----------------------------------------------------------- */

EXPORT fake_cuda_set_fn fake_cuda_set;
EXPORT fake_cuda_get_fn fake_cuda_get;

void fake_cuda_set(const struct fake_cuda *f)
{
    (void)pthread_mutex_lock(&mutex);
    total_bytes = f->total_bytes;
    lose_at = f->lose_at;
    is_lost = false;
    n_launches = 0;
    uploaded_bytes = 0;
    most_streams = 0;
    most_bytes = used_bytes;
    most_pinned_bytes = pinned_bytes;
    (void)pthread_mutex_unlock(&mutex);
}

void fake_cuda_get(struct fake_cuda *f)
{
    (void)pthread_mutex_lock(&mutex);
    *f = (struct fake_cuda){.total_bytes = total_bytes,
                            .lose_at = lose_at,
                            .used_bytes = used_bytes,
                            .most_bytes = most_bytes,
                            .n_pinned = n_pinned,
                            .pinned_bytes = pinned_bytes,
                            .most_pinned_bytes = most_pinned_bytes,
                            .n_launches = n_launches,
                            .uploaded_bytes = uploaded_bytes,
                            .most_streams = most_streams};
    (void)pthread_mutex_unlock(&mutex);
}

/* ---- for the libraries --------------------------------------------------- */

EXPORT fake_cuda_call_fn fake_cuda_call;
EXPORT fake_cuda_holds_fn fake_cuda_holds;

int fake_cuda_call(void *stream, fake_cuda_work *work, const void *args,
                   size_t bytes)
{
    struct action a = {.kind = CALL, .work = work};

    if (!stream || bytes > sizeof a.args)
        return INVALID;
    memcpy(a.args, args, bytes);
    lock();
    return locked(push(stream, &a, false));
}

int fake_cuda_holds(const void *p, size_t bytes)
{
    (void)pthread_mutex_lock(&mutex);
    const bool holds = within(memory, p, bytes);
    (void)pthread_mutex_unlock(&mutex);
    return holds;
}

/* ---- what cuda_abi.h names ----------------------------------------------- */

/* Declares what follows, with the types of cuda_abi.h. */
#define DECLARE(field, symbol, params) EXPORT tvk_cu_result symbol params;
TVK_CUDA_DRIVER(DECLARE)

tvk_cu_result cuInit(unsigned flags)
{
    (void)flags;
    n_devices = number("FAKE_CUDA_DEVICES", n_devices);
    total_bytes = number("FAKE_CUDA_MEMORY", total_bytes);
    lose_at = number("FAKE_CUDA_LOSE", lose_at);
    kill_at = number("FAKE_CUDA_KILL", kill_at);
    full_at = number("FAKE_CUDA_FULL", full_at);
    full_for = number("FAKE_CUDA_FULL_FOR", SIZE_MAX);
    is_eager = number("FAKE_CUDA_EAGER", 0) != 0;
    major = number("FAKE_CUDA_MAJOR", major);
    return n_devices > 0 ? TVK_CU_OK : TVK_CU_NO_DEVICE;
}

tvk_cu_result cuDriverGetVersion(int *version)
{
    *version = 12040;
    return TVK_CU_OK;
}

tvk_cu_result cuGetErrorName(tvk_cu_result code, const char **name)
{
    *name = code == LOST               ? "CUDA_ERROR_LAUNCH_FAILED"
            : code == TVK_CU_NO_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
                                       : "CUDA_ERROR_INVALID_VALUE";
    return TVK_CU_OK;
}

tvk_cu_result cuDeviceGetCount(int *n)
{
    *n = (int)n_devices;
    return TVK_CU_OK;
}

tvk_cu_result cuDeviceGet(tvk_cu_device *d, int index)
{
    *d = index;
    return index >= 0 && (size_t)index < n_devices ? TVK_CU_OK : INVALID;
}

tvk_cu_result cuDeviceGetName(char *name, int cap, tvk_cu_device d)
{
    (void)snprintf(name, (size_t)cap, "Fake GPU %d", d);
    return TVK_CU_OK;
}

tvk_cu_result cuDeviceGetAttribute(int *value, tvk_cu_attribute which,
                                   tvk_cu_device d)
{
    (void)d;
    *value = which == TVK_CU_ATTR_MAJOR ? (int)major : major >= 9 ? 0 : 5;
    return TVK_CU_OK;
}

tvk_cu_result cuDeviceTotalMem_v2(size_t *bytes, tvk_cu_device d)
{
    (void)d;
    *bytes = total_bytes;
    return TVK_CU_OK;
}

tvk_cu_result cuDevicePrimaryCtxRetain(tvk_cu_context *c, tvk_cu_device d)
{
    static int context;
    (void)d;
    *c = &context;
    (void)pthread_mutex_lock(&mutex);
    n_retained++;
    return locked(TVK_CU_OK);
}

tvk_cu_result cuDevicePrimaryCtxRelease_v2(tvk_cu_device d)
{
    (void)d;
    (void)pthread_mutex_lock(&mutex);
    must(n_retained > 0, "a context is released twice");
    if (--n_retained == 0)
        must(!memory && !pinned && !streams,
             "memory or a stream is left when the context goes");
    return locked(TVK_CU_OK);
}

tvk_cu_result cuCtxSetCurrent(tvk_cu_context c)
{
    (void)pthread_mutex_lock(&mutex);
    has_context = c && n_retained > 0;
    return locked(has_context ? TVK_CU_OK : NO_CONTEXT);
}

tvk_cu_result cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    lock();
    *free_bytes = total_bytes > used_bytes ? total_bytes - used_bytes : 0;
    *total = total_bytes;
    return locked(TVK_CU_OK);
}

tvk_cu_result cuMemAlloc_v2(tvk_cu_ptr *at, size_t bytes)
{
    lock();
    if (is_lost)
        return locked(LOST);
    if (bytes == 0)
        return locked(INVALID);
    n_allocs++;
    if (full_at > 0 && n_allocs >= full_at && n_allocs - full_at < full_for)
        return locked(TVK_CU_NO_MEMORY);
    if (used_bytes > total_bytes || bytes > total_bytes - used_bytes)
        return locked(TVK_CU_NO_MEMORY);
    void *const p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p || !range_add(&memory, p, bytes)) {
        free(p);
        return locked(TVK_CU_NO_MEMORY);
    }
    memset(p, 0xc3, bytes);
    used_bytes += bytes;
    if (used_bytes > most_bytes)
        most_bytes = used_bytes;
    *at = (tvk_cu_ptr)(uintptr_t)p;
    return locked(TVK_CU_OK);
}

tvk_cu_result cuMemFree_v2(tvk_cu_ptr at)
{
    lock();
    const size_t bytes = range_drop(&memory, address(at));
    if (bytes == 0)
        return locked(INVALID);
    must_be_idle(address(at), bytes, "device memory goes while it is copied");
    used_bytes -= bytes;
    free(address(at));
    return locked(is_lost ? LOST : TVK_CU_OK);
}

tvk_cu_result cuMemHostRegister_v2(void *p, size_t bytes, unsigned flags)
{
    (void)flags;
    lock();
    if (is_lost)
        return locked(LOST);
    /* A device pins pages, and no page twice: whole ones are on the safe side.
     */
    if ((uintptr_t)p % 4096 != 0 || bytes == 0 || bytes % 4096 != 0)
        return locked(INVALID);
    for (const struct range *r = pinned; r; r = r->next)
        if (overlap(r->at, r->bytes, p, bytes))
            return locked(PINNED);
    if (!range_add(&pinned, p, bytes))
        return locked(TVK_CU_NO_MEMORY);
    n_pinned++;
    pinned_bytes += bytes;
    if (pinned_bytes > most_pinned_bytes)
        most_pinned_bytes = pinned_bytes;
    return locked(TVK_CU_OK);
}

tvk_cu_result cuMemHostUnregister(void *p)
{
    lock();
    const size_t bytes = range_drop(&pinned, p);
    if (bytes == 0)
        return locked(INVALID);
    must_be_idle(p, bytes, "pinned memory goes while it is copied");
    pinned_bytes -= bytes;
    n_pinned--;
    return locked(TVK_CU_OK);
}

static tvk_cu_result copy(void *to, const void *from, size_t bytes,
                          const void *host, tvk_cu_stream s)
{
    const struct action a = {
        .kind = COPY, .to = to, .from = from, .bytes = bytes};
    return push(s, &a, host && !within(pinned, host, bytes));
}

tvk_cu_result cuMemcpyHtoDAsync_v2(tvk_cu_ptr to, const void *from,
                                   size_t bytes, tvk_cu_stream s)
{
    lock();
    if (!within(memory, address(to), bytes))
        return locked(INVALID);
    uploaded_bytes += bytes;
    return locked(copy(address(to), from, bytes, from, s));
}

tvk_cu_result cuMemcpyDtoHAsync_v2(void *to, tvk_cu_ptr from, size_t bytes,
                                   tvk_cu_stream s)
{
    lock();
    if (!within(memory, address(from), bytes))
        return locked(INVALID);
    return locked(copy(to, address(from), bytes, to, s));
}

tvk_cu_result cuMemcpyDtoDAsync_v2(tvk_cu_ptr to, tvk_cu_ptr from, size_t bytes,
                                   tvk_cu_stream s)
{
    lock();
    if (!within(memory, address(to), bytes) ||
        !within(memory, address(from), bytes))
        return locked(INVALID);
    return locked(copy(address(to), address(from), bytes, NULL, s));
}

tvk_cu_result cuMemsetD8Async(tvk_cu_ptr at, unsigned char value, size_t bytes,
                              tvk_cu_stream s)
{
    const struct action a = {
        .kind = FILL, .to = address(at), .value = value, .bytes = bytes};
    lock();
    if (!within(memory, address(at), bytes))
        return locked(INVALID);
    return locked(push(s, &a, false));
}

tvk_cu_result cuStreamCreate(tvk_cu_stream *s, unsigned flags)
{
    struct stream *const mine = malloc(sizeof *mine);
    if (!mine)
        return TVK_CU_NO_MEMORY;
    lock();
    /* A blocking one would wait for work of others in the same process. */
    must(flags == TVK_CU_STREAM_APART, "a stream that waits for stream 0");
    *mine = (struct stream){.next = streams, .last = &mine->first};
    streams = mine;
    *s = mine;
    return locked(TVK_CU_OK);
}

tvk_cu_result cuStreamDestroy_v2(tvk_cu_stream s)
{
    lock();
    const tvk_cu_result code = drain(s);
    struct stream **at = &streams;
    while (*at != s)
        at = &(*at)->next;
    *at = (*at)->next;
    free(s);
    return locked(code);
}

tvk_cu_result cuStreamSynchronize(tvk_cu_stream s)
{
    lock();
    return locked(drain(s));
}

tvk_cu_result cuModuleLoadData(tvk_cu_module *m, const void *image)
{
    static int module;
    lock();
    *m = &module;
    if (image && strcmp(image, FAKE_CUDA_NEWER) == 0)
        return locked(NEWER_PTX);
    return locked(image ? TVK_CU_OK : INVALID);
}

tvk_cu_result cuModuleUnload(tvk_cu_module m)
{
    return m ? TVK_CU_OK : INVALID;
}

tvk_cu_result cuModuleGetFunction(tvk_cu_function *f, tvk_cu_module m,
                                  const char *name)
{
    (void)m;
    for (size_t i = 0; i < N_KERNELS; i++)
        if (strcmp(kernels[i].name, name) == 0) {
            *f = (tvk_cu_function)(uintptr_t)(i + 1);
            return TVK_CU_OK;
        }
    return TVK_CU_NOT_FOUND;
}

tvk_cu_result cuLaunchKernel(tvk_cu_function f, unsigned grid_x,
                             unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z,
                             unsigned shared, tvk_cu_stream s, void **params,
                             void **extra)
{
    const uintptr_t i = (uintptr_t)f - 1;

    (void)extra;
    /* Kernels loop over a grid of one dimension, up to 2^31 - 1 blocks. */
    if (i >= N_KERNELS || grid_x == 0 || grid_x > INT32_MAX || grid_y != 1 ||
        grid_z != 1 || block_x == 0 || block_x > 1024 || block_y != 1 ||
        block_z != 1 || shared > SHARED_MAX)
        return INVALID;
    struct action a = {.kind = LAUNCH,
                       .kernel = &kernels[i],
                       .grid = {.n_blocks = grid_x, .n_threads = block_x}};
    memcpy(a.args, params[0], kernels[i].args_bytes);
    lock();
    return locked(push(s, &a, false));
}
