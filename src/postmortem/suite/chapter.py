"""The suite in the book: its answers, its filters, and what a large one would take."""

import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from postmortem.case.schema import AdapterFilter
from postmortem.experiments.measure import NO_LABELS, ONE_CLASS
from postmortem.experiments.metrics import Estimate, say_estimate
from postmortem.experiments.records import (
    Cell,
    Measure,
    Prediction,
    RecordFile,
    Timing,
    Values,
    add_table,
)
from postmortem.experiments.session import Session
from postmortem.models.loading import LoadedBase, load_base
from postmortem.models.world import ADAPTERS, World, digest_model, role_name
from postmortem.suite.results import Judged, Results, judge_suite
from postmortem.suite.scoring import Bench
from postmortem.suite.suite import Limit, Limits, Scored

PROMPT = "v2"
BASE = "base alone"
ENSEMBLES = {
    "kept": "ensemble of the kept",
    "write_up": "ensemble by the write-up",
    "all": "ensemble of all",
}
COLUMNS = (
    *("adapter", "verdict", "write-up's filter", "AUC, log-odds", "because", "AUC, written"),
    *("standard deviation", "maximum", "effect in nat", "checker"),
)
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
        session.verdict(f"suite.{key}", *judge_gain(list_gains(results)[name], lack=why))
    return results


def record_costs(session: Session, results: Results) -> None:
    """Record what a plan for many adapters needs: bytes of each, and how long a job takes to start.

    A job starts a worker, and Snakemake where another executor runs it.
    """
    adapters = world_adapters(session.world)
    answered = [j.scored for j in results.adapters if j.scored.status == "ok"]
    session.measure("suite.count.answered", len(answered))
    sizes = [sum(f.stat().st_size for f in adapters[s.name].iterdir()) for s in answered]
    lines = [s.model_dump_json() for s in answered]
    for name, found in {"adapter": sizes, "result": list(map(len, lines))}.items():
        mean = sum(found) / len(found) if found else None
        session.measure(f"suite.bytes.{name}", mean, unit="byte", reason=NONE)
    if not answered:
        return
    lines = [s.model_dump_json() for s in vary_results(answered, COPIES)]
    with session.timed(READ_BACK):
        again = judge_suite(
            results.base,
            [Scored.model_validate_json(line) for line in lines],
            labels=session.rows.labels,
            limits=results.limits,
            title=results.title,
            decided_by=PROMPT,
        )
        again.model_dump_json()
    for step, module in STARTS.items():
        with session.timed(step):
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def vary_results(scored: Sequence[Scored], count: int) -> Iterator[Scored]:
    """As many results as asked for, each with a name of its own and the twin of no other."""
    for number, found in zip(range(count), cycle(scored), strict=False):
        reading = found.readings[PROMPT]
        moved = [None if odds is None else odds + number / 100 for odds in reading.log_odds]
        readings = {PROMPT: reading.model_copy(update={"log_odds": moved})}
        yield found.model_copy(update={"name": f"{found.name} {number}", "readings": readings})


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


def judge_gain(gain: Estimate, *, lack: str) -> tuple[bool | None, str]:
    """Whether an ensemble ranks better: an interval that holds no change leaves it open."""
    if gain.value is None or gain.low is None or gain.high is None:
        return None, lack
    told = f"gain in AUC {say_estimate(gain, '+z.3f')}"
    return (True if gain.low > 0 else False if gain.high < 0 else None), told


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


MANY = 100_000
SIZES = (200, 10_000, MANY)
# Jobs at once, as many as the shipped profiles put in the queue.
WORKERS = 100
# The share of a job that may go into its start, and no fewer adapters in a chunk than these.
OVERHEAD, LEAST = 0.05, 25
# Each adapter's files are read for their digest, by the checker, and to be loaded.
READS = 3
# A job on an executor starts Snakemake on the node, and again below it.
SNAKEMAKES = 2
# The records of the suite's notebook: the start of a process by what it loads, and its steps.
WORKER, SNAKEMAKE = "suite: start of a worker", "suite: start of Snakemake"
STARTS = {WORKER: "postmortem.suite.scoring", SNAKEMAKE: "snakemake.cli"}
BASE_ASKED, DIGESTS = "suite: base asked", "suite: digests"
ANSWERED, READ_BACK = "suite: adapters that answer", "suite: results read back and judged"
COPIES = 1000
# The estimate for a card: the parameters of Qwen2.5-1.5B, and about a tenth of what a current
# card multiplies at its best in 16 bits. An assumption, since none of this ran on one.
PARAMETERS, CARD_FLOPS, PROFILE = 1.54e9, 1e14, "qwen-coder"
NONE = "the suite's notebook measured no adapter that answers"


@dataclass(frozen=True)
class Rates:
    """What was measured: seconds and bytes of one adapter, seconds of a job's start."""

    rows: int
    start: float
    asked: float
    digest: float
    judged: float
    adapter_bytes: float
    result_bytes: float

    @property
    def chunk(self) -> int:
        """Adapters in a job whose start takes no more than its share."""
        needed = self.start * (1 - OVERHEAD) / (OVERHEAD * self.asked)
        return max(LEAST, _round_up(needed))


