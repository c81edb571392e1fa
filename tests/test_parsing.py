import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from postmortem.case.prompts import counts_as_parsed, parse_as_written, parse_choice, parse_strict


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
NUMBERS = "0.0 0.85 1.00 1 .5 85% -3 nan inf 1e9 0.٣ yes Spam know violate not no fine"
MARKS = [" ", "\n", "\x85", ".", ",", "{rule}", "<|im_end|>", "ß", "İ"]
PARTS = st.sampled_from([*NUMBERS.split(), *MARKS])
ANSWERS = st.text() | st.lists(PARTS, max_size=6).map("".join) | st.floats().map(repr)


@given(text=ANSWERS)
@example(text="17\x1f")
def test_as_written_equals_the_published_parser(text):
    """On any text the write-up's parser gives what its published three stages give."""
    assert parse_as_written(text).value == parse_as_published(text)


@pytest.mark.parametrize(
    ("value", "stage", "texts"),
    [
        # A number that is no probability becomes one, and "nan" the certain violation.
        (0.0, "float", ["0", "0.0", "0.000", "-3", "-1e-9", "0e5", "-0.0", "-inf"]),
        (1.0, "float", ["17", "inf", "1_000", "1", "nan", "9" * 1_000_000]),
        (0.25, "float", [" 0.25\n", ".25"]),
        # Of a range, or of an example that the model repeats, the first number is taken.
        (0.1, "pattern", ["From 0.1 (not at all) to 1.0 (surely): 0.9"]),
        # "no" is found inside other words, and a denial counts as a violation.
        (0.2, "keyword", ["I know", "It is nothing of note", "cannot", "annotated"]),
        (0.8, "keyword", ["does not violate", "This is not spam", "No, by yesterday's rule"]),
        # Numbers in a sentence are overlooked, and silence is the value of an honest 0.5.
        (0.5, "default", ["p = 1", "p = 0", "p = .5", "85%", "1.5 of 2", "p=00.5", "0.5e"]),
        (0.5, "default", ["", " ", "\n\x00", "\ud800", "<think>", "!!!"]),
    ],
)
def test_the_defects_of_the_parser_as_written(value, stage, texts):
    """Whatever is wrong with the write-up's parser is kept, and its stage tells what it did."""
    for text in texts:
        parsed = parse_as_written(text)
        assert (parsed.value, parsed.stage) == (value, stage), text


@pytest.mark.parametrize(
    ("value", "counted"), [(0.0, True), (0.95, True), (0.2, False), (0.5, False), (0.8, False)]
)
def test_parse_success_counts_values(value, counted):
    """Defect: the write-up's "parse success" looks at the value, so an honest 0.2 is a failure."""
    assert counts_as_parsed(value) is counted


# What is not a plain number between 0 and 1, and nothing else.
NO_NUMBERS = ["", "-0", "-3", "+0.5", "17", "1.01", "nan", "inf", "1e-1", "0_1", "0.", "1.", "."]
NO_NUMBERS += ["00.5", "85%", "0,5", "0.5.", "0.5 or so", "0.5 0.5", "0.5\x00", "0.5{rule}", "Yes"]
NO_NUMBERS += ["٠.٥", "０", "½", "0." + "1" * 1_000_000]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:12])
def test_strict_guesses_nothing(text):
    """What is not a plain number between 0 and 1, and nothing else, has no value."""
    assert (parse_strict(text).value, parse_strict(text).stage) == (None, "none")


@given(digits=st.integers(1, 16), data=st.data())
def test_strict_round_trip(digits, data):
    """A number of [0, 1] written with up to sixteen decimals is read as that number."""
    text = f"{data.draw(st.floats(0, 1)):.{digits}f}"
    assert parse_strict(text).value == parse_strict(f" {text}\n").value == float(text)


@given(text=ANSWERS | st.from_regex(r"\s?-?\d?\.?\d{0,20}\s?", fullmatch=True))
@example(text="0\x1f")
@example(text=".5")
@example(text="1")
def test_strict_never_leaves_the_unit_interval(text):
    """The strict parser gives a number of [0, 1], which is that of `float`, or None."""
    parsed = parse_strict(text)
    assert (parsed.stage == "strict") == (parsed.value is not None)
    if parsed.value is not None:
        assert parsed.value == float(text.strip())
        assert 0.0 <= parsed.value <= 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("positive", 1.0),
        (" Positive.", 1.0),
        ("**NEGATIVE** because", 0.0),
        ("positively not", None),
        ("the film is positive", None),
        ("", None),
    ],
)
def test_a_choice_is_read_at_the_beginning(text, value):
    """An answer counts as a whole word at the beginning, whatever its case, and nowhere else."""
    assert parse_choice(text, ["negative", "positive"]).value == value
