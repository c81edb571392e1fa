import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from handmade import header, write

from postmortem.checker.adapter import open_source, parse_header, read_adapter
from postmortem.checker.bases import describe, find_base, known_bases
from postmortem.checker.config import sort_keys
from postmortem.checker.identify import (
    date_config,
    date_warning,
    find_warnings,
    identify,
    releases,
    span,
)
from postmortem.cli import main
from tools import derive_peft_fields

INCIDENT_LOG = (
    "UserWarning: Unexpected keyword arguments ['target_parameters'] for class LoraConfig, these "
    "are ignored. This probably means that you're loading a configuration file"
)


def test_a_set_is_the_answer_where_shapes_cannot_tell(tmp_path: Path) -> None:
    """q_proj of a 1.5B Qwen fits the whole family and no other; the set is not narrowed."""
    found = identify(read_adapter(open_source(str(write(tmp_path / "a")))))
    assert set(found.fits) == {
        "Qwen/Qwen2-1.5B",
        "Qwen/Qwen2.5-1.5B",
        "Qwen/Qwen2.5-Math-1.5B",
        "Qwen/Qwen2.5-Coder-1.5B",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    }
    assert {split.field for split in found.splits} == {"tie_word_embeddings"}


def test_every_other_base_is_excluded_by_a_tensor(tmp_path: Path) -> None:
    """Each exclusion names a tensor of the file, what the base has and what was found."""
    found = identify(read_adapter(open_source(str(write(tmp_path / "a")))))
    assert len(found.excluded) + len(found.fits) == len(known_bases())
    wide = next(e for e in found.excluded if e.model_id == "Qwen/Qwen3-4B")
    assert (wide.tensor in header(), wide.expected, wide.found) == (True, "2560 inputs", "1536")


def test_a_saved_embedding_excludes_by_its_vocabulary(tmp_path: Path) -> None:
    """A whole embedding in the file tells bases apart that LoRA shapes do not."""
    entries = header()
    start = max(entry["data_offsets"][1] for entry in entries.values())
    shape = [151936, 1536]
    offsets = [start, start + 2 * shape[0] * shape[1]]
    key = "base_model.model.model.embed_tokens.weight"
    entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
    tensors = parse_header(entries, data_start=0, file_size=offsets[1])
    adapter = read_adapter(open_source(str(write(tmp_path / "a"))))
    held = replace(adapter, tensors=tensors, contents=sort_keys(tensors))
    assert "Qwen/Qwen2.5-1.5B" in identify(held).fits
    tensors[key] = replace(tensors[key], shape=(151665, 1536))
    reason = next(e for e in identify(held).excluded if e.model_id == "Qwen/Qwen2.5-1.5B")
    assert (reason.tensor, reason.expected, reason.found) == (key, "151936 inputs", "151665")


def test_every_known_base_is_described() -> None:
    """Every row of the catalogue has an architecture, a source and a usable shape."""
    for base in known_bases():
        model = describe(base.config, name=base.model_id, kind=None)
        assert model is not None
        assert model.layers > 0
        assert base.source


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B"),
        ("Qwen/Qwen2.5-1.5B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-1.5B"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "meta-llama/Llama-3.2-1B"),
        ("Qwen/Qwen2.5-9B", None),
        ("/models/Qwen2.5-1.5B", None),
        ("./gpt2", None),
        ("gpt2", "openai-community/gpt2"),
        ("", None),
    ],
)
def test_siblings_share_a_row(name: str, expected: str | None) -> None:
    """Tuned and quantised siblings share their family's row; others and paths are unknown."""
    found = find_base(name)
    assert (found.model_id if found else None) == expected


def test_identify_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the set, what would split it, and the arithmetic of sizes."""
    with pytest.raises(SystemExit) as stop:
        main(["identify", str(write(tmp_path / "a"))])
    out = capsys.readouterr().out
    assert (stop.value.code, out.splitlines()[0]) == (0, "fits 5 known bases:")
    assert "172,032 parameters" in out
    assert "Qwen/Qwen3-4B-Base, " in out


def test_warning_of_the_incident() -> None:
    """The incident's warning dates both ends: written by 0.17, loaded by 0.16.0."""
    (names,) = find_warnings(INCIDENT_LOG)
    (encounter,) = date_warning(names)
    assert (encounter.loader, encounter.writers) == ("0.16.0", ("0.17.0", "0.17.1"))


