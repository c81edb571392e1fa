import json
import math

import pytest
from answers import PROVENANCE, prediction
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.files import write_text
from postmortem.checker.errors import RecordError
from postmortem.experiments.records import (
    Measure,
    Replay,
    Seal,
    Table,
    Text,
    Timing,
    Verdict,
    check_fresh,
    count_records,
    digest_records,
    read_records,
    write_records,
)

REPLAY = Replay(
    key="no-op/silent/0",
    cause="no-op",
    base="silent",
    seed=0,
    severity="-",
    outcomes={"base alone": "same"},
    features={"share": 1.0, "unique": 1, "text": "0.0", "parsed": True, "auc": None},
)
EACH = [
    prediction(label=None, strict_value=None, yes_no_log_odds=-30.5),
    Measure(key="v1.auc", value=0.5, low=0.25, high=1e-07, n=10, unit="AUC"),
    Measure(key="v1.none", value=None, reason="no labels"),
    Verdict(key="v1.parsed", verdict="holds", because="It does."),
    Text(key="v1.text", text="two\nlines, \x00, \u2028, \x85, 👍, {rule}, <|im_end|>, \\u001f"),
    Table(key="v1.table", columns=("a", "b"), rows=((1, 1.0), (True, None), ("x", ""))),
    REPLAY,
    Timing(key="load base", seconds=1.25),
]
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
CELLS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NUMBERS | st.text()
RECORDS = st.one_of(
    st.builds(Measure, key=st.text(), value=NUMBERS | st.integers(-(2**60), 2**60), low=NUMBERS),
    st.builds(Text, key=st.text(), text=st.text()),
    st.builds(Table, key=st.text(), columns=st.tuples(st.text()), rows=st.lists(st.tuples(CELLS))),
)


@pytest.fixture
def sealed(tmp_path):
    """A sealed file with a record of each kind."""
    write_records(tmp_path / "records.jsonl", PROVENANCE, records=EACH)
    return tmp_path / "records.jsonl"


def refuse(path, match):
    """Reading that file must fail with this in a message that names the file."""
    with pytest.raises(RecordError, match=match) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_each_kind_is_read_as_written(sealed):
    """Each kind of record is read with its values and their types as they were, the seal last."""
    found = read_records(sealed)
    assert repr(found.records) == repr(tuple(EACH))
    assert repr(found.provenance) == repr(PROVENANCE)
    assert [record.key for record in found.of(Measure)] == ["v1.auc", "v1.none"]
    last = json.loads(sealed.read_text(encoding="utf-8").split("\n")[-2])
    digest = digest_records(PROVENANCE, EACH)
    assert last == Seal(records=len(EACH), digest=digest).model_dump()


@given(records=st.lists(RECORDS, max_size=6))
def test_round_trip(tmp_path, records):
    """Any records are read as they were written, in order, under the digest of the seal."""
    seal = write_records(tmp_path / "r.jsonl", PROVENANCE, records=records)
    found = read_records(tmp_path / "r.jsonl")
    assert repr(list(found.records)) == repr(records)
    assert (seal.records, seal.digest) == (len(records), found.digest)


def test_any_changed_byte_is_refused(sealed):
    """A file with any byte changed is refused, but for the times and the host, which are aside."""
    whole = sealed.read_bytes()
    aside = json.dumps(PROVENANCE.aside, separators=(",", ":")).encode()
    free = {whole.index(aside) + n for n in range(len(aside))}
    timing = whole.index(b'{"kind":"timing"')
    free |= set(range(timing, whole.index(b"\n", timing)))
    accepted = []
    for place, byte in enumerate(whole):
        # A line feed becomes a carriage return, and the e of an exponent a capital.
        flip = 0x07 if byte == 0x0A else 0x20 if chr(byte).isalpha() else 0x01
        sealed.write_bytes(whole[:place] + bytes([byte ^ flip]) + whole[place + 1 :])
        try:
            read_records(sealed)
        except RecordError:
            continue
        accepted.append(place)
    assert set(accepted) <= free


def test_nan_in_place_of_nothing_is_refused(tmp_path):
    """A NaN, which is no JSON but which parsers take, is refused where nothing was recorded."""
    write_records(tmp_path / "r.jsonl", PROVENANCE, records=[EACH[2]])
    text = (tmp_path / "r.jsonl").read_text(encoding="utf-8")
    assert '"value":null' in text
    write_text(tmp_path / "r.jsonl", text.replace('"value":null', '"value":NaN'))
    refuse(tmp_path / "r.jsonl", "changed after the run")


