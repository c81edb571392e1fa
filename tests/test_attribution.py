import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from postmortem.checker.errors import DataError, ModelError
from postmortem.cli import main
from postmortem.experiments.records import Measure, Table, Text, Verdict
from postmortem.models.changes import (
    each_control,
    edit_config,
    edit_tensors,
    rotate,
)
from postmortem.models.loading import attached, load_base
from postmortem.suite.attribution import (
    LIMITS,
    Reading,
    Segment,
    attribute_adapter,
    conclude,
    encode_segments,
    format_answer,
    format_attribution,
    mean_losses,
    read_candidate,
    read_texts,
)
from tools import attribution, siblings
from tools.embedded_world import BaseSpec, build_tokenizer, make_adapter, new_base, save_member
from tools.siblings import ADAPTING, FINE_TUNES, FROM_NOTHING, POSTS, Task, sort_words, train

TASK = Task("words sorted", sort_words)


def save_base(case, folder, *, seed, how=FROM_NOTHING, start=None, width=32):
    """A base trained on posts, from nothing or from another one."""
    tokenizer = build_tokenizer(case, seed=0)
    model = (
        Qwen2ForCausalLM.from_pretrained(start)
        if start
        else new_base(BaseSpec(width, 1, 0), seed=seed, vocabulary=len(tokenizer))
    )
    train(model, tokenizer, POSTS.texts(400, seed=seed), how=how, seed=seed)
    save_member(model, folder, training={}, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def bases(case, tmp_path_factory):
    """Two bases trained apart, a light fine-tune of the first, and one of another width."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bases")
    first = save_base(case, folder / "a", seed=1)
    return {
        "a": first,
        "b": save_base(case, folder / "b", seed=2),
        "a2": save_base(case, folder / "a2", seed=3, how=FINE_TUNES["light"], start=first),
        "wide": save_base(case, folder / "wide", seed=4, how=replace(ADAPTING, steps=1), width=48),
    }


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """An adapter trained on the first base."""
    model = make_adapter(Qwen2ForCausalLM.from_pretrained(bases["a"]), seed=5)
    tokenizer = AutoTokenizer.from_pretrained(bases["a"])
    train(model, tokenizer, TASK.texts(400, seed=5), how=ADAPTING, seed=5)
    folder = tmp_path_factory.mktemp("adapters") / "sound"
    save_member(model, folder, training={}, base="a")
    return folder


@pytest.fixture(scope="module")
def segments():
    """Fresh texts of the adapter's task."""
    return tuple(map(Segment, TASK.texts(24, seed=9)))


@pytest.fixture
def copy(adapter, tmp_path):
    """A copy of the adapter, free to be changed."""
    return shutil.copytree(adapter, tmp_path / "copy")


@pytest.fixture
def texts_file(segments, tmp_path):
    """The texts as a file, one a line."""
    path = tmp_path / "texts.txt"
    texts = [segment.text for segment in segments[: LIMITS.texts]]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def choose(bases, *names):
    """Some of the bases by name."""
    return {name: bases[name] for name in names}


def make_reading(name, gain, *, controls=(0.0,), off=4.0, texts=40, noise=0.05, encoding="e"):
    """A reading with known means: the gain of the adapter and of each control."""
    draws = np.random.default_rng(len(name))
    base = off + draws.normal(0, noise, texts)
    others = {f"control {place}": base - value for place, value in enumerate(controls)}
    on = base - gain + draws.normal(0, noise, texts)
    return Reading(name, base, on, others, np.full(texts, 9), encoding)


def test_the_home_is_told_from_a_base_trained_apart(bases, adapter, segments):
    """An adapter is given to the base that it was trained on, whatever the order."""
    for names in (("a", "b"), ("b", "a")):
        found = attribute_adapter(adapter, choose(bases, *names), segments=segments)
        assert (found.answer, found.remain) == ("one", ("a",))
        assert found.texts == len(segments)


def test_a_fine_tune_is_not_told_from_its_base(bases, adapter, segments):
    """Between a base and its light fine-tune the home remains, and a base apart does not."""
    found = attribute_adapter(adapter, choose(bases, "b", "a2", "a"), segments=segments)
    assert "a" in found.remain
    assert "b" not in found.remain


def test_without_its_home_nothing_is_named(bases, adapter, segments, case, tmp_path):
    """Where the adapter's base is not among the candidates, no single one is called its base."""
    other = save_base(case, tmp_path / "c", seed=6)
    found = attribute_adapter(adapter, {"b": bases["b"], "c": other}, segments=segments)
    assert found.answer != "one"


@pytest.mark.parametrize(
    "silence",
    [
        lambda folder: edit_config(folder, lora_alpha=0),
        lambda folder: edit_tensors(
            folder, lambda tensors: {k: t * ("lora_A" in k) for k, t in tensors.items()}
        ),
    ],
    ids=["alpha zero", "lora_B zero"],
)
def test_an_adapter_that_does_nothing_belongs_nowhere(bases, copy, segments, silence):
    """A scale of zero and a zero B are no misfits: no loss changes, and no candidate is named."""
    silence(copy)
    found = attribute_adapter(copy, choose(bases, "a", "b"), segments=segments)
    assert (found.answer, found.remain) == ("none", ())
    assert all(judged.gain.value == 0 for judged in found.judged)


def test_candidates_that_cannot_be_tried_are_left_out(bases, adapter, segments, tmp_path):
    """Other shapes and losses that are not finite take a candidate out, with the reason."""
    broken = shutil.copytree(bases["b"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    candidates = {"broken": broken, **choose(bases, "wide", "a")}
    found = attribute_adapter(adapter, candidates, segments=segments)
    assert found.remain == ("a",)
    assert list(found.left_out) == ["broken", "wide"]
    assert "not finite, adapter off" in found.left_out["broken"]
    assert "wide: left out, shape-mismatch" in format_attribution(found)


def test_an_adapter_that_fits_nothing_gets_an_answer(bases, adapter, segments, case, tmp_path):
    """Without a candidate of its shapes the answer is none, and no base is loaded."""
    other = {"wide": bases["wide"], "wider": tmp_path / "wider"}
    shutil.copytree(bases["wide"], other["wider"])
    found = attribute_adapter(adapter, other, segments=segments)
    assert (found.answer, found.judged) == ("none", ())
    assert found.left_out.keys() == other.keys()


@pytest.mark.parametrize("names", [(), ("a",)])
def test_fewer_than_two_candidates_are_refused(bases, adapter, segments, names):
    """One base, or the same one twice, leaves nothing to choose."""
    with pytest.raises(ModelError, match="at least two different bases"):
        attribute_adapter(adapter, choose(bases, *names), segments=segments)
    with pytest.raises(ModelError, match="at least two different bases"):
        attribute_adapter(adapter, {"a": bases["a"], "again": bases["a"]}, segments=segments)


def test_nan_in_the_file_is_the_adapters_fault(bases, copy, segments):
    """An adapter that holds NaN is refused by its own name, before any base is loaded."""
    edit_tensors(copy, lambda ts: {k: t * float("nan") for k, t in ts.items()})
    with pytest.raises(ModelError, match="non-finite") as error:
        attribute_adapter(copy, choose(bases, "a", "b"), segments=segments)
    assert error.value.subject == str(copy)


def test_other_tokenizers_are_said(bases, adapter, segments, case, tmp_path):
    """Where the texts are parted differently, gains are still compared and a note says so."""
    other = shutil.copytree(bases["b"], tmp_path / "other")
    build = build_tokenizer(case, seed=7)
    build.save_pretrained(other)
    found = attribute_adapter(adapter, {"a": bases["a"], "other": other}, segments=segments)
    assert len(found.notes) == 1
    assert "tokenizers" in found.notes[0]


def test_the_base_is_as_it_was_after_a_reading(bases, adapter, segments):
    """After all controls the base answers as before, and the adapter's file is untouched."""
    base = load_base(bases["a"], device="cpu")
    first = read_candidate(adapter, base, name="a", segments=segments)
    again = read_candidate(adapter, base, name="a", segments=segments)
    assert np.array_equal(first.off, again.off)
    assert np.array_equal(first.on, again.on)
    assert len(first.controls) == LIMITS.rotations + 2


def test_controls_keep_the_sizes_of_the_updates(bases, adapter):
    """A rotation keeps every singular value of an update and changes its direction."""
    base = load_base(bases["a"], device="cpu")
    with attached(base, adapter) as loaded:
        kept = {n: p.detach().clone() for n, p in loaded.model.named_parameters() if "lora_" in n}
        rotated = rotate(kept, seed=0)
        for name in (name for name in kept if "lora_A" in name):
            other = name.replace("lora_A", "lora_B")
            before, after = kept[other] @ kept[name], rotated[other] @ rotated[name]
            sizes = [torch.linalg.svdvals(update) for update in (before, after)]
            assert torch.allclose(*sizes, atol=1e-4)
            assert not torch.allclose(before, after, atol=1e-3)
        titles = []
        found = dict(loaded.model.named_parameters())
        for title in each_control(loaded.model, rotations=2):
            titles.append(title)
            assert not all(torch.equal(found[name], kept[name]) for name in kept)
        assert titles[:2] == ["layers permuted", "sign of B flipped"]
        assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_an_adapter_of_one_layer_has_no_layers_to_permute(bases, segments, tmp_path):
    """The control that cannot be made is left out, the others are run."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(bases["a"]), config)
    save_member(model, tmp_path / "one", training={}, base="a")
    base = load_base(bases["a"], device="cpu")
    found = read_candidate(tmp_path / "one", base, name="a", segments=segments[:2])
    assert "layers permuted" not in found.controls
    assert "sign of B flipped" in found.controls


def test_losses_are_those_of_the_model_alone(bases):
    """Batched and padded losses are the model's own, text by text; a prompt is not scored."""
    base = load_base(bases["a"], device="cpu")
    texts = [Segment("we buy cheap shop"), Segment("a judge", "the court said "), Segment("the")]
    rows, starts = encode_segments(texts, base.tokenizer)
    found = mean_losses(base.model, rows, starts)
    for place in (0, 1):
        ids = torch.tensor([rows[place]])
        labels = ids.clone()
        labels[0, : starts[place]] = -100
        with torch.no_grad():
            expected = base.model(ids, labels=labels).loss
        assert found[place] == pytest.approx(float(expected), abs=1e-5)
    assert len(rows[2]) > starts[2] or found[2] == 0


def test_long_texts_are_cut(bases):
    """Of a text and of its prompt no more tokens are read than the limit."""
    base = load_base(bases["a"], device="cpu")
    limits = replace(LIMITS, tokens=4)
    rows, starts = encode_segments(
        [Segment("court " * 50, "the judge said " * 9)], base.tokenizer, limits=limits
    )
    assert (len(rows[0]), starts) == (8, [4])


@pytest.mark.parametrize(
    ("content", "name", "first", "count"),
    [
        ("one\ntwo\n" * 10, "t.txt", "one", 20),
        ("one\ntwo\n\n" * 16, "t.txt", "one\ntwo", 16),
        ("one\r\ntwo\r\n\r\n" * 16, "t.txt", "one\ntwo", 16),
        ("naïve 中文 🦙 \u2028 e\u0301\n" * 16, "t.txt", "naïve 中文 🦙 \u2028 e\u0301", 16),
        ('{"text": "a\\u2028b", "prompt": "p"}\n\n' * 16, "t.jsonl", "a\u2028b", 16),
    ],
)
def test_texts_are_read(tmp_path, content, name, first, count):
    """Lines, paragraphs and JSON lines are texts; what only looks like a line end is kept."""
    (tmp_path / name).write_bytes(content.encode())
    found = read_texts(tmp_path / name)
    assert (found[0].text, len(found)) == (first, count)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "t.txt", "at least 16 texts"),
        (b" \n\n \n", "t.txt", "at least 16 texts"),
        (b"one\n" * 15, "t.txt", "found 15"),
        (b"\xff\xfe\x00", "t.txt", "UTF-8"),
        (b'{"text": 1}\n', "t.jsonl", "line 1"),
        (b'{"text": "a"}\n[]\n', "t.jsonl", "line 2"),
        (b"[" * 100_000, "t.jsonl", "line 1"),
    ],
)
def test_unusable_texts_are_refused(tmp_path, content, name, said):
    """An empty, short, undecodable or malformed file is named with what was expected."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        read_texts(tmp_path / name)
    assert name in str(error.value)
    with pytest.raises(DataError, match="UTF-8"):
        read_texts(tmp_path / "absent.txt")


def test_texts_of_one_token_do_not_count(bases, adapter):
    """Texts in which nothing is predicted are no evidence; too few others are refused."""
    texts = [Segment("the")] * 40 + [Segment("we buy cheap shop")] * (LIMITS.texts - 1)
    single = load_base(bases["a"], device="cpu").tokenizer("the")["input_ids"]
    assert len(single) == 1
    with pytest.raises(DataError, match="two tokens or more"):
        attribute_adapter(adapter, choose(bases, "a", "b"), segments=texts)


LUCKY = make_reading("lucky", 1.0, controls=(0.8, 0.2))
OWN = make_reading("own", 0.3, off=4.0)
KNOWING = make_reading("knowing", 0.0, off=3.0)


@pytest.mark.parametrize(
    ("readings", "answer", "remain"),
    [
        # On texts that any update makes likelier, beating the controls by little is not enough.
        ((LUCKY, make_reading("other", -0.2)), "cannot separate", ("lucky",)),
        ((make_reading("own", 1.0, controls=(0.5,)), LUCKY), "cannot separate", ("own", "lucky")),
        # Where the adapter does harm everywhere, none of the candidates is its base.
        ((make_reading("x", -0.2), make_reading("yy", -0.1)), "none", ()),
        # A fine-tune that forgot the texts gains more from its base's adapter and ends above it.
        (
            (OWN, make_reading("forgetful", 0.5, off=4.6)),
            "cannot separate",
            ("own", "forgetful"),
        ),
        ((OWN, make_reading("better", 0.5, off=4.0)), "one", ("better",)),
        # Where a base alone reads better than the others ever do, no gain says nothing.
        ((make_reading("a", 0.3), KNOWING), "cannot separate", ("a", "knowing")),
        ((make_reading("a", -0.3), KNOWING), "cannot separate", ("knowing",)),
        # Harm speaks against it all the same.
        ((make_reading("a", 0.3), make_reading("harmed", -0.3, off=3.0)), "one", ("a",)),
        # A base that reads the texts nearly without loss is ruled out by harm alone.
        (
            (make_reading("full", 0.001, off=0.05, noise=0.001), make_reading("other", -0.3)),
            "cannot separate",
            ("full",),
        ),
        (
            (make_reading("harmed", -0.2, off=0.05, noise=0.001), make_reading("other", -0.3)),
            "none",
            (),
        ),
    ],
)
def test_readings_decide(readings, answer, remain):
    """A candidate is named that beats its controls and that no other candidate beats."""
    found = conclude("x", readings, {})
    assert (found.answer, found.remain) == (answer, remain)


def test_the_command_takes_candidates_in_a_row(bases, adapter, texts_file, capsys):
    """Every value after --candidates is one, wherever the other arguments stand."""
    names = [str(bases["a"]), str(bases["b"])]
    options = ["--candidates", *names, "--text", str(texts_file)]
    for arguments in ([str(adapter), *options], [*options, str(adapter)]):
        with pytest.raises(SystemExit) as ended:
            main(["identify", *arguments])
        assert not ended.value.code
        assert capsys.readouterr().out.splitlines()[0] == names[0]
    repeated = ["--candidates", names[0], "--candidates", names[1], "--text", str(texts_file)]
    with pytest.raises(SystemExit) as ended:
        main(["identify", str(adapter), *repeated, "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert not ended.value.code
    assert (found["answer"], found["remain"]) == ("one", names[:1])
    assert {"because", "judged", "left_out", "notes", "texts", "tokens"} <= found.keys()


def test_the_command_says_what_is_wanting(bases, adapter, capsys):
    """Candidates without a text, and a base that is not there, end with one line and code 2."""
    names = [str(bases["a"]), str(bases["b"])]
    for options in (
        ["--candidates", *names],
        ["--candidates", *names, "--text", "absent.txt"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["identify", str(adapter), *options])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_misspelt_base_is_refused_before_any_is_loaded(bases, adapter, segments, monkeypatch):
    """A candidate that is no model is an error at once, not after the others' minutes."""
    monkeypatch.setattr("postmortem.suite.attribution.load_base", None)
    with pytest.raises(ModelError, match="no-such-base"):
        attribute_adapter(adapter, {"a": "no-such-base", **choose(bases, "b")}, segments=segments)
    edit = dict.fromkeys(("a", "b"), bases["a"])
    with pytest.raises(ModelError, match="with adapter_config"):
        attribute_adapter(adapter.parent, {**edit, "b": bases["b"]}, segments=segments)


