"""Which modules a configuration adapts on a base, by PEFT's own matching rules."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from postmortem.adapter_config import AdapterConfig
from postmortem.architectures import BaseModel, Module
from postmortem.untrusted import is_literal, match_names

_HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# all-linear leaves the output embedding out, and the head of a classifier.
_OUTPUTS = ("lm_head", "cls.predictions.decoder", "lm_head.decoder", "score", "classifier")


@dataclass(frozen=True, slots=True)
class Target:
    """A module of the base that the adapter changes, with its rank and scale."""

    module: Module
    rank: int
    scale: float

    def shapes(self, config: AdapterConfig) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the tensors that PEFT creates: A (rank, in), B (out, rank), by part name."""
        module, kind = self.module, "lora_embedding_" if self.module.is_embedding else "lora_"
        parts: dict[str, tuple[int | None, ...]] = {
            f"{kind}A": (self.rank, module.inputs),
            f"{kind}B": (module.outputs, self.rank),
        }
        if config.use_dora:
            parts["lora_magnitude_vector"] = (module.outputs,)
        if config.lora_bias and not module.is_embedding:
            parts["lora_B.bias"] = (module.outputs,)
        return parts

    def parameters(self, config: AdapterConfig) -> int:
        """Number of parameters that PEFT trains here."""
        return sum(math.prod(size or 0 for size in s) for s in self.shapes(config).values())


def saved_modules(config: AdapterConfig) -> tuple[str, ...]:
    """Names of modules_to_save, with those that PEFT adds for the task."""
    return (*config.modules_to_save, *_HEADS_OF_TASK.get(config.task_type or "", ()))


def is_under(path: str, name: str) -> bool:
    """Tell whether a module path is the named module or lies below it."""
    return f".{name}." in f".{path}."


def find_targets(config: AdapterConfig, base: BaseModel) -> dict[str, Target]:
    """Return the described modules that the configuration adapts, by module path.

    Raises UntrustedError for a regex that is invalid or too slow.
    """
    names = list(base.modules)
    excluded = _match(config.exclude_modules, names)
    saved = saved_modules(config)
    excluded |= {n for n in names if any(is_under(n, m) for m in saved)}
    chosen = [n for n in _select(config, base, names) if n not in excluded]
    ranks = _pattern_values(config.rank_pattern, chosen)
    alphas = _pattern_values(config.alpha_pattern, chosen)
    return {
        name: Target(
            base.modules[name],
            rank := int(ranks.get(name, config.r)),
            scale_of(alphas.get(name, config.alpha), rank, use_rslora=config.use_rslora),
        )
        for name in chosen
    }


def implied_parameters(config: AdapterConfig, targets: Mapping[str, Target]) -> int:
    """Count the LoRA parameters that a configuration implies on a base."""
    return sum(target.parameters(config) for target in targets.values())


def scale_of(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """Return the factor of the update B·A: alpha over r, or over its root when rank-stabilised."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _match(wanted: tuple[str, ...] | str | None, names: list[str]) -> set[str]:
    if isinstance(wanted, str):
        return set(match_names([wanted], names)[wanted])
    ends = frozenset(wanted or ())
    return {name for name in names if not ends.isdisjoint(_ends(name))}


@cache
def _ends(name: str) -> tuple[str, ...]:
    """Return the dotted name and every end of it that a list entry can match."""
    parts = name.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts)))


def _select(config: AdapterConfig, base: BaseModel, names: list[str]) -> Iterable[str]:
    wanted = config.target_modules
    if wanted is None:
        wanted = () if config.target_parameters else base.default_targets
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return [n for n in names if n not in _OUTPUTS and not base.modules[n].is_embedding]
    matched = _match(wanted, names)
    if config.layers_to_transform is None or isinstance(wanted, str):
        return [name for name in names if name in matched]
    # A module named in full is targeted whatever its layer.
    return [n for n in names if n in matched and (n in wanted or _in_layers(config, n))]


def _in_layers(config: AdapterConfig, name: str) -> bool:
    patterns = [rf"(?:^|.*?\.){re.escape(p)}\.(\d+)\." for p in config.layers_pattern]
    matches = (re.match(p, name) for p in patterns or [r".*?\.[^.]*\.(\d+)\."])
    index = next((int(m[1]) for m in matches if m), None)
    return index is not None and index in (config.layers_to_transform or ())


def _pattern_values(patterns: Mapping[str, float], names: list[str]) -> dict[str, float]:
    if not patterns:
        return {}
    plain = {key: key.removeprefix("^") for key in patterns}
    regexes = {k: rf"(.*\.)?({k})" for k, text in plain.items() if not is_literal(text)}
    found = match_names(regexes.values(), names) if regexes else {}
    by_end: dict[str, list[str]] = {}
    for name in names:
        for end in _ends(name):
            by_end.setdefault(end, []).append(name)
    values: dict[str, float] = {}
    # PEFT takes the first pattern that matches, in the order of the file.
    for key, value in patterns.items():
        if key in regexes:
            matching: Iterable[str] = found[regexes[key]]
        elif key.startswith("^"):
            matching = [plain[key]]
        else:
            matching = by_end.get(key, [])
        for name in matching:
            values.setdefault(name, value)
    return values
