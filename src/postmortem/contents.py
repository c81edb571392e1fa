"""What the keys of an adapter file are, and where on the base they belong."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from postmortem.architectures import BaseModel
from postmortem.catalogue import Finding, finding

PREFIX = "base_model.model."
_PART = re.compile(r"(.+?)\.(lora_[A-Za-z]\w*)((?:\.[^.]+)*)")
# Keys of other formats: kohya, diffusers.
_FOREIGN = re.compile(
    r"(^lora_(unet|te)|\.lora_(up|down)\.|\.lora\.(up|down)\.|\.lora_linear_layer)"
)
# Wrappers that saved their own name, and a PeftModel inside another.
_WRAPPED = re.compile(r"^base_model\.model\.(base_model\.|module\.)|(^|\.)_orig_mod\.")

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Contents:
    """The file's keys by what they are, under module paths.

    `lora` holds key by part (lora_A, lora_B.bias, …), `tokens` trainable-token deltas, `plain`
    every other tensor by its full name. `adapter_name` is one that was left inside the keys.
    """

    lora: Mapping[str, Mapping[str, str]]
    tokens: Mapping[str, str]
    plain: Mapping[str, str]
    adapter_name: str | None

    def rename(self, change: Callable[[str], str]) -> "Contents":
        """Return the same contents under changed paths."""
        lora = {change(path): parts for path, parts in self.lora.items()}
        tokens = {change(path): key for path, key in self.tokens.items()}
        plain = {change(path): key for path, key in self.plain.items()}
        return Contents(lora, tokens, plain, self.adapter_name)


def sort_keys(keys: Iterable[str]) -> Contents:
    """Sort the keys of a file; nothing is assumed about the base."""
    lora: dict[str, dict[str, str]] = {}
    tokens: dict[str, str] = {}
    plain: dict[str, str] = {}
    adapter_name = None
    for key in keys:
        match = _PART.fullmatch(key)
        if ".token_adapter." in key:
            tokens[key.split(".token_adapter.")[0]] = key
        elif match is None:
            plain[re.sub(r"\.modules_to_save\.[^.]+", "", key)] = key
        else:
            path, part, rest = match[1], match[2], match[3].split(".")[1:]
            kind = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
            adapter_name = rest[0] if rest else adapter_name
            lora.setdefault(path, {})[f"{part}.bias" if kind == "bias" else part] = key
    return Contents(lora, tokens, plain, adapter_name)


def place(contents: Contents, base: BaseModel | None) -> tuple[list[Finding], Contents | None]:
    """Bring the paths onto the base's module names, without PEFT's prefix.

    When the keys are shifted as one, that is the single finding, and the shift is undone so that
    the shapes can still be judged. Keys in the format of another tool have no place: None.
    """
    foreign = [k for parts in (*contents.lora.values(), contents.plain) for k in parts.values()]
    foreign = [key for key in foreign if _FOREIGN.search(key)]
    if foreign:
        return [_prefix_finding(foreign[0], "keys as PEFT writes them", len(foreign))], None
    findings = _leftover_name(contents)
    if base is None:
        stray = [p for p in contents.lora if not p.startswith(PREFIX) or _WRAPPED.search(p)]
        findings += [_prefix_finding(stray[0], f"{PREFIX}…", len(stray))] if stray else []
    elif shift := _find_shift(contents, base):
        old, new, count = shift
        first = next(path for path in contents.lora if path.startswith(old))
        # transformers moved the text tower in 4.52, so which path is right depends on its version.
        severity = "warning" if "language_model." in old and "language_model." in new else ""
        findings = [_prefix_finding(first, f"{new}… for {old or '(nothing)'}…", count, severity)]
        contents = contents.rename(lambda p: new + p.removeprefix(old) if p.startswith(old) else p)
    return findings, contents.rename(lambda path: path.removeprefix(PREFIX))


def _prefix_finding(where: str, expected: str, count: int, severity: str = "") -> Finding:
    return finding(
        "key-prefix", evidence=where, expected=expected, found=where, count=count, severity=severity
    )


def _leftover_name(contents: Contents) -> list[Finding]:
    if contents.adapter_name is None:
        return []
    found = f"the adapter name {contents.adapter_name}"
    expected = "no adapter name between lora_A and weight"
    where = next(iter(next(iter(contents.lora.values())).values()))
    return [finding("key-prefix", evidence=where, expected=expected, found=found, severity="info")]


def layer_zero(path: str) -> str:
    """Return the path with its first layer index replaced by 0."""
    match = _LAYER.search(path)
    return f"{path[: match.start(1)]}0{path[match.end(1) :]}" if match else path


def layer_of(path: str) -> int | None:
    """Return the first layer index of a path."""
    match = _LAYER.search(path)
    return int(match[1][:9]) if match else None


def _is_placed(path: str, base: BaseModel) -> bool:
    inside = path.removeprefix(PREFIX)
    is_known = layer_zero(inside) in base.modules or inside in base.modules or base.is_open(inside)
    return path.startswith(PREFIX) and is_known


def _find_shift(contents: Contents, base: BaseModel) -> tuple[str, str, int] | None:
    """Find the prefix that most paths carry and the one they should: (carried, right, count)."""
    lost = [path for path in contents.lora if not _is_placed(path, base)]
    if not lost:
        return None
    first_layers = [path for path in base.modules if layer_zero(path) == path]
    ends = {end: path for path in first_layers for end in _ends(path)}
    shifts = Counter(shift for path in lost if (shift := _shift(layer_zero(path), ends)))
    for shift, count in shifts.most_common(1):
        return (*shift, count) if 2 * count >= len(contents.lora) else None
    return None


def _ends(path: str) -> list[str]:
    """Return the ends of a path that still hold its layer index, or the whole path without one."""
    parts = path.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    return [end for end in ends if layer_of(f".{end}") is not None or end == path]


def _shift(path: str, ends: Mapping[str, str]) -> tuple[str, str] | None:
    parts = path.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if end in ends:
            right = PREFIX + ends[end]
            return path.removesuffix(end), right.removesuffix(end)
    return None
