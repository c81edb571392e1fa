"""Controls: an adapter off and on, posts moved, examples exchanged, bases that know or do not."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from postmortem.case.rows import Rows
from postmortem.case.schema import PromptTemplate
from postmortem.experiments.analysis import (
    EFFECT,
    NO_LABELS,
    ONE_CLASS,
    RANKING,
    SHOWN,
    escaped,
    judge_knowing,
    measure_effect,
    measure_ranking,
    ranks,
    shown,
)
from postmortem.experiments.health import THRESHOLDS
from postmortem.experiments.metrics import (
    Estimate,
    auc_estimate,
    auc_gain_estimate,
    mean_estimate,
    rate_estimate,
    say_estimate,
)
from postmortem.experiments.records import Cell, Measure
from postmortem.experiments.session import Answers, Session
from postmortem.models.loading import LoadedBase
from postmortem.models.world import role_name

# The first prompt's answers are long; it is asked only where there is an adapter to compare.
PROMPTS = ("v1", "v2", "yes_no")
NUMBER, YES_NO = "v2", "yes_no"
SYSTEMS = ("suspect", "reference")
# Bases of three kinds, alike in what they write or in what they know.
KINDS = ("base", "speaking_base", "ignorant_base")
CHANGES = ("odds_change", "flips", "auc")
GAINS = ("gain_decoded", "gain_log_odds")
STATED = (*EFFECT, *RANKING)
UNKNOWN = Estimate(None, None, None, 0)
UNALTERED = "it alters no row here"

Answered = Mapping[str, Answers]


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


def answer_alone(session: Session) -> dict[str, Answers]:
    """The base's own answers, under the second attempt's prompt and asked yes or no."""
    return {NUMBER: session.answer(NUMBER), YES_NO: session.answer(YES_NO, kept=False)}


@dataclass(frozen=True)
class Alteration:
    """A change of the rows under which the same base answers one prompt again."""

    title: str
    prompt: str
    alter: Callable[[Session], Rows]


def _shuffled(session: Session) -> Rows:
    return shuffle_posts(session.rows, session.case.columns.text, seed=session.profile.seed)


def _swapped(session: Session) -> Rows:
    return swap_examples(session.rows, example_pairs(session.case.prompts[NUMBER]))


def _removed(session: Session) -> Rows:
    return remove_examples(session.rows, example_pairs(session.case.prompts[NUMBER]))


ALTERATIONS: Mapping[str, Alteration] = {
    "shuffled.v2": Alteration("posts moved", NUMBER, _shuffled),
    "shuffled.yes_no": Alteration("posts moved", YES_NO, _shuffled),
    "examples_swapped": Alteration("examples swapped", NUMBER, _swapped),
    "examples_removed": Alteration("examples removed", NUMBER, _removed),
}


def record_alterations(session: Session, alone: Answered) -> None:
    """Ask the base the same rows with posts moved, and with examples exchanged or removed."""
    found = {}
    for name, alteration in ALTERATIONS.items():
        rows, control = alteration.alter(session), alone[alteration.prompt]
        altered = (rows.frame != session.rows.frame).any(axis=1).to_numpy()
        answers = None
        if altered.any():
            system = f"{name.partition('.')[0]}_base"
            answers = session.answer(alteration.prompt, system=system, rows=rows, kept=False)
        _record_change(session, f"controls.{name}", answers, control=control, altered=altered)
        found[name] = answers
    _table_changes(session)
    _table_altered_rows(session, alone[NUMBER], found=found)


def _record_change(
    session: Session,
    key: str,
    answers: Answers | None,
    *,
    control: Answers,
    altered: np.ndarray,
) -> None:
    """Record how far the altered rows' answers lie from those to the rows as they are."""
    session.measure(f"{key}.rows", int(altered.sum()), unit="rows")
    if answers is None:
        for name in CHANGES:
            session.measure(f"{key}.{name}", None, reason=UNALTERED)
        for statement in ("moves_odds", "moves_written", "costs_order"):
            session.verdict(f"{key}.{statement}", None, UNALTERED)
        return
    gaps = np.abs(np.subtract(answers.asked_log_odds, control.asked_log_odds))[altered]
    differs = np.not_equal(answers.values, control.values)[altered]
    odds, flips = mean_estimate(gaps), rate_estimate(int(differs.sum()), len(differs))
    session.measure(f"{key}.odds_change", odds, unit="nat")
    session.measure(f"{key}.flips", flips)
    session.measure(f"{key}.auc", _auc(answers), reason=_unranked(answers))
    session.verdict(f"{key}.moves_odds", *judge_odds(odds))
    session.verdict(f"{key}.moves_written", *judge_flips(flips))
    change = _gain(answers.asked_log_odds, control.asked_log_odds, labels=control.labels)
    decided = judge_cost(_auc(control), change=change, unranked=_unranked(control))
    session.verdict(f"{key}.costs_order", *decided)


