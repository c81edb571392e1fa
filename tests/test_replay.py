from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case import Replays
from postmortem.causes import CAUSES, Materials, Run
from postmortem.corpus import generate_rows
from postmortem.models import attached, load_base
from postmortem.records import Replay, Table, Verdict
from postmortem.replay import (
    FEATURES,
    TESTS,
    Bench,
    _turned,
    classify_texts,
    classify_values,
    compare_parsers,
    observe,
    record_replays,
    replay_all,
    symptom_of,
)
from postmortem.session import Session


@pytest.fixture(scope="module")
def bench(case, untrained_world, tmp_path_factory):
    """A bench of six generated rows on the untrained base."""
    base = load_base(untrained_world.path("base"), device="cpu")
    scratch = tmp_path_factory.mktemp("scratch")
    materials = Materials(untrained_world, "base", base, "silent", 0, scratch)
    reference = untrained_world.path("reference")
    return Bench(case, generate_rows(6, 3), materials, reference, case.attempts)


@pytest.mark.parametrize("name", list(CAUSES))
def test_every_cause_meets_every_test(bench, name):
    """Each cause has one of the declared outcomes in every test, and leaves the base clean."""
    cause = CAUSES[name]
    before = bench.ask(bench.materials.base.model, "yes_no", Run(bench.materials.base, None))
    seen = observe(cause.inject(bench.materials, next(iter(cause.severities.values()))), bench)
    assert seen.outcomes.keys() == TESTS.keys()
    for test, outcome in seen.outcomes.items():
        assert outcome in TESTS[test].outcomes, test
    after = bench.ask(bench.materials.base.model, "yes_no", Run(bench.materials.base, None))
    np.testing.assert_allclose(before.first_log_probs, after.first_log_probs, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("healthy", {"load": "silent", "inspect": "nothing", "prompt": "whole"}),
        ("no-adapter", {"status": "none", "effect": "none", "inspect": "no adapter"}),
        ("disabled", {"status": "disabled", "effect": "none", "load": "silent"}),
        ("zero-b", {"inspect": "untrained", "effect": "none", "home": "no effect"}),
        ("alpha-zero", {"inspect": "scale-zero", "effect": "none", "scale": "no effect"}),
        ("key-prefix", {"inspect": "key-prefix", "load": "warns", "effect": "none"}),
        ("other-shapes", {"inspect": "shape-mismatch", "load": "raises", "v2": "no answer"}),
        ("other-shapes-ignored", {"load": "warns", "effect": "none"}),
        ("targets-dropped", {"inspect": "unexpected-tensors", "load": "silent"}),
        ("base-overwritten", {"fingerprint": "differs after loading"}),
        ("quantised-base", {"fingerprint": "differs"}),
        ("overflow", {"finite": "not finite", "effect": "not finite"}),
        ("other-template", {"prompt": "another markup"}),
        ("prompt-cut", {"prompt": "cut"}),
    ],
)
def test_a_cause_shows_where_it_must(bench, name, expected):
    """The outcomes that follow from what a cause is, whatever the model was trained on."""
    cause = CAUSES[name]
    seen = observe(cause.inject(bench.materials, next(iter(cause.severities.values()))), bench)
    assert {test: seen.outcomes[test] for test in expected} == expected


def test_settings_change_nothing_in_greedy_decoding(bench):
    """The temperature is not connected where nothing is sampled."""
    run = CAUSES["healthy"].inject(bench.materials, 32)
    assert observe(run, bench).outcomes["settings"] == "unchanged"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([0.0] * 5, "all 0.0"),
        ([0.5] * 5, "one other value"),
        ([0.0] * 8 + [0.5], "mostly one value"),
        ([0.1, 0.2, 0.3, 0.1], "varies"),
        ([0.0], "all 0.0"),
    ],
)
def test_values_are_named_by_how_they_vary(values, word):
    """One value, mostly one value, or values that vary."""
    assert classify_values(values, 0.0) == word


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("0.0", "a decimal"),
        (" .5", "a decimal"),
        ("1", "a bare digit"),
        ("<think>\nOkay", "a tag"),
        ("", "nothing"),
        ("Yes", "a word"),
        ("0.0\n\nBecause", "a word"),
        ("\u096a", "a bare digit"),
        ("\U0001f600", "a word"),
    ],
)
def test_texts_are_named_by_what_they_are(text, kind):
    """The kind of most texts is the kind of all where they agree."""
    assert classify_texts([text] * 3) == kind


def test_parsers_are_held_against_each_other():
    """A value that a strict parser reads otherwise is a disagreement; no number is none."""
    assert compare_parsers(["0.8", "0.1"], [0.8, 0.1]) == "agree"
    assert compare_parsers(["0.8", "0.1"], [0.0, 0.1]) == "disagree"
    assert compare_parsers(["Yes", "No", "0.1"], [0.8, 0.2, 0.1]) == "no number"


