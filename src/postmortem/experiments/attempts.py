"""The incident's attempts, and what its write-up expected of the swap, held against answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from postmortem.case.schema import AdapterFilter, Attempt
from postmortem.experiments.ask import Answers
from postmortem.experiments.measure import (
    NO_LABELS,
    ONE_CLASS,
    SHOWN,
    STAGES,
    UNREAD,
    Decision,
    Measured,
    Measures,
    decide_move,
    describe_health,
    find_commonest,
    knows_and_does_not_say,
    measure,
    ranks,
    record_system,
    reproduces_symptom,
    shown,
)
from postmortem.experiments.metrics import (
    THRESHOLDS,
    Estimate,
    Health,
    auc_estimate,
    rate_estimate,
    say_estimate,
)
from postmortem.experiments.records import Cell
from postmortem.experiments.session import Session


def record_attempt(session: Session, name: str, answers: Answers) -> Measures:
    """Record everything that a page says of one attempt, under keys that begin with `name`.

    Of answers that there are not, the reason.
    """
    measures = record_system(session, name, answers)
    session.text(f"{name}.system", answers.system.replace("_", " "))
    for key, measured in _measure_texts(answers).items():
        unit = UNITS.get(key, "")
        session.measure(f"{name}.{key}", measured.value, unit=unit, reason=measured.reason)
    for statement, decision in _decide_attempt(session, name, answers, measures).items():
        session.verdict(f"{name}.{statement}", *decision)
    for table, (columns, rows) in _list_tables(session, answers).items():
        session.table(f"{name}.{table}", columns, rows)
    return measures


UNITS = {
    **dict.fromkeys(("prompt_tokens_least", "prompt_tokens_most", "answer_tokens"), "tokens"),
    "cut": "rows",
}


def _measure_texts(answers: Answers) -> Measures:
    """What is told of the texts, the stages of the parser and the lengths of the prompts."""
    stages = [f"stage.{stage}" for stage in STAGES]
    names = ("distinct_texts", "commonest_text_share", "cut", *UNITS)
    if answers.lacking:
        return dict.fromkeys((*stages, *names), Measured(None, answers.lacking))
    table, total = answers.table, len(answers)
    return {
        **{
            f"stage.{stage}": Measured(rate_estimate(int((table.stage == stage).sum()), total))
            for stage in STAGES
        },
        "prompt_tokens_least": Measured(int(table.full_prompt_tokens.min())),
        "prompt_tokens_most": Measured(int(table.full_prompt_tokens.max())),
        "cut": Measured(_count_cut(answers)),
        "answer_tokens": Measured(float(table.token_ids.map(len).mean())),
        "distinct_texts": Measured(int(table.text.nunique())),
        "commonest_text_share": Measured(rate_estimate(find_commonest(answers)[1], total)),
    }


def _count_cut(answers: Answers) -> int:
    return sum(p.full_prompt_tokens > p.prompt_tokens for p in answers.predictions)


def _decide_attempt(
    session: Session, name: str, answers: Answers, measures: Measures
) -> dict[str, Decision]:
    reported = session.case.attempts.get(name)
    statements = ("uncut", "plain_numbers", "answers_kept", "flagged", "healthy", "knows")
    compared = ("reported_value", "reported_parse_rate") if reported else ()
    if answers.lacking:
        return dict.fromkeys((*statements, *compared), ("not available", answers.lacking))
    total, cut = len(answers), _count_cut(answers)
    plain = sum(value is not None for value in answers.strict_values)
    kept = sum(bool(p.text or p.token_ids) for p in answers.predictions)
    decided: dict[str, Decision] = {
        "uncut": (cut == 0, f"{cut} of {total} prompts were cut"),
        "plain_numbers": (plain == total, f"{plain} of {total} answers are plain numbers"),
        "answers_kept": (
            kept == total,
            f"text, token ids and log-odds of {kept} of {total} answers are on record",
        ),
        **_decide_health(answers),
        "knows": knows_and_does_not_say(measures),
    }
    if reported is not None:
        decided |= _decide_reported(reported, measures)
    return decided


def _decide_health(answers: Answers) -> dict[str, Decision]:
    health = describe_health(answers)
    if health is None:
        return {"flagged": (None, UNREAD), "healthy": (False, UNREAD)}
    failed = [check.name for check in health.checks() if check.passed is False]
    flagged = f"{len(failed)} check(s) failed on {health.distinct} distinct value(s)"
    told = f"failed: {', '.join(failed)}" if failed else "every check passed"
    return {
        "flagged": (bool(failed) if health.constant else None, flagged),
        "healthy": (not failed, told),
    }


def _decide_reported(attempt: Attempt, measures: Measures) -> dict[str, Decision]:
    """Whether what was reported of the attempt has come out again."""
    top, share = measures["top_value"].value, measures["top_share"].value
    counted = measures["parsed_as_written"].estimate.value or 0.0
    told = attempt.reported_parse_rate
    if top is None:
        return dict.fromkeys(("reported_value", "reported_parse_rate"), (False, UNREAD))
    return {
        "reported_value": (
            measures["distinct"].value == 1 and top == attempt.reported_value,
            f"the commonest value is {top}, on {share:.0%} of the rows; "
            f"{attempt.reported_value:.1f} on every row was reported",
        ),
        "reported_parse_rate": (
            abs(counted - told) < 0.005,
            f"{counted:.0%} of the rows count as parsed; {told:.0%} was reported",
        ),
    }


Listed = Mapping[str, tuple[Sequence[str], Sequence[Sequence[Cell]]]]


def _list_tables(session: Session, answers: Answers) -> Listed:
    """Tables by key: the posts, the first answers, the spread by group, and the checks."""
    rows, text = session.rows, session.case.columns.text
    posts = [
        (rows.ids[i], shown(rows.groups[i], limit=40), shown(rows.row(i)[text], limit=160))
        for i in range(min(SHOWN, len(rows)))
    ]
    first = [
        (
            p.row_id,
            "unknown" if p.label is None else p.label,
            shown(p.text),
            p.value,
            p.stage,
            "no number" if p.strict_value is None else p.strict_value,
            "–" if p.number_log_odds is None else round(p.number_log_odds, 2),
        )
        for p in answers.predictions[:SHOWN]
    ]
    columns = ("row", "truth", "text", "as written", "stage", "strict", "log-odds")
    health = describe_health(answers)
    return {
        "posts": (("row", "rule", "post"), posts),
        "first_rows": (columns, first),
        "groups": (
            ("rule", "rows", "standard deviation", "AUC, written"),
            [] if health is None else _list_groups(answers, health),
        ),
        "checks": (
            ("check", "found", "limit", "result"),
            [] if health is None else _list_checks(answers, health),
        ),
    }


def _list_groups(answers: Answers, health: Health) -> list[tuple[Cell, ...]]:
    return [
        (shown(group), answers.groups.count(group), round(std, 3), _round(health.group_auc, group))
        for group, std in health.group_std.items()
    ]


def _round(found: Mapping[str, float | None], group: str) -> Cell:
    value = found.get(group)
    return "unknown" if value is None else round(value, 3)


def _list_checks(answers: Answers, health: Health) -> list[tuple[Cell, ...]]:
    words = {True: "passed", False: "failed", None: "no labels"}
    return [
        (
            check.name,
            "unknown" if check.found is None else round(check.found, 3),
            check.limit,
            words[check.passed],
        )
        for check in health.checks()
    ]


# A ranking divided by this keeps its AUC and loses the spread that the filter asks for.
SHRINK = 25
EXPECTED = (
    "some value other than the reported one",
    "diverse values",
    "values that follow the truth",
    "zeros and ones, both of them and nothing else",
    "the reported value everywhere",
)
OUTCOMES = ("expected of the reference", "here", "measured")
FILTERED = (
    "system",
    "standard deviation",
    "maximum",
    "filter",
    "AUC, written",
    "AUC, log-odds",
    "what ranks",
)


def decide_control(answers: Mapping[str, Answers]) -> Decision:
    """Whether the base alone answered the same rows as every other system that answered."""
    rows = [p.row_id for p in answers["base"].predictions]
    others = [a for name, a in answers.items() if name != "base" and not a.lacking]
    same = sum([p.row_id for p in found.predictions] == rows for found in others)
    return same == len(others), (
        f"the base alone answered {len(rows)} rows, and {same} of {len(others)} other systems "
        f"the same ones"
    )


def decide_cases(reference: Answers, suspect: Answers, *, attempt: Attempt) -> dict[str, Decision]:
    """The write-up's case A, that the reference works; case B, that it says the reported value.

    And whether case A means what it was to mean, a suspect whose shapes do not fit.
    """
    if reference.lacking:
        absent: Decision = ("not available", reference.lacking)
        return dict.fromkeys(("case_a", "case_b", "case_a_means_mismatch"), absent)
    found = measure(reference)
    distinct, spread = found["distinct"].value, found["std"].value
    ranked = found["auc_decoded"]
    # Values that do not vary cannot rank; whether those that vary do takes labels.
    works = ranks(ranked.estimate) if distinct != 1 else False
    varied = f"{distinct} distinct values, standard deviation {spread:.2f}"
    auc = ranked.estimate.value
    told = ranked.reason if auc is None else f"AUC {auc:.2f}"
    zeros = distinct == 1 and found["top_value"].value == attempt.reported_value
    return {
        "case_a": (works, f"{varied}, {told}"),
        "case_b": (zeros, varied),
        "case_a_means_mismatch": _decide_meaning(works, suspect, attempt),
    }


def _decide_meaning(works: bool | None, suspect: Answers, attempt: Attempt) -> Decision:
    if suspect.lacking:
        return "not available", suspect.lacking
    # The suspect of this world loads onto the base without a mismatch: if it fails beside a
    # reference that works, case A has come about without the cause it was to confirm.
    fails = bool(reproduces_symptom(suspect, attempt)[0])
    words = {True: "works", False: "does not work", None: "cannot be judged"}
    return False if works and fails else None, (
        f"the suspect of this world has the base's shapes and "
        f"{'fails' if fails else 'does not fail'}; the reference {words[works]}"
    )


def decide_swap(session: Session, answers: Mapping[str, Answers], attempt: Attempt) -> None:
    """Record what the swap says of an attempt: by system, by the plan's cases, by its filter."""
    for name, found in answers.items():
        measures = measure(found, answers["base"])
        session.verdict(f"swap.{name}.reproduces", *reproduces_symptom(found, attempt))
        session.verdict(f"swap.{name}.knows", *knows_and_does_not_say(measures))
        if name != "base":
            session.verdict(f"swap.{name}.moves_the_base", *decide_move(measures))
    cases = decide_cases(answers["reference"], answers["suspect"], attempt=attempt)
    for name, decision in cases.items():
        session.verdict(f"swap.{name}", *decision)
    session.table("swap.outcomes", OUTCOMES, list_outcomes(answers["reference"], attempt))
    rows, follows = hold_against_filter(answers, session.case.adapter_filter)
    session.table("swap.filter", FILTERED, rows)
    session.verdict("swap.filter_follows_ranking", *follows)


