import dataclasses

import numpy as np
import pandas as pd
import pytest
from chapters import parameters_of, recorded, run_chapter
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.rows import Rows, generate_rows
from postmortem.experiments.controls import (
    ALTERED,
    example_pairs,
    remove_examples,
    shuffle_posts,
    swap_examples,
)
from postmortem.experiments.records import Measure, Prediction, Table, Verdict
from postmortem.models.changes import CHANGES, COPIES
from postmortem.models.model_set import Member, write_world

PROMPTS = ("v2", "yes_no")


@pytest.fixture
def run(untrained_world, tmp_path):
    """Runs the chapter of the controls on eight rows, in a session that may be changed before."""

    def run_with(prepare=lambda session: None):
        write_world(untrained_world, tmp_path / "world.json")
        given = parameters_of("controls", tmp_path, rows=8)
        return run_chapter("controls", prepare=prepare, **given)

    return run_with


def without(*roles):
    """What takes roles from a session's models."""

    def take(session):
        gone = {r: Member(role=r, path=None, digest=None, reason=f"no {r} here") for r in roles}
        members = session.world.members | gone
        session.world = session.world.model_copy(update={"members": members})

    return take


def make_rows(posts):
    """Rows of these posts, with a column that tells where each row stood."""
    frame = pd.DataFrame({"body": posts, "rule": [f"r{i}" for i in range(len(posts))]})
    ids = tuple(map(str, range(len(posts))))
    return Rows("generated", frame, ids, ("g",) * len(posts), None)


@given(count=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_moved_posts_are_the_same_posts(count, seed):
    """Moving posts keeps them all and every other column; of two or more none keeps its place."""
    posts = [f"post {i}" for i in range(count)]
    rows = make_rows(posts)
    moved = shuffle_posts(rows, "body", seed=seed)
    assert sorted(moved.frame["body"]) == sorted(posts)
    assert list(moved.frame["rule"]) == list(rows.frame["rule"])
    assert list(moved.frame.columns) == list(rows.frame.columns)
    assert list(rows.frame["body"]) == posts
    assert count == 1 or not (moved.frame["body"] == rows.frame["body"]).any()


def test_moving_posts_repeats_itself():
    """Equal seeds move posts alike, and others otherwise."""
    rows = make_rows([f"post {i}" for i in range(20)])
    first, again, other = (shuffle_posts(rows, "body", seed=seed).frame for seed in (3, 3, 4))
    assert first.equals(again)
    assert not first.equals(other)


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


def test_each_state_is_held_against_the_base(run):
    """Off, an adapter is at no distance from the base; on, it is at some, under every prompt.

    A copy with a zero lora_B moves nothing, one with an eighth of the scale less than the whole.
    """
    session = run()
    measures, decided = recorded(session, Measure), recorded(session, Verdict)
    for system in ("suspect", "reference"):
        assert decided[f"controls.{system}.disabled_is_base"].verdict == "holds"
        for prompt in PROMPTS:
            off = measures[f"controls.{system}_disabled.{prompt}.kl"]
            assert (off.value, off.high) == (0.0, 0.0)
            assert measures[f"controls.{system}_disabled.{prompt}.flips"].value == 0.0
            assert measures[f"controls.{system}.{prompt}.kl"].value > 0.0
    whole = measures["controls.suspect.yes_no.kl"].value
    assert measures["controls.zero_b.kl"].value < 1e-6
    assert 0 < measures["controls.eighth.kl"].value < whole
    assert decided["controls.zero_b.is_base"].verdict == "holds"
    assert COPIES.keys() == CHANGES.keys()
    assert len(recorded(session, Table)["controls.states"].rows) == 5 * len(PROMPTS)
    rules = {row[2] for row in recorded(session, Table)["controls.groups"].rows}
    assert len(rules) == len(set(session.rows.groups))


def test_only_the_three_bases_are_kept_row_by_row(run):
    """Predictions are kept of the bases under the first compared prompt, once for each row."""
    session = run()
    kept = [r for r in session.records if isinstance(r, Prediction)]
    found = [(p.system, p.prompt, p.row_id) for p in kept]
    assert len(found) == len(set(found)) == 3 * len(session.rows)
    assert {prompt for _, prompt, _ in found} == {"v2"}


@pytest.mark.parametrize(
    "roles",
    [
        ("suspect", "reference", "speaking_base", "ignorant_base"),
        ("reference", "ignorant_base"),
    ],
)
def test_a_missing_role_leaves_no_key_out(run, roles):
    """Whichever roles are missing, every key is recorded, as not available with the reason."""
    kinds = (Measure, Verdict, Table)
    complete, session = run(), run(without(*roles))
    keys = [
        {(r.kind, r.key) for r in some.records if isinstance(r, kinds)}
        for some in (complete, session)
    ]
    assert keys[0] == keys[1]
    decided = recorded(session, Verdict)
    for role in roles:
        statement = "v2.constant" if role.endswith("base") else "disabled_is_base"
        verdict = decided[f"controls.{role}.{statement}"]
        assert (verdict.verdict, verdict.because) == ("not available", f"no {role} here")
    session.finish()


@pytest.mark.parametrize(
    ("labels", "reason"),
    [(None, "the rows came without labels"), ([1] * 8, "the labels hold one class alone")],
)
def test_without_two_classes_nothing_is_ranked(run, labels, reason):
    """Without labels of both classes all that needs them cannot be told, and the rest is."""
    truth = None if labels is None else np.array(labels)

    def relabel(session):
        session.rows = dataclasses.replace(session.rows, labels=truth)

    session = run(relabel)
    measures, decided = recorded(session, Measure), recorded(session, Verdict)
    assert {m.value for key, m in measures.items() if ".auc" in key or ".gain" in key} == {None}
    for key in ("base.v2.knowing", "shuffled.v2.costs_order", "suspect.v2.says_better"):
        verdict = decided[f"controls.{key}"]
        assert (verdict.verdict, verdict.because) == ("cannot tell", reason)
    assert measures["controls.shuffled.v2.odds_change"].value is not None
    assert measures["controls.suspect.v2.kl"].value > 0
    session.finish()


def test_a_single_row_has_no_other_post(run):
    """One row cannot trade its post; that is said, and the examples are still exchanged."""

    def shorten(session):
        session.rows = session.rows.head(1)

    session = run(shorten)
    decided, measures = recorded(session, Verdict), recorded(session, Measure)
    assert measures["controls.shuffled.v2.rows"].value == 0
    for statement in ALTERED:
        verdict = decided[f"controls.shuffled.v2.{statement}"]
        assert (verdict.verdict, verdict.because) == ("cannot tell", "it alters no row here")
    assert measures["controls.examples_swapped.odds_change"].n == 1
    assert decided["controls.examples_swapped.moves_odds"].verdict == "cannot tell"
    session.finish()
