"""Beliefs about causes, moved by likelihoods that were measured in replays.

A hypothesis is a cause on a kind of base. Its prior probability times the likelihood of each
observed outcome, normalised, is its posterior (Bayes' rule). Experiments are taken as independent
given the hypothesis (naive Bayes): two that see the same thing count twice. A cause that is not on
the list cannot win, however badly all that are on it explain the evidence; the least-disconfirmed
ranking shows when they do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from postmortem.errors import DiagnosisError
from postmortem.likelihoods import (
    Group,
    Labels,
    Likelihoods,
    by_base,
    by_cause,
    check_weights,
    link,
    memberships,
)
from postmortem.metrics import Estimate, kl_divergence

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
