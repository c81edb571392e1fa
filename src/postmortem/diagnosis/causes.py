"""The suspected causes: each one a change to a sound run, made for real on files and models.

Their names and titles are read where no model runs, so what loads torch is imported where a cause
is made.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from postmortem.case.prompts import Prompt, parse_strict
from postmortem.models.changes import Tensors, edit_config, edit_tensors
from postmortem.models.model_set import World

if TYPE_CHECKING:
    import torch

    from postmortem.models.loading import LoadedBase


# A change of the token ids that a prompt is sent as.
Rewrite = Callable[[Prompt, Any], Prompt]


class Unavailable(Exception):
    """This world lacks what a cause is made from; the message says what."""


@dataclass(frozen=True)
class Run:
    """A model as it is loaded and asked; a sound one unless a cause has changed it.

    `base` is loaded, or a role of the session's models. `status` says which adapter answers,
    `rewrite` changes a prompt on its way to the model; `otherwise` sends it without the chat
    template where the case has it in one, and the other way round. `parse` turns the generated text
    into a value, where the prompt's own parser does not.
    """

    base: LoadedBase | str
    adapter: Path | None
    ignore_mismatched_sizes: bool = False
    status: Literal["active", "disabled", "another"] = "active"
    rewrite: Rewrite | None = None
    otherwise: bool = False
    parse: Callable[[str], float] | None = None


@dataclass(frozen=True)
class Materials:
    """What the causes are made from: a base of one kind and the adapters of one seed.

    `role` names the base in the world; `kind` tells how it answers v2 by itself: `silent` writes
    one value whatever the post, `speaking` writes what it knows. Changed adapters are written
    below `scratch`. Where no numeric adapter was trained, another `sound` one takes its place.
    """

    world: World
    role: str
    base: LoadedBase
    kind: str
    seed: int
    scratch: Path
    sound: str = "numeric"
    written: list[Path] = field(default_factory=list)

    def adapter(self, recipe: str, *, lineage: str = "", renamed: bool = False) -> Path:
        """A copy of an adapter, free to be changed; `Unavailable` where the world has none.

        One of this base's own names it, and so does a `renamed` one, whatever it was trained on.
        """
        recipe = self.sound if recipe == "numeric" and not lineage else recipe
        name = f"{lineage or self.kind}/{recipe}_{self.seed}"
        member = self.world.replays.get(name)
        if member is None or member.path is None:
            asked = f"of a {lineage} base" if lineage else f"trained as {recipe.replace('_', ' ')}"
            raise Unavailable(f"this profile has no adapter {asked}")
        folder = Path(shutil.copytree(member.path, self._place()))
        if renamed or not lineage:
            edit_config(folder, base_model_name_or_path=self.role)
        return folder

    def untrained(self) -> Path:
        """An adapter as PEFT makes it, lora_B zero, on the layers of the sound one."""
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self.seed)
        sound = self.world.replays.get(f"{self.kind}/{self.sound}_{self.seed}")
        named = LoraConfig.from_pretrained(sound.path) if sound and sound.path else None
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=named.layers_to_transform if named else None,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(self.base.model, config)
        place = self._place()
        adapted.save_pretrained(str(place))
        edit_config(place, base_model_name_or_path=self.role)
        adapted.unload()
        vars(self.base.model).pop("peft_config", None)
        return place

    def edited(self, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
        """The numeric adapter with each tensor changed, or dropped where the change gives None."""
        return edit_each(self.adapter("numeric"), change)

    def copied_base(self) -> LoadedBase:
        """The base on a copy of its weights, free to be changed."""
        return replace(self.base, model=copy.deepcopy(self.base.model))

    def _place(self) -> Path:
        place = self.scratch / str(len(self.written))
        self.written.append(place)
        return place


@dataclass(frozen=True)
class Cause:
    """A suspected cause: how to inject it at each of its severities, the first the plainest."""

    title: str
    inject: Callable[[Materials, Any], Run]
    severities: Mapping[str, Any] = field(default_factory=lambda: {"-": None})


def edit_each(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """Change each tensor of an adapter in place, or drop it where the change gives None."""

    def apply(tensors: Tensors) -> Tensors:
        pairs = ((name, change(name, tensor)) for name, tensor in tensors.items())
        return {name: tensor for name, tensor in pairs if tensor is not None}

    edit_tensors(folder, apply)
    return folder


def _healthy(materials: Materials, alpha: int) -> Run:
    """The same function written with another alpha: lora_B makes up for it."""
    folder = materials.edited(lambda name, t: t * (32 / alpha) if "lora_B" in name else t)
    edit_config(folder, lora_alpha=alpha)
    return Run(materials.base, folder)


def _config_change(**changes: Any) -> Callable[[Materials, Any], Run]:
    def inject(materials: Materials, _: Any) -> Run:
        folder = materials.adapter("numeric")
        edit_config(folder, **changes)
        return Run(materials.base, folder)

    return inject


def _alpha(materials: Materials, factor: float) -> Run:
    folder = materials.adapter("numeric")
    edit_config(folder, lora_alpha=32 * factor)
    return Run(materials.base, folder)


def _lost_scale(part: str) -> Callable[[Materials, float], Run]:
    """A scale that stood in the config and is lost: lora_B was trained to be that much smaller."""

    def inject(materials: Materials, factor: float) -> Run:
        def shrink(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor / factor if "lora_B" in name and part in name else tensor

        return Run(materials.base, materials.edited(shrink))

    return inject


def _keys(materials: Materials, pair: tuple[str, str]) -> Run:
    folder = materials.adapter("numeric")
    edit_tensors(folder, lambda tensors: {k.replace(*pair): v for k, v in tensors.items()})
    return Run(materials.base, folder)


def _moved_layers(materials: Materials, place_of: Callable[[int, int], int]) -> Run:
    """Each adapted layer's tensors under another one's name; what goes past the last is lost.

    `place_of` maps a place among the adapted layers, and their number, to another place.
    """

    def rename(tensors: Tensors) -> Tensors:
        layers = sorted({_split_layer(name)[1] for name in tensors})
        moved = {}
        for name, tensor in tensors.items():
            head, number, tail = _split_layer(name)
            place = place_of(layers.index(number), len(layers))
            target = layers[place] if place < len(layers) else NO_LAYER
            moved[f"{head}{target}{tail}"] = tensor
        return moved

    folder = materials.adapter("numeric")
    edit_tensors(folder, rename)
    return Run(materials.base, folder)


def _split_layer(name: str) -> tuple[str, int, str]:
    head, _, rest = name.partition(".layers.")
    number, _, tail = rest.partition(".")
    return f"{head}.layers.", int(number), f".{tail}"


def _foreign(lineage: str, *, ignored: bool = False) -> Callable[[Materials, Any], Run]:
    def inject(materials: Materials, renamed: bool) -> Run:
        folder = materials.adapter("numeric", lineage=lineage, renamed=renamed)
        return Run(materials.base, folder, ignore_mismatched_sizes=ignored)

    return inject


def _truncated(materials: Materials, _: Any) -> Run:
    from postmortem.models.mismatch import refit_adapter

    donor = materials.adapter("numeric", lineage="donor", renamed=True)
    place = donor.with_name(f"{donor.name}-cut")
    return Run(materials.base, refit_adapter(donor, materials.base.model, folder=place))


def _padded(materials: Materials, share: float) -> Run:
    """A narrower base's adapter, stood in for by the donor's: its first part, zeros after it."""
    run = _truncated(materials, None)
    assert run.adapter is not None

    def narrow(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.new_zeros(tensor.shape)
        wide = int(tensor.shape[1 if "lora_A" in name else 0] * share)
        where = (slice(None), slice(wide)) if "lora_A" in name else (slice(wide),)
        kept[where] = tensor[where]
        return kept

    edit_each(run.adapter, narrow)
    return run


def _targets(materials: Materials, kept: str) -> Run:
    folder = materials.adapter("numeric")
    edit_config(folder, target_modules=[kept])
    return Run(materials.base, folder)


def _overwritten(materials: Materials, part: str) -> Run:
    """The adapter's file brings weights of another base, which replace the base's own."""
    from safetensors.torch import load_file

    folder = materials.adapter("numeric")
    if not materials.world.has("sibling_base"):
        raise Unavailable("this profile has no sibling base")
    others = load_file(materials.world.path("sibling_base") / "model.safetensors")
    brought = {f"base_model.model.{k}": v for k, v in others.items() if part in k}
    edit_tensors(folder, lambda tensors: {**tensors, **brought})
    return Run(materials.copied_base(), folder)


def _quantised(materials: Materials, bits: int) -> Run:
    base = materials.copied_base()
    for name, parameter in base.model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.data = _rounded(parameter.data, bits)
    return Run(base, materials.adapter("numeric"))


def _rounded(weights: torch.Tensor, bits: int, group: int = 32) -> torch.Tensor:
    """Round to nearest in symmetric groups along the input, as int4 formats store weights."""
    grouped = weights.reshape(weights.shape[0], -1, min(group, weights.shape[1]))
    largest = 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-12)
    return ((grouped / scale).round() * scale).reshape(weights.shape)


def _overflow(materials: Materials, factor: float) -> Run:
    base = materials.copied_base()
    base.model.half()
    folder = materials.edited(lambda name, t: t * factor if "lora_B" in name else t)
    return Run(replace(base, dtype="float16"), folder)


def _template(materials: Materials, pairs: tuple[tuple[str, str], ...]) -> Run:
    """The prompt in another markup than the model's own."""

    def rewrite(prompt: Prompt, tokenizer: Any) -> Prompt:
        text = prompt.text
        for found, put in pairs:
            text = text.replace(found, put)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(text, tuple(ids), prompt.full_length)

    return Run(materials.base, materials.adapter("numeric"), rewrite=rewrite)


