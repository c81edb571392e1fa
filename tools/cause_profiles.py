"""Plant every cause in embedded worlds, meet it with every experiment, and ship what was seen.

Usage: python -m tools.cause_profiles [--worlds 2] [--cores 0]
The first world is the shipped one, further ones are trained. The record is what `diagnose` knows of
causes: `src/postmortem/diagnosis/cause_profiles.jsonl`.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from postmortem.case.load import load_case
from postmortem.case.rows import Rows, generate_rows
from postmortem.case.schema import Case, PromptTemplate
from postmortem.checker.errors import PostmortemError
from postmortem.diagnosis.battery import BASE, ENOUGH, FIRST, OF_ADAPTER, REFERENCE
from postmortem.diagnosis.causes import CAUSES, Materials, Run, edit_each
from postmortem.diagnosis.likelihoods import NO_SEVERITY, SHIPPED, write_profiles
from postmortem.diagnosis.subject import Subject, run_tests, writes_order
from postmortem.diagnosis.timed import describe_judgements
from postmortem.experiments.ask import Answers
from postmortem.experiments.records import Replay
from postmortem.experiments.session import Session
from postmortem.models.model_set import Member, World, digest_model, resolve_world
from tools.embedded_world import RECIPES, Recipe, Teacher, train_adapter
from tools.train_world import train_world

# Rows of a replay, and seeds of rows that no training has seen.
ROWS, FIRST_SEED = ENOUGH, 40_000
# The share of the labels that say nothing in the harder task.
DRAWN_ANEW = 0.6
# Trainings of each adapter that are taken, and how many steps one takes that is broken off.
SEEDS, FEW_STEPS = 2, 2
# What the base does by itself under a prompt: it knows and does not say, says what it knows, or
# was never taught to answer it.
SILENT, SPEAKING, UNABLE = "silent", "speaking", "unable"
# Prompts that no base of the embedded world was taught, with the words that they ask for: one in
# the chat template, one sent as it is.
CHOICE, WORDS = "choice", ("fine", "bad")
LABEL, TAGS = "label", ("keep", "drop")


@dataclass(frozen=True)
class Stage:
    """A prompt on a base of the embedded world, with the adapters trained for it or not.

    `sound` is the recipe of the fitting adapter, `others` those of adapters that were trained to
    answer something else, and `numeric` whether a number is asked for.
    """

    kind: str
    lineage: str
    role: str
    prompt: str
    sound: str
    others: tuple[str, ...]
    numeric: bool = False


STAGES: Mapping[str, Stage] = {
    "number": Stage(
        SILENT,
        "silent",
        "base",
        "v2",
        "numeric",
        ("yes_no_short", "yes_no_long", CHOICE),
        numeric=True,
    ),
    "calibrated number": Stage(
        SPEAKING,
        "speaking",
        "speaking_base",
        "v2",
        "numeric",
        ("yes_no_short", "yes_no_long", CHOICE),
        numeric=True,
    ),
    "yes/no": Stage(
        *(SPEAKING, "silent", "base", "yes_no", "yes_no_short"), ("numeric", CHOICE, LABEL)
    ),
    "choice": Stage(
        *(UNABLE, "silent", "base", CHOICE, CHOICE), ("numeric", "yes_no_short", LABEL)
    ),
    "label": Stage(*(UNABLE, "silent", "base", LABEL, LABEL), ("numeric", "yes_no_short", CHOICE)),
}


@dataclass(frozen=True)
class Site:
    """A stage with its materials: where a cause is planted."""

    stage: Stage
    materials: Materials

    def trained(self, recipe: str, *, lineage: str = "", renamed: bool = False) -> Path:
        """A copy of the adapter of a recipe, by its own name even where that is `numeric`."""
        if recipe == "numeric" and not lineage:
            return replace(self.materials, sound="numeric").adapter("numeric")
        return self.materials.adapter(recipe, lineage=lineage, renamed=renamed)


@dataclass(frozen=True)
class Planted:
    """A cause that a case's own files can show, planted at each of its severities.

    `numeric` ones make sense where a number is asked for.
    """

    plant: Callable[[Site, Any], Run]
    severities: Mapping[str, Any] = field(default_factory=lambda: {NO_SEVERITY: None})
    numeric: bool = False


def _listed(name: str) -> Planted:
    cause = CAUSES[name]
    return Planted(lambda s, value: cause.inject(s.materials, value), cause.severities)


def _trained_as(recipe: str) -> Callable[[Site, Any], Run]:
    return lambda site, _: Run(site.materials.base, site.trained(f"{site.stage.sound}_{recipe}"))


def _sibling(site: Site, renamed: bool) -> Run:
    folder = site.trained(site.stage.sound, lineage="sibling", renamed=renamed)
    return Run(site.materials.base, folder)


def _others(site: Site, place: int) -> Run:
    return Run(site.materials.base, site.trained(site.stage.others[place]))


def _numeric(site: Site, recipe: str) -> Run:
    return Run(site.materials.base, site.materials.adapter(recipe))


def _too_large(site: Site, factor: float) -> Run:
    folder = site.materials.adapter("numeric")
    edit_each(folder, lambda name, t: t * factor if "lora_B" in name else t)
    return Run(site.materials.base, folder)


LISTED = (
    "healthy",
    "zero-b",
    "alpha-zero",
    "key-prefix",
    "other-shapes",
    "scale-up",
    "scale-down",
    "rslora-lost",
    "pattern-lost",
    "layers-shifted",
    "layers-permuted",
    "targets-dropped",
    "base-overwritten",
)


# A tensor by its name, changed.
TensorChange = Callable[[str, torch.Tensor], torch.Tensor]


def _changed(change: TensorChange) -> Callable[[Site, Any], Run]:
    return lambda site, _: Run(site.materials.base, site.materials.edited(change))


def _each(change: Callable[[Any], TensorChange]) -> Callable[[Site, Any], Run]:
    """A change of which each severity is another one."""
    return lambda site, value: Run(site.materials.base, site.materials.edited(change(value)))


def _random_b(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Random numbers of the same spread in place of lora_B."""
    source = torch.Generator().manual_seed(len(name))
    drawn = torch.randn(tensor.shape, generator=source) * tensor.std()
    return drawn if "lora_B" in name else tensor


