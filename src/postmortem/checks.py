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
from postmortem.catalogue import SEVERITIES, Finding, Place, finding, grouped
from postmortem.contents import Contents
from postmortem.fit import check_fit
from postmortem.precision import FLOAT16_LIMIT, describe_overflow, update_bound
from postmortem.targets import Target, find_targets, implied_parameters, scale_of
from postmortem.untrusted import UntrustedError, printable

_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:[._]\d+)?)([bBmM])(?![A-Za-z0-9])")
_QUANTIZED = re.compile(
    r"gptq|awq|bnb|(?<![a-z])int[348]|(?<![a-z0-9])[48]-?bit|fp8", re.IGNORECASE
)
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EMPTY: tuple[object, ...] = (None, False, [], {}, "")
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


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
            findings += check_fit(adapter, config, base, targets)
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


def _check_tensors(tensors: Mapping[str, Tensor]) -> list[Finding]:
    empty = [(n, "elements", f"shape {t.shape}") for n, t in tensors.items() if not t.count]
    integers = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype[0] in "IU"]
    booleans = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype == "BOOL"]
    return [*grouped("empty-tensor", empty), *grouped("integer-dtype", integers + booleans)]


def _check_keys(adapter: Adapter) -> list[Finding]:
    unknown = [(k, v) for k, v in adapter.raw.items() if k not in known_keys()]
    used = [
        (k, "a key of LoraConfig", printable(repr(v), 60)) for k, v in unknown if v not in _EMPTY
    ]
    unused = [(k, "a key of LoraConfig", printable(repr(v), 60)) for k, v in unknown if v in _EMPTY]
    return [
        *grouped("config-unknown-key", used),
        *grouped("config-unknown-key", unused, severity="info"),
    ]


def _check_scale(config: AdapterConfig) -> list[Finding]:
    scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
    low, high = limits.RSLORA_SCALE_LIMITS if config.use_rslora else limits.SCALE_LIMITS
    found = f"alpha {config.alpha:g} on r {config.r}, a scale of {scale:g}"
    named = {"lora_alpha": config.alpha, **config.alpha_pattern}
    zeros = [(name, "other than 0", found) for name, alpha in named.items() if alpha == 0]
    findings = grouped("scale-zero", zeros, "" if len(zeros) == len(named) else "warning")
    if config.alpha != 0 and not low <= scale <= high:
        findings += grouped("scale-unusual", [("lora_alpha", f"{low:g} to {high:g}", found)])
    if config.init.startswith(_REWRITING):
        expected = "an initialisation that leaves the base alone"
        findings += grouped("init-rewrites-base", [("init_lora_weights", expected, config.init)])
    return findings


def _check_bytes(
    config: AdapterConfig, contents: Contents, stats: Mapping[str, TensorStats]
) -> list[Finding]:
    broken = [(n, "finite values", "NaN or infinity") for n, s in stats.items() if not s.is_finite]
    scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
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
        *grouped("non-finite", broken),
        *grouped("untrained", zeros, severity),
        *grouped("overflow-risk", large),
    ]


def _zero(a: str, b: str, stats: Mapping[str, TensorStats]) -> str | None:
    return next((k for k in (b, a) if stats[k].is_finite and stats[k].largest == 0), None)


def _overflow(a: str, b: str, stats: Mapping[str, TensorStats], scale: float) -> Place | None:
    if not (stats[a].is_finite and stats[b].is_finite):
        return None
    bound = update_bound(scale, stats[a].norm, stats[b].norm)
    found = describe_overflow(max(stats[a].largest, stats[b].largest), bound)
    return (b, f"at most {FLOAT16_LIMIT:g}", found) if found else None


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
        findings += grouped("name-size-conflict", [place])
    if base is None or given is None or named is None or not _is_hub_name(named):
        return findings
    if conflict := _quantization_conflict(named, given, base):
        place = ("base_model_name_or_path", named, conflict)
        return findings + grouped("quantized-base-mismatch", [place])
    if _names_other_base(named, given, base):
        place = ("base_model_name_or_path", f"{named}, as the adapter says", given)
        findings += grouped("base-name-mismatch", [place])
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
    return grouped("size-conflict", places)


def _is_near(stated: int, parameters: int) -> bool:
    widths = (2 * parameters, 4 * parameters)
    return any(abs(stated - size) <= limits.SIZE_TOLERANCE * size for size in widths)
