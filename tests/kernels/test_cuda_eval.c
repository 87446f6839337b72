/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_cuda_eval.c - steps of a forward pass on the device against plain fp64
 * loops: norms, activations, rows, rotation, attention in all its forms and
 * with more heads than fit at one time, losses over tiles.
 *
 * On the fake driver (tests/support), or on a GPU (tools/gpu-check).
 */
#include "test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_fixture.h"
#include "rng.h"
#include "tv/cuda_eval.h"

static tvk_cuda *device;
static tvk_cuda_math *math;
static struct tv_error err;

struct there { /* floats here and on the device */
    float *x;
    tvk_cuda_ptr at;
    size_t bytes;
};

static void send(struct there *t)
{
    tvk_cuda_stream *const s = tvk_cuda_math_stream(math);

    assert_ok(tvk_cuda_upload(s, t->at, t->x, t->bytes, &err), &err);
    assert_ok(tvk_cuda_sync(s, &err), &err);
}

static struct there normal(size_t n, uint64_t stream)
{
    struct there t = {.x = calloc(n, sizeof(float)), .bytes = n * 4};
    struct rng r;

    assert_non_null(t.x);
    rng_open(&r, stream);
    for (size_t i = 0; i < n; i++)
        t.x[i] = rng_normal(&r);
    assert_ok(tvk_cuda_alloc(device, t.bytes, "floats", &err, &t.at), &err);
    send(&t);
    return t;
}

/* What is there now; owned. */
static float *fetch(const struct there *t)
{
    tvk_cuda_stream *const s = tvk_cuda_math_stream(math);
    float *const x = calloc(1, t->bytes);

    assert_non_null(x);
    assert_ok(tvk_cuda_download(s, x, t->at, t->bytes, &err), &err);
    assert_ok(tvk_cuda_sync(s, &err), &err);
    return x;
}

static void drop(struct there *t)
{
    tvk_cuda_free(device, t->at, t->bytes);
    free(t->x);
}

static void near(double got, double want, double bound, size_t i)
{
    if (!(fabs(got - want) <= bound))
        fail_msg("%zu: %.9g, expected %.9g", i, got, want);
}

/* ---- rows ---------------------------------------------------------------- */

static void test_norms(void **state)
{
    enum { ROWS = 5, PARTS = 3, STEP = 90, N = 77, LD = 300 };
    struct there x = normal((size_t)ROWS * LD, 1);
    struct there w = normal(N, 2), b = normal(N, 3);

    (void)state;
    for (unsigned type = 0; type < 3; type++) {
        struct there dst = normal((size_t)ROWS * LD, 4);
        const struct tvk_cuda_norm n = {.type = (enum tvk_cuda_norm_type)type,
                                        .eps = 1e-5f,
                                        .x = x.at,
                                        .dst = dst.at,
                                        .ldx = LD,
                                        .ld = LD,
                                        .rows = ROWS,
                                        .parts = PARTS,
                                        .step = STEP,
                                        .n = N,
                                        .w = w.at,
                                        .b = type == 2 ? b.at : 0};

        assert_ok(tvk_cuda_norm_rows(math, &n, &err), &err);
        float *const got = fetch(&dst);
        for (size_t i = 0; i < (size_t)ROWS * LD; i++) {
            const size_t part = i % LD / STEP, k = i % LD % STEP;
            const float *const from = x.x + i / LD * LD + part * STEP;
            double mean = 0, var = 0;

            if (part >= PARTS || k >= N) { /* untouched */
                assert_true(got[i] == dst.x[i]);
                continue;
            }
            for (size_t j = 0; type == 2 && j < N; j++)
                mean += (double)from[j] / N;
            for (size_t j = 0; j < N; j++)
                var += ((double)from[j] - mean) * ((double)from[j] - mean) / N;
            double want = ((double)from[k] - mean) / sqrt(var + 1e-5);
            want *= (double)w.x[k] + (type == 1);
            near(got[i], want + (type == 2 ? (double)b.x[k] : 0), 2e-6, i);
        }
        free(got);
        drop(&dst);
    }
    drop(&x);
    drop(&w);
    drop(&b);
}

