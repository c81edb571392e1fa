"""Reading prompts: the state of a model after them, with nothing computed twice.

Three things are shared. Prompts that begin alike read their beginning once. Systems that differ in
their upper layers alone share what the lower ones computed (`SharedLayers`). And what is read in
small batches, which a processor's caches like, is joined into large ones for the steps after it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Keys and values of one layer, each of shape (rows, heads, tokens, width).
KeyValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class State:
    """Rows that a model has read: its cache, which cached tokens are real, and what comes next.

    `mask` is (rows, cached tokens) with 0 for padding on the left; `log_probs` are those of the
    next token in float64, (rows, vocabulary).
    """

    model: Any
    cache: Any
    mask: torch.Tensor
    log_probs: torch.Tensor

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read `tokens` (rows, n) as well; log-probabilities after each, (rows, n, vocabulary)."""
        position = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=position + torch.arange(tokens.shape[1], device=tokens.device)[None],
            cache=self.cache,
            use_cache=True,
        )
        return log_softmax(output.logits)

    def forget(self, count: int) -> None:
        """Take the last `count` tokens back."""
        self.cache.crop(-count)
        self.mask = self.mask[:, :-count]


class SharedLayers:
    """What a base's lowest `depth` layers compute, kept for systems that leave them alone.

    One object belongs to one base, whose weights must not change while it is in use. At most
    `limit` bytes are kept; what came first goes first.
    """

    def __init__(self, depth: int, *, limit: int) -> None:
        self.depth, self.limit = depth, limit
        self._kept: dict[Any, tuple[torch.Tensor, list[KeyValues]]] = {}

    def serve(self, model: Any) -> bool:
        """Whether the adapters that answer leave the lowest layers alone."""
        layered = hasattr(decoder_of(model), "layers")
        return layered and self.depth > 0 and lowest_adapted_layer(model) >= self.depth

    def get(self, key: Any) -> tuple[torch.Tensor, list[KeyValues]] | None:
        """The hidden state above the lower layers, and their keys and values."""
        return self._kept.get(key)

    def put(self, key: Any, hidden: torch.Tensor, layers: list[KeyValues]) -> None:
        """Keep both for the next system."""
        self._kept[key] = (hidden, layers)
        while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > self.limit:
            del self._kept[next(iter(self._kept))]

    def clear(self) -> None:
        """Let go of everything, where memory is short."""
        self._kept.clear()


