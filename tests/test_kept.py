import json
import re
import shutil
from pathlib import Path

import pytest
from answers import PROVENANCE, prediction

from postmortem.book.publish import (
    _made,
    add_gains,
    add_recorded,
    add_records,
    add_training,
    add_turned,
    describe_bench,
    find_shared,
)
from postmortem.case.layout import list_kept
from postmortem.case.rows import choose_rows
from postmortem.checker.errors import RecordError
from postmortem.experiments.records import (
    LARGEST_GAP,
    Measure,
    Table,
    Text,
    Verdict,
    check_kept,
    compare_answers,
    confirm_files,
    read_confirmation,
    read_kept,
    read_records,
    read_replays,
    write_records,
)
from tools.train_world import describe_difference

ROOT = Path(__file__).parents[1]
PROFILE = "smollm2"
# What is kept of the embedded world beside its training.
REPLAYED = ("replays/0", "replays/1", "replays/2")
KEPT = ("attribution", "catalogue", "held_out", "peft_versions", *REPLAYED, "suite")


@pytest.fixture
def _at_a_copy(tmp_path, monkeypatch):
    """A folder with a copy of all that is shipped, to be damaged."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)


def with_profile(case, name, **changes):
    """The case with settings of one profile changed."""
    changed = case.profiles[name].model_copy(update=changes)
    return case.model_copy(update={"profiles": {**case.profiles, name: changed}})


@pytest.mark.usefixtures("_at_a_copy")
def test_what_is_shipped_is_as_it_was_made(case):
    """Each record, base and adapter is the one that was recorded, whatever became of its notebook.

    A book is built without the runs on real models, and another case reads none of these.
    """
    check_kept(case)
    assert {"world", *KEPT} == set(list_kept("embedded"))
    kept = read_kept(case, "real_model")
    assert list(kept) == [PROFILE, "qwen-coder"]
    assert "notebook" in kept[PROFILE].provenance.digests
    assert [file.provenance.seed for file in read_replays(case)] == [0, 1, 2]
    assert read_kept(case.model_copy(update={"name": "another"}), "real_model") == {}
    for profile in kept:
        Path("results", profile, "real_model.jsonl").unlink()
    check_kept(case)


@pytest.mark.usefixtures("_at_a_copy")
@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("embedded/world", "make world"),
        ("embedded/replays/1", "make record PROFILE=embedded"),
        ("embedded/peft_versions", "make peft-versions"),
        (f"{PROFILE}/real_model", f"make record PROFILE={PROFILE}"),
    ],
)
def test_an_edited_record_fails(case, place, remedy):
    """A record changed by hand breaks its seal, and the remedy says what makes it again."""
    path = Path("results", f"{place}.jsonl")
    path.write_text(re.sub(r'"seed":\d', '"seed":9', path.read_text(), count=1))
    with pytest.raises(RecordError, match=f"changed after the run.*{remedy}"):
        check_kept(case)


@pytest.mark.usefixtures("_at_a_copy")
@pytest.mark.parametrize("name", ["world", "replays/0", "suite", "peft_versions"])
def test_what_the_pages_read_must_be_there(case, name):
    """A record of the embedded world that is missing, or of another case, is told by its path."""
    path = Path("results/embedded", f"{name}.jsonl")
    file = read_records(path)
    path.unlink()
    with pytest.raises(RecordError, match=rf"embedded/{name}\.jsonl"):
        check_kept(case)
    other = file.provenance.model_copy(update={"case": "another"})
    write_records(path, other, records=file.records)
    with pytest.raises(RecordError, match=rf"embedded/{name}\.jsonl.*another case"):
        check_kept(case)


@pytest.mark.usefixtures("_at_a_copy")
@pytest.mark.parametrize(
    ("model", "gone"),
    [
        ("embedded/bases/donor_base", False),
        ("embedded/adapters/silent/suspect", False),
        ("embedded/adapters/donor/numeric_0", True),
        (f"{PROFILE}/adapters/yes_no", True),
        (f"{PROFILE}/adapters/thinking", False),
    ],
)
def test_a_shipped_model_that_is_another_fails(case, model, gone):
    """One byte off a shipped base or adapter is told in one line that names its folder."""
    folder = Path("results", model)
    if gone:
        shutil.rmtree(folder)
    else:
        weights = next(folder.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RecordError, match=f"{model}, the .*as when the record was made") as caught:
        check_kept(case)
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("_at_a_copy")
def test_a_model_that_was_not_trained_with_the_others_fails(case):
    """A base that the profile names and the training's record does not list is another world."""
    other = shutil.copytree("results/embedded/bases/donor_base", "results/embedded/bases/other")
    with pytest.raises(RecordError, match="stale"):
        check_kept(with_profile(case, "embedded", base=str(other)))


