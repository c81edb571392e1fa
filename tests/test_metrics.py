from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from postmortem.experiments.metrics import (
    Estimate,
    _aucs_of,
    auc,
    auc_estimate,
    auc_gain_estimate,
    chances_of_order,
    difference_estimate,
    fit_line,
    kl_divergence,
    least_auc,
    mean_estimate,
    perfect_auc_estimate,
    power_of_rows,
    rate_estimate,
)

FINITE = st.floats(-1e6, 1e6)
# Few distinct values, so that ties are common.
SCORES = FINITE | st.sampled_from([0.0, 0.5, 1.0, -1.0])
SAMPLES = st.lists(st.tuples(st.integers(0, 1), SCORES), min_size=1, max_size=30)


def pairwise(labels, scores):
    """The definition: the share of pairs of a positive and a negative in order, ties a half."""
    pairs = [
        (p > n) + (p == n) / 2
        for p, one in zip(scores, labels, strict=True)
        for n, zero in zip(scores, labels, strict=True)
        if one and not zero
    ]
    return sum(pairs) / len(pairs) if pairs else None


@given(sample=SAMPLES)
def test_auc_is_the_pairwise_share(sample):
    """The AUC by ranks is the share of pairs in order, with ties counted half."""
    labels, scores = zip(*sample, strict=True)
    expected = pairwise(labels, scores)
    assert auc(labels, scores) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.1, 0.9], 1.0),
        ([0, 1], [0.9, 0.1], 0.0),
        ([0, 0, 1, 1, 1, 0, 1, 0, 0, 1], [0.0] * 10, 0.5),
        ([0, 1, 1], [-np.inf, 0.0, np.inf], 1.0),
        ([0, 1], [np.inf, np.inf], 0.5),
        ([0, 1], [0.0, 5e-324], 1.0),
        ([0, 1], [-0.0, 0.0], 0.5),
        ([1, 1], [0.1, 0.9], None),
        ([0], [0.1], None),
        ([], [], None),
    ],
)
def test_auc_of_small_samples(labels, scores, expected):
    """A constant scores one half, infinities have a rank, and one class alone has no AUC."""
    assert auc(labels, scores) == expected


def test_auc_of_what_cannot_be_ranked():
    """A score that is no number leaves no number, and one too few is refused."""
    assert np.isnan(auc([0, 1, 1], [0.1, np.nan, 0.3]))
    with pytest.raises(IndexError):
        auc([0, 1, 1], [0.1, 0.2])


@given(sample=SAMPLES, seed=st.integers(0, 2**32 - 1))
def test_auc_interval_is_in_order(sample, seed):
    """The interval lies in [0, 1], its ends in order, and the same seed gives it again."""
    labels, scores = zip(*sample, strict=True)
    found = auc_estimate(labels, scores, seed=seed)
    assert (found.value, found.n) == (auc(labels, scores), len(labels))
    assert found == auc_estimate(labels, scores, seed=seed)
    if found.value is not None:
        assert 0.0 <= found.low <= found.high <= 1.0


def test_auc_interval_follows_the_formula():
    """For many rows the bootstrap interval is that of DeLong's variance."""
    draws = np.random.default_rng(0)
    high, low = draws.normal(1.0, size=200), draws.normal(size=300)
    wins = (high[:, None] > low).astype(float)
    half = 1.96 * np.sqrt(wins.mean(axis=1).var() / 200 + wins.mean(axis=0).var() / 300)
    found = auc_estimate([1] * 200 + [0] * 300, [*high, *low])
    assert found.value == pytest.approx(wins.mean())
    assert found.low == pytest.approx(wins.mean() - half, abs=0.005)
    assert found.high == pytest.approx(wins.mean() + half, abs=0.005)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([1, 1, 1], [1.0, 2.0, 3.0], Estimate(None, None, None, 3)),
        ([], [], Estimate(None, None, None, 0)),
        ([0, 1], [3.0, 3.0], Estimate(0.5, 0.5, 0.5, 2)),
        ([0, 0, 1], [1.0, 2.0, 3.0], Estimate(1.0, 1.0, 1.0, 3)),
    ],
)
def test_auc_interval_of_small_samples(labels, scores, expected):
    """One class alone has no interval; a constant's is a point, as is a perfect order's."""
    assert auc_estimate(labels, scores) == expected


