"""Changes of an adapter: of its files, of its tensors, and of the model that it is loaded into.

A change is a function of the LoRA tensors by name; the same ones serve copies of files and loaded
models. Causes are read where no model runs, so torch is imported where something is changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postmortem.checker.adapter import WEIGHTS_FILE
from postmortem.checker.config import CONFIG_FILE, layer_of, layer_zero

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
Change = Callable[[Tensors], Tensors]


class NothingToChange(Exception):
    """A change that would leave the adapter as it is; the message says why."""


def zero_b(tensors: Tensors) -> Tensors:
    """Every lora_B zero, as an adapter begins."""
    import torch

    return {k: torch.zeros_like(t) if _is_b(k) else t for k, t in tensors.items()}


def scale(factor: float) -> Change:
    """Every update scaled, by its lora_B."""
    return lambda tensors: {k: t * factor if _is_b(k) else t for k, t in tensors.items()}


def shift_layers(tensors: Tensors, *, by: int = 1) -> Tensors:
    """Each layer's LoRA tensors `by` adapted layers further on, the last ones' in the first places.

    Places of another shape keep their own. Raises `NothingToChange` where all stays as it is.
    """
    shifted, places = dict(tensors), dict[str, list[str]]()
    for name in sorted(tensors, key=lambda name: layer_of(name) or 0):
        if "lora_" in name and layer_of(name) is not None:
            places.setdefault(layer_zero(name), []).append(name)
    for names in places.values():
        for name, origin in zip(names, names[-by:] + names[:-by], strict=True):
            if tensors[name].shape == tensors[origin].shape:
                shifted[name] = tensors[origin]
    if all(shifted[name].equal(tensor) for name, tensor in tensors.items()):
        raise NothingToChange(
            "one layer alone is adapted, or all are equal: turning them changes nothing"
        )
    return shifted


def rotate(tensors: Tensors, *, seed: int) -> Tensors:
    """Each update turned at random on both sides: all its singular values stay, no direction does.

    B = U R with orthonormal columns U becomes V R with others drawn evenly, and A likewise.
    Convolutions, whose factors have more dimensions, are left as they are.
    """
    import torch

    source, rotated = torch.Generator().manual_seed(seed), dict(tensors)
    for name_a in sorted(tensors):
        name_b = name_a.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        if name_a != name_b and tensors[name_a].dim() == tensors[name_b].dim() == 2:
            rotated[name_a] = _turn(tensors[name_a].T, source).T
            rotated[name_b] = _turn(tensors[name_b], source)
    return rotated


def _turn(tall: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    import torch

    factor = torch.linalg.qr(tall.float()).R
    drawn = torch.randn(tall.shape[0], factor.shape[0], generator=source).to(tall.device)
    frame, signs = torch.linalg.qr(drawn)
    # Without the signs the frame would depend on how QR picks them, and not be even.
    return frame * torch.sign(torch.diagonal(signs)) @ factor


def _is_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


# The factor by which two of the changes scale the update.
FACTOR = 8
# What can be done to a copy of an adapter, by name, and what each is called on a page.
CHANGES: Mapping[str, Change] = {
    "zero_b": zero_b,
    "flipped": scale(-1.0),
    "shifted": shift_layers,
    "shifted_back": partial(shift_layers, by=-1),
    "rotated": partial(rotate, seed=0),
    "eighth": scale(1 / FACTOR),
    "eightfold": scale(FACTOR),
}
COPIES = {
    "zero_b": "lora_B zero",
    "flipped": "sign flipped",
    "shifted": "layers shifted",
    "shifted_back": "layers shifted back",
    "rotated": "turned at random",
    "eighth": f"scale ÷{FACTOR}",
    "eightfold": f"scale ×{FACTOR}",
}


def edit_config(folder: Path, *removed: str, **changes: object) -> None:
    """Rewrite the configuration with keys changed and removed."""
    path = folder / CONFIG_FILE
    config = {**json.loads(path.read_text()), **changes}
    kept = {k: v for k, v in config.items() if k not in removed}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True))


def edit_tensors(folder: Path, change: Change) -> None:
    """Rewrite the weights through a function of all tensors."""
    from safetensors.torch import load_file, save_file  # brings torch, which takes seconds

    path = folder / WEIGHTS_FILE
    changed = {k: v.contiguous().clone() for k, v in change(load_file(path)).items()}
    save_file(changed, path, metadata={"format": "pt"})


def copy_changed(adapter: Path, folder: Path, change: Change) -> Path:
    """A copy of an adapter's two files in a folder, changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter / name, folder / name)
    edit_tensors(folder, change)
    return folder


@contextmanager
def changed_in_memory(model: Any, change: Change) -> Iterator[None]:
    """Change the LoRA tensors of a loaded model for the length of a `with`."""
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    saved = {name: parameter.data for name, parameter in parameters.items()}
    _put(parameters, change(saved))
    try:
        yield
    finally:
        _put(parameters, saved)


def _put(parameters: Mapping[str, Any], tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        parameters[name].data = tensor


def each_control(model: Any, *, rotations: int) -> Iterator[str]:
    """Put each control in the adapter's place and give its title; in the end all is as it was.

    Each keeps the sizes of all updates and loses one thing that only training gives: which layer
    they belong to, their sign, or their direction. One that changes nothing is left out.
    """
    controls: dict[str, Change] = {
        "layers permuted": shift_layers,
        "sign of B flipped": scale(-1.0),
        **{f"rotated at random, {n + 1}": partial(rotate, seed=n) for n in range(rotations)},
    }
    for title, change in controls.items():
        try:
            with changed_in_memory(model, change):
                yield title
        except NothingToChange:
            continue
