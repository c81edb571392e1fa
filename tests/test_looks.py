import pytest

from postmortem.case.load import case_digest
from postmortem.checker.catalogue import catalogue
from postmortem.checker.errors import RecordError
from postmortem.diagnosis import looks
from postmortem.diagnosis.causes import CAUSES
from postmortem.diagnosis.examination import judge_others
from postmortem.diagnosis.examine import EXAMS, list_experiments
from postmortem.diagnosis.likelihoods import HEALTHY
from postmortem.diagnosis.looks import (
    FAMILIES,
    SERVING,
    SHIPPED,
    meanings,
    measure_looks,
    read_looks,
    write_looks,
)
from postmortem.experiments.records import Replay, read_records
from tools.cause_profiles import PLANTED, STAGES


def test_the_shipped_replays_name_what_they_were_made_from(case):
    """The record is of the embedded world of the shipped case as it stands, and names its seeds."""
    made = read_looks().provenance
    assert made.digests == {"case": case_digest(case, "embedded")}
    assert (made.case, made.parameters) == (case.name, {"worlds": "0, 1"})


def test_an_edited_replay_is_refused_with_what_makes_it_again(tmp_path, monkeypatch):
    """What `diagnose` knows of causes is held by its seal."""
    copy = tmp_path / "looks.jsonl"
    copy.write_text(SHIPPED.read_text().replace('"inspect":"nothing"', '"inspect":"untrained"', 1))
    monkeypatch.setattr(looks, "SHIPPED", copy)
    with pytest.raises(RecordError, match=r"changed after the run.*make looks"):
        read_looks.__wrapped__()


def test_what_is_written_is_read_with_its_worlds(case, tmp_path):
    """Replays are sealed with the case and the seeds of the worlds that they come from."""
    made = read_looks().of(Replay)[:2]
    write_looks(tmp_path / "looks.jsonl", made, case=case, worlds=[1, 0])
    found = read_records(tmp_path / "looks.jsonl")
    assert list(found.of(Replay)) == list(made)
    assert found.provenance.parameters == {"worlds": "0, 1"}
    assert found.provenance.digests == {"case": case_digest(case, "embedded")}
    assert found.provenance.seed == 0


def test_every_cause_was_replayed_and_is_explained():
    """Each planted cause has replays, a family, and words for what it means and what to do."""
    replays = read_looks().of(Replay)
    assert {replay.cause for replay in replays} == set(PLANTED) == set(meanings())
    assert {replay.base for replay in replays} == {stage.kind for stage in STAGES.values()}
    for look in meanings().values():
        assert look.family in FAMILIES
        assert all((look.title, look.means, look.settles, look.remedy))
    assert [look.cause for look in meanings().values() if look.family == "sound"] == [HEALTHY]


def test_every_cause_of_the_incident_is_planted_or_lies_in_the_serving_code():
    """No suspected cause is forgotten; each stands once."""
    other = {"no-adapter", *SERVING, "other-shapes-ignored", "overflow", "yes-no-contract"}
    assert set(CAUSES) - set(PLANTED) <= other
    assert not set(SERVING) & set(PLANTED)


def test_every_outcome_is_one_of_its_experiment():
    """The record speaks the words of the present experiments."""
    for replay in read_looks().of(Replay):
        for name, outcome in replay.outcomes.items():
            assert outcome in EXAMS[name].outcomes
    assert set(catalogue()) < set(EXAMS["inspect"].outcomes)


def test_other_worlds_are_judged_well():
    """Replays of one world judged from those of the others: few are wrong."""
    found = [word for _, word in judge_others(read_looks().of(Replay))]
    if found:
        assert found.count("wrong") <= 0.1 * len(found)


def test_what_the_base_does_alone_is_one_quantity():
    """Causes on one kind of base share what the base does alone, in the mean and in each draw."""
    table = measure_looks(read_looks().of(Replay), list_experiments())
    first = table.hypotheses[0].base
    own = [place for place, found in enumerate(table.hypotheses) if found.base == first]
    assert len({tuple(row) for row in table.of("base-alone")[own].tolist()}) == 1
    drawn = table.draw("base-alone", "varies", draws=5, seed=0)[:, own]
    assert (drawn == drawn[:, :1]).all()
    assert not (table.draw("answers", "varies", draws=5, seed=0)[:, own] == drawn).all()
