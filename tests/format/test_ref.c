/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_ref.c - model references: paths, splits, weights, and the Hugging Face
 * cache with every way in which it can be incomplete.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"
#include "format_files.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

#define COMMIT "0123456789abcdef0123456789abcdef01234567"

static char *top; /* a scratch directory, also the working directory */
static char home[4096];

static void make(const char *path)
{
    struct tv_error err;

    assert_ok(tv_dir_make(path, &err), &err);
}

static void file(const char *path, const char *text)
{
    struct tv_error err;

    assert_ok(tv_file_write_atomic(path, text, strlen(text), false, &err),
              &err);
}

static void clear_env(void)
{
    unsetenv("HF_HUB_CACHE");
    unsetenv("HUGGINGFACE_HUB_CACHE");
    unsetenv("HF_HOME");
    unsetenv("XDG_CACHE_HOME");
    setenv("HOME", top, 1);
}

static int setup(void **state)
{
    char *cwd = getcwd(home, sizeof home);

    (void)state;
    assert_non_null(cwd);
    top = tmpdir_make();
    assert_int_equal(chdir(top), 0);
    clear_env();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    if (chdir(home) != 0)
        return -1;
    tmpdir_remove(top);
    return 0;
}

static struct tv_ref *resolve(const char *text)
{
    struct tv_ref *r = NULL;
    struct tv_error err;

    assert_ok(tv_ref_resolve(text, &err, &r), &err);
    assert_string_equal(r->text, text);
    return r;
}

static void refuse(const char *text, enum tv_err code, const char *part,
                   const char *hint)
{
    struct tv_ref *r = NULL;
    struct tv_error err;

    tv_error_clear(&err);
    assert_code(tv_ref_resolve(text, &err, &r), code, &err);
    assert_message(&err, part);
    assert_null(r);
    if (hint != NULL)
        assert_string_equal(err.hint, hint);
}

static void model_dir(const char *path)
{
    char *config = tv_path_join(path, "config.json");

    make(path);
    file(config, "{}");
    tv_free(config);
}

static void test_store(void **state)
{
    struct tv_ref *r = resolve("store:base+store:lora.A-1*0.25");

    (void)state;
    assert_string_equal(r->model.object, "base");
    assert_null(r->model.path);
    assert_int_equal(r->n_adapters, 1);
    assert_string_equal(r->adapters[0].object, "lora.A-1");
    assert_float_equal(r->adapters[0].weight, 0.25, 0);
    tv_ref_free(r);
    refuse("store:", TV_E_USAGE, "object names are made of", NULL);
    refuse("store:a/b", TV_E_USAGE, "object names are made of", NULL);
    refuse("store:a@main", TV_E_USAGE, "object names are made of", NULL);
}

static void test_paths(void **state)
{
    struct tv_ref *r = NULL;

    (void)state;
    model_dir("m");
    model_dir("odd+name");
    model_dir("odd");
    model_dir("mail@host");
    model_dir("star*2");
    model_dir("lora");
    file("one.safetensors", "");

    r = resolve("m");
    assert_string_equal(r->model.path, "m");
    assert_null(r->model.revision);
    assert_int_equal(r->n_adapters, 0);
    tv_ref_free(r);
    r = resolve("./m/");
    assert_string_equal(r->model.path, "./m/");
    tv_ref_free(r);
    r = resolve("one.safetensors");
    assert_string_equal(r->model.path, "one.safetensors");
    tv_ref_free(r);
    /* The whole string wins over its parts. */
    r = resolve("odd+name");
    assert_string_equal(r->model.path, "odd+name");
    tv_ref_free(r);
    r = resolve("odd+name+lora*-1.5");
    assert_string_equal(r->model.path, "odd+name");
    assert_int_equal(r->n_adapters, 1);
    assert_string_equal(r->adapters[0].path, "lora");
    assert_string_equal(r->adapters[0].text, "lora");
    assert_float_equal(r->adapters[0].weight, -1.5, 0);
    tv_ref_free(r);
    r = resolve("odd+lora+odd+name");
    assert_int_equal(r->n_adapters, 2);
    assert_string_equal(r->adapters[1].path, "odd+name");
    tv_ref_free(r);
    r = resolve("mail@host");
    assert_string_equal(r->model.path, "mail@host");
    tv_ref_free(r);
    r = resolve("m@v1.0+lora@main*1e-1");
    assert_string_equal(r->model.path, "m");
    assert_string_equal(r->model.revision, "v1.0");
    assert_string_equal(r->adapters[0].path, "lora");
    assert_string_equal(r->adapters[0].revision, "main");
    assert_float_equal(r->adapters[0].weight, 0.1, 1e-15);
    tv_ref_free(r);
    r = resolve("m+star*2");
    assert_string_equal(r->adapters[0].path, "star*2");
    assert_float_equal(r->adapters[0].weight, 1.0, 0);
    tv_ref_free(r);
    r = resolve("m+store:x");
    assert_string_equal(r->adapters[0].object, "x");
    tv_ref_free(r);
}

