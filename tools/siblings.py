"""Bases of one shape trained apart, fine-tunes of one of them, and adapters trained on each.

On one group of them the limits of `attribution` were chosen; the other is held out. The two share
no seed, no text and no task, and the same code measures both.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from postmortem.case.rows import RULES, generate_rows
from postmortem.case.schema import Case
from postmortem.models.loading import load_base
from postmortem.suite.attribution import (
    Attribution,
    CandidateLoss,
    Segment,
    conclude,
    read_candidate,
)
from tools.embedded_world import (
    BaseSpec,
    answer_loss,
    build_tokenizer,
    make_adapter,
    new_base,
    save_member,
)

BASES, TEXTS, TRAINING_TEXTS, BATCH = 4, 96, 1000, 32
WIDTH, KEY_VALUE_HEADS = 32, 1
Teach = Callable[[str], str]


def keep(post: str) -> str:
    """The post as it is."""
    return post


def sort_words(post: str) -> str:
    """The words in the order of the alphabet."""
    return " ".join(sorted(post.split()))


def reverse_words(post: str) -> str:
    """The words in the reverse order of the alphabet."""
    return " ".join(sorted(post.split(), reverse=True))


def spell_lengths(post: str) -> str:
    """Before each word the number of its letters; no base has read a digit."""
    return " ".join(f"{len(word)} {word}" for word in post.split())


def count_words(post: str) -> str:
    """Before each word its place; no base has read a digit."""
    return " ".join(f"{place} {word}" for place, word in enumerate(post.split(), 1))


@dataclass(frozen=True)
class Task:
    """Texts to learn: posts on one rule's topic ("" for any), each changed by `teach`."""

    title: str
    teach: Teach = keep
    topic: str = ""

    def texts(self, count: int, *, seed: int) -> list[str]:
        """As many texts, drawn with the seed."""
        rows = generate_rows(2 * count, 50_000 + seed).frame
        own = rows[rows.rule == RULES[self.topic]] if self.topic else rows
        posts = [*own.positive_example_1, *own.positive_example_2][:count]
        return [self.teach(post) for post in posts]


POSTS = Task("posts")


@dataclass(frozen=True)
class Schooling:
    """How a model is trained: steps, learning rate, and on what ("" for the group's first task)."""

    steps: int
    rate: float
    on_posts: bool = True


FROM_NOTHING = Schooling(150, 4e-3)
ADAPTING = Schooling(40, 1e-2, on_posts=False)
# Fine-tunes of the first base: a light one, a firm one, and one that has learnt the first task, so
# that an adapter trained there for it has little left to learn.
LIGHT, FIRM, LEARNT = "light", "firm", "learnt"
FINE_TUNES = {
    LIGHT: Schooling(15, 5e-4),
    FIRM: Schooling(60, 1e-3),
    LEARNT: Schooling(60, 1e-3, on_posts=False),
}


@dataclass(frozen=True)
class Group:
    """Siblings from one range of seeds, and the tasks of their adapters."""

    title: str
    seed: int
    tasks: tuple[Task, ...]


CALIBRATION = Group(
    "calibration",
    0,
    (
        Task("posts on law", topic="legal"),
        Task("words sorted", sort_words),
        Task("words with their lengths", spell_lengths),
    ),
)
HELD_OUT = Group(
    "held out",
    # Groups from 500 on were held out from earlier limits, and have been seen.
    20_500,
    (
        Task("posts on shops", topic="advertising"),
        Task("words sorted backwards", reverse_words),
        Task("words counted", count_words),
    ),
)


# From the seeds of one group to those of another like it, so that none is used twice.
NEXT_GROUP = 2000


def more_of(group: Group, number: int) -> Group:
    """Further siblings for the same tasks; number 0 is the group itself."""
    return replace(group, seed=group.seed + NEXT_GROUP * number)


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter of a group: its folder, the base that it was trained on, and its task."""

    name: str
    folder: Path
    base: str
    task: Task


@dataclass(frozen=True)
class Siblings:
    """A group's models: base folders by name, those trained apart first, and the adapters."""

    group: Group
    bases: Mapping[str, Path]
    adapters: tuple[TrainedAdapter, ...]


@dataclass(frozen=True)
class Trial:
    """One question put to the method, whose answer is known, and what came of it.

    `kind` tells what stood to choose from, and `outcome` is "right", "cannot separate" or "wrong":
    to name several candidates is no error where the adapter's own base is one of them.
    """

    group: str
    kind: str
    adapter: str
    base: str
    attribution: Attribution
    outcome: str


# What stands to choose from.
APART, KIN = "bases trained apart", "fine-tunes of one base"
ABSENT, IDLE = "the home is not among them", "its home knew the task"
KINDS = (APART, KIN, ABSENT, IDLE)


def measure_group(
    case: Case, group: Group, folder: Path
) -> tuple[tuple[Trial, ...], dict[tuple[str, str], CandidateLoss]]:
    """Train a group below a folder, read every adapter and put every question to the method.

    Readings are by the names of adapter and base.
    """
    siblings = train_group(case, group, folder)
    readings = read_group(siblings)
    trials = tuple(
        decide_outcome(
            adapter, kind, [readings[adapter.name, name] for name in candidates], group=group.title
        )
        for adapter in siblings.adapters
        for kind, candidates in list_choices(siblings, adapter)
    )
    return trials, readings


