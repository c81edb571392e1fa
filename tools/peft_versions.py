"""Load adapters that fit and that do not with releases of PEFT, each in an environment of its own.

Usage: python -m tools.peft_versions
The record is what the pages say of other releases: `results/embedded/peft_versions.jsonl`. An
environment is made in a temporary folder, by uv where it is on the path, and removed after use.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from postmortem.case.layout import RESULTS
from postmortem.case.load import load_case
from postmortem.checker.errors import RecordError
from postmortem.experiments.records import (
    NO_MODEL,
    PEFT_VERSIONS,
    Measure,
    Provenance,
    Record,
    Table,
    Text,
    Verdict,
    describe_run,
    digest_notebook,
    package_versions,
    write_records,
)

CASES = Path(__file__).with_name("peft_cases.py")
# Releases of PEFT, each with the newest transformers of the day it came out. The last pair is the
# one that this project runs.
PAIRS: Mapping[str, str] = {
    "0.14.0": "4.47.0",
    "0.15.2": "4.51.3",
    "0.16.0": "4.53.0",
    "0.17.1": "4.55.3",
    "0.18.1": "4.57.3",
    "0.19.1": "5.5.4",
    "0.20.0": "5.14.1",
    version("peft"): version("transformers"),
}
MISFITS = ("wider", "narrower")
SAVED = {"saved_by_0_17_1": "saved by 0.17.1", "saved_by_0_21_2": "saved by 0.21.2"}
REACTIONS = ("raises", "warns", "silent")


@dataclass(frozen=True)
class Release:
    """A release of PEFT as it was run: the versions beside it, and what it did with each case."""

    versions: Mapping[str, str]
    cases: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The release's number."""
        return self.versions["peft"]

    @property
    def did(self) -> dict[str, str]:
        """Whether it raised, warned or was silent, by case."""
        return {id_: str(case["did"]) for id_, case in self.cases.items()}


def run_release(peft: str, transformers: str) -> Release:
    """Run the cases with a release, in an environment that is gone afterwards."""
    with TemporaryDirectory() as folder:
        python = make_environment(
            Path(folder, "environment"),
            [
                f"peft=={peft}",
                f"transformers=={transformers}",
                *(f"{name}=={version(name)}" for name in ("torch", "safetensors")),
            ],
        )
        return run_cases(python)


def make_environment(folder: Path, packages: Sequence[str]) -> Path:
    """Install packages into a new environment; its Python."""
    python, uv = folder / "bin/python", shutil.which("uv")
    if uv:
        commands = [
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(python), *packages],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *packages],
        ]
    for command in commands:
        subprocess.run(command, check=True)
    return python


