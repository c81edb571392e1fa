import subprocess
import sys
import time

import own
import pytest

from postmortem.book import build
from postmortem.checker.errors import CaseError, DataError
from postmortem.cli import main

SETTINGS = {
    "case": "cases/qwen-lora.yml",
    "profile": "embedded",
    "data": "",
    "labels": "",
    "rows": 0,
    "suspect": "",
    "reference": "",
    "device": "auto",
    "dtype": "auto",
}


@pytest.fixture(autouse=True)
def _at_the_root(pytestconfig, monkeypatch):
    """Paths in the settings are relative to the project."""
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"case": "cases/none.yml"}, CaseError, "cases/none.yml"),
        ({"profile": "nowhere"}, CaseError, "one of embedded"),
        ({"data": "none.csv"}, DataError, "none.csv"),
        ({"labels": "LICENSE"}, DataError, "labels alone"),
        ({"suspect": "none"}, DataError, "the suspect's folder"),
        ({"device": "gpu"}, DataError, "auto, cpu, cuda"),
        ({"dtype": "int8"}, DataError, "auto, float32"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(changes, error, told):
    """A case, profile, file or folder that is not there is named before any step starts."""
    with pytest.raises(error, match=told):
        build.check_settings(SETTINGS | changes)


def test_right_settings_pass():
    """The default settings are accepted; where no profile is named the case's first is taken."""
    assert build.check_settings(SETTINGS | {"profile": ""}) == SETTINGS


def own_settings(tmp_path, **changes):
    """Settings for a case of one's own whose folders are here."""
    own.write_rows(tmp_path / "rows.csv")
    given = {"base": tmp_path, "suspect": tmp_path, "data": tmp_path / "rows.csv"} | changes
    case = own.write_case(tmp_path / "case.yml", **given)
    return SETTINGS | {"case": str(case), "profile": ""}


def test_a_case_of_ones_own_runs_in_its_one_profile(tmp_path):
    """Without a profile a case in the short form runs in the one it has, and in no other."""
    settings = own_settings(tmp_path)
    assert build.check_settings(settings)["profile"] == "own"
    with pytest.raises(CaseError, match="one of own"):
        build.check_settings(settings | {"profile": "embedded"})


def test_rows_that_are_not_there_are_told_before_anything_runs(tmp_path):
    """A rows file that the case names and that is missing stops the build at once."""
    with pytest.raises(DataError, match=r"none\.csv: expected a file of data"):
        build.check_settings(own_settings(tmp_path, data=tmp_path / "none.csv"))


def test_a_short_case_is_not_replayed(tmp_path):
    """Replays need a case in full; the error names the command for a case of one's own."""
    with pytest.raises(CaseError, match="postmortem diagnose"):
        build.replay(own_settings(tmp_path), cores=1)


# Holds the build lock of a folder for a second.
HOLD = """
import sys, time
from pathlib import Path
from postmortem.book import build
build.BUILD = folder = Path(sys.argv[1])
with build.one_build():
    (folder / "held").touch()
    time.sleep(1)
    (folder / "released").touch()
"""


def test_a_second_build_waits_for_the_first(tmp_path, monkeypatch, capsys):
    """Two builds in one folder run one after the other, and the second says that it waits."""
    monkeypatch.setattr(build, "BUILD", tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)]) as other:
        while not (tmp_path / "held").exists():
            assert other.poll() is None
            time.sleep(0.02)
        with build.one_build():
            assert (tmp_path / "released").exists()
    assert other.returncode == 0
    assert "waiting for another build" in capsys.readouterr().err


def test_an_error_is_one_line_and_no_traceback(capsys):
    """The command line prints an error of ours as one line and exits with 2."""
    with pytest.raises(SystemExit) as ended:
        main(["book", "--case", "cases/none.yml"])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("postmortem: cases/none.yml: expected a case file")
    assert told.count("\n") == 1
