import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
from handmade import write

import postmortem.checker
from postmortem.checker.errors import catalogue
from postmortem.cli import main

SCHEMA = json.loads(Path(postmortem.checker.__file__).with_name("report.schema.json").read_text())
HOSTILE = '<b>&"|\x1b[1K\udcff\n'


def check(capsys, *arguments):
    """The exit code of a check, and what it wrote."""
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, arguments)])
    return stop.value.code, capsys.readouterr().out


@pytest.fixture
def adapters(tmp_path):
    """One that fits, one with a warning, one with errors, one with a hostile name and key."""
    return (
        write(tmp_path / "fits"),
        write(tmp_path / "suspect", _note="x"),
        write(tmp_path / "broken", r=0),
        write(tmp_path / f"hostile{HOSTILE}", **{f"_{HOSTILE[:-2]}": 1}, lora_alpha=0),
    )


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("options", [(), ("--for", "all", "--header-only")])
def test_json_is_as_the_schema_says(count, options, adapters, capsys):
    """The report of one adapter and of several is valid by the published schema."""
    _, written = check(capsys, *adapters[:count], *options, "--format", "json")
    report = json.loads(written)
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert len(report if count > 1 else [report]) == count


@pytest.mark.parametrize("change", [{"verdict": "maybe"}, {"findings": [{"id": "x"}]}])
def test_the_schema_refuses_another_report(change, adapters, capsys):
    """A report with another verdict, or with findings that lack keys, is not valid."""
    report = json.loads(check(capsys, adapters[0], "--format", "json")[1])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report, **change}, SCHEMA)


def test_sarif_has_what_code_scanning_reads(adapters, capsys):
    """Each finding is a result of a listed rule, with a level, a text and a place in a file."""
    code, written = check(capsys, *adapters, "--for", "mlx-lm", "--format", "sarif")
    report = json.loads(written)
    assert (code, report["version"]) == (1, "2.1.0")
    (run,) = report["runs"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert run["invocations"][0]["executionSuccessful"] is True
    assert set(ids) <= set(catalogue())
    assert {result["ruleId"] for result in run["results"]} == set(ids)
    for result in run["results"]:
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"].isprintable()
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"].endswith("/adapter_config.json")
        assert place["artifactLocation"]["uri"].isascii()
        assert place["region"]["startLine"] == 1


def test_junit_has_a_suite_for_each_adapter(adapters, capsys):
    """A suite counts its findings; errors fail, warnings pass, and a sound adapter is one case."""
    _, written = check(capsys, *adapters, "--format", "junit")
    suites = list(ElementTree.fromstring(written.encode()))
    counts = [(int(s.get("tests")), int(s.get("failures"))) for s in suites]
    assert counts == [(1, 0), (1, 0), (1, 1), (2, 1)]
    for suite in suites:
        assert suite.get("name").isprintable()
        assert len(suite.findall("testcase")) == int(suite.get("tests"))
        assert len(suite.findall("testcase/failure")) == int(suite.get("failures"))


@pytest.mark.parametrize("form", ["sarif", "junit"])
def test_what_was_not_checkable_is_in_the_report(form, adapters, tmp_path, capsys):
    """An adapter of another method is an error of the report, which still has the others."""
    other = write(tmp_path / "other", peft_type="IA3")
    code, written = check(capsys, adapters[0], other, "--format", form)
    assert code == 2
    if form == "sarif":
        (invocation,) = json.loads(written)["runs"][0]["invocations"]
        assert invocation["executionSuccessful"] is False
        assert "IA3" in invocation["toolExecutionNotifications"][0]["message"]["text"]
    else:
        first, second = ElementTree.fromstring(written.encode())
        assert (first.get("errors"), second.get("errors")) == ("0", "1")
        assert "IA3" in second.find("testcase/error").get("message")


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_no_name_reaches_the_terminal_as_it_is(form, adapters, capsys):
    """Control characters of a folder's name are not printed."""
    written = check(capsys, adapters[3], "--format", form)[1]
    assert "hostile" in written
    assert all(line.isprintable() for line in written.splitlines())


def test_options_may_stand_between_adapters(adapters, capsys):
    """A list of adapters may be parted by options, as shells and hooks write them."""
    fits, suspect, *_ = adapters
    code, written = check(capsys, fits, "--header-only", suspect)
    assert (code, written.count(" on Qwen/Qwen2.5-1.5B")) == (0, 2)


def test_every_command_is_listed(capsys):
    """The help of the command line names `check`, which has a help of its own."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "check " in capsys.readouterr().out
    code, written = check(capsys, "--help")
    assert (code, "--for RUNTIME" in written) == (0, True)
