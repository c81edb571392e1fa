"""What the notebook of the files records: the adapters' own words, and the incident's facts."""

import json
from dataclasses import replace
from datetime import date
from itertools import accumulate

import pytest
from chapters import parameters_of, recorded, run_chapter
from safetensors.torch import load_file

from postmortem.checker.adapter import WEIGHTS_FILE
from postmortem.checker.config import CONFIG_FILE
from postmortem.checker.errors import ModelError, catalogue
from postmortem.checker.serving import rules, runtimes
from postmortem.experiments import files
from postmortem.experiments.records import NO_MODEL, Measure, Table, Text, Verdict, read_records
from postmortem.experiments.session import open_session
from postmortem.models.mismatch import write_adapter
from postmortem.models.model_set import write_world
from tools import faults
from tools.faults import Reproduction, record_reproductions

RECORDERS = (
    "record_log",
    "record_rows",
    "record_score",
    "record_timing",
    "record_answer",
    "record_messages",
    "record_sizes",
    "record_dates",
)


@pytest.fixture
def session(untrained_world, tmp_path):
    """A session of the notebook of the files on the untrained world."""
    write_world(untrained_world, tmp_path / "world.json")
    return open_session(parameters_of("files", tmp_path, rows=2))


def change(model, **changes):
    """A case, or a part of one, with the values at dotted keys (`__` for the dot) replaced."""
    for key, value in changes.items():
        first, _, rest = key.partition("__")
        new = change(getattr(model, first), **{rest: value}) if rest else value
        model = model.model_copy(update={first: new})
    return model


def record(session, name, **changes):
    """What one recorder leaves, by kind and key, after these changes of the case."""
    fresh = replace(session, case=change(session.case, **changes), records=[])
    getattr(files, name)(fresh)
    return {
        kind: {r.key.removeprefix("forensics."): r for r in fresh.records if isinstance(r, kind)}
        for kind in (Measure, Verdict, Table)
    }


OPEN_CLOCK = {"timing.follows_prompt": "holds", "timing.tells_steps": "cannot tell"}
OPEN_YEAR = {"date_agrees": "refuted", "software_existed": "cannot tell"}
STATED = "systems__suspect__declared_megabytes"


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        # Equal values are all tied; one that tells a violation from another post is a rank.
        ("record_score", {}, {"values_rank": "refuted"}),
        (
            "record_score",
            {"forensics__submitted__values": [0.0] * 9 + [0.9]},
            {"values_rank": "holds"},
        ),
        ("record_score", {"forensics__labels__values": [0] * 10}, {"values_rank": "cannot tell"}),
        # The longest prompt leaves six tokens, and a limit below it cuts.
        ("record_rows", {}, {"prompts_uncut": "holds"}),
        (
            "record_rows",
            {"forensics__prompt_tokens__values": [513] * 10},
            {"prompts_uncut": "refuted"},
        ),
        # Time rises with the prompt, and what is left allows more steps than the limit.
        ("record_timing", {}, OPEN_CLOCK),
        ("record_timing", {"systems__base__name": "someone/unknown"}, OPEN_CLOCK),
        # Rows that differ in nothing have no line.
        (
            "record_timing",
            {"forensics__log__ticks": [float(n) for n in range(100, 111)]},
            {"timing.follows_prompt": "cannot tell", "timing.tells_steps": "cannot tell"},
        ),
        # The text is three tokens and four steps; a claim of three would fit.
        ("record_answer", {}, {"answer_fits_claim": "refuted"}),
        ("record_answer", {"forensics__answer__claimed_tokens": 3}, {"answer_fits_claim": "holds"}),
        # The clock and the release of the software both speak against the claimed day.
        ("record_dates", {}, {"date_agrees": "refuted", "software_existed": "refuted"}),
        (
            "record_dates",
            {"forensics__claimed_date__day": date(2025, 10, 22)},
            {"date_agrees": "holds", "software_existed": "holds"},
        ),
        # Without a warning that dates the loader, or without its release, the year stays open.
        ("record_dates", {"loading_warning": None}, OPEN_YEAR),
        ("record_dates", {"forensics__claimed_date__peft_releases": {}}, OPEN_YEAR),
        # A tenth of the computed size is let pass, no more.
        ("record_sizes", {STATED: 8.7}, {"size.suspect.here": "holds"}),
        ("record_sizes", {STATED: 9.5}, {"size.suspect.here": "holds"}),
        ("record_sizes", {STATED: 9.7}, {"size.suspect.here": "refuted"}),
        ("record_sizes", {STATED: None}, {"size.suspect.here": "cannot tell"}),
    ],
)
def test_what_the_facts_decide(session, name, changes, expected):
    """Each statement holds, is refuted or stays open by the facts of the case alone."""
    verdicts = {
        key: found.verdict for key, found in record(session, name, **changes)[Verdict].items()
    }
    assert {key: verdicts[key] for key in expected} == expected