static void test_activations(void **state)
{
    enum { ROWS = 3, N = 200, LD = 450 };

    (void)state;
    for (unsigned act = 0; act < 5; act++)
        for (int gated = 0; gated < 2; gated++) {
            struct there x = normal((size_t)ROWS * LD, 5);

            x.x[0] = 100;
            x.x[1] = -100;
            send(&x);
            assert_ok(tvk_cuda_act_rows(math, (enum tvk_cuda_act_type)act, x.at,
                                        gated ? x.at + N * sizeof(float) : 0,
                                        ROWS, N, LD, &err),
                      &err);
            float *const got = fetch(&x);
            for (size_t r = 0; r < ROWS; r++)
                for (size_t i = 0; i < N; i++) {
                    const double v = (double)x.x[r * LD + i];
                    const double u =
                        0.7978845608028654 * (v + 0.044715 * v * v * v);
                    const double all[] = {
                        v / (1 + exp(-v)),
                        0.5 * v * (1 + erf(v * 0.70710678118654752)),
                        0.5 * v * (1 + tanh(u)), v > 0 ? v : 0,
                        v / (1 + exp(-1.702 * v))};
                    const double gate = gated ? (double)x.x[r * LD + N + i] : 1;
                    near(got[r * LD + i], all[act] * gate,
                         1e-6 * (1 + fabs(all[act] * gate)), r * LD + i);
                }
            assert_memory_equal(got + N, x.x + N, (LD - N) * sizeof(*got));
            free(got);
            drop(&x);
        }
}

static void test_rows(void **state)
{
    enum { ROWS = 6, N = 150, LD = 160 };
    struct there a = normal((size_t)ROWS * LD, 6);
    struct there b = normal((size_t)ROWS * N, 7);
    struct there index = normal(ROWS, 8);
    const uint32_t take[ROWS] = {5, 0, 2, 2, 1, 5};
    const struct tvk_cuda_rows both = {a.at, b.at, ROWS, N, LD, N};
    const struct tvk_cuda_rows one = {a.at, b.at, ROWS, N, LD, 0};

    (void)state;
    memcpy(index.x, take, sizeof take);
    send(&index);
    for (int what = 0; what < 5; what++) {
        send(&a);
        assert_ok(what == 0   ? tvk_cuda_add_rows(math, &both, &err)
                  : what == 1 ? tvk_cuda_add_rows(math, &one, &err)
                  : what == 2 ? tvk_cuda_copy_rows(math, &both, &err)
                              : tvk_cuda_take_rows(math, &both, index.at,
                                                   what == 4, &err),
                  &err);
        float *const got = fetch(&a);
        for (size_t i = 0; i < (size_t)ROWS * LD; i++) {
            const size_t r = what == 1 ? 0 : what < 3 ? i / LD : take[i / LD];
            const float from = i % LD < N ? b.x[r * N + i % LD] : 0;
            const bool adds = what < 2 || what == 4;

            assert_true(got[i] == (i % LD >= N ? a.x[i]
                                   : adds      ? a.x[i] + from
                                               : from));
        }
        free(got);
    }
    drop(&a);
    drop(&b);
    drop(&index);
}

static void test_lookup(void **state)
{
    enum { ROWS = 5, TABLE = 7, N = 140 };
    struct there dst = normal((size_t)ROWS * N, 23);
    struct there table = normal((size_t)TABLE * N, 24);
    struct there index = normal(ROWS, 25);
    const uint32_t take[ROWS] = {6, 0, 3, 3, 1};

    (void)state;
    memcpy(index.x, take, sizeof take);
    send(&index);
    for (unsigned type = 0; type < 3; type++) {
        const struct tvk_cuda_lookup l = {
            dst.at, table.at, index.at, (enum tvk_cuda_lookup_type)type,
            ROWS,   N,        2.5f};

        assert_ok(tvk_cuda_look_up(math, &l, &err), &err);
        float *const got = fetch(&dst);
        for (size_t i = 0; i < (size_t)ROWS * N; i++) {
            const size_t from = take[i / N] * (size_t)N + i % N;
            float want = table.x[from];
            uint64_t n_bad = 0;

            if (type > 0) {
                const uint16_t *const half =
                    (const uint16_t *)(const void *)table.x + from;
                const struct tvk_table *const k = tvk_table_for(TVK_REF);
                n_bad = type == 1 ? k->bf16_to_f32(&want, half, 1)
                                  : k->f16_to_f32(&want, half, 1);
            }
            if (n_bad == 0)
                assert_true(got[i] == want * 2.5f);
        }
        free(got);
    }
    drop(&dst);
    drop(&table);
    drop(&index);
}

