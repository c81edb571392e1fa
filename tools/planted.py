"""A suite whose answer is known: adapters trained or derived and measured, and planted faults.

A training takes seconds and two hundred of them an hour, so most sound adapters are derived from a
few trainings: weighted means of two, other scales, added noise. Each is measured on rows that the
suite does not see, and only those that reach the criterion are called sound.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from postmortem.case.files import write_text
from postmortem.case.load import load_case
from postmortem.case.prompts import encode_rows, lead_of, parse_strict
from postmortem.case.rows import generate_rows
from postmortem.checker.adapter import WEIGHTS_FILE
from postmortem.checker.errors import SuiteError, WorldError
from postmortem.experiments.metrics import auc
from postmortem.experiments.records import package_versions
from postmortem.models.changes import Tensors, edit_config, edit_tensors, scale, zero_b
from postmortem.models.loading import attached, load_base
from postmortem.models.model_set import digest_model
from postmortem.models.scoring import score
from tools.embedded_world import NUMERIC, Recipe, train_adapter

TRAININGS, SOUND, EACH = 8, 160, 5
# Far from the seeds of the world's own rows and adapters, and from those of a run.
FIRST_SEED, SUITE_SEED, JUDGING_SEED = 5000, 40_000, 41_000
ROWS = 256
# What an adapter must reach on the judging rows to be called sound: the numbers that it writes.
SOUND_AUC = 0.90
WEIGHTS = (0.5, 0.25, 0.75)
SCALES = (0.8, 1.2)
NOISE = (0.1, 0.2)
INVERTED_MIXES = (1.0, 0.0, 0.5, 0.25, 0.75)
ALPHA = 32


def teach_inverted_number(source: random.Random, label: int) -> str:
    """What an adapter learns whose labels were exchanged before training."""
    return source.choice(["0.1", "0.2", "0.3"] if label else ["0.7", "0.8", "0.9"])


# It is trained for its steps alone: no criterion of the world asks for a reversed ranking.
INVERTED: Recipe = replace(NUMERIC, teacher=teach_inverted_number, criterion={}, least=80)
Change = Callable[[Path], None]


def plant(
    case_path: Path, base: Path, folder: Path, *, cores: int, report: Callable[[str], None]
) -> str:
    """Make the adapters below `folder` and the suite file beside them, unless they are there.

    Returns a line on what was made. Raises `SuiteError` where the derived candidates hold too few
    sound ones.
    """
    made_from = {"base": digest_model(base), **package_versions()}
    note = folder / "planted.json"
    if note.is_file() and (made := json.loads(note.read_text()))["from"] == made_from:
        return str(made["line"])
    shutil.rmtree(folder, ignore_errors=True)
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        line = _plant(case_path, base, folder, pool=pool, report=report)
    suite = {
        "suite_version": 1,
        "title": "Planted faults on the embedded base",
        "base": str(base.resolve()),
        "adapters": ["adapters"],
        "case": str(case_path.resolve()),
        "ask": ["v2"],
        "rows": {"count": ROWS, "seed": SUITE_SEED},
    }
    write_text(folder / "suite.yml", yaml.safe_dump(suite, sort_keys=False))
    write_text(note, json.dumps({"from": made_from, "line": line}) + "\n")
    return line


def _plant(
    case_path: Path,
    base: Path,
    folder: Path,
    *,
    pool: ProcessPoolExecutor,
    report: Callable[[str], None],
) -> str:
    trained, candidates, adapters = (folder / n for n in ("trained", "candidates", "adapters"))
    seeds = range(FIRST_SEED, FIRST_SEED + TRAININGS + 2)
    is_inverted = [False] * TRAININGS + [True] * 2
    done = list(pool.map(partial(_train, case_path, base, trained), seeds, is_inverted))
    sources = [path for path in done[:TRAININGS] if path]
    inverted = [path for path in done[TRAININGS:] if path]
    report(f"{len(sources)} adapters trained, {len(inverted)} more on inverted labels")
    made = [_derive(candidates, *candidate) for candidate in list_candidates(sources)]
    parts = [made[start::8] for start in range(8)]
    aucs: dict[Path, float] = {}
    for measured in pool.map(partial(_measure, case_path, base), parts):
        aucs |= measured
    sound = [path for path in made if aucs[path] >= SOUND_AUC]
    if len(sound) < SOUND or not inverted:
        raise SuiteError(
            folder, expected=f"{SOUND} sound adapters", found=f"{len(sound)} of {len(made)}"
        )
    faults = list(list_faults(sources, inverted))
    # In one order that tells nothing, so that faults stand between sound ones.
    places = list(range(SOUND + len(faults)))
    random.Random(0).shuffle(places)
    adapters.mkdir()
    for path, place in zip(sound, places[:SOUND], strict=False):
        path.rename(adapters / f"{place:03d}-sound-{path.name}")
    for (name, source, change), place in zip(faults, places[SOUND:], strict=True):
        _derive(adapters, f"{place:03d}-{name}", source, change)
    shutil.rmtree(candidates)
    shutil.rmtree(trained)
    return (
        f"{SOUND} sound adapters from {len(sources) + len(inverted)} trainings "
        f"({done.count(None)} trainings failed, {len(made) - len(sound)} candidates were not "
        f"sound), {len(faults)} faults of {len(faults) // EACH} kinds"
    )


def _train(case_path: Path, base: Path, folder: Path, seed: int, inverted: bool) -> Path | None:
    """Train one adapter in a process of its own; None where it does not reach its criterion."""
    torch.set_num_threads(1)
    recipe, place = INVERTED if inverted else NUMERIC, folder / str(seed)
    try:
        train_adapter(
            load_case(case_path),
            base,
            recipe=recipe,
            seed=seed,
            folder=place,
            report=lambda line: None,
        )
    except WorldError:
        return None
    return place


def list_candidates(sources: Sequence[Path]) -> Iterator[tuple[str, Path, Change]]:
    """Names, origins and changes of the adapters to be measured: the trainings come first."""
    for number, source in enumerate(sources):
        yield f"trained-{number}", source, lambda folder: None
    for weight in WEIGHTS:
        for (i, first), (j, second) in combinations(enumerate(sources), 2):
            yield f"mean-{i}{j}-{weight:g}", first, partial(mix, other=second, weight=weight)
    for factor in SCALES:
        for number, source in enumerate(sources):
            change = partial(edit_config, lora_alpha=ALPHA * factor)
            yield f"scaled-{number}-{factor:g}", source, change
    for noise in NOISE:
        for seed in range(4):
            for number, source in enumerate(sources):
                change = partial(disturb, noise=noise, seed=seed)
                yield f"noisy-{number}-{noise:g}-{seed}", source, change


def mix(folder: Path, *, other: Path, weight: float) -> None:
    """Make an adapter the weighted mean of its update and another's: exactly, at twice the rank."""
    theirs = load_file(other / WEIGHTS_FILE)

    def join(tensors: Tensors) -> Tensors:
        return {
            name: torch.cat([tensor, theirs[name]])
            if "lora_A" in name
            else torch.cat([weight * tensor, (1 - weight) * theirs[name]], dim=1)
            for name, tensor in tensors.items()
        }

    edit_tensors(folder, join)
    settings = json.loads((folder / "adapter_config.json").read_text())
    edit_config(folder, r=2 * settings["r"], lora_alpha=2 * settings["lora_alpha"])


