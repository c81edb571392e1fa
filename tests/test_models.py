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
    """An adapter changes the output inside the block, a no-op nothing, and not a bit afterwards."""
    before, names = logits(base.model), [name for name, _ in base.model.named_modules()]
    with attached(base, untrained / "suspect") as loaded:
        assert not torch.equal(logits(loaded.model), before)
    with attached(base, untrained / "no_op") as loaded:
        assert torch.equal(logits(loaded.model), before)
    assert torch.equal(logits(base.model), before)
    assert [name for name, _ in base.model.named_modules()] == names


def test_a_failed_load_leaves_the_base_whole(base, untrained):
    """After an adapter that does not fit, the base answers as before and takes another.

    With `ignore_mismatched_sizes` nothing of it arrives, and PEFT says so.
    """
    before, donor = logits(base.model), untrained / "donor_adapter"
    with pytest.raises(ModelError, match="size mismatch"), attached(base, donor):
        pass
    assert torch.equal(logits(base.model), before)
    with attached(base, donor, ignore_mismatched_sizes=True) as loaded:
        assert torch.equal(logits(loaded.model), before)
        assert any("missing adapter keys" in text for text in loaded.warnings)
    with attached(base, untrained / "suspect") as loaded:
        assert loaded.warnings == ()


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


def test_a_folder_without_a_whole_model_is_refused(untrained, tmp_path):
    """A missing or empty folder, or weights that were cut short, is one error that names it."""
    shutil.copytree(untrained / "base", tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty", "cut"):
        with pytest.raises(ModelError, match=f"{tmp_path / name}.*safetensors"):
            load_base(tmp_path / name)


def test_device_and_dtype_are_taken_as_asked(monkeypatch):
    """`auto` is a GPU where there is one, and there the dtype that it has; on a CPU float32."""
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtype("cpu") is torch.float32
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16: has)
        assert choose_dtype("cuda:1") is expected
    with pytest.raises(ModelError, match="float32"):
        choose_dtype("cpu", "float31")