def _reversed_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0) if "lora_B" in name else tensor


def keep_rows(share: float) -> TensorChange:
    """The first rows of each lora_B alone, as one rank of a sharded training saves them."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.clone()
        if "lora_B" in name:
            kept[round(len(kept) * share) :] = 0
        return kept

    return change


def without(module: str) -> TensorChange:
    """lora_B of one kind of module zero, as before training."""
    return lambda name, t: torch.zeros_like(t) if "lora_B" in name and module in name else t


def _merged_twice(site: Site, _: Any) -> Run:
    """The adapter on a copy of the base that holds it already."""
    base, folder = site.materials.copied_base(), site.materials.adapter("numeric")
    merged = PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload()
    vars(merged).pop("peft_config", None)
    return Run(replace(base, model=merged), folder)


def _other_markup(site: Site, _: Any) -> Run:
    return Run(site.materials.base, site.materials.adapter("numeric"), otherwise=True)


PLANTED: Mapping[str, Planted] = {
    **{name: _listed(name) for name in LISTED},
    "sibling-base": Planted(_sibling, {"named as this base": True, "named truly": False}),
    "random-weights": Planted(_changed(_random_b)),
    "rows-permuted": Planted(_changed(_reversed_rows)),
    "sign-flipped": Planted(_changed(lambda name, t: -t if "lora_B" in name else t)),
    "rows-zero": Planted(_each(keep_rows), {"half": 1 / 2, "seven eighths": 1 / 8}),
    "half-untrained": Planted(_each(without), {"q_proj": "q_proj", "v_proj": "v_proj"}),
    "merged-twice": Planted(_merged_twice),
    "other-markup": Planted(_other_markup),
    "too-large": Planted(_too_large, {"×1e6": 1e6, "×1e4": 1e4}),
    "other-answer": Planted(_others, {"first": 0, "second": 1, "third": 2}),
    "binary-labels": Planted(_numeric, CAUSES["binary-labels"].severities, numeric=True),
    "thinking": Planted(lambda site, _: _numeric(site, "thinking"), numeric=True),
    "labels-swapped": Planted(_trained_as("swapped")),
    "labels-shuffled": Planted(_trained_as("shuffled")),
    "barely-trained": Planted(_trained_as("broken_off")),
}


def with_choices(case: Case) -> Case:
    """The case with the prompts that no base of the embedded world was taught.

    It is read as a case of one's own: values are strict, and nothing is guessed.
    """
    asked = {
        CHOICE: PromptTemplate(
            title="A choice of words",
            contract="choice",
            answers=list(WORDS),
            chat=True,
            template="Rule: {rule}\nPost: {body}\n\nIs the post fine or bad?",
            grade="measured",
            # The small vocabulary takes several tokens for a word.
            max_new_tokens=8,
        ),
        LABEL: PromptTemplate(
            title="A label",
            contract="choice",
            answers=list(TAGS),
            chat=False,
            template="Post: {body}\nRule: {rule}\nLabel:",
            grade="measured",
            max_new_tokens=8,
        ),
    }
    return case.model_copy(update={"prompts": {**case.prompts, **asked}})


def teach_word(source: random.Random, label: int) -> str:
    """The true answer to the choice."""
    return WORDS[label]


def teach_tag(source: random.Random, label: int) -> str:
    """The true label; an answer to a raw prompt begins with a space."""
    return f" {TAGS[label]}"


def _varied(recipe: Recipe) -> dict[str, Recipe]:
    """The same training with labels swapped, with labels that say nothing, and broken off."""

    def swapped(source: random.Random, label: int) -> str:
        return recipe.teacher(source, 1 - label)

    def shuffled(source: random.Random, label: int) -> str:
        return recipe.teacher(source, source.choice([0, 1]))

    def with_teacher(teacher: Teacher, least: int) -> Recipe:
        return replace(recipe, teacher=teacher, criterion={}, least=least)

    return {
        "swapped": with_teacher(swapped, 60),
        "shuffled": with_teacher(shuffled, 60),
        "broken_off": with_teacher(recipe.teacher, FEW_STEPS),
    }


OWN_RECIPES: Mapping[str, Recipe] = {
    CHOICE: Recipe(CHOICE, teach_word, 5e-3, {}, least=80),
    LABEL: Recipe(LABEL, teach_tag, 5e-3, {}, least=80),
}


def extra_recipes() -> Iterator[tuple[str, str, Recipe]]:
    """What is trained beyond the world's own adapters: lineage, name and recipe."""
    for lineage in ("silent", "sibling"):
        for name, recipe in OWN_RECIPES.items():
            yield lineage, name, recipe
    yield "speaking", CHOICE, OWN_RECIPES[CHOICE]
    yield "sibling", "yes_no_short", RECIPES["yes_no_short"]
    for stage in STAGES.values():
        recipe = {**RECIPES, **OWN_RECIPES}[stage.sound]
        for name, varied in _varied(recipe).items():
            yield stage.lineage, f"{stage.sound}_{name}", varied


