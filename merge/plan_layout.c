/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_layout.c - tensors that an input names or stores in another way than the
 * output: experts, the head, what stands in front of all names.
 *
 * The output has the layout of the base (or first) model. For every layer of
 * an input that has another one, the tensors that the output has are made up
 * here; the input's own are hidden behind them:
 *
 *   one each -> packed   gate_up [E, 2I, H] = gate 0, up 0, gate 1, up 1, ...
 *                        down    [E, H, I]  = down 0, down 1, ...
 *   packed -> one each   rows of the packed tensors
 *   names only           the tensor itself
 *
 * Nothing is copied: made tensors are gathers (gather.h) of rows, and a merge
 * streams them like any other. What cannot be converted is left as it is, with
 * a reason; its names then fit nowhere, which is an error of its own.
 */
#include "gather.h"
#include "plan_parts.h"

#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/text.h"

struct piece { /* a tensor of a mixture */
    struct tv_expert e;
    size_t index;
    int64_t layer;
};

struct convert { /* one layer of one input */
    struct planner *pl;
    size_t input;
    const struct tv_expert_layout *want;
    const char *router;         /* the donor's name for it, or NULL */
    const struct piece *pieces; /* by part, then number */
    size_t n;
    const struct piece *part[TV_EXPERT_PARTS]; /* first of each */
    size_t n_part[TV_EXPERT_PARTS];
};

/* ---- asking ---------------------------------------------------------------
 */

size_t plan_count(const struct planner *pl, size_t input)
{
    return pl->plan->inputs[input].arch->n_tensors + pl->refs[input].n_made;
}

const struct tv_arch_tensor *plan_describe(const struct planner *pl,
                                           size_t input, size_t index)
{
    const struct tv_arch *const a = pl->plan->inputs[input].arch;
    return index < a->n_tensors
               ? &a->tensors[index]
               : &pl->refs[input].made[index - a->n_tensors].like;
}

void plan_layout_free(struct planner *pl)
{
    for (size_t i = 0; pl->refs != NULL && i < pl->cap_refs; i++) {
        tv_free(pl->refs[i].made);
        tv_free(pl->refs[i].hidden);
    }
}

static const struct tv_arch_tensor *described(const struct convert *c,
                                              const struct piece *p)
{
    return plan_describe(c->pl, c->input, p->index);
}

static const struct tv_input_tensor *tensor_of(const struct convert *c,
                                               const struct piece *p)
{
    return tv_input_tensor(c->pl->plan->inputs[c->input].input, p->index);
}

/* ---- making ---------------------------------------------------------------
 */

/* Room for which of an input's own tensors are hidden. */
static enum tv_err want_hidden(struct planner *pl, size_t input)
{
    struct plan_ref *const ref = &pl->refs[input];
    if (ref->hidden == NULL)
        ref->hidden = tv_calloc(pl->plan->inputs[input].arch->n_tensors + 1,
                                sizeof(*ref->hidden));
    return ref->hidden == NULL ? plan_oom(pl) : TV_OK;
}

static enum tv_err append(struct planner *pl, size_t input,
                          const struct plan_made *m)
{
    struct plan_ref *const ref = &pl->refs[input];
    if (ref->n_made == ref->cap_made) {
        const size_t cap = ref->cap_made == 0 ? 64 : 2 * ref->cap_made;
        struct plan_made *const more =
            tv_realloc(ref->made, cap * sizeof(*more));
        if (more == NULL)
            return plan_oom(pl);
        ref->made = more;
        ref->cap_made = cap;
    }
    ref->made[ref->n_made++] = *m;
    return TV_OK;
}

static enum tv_err add_made(struct convert *c, const struct piece *like,
                            enum tv_expert_part part, int64_t number,
                            struct plan_made m)
{
    char *name = NULL;

    m.like = *described(c, like);
    name = tv_expert_name(&m.like, c->want, part, number);
    m.like.name =
        name == NULL ? NULL : tvm_arena_strdup(plan_arena(c->pl), name);
    tv_free(name);
    if (m.like.name == NULL)
        return plan_oom(c->pl);
    return append(c->pl, c->input, &m);
}

