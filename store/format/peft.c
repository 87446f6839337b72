/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peft.c - adapter_config.json of PEFT: what changes numbers, and nothing else.
 *
 * r and alpha of a module come from the first entry p of rank_pattern or
 * alpha_pattern for which (.*\.)?(p)$ matches the module's name from its start
 * (PEFT's get_pattern_key), else from the config. PEFT before 0.14 looked one
 * key up in both, and wanted a dot before it; those files are known by the keys
 * that a config of its time has (all are written). target_modules (list,
 * regular expression or "all-linear"), layers_to_transform and exclude_modules
 * decide what is trained, not what a file means: the tensors that are there do.
 *
 * A LoRA variant that was trained with other arithmetic loads without complaint
 * and gives wrong weights, so whatever is not recognised as harmless is refused
 * by name: first by the config's keys, then (adapter.c) by the tensors' names.
 */
#include <string.h>

#ifdef TV_HAVE_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/parse.h"

#define PATTERNS_MAX      4096u
#define PATTERN_BYTES_MAX 1024u
#define NAMES_MAX         4096u
#define TOKENS_MAX        (1u << 20)
#define RANK_MAX          (1u << 20)
/* Steps that one match may take: stops patterns that would run for years. */
#define MATCH_STEPS_MAX   100000u

/* ---- patterns --------------------------------------------------------------
 */

#ifdef TV_HAVE_PCRE2

static enum tv_err pattern_compile(struct tv_lora_pattern *p, const char *label,
                                   struct tv_error *err)
{
    char *whole =
        tv_asprintf(p->joint ? ".*\\.%s$" : "(.*\\.)?(%s)$", p->pattern);
    int code = 0;
    PCRE2_SIZE at = 0;
    struct tv_shown shown;

    if (whole == NULL)
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
    p->code = pcre2_compile(
        (PCRE2_SPTR)whole, PCRE2_ZERO_TERMINATED,
        PCRE2_ANCHORED | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
    tv_free(whole);
    if (p->code == NULL)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: '%s' is not a regular expression", label,
                            tv_show(p->pattern, &shown));
    return TV_OK;
}

static void pattern_free(struct tv_lora_pattern *p)
{
    pcre2_code_free((pcre2_code *)p->code);
}

static enum tv_err pattern_matches(const struct tv_lora_pattern *p,
                                   const char *label, const char *module,
                                   bool *yes, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const pcre2_code *code = (const pcre2_code *)p->code;
    pcre2_match_data *data = pcre2_match_data_create_from_pattern(code, NULL);
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    int n = 0;
    struct tv_shown shown;

    if (data == NULL || limits == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory matching '%s'",
                          tv_show(p->pattern, &shown));
        goto out;
    }
    pcre2_set_match_limit(limits, MATCH_STEPS_MAX);
    pcre2_set_depth_limit(limits, MATCH_STEPS_MAX);
    n = pcre2_match(code, (PCRE2_SPTR)module, PCRE2_ZERO_TERMINATED, 0, 0, data,
                    limits);
    if (n < 0 && n != PCRE2_ERROR_NOMATCH) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s: the pattern '%s' takes too long to match", label,
                          tv_show(p->pattern, &shown));
        goto out;
    }
    *yes = n > 0;
out:
    pcre2_match_context_free(limits);
    pcre2_match_data_free(data);
    return rc;
}

#else

/* Without PCRE2: plain module names, which is what PEFT itself writes. */
static enum tv_err pattern_compile(struct tv_lora_pattern *p, const char *label,
                                   struct tv_error *err)
{
    struct tv_shown shown;

    if (strpbrk(p->pattern, "\\^$*+?()[]{}|") == NULL)
        return TV_OK;
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "%s: this build has no PCRE2 and cannot match '%s'",
                        label, tv_show(p->pattern, &shown));
}

static void pattern_free(struct tv_lora_pattern *p)
{
    (void)p;
}

