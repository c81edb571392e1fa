"""A diagnosis as text for a terminal."""

from collections.abc import Iterator, Sequence

from postmortem.beliefs import Inquiry
from postmortem.causes import CAUSES
from postmortem.diagnosis import Evidence
from postmortem.planner import Plan
from postmortem.symptom import TESTS

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
