"""Roles and directives that put recorded values on a page, as text and never as markup."""

import json
import re
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from markupsafe import escape
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from postmortem.checker.errors import BookError

LOGGER = logging.getLogger(__name__)
# The look of each verdict; words on claims, actions and knowing take that of their nearest kin.
LOOKS = {
    "holds": "holds",
    "refuted": "refuted",
    "cannot tell": "cannot-tell",
    "not available": "not-available",
    "says what it knows": "holds",
    "knows and does not say": "cannot-tell",
    "does not know": "refuted",
    "stands": "holds",
    "stands in part": "cannot-tell",
    "cannot be checked": "cannot-tell",
    "closed": "holds",
    "open": "cannot-tell",
}
GRADES = {"artefact", "log", "recollection", "measured"}
# What the prose quotes from the shipped case by id; another case need not have it.
QUOTED = tuple(
    f"case.{part}." for part in ("claim", "hypothesis", "evidence", "practice", "quote", "prompt")
)
# Texts that are sentences or names; any other is a run's output.
PROSE = (
    "case.",
    "profile.",
    "rows.",
    "run.",
    "recorded.",
    "diagnosis.conclusion",
    "diagnosis.to_do",
)
IDENTIFIER = re.compile(r"[a-z0-9_-]+")
# A value with its interval, which is not broken across lines.
ESTIMATE = re.compile(r"-?\d+(?:\.\d+)?%? \[.+\]")
# A cell of more characters keeps a width that can be read on a phone.
LONG = 60


