import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.load import case_digest, evidence_digest, load_case, read_yaml
from postmortem.case.schema import FORMS
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


def shorten(data):
    """The contents of the shipped case file with one prompt, attempt, profile and hypothesis."""
    small = {key: data[key] for key in ("case_version", "name", "title", "symptom", "context")}
    small["systems"] = {role: data["systems"][role] for role in ("base", "suspect")}
    for key, name in (("prompts", "v2"), ("attempts", "v2"), ("profiles", "embedded")):
        small[key] = {name: data[key][name]}
    for section in ("timeline", "observations", "claims", "lessons", "hypotheses"):
        small[section] = data[section][:1]
    small["practice"] = {name: items[:1] for name, items in data["practice"].items()}
    small["forensics"] = data["forensics"] | {"faults": data["forensics"]["faults"][:2]}
    return small


SMALL = shorten(read_yaml(SHIPPED))


def write_text(folder, text):
    """That text as a case file in that folder."""
    path = folder / "case.yml"
    path.write_bytes(text.encode("utf-8"))
    return path


def write_with(folder, key, value):
    """The small case with the value at that key, or without the key where it is `...`."""
    data = copy.deepcopy(SMALL)
    place = data
    for part in key[:-1]:
        place = place[part]
    if value is ...:
        del place[key[-1]]
    else:
        place[key[-1]] = value
    return write_text(folder, yaml.safe_dump(data))


def split_key(key):
    """The parts of a dotted key, numbers as places in a list."""
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def refuse(path):
    """The error for that file, which must be one line and name the file."""
    with pytest.raises(CaseError) as caught:
        load_case(path)
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)
    return caught.value


def test_shipped_prompts_are_exact(case):
    """The prompts are the incident's to the letter; the yes/no form changes the question only."""
    v1, v2 = case.prompts["v1"], case.prompts["v2"]
    assert (v1.chat, v1.system, v1.template) == (False, "", V1)
    assert (v2.chat, v2.system, v2.template) == (True, V2_SYSTEM, V2)
    assert case.prompts["v2_yes_no"].template.startswith(V2_BODY)
    assert "0.0" not in case.prompts["v2_yes_no"].template


def test_columns_of_v2_in_order(case):
    """A prompt tells the columns that it uses, in order of first use."""
    examples = [f"{sign}_example_{n}" for sign in ("positive", "negative") for n in (1, 2)]
    assert ("rule", "body", *examples) == case.prompts["v2"].columns


def test_shipped_hypotheses(case):
    """Confidences are those that the write-up gave; one hypothesis alone is about the base."""
    assert [h.id for h in case.hypotheses if h.base_alone] == ["D"]
    assert not any(h.causes for h in case.hypotheses if h.base_alone)
    weighed = {h.id: (h.initial, h.final) for h in case.hypotheses if h.initial is not None}
    assert weighed == {"A1": (80, 85), "B": (60, 40), "P": (40, 15)}


def test_the_ledger_goes_through_the_write_up(case):
    """Claims stand by the write-up's sections, each in one piece, and none is entered twice."""
    sections = [claim.section for claim in case.claims]
    assert list(dict.fromkeys(sections)) == [
        "Executive summary",
        "Failure timeline",
        "First attempt",
        "Second attempt",
        "Initial observations",
        "Hypotheses",
        "Evidence",
        "Root cause analysis",
        "Validation plan",
        "Lessons",
        "Production parallels",
        "Conclusion",
    ]
    # The ledger gives each section its heading once.
    assert sections == sorted(sections, key=list(dict.fromkeys(sections)).index)
    assert len({claim.text for claim in case.claims}) == len(case.claims)


def test_shipped_items_are_sentences(case):
    """Every section has items, and what they say ends as a sentence does."""
    for section, items in case.sections.items():
        assert items, section
        for item in items:
            told = (item.finding, item.because, item.would_change)
            assert all(text.endswith((".", "?")) for text in told if text), item.text


def test_some_actions_are_decided_by_a_run(case):
    """Some action items are decided by a run and some are open until someone acts."""
    assert {action.test is None for action in case.practice.actions} == {True, False}


