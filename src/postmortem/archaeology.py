"""Which PEFT releases can have written a configuration, and loaded it.

The table of fields is derived from released wheels by tools/derive_peft_fields.py. Answers
assume release builds: a build from the main branch can hold fields ahead of its release.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_WARNING = re.compile(r"Unexpected keyword arguments \[([^\]]{0,4000})\] for class (\w{1,60})")


@dataclass(frozen=True, slots=True)
class Release:
    """One PEFT release: the fields its LoraConfig accepts and those it writes.

    `unknown_keys` says what loading does with any other key: warns, ignores or raises.
    """

    version: str
    unknown_keys: str
    accepted: frozenset[str]
    written: frozenset[str]


@dataclass(frozen=True, slots=True)
class Dating:
    """What a configuration's keys say about the releases that wrote and can load it.

    `writers` wrote exactly these keys. `possible_writers` know every key that any release knows;
    `missing` are the keys that all of them would have written. Without peft_type no release loads.
    """

    stated: str | None
    writers: tuple[str, ...]
    possible_writers: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    silent_loaders: tuple[str, ...]
    warning_loaders: tuple[str, ...]
    failing_loaders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Encounter:
    """A loader that prints a given warning for configurations of these writers."""

    loader: str
    writers: tuple[str, ...]


@cache
def releases() -> tuple[Release, ...]:
    """Return the releases of peft_fields.csv, oldest first."""
    found: list[Release] = []
    accepted: frozenset[str] = frozenset()
    with Path(__file__).with_name("peft_fields.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            accepted = accepted - set(row["removed"].split()) | set(row["added"].split())
            written = accepted - set(row["not_saved"].split())
            found.append(Release(row["version"], row["unknown_keys"], accepted, written))
    return tuple(found)


@cache
def known_keys() -> frozenset[str]:
    """Return every key that some release accepts."""
    return frozenset().union(*(release.accepted for release in releases()))


def _versions(found: Iterable[Release]) -> tuple[str, ...]:
    return tuple(release.version for release in found)


def _reaction(release: Release, keys: frozenset[str]) -> str:
    if "peft_type" not in keys:
        return "raises"
    return "ignores" if keys <= release.accepted else release.unknown_keys


def date_config(raw: Mapping[str, object]) -> Dating:
    """Date a configuration by its keys alone; values other than peft_version are not read."""
    keys = frozenset(raw)
    known = keys & known_keys()
    exact = [r for r in releases() if r.written == keys]
    possible = [r for r in releases() if known <= r.written]
    stated = raw.get("peft_version")
    by_reaction: dict[str, list[Release]] = {"ignores": [], "warns": [], "raises": []}
    for release in releases():
        by_reaction[_reaction(release, keys)].append(release)
    return Dating(
        stated=stated if isinstance(stated, str) else None,
        writers=_versions(exact),
        possible_writers=_versions(possible),
        missing=tuple(sorted(frozenset.intersection(*(r.written for r in possible)) - keys))
        if possible
        else (),
        unknown=tuple(sorted(keys - known_keys())),
        silent_loaders=_versions(by_reaction["ignores"]),
        warning_loaders=_versions(by_reaction["warns"]),
        failing_loaders=_versions(by_reaction["raises"]),
    )


def date_warning(names: Iterable[str]) -> tuple[Encounter, ...]:
    """Date PEFT's "Unexpected keyword arguments" warning: who wrote the file, who loaded it.

    Names that no release knows were added to the file by somebody else and are left out.
    """
    listed = frozenset(names) & known_keys()
    if not listed:
        return ()
    encounters = (
        Encounter(
            loader.version,
            _versions(r for r in releases() if r.written - loader.accepted == listed),
        )
        for loader in releases()
        if loader.unknown_keys == "warns"
    )
    return tuple(encounter for encounter in encounters if encounter.writers)


def find_warnings(log: str) -> tuple[tuple[str, ...], ...]:
    """Find the distinct key lists of PEFT's warnings about LoraConfig in a log, in order."""
    lists = (m[1] for m in _WARNING.finditer(log) if m[2] == "LoraConfig")
    return tuple(dict.fromkeys(tuple(re.findall(r"[\w.\-]+", text)) for text in lists))


def span(versions: tuple[str, ...]) -> str:
    """Write versions as ranges of consecutive releases: `0.17.0–0.17.1, 0.19.0`."""
    order = [release.version for release in releases()]
    runs: list[list[str]] = []
    for version in versions:
        follows = runs and order.index(version) == order.index(runs[-1][-1]) + 1
        if follows:
            runs[-1].append(version)
        else:
            runs.append([version])
    return ", ".join(r[0] if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs) or "none"
