"""Prompts: filled and encoded, and the parsers of what is answered."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from postmortem.case.schema import PLACEHOLDER, PromptTemplate
from postmortem.checker.errors import DataError

if TYPE_CHECKING:
    from postmortem.case.rows import Rows


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: its text and token ids, and how many tokens it had before any cut."""

    text: str
    token_ids: tuple[int, ...]
    full_length: int

    @property
    def cut(self) -> bool:
        """Whether a column was shortened to fit."""
        return self.full_length > len(self.token_ids)


def fill(template: str, row: Mapping[str, str]) -> str:
    """Replace each `{column}` by the row's value; braces inside a value stay as they are."""

    def value(match: Any) -> str:
        try:
            return row[match[1]]
        except KeyError:
            raise DataError(
                "the rows",
                expected=f"a column {match[1]!r}, which the prompt uses",
                found=", ".join(row),
            ) from None

    return PLACEHOLDER.sub(value, template)


def render(template: PromptTemplate, row: Mapping[str, str], *, tokenizer: Any) -> str:
    """The prompt's text, in the model's chat template where the template asks for one."""
    user = fill(template.template, row)
    if not template.chat:
        return user
    messages = [{"role": "user", "content": user}]
    if template.system:
        messages.insert(0, {"role": "system", "content": fill(template.system, row)})
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except (ValueError, TemplateError) as error:
        raise DataError(
            f"prompt {template.title!r}",
            expected="a chat template of the base that takes its messages",
            found=" ".join(str(error).split())[:200],
            remedy="Give `chat: false` to send the prompt as it is, or leave `system` out.",
        ) from None
    return text


def lead_of(template: PromptTemplate) -> str:
    """What stands between the prompt and the answer: a raw prompt is followed by a space."""
    return "" if template.chat else " "


def encode(
    template: PromptTemplate, row: Mapping[str, str], *, tokenizer: Any, limit: int
) -> Prompt:
    """Render and tokenise; where `limit` tokens are exceeded, shorten the longest column.

    The incident's code cut on the right, which removes the assistant header; here the post is
    cut and everything around it stays.
    """
    row = {name: row[name] for name in template.columns if name in row} or dict(row)
    text = render(template, row, tokenizer=tokenizer)
    # A chat template writes the tokens that a text begins with by itself.
    special = not template.chat
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    full = len(ids)
    while len(ids) > limit:
        longest = max(row, key=lambda name: len(row[name]), default=None)
        if longest is None or not row[longest]:
            raise DataError(
                f"prompt {template.title!r}",
                expected=f"at most {limit} tokens",
                found=f"{len(ids)} with every column empty",
                remedy="Raise `max_prompt_tokens` of the attempt.",
            )
        row = row | {longest: _shorten(row[longest], len(ids) - limit, tokenizer=tokenizer)}
        text = render(template, row, tokenizer=tokenizer)
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return Prompt(text, tuple(ids), full)


def encode_rows(
    template: PromptTemplate, rows: "Rows", *, tokenizer: Any, limit: int
) -> list[Prompt]:
    """Every row as the model receives it, in order."""
    return [
        encode(template, rows.row(index), tokenizer=tokenizer, limit=limit)
        for index in range(len(rows))
    ]


def _shorten(value: str, excess: int, *, tokenizer: Any) -> str:
    """The value without its last `excess` tokens, and always shorter than it was."""
    ids = tokenizer(value, add_special_tokens=False)["input_ids"]
    kept: str = tokenizer.decode(ids[: max(0, len(ids) - excess)])
    # A character that the cut went through decodes to this mark, which the post does not hold.
    kept = kept.rstrip("\ufffd")
    return kept if len(kept) < len(value) else value[: len(value) // 2]


Stage = Literal["float", "pattern", "keyword", "default", "strict", "none"]


@dataclass(frozen=True)
class Parsed:
    """A value in [0, 1], or None, and the stage that produced it."""

    value: float | None
    stage: Stage


def parse_as_written(text: str) -> Parsed:
    """The write-up's three stages and its default, with their defects.

    Stage `float` clamps, so "-3" becomes 0.0, "17" becomes 1.0 and "nan" becomes 1.0. Stage
    `pattern` reads neither "1" nor ".5" nor "85%". Stage `keyword` looks for parts of words:
    "know" holds "no", and "does not violate" holds "violate". What nothing matches becomes 0.5.
    """
    try:
        return Parsed(max(0.0, min(1.0, float(text.strip()))), "float")
    except ValueError:
        pass
    if match := re.search(r"\b(0\.\d+|1\.0+)\b", text):
        return Parsed(max(0.0, min(1.0, float(match[1]))), "pattern")
    lower = text.lower()
    if any(word in lower for word in ("yes", "violate", "spam")):
        return Parsed(0.8, "keyword")
    if any(word in lower for word in ("no", "not", "fine")):
        return Parsed(0.2, "keyword")
    return Parsed(0.5, "default")


# A whole number between 0 and 1 and nothing else; at most 16 decimals keeps it a float.
_STRICT = re.compile(r"(0(\.\d{1,16})?|1(\.0{1,16})?|\.\d{1,16})", re.ASCII)


def parse_strict(text: str) -> Parsed:
    """A number between 0 and 1 that is the whole answer, or None: nothing is guessed."""
    if match := _STRICT.fullmatch(text.strip()):
        return Parsed(float(match[0]), "strict")
    return Parsed(None, "none")


def parse_choice(text: str, answers: Sequence[str]) -> Parsed:
    """1 for the second of two answers, 0 for the first, None where it begins with neither.

    Case does not count, nor do marks before the word; what follows it is not read.
    """
    start = text.casefold()
    for value, answer in enumerate(answers):
        if re.match(rf"\W*{re.escape(answer.casefold())}(?!\w)", start):
            return Parsed(float(value), "strict")
    return Parsed(None, "none")


def counts_as_parsed(value: float) -> bool:
    """The write-up's "parse success": the value is none of its fallback values."""
    return value not in {0.2, 0.5, 0.8}