def list_outcomes(reference: Answers, attempt: Attempt) -> list[tuple[Cell, ...]]:
    """What the write-up expected of the reference: each outcome, the verdict, what was measured."""
    if reference.lacking:
        return [(what, "not available", reference.lacking) for what in EXPECTED]
    return decide_outcomes(reference, attempt)


def hold_against_filter(
    answers: Mapping[str, Answers], limits: AdapterFilter | None
) -> tuple[list[tuple[Cell, ...]], Decision]:
    """The systems under the write-up's filter as rows of a table, and whether it follows ranking.

    Two made-up systems stand beside the measured ones: the widest of them with its values divided
    by `SHRINK`, which ranks as before, and random numbers, which rank nothing.
    """
    if limits is None:
        return [], ("not available", "the case names no filter")
    systems = apply_filter({n: a for n, a in answers.items() if not a.lacking}, limits)
    return [system.row for system in systems], decide_filter(systems)


def decide_outcomes(reference: Answers, attempt: Attempt) -> list[tuple[Cell, ...]]:
    """Each outcome that the write-up expected of the swap: the verdict, and what was measured."""
    values, reported = reference.values, attempt.reported_value
    distinct, other = len(set(values)), sum(value != reported for value in values)
    boundary = sum(value in (0.0, 1.0) for value in values)
    auc, lack = _rank(values, reference.labels)
    told = f"{distinct} distinct value(s)"
    found = (
        (other > 0, f"{other} of {len(values)} values differ from {reported:.1f}"),
        (distinct >= THRESHOLDS.distinct, told),
        # Values that do not vary follow nothing, with labels or without.
        (ranks(auc) if distinct > 1 else False, lack or f"AUC {say_estimate(auc)}"),
        (set(values) == {0.0, 1.0}, f"{boundary} of {len(values)} values are 0 or 1"),
        (other == 0, told),
    )
    words = {True: "holds", False: "refuted", None: "cannot tell"}
    return [(what, words[held], told) for what, (held, told) in zip(EXPECTED, found, strict=True)]


