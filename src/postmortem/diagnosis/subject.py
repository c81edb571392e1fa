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
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from scipy.special import log_expit, log_softmax
from scipy.stats import mannwhitneyu, ttest_1samp

from postmortem.case.prompts import Prompt, encode_rows, parse_strict
from postmortem.case.rows import Rows
from postmortem.case.schema import PromptTemplate
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import Finding, ModelError
from postmortem.diagnosis.battery import (
    ALONE,
    BACK,
    BASE,
    EIGHTFOLD,
    EIGHTH,
    ENOUGH,
    FEW,
    FIRST,
    FLIPPED,
    NO_ANSWER,
    OFF,
    ON_ENOUGH,
    ON_FEW,
    OTHERWISE,
    REFERENCE,
    ROTATED,
    SAVED,
    SHIFTED,
    STARTED,
    TESTS,
)
from postmortem.diagnosis.causes import Run
from postmortem.experiments.ask import (
    Answers,
    NoAnswer,
    PutOn,
    System,
    join_answers,
    put_on,
    score_rows,
)
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
# One row in twenty may differ and the others still have one value.
ALIKE = 0.95
# So many texts, that come in nine of ten rows, are answers to some question.
FEW_TEXTS, COVERED = 3, 0.9
ANSWER = re.compile(r"\d*\.?\d+\W*|\W*(yes|no)\b.*", re.IGNORECASE | re.DOTALL)
LEVEL = 0.05
# The name under which PEFT loads an adapter that is given none.
ADAPTER = "default"
# The change of the adapter behind a state.
CHANGED = {
    EIGHTH: "eighth",
    EIGHTFOLD: "eightfold",
    FLIPPED: "flipped",
    SHIFTED: "shifted",
    BACK: "shifted_back",
    ROTATED: "rotated",
}
# States of which the log-odds alone are looked at, not what is written.
UNWRITTEN = (FIRST, STARTED, OFF, *CHANGED, OTHERWISE)
# States that are not held against the base under the same prompt.
UNHELD = (REFERENCE, OTHERWISE)
# An effect is larger than another where it is so many times as large: the sizes of two adapters of
# one recipe differ by less, those of a trained one and of chance by powers of ten.
LARGER = 2.0
# The spread of the singular values of lora_B against that of as large a matrix of random numbers:
# those of 60 trained adapters had 0.02 to 0.2 in the median of their modules, random ones 1. Of
# fewer than four values chance says nothing.
EVEN, LEAST_RANK = 0.5, 4
# Nats by which a mean log-probability must rise to be called so: a twentieth of the probability.
RISE = 0.05
# The best of several changes is better by luck more easily than one.
LEVEL_OF_BEST = 0.01


@dataclass(frozen=True)
class Outcome:
    """How a test came out, and what was measured, in words."""

    word: str
    measured: str = ""


