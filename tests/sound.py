"""Sound adapters written by PEFT: every option on every architecture, for tests only."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from postmortem.checker.bases import kind_of_class
from tools.faults import randomise

TASKS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "seq_cls": "SEQ_CLS",
    "token_cls": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
}


def build(name: str, class_name: str, folder: Path) -> Any:
    """Write a base folder and return its model."""
    torch.manual_seed(0)
    model = getattr(tf, class_name)(tiny.configuration(name))
    model.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = str(folder)
    return model


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return the last names of the layers' linear modules, in order, without repeats."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    return list(dict.fromkeys(n.split(".")[-1] for n in names if re.search(r"\.\d+\.", n)))


def options(model: Any) -> dict[str, dict[str, Any]]:
    """Return every option of LoRA that the checker models, for this model."""
    first, *others = linear_names(model)
    second = others[-1] if others else first
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    last = embedding.split(".")[-1]
    pair = {"target_modules": [first, second]}
    linear = next(m for n, m in model.named_modules() if n.endswith(f".{first}"))
    path = next(n for n, m in model.named_modules() if m is linear)
    container = path.split(".0.")[0].split(".")[-1]
    return {
        "list": pair,
        "regex": {"target_modules": rf".*\.({first}|{second})"},
        "risky-regex": {"target_modules": rf"(.*\.)+({first})"},
        "all-linear": {"target_modules": "all-linear"},
        "one-module": {"target_modules": [path]},
        "rank-pattern": {**pair, "rank_pattern": {first: 2}},
        "rank-regex": {**pair, "rank_pattern": {rf".*\.0\..*{first}": 2}},
        "rank-anchored": {**pair, "rank_pattern": {f"^{path}": 2}},
        "alpha-pattern": {**pair, "alpha_pattern": {first: 16}},
        "layers": {**pair, "layers_to_transform": [1]},
        "one-layer": {**pair, "layers_to_transform": 0},
        "layers-pattern": {**pair, "layers_to_transform": [0], "layers_pattern": container},
        "save-embedding": {**pair, "modules_to_save": [last]},
        "bias-all": {**pair, "bias": "all"},
        "bias-lora": {**pair, "bias": "lora_only"},
        "dora": {**pair, "use_dora": True},
        "dora-rslora": {**pair, "use_dora": True, "use_rslora": True},
        "rslora": {**pair, "use_rslora": True, "lora_alpha": 16},
        "exclude": {**pair, "exclude_modules": [path]},
        "exclude-regex": {**pair, "exclude_modules": rf".*\.0\..*{second}"},
        "tokens": {**pair, "trainable_token_indices": [1, 5, 7]},
        "tokens-named": {**pair, "trainable_token_indices": {last: [3]}},
        "lora-bias": {**pair, "lora_bias": True},
        "gaussian": {**pair, "init_lora_weights": "gaussian"},
        "embedding": {"target_modules": [first, last]},
        "default": {},
    }


def save(
    model: Any, folder: Path, option: dict[str, Any], dtype: torch.dtype | None = None
) -> bool:
    """Write an adapter with PEFT; False when PEFT itself refuses the option here."""
    task = TASKS.get(str(kind_of_class(type(model).__name__)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = {"r": 4, "lora_alpha": 8, "task_type": task, **option}
            adapted = get_peft_model(model, LoraConfig(**values))
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError):
            return False
        randomise(adapted)
        (adapted.to(dtype) if dtype else adapted).save_pretrained(folder)
    return True


def rewrite(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
