"""How fast answers come: the incident's own loop beside other ways, as ratios within one run."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import pandas as pd
import psutil
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from postmortem.case.prompts import Prompt, encode, lead_of
from postmortem.case.schema import PromptTemplate
from postmortem.experiments.records import Cell
from postmortem.experiments.session import Session
from postmortem.models.loading import LoadedBase
from postmortem.models.prefill import prefix_length
from postmortem.models.scoring import NUMBERS, batches, longest_stems, score, suited_batch

Result = TypeVar("Result")
NEW_TOKENS = 10  # as many as the incident's second attempt
BATCH_ROWS = 8
ROWS, ROUNDS = 32, 3
LENGTHS = (64, 128, 256, 512, 1024)
BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)
COUNTS = (1, 4, 16, 64)
INCIDENT, BATCHED, NUMERIC, READ_OUT = "incident", "batched", "numeric", "readout"
TITLES = {
    INCIDENT: "one row at a time, generate(10)",
    BATCHED: "rows in batches, generate(10)",
    NUMERIC: "ours: read-outs and text",
    READ_OUT: "ours: read-outs alone",
}
# Kinds of work by what torch calls them; the rest is "other".
KINDS = {
    "matrix products": ("addmm", "::mm", "linear", "matmul", "bmm"),
    "attention": ("attention",),
    "copies": ("copy", "::cat", "contiguous"),
    "elementwise": ("mul", "add", "silu", "pow", "mean", "rsqrt", "neg", "sub", "softmax"),
}


def record_bench(session: Session) -> None:
    """Time every way on both prompts, in turn, and record ratios, shares and memory."""
    base = session.base
    whole = {name: _encode_rows(session, name) for name in ("v2", "yes_no")}
    prompts = {name: asked[:ROWS] for name, asked in whole.items()}
    rounds: list[dict[str, Any]] = []
    texts: dict[tuple[str, str], list[str]] = {}
    for turn in range(ROUNDS):
        for name, asked in prompts.items():
            ways = list(ways_of(base, asked, session.case.prompts[name]).items())
            # Each round begins with another way, so that none always runs on a cold machine.
            for way, run in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                texts[name, way], measured = measure(base.model, run)
                rounds.append({"round": turn, "prompt": name, "way": way, **measured})
        session.say(f"round {turn + 1} of {ROUNDS}")
    frame = pd.DataFrame(rounds)
    session.measure("bench.gemm", float(frame.gemm.median()) / 1e9, unit="GFLOP/s")
    session.measure("bench.rows", len(prompts["v2"]), unit="rows")
    session.measure("bench.rounds", ROUNDS)
    _record_ways(session, prompts, frame)
    same = [a == b for a, b in zip(texts["v2", INCIDENT], texts["v2", NUMERIC], strict=True)]
    session.verdict(
        "bench.same_text", all(same), f"{sum(same)} of {len(same)} texts are those of generate"
    )
    gap = log_odds_gap(base, prompts["yes_no"])
    session.measure("bench.log_odds_gap", gap, unit="nat")
    session.verdict("bench.same_log_odds", gap < 1e-4, f"they differ by {gap:.1g} at most")
    _record_scaling(session, base, whole["v2"])
    _record_profile(session, base, prompts["v2"])


def _encode_rows(session: Session, name: str) -> list[Prompt]:
    template, tokenizer = session.case.prompts[name], session.base.tokenizer
    rows = (session.rows.row(index) for index in range(max(ROWS, *COUNTS)))
    return [encode(template, row, tokenizer=tokenizer, limit=512) for row in rows]


def ways_of(
    base: LoadedBase, prompts: Sequence[Prompt], template: PromptTemplate
) -> dict[str, Callable[[], list[str]]]:
    """Each way to answer the prompts, as something to run that returns the texts.

    The read-outs alone are those that the prompt's contract asks for.
    """

    def ours(count: int, *, numbers: bool = True) -> list[str]:
        scores = score(
            base.model,
            base.tokenizer,
            prompts=prompts,
            lead=lead_of(template),
            max_new_tokens=count,
            numbers=numbers,
        )
        return [reply.text for reply in scores.replies]

    return {
        INCIDENT: lambda: generate_rows(base, prompts, size=1),
        BATCHED: lambda: generate_rows(base, prompts, size=BATCH_ROWS),
        NUMERIC: lambda: ours(NEW_TOKENS),
        READ_OUT: lambda: ours(1, numbers=template.contract == "number"),
    }


def generate_rows(base: LoadedBase, prompts: Sequence[Prompt], *, size: int) -> list[str]:
    """Texts by the library's own `generate`, `size` prompts at a time, padded on the left."""
    texts = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(len(prompt.token_ids) for prompt in batch)
        pads = [width - len(prompt.token_ids) for prompt in batch]
        ids = torch.tensor([(0,) * n + p.token_ids for n, p in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads])
        with torch.inference_mode():
            answers = base.model.generate(
                input_ids=ids.to(base.model.device),
                attention_mask=mask.to(base.model.device),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        texts += base.tokenizer.batch_decode(answers[:, width:], skip_special_tokens=True)
    return texts


def log_odds_gap(base: LoadedBase, prompts: Sequence[Prompt]) -> float:
    """The largest difference between our Yes/No log-odds and those of a plain forward, in nats."""
    yes, no = (
        base.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")
    )
    scores = score(base.model, base.tokenizer, prompts=prompts, lead="", max_new_tokens=1)
    gaps = []
    for prompt, reply in zip(prompts, scores.replies, strict=True):
        ids = torch.tensor([prompt.token_ids], device=base.model.device)
        with torch.inference_mode():
            logits = base.model(input_ids=ids).logits[0, -1].double()
        gaps.append(abs(float(logits[yes] - logits[no]) - reply.yes_no_log_odds))
    return max(gaps)


def layer_weights(model: Any) -> list[torch.Tensor]:
    """The weight matrices of the layers, in order."""
    return [p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]


def gemm_rate(model: Any, tokens: int, *, seconds: float = 1.0) -> float:
    """FLOP/s of the layers' matrix products alone, on as many tokens as a batch holds."""
    weights = layer_weights(model)
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=w.dtype) for w in weights}
    inputs = {width: one.to(model.device) for width, one in inputs.items()}
    rates: list[float] = []
    flops = 2 * tokens * sum(w.numel() for w in weights)
    with torch.inference_mode():
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds or len(rates) < 3:
            start = time.perf_counter()
            for weight in weights:
                functional.linear(inputs[weight.shape[1]], weight)
            rates.append(flops / (time.perf_counter() - start))
    return statistics.median(rates)


