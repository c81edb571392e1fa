"""What a suite keeps: two filters, the ensemble of those that pass, and the files that say so."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import rankdata

from postmortem.case.files import write_text
from postmortem.case.schema import Frozen
from postmortem.checker.errors import RecordError
from postmortem.experiments.metrics import (
    Estimate,
    auc,
    auc_estimate,
    auc_gain_estimate,
    say_estimate,
)
from postmortem.experiments.records import Cell
from postmortem.suite.suite import (
    RESULTS,
    PromptReading,
    Scored,
    SuiteLimits,
    SuitePlan,
    read_result,
)

Verdict = Literal["kept", "dropped", "cannot tell"]
UNKNOWN = Estimate(None, None, None, 0)
# A spreadsheet takes a cell that begins so for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Decided(Frozen):
    """An adapter with what either filter says of it, and why.

    `write_up` tells whether the write-up's filter passes it. The `verdict` "cannot tell" means that
    nothing speaks against it and that the rows cannot show that it ranks.
    """

    scored: Scored
    write_up: bool
    write_up_because: list[str]
    verdict: Verdict
    because: list[str]


class Ensemble(Frozen):
    """The mean of the ranks that some adapters give to the rows.

    `gain_over_best` is the AUC less that of the best single adapter kept, paired by rows; the best
    one is chosen on the rows that it is judged by, which favours it. `held_out` is the same with
    the best one chosen on every second row and both judged on the others.
    """

    members: int
    auc: Estimate
    gain_over_best: Estimate
    held_out: Estimate
    gain_over_base: Estimate


class Results(Frozen):
    """A suite as judged: holds no time and no place, so equal runs give equal files.

    `ensembles` are those of the adapters kept, of those that pass the write-up's filter, and of
    all that answered. `gains` are the AUC of the first less that of either other.
    """

    title: str
    run: str
    judged: str
    rows: int
    labels: Literal["two classes", "one class", "none"]
    decided_by: str
    limits: SuiteLimits
    counts: dict[str, int]
    best_single: str
    best_auc: Estimate
    base: Scored
    ensembles: dict[str, Ensemble]
    gains: dict[str, Estimate]
    adapters: list[Decided]

    @property
    def line(self) -> str:
        """The result in one line."""
        unknown = self.counts["cannot tell"]
        rest = f", {unknown} cannot be told" if unknown else ""
        return (
            f"{len(self.adapters)} adapters, {self.counts['kept']} kept, "
            f"{self.counts['dropped']} dropped{rest}"
        )


def collect(plan: SuitePlan, out: Path, *, into: Path | None = None) -> Results:
    """Decide on the results in the output folder and write the decisions there, or elsewhere.

    Raises `RecordError` where one is missing.
    """
    scored = []
    for entry in (plan.alone, *plan.entries):
        result = read_result(plan, entry, out)
        if result is None:
            raise RecordError(
                out / RESULTS,
                expected=f"a result for each of {len(plan.entries)} adapters",
                found=f"none for {entry.name or 'the base'!r}",
                remedy="Run the suite again.",
            )
        scored.append(result)
    results = decide_suite(
        scored[0],
        scored[1:],
        labels=plan.rows.labels,
        limits=plan.suite.limits,
        title=plan.suite.title,
        decided_by=plan.suite.ask[0],
        run=plan.run,
        judged=plan.judged,
    )
    into = into or out
    write_text(into / "results.csv", as_csv(results))
    write_text(into / "summary.txt", f"suite: {results.line}\n")
    write_text(into / "results.json", results.model_dump_json(indent=1) + "\n")
    return results


def decide_suite(
    base: Scored,
    scored: Sequence[Scored],
    *,
    labels: np.ndarray | None,
    limits: SuiteLimits,
    title: str,
    decided_by: str,
    run: str = "",
    judged: str = "",
) -> Results:
    """Put measured adapters through both filters, and build the ensembles of what passes."""
    adapters = decide_adapters(scored, labels=labels, limits=limits, prompt=decided_by)
    readings = {one.name: one.readings[decided_by] for one in scored if one.status == "ok"}
    odds = {
        name: np.array(reading.log_odds) for name, reading in readings.items() if reading.finite
    }
    finite = [one for one in adapters if one.scored.name in odds]
    groups = {
        # Without labels nothing is kept, and these are whatever nothing speaks against.
        "kept": [one.scored.name for one in finite if one.verdict != "dropped"],
        "write_up": [one.scored.name for one in finite if one.write_up],
        "all": list(odds),
    }
    means = {
        kind: mean_ranks([odds[name] for name in names]) for kind, names in groups.items() if names
    }
    truth = labels if name_labels(labels) == "two classes" else None
    control = np.array(base.readings[decided_by].log_odds, dtype=np.float64)
    kept = {name: odds[name] for name in groups["kept"]}
    best = find_best(kept, truth)
    return Results(
        title=title,
        run=run,
        judged=judged,
        rows=len(control),
        labels=name_labels(labels),
        decided_by=decided_by,
        limits=limits,
        counts=count_verdicts(adapters),
        best_single=best,
        best_auc=readings[best].auc if best else UNKNOWN,
        base=base,
        ensembles={
            kind: Ensemble(
                members=len(groups[kind]),
                auc=UNKNOWN if truth is None else auc_estimate(truth, mean),
                gain_over_best=_gain(truth, mean, kept.get(best)),
                held_out=_gain_held_out(truth, mean, kept),
                gain_over_base=_gain(truth, mean, control),
            )
            for kind, mean in means.items()
        },
        gains={
            f"over_{kind}": _gain(truth, means.get("kept"), means.get(kind))
            for kind in ("write_up", "all")
        },
        adapters=adapters,
    )


def count_verdicts(adapters: Sequence[Decided]) -> dict[str, int]:
    """How many adapters have each verdict, pass the write-up's filter, and failed."""
    return {
        **{word: sum(one.verdict == word for one in adapters) for word in get_args(Verdict)},
        "write_up": sum(one.write_up for one in adapters),
        "failed": sum(one.scored.status == "failed" for one in adapters),
    }


