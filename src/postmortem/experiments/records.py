"""Records: what a run measured and where it came from, and the runs that are kept.

A record file begins with its provenance and ends with a seal: the number of records and the
digest of everything that can be compared between two runs. Times and the host stand apart and
are not part of the digest.

A kept record is held by its seal, by the digests of its inputs, and by its confirmation: a sample
of its answers asked again with today's code. The tests confirm what runs in the embedded world,
`make confirm` the rest; a confirmation says nothing of what was not asked again.
"""

import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from postmortem.case.files import digest_file, write_text
from postmortem.case.layout import REPLAYS, RESULTS, kept_names, list_kept
from postmortem.case.load import case_digest, evidence_digest
from postmortem.case.schema import Case, Knowing
from postmortem.case.schema import Verdict as VerdictWord
from postmortem.checker.errors import RecordError
from postmortem.models.model_set import World, digest_model, resolve_world

if TYPE_CHECKING:
    from postmortem.case.rows import Rows

Cell = str | int | float | bool | None
# The device and dtype of a notebook that ran no model.
NO_MODEL = "none"
AGAIN = "Remove the file and run `make book` again."
Format = TypeVar("Format", bound="Record")


# The systems that records tell of: each adapter in either state, beside the base.
STATES = {
    "base": "base alone",
    "suspect_disabled": "suspect, off",
    "suspect": "suspect, on",
    "reference_disabled": "reference, off",
    "reference": "reference, on",
}


class Record(BaseModel):
    """A line of a record file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Provenance(Record):
    """Where the records of one notebook came from.

    `digests` names what can change the numbers: case, notebook, world, data, and each library
    module by its name. `aside` holds what may differ between two equal runs: times, host, threads.
    """

    kind: Literal["provenance"] = "provenance"
    notebook: str
    case: str
    profile: str
    parameters: dict[str, str | int | float | bool | None]
    digests: dict[str, str]
    versions: dict[str, str]
    device: str
    dtype: str
    seed: int
    aside: dict[str, str | float] = {}


class Prediction(Record):
    """What one system answered to one prompt for one row.

    Log-odds are natural, float64. `number_log_odds` is log(E / (1 - E)) with E the expected value
    over the answers 0.0, 0.1, ... 1.0; `yes_no_log_odds` is log p(Yes) - log p(No). `value` and
    `stage` come from the write-up's parser, `strict_value` from the strict one. In a case of one's
    own both values are strict, and None stands for what was not asked for, could not be read, or
    is not finite.
    """

    kind: Literal["prediction"] = "prediction"
    system: str
    prompt: str
    row_id: str
    group: str
    label: int | None
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    full_prompt_tokens: int
    finished: bool
    value: float | None
    stage: str
    strict_value: float | None
    expected_value: float | None
    number_log_odds: float | None
    yes_no_log_odds: float | None


class Measure(Record):
    """A number, with its 95 % interval where it is an estimate.

    A `value` of None was not measured, for the `reason` given.
    """

    kind: Literal["measure"] = "measure"
    key: str
    value: float | int | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    reason: str = ""


class Verdict(Record):
    """What this run decides of a statement, and the sentence that says why."""

    kind: Literal["verdict"] = "verdict"
    key: str
    verdict: VerdictWord | Knowing
    because: str


class Text(Record):
    """A text as it was produced: a message, a generation."""

    kind: Literal["text"] = "text"
    key: str
    text: str


class Table(Record):
    """A small table for a page; a cell is text, a number or nothing."""

    kind: Literal["table"] = "table"
    key: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Replay(Record):
    """One injected cause, run: how each experiment came out, and what the symptom looked like.

    `key` is unique. A hypothesis is the pair of `cause` and `base`, the kind of base, as the same
    fault looks different on another kind. A cause without degrees has the severity "-". An
    experiment that was not run is left out of `outcomes`.
    """

    kind: Literal["replay"] = "replay"
    key: str
    cause: str
    base: str
    seed: int
    severity: str
    outcomes: dict[str, str]
    features: dict[str, Cell]


class Timing(Record):
    """Seconds that a step took; never part of a digest."""

    kind: Literal["timing"] = "timing"
    key: str
    seconds: float


class Seal(Record):
    """The last line: how many records stand above it and their digest."""

    kind: Literal["seal"] = "seal"
    records: int
    digest: str


AnyRecord = Annotated[
    Provenance | Prediction | Measure | Verdict | Text | Table | Replay | Timing | Seal,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord)


class RecordFile(BaseModel):
    """A sealed record file as read: provenance, records in order, digest."""

    model_config = ConfigDict(frozen=True)

    path: Path
    provenance: Provenance
    records: tuple[AnyRecord, ...]
    digest: str

    def of(self, kind: type[Format]) -> list[Format]:
        """The records of one kind, in order."""
        return [record for record in self.records if isinstance(record, kind)]


def write_records(path: str | Path, provenance: Provenance, *, records: Iterable[Record]) -> Seal:
    """Write a sealed record file: to a temporary name first, then moved."""
    body = [finite(record) for record in records]
    seal = Seal(records=len(body), digest=digest_records(provenance, body))
    lines = [record.model_dump_json() for record in (provenance, *body, seal)]
    write_text(path, "\n".join(lines) + "\n")
    return seal


def read_records(path: str | Path, *, remedy: str = AGAIN) -> RecordFile:
    """Read a record file and check its seal.

    Raises `RecordError` where the file is missing, cut short, holds a line that is no record, or
    was changed after it was sealed; `remedy` is the message's last part.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(path, expected="a record file", found=str(error), remedy=remedy) from None
    # Only "\n" ends a line: a generated text may hold what splitlines() splits at, unescaped.
    lines = text.removesuffix("\n").split("\n") if text else []
    records = [
        _read_line(path, number, line=line, remedy=remedy) for number, line in enumerate(lines, 1)
    ]
    first, last = (records[0], records[-1]) if records else (None, None)
    if not isinstance(first, Provenance) or not isinstance(last, Seal):
        raise RecordError(
            path,
            expected="a provenance first and a seal last",
            found=f"{len(records)} line(s) without them: the run did not finish",
            remedy=remedy,
        )
    body = records[1:-1]
    digest = digest_records(first, body)
    same = text == "".join(f"{record.model_dump_json()}\n" for record in records)
    if (last.records, last.digest) != (len(body), digest) or not same:
        raise RecordError(
            path,
            expected=f"{last.records} records with digest {last.digest}",
            found=f"{len(body)} with {digest}: the file was changed after the run",
            remedy=remedy,
        )
    return RecordFile(path=path, provenance=first, records=tuple(body), digest=digest)


