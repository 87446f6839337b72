/* SPDX-License-Identifier: Apache-2.0 */
/*
 * torch_bin.c - pytorch_model.bin: the zip that torch.save writes.
 *
 *   PREFIX/data.pkl   the pickle (pickle.c)
 *   PREFIX/data/KEY   the bytes of one storage
 *   PREFIX/byteorder  "little", when present
 *
 * Entries are stored, not compressed, so a tensor is an extent of the mapped
 * file. minizip reads the directory through callbacks on memory and gives the
 * position of each entry's bytes. A zip can describe the same bytes twice in
 * contradicting ways; whatever is ambiguous is refused: compressed, encrypted,
 * doubly named or overlapping entries, entries beyond the file, bytes in front
 * of the archive. Legacy (pre-zip) torch files and TorchScript are refused.
 */
#include "tv/parse.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <unzip.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"

#define ENTRIES_MAX    (TV_ST_TENSORS_MAX + 64u)
#define ENTRY_NAME_MAX 1024u

struct entry {
    char *name;
    uint64_t offset, bytes;
};

struct archive {
    const char *label;
    struct tv_error *err;
    struct entry *entries; /* sorted by name */
    size_t n, cap;
    char *prefix; /* "pytorch_model/" */
};

/* ---- the file, as minizip wants it
 * -------------------------------------------- */

struct memory {
    const unsigned char *data;
    uint64_t n, pos;
};

static voidpf ZCALLBACK mem_open(voidpf opaque, const void *name, int mode)
{
    (void)name;
    (void)mode;
    return opaque;
}

static uLong ZCALLBACK mem_read(voidpf opaque, voidpf stream, void *buf,
                                uLong n)
{
    struct memory *m = (struct memory *)stream;
    const uint64_t left = m->n - m->pos;
    const uint64_t take = n < left ? n : left;

    (void)opaque;
    if (take > 0)
        memcpy(buf, m->data + m->pos, (size_t)take);
    m->pos += take;
    return (uLong)take;
}

static uLong ZCALLBACK mem_write(voidpf opaque, voidpf stream, const void *buf,
                                 uLong n)
{
    (void)opaque;
    (void)stream;
    (void)buf;
    (void)n;
    return 0;
}

static ZPOS64_T ZCALLBACK mem_tell(voidpf opaque, voidpf stream)
{
    (void)opaque;
    return ((const struct memory *)stream)->pos;
}

static long ZCALLBACK mem_seek(voidpf opaque, voidpf stream, ZPOS64_T off,
                               int origin)
{
    struct memory *m = (struct memory *)stream;
    uint64_t base = 0;

    (void)opaque;
    if (origin == ZLIB_FILEFUNC_SEEK_CUR)
        base = m->pos;
    else if (origin == ZLIB_FILEFUNC_SEEK_END)
        base = m->n;
    if (off > m->n - base)
        return -1;
    m->pos = base + off;
    return 0;
}

static int ZCALLBACK mem_close(voidpf opaque, voidpf stream)
{
    (void)opaque;
    (void)stream;
    return 0;
}

/* ---- the directory
 * ---------------------------------------------------------------- */

static enum tv_err bad(const struct archive *a, const char *what)
{
    return tv_error_set(a->err, TV_E_CORRUPT, "%s: %s", a->label, what);
}

static enum tv_err bad_entry(const struct archive *a, const char *name,
                             const char *what)
{
    struct tv_shown shown;

    return tv_error_set(a->err, TV_E_CORRUPT, "%s: zip entry '%s': %s",
                        a->label, tv_show(name, &shown), what);
}

static enum tv_err no_memory(const struct archive *a)
{
    return tv_error_set(a->err, TV_E_NOMEM, "%s: out of memory", a->label);
}

static enum tv_err add_entry(struct archive *a, unzFile zip, uint64_t n_file)
{
    unz_file_info64 info;
    char name[ENTRY_NAME_MAX + 1];
    struct entry e;
    int method = 0;
    int level = 0;

