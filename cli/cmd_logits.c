/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_logits.c - tveval logits: what a model says about given token ids.
 */
#include <fcntl.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "progress.h"
#include "signals.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/sys.h"
#include "tveval.h"

enum { KEY_IDS = 0x520, KEY_STORE };

struct opts {
    const char *ids, *out, *store;
};

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_IDS:
        o->ids = arg;
        return 0;
    case 'o':
        o->out = arg;
        return 0;
    case KEY_STORE:
        o->store = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

struct sink {
    struct tvc *c;
    const char *path; /* NULL: stdout */
    int fd;
    bool regular;
    uint64_t at;
    size_t vocab;
};

static enum tv_err put(struct sink *s, const void *data, size_t n,
                       struct tv_error *err)
{
    if (!s->path) {
        tvc_out_bytes(&s->c->out, data, n);
        return TV_OK;
    }
    const enum tv_err rc = tv_pwrite_all(s->fd, data, n, s->at, s->path, err);
    s->at += n;
    return rc;
}

static enum tv_err put_header(struct sink *s, size_t batch, size_t seq,
                              struct tv_error *err)
{
    const size_t shape[3] = {batch, seq, s->vocab};
    char header[TVC_NPY_HEADER];

    tvc_npy_header(header, "<f4", shape, 3);
    return put(s, header, sizeof header, err);
}

static enum tv_err rows(void *arg, size_t at, size_t n, const float *logits,
                        struct tv_error *err)
{
    struct sink *s = arg;
    (void)at;
    return put(s, logits, n * s->vocab * sizeof *logits, err);
}

static int run(struct tvc *c)
{
    const struct opts *o = c->opt;
    enum tv_err rc = TV_OK;
    struct tvc_subject subject = {0};
    struct tvc_ids ids = {0};
    struct tvc_progress *bar = NULL;
    struct sink s = {.c = c, .path = o->out, .fd = -1};
    tve_model *model = NULL;

    if (!o->ids) {
        rc = tv_error_set(&c->err, TV_E_USAGE, "no ids: add --ids IDS.npy");
        goto out;
    }
    if (c->out.json && !o->out) {
        rc = tv_error_set(&c->err, TV_E_USAGE,
                          "with --json the logits need a file: add -o OUT.npy");
        goto out;
    }
    TV_TRY(tvc_ids_read(o->ids, &ids, &c->err));
    TV_TRY(tvc_subject_open(c, c->pos[0], o->store, &subject));
    TV_TRY(tvc_subject_model(c, &subject, &model));
    TV_TRY(tvc_subject_fit(c, &subject, TVE_PASS_LOGITS, ids.seq, &model));
    s.vocab = tve_model_vocab(model);
    if (s.path) {
        s.fd = tv_sys()->open(s.path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC,
                              0666);
        if (s.fd < 0) {
            rc = tv_error_sys(&c->err, errno, "cannot write %s", s.path);
            goto out;
        }
        struct stat st; /* nobody's device is removed */
        s.regular = tv_sys()->fstat(s.fd, &st) == 0 && S_ISREG(st.st_mode);
    }
    TV_TRY(put_header(&s, ids.batch, ids.seq, &c->err));
    bar = tvc_progress_begin(&c->out, "logits", "tokens");
    const struct tve_progress progress = {tvc_eval_step, bar,
                                          tvc_cancel_flag()};
    TV_TRY(tve_logits(model, ids.ids, ids.batch, ids.seq, &progress, rows, &s,
                      &c->err));
    tvc_progress_end(bar);
    bar = NULL;
    tvc_subject_told(c, model);
    if (s.fd >= 0) {
        const int fd = s.fd;
        s.fd = -1;
        if (tv_sys()->close(fd) != 0)
            rc = tv_error_sys(&c->err, errno, "cannot write %s", s.path);
    }
    if (rc == TV_OK && c->out.json && s.path)
        tvc_out_json(&c->out, json_pack("{s:s, s:o, s:o, s:o, s:o, s:o}",
                                        "schema", "tveval.logits/1", "model",
                                        tvc_json_string(c->pos[0]), "out",
                                        tvc_json_string(s.path), "batch",
                                        tvc_json_u64(ids.batch), "seq",
                                        tvc_json_u64(ids.seq), "vocab",
                                        tvc_json_u64(s.vocab)));
out:
    tvc_progress_end(bar);
    if (s.fd >= 0)
        (void)tv_sys()->close(s.fd);
    /* a file that was begun and not finished is not logits */
    if (rc != TV_OK && s.at > 0 && s.regular)
        (void)tv_sys()->unlink(s.path);
    tve_model_close(model);
    tvc_subject_close(&subject);
    tvc_ids_free(&ids);
    if (rc != TV_OK)
        return tvc_fail(c, &c->err);
    return tvc_done(c, 0);
}

static const struct argp_option options[] = {
    {"ids", KEY_IDS, "IDS.npy", 0, "Token ids [batch, seq], int64 or int32", 0},
    {"out", 'o', "OUT.npy", 0, "Where the logits go (default: stdout)", 0},
    {"store", KEY_STORE, "STORE", 0, "Store of store:NAME references", 0},
    {0},
};

const struct tvc_command tvc_cmd_logits = {
    .name = "logits",
    .summary = "logits of a model for token ids",
    .args_doc = "REF",
    .text = "The output is a NumPy array, float32 [batch, seq, vocab]. No "
            "tokenizer is needed.",
    .examples = "tveval logits ./merged --ids ids.npy -o logits.npy\n"
                "tveval logits ./base+./lora --ids ids.npy > logits.npy",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .option = option,
    .min_pos = 1,
    .max_pos = 1,
    .cancellable = true,
    .run = run,
};