static enum tv_err pattern_matches(const struct tv_lora_pattern *p,
                                   const char *label, const char *module,
                                   bool *yes, struct tv_error *err)
{
    const size_t n = strlen(module);
    const size_t k = strlen(p->pattern);

    (void)label;
    (void)err;
    *yes = n >= k &&
           ((n == k && !p->joint) || (n > k && module[n - k - 1] == '.'));
    for (size_t i = 0; *yes && i < k; i++)
        *yes = p->pattern[i] == '.' || p->pattern[i] == module[n - k + i];
    return TV_OK;
}

#endif

static void patterns_free(struct tv_lora_pattern *p, size_t n)
{
    for (size_t i = 0; p != NULL && i < n; i++) {
        pattern_free(&p[i]);
        tv_free(p[i].pattern);
    }
    tv_free(p);
}

static void names_free(struct tv_lora_names *x)
{
    for (size_t i = 0; x->items != NULL && i < x->n; i++)
        tv_free(x->items[i]);
    tv_free(x->items);
}

void tv_lora_config_free(struct tv_lora_config *c)
{
    if (c == NULL)
        return;
    patterns_free(c->ranks, c->n_ranks);
    patterns_free(c->alphas, c->n_alphas);
    names_free(&c->saved);
    names_free(&c->parameters);
    for (size_t i = 0; c->tokens != NULL && i < c->n_tokens; i++) {
        tv_free(c->tokens[i].module);
        tv_free(c->tokens[i].ids);
    }
    tv_free(c->tokens);
    tv_free(c->label);
    tv_free(c);
}

/* ---- adapter_config.json
 * ------------------------------------------------------ */

/* Off: absent, null, false, or an empty list, object or string. */
static bool is_off(const json_t *v)
{
    return v == NULL || json_is_null(v) || json_is_false(v) ||
           (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0) ||
           (json_is_string(v) && json_string_length(v) == 0);
}

static enum tv_err unsupported(const char *label, const char *key,
                               const char *what, struct tv_error *err)
{
    return tv_error_set(err, TV_E_UNSUPPORTED, "%s: %s (%s) is not supported",
                        label, what, key);
}

static enum tv_err check_variant(const json_t *root, const char *label,
                                 struct tv_error *err)
{
    static const struct {
        const char *key, *what;
    } refused[] = {
        {"kasa_config", "KaSA"},
        {"use_kasa", "KaSA"},
        {"use_qalora", "QA-LoRA"},
        {"use_bdlora", "BD-LoRA"},
        {"bdlora_config", "BD-LoRA"},
        {"alora_invocation_tokens", "activated LoRA"},
        {"arrow_config", "Arrow routing"},
        {"layer_replication", "layer replication"},
    };

    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        if (!is_off(json_object_get(root, refused[i].key)))
            return unsupported(label, refused[i].key, refused[i].what, err);
    }
    return TV_OK;
}

static bool begins_with(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

/* Initialisations that subtract the first factors from the base need that base;
 * the others leave it alone. */
static enum tv_err check_init(const json_t *root, const char *label,
                              struct tv_error *err)
{
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal",
                                           "mica"};
    const json_t *v = json_object_get(root, "init_lora_weights");
    struct tv_shown shown;
    char low[32] = {0};

    if (v == NULL || json_is_boolean(v) || json_is_null(v))
        return TV_OK;
    if (!json_is_string(v))
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: init_lora_weights is neither a boolean nor a "
                            "string",
                            label);
    for (size_t i = 0; i + 1 < sizeof low && json_string_value(v)[i]; i++) {
        const char c = json_string_value(v)[i];

        low[i] = (char)(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    }
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        if (strcmp(low, harmless[i]) == 0)
            return TV_OK;
    }
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "%s: init_lora_weights \"%s\" is not supported: such "
                        "adapters hold only against a changed base",
                        label, tv_show(json_string_value(v), &shown));
}

static enum tv_err check_rest(const json_t *root, const char *label,
                              struct tv_error *err)
{
    /* Used while training only, or bound to a refused initialisation. */
    static const char *const harmless[] = {"corda_config",    "eva_config",
                                           "loftq_config",    "lora_ga_config",
                                           "megatron_config", "runtime_config"};
    const char *key = NULL;
    json_t *v = NULL;

