from dataclasses import replace
from types import SimpleNamespace

import pytest
from replays import replay

from postmortem.checker.errors import DiagnosisError, finding
from postmortem.diagnosis import timed as module
from postmortem.diagnosis.battery import OF_ADAPTER, TESTS, list_experiments
from postmortem.diagnosis.likelihoods import meanings, measure_profiles
from postmortem.diagnosis.subject import Outcome
from postmortem.diagnosis.timed import (
    LEARNT_ROWS,
    DoneTest,
    TimedDiagnosis,
    as_text,
    describe_judgements,
    next_step,
    parse_observed,
    reported_prior,
    say_certainty,
    say_outcome,
    sentences,
    stand,
    what_to_give,
)

SEEN = {
    "healthy": {
        "inspect": "nothing",
        "answers": "varies",
        "effect": "clear",
        "order": "better",
        "place": "here",
    },
    "labels-swapped": {
        "inspect": "nothing",
        "answers": "varies",
        "effect": "clear",
        "order": "in reverse",
        "place": "here",
    },
    "zero-b": {"inspect": "untrained", "answers": "one value", "effect": "none"},
    "scale-up": {
        "inspect": "nothing",
        "answers": "many texts",
        "effect": "clear",
        "order": "as the base",
        "place": "here",
        "mend": "smaller",
    },
    "sibling-base": {
        "inspect": "nothing",
        "answers": "many texts",
        "effect": "clear",
        "order": "worse",
        "place": "nowhere",
        "mend": "no adapter",
    },
}
REPLAYS = [
    replay(cause, "unable", seed=100 * world + seed, **found).model_copy(
        update={"features": {"works": cause == "healthy"}}
    )
    for cause, found in SEEN.items()
    for world in range(2)
    for seed in range(3)
]


class Stub(SimpleNamespace):
    """A subject whose tests come out as told, at a pace in seconds a row on a clock of its own."""

    def __init__(self, findings=(), *, labelled=True, pace=0.0):
        asked = SimpleNamespace(contract="choice")
        super().__init__(
            findings=findings,
            labelled=labelled,
            reference=None,
            has_markups=False,
            run=SimpleNamespace(adapter="adapter"),
            asked={},
            rows_of={},
            clock=0.0,
            pace=pace,
            settle=lambda: None,
            prompt="ask",
            session=SimpleNamespace(case=SimpleNamespace(prompt=lambda name: asked)),
            paces={"base": pace},
            rows=[None] * 64,
            count=0,
        )

    @property
    def in_use(self):
        """The rows that are asked now."""
        return self.rows[: self.count]

    def missing_rows(self, state, count):
        """How many rows a state was not asked yet."""
        return max(count - self.rows_of.get(state, 0), 0)

    def ask_all(self, states):
        """Ask states on the rows in use, which takes its time."""
        for state in states:
            self.clock += self.pace * self.missing_rows(state, self.count)
            self.rows_of[state] = self.count
            self.paces[state] = self.pace


@pytest.fixture
def examine(monkeypatch):
    """A function that examines a stub whose experiments come out as those of a cause."""

    def run(cause, *, minutes=10.0, told=None, **changes):
        seen = SEEN[cause]
        tests = tuple(name for name in OF_ADAPTER if name in seen)
        monkeypatch.setattr(module, "CONTROLS", [n for n in module.CONTROLS if n in seen])
        monkeypatch.setattr(module, "OF_ADAPTER", tests)
        lines, stub = [], Stub(**changes)

        def run_test(name, subject):
            subject.ask_all(TESTS[name].states)
            return Outcome(seen[name])

        monkeypatch.setattr(module, "run_test", run_test)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: stub.clock))
        diagnosis = TimedDiagnosis(
            stub, REPLAYS, minutes, told or {}, report=lines.append, started=0.0
        )
        return diagnosis, diagnosis.run(), lines

    return run


@pytest.mark.parametrize(
    ("cause", "word"),
    [("healthy", "works here"), ("zero-b", "named"), ("scale-up", "named")],
)
def test_what_replays_show_is_named(examine, cause, word):
    """A case that comes out as a cause's replays is given that cause, with what speaks for it."""
    _, found, lines = examine(cause)
    assert (found.word, found.causes[0][0]) == (word, cause)
    assert stand(found, cause) in ("cause named", "kind named")
    assert found.weights[0].log10 > 0
    assert len(lines) >= 3


def test_an_error_that_no_replay_shows_names_the_cause_by_itself(examine):
    """Nothing more is run, and the beliefs are left out of it."""
    odd = finding("head-dropped", evidence="score", expected="a", found="b")
    diagnosis, found, _ = examine("healthy", findings=(odd,))
    assert (found.word, found.finding, found.ranking) == ("named", odd, ())
    assert list(diagnosis.outcomes) == ["inspect"]


def test_a_warning_that_no_replay_shows_decides_nothing(examine):
    """It stands beside the verdict, and the checker counts as having found nothing."""
    odd = finding("base-name-mismatch", evidence="a", expected="a", found="b")
    diagnosis, found, _ = examine("healthy", findings=(odd,))
    assert found.warnings == (odd,)
    assert diagnosis.outcomes["inspect"] == "nothing"
    assert found.word == "works here"


def test_what_does_not_fit_into_the_time_is_not_begun(examine):
    """With rows that take minutes only the files are read, and the next experiment is named."""
    diagnosis, found, _ = examine("sibling-base", minutes=0.1, pace=60.0)
    assert list(diagnosis.outcomes) == ["inspect"]
    assert found.word == "cannot tell"
    assert "fit" in found.ahead[0].why
    assert found.ahead[0].minutes > 1


