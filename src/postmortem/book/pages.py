"""The book: a source tree staged from prose, values and executed notebooks, then built."""

import filecmp
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml

from postmortem.book.runner import check_executed, read_notebook
from postmortem.case.files import write_text
from postmortem.case.layout import BOOK, NotebookRun, Site
from postmortem.checker.errors import BookError

# Where the staged tree keeps static files and what a run made; `_config.yml` names both.
STATIC, VALUES = "book/_static", "book/_values"


def build_book(
    site: Site, *, executed: Mapping[str, Path], published: Path, root: Path = Path()
) -> int:
    """Stage a site and build its HTML into `site.html`; returns the number of pages.

    `executed` holds the executed notebooks by name, `published` the values and figures. Raises
    `BookError` with Sphinx's warnings, each of which fails the build.
    """
    stage_site(site, executed=executed, published=published, root=root)
    command = ["build", site.staged, "--path-output", site.out, "-W", "--keep-going", "-q"]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("jupyter-book")), *map(str, command)],
        check=False,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        # A warning belongs to a cached page: without this the next build would pass.
        shutil.rmtree(site.html.with_name(".doctrees"), ignore_errors=True)
        raise BookError(
            "the book",
            expected="no warnings",
            found=warnings_of(result.stdout + result.stderr, site=site.staged),
            remedy="Mend these and run `make book` again.",
        )
    # Sphinx leaves its copies alone where no page has changed.
    for name, source in _files(site.staged / STATIC, "_static").items():
        _copy(source, site.html / name)
    return _drop_strays(site)


def stage_site(
    site: Site, *, executed: Mapping[str, Path], published: Path, root: Path = Path()
) -> None:
    """Make `site.staged` hold exactly what the site is built from, touching what has changed."""
    wanted = {}
    for path in site.prose:
        wanted[str(Path(site.place, path.relative_to(site.pages)))] = root / path
    wanted |= _files(root / BOOK / "_static", STATIC)
    wanted |= _files(published / "figures", f"{VALUES}/figures")
    wanted[f"{VALUES}/values.json"] = published / "values.json"
    for name, source in wanted.items():
        _copy(source, site.staged / name)
    made = {
        "_config.yml": _configure(root / "_config.yml", title=site.title),
        "_toc.yml": list_attempts((root / site.toc).read_text(encoding="utf-8"), site.runs),
    }
    for name, notebook in executed.items():
        check_executed(notebook)
        page = Path(site.place, "notebooks", f"{name}.ipynb")
        made[str(page)] = nbformat.writes(as_page(notebook))
    for name, text in made.items():
        _write(site.staged / name, text)
    keep = {site.staged / name for name in (*wanted, *made)}
    for path in site.staged.rglob("*"):
        if path.is_file() and path not in keep:
            path.unlink()


def list_attempts(toc: str, runs: Sequence[NotebookRun]) -> str:
    """A table of contents with each attempt in the place of `attempt`, which stands for all."""
    found = re.search(r"( *)- file: (\S*notebooks/)attempt$", toc, re.MULTILINE)
    if found is None:
        return toc
    lines = []
    for run in runs:
        if attempt := run.parameters.get("attempt"):
            lines += [
                f"{found[1]}- file: {found[2]}{run.name}",
                f'{found[1]}  title: "Notebook: the prompt {attempt}"',
            ]
    return toc.replace(found[0], "\n".join(lines))


def _configure(path: Path, *, title: str) -> str:
    """The project's configuration; with a `title`, under that one and nobody's name."""
    text = path.read_text(encoding="utf-8")
    if not title:
        return text
    changed = {**yaml.safe_load(text), "title": title, "author": ""}
    return yaml.safe_dump(changed, allow_unicode=True, sort_keys=False)


def _drop_strays(site: Site) -> int:
    """Remove the pages whose source is gone, which Sphinx leaves; return the number of pages."""
    count = 0
    for page in sorted((site.html / site.place).rglob("*.html")):
        source = site.staged / page.relative_to(site.html)
        if any(source.with_suffix(suffix).is_file() for suffix in (".md", ".ipynb")):
            count += 1
        elif page.parent != site.html:
            page.unlink()
    return count


def as_page(notebook: Path) -> Any:
    """An executed notebook as a page: parameters hidden, run times and warnings left out.

    A warning names the file of the library that gives it, on the machine that it ran on.
    """
    content = read_notebook(notebook)
    for cell in content.cells:
        tags = set(cell.metadata.get("tags", []))
        if tags & {"parameters", "injected-parameters"}:
            cell.metadata["tags"] = sorted(tags | {"remove-cell"})
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
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