static void test_rotation(void **state)
{
    enum { ROWS = 4, HEADS = 3, STEP = 20, HALF = 7, LD = 64, POSITIONS = 9 };
    struct there x = normal((size_t)ROWS * LD, 9);
    struct there c = normal((size_t)POSITIONS * HALF, 10);
    struct there s = normal((size_t)POSITIONS * HALF, 11);
    struct there position = normal(ROWS, 12);
    const uint32_t at[ROWS] = {8, 0, 3, 3};

    (void)state;
    memcpy(position.x, at, sizeof at);
    send(&position);
    const struct tvk_cuda_rotate r = {x.at, ROWS,        LD,   HEADS, STEP,
                                      HALF, position.at, c.at, s.at};
    assert_ok(tvk_cuda_rotate_rows(math, &r, &err), &err);
    float *const got = fetch(&x);
    for (size_t i = 0; i < (size_t)ROWS * LD; i++) {
        const size_t row = i / LD, head = i % LD / STEP, k = i % LD % STEP;
        if (head >= HEADS || k >= 2 * HALF) {
            assert_true(got[i] == x.x[i]);
            continue;
        }
        const double cs = (double)c.x[at[row] * HALF + k % HALF];
        const double sn = (double)s.x[at[row] * HALF + k % HALF];
        const double other =
            (double)x.x[k < HALF ? i + HALF : i - HALF] * (k < HALF ? -1 : 1);
        near(got[i], (double)x.x[i] * cs + other * sn, 1e-6, i);
    }
    free(got);
    drop(&x);
    drop(&c);
    drop(&s);
    drop(&position);
}

static void test_squares(void **state)
{
    enum { ROWS = 70, N = 130, LD = 140 };
    struct there x = normal((size_t)ROWS * LD, 21);
    struct there sums = normal(2 * (size_t)N, 22);
    double want[N];

    (void)state;
    for (size_t i = 0; i < N; i++)
        want[i] = (double)i;
    memcpy(sums.x, want, sizeof want);
    send(&sums);
    assert_ok(tvk_cuda_add_squares(math, sums.at, x.at, LD, ROWS, N, &err),
              &err);
    for (size_t r = 0; r < ROWS; r++)
        for (size_t i = 0; i < N; i++)
            want[i] += (double)x.x[r * LD + i] * (double)x.x[r * LD + i];
    float *const got = fetch(&sums);
    assert_memory_equal(got, want, sizeof want);
    free(got);
    drop(&x);
    drop(&sums);
}

/* ---- attention ----------------------------------------------------------- */

struct shape {
    size_t n_windows, length, n_heads, n_kv, head_dim, window;
    float cap;
    bool alibi, per_head;
};

static void attention(const struct shape *p)
{
    const size_t hd = p->head_dim, rows = p->n_windows * p->length;
    const size_t q_width = p->n_heads * hd, kv_width = p->n_kv * hd;
    const size_t ld = q_width + 2 * kv_width, step = p->per_head ? 3 * hd : hd;
    const size_t k0 = p->per_head ? hd : q_width;
    const size_t v0 = p->per_head ? 2 * hd : q_width + kv_width;
    struct there qkv = normal(rows * ld, 13), out = normal(rows * q_width, 14);
    struct there slopes = normal(p->n_heads, 15);
    struct there work = normal(
        tvk_cuda_attention_bytes(p->length, rows, p->n_heads) / sizeof(float),
        16);
    const struct tvk_cuda_attention a = {
        .qkv = qkv.at,
        .out = out.at,
        .ld = ld,
        .ld_out = q_width,
        .n_windows = p->n_windows,
        .length = p->length,
        .n_heads = p->n_heads,
        .n_kv = p->n_kv,
        .head_dim = hd,
        .window = p->window,
        .q_step = step,
        .k0 = k0,
        .k_step = step,
        .v0 = v0,
        .v_step = step,
        .scale = 0.6f,
        .cap = p->cap,
        .slopes = p->alibi ? slopes.at : 0,
        .work = work.at,
    };
    double *const score = calloc(p->length, sizeof(*score));

    assert_non_null(score);
    assert_ok(tvk_cuda_attend(math, &a, &err), &err);
    float *const got = fetch(&out);
    for (size_t i = 0; i < rows * p->n_heads; i++) {
        const size_t row = i / p->n_heads, head = i % p->n_heads;
        const size_t pos = row % p->length;
        const size_t kv = head / (p->n_heads / p->n_kv);
        const size_t first =
            p->window > 0 && pos + 1 > p->window ? pos + 1 - p->window : 0;
        const float *const q = qkv.x + row * ld + head * step;
        const float *const from = qkv.x + (row - pos) * ld + kv * step;
        double max = -INFINITY, sum = 0;

        if (row % 5 != 0 && pos + 1 != p->length) /* a sample */
            continue;
        for (size_t j = first; j <= pos; j++) {
            double s = 0;
            for (size_t e = 0; e < hd; e++)
                s += (double)q[e] * (double)from[j * ld + k0 + e];
            s *= 0.6;
            if (p->cap > 0)
                s = (double)p->cap * tanh(s / (double)p->cap);
            if (p->alibi)
                s += (double)slopes.x[head] * (double)j;
            score[j] = s;
            max = s > max ? s : max;
        }
        for (size_t j = first; j <= pos; j++)
            sum += exp(score[j] - max);
        for (size_t e = 0; e < hd; e++) {
            double want = 0;
            for (size_t j = first; j <= pos; j++)
                want +=
                    exp(score[j] - max) / sum * (double)from[j * ld + v0 + e];
            near(got[row * q_width + head * hd + e], want,
                 p->alibi ? 2e-4 : 1e-5, row);
        }
    }
    free(got);
    free(score);
    drop(&qkv);
    drop(&out);
    drop(&slopes);
    drop(&work);
}

