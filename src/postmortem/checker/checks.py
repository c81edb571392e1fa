"""Check an adapter: every finding, in one call, and the formats of its report."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from postmortem.checker import errors as limits
from postmortem.checker.adapter import (
    MAX_JSON,
    Adapter,
    Folder,
    HubRepository,
    Runs,
    Tensor,
    TensorStats,
    kind_of_path,
    open_source,
    read_adapter,
    scan,
)
from postmortem.checker.bases import BaseModel, describe, find_base, plain_name
from postmortem.checker.config import CONFIG_FILE, PREFIX, AdapterConfig
from postmortem.checker.errors import (
    FLOAT16_LIMIT,
    SEVERITIES,
    Entry,
    Finding,
    ModelError,
    Place,
    PostmortemError,
    UntrustedError,
    describe_overflow,
    finding,
    grouped,
    is_hub_id,
    parse_json,
    printable,
    update_bound,
)
from postmortem.checker.fit import Target, check_fit, find_targets, implied_parameters, scale_of
from postmortem.checker.identify import (
    find_warnings,
    fitting_bases,
    kind_of,
    known_keys,
)
from postmortem.checker.serving import (
    EFFECTS,
    ServedAdapter,
    Serving,
    as_matrix,
    check_serving,
    read_added_tokens,
)

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:[._]\d+)?)([bBmM])(?![A-Za-z0-9])")
_ROUNDED = re.compile(r"gptq|awq|(?<![a-z])int[348]|fp8|w\d+a\d+", re.IGNORECASE)
# bitsandbytes rounds while loading, and MLX's copies are made the same way: so QLoRA trains.
_ROUNDED_WHILE_LOADING = re.compile(r"bnb|nf4|(?<![a-z0-9])[2-8]-?bit", re.IGNORECASE)
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The ids that another finding explains.
_SYMPTOMS = {"saved-in-shards": ("empty-tensor",)}
_KEY = "a key of LoraConfig"
# What trainers note of themselves and of their optimisers: nothing that changes the adapter.
_OF_TRAINERS = re.compile(
    r"(unsloth|axolotl|swift|llama_?factory|trl|torchtune)_|lorap_|loraplus_|lora_dtype$|\w+_version$"
)
_EMPTY: tuple[object, ...] = (None, False, [], {}, "")
_FUSED = re.compile(r"qkv|c_attn|query_key_value|W_pack|in_proj|gate_up")
_VOCABULARY = re.compile(r"(^|\.)(lm_head|embed\w*|wte|word_embeddings|shared)$")
Pair = tuple[str, str]  # The keys of A and B.
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found.

    Verdict: broken with an error, suspect with a warning, else fits; unchecked where nothing was
    found and shapes were not compared, which `is_compared` tells whatever the verdict.
    """

    verdict: str
    findings: tuple[Finding, ...]
    base: str | None
    notes: tuple[str, ...]
    is_compared: bool


def check(
    adapter: Adapter,
    base: BaseModel | None,
    *,
    given_name: str | None = None,
    stats: Mapping[str, TensorStats] | None = None,
    stated_bytes: int | None = None,
    further: Sequence[Finding] = (),
    unknown: str = "",
) -> Report:
    """Check an adapter, against a base when one is known, and its bytes when they were scanned.

    `given_name` is how the user named the base; None when it was found through the adapter.
    `stated_bytes` is the size at which the adapter was published, when that is on record;
    `further` are findings that were made elsewhere; `unknown` says why there is no base.
    """
    findings = [*adapter.findings, *_check_tensors(adapter.tensors), *_check_keys(adapter)]
    findings += further
    config = adapter.config
    if config is not None:
        findings += _check_scale(config)
        findings += _check_names(adapter.name, config, base, given_name)
        findings += _check_bytes(config, adapter, stats or {})
        try:
            targets = find_targets(config, base) if base else None
            findings += check_fit(adapter, config, base, targets)
            findings += _check_size(adapter, config, targets, stated_bytes)
        except UntrustedError as error:
            findings.append(_bad_pattern(error))
    findings = _drop_symptoms(findings)
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    notes = _uncompared(adapter, base, unknown)
    worst = findings[0].severity if findings else "info"
    verdict = {"error": "broken", "warning": "suspect"}.get(worst, "unchecked" if notes else "fits")
    return Report(verdict, tuple(findings), base.name if base else None, notes, not notes)


