"""Bases: those that are known by name, and the modules and sizes that a config declares."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from postmortem.checker.errors import ModelError

# Tuned siblings whose module shapes are those of the row without the suffix.
_TUNED = ("-instruct", "-chat", "-it", "-base", "-pt", "-deduped")
# What requantised or repackaged copies append to the name of the model that they hold.
_COPY = re.compile(
    r"-(hf|unsloth|bnb-[48]bit|[2-8]-?bits?|mlx|gguf|nf4|qat|dwq|(bf|fp|f)16|int[48]"
    r"|(gptq|awq)(-int[48])?|fp8(-block|-dynamic|-kv)?|(quantized\.)?w\d+a\d+|q[2-8](_\w+)?)$"
)
# What other publishers, or the same one today, call a model.
_RENAMED = (
    (re.compile(r"^meta-llama-"), "llama-"),
    (re.compile(r"^tinyllama-chat$"), "tinyllama-1.1b-chat-v1.0"),
    (re.compile(r"^tinyllama$"), "tinyllama-1.1b-intermediate-step-1431k-3t"),
    (re.compile(r"^mistral-7b$"), "mistral-7b-v0.1"),
)
# Copies under an architecture of another kind: their projections are split.
_CONVERTED = re.compile(r"unsloth/phi-[34]", re.IGNORECASE)
_DIMENSIONS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size"),
)
# What config.json adds and the shape table has no column for.
_EXTRA: Mapping[str, Mapping[str, object]] = {
    "deberta-v2": {
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "type_vocab_size": 0,
        "position_biased_input": False,
    },
}


@dataclass(frozen=True, slots=True)
class KnownBase:
    """One published base: what its config.json says of shapes, and where that was read."""

    model_id: str
    config: Mapping[str, object]
    verified: bool
    source: str
    notes: str
    aliases: tuple[str, ...]


def _read_row(row: Mapping[str, str]) -> KnownBase:
    config: dict[str, object] = {name: int(row[name]) for name in _DIMENSIONS}
    config |= {
        "model_type": row["model_type"],
        "tie_word_embeddings": row["tie_word_embeddings"] == "true",
        **_EXTRA.get(row["model_type"], {}),
    }
    verified = row["verified"] == "yes"
    aliases = tuple(row["aliases"].split())
    return KnownBase(row["model_id"], config, verified, row["source"], row["notes"], aliases)


@cache
def known_bases() -> tuple[KnownBase, ...]:
    """Return every row of bases.csv; dimensions are in units (features, layers, heads, tokens)."""
    with Path(__file__).with_name("bases.csv").open(encoding="utf-8", newline="") as file:
        return tuple(_read_row(row) for row in csv.DictReader(file))


def plain_name(model_id: str) -> str:
    """Reduce a model id to the model that it is a copy of: no owner and no quantisation."""
    name = model_id.rstrip("/").rsplit("/", 1)[-1].lower()
    while suffix := _COPY.search(name):
        name = name[: suffix.start()]
    for pattern, today in _RENAMED:
        name = pattern.sub(today, name)
    return name


def family_name(model_id: str) -> str:
    """Reduce a model id to what fixes its shapes: neither owner, quantisation nor tuning."""
    name = plain_name(model_id)
    while suffix := next((s for s in _TUNED if name.endswith(s)), None):
        name = name.removesuffix(suffix)
    return name


@cache
def _by_family() -> Mapping[str, KnownBase]:
    aliases = {alias: base for base in known_bases() for alias in base.aliases}
    return {**aliases, **{family_name(b.model_id): b for b in reversed(known_bases())}}


def find_base(model_id: str) -> KnownBase | None:
    """Find the row of a model id, or of the sibling that its shapes come from; None if unknown.

    A path is unknown: a folder can be called anything.
    """
    if model_id.startswith(("/", ".", "~")) or "\\" in model_id or model_id.count("/") > 1:
        return None
    exact = {base.model_id.lower(): base for base in known_bases()}
    if _CONVERTED.match(model_id):
        return None
    return exact.get(model_id.lower()) or _by_family().get(family_name(model_id))


MAX_LAYERS = 1024  # The deepest published model has a few hundred; more is a hostile config.


@dataclass(frozen=True, slots=True)
class Module:
    """A linear or embedding module; a size of None is not fixed by config.json (label counts)."""

    inputs: int | None
    outputs: int | None
    bias: bool
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a mixture: how many, the width of the model and that within an expert."""

    count: int
    width: int
    inner: int

    def shape(self, name: str) -> tuple[int, int] | None:
        """Return (in, out) of a projection, fused or of one expert; None for another name."""
        if name in ("down_proj", "w2"):
            return self.inner, self.width
        if name in ("gate_proj", "up_proj", "w1", "w3"):
            return self.width, self.inner
        return (self.width, 2 * self.inner) if name == "gate_up_proj" else None


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The modules of one base under one model class.

    `open_paths` matches module paths that exist but are not described here (experts of a
    mixture, vision towers): adapters may hold tensors there and their shapes are not judged.
    `transposed` weights are stored as (in, out); `declared_kind` is that of the config itself;
    `ties_weights` tells whether the output layer shares the weight of the input embedding.
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
    declared_kind: str | None
    quantization: str | None
    ties_weights: bool
    experts: Experts | None

    def expert_paths(self) -> list[str]:
        """Return the path of each layer's experts."""
        layers = (p.partition(".self_attn.")[0] for p in self.modules if ".self_attn." in p)
        return [f"{layer}.mlp.experts" for layer in dict.fromkeys(layers) if self.experts]

    def is_expert(self, path: str) -> bool:
        """Tell whether a path is of experts whose shapes are known."""
        return self.experts is not None and ".experts" in path

    def tied(self, path: str) -> str | None:
        """Return the module that shares this one's weight, if one does."""
        inputs, outputs = ("embed_tokens", "wte", "word_embeddings", "shared"), ("lm_head",)
        is_tied = self.ties_weights and self.kind in ("causal", "seq2seq")
        if not is_tied or not path.endswith(inputs + outputs):
            return None
        wanted = outputs if path.endswith(inputs) else inputs
        return next((name for name in self.modules if name.endswith(wanted)), None)

    def is_open(self, path: str) -> bool:
        """Tell whether this path lies in a part of the model that is not described."""
        return self.open_paths is not None and self.open_paths.search(path) is not None


