"""Records: what a run measured and where it came from, one JSON object a line.

A record file begins with its provenance and ends with a seal: the number of records and the
digest of everything that can be compared between two runs. Times and the host stand apart and
are not part of the digest.
"""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from postmortem.case.files import digest_file, write_text
from postmortem.case.load import case_digest
from postmortem.case.schema import Case, Knowing
from postmortem.case.schema import Verdict as VerdictWord
from postmortem.checker.errors import RecordError

Cell = str | int | float | bool | None
# The device and dtype of a notebook that ran no model.
NO_MODEL = "none"
AGAIN = "Remove the file and run `make book` again."
Format = TypeVar("Format", bound="Record")


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
    parts = [case_digest(case, str(settings["profile"])), files, chosen, package_versions()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


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