    memset(&info, 0, sizeof info);
    memset(name, 0, sizeof name);
    if (unzGetCurrentFileInfo64(zip, &info, name, sizeof name, NULL, 0, NULL,
                                0) != UNZ_OK)
        return bad(a, "a damaged entry in the zip directory");
    if (info.size_filename > ENTRY_NAME_MAX)
        return bad(a, "a zip entry with too long a name");
    if (strlen(name) != info.size_filename)
        return bad_entry(a, name, "its name holds a NUL");
    if ((info.flag & (1u | 1u << 6 | 1u << 13)) != 0)
        return bad_entry(a, name, "it is encrypted");
    if (info.compression_method != 0 ||
        info.compressed_size != info.uncompressed_size)
        return bad_entry(a, name, "it is compressed; torch.save stores");
    /* raw: nothing is inflated, only the local header is compared with the
     * directory. */
    if (unzOpenCurrentFile2(zip, &method, &level, 1) != UNZ_OK)
        return bad_entry(a, name, "its local header contradicts the directory");
    e.offset = unzGetCurrentFileZStreamPos64(zip);
    e.bytes = info.uncompressed_size;
    unzCloseCurrentFile(zip);
    if (e.offset > n_file || e.bytes > n_file - e.offset)
        return bad_entry(a, name, "its bytes do not lie in the file");
    if (a->n == ENTRIES_MAX)
        return bad(a, "too many zip entries");
    if (a->n == a->cap) {
        const size_t cap = a->cap == 0 ? 64 : 2 * a->cap;
        struct entry *grown =
            (struct entry *)tv_realloc(a->entries, cap * sizeof *grown);

        if (grown == NULL)
            return no_memory(a);
        a->entries = grown;
        a->cap = cap;
    }
    e.name = tv_strdup(name);
    if (e.name == NULL)
        return no_memory(a);
    a->entries[a->n++] = e;
    return TV_OK;
}

static int compare_entry_offset(const void *a, const void *b)
{
    const struct entry *x = (const struct entry *)a;
    const struct entry *y = (const struct entry *)b;

    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int compare_entry_name(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->name,
                  ((const struct entry *)b)->name);
}

/* After it, entries are sorted by name. */
static enum tv_err check_entries(struct archive *a)
{
    qsort(a->entries, a->n, sizeof *a->entries, compare_entry_offset);
    for (size_t i = 1; i < a->n; i++) {
        if (a->entries[i].offset <
            a->entries[i - 1].offset + a->entries[i - 1].bytes)
            return bad_entry(a, a->entries[i].name,
                             "its bytes overlap another entry's");
    }
    qsort(a->entries, a->n, sizeof *a->entries, compare_entry_name);
    for (size_t i = 1; i < a->n; i++) {
        if (strcmp(a->entries[i].name, a->entries[i - 1].name) == 0)
            return bad_entry(a, a->entries[i].name, "the name occurs twice");
    }
    return TV_OK;
}

static enum tv_err read_directory(struct archive *a, const void *data,
                                  uint64_t n)
{
    enum tv_err rc = TV_OK;
    struct memory m = {(const unsigned char *)data, n, 0};
    zlib_filefunc64_def io;
    unzFile zip = NULL;
    int step = UNZ_OK;

    memset(&io, 0, sizeof io);
    io.zopen64_file = mem_open;
    io.zread_file = mem_read;
    io.zwrite_file = mem_write;
    io.ztell64_file = mem_tell;
    io.zseek64_file = mem_seek;
    io.zclose_file = mem_close;
    io.zerror_file = mem_close;
    io.opaque = &m;
    zip = unzOpen2_64("", &io);
    if (zip == NULL) {
        rc = bad(a, "not a zip archive, or cut off");
        goto out;
    }
    for (step = unzGoToFirstFile(zip); step == UNZ_OK;
         step = unzGoToNextFile(zip))
        TV_TRY(add_entry(a, zip, n));
    if (step != UNZ_END_OF_LIST_OF_FILE) {
        rc = bad(a, "a damaged zip directory");
        goto out;
    }
    TV_TRY(check_entries(a));
out:
    if (zip != NULL)
        unzClose(zip);
    return rc;
}

