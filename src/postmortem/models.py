"""Loading a base and putting an adapter on it: one way for every folder."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from postmortem.errors import ModelError

# A progress bar per model would drown the build's own lines.
transformers_logging.disable_progress_bar()


# What loading a model raises; torch asserts that it was built for the device.
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError),
    SafetensorError,
)


@dataclass(frozen=True)
class LoadedBase:
    """A base model in evaluation mode with its tokenizer, where it runs and in which dtype."""

    model: Any
    tokenizer: Any
    device: str
    dtype: str


@dataclass(frozen=True)
class AttachedAdapter:
    """A base with an adapter on it, and the warnings that PEFT gave while loading."""

    model: Any
    warnings: tuple[str, ...]


def choose_device(device: str = "auto") -> str:
    """The device asked for; `auto` takes a GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(device: str, dtype: str = "auto") -> torch.dtype:
    """The dtype asked for; `auto` is float32 on a CPU and bfloat16 or float16 on a GPU."""
    if dtype == "auto":
        if not device.startswith("cuda"):
            return torch.float32
        # float16 overflows where bfloat16 does not, so it is the second choice.
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ModelError("dtype", expected="auto, float32, bfloat16 or float16", found=repr(dtype))
    return found


def load_base(source: str | Path, *, device: str = "auto", dtype: str = "auto") -> LoadedBase:
    """Load a causal model and its tokenizer from a folder or a hub id; safetensors only.

    Raises `ModelError` where the folder or id cannot be loaded. Code that a model folder brings
    along is never run.
    """
    device = choose_device(device)
    local = Path(source).is_dir()
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
        model = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=choose_dtype(device, dtype), use_safetensors=True, **options
        )
        # PEFT freezes a base when it puts an adapter on. One that is frozen from the start answers
        # the same to the last bit, since torch multiplies weights in another order that may learn.
        model.eval().requires_grad_(False).to(device)
    except LOADING_ERRORS as error:
        found = " ".join(str(error).split())[:300]
        raise ModelError(
            source,
            expected="a causal language model with a tokenizer, weights in safetensors",
            found=found,
            remedy="Give a model folder, a hub id, or a profile whose weights are present.",
        ) from None
    return LoadedBase(model, tokenizer, device, str(model.dtype).removeprefix("torch."))


@contextmanager
def attached(
    base: LoadedBase, adapter: str | Path, *, ignore_mismatched_sizes: bool = False
) -> Iterator[AttachedAdapter]:
    """Put an adapter on the base for the length of a `with` block, then take it off again.

    Raises `ModelError` with PEFT's own words where it does not load.
    """
    check_adapter_folder(adapter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(
                base.model, str(adapter), ignore_mismatched_sizes=ignore_mismatched_sizes
            )
        except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            _strip(base.model)
            raise ModelError(
                adapter, expected="an adapter that fits the base", found=str(error)
            ) from None
    try:
        yield AttachedAdapter(model.eval(), user_warnings(caught))
    finally:
        model.unload()
        _strip(base.model)


def user_warnings(caught: Sequence[warnings.WarningMessage]) -> tuple[str, ...]:
    """What a library tells its user; notes between libraries about deprecations are left out."""
    return tuple(str(w.message) for w in caught if issubclass(w.category, UserWarning))


def check_adapter_folder(adapter: str | Path) -> None:
    """Raise `ModelError` where the folder lacks its config or its safetensors weights."""
    folder = Path(adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(
                folder,
                expected=f"an adapter folder with {name}",
                found=", ".join(sorted(p.name for p in folder.iterdir()))
                if folder.is_dir()
                else "no such folder",
                remedy="Pickled weights (.bin, .pt) are not loaded: save them as safetensors.",
            )


def _strip(model: Any) -> None:
    """Undo what PEFT leaves on a base: the layers of a failed load, and its config."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    vars(model).pop("peft_config", None)
