import math
import re
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case import rows as corpora
from postmortem.case.rows import (
    HELD_OUT_RULE,
    RULES,
    WORDS,
    choose_rows,
    generate_moderation_rows,
    generate_rows,
    read_rows,
    sentences,
)
from postmortem.case.schema import PLACEHOLDER, Columns
from postmortem.checker.errors import DataError
from postmortem.experiments.metrics import auc

POSTS = ("body", *corpora.EXAMPLES)
PARTS = re.compile(r"[^\W_]+|[“”>!]")
GENERATORS = (
    generate_rows,
    generate_moderation_rows,
    partial(generate_moderation_rows, held_out=True),
)
every_generator = pytest.mark.parametrize(
    "generate", GENERATORS, ids=["keywords", "moderation", "held out"]
)


def write(folder, text, name="rows.csv"):
    """That text or those bytes as a file."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@every_generator
@given(count=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_generated_rows_are_complete(generate, count, seed):
    """Rows of any count and seed are whole: ids differ, no text is empty or has an open slot."""
    rows = generate(count, seed)
    assert len(rows) == len(set(rows.ids)) == len(rows.labels) == len(rows.frame) == count
    assert {"rule", *POSTS} <= set(rows.frame)
    assert set(rows.labels.tolist()) <= {0, 1}
    for index in range(count):
        for text in rows.row(index).values():
            assert text.strip()
            assert not PLACEHOLDER.search(text)


@every_generator
def test_generated_rows_follow_the_seed(generate):
    """The same seed gives the same rows, another seed others, and fewer rows are the first."""
    assert generate(20, 3).digest == generate(20, 3).digest != generate(20, 4).digest
    assert generate(11, 3).digest == generate(30, 3).head(11).digest


@every_generator
def test_generated_classes_are_balanced(generate):
    """Violations are about half of the rows of each rule."""
    rows = generate(2000, 0)
    for rule in set(rows.groups):
        assert 0.45 < rows.labels[np.asarray(rows.groups) == rule].mean() < 0.55


@every_generator
def test_generated_rows_take_the_columns_of_the_case(generate):
    """Generated rows come under the names that the case gives to its columns."""
    rows = generate(3, 0, columns=Columns(text="post", group="law"))
    assert {"post", "law"} <= set(rows.frame)
    assert not {"body", "rule"} & set(rows.frame)
    assert rows.groups == tuple(rows.frame["law"])


@pytest.mark.parametrize(
    ("profile", "words"), [("embedded", "generated, seed"), ("smollm2", "generated moderation")]
)
def test_a_profile_chooses_its_corpus(case, profile, words):
    """Rows come from the generator that the profile names, and say so."""
    assert choose_rows(case, profile, rows=4).source.startswith(words)


def test_a_topic_violates_one_rule_alone():
    """Among keywords the same topic violates one rule and not the other: both must be read."""
    rows = generate_rows(2000, 0)
    sales = set(WORDS["advertising"])
    found = Counter(
        (rule == RULES["advertising"], int(label))
        for rule, label, body in zip(rows.groups, rows.labels, rows.frame["body"], strict=True)
        if len(sales & set(body.split())) == 2
    )
    assert found[True, 1] > found[True, 0]
    assert found[False, 0] > found[False, 1]


def test_the_held_out_rule_stands_apart():
    """Default rows never show the held-out rule, and held-out rows show no other."""
    held_out = sentences().rules[HELD_OUT_RULE]
    rows = generate_moderation_rows(400, 0)
    assert set(rows.groups) == {r.text for r in sentences().rules.values() if r is not held_out}
    drugs = sentences().slots["drug"]
    assert not any(drug in post for name in POSTS for post in rows.frame[name] for drug in drugs)
    assert set(generate_moderation_rows(50, 0, held_out=True).groups) == {held_out.text}


@pytest.mark.parametrize("name", list(sentences().rules))
def test_the_same_sentence_breaks_its_own_rule_or_is_reported(name, monkeypatch):
    """A rule's acts stand in violations of it and in posts that report them, and break no other."""
    monkeypatch.setattr(corpora, "NOISE_SHARE", 0.0)
    rows = generate_moderation_rows(1500, 0, held_out=name == HELD_OUT_RULE)
    rule = sentences().rules[name]
    for stem in map(stem_of, rule.acts):
        labels = defaultdict(set)
        for body, group, label in zip(rows.frame["body"], rows.groups, rows.labels, strict=True):
            if stem in body.lower():
                labels[group == rule.text].add(int(label))
        assert labels[True] == {0, 1}
        assert labels[False] <= {0}


