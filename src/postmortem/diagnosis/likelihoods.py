"""The likelihood table: how often each outcome came up in the replays of each hypothesis.

A hypothesis is a cause on a kind of base: the same fault looks different on a base that gives the
symptom by itself.
"""

import csv
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.special import expit

from postmortem.case.load import case_digest
from postmortem.case.schema import Case
from postmortem.checker.errors import DiagnosisError
from postmortem.experiments.records import (
    Provenance,
    RecordFile,
    Replay,
    Seal,
    digest_files,
    find_commit,
    package_versions,
    read_records,
    read_replays,
    write_records,
)

if TYPE_CHECKING:
    from postmortem.experiments.session import Session

# The weight of the prior on each row of the table, in replays. It is spread as the outcomes of all
# causes are on that kind of base: what most causes do is the best guess for one that was replayed
# too little to tell, and an outcome that none of its replays showed stays possible.
PSEUDO_COUNT = 1.0
# The same where what a test finds follows from the hypothesis: from files, prompts or settings, or
# from what the base does by itself, by which its kind is told. Every replay came out alike then, so
# a few say nearly all, and what none of them showed is left the chance of a form not replayed.
CERTAIN_PSEUDO_COUNT = 0.02
# Two causes are told apart by the battery where it is expected to give the true one this much.
SEPARATION = 0.9
# Enough that the expectation above is good to about 0.01.
SIMULATIONS = 1000

# The test that shows what the base does by itself.
ALONE = "base-alone"
# The cause of a replay in which nothing was injected.
HEALTHY = "healthy"
# The severity of a replay whose cause has no degrees.
NO_SEVERITY = "-"

Group = tuple[str, ...]


class Hypothesis(NamedTuple):
    """A cause on a kind of base."""

    cause: str
    base: str


Labels = Mapping[Hypothesis, str]


