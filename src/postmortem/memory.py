"""Running out of memory: the same work again in smaller batches, without what was done."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

from postmortem.errors import ModelError
from postmortem.prefill import SharedLayers
from postmortem.prompts import Prompt
from postmortem.scoring import Reply, Scores, batches, score, suited_batch

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
    done: dict[int, tuple[Reply, np.ndarray, np.ndarray]] = {}

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
        parts = (found.replies, found.first_log_probs, found.number_log_probs)
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
    replies, first, written = zip(*(done[index] for index in range(len(prompts))), strict=True)
    return Scores(replies, np.stack(first), np.stack(written))
