"""Train the adapters of a profile whose base is a real model.

Usage: python -m tools.train_adapters --profile smollm2 [--only yes_no] [--rows 400]
[--data FILE] [--device cuda]
Each adapter goes to `results/PROFILE/adapters/NAME`, with the record of its training. With
--data the rows of a file in the case's columns are used; the last quarter of them is held out.
The recipes are made for a GPU; on a processor --rows makes them shorter.
"""

import argparse
import sys
from pathlib import Path

from postmortem.case.load import load_case
from postmortem.checker.errors import PostmortemError
from tools.real_adapters import RECIPES, train_profile_adapter


def main() -> int:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train adapters on the base of a profile.")
    parser.add_argument("--case", default="cases/qwen-lora.yml", help="the case file")
    parser.add_argument("--profile", required=True, choices=list(RECIPES))
    parser.add_argument("--only", default="", help="the one adapter to train")
    parser.add_argument("--data", default="", help="rows in the case's columns, as CSV")
    parser.add_argument("--labels", default="", help="their labels, where in another file")
    parser.add_argument("--rows", type=int, default=0, help="rows to learn from, if not all")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default="results", help="the folder to write to")
    chosen = parser.parse_args()
    adapters = [chosen.only] if chosen.only else list(RECIPES[chosen.profile])
    try:
        case = load_case(chosen.case)
        for adapter in adapters:
            record = train_profile_adapter(
                case,
                chosen.profile,
                adapter,
                folder=Path(chosen.out) / chosen.profile / "adapters" / adapter,
                data=chosen.data,
                labels=chosen.labels,
                rows=chosen.rows,
                device=chosen.device,
                report=lambda line: print(line, flush=True),
            )
            for name, found in record.items():
                print(f"  {name}: {found}", flush=True)
    except PostmortemError as error:
        print(f"train_adapters: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
