import numpy as np
import pytest
from answers import answers_of
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.schema import AdapterFilter
from postmortem.experiments.ask import no_answers
from postmortem.experiments.attempts import (
    SHRINK,
    apply_filter,
    decide_cases,
    decide_filter,
    decide_outcomes,
    hold_against_filter,
    list_outcomes,
    record_attempt,
)
from postmortem.experiments.records import Measure, Table, Text, Verdict

LIMITS = AdapterFilter(std_above=0.05, maximum_above=0.5, grade="artefact", source="write-up")
# Enough rows that an order can be told from luck.
LABELS = [0] * 15 + [1] * 15
RANKED = [0.1, 0.1, 0.2, 0.2, 0.3] * 3 + [0.7, 0.8, 0.8, 0.9, 0.9] * 3
FLAT = [0.0] * 30
ODDS = [n - 20.0 for n in range(30)]


def test_the_filter_sees_scale_and_the_metric_does_not():
    """The same ranking passes, and is blocked once it is divided; its AUC stays."""
    systems = {
        s.name: s for s in apply_filter({"reference": answers_of(RANKED, ODDS, LABELS)}, LIMITS)
    }
    whole, shrunk = systems["reference"], systems[f"reference divided by {SHRINK}"]
    assert (whole.passes, shrunk.passes) == (True, False)
    assert whole.written == shrunk.written
    assert (whole.row[-1], shrunk.row[-1]) == ("written and log-odds", "written")


@given(st.lists(st.floats(0, 1), min_size=30, max_size=30))
def test_passing_is_both_limits_and_nothing_else(values):
    """A system passes exactly when spread and maximum exceed their limits, without any labels."""
    found = apply_filter({"base": answers_of(values, ODDS, None)}, LIMITS)[0]
    assert found.passes == (np.std(values) > 0.05 and max(values) > 0.5)


def test_a_filter_that_loses_a_ranking_is_refuted():
    """A blocked system whose values or log-odds rank is named with the reason."""
    systems = apply_filter(
        {"base": answers_of(FLAT, ODDS, LABELS), "reference": answers_of(RANKED, ODDS, LABELS)},
        LIMITS,
    )
    follows, because = decide_filter(systems)
    assert follows is False
    assert f"blocked although the values rank: reference divided by {SHRINK}" in because
    assert "blocked although the log-odds rank: base" in because


def test_without_labels_the_filter_is_not_judged():
    """Where nothing can be said to rank, the filter is neither right nor wrong."""
    assert decide_filter(apply_filter({"base": answers_of(RANKED, ODDS, None)}, LIMITS))[0] is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (RANKED, ["holds", "holds", "holds", "refuted", "refuted"]),
        (FLAT, ["refuted", "refuted", "refuted", "refuted", "holds"]),
        ([0.0, 1.0] * 15, ["holds", "refuted", "cannot tell", "holds", "refuted"]),
    ],
)
def test_expected_outcomes_are_measured(case, values, words):
    """Each outcome that the plan names is decided by what the reference wrote."""
    outcomes = decide_outcomes(answers_of(values, ODDS, LABELS), case.attempts["v2"])
    assert [row[1] for row in outcomes] == words


NONE = no_answers("reference", "v2", "number", reason="no reference here")


def test_a_missing_reference_leaves_the_outcomes_open(case):
    """Without a reference each outcome is not available, and the filter still runs on the rest."""
    answers = {"base": answers_of(FLAT, ODDS, LABELS), "reference": NONE}
    assert {row[1] for row in list_outcomes(NONE, case.attempts["v2"])} == {"not available"}
    rows, _ = hold_against_filter(answers, LIMITS)
    assert rows[0][0] == "base"
    assert hold_against_filter(answers, None) == (
        [],
        ("not available", "the case names no filter"),
    )


def test_without_labels_case_a_is_left_open(case):
    """A reference whose values vary is not said to work where no labels can tell."""
    varied, zeros = (
        answers_of([0.1, 0.9, 0.5], [0.0] * 3, None),
        answers_of([0.0] * 3, [0.0] * 3, None),
    )
    found = decide_cases(varied, zeros, attempt=case.attempts["v2"])
    assert {name: decided for name, (decided, _) in found.items()} == {
        "case_a": None,
        "case_b": False,
        "case_a_means_mismatch": None,
    }


def test_an_attempt_without_answers_has_every_key(session):
    """An adapter that does not load leaves each key of an attempt, with PEFT's reason."""
    session.rows = session.rows.head(3)
    kinds = (Measure, Verdict, Text, Table)
    keys = []
    for answers in (answers_of([0.0] * 3, [0.0] * 3, [0, 1, 1]), NONE):
        session.records.clear()
        record_attempt(session, "v2", answers)
        keys.append({(r.kind, r.key) for r in session.records if isinstance(r, kinds)})
    assert keys[0] == keys[1]
    verdicts = {r.verdict for r in session.records if isinstance(r, Verdict)}
    assert verdicts <= {"not available", "cannot tell"}
