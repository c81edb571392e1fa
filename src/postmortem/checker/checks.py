"""Check an adapter: every finding, in one call, and the formats of its report."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from postmortem.checker import errors as limits
from postmortem.checker.adapter import (
    MAX_JSON,
    Adapter,
    Folder,
    HubRepository,
    Tensor,
    TensorStats,
    kind_of_path,
    open_source,
    read_adapter,
    scan,
)
from postmortem.checker.bases import BaseModel, describe, find_base
from postmortem.checker.config import CONFIG_FILE, AdapterConfig, Contents
from postmortem.checker.errors import (
    FLOAT16_LIMIT,
    SEVERITIES,
    Entry,
    Finding,
    ModelError,
    Place,
    UntrustedError,
    describe_overflow,
    finding,
    grouped,
    is_hub_id,
    parse_json,
    printable,
    update_bound,
)
from postmortem.checker.fit import Target, check_fit, find_targets, implied_parameters, scale_of
from postmortem.checker.identify import (
    find_warnings,
    fitting_bases,
    kind_of,
    known_keys,
)
from postmortem.checker.serving import (
    EFFECTS,
    ServedAdapter,
    Serving,
    as_matrix,
    check_serving,
    read_added_tokens,
)

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:[._]\d+)?)([bBmM])(?![A-Za-z0-9])")
_QUANTIZED = re.compile(
    r"gptq|awq|bnb|(?<![a-z])int[348]|(?<![a-z0-9])[48]-?bit|fp8", re.IGNORECASE
)
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EMPTY: tuple[object, ...] = (None, False, [], {}, "")
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. Verdict: broken with an error, suspect with a warning, else fits."""

    verdict: str
    findings: tuple[Finding, ...]
    base: str | None
    notes: tuple[str, ...]


def check(
    adapter: Adapter,
    base: BaseModel | None,
    *,
    given_name: str | None = None,
    stats: Mapping[str, TensorStats] | None = None,
    stated_bytes: int | None = None,
    further: Sequence[Finding] = (),
) -> Report:
    """Check an adapter, against a base when one is known, and its bytes when they were scanned.

    `given_name` is how the user named the base; None when it was found through the adapter.
    `stated_bytes` is the size at which the adapter was published, when that is on record;
    `further` are findings that were made elsewhere.
    """
    findings = [*adapter.findings, *_check_tensors(adapter.tensors), *_check_keys(adapter)]
    findings += further
    config = adapter.config
    if config is not None:
        findings += _check_scale(config)
        findings += _check_names(adapter.name, config, base, given_name)
        findings += _check_bytes(config, adapter.contents, stats or {})
        try:
            targets = find_targets(config, base) if base else None
            findings += check_fit(adapter, config, base, targets)
            findings += _check_size(adapter, config, targets, stated_bytes)
        except UntrustedError as error:
            findings.append(_bad_pattern(error))
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    worst = findings[0].severity if findings else "info"
    verdict = {"error": "broken", "warning": "suspect"}.get(worst, "fits")
    notes = () if base else ("no known base to compare with: shapes were not checked",)
    return Report(verdict, tuple(findings), base.name if base else None, notes)


def _bad_pattern(error: UntrustedError) -> Finding:
    where = "target_modules, exclude_modules, rank_pattern or alpha_pattern"
    return finding("config-invalid", evidence=where, expected="a usable regex", found=str(error))


def _check_tensors(tensors: Mapping[str, Tensor]) -> list[Finding]:
    empty = [(n, "elements", f"shape {t.shape}") for n, t in tensors.items() if not t.count]
    integers = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype[0] in "IU"]
    booleans = [(n, "floats", t.dtype) for n, t in tensors.items() if t.dtype == "BOOL"]
    return [*grouped("empty-tensor", empty), *grouped("integer-dtype", integers + booleans)]


def _check_keys(adapter: Adapter) -> list[Finding]:
    unknown = [(k, v) for k, v in adapter.raw.items() if k not in known_keys()]
    used = [
        (k, "a key of LoraConfig", printable(repr(v), 60)) for k, v in unknown if v not in _EMPTY
    ]
    unused = [(k, "a key of LoraConfig", printable(repr(v), 60)) for k, v in unknown if v in _EMPTY]
    return [
        *grouped("config-unknown-key", used),
        *grouped("config-unknown-key", unused, severity="info"),
    ]


