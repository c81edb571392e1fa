import json
import math

import numpy as np
import own
import pandas as pd
import pytest
import torch
from chapters import parameters_of
from safetensors.torch import load_file, save_file

from postmortem.case.load import load_case
from postmortem.case.rows import choose_rows
from postmortem.checker.errors import CaseError, DataError, ModelError
from postmortem.experiments.ask import BASE, System, ask
from postmortem.experiments.records import settings_digest
from postmortem.experiments.session import open_session
from postmortem.models.loading import attached, count_classes, load_base, positive_class
from postmortem.models.model_set import resolve_world, write_world


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama, its adapters and rows."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("own")
    base = own.make_base(folder / "base")
    own.make_adapter(folder / "suspect", base)
    own.make_adapter(folder / "classifier", base, task="SEQ_CLS")
    own.write_rows(folder / "rows.csv")
    own.write_rows(folder / "rows.jsonl")
    return folder


def write(place, path, **changes):
    """The case of these folders, with changes."""
    given = {"base": place / "base", "suspect": place / "suspect", "data": place / "rows.csv"}
    return own.write_case(path, **(given | changes))


def open_own(case, folder, rows=0):
    """A session of the case, as a notebook opens it."""
    loaded = load_case(case)
    write_world(resolve_world(loaded, loaded.default_profile), folder / "world.json")
    records = str(folder / "records/own.jsonl")
    given = {"case": str(case), "profile": "", "records": records, "rows": rows}
    return open_session(parameters_of("attempt", folder, **given))


def test_the_short_form_is_a_case(place, tmp_path):
    """The short form loads as a case with one profile, its prompts, and nothing of an incident."""
    case = load_case(write(place, tmp_path / "c.yml"))
    assert (case.default_profile, case.asked) == ("own", "sentiment")
    assert case.prompts["sentiment"].answers == ["negative", "positive"]
    assert not [*case.attempts, *case.claims, *case.hypotheses, *case.evidence]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": None}, ("base", "this key to be given")),
        ({"bases": "x"}, ("bases", "unknown key")),
        ({"prompts": {}}, ("prompts",)),
        ({"prompts": {"a": {**own.SENTIMENT, "answers": None}}}, ("answers", "negative one first")),
        ({"prompts": {"a": {**own.SENTIMENT, "answers": [False, True]}}}, ("quotes",)),
        ({"prompts": {"a": {**own.SENTIMENT, "answers": ["x", "x"]}}}, ("different",)),
        (
            {"prompts": {"a": own.SENTIMENT, "b": {"contract": "class", "template": "{text}"}}},
            ("classifier alone",),
        ),
        ({"name": "Größe <b>"}, ("name", "matching")),
        ({"rows": -1}, ("rows",)),
    ],
)
def test_errors_name_the_key_of_the_short_form(place, tmp_path, changes, words):
    """What is wrong in the short form is said under the key that stands in the file."""
    with pytest.raises(CaseError) as raised:
        load_case(write(place, tmp_path / "c.yml", **changes))
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_are_the_same_from_each_format(place, tmp_path, ending):
    """CSV, JSON lines and Parquet of the same rows give the same rows, numbered from 1."""
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pd.DataFrame(own.REVIEWS, columns=["text", "label"]).to_parquet(path)
    else:
        own.write_rows(path)
    case = load_case(write(place, tmp_path / "c.yml", data=path, rows=10))
    rows = choose_rows(case, "own")
    assert rows.ids == tuple(map(str, range(1, 11)))
    assert rows.row(3) == {"text": own.REVIEWS[3][0]}
    assert rows.labels.tolist() == [label for _, label in own.REVIEWS[:10]]
    assert len(choose_rows(case, "own", rows=4)) == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "{}\n[1]\n", ("object in each line", "row 2")),
        ("a.jsonl", "{not json", ("JSON lines",)),
        ("a.jsonl", "", ("at least one row",)),
        ("a.jsonl", '{"text": ' + "[" * 100_000, ("JSON lines",)),
        ("a.parquet", "no parquet", ("a Parquet file",)),
        ("a.csv", "words\nx\n", ("'text'", "words")),
        ("a.csv", "text,label\nx,maybe\n", ("0 or 1", "positive")),
    ],
)
def test_a_bad_rows_file_is_a_clear_error(place, tmp_path, name, content, words):
    """A file that cannot be read as rows is refused with its name and what was expected."""
    (tmp_path / name).write_text(content)
    case = load_case(write(place, tmp_path / "c.yml", data=tmp_path / name))
    with pytest.raises(DataError) as raised:
        choose_rows(case, "own")
    for word in (name, *words):
        assert word in str(raised.value)


