"""Editing an adapter's files in place: its configuration, its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from postmortem.adapter_config import CONFIG_FILE
from postmortem.adapter_weights import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

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
