/* SPDX-License-Identifier: Apache-2.0 */
/*
 * survey.h - what has to be found out of several tensors before any of them is
 * merged (private to merge/).
 *
 * A method whose reach() of a tensor is a layer or the model looks at the whole
 * population first: all tensors of that layer, or of the output, that it has
 * to merge. The passes run here, one tensor after the other and its tiles over
 * the worker threads, before exec.c begins; what they find is a handful of
 * numbers per source (struct tvm_cut in method.h), which the tensors carry into
 * their merge. A resumed run finds the same numbers again.
 */
#ifndef TVM_SURVEY_H
#define TVM_SURVEY_H

#include <stdbool.h>
#include <stdint.h>

#include "sink.h"
#include "tv/merge.h"

struct tvm_survey;

/* Most bytes of heap that it takes; 0 when the plan needs none. *fits is false
 * when one worker needs more than options.memory_bytes; *needed is then (and
 * otherwise too) the least that would do. */
uint64_t tvm_survey_scratch(const struct tvm_plan *p, bool *fits,
                            uint64_t *needed);
/* Fills in tensor->cuts of what is not done yet (done NULL: of all).
 * INTERRUPTED after hooks->cancel. *out owns the cuts (tvm_survey_close takes
 * them away again); NULL when there is nothing to find out. */
TV_NODISCARD enum tv_err tvm_survey_run(struct tvm_plan *p,
                                        const struct tvm_tensor_done *done,
                                        const struct tvm_run_hooks *hooks,
                                        struct tv_error *err,
                                        struct tvm_survey **out);
void tvm_survey_close(struct tvm_survey *s); /* NULL allowed */

#endif
