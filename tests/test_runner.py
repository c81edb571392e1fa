import ast
from pathlib import Path

import nbformat
import pytest
from answers import PROVENANCE
from nbformat import v4

from postmortem.book.runner import (
    Parameter,
    check_executed,
    check_parameters,
    declared_parameters,
    read_notebook,
    run_notebook,
)
from postmortem.checker.errors import (
    NotebookFailed,
    NotebookNotStarted,
    ParameterError,
    RecordError,
)
from postmortem.experiments.records import write_records

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BUILT, KEPT = (sorted(NOTEBOOKS.glob(pattern)) for pattern in ("*.ipynb", "kept/*.ipynb"))
SHIPPED = [*BUILT, *KEPT]
COMMON = {
    **dict.fromkeys(("notebook", "case", "profile", "world", "records"), ("str", False)),
    **dict.fromkeys(("data", "labels"), ("str", False)),
    "rows": ("int", False),
    **dict.fromkeys(("device", "dtype"), ("str", False)),
}
PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def make_notebook(folder, *sources, parameters="", metadata=PYTHON, tags=()):
    """A notebook with a parameters cell and a code cell for each source, the first with tags."""
    cells = [v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    for cell in cells[1:2]:
        cell.metadata["tags"] = list(tags)
    path = folder / "tiny.ipynb"
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), str(path))
    return path


def run(notebook, parameters=None, **options):
    """Run a notebook to `out/done.ipynb` beside it."""
    executed = notebook.parent / "out" / "done.ipynb"
    return run_notebook(notebook, parameters or {}, executed=executed, **options)


def test_parameters_are_read_and_nothing_runs(tmp_path):
    """Parameters come from the cell's text: their type, and whether a value must be given."""
    mark = tmp_path / "ran"
    declared = 'a: str\nb: int = 3  # of rows\nc: float = 0.5\nd: bool = True\ne: str = ""'
    notebook = make_notebook(tmp_path, f"open({str(mark)!r}, 'w')", parameters=declared)
    assert declared_parameters(notebook) == {
        "a": Parameter("a", "str", True),
        "b": Parameter("b", "int", False),
        "c": Parameter("c", "float", False),
        "d": Parameter("d", "bool", False),
        "e": Parameter("e", "str", False),
    }
    assert not mark.exists()


@pytest.mark.parametrize(
    "line",
    [
        "a = 1",
        "a: list",
        "a: list[int] = []",
        "a: int = b",
        "a: str = f'{1}'",
        "a: int = __import__('os').getpid()",
        "a: int = 'one'",
        "a: int = True",
        "a: float = 1",
        "a: str = None",
        "a.b: int = 1",
        "import os",
        "print('a')",
        "'a'",
        "a: int = ",
        "%matplotlib inline",
        "a: int = 1\n  b: int = 2",
    ],
)
def test_anything_else_in_the_parameters_cell_is_refused(tmp_path, line):
    """A line that is no declaration with a literal of its own type is refused."""
    with pytest.raises(ParameterError, match="parameters cell"):
        declared_parameters(make_notebook(tmp_path, parameters=line))


@pytest.mark.parametrize("count", [0, 2])
def test_one_parameters_cell(tmp_path, count):
    """A notebook without a parameters cell, or with two, is refused."""
    notebook = v4.new_notebook(cells=[v4.new_code_cell("a: int") for _ in range(3)])
    for cell in notebook.cells[:count]:
        cell.metadata["tags"] = ["parameters"]
    nbformat.write(notebook, str(tmp_path / "n.ipynb"))
    with pytest.raises(ParameterError, match=f"one cell tagged `parameters`; found {count}"):
        declared_parameters(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rows": 1, "seed": 1}, "'seed': expected one of rows, share"),
        ({"rows": 1, "a=1;import os": 1}, "'a=1;import os': expected one of rows, share"),
        ({"rows": 1, "": 1}, "'': expected one of"),
        ({"rows": True}, "'rows': expected int; found bool True"),
        ({"rows": "1"}, "'rows': expected int; found str '1'"),
        ({"rows": 1.0}, "'rows': expected int; found float 1.0"),
        ({"rows": None}, "'rows': expected int; found NoneType None"),
        ({"rows": 1, "share": 1}, "'share': expected float; found int 1"),
        ({"share": 0.5}, "expected a value for rows; found none"),
        ({}, "expected a value for rows; found none"),
    ],
)
def test_bad_parameters_are_refused_before_anything_runs(tmp_path, given, match):
    """An undeclared, mistyped or missing parameter is refused and no notebook is written."""
    notebook = make_notebook(tmp_path, parameters="rows: int\nshare: float = 0.5")
    with pytest.raises(ParameterError, match=match):
        run(notebook, given)
    assert not (tmp_path / "out").exists()


