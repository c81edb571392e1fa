"""What the files of the adapters and the record of the incident say, before any model runs."""

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from postmortem.case.schema import DeclaredSystem, Forensics, LoadFault, TrueSize
from postmortem.checker.adapter import WEIGHTS_FILE, Adapter, open_source, read_adapter
from postmortem.checker.bases import BaseModel, describe, find_base
from postmortem.checker.checks import Inspection, inspect_adapter
from postmortem.checker.config import CONFIG_FILE, build_config, layer_of
from postmortem.checker.errors import SIZE_TOLERANCE, Entry, ModelError, catalogue, printable
from postmortem.checker.fit import find_targets, implied_parameters, is_under, scale_of
from postmortem.checker.identify import (
    BYTES,
    Identification,
    date_config,
    date_warning,
    identify,
    measure,
    span,
)
from postmortem.checker.serving import Rule, rules, runtimes, tabulate
from postmortem.experiments.metrics import (
    Line,
    auc,
    chances_of_order,
    fit_line,
    least_auc,
    mean_estimate,
    perfect_auc_estimate,
    power_of_rows,
    rate_estimate,
)
from postmortem.experiments.records import Cell
from postmortem.experiments.session import Session
from postmortem.models.model_set import ADAPTERS, role_name

CATALOGUE_COLUMNS = (
    "id",
    "title",
    "severity",
    "symptom",
    "cause",
    "what settles it",
    "remedy",
    "PEFT",
    "seen in",
)


def record_declared(session: Session, folder: Path) -> None:
    """Hold each adapter's transcribed config against itself, its base and the size on record."""
    systems = session.case.systems
    for role, system in (("suspect", systems.suspect), ("reference", systems.reference)):
        if system is not None and system.config:
            _record_system(session, role, system=system, folder=folder / role)


def _record_system(session: Session, role: str, *, system: DeclaredSystem, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(system.config), encoding="utf-8")
    stated = system.declared_megabytes
    inspection = inspect_adapter(
        str(folder), stated_bytes=None if stated is None else int(stated * 1e6)
    )
    key = f"inventory.{role}"
    _record_findings(session, f"{key}.findings", inspection=inspection)
    implied = measure(read_adapter(open_source(str(folder)))).implied
    reason = "the base that it names is not in the table of known bases"
    session.measure(f"{key}.parameters", implied, reason=reason)
    for dtype, size in BYTES.items():
        megabytes = None if implied is None else implied * size / 1e6
        session.measure(f"{key}.megabytes_{dtype}", megabytes, unit="MB", reason=reason)
    session.measure(f"{key}.megabytes_declared", stated, unit="MB", reason="no size on record")
    session.verdict(f"{key}.size_agrees", *_size_agrees(implied, stated))
    dating = date_config(system.config)
    loaders = (*dating.silent_loaders, *dating.warning_loaders)
    session.verdict(
        f"{key}.loads_as_transcribed",
        bool(loaders),
        f"PEFT {span(loaders)} would load it" if loaders else "no PEFT release would load it",
    )
    session.text(f"{key}.unknown_keys", ", ".join(dating.unknown) or "none")


def _size_agrees(implied: int | None, stated: float | None) -> tuple[bool | None, str]:
    if implied is None or stated is None:
        return None, "no size on record, or a base whose shapes are not known"
    sizes = {dtype: implied * size / 1e6 for dtype, size in BYTES.items()}
    told = " or ".join(f"{value:.1f} MB in {dtype}" for dtype, value in sizes.items())
    agrees = any(abs(value - stated) <= SIZE_TOLERANCE * stated for value in sizes.values())
    return agrees, f"{implied:,} parameters are {told}; about {stated:g} MB is on record"