def _drop_symptoms(findings: list[Finding]) -> list[Finding]:
    """Leave out what another finding explains: one cause, one finding."""
    explained = {s for f in findings for s in _SYMPTOMS.get(f.id, ())}
    return [f for f in findings if f.id not in explained]


def _uncompared(adapter: Adapter, base: BaseModel | None, unknown: str) -> tuple[str, ...]:
    """Say which tensors were compared with no base, and what would make it possible."""
    if base is None:
        why = unknown or "no known base to compare with"
        return (f"shapes were not checked: {why}",)
    unmodelled = adapter.config.unmodelled if adapter.config else ()
    if unmodelled:
        return (
            f"shapes were not checked: {', '.join(unmodelled)} changes them in ways that are not "
            "described here; load the adapter with PEFT and read its warnings",
        )
    paths = [path.removeprefix(PREFIX) for path in adapter.contents.lora]
    hidden = [path for path in paths if base.is_open(path) and not base.is_expert(path)]
    if not hidden:
        return ()
    return (
        f"shapes were not checked: {len(hidden)} of {len(paths)} modules lie in a part of "
        f"{base.model_type} that is not described here, such as {printable(hidden[0], 100)}; "
        "load the adapter with PEFT and read its warnings",
    )


def _bad_pattern(error: UntrustedError) -> Finding:
    where = "target_modules, exclude_modules, rank_pattern or alpha_pattern"
    return finding("config-invalid", evidence=where, expected="a usable regex", found=str(error))


def _check_tensors(tensors: Mapping[str, Tensor]) -> list[Finding]:
    empty = [(n, "elements", f"shape {t.shape}") for n, t in tensors.items() if not t.count]
    integers = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype[0] in "IU"]
    booleans = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype == "BOOL"]
    return [*grouped("empty-tensor", empty), *grouped("integer-dtype", integers + booleans)]


def _check_keys(adapter: Adapter) -> list[Finding]:
    unknown = {k: v for k, v in adapter.raw.items() if k not in known_keys()}
    idle = [k for k, v in unknown.items() if v in _EMPTY or _OF_TRAINERS.match(k)]
    used = [(k, _KEY, printable(repr(v), 60)) for k, v in unknown.items() if k not in idle]
    unused = [(k, _KEY, printable(repr(unknown[k]), 60)) for k in idle]
    remedy = "Nothing to mend: PEFT ignores it; releases 0.6 to 0.13 raise until it is removed."
    return [
        *grouped("config-unknown-key", used),
        *grouped("config-unknown-key", unused, "info", remedy=remedy),
    ]


def _check_scale(config: AdapterConfig) -> list[Finding]:
    low, high = limits.RSLORA_SCALE_LIMITS if config.use_rslora else limits.SCALE_LIMITS
    zeros, unusual = [], []
    named = {"lora_alpha": config.alpha, **config.alpha_pattern}
    for name, alpha in named.items():
        rank = config.rank_pattern.get(name, config.r)
        scale = scale_of(alpha, rank, use_rslora=config.use_rslora)
        found = f"alpha {alpha:g} on r {rank}, a scale of {scale:g}"
        if alpha == 0:
            zeros.append((name, "other than 0", found))
        elif not low <= scale <= high and alpha != limits.CONSTANT_ALPHA:
            unusual.append((name, f"{low:g} to {high:g}", found))
    findings = grouped("scale-zero", zeros, "" if len(zeros) == len(named) else "warning")
    findings += grouped("scale-unusual", unusual)
    if config.init.startswith(_REWRITING):
        expected = "an initialisation that leaves the base alone"
        findings += grouped("init-rewrites-base", [("init_lora_weights", expected, config.init)])
    return findings


def _check_bytes(
    config: AdapterConfig, adapter: Adapter, stats: Mapping[str, TensorStats]
) -> list[Finding]:
    broken = [(n, "finite values", "NaN or infinity") for n, s in stats.items() if not s.is_finite]
    scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
    pairs = {
        path: (parts[a], parts[b])
        for path, parts in adapter.contents.lora.items()
        for a, b in _PAIRS
        if parts.get(a) in stats and parts.get(b) in stats
    }
    large = [place for a, b in pairs.values() if (place := _overflow(a, b, stats, scale))]
    factors = {key for pair in pairs.values() for key in pair}
    large += [
        (key, f"at most {FLOAT16_LIMIT:g}", f"largest value {found.largest:.3g}")
        for key, found in stats.items()
        if key not in factors and found.is_finite and found.largest > FLOAT16_LIMIT
    ]
    unsaved = _check_slices(adapter, pairs, stats)
    return [
        *grouped("non-finite", broken),
        # A factor of which no row was saved looks untrained, and is of the same save.
        *(unsaved or _check_training(config, pairs, stats)),
        *grouped("overflow-risk", large),
    ]


