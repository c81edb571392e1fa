"""Health of an output distribution: is anything said, and does it depend on the row?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from postmortem.experiments.metrics import Estimate, auc_estimate, grouped_auc


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
    distinct_share: float
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

    def checks(self, limits: Thresholds = THRESHOLDS) -> tuple[Check, ...]:
        """The checks that hold without labels, then the one against a constant predictor."""
        above = None if self.auc.low is None else self.auc.low > limits.chance
        return (
            _check("answers are numbers", self.parsed_share, at_least=limits.parsed),
            _check("distinct values", self.distinct, at_least=limits.distinct),
            _check("share of the commonest value", self.top_share, at_most=limits.top_share),
            _check("share of tied pairs", self.tied_pairs, at_most=limits.tied_pairs),
            _check("share at 0 or 1", self.boundary_share, at_most=limits.boundary),
            Check(
                "better than a constant",
                self.auc.value,
                f"AUC interval above {limits.chance}",
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
        distinct_share=len(counts) / len(numbers),
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
