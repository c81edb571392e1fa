"""The diagnosis of a case of one's own, in the time there is, and how it is told."""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from postmortem.case.rows import choose_rows
from postmortem.case.schema import Case
from postmortem.checker.errors import CaseError, DiagnosisError, Finding, find_entry
from postmortem.diagnosis.battery import FIRST, OF_ADAPTER, SAVED, TESTS, list_experiments
from postmortem.diagnosis.beliefs import DRAWS, Ledger, plan
from postmortem.diagnosis.causes import Run
from postmortem.diagnosis.likelihoods import (
    FAMILIES,
    HEALTHY,
    SERVING,
    Hypothesis,
    by_cause,
    meanings,
    measure_profiles,
    memberships,
    read_profiles,
)
from postmortem.diagnosis.subject import Subject, run_test, spread, why_not
from postmortem.experiments.measure import escaped, shown
from postmortem.experiments.metrics import THRESHOLDS, Estimate, auc_estimate
from postmortem.experiments.records import Replay
from postmortem.experiments.session import Session
from postmortem.models.model_set import resolve_world

# What is run whatever comes of it: the files, and the adapter against its base.
CONTROLS = ("inspect", "load", "base-alone", "base-ranks", "answers", "effect", "off", "order")
# Rows beyond these make no coarse word truer; on fewer no order is seen.
MOST_ROWS, LEAST_ROWS = 64, 16
# The share of the time left that all experiments together may plan for.
PLANNED = 0.8
# An estimate of time is exceeded by less than this factor nearly always.
MARGIN = 1.3
# What a family of causes must have to be named, and a cause for nothing more to be run.
NAMED, SETTLED = 0.9, 0.99
# Half a power of ten, as in `diagnosis`: less is barely worth mentioning.
WORTH_SAYING = 0.3
SOUND = "sound"
TINY = np.finfo(float).tiny
# What a classifier tells nothing by: its answers have their form always, and its head, trained with
# the adapter, has an effect of its own.
UNTOLD = ("base-alone", "answers", "effect")
# A seed of a replay holds its world in the hundreds.
WORLD = 100
Word = Literal["named", "works here", "cannot tell"]


@dataclass(frozen=True)
class TestRun:
    """One experiment as it was run, or as its outcome was `told`; seconds that it took."""

    exam: str
    outcome: str
    measured: str
    seconds: float
    told: bool = False


@dataclass(frozen=True)
class Weight:
    """How far an outcome speaks for a cause (above 0) or against it: log10 likelihood ratio."""

    exam: str
    outcome: str
    log10: float


@dataclass(frozen=True)
class Ahead:
    """An experiment that was not run: expected bits about the cause, minutes, and why it was not.

    `parts` are the likeliest cause and the one that it best tells from that.
    """

    exam: str
    bits: float
    minutes: float
    why: str
    parts: tuple[str, str]


@dataclass(frozen=True)
class Conclusion:
    """What the examination comes to.

    `family` is the leading kind of fault with its probability, `causes` the likeliest of its
    causes, the fewest that hold nearly all of that; intervals are due to the number of replays.
    A `finding` is an error of the checker's that names the cause by itself; one that no replay
    shows comes alone. `warnings` are other findings that no replay shows, and that decide nothing
    here. `written` is the AUC of what is written with the adapter.
    """

    word: Word
    family: str = ""
    share: Estimate | None = None
    causes: tuple[tuple[str, Estimate], ...] = ()
    families: tuple[tuple[str, Estimate], ...] = ()
    ranking: tuple[tuple[str, Estimate], ...] = ()
    weights: tuple[Weight, ...] = ()
    ahead: tuple[Ahead, ...] = ()
    finding: Finding | None = None
    warnings: tuple[Finding, ...] = ()
    written: Estimate | None = None


