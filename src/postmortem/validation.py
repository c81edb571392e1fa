"""The write-up's validation plan, carried out: expected outcomes and adapter filter, measured."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from postmortem.analysis import NO_LABELS, ONE_CLASS, ranks
from postmortem.case import AdapterFilter, Attempt, Verdict
from postmortem.health import THRESHOLDS
from postmortem.metrics import Estimate, auc_estimate
from postmortem.records import Cell
from postmortem.session import Answers, Session

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
    *("system", "standard deviation", "maximum", "filter"),
    *("AUC, written", "AUC, log-odds", "what ranks"),
)


def record_validation(
    session: Session, answers: Mapping[str, Answers | None], *, attempt: str
) -> None:
    """Record the plan's expected outcomes and its adapter filter on these systems.

    `answers` holds each system's answers to one prompt; None marks a role that is not available.
    Two made-up systems stand beside the measured ones in the filter: the widest of them with its
    values divided by `SHRINK`, which ranks as before, and random numbers, which rank nothing.
    """
    asked, reference = session.case.attempts[attempt], answers["reference"]
    outcomes: list[tuple[Cell, ...]]
    if reference is None:
        reason = session.world.members["reference"].reason
        outcomes = [(what, "not available", reason) for what in EXPECTED]
    else:
        outcomes = judge_outcomes(reference, asked)
    session.table("swap.outcomes", OUTCOMES, outcomes)
    limits = session.case.adapter_filter
    rows: list[tuple[Cell, ...]] = []
    follows: bool | Verdict | None = "not available"
    because = "the case names no filter"
    if limits is not None:
        systems = apply_filter({n: a for n, a in answers.items() if a is not None}, limits)
        rows, (follows, because) = [s.row for s in systems], judge_filter(systems)
    session.table("swap.filter", FILTERED, rows)
    session.verdict("swap.filter_follows_ranking", follows, because)


def judge_outcomes(reference: Answers, attempt: Attempt) -> list[tuple[Cell, ...]]:
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
        (ranks(auc) if distinct > 1 else False, lack or f"AUC {_interval(auc)}"),
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
            *(self.name, round(self.std, 3), round(self.maximum, 3)),
            *("passed" if self.passes else "blocked", _interval(self.written)),
            "none" if self.log_odds is None else _interval(self.log_odds),
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


def judge_filter(systems: list[Filtered]) -> tuple[bool | None, str]:
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


def _interval(auc: Estimate) -> str:
    if auc.value is None:
        return "unknown"
    return f"{auc.value:.2f} [{auc.low:.2f}, {auc.high:.2f}]"
