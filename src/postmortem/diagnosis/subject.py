"""A subject under test: a run of a model, what it is asked, and how each test is run.

The adapter stays on its base from one question to the next, and is changed in memory. What was
asked once is kept.
"""

import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from scipy.special import log_softmax
from scipy.stats import mannwhitneyu, ttest_1samp

from postmortem.case.prompts import Prompt, encode_rows, parse_strict
from postmortem.case.rows import Rows
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import Finding, ModelError
from postmortem.diagnosis.battery import (
    ALONE,
    BASE,
    EIGHTFOLD,
    EIGHTH,
    FIRST,
    FLIPPED,
    NO_ANSWER,
    OFF,
    REFERENCE,
    SAVED,
    SHIFTED,
    STARTED,
    TESTS,
)
from postmortem.diagnosis.causes import Run
from postmortem.experiments.ask import Answers, NoAnswer, PutOn, System, put_on, score_rows
from postmortem.experiments.metrics import (
    THRESHOLDS,
    auc,
    auc_gain_estimate,
    describe,
    kl_divergence,
)
from postmortem.experiments.session import Session
from postmortem.models.changes import CHANGES, NothingToChange, changed_in_memory
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
# The name under which PEFT loads an adapter that is given none.
ADAPTER = "default"
# The change of the adapter behind a state.
CHANGED = {EIGHTH: "eighth", EIGHTFOLD: "eightfold", FLIPPED: "flipped", SHIFTED: "shifted"}
# What is compared by its whole distribution and not by its answers.
COMPARED = (*ALONE, SAVED, OFF)
# States of which the log-odds alone are looked at, not what is written.
UNWRITTEN = (FIRST, STARTED, OFF, FLIPPED, SHIFTED)
# States that are asked on a few rows.
ON_FEW = (FIRST, STARTED, OFF)


@dataclass(frozen=True)
class Outcome:
    """How a test came out, and what was measured, in words."""

    word: str
    measured: str = ""