@pytest.mark.usefixtures("_at_a_copy")
def test_a_changed_prompt_or_row_fails(case, monkeypatch):
    """A changed prompt or row makes every kept record stale, and changed prose does none."""
    check_kept(case.model_copy(update={"title": "Another"}))
    prompt = case.prompts["v2"].model_copy(update={"template": "{body}?"})
    changed = case.model_copy(update={"prompts": {**case.prompts, "v2": prompt}})
    for name in ("real_model", "replays/0", "replays/1"):
        with pytest.raises(RecordError, match=r"stale.*case with digest"):
            read_kept(changed, name)
    monkeypatch.setattr(
        "postmortem.case.rows.choose_rows",
        lambda case, profile, rows: choose_rows(case, profile, rows=rows + 1),
    )
    with pytest.raises(RecordError, match=r"stale.*data with digest"):
        read_kept(case, "real_model")


@pytest.mark.usefixtures("_at_a_copy")
@pytest.mark.parametrize(("own", "other"), [(PROFILE, "embedded"), ("embedded", PROFILE)])
def test_another_profile_makes_nothing_stale(case, own, other):
    """A record counts the settings of its own profile alone."""
    name = "real_model" if own == PROFILE else "replays/0"
    assert read_kept(with_profile(case, other, rows=12), name)
    with pytest.raises(RecordError, match="stale"):
        read_kept(with_profile(case, own, rows=12), name)


@pytest.mark.usefixtures("_at_a_copy")
def test_without_replays_the_remedy_is_said(case):
    """A diagnosis without kept replays ends with the command that makes them."""
    shutil.rmtree("results/embedded/replays")
    with pytest.raises(RecordError, match=r"kept replays.*make record PROFILE=embedded"):
        read_replays(case)


def test_answers_are_held_against_each_other_place_by_place():
    """Those that both have are compared; rounding is no difference, and the first one is named."""
    kept = [prediction(), prediction(row_id="2"), prediction(row_id="3", text="0.5")]
    near = prediction(number_log_odds=-2.0 + LARGEST_GAP / 2)
    found = compare_answers(kept, [near, prediction(row_id="9")])
    assert (found.answers, found.texts, found.alike) == (1, 1, True)
    assert found.largest_gap == pytest.approx(LARGEST_GAP / 2)
    found = compare_answers(
        kept, [near, prediction(row_id="2", text="0.1"), prediction(row_id="3")]
    )
    assert (found.answers, found.texts, found.alike) == (3, 1, False)
    assert found.first.startswith("base, v2, 2: '0.0' on record, '0.1'")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A record of two models with a value of each kind and one answer."""
    monkeypatch.chdir(tmp_path)
    records = [
        Table(key="members", columns=("role", "digest"), rows=(("suspect", "0"), ("donor", "1"))),
        Measure(key="v2.rows", value=6),
        Measure(key="v2.base.distinct", value=1),
        Measure(key="v2.base.auc_number", value=0.5, low=0.4, high=0.6, n=6),
        Measure(key="file.rows", value=3),
        Measure(key="file.v2.base.distinct", value=2),
        Verdict(key="v2.base.reproduces", verdict="holds", because="so"),
        Verdict(key="v2.base.knows", verdict="cannot tell", because="so"),
        Text(key="v2.base.commonest_text", text="<b>0.0</b>"),
        prediction(),
    ]
    write_records("real_model.jsonl", PROVENANCE, records=records)
    return read_records("real_model.jsonl")


def ask_again(recorded, sample):
    """A later run's record of one answer."""
    aside = recorded.provenance.aside | {"started": "2026-02-03 04:05 UTC", "commit": "abcdef+"}
    today = recorded.provenance.model_copy(update={"aside": aside})
    write_records("sample.jsonl", today, records=[sample])
    return "sample.jsonl"


def empty_values():
    """Values of a build before any record."""
    return {"measures": {}, "verdicts": {}, "texts": {}, "tables": {}}


def confirmations(file):
    """How the page tells of a record's confirmation."""
    values = empty_values()
    add_recorded(values, {PROFILE: file})
    return values["tables"]["recorded.again"]["rows"]


