import pytest
from replays import replay

from postmortem.case.schema import Observed
from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.inquiry import (
    ROOM,
    TIME_BOX,
    as_diagnosis,
    evaluate_replays,
    open_inquiry,
    record_beliefs,
    record_next_steps,
    record_trust,
)
from postmortem.diagnosis.likelihoods import list_replays
from postmortem.experiments.records import Measure, Provenance, RecordFile, Table, Text, Verdict

# Three causes that the tests below tell apart, and one that does what another does.
OUTCOMES = {
    "healthy": {"v2": "varies", "load": "silent", "inspect": "nothing"},
    "zero-b": {"v2": "all 0.0", "load": "silent", "inspect": "untrained"},
    "alpha-zero": {"v2": "all 0.0", "load": "silent", "inspect": "untrained"},
    "other-shapes": {"v2": "no answer", "load": "raises", "inspect": "shape-mismatch"},
}
SAME = {"settings": "unchanged", "prompt": "whole", "names": "the same", "v1": "all 0.0"}
SEVERITIES = {"healthy": "alpha 32", "other-shapes": "named truly"}


def make_replays(seeds=3, outcomes=OUTCOMES):
    """Replays of each cause on one kind of base."""
    return [
        replay(cause, seed=seed, severity=SEVERITIES.get(cause, "-"), **found, **SAME)
        for cause, found in outcomes.items()
        for seed in range(seeds)
    ]


@pytest.fixture
def inquiry(case):
    """The shipped case met with the replays above."""
    return open_inquiry(case, make_replays())


def found_in(session, kind):
    """The records of one kind by key."""
    return {r.key: r for r in session.records if isinstance(r, kind)}


def test_the_write_ups_prior_leaves_room(inquiry):
    """Causes that the write-up does not list share the room; its own share the rest."""
    weights = inquiry.priors["write-up, initial"].causes
    assert weights.keys() == OUTCOMES.keys()
    total = sum(weights.values())
    others = sum(weights[cause] for cause in ("healthy", "zero-b", "alpha-zero"))
    assert others / total == pytest.approx(ROOM)
    assert weights["other-shapes"] / total == pytest.approx(1 - ROOM)


def test_without_confidences_the_prior_is_flat_alone(case):
    """A case whose hypotheses carry no numbers has no other prior than the flat one."""
    plain = [h.model_copy(update={"initial": None, "final": None}) for h in case.hypotheses]
    found = open_inquiry(case.model_copy(update={"hypotheses": plain}), make_replays())
    assert list(found.priors) == ["flat"]


@pytest.mark.parametrize("where", ["observed", "path", "causes"])
def test_a_name_that_no_replay_knows_is_refused(case, where):
    """A test or cause that the case names and the replays do not have is named."""
    changes = {
        "observed": {"observed": [Observed(test="x-ray", outcome="o", grade="log", source="s")]},
        "path": {"path": ["x-ray"]},
        "causes": {"hypotheses": [case.hypotheses[0].model_copy(update={"causes": ["x-ray"]})]},
    }
    with pytest.raises(DiagnosisError, match="found 'x-ray'"):
        open_inquiry(case.model_copy(update=changes[where]), make_replays())


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("inspect", "TEST=OUTCOME"),
        ("x-ray=seen", "experiment 'x-ray'"),
        ("inspect=x", "an outcome among"),
        ("=x", "experiment ''"),
    ],
)
def test_an_outcome_that_cannot_be_is_refused(inquiry, pair, told):
    """What is given as observed must be a test and one of its outcomes."""
    with pytest.raises(DiagnosisError, match=told):
        inquiry.parse_outcomes([pair])


def test_an_outcome_may_hold_an_equals_sign_and_spaces(inquiry):
    """Only the first sign parts the test from its outcome; spaces around do not count."""
    assert inquiry.parse_outcomes([" inspect = nothing "]) == {"inspect": "nothing"}
    with pytest.raises(DiagnosisError, match="'a=b'"):
        inquiry.parse_outcomes(["inspect=a=b"])


def test_an_unknown_prior_is_refused(inquiry):
    """A prior that the case does not have is refused with those that it has."""
    with pytest.raises(DiagnosisError, match="flat or write-up, initial"):
        inquiry.ledger("strong")


def test_the_symptom_moves_what_it_should(session, inquiry):
    """Zeros that load in silence leave the causes without effect, and settings tell nothing."""
    record_beliefs(session, inquiry)
    measures = found_in(session, Measure)
    assert measures["diagnosis.cause.zero-b"].value > 0.4
    assert measures["diagnosis.cause.zero-b"].value == pytest.approx(
        measures["diagnosis.cause.alpha-zero"].value
    )
    assert measures["diagnosis.cause.other-shapes"].value < 0.05
    assert measures["diagnosis.bits.settings"].value == pytest.approx(0.0, abs=1e-9)
    assert measures["diagnosis.bits.v2"].value > 0.2
    apart = found_in(session, Table)["diagnosis.apart"].rows[0][0]
    assert set(apart.split(" or ")) == {"zero-b", "alpha-zero"}
    assert found_in(session, Verdict)["diagnosis.base_answers"].verdict == "holds"


