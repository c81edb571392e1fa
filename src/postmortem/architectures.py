"""What a base looks like from its config.json alone: module names and in/out sizes.

Each family is a table of rows `path inputs outputs bias [?condition]`. A path repeats over `{L}`
layers (`{M}` decoder layers of an encoder-decoder). Sizes are sums of the symbols of
`_read_sizes`. Bias is `-` (none), `+` (always) or the config keys that switch it on.
Verified against the modules of the transformers classes in tests/test_architectures.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from postmortem.errors import ModelError

MAX_LAYERS = 1024  # The deepest published model has a few hundred; more is a hostile config.


@dataclass(frozen=True, slots=True)
class Module:
    """A linear or embedding module; a size of None is not fixed by config.json (label counts)."""

    inputs: int | None
    outputs: int | None
    bias: bool
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The modules of one base under one model class.

    `open_paths` matches module paths that exist but are not described here (experts of a
    mixture, vision towers): adapters may hold tensors there and their shapes are not judged.
    """

    name: str
    model_type: str
    kind: str
    modules: Mapping[str, Module]
    layers: int
    default_targets: tuple[str, ...]
    heads: tuple[str, ...]
    open_paths: re.Pattern[str] | None
    transposed: bool
    quantization: str | None

    def is_open(self, path: str) -> bool:
        """Tell whether this path lies in a part of the model that is not described."""
        return self.open_paths is not None and self.open_paths.search(path) is not None


@dataclass(frozen=True, slots=True)
class _Family:
    body: str
    heads: Mapping[str, str]
    prefix: str = "model."
    cls_prefix: str | None = None
    transposed: bool = False
    width: str = "intermediate_size"  # The key of the feed-forward width; without it, 4 hidden.


@dataclass(frozen=True, slots=True)
class _Type:
    family: str
    targets: str = ""  # PEFT's own default when target_modules is null; empty: PEFT raises.
    defaults: Mapping[str, object] | None = None  # For keys that config.json may leave out.


