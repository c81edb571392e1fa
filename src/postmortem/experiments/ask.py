"""Asking: systems × prompts × rows → answers, the one way for all of them.

A system is a base, or an adapter on it, with what was done to either. What it answers is raw: text,
token ids and log-odds of every row. Why it gave no answer, where it gave none, is part of the
result, so that an adapter that does not load stops nothing.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError

from postmortem.case.prompts import (
    Parsed,
    Prompt,
    encode_rows,
    lead_of,
    parse_as_written,
    parse_choice,
    parse_strict,
)
from postmortem.case.rows import Rows
from postmortem.case.schema import PromptTemplate
from postmortem.checker.errors import ModelError, printable
from postmortem.experiments.records import Prediction, Text
from postmortem.experiments.session import Session
from postmortem.models.changes import CHANGES, NothingToChange, copy_changed
from postmortem.models.loading import (
    WIDER,
    LoadedBase,
    attached,
    footprint,
    positive_class,
)
from postmortem.models.scoring import Reply, score_classes, score_within_memory

# PEFT's line on a tensor of another shape: its name, its shape, and the base's.
MISFIT = re.compile(
    r"size mismatch for (?:base_model\.model\.)?(\S+?): copying a param with shape "
    r"torch\.Size\(\[([\d, ]*)\]\).*?torch\.Size\(\[([\d, ]*)\]\)",
    re.DOTALL,
)


@dataclass(frozen=True)
class System:
    """One that answers, under the name that its answers are recorded by.

    `adapter` is a role of the session's models or a folder; without one the base answers alone.
    `change` names one of `CHANGES`, made on a copy of the adapter. An adapter that is `off` is put
    on and disabled. `base` is a role, or a base that was loaded elsewhere.
    """

    name: str
    adapter: str | Path | None = None
    base: str | LoadedBase = "base"
    change: str = ""
    off: bool = False
    ignore_mismatched_sizes: bool = False


BASE = System("base")


@dataclass(frozen=True)
class Answers:
    """What one system answered to one prompt, in the order of the rows.

    `contract` is what the prompt asks for. `first_log_probs` is the log-distribution of the first
    answer token, (rows, vocabulary), or of the classes, (rows, classes); `number_log_probs` that
    of the eleven numbers, (rows, 11), `pair_log_probs` that of the positive and the negative
    answer, (rows, 2). A number that a prediction lacks is NaN. Where the system gave no answers
    `missing` says why, and everything else is empty.
    """

    system: str
    prompt: str
    contract: str
    predictions: tuple[Prediction, ...]
    first_log_probs: np.ndarray
    number_log_probs: np.ndarray
    pair_log_probs: np.ndarray
    missing: str = ""

    def __len__(self) -> int:
        return len(self.predictions)

    @property
    def lacking(self) -> str:
        """Why nothing can be measured of these answers: there are none, or they are not finite."""
        broken = int((~np.isfinite(self.log_odds)).sum())
        told = f"log-odds that are not finite on {broken} of {len(self)} rows"
        return self.missing or (told if broken else "")

    @cached_property
    def table(self) -> pd.DataFrame:
        """The answers as a table, a row each: to look at, to count and to plot."""
        columns = [name for name in Prediction.model_fields if name != "kind"]
        rows = [[getattr(p, name) for name in columns] for p in self.predictions]
        table = pd.DataFrame(rows, columns=columns).set_index("row_id")
        return table.assign(log_odds=self.log_odds)

    @property
    def values(self) -> list[float]:
        """What is answered, by the prompt's own parser; NaN where it could not be read."""
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
    def log_odds(self) -> list[float]:
        """Log-odds of what the prompt asks for: the number's, or those of the two answers."""
        return self.number_log_odds if self.contract == "number" else self.yes_no_log_odds

    @property
    def form_log_probs(self) -> np.ndarray:
        """Log-probability of each row that the answer is one of those asked for, (rows,)."""
        asked = self.number_log_probs if self.contract == "number" else self.pair_log_probs
        with np.errstate(invalid="ignore"):  # what is not finite stays so, and is looked for
            return np.logaddexp.reduce(asked, axis=1)

    def part(self, start: int, end: int) -> "Answers":
        """The answers to the rows from one place up to another."""
        if (start, end) == (0, len(self)):
            return self
        return replace(
            self,
            predictions=self.predictions[start:end],
            first_log_probs=self.first_log_probs[start:end],
            number_log_probs=self.number_log_probs[start:end],
            pair_log_probs=self.pair_log_probs[start:end],
        )