def test_without_a_silent_base_nothing_is_said_of_it(session, case):
    """Replays on a speaking base alone say that no silent one was replayed."""
    replays = [r.model_copy(update={"base": "speaking"}) for r in make_replays()]
    record_beliefs(session, open_inquiry(case, replays))
    assert found_in(session, Verdict)["diagnosis.base_answers"].verdict == "not available"


def test_without_evidence_on_record_the_beliefs_are_the_prior(session, case):
    """A case that records no outcome leaves every cause where the prior had it."""
    bare = case.model_copy(update={"observed": [], "path": []})
    inquiry = open_inquiry(bare, make_replays())
    record_beliefs(session, inquiry)
    record_next_steps(session, inquiry)
    for cause in OUTCOMES:
        value = found_in(session, Measure)[f"diagnosis.cause.{cause}"].value
        assert value == pytest.approx(1 / len(OUTCOMES))
    assert found_in(session, Table)["diagnosis.account"].rows == ()


def test_one_seed_cannot_be_left_out(session, case):
    """With one seed the trust is not available, with the reason, and nothing raises."""
    record_trust(session, open_inquiry(case, make_replays(seeds=1)))
    assert found_in(session, Verdict)["diagnosis.trusted"].verdict == "not available"
    assert found_in(session, Measure)["diagnosis.top1"].value is None
    assert found_in(session, Table).keys() >= {"diagnosis.misses", "diagnosis.reliability"}


def test_replays_that_differ_are_told_apart(session, inquiry):
    """Causes with outcomes of their own are all found again, and the equal ones merge."""
    record_trust(session, inquiry)
    record_beliefs(session, inquiry)
    assert found_in(session, Measure)["diagnosis.top1"].value == 1.0
    groups = [row[0] for row in found_in(session, Table)["diagnosis.groups"].rows]
    assert any({"zero-b", "alpha-zero"} <= set(group.split(" or ")) for group in groups)


def test_the_next_step_is_one_that_parts_what_is_left(session, inquiry):
    """What was observed is not asked again, and the first minutes keep within their box."""
    record_next_steps(session, inquiry)
    tables = found_in(session, Table)
    asked = {row[0] for row in tables["diagnosis.next.steps"].rows}
    assert asked.isdisjoint(inquiry.observed)
    assert found_in(session, Measure)["diagnosis.first.minutes"].value <= TIME_BOX
    assert found_in(session, Text)["diagnosis.first.test"].text
    path = [row[0] for row in tables["diagnosis.path.steps"].rows]
    assert path == inquiry.case.path


def test_worlds_are_held_out_whole(case):
    """With several worlds a replay is diagnosed from other worlds alone."""
    found = evaluate_replays(case, list_replays([make_file(seed) for seed in range(3)]))
    assert found.accuracy.value == 1.0
    assert found.accuracy.n == 3 * len(make_replays())
    # In one world zero-b looks like a shape mismatch, and no other world has shown that.
    odd = OUTCOMES | {"zero-b": OUTCOMES["other-shapes"]}
    files = [*(make_file(seed) for seed in range(5)), make_file(5, odd)]
    found = evaluate_replays(case, list_replays(files))
    assert {miss.replay.cause for miss in found.misses} == {"zero-b"}


def make_file(seed, outcomes=OUTCOMES):
    """The replays of one world."""
    provenance = Provenance(
        notebook="replays",
        case="c",
        profile="p",
        parameters={},
        digests={},
        versions={},
        device="cpu",
        dtype="float32",
        seed=seed,
    )
    records = tuple(make_replays(outcomes=outcomes))
    return RecordFile(path="r", provenance=provenance, records=records, digest="0")


def test_a_diagnosis_is_told_in_lines(inquiry):
    """The text ranks causes, weighs the evidence, says what merges, and what to run next."""
    text = as_diagnosis(inquiry, prior="flat", extra=["inspect=untrained"], minutes=3.0)
    lines = text.splitlines()
    assert lines[0].endswith("inspect: untrained")
    ranked = [line for line in lines if ": " in line and "%" in line]
    assert "zero-b: lora_B is zero" in ranked[0] + ranked[1]
    assert any(line.strip().startswith("against") for line in lines)
    assert "cannot be told apart by this evidence: zero-b, alpha-zero" in text
    assert "next" in lines[-1]
