"""Reading prompts: the state of a model after them, with nothing computed twice.

Three things are shared. Prompts that begin alike read their beginning once. Systems that differ in
their upper layers alone share what the lower ones computed (`SharedLayers`). And what is read in
small batches, which a processor's caches like, is joined into large ones for the steps after it.

A batch is padded on the right where it can be: nothing before the padding sees it, so that no mask
is needed and attention leaves the half of its square that is in the future alone.
"""

# Annotations stay unread, so that the page of the toolbox is made without torch.
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Keys and values of one layer, each of shape (rows, heads, tokens, width).
KeyValues = tuple[torch.Tensor, torch.Tensor]
# Queries that a CPU attends with at once.
QUERIES = 64


@dataclass
class State:
    """Rows that a model has read: its cache, which cached tokens are real, and what comes next.

    `mask` is (rows, cached tokens) with 0 for padding, wherever it stands; `log_probs` are those of
    the next token in float64, (rows, vocabulary). `attention` names the function for more tokens.
    """

    model: Any
    cache: Any
    mask: torch.Tensor
    log_probs: torch.Tensor
    attention: str

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read `tokens` (rows, n) as well; logits after each, (rows, n, vocabulary)."""
        position = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        with attending(self.model, self.attention):
            output = self.model(
                input_ids=tokens,
                attention_mask=self.mask,
                position_ids=position + torch.arange(tokens.shape[1], device=tokens.device)[None],
                cache=self.cache,
                use_cache=True,
            )
        return output.logits

    def forget(self, count: int) -> None:
        """Take the last `count` tokens back."""
        self.cache.crop(-count)
        self.mask = self.mask[:, :-count]


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room behind them: new ones are written and no others copied.

    `buffers` are those of the keys and of the values, (rows, heads, places, width) each, of which
    the first `length` places hold something.
    """

    def __init__(self, buffers: KeyValues, *, length: int = 0) -> None:
        super().__init__()
        self.lazy_initialization(*buffers)
        self.buffers = buffers
        self._fill(length)

    def update(self, *states: torch.Tensor, **_: Any) -> KeyValues:
        """Keys and values with those of the new tokens, (rows, heads, tokens, width) each."""
        start = self.get_seq_length()
        end = start + states[0].shape[2]
        for buffer, new in zip(self.buffers, states, strict=False):
            buffer[:, :, start:end] = new
        return self._fill(end)

    def reset(self) -> None:
        """Forget what the buffers hold, and keep the room."""
        self._fill(0)

    def _fill(self, length: int) -> KeyValues:
        keys, values = self.buffers
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values


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
    """Reads prompts on one model that stays as it is.

    Where the model's layers keep plain keys and values, rows that begin alike have their first
    `prefix` tokens read once, and what the lower layers computed is taken from `shared`.
    """

    def __init__(self, model: Any, *, prefix: int = 0, shared: SharedLayers | None = None) -> None:
        self.plain = can_share(model)
        self.model, self.prefix = model, prefix if self.plain else 0
        serves = self.plain and shared is not None and shared.serve(model)
        self.shared = shared if serves else None
        self._prefixes: dict[tuple[int, ...], list[KeyValues]] = {}

    def read(
        self,
        batches: Sequence[Sequence[Sequence[int]]],
        *,
        room: int,
        progress: Callable[[int], None] = lambda count: None,
    ) -> State:
        """The state after all rows of token ids, with room for as many more tokens as `room`.

        Each batch is read at once, and `progress` is told its size after it. Each row has more
        than `prefix` tokens. A model whose layers keep other things takes one batch.
        """
        if not self.plain:
            (batch,) = batches
            state = self._read_masked([tuple(row) for row in batch])
            progress(len(batch))
            return state
        lengths = [len(row) for batch in batches for row in batch]
        places, start = max(lengths), 0
        buffers: list[KeyValues] = []
        first = []
        for batch in batches:
            cache = DynamicCache(config=self.model.config)
            if buffers:
                part = slice(start, start + len(batch))
                cache.layers = [RoomyLayer((keys[part], values[part])) for keys, values in buffers]
            first.append(self._read([tuple(row) for row in batch], self.prefix, cache))
            if not buffers:
                buffers = [
                    _room_for(one, len(lengths), places + room) for one in _key_values(cache)
                ]
            start += len(batch)
            progress(len(batch))
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer(pair, length=places) for pair in buffers]
        counts = torch.tensor(lengths, device=self.model.device)
        mask = (torch.arange(places, device=counts.device)[None] < counts[:, None]).long()
        return State(self.model, cache, mask, log_softmax(torch.cat(first)), GROUPED)

    def _read(self, rows: Sequence[tuple[int, ...]], prefix: int, cache: Any) -> torch.Tensor:
        """Logits of the next token, (rows, vocabulary), with keys and values put into `cache`.

        Padded on the right, where no token of a row sees it.
        """
        device = self.model.device
        tails = [torch.tensor(row[prefix:], device=device) for row in rows]
        ids = pad_sequence(tails, batch_first=True)
        if prefix:
            for layer, (keys, values) in enumerate(self._beginnings([r[:prefix] for r in rows])):
                cache.update(keys, values, layer)
        # Where rows end; each gets the logits at the others' ends as well, which are few.
        last = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        ends, column = torch.unique(last, return_inverse=True)
        settings = {
            "position_ids": prefix + torch.arange(ids.shape[1], device=device)[None],
            "cache": cache,
            "use_cache": True,
            "logits_to_keep": ends,
        }
        with attending(self.model, CAUSAL):
            logits = self._run(ids, cache, settings, key=(prefix, tuple(rows)))
        return logits[torch.arange(len(rows), device=device), column]

    def _read_masked(self, rows: Sequence[tuple[int, ...]]) -> State:
        """The state after rows that are padded on the left, as any model can be asked."""
        device = self.model.device
        tokens = [torch.tensor(row, device=device) for row in rows]
        ids = pad_sequence(tokens, batch_first=True, padding_side="left")
        ones = [torch.ones_like(row) for row in tokens]
        mask = pad_sequence(ones, batch_first=True, padding_side="left")
        cache = DynamicCache(config=self.model.config)
        cache.activate_past_recording()  # a layer that sees the last tokens alone forgets the rest
        logits = self.model(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        usual = self.model.config.get_text_config()._attn_implementation
        return State(self.model, cache, mask, log_softmax(logits[:, -1]), usual)

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
            cache = DynamicCache(config=self.model.config)
            self._read(new, 0, cache)
            layers = _key_values(cache)
            for place, ids in enumerate(new):
                self._prefixes[ids] = [
                    (k[place : place + 1], v[place : place + 1]) for k, v in layers
                ]
        for parts in zip(*(self._prefixes[ids] for ids in rows), strict=True):
            keys, values = zip(*parts, strict=True)
            yield torch.cat(keys), torch.cat(values)


def _room_for(first: KeyValues, rows: int, places: int) -> KeyValues:
    """Buffers of one layer for so many rows and places, which begin with the first rows' own.

    What is not written stays zero: the mask takes its weight, and zero times anything but a number
    would still be none.
    """
    keys, values = (side.new_zeros(rows, side.shape[1], places, side.shape[3]) for side in first)
    for buffer, side in zip((keys, values), first, strict=True):
        buffer[: len(side), :, : side.shape[2]] = side
    return keys, values


def _attend_causally(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Each token sees those before it; queries are the last tokens of the keys."""
    if options.get("position_bias") is not None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    before, count = key.shape[2] - query.shape[2], query.shape[2]
    settings: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if query.device.type != "cpu":
        # A GPU's kernels know the square alone: the queries of what was read before are put back.
        query = pad(query, (0, 0, before, 0))
        found = attention(query, key, value, is_causal=True, **settings)[:, :, before:]
        return found.transpose(1, 2).contiguous(), None
    # A CPU's computes what is in the future as well, less of it where the queries are few.
    parts = []
    for start in range(0, count, QUERIES):
        end = min(start + QUERIES, count)
        seen = torch.ones(end - start, before + end, dtype=torch.bool).tril(before + start)
        keys, values = key[:, :, : before + end], value[:, :, : before + end]
        asked = query[:, :, start:end]
        parts.append(attention(asked, keys, values, attn_mask=seen, **settings).transpose(1, 2))
    return torch.cat(parts, 1), None


def _attend_in_groups(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """A few tokens after many: the heads that share keys ask together, and no key is copied."""
    rows, heads, count, width = query.shape
    groups = heads // key.shape[1]
    if options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    query = query.reshape(rows, key.shape[1], groups * count, width)
    mask = mask if mask is None or count == 1 else mask.repeat(1, 1, groups, 1)
    found = attention(query, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, heads, count, -1).transpose(1, 2).contiguous(), None


CAUSAL, GROUPED = "postmortem_causal", "postmortem_grouped"
# Without a function for masks of its own, transformers makes none for the first.
AttentionInterface.register(CAUSAL, _attend_causally)
AttentionInterface.register(GROUPED, _attend_in_groups)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """Let a model attend by another function for the length of a `with` block."""
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = usual


def can_share(model: Any) -> bool:
    """Whether every layer keeps plain keys and values and attends by a function of our choice.

    Such keys and values may be cut, spread and joined.
    """
    config = model.config.get_text_config()
    layers = DynamicCache(config=model.config).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    # Models of an older make, such as Falcon, attend by functions of their own.
    chosen = getattr(model, "_supports_attention_backend", False)
    return plain and bool(chosen) and config._attn_implementation == "sdpa"


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
