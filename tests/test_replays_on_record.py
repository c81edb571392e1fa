import pytest
from hypothesis import given
from hypothesis import strategies as st
from replays import replay

from postmortem.checker.errors import RecordError
from postmortem.diagnosis.causes import CAUSES
from postmortem.diagnosis.likelihoods import list_replays, open_replays
from postmortem.diagnosis.replay import (
    FEATURES,
    record_again,
    record_kept_replays,
    record_replays,
    symptom_of,
)
from postmortem.experiments import records as kept
from postmortem.experiments.records import Measure, Table, Verdict


def found_in(session, kind):
    """The records of one kind by key."""
    return {record.key: record for record in session.records if isinstance(record, kind)}


@given(st.floats(0, 1), st.integers(1, 9), st.floats(0, 1), st.one_of(st.none(), st.floats(0, 1)))
def test_the_whole_symptom_needs_every_part(case, parsed, distinct, value, auc):
    """A replay shows the whole v2 symptom exactly when each part is the incident's."""
    features = {
        "loads": True,
        "no missing keys": True,
        "v1 parse rate": 0.5,
        "v1 distinct": 1,
        "v1 value": 0.0,
        "v2 parse rate": parsed,
        "v2 distinct": distinct,
        "v2 value": value,
        "v2 AUC": auc,
    }
    shown = symptom_of(replay("c").model_copy(update={"features": features}), case)
    assert shown.keys() == FEATURES.keys()
    whole = all(word is not False for word in shown.values())
    assert whole == (parsed == 1 and distinct == 1 and value == 0 and auc in (None, 0.5))


@pytest.fixture
def shipped(session, monkeypatch, pytestconfig):
    """The session in the checkout, where the kept replays are."""
    monkeypatch.chdir(pytestconfig.rootpath)
    return session


def test_the_kept_replays_are_an_input(shipped):
    """Opening them names them in the session; each key begins with its training's seed."""
    replays = open_replays(shipped)
    assert shipped.replays
    seeds = {file.provenance.seed for file in kept.read_replays(shipped.case)}
    assert {int(found.key.partition(".")[0]) for found in replays} == seeds
    assert {found.seed for found in replays} == seeds
    assert len({found.key for found in replays}) == len(replays)


def test_without_kept_replays_a_session_does_not_go_on(shipped, tmp_path, monkeypatch):
    """A notebook that needs them stops with what makes them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordError, match="make record PROFILE=embedded"):
        open_replays(shipped)


def test_of_one_world_a_seed_is_a_training_of_its_adapters(case, monkeypatch, pytestconfig):
    """With one world on record the replays keep their own seeds."""
    monkeypatch.chdir(pytestconfig.rootpath)
    replays = list_replays(kept.read_replays(case)[:1])
    assert len({found.seed for found in replays}) > 1
    assert {found.key.partition(".")[0] for found in replays} == {"0"}


def test_the_matrix_has_a_row_for_each_cause_and_kind(shipped):
    """Every cause on every kind of base has its row, its verdict, and shares between 0 and 1."""
    replays = open_replays(shipped)
    record_replays(shipped, replays)
    table = found_in(shipped, Table)["replay.matrix"]
    assert {row[:2] for row in table.rows} == {(r.base, r.cause) for r in replays}
    assert {row[1] for row in table.rows} == set(CAUSES)
    for row in table.rows:
        assert all(0 <= share <= 1 for share in row[4 : 4 + len(FEATURES)])
    named = {f"replay.{name}.reproduces" for name in CAUSES}
    assert found_in(shipped, Verdict).keys() == named | {"replay.sound_counts_as_parsed"}
    assert found_in(shipped, Measure)["replay.worlds"].value == len({r.seed for r in replays})


def test_a_cause_that_was_not_replayed_says_so(session):
    """A cause without replays has no row, and its verdict is not available."""
    raised = {"loads": False, "no missing keys": True}
    record_replays(session, [replay("zero-b").model_copy(update={"features": raised})])
    words = {key: found.verdict for key, found in found_in(session, Verdict).items()}
    missing = {f"replay.{name}.reproduces" for name in CAUSES if name != "zero-b"}
    missing.add("replay.sound_counts_as_parsed")
    assert {key for key, word in words.items() if word == "not available"} == missing
    assert [row[1] for row in found_in(session, Table)["replay.matrix"].rows] == ["zero-b"]


def test_a_kept_run_leaves_its_replays_raw(session):
    """A kept run has every replay, and each cause that could not be injected with its reason."""
    record_kept_replays(session, [replay("zero-b")], {"thinking": "no such adapter"})
    assert session.records[0] == replay("zero-b")
    assert found_in(session, Table)["replay.absent"].rows == (("thinking", "no such adapter"),)
    assert found_in(session, Measure)["replay.replays"].value == 1


def on_record(*replays, seed=0):
    """Replays as they are opened: each key with its world's seed before it."""
    return [found.model_copy(update={"key": f"{seed}.{found.key}"}) for found in replays]


def test_replays_that_come_out_as_on_record_hold(session):
    """Where every outcome is the one on record, the verdict holds and no replay is listed."""
    again = [replay("zero-b", v2="all 0.0"), replay("healthy", v2="varies")]
    record_again(session, again, on_record(*again, replay("parser", v2="varies")))
    assert found_in(session, Verdict)["replay.again.as_on_record"].verdict == "holds"
    assert found_in(session, Measure)["replay.again.replays"].value == 2
    assert found_in(session, Table)["replay.again.differing"].rows == ()
    assert again == session.records[:2]


def test_a_replay_that_comes_out_otherwise_refutes(session):
    """One other outcome refutes, and stands in the table with what is on record."""
    kept_ones = [replay("zero-b", v2="all 0.0", load="silent"), replay("healthy", v2="varies")]
    again = [replay("zero-b", v2="varies", load="silent", new="yes"), kept_ones[1]]
    record_again(session, again, on_record(*kept_ones))
    verdict = found_in(session, Verdict)["replay.again.as_on_record"]
    assert (verdict.verdict, verdict.because[:6]) == ("refuted", "1 of 2")
    assert found_in(session, Table)["replay.again.differing"].rows == (
        (again[0].key, "v2", "all 0.0", "varies"),
        (again[0].key, "new", None, "yes"),
    )


def test_where_nothing_was_injected_the_kept_run_is_named(session):
    """A profile without replays of its own says that a kept run has them."""
    record_again(session, [], on_record(replay("zero-b")))
    verdict = found_in(session, Verdict)["replay.again.as_on_record"]
    assert (verdict.verdict, "kept run" in verdict.because) == ("not available", True)
    measure = found_in(session, Measure)["replay.again.replays"]
    assert (measure.value, "kept run" in measure.reason) == (None, True)
