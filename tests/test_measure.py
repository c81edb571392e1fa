import numpy as np
import pytest
from answers import answers_of

from postmortem.experiments.ask import no_answers
from postmortem.experiments.measure import (
    EFFECT,
    GAINS,
    Measured,
    compare_exactly,
    decide_cost,
    decide_flips,
    decide_gain,
    decide_knowing,
    decide_move,
    decide_odds,
    describe_health,
    knows_and_does_not_say,
    measure,
    record_system,
    reproduces_symptom,
    shown,
)
from postmortem.experiments.metrics import Estimate, rate_estimate
from postmortem.experiments.records import Measure, Text, Verdict

NONE = no_answers("reference", "v2", "number", reason="this profile has none")
ZEROS = answers_of([0.0] * 8, [-9, -8, -7, -6, -2, -1.5, -1.2, -1], [0, 0, 0, 0, 1, 1, 1, 1])


def test_a_system_without_answers_has_every_key_with_its_reason(session):
    """What gave no answers has each number and verdict that another has, with the reason."""
    record_system(session, "one", ZEROS, control=ZEROS)
    record_system(session, "none", NONE, control=ZEROS)
    kinds = (Measure, Verdict, Text)
    keys = {
        name: {
            (r.kind, r.key.removeprefix(name))
            for r in session.records
            if isinstance(r, kinds) and r.key.startswith(name)
        }
        for name in ("one", "none")
    }
    assert keys["one"] == keys["none"]
    none = [r for r in session.records if isinstance(r, Measure) and r.key.startswith("none")]
    assert {(r.value, r.reason) for r in none} == {(None, "this profile has none")}


def test_answers_that_are_not_finite_have_no_measures():
    """One log-odds of NaN, and nothing is measured; the reason counts the rows."""
    broken = answers_of([0.0] * 3, [1.0, None, 2.0], [0, 1, 1])
    reasons = {found.reason for found in measure(broken).values()}
    assert reasons == {"log-odds that are not finite on 1 of 3 rows"}


def test_a_control_without_answers_leaves_the_effect_open():
    """Without a control the change is not to be had, and the system's own numbers are."""
    measures = measure(ZEROS, NONE)
    assert {measures[n].reason for n in (*EFFECT, *GAINS)} == {"this profile has none"}
    assert measures["distinct"].value == 1
    assert decide_move(measures) == ("not available", "this profile has none")


def test_the_same_answers_are_no_change():
    """Against itself a system moves nothing, and is the same to the last bit."""
    measures = measure(ZEROS, ZEROS)
    assert [measures[name].estimate.value for name in EFFECT] == [0.0, 0.0, 0.0]
    assert decide_move(measures)[0] is False
    assert compare_exactly([(ZEROS, ZEROS)])[0] is True


def test_one_bit_is_not_the_same():
    """One log-probability that differs in its last bit is another answer."""
    other = answers_of([0.0] * 8, ZEROS.log_odds, [0, 0, 0, 0, 1, 1, 1, 1])
    other.first_log_probs[0, 0] = np.nextafter(other.first_log_probs[0, 0], 0)
    assert compare_exactly([(other, ZEROS)])[0] is False


def test_answers_that_cannot_be_read_are_ranked_by_those_that_can():
    """An unread answer has no value; the others are described, and nothing stands in for it."""
    found = answers_of([None, 0.0, 1.0], [0.0, -1.0, 1.0], [1, 0, 1])
    measures = measure(found)
    assert measures["auc_decoded"].estimate.value == 1.0
    assert measures["parsed_strict"].estimate.value == pytest.approx(2 / 3)
    assert describe_health(found).parsed_share == pytest.approx(2 / 3)
    unread = answers_of([None] * 3, [0.0, -1.0, 1.0], [1, 0, 1])
    assert describe_health(unread) is None
    assert measure(unread)["distinct"].reason == "no answer could be read"


def estimate(low, high):
    """An estimate in the middle of its interval."""
    return Estimate((low + high) / 2, low, high, 50)


@pytest.mark.parametrize(
    ("hidden", "said", "word"),
    [
        ((0.9, 1.0), (0.9, 1.0), "says what it knows"),
        ((0.4, 0.7), (0.55, 0.8), "says what it knows"),
        ((0.9, 1.0), (0.5, 0.5), "knows and does not say"),
        ((0.9, 1.0), (0.49, 0.52), "knows and does not say"),
        # An order too slight to be of use is not said to be one.
        ((0.9, 1.0), (0.51, 0.55), "knows and does not say"),
        ((0.51, 0.55), (0.5, 0.5), "does not know"),
        ((0.42, 0.58), (0.5, 0.5), "does not know"),
        ((0.42, 0.68), (0.5, 0.5), "cannot tell"),
        # An order in reverse is no lack of one.
        ((0.1, 0.3), (0.5, 0.5), "cannot tell"),
        ((0.9, 1.0), (0.3, 0.8), "cannot tell"),
        ((0.42, 0.58), (0.3, 0.8), "cannot tell"),
    ],
)
def test_what_a_base_does_with_what_it_knows(hidden, said, word):
    """Two intervals decide between three words, and leave it open where they are wide."""
    found, because = decide_knowing(ranked(estimate(*hidden), estimate(*said)))
    assert found == word
    assert "AUC of the log-odds" in because


