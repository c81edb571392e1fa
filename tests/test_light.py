import ast
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

RUN = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from postmortem.cli import main
main({arguments!r})
"""


# Modules under another name than the distribution that brings them.
RENAMED = {"pyyaml": "yaml"}


def brought(extra=""):
    """The modules that an extra brings, or without one those of the package itself."""
    lines = requires("lora-postmortem")
    wanted = [
        line for line in lines if (re.search(r"extra == .(\w+)", line) or ["", ""])[1] == extra
    ]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in wanted}
    return {RENAMED.get(name, name) for name in names} - {"lora_postmortem"}


def imported(package):
    """The libraries that a package of ours imports anywhere."""
    source = Path(__file__).parents[1] / "src/postmortem"
    nodes = [
        node
        for path in (source / package).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    modules = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    modules += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.partition(".")[0] for name in modules} - {*sys.stdlib_module_names, "postmortem"}


@pytest.mark.parametrize(
    ("package", "extra"),
    [("checker", "")] + [(n, "models") for n in ("case", "models", "experiments", "diagnosis")],
)
def test_what_a_package_imports_is_declared(package, extra):
    """Every library that a package imports comes with this one or with the package's extra."""
    known = {*brought(), *(brought(extra) if extra else ()), "pydantic_core"}
    assert imported(package) <= known


def run_light(*arguments):
    """A command in a process that has only what the package itself depends on."""
    code = RUN.format(
        blocked=sorted(brought("models") | brought("book")),
        arguments=list(map(str, arguments)),
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_checker_runs_without_any_extra(untrained_world):
    """An adapter is checked, identified and dated where no library that runs models is there."""
    adapter, base = (untrained_world.path(role) for role in ("reference", "base"))
    checked = run_light("check", adapter, "--base", base)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.startswith("fits: ")
    assert run_light("identify", adapter).returncode == 0
    assert run_light("archaeology", adapter).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("diagnose", "cases/qwen-lora.yml"), "models"),
        (("weights",), "models"),
        (("check", "a", "--fix", "b"), "models"),
        (("book",), "book"),
        (("suite", "a.yml", "--out", "b"), "book"),
        (("identify", "a", "--candidates", "b", "c", "--text", "README.md"), "models"),
    ],
)
def test_a_command_whose_extra_is_missing_says_which(arguments, extra, pytestconfig, monkeypatch):
    """One line names the library, the extra and the command that installs it."""
    monkeypatch.chdir(pytestconfig.rootpath)
    found = run_light(*arguments)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert f"pip install 'lora-postmortem[{extra}]'" in found.stderr
