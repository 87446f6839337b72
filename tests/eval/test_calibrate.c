/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_calibrate.c - windows of calibration text, and statistics that are the
 * same whether a store had them, had some of them, or had to forget them.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/derived.h"
#include "tv/sys.h"

#define MODEL    "quickstart/base"
#define N_INPUTS 17u /* counts, and 4 of each of 4 layers */

/* ---- windows ------------------------------------------------------------- */

static int32_t numbers[1000];

static struct tve_ids text(size_t from, size_t n)
{
    return (struct tve_ids){.ids = numbers + from, .n = n, .cap = n};
}

static void test_cut(void **state)
{
    (void)state;
    struct tv_error err = {0};
    struct tve_samples s;
    struct tve_ids texts[3] = {text(0, 29), text(100, 5), text(200, 61)};
    struct tve_sampling how = {.samples = 100, .context = 11, .bos = 999};

    for (size_t i = 0; i < 1000; i++)
        numbers[i] = (int32_t)i;
    /* 2 + 0 + 6 windows of 10 ids behind BOS */
    assert_ok(tve_samples_text(texts, 3, &how, &err, &s), &err);
    assert_int_equal(s.n, 8);
    assert_int_equal(s.n_available, 8);
    assert_int_equal(s.n_tokens, 88);
    assert_int_equal(s.context, 11);
    assert_false(s.random);
    for (size_t i = 0; i < 8; i++) {
        const int32_t first = i < 2 ? 10 * (int32_t)i : 180 + 10 * (int32_t)i;
        assert_int_equal(s.windows[i].n, 11);
        assert_int_equal(s.windows[i].ids[0], 999);
        for (int32_t k = 0; k < 10; k++)
            assert_int_equal(s.windows[i].ids[k + 1], first + k);
    }
    const struct tv_hash all = s.digest;
    tve_samples_free(&s);
    /* thinned evenly: windows 0, 2, 5 of 8 */
    how.samples = 3;
    assert_ok(tve_samples_text(texts, 3, &how, &err, &s), &err);
    assert_int_equal(s.n, 3);
    assert_int_equal(s.n_available, 8);
    assert_int_equal(s.windows[0].ids[1], 0);
    assert_int_equal(s.windows[1].ids[1], 200);
    assert_int_equal(s.windows[2].ids[1], 230);
    assert_false(tv_hash_equal(s.digest, all));
    tve_samples_free(&s);
    how.bos = -1;
    assert_ok(tve_samples_text(texts, 3, &how, &err, &s), &err);
    assert_int_equal(s.n_available, 7); /* windows of 11 ids */
    assert_int_equal(s.windows[0].ids[0], 0);
    tve_samples_free(&s);
    /* the default context is cut to the model's positions */
    how = (struct tve_sampling){.positions = 20, .bos = -1};
    assert_ok(tve_samples_text(texts, 3, &how, &err, &s), &err);
    assert_int_equal(s.context, 20);
    assert_int_equal(s.n, 4);
    tve_samples_free(&s);
    how.positions = 0;
    assert_code(tve_samples_text(texts, 3, &how, &err, &s), TV_E_INPUT, &err);
    assert_message(&err, "95 tokens");
    how.context = 1;
    assert_code(tve_samples_text(texts, 3, &how, &err, &s), TV_E_USAGE, &err);
    assert_code(tve_samples_ids(numbers, 0, 5, &err, &s), TV_E_INPUT, &err);
    assert_ok(tve_samples_ids(numbers, 3, 5, &err, &s), &err);
    assert_int_equal(s.n, 3);
    assert_int_equal(s.windows[2].ids[0], 10);
    tve_samples_free(&s);
}

