/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter.c - the tensors of a PEFT adapter as changes of base tensors.
 *
 * For a module with factors A (r, in) and B (out, r) the weight W (out, in)
 * becomes W + s B A (Hu et al., arXiv 2106.09685), with s = alpha / r, or
 * alpha / sqrt(r) for rslora (Kalajdzievski, arXiv 2312.03732). DoRA (Liu et
 * al., arXiv 2402.09353) scales the rows of that sum to trained norms. What
 * lies in a file under which name (m: the module, after "base_model.model."):
 *
 *   m.lora_A.weight, m.lora_B.weight             linear, Conv1D, convolutions
 *   m.lora_embedding_A, m.lora_embedding_B       embedding, W is [vocab, dim]
 *   m.lora_magnitude_vector                      DoRA
 *   m.lora_B.bias                                lora_bias: added to m.bias
 *   m.token_adapter.trainable_tokens_delta       rows of an embedding (they
 *                                                are values, not differences)
 *   m.modules_to_save.weight, m.weight, m.bias   values that replace the base's
 *   m.base_layer.weight, m.base_layer.bias       the same of wrapped modules
 *   m.original_module.weight                     the base's before training:
 *                                                not read
 *   m.[base_layer.]*lora_A.weight                stacked experts, one level of
 *                                                base_layer per parameter
 *
 * ".default" behind a mark is the adapter's name in older files. Shapes and
 * ranks are checked here, once; whatever reads an adapter relies on them.
 */
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/parse.h"
#include "tv/text.h"

static bool begins_with(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

struct tv_adapter {
    tv_input *in;
    struct tv_lora_config *config;
    struct tv_adapter_module *modules; /* in layer order */
    size_t n, cap;
};

void tv_adapter_close(tv_adapter *a)
{
    if (a == NULL)
        return;
    for (size_t i = 0; a->modules != NULL && i < a->n; i++) {
        tv_free((void *)(uintptr_t)a->modules[i].module);
        tv_free((void *)(uintptr_t)a->modules[i].target);
    }
    tv_free(a->modules);
    tv_lora_config_free(a->config);
    tv_free(a);
}

tv_input *tv_adapter_input(const tv_adapter *a)
{
    return a->in;
}

size_t tv_adapter_count(const tv_adapter *a)
{
    return a->n;
}

const struct tv_adapter_module *tv_adapter_module(const tv_adapter *a, size_t i)
{
    assert(i < a->n);
    return &a->modules[i];
}

/* ---- names ---------------------------------------------------------------
 */

enum part {
    PART_A,
    PART_B,
    PART_EMBED_A,
    PART_EMBED_B,
    PART_MAGNITUDE,
    PART_BIAS,
    PART_ROWS,
    PART_SAVED, /* its suffix is the parameter's name */
};

struct entry { /* a tensor of the file */
    char *module;
    const char *suffix; /* of PART_SAVED: behind the module, without the dot */
    enum part part;
    unsigned depth; /* levels of base_layer */
    const struct tv_input_tensor *t;
};

static enum tv_err bad_tensor(const tv_input *in, const char *name,
                              enum tv_err code, const char *what,
                              struct tv_error *err)
{
    struct tv_shown shown;

    return tv_error_set(err, code, "%s: tensor '%s' %s", tv_input_label(in),
                        tv_show(name, &shown), what);
}

static enum tv_err refuse_tensor(const tv_input *in, const char *name,
                                 struct tv_error *err)
{
    static const struct {
        const char *part, *what;
    } kinds[] = {
        {"lora_A.bias", "a bias in lora_A"},
        {"lora_A.default.bias", "a bias in lora_A"},
        {"lora_diag", "KaSA"},
        {"token_adapter", "this part of trained tokens"},
        {"lora_", "an unknown LoRA variant"},
        {"", "a fully trained tensor that neither modules_to_save nor bias in "
             "adapter_config.json name"},
    };
    struct tv_shown shown;

    for (size_t i = 0;; i++) {
        if (strstr(name, kinds[i].part) != NULL)
            return tv_error_set(
                err, TV_E_UNSUPPORTED, "%s: tensor '%s': %s is not supported",
                tv_input_label(in), tv_show(name, &shown), kinds[i].what);
    }
}

/* True when s is `want` behind any number of ".default". */
static bool is_tail(const char *s, const char *want)
{
    static const char name[] = ".default";

    if (strcmp(s, want) == 0)
        return true;
    return begins_with(s, name) && strcmp(s + sizeof name - 1, want) == 0;
}

static bool find_mark(const char *name, enum part *part, size_t *at)
{
    static const struct {
        const char *mark, *tail;
        enum part part;
    } marks[] = {
        {".lora_A", ".weight", PART_A},
        {".lora_B", ".weight", PART_B},
        {".lora_B", ".bias", PART_BIAS},
        {".lora_embedding_A", "", PART_EMBED_A},
        {".lora_embedding_B", "", PART_EMBED_B},
        {".lora_magnitude_vector", "", PART_MAGNITUDE},
        {".lora_magnitude_vector", ".weight", PART_MAGNITUDE},
        {".token_adapter.trainable_tokens_delta", "", PART_ROWS},
    };

    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++) {
        const char *hit = strstr(name, marks[i].mark);

        if (hit == NULL || hit == name ||
            !is_tail(hit + strlen(marks[i].mark), marks[i].tail))
            continue;
        *part = marks[i].part;
        *at = (size_t)(hit - name);
        return true;
    }
    return false;
}

