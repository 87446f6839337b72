/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_rows.c - rows of the inputs -> rows of the output's vocabulary.
 *
 * For every token and every model: its own row where it has the token; else, or
 * where the recipe forces it, the row the recipe names, else the row of the
 * only model that has the token, else the base's, else the mean of those that
 * have it (of the tensor's sources, else of all models), else zeros. Rows
 * without a token keep what the models have there when none of them has a token
 * there either, else they are the mean of all rows with tokens. Tensors with
 * the same sources share the result.
 */
#include "plan_vocab.h"

#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/text.h"

struct rows_of { /* one source */
    struct tvm_rows rows;
    bool as_is;   /* its rows are the output's */
    size_t *from; /* [n_from] inputs */
    size_t n_from, cap_from;
    size_t cap_runs, cap_items;
};

struct plan_rows_set {
    struct plan_rows_set *next;
    size_t n;
    size_t *inputs;
    struct rows_of *of; /* [n] */
    bool bad;
};

struct maker {
    struct planner *pl;
    struct plan_vocab *v;
    struct plan_rows_set *set;
    int64_t *own;         /* [set->n] rows of one token, -1: none */
    struct tvm_row *have; /* [n_have] who has it: from[] is an input here */
    size_t n_have;
    bool failed; /* out of memory */
};

/* ---- runs ---------------------------------------------------------------- */

/* Arrays in the arena double: half of it is waste, but it lives as long as the
 * plan. */
static void *grown(struct maker *m, void *old, size_t n, size_t *cap,
                   size_t each)
{
    const size_t more = *cap == 0 ? 8 : 2 * *cap;
    void *const p = tvm_arena_get(plan_arena(m->pl), more, each);
    if (p == NULL) {
        m->failed = true;
        return NULL;
    }
    if (n > 0)
        memcpy(p, old, n * each);
    *cap = more;
    return p;
}

static uint32_t from_index(struct maker *m, struct rows_of *r, size_t input)
{
    for (size_t i = 0; i < r->n_from; i++) {
        if (r->from[i] == input)
            return (uint32_t)i;
    }
    if (r->n_from == r->cap_from) {
        void *const p =
            grown(m, r->from, r->n_from, &r->cap_from, sizeof(*r->from));
        if (p == NULL)
            return 0;
        r->from = p;
    }
    r->from[r->n_from] = input;
    return (uint32_t)r->n_from++;
}

static void add_run(struct maker *m, struct rows_of *r, struct tvm_run run)
{
    struct tvm_rows *const rows = &r->rows;
    struct tvm_run *const last =
        rows->n_runs == 0 ? NULL : &rows->runs[rows->n_runs - 1];
    run.first = rows->n_rows;
    rows->n_rows += run.n;
    if (run.is_token)
        rows->n_tokens += run.n;
    rows->pads = rows->pads || run.kind == TVM_RUN_PAD;
    if (last != NULL && last->kind == run.kind && run.kind != TVM_RUN_MEAN &&
        last->is_token == run.is_token &&
        (run.kind != TVM_RUN_ROWS ||
         (last->from == run.from && last->row + last->n == run.row))) {
        last->n += run.n;
        return;
    }
    if (rows->n_runs == r->cap_runs) {
        void *const p = grown(m, rows->runs, rows->n_runs, &r->cap_runs,
                              sizeof(*rows->runs));
        if (p == NULL)
            return;
        rows->runs = p;
    }
    rows->runs[rows->n_runs++] = run;
}

static void add_rows(struct maker *m, struct rows_of *r, size_t input,
                     uint64_t row, uint64_t n, bool is_token)
{
    add_run(m, r,
            (struct tvm_run){.n = n,
                             .kind = TVM_RUN_ROWS,
                             .is_token = is_token,
                             .from = from_index(m, r, input),
                             .row = row});
}

/* ---- tokens -------------------------------------------------------------- */

/* Row of a token in an input, -1 when it has none. */
static int64_t row_of(const struct plan_vocab *v, size_t input, const char *s,
                      size_t n)
{
    const struct tvm_token *const t = tvm_vocab_find(v->of[input].v, s, n);
    return t != NULL && (uint64_t)t->id < v->of[input].rows ? t->id : -1;
}

struct fallback { /* for sources without a row of their own */
    enum tvm_run_kind kind;
    size_t input;
    int64_t row;
};

static void report_rule(struct maker *m, const struct tvm_recipe_token *rule,
                        const char *what)
{
    struct planner *const pl = m->pl;
    const struct tvm_recipe_ref at = {"", rule->line, rule->col};
    char cause[200];
    char token[80];
    m->set->bad = true;
    (void)snprintf(cause, sizeof(cause), "token %.80s %.80s", rule->token,
                   what);
    plan_report(pl, cause, 1, true, TV_E_INPUT, plan_where(pl, &at),
                "token '%s': '%s' %s",
                tv_text_printable(rule->token, token, sizeof(token)),
                rule->model.text, what);
}

/* What the recipe says of a token; false when it says nothing. */
static bool ruled(struct maker *m, const struct plan_token *t,
                  struct fallback *out)
{
    const struct tvm_recipe_token *const rule = t->rule;
    const struct plan_vocab *const v = m->v;
    size_t input = 0;

    if (rule == NULL || rule->from == TVM_TOKEN_DEFAULT)
        return false;
    *out = (struct fallback){.kind = TVM_RUN_ZERO};
    if (rule->from == TVM_TOKEN_ZERO || rule->model.text == NULL)
        return true;
    input = plan_input_find(m->pl, rule->model.text);
    if (input == SIZE_MAX || !m->pl->refs[input].usable) {
        m->set->bad = true;
        return true;
    }
    out->kind = TVM_RUN_ROWS;
    out->input = input;
    if (rule->from == TVM_TOKEN_MODEL) {
        out->row = row_of(v, input, t->s, t->n);
        if (out->row < 0)
            report_rule(m, rule, "has no such token");
    } else if (rule->other != NULL) {
        out->row = row_of(v, input, rule->other, strlen(rule->other));
        if (out->row < 0)
            report_rule(m, rule, "does not have the token to take its row of");
    } else {
        out->row = rule->other_id;
        if ((uint64_t)out->row >= v->of[input].rows)
            report_rule(m, rule, "has no row of that token_id");
    }
    return true;
}

/* Who has the token: sources, or, when none of them has it (a stack, whose
 * tensors over tokens are each of one model), the other models. */
static void find_holders(struct maker *m, const struct plan_token *t)
{
    const struct plan_rows_set *const set = m->set;
    const struct plan_vocab *const v = m->v;

    m->n_have = 0;
    for (size_t i = 0; i < set->n; i++) {
        if (m->own[i] >= 0)
            m->have[m->n_have++] =
                (struct tvm_row){(uint32_t)set->inputs[i], (uint64_t)m->own[i]};
    }
    for (size_t i = 0, n = m->n_have; i < m->pl->plan->n_inputs && n == 0;
         i++) {
        const int64_t row =
            v->of[i].merged ? row_of(v, i, t->s, t->n) : (int64_t)-1;
        if (row >= 0)
            m->have[m->n_have++] = (struct tvm_row){(uint32_t)i, (uint64_t)row};
    }
}

static struct fallback fallback_of(struct maker *m, const struct plan_token *t)
{
    struct fallback f = {.kind = TVM_RUN_ZERO};
    size_t from = 0;

    if (ruled(m, t, &f))
        return f;
    find_holders(m, t);
    if (m->n_have == 0)
        return f;
    for (size_t i = 0; i < m->n_have; i++) {
        if (m->have[i].from == m->v->base)
            from = i;
    }
    f.kind = m->n_have == 1 || m->have[from].from == m->v->base ? TVM_RUN_ROWS
                                                                : TVM_RUN_MEAN;
    f.input = m->have[from].from;
    f.row = (int64_t)m->have[from].row;
    return f;
}

static void add_mean(struct maker *m, struct rows_of *r)
{
    struct tvm_rows *const rows = &r->rows;
    struct tvm_run run = {
        .n = 1, .kind = TVM_RUN_MEAN, .is_token = true, .row = rows->n_items};
    for (size_t i = 0; i < m->n_have; i++) {
        if (rows->n_items == r->cap_items) {
            void *const p = grown(m, rows->items, rows->n_items, &r->cap_items,
                                  sizeof(*rows->items));
            if (p == NULL)
                return;
            rows->items = p;
        }
        rows->items[rows->n_items++] =
            (struct tvm_row){from_index(m, r, m->have[i].from), m->have[i].row};
        run.n_items++;
    }
    add_run(m, r, run);
}

static void add_token(struct maker *m, const struct plan_token *t)
{
    const bool force = t->rule != NULL && t->rule->force;
    int64_t *const own = m->own;
    bool all = true;
    struct fallback f = {.kind = TVM_RUN_ZERO};

    for (size_t i = 0; i < m->set->n; i++) {
        own[i] = row_of(m->v, m->set->inputs[i], t->s, t->n);
        all = all && own[i] >= 0;
    }
    if (force || !all)
        f = fallback_of(m, t);
    for (size_t i = 0; i < m->set->n && !m->set->bad; i++) {
        struct rows_of *const r = &m->set->of[i];
        if (own[i] >= 0 && !force)
            add_rows(m, r, m->set->inputs[i], (uint64_t)own[i], 1, true);
        else if (f.kind == TVM_RUN_ROWS)
            add_rows(m, r, f.input, (uint64_t)f.row, 1, true);
        else if (f.kind == TVM_RUN_MEAN)
            add_mean(m, r);
        else
            add_run(m, r,
                    (struct tvm_run){
                        .n = 1, .kind = TVM_RUN_ZERO, .is_token = true});
    }
}

/* One row that no token has. */
static void add_padding(struct maker *m, uint64_t row)
{
    bool all = m->v->keep_padding;
    for (size_t i = 0; i < m->set->n && all; i++) {
        const struct plan_vocab_of *const of = &m->v->of[m->set->inputs[i]];
        all = row < of->rows && tvm_vocab_at(of->v, (int64_t)row) == NULL;
    }
    for (size_t i = 0; i < m->set->n; i++) {
        if (all)
            add_rows(m, &m->set->of[i], m->set->inputs[i], row, 1, false);
        else
            add_run(m, &m->set->of[i],
                    (struct tvm_run){.n = 1, .kind = TVM_RUN_PAD});
    }
}

/* ---- sets ---------------------------------------------------------------- */

static void finish(struct planner *pl, const struct plan_rows_set *set,
                   size_t source)
{
    struct rows_of *const r = &set->of[source];
    struct tvm_rows *const rows = &r->rows;
    struct tv_buf b;

    r->as_is = rows->n_runs == 0 ||
               (rows->runs[0].kind == TVM_RUN_ROWS && rows->runs[0].row == 0 &&
                r->from[rows->runs[0].from] == set->inputs[source]);
    for (size_t i = 0; i < rows->n_runs && r->as_is; i++) {
        const struct tvm_run *const run = &rows->runs[i];
        r->as_is = run->kind == TVM_RUN_ROWS && run->row == run->first &&
                   r->from[run->from] == set->inputs[source];
    }
    tv_buf_init(&b, 1u << 30);
    tv_buf_le64(&b, rows->n_rows);
    for (size_t i = 0; i < rows->n_runs; i++) {
        const struct tvm_run *const run = &rows->runs[i];
        tv_buf_le64(&b, run->n);
        tv_buf_le32(&b, (uint32_t)run->kind | (run->is_token ? 256u : 0));
        tv_buf_le32(&b, run->from);
        tv_buf_le32(&b, run->n_items);
        tv_buf_le64(&b, run->row);
    }
    for (size_t i = 0; i < rows->n_items; i++) {
        tv_buf_le32(&b, rows->items[i].from);
        tv_buf_le64(&b, rows->items[i].row);
    }
    if (b.failed)
        pl->oom = true;
    else
        rows->hash = tv_hash128(b.data, b.n_bytes);
    tv_buf_free(&b);
}

static enum tv_err set_fill(struct planner *pl, struct plan_rows_set *set)
{
    struct plan_vocab *const v = pl->vocab;
    struct maker m = {.pl = pl, .v = v, .set = set};
    size_t at = 0;

    m.own = tv_calloc(set->n + 1, sizeof(*m.own));
    m.have = tv_calloc(pl->plan->n_inputs + 1, sizeof(*m.have));
    m.failed = m.own == NULL || m.have == NULL;
    /* Its own rows come first in what a source's rows come from. */
    for (size_t i = 0; i < set->n && !m.failed; i++)
        (void)from_index(&m, &set->of[i], set->inputs[i]);
    for (size_t i = 0; i < set->n && v->truncate && !m.failed; i++)
        add_rows(&m, &set->of[i], set->inputs[i], 0, v->n_rows, true);
    for (uint64_t row = 0;
         row < v->n_rows && !v->truncate && !set->bad && !m.failed; row++) {
        while (at < v->n_tokens && (uint64_t)v->tokens[at].id < row)
            at++;
        if (at < v->n_tokens && (uint64_t)v->tokens[at].id == row)
            add_token(&m, &v->tokens[at]);
        else
            add_padding(&m, row);
    }
    tv_free(m.own);
    tv_free(m.have);
    if (m.failed)
        return plan_oom(pl);
    for (size_t i = 0; i < set->n && !set->bad; i++)
        finish(pl, set, i);
    return TV_OK;
}

static enum tv_err set_get(struct planner *pl, const struct tvm_tensor *t,
                           struct plan_rows_set **out)
{
    struct plan_vocab *const v = pl->vocab;
    struct plan_rows_set *set = v->sets;

    for (; set != NULL; set = set->next) {
        bool same = set->n == t->n_sources;
        for (size_t i = 0; i < t->n_sources && same; i++)
            same = set->inputs[i] == t->sources[i].input;
        if (same)
            break;
    }
    if (set == NULL) {
        set = tvm_arena_get(plan_arena(pl), 1, sizeof(*set));
        if (set == NULL)
            return plan_oom(pl);
        set->n = t->n_sources;
        set->inputs =
            tvm_arena_get(plan_arena(pl), set->n, sizeof(*set->inputs));
        set->of = tvm_arena_get(plan_arena(pl), set->n, sizeof(*set->of));
        if (set->inputs == NULL || set->of == NULL)
            return plan_oom(pl);
        for (size_t i = 0; i < set->n; i++)
            set->inputs[i] = t->sources[i].input;
        set->next = v->sets;
        v->sets = set;
        const enum tv_err rc = set_fill(pl, set);
        if (rc != TV_OK)
            return rc;
    }
    *out = set;
    return TV_OK;
}

/* ---- tensors ------------------------------------------------------------- */

/* The tensor of an input that supplies this one, as a source. */
static bool find_from(struct planner *pl, const struct tv_arch_tensor *like,
                      const struct tvm_tensor *t, size_t input,
                      struct tvm_source *out)
{
    const struct tv_arch *const a = pl->plan->inputs[input].arch;
    const struct plan_ref *const ref = &pl->refs[input];
    size_t index = SIZE_MAX;

    for (size_t i = 0; i < t->n_sources; i++) {
        if (t->sources[i].input == input) {
            *out = t->sources[i];
            out->gather = NULL;
            return true;
        }
    }
    if (pl->head_name != NULL && strcmp(t->name, pl->head_name) == 0)
        index = ref->tied ? ref->embed : ref->head;
    for (size_t i = 0; i < a->n_tensors && index == SIZE_MAX; i++) {
        if (strcmp(a->tensors[i].name, like->name) == 0)
            index = i;
    }
    if (index == SIZE_MAX)
        return false;
    plan_source_fill(pl, input, index, out);
    return true;
}

static bool same_row(const struct tv_input_tensor *a,
                     const struct tv_input_tensor *b)
{
    if (a->rank != b->rank)
        return false;
    for (unsigned d = 1; d < a->rank; d++) {
        if (a->shape[d] != b->shape[d])
            return false;
    }
    return true;
}

static enum tv_err gather_one(struct planner *pl,
                              const struct tv_arch_tensor *like,
                              struct tvm_tensor *t, size_t source,
                              const struct rows_of *r, uint64_t cols, bool *ok)
{
    struct tvm_gather *const g = tvm_arena_get(plan_arena(pl), 1, sizeof(*g));
    struct tvm_source *const from =
        tvm_arena_get(plan_arena(pl), r->n_from, sizeof(*from));

    if (g == NULL || from == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < r->n_from; i++) {
        const char *const ref = pl->plan->inputs[r->from[i]].ref;
        if (find_from(pl, like, t, r->from[i], &from[i]) &&
            same_row(from[i].tensor, t->sources[source].tensor) &&
            tv_dtype_is_math(from[i].tensor->dtype))
            continue;
        *ok = false;
        plan_report(pl, "rows of other models", 5, true, TV_E_INPUT, t->name,
                    "rows of tokens are to come from '%s', which has no such "
                    "tensor of the same width",
                    ref);
        return TV_OK;
    }
    g->rows = &r->rows;
    g->cols = cols;
    g->from = from;
    g->n_from = r->n_from;
    t->sources[source].gather = g;
    return TV_OK;
}

enum tv_err plan_rows_gather(struct planner *pl,
                             const struct tv_arch_tensor *like,
                             struct tvm_tensor *t, bool *ok)
{
    struct plan_rows_set *set = NULL;
    uint64_t cols = 1;
    enum tv_err rc = TV_OK;

    TV_TRY(set_get(pl, t, &set));
    if (set->bad) {
        *ok = false;
        goto out;
    }
    for (unsigned d = 1; d < t->rank; d++)
        cols *= t->shape[d]; /* of a tensor that exists */
    for (size_t i = 0; i < set->n; i++) {
        const struct tvm_source *const s = &t->sources[i];
        if (set->of[i].as_is && s->tensor->shape[0] == pl->vocab->n_rows)
            continue;
        if (!tv_dtype_is_math(s->tensor->dtype)) {
            *ok = false;
            plan_report(pl, "vocabulary dtypes", 5, true, TV_E_UNSUPPORTED,
                        t->name,
                        "rows of %s cannot be put in the order of another "
                        "vocabulary",
                        tv_dtype_name(s->tensor->dtype));
            goto out;
        }
        TV_TRY(gather_one(pl, like, t, i, &set->of[i], cols, ok));
    }
    t->shape[0] = pl->vocab->n_rows;
    if (cols > 0 && t->shape[0] > UINT64_MAX / 16 / cols) {
        rc = tv_error_set(pl->err, TV_E_CORRUPT, "the vocabulary is too large");
        goto out;
    }
    t->n_elems = t->shape[0] * cols;
out:
    return rc;
}
