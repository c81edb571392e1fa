"""Loading a base and putting an adapter on it: one way for every folder."""

import importlib.util
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from postmortem.checker.errors import (
    FLOAT16_LIMIT,
    ModelError,
    describe_overflow,
    describe_underflow,
    update_bound,
)

# A progress bar per model would drown the build's own lines.
transformers_logging.disable_progress_bar()


# What loading a model raises; torch asserts that it was built for the device.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    AssertionError,
    SafetensorError,
)
# What to give where float16 is too narrow.
WIDER = "DTYPE=bfloat16 or DTYPE=float32"
# What transformers needs for a base that was quantised with GPTQ; `gptq` of pyproject.toml.
GPTQ_PACKAGES = ("optimum", "gptqmodel")
# A classifier's head in an adapter's file, by the names that transformers gives it.
HEAD = re.compile(
    r"(^|\.)(score|classifier|classifier\.out_proj)(\.modules_to_save\.\w+)?\.weight$"
)
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class LoadedBase:
    """A base model in evaluation mode with its tokenizer, where it runs and in which dtype."""

    model: Any
    tokenizer: Any
    device: str
    dtype: str


@dataclass(frozen=True)
class AttachedAdapter:
    """A base with an adapter on it, and the warnings that PEFT gave while loading.

    `risks` says what float16 cannot hold of it; empty on a base in another dtype.
    """

    model: Any
    warnings: tuple[str, ...]
    risks: tuple[str, ...] = ()


def choose_device(device: str = "auto") -> str:
    """The device asked for; `auto` takes a GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_hardware(device: str) -> str:
    """The card that a device is, or the kind of processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


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


def load_base(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", classes: int | None = None
) -> LoadedBase:
    """Load a causal model and its tokenizer from a folder or a hub id; safetensors only.

    With `classes` it is loaded as a classifier of so many; a head that the files lack is drawn at
    random, from a fixed seed. Raises `ModelError` where the folder or id cannot be loaded, where it
    was quantised with GPTQ and the packages for that are missing, and where weights do not fit into
    float16. Code that a model folder brings along is never run.
    """
    device = choose_device(device)
    kind = "causal language model" if classes is None else "model that can classify"
    local = Path(source).is_dir()
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        if _is_gptq(AutoConfig.from_pretrained(str(source), **options)):
            _require_gptq(source)
            # The kernel is chosen for the device that the weights are loaded to.
            options["device_map"] = {"": device}
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
        options |= {"dtype": choose_dtype(device, dtype), "use_safetensors": True}
        if classes is None:
            model = AutoModelForCausalLM.from_pretrained(str(source), **options)
        else:
            model = _load_classifier(str(source), tokenizer, options | {"num_labels": classes})
        # PEFT freezes a base when it puts an adapter on. One that is frozen from the start answers
        # the same to the last bit, since torch multiplies weights in another order that may learn.
        model.eval().requires_grad_(False).to(device)
    except LOADING_ERRORS as error:
        found = " ".join(str(error).split())[:300]
        raise ModelError(
            source,
            expected=f"a {kind} with a tokenizer, weights in safetensors",
            found=found,
            remedy="Give a model folder, a hub id, or a profile whose weights are present.",
        ) from None
    _refuse_overflow(model, source)
    return LoadedBase(model, tokenizer, device, str(model.dtype).removeprefix("torch."))


