import pytest
import torch
from safetensors.torch import load_file

from postmortem.checker.errors import ModelError
from postmortem.models.loading import attached, load_base
from postmortem.models.mismatch import (
    build_on_meta,
    compare_shapes,
    refit_adapter,
    try_load,
    write_adapter,
)

MODULES = ("q_proj", "v_proj")


@pytest.mark.parametrize("donor", ["Qwen/Qwen3-4B", "Qwen/Qwen1.5-4B"])
def test_peft_refuses_each_tensor_of_a_4b_adapter(case, donor, tmp_path):
    """On Qwen2.5-1.5B, PEFT names all 112 tensors of a 4B adapter on q_proj and v_proj."""
    adapter = write_adapter(donor, tmp_path, rank=16, target_modules=MODULES)
    outcome = try_load(build_on_meta(case.true_size.base), adapter)
    assert outcome.mismatches == 112
    assert "torch.Size([16, 2560])" in outcome.first_mismatch
    assert "torch.Size([16, 1536])" in outcome.first_mismatch


def test_an_adapter_of_the_same_shapes_loads_in_silence(case, tmp_path):
    """The control: an adapter of the base's own shapes gives neither error nor warning."""
    adapter = write_adapter(case.true_size.base, tmp_path, rank=16, target_modules=MODULES)
    outcome = try_load(build_on_meta(case.true_size.base), adapter)
    assert (outcome.error, outcome.warnings, outcome.mismatches) == ("", (), 0)


@pytest.mark.parametrize("donor", ["Qwen/Qwen3-4B", "Qwen/Qwen1.5-4B"])
def test_no_tensor_of_a_4b_fits_by_chance(case, donor):
    """None of the fourteen tensors of a layer of a 4B adapter has the 1.5B's shape.

    With grouped-query attention lora_B of v_proj has 256 rows beside 1536 columns of lora_A.
    """
    pairs = {(pair.module, pair.tensor): pair for pair in compare_shapes(case.true_size, donor)}
    assert len(pairs) == 14
    assert not any(pair.fits for pair in pairs.values())
    assert pairs["self_attn.v_proj", "lora_A"].on_base == (16, 1536)
    assert pairs["self_attn.v_proj", "lora_B"].on_base == (256, 16)


def test_a_base_that_is_not_in_the_table_is_refused():
    """A base without known shapes is an error and never guessed."""
    with pytest.raises(ModelError, match="no such row"):
        build_on_meta("someone/unheard-of")


def test_cutting_keeps_the_block_that_both_have(untrained, tmp_path):
    """A truncated adapter loads, and each tensor is the upper left block of the donor's."""
    base = load_base(untrained / "base", device="cpu")
    cut = refit_adapter(untrained / "donor_adapter", base.model, folder=tmp_path)
    donor = load_file(untrained / "donor_adapter/adapter_model.safetensors")
    for name, tensor in load_file(cut / "adapter_model.safetensors").items():
        rows, columns = tensor.shape
        assert torch.equal(tensor, donor[name][:rows, :columns])
    with attached(base, cut) as loaded:
        assert loaded.warnings == ()


def test_padding_adds_zeros_alone(untrained, tmp_path):
    """A padded adapter loads on the wider base and holds the original and zeros."""
    wide = load_base(untrained / "donor_base", device="cpu")
    padded = refit_adapter(untrained / "suspect", wide.model, folder=tmp_path)
    original = load_file(untrained / "suspect/adapter_model.safetensors")
    for name, tensor in load_file(padded / "adapter_model.safetensors").items():
        rows, columns = original[name].shape
        assert torch.equal(tensor[:rows, :columns], original[name])
        assert tensor.abs().sum() == pytest.approx(original[name].abs().sum())
    with attached(wide, padded) as loaded:
        assert loaded.warnings == ()