def test_one_base_is_in_memory_at_a_time(bases, adapter, segments, monkeypatch):
    """A candidate's model is gone before the next one is loaded."""
    seen = []

    def load(*arguments, **options):
        assert all(model() is None for model in seen)
        loaded = load_base(*arguments, **options)
        seen.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr("postmortem.suite.attribution.load_base", load)
    attribute_adapter(adapter, choose(bases, "a", "b", "a2"), segments=segments)
    assert len(seen) == 3


def test_a_name_cannot_forge_a_line(bases, adapter, segments):
    """A candidate's name stands on one line of the report, without control characters."""
    names = {"a\nnone of these\x1b[2J": bases["a"], "b": bases["b"]}
    said = format_attribution(attribute_adapter(adapter, names, segments=segments))
    assert "\x1b" not in said
    assert "\nnone of these" not in said


@pytest.fixture
def quick(monkeypatch):
    """Siblings of a few steps: their records are what is tried, not what they show."""
    few = replace(FROM_NOTHING, steps=2)
    monkeypatch.setattr(siblings, "FROM_NOTHING", few)
    monkeypatch.setattr(siblings, "ADAPTING", few)
    monkeypatch.setattr(siblings, "FINE_TUNES", dict.fromkeys(FINE_TUNES, few))
    monkeypatch.setattr(siblings, "BASES", 2)
    monkeypatch.setattr(siblings, "TEXTS", 16)
    monkeypatch.setattr(siblings, "TRAINING_TEXTS", 64)
    monkeypatch.setattr(attribution, "WORLD_TEXTS", 16)


