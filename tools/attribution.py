"""Attribution in the book: siblings whose answer is known, and the bases of this run's world."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from postmortem.case.prompts import render
from postmortem.case.rows import generate_rows
from postmortem.experiments.measure import escaped
from postmortem.experiments.metrics import Estimate, mean_estimate, rate_estimate, say_estimate
from postmortem.experiments.records import Cell
from postmortem.experiments.session import Session
from postmortem.models.model_set import BASES, role_name
from postmortem.suite.attribution import (
    LIMITS,
    STANDS,
    CandidateLoss,
    Segment,
    attribute_adapter,
    format_answer,
    format_gain,
)
from tools.embedded_world import END_OF_TURN, NUMERIC, RECIPES, Recipe
from tools.siblings import APART, HELD_OUT, KINDS, Trial, measure_group

# What must be reached on held-out siblings: right wherever bases were trained apart.
SEPARABLE = 0.9
OUTCOMES = ("right", "cannot separate", "wrong")
KEY = "membership.held_out"
# Of all random turns the luckiest is shown.
ROTATED = "rotated at random"
WORLD_TEXTS = 32


def record_siblings(session: Session) -> None:
    """Train the held-out group, put every question to the method, and record what came of it.

    The group that the limits were chosen on is measured beside it by `make membership`.
    """
    for name in ("gain", "share", "trace", "room", "rotations", "texts"):
        session.measure(f"membership.limit.{name}", getattr(LIMITS, name))
    session.measure("membership.limit.separable", SEPARABLE)
    with TemporaryDirectory() as folder, session.timed("siblings"):
        trials, readings = measure_group(session.case, HELD_OUT, Path(folder))
    record_trials(session, trials)
    adapters, bases = (len({pair[side] for pair in readings}) for side in (0, 1))
    session.measure(f"{KEY}.adapters", adapters)
    session.measure(f"{KEY}.bases", bases)
    record_example(session, trials, readings)


def record_trials(session: Session, trials: Sequence[Trial]) -> None:
    """Record how the questions were answered: a row for each kind, the shares and the verdict."""
    rows: list[tuple[Cell, ...]] = []
    for kind in KINDS:
        counts = Counter(trial.outcome for trial in trials if trial.kind == kind)
        share = say_estimate(rate_estimate(counts["right"], counts.total()), ".0%")
        rows.append((kind, counts.total(), *(counts[word] for word in OUTCOMES), share))
    right, wrong = count_answers(trials)
    session.measure(f"{KEY}.right", right)
    session.measure(f"{KEY}.wrong", wrong)
    session.measure(f"{KEY}.questions", len(trials))
    session.verdict(f"{KEY}.holds", *decide_trials(right, wrong))
    session.table(
        f"{KEY}.missed",
        ("adapter", "what stands to choose from", "answer"),
        [
            (trial.adapter, trial.kind, format_answer(trial.attribution))
            for trial in trials
            if trial.outcome == "wrong"
        ],
    )
    columns = ("what stands to choose from", "questions", *OUTCOMES, "share right")
    session.table("membership.trials", columns, rows)


def count_answers(trials: Sequence[Trial]) -> tuple[Estimate, Estimate]:
    """Shares of right answers among bases trained apart and of wrong ones among all questions."""
    apart = [trial.outcome for trial in trials if trial.kind == APART]
    wrong = sum(trial.outcome == "wrong" for trial in trials)
    return rate_estimate(apart.count("right"), len(apart)), rate_estimate(wrong, len(trials))


def decide_trials(right: Estimate, wrong: Estimate) -> tuple[bool, str]:
    """Whether no answer was wrong and enough of the separable questions were answered rightly."""
    assert right.value is not None
    because = (
        f"of {right.n} questions among bases trained apart {say_estimate(right, '.0%')} were "
        f"answered rightly, and {round((wrong.value or 0) * wrong.n)} of all {wrong.n} wrongly"
    )
    return not wrong.value and right.value >= SEPARABLE, because


def record_example(
    session: Session, trials: Sequence[Trial], readings: Mapping[tuple[str, str], CandidateLoss]
) -> None:
    """One held-out adapter on the bases trained apart: its gain there, and its controls' gains.

    Its texts hold what no base has read, so that on every base almost any update gains.
    """
    shown = next(
        trial
        for trial in trials
        if trial.kind == APART and trial.adapter.startswith(HELD_OUT.tasks[-1].title)
    )
    session.text("membership.example.system", shown.adapter)
    rows: list[tuple[Cell, ...]] = []
    for one in shown.attribution.judged:
        base = f"{one.name}, its own" if one.name == shown.base else one.name
        for name, gain in list_gains(readings[shown.adapter, one.name]).items():
            session.measure(f"membership.example.{base}.{name}", gain, unit="nat")
        lowers, lead = format_gain(one.gain), format_gain(one.over_control)
        rows.append((base, lowers, one.control, lead, STANDS[one.stands]))
    columns = ("base", "gain, nat a token", "best control", "gain over it", "so it")
    session.table("membership.example", columns, rows)


def list_gains(reading: CandidateLoss) -> dict[str, Estimate]:
    """By how much the adapter and each control lower the loss; of the rotations the luckiest."""
    gains = {"the adapter": mean_estimate(reading.gains)}
    rotated = []
    for name, losses in reading.controls.items():
        gain = mean_estimate(reading.off - losses)
        if name.startswith(ROTATED):
            rotated.append(gain)
        else:
            gains[name] = gain
    return {**gains, "luckiest rotation": max(rotated, key=lambda gain: gain.value or 0.0)}


@dataclass(frozen=True)
class WorldAdapter:
    """An adapter of the world, the base that it was trained on, and the recipe."""

    title: str
    folder: Path
    base: str
    recipe: Recipe


def list_world_adapters(session: Session) -> list[WorldAdapter]:
    """The world's adapters that this notebook asks about, those that it has."""
    world = session.world
    asked = [
        ("reference", world.members["reference"], "base", NUMERIC),
        ("suspect", world.members["suspect"], "base", RECIPES["suspect"]),
        (
            "speaking base's adapter",
            world.replays.get("speaking/numeric_0"),
            "speaking_base",
            NUMERIC,
        ),
        ("sibling's adapter", world.replays.get("sibling/numeric_0"), "sibling_base", NUMERIC),
    ]
    return [
        WorldAdapter(title, Path(member.path), role_name(base), recipe)
        for title, member, base, recipe in asked
        if member is not None and member.path is not None and world.has(base)
    ]


