"""What the files of the adapters say, before any model runs."""

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from postmortem.case.schema import System, TrueSize
from postmortem.checker.adapter import WEIGHTS_FILE, Adapter, open_source, read_adapter
from postmortem.checker.bases import describe, find_base
from postmortem.checker.catalogue import SIZE_TOLERANCE, Entry, catalogue
from postmortem.checker.checks import Inspection, inspect_adapter
from postmortem.checker.config import CONFIG_FILE, layer_of
from postmortem.checker.errors import ModelError, printable
from postmortem.checker.fit import scale_of
from postmortem.checker.identify import (
    BYTES,
    Identification,
    date_config,
    date_warning,
    identify,
    measure,
    span,
)
from postmortem.experiments.records import Cell
from postmortem.experiments.session import Session
from postmortem.models.world import ADAPTERS, role_name

CATALOGUE_COLUMNS = (
    *("id", "title", "severity", "symptom", "cause", "what settles it", "remedy", "PEFT"),
    "seen in",
)


def record_declared(session: Session, folder: Path) -> None:
    """Hold each adapter's transcribed config against itself, its base and the size on record."""
    systems = session.case.systems
    for role, system in (("suspect", systems.suspect), ("reference", systems.reference)):
        if system is not None and system.config:
            _record_system(session, role, system=system, folder=folder / role)


def _record_system(session: Session, role: str, *, system: System, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(system.config), encoding="utf-8")
    stated = system.declared_megabytes
    inspection = inspect_adapter(
        str(folder), stated_bytes=None if stated is None else int(stated * 1e6)
    )
    key = f"inventory.{role}"
    _record_findings(session, f"{key}.findings", inspection=inspection)
    implied = measure(read_adapter(open_source(str(folder)))).implied
    reason = "the base that it names is not in the table of known bases"
    session.measure(f"{key}.parameters", implied, reason=reason)
    for dtype, size in BYTES.items():
        megabytes = None if implied is None else implied * size / 1e6
        session.measure(f"{key}.megabytes_{dtype}", megabytes, unit="MB", reason=reason)
    session.measure(f"{key}.megabytes_declared", stated, unit="MB", reason="no size on record")
    session.verdict(f"{key}.size_agrees", *_size_agrees(implied, stated))
    dating = date_config(system.config)
    loaders = (*dating.silent_loaders, *dating.warning_loaders)
    session.verdict(
        f"{key}.loads_as_transcribed",
        bool(loaders),
        f"PEFT {span(loaders)} would load it" if loaders else "no PEFT release would load it",
    )
    session.text(f"{key}.unknown_keys", ", ".join(dating.unknown) or "none")


def _size_agrees(implied: int | None, stated: float | None) -> tuple[bool | None, str]:
    if implied is None or stated is None:
        return None, "no size on record, or a base whose shapes are not known"
    sizes = {dtype: implied * size / 1e6 for dtype, size in BYTES.items()}
    told = " or ".join(f"{value:.1f} MB in {dtype}" for dtype, value in sizes.items())
    agrees = any(abs(value - stated) <= SIZE_TOLERANCE * stated for value in sizes.values())
    return agrees, f"{implied:,} parameters are {told}; about {stated:g} MB is on record"


def record_dating(session: Session) -> None:
    """Date the software of the incident by the one warning that its log shows."""
    warning = session.case.loading_warning
    if warning is None:
        session.text("inventory.loader", "no warning on record")
        session.text("inventory.writers", "no warning on record")
        return
    encounters = date_warning(warning.keywords)
    session.text("inventory.loader", span(tuple(e.loader for e in encounters)) or "none")
    writers = tuple(dict.fromkeys(writer for e in encounters for writer in e.writers))
    session.text("inventory.writers", span(writers) or "none")
    rows = [(encounter.loader, span(encounter.writers)) for encounter in encounters]
    session.table("inventory.dating", ("loaded by", "saved by"), rows)
    config = session.case.systems.suspect.config
    would_list = sorted({*date_config(config).unknown, *warning.keywords})
    session.verdict(
        "inventory.transcription_was_loaded",
        False if date_config(config).unknown else None,
        f"PEFT would have listed {', '.join(would_list)}; "
        f"the log lists {', '.join(warning.keywords)}",
    )