def record_dating(session: Session) -> None:
    """Date the software of the incident by the one warning that its log shows."""
    warning = session.case.loading_warning
    if warning is None:
        session.text("inventory.loader", "no warning on record")
        session.text("inventory.writers", "no warning on record")
        return
    encounters = date_warning(warning.keywords)
    session.text("inventory.loader", span(tuple(e.loader for e in encounters)) or "none")
    writers = tuple(dict.fromkeys(writer for e in encounters for writer in e.writers))
    session.text("inventory.writers", span(writers) or "none")
    rows = [(encounter.loader, span(encounter.writers)) for encounter in encounters]
    session.table("inventory.dating", ("loaded by", "saved by"), rows)
    config = session.case.systems.suspect.config
    would_list = sorted({*date_config(config).unknown, *warning.keywords})
    session.verdict(
        "inventory.transcription_was_loaded",
        False if date_config(config).unknown else None,
        f"PEFT would have listed {', '.join(would_list)}; "
        f"the log lists {', '.join(warning.keywords)}",
    )


def record_true_size(session: Session, folder: Path) -> None:
    """Check adapters of true size against the incident's base, from their headers alone."""
    size = session.case.true_size
    if size is None:
        return
    rows = []
    for name in (*size.donors, size.base):
        adapter = write_headers(name, folder / name.replace("/", "--"), size)
        inspection = inspect_adapter(str(adapter), size.base, header_only=True)
        ids = ", ".join(finding.id for finding in inspection.report.findings) or "none"
        rows.append((name, inspection.report.verdict, ids, len(inspection.bases)))
        if name == size.base:
            _record_identity(session, identify(read_adapter(open_source(str(adapter)))))
    columns = ("adapter made for", "on the incident's base", "findings", "known bases it fits")
    session.table("inventory.true_size", columns, rows)


def write_headers(base: str, folder: Path, size: TrueSize) -> Path:
    """An adapter folder of a known base's true shapes, as its header says; all values are zero."""
    known = find_base(base)
    shapes = describe(known.config, name=base, kind="causal") if known else None
    if shapes is None:
        raise ModelError(base, expected="a base of the shipped table", found="no such row")
    header, end = {}, 0
    for path, module in shapes.modules.items():
        if path.rpartition(".")[2] not in size.target_modules:
            continue
        for part, shape in (("A", (size.rank, module.inputs)), ("B", (module.outputs, size.rank))):
            start, end = end, end + 2 * int(shape[0] or 0) * int(shape[1] or 0)
            place = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            header[f"base_model.model.{path}.lora_{part}.weight"] = place
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + bytes(end))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": size.rank,
        "lora_alpha": 2 * size.rank,
        "target_modules": size.target_modules,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return folder


def _record_identity(session: Session, found: Identification) -> None:
    session.measure("inventory.bases_that_fit", len(found.fits))
    session.measure("inventory.bases_excluded", len(found.excluded))
    session.table("inventory.fits", ("base of the same shapes",), [(name,) for name in found.fits])
    splits = [(split.field, split.shown_by, len(split.groups)) for split in found.splits]
    session.table("inventory.splits", ("they differ in", "shown by", "groups"), splits)


def record_world(session: Session) -> None:
    """Check each adapter of this world against the base of this world."""
    rows: list[tuple[str, str, str]] = []
    for role in ADAPTERS:
        name = role_name(role)
        if not session.world.has(role):
            rows.append((name, "not available", session.world.members[role].reason))
            continue
        path, base = session.world.path(role), session.world.path("base")
        try:
            report = inspect_adapter(str(path), str(base)).report
        except ModelError as error:
            rows.append((name, "could not be checked", _say(error)))
            continue
        ids = ", ".join(finding.id for finding in report.findings) or "none"
        rows.append((name, report.verdict, ids))
    session.table("inventory.world", ("adapter", "on this base", "findings"), rows)


def record_entries(session: Session) -> None:
    """Record the failure catalogue."""
    entries = catalogue()
    session.measure("catalogue.entries", len(entries))
    session.table(
        "catalogue.entries",
        CATALOGUE_COLUMNS,
        [
            (e.id, e.title, e.severity, e.symptom, e.cause, e.settles, e.remedy, e.peft, _seen(e))
            for e in entries.values()
        ],
    )


def _seen(entry: Entry) -> str:
    return ", ".join(entry.threads)


