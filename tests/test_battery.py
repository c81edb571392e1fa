from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from postmortem.case.rows import Rows
from postmortem.checker.errors import ModelError
from postmortem.diagnosis.battery import ENOUGH, FEW, OF_ADAPTER, TESTS
from postmortem.diagnosis.causes import Run
from postmortem.diagnosis.subject import (
    EVEN,
    RUN,
    Subject,
    _form_of,
    classify_values,
    evenness,
    run_test,
    spread,
    tell_order,
    why_not,
)


def answers(texts, *, values=None, contract="choice"):
    """Answers with these texts and values."""
    predictions = [SimpleNamespace(text=text) for text in texts]
    given = [None] * len(texts) if values is None else values
    return SimpleNamespace(predictions=predictions, strict_values=given, contract=contract)


@pytest.mark.parametrize(
    ("values", "contract", "word"),
    [
        ([0.0, 0.0, 0.0], "number", "one value"),
        ([0.0, 1.0, 0.0], "number", "only 0 and 1"),
        ([0.0, 1.0, 0.0], "choice", "varies"),
        ([0.2, 0.7, None], "number", "varies"),
        ([None, None, 1.0], "number", ""),
        ([0.9, 0.6, 0.7], "class", "one value"),
        ([0.9, 0.1, 0.7], "class", "varies"),
    ],
)
def test_values_have_the_same_words_under_every_contract(values, contract, word):
    """A value is told by its form; of a class only which is the likelier counts."""
    assert classify_values(values, contract) == word


@pytest.mark.parametrize(
    ("texts", "alone", "word"),
    [
        (["food", "film", "food"], ["food", "film", "film"], "as the base"),
        (["<think>", "<think>", "x"], ["a", "b", "c"], "a tag"),
        (["Yes", "no.", "x"], ["a", "b", "c"], "another form"),
        (["0.7", "17", "x"], ["a", "b", "c"], "another form"),
        (["m", "n", "m"], ["a", "b", "c"], "few texts"),
        (list("mnopqrstuv"), list("abcdefghij"), "many texts"),
    ],
)
def test_texts_of_another_form_are_held_against_the_bases(texts, alone, word):
    """What does not answer is the base's own text, a tag, an answer to something else, or noise."""
    assert _form_of(answers(texts), answers(alone)) == word


@pytest.mark.parametrize(
    ("scores", "word"),
    [
        ([0, 1, 2, 3, 10, 11, 12, 13], "ranks"),
        ([10, 11, 12, 13, 0, 1, 2, 3], "ranks in reverse"),
        ([1, 2, 1, 2, 1, 2, 1, 2], "does not rank"),
        ([np.nan] * 8, "not finite"),
    ],
)
def test_an_order_takes_more_than_luck(scores, word):
    """Rows are ranked, ranked in reverse or not, by a rank test."""
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert tell_order(labels, np.array(scores, dtype=float)).word == word


def make_rows(labels, count=None):
    """Rows of these labels; without labels so many."""
    total = count or len(labels)
    ids = tuple(map(str, range(total)))
    truth = None if labels is None else np.array(labels)
    return Rows("file", pd.DataFrame({"text": ids}), ids, ("all",) * total, truth)


@pytest.mark.parametrize("count", [2, 8, 20, 64])
def test_any_beginning_of_spread_rows_is_spread(count):
    """Of a file sorted by label the classes take turns, each from all over it."""
    chosen = spread(make_rows([0] * 90 + [1] * 90), 128).head(count)
    assert chosen.labels.sum() == count // 2
    places = np.array(sorted(map(int, chosen.ids)))
    assert np.diff(places).max() <= 2 * 180 / (count / 2)
    assert len(set(chosen.ids)) == count


def test_a_rare_class_and_rows_without_labels_are_spread_too():
    """All rows of a rare class come early; without labels the rows come from all over the file."""
    assert spread(make_rows([0] * 97 + [1] * 3), 16).labels.sum() == 3
    assert max(map(int, spread(make_rows(None, 100), 16).ids)) > 80
    assert len(spread(make_rows([0, 1]), 16)) == 2


@pytest.fixture
def subject(session):
    """The untrained world's suspect."""
    with Subject(
        session=session,
        run=Run("base", session.world.path("suspect")),
        prompt="v2",
        rows=session.rows,
        base_folder=session.world.path("base"),
        reference=session.world.path("reference"),
    ) as opened:
        yield opened


def test_every_test_is_declared_and_run():
    """The battery declares each test once, and each has its way of being run."""
    assert set(RUN) == set(TESTS)
    assert set(OF_ADAPTER) < set(TESTS)


def test_every_test_has_one_of_its_outcomes(subject):
    """All tests run on a session, and what was asked once is not asked again."""
    outcomes = {}
    for name in OF_ADAPTER:
        assert not why_not(name, subject, outcomes)
        outcomes[name] = run_test(name, subject).word
        assert outcomes[name] in TESTS[name].outcomes
    assert outcomes["inspect"] == "nothing"
    assert outcomes["off"] == "is the base"
    assert outcomes["effect"] != "none"
    asked = dict(subject.asked)
    run_test("mend", subject)
    assert subject.asked == asked
    assert min(subject.paces.values()) > 0


