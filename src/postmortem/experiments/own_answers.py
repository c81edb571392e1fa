"""What the systems of a case of one's own answer."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from postmortem.checker.errors import ModelError, printable
from postmortem.experiments.analysis import (
    NO_LABELS,
    NO_OP,
    ONE_CLASS,
    SHOWN,
    escaped,
    judge_knowing,
    shown,
)
from postmortem.experiments.controls import judge_gain
from postmortem.experiments.health import Health, describe
from postmortem.experiments.metrics import (
    Estimate,
    auc_estimate,
    auc_gain_estimate,
    kl_divergence,
    mean_estimate,
    rate_estimate,
    say_estimate,
)
from postmortem.experiments.records import Cell, Measure
from postmortem.experiments.session import Answers, Session
from postmortem.models.loading import footprint

# Each the control of the next.
SYSTEMS = {
    "base": "base alone",
    "suspect_disabled": "suspect, off",
    "suspect": "suspect",
    "reference": "reference",
}
# The factor by which two of the changed copies scale the suspect's update.
FACTOR = 8
# Changed copies of the suspect.
COPIES = {
    "zero_b": "lora_B zero",
    "flipped": "sign flipped",
    "turned": "layers turned",
    "eighth": f"scale ÷{FACTOR}",
    "eightfold": f"scale ×{FACTOR}",
}

DISTRIBUTION = (
    *("distinct", "top_value", "top_share", "tied_pairs"),
    *("mean", "std", "minimum", "maximum"),
)
RANKING = ("auc_written", "auc")
EFFECT = ("kl", "shift", "flips")
GAINS = ("gain_written", "gain")
# The prompt that the case asks first goes by this key, so that a page need not know its name.
ASKED = "asked"
UNKNOWN = Estimate(None, None, None, 0)
UNREAD = "no answer could be read"
# Groups that a table lists, the first ones.
GROUPS = 20
VALUES = ("system", "read", "distinct", "commonest", "share", "mean", "AUC, written")
CHANGES = ("system", "KL, nat", "change of log-odds, nat", "values changed", "AUC, log-odds")

# PEFT's line on a tensor of another shape: its name, its shape, and the base's.
MISFIT = re.compile(
    r"size mismatch for (?:base_model\.model\.)?(\S+?): copying a param with shape "
    r"torch\.Size\(\[([\d, ]*)\]\).*?torch\.Size\(\[([\d, ]*)\]\)",
    re.DOTALL,
)
# What a system answered, or why it did not.
Outcome = Answers | str


def record_answers(session: Session) -> None:
    """Put each prompt to each system and record what came back."""
    said: dict[str, dict[str, Outcome]] = {}
    for prompt in session.case.prompts:
        key = key_of(session, prompt)
        found = {"base": ask(session, prompt)}
        record_system(session, f"{key}.base", found["base"], base=found["base"])
        for system in [name for name in SYSTEMS if name != "base"]:
            answers = ask(session, prompt, system=system)
            record_system(session, f"{key}.{system}", answers, base=found["base"])
            _judge_off(session, f"{key}.{system}", answers, base=found["base"])
            if session.world.has(system.removesuffix("_disabled")):
                # One base and one system are held at a time: their distributions are large.
                found[system] = without_distributions(answers)
        _record_tables(session, key, found)
        said[prompt] = {**found, "base": without_distributions(found["base"])}
    _record_overview(session, said)


def key_of(session: Session, prompt: str) -> str:
    """Where a prompt's numbers are recorded: the first one's where pages look for them."""
    return ASKED if prompt == session.case.asked else f"answers.{prompt}"


def ask(
    session: Session,
    prompt: str,
    *,
    system: str = "base",
    adapter: Path | None = None,
    kept: bool = True,
) -> Outcome:
    """A system's answers to a prompt, or the reason why there are none.

    An adapter that does not load, and answers that are not finite, are findings and no errors. An
    adapter that has changed the base's own weights does not reach those that come after it.
    """
    role = system.removesuffix("_disabled")
    if adapter is None and not session.world.has(role):
        return session.world.members[role].reason
    try:
        before = footprint(session.base.model)
    except ModelError as error:
        # How many classes a classifier has is read from the suspect's file.
        if not session.case.classifies:
            raise
        return say_refusal(error)
    try:
        answers = session.answer(
            prompt, system=role, adapter=adapter, disabled=role != system, kept=False
        )
    except ModelError as error:
        if role == "base":
            raise
        return say_refusal(error)
    finally:
        if footprint(session.base.model) != before:
            vars(session).pop("shared", None)
            step = f"load base after {system} on {prompt}"
            vars(session)["base"] = session.load("base", step=step)
    broken = int((~np.isfinite(answers.asked_log_odds)).sum())
    if broken:
        return f"log-odds that are not finite on {broken} of {len(answers.predictions)} rows"
    session.records += answers.predictions if kept else ()
    return answers


def say_refusal(error: ModelError) -> str:
    """Why an adapter did not load, in a line; the folder, which differs by machine, is left out.

    Of tensors that do not fit the first is named, in place of PEFT's line on each.
    """
    misfits = MISFIT.findall(error.found)
    if misfits:
        name, held, wanted = misfits[0]
        first = f"{name} is ({held}) in the file and ({wanted}) on the base"
        return printable(f"it does not load: {len(misfits)} tensor(s) do not fit, {first}", 200)
    told = f"it does not load: expected {error.expected}, found {error.found}"
    return printable(" ".join(told.split()), 200)


@dataclass(frozen=True)
class Description:
    """A system's numbers on one prompt.

    `health` describes the values that could be read and is None where none could. `auc_written`
    ranks by these, `auc` by the log-odds of what is asked for; `unranked` says why there is none.
    """

    read: Estimate
    health: Health | None
    auc_written: Estimate
    auc: Estimate
    unranked: str


def describe_answers(answers: Answers) -> Description:
    """Describe answers by themselves."""
    values = answers.strict_values
    read = [index for index, value in enumerate(values) if value is not None]
    labels = answers.labels
    unranked = NO_LABELS if labels is None else ONE_CLASS
    written = [value for value in values if value is not None]
    return Description(
        read=rate_estimate(len(read), len(values)),
        health=describe(values, groups=answers.groups, labels=labels) if read else None,
        auc_written=UNKNOWN if labels is None else auc_estimate(labels[read], written),
        auc=UNKNOWN if labels is None else auc_estimate(labels, answers.asked_log_odds),
        unranked=unranked,
    )


def compare(answers: Answers, base: Answers) -> dict[str, Estimate]:
    """How far answers lie from the base's on the same rows, by the names in `EFFECT`.

    `kl` is KL(system || base) in nats: over the eleven numbers where a number is asked for, over
    the first token or the classes elsewhere. A classifier's value changes with its class.
    """
    changed = sum(a != b for a, b in zip(_decisions(answers), _decisions(base), strict=True))
    return {
        "kl": mean_estimate(kl_divergence(_log_probs(answers), _log_probs(base))),
        "shift": mean_estimate(np.subtract(answers.asked_log_odds, base.asked_log_odds)),
        "flips": rate_estimate(changed, len(base.predictions)),
    }


def _decisions(answers: Answers) -> list[float | None]:
    """What each answer says; of a classifier's probability, on which side of one half it lies."""
    if answers.contract != "class":
        return answers.strict_values
    return [None if value is None else float(value > 0.5) for value in answers.strict_values]


