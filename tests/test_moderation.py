import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case import rows as moderation
from postmortem.case.rows import HELD_OUT_RULE, choose_rows, generate_moderation_rows, sentences
from postmortem.case.schema import PLACEHOLDER, Columns
from postmortem.experiments.metrics import auc

POSTS = ("body", *moderation.EXAMPLES)
WORDS = re.compile(r"[^\W_]+|[“”>!]")


def words_of(text):
    """The words of a text and its quotation marks, each once."""
    return set(WORDS.findall(text.lower()))


def bag_of_words_auc(train, held_out, *, by_rule):
    """AUC of a naive Bayes of words, one for each rule or one for all, on held-out rows."""
    found = {0: defaultdict(Counter), 1: defaultdict(Counter)}
    rows = Counter()
    for body, rule, label in zip(train.frame["body"], train.groups, train.labels, strict=True):
        rule = rule if by_rule else ""
        found[label][rule].update(words_of(body))
        rows[rule, label] += 1

    def evidence(word, rule, label):
        return math.log((found[label][rule][word] + 1) / (rows[rule, label] + 2))

    scores = [
        sum(
            evidence(word, rule if by_rule else "", 1) - evidence(word, rule if by_rule else "", 0)
            for word in sorted(words_of(body))
        )
        for body, rule in zip(held_out.frame["body"], held_out.groups, strict=True)
    ]
    return auc(held_out.labels, scores)


@given(st.integers(1, 40), st.integers(0, 10**6), st.booleans())
def test_any_count_of_rows_is_complete(count, seed, held_out):
    """Rows of any count and seed are whole: ids differ, no text is empty or has an open slot."""
    rows = generate_moderation_rows(count, seed, held_out=held_out)
    assert len(rows) == len(set(rows.ids)) == len(rows.labels) == len(rows.frame) == count
    assert set(rows.frame) == {"rule", "subreddit", *POSTS}
    assert abs(2 * int(rows.labels.sum()) - count) <= 1
    for index in range(count):
        posts = [rows.row(index)[name] for name in POSTS]
        assert len(set(posts)) == len(posts)
        for post in posts:
            assert post.strip()
            assert not PLACEHOLDER.search(post)
            assert post.encode("utf-8").decode("utf-8") == post


def test_rows_follow_the_seed():
    """The same seed gives the same rows, another seed others, and fewer rows are the first."""
    assert generate_moderation_rows(20, 3).digest == generate_moderation_rows(20, 3).digest
    assert generate_moderation_rows(20, 3).digest != generate_moderation_rows(20, 4).digest
    first = generate_moderation_rows(30, 3).head(11)
    assert generate_moderation_rows(11, 3).digest == first.digest


def test_the_held_out_rule_stands_apart():
    """Default rows never show the held-out rule, and held-out rows show no other."""
    held_out = sentences().rules[HELD_OUT_RULE]
    rows = generate_moderation_rows(400, 0)
    assert set(rows.groups) == {r.text for r in sentences().rules.values() if r is not held_out}
    drugs = sentences().slots["drug"]
    assert not any(drug in post for name in POSTS for post in rows.frame[name] for drug in drugs)
    assert set(generate_moderation_rows(50, 0, held_out=True).groups) == {held_out.text}


def test_each_rule_has_as_many_violations_as_not():
    """Violations are about half of the rows of each rule."""
    rows = generate_moderation_rows(1200, 0)
    for rule in set(rows.groups):
        assert 0.4 < rows.labels[np.asarray(rows.groups) == rule].mean() < 0.6


def test_columns_take_the_names_of_the_case():
    """Generated rows come under the names that the case gives to its columns."""
    rows = generate_moderation_rows(3, 0, columns=Columns(text="post", group="law"))
    assert {"post", "law"} <= set(rows.frame)
    assert not {"body", "rule"} & set(rows.frame)
    assert rows.groups == tuple(rows.frame["law"])


@pytest.mark.parametrize("name", list(sentences().rules))
def test_the_same_sentence_breaks_a_rule_and_is_reported(name, monkeypatch):
    """A rule's acts stand in violations, and the very same ones under words that report them."""
    monkeypatch.setattr(moderation, "NOISE_SHARE", 0.0)
    rows = generate_moderation_rows(1500, 0, held_out=name == HELD_OUT_RULE)
    rule = sentences().rules[name]
    for act in rule.acts:
        stem = max(PLACEHOLDER.split(act)[::2], key=len)
        labels = [
            label
            for body, group, label in zip(rows.frame["body"], rows.groups, rows.labels, strict=True)
            if group == rule.text and stem in body
        ]
        assert set(labels) == {0, 1}


def test_the_rule_must_be_read():
    """The same sentence is a violation under its own rule and none under another."""
    rows = generate_moderation_rows(1500, 0)
    rule = sentences().rules["legal"]
    sign = "under the law of this state"
    found = Counter(
        (group == rule.text, int(label))
        for body, group, label in zip(rows.frame["body"], rows.groups, rows.labels, strict=True)
        if sign in body
    )
    assert found[True, 1] > 0
    assert found[False, 0] > 0
    assert found[False, 1] == 0


def test_examples_are_of_their_kind(monkeypatch):
    """Positive examples break the row's rule, and negative ones do not, by a bare act of it."""
    monkeypatch.setattr(moderation, "NOISE_SHARE", 0.0)
    rows = generate_moderation_rows(200, 0)
    by_text = {rule.text: rule for rule in sentences().rules.values()}
    for index in range(len(rows)):
        row = rows.row(index)
        for name in moderation.EXAMPLES:
            bare = re.sub(r"“.*?”|>!.*?!<", "", row[name]).lower()
            stems = [
                max(PLACEHOLDER.split(act)[::2], key=len).lower()
                for act in by_text[row["rule"]].acts
            ]
            assert any(stem in bare for stem in stems) == name.startswith("positive")


def test_no_vocabulary_decides():
    """A bag of words ranks held-out rows above chance, far from right, worse without the rule."""
    train, held_out = generate_moderation_rows(400, 10), generate_moderation_rows(600, 0)
    with_rule = bag_of_words_auc(train, held_out, by_rule=True)
    without = bag_of_words_auc(train, held_out, by_rule=False)
    assert 0.6 < with_rule < 0.93
    assert without < with_rule - 0.05


def test_links_are_no_sign():
    """Links stand in posts of either label."""
    rows = generate_moderation_rows(600, 0)
    links = sentences().slots["link"]
    linked = [any(link in body for link in links) for body in rows.frame["body"]]
    assert 0.2 < rows.labels[linked].mean() < 0.8


@pytest.mark.parametrize(
    ("profile", "words"), [("embedded", "generated, seed"), ("smollm2", "generated moderation")]
)
def test_a_profile_chooses_its_corpus(case, profile, words):
    """Rows come from the generator that the profile names, and say so."""
    rows = choose_rows(case, profile, rows=4)
    assert rows.source.startswith(words)
    assert len(rows) == 4
