/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_tokenizer.c - tokenizers of every kind against what the Rust library
 * gave for the same texts (tests/data/tokenizers, made by
 * tools/families/make_tokenizers.py), and files that must be refused.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "rng.h"
#include "test.h"

#include "tv/alloc.h"
#include "tv/eval.h"
#include "tv/sys.h"
#include "tv/text.h"

static const char *const kinds[] = {
    "gpt2",   "gpt2-prefix", "llama3", "qwen2",   "bloom",
    "falcon", "starcoder",   "llama2", "mistral", "metaspace",
    "gemma",  "suffix",      "prefix", "removed", "union",
};

static char *read_data(const char *name, const char *suffix, size_t *n)
{
    struct tv_error err = {0};
    char relative[128];

    snprintf(relative, sizeof(relative), "tokenizers/%s%s", name, suffix);
    char *const path = test_data(relative);
    char *data = NULL;

    assert_ok(tv_file_read(path, 1u << 26, &err, &data, n), &err);
    tv_free(path);
    return data;
}

static void check(tve_tokenizer *t, const char *kind, size_t index,
                  const char *text, size_t n, bool special, const json_t *want)
{
    struct tv_error err = {0};
    struct tve_ids got = {NULL, 0, 0};

    assert_ok(tve_tokenizer_encode(t, text, n, special, &got, &err), &err);
    for (size_t i = 0; i < got.n && i < json_array_size(want); i++)
        if (got.ids[i] != json_integer_value(json_array_get(want, i)))
            fail_msg("%s, text %zu, id %zu: %d instead of %d", kind, index, i,
                     got.ids[i],
                     (int)json_integer_value(json_array_get(want, i)));
    if (got.n != json_array_size(want))
        fail_msg("%s, text %zu: %zu ids instead of %zu", kind, index, got.n,
                 json_array_size(want));
    tve_ids_free(&got);
}

static void test_kinds(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
        struct tv_error err = {0};
        tve_tokenizer *t = NULL;
        size_t n = 0, n_cases = 0;
        char *const json = read_data(kinds[k], ".json", &n);
        char *const text = read_data(kinds[k], ".cases.json", &n_cases);
        json_t *const cases = json_loadb(text, n_cases, 0, NULL);

        assert_non_null(cases);
        assert_true(json_array_size(cases) > 10);
        assert_ok(tve_tokenizer_open(json, n, &err, &t), &err);
        /* twice: the second time words come from the cache */
        for (int pass = 0; pass < 2; pass++) {
            for (size_t i = 0; i < json_array_size(cases); i++) {
                const json_t *const c = json_array_get(cases, i);
                const json_t *const s = json_object_get(c, "text");
                check(t, kinds[k], i, json_string_value(s),
                      json_string_length(s), false,
                      json_object_get(c, "plain"));
                check(t, kinds[k], i, json_string_value(s),
                      json_string_length(s), true,
                      json_object_get(c, "special"));
            }
        }
        assert_int_equal(tve_tokenizer_id(t, "no such token"), -1);
        if (strcmp(kinds[k], "union") == 0) {
            /* Of merge/: two vocabularies in one. */
            assert_int_equal(tve_tokenizer_vocab(t), 349);
        } else {
            assert_int_equal(tve_tokenizer_id(t, "<|endoftext|>"),
                             tve_tokenizer_id(t, "<|x|>") + 1);
            assert_true(tve_tokenizer_vocab(t) > 700);
        }
        tve_tokenizer_close(t);
        json_decref(cases);
        tv_free(text);
        tv_free(json);
    }
}

/* One long text gives what its parts give where cuts are certain: the cache,
 * the cutting of long words and the heap must not show. */
