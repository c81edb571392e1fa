"""Controls: the same rows with one thing altered, an adapter off and on, changed copies of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from postmortem.case.rows import Rows
from postmortem.case.schema import PromptTemplate
from postmortem.experiments.ask import BASE, Answers, System, ask
from postmortem.experiments.measure import (
    NO_OP,
    SHOWN,
    Decision,
    Measured,
    Measures,
    decide_cost,
    decide_flips,
    decide_gain,
    decide_odds,
    find_commonest,
    gain,
    measure,
    rank,
    record_measures,
    shown,
)
from postmortem.experiments.metrics import Estimate, mean_estimate, rate_estimate, say_estimate
from postmortem.experiments.records import Cell, Measure
from postmortem.experiments.session import Session
from postmortem.models.mismatch import refit_adapter

# Groups that a table lists, the first ones.
GROUPS = 20
UNALTERED = "it alters no row here"
ALTERED = ("moves_odds", "moves_written", "costs_order")


def shuffle_posts(rows: Rows, text: str, *, seed: int) -> Rows:
    """The rows with each post moved to another row, all else kept; a single row stays as it is.

    `text` names the column of the posts. They move along one cycle through all rows, so that none
    keeps its place.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    places = np.empty_like(order)
    places[order] = np.roll(order, 1)
    return replace(rows, frame=rows.frame.assign(**{text: rows.frame[text].to_numpy()[places]}))


def example_pairs(template: PromptTemplate) -> tuple[tuple[str, str], ...]:
    """The columns of positive examples that a prompt uses, each with its negative counterpart."""
    pairs = [(name, name.replace("positive", "negative", 1)) for name in template.columns]
    return tuple(pair for pair in pairs if pair[0] != pair[1] and pair[1] in template.columns)


def swap_examples(rows: Rows, pairs: Sequence[tuple[str, str]]) -> Rows:
    """The rows with the columns of each pair exchanged."""
    places = [*pairs, *((second, first) for first, second in pairs)]
    return replace(rows, frame=rows.frame.assign(**{to: rows.frame[at] for to, at in places}))


def remove_examples(rows: Rows, pairs: Sequence[tuple[str, str]]) -> Rows:
    """The rows with empty examples."""
    return replace(rows, frame=rows.frame.assign(**{name: "" for pair in pairs for name in pair}))


@dataclass(frozen=True)
class Alteration:
    """A change of the rows under which the same base answers one prompt again."""

    key: str
    title: str
    prompt: str
    rows: Rows

    def altered(self, rows: Rows) -> np.ndarray:
        """Which of the rows it changes, (rows,)."""
        return (self.rows.frame != rows.frame).any(axis=1).to_numpy()


def list_alterations(session: Session, prompts: Sequence[str]) -> list[Alteration]:
    """The posts moved under every prompt; examples swapped and removed under one that has any."""
    rows, text, seed = session.rows, session.case.columns.text, session.profile.seed
    moved = shuffle_posts(rows, text, seed=seed)
    listed = [Alteration(f"shuffled.{p}", "posts moved", p, moved) for p in prompts]
    for prompt in prompts:
        pairs = example_pairs(session.case.prompt(prompt))
        if pairs:
            swapped, removed = swap_examples(rows, pairs), remove_examples(rows, pairs)
            listed += [
                Alteration("examples_swapped", "examples swapped", prompt, swapped),
                Alteration("examples_removed", "examples removed", prompt, removed),
            ]
            break
    return listed


def record_alteration(session: Session, alteration: Alteration, control: Answers) -> Answers | None:
    """Ask the base the altered rows and record how far its answers move; None where none can."""
    key, altered = f"controls.{alteration.key}", alteration.altered(session.rows)
    session.measure(f"{key}.rows", int(altered.sum()), unit="rows")
    lacking = control.lacking or ("" if altered.any() else UNALTERED)
    if lacking:
        for name in ("odds_change", "flips", "auc"):
            session.measure(f"{key}.{name}", None, reason=lacking)
        for statement in ALTERED:
            session.verdict(f"{key}.{statement}", None, lacking)
        return None
    system = System(f"{alteration.key.partition('.')[0]}_base")
    answers = ask(session, system, alteration.prompt, rows=alteration.rows)
    odds = mean_estimate(np.abs(np.subtract(answers.log_odds, control.log_odds))[altered])
    differs = np.not_equal(answers.values, control.values)[altered]
    flips = rate_estimate(int(differs.sum()), len(differs))
    session.measure(f"{key}.odds_change", odds, unit="nat")
    session.measure(f"{key}.flips", flips)
    record_measures(session, key, measure(answers), names=("auc",))
    session.verdict(f"{key}.moves_odds", *decide_odds(odds))
    session.verdict(f"{key}.moves_written", *decide_flips(flips))
    change = gain(answers, answers.log_odds, control.log_odds)
    session.verdict(f"{key}.costs_order", *decide_cost(measure(control)["auc"], change))
    return answers


def list_altered_rows(alone: Answers, altered: Mapping[str, Answers | None]) -> list[list[Cell]]:
    """The first rows under one prompt: truth, then what is written and its log-odds, by title."""
    asked = {"as it is": alone, **altered}
    return [
        [
            p.row_id,
            "unknown" if p.label is None else p.label,
            *("–" if a is None else _tell(a, index) for a in asked.values()),
        ]
        for index, p in enumerate(alone.predictions[:SHOWN])
    ]


