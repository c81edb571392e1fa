"""Plant faults in real adapters that took no part in anything here, and count what is made of them.

Usage: python -m tools.held_out --data ROWS.csv [--minutes 10] [--cores 2]
The adapters are those of SmolLM2, asked in both contracts on real rows with labels, and without.
The record is what the pages say of the diagnosis elsewhere: `results/embedded/held_out.jsonl`; of
the rows it holds the number alone.
"""

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from postmortem.case.layout import RESULTS
from postmortem.case.load import load_case
from postmortem.checker.config import layer_of
from postmortem.diagnosis.likelihoods import HEALTHY, meanings
from postmortem.diagnosis.timed import JUDGED, diagnose_case, stand
from postmortem.experiments.metrics import rate_estimate
from postmortem.experiments.records import (
    HELD_OUT,
    Measure,
    Provenance,
    Record,
    Table,
    describe_run,
    package_versions,
    write_records,
)
from postmortem.models.changes import (
    Change,
    Tensors,
    copy_changed,
    edit_config,
    rotate,
    scale,
    shift_layers,
    zero_b,
)
from tools.cause_profiles import TensorChange, keep_rows, without

ADAPTERS = RESULTS / "smollm2" / "adapters"
# The prompts are those of the shipped case, which the adapters were trained for.
PROMPTS = {"yes_no": "yes_no", "numeric": "v2"}


def permute_layers(tensors: Tensors) -> Tensors:
    """Each layer's tensors in the place of another one drawn at random."""
    layers = sorted({layer for name in tensors if (layer := layer_of(name)) is not None})
    drawn = dict(zip(layers, random.Random(0).sample(layers, len(layers)), strict=True))
    found = {}
    for name, tensor in tensors.items():
        layer = layer_of(name)
        place = name if layer is None else name.replace(f".{layer}.", f".{drawn[layer]}.", 1)
        found[place] = tensor
    return found


def randomise(tensors: Tensors, *, factors: Sequence[str]) -> Tensors:
    """Random numbers of the same spread in place of the factors."""
    source, found = torch.Generator().manual_seed(1), {}
    for name, tensor in tensors.items():
        drawn = torch.randn(tensor.shape, generator=source) * tensor.std()
        found[name] = drawn if any(factor in name for factor in factors) else tensor
    return found


def each(change: TensorChange) -> Change:
    """A change of each tensor as one of all."""
    return lambda tensors: {name: change(name, tensor) for name, tensor in tensors.items()}


def nest(tensors: Tensors) -> Tensors:
    """Each name under one prefix more."""
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Fault:
    """What is planted: the cause it is an example of, in an adapter of a contract."""

    cause: str
    change: Change | None = None
    config: Mapping[str, object] | None = None
    adapter: str = ""


FAULTS: Mapping[str, Fault] = {
    "sound": Fault(HEALTHY),
    "sound, written with half of alpha": Fault(HEALTHY, scale(2), {"lora_alpha": 16}),
    "lora_B zero": Fault("zero-b", zero_b),
    "a prefix too many": Fault("key-prefix", nest),
    "scale applied twice": Fault("scale-up", None, {"lora_alpha": 64}),
    "alpha ×4": Fault("scale-up", None, {"lora_alpha": 128}),
    "alpha ×16": Fault("scale-up", None, {"lora_alpha": 512}),
    "alpha ÷4": Fault("scale-down", None, {"lora_alpha": 8}),
    "alpha ÷16": Fault("scale-down", None, {"lora_alpha": 2}),
    "noise for lora_B": Fault("random-weights", partial(randomise, factors=("lora_B",))),
    "noise for both factors": Fault(
        "random-weights", partial(randomise, factors=("lora_A", "lora_B"))
    ),
    "turned at random": Fault("sibling-base", partial(rotate, seed=5)),
    "layers moved by one": Fault("layers-shifted", shift_layers),
    "layers moved by three": Fault("layers-shifted", partial(shift_layers, by=3)),
    "layers in another order": Fault("layers-permuted", permute_layers),
    "sign flipped": Fault("sign-flipped", scale(-1)),
    "half of the rows zero": Fault("rows-zero", each(keep_rows(1 / 2))),
    "v_proj untrained": Fault("half-untrained", each(without("v_proj"))),
    "trained for another answer": Fault("other-answer", adapter="numeric"),
    "trained to think first": Fault("other-answer", adapter="thinking"),
}


def plant(fault: Fault, folder: Path, *, contract: str) -> Path:
    """The adapter with the fault, in a folder."""
    other = "yes_no" if contract == fault.adapter else fault.adapter
    made = copy_changed(ADAPTERS / (other or contract), folder, fault.change or dict)
    if fault.config:
        edit_config(made, **fault.config)
    return made


