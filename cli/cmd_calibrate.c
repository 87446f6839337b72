/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_calibrate.c - tveval calibrate: statistics of the inputs of every linear
 * layer over a task's own text, kept in a store for importance methods.
 *
 * Blocks that are in the store are not computed again, so the same command
 * continues after an interruption, and asked again it does nothing. Random
 * tokens stand for no task: they are used on request only and said wherever
 * their statistics show.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "eval_options.h"
#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/derived.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"

#define TEXT_BYTES_MAX (UINT64_C(1) << 34)
#define TEXTS_MAX      256u

enum {
    KEY_TEXT = 0x580,
    KEY_IDS,
    KEY_RANDOM,
    KEY_SEED,
    KEY_STORE,
    KEY_SAMPLES,
    KEY_CONTEXT,
    KEY_STAT
};

struct opts {
    const char *texts[TEXTS_MAX];
    size_t n_texts;
    const char *ids;
    bool random;
    uint64_t seed;
    const char *store, *out;
    struct tvc_eval_opts eval; /* the tokenizer of it */
    struct tve_sampling how;
    enum tve_stat stat;
};

static void init(struct tvc *c)
{
    struct opts *o = c->opt;
    o->how.bos = -2;
}

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;

    switch (key) {
    case KEY_TEXT:
        if (o->n_texts == TEXTS_MAX)
            return tvc_bad(c, "more than %u texts", TEXTS_MAX);
        o->texts[o->n_texts++] = arg;
        return 0;
    case KEY_IDS:
        o->ids = arg;
        return 0;
    case KEY_RANDOM:
        o->random = true;
        return 0;
    case KEY_SEED:
        return tvc_parse_u64(c, "--random-seed", arg, UINT64_MAX, &o->seed);
    case 'o':
        o->out = arg;
        return 0;
    case KEY_STORE:
        o->store = arg;
        return 0;
    case KEY_SAMPLES:
        return tvc_parse_count(c, "--samples", arg, &o->how.samples);
    case KEY_CONTEXT:
        return tvc_parse_count(c, "--context", arg, &o->how.context);
    case KEY_STAT:
        if (strcmp(arg, "diag") != 0 && strcmp(arg, "gram") != 0)
            return tvc_bad(c, "--stat: '%s' is neither diag nor gram", arg);
        o->stat = strcmp(arg, "gram") == 0 ? TVE_STAT_GRAM : TVE_STAT_DIAG;
        return 0;
    case TVC_KEY_BOS:
        return tvc_parse_bos(c, arg, &o->how.bos);
    default:
        return tvc_eval_option(c, key, arg, &o->eval);
    }
}

struct job {
    struct tvc *c;
    struct opts *o;
    tv_store *store;
    struct tvc_subject subject;
    tve_model *model;
    struct tve_samples samples;
    struct tve_calibration_use use;
    json_t *about;
    tve_calibration *calibration;
};

static enum tv_err check_options(struct tvc *c, const struct opts *o)
{
    const int n = (o->n_texts > 0) + (o->ids != NULL) + o->random;

    if (n > 1)
        return tv_error_set(&c->err, TV_E_USAGE,
                            "--text, --ids and --random-tokens exclude each "
                            "other");
    if (n == 0) {
        (void)tv_error_set(&c->err, TV_E_USAGE,
                           "no text to calibrate on: add --text FILE");
        tv_error_hint(&c->err, "a text of the task that the model was tuned "
                               "for; --random-tokens describes no task");
        return TV_E_USAGE;
    }
    if (!o->store && !tvc_default_store()) {
        (void)tv_error_set(&c->err, TV_E_USAGE,
                           "no store to keep the statistics in");
        tv_error_hint(&c->err, "add --store STORE or set TV_STORE");
        return TV_E_USAGE;
    }
    return TV_OK;
}

/* ---- windows --------------------------------------------------------------
 */

static json_t *text_json(const char *file, const char *data, size_t n)
{
    char hex[33];
    return json_pack("{s:o, s:s}", "file", tvc_json_string(file), "digest",
                     tv_hash_hex(tv_hash128(data, n), hex));
}

static enum tv_err from_texts(struct job *j, json_t *list)
{
    struct tvc *c = j->c;
    struct opts *o = j->o;
    enum tv_err rc = TV_OK;
    tve_tokenizer *tokenizer = NULL;
    struct tve_ids *ids = tv_calloc(o->n_texts, sizeof *ids);
    char *text = NULL;
    int32_t bos = -1;

