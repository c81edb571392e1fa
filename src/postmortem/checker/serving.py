"""What serving runtimes do with an adapter that works in PEFT: refuse, drop or rescale it."""

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from postmortem.checker.adapter import Adapter, Source
from postmortem.checker.bases import BaseModel
from postmortem.checker.config import CONFIG_FILE, PREFIX, AdapterConfig, layer_of
from postmortem.checker.errors import (
    Finding,
    ModelError,
    UntrustedError,
    catalogue,
    parse_json,
    printable,
)

EFFECTS = ("refuses", "drops", "rescales")
ALL = "all"
TOKENS_FILE = "added_tokens.json"
MAX_TOKENS = 1_000_000  # Bytes of that file; those that trainers write have a few hundred.
_TOWER = re.compile(r"visual|vision_|audio_|multi_modal_projector")
_LAYERS = re.compile(r"(.*?)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_PATH_LIKE = ("/", ".", "~")


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of serving.csv: what a runtime does with adapters that have a trait.

    `condition` is a name of `CONDITIONS`, perhaps with an argument behind a colon. `bases` are
    model types to which the rule is limited; with a minus, to which it does not apply. `verified`
    is "run" where the runtime's own code did it to an adapter, "yes" where its source says so, and
    "no" where the effect was inferred from the source.
    """

    runtime: str
    versions: str
    trait: str
    condition: str
    bases: str
    effect: str
    happens: str
    remedy: str
    source: str
    verified: str

    @property
    def is_past(self) -> bool:
        """Whether newer versions do otherwise."""
        return self.versions.startswith("up to")

    @property
    def is_inferred(self) -> bool:
        """Whether the source does not say it outright."""
        return self.verified == "no"


@dataclass(frozen=True, slots=True)
class Serving:
    """Where an adapter is to be served, and how the server is started; by default as it comes.

    `runtimes` are names or `all`; `tensor_parallel` is the number of devices that share a layer.
    """

    runtimes: tuple[str, ...] = ()
    max_lora_rank: int | None = None
    target_modules: tuple[str, ...] = ()
    tensor_parallel: int = 1
    tower_lora: bool = False

    def __post_init__(self) -> None:
        """Refuse a runtime that no rule is known for, with ModelError."""
        choose_runtimes(self.runtimes)


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter with its usable configuration, its base if known, and where it is to be served.

    `added_tokens` is the highest id in added_tokens.json, -1 without one.
    """

    adapter: Adapter
    config: AdapterConfig
    base: BaseModel | None
    serving: Serving
    added_tokens: int = -1


@cache
def rules() -> tuple[Rule, ...]:
    """Return the rows of serving.csv."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return tuple(Rule(**row) for row in csv.DictReader(file))


def runtimes() -> tuple[str, ...]:
    """Return the runtimes that rules are known for."""
    return tuple(dict.fromkeys(rule.runtime for rule in rules()))


def versions_read() -> tuple[str, ...]:
    """Return each runtime with the version or commit whose source the rules were read in."""
    current = (rule for rule in rules() if not rule.is_past)
    return tuple(dict.fromkeys(f"{rule.runtime} {rule.versions}" for rule in current))


def choose_runtimes(names: Sequence[str]) -> tuple[str, ...]:
    """Spell out `all`; raises ModelError for a runtime that no rule is known for."""
    for name in names:
        if name not in (ALL, *runtimes()):
            expected = f"one of {', '.join(runtimes())}, {ALL}"
            raise ModelError("--for", expected=expected, found=printable(name, 40))
    return runtimes() if ALL in names else tuple(dict.fromkeys(names))


def check_serving(subject: ServedAdapter) -> list[Finding]:
    """Return what the runtimes asked for do with the adapter; `all` asks for none in particular.

    A refusal is loud, so it is an error only of a runtime that was named.
    """
    asked = subject.serving.runtimes
    chosen = choose_runtimes(asked)
    return [
        _finding(rule, subject, places, is_named=rule.runtime in asked)
        for rule in rules()
        if rule.runtime in chosen and (places := find_places(rule, subject))
    ]


def find_places(rule: Rule, subject: ServedAdapter) -> list[str]:
    """Return the keys or tensors by which an adapter meets a rule; none where it does not."""
    if not _is_for(rule.bases.split(), subject.base):
        return []
    name, _, argument = rule.condition.partition(": ")
    return CONDITIONS[name](subject, argument)


def _is_for(bases: Sequence[str], base: BaseModel | None) -> bool:
    named = base.model_type if base else ""
    excluded = [name.removeprefix("-") for name in bases if name.startswith("-")]
    return named not in excluded if excluded else not bases or named in bases


def _finding(
    rule: Rule, subject: ServedAdapter, places: Sequence[str], *, is_named: bool
) -> Finding:
    entry = catalogue()[f"serving-{rule.effect}"]
    is_loud = rule.effect == "refuses" and not is_named
    mark = " (read in the source, not run)" if rule.is_inferred else ""
    happens = f"{rule.runtime} {rule.versions} {rule.happens}{mark}"
    times = f" ({len(places)} in all)" if len(places) > 1 else ""
    folded = f"{subject.config.alpha * math.sqrt(subject.config.r):.10g}"
    return Finding(
        id=entry.id,
        severity="info" if is_loud or rule.is_past else entry.severity,
        message=f"{entry.title}: {happens}",
        evidence=f"{printable(places[0], 200)}{times}: {happens}",
        remedy=rule.remedy.replace("{folded}", folded),
    )


def read_added_tokens(source: Source) -> int:
    """Return the highest token id in the adapter's added_tokens.json, -1 without a usable one."""
    size = source.size(TOKENS_FILE)
    if size is None or size > MAX_TOKENS:
        return -1
    try:
        tokens = parse_json(source.read(TOKENS_FILE, 0, MAX_TOKENS))
    except UntrustedError:
        return -1
    ids = tokens.values() if isinstance(tokens, dict) else ()
    return max((number for number in ids if type(number) is int), default=-1)


Condition = Callable[[ServedAdapter, str], list[str]]


def _lacks(subject: ServedAdapter, keys: str) -> list[str]:
    return [f"no {key}" for key in keys.split() if key not in subject.adapter.raw]


def _sets(subject: ServedAdapter, keys: str) -> list[str]:
    raw = subject.adapter.raw
    return [f"{key}: {printable(repr(raw[key]), 60)}" for key in keys.split() if raw.get(key)]


def _is_among(subject: ServedAdapter, names: str) -> list[str]:
    init = subject.config.init
    return [f"init_lora_weights: {init}"] if init.startswith(tuple(names.split())) else []


def _is_outside(subject: ServedAdapter, names: str) -> list[str]:
    init = subject.adapter.raw.get("init_lora_weights")
    is_other = isinstance(init, str) and init not in names.split()
    return [f"init_lora_weights: {init}"] if is_other else []


def _has_bias(subject: ServedAdapter, _: str) -> list[str]:
    return [f"bias: {subject.config.bias}"] if subject.config.bias != "none" else []


def _saves_outside(subject: ServedAdapter, names: str) -> list[str]:
    saved = subject.config.modules_to_save
    return [f"modules_to_save: {name}" for name in saved if name not in names.split()]


def _keys_like(subject: ServedAdapter, pattern: str) -> list[str]:
    return [key for key in subject.adapter.tensors if re.search(pattern, key)]


def _keys_unlike(subject: ServedAdapter, pattern: str) -> list[str]:
    return [key for key in subject.adapter.tensors if not re.search(pattern, key)]


def _tower_keys(subject: ServedAdapter, _: str) -> list[str]:
    return [] if subject.serving.tower_lora else _keys_like(subject, _TOWER.pattern)


def _highest_rank(config: AdapterConfig) -> int:
    return max(config.r, *config.rank_pattern.values(), 0)


def _over_limit(subject: ServedAdapter, bounds: str) -> list[str]:
    default, highest = map(int, bounds.split())
    limit, rank = subject.serving.max_lora_rank or default, _highest_rank(subject.config)
    return [f"rank {rank}, the server's limit {limit}"] if limit < rank <= highest else []


def _over(subject: ServedAdapter, bound: str) -> list[str]:
    rank = _highest_rank(subject.config)
    return [f"rank {rank}"] if rank > int(bound) else []


def _ranks(subject: ServedAdapter) -> dict[str, int]:
    """Rows of lora_A by module path: what the file has for a rank.

    Fused experts have one pair for all, of as many ranks as there are experts: left out.
    """
    tensors, lora = subject.adapter.tensors, subject.adapter.contents.lora
    shapes = {
        path: tensors[parts["lora_A"]].shape
        for path, parts in lora.items()
        if "lora_A" in parts and not path.removesuffix(".base_layer").endswith(".experts")
    }
    return {path: shape[0] for path, shape in shapes.items() if shape}


def _other_ranks(subject: ServedAdapter, allowed: frozenset[int]) -> list[str]:
    found = _ranks(subject).items()
    return [f"{path}: rank {rank}" for path, rank in found if rank not in allowed]


def _ranks_unlike_r(subject: ServedAdapter, _: str) -> list[str]:
    return _other_ranks(subject, frozenset({subject.config.r}))


def _ranks_unlike_config(subject: ServedAdapter, _: str) -> list[str]:
    config = subject.config
    return _other_ranks(subject, frozenset({config.r, *config.rank_pattern.values()}))


def _uneven(subject: ServedAdapter, group: Callable[[str], str]) -> list[str]:
    """The groups of modules in which the file has more than one rank."""
    found: dict[str, set[int]] = {}
    for path, rank in _ranks(subject).items():
        found.setdefault(group(path), set()).add(rank)
    return [f"{name}: ranks {sorted(r)[:4]}" for name, r in found.items() if name and len(r) > 1]


def _ranks_differ(subject: ServedAdapter, _: str) -> list[str]:
    return _uneven(subject, _leaf)


def _expert_ranks_differ(subject: ServedAdapter, _: str) -> list[str]:
    return _uneven(
        subject, lambda path: path.partition(".experts.")[0] if ".experts." in path else ""
    )


def _projection_ranks_differ(subject: ServedAdapter, _: str) -> list[str]:
    return _uneven(
        subject, lambda path: _EXPERT.sub(".experts.", path) if _EXPERT.search(path) else ""
    )


def _experts_in_part(subject: ServedAdapter, _: str) -> list[str]:
    """The layers with LoRA on some, not all, of the three projections of each expert."""
    experts = subject.base.experts if subject.base else None
    if experts is None:
        return []
    paths = (path for path in subject.adapter.contents.lora if _EXPERT.search(path))
    held = Counter(path.partition(".experts.")[0] for path in paths)
    whole = 3 * experts.count
    return [f"{name}.experts: {n} of {whole}" for name, n in held.items() if n < whole]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _target_is_regex(subject: ServedAdapter, _: str) -> list[str]:
    wanted = subject.config.target_modules
    is_regex = isinstance(wanted, str) and wanted not in ("all", "all-linear")
    return [f"target_modules: {wanted!r}"] if is_regex else []


def _target_is_null(subject: ServedAdapter, _: str) -> list[str]:
    return ["target_modules: null"] if subject.config.target_modules is None else []


def _leaves_outside(subject: ServedAdapter, names: str) -> list[str]:
    known = names.split()
    return [path for path in subject.adapter.contents.lora if _leaf(path) not in known]


def _untargeted(subject: ServedAdapter, names: str) -> list[str]:
    wanted = subject.config.target_modules
    left = [n for n in names.split() if isinstance(wanted, str) or n not in (wanted or ())]
    return [key for key in subject.adapter.tensors if any(f".{name}." in key for name in left)]


def _layer_lacks(subject: ServedAdapter, names: str) -> list[str]:
    needed, _, needing = names.partition(" for ")
    lora = subject.adapter.contents.lora
    held = [path for path in lora if _leaf(path) in needing.split()]
    return [path for path in held if f"{path.rpartition('.')[0]}.{needed}" not in lora]


def _layers_beyond(subject: ServedAdapter, _: str) -> list[str]:
    base = subject.base
    if base is None:
        return []
    paths = (path.removeprefix(PREFIX) for path in subject.adapter.contents.lora)
    described = (path for path in paths if not base.is_open(path))
    return [path for path in described if (layer_of(path) or 0) >= base.layers]


def _paths_outside(subject: ServedAdapter, _: str) -> list[str]:
    """Paths that a dense decoder with `model.layers` lacks; other bases are not judged."""
    base = subject.base
    if (
        base is None
        or base.open_paths
        or not any(p.endswith("layers.0.mlp.down_proj") for p in base.modules)
    ):
        return []
    paths = ((path, path.replace(PREFIX, "")) for path in subject.adapter.contents.lora)
    return [path for path, inside in paths if not _is_served(inside, base.layers)]


def _is_served(path: str, layers: int) -> bool:
    if path.startswith("model.layers."):
        return (layer_of(path) or 0) < layers
    return path in ("model.embed_tokens", "lm_head")


def _layers_missing(subject: ServedAdapter, prefix: str) -> list[str]:
    found: dict[str, set[int]] = {}
    for path in subject.adapter.contents.lora:
        if (match := _LAYERS.match(path)) and match[1] == prefix:
            found.setdefault(_leaf(path), set()).add(int(match[2][:9]))
    deepest = max((max(layers) + 1 for layers in found.values()), default=0)
    count = subject.base.layers if subject.base else deepest
    return [f"{leaf}: {len(n)} of {count} layers" for leaf, n in found.items() if len(n) < count]


def _head_on_causal(subject: ServedAdapter, _: str) -> list[str]:
    is_causal = subject.base is not None and subject.base.declared_kind == "causal"
    return _keys_like(subject, r"\.score\.(modules_to_save\.[^.]+\.)?weight$") if is_causal else []


def _smaller(subject: ServedAdapter, _: str) -> list[str]:
    modules = subject.base.modules if subject.base else {}
    found = []
    for path, parts in subject.adapter.contents.lora.items():
        if module := modules.get(path.removeprefix(PREFIX)):
            ends = (("lora_A", -1, module.inputs), ("lora_B", 0, module.outputs))
            found += [
                parts[part]
                for part, axis, size in ends
                if _is_below(subject, parts.get(part), axis=axis, size=size)
            ]
    return found


def _is_below(subject: ServedAdapter, key: str | None, *, axis: int, size: int | None) -> bool:
    shape = subject.adapter.tensors[key].shape if key else ()
    return bool(size and shape) and shape[axis] < (size or 0)


def _adds_tokens(subject: ServedAdapter, _: str) -> list[str]:
    modules = subject.base.modules if subject.base else {}
    sizes = [m.inputs for p, m in modules.items() if m.is_embedding and p.endswith("embed_tokens")]
    is_beyond = bool(sizes) and subject.added_tokens >= (sizes[0] or math.inf)
    return [f"{TOKENS_FILE}: token {subject.added_tokens} of {sizes[0]}"] if is_beyond else []


def _alpha_zero(subject: ServedAdapter, _: str) -> list[str]:
    return ["lora_alpha: 0"] if subject.config.alpha == 0 else []


def _alpha_fractional(subject: ServedAdapter, _: str) -> list[str]:
    alpha = subject.config.alpha
    return [] if alpha >= 0 and alpha.is_integer() else [f"lora_alpha: {alpha:g}"]


def _padded_rank(subject: ServedAdapter, _: str) -> list[str]:
    rank, least = subject.config.r, 8 * subject.serving.tensor_parallel
    padded = least if rank <= least else math.ceil(rank / 16) * 16
    return [f"r: {rank}, padded to {padded}"] if padded != rank else []


def _half_pair(subject: ServedAdapter, _: str) -> list[str]:
    lora = subject.adapter.contents.lora
    return [path for path, parts in lora.items() if ("lora_A" in parts) != ("lora_B" in parts)]


def _tied_output(subject: ServedAdapter, _: str) -> list[str]:
    is_tied = subject.base is not None and subject.base.tied("lm_head") is not None
    return _keys_like(subject, r"(^|\.)lm_head\.lora_") if is_tied else []


def _collides(subject: ServedAdapter, _: str) -> list[str]:
    seen: dict[tuple[str, str], str] = {}
    found = []
    for path in subject.adapter.contents.lora:
        if match := _LAYERS.match(path):
            first = seen.setdefault((match[2], _leaf(path)), match[1])
            found += [path] if first != match[1] else []
    return found


def _pickle_only(subject: ServedAdapter, _: str) -> list[str]:
    adapter = subject.adapter
    is_only = adapter.weight_bytes is None and adapter.pickle_bytes is not None
    return ["adapter_model.bin"] if is_only else []


def _no_tensors(subject: ServedAdapter, _: str) -> list[str]:
    adapter = subject.adapter
    return ["no tensor in the file"] if adapter.weight_bytes and not adapter.tensors else []


def _base_is_path(subject: ServedAdapter, _: str) -> list[str]:
    name = subject.config.base_name or ""
    is_id = name and not name.startswith(_PATH_LIKE) and "\\" not in name and name.count("/") < 2
    return [] if is_id else [f"base_model_name_or_path: {name or 'none'}"]


def _none_served(subject: ServedAdapter, _: str) -> list[str]:
    served = subject.serving.target_modules
    leaves = {_leaf(path) for path in subject.adapter.contents.lora}
    is_disjoint = bool(served) and leaves.isdisjoint(served)
    return [f"--lora-target-modules {' '.join(served)}"] if is_disjoint else []


def _always(subject: ServedAdapter, _: str) -> list[str]:
    return [CONFIG_FILE]


def _base_is_known(subject: ServedAdapter, _: str) -> list[str]:
    return [subject.base.model_type] if subject.base else []


CONDITIONS: Mapping[str, Condition] = {
    "added tokens": _adds_tokens,
    "alpha fractional": _alpha_fractional,
    "alpha zero": _alpha_zero,
    "always": _always,
    "base path": _base_is_path,
    "bias": _has_bias,
    "colliding layers": _collides,
    "expert ranks differ": _expert_ranks_differ,
    "experts in part": _experts_in_part,
    "half pair": _half_pair,
    "head on a causal base": _head_on_causal,
    "init among": _is_among,
    "init outside": _is_outside,
    "keys like": _keys_like,
    "keys unlike": _keys_unlike,
    "known base": _base_is_known,
    "lacks": _lacks,
    "layer lacks": _layer_lacks,
    "layers beyond the base": _layers_beyond,
    "layers missing": _layers_missing,
    "leaves outside": _leaves_outside,
    "no target is served": _none_served,
    "no tensors": _no_tensors,
    "padded rank": _padded_rank,
    "paths outside the base": _paths_outside,
    "pickle only": _pickle_only,
    "projection ranks differ": _projection_ranks_differ,
    "rank over": _over,
    "rank over the limit": _over_limit,
    "ranks differ": _ranks_differ,
    "ranks other than configured": _ranks_unlike_config,
    "ranks other than r": _ranks_unlike_r,
    "saved outside": _saves_outside,
    "set": _sets,
    "smaller than the base": _smaller,
    "target null": _target_is_null,
    "target regex": _target_is_regex,
    "tied output": _tied_output,
    "tower keys": _tower_keys,
    "untargeted": _untargeted,
}


def as_matrix(effect: str) -> str:
    """Write which runtimes have an effect on adapters with which trait, and by which versions."""
    read = ", ".join(versions_read())
    closing = f"x: read in the source of {read}; r: also run; ?: inferred"
    lines = _matrix_lines([rule for rule in rules() if rule.effect == effect])
    return "\n".join([*lines, "", closing])


def tabulate(chosen: Sequence[Rule], mark: Callable[[Rule], str]) -> dict[str, tuple[str, ...]]:
    """Return the marks of each trait, a column for each runtime; an empty one has no rule."""
    cells: dict[str, dict[str, str]] = {}
    for rule in chosen:
        cells.setdefault(rule.trait, {}).setdefault(rule.runtime, mark(rule))
    return {trait: tuple(c.get(n, "") for n in runtimes()) for trait, c in cells.items()}


def _mark(rule: Rule) -> str:
    if rule.is_past:
        return rule.versions.replace("up to ", "≤")
    return {"run": "r", "yes": "x", "no": "?"}[rule.verified]


def _matrix_lines(chosen: Sequence[Rule]) -> list[str]:
    table = tabulate(chosen, _mark)
    width = max(map(len, table))
    rows = {" " * width: runtimes(), **table}
    return [
        f"{trait:<{width}}  " + "  ".join(_centred(marks)).rstrip() for trait, marks in rows.items()
    ]


def _centred(marks: Sequence[str]) -> list[str]:
    return [f"{mark:^{len(name)}}" for mark, name in zip(marks, runtimes(), strict=True)]
