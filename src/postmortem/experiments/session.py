"""A notebook's session: its case, world and rows, and the records it adds."""

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from postmortem.case.load import load_case
from postmortem.case.rows import Rows
from postmortem.case.schema import Case, Knowing, Profile, Recording, Verdict
from postmortem.checker.errors import CaseError, RecordError
from postmortem.experiments.inputs import choose_rows, input_digests
from postmortem.experiments.metrics import Estimate
from postmortem.experiments.records import (
    NO_MODEL,
    Cell,
    Measure,
    Prediction,
    Provenance,
    Record,
    Seal,
    Table,
    Text,
    Timing,
    find_commit,
    package_versions,
    write_records,
)
from postmortem.experiments.records import Verdict as VerdictRecord
from postmortem.models.world import World, read_world

if TYPE_CHECKING:
    from postmortem.models.loading import LoadedBase
    from postmortem.models.prefill import SharedLayers


# Seconds between two lines on how far a step is.
SAY_EVERY = 5


@dataclass(frozen=True)
class Answers:
    """One system's predictions for one prompt, in the order of the rows.

    `contract` is what the prompt asks for. `first_log_probs` is the log-distribution of the first
    answer token, (rows, vocabulary), or of the classes, (rows, classes); `number_log_probs` that
    of the eleven numbers, (rows, 11). A number that a prediction lacks is NaN.
    """

    system: str
    prompt: str
    contract: str
    predictions: tuple[Prediction, ...]
    first_log_probs: np.ndarray
    number_log_probs: np.ndarray

    @property
    def values(self) -> list[float]:
        """Values by the write-up's parser; by the strict one in a case of one's own."""
        return [_or_nan(prediction.value) for prediction in self.predictions]

    @property
    def strict_values(self) -> list[float | None]:
        """Values by the strict parser."""
        return [prediction.strict_value for prediction in self.predictions]

    @property
    def groups(self) -> list[str]:
        """The group (rule) of each row."""
        return [prediction.group for prediction in self.predictions]

    @property
    def labels(self) -> np.ndarray | None:
        """The truth, or None where it is not known."""
        found = [prediction.label for prediction in self.predictions]
        return None if None in found else np.array(found)

    @property
    def number_log_odds(self) -> list[float]:
        """Log-odds of the expected number of each row."""
        return [_or_nan(prediction.number_log_odds) for prediction in self.predictions]

    @property
    def yes_no_log_odds(self) -> list[float]:
        """log p(Yes) - log p(No) of each row, or of the two answers in their place."""
        return [_or_nan(prediction.yes_no_log_odds) for prediction in self.predictions]

    @property
    def asked_log_odds(self) -> list[float]:
        """Log-odds of what the prompt asks for: the number's, or those of the two answers."""
        return self.number_log_odds if self.contract == "number" else self.yes_no_log_odds


