/* SPDX-License-Identifier: Apache-2.0 */
/*
 * args.c - the command line: argp for the options, the common ones once, the
 * help texts, and what happens between main and a command.
 *
 * argp's own messages are switched off (ARGP_NO_ERRS): ours add a suggestion,
 * and are documents with --json. Options and arguments may be mixed; options
 * before the command's name are common ones, and for a tool with a short form
 * also those of that form.
 */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "signals.h"
#include "tv/alloc.h"
#include "tv/cuda_math.h"
#include "tv/pool.h"
#include "tv/sys.h"
#include "tv/text.h"

enum {
    KEY_PROGRESS = 0x1000,
    KEY_COLOR,
    KEY_JSON,
    KEY_MEMORY,
    KEY_DEVICE,
    KEY_DEVICE_MEMORY,
    KEY_USAGE,
};

static const struct argp_option common_options[] = {
    {NULL, 0, NULL, 0, "Common options:", -2},
    {"json", KEY_JSON, NULL, 0, "Print one JSON document", -2},
    {"quiet", 'q', NULL, 0, "No messages and no progress", -2},
    {"verbose", 'v', NULL, 0, "Say more", -2},
    {"progress", KEY_PROGRESS, "STYLE", 0,
     "auto, bar, plain, json or none (default: auto)", -2},
    {"color", KEY_COLOR, "WHEN", 0, "auto, always or never (default: auto)",
     -2},
    {"threads", 'j', "N", 0,
     "Worker threads (default: the cores this process may use)", -2},
    {"num-threads", 0, NULL, OPTION_ALIAS, NULL, -2},
    {"memory", KEY_MEMORY, "SIZE", 0,
     "Most memory to allocate (default: 512MiB)", -2},
    {"device", KEY_DEVICE, "DEVICE", 0, "auto, cpu or cuda[:N] (default: auto)",
     -2},
    {"device-memory", KEY_DEVICE_MEMORY, "SIZE", 0,
     "Most GPU memory to use (default: 80% of what is free); what needs more "
     "comes in parts",
     -2},
    {"help", 'h', NULL, 0, "Give this help", -1},
    {"usage", KEY_USAGE, NULL, 0, "Give a short usage message", -1},
    {"version", 'V', NULL, 0, "Print versions, CPU features and the GPU", -1},
    {0}};

static const char environment_text[] =
    "Sizes: 500M and 500MB are 10^6, 500MiB is 2^20, a bare number is bytes.\n"
    "\n"
    "Environment:\n"
    "  TV_STORE      store to use where --store is not given\n"
    "  TV_CPU        ref, avx2, avx512 or amx: caps the instruction set in "
    "use\n"
    "  TV_CUDA_LEAST 0: --device cuda sends every element-wise operation to "
    "the\n"
    "                GPU, not only those that it is faster at (same bits), "
    "and\n"
    "                --device auto takes a GPU for small models too\n"
    "  TV_PROGRESS   default of --progress\n"
    "  NO_COLOR      when set and not empty: no colours\n"
    "  HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME\n"
    "                where ORG/NAME references are looked up\n"
    "\n"
    "Exit codes: 0 ok, 1 I/O failure, 2 usage, 3 a check failed, 4 inputs,\n"
    "5 no room, 10 no such object, 11 locked, 12 damaged data,\n"
    "130/143 interrupted\n";

/* ---- values
 * ------------------------------------------------------------------ */

error_t tvc_bad(struct tvc *c, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    (void)tv_error_set(&c->err, TV_E_USAGE, "%s", text);
    return EINVAL;
}

error_t tvc_parse_size(struct tvc *c, const char *option, const char *arg,
                       bool mergekit_b, uint64_t *out)
{
    if (tv_parse_bytes(arg, mergekit_b, out, &c->err) == TV_OK)
        return 0;
    tv_error_context(&c->err, "%s", option);
    return EINVAL;
}

error_t tvc_parse_quota(struct tvc *c, const char *option, const char *arg,
                        uint64_t *out)
{
    if (strcmp(arg, "none") == 0) {
        *out = 0;
        return 0;
    }
    const error_t e = tvc_parse_size(c, option, arg, false, out);
    if (e != 0)
        tv_error_hint(&c->err, "sizes look like 18GB, 1.5GiB or 4096; none "
                               "(or 0) is no limit");
    return e;
}