def test_equal_values_score_one_half_by_ties(session):
    """All pairs of the incident's values are tied: an AUC of 0.5, and five of ten right."""
    found = record(session, "record_score")[Measure]
    assert (found["auc"].value, found["auc"].low, found["tied_pairs"].value) == (0.5, None, 1.0)
    accuracy = found["accuracy"]
    assert (accuracy.value, accuracy.n) == (0.5, 10)
    assert accuracy.low == pytest.approx(0.187, abs=1e-3)
    assert accuracy.high == pytest.approx(0.813, abs=1e-3)


def test_labels_of_one_class_have_no_score(session):
    """Without both classes there is neither an AUC nor a smallest one, and the reason is given."""
    found = record(session, "record_score", forensics__labels__values=[0] * 10)[Measure]
    for key in ("auc", "tied_pairs", "least_auc", "power", "perfect_auc", "perfect_auc_p"):
        assert found[key].value is None
        assert found[key].reason
    assert found["accuracy"].value == 1.0


def test_each_row_has_its_room(session):
    """Beside each row's prompt stands how many tokens the limit leaves."""
    found = record(session, "record_rows")
    assert found[Measure]["headroom_least"].value == 6
    rows = found[Table]["row_table"].rows
    assert rows[0] == ("2029", 0, 0.0, 371, 141, 0.945)
    assert [row[4] for row in rows] == [512 - row[3] for row in rows]


def test_the_incidents_clock_bounds_no_answer(session):
    """Time rises with the prompt, and the fastest step reads every weight once: 4.2 ms."""
    found = record(session, "record_timing")[Measure]
    assert found["timing.correlation"].value > 0.98
    assert found["timing.p_value"].value < 0.001
    assert found["timing.most_steps"].value > 10
    weights = 28 * (2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960) + 1536 * 151936
    assert found["timing.fastest_step"].value == pytest.approx(1000 * 2 * weights / 732e9)


def test_a_clock_that_leaves_no_room_bounds_the_answer(session):
    """Where reading leaves the time of fewer steps than the limit, the answer was shorter."""
    tokens = session.case.forensics.prompt_tokens.values
    took = [0.012 + 0.0005 * n + 0.0005 * (-1) ** i for i, n in enumerate(tokens)]
    ticks = list(accumulate(took, initial=100.0))
    found = record(session, "record_timing", forensics__log__ticks=ticks)
    assert found[Measure]["timing.most_steps"].value in (2, 3)
    assert found[Verdict]["timing.tells_steps"].verdict == "holds"


def test_a_single_row_has_no_later_ones(session):
    """One row is recorded as the first, and everything after it as not known."""
    facts = session.case.forensics
    one = {
        f"forensics__{name}__values": getattr(facts, name).values[:1]
        for name in ("row_ids", "labels", "submitted", "prompt_tokens")
    }
    found = record(session, "record_timing", forensics__log__ticks=facts.log.ticks[:2], **one)
    assert found[Measure]["timing.first_row"].value == pytest.approx(0.945)
    assert found[Measure]["timing.later_row"].value is None


def test_the_log_excludes_what_would_have_spoken(session):
    """A fault with a message that is absent is refuted, one that is silent stays open."""
    verdicts = {key: v.verdict for key, v in record(session, "record_messages")[Verdict].items()}
    assert verdicts.pop("temperature_in_use") == "refuted"
    loud = ("other-shapes", "other-rank", "key-prefix", "missing-tensors")
    assert {f"fault.{id_}": "refuted" for id_ in loud}.items() <= verdicts.items()
    assert verdicts["fault.newer-config"] == "holds"
    silent = ("same-shapes", "no-effect", "wrong-scale", "surplus-tensors", "not-finite")
    assert {f"fault.{id_}": "cannot tell" for id_ in silent}.items() <= verdicts.items()


