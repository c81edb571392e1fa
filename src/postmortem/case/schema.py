"""The case file as types: strict, frozen, every key known."""

import re
from datetime import date
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from postmortem.checker.errors import CaseError

# A sentence that may not be left blank.
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]


class Frozen(BaseModel):
    """A part of such a file: immutable, every key known, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Grade = Literal["artefact", "log", "recollection", "measured"]
Verdict = Literal["holds", "refuted", "cannot tell", "not available"]
ClaimVerdict = Literal["stands", "stands in part", "refuted", "cannot be checked"]
# What a model does with what it knows of the rows; "cannot tell" is the fourth word.
Knowing = Literal["says what it knows", "knows and does not say", "does not know"]
Contract = Literal["number", "yes_no", "choice", "class"]
Value = TypeVar("Value")
# Of a run; and since 1970, up to the year 9999, the last that a date can name.
Seconds = Annotated[float, Field(ge=0, le=10_000_000)]
Epoch = Annotated[float, Field(ge=0, le=253_402_000_000)]
PLACEHOLDER = re.compile(r"\{(\w+)\}")


class DeclaredSystem(Frozen):
    """A model or adapter of the incident, as declared.

    `config` is transcribed and may contradict the file it describes; `declared_megabytes` is
    what the write-up gives for the weights.
    """

    title: str
    name: str
    config: dict[str, Any] = {}
    declared_megabytes: float | None = None
    grade: Grade
    source: str
    note: str = ""


class Systems(Frozen):
    """Who took part, by role."""

    base: DeclaredSystem
    suspect: DeclaredSystem
    reference: DeclaredSystem | None = None


class LoadingWarning(Frozen):
    """The unexpected keywords that PEFT listed when it loaded the suspect, as its log shows."""

    keywords: list[str]
    grade: Grade
    source: str


class TrueSize(Frozen):
    """Known bases whose shapes the shape-mismatch notebook builds on the meta device."""

    base: str
    donors: list[str]
    rank: int = Field(default=16, ge=1)
    target_modules: list[str]


class Series(Frozen, Generic[Value]):
    """Values on record, one a row of the attempt; exact tests bound how many there can be."""

    values: list[Value] = Field(min_length=1, max_length=200)
    grade: Grade
    source: str


class LogLine(Frozen):
    """What a line of the log says, in our words, `seconds` after the kernel started."""

    seconds: Seconds
    says: str


class Message(Frozen):
    """A message that a library can print, and how many times the log shows it."""

    says: str
    times: int = Field(ge=0)


class KernelLog(Frozen):
    """A kernel's log; all `seconds` count from its start.

    `epoch` is the clock that it shows, in seconds since 1970, and `epoch_at` when that line comes.
    `loading` is when loading began and ended; `ticks` are the start of the first row and the end
    of each. `messages` lists those that were looked for, the absent ones among them.
    """

    epoch: Epoch
    epoch_at: Seconds
    lines: list[LogLine]
    loading: list[Seconds] = Field(min_length=2, max_length=2)
    ticks: list[Seconds] = Field(min_length=2, max_length=201)
    messages: dict[Identifier, Message]
    grade: Grade
    source: str


class LoadFault(Frozen):
    """Something that can be wrong with an adapter, and the message that loading it prints.

    Without a `message` it loads silently. `hypothesis` is the explanation that it belongs to.
    """

    id: Identifier
    fault: str
    hypothesis: str | None = None
    message: Identifier | None = None
    grade: Grade
    source: str


class Hardware(Frozen):
    """The device: no decoding step is faster than one reading of the weights from its memory."""

    device: str
    gigabytes_per_second: float = Field(gt=0)
    bytes_per_parameter: int = Field(ge=1)
    grade: Grade
    source: str


class AnswerLength(Frozen):
    """Tokens of a text in the base's vocabulary, end of turn not counted, and the claimed ones."""

    text: str
    tokens: int = Field(ge=1)
    claimed_tokens: int = Field(ge=1)
    grade: Grade
    source: str


class ClaimedDate(Frozen):
    """The day that the write-up gives, and the days on which releases of PEFT came out."""

    day: date
    grade: Grade
    source: str
    peft_releases: dict[str, date] = {}
    releases_source: str = ""


class GoodScore(Frozen):
    """What a good model scores on this task."""

    auc: float = Field(gt=0.5, lt=1)
    grade: Grade
    source: str


