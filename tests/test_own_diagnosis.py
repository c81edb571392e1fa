import json

import own
import pytest
import torch
from safetensors.torch import load_file, save_file

from postmortem.case.load import load_case
from postmortem.cli import main
from postmortem.diagnosis.timed import record_diagnosis
from postmortem.experiments.records import Measure, Table, Text, Verdict
from postmortem.experiments.session import Session
from postmortem.models.model_set import resolve_world

CLASSIFY = {"contract": "class", "template": "{text}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama with random weights, adapters on it, and rows."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("own")
    base = own.make_base(folder / "base")
    own.make_adapter(folder / "suspect", base)
    own.make_adapter(folder / "zero", base, zero=True)
    own.make_adapter(folder / "classifier", base, task="SEQ_CLS")
    own.write_rows(folder / "rows.csv")
    return folder


def write(place, path, **changes):
    """The case of these folders, with changes."""
    given = {"base": place / "base", "suspect": place / "suspect", "data": place / "rows.csv"}
    return own.write_case(path, **(given | changes))


def diagnose(capsys, path, *options):
    """What the command prints and its exit code."""
    code = 0
    try:
        main(["diagnose", str(path), *options])
    except SystemExit as exit_:
        code = exit_.code or 0
    captured = capsys.readouterr()
    return captured.out, captured.err, code


def test_a_zero_b_adapter_is_named(place, tmp_path, capsys):
    """Each step is told with its outcome, and the verdict names the cause and what to do."""
    path = write(place, tmp_path / "c.yml", suspect=place / "zero")
    out, _, code = diagnose(capsys, path, "--minutes", "2")
    assert code == 0
    assert "inspect: untrained" in out
    assert "effect on 16 rows: none" in out
    assert "Named: the adapter changes nothing as it is saved" in out
    assert "lora_B is zero" in out
    assert "on 16 rows under the prompt sentiment" in out
    assert "to do: Save the trained adapter again" in out


def test_a_dropped_head_is_named_by_the_checker(place, tmp_path, capsys):
    """An error that no replay shows is said as such, with what settles it and the remedy."""
    folder = tmp_path / "headless"
    folder.mkdir()
    for file in (place / "classifier").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"task_type": "CAUSAL_LM", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = write(place, tmp_path / "c.yml", suspect=folder, prompts={"class": CLASSIFY})
    out, _, _ = diagnose(capsys, path, "--format", "json")
    found = json.loads(out)
    assert found["verdict"] == "named"
    assert found["finding"]["id"] == "head-dropped"
    assert "Named by the checker" in found["conclusion"]
    assert found["share"] is None


def test_a_classifier_is_examined(place, tmp_path, capsys):
    """A classification adapter goes through the same experiments."""
    path = write(
        place, tmp_path / "c.yml", suspect=place / "classifier", prompts={"class": CLASSIFY}
    )
    out, _, code = diagnose(capsys, path, "--format", "json", "--minutes", "2")
    assert code == 0
    found = json.loads(out)
    tests = {test["test"]: test["outcome"] for test in found["tests"]}
    assert tests["off"] == "is the base"
    assert tests["effect"] in ("faint", "clear")


def test_without_time_the_next_experiment_is_named(place, tmp_path, capsys):
    """In a time box of nothing only what costs nothing yet is run, and what comes next is told."""
    out, _, code = diagnose(capsys, write(place, tmp_path / "c.yml"), "--minutes", "0")
    assert code == 0
    assert "Cannot tell yet." in out
    assert "Run `postmortem diagnose CASE --minutes" in out


def test_without_labels_they_are_asked_for(place, tmp_path, capsys):
    """Nothing is guessed: the experiments that take labels are listed as not run."""
    path = write(place, tmp_path / "c.yml", columns={"text": "text"})
    out, _, code = diagnose(capsys, path, "--minutes", "2")
    assert code == 0
    assert "order:" not in out.split("not run")[0]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"suspect": "nowhere/at-all/adapter"}, (), ("no such folder",)),
        ({"base": "nowhere/at-all/base"}, (), ("nowhere/at-all/base",)),
        ({"data": "nowhere.csv"}, (), ("nowhere.csv",)),
        ({}, ("--observe", "x-ray=seen"), ("TEST=OUTCOME",)),
        ({}, ("--prior", "write-up"), ("flat",)),
        ({}, ("--profile", "embedded"), ("own",)),
    ],
)
def test_bad_input_is_one_clear_line(place, tmp_path, capsys, changes, options, words):
    """What cannot be used is named without a traceback, and the exit code says so."""
    out, err, code = diagnose(capsys, write(place, tmp_path / "c.yml", **changes), *options)
    assert code == 2
    assert err.startswith("postmortem: ")
    assert "Traceback" not in out + err
    for word in words:
        assert word in err


def test_an_adapter_that_is_no_adapter_is_named_by_the_checker(place, tmp_path, capsys):
    """A folder with a configuration alone is a finding and no crash."""
    folder = tmp_path / "bare"
    folder.mkdir()
    config = (place / "suspect" / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(config)
    out, _, code = diagnose(capsys, write(place, tmp_path / "c.yml", suspect=folder))
    assert code == 0
    assert "missing-weights" in out


def open_own(path, folder):
    """A session of a case of one's own."""
    case = load_case(path)
    from postmortem.case.rows import choose_rows

    return Session(
        folder / "4_diagnosis.ipynb",
        case,
        case.default_profile,
        resolve_world(case, case.default_profile),
        choose_rows(case, case.default_profile),
        folder / "records.jsonl",
        {},
    )


def test_a_notebook_records_the_diagnosis(place, tmp_path):
    """The tests, the causes, what comes next and the verdict are records, with no time in them."""
    session = open_own(write(place, tmp_path / "c.yml", suspect=place / "zero"), tmp_path)
    record_diagnosis(session, minutes=2)
    found = {(type(r), r.key): r for r in session.records if hasattr(r, "key")}
    outcomes = {row[0]: row[2] for row in found[Table, "diagnosis.outcomes"].rows}
    assert outcomes["inspect"] == "untrained"
    assert found[Table, "diagnosis.causes"].rows[0][0] == "lora_B is zero"
    assert found[Verdict, "diagnosis.settled"].verdict == "holds"
    assert "Named" in found[Text, "diagnosis.conclusion"].text
    assert found[Measure, "diagnosis.rows"].value == 16
    reasons = found[Table, "diagnosis.reasons"].rows
    assert ("for", "with it and without it the answers are the same") in reasons
    assert (Table, "diagnosis.next") in found


def test_a_base_that_does_not_load_is_no_finding_of_the_adapters(place, tmp_path, capsys):
    """A damaged base stops the diagnosis with its own name; nothing is concluded from it."""
    base = tmp_path / "base"
    base.mkdir()
    for file in (place / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "model.safetensors").write_bytes(b"damaged")
    out, err, code = diagnose(capsys, write(place, tmp_path / "c.yml", base=base))
    assert code == 2
    assert str(base) in err
    assert "load: raises" not in out
