import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.rows import Rows, generate_rows
from postmortem.experiments.analysis import judge_knowing
from postmortem.experiments.controls import (
    ALTERATIONS,
    KINDS,
    PROMPTS,
    answer_alone,
    example_pairs,
    judge_cost,
    judge_flips,
    judge_gain,
    judge_odds,
    record_alterations,
    record_kinds,
    record_states,
    remove_examples,
    shuffle_posts,
    swap_examples,
)
from postmortem.experiments.metrics import Estimate, rate_estimate
from postmortem.experiments.records import Measure, Prediction, Table, Verdict, read_records
from postmortem.experiments.session import open_session
from postmortem.models.changes import edit_tensors
from postmortem.models.world import Member, write_world


@pytest.fixture
def session(untrained_world, tmp_path, pytestconfig):
    """A session of the controls notebook on eight generated rows of the untrained world."""
    write_world(untrained_world, tmp_path / "world.json")
    root = pytestconfig.rootpath
    return open_session(
        str(root / "notebooks/06_controls.ipynb"),
        case=str(root / "cases/qwen-lora.yml"),
        profile="embedded",
        world=str(tmp_path / "world.json"),
        records=str(tmp_path / "06_controls.jsonl"),
        rows=8,
        device="cpu",
    )


def run_all(session):
    """What the notebook does."""
    alone = answer_alone(session)
    record_alterations(session, alone)
    record_kinds(session, alone)
    record_states(session, alone)


def recorded(session, kind):
    """The records of one kind by key."""
    return {record.key: record for record in session.records if isinstance(record, kind)}


def words(session):
    """The verdict words by key."""
    return {key: record.verdict for key, record in recorded(session, Verdict).items()}


def keys(session):
    """The keys of all records that a page can ask for."""
    return {(r.kind, r.key) for r in session.records if r.kind not in ("prediction", "timing")}


def without(session, *roles):
    """Take roles from the session's world."""
    gone = {r: Member(role=r, path=None, digest=None, reason=f"no {r} here") for r in roles}
    session.world = session.world.model_copy(update={"members": session.world.members | gone})


def make_rows(posts):
    """Rows of these posts, with a column that tells where each row stood."""
    frame = pd.DataFrame({"body": posts, "rule": [f"r{i}" for i in range(len(posts))]})
    ids = tuple(map(str, range(len(posts))))
    return Rows("generated", frame, ids, ("g",) * len(posts), None)


@given(posts=st.lists(st.text(max_size=3), min_size=1, max_size=30), seed=st.integers(0, 2**32))
def test_moved_posts_are_the_same_posts(posts, seed):
    """Moving posts keeps them all, the rows as they were, and every other column."""
    rows = make_rows(posts)
    moved = shuffle_posts(rows, "body", seed=seed)
    assert sorted(moved.frame["body"]) == sorted(posts)
    assert list(moved.frame["rule"]) == list(rows.frame["rule"])
    assert list(moved.frame.columns) == list(rows.frame.columns)
    assert list(rows.frame["body"]) == posts


@given(count=st.integers(2, 60), seed=st.integers(0, 2**32))
def test_no_post_keeps_its_place(count, seed):
    """With two rows or more every row gets the post of another."""
    rows = make_rows([f"post {i}" for i in range(count)])
    moved = shuffle_posts(rows, "body", seed=seed)
    assert not (moved.frame["body"] == rows.frame["body"]).any()


def test_moving_posts_repeats_itself():
    """Equal seeds move posts alike, and a single row keeps its post."""
    rows = make_rows([f"post {i}" for i in range(20)])
    first, again = (shuffle_posts(rows, "body", seed=3) for _ in range(2))
    assert first.frame.equals(again.frame)
    assert not first.frame.equals(shuffle_posts(rows, "body", seed=4).frame)
    assert list(shuffle_posts(make_rows(["only"]), "body", seed=3).frame["body"]) == ["only"]


