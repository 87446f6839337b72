/* SPDX-License-Identifier: Apache-2.0 */
/*
 * yaml_tree.c - libyaml events -> tree.
 *
 * Recipes come from strangers: depth and node count are capped while events
 * arrive, and an alias costs as many nodes as it stands for, so that nested
 * aliases cannot blow up whoever walks the tree. An anchor is known once its
 * node is complete; a node can therefore never contain itself.
 */
#include "yaml_tree.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <yaml.h>

#include "tv/alloc.h"
#include "tv/text.h"

/* Keeps the search for keys that are already there short. */
#define MERGE_KEYS_MAX 1000u

struct anchor {
    const char *name;
    const struct tvm_node *node;
};

struct frame { /* an open list or map */
    struct tvm_node *node;
    struct tvm_node *last;
    const char *anchor;
    const char *key; /* map: key read, value expected */
    unsigned key_line, key_col;
};

struct tree {
    const char *path;
    struct tvm_arena *arena;
    struct tvm_problems *problems;
    struct frame frames[TVM_YAML_DEPTH_MAX];
    unsigned n_frames;
    struct anchor *anchors;
    size_t n_anchors;
    size_t n_nodes;
    struct tvm_node *root, *last_root;
    unsigned n_docs;
    bool stop; /* a problem was reported */
    bool oom;
};

const char *tvm_where(char *dst, size_t cap, const char *path, unsigned line,
                      unsigned col)
{
    (void)snprintf(dst, cap, "%s:%u:%u", path, line, col);
    return dst;
}

static void fail_at(struct tree *t, enum tv_err code, unsigned line,
                    unsigned col, const char *message)
{
    char where[TVM_WHERE_MAX];
    if (t->stop)
        return;
    t->stop = true;
    tvm_problem_add(t->problems, true, code,
                    tvm_where(where, sizeof(where), t->path, line, col), "%s",
                    message);
}

static unsigned mark_line(const yaml_mark_t *m)
{
    return (unsigned)m->line + 1;
}

static unsigned mark_col(const yaml_mark_t *m)
{
    return (unsigned)m->column + 1;
}

static struct tvm_node *node_new(struct tree *t, enum tvm_node_kind kind,
                                 const yaml_mark_t *at)
{
    struct tvm_node *const node = tvm_arena_get(t->arena, 1, sizeof(*node));
    if (node == NULL) {
        t->oom = true;
        return NULL;
    }
    node->kind = kind;
    node->line = mark_line(at);
    node->col = mark_col(at);
    node->n_nodes = 1;
    node->depth = 1;
    return node;
}

static void anchor_add(struct tree *t, const char *name,
                       const struct tvm_node *node)
{
    if (name == NULL)
        return;
    if (t->anchors == NULL)
        t->anchors =
            tvm_arena_get(t->arena, TVM_YAML_ANCHORS_MAX, sizeof(*t->anchors));
    if (t->anchors == NULL) {
        t->oom = true;
        return;
    }
    if (t->n_anchors == TVM_YAML_ANCHORS_MAX) {
        fail_at(t, TV_E_USAGE, node->line, node->col, "too many anchors");
        return;
    }
    t->anchors[t->n_anchors].name = name;
    t->anchors[t->n_anchors].node = node;
    t->n_anchors++;
}

