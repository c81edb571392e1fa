"""Metrics with their intervals, and the health of an output distribution."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, linregress, norm, pearsonr, permutation_test, rankdata, t

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

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit."""
        ends = (self.value, self.low, self.high)
        value, low, high = (None if end is None else factor * end for end in ends)
        return Estimate(value, low, high, self.n)


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


def difference_estimate(value: Estimate, control: Estimate) -> Estimate:
    """Difference of two estimates from their own intervals, where the rows are not at hand.

    As if they were independent (Newcombe's way); of the same rows that errs on the wide side.
    """
    ends = (value.value, value.low, value.high, control.value, control.low, control.high)
    if None in ends:
        return Estimate(None, None, None, value.n)
    one, low, high, other, least, most = (float(end or 0) for end in ends)
    gap = one - other
    below, above = np.hypot(one - low, most - other), np.hypot(high - one, other - least)
    return Estimate(gap, gap - float(below), gap + float(above), value.n)


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


def chances_of_order(positives: int, negatives: int) -> np.ndarray:
    """Chance of each number of rightly ordered pairs, 0 to positives x negatives, without skill.

    Exact, for scores without ties (the distribution of Mann and Whitney's U).
    """
    size = positives * negatives + 1
    none = np.zeros(size)
    none[0] = 1.0
    chances = [none] * (negatives + 1)
    for m in range(1, positives + 1):
        row = [none]
        for n in range(1, negatives + 1):
            # The top row is a positive, and then ahead of n negatives, or it is a negative.
            ahead = np.concatenate([np.zeros(n), chances[n][: size - n]])
            row.append((m * ahead + n * row[n - 1]) / (m + n))
        chances = row
    return chances[negatives]


def least_auc(
    positives: int, negatives: int, *, level: float = 0.05
) -> tuple[float, float] | tuple[None, None]:
    """Smallest AUC above chance by the exact two-sided test without ties, and its p-value.

    None where the rows are so few that not even a perfect score passes.
    """
    tails = 2 * np.cumsum(chances_of_order(positives, negatives)[::-1])[::-1]
    pairs = positives * negatives
    passing = [u for u in range(pairs + 1) if 2 * u > pairs and tails[u] <= level]
    if not passing:
        return None, None
    return passing[0] / pairs, float(tails[passing[0]])


def power_of_rows(
    true_auc: float, positives: int, negatives: int, *, least: float, seed: int = 0
) -> Estimate:
    """Chance that rows of a model of this AUC score at least `least`, by simulation.

    The scores of either class are taken to be normal with equal spread.
    """
    draws = np.random.default_rng(seed)
    shift = np.sqrt(2) * norm.ppf(true_auc)
    hits = 0
    for _ in range(RESAMPLES):
        ups, downs = draws.normal(shift, size=positives), draws.normal(size=negatives)
        hits += int((ups[:, None] > downs).sum()) >= round(least * positives * negatives)
    return rate_estimate(hits, RESAMPLES)


def perfect_auc_estimate(positives: int, negatives: int) -> Estimate:
    """A perfect AUC with its exact interval, whatever the distributions of the scores.

    Rows of the two classes pair off into min(positives, negatives) independent pairs. Each is in
    order with a chance of the true AUC, and all must be for a perfect score.
    """
    return rate_estimate(min(positives, negatives), min(positives, negatives))


@dataclass(frozen=True)
class Line:
    """A straight line fitted by least squares, with the correlation and its two-sided p-value.

    `residuals` are in units of y, one a point; `p_value` is that of a permutation test, exact up
    to nine points.
    """

    correlation: Estimate
    p_value: float
    slope: Estimate
    intercept: Estimate
    residuals: tuple[float, ...]


