"""Train the embedded world anew and say what is the same as in the one that is shipped.

Usage: python -m tools.train_world [--seed 0] [--out FOLDER] [--against results/embedded]
Bases go to FOLDER/bases, adapters to FOLDER/adapters, and FOLDER/world.jsonl is the record of the
training: what was reached in how many steps, the digest of each model, and a sample of answers.
What an earlier run left in FOLDER is replaced.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from postmortem.case.load import load_case
from postmortem.case.rows import choose_rows
from postmortem.checker.errors import PostmortemError
from postmortem.experiments.ask import System, ask
from postmortem.experiments.records import (
    WORLD,
    Cell,
    Prediction,
    RecordFile,
    compare_answers,
    members_of,
    model_folders,
    read_records,
)
from postmortem.experiments.session import Session
from postmortem.models.model_set import BASES, digest_model, resolve_world
from tools.embedded_world import LINEAGES, build_lineage

PROFILE = "embedded"
# Prompts and rows of the sample: of every base, and of every adapter on its base.
BASE_PROMPTS, ADAPTER_PROMPTS, ROWS = ("v1", "v2", "yes_no"), ("v2",), 4
MEMBERS = ("model", "digest", "steps", "reached on held-out rows")


def say(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)


def train_world(case_path: Path, *, seed: int, folder: Path, cores: int) -> None:
    """Train every lineage, each as soon as the one that it starts from is there."""
    waiting = dict(LINEAGES)
    running: dict[Future[None], str] = {}
    done = {""}
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            for name in [n for n, lineage in waiting.items() if lineage.start in done]:
                del waiting[name]
                running[pool.submit(_train_lineage, case_path, name, seed, folder)] = name
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                finished.result()
                done.add(running.pop(finished))


def _train_lineage(case_path: Path, name: str, seed: int, folder: Path) -> None:
    """One lineage, in a process of its own, which reads the case for itself."""
    build_lineage(load_case(case_path), name, seed=seed, folder=folder, report=say)


def record_world(case_path: Path, *, seed: int, folder: Path, out: Path) -> RecordFile:
    """Write the record of a trained world: its models by digest, and a sample of their answers."""
    case = load_case(case_path)
    session = Session(
        notebook=Path(__file__),
        case=case,
        profile_name=PROFILE,
        world=resolve_world(case, PROFILE, trained=str(folder), seed=seed),
        rows=choose_rows(case, PROFILE, rows=ROWS),
        records_path=out,
        parameters={"rows": ROWS},
        device="cpu",
    )
    session.table("members", MEMBERS, [*_list_members(folder)])
    for role in filter(session.world.has, BASES):
        for prompt in BASE_PROMPTS:
            session.add(*ask(session, System(role, base=role), prompt).predictions)
        names = [name for name, lineage in LINEAGES.items() if lineage.base == role]
        for name in names:
            for adapter in sorted((folder / "adapters" / name).glob("*")):
                for prompt in ADAPTER_PROMPTS:
                    system = System(f"{name}/{adapter.name}", adapter, base=role)
                    session.add(*ask(session, system, prompt).predictions)
    session.finish()
    return read_records(out)


def _list_members(folder: Path) -> Iterable[tuple[Cell, ...]]:
    for name, place in model_folders(folder).items():
        reached = json.loads((place / "training.json").read_text(encoding="utf-8"))
        steps = int(reached.pop("steps"))
        told = ", ".join(f"{key} {value:.3f}" for key, value in reached.items())
        yield name, digest_model(place), steps, told


def describe_difference(shipped: RecordFile, trained: RecordFile) -> str:
    """What two trainings have in common: models to the byte, and answers."""
    ours, theirs = map(members_of, (shipped, trained))
    same = sum(theirs.get(name) == digest for name, digest in ours.items())
    found = compare_answers(shipped.of(Prediction), trained.of(Prediction))
    return (
        f"{same} of {len(ours)} models the same to the byte, "
        f"{found.texts} of {found.answers} answers the same"
    )


def main() -> None:
    """Train what is missing, record it, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="cases/qwen-lora.yml", type=Path)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--out", default=Path("_build/worlds/0"), type=Path)
    parser.add_argument("--cores", default=0, type=int, help="0 takes all")
    parser.add_argument("--against", type=Path, help="a folder of models to compare with")
    chosen = parser.parse_args()
    cores, start = chosen.cores or len(os.sched_getaffinity(0)), time.perf_counter()
    # What libraries tell their developers is nobody's concern here.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    train_world(chosen.case, seed=chosen.seed, folder=chosen.out, cores=cores)
    out = chosen.out / f"{WORLD}.jsonl"
    trained = record_world(chosen.case, seed=chosen.seed, folder=chosen.out, out=out)
    line = f"{len(members_of(trained))} models trained"
    if chosen.against:
        shipped = read_records(chosen.against / f"{WORLD}.jsonl")
        line = f"of {chosen.against}, {describe_difference(shipped, trained)}"
    print(f"world: {chosen.out}: {line}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except PostmortemError as error:
        say(f"train_world: {error}")
        raise SystemExit(error.exit_code) from None
