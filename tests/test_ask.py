import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from postmortem.experiments.ask import BASE, System, ask
from postmortem.experiments.controls import shuffle_posts
from postmortem.models.changes import CHANGES, NothingToChange, edit_tensors
from postmortem.models.loading import load_base
from postmortem.models.model_set import Member

SUSPECT = System("suspect", "suspect")
EMBEDDING = "base_model.model.model.embed_tokens.weight"


def copy_of(session, folder, change):
    """A copy of the suspect with its tensors changed."""
    shutil.copytree(session.world.path("suspect"), folder)
    edit_tensors(folder, change)
    return folder


def give(session, role, folder=None, reason="none here"):
    """Put a folder in the place of a role's, or take the role away."""
    member = Member(role=role, path=folder and str(folder), digest=None, reason=reason)
    members = session.world.members | {role: member}
    session.world = session.world.model_copy(update={"members": members})


@pytest.mark.parametrize("prompt", ["v2", "yes_no"])
def test_a_disabled_adapter_is_the_base_to_the_last_bit(session, prompt):
    """Under a disabled adapter every log-probability is the base's; switched on it is not."""
    alone = ask(session, BASE, prompt)
    off = ask(session, System("suspect_disabled", "suspect", off=True), prompt)
    on = ask(session, SUSPECT, prompt)
    assert np.array_equal(off.first_log_probs, alone.first_log_probs)
    assert np.array_equal(off.number_log_probs, alone.number_log_probs)
    assert not np.array_equal(on.first_log_probs, alone.first_log_probs)


def test_base_weights_in_a_file_do_not_reach_what_is_asked_next(session, tmp_path):
    """The base alone answers as before behind an adapter that has overwritten its weights."""
    weights = session.base.model.get_input_embeddings().weight.detach()
    bringing = copy_of(
        session, tmp_path / "bringing", lambda t: t | {EMBEDDING: weights.roll(1, 0).contiguous()}
    )
    before = ask(session, BASE, "yes_no")
    changed = ask(session, System("bringing", bringing, off=True), "yes_no")
    after = ask(session, BASE, "yes_no")
    assert not np.array_equal(changed.first_log_probs, before.first_log_probs)
    assert np.array_equal(after.first_log_probs, before.first_log_probs)


def test_base_weights_in_a_file_are_seen_below_the_adapted_layers(session, tmp_path):
    """What lower layers computed of the base alone is not taken for that of a changed base."""
    upper = tmp_path / "upper"
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    adapted = get_peft_model(load_base(session.world.path("base"), device="cpu").model, config)
    adapted.save_pretrained(upper)
    for role in ("suspect", "reference", "no_op", "donor_adapter"):
        give(session, role, upper)
    assert session.shared.depth == 1
    alone = ask(session, BASE, "yes_no")
    weights = session.base.model.get_input_embeddings().weight.detach().roll(1, 0).contiguous()
    edit_tensors(upper, lambda t: t | {EMBEDDING: weights})
    off = ask(session, System("suspect_disabled", "suspect", off=True), "yes_no")
    base = load_base(session.world.path("base"), device="cpu")
    base.model.get_input_embeddings().weight.data.copy_(weights)
    changed = ask(session, System("changed", base=base), "yes_no")
    assert not np.allclose(off.first_log_probs, alone.first_log_probs, atol=1e-3)
    assert np.allclose(off.first_log_probs, changed.first_log_probs, atol=1e-5)


def test_an_adapter_that_does_not_load_is_a_finding(session, tmp_path):
    """Where PEFT refuses an adapter its answers are missing with PEFT's reason, and no folder."""
    wide = copy_of(
        session, tmp_path / "wide", lambda t: {k: torch.cat([v, v], 1) for k, v in t.items()}
    )
    answers = ask(session, System("suspect", wide), "v2")
    assert "tensor(s) do not fit" in answers.missing
    assert "lora_A.default.weight is (" in answers.missing
    assert str(tmp_path) not in answers.missing
    assert len(answers) == len(answers.table) == 0
    assert ask(session, BASE, "v2").missing == ""


def test_a_role_that_is_missing_answers_with_the_reason(session):
    """A role that these models lack gives no answers, and says why."""
    give(session, "reference", reason="this profile has none")
    assert ask(session, System("reference", "reference"), "v2").missing == "this profile has none"


def test_answers_that_are_not_finite_are_kept_and_lack_something(session, tmp_path):
    """An adapter of NaN weights has texts but no log-odds, and the reason counts the rows."""
    nan = copy_of(session, tmp_path / "nan", lambda t: {k: v * np.nan for k, v in t.items()})
    answers = ask(session, System("suspect", nan), "v2")
    assert answers.missing == ""
    assert answers.lacking == "log-odds that are not finite on 8 of 8 rows"


def test_an_altered_row_is_answered_in_its_place(session):
    """Answers to altered rows keep the ids, rules and truth of the rows that they stand for."""
    rows = shuffle_posts(session.rows, "body", seed=0)
    answers = ask(session, System("shuffled_base"), "v2", rows=rows)
    assert list(answers.table.index) == list(session.rows.ids)
    assert list(answers.labels) == list(session.rows.labels)
    assert all(record.kind == "timing" for record in session.records)


def test_a_changed_copy_moves_the_base_as_its_change_says(session):
    """With lora_B zero the base is left as it is, and the suspect itself is never touched."""
    alone, suspect = ask(session, BASE, "yes_no"), ask(session, SUSPECT, "yes_no")
    zero = ask(session, System("zero", "suspect", change="zero_b"), "yes_no")
    assert np.allclose(zero.first_log_probs, alone.first_log_probs, atol=1e-6)
    again = ask(session, System("again", "suspect"), "yes_no")
    assert np.array_equal(again.first_log_probs, suspect.first_log_probs)


TENSORS = {
    f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": torch.full(
        (2, 2), float(layer + 1)
    )
    for layer in range(3)
    for part in "AB"
}


@pytest.mark.parametrize(
    ("name", "factor"), [("zero_b", 0), ("flipped", -1), ("eighth", 1 / 8), ("eightfold", 8)]
)
def test_a_copy_differs_in_lora_b_alone(name, factor):
    """A scaled copy has its lora_B multiplied and all else as it was."""
    for key, tensor in CHANGES[name](TENSORS).items():
        assert torch.equal(tensor, TENSORS[key] * (factor if "lora_B" in key else 1))


def test_shifted_layers_stand_in_the_next_place():
    """Each layer holds what the one before it held, the first the last; odd shapes stay."""
    odd = {f"model.layers.{n}.v.lora_B.weight": torch.zeros(n + 1, 1) for n in range(2)}
    shifted = CHANGES["shifted"]({**TENSORS, **odd, "score.weight": torch.ones(1)})
    for name in TENSORS:
        layer = int(name.split(".")[4])
        assert shifted[name][0, 0] == (layer - 1) % 3 + 1
    assert all(shifted[name].shape == tensor.shape for name, tensor in odd.items())


def test_one_layer_cannot_be_shifted():
    """Where one layer is adapted a shift changes nothing, which is said."""
    one = {name: tensor for name, tensor in TENSORS.items() if ".layers.0." in name}
    with pytest.raises(NothingToChange, match="one layer alone"):
        CHANGES["shifted"](one)