def test_parameters_that_fit_pass(tmp_path):
    """What is declared may be given, hostile text as the value included."""
    notebook = make_notebook(tmp_path, parameters="a: str\nb: bool = False")
    check_parameters(notebook, {"a": '\'"""\n1/0 # {b}', "b": True})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\x00",
        "\xff",
        "not a notebook",
        "{}",
        "[]",
        "null",
        '{"cells": [1]}',
        '{"nbformat": 4}',
        '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1]}',
    ],
)
def test_what_is_no_notebook_is_refused(tmp_path, content):
    """A file that holds no notebook, or that is not there, is refused by name."""
    with pytest.raises(NotebookNotStarted, match=r"none\.ipynb: expected a notebook"):
        run(tmp_path / "none.ipynb")
    (tmp_path / "n.ipynb").write_bytes(content.encode("latin-1"))
    with pytest.raises(NotebookNotStarted, match=r"n\.ipynb: expected a notebook"):
        run(tmp_path / "n.ipynb")


def test_notebook_runs(tmp_path):
    """A notebook that ran whole takes its place with its values, and says what it did."""
    records = tmp_path / "records.jsonl"
    text = '\'"""\\\n{rule} 👍'
    sealed = write_records(records, PROVENANCE, records=[])
    content = records.read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "done.failed.ipynb").write_text("of an earlier run")
    notebook = make_notebook(
        tmp_path,
        "from pathlib import Path\nPath(records).with_suffix('.progress').write_text('half\\n')",
        f"Path(records).write_bytes({content!r})",
        "text",
        "",
        parameters="records: str\ntext: str",
    )
    told = []
    seconds = run(notebook, {"records": str(records), "text": text}, report=told.append)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["done.ipynb"]
    cells = read_notebook(tmp_path / "out" / "done.ipynb").cells
    assert ast.literal_eval(cells[4].outputs[0].data["text/plain"]) == text
    assert (seconds > 0, told, sealed.records) == (True, ["half"], 0)
    assert not records.with_suffix(".progress").exists()


@pytest.mark.parametrize(
    ("source", "options", "outcome", "match"),
    [
        (
            "a / 0",
            {},
            NotebookFailed,
            r"tiny\.ipynb, cell 2: expected no exception; found ZeroDivisionError: division",
        ),
        # It exits with success before its end.
        ("import sys; sys.exit(0)", {}, NotebookFailed, "cell 3: .* SystemExit: 0"),
        (
            "import time; time.sleep(60)",
            {"timeout": 1},
            NotebookFailed,
            "expected each cell within 1 s; found one that took longer",
        ),
        # As without memory.
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            {},
            NotebookFailed,
            "expected a living kernel; found one that died",
        ),
        ("a", {"kernel": "none"}, NotebookNotStarted, "expected a kernel 'none'; found No such"),
    ],
    ids=["raises", "leaves early", "takes too long", "dies", "unknown kernel"],
)
def test_a_run_that_does_not_end_leaves_what_had_run(tmp_path, source, options, outcome, match):
    """Only the partial notebook stays, and is named; later cells have not run."""
    notebook = make_notebook(tmp_path, source, "b = 2", parameters="a: int")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "done.ipynb").write_text("of an earlier run")
    with pytest.raises(outcome, match=match) as caught:
        run(notebook, {"a": 1}, **options)
    [failed] = (tmp_path / "out").iterdir()
    assert failed.name == "done.failed.ipynb"
    assert f"What had run is in {failed}." in str(caught.value)
    assert read_notebook(failed).cells[-1].execution_count is None


def test_allowed_exception_is_refused(tmp_path):
    """A cell that may raise by its tag may not."""
    notebook = make_notebook(tmp_path, "1 / 0", "b = 2", tags=["raises-exception"])
    with pytest.raises(NotebookFailed, match=r"cell 2: .* found ZeroDivisionError"):
        run(notebook)


