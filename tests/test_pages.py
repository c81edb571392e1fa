"""What a page types and names: no number by hand, and no key that nobody records."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml
from chapters import recorded, run_chapter

import postmortem
from postmortem.book.tables import add_case_values
from postmortem.cli import describe_check
from postmortem.diagnosis.inquiry import open_inquiry, record_hypotheses
from postmortem.diagnosis.likelihoods import list_replays
from postmortem.experiments.records import (
    Measure,
    Table,
    Text,
    Verdict,
    read_kept,
    read_replays,
)

SOURCE = Path(postmortem.__file__).parent
BOOK = Path(__file__).parents[1] / "book"
# Pages that also quote what was measured by hand, each number with its grade.
QUOTING = {"observations", "rebuild", "shape-mismatch", "swap", "timeline", "v1", "v2", "world"}
# What a page may spell with digits: names, and evidence quoted as it stands. Nothing measured.
ALLOWED = re.compile(
    r"""
    \b(?:Qwen|SmolLM)[\w.-]*          # a model's name, with its version and size
    | \b\d+(?:\.\d+)?[Bb]\b           # the size in a name: 1.5B, 4b
    | \bv[12]\b                       # the attempts
    | \b[A-H][1-5]\b                  # hypotheses
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
        r"(?ms)\A---$.*?^---$",  # what the page assumes
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


def named_keys(text):
    """Kind and key of each record that a page names."""
    kinds = {
        r"\{(?:num|est)\}`([^`:]+)": "measures",
        r"\{(?:verdict|because)\}`([^`:]+)": "verdicts",
        r"\{text\}`([^`:]+)": "texts",
        r"\{record-(?:table|entries|ledger)\} (\S+)": "tables",
        r"\{record-quote\} (\S+)": "texts",
        r"\{when\} (?:has|lacks) (\S+)": "measures",
    }
    return {(kind, key) for pattern, kind in kinds.items() for key in re.findall(pattern, text)}


# Where a command of the checker is told to a reader.
TELLING = [BOOK / "check.md", BOOK.parent / "README.md"]


def commands_of(text):
    """The arguments of each `postmortem check` that a page tells a reader to run."""
    lines = re.findall(r"^\W*(?:run: |\.venv/bin/)*postmortem check (.+)", text, re.MULTILINE)
    return [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]


@pytest.mark.parametrize("page", TELLING, ids=lambda page: page.stem)
def test_every_command_on_the_page_is_one_of_the_checker(page):
    """Each command that a page tells is taken by the checker, and each option named is its own."""
    text = page.read_text(encoding="utf-8")
    commands = commands_of(text)
    assert commands
    for command in commands:
        describe_check().parse_intermixed_args(command)


def test_every_option_that_the_chapter_names_exists():
    """An option that the chapter names anywhere is an option of the check."""
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", (BOOK / "check.md").read_text("utf-8")))
    known = set(re.findall(r"--[a-z][\w-]+", describe_check().format_help()))
    assert named >= {"--fix", "--for", "--format", "--strict"}
    assert named <= known


def test_the_recipes_of_the_chapter_can_be_used():
    """The workflow's steps and the hook are YAML, and the hook, offered here, takes these words."""
    text = (BOOK / "check.md").read_text(encoding="utf-8")
    steps, (repo,) = map(yaml.safe_load, re.findall(r"(?s)```yaml\n(.*?)```", text))
    assert [*map(list, steps)] == [["run"], ["run"], ["uses", "if", "with"]]
    assert steps[2]["with"]["sarif_file"] in steps[1]["run"]
    offered = yaml.safe_load((BOOK.parent / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook["entry"] for hook in offered}
    for hook in repo["hooks"]:
        assert hooks[hook["id"]] == "postmortem check"
        describe_check().parse_intermixed_args([*hook["args"], "adapter"])


def test_what_the_chapter_shows_is_recorded_by_its_notebook(tmp_path):
    """The chapter's outputs and numbers come from its notebook; the catalogue's are its others."""
    session = run_chapter("check", records=str(tmp_path / "check.jsonl"))
    kinds = {"measures": Measure, "verdicts": Verdict, "texts": Text, "tables": Table}
    found = {(name, key) for name, kind in kinds.items() for key in recorded(session, kind)}
    named = named_keys((BOOK / "check.md").read_text(encoding="utf-8"))
    others = {key.partition(".")[0] for _, key in named - found}
    assert others == {"catalogue"}
    # Each command ran, and the repair took the error away.
    codes = recorded(session, Measure)
    assert [codes[f"{key}.exit_code"].value for key in recorded(session, Text)] == [1, 0, 0]
    assert recorded(session, Verdict)["check.mended_is_sound"].verdict == "holds"


@pytest.mark.parametrize("name", sorted({page.stem for page in BOOK.glob("*.md")} - QUOTING))
def test_no_number_is_typed_by_hand(name):
    """A chapter types no digit in its prose: numbers come from records or from the case."""
    page = BOOK / f"{name}.md"
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
        ("---\nassumes:\n  q2.v: holds\n---\n# T\n5", [(6, "5")]),
    ],
)
def test_what_counts_as_typed(text, found):
    """Digits in prose and captions are found with their line; names, code and roles are not."""
    assert typed_numbers(text) == found


