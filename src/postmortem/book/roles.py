"""Roles and directives that put recorded values on a page, as text and never as markup."""

import json
import re
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
VERDICTS = {"holds", "refuted", "cannot tell", "not available"}
# What a model does with what it knows; each word takes the look of its nearest kin.
KNOWING = {
    "says what it knows": "holds",
    "knows and does not say": "cannot tell",
    "does not know": "refuted",
}
# Verdicts on a claim and states of an action item.
KIN = KNOWING | {
    "stands": "holds",
    "stands in part": "cannot tell",
    "cannot be checked": "cannot tell",
    "closed": "holds",
    "open": "cannot tell",
}
DECIDED = VERDICTS | KNOWING.keys()
GRADES = {"artefact", "log", "recollection", "measured"}
UNAVAILABLE = "not available"
# What the prose quotes from the shipped case by id; another case need not have it.
QUOTED = ("case.claim.", "case.hypothesis.", "case.evidence.", "case.practice.")
# Texts that are sentences or names; any other is a run's output.
PROSE = ("case.", "profile.", "rows.", "run.", "diagnosis.conclusion")
IDENTIFIER = re.compile(r"[a-z0-9_-]+")
# A value with its interval, which is not broken across lines.
ESTIMATE = re.compile(r"-?\d+(?:\.\d+)?%? \[.+\]")
# What the ledger says of a claim after its reason.
DECIDERS = ("decided by", "would change")
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

    def find(self, kind: str, key: str) -> Any:
        """A value by kind and key, or None where there is none."""
        return self.data[kind].get(key)


def values_of(env: Any) -> Values:
    """The values of a build, noting that the page depends on them."""
    values: Values = env.app.postmortem_loaded
    env.note_dependency(str(values.path))
    return values


class _ValueRole(SphinxRole):
    """A role whose text is a key; a missing key warns, which fails the build.

    A part of the case that is quoted by its id may be missing: the prose is about one case, and
    another one builds with it until it has prose of its own.
    """

    kind: ClassVar[str]

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        key, _, style = self.text.partition(":")
        value = values_of(self.env).find(self.kind, key)
        if value is None and key.startswith(QUOTED):
            return [_inline("not in this case", "pm-unavailable")], []
        if value is None:
            LOGGER.warning("no recorded %s %r", self.kind, key, location=self.get_location())
            return [nodes.Text(f"??{key}??")], []
        try:
            return self.show(value, style), []
        except (ValueError, TypeError) as error:
            LOGGER.warning("%r: %s", self.text, error, location=self.get_location())
            return [nodes.Text(f"??{key}??")], []

    def show(self, value: Any, style: str) -> list[nodes.Node]:
        raise NotImplementedError


class NumberRole(_ValueRole):
    """``{num}`key:format` ``: a measure's value."""

    kind = "measures"

    def show(self, value: Any, style: str) -> list[nodes.Node]:
        if value["value"] is None:
            return [_inline(UNAVAILABLE, "pm-unavailable")]
        return [_inline(format_number(value["value"], style), "pm-num")]


class EstimateRole(NumberRole):
    """``{est}`key:format` ``: a measure's value with its interval in a lighter tone."""

    def show(self, value: Any, style: str) -> list[nodes.Node]:
        shown = super().show(value, style)
        if value["value"] is None or value["low"] is None:
            return shown
        low, high = (format_number(value[end], style) for end in ("low", "high"))
        return [*shown, nodes.Text(" "), _inline(f"[{low}, {high}]", "pm-interval")]


class VerdictRole(_ValueRole):
    """``{verdict}`key` ``: the verdict word with its shape."""

    kind = "verdicts"

    def show(self, value: Any, style: str) -> list[nodes.Node]:
        return [verdict_node(value["verdict"])]


class BecauseRole(_ValueRole):
    """``{because}`key` ``: the sentence that goes with a verdict."""

    kind = "verdicts"

    def show(self, value: Any, style: str) -> list[nodes.Node]:
        return [nodes.Text(value["because"])]


class TextRole(_ValueRole):
    """``{text}`key` ``: a recorded text, as code where it is a run's output."""

    kind = "texts"

    def show(self, value: Any, style: str) -> list[nodes.Node]:
        key = self.text.partition(":")[0]
        if key.startswith(PROSE) or key.endswith(".system"):
            return [nodes.Text(value)]
        return [nodes.literal(value, value)]