/* The router has the donor's name for it, if that is known. */
static enum tv_err add_router(struct convert *c, const struct piece *p)
{
    struct plan_made m = {.like = *described(c, p), .index = p->index};
    if (c->router == NULL)
        return append(c->pl, c->input, &m);
    m.like.name = tvm_arena_fmt(plan_arena(c->pl), "%.*s%s", (int)p->e.name_at,
                                m.like.name, c->router);
    return m.like.name == NULL ? plan_oom(c->pl) : append(c->pl, c->input, &m);
}

static enum tv_err add_renamed(struct convert *c, const struct piece *p)
{
    const struct plan_made m = {.index = p->index};
    return add_made(c, p, p->e.part, p->e.number, m);
}

/* Rows of one width: run i has `each` rows, of from[i] beginning at row_of. */
static struct tvm_rows *rows_make(struct planner *pl, size_t n_runs,
                                  uint64_t each, uint64_t cols, uint64_t row)
{
    struct tvm_rows *const r = tvm_arena_get(plan_arena(pl), 1, sizeof(*r));
    struct tv_buf b;

    if (r == NULL)
        return NULL;
    r->runs = tvm_arena_get(plan_arena(pl), n_runs, sizeof(*r->runs));
    if (r->runs == NULL)
        return NULL;
    r->n_runs = n_runs;
    r->n_rows = n_runs * each;
    tv_buf_init(&b, 256);
    tv_buf_str(&b, "experts");
    tv_buf_le64(&b, n_runs);
    tv_buf_le64(&b, each);
    tv_buf_le64(&b, cols);
    tv_buf_le64(&b, row);
    for (size_t i = 0; i < n_runs; i++) {
        struct tvm_run *const run = &r->runs[i];
        run->first = i * each;
        run->n = each;
        run->kind = TVM_RUN_ROWS;
        run->from = (uint32_t)i;
        run->row = row;
    }
    if (b.failed)
        pl->oom = true;
    else
        r->hash = tv_hash128(b.data, b.n_bytes);
    tv_buf_free(&b);
    return r;
}

/* A made tensor of `like`'s dtype; sizes are those of tensors that exist, or
 * their sums, which are checked. */
static enum tv_err add_gathered(struct convert *c, const struct piece *like,
                                enum tv_expert_part part, int64_t number,
                                const uint64_t *shape, unsigned rank,
                                struct tvm_gather *g)
{
    struct tv_input_tensor *const t =
        tvm_arena_get(plan_arena(c->pl), 1, sizeof(*t));
    const struct plan_made m = {.index = SIZE_MAX, .tensor = t, .gather = g};
    const struct plan_ref *const ref = &c->pl->refs[c->input];
    enum tv_err rc = TV_OK;

    if (t == NULL)
        return plan_oom(c->pl);
    t->dtype = tensor_of(c, like)->dtype;
    t->rank = rank;
    t->contiguous = true;
    t->n_elems = 1;
    for (unsigned d = 0; d < rank; d++) {
        t->shape[d] = shape[d];
        if (!tv_mul_u64(t->n_elems, shape[d], &t->n_elems))
            return tv_error_set(c->pl->err, TV_E_CORRUPT,
                                "the models are too large");
    }
    if (t->n_elems > INT64_MAX / 8)
        return tv_error_set(c->pl->err, TV_E_CORRUPT,
                            "the models are too large");
    t->bytes = t->n_elems * (tv_dtype_bits(t->dtype) / 8u);
    TV_TRY(add_made(c, like, part, number, m));
    t->name = ref->made[ref->n_made - 1].like.name;
out:
    return rc;
}

/* ---- one layer ------------------------------------------------------------
 */

static void refuse(const struct convert *c, const char *why)
{
    plan_report(c->pl, "layouts of experts", 5, true, TV_E_INPUT,
                described(c, &c->pieces[0])->name,
                "the experts of '%s' are stored in another way than those of "
                "the base or first model, and cannot be put in that form: %s",
                c->pl->plan->inputs[c->input].ref, why);
}

static bool same_kind(const struct tv_input_tensor *a,
                      const struct tv_input_tensor *b)
{
    return a->dtype == b->dtype && a->rank == b->rank &&
           memcmp(a->shape, b->shape, a->rank * sizeof(*a->shape)) == 0;
}

/* Are pieces [0, n) of a part experts 0 .. n-1, all alike and matrices? */
static bool complete(const struct convert *c, enum tv_expert_part part,
                     size_t n)
{
    const struct piece *const p = c->part[part];
    if (n == 0 || c->n_part[part] != n || tensor_of(c, p)->rank != 2)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (p[i].e.number != (int64_t)i ||
            !same_kind(tensor_of(c, &p[i]), tensor_of(c, p)))
            return false;
    }
    return true;
}