def judge_odds(change: Estimate) -> tuple[bool | None, str]:
    """Whether log-odds depend on what was altered: the interval above the limit, or below it."""
    assert change.low is not None
    assert change.high is not None
    because = (
        f"the log-odds change by {say_estimate(change)} nat in the mean of {change.n} rows; "
        f"less than {THRESHOLDS.odds} is not called a change"
    )
    if change.n < THRESHOLDS.rows:
        return None, because
    if change.low > THRESHOLDS.odds:
        return True, because
    return False if change.high < THRESHOLDS.odds else None, because


def judge_flips(flips: Estimate) -> tuple[bool | None, str]:
    """Whether the written value depends on what was altered.

    Decoding is greedy, so one changed value shows that it does; none shows that it does not only
    on as many rows as make a change rarer than the limit.
    """
    assert flips.high is not None
    because = f"{say_estimate(flips, '.1%')} of {flips.n} written values change"
    if flips.value:
        return True, because
    return False if flips.high < THRESHOLDS.flips else None, because


def judge_cost(before: Estimate, *, change: Estimate, unranked: str) -> tuple[bool | None, str]:
    """Whether the order of the rows is lost with what was altered.

    There is an order `before`, and its AUC falls by more than the least that is of use, or less.
    """
    if before.value is None or change.low is None or change.high is None:
        return None, unranked
    because = (
        f"AUC of the log-odds {say_estimate(before)} on the rows as they are; "
        f"on the altered ones it differs by {say_estimate(change, '+z.2f')}"
    )
    least = THRESHOLDS.useful - THRESHOLDS.chance
    if not ranks(before):
        return None, because
    if change.high < -least:
        return True, because
    return False if change.low > -least else None, because


def _auc(answers: Answers) -> Estimate:
    """AUC of the log-odds of what the prompt asks for."""
    labels = answers.labels
    if labels is None:
        return UNKNOWN
    return auc_estimate(labels, answers.asked_log_odds)


def _gain(
    after: Sequence[float], before: Sequence[float], *, labels: np.ndarray | None
) -> Estimate:
    return UNKNOWN if labels is None else auc_gain_estimate(labels, after, before)


def _unranked(answers: Answers) -> str:
    return NO_LABELS if answers.labels is None else ONE_CLASS


def _name(prompt: str) -> str:
    """A prompt as it is written on a page."""
    return prompt.replace("_", "/")


def _table_changes(session: Session) -> None:
    """One row an alteration, from what has been recorded of it."""
    rows = [
        (
            alteration.title,
            _name(alteration.prompt),
            *(_say_measure(session, f"controls.{name}.{part}") for part in CHANGES),
        )
        for name, alteration in ALTERATIONS.items()
    ]
    columns = ("altered", "prompt", "change of log-odds, nat", "values changed", "AUC, log-odds")
    session.table("controls.altered", columns, rows)


def _table_altered_rows(
    session: Session, alone: Answers, *, found: Mapping[str, Answers | None]
) -> None:
    """The first rows under the second prompt: what is written, and the log-odds."""
    asked = {ALTERATIONS[n].title: a for n, a in found.items() if ALTERATIONS[n].prompt == NUMBER}
    systems = {"as it is": alone, **asked}
    rows = [
        (
            p.row_id,
            "unknown" if p.label is None else p.label,
            *("–" if a is None else _tell(a, index) for a in systems.values()),
        )
        for index, p in enumerate(alone.predictions[:SHOWN])
    ]
    session.table("controls.altered_rows", ("row", "truth", *systems), rows)


def _tell(answers: Answers, index: int) -> str:
    text = shown(answers.predictions[index].text, limit=24)
    odds = f"{answers.asked_log_odds[index]:.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{text} ({odds})"


