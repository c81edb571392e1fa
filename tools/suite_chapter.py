"""The suite of the embedded models for the book: its answers, its filters, its ensembles."""

import time
from collections.abc import Mapping
from pathlib import Path

from postmortem.case.schema import AdapterFilter
from postmortem.experiments.measure import NO_LABELS, ONE_CLASS, Measured, decide_gain
from postmortem.experiments.metrics import Estimate, say_estimate
from postmortem.experiments.records import (
    Cell,
    Timing,
)
from postmortem.experiments.session import Session
from postmortem.models.loading import LoadedBase, load_base
from postmortem.models.world import ADAPTERS, World, digest_model, role_name
from postmortem.suite.results import Judged, Results, judge_suite
from postmortem.suite.scoring import Bench
from postmortem.suite.suite import Limit, Limits, Scored

PROMPT = "v2"
BASE = "base alone"
# Steps that are timed.
BASE_ASKED, DIGESTS, ANSWERED = (
    "suite: base asked",
    "suite: digests",
    "suite: adapters that answer",
)
ENSEMBLES = {
    "kept": "ensemble of the kept",
    "write_up": "ensemble by the write-up",
    "all": "ensemble of all",
}
COLUMNS = (
    *("adapter", "verdict", "write-up's filter", "AUC, log-odds", "because", "AUC, written"),
    *("standard deviation", "maximum", "effect in nat", "checker"),
)
# What an ensemble is held against, in words.
AGAINST = {"over_best": "the best single one", "over_all": "the ensemble of all"}
GAINS = ("over_best", "held_out", "over_base", "over_write_up", "over_all")


def world_adapters(world: World) -> dict[str, Path]:
    """The adapters of a world by a name for pages: by role, then those of the replays.

    Of the replays' adapters those of the world's own base are taken, and the first of its sibling;
    one that plays a role as well stands under both names, and is found to be a duplicate.
    """
    found = {role_name(role): world.path(role) for role in ADAPTERS if world.has(role)}
    for name, member in world.replays.items():
        lineage, _, training = name.partition("/")
        if member.path is None:
            continue
        if lineage == "silent" or (lineage, training) == ("sibling", "numeric_0"):
            recipe, _, seed = training.rpartition("_")
            own = "" if lineage == "silent" else f", {lineage}'s"
            found[f"{recipe.replace('_', ' ')} {int(seed) + 1}{own}"] = Path(member.path)
    return {name: path for name, path in found.items() if path.is_dir()}


def run_world_suite(session: Session) -> Results | None:
    """Put the world's adapters through a suite; None where the world has none."""
    adapters = world_adapters(session.world)
    if not adapters:
        return None
    attempt = session.case.attempts[PROMPT]
    bases = iter([session.base])

    def load() -> LoadedBase:
        again = load_base(session.world.path("base"), device=session.device, dtype=session.dtype)
        return next(bases, again)

    _ = session.base  # loaded ahead of the clock below, and under its own
    with session.timed(BASE_ASKED):
        bench = Bench(
            load,
            folder=session.world.path("base"),
            rows=session.rows,
            prompts={PROMPT: session.case.prompts[PROMPT]},
            max_new_tokens=attempt.decoding.max_new_tokens,
            max_prompt_tokens=attempt.decoding.max_prompt_tokens,
        )
    with session.timed(DIGESTS):
        digests = {name: digest_model(folder) for name, folder in adapters.items()}
    follow = session.follow("suite", total=len(adapters), unit="adapters")
    scored: list[Scored] = []
    seconds = 0.0
    for name, folder in adapters.items():
        follow(len(scored))
        start = time.perf_counter()
        scored.append(bench.score(name, folder, digest=digests[name]))
        if scored[-1].status == "ok":
            seconds += time.perf_counter() - start
    session.add(Timing(key=ANSWERED, seconds=seconds))
    return judge_suite(
        bench.score_base(),
        scored,
        labels=session.rows.labels,
        limits=limits_of(session.case.adapter_filter),
        title=session.profile.title,
        decided_by=PROMPT,
    )


def limits_of(written: AdapterFilter | None) -> Limits:
    """Our limits beside those of a case's write-up."""
    if written is None:
        return Limits()
    return Limits(
        std_above=Limit(value=written.std_above, because=written.source),
        maximum_above=Limit(value=written.maximum_above, because=written.source),
    )


