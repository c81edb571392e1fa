"""What the files of a case's adapters say: findings, contents, age, and the bases that they fit."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from postmortem.adapter import Adapter, read_adapter
from postmortem.archaeology import date_config, span
from postmortem.contents import layer_of
from postmortem.errors import ModelError
from postmortem.inspection import Inspection, inspect_adapter
from postmortem.records import Cell
from postmortem.session import Session
from postmortem.sources import open_source
from postmortem.targets import scale_of
from postmortem.untrusted import printable

ROLES = ("suspect", "reference")
MEASURES = ("findings", "errors", "tensors", "parameters", "megabytes", "layers", "bases")
FINDINGS = ("finding", "severity", "what it says", "remedy")
CONTENTS = ("module", "part", "shape", "dtype", "tensors")
# Names of bases that are listed; more of the same shapes tell no more.
NAMED = 6


def record_files(session: Session) -> None:
    """Record what the files of each adapter say, read as the checker reads them: nothing runs."""
    for role in ROLES:
        if not session.world.has(role):
            _record_absent(session, role, reason=session.world.members[role].reason)
            continue
        try:
            adapter, found = _read(session, role)
        except ModelError as error:
            _record_absent(session, role, reason=_say(error))
            continue
        _record_role(session, role, adapter=adapter, found=found)


def _read(session: Session, role: str) -> tuple[Adapter, Inspection]:
    folder = str(session.world.path(role))
    return read_adapter(open_source(folder)), inspect_adapter(
        folder, str(session.world.path("base"))
    )


def _record_role(session: Session, role: str, *, adapter: Adapter, found: Inspection) -> None:
    key, findings = f"files.{role}", found.report.findings
    errors = sum(finding.severity == "error" for finding in findings)
    layers = {layer_of(path) for path in adapter.contents.lora} - {None}
    numbers = (
        *(len(findings), errors, len(adapter.tensors)),
        sum(tensor.count for tensor in adapter.tensors.values()),
        None if adapter.weight_bytes is None else adapter.weight_bytes / 1e6,
        *(len(layers), len(found.bases)),
    )
    for name, value in zip(MEASURES, numbers, strict=True):
        unit = "MB" if name == "megabytes" else ""
        session.measure(f"{key}.{name}", value, unit=unit, reason="there is no file of weights")
    words = {"fits": True, "suspect": None, "broken": False}
    listed = ", ".join(dict.fromkeys(finding.id for finding in findings))
    because = f"found: {listed}" if listed else "nothing was found against it"
    session.verdict(f"{key}.fit", words[found.report.verdict], because)
    rows = [(f.id, f.severity, f.message, f.remedy) for f in findings]
    session.table(f"{key}.findings", FINDINGS, rows or [("none", "", because, "")])
    session.table(f"{key}.contents", CONTENTS, list(_list_contents(adapter)))
    session.table(f"{key}.facts", ("what", "in the files"), list(_list_facts(adapter, found)))


def _record_absent(session: Session, role: str, *, reason: str) -> None:
    key = f"files.{role}"
    for name in MEASURES:
        session.measure(f"{key}.{name}", None, reason=reason)
    session.verdict(f"{key}.fit", "not available", reason)
    session.table(f"{key}.findings", FINDINGS, [("not available", "", reason, "")])
    session.table(f"{key}.contents", CONTENTS, [("not available", "", "", "", None)])
    session.table(f"{key}.facts", ("what", "in the files"), [("not available", reason)])


def _list_contents(adapter: Adapter) -> Iterator[Sequence[Cell]]:
    """The tensors by module, part, shape and dtype, those of all layers together."""
    named = [
        (path.rpartition(".")[2], part, key)
        for path, parts in adapter.contents.lora.items()
        for part, key in parts.items()
    ]
    others = (*adapter.contents.plain.items(), *adapter.contents.tokens.items())
    named += [(path.removeprefix("base_model.model."), "whole", key) for path, key in others]
    kinds = Counter(
        (module, part, adapter.tensors[key].shape, adapter.tensors[key].dtype)
        for module, part, key in named
    )
    for (module, part, shape, dtype), count in kinds.items():
        size = "×".join(map(str, shape)) or "one number"
        yield printable(module), printable(part), size, dtype, count
    if not kinds:
        yield "no tensors", "", "", "", 0


def _list_facts(adapter: Adapter, found: Inspection) -> Iterator[tuple[str, str]]:
    config, dating = adapter.config, date_config(adapter.raw)
    if config is None:
        yield "configuration", "not one that PEFT accepts"
    else:
        scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
        yield "rank, alpha, scale", f"{config.r}, {config.alpha:g}, {scale:.3g}"
        yield "modules", _list_names(config.target_modules)
        kinds = {"rank-stabilised": config.use_rslora, "DoRA": config.use_dora}
        yield "kind", ", ".join(["LoRA", *(name for name, is_so in kinds.items() if is_so)])
        yield "saved whole", ", ".join(map(printable, config.modules_to_save)) or "none"
        yield "task", config.task_type or "not named"
        yield "base that it names", _shorten_path(printable(config.base_name or "none"))
    yield "PEFT that it names", printable(dating.stated or "none")
    yield "PEFT releases that write these keys", span(dating.writers or dating.possible_writers)
    yield "PEFT releases that load them in silence", span(dating.silent_loaders)
    more = f" and {len(found.bases) - NAMED} more" if len(found.bases) > NAMED else ""
    named = ", ".join(found.bases[:NAMED]) or "none"
    yield "known bases of these shapes", f"{named}{more}"


def _shorten_path(name: str) -> str:
    """The end of a path, which tells the model: its beginning tells whose machine it was."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return "/".join(("…", *parts[-3:])) if len(parts) > 3 else name


def _list_names(names: Iterable[str] | str | None) -> str:
    if names is None:
        return "those usual for the base"
    return printable(names if isinstance(names, str) else ", ".join(names), 200)


def _say(error: ModelError) -> str:
    """What went wrong without the folder, which is not the same on another machine."""
    return printable(f"expected {error.expected}, found {error.found}", 300)
