/* SPDX-License-Identifier: Apache-2.0 */
/* test_record.c - keys in layer order, records and their damage, geometry. */
#include "test.h"

#include <string.h>

#include "record.h"
#include "rng.h"
#include "tv/alloc.h"

static int key_compare(const struct rec_key *a, const struct rec_key *b)
{
    const int c = memcmp(a->b, b->b, a->n < b->n ? a->n : b->n);
    return c != 0 ? c : (a->n > b->n) - (a->n < b->n);
}

/* Keys order names as tv_name_compare does. */
static void keys_in_layer_order(void **state)
{
    (void)state;
    static const char *const names[] = {
        "a",
        "a.0.w",
        "a.1.w",
        "a.2.w",
        "a.10.w",
        "a.10.w2",
        "a.100.w",
        "lm_head.weight",
        "model.layers.2.x",
        "model.layers.9.x",
        "model.layers.10.x",
        "model.layers.1844674407370955161600.x",
        "model.norm",
        "w2",
        "w10",
        "w10a",
        "w10b",
    };
    const size_t n = sizeof names / sizeof names[0];
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < n; j++) {
            struct rec_key a, b;
            key_tensor(&a, 7, names[i]);
            key_tensor(&b, 7, names[j]);
            const int want = tv_name_compare(names[i], names[j]);
            const int got = key_compare(&a, &b);
            assert_int_equal((got > 0) - (got < 0), (want > 0) - (want < 0));
        }
    }
}

static void keys_of_one_object_stay_together(void **state)
{
    (void)state;
    struct rec_key a, b;
    key_tensor(&a, 255, "zzz");
    key_tensor(&b, 256, "aaa");
    assert_true(key_compare(&a, &b) < 0);
}

static void long_names_fit_a_key(void **state)
{
    (void)state;
    char name[TV_NAME_MAX + 1];
    struct rec_key a, b;
    for (size_t n = 1; n <= TV_NAME_MAX; n = n * 3 / 2 + 1) {
        memset(name, 'x', n);
        name[n] = '\0';
        key_tensor(&a, 1, name);
        assert_true(a.n >= 17 && a.n <= 511);
        memset(name, '7', n);
        key_tensor(&a, 1, name);
        assert_true(a.n >= 17 && a.n <= 511);
        key_done(&a, "a-run-of-some-length", name);
        assert_true(a.n <= 511);
        /* Names that differ only behind the cut still differ. */
        memset(name, 'x', n);
        key_tensor(&a, 1, name);
        name[n - 1] = 'y';
        key_tensor(&b, 1, name);
        assert_true(key_compare(&a, &b) != 0);
    }
}

/* ---- records --------------------------------------------------------------
 */

struct sample {
    enum rec_type type;
    struct rec_key key;
    struct tv_buf buf;
};

static bool decode(enum rec_type type, struct rec_body body, const char **why)
{
    struct rec_store st;
    struct rec_object o;
    struct rec_object_id oi;
    struct rec_tensor t;
    struct rec_payload p;
    struct rec_source s;
    struct rec_done d;
    uint64_t v = 0;
    switch (type) {
    case REC_STORE:
        return rec_store_get(body, &st, why);
    case REC_NUMBER:
    case REC_TRASH:
        return rec_number_get(body, &v, why);
    case REC_OBJECT:
        return rec_object_get(body, &o, why);
    case REC_OBJECT_ID:
        return rec_object_id_get(body, &oi, why);
    case REC_TENSOR:
        return rec_tensor_get(body, &t, why);
    case REC_PAYLOAD:
        return rec_payload_get(body, &p, why);
    case REC_SOURCE:
        return rec_source_get(body, &s, why);
    case REC_DONE:
        return rec_done_get(body, &d, why);
    default:
        return true;
    }
}

static struct rec_text text(const char *s)
{
    return (struct rec_text){.s = s, .n = strlen(s)};
}

