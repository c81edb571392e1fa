import ast
import re
from pathlib import Path

import postmortem
from postmortem.book.tables import add_case_values

SOURCE = Path(postmortem.__file__).parent
BOOK = Path(__file__).parents[1] / "book"


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
    return {item.test.verdict for item in items if item.test}


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


def test_every_part_of_the_case_that_a_page_quotes_is_there(case):
    """A role or directive of a page that names a part of the shipped case finds it."""
    verdicts = {key: {"verdict": "cannot tell"} for key in keys_of(case)}
    values = {"measures": {}, "verdicts": verdicts, "texts": {}, "tables": {}}
    add_case_values(values, case)
    kinds = {
        r"\{(?:num|est)\}`([^`:]+)": "measures",
        r"\{(?:verdict|because)\}`([^`:]+)": "verdicts",
        r"\{text\}`([^`:]+)": "texts",
        r"\{record-(?:table|entries)\} (\S+)": "tables",
        r"\{when\} (?:has|lacks) (\S+)": "measures",
    }
    missing = {
        f"{page.name}: {key}"
        for page in sorted(BOOK.glob("*.md"))
        for pattern, kind in kinds.items()
        for key in re.findall(pattern, page.read_text(encoding="utf-8"))
        if key.startswith("case.") and key not in values[kind]
    }
    assert missing == set()
