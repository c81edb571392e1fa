import json
import shutil

import pytest

from postmortem.book.publish import add_suite_costs, collect_values, publish
from postmortem.book.tables import add_case_values
from postmortem.case.layout import NotebookRun
from postmortem.case.rows import choose_rows
from postmortem.case.schema import RunTest
from postmortem.checker.errors import RecordError
from postmortem.experiments.records import (
    Measure,
    Provenance,
    RecordFile,
    Timing,
    Verdict,
    input_digests,
    read_records,
    write_records,
)
from postmortem.models.model_set import read_world, write_world


@pytest.fixture
def run(case, untrained_world, tmp_path, pytestconfig, monkeypatch):
    """A run folder with one notebook's sealed records, and the arguments to publish it."""
    monkeypatch.chdir(pytestconfig.rootpath)
    write_world(untrained_world, tmp_path / "world.json")
    notebook = shutil.copy("notebooks/attempt.ipynb", tmp_path / "attempt.ipynb")
    rows = choose_rows(case, "embedded")
    digests = input_digests(notebook, case, world=untrained_world, rows=rows)
    seal(tmp_path, digests, recorded_here(case))
    runs = [NotebookRun("attempt", notebook)]
    monkeypatch.setattr("postmortem.book.publish.list_runs", lambda case: runs)
    return {
        "case": case,
        "profile": "embedded",
        "world": str(tmp_path / "world.json"),
        "records": tmp_path,
        "out": tmp_path / "out",
    }


def verdicts_of(case):
    """A record of each verdict that the case asks for."""
    items = [*case.hypotheses, *case.claims, *(case.practice.actions if case.practice else [])]
    keys = dict.fromkeys(item.test.verdict for item in items if item.test)
    keys |= dict.fromkeys(f"diagnosis.hypothesis.{h.id}" for h in case.hypotheses)
    return [Verdict(key=key, verdict="cannot tell", because="not run") for key in keys]


def recorded_here(case):
    """Those of them that a build records; the others are kept with the project."""
    return [v for v in verdicts_of(case) if not v.key.startswith("catalogue.")]


def seal(folder, digests, records):
    """Seal a record file with these input digests."""
    provenance = Provenance(
        notebook="attempt",
        case="qwen-lora",
        profile="embedded",
        parameters={},
        digests=digests,
        versions={"python": "3"},
        device="cpu",
        dtype="float32",
        seed=0,
        aside={"started": "now", "seconds": 1.0},
    )
    write_records(folder / "attempt.jsonl", provenance, records=records)


def test_fresh_records_become_values(run, tmp_path):
    """Records whose inputs have not changed are published, with the case's own numbers."""
    publish(**run)
    values = json.loads((tmp_path / "out/values.json").read_text())
    assert values["verdicts"]["swap.base.reproduces"]["verdict"] == "cannot tell"
    assert values["measures"]["case.initial_sum"]["value"] == 180


@pytest.mark.parametrize("name", ["case", "world", "data", "notebook", "module scoring"])
def test_stale_records_are_refused_by_name(run, tmp_path, name):
    """A changed input makes the records stale, and the error says which input."""
    digests = read_records(tmp_path / "attempt.jsonl").provenance.digests
    seal(tmp_path, digests | {name: "0" * 16}, recorded_here(run["case"]))
    with pytest.raises(RecordError, match=f"stale.*{name}"):
        publish(**run)
    assert not (tmp_path / "out/values.json").exists()


def test_a_changed_adapter_makes_the_records_stale(run, tmp_path, untrained):
    """An adapter that changed in its folder since the run fails the build, naming its role."""
    shutil.copytree(untrained / "suspect", tmp_path / "mine")
    world = read_world(run["world"])
    mine = world.members["suspect"].model_copy(update={"path": str(tmp_path / "mine")})
    write_world(
        world.model_copy(update={"members": world.members | {"suspect": mine}}), run["world"]
    )
    publish(**run)
    weights = tmp_path / "mine/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RecordError, match="role suspect"):
        publish(**run)


def test_missing_and_edited_records_are_refused(run, tmp_path):
    """A record changed by hand no longer agrees with its seal; one that is gone is named."""
    path = tmp_path / "attempt.jsonl"
    path.write_text(path.read_text().replace("cannot tell", "holds", 1))
    with pytest.raises(RecordError, match="changed after the run"):
        publish(**run)
    path.unlink()
    with pytest.raises(RecordError, match="attempt"):
        publish(**run)


def values_with(case, **words):
    """Values of the case over a run with `cannot tell` throughout, but for these words by key."""
    verdicts = {
        v.key: {"verdict": words.get(v.key.replace(".", "_"), v.verdict)} for v in verdicts_of(case)
    }
    values = {"measures": {}, "verdicts": verdicts, "texts": {}, "tables": {}}
    add_case_values(values, case)
    return values