static void test_random(void **state)
{
    (void)state;
    struct tv_error err = {0};
    struct tve_samples a, b;
    const struct tve_sampling how = {.samples = 40, .context = 100, .bos = 7};
    size_t seen[10] = {0};

    assert_ok(tve_samples_random(10, 3, &how, &err, &a), &err);
    assert_ok(tve_samples_random(10, 3, &how, &err, &b), &err);
    assert_true(a.random);
    assert_int_equal(a.n, 40);
    assert_true(tv_hash_equal(a.digest, b.digest));
    tve_samples_free(&b);
    assert_ok(tve_samples_random(10, 4, &how, &err, &b), &err);
    assert_false(tv_hash_equal(a.digest, b.digest));
    for (size_t i = 0; i < a.n_tokens; i++) {
        assert_in_range(a.ids[i], 0, 9);
        seen[a.ids[i]]++;
        if (i % 100 == 0)
            assert_int_equal(a.ids[i], 7);
    }
    for (size_t i = 0; i < 10; i++)
        assert_in_range(seen[i], 310, 530); /* 396, and 40 of BOS */
    tve_samples_free(&a);
    tve_samples_free(&b);
}

/* ---- get or compute ------------------------------------------------------ */

struct fx {
    char *dir, *path;
    tv_store *s;
    tv_input *in;
    tve_model *m;
    struct tve_samples samples;
    struct tv_error err;
};

static void fx_open_with(struct fx *f, const char *name, uint64_t quota,
                         unsigned n_threads, const struct tvk_table *k)
{
    const struct tve_model_options opt = {.n_threads = n_threads, .kernels = k};
    char *const dir = test_data(name);
    int32_t ids[5 * 64];

    memset(f, 0, sizeof(*f));
    f->dir = tmpdir_make();
    f->path = tv_path_join(f->dir, "store");
    assert_ok(tv_store_create(f->path, quota, &f->err), &f->err);
    assert_ok(tv_store_open(f->path, NULL, &f->err, &f->s), &f->err);
    assert_ok(tv_input_open_path(dir, &f->err, &f->in), &f->err);
    assert_ok(tve_model_open(f->in, NULL, 0, &opt, &f->err, &f->m), &f->err);
    for (size_t i = 0; i < 5 * 64; i++)
        ids[i] = (int32_t)((i * 37 + 11) % tve_model_vocab(f->m));
    const size_t most = tve_model_positions(f->m);
    assert_ok(tve_samples_ids(ids, 5, most > 0 && most < 64 ? most : 64,
                              &f->err, &f->samples),
              &f->err);
    tv_free(dir);
}

static void fx_open(struct fx *f, const char *name, uint64_t quota,
                    unsigned n_threads)
{
    fx_open_with(f, name, quota, n_threads, NULL);
}

static void fx_close(struct fx *f)
{
    tve_samples_free(&f->samples);
    tve_model_close(f->m);
    tv_input_close(f->in);
    tv_store_close(f->s);
    tv_free(f->path);
    tmpdir_remove(f->dir);
}

struct got { /* what a run handed out */
    struct tv_hash hash;
    tv_hasher *h;
    size_t n;
    char order[64][96];
    size_t kill_at; /* inputs; 0: never */
};

static enum tv_err take(void *arg, const struct tve_stat_input *in,
                        struct tv_error *err)
{
    struct got *const g = arg;
    const size_t n = tve_stat_size(in->kind, in->n);

    (void)err;
    assert_true(g->n < 64);
    assert_int_equal(in->n_rows, 5 * 64);
    (void)snprintf(g->order[g->n++], sizeof(g->order[0]), "%s", in->tensors[0]);
    if (in->kind == TVE_STAT_GRAM)
        tv_hasher_add(g->h, in->gram, n * sizeof(*in->gram));
    else
        tv_hasher_add(g->h, in->sums, n * sizeof(*in->sums));
    if (g->n == g->kill_at)
        (void)raise(SIGKILL);
    return TV_OK;
}

static enum tv_err run(struct fx *f, enum tve_stat kind, enum tve_keep keep,
                       const bool *want, struct got *g,
                       struct tve_calibration_use *use)
{
    enum tv_err rc = TV_OK;
    tve_calibration *c = NULL;
    const struct tve_calibration_options opt = {
        .kind = kind, .store = f->s, .keep = keep, .about = "{\"t\":1}"};