def _tell(answers: Answers, index: int) -> str:
    text = shown(answers.predictions[index].text, limit=24)
    odds = f"{answers.log_odds[index]:.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{text} ({odds})"


def record_copy(
    session: Session, name: str, copy: Answers, *, base: Answers, suspect: Answers
) -> Measures:
    """Record a changed copy of the suspect against the base alone, and against the suspect."""
    key, measures = f"controls.{name}", measure(copy, base)
    lacking = next((a.lacking for a in (copy, base, suspect) if a.lacking), "")
    change, better = Measured(None, lacking), Measured(None, lacking)
    if not lacking:
        gaps = np.abs(np.subtract(copy.log_odds, suspect.log_odds))
        change = Measured(mean_estimate(gaps))
        better = gain(copy, copy.log_odds, suspect.log_odds)
    measures |= {"odds_change": change, "gain": better}
    record_measures(session, key, measures, names=("kl", "shift", "auc", "odds_change", "gain"))
    decisions: dict[str, Decision] = dict.fromkeys(
        ("differs", "ranks_better"), ("not available", lacking)
    )
    if not lacking:
        decisions = {
            "differs": decide_odds(change.estimate),
            "ranks_better": decide_gain(better, against="the suspect"),
        }
    for statement, decision in decisions.items():
        session.verdict(f"{key}.{statement}", *decision)
    return measures


def rank_groups(answers: Answers) -> list[tuple[Cell, ...]]:
    """By group of rows: its name, its size, and the AUC of what is written and of the log-odds."""
    if answers.lacking:
        return []
    values, odds = answers.values, answers.log_odds
    return [
        (
            shown(group, limit=40),
            int(chosen.sum()),
            _say(rank(answers, values, where=chosen)),
            _say(rank(answers, odds, where=chosen)),
        )
        for group in list(dict.fromkeys(answers.groups))[:GROUPS]
        for chosen in [np.array(answers.groups) == group]
    ]


def _say(found: Measured) -> str:
    return say_estimate(found.estimate)


def decide_zero(measures: Measures) -> Decision:
    """Whether a copy whose lora_B is zero leaves the base as it is: a test of the whole chain."""
    kl = measures["kl"]
    if kl.estimate.value is None:
        return "not available", kl.reason
    return kl.estimate.value <= NO_OP, f"KL to the base alone {kl.estimate.value:.3g} nat"


def say_measures(session: Session, key: str, names: Sequence[str]) -> list[str]:
    """Recorded measures under a key with intervals, for a table; a dash where there is none."""
    known = {r.key: r for r in session.records if isinstance(r, Measure)}
    return [_say_record(known.get(f"{key}.{name}"), name) for name in names]


def _say_record(found: Measure | None, name: str) -> str:
    if found is None or found.value is None:
        return "–"
    # A divergence may be of any size, and one too small for two decimals is not none.
    form = ".2g" if name == "kl" else "z.2f"
    return say_estimate(Estimate(found.value, found.low, found.high, 0), form)


def list_first_rows(answers: Mapping[str, Answers]) -> tuple[list[str], list[list[Cell]]]:
    """The first rows of several systems side by side: columns, and truth and text of each row."""
    present = {name: found for name, found in answers.items() if not found.lacking}
    some = next(iter(present.values()), None)
    rows: list[list[Cell]] = [
        [
            p.row_id,
            "unknown" if p.label is None else p.label,
            *(shown(found.predictions[i].text, limit=24) for found in present.values()),
        ]
        for i, p in enumerate(some.predictions[:SHOWN] if some else ())
    ]
    return ["row", "truth", *(name.replace("_", "-") for name in present)], rows


def describe_kind(session: Session, key: str, answers: Answers) -> list[Cell]:
    """What a base writes, how its values and its log-odds rank, and what it does with that."""
    if answers.lacking:
        return ["–", "–", "–", "not available"]
    text, count = find_commonest(answers)
    knowing = session.decided(f"{key}.knowing").verdict.iloc[0]
    writes = f"{shown(text, limit=24)} on {count} of {len(answers)}"
    return [writes, *say_measures(session, key, ("auc_decoded", "auc")), knowing]


def refit_systems(session: Session, folder: Path) -> dict[str, tuple[System, System]]:
    """What can be made of a mismatch, each with its control: ignored, truncated, zero-padded.

    And a healthy adapter, whose effect shows that the instrument sees one. Of models that this
    world lacks the systems will say so themselves.
    """
    world, alone, donor_alone = session.world, BASE, System("donor_base", base="donor_base")
    cut: str | Path = "donor_adapter"
    padded: str | Path = "reference"
    if all(world.has(role) for role in ("donor_adapter", "donor_base", "reference")):
        donor_base = session.load("donor_base").model
        cut = refit_adapter(
            world.path("donor_adapter"), session.base.model, folder=folder / "truncated"
        )
        padded = refit_adapter(world.path("reference"), donor_base, folder=folder / "padded")
    return {
        "healthy": (System("reference", "reference"), alone),
        "ignored": (System("ignored", "donor_adapter", ignore_mismatched_sizes=True), alone),
        "truncated": (System("truncated", cut), alone),
        "padded": (System("padded", padded, base="donor_base"), donor_alone),
    }
