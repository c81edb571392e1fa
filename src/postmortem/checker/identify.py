"""What a file shows of its origin: the PEFT release that wrote it, the bases that it fits."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from postmortem.checker.adapter import Adapter
from postmortem.checker.bases import (
    MIXING,
    BaseModel,
    KnownBase,
    Module,
    describe,
    find_base,
    kind_of_class,
    kind_of_task,
    known_bases,
)
from postmortem.checker.config import PREFIX, layer_of, layer_zero
from postmortem.checker.errors import UntrustedError, printable
from postmortem.checker.fit import find_targets, implied_parameters

_WARNING = re.compile(r"Unexpected keyword arguments \[([^\]]{0,4000})\] for class (\w{1,60})")


@dataclass(frozen=True, slots=True)
class Release:
    """One PEFT release: the fields its LoraConfig accepts and those it writes.

    `unknown_keys` says what loading does with any other key: warns, ignores or raises.
    """

    version: str
    unknown_keys: str
    accepted: frozenset[str]
    written: frozenset[str]


@dataclass(frozen=True, slots=True)
class Dating:
    """What a configuration's keys say about the releases that wrote and can load it.

    `writers` wrote exactly these keys. `possible_writers` know every key that any release knows;
    `missing` are the keys that all of them would have written. Without peft_type no release loads.
    """

    stated: str | None
    writers: tuple[str, ...]
    possible_writers: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    silent_loaders: tuple[str, ...]
    warning_loaders: tuple[str, ...]
    failing_loaders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Encounter:
    """A loader that prints a given warning for configurations of these writers."""

    loader: str
    writers: tuple[str, ...]


@cache
def releases() -> tuple[Release, ...]:
    """Return the releases of peft_fields.csv, oldest first."""
    found: list[Release] = []
    accepted: frozenset[str] = frozenset()
    with Path(__file__).with_name("peft_fields.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            accepted = accepted - set(row["removed"].split()) | set(row["added"].split())
            written = accepted - set(row["not_saved"].split())
            found.append(Release(row["version"], row["unknown_keys"], accepted, written))
    return tuple(found)


@cache
def known_keys() -> frozenset[str]:
    """Return every key that some release accepts."""
    return frozenset().union(*(release.accepted for release in releases()))


def _versions(found: Iterable[Release]) -> tuple[str, ...]:
    return tuple(release.version for release in found)


def _reaction(release: Release, keys: frozenset[str]) -> str:
    if "peft_type" not in keys:
        return "raises"
    return "ignores" if keys <= release.accepted else release.unknown_keys


def date_config(raw: Mapping[str, object]) -> Dating:
    """Date a configuration by its keys alone; values other than peft_version are not read."""
    keys = frozenset(raw)
    known = keys & known_keys()
    exact = [r for r in releases() if r.written == keys]
    possible = [r for r in releases() if known <= r.written]
    stated = raw.get("peft_version")
    by_reaction: dict[str, list[Release]] = {"ignores": [], "warns": [], "raises": []}
    for release in releases():
        by_reaction[_reaction(release, keys)].append(release)
    return Dating(
        stated=stated if isinstance(stated, str) else None,
        writers=_versions(exact),
        possible_writers=_versions(possible),
        missing=tuple(sorted(frozenset.intersection(*(r.written for r in possible)) - keys))
        if possible
        else (),
        unknown=tuple(sorted(keys - known_keys())),
        silent_loaders=_versions(by_reaction["ignores"]),
        warning_loaders=_versions(by_reaction["warns"]),
        failing_loaders=_versions(by_reaction["raises"]),
    )


def date_warning(names: Iterable[str]) -> tuple[Encounter, ...]:
    """Date PEFT's "Unexpected keyword arguments" warning: who wrote the file, who loaded it.

    Names that no release knows were added to the file by somebody else and are left out.
    """
    listed = frozenset(names) & known_keys()
    if not listed:
        return ()
    encounters = (
        Encounter(
            loader.version,
            _versions(r for r in releases() if r.written - loader.accepted == listed),
        )
        for loader in releases()
        if loader.unknown_keys == "warns"
    )
    return tuple(encounter for encounter in encounters if encounter.writers)


def find_warnings(log: str) -> tuple[tuple[str, ...], ...]:
    """Find the distinct key lists of PEFT's warnings about LoraConfig in a log, in order."""
    lists = (m[1] for m in _WARNING.finditer(log) if m[2] == "LoraConfig")
    return tuple(dict.fromkeys(tuple(re.findall(r"[\w.\-]+", text)) for text in lists))