def lowest_adapted_layer(model: Any) -> int:
    """The lowest layer that an answering adapter changes; 0 where it changes more than layers.

    A model without an adapter changes none: the number of its layers.
    """
    lowest = int(model.config.get_text_config().num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            answers = bool(module.active_adapters) and not module.disable_adapters
            layer = re.search(r"\.layers\.(\d+)\.", name)
            lowest = min(lowest, int(layer[1]) if layer else 0) if answers else lowest
    return lowest


def layers_below(adapters: Iterable[Path]) -> int:
    """How many of the lowest layers none of the adapter folders names; 0 where one names all.

    A config that cannot be read, or names its layers in another way, is taken to name all.
    """
    named = []
    for folder in adapters:
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            layers = config.get("layers_to_transform") or 0
            named.append(int(layers if isinstance(layers, int) else min(layers)))
        except (OSError, ValueError, TypeError, AttributeError):
            named.append(0)
    return max(min(named, default=0), 0)


class Reader:
    """Reads prompts on one model that stays as it is; equal first `prefix` tokens are read once."""

    def __init__(self, model: Any, *, prefix: int, shared: SharedLayers | None = None) -> None:
        self.model, self.prefix = model, prefix
        self.shared = shared if shared is not None and shared.serve(model) else None
        self._prefixes: dict[tuple[int, ...], list[KeyValues]] = {}

    def read(self, rows: Sequence[Sequence[int]]) -> State:
        """The state after each row of token ids; each has more than `prefix` of them."""
        return self._read([tuple(row) for row in rows], self.prefix)

    def _read(self, rows: Sequence[tuple[int, ...]], prefix: int) -> State:
        device = self.model.device
        tails = [row[prefix:] for row in rows]
        width = max(map(len, tails))
        ids = torch.tensor([(0,) * (width - len(tail)) + tail for tail in tails], device=device)
        pads = torch.tensor([width - len(tail) for tail in tails], device=device)
        mask = (torch.arange(width, device=device)[None] >= pads[:, None]).long()
        positions = prefix + (mask.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([mask.new_ones(len(rows), prefix), mask], 1)
        cache = DynamicCache(config=self.model.config)
        if prefix:
            for layer, (keys, values) in enumerate(self._beginnings([r[:prefix] for r in rows])):
                cache.update(keys, values, layer)
        # Without padding no mask is needed, and attention takes its faster path.
        settings = {
            "attention_mask": mask if bool(pads.any()) else None,
            "position_ids": positions,
            "cache": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        logits = self._run(ids, cache, settings, key=(prefix, tuple(rows)))
        return State(self.model, cache, mask, log_softmax(logits[:, -1]))

    def _run(
        self, ids: torch.Tensor, cache: Any, settings: dict[str, Any], *, key: Any
    ) -> torch.Tensor:
        if self.shared is None:
            return self.model(input_ids=ids, **settings).logits
        depth, known = self.shared.depth, self.shared.get(key)
        if known is None:
            with _watch(self.model, depth) as seen:
                logits = self.model(input_ids=ids, **settings).logits
            self.shared.put(key, seen[0], _key_values(cache)[:depth])
            return logits
        hidden, lower = known
        with only_upper(self.model, depth):
            logits = self.model(inputs_embeds=hidden, **settings).logits
        # Only now: the mask of the upper layers was made for what the cache held before.
        for layer, (keys, values) in zip(cache.layers, lower, strict=False):
            layer.reset()
            layer.update(keys, values)
        return logits

    def _beginnings(self, rows: Sequence[tuple[int, ...]]) -> Iterator[KeyValues]:
        """Keys and values of each layer after each row, of which new ones are read together."""
        new = [ids for ids in dict.fromkeys(rows) if ids not in self._prefixes]
        if new:
            layers = _key_values(self._read(new, 0).cache)
            for place, ids in enumerate(new):
                self._prefixes[ids] = [
                    (k[place : place + 1], v[place : place + 1]) for k, v in layers
                ]
        for parts in zip(*(self._prefixes[ids] for ids in rows), strict=True):
            keys, values = zip(*parts, strict=True)
            yield torch.cat(keys), torch.cat(values)


def join(states: Sequence[State]) -> State:
    """One state of all rows, in order, padded on the left."""
    if len(states) == 1:
        return states[0]
    width = max(state.mask.shape[1] for state in states)
    missing = [width - state.mask.shape[1] for state in states]
    cache = DynamicCache(config=states[0].model.config)
    layers = zip(*(_key_values(state.cache) for state in states), strict=True)
    for index, parts in enumerate(layers):
        keys, values = (
            torch.cat([pad(one, (0, 0, lack, 0)) for one, lack in zip(side, missing, strict=True)])
            for side in zip(*parts, strict=True)
        )
        cache.update(keys, values, index)
    return State(
        states[0].model,
        cache,
        torch.cat([pad(s.mask, (lack, 0)) for s, lack in zip(states, missing, strict=True)]),
        torch.cat([state.log_probs for state in states]),
    )


def can_share(model: Any) -> bool:
    """Whether every layer keeps plain keys and values, which may be cut, spread and joined."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens to read once for all rows that share them, so that most are saved.

    At least one token of each row is left to be read.
    """
    best, saved = 0, 0
    for length in range(1, min(map(len, rows))):
        groups = len({tuple(row[:length]) for row in rows})
        if length * (len(rows) - groups) > saved:
            best, saved = length, length * (len(rows) - groups)
    return best


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float64, so that log-odds far from zero stay apart."""
    return torch.log_softmax(logits.double(), -1)


@contextmanager
def only_upper(model: Any, depth: int) -> Iterator[None]:
    """Leave the lowest `depth` layers out, so that hidden states above them can be put in."""
    decoder = decoder_of(model)
    layers = decoder.layers
    decoder.layers = layers[depth:]
    try:
        yield
    finally:
        decoder.layers = layers


def decoder_of(model: Any) -> Any:
    """The stack of layers of a causal model, whatever adapter is on it."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.model


@contextmanager
def _watch(model: Any, depth: int) -> Iterator[list[torch.Tensor]]:
    """What enters the layer at `depth`."""
    seen: list[torch.Tensor] = []
    hook = (
        decoder_of(model)
        .layers[depth]
        .register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    )
    try:
        yield seen
    finally:
        hook.remove()


def _key_values(cache: Any) -> list[KeyValues]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _size(kept: tuple[torch.Tensor, list[KeyValues]]) -> int:
    return kept[0].nbytes + sum(keys.nbytes + values.nbytes for keys, values in kept[1])
