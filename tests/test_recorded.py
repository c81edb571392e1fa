import shutil
from pathlib import Path

import pytest
from postmortem.confirm import confirm_files

from postmortem.errors import RecordError
from postmortem.inputs import choose_rows, input_digests
from postmortem.recorded import add_bench, add_recorded, describe_bench, kept_inputs, read_kept
from postmortem.records import (
    Measure,
    Prediction,
    Provenance,
    Table,
    Text,
    Verdict,
    read_records,
    write_records,
)
from postmortem.world import Member, World, digest_model

ROOT = Path(__file__).parents[1]
PROFILE = "smollm2"


@pytest.fixture
def project(tmp_path, monkeypatch, case):
    """A folder with the heavy notebooks, adapters and their record; the case that names them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    adapter, replayed = (tmp_path / "results" / name for name in ("yes_no", "thinking"))
    for folder in (adapter, replayed):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    named = {
        "adapters": {"suspect": str(adapter)},
        "replay_adapters": {"thinking": str(replayed)},
    }
    profile = case.profiles[PROFILE].model_copy(update=named)
    own = case.model_copy(update={"profiles": {**case.profiles, PROFILE: profile}})
    (tmp_path / "results" / PROFILE).mkdir()
    write_kept(own, "real_model", adapter=adapter, replayed=replayed)
    return own


def write_kept(case, name, *, adapter, replayed, words="holds"):
    """A kept record of one measure, one verdict and the members it was made with."""
    members = (("suspect", digest_model(adapter)), ("thinking", digest_model(replayed)))
    member = Member(role="suspect", path=str(adapter), digest=digest_model(adapter))
    world = World(
        case=case.name, profile=PROFILE, title="", caveat="", seed=0, members={"suspect": member}
    )
    rows = choose_rows(case, PROFILE, rows=6)
    notebook = Path(f"notebooks/recorded/{name}.ipynb")
    provenance = Provenance(
        notebook=name,
        case=case.name,
        profile=PROFILE,
        parameters={"rows": 6},
        digests=input_digests(notebook, case, world=world, rows=rows),
        versions={},
        device="cpu",
        dtype="float32",
        seed=0,
        aside={"started": "2026-01-01", "seconds": 60.0, "hardware": "a card"},
    )
    records = [
        Table(key="members", columns=("role", "digest"), rows=members),
        Measure(key="v2.rows", value=6),
        Measure(key="v2.base.distinct", value=1),
        Measure(key="v2.base.auc_number", value=0.5, low=0.4, high=0.6, n=6),
        Measure(key="file.rows", value=3),
        Measure(key="file.v2.base.distinct", value=2),
        Verdict(key="v2.base.reproduces", verdict=words, because="so"),
        Verdict(key="v2.base.knows", verdict="cannot tell", because="so"),
        Text(key="v2.base.commonest_text", text="<b>0.0</b>"),
    ]
    write_records(Path("results", PROFILE, f"{name}.jsonl"), provenance, records=records)


def empty_values():
    """Values of a build before any record."""
    return {"measures": {}, "verdicts": {}, "texts": {}, "tables": {}}


def test_a_kept_record_is_read_under_its_profile(project):
    """Each value of a kept record stands under the profile's name, whatever the reader runs."""
    values = empty_values()
    add_recorded(values, read_kept(project, "real_model"))
    assert values["measures"]["smollm2.v2.base.distinct"]["value"] == 1
    assert values["texts"]["smollm2.v2.base.commonest_text"] == "<b>0.0</b>"
    rows = values["tables"]["recorded.v2"]["rows"]
    assert [row[:3] for row in rows] == [
        ["smollm2, 6 generated", "base", 1],
        ["smollm2, 3 file", "base", 2],
    ]
    assert rows[0][6] == "0.50 [0.40,\N{NO-BREAK SPACE}0.60]"


