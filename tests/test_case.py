import copy
from datetime import date
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.load import case_digest, load_case
from postmortem.case.schema import Case
from postmortem.checker.errors import CaseError

SHIPPED = Path(__file__).parents[1] / "cases" / "qwen-lora.yml"

# Evidence: the prompts of the incident, character for character.
V1 = """You are a content moderator. Determine if the following post violates the given rule.

Rule: {rule}
Post to evaluate: {body}

Does this post violate the rule? Answer with a probability between 0 and 1.

Probability:"""
V2_SYSTEM = (
    "You are a precise AI. Respond ONLY with a decimal number between 0.0 and 1.0. NO other text."
)
V2_BODY = """Analyze if this post violates the rule.

RULE: {rule}
POST: {body}

POSITIVE EXAMPLES (violations):
1. {positive_example_1}
2. {positive_example_2}

NEGATIVE EXAMPLES (not violations):
1. {negative_example_1}
2. {negative_example_2}
"""
V2 = (
    V2_BODY
    + """
Respond with ONLY a number between 0.0 and 1.0:
- 0.0 = NOT a violation
- 1.0 = IS a violation

Examples: 0.95, 0.23, 0.78, 0.02

Your answer (number only):"""
)

LOGGED = {"grade": "log", "source": "a log"}
SMALL = {
    "case_version": 1,
    "name": "small",
    "title": "A small case",
    "symptom": "Every prediction is the same.",
    "context": "None.",
    "systems": {
        role: {"title": role, "name": role, "grade": "log", "source": "a log"}
        for role in ("base", "suspect")
    },
    "prompts": {
        "ask": {
            "title": "Ask",
            "contract": "number",
            "chat": False,
            "template": "{body}",
            "grade": "log",
        }
    },
    "attempts": {
        "first": {
            "title": "First",
            "prompt": "ask",
            "decoding": {"max_new_tokens": 10},
            "reported_parse_rate": 1.0,
            "reported_value": 0.0,
            "rows": 10,
            "grade": "log",
            "source": "a log",
        }
    },
    "hypotheses": [
        {
            "id": "A",
            "title": "A",
            "statement": "It is A.",
            "verdict": "cannot tell",
            "because": "Nothing is on record.",
            "grade": "log",
            "decided_by": "A run.",
        }
    ],
    "profiles": {"tiny": {"title": "Tiny", "base": "embedded", "rows": 10, "caveat": "Tiny."}},
    "forensics": {
        "attempt": "first",
        "row_ids": {"values": ["1", "2"], **LOGGED},
        "labels": {"values": [0, 1], **LOGGED},
        "submitted": {"values": [0.0, 0.5], **LOGGED},
        "prompt_tokens": {"values": [30, 40], **LOGGED},
        "log": {
            "epoch": 1761125244.5,
            "epoch_at": 1.5,
            "lines": [{"seconds": 0.5, "says": "It begins."}],
            "loading": [2.0, 3.0],
            "ticks": [3.0, 4.0, 5.0],
            "messages": {"mismatch": {"says": "mismatch", "times": 0}},
            **LOGGED,
        },
        "ignored_flags": "mismatch",
        "faults": [
            {"id": "loud", "fault": "f", "hypothesis": "A", "message": "mismatch", **LOGGED},
            {"id": "silent", "fault": "f", **LOGGED},
        ],
        "hardware": {
            "device": "d",
            "gigabytes_per_second": 700,
            "bytes_per_parameter": 2,
            **LOGGED,
        },
        "answer": {"text": "0.0", "tokens": 3, "claimed_tokens": 2, **LOGGED},
        "good_score": {"auc": 0.9, **LOGGED},
        "claimed_date": {"day": date(2024, 10, 22), **LOGGED},
        "contents": {"other_bases": [], "ranks": [8], "target_modules": {"q": ["q_proj"]}},
    },
}


