import json

import pytest
import tiny
import torch
import transformers as tf
from transformers.pytorch_utils import Conv1D

from postmortem.checker.bases import describe, kind_of_class
from postmortem.checker.errors import ModelError

CASES = [(name, cls) for name, entry in tiny.ARCHITECTURES.items() for cls in entry[2]]
VISION = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
}


def true_modules(class_name, config):
    """Read names, sizes and biases from the transformers class on the meta device."""
    with torch.device("meta"):
        model = getattr(tf, class_name)(config)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            found[name] = (*module.weight.shape, False)
        elif isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, Conv1D):
            found[name] = (*module.weight.shape, True)
    return found


def described(class_name, config):
    """Describe the same class from the JSON of its configuration alone."""
    plain = json.loads(config.to_json_string(use_diff=False))
    return describe(plain, name="tiny", kind=kind_of_class(class_name))


@pytest.mark.parametrize(("name", "class_name"), CASES)
def test_describes_the_modules_of_the_class(name, class_name):
    """The table gives the very modules, sizes and biases of the transformers class."""
    config = tiny.configuration(name)
    base = described(class_name, config)
    ours = {k: (m.inputs, m.outputs, m.bias) for k, m in base.modules.items()}
    for path, sizes in true_modules(class_name, config).items():
        if path.endswith("rel_embeddings") or base.is_open(path):
            continue
        inputs, outputs, bias = ours.pop(path)
        assert (inputs, outputs if outputs is not None else sizes[1], bias) == sizes, path
    assert ours == {}


def true_experts(class_name, config):
    """Read the paths and the sizes of fused experts from the transformers class."""
    with torch.device("meta"):
        model = getattr(tf, class_name)(config)
    named = dict(model.named_parameters())
    downs = {
        name.removesuffix(".down_proj") for name in named if name.endswith("experts.down_proj")
    }
    return {path: sorted(named[f"{path}.down_proj"].shape) for path in downs}


MIXTURES = [case for case in CASES if "moe" in case[0] or case[0] in ("gpt_oss", "mixtral")]
MIXTURES += [case for case in CASES if case[0].startswith(("deepseek_v", "llama4"))]


@pytest.mark.parametrize(("name", "class_name"), MIXTURES)
def test_describes_where_experts_are(name, class_name):
    """The layers that have experts, their count and both of their widths are those of the class."""
    config = tiny.configuration(name)
    experts = described(class_name, config).experts
    sizes = sorted((experts.count, experts.width, experts.inner))
    assert dict.fromkeys(experts.paths, sizes) == true_experts(class_name, config)


@pytest.mark.parametrize("name", VISION)
def test_text_tower_of_a_vision_language_base(name):
    """The text tower is described under its path and the vision tower is left open."""
    config = tiny.vision_configuration(name)
    base = described(VISION[name], config)
    true = true_modules(VISION[name], config)
    text = {k: v for k, v in true.items() if not base.is_open(k)}
    assert {k: (m.inputs, m.outputs, m.bias) for k, m in base.modules.items()} == text


@pytest.mark.parametrize("model_type", ["mamba", "", None, 3, "LLAMA"])
def test_unknown_architecture_is_not_guessed(model_type):
    """A model type outside the table is unknown, whatever its other keys suggest."""
    config = {"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2}
    assert describe(config, name="x", kind=None) is None


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 96}


@pytest.mark.parametrize("layers", [10**9, -1, "2", True, None, 1.5])
def test_unusable_sizes_are_refused(layers):
    """A layer count that no model can have is refused before anything is allocated."""
    with pytest.raises(ModelError):
        describe(
            {**LLAMA, "intermediate_size": 48, "num_hidden_layers": layers}, name="x", kind=None
        )


def test_missing_width_is_not_guessed():
    """A size that config.json leaves out is asked for, unless the architecture derives it."""
    with pytest.raises(ModelError, match="intermediate_size"):
        describe({**LLAMA, "num_hidden_layers": 1}, name="x", kind=None)


def test_sizes_that_google_leaves_out():
    """The published Gemma 3 4B config.json omits the defaults of its class."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": {**text, "model_type": "gemma3_text"}}
    base = describe(config, name="x", kind="causal")
    assert base is not None
    value = base.modules["model.language_model.layers.33.self_attn.v_proj"]
    assert (value.inputs, value.outputs) == (2560, 1024)
