/* SPDX-License-Identifier: Apache-2.0 */
/*
 * map.c - read-only file maps, and the registry that a SIGBUS handler asks.
 *
 * When a mapped file shrinks, or its disk fails, touching the map raises
 * SIGBUS; the handler in cli/ wants to say which file and which tensor. It may
 * take no lock and call almost nothing, so the registry is a fixed array of
 * slots made of atomics. Each slot is a sequence lock: the number is odd while
 * the slot is being written, and a reader that sees it change reads again.
 * The map that holds the faulting address cannot go away meanwhile, since
 * somebody is reading it; so the strings found there are safe to use. Maps
 * beyond the last slot work, they just cannot be named.
 */
#include "tv/sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#include "tv/alloc.h"

#define SLOTS      4096
#define READ_TRIES 64

struct slot {
    atomic_bool taken;
    atomic_uint sequence;
    atomic_uintptr_t begin; /* 0: nothing to describe */
    atomic_uintptr_t end;
    _Atomic(const char *) label;
    _Atomic(const struct tv_extent *) extents;
    atomic_size_t n_extents;
    char *owned_label; /* touched only by whoever took the slot */
};

static struct slot slots[SLOTS];

struct tv_map {
    unsigned char *data; /* NULL for an empty file */
    size_t n_bytes;
    int slot;
    char *path;
    struct stat st;
};

struct slot_view {
    uintptr_t begin, end;
    const char *label;
    const struct tv_extent *extents;
    size_t n_extents;
};

static void slot_write(struct slot *s, const struct slot_view *v)
{
    const unsigned seq =
        atomic_load_explicit(&s->sequence, memory_order_relaxed);
    atomic_store_explicit(&s->sequence, seq + 1, memory_order_relaxed);
    /* A reader that sees any store below sees the odd number as well. */
    atomic_store_explicit(&s->begin, v->begin, memory_order_release);
    atomic_store_explicit(&s->end, v->end, memory_order_release);
    atomic_store_explicit(&s->label, v->label, memory_order_release);
    atomic_store_explicit(&s->extents, v->extents, memory_order_release);
    atomic_store_explicit(&s->n_extents, v->n_extents, memory_order_release);
    atomic_store_explicit(&s->sequence, seq + 2, memory_order_release);
}

static bool slot_read(struct slot *s, struct slot_view *v)
{
    for (int i = 0; i < READ_TRIES; i++) {
        const unsigned before =
            atomic_load_explicit(&s->sequence, memory_order_acquire);
        if (before % 2 != 0)
            continue;
        v->begin = atomic_load_explicit(&s->begin, memory_order_acquire);
        v->end = atomic_load_explicit(&s->end, memory_order_acquire);
        v->label = atomic_load_explicit(&s->label, memory_order_acquire);
        v->extents = atomic_load_explicit(&s->extents, memory_order_acquire);
        v->n_extents =
            atomic_load_explicit(&s->n_extents, memory_order_acquire);
        if (atomic_load_explicit(&s->sequence, memory_order_relaxed) == before)
            return true;
    }
    return false;
}

static int slot_take(void)
{
    for (int i = 0; i < SLOTS; i++) {
        bool expected = false;
        if (!atomic_load_explicit(&slots[i].taken, memory_order_relaxed) &&
            atomic_compare_exchange_strong_explicit(&slots[i].taken, &expected,
                                                    true, memory_order_acquire,
                                                    memory_order_relaxed))
            return i;
    }
    return -1;
}

static void slot_give(int i)
{
    if (i < 0 || i >= SLOTS)
        return;
    const struct slot_view none = {0};
    slot_write(&slots[i], &none);
    tv_free(slots[i].owned_label);
    slots[i].owned_label = NULL;
    atomic_store_explicit(&slots[i].taken, false, memory_order_release);
}

static void slot_describe(int i, const void *data, size_t bytes,
                          const char *label, const struct tv_extent *extents,
                          size_t n_extents)
{
    const struct slot_view v = {
        .begin = (uintptr_t)data,
        .end = (uintptr_t)data + bytes,
        .label = label,
        .extents = extents,
        .n_extents = n_extents,
    };
    slot_write(&slots[i], &v);
}

enum tv_err tv_map_open(const char *path, struct tv_error *err, tv_map **out)
{
    enum tv_err rc = TV_OK;
    int fd = -1;
    tv_map *map = tv_calloc(1, sizeof *map);

