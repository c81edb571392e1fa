import pytest
from answers import answers_of

from postmortem.checker.errors import RecordError
from postmortem.experiments.analysis import (
    _judge_cases,
    knows_and_does_not_say,
    record_attempt,
    record_swap,
    reproduces_symptom,
    shown,
    summarise,
)
from postmortem.experiments.metrics import Estimate
from postmortem.experiments.records import Measure, Prediction, Timing, Verdict, read_records
from postmortem.models.world import Member


def test_a_finished_session_leaves_sealed_records_with_their_provenance(session):
    """What a session recorded is read back whole, with the digest of each input."""
    answers = session.answer("v1", system="suspect")
    record_attempt(session, "v1", answers=answers)
    seal = session.finish()
    file = read_records(session.records_path)
    assert file.digest == seal.digest
    assert len(file.of(Prediction)) == 8
    assert set(file.provenance.digests) == {"case", "world", "data", "notebook"}
    assert {"commit", "hardware", "seconds", "started"} <= set(file.provenance.aside)


def test_replays_that_a_session_read_are_an_input(session):
    """Where a notebook opened the kept replays their digest stands beside the other inputs."""
    session.replays = "abc"
    session.finish()
    assert read_records(session.records_path).provenance.digests["replays"] == "abc"


def test_nothing_is_on_disk_before_the_seal(session):
    """A session that stops early leaves no record file."""
    session.measure("a", 1.0)
    assert not session.records_path.exists()


def test_times_are_no_part_of_the_digest(session, tmp_path):
    """Two sessions that differ in their times alone have the same digest."""
    session.measure("a", 1.0)
    first = session.finish()
    session.add(Timing(key="another", seconds=3.0))
    assert session.finish().digest == first.digest


def test_a_key_is_recorded_once(session):
    """A second measure under the same key is refused."""
    session.measure("a", 1.0)
    with pytest.raises(RecordError, match="'a'"):
        session.measure("a", 2.0)


def test_no_value_needs_a_reason(session):
    """A measure without a value says why, or is refused."""
    with pytest.raises(RecordError, match="reason"):
        session.measure("a", Estimate(None, None, None, 0))
    session.measure("b", None, reason="no labels")
    assert session.records[-1].reason == "no labels"


def test_a_measure_that_is_no_number_is_refused(session):
    """NaN never reaches a record file."""
    session.measure("a", float("nan"))
    with pytest.raises(RecordError, match="finite"):
        session.finish()


def test_a_role_that_is_missing_is_recorded_as_not_available(session):
    """A missing role has every key that a present one has, without value and with the reason."""
    absent = Member(role="reference", path=None, digest=None, reason="this profile has none")
    members = session.world.members | {"reference": absent}
    session.world = session.world.model_copy(update={"members": members})
    base = session.answer("v2")
    record_swap(
        session,
        {"base": base, "suspect": session.answer("v2", system="suspect"), "reference": None},
        prompt="v2",
    )
    measures = {r.key: r for r in session.records if isinstance(r, Measure)}
    present = {k.split(".v2.")[1] for k in measures if k.startswith("swap.suspect.")}
    missing = {
        k.split(".v2.")[1]: r for k, r in measures.items() if k.startswith("swap.reference.")
    }
    assert set(missing) == present
    assert {(r.value, r.reason) for r in missing.values()} == {(None, "this profile has none")}


def test_the_symptom_is_every_answer_a_number_and_all_the_reported_value(case):
    """Answers reproduce the symptom only when all are numbers and all are 0.0."""
    attempt = case.attempts["v2"]
    assert reproduces_symptom(answers_of([0.0] * 4, [0.0] * 4, None), attempt)[0]
    assert not reproduces_symptom(answers_of([0.0, 0.1, 0.0, 0.0], [0.0] * 4, None), attempt)[0]
    assert not reproduces_symptom(answers_of([0.5] * 4, [0.0] * 4, None), attempt)[0]


@pytest.mark.parametrize(
    ("values", "log_odds", "decided"),
    [
        ([0.0] * 8, [-9, -8, -7, -6, -2, -1.5, -1.2, -1], True),
        ([0.1, 0.2, 0.1, 0.2, 0.8, 0.9, 0.8, 0.9], [-9, -8, -7, -6, 2, 1.5, 1.2, 1], False),
        ([0.0] * 8, [1, 2, 3, 4, 1, 2, 3, 4], None),
    ],
)
def test_knowing_without_saying_needs_the_interval_above_chance(values, log_odds, decided):
    """Log-odds that rank while values do not: holds; values that rank: refuted; else open."""
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    summary = summarise(answers_of(values, log_odds, labels))
    assert knows_and_does_not_say(summary)[0] is decided


def test_without_labels_nothing_is_said_of_knowing():
    """Rows without labels leave it open whether the model knows."""
    summary = summarise(answers_of([0.0] * 4, [1.0, 2.0, 3.0, 4.0], None))
    assert knows_and_does_not_say(summary) == (None, "the rows came without labels")


def test_one_class_alone_is_not_called_a_lack_of_labels():
    """Rows of one class have labels, and the reason for no AUC says which lack it is."""
    summary = summarise(answers_of([0.0] * 3, [1.0, 2.0, 3.0], [1, 1, 1]))
    assert knows_and_does_not_say(summary) == (None, "the labels hold one class alone")


def test_without_labels_case_a_is_left_open(session):
    """A reference whose values vary is not said to work where no labels can tell."""
    varied = answers_of([0.1, 0.9, 0.5], [0.0] * 3, None)
    zeros = answers_of([0.0] * 3, [0.0] * 3, None)
    _judge_cases(session, varied, suspect=zeros, attempt=session.case.attempts["v2"])
    found = {r.key: r.verdict for r in session.records if isinstance(r, Verdict)}
    assert found["swap.case_a"] == "cannot tell"
    assert found["swap.case_a_means_mismatch"] == "cannot tell"
    assert found["swap.case_b"] == "refuted"


def test_control_characters_are_shown_and_not_sent():
    """A text in a table is one short line in which escapes are visible."""
    line = shown("\x1b[31mred\n" + "x" * 100, limit=20)
    assert line.startswith("\\x1b[31mred\\n")
    assert len(line) == 20
    assert shown("") == "(nothing)"