@dataclass
class Subject:
    """A run under test, for the length of a `with`: what it is asked, on which rows.

    `base_folder` is what the checker compares the adapter's files with, `base_name` the name that
    its config should bear, and `published` the base as it was before anything was done to it.
    `asked` may be given what other subjects have asked of the same base.
    """

    session: Session
    run: Run
    prompt: str
    rows: Rows
    base_folder: Path
    base_name: str = ""
    reference: Path | None = None
    published: LoadedBase | None = None
    asked: dict[tuple[str, str], Answers] = field(default_factory=dict)
    # Seconds a row of the base alone, and what an adapter adds to them whatever the rows.
    pace: float = 0.0
    overhead: float = 0.0
    # What is on the base now, and how it is taken off.
    on: str = ""
    answering: PutOn | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    encoded: dict[tuple[str, tuple[str, ...]], list[Prompt]] = field(default_factory=dict)

    def __enter__(self) -> "Subject":
        return self

    def __exit__(self, *_: object) -> None:
        self._take_off()

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What the checker finds, the worst first; notes are left out."""
        report = inspect_adapter(str(self.run.adapter), str(self.base_folder)).report
        return tuple(finding for finding in report.findings if finding.severity != "info")

    @cached_property
    def differed(self) -> bool:
        """Whether the base had other weights than the published one before anything was put on."""
        return self.differs()

    def differs(self) -> bool:
        """Whether the base has other weights than the published one now, beyond its dtype."""
        if self.published is None or not isinstance(self.run.base, LoadedBase):
            return False
        published = self.published.model.state_dict()
        return not all(
            torch.allclose(weights.float(), published[name].float(), rtol=2e-3, atol=1e-4)
            for name, weights in self.run.base.model.state_dict().items()
            if name in published
        )

    @property
    def contract(self) -> str:
        """What the prompt asks for."""
        return self.session.case.prompt(self.prompt).contract

    @property
    def labels(self) -> np.ndarray:
        """The truth; only where the subject is `labelled`."""
        assert self.rows.labels is not None
        return self.rows.labels

    @property
    def labelled(self) -> bool:
        """Whether there are enough rows of either class to see an order."""
        labels = self.rows.labels
        least = THRESHOLDS.rows // 2
        return labels is not None and min(int(labels.sum()), int((1 - labels).sum())) >= least

    @cached_property
    def few(self) -> Rows:
        """The first rows, which stay the same where fewer or others are taken later."""
        return self.rows.head(FEW)

    def ask(self, state: str, prompt: str = "") -> Answers:
        """The answers in a state; of `FIRST` and `OFF` on a few rows."""
        chosen = prompt or self.prompt
        if self.run.adapter is None and state not in (*ALONE, REFERENCE):
            state = FIRST if state in ON_FEW else BASE
        if (state, chosen) not in self.asked:
            rows = self.few if state in ON_FEW else self.rows
            _ = self._base()  # loading it is no part of the pace
            start = time.perf_counter()
            answers = self._answer(state, chosen, rows)
            self._note_pace(state, time.perf_counter() - start, len(rows))
            if state not in COMPARED:  # a large vocabulary on many rows takes much memory
                answers = replace(answers, first_log_probs=answers.first_log_probs[:, :0])
            self.asked[state, chosen] = answers
        return self.asked[state, chosen]

    def has_asked(self, state: str) -> bool:
        """Whether the answers in a state are known already."""
        return (state, self.prompt) in self.asked

    def values(self, state: str, prompt: str = "") -> list[float | None]:
        """What is answered, by the run's parser, or strictly where it has none."""
        answers = self.ask(state, prompt)
        if self.run.parse is None:
            return answers.strict_values
        return [self.run.parse(prediction.text) for prediction in answers.predictions]

    def written(self, state: str) -> np.ndarray:
        """What is written, as scores; an answer of another form says nothing either way."""
        values = self.values(state)
        return np.array([0.5 if value is None else value for value in values], dtype=float)

    def log_odds(self, state: str) -> np.ndarray:
        """Log-odds of what the prompt asks for, a row each."""
        return np.array(self.ask(state).log_odds, dtype=float)

    def load(self) -> PutOn:
        """The run's model with its adapter on; `ModelError` where it does not load."""
        return self._put_on(SAVED)

    def encode(self, prompt: str, rows: Rows) -> list[Prompt]:
        """The rows as this run sends them."""
        key = (prompt, rows.ids)
        if key not in self.encoded:
            prompts, tokenizer = self.encode_plainly(prompt, rows), self._base().tokenizer
            rewrite = self.run.rewrite
            self.encoded[key] = [rewrite(p, tokenizer) for p in prompts] if rewrite else prompts
        return self.encoded[key]

    def encode_plainly(self, prompt: str, rows: Rows) -> list[Prompt]:
        """The rows as the case would send them."""
        limit = self.session.case.decoding(prompt).max_prompt_tokens
        template, tokenizer = self.session.case.prompt(prompt), self._base().tokenizer
        return encode_rows(template, rows, tokenizer=tokenizer, limit=limit)

    def _note_pace(self, state: str, seconds: float, rows: int) -> None:
        if state in ALONE:
            self.pace = seconds / rows
        else:
            self.overhead = max(seconds - self.pace * rows, self.overhead)

    def _answer(self, state: str, prompt: str, rows: Rows) -> Answers:
        answering = self._put_on(state)
        with ExitStack() as changes:
            if state == OFF and self.run.status != "disabled":
                changes.enter_context(answering.model.disable_adapter())
            if state in CHANGED:
                change = changed_in_memory(answering.model, CHANGES[CHANGED[state]])
                try:
                    changes.enter_context(change)
                except NothingToChange:
                    return self.ask(SAVED, prompt)
            return self._score(answering, state, prompt, rows)

    def _score(self, answering: PutOn, state: str, prompt: str, rows: Rows) -> Answers:
        return score_rows(
            self.session,
            answering,
            state,
            prompt,
            rows=rows,
            prompts=self.encode(prompt, rows),
            max_new_tokens=1 if state in UNWRITTEN else 0,
        )

    def _base(self) -> LoadedBase:
        base = self.run.base
        return self.session.load(base) if isinstance(base, str) else base

    def _put_on(self, state: str) -> PutOn:
        """What answers in a state: the base alone, the reference, or the run's own adapter."""
        alone = state in ALONE or (self.run.adapter is None and state != REFERENCE)
        wanted = BASE if alone else REFERENCE if state == REFERENCE else SAVED
        if self.answering is not None and wanted == self.on:
            return self.answering
        if wanted != BASE:
            # What the base says and is by itself is seen before anything was on it.
            self.ask(FIRST)
            _ = self.differed
        self._take_off()
        system = self._system(wanted)
        try:
            answering = self.stack.enter_context(put_on(self.session, system))
        except NoAnswer as why:
            raise ModelError(
                str(system.adapter), expected="an adapter that loads", found=str(why)
            ) from None
        if wanted == SAVED:
            set_status(answering, self.run)
        # A CPU multiplies half precision by half precision alone.
        if answering.base.dtype == "float16" and answering.base.device == "cpu":
            answering.model.half()
        self.answering, self.on = answering, wanted
        return answering

    def _system(self, wanted: str) -> System:
        adapter = {BASE: None, REFERENCE: self.reference, SAVED: self.run.adapter}[wanted]
        ignored = wanted == SAVED and self.run.ignore_mismatched_sizes
        return System(wanted, adapter, base=self.run.base, ignore_mismatched_sizes=ignored)

    def _take_off(self) -> None:
        self.answering, self.on = None, ""
        self.stack.close()


