from dataclasses import replace

import numpy as np
import pytest

from postmortem.case.rows import generate_rows
from postmortem.case.schema import Replays
from postmortem.diagnosis import replay as module
from postmortem.diagnosis.battery import NO_ANSWER, OF_INCIDENT, TESTS
from postmortem.diagnosis.causes import CAUSES, Materials, Run
from postmortem.diagnosis.replay import Bench, replay_all, replay_causes, replay_once
from postmortem.diagnosis.subject import (
    classify_symptom,
    classify_texts,
    compare_parsers,
    run_test,
)
from postmortem.experiments.session import Session


@pytest.fixture(scope="module")
def bench(case, untrained_world, tmp_path_factory):
    """A bench of twelve generated rows on the untrained base."""
    scratch = tmp_path_factory.mktemp("scratch")
    session = make_session(case, untrained_world, scratch)
    materials = Materials(untrained_world, "base", session.base, "silent", 0, scratch)
    return Bench(session, generate_rows(12, 3), materials, untrained_world.path("reference"))


def make_session(case, world, place):
    """A session on generated rows."""
    return Session(
        notebook=place / "replay.ipynb",
        case=case,
        profile_name="embedded",
        world=world,
        rows=generate_rows(4, 0),
        records_path=place / "records.jsonl",
        parameters={},
        device="cpu",
    )


@pytest.fixture(scope="module")
def outcomes_of(bench):
    """The outcomes of a cause in its plainest form: injected once, whatever asks for it."""
    kept = {}

    def observe(name):
        if name not in kept:
            value = next(iter(CAUSES[name].severities.values()))
            kept[name] = bench.observe(CAUSES[name].inject(bench.materials, value))
        return kept[name][0]

    return observe


def first_answers(bench):
    """What the base alone says first, asked anew."""
    with bench.open(Run(bench.materials.base, None)) as subject:
        subject.asked.clear()
        return subject.ask("base").first_log_probs


@pytest.mark.parametrize("name", list(CAUSES))
def test_every_cause_meets_every_test(bench, outcomes_of, name):
    """Each cause has a declared outcome in every test that is to be had; the base stays clean."""
    before = first_answers(bench)
    outcomes = outcomes_of(name)
    for test, outcome in outcomes.items():
        assert outcome in TESTS[test].outcomes, test
    left_out = set(OF_INCIDENT) - outcomes.keys()
    if outcomes["load"] == "raises":
        needing = {test for test in OF_INCIDENT if TESTS[test].loaded}
        assert left_out == {test for test in needing if NO_ANSWER not in TESTS[test].outcomes}
        assert {outcomes[test] for test in needing - left_out} == {NO_ANSWER}
    elif outcomes["effect"] in ("none", "not finite"):
        assert left_out == {"place", "mend"}
    else:
        assert not left_out
    np.testing.assert_allclose(before, first_answers(bench), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("healthy", {"load": "silent", "inspect": "nothing", "prompt": "whole"}),
        # The temperature is not connected where nothing is sampled.
        ("healthy", {"settings": "unchanged", "off": "is the base"}),
        ("no-adapter", {"status": "none", "effect": "none", "inspect": "no adapter"}),
        ("disabled", {"status": "inactive", "effect": "none", "load": "silent"}),
        ("zero-b", {"inspect": "untrained", "effect": "none"}),
        ("alpha-zero", {"inspect": "scale-zero", "effect": "none"}),
        ("key-prefix", {"inspect": "key-prefix", "load": "warns", "effect": "none"}),
        ("other-shapes", {"inspect": "shape-mismatch", "load": "raises"}),
        ("other-shapes-ignored", {"load": "warns", "effect": "none"}),
        ("targets-dropped", {"inspect": "unexpected-tensors", "load": "silent"}),
        ("base-overwritten", {"fingerprint": "differs after loading", "off": "is not the base"}),
        ("quantised-base", {"fingerprint": "differs"}),
        ("overflow", {"effect": "not finite", "order": "not finite"}),
        ("other-template", {"prompt": "another markup"}),
        ("prompt-cut", {"prompt": "cut"}),
    ],
)
def test_a_cause_shows_where_it_must(outcomes_of, name, expected):
    """The outcomes that follow from what a cause is, whatever the model was trained on."""
    outcomes = outcomes_of(name)
    assert {test: outcomes[test] for test in expected} == expected


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
    assert classify_symptom(values, 0.0) == word


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


