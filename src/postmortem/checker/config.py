"""What an adapter says of itself: its configuration, and what the keys of its file name."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeGuard

from postmortem.checker.errors import Finding, finding, printable

if TYPE_CHECKING:
    from postmortem.checker.bases import BaseModel

CONFIG_FILE = "adapter_config.json"
# No base nests its modules as deep; a hostile name may, and all of its ends take squared room.
DEEPEST = 32
_METHODS = """
PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADALORA ADAMSS BOFT BONE BEFT LILY
ADAPTION_PROMPT IA3 LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA HRA VBLORA
UNILORA CPT MISS RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA GRALORA CARTRIDGE
TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT
"""
PEFT_TYPES = frozenset(_METHODS.split())  # Every method but LoRA, up to PEFT 0.21.
_TASKS = (
    *("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS"),
    "FEATURE_EXTRACTION",
)
_INITIALISATIONS = re.compile(
    r"gaussian|eva|olora|pissa|pissa_niter_\d+|corda|loftq|orthogonal|mica|lora_ga"
)
# Options that change which tensors an adapter holds in ways that this checker does not model.
_UNMODELLED = (
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("layer_replication", "megatron_config"),
)
_MAX_RANK = 1_000_000  # Ranks above the widest layer make no sense; JSON allows any number.
_MAX_SAVED = 1000  # Modules of modules_to_save; each is compared with each module of the base.


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA configuration that PEFT would accept, with PEFT's defaults filled in.

    `trainable_tokens` is None without the option; `init` is the text of init_lora_weights;
    `unmodelled` are the options in use under which shapes cannot be foretold here.
    """

    r: int
    alpha: float
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    target_parameters: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    trainable_tokens: Mapping[str, list[int]] | tuple[int, ...] | None
    bias: str
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    ensures_tying: bool
    init: str
    task_type: str | None
    class_name: str | None
    base_name: str | None
    unmodelled: tuple[str, ...]


