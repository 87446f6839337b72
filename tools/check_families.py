#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_families.py TVMERGE [NAME...]

For each family of models: two tiny random ones from their transformers config
are merged, and the result must load without missing or unexpected weights, hold
the mean of every tensor, and give finite logits. Causal models (and the text
decoder of LLaVA) are also stacked to another number of layers, and merged
across different vocabulary sizes (--unsafe-truncate-embeddings); mixtures of
experts are merged from both layouts (experts one by one and packed), stacked
too; models whose embeddings can be tied, tied with untied in every combination.
One line per family. For developers: needs torch
and transformers from PyPI in a throw-away environment.
"""
import json
import os
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
V = 61
LM = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3,
          num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
          max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
          pad_token_id=0)
MOE = dict(num_experts=4, num_local_experts=4, n_routed_experts=4,
           num_experts_per_tok=2, moe_intermediate_size=24,
           shared_expert_intermediate_size=24, n_shared_experts=1,
           decoder_sparse_step=1)
GPT = dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64,
           bos_token_id=1, eos_token_id=2)
DEEPSEEK = dict(LM, **MOE, num_key_value_heads=4, n_group=1, topk_group=1,
                q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1)
ENC = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3,
           num_attention_heads=4, intermediate_size=48,
           max_position_embeddings=64, pad_token_id=0)
CASES = {  # name: (config class, model class, config)
    "llama": ("Llama", "LlamaForCausalLM", LM),
    "mistral": ("Mistral", "MistralForCausalLM", LM),
    "mixtral": ("Mixtral", "MixtralForCausalLM", dict(LM, **MOE)),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", LM),
    "qwen2-tied": ("Qwen2", "Qwen2ForCausalLM",
                   dict(LM, tie_word_embeddings=True)),
    "qwen2_moe": ("Qwen2Moe", "Qwen2MoeForCausalLM", dict(LM, **MOE)),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", dict(LM, head_dim=8)),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeForCausalLM",
                  dict(LM, head_dim=8, **MOE)),
    "gemma": ("Gemma", "GemmaForCausalLM", dict(LM, head_dim=8)),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", dict(LM, head_dim=8)),
    "gemma3_text": ("Gemma3Text", "Gemma3ForCausalLM", dict(LM, head_dim=8)),
    "phi": ("Phi", "PhiForCausalLM", dict(LM, num_key_value_heads=4)),
    "phi3": ("Phi3", "Phi3ForCausalLM", LM),
    "gpt2": ("GPT2", "GPT2LMHeadModel", GPT),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", LM),
    "gpt_bigcode": ("GPTBigCode", "GPTBigCodeForCausalLM", GPT),
    "gptj": ("GPTJ", "GPTJForCausalLM", dict(GPT, rotary_dim=4)),
    "bloom": ("Bloom", "BloomForCausalLM",
              dict(vocab_size=V, hidden_size=32, n_layer=3, n_head=4)),
    "opt": ("OPT", "OPTForCausalLM",
            dict(LM, ffn_dim=48, word_embed_proj_dim=32)),
    "falcon": ("Falcon", "FalconForCausalLM", dict(LM)),
    "mpt": ("Mpt", "MptForCausalLM", dict(vocab_size=V, d_model=32,
                                          n_heads=4, n_layers=3,
                                          max_seq_len=64)),
    "stablelm": ("StableLm", "StableLmForCausalLM", LM),
    "starcoder2": ("Starcoder2", "Starcoder2ForCausalLM", LM),
    "cohere": ("Cohere", "CohereForCausalLM", LM),
    "cohere2": ("Cohere2", "Cohere2ForCausalLM", LM),
    "olmo": ("Olmo", "OlmoForCausalLM", LM),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", LM),
    "olmoe": ("Olmoe", "OlmoeForCausalLM", dict(LM, **MOE)),
    "granite": ("Granite", "GraniteForCausalLM", LM),
    "granitemoe": ("GraniteMoe", "GraniteMoeForCausalLM", dict(LM, **MOE)),
    "glm": ("Glm", "GlmForCausalLM", dict(LM, head_dim=8)),
    "glm4": ("Glm4", "Glm4ForCausalLM", dict(LM, head_dim=8)),
    "glm4_moe": ("Glm4Moe", "Glm4MoeForCausalLM",
                 dict(LM, head_dim=8, **MOE, first_k_dense_replace=1)),
    "deepseek_v2": ("DeepseekV2", "DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3ForCausalLM", DEEPSEEK),
    "nemotron": ("Nemotron", "NemotronForCausalLM", LM),
    "olmo3": ("Olmo3", "Olmo3ForCausalLM", LM),
    "phimoe": ("Phimoe", "PhimoeForCausalLM", dict(LM, **MOE)),
    "granitemoeshared": ("GraniteMoeShared", "GraniteMoeSharedForCausalLM",
                         dict(LM, shared_intermediate_size=24, **MOE)),
    "seed_oss": ("SeedOss", "SeedOssForCausalLM", dict(LM, head_dim=8)),
    "arcee": ("Arcee", "ArceeForCausalLM", LM),
    "apertus": ("Apertus", "ApertusForCausalLM", LM),
    "helium": ("Helium", "HeliumForCausalLM", dict(LM, head_dim=8)),
    "ministral": ("Ministral", "MinistralForCausalLM", dict(LM, head_dim=8)),
    "stablelm2": ("StableLm", "StableLmForCausalLM",
                  dict(LM, qk_layernorm=True, use_qkv_bias=True)),
    "falcon-new": ("Falcon", "FalconForCausalLM",
                   dict(LM, new_decoder_architecture=True, num_kv_heads=2,
                        bias=True)),
    "llama-bias": ("Llama", "LlamaForCausalLM",
                   dict(LM, attention_bias=True, mlp_bias=True)),
    "gpt_oss": ("GptOss", "GptOssForCausalLM",
                dict(LM, head_dim=8, num_local_experts=4,
                     num_experts_per_tok=2,
                     layer_types=["sliding_attention", "full_attention",
                                  "sliding_attention"])),
    "llama4_text": ("Llama4Text", "Llama4ForCausalLM",
                    dict(LM, head_dim=8, num_local_experts=4,
                         intermediate_size_mlp=48, interleave_moe_layer_step=2,
                         attention_chunk_size=16)),
    "smollm3": ("SmolLM3", "SmolLM3ForCausalLM", LM),
    "mamba": ("Mamba", "MambaForCausalLM",
              dict(vocab_size=V, hidden_size=32, num_hidden_layers=3,
                   state_size=8)),
    "mamba2": ("Mamba2", "Mamba2ForCausalLM",
               dict(vocab_size=V, hidden_size=32, num_hidden_layers=3,
                    num_heads=8, head_dim=8, state_size=8, n_groups=1)),
    "falcon_mamba": ("FalconMamba", "FalconMambaForCausalLM",
                     dict(vocab_size=V, hidden_size=32, num_hidden_layers=3,
                          state_size=8)),
    "xlm-roberta": ("XLMRoberta", "XLMRobertaForMaskedLM", ENC),
    "t5-gated": ("T5", "T5ForConditionalGeneration",
                 dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=3,
                      num_decoder_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu",
                      tie_word_embeddings=False)),
    "bert": ("Bert", "BertForMaskedLM", ENC),
    "roberta": ("Roberta", "RobertaForMaskedLM", ENC),
    "distilbert": ("DistilBert", "DistilBertForMaskedLM",
                   dict(vocab_size=V, dim=32, n_layers=3, n_heads=4,
                        hidden_dim=48)),
    "bert-class": ("Bert", "BertForSequenceClassification", ENC),
    "t5": ("T5", "T5ForConditionalGeneration",
           dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=3,
                num_heads=4)),
    "whisper": ("Whisper", "WhisperForConditionalGeneration",
                dict(vocab_size=V, d_model=32, encoder_layers=2,
                     decoder_layers=2, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=48,
                     decoder_ffn_dim=48, num_mel_bins=8,
                     max_source_positions=16, max_target_positions=16,
                     pad_token_id=0, bos_token_id=1, eos_token_id=2,
                     decoder_start_token_id=1)),
}


# Known from their names alone, or of several kinds of layers.
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
SSM = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8)
GDN = dict(LM, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
           linear_key_head_dim=8, linear_value_head_dim=8, layer_types=HYBRID)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
INFERRED = {
    "codegen": ("CodeGen", "CodeGenForCausalLM", dict(GPT, rotary_dim=4)),
    "gpt_neo": ("GPTNeo", "GPTNeoForCausalLM",
                dict(vocab_size=V, hidden_size=32, num_layers=3, num_heads=4,
                     attention_types=[[["global", "local", "global"], 1]],
                     max_position_embeddings=64, bos_token_id=1,
                     eos_token_id=2)),
    "qwen3_next": ("Qwen3Next", "Qwen3NextForCausalLM", dict(GDN, **MOE)),
    "qwen3_5_text": ("Qwen3_5Text", "Qwen3_5ForCausalLM", GDN),
    "jamba": ("Jamba", "JambaForCausalLM",
              dict(LM, num_experts=4, num_experts_per_tok=2,
                   attn_layer_period=2, attn_layer_offset=1,
                   expert_layer_period=2, expert_layer_offset=1,
                   mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)),
    "modernbert": ("ModernBert", "ModernBertForMaskedLM", ENC),
    "modernbert-decoder": ("ModernBertDecoder", "ModernBertDecoderForCausalLM",
                           dict(ENC, bos_token_id=1, eos_token_id=2,
                                cls_token_id=1, sep_token_id=2)),
    "ernie4_5": ("Ernie4_5", "Ernie4_5ForCausalLM", dict(LM, head_dim=8)),
    "ernie4_5_moe": ("Ernie4_5_Moe", "Ernie4_5_MoeForCausalLM",
                     dict(LM, head_dim=8, moe_num_experts=4, moe_k=2,
                          moe_intermediate_size=24, moe_num_shared_experts=1,
                          moe_layer_start_index=1)),
    "hunyuan_v1_dense": ("HunYuanDenseV1", "HunYuanDenseV1ForCausalLM",
                         dict(LM, head_dim=8)),
    "hunyuan_v1_moe": ("HunYuanMoEV1", "HunYuanMoEV1ForCausalLM",
                       dict(LM, head_dim=8, num_experts=4, moe_topk=2)),
    "dots1": ("Dots1", "Dots1ForCausalLM",
              dict(LM, head_dim=8, n_group=1, topk_group=1,
                   first_k_dense_replace=1, **MOE)),
    "exaone4": ("Exaone4", "Exaone4ForCausalLM", dict(LM, head_dim=8)),
    "lfm2": ("Lfm2", "Lfm2ForCausalLM",
             dict(LM, block_ff_dim=48,
                  layer_types=["conv", "full_attention", "conv"])),
    "lfm2_moe": ("Lfm2Moe", "Lfm2MoeForCausalLM",
                 dict(LM, num_dense_layers=1, **MOE,
                      layer_types=["conv", "full_attention", "conv"])),
    "falcon_h1": ("FalconH1", "FalconH1ForCausalLM",
                  dict(LM, **dict(SSM, mamba_d_head=8), head_dim=8,
                       mamba_d_ssm=32)),
    "bamba": ("Bamba", "BambaForCausalLM",
              dict(LM, attn_layer_indices=[1], **SSM)),
    "granitemoehybrid": ("GraniteMoeHybrid", "GraniteMoeHybridForCausalLM",
                         dict(LM, shared_intermediate_size=24, **SSM,
                              layer_types=["mamba", "attention", "mamba"],
                              **EXPERTS)),
    "minimax": ("MiniMax", "MiniMaxForCausalLM",
                dict(LM, head_dim=8, layer_types=HYBRID, block_size=8,
                     **EXPERTS)),
    "persimmon": ("Persimmon", "PersimmonForCausalLM",
                  dict(LM, num_key_value_heads=4)),
    "xglm": ("XGLM", "XGLMForCausalLM",
             dict(vocab_size=V, d_model=32, num_layers=3, attention_heads=4,
                  ffn_dim=48, max_position_embeddings=64)),
    "biogpt": ("BioGpt", "BioGptForCausalLM", LM),
    "recurrent_gemma": ("RecurrentGemma", "RecurrentGemmaForCausalLM",
                        dict(LM, head_dim=8, lru_width=32,
                             block_types=["recurrent", "recurrent",
                                          "attention"],
                             attention_window_size=16)),
    "minicpm3": ("MiniCPM3", "MiniCPM3ForCausalLM",
                 dict(LM, num_key_value_heads=4, q_lora_rank=16,
                      kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                      v_head_dim=8)),
    "afmoe": ("Afmoe", "AfmoeForCausalLM",
              dict(LM, head_dim=8, num_dense_layers=1, num_shared_experts=1,
                   **MOE)),
    "flex_olmo": ("FlexOlmo", "FlexOlmoForCausalLM", dict(LM, **MOE)),
    "doge": ("Doge", "DogeForCausalLM", LM),
    "vaultgemma": ("VaultGemma", "VaultGemmaForCausalLM",
                   dict(LM, head_dim=8)),
    "gemma3n_text": ("Gemma3nText", "Gemma3nForCausalLM",
                     dict(LM, head_dim=8, vocab_size_per_layer_input=V,
                          hidden_size_per_layer_input=8, altup_num_inputs=2,
                          laurel_rank=4, num_kv_shared_layers=0,
                          layer_types=["sliding_attention", "full_attention",
                                       "sliding_attention"],
                          activation_sparsity_pattern=[0.0, 0.0, 0.0])),
    "glm4_moe_lite": ("Glm4MoeLite", "Glm4MoeLiteForCausalLM", DEEPSEEK),
    "mistral4": ("Mistral4", "Mistral4ForCausalLM", DEEPSEEK),
    "nanochat": ("NanoChat", "NanoChatForCausalLM", LM),
    "rwkv": ("Rwkv", "RwkvForCausalLM",
             dict(vocab_size=V, hidden_size=32, num_hidden_layers=3,
                  attention_hidden_size=32, intermediate_size=48,
                  context_length=64)),
    "t5gemma": ("T5Gemma", "T5GemmaForConditionalGeneration",
                dict(encoder=dict(LM, head_dim=8),
                     decoder=dict(LM, head_dim=8), vocab_size=V)),
    "electra": ("Electra", "ElectraForMaskedLM", dict(ENC, embedding_size=32)),
    "deberta_v2": ("DebertaV2", "DebertaV2ForMaskedLM", ENC),
    "mpnet": ("MPNet", "MPNetForMaskedLM", ENC),
    "bart": ("Bart", "BartForConditionalGeneration",
             dict(vocab_size=V, d_model=32, encoder_layers=2,
                  decoder_layers=2, encoder_attention_heads=4,
                  decoder_attention_heads=4, encoder_ffn_dim=48,
                  decoder_ffn_dim=48, max_position_embeddings=64,
                  pad_token_id=0, bos_token_id=1, eos_token_id=2,
                  decoder_start_token_id=1, forced_eos_token_id=2)),
}
for n in ("gptj", "mpt"):
    INFERRED[n] = CASES.pop(n)
# Every second layer is of another kind, which a stack must keep.
EVEN = ["jamba"]
# What cannot be stacked, and the key of config.json that says so.
NO_STACK = {"gemma3n_text": "hidden_size_per_layer_input"}
# transformers has no weights of its own for the head of these, tied or not.
ONE_HEAD = ["gptj", "mpt", "falcon_mamba", "mamba", "bloom", "rwkv", "codegen",
            "recurrent_gemma"]

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, image_size=16, patch_size=8)
MROPE = dict(LM, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                  "mrope_section": [1, 1, 2]})
IDS = dict(image_token_id=60, video_token_id=59, vision_start_token_id=58,
           vision_end_token_id=57)
VLMS = {  # name: (model class, its config, class of its text model alone or None)
    "llava": ("LlavaForConditionalGeneration", lambda: tf.LlavaConfig(
        text_config=tf.LlamaConfig(**LM).to_dict(),
        vision_config=tf.CLIPVisionConfig(**VISION).to_dict(),
        image_token_index=60), "LlamaForCausalLM"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", lambda: tf.Qwen2VLConfig(
        text_config=MROPE, vision_config=dict(
            depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2,
            patch_size=4), **IDS), "Qwen2ForCausalLM"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",
                   lambda: tf.Qwen2_5_VLConfig(
                       text_config=MROPE, vision_config=dict(
                           depth=2, hidden_size=32, num_heads=4,
                           intermediate_size=48, out_hidden_size=32,
                           patch_size=4, fullatt_block_indexes=[1]), **IDS),
                   "Qwen2ForCausalLM"),
    "gemma3": ("Gemma3ForConditionalGeneration", lambda: tf.Gemma3Config(
        text_config=dict(LM, head_dim=8), vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=58,
        eoi_token_index=57), "Gemma3ForCausalLM"),
    "mistral3": ("Mistral3ForConditionalGeneration", lambda: tf.Mistral3Config(
        text_config=dict(LM, model_type="mistral", head_dim=8),
        vision_config=dict(VISION, model_type="pixtral", head_dim=8),
        image_token_index=60), "MistralForCausalLM"),
}


VLMS.update({
    "paligemma": ("PaliGemmaForConditionalGeneration",
                  lambda: tf.PaliGemmaConfig(
                      text_config=dict(LM, head_dim=8, model_type="gemma"),
                      vision_config=dict(VISION,
                                         model_type="siglip_vision_model"),
                      image_token_index=60, projection_dim=32,
                      hidden_size=32), "GemmaForCausalLM"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", lambda: tf.Qwen3VLConfig(
        text_config=dict(MROPE, head_dim=8), vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=4,
            out_hidden_size=32, patch_size=4, deepstack_visual_indexes=[0]),
        **IDS), "Qwen3ForCausalLM"),
    "internvl": ("InternVLForConditionalGeneration",
                 lambda: tf.InternVLConfig(
                     text_config=dict(LM, model_type="qwen2"),
                     vision_config=dict(VISION, image_size=[16, 16],
                                        patch_size=[8, 8]),
                     image_token_id=60, downsample_ratio=0.5),
                 "Qwen2ForCausalLM"),
    "mllama": ("MllamaForConditionalGeneration", lambda: tf.MllamaConfig(
        text_config=dict(LM, cross_attention_layers=[1], rope_parameters={
            "rope_type": "default", "rope_theta": 1e4}),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_global_layers=1, attention_heads=4, image_size=16,
            patch_size=8, intermediate_layers_indices=[0],
            vision_output_dim=64, supported_aspect_ratios=[[1, 1]],
            max_num_tiles=1), image_token_index=60), None),
})

# Merged only.
CLIP_TEXT = dict(ENC, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)
S2S = INFERRED["bart"][2]
OTHERS = {  # name: (model class, its config)
    "pegasus": ("PegasusForConditionalGeneration",
                lambda: tf.PegasusConfig(**S2S)),
    "m2m100": ("M2M100ForConditionalGeneration",
               lambda: tf.M2M100Config(**S2S)),
    "marian": ("MarianMTModel", lambda: tf.MarianConfig(**S2S)),
    "mbart": ("MBartForConditionalGeneration", lambda: tf.MBartConfig(**S2S)),
    "mt5": ("MT5ForConditionalGeneration",
            lambda: tf.MT5Config(**CASES["t5"][2])),
    "albert": ("AlbertForMaskedLM",
               lambda: tf.AlbertConfig(**dict(ENC, embedding_size=16))),
    "xlnet": ("XLNetLMHeadModel", lambda: tf.XLNetConfig(
        vocab_size=V, d_model=32, n_layer=2, n_head=4, d_inner=48)),
    "openai-gpt": ("OpenAIGPTLMHeadModel", lambda: tf.OpenAIGPTConfig(
        **{k: v for k, v in GPT.items() if not k.endswith("_id")})),
    "dbrx": ("DbrxForCausalLM", lambda: tf.DbrxConfig(
        vocab_size=V, d_model=32, n_heads=4, n_layers=3, max_seq_len=64,
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2,
                        ffn_act_fn={"name": "silu"}))),
    # Its forward pass fails without images in transformers 5.24.
    "llama4": ("Llama4ForConditionalGeneration", lambda: tf.Llama4Config(
        text_config=dict(CASES["llama4_text"][2]), vision_config=dict(
            hidden_size=32, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, image_size=16, patch_size=8,
            vision_output_dim=32, projector_input_dim=32,
            projector_output_dim=32), image_token_index=60)),
    "vit": ("ViTForImageClassification", lambda: tf.ViTConfig(**VISION)),
    "dinov2": ("Dinov2ForImageClassification",
               lambda: tf.Dinov2Config(**VISION)),
    "clip": ("CLIPModel", lambda: tf.CLIPConfig(
        text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16)),
    "siglip": ("SiglipModel", lambda: tf.SiglipConfig(
        text_config=CLIP_TEXT, vision_config=VISION)),
}


def make(name, vocab=V):
    if name in OTHERS:
        cls, config = OTHERS[name]
        return config(), getattr(tf, cls)
    if name in VLMS:
        cls, config, _ = VLMS[name]
        return config(), getattr(tf, cls)
    config, cls, settings = {**CASES, **INFERRED}[name]
    known = dict(settings, vocab_size=vocab)
    if vocab == V:
        known = settings
    return getattr(tf, config + "Config")(**known), getattr(tf, cls)


def save(path, name, seed, vocab=V, original=True, tied=None):
    torch.manual_seed(seed)
    config, cls = make(name, vocab)
    if tied is not None:
        config.tie_word_embeddings = tied
    m = cls(config)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    m.save_pretrained(path, save_original_format=original)
    return cls


def tensors(path):
    return load_file(os.path.join(path, "model.safetensors"))


def run(tvmerge, root, recipe, out, *options):
    with open(os.path.join(root, "r.yml"), "w") as f:
        yaml.safe_dump(recipe, f)
    return subprocess.run([tvmerge, "run", "r.yml", out, "-q",
                           "--progress=none", "--force", *options], cwd=root,
                          capture_output=True, text=True)


def loads(cls, path):
    m, info = cls.from_pretrained(path, output_loading_info=True)
    bad = {k: v for k, v in info.items() if v and k != "error_msgs"}
    return m.float(), bad


def finite(m, name):
    ids = torch.tensor([[1, 5, 7, 3, 9, 4]])
    kw = {}
    if name == "llama4":
        return bool(torch.isfinite(m.language_model(ids).logits).all())
    if name.startswith("t5") or name in ("mt5", "pegasus", "m2m100", "marian"):
        kw = dict(decoder_input_ids=ids)
    if name in ("vit", "dinov2"):
        return bool(torch.isfinite(m(torch.randn(1, 3, 16, 16)).logits).all())
    if name in ("clip", "siglip"):
        return bool(torch.isfinite(m(
            input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16)
        ).logits_per_image).all())
    if name == "whisper":
        kw = dict(input_features=torch.randn(1, 8, 32), decoder_input_ids=ids)
        out = m(**kw)
    else:
        out = m(input_ids=ids, **kw)
    return bool(torch.isfinite(out.logits).all())


def is_causal(name):
    if name in VLMS or name in OTHERS:
        return False
    cls = {**CASES, **INFERRED}[name][1]
    return "Causal" in cls or "LMHead" in cls


def mean(a, b):
    return {"merge_method": "linear", "dtype": "float32",
            "parameters": {"weight": 0.5},
            "models": [{"model": a}, {"model": b}]}


def stack(a, b, first=1):
    return {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [first, first + 2]}]}]}


def result(tvmerge, root, cls, name, recipe, what, said):
    """Merges, loads, runs; the state of what came out, or None."""
    r = run(tvmerge, root, recipe, "o")
    if r.returncode:
        said.append(f"{what}: exit {r.returncode}: {r.stderr.strip()[:200]}")
        return None
    m, bad = loads(cls, os.path.join(root, "o"))
    if bad:
        said.append(f"{what}: loads with {str(bad)[:200]}")
    elif not finite(m, name):
        said.append(f"{what}: logits are not finite")
    return m


def same(x, y):
    return x is not None and y is not None and all(
        torch.equal(v, y[k]) for k, v in x.items())


def layouts(tvmerge, root, cls, name, said):
    """Experts one by one and packed, in every combination."""
    for model, seed in (("a", 1), ("b", 2)):
        save(os.path.join(root, model + "5"), name, seed, original=False)
    if set(tensors(os.path.join(root, "a"))) == set(
            tensors(os.path.join(root, "a5"))):
        return
    for what, make_recipe in (("layouts", mean), ("stacked layouts", stack)):
        first = [0] if name in EVEN and make_recipe is stack else []
        want = result(tvmerge, root, cls, name,
                      make_recipe("a", "b", *first), what, said)
        for a, b in (("a", "b5"), ("a5", "b"), ("a5", "b5")):
            m = result(tvmerge, root, cls, name, make_recipe(a, b, *first),
                       f"{what} {a} {b}", said)
            if want is None or m is None or not same(want.state_dict(),
                                                     m.state_dict()):
                said.append(f"{what} {a} {b}: other values")
            if not set(tensors(os.path.join(root, "o"))) >= {
                    k for k in tensors(os.path.join(root, a))
                    if ".1." in k}:
                said.append(f"{what} {a} {b}: not the first one's layout")


def ties(tvmerge, root, cls, name, said):
    """The output's config says what its tensors are; the head is the mean of
    what either model has as its head."""
    heads = {}
    for model, seed, tied in (("tt", 1, True), ("tu", 2, False)):
        save(os.path.join(root, model), name, seed, tied=tied)
        m, bad = loads(cls, os.path.join(root, model))
        heads[model] = m.get_output_embeddings().weight
    for a in heads:
        for b in heads:
            if a == b:
                continue
            m = result(tvmerge, root, cls, name, mean(a, b),
                       f"ties {a} {b}", said)
            if m is None:
                continue
            want = (heads[a] + heads[b]) / 2
            if m.config.tie_word_embeddings or not torch.allclose(
                    m.get_output_embeddings().weight, want, atol=1e-6):
                said.append(f"ties {a} {b}: another head")
    for model in heads:
        save(os.path.join(root, model + "2"), name, 3, tied=model == "tt")
        m = result(tvmerge, root, cls, name, mean(model, model + "2"),
                   f"ties {model}", said)
        if m is not None and m.config.tie_word_embeddings != (model == "tt"):
            said.append(f"ties {model}: the config says otherwise")


# Modules that are stacked: [0, 2) of a, then [1, 2) of b. The rest is copied.
STACKED = {**{v: ["text_decoder"] for v in VLMS}, "t5": ["decoder"],
           "t5-gated": ["encoder"], "whisper": ["encoder", "decoder"]}


def modules(tvmerge, root, name, cls):
    slices = [{"sources": [{"model": "a", "layer_range": [0, 2]}]},
              {"sources": [{"model": "b", "layer_range": [1, 2]}]}]
    r = run(tvmerge, root, {
        "merge_method": "passthrough",
        "modules": {m: {"slices": slices} for m in STACKED[name]}}, "mod")
    if r.returncode:
        return [f"modules: exit {r.returncode}: {r.stderr.strip()[:300]}"]
    m, bad = loads(cls, os.path.join(root, "mod"))
    if bad:
        return [f"modules: loads with {str(bad)[:300]}"]
    return [] if finite(m, name) else ["modules: logits are not finite"]


def text_part(m):
    return {**m.model.language_model.state_dict(prefix="model."),
            "lm_head.weight": m.get_output_embeddings().weight.detach()}


def text_module(tvmerge, root, name, cls):
    """The text module merged, with another model's and with a language model
    of its own kind; everything else copied from the first."""
    said = []
    t = None
    if VLMS[name][2]:
        text = getattr(tf, VLMS[name][2])
        config = text.config_class(**make(name)[0].text_config.to_dict())
        torch.manual_seed(7)
        t = text(config)
        t.save_pretrained(os.path.join(root, "t"))
    a, _ = loads(cls, os.path.join(root, "a"))
    b, _ = loads(cls, os.path.join(root, "b"))
    for other, theirs in (("b", text_part(b)),
                          ("t", t.state_dict() if t else {})):
        if not theirs:
            continue
        recipe = mean("a", other)
        recipe = {"merge_method": "linear", "base_model": "a",
                  "modules": {"text_decoder": {"models": recipe["models"]}},
                  "parameters": {"weight": 0.5}}
        m = result(tvmerge, root, cls, name, recipe, f"text of {other}", said)
        if m is None:
            continue
        ours, got = text_part(a), text_part(m)
        for k, v in got.items():
            if not torch.allclose(v, (ours[k] + theirs[k]) / 2, atol=1e-6):
                said.append(f"text of {other}: {k} is not the mean")
        inside = {x.data_ptr() for x in text_part(m).values()}
        for k, v in m.state_dict().items():
            if v.data_ptr() not in inside and not torch.equal(
                    v, a.state_dict()[k]):
                said.append(f"text of {other}: {k} is not copied")
    return said


def one(tvmerge, name):
    said = []
    with tempfile.TemporaryDirectory() as root:
        a, b, out = (os.path.join(root, x) for x in ("a", "b", "out"))
        cls = save(a, name, 1)
        save(b, name, 2)
        r = run(tvmerge, root, mean("a", "b"), "out")
        if r.returncode:
            return [f"merge: exit {r.returncode}: {r.stderr.strip()[:300]}"]
        x, y, z = tensors(a), tensors(b), tensors(out)
        if set(z) != set(x):
            said.append(f"tensors differ: {sorted(set(z) ^ set(x))[:4]}")
        for k in set(x) & set(z):
            want = (x[k] + y[k]) / 2 if x[k].is_floating_point() else x[k]
            if not torch.allclose(z[k], want, atol=1e-6):
                said.append(f"{k} is not the mean")
        m, bad = loads(cls, out)
        if bad:
            said.append(f"loads with {bad}")
        if not finite(m, name):
            said.append("logits are not finite")
        if name in STACKED:
            said += modules(tvmerge, root, name, cls)
        if name in VLMS:
            said += text_module(tvmerge, root, name, cls)
        if not is_causal(name) and name not in VLMS:
            return said
        r = run(tvmerge, root, stack("a", "b", int(name not in EVEN)), "st")
        if name in NO_STACK:
            if r.returncode != 4 or NO_STACK[name] not in r.stderr:
                said.append(f"stack: exit {r.returncode} instead of 4")
        elif r.returncode:
            said.append(f"stack: exit {r.returncode}: "
                        f"{r.stderr.strip()[:300]}")
        else:
            try:
                m, bad = loads(cls, os.path.join(root, "st"))
                if bad:
                    said.append(f"stack loads with {str(bad)[:300]}")
                elif not finite(m, name):
                    said.append("stack: logits are not finite")
            except Exception as e:
                said.append(f"stack: {type(e).__name__} {str(e)[:200]} "
                            f"[{r.stderr.strip()[:200]}]")
        if name in VLMS:
            return said
        layouts(tvmerge, root, cls, name, said)
        if name not in ONE_HEAD:
            ties(tvmerge, root, cls, name, said)
        c = os.path.join(root, "c")
        save(c, name, 3, V + 2)
        r = run(tvmerge, root, mean("a", "c"), "cut",
                "--unsafe-truncate-embeddings")
        if r.returncode:
            said.append(f"vocabularies: exit {r.returncode}: "
                        f"{r.stderr.strip()[:300]}")
        else:
            m, bad = loads(cls, os.path.join(root, "cut"))
            if bad or len(m.get_input_embeddings().weight) != V:
                said.append(f"vocabularies: loads with {bad}")
            elif not finite(m, name):
                said.append("vocabularies: logits are not finite")
    return said


def main():
    tvmerge = os.path.abspath(sys.argv[1])
    failed = 0
    for name in sys.argv[2:] or [*CASES, *INFERRED, *VLMS, *OTHERS]:
        try:
            said = one(tvmerge, name)
        except Exception as e:
            said = [f"{type(e).__name__}: {str(e)[:300]}"]
        failed += bool(said)
        print(f"{'BAD' if said else 'ok '} {name} {'; '.join(said)}",
              flush=True)
    print(f"{failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
