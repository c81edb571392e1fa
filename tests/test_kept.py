import json
import shutil
from pathlib import Path

import pytest

from postmortem.book.publish import _made, add_recorded, add_training, describe_bench
from postmortem.case.rows import choose_rows
from postmortem.case.site import list_kept
from postmortem.checker.errors import RecordError
from postmortem.experiments.records import (
    LARGEST_GAP,
    Measure,
    Prediction,
    Provenance,
    Replay,
    Table,
    Text,
    Verdict,
    check_kept,
    compare_answers,
    confirm,
    confirm_files,
    input_digests,
    read_confirmation,
    read_kept,
    read_records,
    read_replays,
    write_records,
)
from postmortem.models.world import digest_model, resolve_world
from tools.train_world import describe_difference

ROOT = Path(__file__).parents[1]
PROFILE = "smollm2"
# What is kept of the embedded world beside its training and its replays.
ALONE = ("attribution", "catalogue", "suite")


def make_model(folder):
    """A folder with the files of a model or adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights of " + bytes(str(folder), "utf-8"))
    return str(folder)


@pytest.fixture
def project(tmp_path, monkeypatch, case):
    """A folder with what is kept of two profiles; the case that names it.

    Of the embedded one the models lie beside their record, of the real one the adapters alone.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    models = Path("results/embedded")
    embedded = case.profiles["embedded"].model_copy(
        update={
            "base": make_model(models / "bases/base"),
            "bases": {"donor_base": make_model(models / "bases/donor_base")},
            "adapters": {"suspect": make_model(models / "adapters/silent/suspect")},
            "replays": case.profiles["embedded"].replays.model_copy(
                update={"adapters": str(models / "adapters")}
            ),
        }
    )
    for name in ("silent/numeric_0", "donor/numeric_0"):
        make_model(models / "adapters" / name)
    real = case.profiles[PROFILE].model_copy(
        update={
            "base": str(models / "bases/base"),
            "adapters": {"suspect": make_model(Path("results", PROFILE, "yes_no"))},
            "replay_adapters": {"thinking": make_model(Path("results", PROFILE, "thinking"))},
        }
    )
    own = case.model_copy(update={"profiles": {"embedded": embedded, PROFILE: real}})
    found = [*models.glob("bases/*"), *models.glob("adapters/*/*")]
    write_kept(own, "embedded", "world", members={str(p.relative_to(models)): p for p in found})
    for seed in (0, 1):
        outcomes = Replay(
            key="healthy.silent.0.-",
            cause="healthy",
            base="silent",
            seed=0,
            severity="-",
            outcomes={"v2": "varies"},
            features={},
        )
        write_kept(own, "embedded", f"replays/{seed}", [outcomes], seed=seed)
    for name in ALONE:
        write_kept(own, "embedded", name)
    members = {"suspect": "yes_no", "thinking": "thinking"}
    folders = {role: Path("results", PROFILE, name) for role, name in members.items()}
    write_kept(own, PROFILE, "real_model", made_of(), members=folders)
    return own


def made_of(words="holds"):
    """What a notebook records: a value of each kind."""
    return [
        Measure(key="v2.rows", value=6),
        Measure(key="v2.base.distinct", value=1),
        Measure(key="v2.base.auc_number", value=0.5, low=0.4, high=0.6, n=6),
        Measure(key="file.rows", value=3),
        Measure(key="file.v2.base.distinct", value=2),
        Verdict(key="v2.base.reproduces", verdict=words, because="so"),
        Verdict(key="v2.base.knows", verdict="cannot tell", because="so"),
        Text(key="v2.base.commonest_text", text="<b>0.0</b>"),
    ]


def write_kept(case, profile, name, records=(), *, members=None, seed=0):
    """A kept record with the models that it was made with."""
    world = resolve_world(case, profile, seed=seed)
    if seed != case.profile(profile).seed:  # made from the models of another training
        other = {role: m.model_copy(update={"digest": "0"}) for role, m in world.members.items()}
        world = world.model_copy(update={"members": other})
    rows = choose_rows(case, profile, rows=6)
    notebook = Path("notebooks/kept") / f"{name.partition('/')[0]}.ipynb"
    if not notebook.is_file():
        notebook = ROOT / "tools/train_world.py"
    provenance = Provenance(
        notebook=notebook.stem,
        case=case.name,
        profile=profile,
        parameters={"rows": 6},
        digests=input_digests(notebook, case, world=world, rows=rows),
        versions={},
        device="cpu",
        dtype="float32",
        seed=seed,
        aside={
            "started": "2026-01-01 10:00 UTC",
            "seconds": 60.0,
            "hardware": "a card",
            "commit": "0123456789ab",
        },
    )
    digests = [(name, digest_model(folder)) for name, folder in (members or {}).items()]
    table = [Table(key="members", columns=("role", "digest"), rows=digests)] if members else []
    path = Path("results", profile, f"{name}.jsonl")
    path.parent.mkdir(exist_ok=True)
    write_records(path, provenance, records=[*table, *records])