class AdapterForms(Frozen):
    """Usual forms of an adapter whose sizes are held against the sizes on record.

    Each set of `target_modules` is taken at each rank; `whole_modules` are saved entire, beside
    the smallest of these.
    """

    other_bases: list[str]
    ranks: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    target_modules: dict[str, list[str]] = Field(min_length=1)
    whole_modules: list[str] = []


class Forensics(Frozen):
    """What survives of one attempt beside its prompt: its log, its file, and what they imply."""

    attempt: Identifier
    row_ids: Series[str]
    labels: Series[Annotated[int, Field(ge=0, le=1)]]
    submitted: Series[Annotated[float, Field(ge=0, le=1)]]
    prompt_tokens: Series[Annotated[int, Field(ge=1)]]
    log: KernelLog
    ignored_flags: Identifier
    faults: list[LoadFault] = []
    hardware: Hardware
    answer: AnswerLength
    good_score: GoodScore
    claimed_date: ClaimedDate
    contents: AdapterForms


class Columns(Frozen):
    """Names of the columns in the rows file; templates may use any other column by name.

    Without an `id` rows are numbered from 1. Where `positive` is given, labels that equal it count
    as 1 and all others as 0.
    """

    id: str | None = "row_id"
    text: str = "body"
    group: str | None = "rule"
    label: str | None = "rule_violation"
    positive: str | None = None


class PromptTemplate(Frozen):
    """A prompt and the answer it asks for.

    `{column}` is replaced by the row's value, once, and nothing else is interpreted. With
    `chat` the model's own chat template wraps `system` and `template`; without, the template is
    sent raw. A `number` lies between 0 and 1; `yes_no` and `choice` ask for one of two `answers`,
    the negative one first; `class` is read by a classifier and answered by its head.
    `max_new_tokens` holds where no attempt used the prompt. The `parser` makes a value of the text:
    the strict one takes an answer and nothing else, the write-up's finds a number in any text.
    """

    title: str
    contract: Contract
    chat: bool
    system: str = ""
    template: str
    answers: list[Sentence] = Field(default=["No", "Yes"], min_length=2, max_length=2)
    parser: Literal["strict", "as-written"] = "strict"
    max_new_tokens: int = Field(default=3, ge=1, le=4096)
    max_prompt_tokens: int = Field(default=512, ge=16)
    grade: Grade
    note: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template uses, in order of first use."""
        return tuple(dict.fromkeys(PLACEHOLDER.findall(self.system + self.template)))

    @property
    def reads_numbers(self) -> bool:
        """Whether a number is read from the answer, so that its log-odds are of interest."""
        return self.contract == "number" or self.parser == "as-written"


class Replacement(Frozen):
    """A passage of a prompt, which must occur in it, and what takes its place."""

    old: str = Field(min_length=1)
    new: str


class Variation(Frozen):
    """A prompt of the case with passages changed, to see what follows the prompt's own words."""

    title: str
    prompt: Identifier
    replace: list[Replacement]


class Decoding(Frozen):
    """How an attempt generated.

    Decoding is greedy whenever `do_sample` is false, whatever `temperature` says.
    `max_prompt_tokens` is the limit above which the incident's code cut the prompt.
    """

    do_sample: bool = False
    temperature: float | None = None
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(default=512, ge=16)


class Attempt(Frozen):
    """One attempt of the incident: a prompt, its decoding, and what was reported of it."""

    title: str
    prompt: Identifier
    decoding: Decoding
    reported_parse_rate: float = Field(ge=0, le=1)
    reported_value: float
    rows: int = Field(ge=1)
    grade: Grade
    source: str
    note: str = ""


class RunTest(Frozen):
    """What a run asks, as a statement, and the key of the recorded verdict that answers."""

    asks: Sentence
    verdict: Sentence


class Observed(Frozen):
    """The outcome of a test that the incident's record holds, in the words of the replays."""

    test: Identifier
    outcome: Sentence
    grade: Grade
    source: str


class StatedHypothesis(Frozen):
    """An explanation of the symptom.

    `causes` are those of the replays that it comes down to; `base_alone` is set where it says that
    the base needs no adapter for it. `initial` and `final` are the write-up's confidences in per
    cent (absent where it never considered the hypothesis). The verdict is the diagnosis's.
    """

    id: Annotated[str, StringConstraints(pattern=r"^[A-Z][0-9]?$")]
    title: str
    statement: str
    initial: float | None = Field(default=None, ge=0, le=100)
    final: float | None = Field(default=None, ge=0, le=100)
    because: str
    grade: Grade
    decided_by: str
    causes: list[Identifier] = []
    base_alone: bool = False
    test: RunTest | None = None