@contextmanager
def attached(
    base: LoadedBase, adapter: str | Path, *, ignore_mismatched_sizes: bool = False
) -> Iterator[AttachedAdapter]:
    """Put an adapter on the base for the length of a `with` block, then take it off again.

    Raises `ModelError` with PEFT's own words where it does not load. On a float16 base, an update
    that is out of float16's range is a risk and no error: PEFT keeps the adapter in float32, so
    what is lost depends on the input.
    """
    check_adapter_folder(adapter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(
                base.model, str(adapter), ignore_mismatched_sizes=ignore_mismatched_sizes
            )
        except (*LOADING_ERRORS, TypeError, AttributeError, IndexError) as error:
            _strip(base.model)
            raise ModelError(
                adapter, expected="an adapter that fits the base", found=str(error)
            ) from None
    try:
        risks = _float16_risks(model) if base.dtype == "float16" else ()
        yield AttachedAdapter(model.eval(), user_warnings(caught), risks)
    finally:
        replaced = _replaced_modules(base.model)
        model.unload()
        # PEFT leaves the adapter's own copies of whole modules in their place.
        for name, module in replaced.items():
            _set_module(base.model, name, module)
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


def count_classes(adapter: str | Path) -> int:
    """How many classes the head in an adapter's file tells apart; two where it holds none."""
    check_adapter_folder(adapter)
    try:
        with safe_open(Path(adapter, "adapter_model.safetensors"), framework="pt") as tensors:
            heads = [name for name in tensors.keys() if HEAD.search(name)]  # noqa: SIM118
            sizes = [tensors.get_slice(name).get_shape()[0] for name in heads]
    except (OSError, SafetensorError) as error:
        raise ModelError(adapter, expected="readable weights", found=str(error)) from None
    return max(sizes, default=2)


def positive_class(config: Any, label: str | None) -> int:
    """The place of the class that counts as positive: the one of that name, or the second."""
    if config.num_labels < 2:
        raise ModelError("the classifier", expected="two classes or more", found="one output")
    names = {str(name).casefold(): int(place) for place, name in config.id2label.items()}
    return names.get((label or "").casefold(), 1)


def _load_classifier(source: str, tokenizer: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError("a tokenizer with neither padding nor an end of text")
    # A decoder classifies by the last token that is no padding.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _replaced_modules(model: Any) -> dict[str, Any]:
    """The modules of a base that an adapter has put whole copies in place of, by name."""
    return {
        name: module.original_module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _set_module(model: Any, name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_gptq(config: Any) -> bool:
    stored = getattr(config, "quantization_config", None) or {}
    return isinstance(stored, dict) and stored.get("quant_method") == "gptq"


def _require_gptq(source: str | Path) -> None:
    """Say in one line what is missing; transformers names one package at a time."""
    missing = [name for name in GPTQ_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            source,
            expected=f"the packages {' and '.join(GPTQ_PACKAGES)} for a base quantised with GPTQ",
            found=f"no {' and no '.join(missing)}",
            remedy="Run `.venv/bin/pip install --editable '.[gptq]'`.",
        )


def _refuse_overflow(model: Any, source: str | Path) -> None:
    """Raise `ModelError` for the first weights that the conversion to float16 made infinite."""
    for name, weights in model.named_parameters():
        if weights.dtype == torch.float16 and not bool(torch.isfinite(weights).all()):
            raise ModelError(
                f"{source}, tensor {name}",
                expected=f"values of at most {FLOAT16_LIMIT:g} for float16",
                found=_saved_largest(Path(source), name),
                remedy=f"Give {WIDER}.",
            )


def _saved_largest(folder: Path, name: str) -> str:
    """The greatest magnitude of a tensor as saved, in words."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                return f"largest value {float(tensors.get_tensor(name).abs().max()):.3g}"
    return "infinity or NaN"


def _float16_risks(model: Any) -> tuple[str, ...]:
    """One warning on the updates of the adapter that float16 cannot hold, the worst by name."""
    found: list[tuple[float, str]] = []
    for name, module in model.named_modules():
        for a, b in _PAIRS:
            for adapter in getattr(module, b, ()):
                both = [_weights(getattr(module, part)[adapter]) for part in (a, b)]
                largest = max(float(weights.abs().max()) for weights in both)
                norms = [float(weights.norm()) for weights in both]
                bound = update_bound(module.scaling[adapter], *norms)
                if said := describe_overflow(largest, bound) or describe_underflow(bound):
                    found.append((max(largest, bound), f"{name}.{b}: {said}"))
    if not found:
        return ()
    count = f" ({len(found)} in all)" if len(found) > 1 else ""
    return (f"float16 cannot hold this adapter: {max(found)[1]}{count}. Give {WIDER}.",)


def _weights(layer: Any) -> torch.Tensor:
    """The weights of one part of a pair in float64; embeddings keep a bare parameter."""
    return (layer if isinstance(layer, torch.Tensor) else layer.weight).detach().double()


def _strip(model: Any) -> None:
    """Undo what PEFT leaves on a base: the layers of a failed load, and its config."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            _set_module(model, name, module.base_layer)
    vars(model).pop("peft_config", None)


def footprint(model: Any) -> dict[str, tuple[int, int, int]]:
    """What changes when a weight does: the tensor, where its data lie, its count of writes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(t), t.data_ptr(), t._version) for name, t in tensors}
