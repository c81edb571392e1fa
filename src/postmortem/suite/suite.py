"""A suite: many adapters on one base, asked the same rows; what it asks, and what it keeps."""

import hashlib
import json
import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SkipValidation, ValidationError

from postmortem.case.files import write_text
from postmortem.case.load import explain_errors, load_case, read_yaml
from postmortem.case.rows import Rows, generate_rows, read_rows
from postmortem.case.schema import Columns, Frozen, Identifier, PromptTemplate, Sentence
from postmortem.checker.errors import RecordError, SuiteError, printable
from postmortem.experiments.metrics import THRESHOLDS, Estimate
from postmortem.experiments.records import package_versions
from postmortem.models.model_set import digest_model, find_base

# The plan, the marks of finished chunks, and one file for each adapter's result.
PLAN, CHUNKS, RESULTS = "plan.json", "chunks", "scored"
# A base above this size is worth more than one thread.
SMALL = 100 << 20
UNREADABLE = "unreadable"
MARKS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Limit(Frozen):
    """A limit of a filter with its reason."""

    value: float
    because: Sentence


class SuiteLimits(Frozen):
    """The limits of both filters: the first two are the write-up's, the others ours."""

    std_above: Limit = Limit(value=0.05, because="the write-up's validation plan")
    maximum_above: Limit = Limit(value=0.5, because="the write-up's validation plan")
    effect: Limit = Limit(
        value=1e-6, because="below it, in nats, two answers are the same up to rounding"
    )
    chance: Limit = Limit(value=THRESHOLDS.chance, because="the AUC of a constant")
    rows: Limit = Limit(
        value=THRESHOLDS.rows, because="on fewer rows a perfect order comes by luck too often"
    )
    alike: Limit = Limit(
        value=1e-3,
        because="no two trainings agree to this many nats on every row, and rounding is below it",
    )


class Asked(Frozen):
    """A prompt that the suite file brings along; `contract` is the read-out that it asks for."""

    contract: Literal["number", "yes_no"]
    chat: bool
    system: str = ""
    template: Sentence


class SuiteRows(Frozen):
    """The rows: a file with or without labels, or `count` generated ones, which have them."""

    data: str = ""
    labels: str = ""
    columns: Columns = Columns()
    count: int = Field(default=0, ge=0, le=1_000_000)
    seed: int = 0

    def read(self, place: Path) -> Rows:
        """The rows, from files below `place`; `SuiteError` where neither way is given."""
        if self.data:
            labels = place / self.labels if self.labels else None
            return read_rows(place / self.data, labels, columns=self.columns).head(self.count)
        if not self.count or self.labels:
            raise SuiteError("rows", expected="`data`, or a `count` above 0", found="neither")
        return generate_rows(self.count, self.seed, columns=self.columns)


class Suite(Frozen):
    """A suite file. Paths are relative to it.

    `adapters` are globs whose every folder is an adapter, or folders: an adapter, or one whose
    every folder is. `ask` names prompts of `prompts` or of the case; the first one decides.
    """

    suite_version: Literal[1]
    title: Sentence
    base: Sentence
    adapters: Annotated[list[Sentence], Field(min_length=1)]
    rows: SuiteRows
    case: str = ""
    ask: Annotated[list[Identifier], Field(min_length=1)]
    prompts: dict[Identifier, Asked] = {}
    max_new_tokens: int = Field(default=8, ge=1, le=512)
    max_prompt_tokens: int = Field(default=4096, ge=16)
    limits: SuiteLimits = SuiteLimits()
    chunk: int = Field(default=25, ge=1)
    device: str = "auto"
    dtype: str = "auto"