    TV_TRY(tv_hasher_open(&f->err, &g->h));
    TV_TRY(tve_calibration_open(f->m, &f->samples, &opt, &f->err, &c));
    rc = tve_calibration_run(c, want, NULL, take, g, use, &f->err);
    g->hash = tv_hasher_value(g->h);
out:
    tv_hasher_close(g->h);
    g->h = NULL;
    tve_calibration_close(c);
    return rc;
}

static void test_same_whatever_the_store_has(void **state)
{
    (void)state;
    for (int k = 0; k < 2; k++) {
        const enum tve_stat kind = k ? TVE_STAT_GRAM : TVE_STAT_DIAG;
        struct tve_calibration_use use;
        struct tv_store_stat st;
        struct fx f;
        struct got fresh = {.n = 0}, g;
        bool some[N_INPUTS] = {[2] = true, [7] = true, [8] = true};
        uint64_t n = 0;

        fx_open(&f, MODEL, 0, 2);
        assert_ok(run(&f, kind, TVE_KEEP_NOT, NULL, &fresh, &use), &f.err);
        assert_int_equal(fresh.n, N_INPUTS);
        assert_int_equal(use.n_computed, N_INPUTS);
        assert_int_equal(use.n_found + use.n_kept + use.n_left_out, 0);
        assert_string_equal(fresh.order[0], "model.embed_tokens.weight");
        assert_string_equal(fresh.order[4],
                            "model.layers.0.mlp.down_proj.weight");
        /* some, then all: the rest is computed */
        g = (struct got){.n = 0};
        assert_ok(run(&f, kind, TVE_KEEP_ALL, some, &g, &use), &f.err);
        assert_int_equal(g.n, 3);
        assert_int_equal(use.n_kept, 3);
        assert_string_equal(g.order[0], fresh.order[2]);
        g = (struct got){.n = 0};
        assert_ok(run(&f, kind, TVE_KEEP_ALL, NULL, &g, &use), &f.err);
        assert_int_equal(use.n_found, 3);
        assert_int_equal(use.n_computed, N_INPUTS - 3);
        assert_true(tv_hash_equal(g.hash, fresh.hash));
        assert_memory_equal(g.order, fresh.order, sizeof(g.order));
        /* all there */
        g = (struct got){.n = 0};
        assert_ok(run(&f, kind, TVE_KEEP_NOT, NULL, &g, &use), &f.err);
        assert_int_equal(use.n_found, N_INPUTS);
        assert_int_equal(use.n_computed, 0);
        assert_true(tv_hash_equal(g.hash, fresh.hash));
        assert_ok(tv_store_stat(f.s, &st, &f.err), &f.err);
        assert_int_equal(st.n_statistics, N_INPUTS);
        /* what was found is pinned until it is released */
        assert_ok(tv_derived_evict_all(f.s, &n, &f.err), &f.err);
        assert_int_equal(n, N_INPUTS - 3);
        assert_ok(tv_derived_release(f.s, NULL, 0, &f.err), &f.err);
        assert_ok(tv_derived_evict_all(f.s, &n, &f.err), &f.err);
        assert_int_equal(n, 3);
        g = (struct got){.n = 0};
        assert_ok(run(&f, kind, TVE_KEEP_NOT, NULL, &g, &use), &f.err);
        assert_int_equal(use.n_computed, N_INPUTS);
        assert_true(tv_hash_equal(g.hash, fresh.hash));
        assert_ok(tv_store_verify(f.s, 0, NULL, NULL, NULL, &f.err), &f.err);
        fx_close(&f);
    }
}

static struct tv_hash key_of(struct fx *f, enum tve_stat kind)
{
    tve_calibration *c = NULL;
    const struct tve_calibration_options opt = {.kind = kind};

    assert_ok(tve_calibration_open(f->m, &f->samples, &opt, &f->err, &c),
              &f->err);
    const struct tv_hash key = tve_calibration_key(c);
    tve_calibration_close(c);
    return key;
}

