/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ref.c - model references: from text to places.
 *
 *   PART[@REV][+ADAPTER[@REV][*WEIGHT]]...
 *
 * A part is `store:NAME`, an existing path, or a Hub name found in the local
 * Hugging Face cache. Paths may themselves hold '+', '@' and '*', so the
 * longest piece that exists wins, from the left; what cannot be resolved that
 * way is reported by the plain split at every '+'. Nothing is downloaded.
 *
 * Cache layout (huggingface_hub, file_download.py):
 *   ROOT/models--ORG--NAME/refs/REV              text: commit id
 *                         /snapshots/COMMIT/...  links into blobs/
 *                         /blobs/ETAG[.incomplete]
 *                         /.no_exist/COMMIT/FILE known to be absent
 * A revision is refs/REV, or else the name of a snapshot; never a guess.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "hf_dir.h"
#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"
#include "tv/text.h"

#define PARTS_MAX    64u
#define NESTED_DEPTH 3u

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory resolving a model");
}

static void part_clear(struct tv_ref_part *p)
{
    tv_free(p->text);
    tv_free(p->revision);
    tv_free(p->path);
    tv_free(p->object);
    memset(p, 0, sizeof *p);
}

void tv_ref_free(struct tv_ref *r)
{
    if (r == NULL)
        return;
    part_clear(&r->model);
    for (size_t i = 0; r->adapters != NULL && i < r->n_adapters; i++)
        part_clear(&r->adapters[i]);
    tv_free(r->adapters);
    tv_free(r->text);
    tv_free(r);
}

/* ---- the environment
 * ---------------------------------------------------------- */

static bool name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c >= '0' && c <= '9') || c == '_';
}

/* Expands a leading ~ and $VAR, ${VAR}; unknown variables stay as written, as
 * Python's expandvars does. Owned, NULL when out of memory. */
static char *expand(const char *s)
{
    struct tv_buf b;

    tv_buf_init(&b, 1u << 16);
    if (s[0] == '~' && (s[1] == '/' || s[1] == '\0')) {
        const char *home = getenv("HOME");

        tv_buf_str(&b, home == NULL ? "~" : home);
        s++;
    }
    while (*s != '\0') {
        const bool brace = s[0] == '$' && s[1] == '{';
        const char *name = s + (brace ? 2 : 1);
        size_t n = 0;
        char *var = NULL;
        const char *value = NULL;

        if (*s != '$') {
            tv_buf_add(&b, s++, 1);
            continue;
        }
        while (name_char(name[n]))
            n++;
        if (n > 0 && (!brace || name[n] == '}')) {
            var = tv_strndup(name, n);
            value = var == NULL ? NULL : getenv(var);
            tv_free(var);
        }
        if (value == NULL) {
            tv_buf_add(&b, s++, 1);
            continue;
        }
        tv_buf_str(&b, value);
        s = name + n + (brace ? 1 : 0);
    }
    tv_buf_add(&b, "", 0);
    if (b.failed) {
        tv_buf_free(&b);
        return NULL;
    }
    return b.data == NULL ? tv_strdup("") : b.data;
}

static const char *env_set(const char *name)
{
    const char *v = getenv(name);

    return v == NULL || v[0] == '\0' ? NULL : v;
}

/* Cache root by huggingface_hub's rules, owned. */
static char *cache_root(void)
{
    const char *v = NULL;
    char *dir = NULL;
    char *root = NULL;

    if ((v = env_set("HF_HUB_CACHE")) != NULL ||
        (v = env_set("HUGGINGFACE_HUB_CACHE")) != NULL)
        return expand(v);
    if ((v = env_set("HF_HOME")) != NULL) {
        dir = expand(v);
        root = dir == NULL ? NULL : tv_path_join(dir, "hub");
    } else if ((v = env_set("XDG_CACHE_HOME")) != NULL) {
        dir = expand(v);
        root = dir == NULL ? NULL : tv_path_join(dir, "huggingface/hub");
    } else {
        root = expand("~/.cache/huggingface/hub");
    }
    tv_free(dir);
    return root;
}

/* ---- the Hugging Face cache
 * ---------------------------------------------------- */

static bool repo_char(char c)
{
    return name_char(c) || c == '-' || c == '.';
}