class PromptReading(Frozen):
    """What an adapter answered to one prompt.

    Values are by the write-up's parser; `parsed` is the share of answers that are what was asked
    for and nothing else. `log_odds` has one entry a row in nats, None where it is not finite.
    `effect` is KL(adapter || base) of the answer in nats, `gain` the AUC of the log-odds less
    that of the base on the same rows.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    distinct: int
    tied_pairs: float
    parsed: float
    auc_written: Estimate
    auc: Estimate
    gain: Estimate
    effect: float | None
    log_odds: list[float | None]

    @property
    def finite(self) -> bool:
        """Whether every log-odds is a number."""
        return None not in self.log_odds


class Scored(Frozen):
    """One adapter as measured, a file of its own; the base alone has the name "".

    `findings` are the checker's, those of severity error in `errors` as well. `run` is the digest
    of what it was asked and by what, `digest` that of the adapter's files.
    """

    name: str
    digest: str
    run: str
    status: Literal["ok", "failed"]
    message: str = ""
    checker: str = ""
    findings: list[str] = []
    errors: list[str] = []
    warnings: list[str] = []
    readings: dict[str, PromptReading] = {}


# A folder's name as the system gives it: it need not be valid Unicode.
Folder = Annotated[str, SkipValidation]


class PlannedAdapter(Frozen):
    """An adapter of a plan: its name on pages, its folder, and the digest of its files."""

    name: str
    folder: Folder
    digest: str


class SuitePlan(Frozen):
    """A suite with its names resolved, as it stands in the output folder for every step.

    `chunks` holds the entries by the number of their chunk, `run` the digest that the results
    must carry and `judged` that of what is decided by. `threads` is 0 where a step takes all
    cores, `base_bytes` the size of the base's weights.
    """

    suite: Suite
    place: Folder
    base: Folder
    base_digest: str
    base_bytes: int
    prompts: dict[str, PromptTemplate]
    run: str
    judged: str
    threads: int
    chunks: dict[str, list[PlannedAdapter]]

    @property
    def entries(self) -> list[PlannedAdapter]:
        """All adapters in order."""
        return [entry for chunk in self.chunks.values() for entry in chunk]

    @property
    def alone(self) -> PlannedAdapter:
        """The base alone, which is asked as every adapter is."""
        return PlannedAdapter(name="", folder="", digest=self.base_digest)

    @property
    def rows(self) -> Rows:
        """The rows that are scored."""
        return self.suite.rows.read(Path(self.place))


def load_suite(path: str | Path) -> Suite:
    """Read and check a suite file; `CaseError` names the key, what was expected and found."""
    path = Path(path)
    try:
        return Suite.model_validate(read_yaml(path, kind="suite file", remedy="Give its path."))
    except ValidationError as error:
        raise explain_errors(path, error.errors(include_url=False)) from None


def make_plan(path: str | Path) -> SuitePlan:
    """Resolve a suite file: its base, prompts, rows and adapters, each with its digest.

    Raises `SuiteError` for a pattern or prompt that names nothing, and what the case, the rows
    and the base raise.
    """
    suite, place = load_suite(path), Path(path).resolve().parent
    base = find_base(str(place / suite.base) if (place / suite.base).is_dir() else suite.base)
    prompts = _find_prompts(suite, place)
    rows = suite.rows.read(place)
    entries = name_adapters(find_adapters(suite.adapters, place), place)
    chunks = [entries[at : at + suite.chunk] for at in range(0, len(entries), suite.chunk)]
    base_digest, versions = digest_model(base), package_versions()
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    asked = {name: prompt.model_dump() for name, prompt in prompts.items()}
    settings = (suite.max_new_tokens, suite.max_prompt_tokens, suite.device, suite.dtype)
    return SuitePlan(
        suite=suite,
        place=str(place),
        base=str(base.resolve()),
        base_digest=base_digest,
        base_bytes=size,
        prompts=prompts,
        run=_digest([base_digest, rows.digest, asked, settings, versions]),
        judged=_digest([suite.title, suite.ask, suite.limits.model_dump(), versions]),
        threads=1 if size < SMALL else 0,
        chunks={f"{number:04d}": chunk for number, chunk in enumerate(chunks)},
    )


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def find_adapters(patterns: Sequence[str], place: Path) -> list[Path]:
    """The folders that the patterns name, each once, in the order of their paths.

    Whether a folder is a sound adapter is not asked here. Raises `SuiteError` for a pattern that
    matches no folder.
    """
    folders: set[Path] = set()
    for pattern in patterns:
        matches = [path.resolve() for path in _match(pattern, place) if path.is_dir()]
        if not matches:
            raise SuiteError(
                f"adapters: {printable(pattern)}",
                expected="at least one adapter folder",
                found="none",
                remedy=f"Paths are relative to {printable(place)}.",
            )
        folders.update(matches)
    return sorted(folders, key=os.fsencode)


def _match(pattern: str, place: Path) -> list[Path]:
    path = place / pattern
    if not path.is_dir():
        # pathlib's own takes no absolute pattern, and its stars match hidden folders.
        return [place / name for name in glob(pattern, root_dir=place, recursive=True)]  # noqa: PTH207
    inside = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    is_adapter = any((path / name).exists() for name in MARKS)
    return [path] if is_adapter or not inside else inside


def name_adapters(folders: Sequence[Path], place: Path) -> list[PlannedAdapter]:
    """Entries with distinct printable names: the path below the suite file's folder, if it is."""
    entries: list[PlannedAdapter] = []
    taken: set[str] = set()
    for folder in folders:
        inside = folder.is_relative_to(place)
        plain = printable(folder.relative_to(place) if inside else folder.name, 120)
        name, number = plain, 1
        while name in taken:
            number += 1
            name = f"{plain} ({number})"
        taken.add(name)
        entries.append(PlannedAdapter(name=name, folder=str(folder), digest=digest_adapter(folder)))
    return entries


