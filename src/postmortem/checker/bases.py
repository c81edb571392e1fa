"""Bases: those that are known by name, and the modules and sizes that a config declares."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# Copies under an architecture of another kind: their projections are split, or GLM's are fused.
_CONVERTED = re.compile(r"unsloth/phi-[34]|(thudm|zai-org)/glm-4-9b(-chat)?(-1m)?$", re.IGNORECASE)
_DIMENSIONS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size"),
)


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
    config: dict[str, object] = {name: int(row[name]) for name in _DIMENSIONS if row[name]}
    config |= {
        "model_type": row["model_type"],
        "tie_word_embeddings": row["tie_word_embeddings"] == "true",
        **json.loads(row["more"] or "{}"),
    }
    verified = row["verified"] == "yes"
    aliases = tuple(row["aliases"].split())
    return KnownBase(row["model_id"], config, verified, row["source"], row["notes"], aliases)


@cache
def known_bases() -> tuple[KnownBase, ...]:
    """Return every row of bases.csv; dimensions are in units (features, layers, heads, tokens).

    `more` holds what else config.json says, as JSON; its layer_types are one period of them.
    """
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


# The keys of a config whose layers are not all alike.
MIXING = frozenset({"layer_types", "first_k_dense_replace", "interleave_moe_layer_step"})
# Where config.json notes the width of a shared expert, and that of the input of each layer.
_SHARED = "shared_expert_intermediate_size shared_intermediate_size"
_EACH = "hidden_size_per_layer_input"
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
    """The experts of a mixture: how many, the width of the model and that within an expert.

    `paths` are those of the modules whose parameters hold them fused. Where these are stored as
    (experts, in, out) and the class does not say so, PEFT takes in for out: `is_exchanged`.
    """

    count: int
    width: int
    inner: int
    paths: tuple[str, ...]
    is_exchanged: bool

    def shape(self, name: str) -> tuple[int, int] | None:
        """Return (in, out) of a projection, fused or of one expert; None for another name."""
        if name in ("down_proj", "w2"):
            return self.inner, self.width
        if name in ("gate_proj", "up_proj", "w1", "w3"):
            return self.width, self.inner
        return (self.width, 2 * self.inner) if name == "gate_up_proj" else None

    def factors(self, name: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B that PEFT makes for a fused parameter at a rank."""
        inputs, outputs = self.shape(name) or (0, 0)
        if self.is_exchanged:
            inputs, outputs = outputs, inputs
        return (rank * self.count, inputs), (outputs, rank * self.count)


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
        if self.open_paths is None or path in self.modules:
            return False
        return self.open_paths.search(path) is not None


@dataclass(frozen=True, slots=True)
class _Family:
    """What the rows of a family do not say; `kinds` are the kinds of class that it has."""

    prefix: str
    kinds: str = "bare causal seq_cls token_cls"
    head_prefix: str = ""  # Of classes with a classification head, where it differs.
    transposed: bool = False
    width: str = "intermediate_size"  # The key of the feed-forward width.
    widens: bool = False  # Without that key the width is four times the hidden size.
    tower: str = "model.language_model."  # Of the text model beside a vision tower,
    tower_head: str = ""  # and what stands before its output layer.
    exchanges_experts: bool = False


@dataclass(frozen=True, slots=True)
class _Type:
    family: str
    targets: str = ""  # PEFT's own default when target_modules is null; empty: PEFT raises.
    defaults: Mapping[str, object] | None = None  # For keys that config.json may leave out.