def test_the_notebook_records_the_held_out(session, quick):
    """The held-out have shares with intervals, a verdict and a row for each kind of question."""
    attribution.record_siblings(session)
    measures = {r.key: r for r in session.records if isinstance(r, Measure)}
    verdicts = {r.key for r in session.records if isinstance(r, Verdict)}
    table = next(r for r in session.records if getattr(r, "key", "") == "membership.trials")
    assert measures["membership.held_out.right"].high is not None
    assert "membership.held_out.holds" in verdicts
    assert len(table.rows) == len(siblings.KINDS)
    asked = {row[0]: row[1] for row in table.rows}
    assert asked[siblings.APART] > asked[siblings.IDLE] == 1
    assert any(key.startswith("membership.example.base 1") for key in measures)
    assert [r for r in session.records if isinstance(r, Text)]


def test_the_groups_share_no_seed_and_no_task():
    """The held-out group has other seeds and other tasks than the calibration."""
    first, second = siblings.CALIBRATION, siblings.HELD_OUT
    assert abs(first.seed - second.seed) > 10 * siblings.NEXT_GROUP
    assert not {task.title for task in first.tasks} & {task.title for task in second.tasks}


def test_a_wrong_answer_is_called_wrong(bases, adapter, segments):
    """A single other base is wrong, and so is a group without the home; a group with it is not."""
    pupil = siblings.Pupil("p", adapter, "own", TASK)
    own, other = make_reading("own", -0.3), make_reading("other", 0.5)
    both = make_reading("own", 0.5), make_reading("other", 0.5)
    ask = siblings._try_one
    outcomes = [
        ask("g", siblings.APART, pupil, readings=readings, limits=LIMITS).outcome
        for readings in ((own, other), both, (make_reading("own", 0.5), make_reading("o", -0.2)))
    ]
    assert outcomes == ["wrong", "cannot separate", "right"]
    absent = ask(
        "g", siblings.ABSENT, pupil, readings=(own, make_reading("o", -0.4)), limits=LIMITS
    )
    assert absent.outcome == "right"


