"""Mend in a new folder what a check found and what is mechanical: nothing trained is changed.

The source is only read. A pickle is converted in a process of its own that builds plain tensors
and nothing else; all that is written comes from what the checker itself parsed.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from postmortem.checker.adapter import (
    PICKLE_FILE,
    WEIGHTS_FILE,
    Adapter,
    Folder,
    open_source,
    read_adapter,
)
from postmortem.checker.bases import BaseModel
from postmortem.checker.checks import Inspection, as_text, inspect_adapter, resolve_base
from postmortem.checker.config import CONFIG_FILE, AdapterConfig, right_keys
from postmortem.checker.errors import (
    Finding,
    ModelError,
    PostmortemError,
    UntrustedError,
    is_hub_id,
    printable,
)
from postmortem.checker.fit import Target, held_targets, scale_of, turned_keys
from postmortem.checker.identify import known_keys
from postmortem.checker.serving import (
    ServedAdapter,
    Serving,
    choose_runtimes,
    find_places,
    rules,
)
from postmortem.models.changes import Change, Tensors, edit_config, edit_tensors

RECORD_FILE = "FIXED.md"
PICKLE_SECONDS = 120.0  # Nearly all of it is the import of torch on a slow machine.
# The first release whose `weights_only` is not known to run code (CVE-2025-32434).
SAFE_TORCH = (2, 6)


@dataclass(frozen=True, slots=True)
class Request:
    """An adapter folder, the new folder, and the base as the user wrote it."""

    source: Folder
    out: Path
    base: str | None


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done, in words, and the check of the new folder; None where none was written."""

    text: str
    inspection: Inspection | None


@dataclass(frozen=True, slots=True)
class Fix:
    """One change: a line that says it, keys of the configuration, and a function of the tensors."""

    line: str
    config: Mapping[str, object] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    change: Change | None = None


@dataclass(frozen=True, slots=True)
class Declined:
    """A finding of a kind that is mechanical, and why this one is left as it is."""

    line: str


Answer = Fix | Declined | None


@dataclass(frozen=True, slots=True)
class _CheckedCopy:
    """A checked copy: what was found, and what the findings were made from."""

    adapter: Adapter
    config: AdapterConfig
    base: BaseModel | None
    base_name: str | None
    findings: tuple[Finding, ...]
    serving: Serving

    def has(self, finding_id: str) -> bool:
        return any(found.id == finding_id for found in self.findings)


def request(adapters: Sequence[str], out: str, *, form: str, base: str | None) -> Request:
    """Read what --fix was given, before anything is checked; ModelError where it cannot be done."""
    if len(adapters) != 1:
        raise ModelError("--fix", expected="one adapter", found=f"{len(adapters)}")
    if form != "text":
        raise ModelError("--fix", expected="--format text", found=form)
    source, folder = open_source(adapters[0]), Path(out)
    if not isinstance(source, Folder):
        remedy = f"Fetch it first: hf download {printable(adapters[0])} --local-dir adapter"
        raise ModelError("--fix", expected="a folder", found="a hub id", remedy=remedy)
    where = printable(out, 400)
    if os.path.lexists(folder):
        remedy = "Name another: nothing is overwritten."
        raise ModelError(where, expected="a new folder", found="one that exists", remedy=remedy)
    if "\0" in out or not folder.parent.is_dir():
        raise ModelError(where, expected="a folder that holds it", found="no such folder")
    if folder.resolve().is_relative_to(source.path.resolve()):
        raise ModelError(where, expected="a folder outside the adapter", found="one inside it")
    return Request(source, folder, base)


def repair(given: Request, *, serving: Serving) -> Repair:
    """Write the new folder, at once and whole, or none where nothing can be mended.

    Raises ModelError for a pickle that holds more than tensors, and for files torch cannot read.
    """
    try:
        return _write(given, serving)
    except OSError as error:
        # A full disk, a folder that may not be written, a name that the system does not take.
        found = f"{error.strerror or error}"
        raise ModelError(printable(given.out, 400), expected="a new folder", found=found) from None