def set_status(answering: PutOn, run: Run) -> None:
    """Leave the adapter answering, disabled, or with another one active in its place."""
    if run.status == "another":
        answering.model.add_adapter("another", LoraConfig(r=4, target_modules=["q_proj"]))
        answering.model.set_adapter("another")
    elif run.status == "disabled":
        answering.model.base_model.disable_adapter_layers()


def why_not(test: str, subject: Subject, known: Mapping[str, str]) -> str:
    """Why a test is not to be had, given the outcomes so far; nothing where it is."""
    needed = TESTS[test]
    if needed.loaded and known.get("load") == "raises":
        return "the adapter does not load"
    if needed.labels and not subject.labelled:
        return f"it takes labels, of at least {THRESHOLDS.rows // 2} rows of either class"
    if needed.effect and known.get("effect") in ("none", "not finite"):
        return "the adapter has no effect that could be changed"
    if test == "reference" and subject.reference is None:
        return "no sound adapter is given to compare with"
    return ""


def run_test(test: str, subject: Subject) -> Outcome:
    """Run one test of the battery; its word is one of the test's outcomes."""
    return RUN[test](subject)


def run_tests(tests: Sequence[str], subject: Subject) -> dict[str, str]:
    """The outcome of each of the tests that is to be had, in their order."""
    outcomes: dict[str, str] = {}
    for test in tests:
        if not why_not(test, subject, outcomes):
            outcomes[test] = run_test(test, subject).word
        elif outcomes.get("load") == "raises" and NO_ANSWER in TESTS[test].outcomes:
            outcomes[test] = NO_ANSWER
    return outcomes


def _inspect(subject: Subject) -> Outcome:
    if subject.run.adapter is None:
        return Outcome("no adapter")
    found = subject.findings
    if not found:
        return Outcome("nothing", "no finding")
    return Outcome(found[0].id, "; ".join(f"{f.id} ({f.evidence})" for f in found[:3]))


def _compare_names(subject: Subject) -> Outcome:
    if subject.run.adapter is None:
        return Outcome("no adapter")
    file = subject.run.adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    same = config["base_model_name_or_path"] == subject.base_name
    return Outcome("the same" if same else "another")


def _compare_prompts(subject: Subject) -> Outcome:
    run = subject.run
    if run.rewrite is None:
        return Outcome("whole")
    sent, meant = (
        [prompt.token_ids for prompt in encoded(subject.prompt, subject.rows)]
        for encoded in (subject.encode, subject.encode_plainly)
    )
    if sent == meant:
        return Outcome("whole")
    is_cut = all(ids == whole[: len(ids)] for ids, whole in zip(sent, meant, strict=True))
    return Outcome("cut" if is_cut else "another markup")