static void test_long_words(void **state)
{
    (void)state;
    struct tv_error err = {0};
    size_t n = 0;
    char *const json = read_data("gpt2", ".json", &n);
    tve_tokenizer *t = NULL;
    struct tve_ids one = {NULL, 0, 0}, all = {NULL, 0, 0};
    enum { TIMES = 20000 };
    char *const text = tv_alloc(2 * TIMES);

    assert_ok(tve_tokenizer_open(json, n, &err, &t), &err);
    for (size_t i = 0; i < TIMES; i++)
        memcpy(text + 2 * i, "ab", 2); /* one word of letters */
    assert_ok(tve_tokenizer_encode(t, text, 2 * TIMES, false, &all, &err),
              &err);
    assert_true(all.n > 0 && all.n <= 2 * TIMES);
    /* a word twice as long cannot have more than twice the ids */
    assert_ok(tve_tokenizer_encode(t, text, TIMES, false, &one, &err), &err);
    assert_true(all.n <= 2 * one.n && 2 * one.n <= all.n + 2);
    tve_ids_free(&one);
    tve_ids_free(&all);
    tve_tokenizer_close(t);
    tv_free(text);
    tv_free(json);
}

/* ---- merging against the plainest way to do it ---- */

enum { LETTERS = 4, TOKENS_MAX = 120, TOKEN_LEN = 10, MERGES = 100 };

struct plain {
    char token[TOKENS_MAX][TOKEN_LEN + 1];
    size_t n_tokens;
    int32_t left[MERGES], right[MERGES];
    int32_t rank[TOKENS_MAX][TOKENS_MAX], into[TOKENS_MAX][TOKENS_MAX];
};

static int32_t plain_token(struct plain *p, const char *content)
{
    size_t i = 0;

    while (i < p->n_tokens && strcmp(p->token[i], content) != 0)
        i++;
    if (i == p->n_tokens)
        snprintf(p->token[p->n_tokens++], sizeof(p->token[0]), "%s", content);
    return (int32_t)i;
}

/* Random merges; several make the same token. */
static void plain_make(struct plain *p, struct rng *r)
{
    memset(p, 0, sizeof(*p));
    memset(p->rank, 0xff, sizeof(p->rank));
    for (char c = 'a'; c < 'a' + LETTERS; c++)
        plain_token(p, (char[2]){c, '\0'});
    for (int32_t k = 0; k < MERGES;) {
        const size_t left = rng_below(r, p->n_tokens);
        const size_t right = rng_below(r, p->n_tokens);
        char both[2 * TOKEN_LEN + 1];

        snprintf(both, sizeof(both), "%s%s", p->token[left], p->token[right]);
        if (strlen(both) > TOKEN_LEN || p->rank[left][right] >= 0)
            continue;
        p->left[k] = (int32_t)left;
        p->right[k] = (int32_t)right;
        p->into[left][right] = plain_token(p, both);
        p->rank[left][right] = k++;
    }
}

static char *plain_json(const struct plain *p, const char *pre_tokenizer)
{
    struct tv_buf b;

    tv_buf_init(&b, 1u << 20);
    tv_buf_fmt(&b, "{\"pre_tokenizer\":%s,\"model\":{\"type\":\"BPE\",",
               pre_tokenizer);
    for (size_t i = 0; i < p->n_tokens; i++)
        tv_buf_fmt(&b, "%s\"%s\":%zu", i ? "," : "\"vocab\":{", p->token[i], i);
    for (size_t i = 0; i < MERGES; i++)
        tv_buf_fmt(&b, "%s[\"%s\",\"%s\"]", i ? "," : "},\"merges\":[",
                   p->token[p->left[i]], p->token[p->right[i]]);
    tv_buf_str(&b, "]}}");
    assert_false(b.failed);
    return b.data;
}

/* Appends the ids of one word. */
static void plain_word(const struct plain *p, const char *s, size_t n,
                       int32_t *ids, size_t *n_ids)
{
    int32_t *const y = ids + *n_ids;

    for (size_t i = 0; i < n; i++)
        y[i] = s[i] - 'a';
    for (;;) {
        size_t best = n;
        for (size_t i = 0; i + 1 < n; i++)
            if (p->rank[y[i]][y[i + 1]] >= 0 &&
                (best == n ||
                 p->rank[y[i]][y[i + 1]] < p->rank[y[best]][y[best + 1]]))
                best = i;
        if (best == n)
            break;
        y[best] = p->into[y[best]][y[best + 1]];
        n--;
        memmove(y + best + 1, y + best + 2, (n - best - 1) * sizeof(*y));
    }
    *n_ids += n;
}