def reading_flops(model: Any, prompts: Sequence[Prompt], *, stems: int = 0) -> float:
    """FLOP that reading the prompts takes: shared beginnings once, no padding, one row of logits.

    Two for each weight of a layer and token; attention sees half of the square. `stems` counts the
    tokens that the read-outs read after each prompt, with a row of logits each.
    """
    config = model.config.get_text_config()
    rows = [prompt.token_ids for prompt in prompts]
    prefix = prefix_length(rows)
    beginnings = {row[:prefix] for row in rows}
    lengths = [(len(row) - prefix, len(row)) for row in rows]
    lengths += [(prefix, prefix)] * len(beginnings) if prefix else []
    per_token = 2 * sum(weight.numel() for weight in layer_weights(model))
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # New tokens times those that they look at on average, for scores and for values.
    looks = sum(new * (whole - new / 2) for new, whole in lengths)
    looks += stems * sum(map(len, rows))
    attention = 4 * config.num_hidden_layers * width * looks
    head = 2 * config.vocab_size * config.hidden_size * (len(lengths) + stems * len(rows))
    tokens = sum(new for new, _ in lengths) + stems * len(rows)
    return float(per_token * tokens + attention + head)


def add_ratios(rounds: pd.DataFrame, flops: Mapping[tuple[str, str], float]) -> pd.DataFrame:
    """Rounds with their ratio to the incident's loop and their share of the matrix products' rate.

    Both are taken within a round, so that a slow spell of the machine slows both sides. `flops` are
    those of each prompt and way.
    """
    loop = rounds[(rounds.prompt == "v2") & (rounds.way == INCIDENT)].set_index("round").seconds
    keys = zip(rounds.prompt, rounds.way, strict=True)
    return rounds.assign(
        ratio=rounds["round"].map(loop) / rounds.seconds,
        share=pd.Series([flops[key] for key in keys]) / rounds.seconds / rounds.gemm,
    )