def record_true_size(session: Session, folder: Path) -> None:
    """Check adapters of true size against the incident's base, from their headers alone."""
    size = session.case.true_size
    if size is None:
        return
    rows = []
    for name in (*size.donors, size.base):
        adapter = write_headers(name, folder / name.replace("/", "--"), size)
        inspection = inspect_adapter(str(adapter), size.base, header_only=True)
        ids = ", ".join(finding.id for finding in inspection.report.findings) or "none"
        rows.append((name, inspection.report.verdict, ids, len(inspection.bases)))
        if name == size.base:
            _record_identity(session, identify(read_adapter(open_source(str(adapter)))))
    columns = ("adapter made for", "on the incident's base", "findings", "known bases it fits")
    session.table("inventory.true_size", columns, rows)


def write_headers(base: str, folder: Path, size: TrueSize) -> Path:
    """An adapter folder of a known base's true shapes, as its header says; all values are zero."""
    known = find_base(base)
    shapes = describe(known.config, name=base, kind="causal") if known else None
    if shapes is None:
        raise ModelError(base, expected="a base of the shipped table", found="no such row")
    header, end = {}, 0
    for path, module in shapes.modules.items():
        if path.rpartition(".")[2] not in size.target_modules:
            continue
        for part, shape in (("A", (size.rank, module.inputs)), ("B", (module.outputs, size.rank))):
            start, end = end, end + 2 * int(shape[0] or 0) * int(shape[1] or 0)
            place = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            header[f"base_model.model.{path}.lora_{part}.weight"] = place
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + bytes(end))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": size.rank,
        "lora_alpha": 2 * size.rank,
        "target_modules": size.target_modules,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _record_identity(session: Session, found: Identification) -> None:
    session.measure("inventory.bases_that_fit", len(found.fits))
    session.measure("inventory.bases_excluded", len(found.excluded))
    session.table("inventory.fits", ("base of the same shapes",), [(name,) for name in found.fits])
    splits = [(split.field, split.shown_by, len(split.groups)) for split in found.splits]
    session.table("inventory.splits", ("they differ in", "shown by", "groups"), splits)


def record_world(session: Session) -> None:
    """Check each adapter of this world against the base of this world."""
    rows: list[tuple[str, str, str]] = []
    for role in ADAPTERS:
        name = role_name(role)
        if not session.world.has(role):
            rows.append((name, "not available", session.world.members[role].reason))
            continue
        path, base = session.world.path(role), session.world.path("base")
        try:
            report = inspect_adapter(str(path), str(base)).report
        except ModelError as error:
            rows.append((name, "could not be checked", _say(error)))
            continue
        ids = ", ".join(finding.id for finding in report.findings) or "none"
        rows.append((name, report.verdict, ids))
    session.table("inventory.world", ("adapter", "on this base", "findings"), rows)


def record_entries(session: Session) -> None:
    """Record the failure catalogue."""
    entries = catalogue()
    session.measure("catalogue.entries", len(entries))
    session.table(
        "catalogue.entries",
        CATALOGUE_COLUMNS,
        [
            (e.id, e.title, e.severity, e.symptom, e.cause, e.settles, e.remedy, e.peft, _seen(e))
            for e in entries.values()
        ],
    )


def _seen(entry: Entry) -> str:
    return ", ".join(entry.threads)


def _record_findings(session: Session, key: str, *, inspection: Inspection) -> None:
    rows = [
        (finding.id, finding.severity, finding.message, finding.evidence)
        for finding in inspection.report.findings
    ]
    session.table(key, ("finding", "severity", "what it says", "evidence"), rows)


ROLES = ("suspect", "reference")
MEASURES = ("findings", "errors", "tensors", "parameters", "megabytes", "layers", "bases")
FINDINGS = ("finding", "severity", "what it says", "remedy")
CONTENTS = ("module", "part", "shape", "dtype", "tensors")
# Names of bases that are listed; more of the same shapes tell no more.
NAMED = 6


def record_files(session: Session) -> None:
    """Record what the files of each adapter say, read as the checker reads them: nothing runs."""
    for role in ROLES:
        if not session.world.has(role):
            _record_absent(session, role, reason=session.world.members[role].reason)
            continue
        try:
            adapter, found = _read(session, role)
        except ModelError as error:
            _record_absent(session, role, reason=_say(error))
            continue
        _record_role(session, role, adapter=adapter, found=found)


def _read(session: Session, role: str) -> tuple[Adapter, Inspection]:
    folder = str(session.world.path(role))
    return read_adapter(open_source(folder)), inspect_adapter(
        folder, str(session.world.path("base"))
    )


