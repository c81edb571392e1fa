"""What the replays make of the incident: beliefs, their sensitivity, and what to run next."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from postmortem.calibration import Evaluation, leave_out, leave_out_subsets
from postmortem.case import Case
from postmortem.causes import CAUSES
from postmortem.diagnosis import Ledger, Prior, sensitivity
from postmortem.errors import DiagnosisError
from postmortem.likelihoods import (
    NO_SEVERITY,
    Experiment,
    Group,
    Hypothesis,
    Likelihoods,
    by_group,
    group_name,
    measure_likelihoods,
    separable_groups,
)
from postmortem.metrics import Estimate, say_estimate
from postmortem.planner import Plan, plan, price
from postmortem.records import Replay
from postmortem.session import Session
from postmortem.symptom import TESTS, experiments_of

FLAT = "flat"
# What the write-up leaves to explanations that it does not list; it leaves none, and then a cause
# that it did not think of could never win.
ROOM = 0.1
# The rest of the causes, in a table of hypotheses.
UNLISTED = "none of these"
# What the first minutes should have been spent on.
TIME_BOX = 10
# What a diagnosis is to reach on replays that it has not seen.
ACCURACY, FALSE_ALARMS = 0.90, 0.02

# Names of two batteries beside those without one test.
ALL, ON_RECORD = "all of them", "those on record"
TRUST_MEASURES = ("top1", "false_alarms", "brier", "symptom_top1", "fewest_groups")
TRUST_TABLES = {
    "misses": ("cause", "taken for", "times"),
    "reliability": ("said", "mean", "right", "replays"),
    "without": ("test left out", "top-1", "low", "high"),
}


@dataclass(frozen=True)
class Inquiry:
    """A case's evidence met with the replays of a run."""

    case: Case
    replays: Sequence[Replay]

    @cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """The tests, with their cost."""
        return experiments_of(self.case)

    @cached_property
    def table(self) -> Likelihoods:
        """How often each outcome came up for each cause on each kind of base."""
        return measure_likelihoods(self.trials, self.experiments)

    @cached_property
    def trials(self) -> tuple[Replay, ...]:
        """The replays with each severity by its place in the cause's list.

        Left out together are then the first severities of all causes, the second ones, and so on.
        """
        trials, found = [], defaultdict[str, set[str]](set)
        for replay in self.replays:
            found[replay.cause].add(replay.severity)
        for replay in self.replays:
            place = str([*CAUSES[replay.cause].severities].index(replay.severity))
            alone = len(found[replay.cause]) == 1
            trials.append(replay.model_copy(update={"severity": NO_SEVERITY if alone else place}))
        return tuple(trials)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Causes that the whole battery of tests tells apart."""
        return separable_groups(self.table)

    @cached_property
    def answers(self) -> dict[Hypothesis, str]:
        """What one wants to know: the group of the cause, and the kind of base."""
        return by_group(self.table, self.groups, with_base=True)

    @cached_property
    def observed(self) -> dict[str, str]:
        """The outcomes on the incident's record, by test."""
        return {seen.test: seen.outcome for seen in self.case.observed}

    @cached_property
    def priors(self) -> dict[str, Prior]:
        """The priors by name: flat, and the write-up's confidences made to sum to one."""
        found = {FLAT: Prior()}
        for name in ("initial", "final"):
            weights = self._write_up(name)
            if weights:
                found[f"write-up, {name}"] = Prior(weights)
        return found

    def _write_up(self, name: str) -> dict[str, float]:
        """A cause's share of its hypothesis' confidence; the causes without one share `ROOM`."""
        weights: dict[str, float] = {}
        for hypothesis in self.case.hypotheses:
            confidence = getattr(hypothesis, name)
            known = [cause for cause in hypothesis.causes if cause in self.table.causes]
            if confidence and known:
                weights |= dict.fromkeys(known, confidence / len(known))
        others = [cause for cause in self.table.causes if cause not in weights]
        total = sum(weights.values())
        if weights and others:
            weights |= dict.fromkeys(others, total * ROOM / (1 - ROOM) / len(others))
        return weights

    def parse_outcomes(self, pairs: Sequence[str]) -> dict[str, str]:
        """Outcomes given as TEST=OUTCOME; `DiagnosisError` for one that is not."""
        found = {}
        for pair in pairs:
            name, sign, outcome = pair.partition("=")
            if not sign:
                raise DiagnosisError(
                    "an observed outcome", expected="TEST=OUTCOME", found=repr(pair)
                )
            self.table.column(name.strip(), outcome.strip())
            found[name.strip()] = outcome.strip()
        return found

    def ledger(self, prior: str = FLAT, extra: Mapping[str, str] | None = None) -> Ledger:
        """Beliefs after the evidence on record, and `extra` outcomes beside it."""
        name = prior if prior in self.priors else f"write-up, {prior}"
        if name not in self.priors:
            raise DiagnosisError("the prior", expected=" or ".join(self.priors), found=repr(prior))
        return Ledger(self.table, {**self.observed, **(extra or {})}, self.priors[name])

    @cached_property
    def hypotheses(self) -> dict[Hypothesis, str]:
        """The case's own hypothesis that each cause comes under."""
        names = {cause: h.id for h in self.case.hypotheses for cause in h.causes}
        return {h: names.get(h.cause, UNLISTED) for h in self.table.hypotheses}

    def next_steps(self, ledger: Ledger, *, minutes: float | None = None) -> Plan:
        """What to run next, among the tests not observed yet."""
        return plan(ledger, self.answers, minutes=minutes)


