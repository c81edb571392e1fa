"""Where a number comes from: the notebook, the library as a whole, package versions, the commit."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from postmortem.case import Case, case_digest
from postmortem.records import digest_file

LIBRARY = Path(__file__).parent
VERSIONED = ("torch", "transformers", "peft", "numpy", "pandas", "papermill", "lora-postmortem")
NO_COMMIT = "no commit"


@cache  # every step of a build names it
def digest_library() -> str:
    """Digest of every file of the library, by its bytes: any change of code runs a build again."""
    state = hashlib.sha256()
    for path in sorted(LIBRARY.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            state.update(f"{path.relative_to(LIBRARY)} {path.stat().st_size}\n".encode())
            state.update(path.read_bytes())
    return state.hexdigest()[:16]


def digest_notebook(path: str | Path) -> str:
    """Digest of what a notebook does: the source of its code cells.

    A tool that writes records is digested as it is.
    """
    source = Path(path).read_bytes()
    if Path(path).suffix == ".ipynb":
        cells = json.loads(source)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        source = json.dumps(code).encode()
    return hashlib.sha256(source).hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of what computes the numbers, and of Python."""
    found = {name: version(name) for name in VERSIONED}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found}


def settings_digest(case: Case, settings: Mapping[str, str | int]) -> str:
    """Digest of what a notebook is run with, apart from its world and code."""
    profile = case.profile(str(settings["profile"]))
    named = [str(settings[key]) or getattr(profile, key) for key in ("data", "labels")]
    files = [digest_file(path) if path and Path(path).is_file() else path for path in named]
    chosen = [settings[name] for name in ("profile", "rows", "device", "dtype")]
    parts = [case_digest(case, str(settings["profile"])), files, chosen, package_versions()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find_commit() -> str:
    """The commit that the library stands at, with "+" where files differ from it.

    Where there is no git, or this copy of the library is in no repository, there is no commit.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return NO_COMMIT


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(LIBRARY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
