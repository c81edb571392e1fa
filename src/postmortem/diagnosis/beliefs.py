"""From evidence to beliefs: prior, likelihoods, posterior, and what each outcome did."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.special import entr

from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.likelihoods import (
    Experiment,
    Group,
    Labels,
    Likelihoods,
    by_base,
    by_cause,
    check_weights,
    link,
    memberships,
)
from postmortem.experiments.metrics import Estimate, kl_divergence

# How far the report of an outcome may be trusted to say what happened, by its grade, and why.
RELIABILITY = {
    "artefact": (0.99, "a file on record, which may be another copy than the one in use"),
    "measured": (0.99, "found by us, and open to anyone to find again"),
    "log": (0.97, "written by the run itself, of files whose checksums were not kept"),
    "recollection": (0.6, "written down afterwards, and nothing kept to hold it against"),
}
# Other values that one may hold; a verdict stands only where it is the same under all of them.
SENSITIVITY = {"recollection": (0.3, 0.6, 0.9), "log": (0.9, 0.97, 0.99)}
# A twentieth of what it had before is left of a hypothesis that is refuted. One holds only with
# nearly everything, since a cause that nobody has replayed has no share here at all.
REFUTED_BELOW, HOLDS_ABOVE = 0.05, 0.99
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


@dataclass(frozen=True, eq=False)
class Ledger:
    """A prior, the likelihoods, and the outcomes observed, in order (experiment to outcome).

    `reliability` is the chance that the report of an outcome says what happened, 1 where none is
    given. One that does not says what reports in general say: so a report of reliability r leaves
    each hypothesis at least 1 - r of what it had. Raises `DiagnosisError` for a cause or base kind
    that no replay has, and an outcome that no experiment has. A cause whose prior is 0 keeps the
    posterior 0 whatever is observed.
    """

    likelihoods: Likelihoods
    observed: Mapping[str, str] = field(default_factory=dict)
    prior: Prior = Prior()
    reliability: Mapping[str, float] = field(default_factory=dict)

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
        """Log likelihood of each observed report: (observed, hypotheses)."""
        likelihood = self.likelihoods.probabilities[:, self.columns].T
        return np.log([self._report(*pair) for pair in zip(self.observed, likelihood, strict=True)])

    def _report(self, experiment: str, likelihood: np.ndarray) -> np.ndarray:
        """Probability that an outcome is reported, from that of the outcome: (…, hypotheses)."""
        column = self.likelihoods.column(experiment, self.observed[experiment])
        usual = self.likelihoods.probabilities[:, column] @ np.exp(self.log_prior)
        trust = self.reliability.get(experiment, 1.0)
        return trust * likelihood + (1 - trust) * usual

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
            logs += np.log(np.maximum(self._report(pair[0], drawn), _TINY))
        return logs


def is_refuted(before: float, after: Estimate) -> bool:
    """Whether evidence has left a hypothesis next to nothing of the share that it had."""
    return (after.high or 0.0) < REFUTED_BELOW * before


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


# Bits. A hundred experiments that gain no more would together settle one yes-or-no question.
SMALL_GAIN = 0.01
# Ways in which the experiments planned so far may come out, drawn at random; enough that the gain
# of a later step is good to about 0.01 bits. The gain of the first step is exact.
HISTORIES = 4000


@dataclass(frozen=True)
class Step:
    """One experiment of a plan, with its expected bits about the answer after those before it."""

    experiment: str
    bits: float
    minutes: float


@dataclass(frozen=True)
class Plan:
    """Experiments in order."""

    steps: tuple[Step, ...]

    @property
    def minutes(self) -> float:
        """What the whole costs."""
        return sum(step.minutes for step in self.steps)


class _Future:
    """Beliefs as they may come to be: (histories, hypotheses), one history before any step."""

    def __init__(self, ledger: Ledger, labels: Labels) -> None:
        _, members = memberships(ledger.likelihoods, labels)
        self.table, self.answers = ledger.likelihoods, members.astype(float).T
        self.beliefs = ledger.weights[None]
        self.random = np.random.default_rng(0)

    def _entropy(self, weights: np.ndarray) -> float:
        """Uncertainty about the answer in bits, from weights that need not sum to one."""
        masses = weights @ self.answers
        bits = (entr(masses).sum(axis=-1) - entr(masses.sum(axis=-1))) / np.log(2)
        return float(np.maximum(bits, 0.0).sum() / len(weights))

    def gain(self, experiment: Experiment) -> float:
        """Expected information of one more experiment about the answer, in bits."""
        joint = self.beliefs[:, None, :] * self.table.of(experiment.name).T
        # Rounding may leave it just below 0, which it cannot be.
        return max(self._entropy(self.beliefs) - self._entropy(joint), 0.0)

    def run(self, experiment: Experiment) -> None:
        """Run one more experiment: in each history it comes out at random."""
        likelihood = self.table.of(experiment.name)
        if len(self.beliefs) == 1:
            self.beliefs = self.beliefs.repeat(HISTORIES, axis=0)
        limits = (self.beliefs @ likelihood).cumsum(axis=1)[:, :-1]
        # One draw from each part of the unit interval scatters less than free draws.
        drawn = self.random.permutation((np.arange(HISTORIES) + 0.5) / HISTORIES)
        outcomes = (drawn[:, None] >= limits).sum(axis=1)
        joint = self.beliefs * likelihood.T[outcomes]
        self.beliefs = joint / joint.sum(axis=1, keepdims=True)


def plan(
    ledger: Ledger,
    labels: Labels,
    *,
    minutes: float | None = None,
    candidates: Collection[str] | None = None,
) -> Plan:
    """Choose, step by step, the experiment with the most expected bits a minute.

    `labels` says which answer each hypothesis is to the question asked: the cause, its group, the
    kind of base, or any other. Candidates are the experiments not observed yet, or those of them
    that are named; one that does not fit in the `minutes` left is skipped. The plan ends where
    nothing gains more than `SMALL_GAIN`. It is greedy: two experiments that say something only
    together are not found. With a new outcome, plan again.
    """
    table, future = ledger.likelihoods, _Future(ledger, labels)
    named = set(table.blocks if candidates is None else candidates)
    for name in named:
        table.experiment(name)
    left = [e for e in table.experiments if e.name in named - set(ledger.observed)]
    found = Plan(())
    while True:
        fitting = [e for e in left if minutes is None or found.minutes + e.minutes <= minutes]
        gains = {experiment: future.gain(experiment) for experiment in fitting}
        worth = [experiment for experiment, bits in gains.items() if bits > SMALL_GAIN]
        if not worth:
            return found
        best = max(worth, key=lambda one: _preference(gains[one], one.minutes))
        found = Plan((*found.steps, Step(best.name, gains[best], best.minutes)))
        future.run(best)
        left.remove(best)


def expected_bits(ledger: Ledger, labels: Labels) -> dict[str, float]:
    """What each experiment that was not observed is expected to say about the answer, by itself."""
    future = _Future(ledger, labels)
    left = [e for e in ledger.likelihoods.experiments if e.name not in ledger.observed]
    return {experiment.name: future.gain(experiment) for experiment in left}


def _preference(bits: float, minutes: float) -> tuple[float, float, float]:
    """The order of preference; what gains more for no more comes first in every entry."""
    return (bits / minutes if minutes else np.inf, bits, -minutes)
