"""Findings about an adapter, alone and against a base; one root cause gives one finding."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from postmortem import catalogue as limits
from postmortem.adapter import Adapter
from postmortem.adapter_config import AdapterConfig
from postmortem.adapter_weights import Tensor, TensorStats
from postmortem.archaeology import known_keys
from postmortem.architectures import BaseModel
from postmortem.bases import find_base
from postmortem.catalogue import SEVERITIES, Finding, finding
from postmortem.contents import Contents, layer_of, layer_zero, place
from postmortem.targets import Target, find_targets, is_under, saved_modules, scale_of
from postmortem.untrusted import UntrustedError

_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:[._]\d+)?)([bBmM])(?![A-Za-z0-9])")
_QUANTIZED = re.compile(
    r"gptq|awq|bnb|(?<![a-z])int[348]|(?<![a-z0-9])[48]-?bit|fp8", re.IGNORECASE
)
_HEADS = ("score", "classifier", "classification_head", "qa_outputs")
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EMPTY: tuple[object, ...] = (None, False, [], {}, "")
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
Place = tuple[str, str, str]  # Where, expected, found.


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. Verdict: broken with an error, suspect with a warning, else fits."""

    verdict: str
    findings: tuple[Finding, ...]
    base: str | None
    notes: tuple[str, ...]


def check(
    adapter: Adapter,
    base: BaseModel | None,
    *,
    given_name: str | None = None,
    stats: Mapping[str, TensorStats] | None = None,
    stated_bytes: int | None = None,
) -> Report:
    """Check an adapter, against a base when one is known, and its bytes when they were scanned.

    `given_name` is how the user named the base; None when it was found through the adapter.
    `stated_bytes` is the size at which the adapter was published, when that is on record.
    """
    findings = [*adapter.findings, *_check_tensors(adapter.tensors), *_check_keys(adapter)]
    config = adapter.config
    if config is not None:
        findings += _check_scale(config)
        findings += _check_names(adapter.name, config, base, given_name)
        findings += _check_bytes(config, adapter.contents, stats or {})
        try:
            targets = find_targets(config, base) if base else None
            findings += _check_contents(adapter, config, base, targets)
            findings += _check_size(adapter, config, targets, stated_bytes)
        except UntrustedError as error:
            findings.append(_bad_pattern(error))
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    worst = findings[0].severity if findings else "info"
    verdict = {"error": "broken", "warning": "suspect"}.get(worst, "fits")
    notes = () if base else ("no known base to compare with: shapes were not checked",)
    return Report(verdict, tuple(findings), base.name if base else None, notes)


def _bad_pattern(error: UntrustedError) -> Finding:
    where = "target_modules, exclude_modules, rank_pattern or alpha_pattern"
    return finding("config-invalid", evidence=where, expected="a usable regex", found=str(error))


def _grouped(finding_id: str, places: list[Place], severity: str = "") -> list[Finding]:
    """Make one finding of many places: the first one and the count."""
    return [
        finding(
            finding_id,
            evidence=where,
            expected=expected,
            found=found,
            count=len(places),
            severity=severity,
        )
        for where, expected, found in places[:1]
    ]


def _check_tensors(tensors: Mapping[str, Tensor]) -> list[Finding]:
    empty = [(n, "elements", f"shape {t.shape}") for n, t in tensors.items() if not t.count]
    integers = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype[0] in "IU"]
    booleans = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype == "BOOL"]
    return [*_grouped("empty-tensor", empty), *_grouped("integer-dtype", integers + booleans)]


def _check_keys(adapter: Adapter) -> list[Finding]:
    unknown = [(k, v) for k, v in adapter.raw.items() if k not in known_keys()]
    used = [(k, "a key of LoraConfig", f"{v!r:.60}") for k, v in unknown if v not in _EMPTY]
    unused = [(k, "a key of LoraConfig", f"{v!r:.60}") for k, v in unknown if v in _EMPTY]
    return [
        *_grouped("config-unknown-key", used),
        *_grouped("config-unknown-key", unused, severity="info"),
    ]


