"""From records to what the book reads: values, tables and figures; refuses stale records."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from postmortem.case import Case, ClaimVerdict, Practice, RunTest, load_case
from postmortem.errors import RecordError
from postmortem.figures import Drawing, draw_all, save_drawings
from postmortem.figures_kept import KEPT
from postmortem.figures_own import FIGURES_OWN
from postmortem.inputs import choose_rows, input_digests
from postmortem.kept import digest_files, read_kept, read_replays
from postmortem.own_values import add_own_values
from postmortem.recorded import add_bench, add_kept, add_recorded, add_runs, add_training
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
from postmortem.scale import add_scale
from postmortem.values import Values, add_table
from postmortem.world import Training, World, check_members, read_world, role_name


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
    replays = "" if loaded.own else digest_files(read_replays(loaded))
    files = {}
    for notebook in map(Path, notebooks):
        file = read_records(Path(records) / f"{notebook.stem}.jsonl")
        current = input_digests(notebook, loaded, world=members, rows=scored, replays=replays)
        check_fresh(file, current)
        files[notebook.stem] = file
    values = collect_values(files.values())
    add_run_values(values, files, world=members)
    values["texts"]["rows.source"] = scored.source
    values["measures"]["rows.count"] = _number(len(scored))
    if loaded.own:
        add_own_values(values, loaded, rows=scored)
        drawings, missing = draw_all(files, loaded, FIGURES_OWN)
    else:
        drawings, missing = _add_incident(values, loaded, files=files)
    save_drawings(drawings, missing, Path(out) / "figures")
    write_text(Path(out) / "values.json", json.dumps(values, indent=1, ensure_ascii=False))
    return sum(len(file.records) for file in files.values())


def _add_incident(
    values: Values, case: Case, *, files: dict[str, RecordFile]
) -> tuple[list[Drawing], dict[str, str]]:
    """Add what a case in full holds and the runs that are kept for it; draw its figures."""
    recorded, bench = read_kept(case, "real_model"), read_kept(case, "bench")
    suite, attribution = read_kept(case, "suite"), read_kept(case, "attribution")
    catalogue, replays = read_kept(case, "catalogue"), read_replays(case)
    values["texts"]["recorded"] = " ".join([*recorded, *(["bench"] if bench else [])])
    for found in (suite, attribution, catalogue):
        add_kept(values, found)
    add_recorded(values, recorded)
    add_training(values, case, recorded)
    add_bench(values, bench)
    every = (recorded, bench, suite, attribution, catalogue)
    add_runs(values, [*replays, *(file for found in every for file in found.values())])
    add_scale(values, next(iter(suite.values()), None), recorded=recorded)
    add_case_values(values, case)
    kept = {f"{KEPT}{name}": file for name, file in recorded.items()}
    own = {file.path.stem: file for found in (suite, attribution) for file in found.values()}
    return draw_all({**files, **kept, **own}, case)


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
        "run.notebooks_run": _number(len(files)),
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
                _steps(member.training),
                ", ".join(_reached(member.training)),
            )
            for role, member in world.members.items()
        ],
    )


def _steps(training: Mapping[str, Training]) -> int | None:
    steps = training.get("steps")
    return int(steps) or None if isinstance(steps, int | float) else None


def _reached(training: Mapping[str, Training]) -> Iterator[str]:
    """What training reached: its measures, an estimate by its value."""
    for name, found in training.items():
        value = found.get("value") if isinstance(found, dict) else found
        if isinstance(value, float) and name != "steps":
            yield f"{name} {value:.3f}"


def add_case_values(values: Values, case: Case) -> None:
    """Add the case's own texts, counts, verdicts and tables.

    Raises `RecordError` where the case asks for a verdict that no notebook recorded.
    """
    verdicts = dict(values["verdicts"])
    values["texts"] |= {f"case.{key}": text for key, text in _case_texts(case)}
    values["measures"] |= {f"case.{key}": number for key, number in _case_measures(case)}
    for key, columns, rows in _case_tables(case, verdicts):
        add_table(values, f"case.{key}", columns, rows)
    if case.practice is not None:
        _add_practice(values, case.practice, verdicts=verdicts)
    # Added last: a test of the case must be answered by a run, not by the case itself.
    for kind, items in (("claim", case.claims), ("hypothesis", case.hypotheses)):
        values["verdicts"] |= {
            f"case.{kind}.{item.id}": {"verdict": item.verdict, "because": item.because}
            for item in items
        }


def _case_texts(case: Case) -> Iterable[tuple[str, str]]:
    yield from (("title", case.title), ("symptom", case.symptom), ("context", case.context))
    for piece in case.evidence:
        yield f"evidence.{piece.id}", piece.statement
        yield f"evidence.{piece.id}.bears", piece.what_it_bears
    for hypothesis in case.hypotheses:
        yield f"hypothesis.{hypothesis.id}.decided_by", hypothesis.decided_by
    for claim in case.claims:
        yield f"claim.{claim.id}", claim.claim
        yield f"claim.{claim.id}.decided_by", claim.decided_by
        yield f"claim.{claim.id}.would_change", claim.would_change
    if case.practice is not None:
        yield "practice.impact", case.practice.impact.text
        yield "practice.trigger", case.practice.trigger.text


def _case_measures(case: Case) -> Iterable[tuple[str, dict[str, Any]]]:
    said = Counter(claim.verdict for claim in case.claims)
    held = Counter(hypothesis.verdict for hypothesis in case.hypotheses)
    counts = {
        "claims": len(case.claims),
        "claims_stand": said["stands"],
        "claims_part": said["stands in part"],
        "claims_refuted": said["refuted"],
        "claims_unchecked": said["cannot be checked"],
        "claims_tested": sum(claim.test is not None for claim in case.claims),
        "hypotheses": len(case.hypotheses),
        "hypotheses_weighed": sum(h.initial is not None for h in case.hypotheses),
        "hypotheses_refuted": held["refuted"],
        "hypotheses_open": held["cannot tell"],
        "initial_sum": sum(h.initial or 0 for h in case.hypotheses),
        "final_sum": sum(h.final or 0 for h in case.hypotheses),
        "favourite_initial": max((h.initial or 0 for h in case.hypotheses), default=0),
        "favourite_final": max((h.final or 0 for h in case.hypotheses), default=0),
    }
    yield from ((key, _number(value)) for key, value in counts.items())
    limits, lack = case.adapter_filter, "the case names no filter"
    yield "filter_std", _number(limits.std_above if limits else None, reason=lack)
    yield "filter_maximum", _number(limits.maximum_above if limits else None, reason=lack)
    actions = len(case.practice.actions) if case.practice else None
    yield "actions", _number(actions, reason="the case has no section `practice`")


def _add_practice(
    values: Values, practice: Practice, *, verdicts: Mapping[str, Mapping[str, str]]
) -> None:
    add_table(
        values,
        "case.practice.detection",
        ("when", "check", "would show", "grade"),
        [(d.when, d.check, d.would_show, d.grade) for d in practice.detection],
    )
    lists = {
        "factors": practice.contributing_factors,
        "went_well": practice.went_well,
        "lucky": practice.lucky,
    }
    for name, listed in lists.items():
        key = f"case.practice.{name}"
        add_table(values, key, ("what", "grade"), [(item.text, item.grade) for item in listed])
    for name in ("impact", "trigger"):
        part = getattr(practice, name)
        add_table(values, f"case.practice.{name}", ("what", "grade"), [(part.text, part.grade)])
    answers = [_answer(f"action {a.id}", a.test, verdicts) for a in practice.actions]
    states = ["closed" if word == "holds" else "open" for _, word in answers]
    add_table(
        values,
        "case.practice.actions",
        ("id", "action", "status", "closed by", "this run asks", "this run"),
        [
            (a.id, a.action, state, a.closes, *answer)
            for a, answer, state in zip(practice.actions, answers, states, strict=True)
        ],
    )
    values["measures"]["case.actions_closed"] = _number(states.count("closed"))
    values["measures"]["case.actions_open"] = _number(states.count("open"))


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
            (h.id, h.title, h.verdict, h.grade, *_answer(f"hypothesis {h.id}", h.test, verdicts))
            for h in case.hypotheses
        ],
    )
    yield (
        "claims",
        (
            *("id", "section", "claim", "verdict", "because", "grade"),
            *("decided by", "would change", "this run asks", "this run"),
        ),
        [
            (
                *(c.id, c.section, c.claim, c.verdict, c.because, c.grade),
                *(c.decided_by, c.would_change, *_answer(f"claim {c.id}", c.test, verdicts)),
            )
            for c in case.claims
        ],
    )
    words = get_args(ClaimVerdict)
    said = Counter((claim.section, claim.verdict) for claim in case.claims)
    yield (
        "sections",
        ("section", *words),
        [
            (section, *(said[section, word] for word in words))
            for section in dict.fromkeys(claim.section for claim in case.claims)
        ],
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


def _answer(
    subject: str, test: RunTest | None, verdicts: Mapping[str, Mapping[str, str]]
) -> tuple[str, str]:
    """What a test asks and the verdict of this run; both empty where there is no test."""
    if test is None:
        return "", ""
    if test.verdict not in verdicts:
        raise RecordError(
            f"verdict {test.verdict!r}, which {subject} of the case names",
            expected="a record of it",
            found="none in any notebook",
        )
    return test.asks, verdicts[test.verdict]["verdict"]


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


def _number(value: float | None, *, unit: str = "", reason: str = "") -> dict[str, Any]:
    why = reason if value is None else ""
    return Measure(key="-", value=value, unit=unit, reason=why).model_dump()


def _place(values: dict[str, Any], key: str, file: RecordFile, value: Any) -> None:
    if key in values:
        raise RecordError(
            file.path, expected=f"{key!r} recorded once", found="the same key in another notebook"
        )
    values[key] = value