def span(versions: tuple[str, ...]) -> str:
    """Write versions as ranges of consecutive releases: `0.17.0–0.17.1, 0.19.0`."""
    order = [release.version for release in releases()]
    runs: list[list[str]] = []
    for version in versions:
        follows = runs and order.index(version) == order.index(runs[-1][-1]) + 1
        if follows:
            runs[-1].append(version)
        else:
            runs.append([version])
    return ", ".join(r[0] if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs) or "none"


_SPLITTERS = {
    "hidden_size": "any module",
    "num_hidden_layers": "all layers",
    "num_key_value_heads": "k_proj or v_proj",
    "head_dim": "an attention projection",
    "intermediate_size": "an MLP projection",
    "vocab_size": "the embedding or the output layer",
    "tie_word_embeddings": "nothing in shapes: only the base's files",
    "model_type": "biases or norms saved with the adapter",
}

# Bytes of a parameter in the dtypes that adapters are saved in; float16 takes as many as bfloat16.
BYTES = {"float32": 4, "bfloat16": 2}

# Layers that show every kind of a known base: kinds recur within six, and of those before the
# first experts there are at most three.
_SHOWN = 6
Conflict = tuple[str, str, str]  # The tensor, what the base has, what the adapter has.


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A known base that cannot be the one, and the first tensor that shows it."""

    model_id: str
    tensor: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Split:
    """A property in which the remaining bases differ, what would show it, and who has which."""

    field: str
    shown_by: str
    groups: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters that the configuration implies on its base, against what the file holds.

    `implied` is None when the base that the adapter names is not known.
    """

    base: str | None
    implied: int | None
    held: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Identification:
    """The bases that fit (a set: shapes often cannot tell more), and the reasons against others."""

    fits: tuple[str, ...]
    unverified: tuple[str, ...]
    excluded: tuple[Exclusion, ...]
    splits: tuple[Split, ...]
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class _Traits:
    """What of an adapter tells bases apart; layers of equal shapes count once.

    `shapes` maps (path in layer 0, part, shape) to the first key that has it.
    """

    kind: str | None
    shapes: Mapping[tuple[str, str, tuple[int, ...]], str]
    deepest: str
    layer: int
    is_limited: bool


def kind_of(adapter: Adapter) -> str | None:
    """Name the kind of class that the adapter was made for, if its configuration says so."""
    config = adapter.config
    by_class = kind_of_class(config.class_name) if config and config.class_name else None
    return by_class or (kind_of_task(config.task_type) if config and config.task_type else None)


@dataclass(frozen=True, slots=True)
class _Template:
    """A known base with its modules under the paths of layer 0, in each shape that a layer has."""

    base: BaseModel
    modules: Mapping[str, tuple[Module, ...]]


@cache
def _template(model_id: str, kind: str | None) -> _Template | None:
    config = next(base.config for base in known_bases() if base.model_id == model_id)
    # A few layers tell as much as all of them in a fraction of the time, unless the last differ.
    if "num_kv_shared_layers" not in config:
        config = {**config, "num_hidden_layers": _SHOWN if MIXING & config.keys() else 1}
    base = describe(config, name=model_id, kind=kind)
    if base is None:
        return None
    modules: dict[str, dict[Module, None]] = {}
    for path, module in base.modules.items():
        modules.setdefault(layer_zero(path), {})[module] = None
    return _Template(base, {path: tuple(shapes) for path, shapes in modules.items()})