def _check_training(
    config: AdapterConfig, pairs: Mapping[str, Pair], stats: Mapping[str, TensorStats]
) -> list[Finding]:
    zeros = {path: key for path, (a, b) in pairs.items() if (key := _zero(a, b, stats))}
    places = [(key, "trained values", "zeros") for key in zeros.values()]
    share = len(zeros) / max(len(pairs), 1)
    partial = "warning" if share >= limits.UNTRAINED_SHARE else "info"
    # A DoRA magnitude can be trained while B is still zero: the adapter is then not a no-op.
    severity = "" if share == 1 and not config.use_dora else partial
    named = _count_names(zeros, pairs) if 0 < share < 1 else ""
    title = f"Some modules are still at their initial value, {named}" if named else ""
    remedy = "Find why no step reached these modules, or leave them out of target_modules."
    return grouped("untrained", places, severity, title=title, remedy=remedy if named else "")


def _count_names(some: Iterable[str], every: Iterable[str]) -> str:
    """Name modules by the end of their paths, with how many of each there are."""
    ends, totals = (Counter(path.rpartition(".")[2] for path in paths) for paths in (some, every))
    counts = [f"{name} ({count} of {totals[name]})" for name, count in ends.most_common(6)]
    return printable(" and ".join(counts) + (" and others" if len(ends) > len(counts) else ""))


@dataclass(frozen=True, slots=True)
class _Slice:
    """The rows or columns of one factor that are exactly zero: `runs` of `size` lines."""

    key: str
    lines: str
    size: int
    runs: Runs

    @property
    def share(self) -> float:
        """The share of the lines that are zero."""
        return sum(end - start for start, end in self.runs) / self.size

    def is_partial(self) -> bool:
        """Tell whether a part is zero; a fused projection may have parts that were not trained."""
        is_fused = "lora_B" in self.key and _FUSED.search(self.key)
        low = limits.FUSED_SLICE if is_fused else 0
        return low < self.share < 1


def _check_slices(
    adapter: Adapter, pairs: Mapping[str, Pair], stats: Mapping[str, TensorStats]
) -> list[Finding]:
    """Find the pattern of a sharded save: most factors lack the same share of their lines."""
    judged = {path: pair for path, pair in pairs.items() if not _VOCABULARY.search(path)}
    slices = [_slices(adapter.tensors, pair, stats) for pair in judged.values()]
    untrained = sum(_zero(*pair, stats) is not None for pair in judged.values())
    for place in range(3):
        lost = [s[place] for s in slices if s[place].is_partial()]
        middle = median(s.share for s in lost) if lost else 0
        alike = [s for s in lost if abs(s.share - middle) <= limits.ALIKE_SLICES]
        if alike and 2 * len(alike) >= len(judged) - untrained:
            return [_slice_finding(alike[0], len(alike), len(judged))]
    return []


def _slices(
    tensors: Mapping[str, Tensor], pair: Pair, stats: Mapping[str, TensorStats]
) -> tuple[_Slice, ...]:
    """Return what is zero of B's outputs, of A's ranks and of A's inputs."""
    (a, b), (of_a, of_b) = pair, (stats[key] for key in pair)
    ranks, inputs = (*tensors[a].shape, 1, 1)[:2]
    # A rank that is zero in both factors is padding, and changes nothing.
    lost_ranks = () if of_b.zero_columns else of_a.zero_rows
    return (
        _Slice(b, "rows", tensors[b].shape[0], of_b.zero_rows),
        _Slice(a, "rows", ranks, lost_ranks),
        _Slice(a, "columns", inputs, of_a.zero_columns),
    )


