import pytest

from postmortem.case.load import case_digest
from postmortem.checker.errors import RecordError, catalogue
from postmortem.diagnosis import likelihoods
from postmortem.diagnosis.battery import OF_ADAPTER, TESTS, list_experiments
from postmortem.diagnosis.causes import CAUSES
from postmortem.diagnosis.likelihoods import (
    FAMILIES,
    HEALTHY,
    SERVING,
    SHIPPED,
    SHOWN_ALONE,
    meanings,
    measure_profiles,
    read_profiles,
    write_profiles,
)
from postmortem.diagnosis.timed import judge_others
from postmortem.experiments.records import Replay, read_records
from tools.cause_profiles import PLANTED, STAGES


def test_the_shipped_replays_name_what_they_were_made_from(case):
    """The record is of the embedded world of the shipped case as it stands, and names its seeds."""
    made = read_profiles().provenance
    assert made.digests == {"case": case_digest(case, "embedded")}
    assert (made.case, made.parameters) == (case.name, {"worlds": "0, 1"})


def test_an_edited_replay_is_refused_with_what_makes_it_again(tmp_path, monkeypatch):
    """What `diagnose` knows of causes is held by its seal."""
    copy = tmp_path / "cause_profiles.jsonl"
    copy.write_text(SHIPPED.read_text().replace('"inspect":"nothing"', '"inspect":"untrained"', 1))
    monkeypatch.setattr(likelihoods, "SHIPPED", copy)
    with pytest.raises(RecordError, match=r"changed after the run.*make cause-profiles"):
        read_profiles.__wrapped__()


def test_what_is_written_is_read_with_its_worlds(case, tmp_path):
    """Replays are sealed with the case and the seeds of the worlds that they come from."""
    made = read_profiles().of(Replay)[:2]
    write_profiles(tmp_path / "cause_profiles.jsonl", made, case=case, worlds=[1, 0])
    found = read_records(tmp_path / "cause_profiles.jsonl")
    assert list(found.of(Replay)) == list(made)
    assert found.provenance.parameters == {"worlds": "0, 1"}
    assert found.provenance.digests == {"case": case_digest(case, "embedded")}
    assert found.provenance.seed == 0


def test_every_cause_was_replayed_and_is_explained():
    """Each planted cause has replays, a family, and words for what it means and what to do."""
    replays = read_profiles().of(Replay)
    assert {replay.cause for replay in replays} == set(PLANTED) == set(meanings())
    kinds = {
        f"{stage.kind}, {task} task" for stage in STAGES.values() for task in ("clear", "hard")
    }
    assert {replay.base for replay in replays} == kinds
    for meaning in meanings().values():
        assert meaning.family in FAMILIES
        assert all((meaning.title, meaning.means, meaning.settles, meaning.remedy))
    assert [meaning.cause for meaning in meanings().values() if meaning.family == "sound"] == [
        HEALTHY
    ]


def test_every_cause_of_the_incident_is_planted_or_lies_in_the_serving_code():
    """No suspected cause is forgotten but those of the incident's world that nobody reports."""
    other = {"no-adapter", *SERVING, "other-shapes-ignored", "overflow", "yes-no-contract"}
    other |= {"truncated", "padded", "quantised-base"}
    assert set(CAUSES) - set(PLANTED) <= other
    assert not set(SERVING) & set(PLANTED)


def test_every_outcome_is_one_of_its_experiment():
    """The record speaks the words of the present experiments."""
    for replay in read_profiles().of(Replay):
        for name, outcome in replay.outcomes.items():
            assert outcome in TESTS[name].outcomes
    assert set(catalogue()) < set(TESTS["inspect"].outcomes)


def test_other_worlds_are_judged_well():
    """Replays of one world judged from those of the others: few are wrong."""
    found = [word for _, word in judge_others(read_profiles().of(Replay))]
    if found:
        assert found.count("wrong") <= 0.1 * len(found)


def test_what_the_base_does_alone_is_one_quantity():
    """Causes on one kind of base share what the base does alone, in the mean and in each draw."""
    table = measure_profiles(read_profiles().of(Replay), list_experiments(OF_ADAPTER))
    first = table.hypotheses[0].base
    own = [
        place
        for place, found in enumerate(table.hypotheses)
        if found.base == first and found.cause not in SHOWN_ALONE
    ]
    assert len({tuple(row) for row in table.of("base-alone")[own].tolist()}) == 1
    drawn = table.draw("base-alone", "varies", draws=5, seed=0)[:, own]
    assert (drawn == drawn[:, :1]).all()
    assert not (table.draw("answers", "varies", draws=5, seed=0)[:, own] == drawn).all()
