"""The diagnosis of a case of one's own, in the time there is, and how it is told."""

import csv
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from postmortem.case.rows import choose_rows
from postmortem.case.schema import Case
from postmortem.checker.errors import CaseError, DiagnosisError, Finding, find_entry
from postmortem.diagnosis.battery import BASE, ENOUGH, OF_ADAPTER, SAVED, TESTS, list_experiments
from postmortem.diagnosis.beliefs import DRAWS, Ledger, Prior, plan
from postmortem.diagnosis.causes import Run
from postmortem.diagnosis.likelihoods import (
    FAMILIES,
    SERVING,
    Hypothesis,
    Likelihoods,
    by_cause,
    meanings,
    measure_profiles,
    memberships,
    read_profiles,
)
from postmortem.diagnosis.subject import (
    NO_LABELS,
    NO_REFERENCE,
    Subject,
    run_test,
    spread,
    why_not,
)
from postmortem.experiments.measure import escaped, shown
from postmortem.experiments.metrics import THRESHOLDS, Estimate, auc_estimate
from postmortem.experiments.records import Replay
from postmortem.experiments.session import Session
from postmortem.models.model_set import resolve_world

# What is run whatever comes of it: the files, and the adapter against its base.
CONTROLS = (
    "inspect",
    "load",
    "weights",
    "base-alone",
    "base-ranks",
    "answers",
    "effect",
    "form",
    "off",
    "order",
)
# Rows of the first round, and rows beyond which none are asked; each round asks twice as many.
FIRST_ROWS, MOST_ROWS = 16, 256
# Rows of the replays: on fewer, what is not seen may still be there.
LEARNT_ROWS = ENOUGH
NOT_SEEN = {
    "base-ranks": "does not rank",
    "form": "as the base",
    "order": "as the base",
    "mend": "nothing",
    "markup": "no better",
}
# A round is worth having where it asks so many times as many rows.
WORTH_ASKING = 1.25
# Memory, caches and other programs make a step longer than the last one by up to this factor.
MARGIN = 1.15
# What a family of causes must have to be named, and for no more rows to be asked; what a cause
# must have for nothing more to be run.
NAMED, CLEAR, SETTLED = 0.9, 0.97, 0.99
# Half a power of ten, as in `diagnosis`: less is barely worth mentioning.
WORTH_SAYING = 0.3
SOUND = "sound"
TINY = np.finfo(float).tiny
# What a classifier tells nothing by: its answers have their form always, and its head, trained with
# the adapter, has an effect of its own.
UNTOLD = ("base-alone", "answers", "effect", "form")
# A seed of a replay holds its world in the hundreds.
WORLD = 100
Word = Literal["named", "works here", "cannot tell"]


@dataclass(frozen=True)
class DoneTest:
    """A test as it was last run, on so many rows, or as its outcome was `told`.

    `seconds` are those of all its runs.
    """

    test: str
    outcome: str
    measured: str
    seconds: float
    rows: int = 0
    told: bool = False


@dataclass(frozen=True)
class Weight:
    """How far an outcome speaks for a cause (above 0) or against it: log10 likelihood ratio."""

    test: str
    outcome: str
    log10: float


@dataclass(frozen=True)
class Ahead:
    """A test that was not run: expected bits about the cause, minutes, and why it was not.

    `parts` are the likeliest cause and the one that it best tells from that.
    """

    test: str
    bits: float
    minutes: float
    why: str
    parts: tuple[str, str]