static void test_expansion(void **state)
{
    struct tv_ref *r = NULL;
    char *want = tv_path_join(top, "m");

    (void)state;
    r = resolve("~/m");
    assert_string_equal(r->model.path, want);
    tv_ref_free(r);
    setenv("TV_REF_TEST", top, 1);
    r = resolve("$TV_REF_TEST/m");
    assert_string_equal(r->model.path, want);
    tv_ref_free(r);
    r = resolve("${TV_REF_TEST}/m");
    assert_string_equal(r->model.path, want);
    tv_ref_free(r);
    refuse("$TV_NOT_SET_AT_ALL/m", TV_E_INPUT, "not found", NULL);
    unsetenv("TV_REF_TEST");
    tv_free(want);
}

static void test_malformed(void **state)
{
    (void)state;
    refuse("", TV_E_USAGE, "empty", NULL);
    refuse("+lora", TV_E_USAGE, "empty part", NULL);
    refuse("m+", TV_E_USAGE, "empty part", NULL);
    refuse("m++lora", TV_E_USAGE, "empty part", NULL);
    refuse("m+lora*", TV_E_USAGE, "is not a weight", NULL);
    refuse("m+lora*abc", TV_E_USAGE, "'abc' is not a weight", NULL);
    refuse("m+lora*inf", TV_E_USAGE, "'inf' is not a weight", NULL);
    refuse("m+lora*nan", TV_E_USAGE, "'nan' is not a weight", NULL);
    refuse("a@b@c", TV_E_USAGE, "MODEL@REVISION", NULL);
    refuse("@main", TV_E_USAGE, "MODEL@REVISION", NULL);
    refuse("gone/model@", TV_E_USAGE, "revision", NULL);
    refuse("gone/at/all", TV_E_INPUT, "'gone/at/all' not found: no such path",
           "");
    refuse("gone/model", TV_E_INPUT, "not in the Hugging Face cache",
           "hf download gone/model");
    refuse("gone/model@v2", TV_E_INPUT, "not in the Hugging Face cache",
           "hf download gone/model --revision v2");
    refuse("m+gone/lora*0.5", TV_E_INPUT,
           "adapter 'gone/lora*0.5' of 'm+gone/lora*0.5' not found",
           "hf download gone/lora");
    {
        char many[400];

        memset(many, '+', sizeof many - 1);
        many[sizeof many - 1] = '\0';
        many[0] = 'm';
        refuse(many, TV_E_USAGE, "parts", NULL);
    }
}

/* ---- the cache --------------------------------------------------------------
 */

static void make_repo(const char *root, const char *folder, const char *config)
{
    char path[4096];

    ff_print(path, sizeof path, "%s/%s/refs", root, folder);
    make(path);
    ff_print(path, sizeof path, "%s/%s/blobs", root, folder);
    make(path);
    ff_print(path, sizeof path, "%s/%s/snapshots/" COMMIT, root, folder);
    make(path);
    if (config != NULL) {
        char blob[4096];

        ff_print(blob, sizeof blob, "%s/%s/blobs/c0ffee", root, folder);
        file(blob, config);
        ff_print(path, sizeof path, "%s/%s/snapshots/" COMMIT "/config.json",
                 root, folder);
        assert_int_equal(symlink("../../blobs/c0ffee", path), 0);
    }
    ff_print(path, sizeof path, "%s/%s/refs/main", root, folder);
    file(path, COMMIT);
}

static void expect_snapshot(const char *text, const char *root,
                            const char *folder)
{
    struct tv_ref *r = resolve(text);
    char want[4096];

    ff_print(want, sizeof want, "%s/%s/snapshots/" COMMIT, root, folder);
    assert_string_equal(r->model.path, want);
    tv_ref_free(r);
}

static void test_cache(void **state)
{
    char hub[4096];
    struct tv_ref *r = NULL;

    (void)state;
    ff_print(hub, sizeof hub, "%s/.cache/huggingface/hub", top);
    make_repo(hub, "models--org--name", "{}");
    make_repo(hub, "models--gpt2", "{}");
    expect_snapshot("org/name", hub, "models--org--name");
    expect_snapshot("org/name@main", hub, "models--org--name");
    expect_snapshot("org/name@" COMMIT, hub, "models--org--name");
    expect_snapshot("gpt2", hub, "models--gpt2");
    r = resolve("org/name@main+org/name*2");
    assert_string_equal(r->model.text, "org/name");
    assert_string_equal(r->model.revision, "main");
    assert_string_equal(r->adapters[0].text, "org/name");
    tv_ref_free(r);
    /* Never another snapshot than the one asked for. */
    refuse("org/name@v2", TV_E_INPUT, "revision v2 is not in the cache",
           "hf download org/name --revision v2");
    refuse("org/name@../../x", TV_E_USAGE, "is not a revision", NULL);
    refuse("org/name@/etc", TV_E_USAGE, "is not a revision", NULL);
    refuse("org/../name", TV_E_INPUT, "no such path", NULL);
    refuse("org--name", TV_E_INPUT, "no such path", NULL);
    refuse("org/other", TV_E_INPUT, "not in the Hugging Face cache",
           "hf download org/other");
}

