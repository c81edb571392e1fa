from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replays import experiment, ledgers, table, tables

from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis import beliefs as planner
from postmortem.diagnosis.beliefs import SMALL_GAIN, Ledger, Prior, plan, price
from postmortem.diagnosis.likelihoods import Likelihoods, by_base, by_cause, memberships

CERTAIN = 10_000
# Four causes; each of the first two experiments halves them, the third repeats the first.
HALVES = table(
    [
        experiment("half", minutes=1.0),
        experiment("other half", minutes=2.0),
        experiment("half again", minutes=1.5),
        experiment("dice", minutes=0.1),
    ],
    {
        f"c{n}": [
            (CERTAIN, 0) if first else (0, CERTAIN),
            (CERTAIN, 0) if second else (0, CERTAIN),
            (CERTAIN, 0) if first else (0, CERTAIN),
            (CERTAIN, CERTAIN),
        ]
        for n, (first, second) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)])
    },
)


def unobserved(ledger):
    """The experiments that a plan may choose from."""
    return [e for e in ledger.likelihoods.experiments if e.name not in ledger.observed]


def information(ledger, labels, path):
    """The definition: the divergence of joint label and outcomes from independence, in bits."""
    _, members = memberships(ledger.likelihoods, labels)
    joint = ledger.weights[:, None]
    for name in path:
        rows = ledger.likelihoods.of(name)
        joint = (joint[:, :, None] * rows[:, None, :]).reshape(len(joint), -1)
    joint = members @ joint
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    held = joint > 0
    return float((joint[held] * np.log2(joint[held] / independent[held])).sum())


@given(ledger=ledgers(), data=st.data())
def test_price_is_the_information(ledger, data):
    """A path gains the mutual information of answer and joint outcomes, never less than 0."""
    path = data.draw(st.permutations([one.name for one in unobserved(ledger)]))
    for labels in (by_cause(ledger.likelihoods), by_base(ledger.likelihoods)):
        found = price(ledger, path, labels=labels)
        assert all(step.bits >= 0 for step in found.steps)
        assert found.bits == pytest.approx(information(ledger, labels, path), abs=1e-6)
        left = found.steps[-1].entropy if path else found.entropy
        assert left == pytest.approx(found.entropy - found.bits, abs=1e-6)


@given(ledger=ledgers(), minutes=st.none() | st.floats(0, 8))
def test_no_step_is_dominated(ledger, minutes):
    """At no step does another that fits gain at least as much for no more, and one strictly."""
    labels = by_cause(ledger.likelihoods)
    found = plan(ledger, labels, minutes=minutes)
    done = []
    for step in found.steps:
        for other in unobserved(ledger):
            if other.name not in (*done, step.experiment):
                rival = price(ledger, [*done, other.name], labels=labels).steps[-1]
                dominates = rival.bits >= step.bits and rival.minutes <= step.minutes
                equal = (rival.bits, rival.minutes) == (step.bits, step.minutes)
                assert equal or not dominates
        done.append(step.experiment)
    assert minutes is None or found.minutes <= minutes


@given(ledger=ledgers())
def test_plan_stops_when_little_is_gained(ledger):
    """Each step gains more than the limit, and what is left gains no more than it."""
    labels = by_cause(ledger.likelihoods)
    found = plan(ledger, labels)
    assert all(step.bits > SMALL_GAIN for step in found.steps)
    path = [step.experiment for step in found.steps]
    assert price(ledger, path, labels=labels) == found
    for other in unobserved(ledger):
        if other.name not in path:
            assert price(ledger, [*path, other.name], labels=labels).steps[-1].bits <= SMALL_GAIN


@given(ledger=ledgers(), copies=st.integers(1, 2))
def test_uninformative_experiment_is_never_planned(ledger, copies):
    """An experiment with the same likelihood for all gains zero bits and is in no plan."""
    old = ledger.likelihoods
    counts = np.hstack([old.counts, np.full((len(old.hypotheses), 2), copies)])
    wider = Likelihoods((*old.experiments, experiment("same")), old.hypotheses, counts, old.replays)
    ledger = replace(ledger, likelihoods=wider)
    found = plan(ledger, by_cause(wider))
    assert "same" not in [step.experiment for step in found.steps]
    gain = price(ledger, ["same"], labels=by_cause(wider)).bits
    assert gain == pytest.approx(0.0, abs=1e-9)


