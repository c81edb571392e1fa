"""From evidence to beliefs: the ledger, the next test, how far a posterior can be trusted."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy.special import entr

from postmortem.case.schema import Case
from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.causes import CAUSES
from postmortem.diagnosis.likelihoods import (
    HEALTHY,
    NO_SEVERITY,
    Experiment,
    Group,
    Hypothesis,
    Labels,
    Likelihoods,
    by_base,
    by_cause,
    by_group,
    check_weights,
    group_name,
    link,
    measure_likelihoods,
    memberships,
    separable_groups,
)
from postmortem.diagnosis.symptom import TESTS, experiments_of
from postmortem.experiments.metrics import (
    Estimate,
    kl_divergence,
    mean_estimate,
    rate_estimate,
    say_estimate,
)
from postmortem.experiments.records import Replay
from postmortem.experiments.session import Session

# An outcome less probable than this is inconsistent with a hypothesis. With one replay's worth of
# prior that is an outcome which none of five replays showed; one seen once in ten is consistent.
INCONSISTENT_BELOW = 0.1
# Half a power of ten: Jeffreys calls a Bayes factor up to it barely worth mentioning.
SMALL_LOG10_FACTOR = 0.5
DRAWS = 2000
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Prior:
    """What is believed before any evidence, as weights from 0; a cause not named has none.

    The weights of the base kinds are shared out, for each cause, among those it was replayed on,
    so that each cause has its own prior; one replayed on none with weight has none. A mapping of
    None: all weigh the same. Weights are only compared: they need not sum to one.
    """

    causes: Mapping[str, float] | None = None
    bases: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, weights in (("causes", self.causes), ("base kinds", self.bases)):
            if weights is not None:
                check_weights(f"the prior of the {name}", weights)
                if not sum(weights.values()) > 0:
                    raise DiagnosisError(
                        f"the prior of the {name}", expected="a weight above 0", found=str(weights)
                    )


@dataclass(frozen=True, eq=False)
class Posterior:
    """Beliefs after the evidence.

    `weights` holds the probability of each hypothesis. It needs no draws: the mean likelihood is
    exactly what a Dirichlet posterior predicts for one more outcome. `samples`, (draws,
    hypotheses), holds what the probabilities would be had other replays been drawn.
    """

    likelihoods: Likelihoods
    weights: np.ndarray
    samples: np.ndarray

    def marginal(self, labels: Labels) -> dict[str, Estimate]:
        """Probability of each label, with the 95 % interval due to the number of replays."""
        names, members = memberships(self.likelihoods, labels)
        values = np.minimum(self.weights @ members.T, 1.0)
        low, high = np.quantile(np.minimum(self.samples @ members.T, 1.0), [0.025, 0.975], axis=0)
        # The mean of a skewed distribution may lie beyond its quantiles.
        low, high = np.minimum(low, values), np.maximum(high, values)
        rows = zip(values.tolist(), low.tolist(), high.tolist(), strict=True)
        estimates = [Estimate(*row, n=self.likelihoods.replays) for row in rows]
        return dict(zip(names, estimates, strict=True))

    @property
    def causes(self) -> dict[str, Estimate]:
        """Probability of each cause."""
        return self.marginal(by_cause(self.likelihoods))

    @property
    def bases(self) -> dict[str, Estimate]:
        """Probability of each kind of base."""
        return self.marginal(by_base(self.likelihoods))


@dataclass(frozen=True)
class Evidence:
    """What one observed outcome did to the beliefs held before it.

    `bits` is the information it gave about the cause: the divergence of the beliefs after from
    those before. `weights` holds the weight of evidence for each cause: the log10 likelihood ratio
    against the others, averaged as they were believed then. Above 0 speaks for it, below against
    it; None where the prior had already decided.
    """

    experiment: str
    outcome: str
    bits: float
    weights: dict[str, float | None]


@dataclass(frozen=True)
class Standing:
    """How a cause stands against the evidence on the kind of base where it stands best."""

    cause: str
    base: str
    inconsistent: tuple[str, ...]
    log10_likelihood: float


@dataclass(frozen=True)
class Span:
    """The posterior of a cause under several priors: its extremes, and each by the prior's name."""

    low: float
    high: float
    by_prior: dict[str, float]