def test_a_world_asks_its_own_adapters(session, quick):
    """Each adapter of the world has an answer, and a base of other shapes is left out of each."""
    members = {
        role: member
        if role in ("base", "speaking_base", "donor_base") or not role.endswith("base")
        else member.model_copy(update={"path": None, "reason": "none"})
        for role, member in session.world.members.items()
    }
    session.world = session.world.model_copy(update={"members": members, "replays": {}})
    attribution.record_world(session)
    tables = {r.key: r for r in session.records if isinstance(r, Table)}
    assert [row[0] for row in tables["membership.world"].rows] == ["reference", "suspect"]
    assert {"membership.world.no_error"} == {
        r.key for r in session.records if isinstance(r, Verdict)
    }
    left = [row for row in tables["membership.world_bases"].rows if row[1] == "donor base"]
    assert len(left) == 2
    assert all("shape-mismatch" in row[3] for row in left)


def test_a_profile_of_one_base_says_so(session, quick):
    """Where there is nothing to choose between, the same keys are recorded with the reason."""
    members = {
        role: member.model_copy(update={"path": None, "reason": "none"})
        if role.endswith("_base")
        else member
        for role, member in session.world.members.items()
    }
    session.world = session.world.model_copy(update={"members": members})
    attribution.record_world(session)
    verdict = next(r for r in session.records if isinstance(r, Verdict))
    assert verdict.verdict == "not available"
    assert len([r for r in session.records if isinstance(r, Table)]) == 2


def test_the_answer_is_said_in_words():
    """One base by its name, several as a group, none as such."""
    one = conclude("x", [make_reading("a", 0.5), make_reading("bb", -0.3)], {})
    assert format_answer(one) == "a"
    assert format_answer(replace(one, answer="none", remain=())) == "none of these"
    assert format_answer(replace(one, answer="cannot separate", remain=("a", "b"))) == (
        "cannot separate: a, b"
    )
