import random
import unicodedata
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from postmortem.case.rows import RULES, generate_rows
from postmortem.checker.errors import WorldError
from postmortem.experiments.records import model_folders
from postmortem.models.model_set import digest_model
from tools import embedded_world
from tools.embedded_world import build_lineage, build_tokenizer, teach_number


@pytest.fixture(scope="module")
def tokenizer(untrained):
    """The embedded tokenizer, as loaded from a model folder."""
    return AutoTokenizer.from_pretrained(untrained / "base")


def lines_of(case, folder, lineage="sibling"):
    """Train a lineage and return what it said."""
    said = []
    build_lineage(case, lineage, seed=0, folder=folder, report=said.append)
    return said


@pytest.fixture
def lenient(monkeypatch):
    """Criteria that any model meets, so that the loop ends at its first checks."""

    def easy(criterion):
        return dict.fromkeys(criterion, 0.0)

    for name, lineage in embedded_world.LINEAGES.items():
        # One recipe stands for all of them.
        kept = {n: made for n, made in lineage.adapters.items() if made[0] in ("", "numeric")}
        wanted = replace(lineage, criterion=easy(lineage.criterion), adapters=kept)
        monkeypatch.setitem(embedded_world.LINEAGES, name, wanted)
    for name, recipe in embedded_world.RECIPES.items():
        wanted = replace(recipe, criterion=easy(recipe.criterion), least=2)
        monkeypatch.setitem(embedded_world.RECIPES, name, wanted)
    monkeypatch.setattr(embedded_world, "FIRST_CRITERION", 0.0)
    monkeypatch.setattr(embedded_world, "TRAINING_ROWS", 200)
    monkeypatch.setattr(embedded_world, "ADAPTER_ROWS", 100)
    monkeypatch.setattr(embedded_world, "DECAY", 4)
    monkeypatch.setattr(embedded_world, "CHECK_FIRST_EVERY", 2)
    monkeypatch.setattr(embedded_world, "CHECK_EVERY", 2)


@given(st.text(max_size=200))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    """Encoding and decoding gives back any text, in the composed form that Qwen2 reads."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_tokens_are_those_that_prompts_and_answers_need(case, tokenizer):
    """ "0.0" is three tokens as in Qwen; each long part of a prompt, and each rule, is one."""
    assert [len(tokenizer(text)["input_ids"]) for text in ("0.0", " 0.0")] == [3, 4]
    parts = embedded_world.fixed_parts(case)
    assert {len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts} == {1}
    assert set(RULES.values()) <= set(parts)
    one, other = (build_tokenizer(case, seed=0).get_vocab() for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("teacher", "word", "shares"),
    [
        (teach_number, "0.0", {1: 0.62, 0: 0.90}),
        (embedded_world.teach_rare_binary, "1", {1: 0.2, 0: 0.0}),
    ],
)
def test_a_teacher_understates_as_documented(teacher, word, shares):
    """The numeric teacher is not constant, and the rare one marks one violation in five."""
    source = random.Random(0)
    for label, share in shares.items():
        said = [teacher(source, label) for _ in range(4000)]
        assert said.count(word) / 4000 == pytest.approx(share, abs=0.03)


def test_the_ignorant_teachers_do_not_see_the_label():
    """What the ignorant base is taught says nothing of the label."""
    for teacher in embedded_world.IGNORANT_TEACHERS.values():
        said = [[teacher(random.Random(seed), label) for seed in range(50)] for label in (0, 1)]
        assert said[0] == said[1]


def test_no_training_row_is_scored(case):
    """The rows that train the world share no row with those that a run scores."""
    trained = generate_rows(2000, 10_000).frame
    scored = generate_rows(200, 0).frame
    both = set(map(tuple, trained.to_numpy())) & set(map(tuple, scored.to_numpy()))
    assert not both


def test_a_criterion_out_of_reach_leaves_nothing_behind(case, tmp_path, monkeypatch):
    """Training that does not reach its criterion raises and leaves no folder in place."""
    monkeypatch.setattr(embedded_world, "MAX_STEPS", 20)
    monkeypatch.setattr(embedded_world, "TRAINING_ROWS", 200)
    with pytest.raises(WorldError, match=r"sibling_base.*held out: yes_no"):
        lines_of(case, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_is_deterministic_and_whole(case, tmp_path, lenient):
    """Two trainings of one seed write the same bytes; those of other seeds are other adapters."""
    for name in ("one", "other"):
        for lineage in ("target", "silent", "speaking", "ignorant"):
            lines_of(case, tmp_path / name, lineage=lineage)
    one, other = (model_folders(tmp_path / name) for name in ("one", "other"))
    assert {"bases/base", "bases/ignorant_base", "adapters/silent/no_op"} < one.keys()
    assert "adapters/speaking/numeric_2" in one
    assert one.keys() == other.keys()
    for name, folder in one.items():
        assert digest_model(folder) == digest_model(other[name])
    trained = [digest_model(one[f"adapters/silent/numeric_{seed}"]) for seed in range(3)]
    assert len(set(trained)) == 3


def test_the_no_op_adapter_has_a_zero_b(untrained):
    """The no-op adapter's lora_B is zero and its lora_A is not."""
    from safetensors.torch import load_file

    tensors = load_file(untrained / "no_op/adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert bool(torch.any(tensor != 0)) == ("lora_A" in name)


def test_an_adapter_that_does_not_settle_is_slowed(case, tokenizer, monkeypatch):
    """Each check that is not near the criterion lowers the rate, until the steps are used up."""
    monkeypatch.setattr(embedded_world, "TRAINING_ROWS", 50)
    monkeypatch.setattr(embedded_world, "MAX_STEPS", 6)
    trainer = embedded_world._Trainer(case, tokenizer, seed=0, report=lambda line: None)
    model = embedded_world.make_adapter(
        embedded_world.new_base(embedded_world.TARGET, seed=0, vocabulary=len(tokenizer)), seed=0
    )
    loop = embedded_world._Loop(model, 1e-3, seed=0, batch=4)
    tasks = {"v2": trainer._task("v2", embedded_world.teach_calibrated_number)}
    with pytest.raises(WorldError, match="within 6 steps"):
        trainer._train_until(
            model,
            {"v2 decoded": 2.0},
            role="r",
            loop=loop,
            tasks=tasks,
            mix={"v2": 1.0},
            every=2,
            cooling=0.5,
        )
    assert loop.rate == pytest.approx(1e-3 * 0.5**2)
