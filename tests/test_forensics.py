from dataclasses import replace
from datetime import date
from itertools import accumulate, combinations

import numpy as np
import pytest
from chapters import parameters_of, run_chapter
from hypothesis import given
from hypothesis import strategies as st

from postmortem.experiments import files as forensics
from postmortem.experiments.metrics import (
    auc,
    chances_of_order,
    fit_line,
    least_auc,
    perfect_auc_estimate,
    power_of_rows,
)
from postmortem.experiments.records import NO_MODEL, Measure, Table, Verdict, read_records
from postmortem.experiments.session import open_session
from postmortem.models.world import write_world

RECORDERS = (
    *("record_log", "record_rows", "record_score", "record_timing", "record_answer"),
    *("record_messages", "record_sizes", "record_dates"),
)


@pytest.fixture
def session(untrained_world, tmp_path):
    """A session of the forensic notebook on the untrained world."""
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
    getattr(forensics, name)(fresh)
    return {
        kind: {r.key.removeprefix("forensics."): r for r in fresh.records if isinstance(r, kind)}
        for kind in (Measure, Verdict, Table)
    }


def test_equal_values_score_one_half_by_ties(session):
    """All pairs of the incident's values are tied: an AUC of 0.5, and five of ten right."""
    found = record(session, "record_score")
    assert found[Measure]["auc"].value == 0.5
    assert found[Measure]["auc"].low is None
    assert found[Measure]["tied_pairs"].value == 1.0
    accuracy = found[Measure]["accuracy"]
    assert (accuracy.value, accuracy.n) == (0.5, 10)
    assert accuracy.low == pytest.approx(0.187, abs=1e-3)
    assert accuracy.high == pytest.approx(0.813, abs=1e-3)
    assert found[Verdict]["values_rank"].verdict == "refuted"


def test_values_that_differ_between_the_classes_rank(session):
    """One value that tells a violation from another post is enough for a rank."""
    values = [0.0] * 9 + [0.9]
    found = record(session, "record_score", forensics__submitted__values=values)
    assert found[Measure]["auc"].value == pytest.approx(0.6)
    assert found[Verdict]["values_rank"].verdict == "holds"


def test_labels_of_one_class_have_no_score(session):
    """Without both classes there is neither an AUC nor a smallest one, and the reason is given."""
    found = record(session, "record_score", forensics__labels__values=[0] * 10)
    for key in ("auc", "tied_pairs", "least_auc", "power", "perfect_auc", "perfect_auc_p"):
        assert found[Measure][key].value is None
        assert found[Measure][key].reason
    assert found[Measure]["accuracy"].value == 1.0
    assert found[Verdict]["values_rank"].verdict == "cannot tell"


@given(st.integers(1, 5), st.integers(1, 5))
def test_chances_of_order_are_counts_of_arrangements(positives, negatives):
    """The exact chances are those of going through every arrangement of the rows."""
    places = range(positives + negatives)
    counts = np.zeros(positives * negatives + 1)
    arrangements = list(combinations(places, positives))
    for ups in arrangements:
        labels = [place in ups for place in places]
        counts[round(auc(labels, list(places)) * positives * negatives)] += 1
    np.testing.assert_allclose(
        chances_of_order(positives, negatives), counts / len(arrangements), atol=1e-12
    )


def test_five_and_five_rows_need_an_auc_of_092():
    """With five rows of either class 0.92 is the smallest AUC that a two-sided test passes."""
    assert least_auc(5, 5) == pytest.approx((0.92, 8 / 252))
    assert 2 * chances_of_order(5, 5)[22:].sum() > 0.05


def test_too_few_rows_pass_no_test():
    """Three and three rows have twenty arrangements: a perfect one is as likely as one in ten."""
    assert least_auc(3, 3) == (None, None)
    assert least_auc(0, 4) == (None, None)


def test_a_perfect_score_is_bounded_by_its_pairs():
    """The bound is the AUC at which so many pairs are all in order once in forty times."""
    found = perfect_auc_estimate(5, 8)
    assert (found.value, found.high, found.n) == (1.0, 1.0, 5)
    assert found.low**5 == pytest.approx(0.025)