def run_cases(python: str | Path) -> Release:
    """Run the cases with the packages of an interpreter; raises `RecordError` where they end early.

    The script is run as a file, so that nothing of this project is in its reach.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [str(python), str(CASES.resolve())],
        env=environment | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [""])[-1]
        raise RecordError(CASES, expected="every case to be tried", found=told)
    versions, *cases = map(json.loads, done.stdout.splitlines())
    return Release(versions, {case["id"]: case for case in cases})


def records_of(releases: Sequence[Release]) -> Iterator[Record]:
    """What the releases did, as the pages show it."""
    newest = releases[-1]
    # Releases that do the same with every case share a column.
    alike = [list(same) for _, same in groupby(releases, key=lambda one: one.did)]
    yield Table(
        key="peft.cases",
        columns=("adapter", *(", ".join(one.name for one in same) for same in alike), "answers"),
        rows=tuple(
            (
                str(case["name"]),
                *(same[0].did[id_] for same in alike),
                say_answers(releases, id_),
            )
            for id_, case in newest.cases.items()
        ),
    )
    yield Table(
        key="peft.unknown_keys",
        columns=("PEFT", "transformers", *SAVED.values()),
        rows=tuple(
            (
                release.name,
                release.versions["transformers"],
                *(_listed(release.cases[case]["words"]) for case in SAVED),
            )
            for release in releases
        ),
    )
    yield Table(
        key="peft.words",
        columns=("adapter", "PEFT", "does", "answers", "mismatches", "words"),
        rows=tuple(
            (id_, release.name, *(case[k] for k in ("did", "answers", "mismatches", "words")))
            for release in releases
            for id_, case in release.cases.items()
        ),
    )
    for release in releases:
        yield Text(key=f"peft.wider.{release.name}", text=release.cases["wider"]["words"])
        yield Text(
            key=f"peft.saved_by_0_17_1.{release.name}",
            text=release.cases["saved_by_0_17_1"]["words"] or "nothing",
        )
    yield Text(key="peft.wider.newest", text=newest.cases["wider"]["words"])
    yield from _summaries(releases)


def _summaries(releases: Sequence[Release]) -> Iterator[Record]:
    newest = releases[-1]
    raised = [
        (release.name, misfit)
        for release in releases
        for misfit in MISFITS
        if release.did[misfit] == "raises"
    ]
    span = f"{releases[0].name} to {newest.name}"
    yield Verdict(
        key="peft.misfit_raises",
        verdict="holds" if len(raised) == len(MISFITS) * len(releases) else "refuted",
        because=f"in {len(raised)} of {len(MISFITS) * len(releases)} trials with {len(releases)} "
        f"releases, {span}, an adapter for a wider or a narrower base ends in an error",
    )
    others = [r.name for r in releases if r.cases["wider"]["words"] != _words(newest, "wider")]
    yield Verdict(
        key="peft.same_words",
        verdict="refuted" if others else "holds",
        because=f"{', '.join(others)} say it in other words"
        if others
        else f"the words are the same from {span}",
    )
    did = [{release.did[case] for release in releases} for case in newest.cases]
    yield Measure(key="peft.releases", value=len(releases))
    yield Measure(key="peft.adapters", value=len(did))
    yield Measure(key="peft.differ", value=sum(len(found) > 1 for found in did))
    for reaction in REACTIONS:
        yield Measure(key=f"peft.{reaction}", value=sum(found == {reaction} for found in did))


def _words(release: Release, case: str) -> str:
    return str(release.cases[case]["words"])


def say_answers(releases: Sequence[Release], case: str) -> str:
    """How the model answers once the adapter is loaded, and from which release otherwise."""
    told = [(r.name, str(r.cases[case]["answers"])) for r in releases if r.cases[case]["answers"]]
    spans = [(word, next(names)[0]) for word, names in groupby(told, key=lambda one: one[1])]
    later = [f"from {first} {word}" for word, first in spans[1:]]
    return ", ".join([spans[0][0], *later]) if spans else "–"


def _listed(words: str) -> str:
    """The keys that a warning lists."""
    found = re.search(r"\[(.*?)\]", words)
    return found[1].replace("'", "") if found else "no warning"


def write(releases: Sequence[Release], case_path: Path, *, started: float) -> Path:
    """Seal the record, the versions of every release in its provenance."""
    path = RESULTS / "embedded" / f"{PEFT_VERSIONS}.jsonl"
    ran = {
        f"{name} beside peft {release.name}": found
        for release in releases
        for name, found in release.versions.items()
        if name != "peft"
    }
    provenance = Provenance(
        notebook=PEFT_VERSIONS,
        case=load_case(case_path).name,
        profile="embedded",
        parameters={"rows": 0, "peft": " ".join(release.name for release in releases)},
        # Neither the case nor its models have a part in it.
        digests={"notebook": digest_notebook(CASES)},
        versions=package_versions() | ran,
        device=NO_MODEL,
        dtype=NO_MODEL,
        seed=0,
        aside=describe_run(started),
    )
    write_records(path, provenance, records=records_of(releases))
    return path


def run_all(pairs: Iterable[tuple[str, str]]) -> Iterator[Release]:
    """Run each release, saying how it went."""
    for peft, transformers in pairs:
        release = run_release(peft, transformers)
        did = list(release.did.values())
        counts = ", ".join(f"{did.count(word)} {word}" for word in REACTIONS)
        print(f"peft {peft}, transformers {transformers}: {counts}", file=sys.stderr, flush=True)
        yield release


def main() -> None:
    """Run every release and keep what they did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="cases/qwen-lora.yml", type=Path)
    chosen = parser.parse_args()
    started = time.time()
    releases = list(run_all(PAIRS.items()))
    path = write(releases, chosen.case, started=started)
    print(f"peft versions: {path} ({len(releases)} releases, {time.time() - started:.0f} s)")


if __name__ == "__main__":
    try:
        main()
    except RecordError as error:
        print(f"peft_versions: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