def join_answers(first: Answers, second: Answers) -> Answers:
    """Answers of one system to one prompt, and those to further rows."""
    return replace(
        first,
        predictions=first.predictions + second.predictions,
        first_log_probs=np.concatenate([first.first_log_probs, second.first_log_probs]),
        number_log_probs=np.concatenate([first.number_log_probs, second.number_log_probs]),
        pair_log_probs=np.concatenate([first.pair_log_probs, second.pair_log_probs]),
    )


def ask(
    session: Session,
    system: System,
    prompt: str,
    *,
    rows: Rows | None = None,
    rows_name: str = "",
) -> Answers:
    """A system's answers to a prompt of the case, or the reason why there are none.

    An adapter that does not load is a finding and no error; a base that does not, and one that
    float16 is too narrow for, raise `ModelError`. `rows` takes the place of the session's own,
    under `rows_name`. A base whose weights an adapter's file has changed is loaded anew.
    """
    chosen = session.rows if rows is None else rows
    contract = session.case.prompt(prompt).contract
    try:
        with (
            session.timed(_name_step(system, prompt, rows_name)),
            put_on(session, system) as answering,
        ):
            _note_warnings(session, system.name, answering)
            answers = score_rows(session, answering, system.name, prompt, rows=chosen)
    except NoAnswer as why:
        return no_answers(system.name, prompt, contract, reason=str(why))
    if answering.base.dtype == "float16" and system.adapter is None and answers.lacking:
        raise ModelError(
            f"{system.name} on {prompt}",
            expected="finite read-outs",
            found=f"{answers.lacking}, in float16",
            remedy=f"Give {WIDER}.",
        )
    return answers


class NoAnswer(Exception):
    """A system that cannot answer; the message says why."""


def no_answers(system: str, prompt: str, contract: str, *, reason: str) -> Answers:
    """The answers of a system that gave none, with the reason."""
    none = np.empty((0, 0))
    return Answers(system, prompt, contract, (), none, none, none, missing=reason)


def _name_step(system: System, prompt: str, rows_name: str) -> str:
    return f"{system.name} on {prompt}" + (f", {rows_name}" if rows_name else "")


@dataclass(frozen=True)
class PutOn:
    """The model that answers for a system and the base below it.

    `intact` tells whether the base's own weights are those that it was loaded with; `warnings` is
    what PEFT said while it loaded the adapter, `risks` what float16 cannot hold of it.
    """

    model: Any
    base: LoadedBase
    intact: bool = True
    warnings: tuple[str, ...] = ()
    risks: tuple[str, ...] = ()


@contextmanager
def put_on(session: Session, system: System) -> Iterator[PutOn]:
    """What answers for a system, for the length of a `with`.

    Raises `NoAnswer` where there is no such adapter or it does not load.
    """
    adapter = _find_adapter(session, system)
    base = _find_base(session, system)
    if adapter is None:
        yield PutOn(base.model, base)
        return
    before = footprint(base.model)
    try:
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(_changed(adapter, system.change))
                loaded = stack.enter_context(
                    attached(base, folder, ignore_mismatched_sizes=system.ignore_mismatched_sizes)
                )
            except ModelError as error:
                raise NoAnswer(describe_refusal(error)) from None
            if system.off:
                stack.enter_context(loaded.model.disable_adapter())
            # With the adapter on, the base's tensors have other names and are the same ones.
            intact = set(before.values()) <= set(footprint(base.model).values())
            yield PutOn(loaded.model, base, intact, loaded.warnings, loaded.risks)
    finally:
        # A file that brings base weights along has changed them for all that come after it.
        if footprint(base.model) != before:
            session.forget(system.base)


def _find_adapter(session: Session, system: System) -> Path | None:
    if not isinstance(system.adapter, str):
        return system.adapter
    if not session.world.has(system.adapter):
        raise NoAnswer(session.world.members[system.adapter].reason)
    return session.world.path(system.adapter)


def _find_base(session: Session, system: System) -> LoadedBase:
    if isinstance(system.base, LoadedBase):
        return system.base
    if not session.world.has(system.base):
        raise NoAnswer(session.world.members[system.base].reason)
    try:
        return session.load(system.base)
    except ModelError as error:
        # How many classes a classifier has is read from the suspect's file.
        if session.case.classifies:
            raise NoAnswer(describe_refusal(error)) from None
        raise


