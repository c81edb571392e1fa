"""The incident's questions put to a real model, for the record.

Heavier than a build of the book can wait for: `make record` runs it once for a profile, and the
book reads what it left.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.special import log_softmax

from postmortem.case.rows import read_rows
from postmortem.checker.errors import CaseError, ModelError
from postmortem.diagnosis.battery import SAVED
from postmortem.diagnosis.causes import CAUSES, Cause, Materials, Unavailable
from postmortem.diagnosis.replay import FEATURES, Bench, describe_symptom
from postmortem.experiments.ask import BASE, Answers, System, ask
from postmortem.experiments.measure import (
    DISTRIBUTION,
    EFFECT,
    PARSED,
    Measures,
    escaped,
    find_commonest,
    knows_and_does_not_say,
    measure,
    record_measures,
    reproduces_symptom,
)
from postmortem.experiments.metrics import (
    auc_estimate,
    kl_divergence,
    mean_estimate,
    say_estimate,
)
from postmortem.experiments.records import Cell
from postmortem.experiments.session import Session
from postmortem.models.loading import LoadedBase, attached
from postmortem.models.mismatch import refit_adapter, write_adapter
from postmortem.models.scoring import spare_memory

SYSTEMS = ("base", "suspect", "reference")
# Causes that need a second copy of the base, or half precision, which a CPU lacks.
COPIED = ("quantised-base", "base-overwritten", "overflow")


def record_members(session: Session) -> None:
    """Record the digest of each model and adapter, which tells later whether it is the same."""
    members = [*session.world.members.values(), *session.world.replays.values()]
    rows = {m.role: m.digest for m in members if m.digest}
    session.table("members", ("role", "digest"), list(rows.items()))


def record_systems(
    session: Session, prompt: str, *, systems: Sequence[str] = SYSTEMS, rows: int = 0
) -> None:
    """Record each system's answers to a prompt, and how far an adapter moves its base.

    On the first `rows` rows; 0 takes all.
    """
    chosen = session.rows.head(rows)
    base = ask(session, BASE, prompt, rows=chosen)
    session.measure(f"{prompt}.rows", len(chosen), unit="rows")
    for name in systems:
        answers = base if name == "base" else ask(session, System(name, name), prompt, rows=chosen)
        session.add(*answers.predictions)
        record_numbers(session, f"{prompt}.{name}", answers, base=base)
        text = "not available" if answers.lacking else escaped(find_commonest(answers)[0])
        session.text(f"{prompt}.{name}.commonest_text", text)
        for attempt_name, attempt in session.case.attempts.items():
            if attempt.prompt == prompt:
                decision = reproduces_symptom(answers, attempt)
                session.verdict(f"{attempt_name}.{name}.reproduces", *decision)


def record_file(session: Session, source: str, *, rows: int, prompts: Sequence[str]) -> None:
    """Record the numbers of all systems on a file's first rows, and nothing of its texts.

    `source` is the path of the rows, or of rows and labels with a colon between them.
    """
    path, _, labels = source.partition(":")
    found = read_rows(path, labels or None, columns=session.case.columns).head(rows)
    name = Path(path).stem
    session.measure(f"{name}.rows", len(found), unit="rows")
    session.text(f"{name}.digest", found.digest)
    for prompt in prompts:
        base = ask(session, BASE, prompt, rows=found, rows_name=name)
        for system in filter(session.world.has, SYSTEMS):
            answers = base
            if system != "base":
                answers = ask(session, System(system, system), prompt, rows=found, rows_name=name)
            record_numbers(session, f"{name}.{prompt}.{system}", answers, base=base)


def record_variations(session: Session, *, rows: int) -> None:
    """Record what the base alone answers on the first rows when the prompt's own words change."""
    chosen, labels = session.rows.head(rows), session.rows.labels
    table: list[tuple[Cell, ...]] = []
    for name, varied in session.case.variations.items():
        answers = ask(session, BASE, name, rows=chosen)
        session.add(*answers.predictions)
        measures = record_numbers(session, f"variation.{name}", answers)
        ranked = "unknown" if labels is None else say_estimate(measures["auc_number"].estimate)
        share = f"{measures['top_share'].value:.0%}"
        text = escaped(find_commonest(answers)[0])
        table.append((varied.title, len(set(answers.values)), text, share, ranked))
    columns = ("prompt", "distinct", "commonest text", "commonest value's share", "log-odds, AUC")
    session.table("variations", columns, table)
    session.measure("variation.rows", len(chosen), unit="rows")