def _check_scale(config: AdapterConfig) -> list[Finding]:
    scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
    low, high = limits.RSLORA_SCALE_LIMITS if config.use_rslora else limits.SCALE_LIMITS
    found = f"alpha {config.alpha:g} on r {config.r}, a scale of {scale:g}"
    named = {"lora_alpha": config.alpha, **config.alpha_pattern}
    zeros = [(name, "other than 0", found) for name, alpha in named.items() if alpha == 0]
    findings = _grouped("scale-zero", zeros, "" if len(zeros) == len(named) else "warning")
    if config.alpha != 0 and not low <= scale <= high:
        findings += _grouped("scale-unusual", [("lora_alpha", f"{low:g} to {high:g}", found)])
    if config.init.startswith(_REWRITING):
        expected = "an initialisation that leaves the base alone"
        findings += _grouped("init-rewrites-base", [("init_lora_weights", expected, config.init)])
    return findings


def _check_bytes(
    config: AdapterConfig, contents: Contents, stats: Mapping[str, TensorStats]
) -> list[Finding]:
    broken = [(n, "finite values", "NaN or infinity") for n, s in stats.items() if not s.is_finite]
    scale = abs(scale_of(config.alpha, config.r, use_rslora=config.use_rslora))
    pairs = [
        (parts[a], parts[b])
        for parts in contents.lora.values()
        for a, b in _PAIRS
        if parts.get(a) in stats and parts.get(b) in stats
    ]
    zeros = [(key, "trained values", "zeros") for a, b in pairs if (key := _zero(a, b, stats))]
    large = [place for a, b in pairs if (place := _overflow(a, b, stats, scale))]
    share = len(zeros) / max(len(pairs), 1)
    partial = "warning" if share >= limits.UNTRAINED_SHARE else "info"
    # A DoRA magnitude can be trained while B is still zero: the adapter is then not a no-op.
    severity = "" if share == 1 and not config.use_dora else partial
    return [
        *_grouped("non-finite", broken),
        *_grouped("untrained", zeros, severity),
        *_grouped("overflow-risk", large),
    ]


def _zero(a: str, b: str, stats: Mapping[str, TensorStats]) -> str | None:
    return next((k for k in (b, a) if stats[k].is_finite and stats[k].largest == 0), None)


def _overflow(a: str, b: str, stats: Mapping[str, TensorStats], scale: float) -> Place | None:
    if not (stats[a].is_finite and stats[b].is_finite):
        return None
    bound = scale * stats[a].norm * stats[b].norm
    largest = max(stats[a].largest, stats[b].largest)
    if max(bound, largest) <= limits.FLOAT16_LIMIT:
        return None
    found = f"largest value {largest:.3g}, update norm {bound:.3g}"
    return b, f"at most {limits.FLOAT16_LIMIT:g}", found


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.\-]*/[\w.\-]+", name) is not None


def _size_in(name: str | None) -> float | None:
    """Read the model size that a name states, in billions of parameters."""
    match = _SIZE.search(_last_part(name or ""))
    if match is None or float(match[1].replace("_", ".")) == 0:
        return None
    return float(match[1].replace("_", ".")) * (1.0 if match[2] in "bB" else 1e-3)


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _check_names(
    adapter_name: str, config: AdapterConfig, base: BaseModel | None, given: str | None
) -> list[Finding]:
    named, findings = config.base_name, []
    own, theirs = _size_in(adapter_name), _size_in(named) or _size_in(given)
    if own and theirs and max(own, theirs) > limits.SIZE_RATIO * min(own, theirs):
        place = (_last_part(adapter_name), f"{theirs:g}B as in {named or given}", f"{own:g}B")
        findings += _grouped("name-size-conflict", [place])
    if base is None or given is None or named is None or not _is_hub_name(named):
        return findings
    if conflict := _quantization_conflict(named, given, base):
        place = ("base_model_name_or_path", named, conflict)
        return findings + _grouped("quantized-base-mismatch", [place])
    if _names_other_base(named, given, base):
        place = ("base_model_name_or_path", f"{named}, as the adapter says", given)
        findings += _grouped("base-name-mismatch", [place])
    return findings