def test_each_section_is_a_table_of_its_items(case):
    """Each table has a row for each item, in order; a whole confidence has no point."""
    tables = values_with(case)["tables"]
    for section, items in case.sections.items():
        if section not in ("practice.impact", "practice.trigger"):
            assert len(tables[f"case.{section}"]["rows"]) == len(items) > 0
    assert tables["case.observations"] == {
        "columns": ["kind", "statement", "what we see", "grade"],
        "rows": [[o.kind, o.text, o.finding, o.grade] for o in case.observations],
    }
    told = {row[0]: row[3:] for row in tables["case.hypotheses"]["rows"]}
    assert (repr(told["A1"]), told["A2"]) == ("[80, 85]", [None, None])


@pytest.mark.parametrize("section", ["hypotheses", "claims", "practice.actions"])
def test_a_test_without_its_verdict_is_refused(case, section):
    """A verdict that the case asks for and no notebook recorded fails the build by its owner."""
    items = {**case.sections, "hypotheses": case.hypotheses}[section]
    owner = next(item for item in items if item.test)
    values = values_with(case)
    del values["verdicts"][owner.test.verdict]
    others = {"hypotheses": [], "claims": [], "practice": None}
    others.pop(section.split(".")[0])
    with pytest.raises(
        RecordError, match=rf"verdict .*`{section}` of the case names for {owner.id}"
    ):
        add_case_values(values, case.model_copy(update=others))


def test_a_test_is_not_answered_by_the_case_itself(case):
    """A claim that names the verdict of a claim is refused: only a run can answer."""
    first, second = case.claims[:2]
    test = RunTest(asks="it stands", verdict=f"case.claim.{second.id}")
    claims = [first.model_copy(update={"test": test}), second]
    circular = case.model_copy(update={"hypotheses": [], "claims": claims, "practice": None})
    with pytest.raises(RecordError, match=rf"case\.claim\.{second.id}"):
        add_case_values({**values_with(case), "verdicts": {}}, circular)


def test_the_ledger_shows_the_run_beside_the_record(case):
    """A claim stands with its decider and this run's answer, and a page can quote its verdict."""
    values = values_with(case, v2_constant="holds", diagnosis_hypothesis_A1="refuted")
    table = values["tables"]["case.claims"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    for claim in case.claims:
        row, quoted = rows[claim.id], values["verdicts"][f"case.claim.{claim.id}"]
        assert (row["decided by"], row["would change"]) == (claim.decided_by, claim.would_change)
        assert bool(row["this run"]) == bool(claim.test)
        assert quoted == {"verdict": claim.verdict, "because": claim.because}
        assert values["texts"][f"case.claim.{claim.id}.would_change"] == claim.would_change
    assert rows["both-attempts-degenerate"]["this run"] == "holds"
    assert values["verdicts"]["case.hypothesis.A1"]["verdict"] == "refuted"
    counted = [sum(row[1:]) for row in values["tables"]["case.sections"]["rows"]]
    assert sum(counted) == values["measures"]["case.claims"]["value"] == len(case.claims)


def test_an_action_is_closed_by_the_incident_alone(case):
    """An item is closed where its verdict is of the incident's record and holds, else open."""
    given = {"forensics_prompts_uncut": "holds", "swap_control_run": "holds"}
    values = values_with(case, **given)
    table = values["tables"]["case.practice.actions"]
    column = table["columns"].index("status")
    pairs = zip(case.practice.actions, table["rows"], strict=True)
    status = {action.id: row[column] for action, row in pairs}
    assert status["count-tokens"] == "closed"
    assert (status["control-first"], status["find-the-file"]) == ("open", "open")
    assert values["measures"]["case.actions_closed"]["value"] == 1
    assert values["measures"]["case.actions_open"]["value"] == len(case.practice.actions) - 1


def test_a_case_without_practice_or_filter_says_so(case):
    """What the case leaves out is a measure without a value and with the reason."""
    values = values_with(case.model_copy(update={"practice": None, "adapter_filter": None}))
    for key in ("case.actions", "case.filter_std", "case.filter_maximum"):
        assert values["measures"][key]["value"] is None
        assert values["measures"][key]["reason"] == "the case does not say"


def test_two_notebooks_may_not_record_one_key(tmp_path):
    """The same key from two notebooks is an error and not a silent overwrite."""
    seal(tmp_path, {}, [Measure(key="a", value=1)])
    file = read_records(tmp_path / "attempt.jsonl")
    with pytest.raises(RecordError, match="recorded once"):
        collect_values([file, file])


def test_a_larger_suite_costs_in_proportion():
    """The table of costs multiplies what an adapter took; where none answered it says so."""

    def record(answered):
        made = [
            Measure(key="suite.count.answered", value=answered),
            Measure(key="suite.bytes.adapter", value=5e6),
            Measure(key="suite.bytes.result", value=1e3),
            Timing(key="suite: adapters that answer", seconds=36.0),
        ]
        return RecordFile.model_construct(records=tuple(made))

    values = {"tables": {}}
    add_suite_costs(values, record(0))
    assert values["tables"]["suite.costs"]["rows"][0][0] == "not available"
    add_suite_costs(values, record(10))
    rows = values["tables"]["suite.costs"]["rows"]
    assert rows[0] == ["200", 0.2, 1.0, 0.0002]
    assert [row[1] for row in rows] == [0.2, 10.0, 100.0]
