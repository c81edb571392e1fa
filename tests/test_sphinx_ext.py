import io
import json
import re
from html import unescape

import pytest
from sphinx.application import Sphinx

from postmortem.book.sphinx_roles import format_number

HOSTILE = "<script>alert(1)</script> {include}`/etc/passwd` $x$ `code` **b** \x1b[31m"
VALUES = {
    "measures": {
        "a.b": {"value": 0.1234, "low": 0.05, "high": 0.2, "reason": ""},
        "none": {"value": None, "low": None, "high": None, "reason": "no labels"},
        "less": {"value": -1.5, "low": None, "high": None, "reason": ""},
    },
    "verdicts": {
        "v": {"verdict": "cannot tell", "because": HOSTILE},
        "k": {"verdict": "knows and does not say", "because": "the log-odds rank"},
    },
    "texts": {
        "profile.name": "embedded",
        "recorded": "smollm2",
        "t": HOSTILE,
        "case.title": HOSTILE,
    },
    "tables": {
        "t": {"columns": ["row", "text", "verdict"], "rows": [[1, HOSTILE, "holds"]]},
        "e": {"columns": ["id", "what", "status"], "rows": [["a-b", HOSTILE, "open"]]},
        "case.claims": {
            "columns": [
                "id",
                "section",
                "claim",
                "verdict",
                "because",
                "grade",
                "decided by",
                "would change",
                "this run asks",
                "this run",
            ],
            "rows": [
                ["one", "First", HOSTILE, "stands", "so", "log", "a", "b", "it holds", "refuted"],
                ["two", "First", "Two.", "refuted", "so", "log", "a", "b", "", ""],
                ["three", "Second", "Three.", "stands", "so", "log", "a", "b", "", ""],
            ],
        },
    },
}


def build(folder, page, values=VALUES):
    """Build one page; returns its HTML and the warnings."""
    source = folder / "source"
    (source / "_values/figures").mkdir(parents=True, exist_ok=True)
    (source / "_values/values.json").write_text(json.dumps(values))
    figures = {"alt": {"hero": "Hero"}, "missing": {"absent": "no labels"}}
    (source / "_values/figures/figures.json").write_text(json.dumps(figures))
    for width in ("wide", "narrow"):
        (source / f"_values/figures/hero.{width}.svg").write_text(f"<svg id='{width}'></svg>")
    if page:
        (source / "index.md").write_text(page)
    extensions = ["myst_parser", "postmortem.book.sphinx_roles"]
    config = {"extensions": extensions, "myst_enable_extensions": ["colon_fence"]}
    out, trees, warnings = folder / "out", folder / "trees", io.StringIO()
    Sphinx(source, None, out, trees, "html", config, status=None, warning=warnings).build()
    # Sphinx registers its own nodes once a process; a second build here says so.
    told = warnings.getvalue().splitlines(keepends=True)
    told = [line for line in told if "already registered" not in line]
    return (out / "index.html").read_text(), "".join(told)


def test_numbers_take_their_format(tmp_path):
    """A number is formatted as asked, an estimate adds its interval, a lack says so."""
    html, told = build(tmp_path, "# T\n\n{num}`a.b:.2f` {est}`a.b:.1%` {num}`none` {num}`less`\n")
    assert ">0.12<" in html
    assert ">12.3%<" in html
    assert ">[5.0%, 20.0%]<" in html
    assert "not available" in html
    assert ">\N{MINUS SIGN}1.5<" in html
    assert told == ""


def test_what_is_not_recorded_warns(tmp_path):
    """A key, column, figure or condition that no record has is a warning, so -W fails."""
    unknown = [
        "{num}`a.c`",
        "{verdict}`w`",
        "{text}`u`",
        "{num}`a.b:.2q`",
        "{grade}`hearsay`",
        ":::{record-table} u\n:::",
        ":::{record-entries} u\n:::",
        ":::{record-quote} u\n:::",
        ":::{record-ledger} u\n:::",
        ":::{record-table} t\n:columns: nope\n:::",
        ":::{record-figure} nope\n:::",
        "::::{when} has nothing\nx\n::::",
        "::::{when} whatever\nx\n::::",
    ]
    _, told = build(tmp_path, "# T\n\n" + "\n\n".join(unknown) + "\n")
    assert told.count("WARNING") == len(unknown)


