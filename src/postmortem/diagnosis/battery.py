"""Experiments on any adapter with its base and rows, and the words for how each comes out.

The words mean the same on every base and under every contract of a prompt, so that what was seen
in replays on one base speaks about another: sizes are coarse, and values are told by their form.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.special import log_softmax
from scipy.stats import mannwhitneyu, ttest_1samp

from postmortem.case.rows import Rows
from postmortem.checker.catalogue import Finding, catalogue
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import ModelError
from postmortem.diagnosis.likelihoods import Test
from postmortem.experiments.ask import Answers, System, ask
from postmortem.experiments.metrics import THRESHOLDS, auc, auc_gain_estimate, kl_divergence
from postmortem.experiments.records import Text
from postmortem.experiments.session import Session
from postmortem.models.changes import CHANGES, Change, NothingToChange, copy_changed
from postmortem.models.loading import LoadedBase

# Mean KL in nats: up to the first it is rounding, up to the second no answer changes by it.
NO_EFFECT, FAINT_EFFECT = 1e-6, 1e-2
# An AUC is better, and not by luck alone, when it rises by more than this.
GAIN = 0.1
# Rows that show whether a switched-off adapter leaves the base as it was.
FEW = 4
# One row in twenty may differ and the others still have one value.
ALIKE = 0.95
# So many texts, that come in nine of ten rows, are answers to some question.
FEW_TEXTS, COVERED = 3, 0.9
ANSWER = re.compile(r"\d*\.?\d+\W*|\W*(yes|no)\b.*", re.IGNORECASE | re.DOTALL)
LEVEL = 0.05

# The states in which an adapter is asked; of `FIRST` and `OFF` on few rows.
BASE, FIRST, SAVED, OFF = "base", "base on few rows", "as saved", "off"
EIGHTH, EIGHTFOLD, FLIPPED = "at 1/8", "at 8", "sign flipped"
SHIFTED, REFERENCE = "layers shifted", "reference"
ALONE = (BASE, FIRST)
# What is compared by its whole distribution and not by its answers.
COMPARED = (*ALONE, SAVED, OFF)
# What a base answers; and an adapter, whose texts of another form are held against the base's.
VALUES = ("one value", "varies", "only 0 and 1")
BASE_ANSWERED = (*VALUES, "no value")
ANSWERED = (*VALUES, "as the base", "a tag", "another form", "few texts", "many texts")
ORDERS = ("better", "as the base", "worse", "in reverse", "not finite")


@dataclass(frozen=True)
class Found:
    """How an experiment came out, and what was measured, in words."""

    outcome: str
    measured: str


@dataclass
class Subject:
    """An adapter under examination: what it is asked, on which rows, on which base.

    Without a `base` it is the session's own. Changed copies of the adapter are written below
    `scratch`. What was asked once is kept.
    """

    session: Session
    prompt: str
    adapter: Path
    rows: Rows
    base_folder: Path
    scratch: Path
    reference: Path | None = None
    base: LoadedBase | None = None
    asked: dict[str, Answers] = field(default_factory=dict)
    # Seconds a row of the base alone, and what an adapter adds to them whatever the rows.
    pace: float = 0.0
    overhead: float = 0.0

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What the checker finds, the worst first; notes are left out."""
        report = inspect_adapter(str(self.adapter), str(self.base_folder)).report
        return tuple(f for f in report.findings if f.severity != "info")

    @property
    def labelled(self) -> bool:
        """Whether there are enough rows of either class to see an order."""
        labels = self.rows.labels
        least = THRESHOLDS.rows // 2
        return labels is not None and min(int(labels.sum()), int((1 - labels).sum())) >= least

    def ask(self, state: str) -> Answers:
        """The answers in a state of the adapter; of `FIRST` and `OFF` on the first few rows."""
        if state not in self.asked:
            rows = self.rows.head(FEW) if state in (FIRST, OFF) else self.rows
            start = time.perf_counter()
            answers = self._answer(state, rows)
            self._note_pace(state, time.perf_counter() - start, len(rows))
            if state not in COMPARED:  # a large vocabulary on many rows takes much memory
                answers = replace(answers, first_log_probs=answers.first_log_probs[:, :0])
            self.asked[state] = answers
        return self.asked[state]

    def load(self) -> tuple[Answers, tuple[str, ...]]:
        """The answer to the first row, and what PEFT said while it loaded the adapter."""
        before = len(self.session.records)
        answers = self._answer(SAVED, self.rows.head(1))
        added = self.session.records[before:]
        return answers, tuple(record.text for record in added if isinstance(record, Text))

    def _note_pace(self, state: str, seconds: float, rows: int) -> None:
        if state in (BASE, FIRST):
            self.pace = seconds / rows
        else:
            self.overhead = max(seconds - self.pace * rows, self.overhead)

    def _answer(self, state: str, rows: Rows) -> Answers:
        name = {REFERENCE: "reference"}.get(state, "base" if state in ALONE else "suspect")
        system = System(
            f"{name}_disabled" if state == OFF else name,
            self._folder(state),
            base=self._base(state) or "base",
            off=state == OFF,
        )
        rows_name = f"{len(rows)} rows, {state}"
        answers = ask(self.session, system, self.prompt, rows=rows, rows_name=rows_name)
        if answers.missing:
            raise ModelError(
                self.adapter, expected="an adapter that answers", found=answers.missing
            )
        return answers

    def _base(self, state: str) -> LoadedBase | None:
        """A base of its own where the adapter's file would change the shared one for good."""
        brings = any(finding.id == "base-weights-in-adapter" for finding in self.findings)
        if state in (*ALONE, REFERENCE) or not brings:
            return self.base
        if self.base is not None:
            return replace(self.base, model=deepcopy(self.base.model))
        return None

    def _folder(self, state: str) -> Path | None:
        if state in ALONE:
            return None
        if state == REFERENCE:
            return self.reference
        change = CHANGED.get(state)
        if change is None:
            return self.adapter
        try:
            return copy_changed(self.adapter, self.scratch / state.replace("/", "-"), change)
        except NothingToChange:
            return self.adapter