@dataclass(frozen=True, eq=False)
class Ledger:
    """A prior, the likelihoods, and the outcomes observed, in order (experiment to outcome).

    Raises `DiagnosisError` for a cause or base kind that no replay has, and an outcome that no
    experiment has. A cause whose prior is 0 keeps the posterior 0 whatever is observed.
    """

    likelihoods: Likelihoods
    observed: Mapping[str, str] = field(default_factory=dict)
    prior: Prior = Prior()

    def __post_init__(self) -> None:
        known = {"cause": self.likelihoods.causes, "base kind": self.likelihoods.bases}
        for (kind, names), weights in zip(
            known.items(), (self.prior.causes, self.prior.bases), strict=True
        ):
            for name in weights or ():
                if name not in names:
                    expected = f"a {kind} of the replays: {', '.join(names)}"
                    raise DiagnosisError("the prior", expected=expected, found=repr(name))
        _ = self.log_prior, self.columns

    def observe(self, experiment: str, outcome: str) -> "Ledger":
        """The ledger with one more outcome, or another one of an experiment seen before."""
        return replace(self, observed={**self.observed, experiment: outcome})

    @cached_property
    def columns(self) -> list[int]:
        """The columns of the observed outcomes in the table."""
        return [self.likelihoods.column(*pair) for pair in self.observed.items()]

    @cached_property
    def base_shares(self) -> np.ndarray:
        """Log P(base kind | cause) of each hypothesis."""
        hypotheses, bases = self.likelihoods.hypotheses, self.prior.bases
        weights = np.array([1.0 if bases is None else bases.get(h.base, 0.0) for h in hypotheses])
        _, members = memberships(self.likelihoods, by_cause(self.likelihoods))
        logs = _log(weights)
        totals = _within(logs, members)[members.argmax(axis=0)]
        none = np.full(logs.shape, -np.inf)
        return np.subtract(logs, totals, out=none, where=~np.isneginf(totals))

    @cached_property
    def log_prior(self) -> np.ndarray:
        """Log prior probability of each hypothesis."""
        hypotheses, causes = self.likelihoods.hypotheses, self.prior.causes
        weights = np.array(
            [1.0 if causes is None else causes.get(h.cause, 0.0) for h in hypotheses]
        )
        joint = _log(weights) + self.base_shares
        if np.isneginf(joint).all():
            raise DiagnosisError(
                "the prior",
                expected="weight on a cause and on a kind of base it was replayed on",
                found=str(self.prior),
            )
        return normalise(joint)

    @cached_property
    def log_evidence(self) -> np.ndarray:
        """Log likelihood of each observed outcome: (observed, hypotheses)."""
        return np.log(self.likelihoods.probabilities[:, self.columns]).T

    @cached_property
    def weights(self) -> np.ndarray:
        """Posterior probability of each hypothesis."""
        return np.exp(normalise(self.log_prior + self.log_evidence.sum(axis=0)))

    def marginal(self, labels: Labels) -> dict[str, float]:
        """Posterior probability of each label, without an interval."""
        names, members = memberships(self.likelihoods, labels)
        # A sum of probabilities may be above 1 by its rounding.
        return dict(zip(names, np.minimum(members @ self.weights, 1.0).tolist(), strict=True))

    def posterior(self, *, draws: int = DRAWS, seed: int = 0) -> Posterior:
        """Beliefs after the observed outcomes, with draws for their intervals."""
        logs = self.log_prior + self._draw(draws, seed)
        return Posterior(self.likelihoods, self.weights, np.exp(normalise(logs)))

    def account(self) -> tuple[Evidence, ...]:
        """What each observed outcome did, in the order given; the weights of evidence add up."""
        names, members = memberships(self.likelihoods, by_cause(self.likelihoods))
        before, steps = self.log_prior, []
        for (name, outcome), logs in zip(self.observed.items(), self.log_evidence, strict=True):
            after = normalise(before + logs)
            nats = kl_divergence(_within(after, members)[None], _within(before, members)[None])
            gains = (_log_odds(after, members) - _log_odds(before, members)) / np.log(10)
            weights = {
                cause: None if np.isnan(gain) else gain
                for cause, gain in zip(names, gains.tolist(), strict=True)
            }
            steps.append(Evidence(name, outcome, float(nats[0] / np.log(2)), weights))
            before = after
        return tuple(steps)

    def least_disconfirmed(self) -> tuple[Standing, ...]:
        """Causes by the fewest observed outcomes inconsistent with them, then by likelihood.

        The analysis of competing hypotheses (Heuer): priors do not enter, and evidence that fits
        everything decides nothing. A cause is judged on the kind of base where it stands best.
        """
        standings: dict[str, Standing] = {}
        for hypothesis, logs in zip(self.likelihoods.hypotheses, self.log_evidence.T, strict=True):
            odd = np.exp(logs) < INCONSISTENT_BELOW
            names = tuple(name for name, out in zip(self.observed, odd, strict=True) if out)
            found = Standing(*hypothesis, names, float(logs.sum() / np.log(10)))
            best = standings.get(hypothesis.cause, found)
            standings[hypothesis.cause] = min(best, found, key=_disconfirmation)
        return tuple(sorted(standings.values(), key=_disconfirmation))

    def not_told_apart(self, *, draws: int = DRAWS, seed: int = 0) -> tuple[Group, ...]:
        """Causes that the observed evidence does not tell apart, most likely first.

        Two causes belong together where the 95 % interval of their log10 Bayes factor holds 0, or
        the factor is small. A group is one whose every two members belong together (complete
        linkage): a chain of near neighbours may join what the evidence has well apart. Causes
        without prior are left out; the prior does not enter otherwise.
        """
        causes, members = memberships(self.likelihoods, by_cause(self.likelihoods))
        possible = members @ np.exp(self.log_prior) > 0
        causes = tuple(cause for cause, in_play in zip(causes, possible, strict=True) if in_play)
        members = members[possible]
        value = _within(self.base_shares + self.log_evidence.sum(axis=0), members)
        order = np.argsort(-value, kind="stable")
        value, members, causes = value[order], members[order], tuple(causes[i] for i in order)
        sample = _within(self.base_shares + self._draw(draws, seed), members) / np.log(10)
        factors = np.abs(value[:, None] - value) / np.log(10)
        low, high = np.quantile(sample[:, :, None] - sample[:, None], [0.025, 0.975], axis=0)
        return link(causes, factors, (factors < SMALL_LOG10_FACTOR) | ((low <= 0) & (high >= 0)))

    def _draw(self, draws: int, seed: int) -> np.ndarray:
        """Log likelihood of all that was observed: (draws, hypotheses)."""
        logs = np.zeros((draws, len(self.likelihoods.hypotheses)))
        for pair in self.observed.items():
            drawn = self.likelihoods.draw(*pair, draws=draws, seed=seed)
            logs += np.log(np.maximum(drawn, _TINY))
        return logs


