"""How far the diagnosis can be trusted: replays that it did not learn from, diagnosed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from postmortem.diagnosis import Ledger
from postmortem.errors import DiagnosisError
from postmortem.likelihoods import (
    HEALTHY,
    NO_SEVERITY,
    Experiment,
    Group,
    Likelihoods,
    by_base,
    by_cause,
    by_group,
    group_name,
    measure_likelihoods,
    separable_groups,
)
from postmortem.metrics import Estimate, mean_estimate, rate_estimate
from postmortem.records import Replay

# Narrow where it matters: what is said with near certainty must be right nearly always.
BIN_EDGES = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Bin:
    """Diagnoses whose leading group had a probability above `low` and up to `high`.

    `predicted` is its mean, None in an empty bin; `right` the share that was right.
    """

    low: float
    high: float
    predicted: float | None
    right: Estimate


@dataclass(frozen=True)
class Miss:
    """A replay whose leading group does not hold its cause, and the probability it was given."""

    key: str
    cause: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Evaluation:
    """What diagnoses of replays that were left out came to.

    `accuracy` is the share whose leading group holds the cause, `base_accuracy` the share whose
    leading kind of base is right. Each part of the replays has groups of its own,
    `fewest_groups` at least: what is left to learn from tells fewer causes apart. `groups` are
    those of all replays, for display: `confusion` counts by the truth (rows) and the prediction
    (columns), a right diagnosis on the diagonal, a wrong one under the group of its most
    probable cause. `false_alarms` is the share of healthy replays taken for a fault,
    `false_alarm_count` their number. `brier` is the multi-class score: 0 is perfect, 2 is
    certain and wrong. Intervals take the replays as independent; those of one seed share a
    base, so they are somewhat too narrow.
    """

    groups: tuple[Group, ...]
    fewest_groups: int
    accuracy: Estimate
    base_accuracy: Estimate
    confusion: tuple[tuple[int, ...], ...]
    false_alarms: Estimate
    false_alarm_count: int
    brier: Estimate
    bins: tuple[Bin, ...]
    misses: tuple[Miss, ...]


@dataclass(frozen=True)
class _Diagnosis:
    replay: Replay
    predicted: Group
    cause: str
    base: str
    probability: float
    brier: float

    @property
    def right(self) -> bool:
        return self.replay.cause in self.predicted


@dataclass(frozen=True, eq=False)
class _Fold:
    """Replays of one seed and severity, and the table of those they may learn from."""

    table: Likelihoods
    replays: tuple[Replay, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return separable_groups(self.table)

    def diagnose(self, subset: Collection[str]) -> list[_Diagnosis]:
        """Diagnose each replay from a flat prior and what it ran of the subset."""
        found = []
        for replay in self.replays:
            seen = {name: replay.outcomes[name] for name in subset if name in replay.outcomes}
            found.append(self._judge(replay, Ledger(self.table, seen)))
        return found

    def _judge(self, replay: Replay, ledger: Ledger) -> _Diagnosis:
        causes, bases = (ledger.marginal(by(self.table)) for by in (by_cause, by_base))
        named = ledger.marginal(by_group(self.table, self.groups))
        probabilities = np.array([named[group_name(group)] for group in self.groups])
        truth = np.array([replay.cause in group for group in self.groups])
        leading = self.groups[int(probabilities.argmax())]
        return _Diagnosis(
            replay=replay,
            predicted=leading,
            cause=max(leading, key=causes.__getitem__),
            base=max(bases, key=bases.__getitem__),
            probability=float(probabilities.max()),
            brier=float(((probabilities - truth) ** 2).sum()),
        )


def leave_out(
    replays: Sequence[Replay],
    experiments: Sequence[Experiment],
    *,
    subset: Collection[str] | None = None,
) -> Evaluation:
    """Diagnose each replay from those with another seed and another severity.

    A replay whose cause has no severity ("-") need only differ in seed, and one learnt from may
    have none. Likelihoods and groups are made anew from what may be learnt from; the prior is flat.
    All experiments that the replay ran are observed, or only those of a `subset`; groups are those
    of the whole battery all the same, so that a poorer battery is not asked an easier question.
    Raises `DiagnosisError` where a replay has no other to learn its cause from, as with one seed.
    """
    chosen = [experiment.name for experiment in experiments] if subset is None else subset
    full = measure_likelihoods(replays, experiments)
    for name in chosen:
        full.experiment(name)
    return _evaluate(full, _fold(replays, experiments), subset=chosen)


def leave_out_subsets(
    replays: Sequence[Replay],
    experiments: Sequence[Experiment],
    *,
    subsets: Mapping[str, Collection[str]],
) -> dict[str, Evaluation]:
    """`leave_out` with each of several subsets of the battery, by their names."""
    full, folds = measure_likelihoods(replays, experiments), _fold(replays, experiments)
    return {name: _evaluate(full, folds, subset=subset) for name, subset in subsets.items()}


def _fold(replays: Sequence[Replay], experiments: Sequence[Experiment]) -> list[_Fold]:
    held_out: dict[tuple[int, str], list[Replay]] = {}
    for replay in replays:
        held_out.setdefault((replay.seed, replay.severity), []).append(replay)
    folds = []
    for (seed, severity), own in held_out.items():
        others = [
            replay
            for replay in replays
            if replay.seed != seed
            and (replay.severity != severity or replay.severity == NO_SEVERITY)
        ]
        known = {replay.cause for replay in others}
        for replay in own:
            if replay.cause not in known:
                raise DiagnosisError(
                    f"replay {replay.key!r}",
                    expected="its cause replayed with another seed and another severity",
                    found=f"none beside seed {seed} and severity {severity!r}",
                    remedy="Replay it with more seeds, or give a cause without degrees '-'.",
                )
        folds.append(_Fold(measure_likelihoods(others, experiments), tuple(own)))
    return folds


def _evaluate(full: Likelihoods, folds: Sequence[_Fold], *, subset: Collection[str]) -> Evaluation:
    found = [diagnosis for fold in folds for diagnosis in fold.diagnose(subset)]
    groups = separable_groups(full)
    place = {cause: row for row, group in enumerate(groups) for cause in group}
    confusion = np.zeros((len(groups), len(groups)), dtype=int)
    for one in found:
        row = place[one.replay.cause]
        confusion[row, row if one.right else place[one.cause]] += 1
    healthy = [one.right for one in found if one.replay.cause == HEALTHY]
    alarms = healthy.count(False)
    return Evaluation(
        groups=groups,
        fewest_groups=min(len(fold.groups) for fold in folds),
        accuracy=_share(one.right for one in found),
        base_accuracy=_share(one.base == one.replay.base for one in found),
        confusion=tuple(map(tuple, confusion.tolist())),
        false_alarms=rate_estimate(alarms, len(healthy)),
        false_alarm_count=alarms,
        brier=mean_estimate([one.brier for one in found]),
        bins=tuple(_bin(found, *edges) for edges in pairwise(BIN_EDGES)),
        misses=tuple(
            Miss(one.replay.key, one.replay.cause, group_name(one.predicted), one.probability)
            for one in found
            if not one.right
        ),
    )


def _bin(found: Sequence[_Diagnosis], low: float, high: float) -> Bin:
    inside = [one for one in found if low < one.probability <= high]
    mean = float(np.mean([one.probability for one in inside])) if inside else None
    return Bin(low, high, mean, _share(one.right for one in inside))


def _share(right: Iterable[bool]) -> Estimate:
    each = list(right)
    return rate_estimate(sum(each), len(each))