def test_examples_are_of_their_kind(monkeypatch):
    """Positive examples break the row's rule, and negative ones do not, by a bare act of it."""
    monkeypatch.setattr(corpora, "NOISE_SHARE", 0.0)
    rows = generate_moderation_rows(200, 0)
    by_text = {rule.text: rule for rule in sentences().rules.values()}
    for index in range(len(rows)):
        row = rows.row(index)
        assert len({row[name] for name in POSTS}) == len(POSTS)
        for name in corpora.EXAMPLES:
            bare = re.sub(r"“.*?”|>!.*?!<", "", row[name]).lower()
            acts = any(stem in bare for stem in map(stem_of, by_text[row["rule"]].acts))
            assert acts == name.startswith("positive")


def stem_of(act):
    """The longest piece of an act's sentence without a slot."""
    return max(PLACEHOLDER.split(act)[::2], key=len).lower()


def bag_of_words_auc(train, held_out, *, by_rule):
    """AUC of a naive Bayes of words, one for each rule or one for all, on held-out rows."""
    found, rows = defaultdict(Counter), Counter()
    for body, rule, label in zip(train.frame["body"], train.groups, train.labels, strict=True):
        key = (rule if by_rule else "", label)
        found[key].update(set(PARTS.findall(body.lower())))
        rows[key] += 1

    def evidence(word, key):
        return math.log((found[key][word] + 1) / (rows[key] + 2))

    scores = []
    for body, group in zip(held_out.frame["body"], held_out.groups, strict=True):
        rule, words = group if by_rule else "", sorted(set(PARTS.findall(body.lower())))
        scores.append(sum(evidence(w, (rule, 1)) - evidence(w, (rule, 0)) for w in words))
    return auc(held_out.labels, scores)


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


@pytest.mark.parametrize(("count", "left"), [(0, 5), (2, 2), (5, 5), (9, 5)])
def test_head(count, left):
    """The head is the first rows, and all of them for 0 or more than there are."""
    head = generate_rows(5, 0).head(count)
    assert len(head) == len(head.frame) == len(head.groups) == len(head.labels) == left
    assert head.ids == generate_rows(5, 0).ids[:left]


def test_read_rows_takes_texts_as_they_are(tmp_path):
    """Texts such as NA, 007, an emoji, two lines, nothing or very much are not interpreted."""
    texts = ["NA", "nan", "007", "1.0", "", " padded ", "👍\u2028é", 'say "no", {rule}']
    texts += ["two\nlines", "x" * 2_000_000]
    path = tmp_path / "rows.csv"
    pd.DataFrame({"row_id": [f"0{n}" for n in range(10)], "body": texts}).to_csv(path, index=False)
    rows = read_rows(path)
    assert [rows.row(index)["body"] for index in range(len(rows))] == texts
    assert rows.ids == tuple(f"0{n}" for n in range(10))
    assert (rows.groups, rows.labels) == (("all",) * 10, None)


def test_labels_within_and_beside(tmp_path):
    """Labels in the file are the truth and no text; those of a file beside it, by id, go before."""
    data = write(tmp_path, "row_id,body,rule,rule_violation\n7,a,R,1\n8,b,Q,0\n9,c,R,0.0\n")
    rows = read_rows(data)
    assert rows.labels.tolist() == [1, 0, 0]
    assert rows.groups == ("R", "Q", "R")
    assert rows.row(0) == {"body": "a", "rule": "R"}
    labels = write(tmp_path, "row_id,rule_violation\n9,1\n8,1\n7,0\n10,0\n", "labels.csv")
    assert read_rows(data, labels).labels.tolist() == [0, 1, 1]


def test_a_spreadsheets_file(tmp_path):
    """A byte order mark and carriage returns are read over; without labels there are none."""
    rows = read_rows(write(tmp_path, "\ufeffrow_id,body\r\n1,a\r\n"))
    assert (rows.ids, rows.row(0), rows.head(1).labels) == (("1",), {"body": "a"}, None)