/* Does a name of modules_to_save name a module that this tensor is in? */
static bool is_saved(const struct tv_lora_config *c, const char *name)
{
    /* PEFT adds these two itself when their vocabulary was changed. */
    static const char *const always[] = {"embed_tokens", "lm_head"};
    const size_t n_always = sizeof always / sizeof *always;

    for (size_t i = 0; i < c->saved.n + n_always; i++) {
        const char *want =
            i < n_always ? always[i] : c->saved.items[i - n_always];
        const size_t n = strlen(want);

        for (const char *s = name; n > 0 && (s = strstr(s, want)) != NULL; s++)
            if (s[n] == '.')
                return true;
    }
    return false;
}

/* Removes every ".base_layer" component. */
static unsigned strip_base_layers(char *module)
{
    static const char mark[] = ".base_layer";
    const size_t n = sizeof mark - 1;
    unsigned depth = 0;
    char *s = module;

    while ((s = strstr(s, mark)) != NULL) {
        if (s[n] != '\0' && s[n] != '.') {
            s++;
            continue;
        }
        memmove(s, s + n, strlen(s + n) + 1);
        depth++;
    }
    return depth;
}

static enum tv_err parse_name(const tv_adapter *a,
                              const struct tv_input_tensor *t, struct entry *e,
                              struct tv_error *err)
{
    static const char prefix[] = "base_model.model.";
    static const char saved[] = ".modules_to_save.";
    const char *name = t->name;
    const char *hit = NULL;
    size_t at = 0;

    e->t = t;
    if (begins_with(name, prefix) && name[sizeof prefix - 1] != '\0')
        name += sizeof prefix - 1;
    if (!find_mark(name, &e->part, &at)) {
        const char *dot = strrchr(name, '.');

        e->part = PART_SAVED;
        if (strstr(name, "lora_") != NULL || dot == NULL || dot == name ||
            strstr(name, "token_adapter") != NULL)
            return refuse_tensor(a->in, t->name, err);
        if ((hit = strstr(name, saved)) != NULL && hit > name) {
            at = (size_t)(hit - name);
            e->suffix = hit + sizeof saved - 1;
            if (begins_with(e->suffix, "default."))
                e->suffix += 8;
        } else if (strstr(name, ".base_layer.") != NULL ||
                   (a->config->bias && strcmp(dot, ".bias") == 0) ||
                   is_saved(a->config, name)) {
            at = (size_t)(dot - name);
            e->suffix = dot + 1;
        } else {
            return refuse_tensor(a->in, t->name, err);
        }
    }
    e->module = tv_strndup(name, at);
    if (e->module == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    e->depth = strip_base_layers(e->module);
    if (e->part == PART_SAVED)
        e->depth = 0;
    return TV_OK;
}

static int compare_entries(const void *a, const void *b)
{
    const struct entry *x = (const struct entry *)a;
    const struct entry *y = (const struct entry *)b;
    const int c = tv_name_compare(x->module, y->module);

    if (c != 0)
        return c;
    if (x->depth != y->depth)
        return x->depth < y->depth ? -1 : 1;
    if (x->part != y->part)
        return x->part < y->part ? -1 : 1;
    return strcmp(x->t->name, y->t->name);
}

/* ---- changes -------------------------------------------------------------
 */

struct group { /* what belongs to one module at one level */
    const char *module;
    unsigned depth;
    const struct tv_input_tensor *part[PART_SAVED];
};

static enum tv_err add_change(tv_adapter *a, const char *module,
                              const char *suffix, enum tv_change_kind kind,
                              struct tv_adapter_module **out,
                              struct tv_error *err)
{
    struct tv_adapter_module *m = &a->modules[a->n];