@contextmanager
def _changed(adapter: Path, change: str) -> Iterator[Path]:
    """The adapter's folder, or a changed copy of it for the length of a `with`."""
    if not change:
        yield adapter
        return
    with TemporaryDirectory() as scratch:
        try:
            yield copy_changed(adapter, Path(scratch), CHANGES[change])
        except NothingToChange as reason:
            raise NoAnswer(str(reason)) from None
        # What cannot be read is a finding of the chapter on the files.
        except (OSError, ValueError, SafetensorError) as error:
            raise NoAnswer(f"it cannot be changed: {type(error).__name__}") from None


def describe_refusal(error: ModelError) -> str:
    """Why an adapter did not load, in a line; the folder, which differs by machine, is left out.

    Of tensors that do not fit the first is named, in place of PEFT's line on each.
    """
    misfits = MISFIT.findall(error.found)
    if misfits:
        name, in_file, on_base = misfits[0]
        first = f"{name} is ({in_file}) in the file and ({on_base}) on the base"
        return printable(f"it does not load: {len(misfits)} tensor(s) do not fit, {first}", 200)
    what = f"it does not load: expected {error.expected}, found {error.found}"
    return printable(" ".join(what.split()), 200)


def _note_warnings(session: Session, system: str, answering: PutOn) -> None:
    for line in answering.risks:
        session.say(f"{system}: {line}")
    for line in (*answering.warnings, *answering.risks):
        number = sum(isinstance(record, Text) for record in session.records)
        session.text(f"{session.name}.warning.{system}.{number}", line)


def score_rows(
    session: Session,
    answering: PutOn,
    system: str,
    prompt: str,
    *,
    rows: Rows,
    template: PromptTemplate | None = None,
    prompts: Sequence[Prompt] = (),
    max_new_tokens: int = 0,
) -> Answers:
    """Encode the rows, score them in batches that fit the memory, and read the replies.

    A `template` takes the place of the prompt's own. Where `prompts` are given, the rows are sent
    as these. `max_new_tokens` limits the answer where its text is not needed.
    """
    model, base = answering.model, answering.base
    template, decoding = template or session.case.prompt(prompt), session.case.decoding(prompt)
    prompts = prompts or encode_rows(
        template, rows, tokenizer=base.tokenizer, limit=decoding.max_prompt_tokens
    )
    progress = session.follow(f"{system} on {prompt}", total=len(prompts))
    shares = answering.intact and base is session.bases.get("base")
    if template.contract == "class":
        scores = score_classes(
            model,
            base.tokenizer,
            prompts=prompts,
            positive=positive_class(model.config, session.case.columns.positive),
            progress=progress,
        )
    else:
        scores = score_within_memory(
            model,
            base.tokenizer,
            prompts=prompts,
            lead=lead_of(template),
            max_new_tokens=max_new_tokens or decoding.max_new_tokens,
            numbers=template.reads_numbers,
            answers=template.answers[::-1],
            shared=session.shared if shares else None,
            budget=session.budget,
            tell=session.shrink,
            progress=progress,
        )
    labels = rows.labels
    predictions = tuple(
        Prediction(
            system=system,
            prompt=prompt,
            row_id=rows.ids[index],
            group=rows.groups[index],
            label=None if labels is None else int(labels[index]),
            text=reply.text,
            token_ids=reply.token_ids,
            prompt_tokens=len(prompts[index].token_ids),
            full_prompt_tokens=prompts[index].full_length,
            finished=reply.finished,
            **_read(reply, template),
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
        scores.pair_log_probs,
    )


def _read(reply: Reply, template: PromptTemplate) -> dict[str, Any]:
    """The values of a reply: by the prompt's parser, by the strict one, and its read-outs."""
    if template.contract == "class":
        strict = Parsed(_or_none(reply.expected_value), "strict")
    elif template.contract == "number" or template.parser == "as-written":
        strict = parse_strict(reply.text)
    else:
        strict = parse_choice(reply.text, template.answers)
    chosen = parse_as_written(reply.text) if template.parser == "as-written" else strict
    return {
        "value": chosen.value,
        "stage": chosen.stage,
        "strict_value": strict.value,
        "expected_value": _or_none(reply.expected_value),
        "number_log_odds": _or_none(reply.number_log_odds),
        "yes_no_log_odds": _or_none(reply.yes_no_log_odds),
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