def with_profile(case, name, **changes):
    """The case with settings of one profile changed."""
    changed = case.profiles[name].model_copy(update=changes)
    return case.model_copy(update={"profiles": {**case.profiles, name: changed}})


def with_prompt(case):
    """The case with another second prompt."""
    prompt = case.prompts["v2"].model_copy(update={"template": "{body}?"})
    return case.model_copy(update={"prompts": {**case.prompts, "v2": prompt}})


def empty_values():
    """Values of a build before any record."""
    return {"measures": {}, "verdicts": {}, "texts": {}, "tables": {}}


def test_what_is_as_it_was_made_is_read(project):
    """Untouched records are read by name: one of each profile, or one for each training."""
    check_kept(project)
    assert sorted(list_kept("embedded")) == [
        "attribution",
        "catalogue",
        "replays/0",
        "replays/1",
        "suite",
        "world",
    ]
    assert list(read_kept(project, "real_model")) == [PROFILE]
    assert [file.provenance.seed for file in read_replays(project)] == [0, 1]


@pytest.mark.parametrize("place", ["embedded/world", "embedded/replays/1", f"{PROFILE}/real_model"])
def test_an_edited_record_fails(project, place):
    """A record changed by hand breaks its seal, and the remedy says what makes it again."""
    path = Path("results", f"{place}.jsonl")
    path.write_text(path.read_text().replace('"rows":6', '"rows":7', 1))
    remedy = "make world" if "world" in place else f"make record PROFILE={place.split('/')[0]}"
    with pytest.raises(RecordError, match=f"changed after the run.*{remedy}"):
        check_kept(project)


@pytest.mark.parametrize("name", ["world", "replays/0", *ALONE])
def test_what_the_pages_read_must_be_there(project, name):
    """A record of the embedded world that is missing, or of another case, is told by its path."""
    path = Path("results/embedded", f"{name}.jsonl")
    path.unlink()
    with pytest.raises(RecordError, match=rf"embedded/{name}\.jsonl"):
        check_kept(project)
    write_kept(project.model_copy(update={"name": "another"}), "embedded", name)
    with pytest.raises(RecordError, match=rf"embedded/{name}\.jsonl.*another case"):
        check_kept(project)


def test_what_is_kept_of_a_real_model_may_be_absent(project):
    """A book is built without the runs on real models."""
    shutil.rmtree(Path("results", PROFILE))
    check_kept(project)


@pytest.mark.parametrize(
    "model",
    [
        "embedded/bases/base",
        "embedded/bases/donor_base",
        "embedded/adapters/silent/suspect",
        "embedded/adapters/silent/numeric_0",
        "embedded/adapters/donor/numeric_0",
        f"{PROFILE}/yes_no",
        f"{PROFILE}/thinking",
    ],
)
@pytest.mark.parametrize("change", ["a byte off", "gone"])
def test_a_shipped_model_that_is_another_fails(project, model, change):
    """One byte off a shipped base or adapter is told in one line that names its folder."""
    folder = Path("results", model)
    weights = folder / "adapter_model.safetensors"
    if change == "gone":
        shutil.rmtree(folder)
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RecordError, match=f"{model}, the .*as when the record was made") as caught:
        check_kept(project)
    assert str(caught.value).isprintable()


def test_a_model_that_was_not_trained_with_the_others_fails(project):
    """A base that the profile names and the training's record does not list is another world."""
    other = make_model(Path("results/embedded/bases/other"))
    with pytest.raises(RecordError, match="stale"):
        check_kept(with_profile(project, "embedded", base=other))


def test_a_changed_prompt_of_the_case_fails(project):
    """A changed prompt makes every kept record stale, and changed prose does none."""
    check_kept(project.model_copy(update={"title": "Another"}))
    for name in ("real_model", "replays/0", "replays/1"):
        with pytest.raises(RecordError, match=r"stale.*case with digest"):
            read_kept(with_prompt(project), name)