    assert(a->n < a->cap);
    m->kind = kind;
    m->module = tv_strdup(module);
    m->target = tv_asprintf("%s.%s", module, suffix);
    a->n++; /* what was allocated is freed with the adapter */
    if (m->module == NULL || m->target == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    *out = m;
    return TV_OK;
}

static enum tv_err check_matrix(const tv_input *in,
                                const struct tv_input_tensor *t,
                                struct tv_error *err)
{
    if (t->rank < 2 || t->n_elems == 0)
        return bad_tensor(in, t->name, TV_E_CORRUPT,
                          "is no matrix with elements", err);
    if (!tv_dtype_is_math(t->dtype))
        return bad_tensor(in, t->name, TV_E_UNSUPPORTED,
                          "is neither F32, F16 nor BF16", err);
    return TV_OK;
}

static enum tv_err check_factors(const tv_input *in,
                                 const struct tv_input_tensor *a,
                                 const struct tv_input_tensor *b,
                                 struct tv_error *err)
{
    enum tv_err rc = check_matrix(in, a, err);

    if (rc == TV_OK)
        rc = check_matrix(in, b, err);
    if (rc != TV_OK)
        return rc;
    if (a->rank != b->rank)
        return bad_tensor(in, b->name, TV_E_CORRUPT,
                          "has not as many dimensions as its lora_A", err);
    for (unsigned d = 2; d < b->rank; d++)
        if (b->shape[d] != 1)
            return bad_tensor(in, b->name, TV_E_UNSUPPORTED,
                              "is a convolution that is wider than 1", err);
    if (a->shape[0] != b->shape[1]) {
        struct tv_shown shown;

        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: tensor '%s' has rank %" PRIu64
                            ", its lora_B has %" PRIu64,
                            tv_input_label(in), tv_show(a->name, &shown),
                            a->shape[0], b->shape[1]);
    }
    return TV_OK;
}

/* Does a name of target_parameters, "mlp.experts.down_proj", name a parameter
 * of this module? *parameter is its last component. */
static bool is_parameter_of(const char *name, const char *module,
                            const char **parameter)
{
    const char *dot = strrchr(name, '.');
    const size_t n = dot == NULL ? 0 : (size_t)(dot - name);
    const size_t k = strlen(module);

    *parameter = dot == NULL ? name : dot + 1;
    return n == 0 || (k >= n && memcmp(module + k - n, name, n) == 0 &&
                      (k == n || module[k - n - 1] == '.'));
}

/* Rank and alpha of the parameters of a module that may be meant: they must
 * agree, since a file does not say which level of base_layer is which. */
static enum tv_err parameter_rank(const tv_adapter *a, const char *module,
                                  size_t *n, uint64_t *r, double *alpha,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_lora_names *names = &a->config->parameters;

    *n = 0;
    for (size_t i = 0; i < names->n; i++) {
        const char *parameter = NULL;
        uint64_t one = 0;
        double al = 0;
        char *key = NULL;

        if (!is_parameter_of(names->items[i], module, &parameter))
            continue;
        key = tv_asprintf("%s.%s", module, parameter);
        if (key == NULL)
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
        rc = tv_lora_config_for(a->config, key, &one, &al, err);
        tv_free(key);
        if (rc != TV_OK)
            return rc;
        if (*n > 0 && (one != *r || al != *alpha)) {
            struct tv_shown shown;
            return tv_error_set(err, TV_E_UNSUPPORTED,
                                "%s: parameters of '%s' with different ranks "
                                "or alphas are not supported",
                                tv_input_label(a->in), tv_show(module, &shown));
        }
        *r = one;
        *alpha = al;
        ++*n;
    }
    return TV_OK;
}

static enum tv_err check_rank(const tv_adapter *a,
                              const struct tv_adapter_module *m, uint64_t r,
                              struct tv_error *err)
{
    const uint64_t have = m->a->shape[0];
    struct tv_shown shown;

    if (m->n_experts > 0 ? have % r == 0 : have == r)
        return TV_OK;
    return tv_error_set(err, TV_E_INPUT,
                        "%s: tensor '%s' has rank %" PRIu64
                        ", adapter_config.json says %" PRIu64 "%s",
                        tv_input_label(a->in), tv_show(m->a->name, &shown),
                        have, r, m->n_experts > 0 ? " for each expert" : "");
}

static enum tv_err check_magnitude(const tv_adapter *a,
                                   const struct tv_adapter_module *m,
                                   struct tv_error *err)
{
    const struct tv_input_tensor *t = m->magnitude;

    if (a->config->dora && t == NULL)
        return bad_tensor(a->in, m->a->name, TV_E_INPUT,
                          "has no lora_magnitude_vector beside it, but "
                          "adapter_config.json says DoRA (use_dora)",
                          err);
    if (t == NULL)
        return TV_OK;
    if (!a->config->dora)
        return bad_tensor(a->in, t->name, TV_E_INPUT,
                          "belongs to DoRA, which adapter_config.json does "
                          "not say (use_dora)",
                          err);
    if (m->n_experts > 0)
        return bad_tensor(a->in, t->name, TV_E_UNSUPPORTED,
                          "is DoRA on a parameter, which is not supported",
                          err);
    if (!tv_dtype_is_math(t->dtype))
        return bad_tensor(a->in, t->name, TV_E_UNSUPPORTED,
                          "is neither F32, F16 nor BF16", err);
    if (t->n_elems != m->out_features)
        return bad_tensor(a->in, t->name, TV_E_CORRUPT,
                          "has not one element per output feature", err);
    return TV_OK;
}

static enum tv_err add_low_rank(tv_adapter *a, const struct group *g,
                                struct tv_error *err)
{
    const bool embedding = g->part[PART_EMBED_A] != NULL;
    const enum part pa = embedding ? PART_EMBED_A : PART_A;
    const enum part pb = embedding ? PART_EMBED_B : PART_B;
    struct tv_adapter_module *m = NULL;
    char suffix[32] = "weight";
    size_t n_parameters = 0;
    uint64_t r = 0;
    double alpha = 0;
    enum tv_err rc = TV_OK;