def test_examples_swapped_twice_are_as_they_were(case):
    """Exchanging the examples twice is the identity; once, positives stand where negatives did."""
    rows = generate_rows(12, seed=1)
    pairs = example_pairs(case.prompts["v2"])
    assert len(pairs) == 2
    once = swap_examples(rows, pairs)
    assert list(once.frame["positive_example_1"]) == list(rows.frame["negative_example_1"])
    assert list(once.frame["negative_example_2"]) == list(rows.frame["positive_example_2"])
    assert swap_examples(once, pairs).frame.equals(rows.frame)


def test_removed_examples_leave_the_rest(case):
    """Removing the examples empties their columns alone."""
    rows = generate_rows(5, seed=1)
    removed = remove_examples(rows, example_pairs(case.prompts["v2"]))
    changed = (removed.frame != rows.frame).any()
    assert {name for name in changed.index if changed[name]} == {
        f"{kind}_example_{n}" for kind in ("positive", "negative") for n in (1, 2)
    }
    assert set(removed.frame["positive_example_1"]) == {""}


def test_a_prompt_without_examples_has_no_pairs(case):
    """A prompt that shows no examples has none to exchange, and its rows stay as they are."""
    pairs = example_pairs(case.prompts["v1"])
    rows = generate_rows(3, seed=1)
    assert pairs == ()
    assert swap_examples(rows, pairs).frame.equals(rows.frame)


def estimate(low, high):
    """An estimate in the middle of its interval."""
    return Estimate((low + high) / 2, low, high, 50)


@pytest.mark.parametrize(
    ("hidden", "said", "word"),
    [
        ((0.9, 1.0), (0.9, 1.0), "says what it knows"),
        ((0.4, 0.7), (0.55, 0.8), "says what it knows"),
        ((0.9, 1.0), (0.5, 0.5), "knows and does not say"),
        ((0.9, 1.0), (0.49, 0.52), "knows and does not say"),
        # An order too slight to be of use is not said to be one.
        ((0.9, 1.0), (0.51, 0.55), "knows and does not say"),
        ((0.51, 0.55), (0.5, 0.5), "does not know"),
        ((0.42, 0.58), (0.5, 0.5), "does not know"),
        ((0.42, 0.68), (0.5, 0.5), "cannot tell"),
        # An order in reverse is no lack of one.
        ((0.1, 0.3), (0.5, 0.5), "cannot tell"),
        ((0.9, 1.0), (0.3, 0.8), "cannot tell"),
        ((0.42, 0.58), (0.3, 0.8), "cannot tell"),
    ],
)
def test_what_a_base_does_with_what_it_knows(hidden, said, word):
    """Two intervals decide between three words, and leave it open where they are wide."""
    found, because = judge_knowing(estimate(*hidden), said=estimate(*said), unranked="no labels")
    assert found == word
    assert "AUC of the log-odds" in because


def test_few_rows_show_nothing():
    """On fewer than eight rows a perfect order, a large change and a gain are left open."""
    perfect = Estimate(1.0, 1.0, 1.0, 7)
    word, because = judge_knowing(perfect, said=constant_of(7), unranked="")
    assert (word, because.endswith("on 7 rows")) == ("cannot tell", True)
    assert judge_odds(Estimate(2.0, 1.9, 2.1, 7))[0] is None
    assert judge_gain(Estimate(0.5, 0.5, 0.5, 7), "")[0] is None
    assert judge_cost(perfect, change=Estimate(-0.5, -0.5, -0.5, 7), unranked="")[0] is None
    eight = Estimate(1.0, 1.0, 1.0, 8)
    assert judge_knowing(eight, said=constant_of(8), unranked="")[0] == "knows and does not say"


def constant_of(rows):
    """The AUC of one value on all rows."""
    return Estimate(0.5, 0.5, 0.5, rows)


def test_without_an_auc_nobody_can_tell_what_is_known():
    """Where there is no AUC the reason is the lack of it."""
    unknown = Estimate(None, None, None, 0)
    assert judge_knowing(unknown, said=unknown, unranked="no labels") == (
        "cannot tell",
        "no labels",
    )


@pytest.mark.parametrize(
    ("changed", "rows", "decided"),
    [(0, 10, None), (0, 200, False), (1, 10, True), (1, 5000, True), (10, 10, True)],
)
def test_one_changed_value_shows_a_dependence(changed, rows, decided):
    """One changed value is proof; none is proof of the contrary on many rows only."""
    assert judge_flips(rate_estimate(changed, rows))[0] is decided


