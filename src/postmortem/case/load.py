"""Read a case file, check it, and say what is wrong with it."""

import hashlib
import reprlib
from collections.abc import Hashable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from postmortem.case.schema import (
    FORMS,
    Case,
    Forensics,
    Frozen,
    Identifier,
    Item,
    ItemForm,
    Sentence,
    Systems,
    Variation,
)
from postmortem.checker.errors import CaseError

# The one profile of such a case.
PROFILE = "own"
# The keys by which a file is known to be in this form; the full one has neither.
MARKS = ("suspect", "base")
ANSWERS = ("No", "Yes")


class OwnColumns(Frozen):
    """The columns of the rows file: the text, and where there are any, id, group and label."""

    text: Sentence
    id: Sentence | None = None
    group: Sentence | None = None
    label: Sentence | None = None


class OwnPrompt(Frozen):
    """A prompt: what is asked for, in which words, and how long an answer may be.

    `chat` false sends the template as it is, for a base without a chat template.
    """

    contract: Literal["number", "yes_no", "choice", "class"]
    template: Sentence
    system: str = ""
    chat: bool = True
    answers: list[Sentence] | None = None
    max_new_tokens: int = Field(default=8, ge=1, le=4096)
    max_prompt_tokens: int = Field(default=2048, ge=16)

    @field_validator("answers", mode="before")
    @classmethod
    def _are_two_words(cls, found: Any) -> Any:
        if isinstance(found, list) and any(isinstance(word, bool) for word in found):
            raise ValueError('words in quotes, as in ["no", "yes"]: YAML reads no and yes as truth')
        if found is not None and not (isinstance(found, list) and len(found) == 2):
            raise ValueError("two answers, the negative one first")
        if found is not None and found[0] == found[1]:
            raise ValueError("two different answers")
        return found


class OwnCase(Frozen):
    """The file. `base` and the adapters are folders or hub ids, the base also `packaged:NAME`.

    `rows` limits a run to the first so many; `positive` is the label that counts as 1.
    """

    case_version: Literal[1]
    name: Identifier
    title: Sentence | None = None
    symptom: Sentence = "not described"
    base: Sentence
    suspect: Sentence
    reference: Sentence | None = None
    data: Sentence
    labels: Sentence | None = None
    columns: OwnColumns
    positive: Annotated[str, Field(min_length=1)] | None = None
    rows: int = Field(default=0, ge=0)
    prompts: dict[Identifier, OwnPrompt] = Field(min_length=1)

    @field_validator("positive", mode="before")
    @classmethod
    def _as_written(cls, found: Any) -> Any:
        # A label such as 1 or true stands in the rows file as text.
        return str(found) if isinstance(found, int) else found

    @field_validator("prompts")
    @classmethod
    def _are_of_one_kind(cls, found: dict[str, OwnPrompt]) -> dict[str, OwnPrompt]:
        kinds = {prompt.contract == "class" for prompt in found.values()}
        if len(kinds) > 1:
            raise ValueError("prompts for a classifier alone, or for a language model alone")
        for name, prompt in found.items():
            if prompt.contract == "choice" and prompt.answers is None:
                raise ValueError(f"`answers` of the prompt {name}, the negative one first")
        return found


def is_own(data: Any) -> bool:
    """Whether the contents of a case file are in the short form."""
    return isinstance(data, dict) and any(mark in data for mark in MARKS)


def expand(data: Any) -> dict[str, Any]:
    """The case in full, as plain data; pydantic's `ValidationError` names the short form's keys."""
    own = OwnCase.model_validate(data)
    named = {"base": own.base, "suspect": own.suspect, "reference": own.reference}
    systems = {
        role: {"title": role, "name": name, "grade": "artefact", "source": "the case file"}
        for role, name in named.items()
        if name
    }
    adapters = {role: name for role, name in named.items() if name and role != "base"}
    profile = {
        "title": own.title or own.name,
        "base": own.base,
        "adapters": adapters,
        "data": own.data,
        "labels": own.labels or "",
        "first": own.rows,
        "rows": 2,
        "caveat": "What is found on these rows need not hold on others.",
    }
    return {
        "case_version": own.case_version,
        "name": own.name,
        "title": own.title or own.name,
        "symptom": own.symptom,
        "context": "",
        "systems": systems,
        "columns": own.columns.model_dump() | {"positive": own.positive},
        "prompts": {name: _expand_prompt(name, prompt) for name, prompt in own.prompts.items()},
        "attempts": {},
        "profiles": {PROFILE: profile},
    }