/* The tensors of parts a and, if not NONE, b of every expert, in turns. */
static enum tv_err pack(struct convert *c, enum tv_expert_part a,
                        enum tv_expert_part b, enum tv_expert_part to)
{
    struct planner *const pl = c->pl;
    const struct piece *const like = c->part[a];
    const size_t n = c->n_part[a];
    const size_t each = b == TV_EXPERT_NONE ? 1 : 2;
    const struct tv_input_tensor *const t = tensor_of(c, like);
    const uint64_t shape[3] = {n, each * t->shape[0], t->shape[1]};
    struct tvm_gather *const g = tvm_arena_get(plan_arena(pl), 1, sizeof(*g));
    struct tvm_source *const from =
        tvm_arena_get(plan_arena(pl), n * each, sizeof(*from));

    if (g == NULL || from == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < n; i++) {
        plan_source_fill(pl, c->input, c->part[a][i].index, &from[i * each]);
        if (each == 2)
            plan_source_fill(pl, c->input, c->part[b][i].index,
                             &from[i * each + 1]);
    }
    g->rows = rows_make(pl, n * each, t->shape[0], t->shape[1], 0);
    if (g->rows == NULL)
        return plan_oom(pl);
    g->cols = t->shape[1];
    g->from = from;
    g->n_from = n * each;
    return add_gathered(c, like, to, -1, shape, 3, g);
}

/* The `which`-th of `of` equal runs of rows of every expert. */
static enum tv_err unpack(struct convert *c, enum tv_expert_part from,
                          enum tv_expert_part to, uint64_t which, uint64_t of)
{
    struct planner *const pl = c->pl;
    const struct piece *const like = c->part[from];
    const struct tv_input_tensor *const t = tensor_of(c, like);
    const uint64_t shape[2] = {t->shape[1] / of, t->shape[2]};
    struct tvm_source *const source =
        tvm_arena_get(plan_arena(pl), 1, sizeof(*source));
    enum tv_err rc = TV_OK;

    if (source == NULL)
        return plan_oom(pl);
    plan_source_fill(pl, c->input, like->index, source);
    for (uint64_t e = 0; e < t->shape[0]; e++) {
        struct tvm_gather *const g =
            tvm_arena_get(plan_arena(pl), 1, sizeof(*g));
        const uint64_t row = e * t->shape[1] + which * shape[0];
        if (g == NULL)
            return plan_oom(pl);
        g->rows = rows_make(pl, 1, shape[0], shape[1], row);
        if (g->rows == NULL)
            return plan_oom(pl);
        g->cols = shape[1];
        g->from = source;
        g->n_from = 1;
        g->used_from = row * shape[1];
        g->n_used = shape[0] * shape[1];
        TV_TRY(add_gathered(c, like, to, (int64_t)e, shape, 2, g));
    }
out:
    return rc;
}

static enum tv_err pack_layer(struct convert *c)
{
    const size_t n = c->n_part[TV_EXPERT_GATE];
    enum tv_err rc = TV_OK;

    if (!complete(c, TV_EXPERT_GATE, n) || !complete(c, TV_EXPERT_UP, n) ||
        !complete(c, TV_EXPERT_DOWN, n)) {
        refuse(c, "some are missing, or their shapes or dtypes differ");
        return TV_OK;
    }
    const struct tv_input_tensor *const gate =
        tensor_of(c, c->part[TV_EXPERT_GATE]);
    if (!same_kind(gate, tensor_of(c, c->part[TV_EXPERT_UP])) ||
        gate->n_elems == 0) {
        refuse(c, "gate and up projections are not alike");
        return TV_OK;
    }
    TV_TRY(pack(c, TV_EXPERT_GATE, TV_EXPERT_UP, TV_EXPERT_GATE_UP));
    TV_TRY(pack(c, TV_EXPERT_DOWN, TV_EXPERT_NONE, TV_EXPERT_DOWNS));
out:
    return rc;
}

static enum tv_err unpack_layer(struct convert *c)
{
    const struct tv_input_tensor *t = NULL;
    enum tv_err rc = TV_OK;