/* n bytes of text, of words of 1 to `longest` letters. */
static void check_plain(const struct plain *p, struct rng *r, tve_tokenizer *t,
                        size_t n, size_t longest)
{
    struct tv_error err = {0};
    struct tve_ids got = {NULL, 0, 0};
    char *const text = tv_alloc(n + longest);
    int32_t *const want = tv_alloc((n + longest) * sizeof(*want));
    size_t used = 0, n_want = 0;

    while (used < n) {
        const size_t len = 1 + rng_below(r, longest);
        if (used > 0)
            text[used++] = ' ';
        for (size_t i = 0; i < len; i++)
            text[used + i] = (char)('a' + rng_below(r, LETTERS));
        plain_word(p, text + used, len, want, &n_want);
        used += len;
    }
    assert_ok(tve_tokenizer_encode(t, text, used, false, &got, &err), &err);
    assert_int_equal(got.n, n_want);
    assert_memory_equal(got.ids, want, n_want * sizeof(*want));
    tve_ids_free(&got);
    tv_free(text);
    tv_free(want);
}

/* Words of every length, and more different ones than are kept: what is
 * scanned, heaped, cut, remembered and forgotten must not show. */
static void test_merges(void **state)
{
    (void)state;
    static const char *const pre_tokenizers[] = {
        "{\"type\":\"WhitespaceSplit\"}",
        /* words are kept between these two, not by the model */
        "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Whitespace\"},"
        "{\"type\":\"Digits\"}]}",
    };
    struct rng r;

    rng_open(&r, 1);
    for (size_t k = 0; k < 10; k++) {
        struct tv_error err = {0};
        static struct plain p;
        tve_tokenizer *t = NULL;

        plain_make(&p, &r);
        char *const json = plain_json(&p, pre_tokenizers[k % 2]);
        assert_ok(tve_tokenizer_open(json, strlen(json), &err, &t), &err);
        for (size_t longest = 1; longest < 300; longest += 1 + longest / 8)
            check_plain(&p, &r, t, 2000, longest);
        if (k < 2)
            check_plain(&p, &r, t, 1000000, 12);
        tve_tokenizer_close(t);
        tv_free(json);
    }
}

static void test_not_utf8(void **state)
{
    (void)state;
    struct tv_error err = {0};
    size_t n = 0;
    char *const json = read_data("llama3", ".json", &n);
    tve_tokenizer *t = NULL;
    struct tve_ids ids = {NULL, 0, 0};

    assert_ok(tve_tokenizer_open(json, n, &err, &t), &err);
    assert_code(
        tve_tokenizer_encode(t, "na\xc3\xafve \xff.", 9, false, &ids, &err),
        TV_E_CORRUPT, &err);
    assert_message(&err, "byte 7");
    tve_ids_free(&ids);
    tve_tokenizer_close(t);
    tv_free(json);
}

