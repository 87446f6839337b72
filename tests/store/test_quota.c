/* SPDX-License-Identifier: Apache-2.0 */
/* test_quota.c - the quota is never passed, and a full store can be emptied. */
#include "store_fixture.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "store_priv.h"
#include "tv/alloc.h"
#include "tv/sys.h"

static void quota_is_kept_and_reported(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t q = 1;
    struct tv_store_stat st;
    assert_ok(tv_store_quota_get(f->s, &q, &f->err), &f->err);
    assert_int_equal(q, 0);
    assert_code(tv_store_quota_set(f->s, 1000, &f->err), TV_E_USAGE, &f->err);
    assert_ok(tv_store_quota_set(f->s, 5000000, &f->err), &f->err);
    fx_close(f);
    fx_open(f, NULL);
    assert_ok(tv_store_quota_get(f->s, &q, &f->err), &f->err);
    assert_int_equal(q, 5000000);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.quota_bytes, 5000000);
    assert_true(st.used_bytes > 0 && st.used_bytes < 1000000);
    char *other = tv_path_join(f->dir, "other");
    assert_code(tv_store_create(other, 10, &f->err), TV_E_USAGE, &f->err);
    assert_ok(tv_store_create(other, 1u << 20, &f->err), &f->err);
    tv_free(other);
}

static void check_used(struct fx *f, uint64_t quota)
{
    uint64_t used = 0;
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used <= quota);
}

/* Fills the store until it refuses; returns how many objects fit. */
static unsigned fill(struct fx *f, uint64_t quota, uint64_t rows)
{
    char name[32];
    enum tv_err rc = TV_OK;
    unsigned n = 0;
    while (rc == TV_OK) {
        (void)snprintf(name, sizeof name, "m%u", n);
        rc = fx_object(f->s, name, 1000 * rows + n, rows, &f->err);
        check_used(f, quota);
        n += rc == TV_OK;
    }
    assert_int_equal(rc, TV_E_NOSPACE);
    assert_message(&f->err, "quota");
    return n;
}

static void never_passed(void **state)
{
    struct fx *f = (struct fx *)*state;
    static const uint64_t quotas[] = {1u << 20, 3000000};
    for (int k = 0; k < 2; k++) {
        const uint64_t q = quotas[k];
        assert_ok(tv_store_quota_set(f->s, q, &f->err), &f->err);
        const unsigned n = fill(f, q, 1500); /* about 200 KB each */
        assert_true(n >= 2);
        for (unsigned i = 0; i < n; i++) {
            char name[32];
            (void)snprintf(name, sizeof name, "m%u", i);
            assert_ok(fx_object_compare(f->s, name, 1500000 + i, &f->err),
                      &f->err);
        }
        fx_verify(f);
        /* A full store can be emptied, and is then as good as new. */
        for (unsigned i = 0; i < n; i++) {
            char name[32];
            (void)snprintf(name, sizeof name, "m%u", i);
            assert_ok(fx_remove(f->s, name, &f->err), &f->err);
            check_used(f, q);
        }
        uint64_t freed = 0;
        assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
        const unsigned again = fill(f, q, 1500);
        assert_true(again >= n / 2); /* less some room between old pages */
        for (unsigned i = 0; i <= n; i++) {
            char name[32];
            (void)snprintf(name, sizeof name, "m%u", i);
            (void)fx_remove(f->s, name, NULL);
        }
        assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
        check_used(f, q);
        fx_verify(f);
    }
}

/* Every other small object of a full store goes: a large one finds its room
 * between those that stay. */