CLAIM = {
    "id": "a",
    "section": "S",
    "claim": "C",
    "verdict": "stands",
    "because": "B",
    "grade": "log",
    "decided_by": "A run.",
    "would_change": "Another run.",
}
SAID = {"text": "It stopped.", "grade": "log"}
PRACTICE = {
    "impact": SAID,
    "trigger": SAID,
    "detection": [],
    "contributing_factors": [SAID],
    "went_well": [],
    "lucky": [],
    "actions": [],
}
ACTION = {"id": "a", "action": "Run it.", "closes": "A run.", "grade": "log"}


def write_text(folder: Path, text: str) -> Path:
    """That text as a case file in that folder."""
    path = folder / "case.yml"
    path.write_bytes(text.encode("utf-8"))
    return path


def write_with(folder: Path, key: tuple, value: object) -> Path:
    """The small case with the value at that key, as a file."""
    data = copy.deepcopy(SMALL)
    place = data
    for part in key[:-1]:
        place = place[part]
    place[key[-1]] = value
    return write_text(folder, yaml.safe_dump(data))


def refuse(path: Path) -> CaseError:
    """The error for that file, which must be one line and name the file."""
    with pytest.raises(CaseError) as caught:
        load_case(path)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    return caught.value


@pytest.fixture(scope="module")
def shipped() -> Case:
    """The shipped case, read once."""
    return load_case(SHIPPED)


def test_shipped_case_loads(shipped):
    """The shipped case satisfies the model and is the incident's."""
    assert shipped.name == "qwen-lora"


def test_v1_is_exact(shipped):
    """The first prompt is the incident's, sent raw and without a system text."""
    v1 = shipped.prompts["v1"]
    assert (v1.chat, v1.system, v1.template) == (False, "", V1)


def test_v2_is_exact(shipped):
    """The second prompt is the incident's, system text and final newline included."""
    v2 = shipped.prompts["v2"]
    assert (v2.chat, v2.system, v2.template) == (True, V2_SYSTEM, V2)


def test_v2_yes_no_changes_the_question_only(shipped):
    """The yes/no form of the second prompt shares its body up to the last example."""
    template = shipped.prompts["v2_yes_no"].template
    assert template.startswith(V2_BODY)
    assert "0.0" not in template


def test_columns_of_v2_in_order(shipped):
    """A prompt tells the columns that it uses, in order of first use."""
    examples = [f"{sign}_example_{n}" for sign in ("positive", "negative") for n in (1, 2)]
    assert ("rule", "body", *examples) == shipped.prompts["v2"].columns


@pytest.mark.parametrize("kind", ["observations", "evidence", "hypotheses", "claims", "lessons"])
def test_shipped_ids_are_distinct(shipped, kind):
    """An id stands for one item of its kind."""
    ids = [item.id for item in getattr(shipped, kind)]
    assert len(set(ids)) == len(ids) > 0


def test_shipped_hypotheses(shipped):
    """Only what the surviving record refutes is refuted, and nothing is said to hold."""
    verdicts = {hypothesis.id: hypothesis.verdict for hypothesis in shipped.hypotheses}
    ids = ["A1", "A2", "A3", "A4", "B", "C", "D", "E", "F", "G", "H", "P"]
    assert {id_: "refuted" if id_ in ("A1", "F") else "cannot tell" for id_ in ids} == verdicts


def test_shipped_confidences(shipped):
    """The write-up's confidences stand at the hypotheses that it considered, and nowhere else."""
    found = {h.id: (h.initial, h.final) for h in shipped.hypotheses if h.initial is not None}
    assert found == {"A1": (80, 85), "B": (60, 40), "P": (40, 15)}


def test_every_claim_is_decided(shipped):
    """Each claim has a verdict, a reason, a grade, what decides it and what would change it."""
    words = {"stands", "stands in part", "refuted", "cannot be checked"}
    assert {claim.verdict for claim in shipped.claims} == words
    for claim in shipped.claims:
        texts = (claim.claim, claim.because, claim.decided_by, claim.would_change)
        assert all(text.endswith((".", "?")) for text in texts), claim.id


