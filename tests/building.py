"""A clone of the project and its build command, for tests of the whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
COMMAND = [str(BIN / "postmortem"), "book"]
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
PARTS = ("book", "cases", "notebooks", "results", "tools", "Snakefile", "_config.yml", "_toc.yml")


def clone(root: Path, folder: Path, *, parts: tuple[str, ...] = PARTS) -> Path:
    """Copy what a build needs of the project, as a clone would have it; returns the folder."""
    for name in parts:
        if (root / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(root / name, folder / name, ignore=skip)
        else:
            shutil.copy2(root / name, folder / name)
    return folder


def make(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build the book there; returns the finished process."""
    return subprocess.run(
        [*COMMAND, *options],
        cwd=project,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1800,  # only a hang reaches it
        check=False,
    )


def plan(project: Path, *, library: Path | None = None, **settings: str) -> set[str]:
    """The rules that a build with the last build's settings, but for these, would run.

    `library` is a folder with another copy of the package, to be taken for the installed one.
    """
    path = project / "_build/settings.json"
    command = [sys.executable, "-m", "snakemake", "book", "--cores", "1"]
    with holding(path, json.dumps(json.loads(path.read_text()) | settings).encode()):
        found = subprocess.run(
            [*command, "--dry-run", "--nolock", "--rerun-incomplete"],
            cwd=project,
            env=ENVIRONMENT | ({"PYTHONPATH": str(library)} if library else {}),
            capture_output=True,
            text=True,
            check=False,
        )
    assert found.returncode == 0, found.stdout + found.stderr
    return set(re.findall(r"^(?:local)?rule (\w+):", found.stdout + found.stderr, re.MULTILINE))


@contextmanager
def holding(path: Path, content: bytes) -> Iterator[None]:
    """A file with another content, for as long as this lasts; its time is put back with it."""
    before, status = path.read_bytes(), path.stat()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edited(path: Path, old: str, new: str):
    """A file in which a text stands for another, for as long as this lasts."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    return holding(path, text.replace(old, new).encode())


def longer(path: Path, text: str):
    """A file with a text behind its own, for as long as this lasts."""
    return holding(path, path.read_bytes() + text.encode())


def shorter(path: Path):
    """A file that lacks its last byte, for as long as this lasts."""
    return holding(path, path.read_bytes()[:-1])
