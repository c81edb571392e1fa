"""Prompts: a row's values put into a template, once, and never cut at the answer's end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from postmortem.case import PLACEHOLDER, PromptTemplate
from postmortem.errors import DataError


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


def _shorten(value: str, excess: int, *, tokenizer: Any) -> str:
    """The value without its last `excess` tokens, and always shorter than it was."""
    ids = tokenizer(value, add_special_tokens=False)["input_ids"]
    kept: str = tokenizer.decode(ids[: max(0, len(ids) - excess)])
    # A character that the cut went through decodes to this mark, which the post does not hold.
    kept = kept.rstrip("\ufffd")
    return kept if len(kept) < len(value) else value[: len(value) // 2]
