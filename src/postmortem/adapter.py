"""What an adapter claims (adapter_config.json) and holds (the safetensors header and bytes).

The header reader is our own: the library reads a file only from a local path, stops at the first
fault without naming the tensor, and accepts headers of 100 MB; this one names what is wrong,
reads over range requests, and stops at 8 MB.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from postmortem.catalogue import Finding, finding
from postmortem.errors import ModelError
from postmortem.sources import Folder, Source
from postmortem.untrusted import UntrustedError, parse_json, printable

if TYPE_CHECKING:
    import numpy as np

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = (
    *("adapter_config.json", "adapter_model.safetensors"),
    "adapter_model.bin",
)
MAX_JSON = 8_000_000  # Bytes. A header of 10,000 tensors is under 2 MB; a config is a few kB.
MAX_DIMENSIONS = 8
CHUNK = 4_000_000  # Bytes scanned at a time: memory stays flat whatever the tensor's size.
DTYPE_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64},
    **{"I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8},
    "BOOL": 8,
}
PEFT_TYPES = frozenset(
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADALORA ADAMSS BOFT BONE BEFT "
    "ADAPTION_PROMPT IA3 LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA "
    "HRA VBLORA UNILORA CPT MISS RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA "
    "GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT".split()
)
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the header; `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA configuration that PEFT would accept, with PEFT's defaults filled in."""

    r: int
    alpha: float
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    target_parameters: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    trainable_tokens: Mapping[str, int] | int | None
    bias: str
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    init: str
    task_type: str | None
    class_name: str | None
    base_name: str | None
    unmodelled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as its files describe it; what could not be read is a finding, not a guess."""

    name: str
    raw: Mapping[str, object]
    config: AdapterConfig | None
    tensors: Mapping[str, Tensor]
    weight_bytes: int | None
    findings: tuple[Finding, ...]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list_of(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(test(item) for item in value)


def _is_map_to(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(test(v) for v in value.values())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _any_of(*tests: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: any(test(value) for test in tests)


def _is_initialiser(value: object) -> bool:
    names = "gaussian|eva|olora|pissa|pissa_niter_\\d+|corda|loftq|orthogonal|mica|lora_ga"
    return isinstance(value, bool) or (_is_text(value) and bool(re.fullmatch(names, str(value))))


_TASKS = "SEQ_CLS SEQ_2_SEQ_LM CAUSAL_LM TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION".split()
_texts, _indices = _is_list_of(_is_text), _is_list_of(lambda v: _is_integer(v) and cast(int, v) >= 0)
_FLAG: tuple[str, Callable[[object], bool]] = ("true or false", lambda v: isinstance(v, bool))
_NAMES = ("a list of names or one regex", _any_of(_is_text, _texts))
# key -> (what PEFT accepts, test). Null is tested only for the keys of _NOT_NULL.
_RULES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a whole number of at least 1", lambda v: _is_integer(v) and cast(int, v) >= 1),
    "lora_alpha": ("a finite number", _is_number),
    "lora_dropout": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= cast(float, v) <= 1),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "target_parameters": ("a list of names", _texts),
    "modules_to_save": ("a list of names", _texts),
    "layers_pattern": _NAMES,
    "layers_to_transform": (
        "a layer index or a list of them",
        _any_of(lambda v: _indices([v]), _indices),
    ),
    "rank_pattern": (
        "names with whole-number ranks",
        _is_map_to(lambda v: _is_integer(v) and cast(int, v) >= 1),
    ),
    "alpha_pattern": ("names with finite numbers", _is_map_to(_is_number)),
    "trainable_token_indices": ("token indices", _any_of(_indices, _is_map_to(_indices))),
    "bias": ("none, all or lora_only", lambda v: v in ("none", "all", "lora_only")),
    "init_lora_weights": ("true, false or the name of an initialisation", _is_initialiser),
    "task_type": (f"one of {', '.join(_TASKS)}", lambda v: v in _TASKS),
    "base_model_name_or_path": ("a name or a path", _is_text),
    "auto_mapping": ("an object", lambda v: isinstance(v, dict)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), _FLAG),
    **dict.fromkeys(("inference_mode", "use_qalora", "ensure_weight_tying"), _FLAG),
}
_NOT_NULL = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias"})
# Options that change which tensors an adapter holds in ways that this checker does not model.
_UNMODELLED = (
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("layer_replication", "megatron_config"),
)


def check_config(raw: Mapping[str, object]) -> list[Finding]:
    """Apply PEFT's own rules to a configuration; the findings are config-invalid errors."""
    problems = [
        finding("config-invalid", evidence=key, expected=expected, found=f"{raw[key]!r}")
        for key, (expected, accepts) in _RULES.items()
        if key in raw and (raw[key] is not None or key in _NOT_NULL)
        if not accepts(raw[key])
    ]
    if "peft_type" not in raw:
        problems.append(finding("config-invalid", evidence="peft_type", expected='"LORA"', found="no such key"))
    elif raw["peft_type"] != "LORA" and raw["peft_type"] not in PEFT_TYPES:
        problems.append(finding("config-invalid", evidence="peft_type", expected='"LORA"', found=f"{raw['peft_type']!r}"))
    return problems + _contradictions(raw)


