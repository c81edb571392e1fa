import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from postmortem.checker.checks import inspect_adapter
from postmortem.models.changes import edit_config
from tools.planted import (
    EACH,
    FAULTS,
    SOUND,
    TRAININGS,
    disturb,
    list_candidates,
    list_faults,
    mix,
    teach_inverted_number,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def update_of(folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        for name in tensors
        if "lora_A" in name
    }


def test_there_are_more_candidates_than_sound_adapters_asked_for():
    """Some candidates may be rejected; no two have one name, and the trainings come first."""
    names = [name for name, *_ in list_candidates([Path(str(n)) for n in range(TRAININGS)])]
    assert len(set(names)) == len(names) > SOUND
    assert all(name.startswith("trained") for name in names[:TRAININGS])


@pytest.mark.parametrize("sources", [1, TRAININGS])
def test_forty_faults_of_eight_kinds(sources):
    """There are as many faults of each kind, however many trainings succeeded."""
    found = list_faults([Path(str(n)) for n in range(sources)], [Path("i"), Path("j")])
    kinds = Counter(name.rpartition("-")[0] for name, *_ in found)
    assert kinds == dict.fromkeys([*FAULTS, "inverted-labels"], EACH)
    assert len(kinds) == 8


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_a_mean_is_exact(untrained, tmp_path, weight):
    """The mean of two adapters adds the weighted mean of what they add, at twice the rank."""
    first, second = untrained / "suspect", untrained / "reference"
    mixed = shutil.copytree(first, tmp_path / "mixed")
    mix(mixed, other=second, weight=weight)
    for name, found in update_of(mixed).items():
        expected = weight * update_of(first)[name] + (1 - weight) * update_of(second)[name]
        assert torch.allclose(found, expected, atol=1e-5)
    assert inspect_adapter(str(mixed), str(untrained / "base")).report.verdict == "fits"


def test_noise_is_a_share_of_the_spread_and_repeats(untrained, tmp_path):
    """Noise moves each tensor by its share, and the same seed gives the same bytes."""
    source = load_file(untrained / "suspect" / WEIGHTS)
    for name in ("a", "b"):
        disturb(shutil.copytree(untrained / "suspect", tmp_path / name), noise=0.1, seed=3)
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("a", "b"))
    assert first == second
    for name, tensor in load_file(tmp_path / "a" / WEIGHTS).items():
        share = (tensor - source[name]).std() / source[name].std()
        assert 0.07 < share < 0.13


FOUND = {
    "zero-b": "untrained",
    "key-prefix": "key-prefix",
    "other-shapes": "shape-mismatch",
    "nan": "non-finite",
    "truncated": "corrupt-weights",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_what_its_name_says(untrained, tmp_path, kind):
    """Five kinds are seen in the files alone; the others fit, and only running shows them."""
    folder = shutil.copytree(untrained / "suspect", tmp_path / kind)
    edit_config(folder, base_model_name_or_path="base")
    FAULTS[kind](folder)
    report = inspect_adapter(str(folder), str(untrained / "base")).report
    errors = [finding.id for finding in report.findings if finding.severity == "error"]
    assert errors == ([FOUND[kind]] if kind in FOUND else [])


def test_an_inverted_teacher_is_always_wrong():
    """Exchanged labels give high numbers to what is no violation, whatever the draw."""
    source = random.Random(0)
    assert all(float(teach_inverted_number(source, 1)) < 0.5 for _ in range(20))
    assert all(float(teach_inverted_number(source, 0)) > 0.5 for _ in range(20))