@dataclass
class Subject:
    """A run under test, for the length of a `with`: what it is asked, on which rows.

    The first `count` of the `rows` are asked (0: all), and more may follow: what was answered is
    kept and added to. `base_folder` is what the checker compares the adapter's files with,
    `base_name` the name that its config should bear, and `published` the base as it was before
    anything was done to it. `asked` may be given what other subjects have asked of the same base.
    """

    session: Session
    run: Run
    prompt: str
    rows: Rows
    base_folder: Path
    base_name: str = ""
    reference: Path | None = None
    published: LoadedBase | None = None
    count: int = 0
    asked: dict[tuple[str, str], Answers] = field(default_factory=dict)
    # Seconds a row that a state took when it was last asked.
    paces: dict[str, float] = field(default_factory=dict)
    # Mean divergence of a state from the base on each row, in nats.
    effects: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    # What is on the base now, and how it is taken off.
    on: str = ""
    answering: PutOn | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    encoded: dict[tuple[str, bool, tuple[str, ...]], list[Prompt]] = field(default_factory=dict)

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
    def in_use(self) -> Rows:
        """The rows that are asked now."""
        return self.rows.head(self.count)

    @property
    def labels(self) -> np.ndarray:
        """The truth; only where the subject is `labelled`."""
        labels = self.in_use.labels
        assert labels is not None
        return labels

    @property
    def labelled(self) -> bool:
        """Whether there are enough rows of either class to see an order."""
        labels = self.in_use.labels
        least = THRESHOLDS.rows // 2
        return labels is not None and min(int(labels.sum()), int((1 - labels).sum())) >= least

    def ask(self, state: str, prompt: str = "") -> Answers:
        """The answers in a state; those in `ON_FEW` on a few rows."""
        chosen = prompt or self.prompt
        if self.run.adapter is None and state not in (*ALONE, REFERENCE):
            state = FIRST if state in ON_FEW else BASE
        rows = self.rows.head(self.limit(state, len(self.in_use)))
        known = self.asked.get((state, chosen))
        if known is None or len(known) < len(rows):
            more = rows.part(0 if known is None else len(known), len(rows))
            if state not in (*ALONE, *UNHELD):
                # Before anything is on it; loading it is no part of the pace.
                self.ask(FIRST if state in ON_FEW else BASE, chosen)
            _ = self._base()
            start = time.perf_counter()
            answers = self._answer(state, chosen, more)
            self.paces[state] = (time.perf_counter() - start) / len(more)
            answers = self._compared(state, chosen, answers, count=len(rows))
            known = answers if known is None else join_answers(known, answers)
            self.asked[state, chosen] = known
        return known.part(0, len(rows))

    def limit(self, state: str, count: int) -> int:
        """On how many of so many rows a state is asked."""
        return min(count, FEW if state in ON_FEW else ENOUGH if state in ON_ENOUGH else count)

    def missing_rows(self, state: str, count: int) -> int:
        """How many of the first `count` rows a state was not asked yet and will be."""
        known = self.asked.get((state, self.prompt))
        return max(self.limit(state, count) - (0 if known is None else len(known)), 0)

    def settle(self) -> None:
        """Leave it at the rows that the adapter was asked on."""
        known = self.asked.get((SAVED, self.prompt))
        self.count = self.count if known is None else min(self.count, len(known))

    def effect(self, state: str, prompt: str = "") -> np.ndarray:
        """Divergence from the base alone on each row, in nats."""
        count = len(self.ask(state, prompt))
        if self.run.adapter is None:
            return np.zeros(count)
        return self.effects[state, prompt or self.prompt][:count]

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

    def nearness(self, state: str) -> np.ndarray:
        """How near each row comes to its true answer: a log-probability.

        It is that of any answer of the form asked for, times the chance of the true one among them.
        A chance counts up to odds of e to one: how sure an adapter is of what it gets wrong is a
        matter of how long it was trained, and not of whether it belongs here.
        """
        form = self.ask(state).form_log_probs
        if not self.labelled:
            return form
        side = np.where(self.labels[: len(form)] == 1, 1.0, -1.0)
        return form + log_expit(np.clip(side * self.log_odds(state), -1.0, 1.0))

    def load(self) -> PutOn:
        """The run's model with its adapter on; `ModelError` where it does not load."""
        return self._put_on(SAVED)

    def encode(self, prompt: str, rows: Rows, *, otherwise: bool = False) -> list[Prompt]:
        """The rows as this run sends them, or in the other markup."""
        key = (prompt, otherwise, rows.ids)
        if key not in self.encoded:
            prompts = self.encode_plainly(prompt, rows, otherwise=otherwise)
            rewrite, tokenizer = self.run.rewrite, self._base().tokenizer
            self.encoded[key] = [rewrite(p, tokenizer) for p in prompts] if rewrite else prompts
        return self.encoded[key]

    def encode_plainly(self, prompt: str, rows: Rows, *, otherwise: bool = False) -> list[Prompt]:
        """The rows as the case would send them."""
        limit = self.session.case.decoding(prompt).max_prompt_tokens
        template = self.template(prompt, otherwise=otherwise)
        return encode_rows(template, rows, tokenizer=self._base().tokenizer, limit=limit)

    def template(self, prompt: str, *, otherwise: bool = False) -> PromptTemplate:
        """The prompt as the run sends it; `otherwise`: through the chat template if it is raw."""
        template = self.session.case.prompt(prompt)
        if otherwise == self.run.otherwise:
            return template
        return template.model_copy(update={"chat": not template.chat})

    @property
    def has_markups(self) -> bool:
        """Whether the prompt can be sent with the chat template and without."""
        return self.contract != "class" and bool(self._base().tokenizer.chat_template)

    def _compared(self, state: str, prompt: str, answers: Answers, *, count: int) -> Answers:
        """The answers with their divergence from the base noted, and without the distributions.

        Those of a large vocabulary on many rows take much memory; the base's alone are kept.
        """
        if state in ALONE:
            return answers
        if state not in UNHELD:
            first = FIRST if state in ON_FEW else BASE
            alone = self.ask(first, prompt).part(count - len(answers), count)
            found = diverge(answers, alone)
            known = self.effects.get((state, prompt), found[:0])
            self.effects[state, prompt] = np.concatenate([known, found])
        return replace(answers, first_log_probs=answers.first_log_probs[:, :0])

    def _answer(self, state: str, prompt: str, rows: Rows) -> Answers:
        answering = self._put_on(state)
        with ExitStack() as changes:
            if state == OFF and self.run.status != "disabled":
                changes.enter_context(answering.model.disable_adapter())
            if state in CHANGED:
                change = changed_in_memory(answering.model, CHANGES[CHANGED[state]])
                # One layer alone is adapted: moved it is as it was.
                with suppress(NothingToChange):
                    changes.enter_context(change)
            return self._score(answering, state, prompt, rows)

    def _score(self, answering: PutOn, state: str, prompt: str, rows: Rows) -> Answers:
        otherwise = state == OTHERWISE
        return score_rows(
            self.session,
            answering,
            state,
            prompt,
            rows=rows,
            template=self.template(prompt, otherwise=otherwise),
            prompts=self.encode(prompt, rows, otherwise=otherwise),
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


def diverge(answers: Answers, alone: Answers) -> np.ndarray:
    """KL divergence of answers from the base's on each row, in nats: the larger one of the two.

    One is of the first token or the class, the other of the numbers where they are asked for.
    """
    pairs = [(answers.first_log_probs, alone.first_log_probs)]
    if answers.contract == "number":
        numbers = (answers.number_log_probs, alone.number_log_probs)
        pairs.append((log_softmax(numbers[0], axis=1), log_softmax(numbers[1], axis=1)))
    return np.max([kl_divergence(on, off) for on, off in pairs], axis=0)


def set_status(answering: PutOn, run: Run) -> None:
    """Leave the adapter answering, disabled, or with another one active in its place."""
    if run.status == "another":
        answering.model.add_adapter("another", LoraConfig(r=4, target_modules=["q_proj"]))
        answering.model.set_adapter("another")
    elif run.status == "disabled":
        answering.model.base_model.disable_adapter_layers()


# What a user can give, so that a test can be run.
NO_LABELS = f"it takes labels, of at least {THRESHOLDS.rows // 2} rows of either class"
NO_REFERENCE = "no sound adapter is given to compare with"


def why_not(test: str, subject: Subject, known: Mapping[str, str]) -> str:
    """Why a test is not to be had, given the outcomes so far; nothing where it is."""
    needed = TESTS[test]
    if needed.loaded and known.get("load") == "raises":
        return "the adapter does not load"
    if needed.labels and not subject.labelled:
        return NO_LABELS
    if needed.effect and known.get("effect") in ("none", "not finite"):
        return "the adapter has no effect that could be changed"
    if test == "markup" and not subject.has_markups:
        return "the base has no chat template"
    if test == "reference" and subject.reference is None:
        return NO_REFERENCE
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
    prompt = subject.encode(subject.prompt, subject.rows.head(1))[0]
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
    found = subject.effect(SAVED)
    if np.isnan(found).any():
        return Outcome("not finite", "NaN in the distribution of the answer")
    kl = float(found.mean())
    limits = {"none": NO_EFFECT, "faint": FAINT_EFFECT, "clear": np.inf}
    word = next((word for word, most in limits.items() if kl <= most), "not finite")
    return Outcome(word, f"KL {kl:.2g} nat between the answers")


def _compare_form(subject: Subject) -> Outcome:
    """Whether an answer of the form asked for is likelier than of the base alone."""
    on, off = (subject.ask(state).form_log_probs for state in (SAVED, BASE))
    if not np.isfinite([on, off]).all():
        return Outcome("not finite", "log-probabilities that are not finite")
    measured = (
        f"mean log-probability of an answer asked for {on.mean():.2f}, alone {off.mean():.2f}"
    )
    if _rises(on, off):
        return Outcome("likelier", measured)
    return Outcome("less likely" if _rises(off, on) else "as the base", measured)


def _look_at_weights(subject: Subject) -> Outcome:
    """Whether the updates have a few strong directions, as training leaves them, or none.

    What is looked at is what is loaded: lora_B, which is zero before training.
    """
    if subject.run.adapter is None:
        return Outcome("no adapter")
    factors = [
        parameter.detach().float().cpu().numpy()
        for name, parameter in subject.load().model.named_parameters()
        if "lora_B" in name and parameter.dim() == 2
    ]
    if not all(np.isfinite(factor).all() for factor in factors):
        return Outcome("not finite", "values that are not finite in lora_B")
    if not any(factor.any() for factor in factors):
        return Outcome("all zero", "lora_B is zero")
    found = [evenness(factor) for factor in factors if factor.any()]
    even = [value for value in found if value is not None]
    if not even:
        return Outcome("trained", "of so low a rank that chance says nothing")
    middle = float(np.median(even))
    word = "as drawn at random" if middle > EVEN else "trained"
    return Outcome(word, f"evenness {middle:.2f}, random numbers have 1")


def evenness(factor: np.ndarray) -> float | None:
    """The least singular value over the largest, against what random numbers have; None at random.

    `factor` is lora_B, (out, r). Of a matrix of independent normal numbers the ratio is close to
    (√out - √r) / (√out + √r) (Bai and Yin 1993). None below a rank of `LEAST_RANK`.
    """
    most, least = np.sqrt(max(factor.shape)), np.sqrt(min(factor.shape))
    if min(factor.shape) < LEAST_RANK or most == least:
        return None
    values = np.linalg.svd(factor.astype(np.float64), compute_uv=False)
    return float(values[-1] / values[0] * (most + least) / (most - least))


def _switch_off(subject: Subject) -> Outcome:
    gap = float(subject.effect(OFF).max())
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
    if (SAVED, subject.prompt) not in subject.asked or not subject.labelled:
        return None
    return tell_order(subject.labels, subject.written(SAVED)).word == "ranks"


def _rises(values: np.ndarray, others: np.ndarray, *, level: float = LEVEL) -> bool:
    """Whether paired values are larger in the mean by more than `RISE`, and not by luck."""
    gaps = values - others
    if gaps.mean() <= RISE:
        return False
    # All the same: of this the test would only warn.
    return not np.ptp(gaps) or bool(ttest_1samp(gaps, 0.0, alternative="greater").pvalue < level)


def _find_place(subject: Subject) -> Outcome:
    """Whether the adapter does more in this place than elsewhere, and than by chance.

    Its layers moved by one, and each update turned at random, have the norms of the saved ones.
    What was trained here has an effect that chance has not, and more of it here than a layer off.
    """
    effects = {
        state: float(subject.effect(state)[:ENOUGH].mean())
        for state in (SAVED, SHIFTED, BACK, ROTATED)
    }
    if not np.isfinite([*effects.values()]).all():
        return Outcome("not finite", "NaN in the distribution of the answer")
    measured = "KL from the base: " + ", ".join(f"{k} {v:.2g}" for k, v in effects.items())
    if max(effects[SHIFTED], effects[BACK]) > LARGER * effects[SAVED]:
        return Outcome("elsewhere", measured)
    return Outcome("here" if effects[SAVED] > LARGER * effects[ROTATED] else "nowhere", measured)


def _try_mends(subject: Subject) -> Outcome:
    """What brings the true answer nearest: the adapter as saved, changed, or none at all."""
    words = {
        SAVED: "nothing",
        BASE: "no adapter",
        EIGHTH: "smaller",
        EIGHTFOLD: "larger",
        FLIPPED: "flipped",
        SHIFTED: "moved",
        BACK: "moved",
    }
    found = {state: subject.nearness(state)[:ENOUGH] for state in words}
    means = {state: float(values.mean()) for state, values in found.items()}
    if not np.isfinite(means[SAVED]):
        return Outcome("not finite", "log-probabilities that are not finite")
    measured = ", ".join(f"{state} {value:.2f}" for state, value in means.items())
    measured = f"mean nearness to the true answer: {measured}"
    finite = [state for state in words if np.isfinite(means[state])]
    best = max(finite, key=lambda state: means[state])
    # A change is worth naming where it beats the adapter as saved, and no adapter as well.
    if not _rises(found[best], found[SAVED], level=LEVEL_OF_BEST):
        return Outcome("nothing", measured)
    return Outcome(words[best if _rises(found[best], found[BASE]) else BASE], measured)


def _try_markup(subject: Subject) -> Outcome:
    """Whether the true answer is likelier in the other markup."""
    other, saved = (subject.nearness(state)[:ENOUGH] for state in (OTHERWISE, SAVED))
    if not np.isfinite([other, saved]).all():
        return Outcome("not finite", "log-probabilities that are not finite")
    means = f"mean nearness {saved.mean():.2f}, in the other markup {other.mean():.2f}"
    return Outcome("better" if _rises(other, saved) else "no better", means)


def _try_reference(subject: Subject) -> Outcome:
    order = tell_order(subject.labels, subject.written(REFERENCE))
    return replace(order, word="works" if order.word == "ranks" else "does not work")


RUN: Mapping[str, Callable[[Subject], Outcome]] = {
    "inspect": _inspect,
    "weights": _look_at_weights,
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
    "form": _compare_form,
    "off": _switch_off,
    "fingerprint": _compare_base,
    "order": _compare_order,
    "yes-no": _rank_yes_no,
    "place": _find_place,
    "mend": _try_mends,
    "markup": _try_markup,
    "reference": _try_reference,
}


def spread(rows: Rows, count: int) -> Rows:
    """At most `count` rows, evenly spread, in an order of which any beginning is spread as well.

    Where labels are known the classes take turns, as long as there are rows of either.
    """
    places = np.arange(len(rows))
    kinds = [places] if rows.labels is None else [places[rows.labels == label] for label in (0, 1)]
    turns = zip_longest(*(_scattered(kind) for kind in kinds))
    chosen = [place for turn in turns for place in turn if place is not None]
    return rows.take(chosen[:count])


def _scattered(places: np.ndarray) -> list[int]:
    """Places in an order whose beginnings are spread over all (the bits of each rank reversed)."""
    bits = max(len(places) - 1, 1).bit_length()
    ranks = sorted(range(len(places)), key=lambda rank: f"{rank:0{bits}b}"[::-1])
    return [int(places[rank]) for rank in ranks]
