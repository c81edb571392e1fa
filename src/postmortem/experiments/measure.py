"""Measures: what answers say by themselves and beside their control, and what that decides.

Each quantity has one definition, here. A measure that cannot be had carries its reason, and a
statement that the interval leaves open is one that cannot be told.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import log_softmax

from postmortem.case.prompts import counts_as_parsed
from postmortem.case.schema import Attempt, Knowing, Verdict
from postmortem.experiments.ask import Answers
from postmortem.experiments.metrics import (
    THRESHOLDS,
    Estimate,
    Health,
    auc_estimate,
    auc_gain_estimate,
    describe,
    kl_divergence,
    mean_estimate,
    rate_estimate,
    say_estimate,
)
from postmortem.experiments.session import Session

STAGES = ("float", "pattern", "keyword", "default")
# The stages in which the write-up's parser makes a number up.
MADE_UP = ("keyword", "default")
NO_LABELS = "the rows came without labels"
ONE_CLASS = "the labels hold one class alone"
UNREAD = "no answer could be read"
SOME_UNREAD = "some answers could not be read"
NOT_ASKED = "this read-out was not asked for"
# Below this KL in nats two distributions are the same up to rounding.
NO_OP = 1e-6
# The rows shown one by one: as many as the incident had.
SHOWN = 10
UNKNOWN = Estimate(None, None, None, 0)

DISTRIBUTION = (
    "distinct",
    "top_value",
    "top_share",
    "tied_pairs",
    "entropy",
    "boundary_share",
    "mean",
    "std",
    "minimum",
    "maximum",
)
RANKING = ("auc_decoded", "auc_number", "auc_yes_no", "auc")
EFFECT = ("kl", "shift", "flips")
GAINS = ("gain_decoded", "gain_log_odds")
PARSED = ("parsed_as_written", "parsed_strict")
ALONE = ("rows", *DISTRIBUTION, *PARSED, *RANKING)
NAT = ("kl", "shift")


@dataclass(frozen=True)
class Measured:
    """A number or an estimate, or the reason why there is none."""

    value: Estimate | float | int | None
    reason: str = ""

    @property
    def estimate(self) -> Estimate:
        """The same as an estimate; of a plain number without an interval."""
        if isinstance(self.value, Estimate):
            return self.value
        return Estimate(self.value, None, None, 0)


Measures = dict[str, Measured]


def measure(answers: Answers, control: Answers | None = None) -> Measures:
    """All measures of a system's answers, and of the change against its control, by name.

    `auc_decoded` ranks by the values that are read, `auc_number` and `auc_yes_no` by the two
    read-outs, and `auc` by that of what the prompt asks for. `kl` is KL(system || control) of the
    answer in nats: over the eleven numbers where a number is asked for, over the first token or
    the classes elsewhere. `shift` is the mean change of the log-odds of what is asked for, `flips`
    the share of rows with another answer, and the gains are differences of two AUCs.
    """
    if answers.lacking:
        effect = () if control is None else (*EFFECT, *GAINS)
        return {name: Measured(None, answers.lacking) for name in (*ALONE, *effect)}
    return {
        **_measure_distribution(answers),
        **_measure_ranking(answers),
        **({} if control is None else _measure_effect(answers, control)),
    }


def describe_health(answers: Answers) -> Health | None:
    """The distribution of the values that could be read; None where none could."""
    values = [None if np.isnan(value) else value for value in answers.values]
    if not any(value is not None for value in values):
        return None
    found = describe(values, groups=answers.groups, labels=answers.labels)
    return replace(found, parsed_share=share_read(answers))


def share_read(answers: Answers) -> float:
    """The share of answers that are read as what was asked for, and not made up by a parser."""
    read = [p.value is not None and p.stage not in MADE_UP for p in answers.predictions]
    return sum(read) / len(read)


def _measure_distribution(answers: Answers) -> Measures:
    health, total = describe_health(answers), len(answers)
    strict = [value for value in answers.strict_values if value is not None]
    counted = sum(map(counts_as_parsed, answers.values))
    return {
        "rows": Measured(total),
        **{
            name: Measured(None, UNREAD) if health is None else Measured(getattr(health, name))
            for name in DISTRIBUTION
        },
        "parsed_as_written": Measured(rate_estimate(counted, total)),
        "parsed_strict": Measured(rate_estimate(len(strict), total)),
    }


def _measure_ranking(answers: Answers) -> Measures:
    read = ~np.isnan(answers.values)
    scores = {
        "auc_decoded": answers.values,
        "auc_number": answers.number_log_odds,
        "auc_yes_no": answers.yes_no_log_odds,
        "auc": answers.log_odds,
    }
    return {
        name: rank(answers, found, where=read if name == "auc_decoded" else None)
        for name, found in scores.items()
    }


def rank(answers: Answers, scores: list[float], *, where: np.ndarray | None = None) -> Measured:
    """The AUC of scores of the rows, or of those chosen, with the reason where there is none."""
    if answers.labels is None:
        return Measured(None, NO_LABELS)
    chosen = np.ones(len(scores), dtype=bool) if where is None else where
    if not chosen.any():
        return Measured(None, UNREAD)
    values = np.asarray(scores, dtype=float)[chosen]
    if not np.isfinite(values).all():
        return Measured(None, NOT_ASKED)
    return _or_why(auc_estimate(answers.labels[chosen], values))


def _measure_effect(answers: Answers, control: Answers) -> Measures:
    if control.lacking:
        return {name: Measured(None, control.lacking) for name in (*EFFECT, *GAINS)}
    kl = kl_divergence(answer_log_probs(answers), answer_log_probs(control))
    changed = sum(a != b for a, b in zip(_decisions(answers), _decisions(control), strict=True))
    return {
        "kl": Measured(mean_estimate(kl)),
        "shift": Measured(mean_estimate(np.subtract(answers.log_odds, control.log_odds))),
        "flips": Measured(rate_estimate(changed, len(control))),
        "gain_decoded": gain(answers, answers.values, control.values),
        "gain_log_odds": gain(answers, answers.log_odds, control.log_odds),
    }


def answer_log_probs(answers: Answers) -> np.ndarray:
    """The log-distribution that the prompt's contract is about, normalised, a row each."""
    if answers.contract == "number":
        return log_softmax(answers.number_log_probs, axis=1)
    return answers.first_log_probs