@dataclass
class Examination:
    """An examination under way: what was seen, and what time there is.

    `replays` say what causes look like; `told` holds outcomes that the user gives, which are not
    run again. `report` is given a line for each step.
    """

    subject: Subject
    replays: Sequence[Replay]
    minutes: float
    told: Mapping[str, str] = field(default_factory=dict)
    report: Callable[[str], None] = lambda line: None
    steps: list[TestRun] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    is_paced: bool = False

    @property
    def outcomes(self) -> dict[str, str]:
        """The outcome of each experiment so far."""
        return {step.exam: step.outcome for step in self.steps}

    @property
    def contract(self) -> str:
        """What the prompt asks for."""
        return self.subject.session.case.prompt(self.subject.prompt).contract

    @property
    def evidence(self) -> dict[str, str]:
        """The outcomes that replays speak about."""
        hidden = UNTOLD if self.contract == "class" else ()
        return {exam: word for exam, word in self.outcomes.items() if exam not in hidden}

    @property
    def seconds_left(self) -> float:
        """What is left of the time box."""
        return 60 * self.minutes - (time.perf_counter() - self.started)

    @property
    def ledger(self) -> Ledger:
        """Beliefs after the outcomes so far; the experiments at what they cost now."""
        minutes = {name: self.cost(name) / 60 for name in OF_ADAPTER}
        return Ledger(
            measure_profiles(self.replays, list_experiments(OF_ADAPTER, minutes)), self.evidence
        )

    @cached_property
    def known_findings(self) -> frozenset[str]:
        """The findings that replays of planted causes have shown."""
        return frozenset(replay.outcomes["inspect"] for replay in self.replays)

    @property
    def strange(self) -> tuple[Finding, ...]:
        """What the checker found here that no replay has shown."""
        if not any(step.exam == "inspect" and not step.told for step in self.steps):
            return ()
        return tuple(f for f in self.subject.findings if f.id not in self.known_findings)

    @property
    def fatal(self) -> Finding | None:
        """An error of the checker's alone, that no replay has shown: it names the cause by itself.

        Beside a finding that replays have shown it says no more than that one.
        """
        if self.outcomes.get("inspect") != "nothing":
            return None
        return next((f for f in self.strange if f.severity == "error"), None)

    @property
    def error(self) -> Finding | None:
        """The checker's worst finding, where it says that the adapter will not work as saved."""
        ran = any(step.exam == "inspect" and not step.told for step in self.steps)
        found = self.subject.findings if ran else ()
        return next((f for f in found if f.severity == "error"), None)

    def run(self) -> Conclusion:
        """Check, run the controls, then what the planner chooses, until it is settled."""
        for exam, outcome in self.told.items():
            self.steps.append(TestRun(exam, outcome, "as told", 0.0, told=True))
        for exam in CONTROLS:
            if self.fatal is not None or self.seconds_left <= 0:
                break
            if TESTS[exam].states and not self.is_paced:
                self._fit_rows()
            if self._is_open(exam) and self._fits(exam):
                self._run(exam)
        while (chosen := self._choose()) is not None:
            self._run(chosen)
        return conclude(self)

    def cost(self, exam: str) -> float:
        """Seconds that an experiment is expected to take; what was asked before costs nothing."""
        subject = self.subject
        missing = [state for state in TESTS[exam].states if not subject.has_asked(state)]
        each = subject.pace * len(subject.rows) + subject.overhead
        return MARGIN * each * len(missing)

    def _is_open(self, exam: str) -> bool:
        return exam not in self.outcomes and not why_not(exam, self.subject, self.outcomes)

    def _fits(self, exam: str) -> bool:
        return self.cost(exam) <= self.seconds_left

    def _run(self, exam: str) -> None:
        start = time.perf_counter()
        found = run_test(exam, self.subject)
        outcome = self._known_outcome() if exam == "inspect" else found.word
        step = TestRun(exam, outcome, found.measured, time.perf_counter() - start)
        self.steps.append(step)
        self.report(f"{step.seconds:6.1f} s  {exam}: {outcome} ({found.measured})")

    def _known_outcome(self) -> str:
        """The worst finding of those that replays have shown, or that there is none."""
        found = (finding.id for finding in self.subject.findings)
        return next((name for name in found if name in self.known_findings), "nothing")

    def _fit_rows(self) -> None:
        """Take as many rows as let all experiments fit into the time left."""
        subject, self.is_paced = self.subject, True
        subject.ask(FIRST)
        left_open = [name for name in OF_ADAPTER if self._is_open(name)]
        wanted = {state for name in left_open for state in TESTS[name].states}
        states = [state for state in wanted if not subject.has_asked(state)]
        left = PLANNED * self.seconds_left / MARGIN - subject.overhead * len(states)
        most = max(int(left / max(subject.pace * len(states), 1e-9)), LEAST_ROWS)
        if most < len(subject.rows):
            subject.rows = spread(subject.rows, most)
            self.report(f"          from here on {most} rows, so that the experiments fit")

    def _choose(self) -> str | None:
        """The experiment with the most expected bits a minute that fits; None where it is over."""
        ledger = self.ledger
        causes = by_cause(ledger.likelihoods)
        open_ = [name for name in OF_ADAPTER if self._is_open(name) and self._fits(name)]
        settled = max(ledger.marginal(causes).values()) >= SETTLED
        if self.fatal is not None or settled or not open_:
            return None
        steps = plan(ledger, causes, candidates=open_).steps
        return steps[0].experiment if steps else None