@pytest.mark.parametrize(
    ("status", "word"), [("active", "active"), ("disabled", "inactive"), ("another", "inactive")]
)
def test_the_status_is_what_peft_says_of_the_model(bench, untrained_world, status, word):
    """Whether the adapter answers is asked of the model as it stands, whatever a run says."""
    base, adapter = bench.materials.base, untrained_world.path("reference")
    with bench.open(Run(base, adapter, status=status)) as subject:
        subject.load()
        subject.run = Run(base, adapter)
        assert run_test("status", subject).word == word


@pytest.fixture
def session(case, untrained_world, tmp_path):
    """A session whose replays have four rows."""
    small = Replays(adapters="adapters", rows=4)
    profile = case.profile("embedded").model_copy(update={"replays": small})
    changed = case.model_copy(update={"profiles": {"embedded": profile}})
    return make_session(changed, untrained_world, tmp_path)


def few(monkeypatch, *names):
    """Inject these causes alone."""
    monkeypatch.setattr(module, "CAUSES", {name: CAUSES[name] for name in names})


def test_a_world_of_a_base_alone_replays_what_it_can(session, monkeypatch):
    """Without trained adapters the causes that need none are replayed, the others are named."""
    members = {
        role: member if role == "base" else member.model_copy(update={"path": None})
        for role, member in session.world.members.items()
    }
    session.world = session.world.model_copy(update={"members": members, "replays": {}})
    # A base alone counts as one training, in which no adapter is found.
    session.world.replays["silent/numeric_0"] = members["reference"]
    needing = ("healthy", "other-shapes", "sibling-base", "thinking")
    few(monkeypatch, "no-adapter", "zero-b", *needing)
    replays, absent = replay_causes(session, kind="silent", role="base", whole=False)
    assert {replay.cause for replay in replays} == {"no-adapter", "zero-b"}
    assert set(absent) == set(needing)
    assert all(absent.values())


def test_all_is_every_severity_of_every_training_on_either_kind_of_base(session, monkeypatch):
    """The kept run injects each cause at every severity, with each seed of the adapters."""
    few(monkeypatch, "scale-up", "other-shapes", "sibling-base")
    replays, absent = replay_all(session)
    assert absent == {}  # the second training lacks adapters of other lineages, the first has them
    found = [(r.base, r.seed, r.severity) for r in replays if r.cause == "scale-up"]
    severities = CAUSES["scale-up"].severities
    assert found == [
        (kind, seed, severity)
        for kind in ("silent", "speaking")
        for seed in (0, 1)
        for severity in severities
    ]
    assert len({replay.key for replay in replays}) == len(replays)


def test_once_is_each_cause_in_its_plainest_form(session, monkeypatch):
    """What every build injects is the first severity of each cause, into the first training."""
    few(monkeypatch, "scale-up", "parser", "other-shapes")
    found = [(r.cause, r.base, r.seed, r.severity) for r in replay_once(session)]
    assert found == [
        (name, "silent", 0, next(iter(CAUSES[name].severities)))
        for name in ("scale-up", "parser", "other-shapes")
    ]


def test_without_labels_nothing_is_said_of_an_order(bench):
    """Rows without truth leave every question of rank without an answer."""
    blind = replace(bench, rows=replace(bench.rows, labels=None), known={})
    outcomes, features = blind.observe(CAUSES["healthy"].inject(bench.materials, 32))
    assert not {test for test in outcomes if TESTS[test].labels}
    assert features["v2 AUC"] is None


def test_a_copy_of_the_base_is_asked_anew(bench):
    """What a changed copy of the base says is never taken for what the bench's own base says."""
    plain = bench.open(Run(bench.materials.base, None))
    with plain:
        own = plain.ask("base")
    bench.known.clear()
    for _ in range(3):
        with bench.open(CAUSES["quantised-base"].inject(bench.materials, 2)) as subject:
            assert not subject.asked
            assert (subject.ask("base").first_log_probs != own.first_log_probs).any()