def _log_probs(answers: Answers) -> np.ndarray:
    if answers.contract == "number":
        return log_softmax(answers.number_log_probs, axis=1)
    return answers.first_log_probs


def gains(answers: Answers, base: Answers) -> dict[str, Estimate]:
    """What a system's ranking has over the base's, by the names in `GAINS`.

    By what is written only where every answer of both could be read.
    """
    labels = answers.labels
    if labels is None:
        return dict.fromkeys(GAINS, UNKNOWN)
    after, before = answers.strict_values, base.strict_values
    written = UNKNOWN
    if None not in after and None not in before:
        written = auc_gain_estimate(labels, after, before)  # type: ignore[arg-type]
    odds = auc_gain_estimate(labels, answers.asked_log_odds, base.asked_log_odds)
    return {"gain_written": written, "gain": odds}


def record_system(session: Session, key: str, answers: Outcome, *, base: Outcome) -> None:
    """Record one system's numbers and verdicts under a key, or everywhere why there are none."""
    is_base = key.endswith(".base")
    if isinstance(answers, str) or isinstance(base, str):
        reason = answers if isinstance(answers, str) else str(base)
        _record_none(session, key, reason=reason, is_base=is_base)
        return
    found = describe_answers(answers)
    session.measure(f"{key}.rows", len(answers.predictions), unit="rows")
    session.measure(f"{key}.read", found.read)
    for name in DISTRIBUTION:
        value = None if found.health is None else getattr(found.health, name)
        session.measure(f"{key}.{name}", value, reason=UNREAD)
    session.measure(f"{key}.auc", found.auc, reason=found.unranked)
    why = found.unranked if found.health is not None else UNREAD
    session.measure(f"{key}.auc_written", found.auc_written, reason=why)
    session.text(f"{key}.commonest_text", escaped(_commonest(answers)[0]))
    if found.health is None:
        session.verdict(f"{key}.constant", None, UNREAD)
    else:
        told = f"{found.health.distinct} distinct value(s) in the answers that could be read"
        session.verdict(f"{key}.constant", found.health.constant, told)
    word, because = judge_knowing(found.auc, said=found.auc_written, unranked=why)
    session.verdict(f"{key}.knowing", word, because)
    if not is_base:
        _record_effect(session, key, answers, base=base)