def test_turning_layers_is_undone_even_by_an_error(bench, untrained_world):
    """The LoRA weights stand in their places again after the block, however it ends."""
    with attached(bench.materials.base, untrained_world.path("reference")) as loaded:
        weights = {n: p.data.clone() for n, p in loaded.model.named_parameters() if "lora_" in n}
        moved = {}
        with suppress(KeyError), _turned(loaded.model):
            moved |= {n: p.data for n, p in loaded.model.named_parameters() if "lora_" in n}
            raise KeyError
        assert any(not torch.equal(weights[n], moved[n]) for n in weights)
        for name, parameter in loaded.model.named_parameters():
            if name in weights:
                assert torch.equal(weights[name], parameter.data)


@given(st.floats(0, 1), st.integers(1, 9), st.floats(0, 1), st.one_of(st.none(), st.floats(0, 1)))
def test_the_whole_symptom_needs_every_part(case, parsed, distinct, value, auc):
    """A replay shows the whole v2 symptom exactly when each part is the incident's."""
    features = {
        "loads": True,
        "no missing keys": True,
        "v1 parse rate": 0.5,
        "v1 distinct": 1,
        "v1 value": 0.0,
        "v2 parse rate": parsed,
        "v2 distinct": distinct,
        "v2 value": value,
        "v2 AUC": auc,
    }
    replay = Replay(
        key="k", cause="c", base="silent", seed=0, severity="-", outcomes={}, features=features
    )
    shown = symptom_of(replay, case)
    assert shown.keys() == FEATURES.keys()
    whole = all(word is not False for word in shown.values())
    assert whole == (parsed == 1 and distinct == 1 and value == 0 and auc in (None, 0.5))


@pytest.fixture
def session(case, untrained_world, tmp_path):
    """A session of four rows with one replay of each cause."""
    small = Replays(seeds=1, severities=1, rows=4)
    profile = case.profile("embedded").model_copy(update={"replays": small})
    small_case = case.model_copy(update={"profiles": {"embedded": profile}})
    return Session(
        notebook=tmp_path / "07_replay.ipynb",
        case=small_case,
        profile_name="embedded",
        world=untrained_world,
        rows=generate_rows(4, 0),
        records_path=tmp_path / "records.jsonl",
        parameters={},
        device="cpu",
    )


def test_a_world_of_a_base_alone_replays_what_it_can(session):
    """Without trained adapters the causes that need none are replayed, the others are named."""
    members = {
        role: member if role == "base" else member.model_copy(update={"path": None})
        for role, member in session.world.members.items()
    }
    bare = session.world.model_copy(update={"members": members, "replays": {}})
    session.world = bare
    replays, absent = replay_all(session)
    done = {replay.cause for replay in replays}
    assert {"no-adapter", "zero-b"} <= done
    assert done.isdisjoint(absent)
    assert done | set(absent) == set(CAUSES)
    record_replays(session, replays, absent)
    table = next(r for r in session.records if isinstance(r, Table) and r.key == "replay.absent")
    assert {row[0] for row in table.rows} == set(absent)
    words = {r.key: r.verdict for r in session.records if isinstance(r, Verdict)}
    assert {n for n in CAUSES if words[f"replay.{n}.reproduces"] == "not available"} == set(absent)


def test_the_matrix_has_a_row_for_each_cause_and_kind(session):
    """Every cause on every kind of base has its row, its verdict, and shares between 0 and 1."""
    replays, absent = replay_all(session)
    assert absent == {}
    record_replays(session, replays, absent)
    table = next(r for r in session.records if isinstance(r, Table) and r.key == "replay.matrix")
    assert len(table.rows) == 2 * len(CAUSES)
    for row in table.rows:
        assert all(0 <= share <= 1 for share in row[4 : 4 + len(FEATURES)])
    keys = {r.key for r in session.records if isinstance(r, Verdict)}
    named = {f"replay.{name}.reproduces" for name in CAUSES}
    assert keys == named | {"replay.sound_counts_as_parsed"}


def test_without_labels_nothing_is_said_of_an_order(bench):
    """Rows without truth leave every question of rank without an answer."""
    rows = bench.rows
    unknown = type(rows)(rows.source, rows.frame, rows.ids, rows.groups, None)
    blind = Bench(bench.case, unknown, bench.materials, bench.reference, bench.attempts)
    seen = observe(CAUSES["healthy"].inject(bench.materials, 32), blind)
    assert "reference" not in seen.outcomes
    for test in ("number-log-odds", "yes-no", "home"):
        assert seen.outcomes[test] == "no answer"
    assert seen.features["v2 AUC"] is None
