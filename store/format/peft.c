/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peft.c - PEFT adapters of the plain LoRA kind: which tensor pairs change
 * which weights, with which factor.
 *
 * For a module with factors A (r, in) and B (out, r) the weight W (out, in)
 * becomes W + s B A, with s = alpha / r, or alpha / sqrt(r) for rslora
 * (Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with
 * LoRA", arXiv 2312.03732). With fan_in_fan_out W is stored transposed. r and
 * alpha of a module come from the first entry p of rank_pattern/alpha_pattern
 * for which (.*\.)?(p)$ matches the module's name from its start (PEFT's
 * get_pattern_key), else from the config; r must agree with the factors.
 *
 * A LoRA variant that was trained with other arithmetic loads without complaint
 * and gives wrong weights, so whatever is not recognised as harmless is refused
 * by name: first by the config's keys, then by the tensors' names.
 */
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
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
#define RANK_MAX          (1u << 20)
/* Steps that one match may take: stops patterns that would run for years. */
#define MATCH_STEPS_MAX   100000u

/* ---- patterns --------------------------------------------------------------
 */

#ifdef TV_HAVE_PCRE2

static enum tv_err pattern_compile(struct tv_lora_pattern *p, const char *label,
                                   struct tv_error *err)
{
    char *whole = tv_asprintf("(.*\\.)?(%s)$", p->pattern);
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
    *yes = n >= k && (n == k || module[n - k - 1] == '.');
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

void tv_lora_config_free(struct tv_lora_config *c)
{
    if (c == NULL)
        return;
    patterns_free(c->ranks, c->n_ranks);
    patterns_free(c->alphas, c->n_alphas);
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
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "%s: %s (%s) is not supported; only plain LoRA and "
                        "rslora are",
                        label, what, key);
}

static enum tv_err check_variant(const json_t *root, const char *label,
                                 struct tv_error *err)
{
    static const struct {
        const char *key, *what;
    } refused[] = {
        {"use_dora", "DoRA"},
        {"lora_bias", "a bias in lora_B"},
        {"modules_to_save", "fully trained modules"},
        {"target_parameters", "LoRA on expert parameters"},
        {"trainable_token_indices", "trained tokens"},
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
            strcmp(key, "use_rslora") != 0)
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
    v = json_object_get(root, "bias");
    if (!is_off(v) &&
        (!json_is_string(v) || strcmp(json_string_value(v), "none") != 0))
        return unsupported(label, "bias", "trained biases", err);
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
                                 bool ranks, const char *label,
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
    TV_TRY(read_patterns(root, "rank_pattern", true, label, &c->ranks,
                         &c->n_ranks, err));
    TV_TRY(read_patterns(root, "alpha_pattern", false, label, &c->alphas,
                         &c->n_alphas, err));
    *out = c;
    c = NULL;
out:
    json_decref(root);
    tv_lora_config_free(c);
    return rc;
}

static enum tv_err first_match(const struct tv_lora_pattern *p, size_t n,
                               const char *label, const char *module,
                               double *value, struct tv_error *err)
{
    for (size_t i = 0; i < n; i++) {
        bool yes = false;
        const enum tv_err rc = pattern_matches(&p[i], label, module, &yes, err);

        if (rc != TV_OK)
            return rc;
        if (yes) {
            *value = p[i].value;
            return TV_OK;
        }
    }
    return TV_OK;
}

enum tv_err tv_lora_config_for(const struct tv_lora_config *c,
                               const char *module, uint64_t *r, double *alpha,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    double rank = (double)c->r;
    double a = c->alpha;

    TV_TRY(first_match(c->ranks, c->n_ranks, c->label, module, &rank, err));
    TV_TRY(first_match(c->alphas, c->n_alphas, c->label, module, &a, err));
    *r = (uint64_t)rank;
    *alpha = a;
out:
    return rc;
}

/* ---- the tensors
 * ---------------------------------------------------------------- */

struct tv_adapter {
    tv_input *in;
    struct tv_lora_config *config;
    struct tv_adapter_module *modules; /* in layer order */
    size_t n;
};

