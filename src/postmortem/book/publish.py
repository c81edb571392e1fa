"""Records become values and tables for the pages."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from postmortem.book.canvas import Drawing, save_drawings
from postmortem.book.figures import KEPT, draw_all
from postmortem.book.tables import ROLES, add_any_case, add_case_values, number
from postmortem.case.files import write_text
from postmortem.case.layout import list_runs
from postmortem.case.rows import choose_rows
from postmortem.case.schema import Case
from postmortem.checker.errors import RecordError
from postmortem.experiments.metrics import (
    Estimate,
    auc_estimate,
    auc_gain_estimate,
    difference_estimate,
    say_estimate,
    say_interval,
)
from postmortem.experiments.records import (
    HELD_OUT,
    NO_MODEL,
    PEFT_VERSIONS,
    Cell,
    Measure,
    Prediction,
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
from postmortem.models.model_set import Training, World, check_members, read_world, role_name


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
    values["measures"]["rows.count"] = number(len(scored))
    # A case without attempts tells no story of its own: it is held against what fits any adapter.
    if case.attempts:
        drawings, missing = _add_incident(values, case, files=files)
    else:
        add_any_case(values, case)
        drawings, missing = draw_all(files, case)
    save_drawings(drawings, missing, out / "figures")
    write_text(out / "values.json", json.dumps(values, indent=1, ensure_ascii=False))
    return sum(len(file.records) for file in files.values())


def _add_incident(
    values: Values, case: Case, *, files: dict[str, RecordFile]
) -> tuple[list[Drawing], dict[str, str]]:
    """Add what a case in full holds and the runs that are kept for it; draw its figures."""
    recorded, bench = read_kept(case, "real_model"), read_kept(case, "bench")
    # Each of these has no other like it, so that it stands under its own keys.
    names = ("suite", "attribution", "catalogue", PEFT_VERSIONS, HELD_OUT)
    single = [read_kept(case, name) for name in names]
    suite, attribution, *_ = single
    values["texts"]["recorded"] = " ".join([*recorded, *(["bench"] if bench else [])])
    for file in _list_files(single):
        add_records(values, file)
    add_recorded(values, recorded)
    add_training(values, case, recorded)
    for profile, file in list(bench.items())[:1]:
        add_records(values, file)
        values["texts"]["bench.profile"] = profile
        add_table(values, "bench.run", MADE, [_made(file, MADE)])
    kept = [*read_replays(case), *_list_files([recorded, bench, *single])]
    add_table(values, "kept.runs", KEPT_RUN, [_made(file, KEPT_RUN) for file in kept])
    for file in suite.values():
        add_suite_costs(values, file)
    add_case_values(values, case)
    drawn = {f"{KEPT}{name}": file for name, file in recorded.items()}
    drawn |= {file.path.stem: file for file in _list_files([suite, attribution])}
    return draw_all({**files, **drawn}, case)


def _list_files(found: Iterable[Mapping[str, RecordFile]]) -> list[RecordFile]:
    """The record files of several kept runs, each by profile."""
    return [file for files in found for file in files.values()]


def collect_values(files: Iterable[RecordFile]) -> Values:
    """Measures, verdicts, texts and tables of all files by key."""
    values: Values = {"measures": {}, "verdicts": {}, "texts": {}, "tables": {}}
    for file in files:
        add_records(values, file)
    return values


def add_records(values: Values, file: RecordFile, *, prefix: str = "") -> None:
    """Add a file's records under their keys; raises `RecordError` where one is there already."""
    for record in file.records:
        if not isinstance(record, Measure | Verdict | Text | Table):
            continue
        place, key = values[f"{record.kind}s"], f"{prefix}{record.key}"
        if key in place:
            raise RecordError(
                file.path,
                expected=f"{key!r} recorded once",
                found="the same key in another notebook",
            )
        place[key] = record.text if isinstance(record, Text) else record.model_dump()


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
        "run.peft": run.versions.get("peft", "not installed"),
        "run.date": min(str(run.aside["started"]) for run in runs),
    }
    values["measures"] |= {
        "run.seconds": number(sum(seconds.values()), unit="s"),
        "run.records": number(sum(len(file.records) for file in files.values())),
        "run.notebooks_run": number(len(files)),
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


def describe_bench(file: RecordFile) -> str:
    """The ratios of a benchmark in a line."""
    found = {record.key: record.value or 0.0 for record in file.of(Measure)}
    return (
        f"numeric x{found['bench.v2.numeric.ratio']:.1f}, "
        f"readout x{found['bench.yes_no.readout.ratio']:.1f}, "
        f"gemm share {found['bench.share']:.2f}"
    )


# What is shown of each system, by the measure's name, and the measures under each prompt.
SHOWN = {
    "distinct": "distinct values",
    "top_value": "commonest",
    "top_share": "its share",
    "auc_decoded": "written, AUC",
    "auc_number": "log-odds, AUC",
    "auc_yes_no": "yes/no log-odds, AUC",
    "kl": "KL to the base",
}
PROMPTS = {
    "v2": ("distinct", "top_value", "top_share", "auc_decoded", "auc_number", "kl"),
    "yes_no": ("auc_yes_no", "kl"),
    "v1": ("distinct", "top_value", "top_share", "auc_number", "kl"),
}
# What an adapter adds on real models, by the record's keys: what is held against what of the base.
GAINS = {
    "yes_no": (
        "yes/no adapter, asked yes or no",
        "yes_no.suspect.auc_yes_no",
        "yes_no.base.auc_yes_no",
    ),
    "yes_no_number": (
        "yes/no adapter, log-odds of the number",
        "v2.suspect.auc_number",
        "v2.base.auc_number",
    ),
    "written": (
        "numeric adapter, as written",
        "v2.reference.auc_decoded",
        "v2.base.auc_decoded",
    ),
    "number": (
        "numeric adapter, log-odds of the number",
        "v2.reference.auc_number",
        "v2.base.auc_number",
    ),
    "written_over_log_odds": (
        "numeric adapter as written, base by its log-odds",
        "v2.reference.auc_decoded",
        "v2.base.auc_number",
    ),
}
# The rows of a kept run: generated ones, and the files of the competition's that it was given.
PLACES = {"": "generated", "dev.": "real", "test.": "of the incident"}
UNCHANGED = "v2"  # the prompt that the variations change
# What is shown of an adapter's training, by what the record beside it calls it.
TRAINED = {
    "prompt": "prompt",
    "rows": "rows",
    "upper layers": "layers",
    "steps": "steps",
    "base, AUC": "held_out log-odds AUC, base",
    "with it, AUC": "held_out log-odds AUC, adapter",
    "gain": "held_out log-odds AUC, gain",
    "new rule: base, AUC": "new_rule log-odds AUC, base",
    "with it there, AUC": "new_rule log-odds AUC, adapter",
    "gain there": "new_rule log-odds AUC, gain",
}
# What is shown of a run.
MADE = ("model", "made on", "device", "dtype", "rows", "records", "minutes", "digest")
KEPT_RUN = ("run", "made on", "commit", "device", "seconds", "digest")
AGAIN = ("model", "asked again on", "commit", "answers, all alike", "log-odds within, nat")
# The day, of a time such as 2026-01-31 20:00 UTC.
DAY = 10


def add_recorded(values: Values, files: Mapping[str, RecordFile]) -> None:
    """Add each record's values under the name of its profile, and tables of all beside each other.

    The words that the reader's own run came to stand beside theirs.
    """
    for name, file in files.items():
        add_records(values, file, prefix=f"{name}.")
        add_gains(values, name, file)
        add_turned(values, name, file)
    values["texts"]["recorded.causes_everywhere"] = "; ".join(find_shared(files)) or "none"
    for prompt, names in PROMPTS.items():
        rows = [row for file in files.values() for row in _systems(file, prompt, names)]
        columns = ("model, rows", "system", *(SHOWN[name] for name in names))
        add_table(values, f"recorded.{prompt}", columns, rows)
    add_table(values, "recorded.runs", MADE, [_made(file, MADE) for file in files.values()])
    add_table(values, "recorded.again", AGAIN, _asked_again(files))
    for name in ("reproduces", "knows"):
        values["verdicts"][f"recorded.{name}_agree"] = _compare_worlds(values, files, name)


def add_gains(values: Values, name: str, file: RecordFile) -> None:
    """Add what each adapter adds to the base alone, on generated and on real rows."""
    measures = {record.key: record for record in file.of(Measure)}
    table: list[list[Cell]] = []
    for key, (title, *sides) in GAINS.items():
        for place in ("", "dev."):
            adapter, base = (_estimate(measures.get(f"{place}{side}")) for side in sides)
            gain = difference_estimate(adapter, base)
            values["measures"][f"{name}.{place}gain.{key}"] = _measured(gain)
            told = [say_estimate(base), say_estimate(adapter), say_estimate(gain, "+z.2f")]
            table.append(["" if place else title, PLACES[place], *told])
    columns = ("what is read", "posts", "base alone", "with it", "difference")
    add_table(values, f"{name}.gains", columns, table)


def add_turned(values: Values, name: str, file: RecordFile) -> None:
    """Add how each change of the prompt's words moves the order of the base's log-odds.

    AUCs count a violation as the higher number, whatever the prompt says of the scale; `turned`
    counts it as the lower one. `gain` is against the unchanged prompt on the same rows.
    """
    asked: dict[str, dict[str, Prediction]] = {}
    for answer in file.of(Prediction):
        if answer.system == "base":
            asked.setdefault(answer.prompt, {})[answer.row_id] = answer
    for prompt, answers in asked.items():
        if f"{name}.variation.{prompt}.auc_number" not in values["measures"]:
            continue
        pairs = [(answer, asked[UNCHANGED][row]) for row, answer in answers.items()]
        labels = [answer.label or 0 for answer, _ in pairs]
        odds = np.array([[a.number_log_odds for a in pair] for pair in pairs], dtype=np.float64)
        after, before = odds.T
        found = {
            "before": auc_estimate(labels, before),
            "turned": auc_estimate(labels, -after),
            "gain": auc_gain_estimate(labels, after, before),
        }
        for key, estimate in found.items():
            values["measures"][f"{name}.variation.{prompt}.{key}"] = _measured(estimate)


def _estimate(found: Measure | None) -> Estimate:
    """A measure of a record as an estimate; one that is not there has no value."""
    if found is None:
        return Estimate(None, None, None, 0)
    return Estimate(found.value, found.low, found.high, found.n or 0)


def _measured(found: Estimate) -> dict[str, Any]:
    """An estimate that is published beside the measures on record."""
    reason = "the record does not hold it"
    return number(found.value, reason=reason) | {"low": found.low, "high": found.high}


def find_shared(files: Mapping[str, RecordFile]) -> list[str]:
    """The causes that gave the whole symptom on each real model that they were injected into."""
    tables = [table for file in files.values() for table in file.of(Table) if table.key == "causes"]
    whole = Counter(str(row[0]) for table in tables for row in table.rows if row[-1] == "yes")
    return [cause for cause, times in whole.items() if times == len(tables)]


def _compare_worlds(values: Values, profiles: Iterable[str], name: str) -> dict[str, str]:
    """Whether all worlds, the reader's own among them, agree on a statement about the base."""
    keys = {profile: f"{profile}.v2.base.{name}" for profile in profiles}
    words = {profile: values["verdicts"][key]["verdict"] for profile, key in keys.items()}
    if not words:
        return {"verdict": "not available", "because": "no run on a real model is on record"}
    own = values["verdicts"].get(f"swap.base.{name}")
    words |= {"this run": own["verdict"]} if own else {}
    told = "; ".join(f"{profile}: {word}" for profile, word in words.items())
    return {"verdict": "holds" if len(set(words.values())) == 1 else "refuted", "because": told}


def add_training(values: Values, case: Case, profiles: Iterable[str]) -> None:
    """Add how each shipped adapter of the profiles was trained, as the record beside it says."""
    rows: list[list[Cell]] = []
    for name in profiles:
        for role, folder in case.profile(name).all_adapters.items():
            record = Path(folder, "training.json")
            if role != "donor" and record.is_file():
                training = json.loads(record.read_text(encoding="utf-8"))
                shown = [_say(training.get(key)) for key in TRAINED.values()]
                rows.append([f"{name}, {Path(folder).name}", *shown])
    add_table(values, "recorded.training", ("adapter", *TRAINED), rows)


def _say(value: Any) -> Cell:
    """An entry of a training's record as a cell."""
    if isinstance(value, dict):
        return say_interval(value["value"], value["low"], value["high"])
    shown: Cell = "–" if value is None else value
    return shown


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


def _systems(file: RecordFile, prompt: str, names: Iterable[str]) -> Iterator[list[Cell]]:
    """A row for each system and set of rows that the record has under a prompt."""
    measures = {record.key: record for record in file.of(Measure)}
    last = f"{prompt}.base.distinct"
    for place in sorted(key.removesuffix(last) for key in measures if key.endswith(last)):
        counted = measures.get(f"{place}rows" if place else f"{prompt}.rows")
        if counted is None:
            continue  # another prompt, whose name ends alike
        kind = PLACES.get(place, place.rstrip("."))
        rows = f"{file.provenance.profile}, {counted.value} {kind}"
        for system in ROLES:
            key = f"{place}{prompt}.{system}"
            distinct = measures.get(f"{key}.distinct")
            if distinct is None or distinct.value is None:
                continue
            found = {name: measures.get(f"{key}.{name}") for name in names}
            if system == "base":
                found |= {"kl": None}  # it is what the others are held against
            yield [rows, system, *(_cell(found[name], name) for name in names)]


def _cell(measure: Measure | None, name: str) -> Cell:
    if measure is None or measure.value is None:
        return "–"
    if measure.low is None or measure.high is None:
        return round(measure.value, 3)
    form = ".2g" if name == "kl" else "z.2f"
    return say_interval(measure.value, measure.low, measure.high, form)


def _made(file: RecordFile, columns: Iterable[str]) -> list[Cell]:
    """Where, when and how a record was made, by these columns."""
    made, aside = file.provenance, file.provenance.aside
    seconds = float(aside["seconds"])
    told: dict[str, Cell] = {
        "run": f"{made.profile}, {file.path.stem}",
        "model": made.profile,
        "made on": str(aside["started"])[:DAY],
        "commit": aside.get("commit", "not noted"),
        "device": f"{made.device}, {aside['hardware']}",
        "dtype": made.dtype,
        "rows": made.parameters.get("rows"),
        "records": len(file.records),
        "seconds": round(seconds),
        "minutes": round(seconds / 60),
        "digest": file.digest,
    }
    return [told[column] for column in columns]


def _asked_again(files: Mapping[str, RecordFile]) -> Iterator[tuple[Cell, ...]]:
    """A row for each record; one that no later run has confirmed says so."""
    for name, file in files.items():
        found = read_confirmation(file)
        if found is None:
            yield name, "not yet", None, None, None
        else:
            gap = f"{found.largest_gap:.1g}"
            yield name, found.made[:DAY], found.commit, found.answers, gap