@dataclass(frozen=True)
class Experiment:
    """Something one can do, the words for how it can come out, and what it costs in minutes.

    A `pooled` experiment looks at files, prompts or settings alone: what it finds follows from the
    cause, so replays on every kind of base count together.
    """

    name: str
    title: str
    outcomes: tuple[str, ...]
    minutes: float
    pooled: bool = False

    def __post_init__(self) -> None:
        if len(set(self.outcomes)) != len(self.outcomes) or len(self.outcomes) < 2:
            raise DiagnosisError(
                f"experiment {self.name!r}",
                expected="two or more different outcomes",
                found=str(self.outcomes),
            )
        check_weights(f"the minutes of experiment {self.name!r}", {"minutes": self.minutes})


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """How often each outcome came up in the replays of each hypothesis.

    `counts` has a row for each hypothesis and a column for each outcome, the experiments side by
    side. Hypotheses stand in the order in which they first came up.
    """

    experiments: tuple[Experiment, ...]
    hypotheses: tuple[Hypothesis, ...]
    counts: np.ndarray
    replays: int

    @property
    def causes(self) -> Group:
        """The causes, in order."""
        return tuple(dict.fromkeys(h.cause for h in self.hypotheses))

    @property
    def bases(self) -> Group:
        """The kinds of base, in order."""
        return tuple(dict.fromkeys(h.base for h in self.hypotheses))

    @cached_property
    def blocks(self) -> dict[str, slice]:
        """The columns of each experiment, by its name."""
        ends = np.cumsum([len(experiment.outcomes) for experiment in self.experiments]).tolist()
        starts = [0, *ends[:-1]]
        names = [experiment.name for experiment in self.experiments]
        return dict(zip(names, map(slice, starts, ends), strict=True))

    @cached_property
    def same_cause(self) -> np.ndarray:
        """Which hypotheses share their cause: (hypotheses, hypotheses) of bool."""
        causes = np.array([hypothesis.cause for hypothesis in self.hypotheses])
        return np.equal(causes[:, None], causes)

    @cached_property
    def concentrations(self) -> np.ndarray:
        """Parameters of the Dirichlet posterior of each row, shaped as `counts`."""
        sizes = [len(experiment.outcomes) for experiment in self.experiments]
        pooled = np.repeat([experiment.pooled for experiment in self.experiments], sizes)
        counts = np.where(pooled, self.same_cause @ self.counts, self.counts)
        bases = np.array([hypothesis.base for hypothesis in self.hypotheses])
        same_base = np.equal(bases[:, None], bases)
        on_base = same_base / same_base.sum(axis=1, keepdims=True) @ self.counts
        usual = np.where(pooled, self.counts.mean(axis=0), on_base)
        usual += PSEUDO_COUNT / np.repeat(sizes, sizes)
        blocks = [usual[:, block] for block in self.blocks.values()]
        shares = np.hstack([block / block.sum(axis=1, keepdims=True) for block in blocks])
        names = np.repeat([experiment.name for experiment in self.experiments], sizes)
        certain = pooled | (names == ALONE)
        return counts + np.where(certain, CERTAIN_PSEUDO_COUNT, PSEUDO_COUNT) * shares

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Mean P(outcome | hypothesis), shaped as `counts`; above 0 everywhere."""
        blocks = [self.concentrations[:, block] for block in self.blocks.values()]
        return np.hstack([block / block.sum(axis=1, keepdims=True) for block in blocks])

    def of(self, experiment: str) -> np.ndarray:
        """Mean P(outcome | hypothesis) of one experiment: (hypotheses, outcomes)."""
        return self.probabilities[:, self.blocks[self.experiment(experiment).name]]

    def experiment(self, name: str) -> Experiment:
        """The experiment of that name; `DiagnosisError` where there is none."""
        for experiment in self.experiments:
            if experiment.name == name:
                return experiment
        names = ", ".join(self.blocks)
        raise DiagnosisError(f"experiment {name!r}", expected=f"one of {names}", found="no such")

    def column(self, experiment: str, outcome: str) -> int:
        """The column of an outcome; `DiagnosisError` where the experiment cannot have it."""
        known = self.experiment(experiment).outcomes
        if outcome not in known:
            raise DiagnosisError(
                f"experiment {experiment!r}",
                expected=f"an outcome among {', '.join(known)}",
                found=repr(outcome),
            )
        return int(self.blocks[experiment].start) + known.index(outcome)

    def draw(self, experiment: str, outcome: str, *, draws: int, seed: int) -> np.ndarray:
        """P(outcome | hypothesis) as other replays could have given it: (draws, hypotheses).

        One entry of a Dirichlet row has a beta distribution. Each experiment has its own stream of
        random numbers, so that neither the order of the evidence nor other evidence matters.
        """
        asked = self.experiment(experiment)
        block, column = self.blocks[experiment], self.column(experiment, outcome)
        hits = self.concentrations[:, column]
        others = self.concentrations[:, block].sum(axis=1) - hits
        stream = np.random.default_rng([seed, block.start])
        drawn = stream.beta(hits, others, size=(draws, len(hits)))
        # What is pooled is one quantity, and is drawn once.
        return drawn[:, self.same_cause.argmax(axis=0)] if asked.pooled else drawn


def measure_likelihoods(
    replays: Sequence[Replay], experiments: Sequence[Experiment]
) -> Likelihoods:
    """Count outcomes in replays; an experiment that a replay did not run counts nowhere.

    Replays of one cause at one severity repeat one change, and come out much alike: together they
    count as one observation, whatever their number. Where a cause has no severity, each seed does.
    What a replay ran beyond `experiments` is left aside. Raises `DiagnosisError` without replays
    or experiments, and for an outcome that an experiment does not have.
    """
    _check_unique("experiments", [experiment.name for experiment in experiments])
    _check_unique("replays", [replay.key for replay in replays])
    hypotheses = tuple(dict.fromkeys(hypothesis_of(replay) for replay in replays))
    width = sum(len(experiment.outcomes) for experiment in experiments)
    counts = np.zeros((len(hypotheses), width))
    table = Likelihoods(tuple(experiments), hypotheses, counts, len(replays))
    rows = {hypothesis: row for row, hypothesis in enumerate(hypotheses)}
    sizes = Counter(map(_cluster, replays))
    for replay in replays:
        for name, outcome in replay.outcomes.items():
            if name in table.blocks:
                column = table.column(name, outcome)
                counts[rows[hypothesis_of(replay)], column] += 1 / sizes[_cluster(replay)]
    return table


def _cluster(replay: Replay) -> tuple[Hypothesis, str | int]:
    """What a replay repeats."""
    alone = replay.severity == NO_SEVERITY
    return hypothesis_of(replay), replay.seed if alone else replay.severity


def hypothesis_of(replay: Replay) -> Hypothesis:
    """What a replay is an example of."""
    return Hypothesis(replay.cause, replay.base)


def by_cause(likelihoods: Likelihoods) -> dict[Hypothesis, str]:
    """Label each hypothesis with its cause."""
    return {hypothesis: hypothesis.cause for hypothesis in likelihoods.hypotheses}


def by_base(likelihoods: Likelihoods) -> dict[Hypothesis, str]:
    """Label each hypothesis with its kind of base."""
    return {hypothesis: hypothesis.base for hypothesis in likelihoods.hypotheses}


def by_group(likelihoods: Likelihoods, groups: Iterable[Group]) -> dict[Hypothesis, str]:
    """Label each hypothesis with its group of causes; `DiagnosisError` for a cause in none."""
    names = {cause: group_name(group) for group in groups for cause in group}
    missing = [cause for cause in likelihoods.causes if cause not in names]
    if missing:
        raise DiagnosisError("the groups", expected=f"{missing[0]!r} in one", found="it in none")
    return {hypothesis: names[hypothesis.cause] for hypothesis in likelihoods.hypotheses}


def group_name(group: Group) -> str:
    """A group of causes in words."""
    return " or ".join(group)


def memberships(likelihoods: Likelihoods, labels: Labels) -> tuple[tuple[str, ...], np.ndarray]:
    """The labels in order, and which hypotheses bear each: (labels, hypotheses) of bool.

    A hypothesis without a label raises `DiagnosisError`.
    """
    for hypothesis in likelihoods.hypotheses:
        if hypothesis not in labels:
            raise DiagnosisError("the labels", expected=f"one for {hypothesis}", found="none")
    each = [labels[hypothesis] for hypothesis in likelihoods.hypotheses]
    places = {name: place for place, name in enumerate(dict.fromkeys(each))}
    codes = np.array([places[name] for name in each])
    return tuple(places), codes == np.arange(len(places))[:, None]


def separation(
    likelihoods: Likelihoods, *, simulations: int = SIMULATIONS, seed: int = 0
) -> np.ndarray:
    """How far the whole battery is expected to tell each two causes apart: (causes, causes).

    An entry is the expected posterior probability of the true one of the two, both equally
    probable before and the kind of base unknown: 0.5 says nothing, 1 decides. It is a mean over
    simulated outcomes of all experiments; all hypotheses share the random numbers, stratified
    within each experiment, so that equal causes give 0.5 and names do not matter.
    """
    strata = np.tile((np.arange(simulations) + 0.5) / simulations, (len(likelihoods.blocks), 1))
    numbers = np.random.default_rng(seed).permuted(strata, axis=1)
    shape = (simulations, len(likelihoods.hypotheses))
    outcomes = np.zeros((*shape, likelihoods.counts.shape[1]))
    for block, uniform in zip(likelihoods.blocks.values(), numbers, strict=True):
        limits = likelihoods.probabilities[:, block].cumsum(axis=1)[:, :-1]
        picked = (uniform[:, None, None] >= limits).sum(axis=2)
        np.put_along_axis(outcomes[:, :, block], picked[:, :, None], 1.0, axis=2)
    # (simulations, true hypothesis, hypothesis), then the last axis by cause.
    logs = outcomes @ np.log(likelihoods.probabilities).T
    _, members = memberships(likelihoods, by_cause(likelihoods))
    shares = np.log(members.sum(axis=1))
    by = (
        np.stack([np.logaddexp.reduce(logs[:, :, own], axis=2) for own in members], axis=2) - shares
    )
    truth = members.argmax(axis=0)
    own = by[:, np.arange(len(truth)), truth]
    right = expit(own[:, :, None] - by).mean(axis=0)
    by_truth = members / members.sum(axis=1, keepdims=True) @ right
    return (by_truth + by_truth.T) / 2


def separable_groups(
    likelihoods: Likelihoods, *, limit: float = SEPARATION, seed: int = 0
) -> tuple[Group, ...]:
    """Causes merged where the whole battery cannot tell them apart, in the order of the table.

    Two causes are merged where their `separation` is below the limit, nearest first, and a group
    takes in only what cannot be told from any of its members (complete linkage).
    """
    found = separation(likelihoods, seed=seed)
    return link(likelihoods.causes, found, found < limit)


def link(names: Group, gaps: np.ndarray, joins: np.ndarray) -> tuple[Group, ...]:
    """Complete linkage: nearest first by `gaps`, where `joins` allows all pairs of a group."""
    if len(names) < 2:
        return tuple((name,) for name in names)
    limit = gaps.max() + 1.0
    gaps = np.where(joins, gaps, 2 * limit)
    np.fill_diagonal(gaps, 0.0)
    tree = linkage(squareform(gaps, checks=False), "complete")
    labels = fcluster(tree, limit, "distance").tolist()
    pairs = list(zip(names, labels, strict=True))
    return tuple(
        tuple(name for name, other in pairs if other == label) for label in dict.fromkeys(labels)
    )


def check_weights(subject: str, weights: Mapping[str, float]) -> None:
    """Raise `DiagnosisError` for a weight that is negative or not finite."""
    for name, weight in weights.items():
        if not (np.isfinite(weight) and weight >= 0):
            raise DiagnosisError(
                subject, expected="finite numbers from 0", found=f"{name}: {weight}"
            )


def _check_unique(subject: str, names: list[str]) -> None:
    if not names:
        raise DiagnosisError(f"the {subject}", expected="one or more", found="none")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DiagnosisError(f"the {subject}", expected="different names", found=f"{name!r} twice")


def open_replays(session: "Session") -> list[Replay]:
    """The kept replays of every training of the world, which the session then names as an input.

    A key begins with the training's seed. Raises `RecordError` as `read_replays` does.
    """
    files = read_replays(session.case)
    session.replays = digest_files(files)
    return list_replays(files)


def list_replays(files: Sequence[RecordFile]) -> list[Replay]:
    """The replays of worlds trained apart, each key with the seed of its world before it.

    Of several worlds a replay's seed is that of its world; in one alone another seed is another
    training of the adapters.
    """
    replays = []
    for file in files:
        for replay in file.of(Replay):
            seed = file.provenance.seed if len(files) > 1 else replay.seed
            key = f"{file.provenance.seed}.{replay.key}"
            replays.append(replay.model_copy(update={"seed": seed, "key": key}))
    return replays


SHIPPED = Path(__file__).with_name("cause_profiles.jsonl")
REMEDY = "Restore the file, or run `make cause-profiles` to make it again."
# What these find follows from the base and the rows, whatever the cause.
ALONE_TESTS = (ALONE, "base-ranks")
# Causes that lie in the base or in the prompt, which the base alone shows as well.
SHOWN_ALONE = ("merged-twice", "other-markup")
# Kinds of fault, whose causes call for a look at the same thing.
FAMILIES = {
    "sound": "no fault in the adapter, its base or the prompt",
    "inert": "the adapter changes nothing as it is saved",
    "foreign": "its weights have nothing to do with this base, or stand in the wrong place",
    "incomplete": "part of the adapter is missing, or the file brings weights of a base along",
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
    "other-template": "the prompt comes in another markup than here",
}


@dataclass(frozen=True)
class Meaning:
    """What is said of a cause: its family, what it means, what settles it and what to do.

    `reported` public threads had this cause, of those that were read; `threads` names them.
    """

    cause: str
    family: str
    title: str
    means: str
    settles: str
    remedy: str
    reported: int
    threads: str


# The weight, in replays, of what a cause does on other bases on what it does on one; that of what
# other causes do on this base; and that of the latter where the base cannot matter, since what the
# files or their loading show follows from the cause.
OTHER_BASES, OTHER_CAUSES, ANYTHING = 2.0, 1.0, 0.1


class CauseProfiles(Likelihoods):
    """A table of causes that were each replayed on few bases of a kind.

    A cause does on one kind of base about what it does on the others, and where it was seen too
    little to tell, what other causes do. What the base does alone is one quantity for each kind.
    """

    @cached_property
    def concentrations(self) -> np.ndarray:
        """Parameters of the Dirichlet posterior of each row, shaped as `counts`."""
        same_cause = self.same_cause.astype(float)
        bases = np.array([hypothesis.base for hypothesis in self.hypotheses])
        same_base = np.equal(bases[:, None], bases).astype(float)
        shares = [h.cause not in SHOWN_ALONE for h in self.hypotheses]
        found = np.zeros_like(self.counts)
        for experiment in self.experiments:
            block = self.blocks[experiment.name]
            counts = self.counts[:, block]
            anywhere = counts.sum(axis=0) + 1 / counts.shape[1]
            usual = _shares(same_base @ counts + _shares(anywhere))
            of_cause = same_cause @ counts
            if experiment.pooled:
                found[:, block] = of_cause + ANYTHING * usual
            else:
                found[:, block] = counts + OTHER_BASES * _shares(of_cause + OTHER_CAUSES * usual)
            if experiment.name in ALONE_TESTS:
                found[shares, block] = (counts + OTHER_BASES * usual)[shares]
        return found

    def draw(self, experiment: str, outcome: str, *, draws: int, seed: int) -> np.ndarray:
        """As of any table; what is one quantity is drawn once."""
        drawn = super().draw(experiment, outcome, draws=draws, seed=seed)
        if experiment not in ALONE_TESTS:
            return drawn
        first: dict[str, int] = {}
        own = []
        for place, (cause, base) in enumerate(self.hypotheses):
            is_shared = cause not in SHOWN_ALONE
            own.append(first.setdefault(base, place) if is_shared else place)
        return drawn[:, own]


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(axis=-1, keepdims=True)


@cache
def meanings() -> Mapping[str, Meaning]:
    """What each cause means and what to do, by its name; from cause_profiles.csv."""
    with Path(__file__).with_name("cause_profiles.csv").open(encoding="utf-8", newline="") as file:
        read: Iterable[dict[str, Any]] = csv.DictReader(file)
        found = [Meaning(**{**row, "reported": int(row["reported"])}) for row in read]
        return {meaning.cause: meaning for meaning in found}


def write_profiles(
    path: Path, replays: Iterable[Replay], *, case: Case, worlds: Iterable[int]
) -> Seal:
    """Write replays of embedded worlds, by the worlds' seeds, with what they were made from."""
    seeds = sorted(worlds)
    provenance = Provenance(
        notebook="cause_profiles",
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
def read_profiles() -> RecordFile:
    """The shipped record; `RecordError` where it is missing or was changed by hand."""
    return read_records(SHIPPED, remedy=REMEDY)


def measure_profiles(replays: Iterable[Replay], experiments: Sequence[Experiment]) -> Likelihoods:
    """How often each outcome came up for each cause.

    A replay's seed stands for its world, stage and trained adapter.
    """
    # Whatever was planted on one trained adapter counts as one observation of that cause.
    trials = [replay.model_copy(update={"severity": NO_SEVERITY}) for replay in replays]
    table = measure_likelihoods(trials, experiments)
    return CauseProfiles(
        table.experiments, table.hypotheses, _share_base_counts(table), table.replays
    )


def _share_base_counts(table: Likelihoods) -> np.ndarray:
    """The counts, where what the base does alone is the same whatever was done to the adapter."""
    counts = table.counts.copy()
    of = {
        base: [place for place, h in enumerate(table.hypotheses) if h.base == base]
        for base in table.bases
    }
    for name in ALONE_TESTS:
        if name in table.blocks:
            for places in of.values():
                rows = [p for p in places if table.hypotheses[p].cause not in SHOWN_ALONE]
                counts[rows, table.blocks[name]] = counts[rows, table.blocks[name]].mean(axis=0)
    return counts