def _slice_finding(first: _Slice, count: int, total: int) -> Finding:
    runs = [f"{start} to {end - 1}" for start, end in first.runs[:3]]
    lost = sum(end - start for start, end in first.runs)
    where = " and ".join(runs) + (" and others" if len(first.runs) > len(runs) else "")
    found = (
        f"{lost} of {first.size} exactly zero ({where}), the same share in {count} of {total} "
        "such tensors"
    )
    expected = f"{first.lines} that were trained"
    return finding("rows-not-saved", evidence=first.key, expected=expected, found=found)


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
    if _names_other_base(named, given, base):
        place = ("base_model_name_or_path", f"{named}, as the adapter says", given)
        return findings + grouped("base-name-mismatch", [place])
    return findings + _check_quantization(named, given, base)


def _check_quantization(named: str, given: str, base: BaseModel) -> list[Finding]:
    theirs, ours = _rounding(named), base.quantization or _rounding(given)
    where = "base_model_name_or_path"
    if theirs == "bitsandbytes" and not ours:
        found = f"{given}, which is not quantised, the usual way to use a QLoRA adapter"
        remedy = "Nothing to mend; where small differences matter, score the task on both bases."
        place = (where, named, found)
        return grouped("quantized-base-mismatch", [place], "info", remedy=remedy)
    if theirs and not ours:
        return grouped(
            "quantized-base-mismatch", [(where, named, f"{given}, which is not quantised")]
        )
    # On-the-fly bitsandbytes is how QLoRA trains: the adapter then names the plain base.
    if ours not in (None, "bitsandbytes") and not theirs and find_base(named):
        found = f"{given}, quantised with {ours}"
        return grouped("quantized-base-mismatch", [(where, named, found)])
    return []


def _rounding(name: str) -> str | None:
    """Read from a name how the weights that it stands for were rounded; None for not at all."""
    if match := _ROUNDED.search(name):
        return match[0].lower()
    return "bitsandbytes" if _ROUNDED_WHILE_LOADING.search(name) else None


def _names_other_base(named: str, given: str, base: BaseModel) -> bool:
    if plain_name(_last_part(named)) == plain_name(_last_part(given)):
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


MAX_LOG = 32_000_000  # Bytes of a log that are searched; the warning stands near its start.


@dataclass(frozen=True, slots=True)
class Inspection:
    """A report with the known bases that the adapter's shapes fit; `error` is why there is none."""

    adapter: str
    report: Report
    bases: tuple[str, ...]
    error: PostmortemError | None = None


def inspect_adapter(
    adapter: str,
    base: str | None = None,
    *,
    header_only: bool = False,
    stated_bytes: int | None = None,
    serving: Serving = Serving(),
) -> Inspection:
    """Check an adapter (folder or hub id) against a base (folder, config.json, hub id or name).

    Without a base, the one that the adapter names is used when it is a known one; a path that the
    adapter names is never opened. `serving` names runtimes whose rules are applied as well.
    Raises ModelError when something cannot be checked.
    """
    source = open_source(adapter)
    held = read_adapter(source)
    model, given = resolve_base(held, base)
    unknown = "" if model else _why_unknown(held, base)
    is_scanned = isinstance(source, Folder) and not header_only
    stats = scan(source, held.tensors) if isinstance(source, Folder) and is_scanned else None
    served = _check_serving(source, held, base=model, serving=serving)
    report = check(
        held,
        model,
        given_name=given,
        stats=stats,
        stated_bytes=stated_bytes,
        further=served,
        unknown=unknown,
    )
    notes = report.notes if is_scanned else (*report.notes, "tensor bytes were not read")
    if serving.runtimes and held.config is None:
        notes = (*notes, "what runtimes do with it was not checked: its configuration is unusable")
    return Inspection(held.name, replace(report, notes=notes), fitting_bases(held))


def _check_serving(
    source: Folder | HubRepository, held: Adapter, *, base: BaseModel | None, serving: Serving
) -> list[Finding]:
    if held.config is None or not serving.runtimes:
        return []
    tokens = read_added_tokens(source)
    return check_serving(ServedAdapter(held, held.config, base, serving, tokens))


def _why_unknown(adapter: Adapter, base: str | None) -> str:
    """Say why there is no base to compare with, and what would give one."""
    if base is not None:
        return (
            f"the architecture of {printable(base)}, or this class of it, is not described here; "
            "load the adapter with PEFT and read its warnings"
        )
    named = adapter.config.base_name if adapter.config else None
    remedy = "give --base a folder, a config.json or a hub id"
    if named is None:
        return f"no known base to compare with, as the adapter names none; {remedy}"
    return f"no known base to compare with: {printable(named)} is not in the table; {remedy}"