def _write(given: Request, serving: Serving) -> Repair:
    with tempfile.TemporaryDirectory(dir=given.out.parent, prefix=".fix-") as beside:
        stage = Path(beside, given.out.name)
        stage.mkdir()
        copied = _copy(given.source, stage)
        mended, declined = _mend(stage, given.base, serving)
        fixes = [*copied, *mended]
        reasons = [f"  left   {each.line}" for each in declined]
        if not fixes:
            nothing = "nothing that --fix can mend: nothing was written"
            return Repair("\n".join([nothing, *reasons]), None)
        checked = inspect_adapter(str(stage), given.base, serving=serving)
        checked = replace(checked, adapter=str(given.out))
        done, left = [fix.line for fix in fixes], _left(checked, given.source)
        (stage / RECORD_FILE).write_text(_record(done, left), encoding="utf-8")
        # A full folder that was made in the meantime is an error, and stays.
        stage.rename(given.out)
    lines = [f"written: {printable(given.out, 400)}", *(f"  fixed  {line}" for line in done)]
    return Repair("\n".join([*lines, *reasons, "", as_text(checked)]), checked)


def _left(checked: Inspection, source: Folder) -> list[str]:
    lines = [f"{f.severity} {f.id}: {f.evidence}. {f.remedy}" for f in checked.report.findings]
    others = [n for n in source.names() if n not in (CONFIG_FILE, WEIGHTS_FILE)]
    copied = [f"not copied: {', '.join(printable(name, 60) for name in others)}"] if others else []
    return lines + copied


def _record(done: Sequence[str], left: Sequence[str]) -> str:
    parts = {"Changed": done, "Left": left or ["nothing"]}
    return "\n".join(
        line for title, lines in parts.items() for line in (f"# {title}\n", *_items(lines), "")
    )


def _items(lines: Sequence[str]) -> list[str]:
    # Text from the adapter must not form markup.
    return ["- " + "".join(f"&#{ord(c)};" if c in "<>&`[]*|\\" else c for c in x) for x in lines]


def _copy(source: Folder, stage: Path) -> list[Fix]:
    """Copy the two files; a pickle in the weights' place is converted, which is the first fix."""
    config, weights = source.resolve(CONFIG_FILE), source.resolve(WEIGHTS_FILE)
    pickle = source.resolve(PICKLE_FILE)
    if config is not None:
        shutil.copyfile(config, stage / CONFIG_FILE)
    if weights is not None:
        shutil.copyfile(weights, stage / WEIGHTS_FILE)
    elif pickle is not None:
        convert_pickle(pickle, stage / WEIGHTS_FILE)
        return [Fix(f"unsafe-pickle: {PICKLE_FILE} converted to safetensors without executing it")]
    return []


# Runs with the path of a pickle and that of the file to write. Its only imports are libraries.
_CONVERTER = """
import re, sys
import torch
from safetensors.torch import save_file
try:
    import resource
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
except (ImportError, ValueError, OSError):
    pass
def refuse(found):
    print(found, file=sys.stderr)
    sys.exit(3)
try:
    found = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
except BaseException as error:
    text = str(error)
    name = re.search(r"GLOBAL (\\S+)", text)
    first = (text.splitlines() or [""])[0]
    refuse(f"one that asks for {name[1]}" if name else f"{type(error).__name__}: {first}")
if not isinstance(found, dict):
    refuse(f"a {type(found).__name__}")
for name, value in found.items():
    if type(name) is not str:
        refuse(f"a key that is a {type(name).__name__}")
    if not isinstance(value, torch.Tensor):
        refuse(f"{name}: a {type(value).__name__}")
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        refuse(f"{name}: a tensor that is not plain")
try:
    tensors = {k: v.detach().contiguous().clone() for k, v in found.items()}
    save_file(tensors, sys.argv[2], metadata={"format": "pt"})
except BaseException as error:
    refuse(f"tensors that cannot be saved: {type(error).__name__}")
"""