_DECODER_HEADS = {"bare": "", "causal": "lm_head H V -", "seq_cls": "score H * -"}
_SCORE_HEADS = {**_DECODER_HEADS, "token_cls": "score H * +"}
_CLASSIFIER_HEADS = {**_DECODER_HEADS, "token_cls": "classifier H * +"}
_QA_HEADS = {"token_cls": "classifier H * +", "qa": "qa_outputs H * +"}
_MLM_HEAD = "cls.predictions.transform.dense H H +\ncls.predictions.decoder H V +"
_FUSED = """
h.{L}.self_attention.query_key_value H G bias
h.{L}.self_attention.dense H H bias
h.{L}.mlp.dense_h_to_4h H F bias
h.{L}.mlp.dense_4h_to_h F H bias
word_embeddings V H embedding
"""
_ENCODER = """
encoder.layer.{L}.attention.output.dense H H +
encoder.layer.{L}.intermediate.dense H F +
encoder.layer.{L}.output.dense F H +
embeddings.word_embeddings V E embedding
embeddings.position_embeddings P H embedding ?positions
embeddings.token_type_embeddings T H embedding ?types
"""
_BERT = f"""
encoder.layer.{{L}}.attention.self.query H H +
encoder.layer.{{L}}.attention.self.key H H +
encoder.layer.{{L}}.attention.self.value H H +
{_ENCODER}"""
_FAMILIES = {
    "llama": _Family(
        """
        layers.{L}.self_attn.q_proj H Q qkv_bias,attention_bias,use_qkv_bias
        layers.{L}.self_attn.k_proj H K qkv_bias,attention_bias,use_qkv_bias
        layers.{L}.self_attn.v_proj H K qkv_bias,attention_bias,use_qkv_bias
        layers.{L}.self_attn.o_proj Q H attention_bias
        layers.{L}.mlp.gate_proj H F mlp_bias ?dense
        layers.{L}.mlp.up_proj H F mlp_bias ?dense
        layers.{L}.mlp.down_proj F H mlp_bias ?dense
        embed_tokens V H embedding
        """,
        _SCORE_HEADS,
    ),
    "phi": _Family(
        """
        layers.{L}.self_attn.q_proj H Q +
        layers.{L}.self_attn.k_proj H K +
        layers.{L}.self_attn.v_proj H K +
        layers.{L}.self_attn.dense Q H +
        layers.{L}.mlp.fc1 H F +
        layers.{L}.mlp.fc2 F H +
        embed_tokens V H embedding
        """,
        {**_SCORE_HEADS, "causal": "lm_head H V +"},
    ),
    "phi3": _Family(
        """
        layers.{L}.self_attn.qkv_proj H Q+2K -
        layers.{L}.self_attn.o_proj Q H -
        layers.{L}.mlp.gate_up_proj H 2F -
        layers.{L}.mlp.down_proj F H -
        embed_tokens V H embedding
        """,
        _SCORE_HEADS,
    ),
    "gpt2": _Family(
        """
        h.{L}.attn.c_attn H 3H +
        h.{L}.attn.c_proj H H +
        h.{L}.mlp.c_fc H F +
        h.{L}.mlp.c_proj F H +
        wte V H embedding
        wpe P H embedding
        """,
        _CLASSIFIER_HEADS,
        prefix="transformer.",
        transposed=True,
        width="n_inner",
    ),
    "gpt_neox": _Family(
        """
        layers.{L}.attention.query_key_value H 3H attention_bias
        layers.{L}.attention.dense H H attention_bias
        layers.{L}.mlp.dense_h_to_4h H F +
        layers.{L}.mlp.dense_4h_to_h F H +
        embed_in V H embedding
        """,
        _CLASSIFIER_HEADS,
        prefix="gpt_neox.",
    ),
    "opt": _Family(
        """
        decoder.layers.{L}.self_attn.q_proj H H enable_bias
        decoder.layers.{L}.self_attn.k_proj H H enable_bias
        decoder.layers.{L}.self_attn.v_proj H H enable_bias
        decoder.layers.{L}.self_attn.out_proj H H enable_bias
        decoder.layers.{L}.fc1 H F enable_bias
        decoder.layers.{L}.fc2 F H enable_bias
        decoder.project_in E H - ?project
        decoder.project_out H E - ?project
        decoder.embed_tokens V E embedding
        decoder.embed_positions P+2 H embedding
        """,
        {"bare": "", "causal": "lm_head E V -", "seq_cls": "score E * -"},
        width="ffn_dim",
    ),
    "fused": _Family(_FUSED, _CLASSIFIER_HEADS, prefix="transformer.", width="ffn_hidden_size"),
    "bert": _Family(
        _BERT,
        {
            **_QA_HEADS,
            "bare": "pooler.dense H H +",
            "seq_cls": "bert.pooler.dense H H +\nclassifier H * +",
            "mlm": _MLM_HEAD,
        },
        prefix="bert.",
    ),
    "roberta": _Family(
        _BERT,
        {
            **_QA_HEADS,
            "bare": "pooler.dense H H +",
            "seq_cls": "classifier.dense H H +\nclassifier.out_proj H * +",
            "mlm": "lm_head.dense H H +\nlm_head.decoder H V +",
        },
        prefix="roberta.",
    ),
    "deberta": _Family(
        f"""
        encoder.layer.{{L}}.attention.self.in_proj H 3H -
        encoder.layer.{{L}}.attention.self.pos_proj H H - ?c2p
        encoder.layer.{{L}}.attention.self.pos_q_proj H H + ?p2c
        {_ENCODER}""",
        {
            **_QA_HEADS,
            "bare": "",
            "seq_cls": "pooler.dense H H +\nclassifier H * +",
            "mlm": _MLM_HEAD,
        },
        prefix="deberta.",
    ),
    "deberta-v2": _Family(
        f"""
        encoder.layer.{{L}}.attention.self.query_proj H Q +
        encoder.layer.{{L}}.attention.self.key_proj H Q +
        encoder.layer.{{L}}.attention.self.value_proj H Q +
        encoder.layer.{{L}}.attention.self.pos_key_proj H Q + ?c2p_own
        encoder.layer.{{L}}.attention.self.pos_query_proj H Q + ?p2c_own
        {_ENCODER}""",
        {
            **_QA_HEADS,
            "bare": "",
            "seq_cls": "pooler.dense H H +\nclassifier H * +",
            "mlm": _MLM_HEAD,
        },
        prefix="deberta.",
    ),
    "t5": _Family(
        "\n".join(
            f"{side}.{{{count}}}.layer.{place} ?{condition}"
            for side, count, attentions, feed_forward, condition in (
                ("encoder.block", "L", ("0.SelfAttention",), 1, "always"),
                ("decoder.block", "M", ("0.SelfAttention", "1.EncDecAttention"), 2, "decoder"),
            )
            for place in (
                *(f"{a}.{p} H Q -" for a in attentions for p in "qkv"),
                *(f"{a}.o Q H -" for a in attentions),
                f"{feed_forward}.DenseReluDense.wo F H -",
            )
        )
        + """
        encoder.block.{L}.layer.1.DenseReluDense.wi H F - ?plain
        encoder.block.{L}.layer.1.DenseReluDense.wi_0 H F - ?gated
        encoder.block.{L}.layer.1.DenseReluDense.wi_1 H F - ?gated
        decoder.block.{M}.layer.2.DenseReluDense.wi H F - ?plain_decoder
        decoder.block.{M}.layer.2.DenseReluDense.wi_0 H F - ?gated_decoder
        decoder.block.{M}.layer.2.DenseReluDense.wi_1 H F - ?gated_decoder
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias R A embedding
        decoder.block.0.layer.0.SelfAttention.relative_attention_bias R A embedding ?decoder
        shared V H embedding
        encoder.embed_tokens V H embedding
        decoder.embed_tokens V H embedding ?decoder
        """,
        {
            "bare": "",
            "encoder": "",
            "seq2seq": "lm_head H V -",
            "seq_cls": "classification_head.dense H H +\nclassification_head.out_proj H * +",
            "token_cls": "classifier H * +",
            "qa": "qa_outputs H * +",
        },
        prefix="",
        cls_prefix="transformer.",
        width="d_ff",
    ),
}
_QV, _QKV, _BERT_QV = "q_proj v_proj", "query_key_value", "query value"
_TYPES = {
    "llama": _Type("llama", _QV),
    "mistral": _Type("llama", _QV),
    "mixtral": _Type("llama", _QV),
    "qwen2": _Type("llama", _QV, {"qkv_bias": True}),
    "qwen2_moe": _Type("llama", "", {"qkv_bias": True}),
    "qwen2_vl_text": _Type("llama", "", {"qkv_bias": True}),
    "qwen2_5_vl_text": _Type("llama", "", {"qkv_bias": True}),
    "qwen3": _Type("llama", _QV, {"head_dim": 128}),
    "qwen3_moe": _Type("llama"),
    "qwen3_vl_text": _Type("llama", "", {"head_dim": 128}),
    "gemma": _Type("llama", _QV, {"head_dim": 256}),
    "gemma2": _Type("llama", _QV, {"head_dim": 256}),
    "gemma3_text": _Type("llama", _QV, {"head_dim": 256}),
    "smollm3": _Type("llama"),
    "stablelm": _Type("llama", _QV),
    "olmo": _Type("llama"),
    "olmo2": _Type("llama"),
    "phi": _Type("phi", "q_proj v_proj fc1 fc2"),
    "phi3": _Type("phi3"),
    "gpt2": _Type("gpt2", "c_attn"),
    "gpt_neox": _Type("gpt_neox", _QKV, {"attention_bias": True}),
    "opt": _Type("opt", _QV, {"enable_bias": True}),
    "falcon": _Type("fused", _QKV, {"multi_query": True}),
    "bloom": _Type("fused", _QKV, {"bias": True}),
    "bert": _Type("bert", _BERT_QV, {"type_vocab_size": 2}),
    "roberta": _Type("roberta", _BERT_QV, {"type_vocab_size": 2}),
    "xlm-roberta": _Type("roberta", _BERT_QV, {"type_vocab_size": 2}),
    "deberta": _Type("deberta", "in_proj"),
    "deberta-v2": _Type("deberta-v2", "query_proj value_proj"),
    "t5": _Type("t5", "q v"),
}
# The text tower of these sits under language_model; everything visual stays undescribed.
_VISION_TYPES = {
    "gemma3": "gemma3_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "llava": "llama",
    "mistral3": "mistral",
}
_VISION_PATHS = re.compile(r"(^|\.)(visual|vision\w*|multi_modal_projector|image\w*)(\.|$)")
_EXPERT_PATHS = re.compile(r"\.(mlp|block_sparse_moe)(\.|$)")

