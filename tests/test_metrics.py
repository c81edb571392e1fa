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
    grouped_auc,
    kl_divergence,
    mean_estimate,
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


@given(
    sample=st.lists(st.tuples(st.integers(0, 1), st.integers(-30, 30)), min_size=1),
    transform=st.sampled_from([np.exp, np.cbrt, lambda x: 3 * x - 7, lambda x: x**3]),
)
def test_auc_does_not_see_scale(sample, transform):
    """The AUC is the same after any strictly increasing transform of the scores."""
    labels, scores = zip(*sample, strict=True)
    assert auc(labels, scores) == auc(labels, transform(np.array(scores, dtype=float)))


@given(sample=SAMPLES)
def test_auc_turns_round_with_the_scores(sample):
    """Scores turned round give one minus the AUC."""
    labels, scores = map(np.array, zip(*sample, strict=True))
    value = auc(labels, scores)
    assume(value is not None)
    assert auc(labels, -scores) == pytest.approx(1 - value)
    assert auc(1 - labels, scores) == pytest.approx(1 - value)


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


def test_auc_of_nan_is_no_number():
    """A score that is no number has no rank, so the AUC is no number either."""
    assert np.isnan(auc([0, 1, 1], [0.1, np.nan, 0.3]))


def test_auc_needs_one_score_per_label():
    """Labels and scores of different number are refused."""
    with pytest.raises(IndexError):
        auc([0, 1, 1], [0.1, 0.2])


def test_auc_in_float32_loses_ranks():
    """Scores that differ in float64 keep their order, where a float32 sigmoid had tied them."""
    log_odds = np.array([20.0, 21.0])
    sigmoid = (1 / (1 + np.exp(-log_odds))).astype(np.float32)
    assert (auc([0, 1], log_odds), auc([0, 1], sigmoid)) == (1.0, 0.5)


@given(sample=SAMPLES, seed=st.integers(0, 2**32 - 1))
def test_auc_interval_is_in_order(sample, seed):
    """The interval lies in [0, 1], its ends in order, and the same seed gives it again."""
    labels, scores = zip(*sample, strict=True)
    found = auc_estimate(labels, scores, seed=seed)
    assert (found.value, found.n) == (auc(labels, scores), len(labels))
    assert found == auc_estimate(labels, scores, seed=seed)
    if found.value is not None:
        assert 0.0 <= found.low <= found.high <= 1.0


def test_auc_interval_narrows():
    """More rows give a narrower interval, which holds the value."""
    draws = np.random.default_rng(0)
    widths = []
    for n in (20, 500):
        labels = np.arange(n) % 2
        found = auc_estimate(labels, labels + draws.normal(size=n))
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


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
    """Against itself a ranking gains nothing, with an interval of no width."""
    labels, scores = zip(*sample, strict=True)
    assume(len(set(labels)) == 2)
    gain = auc_gain_estimate(labels, scores, scores)
    assert (gain.value, gain.low, gain.high, gain.n) == (0.0, 0.0, 0.0, len(labels))


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


def test_one_class_gains_nothing_that_can_be_measured():
    """Labels of one class give no gain."""
    assert auc_gain_estimate([1, 1], [0, 1], [1, 0]) == Estimate(None, None, None, 2)


def test_grouped_auc_looks_within_groups():
    """Groups are told apart, in order of appearance, and one of a single class has no AUC."""
    labels, scores = np.array([1, 0, 1, 0, 1]), np.array([0.2, 0.1, 0.8, 0.9, 0.5])
    found = grouped_auc(labels, scores, groups=["b", "b", "a", "a", "c"])
    assert list(found.items()) == [("b", 1.0), ("a", 0.0), ("c", None)]


def test_grouped_auc_without_rows():
    """No rows have no groups."""
    assert grouped_auc(np.array([]), np.array([]), groups=[]) == {}


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_mean_interval_of_a_constant(statistic):
    """A constant has itself as value and interval."""
    assert mean_estimate([3.0] * 4, statistic=statistic) == Estimate(3.0, 3.0, 3.0, 4)


def test_mean_interval_follows_the_formula():
    """For many rows the bootstrap interval is that of the normal approximation."""
    values = np.random.default_rng(0).normal(size=400)
    found, half = mean_estimate(values), 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_mean_estimate_of_nothing():
    """No values have no mean."""
    assert mean_estimate([]) == Estimate(None, None, None, 0)


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