def world_texts(session: Session, recipe: Recipe) -> tuple[Segment, ...]:
    """Prompts of fresh rows, each with the answer that the recipe's teacher gives."""
    rows = generate_rows(WORLD_TEXTS, 60_000 + session.world.seed, columns=session.case.columns)
    template, source = session.case.prompts[recipe.prompt], random.Random("membership")
    assert rows.labels is not None
    return tuple(
        Segment(
            recipe.teacher(source, int(label)) + END_OF_TURN,
            render(template, rows.row(place), tokenizer=session.base.tokenizer),
        )
        for place, label in enumerate(rows.labels)
    )


def record_world(session: Session) -> None:
    """Ask of the world's own adapters which of its bases each belongs to."""
    bases = {role_name(role): session.world.path(role) for role in BASES if session.world.has(role)}
    asked = list_world_adapters(session)
    rows: list[tuple[Cell, ...]] = []
    details: list[tuple[Cell, ...]] = []
    missed = []
    available = len(bases) > 1 and session.profile.replays is not None and bool(asked)
    for one in asked if available else []:
        with session.timed(f"home of {one.title}"):
            attribution = attribute_adapter(
                one.folder, bases, segments=world_texts(session, one.recipe), device="cpu"
            )
        rows.append((one.title, one.base, format_answer(attribution), attribution.because))
        for base in attribution.judged:
            details.append((one.title, base.name, format_gain(base.gain), STANDS[base.stands]))
        for name, why in attribution.left_out.items():
            details.append((one.title, name, "–", escaped(why)))
        if one.base not in attribution.remain:
            missed.append(one.title)
    session.table("membership.world", ("adapter", "trained on", "answer", "because"), rows)
    session.table("membership.world_bases", ("adapter", "base", "gain", "so it"), details)
    if not available:
        reason = "this profile has no second base of the same shapes"
        session.measure("membership.world.adapters", None, reason=reason)
        session.verdict("membership.world.no_error", "not available", reason)
        return
    rest = f"; not so: {', '.join(missed)}" if missed else ""
    session.measure("membership.world.adapters", len(asked))
    because = f"of {len(asked)} adapters {len(asked) - len(missed)} kept their own base{rest}"
    session.verdict("membership.world.no_error", not missed, because)
