"""What people reported of their adapters, made small: each kind in the forms it takes."""

import json

import pytest
from handmade import QWEN, write

from postmortem.cli import main


def run(capsys, *arguments):
    """The exit code of a check and its JSON."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, arguments), "--format", "json"])
    return stop.value.code, json.loads(capsys.readouterr().out)


def unknown_base(folder):
    """A config.json of an architecture that is not described."""
    path = folder / "config.json"
    path.write_text(json.dumps({**QWEN, "model_type": "mamba"}))
    return path


@pytest.mark.parametrize(
    ("changes", "base", "hint"),
    [
        ({"base_model_name_or_path": "acme/unheard-of"}, None, "give --base"),
        ({"base_model_name_or_path": None}, None, "give --base"),
        ({}, unknown_base, "not described here"),
        ({"layer_replication": [[0, 4], [2, 6]]}, None, "layer_replication"),
    ],
)
def test_what_was_not_compared_is_unchecked(changes, base, hint, tmp_path, capsys):
    """Where shapes were compared with no base the verdict is not "fits", and --strict exits 2."""
    arguments = [write(tmp_path / "a", **changes)]
    arguments += ["--base", base(tmp_path)] if base else []
    code, report = run(capsys, *arguments)
    assert (code, report["verdict"], report["error"]) == (0, "unchecked", None)
    assert any(hint in note for note in report["notes"])
    assert run(capsys, *arguments, "--strict")[0] == 2
    assert run(capsys, write(tmp_path / "b"), "--strict")[0] == 0


@pytest.mark.parametrize("make", ["dangling", "outward", "method", "base", "nothing"])
def test_json_is_written_where_nothing_could_be_checked(make, tmp_path, capsys):
    """A refused adapter has the keys of every other, and its error in them."""
    folder = write(tmp_path / "a", **({"peft_type": "IA3"} if make == "method" else {}))
    weights = folder / "adapter_model.safetensors"
    if make in ("dangling", "outward"):
        (tmp_path / "outside").write_bytes(weights.read_bytes())
        weights.unlink()
        weights.symlink_to("nowhere" if make == "dangling" else "../outside")
    arguments = [tmp_path / "none" if make == "nothing" else folder]
    arguments += ["--base", "no-such-thing"] if make == "base" else []
    code, report = run(capsys, *arguments)
    _, sound = run(capsys, write(tmp_path / "b"))
    assert (code, report["verdict"], report["findings"]) == (2, "unchecked", [])
    assert report.keys() == sound.keys()
    assert set(report["error"]) == {"message", "subject", "expected", "found", "remedy"}
    _, both = run(capsys, *arguments, tmp_path / "b")
    assert both[0]["error"]
    assert both[-1]["verdict"] == ("unchecked" if make == "base" else "fits")