/* ORG/NAME or NAME as the Hub allows them. */
static bool is_repo_name(const char *s)
{
    size_t slashes = 0;

    if (s[0] == '\0' || s[0] == '/' || s[0] == '.' || strlen(s) > 200)
        return false;
    for (size_t i = 0; s[i] != '\0'; i++) {
        if (s[i] == '/') {
            if (++slashes > 1 || s[i + 1] == '\0' || s[i + 1] == '.')
                return false;
        } else if (!repo_char(s[i])) {
            return false;
        }
    }
    return strstr(s, "..") == NULL && strstr(s, "--") == NULL;
}

/* A revision that stays inside refs/. */
static bool is_revision(const char *s)
{
    if (s[0] == '\0' || s[0] == '/' || strlen(s) > 200)
        return false;
    for (size_t i = 0; s[i] != '\0'; i++) {
        if (!repo_char(s[i]) && s[i] != '/')
            return false;
        if (s[i] == '.' && s[i + 1] == '.')
            return false;
    }
    return true;
}

static char *folder_name(const char *repo)
{
    struct tv_buf b;

    tv_buf_init(&b, 512);
    tv_buf_str(&b, "models--");
    for (size_t i = 0; repo[i] != '\0'; i++) {
        if (repo[i] == '/')
            tv_buf_str(&b, "--");
        else
            tv_buf_add(&b, &repo[i], 1);
    }
    if (b.failed) {
        tv_buf_free(&b);
        return NULL;
    }
    return b.data;
}

static void hint_download(struct tv_error *err, const char *repo,
                          const char *rev)
{
    if (rev == NULL)
        tv_error_hint(err, "hf download %s", repo);
    else
        tv_error_hint(err, "hf download %s --revision %s", repo, rev);
}

/* Commit that refs/REV names, or REV itself; owned. */
static enum tv_err find_commit(const char *folder, const char *rev,
                               struct tv_error *err, char **out)
{
    enum tv_err rc = TV_OK;
    char *path = tv_asprintf("%s/refs/%s", folder, rev);
    char *text = NULL;
    size_t n = 0;

    *out = NULL;
    if (path == NULL) {
        rc = no_memory(err);
        goto out;
    }
    if (tv_path_exists(path) && !tv_path_is_dir(path)) {
        TV_TRY(tv_file_read(path, 4096, err, &text, &n));
        while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == ' ' ||
                         text[n - 1] == '\r'))
            text[--n] = '\0';
        if (!is_revision(text) || strchr(text, '/') != NULL) {
            rc = tv_error_set(err, TV_E_CORRUPT, "%s does not hold a commit id",
                              path);
            goto out;
        }
        *out = text;
        text = NULL;
    } else if (strchr(rev, '/') == NULL) {
        *out = tv_strdup(rev);
        if (*out == NULL)
            rc = no_memory(err);
    }
out:
    tv_free(text);
    tv_free(path);
    return rc;
}

/* INPUT when a download into this repository has not finished. */
static enum tv_err check_incomplete(const char *folder, const char *repo,
                                    const char *rev, struct tv_error *err)
{
    static const char suffix[] = ".incomplete";
    const size_t k = sizeof suffix - 1;
    enum tv_err rc = TV_OK;
    char *blobs = tv_path_join(folder, "blobs");
    char *whole = NULL;
    char **names = NULL;
    size_t n = 0;

    if (blobs == NULL) {
        rc = no_memory(err);
        goto out;
    }
    if (!tv_path_is_dir(blobs))
        goto out;
    TV_TRY(tv_dir_list(blobs, err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        const size_t len = strlen(names[i]);
        bool done = false;

        if (len <= k || strcmp(names[i] + len - k, suffix) != 0)
            continue;
        whole = tv_asprintf("%s/%.*s", blobs, (int)(len - k), names[i]);
        if (whole == NULL) {
            rc = no_memory(err);
            goto out;
        }
        /* A leftover of an attempt that was repeated later does no harm. */
        done = tv_path_exists(whole);
        tv_free(whole);
        whole = NULL;
        if (done)
            continue;
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s: its download into %s has not finished (%s)",
                          repo, folder, names[i]);
        hint_download(err, repo, rev);
        goto out;
    }
out:
    tv_free(whole);
    tv_dir_list_free(names, n);
    tv_free(blobs);
    return rc;
}

