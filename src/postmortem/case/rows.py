"""Moderation rows: generated from a seed, or read from a file in the case's columns."""

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from postmortem.case.schema import Columns
from postmortem.checker.errors import DataError

RULES = {
    "advertising": "No advertising: a post must not promote a shop, a product or a link for gain.",
    "legal": "No legal advice: a post must not ask for legal advice or give it.",
}
TOPICS = {
    "advertising": "sale discount coupon shop buy cheap promo offer order deal prices subscribe",
    "legal": "lawyer court sue police contract judge rights lawsuit landlord custody bail statute",
    "neutral": "music game dinner weather holiday garden movie team coffee bicycle puppy painting",
}
FILLER = (
    "the a we they it that this was were have just really about with when then maybe today "
    "yesterday people someone never always think know said good long old new after before"
)
LINKS = {
    "advertising": "http://shop.example http://promo.example http://store.example",
    "neutral": "http://photos.example http://wiki.example http://forum.example",
}
WORDS = {kind: words.split() for kind, words in TOPICS.items()}
FILLER_WORDS = FILLER.split()
GENERATED = "generated"
LINK_WORDS = {kind: words.split() for kind, words in LINKS.items()}


@dataclass(frozen=True)
class Rows:
    """Rows to score.

    `frame` holds the text columns as strings, `ids` and `groups` one string a row, `labels` an
    integer array of 0 and 1 or None where no truth is known.
    """

    source: str
    frame: pd.DataFrame
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, index: int) -> dict[str, str]:
        """The text columns of one row."""
        return {str(name): str(value) for name, value in self.frame.iloc[index].items()}

    def head(self, count: int) -> "Rows":
        """The first `count` rows; all of them where `count` is 0."""
        if not count or count >= len(self):
            return self
        labels = None if self.labels is None else self.labels[:count]
        return Rows(
            self.source, self.frame.head(count), self.ids[:count], self.groups[:count], labels
        )

    @property
    def digest(self) -> str:
        """Digest of the texts, ids and labels, wherever they came from."""
        labels = "" if self.labels is None else self.labels.tolist()
        body = self.frame.to_json(orient="split", index=False) + repr((self.ids, labels))
        return hashlib.sha256(body.encode()).hexdigest()[:16]