    TV_TRY(check_factors(a->in, g->part[pa], g->part[pb], err));
    TV_TRY(parameter_rank(a, g->module, &n_parameters, &r, &alpha, err));
    if (n_parameters == 0 && g->depth > 0) {
        rc = bad_tensor(a->in, g->part[pa]->name, TV_E_UNSUPPORTED,
                        "adapts expert parameters that target_parameters in "
                        "adapter_config.json does not name",
                        err);
        goto out;
    }
    if (n_parameters == 0)
        TV_TRY(tv_lora_config_for(a->config, g->module, &r, &alpha, err));
    else
        (void)snprintf(suffix, sizeof suffix, "<parameter %u>", g->depth);
    TV_TRY(add_change(a, g->module, suffix, TV_CHANGE_LOW_RANK, &m, err));
    m->a = g->part[pa];
    m->b = g->part[pb];
    m->magnitude = g->part[PART_MAGNITUDE];
    m->n_experts = n_parameters > 0 ? m->a->shape[0] / r : 0;
    m->alpha = alpha;
    m->r = r;
    TV_TRY(check_rank(a, m, r, err));
    m->in_features = m->a->n_elems / m->a->shape[0];
    m->out_features = m->b->shape[0];
    m->scaling =
        a->config->rslora ? alpha / sqrt((double)r) : alpha / (double)r;
    m->transposed = embedding || a->config->fan_in_fan_out;
    TV_TRY(check_magnitude(a, m, err));
out:
    return rc;
}

static enum tv_err add_bias(tv_adapter *a, const struct group *g,
                            struct tv_error *err)
{
    const struct tv_input_tensor *t = g->part[PART_BIAS];
    struct tv_adapter_module *m = NULL;
    enum tv_err rc = TV_OK;

    if (!a->config->lora_bias) {
        rc = bad_tensor(a->in, t->name, TV_E_INPUT,
                        "is a bias that adapter_config.json does not have "
                        "(lora_bias)",
                        err);
        goto out;
    }
    if (t->rank != 1 || t->n_elems != g->part[PART_B]->shape[0]) {
        rc = bad_tensor(a->in, t->name, TV_E_CORRUPT,
                        "has not one element per output feature", err);
        goto out;
    }
    TV_TRY(add_change(a, g->module, "bias", TV_CHANGE_ADD, &m, err));
    m->a = t;
    /* The module's own scaling; its low-rank change was added just before. */
    m->alpha = a->modules[a->n - 2].alpha;
    m->scaling = a->modules[a->n - 2].scaling;
    m->r = a->modules[a->n - 2].r;
out:
    return rc;
}

static enum tv_err add_rows(tv_adapter *a, const struct group *g,
                            struct tv_error *err)
{
    const struct tv_input_tensor *t = g->part[PART_ROWS];
    const struct tv_lora_tokens *ids = NULL;
    struct tv_adapter_module *m = NULL;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < a->config->n_tokens && ids == NULL; i++) {
        const struct tv_lora_tokens *x = &a->config->tokens[i];
        const size_t k = strlen(g->module);
        const size_t n = x->module == NULL ? 0 : strlen(x->module);

        if (n <= k && memcmp(g->module + k - n, n ? x->module : "", n) == 0)
            ids = x;
    }
    if (ids == NULL) {
        rc = bad_tensor(a->in, t->name, TV_E_INPUT,
                        "has trained tokens that trainable_token_indices in "
                        "adapter_config.json does not list",
                        err);
        goto out;
    }
    TV_TRY(check_matrix(a->in, t, err));
    if (t->rank != 2 || t->shape[0] != ids->n) {
        rc = bad_tensor(a->in, t->name, TV_E_CORRUPT,
                        "has not one row per token of "
                        "trainable_token_indices",
                        err);
        goto out;
    }
    TV_TRY(add_change(a, g->module, "weight", TV_CHANGE_ROWS, &m, err));
    m->a = t;
    m->rows = ids->ids;
    m->n_rows = ids->n;
out:
    return rc;
}