def test_fewer_rows_leave_the_control_of_the_base(subject):
    """Switched off, an adapter is compared with the base on the same rows, whatever rows follow."""
    assert run_test("load", subject).word == "silent"
    subject.count = 5
    assert run_test("off", subject).word == "is the base"


def test_what_cannot_be_had_says_why(subject):
    """Without labels, a reference, an adapter that loads or an effect a test is not run."""
    assert "does not load" in why_not("answers", subject, {"load": "raises"})
    assert not why_not("base-alone", subject, {"load": "raises"})
    assert "no effect" in why_not("mend", subject, {"effect": "none"})
    subject.reference = None
    assert "sound adapter" in why_not("reference", subject, {})
    subject.rows = make_rows([0, 1] * (FEW - 1))
    assert "labels" in why_not("order", subject, {})


def test_an_untrained_adapter_is_inert(subject):
    """lora_B of zeros has no effect, and the checker says why."""
    subject.run = Run("base", subject.session.world.path("no_op"))
    assert run_test("inspect", subject).word == "untrained"
    assert run_test("effect", subject).word == "none"


def test_loading_that_raises_is_an_outcome(subject):
    """An adapter of other shapes raises, and the words are kept."""
    subject.run = Run("base", subject.session.world.path("donor_adapter"))
    found = run_test("load", subject)
    assert found.word == "raises"
    assert "tensor(s) do not fit" in found.measured


def test_a_reference_that_does_not_load_is_an_error_with_its_name(subject):
    """Whose file it is, and why, is said; it is no outcome of the suspect's."""
    subject.reference = subject.session.world.path("donor_adapter")
    with pytest.raises(ModelError, match=r"donor.*an adapter that loads"):
        run_test("reference", subject)


@pytest.mark.parametrize(("rank", "trained"), [(16, True), (16, False), (4, True), (4, False)])
def test_random_numbers_have_no_direction_of_their_own(rank, trained):
    """The singular values of trained factors fall off; those of random numbers hardly do."""
    source = np.random.default_rng(rank)
    factor = source.normal(size=(96, rank))
    if trained:
        factor = factor * 0.5 ** np.arange(rank)
    assert (evenness(factor) > EVEN) is not trained
    assert evenness(factor[:, :2]) is None


def test_more_rows_are_added_to_what_was_asked(subject):
    """Rows asked in two rounds answer as those asked in one, and none is asked twice."""
    with replace(subject, asked={}, effects={}, stack=ExitStack()) as fresh:
        expected, whole = fresh.effect("as saved"), fresh.ask("as saved")
    subject.count = 5
    first = subject.ask("as saved")
    subject.count = 8
    assert subject.effect("as saved") == pytest.approx(expected, abs=1e-5)
    answers = subject.ask("as saved")
    assert answers.predictions[:5] == first.predictions
    assert answers.log_odds == pytest.approx(whole.log_odds, abs=1e-5)
    assert subject.missing_rows("as saved", 8) == 0
    assert subject.missing_rows("at 8", 8) == 8
    assert subject.missing_rows("at 8", 500) == ENOUGH


def told(near=(), kl=()):
    """A subject with the nearness and the effect of each state given."""
    return SimpleNamespace(
        nearness=lambda state: np.array(near[state], dtype=float),
        effect=lambda state: np.array([kl[state]]),
    )


NEAR = dict.fromkeys(
    ("as saved", "base", "at 1/8", "at 8", "sign flipped", "layers shifted", "layers shifted back"),
    [-1.0, -1.1] * 8,
)


@pytest.mark.parametrize(
    ("near", "word"),
    [
        ({}, "nothing"),
        ({"at 1/8": [-0.2, -0.3] * 8}, "smaller"),
        ({"at 8": [-0.2, -0.3] * 8}, "larger"),
        ({"sign flipped": [-0.2, -0.3] * 8}, "flipped"),
        ({"layers shifted back": [-0.2, -0.3] * 8}, "moved"),
        ({"base": [-0.2, -0.3] * 8, "at 1/8": [-0.19, -0.29] * 8}, "no adapter"),
        ({"at 8": [-0.99, -1.09] * 8}, "nothing"),
        ({"as saved": [np.nan] * 16}, "not finite"),
        ({"at 8": [np.nan] * 16, "at 1/8": [-0.2, -0.3] * 8}, "smaller"),
    ],
)
def test_a_mend_beats_the_adapter_as_saved_and_no_adapter(near, word):
    """The change that comes nearest is named where it is no luck and better than none at all."""
    assert run_test("mend", told(near=NEAR | near)).word == word


@pytest.mark.parametrize(
    ("kl", "word"),
    [
        ((1.0, 0.3, 0.2, 0.1), "here"),
        ((0.3, 0.1, 1.0, 0.1), "elsewhere"),
        ((0.1, 0.1, 0.1, 0.1), "nowhere"),
        ((np.nan, 0.1, 0.1, 0.1), "not finite"),
    ],
)
def test_an_adapter_does_most_where_it_belongs(kl, word):
    """Its effect is held against that of its layers moved and of its weights turned."""
    states = ("as saved", "layers shifted", "layers shifted back", "rotated at random")
    assert run_test("place", told(kl=dict(zip(states, kl, strict=True)))).word == word