def open_inquiry(case: Case, replays: Sequence[Replay]) -> Inquiry:
    """An inquiry; `DiagnosisError` where the case names a test or cause that no replay has."""
    known_tests, known_causes = set(TESTS), set(CAUSES)
    named = [(seen.test, known_tests) for seen in case.observed]
    named += [(name, known_tests) for name in case.path]
    named += [(cause, known_causes) for h in case.hypotheses for cause in h.causes]
    for name, known in named:
        if name not in known:
            raise DiagnosisError(
                f"case {case.name}", expected=f"one of {', '.join(sorted(known))}", found=repr(name)
            )
    return Inquiry(case, replays)


def record_trust(session: Session, inquiry: Inquiry) -> None:
    """Record how well replays are diagnosed from others: what the diagnosis may be trusted with."""
    session.measure("diagnosis.limit.accuracy", ACCURACY)
    session.measure("diagnosis.limit.false_alarms", FALSE_ALARMS)
    if len({replay.seed for replay in inquiry.replays}) < 2:
        reason = "one seed of replays alone: nothing to learn from when it is left out"
        for name in TRUST_MEASURES:
            session.measure(f"diagnosis.{name}", None, reason=reason)
        for name in ("trusted", "alarms_few"):
            session.verdict(f"diagnosis.{name}", "not available", reason)
        for name, columns in TRUST_TABLES.items():
            session.table(f"diagnosis.{name}", columns, [])
        return
    names = [test.name for test in inquiry.experiments]
    without = {name: [other for other in names if other != name] for name in names}
    each = leave_out_subsets(
        *(inquiry.trials, inquiry.experiments),
        subsets={ALL: names, ON_RECORD: [*inquiry.observed], **without},
    )
    found, symptom = each[ALL], each[ON_RECORD]
    session.measure("diagnosis.top1", found.accuracy)
    unsound = "no sound run was replayed"
    session.measure("diagnosis.false_alarms", found.false_alarms, reason=unsound)
    session.measure("diagnosis.brier", found.brier)
    session.measure("diagnosis.fewest_groups", found.fewest_groups, unit="groups")
    session.measure("diagnosis.symptom_top1", symptom.accuracy)
    told = found.accuracy
    assert told.low is not None
    assert told.high is not None
    trusted = True if told.low >= ACCURACY else False if told.high < ACCURACY else None
    session.verdict("diagnosis.trusted", trusted, describe_trust(found))
    alarms = found.false_alarms
    few = None if alarms.low is None or alarms.high is None else alarms.high <= FALSE_ALARMS
    if few is False and (alarms.low or 0.0) <= FALSE_ALARMS:
        few = None  # too few healthy runs to tell
    told_alarms = f"{found.false_alarm_count} of {alarms.n} healthy runs were taken for faulty"
    session.verdict("diagnosis.alarms_few", few, told_alarms if alarms.n else unsound)
    misses = Counter((miss.cause, miss.predicted) for miss in found.misses)
    rows = [(cause, wrong, times) for (cause, wrong), times in misses.most_common()]
    session.table("diagnosis.misses", TRUST_TABLES["misses"], rows)
    bins = [
        (
            f"{b.low:g} to {b.high:g}",
            None if b.predicted is None else round(b.predicted, 2),
            say_estimate(b.right),
            b.right.n,
        )
        for b in found.bins
        if b.right.n
    ]
    session.table("diagnosis.reliability", TRUST_TABLES["reliability"], bins)
    session.table(
        "diagnosis.without",
        TRUST_TABLES["without"],
        [(name, *_numbers(each[name].accuracy)) for name in names],
    )


