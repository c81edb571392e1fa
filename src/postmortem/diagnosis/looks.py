"""What causes look like: the replays that ship with the project, as a table of likelihoods."""

import csv
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from postmortem.case.load import case_digest
from postmortem.case.schema import Case
from postmortem.diagnosis.likelihoods import (
    NO_SEVERITY,
    Experiment,
    Likelihoods,
    measure_likelihoods,
)
from postmortem.experiments.records import (
    Provenance,
    RecordFile,
    Replay,
    Seal,
    find_commit,
    package_versions,
    read_records,
    write_records,
)

SHIPPED = Path(__file__).with_suffix(".jsonl")
REMEDY = "Restore the file, or run `make looks` to make it again."
# What these find follows from the base and the rows, whatever the cause.
ALONE_EXAMS = ("base-alone", "base-ranks")
# Kinds of fault, whose causes call for a look at the same thing.
FAMILIES = {
    "sound": "no fault in the adapter, its base or the prompt",
    "inert": "the adapter changes nothing as it is saved",
    "foreign": "its weights do not belong on this base, or not in this place",
    "incomplete": "the file holds more than the configuration uses, or weights of a base",
    "strong": "its update is too large",
    "weak": "its update is too small",
    "training": "it was trained for something else",
}
# Causes that a case's files cannot show, since they lie in the code that serves the adapter.
SERVING = {
    "no-adapter": "the adapter was never on the model",
    "disabled": "it is loaded and does not answer",
    "parser": "the parser makes the values",
    "prompt-cut": "the prompt is cut on its way to the model",
    "other-template": "the prompt comes in another markup than the model's own",
}


@dataclass(frozen=True)
class Look:
    """What is said of a cause: its family, what it means, what settles it and what to do."""

    cause: str
    family: str
    title: str
    means: str
    settles: str
    remedy: str


class Looks(Likelihoods):
    """A table in which what the base does alone is one quantity for each kind of base."""

    def draw(self, experiment: str, outcome: str, *, draws: int, seed: int) -> np.ndarray:
        """As of any table; what is one quantity is drawn once."""
        drawn = super().draw(experiment, outcome, draws=draws, seed=seed)
        if experiment not in ALONE_EXAMS:
            return drawn
        bases = [hypothesis.base for hypothesis in self.hypotheses]
        return drawn[:, [bases.index(base) for base in bases]]


@cache
def meanings() -> Mapping[str, Look]:
    """What each cause means and what to do, by its name; from looks.csv."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return {row["cause"]: Look(**row) for row in csv.DictReader(file)}


def write_looks(
    path: Path, replays: Iterable[Replay], *, case: Case, worlds: Iterable[int]
) -> Seal:
    """Write replays of embedded worlds, by the worlds' seeds, with what they were made from."""
    seeds = sorted(worlds)
    provenance = Provenance(
        notebook="looks",
        case=case.name,
        profile="embedded",
        parameters={"worlds": ", ".join(map(str, seeds))},
        digests={"case": case_digest(case, "embedded")},
        versions=package_versions(),
        device="cpu",
        dtype="float32",
        seed=seeds[0],
        aside={"made": time.strftime("%Y-%m-%d", time.gmtime()), "commit": find_commit()},
    )
    return write_records(path, provenance, records=replays)


@cache
def read_looks() -> RecordFile:
    """The shipped record; `RecordError` where it is missing or was changed by hand."""
    return read_records(SHIPPED, remedy=REMEDY)


def measure_looks(replays: Iterable[Replay], experiments: Sequence[Experiment]) -> Likelihoods:
    """How often each outcome came up for each cause.

    A replay's seed stands for its world, stage and trained adapter.
    """
    # Whatever was planted on one trained adapter counts as one observation of that cause.
    trials = [replay.model_copy(update={"severity": NO_SEVERITY}) for replay in replays]
    table = measure_likelihoods(trials, experiments)
    return Looks(table.experiments, table.hypotheses, _share_base_counts(table), table.replays)


def _share_base_counts(table: Likelihoods) -> np.ndarray:
    """The counts, where what the base does alone is the same whatever was done to the adapter."""
    counts = table.counts.copy()
    bases = np.array([hypothesis.base for hypothesis in table.hypotheses])
    for name in ALONE_EXAMS:
        if name in table.blocks:
            for base in table.bases:
                rows = bases == base
                counts[rows, table.blocks[name]] = counts[rows, table.blocks[name]].mean(axis=0)
    return counts
