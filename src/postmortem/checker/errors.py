"""What can be wrong: errors, findings of a check, and guards around text that is not trusted."""

import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


class PostmortemError(Exception):
    """A failure that its user can act on.

    `subject` names the file or thing at fault. The command line prints the message without a
    traceback and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(
        self, subject: object, *, expected: str = "", found: str = "", remedy: str = ""
    ) -> None:
        self.subject, self.expected, self.found, self.remedy = (
            str(subject),
            expected,
            found,
            remedy,
        )
        parts = [self.subject]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        message = "; ".join([": ".join(parts[:2]), *parts[2:]])
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)


class CaseError(PostmortemError):
    """The case file, or a file it names, cannot be used."""


class DataError(PostmortemError):
    """The rows or the labels cannot be used."""


class ModelError(PostmortemError):
    """A model or adapter folder cannot be loaded."""


class WeightsError(PostmortemError):
    """Packaged weights could not be fetched, verified or converted."""


class WorldError(PostmortemError):
    """The embedded world did not reach its training criterion."""


class SuiteError(PostmortemError):
    """A suite names no adapter, prompt or rows, or its steps did not all succeed."""


class ClusterError(PostmortemError):
    """The graph cannot be run where it was asked to be: a profile, plugin or cluster is missing."""


class ParameterError(PostmortemError):
    """A notebook was given parameters that it does not declare, or not those it needs."""


class NotebookFailed(PostmortemError):
    """A notebook raised, timed out, lost its kernel, or left cells unexecuted."""


class NotebookNotStarted(PostmortemError):
    """A notebook could not be started at all."""


class RecordError(PostmortemError):
    """A record is missing, incomplete, altered or stale."""


class DiagnosisError(PostmortemError):
    """The replays, the prior or the observations cannot be reasoned from."""


class BookError(PostmortemError):
    """The book could not be built from the records."""


MAX_PATTERN = 2_000  # Characters; regexes that PEFT users write stay under a few hundred.
# A usable pattern needs microseconds a name; a check meets at most four patterns in turn. The time
# is the processor's: on a busy machine the child alone can take longer to start.
PATTERN_SECONDS = 0.4
_PATTERN_WAIT = 10 * PATTERN_SECONDS  # By the clock, where the system has no such timer.
_LITERAL = re.compile(r"[\w.\-]+")
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\d*\}")
# A repeated group or a back-reference is where matching can become exponential; so are choices in
# a row, of which patterns in use have a few.
_RISKY = re.compile(r"\)[*+{]|\\\d|\(\?P=")
_CHOICE = re.compile(r"[?|]")
_MAX_CHOICES = 12
_MATCHER = """
import json, re, signal, sys
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, float(sys.argv[1]))
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
except (ImportError, ValueError, OSError):
    pass
patterns, names = json.load(sys.stdin)
matched = [[n for n in names if re.compile(p).fullmatch(n)] for p in patterns]
json.dump(matched, sys.stdout)
"""


class UntrustedError(ValueError):
    """Text that cannot be used safely; the message says why in one clause."""


def printable(text: object, limit: int = 160) -> str:
    """Return text fit for a terminal or a page: no control characters, bounded length."""
    clean = "".join(c if c.isprintable() else "?" for c in str(text)[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def is_hub_id(text: str) -> bool:
    """Tell whether a text that is no path can be a hub id: owner/name."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise UntrustedError(f"duplicate key '{printable(name, 60)}'")
        result[name] = value
    return result


def parse_json(data: bytes) -> object:
    """Parse UTF-8 JSON; raises UntrustedError for anything a strict reader would not accept."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UntrustedError:
        raise
    except RecursionError:
        raise UntrustedError("nested too deeply") from None
    except UnicodeDecodeError:
        raise UntrustedError("not UTF-8 text") from None
    except ValueError as error:
        raise UntrustedError(f"not JSON ({printable(error, 80)})") from None


def match_names(patterns: Iterable[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return, for each regex, the names that it matches in full, as `re.fullmatch` would.

    A pattern that could take exponential time runs in a child process with a time and memory
    limit: `re` cannot be interrupted portably, and a matcher of our own would not be PEFT's.
    Raises UntrustedError for a pattern that is invalid, too long or too slow.
    """
    compiled = {pattern: _compile(pattern) for pattern in set(patterns)}
    risky = [p for p in compiled if _is_risky(p)]
    found = {
        pattern: frozenset(n for n in names if regex.fullmatch(n))
        for pattern, regex in compiled.items()
        if regex is not None and pattern not in risky
    }
    return found | (_match_in_child(risky, names) if risky else {})


def _is_risky(pattern: str) -> bool:
    choices = len(_CHOICE.findall(pattern))
    is_long = len(_UNBOUNDED.findall(pattern)) > 2 or choices > _MAX_CHOICES
    return is_long or _RISKY.search(pattern) is not None


def _compile(pattern: str) -> re.Pattern[str] | None:
    if len(pattern) > MAX_PATTERN:
        raise UntrustedError(f"a pattern of {len(pattern)} characters")
    # Compiling nested counted repeats can itself exhaust memory: the child does that.
    if _RISKY.search(pattern):
        return None
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise UntrustedError(f"no valid regex: {printable(error, 80)}") from None


def _match_in_child(patterns: list[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    import signal
    import subprocess  # Rarely needed, and a tenth of the start-up time.

    shown = printable(patterns[0], 60)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER, str(PATTERN_SECONDS)],
            input=json.dumps([patterns, list(names)]).encode(),
            capture_output=True,
            timeout=_PATTERN_WAIT,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise UntrustedError(f"the regex '{shown}' did not finish in time") from None
    except subprocess.CalledProcessError as error:
        if error.returncode == -getattr(signal, "SIGVTALRM", 0) < 0:
            raise UntrustedError(f"the regex '{shown}' did not finish in time") from None
        raise UntrustedError(f"the regex '{shown}' is not valid or needs too much memory") from None
    return {p: frozenset(n) for p, n in zip(patterns, json.loads(done.stdout), strict=True)}


def is_literal(pattern: str) -> bool:
    """Tell whether a pattern is a plain dotted name, which needs no regex."""
    return _LITERAL.fullmatch(pattern) is not None


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
    with Path(__file__).with_name("catalogue.csv").open(encoding="utf-8", newline="") as file:
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