static void test_attention(void **state)
{
    static const struct shape shapes[] = {
        {2, 5, 3, 3, 4, 0, 0, false, false},
        {1, 128, 2, 1, 5, 0, 0, false, false},
        {2, 301, 4, 2, 6, 0, 0, false, false},
        {1, 301, 2, 2, 6, 70, 0, false, false}, /* blocks of queries: 3 */
        {1, 260, 2, 1, 6, 129, 3, false, false},
        {2, 130, 3, 3, 8, 0, 0, true, true},
        /* more problems than scores have room for */
        {14, 300, 8, 2, 2, 0, 0, false, false},
        {1, 1, 1, 1, 1, 1, 0, false, false},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        attention(&shapes[i]);
}

/* ---- losses -------------------------------------------------------------- */

static void test_losses(void **state)
{
    enum { ROWS = 7, VOCAB = 250, TILE = 100, SPARE = 8 };
    const size_t width = VOCAB + SPARE;
    struct there all = normal(ROWS * width, 17);
    struct there tile = normal((size_t)ROWS * TILE, 18);
    struct there targets = normal(ROWS, 19);
    struct there losses =
        normal(ROWS * sizeof(struct tvk_cuda_loss) / sizeof(float), 20);
    const uint32_t ids[ROWS] = {0, 99, 100, 249, 13, 200, 199};

    (void)state;
    memcpy(targets.x, ids, sizeof ids);
    send(&targets);
    for (size_t i = 0; i < width; i++) {
        all.x[i] *= 60; /* far apart */
        all.x[width + i] = i == 240 ? 5 : -1e4f;
    }
    all.x[width + 99] = 1;
    for (int capped = 0; capped < 2; capped++) {
        for (size_t from = 0; from < VOCAB; from += TILE) {
            const size_t left = width - from, n = left < TILE ? left : TILE;
            const struct tvk_cuda_losses l = {
                .logits = tile.at,
                .losses = losses.at,
                .targets = targets.at,
                .rows = ROWS,
                .n = VOCAB - from < n ? VOCAB - from : n,
                .ld = n,
                .from = from,
                .cap = capped ? 30.0f : 0.0f};

            for (size_t r = 0; r < ROWS; r++)
                memcpy(tile.x + r * n, all.x + r * width + from,
                       n * sizeof(float));
            send(&tile);
            assert_ok(tvk_cuda_add_losses(math, &l, &err), &err);
        }
        float *const raw = fetch(&losses);
        for (size_t r = 0; r < ROWS; r++) {
            struct tvk_cuda_loss got;
            double sum = 0, target = 0, max = -INFINITY;

            memcpy(&got, (const char *)raw + r * sizeof got, sizeof got);
            for (int pass = 0; pass < 2; pass++)
                for (size_t i = 0; i < VOCAB; i++) {
                    double x = (double)all.x[r * width + i];
                    if (capped)
                        x = 30 * tanh(x / 30);
                    if (i == ids[r])
                        target = x;
                    if (pass == 0)
                        max = x > max ? x : max;
                    else
                        sum += exp(x - max);
                }
            near((double)got.max + log(got.sum) - (double)got.target,
                 max + log(sum) - target, 2e-5, r);
        }
        free(raw);
    }
    drop(&all);
    drop(&tile);
    drop(&targets);
    drop(&losses);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norms),     cmocka_unit_test(test_activations),
        cmocka_unit_test(test_rows),      cmocka_unit_test(test_rotation),
        cmocka_unit_test(test_lookup),    cmocka_unit_test(test_squares),
        cmocka_unit_test(test_attention), cmocka_unit_test(test_losses),
    };

    device = cuda_device_open();
    assert_ok(tvk_cuda_math_of(device, &err, &math), &err);
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tvk_cuda_close(device);
    return failed;
}