RULES = ("the adapter has", "version", "what happens", "how", "what to do", "read in")
# What a runtime does with what it does not take as PEFT does, in a letter.
LETTERS = {"refuses": "R", "drops": "S", "rescales": "W"}
NO_RULE = "·"
# How a rule is known, behind what happens; nothing where the source says it outright.
GROUNDS = {"run": ", run", "yes": "", "no": ", inferred"}


def record_runtimes(session: Session) -> None:
    """Record what serving runtimes do otherwise than PEFT: side by side, and rule by rule."""
    session.measure("check.rules", len(rules()))
    session.measure("check.rules_run", sum(rule.verified == "run" for rule in rules()))
    session.measure("check.runtimes", len(runtimes()))
    current = [rule for rule in rules() if not rule.is_past]
    rows = [
        (trait, *(mark or NO_RULE for mark in marks))
        for trait, marks in tabulate(current, _letter).items()
        if sum(map(bool, marks)) > 1
    ]
    rows.sort(key=lambda row: row.count(NO_RULE))
    session.table("check.matrix", ("the adapter has", *runtimes()), rows)
    for name in runtimes():
        own = [rule for rule in rules() if rule.runtime == name]
        session.measure(f"check.{name}.rules", len(own))
        session.table(f"check.{name}", RULES, list(map(_describe_rule, own)))


def _letter(rule: Rule) -> str:
    doubt = "?" if rule.is_inferred else ""
    return LETTERS[rule.effect] + doubt + ("*" if rule.bases else "")


def _describe_rule(rule: Rule) -> tuple[str, ...]:
    return (
        rule.trait,
        rule.versions,
        rule.effect + GROUNDS[rule.verified],
        rule.happens,
        rule.remedy,
        rule.source,
    )


def _record_findings(session: Session, key: str, *, inspection: Inspection) -> None:
    rows = [
        (finding.id, finding.severity, finding.message, finding.evidence)
        for finding in inspection.report.findings
    ]
    session.table(key, ("finding", "severity", "what it says", "evidence"), rows)


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
        len(findings),
        errors,
        len(adapter.tensors),
        sum(tensor.count for tensor in adapter.tensors.values()),
        None if adapter.weight_bytes is None else adapter.weight_bytes / 1e6,
        len(layers),
        len(found.bases),
    )
    for name, value in zip(MEASURES, numbers, strict=True):
        unit = "MB" if name == "megabytes" else ""
        session.measure(f"{key}.{name}", value, unit=unit, reason="there is no file of weights")
    words = {"fits": True, "suspect": None, "unchecked": None, "broken": False}
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


ABSENT = "the case has no section of forensic facts"
LEVEL = 0.05  # Of the tests, as is the custom.
# A score of one half or more is read as a violation where an accuracy needs a decision.
CUT = 0.5
ONE_CLASS = "the labels hold one class alone"
NO_LINE = "fewer than four rows after the first, or no difference between them"
LOG = ("seconds", "UTC", "what it says", "grade")
ROWS = ("row", "label", "value", "tokens", "room", "seconds")
FAULTS = ("what could be wrong", "on the record", "PEFT says", "in the log", "hypothesis")
SIZES = ("base", "adapts", "rank", "parameters", "MB, 16 bits", "MB, 32 bits", "near the size of")


@dataclass(frozen=True)
class AdapterForm:
    """An adapter of a known base: what it adapts at which rank, and its parameters."""

    base: str
    adapts: str
    rank: int
    parameters: int

    @property
    def megabytes(self) -> dict[str, float]:
        """Size of its weights by dtype."""
        return {dtype: self.parameters * size / 1e6 for dtype, size in BYTES.items()}


def _find_facts(
    session: Session,
    *,
    measures: Sequence[str] = (),
    verdicts: Sequence[str] = (),
    tables: Mapping[str, Sequence[str]] | None = None,
) -> Forensics | None:
    """The case's facts; without them these keys are recorded as not available."""
    if session.case.forensics is None:
        for key in measures:
            session.measure(f"forensics.{key}", None, reason=ABSENT)
        for key in verdicts:
            session.verdict(f"forensics.{key}", "not available", ABSENT)
        for key, columns in (tables or {}).items():
            session.table(f"forensics.{key}", columns, [])
    return session.case.forensics


