"""Tiny configurations of every described architecture, for tests only."""

from typing import Any

import transformers as tf
from handmade import SMALL

_DECODER = {
    **SMALL,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS = {**_ROUTED, "shared_expert_intermediate_size": 16}
_MLA = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
}
_LINEAR = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
# The layers of full attention differ in both; the last two have no keys of their own.
_UNLIKE = {
    "head_dim": 16,
    "global_head_dim": 24,
    "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
}
_ALIKE_VALUES = {
    "head_dim": 16,
    "global_head_dim": 24,
    "num_hidden_layers": 6,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "moe_intermediate_size": 12,
    "top_k_experts": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
_DEBERTA = {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

# name -> (configuration class, its values, classes that wrap it)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": (
        "LlamaConfig",
        {**_DECODER, "attention_bias": True, "mlp_bias": True},
        ("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"),
    ),
    "llama-head-dim": ("LlamaConfig", {**_DECODER, "head_dim": 16}, ("LlamaForCausalLM",)),
    "mistral": ("MistralConfig", _DECODER, ("MistralForCausalLM", "MistralForTokenClassification")),
    "mixtral": ("MixtralConfig", _DECODER, ("MixtralForCausalLM",)),
    "qwen2": (
        "Qwen2Config",
        {**_DECODER, "tie_word_embeddings": True},
        ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2Model"),
    ),
    "qwen2_moe": ("Qwen2MoeConfig", {**_DECODER, **_EXPERTS}, ("Qwen2MoeForCausalLM",)),
    "qwen3": ("Qwen3Config", {**_DECODER, "head_dim": 16}, ("Qwen3ForCausalLM", "Qwen3Model")),
    "qwen3_moe": ("Qwen3MoeConfig", {**_DECODER, **_ROUTED}, ("Qwen3MoeForCausalLM",)),
    "gemma": ("GemmaConfig", {**_DECODER, "head_dim": 16}, ("GemmaForCausalLM",)),
    "gemma2": ("Gemma2Config", {**_DECODER, "head_dim": 16}, ("Gemma2ForCausalLM",)),
    "gemma3_text": ("Gemma3TextConfig", {**_DECODER, "head_dim": 16}, ("Gemma3ForCausalLM",)),
    "smollm3": ("SmolLM3Config", _DECODER, ("SmolLM3ForCausalLM",)),
    "stablelm": ("StableLmConfig", {**_DECODER, "use_qkv_bias": True}, ("StableLmForCausalLM",)),
    "olmo": ("OlmoConfig", _DECODER, ("OlmoForCausalLM",)),
    "olmo2": ("Olmo2Config", _DECODER, ("Olmo2ForCausalLM",)),
    "olmo3": ("Olmo3Config", _DECODER, ("Olmo3ForCausalLM",)),
    "granite": ("GraniteConfig", {**_DECODER, "mlp_bias": True}, ("GraniteForCausalLM",)),
    "granitemoe": ("GraniteMoeConfig", _DECODER, ("GraniteMoeForCausalLM",)),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_DECODER,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "shared_intermediate_size": 40,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
        },
        ("GraniteMoeHybridForCausalLM",),
    ),
    "granite-dense": (
        "GraniteMoeHybridConfig",
        {
            **_DECODER,
            "layer_types": ["attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "mamba_n_heads": 4,
        },
        ("GraniteMoeHybridForCausalLM",),
    ),
    "ministral": ("MinistralConfig", {**_DECODER, "head_dim": 16}, ("MinistralForCausalLM",)),
    "ministral3": ("Ministral3Config", {**_DECODER, "head_dim": 16}, ("Ministral3ForCausalLM",)),
    "gpt_oss": (
        "GptOssConfig",
        {**_DECODER, "head_dim": 16, "num_local_experts": 4},
        ("GptOssForCausalLM", "GptOssForSequenceClassification"),
    ),
    "glm": ("GlmConfig", {**_DECODER, "head_dim": 16}, ("GlmForCausalLM",)),
    "glm4": (
        "Glm4Config",
        {**_DECODER, "head_dim": 16},
        ("Glm4ForCausalLM", "Glm4ForSequenceClassification"),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_DECODER,
            "attention_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        ("Glm4MoeForCausalLM",),
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {**_DECODER, **_MLA, "q_lora_rank": 12},
        ("Glm4MoeLiteForCausalLM",),
    ),
    "seed_oss": ("SeedOssConfig", {**_DECODER, "head_dim": 16}, ("SeedOssForCausalLM",)),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_DECODER, **_MLA, "q_lora_rank": None},
        ("DeepseekV2ForCausalLM",),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_DECODER, **_MLA, "q_lora_rank": 12, "attention_bias": True},
        ("DeepseekV3ForCausalLM", "DeepseekV3ForSequenceClassification"),
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **_DECODER,
            "head_dim": 16,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
        ("Llama4ForCausalLM",),
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {**_DECODER, **_LINEAR},
        ("Qwen3_5ForCausalLM",),
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {**_DECODER, **_LINEAR, **_EXPERTS},
        ("Qwen3_5MoeForCausalLM",),
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_DECODER, **_LINEAR, **_EXPERTS},
        ("Qwen3NextForCausalLM",),
    ),
    "olmoe": (
        "OlmoeConfig",
        {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2},
        ("OlmoeForCausalLM",),
    ),
    "gemma4": ("Gemma4TextConfig", {**_DECODER, **_UNLIKE}, ("Gemma4ForCausalLM",)),
    "gemma4-moe": ("Gemma4TextConfig", {**_DECODER, **_ALIKE_VALUES}, ("Gemma4ForCausalLM",)),
    "phi": ("PhiConfig", _DECODER, ("PhiForCausalLM", "PhiForSequenceClassification")),
    "phi3": ("Phi3Config", _DECODER, ("Phi3ForCausalLM", "Phi3ForTokenClassification")),
    "gpt2": (
        "GPT2Config",
        {**_GPT, **_ENDS},
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        _ENCODER,
        ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification", "GPTNeoXForTokenClassification"),
    ),
    "opt": (
        "OPTConfig",
        {**_ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 16},
        ("OPTForCausalLM", "OPTForSequenceClassification", "OPTModel"),
    ),
    "falcon": ("FalconConfig", {**_ENCODER, "multi_query": True}, ("FalconForCausalLM",)),
    "falcon-heads": (
        "FalconConfig",
        {**_ENCODER, "multi_query": False, "bias": True},
        ("FalconForCausalLM", "FalconForSequenceClassification"),
    ),
    "falcon-new": (
        "FalconConfig",
        {**_ENCODER, "new_decoder_architecture": True, "num_kv_heads": 2},
        ("FalconForCausalLM",),
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, **_ENDS},
        ("BloomForCausalLM", "BloomForTokenClassification", "BloomModel"),
    ),
    "bert": (
        "BertConfig",
        _ENCODER,
        (
            "BertForSequenceClassification",
            "BertForTokenClassification",
            "BertModel",
            "BertForQuestionAnswering",
            "BertForMaskedLM",
        ),
    ),
    "roberta": (
        "RobertaConfig",
        _ENCODER,
        (
            "RobertaForSequenceClassification",
            "RobertaForTokenClassification",
            "RobertaForMaskedLM",
            "RobertaForQuestionAnswering",
            "RobertaModel",
        ),
    ),
    "deberta": (
        "DebertaConfig",
        _DEBERTA,
        ("DebertaForSequenceClassification", "DebertaForMaskedLM", "DebertaModel"),
    ),
    "deberta-v2": (
        "DebertaV2Config",
        _DEBERTA,
        ("DebertaV2ForTokenClassification", "DebertaV2ForSequenceClassification"),
    ),
    "deberta-v3": (
        "DebertaV2Config",
        {**_DEBERTA, "share_att_key": True, "type_vocab_size": 0, "position_biased_input": False},
        ("DebertaV2ForSequenceClassification", "DebertaV2ForMaskedLM", "DebertaV2Model"),
    ),
    "t5": (
        "T5Config",
        {**_T5, "num_decoder_layers": 3},
        (
            "T5ForConditionalGeneration",
            "T5EncoderModel",
            "T5Model",
            "T5ForSequenceClassification",
            "T5ForTokenClassification",
            "T5ForQuestionAnswering",
        ),
    ),
    "t5-gated": (
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ("T5ForConditionalGeneration",),
    ),
}


