"""Reports for people and machines: text for a terminal, Markdown for a pull request, JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from postmortem.archaeology import Dating, Encounter, span
from postmortem.catalogue import Entry, Finding
from postmortem.identify import Identification
from postmortem.inspection import Inspection
from postmortem.untrusted import printable

_COLOURS = {
    "error": "31",
    "warning": "33",
    "info": "36",
    "broken": "31",
    "suspect": "33",
    "fits": "32",
}


def _paint(text: str, kind: str, is_coloured: bool) -> str:
    return f"\x1b[1;{_COLOURS[kind]}m{text}\x1b[0m" if is_coloured else text


def as_json(inspections: Sequence[Inspection]) -> str:
    """Write the JSON contract: verdict, findings, bases; an object for one adapter, else a list."""
    contents = [
        {
            "verdict": found.report.verdict,
            "findings": [asdict(f) for f in found.report.findings],
            "bases": list(found.bases),
            "adapter": found.adapter,
            "base": found.report.base,
            "notes": list(found.report.notes),
        }
        for found in inspections
    ]
    content = contents[0] if len(contents) == 1 else contents
    return json.dumps(content, indent=2, ensure_ascii=False)


def as_text(inspection: Inspection, *, is_coloured: bool = False) -> str:
    """Write the verdict first, then the findings by severity with evidence and remedy."""
    report = inspection.report
    against = f" on {report.base}" if report.base else ""
    lines = [
        f"{_paint(report.verdict, report.verdict, is_coloured)}: {inspection.adapter}{against}"
    ]
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
    lines = [f"**{report.verdict}**: {_escape(inspection.adapter)}", ""]
    if report.findings:
        lines += ["| severity | finding | evidence | remedy |", "|---|---|---|---|"]
        lines += [
            f"| {f.severity} | {f.id}: {_title(f)} | {_escape(f.evidence)} | {_escape(f.remedy)} |"
            for f in report.findings
        ]
    return "\n".join([*lines, "", *(f"*{note}*" for note in report.notes)]).rstrip()


def _escape(text: str) -> str:
    return "".join(f"&#{ord(c)};" if c in "|<>&`*_[]()!\\#@" else c for c in text)


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
    return f"{entry.id} ({entry.severity}): {entry.title}\n{body}"


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