def record_log(session: Session) -> None:
    """Record the log in our words, with the times of day that follow from its one clock."""
    facts = _find_facts(session, measures=["load_seconds"], tables={"log": LOG})
    if facts is None:
        return
    log = facts.log
    start = log.epoch - log.epoch_at
    lines = [
        (line.seconds, f"{_utc(round(start + line.seconds)):%H:%M:%S}", line.says, log.grade)
        for line in log.lines
    ]
    session.table("forensics.log", LOG, lines)
    session.measure("forensics.load_seconds", log.loading[1] - log.loading[0], unit="s")


def record_rows(session: Session) -> None:
    """Record the rows side by side, and whether the limit cut a prompt."""
    facts = _find_facts(
        session,
        measures=["rows", "prompt_limit", "prompt_longest", "headroom_least"],
        verdicts=["prompts_uncut"],
        tables={"row_table": ROWS},
    )
    if facts is None:
        return
    limit = session.case.attempts[facts.attempt].decoding.max_prompt_tokens
    tokens = facts.prompt_tokens.values
    seconds = [round(later - earlier, 3) for earlier, later in pairwise(facts.log.ticks)]
    rows = [
        (name, label, value, length, limit - length, took)
        for name, label, value, length, took in zip(
            facts.row_ids.values,
            facts.labels.values,
            facts.submitted.values,
            tokens,
            seconds,
            strict=True,
        )
    ]
    session.table("forensics.row_table", ROWS, rows)
    longest = max(tokens)
    session.measure("forensics.rows", len(tokens))
    session.measure("forensics.prompt_limit", limit, unit="tokens")
    session.measure("forensics.prompt_longest", longest, unit="tokens")
    session.measure("forensics.headroom_least", limit - longest, unit="tokens")
    cut = sum(length > limit for length in tokens)
    because = f"{cut} of {len(tokens)} prompts exceed {limit} tokens; the longest has {longest}"
    session.verdict("forensics.prompts_uncut", cut == 0, because)


def record_score(session: Session) -> None:
    """Score the submitted values on the known labels, and say what so few rows could tell."""
    facts = _find_facts(
        session,
        measures=[
            "values_distinct",
            "auc",
            "tied_pairs",
            "accuracy",
            "least_auc",
            "least_auc_p",
            "perfect_auc",
            "perfect_auc_p",
            "good_auc",
            "power",
            "perfect_auc_pairs",
        ],
        verdicts=["values_rank"],
    )
    if facts is None:
        return
    labels, values = np.array(facts.labels.values), np.array(facts.submitted.values)
    ups, downs = values[labels == 1], values[labels == 0]
    pairs = len(ups) * len(downs)
    tied = int((ups[:, None] == downs[None, :]).sum())
    session.measure("forensics.values_distinct", len(set(facts.submitted.values)))
    session.measure("forensics.auc", auc(labels, values), reason=ONE_CLASS)
    session.measure("forensics.tied_pairs", tied / pairs if pairs else None, reason=ONE_CLASS)
    hits = int(((values >= CUT) == labels).sum())
    session.measure("forensics.accuracy", rate_estimate(hits, len(labels)))
    least, chance = least_auc(len(ups), len(downs), level=LEVEL)
    too_few = "no score of so few rows separates from chance"
    session.measure("forensics.least_auc", least, reason=too_few)
    session.measure("forensics.least_auc_p", chance, reason=too_few)
    good = facts.good_score.auc
    power = None if least is None else power_of_rows(good, len(ups), len(downs), least=least)
    session.measure("forensics.good_auc", good)
    session.measure("forensics.power", power, reason=too_few)
    perfect = perfect_auc_estimate(len(ups), len(downs))
    session.measure("forensics.perfect_auc", perfect, reason=ONE_CLASS)
    session.measure("forensics.perfect_auc_pairs", min(len(ups), len(downs)))
    top = 2 * float(chances_of_order(len(ups), len(downs))[-1]) if pairs else None
    session.measure("forensics.perfect_auc_p", top, reason=ONE_CLASS)
    session.verdict(
        "forensics.values_rank",
        tied < pairs if pairs else None,
        f"{tied} of {pairs} pairs of a violation and another post are tied" if pairs else ONE_CLASS,
    )