/* Puts a finished node where it belongs. */
static void attach(struct tree *t, struct tvm_node *node)
{
    if (t->n_frames == 0) {
        /* "---" at the end of a file begins a document of nothing. */
        if (t->n_docs > 1 && tvm_node_is_null(node))
            return;
        if (t->last_root == NULL)
            t->root = node;
        else
            t->last_root->next = node;
        t->last_root = node;
        return;
    }
    struct frame *const f = &t->frames[t->n_frames - 1];
    if (f->node->kind == TVM_NODE_MAP) {
        if (f->key == NULL) {
            if (node->kind != TVM_NODE_SCALAR) {
                fail_at(t, TV_E_USAGE, node->line, node->col,
                        "a key must be a single word");
                return;
            }
            if (memchr(node->text, '\0', node->n_text) != NULL) {
                fail_at(t, TV_E_USAGE, node->line, node->col,
                        "a key holds a NUL character");
                return;
            }
            f->key = node->text;
            f->key_line = node->line;
            f->key_col = node->col;
            return;
        }
        node->key = f->key;
        node->key_line = f->key_line;
        node->key_col = f->key_col;
        f->key = NULL;
    }
    if (f->last == NULL)
        f->node->first = node;
    else
        f->last->next = node;
    f->last = node;
    f->node->n++;
    f->node->n_nodes += node->n_nodes;
    if (node->depth + 1 > f->node->depth)
        f->node->depth = node->depth + 1;
    if (t->n_frames - 1 + f->node->depth > TVM_YAML_DEPTH_MAX)
        fail_at(t, TV_E_USAGE, node->line, node->col,
                "nested too deeply (more than 64 levels)");
}

static bool count_nodes(struct tree *t, size_t n, const yaml_mark_t *at)
{
    t->n_nodes += n;
    if (t->n_nodes <= TVM_YAML_NODES_MAX)
        return true;
    fail_at(t, TV_E_USAGE, mark_line(at), mark_col(at),
            "too large: more than 100000 values, aliases written out");
    return false;
}

/* Standard tags only; *is_string when the tag makes a plain scalar a string. */
static bool tag_ok(struct tree *t, const yaml_char_t *tag,
                   const yaml_mark_t *at, bool *is_string)
{
    static const char *const known[] = {"str",  "int", "float", "bool",
                                        "null", "seq", "map"};
    static const char prefix[] = "tag:yaml.org,2002:";
    const char *const s = (const char *)tag;
    *is_string = false;
    if (s == NULL)
        return true;
    if (strcmp(s, "!") == 0) {
        *is_string = true;
        return true;
    }
    if (strncmp(s, prefix, sizeof(prefix) - 1) == 0) {
        for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
            if (strcmp(s + sizeof(prefix) - 1, known[i]) == 0) {
                *is_string = i == 0;
                return true;
            }
        }
    }
    fail_at(t, TV_E_USAGE, mark_line(at), mark_col(at),
            "YAML tags other than the standard ones are not allowed");
    return false;
}

static const char *copy_name(struct tree *t, const yaml_char_t *name)
{
    if (name == NULL)
        return NULL;
    const char *const s = tvm_arena_strdup(t->arena, (const char *)name);
    if (s == NULL)
        t->oom = true;
    return s;
}

static void on_scalar(struct tree *t, const yaml_event_t *e)
{
    bool is_string = false;
    struct tvm_node *node = NULL;
    if (!count_nodes(t, 1, &e->start_mark) ||
        !tag_ok(t, e->data.scalar.tag, &e->start_mark, &is_string))
        return;
    node = node_new(t, TVM_NODE_SCALAR, &e->start_mark);
    if (node == NULL)
        return;
    node->text = tvm_arena_strndup(t->arena, (const char *)e->data.scalar.value,
                                   e->data.scalar.length);
    node->n_text = e->data.scalar.length;
    node->plain = e->data.scalar.style == YAML_PLAIN_SCALAR_STYLE && !is_string;
    const char *const anchor = copy_name(t, e->data.scalar.anchor);
    if (node->text == NULL || t->oom) {
        t->oom = true;
        return;
    }
    anchor_add(t, anchor, node);
    attach(t, node);
}

static void on_alias(struct tree *t, const yaml_event_t *e)
{
    const char *const name = (const char *)e->data.alias.anchor;
    const struct tvm_node *target = NULL;
    for (size_t i = t->n_anchors; i > 0 && target == NULL; i--) {
        if (strcmp(t->anchors[i - 1].name, name) == 0)
            target = t->anchors[i - 1].node;
    }
    if (target == NULL) {
        fail_at(t, TV_E_USAGE, mark_line(&e->start_mark),
                mark_col(&e->start_mark), "alias of an unknown anchor");
        return;
    }
    if (!count_nodes(t, target->n_nodes, &e->start_mark))
        return;
    struct tvm_node *const node = node_new(t, target->kind, &e->start_mark);
    if (node == NULL)
        return;
    *node = *target;
    node->line = mark_line(&e->start_mark);
    node->col = mark_col(&e->start_mark);
    node->next = NULL;
    node->key = NULL;
    attach(t, node);
}

