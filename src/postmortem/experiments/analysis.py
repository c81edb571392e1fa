"""What the answers of one system say, and what follows from two of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import log_softmax

from postmortem.case.prompts import counts_as_parsed
from postmortem.case.schema import AdapterFilter, Attempt, Knowing, Verdict
from postmortem.experiments.health import THRESHOLDS, Health, describe
from postmortem.experiments.metrics import (
    Estimate,
    auc_estimate,
    kl_divergence,
    mean_estimate,
    rate_estimate,
)
from postmortem.experiments.records import Cell, Prediction, RecordFile
from postmortem.experiments.session import Answers, Session

STAGES = ("float", "pattern", "keyword", "default")
# Where the write-up's parser found a number; the other stages make one up.
NUMBER_STAGES = ("float", "pattern")
NO_LABELS = "the rows came without labels"
ONE_CLASS = "the labels hold one class alone"
# Below this KL in nats two first-token distributions are the same up to rounding.
NO_OP = 1e-6
# The rows shown one by one: as many as the incident had.
SHOWN = 10


@dataclass(frozen=True)
class SystemSummary:
    """A system's numbers on one prompt; None where the rows have no labels or no reference.

    `kl` is KL(system || base) of the answer in nats: over the eleven numbers where a number was
    asked for, over the first token elsewhere. `shift` is the mean change of the log-odds of what
    is asked for, `flips` the share of rows whose written value differs from the base's. `unranked`
    says why there is no AUC, where there is none.
    """

    health: Health
    commonest_text: str
    parsed_as_written: Estimate
    parsed_strict: Estimate
    auc_decoded: Estimate
    auc_number: Estimate
    auc_yes_no: Estimate
    kl: Estimate
    shift: Estimate
    flips: Estimate
    unranked: str


DISTRIBUTION = (
    *("distinct", "top_value", "top_share", "tied_pairs", "entropy", "boundary_share"),
    *("mean", "std", "minimum", "maximum"),
)
PARSED = ("parsed_as_written", "parsed_strict")
RANKING = ("auc_decoded", "auc_number", "auc_yes_no")
EFFECT = ("kl", "shift", "flips")


def summarise(answers: Answers, base: Answers | None = None) -> SystemSummary:
    """Describe a system's answers; `base` is the control on the same rows."""
    strict = [value for value in answers.strict_values if value is not None]
    total = len(answers.predictions)
    unmoved = dict.fromkeys(EFFECT, Estimate(None, None, None, 0))
    return SystemSummary(
        health=replace(
            describe(answers.values, groups=answers.groups, labels=answers.labels),
            parsed_share=sum(p.stage in NUMBER_STAGES for p in answers.predictions) / total,
        ),
        commonest_text=Counter(p.text for p in answers.predictions).most_common(1)[0][0],
        parsed_as_written=rate_estimate(sum(map(counts_as_parsed, answers.values)), total),
        parsed_strict=rate_estimate(len(strict), total),
        unranked=NO_LABELS if answers.labels is None else ONE_CLASS,
        **measure_ranking(answers),
        **(unmoved if base is None else measure_effect(answers, base)),
    )


def measure_ranking(answers: Answers) -> dict[str, Estimate]:
    """AUC of each read-out by the names in `RANKING`, without values where there are no labels."""
    labels = answers.labels
    scores = (answers.values, answers.number_log_odds, answers.yes_no_log_odds)
    unknown = Estimate(None, None, None, 0)
    return {
        name: unknown if labels is None else auc_estimate(labels, found)
        for name, found in zip(RANKING, scores, strict=True)
    }


def measure_effect(answers: Answers, base: Answers) -> dict[str, Estimate]:
    """How far answers lie from the base's on the same rows, by the names in `EFFECT`."""
    kl = kl_divergence(_answer_log_probs(answers), _answer_log_probs(base))
    changed = sum(a != b for a, b in zip(answers.values, base.values, strict=True))
    return {
        "kl": mean_estimate(kl),
        "shift": mean_estimate(np.subtract(answers.asked_log_odds, base.asked_log_odds)),
        "flips": rate_estimate(changed, len(base.values)),
    }


def _answer_log_probs(answers: Answers) -> np.ndarray:
    """The log-distribution that the prompt's contract is about, normalised, a row a post."""
    if answers.contract == "yes_no":
        return answers.first_log_probs
    return log_softmax(answers.number_log_probs, axis=1)


