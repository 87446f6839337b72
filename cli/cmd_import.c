/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_import.c - tvstore import: a model or adapter into the store.
 */
#include <inttypes.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/format.h"
#include "tv/merge.h"
#include "tv/text.h"
#include "tvstore.h"

struct opts {
    bool link, force;
    unsigned lock_timeout_ms;
};

enum { KEY_LINK = 0x2000, KEY_FORCE, KEY_LOCK_TIMEOUT };

static const struct argp_option options[] = {
    {"link", KEY_LINK, NULL, 0,
     "Register the tensors of read-only safetensors files, do not copy", 0},
    {"force", KEY_FORCE, NULL, 0, "Replace an object of that name", 0},
    {"lock-timeout", KEY_LOCK_TIMEOUT, "SECONDS", 0,
     "How long to wait for another writer (default: 10)", 0},
    {0}};

static void init(struct tvc *c)
{
    struct opts *o = c->opt;
    *o = (struct opts){.lock_timeout_ms = 10000};
}

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_LINK:
        o->link = true;
        return 0;
    case KEY_FORCE:
        o->force = true;
        return 0;
    case KEY_LOCK_TIMEOUT:
        return tvc_parse_ms(c, "--lock-timeout", arg, &o->lock_timeout_ms);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void on_bytes(void *arg, uint64_t done, uint64_t total)
{
    tvc_progress_set(arg, 0, 0, done, total);
}

static enum tv_err source_open(const char *text, struct tv_error *err,
                               tv_input **out)
{
    struct tv_ref *ref = NULL;
    enum tv_err rc = TV_OK;
    TV_TRY(tv_ref_resolve(text, err, &ref));
    if (ref->n_adapters > 0 || ref->model.object)
        rc = tv_error_set(err, TV_E_USAGE,
                          "'%s': import takes one directory or file", text);
    else
        rc = tv_input_open(&ref->model, NULL, err, out);
out:
    tv_ref_free(ref);
    return rc;
}

static void print_result(struct tvc *c, const struct tv_transfer *t,
                         const tv_input *in, double seconds)
{
    char bytes[32];
    char shared[32];
    char time[32];
    if (c->out.json) {
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:o, s:s, s:o, s:o, s:o, s:o, s:b, s:o}",
                               "schema", "tvstore.import/1", "name",
                               tvc_json_string(c->pos[1]), "kind",
                               tv_kind_name(tv_input_kind(in)), "n_tensors",
                               tvc_json_u64(t->n_tensors), "n_resumed",
                               tvc_json_u64(t->n_resumed), "bytes",
                               tvc_json_u64(t->bytes), "bytes_shared",
                               tvc_json_u64(t->bytes_shared), "linked", t->link,
                               "seconds", tvc_json_measured(seconds)));
        return;
    }
    tvc_say(&c->out, "%s %s: %zu tensors, %s%s%s%s in %s",
            t->link ? "linked" : "imported", c->pos[1], t->n_tensors,
            tv_format_bytes(t->bytes, bytes, sizeof bytes),
            t->bytes_shared ? " (" : "",
            t->bytes_shared
                ? tv_format_bytes(t->bytes_shared, shared, sizeof shared)
                : "",
            t->bytes_shared ? " already stored)" : "",
            tvc_duration(seconds, time, sizeof time));
    if (t->n_resumed)
        tvc_say(&c->out, "continued: %zu tensors were there already",
                t->n_resumed);
}

/* LMDB allocates every chunk that a batch writes and frees it at the end of the
 * batch. glibc would give such blocks back to the kernel and get new pages for
 * the next batch, cleared and one fault for each: a third of an import's CPU
 * time. What it keeps instead is what a batch takes. */
static void keep_pages(const struct tvc *c)
{
#ifdef __GLIBC__
    const uint64_t quarter = c->memory_bytes / 4;
    if (quarter >= (UINT64_C(64) << 20)) {
        (void)mallopt(M_MMAP_THRESHOLD, 32 << 20);
        (void)mallopt(M_TRIM_THRESHOLD, 96 << 20);
    }
#else
    (void)c;
#endif
}

static int run(struct tvc *c)
{
    const struct opts *o = c->opt;
    const double begin = tvc_seconds();
    struct tvc_progress *bar = NULL;
    tv_store *store = NULL;
    tv_input *in = NULL;
    enum tv_err rc = TV_OK;
    struct tv_transfer t = {.link = o->link,
                            .force = o->force,
                            .lock_timeout_ms = o->lock_timeout_ms,
                            .sync = true,
                            .progress = on_bytes,
                            .cancel = tvc_cancel_flag()};

    keep_pages(c);
    TV_TRY(tvc_store_open(c, c->pos[0], false, &c->err, &store));
    TV_TRY(source_open(c->pos[2], &c->err, &in));
    if (o->force)
        TV_TRY(tvm_runs_sweep(store, &c->err));
    bar = tvc_progress_begin(&c->out, "import", NULL);
    t.progress_arg = bar;
    TV_TRY(tv_import(store, c->pos[1], in, &t, &c->err));
    tvc_progress_end(bar);
    bar = NULL;
    print_result(c, &t, in, tvc_seconds() - begin);
out:
    tvc_progress_end(bar);
    tv_input_close(in);
    tv_store_close(store);
    if (rc == TV_E_INTERRUPTED && !c->err.hint[0])
        tv_error_hint(&c->err, "the same command continues");
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_import = {
    .name = "import",
    .summary = "take a model or adapter into the store",
    .args_doc = "STORE NAME SRC",
    .text = "SRC is a Hugging Face model directory (safetensors or "
            "pytorch_model.bin,\nsharded or not), one .safetensors or .bin "
            "file, a PEFT adapter directory,\nor ORG/NAME[@REV] in the local "
            "Hugging Face cache. Readers see the object\nonly when it is "
            "complete; an interrupted import continues.",
    .examples = "tvstore import models.tv base ./Llama-3.2-1B\n"
                "tvstore import models.tv jargon ./lora-jargon\n"
                "tvstore import models.tv base /media/ro/model --link",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .init = init,
    .option = option,
    .min_pos = 3,
    .max_pos = 3,
    .cancellable = true,
    .run = run,
};
