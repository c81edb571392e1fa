"""What a suite of very many adapters takes, worked out from the rates of a run on record."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from postmortem.records import Cell, Measure, Prediction, RecordFile, Timing
from postmortem.values import Values, add_table

ADAPTERS = 100_000
SIZES = (200, 10_000, ADAPTERS)
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
STARTS = {WORKER: "postmortem.suite_scoring", SNAKEMAKE: "snakemake.cli"}
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
    largest = Scale(ADAPTERS, rates) if rates else None
    pace = values["measures"].get("bench.v2.numeric.pace", {}).get("value")
    for key, value in {
        **_list_fixed(),
        **_list_rates(rates),
        **_list_sizes(largest),
        "bench_days": ADAPTERS * rows / pace / 3600 / 24 if pace and rows else None,
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
        "adapters": ADAPTERS,
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
    tokens = ADAPTERS * rows * sum(lengths) / len(lengths)
    return 2 * PARAMETERS * tokens / CARD_FLOPS / 3600


def _round_up(number: float) -> int:
    """The next number of two digits."""
    unit = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return math.ceil(number / unit) * unit


def _short(number: float) -> float:
    """A number of two digits, which is all that a plan can promise."""
    return float(f"{number:.2g}")