@dataclass(frozen=True)
class Conclusion:
    """What the diagnosis comes to.

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
class TimedDiagnosis:
    """A diagnosis under way: what was seen, and what time there is.

    `replays` say what causes look like; `told` holds outcomes that the user gives, which are not
    run again. `report` is given a line for each step.
    """

    subject: Subject
    replays: Sequence[Replay]
    minutes: float
    told: Mapping[str, str] = field(default_factory=dict)
    report: Callable[[str], None] = lambda line: None
    tests: dict[str, DoneTest] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> list[DoneTest]:
        """The tests that were run or told, in their order."""
        return [*self.tests.values()]

    @property
    def outcomes(self) -> dict[str, str]:
        """The outcome of each test so far."""
        return {name: step.outcome for name, step in self.tests.items()}

    @property
    def contract(self) -> str:
        """What the prompt asks for."""
        return self.subject.session.case.prompt(self.subject.prompt).contract

    @property
    def evidence(self) -> dict[str, str]:
        """The outcomes that replays speak about.

        What was not seen on fewer rows than those of the replays is no evidence of absence.
        """
        hidden = UNTOLD if self.contract == "class" else ()
        return {
            name: step.outcome
            for name, step in self.tests.items()
            if name not in hidden
            and (step.told or step.rows >= LEARNT_ROWS or NOT_SEEN.get(name) != step.outcome)
        }

    @property
    def seconds_left(self) -> float:
        """What is left of the time box."""
        return 60 * self.minutes - (time.perf_counter() - self.started)

    @property
    def ledger(self) -> Ledger:
        """Beliefs after the outcomes so far; the experiments at what they cost now."""
        minutes = {name: self.cost(name) / 60 for name in OF_ADAPTER}
        table = measure_profiles(self.replays, list_experiments(OF_ADAPTER, minutes))
        return Ledger(table, self.evidence, reported_prior(table))

    @cached_property
    def known_findings(self) -> frozenset[str]:
        """The findings that replays of planted causes have shown."""
        return frozenset(replay.outcomes["inspect"] for replay in self.replays)

    @property
    def checked(self) -> tuple[Finding, ...]:
        """What the checker found, where it was run and not told."""
        step = self.tests.get("inspect")
        return () if step is None or step.told else self.subject.findings

    @property
    def strange(self) -> tuple[Finding, ...]:
        """What the checker found here that no replay has shown."""
        return tuple(f for f in self.checked if f.id not in self.known_findings)

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
        return next((f for f in self.checked if f.severity == "error"), None)

    def run(self) -> Conclusion:
        """Check, run the controls and what the planner chooses; on more rows until it is clear."""
        for name, outcome in self.told.items():
            self.tests[name] = DoneTest(name, outcome, "as told", 0.0, told=True)
        for count in self._counts():
            self.subject.count = count
            self._run_round()
            if self.fatal is not None or self.is_clear:
                break
        return conclude(self)

    @property
    def is_clear(self) -> bool:
        """Whether more rows would add nothing to what is known."""
        known, needed = self.outcomes, min(LEARNT_ROWS, len(self.subject.rows))
        by_files = known.get("load") == "raises" or known.get("effect") in ("none", "not finite")
        ledger = self.ledger
        share = max(ledger.marginal(families_of(ledger.likelihoods.hypotheses)).values())
        return by_files or (self.subject.count >= needed and share >= CLEAR)

    def cost(self, name: str) -> float:
        """Seconds that a test is expected to take on the rows in use; what was asked costs nothing.

        A state that was never asked is taken to be as slow as the slowest one that was.
        """
        subject, count = self.subject, len(self.subject.in_use)
        slowest = max(subject.paces.values(), default=0.0)
        missing = {state: subject.missing_rows(state, count) for state in TESTS[name].states}
        seconds = sum(subject.paces.get(state, slowest) * rows for state, rows in missing.items())
        return MARGIN * seconds

    def _counts(self) -> Iterator[int]:
        """How many rows to ask, about twice as many each time, as far as the time goes."""
        subject, total = self.subject, len(self.subject.rows)
        yield min(FIRST_ROWS, total)
        while subject.count < total and self.seconds_left > 0:
            states = {state for name in self.tests for state in TESTS[name].states}
            count = min(2 * subject.count, total)
            seconds = MARGIN * sum(
                subject.paces.get(state, 0.0) * subject.missing_rows(state, count)
                for state in states
            )
            if seconds > self.seconds_left:
                share = self.seconds_left / seconds
                count = subject.count + int(share * (count - subject.count))
            if count < min(WORTH_ASKING * subject.count, total):
                return
            yield count

    def _run_round(self) -> None:
        for name in (*CONTROLS, *self.tests):
            if self.fatal is None and self._is_open(name) and self._fits(name):
                self._run(name)
        while (chosen := self._choose()) is not None:
            self._run(chosen)

    def _is_open(self, name: str) -> bool:
        """Whether a test may be run and was not, or not on all the rows in use."""
        step, subject = self.tests.get(name), self.subject
        if step is not None and (step.told or not TESTS[name].states):
            return False
        is_new = step is None or step.rows < TESTS[name].rows(len(subject.in_use))
        return is_new and not why_not(name, subject, self.outcomes)

    def _fits(self, name: str) -> bool:
        return self.seconds_left > 0 and self.cost(name) <= self.seconds_left

    def _run(self, name: str) -> None:
        start = time.perf_counter()
        found = run_test(name, self.subject)
        outcome = self._known_outcome() if name == "inspect" else found.word
        before = self.tests.get(name)
        seconds = time.perf_counter() - start + (before.seconds if before else 0.0)
        rows = TESTS[name].rows(len(self.subject.in_use))
        step = DoneTest(name, outcome, found.measured, seconds, rows=rows)
        self.tests[name] = step
        on = f" on {step.rows} rows" if TESTS[name].states else ""
        self.report(f"{step.seconds:6.1f} s  {name}{on}: {outcome} ({found.measured})")

    def _known_outcome(self) -> str:
        """The worst finding of those that replays have shown, or that there is none."""
        found = (finding.id for finding in self.subject.findings)
        return next((name for name in found if name in self.known_findings), "nothing")

    def _choose(self) -> str | None:
        """The test with the most expected bits a minute that fits; None where it is over."""
        ledger = self.ledger
        causes = by_cause(ledger.likelihoods)
        left = [name for name in OF_ADAPTER if name not in self.tests]
        open_ = [name for name in left if self._is_open(name) and self._fits(name)]
        settled = max(ledger.marginal(causes).values()) >= SETTLED
        if self.fatal is not None or settled or not open_:
            return None
        steps = plan(ledger, causes, candidates=open_).steps
        return steps[0].experiment if steps else None


def reported_prior(table: Likelihoods) -> Prior:
    """Each cause by how often people report it, and one more, so that none is ruled out."""
    return Prior(causes={name: 1.0 + meanings()[name].reported for name in table.causes})


def conclude(diagnosis: TimedDiagnosis) -> Conclusion:
    """The verdict on what a diagnosis has seen."""
    diagnosis.subject.settle()
    fatal = diagnosis.fatal
    warnings = tuple(f for f in diagnosis.strange if f is not fatal)
    if fatal is not None:
        return Conclusion("named", finding=fatal, warnings=warnings)
    error = diagnosis.error
    ledger, written = diagnosis.ledger, order_written(diagnosis.subject)
    useful = written is not None and (written.low or 0.0) > THRESHOLDS.useful
    known = diagnosis.outcomes
    # It adds to what the base knows, and nothing that was tried makes it better.
    helps = known.get("order") == "better" and known.get("mend") == "nothing"
    # However well it ranks: it will not work as saved, or leaves another base behind.
    spoilt = error is not None or known.get("off") == "is not the base"
    found = judge(ledger, works=False if spoilt else (useful or helps) or None)
    if found.word == "cannot tell" and error is not None:
        found = replace(found, word="named", finding=error)
    ahead = tuple(look_ahead(diagnosis, ledger))
    return replace(found, ahead=ahead, warnings=warnings, written=written)


def order_written(subject: Subject) -> Estimate | None:
    """AUC of what is written with the adapter; None without labels, or where it was not asked."""
    if (SAVED, subject.prompt) not in subject.asked or not subject.labelled:
        return None
    return auc_estimate(subject.labels, subject.written(SAVED))


def judge(ledger: Ledger, *, works: bool | None, draws: int = DRAWS) -> Conclusion:
    """What beliefs come to: the leading kind of fault, and whether that is enough to name it.

    `works` says whether the adapter does what it is for, None where that is not known or not seen.
    A run that works has no symptom to explain: unless a fault is named all the same, that
    is the verdict.
    """
    posterior = ledger.posterior(draws=draws)
    ranking = rank_estimates(posterior.causes)
    families = rank_estimates(posterior.marginal(families_of(ledger.likelihoods.hypotheses)))
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


def rank_estimates(shares: Mapping[str, Estimate]) -> tuple[tuple[str, Estimate], ...]:
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


def look_ahead(diagnosis: TimedDiagnosis, ledger: Ledger) -> Iterator[Ahead]:
    """What was not run and would say more, in the planner's order, with the reason."""
    subject, outcomes = diagnosis.subject, diagnosis.outcomes
    reasons = {
        name: why_not(name, subject, outcomes) or "it did not fit into the time"
        for name in OF_ADAPTER
        if name not in outcomes
    }
    # What cannot be had by giving more is not held out.
    ahead = [name for name in reasons if what_to_give(name, diagnosis)]
    if not ahead or max(ledger.marginal(by_cause(ledger.likelihoods)).values()) >= SETTLED:
        return
    for step in plan(ledger, by_cause(ledger.likelihoods), candidates=ahead).steps:
        name = step.experiment
        yield Ahead(name, step.bits, step.minutes, reasons[name], parted(ledger, name))


