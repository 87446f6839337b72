/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe_documents.c - several recipes in one file: names, who needs whose
 * result, and that nobody needs its own.
 */
#include "recipe_read.h"

#include <stdio.h>
#include <string.h>

/* Does a reference mean the document of this name? mergekit-multi puts it in
 * the place of a model, whatever adapter or revision is behind it. */
bool tvm_recipe_means(const char *ref, const char *name)
{
    const size_t n = strlen(name);
    return strncmp(ref, name, n) == 0 &&
           (ref[n] == '\0' || ref[n] == '+' || ref[n] == '@');
}

static void need(struct recipe_reader *rd, struct tvm_recipe *first,
                 const struct tvm_recipe_ref *ref)
{
    struct tvm_recipe *const r = rd->r;
    if (ref->text == NULL)
        return;
    for (struct tvm_recipe *o = first; o != NULL; o = o->next) {
        bool known = false;
        if (o->name.text == NULL || !tvm_recipe_means(ref->text, o->name.text))
            continue;
        for (size_t i = 0; i < r->n_needs; i++)
            known = known || r->needs[i] == o;
        if (!known)
            r->needs[r->n_needs++] = o;
    }
}

/* The documents that one refers to. */
static void find_needs(struct recipe_reader *rd, struct tvm_recipe *first)
{
    struct tvm_recipe *const r = rd->r;
    r->needs = tvm_arena_get(&r->arena, TVM_YAML_DOCS_MAX, sizeof(*r->needs));
    if (r->needs == NULL) {
        rd->oom = true;
        return;
    }
    for (size_t s = 0; s < r->n_slices; s++) {
        for (size_t i = 0; i < r->slices[s].n_sources; i++)
            need(rd, first, &r->slices[s].sources[i].model);
        need(rd, first, &r->slices[s].base);
    }
    need(rd, first, &r->base);
    need(rd, first, &r->vocab.model);
    for (size_t i = 0; i < r->vocab.n_tokens; i++)
        need(rd, first, &r->vocab.tokens[i].model);
}

/* Is `to` needed, directly or not, by `from`? Looks at each document once. */
static bool leads_to(struct tvm_recipe *from, const struct tvm_recipe *to)
{
    if (from->seen)
        return false;
    from->seen = true;
    for (size_t i = 0; i < from->n_needs; i++) {
        if (from->needs[i] == to || leads_to(from->needs[i], to))
            return true;
    }
    return false;
}

static bool needs_itself(struct tvm_recipe *first, struct tvm_recipe *r)
{
    for (struct tvm_recipe *o = first; o != NULL; o = o->next)
        o->seen = false;
    return leads_to(r, r);
}

void recipe_check_documents(struct recipe_reader *rd, struct tvm_recipe *first)
{
    const struct tvm_recipe *unnamed = NULL;
    char message[320];
    for (struct tvm_recipe *r = first; r != NULL && !rd->oom; r = r->next) {
        rd->r = r;
        find_needs(rd, first);
        if (r->name.text == NULL && unnamed != NULL) {
            (void)snprintf(message, sizeof(message),
                           "only one document may have no 'name', the one that "
                           "gives the output; the one in line %u has none "
                           "either",
                           unnamed->line);
            recipe_error_at(rd, TV_E_USAGE, r->line, 1, message);
        }
        if (r->name.text == NULL) {
            unnamed = r;
            continue;
        }
        for (const struct tvm_recipe *o = first; o != r; o = o->next) {
            if (o->name.text == NULL || strcmp(o->name.text, r->name.text) != 0)
                continue;
            (void)snprintf(message, sizeof(message),
                           "two documents are called '%s' (first in line %u)",
                           r->name.text, o->name.line);
            recipe_error_at(rd, TV_E_USAGE, r->name.line, r->name.col, message);
            break;
        }
    }
    for (struct tvm_recipe *r = first; r != NULL && !rd->oom; r = r->next) {
        rd->r = r;
        if (r->name.text == NULL || !needs_itself(first, r))
            continue;
        (void)snprintf(
            message, sizeof(message), "document '%s' needs its own result%s",
            r->name.text,
            r->n_needs == 1 && r->needs[0] == r ? "" : ", by way of others");
        recipe_error_at(rd, TV_E_USAGE, r->name.line, r->name.col, message);
    }
}

tvm_recipe *tvm_recipe_next(const tvm_recipe *r)
{
    return r->next;
}
