/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every allocation and every system call of a small merge fails once: an error
 * with a message, nothing kept, and the same command completes afterwards.
 */
#include "test.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "faults.h"
#include "fixture.h"

static const struct fx_tensor few[] = {{"a", TV_BF16, 2, {700, 333}},
                                       {"b", TV_F32, 1, {77}},
                                       {"ids", TV_I64, 1, {3}}};
static const struct fx_param params[] = {{"weight", FX_ALL, 0.5},
                                         {"density", FX_ALL, 0.3}};

struct state {
    struct fx f;
    struct tv_hash digest;
    unsigned n_outs;
};

static void next_out(struct state *s)
{
    /* In place: an allocation here would count as one of the merge. */
    char *out = (char *)(uintptr_t)s->f.plan.options.out_dir;
    (void)snprintf(out + strlen(out) - 4, 5, "%04u", ++s->n_outs % 10000u);
}

static enum tv_err run_once(void *arg, struct tv_error *err)
{
    struct state *s = arg;
    struct tvm_result r;
    const enum tv_err rc = tvm_run(&s->f.plan, NULL, &r, err);

    if (rc == TV_OK) {
        assert_true(tv_hash_equal(r.digest, s->digest));
        next_out(s);
    }
    return rc;
}

static void set_up(struct state *s, bool sync)
{
    memset(s, 0, sizeof *s);
    fx_open(&s->f);
    for (int i = 0; i < 3; i++)
        fx_model(&s->f, few, 3, NULL);
    fx_plan(&s->f, "ties", 0, params, 2, TV_DTYPE_NONE);
    s->f.plan.options.threads = 1;
    s->f.plan.options.sync = sync;
    s->digest = fx_run(&s->f);
    fx_out(&s->f, "x0000");
}

/* Stat and close are left out: their failures are often of no consequence. */
static void every_system_call_may_fail(void **state)
{
    const unsigned mask = FAULT_OPEN | FAULT_PWRITE | FAULT_FSYNC |
                          FAULT_FDATASYNC | FAULT_RENAME | FAULT_FALLOCATE |
                          FAULT_MKDIR | FAULT_UNLINK | FAULT_RMDIR;
    struct state s;

    (void)state;
    set_up(&s, true);
    assert_true(faults_loop_sys(run_once, &s, mask, EIO, TV_E_IO, true) > 30);
    assert_true(faults_loop_sys(run_once, &s, FAULT_PWRITE | FAULT_FALLOCATE,
                                ENOSPC, TV_E_NOSPACE, true) > 2);
    fx_close(&s.f);
}

static void every_allocation_may_fail(void **state)
{
    struct state s;

    (void)state;
    set_up(&s, false);
    assert_true(faults_loop_alloc(run_once, &s, true) > 30);
    fx_close(&s.f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_system_call_may_fail),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