def diagnose(
    name: str, contract: str, *, case_path: Path, data: Path, minutes: float, labelled: bool
) -> tuple[str, ...]:
    """One fault, planted and diagnosed: what was said, and how that stands to the truth."""
    torch.set_num_threads(1)
    fault, shipped = FAULTS[name], yaml.safe_load(case_path.read_text(encoding="utf-8"))
    with TemporaryDirectory() as scratch:
        asked = shipped["prompts"][PROMPTS[contract]]
        prompt = {
            key: asked[key] for key in ("contract", "template", "system", "chat") if key in asked
        }
        columns = {"text": "body"} | ({"label": "rule_violation"} if labelled else {})
        content = {
            "case_version": 1,
            "name": "held-out",
            "base": "packaged:smollm2",
            "suspect": str(plant(fault, Path(scratch, "adapter"), contract=contract)),
            "data": str(data.resolve()),
            "columns": columns,
            "prompts": {contract: prompt},
        }
        path = Path(scratch, "case.yml")
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        start = time.perf_counter()
        diagnosis, found = diagnose_case(
            load_case(path),
            profile="own",
            minutes=minutes,
            prior="flat",
            told=(),
            report=lambda line: print(f"  {name}, {contract}: {line}", file=sys.stderr, flush=True),
        )
        seconds = time.perf_counter() - start
    said = found.finding.id if found.finding is not None else found.family
    first = found.causes[0][0] if found.causes else ""
    told = stand(found, fault.cause)
    print(f"{name}, {contract}: {found.word}, {said}, {first}: {told}", file=sys.stderr, flush=True)
    given = "with labels" if labelled else "without"
    rows = str(len(diagnosis.subject.in_use))
    return (name, contract, given, rows, f"{seconds:.0f}", found.word, said, first, told)


COLUMNS = (
    "planted",
    "contract",
    "labels",
    "rows asked",
    "seconds",
    "verdict",
    "kind of fault, or finding",
    "likeliest cause",
    "judged",
)


def count(rows: Sequence[Sequence[str]], minutes: float) -> Iterator[Record]:
    """The shares that the pages quote, with their intervals, and every diagnosis."""
    yield Table(key="held_out.diagnoses", columns=COLUMNS, rows=tuple(map(tuple, rows)))
    sound = [row for row in rows if FAULTS[row[0]].cause == HEALTHY]
    faulty = [row for row in rows if FAULTS[row[0]].cause != HEALTHY]
    named = [row for row in faulty if row[-1] in ("cause named", "kind named")]
    works = [row for row in sound if row[-1] == "cause named"]
    wrong = [row for row in rows if row[-1] == "wrong"]
    shares = {
        "named": rate_estimate(len(named), len(faulty)),
        "sound_works": rate_estimate(len(works), len(sound)),
        "wrong": rate_estimate(len(wrong), len(rows)),
    }
    for key, share in shares.items():
        yield Measure(key=f"held_out.{key}", **dataclasses.asdict(share))
    yield Measure(key="held_out.minutes", value=minutes, unit="min")
    for word in JUDGED:
        hits = sum(row[-1] == word for row in rows)
        yield Measure(key=f"held_out.count.{word.replace(' ', '_')}", value=hits)


def main() -> None:
    """Plant, diagnose, count and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="cases/qwen-lora.yml", type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--minutes", default=10.0, type=float)
    parser.add_argument("--cores", default=2, type=int)
    parser.add_argument("--contracts", nargs="*", default=[*PROMPTS])
    parser.add_argument("--unlabelled", nargs="*", default=["yes_no"], help="contracts")
    parser.add_argument("--faults", nargs="*", default=[*FAULTS])
    parser.add_argument("--out", default=RESULTS / "embedded" / HELD_OUT, type=Path)
    chosen, started = parser.parse_args(), time.time()
    pairs = [(name, contract) for contract in chosen.contracts for name in chosen.faults]
    work: Callable[..., tuple[str, ...]] = partial(
        diagnose, case_path=chosen.case, data=chosen.data, minutes=chosen.minutes
    )
    with ProcessPoolExecutor(chosen.cores, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(work, *pair, labelled=True) for pair in pairs]
        running += [
            pool.submit(work, name, contract, labelled=False)
            for contract in chosen.unlabelled
            for name in chosen.faults
        ]
        rows = [found.result() for found in running]
    records = [*count(rows, chosen.minutes)]
    provenance = Provenance(
        notebook="held_out",
        case=load_case(chosen.case).name,
        profile="smollm2",
        parameters={"rows": 0, "minutes": chosen.minutes},
        digests={},
        versions=package_versions(),
        device="cpu",
        dtype="float32",
        seed=0,
        aside=describe_run(started),
    )
    write_records(chosen.out, provenance, records=records)
    shares = {r.key: r.value for r in records if isinstance(r, Measure)}
    told = ", ".join(
        f"{key} {shares[f'held_out.{key}']:.2f}" for key in ("named", "sound_works", "wrong")
    )
    print(f"held out: {len(rows)} diagnoses, {told}, of {len(meanings())} causes")


if __name__ == "__main__":
    main()
