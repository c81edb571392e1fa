"""The inputs of a run: which rows are scored, and the digest of all that can change a number."""

from pathlib import Path

from postmortem.case.generated import generate_moderation_rows
from postmortem.case.load import case_digest
from postmortem.case.rows import Rows, generate_rows, read_rows
from postmortem.case.schema import Case
from postmortem.experiments.records import digest_notebook
from postmortem.models.world import World

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