def _decisions(answers: Answers) -> list[float | None]:
    """What each answer says; of a classifier's probability, on which side of one half it lies."""
    read = [None if np.isnan(value) else value for value in answers.values]
    if answers.contract != "class":
        return read
    return [None if value is None else float(value > 0.5) for value in read]


def gain(answers: Answers, after: list[float], before: list[float]) -> Measured:
    """How much better scores rank the rows than those before, as a difference of AUCs."""
    if answers.labels is None:
        return Measured(None, NO_LABELS)
    if not np.isfinite([after, before]).all():
        return Measured(None, SOME_UNREAD)
    return _or_why(auc_gain_estimate(answers.labels, after, before))


def _or_why(found: Estimate) -> Measured:
    return Measured(found, ONE_CLASS if found.value is None else "")


def record_measures(
    session: Session, key: str, measures: Measures, *, names: tuple[str, ...] = ()
) -> None:
    """Record measures under a key, or those of the names given."""
    for name, measured in measures.items():
        if not names or name in names:
            unit = "nat" if name in NAT else ""
            session.measure(f"{key}.{name}", measured.value, unit=unit, reason=measured.reason)


def record_system(
    session: Session, key: str, answers: Answers, *, control: Answers | None = None
) -> Measures:
    """Record a system's measures and what they decide, or why there are none; return them."""
    measures = measure(answers, control)
    record_measures(session, key, measures)
    if answers.lacking:
        session.text(f"{key}.commonest_text", "not available")
    else:
        session.text(f"{key}.commonest_text", escaped(find_commonest(answers)[0]))
    session.verdict(f"{key}.constant", *decide_constant(measures, answers))
    session.verdict(f"{key}.knowing", *decide_knowing(measures))
    if control is not None:
        session.verdict(f"{key}.moves_the_base", *decide_move(measures))
        session.verdict(f"{key}.says_better", *decide_gain(measures["gain_decoded"]))
        session.verdict(f"{key}.ranks_better", *decide_gain(measures["gain_log_odds"]))
    return measures