TIMING = (
    "first_row",
    "later_row",
    "correlation",
    "p_value",
    "per_token",
    "beside_reading",
    "scatter",
    "fastest_step",
    "most_steps",
    "token_limit",
)


def record_timing(session: Session) -> None:
    """Hold the time of each row against its prompt, without the first, which warms up."""
    facts = _find_facts(
        session,
        measures=[f"timing.{name}" for name in TIMING],
        verdicts=["timing.follows_prompt", "timing.tells_steps"],
    )
    if facts is None:
        return
    first, *later = (after - before for before, after in pairwise(facts.log.ticks))
    limit = session.case.attempts[facts.attempt].decoding.max_new_tokens
    session.measure("forensics.timing.first_row", first, unit="s")
    session.measure(
        "forensics.timing.later_row", mean_estimate(later), unit="s", reason="there is one row"
    )
    session.measure("forensics.timing.token_limit", limit, unit="tokens")
    step = _fastest_step(session, facts)
    session.measure(
        "forensics.timing.fastest_step",
        None if step is None else 1000 * step,
        unit="ms",
        reason="the base is not in the table of known bases",
    )
    line = fit_line(facts.prompt_tokens.values[1:], later)
    _record_line(session, line)
    _judge_steps(session, line, step=step, limit=limit)


def _record_line(session: Session, line: Line | None) -> None:
    key = "forensics.timing"
    if line is None:
        for name in ("correlation", "p_value", "per_token", "beside_reading", "scatter"):
            session.measure(f"{key}.{name}", None, reason=NO_LINE)
        session.verdict(f"{key}.follows_prompt", None, NO_LINE)
        return
    session.measure(f"{key}.correlation", line.correlation)
    session.measure(f"{key}.p_value", line.p_value)
    session.measure(f"{key}.per_token", line.slope.scaled(1000), unit="ms")
    session.measure(f"{key}.beside_reading", line.intercept, unit="s")
    scatter = max(line.residuals) - min(line.residuals)
    session.measure(f"{key}.scatter", 1000 * scatter, unit="ms")
    session.verdict(
        f"{key}.follows_prompt",
        line.p_value <= LEVEL and (line.correlation.value or 0) > 0,
        f"over {line.correlation.n} rows the correlation is {line.correlation.value:.3f}, "
        f"with a p-value {_say_chance(line.p_value)}",
    )


def _judge_steps(session: Session, line: Line | None, *, step: float | None, limit: int) -> None:
    """Whether what reading leaves is too short for as many steps as the limit allows."""
    key = "forensics.timing"
    if line is None or step is None or line.intercept.high is None:
        reason = NO_LINE if line is None else "the base is not in the table of known bases"
        session.measure(f"{key}.most_steps", None, reason=reason)
        session.verdict(f"{key}.tells_steps", None, reason)
        return
    most = int(max(line.intercept.high, 0.0) / step)
    session.measure(f"{key}.most_steps", most, unit="steps")
    session.verdict(
        f"{key}.tells_steps",
        True if most < limit else None,
        f"if reading a prompt takes time in proportion to its tokens, at most "
        f"{1000 * line.intercept.high:.0f} ms are left for writing; at no less than "
        f"{1000 * step:.1f} ms a step that allows {most} steps, and the limit was {limit}",
    )


def _fastest_step(session: Session, facts: Forensics) -> float | None:
    """Seconds that the device takes to read the weights of all layers once."""
    base = _describe(session.case.systems.base.name)
    if base is None:
        return None
    sizes = (
        (module.inputs or 0) * (module.outputs or 0)
        for module in base.modules.values()
        if not module.is_embedding
    )
    device = facts.hardware
    return sum(sizes) * device.bytes_per_parameter / (device.gigabytes_per_second * 1e9)


