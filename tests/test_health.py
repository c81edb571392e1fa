from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmortem.experiments.metrics import THRESHOLDS, describe

ANSWERS = st.lists(
    st.none() | st.floats(0, 1) | st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=1, max_size=40
)
CONSTANT = "better than a constant"


def describe_plain(values, labels=None):
    """Description of values of one group."""
    truth = None if labels is None else np.array(labels)
    return describe(values, groups=["g"] * len(values), labels=truth)


def outcome(health, name):
    """Whether the check of that name passed."""
    return next(check.passed for check in health.checks() if check.name == name)


@given(values=ANSWERS)
def test_a_description_is_of_its_values(values):
    """Shares lie in [0, 1], ties are those of the pairs, and the entropy is one of the values."""
    health = describe_plain(values)
    shares = (health.top_share, health.tied_pairs, health.boundary_share, health.parsed_share)
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert 0.0 <= health.entropy <= np.log2(health.distinct) + 1e-9
    assert health.minimum <= health.top_value <= health.maximum
    assert health.minimum - 1e-12 <= health.mean <= health.maximum + 1e-12
    assert 0.0 <= health.std <= 0.5 + 1e-12
    numbers = [value for value in values if value is not None]
    pairs = [a == b for a, b in combinations(numbers, 2)]
    assert health.tied_pairs == pytest.approx(sum(pairs) / len(pairs) if pairs else 1.0)


@given(values=ANSWERS, data=st.data())
def test_order_of_the_rows_does_not_matter(values, data):
    """The description is one of a distribution: the order of the rows does not change it."""
    moved = data.draw(st.permutations(values))
    first, second = describe_plain(values), describe_plain(moved)
    assert first.checks() == second.checks()
    assert (first.top_value, first.std) == (second.top_value, pytest.approx(second.std))


def test_the_incident():
    """Ten times 0.0 on the incident's labels: one value, all pairs tied, chance."""
    health = describe_plain([0.0] * 10, [0, 0, 1, 1, 1, 0, 1, 0, 0, 1])
    assert health.constant
    assert not health.healthy
    assert (health.mean, health.std, health.entropy) == (0.0, 0.0, 0.0)
    assert (health.distinct, health.top_share, health.tied_pairs) == (1, 1.0, 1.0)
    assert (health.auc.value, health.parsed_share) == (0.5, 1.0)
    # The check that the write-up took as a good sign is the only one that passes.
    passed = [check.name for check in health.checks() if check.passed]
    assert passed == ["answers are numbers"]


def test_scale_is_not_judged():
    """Values in one thousandth of the scale that rank the rows rightly are healthy."""
    values = [0.001 + n / 1e5 for n in range(100)]
    health = describe_plain(values, [int(n >= 50) for n in range(100)])
    assert health.std < 0.01
    assert health.maximum < 0.1
    assert health.healthy


FOUR = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("values", "labels", "auc", "passed"),
    [
        # Without labels of both classes nothing is said of rank.
        (FOUR, None, None, None),
        (FOUR, [0] * 4, None, None),
        (FOUR, [1] * 4, None, None),
        # Backwards.
        ([n / 20 for n in range(20)], [1] * 10 + [0] * 10, 0.0, False),
        # Above one half, by an interval that holds one half.
        (FOUR, [0, 1, 0, 1], 0.75, False),
    ],
)
def test_what_is_better_than_a_constant(values, labels, auc, passed):
    """Values rank better than a constant where the interval of their AUC says so."""
    health = describe_plain(values, labels)
    assert (health.auc.value, outcome(health, CONSTANT)) == (auc, passed)
    assert health.healthy is (passed is not False)


def test_answers_that_are_no_numbers_are_left_out():
    """An answer without a value counts in the parse rate and nowhere else."""
    health = describe_plain([None, 0.2, None, 0.4], [1, 0, 0, 1])
    assert (health.n, health.parsed_share, health.mean) == (4, 0.5, pytest.approx(0.3))
    assert (health.auc.value, health.auc.n) == (1.0, 2)
    assert outcome(health, "answers are numbers") is False


def test_no_answer_is_a_number():
    """Where no answer is a number the parse rate is zero; no rows at all are refused."""
    health = describe_plain([None, None], [0, 1])
    assert (health.n, health.parsed_share, health.mean, health.auc.value) == (2, 0.0, 0.0, None)
    assert not health.healthy
    with pytest.raises(ValueError, match="no values"):
        describe_plain([])


def test_groups_are_told_apart():
    """Spread and AUC are given within each group, in order; one of one class has no AUC."""
    health = describe(
        [0.1, 0.9, 0.5, 0.5, 0.2],
        groups=["b", "b", "a", "a", "c"],
        labels=np.array([0, 1, 0, 1, 1]),
    )
    assert list(health.group_std.items()) == [("b", pytest.approx(0.4)), ("a", 0.0), ("c", 0.0)]
    assert health.group_auc == {"b": 1.0, "a": 0.5, "c": None}


def test_exact_values():
    """The smallest of the commonest values is named, -0.0 is 0.0, and only 0 and 1 are ends."""
    health = describe_plain([0.7, 0.7, 0.0, -0.0, 0.1])
    assert (health.top_value, health.top_share, health.distinct) == (0.0, 0.4, 3)
    assert describe_plain([0.0, 1.0, 1e-9, 1 - 1e-9]).boundary_share == 0.5
    assert describe_plain(FOUR).entropy == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("answers are numbers", {"parsed_share": THRESHOLDS.parsed}),
        ("distinct values", {"distinct": THRESHOLDS.distinct}),
        ("share of the commonest value", {"top_share": THRESHOLDS.top_share}),
        ("share of tied pairs", {"tied_pairs": THRESHOLDS.tied_pairs}),
        ("share at 0 or 1", {"boundary_share": THRESHOLDS.boundary}),
    ],
)
def test_a_limit_itself_passes(name, change):
    """A value at its limit passes and the next one beyond fails."""
    health = describe_plain([0.1, 0.2, 0.3])
    (field, limit), up = *change.items(), name.startswith("share")
    beyond = np.nextafter(limit, 2 if up else -2) if field != "distinct" else limit - 1
    assert outcome(replace(health, **change), name) is True
    assert outcome(replace(health, **{field: float(beyond)}), name) is False


def test_interval_follows_the_seed():
    """The same seed gives the same interval, another seed another."""
    draws = np.random.default_rng(0)
    values, labels = draws.random(50).tolist(), np.arange(50) % 2
    first, again, other = (
        describe(values, groups=["g"] * 50, labels=labels, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert (first.auc.value, first.auc.n) == (other.auc.value, 50)
    assert first.auc != other.auc
