"""The suite of the embedded models for the book: its answers, its filters, its ensembles."""

import time
from pathlib import Path
from statistics import fmean

from postmortem.case.schema import AdapterFilter
from postmortem.experiments.measure import NO_LABELS, ONE_CLASS, Measured, decide_gain
from postmortem.experiments.metrics import Estimate, say_estimate
from postmortem.experiments.records import Cell, Timing
from postmortem.experiments.session import Session
from postmortem.models.loading import LoadedBase, load_base
from postmortem.models.model_set import ADAPTERS, World, digest_model, role_name
from postmortem.suite.results import UNKNOWN, Decided, Results, decide_suite
from postmortem.suite.scoring import Scorer
from postmortem.suite.suite import Limit, Scored, SuiteLimits

PROMPT = "v2"
BASE = "base alone"
# Steps that are timed.
BASE_ASKED, ANSWERED = "suite: base asked", "suite: adapters that answer"
ENSEMBLES = {
    "kept": "ensemble of the kept",
    "write_up": "ensemble by the write-up",
    "all": "ensemble of all",
}
COLUMNS = (
    "adapter",
    "verdict",
    "write-up's filter",
    "AUC, log-odds",
    "because",
    "AUC, written",
    "standard deviation",
    "maximum",
    "effect in nat",
    "checker",
)
# What an ensemble is held against, in words.
AGAINST = {"over_best": "the best single one", "over_all": "the ensemble of all"}
GAINS = ("over_best", "held_out", "over_base", "over_write_up", "over_all")


def world_adapters(world: World) -> dict[str, Path]:
    """The adapters of a world by a name for pages: by role, then those of the replays.

    Of the replays' adapters those of the world's own base are taken, and the first of its sibling;
    one that plays a role as well stands under both names, and is found to be a duplicate.
    """
    adapters = {role_name(role): world.path(role) for role in ADAPTERS if world.has(role)}
    for name, replay in world.replays.items():
        lineage, _, training = name.partition("/")
        if replay.path and (lineage == "silent" or name == "sibling/numeric_0"):
            recipe, _, seed = training.rpartition("_")
            own = "" if lineage == "silent" else f", {lineage}'s"
            adapters[f"{recipe.replace('_', ' ')} {int(seed) + 1}{own}"] = Path(replay.path)
    return {name: path for name, path in adapters.items() if path.is_dir()}


def run_world_suite(session: Session) -> Results | None:
    """Put the world's adapters through a suite; None where the world has none."""
    adapters = world_adapters(session.world)
    if not adapters:
        return None
    decoding = session.case.attempts[PROMPT].decoding
    # Loaded ahead of the clock below, and under its own.
    bases = iter([session.base])

    def load() -> LoadedBase:
        return next(bases, None) or load_base(
            session.world.path("base"), device=session.device, dtype=session.dtype
        )

    with session.timed(BASE_ASKED):
        scorer = Scorer(
            load,
            folder=session.world.path("base"),
            rows=session.rows,
            prompts={PROMPT: session.case.prompts[PROMPT]},
            max_new_tokens=decoding.max_new_tokens,
            max_prompt_tokens=decoding.max_prompt_tokens,
        )
    follow = session.follow("suite", total=len(adapters), unit="adapters")
    scored: list[Scored] = []
    seconds = 0.0
    for name, folder in adapters.items():
        follow(len(scored))
        digest = digest_model(folder)
        start = time.perf_counter()
        scored.append(scorer.score(name, folder, digest=digest))
        if scored[-1].status == "ok":
            seconds += time.perf_counter() - start
    session.add(Timing(key=ANSWERED, seconds=seconds))
    return decide_suite(
        scorer.score_base(),
        scored,
        labels=session.rows.labels,
        limits=limits_of(session.case.adapter_filter),
        title=session.profile.title,
        decided_by=PROMPT,
    )


def limits_of(written: AdapterFilter | None) -> SuiteLimits:
    """Our limits beside those of a case's write-up."""
    if written is None:
        return SuiteLimits()
    return SuiteLimits(
        std_above=Limit(value=written.std_above, because=written.source),
        maximum_above=Limit(value=written.maximum_above, because=written.source),
    )