def _cut(materials: Materials, share: float) -> Run:
    """Cut on the right, as the incident's code would have cut a longer prompt."""

    def rewrite(prompt: Prompt, tokenizer: Any) -> Prompt:
        ids = prompt.token_ids[: max(1, int(len(prompt.token_ids) * share))]
        return Prompt(tokenizer.decode(ids), ids, prompt.full_length)

    return Run(materials.base, materials.adapter("numeric"), rewrite=rewrite)


def _trained_as(materials: Materials, recipe: str) -> Run:
    return Run(materials.base, materials.adapter(recipe))


def _status(materials: Materials, status: Any) -> Run:
    return Run(materials.base, materials.adapter("numeric"), status=status)


def _integer_part(text: str) -> float:
    """A parser that stops at the point."""
    value = parse_strict(text).value
    return 0.5 if value is None else float(int(value))


def _two_decimals(text: str) -> float:
    """A parser that expects two decimals and takes anything else for zero."""
    value = parse_strict(text).value
    return value if value is not None and len(text.strip()) == 4 else 0.0


def _parser(materials: Materials, parse: Callable[[str], float]) -> Run:
    return Run(materials.base, materials.adapter("numeric"), parse=parse)


# A layer that no base has.
NO_LAYER = 9999
NAMES = {"named as this base": True, "named truly": False}
HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
OTHER_MARKUP = ((HEADER, "### Response:\n"), (END, ""), ("<|im_start|>", "### "))
NO_MARKUP = ((HEADER, ""), (END, ""), ("<|im_start|>", ""))
CAUSES: Mapping[str, Cause] = {
    "healthy": Cause(
        "no fault: a matched adapter", _healthy, {"alpha 32": 32, "alpha 16": 16, "alpha 64": 64}
    ),
    "no-adapter": Cause("the adapter was never on the model", lambda m, _: Run(m.base, None)),
    "disabled": Cause(
        "the adapter is loaded and does not answer",
        _status,
        {"disabled": "disabled", "another is active": "another"},
    ),
    "zero-b": Cause("lora_B is zero", lambda m, _: Run(m.base, m.untrained())),
    "alpha-zero": Cause("alpha is zero", _config_change(lora_alpha=0)),
    "key-prefix": Cause(
        "the tensors' names carry another prefix",
        _keys,
        {
            "one prefix too many": ("base_model.", "base_model.base_model."),
            "the model's own missing": (".model.model.", ".model."),
        },
    ),
    "other-shapes": Cause("made for a base of other shapes", _foreign("donor"), NAMES),
    "other-shapes-ignored": Cause(
        "the same, mismatched sizes ignored", _foreign("donor", ignored=True), NAMES
    ),
    "truncated": Cause("the same, cut to size by hand", _truncated),
    "padded": Cause(
        "made for a narrower base, padded by hand", _padded, {"to 3/4": 0.75, "to 1/2": 0.5}
    ),
    "sibling-base": Cause("made for another base of the same shapes", _foreign("sibling"), NAMES),
    "scale-up": Cause("scaled up", _alpha, {"×8": 8.0, "×16": 16.0, "×4": 4.0}),
    "scale-down": Cause("scaled down", _alpha, {"÷8": 1 / 8, "÷16": 1 / 16, "÷4": 1 / 4}),
    "rslora-lost": Cause("the rank-stabilised scaling is lost", _lost_scale(""), {"-": 4.0}),
    "pattern-lost": Cause(
        "the alpha pattern is lost",
        lambda m, pair: _lost_scale(pair[0])(m, pair[1]),
        {"v_proj ×8": ("v_proj", 8.0), "q_proj ×8": ("q_proj", 8.0)},
    ),
    "layers-shifted": Cause(
        "layers stand one place off",
        _moved_layers,
        {
            "up": lambda place, count: place + 1,
            "down": lambda place, count: place - 1 if place else count,
        },
    ),
    "layers-permuted": Cause(
        "layers stand in another order",
        _moved_layers,
        {
            "two swapped": lambda place, count: {0: 1, 1: 0}.get(place, place),
            "turned": lambda place, count: (place + 1) % count,
        },
    ),
    "targets-dropped": Cause(
        "the config uses fewer modules than the file holds",
        _targets,
        {"v_proj dropped": "q_proj", "q_proj dropped": "v_proj"},
    ),
    "base-overwritten": Cause(
        "the file brings base weights along",
        _overwritten,
        {"embedding": "embed_tokens", "last layer": "layers.2.mlp"},
    ),
    "quantised-base": Cause(
        "the base is rounded", _quantised, {"3 bits": 3, "4 bits": 4, "2 bits": 2}
    ),
    "overflow": Cause("fp16 overflows", _overflow, {"lora_B ×1e6": 1e6, "lora_B ×1e5": 1e5}),
    "other-template": Cause(
        "the prompt comes in another markup",
        _template,
        {"no markup": NO_MARKUP, "another markup": OTHER_MARKUP},
    ),
    "prompt-cut": Cause(
        "the prompt is cut on the right", _cut, {"to 90 %": 0.9, "to 70 %": 0.7, "to 50 %": 0.5}
    ),
    "yes-no-contract": Cause(
        "trained to answer Yes or No",
        _trained_as,
        {"short question": "yes_no_short", "the long prompt": "yes_no_long"},
    ),
    "binary-labels": Cause(
        "trained on the labels 0 and 1",
        _trained_as,
        {"one violation in five": "binary_rare", "even": "binary_even"},
    ),
    "thinking": Cause("trained to open a reasoning trace", lambda m, _: _trained_as(m, "thinking")),
    "parser": Cause(
        "the parser makes zeros",
        _parser,
        {"integer part": _integer_part, "two decimals": _two_decimals},
    ),
}