def _quantization_conflict(named: str, given: str, base: BaseModel) -> str | None:
    if _QUANTIZED.search(named) and not base.quantization and not _QUANTIZED.search(given):
        return f"{given}, which is not quantised"
    # On-the-fly bitsandbytes is how QLoRA trains: the adapter then names the plain base.
    stored = base.quantization not in (None, "bitsandbytes")
    if stored and not _QUANTIZED.search(named) and find_base(named):
        return f"{given}, quantised with {base.quantization}"
    return None


def _names_other_base(named: str, given: str, base: BaseModel) -> bool:
    if _last_part(named).lower() == _last_part(given).lower():
        return False
    known = find_base(named)
    if known is not None and base.layers != known.config["num_hidden_layers"]:
        return True
    # The name of a folder says nothing unless it is that of a published base.
    return _is_hub_name(given) or (known is not None and find_base(given) is not None)


def _check_contents(
    adapter: Adapter,
    config: AdapterConfig,
    base: BaseModel | None,
    targets: Mapping[str, Target] | None,
) -> list[Finding]:
    if not adapter.tensors:
        reasons = ("corrupt-weights", "missing-weights", "unsafe-pickle")
        is_explained = any(f.id in reasons for f in adapter.findings)
        nothing = [("adapter_model.safetensors", "LoRA tensors", "no tensor at all")]
        return [] if is_explained else _grouped("missing-tensors", nothing)
    findings, placed = place(adapter.contents, base)
    if any(f.id == "key-prefix" and "keys as PEFT writes them" in f.message for f in findings):
        return findings
    findings += _check_flags(config, placed)
    findings += _check_saved(config, placed, base)
    findings += _check_plain(adapter, config, placed, base)
    if base is None or targets is None or config.unmodelled:
        return findings + _check_halves(placed)
    is_shifted = any(f.id == "key-prefix" and f.severity != "info" for f in findings)
    return findings + _check_modules(adapter.tensors, config, placed, base, targets, is_shifted)


def _check_halves(contents: Contents) -> list[Finding]:
    halves = [
        (path, f"{a} and {b}", ", ".join(parts))
        for path, parts in contents.lora.items()
        for a, b in _PAIRS
        if (a in parts) != (b in parts)
    ]
    return _grouped("missing-tensors", halves)


def _check_flags(config: AdapterConfig, contents: Contents) -> list[Finding]:
    parts = [(key, part) for held in contents.lora.values() for part, key in held.items()]
    dora = [(k, "use_dora true", "false") for k, p in parts if p == "lora_magnitude_vector"]
    bias = [(key, "lora_bias true", "false") for key, part in parts if part == "lora_B.bias"]
    tokens = [(key, "trainable_token_indices", "null") for key in contents.tokens.values()]
    return [
        *_grouped("dora-flag-lost", [] if config.use_dora else dora),
        *_grouped("unexpected-tensors", [] if config.lora_bias else bias),
        *_grouped("unexpected-tensors", tokens if config.trainable_tokens is None else []),
    ]


def _check_saved(
    config: AdapterConfig, contents: Contents, base: BaseModel | None
) -> list[Finding]:
    if config.trainable_tokens is not None and not contents.tokens:
        expected = "embed_tokens.token_adapter.trainable_tokens_delta"
        lost: list[Place] = [("trainable_token_indices", expected, "no such tensor")]
    else:
        lost = []
    missing = [
        (name, f"the weights of {name}", "no such tensor")
        for name in dict.fromkeys(saved_modules(config))
        if not any(is_under(path, name) or _holds(path, name) for path in contents.plain)
        if _must_be_saved(name, config, contents, base)
    ]
    # Without a base, a listed module may be one that this base does not have.
    is_certain = base is not None or not {n for n, *_ in missing} <= set(config.modules_to_save)
    severity = "" if is_certain else "warning"
    return [
        *_grouped("missing-tensors", lost),
        *_grouped("modules-to-save-missing", missing, severity),
    ]


def _holds(parameter: str, name: str) -> bool:
    # PEFT wraps every module whose path ends with the name, dot or no dot.
    return parameter.rpartition(".")[0].endswith(name)