_ENCODER_KINDS = "bare seq_cls token_cls qa mlm"
_FAMILIES = {
    "llama": _Family("model."),
    "llama4": _Family(
        "model.",
        "bare causal",
        tower="language_model.model.",
        tower_head="language_model.",
        exchanges_experts=True,
    ),
    "glm": _Family("model."),
    "glm_moe": _Family("model."),
    "mla": _Family("model."),
    "qwen3_5": _Family("model."),
    "qwen3_next": _Family("model."),
    "gemma4": _Family("model.", "bare causal"),
    "granite_moe": _Family("model.", "bare causal"),
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
_LINEAR_THEN_FULL = ("linear_attention",) * 3 + ("full_attention",)
_QWEN3_5 = {
    "head_dim": 256,
    "layer_types": _LINEAR_THEN_FULL,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_GEMMA4 = {
    "head_dim": 256,
    "global_head_dim": 512,
    "layer_types": ("sliding_attention",) * 5 + ("full_attention",),
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
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
    "llama4_text": _Type("llama4", "", {"head_dim": 128}),
    "llama4": _Type("llama4", _QV, {"head_dim": 128}),
    "gemma4_text": _Type("gemma4", "", _GEMMA4),
    "qwen3_next": _Type("qwen3_next", "", _QWEN3_5),
    "qwen3_5_text": _Type("qwen3_5", "", _QWEN3_5),
    "qwen3_5_moe_text": _Type("qwen3_5", "", _QWEN3_5),
    "ministral": _Type("llama"),
    "ministral3": _Type("llama", "", {"head_dim": 128}),
    "gpt_oss": _Type("llama", "", {"attention_bias": True, "head_dim": 64}),
    "glm": _Type("glm", "", {"attention_bias": True, "head_dim": 128}),
    "glm4": _Type("glm", "", {"attention_bias": True, "head_dim": 128}),
    "glm4_moe": _Type("glm_moe"),
    "seed_oss": _Type("glm_moe", "", {"attention_bias": True, "head_dim": 128}),
    "deepseek_v2": _Type("mla"),
    "deepseek_v3": _Type("mla"),
    "kimi_k2": _Type("mla"),
    "glm4_moe_lite": _Type("mla"),
    "granite": _Type("llama"),
    "granitemoe": _Type("granite_moe"),
    "granitemoehybrid": _Type("granite_moe", "", {"layer_types": ("mamba",)}),
    "smollm3": _Type("llama"),
    "stablelm": _Type("llama", _QV),
    "olmo": _Type("llama"),
    "olmo2": _Type("llama"),
    "olmo3": _Type("llama"),
    "olmoe": _Type("llama"),
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
    *("gemma", "gemma2", "gemma3_text", "gemma4_text", "smollm3", "gpt2", "opt", "falcon", "bloom"),
    *("bert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "t5"),
)
# The text tower of these sits under language_model; everything visual stays undescribed.
_VISION_TYPES = {
    "gemma3": "gemma3_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "llama4": "llama4_text",
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
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
    r"(^|\.)(visual|vision\w*|image\w*|audio\w*|embed_(vision|audio)|resampler"
    r"|m(ulti_)?m(odal)?_(projector|connector))(\.|$)"
)
_EXPERT_PATHS = re.compile(r"\.(mlp|block_sparse_moe|feed_forward|router|experts)(\.|$)")
_ANY_OPEN = re.compile(f"{_VISION_PATHS.pattern}|{_EXPERT_PATHS.pattern}")

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
    given = {k: v for k, v in text.items() if v is not None}
    full = {**(entry.defaults or {}), **given, **_read_full_attention(given)}
    sizes, flags = _read_sizes(full, name, family), _read_flags(full, kind)
    rows = _rows(entry.family, kind)
    prefixes = _prefix(family, kind, is_vision), family.tower_head if is_vision else ""
    layers = _read_layers(full, flags, sizes["L"])
    found = dict(_expand(rows, prefixes, sizes=sizes, flags=(flags, layers), config=full))
    experts = tuple(path for path, module in found.items() if module is None)
    return BaseModel(
        name=name,
        model_type=outer_type,
        kind=kind,
        modules={path: module for path, module in found.items() if module is not None},
        layers=sizes["L"],
        default_targets=tuple(entry.targets.split()),
        heads=tuple(prefixes[1] + row["path"] for row in rows if row["kind"]),
        open_paths=_open_paths(is_vision or is_flat, flags),
        transposed=family.transposed,
        declared_kind=_declared_kind(config),
        quantization=_quantization(config),
        ties_weights=_is_tied(config, full),
        experts=Experts(sizes["N"], sizes["W"], sizes["I"], experts, family.exchanges_experts)
        if experts
        else None,
    )


def _read_full_attention(config: Mapping[str, object]) -> dict[str, object]:
    """Read what transformers 5 writes of the layers of full attention, under the older names."""
    by_layer = config.get("per_layer_config")
    first = next(iter(by_layer.values()), None) if isinstance(by_layer, Mapping) else None
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    own = first if isinstance(first, Mapping) else {}
    return {name: own[key] for key, name in names.items() if key in own}


def _open_paths(is_vision: bool, flags: frozenset[str]) -> re.Pattern[str] | None:
    if is_vision:
        return _ANY_OPEN if "experts" in flags else _VISION_PATHS
    return _EXPERT_PATHS if "experts" in flags else None


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
        return "language_model." if kind == "bare" else family.tower
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
        # Where every layer has experts, some configs have no width beside theirs.
        "F": read(f"{family.width} moe_intermediate_size", 4 * hidden if family.widens else None),
        "V": read("vocab_size"),
        "E": read("word_embed_proj_dim embedding_size", hidden),
        "P": read("max_position_embeddings n_positions", 0),
        "T": read("type_vocab_size", 0),
        "R": read("relative_attention_num_buckets", 32),
        **_read_widths(config, read, heads=heads, shared=shared, layers=layers),
    }


def _read_widths(
    config: Mapping[str, object],
    read: Callable[[str, int], int],
    *,
    heads: int,
    shared: int,
    layers: int,
) -> dict[str, int]:
    """Read the sizes of experts, latent and linear attention, and of layers unlike their others."""
    nope, rope, value = (read(f"{k}_head_dim", 0) for k in ("qk_nope", "qk_rope", "v"))
    inner, wide, each = (read(k, 0) for k in ("moe_intermediate_size", "global_head_dim", _EACH))
    linear, state = read("linear_num_value_heads", 0), read("mamba_d_state", 0)
    hidden, width = read("hidden_size n_embd n_embed d_model", 0), read("intermediate_size", 0)
    mamba = read("mamba_expand", 2) * hidden
    # Where values are keys, layers of full attention have heads of their own number.
    apart = read("num_global_key_value_heads", shared) if config.get("attention_k_eq_v") else shared
    return {
        "N": read("num_experts num_local_experts n_routed_experts", 0),
        "W": hidden,
        "I": inner or width,
        "S": read(_SHARED, 0) or read("n_shared_experts", 0) * inner,
        "Fd": read("intermediate_size_mlp", 0),
        "Mq": heads * (nope + rope),
        "Mk": heads * (nope + value),
        "Mv": heads * value,
        "Mr": rope,
        "Rq": read("q_lora_rank", 0),
        "Rk": read("kv_lora_rank", 0),
        "Lk": read("linear_num_key_heads", 0) * read("linear_key_head_dim", 0),
        "Lv": linear * read("linear_value_head_dim", 0),
        "Lh": linear,
        "Qg": heads * wide,
        "Kg": wide * apart,
        "D": each,
        "Ld": each * layers,
        "Vd": read("vocab_size_per_layer_input", 0),
        "Y": mamba,
        "Yg": read("mamba_n_groups", 1) * state,
        "Yh": read("mamba_n_heads", 0),
    }


def _fused_width(config: Mapping[str, object], hidden: int, dim: int, heads: int) -> int:
    if config.get("new_decoder_architecture"):
        return heads * dim
    return hidden + 2 * dim if config.get("multi_query") else 3 * hidden


def _read_flags(config: Mapping[str, object], kind: str) -> frozenset[str]:
    attention = config.get("pos_att_type") if config.get("relative_attention") else None
    positions = attention if isinstance(attention, str | list) else ""
    own = not config.get("share_att_key")
    gated = str(config.get("feed_forward_proj", "")).startswith("gated")
    counts = (config.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    flags = {
        "experts": any(counts) and config.get("enable_moe_block", True),
        "shared": config.get("n_shared_experts") or config.get("shared_intermediate_size"),
        "shared_expert": config.get("shared_expert_intermediate_size"),
        "split_query": config.get("q_lora_rank"),
        "whole_query": not config.get("q_lora_rank"),
        "own_values": not config.get("attention_k_eq_v"),
        "per_layer": config.get(_EACH),
        "project": config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")),
        "positions": config.get("position_biased_input", True),
        "types": config.get("type_vocab_size"),
        "c2p": "c2p" in positions,
        "p2c": "p2c" in positions,
        "c2p_own": own and "c2p" in positions,
        "p2c_own": own and "p2c" in positions,
        "gated": gated,
        "plain": not gated,
        "decoder": kind not in ("encoder", "token_cls"),
    }
    return frozenset(name for name, is_set in flags.items() if is_set)


def _read_layers(
    config: Mapping[str, object], flags: frozenset[str], count: int
) -> list[frozenset[str]]:
    """Return the flags of each layer: its attention, and what follows it."""
    types = config.get("layer_types")
    types = types if isinstance(types, list | tuple) and types else ["full_attention"]
    first, step = _start_of_experts(config)
    dense = config.get("mlp_only_layers")
    dense = dense if isinstance(dense, list) else []
    last_own = count - _count(config.get("num_kv_shared_layers"), 0)
    found = []
    for index in range(count):
        kind = str(types[index % len(types)]).removesuffix("_attention")
        is_mixed = index >= first and (index + 1) % step == 0 and index not in dense
        is_wide = index >= last_own and config.get("use_double_wide_mlp")
        found.append(
            flags
            | {kind, "attention" if kind not in ("mamba", "linear") else "recurrent"}
            | {"sparse" if "experts" in flags and is_mixed else "dense"}
            | ({"own_keys"} if index < last_own else set())
            | {"wide" if is_wide else "narrow"}
        )
    return found


def _start_of_experts(config: Mapping[str, object]) -> tuple[int, int]:
    step = config.get("interleave_moe_layer_step") or config.get("decoder_sparse_step")
    return _count(config.get("first_k_dense_replace"), 0), _count(step, 1) or 1


def _count(value: object, default: int) -> int:
    return value if isinstance(value, int) else default


def _expand(
    rows: Iterable[Mapping[str, str]],
    prefixes: tuple[str, str],
    *,
    sizes: Mapping[str, int],
    flags: tuple[frozenset[str], Sequence[frozenset[str]]],
    config: Mapping[str, object],
) -> Iterator[tuple[str, Module | None]]:
    """Write out the rows whose conditions hold; a module of None holds experts."""
    for row in rows:
        bias, wanted = row["bias"], set(row["condition"].split())
        has_bias = bias == "+" or any(config.get(key) for key in bias.split("|"))
        inputs, outputs = _evaluate(row["inputs"], sizes), _evaluate(row["outputs"], sizes)
        module = Module(inputs, outputs, bias=has_bias, is_embedding=bias == "embedding")
        path = prefixes[bool(row["kind"])] + row["path"]
        for name in _names(path, wanted, flags=flags, sizes=sizes):
            yield name, None if bias == "experts" else module


def _names(
    path: str,
    wanted: set[str],
    *,
    flags: tuple[frozenset[str], Sequence[frozenset[str]]],
    sizes: Mapping[str, int],
) -> Iterator[str]:
    everywhere, layers = flags
    before, has_layer, after = path.partition("{L}")
    if has_layer:
        yield from (f"{before}{i}{after}" for i, held in enumerate(layers) if wanted <= held)
    elif wanted <= everywhere:
        before, has_layer, after = path.partition("{M}")
        count = sizes["M"] if has_layer else 1
        yield from (f"{before}{i}{after}" if has_layer else path for i in range(count))


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    if expression == "*":
        return None
    terms = (re.fullmatch(r"(\d*)([A-Za-z]*)", term) for term in expression.split("+"))
    return sum(int(t[1] or 1) * sizes.get(t[2], 1) for t in terms if t)