static enum tv_err add_saved(tv_adapter *a, const struct entry *e,
                             struct tv_error *err)
{
    struct tv_adapter_module *m = NULL;
    enum tv_err rc = TV_OK;

    if (!tv_dtype_is_math(e->t->dtype)) {
        rc = bad_tensor(a->in, e->t->name, TV_E_UNSUPPORTED,
                        "is neither F32, F16 nor BF16", err);
        goto out;
    }
    TV_TRY(add_change(a, e->module, e->suffix, TV_CHANGE_REPLACE, &m, err));
    m->a = e->t;
out:
    return rc;
}

/* Both factors or none; what hangs on them not alone. */
static enum tv_err check_complete(const tv_adapter *a, const struct group *g,
                                  struct tv_error *err)
{
    static const struct {
        enum part is, wants;
        const char *what;
    } rules[] = {
        {PART_A, PART_B, "has no lora_B beside it"},
        {PART_B, PART_A, "has no lora_A beside it"},
        {PART_EMBED_A, PART_EMBED_B, "has no lora_embedding_B beside it"},
        {PART_EMBED_B, PART_EMBED_A, "has no lora_embedding_A beside it"},
        {PART_BIAS, PART_B, "has no lora_B beside it"},
    };

    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (g->part[rules[i].is] != NULL && g->part[rules[i].wants] == NULL)
            return bad_tensor(a->in, g->part[rules[i].is]->name, TV_E_CORRUPT,
                              rules[i].what, err);
    if (g->part[PART_MAGNITUDE] != NULL && g->part[PART_A] == NULL &&
        g->part[PART_EMBED_A] == NULL)
        return bad_tensor(a->in, g->part[PART_MAGNITUDE]->name, TV_E_CORRUPT,
                          "has no lora_A beside it", err);
    if (g->part[PART_A] != NULL && g->part[PART_EMBED_A] != NULL)
        return bad_tensor(a->in, g->part[PART_A]->name, TV_E_CORRUPT,
                          "is of a module that has lora_embedding_A too", err);
    if (a->config->lora_bias && g->part[PART_A] != NULL &&
        g->part[PART_BIAS] == NULL)
        return bad_tensor(a->in, g->part[PART_B]->name, TV_E_INPUT,
                          "has no bias beside it, but adapter_config.json "
                          "says lora_bias",
                          err);
    return TV_OK;
}

static enum tv_err add_group(tv_adapter *a, const struct entry *e, size_t n,
                             struct tv_error *err)
{
    struct group g = {.module = e[0].module, .depth = e[0].depth};
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < n; i++) {
        if (e[i].part == PART_SAVED) {
            TV_TRY(add_saved(a, &e[i], err));
            continue;
        }
        if (g.part[e[i].part] != NULL) {
            rc = bad_tensor(a->in, e[i].t->name, TV_E_CORRUPT,
                            "occurs a second time under another spelling", err);
            goto out;
        }
        g.part[e[i].part] = e[i].t;
    }
    TV_TRY(check_complete(a, &g, err));
    if (g.part[PART_A] != NULL || g.part[PART_EMBED_A] != NULL)
        TV_TRY(add_low_rank(a, &g, err));
    if (g.part[PART_BIAS] != NULL)
        TV_TRY(add_bias(a, &g, err));
    if (g.part[PART_ROWS] != NULL)
        TV_TRY(add_rows(a, &g, err));
out:
    return rc;
}

static int compare_modules(const void *a, const void *b)
{
    const struct tv_adapter_module *x = (const struct tv_adapter_module *)a;
    const struct tv_adapter_module *y = (const struct tv_adapter_module *)b;
    const int c = tv_name_compare(x->module, y->module);

    if (c != 0)
        return c;
    if (x->kind != y->kind)
        return x->kind < y->kind ? -1 : 1;
    return strcmp(x->target, y->target);
}

/* The base's own values: peft writes them beside saved modules when the
 * embedding was resized. */
static bool is_original(const struct tv_input_tensor *t)
{
    return strstr(t->name, ".original_module.") != NULL;
}

static enum tv_err same_bytes(tv_input *in, const struct tv_input_tensor *a,
                              const struct tv_input_tensor *b,
                              struct tv_error *err, bool *same)
{
    struct tv_view va;
    struct tv_view vb;
    enum tv_err rc = TV_OK;

    memset(&va, 0, sizeof va);
    memset(&vb, 0, sizeof vb);
    *same = a->dtype == b->dtype && a->rank == b->rank &&
            memcmp(a->shape, b->shape, a->rank * sizeof *a->shape) == 0;
    if (!*same)
        return TV_OK;
    TV_TRY(tv_input_view(in, a, err, &va));
    TV_TRY(tv_input_view(in, b, err, &vb));
    *same = tv_view_equal(&va, &vb);
out:
    tv_input_release(in, &vb);
    tv_input_release(in, &va);
    return rc;
}