static void pieces_are_used(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t q = 4u << 20;
    char name[32];
    uint64_t freed = 0;
    assert_ok(tv_store_quota_set(f->s, q, &f->err), &f->err);
    const unsigned n = fill(f, q, 450); /* about 60 KB each */
    for (unsigned i = 0; i < n; i += 2) {
        (void)snprintf(name, sizeof name, "m%u", i);
        assert_ok(fx_remove(f->s, name, &f->err), &f->err);
    }
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    for (unsigned i = 0; i < 2; i++) {
        (void)snprintf(name, sizeof name, "large%u", i);
        assert_ok(fx_object(f->s, name, 7 + i, 5500, &f->err), &f->err);
        check_used(f, q);
    }
    assert_ok(fx_object_compare(f->s, "large0", 7, &f->err), &f->err);
    assert_ok(fx_object_compare(f->s, "large1", 8, &f->err), &f->err);
    fx_verify(f);
}

static void put_state(struct fx *f, const void *doc, size_t n)
{
    tv_batch *b = NULL;
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_run_put(b, "run", doc, n, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
}

static void state_is(struct fx *f, const void *want, size_t n_want)
{
    tv_read *r = NULL;
    char *doc = NULL, **names = NULL;
    size_t n = 0;
    bool found = false;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_run_get(r, "run", &found, &doc, &n, &f->err), &f->err);
    assert_true(found);
    assert_int_equal(n, n_want);
    assert_memory_equal(doc, want, n_want);
    tv_free(doc);
    assert_ok(tv_run_list(r, &f->err, &names, &n), &f->err);
    assert_int_equal(n, 1); /* pieces are no runs */
    assert_string_equal(names[0], "run");
    tv_dir_list_free(names, n);
    tv_read_end(r);
}

static void file_is(struct fx *f, const char *object, const void *want,
                    size_t n_want)
{
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    const void *data = NULL;
    size_t n = 0;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_object_find(r, object, false, &f->err, &o), &f->err);
    assert_int_equal(o->n_files, 1);
    assert_ok(tv_blob_get(r, o->files[0].digest, &data, &n, &f->err), &f->err);
    assert_int_equal(n, n_want);
    assert_memory_equal(data, want, n_want);
    tv_object_free(o);
    tv_read_end(r);
}

static void put_file(struct fx *f, const char *object, const void *data,
                     size_t n)
{
    tv_batch *b = NULL;
    uint64_t id = 0;
    bool resumed = false;
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, object, TV_KIND_MODEL, "", "",
                               (struct tv_hash){1, 2}, &id, &resumed, &f->err),
              &f->err);
    assert_ok(tv_object_file_put(b, id, "words", data, n, &f->err), &f->err);
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
}

/* Runs are taken first fit, whatever was asked before. */
static void runs_are_taken_first_fit(void **state)
{
    enum { RUNS = 300, ASKED = 4000 };
    static struct page_run runs[RUNS], plain[RUNS];
    struct space sp = {.runs = runs, .n_runs = RUNS};
    uint64_t seed = 1;
    (void)state;
    for (size_t i = 0; i < RUNS; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        runs[i] = (struct page_run){.page = i * 1000, .n = (seed >> 40) % 200};
        sp.n_free += runs[i].n;
    }
    memcpy(plain, runs, sizeof runs);
    for (size_t i = 0; i < ASKED; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const uint64_t pages = 1 + (seed >> 40) % (i % 3 == 0 ? 100 : 9);
        size_t at = 0;
        while (at < RUNS && plain[at].n < pages)
            at++;
        assert_int_equal(space_growth(&sp, &pages, 1, 0),
                         at == RUNS ? pages : 0);
        if (at == RUNS)
            continue;
        plain[at].n -= pages;
        plain[at].page += pages;
        assert_memory_equal(&runs[at], &plain[at], sizeof plain[at]);
    }
    assert_memory_equal(runs, plain, sizeof runs);
}

/* A side file that lacks a piece is damaged, for readers and for verify; and is
 * put anew by who has it. */