_KIND_OF_TASK = {
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "seq_cls",
    "TOKEN_CLS": "token_cls",
    "QUESTION_ANS": "qa",
    "FEATURE_EXTRACTION": "bare",
}
_KIND_OF_CLASS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForConditionalGeneration": "seq2seq",
    "ForMaskedLM": "mlm",
    "ForSequenceClassification": "seq_cls",
    "ForTokenClassification": "token_cls",
    "ForQuestionAnswering": "qa",
    "EncoderModel": "encoder",
    "Model": "bare",
}


def kind_of_task(task_type: str) -> str | None:
    """Name the kind of model class that a PEFT task type wraps."""
    return _KIND_OF_TASK.get(task_type)


def kind_of_class(class_name: str) -> str | None:
    """Name the kind of a transformers class, from the end of its name."""
    ends = (kind for suffix, kind in _KIND_OF_CLASS.items() if class_name.endswith(suffix))
    return next(ends, None)


def describe(config: Mapping[str, object], *, name: str, kind: str | None) -> BaseModel | None:
    """Describe the base of a config.json under one kind of class; None if it is unknown.

    Without a kind, the class that the config itself names decides. Raises ModelError when the
    sizes are not usable numbers.
    """
    outer_type = str(config.get("model_type"))
    is_vision = outer_type in _VISION_TYPES
    text = _text_config(config, outer_type) if is_vision else config
    text_type = str(text.get("model_type")) if text is not config else outer_type
    if is_vision and text_type not in _TYPES:
        text_type = _VISION_TYPES[outer_type]
    if text_type not in _TYPES:
        return None
    entry = _TYPES[text_type]
    family = _FAMILIES[entry.family]
    kind = _effective_kind(config, kind, family, is_vision)
    if kind is None or kind not in family.heads:
        return None
    full = {**(entry.defaults or {}), **{k: v for k, v in text.items() if v is not None}}
    sizes, flags = _read_sizes(full, name, family.width), _read_flags(full, kind)
    is_mixture = "num_experts" in full or "num_local_experts" in full
    paths = _VISION_PATHS if is_vision else _EXPERT_PATHS if is_mixture else None
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    rows = [*_rows(family.body, _prefix(family, kind, is_vision)), *_rows(family.heads[kind], "")]
    return BaseModel(
        name=name,
        model_type=outer_type,
        kind=kind,
        modules=dict(_expand(rows, sizes, flags, full)),
        layers=sizes["L"],
        default_targets=tuple(entry.targets.split()),
        heads=tuple(row[0] for row in _rows(family.heads[kind], "")),
        open_paths=paths,
        transposed=family.transposed,
        quantization=str(method) if method else None,
    )


