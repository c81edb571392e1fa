"""Adapters written byte by byte, for tests only: PEFT would not write most of them."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "Qwen/Qwen2.5-1.5B",
}
# The sizes of that base, as its config.json has them.
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
}
# The sizes of a small decoder, under the names that most architectures have for them.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
}
SHAPES = {"lora_A": [2, 1536], "lora_B": [1536, 2]}


def header(layers: int = 28) -> dict[str, Any]:
    """The header of a sound adapter for Qwen2.5-1.5B on q_proj."""
    entries, position = {}, 0
    for layer in range(layers):
        for part, shape in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight"
            size = 2 * shape[0] * shape[1]
            offsets = [position, position + size]
            entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
            position += size
    return entries


def size_of(entries: dict[str, Any]) -> int:
    """Bytes of data that a header describes."""
    return max(entry["data_offsets"][1] for entry in entries.values())


def write(
    folder: Path, text: bytes | None = None, data: bytes | None = None, **config: Any
) -> Path:
    """Write an adapter of a raw header, raw data and changed configuration keys."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    text = json.dumps(header()).encode() if text is None else text
    body = np.full(size_of(header()) // 2, 0.01, "<f2").tobytes() if data is None else data
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder
