"""Diagnose a case of one's own: from the command line, and for its notebook."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from postmortem.analysis import escaped, shown
from postmortem.case import Case
from postmortem.catalogue import find_entry
from postmortem.errors import CaseError, DiagnosisError
from postmortem.examination import MOST_ROWS, Conclusion, Examination, parse_told
from postmortem.examine import EXAMS, Subject, spread
from postmortem.inputs import choose_rows
from postmortem.likelihoods import HEALTHY
from postmortem.looks import FAMILIES, SERVING, meanings, read_looks
from postmortem.metrics import Estimate
from postmortem.records import Replay
from postmortem.session import Session
from postmortem.world import resolve_world

# What the notebook of a case takes, and the command line unless told otherwise.
TIME_BOX = 10.0
# Causes shown in a terminal.
SHOWN = 6


def examine_session(
    session: Session,
    scratch: Path,
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
        prompt=session.case.asked,
        adapter=world.path("suspect"),
        rows=spread(session.rows, MOST_ROWS),
        base_folder=world.path("base"),
        scratch=scratch,
        reference=world.path("reference") if world.has("reference") else None,
    )
    replays = read_looks().of(Replay)
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
        return examine_session(
            session, Path(scratch, "changed"), minutes=minutes, told=told, report=report
        )


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
        f"not run  {a.exam}: {EXAMS[a.exam].title} (about {say_minutes(a.minutes)}, "
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
    with TemporaryDirectory() as scratch:
        examination, conclusion = examine_session(
            session, Path(scratch), minutes=minutes, report=session.say
        )
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
    folder = str(examination.subject.adapter)  # where it lies differs by machine
    session.table(
        "diagnosis.outcomes",
        OUTCOMES,
        [
            (
                *(step.exam, EXAMS[step.exam].title, step.outcome),
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
            (a.exam, EXAMS[a.exam].title, round(a.bits, 2), math.ceil(a.minutes), a.why)
            for a in conclusion.ahead
        ],
    )
    words = conclude_in_words(conclusion)
    session.verdict("diagnosis.settled", None if conclusion.word == "cannot tell" else True, words)
    session.text("diagnosis.conclusion", escaped(words))