class GradeRole(SphinxRole):
    """``{grade}`artefact` ``: how well a claim is supported."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if self.text not in GRADES:
            LOGGER.warning("unknown grade %r", self.text, location=self.get_location())
        return [_inline(self.text, "pm-grade", f"pm-grade-{self.text}")], []


class FigureDirective(SphinxDirective):
    """A drawn figure, inline in two widths, with its caption; or why there is none."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        values = values_of(self.env)
        self.env.note_dependency(str(values.folder / "figures/figures.json"))
        caption = nodes.caption()
        parsed, messages = self.parse_inline(" ".join(self.content), lineno=self.lineno)
        if name in values.figures["missing"]:
            reason = values.figures["missing"][name]
            body = nodes.paragraph("", f"No figure here: {reason}.", classes=["pm-unavailable"])
            return [nodes.container("", body, classes=["pm-no-figure"]), *messages]
        markup = ""
        for width in ("wide", "narrow"):
            path = values.folder / f"figures/{name}.{width}.svg"
            if not path.is_file():
                LOGGER.warning("no figure %r", name, location=self.get_location())
                return []
            self.env.note_dependency(str(path))
            svg = path.read_text(encoding="utf-8")
            markup += f'<div class="pm-{width}">{svg}</div>'
        caption += parsed
        figure = nodes.figure("", nodes.raw("", markup, format="html"), classes=["pm-figure-frame"])
        if parsed:
            figure += caption
        return [figure, *messages]


class TableDirective(SphinxDirective):
    """A recorded table; every cell is text."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {
        "columns": directives.unchanged,
        "rows": directives.positive_int,  # the first so many
    }

    def run(self) -> list[nodes.Node]:
        key = self.arguments[0]
        table = values_of(self.env).find("tables", key)
        if table is None:
            LOGGER.warning("no recorded table %r", key, location=self.get_location())
            return []
        chosen = [c.strip() for c in self.options.get("columns", "").split(",") if c.strip()]
        unknown = [name for name in chosen if name not in table["columns"]]
        if unknown:
            LOGGER.warning(
                "table %r has no column %r", key, unknown[0], location=self.get_location()
            )
            return []
        names = chosen or table["columns"]
        places = [table["columns"].index(name) for name in names]
        shown = table["rows"][: self.options.get("rows")]
        # A head without a row looks like a mistake of the page.
        rows = [[row[place] for place in places] for row in shown] or [["–"] * len(names)]
        caption, messages = self.parse_inline(" ".join(self.content), lineno=self.lineno)
        return [table_node(names, rows, caption=caption), *messages]


class EntriesDirective(SphinxDirective):
    """A recorded table as a list: the first column names an entry, the others describe it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        table = values_of(self.env).find("tables", self.arguments[0])
        if table is None:
            LOGGER.warning("no recorded table %r", self.arguments[0], location=self.get_location())
            return []
        _, *names = table["columns"]
        entries = [_entry(row[0], dict(zip(names, row[1:], strict=True))) for row in table["rows"]]
        return [nodes.definition_list("", *entries, classes=["pm-entries"])]


class LedgerDirective(SphinxDirective):
    """The claims of the case as a list under their sections, each beside what this run found."""

    def run(self) -> list[nodes.Node]:
        table = values_of(self.env).find("tables", "case.claims")
        if table is None:
            LOGGER.warning("no recorded table 'case.claims'", location=self.get_location())
            return []
        claims = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        sections = []
        for name, group in groupby(claims, key=itemgetter("section")):
            entries = nodes.definition_list("", *map(_claim, group))
            entries["classes"] = ["pm-entries", "pm-ledger"]
            section = nodes.section("", nodes.title(name, name), entries)
            section["names"] = [nodes.fully_normalize_name(name)]
            self.state.document.note_implicit_target(section, section)
            sections.append(section)
        return sections


class WhenDirective(SphinxDirective):
    """Content that stands on the page only where a condition on the records is true."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            wanted = holds(self.arguments[0], values_of(self.env))
        except (KeyError, ValueError) as error:
            LOGGER.warning(
                "condition %r: %s", self.arguments[0], error, location=self.get_location()
            )
            return []
        if not wanted:
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
    `lacks KEY`, `verdict KEY [not] WORD`.

    Raises `KeyError` for a key that no record has and `ValueError` for anything else.
    """
    match condition.split():
        case ["profile", "not", name]:
            return bool(values.data["texts"]["profile.name"] != name)
        case ["profile", name]:
            return bool(values.data["texts"]["profile.name"] == name)
        case ["recorded", "not", name]:
            return name not in values.data["texts"]["recorded"].split()
        case ["recorded", name]:
            return name in values.data["texts"]["recorded"].split()
        case ["has", key]:
            return values.data["measures"][key]["value"] is not None
        case ["lacks", key]:
            return values.data["measures"][key]["value"] is None
        case ["verdict", key, "not", *words] if " ".join(words) in DECIDED:
            return bool(values.data["verdicts"][key]["verdict"] != " ".join(words))
        case ["verdict", key, *words] if " ".join(words) in DECIDED:
            return bool(values.data["verdicts"][key]["verdict"] == " ".join(words))
    raise ValueError("not a condition")


