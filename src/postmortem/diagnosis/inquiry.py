"""A case's evidence met with the replays: what to believe, and what to run next."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from postmortem.case.schema import Case
from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.battery import OF_INCIDENT, TESTS, list_experiments, price_tests
from postmortem.diagnosis.beliefs import Evidence, Ledger, Plan, Prior, plan, price
from postmortem.diagnosis.causes import CAUSES
from postmortem.diagnosis.likelihoods import (
    HEALTHY,
    NO_SEVERITY,
    Experiment,
    Group,
    Hypothesis,
    Likelihoods,
    by_cause,
    by_group,
    group_name,
    measure_likelihoods,
    separable_groups,
)
from postmortem.experiments.metrics import Estimate, mean_estimate, rate_estimate, say_estimate
from postmortem.experiments.records import Replay
from postmortem.experiments.session import Session

# Narrow where it matters: what is said with near certainty must be right nearly always.
BIN_EDGES = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Diagnosis:
    """A replay diagnosed from others: the leading group, and how probable it is said to be.

    `brier` is the multi-class score: 0 is perfect, 2 is certain and wrong.
    """

    replay: Replay
    predicted: Group
    probability: float
    brier: float

    @property
    def right(self) -> bool:
        """Whether the leading group holds the cause."""
        return self.replay.cause in self.predicted


@dataclass(frozen=True)
class Evaluation:
    """Diagnoses of replays that were left out.

    Each part of the replays has groups of its own, `fewest_groups` at least: what is left to learn
    from tells fewer causes apart. Intervals take the replays as independent; those of one seed
    share a base, so they are somewhat too narrow.
    """

    diagnoses: tuple[Diagnosis, ...]
    fewest_groups: int

    @property
    def accuracy(self) -> Estimate:
        """The share whose leading group holds the cause."""
        return _share_right(self.diagnoses)

    @property
    def misses(self) -> tuple[Diagnosis, ...]:
        """The others."""
        return tuple(one for one in self.diagnoses if not one.right)

    @property
    def false_alarms(self) -> Estimate:
        """The share of healthy replays taken for a fault."""
        healthy = [one for one in self.diagnoses if one.replay.cause == HEALTHY]
        return rate_estimate(sum(not one.right for one in healthy), len(healthy))

    @property
    def brier(self) -> Estimate:
        """The mean score."""
        return mean_estimate([one.brier for one in self.diagnoses])

    def bins(self) -> Iterator[tuple[str, float, Estimate]]:
        """How sure a diagnosis was, its mean probability, and the share that was right."""
        for low, high in pairwise(BIN_EDGES):
            inside = [one for one in self.diagnoses if low < one.probability <= high]
            if inside:
                mean = float(np.mean([one.probability for one in inside]))
                yield f"{low:g} to {high:g}", mean, _share_right(inside)


def _share_right(diagnoses: Sequence[Diagnosis]) -> Estimate:
    return rate_estimate(sum(one.right for one in diagnoses), len(diagnoses))


def leave_out(
    replays: Sequence[Replay],
    experiments: Sequence[Experiment],
    *,
    subset: Collection[str] | None = None,
) -> Evaluation:
    """Diagnose each replay from those with another seed and another severity.

    A replay whose cause has no severity ("-") need only differ in seed, and one learnt from may
    have none. Likelihoods and groups are made anew from what may be learnt from; the prior is flat.
    All experiments that the replay ran are observed, or only those of a `subset`; groups are those
    of the whole battery all the same, so that a poorer battery is not asked an easier question.
    Raises `DiagnosisError` where a replay has no other to learn its cause from, as with one seed.
    """
    chosen = [experiment.name for experiment in experiments] if subset is None else subset
    held_out: dict[tuple[int, str], list[Replay]] = {}
    for replay in replays:
        held_out.setdefault((replay.seed, replay.severity), []).append(replay)
    diagnoses: list[Diagnosis] = []
    counts: list[int] = []
    for place, own in held_out.items():
        table = measure_likelihoods(_others(replays, *place, held_out=own), experiments)
        groups = separable_groups(table)
        counts.append(len(groups))
        diagnoses += [_diagnose(replay, table, groups, chosen) for replay in own]
    return Evaluation(tuple(diagnoses), min(counts, default=0))


def _others(
    replays: Sequence[Replay], seed: int, severity: str, *, held_out: Sequence[Replay]
) -> list[Replay]:
    """What replays of a seed and severity may be diagnosed from."""
    others = [
        replay
        for replay in replays
        if replay.seed != seed and (replay.severity != severity or replay.severity == NO_SEVERITY)
    ]
    known = {replay.cause for replay in others}
    for replay in held_out:
        if replay.cause not in known:
            raise DiagnosisError(
                f"replay {replay.key!r}",
                expected="its cause replayed with another seed and another severity",
                found=f"none beside seed {seed} and severity {severity!r}",
                remedy="Replay it with more seeds, or give a cause without degrees '-'.",
            )
    return others


def _diagnose(
    replay: Replay, table: Likelihoods, groups: Sequence[Group], tests: Collection[str]
) -> Diagnosis:
    outcomes = {name: replay.outcomes[name] for name in tests if name in replay.outcomes}
    named = Ledger(table, outcomes).marginal(by_group(table, groups))
    probabilities = np.array([named[group_name(group)] for group in groups])
    truth = np.array([replay.cause in group for group in groups])
    return Diagnosis(
        replay=replay,
        predicted=groups[int(probabilities.argmax())],
        probability=float(probabilities.max()),
        brier=float(((probabilities - truth) ** 2).sum()),
    )


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

TRUST_MEASURES = ("top1", "false_alarms", "brier", "symptom_top1", "fewest_groups")
TRUST_TABLES = {
    "misses": ("cause", "taken for", "times"),
    "reliability": ("said", "mean", "right", "replays"),
}


@dataclass(frozen=True)
class Inquiry:
    """A case's evidence met with the replays of a run."""

    case: Case
    replays: Sequence[Replay]

    @cached_property
    def experiments(self) -> tuple[Experiment, ...]:
        """The tests, with their cost."""
        return list_experiments(OF_INCIDENT, price_tests(self.case))

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
    known_tests, known_causes = set(OF_INCIDENT), set(CAUSES)
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
    whole = leave_out(inquiry.trials, inquiry.experiments)
    symptom = leave_out(inquiry.trials, inquiry.experiments, subset=[*inquiry.observed])
    alarms, unsound = whole.false_alarms, "no sound run was replayed"
    session.measure("diagnosis.top1", whole.accuracy)
    session.measure("diagnosis.false_alarms", alarms, reason=unsound)
    session.measure("diagnosis.brier", whole.brier)
    session.measure("diagnosis.fewest_groups", whole.fewest_groups, unit="groups")
    session.measure("diagnosis.symptom_top1", symptom.accuracy)
    session.verdict(
        "diagnosis.trusted",
        _exceeds(whole.accuracy, ACCURACY),
        describe_trust(whole),
    )
    many = _exceeds(alarms, FALSE_ALARMS)
    session.verdict(
        "diagnosis.alarms_few",
        None if many is None else not many,
        f"{_count_alarms(alarms)} healthy runs were taken for faulty" if alarms.n else unsound,
    )
    misses = Counter((miss.replay.cause, group_name(miss.predicted)) for miss in whole.misses)
    session.table(
        "diagnosis.misses",
        TRUST_TABLES["misses"],
        [(cause, wrong, times) for (cause, wrong), times in misses.most_common()],
    )
    session.table(
        "diagnosis.reliability",
        TRUST_TABLES["reliability"],
        [
            (certainty, round(mean, 2), say_estimate(right), right.n)
            for certainty, mean, right in whole.bins()
        ],
    )


