"""Shapes of published bases, with the source of each row."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Fine-tuned or requantised siblings whose module shapes are those of the row without the suffix.
_SUFFIXES = (
    *("-instruct", "-chat", "-hf", "-it", "-base", "-pt"),
    *("-gptq-int4", "-gptq-int8", "-gptq", "-awq", "-bnb-4bit", "-unsloth", "-fp8"),
)
_DIMENSIONS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size"),
)
# What config.json adds and the shape table has no column for.
_EXTRA: Mapping[str, Mapping[str, object]] = {
    "deberta-v2": {
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "type_vocab_size": 0,
        "position_biased_input": False,
    },
}


@dataclass(frozen=True, slots=True)
class KnownBase:
    """One published base: what its config.json says of shapes, and where that was read."""

    model_id: str
    config: Mapping[str, object]
    verified: bool
    source: str
    notes: str


def _read_row(row: Mapping[str, str]) -> KnownBase:
    config: dict[str, object] = {name: int(row[name]) for name in _DIMENSIONS}
    config |= {
        "model_type": row["model_type"],
        "tie_word_embeddings": row["tie_word_embeddings"] == "true",
        **_EXTRA.get(row["model_type"], {}),
    }
    verified = row["verified"] == "yes"
    return KnownBase(row["model_id"], config, verified, row["source"], row["notes"])


@cache
def known_bases() -> tuple[KnownBase, ...]:
    """Return every row of bases.csv; dimensions are in units (features, layers, heads, tokens)."""
    with Path(__file__).with_name("bases.csv").open(encoding="utf-8", newline="") as file:
        return tuple(_read_row(row) for row in csv.DictReader(file))


def family_name(model_id: str) -> str:
    """Reduce a model id to what fixes its shapes: no owner, no tuning or quantisation suffix."""
    name = model_id.rstrip("/").rsplit("/", 1)[-1].lower()
    while suffix := next((s for s in _SUFFIXES if name.endswith(s)), None):
        name = name.removesuffix(suffix)
    return name


def find_base(model_id: str) -> KnownBase | None:
    """Find the row of a model id, or of the sibling that its shapes come from; None if unknown.

    A path is unknown: a folder can be called anything.
    """
    if model_id.startswith(("/", ".", "~")) or "\\" in model_id or model_id.count("/") > 1:
        return None
    exact = {base.model_id.lower(): base for base in known_bases()}
    by_family = {family_name(base.model_id): base for base in reversed(known_bases())}
    return exact.get(model_id.lower()) or by_family.get(family_name(model_id))