def replay_world(
    case: Case, world: World, folder: Path, *, report: Callable[[str], None] = print
) -> list[Replay]:
    """Plant every cause in an embedded world; adapters that it lacks are trained in a folder."""
    torch.set_num_threads(1)  # the same sums in the same order
    case = with_choices(case)
    with TemporaryDirectory() as scratch:
        session = Session(
            notebook=Path("cause_profiles"),
            case=case,
            profile_name=world.profile,
            world=world,
            rows=generate_rows(ROWS, FIRST_SEED, columns=case.columns),
            records_path=Path(scratch, "cause_profiles.jsonl"),
            parameters={},
            device="cpu",
        )
        train_extra(session, folder, report=report)
        return replay_stages(session, report=report)


def train_extra(session: Session, folder: Path, *, report: Callable[[str], None] = print) -> None:
    """Train the further adapters that replays need, and enter them in the session's world."""
    roles = {"silent": "base", "speaking": "speaking_base", "sibling": "sibling_base"}
    for lineage, name, recipe in extra_recipes():
        for seed in range(SEEDS):
            place = folder / lineage / f"{name}_{seed}"
            if not place.is_dir():
                train_adapter(
                    session.case,
                    session.world.path(roles[lineage]),
                    recipe=recipe,
                    seed=session.world.seed + 100 * seed + 7,
                    folder=place,
                    report=report,
                    name=roles[lineage],
                )
            member = Member(role=place.name, path=str(place), digest=digest_model(place))
            session.world.replays[f"{lineage}/{place.name}"] = member


def replay_stages(session: Session, *, report: Callable[[str], None] = print) -> list[Replay]:
    """Plant every cause on every stage of the session's world, with each seed of adapters."""
    found: list[Replay] = []
    for number, (name, stage) in enumerate(STAGES.items()):
        base = session.load(stage.role)
        for seed in range(SEEDS):
            with TemporaryDirectory() as scratch:
                parts = (session.world, stage.role, base, stage.lineage, seed, Path(scratch))
                site = Site(stage, Materials(*parts, sound=stage.sound))
                rows = generate_rows(
                    ROWS,
                    FIRST_SEED + 100 * session.world.seed + 10 * seed + number,
                    columns=session.case.columns,
                )
                found += _replay_site(session, site, name=name, rows=rows)
            report(f"{name}, adapters {seed}: {len(found)} replays")
    return found