def configuration(name: str) -> Any:
    """Build the transformers configuration of one architecture."""
    class_name, values, _ = ARCHITECTURES[name]
    return getattr(tf, class_name)(**values)


def vision_configuration(name: str) -> Any:
    """Build a vision-language configuration whose text tower is tiny."""
    text = {**_DECODER, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    if name == "gemma3":
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return tf.Gemma3Config(text_config=text, vision_config={**vision, "intermediate_size": 16})
    if name == "gemma4":
        return tf.Gemma4Config(text_config={**text, **_UNLIKE}, vision_config=None)
    if name == "llama4":
        projector = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **projector}
        text |= {"intermediate_size_mlp": 64, "num_local_experts": 4}
        return tf.Llama4Config(text_config=text, vision_config=vision)
    del text["head_dim"]
    text["rope_parameters"] = rope
    if name in ("qwen3_5", "qwen3_5_moe"):
        return _hybrid_vision(name, {**text, **_LINEAR, "head_dim": 16})
    class_name = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig"}.get(
        name, "Qwen3VLConfig"
    )
    if name == "qwen3_vl":
        text["head_dim"] = 16
        vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    elif name == "qwen2_5_vl":
        vision |= {"out_hidden_size": 32}
    else:
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    return getattr(tf, class_name)(text_config=text, vision_config=vision)


def _hybrid_vision(name: str, text: dict[str, Any]) -> Any:
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    vision["out_hidden_size"] = 32
    del text["rope_parameters"]
    if name == "qwen3_5":
        return tf.Qwen3_5Config(text_config=text, vision_config=vision)
    return tf.Qwen3_5MoeConfig(text_config={**text, **_EXPERTS}, vision_config=vision)
