/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_rules.c - what is to be made of a source before the run, and what
 * such a rule is called. Nothing here needs the forward pass: without eval/ it
 * stands beside calibrated_off.c, so that planning can refuse by name.
 */
#include "calibrated.h"

const char *tvm_rule_name(const struct tvm_trim_rule *r)
{
    static const char *const masks[] = {"magnitude", "importance", "sparsegpt"};
    static const char *const corrected[][4] = {
        {"", "", "magnitude+cg", ""},
        {"", "", "importance+cg", ""},
        {"", "sparsegpt+obs", "sparsegpt+cg", "sparsegpt+obs+cg"}};

    if (r->calibrated && r->counts)
        return "counts";
    if (!r->calibrated || r->correct == TVM_CORRECT_NONE)
        return masks[r->score];
    return corrected[r->score][r->correct];
}

bool tvm_calibrated_rule(const struct tvm_tensor *t, size_t source,
                         struct tvm_trim_rule *rule)
{
    if (t->action != TVM_MERGE || t->n_elems == 0 || !t->method)
        return false;
    if (t->method->needs_gram && (int)source != t->base &&
        t->method->needs_gram(t)) {
        *rule = (struct tvm_trim_rule){.calibrated = true,
                                       .gram_only = true,
                                       .inputs = t->method->gram_inputs};
        return true;
    }
    return t->method->trims && t->method->trims(t, source, rule) &&
           rule->calibrated;
}