def test_without_labels_what_takes_them_is_asked_for(examine):
    """An experiment that takes labels is no dead end: the verdict says to give them."""
    diagnosis, found, _ = examine("labels-swapped", labelled=False)
    assert "order" not in diagnosis.outcomes
    assert any("labels" in step.why for step in found.ahead)


def test_what_was_told_is_not_run(examine):
    """A told outcome counts as evidence and costs nothing."""
    diagnosis, found, _ = examine(
        "sibling-base", told={"mend": "smaller", "place": "here", "order": "as the base"}
    )
    assert [step.told for step in diagnosis.steps if step.test == "mend"] == [True]
    assert found.causes[0][0] == "scale-up"


@pytest.mark.parametrize("pair", ["mend", "x-ray=seen", "mend=worse", ""])
def test_an_outcome_that_cannot_be_is_refused(pair):
    """What is told must be an experiment and one of its outcomes."""
    with pytest.raises(DiagnosisError):
        parse_observed([pair])
    assert parse_observed([" mend = larger "]) == {"mend": "larger"}


def test_worlds_are_judged_from_the_others():
    """Each replay is judged from the other worlds, and one world alone is not judged."""
    assert "wrong 0" in describe_judgements(REPLAYS)
    assert "none is left" in describe_judgements(REPLAYS[:1])


def test_an_error_of_the_checkers_decides_where_the_replays_do_not(examine):
    """An adapter that will not work as saved is never said to work, and the finding names it."""
    known = finding("untrained", evidence="lora_B", expected="a", found="b")
    _, found, _ = examine("healthy", findings=(known,))
    assert (found.word, found.finding) == ("named", known)
    assert found.ranking


def test_every_outcome_of_every_test_has_a_sentence():
    """What speaks for and against a cause is told in words; a finding by the catalogue's."""
    for name in OF_ADAPTER:
        for outcome in TESTS[name].outcomes:
            assert say_outcome(name, outcome)
    known = {(name, outcome) for name in OF_ADAPTER for outcome in TESTS[name].outcomes}
    assert set(sentences()) <= known


@pytest.mark.parametrize(("minutes", "least", "most"), [(10, 64, 64), (1.2, 20, 60), (0.4, 16, 16)])
def test_more_rows_are_asked_until_the_time_is_up(examine, minutes, least, most):
    """Each round asks twice as many rows, the last one as many as still fit, and none too many."""
    told = {"mend": "nothing", "place": "here", "order": "as the base"}
    diagnosis, _, _ = examine("sibling-base", told=told, pace=0.6, minutes=minutes)
    assert least <= diagnosis.subject.count <= most
    assert diagnosis.subject.clock <= 60 * minutes


def test_what_is_not_seen_on_few_rows_is_no_evidence():
    """An order that a few rows do not show may be there; what they do show counts."""
    diagnosis = TimedDiagnosis(Stub(), REPLAYS, 1.0)
    for name, outcome in {"order": "as the base", "form": "likelier"}.items():
        diagnosis.tests[name] = DoneTest(name, outcome, "", 0.0, rows=LEARNT_ROWS - 1)
    assert diagnosis.evidence == {"form": "likelier"}
    diagnosis.tests["order"] = DoneTest("order", "as the base", "", 0.0, rows=LEARNT_ROWS)
    assert "order" in diagnosis.evidence


def test_what_people_report_is_believed_sooner():
    """Before any test a cause weighs as often as it was reported, and none is ruled out."""
    table = measure_profiles(REPLAYS, list_experiments(OF_ADAPTER))
    weights = reported_prior(table).causes
    assert weights["zero-b"] == 1 + meanings()["zero-b"].reported > weights["sibling-base"] == 1
    for meaning in meanings().values():
        assert meaning.reported == len([t for t in meaning.threads.split("; ") if t])


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1.0, "as good as certain"),
        (0.91, "very likely"),
        (0.5, "likelier than not"),
        (0, "possible"),
    ],
)
def test_certainty_is_told_in_words(share, words):
    """The words rise with the probability, and there is no percentage."""
    assert say_certainty(share) == words


def test_an_open_question_says_what_to_type_or_to_give(examine):
    """Where it cannot tell, the report names the missing test and what makes it run."""
    diagnosis, found, _ = examine("labels-swapped", labelled=False)
    text = as_text(diagnosis, replace(found, word="cannot tell"))
    assert "Cannot tell yet" in text
    assert "Give labels" in text
    assert "%" not in text


def test_more_time_is_more_than_there_was(examine):
    """Where rows are left, or a test did not fit, the command has more minutes than were given."""
    diagnosis, found, _ = examine("labels-swapped", labelled=False, minutes=0.4, pace=0.6)
    rows_left = replace(found, word="cannot tell", ahead=())
    assert next_step(diagnosis, rows_left).startswith("Run `postmortem diagnose CASE --minutes 2`")
    assert f"{diagnosis.subject.count} of 64 rows" in next_step(diagnosis, rows_left)
    diagnosis.minutes = 10
    assert "--minutes 30`" in next_step(diagnosis, rows_left)


def test_a_test_that_nothing_makes_possible_is_not_held_out(examine):
    """What the base or the adapter rules out is not among the tests that were not run."""
    diagnosis, _, _ = examine("labels-swapped", labelled=False)
    assert what_to_give("order", diagnosis).startswith("Give labels")
    assert what_to_give("reference", diagnosis).startswith("Give labels")
    assert not what_to_give("markup", diagnosis)
    diagnosis.tests["effect"] = DoneTest("effect", "none", "", 0.0)
    assert not what_to_give("mend", diagnosis)
