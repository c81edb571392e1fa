"""No result is typed by hand: digits in the prose of the chapters come from roles."""

import re
from pathlib import Path

import pytest

BOOK = Path(__file__).parents[1] / "book"
# Chapters whose every number is live. A name without a file is one that this book does not have.
CHAPTERS = (
    *("hypotheses", "evidence", "root-cause", "validation", "lessons", "practice", "claims"),
    *("summary", "forensics", "controls", "replay", "ledger", "diagnosis", "suite"),
    *("real-models", "speed", "membership"),
)
# What a page may spell with digits: names, and evidence quoted as it stands. Nothing measured.
ALLOWED = re.compile(
    r"""
    \b(?:Qwen|SmolLM)[\w.-]*          # a model's name, with its version and size
    | \b\d+(?:\.\d+)?[Bb]\b           # the size in a name: 1.5B, 4b
    | \bv[12]\b                       # the attempts
    | \b[A-H][1-4]\b                  # hypotheses
    | (?<![\d.])[01]\.0(?![\d.]*\d)   # the symptom's text, and the other end of its scale
    | \b\d{4}-\d{2}-\d{2}\b           # a date
    | \b\d{1,2}\ [A-Z][a-z]+\ \d{4}\b # a date in words
    | \b\d+\.\d+\.(?:\d+|x)(?:\+\w+)? # a version
    | \b(?:fp|int|bf)\d+\b            # a number format
    | \bQ\d_[\w]+\b                   # a rounding
    | \bP100\b                        # a card
    """,
    re.VERBOSE,
)


def typed_numbers(text):
    """Line and digits of each number in the prose, outside roles, directives, code and links."""
    # What is taken out keeps its line ends, so that a line's number stays what it is.
    for pattern in (
        r"(?ms)^(`{3,}|~{3,}).*?^\1",  # a code block
        r"(?m)^:{3,}.*$",  # a directive's first and last line
        r"(?m)^:[\w-]+:.*$",  # its options
        r"(?m)^\([\w-]+\)=$",  # a target
        r"\{[\w-]+\}`[^`]*`",  # a role
        r"(`+)(?!`)(?:.|\n(?!\n))+?\1",  # code, also over a line's end
        r"\]\([^)]*\)",  # where a link goes
        r"(?s)<!--.*?-->",  # a comment
        r"(?m)^\s*\d+\.(?=\s)",  # the mark of a list item
    ):
        text = re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    text = ALLOWED.sub(lambda found: " " * len(found[0]), text)
    return [
        (number, digits)
        for number, line in enumerate(text.splitlines(), 1)
        for digits in re.findall(r"\S*\d\S*", line)
    ]


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_number_is_typed_by_hand(name):
    """A chapter types no digit in its prose: numbers come from records or from the case."""
    page = BOOK / f"{name}.md"
    if not page.is_file():
        pytest.skip(f"the book has no chapter {name}")
    found = [f"{page}:{line}: {digits}" for line, digits in typed_numbers(page.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It was 85 per cent.", [(1, "85")]),
        ("One\n\nAUC of 0.500, whatever", [(3, "0.500,")]),
        (":::{record-table} t1\nof 512 tokens\n:::", [(2, "512")]),
        ("{num}`a.b:.2f` and 3", [(1, "3")]),
        ("0.05 is not 0.0", [(1, "0.05")]),
        ("about 2,179,072", [(1, "2,179,072")]),
        ("```\n1\n```\n2", [(4, "2")]),
        ("```{note}\n1\n```", []),
        ("{num}`a:.2f`\n`x1`\n[x](y2.md)\n1. one\n:columns: a1", []),
        ("Qwen2.5-1.5B and a 4B, v1, A1, 0.0 and 1.0, 0.16.0, 2025-10-22, 22 October 2025", []),
        ("``a`1`` {text}`a\n2` `b\n3`", []),
        ("`a\n\n4`", [(3, "4`")]),
    ],
)
def test_what_counts_as_typed(text, found):
    """Digits in prose and captions are found with their line; names, code and roles are not."""
    assert typed_numbers(text) == found