/* A snapshot is complete enough when its config is there or known absent. */
static enum tv_err check_snapshot(const char *folder, const char *commit,
                                  const char *snapshot, const char *repo,
                                  const char *rev, struct tv_error *err)
{
    static const char *const configs[] = {"config.json", "adapter_config.json"};
    bool known = false;

    for (size_t i = 0; i < 2 && !known; i++) {
        char *here = tv_path_join(snapshot, configs[i]);
        char *absent =
            tv_asprintf("%s/.no_exist/%s/%s", folder, commit, configs[i]);

        if (here == NULL || absent == NULL) {
            tv_free(here);
            tv_free(absent);
            return no_memory(err);
        }
        known = tv_path_exists(here) || tv_path_exists(absent);
        tv_free(here);
        tv_free(absent);
    }
    if (known)
        return TV_OK;
    tv_error_set(err, TV_E_INPUT,
                 "%s: %s has neither config.json nor adapter_config.json", repo,
                 snapshot);
    hint_download(err, repo, rev);
    return TV_E_INPUT;
}

/* *out NULL when the repository is not in the cache at all. */
static enum tv_err find_in_cache(const char *repo, const char *revision,
                                 struct tv_error *err, char **out)
{
    enum tv_err rc = TV_OK;
    const char *rev = revision == NULL ? "main" : revision;
    char *root = cache_root();
    char *name = folder_name(repo);
    char *folder = NULL;
    char *commit = NULL;
    char *snapshot = NULL;

    *out = NULL;
    if (root == NULL || name == NULL ||
        (folder = tv_path_join(root, name)) == NULL) {
        rc = no_memory(err);
        goto out;
    }
    if (!tv_path_is_dir(folder))
        goto out;
    if (!is_revision(rev)) {
        rc = tv_error_set(err, TV_E_USAGE, "%s: '%s' is not a revision", repo,
                          rev);
        goto out;
    }
    TV_TRY(find_commit(folder, rev, err, &commit));
    if (commit != NULL) {
        snapshot = tv_asprintf("%s/snapshots/%s", folder, commit);
        if (snapshot == NULL) {
            rc = no_memory(err);
            goto out;
        }
    }
    if (snapshot == NULL || !tv_path_is_dir(snapshot)) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s: revision %s is not in the cache %s", repo, rev,
                          folder);
        hint_download(err, repo, revision);
        goto out;
    }
    TV_TRY(check_incomplete(folder, repo, revision, err));
    TV_TRY(check_snapshot(folder, commit, snapshot, repo, revision, err));
    *out = snapshot;
    snapshot = NULL;
out:
    tv_free(snapshot);
    tv_free(commit);
    tv_free(folder);
    tv_free(name);
    tv_free(root);
    return rc;
}

/* ---- directories
 * --------------------------------------------------------------- */

static enum tv_err holds_config(const char *dir, bool *yes,
                                struct tv_error *err)
{
    static const char *const marks[] = {
        "config.json",       "adapter_config.json",
        "model.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json"};

    *yes = false;
    for (size_t i = 0; i < sizeof marks / sizeof *marks && !*yes; i++) {
        char *p = tv_path_join(dir, marks[i]);

        if (p == NULL)
            return no_memory(err);
        *yes = tv_path_exists(p);
        tv_free(p);
    }
    return TV_OK;
}

/* Model directories at most `depth` levels below dir; the first one found is
 * kept in *hit, all are counted. */
static enum tv_err find_nested(const char *dir, unsigned depth, char **hit,
                               size_t *n_hits, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;
    char *sub = NULL;

    TV_TRY(tv_dir_list(dir, err, &names, &n));
    for (size_t i = 0; i < n && i < 1000 && *n_hits < 2; i++) {
        if (names[i][0] == '.')
            continue;
        sub = tv_path_join(dir, names[i]);
        if (sub == NULL) {
            rc = no_memory(err);
            goto out;
        }
        if (tv_path_is_dir(sub)) {
            bool here = false;

            TV_TRY(holds_config(sub, &here, err));
            if (here) {
                ++*n_hits;
                if (*hit == NULL) {
                    *hit = sub;
                    sub = NULL;
                }
            } else if (depth > 1) {
                TV_TRY(find_nested(sub, depth - 1, hit, n_hits, err));
            }
        }
        tv_free(sub);
        sub = NULL;
    }
out:
    tv_free(sub);
    tv_dir_list_free(names, n);
    return rc;
}

/* Data sets of notebook services hold the model some levels down: a directory
 * without a model of its own stands for the only one inside it. */