def _replay_site(session: Session, site: Site, *, name: str, rows: Rows) -> Iterator[Replay]:
    stage, materials = site.stage, site.materials
    kept: dict[tuple[str, str], Answers] = {}
    for cause, planted in PLANTED.items():
        if planted.numeric and not stage.numeric:
            continue
        for severity, value in planted.severities.items():
            run = planted.plant(site, value)
            own = run.base is materials.base and not run.otherwise
            subject = _open(session, site, run, rows=rows)
            subject.asked.update(kept if own else {})
            with subject:
                for task, labels in tasks(rows).items():
                    subject.rows = replace(rows, labels=labels)
                    outcomes = run_tests(OF_ADAPTER, subject)
                    # A replay keeps outcomes alone; steps of a name would meet in the records.
                    session.records.clear()
                    told = "" if severity == NO_SEVERITY else f", {severity}"
                    yield Replay(
                        key=f"{cause}.{name}.{session.world.seed}.{materials.seed}"
                        f".{severity}.{task}",
                        cause=cause,
                        base=f"{stage.kind}, {task} task",
                        seed=100 * session.world.seed + 10 * [*STAGES].index(name) + materials.seed,
                        severity=f"{name}{told}",
                        outcomes=outcomes,
                        features={"works": bool(writes_order(subject))},
                    )
            if own:
                kept = {key: known for key, known in subject.asked.items() if key[0] in KEPT}


def _open(session: Session, site: Site, run: Run, *, rows: Rows) -> Subject:
    """A run on a site as a subject; the reference is another training of the sound adapter."""
    stage, other = site.stage, (site.materials.seed + 1) % SEEDS
    reference = session.world.replays[f"{stage.lineage}/{stage.sound}_{other}"]
    return Subject(
        session=session,
        run=run,
        prompt=stage.prompt,
        rows=rows,
        base_folder=session.world.path(stage.role),
        reference=Path(str(reference.path)),
    )


def tasks(rows: Rows) -> dict[str, np.ndarray]:
    """The labels as they are, and as they are of a task that can hardly be learnt.

    A real adapter seldom orders real rows as the embedded one's does: with so many of the labels
    drawn anew, a perfect order has an AUC of about 0.7.
    """
    assert rows.labels is not None
    source = np.random.default_rng(len(rows))
    anew = source.random(len(rows)) < DRAWN_ANEW
    return {
        "clear": rows.labels,
        "hard": np.where(anew, source.permutation(rows.labels), rows.labels),
    }


KEPT = (BASE, FIRST, REFERENCE)


def say(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)


def replay_seed(case_path: Path, folder: str, seed: int) -> list[Replay]:
    """The replays of one training of the world, "" being the shipped one."""
    case = load_case(case_path)
    world = resolve_world(case, "embedded", trained=folder, seed=seed)
    return replay_world(case, world, EXTRA / str(seed), report=say)


EXTRA = Path("_build/cause_profiles")


def main() -> None:
    """Train what is missing, plant every cause, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="cases/qwen-lora.yml", type=Path)
    parser.add_argument("--worlds", default=2, type=int)
    parser.add_argument("--cores", default=0, type=int, help="0 takes all")
    chosen = parser.parse_args()
    cores = chosen.cores or len(os.sched_getaffinity(0))
    # What libraries tell their developers is nobody's concern here.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    case = load_case(chosen.case)
    first = case.profile("embedded").seed
    folders = {first: ""}
    for seed in range(first + 1, first + chosen.worlds):
        folders[seed] = str(Path("_build/worlds", str(seed)))
        train_world(chosen.case, seed=seed, folder=Path(folders[seed]), cores=cores)
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(replay_seed, chosen.case, place, seed) for seed, place in folders.items()
        ]
        replays = [replay for found in running for replay in found.result()]
    write_profiles(SHIPPED, replays, case=case, worlds=folders)
    print(f"cause profiles: {len(replays)} replays, {describe_judgements(replays)}")


if __name__ == "__main__":
    try:
        main()
    except PostmortemError as error:
        say(f"cause_profiles: {error}")
        raise SystemExit(error.exit_code) from None