@pytest.mark.parametrize(("own", "agree"), [("holds", "holds"), ("refuted", "refuted")])
def test_worlds_agree_only_where_all_say_the_same(project, own, agree):
    """The reader's own run counts among the worlds that have to agree."""
    values = empty_values()
    values["verdicts"]["swap.base.reproduces"] = {"verdict": own, "because": ""}
    add_recorded(values, read_kept(project, "real_model"))
    found = values["verdicts"]["recorded.reproduces_agree"]
    assert found == {"verdict": agree, "because": f"smollm2: holds; this run: {own}"}


def test_nothing_on_record_is_said(case, tmp_path, monkeypatch):
    """Without any record the tables are empty and agreement is not available."""
    monkeypatch.chdir(tmp_path)
    values = empty_values()
    add_recorded(values, read_kept(case, "real_model"))
    add_bench(values, read_kept(case, "bench"))
    assert values["tables"]["recorded.v2"]["rows"] == []
    assert values["verdicts"]["recorded.reproduces_agree"]["verdict"] == "not available"
    assert not values["measures"]


@pytest.mark.parametrize("role", ["suspect", "thinking"])
def test_a_byte_of_an_adapter_fails_the_build(project, role):
    """A shipped adapter that is not the record's is named, with what to do."""
    folder = project.profiles[PROFILE].all_adapters[role]
    Path(folder, "adapter_model.safetensors").write_bytes(b"weight")
    with pytest.raises(RecordError, match=rf"{role} of .*real_model.*make record PROFILE=smollm2"):
        read_kept(project, "real_model")


def test_a_missing_adapter_fails_the_build(project):
    """A shipped adapter that is gone is named."""
    shutil.rmtree(project.profiles[PROFILE].adapters["suspect"])
    with pytest.raises(RecordError, match="no such folder"):
        read_kept(project, "real_model")


def test_an_edited_record_fails_the_build(project):
    """A number changed by hand breaks the seal."""
    path = Path("results", PROFILE, "real_model.jsonl")
    path.write_text(path.read_text().replace('"value":0.5', '"value":0.9'))
    with pytest.raises(RecordError, match=r"changed after the run.*make record PROFILE=smollm2"):
        read_kept(project, "real_model")


def test_an_edited_provenance_fails_the_build(project):
    """A record whose module's code has moved on is stale, also where its seal was made anew."""
    path = Path("results", PROFILE, "real_model.jsonl")
    file = read_records(path)
    digests = file.provenance.digests | {"module scoring": "0" * 16}
    write_records(
        path, file.provenance.model_copy(update={"digests": digests}), records=file.records
    )
    with pytest.raises(RecordError, match=r"stale.*module scoring"):
        read_kept(project, "real_model")


def answer(**changes):
    """A prediction of the base."""
    parts = {"system": "base", "prompt": "v2", "row_id": "1", "group": "g", "label": 1}
    parts |= {"text": "0.0", "token_ids": (1,), "prompt_tokens": 9, "full_prompt_tokens": 9}
    parts |= {"finished": True, "value": 0.0, "stage": "float", "strict_value": 0.0}
    parts |= {"expected_value": 0.1, "number_log_odds": -2.0, "yes_no_log_odds": 0.5}
    return Prediction(**(parts | changes))


def moved_on(project, *, sample):
    """Age the record by a module, with one answer on it; a sample of today's code beside it."""
    path = Path("results", PROFILE, "real_model.jsonl")
    file = read_records(path)
    old = file.provenance.digests | {"module scoring": "0" * 16}
    aged = file.provenance.model_copy(update={"digests": old})
    write_records(path, aged, records=[*file.records, answer()])
    few = file.provenance.digests | {"data": "fewer rows", "world": "a base converted elsewhere"}
    today = file.provenance.model_copy(update={"digests": few})
    write_records("sample.jsonl", today, records=[sample])
    return path


