"""Statistics of few rows: rank metrics, bootstrap and exact intervals, divergence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, rankdata

RESAMPLES = 2000
# Resampled values held at a time.
BLOCK = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the rows it rests on; None where it has no meaning."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def auc(labels: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray) -> float | None:
    """Area under the ROC curve by ranks, ties counted half; None where one class is missing."""
    truth = np.asarray(labels, dtype=bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    ranks = rankdata(np.asarray(scores, dtype=np.float64))
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_estimate(
    labels: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray, *, seed: int = 0
) -> Estimate:
    """AUC with a bootstrap interval; rows are drawn within each class."""
    truth = np.asarray(labels, dtype=bool)
    value = auc(truth, scores)
    if value is None:
        return Estimate(None, None, None, len(truth))
    low, high = np.quantile(_resampled_aucs(truth, [scores], seed=seed)[0], [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(truth))


def auc_gain_estimate(
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    control: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
) -> Estimate:
    """AUC of the scores less that of the control, with a bootstrap interval of paired rows."""
    truth = np.asarray(labels, dtype=bool)
    value, before = auc(truth, scores), auc(truth, control)
    if value is None or before is None:
        return Estimate(None, None, None, len(truth))
    after, first = _resampled_aucs(truth, [scores, control], seed=seed)
    low, high = np.quantile(after - first, [0.025, 0.975])
    return Estimate(value - before, float(low), float(high), len(truth))


def _resampled_aucs(
    truth: np.ndarray, scores: Sequence[Sequence[float] | np.ndarray], *, seed: int
) -> np.ndarray:
    """AUC of each of the scores on the same resamples of the rows, (scores, resamples)."""
    draws = np.random.default_rng(seed)
    places = [np.flatnonzero(truth), np.flatnonzero(~truth)]
    levels = [np.unique(np.asarray(row), return_inverse=True)[1] for row in scores]
    samples = []
    # In blocks, so that many rows do not take much memory.
    block = max(1, BLOCK // len(truth))
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        drawn = [draws.choice(part, (count, len(part))) for part in places]
        samples.append([_aucs_of(*(level[part] for part in drawn)) for level in levels])
    return np.concatenate(samples, axis=1)


def _aucs_of(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """AUC of each resample from the levels drawn, (resamples, rows): counted, with no sorting."""
    size = int(max(positives.max(), negatives.max())) + 1
    starts = size * np.arange(len(positives))[:, None]
    above, below = (
        np.bincount((part + starts).ravel(), minlength=size * len(part)).reshape(-1, size)
        for part in (positives, negatives)
    )
    beaten = below.cumsum(axis=1) - below / 2
    return (above * beaten).sum(axis=1) / (positives.shape[1] * negatives.shape[1])


def grouped_auc(
    labels: np.ndarray, scores: np.ndarray, *, groups: Sequence[str]
) -> dict[str, float | None]:
    """AUC within each group, in order of first appearance."""
    names = np.asarray(groups)
    return {
        name: auc(labels[names == name], scores[names == name]) for name in dict.fromkeys(groups)
    }


def mean_estimate(
    values: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> Estimate:
    """Mean (or another statistic over an axis) with a bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Estimate(None, None, None, 0)
    draws = np.random.default_rng(seed).choice(array, (RESAMPLES, len(array)))
    low, high = np.quantile(statistic(draws, axis=1), [0.025, 0.975])
    return Estimate(float(statistic(array)), float(low), float(high), len(array))


def rate_estimate(hits: int, n: int) -> Estimate:
    """A proportion with its exact (Clopper-Pearson) interval."""
    if not n:
        return Estimate(None, None, None, 0)
    interval = binomtest(hits, n).proportion_ci(method="exact")
    return Estimate(hits / n, float(interval.low), float(interval.high), n)


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats of each row, from log-probabilities of shape (rows, vocabulary)."""
    # A token that p gives no mass adds nothing, also where q gives it none.
    massless = np.isneginf(p)
    gaps = np.subtract(p, q, out=np.zeros(p.shape), where=~massless)
    return np.maximum((np.exp(p) * gaps).sum(axis=1), 0.0)