@given(
    positives=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    negatives=st.lists(st.integers(0, 6), min_size=1, max_size=12),
)
def test_counted_auc_is_the_ranked_one(positives, negatives):
    """The AUC that is counted for a resample is the AUC by ranks."""
    labels = [1] * len(positives) + [0] * len(negatives)
    (counted,) = _aucs_of(np.array([positives]), np.array([negatives]))
    assert counted == pytest.approx(auc(labels, [*positives, *negatives]))


@given(sample=SAMPLES)
def test_nothing_is_gained_over_oneself(sample):
    """Against itself a ranking gains nothing; of one class alone no gain can be measured."""
    labels, scores = zip(*sample, strict=True)
    assume(len(set(labels)) == 2)
    gain = auc_gain_estimate(labels, scores, scores)
    assert (gain.value, gain.low, gain.high, gain.n) == (0.0, 0.0, 0.0, len(labels))
    assert auc_gain_estimate([1, 1], [0, 1], [1, 0]) == Estimate(None, None, None, 2)


def test_a_paired_gain_is_narrower_than_its_parts():
    """Rows are drawn once for both rankings, so what they share does not widen the interval."""
    draws = np.random.default_rng(0)
    labels = np.arange(200) % 2
    control = labels + draws.normal(size=200)
    scores = control + 0.1 * draws.normal(size=200)
    gain, alone = auc_gain_estimate(labels, scores, control), auc_estimate(labels, scores)
    assert gain.value == pytest.approx(auc(labels, scores) - auc(labels, control))
    assert gain.low <= gain.value <= gain.high
    assert gain.high - gain.low < (alone.high - alone.low) / 2


def test_a_difference_of_intervals_covers_that_of_paired_rows():
    """From two intervals alone the difference keeps its value, in an interval that is no narrower.

    A control without spread moves the interval and leaves its width, and no value has none.
    """
    draws = np.random.default_rng(0)
    labels = np.arange(200) % 2
    control = labels + draws.normal(size=200)
    scores = control + draws.normal(size=200)
    one, other = auc_estimate(labels, scores), auc_estimate(labels, control)
    found, paired = difference_estimate(one, other), auc_gain_estimate(labels, scores, control)
    assert found.value == pytest.approx(paired.value)
    assert found.low < paired.low < paired.high < found.high
    moved = difference_estimate(one, Estimate(0.5, 0.5, 0.5, 200))
    assert (moved.low, moved.high) == pytest.approx((one.low - 0.5, one.high - 0.5))
    assert difference_estimate(one, Estimate(None, None, None, 0)).value is None


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_mean_interval_of_a_constant(statistic):
    """A constant has itself as value and interval, and no values have no mean."""
    assert mean_estimate([3.0] * 4, statistic=statistic) == Estimate(3.0, 3.0, 3.0, 4)
    assert mean_estimate([], statistic=statistic) == Estimate(None, None, None, 0)


def test_mean_interval_follows_the_formula():
    """For many rows the bootstrap interval is that of the normal approximation."""
    values = np.random.default_rng(0).normal(size=400)
    found, half = mean_estimate(values), 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