static void test_cache_refs(void **state)
{
    char hub[4096];
    char path[8192];

    (void)state;
    ff_print(hub, sizeof hub, "%s/.cache/huggingface/hub", top);
    make_repo(hub, "models--org--refs", "{}");
    ff_print(path, sizeof path, "%s/models--org--refs/refs/refs/pr", hub);
    make(path);
    ff_print(path, sizeof path, "%s/models--org--refs/refs/refs/pr/1", hub);
    file(path, COMMIT "\n");
    expect_snapshot("org/refs@refs/pr/1", hub, "models--org--refs");
    ff_print(path, sizeof path, "%s/models--org--refs/refs/bad", hub);
    file(path, "../../../../m");
    refuse("org/refs@bad", TV_E_CORRUPT, "does not hold a commit id", NULL);
    ff_print(path, sizeof path, "%s/models--org--refs/refs/old", hub);
    file(path, "fedcba9876543210fedcba9876543210fedcba98");
    refuse("org/refs@old", TV_E_INPUT, "revision old is not in the cache",
           NULL);
}

static void test_cache_incomplete(void **state)
{
    char hub[4096];
    char path[8192];

    (void)state;
    ff_print(hub, sizeof hub, "%s/.cache/huggingface/hub", top);
    make_repo(hub, "models--org--part", "{}");
    ff_print(path, sizeof path, "%s/models--org--part/blobs/beef.incomplete",
             hub);
    file(path, "");
    refuse("org/part", TV_E_INPUT, "has not finished", "hf download org/part");
    /* A leftover of a download that was repeated and finished. */
    ff_print(path, sizeof path, "%s/models--org--part/blobs/beef", hub);
    file(path, "");
    expect_snapshot("org/part", hub, "models--org--part");

    make_repo(hub, "models--org--bare", NULL);
    refuse("org/bare", TV_E_INPUT, "has neither config.json nor",
           "hf download org/bare");
    ff_print(path, sizeof path, "%s/models--org--bare/.no_exist/" COMMIT, hub);
    make(path);
    ff_print(path, sizeof path,
             "%s/models--org--bare/.no_exist/" COMMIT "/config.json", hub);
    file(path, "");
    expect_snapshot("org/bare", hub, "models--org--bare");
}

static void test_cache_roots(void **state)
{
    static const struct {
        const char *name, *value, *root;
    } places[] = {
        {"XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"},
        {"HF_HOME", "hfhome", "hfhome/hub"},
        {"HUGGINGFACE_HUB_CACHE", "old", "old"},
        {"HF_HUB_CACHE", "new", "new"},
    };

    (void)state;
    clear_env();
    /* Each of them wins over those before it. */
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        char root[4096];
        char value[4096];

        ff_print(root, sizeof root, "%s/%s", top, places[i].root);
        ff_print(value, sizeof value, "~/%s", places[i].value);
        make_repo(root, "models--who--knows", "{}");
        setenv(places[i].name, value, 1);
        expect_snapshot("who/knows", root, "models--who--knows");
    }
    setenv("TV_REF_ROOT", top, 1);
    setenv("HF_HUB_CACHE", "${TV_REF_ROOT}/hfhome/hub", 1);
    {
        char root[4096];

        ff_print(root, sizeof root, "%s/hfhome/hub", top);
        expect_snapshot("who/knows", root, "models--who--knows");
    }
    unsetenv("TV_REF_ROOT");
    clear_env();
}

/* Notebook services put data sets some levels deep. */
static void test_nested(void **state)
{
    struct tv_ref *r = NULL;

    (void)state;
    make("data/set/v1");
    model_dir("data/set/v1/model");
    r = resolve("data");
    assert_string_equal(r->model.path, "data/set/v1/model");
    tv_ref_free(r);
    model_dir("data/set/v2");
    refuse("data", TV_E_INPUT, "holds several models", NULL);
    make("deep/1/2/3");
    model_dir("deep/1/2/3/4");
    r = resolve("deep"); /* too deep: opening says what is missing */
    assert_string_equal(r->model.path, "deep");
    tv_ref_free(r);
}

static enum tv_err resolve_once(void *arg, struct tv_error *err)
{
    struct tv_ref *r = NULL;
    const enum tv_err rc = tv_ref_resolve(arg, err, &r);

    if (rc == TV_OK)
        assert_string_equal(r->model.path, "odd+name");
    tv_ref_free(r);
    return rc;
}

static void test_no_memory(void **state)
{
    char text[] = "odd+name+m@v1*2+store:x*3";

    (void)state;
    assert_true(faults_loop_alloc(resolve_once, text, false) > 8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_store),
        cmocka_unit_test(test_paths),
        cmocka_unit_test(test_expansion),
        cmocka_unit_test(test_malformed),
        cmocka_unit_test(test_cache),
        cmocka_unit_test(test_cache_refs),
        cmocka_unit_test(test_cache_incomplete),
        cmocka_unit_test(test_cache_roots),
        cmocka_unit_test(test_nested),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
