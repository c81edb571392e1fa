"""Kept runs: records of what is too heavy for a build, and what holds them.

A kept record is held by its seal, by the digests of its inputs, and by its confirmation: a sample
of its answers asked again with today's code. The tests confirm what runs in the embedded world,
`make confirm` the rest; a confirmation says nothing of what was not asked again.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from postmortem.case.files import write_text
from postmortem.case.load import case_digest
from postmortem.case.schema import Case
from postmortem.case.site import REPLAYS, RESULTS, kept_names, list_kept
from postmortem.checker.errors import RecordError
from postmortem.experiments.records import (
    Cell,
    Prediction,
    RecordFile,
    Table,
    check_fresh,
    package_versions,
    read_records,
    stale,
)
from postmortem.experiments.session import choose_rows
from postmortem.models.world import digest_model, resolve_world

# The record that training leaves beside the models of a profile.
WORLD = "world"
# What brings a record back, where it is not `make record`.
REMEDIES = {
    "bench": "Restore the file, or run `make bench PROFILE={profile}` to make it again.",
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
        needed = [WORLD, *kept_names(settings)] if settings.replays else []
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
    if made.digests["case"] != current["case"]:
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