def inspect_all(
    adapters: Sequence[str],
    base: str | None,
    *,
    header_only: bool,
    stated_bytes: int | None,
    serving: Serving = Serving(),
) -> list[Inspection]:
    """Inspect adapters, each folder once; one that cannot be checked carries its error."""
    if not adapters:
        nothing = ModelError("check", expected="an adapter folder or hub id", found="none")
        return [_refuse("", nothing)]
    done: dict[str, Inspection] = {}
    for adapter in adapters:
        name = adapter
        try:
            name = open_source(adapter).name
            if name not in done:
                done[name] = inspect_adapter(
                    adapter,
                    base,
                    header_only=header_only,
                    stated_bytes=stated_bytes,
                    serving=serving,
                )
        except PostmortemError as error:
            done[name] = _refuse(name, error)
    return list(done.values())


def _refuse(adapter: str, error: PostmortemError) -> Inspection:
    report = Report("unchecked", (), None, (), is_compared=False)
    return Inspection(printable(adapter), report, (), error)


def resolve_base(adapter: Adapter, base: str | None) -> tuple[BaseModel | None, str | None]:
    """Describe the base that was given, or else named; also return its name if it was given."""
    kind = kind_of(adapter)
    if base is None:
        named = adapter.config.base_name if adapter.config else None
        known = find_base(named) if named else None
        if named is None or known is None:
            return None, None
        return describe(known.config, name=_label(named), kind=kind), None
    config, name = _read_base(base)
    known = find_base(base)
    label = _label(name) if known and config is known.config else name
    model = describe(config, name=label, kind=kind)
    if model is None and config.get("architectures"):
        # The task has no class in this architecture: judge by the class that the base names.
        model = describe(config, name=label, kind=None)
    return model, name


def _label(name: str) -> str:
    """Name a base and, where its name is an alias, the known base whose shapes stand for it."""
    known = find_base(name)
    is_alias = known is not None and _is_hub_name(name) and name.lower() != known.model_id.lower()
    return f"{name} (shapes of {known.model_id})" if known and is_alias else name


def _read_base(base: str) -> tuple[Mapping[str, object], str]:
    path = Path(base)
    if kind_of_path(path) == "folder":
        path = path / "config.json"
    if kind_of_path(path) == "file":
        # The user chose the base, so its links are followed; an adapter's are not.
        target = path.resolve()
        return _named(_parse(Folder(target.parent), target.name), path.absolute().parent.name)
    if path == Path(base) and (known := find_base(base)):
        return known.config, base
    if path == Path(base) and is_hub_id(base):
        return _parse(HubRepository(base), "config.json"), base
    expected = "a model folder, a config.json, a hub id or a known base"
    raise ModelError(printable(base), expected=expected, found="nothing of the kind")


def read_config_or_log(path: Path) -> tuple[Mapping[str, object] | None, str]:
    """Read an adapter configuration, or else the text of a log that holds PEFT's warning.

    Raises ModelError for a file that is neither.
    """
    path = path / CONFIG_FILE if kind_of_path(path) == "folder" else path
    if kind_of_path(path) != "file":
        expected = f"an {CONFIG_FILE} or a log"
        raise ModelError(printable(path), expected=expected, found=kind_of_path(path))
    source = Folder(path.parent)
    data = source.read(path.name, 0, MAX_LOG)
    try:
        content = parse_json(data)
    except UntrustedError:
        content = None
    if isinstance(content, dict) and known_keys() & content.keys():
        return content, ""
    log = data.decode("utf-8", errors="replace")
    if not find_warnings(log):
        expected = "an adapter configuration, or PEFT's warning about unexpected keyword arguments"
        raise ModelError(path, expected=expected, found="neither")
    return None, log


def _named(config: Mapping[str, object], folder: str) -> tuple[Mapping[str, object], str]:
    original = config.get("_name_or_path")
    return config, original if isinstance(original, str) and original else folder


