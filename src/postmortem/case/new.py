"""A new case: its file, with what is known filled in, and its pages to write on."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postmortem.case.layout import PAGES, SCAFFOLD, TOC
from postmortem.checker.errors import CaseError, DataError

CASES = Path("cases")
NAME = re.compile(r"[a-z][a-z0-9_-]{0,59}")
COLUMN = re.compile(r"\w+")
# What YAML reads as itself, without quotes and in no other way.
PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[A-Za-z][A-Za-z0-9_./-]*", re.I)
# What stands in for the prompt until there is one, by what it asks for.
QUESTIONS = {
    "yes_no": "Your question about the text, to be answered with Yes or No.",
    "number": "Your question about the text, to be answered with a number from 0 to 1.",
    "choice": "Your question about the text, to be answered with one of the two words.",
    "class": "",
}


@dataclass(frozen=True)
class Known:
    """What is known of a new case; what is empty becomes a placeholder that says what to fill in.

    `text`, `label`, `group` and `id` are columns of `data`, `positive` is the label that counts as
    1, `question` the prompt, and `answers` the negative and the positive one, with a comma between.
    """

    base: str = ""
    suspect: str = ""
    reference: str = ""
    data: str = ""
    text: str = ""
    label: str = ""
    positive: str = ""
    id: str = ""
    group: str = ""
    question: str = ""
    contract: str = "yes_no"
    answers: str = ""
    system: str = ""
    title: str = ""
    symptom: str = ""


def create_case(name: str, known: Known, *, folder: str | Path = CASES) -> list[Path]:
    """Write a case file and a folder of pages, and return what was written; nothing is replaced.

    Raises `CaseError` for a name that cannot be one or is taken, and `DataError` where the rows
    file lacks a column that was named.
    """
    check_name(name)
    file, pages = Path(folder, f"{name}.yml"), Path(folder, name)
    for path in (file, pages):
        if path.exists() or path.is_symlink():
            raise CaseError(
                path,
                expected="nothing there yet",
                found="a file or folder of this name",
                remedy="Take another name, or remove it yourself: nothing is replaced.",
            )
    text = write_case(name, known)
    _check_columns(known)
    Path(folder).mkdir(parents=True, exist_ok=True)
    # Made aside and moved, so that a run that is cut short leaves no half of it.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as scratch:
        made = Path(scratch, "pages")
        made.mkdir()
        for source in sorted(SCAFFOLD.iterdir()):
            if source.suffix in PAGES or source.name == TOC:
                shutil.copyfile(source, made / source.name)
        made.rename(pages)
    with file.open("x", encoding="utf-8") as stream:
        stream.write(text)
    return [file, *sorted(pages.iterdir())]


def check_name(name: str) -> None:
    """Raise `CaseError` for a name that cannot stand in a file name and a key, with one that can.

    A name begins with a small letter and holds small letters, digits, - and _, at most sixty.
    """
    if NAME.fullmatch(name):
        return
    near = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-_0123456789")[:60].rstrip("-")
    raise CaseError(
        f"name {name[:60]!a}",
        expected="small letters, digits, - and _, beginning with a letter, at most 60",
        found="something else",
        remedy=f"For example {near}." if NAME.fullmatch(near) else "For example my-adapter.",
    )


def write_case(name: str, known: Known) -> str:
    """The text of a case file with what is known in it and a comment on each line."""
    text = known.text or "body"
    if not COLUMN.fullmatch(text):
        raise CaseError(
            f"column {text[:60]!a}",
            expected="a name of letters, digits and _, as {name} in the prompt takes no other",
            found="other characters",
            remedy="Rename the column in the file.",
        )
    if known.contract not in QUESTIONS:
        raise CaseError(
            f"contract {known.contract[:60]!a}",
            expected=f"one of {', '.join(QUESTIONS)}",
            found="another",
        )
    question = known.question or QUESTIONS[known.contract]
    if f"{{{text}}}" not in question:
        question = f"{question.rstrip()}\n\n{{{text}}}".lstrip()
    others = ", ".join(name for name in QUESTIONS if name != known.contract)
    columns = {"text": text, "label": known.label, "id": known.id, "group": known.group}
    given = {key: value for key, value in columns.items() if value}
    listed = ", ".join(f"{key}: {quote(value)}" for key, value in given.items())
    lines = [
        "case_version: 1",
        f"name: {name}",
        _line("title", known.title, "What the pages are headed by", optional=True),
        _line("symptom", known.symptom, "What is seen, in a sentence", optional=True),
        _line("base", known.base, "models/base", "a folder, a hub id, or packaged:smollm2"),
        _line("suspect", known.suspect, "adapters/mine", "an adapter's folder or hub id"),
        _line("reference", known.reference, "adapters/sound", "one known to work", optional=True),
        _line("data", known.data, "rows.csv", "CSV, Parquet or JSON lines"),
        f"columns: {{{listed}}}" + ("" if known.label else "  # label, id and group are optional"),
        _line("positive", known.positive, "spam", "the label that counts as 1", optional=True),
        "# rows: 100  # only the first so many",
        "prompts:",
        "  ask:  # the first prompt is the one that the pages are about; add others below",
        f"    contract: {known.contract}  # or {others}",
        *_write_answers(known),
        *([f"    system: {quote(known.system)}"] if known.system else []),
        f"    template: {quote(question)}",
    ]
    if known.contract != "class":
        lines.append("    # chat: false  # for a base without a chat template")
    return "\n".join(lines) + "\n"


def _write_answers(known: Known) -> list[str]:
    if known.contract != "choice":
        return []
    words = [word.strip() for word in known.answers.split(",") if word.strip()]
    if words and (len(words) != 2 or words[0] == words[1]):
        raise CaseError(
            f"answers {known.answers[:60]!a}",
            expected="two different words with a comma between them, the negative one first",
            found=f"{len(words)}",
        )
    listed = ", ".join(map(quote, words or ["no", "yes"]))
    return [f"    answers: [{listed}]  # the negative one first"]


def quote(value: str) -> str:
    """A text as one YAML scalar on one line."""
    if PLAIN.fullmatch(value):
        return value
    dumped: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))
    return dumped.rstrip("\n")


def _line(key: str, value: str, placeholder: str, note: str = "", *, optional: bool = False) -> str:
    if value:
        return f"{key}: {quote(value)}"
    told = f"  # {note}" if note else ""
    return f"# {key}: {placeholder}{told}" if optional else f"{key}: {placeholder}{told}"


def _check_columns(known: Known) -> None:
    """Hold the columns against the file where it is given: a misspelt one is told at once."""
    if not known.data:
        return
    from postmortem.case.rows import read_rows
    from postmortem.case.schema import Columns

    named: dict[str, Any] = {
        "id": known.id or None,
        "text": known.text or "body",
        "group": known.group or None,
        "label": known.label or None,
        "positive": known.positive or None,
    }
    rows = read_rows(known.data, columns=Columns(**named))
    if known.label and rows.labels is None:
        raise DataError(
            known.data,
            expected=f"a column {known.label!r}",
            found=", ".join(map(str, rows.frame.columns)),
            remedy="Give the name of the column of labels with --label.",
        )
