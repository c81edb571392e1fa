"""Adapters that fit a base and adapters that do not, loaded by the PEFT that is installed.

Usage: python tools/peft_cases.py
It needs torch, transformers, PEFT and safetensors and nothing of this project, so that any release
of PEFT runs it in an environment of its own. Every release gets the same bytes. It prints the
versions, then a line of JSON for each case.
"""

import copy
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

RANK = 8
STEM = "base_model.model."
# Enough to tell a part of an adapter from the whole; rounding stays far below.
TOLERANCE = 1e-5
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shapes:
    """What an adapter takes from its base: hidden size, sizes of queries and values, layers."""

    hidden: int
    queries: int
    values: int
    layers: int = 2


# Attention of true size, so that PEFT names the shapes of the incident; the rest is tiny.
BASE = Shapes(1536, 1536, 256)  # Qwen2.5-1.5B
WIDE = Shapes(2560, 4096, 1024)  # Qwen3-4B
NARROW = Shapes(896, 896, 128)  # Qwen2.5-0.5B
INTERMEDIATE, VOCABULARY = 64, 96

PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "r": RANK,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
    "target_modules": ["q_proj", "v_proj"],
}
# What these releases write besides, at its default.
SAVED_BY_0_17_1: Mapping[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
SAVED_BY_0_21_2: Mapping[str, Any] = {
    **SAVED_BY_0_17_1,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "lora_ga_config": None,
    "monteclora_config": None,
    "peft_version": "0.21.2",
    "use_bdlora": None,
    "velora_config": None,
}


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder before it is written: how its config differs from `PLAIN`, its tensors.

    `tensors` turns those of an adapter of the donor's shapes into what the file holds.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    donor: Shapes = BASE
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors

    def write(self, folder: Path) -> Path:
        """Write the folder as PEFT would."""
        folder.mkdir()
        config = {**PLAIN, **self.config}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(self.tensors(draw_adapter(self.donor)), folder / "adapter_model.safetensors")
        return folder


SOUND = Adapter()


@dataclass(frozen=True)
class Case:
    """An adapter as it is found, and the one that was meant.

    None is meant for this base where the adapter was made for another; `options` go to PEFT.
    """

    id: str
    name: str
    found: Adapter
    meant: Adapter | None = SOUND
    options: Mapping[str, Any] = field(default_factory=dict)


def draw(name: str, *shape: int) -> torch.Tensor:
    """Random weights that depend on the name and the shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator) * 0.02


def draw_adapter(donor: Shapes) -> Tensors:
    """A LoRA adapter of queries and values, both factors random as after training."""
    found: Tensors = {}
    for layer in range(donor.layers):
        for module, size in (("q_proj", donor.queries), ("v_proj", donor.values)):
            path = f"{STEM}model.layers.{layer}.self_attn.{module}"
            found |= _factors(path, inputs=donor.hidden, outputs=size)
    return found


def draw_base() -> Qwen2ForCausalLM:
    """The base, its weights the same under every release of transformers."""
    config = Qwen2Config(
        hidden_size=BASE.hidden,
        num_hidden_layers=BASE.layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.copy_(draw(name, *weights.shape))
    return model


def _factors(path: str, *, inputs: int, outputs: int) -> Tensors:
    first, second = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    return {first: draw(first, RANK, inputs), second: draw(second, outputs, RANK)}


def _named(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): values for name, values in tensors.items()}


def _without_b(tensors: Tensors) -> Tensors:
    return {name: values for name, values in tensors.items() if "lora_B" not in name}


def _zero_b(tensors: Tensors) -> Tensors:
    return {name: values * ("lora_B" not in name) for name, values in tensors.items()}


def _with_gates(tensors: Tensors) -> Tensors:
    for layer in range(BASE.layers):
        path = f"{STEM}model.layers.{layer}.mlp.gate_proj"
        tensors = tensors | _factors(path, inputs=BASE.hidden, outputs=INTERMEDIATE)
    return tensors


def _with_head(tensors: Tensors) -> Tensors:
    return tensors | {f"{STEM}lm_head.weight": draw("a trained head", VOCABULARY, BASE.hidden)}


CASES = (
    Case("sound", "a sound adapter, for comparison", SOUND),
    Case("wider", "made for a wider base (4B)", Adapter(donor=WIDE), None),
    Case("narrower", "made for a narrower base (0.5B)", Adapter(donor=NARROW), None),
    Case(
        "wider_ignored",
        "the wider one, with ignore_mismatched_sizes",
        Adapter(donor=WIDE),
        None,
        {"ignore_mismatched_sizes": True},
    ),
    Case("deeper", "made for a base of more layers", Adapter(donor=replace(BASE, layers=4)), None),
    Case(
        "shallower", "made for a base of fewer layers", Adapter(donor=replace(BASE, layers=1)), None
    ),
    Case(
        "same_shapes",
        "names another base, of the same shapes",
        Adapter({"base_model_name_or_path": "Qwen/Qwen2.5-Math-1.5B"}),
    ),
    Case(
        "prefix_lost",
        "the keys' prefix lost",
        Adapter(tensors=_named(lambda name: name.removeprefix(STEM))),
    ),
    Case(
        "prefix_twice",
        "the keys' prefix twice",
        Adapter(tensors=_named(lambda name: STEM + name)),
    ),
    Case(
        "default_left",
        "the adapter's name left in the keys",
        Adapter(tensors=_named(lambda name: name.replace(".weight", ".default.weight"))),
    ),
    Case("half_missing", "half of the tensors missing", Adapter(tensors=_without_b)),
    Case("zero_b", "every lora_B zero", Adapter(tensors=_zero_b)),
    Case("rslora_lost", "use_rslora lost", SOUND, Adapter({"use_rslora": True})),
    Case("pattern_lost", "alpha_pattern lost", SOUND, Adapter({"alpha_pattern": {"v_proj": 64}})),
    Case("pissa", "init_lora_weights set to pissa", Adapter({"init_lora_weights": "pissa"})),
    Case(
        "parameters",
        "trained with target_parameters",
        Adapter({"target_parameters": ["mlp.gate_proj.weight"]}, tensors=_with_gates),
        # The same update by the way that every release knows.
        Adapter({"target_modules": ["q_proj", "v_proj", "gate_proj"]}, tensors=_with_gates),
    ),
    Case(
        "module_missing",
        "a module of modules_to_save missing",
        Adapter({"modules_to_save": ["lm_head"]}),
        Adapter({"modules_to_save": ["lm_head"]}, tensors=_with_head),
    ),
    Case("saved_by_0_17_1", "the config as 0.17.1 saves it", Adapter(SAVED_BY_0_17_1)),
    Case("saved_by_0_21_2", "the config as 0.21.2 saves it", Adapter(SAVED_BY_0_21_2)),
)


def load(base: Qwen2ForCausalLM, folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """A copy of the base with an adapter on it, and what the user was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(folder), **options)
    return adapted, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def answer(model: Any) -> torch.Tensor:
    """The logits of a fixed input."""
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=torch.arange(12)[None]).logits
    return logits