def _text_config(config: Mapping[str, object], outer_type: str) -> Mapping[str, object]:
    nested = config.get("text_config")
    # Early Qwen2-VL configs are flat: the text sizes stand at the top.
    return nested if isinstance(nested, Mapping) else {**config, "model_type": outer_type}


def _effective_kind(
    config: Mapping[str, object], kind: str | None, family: _Family, is_vision: bool
) -> str | None:
    if kind is None:
        named = config.get("architectures")
        first = named[0] if isinstance(named, list) and named else ""
        fallback = next(k for k in ("causal", "seq2seq", "bare") if k in family.heads)
        kind = kind_of_class(str(first)) or fallback
    # A vision-language model generates text through a class named ForConditionalGeneration.
    return "causal" if is_vision and kind == "seq2seq" else kind


def _prefix(family: _Family, kind: str, is_vision: bool) -> str:
    if is_vision:
        return "language_model." if kind == "bare" else "model.language_model."
    if kind == "bare":
        return ""
    in_class = family.cls_prefix is not None and kind in ("seq_cls", "token_cls")
    return family.cls_prefix or "" if in_class else family.prefix


@cache
def _rows(table: str, prefix: str) -> tuple[tuple[str, ...], ...]:
    rows = (line.split() for line in table.splitlines() if line.strip())
    return tuple((prefix + path, *rest) for path, *rest in rows)


