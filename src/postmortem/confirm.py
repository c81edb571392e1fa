"""Confirming a kept record: a sample of its answers, asked again with today's code.

A record of a real model takes most of an hour to make, and code that leaves every number alone
would make it stale as well. A confirmation names the record, the code that was tried, and how far
its answers lie from those on record. It says nothing of what was not asked again.
"""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from postmortem.errors import RecordError
from postmortem.records import Prediction, RecordFile, read_records, write_text

# Log-odds that differ by more are other log-odds: rounding on another machine stays far below.
LARGEST_GAP = 1e-3


class Confirmation(BaseModel):
    """What was tried: the `record` by its digest, and the `digests` of today's inputs.

    `answers` is how many were compared, each equal in its text; `largest_gap` is in nats.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    record: str
    digests: dict[str, str]
    answers: int
    largest_gap: float
    made: str


def place_of(record: Path) -> Path:
    """Where the confirmation of a record stands: beside it."""
    return record.with_suffix(".confirmed.json")


def read_confirmation(record: RecordFile) -> Confirmation | None:
    """The confirmation of this very record, or None."""
    path = place_of(record.path)
    if not path.is_file():
        return None
    try:
        found = Confirmation.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        expected = "a confirmation of a record"
        raise RecordError(path, expected=expected, found=str(error)[:200]) from None
    return found if found.record == record.digest else None


def confirm(kept: RecordFile, sample: RecordFile) -> Confirmation:
    """Hold a sample's answers against those on record and keep the outcome beside the record.

    Raises `RecordError` where an answer differs, or where nothing can be compared.
    """
    ours, theirs = _by_place(sample.of(Prediction)), _by_place(kept.of(Prediction))
    shared = [place for place in ours if place in theirs]
    if not shared:
        raise RecordError(kept.path, expected="answers that the sample has too", found="none")
    largest = 0.0
    for place in shared:
        one, other = ours[place], theirs[place]
        gap = max(abs(a - b) for a, b in zip(_log_odds(one), _log_odds(other), strict=True))
        if one.text != other.text or not gap <= LARGEST_GAP:
            raise RecordError(
                f"{kept.path}: {', '.join(place)}",
                expected=f"the answer {other.text!r}, log-odds within {LARGEST_GAP} nat",
                found=f"{one.text!r}, {gap:.2g} nat away",
                remedy="Make the record again.",
            )
        largest = max(largest, gap)
    found = Confirmation(
        record=kept.digest,
        digests=sample.provenance.digests,
        answers=len(shared),
        largest_gap=largest,
        made=str(sample.provenance.aside["started"]),
    )
    write_text(place_of(kept.path), found.model_dump_json(indent=1) + "\n")
    return found


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