@pytest.mark.parametrize(
    ("change", "decided"), [((0.2, 0.4), True), ((0.0, 0.01), False), ((0.05, 0.3), None)]
)
def test_log_odds_move_by_more_than_the_limit_or_less(change, decided):
    """A change of log-odds is decided by an interval on one side of the limit."""
    assert judge_odds(estimate(*change))[0] is decided


@pytest.mark.parametrize(
    ("gain", "decided"),
    [((0.1, 0.3), True), ((-0.1, 0.1), None), ((0.0, 0.0), False), ((-0.3, -0.1), False)],
)
def test_a_gain_is_above_zero_or_none(gain, decided):
    """A ranking is better where the interval of the difference is above zero."""
    assert judge_gain(estimate(*gain), "no labels")[0] is decided


@pytest.mark.parametrize(
    ("before", "change", "decided"),
    [
        ((0.9, 1.0), (-0.5, -0.4), True),
        ((0.9, 1.0), (-0.05, 0.02), False),
        ((0.9, 1.0), (-0.2, 0.0), None),
        # Where there is no order none can be lost.
        ((0.42, 0.58), (-0.02, 0.02), None),
        ((0.3, 0.8), (-0.5, -0.2), None),
    ],
)
def test_only_an_order_that_is_there_can_be_lost(before, change, decided):
    """An order is lost with what was altered where it was there and falls by a tenth or more."""
    found = judge_cost(estimate(*before), change=estimate(*change), unranked="no labels")
    assert found[0] is decided


def test_a_disabled_adapter_is_the_base_to_the_last_bit(session):
    """Under a disabled adapter every log-probability is the base's; switched on it is not."""
    alone = answer_alone(session)
    for prompt in alone:
        off = session.answer(prompt, system="suspect", disabled=True, kept=False)
        on = session.answer(prompt, system="suspect", kept=False)
        assert off.system == "suspect_disabled"
        assert np.array_equal(off.first_log_probs, alone[prompt].first_log_probs)
        assert np.array_equal(off.number_log_probs, alone[prompt].number_log_probs)
        assert not np.array_equal(on.first_log_probs, alone[prompt].first_log_probs)


def test_each_state_is_held_against_the_base(session):
    """Off, an adapter is at no distance from the base; on, it is at some, under every prompt."""
    record_states(session, answer_alone(session))
    measures, decided = recorded(session, Measure), words(session)
    for system in ("suspect", "reference"):
        assert decided[f"controls.{system}.disabled_is_base"] == "holds"
        for prompt in PROMPTS:
            off = measures[f"controls.{system}_disabled.{prompt}.kl"]
            assert (off.value, off.high) == (0.0, 0.0)
            assert measures[f"controls.{system}_disabled.{prompt}.flips"].value == 0.0
            assert measures[f"controls.{system}.{prompt}.kl"].value > 0.0
    states = recorded(session, Table)["controls.states"].rows
    assert len(states) == 5 * len(PROMPTS)
    rules = {row[2] for row in recorded(session, Table)["controls.groups"].rows}
    assert len(rules) == len(set(session.rows.groups))


def test_a_file_that_brings_base_weights_is_seen(session, tmp_path):
    """Base weights in an adapter's file outlast switching it off, and spoil no later control."""
    folder = tmp_path / "overwriting"
    shutil.copytree(session.world.path("suspect"), folder)
    name = "base_model.model.model.embed_tokens.weight"
    weights = session.base.model.get_input_embeddings().weight.detach()
    edit_tensors(folder, lambda tensors: {**tensors, name: weights.roll(1, 0).contiguous()})
    member = session.world.members["suspect"].model_copy(update={"path": str(folder)})
    session.world = session.world.model_copy(
        update={"members": session.world.members | {"suspect": member}}
    )
    record_states(session, answer_alone(session))
    decided = words(session)
    assert decided["controls.suspect.disabled_is_base"] == "refuted"
    assert decided["controls.reference.disabled_is_base"] == "holds"


