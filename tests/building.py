"""A clone of the project and its build command, for tests of the whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def clone(root, folder):
    """Copy the project's own files, as a clone would have them, with fewer replays."""
    folder.mkdir()
    for name in ("book", "cases", "notebooks", "results"):
        shutil.copytree(root / name, folder / name)
    for name in ("Snakefile", "_config.yml", "_toc.yml"):
        shutil.copy2(root / name, folder / name)
    # Few and short replays: the graph, the records and the pages are what is tried here.
    case = folder / "cases/qwen-lora.yml"
    shipped = "seeds: 2\n      severities: 2\n      rows: 32\n"
    text = case.read_text()
    assert shipped in text
    small = "seeds: 2\n      severities: 1\n      rows: 8\n"
    case.write_text(text.replace(shipped, small))
    return folder


BIN = Path(sys.executable).parent
COMMAND = [str(BIN / "postmortem"), "book"]
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}


def make(project, *options):
    """Build the book there; returns the finished process."""
    return subprocess.run(
        [*COMMAND, *options],
        cwd=project,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