def describe_trust(found: Evaluation) -> str:
    """An evaluation in one line."""
    right, alarms, brier = found.accuracy, found.false_alarms, found.brier
    return (
        f"top-1 {right.value:.2f} [{right.low:.2f}, {right.high:.2f}] over {found.fewest_groups} "
        f"groups, healthy false alarms {found.false_alarm_count}/{alarms.n}, "
        f"brier {brier.value:.2f}"
    )


def evaluate_replays(case: Case, replays: Sequence[Replay]) -> Evaluation:
    """Diagnose each replay from those of other worlds and of other severities."""
    inquiry = open_inquiry(case, replays)
    return leave_out(inquiry.trials, inquiry.experiments)


def record_beliefs(session: Session, inquiry: Inquiry) -> None:
    """Record what the evidence on record makes of each cause, and what it cannot tell apart."""
    ledger = inquiry.ledger()
    posterior = ledger.posterior()
    causes, spans = posterior.causes, sensitivity(ledger, inquiry.priors)
    owner = {h.cause: name for h, name in inquiry.hypotheses.items()}
    session.table(
        "diagnosis.causes",
        ("cause", "comes under", *(f"after, {name}" for name in inquiry.priors)),
        [
            (
                *(CAUSES[cause].title, owner[cause], say_estimate(causes[cause])),
                *(round(share, 3) for share in [*spans[cause].by_prior.values()][1:]),
            )
            for cause in sorted(causes, key=lambda name: -(causes[name].value or 0.0))
        ],
    )
    for cause, told in causes.items():
        session.measure(f"diagnosis.cause.{cause}", told)
        for name, share in spans[cause].by_prior.items():
            if name != FLAT:
                key = name.removeprefix("write-up, ")
                session.measure(f"diagnosis.after.{key}.{cause}", share)
    session.table(
        "diagnosis.hypotheses",
        ("hypothesis", "after, flat"),
        [(n, say_estimate(told)) for n, told in posterior.marginal(inquiry.hypotheses).items()],
    )
    _record_account(session, inquiry, ledger)
    _record_standing(session, inquiry, ledger)
    _judge_beliefs(session, inquiry, ledger)