def identify(adapter: Adapter) -> Identification:
    """Compare an adapter's shapes with every known base."""
    conflicts = _conflicts(adapter)
    fits = _fitting(adapter, conflicts)
    return Identification(
        fits=tuple(base.model_id for base in fits),
        unverified=tuple(base.model_id for base in fits if not base.verified),
        excluded=tuple(Exclusion(model_id, *c) for model_id, c in conflicts.items() if c),
        splits=tuple(_splits(fits)),
        sizes=measure(adapter),
    )


def fitting_bases(adapter: Adapter) -> tuple[str, ...]:
    """Return the known bases that an adapter's shapes fit."""
    return tuple(base.model_id for base in _fitting(adapter, _conflicts(adapter)))


def _conflicts(adapter: Adapter) -> dict[str, Conflict | None]:
    traits = _read_traits(adapter)
    return {base.model_id: _first_conflict(traits, base) for base in known_bases()}


def _read_traits(adapter: Adapter) -> _Traits:
    lora = adapter.contents.lora
    shapes: dict[tuple[str, str, tuple[int, ...]], str] = {}
    for path, parts in lora.items():
        inside = layer_zero(path.removeprefix(PREFIX))
        for part, key in parts.items():
            shapes.setdefault((inside, part, adapter.tensors[key].shape), key)
    for path, key in adapter.contents.plain.items():
        module, _, parameter = path.removeprefix(PREFIX).rpartition(".")
        if parameter == "weight":
            shapes.setdefault((layer_zero(module), parameter, adapter.tensors[key].shape), key)
    deepest = max(lora, key=lambda path: layer_of(path) or 0, default="")
    limited = adapter.config is not None and adapter.config.layers_to_transform is not None
    return _Traits(kind_of(adapter), shapes, deepest, layer_of(deepest) or 0, limited)


def _fitting(adapter: Adapter, conflicts: Mapping[str, Conflict | None]) -> list[KnownBase]:
    # Without a LoRA tensor nothing is excluded, and nothing is identified either.
    held = bool(adapter.contents.lora)
    return [base for base in known_bases() if held and conflicts[base.model_id] is None]


def _first_conflict(traits: _Traits, base: KnownBase) -> Conflict | None:
    template = _template(base.model_id, traits.kind) or _template(base.model_id, None)
    if template is None:
        return "adapter_config.json", "a class that this architecture has", str(traits.kind)
    for (path, part, shape), key in traits.shapes.items():
        modules = template.modules.get(path, ())
        # Norms and other whole weights are not described; only known ones can conflict.
        is_judged = part != "weight" or (modules and not template.base.transposed)
        if is_judged and (modules or not template.base.is_open(path)):
            found = [_conflict(module, part, shape) for module in modules or (None,)]
            if found[0] and all(found):
                return key, *found[0]
    layers = int(str(base.config["num_hidden_layers"]))
    if traits.layer >= layers:
        return traits.deepest, f"layers 0 to {layers - 1}", f"layer {traits.layer}"
    if traits.layer < layers - 1 and not traits.is_limited:
        expected = f"tensors up to layer {layers - 1}"
        return traits.deepest, expected, f"none after layer {traits.layer}"
    return None


def _conflict(module: Module | None, part: str, shape: tuple[int, ...]) -> tuple[str, str] | None:
    if module is None:
        return "no such module", f"a tensor of shape {shape}"
    # A is (rank, in), B is (out, rank); a whole embedding is (in, out), a linear weight (out, in).
    is_input = part.endswith("A") or (part == "weight" and module.is_embedding)
    axis = -1 if part.endswith("A") else 0
    wanted = module.inputs if is_input else module.outputs
    if not shape or wanted in (None, shape[axis]):
        return None
    return f"{wanted} {'inputs' if is_input else 'outputs'}", f"{shape[axis]}"


def _splits(fits: list[KnownBase]) -> Iterator[Split]:
    for field, shown_by in _SPLITTERS.items():
        groups: dict[str, list[str]] = {}
        for base in fits:
            groups.setdefault(str(base.config.get(field)), []).append(base.model_id)
        if len(groups) > 1:
            yield Split(field, shown_by, {value: tuple(ids) for value, ids in groups.items()})