def _describe(model_id: str) -> BaseModel | None:
    base = find_base(model_id)
    return describe(base.config, name=base.model_id, kind="causal") if base else None


def record_messages(session: Session) -> None:
    """Record which faults the messages at loading exclude, and whether the temperature was used."""
    facts = _find_facts(
        session,
        measures=["flag_warnings"],
        verdicts=["temperature_in_use"],
        tables={"faults": FAULTS},
    )
    if facts is None:
        return
    decided = [(fault, *_judge_fault(facts, fault)) for fault in facts.faults]
    rows = []
    for fault, was, because in decided:
        session.verdict(f"forensics.fault.{fault.id}", was, because)
        message = facts.log.messages[fault.message] if fault.message else None
        rows.append(
            (
                fault.fault,
                {True: "holds", False: "refuted", None: "cannot tell"}[was],
                message.says if message else "nothing",
                message.times if message else "",
                fault.hypothesis or "",
            )
        )
    session.table("forensics.faults", FAULTS, rows)
    count, total = facts.log.messages[facts.ignored_flags].times, len(facts.row_ids.values)
    sampled = session.case.attempts[facts.attempt].decoding.do_sample
    session.measure("forensics.flag_warnings", count)
    session.verdict(
        "forensics.temperature_in_use",
        sampled if count in (0, total) and sampled == (count == 0) else None,
        f"sampling was {'on' if sampled else 'off'}; in {total} rows the log says {count} times "
        f"that the setting may be ignored",
    )


def _judge_fault(facts: Forensics, fault: LoadFault) -> tuple[bool | None, str]:
    if fault.message is None:
        return None, "PEFT would have said nothing, and the log would look the same"
    message = facts.log.messages[fault.message]
    if message.times:
        return True, f"{message.says}: {message.times} in the log"
    return False, f"{message.says}: PEFT would have said so, and the log does not"


def record_answer(session: Session) -> None:
    """Record the steps that the text of the answer takes, against the claimed length."""
    facts = _find_facts(
        session, measures=["answer_steps", "answer_claimed"], verdicts=["answer_fits_claim"]
    )
    if facts is None:
        return
    answer = facts.answer
    session.measure("forensics.answer_steps", answer.tokens + 1, unit="steps")
    session.measure("forensics.answer_claimed", answer.claimed_tokens, unit="tokens")
    session.verdict(
        "forensics.answer_fits_claim",
        answer.tokens <= answer.claimed_tokens,
        f"the text is {answer.tokens} tokens long and {answer.tokens + 1} with the end of turn; "
        f"about {answer.claimed_tokens} are claimed",
    )


def record_dates(session: Session) -> None:
    """Hold the claimed day against the log's clock and the release of the software that ran."""
    facts = _find_facts(
        session,
        measures=["days_apart"],
        verdicts=["date_agrees", "software_existed"],
        tables={"dates": ("source", "day", "grade")},
    )
    if facts is None:
        return
    claimed, logged = facts.claimed_date, _utc(facts.log.epoch).date()
    rows = [("the write-up", claimed.day.isoformat(), claimed.grade)]
    rows += [("the log's clock", logged.isoformat(), facts.log.grade)]
    loader, released = _find_loader(session, facts)
    if released is not None:
        rows.append((f"release of PEFT {loader}", released.isoformat(), "artefact"))
    session.table("forensics.dates", ("source", "day", "grade"), rows)
    session.measure("forensics.days_apart", (logged - claimed.day).days, unit="days")
    session.verdict(
        "forensics.date_agrees",
        logged == claimed.day,
        f"the write-up says {claimed.day}, the log's clock {logged}",
    )
    session.verdict(
        "forensics.software_existed",
        None if released is None else released <= claimed.day,
        "no one release is known to have loaded the adapter, or not when it came out"
        if released is None
        else f"of released builds only PEFT {loader} prints the log's warning, "
        f"and it came out on {released}",
    )