def find_commonest(answers: Answers) -> tuple[str, int]:
    """The commonest text of answers and how often it came."""
    return Counter(p.text for p in answers.predictions).most_common(1)[0]


Decision = tuple[bool | Verdict | Knowing | None, str]


def decide_constant(measures: Measures, answers: Answers) -> Decision:
    """Whether every answer that could be read has the same value."""
    if answers.lacking:
        return "not available", answers.lacking
    distinct = measures["distinct"]
    if distinct.value is None:
        return None, distinct.reason
    return distinct.value == 1, f"{distinct.value} distinct value(s) on {len(answers)} rows"


def decide_move(measures: Measures) -> Decision:
    """Whether a system moves its base at all."""
    kl, flips = measures["kl"].estimate, measures["flips"].estimate
    if kl.value is None or flips.value is None:
        return "not available", measures["kl"].reason
    told = f"KL to the base {kl.value:.3g} nat, {flips.value:.0%} of the values differ"
    return kl.value > NO_OP, told


def decide_gain(
    found: Measured, *, against: str = "the base alone", form: str = "+z.2f"
) -> Decision:
    """Whether an AUC has risen: the interval of the difference lies above zero, or not at all."""
    change = found.estimate
    if change.low is None or change.high is None:
        return None, found.reason
    because = f"AUC against {against} {say_estimate(change, form)}"
    if change.n < THRESHOLDS.rows:
        return None, f"{because}, on {change.n} rows"
    if change.low > 0:
        return True, because
    return False if change.high <= 0 else None, because


def ranks(found: Estimate) -> bool | None:
    """Whether an AUC is above chance and of use: None where its interval leaves that open.

    On fewer rows than the least, and without an AUC, it is left open as well.
    """
    if found.low is None or found.high is None or found.n < THRESHOLDS.rows:
        return None
    if found.low > THRESHOLDS.chance and found.high >= THRESHOLDS.useful:
        return True
    # An interval that holds chance shows a lack of order only where it is narrow, and one wholly
    # below chance shows an order, in reverse.
    return False if THRESHOLDS.chance <= found.high < THRESHOLDS.useful else None


def decide_knowing(measures: Measures, *, hidden: str = "auc") -> tuple[Knowing | Verdict, str]:
    """What a model does with what it knows, from the AUC of its log-odds and of what it writes.

    The one rule for it: what it writes ranks the rows (says what it knows); it does not and the
    log-odds do (knows and does not say); neither does (does not know). Where an interval leaves
    one of these open, or there is no AUC, nobody can tell. `hidden` names the log-odds' measure.
    """
    rows = measures.get("rows")
    if rows is not None and rows.value is None:
        return "not available", rows.reason
    known, said = measures[hidden].estimate, measures["auc_decoded"].estimate
    if known.value is None or said.value is None:
        lacking = measures[hidden] if known.value is None else measures["auc_decoded"]
        return "cannot tell", lacking.reason
    told = (
        f"AUC of the log-odds {known.value:.2f} [{known.low:.2f}, {known.high:.2f}], "
        f"of the written values {said.value:.2f} [{said.low:.2f}, {said.high:.2f}]"
    )
    if said.n < THRESHOLDS.rows:
        return "cannot tell", f"{told}, on {said.n} rows"
    match ranks(known), ranks(said):
        case _, True:
            return "says what it knows", told
        case True, False:
            return "knows and does not say", told
        case False, False:
            return "does not know", f"{told}; both end below {THRESHOLDS.useful}"
        case None, False:
            return "cannot tell", f"{told}; the first leaves it open whether it knows"
    return "cannot tell", f"{told}; the second leaves it open whether it says"