def conclude(examination: Examination) -> Conclusion:
    """The verdict on what an examination has seen."""
    fatal = examination.fatal
    warnings = tuple(f for f in examination.strange if f is not fatal)
    if fatal is not None:
        return Conclusion("named", finding=fatal, warnings=warnings)
    error = examination.error
    ledger, written = examination.ledger, order_written(examination.subject)
    useful = None if written is None else (written.low or 0.0) > THRESHOLDS.useful
    # However well it ranks: it will not work as saved, or leaves another base behind.
    spoilt = error is not None or examination.outcomes.get("off") == "is not the base"
    found = judge(ledger, works=False if spoilt else useful)
    if found.word == "cannot tell" and error is not None:
        found = replace(found, word="named", finding=error)
    ahead = tuple(look_ahead(examination, ledger))
    return replace(found, ahead=ahead, warnings=warnings, written=written)


def order_written(subject: Subject) -> Estimate | None:
    """AUC of what is written with the adapter; None without labels, or where it was not asked."""
    if not subject.has_asked(SAVED) or not subject.labelled:
        return None
    return auc_estimate(subject.labels, subject.written(SAVED))


def judge(ledger: Ledger, *, works: bool | None, draws: int = DRAWS) -> Conclusion:
    """What beliefs come to: the leading kind of fault, and whether that is enough to name it.

    `works` says whether what the adapter writes orders the rows, None where that is not known. A
    run that works has no symptom to explain: unless a fault is named all the same, that is the
    verdict.
    """
    posterior = ledger.posterior(draws=draws)
    ranking = rank(posterior.causes)
    families = rank(posterior.marginal(families_of(ledger.likelihoods.hypotheses)))
    family, share = families[0]
    enough = (share.value or 0.0) >= NAMED
    word: Word = "cannot tell"
    if enough and family != SOUND:
        word = "named"
    elif works or (works is None and enough):
        word = "works here"
    causes = credible(ranking, family=family, share=share)
    weights = tuple(weigh(ledger, causes[0][0]))
    return Conclusion(word, family, share, causes, families, ranking, weights)


def rank(shares: Mapping[str, Estimate]) -> tuple[tuple[str, Estimate], ...]:
    """Probabilities, the largest first."""
    return tuple(sorted(shares.items(), key=lambda item: -(item[1].value or 0.0)))


def families_of(hypotheses: Sequence[Hypothesis]) -> dict[Hypothesis, str]:
    """Label each hypothesis with the family of its cause."""
    return {hypothesis: meanings()[hypothesis.cause].family for hypothesis in hypotheses}


def credible(
    ranking: Sequence[tuple[str, Estimate]], *, family: str, share: Estimate
) -> tuple[tuple[str, Estimate], ...]:
    """The fewest causes of a family that hold nearly all of its probability."""
    own = [(cause, told) for cause, told in ranking if meanings()[cause].family == family]
    kept: list[tuple[str, Estimate]] = []
    for cause, told in own:
        if sum(known.value or 0.0 for _, known in kept) >= NAMED * (share.value or 0.0):
            break
        kept.append((cause, told))
    return tuple(kept)


def weigh(ledger: Ledger, cause: str) -> Iterator[Weight]:
    """What speaks for and against a cause, the strongest first."""
    found = [
        Weight(step.experiment, step.outcome, step.weights[cause] or 0.0)
        for step in ledger.account()
    ]
    for weight in sorted(found, key=lambda w: -abs(w.log10)):
        if abs(weight.log10) >= WORTH_SAYING:
            yield weight


