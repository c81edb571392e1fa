import dataclasses
from pathlib import Path

import pytest

from postmortem.case.rows import generate_rows
from postmortem.case.schema import AdapterFilter
from postmortem.experiments.records import Measure, Table, Text, Timing, Verdict
from postmortem.experiments.session import Session
from postmortem.models.model_set import ADAPTERS
from postmortem.suite.suite import SuiteLimits
from tools.suite_chapter import (
    ANSWERED,
    BASE_ASKED,
    COLUMNS,
    GAINS,
    limits_of,
    record_suite,
    world_adapters,
)

ROLES = ["suspect", "reference", "donor adapter", "no-op adapter"]


def by_key(session, kind):
    """The records of one kind by key."""
    return {r.key: r for r in session.records if isinstance(r, kind)}


def table_of(session):
    """The suite's table by adapter, each row by column."""
    table = by_key(session, Table)["suite.adapters"]
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


@pytest.fixture(scope="module")
def make_session(case, untrained_world, tmp_path_factory):
    """A function for sessions of six rows on the untrained world, with four replays' adapters."""
    names = ("silent/numeric_0", "silent/numeric_1", "sibling/numeric_0", "donor/numeric_0")
    few = {name: untrained_world.replays[name] for name in names}

    def make(**changes):
        return Session(
            notebook=Path("suite.ipynb"),
            case=case,
            profile_name="embedded",
            world=untrained_world.model_copy(update={"replays": few, **changes}),
            rows=generate_rows(6, 0),
            records_path=tmp_path_factory.mktemp("suite") / "suite.jsonl",
            parameters={},
            device="cpu",
        )

    return make


@pytest.fixture(scope="module")
def recorded(make_session):
    """A session that has run the suite of the untrained world."""
    session = make_session()
    record_suite(session)
    return session


def test_the_adapters_of_a_world_are_its_roles_and_its_own_replays(untrained_world):
    """Adapters trained on another base than the world's stand for it once at most."""
    names = list(world_adapters(untrained_world))
    assert names[:4] == ROLES
    assert "numeric 1, sibling's" in names
    assert not any("donor's" in name or "speaking" in name for name in names)
    assert {"numeric 1", "numeric 2", "yes no short 1"} <= set(names)


def test_the_table_holds_every_adapter_and_says_why(recorded):
    """Each adapter has a verdict and a reason, those that do not load as well."""
    table = table_of(recorded)
    assert list(table) == list(world_adapters(recorded.world))
    assert set(table["suspect"]) == set(COLUMNS)
    assert all(row["because"] for row in table.values())
    assert table["donor adapter"]["because"] == "the checker found shape-mismatch"
    assert table["donor adapter"]["AUC, log-odds"] is None
    assert table["no-op adapter"]["because"] == "the checker found untrained"


def test_what_is_not_measured_has_a_reason(recorded):
    """A measure without a value says why, and no number of the suite is lost."""
    measures = by_key(recorded, Measure)
    assert {f"suite.gain.{name}" for name in GAINS} <= measures.keys()
    assert all(m.reason for m in measures.values() if m.value is None)
    assert measures["suite.count.adapters"].value == len(table_of(recorded))
    assert measures["suite.auc.donor adapter"].reason == "it does not load, or answers NaN"


def test_a_world_without_adapters_records_the_same_keys(make_session, recorded):
    """What the page reads is there where nothing was run, with the reason."""
    members = {
        role: member.model_copy(update={"path": None, "reason": "none"})
        if role in ADAPTERS
        else member
        for role, member in recorded.world.members.items()
    }
    session = make_session(members=members, replays={})
    assert record_suite(session) is None
    extra = by_key(recorded, Measure).keys() - by_key(session, Measure).keys()
    assert {key for key in extra if not key.startswith("suite.auc.")} == {"suite.count.cannot_tell"}
    assert by_key(session, Text).keys() == {"suite.best_single.system"}
    verdicts = by_key(session, Verdict)
    assert verdicts.keys() == by_key(recorded, Verdict).keys()
    assert {record.verdict for record in verdicts.values()} == {"not available"}


def test_what_a_plan_needs_is_recorded(recorded):
    """The bytes of an adapter and of its result, and the seconds of each step, are on record."""
    measures = by_key(recorded, Measure)
    answered = [name for name, row in table_of(recorded).items() if row["AUC, log-odds"]]
    folders = [world_adapters(recorded.world)[name] for name in answered]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert measures["suite.count.answered"].value == len(answered)
    assert measures["suite.bytes.adapter"].value == sum(sizes) / len(sizes)
    assert measures["suite.bytes.result"].value > 0
    assert {BASE_ASKED, ANSWERED, "load base"} <= by_key(recorded, Timing).keys()


def test_without_labels_the_suite_cannot_tell(make_session):
    """On rows without labels no AUC is recorded, and what is not dropped is not kept either."""
    session = make_session()
    session.rows = dataclasses.replace(session.rows, labels=None)
    results = record_suite(session)
    assert results.counts["kept"] == 0
    assert results.counts["cannot tell"] > 0
    reason = by_key(session, Measure)["suite.ensemble.auc"].reason
    assert reason == "the rows came without labels"
    assert by_key(session, Verdict)["suite.beats_best"].verdict == "cannot tell"


def test_the_limits_of_the_write_up_come_from_the_case():
    """A case's own filter takes the place of the default, and ours stay."""
    own = AdapterFilter(std_above=0.2, maximum_above=0.9, grade="artefact", source="s")
    limits = limits_of(own)
    assert (limits.std_above.value, limits.maximum_above.because) == (0.2, "s")
    assert limits.alike == SuiteLimits().alike
    assert limits_of(None) == SuiteLimits()