def test_few_rows_show_nothing():
    """On fewer than eight rows a perfect order, a large change and a gain are left open."""
    perfect = Estimate(1.0, 1.0, 1.0, 7)
    word, because = decide_knowing(ranked(perfect, constant_of(7)))
    assert (word, because.endswith("on 7 rows")) == ("cannot tell", True)
    assert decide_odds(Estimate(2.0, 1.9, 2.1, 7))[0] is None
    assert decide_gain(Measured(Estimate(0.5, 0.5, 0.5, 7)))[0] is None
    assert decide_cost(Measured(perfect), Measured(Estimate(-0.5, -0.5, -0.5, 7)))[0] is None
    eight = Estimate(1.0, 1.0, 1.0, 8)
    assert decide_knowing(ranked(eight, constant_of(8)))[0] == "knows and does not say"


def ranked(hidden, said):
    """The measures that the rule of knowing looks at."""
    return {"auc": Measured(hidden), "auc_decoded": Measured(said)}


def constant_of(rows):
    """The AUC of one value on all rows."""
    return Estimate(0.5, 0.5, 0.5, rows)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [(None, "the rows came without labels"), ([1, 1, 1], "the labels hold one class alone")],
)
def test_without_two_classes_nobody_can_tell_what_is_known(labels, reason):
    """Where there is no AUC the reason says which lack it is."""
    measures = measure(answers_of([0.0] * 3, [1.0, 2.0, 3.0], labels))
    assert decide_knowing(measures) == ("cannot tell", reason)
    assert knows_and_does_not_say(measures) == (None, reason)


@pytest.mark.parametrize(
    ("changed", "rows", "decided"),
    [(0, 10, None), (0, 200, False), (1, 10, True), (1, 5000, True), (10, 10, True)],
)
def test_one_changed_value_shows_a_dependence(changed, rows, decided):
    """One changed value is proof; none is proof of the contrary on many rows only."""
    assert decide_flips(rate_estimate(changed, rows))[0] is decided


@pytest.mark.parametrize(
    ("change", "decided"), [((0.2, 0.4), True), ((0.0, 0.01), False), ((0.05, 0.3), None)]
)
def test_log_odds_move_by_more_than_the_limit_or_less(change, decided):
    """A change of log-odds is decided by an interval on one side of the limit."""
    assert decide_odds(estimate(*change))[0] is decided


@pytest.mark.parametrize(
    ("gain", "decided"),
    [((0.1, 0.3), True), ((-0.1, 0.1), None), ((-0.1, 0.0), False), ((-0.3, -0.1), False)],
)
def test_a_gain_is_above_zero_or_none(gain, decided):
    """A ranking is better where the interval of the difference is above zero."""
    assert decide_gain(Measured(estimate(*gain)))[0] is decided


@pytest.mark.parametrize(
    ("before", "change", "decided"),
    [
        ((0.9, 1.0), (-0.5, -0.4), True),
        ((0.9, 1.0), (-0.05, 0.02), False),
        ((0.9, 1.0), (-0.2, 0.0), None),
        # Where there is no order none can be lost.
        ((0.42, 0.58), (-0.02, 0.02), None),
        ((0.3, 0.8), (-0.5, -0.2), None),
    ],
)
def test_only_an_order_that_is_there_can_be_lost(before, change, decided):
    """An order is lost with what was altered where it was there and falls by a tenth or more."""
    found = decide_cost(Measured(estimate(*before)), Measured(estimate(*change)))
    assert found[0] is decided


def test_the_symptom_is_every_answer_a_number_and_all_the_reported_value(case):
    """Answers reproduce the symptom only when all are numbers and all are 0.0."""
    attempt = case.attempts["v2"]
    assert reproduces_symptom(answers_of([0.0] * 4, [0.0] * 4, None), attempt)[0]
    assert not reproduces_symptom(answers_of([0.0, 0.1, 0.0, 0.0], [0.0] * 4, None), attempt)[0]
    assert not reproduces_symptom(answers_of([0.5] * 4, [0.0] * 4, None), attempt)[0]


@pytest.mark.parametrize(
    ("values", "log_odds", "decided"),
    [
        ([0.0] * 8, [-9, -8, -7, -6, -2, -1.5, -1.2, -1], True),
        ([0.1, 0.2, 0.1, 0.2, 0.8, 0.9, 0.8, 0.9], [-9, -8, -7, -6, 2, 1.5, 1.2, 1], False),
        ([0.0] * 8, [1, 2, 3, 4, 1, 2, 3, 4], None),
    ],
)
def test_knowing_without_saying_needs_the_interval_above_chance(values, log_odds, decided):
    """Log-odds that rank while values do not: holds; values that rank: refuted; else open."""
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    measures = measure(answers_of(values, log_odds, labels))
    assert knows_and_does_not_say(measures)[0] is decided


def test_control_characters_are_shown_and_not_sent():
    """A text in a table is one short line in which escapes are visible."""
    line = shown("\x1b[31mred\n" + "x" * 100, limit=20)
    assert line.startswith("\\x1b[31mred\\n")
    assert len(line) == 20
    assert shown("") == "(nothing)"
