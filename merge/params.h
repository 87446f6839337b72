/* SPDX-License-Identifier: Apache-2.0 */
/*
 * params.h - what value a parameter has for one tensor (and input).
 *
 *   setting   scalar | [scalar, ...] | {value, filter} | [{value, filter}, ...]
 *   scopes    source > slice > global > default; a scope whose filters do not
 *             match the tensor is passed over
 *   list      a gradient over the layers of the slice: position t = k/(L-1);
 *             1 when the slice has one layer, 0 outside layers
 */
#ifndef TVM_PARAMS_H
#define TVM_PARAMS_H

#include "recipe.h"

/* Checks a `parameters:` map: every value must suit its parameter (USAGE error
 * with position), an unknown name is a warning with a suggestion. */
void tvm_params_check(const struct tvm_recipe *r, const struct tvm_node *map,
                      struct tvm_problems *problems);

/* Would the setting of a known parameter pass that check? */
bool tvm_setting_ok(const struct tvm_recipe *r, const struct tvm_param *p,
                    const struct tvm_node *setting);

struct tvm_value {
    bool set;
    double value;                /* bools 0/1 */
    const struct tvm_node *from; /* where it was written; NULL: default */
    bool fraction; /* an int parameter came out as a fraction: an error */
};

/* Position of layer k (0-based; below 0: outside layers) of n_layers. */
double tvm_gradient_at(int64_t k, int64_t n_layers);
/* levels [n_levels]: checked `parameters:` maps, innermost first, NULL allowed.
 * name: the tensor name that filters see. */
struct tvm_value tvm_param_resolve(const struct tvm_param *p,
                                   const struct tvm_node *const *levels,
                                   size_t n_levels, const char *name, double t);

/* Keys that mergekit recipes in the wild carry without effect. */
bool tvm_dead_key(const char *key);

#endif
