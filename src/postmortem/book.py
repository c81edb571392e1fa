"""The book: a source tree staged from prose, values and executed notebooks, then built."""

import filecmp
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from postmortem.errors import BookError
from postmortem.records import write_text
from postmortem.runner import check_executed, read_notebook

# Where the staged tree keeps what a run made.
NOTEBOOKS, VALUES = "book/notebooks", "book/_values"


def build_book(
    *, executed: Mapping[str, Path], published: Path, site: Path, out: Path, root: Path = Path()
) -> int:
    """Stage the book and build its HTML into `out/html`; returns the number of pages.

    `executed` holds the executed notebooks by name, `published` the values and figures. Raises
    `BookError` with Sphinx's warnings, each of which fails the build.
    """
    stage_site(executed=executed, published=published, site=site, root=root)
    command = ["build", str(site), "--path-output", str(out), "-W", "--keep-going", "-q"]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("jupyter-book")), *command],
        check=False,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        # A warning belongs to a cached page: without this the next build would pass.
        shutil.rmtree(out / "_build" / ".doctrees", ignore_errors=True)
        raise BookError(
            "the book",
            expected="no warnings",
            found=warnings_of(result.stdout + result.stderr, site=site),
            remedy="Mend these and run `make book` again.",
        )
    # Sphinx leaves its copies alone where no page has changed.
    for name, source in _files(site / "book" / "_static", "_static").items():
        _copy(source, out / "_build" / "html" / name)
    return sum(1 for _ in (out / "_build" / "html" / "book").rglob("*.html"))


def stage_site(
    *, executed: Mapping[str, Path], published: Path, site: Path, root: Path = Path()
) -> None:
    """Make `site` hold exactly what the book is built from, touching only what has changed."""
    wanted = {name: root / name for name in ("_config.yml", "_toc.yml")}
    wanted |= _files(root / "book", "book")
    wanted |= _files(published / "figures", f"{VALUES}/figures")
    wanted[f"{VALUES}/values.json"] = published / "values.json"
    for name, source in wanted.items():
        _copy(source, site / name)
    for name, notebook in executed.items():
        check_executed(notebook)
        _write(site / NOTEBOOKS / f"{name}.ipynb", nbformat.writes(as_page(notebook)))
    keep = {site / name for name in wanted}
    keep |= {site / NOTEBOOKS / f"{name}.ipynb" for name in executed}
    for path in site.rglob("*"):
        if path.is_file() and path not in keep:
            path.unlink()


def as_page(notebook: Path) -> Any:
    """An executed notebook as a page: parameters hidden, run times left out."""
    content = read_notebook(notebook)
    for cell in content.cells:
        tags = set(cell.metadata.get("tags", []))
        if tags & {"parameters", "injected-parameters"}:
            cell.metadata["tags"] = sorted(tags | {"remove-cell"})
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    content.metadata.pop("papermill", None)
    return content


def warnings_of(log: str, *, site: Path) -> str:
    """The warnings of a Sphinx log, with the staged tree's folder left out; or its last lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log).replace(f"{site.resolve()}/", "")
    lines = [line.strip() for line in plain.splitlines() if re.search(r"WARNING|ERROR", line)]
    found = list(dict.fromkeys(lines)) or plain.strip().splitlines()[-3:]
    return "\n  ".join(["", *found[:20]])


def write_summary(path: Path, *, pages: int, records: int) -> None:
    """Write what a finished build counted, for the last line of the next one."""
    write_text(path, json.dumps({"pages": pages, "records": records}) + "\n")


def _files(folder: Path, prefix: str) -> dict[str, Path]:
    return {
        f"{prefix}/{path.relative_to(folder)}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise BookError(source, expected="a file of the book", found="none")
    if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _write(target: Path, text: str) -> None:
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        write_text(target, text)