def test_every_section_of_the_write_up_has_claims(shipped):
    """The ledger goes through the write-up from its summary to its end, section by section."""
    sections = [claim.section for claim in shipped.claims]
    assert list(dict.fromkeys(sections)) == [
        *("Executive summary", "Failure timeline", "First attempt", "Second attempt"),
        *("Initial observations", "Hypotheses", "Evidence", "Root cause analysis"),
        *("Validation plan", "Lessons", "Production parallels", "Conclusion"),
    ]
    # A section stands in one piece, since the ledger gives each its heading once.
    assert sections == sorted(sections, key=list(dict.fromkeys(sections)).index)


def test_no_claim_is_entered_twice(shipped):
    """No two claims say the same thing in the same words."""
    claims = [claim.claim for claim in shipped.claims]
    assert len(set(claims)) == len(claims)


def test_shipped_actions_have_what_closes_them(shipped):
    """Some action items are decided by a run and some are open until someone acts."""
    tests = [action.test is None for action in shipped.practice.actions]
    assert any(tests)
    assert not all(tests)


@pytest.mark.parametrize("key", ["because", "decided_by", "would_change", "claim", "section"])
@pytest.mark.parametrize("value", ["", "  ", None])
def test_a_blank_in_a_claim_is_refused(tmp_path, key, value):
    """A claim without its reason, decider or counter-finding is refused with that key."""
    error = refuse(write_with(tmp_path, ("claims",), [{**CLAIM, key: value}]))
    assert error.subject.endswith(f"key `claims.0.{key}`")
    assert error.expected in ("a text that is not blank", "a valid string")


@pytest.mark.parametrize("key", ["decided_by", "would_change", "grade"])
def test_a_claim_that_lacks_a_part_is_refused(tmp_path, key):
    """A part of a claim that is left out is named as missing."""
    lacking = {name: value for name, value in CLAIM.items() if name != key}
    error = refuse(write_with(tmp_path, ("claims",), [lacking]))
    assert (error.expected, error.found) == ("this key to be given", "nothing")
    assert error.subject.endswith(f"key `claims.0.{key}`")


def test_practice_may_be_left_out_and_not_halved(tmp_path, shipped):
    """A case has no practice, or a whole one with its graded impact."""
    assert load_case(write_text(tmp_path, yaml.safe_dump(SMALL))).practice is None
    assert load_case(write_with(tmp_path, ("practice",), PRACTICE)).practice is not None
    halved = {key: value for key, value in PRACTICE.items() if key != "impact"}
    error = refuse(write_with(tmp_path, ("practice",), halved))
    assert error.subject.endswith("key `practice.impact`")


def test_a_repeated_action_is_named(tmp_path):
    """Two action items with the same id are refused."""
    twice = {**PRACTICE, "actions": [ACTION, ACTION]}
    error = refuse(write_with(tmp_path, ("practice",), twice))
    assert error.subject.endswith("key `practice.actions`")
    assert error.found == "'a' twice"


def test_shipped_texts_are_plain():
    """The shipped case is shown as text, so it holds no markup, no tabs and no carriage returns."""
    text = SHIPPED.read_text(encoding="utf-8")
    assert [mark for mark in ("`", "**", "</", "](", "\t", "\r") if mark in text] == []


def test_small_case_loads(tmp_path):
    """What may be left out has a default."""
    case = load_case(write_text(tmp_path, yaml.safe_dump(SMALL)))
    assert (
        case.attempts["first"].decoding.max_prompt_tokens,
        case.attempts["first"].decoding.do_sample,
        case.profiles["tiny"].seed,
    ) == (512, False, 0)