def _expand_prompt(name: str, prompt: OwnPrompt) -> dict[str, Any]:
    written = prompt.model_dump(exclude={"answers"})
    answers = list(prompt.answers or ANSWERS)
    return {
        **written,
        "title": name,
        "grade": "artefact",
        "answers": answers,
        "chat": prompt.chat and prompt.contract != "class",
    }


# PyYAML's own constructors raise bare errors on a scalar such as 2025-13-45 or !!int "".
SCALAR_ERRORS = (AttributeError, LookupError, OverflowError, TypeError, ValueError)


# libyaml, where PyYAML was built with it, reads the case of the incident ten times as fast.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_YAML):
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
    """Read and check a case file, in its full form or in the short one.

    Raises `CaseError` naming the file, the key, what was expected and what was found.
    """
    path = Path(path)
    data = read_yaml(path)
    try:
        case = Case.model_validate(expand(data) if is_own(data) else data)
    except ValidationError as error:
        raise explain_errors(path, error.errors(include_url=False)) from None
    _check_references(path, case)
    return case


def case_digest(case: Case, profile: str | None = None) -> str:
    """Digest of what can change an answer; prose, notes and what a diagnosis reads do not count.

    With a `profile` the other profiles do not count either.
    """
    names = {"name", "true_size", "loading_warning", "forensics", "adapter_filter", "columns"}
    names |= {"prompts", "variations", "attempts", "compared"}
    runs = {
        "base",
        "bases",
        "adapters",
        "replay_adapters",
        "corpus",
        "rows",
        "seed",
        "replays",
        "recorded",
    }
    profiles = dict.fromkeys(case.profiles if profile is None else [profile], runs)
    declared = {"name", "config", "declared_megabytes"}
    systems = dict.fromkeys(Systems.model_fields, declared)
    return _digest(case, {**dict.fromkeys(names, True), "systems": systems, "profiles": profiles})


def evidence_digest(case: Case) -> str:
    """Digest of what a diagnosis reads of a case, beside the replays."""
    fields = {"id", "final", "causes", "base_alone"}
    return _digest(case, {"observed": True, "hypotheses": {"__all__": fields}})


