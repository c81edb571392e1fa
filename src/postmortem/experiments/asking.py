"""Asking the models of a session: loading bases, putting adapters on, scoring, reading replies.

Apart from the session, so that a notebook that runs no model does not wait for torch.
"""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from postmortem.case.prompts import (
    Parsed,
    encode,
    lead_of,
    parse_as_written,
    parse_choice,
    parse_strict,
)
from postmortem.case.rows import Rows
from postmortem.case.schema import PromptTemplate
from postmortem.checker.errors import ModelError
from postmortem.experiments.records import Prediction, Text
from postmortem.experiments.session import Answers, Session
from postmortem.models.loading import (
    WIDER,
    AttachedAdapter,
    LoadedBase,
    attached,
    count_classes,
    describe_hardware,
    load_base,
    positive_class,
)
from postmortem.models.prefill import SharedLayers, layers_below
from postmortem.models.scoring import (
    Reply,
    Scores,
    score_classes,
    score_within_memory,
    spare_memory,
)
from postmortem.models.world import ADAPTERS

READ_OUTS = ("expected_value", "number_log_odds", "yes_no_log_odds")


def load_role(session: Session, role: str, *, step: str = "") -> LoadedBase:
    """Load a base of the session's world by its role; `step` is what the records call it."""
    folder = session.world.path(role)
    classes = count_classes(session.world.path("suspect")) if session.case.classifies else None
    with session.timed(step or f"load {role}"):
        return load_base(folder, device=session.device, dtype=session.dtype, classes=classes)


def describe_machine(device: str) -> dict[str, str | float]:
    """What computes: the card or the processor, and how many threads."""
    return {"hardware": describe_hardware(device), "threads": torch.get_num_threads()}


def share_layers(session: Session) -> SharedLayers:
    """What the base's layers below all of the world's adapters compute, kept between them."""
    adapters = [session.world.path(role) for role in ADAPTERS if session.world.has(role)]
    return SharedLayers(depth=layers_below(adapters), limit=spare_memory(session.base.device))


def answer(
    session: Session,
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
    base = base or session.base
    folder = adapter or (None if system.endswith("base") else session.world.path(system))
    name = f"{system}_disabled" if disabled else system
    chosen = session.rows if rows is None else rows
    step = f"{name} on {prompt}" + (f", {rows_name}" if rows_name else "")
    with session.timed(step):
        if folder is None:
            answers = _score(session, base.model, base, prompt=prompt, system=name, rows=chosen)
        else:
            with attached(base, folder, ignore_mismatched_sizes=ignore_mismatched_sizes) as loaded:
                _note_warnings(session, name, loaded)
                with loaded.model.disable_adapter() if disabled else nullcontext():
                    answers = _score(
                        session, loaded.model, base, prompt=prompt, system=name, rows=chosen
                    )
    session.records += answers.predictions if kept else ()
    return answers


def _score(
    session: Session, model: Any, base: LoadedBase, *, prompt: str, system: str, rows: Rows
) -> Answers:
    template = session.case.prompt(prompt)
    decoding = decoding_of(session, prompt)
    prompts = [
        encode(
            template,
            rows.row(index),
            tokenizer=base.tokenizer,
            limit=decoding["max_prompt_tokens"],
        )
        for index in range(len(rows))
    ]
    progress = session.follow(f"{system} on {prompt}", total=len(prompts))
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
            max_new_tokens=decoding["max_new_tokens"],
            # The incident's chapters show both read-outs under every prompt.
            numbers=template.contract == "number" or not session.case.own,
            answers=template.answers[::-1],
            shared=session.shared if base is session.base else None,
            budget=session.budget,
            tell=lambda tokens: _shrink(session, tokens),
            progress=progress,
        )
    if base.dtype == "float16" and not session.case.own:
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
            **_read(session, reply, template),
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


def _read(session: Session, reply: Reply, template: PromptTemplate) -> dict[str, Any]:
    """A reply as a prediction holds it, with the values that the parsers make of its text."""
    parts = dataclasses.asdict(reply)
    strict = parse_strict(reply.text)
    if not session.case.own:
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


def _shrink(session: Session, tokens: int) -> None:
    """Go on in smaller batches, with what is scored later too."""
    session.budget = tokens
    session.say(f"memory ran out; from here on batches of {tokens} tokens")


def decoding_of(session: Session, prompt: str) -> dict[str, int]:
    """The settings of the attempt that used the prompt; the prompt's own for all others."""
    varied = session.case.variations.get(prompt)
    asked = varied.prompt if varied else prompt
    for attempt in session.case.attempts.values():
        if attempt.prompt == asked:
            decoding = attempt.decoding
            return {
                "max_prompt_tokens": decoding.max_prompt_tokens,
                "max_new_tokens": decoding.max_new_tokens,
            }
    template = session.case.prompt(prompt)
    return {
        "max_prompt_tokens": template.max_prompt_tokens,
        "max_new_tokens": template.max_new_tokens,
    }


def _note_warnings(session: Session, system: str, loaded: AttachedAdapter) -> None:
    for line in loaded.risks:
        session.say(f"{system}: {line}")
    for line in (*loaded.warnings, *loaded.risks):
        number = sum(isinstance(record, Text) for record in session.records)
        session.text(f"{session.notebook.stem}.warning.{system}.{number}", line)


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