static enum tv_err descend(char **path, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *hit = NULL;
    size_t n = 0;
    bool here = false;

    if (!tv_path_is_dir(*path))
        goto out;
    TV_TRY(holds_config(*path, &here, err));
    if (here)
        goto out;
    rc = find_nested(*path, NESTED_DEPTH, &hit, &n, err);
    if (rc == TV_E_NOMEM)
        goto out;
    rc = TV_OK; /* a directory that cannot be read is none */
    if (n == 1) {
        tv_free(*path);
        *path = hit;
        hit = NULL;
    } else if (n > 1) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s holds several models; name the one you mean",
                          *path);
    } /* n == 0: opening it will say what is missing */
out:
    tv_free(hit);
    return rc;
}

/* ---- parts
 * ---------------------------------------------------------------------- */

/* Existing path of s, literally or with ~ and $VAR expanded; NULL if none. */
static enum tv_err as_path(const char *s, struct tv_error *err, char **out)
{
    char *p = NULL;

    *out = NULL;
    if (s[0] == '\0')
        return TV_OK;
    p = tv_strdup(s);
    if (p != NULL && !tv_path_exists(p) && (s[0] == '~' || strchr(s, '$'))) {
        tv_free(p);
        p = expand(s);
    }
    if (p == NULL)
        return no_memory(err);
    if (!tv_path_exists(p)) {
        tv_free(p);
        return TV_OK;
    }
    *out = p;
    return TV_OK;
}

static bool is_object_name(const char *s)
{
    if (s[0] == '\0' || strlen(s) > TV_OBJECT_NAME_MAX)
        return false;
    for (; *s != '\0'; s++) {
        if (!repo_char(*s))
            return false;
    }
    return true;
}

enum outcome { FOUND, ABSENT, FAILED };

static enum outcome finish(struct tv_ref_part *p, char *path, char *text,
                           char *revision, double weight, struct tv_error *err)
{
    p->path = path;
    p->text = text;
    p->revision = revision;
    p->weight = weight;
    return descend(&p->path, err) == TV_OK ? FOUND : FAILED;
}

/* text[@REV], without weight. */
static enum outcome resolve_named(const char *text, double weight,
                                  struct tv_ref_part *p, struct tv_error *err)
{
    const char *at = strrchr(text, '@');
    char *path = NULL;
    char *name = NULL;
    char *rev = NULL;

    if (strncmp(text, "store:", 6) == 0) {
        if (!is_object_name(text + 6)) {
            tv_error_set(err, TV_E_USAGE,
                         "'%s': object names are made of letters, digits, "
                         "'.', '_' and '-'",
                         text);
            return FAILED;
        }
        p->text = tv_strdup(text);
        p->object = tv_strdup(text + 6);
        p->weight = weight;
        if (p->text != NULL && p->object != NULL)
            return FOUND;
        no_memory(err);
        return FAILED;
    }
    if (as_path(text, err, &path) != TV_OK)
        return FAILED;
    if (path != NULL) {
        name = tv_strdup(text);
        if (name != NULL)
            return finish(p, path, name, NULL, weight, err);
        tv_free(path);
        no_memory(err);
        return FAILED;
    }
    if (at != NULL && strchr(at, '*') != NULL)
        return ABSENT; /* "@main*0.5": a weight follows the revision */
    name = at == NULL ? tv_strdup(text) : tv_strndup(text, (size_t)(at - text));
    rev = at == NULL ? NULL : tv_strdup(at + 1);
    if (name == NULL || (at != NULL && rev == NULL)) {
        no_memory(err);
        goto failed;
    }
    if (at != NULL && as_path(name, err, &path) != TV_OK)
        goto failed;
    if (path == NULL && is_repo_name(name)) {
        if (rev != NULL && rev[0] == '\0') {
            tv_error_set(err, TV_E_USAGE, "'%s': empty revision", text);
            goto failed;
        }
        if (find_in_cache(name, rev, err, &path) != TV_OK)
            goto failed;
    }
    if (path != NULL)
        return finish(p, path, name, rev, weight, err);
    tv_free(name);
    tv_free(rev);
    return ABSENT;
failed:
    tv_free(name);
    tv_free(rev);
    tv_free(path);
    return FAILED;
}

/* text[@REV][*WEIGHT]; only adapters have a weight. */
static enum outcome resolve_part(const char *text, bool adapter,
                                 struct tv_ref_part *p, struct tv_error *err)
{
    const char *star = adapter ? strrchr(text, '*') : NULL;
    enum outcome what = ABSENT;
    char *end = NULL;
    double weight = 1.0;
    char *head = NULL;