def test_a_message_in_the_log_is_the_fault(session):
    """Were the mismatch in the log, it would hold."""
    messages = dict(session.case.forensics.log.messages)
    messages["size-mismatch"] = change(messages["size-mismatch"], times=2)
    found = record(session, "record_messages", forensics__log__messages=messages)
    assert found[Verdict]["fault.other-shapes"].verdict == "holds"
    assert found[Verdict]["fault.key-prefix"].verdict == "refuted"


@pytest.mark.parametrize(
    ("sampled", "times", "verdict"),
    [
        (False, 10, "refuted"),
        (True, 0, "holds"),
        (False, 0, "cannot tell"),
        (True, 10, "cannot tell"),
        (False, 3, "cannot tell"),
    ],
)
def test_the_temperature_was_in_use_only_where_both_sources_agree(session, sampled, times, verdict):
    """The setting and the warnings must say the same for every row."""
    facts, attempts = session.case.forensics, dict(session.case.attempts)
    attempts["v2"] = change(attempts["v2"], decoding__do_sample=sampled)
    messages = dict(facts.log.messages)
    messages["ignored-flags"] = change(messages["ignored-flags"], times=times)
    changes = {"forensics__log__messages": messages, "attempts": attempts}
    found = record(session, "record_messages", **changes)
    assert found[Verdict]["temperature_in_use"].verdict == verdict


def test_no_usual_adapter_of_the_base_has_a_size_on_record(session):
    """Both recalled sizes are those of a 4B's adapters and of none of the base's own."""
    found = record(session, "record_sizes")
    verdicts = {key: verdict.verdict for key, verdict in found[Verdict].items()}
    assert verdicts == {
        f"size.{role}.{where}": word
        for role in ("suspect", "reference")
        for where, word in (("here", "refuted"), ("elsewhere", "holds"))
    }
    sizes = {row[:3]: row[3:] for row in found[Table]["sizes"].rows}
    declared = sizes["Qwen/Qwen2.5-1.5B-Instruct", "q, v", 16]
    assert declared == (2_179_072, 4.4, 8.7, "")
    assert sizes["Qwen/Qwen3-4B", "q, k, v, o", 16] == (
        11_796_480,
        23.6,
        47.2,
        "suspect, reference",
    )
    whole = sizes["Qwen/Qwen2.5-1.5B-Instruct", "q, v, and all of embed_tokens", 8]
    assert whole[0] == 1_089_536 + 1536 * 151936
    assert len(sizes) == found[Measure]["size_forms"].value


def test_bases_of_unknown_shapes_have_no_forms(session):
    """A base that is not in the table is left out and, where none is known, nothing is decided."""
    found = record(
        session, "record_sizes", systems__base__name="a/b", forensics__contents__other_bases=["c/d"]
    )
    assert found[Measure]["size_forms"].value == 0
    assert {v.verdict for v in found[Verdict].values()} == {"cannot tell"}


def test_the_days_stand_in_their_order(session):
    """The claimed day, the clock's and that of the software's release stand in one table."""
    found = record(session, "record_dates")
    assert found[Measure]["days_apart"].value == 365
    days = [row[1] for row in found[Table]["dates"].rows]
    assert days == ["2024-10-22", "2025-10-22", "2025-07-03"]


def test_the_log_shows_times_of_day(session):
    """The one clock gives every line its time, to the second."""
    rows = record(session, "record_log")[Table]["log"].rows
    times = {row[0]: row[1] for row in rows}
    assert (times[100.5], times[136.6], times[141.7]) == ("09:27:24", "09:28:01", "09:28:06")
    assert {row[3] for row in rows} == {"log"}


@pytest.mark.parametrize("name", RECORDERS)
def test_a_case_without_facts_has_the_same_keys(session, name):
    """Every key is recorded as not available, so that a page that names it can still be built."""
    known, unknown = record(session, name), record(session, name, forensics=None)
    for kind in (Measure, Verdict, Table):
        keys = {key for key in known[kind] if not key.startswith("fault.")}
        assert unknown[kind].keys() == keys
    assert all(m.value is None and m.reason for m in unknown[Measure].values())
    assert {v.verdict for v in unknown[Verdict].values()} <= {"not available"}
    assert all(table.rows == () for table in unknown[Table].values())


