"""Shape mismatch for real: PEFT's own reaction at true size, and cutting or padding by hand."""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from postmortem.case.schema import TrueSize
from postmortem.checker.bases import find_base
from postmortem.checker.errors import ModelError
from postmortem.models.loading import user_warnings

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class TensorPair:
    """One adapter tensor: its shape on the base and in the donor's adapter (rows, columns)."""

    module: str
    tensor: str
    on_base: tuple[int, ...]
    in_adapter: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether the shapes agree."""
        return self.on_base == self.in_adapter

    @property
    def row(self) -> tuple[str, ...]:
        """The pair as a row of a table."""
        shapes = ("×".join(map(str, shape)) for shape in (self.on_base, self.in_adapter))
        return (f"{self.module}.{self.tensor}", *shapes, "yes" if self.fits else "no")


@dataclass(frozen=True)
class LoadOutcome:
    """What PEFT did with an adapter: its error, or "" and the warnings it gave.

    `mismatches` counts the tensors that the error names.
    """

    error: str
    warnings: tuple[str, ...]
    mismatches: int

    @property
    def first_mismatch(self) -> str:
        """The first tensor's line of a size-mismatch error, or ""."""
        lines = (line.strip() for line in self.error.splitlines())
        return next((line for line in lines if line.startswith("size mismatch")), "")


def build_on_meta(model_id: str) -> Any:
    """A known base of true size on the meta device: shapes, and no memory."""
    base = find_base(model_id)
    if base is None:
        raise ModelError(model_id, expected="a base of the shipped table", found="no such row")
    settings = dict(base.config)
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapter_shapes(
    model_id: str, target_modules: tuple[str, ...], *, rank: int
) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a LoRA adapter of a known base, by its name in the file."""
    model = build_on_meta(model_id)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in target_modules:
            shapes[f"{PREFIX}{name}.lora_A.weight"] = (rank, module.in_features)
            shapes[f"{PREFIX}{name}.lora_B.weight"] = (module.out_features, rank)
    return shapes


def write_adapter(
    model_id: str, folder: Path, *, rank: int, target_modules: tuple[str, ...]
) -> Path:
    """An adapter folder of a known base's true shapes; its values are small and random."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = adapter_shapes(model_id, target_modules, rank=rank)
    draws = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=draws).mul_(0.01).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_id,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(target_modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def try_load(model: Any, adapter: Path, **options: Any) -> LoadOutcome:
    """Let PEFT load an adapter and report what it does; the model is not to be used afterwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(model, str(adapter), **options)
            error = ""
        except (RuntimeError, ValueError) as raised:
            error = str(raised)
    # Copying into the meta device is a no-op by design, and torch says so for each tensor.
    told = tuple(text for text in user_warnings(caught) if "meta parameter" not in text)
    return LoadOutcome(error, told, error.count("size mismatch for"))


def compare_shapes(true_size: TrueSize, donor: str, *, layer: int = 0) -> list[TensorPair]:
    """The tensors of all seven projections of one layer, on the base and in a donor's adapter."""
    on_base = adapter_shapes(true_size.base, ALL_LINEAR, rank=true_size.rank)
    in_donor = adapter_shapes(donor, ALL_LINEAR, rank=true_size.rank)
    marker = f".layers.{layer}."
    return [
        TensorPair(
            module=name.split(marker)[1].rsplit(".", 2)[0],
            tensor=name.rsplit(".", 2)[1],
            on_base=shape,
            in_adapter=in_donor[name],
        )
        for name, shape in on_base.items()
        if marker in name
    ]


def refit_adapter(source: Path, target: Any, *, folder: Path) -> Path:
    """Cut or zero-pad each tensor of an adapter to the shapes that `target` asks for.

    No tool does this at loading: it is the write-up's explanation, carried out by hand. `target`
    is the base model that the result is to fit.
    """
    config = LoraConfig.from_pretrained(str(source))
    wanted = _shapes_on(target, config)
    tensors = load_file(source / "adapter_model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    refitted = {
        name: _refit(tensor, wanted[name]) for name, tensor in tensors.items() if name in wanted
    }
    save_file(refitted, folder / "adapter_model.safetensors")
    shutil.copy(source / "adapter_config.json", folder)
    return folder


def _shapes_on(model: Any, config: LoraConfig) -> Mapping[str, torch.Size]:
    config.base_model_name_or_path = model.name_or_path
    adapted = get_peft_model(model, config)
    state = adapted.state_dict()
    adapted.unload()
    vars(model).pop("peft_config", None)
    return {name.replace(".default.", "."): t.shape for name, t in state.items() if "lora_" in name}


def _refit(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    result = torch.zeros(shape, dtype=tensor.dtype)
    rows, columns = (min(have, want) for have, want in zip(tensor.shape, shape, strict=True))
    result[:rows, :columns] = tensor[:rows, :columns]
    return result


def slug(model_id: str) -> str:
    """A model's name as it stands in keys of records."""
    return model_id.rpartition("/")[2].lower().replace(".", "_")