def decide_adapters(
    scored: Sequence[Scored], *, labels: np.ndarray | None, limits: SuiteLimits, prompt: str
) -> list[Decided]:
    """Both verdicts of each adapter; duplicates and directions are seen across all of them."""
    faults = {one.name: list(find_faults(one, limits=limits, prompt=prompt)) for one in scored}
    if name_labels(labels) != "two classes":
        sound = [one for one in scored if not faults[one.name]]
        for name in find_reversed(sound, prompt=prompt):
            faults[name].append("ranks the rows against most of the others")
    sound = [one for one in scored if not faults[one.name]]
    for name, twin in find_duplicates(sound, prompt=prompt, alike=limits.alike.value).items():
        faults[name].append(f"answers as {twin} does")
    unknown = explain_unknown_ranking(labels, limits)
    adapters = []
    for one in scored:
        verdict: Verdict = "dropped"
        because = faults[one.name]
        if not because:
            verdict = "cannot tell" if unknown else "kept"
            because = [unknown or _praise(one.readings[prompt])]
        blocked = apply_write_up(one, limits=limits, prompt=prompt)
        adapters.append(
            Decided(
                scored=one,
                write_up=not blocked,
                write_up_because=blocked,
                verdict=verdict,
                because=because,
            )
        )
    return adapters


def explain_unknown_ranking(labels: np.ndarray | None, limits: SuiteLimits) -> str:
    """Why nobody can tell on these rows whether an adapter ranks; nothing where it can be told."""
    kind = name_labels(labels)
    if labels is not None and kind == "two classes" and len(labels) >= limits.rows.value:
        return ""
    why = {
        "none": "the rows have no labels",
        "one class": "the labels hold one class alone",
        "two classes": f"fewer than {limits.rows.value:g} rows",
    }
    return f"whether it ranks cannot be told: {why[kind]}"


def _praise(reading: PromptReading) -> str:
    """What an adapter is kept for, and whether it is shown to add to its base."""
    adds = reading.gain.low is not None and reading.gain.low > 0
    gain = say_estimate(reading.gain, "+z.3f")
    return f"it ranks; gain over the base alone {gain}{'' if adds else ', not shown to add to it'}"


def apply_write_up(scored: Scored, *, limits: SuiteLimits, prompt: str) -> list[str]:
    """Why the write-up's filter blocks an adapter: it must load, and its values exceed both limits.

    "No mismatch" is taken as the write-up could have seen it: the adapter loads.
    """
    if scored.status == "failed":
        return ["it does not load or answer"]
    reading = scored.readings[prompt]
    return [
        f"{name} {value:.3g}, not above {limit.value:g}"
        for name, value, limit in (
            ("standard deviation", reading.std, limits.std_above),
            ("maximum", reading.maximum, limits.maximum_above),
        )
        if not value > limit.value
    ]


def find_faults(scored: Scored, *, limits: SuiteLimits, prompt: str) -> Iterable[str]:
    """What speaks against an adapter by itself, the most telling first."""
    if scored.errors:
        yield f"the checker found {', '.join(scored.errors)}"
    if scored.status == "failed":
        yield f"it does not load or answer: {scored.message}"
        return
    reading = scored.readings[prompt]
    if not reading.finite or reading.effect is None:
        yield "its log-odds are not all finite"
        return
    if reading.effect <= limits.effect.value:
        yield f"it answers as the base alone does (KL {reading.effect:.1g} nat)"
        return
    yield from _rank_faults(reading, limits)


