"""Replays: every suspected cause injected, run, and met with every test of the battery."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from postmortem.case.prompts import counts_as_parsed, parse_as_written
from postmortem.case.rows import GENERATORS, Rows
from postmortem.case.schema import Attempt, Case
from postmortem.diagnosis.battery import BASE, FIRST, OF_INCIDENT, REFERENCE, SAVED, TESTS
from postmortem.diagnosis.causes import CAUSES, Cause, Materials, Rewrite, Run, Unavailable
from postmortem.diagnosis.likelihoods import HEALTHY
from postmortem.diagnosis.subject import Subject, run_tests, warnings_of_weights
from postmortem.experiments.ask import Answers
from postmortem.experiments.metrics import auc, describe, rate_estimate
from postmortem.experiments.records import Cell, Replay
from postmortem.experiments.session import Session

# Causes that could not be injected, and why.
Absent = Mapping[str, str]
ABSENT_COLUMNS = ("cause", "why")
# The states in which nothing of a run's own adapter answers.
NOT_OF_THE_RUN = (BASE, FIRST, REFERENCE)


@dataclass(frozen=True)
class Bench:
    """What all replays of one kind of base and seed share: rows, controls and their answers."""

    session: Session
    rows: Rows
    materials: Materials
    reference: Path | None
    # Answers of the bench's own base and of the reference on it, by how prompts are rewritten.
    known: dict[Rewrite | None, dict[tuple[str, str], Answers]] = field(default_factory=dict)

    def open(self, run: Run) -> Subject:
        """A run as a subject, which knows what was asked of the same base before."""
        world = self.materials.world
        return Subject(
            session=self.session,
            # The incident's code is part of the run: its parser, unless a cause has another.
            run=replace(run, parse=run.parse or read_as_written),
            prompt="v2",
            rows=self.rows,
            base_folder=world.path(self.materials.role),
            base_name=self.materials.role,
            reference=self.reference,
            published=self.materials.base,
            asked=dict(self.known.get(run.rewrite, {})) if self.is_own(run) else {},
        )

    def observe(self, run: Run) -> tuple[dict[str, str], dict[str, Cell]]:
        """The outcome of each test on a run, and the parts of the symptom that it has."""
        with self.open(run) as subject:
            outcomes = run_tests(OF_INCIDENT, subject)
            features = describe_symptom(subject, outcomes)
        if self.is_own(run):
            asked = subject.asked.items()
            self.known[run.rewrite] = {key: a for key, a in asked if key[0] in NOT_OF_THE_RUN}
        return outcomes, features

    def is_own(self, run: Run) -> bool:
        """Whether a run stands on the bench's own base, and not on a changed copy of it."""
        return run.base is self.materials.base


def read_as_written(text: str) -> float:
    """A value by the write-up's parser, which finds a number in any text."""
    return parse_as_written(text).value or 0.0


def describe_symptom(
    subject: Subject, outcomes: Mapping[str, str], *, attempts: Sequence[str] = ("v1", "v2")
) -> dict[str, Cell]:
    """The observed symptom in parts, as measured on the values of each of the attempts."""
    if outcomes["load"] == "raises":
        return {"loads": False, "no missing keys": True}
    missing = any("missing" in said for said in warnings_of_weights(subject.load()))
    features: dict[str, Cell] = {"loads": True, "no missing keys": not missing}
    for name in attempts:
        prompt = subject.session.case.attempts[name].prompt
        values = [value or 0.0 for value in subject.values(SAVED, prompt)]
        features |= describe_values(name, values, subject.rows.labels)
    return features


def describe_values(
    attempt: str, values: Sequence[float], labels: np.ndarray | None
) -> dict[str, Cell]:
    """The parts of the symptom that an attempt's values have."""
    health = describe(values, groups=["all"] * len(values))
    return {
        f"{attempt} parse rate": float(np.mean(list(map(counts_as_parsed, values)))),
        f"{attempt} distinct": health.distinct,
        f"{attempt} value": health.top_value,
        f"{attempt} AUC": None if labels is None else auc(labels, values),
    }


def make_bench(session: Session, materials: Materials, *, trainings: int) -> Bench:
    """The bench of one training of the adapters: generated rows of its own, whatever is scored."""
    case, size = session.case, session.profile.replays
    assert size is not None
    seed = 30_000 + 100 * session.world.seed + materials.seed
    chosen = GENERATORS[session.profile.corpus](size.rows, seed, columns=case.columns)
    # The sound adapter of the control is not the one that the causes are made from.
    other = f"{materials.kind}/numeric_{(materials.seed + 1) % trainings}"
    member = session.world.replays.get(other)
    reference = None if member is None or member.path is None else Path(member.path)
    return Bench(session, chosen, materials, reference)


def replay_causes(
    session: Session, *, kind: str, role: str, whole: bool
) -> tuple[list[Replay], dict[str, str]]:
    """Inject every cause on one base; also say of each cause that could not be, why not.

    The `whole` is every severity into each training of the sound adapter, else the first of both.
    """
    base = session.base if role == "base" else session.load(role)
    trained = sum(name.startswith(f"{kind}/numeric_") for name in session.world.replays)
    replays: list[Replay] = []
    absent: dict[str, str] = {}
    for seed in range(trained if whole else 1):
        with TemporaryDirectory() as scratch:
            materials = Materials(session.world, role, base, kind, seed, Path(scratch))
            bench = make_bench(session, materials, trainings=trained)
            step = f"{kind} base, adapters {seed + 1} of {trained if whole else 1}"
            follow = session.follow(step, total=len(CAUSES), unit="causes")
            for number, (name, cause) in enumerate(CAUSES.items(), 1):
                try:
                    replays += _replay_cause(name, cause, bench=bench, whole=whole)
                except Unavailable as reason:
                    absent[name] = str(reason)
                follow(number)
        session.say(f"{step}: {len(replays)} replays")
    # The later trainings have no adapter of the rarer kinds.
    done = {replay.cause for replay in replays}
    return replays, {name: why for name, why in absent.items() if name not in done}


def replay_all(session: Session) -> tuple[list[Replay], dict[str, str]]:
    """Inject every cause at every severity on each kind of base, into each training."""
    replays: list[Replay] = []
    absent: dict[str, str] = {}
    for kind, role in (("silent", "base"), ("speaking", "speaking_base")):
        found, missing = replay_causes(session, kind=kind, role=role, whole=True)
        replays += found
        absent |= missing
    return replays, absent


def replay_once(session: Session) -> list[Replay]:
    """Inject every cause once, in its plainest form, on the base of the session."""
    return replay_causes(session, kind="silent", role="base", whole=False)[0]


def _replay_cause(name: str, cause: Cause, *, bench: Bench, whole: bool) -> list[Replay]:
    materials, replays = bench.materials, []
    for severity, value in list(cause.severities.items())[: None if whole else 1]:
        outcomes, features = bench.observe(cause.inject(materials, value))
        replays.append(
            Replay(
                key=f"{name}.{materials.kind}.{materials.seed}.{severity}",
                cause=name,
                base=materials.kind,
                seed=materials.seed,
                severity=severity,
                outcomes=outcomes,
                features=features,
            )
        )
    return replays


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
        [(name, TESTS[name].title, _list_outcomes(name)) for name in OF_INCIDENT],
    )


def _list_outcomes(test: str) -> str:
    """The outcomes in a line; the checker's many ids are not listed one by one."""
    outcomes = TESTS[test].outcomes
    few = len(outcomes) <= 8
    return ", ".join(outcomes) if few else "nothing, no adapter, or a finding's id"


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