def test_only_the_three_bases_are_kept_row_by_row(session):
    """Predictions are kept of the bases under the second prompt, once for each row."""
    run_all(session)
    session.finish()
    kept = read_records(session.records_path).of(Prediction)
    found = [(p.system, p.prompt, p.row_id) for p in kept]
    assert len(found) == len(set(found)) == len(KINDS) * len(session.rows)
    assert {(system, prompt) for system, prompt, _ in found} == {(kind, "v2") for kind in KINDS}


def test_an_altered_row_is_answered_in_its_place(session):
    """Answers to altered rows keep the ids, rules and truth of the rows that they stand for."""
    rows = shuffle_posts(session.rows, "body", seed=0)
    answers = session.answer("v2", system="shuffled_base", rows=rows, kept=False)
    assert [p.row_id for p in answers.predictions] == list(session.rows.ids)
    assert list(answers.labels) == list(session.rows.labels)
    assert not session.records or all(r.kind == "timing" for r in session.records)


@pytest.mark.parametrize(
    "roles",
    [
        ("suspect", "reference", "speaking_base", "ignorant_base"),
        ("reference", "ignorant_base"),
        ("suspect",),
    ],
)
def test_a_missing_role_leaves_no_key_out(session, untrained_world, roles):
    """Whichever roles are missing, every key is recorded, as not available with the reason."""
    run_all(session)
    complete = keys(session)
    session.records.clear()
    without(session, *roles)
    run_all(session)
    assert keys(session) == complete
    decided = recorded(session, Verdict)
    for role in roles:
        statement = "v2.knowing" if role.endswith("base") else "disabled_is_base"
        verdict = decided[f"controls.{role}.{statement}"]
        assert (verdict.verdict, verdict.because) == ("not available", f"no {role} here")
    session.finish()


def test_a_base_alone_still_has_its_posts_moved(session):
    """A world of a base alone gives the alterations of the rows, and the base's own word."""
    without(session, "suspect", "reference", "speaking_base", "ignorant_base")
    run_all(session)
    measures = recorded(session, Measure)
    for name in ALTERATIONS:
        assert measures[f"controls.{name}.odds_change"].value > 0
        assert measures[f"controls.{name}.rows"].value == len(session.rows)
    assert measures["controls.base.v1.auc_number"].reason == "there is no adapter to compare"
    assert words(session)["controls.base.v2.knowing"] != "not available"


@pytest.mark.parametrize(
    ("labels", "reason"),
    [(None, "the rows came without labels"), ([1] * 8, "the labels hold one class alone")],
)
def test_without_two_classes_nothing_is_ranked(session, labels, reason):
    """Without labels of both classes all that needs them cannot be told, and the rest is."""
    truth = None if labels is None else np.array(labels)
    session.rows = dataclasses.replace(session.rows, labels=truth)
    run_all(session)
    measures, decided = recorded(session, Measure), recorded(session, Verdict)
    assert {m.value for key, m in measures.items() if ".auc" in key or ".gain" in key} == {None}
    for key in ("base.v2.knowing", "shuffled.v2.costs_order", "suspect.v2.says_better"):
        verdict = decided[f"controls.{key}"]
        assert (verdict.verdict, verdict.because) == ("cannot tell", reason)
    assert measures["controls.shuffled.v2.odds_change"].value is not None
    assert measures["controls.suspect.v2.kl"].value > 0
    session.finish()


def test_a_single_row_has_no_other_post(session):
    """One row cannot trade its post; that is said, and the examples are still exchanged."""
    session.rows = session.rows.head(1)
    run_all(session)
    decided, measures = recorded(session, Verdict), recorded(session, Measure)
    assert measures["controls.shuffled.v2.rows"].value == 0
    for statement in ("moves_odds", "moves_written", "costs_order"):
        verdict = decided[f"controls.shuffled.v2.{statement}"]
        assert (verdict.verdict, verdict.because) == ("cannot tell", "it alters no row here")
    assert measures["controls.examples_swapped.odds_change"].n == 1
    assert decided["controls.examples_swapped.moves_odds"].verdict == "cannot tell"
    session.finish()
