"""What is looked at in a replay, and what it shows of the incident's symptom."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from postmortem.case.schema import Attempt, Case
from postmortem.checker.catalogue import catalogue
from postmortem.diagnosis.causes import CAUSES
from postmortem.diagnosis.likelihoods import HEALTHY, Test
from postmortem.experiments.metrics import rate_estimate
from postmortem.experiments.records import Cell, Replay
from postmortem.experiments.session import Session

# Sizes of an effect by its KL in nats, in steps of ten; below the first it is rounding.
EFFECTS = {"none": 1e-6, "faint": 1e-2, "small": 1e-1, "medium": 1.0, "large": np.inf}
SYMPTOM = ("all 0.0", "one other value", "mostly one value", "varies", "no answer")
RANKS = ("ranks", "does not rank", "ranks in reverse", "no answer")
# Causes that could not be injected, and why.
Absent = Mapping[str, str]
ABSENT_COLUMNS = ("cause", "why")
INSPECTED = ("nothing", *catalogue(), "no adapter")


@dataclass(frozen=True)
class ReplayedTest(Test):
    """A test that the replays of the incident run, with what it would have cost on its machine.

    `hands` are a person's minutes, a judgement of ours; `loads` counts models loaded, and `passes`
    runs over the incident's rows as long as the second attempt's.
    """

    hands: float = 0.0
    loads: int = 0
    passes: float = 0.0


NO_ANSWER = "no answer"
TESTS: Mapping[str, ReplayedTest] = {
    "load": ReplayedTest(
        "load the adapter and read what PEFT says of the weights",
        ("silent", "warns", "raises"),
        pooled=True,
        hands=1,
        loads=1,
    ),
    # Fifty new tokens where the second prompt's answer took about four steps.
    "v1": ReplayedTest("ask the first prompt", SYMPTOM, hands=5, loads=1, passes=12.0),
    "v2": ReplayedTest("ask the second prompt", SYMPTOM, hands=5, loads=1, passes=1.0),
    "names": ReplayedTest(
        "compare the name of the base in the config with the base",
        ("the same", "another", "no adapter"),
        pooled=True,
        hands=5,
    ),
    "settings": ReplayedTest(
        "change the temperature and generate again",
        ("unchanged", "changed", NO_ANSWER),
        pooled=True,
        hands=1,
        loads=1,
        passes=2.0,
    ),
    "inspect": ReplayedTest(
        "check the adapter's files against the base", INSPECTED, pooled=True, hands=1
    ),
    "status": ReplayedTest(
        "ask PEFT which adapter answers",
        ("active", "disabled", "another", "none"),
        pooled=True,
        hands=1,
        loads=1,
    ),
    "prompt": ReplayedTest(
        "print the tokens that the model receives",
        ("whole", "cut", "another markup"),
        pooled=True,
        hands=2,
    ),
    "fingerprint": ReplayedTest(
        "compare the base's weights with the published ones, before and after loading",
        ("as published", "differs", "differs after loading"),
        pooled=True,
        hands=5,
        loads=1,
    ),
    "finite": ReplayedTest(
        "look for NaN in the logits",
        ("finite", "not finite", NO_ANSWER),
        pooled=True,
        hands=2,
        loads=1,
        passes=0.1,
    ),
    "raw-text": ReplayedTest(
        "print what is generated, before any parser",
        ("a decimal", "a bare digit", "a word", "a tag", "nothing", NO_ANSWER),
        hands=1,
        loads=1,
        passes=0.3,
    ),
    "parsers": ReplayedTest(
        "read the generated text with a second, strict parser",
        ("agree", "disagree", "no number", NO_ANSWER),
        hands=2,
        loads=1,
        passes=1.0,
    ),
    "base-alone": ReplayedTest(
        "ask the base without the adapter", SYMPTOM, hands=2, loads=1, passes=1.0
    ),
    "effect": ReplayedTest(
        "compare answers with the adapter on and off",
        (*EFFECTS, "not finite", NO_ANSWER),
        hands=3,
        loads=1,
        passes=2.0,
    ),
    "number-log-odds": ReplayedTest(
        "rank the rows by the number's log-odds", RANKS, hands=5, loads=1, passes=1.0
    ),
    "yes-no": ReplayedTest(
        "ask yes or no, and rank by the log-odds", RANKS, hands=5, loads=1, passes=0.3
    ),
    "scale": ReplayedTest(
        "scale the adapter to an eighth, and eightfold",
        ("no effect", "no better", "better at 1/8", "better at 8", NO_ANSWER),
        hands=4,
        loads=1,
        passes=2.0,
    ),
    "home": ReplayedTest(
        "hold the log-odds against the adapter's sign flipped and its layers shifted",
        ("no effect", "at home", "not at home", NO_ANSWER),
        hands=10,
        loads=1,
        passes=4.0,
    ),
    "reference": ReplayedTest(
        "put a sound adapter through the same steps",
        ("works", "does not work"),
        hands=10,
        loads=1,
        passes=1.0,
    ),
}


def price_tests(case: Case) -> dict[str, float]:
    """Minutes of each test, at the speed that the incident's log shows.

    Without a log only a person's minutes count.
    """
    facts = case.forensics
    load = rows = 0.0
    if facts is not None:
        load = facts.log.loading[1] - facts.log.loading[0]
        rows = facts.log.ticks[-1] - facts.log.ticks[0]
    return {
        name: test.hands + (test.loads * load + test.passes * rows) / 60
        for name, test in TESTS.items()
    }


@dataclass(frozen=True)
class Feature:
    """A part of the observed symptom, and whether a replay shows it (None: it has no answer)."""

    attempt: str
    shown: Callable[[Mapping[str, Any], Attempt], bool | None]


def _half_parsed(features: Mapping[str, Any], attempt: Attempt) -> bool:
    """Within the exact interval of what was reported, on as few rows as there were."""
    hits = round(attempt.reported_parse_rate * attempt.rows)
    told = rate_estimate(hits, attempt.rows)
    return (told.low or 0.0) <= features["v1 parse rate"] <= (told.high or 1.0)


def _no_ranking(features: Mapping[str, Any], attempt: Attempt) -> bool | None:
    return None if features["v2 AUC"] is None else features["v2 AUC"] == 0.5


FEATURES: Mapping[str, Feature] = {
    "loads": Feature("v2", lambda f, a: f["loads"]),
    "no-missing-keys": Feature("v2", lambda f, a: f["no missing keys"]),
    "v2-parsed": Feature("v2", lambda f, a: f["v2 parse rate"] == 1.0),
    "v2-constant": Feature("v2", lambda f, a: f["v2 distinct"] == 1),
    "v2-value": Feature("v2", lambda f, a: f["v2 value"] == a.reported_value),
    "v2-auc": Feature("v2", _no_ranking),
    "v1-parsed": Feature("v1", _half_parsed),
    "v1-constant": Feature(
        "v1", lambda f, a: f["v1 distinct"] == 1 and f["v1 value"] == a.reported_value
    ),
}


def symptom_of(replay: Replay, case: Case) -> dict[str, bool | None]:
    """Which features of the incident's symptom a replay shows."""
    answered = "v2 value" in replay.features
    return {
        name: feature.shown(replay.features, case.attempts[feature.attempt])
        if answered or name in ("loads", "no-missing-keys")
        else False
        for name, feature in FEATURES.items()
    }


