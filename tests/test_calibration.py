import random
from itertools import pairwise

import pytest
from replays import experiment, replay

from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.beliefs import BIN_EDGES, leave_out
from postmortem.diagnosis.likelihoods import measure_likelihoods
from postmortem.experiments.metrics import rate_estimate

SYMPTOM, CONTROL, SCAN = experiment("symptom"), experiment("control"), experiment("scan")
BATTERY = [SYMPTOM, CONTROL, SCAN]
# Replays of one severity count as one observation, so there are many severities.
SEEDS, SEVERITIES = range(2), tuple(f"s{number}" for number in range(12))


def looks(cause):
    """How a cause comes out: the symptom cannot tell the two faults apart."""
    return {
        "healthy": {"symptom": "no", "control": "no", "scan": "no"},
        "no-op": {"symptom": "yes", "control": "yes", "scan": "no"},
        "sibling": {"symptom": "yes", "control": "no", "scan": "yes"},
        "twin": {"symptom": "yes", "control": "no", "scan": "yes"},
    }[cause]


def replayed(causes, seeds=SEEDS, severities=SEVERITIES):
    """Replays of causes that always come out alike."""
    return [
        replay(cause, seed=seed, severity=severity, **looks(cause))
        for cause in causes
        for seed in seeds
        for severity in severities
    ]


def test_distinct_causes_are_all_found():
    """Causes that always come out in their own way are found, with no false alarm."""
    replays = replayed(["healthy", "no-op", "sibling"])
    found = leave_out(replays, BATTERY)
    assert found.groups == (("healthy",), ("no-op",), ("sibling",))
    assert found.accuracy == rate_estimate(72, 72)
    assert found.fewest_groups == 3
    assert found.confusion == ((24, 0, 0), (0, 24, 0), (0, 0, 24))
    assert (found.false_alarms, found.false_alarm_count) == (rate_estimate(0, 24), 0)
    assert found.misses == ()
    assert 0 < found.brier.value < 0.05


def test_twins_are_one_answer():
    """Causes that the battery cannot part are right as their group."""
    found = leave_out(replayed(["healthy", "sibling", "twin"]), BATTERY)
    assert found.groups == (("healthy",), ("sibling", "twin"))
    assert found.accuracy.value == 1.0


def test_right_is_on_the_diagonal():
    """What is right as a group of its part of the replays is on the diagonal of the whole."""
    replays = replayed(["no-op", "sibling"], severities=SEVERITIES[:9])
    # By one experiment, nine severities of each part the causes by just over 0.9; the eight that
    # are left to learn from do not.
    found = leave_out(replays, [CONTROL])
    assert found.groups == (("no-op",), ("sibling",))
    assert found.fewest_groups == 1
    assert found.accuracy == rate_estimate(36, 36)
    assert found.confusion == ((18, 0), (0, 18))


def test_symptom_alone_is_not_an_easier_question():
    """With a subset of the battery the groups stay those of the whole."""
    replays = replayed(["healthy", "no-op", "sibling"])
    found = leave_out(replays, BATTERY, subset=["symptom"])
    assert len(found.groups) == 3
    # The two faults tie and the first is named.
    assert found.accuracy == rate_estimate(48, 72)
    assert found.confusion == ((24, 0, 0), (0, 24, 0), (0, 24, 0))
    assert {miss.cause for miss in found.misses} == {"sibling"}
    assert {miss.predicted for miss in found.misses} == {"no-op"}
    assert all(miss.probability == pytest.approx(0.5, abs=0.05) for miss in found.misses)


def without_each(replays, battery):
    """What is found with one experiment left out at a time, by its name."""
    names = [one.name for one in battery]
    return {
        name: leave_out(replays, battery, subset=[other for other in names if other != name])
        for name in names
    }


def test_without_each():
    """Each experiment removed in turn costs what it alone tells; a spare one costs nothing."""
    replays = replayed(["healthy", "no-op", "sibling"])
    found = without_each(replays, [SYMPTOM, CONTROL])
    # Without the symptom siblings and the healthy look alike, and the healthy come first. Without
    # the control the faults tie, and the no-op comes first.
    assert {name: one.accuracy for name, one in found.items()} == {
        "symptom": rate_estimate(48, 72),
        "control": rate_estimate(48, 72),
    }
    assert found["control"] == leave_out(replays, [SYMPTOM, CONTROL], subset=["symptom"])
    spare = without_each(replays, BATTERY)
    assert [one.accuracy.value for one in spare.values()] == [1.0, 1.0, 1.0]


