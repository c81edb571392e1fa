"""Controls of an adapter: changed copies of it whose effect says what its own effect rests on."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import SafetensorError

from postmortem.checker.errors import ModelError
from postmortem.diagnosis.causes import Unavailable
from postmortem.diagnosis.examine import CHANGES, EIGHTFOLD, EIGHTH, FLIPPED, TURNED
from postmortem.experiments.analysis import NO_LABELS, NO_OP, ONE_CLASS
from postmortem.experiments.controls import judge_gain, judge_odds
from postmortem.experiments.metrics import auc_estimate, auc_gain_estimate, mean_estimate
from postmortem.experiments.own_answers import (
    COPIES,
    FACTOR,
    UNKNOWN,
    Outcome,
    ask,
    compare,
    say_recorded,
    say_refusal,
    without_distributions,
)
from postmortem.experiments.records import Measure
from postmortem.experiments.session import Answers, Session
from postmortem.models.changes import Tensors, edit_tensors
from postmortem.models.loading import check_adapter_folder

COLUMNS = ("adapter", "KL, nat", "change of log-odds, nat", "AUC, log-odds")
SHOWN = ("kl", "shift", "auc")
MEASURES = (*SHOWN, "odds_change", "gain")


def _zero(tensors: Tensors) -> Tensors:
    """Every lora_B zero, as an adapter begins."""
    return {
        name: torch.zeros_like(tensor) if "_B" in name and "lora_" in name else tensor
        for name, tensor in tensors.items()
    }


def _turn(tensors: Tensors) -> Tensors:
    """The layers turned, as the diagnosis turns them; `Unavailable` where that changes nothing."""
    turned = CHANGES[TURNED](tensors)
    if all(torch.equal(turned[name], tensor) for name, tensor in tensors.items()):
        raise Unavailable(
            "one layer alone is adapted, or all are equal: turning them changes nothing"
        )
    return turned


# What becomes of the suspect's tensors in each copy.
CHANGED: Mapping[str, Callable[[Tensors], Tensors]] = {
    "zero_b": _zero,
    "flipped": CHANGES[FLIPPED],
    "turned": _turn,
    "eighth": CHANGES[EIGHTH],
    "eightfold": CHANGES[EIGHTFOLD],
}


def record_controls(session: Session) -> None:
    """Put the first prompt to changed copies of the suspect, beside the base and the suspect."""
    prompt = session.case.asked
    base = ask(session, prompt, kept=False)
    suspect = ask(session, prompt, system="suspect", kept=False)
    session.measure("controls.factor", FACTOR)
    _record_control(session, "suspect", suspect, base=base, suspect=suspect)
    suspect = without_distributions(suspect)
    for name, change in CHANGED.items():
        found = _ask_copy(session, prompt, name=name, change=change)
        _record_control(session, name, found, base=base, suspect=suspect)
    _judge_zero(session)
    titles = {"suspect": "suspect", **COPIES}
    rows = [
        (title, *(say_recorded(session, f"controls.{name}.{m}") for m in SHOWN))
        for name, title in titles.items()
    ]
    session.table("controls.adapters", COLUMNS, rows)


def _ask_copy(
    session: Session, prompt: str, *, name: str, change: Callable[[Tensors], Tensors]
) -> Outcome:
    if not session.world.has("suspect"):
        return session.world.members["suspect"].reason
    source = session.world.path("suspect")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "adapter")
        try:
            check_adapter_folder(source)
            folder.mkdir()
            for part in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(source / part, folder)
            edit_tensors(folder, change)
        except Unavailable as error:
            return str(error)
        except ModelError as error:
            return say_refusal(error)
        # What cannot be read is a finding of the chapter on the files.
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            return f"it cannot be changed: {type(error).__name__}"
        return ask(session, prompt, system=f"suspect_{name}", adapter=folder, kept=False)


def _record_control(
    session: Session, name: str, found: Outcome, *, base: Outcome, suspect: Outcome
) -> None:
    key, is_suspect = f"controls.{name}", name == "suspect"
    statements = () if is_suspect else ("differs", "ranks_better")
    numbers = SHOWN if is_suspect else MEASURES
    lacking = next((part for part in (found, base, suspect) if isinstance(part, str)), None)
    if lacking is not None:
        for measure in numbers:
            session.measure(f"{key}.{measure}", None, reason=lacking)
        for statement in statements:
            session.verdict(f"{key}.{statement}", "not available", lacking)
        return
    assert isinstance(found, Answers)
    assert isinstance(base, Answers)
    assert isinstance(suspect, Answers)
    effect, labels = compare(found, base), found.labels
    why = NO_LABELS if labels is None else ONE_CLASS
    for measure in ("kl", "shift"):
        session.measure(f"{key}.{measure}", effect[measure], unit="nat")
    ranked = UNKNOWN if labels is None else auc_estimate(labels, found.asked_log_odds)
    session.measure(f"{key}.auc", ranked, reason=why)
    if is_suspect:
        return
    odds = found.asked_log_odds, suspect.asked_log_odds
    change = mean_estimate(np.abs(np.subtract(*odds)))
    gain = UNKNOWN if labels is None else auc_gain_estimate(labels, *odds)
    session.measure(f"{key}.odds_change", change, unit="nat")
    session.measure(f"{key}.gain", gain, reason=why)
    session.verdict(f"{key}.differs", *judge_odds(change))
    word, because = judge_gain(gain, why)
    session.verdict(f"{key}.ranks_better", word, because.replace("the base alone", "the suspect"))


def _judge_zero(session: Session) -> None:
    """An adapter whose lora_B is zero must leave the base as it is: a test of the whole chain."""
    kl = next(
        r for r in session.records if isinstance(r, Measure) and r.key == "controls.zero_b.kl"
    )
    if kl.value is None:
        session.verdict("controls.zero_b.is_base", "not available", kl.reason)
        return
    because = f"KL to the base alone {kl.value:.3g} nat"
    session.verdict("controls.zero_b.is_base", kl.value <= NO_OP, because)