def record_kept_replays(session: Session, replays: Sequence[Replay], absent: Absent) -> None:
    """Record replays raw, as a kept run leaves them."""
    session.add(*replays)
    session.table("replay.absent", ABSENT_COLUMNS, list(absent.items()))
    session.measure("replay.replays", len(replays))


def record_again(session: Session, again: Sequence[Replay], kept: Sequence[Replay]) -> None:
    """Record replays of this run, and whether they came out as those on record."""
    session.add(*again)
    reason = "on this base the causes were injected in a kept run"
    on_record = {replay.key: replay.outcomes for replay in kept}
    differing: list[tuple[Cell, ...]] = []
    for replay in again:
        before, now = on_record[f"{session.world.seed}.{replay.key}"], replay.outcomes
        tests = [test for test in before | now if before.get(test) != now.get(test)]
        differing += [(replay.key, test, before.get(test), now.get(test)) for test in tests]
    session.measure("replay.again.replays", len(again) or None, reason=reason)
    columns = ("replay", "test", "on record", "in this run")
    session.table("replay.again.differing", columns, differing)
    if not again:
        session.verdict("replay.again.as_on_record", "not available", reason)
        return
    same = len(again) - len({row[0] for row in differing})
    because = f"{same} of {len(again)} replays have every outcome that is on record"
    session.verdict("replay.again.as_on_record", not differing, because)


