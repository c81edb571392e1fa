"""What a number depends on: the library modules behind a notebook, and package versions."""

import ast
import hashlib
import json
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from postmortem.records import digest_file

PACKAGE = "postmortem"
# The wording of an error cannot change a number.
HARMLESS = {"errors"}
EMPTY_TEXT = ("Constant", [("value", "")])
VERSIONED = ("torch", "transformers", "peft", "numpy", "pandas", "papermill")


def modules_behind(sources: Iterable[str]) -> dict[str, str]:
    """Digest of the code of each library module that the source texts import, at any remove.

    A table, text or record that lies beside a module under its name counts as well.

    Read from the import statements, so it needs no import and is the same before, during and
    after a run.
    """
    waiting = [name for source in sources for name in _imports(source)]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        path = Path(__file__).with_name(f"{name}.py")
        if name in found or name in HARMLESS or not path.is_file():
            continue
        found[name] = digest_code(path.read_text(encoding="utf-8"))
        beside = [path.with_suffix(suffix) for suffix in (".csv", ".yml", ".jsonl")]
        found |= {data.name: digest_file(data) for data in beside if data.is_file()}
        waiting += _imports(path.read_text(encoding="utf-8"))
    return {f"module {name}": found[name] for name in sorted(found)}


@cache  # many notebooks rest on the same modules
def digest_code(source: str) -> str:
    """Digest of what a module does: its syntax tree without comments, layout and docstrings.

    The same on every Python that runs it.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(repr(_form(tree)).encode()).hexdigest()[:16]


def _form(node: Any) -> Any:
    """A tree in plain values, without what is empty: there each Python has fields of its own."""
    if isinstance(node, list):
        return [_form(part) for part in node]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.JoinedStr):  # Python 3.12 may end a format with an empty text
        return "JoinedStr", [form for form in _form(node.values) if form != EMPTY_TEXT]
    fields = [(name, _form(value)) for name, value in ast.iter_fields(node)]
    return type(node).__name__, [(n, form) for n, form in fields if form is not None and form != []]


def notebook_sources(path: str | Path) -> list[str]:
    """The source of each code cell."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def notebook_digests(path: str | Path) -> dict[str, str]:
    """Digests of a notebook and of the library modules behind it."""
    return {"notebook": digest_file(path), **modules_behind(notebook_sources(path))}


def package_versions() -> dict[str, str]:
    """Versions of what computes the numbers, and of Python."""
    found = {name: version(name) for name in VERSIONED}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found}


@cache
def _imports(source: str) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            names.append((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names += [
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith(f"{PACKAGE}.")
            ]
    return tuple(names)