    *out = NULL;
    if (!map || !(map->path = tv_strdup(path))) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory opening %s", path);
        goto out;
    }
    map->slot = -1;
    /* Without O_NONBLOCK, opening a FIFO would wait for a writer. */
    fd = tv_sys()->open(path, O_RDONLY | O_NONBLOCK, 0);
    if (fd < 0) {
        const int why = errno;
        rc = tv_error_sys(err, why, "cannot open %s", path);
        if (why == ENOENT || why == ENOTDIR) {
            rc = TV_E_INPUT;
            if (err)
                err->code = rc;
        }
        goto out;
    }
    if (tv_sys()->fstat(fd, &map->st) != 0) {
        rc = tv_error_sys(err, errno, "cannot read %s", path);
        goto out;
    }
    if (!S_ISREG(map->st.st_mode)) {
        rc = tv_error_set(err, TV_E_INPUT, "%s is not a regular file", path);
        goto out;
    }
    map->n_bytes = (size_t)map->st.st_size;
    if (map->n_bytes > 0) {
        void *data =
            tv_sys()->mmap(NULL, map->n_bytes, PROT_READ, MAP_SHARED, fd, 0);
        if (data == MAP_FAILED) {
            rc = tv_error_sys(err, errno, "cannot map %s (%zu bytes)", path,
                              map->n_bytes);
            goto out;
        }
        map->data = data;
        map->slot = slot_take();
        if (map->slot >= 0)
            slot_describe(map->slot, map->data, map->n_bytes, map->path, NULL,
                          0);
    }
    *out = map;
    map = NULL;
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_map_close(map);
    return rc;
}

void tv_map_close(tv_map *map)
{
    if (!map)
        return;
    if (map->data) {
        slot_give(map->slot);
        (void)tv_sys()->munmap(map->data, map->n_bytes);
    }
    tv_free(map->path);
    tv_free(map);
}

const unsigned char *tv_map_data(const tv_map *map)
{
    return map->data;
}

uint64_t tv_map_bytes(const tv_map *map)
{
    return map->n_bytes;
}

const char *tv_map_path(const tv_map *map)
{
    return map->path;
}

const struct stat *tv_map_stat(const tv_map *map)
{
    return &map->st;
}

void tv_map_set_extents(tv_map *map, const struct tv_extent *sorted, size_t n)
{
    if (map->data && map->slot >= 0)
        slot_describe(map->slot, map->data, map->n_bytes, map->path, sorted, n);
}

int tv_map_register(const void *data, uint64_t bytes, const char *label)
{
    if (!data || bytes == 0 || bytes > UINTPTR_MAX - (uintptr_t)data)
        return -1;
    char *copy = tv_strdup(label);
    if (!copy)
        return -1;
    const int i = slot_take();
    if (i < 0) {
        tv_free(copy);
        return -1;
    }
    slots[i].owned_label = copy;
    slot_describe(i, data, (size_t)bytes, copy, NULL, 0);
    return i;
}

void tv_map_unregister(int slot)
{
    slot_give(slot);
}

/* The extent that holds byte `at`, NULL when none. */
static const char *extent_at(const struct tv_extent *sorted, size_t n,
                             uint64_t at)
{
    size_t lo = 0;
    size_t hi = n;
    while (lo < hi) { /* the first extent that begins after `at` */
        const size_t mid = lo + (hi - lo) / 2;
        if (sorted[mid].offset <= at)
            lo = mid + 1;
        else
            hi = mid;
    }
    while (lo > 0) {
        const struct tv_extent *e = &sorted[--lo];
        if (at - e->offset < e->bytes)
            return e->name;
        /* Empty extents may share the offset of the one that we look for. */
        if (e->bytes != 0)
            break;
    }
    return NULL;
}

bool tv_map_describe(const void *addr, const char **file, const char **extent)
{
    const uintptr_t a = (uintptr_t)addr;
    for (int i = 0; i < SLOTS; i++) {
        struct slot_view v;
        if (!slot_read(&slots[i], &v) || v.begin == 0)
            continue;
        if (a < v.begin || a >= v.end)
            continue;
        *file = v.label;
        *extent = extent_at(v.extents, v.n_extents, a - v.begin);
        return true;
    }
    return false;
}