    /* An object name cannot hold a '*'; a path can, and then it wins. */
    if (star == NULL || strncmp(text, "store:", 6) != 0)
        what = resolve_named(text, 1.0, p, err);
    if (what != ABSENT || star == NULL)
        return what;
    weight = strtod(star + 1, &end);
    if (end == star + 1 || *end != '\0' || !isfinite(weight)) {
        tv_error_set(err, TV_E_USAGE, "'%s': '%s' is not a weight", text,
                     star + 1);
        return FAILED;
    }
    head = tv_strndup(text, (size_t)(star - text));
    if (head == NULL) {
        no_memory(err);
        return FAILED;
    }
    what = resolve_named(head, weight, p, err);
    tv_free(head);
    return what;
}

/* ---- whole references
 * ------------------------------------------------------------- */

struct splitter {
    char *text;              /* copy; cut at '+' while a piece is tried */
    size_t begin[PARTS_MAX]; /* pieces of the plain split */
    size_t end[PARTS_MAX];
    size_t n;
    bool hopeless[PARTS_MAX]; /* no resolution begins at this piece */
    struct tv_ref_part parts[PARTS_MAX];
    size_t n_parts;
};

/* Resolves pieces [first, n), longest piece first. */
static enum outcome resolve_from(struct splitter *s, size_t first,
                                 struct tv_error *err)
{
    const size_t mine = s->n_parts;

    if (first == s->n)
        return FOUND;
    if (s->hopeless[first])
        return ABSENT;
    for (size_t last = s->n; last > first; last--) {
        const size_t cut = s->end[last - 1];
        const char saved = s->text[cut];
        enum outcome what = ABSENT;

        s->text[cut] = '\0';
        what = resolve_part(s->text + s->begin[first], mine > 0,
                            &s->parts[mine], err);
        s->text[cut] = saved;
        /* A longer piece that only looks like an error is no error yet. */
        if (what == FAILED && last - first > 1 && err->code != TV_E_NOMEM) {
            part_clear(&s->parts[mine]);
            what = ABSENT;
        }
        if (what == FAILED)
            return FAILED;
        if (what == FOUND) {
            s->n_parts = mine + 1;
            what = resolve_from(s, last, err);
            if (what != ABSENT)
                return what;
            part_clear(&s->parts[mine]);
            s->n_parts = mine;
        }
    }
    s->hopeless[first] = true;
    return ABSENT;
}

static enum tv_err split(struct splitter *s, struct tv_error *err)
{
    size_t at = 0;

    for (;;) {
        const char *plus = strchr(s->text + at, '+');
        const size_t end =
            plus == NULL ? strlen(s->text) : (size_t)(plus - s->text);

        if (s->n == PARTS_MAX)
            return tv_error_set(err, TV_E_USAGE,
                                "a model reference has more than %u parts",
                                PARTS_MAX);
        s->begin[s->n] = at;
        s->end[s->n++] = end;
        if (plus == NULL)
            return TV_OK;
        at = end + 1;
    }
}

/* Repositories of the cache that are written almost like this one. */
static bool hint_cached(struct tv_error *err, const char *name,
                        const char *root)
{
    static const char start[] = "models--";
    char **names = NULL;
    const char **repos = NULL;
    size_t n = 0, n_repos = 0;
    const char *near = NULL;

    if (root == NULL || tv_dir_list(root, NULL, &names, &n) != TV_OK)
        return false;
    repos = (const char **)tv_calloc(n + 1, sizeof *repos);
    for (size_t i = 0; repos != NULL && i < n; i++) {
        char *repo = names[i] + sizeof start - 1;
        char *dashes = NULL;
        if (strncmp(names[i], start, sizeof start - 1) != 0)
            continue;
        dashes = strstr(repo, "--");
        if (dashes != NULL) {
            *dashes = '/';
            memmove(dashes + 1, dashes + 2, strlen(dashes + 2) + 1);
        }
        repos[n_repos++] = repo;
    }
    if (repos != NULL)
        near = tv_suggest(name, repos, n_repos);
    if (near != NULL)
        tv_error_hint(err, "did you mean '%s'?", near);
    tv_free((void *)repos);
    tv_dir_list_free(names, n);
    return near != NULL;
}

