"""One call from the names that a user types to a report: open, read, resolve the base, check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from postmortem.adapter import Adapter, read_adapter
from postmortem.adapter_config import CONFIG_FILE
from postmortem.adapter_weights import MAX_JSON, scan
from postmortem.archaeology import find_warnings, known_keys
from postmortem.architectures import BaseModel, describe
from postmortem.bases import find_base
from postmortem.checks import Report, check
from postmortem.errors import ModelError
from postmortem.identify import fitting_bases, kind_of
from postmortem.sources import Folder, HubRepository, is_hub_id, kind_of_path, open_source
from postmortem.untrusted import UntrustedError, parse_json, printable

MAX_LOG = 32_000_000  # Bytes of a log that are searched; the warning stands near its start.


@dataclass(frozen=True, slots=True)
class Inspection:
    """A report with the known bases that the adapter's shapes fit."""

    adapter: str
    report: Report
    bases: tuple[str, ...]


def inspect_adapter(
    adapter: str,
    base: str | None = None,
    *,
    header_only: bool = False,
    stated_bytes: int | None = None,
) -> Inspection:
    """Check an adapter (folder or hub id) against a base (folder, config.json, hub id or name).

    Without a base, the one that the adapter names is used when it is a known one; a path that the
    adapter names is never opened. Raises ModelError when something cannot be checked.
    """
    source = open_source(adapter)
    held = read_adapter(source)
    model, given = resolve_base(held, base)
    is_scanned = isinstance(source, Folder) and not header_only
    stats = scan(source, held.tensors) if isinstance(source, Folder) and is_scanned else None
    report = check(held, model, given_name=given, stats=stats, stated_bytes=stated_bytes)
    notes = report.notes if is_scanned else (*report.notes, "tensor bytes were not read")
    report = Report(report.verdict, report.findings, report.base, notes)
    return Inspection(held.name, report, fitting_bases(held))


def inspect_all(
    adapters: Sequence[str], base: str | None, *, header_only: bool, stated_bytes: int | None
) -> tuple[list[Inspection], list[ModelError]]:
    """Inspect adapters, each folder once; return the reports, and why others were not checkable."""
    if not adapters:
        raise ModelError("check", expected="an adapter folder or hub id", found="none")
    done: list[Inspection] = []
    refused: list[ModelError] = []
    for adapter in dict.fromkeys(open_source(name).name for name in adapters):
        try:
            done.append(
                inspect_adapter(adapter, base, header_only=header_only, stated_bytes=stated_bytes)
            )
        except ModelError as error:
            refused.append(error)
    return done, refused


def resolve_base(adapter: Adapter, base: str | None) -> tuple[BaseModel | None, str | None]:
    """Describe the base that was given, or else named; also return its name if it was given."""
    kind = kind_of(adapter)
    if base is None:
        named = adapter.config.base_name if adapter.config else None
        known = find_base(named) if named else None
        if named is None or known is None:
            return None, None
        label = named if named == known.model_id else f"{named} (shapes of {known.model_id})"
        return describe(known.config, name=label, kind=kind), None
    config, name = _read_base(base)
    model = describe(config, name=name, kind=kind)
    if model is None and config.get("architectures"):
        # The task has no class in this architecture: judge by the class that the base names.
        model = describe(config, name=name, kind=None)
    return model, name


def _read_base(base: str) -> tuple[Mapping[str, object], str]:
    path = Path(base)
    if kind_of_path(path) == "folder":
        path = path / "config.json"
    if kind_of_path(path) == "file":
        # The user chose the base, so its links are followed; an adapter's are not.
        target = path.resolve()
        return _named(_parse(Folder(target.parent), target.name), path.absolute().parent.name)
    if path == Path(base) and (known := find_base(base)):
        return known.config, base
    if path == Path(base) and is_hub_id(base):
        return _parse(HubRepository(base), "config.json"), base
    expected = "a model folder, a config.json, a hub id or a known base"
    raise ModelError(printable(base), expected=expected, found="nothing of the kind")


def read_config_or_log(path: Path) -> tuple[Mapping[str, object] | None, str]:
    """Read an adapter configuration, or else the text of a log that holds PEFT's warning.

    Raises ModelError for a file that is neither.
    """
    path = path / CONFIG_FILE if kind_of_path(path) == "folder" else path
    if kind_of_path(path) != "file":
        expected = f"an {CONFIG_FILE} or a log"
        raise ModelError(printable(path), expected=expected, found=kind_of_path(path))
    source = Folder(path.parent)
    data = source.read(path.name, 0, MAX_LOG)
    try:
        content = parse_json(data)
    except UntrustedError:
        content = None
    if isinstance(content, dict) and known_keys() & content.keys():
        return content, ""
    log = data.decode("utf-8", errors="replace")
    if not find_warnings(log):
        expected = "an adapter configuration, or PEFT's warning about unexpected keyword arguments"
        raise ModelError(path, expected=expected, found="neither")
    return None, log


def _named(config: Mapping[str, object], folder: str) -> tuple[Mapping[str, object], str]:
    original = config.get("_name_or_path")
    return config, original if isinstance(original, str) and original else folder


def _parse(source: Folder | HubRepository, filename: str) -> Mapping[str, object]:
    size = source.size(filename)
    subject = f"{source.name}: {filename}"
    if size is None or size > MAX_JSON:
        found = "no such file" if size is None else f"{size:,} bytes"
        raise ModelError(
            subject, expected=f"a JSON file of at most {MAX_JSON:,} bytes", found=found
        )
    try:
        config = parse_json(source.read(filename, 0, MAX_JSON))
    except UntrustedError as error:
        raise ModelError(subject, expected="a JSON object", found=str(error)) from None
    if not isinstance(config, dict):
        raise ModelError(subject, expected="a JSON object", found=type(config).__name__)
    return config
