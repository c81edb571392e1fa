import pytest
from replays import experiment, replay

from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.inquiry import leave_out
from postmortem.diagnosis.likelihoods import measure_likelihoods
from postmortem.experiments.metrics import rate_estimate

SYMPTOM, CONTROL, SCAN = experiment("symptom"), experiment("control"), experiment("scan")
BATTERY = [SYMPTOM, CONTROL, SCAN]
# Replays of one severity count as one observation, so there are many severities.
SEEDS, SEVERITIES = range(2), tuple(f"s{number}" for number in range(12))
# How causes come out: the symptom cannot tell the two faults apart, nothing tells the twins apart.
OUTCOMES = {
    "healthy": {"symptom": "no", "control": "no", "scan": "no"},
    "no-op": {"symptom": "yes", "control": "yes", "scan": "no"},
    "sibling": {"symptom": "yes", "control": "no", "scan": "yes"},
    "twin": {"symptom": "yes", "control": "no", "scan": "yes"},
}


def replayed(*causes, seeds=SEEDS, severities=SEVERITIES):
    """Replays of causes that always come out alike."""
    return [
        replay(cause, seed=seed, severity=severity, **OUTCOMES[cause])
        for cause in causes
        for seed in seeds
        for severity in severities
    ]


def test_distinct_causes_are_all_found():
    """Causes that always come out in their own way are found, with no false alarm."""
    found = leave_out(replayed("healthy", "no-op", "sibling"), BATTERY)
    assert found.accuracy == rate_estimate(72, 72)
    assert found.fewest_groups == 3
    assert found.false_alarms == rate_estimate(0, 24)
    assert found.misses == ()
    assert 0 < found.brier.value < 0.05


def test_twins_are_one_answer():
    """Causes that the battery cannot part are right as their group."""
    found = leave_out(replayed("healthy", "sibling", "twin"), BATTERY)
    assert {one.predicted for one in found.diagnoses} == {("healthy",), ("sibling", "twin")}
    assert found.accuracy.value == 1.0


def test_symptom_alone_is_not_an_easier_question():
    """With a subset of the battery the groups stay those of the whole."""
    found = leave_out(replayed("healthy", "no-op", "sibling"), BATTERY, subset=["symptom"])
    assert found.fewest_groups == 3
    # The two faults tie and the first is named.
    assert found.accuracy == rate_estimate(48, 72)
    assert {(miss.replay.cause, miss.predicted) for miss in found.misses} == {
        ("sibling", ("no-op",))
    }
    assert all(miss.probability == pytest.approx(0.5, abs=0.05) for miss in found.misses)


def test_nothing_is_learnt_from_the_same_seed_or_severity():
    """A replay that only its own seed or its own severity could teach is missed."""
    odd = {(0, "s0"), (0, "s1"), (1, "s0")}
    replays = [
        one.model_copy(update={"outcomes": OUTCOMES["healthy"]})
        if one.cause == "no-op" and (one.seed, one.severity) in odd
        else one
        for one in replayed("healthy", "no-op")
    ]
    found = leave_out(replays, BATTERY)
    assert {(miss.replay.seed, miss.replay.severity) for miss in found.misses} == odd
    assert all(miss.predicted == ("healthy",) for miss in found.misses)


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
    one, many = (
        measure_likelihoods(
            [replay("a", seed=seed, severity="mild", control="yes") for seed in range(count)],
            [CONTROL],
        )
        for count in (1, 30)
    )
    assert one.counts == pytest.approx(many.counts)


def test_false_alarms_are_counted():
    """A healthy replay that looks like a fault is a false alarm; with none there is no share."""
    replays = replayed("healthy", "no-op")
    replays[0] = replay("healthy", seed=0, severity="s0", **OUTCOMES["no-op"])
    assert leave_out(replays, BATTERY).false_alarms == rate_estimate(1, 24)
    assert leave_out(replayed("no-op", "sibling"), BATTERY).false_alarms.value is None


def test_bins_hold_each_diagnosis_once():
    """Every diagnosis is in one bin, and those that are right sum to the accuracy."""
    replays = replayed("healthy", "no-op", "sibling")
    found = leave_out(replays, BATTERY, subset=["symptom"])
    bins = list(found.bins())
    assert sum(right.n for _, _, right in bins) == len(replays)
    assert sum(round(right.value * right.n) for _, _, right in bins) == 48
    assert all(0 < mean <= 1 for _, mean, _ in bins)


def test_what_was_not_run_is_not_evidence():
    """A replay that ran part of the battery is diagnosed from that part."""
    replays = replayed("healthy", "no-op")
    replays[0] = replay("healthy", seed=0, control="no")
    assert leave_out(replays, BATTERY).accuracy.value == 1.0


@pytest.mark.parametrize(
    ("seeds", "severities"), [((0,), SEVERITIES), (SEEDS, ("mild",))], ids=["seed", "severity"]
)
def test_one_seed_or_severity_cannot_be_left_out(seeds, severities):
    """Where nothing is left to learn a cause from, the error says which replay and what to do."""
    replays = replayed("no-op", seeds=seeds, severities=severities)
    with pytest.raises(DiagnosisError, match=r"replay 'no-op/silent/0/\w+': .* more seeds"):
        leave_out(replays, BATTERY)