def test_changed_rows_fail(project, monkeypatch):
    """Rows that are no longer those that were asked make a record stale."""
    monkeypatch.setattr(
        "postmortem.case.rows.choose_rows",
        lambda case, profile, rows: choose_rows(case, profile, rows=rows + 1),
    )
    with pytest.raises(RecordError, match=r"stale.*data with digest"):
        read_kept(project, "real_model")


@pytest.mark.parametrize(("own", "other"), [(PROFILE, "embedded"), ("embedded", PROFILE)])
def test_another_profile_makes_nothing_stale(project, own, other):
    """A record counts the settings of its own profile alone."""
    name = "real_model" if own == PROFILE else "replays/0"
    assert read_kept(with_profile(project, other, rows=12), name)
    with pytest.raises(RecordError, match="stale"):
        read_kept(with_profile(project, own, rows=12), name)


def test_code_makes_nothing_stale(project):
    """Another version of the library, or an edited notebook, leaves a kept record as it is."""
    for notebook in Path("notebooks/kept").glob("*.ipynb"):
        notebook.unlink()
    check_kept(project)
    assert (
        "notebook" in read_records(Path("results", PROFILE, "real_model.jsonl")).provenance.digests
    )


def test_the_record_of_another_case_is_not_read(project):
    """A record belongs to its case; another case with a profile of that name has none."""
    assert read_kept(project.model_copy(update={"name": "another"}), "real_model") == {}


def test_without_replays_the_remedy_is_said(project):
    """A diagnosis without kept replays ends with the command that makes them."""
    shutil.rmtree("results/embedded/replays")
    with pytest.raises(RecordError, match=r"kept replays.*make record PROFILE=embedded"):
        read_replays(project)


def answer(**changes):
    """A prediction of the base."""
    parts = {"system": "base", "prompt": "v2", "row_id": "1", "group": "g", "label": 1}
    parts |= {"text": "0.0", "token_ids": (1,), "prompt_tokens": 9, "full_prompt_tokens": 9}
    parts |= {"finished": True, "value": 0.0, "stage": "float", "strict_value": 0.0}
    parts |= {"expected_value": 0.1, "number_log_odds": -2.0, "yes_no_log_odds": 0.5}
    return Prediction(**(parts | changes))


def test_answers_are_held_against_each_other_place_by_place():
    """Those that both have are compared; rounding is no difference, and the first one is named."""
    kept = [answer(), answer(row_id="2"), answer(row_id="3", text="0.5")]
    near = answer(number_log_odds=-2.0 + LARGEST_GAP / 2)
    found = compare_answers(kept, [near, answer(row_id="9")])
    assert (found.answers, found.texts, found.alike) == (1, 1, True)
    assert found.largest_gap == pytest.approx(LARGEST_GAP / 2)
    found = compare_answers(kept, [near, answer(row_id="2", text="0.1"), answer(row_id="3")])
    assert (found.answers, found.texts, found.alike) == (3, 1, False)
    assert found.first.startswith("base, v2, 2: '0.0' on record, '0.1'")


# Another text, other log-odds of either kind, none, and no answer in common.
OTHERS = [
    {"text": "0.1"},
    {"yes_no_log_odds": 0.5 + 2 * LARGEST_GAP},
    {"number_log_odds": -2.0 - 2 * LARGEST_GAP},
    {"number_log_odds": None},
    {"row_id": "2"},
    {"system": "suspect"},
    {"prompt": "v1"},
]


@pytest.fixture
def recorded(project):
    """The real model's record with one answer on it."""
    path = Path("results", PROFILE, "real_model.jsonl")
    file = read_records(path)
    write_records(path, file.provenance, records=[*file.records, answer()])
    return read_records(path)


def ask_again(recorded, sample):
    """A later run's record of one answer."""
    aside = recorded.provenance.aside | {"started": "2026-02-03 04:05 UTC", "commit": "abcdef+"}
    today = recorded.provenance.model_copy(update={"aside": aside})
    write_records("sample.jsonl", today, records=[sample])
    return "sample.jsonl"