def _load(subject: Subject) -> Outcome:
    # An error of the base's is none of the adapter's.
    subject.ask(FIRST)
    try:
        answering = subject.load()
        subject.ask(STARTED)
    except ModelError as error:
        return Outcome("raises", error.found[:300])
    # Whatever it raises is the outcome: PEFT has no list of what it may raise.
    except Exception as error:
        return Outcome("raises", " ".join(str(error).split())[:300])
    said = warnings_of_weights(answering)
    return Outcome("warns" if said else "silent", " ".join(said[:1])[:300] or "no warning")


def warnings_of_weights(answering: PutOn) -> list[str]:
    """What PEFT said of the weights while it loaded them."""
    return [said for said in answering.warnings if "adapter keys" in said or "mismatched" in said]


def _ask_status(subject: Subject) -> Outcome:
    """Whether the adapter answers, as PEFT tells it: enabled, and no other one in its place."""
    if subject.run.adapter is None:
        return Outcome("none")
    status = subject.load().model.get_model_status()
    answers = status.enabled is True and status.active_adapters == [ADAPTER]
    active = ", ".join(status.active_adapters) or "none"
    return Outcome("active" if answers else "inactive", f"active: {active}")


def _tell_base(subject: Subject) -> Outcome:
    word = classify_values(subject.values(BASE), subject.contract)
    return Outcome(word or "no value", describe_answers(subject.ask(BASE)))


def _rank_alone(subject: Subject) -> Outcome:
    found = tell_order(subject.labels, subject.log_odds(BASE))
    return replace(found, word="ranks" if found.word == "ranks" else "does not rank")


def _ask_prompt(name: str) -> Callable[[Subject], Outcome]:
    def run(subject: Subject) -> Outcome:
        attempt = subject.session.case.attempts[name]
        values = [
            0.0 if value is None else value for value in subject.values(SAVED, attempt.prompt)
        ]
        return Outcome(classify_symptom(values, attempt.reported_value))

    return run


def classify_symptom(values: Sequence[float], reported: float) -> str:
    """The symptom that values have: all the reported one, all another, or how they vary."""
    health = describe(values, groups=["all"] * len(values))
    if health.constant:
        return "all 0.0" if health.top_value == reported else "one other value"
    return "mostly one value" if health.top_share > THRESHOLDS.top_share else "varies"


def _classify_texts(subject: Subject) -> Outcome:
    return Outcome(classify_texts([p.text for p in subject.ask(SAVED).predictions]))


def classify_texts(texts: Sequence[str]) -> str:
    """What most of the generated texts are."""
    patterns = {
        "a decimal": r"\s*[01]?\.\d+\s*",
        "a bare digit": r"\s*\d\s*",
        "a tag": r"\s*<.*",
        "nothing": r"\s*",
        "a word": r".*",
    }
    kinds = [
        next(kind for kind, pattern in patterns.items() if re.fullmatch(pattern, text, re.DOTALL))
        for text in texts
    ]
    return max(patterns, key=kinds.count)


def _compare_parsers(subject: Subject) -> Outcome:
    texts = [prediction.text for prediction in subject.ask(SAVED).predictions]
    return Outcome(compare_parsers(texts, subject.values(SAVED)))


def compare_parsers(texts: Sequence[str], values: Sequence[float | None]) -> str:
    """Whether a strict parser reads the same numbers; most texts without one say so."""
    strict = [parse_strict(text).value for text in texts]
    if strict.count(None) * 2 > len(strict):
        return "no number"
    pairs = zip(strict, values, strict=True)
    return "agree" if all(number in (None, value) for number, value in pairs) else "disagree"


def _try_settings(subject: Subject) -> Outcome:
    """Generate one row greedily at the temperature of each attempt."""
    model = subject.load().model
    prompt = subject.encode(subject.prompt, subject.rows)[0]
    ids = torch.tensor([prompt.token_ids], device=model.device)
    answers = set()
    for attempt in subject.session.case.attempts.values():
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                temperature=attempt.decoding.temperature,
                max_new_tokens=4,
                pad_token_id=0,
            )
        answers.add(tuple(answer[0].tolist()))
    return Outcome("unchanged" if len(answers) == 1 else "changed")


