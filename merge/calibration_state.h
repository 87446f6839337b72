/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibration_state.h - how far the masks of a run are, as JSON (private to
 * merge/).
 *
 * A member "calibration" of the journal's state while a merge is unfinished,
 * and of tvmerge.json afterwards:
 *
 *   {"masks": n, "made": n, "random": bool,
 *    "damped": [{"tensor", "donor", "damping", "raised", "unseen_inputs"}],
 *    "kept": [{"entry", ...}]}
 *
 * "damping" null: none was enough.
 *
 * `kept` (journal only) are masks and values in OUT/.tvmerge/calibrated, with a
 * checksum: a run that goes on need not make them again.
 */
#ifndef TVM_CALIBRATION_STATE_H
#define TVM_CALIBRATION_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/hash.h"
#include "tv/merge.h"

#define TVM_CALIBRATED_FILE "calibrated"

struct tvm_kept_mask {
    size_t entry;       /* its number in the plan */
    uint64_t words_at;  /* of a mask; or X^T X, over n_rows tokens */
    uint64_t before_at; /* with n_values */
    uint64_t values_at, n_values;
    uint64_t n_rows; /* 0: a mask */
    struct tv_hash checksum;
};

struct tvm_calibration_state { /* owned: tvm_calibration_state_free */
    size_t n_masks, n_made;
    bool random; /* tokens in place of a text, for one at least */
    struct tvm_damped *damped;
    size_t n_damped;
    struct tvm_kept_mask *kept;
    size_t n_kept;
    void *storage; /* of names that were read */
};
/* Owned text (tv_free), or NULL when out of memory. */
char *tvm_calibration_state_make(const struct tvm_calibration_state *s);
/* What is not such a document is like none: only work is lost. NULL allowed.
 * NOMEM. */
TV_NODISCARD enum tv_err
tvm_calibration_state_parse(const char *text, struct tvm_calibration_state *out,
                            struct tv_error *err);
void tvm_calibration_state_free(struct tvm_calibration_state *s);

#endif
