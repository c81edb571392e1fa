"""Scoring: from prompts to raw text and read-outs, in batches, the same on every model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from postmortem.errors import ModelError
from postmortem.prompts import Prompt

# The answers that the numeric read-outs spread probability over.
NUMBERS = tuple(f"{tenth / 10:.1f}" for tenth in range(11))
YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Reply:
    """What a model answered to one prompt.

    `finished` tells whether it ended its turn within the allowed tokens. Log-odds are natural
    logarithms in float64: `number_log_odds` is log(E / (1 - E)), with E the `expected_value` over
    the answers 0.0, 0.1, ... 1.0; `yes_no_log_odds` is log p(Yes) - log p(No).
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

    Both arrays are float64 log-probabilities: `first_log_probs` of the first answer token, of shape
    (prompts, vocabulary); `number_log_probs` of each whole answer in `NUMBERS`, (prompts, 11).
    """

    replies: tuple[Reply, ...]
    first_log_probs: np.ndarray
    number_log_probs: np.ndarray


def score(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[Prompt],
    lead: str,
    max_new_tokens: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Greedy text and read-outs of each prompt; one prefill serves both.

    `lead` stands between the prompt and the answer: nothing after a chat header, a space after a
    raw prompt. Batches hold prompts of like length, padded on the left, at most `batch_tokens`
    tokens each. `progress` is told how many prompts are done after each batch.
    """
    if not prompts:
        raise ModelError("scoring", expected="at least one prompt", found="none")
    candidates = [tokenizer(lead + text, add_special_tokens=False)["input_ids"] for text in NUMBERS]
    answers = [tokenizer(lead + text, add_special_tokens=False)["input_ids"] for text in YES_NO]
    ends = end_tokens(model, tokenizer)
    replies: dict[int, Reply] = {}
    first: dict[int, np.ndarray] = {}
    written: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for batch in batches([len(prompt.token_ids) for prompt in prompts], batch_tokens):
            state = _Prefill(model, [prompts[index].token_ids for index in batch])
            numbers = state.log_probs_of(candidates)
            yes_no = state.log_probs_of(answers)
            generated = state.generate(max_new_tokens, ends=ends)
            for place, index in enumerate(batch):
                ids, finished = generated[place]
                first[index] = state.first_log_probs[place].cpu().numpy()
                written[index] = numbers[place]
                replies[index] = Reply(
                    tokenizer.decode(ids, skip_special_tokens=True),
                    tuple(ids),
                    finished,
                    *number_read_outs(numbers[place]),
                    float(yes_no[place, 0] - yes_no[place, 1]),
                )
            progress(len(replies))
    order = range(len(prompts))
    return Scores(
        tuple(replies[i] for i in order),
        np.stack([first[i] for i in order]),
        np.stack([written[i] for i in order]),
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


class _Prefill:
    """A batch whose prompts have been read once: its cache serves read-outs and generation."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]]) -> None:
        width = max(map(len, rows))
        device = model.device
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
        pads = torch.tensor([width - len(row) for row in rows], device=device)
        self.model, self.rows, self.width = model, len(rows), width
        self.mask = (torch.arange(width, device=device)[None] >= pads[:, None]).long()
        self.lengths = self.mask.sum(1, keepdim=True)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        # Without padding no mask is needed, and attention takes its faster path.
        mask = self.mask if bool(pads.any()) else None
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.cache
        self.first_log_probs = _log_softmax(output.logits[:, -1])

    def step(self, tokens: torch.Tensor, *, taken: int) -> torch.Tensor:
        """Log-probabilities after each of `tokens` (rows, n), which follow `taken` earlier ones."""
        count = tokens.shape[1]
        extra = torch.ones(self.rows, taken + count, dtype=torch.long, device=tokens.device)
        places = torch.arange(taken, taken + count, device=tokens.device)[None]
        output = self.model(
            input_ids=tokens,
            attention_mask=torch.cat([self.mask, extra], 1),
            position_ids=self.lengths + places,
            cache=self.cache,
            use_cache=True,
        )
        return _log_softmax(output.logits)

    def log_probs_of(self, candidates: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probability of each candidate as the continuation, shape (rows, candidates).

        Candidates share stems ("0." of "0.3" and "0.7"); each longest stem is read once and
        then taken off the cache again.
        """
        total = self.first_log_probs[:, [ids[0] for ids in candidates]].clone()
        stems = {tuple(ids[:-1]) for ids in candidates if len(ids) > 1}
        longest = [s for s in stems if not any(s != t and t[: len(s)] == s for t in stems)]
        seen: dict[tuple[int, ...], torch.Tensor] = {}
        for stem in sorted(longest):
            tokens = torch.tensor([stem] * self.rows, device=total.device)
            after = self.step(tokens, taken=0)
            self.cache.crop(-len(stem))
            seen.update({stem[: end + 1]: after[:, end] for end in range(len(stem))})
        for column, ids in enumerate(candidates):
            for end in range(1, len(ids)):
                total[:, column] += seen[tuple(ids[:end])][:, ids[end]]
        return total.cpu().numpy()

    def generate(self, limit: int, *, ends: frozenset[int]) -> list[tuple[list[int], bool]]:
        """Greedy tokens of each row without the end token, and whether the row ended itself."""
        found: list[list[int]] = [[] for _ in range(self.rows)]
        finished = [False] * self.rows
        log_probs = self.first_log_probs
        for taken in range(limit):
            tokens = log_probs.argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                finished[row] = finished[row] or token in ends
                if not finished[row]:
                    found[row].append(token)
            if all(finished) or taken + 1 == limit:
                break
            log_probs = self.step(tokens[:, None], taken=taken)[:, -1]
        return list(zip(found, finished, strict=True))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float64, so that log-odds far from zero stay apart."""
    return torch.log_softmax(logits.double(), -1)
