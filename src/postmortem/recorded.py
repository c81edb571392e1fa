"""Values for the book from the runs that are kept with the project."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from postmortem.case import Case
from postmortem.kept import read_confirmation
from postmortem.metrics import say_interval
from postmortem.records import Cell, Measure, RecordFile, Table, Text, Verdict
from postmortem.values import Values, add_table

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
        _place(values, file, prefix=f"{name}.")
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
        _place(values, file, prefix="")


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
        _place(values, file, prefix="")
        values["texts"]["bench.profile"] = profile
        add_table(values, "bench.run", RUN_COLUMNS, [_run(file)])


def _place(values: Values, file: RecordFile, *, prefix: str) -> None:
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