@given(data=st.data(), byte=st.binary(min_size=1, max_size=1))
def test_any_added_or_lost_byte_is_refused(tmp_path, data, byte):
    """A file with a byte more or less is refused, white space included."""
    path = tmp_path / "r.jsonl"
    records = [record for record in EACH if not isinstance(record, Timing)]
    write_records(path, PROVENANCE.model_copy(update={"aside": {}}), records=records)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    for changed in (whole[:at] + byte + whole[at:], whole[:at] + whole[at + 1 :], whole + byte):
        path.write_bytes(changed)
        refuse(path, "expected")


def test_any_beginning_is_refused(sealed):
    """A file cut short anywhere is refused."""
    whole = sealed.read_bytes()
    for end in range(len(whole) - 1, -1, -5):
        sealed.write_bytes(whole[:end])
        refuse(sealed, "expected")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: lines[:-1], "found 9 line.* the run did not finish"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "changed after the run"),
    ],
    ids=["no seal", "moved lines"],
)
def test_other_lines_are_refused(sealed, change, match):
    """The order and number of the lines are sealed too, and a run without its seal is told."""
    lines = sealed.read_bytes().splitlines(keepends=True)
    sealed.write_bytes(b"".join(change(lines)))
    refuse(sealed, match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 line.* without them"),
        (b"\n", "line 1: expected a record"),
        (b"[]\n", "line 1: expected a record"),
        (b"\xff\xfe\n", "expected a record file; found 'utf-8'"),
        (b'{"kind":"seal","records":0,"digest":"x"}\n', "a provenance first"),
        (b'{"kind":"secret"}\n', "line 1: expected a record"),
        (b'{"kind":"text","key":"a","text":"b","more":1}\n', "line 1.*Extra inputs"),
        (b"[" * 100_000, "line 1: expected a record"),
    ],
    ids=["empty", "blank", "list", "bytes", "seal", "kind", "extra", "deep"],
)
def test_what_is_no_record_file_is_refused(tmp_path, content, match):
    """What holds no records is refused with its file and line."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    refuse(path, match)


def test_missing_file_is_refused(tmp_path):
    """A file that is not there, or a folder, is refused."""
    refuse(tmp_path / "none.jsonl", "No such file")
    refuse(tmp_path, "expected a record file")


def test_times_and_host_are_not_in_the_digest():
    """Two runs that differ in times and host have one digest, and in anything else two."""
    later = PROVENANCE.model_copy(update={"aside": {"host": "there"}})
    slower = [*EACH[:-1], Timing(key="load base", seconds=9.0)]
    assert digest_records(PROVENANCE, EACH) == digest_records(later, slower)
    for changed in ({"seed": 1}, {"device": "cuda"}, {"parameters": {}}):
        assert digest_records(PROVENANCE.model_copy(update=changed), EACH) != digest_records(
            PROVENANCE, EACH
        )


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: Measure(key="k", value=x),
        lambda x: Measure(key="k", value=0.5, low=0.1, high=x),
        lambda x: prediction(number_log_odds=x),
        lambda x: prediction(strict_value=x),
        lambda x: Table(key="k", columns=("a",), rows=((1,), (x,))),
        lambda x: REPLAY.model_copy(update={"features": {"share": 1.0, "auc": x}}),
        lambda x: Timing(key="k", seconds=x),
    ],
    ids=["value", "interval", "log-odds", "strict value", "table", "features", "seconds"],
)
def test_what_is_not_finite_is_not_written(tmp_path, make, number):
    """A number that JSON cannot hold is refused before the file is written."""
    with pytest.raises(RecordError, match="expected a finite number"):
        write_records(tmp_path / "r.jsonl", PROVENANCE, records=[EACH[0], make(number)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("current", "found"),
    [
        ({"case": "c1", "module parsing": "p0"}, "case with digest c0.*found c1"),
        ({"case": "c0"}, "module parsing.*no such input any more"),
    ],
)
def test_stale_records_are_refused(sealed, current, found):
    """What has changed since the records were made is named; what else there is does not count."""
    file = read_records(sealed)
    check_fresh(file, {**PROVENANCE.digests, "module other": "x"})
    with pytest.raises(RecordError, match=f"is stale.*{found}"):
        check_fresh(file, current)


def test_count_records(tmp_path):
    """The records of all files of a folder are counted, and other files are not read."""
    assert count_records(tmp_path) == 0
    for name, records in {"a": EACH, "b": EACH[:2]}.items():
        write_records(tmp_path / f"{name}.jsonl", PROVENANCE, records=records)
    write_text(tmp_path / "notes.txt", "x")
    assert count_records(tmp_path) == len(EACH) + 2


def test_write_text_replaces_whole(tmp_path):
    """A text replaces the one before, in folders made for it, readable by all, or leaves it."""
    path = tmp_path / "deep" / "er" / "a.txt"
    for text in ("long before", "é\n"):
        write_text(path, text)
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_bytes() == "é\n".encode()
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]