Test = Callable[[object], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Tell whether a JSON value is a whole number from 0 to 2**63; true and false are not."""
    return type(value) is int and 0 <= value < 2**63


def _is_rank(value: object) -> bool:
    return is_count(value) and 0 < value <= _MAX_RANK


def _is_number(value: object) -> bool:
    # Whole numbers can be beyond any float; NaN fails every comparison.
    return isinstance(value, int | float) and not _is_flag(value) and abs(value) < 1e12


def _is_probability(value: object) -> bool:
    return _is_number(value) and isinstance(value, int | float) and 0 <= value <= 1


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(test(item) for item in value)


def _map_to(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


def _either(first: Test, second: Test) -> Test:
    return lambda value: first(value) or second(value)


def _is_short_list(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_SAVED and all(map(_is_text, value))


def _is_initialisation(value: object) -> bool:
    return _is_flag(value) or (isinstance(value, str) and bool(_INITIALISATIONS.fullmatch(value)))


_NAMES = ("a list of names or one regex", _either(_is_text, _list_of(_is_text)))
_FLAGS = (
    *("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode", "use_qalora"),
    "ensure_weight_tying",
)
# key -> what PEFT accepts, and its test. Null is tested only for the keys of _NOT_NULL.
_RULES: Mapping[str, tuple[str, Test]] = {
    "r": ("a whole number of at least 1", _is_rank),
    "lora_alpha": ("a finite number", _is_number),
    "lora_dropout": ("a number from 0 to 1", _is_probability),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "target_parameters": ("a list of names", _list_of(_is_text)),
    "modules_to_save": (f"a list of at most {_MAX_SAVED} names", _is_short_list),
    "layers_pattern": _NAMES,
    "layers_to_transform": ("a layer index or a list", _either(is_count, _list_of(is_count))),
    "rank_pattern": ("names with ranks of at least 1", _map_to(_is_rank)),
    "alpha_pattern": ("names with finite numbers", _map_to(_is_number)),
    "trainable_token_indices": (
        "token indices",
        _either(_list_of(is_count), _map_to(_list_of(is_count))),
    ),
    "bias": ("none, all or lora_only", lambda v: v in ("none", "all", "lora_only")),
    "init_lora_weights": ("true, false or an initialisation's name", _is_initialisation),
    "task_type": (f"one of {', '.join(_TASKS)}", lambda v: v in _TASKS),
    "base_model_name_or_path": ("a name or a path", _is_text),
    "auto_mapping": ("an object", lambda v: isinstance(v, dict)),
    **dict.fromkeys(_FLAGS, ("true or false", _is_flag)),
}
_NOT_NULL = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias"})


def invalid(where: str, *, expected: str, found: str) -> Finding:
    """Build a config-invalid finding."""
    return finding("config-invalid", evidence=where, expected=expected, found=found)


def check_config(raw: Mapping[str, object]) -> list[Finding]:
    """Apply PEFT's rules to a raw configuration; every problem is a config-invalid error."""
    problems = [
        invalid(key, expected=expected, found=f"{raw[key]!r}")
        for key, (expected, accepts) in _RULES.items()
        if key in raw and (raw[key] is not None or key in _NOT_NULL)
        if not accepts(raw[key])
    ]
    return problems + _contradictions(raw)


def check_method(raw: Mapping[str, object]) -> list[Finding]:
    """Check that a configuration names a method that PEFT knows."""
    method = raw.get("peft_type")
    if method == "LORA" or (isinstance(method, str) and method in PEFT_TYPES):
        return []
    found = f"{method!r}" if "peft_type" in raw else "no such key"
    return [invalid("peft_type", expected='"LORA"', found=found)]


def _contradictions(raw: Mapping[str, object]) -> list[Finding]:
    one_regex = isinstance(raw.get("target_modules"), str)
    layers, pattern = raw.get("layers_to_transform"), raw.get("layers_pattern")
    together = "options that PEFT accepts together"
    cases = {
        "layers_to_transform with target_modules as a regex": one_regex and layers is not None,
        "layers_pattern with target_modules as a regex": one_regex and pattern,
        "layers_pattern without layers_to_transform": pattern and layers is None,
        "lora_bias with use_dora": raw.get("lora_bias") is True and raw.get("use_dora") is True,
    }
    return [
        invalid(case, expected=together, found="a contradiction")
        for case, holds in cases.items()
        if holds
    ]


def _names(value: list[str] | str | None) -> tuple[str, ...] | str | None:
    return tuple(value) if isinstance(value, list) else value


def _listed(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def build_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """Build the typed configuration of a raw one in which `check_config` found nothing."""
    tokens = raw.get("trainable_token_indices")
    return AdapterConfig(
        r=raw.get("r", 8),
        alpha=float(raw.get("lora_alpha", 8)),
        target_modules=_names(raw.get("target_modules")),
        exclude_modules=_names(raw.get("exclude_modules")),
        target_parameters=_listed(raw.get("target_parameters")),
        layers_to_transform=_listed(raw.get("layers_to_transform")) or None,
        layers_pattern=_listed(raw.get("layers_pattern")),
        rank_pattern=raw.get("rank_pattern", {}),
        alpha_pattern=raw.get("alpha_pattern", {}),
        modules_to_save=_listed(raw.get("modules_to_save")),
        trainable_tokens=tuple(tokens) if isinstance(tokens, list) else tokens,
        bias=raw.get("bias", "none"),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        ensures_tying=bool(raw.get("ensure_weight_tying")),
        init=str(raw.get("init_lora_weights", True)),
        task_type=raw.get("task_type"),
        class_name=_class_name(raw.get("auto_mapping")),
        base_name=raw.get("base_model_name_or_path") or None,
        unmodelled=tuple(key for key in _UNMODELLED if raw.get(key)),
    )


def _class_name(mapping: Mapping[str, object] | None) -> str | None:
    name = (mapping or {}).get("base_model_class")
    return name if isinstance(name, str) else None


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """The adapter format of another tool: how its keys look, and what converting them means."""

    tool: str
    keys: re.Pattern[str]
    files: re.Pattern[str]
    settings: tuple[str, ...]
    remedy: str


_NONE = re.compile(r"(?!)")
FORMATS = (
    ForeignFormat(
        "MLX",
        re.compile(r"\.lora_[ab]$"),
        re.compile(r"(\d+_)?adapters\.(safetensors|npz)"),
        ("lora_parameters", "fine_tune_type"),
        "Use it with mlx_lm; for PEFT rename X.lora_a and X.lora_b to base_model.model.X.lora_A."
        "weight and .lora_B.weight, transpose both, and write an adapter_config.json in which "
        "lora_alpha is the scale times r.",
    ),
    ForeignFormat(
        "ComfyUI, XLabs or LyCORIS",
        re.compile(
            r"^diffusion_model\.|\.processor\.\w*lora\d+\.(down|up)\.|^lycoris_"
            r"|\.(hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_blocks|oft_diag)$"
        ),
        _NONE,
        (),
        "Load it with ComfyUI or the trainer that wrote it, or with diffusers' load_lora_weights "
        "where it reads this kind; PEFT has another name for each key, and hada_w and lokr_w are "
        "of LoHa and LoKr, which are no LoRA.",
    ),
    ForeignFormat(
        "kohya's scripts",
        re.compile(r"^lora_(unet|te\d?|transformer)_|\.lora_(up|down)\."),
        _NONE,
        (),
        "Use it with the tools that read kohya's files; for PEFT write the underscores of each "
        "name as the dots of the base's path, lora_down as lora_A and lora_up as lora_B, and put "
        "each .alpha into lora_alpha or alpha_pattern; nothing is transposed.",
    ),
    ForeignFormat(
        "diffusers",
        re.compile(
            r"\.lora\.(up|down)\.|\.lora_linear_layer\.|_lora\.(up|down)\."
            r"|^(unet|text_encoder(_2)?|transformer)\.(?!h\.).*\.lora_[AB]\.weight$"
        ),
        re.compile(r"pytorch_lora_weights\w*\.(safetensors|bin)"),
        (),
        "Load it with pipeline.load_lora_weights; for PEFT's own loading put base_model.model. in "
        "place of the component's name, call the factors lora_A and lora_B, and write r, "
        "lora_alpha and target_modules into an adapter_config.json; nothing is transposed.",
    ),
    ForeignFormat(
        "AdapterHub's adapters library",
        re.compile(r"\.loras\.\w+\.lora_[AB]$"),
        re.compile(r"pytorch_adapter\.bin|pytorch_model_head\.bin|head_config\.json"),
        ("model_class", "hidden_size"),
        "Load it with adapters: model.load_adapter(folder); PEFT cannot read it. Train anew with "
        "PEFT where it is needed there.",
    ),
    ForeignFormat(
        "torchtune",
        re.compile(r"\.lora_[ab]\.weight$"),
        re.compile(r"adapter_\d+\.(pt|safetensors)"),
        (),
        "Save it again from torchtune as PEFT's: its checkpointer writes adapter_config.json and "
        "adapter_model.safetensors with save_adapter_weights_only=True; or use torchtune's "
        "tune_to_peft_adapter_weights, which renames the keys and permutes q and k.",
    ),
    ForeignFormat(
        "NeMo",
        _NONE,
        re.compile(r".*\.nemo"),
        (),
        "Convert it with NeMo's own script for PEFT checkpoints, or merge it there; its fused "
        "projections are laid out otherwise than PEFT's.",
    ),
    ForeignFormat(
        "llama.cpp",
        _NONE,
        re.compile(r".*\.gguf"),
        (),
        "Use it with llama.cpp's --lora; PEFT needs the folder that it was converted from.",
    ),
    ForeignFormat(
        "LitGPT",
        re.compile(r"^(transformer\.h|lm_head)\..*\.lora_[AB]$|\.attn\.qkv\.lora_[AB]$"),
        re.compile(r".*\.pth\.lora"),
        (),
        "Merge it with `litgpt merge_lora` and convert the merged model: its fused projections "
        "have no counterpart in the base.",
    ),
)

PREFIX = "base_model.model."
_PART = re.compile(r"(.+?)\.(lora_[A-Za-z]\w*)((?:\.[^.]+)*)")
# What wrappers put into the paths of the modules that they hold.
_WRAPPER = re.compile(
    r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module"
    r"|_dp_module|_ddp_module)\."
)
# Wrappers under names that a module of the base could have, and a PeftModel inside another.
_WRAPPED = re.compile(r"^base_model\.model\.(base_model|module|model\.module)\.|^module\.")
_ENCLOSING = re.compile(r"(?<![^.])(module|inner|pretrained_model|_?wrapped_model|policy)\.")

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Contents:
    """The file's keys by what they are, under module paths.

    `lora` holds key by part (lora_A, lora_B.bias, …), `tokens` trainable-token deltas, `plain`
    every other tensor by its full name. `adapter_name` is one that was left inside the keys, and
    `wrapped` are the keys that name a wrapper, which the paths do not.
    """

    lora: Mapping[str, Mapping[str, str]]
    tokens: Mapping[str, str]
    plain: Mapping[str, str]
    adapter_name: str | None
    wrapped: tuple[str, ...] = ()

    def rename(self, change: Callable[[str], str]) -> "Contents":
        """Return the same contents under changed paths."""
        lora = {change(path): parts for path, parts in self.lora.items()}
        tokens = {change(path): key for path, key in self.tokens.items()}
        plain = {change(path): key for path, key in self.plain.items()}
        return replace(self, lora=lora, tokens=tokens, plain=plain)


def sort_keys(keys: Iterable[str]) -> Contents:
    """Sort the keys of a file; nothing is assumed about the base."""
    lora: dict[str, dict[str, str]] = {}
    tokens: dict[str, str] = {}
    plain: dict[str, str] = {}
    adapter_name = None
    names = {key: _WRAPPER.sub("", key) for key in keys}
    for key, name in names.items():
        match = _PART.fullmatch(name)
        if ".token_adapter." in name:
            tokens[name.split(".token_adapter.")[0]] = key
        elif match is None:
            plain[re.sub(r"\.modules_to_save\.[^.]+", "", name)] = key
        else:
            path, part, rest = match[1], match[2], match[3].split(".")[1:]
            kind = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
            adapter_name = rest[0] if rest else adapter_name
            lora.setdefault(path, {})[f"{part}.bias" if kind == "bias" else part] = key
    wrapped = tuple(key for key, name in names.items() if key != name)
    return Contents(lora, tokens, plain, adapter_name, wrapped)


def place(contents: Contents, base: "BaseModel | None") -> tuple[list[Finding], Contents]:
    """Bring the paths onto the base's module names, without PEFT's prefix.

    When the keys are shifted as one, that is the single finding, and the shift is undone so that
    the shapes can still be judged.
    """
    contents, shift = _settle(contents, base) if base else (contents, None)
    findings = _leftover_name(contents)
    stray = [] if base else [p for p in contents.lora if not _is_usual(p)]
    if contents.wrapped:
        findings = [_wrapper_finding(contents.wrapped)]
    elif stray:
        # Only a module of a model of one's own could have such a name in its middle.
        is_certain = any(not path.startswith(PREFIX) or _WRAPPED.search(path) for path in stray)
        severity = "" if is_certain else "warning"
        findings = [_prefix_finding(stray[0], f"{PREFIX}…", len(stray), severity)]
    if shift:
        old, new, count = shift
        first = next(path for path in contents.lora if path.startswith(old))
        severity = "warning" if _depends_on_version(shift) else ""
        if not contents.wrapped:
            findings = [_shift_finding(first, old, new, count=count, severity=severity)]
        contents = contents.rename(lambda p: new + p.removeprefix(old) if p.startswith(old) else p)
    return findings, contents.rename(lambda path: path.removeprefix(PREFIX))


def right_keys(contents: Contents, base: "BaseModel | None") -> dict[str, str]:
    """Map every key to the one that PEFT would have written, where `place` finds it to be another.

    A key of another's place is missing here. Paths that depend on the release are left.
    """
    shift = None
    if base is None:
        # What stands before PEFT's own prefix is never a part of the model.
        contents = contents.rename(lambda path: path[max(path.find(PREFIX), 0) :])
    else:
        contents, shift = _settle(contents, base)
    if base is not None and shift and not _depends_on_version(shift):
        old, new, _ = shift
        right = partial(_put_right, old=old, new=new, base=base)
        contents = contents.rename(right)
    return {
        **{key: path for path, key in contents.plain.items()},
        **{
            key: f"{path}.token_adapter.{key.split('.token_adapter.')[1]}"
            for path, key in contents.tokens.items()
        },
        **{
            key: f"{path}.{part}" + (".weight" if key.endswith(".weight") else "")
            for path, parts in contents.lora.items()
            for part, key in parts.items()
        },
    }


def _put_right(path: str, *, old: str, new: str, base: "BaseModel") -> str:
    # Of whole weights the last part is no module's.
    is_right = _is_placed(path, base) or _is_placed(path.rpartition(".")[0], base)
    return path if is_right or not path.startswith(old) else new + path.removeprefix(old)


def _depends_on_version(shift: tuple[str, str, int]) -> bool:
    # transformers moved the text tower in 4.52, so which path is right depends on its version.
    return all("language_model." in prefix for prefix in shift[:2])


def _is_usual(path: str) -> bool:
    return path.startswith(PREFIX) and not _WRAPPED.search(path) and ".module." not in path


def _wrapper_finding(keys: Sequence[str]) -> Finding:
    matches = [*_WRAPPER.finditer(keys[0])] or [*_ENCLOSING.finditer(keys[0])]
    names = list(dict.fromkeys(match[1] for match in matches)) or ["module"]
    name = " and ".join(names)
    # The longest first: one name can be the end of another.
    calls = "".join(f".replace('{n}.', '')" for n in sorted(names, key=len, reverse=True))
    mend = f"{{k{calls}: v for k, v in tensors.items()}}"
    return finding(
        "key-prefix",
        evidence=keys[0],
        expected=f"no {name} in the key",
        found=f"the name of a wrapper, {name}",
        count=len(keys),
        remedy=f"Take the wrapper's name out of every key, {mend}, and save the file again.",
    )


def _settle(contents: Contents, base: "BaseModel") -> tuple[Contents, tuple[str, str, int] | None]:
    """Take wrappers out of the paths, and find the shift of those that still have no place."""
    lost = [path for path in contents.lora if not _is_placed(path, base)]
    if not lost:
        return contents, None
    contents = _unwrap(contents, base, lost)
    return contents, _find_shift(contents, base)


def _unwrap(contents: Contents, base: "BaseModel", lost: Sequence[str]) -> Contents:
    """Take out names that are those of a wrapper where the paths have a place only without them."""
    cleaned = {path: _ENCLOSING.sub("", path) for path in lost}
    held = [path for path, name in cleaned.items() if path != name and _is_placed(name, base)]
    if not held or 2 * len(held) < len(contents.lora):
        return contents
    wrapped = tuple(key for path in held for key in contents.lora[path].values())
    return replace(contents.rename(lambda path: _ENCLOSING.sub("", path)), wrapped=wrapped)


def _prefix_finding(where: str, expected: str, count: int, severity: str = "") -> Finding:
    before, is_inside, _ = where.partition(PREFIX)
    change = f"k.removeprefix({before!r})" if is_inside else f"{PREFIX!r} + k"
    remedy = _renaming(change) if before else ""
    return finding(
        "key-prefix",
        evidence=where,
        expected=expected,
        found=where,
        count=count,
        severity=severity,
        remedy=remedy,
    )


def _renaming(change: str) -> str:
    return printable(
        f"Rename the keys, {{{change}: v for k, v in tensors.items()}}, and save the file again; "
        "or load with the model class that was used in training.",
        600,
    )


def _shift_finding(path: str, old: str, new: str, *, count: int, severity: str) -> Finding:
    change = f"{new!r} + k" + (f".removeprefix({old!r})" if old else "")
    return finding(
        "key-prefix",
        evidence=path,
        expected=f"{new}… for {old or '(nothing)'}…",
        found=path,
        count=count,
        severity=severity,
        remedy=_renaming(change),
    )


def _leftover_name(contents: Contents) -> list[Finding]:
    if contents.adapter_name is None:
        return []
    found = f"the adapter name {contents.adapter_name}"
    expected = "no adapter name between lora_A and weight"
    where = next(iter(next(iter(contents.lora.values())).values()))
    remedy = "Nothing to mend on PEFT 0.21; for releases up to 0.17.1: " + _renaming(
        f"k.replace('.{contents.adapter_name}.', '.')"
    )
    return [
        finding(
            "key-prefix",
            evidence=where,
            expected=expected,
            found=found,
            severity="info",
            remedy=remedy,
        )
    ]


@lru_cache(100_000)
def layer_zero(path: str) -> str:
    """Return the path with its first layer index replaced by 0."""
    match = _LAYER.search(path)
    return f"{path[: match.start(1)]}0{path[match.end(1) :]}" if match else path


def layer_of(path: str) -> int | None:
    """Return the first layer index of a path."""
    match = _LAYER.search(path)
    return int(match[1][:9]) if match else None


def _is_placed(path: str, base: "BaseModel") -> bool:
    inside = path.removeprefix(PREFIX)
    is_known = inside in base.modules or layer_zero(inside) in base.modules or base.is_open(inside)
    return path.startswith(PREFIX) and is_known


def _find_shift(contents: Contents, base: "BaseModel") -> tuple[str, str, int] | None:
    """Find the prefix that most paths carry and the one they should: (carried, right, count)."""
    lost = [path for path in contents.lora if not _is_placed(path, base)]
    if not lost:
        return None
    # Not every kind of module is in the first layer: some have attention in each fourth alone.
    first_layers = dict.fromkeys(map(layer_zero, base.modules))
    ends = {end: path for path in first_layers for end in _ends(path)}
    shifts = Counter(shift for path in lost if (shift := _shift(layer_zero(path), ends)))
    judged = [path for path in contents.lora if not base.is_open(path)]
    for shift, count in shifts.most_common(1):
        return (*shift, count) if 2 * count >= len(judged) else None
    return None


@cache
def ends_of(path: str) -> tuple[str, ...]:
    """The dotted path and every end of it, the longest first; of a deep one those of `DEEPEST`."""
    parts = path.split(".")
    starts = range(max(1, len(parts) - DEEPEST), len(parts))
    return (path, *(".".join(parts[start:]) for start in starts))


def _ends(path: str) -> list[str]:
    """Return the ends of a path that still hold its layer index, or the whole path without one."""
    return [end for end in ends_of(path) if layer_of(f".{end}") is not None or end == path]


def _shift(path: str, ends: Mapping[str, str]) -> tuple[str, str] | None:
    for end in ends_of(path):
        if end in ends:
            right = PREFIX + ends[end]
            return path.removesuffix(end), right.removesuffix(end)
    return None