@given(n=st.integers(1, 200), share=st.floats(0, 1))
def test_rate_interval_holds_the_rate(n, share):
    """The exact interval lies in [0, 1] and holds the proportion."""
    hits = round(n * share)
    found = rate_estimate(hits, n)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert (found.value, found.n) == (hits / n, n)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129)],
)
def test_rate_interval_of_ten(hits, n, low, high):
    """Ten rows give the published Clopper-Pearson intervals."""
    found = rate_estimate(hits, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_rate_of_nothing():
    """No rows have no rate, and more hits than rows are refused."""
    assert rate_estimate(0, 0) == Estimate(None, None, None, 0)
    with pytest.raises(ValueError, match="must not be greater"):
        rate_estimate(3, 2)


DISTRIBUTIONS = st.lists(st.floats(-20, 20), min_size=5, max_size=5).map(
    lambda x: np.array([x]) - np.logaddexp.reduce(x)
)


@given(p=DISTRIBUTIONS, q=DISTRIBUTIONS)
def test_kl_divergence_is_not_negative(p, q):
    """KL is zero between equals, never negative, and the sum of p log(p / q)."""
    assert kl_divergence(p, p) == 0.0
    assert kl_divergence(p, q) >= 0.0
    assert kl_divergence(p, q) == pytest.approx((np.exp(p) * (p - q)).sum(), abs=1e-9)


HALF = np.log(0.5)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0.0, -np.inf], [HALF, HALF], np.log(2)),
        ([0.0, -np.inf], [0.0, -np.inf], 0.0),
        ([HALF, HALF], [0.0, -np.inf], np.inf),
    ],
)
def test_kl_divergence_with_impossible_tokens(p, q, expected):
    """A token without mass under p adds nothing; one without mass under q alone adds infinity."""
    assert kl_divergence(np.array([p]), np.array([q])) == pytest.approx(expected)


def test_kl_divergence_goes_by_row():
    """There is one divergence a row, and none for no rows."""
    p = np.array([[HALF, HALF], [0.0, -np.inf]])
    assert kl_divergence(p, np.array([[HALF, HALF]] * 2)).tolist() == [0.0, pytest.approx(-HALF)]
    assert kl_divergence(np.zeros((0, 2)), np.zeros((0, 2))).shape == (0,)


@given(st.integers(1, 5), st.integers(1, 5))
def test_chances_of_order_are_counts_of_arrangements(positives, negatives):
    """The exact chances are those of going through every arrangement of the rows."""
    places = range(positives + negatives)
    counts = np.zeros(positives * negatives + 1)
    arrangements = list(combinations(places, positives))
    for ups in arrangements:
        labels = [place in ups for place in places]
        counts[round(auc(labels, list(places)) * positives * negatives)] += 1
    np.testing.assert_allclose(
        chances_of_order(positives, negatives), counts / len(arrangements), atol=1e-12
    )


def test_five_and_five_rows_need_an_auc_of_092():
    """With five rows of either class 0.92 is the smallest AUC that a two-sided test passes."""
    assert least_auc(5, 5) == pytest.approx((0.92, 8 / 252))
    assert 2 * chances_of_order(5, 5)[22:].sum() > 0.05


def test_too_few_rows_pass_no_test():
    """Three and three rows have twenty arrangements: a perfect one is as likely as one in ten."""
    assert least_auc(3, 3) == (None, None)
    assert least_auc(0, 4) == (None, None)


def test_a_perfect_score_is_bounded_by_its_pairs():
    """The bound is the AUC at which so many pairs are all in order once in forty times."""
    found = perfect_auc_estimate(5, 8)
    assert (found.value, found.high, found.n) == (1.0, 1.0, 5)
    assert found.low**5 == pytest.approx(0.025)


def test_power_grows_with_the_rows_and_is_the_level_without_skill():
    """More rows of a good model pass more often, and rows without skill as rarely as the test."""
    few, many = (power_of_rows(0.9, n, n, least=least_auc(n, n)[0]) for n in (5, 20))
    assert few.high < many.low
    chance = power_of_rows(0.5, 5, 5, least=0.92)
    assert chance.low <= 4 / 252 <= chance.high


@given(
    slope=st.floats(-10, 10).filter(lambda value: abs(value) > 0.01),
    start=st.floats(-10, 10),
    n=st.integers(4, 7),
)
def test_a_line_is_found_again(slope, start, n):
    """Points on a line give its slope and start; only one order and its mirror fit so well."""
    x = np.arange(n, dtype=float)
    line = fit_line(x, start + slope * x)
    assert line.slope.value == pytest.approx(slope)
    assert line.intercept.value == pytest.approx(start, abs=1e-6)
    assert line.p_value == pytest.approx(2 / np.prod(range(1, n + 1)))


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2, 3], [1, 2, 4]), ([1] * 5, [1, 2, 3, 4, 5]), ([1, 2, 3, 4], [2] * 4)]
)
def test_no_line_through_too_few_points_or_none_that_vary(x, y):
    """Three points, or points that differ in one direction alone, have no line to speak of."""
    assert fit_line(x, y) is None