static void test_keys(void **state)
{
    (void)state;
    struct fx f, other;
    struct tve_calibration_options opt = {.kind = TVE_STAT_DIAG};
    tve_calibration *c = NULL;

    fx_open(&f, MODEL, 0, 1);
    const struct tv_hash key = key_of(&f, TVE_STAT_DIAG);
    assert_true(tv_hash_equal(key, key_of(&f, TVE_STAT_DIAG)));
    assert_false(tv_hash_equal(key, key_of(&f, TVE_STAT_GRAM)));
    f.samples.digest.lo ^= 1;
    assert_false(tv_hash_equal(key, key_of(&f, TVE_STAT_DIAG)));
    f.samples.digest.lo ^= 1;
    fx_open(&other, "quickstart/ft-code", 0, 2);
    assert_false(tv_hash_equal(key, key_of(&other, TVE_STAT_DIAG)));
    fx_close(&other);
    assert_ok(tve_calibration_open(f.m, &f.samples, &opt, &f.err, &c), &f.err);
    assert_int_equal(tve_calibration_count(c), N_INPUTS);
    assert_int_equal(
        tve_calibration_find(c, "model.layers.3.self_attn.v_proj.weight"), 13);
    assert_int_equal(tve_calibration_find(c, "model.embed_tokens.weight"), 0);
    assert_int_equal(tve_calibration_find(c, "model.norm.weight"), N_INPUTS);
    assert_int_equal(tve_calibration_input(c, 13)->n_tensors, 3);
    assert_int_equal(tve_calibration_input(c, 0)->kind, TVE_STAT_COUNTS);
    tve_calibration_close(c);
    fx_close(&f);
}

static enum tv_err counts(void *arg, const struct tve_stat_input *in,
                          struct tv_error *err)
{
    const struct fx *const f = arg;

    (void)err;
    for (size_t id = 0; id < in->n; id++) {
        double want = 0;
        for (size_t i = 0; i < f->samples.n_tokens; i++)
            want += f->samples.ids[i] == (int32_t)id;
        assert_true(in->sums[id] == want);
    }
    return TV_OK;
}

static void test_counts(void **state)
{
    (void)state;
    const struct tve_calibration_options opt = {.kind = TVE_STAT_GRAM};
    const bool want[N_INPUTS] = {true};
    tve_calibration *c = NULL;
    struct fx f;

    fx_open(&f, MODEL, 0, 1);
    assert_ok(tve_calibration_open(f.m, &f.samples, &opt, &f.err, &c), &f.err);
    assert_ok(tve_calibration_run(c, want, NULL, counts, &f, NULL, &f.err),
              &f.err);
    tve_calibration_close(c);
    fx_close(&f);
}

static void test_quota(void **state)
{
    (void)state;
    const uint64_t quota = 1u << 20;
    struct tve_calibration_use use;
    struct got g = {.n = 0}, fresh = {.n = 0};
    struct fx f;
    uint64_t used = 0;

    fx_open(&f, MODEL, quota, 1);
    assert_code(run(&f, TVE_STAT_GRAM, TVE_KEEP_ALL, NULL, &g, &use),
                TV_E_NOSPACE, &f.err);
    assert_int_equal(g.n, 0); /* before the work */
    assert_ok(run(&f, TVE_STAT_GRAM, TVE_KEEP_NOT, NULL, &fresh, &use), &f.err);
    g = (struct got){.n = 0};
    assert_ok(run(&f, TVE_STAT_GRAM, TVE_KEEP_IF_ROOM, NULL, &g, &use), &f.err);
    assert_true(use.n_kept > 0 && use.n_left_out > 0);
    assert_int_equal(use.n_kept + use.n_left_out, N_INPUTS);
    assert_true(tv_hash_equal(g.hash, fresh.hash));
    assert_ok(tv_disk_used(f.path, &used, &f.err), &f.err);
    assert_true(used <= quota);
    fx_close(&f);
}

/* Killed behind any input: the next run finds what was handed out, and gives
 * the same. */
