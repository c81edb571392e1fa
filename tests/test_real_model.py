from dataclasses import replace

import pytest
import torch
from chapters import parameters_of

from postmortem.case.rows import generate_rows
from postmortem.checker.errors import CaseError
from postmortem.diagnosis.causes import CAUSES
from postmortem.experiments.records import Prediction, Table, Text, Verdict
from postmortem.experiments.session import open_recording
from tools.real_model import (
    record_causes,
    record_file,
    record_members,
    record_precision,
    record_systems,
    record_true_mismatch,
    record_variations,
)


@pytest.fixture
def few(session):
    """A session on four rows."""
    session.rows = session.rows.head(4)
    return session


def table_of(session, key):
    """A recorded table's rows."""
    return next(r.rows for r in session.records if isinstance(r, Table) and r.key == key)


def test_every_system_stands_beside_the_base(few):
    """Each system has its own numbers, and an adapter how far it moves its base."""
    record_systems(few, "v2", rows=3)
    keys = {getattr(record, "key", "") for record in few.records}
    for system in ("base", "suspect", "reference"):
        assert {f"v2.{system}.distinct", f"v2.{system}.reproduces"} <= keys
    assert {"v2.suspect.kl", "v2.reference.kl"} <= keys
    assert sum(isinstance(record, Prediction) for record in few.records) == 3 * 3


def test_a_missing_system_is_said(few):
    """A role that the world lacks has its measures with the reason for none."""
    member = few.world.members["reference"]
    gone = member.model_copy(update={"path": None, "digest": None, "reason": "none given"})
    few.world = few.world.model_copy(update={"members": {**few.world.members, "reference": gone}})
    record_systems(few, "yes_no")
    found = {r.key: r for r in few.records if r.kind == "measure"}
    assert found["yes_no.reference.auc_yes_no"].reason == "none given"


def test_a_file_leaves_numbers_and_no_text(few, tmp_path):
    """Of a file's rows neither a post nor a generated text nor a row id is recorded."""
    rows = generate_rows(6, 77)
    frame = rows.frame.assign(row_id=[f"secret-{i}" for i in range(6)], rule_violation=rows.labels)
    path = tmp_path / "real.csv"
    frame.to_csv(path, index=False)
    before = len(few.records)
    record_file(few, str(path), rows=4, prompts=("v2",))
    new = few.records[before:]
    assert not [record for record in new if isinstance(record, Prediction)]
    assert {record.key for record in new if isinstance(record, Text)} == {"real.digest"}
    told = "".join(record.model_dump_json() for record in new)
    assert "secret" not in told
    assert rows.row(0)["body"] not in told
    assert next(r.value for r in new if getattr(r, "key", "") == "real.rows") == 4


def test_a_variation_is_asked_in_other_words(few):
    """Each variation of the case has a row, and its words differ from the prompt's."""
    record_variations(few, rows=2)
    titles = [row[0] for row in table_of(few, "variations")]
    assert titles == [varied.title for varied in few.case.variations.values()]
    for name in few.case.variations:
        assert few.case.prompt(name).template != few.case.prompts["v2"].template


def test_an_adapter_of_true_size_raises(few):
    """PEFT refuses the donor's shapes on another base; ignored, nothing moves."""
    record_true_mismatch(few, rows=2)
    found = {getattr(record, "key", ""): record for record in few.records}
    assert found["mismatch.raises"].verdict == "holds"
    assert found["mismatch.tensors"].value > 0
    assert found["mismatch.ignored.kl"].value == pytest.approx(0, abs=1e-9)


def test_each_cause_is_run_or_said_to_be_absent(few):
    """No cause is passed over: it has a row of the matrix or a reason."""
    record_causes(few, rows=2)
    shown = [row[0] for row in table_of(few, "causes")]
    absent = [row[0] for row in table_of(few, "causes.absent")]
    assert sorted(shown + absent) == sorted(cause.title for cause in CAUSES.values())
    found = {row[0]: row for row in table_of(few, "causes")}
    assert found[CAUSES["other-shapes"].title][1] == "no"
    assert found[CAUSES["zero-b"].title][-2].startswith("0 [")


def test_half_precision_takes_a_gpu(few):
    """On a processor the comparison is not made, and the record says why."""
    record_precision(few, rows=2)
    assert table_of(few, "precision") == ()
    found = next(record for record in few.records if isinstance(record, Verdict))
    assert (found.key, found.verdict) == ("precision.same_texts", "not available")
    assert "GPU" in found.because


def test_half_precision_is_held_against_float32(few):
    """Each system answers in both half precisions and is compared with its answers in float32."""
    base = few.base
    assert few.shared  # of the base as it is on the processor
    # The tiny base answers on a processor, which stands in for the card.
    few.bases["base"] = replace(base, device="cuda")
    record_precision(few, rows=3)
    rows = table_of(few, "precision")
    systems = ["base", "suspect", "reference"]
    assert [row[:2] for row in rows] == [
        (dtype, system) for dtype in ("bfloat16", "float16") for system in systems
    ]
    assert all(0 < float(row[3]) < 1 for row in rows)
    changed = sum(row[2] for row in rows)
    found = next(record for record in few.records if isinstance(record, Verdict))
    assert found.verdict == ("refuted" if changed else "holds")
    assert found.because == f"{changed} of 18 answers have another text"
    assert next(base.model.parameters()).dtype == torch.float32


def test_members_tell_the_adapters_apart(few):
    """The digest of each member that there is stands on record."""
    record_members(few)
    found = dict(table_of(few, "members"))
    assert found["suspect"] == few.world.members["suspect"].digest
    assert found["suspect"] != found["reference"]


def test_a_profile_without_sizes_is_refused(few, tmp_path):
    """A profile that does not say how many rows to record is named, with the key."""
    with pytest.raises(CaseError, match=r"profiles.embedded.*recorded"):
        open_recording(parameters_of("kept/real_model", tmp_path))