def _exceeds(share: Estimate, limit: float) -> bool | None:
    """Whether a share is above a limit; None where its interval does not tell."""
    if share.low is None or share.high is None or share.low <= limit <= share.high:
        return None
    return share.low > limit


def _count_alarms(alarms: Estimate, between: str = " of ") -> str:
    return f"{round((alarms.value or 0.0) * alarms.n)}{between}{alarms.n}"


def describe_trust(found: Evaluation) -> str:
    """An evaluation in one line."""
    right, brier = found.accuracy, found.brier
    return (
        f"top-1 {right.value:.2f} [{right.low:.2f}, {right.high:.2f}] over {found.fewest_groups} "
        f"groups, healthy false alarms {_count_alarms(found.false_alarms, '/')}, "
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
    causes = posterior.causes
    labels = by_cause(inquiry.table)
    others = {
        name: inquiry.ledger(name).marginal(labels) for name in inquiry.priors if name != FLAT
    }
    owner = {h.cause: name for h, name in inquiry.hypotheses.items()}
    session.table(
        "diagnosis.causes",
        ("cause", "comes under", *(f"after, {name}" for name in inquiry.priors)),
        [
            (
                CAUSES[cause].title,
                owner[cause],
                say_estimate(causes[cause]),
                *(round(shares[cause], 3) for shares in others.values()),
            )
            for cause in sorted(causes, key=lambda name: -(causes[name].value or 0.0))
        ],
    )
    for cause, probability in causes.items():
        session.measure(f"diagnosis.cause.{cause}", probability)
        for name, shares in others.items():
            key = name.removeprefix("write-up, ")
            session.measure(f"diagnosis.after.{key}.{cause}", shares[cause])
    session.table(
        "diagnosis.hypotheses",
        ("hypothesis", "after, flat"),
        [
            (name, say_estimate(probability))
            for name, probability in posterior.marginal(inquiry.hypotheses).items()
        ],
    )
    _record_account(session, inquiry, ledger)
    _record_standing(session, inquiry, ledger)
    _judge_beliefs(session, inquiry, ledger)


def _record_account(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    grades = {seen.test: seen.grade for seen in inquiry.case.observed}
    steps = ledger.account()
    bits = {step.experiment: step.bits for step in steps}
    for name in OF_INCIDENT:
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
            (cause, *(_rounded(w) for w in told.values()), _rounded(sum(told.values())))
            for cause, told in weights.items()
        ],
    )


