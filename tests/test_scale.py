import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmortem.experiments.records import Measure, Prediction, Provenance, RecordFile, Timing
from postmortem.suite.chapter import (
    ADAPTERS,
    ANSWERED,
    BASE_ASKED,
    COPIES,
    DIGESTS,
    LEAST,
    OVERHEAD,
    READ_BACK,
    SIZES,
    SNAKEMAKE,
    WORKER,
    WORKERS,
    Rates,
    Scale,
    add_scale,
    estimate_card_hours,
    read_rates,
)

RATES = Rates(
    rows=100,
    start=10.0,
    asked=0.5,
    digest=0.01,
    judged=0.002,
    adapter_bytes=2e6,
    result_bytes=3e3,
)


def recorded(*records) -> RecordFile:
    """A record file with these records."""
    provenance = Provenance(
        notebook="suite",
        case="c",
        profile="embedded",
        parameters={},
        digests={},
        versions={},
        device="cpu",
        dtype="float32",
        seed=0,
    )
    return RecordFile(path="r", provenance=provenance, records=records, digest="d")


SECONDS = {
    WORKER: 3.0,
    SNAKEMAKE: 2.0,
    "load base": 1.0,
    BASE_ASKED: 2.0,
    ANSWERED: 4.0,
    DIGESTS: 0.1,
    READ_BACK: 2.0,
}
MEASURES = {
    "suite.rows": 100,
    "suite.count.adapters": 10,
    "suite.count.answered": 8,
    "suite.bytes.adapter": 2e6,
    "suite.bytes.result": 3e3,
}


def run_of(**changes) -> RecordFile:
    """A kept record of the suite."""
    timings = [Timing(key=key, seconds=value) for key, value in SECONDS.items()]
    measures = [Measure(key=key, value=changes.get(key, v)) for key, v in MEASURES.items()]
    return recorded(*timings, *measures)


def values_with(file, **measures):
    """What is added to values that hold these measures."""
    values = {"measures": measures, "verdicts": {}, "texts": {}, "tables": {}}
    add_scale(values, file, recorded={})
    return values


def test_the_rates_are_those_of_the_record():
    """An adapter's seconds are those of the ones that answered; a job starts Snakemake twice."""
    found = read_rates(run_of())
    assert found == dataclasses.replace(RATES, start=10.0, judged=2.0 / COPIES)


def test_a_run_without_answers_has_no_rates():
    """Where no adapter answered, each number says why it is not there."""
    assert read_rates(None) is None
    file = run_of(**{"suite.count.answered": 0})
    assert read_rates(file) is None
    values = values_with(file)
    assert values["measures"]["scale.adapters"]["value"] == ADAPTERS
    assert values["measures"]["scale.core_hours"]["value"] is None
    assert "no adapter" in values["measures"]["scale.core_hours"]["reason"]
    assert values["tables"]["scale.plan"]["rows"][0][0] == "not available"


def test_the_same_keys_are_there_with_rates_and_without():
    """A page finds every number whether the run measured it or not."""
    keys = {
        frozenset(values_with(file)["measures"])
        for file in (None, run_of(), run_of(**{"suite.count.answered": 0}))
    }
    assert len(keys) == 1


@given(st.floats(0.01, 100), st.floats(0.001, 100))
def test_a_job_spends_no_more_than_its_share_on_its_start(start, asked):
    """Whatever the rates, the start of a job is at most its share, and a chunk has its least."""
    rates = dataclasses.replace(RATES, start=start, asked=asked)
    assert rates.chunk >= LEAST
    assert start <= OVERHEAD * (start + rates.chunk * asked) * (1 + 1e-9)


@given(st.integers(1, 10**6))
def test_jobs_hold_all_adapters(adapters):
    """The jobs are as many as needed and no more, and the workers share them out."""
    scale = Scale(adapters, RATES)
    assert (scale.jobs - 1) * RATES.chunk < adapters <= scale.jobs * RATES.chunk
    assert scale.hours <= scale.core_hours * (1 + 1e-9)
    assert scale.hours * WORKERS >= scale.core_hours * (1 - 1e-9)


def test_the_plan_adds_up():
    """Core-hours, bytes and the last step of a known suite are what a hand gets."""
    scale = Scale(10_000, RATES)
    chunk = math.ceil(10 * 0.95 / (0.05 * 0.5) / 10) * 10
    assert RATES.chunk == chunk == 380
    assert scale.jobs == 27
    assert scale.core_hours == pytest.approx((10_000 * 0.5 + 27 * 10) / 3600)
    assert scale.hours == pytest.approx((10 + 380 * 0.5) / 3600)
    assert (scale.read_gb, scale.results_gb) == pytest.approx((60, 0.03))
    assert scale.judging_minutes == pytest.approx(20 / 60)
    table = values_with(run_of())["tables"]["scale.plan"]
    assert [row[0] for row in table["rows"]] == [f"{size:,}" for size in SIZES]


def test_a_benchmark_gives_the_days_of_its_machine():
    """Rows a second on record turn into days for all adapters; without them there is none."""
    pace = {"value": ADAPTERS * 100 / (24 * 3600)}
    found = values_with(run_of(), **{"bench.v2.numeric.pace": pace})["measures"]
    assert found["scale.bench_days"]["value"] == pytest.approx(1)
    assert values_with(run_of())["measures"]["scale.bench_days"]["value"] is None


def test_the_estimate_for_a_card_takes_the_prompts_on_record():
    """Hours of a card grow with the tokens of the prompts; without a record there are none."""
    parts = dict.fromkeys(("system", "row_id", "group", "text", "stage"), "x")
    numbers = dict.fromkeys(("value", "expected_value", "number_log_odds", "yes_no_log_odds"), 0.0)
    rest = {"label": None, "token_ids": (), "finished": True, "strict_value": None}
    long, short = (
        Prediction(prompt=prompt, prompt_tokens=n, full_prompt_tokens=n, **parts, **numbers, **rest)
        for prompt, n in (("v2", 300), ("v1", 50))
    )
    hours = estimate_card_hours(recorded(long, short), 100)
    assert hours == pytest.approx(2 * 1.54e9 * ADAPTERS * 100 * 300 / 1e14 / 3600)
    assert estimate_card_hours(recorded(short), 100) is None
    assert estimate_card_hours(None, 100) is None
