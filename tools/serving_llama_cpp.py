"""Convert adapters with llama.cpp's converter, and print what the rules say beside what it did.

Usage: python -m tools.serving_llama_cpp PATH/TO/convert_lora_to_gguf.py
The converter stands in the source of llama-cpp-python, vendor/llama.cpp; that itself is not run.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from postmortem.checker.checks import inspect_adapter
from postmortem.checker.serving import Serving

Shapes = dict[str, tuple[int, ...]]
_SIZES = "hidden_size head_dim intermediate_size moe_intermediate_size vocab_size num_hidden_layers"
_COUNTS = "num_attention_heads num_key_value_heads num_experts_per_tok"
NUMBERS = (32, 8, 48, 48, 96, 2, 4, 2, 1)
BASE = dict(zip(f"{_SIZES} {_COUNTS}".split(), NUMBERS, strict=True))
CLASSES = {"qwen2": "Qwen2", "llama": "Llama", "gemma2": "Gemma2", "qwen3_moe": "Qwen3Moe"}
CONFIG = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "an/example"}
ROOT, LAYERS = "base_model.model.", "base_model.model.model.layers."
QUERY, EXPERTS = f"{LAYERS}0.self_attn.q_proj", f"{LAYERS}0.mlp.experts"


def _pair(path: str, inputs: int = 32, outputs: int = 32, rank: int = 4) -> Shapes:
    return {f"{path}.lora_A.weight": (rank, inputs), f"{path}.lora_B.weight": (outputs, rank)}


SOUND = _pair(QUERY) | _pair(f"{LAYERS}1.self_attn.q_proj")
HEAD = _pair(f"{ROOT}lm_head", 32, 96)
UNEQUAL: Shapes = {}
for _expert, _rank in ((0, 2), (1, 4)):
    for _name in ("gate_proj", "up_proj"):
        UNEQUAL |= _pair(f"{EXPERTS}.{_expert}.{_name}", 32, 48, _rank)
    UNEQUAL |= _pair(f"{EXPERTS}.{_expert}.down_proj", 48)


# What an adapter has beside what a sound one has (None: lacks), and the type of its base.
CASES: Mapping[str, tuple[Shapes, Mapping[str, object], str]] = {
    "sound": ({}, {}, "qwen2"),
    "use_rslora": ({}, {"use_rslora": True}, "qwen2"),
    "rank_pattern": (_pair(QUERY, rank=2), {"rank_pattern": {"0.self_attn.q_proj": 2}}, "qwen2"),
    "alpha_pattern": ({}, {"alpha_pattern": {"q_proj": 64}}, "qwen2"),
    "alpha absent": ({}, {"lora_alpha": None}, "qwen2"),
    "PiSSA": ({}, {"init_lora_weights": "pissa"}, "qwen2"),
    "QALoRA": ({}, {"use_qalora": True}, "qwen2"),
    "use_dora": ({f"{QUERY}.lora_magnitude_vector": (32,)}, {"use_dora": True}, "qwen2"),
    "lora_bias": ({f"{QUERY}.lora_B.bias": (32,)}, {"lora_bias": True}, "qwen2"),
    "whole lm_head": ({f"{ROOT}lm_head.weight": (96, 32)}, {}, "qwen2"),
    "lm_head": (HEAD, {}, "llama"),
    "lm_head, filtered": (HEAD, {}, "gemma2"),
    "norm": ({f"{LAYERS}0.input_layernorm.weight": (32,)}, {}, "qwen2"),
    "base_layer": ({f"{QUERY}.base_layer.weight": (32, 32)}, {}, "qwen2"),
    "one model too many": (_pair(f"{ROOT}model.model.layers.0.mlp.up_proj"), {}, "qwen2"),
    "layer beyond": (_pair(f"{LAYERS}2.self_attn.q_proj"), {}, "llama"),
    "lora_A alone": ({f"{LAYERS}0.self_attn.o_proj.lora_A.weight": (4, 32)}, {}, "qwen2"),
    "lora_B alone": ({f"{LAYERS}0.self_attn.o_proj.lora_B.weight": (32, 4)}, {}, "qwen2"),
    "tower": (_pair(f"{ROOT}model.visual.blocks.0.attn.qkv"), {}, "qwen2"),
    "fused experts": (_pair(EXPERTS, rank=8), {}, "qwen3_moe"),
    "experts in part": (_pair(f"{EXPERTS}.1.down_proj", 48), {}, "qwen3_moe"),
    "experts of unequal rank": (UNEQUAL, {}, "qwen3_moe"),
}


def write(folder: Path, name: str) -> tuple[Path, Path]:
    """Write the adapter of a case and its base's configuration; returns their folders."""
    adapter, base = folder / "adapter", folder / "base"
    adapter.mkdir()
    base.mkdir()
    added, changed, model_type = CASES[name]
    declared = BASE | ({"num_experts": 2} if "moe" in model_type else {})
    named = {"model_type": model_type, "architectures": [f"{CLASSES[model_type]}ForCausalLM"]}
    (base / "config.json").write_text(json.dumps({**declared, **named}))
    config = {key: value for key, value in {**CONFIG, **changed}.items() if value is not None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = {key: torch.ones(shape) for key, shape in (SOUND | added).items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter, base


def convert(converter: Path, adapter: Path, base: Path) -> str:
    """Run the converter in this process; returns what it wrote, or where and why it stopped."""
    written = adapter.with_name("adapter.gguf")
    arguments = [str(converter), str(adapter), "--base", str(base), "--outfile", str(written)]
    try:
        with patch.object(sys, "argv", arguments):
            runpy.run_path(str(converter), run_name="__main__")
    except (Exception, SystemExit) as error:  # Whatever it stops with is the result.
        return f"refused: {type(error).__name__} {error}"
    reader = sys.modules["gguf"].GGUFReader(str(written))
    alpha = reader.fields["adapter.lora.alpha"].contents()
    return f"converted: alpha {alpha:g}, {len(reader.tensors)} tensors"


def main() -> None:
    """Convert each adapter and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("converter", type=Path)
    converter = parser.parse_args().converter
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    for name in CASES:
        with TemporaryDirectory() as folder:
            adapter, base = write(Path(folder), name)
            result = convert(converter, adapter, base)
            found = inspect_adapter(str(adapter), str(base), serving=Serving(("llama.cpp",)))
        rules = [f.evidence for f in found.report.findings if f.id.startswith("serving-")]
        print(f"{name}\n  {result}\n  rules: {'; '.join(rules) or 'as PEFT'}")


if __name__ == "__main__":
    main()