def fit_line(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, *, seed: int = 0
) -> Line | None:
    """Fit a line through at least four points; None for fewer, or where x or y does not vary."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(xs)
    if n < 4 or not np.ptp(xs) or not np.ptp(ys):
        return None
    found, limits = linregress(xs, ys), pearsonr(xs, ys).confidence_interval()
    reach = t.ppf(0.975, n - 2)
    shuffled = permutation_test(
        (xs,),
        lambda order, axis: (order * (ys - ys.mean())).sum(axis=axis),
        permutation_type="pairings",
        n_resamples=400_000,
        batch=20_000,
        rng=np.random.default_rng(seed),
    )

    def around(value: float, error: float) -> Estimate:
        return Estimate(value, value - reach * error, value + reach * error, n)

    return Line(
        correlation=Estimate(float(found.rvalue), float(limits.low), float(limits.high), n),
        p_value=float(shuffled.pvalue),
        slope=around(float(found.slope), float(found.stderr)),
        intercept=around(float(found.intercept), float(found.intercept_stderr)),
        residuals=tuple(map(float, ys - found.intercept - found.slope * xs)),
    )


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


def say_interval(value: float, low: float, high: float, form: str = "z.2f") -> str:
    """A value with its interval, for a table or a sentence."""
    # In a narrow cell the line breaks before the interval and not within it.
    text = f"{value:{form}} [{low:{form}},\N{NO-BREAK SPACE}{high:{form}}]"
    return text.replace("-", "\N{MINUS SIGN}")


def say_estimate(found: Estimate, form: str = "z.2f") -> str:
    """An estimate with its interval, or "unknown"; one without an interval as it stands."""
    if found.value is None:
        return "unknown"
    if found.low is None or found.high is None:
        return f"{found.value:{form}}".replace("-", "\N{MINUS SIGN}")
    return say_interval(found.value, found.low, found.high, form)


@dataclass(frozen=True)
class Thresholds:
    """The limits of the checks, each with its reason.

    The write-up used three values for the smallest standard deviation and for the largest value.
    A ranking metric does not see scale, so spread and maximum are reported and not judged.
    """

    # One value in two rows of three already ties a third of all pairs (a half of their AUC).
    top_share: float = 0.67
    # Two values rank two groups; a score that is to rank rows needs more than a label.
    distinct: int = 3
    # Tied pairs count one half: at 0.9, nine pairs in ten say nothing.
    tied_pairs: float = 0.90
    # More than this share at exactly 0 or 1 means that the scale ends before the evidence does.
    boundary: float = 0.90
    # An answer that is no number is lost; one row in twenty is tolerated.
    parsed: float = 0.95
    # Chance level of the area under the curve; the interval must lie above it.
    chance: float = 0.5
    # A ranking whose interval ends below this orders fewer than three pairs in five: of no use.
    useful: float = 0.6
    # Four rows of either class: on fewer a perfect order comes by luck more than once in forty
    # times, and a bootstrap of so few rows knows nothing of it.
    rows: int = 8
    # A change of a tenth of a nat moves the odds by ten per cent: less is not called a change.
    odds: float = 0.1
    # No written value changed, and by its interval fewer than one in twenty would: it stays.
    flips: float = 0.05


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Check:
    """One check: what was found, against which limit, and whether it passed (None: no data)."""

    name: str
    found: float | None
    limit: str
    passed: bool | None


@dataclass(frozen=True)
class Health:
    """Description of a list of values in [0, 1]; entropy in bits, spreads within each group."""

    n: int
    mean: float
    std: float
    minimum: float
    maximum: float
    distinct: int
    top_value: float
    top_share: float
    tied_pairs: float
    entropy: float
    boundary_share: float
    parsed_share: float
    group_std: dict[str, float]
    group_auc: dict[str, float | None]
    auc: Estimate

    @property
    def constant(self) -> bool:
        """Whether every row has the same value."""
        return self.distinct == 1

    def checks(self) -> tuple[Check, ...]:
        """The checks that hold without labels, then the one against a constant predictor."""
        above = None if self.auc.low is None else self.auc.low > THRESHOLDS.chance
        return (
            _check("answers are numbers", self.parsed_share, at_least=THRESHOLDS.parsed),
            _check("distinct values", self.distinct, at_least=THRESHOLDS.distinct),
            _check("share of the commonest value", self.top_share, at_most=THRESHOLDS.top_share),
            _check("share of tied pairs", self.tied_pairs, at_most=THRESHOLDS.tied_pairs),
            _check("share at 0 or 1", self.boundary_share, at_most=THRESHOLDS.boundary),
            Check(
                "better than a constant",
                self.auc.value,
                f"AUC interval above {THRESHOLDS.chance}",
                above,
            ),
        )

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks())


def describe(
    values: Sequence[float | None],
    *,
    groups: Sequence[str],
    labels: np.ndarray | None = None,
    seed: int = 0,
) -> Health:
    """Describe values by row; None is an answer that was no number and counts only as such.

    Raises `ValueError` for no rows at all. Where every answer is None, the description is that
    of one zero, with `parsed_share` 0.
    """
    if not len(values):
        raise ValueError("no values to describe")
    kept = [index for index, value in enumerate(values) if value is not None]
    numbers = np.array([values[index] for index in kept] or [0.0], dtype=np.float64)
    names = [groups[index] for index in kept] or ["none"]
    truth = None if labels is None or not kept else labels[kept]
    counts = Counter(numbers.tolist())
    top_value, top_count = max(counts.items(), key=lambda item: (item[1], -item[0]))
    shares = np.array(list(counts.values())) / len(numbers)
    unknown = Estimate(None, None, None, 0)
    return Health(
        n=len(values),
        mean=float(numbers.mean()),
        std=float(numbers.std()),
        minimum=float(numbers.min()),
        maximum=float(numbers.max()),
        distinct=len(counts),
        top_value=top_value,
        top_share=top_count / len(numbers),
        tied_pairs=_tied_pairs(counts),
        entropy=float(-(shares * np.log2(shares)).sum()) + 0.0,
        boundary_share=float(np.isin(numbers, (0.0, 1.0)).mean()),
        parsed_share=len(kept) / len(values),
        group_std={name: _std_of(numbers, names, name) for name in dict.fromkeys(names)},
        group_auc={} if truth is None else grouped_auc(truth, numbers, groups=names),
        auc=unknown if truth is None else auc_estimate(truth, numbers, seed=seed),
    )


def _check(
    name: str, found: float, *, at_least: float | None = None, at_most: float | None = None
) -> Check:
    if at_least is not None:
        return Check(name, found, f"at least {at_least:g}", found >= at_least)
    assert at_most is not None
    return Check(name, found, f"at most {at_most:g}", found <= at_most)


def _tied_pairs(counts: Counter[float]) -> float:
    """Share of pairs of rows with equal values; 1 for a single row, which cannot be ranked."""
    n = sum(counts.values())
    tied = sum(count * (count - 1) for count in counts.values())
    return tied / (n * (n - 1)) if n > 1 else 1.0


def _std_of(values: np.ndarray, names: Sequence[str], name: str) -> float:
    return float(values[np.asarray(names) == name].std())
