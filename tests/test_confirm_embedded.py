"""What is shipped of the embedded world, confirmed: a sample of its answers asked again.

Only a sample, so that it takes seconds: every base and an adapter of each lineage, a handful of the
causes, and a few adapters of each kept notebook.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import EMBEDDED, ROOT

from postmortem.case.rows import choose_rows, generate_rows
from postmortem.diagnosis.causes import CAUSES, Materials
from postmortem.diagnosis.likelihoods import read_profiles
from postmortem.diagnosis.replay import _replay_cause, make_bench
from postmortem.experiments.records import (
    Measure,
    Prediction,
    Replay,
    Table,
    compare_answers,
    read_records,
)
from postmortem.experiments.session import Session
from postmortem.models.loading import load_base
from postmortem.models.model_set import role_name
from postmortem.suite.attribution import attribute_adapter, format_gain
from postmortem.suite.scoring import Scorer
from tools import cause_profiles, train_world
from tools.attribution import list_world_adapters, world_texts
from tools.suite_chapter import COLUMNS, PROMPT, world_adapters

ADAPTERS = (
    "silent/suspect",
    "silent/numeric_0",
    "silent/no_op",
    "speaking/numeric_0",
    "sibling/numeric_0",
    "donor/numeric_0",
)
# Rounding on another machine moves no estimate of 200 rows by more.
NEAR = 2e-3


@pytest.fixture(scope="module")
def ask(case, shipped_world, tmp_path_factory):
    """A session on the shipped world, as the kept notebooks have it."""
    return Session(
        notebook=Path("confirm.ipynb"),
        case=case,
        profile_name="embedded",
        world=shipped_world,
        rows=choose_rows(case, "embedded"),
        records_path=tmp_path_factory.mktemp("confirm") / "confirm.jsonl",
        parameters={},
        device="cpu",
    )


def measures_of(name):
    """The measures of a kept record by key."""
    return {record.key: record for record in read_records(EMBEDDED / name).of(Measure)}


def rows_of(name, key):
    """A table of a kept record, each row by column."""
    table = next(t for t in read_records(EMBEDDED / name).of(Table) if t.key == key)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_models_answer_as_when_they_were_trained(tmp_path, monkeypatch):
    """Every base, and an adapter of each lineage, gives the answers on the training's record."""
    rows = 2
    monkeypatch.setattr(train_world, "ROWS", rows)
    (tmp_path / "world").mkdir()
    (tmp_path / "world/bases").symlink_to(EMBEDDED / "bases")
    for name in ADAPTERS:
        place = tmp_path / "world/adapters" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(EMBEDDED / "adapters" / name)
    again = train_world.record_world(
        ROOT / "cases/qwen-lora.yml",
        seed=0,
        folder=tmp_path / "world",
        out=tmp_path / "world.jsonl",
    )
    kept = read_records(EMBEDDED / "world.jsonl")
    found = compare_answers(kept.of(Prediction), again.of(Prediction))
    assert found.alike, found.first
    bases = len([*(EMBEDDED / "bases").iterdir()])
    assert found.answers == rows * (bases * len(train_world.BASE_PROMPTS) + len(ADAPTERS))


@pytest.fixture(scope="module")
def bench(ask, tmp_path_factory):
    """The bench of the first training's replays on the base that stays silent."""
    scratch = tmp_path_factory.mktemp("replays")
    materials = Materials(ask.world, "base", ask.base, "silent", 0, scratch)
    trained = sum(name.startswith("silent/numeric_") for name in ask.world.replays)
    return make_bench(ask, materials, trainings=trained)


@pytest.mark.parametrize(
    "name",
    ["healthy", "zero-b", "other-shapes", "truncated", "scale-up", "rslora-lost", "parser"],
)
def test_a_cause_shows_what_is_on_record(bench, name):
    """A cause injected again has every outcome and feature of the kept replay."""
    kept = {r.key: r for r in read_records(EMBEDDED / "replays/0.jsonl").of(Replay)}
    [again] = _replay_cause(name, CAUSES[name], bench=bench, whole=False)
    on_record = kept[again.key]
    assert again.outcomes == on_record.outcomes
    assert again.features == pytest.approx(on_record.features)