def test_the_notebook_runs_without_facts(session, tmp_path, pytestconfig):
    """On a case that kept no facts the shipped notebook runs to its end and loads no model."""
    text = (pytestconfig.rootpath / "cases/qwen-lora.yml").read_text(encoding="utf-8")
    start, end = text.index("\nforensics:\n"), text.index("\ncolumns:\n")
    (tmp_path / "case.yml").write_text(text[:start] + text[end:], encoding="utf-8")
    given = parameters_of("files", tmp_path, rows=2, case=str(tmp_path / "case.yml"))
    run_chapter("files", **given).finish()
    found = read_records(given["records"])
    assert found.provenance.device == NO_MODEL
    told = [r for r in found.of(Measure) if r.key.startswith("forensics.")]
    assert told
    assert {measure.value for measure in told} == {None}


def test_the_declared_config_implies_2179072_parameters(session, tmp_path):
    """Rank 16 on q_proj and v_proj of the 1.5B, and rank 8 on four modules, are 2,179,072 each."""
    files.record_declared(session, tmp_path / "declared")
    measures, verdicts = recorded(session, Measure), recorded(session, Verdict)
    for role in ("suspect", "reference"):
        assert measures[f"inventory.{role}.parameters"].value == 2_179_072
        assert verdicts[f"inventory.{role}.size_agrees"].verdict == "refuted"
        assert verdicts[f"inventory.{role}.loads_as_transcribed"].verdict == "refuted"


def test_the_warning_dates_saver_and_loader(session):
    """The log's one warning is printed by PEFT 0.16.0 for a config of 0.17, and by no other."""
    files.record_dating(session)
    texts = recorded(session, Text)
    assert texts["inventory.loader"].text == "0.16.0"
    assert texts["inventory.writers"].text == "0.17.0–0.17.1"
    verdict = recorded(session, Verdict)["inventory.transcription_was_loaded"]
    assert verdict.verdict == "refuted"


def test_a_4b_adapter_is_broken_on_the_base_and_its_own_fits(session, tmp_path):
    """Of adapters of true size those of a 4B are broken on the 1.5B, and its own fits."""
    files.record_true_size(session, tmp_path / "sizes")
    rows = recorded(session, Table)["inventory.true_size"].rows
    assert [row[1] for row in rows] == ["broken", "broken", "fits"]
    fits = [row[0] for row in recorded(session, Table)["inventory.fits"].rows]
    assert len(fits) > 1
    assert "Qwen/Qwen2.5-1.5B" in fits
    assert "Qwen/Qwen2.5-Coder-1.5B" in fits


def test_the_worlds_adapters_get_their_own_findings(session):
    """In the world the no-op is untrained, the donor's adapter does not fit, the others do."""
    files.record_world(session)
    found = {row[0]: row[2] for row in recorded(session, Table)["inventory.world"].rows}
    assert found["no-op adapter"] == "untrained"
    assert "shape-mismatch" in found["donor adapter"]
    assert found["suspect"] == found["reference"] == "none"


def test_written_headers_are_those_of_an_adapter(case, tmp_path):
    """An adapter of headers alone has the names, shapes and settings of one with weights."""
    size = case.true_size
    written = files.write_headers(size.base, tmp_path / "headers", size)
    whole = write_adapter(
        size.base, tmp_path / "whole", rank=size.rank, target_modules=tuple(size.target_modules)
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
        files.write_headers("owner/unknown", tmp_path / "headers", case.true_size)


def test_the_catalogue_is_on_record(session):
    """Each entry of the catalogue stands in the table, counted."""
    files.record_entries(session)
    table = recorded(session, Table)["catalogue.entries"]
    assert [row[0] for row in table.rows] == list(catalogue())
    assert recorded(session, Measure)["catalogue.entries"].value == len(catalogue())


def test_each_rule_of_a_runtime_is_on_record(session):
    """The rules stand under their runtime, all of them; side by side what several do."""
    files.record_runtimes(session)
    tables, measures = recorded(session, Table), recorded(session, Measure)
    listed = [(name, *row[:4]) for name in runtimes() for row in tables[f"check.{name}"].rows]
    doubt = {"run": ", run", "yes": "", "no": ", inferred"}
    expected = {
        (r.runtime, r.trait, r.versions, f"{r.effect}{doubt[r.verified]}", r.happens)
        for r in rules()
    }
    assert (set(listed), len(listed)) == (expected, measures["check.rules"].value)
    matrix = tables["check.matrix"]
    assert matrix.columns[1:] == runtimes()
    assert all(len([mark for mark in row[1:] if mark[0] in "RSW"]) > 1 for row in matrix.rows)


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
    assert files._size_agrees(implied, stated)[0] is agrees