static void on_open(struct tree *t, enum tvm_node_kind kind,
                    const yaml_event_t *e, const yaml_char_t *tag,
                    const yaml_char_t *anchor)
{
    bool is_string = false;
    if (!count_nodes(t, 1, &e->start_mark) ||
        !tag_ok(t, tag, &e->start_mark, &is_string))
        return;
    if (t->n_frames == TVM_YAML_DEPTH_MAX) {
        fail_at(t, TV_E_USAGE, mark_line(&e->start_mark),
                mark_col(&e->start_mark),
                "nested too deeply (more than 64 levels)");
        return;
    }
    struct frame *const f = &t->frames[t->n_frames];
    memset(f, 0, sizeof(*f));
    f->node = node_new(t, kind, &e->start_mark);
    f->anchor = copy_name(t, anchor);
    if (f->node != NULL)
        t->n_frames++;
}

struct entry {
    const struct tvm_node *node;
    size_t at;
};

static int entry_compare(const void *a, const void *b)
{
    const struct entry *const x = a;
    const struct entry *const y = b;
    const int c = strcmp(x->node->key, y->node->key);
    if (c != 0)
        return c;
    return x->at < y->at ? -1 : x->at > y->at;
}

static void check_duplicates(struct tree *t, const struct tvm_node *map)
{
    struct entry *all = NULL;
    size_t n = 0;
    const struct tvm_node *again = NULL;
    const struct tvm_node *before = NULL;
    if (map->n < 2)
        return;
    all = tv_calloc(map->n, sizeof(*all));
    if (all == NULL) {
        t->oom = true;
        return;
    }
    for (const struct tvm_node *c = map->first; c != NULL; c = c->next, n++) {
        all[n].node = c;
        all[n].at = n;
    }
    qsort(all, n, sizeof(*all), entry_compare);
    for (size_t i = 1; i < n && again == NULL; i++) {
        if (strcmp(all[i].node->key, all[i - 1].node->key) == 0) {
            before = all[i - 1].node;
            again = all[i].node;
        }
    }
    if (again != NULL) {
        char name[80];
        char message[160];
        (void)snprintf(message, sizeof(message),
                       "key '%s' appears twice (first in line %u)",
                       tv_text_printable(again->key, name, sizeof(name)),
                       before->key_line);
        fail_at(t, TV_E_USAGE, again->key_line, again->key_col, message);
    }
    tv_free(all);
}

/* Adds entries of `from` whose keys the map lacks (YAML 1.1 merge keys). */
static void merge_map(struct tree *t, struct frame *f,
                      const struct tvm_node *from)
{
    if (from->kind != TVM_NODE_MAP) {
        fail_at(t, TV_E_USAGE, from->line, from->col,
                "'<<' takes a map or a list of maps");
        return;
    }
    if (from->n + f->node->n > MERGE_KEYS_MAX) {
        fail_at(t, TV_E_USAGE, from->line, from->col,
                "'<<' makes a map of more than 1000 keys");
        return;
    }
    for (const struct tvm_node *c = from->first; c != NULL; c = c->next) {
        const yaml_mark_t at = {0, c->line - 1, c->col - 1};
        if (tvm_node_find(f->node, c->key) != NULL)
            continue;
        if (!count_nodes(t, c->n_nodes, &at))
            return;
        struct tvm_node *const copy = node_new(t, c->kind, &at);
        if (copy == NULL)
            return;
        *copy = *c;
        copy->next = NULL;
        f->key = c->key;
        f->key_line = c->key_line;
        f->key_col = c->key_col;
        attach(t, copy);
        if (t->stop)
            return;
    }
}