@dataclass(frozen=True)
class Filtered:
    """A system under the write-up's filter, beside what a ranking metric says of it.

    `log_odds` is None for a made-up system, which has none.
    """

    name: str
    std: float
    maximum: float
    passes: bool
    written: Estimate
    log_odds: Estimate | None

    @property
    def row(self) -> tuple[Cell, ...]:
        """The system as a row of the table."""
        scores = {"written": self.written, "log-odds": self.log_odds}
        ranking = [name for name, auc in scores.items() if auc and ranks(auc)]
        known = ranks(self.written) is not None
        return (
            self.name,
            round(self.std, 3),
            round(self.maximum, 3),
            *("passed" if self.passes else "blocked", say_estimate(self.written)),
            "none" if self.log_odds is None else say_estimate(self.log_odds),
            (" and ".join(ranking) or "nothing") if known else "unknown",
        )


def apply_filter(answers: Mapping[str, Answers], limits: AdapterFilter) -> list[Filtered]:
    """Put the measured systems and the two made-up ones through the filter."""

    def judge(name: str, values: np.ndarray, log_odds: np.ndarray | None = None) -> Filtered:
        std, maximum = float(values.std()), float(values.max())
        return Filtered(
            name=name,
            std=std,
            maximum=maximum,
            passes=std > limits.std_above and maximum > limits.maximum_above,
            written=_rank(values, labels)[0],
            log_odds=None if log_odds is None else _rank(log_odds, labels)[0],
        )

    values = {name.replace("_", "-"): np.asarray(a.values) for name, a in answers.items()}
    labels = next(iter(answers.values())).labels
    widest = max(values, key=lambda name: float(values[name].std()))
    noise = np.random.default_rng(0).random(len(values[widest]))
    odds = [np.asarray(a.number_log_odds) for a in answers.values()]
    return [
        *map(judge, values, values.values(), odds),
        judge(f"{widest} divided by {SHRINK}", values[widest] / SHRINK),
        judge("random numbers", noise),
    ]


