"""What to run next: the most expected information for each minute."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from postmortem.diagnosis import Ledger
from postmortem.errors import DiagnosisError
from postmortem.likelihoods import Experiment, Labels, memberships

# Bits. A hundred experiments that gain no more would together settle one yes-or-no question.
SMALL_GAIN = 0.01
# A branch with less uncertainty than this left, in bits weighted by its probability, is not
# followed further: no experiment can gain more from it.
NEGLIGIBLE = 1e-9
# At most so many branches are followed, those with the most uncertainty left.
BRANCHES = 16384


@dataclass(frozen=True)
class Step:
    """One experiment of a plan and what is expected of it, given those before it.

    `bits`: expected information about the answer. `entropy` (bits): expected uncertainty left;
    `leading`: expected probability of the then leading answer, which is the probability that it is
    right. `unfollowed`: bits of the uncertainty left in branches that are no longer split, by which
    later gains may be understated.
    """

    experiment: str
    bits: float
    minutes: float
    total_minutes: float
    entropy: float
    leading: float
    unfollowed: float


@dataclass(frozen=True)
class Plan:
    """Experiments in order, with the uncertainty (bits) and the leading answer before the first."""

    entropy: float
    leading: float
    steps: tuple[Step, ...]

    @property
    def bits(self) -> float:
        """Expected information of the whole."""
        return sum(step.bits for step in self.steps)

    @property
    def minutes(self) -> float:
        """What the whole costs."""
        return sum(step.minutes for step in self.steps)


@dataclass(frozen=True, eq=False)
class _Branches:
    """What may have been seen so far: a row of joint weights of the hypotheses for each way.

    What is no longer split is kept as its share of the entropy and of the leading probability.
    """

    joint: np.ndarray
    members: np.ndarray
    settled_entropy: float = 0.0
    settled_leading: float = 0.0

    @property
    def masses(self) -> np.ndarray:
        """Joint weight of each answer: (branches, answers)."""
        return self.joint @ self.members.T

    @property
    def entropies(self) -> np.ndarray:
        """Uncertainty about the answer in each branch, in bits weighted by its probability."""
        masses = self.masses
        left = entr(masses).sum(axis=1) - entr(masses.sum(axis=1))
        return np.maximum(left, 0.0) / np.log(2)

    @property
    def entropy(self) -> float:
        return float(self.entropies.sum()) + self.settled_entropy

    @property
    def leading(self) -> float:
        return float(self.masses.max(axis=1).sum()) + self.settled_leading

    def split(self, likelihood: np.ndarray) -> "_Branches":
        """One more experiment, from its likelihood (hypotheses, outcomes)."""
        joint = (self.joint[:, None, :] * likelihood.T).reshape(-1, self.joint.shape[1])
        return _Branches(joint, self.members, self.settled_entropy, self.settled_leading)

    def gain(self, likelihood: np.ndarray) -> float:
        """Expected information of one more experiment about the answer, in bits."""
        # Rounding may leave it just below 0, which it cannot be.
        return max(self.entropy - self.split(likelihood).entropy, 0.0)

    def settled(self) -> "_Branches":
        """The same, with branches set aside in which there is little left to learn."""
        entropies = self.entropies
        order = np.argsort(-entropies, kind="stable")
        kept = order[: min(BRANCHES, int((entropies > NEGLIGIBLE).sum()))]
        aside = np.setdiff1d(order, kept)
        return _Branches(
            self.joint[kept],
            self.members,
            self.settled_entropy + float(entropies[aside].sum()),
            self.settled_leading + float(self.masses[aside].max(axis=1).sum()),
        )


def plan(
    ledger: Ledger,
    labels: Labels,
    *,
    minutes: float | None = None,
    candidates: Collection[str] | None = None,
) -> Plan:
    """Choose, step by step, the experiment with the most expected bits a minute.

    `labels` says which answer each hypothesis is: the cause, its group, the kind of base, or any
    other. The information is about the answer, exact over the joint outcomes of the experiments
    planned before. Candidates are the experiments not observed yet, or those of them that are
    named. An experiment that does not fit in the `minutes` left is skipped; the plan ends where
    nothing gains more than `SMALL_GAIN`. No step is dominated: no other candidate gains at least as
    much for no more minutes. It is greedy: two experiments that say something only together are not
    found. The order is fixed beforehand; with a new outcome, plan again.
    """
    table = ledger.likelihoods
    named = set(table.blocks if candidates is None else candidates)
    for name in named:
        table.experiment(name)
    open_ = [e for e in table.experiments if e.name in named - set(ledger.observed)]
    start = branches = _start(ledger, labels)
    steps: list[Step] = []
    spent = 0.0
    while True:
        fitting = [e for e in open_ if minutes is None or spent + e.minutes <= minutes]
        gains = {e.name: branches.gain(table.of(e.name)) for e in fitting}
        worth = [e for e in fitting if gains[e.name] > SMALL_GAIN]
        if not worth:
            return Plan(start.entropy, start.leading, tuple(steps))
        best = max(worth, key=lambda e: _rate(gains[e.name], e.minutes))
        branches = branches.split(table.of(best.name)).settled()
        spent += best.minutes
        steps.append(_step(best, gains[best.name], branches, spent))
        open_.remove(best)


def price(ledger: Ledger, path: Sequence[str], *, labels: Labels) -> Plan:
    """A given order of experiments in the currency of `plan`: bits about the answer, and minutes.

    Raises `DiagnosisError` for an experiment that is unknown, named twice, or observed already.
    """
    _check_path(ledger, path)
    start = branches = _start(ledger, labels)
    steps: list[Step] = []
    spent = 0.0
    for name in path:
        experiment = ledger.likelihoods.experiment(name)
        likelihood = ledger.likelihoods.of(name)
        gain = branches.gain(likelihood)
        branches = branches.split(likelihood).settled()
        spent += experiment.minutes
        steps.append(_step(experiment, gain, branches, spent))
    return Plan(start.entropy, start.leading, tuple(steps))


def _start(ledger: Ledger, labels: Labels) -> _Branches:
    _, members = memberships(ledger.likelihoods, labels)
    return _Branches(ledger.weights[None], members.astype(float))


def _rate(bits: float, minutes: float) -> tuple[float, float, float]:
    """The order of preference; what dominates another comes first in every entry."""
    return (bits / minutes if minutes else np.inf, bits, -minutes)


def _step(experiment: Experiment, bits: float, branches: _Branches, spent: float) -> Step:
    return Step(
        experiment.name,
        bits,
        experiment.minutes,
        spent,
        branches.entropy,
        branches.leading,
        branches.settled_entropy,
    )


def _check_path(ledger: Ledger, path: Sequence[str]) -> None:
    for place, name in enumerate(path):
        ledger.likelihoods.experiment(name)
        if name in ledger.observed or name in path[:place]:
            raise DiagnosisError(
                f"experiment {name!r}",
                expected="not run before",
                found="it was observed or planned",
            )