def generate_rows(count: int, seed: int, *, columns: Columns | None = None) -> Rows:
    """Rows of two rules with as many violations as not, in the competition's columns.

    A post is filler, two words of its topic, now and then a neutral word, a distractor of any
    topic or a link. It violates a rule when its topic is the rule's; half the posts that do not
    are of the other rule's topic, so the rule must be read.
    """
    columns = columns or Columns()
    source = random.Random(f"rows-{seed}")
    # Of each pair of rows one is a violation, so that any stretch of them holds both.
    pairs = (source.sample([0, 1], 2) for _ in range((count + 1) // 2))
    records = [(_generate_row(source, label), label) for pair in pairs for label in pair][:count]
    frame = pd.DataFrame([texts for texts, _ in records])
    frame = frame.rename(columns={"rule": columns.group or "rule", "body": columns.text})
    return Rows(
        source=f"{GENERATED}, seed {seed}",
        frame=frame,
        ids=tuple(str(1000 + index) for index in range(count)),
        groups=tuple(frame[columns.group or "rule"]),
        labels=np.array([label for _, label in records]),
    )


def _generate_row(source: random.Random, label: int) -> dict[str, str]:
    rule = source.choice(list(RULES))
    other = "legal" if rule == "advertising" else "advertising"
    topic = rule if label else source.choice([other, "neutral"])
    examples = {
        "positive_example_1": rule,
        "positive_example_2": rule,
        "negative_example_1": other,
        "negative_example_2": "neutral",
    }
    texts = {"body": _generate_post(source, topic), "rule": RULES[rule]}
    return texts | {name: _generate_post(source, kind) for name, kind in examples.items()}


def _generate_post(source: random.Random, topic: str) -> str:
    words = source.choices(FILLER_WORDS, k=source.randint(3, 6))
    words += source.sample(WORDS[topic], 2)
    if source.random() < 0.30:
        words.append(source.choice(WORDS["neutral"]))
    if source.random() < 0.08:
        words.append(source.choice(WORDS[source.choice(list(WORDS))]))
    source.shuffle(words)
    if source.random() < {"advertising": 0.40, "neutral": 0.08}.get(topic, 0.0):
        words.append(source.choice(LINK_WORDS[topic]))
    return " ".join(words)


def read_rows(
    data: str | Path, labels: str | Path | None = None, *, columns: Columns | None = None
) -> Rows:
    """Read rows from CSV, Parquet or JSON lines, by the file's ending.

    Labels come from a second file or from the label column where present. Every value is read as
    text, a missing one as an empty text. Raises `DataError` for a missing file or column, a
    repeated id, a label that is not 0 or 1 where the columns name no positive one, or labels that
    do not cover the rows. An empty post is a post.
    """
    columns = columns or Columns()
    frame = _read_table(data)
    named = [columns.group] if columns.group != Columns().group else []
    _require(data, frame, [columns.id, columns.text, *named])
    ids = tuple(map(str, range(1, len(frame) + 1)))
    if columns.id is not None:
        ids = tuple(frame[columns.id])
        _require_distinct(data, frame, columns.id)
    truth = _read_labels(data, frame, labels, columns=columns)
    group = columns.group if columns.group in frame else None
    texts = frame.drop(columns=[name for name in (columns.id, columns.label) if name in frame])
    return Rows(
        source=Path(data).name,
        frame=texts.reset_index(drop=True),
        ids=ids,
        groups=tuple(frame[group]) if group else ("all",) * len(ids),
        labels=truth,
    )


def _read_csv(path: str | Path) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    # pandas takes the first column for row names where every row has a field too many.
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(
            path,
            expected=f"{len(frame.columns)} fields in a row, as in its header",
            found="more",
            remedy="Quote the fields that hold a comma.",
        )
    return frame


def _read_json_lines(path: str | Path) -> pd.DataFrame:
    with Path(path).open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream if line.strip()]
    wrong = next((n for n, line in enumerate(lines, 1) if not isinstance(line, dict)), None)
    if wrong is not None:
        raise DataError(path, expected="an object in each line", found=f"none in row {wrong}")
    return pd.DataFrame(lines)


# How a file of rows is read, by its ending, and what it is called.
READERS: dict[str, tuple[Callable[[str | Path], pd.DataFrame], str]] = {
    ".csv": (_read_csv, "a CSV file in UTF-8"),
    ".parquet": (pd.read_parquet, "a Parquet file"),
    ".jsonl": (_read_json_lines, "a file of JSON lines in UTF-8"),
}


def _read_table(path: str | Path) -> pd.DataFrame:
    """The file as a frame of texts."""
    # Any other ending is taken for CSV, as it was before there was a choice.
    read, kind = READERS.get(Path(path).suffix.lower(), READERS[".csv"])
    try:
        frame = read(path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(path, expected=kind, found="no such file") from None
    except RecursionError:
        raise DataError(path, expected=kind, found="nesting too deep") from None
    except (OSError, ValueError) as error:  # pandas', pyarrow's and json's errors are ValueErrors
        raise DataError(path, expected=kind, found=" ".join(str(error).split())[:200]) from None
    if frame.empty:
        raise DataError(path, expected="at least one row", found="none")
    frame.columns = frame.columns.map(str)
    return frame.map(_as_text).reset_index(drop=True)


def _as_text(value: object) -> str:
    """A cell as text: a missing value is empty, a whole number has no point."""
    if isinstance(value, str):
        return value
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _require(path: str | Path, frame: pd.DataFrame, names: list[str | None]) -> None:
    for name in names:
        if name is not None and name not in frame:
            raise DataError(
                path,
                expected=f"a column {name!r}",
                found=", ".join(map(str, frame.columns)),
                remedy="Name the file's own columns under `columns` in the case.",
            )


def _require_distinct(path: str | Path, frame: pd.DataFrame, name: str) -> None:
    repeated = frame[name][frame[name].duplicated()]
    if len(repeated):
        raise DataError(path, expected=f"distinct {name}", found=f"{repeated.iloc[0]!r} twice")


def _read_labels(
    data: str | Path, frame: pd.DataFrame, labels: str | Path | None, *, columns: Columns
) -> np.ndarray | None:
    """Labels in the order of `frame`, or None where there are none."""
    if columns.label is None:
        return None
    if labels is None:
        values = list(frame[columns.label]) if columns.label in frame else None
        path = data
    else:
        path, table = labels, _read_table(labels)
        if columns.id is None:
            raise DataError(labels, expected="a column of ids, by which rows are met", found="none")
        _require(labels, table, [columns.id, columns.label])
        _require_distinct(labels, table, columns.id)
        by_id = dict(zip(table[columns.id], table[columns.label], strict=True))
        missing = [id_ for id_ in frame[columns.id] if id_ not in by_id]
        if missing:
            raise DataError(labels, expected="a label for each row", found=f"none for {missing[0]}")
        values = [by_id[id_] for id_ in frame[columns.id]]
    if values is None:
        return None
    if columns.positive is not None:
        return _hold_against(path, values, columns=columns)
    wrong = next((value for value in values if value.lower() not in TRUTH), None)
    if wrong is not None:
        raise DataError(
            path,
            expected=f"{columns.label} 0 or 1",
            found=repr(wrong[:80]),
            remedy="Say which label counts as 1 with `positive` in the case.",
        )
    return np.array([TRUTH[value.lower()] for value in values])


# Labels that say themselves which they are.
TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def _hold_against(path: str | Path, values: list[str], *, columns: Columns) -> np.ndarray:
    """1 where a label is the positive one; an empty label, and one that never is, are refused."""
    assert columns.positive is not None
    positive = columns.positive.lower()
    found = np.array([int(value.lower() == positive) for value in values])
    if "" in values or not found.any():
        raise DataError(
            path,
            expected=f"labels in {columns.label!r}, of which some are {columns.positive!r}",
            found="a row without a label"
            if "" in values
            else ", ".join(sorted({repr(value[:40]) for value in values})[:5]),
        )
    return found