def test_a_confirmation_names_its_day_and_commit(recorded):
    """A sample that answers alike is kept beside the record, and the page says when and where.

    A record that is made again is not covered by the confirmation of the one before it.
    """
    sample = ask_again(recorded, prediction(number_log_odds=-2.0004))
    assert confirm_files(recorded.path, sample) == ("1 answers alike, log-odds within 0.0004 nat")
    found = read_confirmation(recorded)
    assert (found.made, found.commit) == ("2026-02-03 04:05 UTC", "abcdef+")
    assert (found.record, found.answers) == (recorded.digest, 1)
    assert found.versions["torch"]
    assert confirmations(recorded) == [[PROFILE, "2026-02-03", "abcdef+", 1, "0.0004"]]
    more = [*recorded.records, Measure(key="more", value=1)]
    write_records(recorded.path, recorded.provenance, records=more)
    later = read_records(recorded.path)
    assert read_confirmation(later) is None
    assert confirmations(later) == [[PROFILE, "not yet", None, None, None]]


@pytest.mark.parametrize(
    "change",
    [
        {"text": "0.1"},
        {"yes_no_log_odds": 0.5 + 2 * LARGEST_GAP},
        {"number_log_odds": -2.0 - 2 * LARGEST_GAP},
        {"number_log_odds": None},
        # No answer in common.
        {"row_id": "2"},
        {"system": "suspect"},
        {"prompt": "v1"},
    ],
    ids=str,
)
def test_another_answer_confirms_nothing(recorded, change):
    """What differs, or has nothing to compare, leaves no confirmation."""
    with pytest.raises(RecordError, match=r"answers on record.*Make the record again"):
        confirm_files(recorded.path, ask_again(recorded, prediction(**change)))
    assert read_confirmation(recorded) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"record": 1}', "\x00"])
def test_a_confirmation_that_is_none_is_refused(recorded, text):
    """A file in the confirmation's place that is not one is named."""
    Path(recorded.path).with_suffix(".confirmed.json").write_text(text)
    with pytest.raises(RecordError, match=r"real_model\.confirmed\.json: expected a confirmation"):
        read_confirmation(recorded)


def test_what_an_adapter_adds_stands_for_generated_and_for_real_rows(recorded):
    """Each read-out has both differences with their intervals; what no row was asked has none."""
    sides = {"v2.base.auc_decoded": 0.5, "v2.reference.auc_decoded": 0.8}
    held = [
        Measure(key=f"dev.{key}", value=value, low=value - 0.1, high=value + 0.1)
        for key, value in sides.items()
    ]
    values = empty_values()
    add_gains(values, PROFILE, recorded.model_copy(update={"records": tuple(held)}))
    rows = values["tables"][f"{PROFILE}.gains"]["rows"]
    generated = next(n for n, row in enumerate(rows) if row[0] == "numeric adapter, as written")
    assert rows[generated][1:] == ["generated", "unknown", "unknown", "unknown"]
    assert rows[generated + 1][::4] == ["", "+0.30 [+0.16,\N{NO-BREAK SPACE}+0.44]"]
    gain = values["measures"][f"{PROFILE}.dev.gain.written"]
    assert (gain["value"], gain["low"]) == pytest.approx((0.3, 0.3 - 0.02**0.5))
    assert values["measures"][f"{PROFILE}.gain.written"]["reason"]


def test_a_swapped_scale_is_counted_both_ways(recorded):
    """A changed prompt is held against the unchanged one on its rows, and read the other way."""
    swapped, odds = "v2_meaning_swapped", {"1": 1.0, "2": 0.5, "3": -1.0, "4": 0.0}
    labels = {"1": 1, "2": 1, "3": 0, "4": 0}
    asked = [
        prediction(prompt=prompt, row_id=row, label=labels[row], number_log_odds=odds[row] * sign)
        for prompt, sign in (("v2", 0.0), (swapped, 1.0))
        for row in odds
    ]
    values = empty_values()
    values["measures"][f"{PROFILE}.variation.{swapped}.auc_number"] = {"value": 1.0}
    add_turned(values, PROFILE, recorded.model_copy(update={"records": tuple(asked)}))
    found = {
        name: values["measures"][f"{PROFILE}.variation.{swapped}.{name}"]["value"]
        for name in ("before", "turned", "gain")
    }
    assert found == {"before": 0.5, "turned": 0.0, "gain": 0.5}