def knows_and_does_not_say(measures: Measures) -> Decision:
    """Whether the log-odds of the number rank the rows although the written values do not."""
    word, because = decide_knowing(measures, hidden="auc_number")
    if word == "not available":
        return word, because
    return None if word == "cannot tell" else word == "knows and does not say", because


def reproduces_symptom(answers: Answers, attempt: Attempt) -> Decision:
    """Whether these answers are the incident's: each one a number, all the reported value."""
    if answers.lacking:
        return "not available", answers.lacking
    written = answers.strict_values
    values = {value for value in written if value is not None}
    numbers = sum(value is not None for value in written)
    parsed = sum(map(counts_as_parsed, answers.values))
    return values == {attempt.reported_value} and numbers == len(written), (
        f"{numbers} of {len(written)} answers are numbers, {len(values)} distinct, "
        f"{parsed} count as parsed"
    )


def compare_exactly(pairs: list[tuple[Answers, Answers]]) -> Decision:
    """Whether answers are equal to the last bit: texts and all log-probabilities."""
    lacking = next((one.lacking for pair in pairs for one in pair if one.lacking), "")
    if lacking:
        return "not available", lacking
    total = sum(len(control) for _, control in pairs)
    differing = sum(
        not _are_same(answers, control, row)
        for answers, control in pairs
        for row in range(len(control))
    )
    return differing == 0, (
        f"{differing} of {total} answers differ in a token or in any log-probability"
    )


def _are_same(answers: Answers, control: Answers, row: int) -> bool:
    distributions = (
        (answers.first_log_probs, control.first_log_probs),
        (answers.number_log_probs, control.number_log_probs),
    )
    same = [np.array_equal(a[row], b[row], equal_nan=True) for a, b in distributions]
    return all(same) and answers.predictions[row].token_ids == control.predictions[row].token_ids


def decide_odds(change: Estimate) -> tuple[bool | None, str]:
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


def decide_flips(flips: Estimate) -> tuple[bool | None, str]:
    """Whether the written value depends on what was altered.

    Decoding is greedy, so one changed value shows that it does; none shows that it does not only
    on as many rows as make a change rarer than the limit.
    """
    assert flips.high is not None
    because = f"{say_estimate(flips, '.1%')} of {flips.n} written values change"
    if flips.value:
        return True, because
    return False if flips.high < THRESHOLDS.flips else None, because


def decide_cost(before: Measured, change: Measured) -> tuple[bool | None, str]:
    """Whether the order of the rows is lost with what was altered.

    There is an order `before`, and its AUC falls by more than the least that is of use, or less.
    """
    ranked, fallen = before.estimate, change.estimate
    if ranked.value is None or fallen.low is None or fallen.high is None:
        return None, before.reason or change.reason
    because = (
        f"AUC of the log-odds {say_estimate(ranked)} on the rows as they are; "
        f"on the altered ones it differs by {say_estimate(fallen, '+z.2f')}"
    )
    least = THRESHOLDS.useful - THRESHOLDS.chance
    if not ranks(ranked):
        return None, because
    if fallen.high < -least:
        return True, because
    return False if fallen.low > -least else None, because


def escaped(text: str) -> str:
    """A text on one line, with control characters and line ends made visible."""
    return repr(text)[1:-1]


def shown(text: str, *, limit: int = 60) -> str:
    """A text as it may stand in a table: one line, escapes visible, cut with an ellipsis."""
    line = escaped(text) or "(nothing)"
    return line if len(line) <= limit else line[: limit - 1] + "…"