static void lose_piece(struct fx *f, struct tv_hash digest)
{
    tv_batch *b = NULL;
    tv_read *r = NULL;
    const void *data = NULL;
    struct rec_key k;
    bool found = false;
    size_t n = 0;
    key_digest(&k, digest);
    memcpy(k.b + 16, "\0\0\0\0\7", 5);
    k.n = 21;
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(db_del(b, DB_BLOB, &k, &found, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    assert_true(found);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_code(tv_blob_get(r, digest, &data, &n, &f->err), TV_E_CORRUPT,
                &f->err);
    assert_message(&f->err, "a piece is missing");
    tv_read_end(r);
    assert_code(tv_store_verify(f->s, 1, NULL, NULL, NULL, &f->err),
                TV_E_CORRUPT, &f->err);
}

/* Room for long values in pieces alone. */
static void shred(struct fx *f)
{
    const uint64_t q = 4u << 20;
    char name[32];
    uint64_t bytes = 0;
    assert_ok(tv_store_quota_set(f->s, q, &f->err), &f->err);
    const unsigned n = fill(f, q, 450); /* about 60 KB each */
    for (unsigned i = 0; i < n; i += 2) {
        (void)snprintf(name, sizeof name, "m%u", i);
        assert_ok(fx_remove(f->s, name, &f->err), &f->err);
    }
    assert_ok(tv_store_gc(f->s, &bytes, &f->err), &f->err);
    assert_ok(tv_disk_used(f->path, &bytes, &f->err), &f->err);
    /* A quota of what is there: LMDB itself would go on growing. */
    assert_ok(tv_store_quota_set(f->s, bytes - (64u << 10), &f->err), &f->err);
}

/* Side files and the state of a run are cut where no run of free pages is long
 * enough for them and the file may not grow. */
static void long_values_are_cut(void **state)
{
    struct fx *f = (struct fx *)*state;
    const size_t most = 400000;
    uint64_t freed = 0, full = 0, used = 0;
    unsigned char *doc = (unsigned char *)tv_alloc(most);
    shred(f);
    assert_ok(tv_disk_used(f->path, &full, &f->err), &f->err);
    for (unsigned i = 0; i < 6; i++) {
        static const size_t sizes[] = {399999, 8128, 4063, 8127, 0, 250000};
        fx_bytes(i, doc, sizes[i]);
        put_state(f, doc, sizes[i]);
        state_is(f, doc, sizes[i]);
    }
    fx_bytes(9, doc, most);
    put_file(f, "words", doc, most);
    file_is(f, "words", doc, most);
    put_file(f, "again", doc, most); /* shared */
    fx_verify(f);
    fx_close(f);
    fx_open(f, NULL);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    file_is(f, "again", doc, most);
    assert_ok(fx_remove(f->s, "again", &f->err), &f->err);
    file_is(f, "words", doc, most);
    assert_ok(fx_remove(f->s, "words", &f->err), &f->err);
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used <= full);
    fx_verify(f);
    /* Nothing is left of them: the same room is there again. */
    put_file(f, "words", doc, most);
    file_is(f, "words", doc, most);
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_true(used <= full);
    lose_piece(f, tv_hash128(doc, most));
    tv_free(doc);
}

/* Overwrites the head of a value in pieces, or removes it (NULL). */
static void spoil_head(struct fx *f, enum db db, const struct rec_key *k,
                       const void *data, size_t n)
{
    tv_batch *b = NULL;
    MDB_val val = {0, NULL};
    bool found = false;
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(db_get(&b->t, db, k, &found, &val, &f->err), &f->err);
    assert_true(found);
    assert_int_equal(*(const unsigned char *)val.mv_data, REC_PIECES);
    if (data == NULL)
        assert_ok(db_del(b, db, k, NULL, &f->err), &f->err);
    else
        assert_ok(db_put(b, db, k, data, n, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    assert_code(tv_store_verify(f->s, 1, NULL, NULL, NULL, &f->err),
                TV_E_CORRUPT, &f->err);
}

/* Whoever puts or drops a value whose head is damaged takes all of its pieces
 * along: else what was mended would stay damaged for verify. */
static void pieces_go_without_their_head(void **state)
{
    struct fx *f = (struct fx *)*state;
    unsigned char doc[100000];
    struct rec_key run, words;
    uint64_t freed = 0;
    shred(f);
    fx_bytes(1, doc, sizeof doc);
    key_str(&run, "run");
    key_digest(&words, tv_hash128(doc, sizeof doc));
    for (unsigned i = 0; i < 3; i++) {
        const char *spoilt = i == 0 ? "\x53" : i == 1 ? "" : NULL;
        put_state(f, doc, sizeof doc);
        spoil_head(f, DB_RUN, &run, spoilt, i == 0);
        put_state(f, doc, 9000); /* fewer pieces */
        state_is(f, doc, 9000);
        fx_verify(f);
        spoil_head(f, DB_RUN, &run, spoilt, i == 0);
        put_state(f, doc, 5); /* none */
        state_is(f, doc, 5);
        fx_verify(f);

        put_file(f, "words", doc, sizeof doc);
        spoil_head(f, DB_BLOB, &words, spoilt, i == 0);
        assert_ok(fx_remove(f->s, "words", &f->err), &f->err);
        fx_verify(f);
    }
    put_file(f, "words", doc, sizeof doc);
    spoil_head(f, DB_BLOB, &words, "\x53", 1);
    assert_ok(tv_store_quota_set(f->s, 64u << 20, &f->err), &f->err);
    put_file(f, "again", doc, sizeof doc); /* in a row, and mended */
    file_is(f, "words", doc, sizeof doc);
    fx_verify(f);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
}

static void add_piece(struct fx *f, enum db db, const struct rec_key *owner,
                      unsigned char number)
{
    tv_batch *b = NULL;
    struct tv_buf buf;
    struct rec_key k = *owner;
    memcpy(k.b + k.n, "\0\0\0\0", 4);
    k.b[k.n + 4] = number;
    k.n += 5;
    rec_begin(&buf);
    tv_buf_add(&buf, "more", 4);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(db_put_rec(b, db, REC_PIECE, &k, &buf, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
}

/* A piece behind the last one is read by nobody, but it is there: verify says
 * so, and it goes with the others. */
static void a_piece_too_many_is_noticed(void **state)
{
    struct fx *f = (struct fx *)*state;
    unsigned char doc[100000];
    struct rec_key run, words;
    shred(f);
    fx_bytes(1, doc, sizeof doc);
    key_str(&run, "run");
    key_digest(&words, tv_hash128(doc, sizeof doc));
    put_state(f, doc, sizeof doc);
    add_piece(f, DB_RUN, &run, 25); /* of 0 to 24 */
    assert_code(tv_store_verify(f->s, 1, NULL, NULL, NULL, &f->err),
                TV_E_CORRUPT, &f->err);
    put_state(f, doc, sizeof doc);
    fx_verify(f);
    put_file(f, "words", doc, sizeof doc);
    add_piece(f, DB_BLOB, &words, 25);
    assert_code(tv_store_verify(f->s, 1, NULL, NULL, NULL, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_ok(fx_remove(f->s, "words", &f->err), &f->err);
    fx_verify(f);
}

static void says_long_key(void *arg, const char *object, const char *tensor,
                          const char *what)
{
    (void)object;
    (void)tensor;
    *(bool *)arg = strstr(what, "its key is too long") != NULL;
}

/* A key that leaves no room for the number of a piece, as no run has one. */
static void a_long_key_has_no_pieces(void **state)
{
    struct fx *f = (struct fx *)*state;
    const struct rec_pieces head = {
        .type = REC_RUN, .piece_bytes = 1, .bytes = 1u << 30};
    bool said = false;
    tv_batch *b = NULL;
    struct tv_buf buf;
    struct rec_key k = {.n = TV_REC_KEY_MAX};
    memset(k.b, 'a', k.n);
    rec_begin(&buf);
    rec_pieces_put(&buf, &head);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(db_put_rec(b, DB_RUN, REC_PIECES, &k, &buf, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    assert_code(tv_store_verify(f->s, 1, says_long_key, NULL, &said, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_true(said);
}

/* Filled to the brim with odd sizes and tiny records: only LMDB's own fence is
 * left, and it must hold as well. */
static void the_second_fence_holds(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t q = 2u << 20;
    assert_ok(tv_store_quota_set(f->s, q, &f->err), &f->err);
    enum tv_err rc = TV_OK;
    unsigned n = 0;
    char name[32];
    static char doc[20000];
    while (rc == TV_OK) {
        tv_batch *b = NULL;
        (void)snprintf(name, sizeof name, "run-%u", n++);
        rc = tv_batch_begin(f->s, false, &f->err, &b);
        if (rc == TV_OK)
            rc = tv_run_put(b, name, doc, sizeof doc, &f->err);
        if (rc == TV_OK) {
            rc = tv_batch_commit(b, &f->err);
            b = NULL;
        }
        tv_batch_abort(b);
        check_used(f, q);
    }
    assert_int_equal(rc, TV_E_NOSPACE);
    assert_true(n > 50);
    fx_verify(f);
}

static void raising_it_makes_room(void **state)
{
    struct fx *f = (struct fx *)*state;
    assert_ok(tv_store_quota_set(f->s, 1u << 20, &f->err), &f->err);
    fill(f, 1u << 20, 1500);
    assert_ok(tv_store_quota_set(f->s, 4u << 20, &f->err), &f->err);
    assert_ok(fx_object(f->s, "more", 1, 1500, &f->err), &f->err);
    assert_ok(tv_store_quota_set(f->s, 0, &f->err), &f->err);
    assert_ok(fx_object(f->s, "much", 2, 100000, &f->err), &f->err);
    /* Lowering it below what is there only stops growth. */
    assert_ok(tv_store_quota_set(f->s, 1u << 20, &f->err), &f->err);
    assert_ok(fx_object_compare(f->s, "much", 2, &f->err), &f->err);
    assert_code(fx_object(f->s, "no", 3, 1500, &f->err), TV_E_NOSPACE, &f->err);
    assert_ok(fx_remove(f->s, "much", &f->err), &f->err);
    fx_verify(f);
}

/* A file system that takes no more, by a limit on the size of files. */
static int write_under_limit(const char *path)
{
    tv_store *s = NULL;
    struct tv_error err;
    const struct rlimit lim = {1u << 20, 1u << 20};
    enum tv_err rc = TV_OK;
    uint64_t i = 0;
    char name[32];
    (void)signal(SIGXFSZ, SIG_IGN);
    if (setrlimit(RLIMIT_FSIZE, &lim) != 0 ||
        tv_store_open(path, NULL, &err, &s) != TV_OK)
        return 1;
    for (; rc == TV_OK && i < 20; i++) {
        (void)snprintf(name, sizeof name, "m%d", (int)i);
        rc = fx_object(s, name, i, 1500, &err);
    }
    tv_store_close(s);
    return rc == TV_E_NOSPACE && i > 1 ? 0 : 2;
}

static void full_disk(void **state)
{
    struct fx *f = (struct fx *)*state;
    fx_close(f);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(write_under_limit(f->path));
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    fx_open(f, NULL);
    fx_verify(f);
    assert_ok(fx_object_compare(f->s, "m0", 0, &f->err), &f->err);
    assert_ok(fx_object(f->s, "after", 5, 1500, &f->err), &f->err);
    fx_verify(f);
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(quota_is_kept_and_reported),
        T(never_passed),
        T(pieces_are_used),
        T(long_values_are_cut),
        T(pieces_go_without_their_head),
        T(a_piece_too_many_is_noticed),
        T(a_long_key_has_no_pieces),
        cmocka_unit_test(runs_are_taken_first_fit),
        T(the_second_fence_holds),
        T(raising_it_makes_room),
        T(full_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
