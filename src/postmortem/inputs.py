"""The inputs of a run: which rows are scored, and the digest of all that can change a number."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from postmortem.case import Case, case_digest
from postmortem.corpus import Rows, generate_rows, read_rows
from postmortem.moderation import generate_moderation_rows
from postmortem.provenance import digest_notebook, package_versions
from postmortem.records import digest_file
from postmortem.world import World

# By the name that a profile gives to its corpus.
GENERATORS = {"keywords": generate_rows, "moderation": generate_moderation_rows}


def choose_rows(
    case: Case, profile: str, *, data: str = "", labels: str = "", rows: int = 0
) -> Rows:
    """The rows of a run: a file's, or generated ones as many as the profile asks for.

    `data` and `labels` take the place of the profile's own, and `rows` of its number.
    """
    chosen = case.profile(profile)
    if not data:
        data, labels, rows = chosen.data, labels or chosen.labels, rows or chosen.first
    if not data:
        generate = GENERATORS[chosen.corpus]
        return generate(rows or chosen.rows, chosen.seed, columns=case.columns)
    return read_rows(data, labels or None, columns=case.columns).head(rows)


def input_digests(
    notebook: Path, case: Case, *, world: World, rows: Rows, replays: str = ""
) -> dict[str, str]:
    """Digest of each input of a notebook; `replays` is that of the kept ones, where it reads them.

    What the library computes is no input: a build runs again when its code changes, and a kept
    record is confirmed.
    """
    found = {
        "case": case_digest(case, world.profile),
        "world": world.digest,
        "data": rows.digest,
        "notebook": digest_notebook(notebook),
    }
    return found | ({"replays": replays} if replays else {})


def settings_digest(case: Case, settings: Mapping[str, str | int]) -> str:
    """Digest of what a notebook is run with, apart from its world and code."""
    profile = case.profile(str(settings["profile"]))
    named = [str(settings[key]) or getattr(profile, key) for key in ("data", "labels")]
    files = [digest_file(path) if path and Path(path).is_file() else path for path in named]
    chosen = [settings[name] for name in ("profile", "rows", "device", "dtype")]
    parts = [case_digest(case, str(settings["profile"])), files, chosen, package_versions()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