static void apply_merge_key(struct tree *t, struct frame *f)
{
    const struct tvm_node *before = NULL;
    const struct tvm_node *m = f->node->first;
    while (m != NULL && strcmp(m->key, "<<") != 0) {
        before = m;
        m = m->next;
    }
    if (m == NULL)
        return;
    /* Unhooked first, so that what it brings lands behind the map's own keys.
     * The siblings before it are ours: nothing else points at them yet. */
    if (before == NULL)
        f->node->first = m->next;
    else
        ((struct tvm_node *)before)->next = m->next;
    if (f->last == m)
        f->last = (struct tvm_node *)before;
    f->node->n--;
    if (m->kind == TVM_NODE_LIST) {
        for (const struct tvm_node *c = m->first; c != NULL && !t->stop;
             c = c->next)
            merge_map(t, f, c);
    } else {
        merge_map(t, f, m);
    }
}

static void on_close(struct tree *t)
{
    struct frame *const f = &t->frames[t->n_frames - 1];
    if (f->node->kind == TVM_NODE_MAP) {
        check_duplicates(t, f->node);
        if (!t->stop && !t->oom)
            apply_merge_key(t, f);
    }
    if (t->stop || t->oom)
        return;
    struct tvm_node *const node = f->node;
    const char *const anchor = f->anchor;
    t->n_frames--;
    anchor_add(t, anchor, node);
    attach(t, node);
}

static void on_event(struct tree *t, const yaml_event_t *e)
{
    switch (e->type) {
    case YAML_DOCUMENT_START_EVENT:
        t->n_anchors = 0; /* they end with their document */
        if (++t->n_docs > TVM_YAML_DOCS_MAX)
            fail_at(t, TV_E_USAGE, mark_line(&e->start_mark),
                    mark_col(&e->start_mark),
                    "too many documents: a file holds at most 64");
        break;
    case YAML_SCALAR_EVENT:
        on_scalar(t, e);
        break;
    case YAML_ALIAS_EVENT:
        on_alias(t, e);
        break;
    case YAML_SEQUENCE_START_EVENT:
        on_open(t, TVM_NODE_LIST, e, e->data.sequence_start.tag,
                e->data.sequence_start.anchor);
        break;
    case YAML_MAPPING_START_EVENT:
        on_open(t, TVM_NODE_MAP, e, e->data.mapping_start.tag,
                e->data.mapping_start.anchor);
        break;
    case YAML_SEQUENCE_END_EVENT:
    case YAML_MAPPING_END_EVENT:
        on_close(t);
        break;
    default:
        break;
    }
}

enum tv_err tvm_yaml_parse(const char *path, const char *data, size_t n,
                           struct tvm_arena *arena,
                           struct tvm_problems *problems, struct tv_error *err,
                           const struct tvm_node **out)
{
    struct tree *t = NULL;
    yaml_parser_t parser;
    bool done = false;
    enum tv_err rc = TV_OK;

    *out = NULL;
    if (yaml_parser_initialize(&parser) == 0)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    t = tv_calloc(1, sizeof(*t));
    if (t == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    t->path = path;
    t->arena = arena;
    t->problems = problems;
    yaml_parser_set_input_string(&parser, (const unsigned char *)data, n);
    while (!done && !t->stop && !t->oom) {
        yaml_event_t e;
        if (yaml_parser_parse(&parser, &e) == 0) {
            char message[256];
            if (parser.error == YAML_MEMORY_ERROR) {
                t->oom = true;
                break;
            }
            (void)snprintf(message, sizeof(message), "not valid YAML: %s%s%s",
                           parser.problem == NULL ? "?" : parser.problem,
                           parser.context == NULL ? "" : ", ",
                           parser.context == NULL ? "" : parser.context);
            if (parser.error == YAML_READER_ERROR) {
                /* The reader knows a byte offset, not a position. */
                unsigned line = 1;
                size_t from = 0;
                for (size_t i = 0; i < parser.problem_offset && i < n; i++) {
                    if (data[i] == '\n') {
                        line++;
                        from = i + 1;
                    }
                }
                fail_at(t, TV_E_USAGE, line,
                        parser.problem_offset < from
                            ? 1
                            : (unsigned)(parser.problem_offset - from) + 1,
                        message);
            } else {
                fail_at(t, TV_E_USAGE, mark_line(&parser.problem_mark),
                        mark_col(&parser.problem_mark), message);
            }
            break;
        }
        done = e.type == YAML_STREAM_END_EVENT;
        on_event(t, &e);
        yaml_event_delete(&e);
    }
    if (t->oom)
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory while reading %s",
                          path);
    else if (!t->stop && t->root == NULL)
        fail_at(t, TV_E_USAGE, 1, 1, "the file is empty");
    if (rc == TV_OK && !t->stop)
        *out = t->root;
out:
    tv_free(t);
    yaml_parser_delete(&parser);
    return rc;
}