@dataclass(frozen=True, kw_only=True)
class AdapterTest(Test):
    """A test on an adapter at hand: how it is run, and what it needs.

    `states` are those of the adapter that are asked on all rows; asked before, they cost nothing.
    It may need `labels`, or an adapter whose `effect` can be changed.
    """

    run: Callable[[Subject], Found]
    states: tuple[str, ...] = ()
    labels: bool = False
    effect: bool = False


def why_not(test: str, subject: Subject, known: Mapping[str, str]) -> str:
    """Why a test is not to be had, given the outcomes so far; nothing where it is."""
    chosen = TESTS[test]
    adapted = test == "off" or any(s not in (BASE, REFERENCE) for s in chosen.states)
    if adapted and known.get("load") == "raises":
        return "the adapter does not load"
    if chosen.labels and not subject.labelled:
        return f"it takes labels, of at least {THRESHOLDS.rows // 2} rows of either class"
    if chosen.effect and known.get("effect") in ("none", "not finite"):
        return "the adapter has no effect that could be changed"
    if test == "reference" and subject.reference is None:
        return "no sound adapter is given to compare with"
    return ""


def _inspect(subject: Subject) -> Found:
    found = subject.findings
    if not found:
        return Found("nothing", "no finding")
    return Found(found[0].id, "; ".join(f"{f.id} ({f.evidence})" for f in found[:3]))


def _load(subject: Subject) -> Found:
    if subject.base is None:
        _ = subject.session.base  # an error of the base's is none of the adapter's
    try:
        _, said = subject.load()
    # Whatever it raises is the outcome: PEFT has no list of what it may raise.
    except Exception as error:
        return Found("raises", " ".join(str(error).split())[:300])
    about = [line for line in said if "adapter keys" in line or "mismatched" in line]
    return Found("warns" if about else "silent", " ".join(about[:1])[:300] or "no warning")