def record_summary(
    session: Session, key: str, *, summary: SystemSummary | None, reason: str = ""
) -> None:
    """Record a system's own measures under `key`; without a summary, each with the reason."""
    for name in DISTRIBUTION:
        value = None if summary is None else getattr(summary.health, name)
        session.measure(f"{key}.{name}", value, reason=reason)
    for name in PARSED:
        value = None if summary is None else getattr(summary, name)
        session.measure(f"{key}.{name}", value, reason=reason)
    text = "not available" if summary is None else escaped(summary.commonest_text)
    session.text(f"{key}.commonest_text", text)
    for name in RANKING:
        estimate = None if summary is None else getattr(summary, name)
        unranked = NO_LABELS if summary is None else summary.unranked
        session.measure(f"{key}.{name}", estimate, reason=reason or unranked)


def record_effect(
    session: Session, key: str, *, summary: SystemSummary | None, reason: str = ""
) -> None:
    """Record how far a system moves the base; without a summary, each with the reason."""
    for name in EFFECT:
        value = None if summary is None else getattr(summary, name)
        unit = "" if name == "flips" else "nat"
        session.measure(f"{key}.{name}", value, unit=unit, reason=reason)


def record_attempt(session: Session, name: str, *, answers: Answers) -> SystemSummary:
    """Record everything that a page says of one attempt, under keys that begin with `name`."""
    attempt = session.case.attempts[name]
    summary = summarise(answers)
    record_summary(session, name, summary=summary)
    predictions = answers.predictions
    total = len(predictions)
    _record_posts(session, name)
    counts = Counter(prediction.stage for prediction in predictions)
    for stage in STAGES:
        session.measure(f"{name}.stage.{stage}", rate_estimate(counts[stage], total))
    lengths = [prediction.full_prompt_tokens for prediction in predictions]
    session.measure(f"{name}.rows", total)
    session.measure(f"{name}.prompt_tokens_least", min(lengths), unit="tokens")
    session.measure(f"{name}.prompt_tokens_most", max(lengths), unit="tokens")
    cut = sum(p.full_prompt_tokens > p.prompt_tokens for p in predictions)
    session.measure(f"{name}.cut", cut, unit="rows")
    _judge_inputs(session, name, answers=answers, cut=cut)
    _judge_keeping(session, name, answers=answers)
    tokens = float(np.mean([len(prediction.token_ids) for prediction in predictions]))
    session.measure(f"{name}.answer_tokens", tokens, unit="tokens")
    session.measure(f"{name}.distinct_texts", len({p.text for p in predictions}))
    session.text(f"{name}.system", answers.system.replace("_", " "))
    commonest = sum(p.text == summary.commonest_text for p in predictions)
    session.measure(f"{name}.commonest_text_share", rate_estimate(commonest, total))
    _record_tables(session, name, answers=answers, health=summary.health)
    _judge_attempt(session, name, attempt=attempt, summary=summary)
    return summary


def _record_posts(session: Session, name: str) -> None:
    rows, text = session.rows, session.case.columns.text
    posts = [
        (rows.ids[i], shown(rows.groups[i], limit=40), shown(rows.row(i)[text], limit=160))
        for i in range(min(SHOWN, len(rows)))
    ]
    session.table(f"{name}.posts", ("row", "rule", "post"), posts)


def _record_tables(session: Session, name: str, *, answers: Answers, health: Health) -> None:
    rows = [
        (
            p.row_id,
            "unknown" if p.label is None else p.label,
            shown(p.text),
            p.value,
            p.stage,
            "no number" if p.strict_value is None else p.strict_value,
            round(log_odds, 2),
        )
        for p, log_odds in [*zip(answers.predictions, answers.number_log_odds, strict=True)][:SHOWN]
    ]
    columns = ("row", "truth", "text", "as written", "stage", "strict", "log-odds")
    session.table(f"{name}.first_rows", columns, rows)
    groups = [
        (shown(group), answers.groups.count(group), round(std, 3), _rounded(health, group))
        for group, std in health.group_std.items()
    ]
    spread = ("rule", "rows", "standard deviation", "AUC, written")
    session.table(f"{name}.groups", spread, groups)
    checks = [
        (
            check.name,
            "unknown" if check.found is None else round(check.found, 3),
            check.limit,
            {True: "passed", False: "failed", None: "no labels"}[check.passed],
        )
        for check in health.checks()
    ]
    session.table(f"{name}.checks", ("check", "found", "limit", "result"), checks)


def _rounded(health: Health, group: str) -> Cell:
    value = health.group_auc.get(group)
    return "unknown" if value is None else round(value, 3)


def escaped(text: str) -> str:
    """A text on one line, with control characters and line ends made visible."""
    return repr(text)[1:-1]


