"""From generated text to a value: the write-up's parser as it was, and a strict one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
