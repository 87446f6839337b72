/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_llama.c - names of Llama and of the many models that took them over:
 * Mistral, Mixtral, Qwen, Gemma, Phi-3, DeepSeek, and others. They differ in
 * arithmetic, not in what the tensors are called.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"llama", "LlamaForCausalLM", false},
    {"mistral", "MistralForCausalLM", false},
    {"ministral", "MinistralForCausalLM", false},
    {"mixtral", "MixtralForCausalLM", false},
    {"qwen2", "Qwen2ForCausalLM", false},
    {"qwen2_moe", "Qwen2MoeForCausalLM", false},
    {"qwen3", "Qwen3ForCausalLM", false},
    {"qwen3_moe", "Qwen3MoeForCausalLM", false},
    {"gemma", "GemmaForCausalLM", true},
    {"gemma2", "Gemma2ForCausalLM", true},
    {"gemma3_text", "Gemma3ForCausalLM", true},
    {"gemma3", "Gemma3ForConditionalGeneration", true},
    {"phi3", "Phi3ForCausalLM", false},
    {"smollm3", "SmolLM3ForCausalLM", true},
    {"olmo", "OlmoForCausalLM", false},
    {"olmo2", "Olmo2ForCausalLM", false},
    {"granite", "GraniteForCausalLM", false},
    {"stablelm", "StableLmForCausalLM", false},
    {"starcoder2", "Starcoder2ForCausalLM", true},
    {"cohere", "CohereForCausalLM", true},
    {"cohere2", "Cohere2ForCausalLM", true},
    {"glm", "GlmForCausalLM", false},
    {"glm4", "Glm4ForCausalLM", false},
    {"seed_oss", "SeedOssForCausalLM", false},
    {"arcee", "ArceeForCausalLM", false},
    {"apertus", "ApertusForCausalLM", false},
    {"helium", "HeliumForCausalLM", false},
    {"olmo3", "Olmo3ForCausalLM", false},
    {"olmoe", "OlmoeForCausalLM", false},
    {"phimoe", "PhimoeForCausalLM", false},
    {"granitemoe", "GraniteMoeForCausalLM", false},
    {"granitemoeshared", "GraniteMoeSharedForCausalLM", false},
    {"glm4_moe", "Glm4MoeForCausalLM", false},
    {"deepseek_v2", "DeepseekV2ForCausalLM", false},
    {"deepseek_v3", "DeepseekV3ForCausalLM", false},
    {"nemotron", "NemotronForCausalLM", false},
    {"gpt_oss", "GptOssForCausalLM", false},
    {"qwen2_vl", "Qwen2VLForConditionalGeneration", false},
    {"qwen2_vl_text", "", false},
    {"qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", false},
    {"qwen2_5_vl_text", "", false},
    {"qwen3_vl", "Qwen3VLForConditionalGeneration", false},
    {"qwen3_vl_text", "", false},
    {"qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", false},
    {"qwen3_vl_moe_text", "", false},
    {"llama4_text", "Llama4ForCausalLM", false},
    {"llama4", "Llama4ForConditionalGeneration", false},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.",
    "",
    NULL,
};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "layers.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false          \
    }
#define EXACT(name, role)                                                      \
    {                                                                          \
        "layers.#." name, TV_ROLE_##role, TV_PART_LAYER, true, false           \
    }
#define BUFFER(name, part)                                                     \
    {                                                                          \
        name, TV_ROLE_BUFFER, TV_PART_##part, true, true                       \
    }