def _record_ways(
    session: Session, prompts: Mapping[str, Sequence[Prompt]], rounds: pd.DataFrame
) -> None:
    flops = {}
    for name, way in set(zip(rounds.prompt, rounds.way, strict=True)):
        ours = way in (NUMERIC, READ_OUT)
        reads_numbers = ours and session.case.prompts[name].contract == "number"
        stems = _stem_tokens(session.base.tokenizer) if reads_numbers else 0
        flops[name, way] = reading_flops(session.base.model, prompts[name], stems=stems)
    rounds = add_ratios(rounds, flops)
    table: list[tuple[Cell, ...]] = []
    for (name, way), own in rounds.groupby(["prompt", "way"], sort=False):
        pace = float((len(prompts[name]) / own.seconds).median())
        ratio, share = float(own.ratio.median()), float(own.share.median())
        memory = float(own.peak.max()) / 2**20
        key = f"bench.{name}.{way}"
        session.measure(f"{key}.pace", pace, unit="rows/s")
        session.measure(f"{key}.ratio", ratio)
        session.measure(f"{key}.share", share)
        session.measure(f"{key}.memory", memory, unit="MiB")
        spread = f"{own.ratio.min():.2f} to {own.ratio.max():.2f}"
        numbers = (round(pace, 2), round(ratio, 2), spread, round(share, 2), round(memory))
        table.append((name, TITLES[way], *numbers))
    columns = ("prompt", "way", "rows/s", "times the loop", "over rounds", "share of GEMM", "MiB")
    session.table("bench.ways", columns, table)
    read_outs = rounds[rounds.way == READ_OUT].groupby("prompt").share.median()
    session.measure("bench.share", float(read_outs.min()))


def _stem_tokens(tokenizer: Any) -> int:
    """How many tokens the number's read-out reads after a prompt of a chat."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in NUMBERS]
    return sum(map(len, longest_stems(ids)))


def _record_scaling(session: Session, base: LoadedBase, prompts: Sequence[Prompt]) -> None:
    """Pace of reading, up to Yes and No, by number of rows, by prompt length and by batch."""
    ids = [token for prompt in prompts for token in prompt.token_ids]
    by_length = {
        length: [Prompt("", tuple(ids[i * 7 : i * 7 + length]), length) for i in range(8)]
        for length in LENGTHS
    }
    few = prompts[:ROWS]
    tables = {
        ("bench.by_rows", "rows"): [(n, *_pace(base, prompts[:n])) for n in COUNTS],
        ("bench.by_length", "prompt tokens"): [(n, *_pace(base, by_length[n])) for n in LENGTHS],
        ("bench.by_batch", "tokens at once"): [
            (size, *_pace(base, few, batch_tokens=size)) for size in BATCHES
        ],
    }
    for (key, column), rows in tables.items():
        session.table(key, (column, "rows/s", "tokens/s", "share of GEMM"), rows)
    session.measure("bench.suited_batch", suited_batch(base.model), unit="tokens")


def _pace(
    base: LoadedBase, prompts: Sequence[Prompt], *, batch_tokens: int = 0
) -> tuple[Cell, ...]:
    run = partial(
        score,
        base.model,
        base.tokenizer,
        prompts=prompts,
        lead="",
        max_new_tokens=1,
        numbers=False,
        batch_tokens=batch_tokens,
    )
    _, measured = measure(base.model, run)
    seconds = measured["seconds"]
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    share = reading_flops(base.model, prompts) / seconds / measured["gemm"]
    return (round(len(prompts) / seconds, 2), round(tokens / seconds), round(share, 2))


def _record_profile(session: Session, base: LoadedBase, prompts: Sequence[Prompt]) -> None:
    """Where the time of a batch of prompts goes, by kind of work."""
    rows = [prompt.token_ids for prompt in prompts]
    batch = next(batches([len(row) for row in rows], suited_batch(base.model)))
    ids = torch.tensor([rows[index][-min(len(rows[i]) for i in batch) :] for index in batch])
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as trace:
        base.model(input_ids=ids.to(base.model.device), use_cache=True, logits_to_keep=1)
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in trace.key_averages():
        kinds = (kind for kind, parts in KINDS.items() if any(p in event.key for p in parts))
        spent[next(kinds, "other")] += event.self_cpu_time_total
    total = sum(spent.values())
    shares = [(kind, f"{time_spent / total:.0%}") for kind, time_spent in spent.items()]
    session.table("bench.profile", ("work", "share of the time"), shares)


def measure(model: Any, run: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """Run something; what it returns, and its seconds, peak and gemm.

    `peak` is the most memory in bytes that the process took above its start, `gemm` the machine's
    FLOP/s around the run: a shared machine is fast and slow by turns.
    """
    process, done, size = psutil.Process(), threading.Event(), suited_batch(model)
    rate = gemm_rate(model, size, seconds=0.3)
    before = process.memory_info().rss
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        result = run()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    rate = (rate + gemm_rate(model, size, seconds=0.3)) / 2
    return result, {"seconds": seconds, "peak": peak, "gemm": rate}