def _record_effect(session: Session, key: str, answers: Answers, *, base: Answers) -> None:
    effect, found = compare(answers, base), gains(answers, base)
    for name, value in effect.items():
        session.measure(f"{key}.{name}", value, unit="" if name == "flips" else "nat")
    why = NO_LABELS if answers.labels is None else ONE_CLASS
    for name, value in found.items():
        reason = why if name == "gain" or answers.labels is None else "answers that are not read"
        session.measure(f"{key}.{name}", value, reason=reason)
    told = (
        f"KL to the base alone {effect['kl'].value:.3g} nat, "
        f"{effect['flips'].value:.0%} of the values differ"
    )
    session.verdict(f"{key}.moves_base", (effect["kl"].value or 0.0) > NO_OP, told)
    session.verdict(f"{key}.ranks_better", *judge_gain(found["gain"], why))


def _record_none(session: Session, key: str, *, reason: str, is_base: bool) -> None:
    names = ("rows", "read", *DISTRIBUTION, *RANKING, *(() if is_base else (*EFFECT, *GAINS)))
    for name in names:
        session.measure(f"{key}.{name}", None, reason=reason)
    session.text(f"{key}.commonest_text", "not available")
    for name in ("constant", "knowing", *(() if is_base else ("moves_base", "ranks_better"))):
        session.verdict(f"{key}.{name}", "not available", reason)


def _judge_off(session: Session, key: str, answers: Outcome, *, base: Outcome) -> None:
    """Whether an adapter that is switched off leaves the base's answers to the last bit."""
    if not key.endswith("_disabled"):
        return
    if isinstance(answers, str) or isinstance(base, str):
        reason = answers if isinstance(answers, str) else str(base)
        session.verdict(f"{key}.is_base", "not available", reason)
        return
    differing = sum(
        p.token_ids != q.token_ids or not np.array_equal(after, before)
        for p, q, after, before in zip(
            answers.predictions,
            base.predictions,
            answers.first_log_probs,
            base.first_log_probs,
            strict=True,
        )
    )
    total = len(base.predictions)
    because = f"{differing} of {total} answers differ in a token or in a log-probability"
    session.verdict(f"{key}.is_base", differing == 0, because)