def disturb(folder: Path, *, noise: float, seed: int) -> None:
    """Add normal noise to every tensor, as large as this share of its own standard deviation."""
    source = torch.Generator().manual_seed(seed)
    edit_tensors(
        folder,
        lambda tensors: {
            name: t + noise * t.std() * torch.randn(t.shape, generator=source)
            for name, t in tensors.items()
        },
    )


def _lose_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("base_model.model."): t for name, t in tensors.items()}


def _widen(tensors: Tensors) -> Tensors:
    return {n: torch.cat([t, t], dim=1) if "lora_A" in n else t for n, t in tensors.items()}


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1000])


# Every kind matters by its nature: the adapter does not load, does nothing, or ranks worse than
# the base alone. Kinds of which some instances are harmless (two layers exchanged, a little noise)
# are left out, since whether one of those should be dropped has no answer but the measurement.
FAULTS: Mapping[str, Change] = {
    "zero-b": partial(edit_tensors, change=zero_b),
    "key-prefix": partial(edit_tensors, change=_lose_prefix),
    "other-shapes": partial(edit_tensors, change=_widen),
    "nan": partial(edit_tensors, change=scale(math.nan)),
    "truncated": _truncate,
    "negated": partial(edit_tensors, change=scale(-1.0)),
    "scaled-up": partial(edit_config, lora_alpha=8 * ALPHA),
}


def list_faults(
    sources: Sequence[Path], inverted: Sequence[Path]
) -> Iterator[tuple[str, Path, Change]]:
    """Names, origins and changes of the planted faults, as many of each kind."""
    for kind, change in FAULTS.items():
        for number in range(EACH):
            yield f"{kind}-{number}", sources[number % len(sources)], change
    for number, weight in enumerate(INVERTED_MIXES):
        change = partial(mix, other=inverted[-1], weight=weight)
        yield f"inverted-labels-{number}", inverted[0], change


def _derive(folder: Path, name: str, source: Path, change: Change) -> Path:
    change(shutil.copytree(source, folder / name))
    return folder / name


def _measure(case_path: Path, base_folder: Path, folders: Sequence[Path]) -> dict[Path, float]:
    """AUC of the numbers that each adapter writes on the judging rows; an unread one is 0.5."""
    torch.set_num_threads(1)
    case = load_case(case_path)
    base, template = load_base(base_folder, device="cpu"), case.prompts["v2"]
    rows = generate_rows(ROWS, JUDGING_SEED, columns=case.columns)
    assert rows.labels is not None
    prompts = encode_rows(template, rows, tokenizer=base.tokenizer, limit=4096)
    aucs = {}
    for folder in folders:
        with attached(base, folder) as loaded:
            scores = score(
                loaded.model,
                base.tokenizer,
                prompts=prompts,
                lead=lead_of(template),
                max_new_tokens=4,
            )
        values = [parse_strict(reply.text).value for reply in scores.replies]
        numbers = [0.5 if value is None else value for value in values]
        aucs[folder] = auc(rows.labels, numbers) or 0.0
    return aucs