def _find_loader(session: Session, facts: Forensics) -> tuple[str, date | None]:
    """The one release that can have printed the loading warning, and its day."""
    warning = session.case.loading_warning
    loaders = [e.loader for e in date_warning(warning.keywords)] if warning else []
    loader = loaders[0] if len(loaders) == 1 else ""
    return loader, facts.claimed_date.peft_releases.get(loader)


def record_sizes(session: Session) -> None:
    """Hold the sizes on record against those of usual adapters of the base and of others."""
    roles = ("suspect", "reference")
    facts = _find_facts(
        session,
        measures=["size_forms"],
        verdicts=[f"size.{role}.{where}" for role in roles for where in ("here", "elsewhere")],
        tables={"sizes": SIZES},
    )
    if facts is None:
        return
    systems = {role: getattr(session.case.systems, role) for role in roles}
    own = session.case.systems.base.name
    forms = list(_list_forms(facts, (own, *facts.contents.other_bases)))
    near = {form: [r for r, s in systems.items() if s and _is_near(s, form)] for form in forms}
    rows: list[tuple[Cell, ...]] = [
        (
            form.base,
            form.adapts,
            form.rank,
            form.parameters,
            *(round(form.megabytes[dtype], 1) for dtype in ("bfloat16", "float32")),
            ", ".join(hits),
        )
        for form, hits in near.items()
    ]
    session.table("forensics.sizes", SIZES, rows)
    session.measure("forensics.size_forms", len(forms))
    for role, system in systems.items():
        for where, here in (("here", True), ("elsewhere", False)):
            asked = [form for form in forms if (form.base == own) is here]
            hits = [form for form in asked if role in near[form]]
            _judge_size(session, f"forensics.size.{role}.{where}", system, asked=asked, hits=hits)


def _list_forms(facts: Forensics, bases: Sequence[str]) -> Iterator[AdapterForm]:
    for name in bases:
        if (base := _describe(name)) is None:
            continue
        for adapts, modules in facts.contents.target_modules.items():
            for rank in facts.contents.ranks:
                yield AdapterForm(name, adapts, rank, _count_parameters(base, modules, rank=rank))
        yield from _list_whole(facts, name, base=base)


def _list_whole(facts: Forensics, name: str, *, base: BaseModel) -> Iterator[AdapterForm]:
    """The smallest form with modules saved entire beside it."""
    adapts, modules = next(iter(facts.contents.target_modules.items()))
    rank = min(facts.contents.ranks)
    for whole in facts.contents.whole_modules:
        found = [m for path, m in base.modules.items() if is_under(path, whole)]
        added = sum((module.inputs or 0) * (module.outputs or 0) for module in found)
        if added:
            small = _count_parameters(base, modules, rank=rank)
            yield AdapterForm(name, f"{adapts}, and all of {whole}", rank, small + added)


def _count_parameters(base: BaseModel, modules: Sequence[str], *, rank: int) -> int:
    config = build_config({"r": rank, "target_modules": list(modules)})
    return implied_parameters(config, find_targets(config, base))


def _is_near(system: DeclaredSystem, form: AdapterForm) -> bool:
    """Whether the size on record is that of the form, by the checker's tolerance."""
    stated, sizes = system.declared_megabytes, form.megabytes.values()
    return stated is not None and any(abs(stated - s) <= SIZE_TOLERANCE * s for s in sizes)


def _judge_size(
    session: Session,
    key: str,
    system: DeclaredSystem | None,
    *,
    asked: list[AdapterForm],
    hits: list[AdapterForm],
) -> None:
    if system is None or system.declared_megabytes is None or not asked:
        session.verdict(key, None, "no size on record, or no base whose shapes are known")
        return
    told = f"of {len(asked)} usual forms {len(hits)} have about {system.declared_megabytes:g} MB"
    if hits:
        told += f", such as {hits[0].base} with {hits[0].adapts} at rank {hits[0].rank}"
    session.verdict(key, bool(hits), told)


def _say_chance(value: float) -> str:
    return f"of {value:.3f}" if value >= 0.001 else "below 0.001"


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