    if (!ids) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tve_tokenizer_of(j->subject.input, o->eval.tokenizer, &bos, &c->err,
                            &tokenizer));
    if (o->how.bos == -2)
        o->how.bos = bos;
    for (size_t i = 0; i < o->n_texts; i++) {
        size_t n = 0;

        tv_free(text);
        text = NULL;
        TV_TRY(tv_file_read(o->texts[i], TEXT_BYTES_MAX, &c->err, &text, &n));
        rc = tve_tokenizer_encode(tokenizer, text, n, false, &ids[i], &c->err);
        if (rc != TV_OK) {
            tv_error_context(&c->err, "%s", o->texts[i]);
            goto out;
        }
        (void)json_array_append_new(list, text_json(o->texts[i], text, n));
    }
    rc = tve_samples_text(ids, o->n_texts, &o->how, &c->err, &j->samples);
out:
    for (size_t i = 0; ids && i < o->n_texts; i++)
        tve_ids_free(&ids[i]);
    tv_free(ids);
    tv_free(text);
    tve_tokenizer_close(tokenizer);
    return rc;
}

/* Two dimensions are windows as they are, one is a text. */
static enum tv_err from_ids(struct job *j, json_t *list)
{
    struct tvc *c = j->c;
    const struct opts *o = j->o;
    enum tv_err rc = TV_OK;
    struct tvc_ids ids = {0};
    struct tve_sampling how = o->how;

    TV_TRY(tvc_ids_read(o->ids, &ids, &c->err));
    const size_t n = ids.batch * ids.seq;
    (void)json_array_append_new(
        list, text_json(o->ids, (const char *)ids.ids, n * sizeof *ids.ids));
    if (ids.rows) {
        if (how.samples || how.context)
            tvc_note(&c->out,
                     "the rows of %s are the windows: --samples and "
                     "--context change nothing",
                     o->ids);
        rc = tve_samples_ids(ids.ids, ids.batch, ids.seq, &c->err, &j->samples);
    } else {
        const struct tve_ids text = {.ids = ids.ids, .n = n, .cap = n};
        if (how.bos == -2)
            TV_TRY(tve_bos_of(j->subject.input, &how.bos, &c->err));
        rc = tve_samples_text(&text, 1, &how, &c->err, &j->samples);
    }
    if (rc != TV_OK)
        tv_error_context(&c->err, "%s", o->ids);
out:
    tvc_ids_free(&ids);
    return rc;
}

static enum tv_err make_samples(struct job *j)
{
    struct tvc *c = j->c;
    struct opts *o = j->o;
    enum tv_err rc = TV_OK;
    json_t *list = json_array();

    o->how.positions = tve_model_positions(j->model);
    if (o->random) {
        if (o->how.bos == -2)
            TV_TRY(tve_bos_of(j->subject.input, &o->how.bos, &c->err));
        TV_TRY(tve_samples_random(tve_model_vocab(j->model), o->seed, &o->how,
                                  &c->err, &j->samples));
        tvc_warn(&c->out, "calibrating on random tokens: what the statistics "
                          "call important is not what a task needs");
    } else if (o->ids) {
        TV_TRY(from_ids(j, list));
    } else {
        TV_TRY(from_texts(j, list));
    }
    if (!o->random && j->samples.n < j->samples.n_available)
        tvc_say(&c->out, "%zu of %zu windows of the text", j->samples.n,
                j->samples.n_available);
out:
    if (rc == TV_OK)
        j->about =
            json_pack("{s:s, s:o, s:s, s:o, s:o, s:o, s:O}", "type",
                      "statistics", "model", tvc_json_string(c->pos[0]),
                      "statistic", o->stat == TVE_STAT_GRAM ? "gram" : "diag",
                      "samples", tvc_json_u64(j->samples.n), "context",
                      tvc_json_u64(j->samples.context), "random",
                      json_boolean(j->samples.random), "texts", list);
    json_decref(list);
    return rc;
}

/* ---- report ---------------------------------------------------------------
 */

static uint64_t total_bytes(const tve_calibration *k)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < tve_calibration_count(k); i++) {
        const struct tve_stat_input *in = tve_calibration_input(k, i);
        bytes += (uint64_t)tve_stat_size(in->kind, in->n) *
                 (in->kind == TVE_STAT_GRAM ? sizeof(float) : sizeof(double));
    }
    return bytes;
}