def test_unknown_profile_lists_the_known(shipped):
    """Asking for a profile that is not there names those that are."""
    with pytest.raises(CaseError, match="embedded, smollm2, qwen-coder, qwen"):
        shipped.profile("none")


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        (("attempts", "first", "rows"), "10", "a valid integer", "'10'"),
        (("attempts", "first", "rows"), 0, "greater than or equal to 1", "0"),
        (("attempts", "first", "reported_value"), float("nan"), "a finite number", "nan"),
        (("hypotheses", 0, "initial"), 180, "less than or equal to 100", "180"),
        (("hypotheses", 0, "grade"), "hearsay", "'recollection'", "'hearsay'"),
        (("hypotheses", 0, "id"), "a1", "[A-Z]", "'a1'"),
        (("prompts", "ask", "chat"), "yes", "a valid boolean", "'yes'"),
        (("case_version",), 2, "1", "2"),
        (("title",), None, "a valid string", "None"),
        (("claims",), {}, "a valid list", "{}"),
        (("profiles", "tiny", "sede"), 1, "a known key", "an unknown key"),
        (("attempts", "first", "prompt"), "other", "one of ask", "'other'"),
    ],
)
def test_bad_value_is_explained(tmp_path, key, value, expected, found):
    """A bad value is refused with its key, what was expected and what was found."""
    error = refuse(write_with(tmp_path, key, value))
    assert f"key `{'.'.join(map(str, key))}`" in error.subject
    assert expected in error.expected
    assert found in error.found


def test_number_too_long_to_print_is_explained(tmp_path):
    """A number that Python reads but does not print is refused like any other bad value."""
    path = write_with(tmp_path, ("title",), "HUGE")
    write_text(tmp_path, path.read_text(encoding="utf-8").replace("HUGE", "0x" + "f" * 5000))
    error = refuse(path)
    assert (error.expected, error.found) == ("a valid string", "a number too long to print")


def test_missing_key_is_named(tmp_path):
    """A key that is left out is named as missing."""
    data = {key: value for key, value in SMALL.items() if key != "symptom"}
    error = refuse(write_text(tmp_path, yaml.safe_dump(data)))
    assert (error.expected, error.found) == ("this key to be given", "nothing")
    assert error.subject.endswith("key `symptom`")


def test_further_problems_are_counted(tmp_path):
    """The first problem is explained and the others are counted."""
    error = refuse(write_text(tmp_path, "case_version: 1\nname: small\n"))
    assert error.remedy == "6 further problem(s) in this file."


@pytest.mark.parametrize(
    ("key", "shown"),
    [("two\nlines", r"'two\nlines'"), ("\x1b[31m", r"'\x1b[31m'"), ("", "''"), (7, "7")],
)
def test_odd_key_is_quoted(tmp_path, key, shown):
    """A key that is not a plain text on one line is shown quoted."""
    error = refuse(write_text(tmp_path, yaml.safe_dump({**SMALL, key: 1})))
    assert shown in f"{error.subject} {error.found}"


def test_surrogate_key_is_refused(tmp_path):
    """A key that is no valid Unicode is refused in a message that can be printed."""
    refuse(write_text(tmp_path, yaml.safe_dump(SMALL) + '"\\ud800": 1\n')).args[0].encode("utf-8")


@pytest.mark.parametrize("kind", ["hypotheses", "claims"])
def test_repeated_id_is_named(tmp_path, kind):
    """Two items of one kind with the same id are refused."""
    item = SMALL["hypotheses"][0] if kind == "hypotheses" else CLAIM
    error = refuse(write_with(tmp_path, (kind,), [item, item]))
    assert f"key `{kind}`" in error.subject
    assert error.found == f"{item['id']!r} twice"


def test_repeated_key_is_refused(tmp_path):
    """A key that stands twice is refused with its line instead of the last one winning."""
    error = refuse(write_text(tmp_path, yaml.safe_dump(SMALL) + "title: again\n"))
    assert "the key 'title' stands twice" in error.found
    assert "line" in error.found


