import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Notebooks that read files and records alone.
WITHOUT_MODEL = ("files", "diagnosis")


def imports_of(notebook):
    """The lines of a notebook's first cell of code that import, parentheses and all."""
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    first = next(text for text in code if "import" in text)
    return first.partition("session = ")[0].partition("scratch = ")[0]


def loaded(code, *names):
    """Which of the packages are loaded after some code has run."""
    probe = f"{code}\nimport sys\nprint([n for n in {names!r} if n in sys.modules])"
    command = [sys.executable, "-c", probe]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize("notebook", WITHOUT_MODEL)
def test_a_notebook_without_a_model_does_not_wait_for_one(notebook):
    """What runs no model imports neither torch nor transformers nor PEFT."""
    code = imports_of(notebook)
    assert "postmortem" in code
    assert loaded(code, "torch", "transformers", "peft") == "[]"


def test_a_build_without_changes_loads_no_tables():
    """What finds nothing to be done reads no rows: it imports neither pandas nor scipy."""
    modules = ("book.build", "models.model_set", "case.layout")
    code = "\n".join(f"import postmortem.{name}" for name in modules)
    assert loaded(code, "torch", "pandas", "scipy", "matplotlib") == "[]"


def test_the_checker_needs_neither_torch_nor_pandas():
    """Whoever checks files installs no library that runs models or holds tables."""
    modules = sorted(path.stem for path in (ROOT / "src/postmortem/checker").glob("[a-z]*.py"))
    code = "\n".join(f"import postmortem.checker.{name}" for name in modules)
    assert loaded(code, "torch", "transformers", "peft", "pandas", "scipy") == "[]"