def decide_filter(systems: list[Filtered]) -> tuple[bool | None, str]:
    """Whether the filter passes exactly the systems whose written values rank above chance.

    One system that it judges wrongly decides; without such a one, all must be known to rank or not.
    """
    blocked = [s for s in systems if not s.passes]
    idle = [s.name for s in systems if s.passes and ranks(s.written) is False]
    lost = [s.name for s in blocked if ranks(s.written)]
    unread = [s.name for s in blocked if s.name not in lost and s.log_odds and ranks(s.log_odds)]
    parts = {
        "passed without ranking": idle,
        "blocked although the values rank": lost,
        "blocked although the log-odds rank": unread,
    }
    told = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
    if idle or lost:
        return False, "; ".join(told)
    unknown = [s.name for s in systems if ranks(s.written) is None]
    if unknown:
        return None, f"it cannot be told whether these rank: {', '.join(unknown)}"
    return True, "; ".join(told) or "it passes the systems that rank and no other"


def _rank(values: np.ndarray | list[float], labels: np.ndarray | None) -> tuple[Estimate, str]:
    """The AUC and, where there is none, why."""
    if labels is None:
        return Estimate(None, None, None, len(values)), NO_LABELS
    auc = auc_estimate(labels, values)
    return auc, ONE_CLASS if auc.value is None else ""