def _must_be_saved(
    name: str, config: AdapterConfig, contents: Contents, base: BaseModel | None
) -> bool:
    if base is not None:
        return any(is_under(path, name) for path in base.modules)
    if name not in _HEADS:
        return True
    return not any(is_under(path, head) for path in contents.plain for head in _HEADS)


def _check_plain(
    adapter: Adapter, config: AdapterConfig, contents: Contents, base: BaseModel | None
) -> list[Finding]:
    saved = saved_modules(config)
    heads: list[Place] = []
    weights: list[Place] = []
    usual: list[Place] = []
    sizes: dict[str, list[Place]] = {"vocab-mismatch": [], "shape-mismatch": []}
    tied = ("lm_head", "embed_tokens") if adapter.raw.get("ensure_weight_tying") else ()
    for path, key in contents.plain.items():
        module = path.rpartition(".")[0].removesuffix(".base_layer")
        if found := _plain_mismatch(path, module, adapter.tensors[key], base):
            sizes[found[0]].append((key, found[1], found[2]))
        elif any(is_under(path, name) or _holds(path, name) for name in (*saved, *tied)) or (
            "bias" in path and config.bias != "none"
        ):
            continue
        elif any(is_under(path, head) for head in _HEADS):
            heads.append((key, "a task_type or modules_to_save for it", str(config.task_type)))
        else:
            # PEFT itself saves the base layer of an embedding or output that LoRA targets.
            is_usual = path.endswith(".base_layer.weight") and module in contents.lora
            (usual if is_usual else weights).append((key, "adapter tensors only", "a base weight"))
    return [
        *_grouped("head-dropped", heads),
        *_grouped("base-weights-in-adapter", weights),
        *_grouped("base-weights-in-adapter", usual, severity="info"),
        *(f for finding_id, places in sizes.items() for f in _grouped(finding_id, places)),
    ]


def _plain_mismatch(
    path: str, module: str, tensor: Tensor, base: BaseModel | None
) -> tuple[str, str, str] | None:
    known = base.modules.get(module) if base else None
    if base is None or known is None or not tensor.count:
        return None
    is_turned = known.is_embedding or (base.transposed and module not in base.heads)
    ends = (known.inputs, known.outputs) if is_turned else (known.outputs, known.inputs)
    expected = (known.outputs,) if path.endswith(".bias") else ends
    if _fits(tensor.shape, expected):
        return None
    finding_id = "vocab-mismatch" if _is_vocabulary(module, base) else "shape-mismatch"
    return finding_id, _shape(expected), _shape(tensor.shape)


def _is_vocabulary(module: str, base: BaseModel) -> bool:
    sized = base.modules[module]
    is_output = module in base.heads and sized.outputs is not None and base.kind != "seq_cls"
    return sized.is_embedding or (is_output and base.kind in ("causal", "seq2seq", "mlm"))


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(e in (None, f) for f, e in pairs)


def _shape(sizes: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if s is None else str(s) for s in sizes) + ")"


def _check_modules(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    contents: Contents,
    base: BaseModel,
    targets: Mapping[str, Target],
    is_shifted: bool,
) -> list[Finding]:
    held = {p: parts for p, parts in contents.lora.items() if not base.is_open(p)}
    strange = [p for p in held if layer_zero(p) not in base.modules and p not in base.modules]
    wants_modules = bool(config.target_modules) or config.target_modules is None
    if not targets and not base.open_paths and wants_modules and not config.target_parameters:
        wanted = config.target_modules or f"PEFT's default for {base.model_type}"
        place = ("target_modules", f"modules of {base.name}", str(wanted))
        return _grouped("target-not-in-base", [place])
    mismatches = _shape_places(tensors, config, held, targets, base)
    findings = [
        f for finding_id, places in mismatches.items() for f in _grouped(finding_id, places)
    ]
    deep = [p for p in held if p not in base.modules and p not in strange]
    depth = [(p, f"layers 0 to {base.layers - 1}", f"layer {layer_of(p)}") for p in deep]
    unused = [(p, "a module that target_modules names", "not targeted") for p in held]
    unused = [place for place in unused if place[0] in base.modules and place[0] not in targets]
    absent = [(p, f"a module of {base.name}", "no such module") for p in strange]
    findings += _grouped("target-not-in-base", absent)
    findings += _grouped("unexpected-tensors", unused)
    # Another model's sizes explain another depth and vocabulary: one cause, one finding.
    if 2 * len(mismatches["shape-mismatch"]) >= max(len(held), 1):
        return findings
    findings += _grouped("layer-out-of-range", depth)
    return findings + ([] if is_shifted or strange else _missing(config, held, targets))


