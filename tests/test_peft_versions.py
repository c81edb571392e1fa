import sys
from itertools import product
from pathlib import Path

import pytest

from postmortem.checker.errors import RecordError
from postmortem.checker.identify import releases
from postmortem.experiments.records import Table, Text, Verdict, read_records
from tools.peft_cases import CASES, PLAIN, SAVED_BY_0_17_1, SAVED_BY_0_21_2
from tools.peft_versions import MISFITS, PAIRS, Release, records_of, run_cases, say_answers

RECORD = Path(__file__).parents[1] / "results/embedded/peft_versions.jsonl"
NEWEST = [*PAIRS][-1]


@pytest.fixture(scope="module")
def kept():
    """The kept record."""
    return read_records(RECORD)


def tables_of(records):
    """The tables among records, by key."""
    return {record.key: record for record in records if isinstance(record, Table)}


def rows_of(table):
    """A table's rows, each by column."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def verdicts_of(records):
    """The words of the verdicts among records, by key."""
    return {record.key: record.verdict for record in records if isinstance(record, Verdict)}


def test_every_release_and_case_is_on_record(kept):
    """Each release was given each adapter, beside the transformers that stands in its provenance.

    What the page shows is what the release said.
    """
    tables = tables_of(kept.records)
    words = rows_of(tables["peft.words"])
    wanted = product(PAIRS, (case.id for case in CASES))
    assert [(row["PEFT"], row["adapter"]) for row in words] == list(wanted)
    versions = kept.provenance.versions
    assert {name: versions[f"transformers beside peft {name}"] for name in PAIRS} == dict(PAIRS)
    did = {(row["PEFT"], row["adapter"]): row["does"] for row in words}
    table = tables["peft.cases"]
    assert ", ".join(table.columns[1:-1]) == ", ".join(PAIRS)
    assert [row[0] for row in table.rows] == [case.name for case in CASES]
    for case, row in zip(CASES, rows_of(table), strict=True):
        for names in table.columns[1:-1]:
            assert {did[name, case.id] for name in names.split(", ")} == {row[names]}


def test_every_release_raises_on_a_misfit(kept):
    """What the chapter says of a misfit is what each release did, in its own words."""
    words = rows_of(tables_of(kept.records)["peft.words"])
    misfits = [row for row in words if row["adapter"] in MISFITS]
    assert len(misfits) == len(MISFITS) * len(PAIRS)
    assert {row["does"] for row in misfits} == {"raises"}
    # Two factors of two modules in two layers.
    assert {row["mismatches"] for row in misfits} == {8}
    assert verdicts_of(kept.records)["peft.misfit_raises"] == "holds"
    texts = {text.key: text.text for text in kept.of(Text)}
    assert texts["peft.wider.newest"] == texts[f"peft.wider.{NEWEST}"]
    for name in PAIRS:
        assert "torch.Size([8, 2560])" in texts[f"peft.wider.{name}"]


def test_a_sound_adapter_loads_on_every_release(kept):
    """The control: each release loads it without a word, and it answers as meant."""
    words = rows_of(tables_of(kept.records)["peft.words"])
    sound = [(row["does"], row["answers"]) for row in words if row["adapter"] == "sound"]
    assert sound == [("silent", "as meant")] * len(PAIRS)


def test_one_release_alone_prints_the_line_of_the_log(kept, case):
    """Of the releases tried, 0.16.0 alone lists the keyword of the log for a config of 0.17.1.

    It prints the same line for an adapter that uses the keyword, and loads the rest of it.
    """
    rows = rows_of(tables_of(kept.records)["peft.unknown_keys"])
    logged = ", ".join(case.loading_warning.keywords)
    found = [row["PEFT"] for row in rows if row["saved by 0.17.1"] == logged]
    assert found == ["0.16.0"]
    words = rows_of(tables_of(kept.records)["peft.words"])
    told = {row["adapter"]: row for row in words if row["PEFT"] == found[0]}
    assert told["parameters"]["words"] == told["saved_by_0_17_1"]["words"]
    assert told["parameters"]["answers"] == "otherwise"


def test_the_installed_release_does_what_is_on_record(kept):
    """The same adapters on today's PEFT give the record's row of it, word by word."""
    rows = rows_of(tables_of(kept.records)["peft.words"])
    today = run_cases(sys.executable)
    assert today.name == NEWEST
    again = [
        {
            "adapter": case["id"],
            "PEFT": today.name,
            "does": case["did"],
            **{key: case[key] for key in ("answers", "mismatches", "words")},
        }
        for case in today.cases.values()
    ]
    assert again == [row for row in rows if row["PEFT"] == NEWEST]


@pytest.mark.parametrize(
    ("version", "saved"), [("0.17.1", SAVED_BY_0_17_1), ("0.21.2", SAVED_BY_0_21_2)]
)
def test_a_saved_config_has_the_keys_of_its_release(version, saved):
    """The config of a release holds what that release writes, by the table of its sources."""
    [written] = [release.written for release in releases() if release.version == version]
    assert {*PLAIN, *saved} == written


def release(name, **changes):
    """A release that raises on each misfit and loads anything else in silence."""
    case = {"name": "an adapter", "did": "silent", "words": "", "answers": "as meant"}
    raised = {"did": "raises", "words": "RuntimeError: size mismatch", "answers": ""}
    found = {c.id: {**case, "mismatches": 0} for c in CASES}
    found |= {id_: {**found[id_], **raised} for id_ in MISFITS}
    found |= {id_: {**found[id_], **change} for id_, change in changes.items()}
    return Release({"peft": name, "transformers": "5"}, found)


@pytest.mark.parametrize(
    ("change", "raises", "same"),
    [
        ({}, "holds", "holds"),
        ({"narrower": {"did": "silent"}}, "refuted", "holds"),
        ({"wider": {"words": "RuntimeError: another"}}, "holds", "refuted"),
    ],
)
def test_one_release_that_does_otherwise_decides(change, raises, same):
    """A single release that loads a misfit refutes the statement; so does one in other words."""
    found = verdicts_of(records_of([release("1.0", **change), release("2.0")]))
    assert found == {"peft.misfit_raises": raises, "peft.same_words": same}


def test_releases_that_do_the_same_share_a_column():
    """A column of the page's table names each release that did the same with every adapter."""
    told = [release("1.0"), release("2.0"), release("3.0", sound={"did": "warns"})]
    table = tables_of(records_of(told))["peft.cases"]
    assert table.columns == ("adapter", "1.0, 2.0", "3.0", "answers")


def test_how_it_answers_is_said_from_when():
    """One word where all releases agree, else from which release on; none where none loads it."""
    told = [
        release("1.0", sound={"answers": "as the base"}),
        release("2.0", sound={"answers": "as the base"}),
        release("3.0"),
    ]
    assert say_answers(told, "sound") == "as the base, from 3.0 as meant"
    assert say_answers(told[:2], "sound") == "as the base"
    assert say_answers(told, "wider") == "–"


def test_cases_that_end_early_leave_no_record(tmp_path):
    """An environment in which the script fails is told by the last line of its error."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named peft' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RecordError, match=r"every case.*No module named peft"):
        run_cases(python)