def _parse(source: Folder | HubRepository, filename: str) -> Mapping[str, object]:
    size = source.size(filename)
    subject = f"{source.name}: {filename}"
    if size is None or size > MAX_JSON:
        found = "no such file" if size is None else f"{size:,} bytes"
        raise ModelError(
            subject, expected=f"a JSON file of at most {MAX_JSON:,} bytes", found=found
        )
    try:
        config = parse_json(source.read(filename, 0, MAX_JSON))
    except UntrustedError as error:
        raise ModelError(subject, expected="a JSON object", found=str(error)) from None
    if not isinstance(config, dict):
        raise ModelError(subject, expected="a JSON object", found=type(config).__name__)
    return config


def write(inspections: Sequence[Inspection], form: str, *, is_coloured: bool = False) -> str:
    """Write the reports of a call: text, json, markdown, sarif or junit.

    What could not be checked is part of the formats for machines alone.
    """
    if form == "sarif":
        return as_sarif(inspections)
    if form == "junit":
        return as_junit(inspections)
    if form == "json":
        return as_json(inspections)
    done = [inspection for inspection in inspections if inspection.error is None]
    if form == "markdown":
        return "\n".join(map(as_markdown, done))
    return "\n".join(as_text(inspection, is_coloured=is_coloured) for inspection in done)


MAX_NAME = 500  # Characters of a path that are printed.
_COLOURS = {
    "error": "31",
    "warning": "33",
    "info": "36",
    "broken": "31",
    "suspect": "33",
    "fits": "32",
    "unchecked": "36",
}


def _paint(text: str, kind: str, is_coloured: bool) -> str:
    return f"\x1b[1;{_COLOURS[kind]}m{text}\x1b[0m" if is_coloured else text


def as_json(inspections: Sequence[Inspection]) -> str:
    """Write the JSON contract: an object for one adapter, else a list, each of the same keys."""
    contents = [
        {
            "verdict": found.report.verdict,
            "findings": [asdict(f) for f in found.report.findings],
            "bases": list(found.bases),
            "adapter": found.adapter,
            "base": found.report.base,
            "notes": list(found.report.notes),
            "error": found.error and _describe_error(found.error),
        }
        for found in inspections
    ]
    content = contents[0] if len(contents) == 1 else contents
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # A byte of a path that no text encodes is a surrogate here: JSON has an escape for it.
    return text.encode("utf-8", "backslashreplace").decode()


def _describe_error(error: PostmortemError) -> dict[str, str]:
    parts = (error.subject, error.expected, error.found, error.remedy)
    names = ("subject", "expected", "found", "remedy")
    described = {name: printable(part, 400) for name, part in zip(names, parts, strict=True)}
    return {"message": printable(error, 800), **described}


def as_text(inspection: Inspection, *, is_coloured: bool = False) -> str:
    """Write the verdict first, then the findings by severity with evidence and remedy."""
    report = inspection.report
    against = f" on {printable(report.base, MAX_NAME)}" if report.base else ""
    verdict = _paint(report.verdict, report.verdict, is_coloured)
    lines = [f"{verdict}: {printable(inspection.adapter, MAX_NAME)}{against}"]
    for found in report.findings:
        label = _paint(f"{found.severity:<8}", found.severity, is_coloured)
        lines += ["", f"{label}{found.id}: {_title(found)}", f"        evidence  {found.evidence}"]
        lines += [f"        remedy    {found.remedy}"]
    closing = [f"note: {note}" for note in report.notes]
    if inspection.bases:
        closing.append(f"shapes fit: {', '.join(inspection.bases)}")
    return "\n".join([*lines, *([""] if closing else []), *closing])


def _title(found: Finding) -> str:
    return found.message.split(": ", 1)[0]


def as_markdown(inspection: Inspection) -> str:
    """Write a table for a pull request; text from the adapter cannot form markup."""
    report = inspection.report
    name = printable(inspection.adapter, MAX_NAME)
    lines = [f"**{report.verdict}**: {_escape(name)}", ""]
    if report.findings:
        lines += ["| severity | finding | evidence | remedy |", "|---|---|---|---|"]
        lines += [
            f"| {f.severity} | {f.id}: {_title(f)} | {_escape(f.evidence)} | {_escape(f.remedy)} |"
            for f in report.findings
        ]
    return "\n".join([*lines, "", *(f"*{note}*" for note in report.notes)]).rstrip()


def _escape(text: str) -> str:
    return "".join(f"&#{ord(c)};" if c in "|<>&`*_[]()!\\#@" else c for c in text)


_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