def test_notebook_without_a_language(tmp_path):
    """A notebook that does not name its language could not start, and leaves nothing."""
    notebook = make_notebook(tmp_path, "a = 1", parameters="a: int", metadata={})
    with pytest.raises(NotebookNotStarted, match="No language found"):
        run(notebook, {"a": 1})
    assert list((tmp_path / "out").iterdir()) == []


def test_notebook_that_does_not_seal_its_records(tmp_path):
    """Records of an earlier run do not pass for those of a run that sealed none."""
    records = tmp_path / "records.jsonl"
    write_records(records, PROVENANCE, records=[])
    notebook = make_notebook(tmp_path, "a = 1", parameters="records: str")
    with pytest.raises(RecordError, match=r"records\.jsonl: expected a record file"):
        run(notebook, {"records": str(records)})


def write_executed(folder, *, count=1, outputs=(), metadata=None, whole=None):
    """A notebook of text, an empty cell, and one code cell in that state; `whole` is of it all."""
    cell = v4.new_code_cell("a", execution_count=count, outputs=list(outputs))
    cell.metadata.update(metadata or {})
    cells = [v4.new_markdown_cell("Text."), v4.new_code_cell(" \n"), cell]
    path = folder / "executed.ipynb"
    nbformat.write(v4.new_notebook(cells=cells, metadata=whole or {}), str(path))
    return path


def test_executed_notebook_passes(tmp_path):
    """Where every cell with code has run and printed what it will, the notebook has run."""
    printed = v4.new_output("stream", name="stderr", text="Error: not one")
    check_executed(write_executed(tmp_path, outputs=[printed]))


@pytest.mark.parametrize(
    ("state", "match"),
    [
        # What the metadata says of the notebook does not count.
        (
            {"count": None, "whole": {"papermill": {"exception": None, "status": "completed"}}},
            "expected an executed cell; found one that has not run",
        ),
        (
            {"outputs": [v4.new_output("error", ename="ValueError", evalue="x", traceback=[])]},
            "expected no error; found ValueError: x",
        ),
        ({"metadata": {"papermill": {"exception": True}}}, "expected no exception"),
    ],
    ids=["never run", "error output", "exception"],
)
def test_notebook_that_has_not_run_well_is_refused(tmp_path, state, match):
    """A cell that has not run, shows an error, or failed as papermill saw it is named."""
    with pytest.raises(NotebookFailed, match=rf"executed\.ipynb, cell 3: {match}"):
        check_executed(write_executed(tmp_path, **state))


# What some notebooks take beside the common parameters.
EXTRA = {
    "attempt": {"attempt": ("str", False), "earlier": ("str", False)},
    "real_model": {"files": ("str", False), "sample": ("int", False)},
}
# These make their own rows.
OWN_ROWS = {"bench", "real_model"}


def test_there_are_notebooks():
    """The notebooks that the following tests look at are there."""
    names = {"files", "attempt", "shape_mismatch", "adapter_swap", "controls", "replay"}
    assert {path.stem for path in BUILT} == {*names, "check", "diagnosis"}
    assert {"replays", "suite", "attribution", "real_model"} < {path.stem for path in KEPT}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_notebook_declares_the_common_parameters(path):
    """A shipped notebook declares the common parameters, and runs without any of them."""
    declared = {name: (p.type, p.required) for name, p in declared_parameters(path).items()}
    rows = {"data", "labels", "rows"} if path.stem in OWN_ROWS else set()
    common = {name: found for name, found in COMMON.items() if name not in rows}
    assert declared == common | EXTRA.get(path.stem, {})
    check_parameters(path, {})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_notebook_is_clean(path):
    """A shipped notebook is valid and holds no output, no execution count and no attachment."""
    content = nbformat.read(str(path), as_version=4)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
    assert not any(cell.get("attachments") for cell in content.cells)
    assert set(content.metadata) <= {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_notebook_holds_no_logic(path):
    """No function of a shipped notebook is longer than ten lines."""
    cells = [cell for cell in read_notebook(path).cells if cell.cell_type == "code"]
    functions = [
        node
        for cell in cells
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 10] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_notebook_seals_last(path):
    """The last cell of a shipped notebook seals its records, and no other cell does."""
    sources = [cell.source for cell in read_notebook(path).cells if cell.cell_type == "code"]
    assert [n for n, source in enumerate(sources) if "session.finish()" in source] == [
        len(sources) - 1
    ]