def digest_records(provenance: Provenance, records: Iterable[Record]) -> str:
    """Digest of a run without what may differ between two equal runs: times and host."""
    state = hashlib.sha256(provenance.model_dump_json(exclude={"aside"}).encode())
    for record in records:
        if not isinstance(record, Timing):
            state.update(record.model_dump_json().encode() + b"\n")
    return state.hexdigest()[:16]


def check_fresh(
    file: RecordFile,
    current: Mapping[str, str],
    *,
    remedy: str = "Run `make book` to make it again.",
) -> None:
    """Raise `RecordError` naming what has changed since the records were made.

    `current` holds today's digest of each input that the provenance names, and `remedy` is the
    message's last part.
    """
    for name, digest in file.provenance.digests.items():
        if current.get(name) != digest:
            raise stale(file, name, current.get(name), remedy=remedy)


def stale(file: RecordFile, name: str, found: str | None, *, remedy: str) -> RecordError:
    """The error for an input that is not as it was when the records were made."""
    return RecordError(
        f"{file.path} is stale",
        expected=f"{name} with digest {file.provenance.digests[name]}, as when it was made",
        found=found or "no such input any more",
        remedy=remedy,
    )


def count_records(folder: str | Path) -> int:
    """How many records the files of a folder hold."""
    return sum(len(read_records(path).records) for path in sorted(Path(folder).glob("*.jsonl")))


def finite(record: Record) -> Record:
    """The record itself; `RecordError` where a number in it is not finite.

    JSON has no NaN, and a page must not show one: what cannot be measured is None with a reason.
    """
    cells: list[Cell] = []
    if isinstance(record, Table):
        cells = [cell for row in record.rows for cell in row]
    elif isinstance(record, Replay):
        cells = list(record.features.values())
    numbers = [value for value in (*vars(record).values(), *cells) if isinstance(value, float)]
    if not all(map(math.isfinite, numbers)):
        name = getattr(record, "key", None) or getattr(record, "row_id", "")
        raise RecordError(
            f"{getattr(record, 'kind', 'record')} {name!r}",
            expected="a finite number, or None with a reason",
            found=str(numbers),
        )
    return record