def _check_scale(config: AdapterConfig) -> list[Finding]:
    scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
    low, high = limits.RSLORA_SCALE_LIMITS if config.use_rslora else limits.SCALE_LIMITS
    found = f"alpha {config.alpha:g} on r {config.r}, a scale of {scale:g}"
    named = {"lora_alpha": config.alpha, **config.alpha_pattern}
    zeros = [(name, "other than 0", found) for name, alpha in named.items() if alpha == 0]
    findings = grouped("scale-zero", zeros, "" if len(zeros) == len(named) else "warning")
    if config.alpha != 0 and not low <= scale <= high:
        findings += grouped("scale-unusual", [("lora_alpha", f"{low:g} to {high:g}", found)])
    if config.init.startswith(_REWRITING):
        expected = "an initialisation that leaves the base alone"
        findings += grouped("init-rewrites-base", [("init_lora_weights", expected, config.init)])
    return findings


def _check_bytes(
    config: AdapterConfig, contents: Contents, stats: Mapping[str, TensorStats]
) -> list[Finding]:
    broken = [(n, "finite values", "NaN or infinity") for n, s in stats.items() if not s.is_finite]
    scale = scale_of(config.alpha, config.r, use_rslora=config.use_rslora)
    pairs = [
        (parts[a], parts[b])
        for parts in contents.lora.values()
        for a, b in _PAIRS
        if parts.get(a) in stats and parts.get(b) in stats
    ]
    zeros = [(key, "trained values", "zeros") for a, b in pairs if (key := _zero(a, b, stats))]
    large = [place for a, b in pairs if (place := _overflow(a, b, stats, scale))]
    share = len(zeros) / max(len(pairs), 1)
    partial = "warning" if share >= limits.UNTRAINED_SHARE else "info"
    # A DoRA magnitude can be trained while B is still zero: the adapter is then not a no-op.
    severity = "" if share == 1 and not config.use_dora else partial
    return [
        *grouped("non-finite", broken),
        *grouped("untrained", zeros, severity),
        *grouped("overflow-risk", large),
    ]


def _zero(a: str, b: str, stats: Mapping[str, TensorStats]) -> str | None:
    return next((k for k in (b, a) if stats[k].is_finite and stats[k].largest == 0), None)


def _overflow(a: str, b: str, stats: Mapping[str, TensorStats], scale: float) -> Place | None:
    if not (stats[a].is_finite and stats[b].is_finite):
        return None
    bound = update_bound(scale, stats[a].norm, stats[b].norm)
    found = describe_overflow(max(stats[a].largest, stats[b].largest), bound)
    return (b, f"at most {FLOAT16_LIMIT:g}", found) if found else None


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.\-]*/[\w.\-]+", name) is not None


def _size_in(name: str | None) -> float | None:
    """Read the model size that a name states, in billions of parameters."""
    match = _SIZE.search(_last_part(name or ""))
    if match is None or float(match[1].replace("_", ".")) == 0:
        return None
    return float(match[1].replace("_", ".")) * (1.0 if match[2] in "bB" else 1e-3)


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _check_names(
    adapter_name: str, config: AdapterConfig, base: BaseModel | None, given: str | None
) -> list[Finding]:
    named, findings = config.base_name, []
    own, theirs = _size_in(adapter_name), _size_in(named) or _size_in(given)
    if own and theirs and max(own, theirs) > limits.SIZE_RATIO * min(own, theirs):
        place = (_last_part(adapter_name), f"{theirs:g}B as in {named or given}", f"{own:g}B")
        findings += grouped("name-size-conflict", [place])
    if base is None or given is None or named is None or not _is_hub_name(named):
        return findings
    if conflict := _quantization_conflict(named, given, base):
        place = ("base_model_name_or_path", named, conflict)
        return findings + grouped("quantized-base-mismatch", [place])
    if _names_other_base(named, given, base):
        place = ("base_model_name_or_path", f"{named}, as the adapter says", given)
        findings += grouped("base-name-mismatch", [place])
    return findings