def look_ahead(examination: Examination, ledger: Ledger) -> Iterator[Ahead]:
    """What was not run and would say more, in the planner's order, with the reason."""
    subject, outcomes = examination.subject, examination.outcomes
    reasons = {
        name: why_not(name, subject, outcomes) or "it did not fit into the time"
        for name in OF_ADAPTER
        if name not in outcomes
    }
    # What cannot be had by giving more is not held out.
    ahead = [name for name, why in reasons.items() if "the adapter" not in why]
    if not ahead or max(ledger.marginal(by_cause(ledger.likelihoods)).values()) >= SETTLED:
        return
    for step in plan(ledger, by_cause(ledger.likelihoods), candidates=ahead).steps:
        name = step.experiment
        yield Ahead(name, step.bits, step.minutes, reasons[name], parted(ledger, name))


def parted(ledger: Ledger, exam: str) -> tuple[str, str]:
    """The likeliest cause, and the one that an experiment best tells from it for its probability.

    How far it tells two apart is the distance in variation of their outcomes.
    """
    table = ledger.likelihoods
    names, members = memberships(table, by_cause(table))
    joint = members * ledger.weights
    shares = joint.sum(axis=1)
    outcomes = joint / np.maximum(shares, TINY)[:, None] @ table.of(exam)
    first = int(shares.argmax())
    gaps = shares * np.abs(outcomes - outcomes[first]).sum(axis=1)
    return names[first], names[int(gaps.argmax())]


def parse_told(pairs: Sequence[str]) -> dict[str, str]:
    """Outcomes given as TEST=OUTCOME; `DiagnosisError` for one that is not."""
    told = {}
    for pair in pairs:
        name, sign, outcome = (part.strip() for part in pair.partition("="))
        if not sign or name not in OF_ADAPTER:
            expected = f"TEST=OUTCOME with a test among {', '.join(OF_ADAPTER)}"
            raise DiagnosisError("an observed outcome", expected=expected, found=repr(pair))
        if outcome not in TESTS[name].outcomes:
            expected = f"an outcome among {', '.join(TESTS[name].outcomes)}"
            raise DiagnosisError(f"test {name!r}", expected=expected, found=repr(outcome))
        told[name] = outcome
    return told


def describe_judgements(replays: Sequence[Replay]) -> str:
    """How replays of each world are judged from those of the others, in a line."""
    counts = Counter(word for _, word in judge_others(replays))
    if not counts:
        return "one world, of which none is left to learn from"
    told = ", ".join(f"{word} {counts[word]}" for word in JUDGED)
    return f"judged from other worlds: {told}"


# How a judgement stands to the truth: the cause alone, its kind of fault, that it does no harm
# here, neither, or not said.
JUDGED = ("cause named", "kind named", "works here", "wrong", "cannot tell")