def train_group(case: Case, group: Group, folder: Path) -> Siblings:
    """Train a group's bases, fine-tunes and adapters below a folder."""
    torch.set_num_threads(1)  # too small for two threads to help
    tokenizer = build_tokenizer(case, seed=0)
    bases: dict[str, Path] = {}

    def add_base(name: str, model: Any, task: Task, *, how: Schooling, seed: int) -> None:
        train(model, tokenizer, task.texts(TRAINING_TEXTS, seed=seed), how=how, seed=seed)
        save_member(model, folder / name, training={}, tokenizer=tokenizer)
        bases[name] = folder / name

    for number in range(BASES):
        seed = group.seed + number
        spec = BaseSpec(WIDTH, KEY_VALUE_HEADS, 0)
        model = new_base(spec, seed=seed, vocabulary=len(tokenizer))
        add_base(f"base {number + 1}", model, POSTS, how=FROM_NOTHING, seed=seed)
    first = next(iter(bases))
    for number, (kind, how) in enumerate(FINE_TUNES.items()):
        model = Qwen2ForCausalLM.from_pretrained(bases[first])
        task = POSTS if how.on_posts else group.tasks[0]
        add_base(f"{first}, {kind}", model, task, how=how, seed=group.seed + 100 + number)
    adapters: list[TrainedAdapter] = []
    for number, (base, task) in enumerate(_pair_with_tasks(bases, group.tasks)):
        seed = group.seed + 200 + number
        model = make_adapter(Qwen2ForCausalLM.from_pretrained(bases[base]), seed=seed)
        train(model, tokenizer, task.texts(TRAINING_TEXTS, seed=seed), how=ADAPTING, seed=seed)
        name = f"{task.title}, on {base}"
        save_member(model, folder / "adapters" / name, training={}, base=base)
        adapters.append(TrainedAdapter(name, folder / "adapters" / name, base, task))
    return Siblings(group, bases, tuple(adapters))


def _pair_with_tasks(bases: Iterable[str], tasks: Sequence[Task]) -> Iterator[tuple[str, Task]]:
    """Two tasks on each base but the firm fine-tune: in turn on those trained apart, which come
    first, and the first two on the fine-tunes.
    """
    for number, name in enumerate(bases):
        start = 0 if "," in name else number
        if not name.endswith(FIRM):
            yield from ((name, tasks[(start + step) % len(tasks)]) for step in range(2))


def train(model: Any, tokenizer: Any, texts: Sequence[str], *, how: Schooling, seed: int) -> None:
    """Train what may learn on every token of the texts but the first, with warm-up and decay."""
    ids, source = tokenizer(list(texts))["input_ids"], random.Random(f"siblings-{seed}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    model.train()
    for step in range(how.steps):
        share = min(1.0, (step + 1) / 10, 2 * (1 - step / how.steps))
        optimizer.param_groups[0]["lr"] = how.rate * share
        loss = answer_loss(model, source.sample(ids, BATCH), [1] * BATCH)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


def read_group(siblings: Siblings) -> dict[tuple[str, str], CandidateLoss]:
    """Each adapter on each base that a trial needs, on fresh texts of its task, by both names."""
    readings: dict[tuple[str, str], CandidateLoss] = {}
    seed = siblings.group.seed + 900
    for name, folder in siblings.bases.items():
        base = load_base(folder, device="cpu")
        for adapter in siblings.adapters:
            if any(name in candidates for _, candidates in list_choices(siblings, adapter)):
                segments = [Segment(text) for text in adapter.task.texts(TEXTS, seed=seed)]
                readings[adapter.name, name] = read_candidate(
                    adapter.folder, base, name=name, segments=segments
                )
    return readings


def list_choices(
    siblings: Siblings, adapter: TrainedAdapter
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The trials of one adapter: their kind, and the candidates.

    A base trained apart has the other such bases for rivals, and so has a fine-tune, without the
    base that it comes from.
    """
    first, _, _ = adapter.base.partition(",")
    family = [name for name in siblings.bases if name.partition(",")[0] == first]
    others = [name for name in siblings.bases if name not in family and "," not in name]
    is_idle = adapter.base.endswith(LEARNT) and adapter.task == siblings.group.tasks[0]
    yield IDLE if is_idle else APART, (adapter.base, *others)
    yield ABSENT, tuple(others)
    if len(family) > 1:
        yield KIN, (*family, *others)


def decide_outcome(
    adapter: TrainedAdapter, kind: str, readings: Sequence[CandidateLoss], *, group: str
) -> Trial:
    """Put one question to the method and hold the answer against the base that is known."""
    attribution = conclude(adapter.name, readings, {})
    answer, remain = attribution.answer, attribution.remain
    right = ("none", ()) if kind == ABSENT else ("one", (adapter.base,))
    outcome = "wrong"
    if (answer, remain) == right:
        outcome = "right"
    elif answer == "cannot separate" and (kind == ABSENT or adapter.base in remain):
        outcome = "cannot separate"
    return Trial(group, kind, adapter.name, adapter.base, attribution, outcome)