error_t tvc_parse_shard(struct tvc *c, const char *arg, uint64_t *out)
{
    const error_t e = tvc_parse_size(c, "--out-shard-size", arg, true, out);

    if (e == 0 && *out == 0)
        *out = INT64_MAX;
    return e;
}

error_t tvc_parse_u64(struct tvc *c, const char *option, const char *arg,
                      uint64_t max, uint64_t *out)
{
    char *end = NULL;
    errno = 0;
    const unsigned long long v = strtoull(arg, &end, 10);
    if (*arg < '0' || *arg > '9' || *end || errno || v > max)
        return tvc_bad(c, "%s: '%s' is not a number from 0 to %" PRIu64, option,
                       arg, max);
    *out = v;
    return 0;
}

error_t tvc_parse_ms(struct tvc *c, const char *option, const char *arg,
                     unsigned *ms)
{
    char *end = NULL;
    errno = 0;
    double v = strtod(arg, &end);
    const bool digits = (*arg >= '0' && *arg <= '9') || *arg == '.';
    if (digits && !errno && strcmp(end, "ms") == 0)
        v /= 1000;
    else if (!digits || errno || (*end && strcmp(end, "s") != 0))
        v = -1;
    if (!(v >= 0 && v <= 86400))
        return tvc_bad(c, "%s: '%s' is not a time in seconds (or 500ms)",
                       option, arg);
    *ms = (unsigned)(v * 1000 + 0.5);
    return 0;
}

int tvc_choose(struct tvc *c, const char *what, const char *arg,
               const char *const *words, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(arg, words[i]) == 0)
            return (int)i;
    struct tv_buf list;
    tv_buf_init(&list, 1024);
    for (size_t i = 0; i < n; i++) {
        tv_buf_str(&list, i ? ", " : "");
        tv_buf_str(&list, words[i]);
    }
    (void)tvc_bad(c, "%s: '%s' is not one of %s", what, arg,
                  list.failed ? "the known values" : list.data);
    tv_buf_free(&list);
    const char *near = tv_suggest(arg, words, n);
    if (near)
        tv_error_hint(&c->err, "did you mean '%s'?", near);
    return -1;
}

static error_t parse_progress(struct tvc *c, const char *what, const char *arg)
{
    static const char *const words[] = {"auto", "bar", "plain", "json", "none"};
    const int i = tvc_choose(c, what, arg, words, 5);
    if (i < 0)
        return EINVAL;
    c->out.progress = (enum tvc_progress_mode)i;
    return 0;
}

static error_t parse_color(struct tvc *c, const char *arg)
{
    static const char *const words[] = {"auto", "always", "never"};
    const int i = tvc_choose(c, "--color", arg, words, 3);
    if (i < 0)
        return EINVAL;
    c->out.color_mode = (enum tvc_color_mode)i;
    return 0;
}

static bool is_cuda(const char *arg)
{
    if (strncmp(arg, "cuda", 4) != 0)
        return false;
    if (arg[4] == '\0')
        return true;
    return arg[4] == ':' && arg[5] &&
           strspn(arg + 5, "0123456789") == strlen(arg + 5);
}

static error_t parse_device(struct tvc *c, const char *arg)
{
    static const char *const words[] = {"auto", "cpu", "cuda"};
    if (is_cuda(arg)) {
        uint64_t index = 0;
        if (arg[4] &&
            tvc_parse_u64(c, "--device cuda:N", arg + 5, INT_MAX, &index))
            return EINVAL;
        c->device = TVC_DEVICE_CUDA;
        c->device_index = (int)index;
        return 0;
    }
    const int i = tvc_choose(c, "--device", arg, words, 3);
    if (i < 0)
        return EINVAL;
    c->device = i == 0 ? TVC_DEVICE_AUTO : TVC_DEVICE_CPU;
    return 0;
}

static error_t parse_device_memory(struct tvc *c, const char *arg)
{
    const error_t e = tvc_parse_size(c, "--device-memory", arg, false,
                                     &c->device_memory_bytes);
    if (e)
        return e;
    if (c->device_memory_bytes == 0)
        return tvc_bad(c, "--device-memory: 0 bytes are too few");
    return 0;
}

