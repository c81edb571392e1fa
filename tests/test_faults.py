from pathlib import Path
from typing import Any

import pytest

from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import catalogue
from tools.faults import (
    FAULTS,
    TINY,
    Fault,
    inject,
    reproduce,
    save_adapter,
    save_base,
)


@pytest.fixture(scope="session")
def sound_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A base and a sound adapter of every tiny architecture."""
    root = tmp_path_factory.mktemp("sound")
    bases = {name: save_base(root / name / "base", name) for name in TINY}
    return {
        name: (base, save_adapter(base, root / name / "adapter")) for name, base in bases.items()
    }


def pairs() -> list[Any]:
    """Every fault on every architecture; in a fast run each fault on one, which takes turns."""
    return [
        pytest.param(
            fault,
            model_type,
            id=f"{fault.finding}: {fault.name}-{model_type}",
            marks=() if fault.only or number % len(TINY) == place else pytest.mark.slow,
        )
        for number, fault in enumerate(FAULTS)
        for place, model_type in enumerate(TINY)
        if fault.only in ("", model_type)
    ]


@pytest.mark.parametrize(("fault", "model_type"), pairs())
def test_fault_is_caught_under_its_id(
    fault: Fault, model_type: str, sound_adapters: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Every injected fault is found under its own id, on every architecture that can have it."""
    base, sound = sound_adapters[model_type]
    broken = inject(fault, sound, tmp_path / "adapter")
    report = inspect_adapter(str(broken), str(base), serving=fault.serving).report
    found = {f.id: f for f in reversed(report.findings)}
    assert fault.finding in found, report.findings
    assert found[fault.finding].severity == catalogue()[fault.finding].severity
    # A pickle that is too small is two facts; every other fault has one cause and one finding.
    # What a runtime makes of an architecture that it does not serve is beside the point.
    of_peft = [f for f in report.findings if not f.id.startswith("serving-")]
    one_or_two = 2 if fault.name == "a pickle of 443 bytes" else 1
    assert len(of_peft) == (0 if fault.runtime else one_or_two)


def test_every_id_of_the_catalogue_has_a_reproduction() -> None:
    """No entry of the catalogue rests on prose alone."""
    assert set(catalogue()) == {fault.finding for fault in FAULTS}


@pytest.mark.filterwarnings("ignore")  # PEFT's own warnings are what is being recorded.
def test_reproduction_records_what_peft_does(tmp_path: Path) -> None:
    """A reproduction tells whether PEFT raises, warns or keeps silent, and what we find."""
    wanted = {"r doubled in the config", "prefix lost", "a deeper base", "alpha 0"}
    rows = reproduce(tmp_path, [fault for fault in FAULTS if fault.name in wanted])
    reactions = {row.fault: (row.reaction, row.severity) for row in rows}
    assert reactions == {
        "r doubled in the config": ("raises", "error"),
        "prefix lost": ("warns", "error"),
        "a deeper base": ("silent", "error"),
        "alpha 0": ("silent", "error"),
    }