def _record_account(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    grades = {seen.test: seen.grade for seen in inquiry.case.observed}
    steps = ledger.account()
    bits = {step.experiment: step.bits for step in steps}
    for name in TESTS:
        reason = "no outcome of this test is on the incident's record"
        session.measure(f"diagnosis.bits.{name}", bits.get(name), unit="bits", reason=reason)
    session.table(
        "diagnosis.account",
        ("test", "what was done", "outcome", "grade", "bits"),
        [
            (
                e.experiment,
                TESTS[e.experiment].title,
                e.outcome,
                grades[e.experiment],
                round(e.bits, 3),
            )
            for e in steps
        ],
    )
    weights = {
        cause: {e.experiment: e.weights[cause] or 0.0 for e in steps}
        for cause in CAUSES
        if cause in inquiry.table.causes
    }
    session.table(
        "diagnosis.weights",
        ("cause", *(e.experiment for e in steps), "together"),
        [
            (cause, *(round(w, 2) for w in told.values()), round(sum(told.values()), 2))
            for cause, told in weights.items()
        ],
    )


def _record_standing(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    session.table(
        "diagnosis.standing",
        ("cause", "best on", "inconsistent", "with", "log10 likelihood"),
        [
            (
                s.cause,
                s.base,
                len(s.inconsistent),
                ", ".join(s.inconsistent) or "nothing",
                round(s.log10_likelihood, 2),
            )
            for s in ledger.least_disconfirmed()
        ],
    )
    apart = ledger.not_told_apart()
    session.table(
        "diagnosis.apart", ("not told apart by the record",), [(group_name(g),) for g in apart]
    )
    session.table(
        "diagnosis.groups",
        ("told apart by all tests", "causes"),
        [(group_name(group), len(group)) for group in inquiry.groups],
    )
    session.measure("diagnosis.groups", len(inquiry.groups), unit="groups")
    session.measure("diagnosis.apart", len(apart), unit="groups")


def _judge_beliefs(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    marginal = ledger.posterior().marginal(by_group(inquiry.table, inquiry.groups))
    best, told = max(marginal.items(), key=lambda item: item[1].value or 0.0)
    session.verdict(
        "diagnosis.settled",
        True if (told.low or 0.0) > ACCURACY else None,
        f"the leading group ({best}) has {told.value:.0%} [{told.low:.0%}, {told.high:.0%}]",
    )
    silent = ledger.posterior().bases.get("silent")
    if silent is None:
        session.verdict("diagnosis.base_answers", "not available", "no silent base was replayed")
    else:
        held = True if (silent.low or 0.0) > 0.5 else False if (silent.high or 0.0) < 0.5 else None
        session.verdict(
            "diagnosis.base_answers",
            held,
            f"a base that writes the value by itself has {silent.value:.0%} "
            f"[{silent.low:.0%}, {silent.high:.0%}] after the evidence, from 50% before",
        )


def record_next_steps(session: Session, inquiry: Inquiry) -> None:
    """Record what to run next, what the author's path was worth, and what ten minutes could be."""
    fresh = Ledger(inquiry.table)
    _record_plan(session, "next", inquiry.next_steps(inquiry.ledger()))
    _record_plan(session, "first", inquiry.next_steps(fresh, minutes=TIME_BOX))
    path = [name for name in inquiry.case.path if name in inquiry.table.blocks]
    _record_plan(session, "path", price(fresh, path, labels=inquiry.answers))
    session.measure("diagnosis.time_box", TIME_BOX, unit="min")


def _record_plan(session: Session, name: str, found: Plan) -> None:
    key = f"diagnosis.{name}"
    session.measure(f"{key}.bits", found.bits, unit="bits")
    session.measure(f"{key}.minutes", found.minutes, unit="min")
    first = found.steps[0].experiment if found.steps else ""
    session.text(f"{key}.test", TESTS[first].title if first else "nothing: no test left says more")
    session.table(
        f"{key}.steps",
        ("test", "what is done", "bits", "minutes", "in all", "leading answer right"),
        [
            (
                *(s.experiment, TESTS[s.experiment].title, round(s.bits, 3)),
                *(round(s.minutes, 1), round(s.total_minutes, 1), round(s.leading, 3)),
            )
            for s in found.steps
        ],
    )


def _numbers(told: Estimate) -> tuple[float | None, float | None, float | None]:
    return _rounded(told.value), _rounded(told.low), _rounded(told.high)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