const struct tvm_node *tvm_node_find(const struct tvm_node *node,
                                     const char *key)
{
    if (node == NULL || node->kind != TVM_NODE_MAP)
        return NULL;
    for (const struct tvm_node *c = node->first; c != NULL; c = c->next) {
        if (strcmp(c->key, key) == 0)
            return c;
    }
    return NULL;
}

static bool one_of(const char *s, const char *const *words)
{
    for (; *words != NULL; words++) {
        if (strcmp(s, *words) == 0)
            return true;
    }
    return false;
}

bool tvm_node_is_null(const struct tvm_node *node)
{
    static const char *const nulls[] = {"", "~", "null", "Null", "NULL", NULL};
    if (node == NULL)
        return true;
    return node->kind == TVM_NODE_SCALAR && node->plain &&
           one_of(node->text, nulls);
}

bool tvm_node_bool(const struct tvm_node *node, bool *out)
{
    static const char *const yes[] = {"true", "True", "TRUE", "yes", "Yes",
                                      "YES",  "on",   "On",   "ON",  NULL};
    static const char *const no[] = {"false", "False", "FALSE", "no",  "No",
                                     "NO",    "off",   "Off",   "OFF", NULL};
    if (node == NULL || node->kind != TVM_NODE_SCALAR)
        return false;
    if (one_of(node->text, yes))
        *out = true;
    else if (one_of(node->text, no))
        *out = false;
    else
        return false;
    return true;
}

/* 0x1f, 0b11 and PyYAML's 017 (plain only); digits already without '_'. */
static bool radix_number(const char *s, bool plain, double *out)
{
    const bool negative = *s == '-';
    int base = 0;
    char *end = NULL;
    if (*s == '-' || *s == '+')
        s++;
    if (!plain || s[0] != '0' || s[1] == '\0')
        return false;
    if (s[1] == 'x')
        base = 16;
    else if (s[1] == 'b')
        base = 2;
    else if (strspn(s, "01234567") == strlen(s))
        base = 8;
    else
        return false;
    s += base == 8 ? 1 : 2;
    if (*s == '\0' || strspn(s, base == 16 ? "0123456789abcdefABCDEF"
                                           : "01234567") != strlen(s))
        return false;
    errno = 0;
    const unsigned long long v = strtoull(s, &end, base);
    if (errno != 0 || *end != '\0')
        return false;
    *out = negative ? -(double)v : (double)v;
    return true;
}

bool tvm_node_number(const struct tvm_node *node, double *out)
{
    char s[64];
    size_t n = 0;
    char *end = NULL;
    bool digit = false;
    double v = 0;
    if (node == NULL || node->kind != TVM_NODE_SCALAR ||
        node->n_text >= sizeof(s))
        return false;
    for (size_t i = 0; i < node->n_text; i++) {
        const char c = node->text[i];
        if (c == '_')
            continue;
        if (c == '\0')
            return false;
        digit = digit || (c >= '0' && c <= '9');
        s[n++] = c;
    }
    s[n] = '\0';
    if (!digit)
        return false;
    if (radix_number(s, node->plain, out))
        return true;
    if (strspn(s, "0123456789+-.eE") != n)
        return false;
    errno = 0;
    v = strtod(s, &end);
    if (*end != '\0' || !isfinite(v))
        return false;
    *out = v;
    return true;
}
