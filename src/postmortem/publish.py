"""From records to what the book reads: values, tables and figures; refuses stale records."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from postmortem.case import Case, load_case
from postmortem.errors import RecordError
from postmortem.figures import draw_all, save_drawings
from postmortem.inputs import choose_rows, input_digests
from postmortem.records import (
    NO_MODEL,
    Cell,
    Measure,
    RecordFile,
    Table,
    Text,
    Verdict,
    check_fresh,
    read_records,
    write_text,
)
from postmortem.world import World, check_members, read_world, role_name

Values = dict[str, dict[str, Any]]


def publish(
    *,
    case: str,
    profile: str,
    world: str,
    notebooks: Sequence[str],
    records: str,
    out: str,
    data: str = "",
    labels: str = "",
    rows: int = 0,
) -> int:
    """Write `out/values.json` and `out/figures/` from the records of all notebooks.

    Returns the number of records. Raises `RecordError` where a record file is missing, altered
    or stale, or where two notebooks record the same key.
    """
    loaded, members = load_case(case), read_world(world)
    check_members(members)
    scored = choose_rows(loaded, profile, data=data, labels=labels, rows=rows)
    files = {}
    for notebook in notebooks:
        file = read_records(Path(records) / f"{Path(notebook).stem}.jsonl")
        check_fresh(file, input_digests(Path(notebook), loaded, world=members, rows=scored))
        files[Path(notebook).stem] = file
    values = collect_values(files.values())
    add_run_values(values, files, world=members)
    values["texts"]["rows.source"] = scored.source
    values["measures"]["rows.count"] = _number(len(scored))
    add_case_values(values, loaded)
    drawings, missing = draw_all(files, loaded)
    save_drawings(drawings, missing, Path(out) / "figures")
    write_text(Path(out) / "values.json", json.dumps(values, indent=1, ensure_ascii=False))
    return sum(len(file.records) for file in files.values())


def collect_values(files: Iterable[RecordFile]) -> Values:
    """Measures, verdicts, texts and tables of all files by key."""
    values: Values = {"measures": {}, "verdicts": {}, "texts": {}, "tables": {}}
    for file in files:
        for record in file.records:
            match record:
                case Measure():
                    _place(values["measures"], record.key, file, record.model_dump())
                case Verdict():
                    _place(values["verdicts"], record.key, file, record.model_dump())
                case Text():
                    _place(values["texts"], record.key, file, record.text)
                case Table():
                    _place(values["tables"], record.key, file, record.model_dump())
    return values


def add_run_values(values: Values, files: Mapping[str, RecordFile], *, world: World) -> None:
    """Add where the numbers came from: device, versions, digests, times, the world's members."""
    runs = [file.provenance for file in files.values()]
    # A notebook that reads files alone has neither device nor dtype.
    run = next((run for run in runs if run.device != NO_MODEL), runs[0])
    seconds = {name: float(file.provenance.aside["seconds"]) for name, file in files.items()}
    values["texts"] |= {
        "profile.name": world.profile,
        "profile.title": world.title,
        "profile.caveat": world.caveat,
        "run.device": run.device,
        "run.dtype": run.dtype,
        "run.date": min(str(run.aside["started"]) for run in runs),
    }
    values["measures"] |= {
        "run.seconds": _number(sum(seconds.values()), unit="s"),
        "run.records": _number(sum(len(file.records) for file in files.values())),
    }
    add_table(values, "run.versions", ("package", "version"), list(run.versions.items()))
    add_table(
        values,
        "run.notebooks",
        ("notebook", "records", "digest", "seconds"),
        [(n, len(f.records), f.digest, round(seconds[n], 1)) for n, f in files.items()],
    )
    inputs = {k: v for f in files.values() for k, v in f.provenance.digests.items()}
    del inputs["notebook"]
    add_table(values, "run.inputs", ("input", "digest"), list(inputs.items()))
    add_table(
        values,
        "world.members",
        ("role", "available", "steps", "reached"),
        [
            (
                role_name(role),
                "yes" if member.path else f"no: {member.reason}",
                int(member.training.get("steps", 0)) or None,
                ", ".join(f"{k} {v:.3f}" for k, v in member.training.items() if k != "steps"),
            )
            for role, member in world.members.items()
        ],
    )