def test_a_confirmation_names_its_day_and_commit(recorded):
    """A sample that answers alike is kept beside the record, and the page says when and where."""
    sample = ask_again(recorded, answer(number_log_odds=-2.0004))
    assert confirm_files(recorded.path, sample) == ("1 answers alike, log-odds within 0.0004 nat")
    found = read_confirmation(recorded)
    assert (found.made, found.commit) == ("2026-02-03 04:05 UTC", "abcdef+")
    assert (found.record, found.answers) == (recorded.digest, 1)
    assert found.versions["torch"]
    values = empty_values()
    add_recorded(values, {PROFILE: recorded})
    again = [[PROFILE, "2026-02-03", "abcdef+", 1, "0.0004"]]
    assert values["tables"]["recorded.again"]["rows"] == again


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_another_answer_confirms_nothing(recorded, change):
    """What differs, or has nothing to compare, leaves no confirmation."""
    with pytest.raises(RecordError, match=r"answers on record.*Make the record again"):
        confirm_files(recorded.path, ask_again(recorded, answer(**change)))
    assert read_confirmation(recorded) is None


def test_a_confirmation_is_of_one_record(recorded):
    """A record made again is not covered by the confirmation of the one before it."""
    confirm(recorded, read_records(ask_again(recorded, answer())))
    more = [*recorded.records, Measure(key="more", value=1)]
    write_records(recorded.path, recorded.provenance, records=more)
    later = read_records(recorded.path)
    assert read_confirmation(later) is None
    values = empty_values()
    add_recorded(values, {PROFILE: later})
    assert values["tables"]["recorded.again"]["rows"] == [[PROFILE, "not yet", None, None, None]]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"record": 1}', "\x00"])
def test_a_confirmation_that_is_none_is_refused(recorded, text):
    """A file in the confirmation's place that is not one is named."""
    Path(recorded.path).with_suffix(".confirmed.json").write_text(text)
    with pytest.raises(RecordError, match=r"real_model\.confirmed\.json: expected a confirmation"):
        read_confirmation(recorded)


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


def test_how_an_adapter_was_trained_is_read_beside_it(project):
    """Each shipped adapter with a training's record has a row; what was not judged is a dash."""
    auc = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 8}
    training = {"prompt": "yes_no", "rows": 24, "layers": 2, "steps": 6}
    training["held_out log-odds AUC, adapter"] = auc
    Path("results", PROFILE, "yes_no", "training.json").write_text(json.dumps(training))
    values = empty_values()
    add_training(values, project, [PROFILE])
    [row] = values["tables"]["recorded.training"]["rows"]
    assert row[:5] == ["smollm2, yes_no", "yes_no", 24, 2, 6]
    assert row[5:8] == ["–", "0.90 [0.80,\N{NO-BREAK SPACE}1.00]", "–"]


def test_two_trainings_are_compared_by_bytes_and_answers(recorded):
    """What two trainings have in common: models the same to the byte, and texts of answers."""
    other = read_records(ask_again(recorded, answer(text="0.5")))
    assert describe_difference(recorded, recorded) == (
        "2 of 2 models the same to the byte, 1 of 1 answers the same"
    )
    assert describe_difference(recorded, other) == (
        "0 of 2 models the same to the byte, 0 of 1 answers the same"
    )


def test_the_page_says_where_each_run_was_made(project):
    """Every kept run has its day, commit, machine and digest on the page."""
    columns = ("run", "made on", "commit", "device", "seconds", "digest")
    for seed, file in enumerate(read_replays(project)):
        made = [f"embedded, {seed}", "2026-01-01", "0123456789ab", "cpu, a card", 60]
        assert _made(file, columns) == [*made, file.digest]


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
    assert values["tables"]["recorded.v2"]["rows"] == []
    assert values["verdicts"]["recorded.reproduces_agree"]["verdict"] == "not available"
    assert not values["measures"]


def test_what_is_shipped_is_as_it_was_made(case, monkeypatch):
    """Every record, base and adapter in the checkout is the one that was recorded."""
    monkeypatch.chdir(ROOT)
    check_kept(case)
    shipped = {path.parent.name for path in Path("results").glob("*/real_model.jsonl")}
    assert set(read_kept(case, "real_model")) == shipped


def test_the_bench_line_comes_from_its_record(project, tmp_path):
    """The last line of the benchmark holds three recorded numbers."""
    file = read_records(Path("results", PROFILE, "real_model.jsonl"))
    values = {"v2.numeric.ratio": 1.94, "yes_no.readout.ratio": 7.38, "share": 0.776}
    records = [Measure(key=f"bench.{key}", value=value) for key, value in values.items()]
    path = tmp_path / "bench.jsonl"
    write_records(path, file.provenance, records=records)
    told = describe_bench(read_records(path))
    assert told == "numeric x1.9, readout x7.4, gemm share 0.78"