    for (int p = TV_EXPERT_GATE_UP; p <= TV_EXPERT_DOWNS; p++) {
        t = c->n_part[p] == 1 ? tensor_of(c, c->part[p]) : NULL;
        if (t == NULL || t->rank != 3 || t->n_elems == 0 ||
            t->shape[0] > (1u << 20) ||
            (p == TV_EXPERT_GATE_UP && t->shape[1] % 2 != 0)) {
            refuse(c, "the packed tensors are not [experts, rows, columns]");
            return TV_OK;
        }
    }
    TV_TRY(unpack(c, TV_EXPERT_GATE_UP, TV_EXPERT_GATE, 0, 2));
    TV_TRY(unpack(c, TV_EXPERT_GATE_UP, TV_EXPERT_UP, 1, 2));
    TV_TRY(unpack(c, TV_EXPERT_DOWNS, TV_EXPERT_DOWN, 0, 1));
out:
    return rc;
}

static enum tv_err convert_layer(struct convert *c)
{
    struct plan_ref *const ref = &c->pl->refs[c->input];
    const struct tv_expert_layout *have = NULL;
    bool one = true;
    enum tv_err rc = TV_OK;

    memset(c->part, 0, sizeof(c->part));
    memset(c->n_part, 0, sizeof(c->n_part));
    for (size_t i = 0; i < c->n; i++) {
        const struct piece *const p = &c->pieces[i];
        if (c->n_part[p->e.part]++ == 0)
            c->part[p->e.part] = p;
        /* Routers have several names in one layout. */
        if (p->e.layout == NULL || p->e.part == TV_EXPERT_ROUTER)
            continue;
        one = one && (have == NULL || have == p->e.layout);
        have = p->e.layout;
    }
    if (have == NULL || (one && have == c->want))
        return TV_OK; /* a dense layer, or nothing to do */
    if (!one) {
        refuse(c, "the layer has tensors of several layouts");
        return TV_OK;
    }
    if (tv_expert_packed(have) != tv_expert_packed(c->want) &&
        tv_expert_in_first(c->pl->plan->inputs[c->input].arch)) {
        refuse(c, "this architecture packs them transposed, [experts, in, "
                  "out]; save both models in one layout");
        return TV_OK;
    }
    const size_t before = ref->n_made;
    for (size_t i = 0; i < c->n; i++) {
        if (c->pieces[i].e.part == TV_EXPERT_ROUTER)
            TV_TRY(add_router(c, &c->pieces[i]));
        else if (c->pieces[i].e.part == TV_EXPERT_STATICS ||
                 tv_expert_packed(have) == tv_expert_packed(c->want))
            TV_TRY(add_renamed(c, &c->pieces[i]));
    }
    if (tv_expert_packed(have) && !tv_expert_packed(c->want))
        TV_TRY(unpack_layer(c));
    else if (!tv_expert_packed(have) && tv_expert_packed(c->want))
        TV_TRY(pack_layer(c));
    for (size_t i = 0; ref->n_made > before && i < c->n; i++)
        ref->hidden[c->pieces[i].index] = true;
out:
    return rc;
}

/* ---- one input ------------------------------------------------------------
 */

static int piece_compare(const void *a, const void *b)
{
    const struct piece *const x = a;
    const struct piece *const y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    if (x->e.part != y->e.part)
        return x->e.part < y->e.part ? -1 : 1;
    if (x->e.number != y->e.number)
        return x->e.number < y->e.number ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* The layout of the first expert; NULL: the model has none. */
static const struct tv_expert_layout *layout_of(const struct tv_arch *a)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        const struct tv_expert e = tv_expert_of(&a->tensors[i]);
        if (e.part > TV_EXPERT_ROUTER && e.layout != NULL)
            return e.layout;
    }
    return NULL;
}

/* What a model with experts calls its routers, in a layer; NULL: it has none.
 */
static const char *router_of(const struct tv_arch *a)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        const struct tv_expert e = tv_expert_of(&a->tensors[i]);
        if (e.part == TV_EXPERT_ROUTER)
            return a->tensors[i].name + e.name_at;
    }
    return NULL;
}