def _read_line(path: Path, number: int, *, line: str, remedy: str) -> AnyRecord:
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]["msg"]
        raise RecordError(
            f"{path}, line {number}",
            expected="a record",
            found=found,
            remedy=remedy,
        ) from None


LIBRARY = Path(__file__).parents[1]
VERSIONED = ("torch", "transformers", "peft", "numpy", "pandas", "papermill", "lora-postmortem")
NO_COMMIT = "no commit"


@cache  # every step of a build names it
def digest_library() -> str:
    """Digest of every file of the library, by its bytes: any change of code runs a build again."""
    state = hashlib.sha256()
    for path in sorted(LIBRARY.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            state.update(f"{path.relative_to(LIBRARY)} {path.stat().st_size}\n".encode())
            state.update(path.read_bytes())
    return state.hexdigest()[:16]


def digest_notebook(path: str | Path) -> str:
    """Digest of what a notebook does: the source of its code cells.

    A tool that writes records is digested as it is.
    """
    source = Path(path).read_bytes()
    if Path(path).suffix == ".ipynb":
        cells = json.loads(source)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        source = json.dumps(code).encode()
    return hashlib.sha256(source).hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of what computes the numbers, and of Python."""
    found = {name: version(name) for name in VERSIONED}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found}


def settings_digest(case: Case, settings: Mapping[str, str | int]) -> str:
    """Digest of what a notebook is run with, apart from its world and code."""
    profile = case.profile(str(settings["profile"]))
    named = [str(settings[key]) or getattr(profile, key) for key in ("data", "labels")]
    files = [digest_file(path) if path and Path(path).is_file() else path for path in named]
    chosen = [settings[name] for name in ("profile", "rows", "device", "dtype")]
    read = [case_digest(case, str(settings["profile"])), evidence_digest(case), files]
    parts = [*read, chosen, package_versions()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def describe_run(started: float) -> dict[str, str | float]:
    """When a run began, how long it took until now, and on which commit and machine."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
        "seconds": time.time() - started,
        "commit": find_commit(),
        "hardware": platform.processor() or platform.machine(),
    }


