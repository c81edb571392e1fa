"""The case file: one incident as data, parsed and checked at the door."""

import hashlib
import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from postmortem.errors import CaseError

Grade = Literal["artefact", "log", "recollection", "measured"]
Verdict = Literal["holds", "refuted", "cannot tell", "not available"]
# What a model does with what it knows of the rows; "cannot tell" is the fourth word.
Knowing = Literal["says what it knows", "knows and does not say", "does not know"]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]
PLACEHOLDER = re.compile(r"\{(\w+)\}")
# PyYAML's own constructors raise bare errors on a scalar such as 2025-13-45 or !!int "".
SCALAR_ERRORS = (AttributeError, LookupError, OverflowError, TypeError, ValueError)


class Frozen(BaseModel):
    """A part of the case: immutable, every key known, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class System(Frozen):
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

    base: System
    suspect: System
    reference: System | None = None


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


class Columns(Frozen):
    """Names of the columns in the rows file; templates may use any other column by name."""

    id: str = "row_id"
    text: str = "body"
    group: str | None = "rule"
    label: str = "rule_violation"


class PromptTemplate(Frozen):
    """A prompt and the answer it asks for.

    `{column}` is replaced by the row's value, once, and nothing else is interpreted. With
    `chat` the model's own chat template wraps `system` and `template`; without, the template is
    sent raw.
    """

    title: str
    contract: Literal["number", "yes_no"]
    chat: bool
    system: str = ""
    template: str
    grade: Grade
    note: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template uses, in order of first use."""
        return tuple(dict.fromkeys(PLACEHOLDER.findall(self.system + self.template)))


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


class Event(Frozen):
    """A point of the timeline; `when` as precise as the source allows."""

    when: str
    what: str
    grade: Grade
    source: str


class Observation(Frozen):
    """Something the write-up saw: `kind` tells working, failing or red flag."""

    id: Identifier
    kind: Literal["working", "failing", "red flag"]
    statement: str
    what_we_see: str
    grade: Grade


class Evidence(Frozen):
    """A piece of evidence of the write-up, with what it can bear."""

    id: Identifier
    title: str
    statement: str
    reading: str
    what_it_bears: str
    grade: Grade
    source: str


class HypothesisTest(Frozen):
    """What a run asks of a hypothesis, and the key of the verdict that answers."""

    asks: str
    verdict: str


class Hypothesis(Frozen):
    """An explanation of the symptom.

    `initial` and `final` are the write-up's confidences in per cent (absent where it never
    considered the hypothesis). `verdict` is what the surviving artefacts alone decide.
    """

    id: Annotated[str, StringConstraints(pattern=r"^[A-Z][0-9]?$")]
    title: str
    statement: str
    initial: float | None = Field(default=None, ge=0, le=100)
    final: float | None = Field(default=None, ge=0, le=100)
    verdict: Verdict
    because: str
    grade: Grade
    decided_by: str
    test: HypothesisTest | None = None


class Claim(Frozen):
    """One claim of the write-up, in our words, with what the record says of it."""

    id: Identifier
    section: str
    claim: str
    verdict: Literal["stands", "stands in part", "refuted", "cannot be checked"]
    because: str
    grade: Grade


class Lesson(Frozen):
    """A lesson of the write-up and what this analysis makes of it."""

    id: Identifier
    kind: Literal["technical", "process"]
    title: str
    lesson: str
    amended: str


class Profile(Frozen):
    """A world to run the case in.

    `base` is `embedded`, `packaged:NAME` (see `postmortem weights`), a model folder, or a hub
    id. Adapters are folders, by role. `rows` is how many generated rows are scored where no data
    file is given. `caveat` is printed wherever a result of this profile is shown.
    """

    title: str
    base: str
    adapters: dict[Literal["suspect", "reference", "donor_adapter", "no_op"], str] = {}
    rows: int = Field(ge=2)
    seed: int = 0
    caveat: str