static void drop_module(tv_adapter *a, size_t i)
{
    tv_free((void *)(uintptr_t)a->modules[i].module);
    tv_free((void *)(uintptr_t)a->modules[i].target);
    a->n--;
    memmove(&a->modules[i], &a->modules[i + 1],
            (a->n - i) * sizeof *a->modules);
}

static enum tv_err read_tensors(tv_adapter *a, struct tv_error *err)
{
    const size_t n_all = tv_input_count(a->in);
    struct entry *e = (struct entry *)tv_calloc(n_all + 1, sizeof *e);
    size_t n = 0;
    enum tv_err rc = TV_OK;

    a->cap = n_all;
    a->modules =
        (struct tv_adapter_module *)tv_calloc(n_all + 1, sizeof *a->modules);
    if (e == NULL || a->modules == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < n_all; i++) {
        if (is_original(tv_input_tensor(a->in, i)))
            continue;
        n++;
        TV_TRY(parse_name(a, tv_input_tensor(a->in, i), &e[n - 1], err));
    }
    qsort(e, n, sizeof *e, compare_entries);
    for (size_t i = 0, end = 0; i < n; i = end) {
        for (end = i + 1; end < n && e[end].depth == e[i].depth &&
                          strcmp(e[end].module, e[i].module) == 0;)
            end++;
        TV_TRY(add_group(a, &e[i], end - i, err));
    }
    qsort(a->modules, a->n, sizeof *a->modules, compare_modules);
    for (size_t i = 1; i < a->n;) {
        bool twice = compare_modules(&a->modules[i - 1], &a->modules[i]) == 0;
        bool equal = false;
        if (twice && a->modules[i].kind == TV_CHANGE_REPLACE)
            TV_TRY(same_bytes(a->in, a->modules[i - 1].a, a->modules[i].a, err,
                              &equal));
        if (twice && !equal) {
            rc = bad_tensor(a->in, a->modules[i].a->name, TV_E_CORRUPT,
                            "occurs a second time under another spelling", err);
            goto out;
        }
        if (twice)
            drop_module(a, i);
        else
            i++;
    }
out:
    for (size_t i = 0; e != NULL && i < n; i++)
        tv_free(e[i].module);
    tv_free(e);
    return rc;
}

enum tv_err tv_adapter_open(tv_input *in, struct tv_error *err,
                            tv_adapter **out)
{
    enum tv_err rc = TV_OK;
    tv_adapter *a = (tv_adapter *)tv_calloc(1, sizeof *a);
    char *text = NULL;
    size_t n = 0;
    bool found = false;
    char *label = tv_asprintf("%s: adapter_config.json", tv_input_label(in));

    *out = NULL;
    if (a == NULL || label == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    a->in = in;
    TV_TRY(
        tv_input_side_read(in, "adapter_config.json", &found, &text, &n, err));
    if (!found) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s is not an adapter: no adapter_config.json",
                          tv_input_label(in));
        goto out;
    }
    TV_TRY(tv_lora_config_parse(text, n, label, err, &a->config));
    TV_TRY(read_tensors(a, err));
    if (a->n == 0) {
        rc = tv_error_set(err, TV_E_INPUT, "%s: the adapter has no tensors",
                          tv_input_label(in));
        goto out;
    }
    *out = a;
    a = NULL;
out:
    tv_free(label);
    tv_free(text);
    tv_adapter_close(a);
    return rc;
}

/* ---- binding to a base
 * ------------------------------------------------------------ */

struct tail { /* a base tensor, for searching by the end of its name */
    const char *name;
    size_t n;
    size_t index;
};

/* Order of the names read from their ends. */
static int compare_ends(const char *a, size_t n_a, const char *b, size_t n_b)
{
    const size_t n = n_a < n_b ? n_a : n_b;

    for (size_t i = 1; i <= n; i++) {
        const unsigned char x = (unsigned char)a[n_a - i];
        const unsigned char y = (unsigned char)b[n_b - i];

        if (x != y)
            return x < y ? -1 : 1;
    }
    return n_a < n_b ? -1 : n_a > n_b;
}

static int compare_tails(const void *a, const void *b)
{
    const struct tail *x = (const struct tail *)a;
    const struct tail *y = (const struct tail *)b;

    return compare_ends(x->name, x->n, y->name, y->n);
}

static bool ends_in(const struct tail *t, const char *s, size_t n)
{
    return t->n >= n && memcmp(t->name + t->n - n, s, n) == 0 &&
           (t->n == n || t->name[t->n - n - 1] == '.');
}

/* Base tensors that end in the components s: how many (at most 2 are told
 * apart), and the first; a name that is s itself wins alone. */