def recorded_patterns():
    """A pattern for each key under which the library records a verdict, with gaps for its parts."""
    patterns = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "verdict":
                patterns |= set(_patterns_of(node.args[0]))
    return patterns


def _patterns_of(key):
    if isinstance(key, ast.Constant):
        yield re.escape(key.value)
    elif isinstance(key, ast.JoinedStr):
        parts = (
            re.escape(part.value) if isinstance(part, ast.Constant) else r"[\w.-]+"
            for part in key.values
        )
        yield "".join(parts)


def keys_of(case):
    """Every verdict that the case asks a run for."""
    items = [*case.hypotheses, *case.claims, *case.practice.actions]
    named = {item.test.verdict for item in items if item.test}
    return named | {f"diagnosis.hypothesis.{h.id}" for h in case.hypotheses}


def test_every_verdict_that_the_case_names_is_recorded(case):
    """A hypothesis, claim or action item names a verdict that some code records."""
    patterns = recorded_patterns()
    known = {key for key in keys_of(case) if any(re.fullmatch(p, key) for p in patterns)}
    assert keys_of(case) - known == set()


def test_each_key_begins_with_what_a_notebook_records(case):
    """The first part of each key is an attempt of the case or a family of the notebooks."""
    families = {*case.attempts, "swap", "mismatch", "inventory", "catalogue"}
    families |= {"forensics", "controls", "replay", "diagnosis"}
    assert {key.split(".")[0] for key in keys_of(case)} <= families


def test_what_a_page_assumes_is_on_record(case, session):
    """A verdict that a page's prose stands on is of a kept run, of the case, or of a notebook.

    What it says of a hypothesis is what the kept replays make of it.
    """
    kept = {
        f"{profile}.{verdict.key}": verdict.verdict
        for profile, file in read_kept(case, "real_model").items()
        for verdict in file.of(Verdict)
    }
    kept |= {f"case.claim.{claim.id}": claim.verdict for claim in case.claims}
    record_hypotheses(session, open_inquiry(case, list_replays(read_replays(case))))
    weighed = {v.key: v.verdict for v in session.records if isinstance(v, Verdict)}
    kept |= weighed | {key.replace("diagnosis", "case", 1): weighed[key] for key in weighed}
    patterns = recorded_patterns()
    for page in BOOK.glob("*.md"):
        front = re.match(r"(?s)---\n(.*?)---\n", page.read_text("utf-8"))
        assumed = yaml.safe_load(front[1])["assumes"] if front else {}
        for key, word in assumed.items():
            recorded = any(re.fullmatch(pattern, key) for pattern in patterns)
            assert kept.get(key, word if recorded else "not recorded") == word, (page.name, key)


def test_every_part_of_the_case_that_a_page_quotes_is_there(case):
    """A role or directive of a page that names a part of the shipped case finds it."""
    verdicts = {key: {"verdict": "cannot tell"} for key in keys_of(case)}
    values = {"measures": {}, "verdicts": verdicts, "texts": {}, "tables": {}}
    add_case_values(values, case)
    missing = {
        f"{page.name}: {key}"
        for page in BOOK.glob("*.md")
        for kind, key in named_keys(page.read_text(encoding="utf-8"))
        if key.startswith("case.") and key not in values[kind]
    }
    assert missing == set()


# Where a page tells the first steps in its own words, the words for the two.
STEPS = {
    "index": ("Ask its base alone", "check its files"),
    "lessons": ("First: the same prompts, adapter off", "Second: `postmortem check`"),
    "root-cause": ("**One run of the base alone**", "**The header of the adapter's file**"),
    "summary": ("One run, the ten prompts", "One file, the\nadapter's original weights"),
}


@pytest.mark.parametrize("name", STEPS)
def test_first_steps_stand_in_one_order(name):
    """A page names the base alone before the files, as the record of first steps does."""
    text = (BOOK / f"{name}.md").read_text(encoding="utf-8")
    alone, files = (text.index(words) for words in STEPS[name])
    assert alone < files


def test_first_steps_are_recommended_by_the_record(case):
    """The pages that recommend show one table, and none says "First:" of another step."""
    pages = {page.stem: page.read_text(encoding="utf-8") for page in BOOK.glob("*.md")}
    shown = {name for name, text in pages.items() if "{record-table} diagnosis.steps" in text}
    assert shown == {"diagnosis", "lessons", "summary"}
    told = [line for text in pages.values() for line in text.splitlines() if "First:" in line]
    assert all("adapter off" in line for line in told)
    actions = [item.id for item in case.practice.actions]
    assert actions.index("control-first") < actions.index("check-files")
