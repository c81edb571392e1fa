"""A notebook's session: its case, world and rows, and the records it adds."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from postmortem.case.load import load_case
from postmortem.case.prompts import Prompt, encode
from postmortem.case.rows import Rows, choose_rows
from postmortem.case.schema import Case, Knowing, Profile, Recording, Verdict
from postmortem.checker.errors import CaseError, RecordError
from postmortem.experiments.metrics import Estimate
from postmortem.experiments.records import (
    NO_MODEL,
    Cell,
    Measure,
    Provenance,
    Record,
    Seal,
    Table,
    Text,
    Timing,
    describe_run,
    input_digests,
    package_versions,
    write_records,
)
from postmortem.experiments.records import Verdict as VerdictRecord
from postmortem.models.model_set import ADAPTERS, World, is_small, read_world, resolve_world

if TYPE_CHECKING:
    from postmortem.models.loading import LoadedBase
    from postmortem.models.prefill import SharedLayers


# Seconds between two lines on how far a step is.
SAY_EVERY = 5


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
    bases: dict[str, "LoadedBase"] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    @property
    def profile(self) -> Profile:
        """The profile that this session runs in."""
        return self.case.profile(self.profile_name)

    @property
    def name(self) -> str:
        """What this run of a notebook is called: its records bear the same name."""
        return self.records_path.stem

    @property
    def is_small(self) -> bool:
        """Whether a second copy of the base is loaded in no time."""
        return is_small(self.profile)

    def encode(self, prompt: str, *, row: int, tokenizer: Any) -> Prompt:
        """A row as the model receives it under a prompt of the case."""
        limit = self.case.decoding(prompt).max_prompt_tokens
        return encode(
            self.case.prompt(prompt), self.rows.row(row), tokenizer=tokenizer, limit=limit
        )

    @property
    def base(self) -> "LoadedBase":
        """The world's base, loaded at first use."""
        return self.load("base")

    def load(self, role: str) -> "LoadedBase":
        """A base of the world by its role, loaded at first use and kept."""
        if role not in self.bases:
            # What runs no model does not wait for the libraries that do.
            from postmortem.models.loading import count_classes, load_base

            classes = count_classes(self.world.path("suspect")) if self.case.classifies else None
            with self.timed(f"load {role}"):
                self.bases[role] = load_base(
                    self.world.path(role), device=self.device, dtype=self.dtype, classes=classes
                )
        return self.bases[role]

    def forget(self, base: "str | LoadedBase") -> None:
        """Load a base anew at its next use, with what was kept of it: its weights have changed."""
        for role in [role for role, kept in self.bases.items() if base in (role, kept)]:
            del self.bases[role]
            if role == "base":
                vars(self).pop("shared", None)

    @cached_property
    def shared(self) -> "SharedLayers":
        """What the base's layers below all of the world's adapters compute, kept between them."""
        from postmortem.models.prefill import SharedLayers, layers_below
        from postmortem.models.scoring import spare_memory

        adapters = [self.world.path(role) for role in ADAPTERS if self.world.has(role)]
        return SharedLayers(depth=layers_below(adapters), limit=spare_memory(self.base.device))

    def shrink(self, tokens: int) -> None:
        """Go on in smaller batches, with what is scored later too."""
        self.budget = tokens
        self.say(f"memory ran out; from here on batches of {tokens} tokens")

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

    def has_table(self, key: str) -> bool:
        """Whether a table of that key has been recorded."""
        return any(isinstance(r, Table) and r.key == key for r in self.records)

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
        seconds = time.perf_counter() - start
        again = f"{step}, again "
        taken = [r.key for r in self.records if isinstance(r, Timing)]
        times = sum(key == step or key.startswith(again) for key in taken)
        self.add(Timing(key=f"{again}{times}" if times else step, seconds=seconds))

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
        base = self.bases.get("base")
        provenance = Provenance(
            notebook=self.notebook.stem,
            case=self.case.name,
            profile=self.profile_name,
            parameters=self.parameters,
            digests=input_digests(
                self.notebook,
                self.case,
                world=self.world,
                rows=self.rows,
                replays=self.replays,
            ),
            versions=package_versions(),
            device=base.device if base else NO_MODEL,
            dtype=base.dtype if base else NO_MODEL,
            seed=self.world.seed,
            aside=describe_run(self.started) | self._describe_device(),
        )
        seal = write_records(self.records_path, provenance, records=self.records)
        self.records_path.with_suffix(".progress").unlink(missing_ok=True)
        return seal

    def _describe_device(self) -> dict[str, str | float]:
        """The device of the base in place of the machine, where one was loaded."""
        base = self.bases.get("base")
        if base is None:
            return {}
        import torch

        from postmortem.models.loading import describe_hardware

        return {"hardware": describe_hardware(base.device), "threads": torch.get_num_threads()}


def open_session(given: Mapping[str, Any]) -> Session:
    """Open a notebook's session from its parameters: `globals()`, in a notebook.

    A build gives all of them. In a notebook that is opened by hand the profile is the case's first,
    its models are looked up, and the records go to a folder of their own below `_build`.
    """
    pd.set_option("display.max_colwidth", None)  # a reason cut in half says nothing
    _enter_checkout(str(given["case"]))
    case, notebook = load_case(given["case"]), Path(given["notebook"])
    profile = given["profile"] or case.default_profile
    world = read_world(given["world"]) if given["world"] else resolve_world(case, profile)
    records = Path(given["records"] or f"_build/by-hand/{notebook.stem}.jsonl")
    records.parent.mkdir(parents=True, exist_ok=True)
    data, rows = given.get("data", ""), given.get("rows", 0)
    return Session(
        notebook=notebook,
        case=case,
        profile_name=profile,
        world=world,
        rows=choose_rows(case, profile, data=data, labels=given.get("labels", ""), rows=rows),
        records_path=records,
        parameters={"profile": profile, "data": Path(data).name, "rows": rows},
        device=given["device"],
        dtype=given["dtype"],
    )


def _enter_checkout(case: str) -> None:
    """Go to the folder that the paths of the parameters start from: Jupyter is elsewhere."""
    for folder in (Path(), *Path().resolve().parents):
        if (folder / case).is_file():
            os.chdir(folder)
            return


def open_recording(given: Mapping[str, Any]) -> tuple[Session, Recording]:
    """Open a session on generated rows, as many as the profile records, and say all its sizes.

    A `sample` limits them to so many rows, for a run that is held against the record.
    """
    _enter_checkout(str(given["case"]))
    profile, sample = given["profile"], given.get("sample", 0)
    sizes = load_case(given["case"]).profile(profile).recorded
    if sizes is None:
        raise CaseError(
            f"{given['case']}, key `profiles.{profile}`",
            expected="`recorded`, which says how many rows to record",
            found="none",
        )
    if sample:
        sizes = Recording(**{name: min(sample, size) for name, size in sizes})
    return open_session({**given, "rows": sizes.rows}), sizes