static void test_killed(void **state)
{
    (void)state;
    struct tve_calibration_use use;
    struct fx f;
    struct got fresh = {.n = 0}, g;
    size_t done = 0;

    fx_open(&f, MODEL, 0, 1); /* one thread: none is lost in the fork */
    assert_ok(run(&f, TVE_STAT_GRAM, TVE_KEEP_NOT, NULL, &fresh, &use), &f.err);
    for (size_t kill_at = 3; kill_at < N_INPUTS; kill_at += 5) {
        tv_store_close(f.s);
        f.s = NULL;
        const pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            g = (struct got){.kill_at = kill_at};
            if (tv_store_open(f.path, NULL, &f.err, &f.s) == TV_OK)
                (void)run(&f, TVE_STAT_GRAM, TVE_KEEP_ALL, NULL, &g, &use);
            _exit(1);
        }
        int status = 0;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        assert_ok(tv_store_open(f.path, NULL, &f.err, &f.s), &f.err);
        g = (struct got){.n = 0};
        assert_ok(run(&f, TVE_STAT_GRAM, TVE_KEEP_NOT, NULL, &g, &use), &f.err);
        assert_true(use.n_found >= kill_at && use.n_found < N_INPUTS);
        assert_true(use.n_found > done);
        done = use.n_found;
        assert_true(tv_hash_equal(g.hash, fresh.hash));
        assert_ok(tv_store_verify(f.s, 0, NULL, NULL, NULL, &f.err), &f.err);
    }
    fx_close(&f);
}

/* ---- block by block ------------------------------------------------------ */

static enum tv_err add_hash(void *arg, const struct tve_stat_input *in,
                            struct tv_error *err)
{
    (void)err;
    tv_hasher_add(arg, in->sums, in->n * sizeof(*in->sums));
    return TV_OK;
}

/* Hash of all blocks' sums; `from` < 4: from this block on its and its
 * successors' weights are `scale` times their own. */
static struct tv_hash in_sequence(struct fx *f, size_t from, float scale,
                                  size_t looks)
{
    static const char *const names[2] = {"self_attn.o_proj", "mlp.down_proj"};
    tve_sequence *s = NULL;
    tv_hasher *h = NULL;
    float *owned[8] = {NULL};
    size_t n_owned = 0;

    assert_ok(tv_hasher_open(&f->err, &h), &f->err);
    const struct tve_sequence_options opt = {.kind = TVE_STAT_DIAG,
                                             .stream_bytes = UINT64_MAX};
    assert_ok(tve_sequence_open(f->m, &f->samples, &opt, &f->err, &s), &f->err);
    for (size_t l = 0; l < 4; l++) {
        assert_int_equal(tve_sequence_layer(s), l);
        for (size_t k = 0; k < looks; k++) {
            if (k + 1 < looks)
                tv_hasher_reset(h); /* looked at twice: the last counts */
            assert_ok(tve_sequence_look(s, add_hash, h, &f->err), &f->err);
        }
        for (size_t i = 0; l >= from && i < 2; i++) {
            char name[96];
            struct tv_view view;

            (void)snprintf(name, sizeof(name), "model.layers.%zu.%s.weight", l,
                           names[i]);
            const struct tv_input_tensor *const t = tv_input_find(f->in, name);
            assert_non_null(t);
            assert_ok(tv_input_view(f->in, t, &f->err, &view), &f->err);
            float *const w = tv_alloc((size_t)t->n_elems * sizeof(*w));
            assert_non_null(w);
            tvk_to_f32(tvk_table_for(TVK_REF), t->dtype, w, view.chunks[0],
                       (size_t)t->n_elems);
            for (uint64_t k = 0; k < t->n_elems; k++)
                w[k] *= scale;
            tv_input_release(f->in, &view);
            owned[n_owned++] = w;
            assert_ok(tve_model_replace(f->m, name, TV_F32, w, &f->err),
                      &f->err);
        }
        assert_ok(tve_sequence_advance(s, &f->err), &f->err);
    }
    const struct tv_hash hash = tv_hasher_value(h);
    tv_hasher_close(h);
    tve_sequence_close(s);
    for (size_t i = 0; i < tv_input_count(f->in); i++)
        assert_ok(tve_model_replace(f->m, tv_input_tensor(f->in, i)->name,
                                    TV_F32, NULL, &f->err),
                  &f->err);
    for (size_t i = 0; i < n_owned; i++)
        tv_free(owned[i]);
    return hash;
}