def test_the_suite_scores_adapters_as_on_record(ask):
    """Adapters of the kept suite rank, vary and move the base as their rows in its table say."""
    attempt = ask.case.attempts[PROMPT]
    scorer = Scorer(
        lambda: load_base(ask.world.path("base"), device="cpu"),
        folder=ask.world.path("base"),
        rows=ask.rows,
        prompts={PROMPT: ask.case.prompts[PROMPT]},
        max_new_tokens=attempt.decoding.max_new_tokens,
        max_prompt_tokens=attempt.decoding.max_prompt_tokens,
    )
    measures, folders = measures_of("suite.jsonl"), world_adapters(ask.world)
    table = {row[COLUMNS[0]]: row for row in rows_of("suite.jsonl", "suite.adapters")}
    scored = {"base alone": scorer.score_base()}
    for name in ("suspect", "yes no long 1", "numeric 1, sibling's"):
        scored[name] = scorer.score(name, folders[name])
        reading = scored[name].readings[PROMPT]
        assert reading.std == pytest.approx(table[name]["standard deviation"], abs=NEAR)
        assert reading.effect == pytest.approx(table[name]["effect in nat"], abs=NEAR)
    for name, found in scored.items():
        auc, on_record = found.readings[PROMPT].auc, measures[f"suite.auc.{name}"]
        for end in ("value", "low", "high", "n"):
            assert getattr(auc, end) == pytest.approx(getattr(on_record, end), abs=NEAR), name


def test_an_adapter_is_given_to_its_base_as_on_record(ask):
    """The sibling's adapter gains on its own base and on the world's what is on record."""
    one = next(asked for asked in list_world_adapters(ask) if asked.title == "sibling's adapter")
    bases = {role_name(role): ask.world.path(role) for role in ("sibling_base", "base")}
    found = attribute_adapter(
        one.folder, bases, segments=world_texts(ask, one.recipe), device="cpu"
    )
    answers = {r["adapter"]: r["answer"] for r in rows_of("attribution.jsonl", "membership.world")}
    assert found.remain == (one.base,) == (answers[one.title],)
    gains = {
        row["base"]: row["gain"]
        for row in rows_of("attribution.jsonl", "membership.world_bases")
        if row["adapter"] == one.title
    }
    assert {judged.name: format_gain(judged.gain) for judged in found.judged} == {
        name: gains[name] for name in bases
    }


def test_what_diagnose_knows_of_causes_is_what_they_show(ask, monkeypatch, tmp_path):
    """Causes planted again on the shipped world have the outcomes that ship with `diagnose`."""
    planted = {
        name: replace(one, severities=dict([*one.severities.items()][:1]))
        for name, one in cause_profiles.PLANTED.items()
        if name in ("healthy", "alpha-zero", "scale-up")
    }
    monkeypatch.setattr(cause_profiles, "PLANTED", planted)
    session = replace(ask, case=cause_profiles.with_choices(ask.case), records=[])
    stage = cause_profiles.STAGES["number"]
    parts = (session.world, stage.role, session.base, stage.lineage, 0, tmp_path)
    site = cause_profiles.Site(stage, Materials(*parts, sound=stage.sound))
    rows = generate_rows(
        cause_profiles.ROWS, cause_profiles.FIRST_SEED, columns=session.case.columns
    )
    kept = {replay.key: replay for replay in read_profiles().of(Replay)}
    found = list(cause_profiles._replay_site(session, site, name="number", rows=rows))
    assert len(found) == 2 * len(planted)  # on the labels as they are, and drawn anew
    for again in found:
        assert again.outcomes == kept[again.key].outcomes
        assert again.features == kept[again.key].features