    json_object_foreach((json_t *)(uintptr_t)root, key, v)
    {
        const size_t n = strlen(key);
        bool known = false;
        struct tv_shown shown;

        if (is_off(v))
            continue;
        if (begins_with(key, "use_") && json_is_true(v) &&
            strcmp(key, "use_rslora") != 0 && strcmp(key, "use_dora") != 0)
            return unsupported(label, tv_show(key, &shown),
                               "an unknown LoRA variant", err);
        if (n < 8 || strcmp(key + n - 7, "_config") != 0)
            continue;
        for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
            known = known || strcmp(key, harmless[i]) == 0;
        if (!known)
            return unsupported(label, tv_show(key, &shown),
                               "an unknown LoRA variant", err);
    }
    return TV_OK;
}

static enum tv_err check_config(const json_t *root, const char *label,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const json_t *v = json_object_get(root, "peft_type");
    struct tv_shown shown;

    if (v != NULL && !json_is_string(v))
        return tv_error_set(err, TV_E_CORRUPT, "%s: peft_type is no string",
                            label);
    if (v != NULL && strcmp(json_string_value(v), "LORA") != 0)
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "%s: peft_type %s is not supported; only LORA is",
                            label, tv_show(json_string_value(v), &shown));
    TV_TRY(check_variant(root, label, err));
    TV_TRY(check_init(root, label, err));
    TV_TRY(check_rest(root, label, err));
out:
    return rc;
}

static enum tv_err read_bool(const json_t *root, const char *key,
                             const char *label, bool *out, struct tv_error *err)
{
    const json_t *v = json_object_get(root, key);

    *out = json_is_true(v);
    if (v == NULL || json_is_null(v) || json_is_boolean(v))
        return TV_OK;
    return tv_error_set(err, TV_E_CORRUPT, "%s: %s is no boolean", label, key);
}

static bool is_rank(const json_t *v)
{
    return json_is_integer(v) && json_integer_value(v) > 0 &&
           json_integer_value(v) <= RANK_MAX;
}

static enum tv_err read_patterns(const json_t *root, const char *key,
                                 bool ranks, bool joint, const char *label,
                                 struct tv_lora_pattern **out, size_t *n,
                                 struct tv_error *err)
{
    const json_t *map = json_object_get(root, key);
    const char *name = NULL;
    json_t *v = NULL;

    if (is_off(map))
        return TV_OK;
    if (!json_is_object(map) || json_object_size(map) > PATTERNS_MAX)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: %s is no object of at most %u entries", label,
                            key, PATTERNS_MAX);
    *out = (struct tv_lora_pattern *)tv_calloc(json_object_size(map),
                                               sizeof **out);
    if (*out == NULL)
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
    json_object_foreach((json_t *)(uintptr_t)map, name, v)
    {
        struct tv_lora_pattern *p = &(*out)[*n];
        enum tv_err rc = TV_OK;
        struct tv_shown shown;

        if (ranks ? !is_rank(v) : !json_is_number(v))
            return tv_error_set(err, TV_E_CORRUPT, "%s: %s '%s' is no %s",
                                label, key, tv_show(name, &shown),
                                ranks ? "rank" : "number");
        if (strlen(name) > PATTERN_BYTES_MAX)
            return tv_error_set(err, TV_E_CORRUPT, "%s: %s '%s' is too long",
                                label, key, tv_show(name, &shown));
        p->value = json_number_value(v);
        p->joint = joint;
        p->pattern = tv_strdup(name);
        ++*n;
        if (p->pattern == NULL)
            return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
        rc = pattern_compile(p, label, err);
        if (rc != TV_OK)
            return rc;
    }
    return TV_OK;
}

/* A list of names, or one name; "all-linear" and the like stay one. */
static enum tv_err read_names(const json_t *root, const char *key,
                              const char *label, struct tv_lora_names *out,
                              struct tv_error *err)
{
    const json_t *v = json_object_get(root, key);
    const size_t n = json_is_array(v) ? json_array_size(v) : 1;