/* text[@REV][*WEIGHT] of the reference `whole`, which is nowhere. */
static enum tv_err not_found(const char *text, const char *whole, bool adapter,
                             const char *root, struct tv_error *err)
{
    enum tv_err rc = TV_E_INPUT;
    struct tv_shown shown, all;
    char *name = tv_strdup(text);
    char *star = name == NULL || !adapter ? NULL : strrchr(name, '*');
    char *at = NULL;
    bool hub = false, link = false;
    struct stat st;

    if (name == NULL)
        return no_memory(err);
    if (star != NULL)
        *star = '\0';
    at = strchr(name, '@');
    if (at != NULL) {
        *at++ = '\0';
        if (strchr(at, '@') != NULL || name[0] == '\0' || at[0] == '\0') {
            rc = tv_error_set(err, TV_E_USAGE,
                              "'%s' is not of the form MODEL@REVISION",
                              tv_show(text, &shown));
            goto out;
        }
    }
    hub = is_repo_name(name);
    link = tv_sys()->lstat(name, &st) == 0;
    hub = hub && !link;
    tv_error_set(err, rc, "%s '%s'%s%s%s not found: %s%s%s",
                 adapter ? "adapter" : "model", tv_show(text, &shown),
                 strcmp(text, whole) == 0 ? "" : " of '",
                 strcmp(text, whole) == 0 ? "" : tv_show(whole, &all),
                 strcmp(text, whole) == 0 ? "" : "'",
                 link ? "it is a symbolic link that leads nowhere"
                      : "no such path",
                 hub ? ", and not in the Hugging Face cache " : "",
                 !hub           ? ""
                 : root == NULL ? "?"
                                : root);
    tv_error_hint_path(err, name);
    if (err->hint[0] == '\0' && hub && strchr(name, '/') != NULL &&
        !hint_cached(err, name, root))
        hint_download(err, name, at);
out:
    tv_free(name);
    return rc;
}

/* Says which piece of the plain split is missing, and where it was looked
 * for. */
static enum tv_err explain(struct splitter *s, const char *whole,
                           struct tv_error *err)
{
    char *root = cache_root();
    enum tv_err rc = TV_E_INPUT;

    for (size_t i = 0; i < s->n; i++) {
        struct tv_ref_part p;
        enum outcome what = ABSENT;
        const char *text = s->text + s->begin[i];

        memset(&p, 0, sizeof p);
        s->text[s->end[i]] = '\0';
        if (text[0] == '\0') {
            rc = tv_error_set(err, TV_E_USAGE,
                              "a model reference has an empty part at a '+'");
            goto out;
        }
        what = resolve_part(text, i > 0, &p, err);
        part_clear(&p);
        if (what == FOUND)
            continue;
        if (what == FAILED) {
            rc = err->code;
            goto out;
        }
        rc = not_found(text, whole, i > 0, root, err);
        goto out;
    }
out:
    tv_free(root);
    return rc;
}

enum tv_err tv_ref_resolve(const char *text, struct tv_error *err,
                           struct tv_ref **out)
{
    enum tv_err rc = TV_OK;
    struct tv_error local;
    struct tv_error *e = err == NULL ? &local : err;
    struct splitter *s = (struct splitter *)tv_calloc(1, sizeof *s);
    struct tv_ref *r = (struct tv_ref *)tv_calloc(1, sizeof *r);

    *out = NULL;
    if (s == NULL || r == NULL || (s->text = tv_strdup(text)) == NULL ||
        (r->text = tv_strdup(text)) == NULL) {
        rc = no_memory(e);
        goto out;
    }
    if (text[0] == '\0') {
        rc = tv_error_set(e, TV_E_USAGE, "empty model reference");
        goto out;
    }
    TV_TRY(split(s, e));
    tv_error_clear(e);
    switch (resolve_from(s, 0, e)) {
    case FOUND:
        break;
    case FAILED:
        rc = e->code;
        goto out;
    case ABSENT:
        rc = explain(s, text, e);
        goto out;
    }
    tv_error_clear(e);
    if (s->n_parts > 1) {
        r->adapters = (struct tv_ref_part *)tv_calloc(s->n_parts - 1,
                                                      sizeof *r->adapters);
        if (r->adapters == NULL) {
            rc = no_memory(e);
            goto out;
        }
    }
    r->model = s->parts[0];
    for (size_t i = 1; i < s->n_parts; i++)
        r->adapters[r->n_adapters++] = s->parts[i];
    s->n_parts = 0;
    memset(s->parts, 0, sizeof s->parts);
    *out = r;
    r = NULL;
out:
    if (s != NULL) {
        for (size_t i = 0; i < PARTS_MAX; i++)
            part_clear(&s->parts[i]);
        tv_free(s->text);
        tv_free(s);
    }
    tv_ref_free(r);
    return rc;
}