def test_power_grows_with_the_rows_and_is_the_level_without_skill():
    """More rows of a good model pass more often, and rows without skill as rarely as the test."""
    few, many = (power_of_rows(0.9, n, n, least=least_auc(n, n)[0]) for n in (5, 20))
    assert few.high < many.low
    chance = power_of_rows(0.5, 5, 5, least=0.92)
    assert chance.low <= 4 / 252 <= chance.high


def test_no_prompt_of_the_incident_was_cut(session):
    """The longest prompt leaves six tokens, and a limit below it cuts."""
    found = record(session, "record_rows")
    assert found[Measure]["headroom_least"].value == 6
    assert found[Verdict]["prompts_uncut"].verdict == "holds"
    rows = found[Table]["row_table"].rows
    assert rows[0] == ("2029", 0, 0.0, 371, 141, 0.945)
    assert [row[4] for row in rows] == [512 - row[3] for row in rows]
    tokens = [513] * 10
    found = record(session, "record_rows", forensics__prompt_tokens__values=tokens)
    assert found[Verdict]["prompts_uncut"].verdict == "refuted"
    assert found[Verdict]["prompts_uncut"].because.startswith("10 of 10")


def test_the_incidents_clock_follows_the_prompts_and_bounds_no_answer(session):
    """Time rises with the prompt, and what is left allows more steps than the limit."""
    found = record(session, "record_timing")
    assert found[Measure]["timing.correlation"].value > 0.98
    assert found[Measure]["timing.p_value"].value < 0.001
    assert found[Measure]["timing.most_steps"].value > 10
    assert found[Verdict]["timing.follows_prompt"].verdict == "holds"
    assert found[Verdict]["timing.tells_steps"].verdict == "cannot tell"


def ticks_of(case, *, fixed, jitter=0.0):
    """Ticks of rows that take a fixed time and half a millisecond a token."""
    tokens = case.forensics.prompt_tokens.values
    took = [fixed + 0.0005 * n + jitter * (-1) ** i for i, n in enumerate(tokens)]
    return list(accumulate(took, initial=100.0))


def test_a_clock_that_leaves_no_room_bounds_the_answer(session):
    """Where reading leaves the time of fewer steps than the limit, the answer was shorter."""
    ticks = ticks_of(session.case, fixed=0.012, jitter=0.0005)
    found = record(session, "record_timing", forensics__log__ticks=ticks)
    assert found[Measure]["timing.most_steps"].value in (2, 3)
    assert found[Verdict]["timing.tells_steps"].verdict == "holds"


def test_equal_times_tell_nothing_of_the_prompt(session):
    """Rows that differ in nothing have no line, and the reason is given."""
    ticks = [float(n) for n in range(100, 111)]
    found = record(session, "record_timing", forensics__log__ticks=ticks)
    assert found[Measure]["timing.correlation"].value is None
    assert found[Measure]["timing.later_row"].value == 1.0
    assert {v.verdict for v in found[Verdict].values()} == {"cannot tell"}


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


def test_a_base_of_unknown_shapes_has_no_fastest_step(session):
    """Without the base's shapes no step can be bounded."""
    found = record(session, "record_timing", systems__base__name="someone/unknown")
    assert found[Measure]["timing.fastest_step"].value is None
    assert found[Verdict]["timing.tells_steps"].verdict == "cannot tell"
    assert found[Verdict]["timing.follows_prompt"].verdict == "holds"


def test_the_fastest_step_reads_every_weight_once(session):
    """Two bytes for each of 1,543,569,408 weights at 732 GB/s take 4.2 ms."""
    found = record(session, "record_timing")
    weights = 28 * (2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960) + 1536 * 151936
    expected = 1000 * 2 * weights / 732e9
    assert found[Measure]["timing.fastest_step"].value == pytest.approx(expected)


@given(
    slope=st.floats(-10, 10).filter(lambda value: abs(value) > 0.01),
    start=st.floats(-10, 10),
    n=st.integers(4, 7),
)
def test_a_line_is_found_again(slope, start, n):
    """Points on a line give its slope and start; only one order and its mirror fit so well."""
    x = np.arange(n, dtype=float)
    line = fit_line(x, start + slope * x)
    assert line.slope.value == pytest.approx(slope)
    assert line.intercept.value == pytest.approx(start, abs=1e-6)
    assert line.p_value == pytest.approx(2 / np.prod(range(1, n + 1)))


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2, 3], [1, 2, 4]), ([1] * 5, [1, 2, 3, 4, 5]), ([1, 2, 3, 4], [2] * 4)]
)
def test_no_line_through_too_few_points_or_none_that_vary(x, y):
    """Three points, or points that differ in one direction alone, have no line to speak of."""
    assert fit_line(x, y) is None


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