    if (is_off(v))
        return TV_OK;
    if ((!json_is_array(v) && !json_is_string(v)) || n > NAMES_MAX)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: %s is no list of at most %u names", label, key,
                            NAMES_MAX);
    out->items = (char **)tv_calloc(n, sizeof *out->items);
    if (out->items == NULL)
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
    for (size_t i = 0; i < n; i++) {
        const json_t *one = json_is_array(v) ? json_array_get(v, i) : v;

        if (!json_is_string(one))
            return tv_error_set(err, TV_E_CORRUPT, "%s: %s holds no names",
                                label, key);
        out->items[i] = tv_strdup(json_string_value(one));
        if (out->items[i] == NULL)
            return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
        out->n++;
    }
    return TV_OK;
}

static enum tv_err read_token_list(const json_t *v, const char *module,
                                   const char *label,
                                   struct tv_lora_tokens *out,
                                   struct tv_error *err)
{
    const size_t n = json_array_size(v);

    if (!json_is_array(v) || n == 0 || n > TOKENS_MAX)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: trainable_token_indices is no list of at most "
                            "%u numbers",
                            label, TOKENS_MAX);
    out->ids = (uint64_t *)tv_calloc(n, sizeof *out->ids);
    if (module != NULL)
        out->module = tv_strdup(module);
    if (out->ids == NULL || (module != NULL && out->module == NULL))
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
    for (size_t i = 0; i < n; i++) {
        const json_t *one = json_array_get(v, i);

        if (!json_is_integer(one) || json_integer_value(one) < 0)
            return tv_error_set(err, TV_E_CORRUPT,
                                "%s: trainable_token_indices holds something "
                                "that is no token id",
                                label);
        out->ids[i] = (uint64_t)json_integer_value(one);
    }
    out->n = n;
    return TV_OK;
}

/* A list for the input embedding, or lists by module. */
static enum tv_err read_tokens(const json_t *root, struct tv_lora_config *c,
                               struct tv_error *err)
{
    const json_t *v = json_object_get(root, "trainable_token_indices");
    const size_t n = json_is_object(v) ? json_object_size(v) : 1;
    const char *name = NULL;
    json_t *one = NULL;

    if (is_off(v))
        return TV_OK;
    if (n > NAMES_MAX)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: trainable_token_indices has more than %u "
                            "entries",
                            c->label, NAMES_MAX);
    c->tokens = (struct tv_lora_tokens *)tv_calloc(n, sizeof *c->tokens);
    if (c->tokens == NULL)
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", c->label);
    if (!json_is_object(v)) {
        c->n_tokens = 1;
        return read_token_list(v, NULL, c->label, &c->tokens[0], err);
    }
    json_object_foreach((json_t *)(uintptr_t)v, name, one)
    {
        enum tv_err rc = TV_OK;

        c->n_tokens++;
        rc = read_token_list(one, name, c->label, &c->tokens[c->n_tokens - 1],
                             err);
        if (rc != TV_OK)
            return rc;
    }
    return TV_OK;
}

static enum tv_err read_bias(const json_t *root, struct tv_lora_config *c,
                             struct tv_error *err)
{
    const json_t *v = json_object_get(root, "bias");
    const char *s = json_string_value(v);
    struct tv_shown shown;

    if (is_off(v) || (s != NULL && strcmp(s, "none") == 0))
        return TV_OK;
    c->bias =
        s != NULL && (strcmp(s, "all") == 0 || strcmp(s, "lora_only") == 0);
    if (c->bias)
        return TV_OK;
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "%s: bias \"%s\" is neither none, all nor lora_only",
                        c->label, s == NULL ? "?" : tv_show(s, &shown));
}

enum tv_err tv_lora_config_parse(const char *data, size_t n, const char *label,
                                 struct tv_error *err,
                                 struct tv_lora_config **out)
{
    enum tv_err rc = TV_OK;
    json_t *root = NULL;
    const json_t *v = NULL;
    struct tv_lora_config *c = NULL;