def _tell_answers(subject: Subject) -> Outcome:
    answers = subject.ask(SAVED)
    word = classify_values(subject.values(SAVED), subject.contract)
    return Outcome(word or _form_of(answers, subject.ask(BASE)), describe_answers(answers))


def classify_values(values: Sequence[float | None], contract: str) -> str:
    """Whether values vary; nothing where most are not of the form asked for."""
    given = [decide(value, contract) for value in values if value is not None]
    if 2 * len(given) < len(values):
        return ""
    top = Counter(given).most_common(1)[0][1]
    if top >= ALIKE * len(given):
        return "one value"
    if contract == "number" and set(given) <= {0.0, 1.0}:
        return "only 0 and 1"
    return "varies"


def decide(value: float, contract: str) -> float:
    """A value as it is told apart from others: of a class, whether it is the likelier one."""
    return float(value > 0.5) if contract == "class" else value


def _form_of(answers: Answers, alone: Answers) -> str:
    """What answers are that are not of the form asked for."""
    texts, others = ([p.text.strip() for p in found.predictions] for found in (answers, alone))
    if sum(text == other for text, other in zip(texts, others, strict=True)) * 2 > len(texts):
        return "as the base"
    if sum(text.startswith("<") for text in texts) * 2 > len(texts):
        return "a tag"
    # A number, or Yes or No, answers some question.
    if sum(ANSWER.fullmatch(text) is not None for text in texts) * 2 > len(texts):
        return "another form"
    covered = sum(count for _, count in Counter(texts).most_common(FEW_TEXTS))
    return "few texts" if covered >= COVERED * len(texts) else "many texts"


def describe_answers(answers: Answers) -> str:
    """The commonest texts of the answers, with how often they came."""
    if answers.contract == "class":
        values = np.array(answers.strict_values, dtype=float)
        return f"probabilities from {values.min():.2f} to {values.max():.2f}"
    counts = Counter(p.text.strip()[:24] for p in answers.predictions).most_common(3)
    return ", ".join(f"{text!r} {count} times" for text, count in counts)


def _measure_effect(subject: Subject) -> Outcome:
    both = [_distributions(subject.ask(state)) for state in (SAVED, BASE)]
    if any(np.isnan(part).any() for parts in both for part in parts):
        return Outcome("not finite", "NaN in the distribution of the answer")
    kl = max(float(kl_divergence(on, off).mean()) for on, off in zip(*both, strict=True))
    limits = {"none": NO_EFFECT, "faint": FAINT_EFFECT, "clear": np.inf}
    word = next((word for word, most in limits.items() if kl <= most), "not finite")
    return Outcome(word, f"KL {kl:.2g} nat between the answers")


def _distributions(answers: Answers) -> list[np.ndarray]:
    """Log-probabilities of the first token or class, and of the numbers where they are asked."""
    if answers.contract != "number":
        return [answers.first_log_probs]
    return [answers.first_log_probs, log_softmax(answers.number_log_probs, axis=1)]


def _switch_off(subject: Subject) -> Outcome:
    alone, off = (subject.ask(state).first_log_probs for state in (FIRST, OFF))
    gap = float(kl_divergence(off, alone).max())
    same = gap <= NO_EFFECT
    return Outcome("is the base" if same else "is not the base", f"KL {gap:.2g} nat at most")


def _compare_base(subject: Subject) -> Outcome:
    if subject.differed:
        return Outcome("differs")
    # Once more, because a file that brings base weights changes the base for good.
    return Outcome("differs after loading" if subject.differs() else "as published")


def _compare_order(subject: Subject) -> Outcome:
    """The order of the rows with the adapter against that of the base alone."""
    on, off = subject.log_odds(SAVED), subject.log_odds(BASE)
    if not np.isfinite([on, off]).all():
        return Outcome("not finite", "log-odds that are not finite")
    gain, order = auc_gain_estimate(subject.labels, on, off), tell_order(subject.labels, on)
    assert gain.low is not None
    assert gain.high is not None
    measured = f"{order.measured}; against the base {gain.low:+.2f} to {gain.high:+.2f}"
    if gain.low > 0:
        return Outcome("better", measured)
    if gain.high < 0:
        return Outcome("in reverse" if order.word == "ranks in reverse" else "worse", measured)
    return Outcome("as the base", measured)