static void report(const struct job *j, double seconds)
{
    struct tvc *c = j->c;
    const struct tve_calibration_use *u = &j->use;
    const size_t n = tve_calibration_count(j->calibration);
    const uint64_t bytes = total_bytes(j->calibration);
    const double rate = u->n_computed > 0 && seconds > 0
                            ? (double)j->samples.n_tokens / seconds
                            : 0;
    char hex[33], size[32];

    (void)tv_hash_hex(tve_calibration_key(j->calibration), hex);
    if (c->out.json) {
        json_t *doc = json_pack("{s:s}", "schema", "tveval.calibrate/1");
        (void)json_object_update(doc, j->about);
        (void)json_object_del(doc, "type");
        (void)json_object_update_new(
            doc, json_pack(
                     "{s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "store",
                     tv_store_path(j->store), "key", hex, "tokens",
                     tvc_json_u64(j->samples.n_tokens), "n_inputs",
                     tvc_json_u64(n), "n_resumed", tvc_json_u64(u->n_found),
                     "n_computed", tvc_json_u64(u->n_computed), "bytes",
                     tvc_json_u64(bytes), "seconds", tvc_json_measured(seconds),
                     "tokens_per_second", tvc_json_measured(rate)));
        tvc_out_json(&c->out, doc);
        return;
    }
    tvc_out(&c->out,
            "%s of %zu inputs over %zu windows of %zu tokens%s, %s in %s\n",
            j->o->stat == TVE_STAT_GRAM ? "X^T X" : "sums of squares", n,
            j->samples.n, j->samples.context,
            j->samples.random ? " (random)" : "",
            tv_format_bytes(bytes, size, sizeof size), tv_store_path(j->store));
    if (u->n_found)
        tvc_say(&c->out, "%zu of them were there before", u->n_found);
    if (u->n_computed)
        tvc_say(&c->out, "%.0f tokens per second", rate);
}

/* ---- arrays for others ----------------------------------------------------
 */

/* Row i of the symmetric matrix whose upper triangle is packed row by row. */
static void full_row(const float *gram, size_t n, size_t i, float *dst)
{
    const float *at = gram + i;

    for (size_t k = 0; k < i; k++, at += n - k)
        dst[k] = *at;
    memcpy(dst + i, at, (n - i) * sizeof *dst);
}

static enum tv_err put_values(int fd, const char *path,
                              const struct tve_stat_input *in,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t shape[2] = {in->n, in->n};
    uint64_t at = TVC_NPY_HEADER;
    char header[TVC_NPY_HEADER];
    float *row = NULL;

    tvc_npy_header(header, in->gram ? "<f4" : "<f8", shape, in->gram ? 2 : 1);
    TV_TRY(tv_pwrite_all(fd, header, sizeof header, 0, path, err));
    if (!in->gram) {
        rc = tv_pwrite_all(fd, in->sums, in->n * sizeof *in->sums, at, path,
                           err);
        goto out;
    }
    row = tv_calloc(in->n, sizeof *row);
    if (!row) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < in->n; i++, at += in->n * sizeof *row) {
        full_row(in->gram, in->n, i, row);
        TV_TRY(tv_pwrite_all(fd, row, in->n * sizeof *row, at, path, err));
    }
out:
    tv_free(row);
    return rc;
}

/* DIR/TENSOR.npy */
static enum tv_err write_array(void *arg, const struct tve_stat_input *in,
                               struct tv_error *err)
{
    const struct job *j = arg;
    enum tv_err rc = TV_OK;
    char *path = tv_asprintf("%s/%s.npy", j->o->out, in->tensors[0]);
    int fd = -1;

    if (!path)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    if (strchr(in->tensors[0], '/')) {
        rc = tv_error_set(err, TV_E_INPUT, "\"%s\" is no file name",
                          in->tensors[0]);
        goto out;
    }
    fd = tv_sys()->open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot write %s", path);
        goto out;
    }
    TV_TRY(put_values(fd, path, in, err));
    const int closing = fd;
    fd = -1;
    if (tv_sys()->close(closing) != 0)
        rc = tv_error_sys(err, errno, "cannot write %s", path);
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

static enum tv_err calibrate(struct job *j)
{
    struct tvc *c = j->c;
    enum tv_err rc = TV_OK;
    struct tvc_progress *bar = NULL;
    char *about = tv_json_text(j->about, JSON_COMPACT | JSON_SORT_KEYS);
    const struct tve_calibration_options opt = {.kind = j->o->stat,
                                                .store = j->store,
                                                .keep = TVE_KEEP_ALL,
                                                .about = about};
    const double begin = tvc_seconds();
    bool exists = false;

