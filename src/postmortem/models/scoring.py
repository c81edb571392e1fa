"""Greedy text and read-outs of prompts, in batches that fit the memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from scipy.special import expit

from postmortem.case.prompts import Prompt
from postmortem.checker.errors import ModelError
from postmortem.models.prefill import Reader, SharedLayers, State, log_softmax, prefix_length

# The answers that the numeric read-outs spread probability over.
NUMBERS = tuple(f"{tenth / 10:.1f}" for tenth in range(11))
YES_NO = ("Yes", "No")
NOT_ASKED = np.full(len(NUMBERS), np.nan)
# Intermediate numbers of a layer that still lie in a processor's caches: 6 MiB of float32.
CACHED_NUMBERS = 3 << 19


@dataclass(frozen=True)
class Reply:
    """What a model answered to one prompt.

    `finished` tells whether it ended its turn within the allowed tokens. Log-odds are natural
    logarithms in float64: `number_log_odds` is log(E / (1 - E)), with E the `expected_value` over
    the answers 0.0, 0.1, ... 1.0; `yes_no_log_odds` is log p(Yes) - log p(No), or of the two
    answers that were asked for in their place. What was not asked for is NaN.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    expected_value: float
    number_log_odds: float
    yes_no_log_odds: float


@dataclass(frozen=True)
class Scores:
    """Replies in the order of the prompts.

    All arrays are float64 log-probabilities: `first_log_probs` of the first answer token, of shape
    (prompts, vocabulary); `number_log_probs` of each whole answer in `NUMBERS`, (prompts, 11), NaN
    where numbers were not asked for; `pair_log_probs` of the positive and the negative answer,
    (prompts, 2).
    """

    replies: tuple[Reply, ...]
    first_log_probs: np.ndarray
    number_log_probs: np.ndarray
    pair_log_probs: np.ndarray


