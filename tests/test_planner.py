from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import experiment, ledgers, table

from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.beliefs import SMALL_GAIN, Ledger, Prior, expected_bits, plan
from postmortem.diagnosis.likelihoods import (
    Hypothesis,
    Likelihoods,
    by_base,
    by_cause,
    memberships,
)

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
# What the histories drawn at random may be off by, in bits.
LUCK = 0.05


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


@given(ledger=ledgers())
def test_the_price_of_a_test_is_its_information(ledger):
    """What was not observed has as its price the mutual information of answer and outcome."""
    unobserved = {e.name for e in ledger.likelihoods.experiments} - set(ledger.observed)
    for labels in (by_cause(ledger.likelihoods), by_base(ledger.likelihoods)):
        found = expected_bits(ledger, labels)
        assert found.keys() == unobserved
        for name, bits in found.items():
            assert bits == pytest.approx(information(ledger, labels, [name]), abs=1e-9)


@settings(max_examples=30)
@given(ledger=ledgers(), minutes=st.none() | st.floats(0, 8))
def test_a_plan_takes_what_gains_and_fits(ledger, minutes):
    """Each step gains more than the limit, all fit, and the steps' bits are those of the whole."""
    labels = by_cause(ledger.likelihoods)
    found = plan(ledger, labels, minutes=minutes)
    assert all(step.bits > SMALL_GAIN for step in found.steps)
    assert minutes is None or found.minutes <= minutes
    path = [step.experiment for step in found.steps]
    assert len({*path, *ledger.observed}) == len(path) + len(ledger.observed)
    bits = sum(step.bits for step in found.steps)
    assert bits == pytest.approx(information(ledger, labels, path), abs=LUCK)


@settings(max_examples=30)
@given(ledger=ledgers(), copies=st.integers(1, 2))
def test_uninformative_experiment_is_never_planned(ledger, copies):
    """An experiment with the same likelihood for all gains zero bits and is in no plan."""
    old = ledger.likelihoods
    counts = np.hstack([old.counts, np.full((len(old.hypotheses), 2), copies)])
    wider = Likelihoods((*old.experiments, experiment("same")), old.hypotheses, counts, old.replays)
    found = plan(replace(ledger, likelihoods=wider), by_cause(wider))
    assert "same" not in [step.experiment for step in found.steps]


def test_plan_halves_then_halves():
    """What was gained before is not gained again, and cost decides between equals."""
    found = plan(Ledger(HALVES), by_cause(HALVES))
    assert [step.experiment for step in found.steps] == ["half", "other half"]
    assert [step.bits for step in found.steps] == pytest.approx([1.0, 1.0], abs=0.01)
    assert found.minutes == 3.0


@pytest.mark.parametrize(
    ("ledger", "options", "planned"),
    [
        (Ledger(HALVES), {"minutes": 2.5}, ["half"]),
        (Ledger(HALVES), {"minutes": 0.0}, []),
        (
            Ledger(HALVES),
            {"minutes": 1.9, "candidates": ["other half", "half again"]},
            ["half again"],
        ),
        (Ledger(HALVES, {"half": "no"}), {}, ["other half"]),
        (Ledger(HALVES, {"dice": "no"}), {"candidates": ["dice", "other half"]}, ["other half"]),
        (Ledger(HALVES, prior=Prior({"c0": 1, "c1": 1})), {}, ["other half"]),
    ],
    ids=["time", "no time", "a cheaper one", "observed", "candidates", "prior"],
)
def test_only_what_fits_and_parts_is_planned(ledger, options, planned):
    """Time, evidence, candidates and prior each limit the plan."""
    found = plan(ledger, by_cause(HALVES), **options)
    assert [step.experiment for step in found.steps] == planned


def test_plan_is_about_the_answer():
    """Where the answer is the same for all causes, nothing is to be gained."""
    found = plan(Ledger(HALVES), dict.fromkeys(HALVES.hypotheses, "any"))
    assert found.steps == ()


@pytest.mark.parametrize(("minutes", "first"), [((0.01, 0.0), "weak"), ((0.0, 0.0), "strong")])
def test_what_costs_nothing_comes_first_and_of_those_the_best(minutes, first):
    """Bits a minute decide, and bits between those that cost nothing."""
    names = ("strong", "weak")
    each = [experiment(name, minutes=cost) for name, cost in zip(names, minutes, strict=True)]
    found = table(each, {"a": [(50, 0), (8, 2)], "b": [(0, 50), (2, 8)]})
    assert plan(Ledger(found), by_cause(found)).steps[0].experiment == first


def test_an_unknown_candidate_is_refused():
    """A plan among experiments that the table does not have is refused by name."""
    with pytest.raises(DiagnosisError, match="experiment 'dance'"):
        plan(Ledger(HALVES), by_cause(HALVES), candidates=["dance"])


def test_a_test_is_priced_for_the_question():
    """A test that settles one question may say nothing of another."""
    base, cause = experiment("base"), experiment("cause")
    kinds = [Hypothesis(name, kind) for name in ("a", "b") for kind in ("silent", "speaking")]
    counts = np.array([(50, 0, 50, 0), (0, 50, 50, 0), (50, 0, 0, 50), (0, 50, 0, 50)], dtype=float)
    ledger = Ledger(Likelihoods((base, cause), tuple(kinds), counts, 200))
    for labels, telling in ((by_base, "base"), (by_cause, "cause")):
        bits = expected_bits(ledger, labels(ledger.likelihoods))
        assert bits.pop(telling) > 0.8
        assert all(rest == pytest.approx(0.0, abs=1e-9) for rest in bits.values())
