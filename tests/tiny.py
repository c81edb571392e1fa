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
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
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
    "qwen3_moe": ("Qwen3MoeConfig", {**_DECODER, **_EXPERTS}, ("Qwen3MoeForCausalLM",)),
    "gemma": ("GemmaConfig", {**_DECODER, "head_dim": 16}, ("GemmaForCausalLM",)),
    "gemma2": ("Gemma2Config", {**_DECODER, "head_dim": 16}, ("Gemma2ForCausalLM",)),
    "gemma3_text": ("Gemma3TextConfig", {**_DECODER, "head_dim": 16}, ("Gemma3ForCausalLM",)),
    "smollm3": ("SmolLM3Config", _DECODER, ("SmolLM3ForCausalLM",)),
    "stablelm": ("StableLmConfig", {**_DECODER, "use_qkv_bias": True}, ("StableLmForCausalLM",)),
    "olmo": ("OlmoConfig", _DECODER, ("OlmoForCausalLM",)),
    "olmo2": ("Olmo2Config", _DECODER, ("Olmo2ForCausalLM",)),
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
    del text["head_dim"]
    text["rope_parameters"] = rope
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
