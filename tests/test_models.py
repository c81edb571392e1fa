import json
import shutil

import pytest
import torch

from postmortem.checker.errors import ModelError
from postmortem.models.loading import attached, choose_device, choose_dtype, load_base


@pytest.fixture
def base(untrained):
    """The untrained base, loaded."""
    return load_base(untrained / "base", device="cpu")


def logits(model):
    """The model's logits on four fixed tokens."""
    with torch.inference_mode():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_the_base_is_itself_again_after_the_block(base, untrained):
    """An adapter changes the output inside the `with` block and not a bit of it afterwards."""
    before, names = logits(base.model), [name for name, _ in base.model.named_modules()]
    with attached(base, untrained / "suspect") as loaded:
        assert not torch.equal(logits(loaded.model), before)
    assert torch.equal(logits(base.model), before)
    assert [name for name, _ in base.model.named_modules()] == names


def test_a_no_op_adapter_changes_nothing(base, untrained):
    """An adapter whose lora_B is zero gives the base's own output."""
    before = logits(base.model)
    with attached(base, untrained / "no_op") as loaded:
        assert torch.equal(logits(loaded.model), before)


def test_a_failed_load_leaves_the_base_whole(base, untrained):
    """After an adapter that does not fit, the base answers as before and takes another."""
    before = logits(base.model)
    with (
        pytest.raises(ModelError, match="size mismatch"),
        attached(base, untrained / "donor_adapter"),
    ):
        pass
    assert torch.equal(logits(base.model), before)
    with attached(base, untrained / "suspect") as loaded:
        assert loaded.warnings == ()


def test_an_ignored_mismatch_is_a_no_op_with_a_warning(base, untrained):
    """With `ignore_mismatched_sizes` nothing of a wider adapter arrives, and PEFT says so."""
    before = logits(base.model)
    with attached(base, untrained / "donor_adapter", ignore_mismatched_sizes=True) as loaded:
        assert torch.equal(logits(loaded.model), before)
        assert any("missing adapter keys" in text for text in loaded.warnings)


def test_pickled_weights_are_not_loaded(base, untrained, tmp_path):
    """A folder whose weights are a pickle is refused without reading them."""
    shutil.copy(untrained / "suspect/adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(ModelError, match="safetensors"), attached(base, tmp_path):
        pass


def test_code_that_a_model_brings_is_not_run(untrained, tmp_path):
    """A model folder that asks for its own code is refused, and the code does not run."""
    shutil.copytree(untrained / "base", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (tmp_path / "m/own.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: ...\nclass M: ...\n")
    with pytest.raises(ModelError):
        load_base(tmp_path / "m")
    assert not marker.exists()


@pytest.mark.parametrize("make", [lambda p: p / "none", lambda p: p])
def test_a_folder_without_a_model_is_refused(make, tmp_path):
    """A missing or empty folder is one clear error that names it."""
    with pytest.raises(ModelError, match=str(make(tmp_path))):
        load_base(make(tmp_path))


def test_truncated_weights_are_refused(untrained, tmp_path):
    """Weights that were cut short are one clear error."""
    shutil.copytree(untrained / "base", tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="safetensors"):
        load_base(tmp_path / "m")


def test_a_cpu_computes_in_float32():
    """On a CPU `auto` means float32, whatever the weights were saved in."""
    assert choose_dtype("cpu") is torch.float32


def test_a_gpu_prefers_bfloat16(monkeypatch):
    """On a GPU `auto` means bfloat16 where it exists and float16 where it does not."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_dtype("cuda") is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_dtype("cuda:1") is torch.float16


def test_a_device_is_taken_as_asked():
    """A named device is used as named; `auto` is a GPU only where there is one."""
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_dtype_is_refused():
    """A dtype that torch does not have is one clear error."""
    with pytest.raises(ModelError, match="float32"):
        choose_dtype("cpu", "float31")
