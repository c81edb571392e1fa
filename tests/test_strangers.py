"""Trained adapters of another architecture and task than any that the diagnosis learnt from."""

import random

import own
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from postmortem.case.load import load_case
from postmortem.diagnosis.timed import diagnose_case, stand
from postmortem.models.changes import copy_changed, edit_config, scale, shift_layers, zero_b

# They train a base and an adapter.
pytestmark = pytest.mark.slow

NOUNS = {
    "food": "soup bread pasta salad curry cake sauce dessert burger noodles",
    "film": "plot actor scene script camera ending hero soundtrack villain drama",
}
MOODS = {
    "negative": "awful bland dull tiresome clumsy stale weak messy cold dreary",
    "positive": "lovely bright superb gentle witty fresh bold tender warm splendid",
}
FILLER = "the a was and with of quite rather here there we our my today again felt seemed"
OTHERS = "<pad> <s> </s> <unk> [ ] user assistant review : . sentiment topic ? mood yes no"
SENTIMENT = {
    "contract": "choice",
    "answers": list(MOODS),
    "template": "review : {text} . sentiment ?",
    "max_new_tokens": 2,
}
TOPIC = "review : {text} . topic ?"
# What is planted in an adapter for moods: changes of its tensors, and of its configuration.
CHANGED = {
    "zero-b": zero_b,
    "layers-permuted": shift_layers,
    "scale-down": scale(1 / 16),
    "key-prefix": lambda tensors: {
        name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()
    },
}
CONFIGURED = {
    "alpha-zero": {"lora_alpha": 0},
    "scale-up": {"lora_alpha": 16 * 16},
    "targets-dropped": {"target_modules": ["down_proj"]},
}


def make_tokenizer():
    """A tokenizer of whole words."""
    known = " ".join([OTHERS, FILLER, *NOUNS, *NOUNS.values(), *MOODS, *MOODS.values()]).split()
    vocabulary = {word: place for place, word in enumerate([*known, *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=own.CHAT,
    )


def make_reviews(count, seed):
    """Reviews as text, topic and mood, as many of either mood."""
    source, found = random.Random(seed), []
    for number in range(count):
        topic, mood = source.choice(list(NOUNS)), list(MOODS)[number % 2]
        said = source.choices(FILLER.split(), k=source.randint(3, 6))
        said += source.sample(NOUNS[topic].split(), 2) + source.sample(MOODS[mood].split(), 2)
        source.shuffle(said)
        found.append((" ".join(said), topic, mood))
    return found


def fit(model, questions, *, steps, rate, whole):
    """Train on questions with their answers: on every token, or on the answer and the end alone."""
    torch.manual_seed(0)
    tokenizer, source = make_tokenizer(), random.Random(0)
    texts = [f"[user] {question} [assistant] {answer} </s>" for question, answer in questions]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        batch = tokenizer(source.sample(texts, 32), padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        first = 1 if whole else ids.shape[1] - 2
        logits = model(input_ids=ids, attention_mask=mask).logits[:, first - 1 : -1]
        wanted = ids[:, first:].flatten()
        loss = functional.cross_entropy(
            logits.flatten(0, 1), wanted, ignore_index=tokenizer.pad_token_id
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def make_base(folder, *, steps, hidden_size=64):
    """A Llama that speaks of reviews and tells their topic; nobody taught it moods."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config)
    reviews = make_reviews(2000, 1)
    questions = [(TOPIC.format(text=text), topic) for text, topic, _ in reviews]
    fit(model, questions, steps=steps, rate=3e-3, whole=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder, base, *, steps=150):
    """An adapter trained to tell the mood."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    reviews = make_reviews(1500, 77)
    questions = [(SENTIMENT["template"].format(text=text), mood) for text, _, mood in reviews]
    fit(adapted, questions, steps=steps, rate=5e-3, whole=False)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A base that the diagnosis has never seen, adapters by cause, and rows of no training."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("strangers")
    base = make_base(work / "base", steps=200)
    sound = make_adapter(work / "sound", base)
    wide = make_base(work / "wide", steps=1, hidden_size=96)
    adapters = {"healthy": sound, "other-shapes": make_adapter(work / "foreign", wide, steps=1)}
    for cause, change in CHANGED.items():
        adapters[cause] = copy_changed(sound, work / cause, change)
    for cause, changes in CONFIGURED.items():
        adapters[cause] = copy_changed(sound, work / cause, dict)
        edit_config(adapters[cause], **changes)
    lines = [f"{text},{mood}\n" for text, _, mood in make_reviews(48, 905)]
    (work / "rows.csv").write_text("text,label\n" + "".join(lines))
    return base, adapters, work / "rows.csv"


CAUSES = ("healthy", "other-shapes", *CHANGED, *CONFIGURED)
# What may be left open.
OPEN = ("layers-permuted", "scale-down")


@pytest.mark.parametrize("cause", CAUSES)
def test_a_fault_on_an_unknown_base_is_named_or_left_open(planted, tmp_path, cause):
    """On another architecture and task the planted cause is named, or it is said to be open."""
    base, adapters, data = planted
    path = own.write_case(
        tmp_path / "case.yml",
        base=base,
        suspect=adapters[cause],
        data=data,
        positive="positive",
        prompts={"sentiment": SENTIMENT},
    )
    _, found = diagnose_case(
        load_case(path),
        profile="own",
        minutes=5,
        prior="flat",
        told=(),
        report=lambda line: None,
    )
    named = ("cause named", "kind named")
    assert stand(found, cause) in ((*named, "cannot tell") if cause in OPEN else named)