def record_suite(session: Session) -> Results | None:
    """Run the world's suite and record its table, measures and verdicts."""
    results = run_world_suite(session)
    if results is None:
        _record_absence(session)
        return None
    session.table("suite.adapters", COLUMNS, [_row(one) for one in results.adapters])
    session.measure("suite.rows", len(session.rows))
    why = {"none": NO_LABELS, "one class": ONE_CLASS}.get(results.labels, "no adapter was kept")
    for name, count in {"adapters": len(results.adapters), **results.counts}.items():
        session.measure(f"suite.count.{name.replace(' ', '_')}", count)
    lack = why if results.labels != "two classes" else "it does not load, or answers NaN"
    for name, auc in _list_aucs(results).items():
        session.measure(f"suite.auc.{name}", auc, reason=lack)
    session.measure("suite.best_single.auc", results.best_auc, reason=why)
    gains = list_gains(results)
    for name, gain in gains.items():
        session.measure(f"suite.gain.{name}", gain, reason=why)
    record_costs(session, results)
    kept = results.ensembles.get("kept")
    session.measure("suite.ensemble.auc", kept.auc if kept else None, reason=why)
    session.text("suite.best_single.system", results.best_single or "none")
    session.verdict("suite.filters_agree", *decide_agreement(results))
    for name, key in (("over_best", "beats_best"), ("over_all", "filtering_pays")):
        decided = decide_gain(Measured(gains[name], why), against=AGAINST[name], form="+z.3f")
        session.verdict(f"suite.{key}", *decided)
    return results


def record_costs(session: Session, results: Results) -> None:
    """Record what many adapters would take: the bytes of each and of its result."""
    adapters = world_adapters(session.world)
    answered = [one.scored for one in results.adapters if one.scored.status == "ok"]
    session.measure("suite.count.answered", len(answered))
    sizes = [sum(f.stat().st_size for f in adapters[s.name].iterdir()) for s in answered]
    lines = [len(s.model_dump_json()) for s in answered]
    for name, numbers in {"adapter": sizes, "result": lines}.items():
        mean = fmean(numbers) if numbers else None
        session.measure(f"suite.bytes.{name}", mean, unit="byte", reason="no adapter answers")


def list_gains(results: Results) -> dict[str, Estimate]:
    """What the ensemble of the kept gains, by the names in `GAINS`."""
    kept = results.ensembles.get("kept")
    return {
        "over_best": kept.gain_over_best if kept else UNKNOWN,
        "held_out": kept.held_out if kept else UNKNOWN,
        "over_base": kept.gain_over_base if kept else UNKNOWN,
        **results.gains,
    }


def decide_agreement(results: Results) -> tuple[bool | None, str]:
    """Whether the write-up's filter passes exactly the adapters that are kept."""
    blocked = [a.scored.name for a in results.adapters if a.verdict == "kept" and not a.write_up]
    passed = [a.scored.name for a in results.adapters if a.verdict == "dropped" and a.write_up]
    parts = {"kept here and blocked there": blocked, "dropped here and passed there": passed}
    differ = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    if differ:
        return False, differ
    if results.counts["cannot tell"]:
        return None, results.adapters[0].because[0]
    return True, "it passes those that are kept and no other"


def _record_absence(session: Session) -> None:
    reason = "this profile has no adapter"
    cells: tuple[Cell, ...] = ("not available", reason)
    session.table("suite.adapters", ("adapter", "because"), [cells])
    counts = ("adapters", "kept", "dropped", "write_up", "failed", "answered")
    names = [*(f"count.{name}" for name in counts), *(f"gain.{name}" for name in GAINS)]
    names += ["rows", "ensemble.auc", "best_single.auc", "bytes.adapter", "bytes.result"]
    for name in names:
        session.measure(f"suite.{name}", None, reason=reason)
    session.text("suite.best_single.system", "none")
    for key in ("filters_agree", "beats_best", "filtering_pays"):
        session.verdict(f"suite.{key}", "not available", reason)


def _list_aucs(results: Results) -> dict[str, Estimate]:
    """AUC of the log-odds of the base, of each adapter that has one, and of the ensembles."""
    prompt = results.decided_by
    aucs = {BASE: results.base.readings[prompt].auc}
    for one in results.adapters:
        reading = one.scored.readings.get(prompt)
        aucs[one.scored.name] = reading.auc if reading else UNKNOWN
    return aucs | {ENSEMBLES[kind]: one.auc for kind, one in results.ensembles.items()}


def _row(one: Decided) -> tuple[Cell, ...]:
    scored, passed = one.scored, "passed" if one.write_up else "blocked"
    findings = f"{scored.checker}: {', '.join(scored.findings)}" if scored.findings else "fits"
    reading = scored.readings.get(PROMPT)
    head = (scored.name, one.verdict, passed)
    if reading is None:
        return (*head, None, one.because[0], None, None, None, None, findings)
    return (
        *head,
        say_estimate(reading.auc, "z.3f"),
        one.because[0],
        say_estimate(reading.auc_written, "z.3f"),
        round(reading.std, 3),
        round(reading.maximum, 2),
        None if reading.effect is None else round(reading.effect, 4),
        findings,
    )