static error_t parse_threads(struct tvc *c, const char *arg)
{
    uint64_t n = 0;
    const error_t e = tvc_parse_u64(c, "--threads", arg, 1024, &n);
    if (e || n == 0)
        return tvc_bad(c, "--threads: '%s' is not a number from 1 to 1024",
                       arg);
    c->threads = (unsigned)n;
    return 0;
}

static error_t parse_memory(struct tvc *c, const char *arg)
{
    const error_t e =
        tvc_parse_size(c, "--memory", arg, false, &c->memory_bytes);
    if (e)
        return e;
    if (c->memory_bytes == 0)
        return tvc_bad(c, "--memory: 0 bytes are too few");
    return 0;
}

/* ---- parsing
 * ------------------------------------------------------------------ */

static error_t common_option(int key, char *arg, struct argp_state *st)
{
    struct tvc *c = st->input;
    switch (key) {
    case KEY_JSON:
        c->out.json = true;
        return 0;
    case 'q':
        c->out.quiet = true;
        return 0;
    case 'v':
        c->out.verbose++;
        return 0;
    case 'j':
        return parse_threads(c, arg);
    case KEY_PROGRESS:
        return parse_progress(c, "--progress", arg);
    case KEY_COLOR:
        return parse_color(c, arg);
    case KEY_MEMORY:
        return parse_memory(c, arg);
    case KEY_DEVICE:
        return parse_device(c, arg);
    case KEY_DEVICE_MEMORY:
        return parse_device_memory(c, arg);
    case 'h':
        c->want_help = true;
        st->next = st->argc;
        return 0;
    case KEY_USAGE:
        c->want_usage = true;
        st->next = st->argc;
        return 0;
    case 'V':
        c->want_version = true;
        st->next = st->argc;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp common_argp = {.options = common_options,
                                        .parser = common_option};
static const struct argp_child common_child[] = {{&common_argp, 0, NULL, 0},
                                                 {0}};

/* The tool's own level: everything from the command's name on is left. */
static error_t top_option(int key, char *arg, struct argp_state *st)
{
    struct tvc *c = st->input;
    (void)arg;
    switch (key) {
    case ARGP_KEY_INIT:
        st->child_inputs[0] = c;
        return 0;
    case ARGP_KEY_ARG:
        c->command_at = st->next - 1;
        st->next = st->argc;
        return 0;
    case ARGP_KEY_ERROR:
        c->stopped_at = st->next;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static error_t command_option(int key, char *arg, struct argp_state *st)
{
    struct tvc *c = st->input;
    switch (key) {
    case ARGP_KEY_INIT:
        st->child_inputs[0] = c;
        return 0;
    case ARGP_KEY_ARG:
        c->pos[c->n_pos++] = arg;
        return 0;
    case ARGP_KEY_ERROR:
        c->stopped_at = st->next;
        return 0;
    case ARGP_KEY_ARGS:
    case ARGP_KEY_END:
    case ARGP_KEY_NO_ARGS:
    case ARGP_KEY_SUCCESS:
    case ARGP_KEY_FINI:
        return ARGP_ERR_UNKNOWN;
    default:
        return c->parsing->option ? c->parsing->option(c, key, arg)
                                  : ARGP_ERR_UNKNOWN;
    }
}

#define PARSE_FLAGS (ARGP_IN_ORDER | ARGP_NO_ERRS | ARGP_NO_HELP | ARGP_NO_EXIT)

/* All long names that a parse knows: for suggestions. */
#define NAMES_MAX   128u
struct names {
    const char *word[NAMES_MAX];
    const struct argp_option *option[NAMES_MAX];
    size_t n;
};

static void names_add(struct names *all, const struct argp_option *o)
{
    for (; o && (o->name || o->key || o->doc); o++) {
        if (!o->name || all->n == NAMES_MAX)
            continue;
        all->word[all->n] = o->name;
        all->option[all->n++] = o;
    }
}

static void names_of(struct names *all, const struct tvc_command *cmd)
{
    all->n = 0;
    if (cmd)
        names_add(all, cmd->options);
    names_add(all, common_options);
}

static const struct argp_option *short_option(const struct names *all, char ch)
{
    for (size_t i = 0; i < all->n; i++)
        if (all->option[i]->key == (unsigned char)ch)
            return all->option[i];
    return NULL;
}

/* What is wrong with the long option at `arg`; false when nothing is. */
static bool explain_long(struct tvc *c, const struct names *all,
                         const char *arg)
{
    const size_t len = strcspn(arg + 2, "=");
    const struct argp_option *hit = NULL;
    size_t n_hits = 0;
    bool exact = false;
    for (size_t i = 0; i < all->n && !exact; i++) {
        if (strncmp(all->word[i], arg + 2, len) != 0)
            continue;
        exact = all->word[i][len] == '\0';
        hit = all->option[i];
        n_hits = exact ? 1 : n_hits + 1;
    }
    if (n_hits > 1) {
        (void)tvc_bad(c, "option '%s' is ambiguous", arg);
    } else if (n_hits == 1) {
        const bool has_value = arg[2 + len] == '=';
        if (hit->arg && !has_value)
            (void)tvc_bad(c, "option '--%s' needs a value (%s)", hit->name,
                          hit->arg);
        else if (!hit->arg && has_value)
            (void)tvc_bad(c, "option '--%s' takes no value", hit->name);
        else
            return false;
    } else {
        char word[64];
        (void)snprintf(word, sizeof word, "%.*s", (int)(len < 63 ? len : 63),
                       arg + 2);
        const char *near = tv_suggest(word, all->word, all->n);
        (void)tvc_bad(c, "unknown option '--%s'", word);
        if (near)
            tv_error_hint(&c->err, "did you mean --%s?", near);
    }
    return true;
}

static bool explain_short(struct tvc *c, const struct names *all,
                          const char *arg)
{
    for (const char *ch = arg + 1; *ch; ch++) {
        const struct argp_option *o = short_option(all, *ch);
        if (!o) {
            (void)tvc_bad(c, "unknown option '-%c'", *ch);
            return true;
        }
        if (o->arg && ch[1] == '\0') {
            (void)tvc_bad(c, "option '-%c' needs a value (%s)", *ch, o->arg);
            return true;
        }
        if (o->arg)
            return false;
    }
    return false;
}

/* getopt does not say which argument it rejected: it is the one before `next`,
 * or in a cluster of short options the one at `next`. */
static void explain(struct tvc *c, const struct tvc_command *cmd, int argc,
                    char **argv, int next)
{
    struct names all;
    names_of(&all, cmd);
    for (int i = next - 1; i <= next && i < argc; i++) {
        if (i < 1 || argv[i][0] != '-' || argv[i][1] == '\0')
            continue;
        if (argv[i][1] == '-' ? explain_long(c, &all, argv[i])
                              : explain_short(c, &all, argv[i]))
            break;
    }
    if (c->err.code == TV_OK)
        (void)tvc_bad(c, "bad command line");
}

/* The long option before `next` belongs to cmd. */
static bool option_of(const struct tvc_command *cmd, int argc, char **argv,
                      int next)
{
    if (!cmd || next < 2 || next > argc ||
        strncmp(argv[next - 1], "--", 2) != 0)
        return false;
    const char *word = argv[next - 1] + 2;
    const size_t len = strcspn(word, "=");
    struct names all = {.n = 0};
    names_add(&all, cmd->options);
    for (size_t i = 0; i < all.n; i++)
        if (strlen(all.word[i]) == len && strncmp(all.word[i], word, len) == 0)
            return true;
    return false;
}

static const struct tvc_command *command_find(const struct tvc_tool *t,
                                              const char *name)
{
    for (size_t i = 0; i < t->n_commands; i++)
        if (strcmp(t->commands[i]->name, name) == 0)
            return t->commands[i];
    return NULL;
}

static void unknown_command(struct tvc *c, const char *name)
{
    const char *words[64];
    size_t n = 0;
    for (; n < c->tool->n_commands && n < 64; n++)
        words[n] = c->tool->commands[n]->name;
    const char *near = tv_suggest(name, words, n);
    (void)tvc_bad(c, "unknown command '%s'", name);
    if (near)
        tv_error_hint(&c->err, "did you mean '%s %s'?", c->tool->name, near);
    else
        tv_error_hint(&c->err, "'%s --help' lists the commands", c->tool->name);
}

/* ---- help
 * ---------------------------------------------------------------------- */

static void add_examples(struct tv_buf *b, const char *examples)
{
    tv_buf_str(b, "\nExamples:\n");
    for (const char *line = examples; line && *line;) {
        const size_t len = strcspn(line, "\n");
        size_t head = len;
        /* argp would break a long line anywhere: it must stay one command. */
        if (len > 76)
            for (head = 72; head > 0 && line[head] != ' ';)
                head--;
        if (head == 0 || head == len)
            tv_buf_fmt(b, "  %.*s\n", (int)len, line);
        else
            tv_buf_fmt(b, "  %.*s \\\n    %.*s\n", (int)head, line,
                       (int)(len - head - 1), line + head + 1);
        line += len + (line[len] == '\n');
    }
}

static void add_commands(struct tv_buf *b, const struct tvc_tool *t)
{
    tv_buf_str(b, "Commands ('");
    tv_buf_str(b, t->name);
    tv_buf_str(b, " COMMAND --help' explains one):\n");
    for (size_t i = 0; i < t->n_commands; i++)
        tv_buf_fmt(b, "  %-12s %s\n", t->commands[i]->name,
                   t->commands[i]->summary);
    tv_buf_str(b, "\n");
}

/* The remark on arguments of short options says nothing about ours. */
static char *help_filter(int key, const char *text, void *input)
{
    (void)input;
    return key == ARGP_KEY_HELP_DUP_ARGS_NOTE ? NULL : (char *)(uintptr_t)text;
}

static ssize_t help_write(void *print, const char *data, size_t n)
{
    tvc_out_bytes(print, data, n);
    return (ssize_t)n;
}

static void help_print(struct tvc *c, const struct tvc_command *cmd)
{
    const struct tvc_tool *t = c->tool;
    char args[256];
    struct tv_buf doc;
    tv_buf_init(&doc, 1 << 16);

    tv_buf_fmt(&doc, "%s\v", cmd ? cmd->summary : t->summary);
    if (!cmd)
        add_commands(&doc, t);
    if (cmd && cmd->text)
        tv_buf_fmt(&doc, "%s\n\n", cmd->text);
    tv_buf_str(&doc, environment_text);
    add_examples(&doc, cmd ? cmd->examples : t->examples);
    (void)snprintf(args, sizeof args, "%s%s%s",
                   cmd ? cmd->args_doc : "COMMAND [ARG...]",
                   !cmd && t->short_usage ? "\n" : "",
                   !cmd && t->short_usage ? t->short_usage : "");

    const struct argp argp = {.options = cmd ? cmd->options : NULL,
                              .parser = cmd ? command_option : top_option,
                              .args_doc = args,
                              .doc = doc.failed ? "" : doc.data,
                              .children = common_child,
                              .help_filter = help_filter};
    char name[64];
    (void)snprintf(name, sizeof name, "%s%s%s", t->name, cmd ? " " : "",
                   cmd ? cmd->name : "");
    const cookie_io_functions_t to_stdout = {.write = help_write};
    FILE *f = fopencookie(&c->out, "w", to_stdout);
    if (f) {
        argp_help(&argp, f,
                  c->want_usage
                      ? ARGP_HELP_USAGE
                      : ARGP_HELP_SHORT_USAGE | ARGP_HELP_LONG | ARGP_HELP_DOC,
                  name);
        (void)fclose(f);
    }
    tv_buf_free(&doc);
}

/* ---- running
 * ------------------------------------------------------------------- */

/* A descriptor 0, 1 or 2 that is closed would be given to the next file we
 * open, say a store, and our output would be written into it. */
static void occupy_standard_files(void)
{
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) >= 0 || errno != EBADF)
            continue;
        /* Reading only: what is written there fails, as it should. */
        if (tv_sys()->open("/dev/null", O_RDONLY, 0) != fd)
            return;
    }
}

static enum tv_err environment_read(struct tvc *c)
{
    const char *cpu = getenv("TV_CPU");
    enum tvk_isa cap = TVK_REF;
    c->kernels = tvk_table_best();
    if (cpu && *cpu) {
        if (tvk_isa_from_name(cpu, &cap) != 0)
            return tv_error_set(&c->err, TV_E_USAGE,
                                "TV_CPU: '%s' is not one of ref, avx2, avx512, "
                                "amx",
                                cpu);
        c->kernels = tvk_table_for(cap);
    }
    const char *progress = getenv("TV_PROGRESS");
    if (progress && *progress && parse_progress(c, "TV_PROGRESS", progress))
        return c->err.code;
    return TV_OK;
}

static enum tv_err positions_check(struct tvc *c, const struct tvc_command *cmd)
{
    if (c->n_pos > cmd->max_pos)
        (void)tvc_bad(c, "unexpected argument '%s'", c->pos[cmd->max_pos]);
    else if (c->n_pos < cmd->min_pos)
        (void)tvc_bad(c, "%s",
                      c->n_pos == 0 ? "arguments are missing"
                                    : "an argument is missing");
    else
        return TV_OK;
    /* A line per form; a hint is one line. */
    struct tv_buf forms;
    tv_buf_init(&forms, 1024);
    for (const char *p = cmd->args_doc; *p; p++) {
        if (*p == '\n')
            tv_buf_str(&forms, ", or ");
        else
            tv_buf_add(&forms, p, 1);
    }
    tv_buf_add(&forms, "", 1);
    if (!forms.failed)
        tv_error_hint(&c->err, "usage: %s %s [OPTION...] %s", c->tool->name,
                      cmd->name, forms.data);
    tv_buf_free(&forms);
    return c->err.code;
}

/* Parses the arguments of cmd, argv[0] being in place of its name. */
static enum tv_err command_parse(struct tvc *c, const struct tvc_command *cmd,
                                 int argc, char **argv)
{
    const struct argp argp = {.options = cmd->options,
                              .parser = command_option,
                              .children = common_child};
    c->parsing = cmd;
    if (cmd->opt_bytes && !c->opt) {
        c->opt = tv_calloc(1, cmd->opt_bytes);
        if (!c->opt)
            return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
    }
    if (cmd->init)
        cmd->init(c);
    const error_t e = argp_parse(&argp, argc, argv, PARSE_FLAGS, NULL, c);
    if (e == ENOMEM)
        return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
    if (e != 0) {
        if (c->err.code == TV_OK)
            explain(c, cmd, argc, argv, c->stopped_at);
        if (c->err.code == TV_E_USAGE && !c->err.hint[0])
            tv_error_hint(&c->err, "'%s %s --help' lists the options",
                          c->tool->name, cmd->name);
        return c->err.code;
    }
    return TV_OK;
}

/* Options of the short form may come before everything else: then a command's
 * name can only be the first argument, and only be the one they belong to. */
static enum tv_err drop_command_name(struct tvc *c)
{
    if (c->n_pos == 0)
        return TV_OK;
    const struct tvc_command *named = command_find(c->tool, c->pos[0]);
    if (!named)
        return TV_OK;
    if (named != c->tool->short_form) {
        (void)tvc_bad(c, "options of a command go behind its name: %s %s",
                      c->tool->name, named->name);
        return c->err.code;
    }
    c->n_pos--;
    memmove(c->pos, c->pos + 1, c->n_pos * sizeof *c->pos);
    return TV_OK;
}

static enum tv_err parse_all(struct tvc *c)
{
    const struct tvc_tool *t = c->tool;
    const struct argp top = {.parser = top_option, .children = common_child};
    enum tv_err rc = TV_OK;

    c->command_at = 0;
    const error_t e = argp_parse(&top, c->argc, c->argv, PARSE_FLAGS, NULL, c);
    if (e == ENOMEM)
        return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
    if (e != 0) {
        const int next = c->stopped_at;
        if (c->err.code != TV_OK)
            return c->err.code;
        if (!option_of(t->short_form, c->argc, c->argv, next)) {
            explain(c, t->short_form, c->argc, c->argv, next);
            return c->err.code;
        }
        c->cmd = t->short_form;
        c->out.verbose = 0;
        rc = command_parse(c, c->cmd, c->argc, c->argv);
        return rc == TV_OK ? drop_command_name(c) : rc;
    }
    if (c->want_help || c->want_usage || c->want_version)
        return TV_OK;
    if (c->command_at == 0) {
        (void)tvc_bad(c, "a command is missing");
        tv_error_hint(&c->err, "'%s --help' lists the commands", t->name);
        return c->err.code;
    }
    const char *word = c->argv[c->command_at];
    c->cmd = command_find(t, word);
    if (c->cmd)
        return command_parse(c, c->cmd, c->argc - c->command_at,
                             c->argv + c->command_at);
    if (strcmp(word, "help") == 0 && !tv_path_exists(word)) {
        const char *topic = c->argv[c->command_at + 1]; /* or the final NULL */
        c->want_help = true;
        c->cmd = topic ? command_find(t, topic) : NULL;
        if (topic && !c->cmd)
            unknown_command(c, topic);
        return c->err.code;
    }
    if (t->short_form && t->is_short(word)) {
        c->cmd = t->short_form;
        c->out.verbose = 0;
        return command_parse(c, c->cmd, c->argc, c->argv);
    }
    unknown_command(c, word);
    return c->err.code;
}

/* "--device cuda:1" in front of an error, and what else can be done. */
static enum tv_err device_explain(struct tvc *c)
{
    tv_error_context(&c->err, "--device cuda:%d", c->device_index);
    if (!c->err.hint[0])
        tv_error_hint(&c->err, "--device cpu does all that is done there "
                               "(matrix work within rounding)");
    return c->err.code;
}

/* A device that was asked for and is not there is no small matter, whether the
 * command would have used it or not. */
static enum tv_err device_check(struct tvc *c)
{
    if (c->device != TVC_DEVICE_CUDA ||
        tvk_cuda_find(c->device_index, &c->err) == TV_OK)
        return TV_OK;
    return device_explain(c);
}

/* Of the command line and the environment. */
static enum tv_err device_options(struct tvc *c, struct tvk_cuda_options *o)
{
    const char *least = getenv("TV_CUDA_LEAST");
    uint64_t n = 0;

    tvk_cuda_options_init(o);
    o->index = c->device_index;
    o->memory_bytes = c->device_memory_bytes;
    o->factor_bytes = c->device_factor_bytes;
    /* It is part of --memory. */
    if (o->staging_bytes > c->memory_bytes / 8)
        o->staging_bytes = (size_t)(c->memory_bytes / 8);
    if (least && *least) {
        if (tvc_parse_u64(c, "TV_CUDA_LEAST", least, SIZE_MAX, &n))
            return c->err.code;
        o->least_elems = (size_t)n;
    }
    return TV_OK;
}

enum tv_err tvc_device_open(struct tvc *c, tvk_cuda **out)
{
    struct tvk_cuda_options o;

    if (!c->cuda && c->device == TVC_DEVICE_CUDA) {
        const enum tv_err rc = device_options(c, &o);
        if (rc != TV_OK)
            return rc;
        if (tvk_cuda_open(&o, &c->err, &c->cuda) != TV_OK)
            return device_explain(c);
    }
    *out = c->cuda;
    return TV_OK;
}

/* Work on fewer parameters is done before a GPU is ready. */
#define AUTO_ELEMS  ((uint64_t)1 << 26)
/* With less memory it is doubtful what fits. */
#define AUTO_MEMORY ((uint64_t)1 << 30)

enum tv_err tvc_device_for(struct tvc *c, uint64_t n_elems, tvk_cuda **out)
{
    struct tvk_cuda_options o;
    struct tv_error why = {.code = TV_OK};
    tvk_cuda *d = NULL;

    if (c->device != TVC_DEVICE_AUTO || c->cuda || c->auto_tried)
        return tvc_device_open(c, out);
    *out = NULL;
    enum tv_err rc = device_options(c, &o);
    if (rc != TV_OK || n_elems == 0 ||
        (n_elems < AUTO_ELEMS && o.least_elems > 0))
        return rc;
    /* Nobody asked for one: where there is none, the CPU does it all. */
    c->auto_tried = true;
    if (tvk_cuda_find(o.index, NULL) != TV_OK ||
        tvk_cuda_math_find(NULL) != TV_OK ||
        tvk_cuda_open(&o, NULL, &d) != TV_OK)
        return TV_OK;
    if (tvk_cuda_about(d)->budget_bytes >= AUTO_MEMORY || o.least_elems == 0) {
        rc = tvk_cuda_check(d, &why);
        if (rc == TV_OK) {
            *out = c->cuda = d;
            return TV_OK;
        }
        tvc_warn(&c->out, "the GPU is not used: %s", why.msg);
    }
    tvk_cuda_close(d);
    return TV_OK;
}

void tvc_device_name(const struct tvc *c, char *dst, size_t cap)
{
    if (c->cuda)
        (void)snprintf(dst, cap, "cuda:%d", tvk_cuda_about(c->cuda)->index);
    else
        (void)snprintf(dst, cap, "cpu");
}

enum tv_err tvc_device_kernels(struct tvc *c, const struct tvk_table **out)
{
    tvk_cuda *d = NULL;
    enum tv_err rc = TV_OK;

    *out = c->kernels;
    if (c->device != TVC_DEVICE_CUDA)
        return TV_OK;
    rc = tvc_device_open(c, &d);
    if (rc == TV_OK)
        rc = tvk_cuda_table(d, c->kernels, &c->err, out);
    return rc;
}

static bool json_wanted(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--json") == 0)
            return true;
    return false;
}

static int run_command(struct tvc *c)
{
    if (parse_all(c) != TV_OK)
        return tvc_fail(c, &c->err);
    if (c->want_help || c->want_usage) {
        help_print(c, c->cmd);
        return tvc_done(c, 0);
    }
    if (c->want_version) {
        tvc_version(c);
        return tvc_done(c, 0);
    }
    if (positions_check(c, c->cmd) != TV_OK)
        return tvc_fail(c, &c->err);
    if (device_check(c) != TV_OK)
        return tvc_fail(c, &c->err);
    tvc_print_ready(&c->out);
    tvc_signals_install(c->tool->name, c->cmd->cancellable, c->out.json);
    return c->cmd->run(c);
}

int tvc_main(const struct tvc_tool *tool, int argc, char **argv)
{
    struct tvc c = {.tool = tool, .memory_bytes = UINT64_C(512) << 20};
    int status = 2;

    argp_err_exit_status = 2;
    occupy_standard_files();
    tvc_signals_install(tool->name, false, false);
    tvc_print_init(&c.out, tool->name);
    c.argc = argc;
    c.argv = argv;
    /* An error about an option in front of --json is a document too. */
    c.out.json = json_wanted(argc, argv);
    c.pos = tv_calloc((size_t)argc + 1, sizeof *c.pos);
    if (argc < 1 || !c.pos)
        (void)tv_error_set(&c.err, TV_E_NOMEM, "out of memory");
    if (c.err.code == TV_OK && environment_read(&c) == TV_OK)
        status = run_command(&c);
    else
        status = tvc_fail(&c, &c.err);
    tvk_cuda_close(c.cuda);
    tv_free(c.opt);
    tv_free(c.pos);
    tvc_print_free(&c.out);
    return status;
}

/* ---- small things
 * ---------------------------------------------------------------- */

static bool is_plain(const char *s)
{
    static const char safe[] = "abcdefghijklmnopqrstuvwxyz"
                               "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                               "0123456789_@%+=:,./-";
    return *s && strspn(s, safe) == strlen(s);
}

char *tvc_command_line(const struct tvc *c)
{
    struct tv_buf b;
    tv_buf_init(&b, 1 << 20);
    for (int i = 0; i < c->argc; i++) {
        const char *s = c->argv[i];
        tv_buf_str(&b, i ? " " : "");
        if (is_plain(s)) {
            tv_buf_str(&b, s);
            continue;
        }
        tv_buf_str(&b, "'");
        for (; *s; s++) {
            if (*s == '\'')
                tv_buf_str(&b, "'\\''");
            else
                tv_buf_add(&b, s, 1);
        }
        tv_buf_str(&b, "'");
    }
    if (b.failed) {
        tv_buf_free(&b);
        return NULL;
    }
    char *line = tv_strdup(b.data);
    tv_buf_free(&b);
    return line;
}

unsigned tvc_threads(const struct tvc *c)
{
    return c->threads ? c->threads : tv_cpu_count();
}

const char *tvc_default_store(void)
{
    const char *s = getenv("TV_STORE");
    return s && *s ? s : NULL;
}