def digest_adapter(folder: Path) -> str:
    """Digest of an adapter's files; a folder that cannot be read has the same word for all."""
    try:
        return digest_model(folder)
    except OSError:
        return UNREADABLE


def write_plan(plan: SuitePlan, out: Path) -> None:
    """Write the plan for the steps and for the graph, escaped to ASCII."""
    write_text(out / PLAN, json.dumps(plan.model_dump(), indent=1) + "\n")


def read_plan(out: Path) -> SuitePlan:
    """Read a plan back; `RecordError` where it is missing or altered beyond use."""
    try:
        return SuitePlan.model_validate(json.loads((out / PLAN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RecordError(out / PLAN, expected="a plan", found=str(error)[:200]) from None


def result_path(plan: SuitePlan, entry: PlannedAdapter, out: Path) -> Path:
    """Where an adapter's result stands: named by all that can change it, the adapter's files too.

    One that was measured for another suite in this folder counts as long as nothing has changed.
    """
    named = f"{plan.run} {entry.name} {entry.digest}".encode("utf-8", "surrogateescape")
    return out / RESULTS / f"{hashlib.sha256(named).hexdigest()[:16]}.json"


def read_result(plan: SuitePlan, entry: PlannedAdapter, out: Path) -> Scored | None:
    """An adapter's result, or None where it has none that can be read: it is measured then."""
    try:
        return Scored.model_validate_json(result_path(plan, entry, out).read_bytes())
    except (OSError, ValidationError):
        return None


def unmark_unfinished(plan: SuitePlan, out: Path) -> None:
    """Take back the mark of each chunk that lacks a result, so that the graph runs it again."""
    for number, chunk in plan.chunks.items():
        if not all(result_path(plan, entry, out).is_file() for entry in (plan.alone, *chunk)):
            (out / CHUNKS / f"{number}.done").unlink(missing_ok=True)


def _find_prompts(suite: Suite, place: Path) -> dict[str, PromptTemplate]:
    known = dict(load_case(place / suite.case).prompts) if suite.case else {}
    known |= {
        name: PromptTemplate(title=name, grade="measured", **asked.model_dump())
        for name, asked in suite.prompts.items()
    }
    for name in suite.ask:
        if name not in known:
            raise SuiteError(
                f"ask: {name}",
                expected=f"one of {', '.join(known) or 'no prompt at all'}",
                found="no such prompt",
                remedy="Describe it under `prompts`, or name a case file under `case`.",
            )
    return {name: known[name] for name in dict.fromkeys(suite.ask)}