def _commonest(answers: Answers) -> tuple[str, int]:
    return Counter(p.text for p in answers.predictions).most_common(1)[0]


def without_distributions(answers: Outcome) -> Outcome:
    """The same answers without what takes most of their room: a number for each token."""
    if isinstance(answers, str):
        return answers
    none = np.empty((len(answers.predictions), 0))
    return replace(answers, first_log_probs=none, number_log_probs=none)


def _record_tables(session: Session, key: str, found: Mapping[str, Outcome]) -> None:
    """The systems side by side on one prompt: their values, and the first rows."""
    session.table(f"{key}.values", VALUES, [_say_values(s, a) for s, a in found.items()])
    present = {s: a for s, a in found.items() if not isinstance(a, str)}
    rows = session.rows
    text = session.case.columns.text
    table = [
        (
            rows.ids[index],
            "unknown" if rows.labels is None else int(rows.labels[index]),
            shown(rows.row(index)[text], limit=160),
            *(shown(answers.predictions[index].text, limit=40) for answers in present.values()),
        )
        for index in range(min(SHOWN, len(rows)))
    ]
    columns = ("row", "truth", "text", *(SYSTEMS[system] for system in present))
    session.table(f"{key}.first_rows", columns, table)
    names = list(dict.fromkeys(rows.groups))[:GROUPS]
    columns = ("group", "rows", *(SYSTEMS[system] for system in present))
    session.table(f"{key}.groups", columns, [_say_group(name, present) for name in names])


def _say_group(name: str, answers: Mapping[str, Answers]) -> tuple[Cell, ...]:
    """How well each system's log-odds rank the rows of one group."""
    cells, count = [], 0
    for found in answers.values():
        chosen = np.array(found.groups) == name
        count, labels = int(chosen.sum()), found.labels
        known = UNKNOWN
        if labels is not None:
            known = auc_estimate(labels[chosen], np.array(found.asked_log_odds)[chosen])
        cells.append(say_estimate(known))
    return shown(name, limit=40), count, *cells


def _say_values(system: str, answers: Outcome) -> tuple[Cell, ...]:
    name = SYSTEMS[system]
    if isinstance(answers, str):
        return name, "not available", None, answers.partition(":")[0], None, None, None
    found, (text, count) = describe_answers(answers), _commonest(answers)
    total, health = len(answers.predictions), found.health
    return (
        name,
        f"{round((found.read.value or 0) * total)} of {total}",
        0 if health is None else health.distinct,
        shown(text, limit=40),
        f"{count / total:.0%}",
        None if health is None else round(health.mean, 3),
        say_estimate(found.auc_written),
    )


def _record_overview(session: Session, said: Mapping[str, Mapping[str, Outcome]]) -> None:
    """One row a prompt and system: effect and ranking, from what has been recorded."""
    rows = [
        (
            f"{prompt}: {SYSTEMS[system]}" if len(said) > 1 else SYSTEMS[system],
            *(
                say_recorded(session, f"{key_of(session, prompt)}.{system}.{name}")
                for name in (*EFFECT, "auc")
            ),
        )
        for prompt, found in said.items()
        for system in found
    ]
    session.table("answers.changes", CHANGES, rows)


def say_recorded(session: Session, key: str) -> str:
    """A recorded measure with its interval, for a table; a dash where it is not recorded."""
    found = next((r for r in session.records if isinstance(r, Measure) and r.key == key), None)
    if found is None:
        return "–"
    # A divergence may be of any size, and one too small for two decimals is not none.
    form = ".2g" if key.endswith(".kl") else "z.2f"
    return say_estimate(Estimate(found.value, found.low, found.high, 0), form)
