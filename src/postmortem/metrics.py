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
    truth, values = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    value = auc(truth, values)
    if value is None:
        return Estimate(None, None, None, len(truth))
    draws = np.random.default_rng(seed)
    positive, negative = values[truth], values[~truth]
    samples: list[np.ndarray] = []
    # In blocks, so that many rows do not take much memory.
    block = max(1, BLOCK // len(values))
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        drawn = [draws.choice(part, (count, len(part))) for part in (positive, negative)]
        ranks = rankdata(np.hstack(drawn), axis=1)[:, : len(positive)].sum(axis=1)
        least = len(positive) * (len(positive) + 1) / 2
        samples.append((ranks - least) / (len(positive) * len(negative)))
    low, high = np.quantile(np.concatenate(samples), [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(truth))


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
