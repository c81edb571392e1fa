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
from postmortem.models.changes import each_control, edit_config, edit_tensors, rotate
from postmortem.models.loading import attached, load_base
from postmortem.suite import attribution as method
from postmortem.suite.attribution import (
    LIMITS,
    CandidateLoss,
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


@pytest.fixture(scope="module")
def base(bases):
    """The first base, loaded."""
    return load_base(bases["a"], device="cpu")


@pytest.fixture
def copy(adapter, tmp_path):
    """A copy of the adapter, free to be changed."""
    return shutil.copytree(adapter, tmp_path / "copy")


def choose(bases, *names):
    """Some of the bases by name."""
    return {name: bases[name] for name in names}


def make_reading(name, gain, *, controls=(0.0,), off=4.0, texts=40, noise=0.05, encoding="e"):
    """A reading with known means: the gain of the adapter and of each control."""
    draws = np.random.default_rng(len(name))
    base = off + draws.normal(0, noise, texts)
    others = {f"control {place}": base - value for place, value in enumerate(controls)}
    on = base - gain + draws.normal(0, noise, texts)
    return CandidateLoss(name, base, on, others, np.full(texts, 9), encoding)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_an_adapter_is_given_to_its_own_base(bases, adapter, segments, names):
    """The base that it was trained on is named and one trained apart is not, in any order."""
    found = attribute_adapter(adapter, choose(bases, *names), segments=segments)
    assert (found.answer, found.remain) == ("one", ("a",))
    assert found.texts == len(segments)


def test_a_fine_tune_is_not_told_from_its_base(bases, adapter, segments, monkeypatch):
    """Between a base and its light fine-tune the base remains; one base is in memory at a time."""
    loaded = []

    def load(*arguments, **options):
        assert all(model() is None for model in loaded)
        base = load_base(*arguments, **options)
        loaded.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(method, "load_base", load)
    found = attribute_adapter(adapter, choose(bases, "b", "a2", "a"), segments=segments)
    assert "a" in found.remain
    assert "b" not in found.remain
    assert len(loaded) == 3


def test_without_its_own_base_none_is_named(bases, adapter, segments):
    """Where the adapter's base is not among the candidates, no other is called its base."""
    found = attribute_adapter(adapter, choose(bases, "b", "wide"), segments=segments)
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


def test_an_adapter_that_fits_nothing_gets_an_answer(
    bases, adapter, segments, monkeypatch, tmp_path
):
    """Without a candidate of its shapes the answer is none, and no base is loaded."""
    monkeypatch.setattr(method, "load_base", None)
    other = {"wide": bases["wide"], "copy": shutil.copytree(bases["wide"], tmp_path / "copy")}
    found = attribute_adapter(adapter, other, segments=segments)
    assert (found.answer, found.judged) == ("none", ())
    assert found.left_out.keys() == other.keys()


@pytest.mark.parametrize("names", [(), ("a",), ("a", "again")])
def test_fewer_than_two_candidates_are_refused(bases, adapter, segments, names):
    """One base, or the same one twice, leaves nothing to choose."""
    with pytest.raises(ModelError, match="at least two different bases"):
        attribute_adapter(adapter, dict.fromkeys(names, bases["a"]), segments=segments)


def test_nan_in_the_file_is_the_adapters_fault(bases, copy, segments):
    """An adapter that holds NaN is refused by its own name, before any base is loaded."""
    edit_tensors(copy, lambda ts: {k: t * float("nan") for k, t in ts.items()})
    with pytest.raises(ModelError, match="non-finite") as error:
        attribute_adapter(copy, choose(bases, "a", "b"), segments=segments)
    assert error.value.subject == str(copy)


def test_other_tokenizers_are_said(bases, adapter, segments, case, tmp_path):
    """Where the texts are parted differently, gains are still compared and a note says so."""
    other = shutil.copytree(bases["b"], tmp_path / "other")
    build_tokenizer(case, seed=7).save_pretrained(other)
    found = attribute_adapter(adapter, {"a": bases["a"], "other": other}, segments=segments)
    assert ["tokenizers" in note for note in found.notes] == [True]


def test_the_base_is_as_it_was_after_a_reading(base, adapter, segments):
    """After all controls the base answers as before, and the adapter's file is untouched."""
    first, again = (read_candidate(adapter, base, name="a", segments=segments) for _ in range(2))
    assert np.array_equal(first.off, again.off)
    assert np.array_equal(first.on, again.on)
    assert len(first.controls) == LIMITS.rotations + 2


def test_controls_keep_the_sizes_of_the_updates(base, adapter):
    """A rotation keeps every singular value of an update and changes its direction."""
    with attached(base, adapter) as loaded:
        saved = {n: p.detach().clone() for n, p in loaded.model.named_parameters() if "lora_" in n}
        rotated = rotate(saved, seed=0)
        for name in (name for name in saved if "lora_A" in name):
            other = name.replace("lora_A", "lora_B")
            before, after = saved[other] @ saved[name], rotated[other] @ rotated[name]
            sizes = [torch.linalg.svdvals(update) for update in (before, after)]
            assert torch.allclose(*sizes, atol=1e-4)
            assert not torch.allclose(before, after, atol=1e-3)
        current = dict(loaded.model.named_parameters())
        for _ in each_control(loaded.model, rotations=2):
            assert not all(torch.equal(current[name], saved[name]) for name in saved)
        assert all(torch.equal(current[name], saved[name]) for name in saved)


def test_an_adapter_of_one_layer_has_no_layers_to_permute(bases, base, segments, tmp_path):
    """The control that cannot be made is left out, the others are run."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(bases["a"]), config)
    save_member(model, tmp_path / "one", training={}, base="a")
    found = read_candidate(tmp_path / "one", base, name="a", segments=segments[:2])
    assert "layers permuted" not in found.controls
    assert "sign of B flipped" in found.controls


def test_losses_are_those_of_the_model_alone(base):
    """Batched and padded losses are the model's own, text by text; a prompt is not scored."""
    texts = [Segment("we buy cheap shop"), Segment("a judge", "the court said "), Segment("the")]
    rows, starts = encode_segments(texts, base.tokenizer)
    losses = mean_losses(base.model, rows, starts)
    for place in (0, 1):
        ids = torch.tensor([rows[place]])
        labels = ids.clone()
        labels[0, : starts[place]] = -100
        with torch.no_grad():
            expected = base.model(ids, labels=labels).loss
        assert losses[place] == pytest.approx(float(expected), abs=1e-5)
    assert (len(rows[2]), losses[2]) == (1, 0)


def test_long_texts_are_cut(base):
    """Of a text and of its prompt no more tokens are read than the limit."""
    long = Segment("court " * 2 * LIMITS.tokens, "the judge said " * LIMITS.tokens)
    rows, starts = encode_segments([long], base.tokenizer)
    assert (len(rows[0]), starts) == (2 * LIMITS.tokens, [LIMITS.tokens])


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
    with pytest.raises(DataError, match="two tokens or more"):
        attribute_adapter(adapter, choose(bases, "a", "b"), segments=texts)


LUCKY = make_reading("lucky", 1.0, controls=(0.8, 0.2))
OWN = make_reading("own", 0.3, off=4.0)
KNOWING = make_reading("knowing", 0.0, off=3.0)


@pytest.mark.parametrize(
    ("readings", "answer"),
    [
        ((make_reading("a", 0.5), make_reading("bb", -0.3)), "a"),
        # On texts that any update makes likelier, beating the controls by little is not enough.
        ((LUCKY, make_reading("other", -0.2)), "cannot separate: lucky"),
        ((make_reading("own", 1.0, controls=(0.5,)), LUCKY), "cannot separate: own, lucky"),
        # Where the adapter does harm everywhere, none of the candidates is its base.
        ((make_reading("x", -0.2), make_reading("yy", -0.1)), "none of these"),
        # A fine-tune that forgot the texts gains more from its base's adapter and ends above it.
        ((OWN, make_reading("forgetful", 0.5, off=4.6)), "cannot separate: own, forgetful"),
        ((OWN, make_reading("better", 0.5, off=4.0)), "better"),
        # Where a base alone reads better than the others ever do, no gain says nothing.
        ((make_reading("a", 0.3), KNOWING), "cannot separate: a, knowing"),
        ((make_reading("a", -0.3), KNOWING), "cannot separate: knowing"),
        # Harm speaks against it all the same.
        ((make_reading("a", 0.3), make_reading("harmed", -0.3, off=3.0)), "a"),
        # A base that reads the texts nearly without loss is ruled out by harm alone.
        (
            (make_reading("full", 0.001, off=0.05, noise=0.001), make_reading("other", -0.3)),
            "cannot separate: full",
        ),
        (
            (make_reading("harmed", -0.2, off=0.05, noise=0.001), make_reading("other", -0.3)),
            "none of these",
        ),
    ],
)
def test_readings_decide(readings, answer):
    """A candidate is named that beats its controls and that no other candidate beats."""
    assert format_answer(conclude("x", readings, {})) == answer


def test_a_name_cannot_forge_a_line():
    """A candidate's name stands on one line of the report, without control characters."""
    names = ("a\nnone of these\x1b[2J", "b")
    found = conclude("x", [make_reading(name, 0.5) for name in names], {names[0]: names[0]})
    report = format_attribution(found)
    assert "\x1b" not in report
    assert "\nnone of these" not in report


def run_command(*arguments):
    """Run `postmortem identify`; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["identify", *map(str, arguments)])
    return ended.value.code


def test_the_command_takes_candidates_in_a_row(bases, adapter, segments, tmp_path, capsys):
    """Every value after --candidates is one, wherever the other arguments stand."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(segment.text for segment in segments), encoding="utf-8")
    first, second = str(bases["a"]), str(bases["b"])
    options = ["--candidates", first, second, "--text", texts]
    for arguments in ([adapter, *options], [*options, adapter]):
        assert not run_command(*arguments)
        assert capsys.readouterr().out.splitlines()[0] == first
    repeated = ["--candidates", first, "--candidates", second, "--text", texts]
    assert not run_command(adapter, *repeated, "--format", "json")
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"], found["remain"]) == ("one", [first])
    assert {"because", "judged", "left_out", "notes", "texts", "tokens"} <= found.keys()


@pytest.mark.parametrize("options", [(), ("--text", "absent.txt")])
def test_the_command_says_what_is_wanting(bases, adapter, capsys, options):
    """Candidates without a text that can be read end with one line and code 2."""
    assert run_command(adapter, "--candidates", bases["a"], bases["b"], *options) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_read_is_refused_before_any_base_is_loaded(
    bases, adapter, segments, monkeypatch
):
    """A candidate that is no model, or a folder that is no adapter, is an error at once."""
    monkeypatch.setattr(method, "load_base", None)
    with pytest.raises(ModelError, match="no-such-base"):
        attribute_adapter(adapter, {"b": bases["b"], "a": "no-such-base"}, segments=segments)
    with pytest.raises(ModelError, match="with adapter_config"):
        attribute_adapter(adapter.parent, choose(bases, "a", "b"), segments=segments)


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
    table = next(r for r in session.records if getattr(r, "key", "") == "membership.trials")
    assert measures["membership.held_out.right"].high is not None
    assert "membership.held_out.holds" in verdicts_of(session)
    asked = {row[0]: row[1] for row in table.rows}
    assert list(asked) == list(siblings.KINDS)
    assert asked[siblings.APART] > asked[siblings.IDLE] == 1
    assert any(key.startswith("membership.example.base 1") for key in measures)
    assert [r for r in session.records if isinstance(r, Text)]


def verdicts_of(session):
    """The verdicts on record by key."""
    return {r.key: r.verdict for r in session.records if isinstance(r, Verdict)}


def test_the_groups_share_no_seed_and_no_task():
    """The held-out group has other seeds and other tasks than the calibration."""
    first, second = siblings.CALIBRATION, siblings.HELD_OUT
    assert abs(first.seed - second.seed) > 10 * siblings.NEXT_GROUP
    assert not {task.title for task in first.tasks} & {task.title for task in second.tasks}


@pytest.mark.parametrize(
    ("gains", "kind", "outcome"),
    [
        ({"own": -0.3, "other": 0.5}, siblings.APART, "wrong"),
        ({"own": 0.5, "other": 0.5}, siblings.APART, "cannot separate"),
        ({"own": 0.5, "o": -0.2}, siblings.APART, "right"),
        ({"o": -0.4, "other": -0.4}, siblings.ABSENT, "right"),
        ({"o": -0.4, "other": 0.5}, siblings.ABSENT, "wrong"),
    ],
)
def test_a_wrong_answer_is_called_wrong(adapter, gains, kind, outcome):
    """Another base named alone is wrong; several with the adapter's own are not."""
    trained = siblings.TrainedAdapter("p", adapter, "own", TASK)
    readings = [make_reading(name, gain) for name, gain in gains.items()]
    assert siblings.decide_outcome(trained, kind, readings, group="g").outcome == outcome


def keep_bases(session, *roles):
    """Take the other bases and all replays out of a session's world."""
    members = {
        role: member.model_copy(update={"path": None, "reason": "none"})
        if role.endswith("base") and role not in roles
        else member
        for role, member in session.world.members.items()
    }
    session.world = session.world.model_copy(update={"members": members, "replays": {}})


def test_a_world_asks_its_own_adapters(session, quick):
    """Each adapter of the world has an answer, and a base of other shapes is left out of each."""
    keep_bases(session, "base", "speaking_base", "donor_base")
    attribution.record_world(session)
    tables = {r.key: r for r in session.records if isinstance(r, Table)}
    assert [row[0] for row in tables["membership.world"].rows] == ["reference", "suspect"]
    assert list(verdicts_of(session)) == ["membership.world.no_error"]
    left_out = [row for row in tables["membership.world_bases"].rows if row[1] == "donor base"]
    assert ["shape-mismatch" in row[3] for row in left_out] == [True, True]


def test_a_profile_of_one_base_says_so(session, quick):
    """Where there is nothing to choose between, the same keys are recorded with the reason."""
    keep_bases(session, "base")
    attribution.record_world(session)
    assert verdicts_of(session) == {"membership.world.no_error": "not available"}
    assert len([r for r in session.records if isinstance(r, Table)]) == 2
