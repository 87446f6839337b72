/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_perplexity.c - the quickstart family's figures (its README, PyTorch
 * fp32), an adapter on the fly, the protocols against windows cut by hand, and
 * texts that are too short.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "test.h"

#include "tv/alloc.h"
#include "tv/eval.h"
#include "tv/sys.h"

struct subject {
    tv_input *in, *adapter_in;
    tv_adapter *adapter;
    tve_model *m;
    tve_tokenizer *t;
    int32_t bos;
};

static void open_subject(struct subject *s, bool with_adapter)
{
    struct tv_error err = {0};
    char *const base = test_data("quickstart/base");
    char *const lora = test_data("quickstart/lora-jargon");
    struct tve_model_adapter a = {NULL, 1.0};

    memset(s, 0, sizeof(*s));
    assert_ok(tv_input_open_path(base, &err, &s->in), &err);
    if (with_adapter) {
        assert_ok(tv_input_open_path(lora, &err, &s->adapter_in), &err);
        assert_ok(tv_adapter_open(s->adapter_in, &err, &s->adapter), &err);
        a.adapter = s->adapter;
    }
    assert_ok(tve_model_open(s->in, &a, with_adapter, NULL, &err, &s->m), &err);
    assert_ok(tve_tokenizer_of(s->in, NULL, &s->bos, &err, &s->t), &err);
    assert_true(s->bos >= 0);
    tv_free(base);
    tv_free(lora);
}

static void close_subject(struct subject *s)
{
    tve_tokenizer_close(s->t);
    tve_model_close(s->m);
    tv_adapter_close(s->adapter);
    tv_input_close(s->adapter_in);
    tv_input_close(s->in);
}

static void read_ids(struct subject *s, const char *file, bool special,
                     struct tve_ids *ids)
{
    struct tv_error err = {0};
    char *const path = test_data(file);
    char *text = NULL;
    size_t n = 0;

    assert_ok(tv_file_read(path, 1u << 24, &err, &text, &n), &err);
    assert_ok(tve_tokenizer_encode(s->t, text, n, special, ids, &err), &err);
    tv_free(text);
    tv_free(path);
}

static void expect_ppl(struct subject *s, const char *file, double want)
{
    struct tv_error err = {0};
    struct tve_ids ids = {NULL, 0, 0};
    struct tve_ppl p;
    const struct tve_ppl_options opt = {.protocol = TVE_WINDOWS, .bos = s->bos};

    read_ids(s, file, false, &ids);
    assert_ok(tve_perplexity(s->m, ids.ids, ids.n, &opt, NULL, &p, &err), &err);
    if (!(fabs(p.ppl / want - 1) <= 1e-4))
        fail_msg("%s: %.6f instead of %.3f", file, p.ppl, want);
    assert_int_equal(p.context, 256);
    assert_int_equal(p.n_scored, ids.n / 255 * 255);
    assert_true(fabs(log(p.ppl) - p.nll_mean) < 1e-12);
    assert_true(p.ppl_stderr > 0 && p.ppl_stderr < p.ppl / 10);
    tve_ids_free(&ids);
}

static void test_figures(void **state)
{
    (void)state;
    struct subject s;

    open_subject(&s, false);
    expect_ppl(&s, "quickstart/text/prose.val.txt", 153.130);
    close_subject(&s);
    open_subject(&s, true);
    expect_ppl(&s, "quickstart/text/jargon.val.txt", 242.041);
    close_subject(&s);
}

/* Mean NLL of windows that the test cuts itself. */
static double mean_of(struct subject *s, const struct tve_window *w, size_t n)
{
    struct tv_error err = {0};
    double nll[4096], sum = 0;
    size_t k = 0;

    for (size_t i = 0; i < n; i++)
        k += w[i].n - w[i].score_from;
    assert_true(k <= 4096);
    assert_ok(tve_score(s->m, w, n, NULL, nll, &err), &err);
    for (size_t i = 0; i < k; i++)
        sum += nll[i];
    return sum / (double)k;
}

static void check_protocol(struct subject *s, enum tve_protocol p,
                           const struct tve_ids *ids, size_t n_ids,
                           size_t context, size_t stride,
                           const struct tve_window *w, size_t n)
{
    struct tv_error err = {0};
    struct tve_ppl out;
    const struct tve_ppl_options opt = {
        .protocol = p, .context = context, .stride = stride, .bos = s->bos};
    const double want = mean_of(s, w, n);

    assert_ok(tve_perplexity(s->m, ids->ids, n_ids, &opt, NULL, &out, &err),
              &err);
    assert_true(fabs(out.nll_mean - want) < 1e-5);
}

