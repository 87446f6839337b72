/* SPDX-License-Identifier: Apache-2.0 */
/*
 * experts.c - how checkpoints name and pack the experts of a layer.
 *
 * transformers 4 stores a tensor per expert, transformers 5 holds all of a
 * layer in two and writes either, as asked. Names are relative to the layer;
 * '*' stands for the expert's number.
 */
#include <string.h>

#include "tv/alloc.h"

#include "family.h"

struct tv_expert_layout {
    const char *parts[TV_EXPERT_PARTS]; /* NULL: the layout has no such part */
};

static const struct tv_expert_layout layouts[] = {
    /* Mixtral */
    {{[TV_EXPERT_ROUTER] = "block_sparse_moe.gate.weight",
      [TV_EXPERT_GATE] = "block_sparse_moe.experts.*.w1.weight",
      [TV_EXPERT_UP] = "block_sparse_moe.experts.*.w3.weight",
      [TV_EXPERT_DOWN] = "block_sparse_moe.experts.*.w2.weight"}},
    /* Qwen, DeepSeek, OLMoE, GLM, ... */
    {{[TV_EXPERT_ROUTER] = "mlp.gate.weight",
      [TV_EXPERT_GATE] = "mlp.experts.*.gate_proj.weight",
      [TV_EXPERT_UP] = "mlp.experts.*.up_proj.weight",
      [TV_EXPERT_DOWN] = "mlp.experts.*.down_proj.weight",
      [TV_EXPERT_STATICS] = "mlp.moe_statics.e_score_correction_bias"}},
    /* all of them in transformers 5 */
    {{[TV_EXPERT_ROUTER] = "mlp.gate.weight",
      [TV_EXPERT_GATE_UP] = "mlp.experts.gate_up_proj",
      [TV_EXPERT_DOWNS] = "mlp.experts.down_proj",
      [TV_EXPERT_STATICS] = "mlp.gate.moe_statics.e_score_correction_bias"}},
    /* Granite, packed from the beginning, and its new names */
    {{[TV_EXPERT_ROUTER] = "block_sparse_moe.router.layer.weight",
      [TV_EXPERT_GATE_UP] = "block_sparse_moe.input_linear.weight",
      [TV_EXPERT_DOWNS] = "block_sparse_moe.output_linear.weight"}},
    {{[TV_EXPERT_ROUTER] = "block_sparse_moe.router.weight",
      [TV_EXPERT_GATE_UP] = "block_sparse_moe.experts.gate_up_proj",
      [TV_EXPERT_DOWNS] = "block_sparse_moe.experts.down_proj"}},
    /* Jamba, Llama 4 written one by one; LFM2; all packed, which is how Llama 4
     * comes, the other way round (tv_expert_in_first) */
    {{[TV_EXPERT_ROUTER] = "feed_forward.router.weight",
      [TV_EXPERT_GATE] = "feed_forward.experts.*.gate_proj.weight",
      [TV_EXPERT_UP] = "feed_forward.experts.*.up_proj.weight",
      [TV_EXPERT_DOWN] = "feed_forward.experts.*.down_proj.weight"}},
    {{[TV_EXPERT_ROUTER] = "feed_forward.gate.weight",
      [TV_EXPERT_GATE] = "feed_forward.experts.*.w1.weight",
      [TV_EXPERT_UP] = "feed_forward.experts.*.w3.weight",
      [TV_EXPERT_DOWN] = "feed_forward.experts.*.w2.weight"}},
    {{[TV_EXPERT_ROUTER] = "feed_forward.router.weight",
      [TV_EXPERT_GATE_UP] = "feed_forward.experts.gate_up_proj",
      [TV_EXPERT_DOWNS] = "feed_forward.experts.down_proj"}},
    /* Phi-MoE's router beside packed experts */
    {{[TV_EXPERT_ROUTER] = "mlp.router.weight"}},
};
#define N_LAYOUTS (sizeof(layouts) / sizeof(layouts[0]))

static bool match(const char *name, const char *pattern, int64_t *number)
{
    const char *const star = strchr(pattern, '*');
    size_t n = 0;

    *number = -1;
    if (!star)
        return !strcmp(name, pattern);
    n = (size_t)(star - pattern);
    if (strncmp(name, pattern, n))
        return false;
    name += n;
    n = tv_layer_number(name, number);
    return n > 0 && !strcmp(name + n, star + 1);
}

struct tv_expert tv_expert_of(const struct tv_arch_tensor *t)
{
    struct tv_expert found = {TV_EXPERT_NONE, NULL, -1, 0};
    size_t n_same = 0;

    if (t->layer < 0 || t->layer_len == 0 ||
        t->name[t->layer_at + t->layer_len] != '.')
        return found;
    found.name_at = t->layer_at + t->layer_len + 1;
    for (size_t i = 0; i < N_LAYOUTS; i++) {
        for (int p = TV_EXPERT_ROUTER; p < TV_EXPERT_PARTS; p++) {
            int64_t number = -1;
            if (!layouts[i].parts[p] ||
                !match(t->name + found.name_at, layouts[i].parts[p], &number))
                continue;
            found.part = (enum tv_expert_part)p;
            found.layout = n_same++ == 0 ? &layouts[i] : NULL;
            found.number = number;
        }
    }
    return found;
}

bool tv_expert_in_first(const struct tv_arch *a)
{
    static const char *const types[] = {"llama4", "llama4_text", "gpt_oss",
                                        "qwen3_vl_moe"};

    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        if (!strcmp(a->model_type, types[i]))
            return true;
    return false;
}

bool tv_expert_packed(const struct tv_expert_layout *layout)
{
    return layout->parts[TV_EXPERT_GATE_UP] != NULL;
}

char *tv_expert_name(const struct tv_arch_tensor *t,
                     const struct tv_expert_layout *layout,
                     enum tv_expert_part part, int64_t number)
{
    const char *const pattern = layout->parts[part];
    const char *const star = pattern ? strchr(pattern, '*') : NULL;
    const int n_head = (int)(t->layer_at + t->layer_len + 1);

    if (!pattern)
        return NULL;
    if (!star)
        return tv_asprintf("%.*s%s", n_head, t->name, pattern);
    return tv_asprintf("%.*s%.*s%lld%s", n_head, t->name, (int)(star - pattern),
                       pattern, (long long)number, star + 1);
}