void tv_adapter_close(tv_adapter *a)
{
    if (a == NULL)
        return;
    for (size_t i = 0; a->modules != NULL && i < a->n; i++)
        tv_free((void *)(uintptr_t)a->modules[i].module);
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

enum part { PART_A, PART_B, PART_NONE };

/* Position of ".lora_A." or ".lora_B." when what follows is [default.]weight.
 */
static enum part factor_of(const char *name, size_t *at)
{
    static const char *const marks[] = {".lora_A.", ".lora_B."};

    for (int i = 0; i < 2; i++) {
        const char *hit = strstr(name, marks[i]);
        const char *tail = hit == NULL ? "" : hit + 8;

        if (strcmp(tail, "weight") == 0 ||
            strcmp(tail, "default.weight") == 0) {
            *at = (size_t)(hit - name);
            return i == 0 ? PART_A : PART_B;
        }
    }
    return PART_NONE;
}

static enum tv_err refuse_tensor(const tv_input *in, const char *name,
                                 struct tv_error *err)
{
    static const struct {
        const char *part, *what;
    } kinds[] = {
        {"lora_magnitude_vector", "DoRA"},
        {"lora_embedding_", "LoRA on an embedding"},
        {"lora_A.bias", "a bias in lora_A"},
        {"lora_A.default.bias", "a bias in lora_A"},
        {"lora_B.bias", "a bias in lora_B (lora_bias)"},
        {"lora_B.default.bias", "a bias in lora_B (lora_bias)"},
        {"trainable_tokens", "trained tokens"},
        {"token_adapter", "trained tokens"},
        {".base_layer.", "LoRA on expert parameters, or a saved base layer"},
        {"lora_diag", "KaSA"},
        {"lora_", "an unknown LoRA variant"},
        {"modules_to_save", "a fully trained module (modules_to_save)"},
        {"", "a fully trained tensor (modules_to_save or bias)"},
    };
    struct tv_shown shown;

    for (size_t i = 0;; i++) {
        if (strstr(name, kinds[i].part) != NULL)
            return tv_error_set(
                err, TV_E_UNSUPPORTED, "%s: tensor '%s': %s is not supported",
                tv_input_label(in), tv_show(name, &shown), kinds[i].what);
    }
}

static enum tv_err bad_tensor(const tv_input *in, const char *name,
                              enum tv_err code, const char *what,
                              struct tv_error *err)
{
    struct tv_shown shown;

    return tv_error_set(err, code, "%s: tensor '%s' %s", tv_input_label(in),
                        tv_show(name, &shown), what);
}

/* The other factor of the same module; *out is never NULL on success. */
static enum tv_err partner(const tv_input *in, const char *name, size_t at,
                           const struct tv_input_tensor **out,
                           struct tv_error *err)
{
    char *other = tv_strdup(name);
    const bool is_a = name[at + 6] == 'A';

    if (other == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    other[at + 6] = is_a ? 'B' : 'A';
    *out = tv_input_find(in, other);
    tv_free(other);
    if (*out != NULL)
        return TV_OK;
    return bad_tensor(
        in, name, TV_E_CORRUPT,
        is_a ? "has no lora_B beside it" : "has no lora_A beside it", err);
}

static enum tv_err check_factors(const tv_input *in,
                                 const struct tv_adapter_module *m,
                                 struct tv_error *err)
{
    const struct tv_input_tensor *const both[2] = {m->a, m->b};

    for (int i = 0; i < 2; i++) {
        if (both[i]->rank == 4 || both[i]->rank == 3 || both[i]->rank == 5)
            return bad_tensor(in, both[i]->name, TV_E_UNSUPPORTED,
                              "is LoRA on a convolution, which is not "
                              "supported",
                              err);
        if (both[i]->rank != 2 || both[i]->n_elems == 0)
            return bad_tensor(in, both[i]->name, TV_E_CORRUPT,
                              "is no matrix with elements", err);
        if (!tv_dtype_is_math(both[i]->dtype))
            return bad_tensor(in, both[i]->name, TV_E_UNSUPPORTED,
                              "is neither F32, F16 nor BF16", err);
    }
    if (m->a->shape[0] != m->b->shape[1]) {
        struct tv_shown shown;

        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: tensor '%s' has rank %" PRIu64
                            ", its lora_B has %" PRIu64,
                            tv_input_label(in), tv_show(m->a->name, &shown),
                            m->a->shape[0], m->b->shape[1]);
    }
    return TV_OK;
}

static enum tv_err add_module(tv_adapter *a, const struct tv_input_tensor *t,
                              size_t at, struct tv_error *err)
{
    static const char prefix[] = "base_model.model.";
    enum tv_err rc = TV_OK;
    struct tv_adapter_module *m = &a->modules[a->n];
    const char *name = t->name;
    size_t skip = 0;
    char *module = NULL;
    uint64_t r = 0;

    if (begins_with(name, prefix) && at > sizeof prefix - 1)
        skip = sizeof prefix - 1;
    m->a = t;
    TV_TRY(partner(a->in, name, at, &m->b, err));
    TV_TRY(check_factors(a->in, m, err));
    module = tv_strndup(name + skip, at - skip);
    if (module == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tv_lora_config_for(a->config, module, &r, &m->alpha, err));
    m->r = t->shape[0];
    if (r != m->r) {
        struct tv_shown shown;

        rc =
            tv_error_set(err, TV_E_INPUT,
                         "%s: tensor '%s' has rank %" PRIu64
                         ", adapter_config.json says %" PRIu64,
                         tv_input_label(a->in), tv_show(name, &shown), m->r, r);
        goto out;
    }
    m->in_features = t->shape[1];
    m->out_features = m->b->shape[0];
    m->scaling =
        a->config->rslora ? m->alpha / sqrt((double)r) : m->alpha / (double)r;
    m->transposed = a->config->fan_in_fan_out;
    m->module = module;
    module = NULL;
    a->n++;
out:
    tv_free(module);
    return rc;
}

static int compare_modules(const void *a, const void *b)
{
    return tv_name_compare(((const struct tv_adapter_module *)a)->module,
                           ((const struct tv_adapter_module *)b)->module);
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
    a->modules = (struct tv_adapter_module *)tv_calloc(
        tv_input_count(in) / 2 + 1, sizeof *a->modules);
    if (a->modules == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < tv_input_count(in); i++) {
        const struct tv_input_tensor *t = tv_input_tensor(in, i);
        const struct tv_input_tensor *other = NULL;
        size_t at = 0;
        const enum part part = factor_of(t->name, &at);

        if (part == PART_NONE || strstr(t->name, ".base_layer.") != NULL) {
            rc = refuse_tensor(in, t->name, err);
            goto out;
        }
        TV_TRY(partner(in, t->name, at, &other, err));
        if (part == PART_A)
            TV_TRY(add_module(a, t, at, err));
    }
    if (a->n == 0) {
        rc = tv_error_set(err, TV_E_INPUT, "%s: the adapter has no tensors",
                          tv_input_label(in));
        goto out;
    }
    qsort(a->modules, a->n, sizeof *a->modules, compare_modules);
    for (size_t i = 1; i < a->n; i++) {
        if (strcmp(a->modules[i].module, a->modules[i - 1].module) == 0) {
            rc = bad_tensor(in, a->modules[i].a->name, TV_E_CORRUPT,
                            "occurs a second time under another spelling", err);
            goto out;
        }
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

static enum tv_err bind_module(const tv_adapter *a, const tv_input *base,
                               const struct tail *tails,
                               const struct tv_adapter_module *m,
                               size_t *target, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *name = tv_asprintf("%s.weight", m->module);
    const char *s = name;
    size_t hits = 0;
    struct tv_shown shown;

    if (name == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (;;) {
        const char *dot = strchr(s, '.');

        /* Without "layers.N" in front a module could be found in another
         * layer, or in a model that it was not made for. */
        if (dot != NULL && is_number(s, (size_t)(dot - s)))
            break;
        hits = find_tails(tails, tv_input_count(base), s, target);
        if (hits > 0 || dot == NULL || strcmp(dot, ".weight") == 0)
            break;
        s = dot + 1;
    }
    if (hits == 0)
        rc =
            tv_error_set(err, TV_E_INPUT, "%s: module '%s' has no weight in %s",
                         tv_input_label(a->in), tv_show(m->module, &shown),
                         tv_input_label(base));
    else if (hits > 1)
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s: module '%s' fits several tensors of %s",
                          tv_input_label(a->in), tv_show(m->module, &shown),
                          tv_input_label(base));
    tv_free(name);
    return rc;
}

static enum tv_err check_fit(const tv_adapter *a, const tv_input *base,
                             const struct tv_adapter_module *m, size_t target,
                             struct tv_error *err)
{
    const struct tv_input_tensor *t = tv_input_tensor(base, target);
    const uint64_t rows = m->transposed ? m->in_features : m->out_features;
    const uint64_t cols = m->transposed ? m->out_features : m->in_features;
    const uint64_t want[2] = {rows, cols};
    char have_text[24 * TV_RANK_MAX + 3];
    char want_text[24 * 2 + 3];
    struct tv_shown shown;

    if (t->rank == 2 && t->shape[0] == rows && t->shape[1] == cols)
        return TV_OK;
    return tv_error_set(
        err, TV_E_INPUT,
        "%s: module '%s' changes a weight %s, but %s in %s is %s",
        tv_input_label(a->in), tv_show(m->module, &shown),
        tv_shape_format(want, 2, want_text, sizeof want_text), t->name,
        tv_input_label(base),
        tv_shape_format(t->shape, t->rank, have_text, sizeof have_text));
}

enum tv_err tv_adapter_bind(const tv_adapter *a, const tv_input *base,
                            size_t *targets, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = tv_input_count(base);
    struct tail *tails = (struct tail *)tv_calloc(n + 1, sizeof *tails);
    bool *taken = (bool *)tv_calloc(n + 1, sizeof *taken);

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
        struct tv_shown shown;

        TV_TRY(bind_module(a, base, tails, &a->modules[i], &targets[i], err));
        TV_TRY(check_fit(a, base, &a->modules[i], targets[i], err));
        if (taken[targets[i]]) {
            rc = tv_error_set(err, TV_E_INPUT,
                              "%s: module '%s' changes a weight that another "
                              "module changes already",
                              tv_input_label(a->in),
                              tv_show(a->modules[i].module, &shown));
            goto out;
        }
        taken[targets[i]] = true;
    }
out:
    tv_free(taken);
    tv_free(tails);
    return rc;
}
