from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replays import experiment, replay, table, tables

from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.likelihoods import (
    Experiment,
    Hypothesis,
    by_base,
    by_cause,
    by_group,
    link,
    measure_likelihoods,
    memberships,
    separable_groups,
    separation,
)

CONTROL = experiment("control")
SCAN = experiment("scan", ("a", "b", "c"))
BASES = ("silent", "speaking")
REPLAYS = [
    replay("no-op", seed=0, control="yes", scan="a"),
    replay("no-op", seed=1, control="yes"),
    replay("healthy", "speaking", seed=0, control="no", scan="c", unknown="x"),
]


def test_counts_of_replays():
    """Outcomes are counted by hypothesis; what was not run, or is not asked for, counts nowhere."""
    found = measure_likelihoods(REPLAYS, [CONTROL, SCAN])
    assert found.hypotheses == (Hypothesis("no-op", "silent"), Hypothesis("healthy", "speaking"))
    assert found.counts.tolist() == [[0, 2, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert (found.causes, found.bases) == (("no-op", "healthy"), ("silent", "speaking"))
    assert found.replays == 3


def test_prior_weighs_one_replay():
    """The prior adds one replay to each row, spread as the causes on that base came out."""
    found = table([CONTROL], {"a": [(4, 0)], "b": [(0, 4)], "c": [(0, 4)]})
    usual = np.array([4 / 3 + 0.5, 8 / 3 + 0.5]) / 5
    expected = (found.counts + usual) / 5
    assert found.of("control") == pytest.approx(expected)


def test_pooled_experiment_counts_every_base():
    """What follows from the cause alone is as probable on every kind of base, and drawn once."""
    pooled = replace(CONTROL, pooled=True)
    replays = [replay("a", base, seed=n, control="yes") for n, base in enumerate(BASES)]
    replays += [replay("b", base, seed=n, control="no") for n, base in enumerate(BASES)]
    found = measure_likelihoods(replays, [pooled])
    assert found.of("control")[0] == pytest.approx(found.of("control")[1])
    assert found.of("control")[0, 1] > measure_likelihoods(replays, [CONTROL]).of("control")[0, 1]
    drawn = found.draw("control", "yes", draws=20, seed=0)
    assert drawn[:, 0].tolist() == drawn[:, 1].tolist()


def test_experiment_never_run_is_even():
    """An experiment that no replay of a hypothesis ran has all outcomes equally probable."""
    found = measure_likelihoods([replay("a", control="no")], [CONTROL, SCAN])
    assert found.of("scan")[0] == pytest.approx([1 / 3] * 3)


@given(likelihoods=tables())
def test_likelihoods_are_distributions(likelihoods):
    """Outcomes of each experiment have probabilities above 0 that sum to one."""
    for one in likelihoods.experiments:
        found = likelihoods.of(one.name)
        assert (found > 0).all()
        assert found.sum(axis=1) == pytest.approx(1.0)


def test_draws_follow_the_mean():
    """Draws of a likelihood average to its mean, and vary less with more replays."""
    few = table([CONTROL], {"a": [(1, 3)]})
    many = table([CONTROL], {"a": [(100, 300)]})
    spreads = []
    for one in (few, many):
        found = one.draw("control", "yes", draws=20_000, seed=0)
        assert found.mean() == pytest.approx(one.of("control")[0, 1], abs=0.01)
        spreads.append(found.std())
    assert spreads[1] < spreads[0] / 3


def test_draws_of_experiments_are_independent():
    """Two experiments with the same counts are drawn apart, each the same under its seed."""
    found = table([CONTROL, experiment("two")], {"a": [(1, 3), (1, 3)]})
    one, two = (found.draw(name, "yes", draws=2000, seed=0)[:, 0] for name in ("control", "two"))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    assert (found.draw("control", "yes", draws=2000, seed=0)[:, 0] == one).all()
    assert (found.draw("control", "yes", draws=2000, seed=1)[:, 0] != one).all()


@pytest.mark.parametrize(
    ("replays", "experiments", "message"),
    [
        ([], [CONTROL], "the replays: expected one or more; found none"),
        (REPLAYS, [], "the experiments: expected one or more; found none"),
        (REPLAYS, [CONTROL, CONTROL], "found 'control' twice"),
        ([REPLAYS[0], REPLAYS[0]], [CONTROL], "found 'no-op/silent/0/-' twice"),
        ([replay("a", control="maybe")], [CONTROL], "among no, yes; found 'maybe'"),
    ],
    ids=["no replays", "no experiments", "experiment twice", "replay twice", "unseen word"],
)
def test_replays_that_cannot_be_counted(replays, experiments, message):
    """What cannot be counted is refused with what is at fault."""
    with pytest.raises(DiagnosisError, match=message):
        measure_likelihoods(replays, experiments)


@pytest.mark.parametrize("outcomes", [(), ("yes",), ("yes", "yes")])
def test_experiment_needs_outcomes(outcomes):
    """An experiment that can come out in one way only is refused."""
    with pytest.raises(DiagnosisError, match="two or more different outcomes"):
        Experiment("e", "E", outcomes, 1.0)


@pytest.mark.parametrize("minutes", [-1.0, np.nan, np.inf])
def test_experiment_needs_a_cost(minutes):
    """The cost of an experiment is a finite number of minutes, 0 or more."""
    with pytest.raises(DiagnosisError, match="finite numbers from 0"):
        Experiment("e", "E", ("no", "yes"), minutes)


@given(likelihoods=tables())
def test_each_hypothesis_bears_one_label(likelihoods):
    """Labels by cause, kind of base and group part the hypotheses."""
    groups = [likelihoods.causes]
    for labels in (
        by_cause(likelihoods),
        by_base(likelihoods),
        by_group(likelihoods, groups),
    ):
        names, members = memberships(likelihoods, labels)
        assert members.sum(axis=0).tolist() == [1] * len(likelihoods.hypotheses)
        assert len(names) == len(set(labels.values()))


def test_labels_of_groups():
    """A group is named by its causes."""
    found = measure_likelihoods(REPLAYS, [CONTROL])
    groups = [("no-op", "healthy")]
    assert set(by_group(found, groups).values()) == {"no-op or healthy"}


def test_label_missing():
    """A cause in no group, and a hypothesis without a label, are refused."""
    found = measure_likelihoods(REPLAYS, [CONTROL])
    with pytest.raises(DiagnosisError, match="'healthy' in one"):
        by_group(found, [("no-op",)])
    with pytest.raises(DiagnosisError, match="the labels"):
        memberships(found, {})


def exact_separation(likelihoods, first, second):
    """The definition, by the joint outcomes of all experiments; one kind of base."""
    joint = np.ones((2, 1))
    for one in likelihoods.experiments:
        rows = likelihoods.of(one.name)[[first, second]]
        joint = (joint[:, :, None] * rows[:, None, :]).reshape(2, -1)
    return float(((joint**2).sum(axis=0) / joint.sum(axis=0)).sum() / 2)


@given(likelihoods=tables(causes=(2, 3), bases=(1, 1)))
def test_separation_is_the_expected_probability_of_the_truth(likelihoods):
    """The simulated separation of two causes is near that over all joint outcomes."""
    found = separation(likelihoods, simulations=2000)
    for first in range(len(found)):
        for second in range(first):
            exact = exact_separation(likelihoods, first, second)
            assert found[first, second] == pytest.approx(exact, abs=0.03)


@given(likelihoods=tables())
def test_groups_part_the_causes(likelihoods):
    """Each cause is in one group; every two of a group are inseparable."""
    groups = separable_groups(likelihoods)
    assert sorted(cause for group in groups for cause in group) == sorted(likelihoods.causes)
    found = separation(likelihoods)
    for group in groups:
        rows = [likelihoods.causes.index(cause) for cause in group]
        assert (found[np.ix_(rows, rows)] < 0.9).all()


def test_equal_causes_merge_and_separated_ones_do_not():
    """Causes with the same likelihoods are one group; one that always differs stands alone."""
    same, other = [(10, 0), (10, 0)], [(0, 10), (0, 10)]
    found = table([CONTROL, experiment("two")], {"a": same, "b": other, "c": same})
    assert separable_groups(found) == (("a", "c"), ("b",))
    assert separation(found)[0, 2] == pytest.approx(0.5)


def test_kinds_of_base_are_averaged():
    """Causes that swap their look between kinds of base cannot be told with the kind unknown."""
    replays = [
        replay(cause, base, seed=seed, control="yes" if (cause == "a") == on else "no")
        for cause in "ab"
        for base, on in (("silent", True), ("speaking", False))
        for seed in range(20)
    ]
    found = measure_likelihoods(replays, [CONTROL])
    assert separation(found)[0, 1] == pytest.approx(0.5)


def test_chain_is_not_one_group():
    """Near neighbours in a row do not join the ends, which are well apart."""
    many = [experiment(f"e{n}") for n in range(3)]
    rows = {f"c{n}": [(10, 0) if n > place else (0, 10) for place in range(3)] for n in range(4)}
    # With ten replays one experiment separates by 0.91: neighbours of a sharper limit merge.
    groups = separable_groups(table(many, rows), limit=0.95)
    assert max(len(group) for group in groups) == 2


@given(sizes=st.integers(0, 5))
def test_link_joins_all_or_none(sizes):
    """Where all may join there is one group, where none may there are singles."""
    names = tuple(f"c{n}" for n in range(sizes))
    gaps = np.zeros((sizes, sizes))
    assert link(names, gaps, gaps == 0) == ((names,) if names else ())
    assert link(names, gaps, gaps > 0) == tuple((name,) for name in names)