def test_a_warning_dates_older_loaders_and_newer_writers() -> None:
    """An older loader names more keys of one file; names that no release knows date nothing."""
    older = date_warning(["qalora_group_size", "target_parameters", "use_qalora"])
    assert [e.loader for e in older] == ["0.15.0", "0.15.1", "0.15.2"]
    assert {e.writers for e in older} == {("0.17.0", "0.17.1")}
    by_version = {release.version: release for release in releases()}
    newer = date_warning(by_version["0.21.2"].written - by_version["0.16.0"].accepted)
    assert newer[0].loader == "0.16.0"
    assert "0.21.2" in newer[0].writers
    assert date_warning(["_note", "_issue"]) == ()


@pytest.mark.parametrize("version", ["0.4.0", "0.9.0", "0.16.0", "0.21.2"])
def test_config_of_a_release_dates_itself(version: str) -> None:
    """A configuration with exactly the keys of a release is dated to it."""
    release = next(r for r in releases() if r.version == version)
    dating = date_config(dict.fromkeys(release.written))
    assert version in dating.writers
    assert version in dating.silent_loaders
    assert (dating.missing, dating.unknown) == ((), ())


def test_transcribed_config_is_told_from_a_written_one() -> None:
    """Comment keys and a missing peft_type show that no release wrote the file."""
    keys = ["base_model_name_or_path", "lora_alpha", "r", "target_modules", "_note", "_issue"]
    dating = date_config(dict.fromkeys(keys))
    assert dating.writers == ()
    assert "peft_type" in dating.missing
    assert dating.unknown == ("_issue", "_note")
    assert (dating.silent_loaders, dating.warning_loaders) == ((), ())


def test_installed_release_agrees_with_the_table() -> None:
    """The table's newest row is what the PEFT of that release really accepts."""
    peft = pytest.importorskip("peft")
    import dataclasses

    release = next((r for r in releases() if r.version == peft.__version__), None)
    if release is None:
        pytest.skip("the installed PEFT is newer than the table")
    assert {f.name for f in dataclasses.fields(peft.LoraConfig) if f.init} == release.accepted


@pytest.mark.parametrize("kind", ["config", "folder", "log"])
def test_archaeology_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command reads a configuration, its folder or a log."""
    folder = write(tmp_path / "a")
    log = tmp_path / "log.txt"
    log.write_text(INCIDENT_LOG)
    source = {"config": folder / "adapter_config.json", "folder": folder, "log": log}[kind]
    with pytest.raises(SystemExit) as stop:
        main(["archaeology", str(source)])
    out = capsys.readouterr().out
    wanted = "loaded by 0.16.0, written by 0.17.0–0.17.1" if kind == "log" else "written exactly so"
    assert (stop.value.code, wanted in out) == (0, True), out


@pytest.mark.parametrize("content", [b"", b"nothing here", b"[1]", b"\xff\xfe", b'{"a": 1}'])
def test_archaeology_refuses_other_files(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is neither configuration nor log ends in exit 2 and one line."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["archaeology", str(path)])
    assert (stop.value.code, len(capsys.readouterr().err.splitlines())) == (2, 1)


def test_ranges_of_releases() -> None:
    """Consecutive releases are written as ranges."""
    assert span(("0.16.0", "0.17.0", "0.17.1", "0.18.1")) == "0.16.0–0.17.1, 0.18.1"
    assert span(()) == "none"


def test_fields_are_derived_from_source_without_running_it(tmp_path: Path) -> None:
    """The script reads fields of a wheel with ast: importing the wheel would have failed."""
    source = (
        "raise SystemExit\n"
        "class PeftConfigMixin:\n    task_type: str = None\n    hidden: int = field(init=False)\n"
        "class LoraConfig(PeftConfigMixin):\n    r: int = 8\n    x: int = field(default=1)\n"
        "    def to_dict(self):\n        rv.pop('x', None)\n"
    )
    with zipfile.ZipFile(tmp_path / "peft-9.9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peft/tuners/lora/config.py", source)
        wheel.writestr("peft/tuners/lora/__init__.py", "")
        wheel.writestr("peft/tuners/lora.py", "class LoraConfig:\n    stale: int = 1\n")
    found = derive_peft_fields.rows([*tmp_path.glob("*.whl")])
    assert found == [["9.9.9", "raises", "r task_type x", "", "x"]]