class Case(Frozen):
    """One incident: systems, prompts, attempts, evidence, hypotheses, claims, profiles."""

    case_version: Literal[1]
    name: Identifier
    title: str
    symptom: str
    context: str
    systems: Systems
    loading_warning: LoadingWarning | None = None
    true_size: TrueSize | None = None
    columns: Columns = Columns()
    prompts: dict[Identifier, PromptTemplate]
    attempts: dict[Identifier, Attempt]
    timeline: list[Event] = []
    observations: list[Observation] = []
    evidence: list[Evidence] = []
    hypotheses: list[Hypothesis] = []
    claims: list[Claim] = []
    lessons: list[Lesson] = []
    profiles: dict[Identifier, Profile]

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


class _Loader(yaml.SafeLoader):
    """YAML as plain data, with a repeated key refused rather than overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_shorten(key)} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_case(path: str | Path) -> Case:
    """Read and check a case file.

    Raises `CaseError` naming the file, the key, what was expected and what was found.
    """
    path = Path(path)
    data = _read_yaml(path)
    try:
        case = Case.model_validate(data)
    except ValidationError as error:
        raise _explain(path, error.errors(include_url=False)) from None
    _check_references(path, case)
    return case


def case_digest(case: Case) -> str:
    """Digest of what can change a number; prose and notes do not count."""
    names = {"name", "true_size", "loading_warning", "columns", "prompts", "attempts", "profiles"}
    declared = {"name", "config", "declared_megabytes"}
    systems = dict.fromkeys(Systems.model_fields, declared)
    parts = case.model_dump_json(include={**dict.fromkeys(names, True), "systems": systems})
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> Any:
    remedy = "Give the path of a case file, for example cases/qwen-lora.yml."
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CaseError(path, expected="a case file", found="no such file", remedy=remedy) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise CaseError(
            path, expected="a readable UTF-8 file", found=str(error), remedy=remedy
        ) from None
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        found = "nesting too deep"
    except yaml.MarkedYAMLError as error:  # its full text quotes the file, unprintables and all
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        found = f"{error.problem}{where}".removeprefix("found ")
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
    except SCALAR_ERRORS as error:
        found = f"a value that cannot be read ({_shorten(str(error))})"
    raise CaseError(path, expected="valid YAML", found=found)


def _explain(path: Path, errors: list[ErrorDetails]) -> CaseError:
    """The first validation error as whose, which key, expected, found; and how many more."""
    first = errors[0]
    where = ".".join(_name_part(part) for part in first["loc"])
    subject = f"{path}, key `{where}`" if where else f"{path}, the top level"
    expected = {
        "extra_forbidden": "a known key",
        "invalid_key": "keys that are strings",
        "missing": "this key to be given",
        "model_type": "a mapping of keys to values",
        "string_pattern_mismatch": f"text matching {first.get('ctx', {}).get('pattern')}",
    }.get(first["type"], first["msg"].removeprefix("Input should be "))
    found = {"missing": "nothing", "extra_forbidden": "an unknown key"}.get(
        first["type"], _shorten(first["input"])
    )
    more = f"{len(errors) - 1} further problem(s) in this file." if len(errors) > 1 else ""
    return CaseError(subject, expected=expected, found=found, remedy=more)


def _name_part(part: str | int) -> str:
    """A part of a key as it stands if it is one short line, else quoted and shortened."""
    plain = isinstance(part, str) and part.isprintable() and 0 < len(part) <= 80
    return str(part) if plain else _shorten(part)


def _shorten(value: object) -> str:
    """A value in at most 80 characters on one line, however long, deep or full of aliases."""
    limited = reprlib.Repr()
    limited.maxstring = limited.maxlong = limited.maxother = 80
    try:
        text = limited.repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        text = "a number too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_references(path: Path, case: Case) -> None:
    for name, attempt in case.attempts.items():
        if attempt.prompt not in case.prompts:
            raise CaseError(
                f"{path}, key `attempts.{name}.prompt`",
                expected=f"one of {', '.join(case.prompts)}",
                found=repr(attempt.prompt),
            )
    for kind in ("observations", "evidence", "hypotheses", "claims", "lessons"):
        ids = [item.id for item in getattr(case, kind)]
        repeated = sorted({id_ for id_ in ids if ids.count(id_) > 1})
        if repeated:
            raise CaseError(
                f"{path}, key `{kind}`", expected="distinct ids", found=f"{repeated[0]!r} twice"
            )
