"""A case's evidence met with the replays: what to believe, and what to run next."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

import numpy as np

from postmortem.case.schema import Case, Verdict
from postmortem.checker.errors import DiagnosisError
from postmortem.diagnosis.battery import OF_INCIDENT, TESTS, list_experiments, price_tests
from postmortem.diagnosis.beliefs import (
    HOLDS_ABOVE,
    RELIABILITY,
    SENSITIVITY,
    Evidence,
    Ledger,
    Plan,
    Posterior,
    Prior,
    expected_bits,
    is_refuted,
    plan,
)
from postmortem.diagnosis.causes import CAUSES
from postmortem.diagnosis.likelihoods import (
    ALONE,
    HEALTHY,
    NO_SEVERITY,
    Experiment,
    Group,
    Labels,
    Likelihoods,
    by_group,
    group_name,
    measure_likelihoods,
    separable_groups,
)
from postmortem.experiments.metrics import Estimate, mean_estimate, rate_estimate, say_estimate
from postmortem.experiments.records import Cell, Replay
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


FLAT, WRITE_UP = "flat", "write-up"
# What the write-up leaves to explanations that it does not list; it leaves none, and then a cause
# that it did not think of could never win.
ROOM = 0.1
# The rest of the causes, in a table of hypotheses.
UNLISTED = "none of these"
# What a diagnosis is to reach on replays that it has not seen.
ACCURACY, FALSE_ALARMS = 0.90, 0.02
# The questions in the order in which they are asked, each with the reason for its place.
NEEDED, CAUSE, WORTH = QUESTIONS = (
    "Is an adapter needed to explain this?",
    "Which cause is it?",
    "Is it worth mending?",
)
WHY = {
    NEEDED: "What the base does by itself no adapter has to explain, and what is seen with the "
    "adapter can be read only beside it.",
    CAUSE: "The files take a minute and no model, and part more causes than any other test.",
    WORTH: "A repair pays only where the mended adapter ranks better than the base. How a fault "
    "looks does not tell that, so the replays put no price on it.",
}
# The test that answers the last question, of the mended adapter.
WORTH_TEST = "order"
# What the base alone comes to where it gives the symptom by itself.
CONSTANT = "one value"

# The share of what no replay is an example of.
NOTHING = Estimate(0.0, 0.0, 0.0, n=0)
# What a test is worth for the first two questions, from nothing and with the record.
PRICED = ("needed? from nothing", "needed? now", "cause? from nothing", "cause? now")

TRUST_MEASURES = ("top1", "false_alarms", "brier", "symptom_top1", "fewest_groups")
RELIABILITY_TABLE = ("diagnosis.reliability", ("said", "mean", "right", "replays"))


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
    def needed(self) -> Labels:
        """Whether an adapter is needed: "no" where the base alone gives one value."""
        constant = self.table.probabilities[:, self.table.column(ALONE, CONSTANT)] > 0.5
        return dict(zip(self.table.hypotheses, np.where(constant, "no", "yes"), strict=True))

    @cached_property
    def questions(self) -> dict[str, Labels]:
        """The answer of each hypothesis to each question that the replays can answer."""
        return {NEEDED: self.needed, CAUSE: by_group(self.table, self.groups)}

    @cached_property
    def hypotheses(self) -> Labels:
        """The case's own hypothesis that each cause comes under."""
        names = {cause: h.id for h in self.case.hypotheses for cause in h.causes}
        return {h: names.get(h.cause, UNLISTED) for h in self.table.hypotheses}

    @cached_property
    def observed(self) -> dict[str, str]:
        """The outcomes on the incident's record, by test."""
        return {seen.test: seen.outcome for seen in self.case.observed}

    @cached_property
    def priors(self) -> dict[str, Prior]:
        """The priors by name: flat, and the write-up's last confidences made to sum to one."""
        weights: dict[str, float] = {}
        for hypothesis in self.case.hypotheses:
            known = [cause for cause in hypothesis.causes if cause in self.table.causes]
            if hypothesis.final and known:
                weights |= dict.fromkeys(known, hypothesis.final / len(known))
        others = [cause for cause in self.table.causes if cause not in weights]
        total = sum(weights.values())
        if weights and others:
            weights |= dict.fromkeys(others, total * ROOM / (1 - ROOM) / len(others))
        return {FLAT: Prior()} | ({WRITE_UP: Prior(weights)} if weights else {})

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

    def ledger(
        self,
        prior: str = FLAT,
        extra: Mapping[str, str] | None = None,
        trust: Mapping[str, float] | None = None,
    ) -> Ledger:
        """Beliefs after the evidence on record, and `extra` outcomes, seen now, beside it.

        Each report on record is trusted by its grade, with the stated values or those of `trust`.
        """
        if prior not in self.priors:
            raise DiagnosisError("the prior", expected=" or ".join(self.priors), found=repr(prior))
        shares = {grade: share for grade, (share, _) in RELIABILITY.items()} | dict(trust or {})
        seen_now = dict(extra or {})
        reliability = {
            seen.test: shares[seen.grade]
            for seen in self.case.observed
            if seen.test not in seen_now
        }
        observed = self.observed | seen_now
        return Ledger(self.table, observed, self.priors[prior], reliability)

    @cached_property
    def posteriors(self) -> dict[tuple[float, ...], Posterior]:
        """Beliefs after the evidence on record, by how far reports of each grade are trusted."""
        ways = product(*SENSITIVITY.values())
        return {
            way: self.ledger(trust=dict(zip(SENSITIVITY, way, strict=True))).posterior()
            for way in ways
        }

    def weigh(self, labels: Labels, name: str) -> "Weighing":
        """What the evidence on record makes of all that bears one label."""
        posteriors = [self.ledger().posterior(), *self.posteriors.values()]
        after, *each = (found.marginal(labels).get(name, NOTHING) for found in posteriors)
        return Weighing(Ledger(self.table).marginal(labels).get(name, 0.0), after, tuple(each))