def record_kinds(session: Session, alone: Answered) -> None:
    """Hold three bases side by side: what each writes, and what its log-odds rank."""
    for name in ("chance", "useful", "rows", "odds", "flips"):
        session.measure(f"controls.limit.{name}", getattr(THRESHOLDS, name))
    table = []
    for role in KINDS:
        for prompt, answers in _ask_kind(session, role, alone=alone).items():
            cells = _record_kind(session, role, prompt=prompt, answers=answers)
            table.append((role_name(role), _name(prompt), *cells))
    columns = ("base", "prompt", "writes", "AUC, written", "AUC, log-odds", "so it")
    session.table("controls.kinds", columns, table)


def _ask_kind(session: Session, role: str, *, alone: Answered) -> Mapping[str, Answers | None]:
    if role == "base":
        return alone
    if not session.world.has(role):
        return dict.fromkeys(alone)
    base = session.load(role)
    # The figure shows each row's number; nothing else needs the predictions.
    return {
        prompt: session.answer(prompt, system=role, base=base, kept=prompt == NUMBER)
        for prompt in alone
    }


def _record_kind(
    session: Session, role: str, *, prompt: str, answers: Answers | None
) -> Sequence[Cell]:
    """Record and judge one base under one prompt; its cells of the table."""
    key, reason = f"controls.{role}.{prompt}", session.world.members[role].reason
    ranking = _record_ranking(session, key, answers, reason=reason)
    if answers is None:
        session.measure(f"{key}.distinct", None, reason=reason)
        session.text(f"{key}.commonest_text", "not available")
        session.verdict(f"{key}.knowing", "not available", reason)
        return "–", "–", "–", "not available"
    text, count = Counter(p.text for p in answers.predictions).most_common(1)[0]
    session.measure(f"{key}.distinct", len(set(answers.values)))
    session.text(f"{key}.commonest_text", escaped(text))
    hidden, said = ranking[f"auc_{answers.contract}"], ranking["auc_decoded"]
    word, because = judge_knowing(hidden, said=said, unranked=_unranked(answers))
    session.verdict(f"{key}.knowing", word, because)
    writes = f"{shown(text, limit=24)} on {count} of {len(answers.values)}"
    return writes, say_estimate(said), say_estimate(hidden), word


def _record_ranking(
    session: Session, key: str, answers: Answers | None, *, reason: str = ""
) -> Mapping[str, Estimate]:
    """Record the AUC of each read-out; without answers, each with the reason."""
    ranking = dict.fromkeys(RANKING, UNKNOWN) if answers is None else measure_ranking(answers)
    for name, found in ranking.items():
        why = reason if answers is None else _unranked(answers)
        session.measure(f"{key}.{name}", found, reason=why)
    return ranking


def record_states(session: Session, alone: Answered) -> None:
    """Hold each adapter, off and on, against the base alone on identical rows."""
    present = [system for system in SYSTEMS if session.world.has(system)]
    first = session.answer("v1", kept=False) if present else None
    _record_ranking(session, "controls.base.v1", first, reason="there is no adapter to compare")
    controls = dict(alone) if first is None else {"v1": first, **alone}
    base, groups = session.base, _group_rows("base alone", controls)
    for system in SYSTEMS:
        if system not in present:
            _record_absent(session, system)
            continue
        states = _ask_states(session, system, base=base)
        for prompt, (off, on) in states.items():
            _record_state(session, f"{system}_disabled.{prompt}", off, control=controls[prompt])
            _record_state(session, f"{system}.{prompt}", on, control=controls[prompt])
            _record_gains(session, f"controls.{system}.{prompt}", on, control=controls[prompt])
        same, because = _compare_exactly([(states[p][0], controls[p]) for p in PROMPTS])
        session.verdict(f"controls.{system}.disabled_is_base", same, because)
        groups += _group_rows(system, {prompt: on for prompt, (_, on) in states.items()})
        if not same:
            # A file that brings base weights has changed the base in memory for those to come.
            base = session.load("base", step=f"load base after {system}")
    columns = ("system", "prompt", "rule", "rows", "AUC, written", "AUC, log-odds")
    session.table("controls.groups", columns, groups)
    _table_states(session, present, prompts=controls)


def _ask_states(
    session: Session, system: str, *, base: LoadedBase
) -> dict[str, tuple[Answers, Answers]]:
    """A system's answers by prompt, with its adapter off and on."""

    def ask(prompt: str, *, disabled: bool) -> Answers:
        return session.answer(prompt, system=system, base=base, disabled=disabled, kept=False)

    return {p: (ask(p, disabled=True), ask(p, disabled=False)) for p in PROMPTS}


