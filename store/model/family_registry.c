/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_registry.c - the one list of families, and the names of roles.
 */
#include <string.h>

#include "family.h"

static const struct tv_family *const families[] = {
    &tv_family_llama,  &tv_family_gpt2, &tv_family_gpt_neox,
    &tv_family_bloom,  &tv_family_opt,  &tv_family_gpt_bigcode,
    &tv_family_falcon, &tv_family_phi,  &tv_family_mamba,
    &tv_family_bert,   &tv_family_t5,   &tv_family_whisper,
};
#define N_FAMILIES (sizeof(families) / sizeof(families[0]))

const struct tv_family *tv_family_find(const char *model_type,
                                       const char *architecture,
                                       const struct tv_family_type **type)
{
    /* A language model within another one has no class of its own. */
    for (int by_class = 0; by_class <= (architecture[0] != '\0'); by_class++) {
        for (size_t i = 0; i < N_FAMILIES; i++) {
            const struct tv_family_type *t = families[i]->types;
            for (; t->model_type; t++) {
                const bool same = by_class
                                      ? !strcmp(t->architecture, architecture)
                                      : !strcmp(t->model_type, model_type);
                if (same) {
                    *type = t;
                    return families[i];
                }
            }
        }
    }
    return NULL;
}

size_t tv_arch_families(const char *const **names)
{
    /* The same order as above; a test compares the two lists. */
    static const char *const list[N_FAMILIES] = {
        "llama",  "gpt2", "gpt_neox", "bloom", "opt", "gpt_bigcode",
        "falcon", "phi",  "mamba",    "bert",  "t5",  "whisper"};

    *names = list;
    return N_FAMILIES;
}

const char *tv_role_name(enum tv_role role)
{
    static const char *const names[TV_ROLE_COUNT] = {
        "other",      "embed",       "position",       "embed_norm", "lm_head",
        "final_norm", "input_norm",  "post_attn_norm", "other_norm", "attn_q",
        "attn_k",     "attn_v",      "attn_qkv",       "attn_o",     "mlp_gate",
        "mlp_up",     "mlp_gate_up", "mlp_down",       "router",     "buffer",
    };

    if ((unsigned)role >= TV_ROLE_COUNT)
        return "other";
    return names[role];
}
