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
from postmortem.models.world import BASES, role_name
from postmortem.suite.attribution import (
    LIMITS,
    STANDS,
    Attribution,
    Reading,
    Segment,
    attribute_adapter,
    format_answer,
    format_gain,
)
from tools.embedded_world import END_OF_TURN, NUMERIC, RECIPES, Recipe
from tools.siblings import (
    APART,
    HELD_OUT,
    KINDS,
    Trial,
    measure_group,
)

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
        trials, readings = measure_group(
            session.case, HELD_OUT, Path(folder), follow=session.follow
        )
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
        share = rate_estimate(counts["right"], counts.total())
        rows.append(
            (
                kind,
                counts.total(),
                *(counts[word] for word in OUTCOMES),
                say_estimate(share, ".0%"),
            )
        )
    apart = [trial.outcome for trial in trials if trial.kind == APART]
    right = rate_estimate(apart.count("right"), len(apart))
    wrong = rate_estimate(sum(t.outcome == "wrong" for t in trials), len(trials))
    session.measure(f"{KEY}.right", right)
    session.measure(f"{KEY}.wrong", wrong)
    session.measure(f"{KEY}.questions", len(trials))
    session.verdict(f"{KEY}.holds", *judge_trials(right, wrong))
    missed = [trial for trial in trials if trial.outcome == "wrong"]
    session.table(
        f"{KEY}.missed",
        ("adapter", "what stands to choose from", "answer"),
        [(trial.pupil, trial.kind, format_answer(trial.found)) for trial in missed],
    )
    columns = ("what stands to choose from", "questions", *OUTCOMES, "share right")
    session.table("membership.trials", columns, rows)


def judge_trials(right: Estimate, wrong: Estimate) -> tuple[bool, str]:
    """Whether no answer was wrong and enough of the separable questions were answered rightly."""
    assert right.value is not None
    because = (
        f"of {right.n} questions among bases trained apart {say_estimate(right, '.0%')} were "
        f"answered rightly, and {round((wrong.value or 0) * wrong.n)} of all {wrong.n} wrongly"
    )
    return not wrong.value and right.value >= SEPARABLE, because


def record_example(
    session: Session, trials: Sequence[Trial], readings: Mapping[tuple[str, str], Reading]
) -> None:
    """One held-out adapter on the bases trained apart: its gain there, and its controls' gains.

    Its texts hold what no base has read, so that on every base almost any update gains.
    """
    shown = next(
        trial
        for trial in trials
        if trial.kind == APART and trial.pupil.startswith(HELD_OUT.tasks[-1].title)
    )
    session.text("membership.example.system", shown.pupil)
    rows: list[tuple[Cell, ...]] = []
    for judged in shown.found.judged:
        base = f"{judged.name}, its own" if judged.name == shown.home else judged.name
        for name, gains in gains_of(readings[shown.pupil, judged.name]).items():
            session.measure(f"membership.example.{base}.{name}", gains, unit="nat")
        rows.append(
            (
                *(base, format_gain(judged.gain), judged.control, format_gain(judged.over_control)),
                STANDS[judged.stands],
            )
        )
    columns = ("base", "gain, nat a token", "best control", "gain over it", "so it")
    session.table("membership.example", columns, rows)


def gains_of(reading: Reading) -> dict[str, Estimate]:
    """By how much the adapter and each control lower the loss; of the rotations the luckiest."""
    found = {"the adapter": mean_estimate(reading.gains)}
    found |= {
        name: mean_estimate(reading.off - losses) for name, losses in reading.controls.items()
    }
    turned = [name for name in found if name.startswith(ROTATED)]
    best = max(turned, key=lambda name: found[name].value or 0.0)
    kept = {name: gain for name, gain in found.items() if name not in turned}
    return {**kept, "luckiest rotation": found[best]}


@dataclass(frozen=True)
class Asked:
    """An adapter of the world whose home is known, and the recipe that it was trained by."""

    title: str
    folder: Path
    home: str
    recipe: Recipe


def world_questions(session: Session) -> list[Asked]:
    """The world's adapters that this notebook asks about, those that it has."""
    world = session.world
    listed = [
        ("reference", "", "base", NUMERIC),
        ("suspect", "", "base", RECIPES["suspect"]),
        ("speaking base's adapter", "speaking/numeric_0", "speaking_base", NUMERIC),
        ("sibling's adapter", "sibling/numeric_0", "sibling_base", NUMERIC),
    ]
    found = []
    for title, replay, home, recipe in listed:
        member = world.replays.get(replay) if replay else world.members[title]
        if member is not None and member.path is not None and world.has(home):
            found.append(Asked(title, Path(member.path), role_name(home), recipe))
    return found


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
    asked = world_questions(session)
    columns = ("adapter", "trained on", "answer", "because")
    if len(bases) < 2 or session.profile.replays is None or not asked:
        reason = "this profile has no second base of the same shapes"
        session.table("membership.world", columns, [])
        session.table("membership.world_bases", ("adapter", "base", "gain", "so it"), [])
        session.measure("membership.world.adapters", None, reason=reason)
        session.verdict("membership.world.no_error", "not available", reason)
        return
    rows: list[tuple[Cell, ...]] = []
    details: list[tuple[Cell, ...]] = []
    missed = []
    for one in asked:
        with session.timed(f"home of {one.title}"):
            found = attribute_adapter(
                one.folder, bases, segments=world_texts(session, one.recipe), device="cpu"
            )
        rows.append((one.title, one.home, format_answer(found), found.because))
        details += _details(one.title, found)
        missed += [] if one.home in found.remain else [one.title]
    session.table("membership.world", columns, rows)
    session.table("membership.world_bases", ("adapter", "base", "gain", "so it"), details)
    told = f"; not so: {', '.join(missed)}" if missed else ""
    session.measure("membership.world.adapters", len(asked))
    because = f"of {len(asked)} adapters {len(asked) - len(missed)} kept their own base{told}"
    session.verdict("membership.world.no_error", not missed, because)


def _details(title: str, found: Attribution) -> list[tuple[Cell, ...]]:
    tried = [(title, j.name, format_gain(j.gain), STANDS[j.stands]) for j in found.judged]
    return [*tried, *((title, name, "–", escaped(why)) for name, why in found.left_out.items())]