def shown(text: str, *, limit: int = 60) -> str:
    """A text as it may stand in a table: one line, escapes visible, cut with an ellipsis."""
    line = escaped(text) or "(nothing)"
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _judge_attempt(
    session: Session, name: str, *, attempt: Attempt, summary: SystemSummary
) -> None:
    health, counted = summary.health, summary.parsed_as_written.value or 0.0
    reported = attempt.reported_value
    session.verdict(
        f"{name}.constant",
        health.constant,
        f"{health.distinct} distinct value(s) on {health.n} rows",
    )
    session.verdict(
        f"{name}.reported_value",
        health.constant and health.top_value == reported,
        f"the commonest value is {health.top_value}, on {health.top_share:.0%} of the rows; "
        f"{reported:.1f} on every row was reported",
    )
    told = attempt.reported_parse_rate
    session.verdict(
        f"{name}.reported_parse_rate",
        abs(counted - told) < 0.005,
        f"{counted:.0%} of the rows count as parsed; {told:.0%} was reported",
    )
    failed = [check.name for check in health.checks() if check.passed is False]
    flagged = f"{len(failed)} check(s) failed on {health.distinct} distinct value(s)"
    session.verdict(f"{name}.flagged", bool(failed) if health.constant else None, flagged)
    session.verdict(
        f"{name}.healthy",
        not failed,
        f"failed: {', '.join(failed)}" if failed else "every check passed",
    )
    session.verdict(f"{name}.knows", *knows_and_does_not_say(summary))


def _judge_inputs(session: Session, name: str, *, answers: Answers, cut: int) -> None:
    total = len(answers.predictions)
    plain = sum(value is not None for value in answers.strict_values)
    session.verdict(f"{name}.uncut", cut == 0, f"{cut} of {total} prompts were cut")
    session.verdict(
        f"{name}.plain_numbers", plain == total, f"{plain} of {total} answers are plain numbers"
    )


def _judge_keeping(session: Session, name: str, *, answers: Answers) -> None:
    total = len(answers.predictions)
    kept = sum(bool(p.text or p.token_ids) for p in answers.predictions)
    session.verdict(
        f"{name}.answers_kept",
        kept == total,
        f"text, token ids and log-odds of {kept} of {total} answers are on record",
    )


def knows_and_does_not_say(summary: SystemSummary) -> tuple[bool | None, str]:
    """Whether the log-odds of the number rank the rows although the written values do not."""
    word, because = judge_knowing(
        summary.auc_number, said=summary.auc_decoded, unranked=summary.unranked
    )
    return None if word == "cannot tell" else word == "knows and does not say", because


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


def judge_knowing(
    hidden: Estimate, *, said: Estimate, unranked: str
) -> tuple[Knowing | Verdict, str]:
    """What a model does with what it knows, from the AUC of its log-odds and of what it writes.

    The one rule for it: what it writes ranks the rows (says what it knows); it does not and the
    log-odds do (knows and does not say); neither does (does not know). Where an interval leaves
    one of these open, or there is no AUC, for the reason `unranked`, nobody can tell.
    """
    if hidden.value is None or said.value is None:
        return "cannot tell", unranked
    told = (
        f"AUC of the log-odds {hidden.value:.2f} [{hidden.low:.2f}, {hidden.high:.2f}], "
        f"of the written values {said.value:.2f} [{said.low:.2f}, {said.high:.2f}]"
    )
    if said.n < THRESHOLDS.rows:
        return "cannot tell", f"{told}, on {said.n} rows"
    match ranks(hidden), ranks(said):
        case _, True:
            return "says what it knows", told
        case True, False:
            return "knows and does not say", told
        case False, False:
            return "does not know", f"{told}; both end below {THRESHOLDS.useful}"
        case None, False:
            return "cannot tell", f"{told}; the first leaves it open whether it knows"
    return "cannot tell", f"{told}; the second leaves it open whether it says"


def reproduces_symptom(answers: Answers, attempt: Attempt) -> tuple[bool, str]:
    """Whether these answers are the incident's: each one a number, all the reported value."""
    written = [prediction.strict_value for prediction in answers.predictions]
    values = {value for value in written if value is not None}
    numbers = sum(value is not None for value in written)
    held = values == {attempt.reported_value} and numbers == len(written)
    parsed = sum(map(counts_as_parsed, answers.values))
    return held, (
        f"{numbers} of {len(written)} answers are numbers, {len(values)} distinct, "
        f"{parsed} count as parsed"
    )