def as_sarif(inspections: Sequence[Inspection]) -> str:
    """Write SARIF 2.1.0 for code scanning; each finding stands at the adapter's configuration.

    What could not be checked becomes a notification of a run that did not succeed.
    """
    refused = [inspection.error for inspection in inspections if inspection.error is not None]
    results = [
        _sarif_result(inspection, f)
        for inspection in inspections
        for f in inspection.report.findings
    ]
    found = {result["ruleId"] for result in results}
    driver = {
        "name": "lora-postmortem",
        "rules": [_sarif_rule(entry) for entry in limits.catalogue().values() if entry.id in found],
    }
    notes = [{"level": "error", "message": {"text": printable(e, 500)}} for e in refused]
    invocation = {"executionSuccessful": not refused, "toolExecutionNotifications": notes}
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return json.dumps({"$schema": _SARIF, "version": "2.1.0", "runs": [run]}, indent=2)


def _sarif_rule(entry: Entry) -> dict[str, object]:
    return {
        "id": entry.id,
        "shortDescription": {"text": entry.title},
        "fullDescription": {"text": f"{entry.symptom} {entry.cause}"},
        "help": {"text": f"Settled by: {entry.settles} Remedy: {entry.remedy}"},
        "defaultConfiguration": {"level": _LEVELS[entry.severity]},
    }


def _sarif_result(inspection: Inspection, found: Finding) -> dict[str, object]:
    from urllib.parse import quote  # As late as the format is asked for.

    # A byte that no text encodes is a surrogate here: it is quoted as that byte.
    uri = quote(f"{inspection.adapter}/{CONFIG_FILE}".encode("utf-8", "surrogateescape"))
    place = {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}
    return {
        "ruleId": found.id,
        "level": _LEVELS[found.severity],
        "message": {"text": f"{_title(found)}. {_details(found)}"},
        "locations": [{"physicalLocation": place}],
    }


def as_junit(inspections: Sequence[Inspection]) -> str:
    """Write JUnit XML: a suite for each adapter, a case for each finding; errors are failures.

    Warnings pass and say so in their output; what could not be checked is a suite with an error.
    """
    from xml.etree import ElementTree  # As late as the format is asked for.

    root = ElementTree.Element("testsuites", name="postmortem check")
    for inspection in inspections:
        if inspection.error is None:
            _add_suite(root, inspection)
        else:
            suite = _suite(root, inspection.adapter, tests=1, errors=1)
            case = _case(suite, "checked")
            ElementTree.SubElement(case, "error", message=printable(inspection.error, 500))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _add_suite(root: "Element", inspection: Inspection) -> None:
    from xml.etree.ElementTree import SubElement

    findings = inspection.report.findings
    failures = sum(found.severity == "error" for found in findings)
    suite = _suite(root, inspection.adapter, tests=len(findings) or 1, failures=failures)
    if not findings:
        _case(suite, inspection.report.verdict)
    for found in findings:
        case = _case(suite, found.id)
        if found.severity == "error":
            SubElement(case, "failure", message=_title(found)).text = _details(found)
        else:
            SubElement(case, "system-out").text = f"{found.severity}: {_details(found)}"


def _suite(root: "Element", name: str, **counts: int) -> "Element":
    from xml.etree.ElementTree import SubElement

    numbers = {"failures": 0, "errors": 0, **counts}
    attributes = {
        "name": printable(name, MAX_NAME),
        **{kind: str(n) for kind, n in numbers.items()},
    }
    return SubElement(root, "testsuite", attributes)


def _case(suite: "Element", name: str) -> "Element":
    from xml.etree.ElementTree import SubElement

    return SubElement(suite, "testcase", name=name, classname=suite.attrib["name"])


def _details(found: Finding) -> str:
    return printable(f"{found.evidence}. {found.remedy}", 2000)


def explain(entry: Entry) -> str:
    """Write one catalogue entry."""
    rows = {
        "symptom": entry.symptom,
        "cause": entry.cause,
        "settled by": entry.settles,
        "remedy": entry.remedy,
        "PEFT": entry.peft,
        "threads": ", ".join(entry.threads) or "none on record",
    }
    body = "\n".join(f"  {name:<11} {text}" for name, text in rows.items())
    effect = entry.id.removeprefix("serving-")
    matrix = f"\n\n{as_matrix(effect)}" if effect in EFFECTS else ""
    return f"{entry.id} ({entry.severity}): {entry.title}\n{body}{matrix}"