static void test_protocols(void **state)
{
    (void)state;
    struct subject s;
    struct tve_ids ids = {NULL, 0, 0};
    int32_t with_bos[2][10];

    open_subject(&s, false);
    read_ids(&s, "quickstart/text/code.val.txt", true, &ids);
    assert_int_equal(ids.ids[0], s.bos); /* the post-processor's */
    assert_true(ids.n > 40);
    const int32_t *const x = ids.ids;

    const struct tve_window gptq[3] = {
        {x, 10, 1}, {x + 10, 10, 1}, {x + 20, 10, 1}};
    check_protocol(&s, TVE_GPTQ, &ids, 37, 10, 0, gptq, 3);

    for (size_t i = 0; i < 2; i++) {
        memcpy(with_bos[i], x + 10 * i, sizeof(with_bos[i]));
        with_bos[i][0] = s.bos;
    }
    const struct tve_window llamacpp[2] = {{with_bos[0], 10, 6},
                                           {with_bos[1], 10, 6}};
    check_protocol(&s, TVE_LLAMACPP, &ids, 29, 10, 0, llamacpp, 2);

    for (size_t i = 0; i < 2; i++) {
        memcpy(with_bos[i] + 1, x + 9 * i, 9 * sizeof(int32_t));
        with_bos[i][0] = s.bos;
    }
    const struct tve_window windows[2] = {{with_bos[0], 10, 1},
                                          {with_bos[1], 10, 1}};
    check_protocol(&s, TVE_WINDOWS, &ids, 26, 10, 0, windows, 2);

    /* each id once: 1..9, then 10..13, ..., the last window is short */
    const struct tve_window stride[4] = {
        {x, 10, 1}, {x + 4, 10, 6}, {x + 8, 10, 6}, {x + 12, 9, 6}};
    check_protocol(&s, TVE_STRIDE, &ids, 21, 10, 4, stride, 4);

    tve_ids_free(&ids);
    close_subject(&s);
}

static void test_names(void **state)
{
    (void)state;
    for (int i = 0; i < TVE_PROTOCOL_COUNT; i++) {
        enum tve_protocol p = TVE_PROTOCOL_COUNT;
        assert_int_equal(
            tve_protocol_from_name(tve_protocol_name((enum tve_protocol)i), &p),
            0);
        assert_int_equal(p, i);
    }
    enum tve_protocol p = TVE_GPTQ;
    assert_int_equal(tve_protocol_from_name("bits", &p), -1);
    assert_int_equal(tve_protocol_context(TVE_WINDOWS, 256), 256);
    assert_int_equal(tve_protocol_context(TVE_WINDOWS, 131072), 2048);
    assert_int_equal(tve_protocol_context(TVE_WINDOWS, 0), 2048);
    assert_int_equal(tve_protocol_context(TVE_LLAMACPP, 2048), 512);
    assert_false(tve_protocol_special(TVE_WINDOWS));
    assert_true(tve_protocol_special(TVE_GPTQ));
}

static void test_bad_texts(void **state)
{
    (void)state;
    struct tv_error err = {0};
    struct subject s;
    struct tve_ppl out;
    static const int32_t ids[300] = {1};
    struct tve_ppl_options opt = {.protocol = TVE_WINDOWS};

    open_subject(&s, false);
    opt.bos = s.bos;
    assert_code(tve_perplexity(s.m, ids, 0, &opt, NULL, &out, &err), TV_E_INPUT,
                &err);
    assert_message(&err, "too few");
    assert_code(tve_perplexity(s.m, ids, 254, &opt, NULL, &out, &err),
                TV_E_INPUT, &err);
    assert_ok(tve_perplexity(s.m, ids, 255, &opt, NULL, &out, &err), &err);
    opt.context = 257;
    assert_code(tve_perplexity(s.m, ids, 300, &opt, NULL, &out, &err),
                TV_E_INPUT, &err);
    assert_message(&err, "256 positions");
    opt.context = 1;
    assert_code(tve_perplexity(s.m, ids, 300, &opt, NULL, &out, &err),
                TV_E_USAGE, &err);
    opt = (struct tve_ppl_options){
        .protocol = TVE_STRIDE, .context = 8, .stride = 9, .bos = s.bos};
    assert_code(tve_perplexity(s.m, ids, 300, &opt, NULL, &out, &err),
                TV_E_USAGE, &err);
    opt.stride = 4;
    assert_code(tve_perplexity(s.m, ids, 1, &opt, NULL, &out, &err), TV_E_INPUT,
                &err);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_figures),
        cmocka_unit_test(test_protocols),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_bad_texts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