@dataclass
class Session:
    """Collects records while a notebook runs and seals them when it is done."""

    notebook: Path
    case: Case
    profile_name: str
    world: World
    rows: Rows
    records_path: Path
    parameters: dict[str, str | int | float | bool | None]
    device: str = "auto"
    dtype: str = "auto"
    budget: int = 16384  # the most tokens in a batch
    replays: str = ""  # digest of the kept replays, where the notebook reads them
    records: list[Record] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    @property
    def profile(self) -> Profile:
        """The profile that this session runs in."""
        return self.case.profile(self.profile_name)

    @cached_property
    def base(self) -> "LoadedBase":
        """The world's base, loaded at first use."""
        return self.load("base")

    @cached_property
    def shared(self) -> "SharedLayers":
        """What the base's layers below all of the world's adapters compute, kept between them."""
        from postmortem.experiments.asking import share_layers

        return share_layers(self)

    def load(self, role: str, *, step: str = "") -> "LoadedBase":
        """Load a base of the world by its role; a second time under another name for the step."""
        from postmortem.experiments.asking import load_role

        return load_role(self, role, step=step)

    def answer(self, prompt: str, **how: Any) -> Answers:
        """Score every row with a prompt of the case and record the predictions, as `asking` does.

        What runs no model does not wait for the libraries that do: they are imported here.
        """
        from postmortem.experiments.asking import answer

        return answer(self, prompt, **how)

    def add(self, *records: Record) -> None:
        """Add records; a repeated key is a mistake in the notebook."""
        taken = {(r.kind, r.key) for r in self.records if hasattr(r, "key")}  # type: ignore[attr-defined]
        for record in records:
            key = (getattr(record, "kind", ""), getattr(record, "key", None))
            if key[1] is not None and key in taken:
                raise RecordError(f"record {key[1]!r}", expected="one of its kind", found="two")
            taken.add(key)
        self.records += records

    def measure(
        self, key: str, value: Estimate | float | int | None, *, unit: str = "", reason: str = ""
    ) -> None:
        """Record a number, or an estimate with its interval; None needs a reason."""
        parts: dict[str, Any] = {"value": value}
        if isinstance(value, Estimate):
            parts = dataclasses.asdict(value)
        if parts["value"] is None and not reason:
            raise RecordError(f"measure {key!r}", expected="a reason for no value", found="none")
        why = reason if parts["value"] is None else ""
        self.add(Measure(key=key, unit=unit, reason=why, **parts))

    def verdict(self, key: str, decided: bool | Verdict | Knowing | None, because: str) -> None:
        """Record what this run decides: True holds, False is refuted, None cannot tell."""
        words: dict[bool | None, Verdict] = {True: "holds", False: "refuted", None: "cannot tell"}
        word = decided if isinstance(decided, str) else words[decided]
        self.add(VerdictRecord(key=key, verdict=word, because=because))

    def text(self, key: str, text: str) -> None:
        """Record a text as it was produced."""
        self.add(Text(key=key, text=text))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Record a small table."""
        self.add(Table(key=key, columns=tuple(columns), rows=tuple(map(tuple, rows))))

    def show(self, key: str) -> pd.DataFrame:
        """A recorded table, for the notebook's own page."""
        found = [r for r in self.records if isinstance(r, Table) and r.key == key]
        if not found:
            raise RecordError(f"table {key!r}", expected="a record of it", found="none")
        table = found[0]
        return pd.DataFrame(table.rows, columns=list(table.columns)).set_index(table.columns[0])

    def decided(self, prefix: str = "") -> pd.DataFrame:
        """The verdicts so far whose key begins with `prefix`, for the notebook's own page."""
        rows = [
            (r.key, r.verdict, r.because)
            for r in self.records
            if isinstance(r, VerdictRecord) and r.key.startswith(prefix)
        ]
        frame = pd.DataFrame(rows, columns=["statement", "verdict", "because"])
        return frame.set_index("statement")

    def measured(self, prefix: str = "") -> pd.DataFrame:
        """The numbers so far whose key begins with `prefix`, for the notebook's own page."""
        found = [r for r in self.records if isinstance(r, Measure) and r.key.startswith(prefix)]
        rows = [(r.key, r.value, r.low, r.high, r.unit, r.reason) for r in found]
        columns = ["number", "value", "low", "high", "unit", "why not"]
        frame = pd.DataFrame(rows, columns=columns, dtype=object).set_index("number")
        return frame.fillna("")

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Record how long a step takes, and say so in the progress file."""
        self.say(step)
        start = time.perf_counter()
        yield
        self.add(Timing(key=step, seconds=time.perf_counter() - start))

    def follow(self, step: str, *, total: int, unit: str = "rows") -> Callable[[int], None]:
        """What a step calls with how much is done; it says so, and how long the rest will take."""
        start = said = time.perf_counter()

        def tell(done: int) -> None:
            nonlocal said
            now = time.perf_counter()
            if done < total and now - said > SAY_EVERY:
                said, pace = now, done / (now - start)
                left = f"about {(total - done) / pace:.0f} s left"
                self.say(f"{step}: {done} of {total} {unit}, {pace:.2f} a second, {left}")

        return tell

    def say(self, line: str) -> None:
        """Tell the person who waits; the runner shows these lines."""
        with self.records_path.with_suffix(".progress").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def finish(self) -> Seal:
        """Write the records with their provenance; nothing is on disk before this."""
        base = self.__dict__.get("base")
        provenance = Provenance(
            notebook=self.notebook.stem,
            case=self.case.name,
            profile=self.profile_name,
            parameters=self.parameters,
            digests=input_digests(
                *(self.notebook, self.case),
                world=self.world,
                rows=self.rows,
                replays=self.replays,
            ),
            versions=package_versions(),
            device=base.device if base else NO_MODEL,
            dtype=base.dtype if base else NO_MODEL,
            seed=self.world.seed,
            aside={
                "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.started)),
                "seconds": time.time() - self.started,
                "commit": find_commit(),
                **self._describe_machine(),
            },
        )
        seal = write_records(self.records_path, provenance, records=self.records)
        self.records_path.with_suffix(".progress").unlink(missing_ok=True)
        return seal

    def _describe_machine(self) -> Mapping[str, str | float]:
        base = self.__dict__.get("base")
        if base is None:
            return {"hardware": platform.processor() or platform.machine()}
        from postmortem.experiments.asking import describe_machine

        return describe_machine(base.device)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def open_session(
    notebook: str,
    *,
    case: str,
    profile: str,
    world: str,
    records: str,
    data: str = "",
    labels: str = "",
    rows: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> Session:
    """Open a notebook's session from its parameters; an empty `data` generates the rows."""
    pd.set_option("display.max_colwidth", None)  # a reason cut in half says nothing
    loaded = load_case(case)
    Path(records).parent.mkdir(parents=True, exist_ok=True)
    return Session(
        notebook=Path(notebook),
        case=loaded,
        profile_name=profile,
        world=read_world(world),
        rows=choose_rows(loaded, profile, data=data, labels=labels, rows=rows),
        records_path=Path(records),
        parameters={
            "profile": profile,
            "data": Path(data).name,
            "rows": rows,
        },
        device=device,
        dtype=dtype,
    )


def open_recording(
    notebook: str,
    *,
    case: str,
    profile: str,
    world: str,
    records: str,
    sample: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[Session, Recording]:
    """Open a session on generated rows, as many as the profile records, and say all its sizes.

    A `sample` limits them to so many rows, for a run that is held against the record.
    """
    sizes = load_case(case).profile(profile).recorded
    if sizes is None:
        raise CaseError(
            f"{case}, key `profiles.{profile}`",
            expected="`recorded`, which says how many rows to record",
            found="none",
        )
    if sample:
        sizes = Recording(**{name: min(sample, size) for name, size in sizes})
    parts = {"case": case, "profile": profile, "world": world, "records": records}
    session = open_session(notebook, **parts, rows=sizes.rows, device=device, dtype=dtype)
    return session, sizes