def test_shipped_texts_are_plain():
    """The shipped case is shown as text, so it holds no markup, no tabs and no carriage returns.

    What it quotes stands as it is found.
    """
    text = SHIPPED.read_text(encoding="utf-8")
    for quote in load_case(SHIPPED).quotes:
        text = text.replace(quote.text, "")
    assert [mark for mark in ("`", "**", "</", "](", "\t", "\r") if mark in text] == []


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        ("claims.0.because", ..., "this key to be given", "nothing"),
        ("claims.0.grade", None, "this key to be given", "nothing"),
        ("claims.0.would_change", " ", "a text that is not blank", "' '"),
        ("claims.0.section", None, "a valid string", "None"),
        ("claims.0.verdict", "holds", "'stands in part'", "'holds'"),
        ("claims.0.finding", "It is so.", "one of id, section, text, verdict", "another key"),
        ("claims.0.claim", "It is so.", "a known key", "an unknown key"),
        ("timeline.0.test", {"asks": "a", "verdict": "v"}, "one of when, text", "another key"),
        ("observations.0.kind", "technical", "one of working, failing, red flag", "'technical'"),
        ("lessons.0.kind", "working", "one of technical, process", "'working'"),
        ("practice.actions.0.decided_by", ..., "this key to be given", "nothing"),
        ("practice.impact", ..., "this key to be given", "nothing"),
        ("practice.trigger", [], "at least 1 item", "[]"),
        ("practice.luck", [], "a known key", "an unknown key"),
    ],
)
def test_an_item_of_another_form_is_explained(tmp_path, key, value, expected, found):
    """What a section needs, forbids or does not know is said by section, item and field."""
    error = refuse(write_with(tmp_path, split_key(key), value))
    assert error.subject.endswith(f"key `{key}`")
    assert expected in error.expected
    assert found in error.found


@pytest.mark.parametrize("section", ["observations", "claims", "hypotheses", "practice.actions"])
def test_a_repeated_id_is_named(tmp_path, section):
    """Two items of one section with the same id are refused."""
    place = SMALL
    for part in section.split("."):
        place = place[part]
    error = refuse(write_with(tmp_path, split_key(section), place * 2))
    assert error.subject.endswith(f"key `{section}`")
    assert error.found == f"{place[0]['id']!r} twice"


def test_what_may_be_left_out(tmp_path):
    """A case without narrative, practice and forensics loads, with the defaults of the rest."""
    kept = ("case_version", "name", "title", "symptom", "context", "systems", "prompts", "attempts")
    bare = {key: SMALL[key] for key in (*kept, "profiles")}
    case = load_case(write_text(tmp_path, yaml.safe_dump(bare)))
    assert (case.practice, case.forensics) == (None, None)
    assert case.sections == {section: [] for section in FORMS}


def test_unknown_profile_lists_the_known(case):
    """Asking for a profile that is not there names those that are."""
    with pytest.raises(CaseError, match="embedded, smollm2, qwen-coder, qwen"):
        case.profile("none")


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        ("attempts.v2.rows", "10", "a valid integer", "'10'"),
        ("attempts.v2.rows", 0, "greater than or equal to 1", "0"),
        ("attempts.v2.reported_value", float("nan"), "a finite number", "nan"),
        ("hypotheses.0.initial", 180, "less than or equal to 100", "180"),
        ("hypotheses.0.grade", "hearsay", "'recollection'", "'hearsay'"),
        ("hypotheses.0.id", "a1", "[A-Z]", "'a1'"),
        ("prompts.v2.chat", "yes", "a valid boolean", "'yes'"),
        ("case_version", 2, "1", "2"),
        ("title", None, "a valid string", "None"),
        ("symptom", ..., "this key to be given", "nothing"),
        ("claims", {}, "a valid list", "{}"),
        ("profiles.embedded.sede", 1, "a known key", "an unknown key"),
        ("attempts.v2.prompt", "other", "one of v2", "'other'"),
        ("forensics.labels.values", [0], "10 values, as many as row_ids", "1"),
        ("forensics.labels.values.1", 2, "less than or equal to 1", "2"),
        ("forensics.labels.values.1", True, "a valid integer", "True"),
        ("forensics.submitted.values.1", 1.5, "less than or equal to 1", "1.5"),
        ("forensics.prompt_tokens.values", [], "at least 1 item", "[]"),
        ("forensics.row_ids.values", ["1"] * 10, "distinct ids", "['1', '1'"),
        ("forensics.row_ids.values", ["\u202e\n"] * 10, "distinct ids", r"'\u202e\n'"),
        ("forensics.log.ticks", [3.0, 4.0], "11 times", "2"),
        ("forensics.log.ticks", [3.0] * 11, "times that rise", "[3.0, 3.0"),
        ("forensics.log.ticks.0", -3.0, "greater than or equal to 0", "-3.0"),
        ("forensics.log.ticks.0", float("nan"), "finite", "nan"),
        ("forensics.log.loading", [3.0, 2.0], "times that rise", "[3.0, 2.0]"),
        ("forensics.log.loading", [3.0], "at least 2 items", "[3.0]"),
        ("forensics.log.epoch", 1e18, "less than or equal to", "1e+18"),
        ("forensics.attempt", "second", "one of v2", "'second'"),
        ("forensics.ignored_flags", "flags", "one of ignored-flags", "'flags'"),
        ("forensics.faults.0.message", "flags", "one of ignored-flags", "'flags'"),
        ("forensics.faults.0.hypothesis", "B", "one of A1", "'B'"),
        ("forensics.claimed_date.day", "2024-13-01", "date", "'2024-13-01'"),
        ("forensics.good_score.auc", 1.0, "less than 1", "1.0"),
    ],
)
def test_bad_value_is_explained(tmp_path, key, value, expected, found):
    """A bad value is refused with its key, what was expected and what was found."""
    error = refuse(write_with(tmp_path, split_key(key), value))
    assert f"key `{key}`" in error.subject
    assert expected in error.expected
    assert found in error.found


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