def record_true_mismatch(session: Session, *, rows: int) -> None:
    """Record what adapters of the incident's donors do on this base: as they are, ignored, cut."""
    size = session.case.true_size
    if size is None:
        raise CaseError("the case", expected="`true_size`", found="none")
    donor, few = size.donors[0], session.rows.head(rows)
    with TemporaryDirectory() as scratch:
        modules = tuple(size.target_modules)
        adapter = write_adapter(
            donor, Path(scratch, "as-is"), rank=size.rank, target_modules=modules
        )
        cut = refit_adapter(adapter, session.base.model, folder=Path(scratch, "cut"))
        base = ask(session, BASE, "v2", rows=few, rows_name="mismatch")
        try:
            with attached(session.base, adapter):
                error = ""
        except ModelError as raised:
            error = raised.found
        count = error.count("size mismatch for")
        session.measure("mismatch.tensors", count, unit="tensors")
        session.verdict("mismatch.raises", bool(error), f"PEFT's error names {count} tensors")
        cases = {
            "ignored": System("ignored", adapter, ignore_mismatched_sizes=True),
            "cut": System("cut", cut),
        }
        for name, system in cases.items():
            answers = ask(session, system, "v2", rows=few)
            record_numbers(session, f"mismatch.{name}", answers, base=base)


def record_causes(session: Session, *, rows: int) -> None:
    """Inject each cause in its plainest form and record the symptom that it gives."""
    chosen = session.rows.head(rows)
    size = sum(p.nbytes for p in session.base.model.parameters())
    found: list[tuple[Cell, ...]] = []
    absent: list[tuple[Cell, ...]] = []
    with TemporaryDirectory() as scratch:
        sound = "numeric" if session.world.has("reference") else "yes_no_short"
        place = Path(scratch)
        materials = Materials(session.world, "base", session.base, "silent", 0, place, sound=sound)
        bench = Bench(session, chosen, materials, reference=None)
        off = ask(session, BASE, "v2", rows=chosen, rows_name="beside the causes")
        for name, cause in CAUSES.items():
            try:
                if name in COPIED and size > spare_memory(session.base.device):
                    raise Unavailable("a second copy of this base takes too much memory")
                if name == "overflow" and session.base.device == "cpu":
                    raise Unavailable("half precision is not run on a CPU")
                with session.timed(f"cause {name}"):
                    found.append(_replay_once(cause, bench=bench, off=off))
            except Unavailable as reason:
                absent.append((cause.title, str(reason)))
    session.text("causes.sound", "numeric" if sound == "numeric" else "yes/no")
    session.table("causes", CAUSE_COLUMNS, found)
    session.table("causes.absent", ("cause", "why"), absent)
    whole = sum(row[-1] == "yes" for row in found)
    session.measure("causes.run", len(found), unit="causes")
    session.measure("causes.whole", whole, unit="causes")
    session.measure("causes.rows", len(chosen), unit="rows")


CAUSE_COLUMNS = (
    "cause",
    "loads",
    "distinct",
    "commonest value",
    "its share",
    "written, AUC",
    "log-odds, AUC",
    "yes/no, AUC",
    "KL to the base",
    "whole v2 symptom",
)