static void make_sample(int i, struct sample *s)
{
    rec_begin(&s->buf);
    key_id(&s->key, 77);
    switch (i) {
    case 0: {
        const struct rec_store r = {.format = 1,
                                    .page_bytes = 4096,
                                    .uuid = {1, 2, 3},
                                    .created_ns = 123456789};
        s->type = REC_STORE;
        rec_store_put(&s->buf, &r);
        break;
    }
    case 1:
        s->type = REC_NUMBER;
        rec_number_put(&s->buf, 0x1122334455667788u);
        break;
    case 2: {
        struct tv_buf files;
        const struct rec_file f = {
            .digest = {1, 2}, .bytes = 10, .name = text("config.json")};
        tv_buf_init(&files, 1000);
        rec_file_put(&files, &f);
        rec_file_put(&files, &f);
        const struct rec_object r = {.id = 5,
                                     .kind = TV_KIND_ADAPTER,
                                     .state = REC_COMPLETE,
                                     .fingerprint = {3, 4},
                                     .architecture = text("LlamaForCausalLM"),
                                     .source_path = text("/a/b"),
                                     .n_files = 2,
                                     .files = (unsigned char *)files.data,
                                     .files_bytes = files.n_bytes};
        s->type = REC_OBJECT;
        rec_object_put(&s->buf, &r);
        tv_buf_free(&files);
        break;
    }
    case 3: {
        const struct rec_object_id r = {.state = REC_PARTIAL,
                                        .n_tensors = 3,
                                        .n_linked = 1,
                                        .bytes = 99,
                                        .name = text("my-model")};
        s->type = REC_OBJECT_ID;
        rec_object_id_put(&s->buf, &r);
        break;
    }
    case 4: {
        const struct rec_tensor r = {.t = {.dtype = TV_BF16,
                                           .rank = 2,
                                           .shape = {3, 5},
                                           .n_elems = 15,
                                           .bytes = 30,
                                           .storage = TV_LINKED,
                                           .checksum_known = true,
                                           .checksum = {8, 9},
                                           .source_id = 4,
                                           .offset = 1000},
                                     .name = text("model.layers.0.w")};
        s->type = REC_TENSOR;
        rec_tensor_put(&s->buf, &r);
        break;
    }
    case 5: {
        const struct rec_payload r = {.dtype = TV_F32,
                                      .state = REC_COMPLETE,
                                      .rank = 1,
                                      .shape = {100},
                                      .n_elems = 100,
                                      .bytes = 400,
                                      .chunk_bytes = 128,
                                      .n_chunks = 4,
                                      .refs = 2,
                                      .checksum = {1, 1}};
        s->type = REC_PAYLOAD;
        rec_payload_put(&s->buf, &r);
        break;
    }
    case 6: {
        const struct tv_hash l[2] = {{1, 2}, {3, 4}};
        s->type = REC_LEAVES;
        rec_leaves_put(&s->buf, l, 2);
        break;
    }
    case 7: {
        const struct rec_source r = {.bytes = 1000,
                                     .mtime_ns = 5,
                                     .inode = 6,
                                     .header_bytes = 16,
                                     .header_digest = {1, 7},
                                     .path = text("/x/y.safetensors")};
        s->type = REC_SOURCE;
        rec_source_put(&s->buf, &r);
        break;
    }
    default: {
        const struct rec_done r = {.shard = 1,
                                   .offset = 2,
                                   .bytes = 3,
                                   .n_nonfinite_in = 4,
                                   .n_nonfinite_out = 5,
                                   .checksum = {6, 7},
                                   .name = text("w")};
        s->type = REC_DONE;
        rec_done_put(&s->buf, &r);
        break;
    }
    }
    rec_end(&s->buf, s->type, &s->key);
    assert_false(s->buf.failed);
}

#define N_SAMPLES 9

static void round_trips(void **state)
{
    (void)state;
    for (int i = 0; i < N_SAMPLES; i++) {
        struct sample s;
        struct rec_body body;
        const char *why = NULL;
        make_sample(i, &s);
        assert_true(rec_open(s.type, s.key.b, s.key.n, s.buf.data,
                             s.buf.n_bytes, &body, &why));
        assert_true(decode(s.type, body, &why));
        tv_buf_free(&s.buf);
    }
    struct sample s;
    struct rec_body body;
    struct rec_tensor t;
    const char *why = NULL;
    make_sample(4, &s);
    assert_true(rec_open(REC_TENSOR, s.key.b, s.key.n, s.buf.data,
                         s.buf.n_bytes, &body, &why));
    assert_true(rec_tensor_get(body, &t, &why));
    assert_int_equal(t.t.dtype, TV_BF16);
    assert_int_equal(t.t.shape[1], 5);
    assert_int_equal(t.t.source_id, 4);
    assert_int_equal(t.t.offset, 1000);
    assert_true(tv_hash_equal(t.t.checksum, (struct tv_hash){8, 9}));
    assert_int_equal(t.name.n, strlen("model.layers.0.w"));
    tv_buf_free(&s.buf);
    make_sample(2, &s);
    struct rec_object o;
    struct rec_file f;
    assert_true(rec_open(REC_OBJECT, s.key.b, s.key.n, s.buf.data,
                         s.buf.n_bytes, &body, &why));
    assert_true(rec_object_get(body, &o, &why));
    struct rec_body files = {.p = o.files, .n = o.files_bytes};
    assert_true(rec_file_next(&files, &f));
    assert_memory_equal(f.name.s, "config.json", f.name.n);
    assert_true(rec_file_next(&files, &f));
    assert_false(rec_file_next(&files, &f));
    tv_buf_free(&s.buf);
}