def _record_state(session: Session, state: str, answers: Answers, *, control: Answers) -> None:
    key = f"controls.{state}"
    _record_ranking(session, key, answers)
    for name, found in measure_effect(answers, control).items():
        session.measure(f"{key}.{name}", found, unit="" if name == "flips" else "nat")


def _record_gains(session: Session, key: str, answers: Answers, *, control: Answers) -> None:
    """Record what the adapter adds to the ranking, by what is written and by log-odds."""
    why = _unranked(answers)
    pairs = {
        "says_better": ("gain_decoded", answers.values, control.values),
        "ranks_better": ("gain_log_odds", answers.asked_log_odds, control.asked_log_odds),
    }
    for statement, (name, after, before) in pairs.items():
        gain = _gain(after, before, labels=answers.labels)
        session.measure(f"{key}.{name}", gain, reason=why)
        session.verdict(f"{key}.{statement}", *judge_gain(gain, why))


def judge_gain(gain: Estimate, unranked: str) -> tuple[bool | None, str]:
    """Whether an AUC has risen: the interval of the difference lies above zero, or not at all."""
    if gain.low is None or gain.high is None:
        return None, unranked
    because = f"AUC against the base alone {say_estimate(gain, '+z.2f')}"
    if gain.n < THRESHOLDS.rows:
        return None, f"{because}, on {gain.n} rows"
    if gain.low > 0:
        return True, because
    return False if gain.high <= 0 else None, because


def _compare_exactly(pairs: Sequence[tuple[Answers, Answers]]) -> tuple[bool, str]:
    """Whether answers are equal to the last bit: texts and all log-probabilities."""
    total = sum(len(control.values) for _, control in pairs)
    differing = sum(
        p.token_ids != q.token_ids
        or not np.array_equal(off.first_log_probs[i], control.first_log_probs[i], equal_nan=True)
        or not np.array_equal(off.number_log_probs[i], control.number_log_probs[i], equal_nan=True)
        for off, control in pairs
        for i, (p, q) in enumerate(zip(off.predictions, control.predictions, strict=True))
    )
    return differing == 0, (
        f"{differing} of {total} answers differ in a token or in any log-probability"
    )


def _record_absent(session: Session, system: str) -> None:
    reason = session.world.members[system].reason
    for prompt in PROMPTS:
        for state in (f"{system}_disabled", system):
            for name in (*RANKING, *EFFECT):
                session.measure(f"controls.{state}.{prompt}.{name}", None, reason=reason)
        for name in GAINS:
            session.measure(f"controls.{system}.{prompt}.{name}", None, reason=reason)
        for statement in ("says_better", "ranks_better"):
            session.verdict(f"controls.{system}.{prompt}.{statement}", "not available", reason)
    session.verdict(f"controls.{system}.disabled_is_base", "not available", reason)


def _group_rows(name: str, answers: Answered) -> list[tuple[Cell, ...]]:
    """Rows of the table by rule: the AUC within each."""
    return [
        (name, _name(prompt), shown(group), found.groups.count(group), *_say_group(found, group))
        for prompt, found in answers.items()
        for group in dict.fromkeys(found.groups)
    ]


def _say_group(answers: Answers, group: str) -> list[str]:
    labels, chosen = answers.labels, np.array(answers.groups) == group
    if labels is None:
        return ["unknown", "unknown"]
    scores = (answers.values, answers.asked_log_odds)
    return [say_estimate(auc_estimate(labels[chosen], np.array(found)[chosen])) for found in scores]


def _table_states(session: Session, present: Sequence[str], *, prompts: Iterable[str]) -> None:
    """One row a system, state and prompt, from what has been recorded of it."""
    states = [("base", "base alone")]
    for system in present:
        states += [(f"{system}_disabled", f"{system}, off"), (system, f"{system}, on")]
    rows = [
        (
            name,
            _name(prompt),
            *(_say_measure(session, f"controls.{state}.{prompt}.{n}") for n in STATED),
        )
        for prompt in prompts
        for state, name in states
    ]
    columns = ("system", "prompt", "KL, nat", "change of log-odds, nat", "values changed")
    ranking = ("AUC, written", "AUC, number log-odds", "AUC, yes–no log-odds")
    session.table("controls.states", (*columns, *ranking), rows)


def _say_measure(session: Session, key: str) -> str:
    """A recorded estimate with its interval; a dash where it is not recorded."""
    found = next((r for r in session.records if isinstance(r, Measure) and r.key == key), None)
    return "–" if found is None else say_estimate(Estimate(found.value, found.low, found.high, 0))