static enum tv_err convert_input(struct planner *pl, size_t input,
                                 const struct tv_expert_layout *want,
                                 const char *router)
{
    const struct tv_arch *const a = pl->plan->inputs[input].arch;
    struct plan_ref *const ref = &pl->refs[input];
    struct piece *const all = tv_calloc(a->n_tensors + 1, sizeof(*all));
    struct convert c = {
        .pl = pl, .input = input, .want = want, .router = router};
    size_t n = 0;
    enum tv_err rc = TV_OK;

    if (all == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    TV_TRY(want_hidden(pl, input));
    for (size_t i = 0; i < a->n_tensors; i++) {
        const struct tv_expert e = tv_expert_of(&a->tensors[i]);
        if (e.part != TV_EXPERT_NONE)
            all[n++] = (struct piece){e, i, a->tensors[i].layer};
    }
    qsort(all, n, sizeof(*all), piece_compare);
    for (size_t i = 0; i < n; i += c.n) {
        c.pieces = &all[i];
        for (c.n = 1; i + c.n < n && all[i + c.n].layer == all[i].layer;)
            c.n++;
        TV_TRY(convert_layer(&c));
    }
    if (ref->n_made > 0)
        tvm_problem_note(pl->problems, pl->plan->inputs[input].ref,
                         "its experts are %s; they are read as the base or "
                         "first model stores them, %s",
                         tv_expert_packed(want) ? "stored one by one"
                                                : "packed",
                         tv_expert_packed(want) ? "packed" : "one by one");
out:
    tv_free(all);
    return rc;
}

/* ---- prefixes -------------------------------------------------------------
 *
 * "model.embed_tokens" or "embed_tokens", "language_model.model.layers" or
 * "model.language_model.layers": what stands in front of a language model's
 * names is what stands in front of its embedding's.
 */

static const char *embedding_of(const struct tv_arch *a)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        const struct tv_arch_tensor *const t = &a->tensors[i];
        if (t->role == TV_ROLE_EMBED && t->module == 0 && t->layer < 0 &&
            t->vocab_dim == 0 && !t->is_bias)
            return t->name;
    }
    return NULL;
}

/* Lengths of what stands in front of the components that both end in, beside
 * "weight"; false: there are none. */
static bool differing(const char *a, const char *b, size_t *na, size_t *nb)
{
    size_t n = 0;
    size_t common = 0;
    *na = strlen(a);
    *nb = strlen(b);
    while (n < *na && n < *nb && a[*na - n - 1] == b[*nb - n - 1]) {
        n++;
        if ((n == *na || a[*na - n - 1] == '.') &&
            (n == *nb || b[*nb - n - 1] == '.'))
            common = n;
    }
    *na -= common;
    *nb -= common;
    return strchr(a + *na, '.') != NULL;
}

/* Length of what stands in front of a component's own names, of
 * "[model.]NAME.[vision_model.]". */
static size_t before_component(const char *name, const char *component)
{
    static const char model[] = "model.";
    static const char inner[] = "vision_model.";
    const char *s = name;
    if (strncmp(s, model, sizeof(model) - 1) == 0)
        s += sizeof(model) - 1;
    if (strncmp(s, component, strlen(component)) != 0 ||
        s[strlen(component)] != '.')
        return 0;
    s += strlen(component) + 1;
    if (strncmp(s, inner, sizeof(inner) - 1) == 0)
        s += sizeof(inner) - 1;
    return (size_t)(s - name);
}

struct prefixes { /* of a module: the input's and the donor's, with lengths */
    const char *from, *to;
    size_t n_from, n_to;
};

/* Of every module of an input; those that do not change stay NULL. */
static void find_prefixes(const struct tv_arch *a, const struct tv_arch *d,
                          struct prefixes *p)
{
    const char *const ea = a->modules[0].is_main ? embedding_of(a) : NULL;
    const char *const ed = d->modules[0].is_main ? embedding_of(d) : NULL;

    if (ea == NULL || ed == NULL)
        return;
    if (differing(ea, ed, &p[0].n_from, &p[0].n_to)) {
        p[0].from = ea;
        p[0].to = ed;
    }
    for (size_t i = 0; i < d->n_tensors; i++) {
        const struct tv_arch_tensor *const t = &d->tensors[i];
        for (size_t m = 1; t->module > 0 && m < a->n_modules; m++) {
            const char *const name = a->modules[m].name;
            if (p[m].to != NULL ||
                strcmp(name, d->modules[t->module].name) != 0)
                continue;
            p[m].to = t->name;
            p[m].n_to = before_component(t->name, name);
        }
    }
}

