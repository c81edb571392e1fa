import json

import pytest
from chapters import parameters_of
from safetensors.torch import load_file

from postmortem.checker.adapter import WEIGHTS_FILE
from postmortem.checker.catalogue import catalogue
from postmortem.checker.config import CONFIG_FILE
from postmortem.checker.errors import ModelError
from postmortem.experiments.files import (
    _size_agrees,
    record_dating,
    record_declared,
    record_entries,
    record_true_size,
    record_world,
    write_headers,
)
from postmortem.experiments.records import Measure, Table, Text, Verdict
from postmortem.experiments.session import open_session
from postmortem.models.mismatch import write_adapter
from postmortem.models.world import write_world
from tools import faults
from tools.faults import Reproduction, record_reproductions


@pytest.fixture
def session(untrained_world, tmp_path):
    """A session of the inventory notebook on the untrained world."""
    write_world(untrained_world, tmp_path / "world.json")
    return open_session(parameters_of("files", tmp_path, rows=2))


def recorded(session, kind):
    """The records of one kind by key."""
    return {record.key: record for record in session.records if isinstance(record, kind)}


def test_the_declared_config_implies_2179072_parameters(session, tmp_path):
    """Rank 16 on q_proj and v_proj of the 1.5B, and rank 8 on four modules, are 2,179,072 each."""
    record_declared(session, tmp_path / "declared")
    measures, verdicts = recorded(session, Measure), recorded(session, Verdict)
    for role in ("suspect", "reference"):
        assert measures[f"inventory.{role}.parameters"].value == 2_179_072
        assert verdicts[f"inventory.{role}.size_agrees"].verdict == "refuted"
        assert verdicts[f"inventory.{role}.loads_as_transcribed"].verdict == "refuted"


def test_the_warning_dates_saver_and_loader(session):
    """The log's one warning is printed by PEFT 0.16.0 for a config of 0.17, and by no other."""
    record_dating(session)
    texts = recorded(session, Text)
    assert texts["inventory.loader"].text == "0.16.0"
    assert texts["inventory.writers"].text == "0.17.0–0.17.1"
    verdict = recorded(session, Verdict)["inventory.transcription_was_loaded"]
    assert verdict.verdict == "refuted"


def test_a_4b_adapter_is_broken_on_the_base_and_its_own_fits(session, tmp_path):
    """Of adapters of true size those of a 4B are broken on the 1.5B, and its own fits."""
    record_true_size(session, tmp_path / "sizes")
    rows = recorded(session, Table)["inventory.true_size"].rows
    assert [row[1] for row in rows] == ["broken", "broken", "fits"]
    fits = [row[0] for row in recorded(session, Table)["inventory.fits"].rows]
    assert len(fits) > 1
    assert "Qwen/Qwen2.5-1.5B" in fits
    assert "Qwen/Qwen2.5-Coder-1.5B" in fits


def test_the_worlds_adapters_get_their_own_findings(session):
    """In the world the no-op is untrained, the donor's adapter does not fit, the others do."""
    record_world(session)
    found = {row[0]: row[2] for row in recorded(session, Table)["inventory.world"].rows}
    assert found["no-op adapter"] == "untrained"
    assert "shape-mismatch" in found["donor adapter"]
    assert found["suspect"] == found["reference"] == "none"


def test_written_headers_are_those_of_an_adapter(case, tmp_path):
    """An adapter of headers alone has the names, shapes and settings of one with weights."""
    size = case.true_size
    written = write_headers(size.base, tmp_path / "headers", size)
    whole = write_adapter(
        size.base,
        tmp_path / "whole",
        rank=size.rank,
        target_modules=tuple(size.target_modules),
    )
    found, expected = (load_file(folder / WEIGHTS_FILE) for folder in (written, whole))
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    assert not any(tensor.any() for tensor in found.values())
    settings = [json.loads((folder / CONFIG_FILE).read_text()) for folder in (written, whole)]
    assert settings[0] == settings[1]


def test_headers_of_an_unknown_base_are_refused(case, tmp_path):
    """A base whose shapes are not in the shipped table is named."""
    with pytest.raises(ModelError, match="owner/unknown"):
        write_headers("owner/unknown", tmp_path / "headers", case.true_size)


def test_the_catalogue_is_on_record(session):
    """Each entry of the catalogue stands in the table, counted."""
    record_entries(session)
    table = recorded(session, Table)["catalogue.entries"]
    assert [row[0] for row in table.rows] == list(catalogue())
    assert recorded(session, Measure)["catalogue.entries"].value == len(catalogue())


def test_an_entry_that_nothing_reproduces_is_named(session, tmp_path, monkeypatch):
    """What was reproduced is counted by PEFT's reaction, and a missing entry refutes the whole."""
    first, *others = catalogue()
    made = [Reproduction(name, "f", "warns", "error") for name in others]
    monkeypatch.setattr(faults, "reproduce", lambda folder: made)
    record_reproductions(session, tmp_path)
    measures = recorded(session, Measure)
    assert measures["catalogue.faults"].value == measures["catalogue.warns"].value == len(others)
    assert measures["catalogue.silent"].value == 0
    verdict = recorded(session, Verdict)["catalogue.all_reproduced"]
    assert (verdict.verdict, verdict.because) == ("refuted", f"without reproduction: {first}")


@pytest.mark.parametrize(
    ("implied", "stated", "agrees"),
    [
        (2_000_000, 8.0, True),
        (2_000_000, 4.1, True),
        (2_000_000, 50.0, False),
        (None, 50.0, None),
        (2_000_000, None, None),
    ],
)
def test_a_size_agrees_with_one_dtype_or_none(implied, stated, agrees):
    """A size on record agrees when it is within a tenth of the bytes of some dtype."""
    assert _size_agrees(implied, stated)[0] is agrees
