"""Rows: read from a file, or generated from word lists or in sentences, and which a run takes."""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import Field

from postmortem.case.schema import PLACEHOLDER, Case, Columns, Frozen
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
        return self if not count or count >= len(self) else self.part(0, count)

    def part(self, start: int, end: int) -> "Rows":
        """The rows from one place up to another."""
        return self.take(range(start, end))

    def take(self, places: Sequence[int]) -> "Rows":
        """The rows at these places, in their order."""
        chosen = list(places)
        frame = self.frame.iloc[chosen].reset_index(drop=True)
        labels = None if self.labels is None else self.labels[chosen]
        ids, groups = (tuple(kind[place] for place in chosen) for kind in (self.ids, self.groups))
        return Rows(self.source, frame, ids, groups, labels)

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


# Rows of this rule are for judging alone: no default row has it, and no post is of its kind.
HELD_OUT_RULE = "medical"
Kind = Literal["act", "mixed", "quoted", "near", "other", "neutral"]
# What a violation of the row's rule looks like, and what the rest are: `mixed` reports one act and
# commits another, `other` breaks another rule.
VIOLATIONS: dict[Kind, float] = {"act": 0.5, "mixed": 0.5}
OTHERS: dict[Kind, float] = {"quoted": 0.4, "near": 0.2, "other": 0.3, "neutral": 0.1}
OPENER_SHARE, ASIDE_SHARE, NOISE_SHARE = 0.3, 0.2, 0.12
EXAMPLES = ("positive_example_1", "positive_example_2", "negative_example_1", "negative_example_2")
WORD = re.compile(r"\b[^\W\d_]{5,}\b")


class RuleText(Frozen):
    """A rule, where it is in force, and sentences that break it, introduce, report, resemble."""

    text: str
    subreddits: list[str] = Field(min_length=1)
    acts: list[str] = Field(min_length=2)
    openers: list[str] = Field(min_length=1)
    quoted: list[str] = Field(min_length=1)
    near: list[str] = Field(min_length=1)


class Sentences(Frozen):
    """All sentences: by rule, of no rule, asides that fit any post, and the values of the slots."""

    rules: dict[str, RuleText]
    neutral: list[str] = Field(min_length=1)
    fillers: list[str] = Field(min_length=1)
    slots: dict[str, list[str]]


@cache
def sentences() -> Sentences:
    """The sentences that rows are made from."""
    text = Path(__file__).with_name("generated.yml").read_text(encoding="utf-8")
    return Sentences.model_validate(yaml.safe_load(text))


def generate_moderation_rows(
    count: int, seed: int, *, columns: Columns | None = None, held_out: bool = False
) -> Rows:
    """Rows with as many violations as not, in the competition's columns; none of them is found.

    With `held_out` all rows are of `HELD_OUT_RULE`, else none. Fewer rows of a seed are the
    beginning of more.
    """
    columns = columns or Columns()
    source = random.Random(f"moderation-{held_out}-{seed}")
    # Of each pair of rows one is a violation, so that any stretch of them holds both.
    pairs = (source.sample([0, 1], 2) for _ in range((count + 1) // 2))
    labels = [label for pair in pairs for label in pair][:count]
    writers = [_Writer(f"{held_out}-{seed}-{n}", held_out=held_out) for n in range(count)]
    frame = pd.DataFrame([w.row(label) for w, label in zip(writers, labels, strict=True)])
    group = columns.group or "rule"
    frame = frame.rename(columns={"rule": group, "body": columns.text})
    return Rows(
        source=f"{GENERATED} moderation posts{', held-out rule' if held_out else ''}, seed {seed}",
        frame=frame,
        ids=tuple(str(1000 + index) for index in range(count)),
        groups=tuple(frame[group]),
        labels=np.array(labels),
    )


class _Writer:
    """Writes one row, and no post of it twice."""

    def __init__(self, seed: str, *, held_out: bool) -> None:
        self.source = random.Random(f"moderation row {seed}")
        self.texts = sentences()
        known = [name for name in self.texts.rules if name != HELD_OUT_RULE]
        self.rule = HELD_OUT_RULE if held_out else self.source.choice(known)
        self.others = [name for name in known if name != self.rule]

    def row(self, label: int) -> dict[str, str]:
        """The text columns of a row."""
        rule = self.texts.rules[self.rule]
        posts = self._distinct([label, 1, 1, 0, 0])
        row = {
            "body": posts[0],
            "rule": rule.text,
            "subreddit": self.source.choice(rule.subreddits),
        }
        return row | dict(zip(EXAMPLES, posts[1:], strict=True))

    def _distinct(self, labels: list[int]) -> list[str]:
        posts: list[str] = []
        for label in labels:
            post = self.post(label)
            while post in posts:
                post = self.post(label)
            posts.append(post)
        return posts

    def post(self, label: int) -> str:
        """A post that breaks the row's rule or does not, with asides and slips."""
        shares = VIOLATIONS if label else OTHERS
        kind = self.source.choices(list(shares), list(shares.values()))[0]
        rule = self.texts.rules[self.source.choice(self.others) if kind == "other" else self.rule]
        parts = self._core(kind, rule)
        if self.source.random() < OPENER_SHARE:
            parts.insert(0, self._fill(self.source.choice(rule.openers)))
        for place in (0, len(parts) + 1):
            if self.source.random() < ASIDE_SHARE:
                parts.insert(place, self._fill(self.source.choice(self.texts.fillers)))
        return self._noise(" ".join(parts))

    def _core(self, kind: Kind, rule: RuleText) -> list[str]:
        """The sentences that decide, by kind."""
        if kind == "neutral":
            return [self._fill(self.source.choice(self.texts.neutral))]
        if kind == "near":
            return [self._fill(self.source.choice(rule.near))]
        act, quoted = self.source.sample(rule.acts, 2)
        act, quoted = (text[0].upper() + text[1:] for text in map(self._fill, (act, quoted)))
        if kind in ("act", "other"):
            return [act]
        report = self._fill(self.source.choice(rule.quoted), act=quoted)
        near = self._fill(self.source.choice(rule.near))
        if kind == "quoted":
            # As long as a post of two kinds, now and then, so that length does not decide either.
            return self.source.sample([report, near], self.source.choice([1, 1, 2]))
        return self.source.sample([act, self.source.choice([report, near])], 2)

    def _fill(self, template: str, **given: str) -> str:
        """The template with each slot replaced once; a slot named twice has two values."""
        return PLACEHOLDER.sub(
            lambda found: given.get(found[1]) or self.source.choice(self.texts.slots[found[1]]),
            template,
        )

    def _noise(self, text: str) -> str:
        """Slips as in real posts, each in few: no capitals, a swapped letter, a sign at the end."""
        slips: list[Callable[[str], str]] = [
            str.lower,
            self._swap_letters,
            lambda post: f"{post} {self.source.choice(self.texts.slots['emoji'])}",
            lambda post: post.rstrip(".") + "!!" if post.endswith(".") else post,
        ]
        for slip in slips:
            if self.source.random() < NOISE_SHARE:
                text = slip(text)
        return text

    def _swap_letters(self, text: str) -> str:
        word = self.source.choice(list(WORD.finditer(text)))
        place = word.start() + self.source.randint(1, len(word[0]) - 3)
        return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


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
