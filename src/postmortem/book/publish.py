"""Records become values and tables for the pages."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from postmortem.book.canvas import Drawing, save_drawings
from postmortem.book.figures import KEPT, draw_all
from postmortem.case.files import write_text
from postmortem.case.rows import Rows, choose_rows
from postmortem.case.schema import Case, ClaimVerdict, Practice, RunTest
from postmortem.case.site import list_runs
from postmortem.checker.errors import RecordError
from postmortem.experiments.metrics import say_interval
from postmortem.experiments.records import (
    NO_MODEL,
    Cell,
    Measure,
    RecordFile,
    Table,
    Text,
    Timing,
    Values,
    Verdict,
    add_table,
    check_fresh,
    digest_files,
    input_digests,
    read_confirmation,
    read_kept,
    read_records,
    read_replays,
)
from postmortem.models.world import Training, World, check_members, read_world, role_name


def publish(
    case: Case,
    *,
    profile: str,
    world: str | Path,
    records: Path,
    out: Path,
    data: str = "",
    labels: str = "",
    rows: int = 0,
) -> int:
    """Write `out/values.json` and `out/figures/` from the records of all runs of the case.

    Returns the number of records. Raises `RecordError` where a record file is missing, altered
    or stale, or where two notebooks record the same key.
    """
    members = read_world(world)
    check_members(members)
    scored = choose_rows(case, profile, data=data, labels=labels, rows=rows)
    runs = list_runs(case)
    replays = digest_files(read_replays(case)) if any(run.learns for run in runs) else ""
    files = {}
    for run in runs:
        file = read_records(records / f"{run.name}.jsonl")
        current = input_digests(run.notebook, case, world=members, rows=scored, replays=replays)
        check_fresh(file, current)
        files[run.name] = file
    values = collect_values(files.values())
    add_run_values(values, files, world=members)
    values["texts"]["profile.title"] = case.profile(profile).title
    values["texts"]["rows.source"] = scored.source
    values["measures"]["rows.count"] = _number(len(scored))
    add_asked(values, case.asked)
    # A case without attempts tells no story of its own: it is held against what fits any adapter.
    if case.attempts:
        drawings, missing = _add_incident(values, case, files=files)
    else:
        add_any_case(values, case, rows=scored)
        drawings, missing = draw_all(files, case)
    save_drawings(drawings, missing, out / "figures")
    write_text(out / "values.json", json.dumps(values, indent=1, ensure_ascii=False))
    return sum(len(file.records) for file in files.values())


def add_asked(values: Values, prompt: str) -> None:
    """What is on record of the swap under the first prompt, by keys that need not name it."""
    place = re.compile(rf"swap\.(.+)\.{re.escape(prompt)}\.(\w+)")
    for kind in ("measures", "verdicts", "texts"):
        for key, value in list(values[kind].items()):
            if found := place.fullmatch(key):
                values[kind][f"asked.{found[1]}.{found[2]}"] = value
    for name in ("first_rows", "groups"):
        if f"swap.{prompt}.{name}" in values["tables"]:
            values["tables"][f"asked.{name}"] = values["tables"][f"swap.{prompt}.{name}"]


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
    for file in suite.values():
        add_suite_costs(values, file)
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


SYSTEMS = ("base", "suspect", "reference")


def describe_bench(file: RecordFile) -> str:
    """The ratios of a benchmark in a line."""
    found = {record.key: record.value or 0.0 for record in file.of(Measure)}
    return (
        f"numeric x{found['bench.v2.numeric.ratio']:.1f}, "
        f"readout x{found['bench.yes_no.readout.ratio']:.1f}, "
        f"gemm share {found['bench.share']:.2f}"
    )


def add_recorded(values: Values, files: Mapping[str, RecordFile]) -> None:
    """Add each record's values under the name of its profile, and tables of all beside each other.

    The words that the reader's own run came to stand beside theirs.
    """
    for name, file in files.items():
        _place_record(values, file, prefix=f"{name}.")
    for prompt, columns in COLUMNS.items():
        rows = [row for n, f in files.items() for row in _systems(n, f, prompt, columns=columns)]
        add_table(values, f"recorded.{prompt}", ("model, rows", "system", *columns.values()), rows)
    add_table(values, "recorded.runs", RUN_COLUMNS, [_run(f) for f in files.values()])
    add_table(values, "recorded.again", AGAIN_COLUMNS, _asked_again(files))
    _judge(values, files)


def add_training(values: Values, case: Case, profiles: Iterable[str]) -> None:
    """Add how each shipped adapter of the profiles was trained, as the record beside it says."""
    rows = [
        (f"{name}, {Path(folder).name}", *_trained(json.loads(path.read_text(encoding="utf-8"))))
        for name in profiles
        for role, folder in case.profile(name).all_adapters.items()
        if role != "donor" and (path := Path(folder, "training.json")).is_file()
    ]
    add_table(values, "recorded.training", TRAINING_COLUMNS, rows)


def _trained(training: Mapping[str, Any]) -> tuple[Cell, ...]:
    judged = [
        _say(training.get(f"{rows} log-odds AUC, {whose}"))
        for rows in ("held_out", "new_rule")
        for whose in ("base", "adapter", "gain")
    ]
    return (training["prompt"], training["rows"], training["layers"], training["steps"], *judged)


def _say(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "–"
    return say_interval(estimate["value"], estimate["low"], estimate["high"])


def add_kept(values: Values, files: Mapping[str, RecordFile]) -> None:
    """Add a kept run of the embedded world under its own keys: it has no other like it."""
    for file in files.values():
        _place_record(values, file, prefix="")


# How many adapters the table of costs is worked out for.
SUITES = (200, 10_000, 100_000)


def add_suite_costs(values: Values, file: RecordFile) -> None:
    """Add what suites of other sizes would take at the rates of the kept one, on one core."""
    measures = {record.key: record.value or 0.0 for record in file.of(Measure)}
    seconds = {record.key: record.seconds for record in file.of(Timing)}
    answered = measures.get("suite.count.answered")
    columns = ("adapters", "core-hours", "GB of adapters", "GB of results")
    if not answered:
        add_table(values, "suite.costs", columns, [("not available", None, None, None)])
        return
    hours = seconds["suite: adapters that answer"] / answered / 3600
    gigabytes = [measures[f"suite.bytes.{name}"] / 1e9 for name in ("adapter", "result")]
    # Two digits, which is all that such a plan can promise.
    rows: list[list[Cell]] = [
        [f"{count:,}", *(float(f"{count * one:.2g}") for one in (hours, *gigabytes))]
        for count in SUITES
    ]
    add_table(values, "suite.costs", columns, rows)


def add_runs(values: Values, files: Iterable[RecordFile]) -> None:
    """Add where every kept run was made."""
    rows = [
        (
            f"{f.provenance.profile}, {f.path.stem}",
            str(f.provenance.aside["started"])[:DAY],
            f.provenance.aside.get("commit", "not noted"),
            f"{f.provenance.device}, {f.provenance.aside['hardware']}",
            round(float(f.provenance.aside["seconds"])),
            f.digest,
        )
        for f in files
    ]
    columns = ("run", "made on", "commit", "device", "seconds", "digest")
    add_table(values, "kept.runs", columns, rows)


def add_bench(values: Values, files: Mapping[str, RecordFile]) -> None:
    """Add the first benchmark on record, and where it ran."""
    for profile, file in list(files.items())[:1]:
        _place_record(values, file, prefix="")
        values["texts"]["bench.profile"] = profile
        add_table(values, "bench.run", RUN_COLUMNS, [_run(file)])


def _place_record(values: Values, file: RecordFile, *, prefix: str) -> None:
    for record in file.records:
        match record:
            case Measure() | Verdict() | Table():
                values[f"{record.kind}s"][f"{prefix}{record.key}"] = record.model_dump()
            case Text():
                values["texts"][f"{prefix}{record.key}"] = record.text


# What is shown of each system under a prompt, by the measure's name.
COLUMNS = {
    "v2": {
        "distinct": "distinct values",
        "top_value": "commonest",
        "top_share": "its share",
        "auc_decoded": "written, AUC",
        "auc_number": "log-odds, AUC",
        "kl": "KL to the base",
    },
    "yes_no": {"auc_yes_no": "yes/no log-odds, AUC", "kl": "KL to the base"},
    "v1": {
        "distinct": "distinct values",
        "top_value": "commonest",
        "top_share": "its share",
        "auc_number": "log-odds, AUC",
        "kl": "KL to the base",
    },
}
TRAINING_COLUMNS = (
    *("adapter", "prompt", "rows", "upper layers", "steps", "base, AUC", "with it, AUC", "gain"),
    *("new rule: base, AUC", "with it there, AUC", "gain there"),
)
RUN_COLUMNS = ("model", "made on", "device", "dtype", "rows", "records", "minutes", "digest")
AGAIN_COLUMNS = ("model", "asked again on", "commit", "answers, all alike", "log-odds within, nat")
# The day, of a time such as 2026-01-31 20:00 UTC.
DAY = 10


def _systems(
    profile: str, file: RecordFile, prompt: str, *, columns: Iterable[str]
) -> Iterable[tuple[Cell, ...]]:
    """A row for each system and set of rows that the record has under a prompt."""
    measures = {record.key: record for record in file.of(Measure)}
    answered = {key.removesuffix(f".{prompt}.base.distinct") for key in measures}
    sets = sorted(key for key in answered if "." not in key and f"{key}.rows" in measures)
    for rows in ("", *(name for name in sets if f"{name}.{prompt}.base.distinct" in measures)):
        place = f"{rows}." if rows else ""
        for system in SYSTEMS:
            key = f"{place}{prompt}.{system}"
            distinct = measures.get(f"{key}.distinct")
            if distinct is None or distinct.value is None:
                continue
            found = {name: measures.get(f"{key}.{name}") for name in columns}
            if system == "base":
                found |= {"kl": None}  # it is what the others are held against
            cells = [_cell(found[name], name) for name in columns]
            count = measures[f"{rows or prompt}.rows"].value
            yield (f"{profile}, {count} {rows or 'generated'}", system, *cells)


def _cell(measure: Measure | None, name: str) -> Cell:
    if measure is None or measure.value is None:
        return "–"
    if measure.low is None or measure.high is None:
        return round(measure.value, 3)
    form = ".2g" if name == "kl" else "z.2f"
    return say_interval(measure.value, measure.low, measure.high, form)


def _run(file: RecordFile) -> tuple[Cell, ...]:
    made = file.provenance
    return (
        made.profile,
        str(made.aside["started"])[:DAY],
        f"{made.device}, {made.aside['hardware']}",
        made.dtype,
        made.parameters["rows"],
        len(file.records),
        round(float(made.aside["seconds"]) / 60),
        file.digest,
    )


def _asked_again(files: Mapping[str, RecordFile]) -> Iterator[tuple[Cell, ...]]:
    """A row for each record; one that no later run has confirmed says so."""
    for name, file in files.items():
        found = read_confirmation(file)
        if found is None:
            yield name, "not yet", None, None, None
        else:
            gap = f"{found.largest_gap:.1g}"
            yield name, found.made[:DAY], found.commit, found.answers, gap


def _judge(values: Values, files: Mapping[str, RecordFile]) -> None:
    """Decide whether the worlds agree on the two statements that the case turns on."""
    statements = {"reproduces": "v2.base.reproduces", "knows": "v2.base.knows"}
    own = {"reproduces": "swap.base.reproduces", "knows": "swap.base.knows"}
    for name, key in statements.items():
        words = {profile: values["verdicts"][f"{profile}.{key}"]["verdict"] for profile in files}
        if own[name] in values["verdicts"]:
            words["this run"] = values["verdicts"][own[name]]["verdict"]
        told = "; ".join(f"{profile}: {word}" for profile, word in words.items())
        verdict = "not available"
        if files:
            verdict = "holds" if len(set(words.values())) == 1 else "refuted"
        values["verdicts"][f"recorded.{name}_agree"] = {
            "verdict": verdict,
            "because": told or "no run on a real model is on record",
        }


ROLES = ("base", "suspect", "reference")
# What each contract asks for, in words.
ASKS = {
    "number": "a number from 0 to 1",
    "yes_no": "one of two answers",
    "choice": "one of two answers",
    "class": "a class",
}
ZERO = ("controls.zero_b.is_base", False)
# Explanations that any case can be held against: the recorded verdict on each, and whether it
# speaks for the explanation as it stands or by being refuted.
HYPOTHESES = (
    ("The files do not fit the base, or lack something", "files.suspect.fit", False),
    ("The adapter does nothing", "asked.suspect.moves_the_base", False),
    ("The base alone answers one and the same value", "asked.base.constant", True),
    ("The suspect knows, and does not say", "asked.suspect.knowing", True),
    ("The suspect never learnt the task", "asked.suspect.ranks_better", False),
    ("Its scale is too large", "controls.eighth.ranks_better", True),
    ("Its scale is too small", "controls.eightfold.ranks_better", True),
    ("Its sign is turned", "controls.flipped.ranks_better", True),
    ("Its layers stand in another order", "controls.shifted.ranks_better", True),
    ("The loading is at fault: with lora_B zero the base answers otherwise", *ZERO),
)
OPPOSITE = {"holds": "refuted", "refuted": "holds"}
# What a model does with what it knows, as a verdict on its knowing and not saying.
KNOWING = {
    "knows and does not say": "holds",
    "says what it knows": "refuted",
    "does not know": "refuted",
}


def add_any_case(values: Values, case: Case, *, rows: Rows) -> None:
    """Add the texts and tables that any case has, whatever it says of itself."""
    asked, labels = case.prompt(case.asked), rows.labels
    values["texts"] |= {
        "case.title": case.title,
        "case.symptom": case.symptom,
        "case.asked": case.asked,
        "case.template": asked.template,
        "case.asks": ASKS[asked.contract],
        # The pages of such a case quote no run that is kept with the project.
        "recorded": "",
    }
    positive = None if labels is None else int(labels.sum())
    reason = "" if labels is not None else "the rows came without labels"
    counted = Measure(key="-", value=positive, unit="rows", reason=reason)
    values["measures"]["rows.positive"] = counted.model_dump()
    systems = case.systems.model_dump(include=set(ROLES), exclude_none=True)
    add_table(
        values,
        "case.systems",
        ("role", "name"),
        [(role, _short_name(systems[role]["name"])) for role in ROLES if role in systems],
    )
    add_table(
        values,
        "case.prompts",
        ("prompt", "asks for", "answers", "template"),
        [
            (
                name,
                ASKS[prompt.contract],
                " or ".join(prompt.answers) if prompt.contract in ("yes_no", "choice") else "–",
                prompt.template,
            )
            for name, prompt in case.prompts.items()
        ],
    )
    add_table(
        values,
        "case.hypotheses",
        ("explanation", "this run", "because"),
        [judge_hypothesis(values, *hypothesis) for hypothesis in HYPOTHESES],
    )
    members = values["tables"]["world.members"]
    members["rows"] = [row for row in members["rows"] if row[0] in ROLES]


def judge_hypothesis(
    values: Values, title: str, key: str, as_it_stands: bool
) -> tuple[str, str, str]:
    """An explanation with this run's verdict on it and the reason; `key` names the record."""
    found = values["verdicts"].get(key)
    if found is None:
        return title, "not available", "no notebook of this case asks for it"
    word = KNOWING.get(found["verdict"], found["verdict"])
    return title, word if as_it_stands else OPPOSITE.get(word, word), found["because"]


def _short_name(name: str) -> str:
    """A name as it may stand on a page: of a folder its last part, which is no one's home."""
    return Path(name).name if Path(name).is_absolute() else name
