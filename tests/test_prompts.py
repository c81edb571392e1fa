import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from postmortem.case.prompts import encode, fill, lead_of, render
from postmortem.case.schema import PromptTemplate
from postmortem.checker.errors import DataError

HEADER = "<|im_end|>\n<|im_start|>assistant\n"
SPECIALS = ["<|im_start|>", "<|im_end|>"]


class ByteTokenizer:
    """Tokens of up to `width` bytes, cut through characters as byte-level tokenizers cut them.

    The two marks of the chat template are one token each, also where a post holds them.
    """

    def __init__(self, width):
        self.width = width

    def __call__(self, text, *, add_special_tokens):
        """The ids of a text."""
        assert not add_special_tokens  # the chat template brings its own
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, SPECIALS))})", text):
            raw = part.encode("utf-8")
            pieces = [raw[i : i + self.width] for i in range(0, len(raw), self.width)]
            ids += (
                [SPECIALS.index(part)]
                if part in SPECIALS
                else [int.from_bytes(b"\x01" + piece, "big") for piece in pieces]
            )
        return {"input_ids": ids}

    def decode(self, ids):
        """The text of the ids, with the usual mark where a character is cut through."""
        return b"".join(
            SPECIALS[i].encode() if i < 2 else i.to_bytes(self.width + 1, "big").lstrip(b"\0")[1:]
            for i in ids
        ).decode("utf-8", errors="replace")

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        """Qwen's template in short."""
        assert (tokenize, add_generation_prompt) == (False, True)
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return "".join(turns) + "<|im_start|>assistant\n"


def make_template(template, **changes):
    """A template that asks for a number in the chat format."""
    settings = {"title": "T", "contract": "number", "chat": True, "system": "S", "grade": "log"}
    return PromptTemplate(**settings | changes, template=template)


TWO = make_template("Rule: {rule}\nPost: {body}\nAnswer:", system="Be brief.")
# What stands before, between and after the two columns of TWO.
BEFORE = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRule: "
BETWEEN, AFTER = "\nPost: ", "\nAnswer:" + HEADER
FIXED = len(ByteTokenizer(1)(BEFORE + BETWEEN + AFTER, add_special_tokens=False)["input_ids"])
POSTS = st.text(max_size=200) | st.lists(
    st.sampled_from(
        [*SPECIALS, HEADER, "{rule}", "{body}", "{", "}}", "é", "𝄞👍🏽", "word ", "\n", "�"]
    ),
    max_size=30,
).map("".join)


@given(rule=POSTS, body=POSTS)
@example(rule="R", body="{rule} {{body}} {0} {} %s {x!r:>{width}}")
def test_fill_is_one_replacement(rule, body):
    """Any two values stand in the text exactly once and unchanged, braces and all."""
    assert fill("a{rule}b{body}c", {"rule": rule, "body": body}) == f"a{rule}b{body}c"


def test_braces_that_name_no_column_stay():
    """In a template only `{name}` is a column; other braces are text."""
    assert fill('{"a": 1} {} {a b} {{body}}', {"body": "x"}) == '{"a": 1} {} {a b} {x}'


def test_missing_column_is_named():
    """A column that the rows lack is named, with those they have."""
    with pytest.raises(DataError, match="'rule', which the prompt uses; found body, row_id"):
        fill("{rule}", {"body": "x", "row_id": "1"})


@pytest.mark.parametrize(
    ("changes", "text", "lead"),
    [
        ({"chat": False}, "B", " "),
        ({"system": ""}, f"<|im_start|>user\nB{HEADER}", ""),
        (
            {"system": "Rule: {rule}"},
            f"<|im_start|>system\nRule: R<|im_end|>\n<|im_start|>user\nB{HEADER}",
            "",
        ),
    ],
)
def test_a_template_is_wrapped_as_it_asks(changes, text, lead):
    """Raw it is sent as filled and a space leads the answer; a system turn is there if it says."""
    template = make_template("{body}", **changes)
    row = {"rule": "R", "body": "B"}
    assert render(template, row, tokenizer=ByteTokenizer(1)) == text
    assert lead_of(template) == lead


@pytest.mark.parametrize(
    ("rule", "body", "room", "kept"),
    [
        ("R", "B", 2, "B"),
        ("short", "a long post", 15, "a long pos"),  # the longest column loses its end
        ("R", "ab👍", 5, "ab"),  # a character that the cut goes through goes whole
    ],
)
def test_the_longest_column_is_cut(rule, body, room, kept):
    """A prompt within its limit keeps every token; beyond it the longest column is cut."""
    row = {"rule": rule, "body": body, "url": "u" * 10_000}  # what is not used is not counted
    prompt = encode(TWO, row, tokenizer=ByteTokenizer(1), limit=FIXED + room)
    assert prompt.text == f"{BEFORE}{rule}{BETWEEN}{kept}{AFTER}"
    assert prompt.cut == (kept != body)
    assert prompt.full_length == FIXED + len((rule + body).encode())


def test_a_cut_always_ends():
    """A tokenizer whose decoding is no shorter than the text does not hold up the cut."""

    class Padding(ByteTokenizer):
        def decode(self, ids):
            return super().decode(ids) + "." * 100

    row = {"rule": "R", "body": "a post"}
    prompt = encode(TWO, row, tokenizer=Padding(1), limit=FIXED + 4)
    assert prompt.text == f"{BEFORE}R{BETWEEN}a p{AFTER}"


@given(rule=POSTS, body=POSTS, room=st.integers(0, 150), width=st.integers(1, 3))
@example(rule="R", body=HEADER * 20, room=10, width=1)
@example(rule="{body}", body="{rule}" * 30, room=7, width=2)
@example(rule="", body="👍" * 40, room=5, width=3)
@example(rule="R", body="x" * 1_000_000, room=5, width=3)
def test_cut_prompt_keeps_all_but_the_end_of_a_column(rule, body, room, width):
    """Under any limit what surrounds the columns stays, and a column is a beginning of itself."""
    tokenizer, limit = ByteTokenizer(width), FIXED + room
    prompt = encode(TWO, {"rule": rule, "body": body}, tokenizer=tokenizer, limit=limit)
    assert len(prompt.token_ids) <= limit
    assert list(prompt.token_ids) == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert prompt.text.startswith(BEFORE)
    assert prompt.text.endswith(AFTER)
    values = prompt.text.removeprefix(BEFORE).removesuffix(AFTER)
    splits = [match.start() for match in re.finditer(re.escape(BETWEEN), values)]
    assert any(
        rule.startswith(values[:at]) and body.startswith(values[at + len(BETWEEN) :])
        for at in splits
    )


@given(body=POSTS, room=st.integers(0, 100))
def test_cut_is_told(body, room):
    """`cut` and the full length tell what the prompt would have been."""
    row, tokenizer = {"rule": "R", "body": body}, ByteTokenizer(1)
    whole = encode(TWO, row, tokenizer=tokenizer, limit=100_000)
    prompt = encode(TWO, row, tokenizer=tokenizer, limit=FIXED + 1 + room)
    assert not whole.cut
    assert prompt.full_length == len(whole.token_ids)
    assert prompt.cut == (len(whole.token_ids) > FIXED + 1 + room)


@pytest.mark.parametrize("template", [TWO, make_template("No column at all, and too long.")])
def test_fixed_text_over_the_limit_is_refused(template):
    """Where the text around the columns is too long by itself, the prompt is refused."""
    row = {"rule": "R", "body": "a post"}
    with pytest.raises(DataError, match=r"at most 20 tokens; found .* with every column empty"):
        encode(template, row, tokenizer=ByteTokenizer(1), limit=20)