def _switch_off(subject: Subject) -> Found:
    alone, off = (subject.ask(state).first_log_probs for state in (FIRST, OFF))
    gap = float(kl_divergence(off, alone).max())
    same = gap <= NO_EFFECT
    return Found("is the base" if same else "is not the base", f"KL {gap:.2g} nat at most")


def _measure_effect(subject: Subject) -> Found:
    both = [_distributions(subject.ask(state)) for state in (SAVED, BASE)]
    if any(np.isnan(part).any() for parts in both for part in parts):
        return Found("not finite", "NaN in the distribution of the answer")
    kl = max(float(kl_divergence(on, off).mean()) for on, off in zip(*both, strict=True))
    limits = {"none": NO_EFFECT, "faint": FAINT_EFFECT, "clear": np.inf}
    word = next((word for word, most in limits.items() if kl <= most), "not finite")
    return Found(word, f"KL {kl:.2g} nat between the answers")


def _distributions(answers: Answers) -> list[np.ndarray]:
    """Log-probabilities of the first token or class, and of the numbers where they are asked."""
    if answers.contract != "number":
        return [answers.first_log_probs]
    return [answers.first_log_probs, log_softmax(answers.number_log_probs, axis=1)]


def _tell_base(subject: Subject) -> Found:
    answers = subject.ask(BASE)
    return Found(classify_values(answers) or "no value", describe_answers(answers))


def _tell_answers(subject: Subject) -> Found:
    answers = subject.ask(SAVED)
    word = classify_values(answers) or _form_of(answers, subject.ask(BASE))
    return Found(word, describe_answers(answers))


def classify_values(answers: Answers) -> str:
    """Whether the values of answers vary; nothing where most are not of the form asked for."""
    values = [decide(value, answers.contract) for value in answers.strict_values]
    given = [value for value in values if value is not None]
    if 2 * len(given) < len(values):
        return ""
    top = Counter(given).most_common(1)[0][1]
    if top >= ALIKE * len(given):
        return "one value"
    if answers.contract == "number" and set(given) <= {0.0, 1.0}:
        return "only 0 and 1"
    return "varies"


def decide(value: float | None, contract: str) -> float | None:
    """A value as it is told apart from others: of a class, whether it is the likelier one."""
    return float(value > 0.5) if contract == "class" and value is not None else value


def _form_of(answers: Answers, alone: Answers) -> str:
    """What answers are that are not of the form asked for."""
    texts, others = ([p.text.strip() for p in found.predictions] for found in (answers, alone))
    if sum(text == other for text, other in zip(texts, others, strict=True)) * 2 > len(texts):
        return "as the base"
    if sum(text.startswith("<") for text in texts) * 2 > len(texts):
        return "a tag"
    if sum(map(_is_answer, texts)) * 2 > len(texts):
        return "another form"
    covered = sum(count for _, count in Counter(texts).most_common(FEW_TEXTS))
    return "few texts" if covered >= COVERED * len(texts) else "many texts"


def _is_answer(text: str) -> bool:
    """Whether a text answers by a number or by Yes or No."""
    return ANSWER.fullmatch(text) is not None


def describe_answers(answers: Answers) -> str:
    """The commonest texts of the answers, with how often they came."""
    if answers.contract == "class":
        values = np.array(answers.strict_values, dtype=float)
        return f"probabilities from {values.min():.2f} to {values.max():.2f}"
    counts = Counter(p.text.strip()[:24] for p in answers.predictions).most_common(3)
    return ", ".join(f"{text!r} {count} times" for text, count in counts)


def _rank_alone(subject: Subject) -> Found:
    found = tell_order(subject.rows.labels, _odds(subject, BASE))
    return Found("ranks" if found.outcome == "ranks" else "does not rank", found.measured)