static void test_sequence(void **state)
{
    (void)state;
    struct fx f;
    tv_hasher *h = NULL;

    /* without AMX, which bf16 weights alone are for */
    fx_open_with(&f, MODEL, 0, 2, tvk_table_for(TVK_AVX512));
    assert_ok(tv_hasher_open(&f.err, &h), &f.err);
    assert_ok(tve_statistics(f.m, f.samples.windows, f.samples.n, TVE_STAT_DIAG,
                             NULL, add_hash, h, &f.err),
              &f.err);
    const struct tv_hash all = tv_hasher_value(h);
    tv_hasher_close(h);
    assert_true(tv_hash_equal(all, in_sequence(&f, 4, 1, 1)));
    /* the model's own weights as fp32, and looking without advancing */
    assert_true(tv_hash_equal(all, in_sequence(&f, 0, 1, 1)));
    const struct tv_hash last = in_sequence(&f, 4, 1, 2);
    assert_true(tv_hash_equal(last, in_sequence(&f, 0, 1, 2)));
    /* new weights of the last block come too late for any input ... */
    assert_true(tv_hash_equal(all, in_sequence(&f, 3, 0.5f, 1)));
    /* ... those of the block before do not */
    assert_false(tv_hash_equal(all, in_sequence(&f, 2, 0.5f, 1)));
    assert_code(tve_model_replace(f.m, "nothing", TV_F32, &f, &f.err),
                TV_E_INPUT, &f.err);
    assert_code(tve_model_replace(f.m, "model.norm.weight", TV_I64, &f, &f.err),
                TV_E_UNSUPPORTED, &f.err);
    fx_close(&f);
}

static enum tv_err nothing(void *arg, const struct tve_stat_input *in,
                           struct tv_error *err)
{
    (void)err;
    *(size_t *)arg += in->n_tensors;
    return TV_OK;
}

/* Every allocation fails once. */
static void test_allocations(void **state)
{
    (void)state;
    const bool want[13] = {true, false, true, true}; /* of the first block */
    struct fx f;

    fx_open(&f, "families/gpt2", 0, 1);
    for (uint64_t k = 1;; k++) {
        const struct tve_calibration_options opt = {.kind = TVE_STAT_DIAG,
                                                    .store = f.s,
                                                    .keep = TVE_KEEP_ALL,
                                                    .about = "{}"};
        tve_calibration *c = NULL;
        uint64_t dropped = 0;
        size_t n = 0;
        const uint64_t before = tv_alloc_now();

        tv_alloc_fail_at(k, 1);
        enum tv_err rc =
            tve_calibration_open(f.m, &f.samples, &opt, &f.err, &c);
        if (rc == TV_OK)
            rc = tve_calibration_run(c, want, NULL, nothing, &n, NULL, &f.err);
        tve_calibration_close(c);
        const uint64_t fired = tv_alloc_fired();
        tv_alloc_fail_at(0, 0);
        if (!fired) {
            assert_int_equal(rc, TV_OK);
            assert_int_equal(n, 3);
            assert_true(k > 20);
            break;
        }
        assert_true(rc != TV_OK);
        assert_int_equal(tv_alloc_now(), before);
        assert_ok(tv_derived_release(f.s, NULL, 0, &f.err), &f.err);
        assert_ok(tv_derived_evict_all(f.s, &dropped, &f.err), &f.err);
    }
    fx_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cut),
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_same_whatever_the_store_has),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_quota),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_sequence),
        cmocka_unit_test(test_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
