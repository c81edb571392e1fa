import re
import subprocess
import sys
from importlib.metadata import requires

import pytest

RUN = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from postmortem.cli import main
main({arguments!r})
"""


def extras():
    """The modules that the extras bring, which a light installation lacks."""
    lines = [line for line in requires("lora-postmortem") if "extra ==" in line]
    names = [re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines]
    return [name for name in names if name != "lora_postmortem"]


def run_light(*arguments):
    """A command in a process that has only what the package itself depends on."""
    code = RUN.format(blocked=extras(), arguments=list(map(str, arguments)))
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