static size_t find_tails(const struct tail *tails, size_t n, const char *s,
                         size_t *index)
{
    const size_t k = strlen(s);
    size_t lo = 0;
    size_t hi = n;
    size_t hits = 0;

    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;

        if (compare_ends(tails[mid].name, tails[mid].n, s, k) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    for (; lo < n && tails[lo].n >= k &&
           memcmp(tails[lo].name + tails[lo].n - k, s, k) == 0;
         lo++) {
        if (!ends_in(&tails[lo], s, k))
            continue;
        if (hits++ == 0)
            *index = tails[lo].index;
        if (tails[lo].n == k)
            return 1;
        if (hits == 2)
            break;
    }
    return hits;
}

static bool is_number(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (s[i] < '0' || s[i] > '9')
            return false;
    }
    return n > 0;
}

/* Base tensors that a change's target may be: how many, and the first. */
static size_t find_target(const tv_input *base, const struct tail *tails,
                          const char *name, const char *parameter,
                          size_t *target)
{
    const char *s = name;
    size_t hits = 0;

    for (;;) {
        const char *dot = strchr(s, '.');

        /* Without "layers.N" in front a module could be found in another
         * layer, or in a model that it was not made for. */
        if (dot != NULL && is_number(s, (size_t)(dot - s)))
            break;
        hits = find_tails(tails, tv_input_count(base), s, target);
        if (hits > 0 || dot == NULL || dot + 1 >= parameter)
            break;
        s = dot + 1;
    }
    return hits;
}

static const char *shape_text(const struct tv_input_tensor *t, char *dst,
                              size_t cap)
{
    return tv_shape_format(t->shape, t->rank, dst, cap);
}

bool tv_adapter_turned(const struct tv_adapter_module *m,
                       const struct tv_input_tensor *base)
{
    if (m->n_experts > 0 && base->rank == 3)
        return base->shape[1] == m->in_features &&
               base->shape[2] == m->out_features;
    return m->transposed;
}

static uint64_t folded(const struct tv_input_tensor *t)
{
    return t->shape[0] > 0 ? t->n_elems / t->shape[0] : 0;
}

/* Does a product of the factors have the tensor's shape? */
static bool product_fits(const struct tv_adapter_module *m,
                         const struct tv_input_tensor *t)
{
    const uint64_t in = m->in_features;
    const uint64_t out = m->out_features;

    if (m->n_experts > 0 && t->rank == 3)
        return t->shape[0] == m->n_experts &&
               ((t->shape[1] == in && t->shape[2] == out) ||
                (t->shape[1] == out && t->shape[2] == in));
    if (m->n_experts > 1)
        return false;
    if (m->transposed)
        return t->rank == 2 && t->shape[0] == in && t->shape[1] == out;
    if (t->rank < 2 || t->shape[0] != out || folded(t) != in)
        return false;
    for (unsigned d = 1; t->rank > 2 && d < t->rank; d++)
        if (m->a->rank != t->rank || m->a->shape[d] != t->shape[d])
            return false;
    return m->a->rank == t->rank;
}

static bool change_fits(const struct tv_adapter_module *m,
                        const struct tv_input_tensor *t)
{
    if (m->kind == TV_CHANGE_LOW_RANK)
        return product_fits(m, t);
    if (m->kind == TV_CHANGE_ROWS) {
        for (size_t i = 0; i < m->n_rows; i++)
            if (t->rank != 2 || m->rows[i] >= t->shape[0])
                return false;
        return m->a->shape[1] == t->shape[1];
    }
    return t->rank == m->a->rank &&
           memcmp(t->shape, m->a->shape, t->rank * sizeof *t->shape) == 0;
}

static enum tv_err misfit(const tv_adapter *a, const tv_input *base,
                          const struct tv_adapter_module *m,
                          const struct tv_input_tensor *t, struct tv_error *err)
{
    const bool low = m->kind == TV_CHANGE_LOW_RANK;
    const uint64_t want[2] = {m->transposed ? m->in_features : m->out_features,
                              m->transposed ? m->out_features : m->in_features};
    const uint64_t rows = low ? want[0] : m->a->shape[0];
    const uint64_t cols = low ? want[1] : m->a->shape[1];
    char have_text[24 * TV_RANK_MAX + 3];
    char want_text[24 * TV_RANK_MAX + 3];
    char hint[80] = "";
    struct tv_shown shown;

    /* As wide, but longer: trained with more tokens. */
    if (m->kind != TV_CHANGE_ROWS && t->rank == 2 && (low || m->a->rank == 2) &&
        cols == t->shape[1] && rows > t->shape[0])
        (void)snprintf(hint, sizeof hint,
                       "; a base of fewer tokens is resized to %llu rows first",
                       (unsigned long long)rows);
    return tv_error_set(
        err, TV_E_INPUT, "%s: tensor '%s' %s %s%s, but %s in %s is %s%s",
        tv_input_label(a->in), tv_show(m->a->name, &shown),
        m->kind == TV_CHANGE_ROWS ? "has trained tokens" : "changes a weight",
        low ? tv_shape_format(want, 2, want_text, sizeof want_text)
            : shape_text(m->a, want_text, sizeof want_text),
        m->n_experts > 1 ? " of each expert" : "", t->name,
        tv_input_label(base), shape_text(t, have_text, sizeof have_text), hint);
}

