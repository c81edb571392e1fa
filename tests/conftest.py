"""Models for tests: an untrained world, made in seconds, and the world that is shipped."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from postmortem.case.load import load_case
from postmortem.case.schema import Case

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "results" / "embedded"
# As many threads as there are workers' cores: one each. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What takes longest starts first, and beside it what mostly waits for a scheduler.
FIRST = ("test_end_to_end.py", "test_own_site.py")
# Neither a deadline nor the check for slow draws: both read the clock. Where a fixture is of one
# test, each example overwrites what the one before it wrote.
UNHURRIED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("few", max_examples=20, **UNHURRIED)
settings.register_profile("many", max_examples=300, **UNHURRIED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put these files first; the rest keep their order."""
    items.sort(key=lambda item: (*FIRST, item.path.name).index(item.path.name))


@pytest.fixture(scope="session")
def case() -> Case:
    """The shipped case."""
    return load_case(ROOT / "cases/qwen-lora.yml")


@pytest.fixture(scope="session")
def untrained(case, tmp_path_factory):
    """Folders of an untrained world by role: bases, sound adapters with random weights."""
    import torch

    from tools.embedded_world import BaseSpec, build_tokenizer, make_adapter, new_base

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    tokenizer = build_tokenizer(case, seed=0)
    shapes = {
        "base": BaseSpec(64, 2, 0),
        "donor_base": BaseSpec(80, 5, 1),
        "sibling_base": BaseSpec(64, 2, 2),
        "speaking_base": BaseSpec(64, 2, 3),
        "ignorant_base": BaseSpec(64, 2, 4),
    }
    for role, spec in shapes.items():
        new_base(spec, seed=0, vocabulary=len(tokenizer)).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    adapters = {
        "suspect": "base",
        "reference": "base",
        "no_op": "base",
        "donor_adapter": "donor_base",
    }
    for seed, (role, on) in enumerate(adapters.items()):
        model = make_adapter(new_base(shapes[on], seed=0, vocabulary=len(tokenizer)), seed=seed)
        if role != "no_op":
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / role)
    return folder


@pytest.fixture(scope="session")
def untrained_world(case, untrained):
    """The untrained folders as a world."""
    from postmortem.models.model_set import ADAPTERS, BASES, World, _member
    from tools.embedded_world import RECIPES

    members = {role: _member(role, untrained / role) for role in (*BASES, *ADAPTERS)}
    stand_ins = {"donor/numeric_0": "donor_adapter", "sibling/numeric_0": "suspect"}
    for kind in ("silent", "speaking"):
        stand_ins |= {f"{kind}/{recipe}_0": "reference" for recipe in RECIPES}
        stand_ins[f"{kind}/numeric_1"] = "suspect"
    replays = {name: _member(name, untrained / role) for name, role in stand_ins.items()}
    return World(
        case=case.name,
        profile="embedded",
        caveat="None.",
        seed=0,
        members=members,
        replays=replays,
    )


@pytest.fixture(scope="session")
def shipped_world(case):
    """The embedded world as it is shipped."""
    from postmortem.models.model_set import resolve_world

    return resolve_world(case, "embedded", trained=str(EMBEDDED))


@pytest.fixture
def session(untrained_world, tmp_path):
    """A session on eight generated rows of the untrained world."""
    from chapters import parameters_of

    from postmortem.experiments.session import open_session
    from postmortem.models.model_set import write_world

    write_world(untrained_world, tmp_path / "world.json")
    return open_session(parameters_of("attempt", tmp_path, rows=8))
