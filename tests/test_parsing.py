import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from postmortem.case.prompts import counts_as_parsed, parse_as_written, parse_strict


def parse_as_published(text):
    """The write-up's parser, transcribed from its listing, without our stages."""
    text = text.strip()  # float() does so itself, but for the separators U+001C to U+001F
    try:
        prob = float(text)
        return max(0.0, min(1.0, prob))
    except ValueError:  # the listing catches everything; float() of a text raises nothing else
        pass
    matches = re.findall(r"\b(0\.\d+|1\.0+)\b", text)
    if matches:
        prob = float(matches[0])
        return max(0.0, min(1.0, prob))
    lower = text.lower()
    if any(w in lower for w in ["yes", "violate", "spam"]):
        return 0.8
    if any(w in lower for w in ["no", "not", "fine"]):
        return 0.2
    return 0.5


# Texts in which the stages have something to find, beside texts of any kind.
PARTS = st.sampled_from(
    [
        *("0.0", "0.85", "1.00", "1", ".5", "85%", "-3", "nan", "inf", "1e9", "0.٣"),
        *("yes", "Spam", "know", "violate", "not", "no", "fine"),
        *(" ", "\n", "\x85", ".", ",", "{rule}", "<|im_end|>", "ß", "İ"),
    ]
)
ANSWERS = st.text() | st.lists(PARTS, max_size=6).map("".join) | st.floats().map(repr)


@given(text=ANSWERS)
@example(text="17\x1f")
def test_as_written_equals_the_published_parser(text):
    """On any text the write-up's parser gives what its published three stages give."""
    assert parse_as_written(text).value == parse_as_published(text)


@given(text=ANSWERS)
def test_stage_is_the_one_that_fits_the_value(text):
    """A keyword gives 0.2 or 0.8, the default 0.5, and the other stages a value in [0, 1]."""
    parsed = parse_as_written(text)
    possible = {"keyword": {0.2, 0.8}, "default": {0.5}}.get(parsed.stage, {parsed.value})
    assert parsed.value in possible
    assert 0.0 <= parsed.value <= 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("-3", 0.0), ("17", 1.0), ("-0.0", 0.0), ("inf", 1.0), ("-inf", 0.0), ("1_000", 1.0)],
)
def test_as_written_clamps(text, value):
    """Defect: a number that is no probability becomes one."""
    assert (parse_as_written(text).value, parse_as_written(text).stage) == (value, "float")


def test_as_written_reads_nan_as_certain():
    """Defect: "nan" is read as a certain violation, because `min(1.0, nan)` is 1.0."""
    assert (parse_as_written("nan").value, parse_as_written("nan").stage) == (1.0, "float")


@pytest.mark.parametrize("text", ["0", "0.0", "0.000", "-3", "-1e-9", "0e5"])
def test_as_written_reads_different_answers_as_zero(text):
    """Defect: answers that differ, one of them no number between 0 and 1, all become 0.0."""
    assert parse_as_written(text).value == 0.0


@pytest.mark.parametrize("text", ["I know", "It is nothing of note", "cannot", "annotated"])
def test_as_written_finds_no_inside_words(text):
    """Defect: "no" is found inside other words, so "I know" counts as a No."""
    assert (parse_as_written(text).value, parse_as_written(text).stage) == (0.2, "keyword")


@pytest.mark.parametrize(
    "text", ["does not violate", "This is not spam", "No, by yesterday's rule"]
)
def test_as_written_reads_a_denial_as_a_violation(text):
    """Defect: a sentence that denies a violation counts as one."""
    assert (parse_as_written(text).value, parse_as_written(text).stage) == (0.8, "keyword")


@pytest.mark.parametrize("text", ["p = 1", "p = 0", "p = .5", "85%", "1.5 of 2", "p=00.5", "0.5e"])
def test_as_written_overlooks_numbers_in_a_sentence(text):
    """Defect: "1", "0", ".5" and "85%" are not found in a sentence and become the default."""
    assert (parse_as_written(text).value, parse_as_written(text).stage) == (0.5, "default")


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), (".5", 0.5), (" 0.25\n", 0.25)])
def test_as_written_reads_a_bare_number(text, value):
    """A number that is the whole answer is read in the first stage."""
    assert (parse_as_written(text).value, parse_as_written(text).stage) == (value, "float")


def test_as_written_takes_the_first_number():
    """Defect: of a range, or of an example that the model repeats, the first number is taken."""
    parsed = parse_as_written("From 0.1 (not at all) to 1.0 (surely): 0.9")
    assert (parsed.value, parsed.stage) == (0.1, "pattern")


def test_as_written_default_is_a_value_that_a_model_can_write():
    """Defect: an answer of 0.5 and no answer at all are the same value."""
    assert parse_as_written("0.5").value == parse_as_written("!!!").value
    assert parse_as_written("0.5").stage != parse_as_written("!!!").stage


@pytest.mark.parametrize("text", ["", " ", "\n\x00", "\ud800", "<think>"])
def test_as_written_gives_half_to_silence(text):
    """What holds neither number nor keyword becomes 0.5."""
    assert (parse_as_written(text).value, parse_as_written(text).stage) == (0.5, "default")


def test_parsers_stay_quick_on_a_huge_text():
    """A text of a million digits is read by neither parser as a number of [0, 1], nor hangs it."""
    assert parse_as_written("9" * 1_000_000).value == 1.0  # clamped from infinity
    assert parse_strict("0." + "1" * 1_000_000).value is None


@pytest.mark.parametrize(
    ("value", "counted"), [(0.0, True), (0.95, True), (0.2, False), (0.5, False), (0.8, False)]
)
def test_parse_success_counts_values(value, counted):
    """Defect: the write-up's "parse success" looks at the value, so an honest 0.2 is a failure."""
    assert counts_as_parsed(value) is counted


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-0",
            "-3",
            "+0.5",
            "17",
            "1.01",
            "nan",
            "inf",
            "1e-1",
            "0_1",
            "0.",
            "1.",
            ".",
            "00.5",
        ),
        *("85%", "0,5", "0.5.", "0.5 or so", "0.5 0.5", "0.5\x00", "0.5{rule}", "Yes"),
        *("٠.٥", "０", "½"),
    ],
)
def test_strict_guesses_nothing(text):
    """What is not a plain number between 0 and 1, and nothing else, has no value."""
    assert (parse_strict(text).value, parse_strict(text).stage) == (None, "none")


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0.0), ("1", 1.0), ("1.000", 1.0), (".5", 0.5), (" 0.85\n", 0.85)]
)
def test_strict_reads_plain_numbers(text, value):
    """A plain number between 0 and 1 is read, with white space around it."""
    assert (parse_strict(text).value, parse_strict(text).stage) == (value, "strict")


@given(digits=st.integers(1, 16), data=st.data())
def test_strict_round_trip(digits, data):
    """A number of [0, 1] written with up to sixteen decimals is read as that number."""
    text = f"{data.draw(st.floats(0, 1)):.{digits}f}"
    assert parse_strict(text).value == float(text)


@given(text=ANSWERS | st.from_regex(r"\s?-?\d?\.?\d{0,20}\s?", fullmatch=True))
@example(text="0\x1f")
def test_strict_never_leaves_the_unit_interval(text):
    """The strict parser gives a number of [0, 1], which is that of `float`, or None."""
    parsed = parse_strict(text)
    assert (parsed.stage == "strict") == (parsed.value is not None)
    if parsed.value is not None:
        assert parsed.value == float(text.strip())
        assert 0.0 <= parsed.value <= 1.0