class Item(Frozen):
    """A part of the narrative; which fields it has is said for each section in `FORMS`.

    `text` is what was seen, claimed, learnt or done, `reading` what the write-up made of it, and
    `finding` what this analysis makes of it. `because` gives the reason for `verdict`, and
    `would_change` the finding that would change it. `test` names a verdict of a run that decides
    or illustrates the item.
    """

    id: Identifier = ""
    when: Sentence = ""
    section: Sentence = ""
    kind: Sentence = ""
    title: Sentence = ""
    text: Sentence = ""
    reading: Sentence = ""
    finding: Sentence = ""
    verdict: ClaimVerdict | None = None
    because: Sentence = ""
    decided_by: Sentence = ""
    would_change: Sentence = ""
    grade: Grade | None = None
    source: Sentence = ""
    test: RunTest | None = None


class ItemForm(NamedTuple):
    """The fields that each item of a section has, those that it may have, and its kinds."""

    needs: str
    may: str = ""
    kinds: tuple[str, ...] = ()


GRADED = ItemForm("text grade")
FORMS = {
    "timeline": ItemForm("when text grade source"),
    "observations": ItemForm(
        "id kind text finding grade", kinds=("working", "failing", "red flag")
    ),
    "evidence": ItemForm("id title text reading finding grade source"),
    "quotes": ItemForm("id when text finding"),
    "claims": ItemForm("id section text verdict because grade decided_by would_change", may="test"),
    "lessons": ItemForm("id kind title text finding", kinds=("technical", "process")),
    "practice.impact": GRADED,
    "practice.trigger": GRADED,
    "practice.detection": ItemForm("when text finding grade"),
    "practice.factors": GRADED,
    "practice.went_well": GRADED,
    "practice.lucky": GRADED,
    "practice.actions": ItemForm("id text decided_by grade", may="test"),
}


class AdapterFilter(Frozen):
    """The limits by which the write-up meant to keep adapters: exceed both, load, and it works."""

    std_above: float = Field(ge=0)
    maximum_above: float = Field(ge=0)
    grade: Grade
    source: str


class Practice(Frozen):
    """The incident as a post-mortem of a service would put it: blameless, with action items.

    An action is closed where its `test` is of the incident's own record and holds. Any other test
    shows on models of ours that the action can be taken, which does not close it.
    """

    impact: list[Item] = Field(min_length=1, max_length=1)
    trigger: list[Item] = Field(min_length=1, max_length=1)
    detection: list[Item]
    factors: list[Item]
    went_well: list[Item]
    lucky: list[Item]
    actions: list[Item]


class Replays(Frozen):
    """What causes are injected into at every build: adapters that were trained for it.

    `adapters` is a folder of LINEAGE/RECIPE_SEED, and `rows` how many generated rows each replay
    is asked.
    """

    adapters: str
    rows: int = Field(ge=2)


class Recording(Frozen):
    """How many rows `make record` runs.

    `rows` are generated ones under the prompts that matter most, `few` of them under all others
    and with each cause, and `file_rows` the first ones of each file.
    """

    rows: int = Field(ge=2)
    few: int = Field(ge=2)
    file_rows: int = Field(ge=2)


class Profile(Frozen):
    """A world to run the case in.

    `base` is `packaged:NAME` (see `postmortem weights`), a model folder, or a hub id; so are the
    further `bases`. Adapters are folders, by role; those of `replay_adapters` are what the causes
    need beside them on one real base: trained in another way, or for a `donor` of other shapes.
    With `replays` every build injects the causes; without, a kept run has done it. `rows` is how
    many generated rows are scored where no data file is given, from word lists (`keywords`) or in
    sentences that must be read (`moderation`).
    `caveat` is printed wherever a result of this profile is shown, and `recorded` sizes the
    run that is kept for the book. `data` is a file of rows that takes the place of generated ones,
    with its labels in `labels` where they are apart; its first `first` rows are scored, or all.
    """

    title: str
    base: str
    data: str = ""
    labels: str = ""
    first: int = Field(default=0, ge=0)
    bases: dict[Literal["donor_base", "sibling_base", "speaking_base", "ignorant_base"], str] = {}
    adapters: dict[Literal["suspect", "reference", "donor_adapter", "no_op"], str] = {}
    replay_adapters: dict[Literal["binary_rare", "thinking", "donor"], str] = {}
    rows: int = Field(ge=2)
    corpus: Literal["keywords", "moderation"] = "keywords"
    seed: int = 0
    replays: Replays | None = None
    recorded: Recording | None = None
    caveat: str

    @property
    def all_adapters(self) -> dict[str, str]:
        """Every adapter that the profile names, by role or by what the replays call it."""
        return dict([*self.adapters.items(), *self.replay_adapters.items()])