def test_two_tokens_do_not_hold_the_answer(session):
    """The text is three tokens and four steps; a claim of three would fit."""
    found = record(session, "record_answer")
    assert found[Measure]["answer_steps"].value == 4
    assert found[Verdict]["answer_fits_claim"].verdict == "refuted"
    found = record(session, "record_answer", forensics__answer__claimed_tokens=3)
    assert found[Verdict]["answer_fits_claim"].verdict == "holds"


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


@pytest.mark.parametrize(
    ("stated", "here"),
    [(8.7, "holds"), (9.5, "holds"), (9.7, "refuted"), (None, "cannot tell")],
)
def test_a_size_is_near_within_the_checkers_tolerance(session, stated, here):
    """A tenth of the computed size is let pass, no more, and nothing is said without a size."""
    found = record(session, "record_sizes", systems__suspect__declared_megabytes=stated)
    assert found[Verdict]["size.suspect.here"].verdict == here


def test_bases_of_unknown_shapes_have_no_forms(session):
    """A base that is not in the table is left out and, where none is known, nothing is decided."""
    found = record(
        session, "record_sizes", systems__base__name="a/b", forensics__contents__other_bases=["c/d"]
    )
    assert found[Measure]["size_forms"].value == 0
    assert {v.verdict for v in found[Verdict].values()} == {"cannot tell"}


def test_the_year_is_refuted_twice(session):
    """The clock and the release of the software both speak against the claimed day."""
    found = record(session, "record_dates")
    assert found[Measure]["days_apart"].value == 365
    assert found[Verdict]["date_agrees"].verdict == "refuted"
    assert found[Verdict]["software_existed"].verdict == "refuted"
    days = [row[1] for row in found[Table]["dates"].rows]
    assert days == ["2024-10-22", "2025-10-22", "2025-07-03"]


def test_the_right_year_would_hold(session):
    """A claim of the log's day agrees with the clock and comes after the release."""
    found = record(session, "record_dates", forensics__claimed_date__day=date(2025, 10, 22))
    assert {v.verdict for v in found[Verdict].values()} == {"holds"}


@pytest.mark.parametrize(
    "changes", [{"loading_warning": None}, {"forensics__claimed_date__peft_releases": {}}]
)
def test_software_of_unknown_age_says_nothing(session, changes):
    """Without a warning that dates the loader, or without its release, the year stays open."""
    found = record(session, "record_dates", **changes)
    assert found[Verdict]["software_existed"].verdict == "cannot tell"
    assert found[Verdict]["date_agrees"].verdict == "refuted"


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
        assert len(keys) == len(set(keys))
    assert all(m.value is None and m.reason for m in unknown[Measure].values())
    assert {v.verdict for v in unknown[Verdict].values()} <= {"not available"}
    assert all(table.rows == () for table in unknown[Table].values())


@pytest.mark.parametrize("survives", [True, False])
def test_the_notebook_runs_with_and_without_facts(session, tmp_path, pytestconfig, survives):
    """The shipped notebook runs on either case, loads no model and records the same again."""
    text = (pytestconfig.rootpath / "cases/qwen-lora.yml").read_text(encoding="utf-8")
    if not survives:
        start, end = text.index("\nforensics:\n"), text.index("\ncolumns:\n")
        text = text[:start] + text[end:]
    (tmp_path / "case.yml").write_text(text, encoding="utf-8")
    records = tmp_path / "again.jsonl"
    run_chapter(
        "files",
        case=str(tmp_path / "case.yml"),
        profile="embedded",
        world=str(tmp_path / "world.json"),
        records=str(records),
        rows=2,
    ).finish()
    found = read_records(records)
    assert found.provenance.device == NO_MODEL
    changes = {} if survives else {"forensics": None}
    expected = [record(session, name, **changes) for name in RECORDERS]
    measures = [r for r in found.of(Measure) if r.key.startswith("forensics.")]
    values = {r.key.removeprefix("forensics."): r for r in measures}
    assert values == {key: value for e in expected for key, value in e[Measure].items()}