def _record_role(session: Session, role: str, *, adapter: Adapter, found: Inspection) -> None:
    key, findings = f"files.{role}", found.report.findings
    errors = sum(finding.severity == "error" for finding in findings)
    layers = {layer_of(path) for path in adapter.contents.lora} - {None}
    numbers = (
        *(len(findings), errors, len(adapter.tensors)),
        sum(tensor.count for tensor in adapter.tensors.values()),
        None if adapter.weight_bytes is None else adapter.weight_bytes / 1e6,
        *(len(layers), len(found.bases)),
    )
    for name, value in zip(MEASURES, numbers, strict=True):
        unit = "MB" if name == "megabytes" else ""
        session.measure(f"{key}.{name}", value, unit=unit, reason="there is no file of weights")
    words = {"fits": True, "suspect": None, "broken": False}
    listed = ", ".join(dict.fromkeys(finding.id for finding in findings))
    because = f"found: {listed}" if listed else "nothing was found against it"
    session.verdict(f"{key}.fit", words[found.report.verdict], because)
    rows = [(f.id, f.severity, f.message, f.remedy) for f in findings]
    session.table(f"{key}.findings", FINDINGS, rows or [("none", "", because, "")])
    session.table(f"{key}.contents", CONTENTS, list(_list_contents(adapter)))
    session.table(f"{key}.facts", ("what", "in the files"), list(_list_facts(adapter, found)))


def _record_absent(session: Session, role: str, *, reason: str) -> None:
    key = f"files.{role}"
    for name in MEASURES:
        session.measure(f"{key}.{name}", None, reason=reason)
    session.verdict(f"{key}.fit", "not available", reason)
    session.table(f"{key}.findings", FINDINGS, [("not available", "", reason, "")])
    session.table(f"{key}.contents", CONTENTS, [("not available", "", "", "", None)])
    session.table(f"{key}.facts", ("what", "in the files"), [("not available", reason)])


def _list_contents(adapter: Adapter) -> Iterator[Sequence[Cell]]:
    """The tensors by module, part, shape and dtype, those of all layers together."""
    named = [
        (path.rpartition(".")[2], part, key)
        for path, parts in adapter.contents.lora.items()
        for part, key in parts.items()
    ]
    others = (*adapter.contents.plain.items(), *adapter.contents.tokens.items())
    named += [(path.removeprefix("base_model.model."), "whole", key) for path, key in others]
    kinds = Counter(
        (module, part, adapter.tensors[key].shape, adapter.tensors[key].dtype)
        for module, part, key in named
    )
    for (module, part, shape, dtype), count in kinds.items():
        size = "×".join(map(str, shape)) or "one number"
        yield printable(module), printable(part), size, dtype, count
    if not kinds:
        yield "no tensors", "", "", "", 0


def _list_facts(adapter: Adapter, found: Inspection) -> Iterator[tuple[str, str]]:
    config, dating = adapter.config, date_config(adapter.raw)
    if config is None:
        yield "configuration", "not one that PEFT accepts"
    else:
        scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
        yield "rank, alpha, scale", f"{config.r}, {config.alpha:g}, {scale:.3g}"
        yield "modules", _list_names(config.target_modules)
        kinds = {"rank-stabilised": config.use_rslora, "DoRA": config.use_dora}
        yield "kind", ", ".join(["LoRA", *(name for name, is_so in kinds.items() if is_so)])
        yield "saved whole", ", ".join(map(printable, config.modules_to_save)) or "none"
        yield "task", config.task_type or "not named"
        yield "base that it names", _shorten_path(printable(config.base_name or "none"))
    yield "PEFT that it names", printable(dating.stated or "none")
    yield "PEFT releases that write these keys", span(dating.writers or dating.possible_writers)
    yield "PEFT releases that load them in silence", span(dating.silent_loaders)
    more = f" and {len(found.bases) - NAMED} more" if len(found.bases) > NAMED else ""
    named = ", ".join(found.bases[:NAMED]) or "none"
    yield "known bases of these shapes", f"{named}{more}"


def _shorten_path(name: str) -> str:
    """The end of a path, which tells the model: its beginning tells whose machine it was."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return "/".join(("…", *parts[-3:])) if len(parts) > 3 else name


def _list_names(names: Iterable[str] | str | None) -> str:
    if names is None:
        return "those usual for the base"
    return printable(names if isinstance(names, str) else ", ".join(names), 200)


def _say(error: ModelError) -> str:
    """What went wrong without the folder, which is not the same on another machine."""
    return printable(f"expected {error.expected}, found {error.found}", 300)