def test_what_another_case_lacks_is_said_and_does_not_fail(tmp_path):
    """A claim, hypothesis or piece of evidence that the case does not have is named as absent."""
    page = "# T\n\n{verdict}`case.claim.x` {because}`case.hypothesis.X` {text}`case.evidence.x`\n"
    html, told = build(tmp_path, page)
    assert html.count("not in this case") == 3
    assert told == ""


def test_a_table_shows_its_first_rows_and_says_where_it_has_none(tmp_path):
    """With `rows` a table shows so many, with `class` it has that look; an empty one has dashes."""
    tables = {
        "t": {"columns": ["n"], "rows": [["one"], ["two"], ["three"]]},
        "empty": {"columns": ["n", "m"], "rows": []},
    }
    shown = ":::{record-table} t\n:rows: 2\n:class: small\n:::"
    page = f"# T\n\n{shown}\n\n:::{{record-table}} empty\n:::\n"
    html, told = build(tmp_path, page, VALUES | {"tables": tables})
    assert ("two" in html, "three" in html) == (True, False)
    assert len(re.findall(r'<table class="[^"]*pm-table[^"]* small', html)) == 1
    assert html.count("<p>–</p>") == 2
    assert told == ""


def test_recorded_text_is_never_markup(tmp_path):
    """Hostile text in a text, a verdict's reason or a table stays text."""
    page = (
        "# T\n\n{text}`t` {text}`case.title` {because}`v`\n\n:::{record-table} t\n{text}`t`\n:::\n"
    )
    html, told = build(tmp_path, page)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
    assert "root:" not in html
    assert "<strong>b</strong>" not in html
    assert told == ""


def test_an_output_keeps_its_lines(tmp_path):
    """A recorded output stands line by line, spaces and marks as they came; none warns."""
    texts = {"o": "$ cmd <x>\n\n    **detail** 'q' --for"}
    page = "# T\n\n:::{record-quote} o\n:output:\n:::\n\n:::{record-quote} none\n:::\n"
    html, told = build(tmp_path, page, VALUES | {"texts": texts})
    shown = re.search(r'<pre class="pm-output[^>]*>(.*?)</pre>', html, re.DOTALL)
    lines = unescape(re.sub(r"<[^>]+>", "", shown[1]))
    assert lines == texts["o"] + "\n"
    assert "'none'" in told


def test_a_condition_decides_what_stands_on_the_page(tmp_path):
    """`when` keeps its content only where the condition is true, nested markup included."""
    page = "# T\n"
    conditions = {
        "profile embedded": True,
        "profile not embedded": False,
        "recorded not bench": True,
        "has a.b": True,
        "lacks a.b": False,
        "has none": False,
        "verdict v cannot tell": True,
        "verdict v holds": False,
        "verdict v not available": False,
        "verdict k knows and does not say": True,
    }
    for number, condition in enumerate(conditions):
        page += f"\n::::{{when}} {condition}\nkept{number}x {{num}}`a.b`\n::::\n"
    html, told = build(tmp_path, page)
    assert [f"kept{n}x" in html for n in range(len(conditions))] == list(conditions.values())
    assert told == ""


def test_a_condition_keeps_the_order_of_text_and_headings(tmp_path):
    """Text ahead of a heading inside `when` stays ahead of it, and each section keeps its own."""
    inside = "first\n\n## One\n\nsecond\n\n## Two\n\nthird\n"
    page = f"# T\n\n::::{{when}} profile embedded\n{inside}::::\n\n## Three\n\nfourth\n"
    html, told = build(tmp_path, page)
    wanted = ["first", "<h2>One", "second", "<h2>Two", "third", "<h2>Three", "fourth"]
    body = html[html.index("<h1>T") :]
    places = [body.index(text) for text in wanted]
    assert places == sorted(places)
    assert told == ""