def try_case(case: Case, base: Qwen2ForCausalLM, work: Path) -> dict[str, Any]:
    """What PEFT does with a case, in its own words, and how the result answers."""
    told = {"id": case.id, "name": case.name, "mismatches": 0}
    try:
        adapted, said = load(base, case.found.write(work / "found"), **case.options)
    except Exception as error:  # whatever a release raises is what we record
        lines = [line.strip() for line in str(error).splitlines()]
        told["mismatches"] = sum(line.startswith("size mismatch") for line in lines)
        words = " ".join([f"{type(error).__name__}:", *lines[:2]])
        return {**told, "did": "raises", "words": words, "answers": ""}
    logits = answer(adapted)
    known = {"as the base": answer(base)}
    if case.meant:
        known["as meant"] = answer(load(base, case.meant.write(work / "meant"))[0])
    alike = [w for w, other in known.items() if torch.allclose(logits, other, atol=TOLERANCE)]
    did = "warns" if said else "silent"
    return {**told, "did": did, "words": " ".join(said), "answers": [*alike, "otherwise"][0]}


def try_cases() -> Iterator[dict[str, Any]]:
    """Every case on the same base, one after another."""
    torch.manual_seed(0)
    base = draw_base()
    for case in CASES:
        with TemporaryDirectory() as work:
            yield try_case(case, base, Path(work))


def main() -> None:
    """Print the versions, then the cases."""
    packages = ("peft", "transformers", "torch", "safetensors")
    found = {name: version(name) for name in packages}
    print(json.dumps({"python": ".".join(map(str, sys.version_info[:3])), **found}))
    for told in try_cases():
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