DOUBLED = ", ".join(["&a0 [x, x]", *(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("title: again", "the key 'title' stands twice"),
        ("pages: 0x" + "f" * 5000, "a number too long to print"),
        (f"pages: [{DOUBLED}]", "..."),
        ('"\\ud800": 1', "invalid Unicode"),
    ],
    ids=lambda text: text[:20],
)
def test_what_cannot_be_shown_whole_is_told_in_a_line(tmp_path, more, told):
    """A repeated key, a huge number, an alias bomb and a half character are told in short."""
    error = refuse(write_text(tmp_path, yaml.safe_dump(SMALL) + more + "\n"))
    assert told in f"{error.subject} {error.found}"
    assert len(error.found) <= 120
    str(error).encode("utf-8")


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
    assert not mark.exists()


@pytest.mark.parametrize("text", ["", "# a comment only\n", "---\n"])
def test_empty_file_is_explained(tmp_path, text):
    """An empty file is told from a mapping."""
    error = refuse(write_text(tmp_path, text))
    assert error.subject.endswith("the top level")
    assert (error.expected, error.found) == ("a mapping of keys to values", "None")


def test_what_is_no_text_file_is_named(tmp_path):
    """A file that is not there, a folder and another encoding are refused by name."""
    missing = refuse(tmp_path / "none.yml")
    assert (missing.expected, missing.found) == ("a case file", "no such file")
    assert "cases/qwen-lora.yml" in missing.remedy
    assert refuse(tmp_path).expected == "a readable UTF-8 file"
    (tmp_path / "latin.yml").write_bytes("title: Übersicht".encode("latin-1"))
    assert "utf-8" in refuse(tmp_path / "latin.yml").found


def test_the_digest_follows_what_can_change_a_number(case):
    """A prompt, the filter's limits and a fact of the log count in the digest; prose does not."""
    before = case_digest(case)
    v1 = case.prompts["v1"].model_copy(update={"template": V1 + " "})
    limits = case.adapter_filter.model_copy(update={"std_above": 0.01})
    facts = case.forensics.model_copy(update={"ignored_flags": "size-mismatch"})
    for update in (
        {"prompts": {**case.prompts, "v1": v1}},
        {"adapter_filter": limits},
        {"forensics": facts},
    ):
        assert case_digest(case.model_copy(update=update)) != before
    reworded = case.model_copy(update={"claims": [], "practice": None, "title": "Another"})
    assert case_digest(reworded) == before


def test_what_a_diagnosis_reads_makes_no_kept_run_stale(case):
    """What is observed and which causes a hypothesis has count in the evidence's digest alone."""
    moved = case.hypotheses[0].model_copy(update={"causes": []})
    for update in ({"observed": []}, {"hypotheses": [moved, *case.hypotheses[1:]]}):
        other = case.model_copy(update=update)
        assert case_digest(other) == case_digest(case)
        assert evidence_digest(other) != evidence_digest(case)
    reworded = case.hypotheses[0].model_copy(update={"because": "Another."})
    other = case.model_copy(update={"hypotheses": [reworded, *case.hypotheses[1:]]})
    assert evidence_digest(other) == evidence_digest(case)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCALARS, inner, max_size=4),
    max_leaves=12,
)
PLACES = st.sampled_from(
    [
        *SMALL,
        *(f"forensics.{key}" for key in SMALL["forensics"]),
        "systems.base.config",
        "prompts.v2.template",
        "attempts.v2.rows",
        "attempts.v2.decoding",
        "hypotheses.0",
        "claims.0",
        "claims.0.test",
        "practice.actions",
        "profiles.embedded.adapters",
        "forensics.log.ticks",
        "forensics.faults.0",
        "unknown",
    ]
).map(split_key)


def is_case_or_clear_error(path):
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