def _contradictions(raw: Mapping[str, object]) -> list[Finding]:
    pattern, layers = isinstance(raw.get("target_modules"), str), raw.get("layers_to_transform")
    cases = (
        (pattern and layers is not None, "layers_to_transform with target_modules as one string"),
        (pattern and bool(raw.get("layers_pattern")), "layers_pattern with target_modules as one string"),
        (bool(raw.get("layers_pattern")) and layers is None, "layers_pattern without layers_to_transform"),
        (bool(raw.get("lora_bias")) and bool(raw.get("use_dora")), "lora_bias together with use_dora"),
    )
    return [
        finding("config-invalid", evidence=case, expected="options that PEFT accepts together", found="both set")
        for applies, case in cases
        if applies
    ]


def _names(value: object) -> tuple[str, ...] | str | None:
    return tuple(value) if isinstance(value, list) else cast("str | None", value)


def build_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """Build the typed configuration of a raw one that `check_config` accepted."""
    layers, tokens = raw.get("layers_to_transform"), raw.get("trainable_token_indices")
    patterns = raw.get("layers_pattern") or ()
    return AdapterConfig(
        r=raw.get("r", 8),
        alpha=float(raw.get("lora_alpha", 8)),
        target_modules=_names(raw.get("target_modules")),
        exclude_modules=_names(raw.get("exclude_modules")),
        target_parameters=tuple(raw.get("target_parameters") or ()),
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
        layers_pattern=(patterns,) if isinstance(patterns, str) else tuple(patterns),
        rank_pattern=raw.get("rank_pattern", {}),
        alpha_pattern=raw.get("alpha_pattern", {}),
        modules_to_save=tuple(raw.get("modules_to_save") or ()),
        trainable_tokens=(
            {name: len(indices) for name, indices in tokens.items()}
            if isinstance(tokens, dict)
            else len(tokens)
            if tokens is not None
            else None
        ),
        bias=raw.get("bias", "none"),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        init=str(raw.get("init_lora_weights", True)),
        task_type=raw.get("task_type"),
        class_name=(raw.get("auto_mapping") or {}).get("base_model_class"),
        base_name=raw.get("base_model_name_or_path") or None,
        unmodelled=tuple(key for key in _UNMODELLED if raw.get(key)),
    )


def read_adapter(source: Source) -> Adapter:
    """Read the configuration and the header; nothing is executed, unpickled or fully loaded.

    Raises ModelError when the adapter is of another method than LoRA or cannot be reached.
    """
    raw, findings = _read_config(source)
    method = raw.get("peft_type")
    if method in PEFT_TYPES:
        raise ModelError(source.name, expected="a LoRA adapter", found=f"peft_type {method}")
    config = build_config(raw) if not findings else None
    tensors, weight_findings = _read_weights(source)
    return Adapter(
        name=source.name,
        raw=raw,
        config=config,
        tensors=tensors,
        weight_bytes=source.size(WEIGHTS_FILE),
        findings=(*findings, *weight_findings),
    )


def _read_config(source: Source) -> tuple[Mapping[str, object], list[Finding]]:
    size = source.size(CONFIG_FILE)
    if size is None and not source.is_local:
        raise ModelError(source.name, expected=CONFIG_FILE, found="no such file, or no access to it")
    if size is None:
        return {}, [finding("config-invalid", evidence=CONFIG_FILE, expected="a file", found="none")]
    if size > MAX_JSON:
        expected = f"at most {MAX_JSON:,} bytes"
        return {}, [finding("config-invalid", evidence=CONFIG_FILE, expected=expected, found=f"{size:,}")]
    try:
        raw = parse_json(source.read(CONFIG_FILE, 0, MAX_JSON))
    except UntrustedError as error:
        return {}, [finding("config-invalid", evidence=CONFIG_FILE, expected="a JSON object", found=str(error))]
    if not isinstance(raw, dict):
        found = f"a JSON {type(raw).__name__}"
        return {}, [finding("config-invalid", evidence=CONFIG_FILE, expected="a JSON object", found=found)]
    return raw, check_config(raw)


def _corrupt(found: str, *, expected: str, remedy: str = "") -> list[Finding]:
    return [finding("corrupt-weights", evidence=WEIGHTS_FILE, expected=expected, found=found, remedy=remedy)]


def _read_weights(source: Source) -> tuple[Mapping[str, Tensor], list[Finding]]:
    size = source.size(WEIGHTS_FILE)
    if size is None:
        return {}, _absent_weights(source)
    head = source.read(WEIGHTS_FILE, 0, 8)
    if head.startswith(b"version "):
        remedy = "Fetch the file itself: git lfs pull."
        return {}, _corrupt("a Git LFS pointer", expected="the weights", remedy=remedy)
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")):
        return {}, [finding("unsafe-pickle", evidence=WEIGHTS_FILE, expected="safetensors", found="a pickle under this name")]
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        found = f"{size:,} bytes" + (f", a header of {length:,}" if len(head) == 8 else "")
        return {}, _corrupt(found, expected="a whole safetensors file")
    if length > MAX_JSON:
        return {}, _corrupt(f"a header of {length:,} bytes", expected=f"at most {MAX_JSON:,}")
    try:
        header = parse_json(source.read(WEIGHTS_FILE, 8, length))
        return parse_header(header, data_start=8 + length, file_size=size), []
    except UntrustedError as error:
        return {}, _corrupt(str(error), expected="a safetensors header")


