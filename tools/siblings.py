"""Bases of one shape trained apart, fine-tunes of one of them, and adapters whose home is known.

On one group of them the limits of `attribution` were chosen; the other is held out. The two share
no seed, no text and no task, and the same code measures both.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from postmortem.case.rows import RULES, generate_rows
from postmortem.case.schema import Case
from postmortem.models.loading import load_base
from postmortem.suite.attribution import (
    LIMITS,
    Attribution,
    Limits,
    Reading,
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
class Pupil:
    """An adapter of a group: its folder, the base that it was trained on, and its task."""

    name: str
    folder: Path
    home: str
    task: Task


@dataclass(frozen=True)
class Trained:
    """A group's models: base folders and adapters by name, and the seed of the texts to read."""

    group: Group
    bases: Mapping[str, Path]
    pupils: tuple[Pupil, ...]


@dataclass(frozen=True)
class Trial:
    """One question put to the method, whose answer is known, and what came of it.

    `kind` tells what stood to choose from, and `outcome` is "right", "cannot separate" or "wrong":
    a group of candidates that holds the home is no error, one without it is.
    """

    group: str
    kind: str
    pupil: str
    home: str
    found: Attribution
    outcome: str


# What stands to choose from.
APART, KIN, ABSENT, IDLE = (
    *("bases trained apart", "fine-tunes of one base"),
    *("the home is not among them", "its home knew the task"),
)
KINDS = (APART, KIN, ABSENT, IDLE)


# What a step calls with how much of its total is done; a session's `follow` gives one.
Follow = Callable[..., Callable[[int], None]]


def follow_nothing(step: str, *, total: int, unit: str) -> Callable[[int], None]:
    """Say nothing of how far a step is."""
    return lambda done: None


def train_group(
    case: Case, group: Group, folder: Path, *, follow: Follow = follow_nothing
) -> Trained:
    """Train a group's bases, fine-tunes and adapters below a folder."""
    told = follow(f"{group.title}, training", total=BASES + len(FINE_TUNES), unit="bases")
    torch.set_num_threads(1)  # too small for two threads to help
    tokenizer = build_tokenizer(case, seed=0)
    bases: dict[str, Path] = {}
    for number in range(BASES):
        seed = group.seed + number
        spec = BaseSpec(WIDTH, KEY_VALUE_HEADS, 0)
        model = new_base(spec, seed=seed, vocabulary=len(tokenizer))
        name = f"base {number + 1}"
        train(model, tokenizer, POSTS.texts(TRAINING_TEXTS, seed=seed), how=FROM_NOTHING, seed=seed)
        bases[name] = _save(model, folder / name, tokenizer)
        told(len(bases))
    first = next(iter(bases))
    for number, (kind, how) in enumerate(FINE_TUNES.items()):
        seed = group.seed + 100 + number
        texts = (POSTS if how.on_posts else group.tasks[0]).texts(TRAINING_TEXTS, seed=seed)
        model = Qwen2ForCausalLM.from_pretrained(bases[first])
        train(model, tokenizer, texts, how=how, seed=seed)
        name = f"{first}, {kind}"
        bases[name] = _save(model, folder / name, tokenizer)
        told(len(bases))
    homes = list(_list_homes(bases, group.tasks))
    told = follow(f"{group.title}, training", total=len(homes), unit="adapters")
    pupils = []
    for number, (home, task) in enumerate(homes):
        pupils.append(
            _train_pupil(bases[home], tokenizer, home, task, folder, seed=group.seed + 200 + number)
        )
        told(len(pupils))
    return Trained(group, bases, tuple(pupils))


def _list_homes(bases: Iterable[str], tasks: Sequence[Task]) -> Iterator[tuple[str, Task]]:
    """Two tasks on each base but the firm fine-tune: in turn on those trained apart, which come
    first, and the first two on the fine-tunes.
    """
    for number, name in enumerate(bases):
        start = 0 if "," in name else number
        if not name.endswith(FIRM):
            yield from ((name, tasks[(start + step) % len(tasks)]) for step in range(2))


def _train_pupil(
    base: Path, tokenizer: Any, home: str, task: Task, folder: Path, *, seed: int
) -> Pupil:
    adapted = make_adapter(Qwen2ForCausalLM.from_pretrained(base), seed=seed)
    train(adapted, tokenizer, task.texts(TRAINING_TEXTS, seed=seed), how=ADAPTING, seed=seed)
    name = f"{task.title}, on {home}"
    save_member(adapted, folder / "adapters" / name, training={}, base=home)
    return Pupil(name, folder / "adapters" / name, home, task)


def _save(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    save_member(model, folder, training={}, tokenizer=tokenizer)
    return folder


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


def read_group(
    trained: Trained, *, limits: Limits = LIMITS, follow: Follow = follow_nothing
) -> dict[tuple[str, str], Reading]:
    """Each adapter on each base that a trial needs, on fresh texts of its task, by both names."""
    found: dict[tuple[str, str], Reading] = {}
    told = follow(f"{trained.group.title}, reading", total=len(trained.bases), unit="bases")
    for number, (name, folder) in enumerate(trained.bases.items()):
        told(number)
        base = load_base(folder, device="cpu")
        for pupil in trained.pupils:
            if any(name in candidates for _, candidates in list_choices(trained, pupil)):
                texts = pupil.task.texts(TEXTS, seed=trained.group.seed + 900)
                segments = [Segment(text) for text in texts]
                found[pupil.name, name] = read_candidate(
                    pupil.folder, base, name=name, segments=segments, limits=limits
                )
    return found


def list_choices(trained: Trained, pupil: Pupil) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The trials of one adapter: their kind, and the candidates.

    A home trained apart has the other such bases for rivals, and so has a fine-tune, without the
    base that it comes from.
    """
    family = [name for name in trained.bases if _root(name) == _root(pupil.home)]
    others = [name for name in trained.bases if name not in family and "," not in name]
    is_idle = pupil.home.endswith(LEARNT) and pupil.task == trained.group.tasks[0]
    yield IDLE if is_idle else APART, (pupil.home, *others)
    yield ABSENT, tuple(others)
    if len(family) > 1:
        yield KIN, (*family, *others)


def _root(name: str) -> str:
    return name.partition(",")[0]


def try_group(
    trained: Trained, readings: Mapping[tuple[str, str], Reading], *, limits: Limits = LIMITS
) -> tuple[Trial, ...]:
    """Put every question of a group to the method."""
    return tuple(
        _try_one(
            *(trained.group.title, kind, pupil),
            readings=[readings[pupil.name, name] for name in candidates],
            limits=limits,
        )
        for pupil in trained.pupils
        for kind, candidates in list_choices(trained, pupil)
    )


def _try_one(
    group: str, kind: str, pupil: Pupil, *, readings: Sequence[Reading], limits: Limits
) -> Trial:
    found = conclude(pupil.name, readings, {}, limits=limits)
    right = ("none", ()) if kind == ABSENT else ("one", (pupil.home,))
    outcome = "wrong"
    if (found.answer, found.remain) == right:
        outcome = "right"
    elif found.answer == "cannot separate" and (kind == ABSENT or pupil.home in found.remain):
        outcome = "cannot separate"
    return Trial(group, kind, pupil.name, pupil.home, found, outcome)


def measure_group(
    case: Case, group: Group, folder: Path, *, follow: Follow = follow_nothing
) -> tuple[tuple[Trial, ...], dict[tuple[str, str], Reading]]:
    """Train a group below a folder, read every adapter and put every question to the method."""
    trained = train_group(case, group, folder, follow=follow)
    readings = read_group(trained, follow=follow)
    return try_group(trained, readings), readings