def _number(config: Mapping[str, object], names: str, default: int | None, subject: str) -> int:
    value = next((config[n] for n in names.split() if config.get(n) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(
            subject, expected=f"a whole number for {names.split()[0]}", found=f"{value!r:.40}"
        )
    return value


def _read_sizes(config: Mapping[str, object], subject: str, width: str) -> dict[str, int]:
    def read(names: str, default: int | None = None) -> int:
        return _number(config, names, default, subject)

    hidden = read("hidden_size n_embd n_embed d_model")
    heads = max(read("num_attention_heads n_head num_heads"), 1)
    layers = read("num_hidden_layers n_layer num_layers")
    dim = read("head_dim d_kv attention_head_size", hidden // heads)
    shared = read("num_key_value_heads num_kv_heads", heads)
    decoder_layers = read("num_decoder_layers", layers)
    if max(layers, decoder_layers) > MAX_LAYERS:
        raise ModelError(subject, expected=f"at most {MAX_LAYERS} layers", found=str(layers))
    return {
        "H": hidden,
        "L": layers,
        "M": decoder_layers,
        "A": heads,
        "Q": heads * dim,
        "K": shared * dim,
        "G": _fused_width(config, hidden, dim, heads + 2 * shared),
        "F": read(width, 4 * hidden),
        "V": read("vocab_size"),
        "E": read("word_embed_proj_dim embedding_size", hidden),
        "P": read("max_position_embeddings n_positions", 0),
        "T": read("type_vocab_size", 0),
        "R": read("relative_attention_num_buckets", 32),
    }


def _fused_width(config: Mapping[str, object], hidden: int, dim: int, heads: int) -> int:
    if config.get("new_decoder_architecture"):
        return heads * dim
    return hidden + 2 * dim if config.get("multi_query") else 3 * hidden


def _read_flags(config: Mapping[str, object], kind: str) -> frozenset[str]:
    positions = config.get("pos_att_type") or ""
    relative = bool(config.get("relative_attention"))
    own = relative and not config.get("share_att_key")
    gated = str(config.get("feed_forward_proj", "")).startswith("gated")
    decoder = kind not in ("encoder", "token_cls")
    flags = {
        "always": True,
        "dense": "num_experts" not in config and "num_local_experts" not in config,
        "project": config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")),
        "positions": config.get("position_biased_input", True),
        "types": config.get("type_vocab_size"),
        "c2p": relative and "c2p" in positions if isinstance(positions, str | list) else False,
        "p2c": relative and "p2c" in positions if isinstance(positions, str | list) else False,
        "gated": gated,
        "plain": not gated,
        "decoder": decoder,
        "gated_decoder": gated and decoder,
        "plain_decoder": not gated and decoder,
    }
    flags |= {"c2p_own": own and flags["c2p"], "p2c_own": own and flags["p2c"]}
    return frozenset(name for name, is_set in flags.items() if is_set)


def _expand(
    rows: list[tuple[str, ...]],
    sizes: Mapping[str, int],
    flags: frozenset[str],
    config: Mapping[str, object],
) -> Iterator[tuple[str, Module]]:
    for path, inputs, outputs, bias, *condition in rows:
        if condition and condition[0].removeprefix("?") not in flags:
            continue
        has_bias = bias == "+" or any(config.get(key) for key in bias.split(","))
        ends = _evaluate(inputs, sizes), _evaluate(outputs, sizes)
        module = Module(*ends, bias=has_bias, is_embedding=bias == "embedding")
        count = re.search(r"\{([LM])\}", path)
        for index in range(sizes[count[1]] if count else 1):
            yield (path.replace(count[0], str(index)) if count else path), module


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    if expression == "*":
        return None
    terms = (re.fullmatch(r"(\d*)([A-Z]?)", term) for term in expression.split("+"))
    return sum(int(t[1] or 1) * sizes.get(t[2], 1) for t in terms if t)