def _quantization_conflict(named: str, given: str, base: BaseModel) -> str | None:
    if _QUANTIZED.search(named) and not base.quantization and not _QUANTIZED.search(given):
        return f"{given}, which is not quantised"
    # On-the-fly bitsandbytes is how QLoRA trains: the adapter then names the plain base.
    stored = base.quantization not in (None, "bitsandbytes")
    if stored and not _QUANTIZED.search(named) and find_base(named):
        return f"{given}, quantised with {base.quantization}"
    return None


def _names_other_base(named: str, given: str, base: BaseModel) -> bool:
    if _last_part(named).lower() == _last_part(given).lower():
        return False
    known = find_base(named)
    if known is not None and base.layers != known.config["num_hidden_layers"]:
        return True
    # The name of a folder says nothing unless it is that of a published base.
    return _is_hub_name(given) or (known is not None and find_base(given) is not None)


def _check_size(
    adapter: Adapter,
    config: AdapterConfig,
    targets: Mapping[str, Target] | None,
    stated_bytes: int | None,
) -> list[Finding]:
    pickle = adapter.pickle_bytes
    if not targets or config.unmodelled or (pickle is None and stated_bytes is None):
        return []
    implied = implied_parameters(config, targets)
    expected = f"{2 * implied / 1e6:,.1f} MB in 16 bits or {4 * implied / 1e6:,.1f} MB in 32"
    wrong = []
    # A pickle cannot be read, but one smaller than its smallest content is not whole.
    if pickle is not None and pickle < 2 * implied * (1 - limits.SIZE_TOLERANCE):
        wrong.append(pickle)
    if stated_bytes is not None and not (config.modules_to_save or _is_near(stated_bytes, implied)):
        wrong.append(stated_bytes)
    places = [("r and target_modules", expected, f"{size / 1e6:,.4g} MB") for size in wrong]
    return grouped("size-conflict", places)


def _is_near(stated: int, parameters: int) -> bool:
    widths = (2 * parameters, 4 * parameters)
    return any(abs(stated - size) <= limits.SIZE_TOLERANCE * size for size in widths)


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
    serving: Serving = Serving(),
) -> Inspection:
    """Check an adapter (folder or hub id) against a base (folder, config.json, hub id or name).

    Without a base, the one that the adapter names is used when it is a known one; a path that the
    adapter names is never opened. `serving` names runtimes whose rules are applied as well.
    Raises ModelError when something cannot be checked.
    """
    source = open_source(adapter)
    held = read_adapter(source)
    model, given = resolve_base(held, base)
    is_scanned = isinstance(source, Folder) and not header_only
    stats = scan(source, held.tensors) if isinstance(source, Folder) and is_scanned else None
    served = _check_serving(source, held, base=model, serving=serving)
    report = check(
        held, model, given_name=given, stats=stats, stated_bytes=stated_bytes, further=served
    )
    notes = report.notes if is_scanned else (*report.notes, "tensor bytes were not read")
    if serving.runtimes and held.config is None:
        notes = (*notes, "what runtimes do with it was not checked: its configuration is unusable")
    report = Report(report.verdict, report.findings, report.base, notes)
    return Inspection(held.name, report, fitting_bases(held))


def _check_serving(
    source: Folder | HubRepository, held: Adapter, *, base: BaseModel | None, serving: Serving
) -> list[Finding]:
    if held.config is None or not serving.runtimes:
        return []
    tokens = read_added_tokens(source)
    return check_serving(ServedAdapter(held, held.config, base, serving, tokens))