def test_the_positive_label_is_named_by_the_case(place, tmp_path):
    """Labels in words count by the one that the case calls positive; an unknown one is refused."""
    path = tmp_path / "rows.jsonl"
    lines = [{"text": "a", "label": "Spam"}, {"text": "b", "label": "ham"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    case = load_case(write(place, tmp_path / "c.yml", data=path, positive="spam"))
    assert choose_rows(case, "own").labels.tolist() == [1, 0]
    case = load_case(write(place, tmp_path / "c.yml", data=path, positive="eggs"))
    with pytest.raises(DataError, match="'eggs'"):
        choose_rows(case, "own")


def test_missing_values_are_empty_texts(place, tmp_path):
    """Null, NaN and whole numbers in a typed file become the texts that CSV would hold."""
    path = tmp_path / "rows.parquet"
    frame = pd.DataFrame({"text": ["a", None], "label": [1.0, 0.0], "n": [3.0, math.nan]})
    frame.to_parquet(path)
    rows = choose_rows(load_case(write(place, tmp_path / "c.yml", data=path)), "own")
    assert rows.row(1) == {"text": "", "n": ""}
    assert rows.row(0)["n"] == "3"
    assert rows.labels.tolist() == [1, 0]


def test_an_edit_of_the_rows_changes_the_settings(place, tmp_path):
    """The digest that a notebook runs under changes with the contents of the case's rows."""
    path = own.write_rows(tmp_path / "rows.csv")
    case = load_case(write(place, tmp_path / "c.yml", data=path))
    settings = {"profile": "own", "rows": 0, "device": "cpu", "dtype": "auto"}
    settings |= {"data": "", "labels": ""}
    before = settings_digest(case, settings)
    path.write_text(path.read_text().replace("number 3", "number 9"))
    assert settings_digest(case, settings) != before


def test_a_choice_is_scored_as_whole_words(place, tmp_path):
    """Log-odds of a choice are those of the whole answers, however many tokens they have."""
    session = open_own(write(place, tmp_path / "c.yml"), tmp_path, rows=4)
    base = session.base
    answers = ask(session, BASE, "sentiment")
    for prediction, odds in zip(answers.predictions, answers.log_odds, strict=True):
        text = f"[user] {session.rows.row(int(prediction.row_id) - 1)['text']} Sentiment:\n"
        ids = base.tokenizer(text + "[assistant] ", add_special_tokens=False)["input_ids"]
        totals = []
        for word in ("positive", "negative"):
            more = base.tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = base.model(torch.tensor([ids + more])).logits.double()
            found = torch.log_softmax(logits[0, len(ids) - 1 : -1], -1)
            totals.append(float(found[range(len(more)), more].sum()))
        assert odds == pytest.approx(totals[0] - totals[1], abs=1e-4)
    assert prediction.number_log_odds is None


def test_an_adapter_answers_and_leaves_the_base_alone(place, tmp_path):
    """The suspect moves the log-odds; switched off and taken off, the base is as it was."""
    session = open_own(write(place, tmp_path / "c.yml"), tmp_path, rows=6)
    alone = ask(session, BASE, "sentiment").log_odds
    on = ask(session, System("suspect", "suspect"), "sentiment").log_odds
    off = ask(session, System("off", "suspect", off=True), "sentiment").log_odds
    assert np.abs(np.subtract(on, alone)).min() > 1e-3
    assert off == alone
    assert ask(session, BASE, "sentiment").log_odds == alone


def test_a_base_without_a_chat_template_says_so(place, tmp_path):
    """A prompt that asks for a chat template is refused on a base without one, with the remedy."""
    base = own.make_base(tmp_path / "plain", chat=False)
    case = write(place, tmp_path / "c.yml", base=base)
    with pytest.raises(DataError, match="chat: false"):
        ask(open_own(case, tmp_path, rows=2), BASE, "sentiment")
    raw = {"sentiment": {**own.SENTIMENT, "chat": False}}
    case = write(place, tmp_path / "d.yml", base=base, prompts=raw)
    assert len(ask(open_own(case, tmp_path, rows=2), BASE, "sentiment")) == 2


CLASSIFIER = {"ask": {"contract": "class", "template": "{text}"}}


def test_a_classifier_answers_by_its_head(place, tmp_path):
    """A classifier's log-odds are those of its head on each row alone, its value their share."""
    case = write(place, tmp_path / "c.yml", suspect=place / "classifier", prompts=CLASSIFIER)
    session = open_own(case, tmp_path, rows=6)
    answers = ask(session, System("suspect", "suspect"), "ask")
    base = session.base
    with attached(base, place / "classifier") as loaded, torch.inference_mode():
        for index, odds in enumerate(answers.log_odds):
            ids = base.tokenizer(session.rows.row(index)["text"], return_tensors="pt")
            logits = loaded.model(input_ids=ids["input_ids"]).logits[0].double()
            assert odds == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
            assert answers.values[index] == pytest.approx(float(logits.softmax(0)[1]), abs=1e-5)
    assert answers.first_log_probs.shape == (6, 2)
    assert {p.text for p in answers.predictions} <= {"LABEL_0", "LABEL_1"}


def test_a_classifier_leaves_its_head_behind_nowhere(place, tmp_path):
    """After a classifier's adapter is taken off, the base has its own head again."""
    base = load_base(place / "base", classes=2)
    before = base.model.score.weight.clone()
    with attached(base, place / "classifier"):
        pass
    assert torch.equal(base.model.score.weight, before)


def test_classes_are_counted_from_the_head(place, tmp_path):
    """The number of classes is that of the head in the file, and two where it holds none."""
    three = own.make_adapter(tmp_path / "three", place / "base", task="SEQ_CLS", classes=3)
    assert count_classes(three) == 3
    file = three / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if "score" not in name}
    save_file(tensors, file)
    assert count_classes(three) == 2


def test_the_positive_class_is_found_by_name():
    """The class that the case names counts as positive, the second where it names none."""

    class Config:
        num_labels = 3
        id2label = {0: "Bad", 1: "Fair", 2: "Good"}

    assert positive_class(Config, "good") == 2
    assert positive_class(Config, None) == 1
    Config.num_labels = 1
    with pytest.raises(ModelError, match="one output"):
        positive_class(Config, None)


def test_a_broken_adapter_gives_no_number(place, tmp_path):
    """An adapter of NaN is answered and recorded with no number in the place of one."""
    broken = own.make_adapter(tmp_path / "broken", place / "base")
    file = broken / "adapter_model.safetensors"
    save_file({name: t * math.nan for name, t in load_file(file).items()}, file)
    session = open_own(write(place, tmp_path / "c.yml", suspect=broken), tmp_path, rows=3)
    answers = ask(session, System("suspect", "suspect"), "sentiment")
    assert all(p.yes_no_log_odds is None for p in answers.predictions)
    assert np.isnan(answers.log_odds).all()