def test_plan_halves_then_halves():
    """What was gained before is not gained again, and cost decides between equals."""
    found = plan(Ledger(HALVES), by_cause(HALVES))
    assert [step.experiment for step in found.steps] == ["half", "other half"]
    assert [step.bits for step in found.steps] == pytest.approx([1.0, 1.0], abs=0.01)
    assert [step.total_minutes for step in found.steps] == [1.0, 3.0]
    assert [step.entropy for step in found.steps] == pytest.approx([1.0, 0.0], abs=0.01)
    assert [step.leading for step in found.steps] == pytest.approx([0.5, 1.0], abs=0.01)
    assert (found.entropy, found.leading) == (pytest.approx(2.0), pytest.approx(0.25))
    assert found.minutes == 3.0


def test_what_does_not_fit_is_skipped():
    """An experiment beyond the minutes left is skipped, and a cheaper one still fits."""
    ledger, labels = Ledger(HALVES), by_cause(HALVES)
    assert [s.experiment for s in plan(ledger, labels, minutes=2.5).steps] == ["half"]
    names = ["other half", "half again"]
    found = plan(ledger, labels, minutes=1.9, candidates=names)
    assert [step.experiment for step in found.steps] == ["half again"]
    assert plan(ledger, labels, minutes=0.0).steps == ()


def test_observed_experiments_are_not_planned():
    """What was observed is not run again, and what it told is no longer to be gained."""
    found = plan(Ledger(HALVES, {"half": "no"}), by_cause(HALVES))
    assert [step.experiment for step in found.steps] == ["other half"]
    assert found.entropy == pytest.approx(1.0, abs=0.01)


def test_plan_is_about_the_answer():
    """Where the answer is the same for all causes, nothing is to be gained."""
    labels = dict.fromkeys(HALVES.hypotheses, "any")
    found = plan(Ledger(HALVES), labels)
    assert (found.steps, found.entropy, found.leading) == ((), 0.0, pytest.approx(1.0))


def test_impossible_causes_are_not_asked_about():
    """Between causes that the prior leaves, only what parts them is planned."""
    ledger = Ledger(HALVES, prior=Prior({"c0": 1, "c1": 1}))
    found = plan(ledger, by_cause(HALVES))
    assert [step.experiment for step in found.steps] == ["other half"]


def test_free_experiment_comes_first():
    """An experiment that costs nothing comes before any that costs, if it gains."""
    experiments = [experiment("dear", minutes=0.01), experiment("free", minutes=0.0)]
    rows = {"a": [(50, 0), (8, 2)], "b": [(0, 50), (2, 8)]}
    found = table(experiments, rows)
    assert plan(Ledger(found), by_cause(found)).steps[0].experiment == "free"


def test_candidates_limit_the_plan():
    """Only named candidates are planned; one observed is passed over, one unknown refused."""
    ledger, labels = Ledger(HALVES, {"dice": "no"}), by_cause(HALVES)
    found = plan(ledger, labels, candidates=["dice", "other half"])
    assert [step.experiment for step in found.steps] == ["other half"]
    with pytest.raises(DiagnosisError, match="experiment 'dance'"):
        plan(ledger, labels, candidates=["dance"])


def test_more_bits_come_first_at_no_cost():
    """Of two experiments that cost nothing, the one that gains more comes first."""
    experiments = [experiment("weak", minutes=0.0), experiment("strong", minutes=0.0)]
    found = table(experiments, {"a": [(8, 2), (50, 0)], "b": [(2, 8), (0, 50)]})
    assert plan(Ledger(found), by_cause(found)).steps[0].experiment == "strong"


@pytest.mark.parametrize("path", [["dance"], ["half", "half"], ["dice"]])
def test_path_that_cannot_be_walked(path):
    """An unknown experiment, one named twice, and one observed already are refused."""
    ledger = Ledger(HALVES, {"dice": "no"})
    with pytest.raises(DiagnosisError, match=f"experiment '{path[-1]}'"):
        price(ledger, path, labels=by_cause(HALVES))


@given(likelihoods=tables(causes=(2, 4)))
def test_unfollowed_branches_only_understate(likelihoods):
    """With few branches followed the gain is no greater, and short by no more than is told."""
    ledger, labels = Ledger(likelihoods), by_cause(likelihoods)
    path = [one.name for one in likelihoods.experiments]
    whole = price(ledger, path, labels=labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "BRANCHES", 2)
        short = price(ledger, path, labels=labels)
    assert short.bits <= whole.bits + 1e-9
    assert whole.bits - short.bits <= short.steps[-1].unfollowed + 1e-9
    leading = [short.leading, *(step.leading for step in short.steps), whole.steps[-1].leading]
    assert all(after >= before - 1e-9 for before, after in pairwise(leading))
