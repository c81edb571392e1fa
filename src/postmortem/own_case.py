"""The short form of a case: one suspect adapter, its base, rows, and the prompts to ask.

It is what one needs to ask about an adapter of one's own. It is checked under its own keys, so
that an error names what stands in the file, and then written out as a case in full.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from postmortem.schema import Frozen, Identifier, Sentence

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
        "own": True,
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
