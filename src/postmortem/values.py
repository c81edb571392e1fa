"""What the book reads, as `publish` puts it together: values by kind and key."""

from collections.abc import Iterable
from typing import Any

from postmortem.records import Cell

# Measures, verdicts, texts and tables, each by key.
Values = dict[str, dict[str, Any]]


def add_table(
    values: Values, key: str, columns: Iterable[str], rows: Iterable[Iterable[Cell]]
) -> None:
    """Add a table under a key."""
    values["tables"][key] = {"columns": list(columns), "rows": [list(row) for row in rows]}