@dataclass(frozen=True, slots=True)
class _Family:
    """What the rows of a family do not say; `kinds` are the kinds of class that it has."""

    prefix: str
    kinds: str = "bare causal seq_cls token_cls"
    head_prefix: str = ""  # Of classes with a classification head, where it differs.
    transposed: bool = False
    width: str = "intermediate_size"  # The key of the feed-forward width.
    widens: bool = False  # Without that key the width is four times the hidden size.


@dataclass(frozen=True, slots=True)
class _Type:
    family: str
    targets: str = ""  # PEFT's own default when target_modules is null; empty: PEFT raises.
    defaults: Mapping[str, object] | None = None  # For keys that config.json may leave out.


_ENCODER_KINDS = "bare seq_cls token_cls qa mlm"
_FAMILIES = {
    "llama": _Family("model."),
    "phi": _Family("model."),
    "phi3": _Family("model."),
    "gpt2": _Family("transformer.", transposed=True, width="n_inner", widens=True),
    "gpt_neox": _Family("gpt_neox."),
    "opt": _Family("model.", "bare causal seq_cls", width="ffn_dim"),
    "fused": _Family("transformer.", width="ffn_hidden_size", widens=True),
    "bert": _Family("bert.", _ENCODER_KINDS),
    "roberta": _Family("roberta.", _ENCODER_KINDS),
    "deberta": _Family("deberta.", _ENCODER_KINDS),
    "deberta-v2": _Family("deberta.", _ENCODER_KINDS),
    "t5": _Family("", "bare encoder seq2seq seq_cls token_cls qa", "transformer.", width="d_ff"),
}
_QV, _QKV, _BERT_QV = "q_proj v_proj", "query_key_value", "query value"
# Google's own config.json leaves out what equals the defaults of the class.
_GEMMA3 = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262208,
}
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
    "gemma3_text": _Type("llama", _QV, _GEMMA3),
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
# Types whose class ties lm_head to the embedding where config.json does not say.
_TIED = (
    *("gemma", "gemma2", "gemma3_text", "smollm3", "gpt2", "opt", "falcon", "bloom"),
    *("bert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "t5"),
)
# The text tower of these sits under language_model; everything visual stays undescribed.
_VISION_TYPES = {
    "gemma3": "gemma3_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "llava": "llama",
    "mistral3": "mistral",
}
# LLaVA's own classes are the text model itself with a tower beside its layers.
_FLAT_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
_VISION_PATHS = re.compile(
    r"(^|\.)(visual|vision\w*|image\w*|resampler"
    r"|m(ulti_)?m(odal)?_(projector|connector))(\.|$)"
)
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
    is_flat = outer_type in _FLAT_TYPES and "text_config" not in config
    is_vision = outer_type in _VISION_TYPES and not is_flat
    text = _text_config(config) if is_vision else config
    text = {**config, "model_type": _FLAT_TYPES[outer_type]} if is_flat else text
    entry = _TYPES.get(str(text.get("model_type")))
    if entry is None:
        return None
    family = _FAMILIES[entry.family]
    kind = _effective_kind(config, kind, family, is_vision)
    if kind is None or kind not in family.kinds.split():
        return None
    full = {**(entry.defaults or {}), **{k: v for k, v in text.items() if v is not None}}
    sizes, flags = _read_sizes(full, name, family), _read_flags(full, kind)
    rows = _rows(entry.family, kind)
    prefix = _prefix(family, kind, is_vision)
    return BaseModel(
        name=name,
        model_type=outer_type,
        kind=kind,
        modules=dict(_expand(rows, prefix, sizes=sizes, flags=flags, config=full)),
        layers=sizes["L"],
        default_targets=tuple(entry.targets.split()),
        heads=tuple(row["path"] for row in rows if row["kind"]),
        open_paths=_open_paths(is_vision or is_flat, flags),
        transposed=family.transposed,
        declared_kind=_declared_kind(config),
        quantization=_quantization(config),
        ties_weights=_is_tied(config, full),
        experts=_read_experts(full, name) if "dense" not in flags else None,
    )


def _read_experts(config: Mapping[str, object], subject: str) -> Experts:
    def read(names: str) -> int:
        return _number(config, names, None, subject)

    inner = read("moe_intermediate_size intermediate_size")
    return Experts(read("num_experts num_local_experts"), read("hidden_size"), inner)


def _open_paths(is_vision: bool, flags: frozenset[str]) -> re.Pattern[str] | None:
    if is_vision:
        return _VISION_PATHS
    return None if "dense" in flags else _EXPERT_PATHS


def _is_tied(config: Mapping[str, object], text: Mapping[str, object]) -> bool:
    default = text.get("tie_word_embeddings", str(text.get("model_type")) in _TIED)
    return config.get("tie_word_embeddings", default) is True


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    nested = config.get("text_config")
    # Early Qwen2-VL configs are flat: the text sizes stand at the top.
    text = nested if isinstance(nested, Mapping) else config
    text_type = text.get("model_type")
    is_text = isinstance(text_type, str) and text_type in _TYPES
    return text if is_text else {**text, "model_type": _VISION_TYPES[str(config["model_type"])]}


def _quantization(config: Mapping[str, object]) -> str | None:
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return str(method) if method else None


def _declared_kind(config: Mapping[str, object]) -> str | None:
    named = config.get("architectures")
    return kind_of_class(str(named[0])) if isinstance(named, list) and named else None


def _effective_kind(
    config: Mapping[str, object], kind: str | None, family: _Family, is_vision: bool
) -> str | None:
    if kind is None:
        fallback = next(k for k in ("causal", "seq2seq", "bare") if k in family.kinds)
        kind = _declared_kind(config) or fallback
    # A vision-language model generates text through a class named ForConditionalGeneration.
    return "causal" if is_vision and kind == "seq2seq" else kind


def _prefix(family: _Family, kind: str, is_vision: bool) -> str:
    if is_vision:
        return "language_model." if kind == "bare" else "model.language_model."
    if kind == "bare":
        return ""
    has_own = family.head_prefix and kind in ("seq_cls", "token_cls")
    return family.head_prefix if has_own else family.prefix


@cache
def _table() -> tuple[Mapping[str, str], ...]:
    with Path(__file__).with_name("architectures.csv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


@cache
def _rows(family: str, kind: str) -> tuple[Mapping[str, str], ...]:
    of_family = (row for row in _table() if family in row["families"].split())
    return tuple(row for row in of_family if row["kind"] in ("", kind))


def _number(config: Mapping[str, object], names: str, default: int | None, subject: str) -> int:
    value = next((config[n] for n in names.split() if config.get(n) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(
            subject, expected=f"a whole number for {names.split()[0]}", found=f"{value!r:.40}"
        )
    return value


def _read_sizes(config: Mapping[str, object], subject: str, family: _Family) -> dict[str, int]:
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
        "F": read(family.width, 4 * hidden if family.widens else None),
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
    attention = config.get("pos_att_type") if config.get("relative_attention") else None
    positions = attention if isinstance(attention, str | list) else ""
    own = not config.get("share_att_key")
    has_decoder = kind not in ("encoder", "token_cls")
    gated = str(config.get("feed_forward_proj", "")).startswith("gated")
    flags = {
        "dense": "num_experts" not in config and "num_local_experts" not in config,
        "project": config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")),
        "positions": config.get("position_biased_input", True),
        "types": config.get("type_vocab_size"),
        "c2p": "c2p" in positions,
        "p2c": "p2c" in positions,
        "c2p_own": own and "c2p" in positions,
        "p2c_own": own and "p2c" in positions,
        "gated": gated,
        "plain": not gated,
        "decoder": has_decoder,
        "gated decoder": gated and has_decoder,
        "plain decoder": not gated and has_decoder,
    }
    return frozenset(name for name, is_set in flags.items() if is_set)


def _expand(
    rows: Iterable[Mapping[str, str]],
    prefix: str,
    *,
    sizes: Mapping[str, int],
    flags: frozenset[str],
    config: Mapping[str, object],
) -> Iterator[tuple[str, Module]]:
    for row in rows:
        path, bias = row["path"], row["bias"]
        if row["condition"] and row["condition"] not in flags:
            continue
        has_bias = bias == "+" or any(config.get(key) for key in bias.split("|"))
        inputs, outputs = _evaluate(row["inputs"], sizes), _evaluate(row["outputs"], sizes)
        module = Module(inputs, outputs, bias=has_bias, is_embedding=bias == "embedding")
        path = path if row["kind"] else prefix + path
        count = re.search(r"\{([LM])\}", path)
        for index in range(sizes[count[1]] if count else 1):
            yield (path.replace(count[0], str(index)) if count else path), module


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    if expression == "*":
        return None
    terms = (re.fullmatch(r"(\d*)([A-Z]?)", term) for term in expression.split("+"))
    return sum(int(t[1] or 1) * sizes.get(t[2], 1) for t in terms if t)