def _digest(case: Case, include: Mapping[str, Any]) -> str:
    parts = case.model_dump_json(include=dict(include))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def read_yaml(
    path: Path,
    *,
    kind: str = "case file",
    remedy: str = "Give the path of a case file, for example cases/qwen-lora.yml.",
) -> Any:
    """Read a file of plain data; `CaseError` where it is missing, not YAML, or repeats a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CaseError(path, expected=f"a {kind}", found="no such file", remedy=remedy) from None
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


def explain_errors(path: Path, errors: list[ErrorDetails]) -> CaseError:
    """The first validation error as whose, which key, expected, found; and how many more."""
    first = errors[0]
    where = ".".join(_name_part(part) for part in first["loc"])
    subject = f"{path}, key `{where}`" if where else f"{path}, the top level"
    expected = {
        "extra_forbidden": "a known key",
        "invalid_key": "keys that are strings",
        "missing": "this key to be given",
        "model_type": "a mapping of keys to values",
        "string_too_short": "a text that is not blank",
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
    for name, varied in case.variations.items():
        _check_variation(path, case, f"variations.{name}", varied=varied)
    if case.forensics is not None:
        _check_forensics(path, case, facts=case.forensics)
    distinct = [("hypotheses", "distinct ids", [h.id for h in case.hypotheses])]
    for section, items in case.sections.items():
        for number, item in enumerate(items):
            _check_item(f"{path}, key `{section}.{number}", item, form=FORMS[section])
        distinct.append((section, "distinct ids", [item.id for item in items if item.id]))
    causes = [cause for hypothesis in case.hypotheses for cause in hypothesis.causes]
    distinct.append(("hypotheses", "each cause under one hypothesis", causes))
    distinct.append(("observed", "each test observed once", [o.test for o in case.observed]))
    for key, expected, names in distinct:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise CaseError(
                f"{path}, key `{key}`", expected=expected, found=f"{repeated[0]!r} twice"
            )


def _check_item(where: str, item: Item, *, form: ItemForm) -> None:
    """An item has the fields that its section needs, and no other than those that it may have."""
    given = [name for name, value in item if value]
    needed = form.needs.split()
    known = [*needed, *form.may.split()]
    for name in needed:
        if name not in given:
            raise CaseError(f"{where}.{name}`", expected="this key to be given", found="nothing")
    for name in given:
        if name not in known:
            expected = f"here one of {', '.join(known)}"
            raise CaseError(f"{where}.{name}`", expected=expected, found="another key")
    if form.kinds and item.kind not in form.kinds:
        expected = f"one of {', '.join(form.kinds)}"
        raise CaseError(f"{where}.kind`", expected=expected, found=_shorten(item.kind))


def _check_variation(path: Path, case: Case, key: str, *, varied: Variation) -> None:
    """A variation changes a prompt of the case, and each passage that it names is there."""
    prompt = case.prompts.get(varied.prompt)
    if prompt is None:
        raise CaseError(
            f"{path}, key `{key}.prompt`",
            expected=f"one of {', '.join(case.prompts)}",
            found=repr(varied.prompt),
        )
    for part in varied.replace:
        if part.old not in prompt.system + prompt.template:
            raise CaseError(
                f"{path}, key `{key}.replace`",
                expected=f"passages of the prompt {varied.prompt}",
                found=f"{_shorten(part.old)}, which it does not hold",
            )


def _check_forensics(path: Path, case: Case, *, facts: Forensics) -> None:
    """Lists must agree in length, times must rise, and names must name something."""
    rows, log = len(facts.row_ids.values), facts.log

    def refuse(key: str, expected: str, found: object) -> CaseError:
        subject = f"{path}, key `forensics.{key}`"
        return CaseError(subject, expected=expected, found=_shorten(found))

    for name in ("labels", "submitted", "prompt_tokens"):
        count = len(getattr(facts, name).values)
        if count != rows:
            raise refuse(f"{name}.values", f"{rows} values, as many as row_ids", count)
    if len(set(facts.row_ids.values)) != rows:
        raise refuse("row_ids.values", "distinct ids", facts.row_ids.values)
    if len(log.ticks) != rows + 1:
        expected = f"{rows + 1} times: a start and the end of each of {rows} rows"
        raise refuse("log.ticks", expected, len(log.ticks))
    for name, times in (("ticks", log.ticks), ("loading", log.loading)):
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise refuse(f"log.{name}", "times that rise", times)
    if facts.attempt not in case.attempts:
        raise refuse("attempt", f"one of {', '.join(case.attempts)}", facts.attempt)
    named = {"ignored_flags": facts.ignored_flags}
    named |= {f"faults.{n}.message": f.message for n, f in enumerate(facts.faults) if f.message}
    for key, message in named.items():
        if message not in log.messages:
            raise refuse(key, f"one of {', '.join(log.messages)}", message)
    hypotheses = [hypothesis.id for hypothesis in case.hypotheses]
    for number, fault in enumerate(facts.faults):
        if fault.hypothesis is not None and fault.hypothesis not in hypotheses:
            expected = f"one of {', '.join(hypotheses)}"
            raise refuse(f"faults.{number}.hypothesis", expected, fault.hypothesis)
    ids = [fault.id for fault in facts.faults]
    if len(set(ids)) != len(ids):
        raise refuse("faults", "distinct ids", ids)