/* Entry PREFIX + folder + name; NULL when there is none. */
static const struct entry *find_entry(const struct archive *a,
                                      const char *folder, const char *name)
{
    char path[ENTRY_NAME_MAX + 1];
    struct entry key = {path, 0, 0};
    const int n =
        snprintf(path, sizeof path, "%s%s%s", a->prefix, folder, name);

    if (n < 0 || (size_t)n >= sizeof path)
        return NULL;
    return (const struct entry *)bsearch(&key, a->entries, a->n, sizeof key,
                                         compare_entry_name);
}

static bool find_storage(void *arg, const char *key, uint64_t *offset,
                         uint64_t *bytes)
{
    const struct entry *e =
        find_entry((const struct archive *)arg, "data/", key);

    if (e == NULL)
        return false;
    *offset = e->offset;
    *bytes = e->bytes;
    return true;
}

/* The one directory that holds data.pkl. */
static enum tv_err find_prefix(struct archive *a)
{
    static const char tail[] = "/data.pkl";
    const size_t k = sizeof tail - 1;

    for (size_t i = 0; i < a->n; i++) {
        const char *name = a->entries[i].name;
        const size_t len = strlen(name);

        if (len <= k || strcmp(name + len - k, tail) != 0 ||
            memchr(name, '/', len - k) != NULL)
            continue;
        if (a->prefix != NULL)
            return bad(a, "two data.pkl in one archive");
        a->prefix = tv_strndup(name, len - k + 1);
        if (a->prefix == NULL)
            return no_memory(a);
    }
    return a->prefix == NULL ? bad(a, "no data.pkl: not a torch checkpoint")
                             : TV_OK;
}

static enum tv_err check_magic(const struct archive *a,
                               const unsigned char *data, uint64_t n)
{
    static const unsigned char zip[4] = {'P', 'K', 3, 4};

    if (n >= 4 && memcmp(data, zip, sizeof zip) == 0)
        return TV_OK;
    if (n >= 2 && data[0] == 0x80)
        return bad(a, "a legacy torch file (a bare pickle), which is refused; "
                      "save it again with a torch of this decade");
    if (n >= 262 && memcmp(data + 257, "ustar", 5) == 0)
        return bad(a, "a legacy torch file (tar), which is refused");
    if (n >= 23 && memcmp(data, "version https://git-lfs", 23) == 0)
        return bad(a, "not a torch zip archive but a Git LFS pointer ('git "
                      "lfs pull' or 'hf download' fetches the file)");
    return bad(a, "not a torch zip archive");
}

enum tv_err tv_torch_parse(const void *data, uint64_t n, const char *label,
                           struct tv_error *err, struct tv_parsed_file **out)
{
    enum tv_err rc = TV_OK;
    const unsigned char *bytes = (const unsigned char *)data;
    struct archive a = {label, err, NULL, 0, 0, NULL};
    const struct entry *e = NULL;

    *out = NULL;
    TV_TRY(check_magic(&a, bytes, n));
    TV_TRY(read_directory(&a, data, n));
    TV_TRY(find_prefix(&a));
    if (find_entry(&a, "", "constants.pkl") != NULL) {
        rc = bad(&a, "a TorchScript archive, not a checkpoint");
        goto out;
    }
    e = find_entry(&a, "", "byteorder");
    if (e != NULL &&
        (e->bytes != 6 || memcmp(bytes + e->offset, "little", 6) != 0)) {
        rc = bad(&a, "its byteorder is not little");
        goto out;
    }
    e = find_entry(&a, "", "data.pkl");
    if (e == NULL || e->bytes > TV_PICKLE_MAX) {
        rc = bad(&a, "data.pkl is too large");
        goto out;
    }
    TV_TRY(tv_pickle_parse(bytes + e->offset, (size_t)e->bytes, label,
                           find_storage, &a, err, out));
    (*out)->header_digest = tv_hash128(bytes + e->offset, (size_t)e->bytes);
out:
    for (size_t i = 0; i < a.n; i++)
        tv_free(a.entries[i].name);
    tv_free(a.entries);
    tv_free(a.prefix);
    return rc;
}
