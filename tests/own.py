"""A case of one's own on disk: another architecture, another task, nothing of the incident."""

import json
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

CHAT = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = {1: ("lovely", "bright", "superb"), 0: ("dreadful", "dull", "awful")}
REVIEWS = [
    (f"A {word} film, number {number}.", label)
    for number in range(8)
    for label, words in WORDS.items()
    for word in words
]


def make_tokenizer(chat=True):
    """A byte-level tokenizer trained on the reviews."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text, _ in REVIEWS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT if chat else None,
    )


def make_base(folder, *, chat=True, seed=0):
    """A tiny Llama with random weights and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_adapter(folder, base, *, task="CAUSAL_LM", classes=2, seed=1, zero=False):
    """An adapter with random weights; `zero` leaves lora_B as PEFT makes it."""
    torch.manual_seed(seed)
    if task == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=task)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not zero:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return Path(folder)


def write_rows(path):
    """The reviews in the format that the ending asks for."""
    rows = [{"text": text, "label": label} for text, label in REVIEWS]
    if Path(path).suffix == ".jsonl":
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]
        Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)


SENTIMENT = {
    "contract": "choice",
    "answers": ["negative", "positive"],
    "template": "{text} Sentiment:",
}


def write_case(path, *, base, suspect, data, **changes):
    """A case file in the short form."""
    content = {
        "case_version": 1,
        "name": "reviews",
        "base": base and str(base),
        "suspect": suspect and str(suspect),
        "data": data and str(data),
        "columns": {"text": "text", "label": "label"},
        "prompts": {"sentiment": SENTIMENT},
    }
    content |= changes
    given = {key: value for key, value in content.items() if value is not None}
    Path(path).write_text(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
    return Path(path)