    if (!about) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (j->o->out) {
        TV_TRY(tv_out_dir_check(j->o->out, &c->err, &exists));
        TV_TRY(tv_dir_make(j->o->out, &c->err));
    }
    TV_TRY(tve_calibration_open(j->model, &j->samples, &opt, &c->err,
                                &j->calibration));
    bar = tvc_progress_begin(&c->out, "calibrate", "tokens");
    const struct tve_progress progress = {tvc_eval_step, bar,
                                          tvc_cancel_flag()};
    rc = tve_calibration_run(j->calibration, NULL, &progress,
                             j->o->out ? write_array : NULL, j, &j->use,
                             &c->err);
    tvc_progress_end(bar);
    if (rc == TV_OK)
        report(j, tvc_seconds() - begin);
    /* without it they go with this process */
    if (tv_derived_release(j->store, NULL, 0, NULL) != TV_OK)
        tvc_note(&c->out, "the store was not told that the work is over");
out:
    tv_free(about);
    return rc;
}

static int run(struct tvc *c)
{
    struct opts *o = c->opt;
    struct job j = {.c = c, .o = o};
    const char *path = o->store ? o->store : tvc_default_store();
    enum tv_err rc = TV_OK;

    TV_TRY(check_options(c, o));
    TV_TRY(tvc_store_open(c, path, false, &c->err, &j.store));
    if (tv_store_is_read_only(j.store)) {
        rc = tv_error_set(&c->err, TV_E_IO,
                          "%s is on read-only media: statistics are kept in a "
                          "store that can be written",
                          path);
        goto out;
    }
    TV_TRY(tvc_subject_open_in(c, c->pos[0], j.store, &j.subject));
    TV_TRY(tvc_subject_model(c, &j.subject, &j.model));
    TV_TRY(make_samples(&j));
    TV_TRY(tvc_subject_fit(c, &j.subject, TVE_PASS_STATISTICS,
                           j.samples.context, &j.model));
    TV_TRY(calibrate(&j));
out:
    tve_calibration_close(j.calibration);
    tve_samples_free(&j.samples);
    json_decref(j.about);
    tve_model_close(j.model);
    tvc_subject_close(&j.subject);
    tv_store_close(j.store);
    if (rc == TV_E_INTERRUPTED)
        return tvc_interrupted(c);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

static const struct argp_option options[] = {
    {"text", KEY_TEXT, "FILE", 0, "Text of the task, in UTF-8; may be repeated",
     0},
    {"ids", KEY_IDS, "FILE.npy", 0,
     "Token ids instead: rows of two dimensions are the windows, one dimension "
     "is a text",
     0},
    {"random-tokens", KEY_RANDOM, NULL, 0,
     "Random tokens instead: recorded, and warned of wherever they are used",
     0},
    {"random-seed", KEY_SEED, "N", 0, "Seed of --random-tokens (default 0)", 0},
    {"store", KEY_STORE, "STORE", 0,
     "Where the statistics are kept, and store of store:NAME references", 0},
    {"samples", KEY_SAMPLES, "N", 0,
     "Windows at most, spread evenly over the texts (default 128)", 0},
    {"context", KEY_CONTEXT, "N", 0,
     "Tokens of a window (default 512, or the model's limit)", 0},
    {"stat", KEY_STAT, "diag|gram", 0,
     "diag (default): the sum of squares of each input channel; gram: X^T X",
     0},
    {"out", 'o', "DIR", 0,
     "Also write every statistic to DIR/TENSOR.npy, X^T X in full", 0},
    TVC_OPTION_TOKENIZER(0),
    TVC_OPTION_BOS(0),
    {0},
};

const struct tvc_command tvc_cmd_calibrate = {
    .name = "calibrate",
    .summary = "statistics of the inputs of every linear layer",
    .args_doc = "REF",
    .text = "Runs the model over a text of its task and keeps, for the inputs "
            "of every\nlinear layer, what importance methods need to know. "
            "Projections of one input\nshare it; the embedding has token "
            "counts. A block is in the store before the\nnext begins: after "
            "an interruption the same command continues, and when all\nis "
            "there it does nothing. Statistics are derived data: the quota "
            "may evict\nthem when other things need the room.",
    .examples = "tveval calibrate ./ft --text code.txt --store models.tv\n"
                "tveval calibrate ./base+./lora --text a.txt --text b.txt "
                "--store m.tv\n"
                "tveval calibrate ./ft --ids ids.npy --store m.tv --stat gram",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .init = init,
    .option = option,
    .min_pos = 1,
    .max_pos = 1,
    .cancellable = true,
    .run = run,
};
