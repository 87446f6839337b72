/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sums.c - see sums.h.
 */
#include "sums.h"

#include "tv/alloc.h"

bool tvm_sums_wanted(const struct tvm_plan *p, const struct tvm_source *s)
{
    return p->options.verify_reads && s->tensor->linked && !s->gather &&
           s->tensor->bytes > 0;
}

/* One that finds no memory is left out: another merge will read it. */
static void add(struct tvm_sums *sums, struct tvm_sum s)
{
    if (sums->n == sums->cap) {
        const size_t cap = sums->cap > 0 ? 2 * sums->cap : 64;
        struct tvm_sum *more = tv_realloc(sums->items, cap * sizeof *more);
        if (!more)
            return;
        sums->items = more;
        sums->cap = cap;
    }
    sums->items[sums->n++] = s;
}

enum tv_err tvm_sums_take(struct tvm_sums *sums, const struct tvm_plan *p,
                          const struct tvm_source *s, struct tv_hash checksum,
                          struct tv_error *err)
{
    const tv_input *in = p->inputs[s->input].input;

    if (s->tensor->checksum_known) {
        if (tv_hash_equal(s->tensor->checksum, checksum))
            return TV_OK;
        tv_error_set(err, TV_E_CORRUPT,
                     "%s: linked tensor %s is damaged: its file has other "
                     "bytes than when it was read first",
                     tv_input_label(in), s->tensor->name);
        tv_error_hint(err, "restore the file, or import it again with --force");
        return TV_E_CORRUPT;
    }
    add(sums, (struct tvm_sum){
                  .object_id = tv_input_object_id(in),
                  .tensor = s->tensor->name,
                  .checksum = checksum,
              });
    return TV_OK;
}

enum tv_err tvm_sums_put(struct tvm_sums *sums, tv_batch *b,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < sums->n; i++) {
        const struct tvm_sum *s = &sums->items[i];
        rc = tv_tensor_checksum_put(b, s->object_id, s->tensor, s->checksum,
                                    err);
        if (rc == TV_E_NOTFOUND) {
            tv_error_clear(err);
            rc = TV_OK;
        }
        TV_TRY(rc);
    }
    sums->n = 0;
out:
    return rc;
}

void tvm_sums_move(struct tvm_sums *to, struct tvm_sums *from)
{
    for (size_t i = 0; i < from->n; i++)
        add(to, from->items[i]);
    from->n = 0;
}

void tvm_sums_free(struct tvm_sums *sums)
{
    tv_free(sums->items);
    *sums = (struct tvm_sums){.n = 0};
}