def _compare_order(subject: Subject) -> Found:
    """The order of the rows with the adapter against that of the base alone."""
    labels, on, off = subject.rows.labels, _odds(subject, SAVED), _odds(subject, BASE)
    assert labels is not None
    if not np.isfinite([on, off]).all():
        return Found("not finite", "log-odds that are not finite")
    gain, order = auc_gain_estimate(labels, on, off), tell_order(labels, on)
    assert gain.low is not None
    assert gain.high is not None
    measured = f"{order.measured}; against the base {gain.low:+.2f} to {gain.high:+.2f}"
    if gain.low > 0:
        return Found("better", measured)
    if gain.high < 0:
        return Found("in reverse" if order.outcome == "ranks in reverse" else "worse", measured)
    return Found("as the base", measured)


def _odds(subject: Subject, state: str) -> np.ndarray:
    return np.array(subject.ask(state).log_odds, dtype=float)


def writes_order(subject: Subject) -> Found | None:
    """Whether what is written with the adapter orders the rows; None where it was not asked."""
    if SAVED not in subject.asked or not subject.labelled:
        return None
    return tell_order(subject.rows.labels, written_scores(subject.ask(SAVED)))


def tell_order(labels: np.ndarray | None, scores: np.ndarray) -> Found:
    """Whether scores order the rows, by a two-sided rank test at 5 %."""
    assert labels is not None
    if not np.isfinite(scores).all():
        return Found("not finite", "log-odds that are not finite")
    found = auc(labels, scores) or 0.0
    p = float(mannwhitneyu(scores[labels == 1], scores[labels == 0]).pvalue)
    measured = f"AUC {found:.2f}, p {p:.2g}"
    if not p < LEVEL:
        return Found("does not rank", measured)
    return Found("ranks" if found > THRESHOLDS.chance else "ranks in reverse", measured)


def written_scores(answers: Answers) -> np.ndarray:
    """What is written, as scores; an answer of another form says nothing either way."""
    return np.array([0.5 if v is None else v for v in answers.strict_values], dtype=float)


def _try_scales(subject: Subject) -> Found:
    labels = subject.rows.labels
    assert labels is not None
    states = {"no better": SAVED, "better at 1/8": EIGHTH, "better at 8": EIGHTFOLD}
    found = {w: auc(labels, written_scores(subject.ask(s))) or 0.0 for w, s in states.items()}
    measured = ", ".join(f"{states[word]} {value:.2f}" for word, value in found.items())
    return Found(choose_scale(found), f"AUC of what is written: {measured}")


def choose_scale(aucs: Mapping[str, float]) -> str:
    """The scale at which the values rank best, by its word; another must be better by `GAIN`."""
    return max(aucs, key=lambda word: aucs[word] - (GAIN if word != "no better" else 0.0))


def _find_home(subject: Subject) -> Found:
    """Whether the adapter moves the log-odds the right way, and only as it was saved."""
    labels = subject.rows.labels
    assert labels is not None
    odds = {state: _odds(subject, state) for state in (SAVED, FLIPPED, SHIFTED)}
    if not np.isfinite([*odds.values()]).all():
        return Found("not finite", "log-odds that are not finite")
    side = np.where(labels == 1, 1.0, -1.0)
    means = ", ".join(f"{s} {(side * values).mean():+.2f}" for s, values in odds.items())
    word = decide_home(labels, odds[SAVED], others=(odds[FLIPPED], odds[SHIFTED]))
    return Found(word, f"mean log-odds of the true answer: {means}")


def decide_home(labels: np.ndarray, saved: np.ndarray, *, others: Sequence[np.ndarray]) -> str:
    """Whether log-odds with the adapter as saved favour the truth more than with changed copies.

    An adapter made for this base gains on the labels more than the same adapter with its sign
    flipped, or with its layers shifted by one: all three have the same norms.
    """
    side = np.where(labels == 1, 1.0, -1.0)
    at_home = all(_exceeds(side * saved, side * other) for other in others)
    return "at home" if at_home else "not at home"