def convert_pickle(pickle: Path, out: Path) -> None:
    """Convert a pickle of named tensors to safetensors in a process with time and memory limits.

    Only what `torch.load(weights_only=True)` takes is built. Raises ModelError for all else.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        wanted = ".".join(map(str, SAFE_TORCH))
        raise ModelError(pickle, expected=f"torch {wanted} or newer", found=torch.__version__)
    allowance = 4 * pickle.stat().st_size + 1_000_000_000
    # -P: no module is taken from the folder that the command was given in.
    paths = [str(pickle.resolve()), str(out.resolve()), str(allowance)]
    command = [sys.executable, "-P", "-c", _CONVERTER, *paths]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PICKLE_SECONDS, check=False)
        found = done.stderr[-4000:].decode("utf-8", "replace").strip().rpartition("\n")[2]
        is_done = done.returncode == 0
    except subprocess.TimeoutExpired:
        found, is_done = f"one that was not read in {PICKLE_SECONDS:g} seconds", False
    if not is_done:
        raise ModelError(
            printable(pickle, 400),
            expected="a flat dict of names and tensors",
            found=printable(found) or "one that ended its reader",
            remedy="Nothing of it was executed. Save the adapter again with save_pretrained.",
        )


def _mend(stage: Path, base: str | None, serving: Serving) -> tuple[list[Fix], list[Declined]]:
    """Apply each fix for which there is a finding to the copy; return those and what was left."""
    subject = _examine(stage, base, serving)
    if subject is None:
        return [], []
    try:
        answers = [fixer(subject) for fixer in _FIXERS]
    except UntrustedError as error:
        return [], [Declined(f"config-invalid: {error}; nothing is mended beside it")]
    fixes = [answer for answer in answers if isinstance(answer, Fix)]
    declined = [answer for answer in answers if isinstance(answer, Declined)]
    changes = [fix.change for fix in fixes if fix.change]
    config = {key: value for fix in fixes for key, value in fix.config.items()}
    if config or any(fix.removed for fix in fixes):
        edit_config(stage, *(key for fix in fixes for key in fix.removed), **config)
    if changes:
        _edit(stage, changes)
    return fixes, declined


def _edit(stage: Path, changes: Sequence[Change]) -> None:
    def change(tensors: Tensors) -> Tensors:
        for each in changes:
            tensors = each(tensors)
        return tensors

    try:
        edit_tensors(stage, change)
    except PostmortemError:
        raise
    except Exception as error:
        # safetensors and torch differ in what they raise for a dtype that they do not know.
        found = f"{type(error).__name__}: {printable(error, 80)}"
        raise ModelError(WEIGHTS_FILE, expected="tensors that torch reads", found=found) from None


def _examine(stage: Path, base: str | None, serving: Serving) -> _CheckedCopy | None:
    adapter = read_adapter(Folder(stage))
    if adapter.config is None or not adapter.tensors:
        return None
    model, given = resolve_base(adapter, base)
    # A folder is named by its path: its bare name would be found nowhere else.
    is_name = given is not None and (base is None or given == base or is_hub_id(given))
    name = given if is_name else base and str(Path(base).absolute())
    checked = inspect_adapter(str(stage), base, serving=serving)
    return _CheckedCopy(adapter, adapter.config, model, name, checked.report.findings, serving)


def _name_base(subject: _CheckedCopy) -> Answer:
    if not subject.has("base-name-mismatch") or subject.base_name is None:
        return None
    old, new = (printable(name, 200) for name in (subject.config.base_name, subject.base_name))
    line = f"base-name-mismatch: base_model_name_or_path from {old} to {new}"
    return Fix(line, {"base_model_name_or_path": subject.base_name})


def _drop_unknown(subject: _CheckedCopy) -> Answer:
    raw = subject.adapter.raw
    unknown = tuple(key for key in raw if key not in known_keys())
    if not subject.has("config-unknown-key") or not unknown:
        return None
    named = ", ".join(f"{printable(k, 60)}: {printable(repr(raw[k]), 60)}" for k in unknown)
    return Fix(f"config-unknown-key: dropped {named}", removed=unknown)


def _turn_factors(subject: _CheckedCopy) -> Answer:
    if not subject.has("factors-transposed"):
        return None
    keys = turned_keys(subject.adapter, subject.config, subject.base)
    if not keys:
        reason = "a factor is square, or it is of fused experts: which are turned cannot be told"
        return Declined(f"factors-transposed: {reason}")
    return Fix(
        f"factors-transposed: {len(keys)} factors turned",
        change=lambda tensors: {k: t.T if k in keys else t for k, t in tensors.items()},
    )


def _rename_keys(subject: _CheckedCopy) -> Answer:
    if not subject.has("key-prefix"):
        return None
    names = right_keys(subject.adapter.contents, subject.base)
    changed = [key for key, name in names.items() if key != name]
    is_whole = names.keys() == subject.adapter.tensors.keys()
    if not changed:
        return Declined("key-prefix: no path of the base is certain for these keys")
    # Two keys that fall together would lose a tensor.
    if not is_whole or len({*names.values()}) < len(names):
        return Declined("key-prefix: two keys would become one, and a tensor would be lost")
    example = " to ".join(printable(text, 120) for text in (changed[0], names[changed[0]]))
    return Fix(
        f"key-prefix: {len(changed)} keys renamed, {example}",
        change=lambda tensors: {names[k]: t for k, t in tensors.items()},
    )


def _fold_scale(subject: _CheckedCopy) -> Answer:
    """Fold what the runtimes do not read into one r, one alpha and lora_B; all scales stay."""
    unread, config = _unread(subject), subject.config
    if not unread:
        return None
    if config.unmodelled or config.target_parameters:
        kept = ", ".join(config.unmodelled) or "target_parameters"
        return Declined(f"serving-rescales: scales are not folded under {kept}")
    held = held_targets(subject.adapter, config, subject.base)
    targets = [(parts, target) for parts, target in held if target is not None]
    own = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
    # Zero is no scale to fold, and such an initialisation changes the base by the scale.
    is_zero = own == 0 or any(target.scale == 0 for _, target in targets)
    unsure = sorted({f.id for f in subject.findings if f.id in (*_UNSURE, "init-rewrites-base")})
    if is_zero or unsure or not targets or len(targets) < len(held):
        reason = "a scale of zero" if is_zero else ", ".join(unsure) or "modules without a target"
        return Declined(f"serving-rescales: scales are not folded beside {reason}")
    rank = max(t.rank for _, t in targets) if config.rank_pattern else config.r
    alpha = own * rank
    written = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
    new: dict[str, object] = {"r": rank, "lora_alpha": written}
    new |= {"use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}}
    line = f"serving-rescales: {', '.join(unread)} folded into r {rank}, lora_alpha {alpha:.10g}"
    scaled = [(parts, target) for parts, target in targets if target.scale != own]
    padded = [(parts, target) for parts, target in targets if target.rank != rank]
    line += f"; {len(scaled)} lora_B scaled" if scaled else ""
    line += f"; {len(padded)} modules padded with zeros to that rank" if padded else ""
    needs = bool(scaled or padded)
    return Fix(line, new, change=_folder(targets, own, rank) if needs else None)


# With these the ranks of the file are not those of the configuration.
_UNSURE = ("rank-mismatch", "shape-mismatch", "saved-in-shards", "missing-tensors")
_SCALES = ("use_rslora", "alpha_pattern", "rank_pattern")


def _unread(subject: _CheckedCopy) -> list[str]:
    """Return the keys of the scale in use that a runtime asked for does not read."""
    served = ServedAdapter(subject.adapter, subject.config, subject.base, subject.serving)
    chosen = choose_runtimes(subject.serving.runtimes)
    named = {
        key
        for rule in rules()
        if rule.runtime in chosen and rule.effect == "rescales" and find_places(rule, served)
        if rule.condition.startswith("set: ")
        for key in rule.condition.removeprefix("set: ").split()
    }
    return [key for key in _SCALES if key in named and subject.adapter.raw.get(key)]


def _folder(targets: Sequence[tuple[Mapping[str, str], Target]], own: float, rank: int) -> Change:
    """Scale each B by its scale over the one that all share, and pad both factors to one rank."""
    plans = {key: (part, target) for parts, target in targets for part, key in parts.items()}

    def change(tensors: Tensors) -> Tensors:
        folded = dict(tensors)
        for key, (part, target) in plans.items():
            if part in ("lora_B", "lora_embedding_B", "lora_B.bias"):
                folded[key] = _scaled(folded[key], target.scale / own)
            if part in ("lora_A", "lora_embedding_A"):
                folded[key] = _padded(folded[key], rank, dim=0)
            elif part in ("lora_B", "lora_embedding_B"):
                folded[key] = _padded(folded[key], rank, dim=1)
        return folded

    return change


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale in the tensor's own dtype where that is exact, and else in 32 bits or its 64."""
    exact = tensor.double() * factor
    kept = exact.to(tensor.dtype)
    if kept.double().equal(exact):
        return kept
    return exact.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _padded(tensor: torch.Tensor, rank: int, *, dim: int) -> torch.Tensor:
    lacking = rank - tensor.shape[dim]
    if lacking <= 0:
        return tensor
    shape = [*tensor.shape]
    shape[dim] = lacking
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


# Names last: the changes before take tensors by the names that were found.
_FIXERS: tuple[Callable[[_CheckedCopy], Answer], ...] = (
    _name_base,
    _drop_unknown,
    _turn_factors,
    _fold_scale,
    _rename_keys,
)