def test_nothing_is_learnt_from_the_same_seed_or_severity():
    """A replay that only its own seed or its own severity could teach is missed."""
    replays = replayed(["healthy", "no-op"])
    odd = {"symptom": "no", "control": "no", "scan": "no"}
    for key in ((0, "s0"), (0, "s1"), (1, "s0")):
        place = next(
            n
            for n, one in enumerate(replays)
            if (one.cause, one.seed, one.severity) == ("no-op", *key)
        )
        replays[place] = replay("no-op", seed=key[0], severity=key[1], **odd)
    found = leave_out(replays, BATTERY)
    missed = {miss.key for miss in found.misses}
    assert missed == {"no-op/silent/0/s0", "no-op/silent/0/s1", "no-op/silent/1/s0"}
    assert all(miss.predicted == "healthy" for miss in found.misses)


def test_same_severity_teaches_nothing():
    """What a severity looks like is not learnt from that severity."""
    many = [experiment(f"e{number}") for number in range(8)]
    replays = [
        replay(cause, seed=seed, severity=severity, **{one.name: word for one in many})
        for cause, words in (("a", ("yes", "no")), ("b", ("no", "yes")))
        for seed in range(10)
        for severity, word in zip(("mild", "severe"), words, strict=True)
    ]
    # Each cause looks, in one severity, as the other does in that learnt from.
    assert leave_out(replays, many).accuracy.value == 0.0


def test_repeats_of_a_severity_teach_no_more():
    """However often one severity is replayed, it stays one observation."""
    found = [
        measure_likelihoods(
            [replay("a", seed=seed, severity="mild", control="yes") for seed in range(count)],
            [CONTROL],
        )
        for count in (1, 30)
    ]
    assert found[0].counts == pytest.approx(found[1].counts)


def test_false_alarms_are_counted():
    """A healthy replay that looks like a fault is a false alarm, with an exact interval."""
    replays = replayed(["healthy", "no-op"])
    replays[0] = replay("healthy", seed=0, severity="s0", **looks("no-op"))
    found = leave_out(replays, BATTERY)
    assert (found.false_alarms, found.false_alarm_count) == (rate_estimate(1, 24), 1)
    assert found.confusion[0] == (23, 1)
    assert leave_out(replayed(["no-op", "sibling"]), BATTERY).false_alarms.value is None


def test_bins_hold_each_diagnosis_once():
    """Every diagnosis is in one bin, whose right ones sum to the accuracy."""
    shuffled = random.Random(0)
    replays = [
        replay(
            cause,
            base,
            seed=seed,
            **{one.name: "yes" if shuffled.random() < rate else "no" for one in BATTERY},
        )
        for cause, rate in (("a", 0.2), ("b", 0.8))
        for base in ("silent", "speaking")
        for seed in range(20)
    ]
    found = leave_out(replays, BATTERY)
    assert [(one.low, one.high) for one in found.bins] == list(pairwise(BIN_EDGES))
    assert sum(one.right.n for one in found.bins) == 80
    hits = sum(round(one.right.value * one.right.n) for one in found.bins if one.right.n)
    assert hits == round(found.accuracy.value * 80) == 80 - len(found.misses)
    assert all(one.low < one.predicted <= one.high for one in found.bins if one.right.n)
    assert [one.predicted for one in found.bins if not one.right.n] == [
        None for one in found.bins if not one.right.n
    ]
    assert sum(map(sum, found.confusion)) == 80


def test_kind_of_base_is_judged():
    """The share of replays whose kind of base is found is told."""
    replays = [
        replay("a", base, seed=seed, control=word)
        for base, word in (("silent", "yes"), ("speaking", "no"))
        for seed in range(4)
    ]
    found = leave_out(replays, [CONTROL])
    assert (found.base_accuracy, found.accuracy) == (rate_estimate(8, 8), rate_estimate(8, 8))


def test_what_was_not_run_is_not_evidence():
    """A replay that ran part of the battery is diagnosed from that part."""
    replays = replayed(["healthy", "no-op"])
    replays[0] = replay("healthy", seed=0, control="no")
    assert leave_out(replays, BATTERY).accuracy.value == 1.0


@pytest.mark.parametrize(
    ("seeds", "severities"), [((0,), SEVERITIES), (SEEDS, ("mild",))], ids=["seed", "severity"]
)
def test_one_seed_or_severity_cannot_be_left_out(seeds, severities):
    """Where nothing is left to learn a cause from, the error says which replay and what to do."""
    replays = replayed(["no-op"], seeds, severities)
    with pytest.raises(DiagnosisError, match=r"replay 'no-op/silent/0/\w+': .* more seeds"):
        leave_out(replays, BATTERY)


def test_refused_at_once():
    """No replays, and a subset that names no experiment, are refused."""
    with pytest.raises(DiagnosisError, match="the replays"):
        leave_out([], BATTERY)
    with pytest.raises(DiagnosisError, match="experiment 'dance'"):
        leave_out(replayed(["healthy"]), BATTERY, subset=["dance"])