def _exceeds(values: np.ndarray, others: np.ndarray) -> bool:
    """Whether paired values are larger in the mean, by a one-sided t-test."""
    gaps = values - others
    if not np.ptp(gaps):  # all the same, of which the test would only warn
        return bool(gaps[0] > 0)
    return bool(ttest_1samp(gaps, 0.0, alternative="greater").pvalue < LEVEL)


def _try_reference(subject: Subject) -> Found:
    found = tell_order(subject.rows.labels, written_scores(subject.ask(REFERENCE)))
    return Found("works" if found.outcome == "ranks" else "does not work", found.measured)


# The changes of the adapter behind its states.
CHANGED: Mapping[str, Change] = {
    EIGHTH: CHANGES["eighth"],
    EIGHTFOLD: CHANGES["eightfold"],
    FLIPPED: CHANGES["flipped"],
    SHIFTED: CHANGES["shifted"],
}
# In the order in which an engineer would: the files, the controls, and what takes more.
TESTS: Mapping[str, AdapterTest] = {
    "inspect": AdapterTest(
        "check the adapter's files against the base",
        ("nothing", *catalogue()),
        pooled=True,
        run=_inspect,
    ),
    "load": AdapterTest(
        "load the adapter and read what PEFT says of the weights",
        ("silent", "warns", "raises"),
        pooled=True,
        run=_load,
    ),
    "base-alone": AdapterTest(
        "ask the base without the adapter", BASE_ANSWERED, run=_tell_base, states=(BASE,)
    ),
    "base-ranks": AdapterTest(
        "rank the rows by the base's log-odds",
        ("ranks", "does not rank"),
        run=_rank_alone,
        states=(BASE,),
        labels=True,
    ),
    "answers": AdapterTest(
        "ask with the adapter", ANSWERED, run=_tell_answers, states=(BASE, SAVED)
    ),
    "effect": AdapterTest(
        "compare the answers with the adapter and without",
        ("none", "faint", "clear", "not finite"),
        run=_measure_effect,
        states=(BASE, SAVED),
    ),
    "off": AdapterTest(
        "switch the adapter off and compare with the base",
        ("is the base", "is not the base"),
        run=_switch_off,
    ),
    "order": AdapterTest(
        "rank the rows by the log-odds with the adapter, and hold that against the base",
        ORDERS,
        run=_compare_order,
        states=(BASE, SAVED),
        labels=True,
    ),
    "scale": AdapterTest(
        "scale the adapter to an eighth, and eightfold",
        ("no better", "better at 1/8", "better at 8"),
        run=_try_scales,
        states=(SAVED, EIGHTH, EIGHTFOLD),
        labels=True,
        effect=True,
    ),
    "home": AdapterTest(
        "hold it against its own sign flipped and its layers shifted",
        ("at home", "not at home", "not finite"),
        run=_find_home,
        states=(SAVED, FLIPPED, SHIFTED),
        labels=True,
        effect=True,
    ),
    "reference": AdapterTest(
        "put a sound adapter through the same steps",
        ("works", "does not work"),
        run=_try_reference,
        states=(REFERENCE,),
        labels=True,
    ),
}


def spread(rows: Rows, count: int) -> Rows:
    """At most `count` rows, evenly spread; as many of either class as there are, where known."""
    if count >= len(rows):
        return rows
    places = np.arange(len(rows))
    if rows.labels is None:
        chosen = _evenly(places, count)
    else:
        small, large = sorted((places[rows.labels == label] for label in (0, 1)), key=len)
        few = min(count // 2, len(small))
        chosen = sorted(_evenly(small, few) + _evenly(large, count - few))
    frame = rows.frame.iloc[chosen].reset_index(drop=True)
    labels = None if rows.labels is None else rows.labels[chosen]
    ids, groups = (tuple(kind[i] for i in chosen) for kind in (rows.ids, rows.groups))
    return Rows(rows.source, frame, ids, groups, labels)


def _evenly(places: np.ndarray, count: int) -> list[int]:
    return [int(places[int(i)]) for i in np.linspace(0, len(places) - 1, count).round()]