def _rank_yes_no(subject: Subject) -> Outcome:
    odds = subject.ask(SAVED, "yes_no").yes_no_log_odds
    return tell_order(subject.labels, np.array(odds, dtype=float))


def tell_order(labels: np.ndarray, scores: np.ndarray) -> Outcome:
    """Whether scores order the rows, by a two-sided rank test at 5 %."""
    if not np.isfinite(scores).all():
        return Outcome("not finite", "log-odds that are not finite")
    found = auc(labels, scores) or 0.0
    p = float(mannwhitneyu(scores[labels == 1], scores[labels == 0]).pvalue)
    measured = f"AUC {found:.2f}, p {p:.2g}"
    if not p < LEVEL:
        return Outcome("does not rank", measured)
    return Outcome("ranks" if found > THRESHOLDS.chance else "ranks in reverse", measured)


def writes_order(subject: Subject) -> bool | None:
    """Whether what is written with the adapter orders the rows; None where it was not asked."""
    if not subject.has_asked(SAVED) or not subject.labelled:
        return None
    return tell_order(subject.labels, subject.written(SAVED)).word == "ranks"


def _try_scales(subject: Subject) -> Outcome:
    states = {"no better": SAVED, "better at 1/8": EIGHTH, "better at 8": EIGHTFOLD}
    aucs = {
        word: auc(subject.labels, subject.written(state)) or 0.0 for word, state in states.items()
    }
    measured = ", ".join(f"{states[word]} {value:.2f}" for word, value in aucs.items())
    # Another scale must be better by `GAIN`.
    best = max(aucs, key=lambda word: aucs[word] - (GAIN if word != "no better" else 0.0))
    return Outcome(best, f"AUC of what is written: {measured}")


def _find_home(subject: Subject) -> Outcome:
    """Whether log-odds with the adapter as saved favour the truth more than with changed copies.

    An adapter made for this base gains on the labels more than the same adapter with its sign
    flipped, or with its layers shifted by one: all three have the same norms.
    """
    odds = {state: subject.log_odds(state) for state in (SAVED, FLIPPED, SHIFTED)}
    if not np.isfinite([*odds.values()]).all():
        return Outcome("not finite", "log-odds that are not finite")
    side = np.where(subject.labels == 1, 1.0, -1.0)
    means = ", ".join(f"{state} {(side * values).mean():+.2f}" for state, values in odds.items())
    at_home = all(_exceeds(side * odds[SAVED], side * odds[state]) for state in (FLIPPED, SHIFTED))
    word = "at home" if at_home else "not at home"
    return Outcome(word, f"mean log-odds of the true answer: {means}")


def _exceeds(values: np.ndarray, others: np.ndarray) -> bool:
    """Whether paired values are larger in the mean, by a one-sided t-test."""
    gaps = values - others
    if not np.ptp(gaps):  # all the same, of which the test would only warn
        return bool(gaps[0] > 0)
    return bool(ttest_1samp(gaps, 0.0, alternative="greater").pvalue < LEVEL)


def _try_reference(subject: Subject) -> Outcome:
    order = tell_order(subject.labels, subject.written(REFERENCE))
    return replace(order, word="works" if order.word == "ranks" else "does not work")


RUN: Mapping[str, Callable[[Subject], Outcome]] = {
    "inspect": _inspect,
    "names": _compare_names,
    "prompt": _compare_prompts,
    "base-alone": _tell_base,
    "base-ranks": _rank_alone,
    "load": _load,
    "status": _ask_status,
    "v1": _ask_prompt("v1"),
    "v2": _ask_prompt("v2"),
    "raw-text": _classify_texts,
    "parsers": _compare_parsers,
    "settings": _try_settings,
    "answers": _tell_answers,
    "effect": _measure_effect,
    "off": _switch_off,
    "fingerprint": _compare_base,
    "order": _compare_order,
    "yes-no": _rank_yes_no,
    "scale": _try_scales,
    "home": _find_home,
    "reference": _try_reference,
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