    *out = NULL;
    TV_TRY(tv_json_load(data, n, label, 0, &tv_json_side_limits, err, &root));
    TV_TRY(check_config(root, label, err));
    c = (struct tv_lora_config *)tv_calloc(1, sizeof *c);
    if (c == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
        goto out;
    }
    c->label = tv_strdup(label);
    if (c->label == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
        goto out;
    }
    /* PEFT's defaults, for configs that leave them out. */
    c->r = 8;
    c->alpha = 8;
    v = json_object_get(root, "r");
    if (v != NULL) {
        if (!is_rank(v)) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: r is no rank between 1 and %u", label,
                              RANK_MAX);
            goto out;
        }
        c->r = (uint64_t)json_integer_value(v);
    }
    v = json_object_get(root, "lora_alpha");
    if (v != NULL) {
        if (!json_is_number(v)) {
            rc = tv_error_set(err, TV_E_CORRUPT, "%s: lora_alpha is no number",
                              label);
            goto out;
        }
        c->alpha = json_number_value(v);
    }
    TV_TRY(read_bool(root, "use_rslora", label, &c->rslora, err));
    TV_TRY(read_bool(root, "fan_in_fan_out", label, &c->fan_in_fan_out, err));
    TV_TRY(read_bool(root, "use_dora", label, &c->dora, err));
    TV_TRY(read_bool(root, "lora_bias", label, &c->lora_bias, err));
    TV_TRY(read_bias(root, c, err));
    TV_TRY(read_names(root, "modules_to_save", label, &c->saved, err));
    TV_TRY(read_names(root, "target_parameters", label, &c->parameters, err));
    TV_TRY(read_tokens(root, c, err));
    /* Written by all versions from 0.7 on; by all from 0.14 on. */
    c->joint_patterns = json_object_get(root, "loftq_config") != NULL &&
                        json_object_get(root, "lora_bias") == NULL;
    TV_TRY(read_patterns(root, "rank_pattern", true, c->joint_patterns, label,
                         &c->ranks, &c->n_ranks, err));
    TV_TRY(read_patterns(root, "alpha_pattern", false, c->joint_patterns, label,
                         &c->alphas, &c->n_alphas, err));
    *out = c;
    c = NULL;
out:
    json_decref(root);
    tv_lora_config_free(c);
    return rc;
}

static enum tv_err first_match(const struct tv_lora_pattern *p, size_t n,
                               const char *label, const char *module,
                               const struct tv_lora_pattern **found,
                               struct tv_error *err)
{
    *found = NULL;
    for (size_t i = 0; i < n; i++) {
        bool yes = false;
        const enum tv_err rc = pattern_matches(&p[i], label, module, &yes, err);

        if (rc != TV_OK)
            return rc;
        if (yes) {
            *found = &p[i];
            return TV_OK;
        }
    }
    return TV_OK;
}

static const struct tv_lora_pattern *entry_of(const struct tv_lora_pattern *p,
                                              size_t n, const char *key)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(p[i].pattern, key) == 0)
            return &p[i];
    return NULL;
}

enum tv_err tv_lora_config_for(const struct tv_lora_config *c,
                               const char *module, uint64_t *r, double *alpha,
                               struct tv_error *err)
{
    const struct tv_lora_pattern *rank = NULL, *a = NULL;
    enum tv_err rc = TV_OK;

    TV_TRY(first_match(c->ranks, c->n_ranks, c->label, module, &rank, err));
    if (rank == NULL || !c->joint_patterns)
        TV_TRY(first_match(c->alphas, c->n_alphas, c->label, module, &a, err));
    if (c->joint_patterns) {
        const char *key = rank ? rank->pattern : a ? a->pattern : module;
        rank = entry_of(c->ranks, c->n_ranks, key);
        a = entry_of(c->alphas, c->n_alphas, key);
    }
    *r = rank ? (uint64_t)rank->value : c->r;
    *alpha = a ? a->value : c->alpha;
out:
    return rc;
}