def judge_others(replays: Sequence[Replay]) -> Iterator[tuple[Replay, str]]:
    """Judge each replay from those of other worlds; a world's seed stands in the hundreds."""
    for world in sorted({replay.seed // WORLD for replay in replays}):
        others = [replay for replay in replays if replay.seed // WORLD != world]
        if not others:
            return
        table = measure_profiles(others, list_experiments(OF_ADAPTER))
        for replay in replays:
            if replay.seed // WORLD == world:
                works = bool(replay.features["works"])
                found = judge(Ledger(table, replay.outcomes), works=works, draws=1)
                yield replay, stand(found, replay.cause)


def stand(found: Conclusion, cause: str) -> str:
    """How a judgement stands to the cause that was planted."""
    sound = meanings()[cause].family == SOUND
    if found.word == "works here":
        return "cause named" if sound else "works here"
    if found.word == "cannot tell":
        return "cannot tell"
    if found.family != meanings()[cause].family:
        return "wrong"
    return "cause named" if [name for name, _ in found.causes] == [cause] else "kind named"


# What the notebook of a case takes, and the command line unless told otherwise.
TIME_BOX = 10.0
# Causes shown in a terminal.
SHOWN = 6


def examine_session(
    session: Session,
    *,
    minutes: float,
    told: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Examination, Conclusion]:
    """Examine a session's suspect on its rows, in a time box, under the prompt that matters most.

    Raises `ModelError` where there is no suspect, or its files or the base cannot be read.
    """
    world = session.world
    subject = Subject(
        session=session,
        run=Run("base", world.path("suspect")),
        prompt=session.case.asked,
        rows=spread(session.rows, MOST_ROWS),
        base_folder=world.path("base"),
        reference=world.path("reference") if world.has("reference") else None,
    )
    replays = read_profiles().of(Replay)
    with subject:
        examination = Examination(subject, replays, minutes, parse_told(told), report=report)
        return examination, examination.run()


def diagnose_case(
    case: Case,
    *,
    profile: str,
    minutes: float,
    prior: str,
    told: Sequence[str],
    report: Callable[[str], None],
) -> tuple[Examination, Conclusion]:
    """Open a session on a case of one's own and examine its suspect."""
    if prior != "flat":
        raise DiagnosisError("the prior", expected="flat: this case states none", found=repr(prior))
    world = resolve_world(case, profile)
    if not world.has("suspect"):
        raise CaseError(f"case {case.name}", expected="a suspect adapter", found="none")
    with TemporaryDirectory() as scratch:
        session = Session(
            notebook=Path("diagnose"),
            case=case,
            profile_name=profile,
            world=world,
            rows=choose_rows(case, profile),
            records_path=Path(scratch, "diagnose.jsonl"),
            parameters={},
        )
        return examine_session(session, minutes=minutes, told=told, report=report)


def conclude_in_words(conclusion: Conclusion) -> str:
    """The verdict in a sentence or two."""
    if conclusion.finding is not None:
        entry = find_entry(conclusion.finding.id)
        return (
            f"Named by the checker: {entry.title} ({entry.id}). {entry.cause} "
            f"Settled by: {entry.settles} Remedy: {conclusion.finding.remedy}"
        )
    assert conclusion.share is not None
    first = meanings()[conclusion.causes[0][0]]
    share = say_share(conclusion.share)
    if conclusion.word == "works here":
        served = "; ".join(SERVING.values())
        seen = f"it does what a sound adapter does ({share})"
        if conclusion.written is not None:
            seen = f"what it writes orders the rows (AUC {_say_number(conclusion.written)})"
        return (
            f"Works here: {seen}. So the fault lies in the code that serves it, if there is one: "
            f"{served}. {meanings()[HEALTHY].remedy}"
        )
    named = _name_causes(conclusion)
    if conclusion.word == "named":
        return (
            f"Named: {FAMILIES[conclusion.family]} ({share}); {named}. {first.means} "
            f"Settled by: {first.settles} Remedy: {first.remedy}"
        )
    return f"Cannot tell yet: {_say_next(conclusion)} So far {named} ({share})."


def _say_number(told: Estimate) -> str:
    return f"{told.value:.2f} [{told.low:.2f}, {told.high:.2f}]"


def _name_causes(conclusion: Conclusion) -> str:
    words = [meanings()[cause].title for cause, _ in conclusion.causes]
    if len(words) == 1:
        return f"the cause is: {words[0]}"
    return f"the cause is one of: {'; '.join(words)}"


def _say_next(conclusion: Conclusion) -> str:
    if not conclusion.ahead:
        return f"no experiment left here separates more. {_settle(conclusion)}"
    step = conclusion.ahead[0]
    first, other = (meanings()[cause].title for cause in step.parts)
    return (
        f"run `{step.exam}` (about {say_minutes(step.minutes)}), which separates “{first}” from "
        f"“{other}”; not run yet: {step.why}."
    )


def _settle(conclusion: Conclusion) -> str:
    return f"By hand: {meanings()[conclusion.ranking[0][0]].settles}"


def say_minutes(minutes: float) -> str:
    """A duration in whole minutes, rounded up."""
    whole = max(1, math.ceil(minutes))
    return "1 minute" if whole == 1 else f"{whole} minutes"


def say_share(told: Estimate) -> str:
    """A probability with its interval, in per cent."""
    return f"{told.value:.0%} [{told.low:.0%}, {told.high:.0%}]"


def as_text(examination: Examination, conclusion: Conclusion) -> str:
    """The verdict for a terminal: causes, what speaks for and against, what was not run."""
    lines = ["", conclude_in_words(conclusion)]
    lines += [
        f"the checker also warns: {found.id} ({found.evidence})" for found in conclusion.warnings
    ]
    if conclusion.ranking:
        lines.append("")
        for cause, told in conclusion.ranking[:SHOWN]:
            lines.append(f"{told.value:6.1%} [{told.low:.0%}, {told.high:.0%}]  {_tell(cause)}")
        rest = sum(told.value or 0.0 for _, told in conclusion.ranking[SHOWN:])
        lines += [f"{rest:6.1%}  {len(conclusion.ranking) - SHOWN} other causes", ""]
        lines += _weight_lines(conclusion)
    lines += [
        f"not run  {a.exam}: {TESTS[a.exam].title} (about {say_minutes(a.minutes)}, "
        f"{a.bits:.2f} bits); {a.why}"
        for a in conclusion.ahead
    ]
    rows, prompt = len(examination.subject.rows), examination.subject.prompt
    lines.append(f"on {rows} rows under the prompt {prompt}, in {_seconds(examination):.0f} s")
    return "\n".join(lines)


def _tell(cause: str) -> str:
    return f"{cause}: {meanings()[cause].title}"


def _weight_lines(conclusion: Conclusion) -> Iterator[str]:
    for word, sign in (("for", 1), ("against", -1)):
        found = [w for w in conclusion.weights if sign * w.log10 > 0]
        if found:
            told = ", ".join(f"{w.exam}: {w.outcome} {w.log10:+.1f}" for w in found)
            yield f"{word:7}  {told}"


def _seconds(examination: Examination) -> float:
    return sum(step.seconds for step in examination.steps)


def as_json(examination: Examination, conclusion: Conclusion) -> str:
    """Everything that was run and concluded, as one JSON object."""
    content: dict[str, Any] = {
        "verdict": conclusion.word,
        "conclusion": conclude_in_words(conclusion),
        "rows": len(examination.subject.rows),
        "prompt": examination.subject.prompt,
        "seconds": round(_seconds(examination), 1),
        "tests": [dataclasses.asdict(step) for step in examination.steps],
        **dataclasses.asdict(conclusion),
    }
    del content["word"]
    return json.dumps(content, indent=2)


def record_diagnosis(session: Session, *, minutes: float = TIME_BOX) -> None:
    """Examine the session's suspect and record the tests, the causes and the verdict.

    How long each test took stands in the session's timings. Without a suspect, or where it cannot
    be examined, the reason is recorded in place of a verdict.
    """
    session.measure("diagnosis.time_box", minutes, unit="min")
    if not session.world.has("suspect"):
        _record_nothing(session, session.world.members["suspect"].reason)
        return
    examination, conclusion = examine_session(session, minutes=minutes, report=session.say)
    _record_conclusion(session, examination, conclusion)


OUTCOMES = ("test", "what was done", "outcome", "measured")
CAUSE_COLUMNS = ("cause", "kind of fault", "probability")
NEXT_COLUMNS = ("test", "what is done", "bits", "minutes", "why not run")


def _record_nothing(session: Session, reason: str) -> None:
    session.table("diagnosis.outcomes", OUTCOMES, [])
    session.table("diagnosis.causes", CAUSE_COLUMNS, [])
    session.table("diagnosis.next", NEXT_COLUMNS, [])
    session.verdict("diagnosis.settled", "not available", reason)
    session.text("diagnosis.conclusion", f"Not available: {reason}.")


def _record_conclusion(session: Session, examination: Examination, conclusion: Conclusion) -> None:
    session.measure("diagnosis.rows", len(examination.subject.rows), unit="rows")
    folder = str(examination.subject.run.adapter)  # where it lies differs by machine
    session.table(
        "diagnosis.outcomes",
        OUTCOMES,
        [
            (
                step.exam,
                TESTS[step.exam].title,
                step.outcome,
                shown(step.measured.replace(folder, "the adapter"), limit=200),
            )
            for step in examination.steps
        ],
    )
    session.table(
        "diagnosis.causes",
        CAUSE_COLUMNS,
        [
            (meanings()[cause].title, FAMILIES[meanings()[cause].family], say_share(told))
            for cause, told in conclusion.ranking
        ],
    )
    session.table(
        "diagnosis.next",
        NEXT_COLUMNS,
        [
            (a.exam, TESTS[a.exam].title, round(a.bits, 2), math.ceil(a.minutes), a.why)
            for a in conclusion.ahead
        ],
    )
    words = conclude_in_words(conclusion)
    session.verdict("diagnosis.settled", None if conclusion.word == "cannot tell" else True, words)
    session.text("diagnosis.conclusion", escaped(words))