def parted(ledger: Ledger, test: str) -> tuple[str, str]:
    """The likeliest cause, and the one that an experiment best tells from it for its probability.

    How far it tells two apart is the distance in variation of their outcomes.
    """
    table = ledger.likelihoods
    names, members = memberships(table, by_cause(table))
    joint = members * ledger.weights
    shares = joint.sum(axis=1)
    outcomes = joint / np.maximum(shares, TINY)[:, None] @ table.of(test)
    first = int(shares.argmax())
    gaps = shares * np.abs(outcomes - outcomes[first]).sum(axis=1)
    return names[first], names[int(gaps.argmax())]


def parse_observed(pairs: Sequence[str]) -> dict[str, str]:
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
                ledger = Ledger(table, replay.outcomes, reported_prior(table))
                found = judge(ledger, works=works or None, draws=1)
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
# Causes and kinds of fault shown in a terminal, and the probability from which a cause is.
SHOWN, SHOWN_FAMILIES, NOT_RULED_OUT = 4, 3, 0.03


def diagnose_session(
    session: Session,
    *,
    minutes: float,
    told: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> tuple[TimedDiagnosis, Conclusion]:
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
        diagnosis = TimedDiagnosis(subject, replays, minutes, parse_observed(told), report=report)
        return diagnosis, diagnosis.run()


def diagnose_case(
    case: Case,
    *,
    profile: str,
    minutes: float,
    prior: str,
    told: Sequence[str],
    report: Callable[[str], None],
) -> tuple[TimedDiagnosis, Conclusion]:
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
        return diagnose_session(session, minutes=minutes, told=told, report=report)


def conclude_in_words(conclusion: Conclusion) -> str:
    """The verdict in a sentence or two."""
    if conclusion.finding is not None:
        entry = find_entry(conclusion.finding.id)
        return f"Named by the checker: {entry.title} ({entry.id}). {entry.cause}"
    means = meanings()[conclusion.causes[0][0]].means
    if conclusion.word == "named":
        return f"Named: {FAMILIES[conclusion.family]}. {_name_causes(conclusion)} {means}"
    if conclusion.word == "cannot tell":
        return f"Cannot tell yet. {_say_likely(conclusion)}"
    seen = "it does here what a sound adapter does"
    if conclusion.written is not None and (conclusion.written.low or 0.0) > THRESHOLDS.useful:
        seen = f"what it writes orders the rows (AUC {_say_number(conclusion.written)})"
    served = "; ".join(SERVING.values())
    return f"Works here: {seen}. If there is a fault, it lies in the code that serves it: {served}."


def _say_number(told: Estimate) -> str:
    return f"{told.value:.2f} [{told.low:.2f}, {told.high:.2f}]"


def _name_causes(conclusion: Conclusion) -> str:
    titles = [meanings()[cause].title for cause, _ in conclusion.causes]
    if len(titles) == 1:
        return f"The cause: {titles[0]}."
    return f"The cause is one that this does not tell apart: {'; '.join(titles)}."


def _say_likely(conclusion: Conclusion) -> str:
    """The likeliest kinds of fault, as many as hold most of the probability."""
    told: list[str] = []
    held = 0.0
    for family, share in conclusion.families:
        if held >= CLEAR or len(told) == SHOWN_FAMILIES:
            break
        told.append(f"{FAMILIES[family]} ({say_certainty(share.value or 0.0)})")
        held += share.value or 0.0
    return f"What is left, likeliest first: {'; '.join(told)}."


def say_certainty(share: float) -> str:
    """A probability in words: a percentage would claim more than replays elsewhere can tell."""
    words = {0.99: "as good as certain", NAMED: "very likely", 0.5: "likelier than not"}
    return next((word for least, word in words.items() if share >= least), "possible")


def say_outcome(test: str, outcome: str) -> str:
    """An outcome of a test as a sentence about the adapter."""
    found = sentences().get((test, outcome))
    return found or f"the checker finds {find_entry(outcome).title} ({outcome})"


@cache
def sentences() -> Mapping[tuple[str, str], str]:
    """What each outcome of a test means, by both names; from outcomes.csv."""
    with Path(__file__).with_name("outcomes.csv").open(encoding="utf-8", newline="") as file:
        return {(row["test"], row["outcome"]): row["says"] for row in csv.DictReader(file)}


def what_to_do(diagnosis: TimedDiagnosis, conclusion: Conclusion) -> str:
    """The remedy of what was named, or what makes sure of the likeliest cause."""
    if conclusion.finding is not None:
        return conclusion.finding.remedy
    first = meanings()[conclusion.causes[0][0]]
    if conclusion.word == "cannot tell":
        return f"{next_step(diagnosis, conclusion)} By hand: {first.settles}"
    sure = "" if conclusion.word == "works here" else f" To be sure: {first.settles}"
    return first.remedy + sure


def next_step(diagnosis: TimedDiagnosis, conclusion: Conclusion) -> str:
    """What to type or give: for the test that would say most and was not run, or for more rows."""
    if conclusion.ahead:
        step = conclusion.ahead[0]
        first, other = (meanings()[cause].title for cause in step.parts)
        given = what_to_give(step.test, diagnosis)
        return f"{given}: the test `{step.test}` was not run, and tells “{first}” from “{other}”."
    asked, total = len(diagnosis.subject.in_use), len(diagnosis.subject.rows)
    if asked < total:
        return f"{give_time(diagnosis)}: {asked} of {total} rows were asked."
    return "No test is left here that would tell more."


def what_to_give(test: str, diagnosis: TimedDiagnosis) -> str:
    """What makes a test run that was not: labels, a reference or time; nothing where none does."""
    given = {
        "": give_time(diagnosis),
        NO_LABELS: "Give labels (a column `label` of 0 and 1) and diagnose again",
        NO_REFERENCE: "Name a sound adapter as `reference` in the case and diagnose again",
    }
    return given.get(why_not(test, diagnosis.subject, diagnosis.outcomes), "")


def give_time(diagnosis: TimedDiagnosis) -> str:
    """The command with three times the time that there was."""
    minutes = max(2, math.ceil(3 * diagnosis.minutes))
    return f"Run `postmortem diagnose CASE --minutes {minutes}`"


def notes_on(diagnosis: TimedDiagnosis, conclusion: Conclusion) -> Iterator[str]:
    """What is worth a line beside the verdict and decides nothing."""
    for found in conclusion.warnings:
        yield f"the checker also warns: {found.id} ({found.evidence})"
    subject = diagnosis.subject
    ended = {}
    for state in (BASE, SAVED):
        answers = subject.asked.get((state, subject.prompt))
        ended[state] = [] if answers is None else [p.finished for p in answers.predictions]
    if 2 * sum(ended[BASE]) > len(ended[BASE]) and 2 * sum(ended[SAVED]) < len(ended[SAVED]):
        yield (
            f"only {sum(ended[SAVED])} of {len(ended[SAVED])} answers end within the tokens "
            "allowed, where the base alone ends most: a missing end of turn in the training?"
        )


def as_text(diagnosis: TimedDiagnosis, conclusion: Conclusion) -> str:
    """The verdict for a terminal: what speaks for and against it, what to do, what was not run."""
    lines = ["", conclude_in_words(conclusion)]
    for word, sign in (("for", 1), ("against", -1)):
        lines += [
            f"  {word}: {say_outcome(w.test, w.outcome)}"
            for w in conclusion.weights
            if sign * w.log10 > 0
        ]
    lines.append(f"  to do: {what_to_do(diagnosis, conclusion)}")
    lines += [f"  note: {line}" for line in notes_on(diagnosis, conclusion)]
    named = {cause for cause, _ in conclusion.causes}
    others = [c for c, told in conclusion.ranking if c not in named and _worth(told)]
    if others:
        titles = "; ".join(meanings()[cause].title for cause in others[:SHOWN])
        lines.append(f"  not ruled out: {titles}")
    lines += [f"  not run: {a.test}, {TESTS[a.test].title}; {a.why}" for a in conclusion.ahead]
    rows, prompt = len(diagnosis.subject.in_use), diagnosis.subject.prompt
    lines.append(f"on {rows} rows under the prompt {prompt}, in {_seconds(diagnosis):.0f} s")
    return "\n".join(lines)


def _worth(told: Estimate) -> bool:
    return (told.value or 0.0) >= NOT_RULED_OUT


def _seconds(diagnosis: TimedDiagnosis) -> float:
    return sum(step.seconds for step in diagnosis.steps)


def as_json(diagnosis: TimedDiagnosis, conclusion: Conclusion) -> str:
    """Everything that was run and concluded, as one JSON object."""
    content: dict[str, Any] = {
        "verdict": conclusion.word,
        "conclusion": conclude_in_words(conclusion),
        "to_do": what_to_do(diagnosis, conclusion),
        "notes": [*notes_on(diagnosis, conclusion)],
        "rows": len(diagnosis.subject.in_use),
        "prompt": diagnosis.subject.prompt,
        "seconds": round(_seconds(diagnosis), 1),
        "tests": [dataclasses.asdict(step) for step in diagnosis.steps],
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
    diagnosis, conclusion = diagnose_session(session, minutes=minutes, report=session.say)
    _record_conclusion(session, diagnosis, conclusion)


OUTCOMES = ("test", "what was done", "outcome", "measured")
CAUSE_COLUMNS = ("cause", "kind of fault", "how likely")
REASON_COLUMNS = ("speaks", "what was seen")
NEXT_COLUMNS = ("test", "what is done", "bits", "minutes", "why not run")


def _record_nothing(session: Session, reason: str) -> None:
    session.table("diagnosis.outcomes", OUTCOMES, [])
    session.table("diagnosis.causes", CAUSE_COLUMNS, [])
    session.table("diagnosis.next", NEXT_COLUMNS, [])
    session.table("diagnosis.reasons", REASON_COLUMNS, [])
    session.text("diagnosis.to_do", "Not available.")
    session.verdict("diagnosis.settled", "not available", reason)
    session.text("diagnosis.conclusion", f"Not available: {reason}.")


def _record_conclusion(session: Session, diagnosis: TimedDiagnosis, conclusion: Conclusion) -> None:
    session.measure("diagnosis.rows", len(diagnosis.subject.in_use), unit="rows")
    folder = str(diagnosis.subject.run.adapter)  # where it lies differs by machine
    session.table(
        "diagnosis.outcomes",
        OUTCOMES,
        [
            (
                step.test,
                TESTS[step.test].title,
                step.outcome,
                shown(step.measured.replace(folder, "the adapter"), limit=200),
            )
            for step in diagnosis.steps
        ],
    )
    session.table(
        "diagnosis.causes",
        CAUSE_COLUMNS,
        [
            (
                meanings()[cause].title,
                FAMILIES[meanings()[cause].family],
                say_certainty(told.value or 0.0),
            )
            for cause, told in conclusion.ranking
        ],
    )
    session.table(
        "diagnosis.next",
        NEXT_COLUMNS,
        [
            (a.test, TESTS[a.test].title, round(a.bits, 2), math.ceil(a.minutes), a.why)
            for a in conclusion.ahead
        ],
    )
    session.table(
        "diagnosis.reasons",
        REASON_COLUMNS,
        [
            ("for" if w.log10 > 0 else "against", say_outcome(w.test, w.outcome))
            for w in conclusion.weights
        ],
    )
    words = conclude_in_words(conclusion)
    session.text("diagnosis.to_do", escaped(what_to_do(diagnosis, conclusion)))
    session.verdict("diagnosis.settled", None if conclusion.word == "cannot tell" else True, words)
    session.text("diagnosis.conclusion", escaped(words))
