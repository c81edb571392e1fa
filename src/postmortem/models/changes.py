"""Changes of an adapter: of its files, and of its layers in memory.

Causes are read where no model runs, so torch is imported where something is changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postmortem.checker.adapter import WEIGHTS_FILE
from postmortem.checker.config import CONFIG_FILE, layer_of, layer_zero

if TYPE_CHECKING:
    import torch


# The factors A, (rank, in), and B, (out, rank), of each update by its module's path.
Pairs = dict[str, tuple["torch.nn.Parameter", "torch.nn.Parameter"]]
Values = dict[str, tuple["torch.Tensor", "torch.Tensor"]]


def each_control(model: Any, *, rotations: int) -> Iterator[str]:
    """Put each control in the adapter's place and give its title; in the end all is as it was.

    Each keeps the sizes of all updates and loses one thing that only training gives: which layer
    they belong to, their sign, or their direction.
    """
    pairs = find_pairs(model)
    kept: Values = {
        path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in pairs.items()
    }
    try:
        for title, change in list_controls(kept, rotations=rotations):
            _put(pairs, change())
            yield title
    finally:
        _put(pairs, kept)


def _put(pairs: Pairs, values: Values) -> None:
    import torch

    with torch.no_grad():
        for path, new in values.items():
            for parameter, value in zip(pairs[path], new, strict=True):
                parameter.copy_(value)


def find_pairs(model: Any) -> Pairs:
    """The two factors of each update of a loaded adapter, by module."""
    parts: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        path, found, rest = name.partition(".lora_")
        side = rest.removeprefix("embedding_").partition(".")[0]
        # Convolutions have factors of more dimensions; they are left as they are.
        if found and side in ("A", "B") and parameter.dim() == 2:
            parts.setdefault(path, {})[side] = parameter
    return {path: (two["A"], two["B"]) for path, two in parts.items() if len(two) == 2}


def list_controls(pairs: Values, *, rotations: int) -> Iterator[tuple[str, Callable[[], Values]]]:
    """The controls by title; an adapter of one layer has no layers to permute."""
    if moved := permute_layers(pairs):
        yield "layers permuted", lambda: {**pairs, **moved}
    yield "sign of B flipped", lambda: {path: (a, -b) for path, (a, b) in pairs.items()}
    for draw in range(rotations):
        yield f"rotated at random, {draw + 1}", partial(rotate, pairs, seed=draw)


def permute_layers(pairs: Values) -> Values:
    """Each layer's update in the place of the layer before it, the first one's in the last.

    Only updates of the same module and shapes change places; those that stay alone are left out.
    """
    alike: dict[object, list[str]] = {}
    for path, (a, b) in pairs.items():
        if layer_of(f"{path}.") is not None:
            alike.setdefault((layer_zero(f"{path}."), a.shape, b.shape), []).append(path)
    moved: Values = {}
    for paths in alike.values():
        order = sorted(paths, key=lambda path: layer_of(f"{path}.") or 0)
        if len(order) > 1:
            moved |= dict(zip(order, (pairs[p] for p in [*order[1:], order[0]]), strict=True))
    return moved


def rotate(pairs: Values, *, seed: int) -> Values:
    """Each update turned at random on both sides: all its singular values stay, no direction does.

    B = U R with orthonormal columns U becomes V R with others drawn evenly, and A likewise.
    """
    import torch

    source = torch.Generator().manual_seed(seed)
    return {
        path: (_turn(a.T, source).T, _turn(b, source)) for path, (a, b) in sorted(pairs.items())
    }


def _turn(tall: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    import torch

    factor = torch.linalg.qr(tall.float()).R
    drawn = torch.randn(tall.shape[0], factor.shape[0], generator=source).to(tall.device)
    frame, signs = torch.linalg.qr(drawn)
    # Without the signs the frame would depend on how QR picks them, and not be even.
    return frame * torch.sign(torch.diagonal(signs)) @ factor


Tensors = dict[str, "torch.Tensor"]


def edit_config(folder: Path, *removed: str, **changes: object) -> None:
    """Rewrite the configuration with keys changed and removed."""
    path = folder / CONFIG_FILE
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in removed}))


def edit_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rewrite the weights through a function of all tensors."""
    from safetensors.torch import load_file, save_file  # brings torch, which takes seconds

    path = folder / WEIGHTS_FILE
    changed = {k: v.contiguous().clone() for k, v in change(load_file(path)).items()}
    save_file(changed, path, metadata={"format": "pt"})


class NothingToChange(Exception):
    """A change that would leave the adapter as it is; the message says why."""


def zero_b(tensors: Tensors) -> Tensors:
    """Every lora_B zero, as an adapter begins."""
    import torch

    return {k: torch.zeros_like(t) if _is_b(k) else t for k, t in tensors.items()}


def scale(factor: float) -> Callable[[Tensors], Tensors]:
    """Every update scaled, by its lora_B."""
    return lambda tensors: {k: t * factor if _is_b(k) else t for k, t in tensors.items()}


def shift_layers(tensors: Tensors) -> Tensors:
    """Each layer's LoRA tensors in the next adapted layer's place, the last one's in the first's.

    Places of another shape keep their own. Raises `NothingToChange` where all stays as it is.
    """
    shifted, places = dict(tensors), dict[str, list[str]]()
    for name in sorted(tensors, key=lambda name: layer_of(name) or 0):
        if "lora_" in name and layer_of(name) is not None:
            places.setdefault(layer_zero(name), []).append(name)
    for names in places.values():
        for name, origin in zip(names, names[-1:] + names[:-1], strict=True):
            if tensors[name].shape == tensors[origin].shape:
                shifted[name] = tensors[origin]
    if all(shifted[name].equal(tensor) for name, tensor in tensors.items()):
        raise NothingToChange(
            "one layer alone is adapted, or all are equal: turning them changes nothing"
        )
    return shifted


def _is_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


# The factor by which two of the changes scale the update.
FACTOR = 8
# What can be done to a copy of an adapter, by name, and what each is called on a page.
CHANGES: Mapping[str, Callable[[Tensors], Tensors]] = {
    "zero_b": zero_b,
    "flipped": scale(-1.0),
    "shifted": shift_layers,
    "eighth": scale(1 / FACTOR),
    "eightfold": scale(FACTOR),
}
COPIES = {
    "zero_b": "lora_B zero",
    "flipped": "sign flipped",
    "shifted": "layers shifted",
    "eighth": f"scale ÷{FACTOR}",
    "eightfold": f"scale ×{FACTOR}",
}


def copy_changed(adapter: Path, folder: Path, change: str) -> Path:
    """A copy of an adapter's two files in a folder, with one of `CHANGES` made."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(adapter / name, folder)
    edit_tensors(folder, CHANGES[change])
    return folder