def record_replays(session: Session, replays: Sequence[Replay]) -> None:
    """Record the matrix of causes and features of replays, and what it decides."""
    worlds = {replay.key.partition(".")[0] for replay in replays}
    session.measure("replay.worlds", len(worlds))
    rows: list[tuple[Cell, ...]] = []
    for kind in dict.fromkeys(replay.base for replay in replays):
        for name, cause in CAUSES.items():
            found = [r for r in replays if (r.base, r.cause) == (kind, name)]
            if not found:
                continue
            shown = [symptom_of(replay, session.case) for replay in found]
            whole = sum(_is_whole(symptom) for symptom in shown)
            shares = [
                round(sum(bool(symptom[name]) for symptom in shown) / len(shown), 3)
                for name in FEATURES
            ]
            rows.append((kind, name, cause.title, len(found), *shares, f"{whole} of {len(found)}"))
    columns = ("base", "cause", "title", "replays", *FEATURES, "whole v2 symptom")
    session.table("replay.matrix", columns, rows)
    kinds = list(dict.fromkeys(str(row[0]) for row in rows))
    whole_by = {(row[1], row[0]): row[-1] for row in rows}
    session.table(
        "replay.reproduces",
        ("cause", *(f"on a {kind} base" for kind in kinds)),
        [
            (cause.title, *(whole_by.get((name, kind), "not replayed") for kind in kinds))
            for name, cause in CAUSES.items()
        ],
    )
    sound = [symptom_of(r, session.case)["v2-parsed"] for r in replays if r.cause == HEALTHY]
    session.verdict(
        "replay.sound_counts_as_parsed",
        all(sound) if sound else "not available",
        f"in {sum(map(bool, sound))} of {len(sound)} sound runs every answer counts as parsed",
    )
    for name in CAUSES:
        _judge_cause(session, name, rows)
    session.measure("replay.replays", len(replays))
    faults = {replay.cause for replay in replays} - {HEALTHY}
    session.measure("replay.causes", len(faults), unit="causes")
    both = [symptom for r in replays if all((symptom := symptom_of(r, session.case)).values())]
    session.measure("replay.both_attempts", len(both), unit="replays")
    session.table(
        "replay.tests",
        ("test", "what is done", "outcomes"),
        [(name, test.title, _tell_outcomes(test)) for name, test in TESTS.items()],
    )


def _tell_outcomes(test: Test) -> str:
    """The outcomes in a line; the checker's many ids are not listed one by one."""
    few = len(test.outcomes) <= 8
    return ", ".join(test.outcomes) if few else "nothing, no adapter, or a finding's id"


def _judge_cause(session: Session, name: str, rows: Sequence[Sequence[Cell]]) -> None:
    """Whether a cause reproduces the symptom on the kind of base where it does so most."""
    found = [(str(row[0]), int(row[3] or 0), str(row[-1])) for row in rows if row[1] == name]
    if not found:
        session.verdict(f"replay.{name}.reproduces", "not available", "not replayed")
        return
    best = max(int(told.split()[0]) / total for _, total, told in found)
    session.verdict(
        f"replay.{name}.reproduces",
        True if best == 1 else None if best else False,
        "replays that show the whole symptom of the second attempt: "
        + ", ".join(f"{told} on a {kind} base" for kind, _, told in found),
    )


def _is_whole(symptom: Mapping[str, bool | None]) -> bool:
    """Every feature of the second attempt; one without an answer does not count against it."""
    return all(
        symptom[name] is not False for name, feature in FEATURES.items() if feature.attempt == "v2"
    )