def test_columns_of_another_name(tmp_path):
    """The case's own names of the columns are used, and a file may have no group."""
    columns = Columns(id="key", text="post", group=None, label="bad")
    rows = read_rows(write(tmp_path, "key,post,bad,rule\n1,a,1,R\n"), columns=columns)
    assert (rows.ids, rows.groups, rows.labels.tolist()) == (("1",), ("all",), [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a CSV file in UTF-8"),
        ("row_id,body\n", "expected at least one row; found none"),
        ("id,body\n1,a\n", "expected a column 'row_id'; found id, body"),
        ("row_id,text\n1,a\n", "expected a column 'body'; found row_id, text"),
        ("row_id,body\n1,a\n2,b\n1,c\n", "expected distinct row_id; found '1' twice"),
        ("row_id,body\n1,a\n2,b, c\n", "expected a CSV file in UTF-8"),
        ("row_id,body\n1,a, b\n2,b, c\n", "expected 2 fields in a row, as in its header"),
        ('row_id,body\n1,"a\n2,b\n', "EOF inside string"),
        ("row_id,body,rule_violation\n1,a,2\n", "expected rule_violation 0 or 1; found '2'"),
        ("row_id,body,rule_violation\n1,a,\n", "expected rule_violation 0 or 1; found ''"),
        ("row_id,body,rule_violation\n1,a,nan\n", "expected rule_violation 0 or 1; found 'nan'"),
        ("row_id,body,rule_violation\n1,a,0\n2,b,yes\n", "found 'yes'"),
        ("row_id,body\n1,Übersicht\n".encode("latin-1"), "expected a CSV file in UTF-8"),
    ],
)
def test_unusable_rows_are_explained(tmp_path, text, message):
    """Rows that cannot be used are refused with their file, what was expected and found."""
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row_id,rule_violation\n1,0\n", "expected a label for each row; found none for 2"),
        ("row_id,rule_violation\n1,0\n2,1\n2,0\n", "expected distinct row_id; found '2' twice"),
        ("row_id,rule_violation\n1,0\n2,-1\n", "expected rule_violation 0 or 1; found '-1'"),
        ("row_id,label\n1,0\n2,1\n", "expected a column 'rule_violation'"),
    ],
)
def test_unusable_labels_are_explained(tmp_path, text, message):
    """A label file that does not cover the rows once each is refused by its own name."""
    data = write(tmp_path, "row_id,body\n1,a\n2,b\n")
    labels = write(tmp_path, text, "labels.csv")
    with pytest.raises(DataError) as caught:
        read_rows(data, labels)
    assert f"{labels}: {message}" in str(caught.value)


@pytest.mark.parametrize("name", ["none.csv", "."])
def test_missing_file_is_named(tmp_path, name):
    """A file that is not there, or a folder, is refused by name."""
    with pytest.raises(DataError, match="expected a CSV file"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("old", ["1,a,R,0", "a", "R", "0", "1"])
def test_digest_follows_the_content(tmp_path, old):
    """The digest changes with an id, a post, a rule or a label, and not with the file's name."""
    line = "1,a,R,0"
    head = "row_id,body,rule,rule_violation\n"
    first = read_rows(write(tmp_path, head + line))
    again = read_rows(write(tmp_path, head + line, "again.csv"))
    new = {"0": "1", "1": "2"}.get(old, "x")
    other = line.replace(old, new) if old != line else "1,R,a,0"
    assert first.digest == again.digest
    assert first.digest != read_rows(write(tmp_path, head + other)).digest


@given(
    text=st.text()
    | st.text(alphabet='01,"\n\r\0x', max_size=40).map("row_id,body,rule_violation\n".__add__)
)
def test_any_text_gives_rows_or_an_error(tmp_path, text):
    """Any text as the file gives rows of one id, group and label each, or a `DataError`."""
    try:
        rows = read_rows(write(tmp_path, text.encode("utf-8", errors="surrogatepass")))
    except DataError:
        return
    assert len(rows) == len(rows.frame) == len(rows.groups) == len(set(rows.ids)) > 0
    assert rows.labels is None or len(rows.labels) == len(rows)