def add_case_values(values: Values, case: Case) -> None:
    """Add the case's own texts, counts and tables."""
    values["texts"] |= {
        "case.title": case.title,
        "case.symptom": case.symptom,
        "case.context": case.context,
    }
    found = Counter(claim.verdict for claim in case.claims)
    counts = {
        "case.claims": len(case.claims),
        "case.claims_stand": found["stands"],
        "case.claims_part": found["stands in part"],
        "case.claims_refuted": found["refuted"],
        "case.claims_unchecked": found["cannot be checked"],
        "case.hypotheses": len(case.hypotheses),
        "case.initial_sum": sum(h.initial or 0 for h in case.hypotheses),
        "case.final_sum": sum(h.final or 0 for h in case.hypotheses),
    }
    values["measures"] |= {key: _number(value) for key, value in counts.items()}
    for key, columns, rows in _case_tables(case, values["verdicts"]):
        add_table(values, f"case.{key}", columns, rows)


def add_table(
    values: Values, key: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
) -> None:
    """Add a table under a key."""
    values["tables"][key] = {"columns": list(columns), "rows": [list(row) for row in rows]}


def _case_tables(
    case: Case, verdicts: Mapping[str, Mapping[str, str]]
) -> Iterable[tuple[str, Sequence[str], Sequence[Sequence[Cell]]]]:
    yield (
        "timeline",
        ("when", "what", "grade", "source"),
        [(e.when, e.what, e.grade, e.source) for e in case.timeline],
    )
    yield (
        "observations",
        ("kind", "statement", "what we see", "grade"),
        [(o.kind, o.statement, o.what_we_see, o.grade) for o in case.observations],
    )
    yield (
        "evidence",
        ("title", "statement", "reading", "what it bears", "grade"),
        [(e.title, e.statement, e.reading, e.what_it_bears, e.grade) for e in case.evidence],
    )
    yield (
        "hypotheses",
        ("id", "hypothesis", "statement", "initial", "final"),
        [
            (h.id, h.title, h.statement, _percent(h.initial), _percent(h.final))
            for h in case.hypotheses
        ],
    )
    yield (
        "standing",
        ("id", "hypothesis", "verdict", "because", "grade", "decided by"),
        [(h.id, h.title, h.verdict, h.because, h.grade, h.decided_by) for h in case.hypotheses],
    )
    yield (
        "verdicts",
        ("id", "hypothesis", "on the record", "grade", "this run asks", "this run"),
        [
            (
                h.id,
                h.title,
                h.verdict,
                h.grade,
                h.test.asks if h.test else "",
                _decided(h.test.verdict, verdicts) if h.test else "",
            )
            for h in case.hypotheses
        ],
    )
    yield (
        "claims",
        ("section", "claim", "verdict", "because", "grade"),
        [(c.section, c.claim, c.verdict, c.because, c.grade) for c in case.claims],
    )
    yield (
        "lessons",
        ("kind", "title", "lesson", "amended"),
        [(item.kind, item.title, item.lesson, item.amended) for item in case.lessons],
    )
    systems = case.systems.model_dump(exclude_none=True)
    yield (
        "systems",
        ("role", "name", "declared", "grade", "note"),
        [(role, s["name"], _declared(s), s["grade"], s["note"]) for role, s in systems.items()],
    )


def _decided(key: str, verdicts: Mapping[str, Mapping[str, str]]) -> str:
    if key not in verdicts:
        raise RecordError(
            f"verdict {key!r}, which a hypothesis of the case names",
            expected="a record of it",
            found="none in any notebook",
        )
    return verdicts[key]["verdict"]


def _percent(confidence: float | None) -> Cell:
    if confidence is not None and confidence.is_integer():
        return int(confidence)
    return confidence


def _declared(system: Mapping[str, Any]) -> str:
    config = system["config"]
    parts = [f"rank {config['r']}"] if "r" in config else []
    parts += [f"alpha {config['lora_alpha']}"] if "lora_alpha" in config else []
    parts += [", ".join(map(str, config.get("target_modules", [])))]
    if "declared_megabytes" in system:
        parts.append(f"about {system['declared_megabytes']:g} MB")
    return "; ".join(part for part in parts if part)


def _number(value: float, unit: str = "") -> dict[str, Any]:
    return Measure(key="-", value=value, unit=unit).model_dump()


def _place(values: dict[str, Any], key: str, file: RecordFile, value: Any) -> None:
    if key in values:
        raise RecordError(
            file.path, expected=f"{key!r} recorded once", found="the same key in another notebook"
        )
    values[key] = value