def test_a_confirmed_record_is_read_again(project):
    """A record whose code moved on is taken once a sample of today's code answers the same."""
    path = moved_on(project, sample=answer(number_log_odds=-2.0004))
    with pytest.raises(RecordError, match=r"module scoring.*make confirm"):
        read_kept(project, "real_model")
    assert confirm_files(path, "sample.jsonl") == "1 answers alike, log-odds within 0.0004 nat"
    assert read_kept(project, "real_model")
    prompt = project.prompts["v2"].model_copy(update={"template": "{body}?"})
    later = project.model_copy(update={"prompts": {**project.prompts, "v2": prompt}})
    with pytest.raises(RecordError, match="stale"):
        read_kept(later, "real_model")


@pytest.mark.parametrize(
    "sample",
    [
        answer(text="0.1"),
        answer(yes_no_log_odds=0.6),
        answer(number_log_odds=None),
        answer(row_id="2"),
    ],
)
def test_another_answer_confirms_nothing(project, sample):
    """Another text, other log-odds, none, or no answer in common: the record stays stale."""
    path = moved_on(project, sample=sample)
    with pytest.raises(RecordError):
        confirm_files(path, "sample.jsonl")
    with pytest.raises(RecordError, match="stale"):
        read_kept(project, "real_model")


def test_a_confirmation_is_of_one_record(project):
    """A record made again is not covered by the confirmation of the one before it."""
    path = moved_on(project, sample=answer())
    confirm_files(path, "sample.jsonl")
    file = read_records(path)
    write_records(path, file.provenance, records=[*file.records, Measure(key="more", value=1)])
    with pytest.raises(RecordError, match="stale"):
        read_kept(project, "real_model")


def test_a_case_that_moved_on_fails_the_build(project):
    """A changed prompt of the case makes a kept record stale, and changed prose does not."""
    read_kept(project.model_copy(update={"title": "Another"}), "real_model")
    prompt = project.prompts["v2"].model_copy(update={"template": "{body}?"})
    moved = project.model_copy(update={"prompts": {**project.prompts, "v2": prompt}})
    with pytest.raises(RecordError, match="case with digest"):
        read_kept(moved, "real_model")


def test_another_profile_makes_nothing_stale(project):
    """A record counts the settings of its own profile alone."""
    other = project.profiles["embedded"].model_copy(update={"rows": 12})
    changed = {**project.profiles, "embedded": other}
    assert read_kept(project.model_copy(update={"profiles": changed}), "real_model")


def test_the_record_of_another_case_is_not_read(project):
    """A record belongs to its case; another case with a profile of that name has none."""
    assert read_kept(project.model_copy(update={"name": "another"}), "real_model") == {}


def test_kept_inputs_change_with_the_adapter(project):
    """What a build depends on holds the adapter's digest, so that a change is noticed."""
    before = kept_inputs(f"results/{PROFILE}/real_model.jsonl", project)
    folder = project.profiles[PROFILE].adapters["suspect"]
    Path(folder, "adapter_model.safetensors").write_bytes(b"other")
    after = kept_inputs(f"results/{PROFILE}/real_model.jsonl", project)
    assert [name for name in before if before[name] != after[name]] == [folder]


def test_shipped_records_are_those_of_this_code(case, monkeypatch):
    """Every record that is shipped can be read by the project as it stands."""
    monkeypatch.chdir(ROOT)
    shipped = {path.parent.name for path in Path("results").glob("*/real_model.jsonl")}
    assert set(read_kept(case, "real_model")) == shipped
    read_kept(case, "bench")


def test_the_bench_line_comes_from_its_record(project, tmp_path):
    """The last line of the benchmark holds three recorded numbers."""
    file = read_records(Path("results", PROFILE, "real_model.jsonl"))
    values = {"v2.numeric.ratio": 1.94, "yes_no.readout.ratio": 7.38, "share": 0.776}
    records = [Measure(key=f"bench.{key}", value=value) for key, value in values.items()]
    path = tmp_path / "bench.jsonl"
    write_records(path, file.provenance, records=records)
    told = describe_bench(read_records(path))
    assert told == "numeric x1.9, readout x7.4, gemm share 0.78"