class Case(Frozen):
    """One incident: systems, prompts, attempts, evidence, hypotheses, claims, profiles.

    Without `practice` the chapter on post-mortem practice says that the case has none. `compared`
    names the prompts of the swap and of the controls; none takes all. `pages` is the folder of the
    case's prose; without it the pages lie beside its file, or the packaged ones serve.
    """

    case_version: Literal[1]
    name: Identifier
    title: str
    symptom: str
    context: str
    systems: Systems
    loading_warning: LoadingWarning | None = None
    true_size: TrueSize | None = None
    forensics: Forensics | None = None
    adapter_filter: AdapterFilter | None = None
    columns: Columns = Columns()
    pages: str = ""
    compared: list[Identifier] = []
    prompts: dict[Identifier, PromptTemplate]
    variations: dict[Identifier, Variation] = {}
    attempts: dict[Identifier, Attempt]
    timeline: list[Item] = []
    observations: list[Item] = []
    evidence: list[Item] = []
    quotes: list[Item] = []
    observed: list[Observed] = []
    hypotheses: list[StatedHypothesis] = []
    claims: list[Item] = []
    lessons: list[Item] = []
    practice: Practice | None = None
    profiles: dict[Identifier, Profile]

    @property
    def asked(self) -> str:
        """The prompt that matters most: the first."""
        return next(iter(self.prompts))

    @property
    def compared_prompts(self) -> tuple[str, ...]:
        """The prompts under which systems are compared."""
        return tuple(self.compared or self.prompts)

    def prompt_of(self, attempt: str) -> str:
        """The prompt of an attempt; in a case without attempts each prompt is one."""
        return self.attempts[attempt].prompt if attempt in self.attempts else attempt

    @property
    def sections(self) -> dict[str, list[Item]]:
        """The items of each section in `FORMS`; none where the case leaves it out."""
        parts = dict(self) | {f"practice.{name}": items for name, items in self.practice or ()}
        return {name: parts.get(name, []) for name in FORMS}

    @property
    def default_profile(self) -> str:
        """The profile of a run that names none: the first."""
        return next(iter(self.profiles))

    @property
    def classifies(self) -> bool:
        """Whether the adapter is a classifier's, which reads its prompts and writes nothing."""
        return any(prompt.contract == "class" for prompt in self.prompts.values())

    def profile(self, name: str) -> Profile:
        """The profile of that name, or a `CaseError` that lists those there are."""
        if name not in self.profiles:
            raise CaseError(
                f"profile {name!r}",
                expected=f"one of {', '.join(self.profiles)}",
                found="no such profile in the case",
                remedy="Name one of those, or add it under `profiles`.",
            )
        return self.profiles[name]

    def decoding(self, name: str) -> Decoding:
        """How a prompt is answered: as in the attempt that used it, or as the prompt says."""
        varied = self.variations.get(name)
        asked = varied.prompt if varied else name
        for attempt in self.attempts.values():
            if attempt.prompt == asked:
                return attempt.decoding
        prompt = self.prompt(name)
        return Decoding(
            max_new_tokens=prompt.max_new_tokens, max_prompt_tokens=prompt.max_prompt_tokens
        )

    def prompt(self, name: str) -> PromptTemplate:
        """A prompt, or a variation of one, by its name."""
        varied = self.variations.get(name)
        if varied is None:
            return self.prompts[name]
        changed = self.prompts[varied.prompt].model_dump(include={"system", "template"})
        for part in varied.replace:
            changed = {key: text.replace(part.old, part.new) for key, text in changed.items()}
        return self.prompts[varied.prompt].model_copy(update={**changed, "title": varied.title})