def inspect_all(
    adapters: Sequence[str],
    base: str | None,
    *,
    header_only: bool,
    stated_bytes: int | None,
    serving: Serving = Serving(),
) -> tuple[list[Inspection], list[ModelError]]:
    """Inspect adapters, each folder once; return the reports, and why others were not checkable."""
    if not adapters:
        raise ModelError("check", expected="an adapter folder or hub id", found="none")
    done: list[Inspection] = []
    refused: list[ModelError] = []
    for adapter in dict.fromkeys(open_source(name).name for name in adapters):
        try:
            done.append(
                inspect_adapter(
                    adapter,
                    base,
                    header_only=header_only,
                    stated_bytes=stated_bytes,
                    serving=serving,
                )
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


def write(
    done: Sequence[Inspection],
    refused: Sequence[ModelError],
    form: str,
    *,
    is_coloured: bool = False,
) -> str:
    """Write the reports of a call: text, json, markdown, sarif or junit.

    What was refused is part of the formats for machines in continuous integration alone.
    """
    if form == "sarif":
        return as_sarif(done, refused)
    if form == "junit":
        return as_junit(done, refused)
    if form == "json":
        return as_json(done) if done else ""
    if form == "markdown":
        return "\n".join(map(as_markdown, done))
    return "\n".join(as_text(inspection, is_coloured=is_coloured) for inspection in done)


MAX_NAME = 500  # Characters of a path that are printed.
_COLOURS = {
    "error": "31",
    "warning": "33",
    "info": "36",
    "broken": "31",
    "suspect": "33",
    "fits": "32",
}


def _paint(text: str, kind: str, is_coloured: bool) -> str:
    return f"\x1b[1;{_COLOURS[kind]}m{text}\x1b[0m" if is_coloured else text


def as_json(inspections: Sequence[Inspection]) -> str:
    """Write the JSON contract: verdict, findings, bases; an object for one adapter, else a list."""
    contents = [
        {
            "verdict": found.report.verdict,
            "findings": [asdict(f) for f in found.report.findings],
            "bases": list(found.bases),
            "adapter": found.adapter,
            "base": found.report.base,
            "notes": list(found.report.notes),
        }
        for found in inspections
    ]
    content = contents[0] if len(contents) == 1 else contents
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # A byte of a path that no text encodes is a surrogate here: JSON has an escape for it.
    return text.encode("utf-8", "backslashreplace").decode()


def as_text(inspection: Inspection, *, is_coloured: bool = False) -> str:
    """Write the verdict first, then the findings by severity with evidence and remedy."""
    report = inspection.report
    against = f" on {printable(report.base, MAX_NAME)}" if report.base else ""
    verdict = _paint(report.verdict, report.verdict, is_coloured)
    lines = [f"{verdict}: {printable(inspection.adapter, MAX_NAME)}{against}"]
    for found in report.findings:
        label = _paint(f"{found.severity:<8}", found.severity, is_coloured)
        lines += ["", f"{label}{found.id}: {_title(found)}", f"        evidence  {found.evidence}"]
        lines += [f"        remedy    {found.remedy}"]
    closing = [f"note: {note}" for note in report.notes]
    if inspection.bases:
        closing.append(f"shapes fit: {', '.join(inspection.bases)}")
    return "\n".join([*lines, *([""] if closing else []), *closing])


def _title(found: Finding) -> str:
    return found.message.split(": ", 1)[0]


def as_markdown(inspection: Inspection) -> str:
    """Write a table for a pull request; text from the adapter cannot form markup."""
    report = inspection.report
    name = printable(inspection.adapter, MAX_NAME)
    lines = [f"**{report.verdict}**: {_escape(name)}", ""]
    if report.findings:
        lines += ["| severity | finding | evidence | remedy |", "|---|---|---|---|"]
        lines += [
            f"| {f.severity} | {f.id}: {_title(f)} | {_escape(f.evidence)} | {_escape(f.remedy)} |"
            for f in report.findings
        ]
    return "\n".join([*lines, "", *(f"*{note}*" for note in report.notes)]).rstrip()


def _escape(text: str) -> str:
    return "".join(f"&#{ord(c)};" if c in "|<>&`*_[]()!\\#@" else c for c in text)


_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


def as_sarif(done: Sequence[Inspection], refused: Sequence[ModelError] = ()) -> str:
    """Write SARIF 2.1.0 for code scanning; each finding stands at the adapter's configuration.

    What was refused becomes a notification of a run that did not succeed.
    """
    results = [
        _sarif_result(inspection, f) for inspection in done for f in inspection.report.findings
    ]
    found = {result["ruleId"] for result in results}
    driver = {
        "name": "lora-postmortem",
        "rules": [_sarif_rule(entry) for entry in limits.catalogue().values() if entry.id in found],
    }
    notes = [{"level": "error", "message": {"text": printable(e, 500)}} for e in refused]
    invocation = {"executionSuccessful": not refused, "toolExecutionNotifications": notes}
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return json.dumps({"$schema": _SARIF, "version": "2.1.0", "runs": [run]}, indent=2)


def _sarif_rule(entry: Entry) -> dict[str, object]:
    return {
        "id": entry.id,
        "shortDescription": {"text": entry.title},
        "fullDescription": {"text": f"{entry.symptom} {entry.cause}"},
        "help": {"text": f"Settled by: {entry.settles} Remedy: {entry.remedy}"},
        "defaultConfiguration": {"level": _LEVELS[entry.severity]},
    }


def _sarif_result(inspection: Inspection, found: Finding) -> dict[str, object]:
    from urllib.parse import quote  # As late as the format is asked for.

    # A byte that no text encodes is a surrogate here: it is quoted as that byte.
    uri = quote(f"{inspection.adapter}/{CONFIG_FILE}".encode("utf-8", "surrogateescape"))
    place = {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}
    return {
        "ruleId": found.id,
        "level": _LEVELS[found.severity],
        "message": {"text": f"{_title(found)}. {_details(found)}"},
        "locations": [{"physicalLocation": place}],
    }


def as_junit(done: Sequence[Inspection], refused: Sequence[ModelError] = ()) -> str:
    """Write JUnit XML: a suite for each adapter, a case for each finding; errors are failures.

    Warnings pass and say so in their output; what was refused is a suite with an error.
    """
    from xml.etree import ElementTree  # As late as the format is asked for.

    root = ElementTree.Element("testsuites", name="postmortem check")
    for inspection in done:
        _add_suite(root, inspection)
    for error in refused:
        suite = _suite(root, error.subject, tests=1, errors=1)
        case = _case(suite, "checked")
        ElementTree.SubElement(case, "error", message=printable(error, 500))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _add_suite(root: "Element", inspection: Inspection) -> None:
    from xml.etree.ElementTree import SubElement

    findings = inspection.report.findings
    failures = sum(found.severity == "error" for found in findings)
    suite = _suite(root, inspection.adapter, tests=len(findings) or 1, failures=failures)
    if not findings:
        _case(suite, inspection.report.verdict)
    for found in findings:
        case = _case(suite, found.id)
        if found.severity == "error":
            SubElement(case, "failure", message=_title(found)).text = _details(found)
        else:
            SubElement(case, "system-out").text = f"{found.severity}: {_details(found)}"


def _suite(root: "Element", name: str, **counts: int) -> "Element":
    from xml.etree.ElementTree import SubElement

    numbers = {"failures": 0, "errors": 0, **counts}
    attributes = {
        "name": printable(name, MAX_NAME),
        **{kind: str(n) for kind, n in numbers.items()},
    }
    return SubElement(root, "testsuite", attributes)


def _case(suite: "Element", name: str) -> "Element":
    from xml.etree.ElementTree import SubElement

    return SubElement(suite, "testcase", name=name, classname=suite.attrib["name"])


def _details(found: Finding) -> str:
    return printable(f"{found.evidence}. {found.remedy}", 2000)


def explain(entry: Entry) -> str:
    """Write one catalogue entry."""
    rows = {
        "symptom": entry.symptom,
        "cause": entry.cause,
        "settled by": entry.settles,
        "remedy": entry.remedy,
        "PEFT": entry.peft,
        "threads": ", ".join(entry.threads) or "none on record",
    }
    body = "\n".join(f"  {name:<11} {text}" for name, text in rows.items())
    effect = entry.id.removeprefix("serving-")
    matrix = f"\n\n{as_matrix(effect)}" if effect in EFFECTS else ""
    return f"{entry.id} ({entry.severity}): {entry.title}\n{body}{matrix}"