def sensitivity(ledger: Ledger, priors: Mapping[str, Prior]) -> dict[str, Span]:
    """The posterior of each cause under each of several priors, by their names."""
    labels = by_cause(ledger.likelihoods)
    found = {name: replace(ledger, prior=prior).marginal(labels) for name, prior in priors.items()}
    spans = {}
    for cause in ledger.likelihoods.causes:
        each = {name: probabilities[cause] for name, probabilities in found.items()}
        spans[cause] = Span(min(each.values()), max(each.values()), each)
    return spans


def normalise(logs: np.ndarray) -> np.ndarray:
    """Logarithms of weights, shifted so that the weights of the last axis sum to one."""
    return logs - np.logaddexp.reduce(logs, axis=-1, keepdims=True)


def _within(logs: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Log of the summed weights of each group of hypotheses; the groups become the last axis."""
    return np.logaddexp.reduce(np.where(members, logs[..., None, :], -np.inf), axis=-1)


def _log_odds(logs: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Log odds of each group of hypotheses against the rest; NaN where one side has no weight."""
    own, others = _within(logs, members), _within(logs, ~members)
    decided = np.isneginf(own) | np.isneginf(others)
    return np.subtract(own, others, out=np.full(own.shape, np.nan), where=~decided)


def _log(weights: np.ndarray) -> np.ndarray:
    return np.log(weights, out=np.full(weights.shape, -np.inf), where=weights > 0)


def _disconfirmation(standing: Standing) -> tuple[int, float]:
    return len(standing.inconsistent), -standing.log10_likelihood


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


FLAT = "flat"
# What the write-up leaves to explanations that it does not list; it leaves none, and then a cause
# that it did not think of could never win.
ROOM = 0.1
# The rest of the causes, in a table of hypotheses.
UNLISTED = "none of these"
# What the first minutes should have been spent on.
TIME_BOX = 10
# What a diagnosis is to reach on replays that it has not seen.
ACCURACY, FALSE_ALARMS = 0.90, 0.02

TRUST_MEASURES = ("top1", "false_alarms", "brier", "symptom_top1", "fewest_groups")
TRUST_TABLES = {
    "misses": ("cause", "taken for", "times"),
    "reliability": ("said", "mean", "right", "replays"),
}


@dataclass(frozen=True)
class Inquiry:
    """A case's evidence met with the replays of a run."""

    case: Case
    replays: Sequence[Replay]

    @cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """The tests, with their cost."""
        return experiments_of(self.case)

    @cached_property
    def table(self) -> Likelihoods:
        """How often each outcome came up for each cause on each kind of base."""
        return measure_likelihoods(self.trials, self.experiments)

    @cached_property
    def trials(self) -> tuple[Replay, ...]:
        """The replays with each severity by its place in the cause's list.

        Left out together are then the first severities of all causes, the second ones, and so on.
        """
        trials, found = [], defaultdict[str, set[str]](set)
        for replay in self.replays:
            found[replay.cause].add(replay.severity)
        for replay in self.replays:
            place = str([*CAUSES[replay.cause].severities].index(replay.severity))
            alone = len(found[replay.cause]) == 1
            trials.append(replay.model_copy(update={"severity": NO_SEVERITY if alone else place}))
        return tuple(trials)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Causes that the whole battery of tests tells apart."""
        return separable_groups(self.table)

    @cached_property
    def answers(self) -> dict[Hypothesis, str]:
        """What one wants to know: the group of the cause, and the kind of base."""
        return by_group(self.table, self.groups, with_base=True)

    @cached_property
    def observed(self) -> dict[str, str]:
        """The outcomes on the incident's record, by test."""
        return {seen.test: seen.outcome for seen in self.case.observed}

    @cached_property
    def priors(self) -> dict[str, Prior]:
        """The priors by name: flat, and the write-up's confidences made to sum to one."""
        found = {FLAT: Prior()}
        for name in ("initial", "final"):
            weights = self._write_up(name)
            if weights:
                found[f"write-up, {name}"] = Prior(weights)
        return found

    def _write_up(self, name: str) -> dict[str, float]:
        """A cause's share of its hypothesis' confidence; the causes without one share `ROOM`."""
        weights: dict[str, float] = {}
        for hypothesis in self.case.hypotheses:
            confidence = getattr(hypothesis, name)
            known = [cause for cause in hypothesis.causes if cause in self.table.causes]
            if confidence and known:
                weights |= dict.fromkeys(known, confidence / len(known))
        others = [cause for cause in self.table.causes if cause not in weights]
        total = sum(weights.values())
        if weights and others:
            weights |= dict.fromkeys(others, total * ROOM / (1 - ROOM) / len(others))
        return weights

    def parse_outcomes(self, pairs: Sequence[str]) -> dict[str, str]:
        """Outcomes given as TEST=OUTCOME; `DiagnosisError` for one that is not."""
        found = {}
        for pair in pairs:
            name, sign, outcome = pair.partition("=")
            if not sign:
                raise DiagnosisError(
                    "an observed outcome", expected="TEST=OUTCOME", found=repr(pair)
                )
            self.table.column(name.strip(), outcome.strip())
            found[name.strip()] = outcome.strip()
        return found

    def ledger(self, prior: str = FLAT, extra: Mapping[str, str] | None = None) -> Ledger:
        """Beliefs after the evidence on record, and `extra` outcomes beside it."""
        name = prior if prior in self.priors else f"write-up, {prior}"
        if name not in self.priors:
            raise DiagnosisError("the prior", expected=" or ".join(self.priors), found=repr(prior))
        return Ledger(self.table, {**self.observed, **(extra or {})}, self.priors[name])

    @cached_property
    def hypotheses(self) -> dict[Hypothesis, str]:
        """The case's own hypothesis that each cause comes under."""
        names = {cause: h.id for h in self.case.hypotheses for cause in h.causes}
        return {h: names.get(h.cause, UNLISTED) for h in self.table.hypotheses}

    def next_steps(self, ledger: Ledger, *, minutes: float | None = None) -> Plan:
        """What to run next, among the tests not observed yet."""
        return plan(ledger, self.answers, minutes=minutes)


def open_inquiry(case: Case, replays: Sequence[Replay]) -> Inquiry:
    """An inquiry; `DiagnosisError` where the case names a test or cause that no replay has."""
    known_tests, known_causes = set(TESTS), set(CAUSES)
    named = [(seen.test, known_tests) for seen in case.observed]
    named += [(name, known_tests) for name in case.path]
    named += [(cause, known_causes) for h in case.hypotheses for cause in h.causes]
    for name, known in named:
        if name not in known:
            raise DiagnosisError(
                f"case {case.name}", expected=f"one of {', '.join(sorted(known))}", found=repr(name)
            )
    return Inquiry(case, replays)


def record_trust(session: Session, inquiry: Inquiry) -> None:
    """Record how well replays are diagnosed from others: what the diagnosis may be trusted with."""
    session.measure("diagnosis.limit.accuracy", ACCURACY)
    session.measure("diagnosis.limit.false_alarms", FALSE_ALARMS)
    if len({replay.seed for replay in inquiry.replays}) < 2:
        reason = "one seed of replays alone: nothing to learn from when it is left out"
        for name in TRUST_MEASURES:
            session.measure(f"diagnosis.{name}", None, reason=reason)
        for name in ("trusted", "alarms_few"):
            session.verdict(f"diagnosis.{name}", "not available", reason)
        for name, columns in TRUST_TABLES.items():
            session.table(f"diagnosis.{name}", columns, [])
        return
    found = leave_out(inquiry.trials, inquiry.experiments)
    on_record = [*inquiry.observed]
    symptom = leave_out(inquiry.trials, inquiry.experiments, subset=on_record)
    session.measure("diagnosis.top1", found.accuracy)
    unsound = "no sound run was replayed"
    session.measure("diagnosis.false_alarms", found.false_alarms, reason=unsound)
    session.measure("diagnosis.brier", found.brier)
    session.measure("diagnosis.fewest_groups", found.fewest_groups, unit="groups")
    session.measure("diagnosis.symptom_top1", symptom.accuracy)
    told = found.accuracy
    assert told.low is not None
    assert told.high is not None
    trusted = True if told.low >= ACCURACY else False if told.high < ACCURACY else None
    session.verdict("diagnosis.trusted", trusted, describe_trust(found))
    alarms = found.false_alarms
    few = None if alarms.low is None or alarms.high is None else alarms.high <= FALSE_ALARMS
    if few is False and (alarms.low or 0.0) <= FALSE_ALARMS:
        few = None  # too few healthy runs to tell
    told_alarms = f"{found.false_alarm_count} of {alarms.n} healthy runs were taken for faulty"
    session.verdict("diagnosis.alarms_few", few, told_alarms if alarms.n else unsound)
    misses = Counter((miss.cause, miss.predicted) for miss in found.misses)
    rows = [(cause, wrong, times) for (cause, wrong), times in misses.most_common()]
    session.table("diagnosis.misses", TRUST_TABLES["misses"], rows)
    bins = [
        (
            f"{b.low:g} to {b.high:g}",
            None if b.predicted is None else round(b.predicted, 2),
            say_estimate(b.right),
            b.right.n,
        )
        for b in found.bins
        if b.right.n
    ]
    session.table("diagnosis.reliability", TRUST_TABLES["reliability"], bins)


def describe_trust(found: Evaluation) -> str:
    """An evaluation in one line."""
    right, alarms, brier = found.accuracy, found.false_alarms, found.brier
    return (
        f"top-1 {right.value:.2f} [{right.low:.2f}, {right.high:.2f}] over {found.fewest_groups} "
        f"groups, healthy false alarms {found.false_alarm_count}/{alarms.n}, "
        f"brier {brier.value:.2f}"
    )


def evaluate_replays(case: Case, replays: Sequence[Replay]) -> Evaluation:
    """Diagnose each replay from those of other worlds and of other severities."""
    inquiry = open_inquiry(case, replays)
    return leave_out(inquiry.trials, inquiry.experiments)


def record_beliefs(session: Session, inquiry: Inquiry) -> None:
    """Record what the evidence on record makes of each cause, and what it cannot tell apart."""
    ledger = inquiry.ledger()
    posterior = ledger.posterior()
    causes, spans = posterior.causes, sensitivity(ledger, inquiry.priors)
    owner = {h.cause: name for h, name in inquiry.hypotheses.items()}
    session.table(
        "diagnosis.causes",
        ("cause", "comes under", *(f"after, {name}" for name in inquiry.priors)),
        [
            (
                *(CAUSES[cause].title, owner[cause], say_estimate(causes[cause])),
                *(round(share, 3) for share in [*spans[cause].by_prior.values()][1:]),
            )
            for cause in sorted(causes, key=lambda name: -(causes[name].value or 0.0))
        ],
    )
    for cause, told in causes.items():
        session.measure(f"diagnosis.cause.{cause}", told)
        for name, share in spans[cause].by_prior.items():
            if name != FLAT:
                key = name.removeprefix("write-up, ")
                session.measure(f"diagnosis.after.{key}.{cause}", share)
    session.table(
        "diagnosis.hypotheses",
        ("hypothesis", "after, flat"),
        [(n, say_estimate(told)) for n, told in posterior.marginal(inquiry.hypotheses).items()],
    )
    _record_account(session, inquiry, ledger)
    _record_standing(session, inquiry, ledger)
    _judge_beliefs(session, inquiry, ledger)


def _record_account(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    grades = {seen.test: seen.grade for seen in inquiry.case.observed}
    steps = ledger.account()
    bits = {step.experiment: step.bits for step in steps}
    for name in TESTS:
        reason = "no outcome of this test is on the incident's record"
        session.measure(f"diagnosis.bits.{name}", bits.get(name), unit="bits", reason=reason)
    session.table(
        "diagnosis.account",
        ("test", "what was done", "outcome", "grade", "bits"),
        [
            (
                e.experiment,
                TESTS[e.experiment].title,
                e.outcome,
                grades[e.experiment],
                round(e.bits, 3),
            )
            for e in steps
        ],
    )
    weights = {
        cause: {e.experiment: e.weights[cause] or 0.0 for e in steps}
        for cause in CAUSES
        if cause in inquiry.table.causes
    }
    session.table(
        "diagnosis.weights",
        ("cause", *(e.experiment for e in steps), "together"),
        [
            (cause, *(round(w, 2) for w in told.values()), round(sum(told.values()), 2))
            for cause, told in weights.items()
        ],
    )


def _record_standing(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    session.table(
        "diagnosis.standing",
        ("cause", "best on", "inconsistent", "with", "log10 likelihood"),
        [
            (
                s.cause,
                s.base,
                len(s.inconsistent),
                ", ".join(s.inconsistent) or "nothing",
                round(s.log10_likelihood, 2),
            )
            for s in ledger.least_disconfirmed()
        ],
    )
    apart = ledger.not_told_apart()
    session.table(
        "diagnosis.apart", ("not told apart by the record",), [(group_name(g),) for g in apart]
    )
    session.table(
        "diagnosis.groups",
        ("told apart by all tests", "causes"),
        [(group_name(group), len(group)) for group in inquiry.groups],
    )
    session.measure("diagnosis.groups", len(inquiry.groups), unit="groups")
    session.measure("diagnosis.apart", len(apart), unit="groups")


def _judge_beliefs(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    marginal = ledger.posterior().marginal(by_group(inquiry.table, inquiry.groups))
    best, told = max(marginal.items(), key=lambda item: item[1].value or 0.0)
    session.verdict(
        "diagnosis.settled",
        True if (told.low or 0.0) > ACCURACY else None,
        f"the leading group ({best}) has {told.value:.0%} [{told.low:.0%}, {told.high:.0%}]",
    )
    silent = ledger.posterior().bases.get("silent")
    if silent is None:
        session.verdict("diagnosis.base_answers", "not available", "no silent base was replayed")
    else:
        held = True if (silent.low or 0.0) > 0.5 else False if (silent.high or 0.0) < 0.5 else None
        session.verdict(
            "diagnosis.base_answers",
            held,
            f"a base that writes the value by itself has {silent.value:.0%} "
            f"[{silent.low:.0%}, {silent.high:.0%}] after the evidence, from 50% before",
        )


def record_next_steps(session: Session, inquiry: Inquiry) -> None:
    """Record what to run next, what the author's path was worth, and what ten minutes could be."""
    fresh = Ledger(inquiry.table)
    _record_plan(session, "next", inquiry.next_steps(inquiry.ledger()))
    _record_plan(session, "first", inquiry.next_steps(fresh, minutes=TIME_BOX))
    path = [name for name in inquiry.case.path if name in inquiry.table.blocks]
    _record_plan(session, "path", price(fresh, path, labels=inquiry.answers))
    session.measure("diagnosis.time_box", TIME_BOX, unit="min")


def _record_plan(session: Session, name: str, found: Plan) -> None:
    key = f"diagnosis.{name}"
    session.measure(f"{key}.bits", found.bits, unit="bits")
    session.measure(f"{key}.minutes", found.minutes, unit="min")
    first = found.steps[0].experiment if found.steps else ""
    session.text(f"{key}.test", TESTS[first].title if first else "nothing: no test left says more")
    session.table(
        f"{key}.steps",
        ("test", "what is done", "bits", "minutes", "in all", "leading answer right"),
        [
            (
                *(s.experiment, TESTS[s.experiment].title, round(s.bits, 3)),
                *(round(s.minutes, 1), round(s.total_minutes, 1), round(s.leading, 3)),
            )
            for s in found.steps
        ],
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# Causes listed one by one, and the weight of evidence (log10) from which it is named: two to one.
SHOWN_CAUSES, WORTH_SAYING = 8, 0.3


def as_diagnosis(
    inquiry: Inquiry, *, prior: str, extra: Sequence[str], minutes: float | None
) -> str:
    """Causes by their probability with what speaks for and against, and what to run next."""
    ledger = inquiry.ledger(prior, inquiry.parse_outcomes(extra))
    posterior, steps = ledger.posterior(), ledger.account()
    observed = ", ".join(f"{name}: {word}" for name, word in ledger.observed.items())
    lines = [f"evidence  {observed or 'none'}", ""]
    told = sorted(posterior.causes.items(), key=lambda item: -(item[1].value or 0.0))
    for cause, found in told[:SHOWN_CAUSES]:
        lines.append(
            f"{found.value:6.1%} [{found.low:.0%}, {found.high:.0%}]  {cause}: "
            f"{CAUSES[cause].title}"
        )
        lines += _speaking(cause, steps)
    rest = sum(found.value or 0.0 for _, found in told[SHOWN_CAUSES:])
    lines += [f"{rest:6.1%}  {len(told[SHOWN_CAUSES:])} other causes", ""]
    for kind, found in posterior.bases.items():
        lines.append(f"{found.value:6.1%} [{found.low:.0%}, {found.high:.0%}]  {kind} base")
    apart = ledger.not_told_apart()[0]
    if len(apart) > 1:
        lines += ["", f"cannot be told apart by this evidence: {', '.join(apart)}"]
    return "\n".join([*lines, "", *_next_lines(inquiry.next_steps(ledger, minutes=minutes))])


def _speaking(cause: str, steps: Sequence[Evidence]) -> Iterator[str]:
    """What speaks for and against a cause, the strongest first."""
    weights = {s.experiment: s.weights[cause] or 0.0 for s in steps}
    for word, sign in (("for", 1), ("against", -1)):
        found = {name: w for name, w in weights.items() if sign * w >= WORTH_SAYING}
        names = sorted(found, key=lambda name: -sign * found[name])
        if names:
            yield f"{'':14}{word} " + ", ".join(f"{name} {found[name]:+.1f}" for name in names)


def _next_lines(found: Plan) -> list[str]:
    if not found.steps:
        return ["next  nothing: no test left says more in the time there is"]
    lines = []
    for number, step in enumerate(found.steps):
        head = "next" if not number else ""
        lines.append(
            f"{head:6}{step.experiment}: {TESTS[step.experiment].title} "
            f"({step.minutes:.1f} min, {step.bits:.2f} bits)"
        )
    return lines
