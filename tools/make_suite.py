"""Make a suite of 160 sound adapters and 40 planted faults, run it, and say what it kept.

The adapters are made on the embedded world's base below `_build/suite` and kept there; the results
are resumed where a run was stopped. The time printed is the suite's own.
"""

import argparse
import os
import sys
from pathlib import Path

from postmortem.book.build import run_suite
from postmortem.case.load import load_case
from postmortem.checker.errors import PostmortemError
from tools.planted import plant

FOLDER = Path("_build/suite")


def say(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Train what is missing, make the adapters, run the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="cases/qwen-lora.yml", type=Path)
    parser.add_argument("--cores", default=0, type=int, help="0 takes all")
    chosen = parser.parse_args()
    cores = chosen.cores or len(os.sched_getaffinity(0))
    # What libraries tell their developers is nobody's concern here.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    base = Path(load_case(chosen.case).profile("embedded").base)
    say(plant(chosen.case, base, FOLDER / "made", cores=cores, report=say))
    print(run_suite(FOLDER / "made/suite.yml", FOLDER / "results", cores=cores))


if __name__ == "__main__":
    try:
        main()
    except PostmortemError as error:
        say(f"make_suite: {error}")
        raise SystemExit(error.exit_code) from None
