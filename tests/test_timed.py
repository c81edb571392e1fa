from types import SimpleNamespace

import pytest
from replays import replay

from postmortem.checker.errors import DiagnosisError, finding
from postmortem.diagnosis import timed as module
from postmortem.diagnosis.battery import OF_ADAPTER
from postmortem.diagnosis.subject import Outcome
from postmortem.diagnosis.timed import TimedDiagnosis, describe_judgements, parse_observed, stand

SEEN = {
    "healthy": {"inspect": "nothing", "answers": "varies", "effect": "clear", "place": "here"},
    "zero-b": {"inspect": "untrained", "answers": "one value", "effect": "none"},
    "scale-up": {
        "inspect": "nothing",
        "answers": "many texts",
        "effect": "clear",
        "place": "here",
        "mend": "smaller",
    },
    "sibling-base": {
        "inspect": "nothing",
        "answers": "many texts",
        "effect": "clear",
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
    """A subject whose tests come out as told, at a pace in seconds a row."""

    def __init__(self, findings=(), *, labelled=True, pace=0.0):
        asked = SimpleNamespace(contract="choice")
        super().__init__(
            findings=findings,
            labelled=labelled,
            reference=None,
            has_markups=False,
            run=SimpleNamespace(adapter="adapter"),
            asked={},
            missing_rows=lambda state, count: count,
            settle=lambda: None,
            prompt="ask",
            session=SimpleNamespace(case=SimpleNamespace(prompt=lambda name: asked)),
            paces={"base": pace} if pace else {},
            rows=[None] * 64,
            count=0,
        )

    @property
    def in_use(self):
        return self.rows[: self.count]


@pytest.fixture
def examine(monkeypatch):
    """A function that examines a stub whose experiments come out as those of a cause."""

    def run(cause, *, minutes=10.0, told=None, **changes):
        seen = SEEN[cause]
        tests = tuple(name for name in OF_ADAPTER if name in seen)
        monkeypatch.setattr(module, "CONTROLS", [n for n in module.CONTROLS if n in seen])
        monkeypatch.setattr(module, "OF_ADAPTER", tests)
        monkeypatch.setattr(module, "run_test", lambda name, subject: Outcome(seen[name]))
        lines = []
        diagnosis = TimedDiagnosis(
            Stub(**changes), REPLAYS, minutes, told or {}, report=lines.append
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
    diagnosis, found, _ = examine("sibling-base", labelled=False)
    assert not {"mend"} & set(diagnosis.outcomes)
    assert any("labels" in step.why for step in found.ahead)


def test_what_was_told_is_not_run(examine):
    """A told outcome counts as evidence and costs nothing."""
    diagnosis, found, _ = examine("sibling-base", told={"mend": "smaller"})
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