def _shape_places(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    held: Mapping[str, Mapping[str, str]],
    targets: Mapping[str, Target],
    base: BaseModel,
) -> dict[str, list[Place]]:
    places: dict[str, list[Place]] = {
        "shape-mismatch": [],
        "rank-mismatch": [],
        "vocab-mismatch": [],
    }
    for path, parts in held.items():
        shapes = targets[path].shapes(config) if path in targets else {}
        for part, key in parts.items():
            found, expected = tensors[key].shape, shapes.get(part)
            if expected is None or not tensors[key].count or _fits(found, expected):
                continue
            kind = _mismatch_kind(part, found, expected, _is_vocabulary(path, base))
            places[kind].append((key, _shape(expected), _shape(found)))
    return places


def _mismatch_kind(
    part: str, found: tuple[int, ...], expected: tuple[int | None, ...], is_vocabulary: bool
) -> str:
    rank_axis = 0 if part.endswith("A") else 1
    if len(found) == len(expected) == 2 and _fits(
        found[1 - rank_axis :][:1], expected[1 - rank_axis :][:1]
    ):
        return "rank-mismatch"
    return "vocab-mismatch" if is_vocabulary else "shape-mismatch"


def _missing(
    config: AdapterConfig,
    held: Mapping[str, Mapping[str, str]],
    targets: Mapping[str, Target],
) -> list[Finding]:
    halves = [
        (path, f"{part} of shape {_shape(shape)}", "no such tensor")
        for path, target in targets.items()
        if path in held
        for part, shape in target.shapes(config).items()
        if part not in held[path]
    ]
    kinds = {layer_zero(path) for path in held}
    lost = [path for path in targets if path not in held]
    # A kind of module that no layer holds was listed and never trained: PEFT leaves it at zero.
    untrained = [(p, "lora_A and lora_B", "no tensors") for p in lost if layer_zero(p) not in kinds]
    partial = [(p, "lora_A and lora_B", "no tensors") for p in lost if layer_zero(p) in kinds]
    if halves or partial or not kinds:
        return _grouped("missing-tensors", halves + partial + untrained)
    return _grouped("missing-tensors", untrained, severity="warning")


def implied_parameters(config: AdapterConfig, targets: Mapping[str, Target]) -> int:
    """Count the LoRA parameters that a configuration implies on a base."""
    return sum(target.parameters(config) for target in targets.values())


def _check_size(
    adapter: Adapter,
    config: AdapterConfig,
    targets: Mapping[str, Target] | None,
    stated_bytes: int | None,
) -> list[Finding]:
    pickle = adapter.pickle_bytes
    if not targets or config.unmodelled or (pickle is None and stated_bytes is None):
        return []
    implied = implied_parameters(config, targets)
    expected = f"{2 * implied / 1e6:,.1f} MB in 16 bits or {4 * implied / 1e6:,.1f} MB in 32"
    wrong = []
    # A pickle cannot be read, but one smaller than its smallest content is not whole.
    if pickle is not None and pickle < 2 * implied * (1 - limits.SIZE_TOLERANCE):
        wrong.append(pickle)
    if stated_bytes is not None and not (config.modules_to_save or _is_near(stated_bytes, implied)):
        wrong.append(stated_bytes)
    places = [("r and target_modules", expected, f"{size / 1e6:,.4g} MB") for size in wrong]
    return _grouped("size-conflict", places)


def _is_near(stated: int, parameters: int) -> bool:
    widths = (2 * parameters, 4 * parameters)
    return any(abs(stated - size) <= limits.SIZE_TOLERANCE * size for size in widths)