def measure(adapter: Adapter) -> Sizes:
    """Do the arithmetic of sizes: r × (in + out) over the targeted modules of the named base."""
    lora = [k for parts in adapter.contents.lora.values() for k in parts.values()]
    held = sum(adapter.tensors[key].count for key in lora)
    config = adapter.config
    base = find_base(config.base_name) if config and config.base_name else None
    if config is None or base is None:
        return Sizes(None, None, held, adapter.weight_bytes or 0)
    model = describe(base.config, name=base.model_id, kind=kind_of(adapter))
    try:
        implied = implied_parameters(config, find_targets(config, model)) if model else None
    except UntrustedError:
        implied = None
    return Sizes(base.model_id, implied, held, adapter.weight_bytes or 0)


def as_identification(found: Identification) -> str:
    """Write what fits, what would split it, what is excluded and why, and the sizes."""
    return "\n".join(_identification_lines(found))


def as_identification_json(found: Identification) -> str:
    """Write the same as JSON."""
    return json.dumps(asdict(found), indent=2, ensure_ascii=False)


def _identification_lines(found: Identification) -> Iterator[str]:
    sizes = found.sizes
    if sizes.held == 0:
        yield "no LoRA tensors: shapes cannot tell which base this is for"
    else:
        yield f"fits {len(found.fits)} known bases" + (":" if found.fits else "")
    for model_id in found.fits:
        yield f"  {model_id}" + (" (shape not verified)" if model_id in found.unverified else "")
    for split in found.splits:
        groups = "; ".join(f"{value}: {', '.join(ids)}" for value, ids in split.groups.items())
        yield f"would split by {split.field} (shown by {split.shown_by}): {groups}"
    if len(found.fits) > 1 and not found.splits:
        yield (
            "nothing in shapes tells these apart: only a hash, a record or a task score does, or "
            "texts: --candidates A B --text FILE"
        )
    yield f"file: {sizes.held:,} LoRA parameters, {sizes.held_bytes:,} bytes"
    if sizes.implied is not None:
        narrow, wide = 2 * sizes.implied / 1e6, 4 * sizes.implied / 1e6
        widths = f"{narrow:,.1f} MB in 16 bits, {wide:,.1f} MB in 32"
        yield f"configuration on {sizes.base}: {sizes.implied:,} parameters, {widths}"
    yield from _exclusion_lines(found)


def _exclusion_lines(found: Identification) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for excluded in found.excluded if found.sizes.held else ():
        reason = f"{excluded.tensor}: expected {excluded.expected}, found {excluded.found}"
        by_reason.setdefault(reason, []).append(excluded.model_id)
    for reason, ids in by_reason.items():
        yield f"not {', '.join(ids)}: {printable(reason, 240)}"


def as_dating(dating: Dating) -> str:
    """Write which releases can have written and can load a configuration."""
    lines = [f"peft_version in the file: {dating.stated}"] if dating.stated else []
    lines.append(f"written exactly so by: {span(dating.writers)}")
    if not dating.writers:
        lines.append(f"releases that know its PEFT keys: {span(dating.possible_writers)}")
    if dating.missing and not dating.writers:
        lines.append(f"keys that each of these would have written: {', '.join(dating.missing)}")
    if dating.unknown:
        lines.append(f"keys of no release: {', '.join(dating.unknown)}")
    lines += [
        f"loads without a word: {span(dating.silent_loaders)}",
        f"loads with a warning: {span(dating.warning_loaders)}",
        f"raises: {span(dating.failing_loaders)}",
    ]
    return "\n".join(lines)


def as_encounters(names: tuple[str, ...], encounters: tuple[Encounter, ...]) -> str:
    """Write which pairs of writer and loader print a warning with these keys."""
    lines = [f"warning about {', '.join(names)}:"]
    lines += [f"  loaded by {e.loader}, written by {span(e.writers)}" for e in encounters]
    return "\n".join(lines if encounters else [*lines, "  no pair of releases prints this"])