def score(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[Prompt],
    lead: str,
    max_new_tokens: int,
    numbers: bool = True,
    answers: Sequence[str] = YES_NO,
    batch_tokens: int = 0,
    joined_tokens: int = 16384,
    shared: SharedLayers | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Greedy text and read-outs of each prompt; one prefill serves both.

    `lead` stands between the prompt and the answer: nothing after a chat header, a space after a
    raw prompt. Without `numbers` their read-out, which takes two more steps over the weights, is
    left out; `answers` are the positive and the negative one. Prompts are read in batches of like
    length of at most `batch_tokens` tokens (0: what suits the model and its device), and answered
    in joined ones of at most `joined_tokens`. Systems on one base that differ in their upper
    layers take what the lower ones computed from `shared`. `progress` is told how many prompts are
    done after each batch.
    """
    if not prompts:
        raise ModelError("scoring", expected="at least one prompt", found="none")
    candidates, pair = (
        [tokenizer(lead + text, add_special_tokens=False)["input_ids"] for text in texts]
        for texts in (NUMBERS if numbers else (), answers)
    )
    ends = end_tokens(model, tokenizer)
    room = max(max_new_tokens, *map(len, candidates), *map(len, pair))
    rows = [prompt.token_ids for prompt in prompts]
    batch_tokens = batch_tokens or suited_batch(model)
    reader = Reader(model, prefix=prefix_length(rows), shared=shared)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done)

    replies: dict[int, Reply] = {}
    first: dict[int, np.ndarray] = {}
    written: dict[int, np.ndarray] = {}
    paired: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        read = batches([len(row) - reader.prefix for row in rows], batch_tokens)
        for group in joined_batches(read, rows, joined_tokens if reader.plain else 0):
            batched = [[rows[index] for index in batch] for batch in group]
            state = reader.read(batched, room=room, progress=report)
            first_log_probs = state.log_probs.cpu().numpy()
            spread = log_probs_of(state, candidates)
            yes_no = log_probs_of(state, pair)
            generated = generate(state, max_new_tokens, ends=ends)
            for place, index in enumerate(index for batch in group for index in batch):
                ids, finished = generated[place]
                first[index] = first_log_probs[place]
                written[index] = spread[place] if numbers else NOT_ASKED
                paired[index] = yes_no[place]
                replies[index] = Reply(
                    tokenizer.decode(ids, skip_special_tokens=True),
                    tuple(ids),
                    finished,
                    *number_read_outs(written[index]),
                    float(yes_no[place, 0] - yes_no[place, 1]),
                )
    order = range(len(prompts))
    return Scores(
        tuple(replies[i] for i in order),
        np.stack([first[i] for i in order]),
        np.stack([written[i] for i in order]),
        np.stack([paired[i] for i in order]),
    )


def number_read_outs(log_probs: np.ndarray) -> tuple[float, float]:
    """Expected value over the eleven answers and its log-odds, from their log-probabilities.

    Both sums run in log space, so no probability saturates to 0 or 1; NaN gives NaN.
    """
    values = np.array([float(text) for text in NUMBERS])
    with np.errstate(divide="ignore", invalid="ignore"):
        high = np.logaddexp.reduce(log_probs + np.log(values))
        low = np.logaddexp.reduce(log_probs + np.log1p(-values))
    log_odds = float(high - low)
    return float(expit(log_odds)), log_odds


def score_classes(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[Prompt],
    positive: int,
    batch_tokens: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """A classifier's answers: the likeliest class by its name, and the log-odds of one class.

    `first_log_probs` is of shape (prompts, classes). Both log-odds of a reply are those of the
    class `positive` against all others, and `expected_value` is its probability.
    """
    if not prompts:
        raise ModelError("scoring", expected="at least one prompt", found="none")
    found: dict[int, np.ndarray] = {}
    rows = [list(prompt.token_ids) for prompt in prompts]
    with torch.inference_mode():
        for batch in batches([len(row) for row in rows], batch_tokens or suited_batch(model)):
            padded = tokenizer.pad(
                {"input_ids": [rows[i] for i in batch]}, padding_side="right", return_tensors="pt"
            )
            logits = model(**padded.to(model.device)).logits
            log_probs = torch.log_softmax(logits.double(), -1).cpu().numpy()
            found.update(zip(batch, log_probs, strict=True))
            progress(len(found))
    log_probs = np.stack([found[index] for index in range(len(rows))])
    others = np.logaddexp.reduce(np.delete(log_probs, positive, axis=1), axis=1)
    names = model.config.id2label
    replies = tuple(
        Reply(
            str(names.get(int(row.argmax()), int(row.argmax()))),
            (),
            True,
            float(expit(odds)),
            odds,
            odds,
        )
        for row, odds in zip(log_probs, (log_probs[:, positive] - others).tolist(), strict=True)
    )
    pair = np.stack([log_probs[:, positive], others], axis=1)
    return Scores(replies, log_probs, np.stack([NOT_ASKED] * len(rows)), pair)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length whose padded size stays within `batch_tokens`.

    A prompt longer than that makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end the turn, by the model's generation settings or its tokenizer."""
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(
        id_ for id_ in [*listed, tokenizer.eos_token_id] if id_ is not None and id_ >= 0
    )


def suited_batch(model: Any) -> int:
    """Tokens to read at once: a GPU wants many, a CPU as many as its caches hold in between."""
    if model.device.type != "cpu":
        return 16384
    width = getattr(model.config.get_text_config(), "intermediate_size", None) or 4096
    return int(min(max(CACHED_NUMBERS // width, 512), 8192))


def joined_batches(
    read: Iterable[list[int]], rows: Sequence[Sequence[int]], joined_tokens: int
) -> Iterator[list[list[int]]]:
    """Batches put together until their rows hold `joined_tokens`; at least one each."""
    group: list[list[int]] = []
    tokens = 0
    for batch in read:
        size = len(batch) * max(len(rows[index]) for index in batch)
        if group and tokens + size > joined_tokens:
            yield group
            group, tokens = [], 0
        group.append(batch)
        tokens += size
    if group:
        yield group


def log_probs_of(state: State, candidates: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-probability of each candidate as the continuation, shape (rows, candidates).

    Candidates share stems ("0." of "0.3" and "0.7"); each longest stem is read once and
    then taken off the cache again.
    """
    total = state.log_probs[:, [ids[0] for ids in candidates]].clone()
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    for stem in longest_stems(candidates):
        tokens = torch.tensor([stem] * len(total), device=total.device)
        after = log_softmax(state.step(tokens))
        state.forget(len(stem))
        seen.update({stem[: end + 1]: after[:, end] for end in range(len(stem))})
    for column, ids in enumerate(candidates):
        for end in range(1, len(ids)):
            total[:, column] += seen[tuple(ids[:end])][:, ids[end]]
    return total.cpu().numpy()


def longest_stems(candidates: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What has to be read to know every candidate's last token: no stem begins another."""
    stems = {tuple(ids[:-1]) for ids in candidates if len(ids) > 1}
    return sorted(s for s in stems if not any(s != t and t[: len(s)] == s for t in stems))


def generate(state: State, limit: int, *, ends: frozenset[int]) -> list[tuple[list[int], bool]]:
    """Greedy tokens of each row without the end token, and whether the row ended itself."""
    scores = state.log_probs
    found: list[list[int]] = [[] for _ in range(len(scores))]
    finished = [False] * len(scores)
    for taken in range(limit):
        tokens = scores.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            finished[row] = finished[row] or token in ends
            if not finished[row]:
                found[row].append(token)
        if all(finished) or taken + 1 == limit:
            break
        scores = state.step(tokens[:, None])[:, -1]
    return list(zip(found, finished, strict=True))


T = TypeVar("T")
# How torch words it on a CPU, where it has no exception of its own for it.
_ON_CPU = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_CPU)


def spare_memory(device: str) -> int:
    """A quarter of the bytes that are free on the device, for what may be kept to save time."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return int(psutil.virtual_memory().available) // 4


def with_budget(
    work: Callable[[int], T], *, budget: int, least: int, tell: Callable[[int], None]
) -> T:
    """Call `work` with a budget in tokens that is halved, down to `least`, while memory runs out.

    `tell` is given each smaller budget before it is tried. Raises `ModelError` with the budgets
    that were tried where the least is too much.
    """
    tried: list[int] = []
    while True:
        tried.append(budget)
        try:
            return work(budget)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Here and not above, where the error still holds the tensors of the failed attempt.
        torch.cuda.empty_cache()
        if budget <= least:
            raise ModelError(
                "memory",
                expected="room for the model and one prompt at a time",
                found=f"none left with batches of {', '.join(map(str, tried))} tokens",
                remedy="Free memory on the device, or give DTYPE=bfloat16 or DEVICE=cpu.",
            )
        budget = max(budget // 2, least)
        tell(budget)


def score_within_memory(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[Prompt],
    tell: Callable[[int], None],
    budget: int = 16384,
    shared: SharedLayers | None = None,
    progress: Callable[[int], None] = lambda done: None,
    **settings: Any,
) -> Scores:
    """The same as `score`, in smaller batches once memory runs out.

    `budget` is the most tokens in a batch. At first all prompts are scored in one call; after a
    failure each batch is a call of its own, is kept, and uses no more room for `shared`. `tell` is
    given each smaller budget, and `settings` go to `score`.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    done: dict[int, tuple[Reply, np.ndarray, np.ndarray, np.ndarray]] = {}

    def score_piece(piece: Sequence[int], tokens: int) -> None:
        before = len(done)
        found = score(
            model,
            tokenizer,
            prompts=[prompts[index] for index in piece],
            batch_tokens=min(suited_batch(model), tokens),
            joined_tokens=tokens,
            shared=shared if tokens == budget else None,
            progress=lambda count: progress(before + count),
            **settings,
        )
        parts = (
            found.replies,
            found.first_log_probs,
            found.number_log_probs,
            found.pair_log_probs,
        )
        done.update(zip(piece, zip(*parts, strict=True), strict=True))

    def work(tokens: int) -> None:
        left = [index for index in range(len(prompts)) if index not in done]
        if tokens == budget:
            score_piece(left, tokens)
            return
        if shared is not None:
            shared.clear()
        for places in batches([lengths[index] for index in left], tokens):
            score_piece([left[place] for place in places], tokens)

    with_budget(work, budget=budget, least=min(lengths, default=1), tell=tell)
    found = (done[index] for index in range(len(prompts)))
    replies, first, written, paired = zip(*found, strict=True)
    return Scores(replies, np.stack(first), np.stack(written), np.stack(paired))