def record_swap(session: Session, answers: dict[str, Answers | None], *, prompt: str) -> None:
    """Record each system's measures on one prompt; None marks a role that is not available."""
    base = answers["base"]
    assert base is not None
    for system, found in answers.items():
        key, reason = f"swap.{system}.{prompt}", session.world.members[system].reason
        summary = None if found is None else summarise(found, base)
        record_summary(session, key, summary=summary, reason=reason)
        if system != "base":
            record_effect(session, key, summary=summary, reason=reason)
    shown_rows = [
        (
            p.row_id,
            "unknown" if p.label is None else p.label,
            *(
                "–" if found is None else shown(found.predictions[i].text, limit=24)
                for found in answers.values()
            ),
        )
        for i, p in enumerate(base.predictions[:SHOWN])
    ]
    names = [system.replace("_", "-") for system in answers]
    session.table(f"swap.{prompt}.first_rows", ("row", "truth", *names), shown_rows)


def judge_swap(session: Session, answers: dict[str, Answers | None], *, attempt: str) -> None:
    """Decide what the swap can decide: the control, and the write-up's cases A and B."""
    asked = session.case.attempts[attempt]
    base = answers["base"]
    for system, found in answers.items():
        if found is None:
            reason = session.world.members[system].reason
            for statement in ("reproduces", "knows", "moves_the_base"):
                session.verdict(f"swap.{system}.{statement}", "not available", reason)
            continue
        session.verdict(f"swap.{system}.reproduces", *reproduces_symptom(found, asked))
        summary = summarise(found, base)
        session.verdict(f"swap.{system}.knows", *knows_and_does_not_say(summary))
        if system != "base":
            judge_move(session, f"swap.{system}", summary=summary)
    _judge_control(session, answers)
    _judge_cases(session, answers["reference"], suspect=answers["suspect"], attempt=asked)


def _judge_control(session: Session, answers: dict[str, Answers | None]) -> None:
    base = answers["base"]
    assert base is not None
    rows = [p.row_id for p in base.predictions]
    others = [found for name, found in answers.items() if found is not None and name != "base"]
    same = sum([p.row_id for p in found.predictions] == rows for found in others)
    session.verdict(
        "swap.control_run",
        same == len(others),
        f"the base alone answered {len(rows)} rows, and {same} of {len(others)} other systems "
        f"the same ones",
    )


def _judge_cases(
    session: Session, reference: Answers | None, *, suspect: Answers | None, attempt: Attempt
) -> None:
    if reference is None:
        reason = session.world.members["reference"].reason
        for statement in ("case_a", "case_b", "case_a_means_mismatch"):
            session.verdict(f"swap.{statement}", "not available", reason)
        return
    summary = summarise(reference)
    health, ranked = summary.health, summary.auc_decoded
    # Values that do not vary cannot rank; whether those that vary do takes labels.
    works = ranks(ranked) if health.distinct > 1 else False
    varied = f"{health.distinct} distinct values, standard deviation {health.std:.2f}"
    told = summary.unranked if ranked.value is None else f"AUC {ranked.value:.2f}"
    session.verdict("swap.case_a", works, f"{varied}, {told}")
    zeros = health.constant and health.top_value == attempt.reported_value
    session.verdict("swap.case_b", zeros, varied)
    if suspect is None:
        reason = session.world.members["suspect"].reason
        session.verdict("swap.case_a_means_mismatch", "not available", reason)
        return
    # The suspect of this world loads onto the base without a mismatch: if it fails beside a
    # reference that works, case A has come about without the cause it was to confirm.
    fails = reproduces_symptom(suspect, attempt)[0]
    words = {True: "works", False: "does not work", None: "cannot be judged"}
    session.verdict(
        "swap.case_a_means_mismatch",
        False if works and fails else None,
        f"the suspect of this world has the base's shapes and "
        f"{'fails' if fails else 'does not fail'}; the reference {words[works]}",
    )


def record_change(session: Session, answers: Answers, *, earlier: RecordFile) -> None:
    """Record the second attempt beside the first, row by row."""
    before = {p.row_id: p for p in earlier.of(Prediction)}
    pairs = [(before[p.row_id], p) for p in answers.predictions]
    changed = sum(first.value != second.value for first, second in pairs)
    session.measure("v2.changed_from_v1", rate_estimate(changed, len(pairs)))
    rows = [
        (
            second.row_id,
            "unknown" if second.label is None else second.label,
            shown(first.text, limit=40),
            first.value,
            shown(second.text, limit=40),
            second.value,
        )
        for first, second in pairs[:SHOWN]
    ]
    columns = ("row", "truth", "v1 text", "v1 value", "v2 text", "v2 value")
    session.table("v2.beside_v1", columns, rows)


def judge_move(session: Session, key: str, *, summary: SystemSummary) -> None:
    """Decide whether a system moves its base at all."""
    kl, flips = summary.kl, summary.flips
    session.verdict(
        f"{key}.moves_the_base",
        (kl.value or 0.0) > NO_OP,
        f"KL to the base {kl.value:.3g} nat, {flips.value:.0%} of the written values differ",
    )


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
