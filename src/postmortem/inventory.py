"""What files alone say: the adapters as declared, of true size, and of the world; the catalogue."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from postmortem.adapter import read_adapter
from postmortem.adapter_config import CONFIG_FILE
from postmortem.adapter_weights import WEIGHTS_FILE
from postmortem.archaeology import date_config, date_warning, span
from postmortem.architectures import describe
from postmortem.bases import find_base
from postmortem.case import System, TrueSize
from postmortem.catalogue import SIZE_TOLERANCE, Entry, catalogue
from postmortem.errors import ModelError
from postmortem.identify import BYTES, Identification, identify, measure
from postmortem.inspection import Inspection, inspect_adapter
from postmortem.session import Session
from postmortem.sources import open_source
from postmortem.world import ADAPTERS, role_name

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
        report = inspect_adapter(str(path), str(base)).report
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


def record_reproductions(session: Session, folder: Path) -> None:
    """Reproduce each entry of the catalogue with PEFT and with the checker."""
    from postmortem.faults import reproduce  # loads torch, which the rest of this does without

    reproductions = reproduce(folder)
    session.table(
        "catalogue.reproductions",
        ("id", "fault injected", "PEFT", "our finding"),
        [(r.finding, r.fault, r.reaction, r.severity) for r in reproductions],
    )
    for reaction in ("raises", "warns", "silent"):
        count = sum(r.reaction == reaction for r in reproductions)
        session.measure(f"catalogue.{reaction}", count, unit="faults")
    caught = {r.finding for r in reproductions if r.severity != "none"}
    session.measure("catalogue.faults", len(reproductions), unit="faults")
    missed = _missing(list(catalogue()), caught)
    session.verdict(
        "catalogue.all_reproduced",
        not missed,
        f"without reproduction: {', '.join(missed)}" if missed else "each entry has at least one",
    )


def _seen(entry: Entry) -> str:
    return ", ".join(entry.threads)


def _missing(names: Sequence[str], caught: set[str]) -> list[str]:
    return [name for name in names if name not in caught]


def _record_findings(session: Session, key: str, *, inspection: Inspection) -> None:
    rows = [
        (finding.id, finding.severity, finding.message, finding.evidence)
        for finding in inspection.report.findings
    ]
    session.table(key, ("finding", "severity", "what it says", "evidence"), rows)