def format_number(value: float, style: str) -> str:
    """A number by its format, with a true minus sign."""
    if style.endswith("d"):
        value = round(value)
    text = format(value, style) if style else f"{value:g}"
    return text.replace("-", "\N{MINUS SIGN}")


def verdict_node(word: str) -> nodes.inline:
    """A verdict word, marked so that the style sheet gives it a shape."""
    kin = KIN.get(word, word)
    return _inline(word, "pm-verdict", f"pm-verdict-{kin.replace(' ', '-')}")


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
    group += nodes.tbody("", *(_row(row) for row in rows))
    table = nodes.table("", classes=["pm-table", "colwidths-auto"])
    if caption:
        table += nodes.title("", "", *caption)
    table += group
    return table


def _entry(name: str, fields: dict[str, Any]) -> nodes.definition_list_item:
    kind = nodes.literal if IDENTIFIER.fullmatch(name) else nodes.inline
    lines = [_line(field, _chip(str(value))) for field, value in fields.items() if value]
    return _item(name, kind(name, name), lines)


def _item(key: str, name: nodes.Node, lines: list[nodes.paragraph]) -> nodes.definition_list_item:
    term = nodes.term("", "", name, ids=[nodes.make_id(key)])
    return nodes.definition_list_item("", term, nodes.definition("", *lines))


def _claim(claim: dict[str, str]) -> nodes.definition_list_item:
    said = _chip(claim["verdict"]), nodes.Text(" "), _chip(claim["grade"])
    lines = [
        _line("record", *said),
        *(_line(name, nodes.Text(claim[name])) for name in ("because", *DECIDERS)),
    ]
    if claim["this run"]:
        asked = nodes.Text(f" {claim['this run asks']}")
        lines.append(_line("this run", _chip(claim["this run"]), asked))
    name = nodes.inline(claim["claim"], claim["claim"])
    return _item(f"claim-{claim['id']}", name, lines)


def _line(field: str, *content: nodes.Node) -> nodes.paragraph:
    # One box for the content: the style sheet sets field and content as two columns.
    return nodes.paragraph("", "", nodes.strong(field, field), nodes.inline("", "", *content))


def _row(cells: list[Any]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", _cell(cell)) for cell in cells))


def _cell(cell: Any) -> nodes.paragraph:
    text = "" if cell is None else str(cell)
    if text in VERDICTS or text in KIN or text in GRADES:
        return nodes.paragraph("", "", _chip(text))
    if isinstance(cell, int | float):
        # str keeps the point of a float, which tells 0.0 from a count of none.
        shown = text.replace("-", "\N{MINUS SIGN}")
        return nodes.paragraph("", shown, classes=["pm-numeric"])
    kind = "pm-estimate" if ESTIMATE.fullmatch(text) else "pm-long" if len(text) > LONG else ""
    return nodes.paragraph("", text, classes=[kind] if kind else [])


def _chip(text: str) -> nodes.Node:
    """A verdict or a grade with its look; any other text as it is."""
    if text in VERDICTS or text in KIN:
        return verdict_node(text)
    if text in GRADES:
        return _inline(text, "pm-grade", f"pm-grade-{text}")
    return nodes.Text(text)


def _inline(text: str, *classes: str) -> nodes.inline:
    return nodes.inline(text, text, classes=list(classes))


def _load(app: Sphinx) -> None:
    app.postmortem_loaded = Values(app)


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
    app.connect("html-page-context", _escape_title)
    for name, role in (
        ("num", NumberRole()),
        ("est", EstimateRole()),
        ("verdict", VerdictRole()),
        ("because", BecauseRole()),
        ("text", TextRole()),
        ("grade", GradeRole()),
    ):
        app.add_role(name, role)
    app.add_directive("record-figure", FigureDirective)
    app.add_directive("record-table", TableDirective)
    app.add_directive("record-entries", EntriesDirective)
    app.add_directive("record-ledger", LedgerDirective)
    app.add_directive("when", WhenDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