def test_a_figure_is_inline_in_two_widths_or_says_why_not(tmp_path):
    """A figure brings both SVGs and its caption; one that is missing gives the reason."""
    page = "# T\n\n:::{record-figure} hero\nCap {num}`a.b:.2f`\n:::\n"
    page += "\n:::{record-figure} absent\nx\n:::\n"
    html, told = build(tmp_path, page)
    assert "<svg id='wide'>" in html
    assert "<svg id='narrow'>" in html
    assert "No figure here: no labels." in html
    assert told == ""


def test_the_ledger_stands_under_its_sections(tmp_path):
    """Each section is a heading once, each claim an entry with an anchor; text is never markup."""
    html, told = build(
        tmp_path, "# T\n\n## Ledger\n\n:::{record-ledger} case.claims\n:::\n\n## After\n\nx\n"
    )
    assert [html.count(f"<h3>{name}<") for name in ("First", "Second")] == [1, 1]
    assert html.index("<h3>Second<") < html.index("<h2>After<")
    assert all(f'id="claim-{name}"' in html for name in ("one", "two", "three"))
    assert html.count("this run") == 1
    assert "it holds" in html
    assert "<script>alert" not in html
    assert told == ""


def test_entries_name_describe_and_mark(tmp_path):
    """An entry has its id as code and a status with its look, as has a word on knowing."""
    html, told = build(tmp_path, "# T\n\n{verdict}`k`\n\n:::{record-entries} e\n:::\n")
    assert 'class="pm-verdict pm-verdict-cannot-tell">knows and does not say<' in html
    assert ">a-b<" in html
    assert 'pm-verdict-cannot-tell">open<' in html
    assert "<script>alert" not in html
    assert told == ""


@pytest.mark.parametrize(("key", "fails"), [("v", False), ("k", True), ("of no record", False)])
def test_a_page_fails_where_a_record_differs_from_what_it_assumes(tmp_path, key, fails):
    """A page that names another word than the record warns; what no record decides is fine."""
    page = f"---\nassumes:\n  {key}: cannot tell\n---\n# T\n"
    _, told = build(tmp_path, page)
    assert ("the page assumes that k is 'cannot tell'" in told) == fails
    assert bool(told) == fails


def test_a_quotation_stands_as_it_is(tmp_path):
    """A text of several lines is a block, an entry of a list is code, and neither is markup."""
    lines = "one\n\n  two  *three*"
    page = "# T\n\n:::{record-quote} q\n:::\n\n:::{record-entries} t\n:code:\n:::\n"
    page += "\n:::{record-quote} case.quote.x\n:::\n"
    tables = {"t": {"columns": ["line", "shows"], "rows": [["Two words", HOSTILE]]}}
    html, told = build(tmp_path, page, VALUES | {"texts": {"q": lines}, "tables": tables})
    assert lines in html
    assert '<span class="pre">Two</span> <span class="pre">words</span>' in html
    assert "not in this case" in html
    assert "<script>alert" not in html
    assert told == ""


def test_changed_values_rebuild_the_pages_that_use_them(tmp_path):
    """After the values change, a page that quotes them shows the new number."""
    build(tmp_path, "# T\n\n{num}`a.b:.2f`\n")
    measures = {"a.b": VALUES["measures"]["a.b"] | {"value": 0.98}}
    assert ">0.98<" in build(tmp_path, "", VALUES | {"measures": measures})[0]


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (0.0, "", "0"),
        (2.0, "d", "2"),
        (1.5, "d", "2"),
        (-0.25, ".1f", "\N{MINUS SIGN}0.2"),
        (0.5, ".0%", "50%"),
        (1e-12, "", "1e\N{MINUS SIGN}12"),
    ],
)
def test_number_formats(value, style, text):
    """Formats are Python's, with a true minus sign and integers for counts."""
    assert format_number(value, style) == text