def _rank_faults(reading: PromptReading, limits: SuiteLimits) -> Iterable[str]:
    ranks, gain, chance = reading.auc, reading.gain, limits.chance.value
    if ranks.low is None or ranks.high is None or ranks.n < limits.rows.value:
        return
    evidence = f"AUC of the log-odds {say_estimate(ranks, 'z.3f')}"
    if reading.auc_written.low is not None and reading.auc_written.low > chance:
        written = say_estimate(reading.auc_written, "z.3f")
        evidence += f", of what it writes {written}: another read-out would rank"
    if ranks.high < chance:
        yield f"it ranks in reverse: {evidence}"
    elif ranks.low <= chance:
        yield f"it is not shown to rank: {evidence}"
    elif gain.high is not None and gain.high < 0:
        yield f"it ranks worse than the base alone: gain {say_estimate(gain, '+z.3f')}, {evidence}"


def find_reversed(scored: Sequence[Scored], *, prompt: str) -> list[str]:
    """Adapters whose ranks run against the mean of the others'; fewer than three tell nothing."""
    if len(scored) < 3:
        return []
    ranks = np.array([rankdata(s.readings[prompt].log_odds) for s in scored])
    ranks -= ranks.mean(axis=1, keepdims=True)
    total = ranks.sum(axis=0)
    against = (ranks * (total - ranks)).sum(axis=1)
    return [s.name for s, product in zip(scored, against, strict=True) if product < 0]


def find_duplicates(scored: Sequence[Scored], *, prompt: str, alike: float) -> dict[str, str]:
    """Adapters whose log-odds all lie within `alike` of an earlier one's, with its name."""
    if not scored:
        return {}
    tree = cKDTree([one.readings[prompt].log_odds for one in scored])
    # The largest number below `alike`, which itself is not near enough.
    radius = np.nextafter(alike, 0)
    twins: dict[int, int] = {}
    for number, odds in enumerate(tree.data):
        near = tree.query_ball_point(odds, radius, p=np.inf, return_sorted=True)
        # Itself at the latest, where no earlier one is near that has no twin.
        twins[number] = next(n for n in near if n == number or twins.get(n) == n)
    return {scored[n].name: scored[twin].name for n, twin in twins.items() if twin != n}


def mean_ranks(odds: Sequence[np.ndarray]) -> np.ndarray:
    """The ensemble: the mean over adapters of each row's rank, as a share of the rows."""
    return np.mean([rankdata(row) / len(row) for row in odds], axis=0)


def find_best(odds: Mapping[str, np.ndarray], truth: np.ndarray | None) -> str:
    """The name with the largest AUC, the first of equals; nothing where there is no AUC."""
    if truth is None or not odds:
        return ""
    return max(odds, key=lambda name: auc(truth, odds[name]) or 0.0)


def _gain(
    truth: np.ndarray | None, scores: np.ndarray | None, control: np.ndarray | None
) -> Estimate:
    if truth is None or scores is None or control is None or not np.isfinite(control).all():
        return UNKNOWN
    return auc_gain_estimate(truth, scores, control)


def _gain_held_out(
    truth: np.ndarray | None, mean: np.ndarray, singles: Mapping[str, np.ndarray]
) -> Estimate:
    if truth is None or not singles:
        return UNKNOWN
    best = find_best({name: odds[::2] for name, odds in singles.items()}, truth[::2])
    return _gain(truth[1::2], mean[1::2], singles[best][1::2])


def name_labels(labels: np.ndarray | None) -> Literal["two classes", "one class", "none"]:
    """What the labels hold, which decides whether a ranking can be judged."""
    if labels is None:
        return "none"
    return "two classes" if len(set(labels.tolist())) > 1 else "one class"


COLUMNS: Mapping[str, Callable[[PromptReading], Cell]] = {
    "mean": lambda r: r.mean,
    "std": lambda r: r.std,
    "min": lambda r: r.minimum,
    "max": lambda r: r.maximum,
    "distinct": lambda r: r.distinct,
    "tied_pairs": lambda r: r.tied_pairs,
    "parsed": lambda r: r.parsed,
    "auc_written": lambda r: r.auc_written.value,
    "auc": lambda r: r.auc.value,
    "auc_low": lambda r: r.auc.low,
    "auc_high": lambda r: r.auc.high,
    "gain": lambda r: r.gain.value,
    "gain_low": lambda r: r.gain.low,
    "gain_high": lambda r: r.gain.high,
    "effect": lambda r: r.effect,
}
HEAD = ("adapter", "verdict", "because", "write_up", "write_up_because", "checker", "findings")


def as_csv(results: Results) -> str:
    """The adapters as CSV, a line for each adapter and prompt; one that failed has one line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*HEAD, "status", "message", "prompt", *COLUMNS])
    for one in results.adapters:
        scored = one.scored
        head = [
            scored.name,
            one.verdict,
            "; ".join(one.because),
            "passed" if one.write_up else "blocked",
            "; ".join(one.write_up_because),
            scored.checker,
            ", ".join(scored.findings),
            scored.status,
            scored.message,
        ]
        for prompt, reading in scored.readings.items() or [("", None)]:
            cells = [value_of(reading) if reading else None for value_of in COLUMNS.values()]
            writer.writerow([*map(safe_cell, [*head, prompt]), *cells])
    return stream.getvalue()


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text