def record_suite(session: Session) -> Results | None:
    """Run the world's suite and record its table, measures and verdicts."""
    results = run_world_suite(session)
    if results is None:
        _record_absence(session)
        return None
    session.table("suite.adapters", COLUMNS, [_row(judged) for judged in results.adapters])
    session.measure("suite.rows", len(session.rows))
    why = {"none": NO_LABELS, "one class": ONE_CLASS}.get(results.labels, "no adapter was kept")
    for name, count in {"adapters": len(results.adapters), **results.counts}.items():
        session.measure(f"suite.count.{name.replace(' ', '_')}", count)
    for name, found in _list_aucs(results).items():
        lack = why if results.labels != "two classes" else "it does not load, or answers NaN"
        session.measure(f"suite.auc.{name}", found, reason=lack)
    session.measure("suite.best_single.auc", results.best_auc, reason=why)
    for name, found in list_gains(results).items():
        session.measure(f"suite.gain.{name}", found, reason=why)
    record_costs(session, results)
    kept = results.ensembles.get("kept")
    session.measure("suite.ensemble.auc", kept.auc if kept else None, reason=why)
    session.text("suite.best_single.system", results.best_single or "none")
    session.verdict("suite.filters_agree", *judge_agreement(results))
    for name, key in (("over_best", "beats_best"), ("over_all", "filtering_pays")):
        gained = Measured(list_gains(results)[name], why)
        session.verdict(f"suite.{key}", *decide_gain(gained, against=AGAINST[name], form="+z.3f"))
    return results


def record_costs(session: Session, results: Results) -> None:
    """Record what many adapters would take: the bytes of each and of its result."""
    adapters = world_adapters(session.world)
    answered = [j.scored for j in results.adapters if j.scored.status == "ok"]
    session.measure("suite.count.answered", len(answered))
    sizes = [sum(f.stat().st_size for f in adapters[s.name].iterdir()) for s in answered]
    lines = [len(s.model_dump_json()) for s in answered]
    for name, found in {"adapter": sizes, "result": lines}.items():
        mean = sum(found) / len(found) if found else None
        session.measure(f"suite.bytes.{name}", mean, unit="byte", reason="no adapter answers")


def list_gains(results: Results) -> dict[str, Estimate]:
    """What the ensemble of the kept gains, by the names in `GAINS`."""
    unknown, kept = Estimate(None, None, None, 0), results.ensembles.get("kept")
    over = (kept.gain_over_best, kept.held_out, kept.gain_over_base) if kept else (unknown,) * 3
    rest = (results.gains["over_write_up"], results.gains["over_all"])
    return dict(zip(GAINS, (*over, *rest), strict=True))


def judge_agreement(results: Results) -> tuple[bool | None, str]:
    """Whether the write-up's filter passes exactly the adapters that are kept."""
    lost = [j.scored.name for j in results.adapters if j.verdict == "kept" and not j.write_up]
    let = [j.scored.name for j in results.adapters if j.verdict == "dropped" and j.write_up]
    parts = {"kept here and blocked there": lost, "dropped here and passed there": let}
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    if told:
        return False, told
    if results.counts["cannot tell"]:
        return None, results.adapters[0].because[0]
    return True, "it passes those that are kept and no other"


def _record_absence(session: Session) -> None:
    reason = "this profile has no adapter"
    cells: tuple[Cell, ...] = ("not available", reason)
    session.table("suite.adapters", ("adapter", "because"), [cells])
    for name in ("adapters", "kept", "dropped", "write_up", "failed", "answered"):
        session.measure(f"suite.count.{name}", None, reason=reason)
    rest = ("rows", "ensemble.auc", "best_single.auc", "bytes.adapter", "bytes.result")
    for name in (*(f"gain.{gain}" for gain in GAINS), *rest):
        session.measure(f"suite.{name}", None, reason=reason)
    session.text("suite.best_single.system", "none")
    for key in ("filters_agree", "beats_best", "filtering_pays"):
        session.verdict(f"suite.{key}", "not available", reason)


def _list_aucs(results: Results) -> Mapping[str, Estimate]:
    """AUC of the log-odds of the base, of each adapter that has one, and of the ensembles."""
    prompt = results.decided_by
    found = {BASE: results.base.readings[prompt].auc}
    for judged in results.adapters:
        reading = judged.scored.readings.get(prompt)
        found[judged.scored.name] = reading.auc if reading else Estimate(None, None, None, 0)
    found |= {ENSEMBLES[kind]: ensemble.auc for kind, ensemble in results.ensembles.items()}
    return found


def _row(judged: Judged) -> tuple[Cell, ...]:
    scored, passed = judged.scored, "passed" if judged.write_up else "blocked"
    findings = f"{scored.checker}: {', '.join(scored.findings)}" if scored.findings else "fits"
    reading = scored.readings.get(PROMPT)
    head = (scored.name, judged.verdict, passed)
    if reading is None:
        return (*head, None, judged.because[0], *(None,) * 4, findings)
    effect = None if reading.effect is None else round(reading.effect, 4)
    spread = (round(reading.std, 3), round(reading.maximum, 2), effect)
    aucs = (
        say_estimate(reading.auc, "z.3f"),
        judged.because[0],
        say_estimate(reading.auc_written, "z.3f"),
    )
    return (*head, *aucs, *spread, findings)