def test_a_cause_stands_for_all_only_where_all_models_show_it(recorded):
    """The causes that give the whole symptom on every real model are named, and no other."""

    def with_causes(*whole):
        rows = [(cause, "yes" if cause in whole else "no") for cause in ("one", "two")]
        causes = Table(key="causes", columns=["cause", "whole"], rows=rows)
        return recorded.model_copy(update={"records": (causes,)})

    assert find_shared({"a": with_causes("one", "two"), "b": with_causes("two")}) == ["two"]
    assert find_shared({"a": recorded}) == []


def test_a_kept_record_is_read_under_its_profile(recorded):
    """A value of a kept record stands under its profile's name, or its own where it has no like."""
    values = empty_values()
    add_recorded(values, {PROFILE: recorded})
    assert values["measures"]["smollm2.v2.base.distinct"]["value"] == 1
    assert values["texts"]["smollm2.v2.base.commonest_text"] == "<b>0.0</b>"
    rows = values["tables"]["recorded.v2"]["rows"]
    assert [row[:3] for row in rows] == [
        ["smollm2, 6 generated", "base", 1],
        ["smollm2, 3 file", "base", 2],
    ]
    assert rows[0][6] == "0.50 [0.40,\N{NO-BREAK SPACE}0.60]"
    add_records(values, recorded)
    assert values["measures"]["v2.rows"]["value"] == 6


def test_how_an_adapter_was_trained_is_read_beside_it(case, tmp_path):
    """Each shipped adapter with a training's record has a row; what was not judged is a dash."""
    auc = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 8}
    training = {"prompt": "yes_no", "rows": 24, "layers": 2, "steps": 6}
    training["held_out log-odds AUC, adapter"] = auc
    (tmp_path / "training.json").write_text(json.dumps(training))
    own = {"adapters": {"suspect": str(tmp_path), "reference": "none"}, "replay_adapters": {}}
    values = empty_values()
    add_training(values, with_profile(case, PROFILE, **own), [PROFILE])
    [row] = values["tables"]["recorded.training"]["rows"]
    assert row[:5] == [f"smollm2, {tmp_path.name}", "yes_no", 24, 2, 6]
    assert row[5:8] == ["–", "0.90 [0.80,\N{NO-BREAK SPACE}1.00]", "–"]


def test_two_trainings_are_compared_by_bytes_and_answers(recorded):
    """What two trainings have in common: models the same to the byte, and texts of answers."""
    other = read_records(ask_again(recorded, prediction(text="0.5")))
    assert describe_difference(recorded, recorded) == (
        "2 of 2 models the same to the byte, 1 of 1 answers the same"
    )
    assert describe_difference(recorded, other) == (
        "0 of 2 models the same to the byte, 0 of 1 answers the same"
    )


def test_the_page_says_where_a_run_was_made(recorded):
    """A kept run has its day, commit, machine and digest on the page."""
    columns = ("run", "made on", "commit", "device", "seconds", "digest")
    made = ["smollm2, real_model", "2026-01-01", "0123456789ab", "cpu, a card", 60]
    assert list(_made(recorded, columns)) == [*made, recorded.digest]


@pytest.mark.parametrize("own", ["holds", "refuted"])
def test_worlds_agree_only_where_all_say_the_same(recorded, own):
    """The reader's own run counts among the worlds that have to agree."""
    values = empty_values()
    values["verdicts"]["swap.base.reproduces"] = {"verdict": own, "because": ""}
    add_recorded(values, {PROFILE: recorded})
    found = values["verdicts"]["recorded.reproduces_agree"]
    assert found == {"verdict": own, "because": f"smollm2: holds; this run: {own}"}


def test_nothing_on_record_is_said():
    """Without any record the tables are empty and agreement is not available."""
    values = empty_values()
    add_recorded(values, {})
    assert values["tables"]["recorded.v2"]["rows"] == []
    assert values["verdicts"]["recorded.reproduces_agree"]["verdict"] == "not available"
    assert not values["measures"]


def test_the_bench_line_comes_from_its_record(recorded):
    """The last line of the benchmark holds three recorded numbers."""
    values = {"v2.numeric.ratio": 1.94, "yes_no.readout.ratio": 7.38, "share": 0.776}
    measures = tuple(Measure(key=f"bench.{key}", value=value) for key, value in values.items())
    told = describe_bench(recorded.model_copy(update={"records": measures}))
    assert told == "numeric x1.9, readout x7.4, gemm share 0.78"
