from pathlib import Path

import pytest

from postmortem.diagnosis.battery import TESTS
from postmortem.models.model_set import Member
from tools import cause_profiles as module
from tools.cause_profiles import (
    OWN_RECIPES,
    PLANTED,
    STAGES,
    extra_recipes,
    replay_stages,
    train_extra,
    with_choices,
)
from tools.embedded_world import RECIPES


@pytest.fixture
def site(session, monkeypatch):
    """The untrained world's session, with an adapter in place of each that would be trained."""
    session.case = with_choices(session.case)
    session.rows = session.rows.head(8)
    names = [*RECIPES, *OWN_RECIPES, *(name for _, name, _ in extra_recipes())]
    for lineage in ("silent", "speaking", "sibling", "donor"):
        for seed, role in enumerate(("reference", "suspect")):
            role = "donor_adapter" if lineage == "donor" else role
            folder = session.world.path(role)
            for name in names:
                member = Member(role=name, path=str(folder), digest="0")
                session.world.replays[f"{lineage}/{name}_{seed}"] = member
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(module, "SEEDS", 1)
    return session


@pytest.mark.slow
@pytest.mark.parametrize("name", ["number", "label"])
def test_every_cause_is_planted_and_met_with_every_experiment(site, monkeypatch, name):
    """Each cause has replays on a stage, all of whose outcomes are known to the experiments."""
    monkeypatch.setattr(module, "STAGES", {name: STAGES[name]})
    replays = replay_stages(site, report=lambda line: None)
    numeric = {cause for cause, planted in PLANTED.items() if planted.numeric}
    assert {r.cause for r in replays} == set(PLANTED) - (set() if name == "number" else numeric)
    assert len({replay.key for replay in replays}) == len(replays)
    for replay in replays:
        assert {"inspect", "load", "base-alone"} <= replay.outcomes.keys()
        for test, outcome in replay.outcomes.items():
            assert outcome in TESTS[test].outcomes
    found = {replay.cause: replay.outcomes for replay in replays}
    assert found["zero-b"]["effect"] == "none"
    assert found["other-shapes"]["load"] == "raises"
    assert found["base-overwritten"]["off"] == "is not the base"
    assert found["healthy"]["off"] == "is the base"


def test_adapters_that_the_world_lacks_are_trained_once(site, tmp_path, monkeypatch):
    """Each further training is entered in the world, and is not done again where it is there."""
    trained = []

    def train(case, base, *, folder, **_):
        Path(folder).mkdir(parents=True)
        trained.append(folder)

    monkeypatch.setattr(module, "train_adapter", train)
    train_extra(site, tmp_path)
    train_extra(site, tmp_path)
    assert len(trained) == len(set(trained)) == len([*extra_recipes()])
    assert site.world.replays["silent/choice_0"].path == str(tmp_path / "silent" / "choice_0")