/* Puts the donor's prefix in front of a name; false: it stays as it is. */
static bool rename_one(struct planner *pl, const struct tv_arch *a,
                       const struct prefixes *all, struct tv_arch_tensor *t)
{
    const struct prefixes *const p = &all[t->module];
    size_t n = p->n_from;

    if (p->to == NULL || (t->role == TV_ROLE_LM_HEAD && t->layer < 0))
        return false;
    if (t->module > 0) {
        n = before_component(t->name, a->modules[t->module].name);
        if (n == 0 || p->n_to == 0)
            return false;
    } else if (strncmp(t->name, p->from, n) != 0 ||
               (n == 0 && t->role == TV_ROLE_OTHER && t->layer < 0)) {
        return false; /* a classifier or the like stands beside the model */
    }
    if (n == p->n_to && strncmp(t->name, p->to, n) == 0)
        return false;
    const char *const name = tvm_arena_fmt(plan_arena(pl), "%.*s%s",
                                           (int)p->n_to, p->to, t->name + n);
    if (name == NULL) {
        pl->oom = true;
        return false;
    }
    t->name = name;
    if (t->layer_len > 0)
        t->layer_at = t->layer_at - n + p->n_to;
    return true;
}

static enum tv_err rename_prefixes(struct planner *pl, size_t input)
{
    const struct tv_arch *const a = pl->plan->inputs[input].arch;
    const struct tv_arch *const d = pl->plan->inputs[pl->st->donor].arch;
    struct plan_ref *const ref = &pl->refs[input];
    struct prefixes *const p = tv_calloc(a->n_modules, sizeof(*p));
    const size_t n_made = ref->n_made;
    enum tv_err rc = TV_OK;

    if (p == NULL)
        return plan_oom(pl);
    find_prefixes(a, d, p);
    TV_TRY(want_hidden(pl, input));
    for (size_t i = 0; i < n_made; i++)
        (void)rename_one(pl, a, p, &ref->made[i].like);
    for (size_t i = 0; i < a->n_tensors; i++) {
        struct plan_made m = {.like = a->tensors[i], .index = i};
        if (ref->hidden[i] || !rename_one(pl, a, p, &m.like))
            continue;
        TV_TRY(append(pl, input, &m));
        ref->hidden[i] = true;
    }
out:
    tv_free(p);
    return rc;
}

/* ---- the head -------------------------------------------------------------
 */

static size_t head_of(const struct tv_arch *a)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        if (a->tensors[i].role == TV_ROLE_LM_HEAD && !a->tensors[i].is_bias &&
            a->tensors[i].layer < 0)
            return i;
    }
    return SIZE_MAX;
}

/* GPT-NeoX calls it embed_out in transformers 4, lm_head in 5. */
static enum tv_err rename_head(struct planner *pl, size_t input)
{
    const struct tv_arch *const a = pl->plan->inputs[input].arch;
    const struct tv_arch *const d = pl->plan->inputs[pl->st->donor].arch;
    const size_t from = head_of(a);
    const size_t to = head_of(d);
    struct plan_made m = {.index = from};
    enum tv_err rc = TV_OK;

    if (from == SIZE_MAX || to == SIZE_MAX ||
        strcmp(a->tensors[from].name, d->tensors[to].name) == 0)
        return TV_OK;
    m.like = a->tensors[from];
    m.like.name = d->tensors[to].name;
    TV_TRY(want_hidden(pl, input));
    TV_TRY(append(pl, input, &m));
    pl->refs[input].hidden[from] = true;
out:
    return rc;
}

enum tv_err plan_layout_make(struct planner *pl)
{
    const struct tv_expert_layout *want = NULL;
    const char *router = NULL;
    enum tv_err rc = TV_OK;

    if (pl->plan->n_inputs == 0 || !pl->refs[pl->st->donor].usable)
        return TV_OK;
    want = layout_of(pl->plan->inputs[pl->st->donor].arch);
    router = router_of(pl->plan->inputs[pl->st->donor].arch);
    for (size_t i = 0; want != NULL && i < pl->plan->n_inputs; i++) {
        if (pl->refs[i].usable && i != pl->st->donor)
            TV_TRY(convert_input(pl, i, want, router));
    }
    for (size_t i = 0; pl->agree && i < pl->plan->n_inputs; i++) {
        if (!pl->refs[i].usable || i == pl->st->donor)
            continue;
        TV_TRY(rename_prefixes(pl, i));
        TV_TRY(rename_head(pl, i));
    }
out:
    return rc;
}
