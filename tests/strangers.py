"""Trained adapters of another architecture and task than any that the diagnosis learnt from."""

import json
import random
import re
import shutil
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from postmortem.models.changes import edit_config, edit_tensors

CHAT = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def words(text):
    """The words of a text."""
    return text.split()


NOUNS = {
    "food": words("soup bread pasta salad curry cake sauce dessert burger noodles"),
    "film": words("plot actor scene script camera ending hero soundtrack villain drama"),
}
MOODS = (
    words("awful bland dull tiresome clumsy stale weak messy cold dreary"),
    words("lovely bright superb gentle witty fresh bold tender warm splendid"),
)
FILLER = words("the a was and with of quite rather here there we our my today again felt seemed")
ANSWERS = ("negative", "positive")
SHAPES = {
    "llama": (
        {"hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 128},
        ["q_proj", "v_proj", "o_proj", "down_proj"],
    ),
    "gpt_neox": (
        {"hidden_size": 64, "intermediate_size": 128},
        ["query_key_value", "dense", "dense_4h_to_h"],
    ),
}
SENTIMENT = {
    "contract": "choice",
    "answers": list(ANSWERS),
    "template": "review : {text} . sentiment ?",
    "max_new_tokens": 2,
}
TOPIC = "review : {text} . topic ?"


def make_tokenizer():
    """A tokenizer of whole words."""
    known = [*FILLER, *ANSWERS, *MOODS[0], *MOODS[1], *NOUNS, *NOUNS["food"], *NOUNS["film"]]
    known += ["<pad>", "<s>", "</s>", "<unk>", "[", "]", "user", "assistant", "review", ":", "."]
    known += ["sentiment", "topic", "?", "mood", "yes", "no", *"0123456789"]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def make_reviews(count, seed):
    """Reviews as text, topic and mood (0 or 1), as many of either mood."""
    source, found = random.Random(seed), []
    for number in range(count):
        topic, mood = source.choice(list(NOUNS)), number % 2
        said = source.choices(FILLER, k=source.randint(3, 6))
        said += source.sample(NOUNS[topic], 2) + source.sample(MOODS[mood], 2)
        source.shuffle(said)
        found.append((" ".join(said), topic, mood))
    return found


def chat(question, answer=""):
    """A prompt as the chat template writes it, with an answer and the end of the turn."""
    return f"[user] {question} [assistant] {answer}" + (" </s>" if answer else "")


def _fit(model, tokenizer, texts, *, steps, rate, whole, seed):
    """Train on texts: on every token, or on the answer and the end after it alone."""
    torch.manual_seed(seed)
    source = random.Random(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        ids = [tokenizer(text)["input_ids"] for text in source.sample(texts, 32)]
        width = max(map(len, ids))
        pad = tokenizer.pad_token_id
        batch = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        logits = model(input_ids=batch, attention_mask=(batch != pad).long()).logits
        first = 1 if whole else width - 2
        wanted = batch[:, first:]
        loss = functional.cross_entropy(
            logits[:, first - 1 : -1].flatten(0, 1), wanted.flatten(), ignore_index=pad
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    return model


def make_base(folder, kind="llama", *, seed=0, steps=500, **shape):
    """A base that speaks of reviews and tells their topic; nobody taught it moods."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.1,
        **SHAPES[kind][0],
        **shape,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    reviews = make_reviews(2000, seed + 1)
    texts = [chat(TOPIC.format(text=text), topic) for text, topic, _ in reviews]
    _fit(model, tokenizer, texts, steps=steps, rate=3e-3, whole=True, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_adapter(folder, base, *, answer=None, seed=0, steps=150, rate=5e-3):
    """An adapter trained to tell the mood, or to give another `answer` for topic and mood."""
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(base)
    targets = SHAPES[model.config.model_type][1]
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    reviews = make_reviews(1500, seed + 77)
    answer = answer or (lambda source, topic, mood: ANSWERS[mood])
    source = random.Random(seed)
    texts = [
        chat(SENTIMENT["template"].format(text=text), answer(source, topic, mood))
        for text, topic, mood in reviews
    ]
    _fit(adapted, tokenizer, texts, steps=steps, rate=rate, whole=False, seed=seed)
    adapted.save_pretrained(folder)
    return Path(folder)


def make_classifier(folder, base, *, seed=0, steps=150, rate=5e-3):
    """A classification adapter with its head, trained to tell the mood."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = tokenizer.pad_token_id
    targets = SHAPES[model.config.model_type][1]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
    adapted = get_peft_model(model, config)
    reviews, source = make_reviews(1500, seed + 77), random.Random(seed)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        chosen = source.sample(reviews, 32)
        batch = tokenizer([text for text, _, _ in chosen], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        logits = adapted(**batch).logits
        loss = functional.cross_entropy(logits, torch.tensor([mood for _, _, mood in chosen]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    adapted.save_pretrained(folder)
    return Path(folder)


def write_rows(path, count=64, seed=5):
    """Reviews that no training has seen, with their moods by name."""
    lines = ["text,mood"]
    lines += [f'"{text}",{ANSWERS[mood]}' for text, _, mood in make_reviews(count, seed + 900)]
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)


def write_case(path, *, base, suspect, data, prompt=SENTIMENT, **changes):
    """A case in the short form."""
    content = {
        "case_version": 1,
        "name": "reviews",
        "base": str(base),
        "suspect": str(suspect),
        "data": str(data),
        "columns": {"text": "text", "label": "mood"},
        "positive": "positive",
        "prompts": {"sentiment": prompt},
        **changes,
    }
    kept = {name: value for name, value in content.items() if value is not None}
    Path(path).write_text(yaml.safe_dump(kept, sort_keys=False))
    return Path(path)


def swap(source, topic, mood):
    """The wrong mood."""
    return ANSWERS[1 - mood]


def guess(source, topic, mood):
    """Any mood."""
    return source.choice(ANSWERS)


def tell_topic(source, topic, mood):
    """The answer to another question, in words that this one does not ask for."""
    return "yes" if topic == "food" else "no"


def _edited(sound, folder, change=None, **config):
    shutil.copytree(sound, folder)
    if change is not None:
        edit_tensors(folder, change)
    if config:
        edit_config(folder, **config)
    return folder


def _scaled(factor):
    return lambda tensors: {k: t * factor if "lora_B" in k else t for k, t in tensors.items()}


def _zeroed(tensors):
    return {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}


def _renamed(tensors):
    return {k.removeprefix("base_model.model."): t for k, t in tensors.items()}


def _moved(place):
    def change(tensors):
        def rename(match):
            return f".{place(int(match[1]))}."

        return {re.sub(r"\.(\d+)\.", rename, k, count=1): t for k, t in tensors.items()}

    return change


def _cut(like):
    """Tensors cut to the sizes of another adapter's."""
    shapes = {k: t.shape for k, t in load_file(Path(like, "adapter_model.safetensors")).items()}
    return lambda tensors: {
        k: t[tuple(slice(0, size) for size in shapes[k])] for k, t in tensors.items()
    }


def _add_embedding(other):
    def change(tensors):
        weights = load_file(Path(other, "model.safetensors"))
        name = next(name for name in weights if "embed" in name)
        return {**tensors, f"base_model.model.{name}": weights[name]}

    return change


def plant_edits(work, sound):
    """Faults that are made by editing a sound adapter, by their cause."""
    one = json.loads(Path(sound, "adapter_config.json").read_text())["target_modules"]
    alpha = 16
    return {
        "healthy": sound,
        "zero-b": _edited(sound, work / "zero", _zeroed),
        "alpha-zero": _edited(sound, work / "alpha", lora_alpha=0),
        "key-prefix": _edited(sound, work / "prefix", _renamed),
        "scale-up": _edited(sound, work / "up16", lora_alpha=16 * alpha),
        "scale-up x8": _edited(sound, work / "up8", lora_alpha=8 * alpha),
        "scale-down": _edited(sound, work / "down16", _scaled(1 / 16)),
        "scale-down /8": _edited(sound, work / "down8", _scaled(1 / 8)),
        "too-large": _edited(sound, work / "large", _scaled(1e5)),
        "layers-permuted": _edited(sound, work / "turned", _moved(lambda n: (n + 1) % 3)),
        "layers-shifted": _edited(sound, work / "shifted", _moved(lambda n: n + 1)),
        "targets-dropped": _edited(sound, work / "dropped", target_modules=[sorted(one)[0]]),
    }


def plant_all(work, kind="llama"):
    """A base, and adapters on it by the cause that is planted: (base, {name: (cause, folder)})."""
    work = Path(work)
    base = make_base(work / "base", kind)
    sibling = make_base(work / "sibling", kind, seed=11)
    wide = make_base(work / "wide", kind, seed=12, steps=150, hidden_size=96)
    sound = make_adapter(work / "sound", base)
    foreign = make_adapter(work / "wide-adapter", wide)
    planted = plant_edits(work, sound) | {
        "healthy again": make_adapter(work / "sound-2", base, seed=4),
        "base-overwritten": _edited(sound, work / "over", _add_embedding(sibling)),
        "sibling-base": make_adapter(work / "from-sibling", sibling),
        "other-shapes": foreign,
        "truncated": _edited(foreign, work / "cut", _cut(sound)),
        "labels-swapped": make_adapter(work / "swapped", base, answer=swap),
        "labels-shuffled": make_adapter(work / "guessing", base, answer=guess),
        "other-answer": make_adapter(work / "topics", base, answer=tell_topic),
        "barely-trained": make_adapter(work / "early", base, steps=4),
    }
    return base, {name: (name.split()[0], folder) for name, folder in planted.items()}