def _absent_weights(source: Source) -> list[Finding]:
    if source.size(PICKLE_FILE) is not None:
        return [finding("unsafe-pickle", evidence=PICKLE_FILE, expected=WEIGHTS_FILE, found=f"{source.size(PICKLE_FILE):,} bytes of pickle")]
    beside = source.names() if isinstance(source, Folder) else []
    weights = [n for n in beside if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    found = f"no such file; beside it: {', '.join(weights[:3])}" if weights else "no such file"
    return [finding("missing-weights", evidence=WEIGHTS_FILE, expected="the weights", found=found)]


def parse_header(header: object, *, data_start: int, file_size: int) -> dict[str, Tensor]:
    """Turn a parsed header into tensors that tile the data exactly; UntrustedError otherwise."""
    if not isinstance(header, dict):
        raise UntrustedError("the header is no JSON object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = {name: _parse_entry(name, entry, data_start) for name, entry in entries.items()}
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            kind = "overlaps the one before" if tensor.start < position else "leaves a hole before it"
            raise UntrustedError(f"tensor {printable(name)} {kind}")
        position = tensor.end
    if position != file_size:
        kind = "truncated" if position > file_size else "too long"
        raise UntrustedError(f"the file is {kind}: {file_size:,} bytes, its header describes {position:,}")
    return tensors


def _parse_entry(name: str, entry: object, data_start: int) -> Tensor:
    problem = UntrustedError(f"tensor {printable(name)} has no usable dtype, shape and offsets")
    if not isinstance(entry, dict):
        raise problem
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UntrustedError(f"tensor {printable(name)} has dtype {dtype!r:.40}")
    if not _indices(shape) or not _indices(offsets):
        raise problem
    shape, offsets = cast("list[int]", shape), cast("list[int]", offsets)
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise problem
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise UntrustedError(f"tensor {printable(name)}: {end - start:,} bytes for shape {shape}")
    return Tensor(dtype, tuple(shape), data_start + start, data_start + end)


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What the bytes of a tensor hold: `largest` is the greatest magnitude, `norm` is Frobenius."""

    is_finite: bool
    largest: float
    norm: float


def scan(source: Folder, tensors: Mapping[str, Tensor]) -> dict[str, TensorStats]:
    """Scan tensor bytes in chunks, floating-point dtypes only; memory stays near the chunk size."""
    path = source.resolve(WEIGHTS_FILE)
    if path is None:
        return {}
    stats = {}
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            if tensor.dtype in _DECODERS and tensor.count:
                file.seek(tensor.start)
                stats[name] = _scan_one(file.read, tensor)
    return stats


def _scan_one(read: Callable[[int], bytes], tensor: Tensor) -> TensorStats:
    import numpy as np

    finite, largest, squares, left = True, 0.0, 0.0, tensor.end - tensor.start
    while left > 0 and (data := read(min(CHUNK, left))):
        left -= len(data)
        values = _DECODERS[tensor.dtype](data)
        with np.errstate(all="ignore"):
            total = float(np.dot(values, values))
        if not math.isfinite(total):
            # Either a value is not finite, or squares of finite ones overflowed 32 bits.
            finite = finite and bool(np.isfinite(values).all())
            total = float(np.square(values, dtype=np.float64).sum()) if finite else 0.0
        if finite:
            largest = max(largest, float(values.max()), -float(values.min()))
        squares += total
    return TensorStats(finite, largest, math.sqrt(squares))


def _decode_bf16(data: bytes) -> "np.ndarray[Any, Any]":
    import numpy as np

    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def _decode_f8(exponent_bits: int, data: bytes) -> "np.ndarray[Any, Any]":
    import numpy as np

    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & (2**mantissa_bits - 1)
    # A zero exponent marks a subnormal: no implied leading one.
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    table = fraction * 2.0 ** (np.maximum(exponent, 1) - bias) * np.where(codes < 128, 1, -1)
    # E4M3 keeps one NaN code and no infinity; E5M2 reserves its whole last exponent.
    table[(codes & 127) == 127 if exponent_bits == 4 else exponent == 31] = np.nan
    return table.astype("<f4")[np.frombuffer(data, "u1")]


def _decode_plain(dtype: str) -> Callable[[bytes], "np.ndarray[Any, Any]"]:
    def decode(data: bytes) -> "np.ndarray[Any, Any]":
        import numpy as np

        return np.frombuffer(data, dtype).astype(max(dtype, "<f4"), copy=False)

    return decode


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "BF16": _decode_bf16,
    "F16": _decode_plain("<f2"),
    "F32": _decode_plain("<f4"),
    "F64": _decode_plain("<f8"),
    "F8_E4M3": lambda data: _decode_f8(4, data),
    "F8_E5M2": lambda data: _decode_f8(5, data),
}