#define MODEL                                                                  \
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},"        \
    "\"merges\":[\"a b\"]}"

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        const char *json;
        enum tv_err code;
        const char *in_message;
    } cases[] = {
        {"", TV_E_CORRUPT, "tokenizer.json"},
        {"[]", TV_E_CORRUPT, "object"},
        {"{}", TV_E_CORRUPT, "no model"},
        {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", TV_E_UNSUPPORTED,
         "Unigram"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", TV_E_UNSUPPORTED,
         "WordPiece"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}}}", TV_E_CORRUPT,
         "merges"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}",
         TV_E_CORRUPT, "impossible id"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},"
         "\"merges\":[\"a a\"]}}",
         TV_E_CORRUPT, "not in the vocabulary"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},"
         "\"merges\":[\"aa\"]}}",
         TV_E_CORRUPT, "merge 0 is malformed"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},"
         "\"merges\":[[\"a\"]]}}",
         TV_E_CORRUPT, "merge 0 is malformed"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],"
         "\"unk_token\":\"?\"}}",
         TV_E_CORRUPT, "unknown token"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],"
         "\"dropout\":0.1}}",
         TV_E_UNSUPPORTED, "dropout"},
        {"{" MODEL ",\"normalizer\":{\"type\":\"Precompiled\"}}",
         TV_E_UNSUPPORTED, "Precompiled"},
        {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}}",
         TV_E_UNSUPPORTED, "BertPreTokenizer"},
        {"{" MODEL ",\"post_processor\":{\"type\":\"Mystery\"}}",
         TV_E_UNSUPPORTED, "Mystery"},
        {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":"
         "{\"Regex\":\"(a\"},\"behavior\":\"Isolated\"}}",
         TV_E_CORRUPT, "(a"},
        {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":"
         "{\"Regex\":\"[a&&b]\"},\"behavior\":\"Isolated\"}}",
         TV_E_UNSUPPORTED, "&&"},
        {"{" MODEL ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":"
         "{\"Regex\":\"a{1,3}+\"},\"behavior\":\"Isolated\"}}",
         TV_E_UNSUPPORTED, "interval"},
        {"{" MODEL ",\"added_tokens\":[{\"id\":7}]}", TV_E_CORRUPT,
         "added token"},
        {"{" MODEL ",\"added_tokens\":{}}", TV_E_CORRUPT, "added_tokens"},
        {"{" MODEL ",\"post_processor\":{\"type\":\"TemplateProcessing\","
         "\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}]}}",
         TV_E_CORRUPT, "token without ids"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct tv_error err = {0};
        tve_tokenizer *t = NULL;
        const char *const s = cases[i].json;

        const enum tv_err rc = tve_tokenizer_open(s, strlen(s), &err, &t);
        if (rc != cases[i].code || !strstr(err.msg, cases[i].in_message))
            fail_msg("%s: code %d, \"%s\"", s, (int)rc, err.msg);
        assert_null(t);
    }
}

/* Every allocation fails once: a clean error each time, nothing kept. */
static void test_allocations(void **state)
{
    (void)state;
    static const char json[] =
        "{" MODEL ",\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":["
        "{\"type\":\"Prepend\",\"prepend\":\"b\"},{\"type\":\"Replace\","
        "\"pattern\":{\"String\":\" \"},\"content\":\"a\"}]},"
        "\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"added_tokens\":["
        "{\"id\":5,\"content\":\"<s>\",\"special\":true}]}";
    struct tv_error err = {0};

    for (uint64_t k = 1;; k++) {
        tve_tokenizer *t = NULL;
        struct tve_ids ids = {NULL, 0, 0};
        const uint64_t before = tv_alloc_now();

        tv_alloc_fail_at(k, 1);
        enum tv_err rc = tve_tokenizer_open(json, sizeof(json) - 1, &err, &t);
        if (rc == TV_OK)
            rc = tve_tokenizer_encode(t, "ab <s>ab", 8, true, &ids, &err);
        const uint64_t fired = tv_alloc_fired();
        tv_alloc_fail_at(0, 0);
        tve_ids_free(&ids);
        tve_tokenizer_close(t);
        assert_int_equal(tv_alloc_now(), before);
        if (!fired) {
            assert_int_equal(rc, TV_OK);
            assert_true(k > 20);
            break;
        }
        /* PCRE2 may do without a JIT stack; anything else is reported */
        assert_true(rc == TV_E_NOMEM || rc == TV_OK);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kinds),   cmocka_unit_test(test_long_words),
        cmocka_unit_test(test_merges),  cmocka_unit_test(test_not_utf8),
        cmocka_unit_test(test_refused), cmocka_unit_test(test_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
