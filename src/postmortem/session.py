"""A notebook's session: its case, world and rows, and the records it adds."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from postmortem.case import (
    Case,
    Knowing,
    Profile,
    PromptTemplate,
    Recording,
    Verdict,
    load_case,
)
from postmortem.corpus import Rows
from postmortem.errors import CaseError, ModelError, RecordError
from postmortem.inputs import choose_rows, input_digests
from postmortem.memory import score_within_memory, spare_memory
from postmortem.metrics import Estimate
from postmortem.models import (
    WIDER,
    AttachedAdapter,
    LoadedBase,
    attached,
    count_classes,
    describe_hardware,
    load_base,
    positive_class,
)
from postmortem.parsing import Parsed, parse_as_written, parse_choice, parse_strict
from postmortem.prefill import SharedLayers, layers_below
from postmortem.prompts import encode, lead_of
from postmortem.provenance import package_versions
from postmortem.records import (
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
    write_records,
)
from postmortem.records import Verdict as VerdictRecord
from postmortem.scoring import Reply, Scores, score_classes
from postmortem.world import ADAPTERS, World, read_world

READ_OUTS = ("expected_value", "number_log_odds", "yes_no_log_odds")


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
    records: list[Record] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    @property
    def profile(self) -> Profile:
        """The profile that this session runs in."""
        return self.case.profile(self.profile_name)

    @cached_property
    def base(self) -> LoadedBase:
        """The world's base, loaded at first use."""
        return self.load("base")

    @cached_property
    def shared(self) -> SharedLayers:
        """What the base's layers below all of the world's adapters compute, kept between them."""
        adapters = [self.world.path(role) for role in ADAPTERS if self.world.has(role)]
        limit = spare_memory(self.base.device)
        return SharedLayers(depth=layers_below(adapters), limit=limit)

    def load(self, role: str, *, step: str = "") -> LoadedBase:
        """Load a base of the world by its role; a second time under another name for the step."""
        with self.timed(step or f"load {role}"):
            return load_base(
                self.world.path(role),
                device=self.device,
                dtype=self.dtype,
                classes=self._classes(),
            )

    def answer(
        self,
        prompt: str,
        *,
        system: str = "base",
        base: LoadedBase | None = None,
        adapter: Path | None = None,
        ignore_mismatched_sizes: bool = False,
        disabled: bool = False,
        rows: Rows | None = None,
        kept: bool = True,
        rows_name: str = "",
    ) -> Answers:
        """Score every row with a prompt of the case and record the predictions.

        `system` names a role of the world; its adapter is put on the base for this call alone.
        `adapter` gives another folder under that name. A `disabled` adapter is put on and switched
        off, and the system's name says so. `rows` takes the place of the session's own, under
        `rows_name`; what is not `kept` is answered and not recorded.
        """
        base = base or self.base
        folder = adapter or (None if system.endswith("base") else self.world.path(system))
        name = f"{system}_disabled" if disabled else system
        chosen = self.rows if rows is None else rows
        step = f"{name} on {prompt}" + (f", {rows_name}" if rows_name else "")
        with self.timed(step):
            if folder is None:
                answers = self._score(base.model, base, prompt=prompt, system=name, rows=chosen)
            else:
                with attached(
                    base, folder, ignore_mismatched_sizes=ignore_mismatched_sizes
                ) as loaded:
                    self._note_warnings(name, loaded)
                    with loaded.model.disable_adapter() if disabled else nullcontext():
                        answers = self._score(
                            loaded.model, base, prompt=prompt, system=name, rows=chosen
                        )
        self.records += answers.predictions if kept else ()
        return answers

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
            digests=input_digests(self.notebook, self.case, world=self.world, rows=self.rows),
            versions=package_versions(),
            device=base.device if base else NO_MODEL,
            dtype=base.dtype if base else NO_MODEL,
            seed=self.world.seed,
            aside={
                "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.started)),
                "seconds": time.time() - self.started,
                "hardware": describe_hardware(base.device if base else "cpu"),
                "threads": torch.get_num_threads(),
            },
        )
        seal = write_records(self.records_path, provenance, records=self.records)
        self.records_path.with_suffix(".progress").unlink(missing_ok=True)
        return seal

    def _score(
        self, model: Any, base: LoadedBase, *, prompt: str, system: str, rows: Rows
    ) -> Answers:
        template = self.case.prompt(prompt)
        decoding = self._decoding(prompt)
        prompts = [
            encode(
                template,
                rows.row(index),
                tokenizer=base.tokenizer,
                limit=decoding["max_prompt_tokens"],
            )
            for index in range(len(rows))
        ]
        progress = self._progress(f"{system} on {prompt}", total=len(prompts))
        if template.contract == "class":
            scores = score_classes(
                model,
                base.tokenizer,
                prompts=prompts,
                positive=positive_class(model.config, self.case.columns.positive),
                progress=progress,
            )
        else:
            scores = score_within_memory(
                model,
                base.tokenizer,
                prompts=prompts,
                lead=lead_of(template),
                max_new_tokens=decoding["max_new_tokens"],
                # The incident's chapters show both read-outs under every prompt.
                numbers=template.contract == "number" or not self.case.own,
                answers=template.answers[::-1],
                shared=self.shared if base is self.base else None,
                budget=self.budget,
                tell=self._shrink,
                progress=progress,
            )
        if base.dtype == "float16" and not self.case.own:
            _require_finite(scores, f"{system} on {prompt}")
        labels = rows.labels
        predictions = tuple(
            Prediction(
                system=system,
                prompt=prompt,
                row_id=rows.ids[index],
                group=rows.groups[index],
                label=None if labels is None else int(labels[index]),
                prompt_tokens=len(prompts[index].token_ids),
                full_prompt_tokens=prompts[index].full_length,
                **self._read(reply, template),
            )
            for index, reply in enumerate(scores.replies)
        )
        return Answers(
            system,
            prompt,
            template.contract,
            predictions,
            scores.first_log_probs,
            scores.number_log_probs,
        )

    def _read(self, reply: Reply, template: PromptTemplate) -> dict[str, Any]:
        """A reply as a prediction holds it, with the values that the parsers make of its text."""
        parts = dataclasses.asdict(reply)
        strict = parse_strict(reply.text)
        if not self.case.own:
            written = parse_as_written(reply.text)
            return parts | {
                "value": written.value,
                "stage": written.stage,
                "strict_value": strict.value,
            }
        if template.contract == "class":
            strict = Parsed(_or_none(reply.expected_value), "strict")
        elif template.contract != "number":
            strict = parse_choice(reply.text, template.answers)
        numbers = {name: _or_none(parts[name]) for name in READ_OUTS}
        return (
            parts
            | numbers
            | {"value": strict.value, "stage": strict.stage, "strict_value": strict.value}
        )

    def _classes(self) -> int | None:
        """How many classes the suspect's head tells apart; None for a language model."""
        return count_classes(self.world.path("suspect")) if self.case.classifies else None

    def _shrink(self, tokens: int) -> None:
        """Go on in smaller batches, with what is scored later too."""
        self.budget = tokens
        self.say(f"memory ran out; from here on batches of {tokens} tokens")

    def _decoding(self, prompt: str) -> dict[str, int]:
        """The settings of the attempt that used the prompt; the prompt's own for all others."""
        varied = self.case.variations.get(prompt)
        asked = varied.prompt if varied else prompt
        for attempt in self.case.attempts.values():
            if attempt.prompt == asked:
                decoding = attempt.decoding
                return {
                    "max_prompt_tokens": decoding.max_prompt_tokens,
                    "max_new_tokens": decoding.max_new_tokens,
                }
        template = self.case.prompt(prompt)
        return {
            "max_prompt_tokens": template.max_prompt_tokens,
            "max_new_tokens": template.max_new_tokens,
        }

    def _progress(self, step: str, *, total: int) -> Callable[[int], None]:
        start = told = time.perf_counter()

        def tell(done: int) -> None:
            nonlocal told
            now = time.perf_counter()
            if done < total and now - told > 5:
                told, pace = now, done / (now - start)
                left = (total - done) / pace
                self.say(
                    f"{step}: {done} of {total} rows, {pace:.2f} rows/s, about {left:.0f} s left"
                )

        return tell

    def _note_warnings(self, system: str, loaded: AttachedAdapter) -> None:
        for line in loaded.risks:
            self.say(f"{system}: {line}")
        for line in (*loaded.warnings, *loaded.risks):
            number = sum(isinstance(record, Text) for record in self.records)
            self.text(f"{self.notebook.stem}.warning.{system}.{number}", line)


def _require_finite(scores: Scores, step: str) -> None:
    """Raise `ModelError` where activations overflowed, which no look at the weights foresees."""
    broken = sum(not math.isfinite(reply.number_log_odds) for reply in scores.replies)
    if broken:
        raise ModelError(
            step,
            expected="finite read-outs",
            found=f"NaN or infinity in {broken} of {len(scores.replies)} rows, in float16",
            remedy=f"Give {WIDER}.",
        )


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