def record_precision(session: Session, *, rows: int) -> None:
    """Record whether the second prompt's answers change when weights are kept in half precision.

    On a GPU alone, where models run in it. Each copy of the base carries the same adapters, in
    float32 as PEFT keeps them.
    """
    base, chosen = session.base, session.rows.head(rows)
    table: list[tuple[Cell, ...]] = []
    if not base.device.startswith("cuda") or base.dtype != "float32":
        reason = "it takes a GPU, and a base in float32 to compare with"
        session.verdict("precision.same_texts", "not available", reason)
        session.table("precision", PRECISION_COLUMNS, table)
        return
    systems = [system for system in SYSTEMS if session.world.has(system)]
    whole = {
        system: ask(session, _system(system, base), "v2", rows=chosen, rows_name="float32")
        for system in systems
    }
    changed = 0
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        half = replace(base, model=copy.deepcopy(base.model).to(dtype), dtype=name)
        for system in systems:
            found = ask(session, _system(system, half), "v2", rows=chosen, rows_name=name)
            pairs = list(zip(whole[system].predictions, found.predictions, strict=True))
            differing = sum(one.text != other.text for one, other in pairs)
            changed += differing
            table.append((name, system, differing, *_compare_log_odds(whole[system], found)))
    because = f"{changed} of {2 * len(systems) * len(chosen)} answers have another text"
    session.verdict("precision.same_texts", changed == 0, because)
    session.table("precision", PRECISION_COLUMNS, table)


PRECISION_COLUMNS = (
    "weights",
    "system",
    "texts changed",
    "log-odds apart by at most, nat",
    "log-odds, AUC in float32",
    "log-odds, AUC in half",
)


def _system(name: str, base: LoadedBase) -> System:
    return System(name, None if name == "base" else name, base=base)


def _compare_log_odds(whole: Answers, half: Answers) -> tuple[Cell, ...]:
    gap = float(np.abs(np.subtract(whole.number_log_odds, half.number_log_odds)).max())
    return f"{gap:.2g}", *(_ranked(a.labels, a.number_log_odds) for a in (whole, half))


def _replay_once(cause: Cause, *, bench: Bench, off: Answers) -> tuple[Cell, ...]:
    run = cause.inject(bench.materials, next(iter(cause.severities.values())))
    with bench.open(run) as subject:
        try:
            subject.load()
        except ModelError:
            return (cause.title, "no", *(None,) * (len(CAUSE_COLUMNS) - 3), "no")
        features = describe_symptom(subject, {"load": "silent"}, attempts=("v2",))
        v2, yes_no = subject.ask(SAVED, "v2"), subject.ask(SAVED, "yes_no")
        values = subject.written(SAVED)
    attempts, labels = bench.session.case.attempts, bench.rows.labels
    shown = [
        feature.shown(features, attempts["v2"])
        for feature in FEATURES.values()
        if feature.attempt == "v2"
    ]
    both = [log_softmax(answers.number_log_probs, axis=1) for answers in (v2, off)]
    finite = np.isfinite(both).all()
    top = features["v2 value"]
    return (
        cause.title,
        "yes",
        features["v2 distinct"],
        top,
        f"{float(np.mean(values == top)):.0%}",
        _ranked(labels, list(values)),
        _ranked(labels, v2.number_log_odds),
        _ranked(labels, yes_no.yes_no_log_odds),
        say_estimate(mean_estimate(kl_divergence(*both)), ".2g") if finite else "unknown",
        "yes" if all(part is not False for part in shown) else "no",
    )


def _ranked(labels: np.ndarray | None, scores: Sequence[float]) -> str:
    if labels is None or not np.isfinite(scores).all():
        return "unknown"
    return say_estimate(auc_estimate(labels, scores))


NAMES = (*DISTRIBUTION, *PARSED, "auc_decoded", "auc_number", "auc_yes_no", *EFFECT)


def record_numbers(
    session: Session, key: str, answers: Answers, *, base: Answers | None = None
) -> Measures:
    """Record a system's measures, its change of the base where it is not that, and no text."""
    measures = measure(answers, None if base is answers else base)
    record_measures(session, key, measures, names=NAMES)
    lacking: tuple[str, str] = ("not available", answers.lacking)
    decided = lacking if answers.lacking else knows_and_does_not_say(measures)
    session.verdict(f"{key}.knows", *decided)
    return measures
