"""Measure how often `postmortem identify --candidates` is right, on siblings trained on the spot.

Several groups of siblings with the tasks of the calibration, and as many with those that are held
out; the last line is about the latter. A group takes about 20 seconds on one core.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from postmortem.case.load import load_case
from postmortem.checker.errors import PostmortemError
from postmortem.experiments.metrics import Estimate
from postmortem.suite.attribution import format_answer
from tools.attribution import count_answers
from tools.siblings import (
    CALIBRATION,
    HELD_OUT,
    KINDS,
    Group,
    Trial,
    measure_group,
    more_of,
)


def say(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)


def measure(case: Path, group: Group) -> tuple[Trial, ...]:
    """One group, in a process of its own."""
    with TemporaryDirectory() as folder:
        return measure_group(load_case(case), group, Path(folder))[0]


def describe(trials: Sequence[Trial]) -> str:
    """Shares of right answers among bases trained apart and of wrong ones among all questions."""
    right, wrong = map(format_share, count_answers(trials))
    return f"right {right} of the separable, wrong {wrong} of all"


def format_share(share: Estimate) -> str:
    """A share as a count, with its interval."""
    assert share.value is not None
    return f"{share.value * share.n:.0f}/{share.n} [{share.low:.2f}, {share.high:.2f}]"


def main() -> None:
    """Train the groups, ask every question, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="cases/qwen-lora.yml", type=Path)
    parser.add_argument("--groups", default=5, type=int, help="groups of either kind")
    parser.add_argument("--cores", default=0, type=int, help="0 takes all")
    chosen = parser.parse_args()
    start, cores = time.perf_counter(), chosen.cores or len(os.sched_getaffinity(0))
    # What libraries tell their developers is nobody's concern here.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    kinds = (CALIBRATION, HELD_OUT)
    groups = [more_of(kind, number) for kind in kinds for number in range(chosen.groups)]
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        measured = pool.map(measure, [chosen.case] * len(groups), groups)
        trials = list(chain.from_iterable(measured))
    lines = {}
    for kind in kinds:
        own = [trial for trial in trials if trial.group == kind.title]
        lines[kind.title] = describe(own)
        say(f"{kind.title}: {lines[kind.title]}")
        for asked in KINDS:
            counts = Counter(trial.outcome for trial in own if trial.kind == asked)
            say(f"  {asked}: {', '.join(f'{n} {word}' for word, n in sorted(counts.items()))}")
        for trial in own:
            if trial.outcome == "wrong":
                answer = format_answer(trial.attribution)
                say(f"  wrong: {trial.adapter}, {trial.kind}: {answer}")
    seconds = time.perf_counter() - start
    print(f"membership: held out, {lines[HELD_OUT.title]}, {seconds:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except PostmortemError as error:
        say(f"measure_attribution: {error}")
        raise SystemExit(error.exit_code) from None