static const struct tv_family_row rows[] = {
    {"embed_tokens", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    BUFFER("rotary_emb.inv_freq", PRE),
    IN_LAYER("input_layernorm", INPUT_NORM),
    IN_LAYER("self_attn.q_proj", ATTN_Q),
    IN_LAYER("self_attn.k_proj", ATTN_K),
    IN_LAYER("self_attn.v_proj", ATTN_V),
    IN_LAYER("self_attn.qkv_proj", ATTN_QKV),
    IN_LAYER("self_attn.o_proj", ATTN_O),
    /* DeepSeek: low-rank queries, keys and values */
    IN_LAYER("self_attn.q_a_proj", ATTN_Q),
    IN_LAYER("self_attn.q_a_layernorm", OTHER_NORM),
    IN_LAYER("self_attn.q_b_proj", ATTN_Q),
    IN_LAYER("self_attn.kv_a_proj_with_mqa", ATTN_K),
    IN_LAYER("self_attn.kv_a_layernorm", OTHER_NORM),
    IN_LAYER("self_attn.kv_b_proj", ATTN_V),
    IN_LAYER("self_attn.q_norm", OTHER_NORM),
    IN_LAYER("self_attn.k_norm", OTHER_NORM),
    IN_LAYER("self_attn.q_layernorm", OTHER_NORM),
    IN_LAYER("self_attn.k_layernorm", OTHER_NORM),
    IN_LAYER("self_attn.q_layernorm.norms.*", OTHER_NORM), /* StableLM 2 */
    IN_LAYER("self_attn.k_layernorm.norms.*", OTHER_NORM),
    BUFFER("layers.#.self_attn.rotary_emb.inv_freq", LAYER),
    IN_LAYER("post_attention_layernorm", POST_ATTN_NORM),
    IN_LAYER("pre_feedforward_layernorm", OTHER_NORM),
    IN_LAYER("post_feedforward_layernorm", OTHER_NORM),
    IN_LAYER("post_self_attn_layernorm", OTHER_NORM),
    IN_LAYER("post_mlp_layernorm", OTHER_NORM),
    IN_LAYER("attention_layernorm", INPUT_NORM), /* Apertus */
    IN_LAYER("feedforward_layernorm", POST_ATTN_NORM),
    EXACT("mlp.act_fn.alpha_n", OTHER),
    EXACT("mlp.act_fn.alpha_p", OTHER),
    EXACT("mlp.act_fn.beta", OTHER),
    EXACT("mlp.act_fn.eps", OTHER),
    IN_LAYER("mlp.gate_proj", MLP_GATE),
    IN_LAYER("mlp.up_proj", MLP_UP),
    IN_LAYER("mlp.gate_up_proj", MLP_GATE_UP),
    IN_LAYER("mlp.down_proj", MLP_DOWN),
    /* Starcoder2 */
    IN_LAYER("mlp.c_fc", MLP_UP),
    IN_LAYER("mlp.c_proj", MLP_DOWN),
    /* mixtures of experts */
    IN_LAYER("block_sparse_moe.gate", ROUTER),
    IN_LAYER("block_sparse_moe.experts.*.w1", MLP_GATE),
    IN_LAYER("block_sparse_moe.experts.*.w2", MLP_DOWN),
    IN_LAYER("block_sparse_moe.experts.*.w3", MLP_UP),
    IN_LAYER("mlp.gate", ROUTER),
    IN_LAYER("mlp.router", ROUTER), /* Phi-MoE */
    EXACT("mlp.gate.e_score_correction_bias", ROUTER),
    IN_LAYER("mlp.experts.*.gate_proj", MLP_GATE),
    IN_LAYER("mlp.experts.*.up_proj", MLP_UP),
    IN_LAYER("mlp.experts.*.down_proj", MLP_DOWN),
    EXACT("mlp.experts.gate_up_proj", MLP_GATE_UP),
    EXACT("mlp.experts.down_proj", MLP_DOWN),
    EXACT("mlp.experts.gate_up_proj_bias", MLP_GATE_UP), /* gpt-oss */
    EXACT("mlp.experts.down_proj_bias", MLP_DOWN),
    EXACT("self_attn.sinks", OTHER),
    /* Llama 4 */
    IN_LAYER("feed_forward.gate_proj", MLP_GATE),
    IN_LAYER("feed_forward.up_proj", MLP_UP),
    IN_LAYER("feed_forward.down_proj", MLP_DOWN),
    IN_LAYER("feed_forward.router", ROUTER),
    EXACT("feed_forward.experts.gate_up_proj", MLP_GATE_UP),
    EXACT("feed_forward.experts.down_proj", MLP_DOWN),
    IN_LAYER("feed_forward.experts.*.gate_proj", MLP_GATE),
    IN_LAYER("feed_forward.experts.*.up_proj", MLP_UP),
    IN_LAYER("feed_forward.experts.*.down_proj", MLP_DOWN),
    IN_LAYER("feed_forward.shared_expert.gate_proj", MLP_GATE),
    IN_LAYER("feed_forward.shared_expert.up_proj", MLP_UP),
    IN_LAYER("feed_forward.shared_expert.down_proj", MLP_DOWN),
    IN_LAYER("mlp.shared_expert_gate", ROUTER),
    IN_LAYER("mlp.shared_expert.gate_proj", MLP_GATE),
    IN_LAYER("mlp.shared_expert.up_proj", MLP_UP),
    IN_LAYER("mlp.shared_expert.down_proj", MLP_DOWN),
    IN_LAYER("mlp.shared_experts.gate_proj", MLP_GATE),
    IN_LAYER("mlp.shared_experts.up_proj", MLP_UP),
    IN_LAYER("mlp.shared_experts.down_proj", MLP_DOWN),
    /* Granite's, packed in two spellings */
    IN_LAYER("block_sparse_moe.router.layer", ROUTER),
    IN_LAYER("block_sparse_moe.router", ROUTER),
    IN_LAYER("block_sparse_moe.input_linear", MLP_GATE_UP),
    IN_LAYER("block_sparse_moe.output_linear", MLP_DOWN),
    EXACT("block_sparse_moe.experts.gate_up_proj", MLP_GATE_UP),
    EXACT("block_sparse_moe.experts.down_proj", MLP_DOWN),
    IN_LAYER("shared_mlp.input_linear", MLP_GATE_UP),
    IN_LAYER("shared_mlp.output_linear", MLP_DOWN),
    /* layers that predict further tokens, behind the last one */
    IN_LAYER("embed_tokens", EMBED),
    IN_LAYER("enorm", OTHER_NORM),
    IN_LAYER("hnorm", OTHER_NORM),
    IN_LAYER("eh_proj", OTHER),
    IN_LAYER("shared_head.norm", OTHER_NORM),
    IN_LAYER("shared_head.head", LM_HEAD),
    {"norm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_llama = {
    .name = "llama",
    .types = types,
    .prefixes = prefixes,
    .layers = "layers.",
    .rows = rows,
    .bias_optional = true,
    .embed_is_hidden = true,
};