/* Any flipped bit of value or key, and any cut, is noticed. */
static void damage_is_noticed(void **state)
{
    (void)state;
    for (int i = 0; i < N_SAMPLES; i++) {
        struct sample s;
        struct rec_body body;
        const char *why = NULL;
        make_sample(i, &s);
        for (size_t bit = 0; bit < s.buf.n_bytes * 8; bit++) {
            s.buf.data[bit / 8] ^= (char)(1 << (bit % 8));
            assert_false(rec_open(s.type, s.key.b, s.key.n, s.buf.data,
                                  s.buf.n_bytes, &body, &why));
            assert_non_null(why);
            s.buf.data[bit / 8] ^= (char)(1 << (bit % 8));
        }
        for (size_t bit = 0; bit < s.key.n * 8; bit++) {
            s.key.b[bit / 8] ^= (unsigned char)(1 << (bit % 8));
            assert_false(rec_open(s.type, s.key.b, s.key.n, s.buf.data,
                                  s.buf.n_bytes, &body, &why));
            s.key.b[bit / 8] ^= (unsigned char)(1 << (bit % 8));
        }
        for (size_t n = 0; n < s.buf.n_bytes; n++) {
            /* In memory of exactly that size, so that ASan sees over-reads. */
            char *cut = (char *)test_malloc(n + (n == 0));
            memcpy(cut, s.buf.data, n);
            assert_false(
                rec_open(s.type, s.key.b, s.key.n, cut, n, &body, &why));
            test_free(cut);
        }
        tv_buf_free(&s.buf);
    }
}

/* A record whose hash is right but whose contents are not: decoders are the
 * second fence and must neither accept lengths that lie nor read past the end.
 */
static void decoders_stand_alone(void **state)
{
    (void)state;
    struct rng r;
    rng_open(&r, 3);
    unsigned refused = 0;
    for (int i = 0; i < N_SAMPLES; i++) {
        struct sample s;
        make_sample(i, &s);
        const size_t n = s.buf.n_bytes - TV_REC_HEAD;
        for (int round = 0; round < 2000; round++) {
            const size_t len =
                round % 3 == 0 ? (size_t)rng_below(&r, n + 1) : n;
            unsigned char *p = (unsigned char *)test_malloc(len + (len == 0));
            const char *why = NULL;
            memcpy(p, s.buf.data + TV_REC_HEAD, len);
            if (len > 0)
                for (int k = 0; k < 1 + round % 4; k++)
                    p[rng_below(&r, len)] = (unsigned char)rng_u32(&r);
            const struct rec_body body = {.p = p, .n = len};
            if (!decode(s.type, body, &why)) {
                assert_non_null(why);
                refused++;
            }
            test_free(p);
        }
        tv_buf_free(&s.buf);
    }
    assert_true(refused > 1000);
}

static void chunk_header(void **state)
{
    (void)state;
    unsigned char v[TV_CHUNK_HEADER + 32] = {0};
    struct rec_chunk c = {.dtype = TV_F16,
                          .number = 3,
                          .bytes = 32,
                          .n_elems = 16,
                          .payload_hash = 42};
    struct rec_chunk back;
    const char *why = NULL;
    rec_chunk_put(v, &c);
    assert_true(rec_chunk_get(v, sizeof v, &back, &why));
    assert_int_equal(back.number, 3);
    assert_int_equal(back.bytes, 32);
    assert_int_equal(back.n_elems, 16);
    assert_int_equal(back.payload_hash, 42);
    assert_int_equal(back.dtype, TV_F16);
    assert_memory_equal(v, "tVck", 4);
    assert_false(rec_chunk_get(v, sizeof v - 1, &back, &why));
    for (size_t bit = 0; bit < TV_CHUNK_HEADER * 8; bit++) {
        v[bit / 8] ^= (unsigned char)(1 << (bit % 8));
        assert_false(rec_chunk_get(v, sizeof v, &back, &why));
        v[bit / 8] ^= (unsigned char)(1 << (bit % 8));
    }
    assert_int_equal(rec_chunk_value_bytes(0, 4096), 2048);
    assert_int_equal(rec_chunk_value_bytes(2000, 4096), 2048);
    assert_int_equal(rec_chunk_value_bytes(2001, 4096), 2049);
    assert_int_equal(rec_chunk_value_bytes(1, 16384), 8192);
}