static enum tv_err not_one(const tv_adapter *a, const tv_input *base,
                           const struct tv_adapter_module *m, size_t hits,
                           struct tv_error *err)
{
    struct tv_shown tensor, target;

    return tv_error_set(err, TV_E_INPUT,
                        hits == 0 ? "%s: tensor '%s' changes %s, which is not "
                                    "in %s"
                                  : "%s: tensor '%s' changes %s, which could "
                                    "be several tensors of %s",
                        tv_input_label(a->in), tv_show(m->a->name, &tensor),
                        tv_show(m->target, &target), tv_input_label(base));
}

static enum tv_err bind_module(const tv_adapter *a, const tv_input *base,
                               const struct tail *tails,
                               const struct tv_adapter_module *m,
                               size_t *target, struct tv_error *err)
{
    const size_t hits = find_target(base, tails, m->target,
                                    m->target + strlen(m->module) + 1, target);

    if (hits != 1)
        return not_one(a, base, m, hits, err);
    if (!change_fits(m, tv_input_tensor(base, *target)))
        return misfit(a, base, m, tv_input_tensor(base, *target), err);
    return TV_OK;
}

/* Of the parameters that target_parameters names in this module, the one whose
 * shape fits. A file does not say which level is which, so it must be one. */
static enum tv_err bind_parameter(const tv_adapter *a, const tv_input *base,
                                  const struct tail *tails,
                                  const struct tv_adapter_module *m,
                                  size_t *target, struct tv_error *err)
{
    const struct tv_lora_names *names = &a->config->parameters;
    const struct tv_input_tensor *other = NULL;
    size_t fitting = 0;
    struct tv_shown shown;

    for (size_t i = 0; i < names->n; i++) {
        const char *parameter = NULL;
        char *name = NULL;
        size_t at = 0;
        size_t hits = 0;

        if (!is_parameter_of(names->items[i], m->module, &parameter))
            continue;
        name = tv_asprintf("%s.%s", m->module, parameter);
        if (name == NULL)
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
        hits =
            find_target(base, tails, name, name + strlen(m->module) + 1, &at);
        tv_free(name);
        if (hits > 1)
            return not_one(a, base, m, hits, err);
        if (hits == 0 || (fitting > 0 && at == *target))
            continue;
        other = tv_input_tensor(base, at);
        if (!change_fits(m, other))
            continue;
        *target = at;
        fitting++;
    }
    if (fitting == 0 && other != NULL)
        return misfit(a, base, m, other, err);
    if (fitting == 0)
        return not_one(a, base, m, 0, err);
    other = tv_input_tensor(base, *target);
    if (fitting > 1 || (other->rank == 3 && other->shape[1] == other->shape[2]))
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "%s: tensor '%s' fits the parameters of '%s' in "
                            "more than one way, and the file does not say "
                            "which is meant",
                            tv_input_label(a->in), m->a->name,
                            tv_show(m->module, &shown));
    return TV_OK;
}

enum tv_err tv_adapter_bind(const tv_adapter *a, const tv_input *base,
                            size_t *targets, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = tv_input_count(base);
    struct tail *tails = (struct tail *)tv_calloc(n + 1, sizeof *tails);
    /* The change that a tensor was last bound to, counted from 1. */
    size_t *taken = (size_t *)tv_calloc(n + 1, sizeof *taken);

    if (tails == NULL || taken == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        tails[i].name = tv_input_tensor(base, i)->name;
        tails[i].n = strlen(tails[i].name);
        tails[i].index = i;
    }
    qsort(tails, n, sizeof *tails, compare_tails);
    for (size_t i = 0; i < a->n; i++) {
        const struct tv_adapter_module *m = &a->modules[i];
        const struct tv_adapter_module *before = NULL;
        struct tv_shown shown;

        if (m->n_experts > 0)
            TV_TRY(bind_parameter(a, base, tails, m, &targets[i], err));
        else
            TV_TRY(bind_module(a, base, tails, m, &targets[i], err));
        if (taken[targets[i]] > 0)
            before = &a->modules[taken[targets[i]] - 1];
        if (before != NULL && (strcmp(before->module, m->module) != 0 ||
                               before->kind == m->kind)) {
            rc =
                tv_error_set(err, TV_E_INPUT,
                             "%s: module '%s' changes a weight that another "
                             "module changes already",
                             tv_input_label(a->in), tv_show(m->module, &shown));
            goto out;
        }
        taken[targets[i]] = i + 1;
    }
out:
    tv_free(taken);
    tv_free(tails);
    return rc;
}
