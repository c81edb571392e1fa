from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.rows import RULES, WORDS, generate_rows, read_rows
from postmortem.case.schema import Columns
from postmortem.checker.errors import DataError


def write(folder, text, name="rows.csv"):
    """That text or those bytes as a file."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@pytest.mark.parametrize("count", [1, 2, 300])
def test_generated_rows_are_complete(count):
    """Each generated row has an id of its own, a rule, a label and every text column filled."""
    rows = generate_rows(count, 0)
    assert len(rows) == len(set(rows.ids)) == len(rows.labels) == len(rows.frame) == count
    assert set(rows.groups) <= set(RULES.values())
    assert set(rows.labels.tolist()) <= {0, 1}
    assert all(rows.row(index)[name] for index in range(count) for name in rows.frame)


def test_generated_rows_follow_the_seed():
    """The same seed gives the same rows, another seed others."""
    assert generate_rows(20, 3).digest == generate_rows(20, 3).digest
    assert generate_rows(20, 3).digest != generate_rows(20, 4).digest


def test_fewer_generated_rows_are_the_first():
    """Fewer rows of a seed are the beginning of more."""
    assert generate_rows(10, 0).digest == generate_rows(30, 0).head(10).digest


def test_generated_classes_are_balanced():
    """Violations are about half of the rows of each rule."""
    rows = generate_rows(2000, 0)
    for rule in RULES.values():
        share = rows.labels[np.asarray(rows.groups) == rule].mean()
        assert 0.45 < share < 0.55


def test_the_rule_must_be_read():
    """The same topic violates one rule and not the other, so the post alone does not decide."""
    rows = generate_rows(2000, 0)
    sales = set(WORDS["advertising"])
    found = Counter(
        (rule == RULES["advertising"], int(label))
        for rule, label, body in zip(rows.groups, rows.labels, rows.frame["body"], strict=True)
        if len(sales & set(body.split())) == 2
    )
    assert found[True, 1] > found[True, 0]
    assert found[False, 0] > found[False, 1]


def test_generated_rows_take_the_columns_of_the_case():
    """Generated rows come under the names that the case gives to its columns."""
    rows = generate_rows(3, 0, columns=Columns(text="post", group="law"))
    assert {"post", "law"} <= set(rows.frame)
    assert not {"body", "rule"} & set(rows.frame)
    assert rows.groups == tuple(rows.frame["law"])


@pytest.mark.parametrize(("count", "left"), [(0, 5), (2, 2), (5, 5), (9, 5)])
def test_head(count, left):
    """The head is the first rows, and all of them for 0 or more than there are."""
    head = generate_rows(5, 0).head(count)
    assert len(head) == len(head.frame) == len(head.groups) == len(head.labels) == left
    assert head.ids == generate_rows(5, 0).ids[:left]


def test_head_without_labels(tmp_path):
    """Rows without labels stay so."""
    assert read_rows(write(tmp_path, "row_id,body\n1,a\n2,b\n")).head(1).labels is None


def test_read_rows_takes_texts_as_they_are(tmp_path):
    """Texts such as NA, 007, 1.0, an emoji, two lines or nothing are not interpreted."""
    texts = [
        "NA",
        "nan",
        "007",
        "1.0",
        "",
        " padded ",
        "👍\u2028é",
        'say "no", {rule}',
        "two\nlines",
    ]
    path = tmp_path / "rows.csv"
    pd.DataFrame({"row_id": [f"0{n}" for n in range(9)], "body": texts}).to_csv(path, index=False)
    rows = read_rows(path)
    assert [rows.row(index)["body"] for index in range(len(rows))] == texts
    assert rows.ids == tuple(f"0{n}" for n in range(9))
    assert (rows.groups, rows.labels) == (("all",) * 9, None)


def test_read_rows_with_labels_within(tmp_path):
    """Labels in the file become the truth and are no text that a prompt could show."""
    text = "row_id,body,rule,rule_violation\n7,a,R,1\n8,b,Q,0\n9,c,R,0.0\n"
    rows = read_rows(write(tmp_path, text))
    assert rows.labels.tolist() == [1, 0, 0]
    assert rows.groups == ("R", "Q", "R")
    assert rows.row(0) == {"body": "a", "rule": "R"}


def test_read_rows_with_labels_beside(tmp_path):
    """Labels of another file are put to the rows by id, whatever their order and number."""
    data = write(tmp_path, "row_id,body\n7,a\n8,b\n")
    labels = write(tmp_path, "row_id,rule_violation\n9,1\n8,1\n7,0\n", "labels.csv")
    assert read_rows(data, labels).labels.tolist() == [0, 1]


def test_labels_beside_go_before_labels_within(tmp_path):
    """Where both files hold labels those of the label file count."""
    data = write(tmp_path, "row_id,body,rule_violation\n7,a,1\n")
    labels = write(tmp_path, "row_id,rule_violation\n7,0\n", "labels.csv")
    assert read_rows(data, labels).labels.tolist() == [0]


def test_byte_order_mark_and_carriage_returns(tmp_path):
    """A file as spreadsheets write it reads like any other."""
    rows = read_rows(write(tmp_path, "\ufeffrow_id,body\r\n1,a\r\n"))
    assert (rows.ids, rows.row(0)) == (("1",), {"body": "a"})


def test_columns_of_another_name(tmp_path):
    """The case's own names of the columns are used, and a file may have no group."""
    columns = Columns(id="key", text="post", group=None, label="bad")
    rows = read_rows(write(tmp_path, "key,post,bad,rule\n1,a,1,R\n"), columns=columns)
    assert (rows.ids, rows.groups, rows.labels.tolist()) == (("1",), ("all",), [1])


def test_huge_post(tmp_path):
    """A post of two million characters is a post."""
    rows = read_rows(write(tmp_path, "row_id,body\n1," + "x" * 2_000_000 + "\n"))
    assert len(rows.row(0)["body"]) == 2_000_000


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