def find_commit() -> str:
    """The commit that the library stands at, with "+" where files differ from it.

    Where there is no git, or this copy of the library is in no repository, there is no commit.
    """
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return NO_COMMIT


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(LIBRARY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# Measures, verdicts, texts and tables, each by key.
Values = dict[str, dict[str, Any]]


def add_table(
    values: Values, key: str, columns: Iterable[str], rows: Iterable[Iterable[Cell]]
) -> None:
    """Add a table under a key."""
    values["tables"][key] = {"columns": list(columns), "rows": [list(row) for row in rows]}


def input_digests(
    notebook: Path, case: Case, *, world: World, rows: "Rows", replays: str = ""
) -> dict[str, str]:
    """Digest of each input of a notebook; `replays` is that of the kept ones, where it reads them.

    What the library computes is no input: a build runs again when its code changes, and a kept
    record is confirmed.
    """
    found = {
        "case": case_digest(case, world.profile),
        "world": world.digest,
        "data": rows.digest,
        "notebook": digest_notebook(notebook),
    }
    return found | ({"replays": replays, "evidence": evidence_digest(case)} if replays else {})


# The record that training leaves beside the models of a profile.
WORLD = "world"
# The record of what releases of PEFT do, which no notebook makes.
PEFT_VERSIONS = "peft_versions"
# The record of faults planted in adapters that chose nothing, which no notebook makes.
HELD_OUT = "held_out"
# What brings a record back, where it is not `make record`.
REMEDIES = {
    "bench": "Restore the file, or run `make bench PROFILE={profile}` to make it again.",
    PEFT_VERSIONS: "Restore the file, or run `make peft-versions` to make it again.",
    HELD_OUT: "Restore the file, or run `make held-out DATA=...` to make it again.",
    WORLD: "Restore the files. To ship another training, put what `make world` leaves in their"
    " place and run `make record PROFILE={profile}`.",
}
REMEDY = "Restore the file, or run `make record PROFILE={profile}` to make it again."
# Log-odds that differ by more are other log-odds: rounding on another machine stays far below.
LARGEST_GAP = 1e-3


def read_kept(case: Case, name: str) -> dict[str, RecordFile]:
    """The kept record of a name by profile, in the case's order; checked.

    Raises `RecordError` where one was changed by hand, or where the case, its rows or the models
    that are shipped are no longer those that it was made from.
    """
    found = {}
    for profile in case.profiles:
        path = list_kept(profile).get(name)
        file = _read(path, profile) if path else None
        if file and file.provenance.case == case.name:
            _check_inputs(file, case, profile)
            found[profile] = file
    return found


def read_replays(case: Case) -> list[RecordFile]:
    """The kept replays, one file for each training of the world; checked as any kept record.

    Raises `RecordError` also where there are none: the diagnosis has nothing to learn from.
    """
    names = dict.fromkeys(n for p in case.profiles for n in list_kept(p) if n.startswith(REPLAYS))
    files = [file for name in names for file in read_kept(case, name).values()]
    if not files:
        raise RecordError(
            RESULTS / "embedded" / REPLAYS,
            expected=f"kept replays of the case {case.name}",
            found="none",
            remedy="Restore the files, or run `make record PROFILE=embedded` to make them.",
        )
    return files


def check_kept(case: Case) -> None:
    """Raise `RecordError` where what a book reads is missing or is not as it was made."""
    for profile, settings in case.profiles.items():
        found = list_kept(profile)
        # The pages read what the embedded world leaves; what is kept of a real model may be absent.
        needed = [WORLD, PEFT_VERSIONS, HELD_OUT, *kept_names(settings)] if settings.replays else []
        for name in dict.fromkeys([*needed, *found]):
            if profile not in read_kept(case, name) and name in needed:
                raise RecordError(
                    RESULTS / profile / f"{name}.jsonl",
                    expected=f"a kept run of the case {case.name}",
                    found="one of another case" if name in found else "none",
                    remedy=_remedy(name, profile),
                )


def digest_files(files: Iterable[RecordFile]) -> str:
    """Digest of several records together."""
    return hashlib.sha256(" ".join(file.digest for file in files).encode()).hexdigest()[:16]


def model_folders(folder: Path) -> dict[str, Path]:
    """The models of a trained world by their place in its folder: bases, then adapters."""
    found = [*sorted(folder.glob("bases/*")), *sorted(folder.glob("adapters/*/*"))]
    return {str(path.relative_to(folder)): path for path in found if path.is_dir()}


def _read(path: Path, profile: str) -> RecordFile:
    return read_records(path, remedy=_remedy(path.stem, profile))


def _remedy(name: str, profile: str) -> str:
    return REMEDIES.get(name, REMEDY).format(profile=profile)


def _check_inputs(file: RecordFile, case: Case, profile: str) -> None:
    from postmortem.case.rows import choose_rows  # brings pandas, which most of this does without

    asked, made = case.profile(profile), file.provenance
    remedy = _remedy(file.path.stem, profile)
    current = dict(made.digests) | {
        "case": case_digest(case, profile),
        "data": choose_rows(case, profile, rows=int(made.parameters["rows"] or 0)).digest,
    }
    if asked.replays:
        trained = _read(RESULTS / profile / f"{WORLD}.jsonl", profile)
        folder = trained.path.parent
        models = {name: folder / name for name in members_of(trained)}
        _check_members(trained, models, remedy=_remedy(WORLD, profile))
        if made.seed == asked.seed:  # the models of another training are not shipped
            current["world"] = resolve_world(case, profile).digest
    else:  # of a real model the adapters alone are shipped
        adapters = {role: Path(name) for role, name in asked.all_adapters.items()}
        _check_members(file, adapters, remedy=remedy)
    if made.digests.get("case", current["case"]) != current["case"]:
        # The shipped models were trained on the case's prompts.
        first = "put what `make world` leaves in the models' place and " if asked.replays else ""
        remedy = (
            f"Restore the file of the case. For the new one, {first}"
            f"run `make record PROFILE={profile}`."
        )
        raise stale(file, "case", current["case"], remedy=remedy)
    check_fresh(file, current, remedy=remedy)


def members_of(file: RecordFile) -> Mapping[str, Cell]:
    """Digests by name of the models behind a record; none where it asks a base alone."""
    tables = [table for table in file.of(Table) if table.key == "members"]
    return {str(row[0]): row[1] for table in tables for row in table.rows}


def _check_members(file: RecordFile, folders: Mapping[str, Path], *, remedy: str) -> None:
    made_with = members_of(file)
    for name, folder in folders.items() if made_with else ():
        digest = digest_model(folder) if folder.is_dir() else "no such folder"
        if digest != made_with.get(name):
            raise RecordError(
                f"{folder}, the {name} of {file.path}",
                expected=f"files with digest {made_with.get(name)}, as when the record was made",
                found=digest,
                remedy=remedy,
            )


class Confirmation(BaseModel):
    """A sample of a record's answers, asked again: when, at which commit, by which versions.

    `record` is the record's digest. `answers` is how many were compared, each equal in its text;
    `largest_gap` is in nats.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    record: str
    made: str
    commit: str
    versions: dict[str, str]
    answers: int
    largest_gap: float


def confirmation_path(record: Path) -> Path:
    """Where the confirmation of a record stands: beside it."""
    return record.with_suffix(".confirmed.json")


def read_confirmation(record: RecordFile) -> Confirmation | None:
    """The confirmation of this very record, or None; `RecordError` where it cannot be read."""
    path = confirmation_path(record.path)
    if not path.is_file():
        return None
    try:
        found = Confirmation.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        expected = "a confirmation of a record"
        raise RecordError(path, expected=expected, found=str(error)[:200]) from None
    return found if found.record == record.digest else None


@dataclass(frozen=True)
class Comparison:
    """Answers that two runs share: how many, how many texts are the same, the gap in nats.

    `first` names the first answer that differs, with both texts.
    """

    answers: int
    texts: int
    largest_gap: float
    first: str = ""

    @property
    def alike(self) -> bool:
        """Whether every text is the same and all log-odds are within `LARGEST_GAP`."""
        return self.answers > 0 and not self.first


def compare_answers(kept: Iterable[Prediction], asked: Iterable[Prediction]) -> Comparison:
    """Hold answers against those on record, system by system, prompt by prompt, row by row."""
    ours, theirs = _by_place(asked), _by_place(kept)
    texts, gaps, first = 0, [0.0], ""
    shared = [place for place in ours if place in theirs]
    for place in shared:
        one, other = ours[place], theirs[place]
        gap = max(abs(a - b) for a, b in zip(_log_odds(one), _log_odds(other), strict=True))
        texts += one.text == other.text
        gaps.append(gap)
        if not first and (one.text != other.text or not gap <= LARGEST_GAP):
            first = (
                f"{', '.join(place)}: {other.text!r} on record, {one.text!r}, {gap:.2g} nat away"
            )
    return Comparison(len(shared), texts, max(gaps), first)


def confirm(kept: RecordFile, sample: RecordFile) -> Confirmation:
    """Hold a sample's answers against those on record and keep the outcome beside the record.

    Raises `RecordError` where an answer differs, or where nothing can be compared.
    """
    found = compare_answers(kept.of(Prediction), sample.of(Prediction))
    if not found.alike:
        raise RecordError(
            kept.path,
            expected=f"the answers on record, log-odds within {LARGEST_GAP} nat",
            found=found.first or "no answer that both have",
            remedy="Make the record again.",
        )
    outcome = Confirmation(
        record=kept.digest,
        made=str(sample.provenance.aside["started"]),
        commit=str(sample.provenance.aside["commit"]),
        versions=package_versions(),
        answers=found.answers,
        largest_gap=found.largest_gap,
    )
    write_text(confirmation_path(kept.path), outcome.model_dump_json(indent=1) + "\n")
    return outcome


def confirm_files(kept: str | Path, sample: str | Path) -> str:
    """Confirm one file by another; the line that says what was compared."""
    found = confirm(read_records(kept), read_records(sample))
    return f"{found.answers} answers alike, log-odds within {found.largest_gap:.1g} nat"


def _by_place(predictions: Iterable[Prediction]) -> dict[tuple[str, str, str], Prediction]:
    return {(p.system, p.prompt, p.row_id): p for p in predictions}


def _log_odds(prediction: Prediction) -> tuple[float, float]:
    """Both log-odds; NaN, which is near nothing, for one that is missing."""
    nan = float("nan")
    number, yes_no = prediction.number_log_odds, prediction.yes_no_log_odds
    return nan if number is None else number, nan if yes_no is None else yes_no