@dataclass(frozen=True)
class Weighing:
    """A share of the belief before and after the evidence, and for each trust in its reports.

    The verdict follows from the shares, so that the two cannot contradict each other.
    """

    before: float
    after: Estimate
    each: tuple[Estimate, ...]

    @property
    def verdict(self) -> Verdict:
        """Refuted, or held, however the reports are trusted; otherwise it cannot be told."""
        if all(is_refuted(self.before, share) for share in self.each):
            return "refuted"
        held = min(share.low or 0.0 for share in self.each) > HOLDS_ABOVE
        return "holds" if held else "cannot tell"

    @property
    def span(self) -> str:
        """The smallest and the largest share, as reports are trusted more or less."""
        shares = [share.value or 0.0 for share in self.each]
        return f"{min(shares):.1%} to {max(shares):.1%}"

    @property
    def because(self) -> str:
        """The shares in words."""
        return (
            f"it has {self.before:.1%} of the belief before the evidence and "
            f"{say_estimate(self.after, '.1%')} after it; {self.span} where reports are trusted "
            "less or more"
        )


def open_inquiry(case: Case, replays: Sequence[Replay]) -> Inquiry:
    """An inquiry; `DiagnosisError` where the case names a test or cause that no replay has."""
    named = [(seen.test, set(OF_INCIDENT)) for seen in case.observed]
    named += [(cause, set(CAUSES)) for h in case.hypotheses for cause in h.causes]
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
        session.table(*RELIABILITY_TABLE, [])
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
    session.table(
        *RELIABILITY_TABLE,
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
    causes = ledger.posterior().causes
    owner = {h.cause: name for h, name in inquiry.hypotheses.items()}
    session.table(
        "diagnosis.causes",
        ("cause", "comes under", "after the evidence"),
        [
            (CAUSES[cause].title, owner[cause], say_estimate(causes[cause]))
            for cause in sorted(causes, key=lambda name: -(causes[name].value or 0.0))
        ],
    )
    for cause, probability in causes.items():
        session.measure(f"diagnosis.cause.{cause}", probability)
    _record_account(session, inquiry, ledger)
    _record_groups(session, inquiry, ledger)


def _record_account(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
    grades = {seen.test: seen.grade for seen in inquiry.case.observed}
    for grade, (share, _) in RELIABILITY.items():
        session.measure(f"diagnosis.grade.{grade}", share)
    session.table(
        "diagnosis.grades",
        ("grade", "trusted", "since it is"),
        [(grade, share, why) for grade, (share, why) in RELIABILITY.items()],
    )
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


def _record_groups(session: Session, inquiry: Inquiry, ledger: Ledger) -> None:
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


def record_hypotheses(session: Session, inquiry: Inquiry) -> None:
    """Record what each of the case's hypotheses has of the belief, and the verdict that follows."""
    rows, kept = [], inquiry.ledger(trust={"recollection": 0.0})
    for hypothesis in inquiry.case.hypotheses:
        key = f"diagnosis.hypothesis.{hypothesis.id}"
        if not (hypothesis.causes or hypothesis.base_alone):
            session.verdict(key, None, "no replay injects it, so the record cannot weigh it")
            continue
        labels, name = inquiry.hypotheses, hypothesis.id
        if hypothesis.base_alone:
            labels, name = inquiry.needed, "no"
        found = inquiry.weigh(labels, name)
        session.verdict(key, found.verdict, found.because)
        session.measure(f"{key}.share", found.after)
        # What is left where nothing is believed that was written down afterwards.
        session.measure(f"{key}.without_recollection", kept.marginal(labels).get(name, 0.0))
        rows.append((hypothesis.id, hypothesis.title, *_shares(found)))
    rest = inquiry.weigh(inquiry.hypotheses, UNLISTED)
    session.table(
        "diagnosis.hypotheses",
        ("id", "hypothesis", "before", "after", "as reports are trusted", "so the record"),
        [*rows, ("", UNLISTED, *_shares(rest))],
    )
    _record_answers(session, inquiry)
    _record_sensitivity(session, inquiry)


def _shares(found: Weighing) -> tuple[str, str, str, str]:
    after = say_estimate(found.after, ".1%")
    return f"{found.before:.1%}", after, found.span, found.verdict


def _record_answers(session: Session, inquiry: Inquiry) -> None:
    """What the record answers to the questions: whether an adapter is needed, and which cause."""
    alone = inquiry.weigh(inquiry.needed, "no")
    session.verdict("diagnosis.base_answers", alone.verdict, alone.because)
    causes, groups = inquiry.ledger().posterior(draws=1).causes, inquiry.questions[CAUSE]
    share = {cause: found.value or 0.0 for cause, found in causes.items()}
    best = max(inquiry.groups, key=lambda group: sum(share[cause] for cause in group))
    likeliest, *others = sorted(best, key=lambda cause: -share[cause])
    named = CAUSES[likeliest].title + (f", and {len(others)} like it" if others else "")
    found = inquiry.weigh(groups, group_name(best))
    session.verdict(
        "diagnosis.settled", found.verdict, f"of the leading group ({named}), {found.because}"
    )


def _record_sensitivity(session: Session, inquiry: Inquiry) -> None:
    """What would be said were reports trusted less or more."""
    before = Ledger(inquiry.table).marginal(inquiry.hypotheses)
    rows: list[tuple[Cell, ...]] = []
    for way, posterior in inquiry.posteriors.items():
        shares = posterior.marginal(inquiry.hypotheses)
        best = max(shares, key=lambda name: shares[name].value or 0.0)
        gone = [name for name, share in shares.items() if is_refuted(before[name], share)]
        alone = posterior.marginal(inquiry.needed).get("no", NOTHING)
        told = (best, say_estimate(shares[best]), say_estimate(alone), ", ".join(gone))
        rows.append((*way, *told))
    columns = ("leads", "its share", "the base alone", "refuted")
    session.table("diagnosis.sensitivity", (*SENSITIVITY, *columns), rows)


def record_first_steps(session: Session, inquiry: Inquiry) -> None:
    """Record what each test is worth for each question, and the first step for each in order."""
    nothing, now = Ledger(inquiry.table), inquiry.ledger()
    worth = {
        question: (expected_bits(nothing, labels), expected_bits(now, labels))
        for question, labels in inquiry.questions.items()
    }
    session.table(
        "diagnosis.prices",
        ("test", "what is done", "minutes", *PRICED),
        [
            (
                test.name,
                test.title,
                round(test.minutes, 1),
                *(_bits(found, test.name) for both in worth.values() for found in both),
            )
            for test in inquiry.experiments
        ],
    )
    first = {
        question: plan(now, labels).steps[:1] for question, labels in inquiry.questions.items()
    }
    tests = {question: step.experiment for question, steps in first.items() for step in steps}
    tests[WORTH] = WORTH_TEST
    rows: list[tuple[Cell, ...]] = []
    for question, name in tests.items():
        test = inquiry.table.experiment(name)
        bits = (_bits(found, name) for found in worth.get(question, ({}, {})))
        rows.append((question, test.title, round(test.minutes, 1), *bits, WHY[question]))
    session.table(
        "diagnosis.steps",
        ("question", "first step", "minutes", "bits from nothing", "bits with the record", "why"),
        rows,
    )
    following = inquiry.table.experiment(next(iter(tests.values())))
    session.text("diagnosis.next.test", following.title)
    session.measure("diagnosis.next.minutes", following.minutes, unit="min")


def _bits(found: Mapping[str, float], test: str) -> float | None:
    """Bits of a test; None where it was observed, or has no price."""
    return round(found[test], 3) if test in found else None


# Causes listed one by one, and the weight of evidence (log10) from which it is named: two to one.
SHOWN_CAUSES, WORTH_SAYING = 8, 0.3


def as_diagnosis(
    inquiry: Inquiry, *, prior: str, extra: Sequence[str], minutes: float | None
) -> str:
    """The questions with what is believed, what speaks for and against, and what to run next."""
    ledger = inquiry.ledger(prior, inquiry.parse_outcomes(extra))
    posterior, steps = ledger.posterior(), ledger.account()
    observed = ", ".join(f"{name}: {word}" for name, word in ledger.observed.items())
    alone = posterior.marginal(inquiry.needed).get("no", NOTHING)
    lines = [f"evidence  {observed or 'none'}", "", NEEDED]
    lines += [f"{_percent(alone)}  no: the base alone gives the symptom"]
    lines += [*_next_lines(plan(ledger, inquiry.needed, minutes=minutes)), "", CAUSE]
    told = sorted(posterior.causes.items(), key=lambda item: -(item[1].value or 0.0))
    for cause, found in told[:SHOWN_CAUSES]:
        lines.append(f"{_percent(found)}  {cause}: {CAUSES[cause].title}")
        lines += _speaking(cause, steps)
    rest = sum(found.value or 0.0 for _, found in told[SHOWN_CAUSES:])
    lines.append(f"{rest:6.1%}  {len(told[SHOWN_CAUSES:])} other causes")
    apart = ledger.not_told_apart()[0]
    if len(apart) > 1:
        lines.append(f"cannot be told apart by this evidence: {', '.join(apart)}")
    return "\n".join(
        [*lines, *_next_lines(plan(ledger, inquiry.questions[CAUSE], minutes=minutes))]
    )


def _percent(found: Estimate) -> str:
    return f"{found.value:6.1%} [{found.low:.0%}, {found.high:.0%}]"


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
