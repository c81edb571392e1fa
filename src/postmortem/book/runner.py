"""The papermill contract: what may be passed in, and when a notebook has really run."""

import ast
import builtins
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from postmortem.checker.errors import (
    NotebookFailed,
    NotebookNotStarted,
    ParameterError,
    PostmortemError,
)
from postmortem.experiments.records import read_records

Value = str | int | float | bool
TYPES = {name: getattr(builtins, name) for name in ("str", "int", "float", "bool")}
# What nbformat raises on a file that is none; the last three on JSON of another shape.
NOT_A_NOTEBOOK = (
    OSError,
    ValueError,
    nbformat.reader.NotJSONError,
    nbformat.ValidationError,
    AttributeError,
    KeyError,
    TypeError,
)
# papermill logs unknown parameters and then goes on; here they are refused beforehand.
logging.getLogger("papermill").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Parameter:
    """A parameter that a notebook declares: its type, and whether it has a default."""

    name: str
    type: str
    required: bool


def declared_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters of a notebook, read from its one cell tagged `parameters`.

    Each line is `name: type`, which is required, or `name: type = literal`. Nothing is executed.
    Raises `ParameterError` where the cell is missing, double, or holds anything else.
    """
    cells = [
        cell
        for cell in read_notebook(notebook).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    if len(cells) != 1:
        raise ParameterError(
            notebook, expected="one cell tagged `parameters`", found=str(len(cells))
        )
    try:
        lines = ast.parse(cells[0].source).body
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL in the source
        raise ParameterError(
            f"{notebook}, parameters cell", expected="declarations", found=str(error)
        ) from None
    found = {}
    for line in lines:
        parameter = _declaration(notebook, line)
        found[parameter.name] = parameter
    return found


def check_parameters(notebook: str | Path, given: Mapping[str, Value]) -> None:
    """Refuse undeclared, missing or mistyped parameters before anything runs.

    Raises `ParameterError`. papermill writes a name into the notebook as code, so a name that is
    not declared must never reach it.
    """
    declared = declared_parameters(notebook)
    for name, value in given.items():
        if name not in declared:
            raise ParameterError(
                f"{notebook}, parameter {name!r}",
                expected=f"one of {', '.join(declared)}",
                found="a name that the notebook does not declare",
            )
        if type(value) is not TYPES[declared[name].type]:
            raise ParameterError(
                f"{notebook}, parameter {name!r}",
                expected=declared[name].type,
                found=f"{type(value).__name__} {value!r}",
            )
    missing = [p.name for p in declared.values() if p.required and p.name not in given]
    if missing:
        raise ParameterError(notebook, expected=f"a value for {', '.join(missing)}", found="none")


def run_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Value],
    *,
    executed: str | Path,
    timeout: int = 3600,
    kernel: str = "python3",
    report: Any = None,
) -> float:
    """Execute a notebook and move it to `executed` only when all of it has run.

    Returns the seconds it took. Raises `NotebookNotStarted` or `NotebookFailed`; what had been
    executed by then stays beside `executed` as `NAME.failed.ipynb`. A cell may take `timeout`
    seconds.
    """
    notebook, executed = Path(notebook), Path(executed)
    check_parameters(notebook, parameters)
    executed.parent.mkdir(parents=True, exist_ok=True)
    failed = executed.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    executed.unlink(missing_ok=True)
    if "records" in parameters:  # those of an earlier run must not pass for this one's
        Path(str(parameters["records"])).unlink(missing_ok=True)
    # A name of its own: an interrupted build may still be writing under another.
    partial = executed.with_name(f".{executed.stem}.{os.getpid()}.ipynb")
    start = time.perf_counter()
    try:
        with _told(parameters.get("records"), report or (lambda line: None)):
            _execute(notebook, partial, parameters=parameters, timeout=timeout, kernel=kernel)
        check_executed(partial)
        if "records" in parameters:
            read_records(str(parameters["records"]))
    except PostmortemError as error:
        if not partial.exists():
            raise
        partial.replace(failed)
        raise type(error)(
            error.subject.replace(str(partial), str(failed)),
            expected=error.expected,
            found=error.found,
            remedy=f"What had run is in {failed}.",
        ) from None
    partial.replace(executed)
    return time.perf_counter() - start


def check_executed(notebook: str | Path) -> None:
    """Raise `NotebookFailed` unless every code cell has run and none has failed.

    A notebook that timed out or lost its kernel has the status "completed" in its metadata, so
    the cells themselves are asked.
    """
    content = read_notebook(notebook)
    for number, cell in enumerate(content.cells, 1):
        if cell.cell_type != "code":
            continue
        problem = _problem_of(cell)
        if problem:
            raise NotebookFailed(
                f"{notebook}, cell {number}", expected=problem[0], found=problem[1]
            )


def read_notebook(path: str | Path) -> Any:
    """Read a notebook; `NotebookNotStarted` where it is missing or no notebook."""
    try:
        content = nbformat.read(str(path), as_version=4)  # what is invalid is only logged here
        nbformat.validate(content)
    except NOT_A_NOTEBOOK as error:
        found = " ".join(str(error).split())[:200]
        raise NotebookNotStarted(path, expected="a notebook", found=found) from None
    return content


def _problem_of(cell: Any) -> tuple[str, str] | None:
    """What was expected of a code cell and what was found, or None where it ran well."""
    for output in cell.outputs:
        if output.output_type == "error":
            return "no error", f"{output.ename}: {output.evalue}"
    if cell.source.strip() and not cell.execution_count:
        return "an executed cell", "one that has not run"
    if cell.metadata.get("papermill", {}).get("exception"):
        return "no exception", "one that papermill saw"
    return None


def _execute(
    notebook: Path,
    partial: Path,
    *,
    parameters: Mapping[str, Value],
    timeout: int,
    kernel: str,
) -> None:
    try:
        papermill.execute_notebook(
            str(notebook),
            str(partial),
            parameters=dict(parameters),
            kernel_name=kernel,
            progress_bar=False,
            execution_timeout=timeout,
            start_timeout=120,
            # The kernel's notes on its own transport and shutdown are nobody's concern here.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except PapermillExecutionError as error:
        raise NotebookFailed(
            # papermill counts the cell of values that it has put behind the parameters.
            f"{notebook}, cell {error.cell_index + (0 if parameters else 1)}",
            expected="no exception",
            found=f"{error.ename}: {error.evalue}",
        ) from None
    except CellTimeoutError:
        raise NotebookFailed(
            notebook,
            expected=f"each cell within {timeout} s",
            found="one that took longer",
        ) from None
    except DeadKernelError:
        raise NotebookFailed(
            notebook,
            expected="a living kernel",
            found="one that died (out of memory, or killed)",
        ) from None
    # ValueError: a notebook without the name of a language.
    except (NoSuchKernel, RuntimeError, OSError, ValueError) as error:
        raise NotebookNotStarted(
            notebook,
            expected=f"a kernel {kernel!r}",
            found=str(error).strip() or type(error).__name__,
            remedy="Install the requirements again.",
        ) from None


@contextmanager
def _told(records: object, report: Any) -> Iterator[None]:
    """Pass on what the session says while its notebook runs."""
    if not isinstance(records, str):
        yield
        return
    told = Path(records).with_suffix(".progress")
    told.unlink(missing_ok=True)
    done = threading.Event()

    def follow() -> None:
        seen, over = 0, False
        while not over:
            over = done.wait(0.5)  # what was said last is read after the end
            lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
            for line in lines[seen:]:
                report(line)
            seen = len(lines)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()
        told.unlink(missing_ok=True)


def _declaration(notebook: str | Path, line: ast.stmt) -> Parameter:
    if (
        not isinstance(line, ast.AnnAssign)
        or not isinstance(line.target, ast.Name)
        or not isinstance(line.annotation, ast.Name)
        or line.annotation.id not in TYPES
        or not (line.value is None or _is_literal(line.value, TYPES[line.annotation.id]))
    ):
        raise ParameterError(
            f"{notebook}, parameters cell, line {line.lineno}",
            expected=f"`name: type` or `name: type = literal` with {', '.join(TYPES)}",
            found=ast.unparse(line)[:80],
        )
    return Parameter(line.target.id, line.annotation.id, line.value is None)


def _is_literal(value: ast.expr, expected: type) -> bool:
    return isinstance(value, ast.Constant) and type(value.value) is expected