@pytest.mark.parametrize(
    "text",
    [
        "a: [1,",
        "a: b: c",
        "? [a, b]\n: 1",
        "? {a: b}\n: 1",
        "a: &loop [*loop]\n? *loop\n: 1",
        "<<: {a: 1}",
        "a: =",
        "a: 2025-13-45",
        "a: !!int ''",
        "a: !!float x",
        "a: !!bool x",
        "a: !!timestamp x",
        "!!map [a]",
        "!!map a",
        "a: " + "9" * 5000,
        "a: \x00",
        "a: [\u202e@",
        "[" * 100_000,
        "[" * 300 + "]" * 300,
    ],
    ids=lambda text: text[:20],
)
def test_malformed_yaml_is_refused(tmp_path, text):
    """Whatever a YAML text does to its parser, the answer is an error about this file."""
    refuse(write_text(tmp_path, text))


def test_python_tag_is_refused(tmp_path):
    """A tag that would run code is refused and nothing runs."""
    mark = tmp_path / "ran"
    error = refuse(write_text(tmp_path, f"!!python/object/apply:os.system ['touch {mark}']"))
    assert error.expected == "valid YAML"
    assert "os.system" in error.found
    assert not mark.exists()


def test_alias_bomb_is_refused_at_once(tmp_path):
    """A text that doubles itself by aliases is refused without being written out."""
    doubled = ["&a0 [x, x]", *(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    others = yaml.safe_dump({key: value for key, value in SMALL.items() if key != "title"})
    error = refuse(write_text(tmp_path, f"{others}title: [{', '.join(doubled)}]\n"))
    assert error.subject.endswith("key `title`")
    assert len(error.found) <= 80


@pytest.mark.parametrize("text", ["", "\n", "# a comment only\n", "---\n"])
def test_empty_file_is_explained(tmp_path, text):
    """An empty file is told from a mapping."""
    error = refuse(write_text(tmp_path, text))
    assert error.subject.endswith("the top level")
    assert (error.expected, error.found) == ("a mapping of keys to values", "None")


def test_missing_file_is_named(tmp_path):
    """A file that is not there is named, with what to give instead."""
    error = refuse(tmp_path / "none.yml")
    assert (error.expected, error.found) == ("a case file", "no such file")
    assert "cases/qwen-lora.yml" in error.remedy


def test_directory_is_refused(tmp_path):
    """A folder is not a case file."""
    assert refuse(tmp_path).expected == "a readable UTF-8 file"


def test_other_encoding_is_refused(tmp_path):
    """A file that is not UTF-8 is refused."""
    path = tmp_path / "case.yml"
    path.write_bytes("title: Übersicht".encode("latin-1"))
    assert "utf-8" in refuse(path).found


def test_digest_follows_the_filter(shipped):
    """The write-up's filter decides recorded verdicts, so a change of its limits counts."""
    limits = shipped.adapter_filter.model_copy(update={"std_above": 0.01})
    changed = shipped.model_copy(update={"adapter_filter": limits})
    assert case_digest(changed) != case_digest(shipped)


def test_digest_follows_the_prompt(shipped):
    """The digest changes with a prompt and not with a comment of ours on a claim."""
    reworded = shipped.model_copy(update={"claims": [], "practice": None})
    v1 = shipped.prompts["v1"].model_copy(update={"template": V1 + " "})
    changed = shipped.model_copy(update={"prompts": {**shipped.prompts, "v1": v1}})
    assert case_digest(reworded) == case_digest(shipped) != case_digest(changed)


def test_forensics_may_be_left_out(tmp_path):
    """A case of which no log or file survives has no forensic section, and loads."""
    others = {key: value for key, value in SMALL.items() if key != "forensics"}
    assert load_case(write_text(tmp_path, yaml.safe_dump(others))).forensics is None


def test_forensic_facts_count_in_the_digest(shipped):
    """A changed fact makes the records stale."""
    facts = shipped.forensics
    changed = facts.model_copy(update={"ignored_flags": "size-mismatch"})
    assert case_digest(shipped.model_copy(update={"forensics": changed})) != case_digest(shipped)


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        ("labels.values", [0], "2 values, as many as row_ids", "1"),
        ("labels.values", [0, 2], "less than or equal to 1", "2"),
        ("labels.values", [0, True], "a valid integer", "True"),
        ("submitted.values", [0.0, 0.5, 0.5], "2 values", "3"),
        ("submitted.values", [0.0, 1.5], "less than or equal to 1", "1.5"),
        ("prompt_tokens.values", [], "at least 1 item", "[]"),
        ("prompt_tokens.values", [30, 0], "greater than or equal to 1", "0"),
        ("row_ids.values", ["1", "1"], "distinct ids", "['1', '1']"),
        ("row_ids.values", ["\u202e\n", "\u202e\n"], "distinct ids", r"'\u202e\n'"),
        ("log.ticks", [3.0, 4.0], "3 times", "2"),
        ("log.ticks", [3.0, 4.0, 4.0], "times that rise", "[3.0, 4.0, 4.0]"),
        ("log.ticks", [-3.0, 4.0, 5.0], "greater than or equal to 0", "-3.0"),
        ("log.ticks", [3.0, 4.0, float("nan")], "finite", "nan"),
        ("log.loading", [3.0, 2.0], "times that rise", "[3.0, 2.0]"),
        ("log.loading", [3.0], "at least 2 items", "[3.0]"),
        ("log.epoch", 1e18, "less than or equal to", "1e+18"),
        ("attempt", "second", "one of first", "'second'"),
        ("ignored_flags", "flags", "one of mismatch", "'flags'"),
        ("faults.0.message", "flags", "one of mismatch", "'flags'"),
        ("faults.0.hypothesis", "B", "one of A", "'B'"),
        ("faults.1.id", "loud", "distinct ids", "['loud', 'loud']"),
        ("claimed_date.day", "2024-13-01", "date", "'2024-13-01'"),
        ("good_score.auc", 1.0, "less than 1", "1.0"),
    ],
)
def test_bad_forensic_fact_is_explained(tmp_path, key, value, expected, found):
    """Lists of unlike lengths, times that do not rise and names of nothing are refused by key."""
    parts = (int(part) if part.isdigit() else part for part in key.split("."))
    error = refuse(write_with(tmp_path, ("forensics", *parts), value))
    assert "key `forensics." in error.subject
    assert key.split(".")[0] in error.subject
    assert expected in error.expected
    assert found in error.found


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCALARS, inner, max_size=4),
    max_leaves=12,
)
PLACES = st.sampled_from(
    [
        *((key,) for key in SMALL),
        ("systems", "base", "config"),
        ("prompts", "ask"),
        ("prompts", "ask", "template"),
        ("attempts", "first", "rows"),
        ("attempts", "first", "decoding"),
        ("hypotheses", 0),
        ("profiles", "tiny", "adapters"),
        ("forensics",),
        *(("forensics", key) for key in SMALL["forensics"]),
        ("forensics", "log", "ticks"),
        ("forensics", "faults", 0),
        ("unknown",),
    ]
)


def is_case_or_clear_error(path: Path) -> bool:
    """Whether the file gives a case with a digest, or an error of one line that names the file."""
    try:
        return bool(case_digest(load_case(path)))
    except CaseError as error:
        return str(error).isprintable() and str(path) in str(error)


@given(value=VALUES)
def test_any_value_is_a_case_or_an_error(tmp_path, value):
    """Any value as the whole file gives a case or a `CaseError`, and nothing else."""
    assert is_case_or_clear_error(write_text(tmp_path, yaml.safe_dump(value)))


@given(place=PLACES, value=VALUES)
def test_any_value_in_any_place_is_a_case_or_an_error(tmp_path, place, value):
    """Any value in place of a part of a case gives a case or a `CaseError`, and nothing else."""
    assert is_case_or_clear_error(write_with(tmp_path, place, value))


@given(text=st.text())
def test_any_text_is_a_case_or_an_error(tmp_path, text):
    """Any text as the file gives a case or a `CaseError`, and nothing else."""
    assert is_case_or_clear_error(write_text(tmp_path, text))