/* ---- geometry -------------------------------------------------------------
 */

static struct rec_payload geometry(enum tv_dtype dtype, unsigned rank,
                                   const uint64_t *shape, uint64_t max)
{
    struct tv_error err;
    struct rec_payload r;
    const struct tv_tensor_desc d = {
        .name = "t", .dtype = dtype, .rank = rank, .shape = shape};
    assert_ok(rec_geometry(&d, max, &r, &err), &err);
    assert_true(r.chunk_bytes > 0);
    assert_int_equal(r.n_chunks, (r.bytes + r.chunk_bytes - 1) / r.chunk_bytes);
    return r;
}

static void chunk_geometry(void **state)
{
    (void)state;
    struct rec_payload r;
    const uint64_t empty[2] = {0, 7};
    r = geometry(TV_F32, 2, empty, 0);
    assert_int_equal(r.bytes, 0);
    assert_int_equal(r.n_chunks, 0);

    r = geometry(TV_F32, 0, NULL, 0); /* a scalar */
    assert_int_equal(r.bytes, 4);
    assert_int_equal(r.n_chunks, 1);

    /* Whole rows: 3 rows of 300 bytes fit 1000. */
    const uint64_t rows[2] = {10, 75};
    r = geometry(TV_F32, 2, rows, 1000);
    assert_int_equal(r.chunk_bytes, 900);
    assert_int_equal(r.n_chunks, 4);

    /* A row exactly as long as a chunk, and one longer. */
    const uint64_t exact[2] = {5, 256};
    r = geometry(TV_F32, 2, exact, 1024);
    assert_int_equal(r.chunk_bytes, 1024);
    assert_int_equal(r.n_chunks, 5);
    const uint64_t huge[2] = {3, 1000};
    r = geometry(TV_F32, 2, huge, 1000);
    assert_int_equal(r.chunk_bytes, 960); /* a multiple of 64 below */
    assert_int_equal(r.n_chunks, 13);

    /* Exact multiples leave no empty chunk. */
    const uint64_t twice[1] = {512};
    r = geometry(TV_F32, 1, twice, 1024);
    assert_int_equal(r.n_chunks, 2);

    /* Nominal: 16 MiB. */
    const uint64_t big[2] = {4096, 4096};
    r = geometry(TV_BF16, 2, big, 0);
    assert_int_equal(r.chunk_bytes, TV_CHUNK_BYTES);
    assert_int_equal(r.n_chunks, 2);

    /* 4-bit rows that end inside a byte go in pairs; 6-bit by four. */
    const uint64_t f4[2] = {6, 3};
    r = geometry(TV_F4, 2, f4, 64);
    assert_int_equal(r.bytes, 9);
    assert_int_equal(r.chunk_bytes % 3, 0);
    const uint64_t f6[2] = {1000, 10};
    r = geometry(TV_F6_E2M3, 2, f6, 1000);
    assert_int_equal(r.bytes, 7500);
    assert_int_equal(r.chunk_bytes % 15, 0); /* two rows: 120 bits */
    const uint64_t f6flat[1] = {4000};
    r = geometry(TV_F6_E3M2, 1, f6flat, 1000);
    assert_int_equal(r.chunk_bytes % 192, 0);

    /* However small the limit, a chunk holds something. */
    r = geometry(TV_F32, 2, huge, 1);
    assert_int_equal(r.chunk_bytes, 64);

    struct tv_error err;
    const uint64_t over[2] = {UINT64_MAX, 2};
    const struct tv_tensor_desc d = {
        .name = "t", .dtype = TV_F32, .rank = 2, .shape = over};
    assert_code(rec_geometry(&d, 0, &r, &err), TV_E_CORRUPT, &err);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keys_in_layer_order),
        cmocka_unit_test(keys_of_one_object_stay_together),
        cmocka_unit_test(long_names_fit_a_key),
        cmocka_unit_test(round_trips),
        cmocka_unit_test(damage_is_noticed),
        cmocka_unit_test(decoders_stand_alone),
        cmocka_unit_test(chunk_header),
        cmocka_unit_test(chunk_geometry),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
