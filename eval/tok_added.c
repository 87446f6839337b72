/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_added.c - finds added tokens in text: leftmost, longest. A trie over
 * bytes, walked from each byte that begins a token.
 */
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#include "tok.h"

#define NODES_MAX (1u << 26)

static enum tv_err node_new(struct tve_trie *t, unsigned char byte,
                            uint32_t sibling, uint32_t *out,
                            struct tv_error *err)
{
    if (t->n == t->cap) {
        const size_t cap = t->cap ? t->cap * 2 : 256;
        struct tve_trie_node *p = NULL;

        if (cap <= NODES_MAX)
            p = tv_realloc(t->nodes, cap * sizeof(*p));
        if (!p)
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
        t->nodes = p;
        t->cap = cap;
        if (t->n == 0)
            t->n = 1; /* index 0 means none */
    }
    t->nodes[t->n] = (struct tve_trie_node){0, sibling, -1, byte};
    *out = (uint32_t)t->n++;
    return TV_OK;
}

static uint32_t find_child(const struct tve_trie *t, uint32_t first,
                           unsigned char byte)
{
    uint32_t i = first;

    while (i && t->nodes[i].byte != byte)
        i = t->nodes[i].sibling;
    return i;
}

enum tv_err tve_trie_add(struct tve_trie *t, const char *s, size_t n,
                         int32_t token, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint32_t at = 0;

    for (size_t i = 0; i < n; i++) {
        const unsigned char byte = (unsigned char)s[i];
        const uint32_t first = i ? t->nodes[at].child : t->first[byte];
        uint32_t next = find_child(t, first, byte);

        if (!next) {
            TV_TRY(node_new(t, byte, first, &next, err));
            if (i)
                t->nodes[at].child = next;
            else
                t->first[byte] = next;
        }
        at = next;
    }
    if (n > 0 && t->nodes[at].token < 0)
        t->nodes[at].token = token;
out:
    return rc;
}

void tve_trie_free(struct tve_trie *t)
{
    tv_free(t->nodes);
    memset(t, 0, sizeof(*t));
}

static bool word_before(const char *s, size_t at)
{
    uint32_t cp = 0;

    if (at == 0)
        return false;
    do
        at--;
    while (at > 0 && ((unsigned char)s[at] & 0xc0) == 0x80);
    tve_char(s + at, &cp);
    return tve_is_word(cp);
}

static bool word_after(const char *s, size_t n, size_t at)
{
    uint32_t cp = 0;

    if (at >= n)
        return false;
    tve_char(s + at, &cp);
    return tve_is_word(cp);
}

static size_t spaces_left(const char *s, size_t at)
{
    while (at > 0) {
        size_t p = at;
        uint32_t cp = 0;

        do
            p--;
        while (p > 0 && ((unsigned char)s[p] & 0xc0) == 0x80);
        tve_char(s + p, &cp);
        if (!tve_is_space(cp))
            break;
        at = p;
    }
    return at;
}

static size_t spaces_right(const char *s, size_t n, size_t at)
{
    while (at < n) {
        uint32_t cp = 0;
        const size_t len = tve_char(s + at, &cp);

        if (!tve_is_space(cp))
            break;
        at += len;
    }
    return at;
}

bool tve_trie_next(const struct tve_trie *t, const struct tve_added *tokens,
                   const char *s, size_t n, size_t *at, size_t from,
                   size_t *start, size_t *end, int32_t *token)
{
    for (size_t i = *at; t->n > 0 && i < n; i++) {
        uint32_t node = t->first[(unsigned char)s[i]];
        int32_t best = -1;
        size_t best_end = 0, p = i;

        while (node) {
            p++;
            if (t->nodes[node].token >= 0) {
                best = t->nodes[node].token;
                best_end = p;
            }
            if (p == n)
                break;
            node = find_child(t, t->nodes[node].child, (unsigned char)s[p]);
        }
        if (best < 0)
            continue;
        const struct tve_added *const a = &tokens[best];
        if (a->single_word &&
            (word_before(s, i) || word_after(s, n, best_end))) {
            i = best_end - 1;
            continue;
        }
        *start = i;
        *end = best_end;
        if (a->lstrip) {
            *start = spaces_left(s, i);
            if (*start < from)
                *start = from;
        }
        if (a->rstrip)
            *end = spaces_right(s, n, best_end);
        *token = best;
        *at = best_end;
        return true;
    }
    *at = n;
    return false;
}
