"""The findings of the checker: one entry each, with the limits they are decided by."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from postmortem.checker.errors import ModelError, printable

# The greatest finite float16; an update whose norm exceeds it can turn one unit of input infinite.
FLOAT16_LIMIT = 65_504.0
# Half of the smallest float16: what lies at or below it is rounded to zero.
FLOAT16_ZERO = 2.0**-25


def update_bound(scale: float, norm_a: float, norm_b: float) -> float:
    """Upper bound of the norm, and so of every element, of the update scale · B · A."""
    return abs(scale) * norm_a * norm_b


def describe_overflow(largest: float, bound: float) -> str | None:
    """What is too large for float16, in words; None where nothing is.

    `largest` is the greatest magnitude in A and B, `bound` that of `update_bound`.
    """
    if max(bound, largest) <= FLOAT16_LIMIT:
        return None
    return f"largest value {largest:.3g}, update norm {bound:.3g}"


def describe_underflow(bound: float) -> str | None:
    """What float16 rounds to zero, in words; None for an update that is zero already."""
    if not 0 < bound <= FLOAT16_ZERO:
        return None
    return f"update norm {bound:.3g}, which float16 rounds to zero"


SEVERITIES = ("error", "warning", "info")

# alpha/r of published adapters runs from 1/8 (alpha 16, r 128) to 4 (alpha 32, r 8), and PEFT's
# default alpha of 8 gives 8 on r 1; a factor of eight gained on the usual 2 lands at 16.
SCALE_LIMITS = (1 / 16, 8.0)
# One alpha for every rank is a recipe in use, from r 1 upwards.
CONSTANT_ALPHA = 32.0
# rank-stabilised adapters divide by the root of r: alpha 512 on r 256 gives 32.
RSLORA_SCALE_LIMITS = (1 / 16, 64.0)
# One silent pair can be a module that no example reached; half of them is a training failure.
UNTRAINED_SHARE = 0.5
# Ranks hold the same share of every factor, but for a rounding to whole rows.
ALIKE_SLICES = 0.02
# Of a fused projection q, k or v may be left out, up to two of the three.
FUSED_SLICE = 0.7
# 3.8B models are sold as 4B and 7.6B as 7B; sizes further apart name different models.
SIZE_RATIO = 1.3
# Headers, metadata and rounding explain a tenth; dtype widths are compared separately.
SIZE_TOLERANCE = 0.1


Place = tuple[str, str, str]  # Where it was seen, what was expected, what was found.


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the files show: what is wrong, the evidence for it, and what to do."""

    id: str
    severity: str
    message: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known about one kind of failure; `peft` says what PEFT does, by version."""

    id: str
    severity: str
    title: str
    symptom: str
    cause: str
    settles: str
    remedy: str
    peft: str
    threads: tuple[str, ...] = ()


@cache
def catalogue() -> Mapping[str, Entry]:
    """Return the entries of catalogue.csv by id, in the order of the contract."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    entries = (Entry(**{**row, "threads": tuple(row["threads"].split())}) for row in rows)
    return {entry.id: entry for entry in entries}


def find_entry(finding_id: str) -> Entry:
    """Return the entry of an id; raises ModelError for one that is not in the catalogue."""
    if finding_id not in catalogue():
        raise ModelError(finding_id, expected=f"one of {', '.join(catalogue())}")
    return catalogue()[finding_id]


def finding(
    finding_id: str,
    *,
    evidence: str,
    expected: str,
    found: str,
    count: int = 1,
    severity: str = "",
    remedy: str = "",
    title: str = "",
) -> Finding:
    """Build a finding of a catalogued kind; `evidence` names the first tensor or key of `count`.

    Severity, remedy and title are the entry's own where none is given.
    """
    entry = catalogue()[finding_id]
    where = printable(evidence, 200)
    detail = f"expected {printable(expected)}, found {printable(found)}"
    times = f" ({count} in all)" if count > 1 else ""
    return Finding(
        id=finding_id,
        severity=severity or entry.severity,
        message=f"{title or entry.title}: {where}: {detail}",
        evidence=f"{where}: {detail}{times}",
        remedy=remedy or entry.remedy,
    )


def grouped(
    finding_id: str,
    places: Sequence[Place],
    severity: str = "",
    *,
    remedy: str = "",
    title: str = "",
) -> list[Finding]:
    """Make one finding of many places, or none: the first place stands for them, with the count."""
    if not places:
        return []
    where, expected, found = places[0]
    return [
        finding(
            finding_id,
            evidence=where,
            expected=expected,
            found=found,
            count=len(places),
            severity=severity,
            remedy=remedy,
            title=title,
        )
    ]
