import pytest

from postmortem.checker.errors import RecordError
from postmortem.experiments.ask import System, ask
from postmortem.experiments.attempts import record_attempt
from postmortem.experiments.metrics import Estimate
from postmortem.experiments.records import Prediction, read_records


def test_a_finished_session_leaves_sealed_records_with_their_provenance(session):
    """What a session recorded is read back whole with the digest of each input, once it is done."""
    answers = ask(session, System("suspect", "suspect"), "v1")
    session.add(*answers.predictions)
    record_attempt(session, "v1", answers)
    assert not session.records_path.exists()
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


def test_a_step_that_is_taken_again_is_timed_again(session):
    """Each time has a record of its own, and a step is not confused with one of a longer name."""
    for step in ("base on v2_yes_no", "base on v2", "base on v2"):
        with session.timed(step):
            pass
    keys = [record.key for record in session.records]
    assert keys == ["base on v2_yes_no", "base on v2", "base on v2, again 1"]


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