class Values:
    """The published values of the book, read once for each build."""

    def __init__(self, app: Sphinx) -> None:
        self.folder = Path(app.srcdir) / app.config.postmortem_values
        self.path = self.folder / "values.json"
        try:
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
            self.figures = json.loads((self.folder / "figures/figures.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BookError(
                self.path, expected="published values", found=str(error), remedy="Run `make book`."
            ) from None

    def table(self, key: str) -> Any:
        """A table by its key; raises `ValueError` where there is none."""
        if key not in self.data["tables"]:
            raise ValueError("no such table on record")
        return self.data["tables"][key]


def values_of(env: Any) -> Values:
    """The values of a build, noting that the page depends on them."""
    values: Values = env.app.postmortem_loaded
    env.note_dependency(str(values.path))
    return values


class ValueRole(SphinxRole):
    """A role whose text is a key, with a format behind a colon where `show` takes one.

    A missing key warns, which fails the build. A part of the case that is quoted by its id may be
    missing: the prose is about one case, and another one builds with it until it has its own.
    """

    def __init__(self, kind: str, show: Callable[[str, Any, str], list[nodes.Node]]) -> None:
        super().__init__()
        self.kind, self.show = kind, show

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        key, _, style = self.text.partition(":")
        value = values_of(self.env).data[self.kind].get(key)
        if value is None and key.startswith(QUOTED):
            return [_inline("not in this case", "pm-unavailable")], []
        try:
            if value is None:
                raise ValueError(f"not recorded among {self.kind}")
            return self.show(key, value, style), []
        except (ValueError, TypeError) as error:
            LOGGER.warning("%r: %s", self.text, error, location=self.get_location())
            return [nodes.Text(f"??{key}??")], []


def show_number(key: str, value: Any, style: str) -> list[nodes.Node]:
    """A measure's value: ``{num}`key:format` ``."""
    if value["value"] is None:
        return [_inline("not available", "pm-unavailable")]
    return [_inline(format_number(value["value"], style), "pm-num")]


def show_estimate(key: str, value: Any, style: str) -> list[nodes.Node]:
    """A measure's value with its interval in a lighter tone: ``{est}`key:format` ``."""
    shown = show_number(key, value, style)
    if value["value"] is None or value["low"] is None:
        return shown
    low, high = (format_number(value[end], style) for end in ("low", "high"))
    return [*shown, nodes.Text(" "), _inline(f"[{low}, {high}]", "pm-interval")]


def show_verdict(key: str, value: Any, style: str) -> list[nodes.Node]:
    """The verdict word with its shape: ``{verdict}`key` ``."""
    return [_chip(value["verdict"])]


def show_reason(key: str, value: Any, style: str) -> list[nodes.Node]:
    """The sentence that goes with a verdict: ``{because}`key` ``."""
    return [nodes.Text(value["because"])]


def show_text(key: str, value: Any, style: str) -> list[nodes.Node]:
    """A recorded text, as code where it is a run's output: ``{text}`key` ``."""
    is_prose = key.startswith(PROSE) or key.endswith(".system")
    return [nodes.Text(value) if is_prose else nodes.literal(value, value)]


class GradeRole(SphinxRole):
    """``{grade}`artefact` ``: how well a claim is supported."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if self.text not in GRADES:
            LOGGER.warning("unknown grade %r", self.text, location=self.get_location())
        return [_chip(self.text)], []


class RecordDirective(SphinxDirective):
    """A directive whose argument names a record; what is not there warns and shows nothing."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            return self.show(self.arguments[0], values_of(self.env))
        except (KeyError, ValueError) as error:
            told = "%s %r: %s"
            LOGGER.warning(told, self.name, self.arguments[0], error, location=self.get_location())
            return []

    def show(self, name: str, values: Values) -> list[nodes.Node]:
        """What stands on the page; `KeyError` or `ValueError` where there is no such record."""
        raise NotImplementedError

    def caption(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The content as one line of text, and what is wrong with it."""
        return self.parse_inline(" ".join(self.content), lineno=self.lineno)


class FigureDirective(RecordDirective):
    """A drawn figure, inline in two widths, with its caption; or why there is none."""

    def show(self, name: str, values: Values) -> list[nodes.Node]:
        self.env.note_dependency(str(values.folder / "figures/figures.json"))
        if name in values.figures["missing"]:
            reason = f"No figure here: {values.figures['missing'][name]}."
            return [nodes.paragraph("", reason, classes=["pm-unavailable"])]
        markup = ""
        for width in ("wide", "narrow"):
            path = values.folder / f"figures/{name}.{width}.svg"
            if not path.is_file():
                raise KeyError("no such figure")
            self.env.note_dependency(str(path))
            markup += f'<div class="pm-{width}">{path.read_text(encoding="utf-8")}</div>'
        figure = nodes.figure("", nodes.raw("", markup, format="html"), classes=["pm-figure-frame"])
        caption, messages = self.caption()
        if caption:
            figure += nodes.caption("", "", *caption)
        return [figure, *messages]


class TableDirective(RecordDirective):
    """A recorded table; every cell is text."""

    option_spec: ClassVar[dict[str, Any]] = {
        "class": directives.class_option,
        "columns": directives.unchanged,
        "rows": directives.positive_int,  # the first so many
    }

    def show(self, name: str, values: Values) -> list[nodes.Node]:
        table = values.table(name)
        chosen = [column.strip() for column in self.options.get("columns", "").split(",")]
        names = chosen if any(chosen) else table["columns"]
        places = [table["columns"].index(column) for column in names]
        shown = table["rows"][: self.options.get("rows")]
        # A head without a row looks like a mistake of the page.
        rows = [[row[place] for place in places] for row in shown] or [["–"] * len(names)]
        caption, messages = self.caption()
        node = table_node(names, rows, caption=caption)
        node["classes"] += self.options.get("class", [])
        return [node, *messages]


class QuoteDirective(RecordDirective):
    """A recorded text, character for character, as a block of its own.

    With `output` it is what a command printed: a long line goes on below where its text began.
    """

    option_spec: ClassVar[dict[str, Any]] = {"output": directives.flag}

    def show(self, name: str, values: Values) -> list[nodes.Node]:
        text = values.data["texts"].get(name)
        if text is None and name.startswith(QUOTED):
            return [nodes.paragraph("", "not in this case", classes=["pm-unavailable"])]
        if text is None:
            raise ValueError("not recorded among texts")
        if "output" not in self.options:
            return [nodes.literal_block(text, text, language="text", classes=["pm-quote"])]
        lines = text.split("\n")
        shown = [_inline(f"{line}\n", "pm-detail" if line[:1] == " " else "") for line in lines]
        return [nodes.literal_block(name, "", *shown, classes=["pm-output"])]


class EntriesDirective(RecordDirective):
    """A recorded table as a list: the first column names an entry, the others describe it.

    With `code` the first column is a quotation, shown as it stands.
    """

    option_spec: ClassVar[dict[str, Any]] = {"code": directives.flag}

    def show(self, name: str, values: Values) -> list[nodes.Node]:
        table = values.table(name)
        _, *names = table["columns"]
        code = "code" in self.options
        entries = [
            _entry(row[0], dict(zip(names, row[1:], strict=True)), code=code)
            for row in table["rows"]
        ]
        looks = ["pm-entries", "pm-quotes"] if code else ["pm-entries"]
        return [nodes.definition_list("", *entries, classes=looks)]


class LedgerDirective(RecordDirective):
    """A table of claims as a list under their sections, each beside what this run found."""

    def show(self, name: str, values: Values) -> list[nodes.Node]:
        table = values.table(name)
        claims = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        sections: list[nodes.Node] = []
        for title, group in groupby(claims, key=itemgetter("section")):
            entries = nodes.definition_list("", *map(_claim, group), classes=["pm-entries"])
            section = nodes.section("", nodes.title(title, title), entries)
            section["names"] = [nodes.fully_normalize_name(title)]
            self.state.document.note_implicit_target(section, section)
            sections.append(section)
        return sections


class WhenDirective(RecordDirective):
    """Content that stands on the page only where a condition on the records is true."""

    def show(self, name: str, values: Values) -> list[nodes.Node]:
        if not holds(name, values):
            return []
        parent: nodes.Element = self.state_machine.node
        before = len(parent)
        content = self.parse_content_to_nodes(allow_section_headings=True)
        # A section goes to the page at once, ahead of the text that stands before its heading.
        sections = parent[before:]
        del parent[before:]
        return [*content, *sections]


def holds(condition: str, values: Values) -> bool:
    """Decide a condition.

    `profile [not] NAME`, `recorded [not] NAME` (a profile, or `bench`), `has KEY`,
    `lacks KEY`, `verdict KEY WORD`.

    Raises `KeyError` for a key that no record has and `ValueError` for anything else.
    """
    texts, measures = values.data["texts"], values.data["measures"]
    match condition.split():
        case ["profile", *words, name] if words in ([], ["not"]):
            return bool((texts["profile.name"] == name) != bool(words))
        case ["recorded", *words, name] if words in ([], ["not"]):
            return (name in texts["recorded"].split()) != bool(words)
        case ["has", key]:
            return measures[key]["value"] is not None
        case ["lacks", key]:
            return measures[key]["value"] is None
        case ["verdict", key, *words] if " ".join(words) in LOOKS:
            return bool(values.data["verdicts"][key]["verdict"] == " ".join(words))
    raise ValueError("not a condition")


def format_number(value: float, style: str) -> str:
    """A number by its format, with a true minus sign."""
    if style.endswith("d"):
        value = round(value)
    text = format(value, style) if style else f"{value:g}"
    return text.replace("-", "\N{MINUS SIGN}")


def table_node(
    columns: list[str], rows: list[list[Any]], *, caption: list[nodes.Node]
) -> nodes.Node:
    """A docutils table of text cells; verdicts and grades keep their look."""
    group = nodes.tgroup("", cols=len(columns))
    group += [nodes.colspec(colwidth=1) for _ in columns]
    head = nodes.row("", *(nodes.entry("", nodes.paragraph("", name)) for name in columns))
    for entry, *cells in zip(head, *rows, strict=True):
        if cells and all(isinstance(cell, int | float) for cell in cells):
            entry[0]["classes"].append("pm-numeric")
    group += nodes.thead("", head)
    body = [nodes.row("", *(nodes.entry("", _cell(cell)) for cell in row)) for row in rows]
    group += nodes.tbody("", *body)
    table = nodes.table("", classes=["pm-table", "colwidths-auto"])
    if caption:
        table += nodes.title("", "", *caption)
    table += group
    return table


def _entry(name: str, fields: dict[str, Any], *, code: bool) -> nodes.definition_list_item:
    kind = nodes.literal if code or IDENTIFIER.fullmatch(name) else nodes.inline
    lines = [_line(field, _chip(str(value))) for field, value in fields.items() if value]
    return _item(name, kind(name, name), lines)


def _item(key: str, name: nodes.Node, lines: list[nodes.paragraph]) -> nodes.definition_list_item:
    term = nodes.term("", "", name, ids=[nodes.make_id(key)])
    return nodes.definition_list_item("", term, nodes.definition("", *lines))


def _claim(claim: dict[str, str]) -> nodes.definition_list_item:
    said = _chip(claim["verdict"]), nodes.Text(" "), _chip(claim["grade"])
    lines = [
        _line("record", *said),
        _line("because", nodes.Text(claim["because"])),
        _line("decided by", nodes.Text(claim["decided by"])),
        _line("would change", nodes.Text(claim["would change"])),
    ]
    if claim["this run"]:
        asked = nodes.Text(f" {claim['this run asks']}")
        lines.append(_line("this run", _chip(claim["this run"]), asked))
    name = nodes.inline(claim["claim"], claim["claim"])
    return _item(f"claim-{claim['id']}", name, lines)


def _line(field: str, *content: nodes.Node) -> nodes.paragraph:
    # One box for the content: the style sheet sets field and content as two columns.
    return nodes.paragraph("", "", nodes.strong(field, field), nodes.inline("", "", *content))


def _cell(cell: Any) -> nodes.paragraph:
    text = "" if cell is None else str(cell)
    if text in LOOKS or text in GRADES:
        return nodes.paragraph("", "", _chip(text))
    if isinstance(cell, int | float):
        # str keeps the point of a float, which tells 0.0 from a count of none.
        shown = text.replace("-", "\N{MINUS SIGN}")
        return nodes.paragraph("", shown, classes=["pm-numeric"])
    kind = "pm-estimate" if ESTIMATE.fullmatch(text) else "pm-long" if len(text) > LONG else ""
    return nodes.paragraph("", text, classes=[kind] if kind else [])


def _chip(text: str) -> nodes.Node:
    """A verdict or a grade with its look; any other text as it is."""
    if text in LOOKS:
        return _inline(text, "pm-verdict", f"pm-verdict-{LOOKS[text]}")
    if text in GRADES:
        return _inline(text, "pm-grade", f"pm-grade-{text}")
    return nodes.Text(text)


def _inline(text: str, *classes: str) -> nodes.inline:
    return nodes.inline(text, text, classes=list(classes))


def _load(app: Sphinx) -> None:
    app.postmortem_loaded = Values(app)


def check_assumed(app: Sphinx, env: Any) -> None:
    """Warn where the prose of a page stands on a verdict, its `assumes`, and a record differs.

    What no record decides, as in a case without the kept runs, is left alone.
    """
    for page, front in env.metadata.items():
        for key, word in json.loads(front.get("assumes", "{}")).items():
            found = app.postmortem_loaded.data["verdicts"].get(key, {"verdict": word})
            if found["verdict"] != word:
                told = "the page assumes that %s is %r; on record it is %r"
                LOGGER.warning(told, key, word, found["verdict"], location=page)


def _escape_title(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """The site's title is a case's, and the theme writes it as it is: make it text, once."""
    for key in ("docstitle", "shorttitle"):
        context[key] = escape(context[key])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the roles and directives with Sphinx."""
    app.add_config_value("postmortem_values", "_values", "env")
    app.connect("builder-inited", _load)
    app.connect("env-updated", check_assumed)
    app.connect("html-page-context", _escape_title)
    app.add_role("num", ValueRole("measures", show_number))
    app.add_role("est", ValueRole("measures", show_estimate))
    app.add_role("verdict", ValueRole("verdicts", show_verdict))
    app.add_role("because", ValueRole("verdicts", show_reason))
    app.add_role("text", ValueRole("texts", show_text))
    app.add_role("grade", GradeRole())
    app.add_directive("record-figure", FigureDirective)
    app.add_directive("record-table", TableDirective)
    app.add_directive("record-quote", QuoteDirective)
    app.add_directive("record-entries", EntriesDirective)
    app.add_directive("record-ledger", LedgerDirective)
    app.add_directive("when", WhenDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