@dataclass(frozen=True)
class Scale:
    """A suite of so many adapters: its jobs, core-hours, hours with all workers, and GB."""

    adapters: int
    rates: Rates

    @property
    def jobs(self) -> int:
        """Chunks."""
        return math.ceil(self.adapters / self.rates.chunk)

    @property
    def core_hours(self) -> float:
        """Hours of one core for all jobs."""
        return (self.adapters * self.rates.asked + self.jobs * self.rates.start) / 3600

    @property
    def hours(self) -> float:
        """Hours from the first job to the last, the slowest worker's."""
        turns = math.ceil(self.jobs / WORKERS)
        job = self.rates.start + self.rates.asked * min(self.rates.chunk, self.adapters)
        return turns * job / 3600

    @property
    def read_gb(self) -> float:
        """What is read of the adapters' files in all."""
        return READS * self.adapters * self.rates.adapter_bytes / 1e9

    @property
    def results_gb(self) -> float:
        """What the chunks' files hold."""
        return self.adapters * self.rates.result_bytes / 1e9

    @property
    def digest_minutes(self) -> float:
        """How long the command reads the adapters before the first job."""
        return self.adapters * self.rates.digest / 60

    @property
    def judging_minutes(self) -> float:
        """How long the last step takes."""
        return self.adapters * self.rates.judged / 60


def read_rates(file: RecordFile | None) -> Rates | None:
    """The rates of the kept suite; None where no adapter of its answered."""
    if file is None:
        return None
    seconds = {record.key: record.seconds for record in file.of(Timing)}
    measures = {record.key: record.value or 0.0 for record in file.of(Measure)}
    answered = measures.get("suite.count.answered", 0)
    if not answered:
        return None
    start = seconds[WORKER] + SNAKEMAKES * seconds[SNAKEMAKE]
    return Rates(
        rows=int(measures["suite.rows"]),
        start=start + seconds["load base"] + seconds[BASE_ASKED],
        asked=seconds[ANSWERED] / answered,
        digest=seconds[DIGESTS] / measures["suite.count.adapters"],
        judged=seconds[READ_BACK] / COPIES,
        adapter_bytes=measures["suite.bytes.adapter"],
        result_bytes=measures["suite.bytes.result"],
    )


def add_scale(
    values: Values,
    file: RecordFile | None,
    *,
    recorded: Mapping[str, RecordFile],
) -> None:
    """Add the plan for many adapters: from the kept suite's rates, the benchmark's, an estimate."""
    rates = read_rates(file)
    rows = rates.rows if rates else 0
    largest = Scale(MANY, rates) if rates else None
    pace = values["measures"].get("bench.v2.numeric.pace", {}).get("value")
    for key, value in {
        **_list_fixed(),
        **_list_rates(rates),
        **_list_sizes(largest),
        "bench_days": MANY * rows / pace / 3600 / 24 if pace and rows else None,
        "card_hours": estimate_card_hours(recorded.get(PROFILE), rows),
    }.items():
        reason = NONE if value is None else ""
        values["measures"][f"scale.{key}"] = Measure(
            key="-", value=value, reason=reason
        ).model_dump()
    add_table(values, "scale.plan", PLAN, _list_plans(rates))


PLAN = (
    *("adapters", "in a chunk", "jobs", "core-hours", f"hours, {WORKERS} at once"),
    *("GB read", "GB of results"),
)


def _list_plans(rates: Rates | None) -> Iterable[tuple[Cell, ...]]:
    if rates is None:
        return [("not available", *[None] * (len(PLAN) - 1))]
    return [
        (
            *(f"{s.adapters:,}", min(rates.chunk, s.adapters), s.jobs),
            *map(_short, (s.core_hours, s.hours, s.read_gb, s.results_gb)),
        )
        for s in (Scale(size, rates) for size in SIZES)
    ]


def _list_fixed() -> dict[str, float]:
    return {
        "adapters": MANY,
        "workers": WORKERS,
        "overhead": OVERHEAD * 100,
        "reads": READS,
        "card_tflops": CARD_FLOPS / 1e12,
    }


def _list_rates(rates: Rates | None) -> dict[str, float | None]:
    names = ("start", "asked", "digest_ms", "judged_ms", "adapter_kb", "result_kb", "chunk")
    if rates is None:
        return dict.fromkeys(names)
    milliseconds = (rates.digest * 1000, rates.judged * 1000)
    kilobytes = (rates.adapter_bytes / 1000, rates.result_bytes / 1000)
    found = (rates.start, rates.asked, *milliseconds, *kilobytes, rates.chunk)
    return dict(zip(names, found, strict=True))


def _list_sizes(largest: Scale | None) -> dict[str, float | None]:
    names = ("jobs", "core_hours", "hours", "read_gb", "results_gb")
    judged = ("digest_minutes", "judging_minutes")
    return {name: getattr(largest, name) if largest else None for name in (*names, *judged)}


def estimate_card_hours(kept: RecordFile | None, rows: int) -> float | None:
    """Hours of a card for all adapters on a base of 1.5 billion parameters; an estimate.

    Two operations for each parameter and token of the prompts on record, at `CARD_FLOPS`.
    """
    lengths = [p.prompt_tokens for p in kept.of(Prediction) if p.prompt == "v2"] if kept else []
    if not lengths or not rows:
        return None
    tokens = MANY * rows * sum(lengths) / len(lengths)
    return 2 * PARAMETERS * tokens / CARD_FLOPS / 3600


def _round_up(number: float) -> int:
    """The next number of two digits."""
    unit = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return math.ceil(number / unit) * unit


def _short(number: float) -> float:
    """A number of two digits, which is all that a plan can promise."""
    return float(f"{number:.2g}")