def _rounded(weight: float) -> float:
    """Two decimals, without the sign of a nought."""
    return round(weight, 2) + 0.0


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
                step.experiment,
                TESTS[step.experiment].title,
                round(step.bits, 3),
                round(step.minutes, 1),
                round(step.total_minutes, 1),
                round(step.leading, 3),
            )
            for step in found.steps
        ],
    )


# Causes listed one by one, and the weight of evidence (log10) from which it is named: two to one.
SHOWN_CAUSES, WORTH_SAYING = 8, 0.3


def as_diagnosis(
    inquiry: Inquiry, *, prior: str, extra: Sequence[str], minutes: float | None
) -> str:
    """Causes by their probability with what speaks for and against, and what to run next."""
    ledger = inquiry.ledger(prior, inquiry.parse_outcomes(extra))
    posterior, steps = ledger.posterior(), ledger.account()
    observed = ", ".join(f"{name}: {word}" for name, word in ledger.observed.items())
    lines = [f"evidence  {observed or 'none'}", ""]
    told = sorted(posterior.causes.items(), key=lambda item: -(item[1].value or 0.0))
    for cause, found in told[:SHOWN_CAUSES]:
        lines.append(
            f"{found.value:6.1%} [{found.low:.0%}, {found.high:.0%}]  {cause}: "
            f"{CAUSES[cause].title}"
        )
        lines += _speaking(cause, steps)
    rest = sum(found.value or 0.0 for _, found in told[SHOWN_CAUSES:])
    lines += [f"{rest:6.1%}  {len(told[SHOWN_CAUSES:])} other causes", ""]
    for kind, found in posterior.bases.items():
        lines.append(f"{found.value:6.1%} [{found.low:.0%}, {found.high:.0%}]  {kind} base")
    apart = ledger.not_told_apart()[0]
    if len(apart) > 1:
        lines += ["", f"cannot be told apart by this evidence: {', '.join(apart)}"]
    return "\n".join([*lines, "", *_next_lines(inquiry.next_steps(ledger, minutes=minutes))])


def _speaking(cause: str, steps: Sequence[Evidence]) -> Iterator[str]:
    """What speaks for and against a cause, the strongest first."""
    weights = {s.experiment: s.weights[cause] or 0.0 for s in steps}
    for word, sign in (("for", 1), ("against", -1)):
        found = {name: w for name, w in weights.items() if sign * w >= WORTH_SAYING}
        names = sorted(found, key=lambda name: -sign * found[name])
        if names:
            yield f"{'':14}{word} " + ", ".join(f"{name} {found[name]:+.1f}" for name in names)


def _next_lines(found: Plan) -> list[str]:
    if not found.steps:
        return ["next  nothing: no test left says more in the time there is"]
    lines = []
    for number, step in enumerate(found.steps):
        head = "next" if not number else ""
        lines.append(
            f"{head:6}{step.experiment}: {TESTS[step.experiment].title} "
            f"({step.minutes:.1f} min, {step.bits:.2f} bits)"
        )
    return lines
