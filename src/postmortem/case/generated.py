"""Moderation rows in whole sentences, for models that read: the vocabulary alone does not decide.

The sentences lie beside this module. A sentence that would break a rule also stands under words
that only report it, and reports stand beside real violations, so that neither the one vocabulary
nor the other settles a post.
"""

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import Field

from postmortem.case.rows import GENERATED, Rows
from postmortem.case.schema import PLACEHOLDER, Columns, Frozen

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
    text = Path(__file__).with_suffix(".yml").read_text(encoding="utf-8")
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
