import json
import shutil

import pytest

from postmortem.case import load_case
from postmortem.errors import RecordError
from postmortem.inputs import choose_rows, input_digests
from postmortem.publish import add_case_values, collect_values, publish
from postmortem.records import Measure, Provenance, Verdict, write_records
from postmortem.world import read_world, write_world

CASE = "cases/qwen-lora.yml"


@pytest.fixture
def run(untrained_world, tmp_path, pytestconfig, monkeypatch):
    """A run folder with one notebook's sealed records, and the arguments to publish it."""
    monkeypatch.chdir(pytestconfig.rootpath)
    write_world(untrained_world, tmp_path / "world.json")
    shutil.copy("notebooks/01_v1_run.ipynb", tmp_path / "01_v1_run.ipynb")
    notebook = tmp_path / "01_v1_run.ipynb"
    case = load_case(CASE)
    seal(
        tmp_path,
        input_digests(notebook, case, world=untrained_world, rows=choose_rows(case, "embedded")),
        verdicts_of(case),
    )
    return {
        "case": CASE,
        "profile": "embedded",
        "world": str(tmp_path / "world.json"),
        "notebooks": [str(notebook)],
        "records": str(tmp_path),
        "out": str(tmp_path / "out"),
    }


def verdicts_of(case):
    """A record of each verdict that a hypothesis of the case asks for."""
    keys = [h.test.verdict for h in case.hypotheses if h.test]
    return [Verdict(key=key, verdict="cannot tell", because="not run") for key in keys]


def seal(folder, digests, records):
    """Seal a record file with these input digests."""
    provenance = Provenance(
        notebook="01_v1_run",
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
    write_records(folder / "01_v1_run.jsonl", provenance, records=records)


def test_fresh_records_become_values(run, tmp_path):
    """Records whose inputs have not changed are published, with the case's own tables."""
    publish(**run)
    values = json.loads((tmp_path / "out/values.json").read_text())
    assert values["texts"]["case.title"] == "Every prediction was 0.0"
    assert values["verdicts"]["swap.base.reproduces"]["verdict"] == "cannot tell"
    assert (
        len(values["tables"]["case.claims"]["rows"]) == values["measures"]["case.claims"]["value"]
    )
    assert values["measures"]["case.initial_sum"]["value"] == 180


@pytest.mark.parametrize("name", ["case", "world", "data", "notebook", "module scoring"])
def test_stale_records_are_refused_by_name(run, tmp_path, name, untrained_world):
    """A changed input makes the records stale, and the error says which input."""
    case = load_case(CASE)
    digests = input_digests(
        tmp_path / "01_v1_run.ipynb",
        case,
        world=untrained_world,
        rows=choose_rows(case, "embedded"),
    )
    seal(tmp_path, digests | {name: "0" * 16}, verdicts_of(case))
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


def test_missing_records_are_refused(run, tmp_path):
    """A notebook without records fails the build with its name."""
    (tmp_path / "01_v1_run.jsonl").unlink()
    with pytest.raises(RecordError, match="01_v1_run"):
        publish(**run)


def test_an_edited_record_is_refused(run, tmp_path):
    """A record changed by hand no longer agrees with its seal."""
    path = tmp_path / "01_v1_run.jsonl"
    path.write_text(path.read_text().replace("cannot tell", "holds", 1))
    with pytest.raises(RecordError, match="changed after the run"):
        publish(**run)


def test_a_hypothesis_without_its_verdict_is_refused(run, tmp_path):
    """A verdict that the case asks for and no notebook recorded fails the build."""
    case = load_case(CASE)
    with pytest.raises(RecordError, match=r"mismatch\.qwen3-4b\.raises"):
        add_case_values({"measures": {}, "verdicts": {}, "texts": {}, "tables": {}}, case)


def test_two_notebooks_may_not_record_one_key(tmp_path):
    """The same key from two notebooks is an error and not a silent overwrite."""
    from postmortem.records import read_records

    seal(tmp_path, {}, [Measure(key="a", value=1)])
    file = read_records(tmp_path / "01_v1_run.jsonl")
    with pytest.raises(RecordError, match="recorded once"):
        collect_values([file, file])
