import copy

import pytest
import sound
import tiny
import torch
import transformers as tf

from postmortem.checker.checks import inspect_adapter

EVERY_OPTION = ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "bert", "t5", "phi3", "qwen3_moe")
SOME_OPTIONS = ("all-linear", "dora", "bias-all", "save-embedding", "regex", "tokens")
OTHERS = [
    (name, class_name)
    for name, (_, _, classes) in tiny.ARCHITECTURES.items()
    for class_name in (classes[1:] if name in EVERY_OPTION else classes)
]


def alarms(adapter, base):
    """Check an adapter and return its errors and warnings; the base must have been described."""
    report = inspect_adapter(str(adapter), str(base)).report
    assert report.base is not None
    # PEFT itself warns of a tied module that is saved apart.
    kept = [f for f in report.findings if f.id != "tied-weights-split"]
    return [f"{f.id}: {f.evidence}" for f in kept if f.severity != "info"]


def wrong(name, class_name, folder, wanted):
    """Write the adapters of the wanted options and return those that raise an alarm."""
    model = sound.build(name, class_name, folder / "base")
    found, written = {}, 0
    for option, values in sound.options(model).items():
        adapter = folder / option
        if option in wanted and sound.save(copy.deepcopy(model), adapter, values):
            written += 1
            found[option] = alarms(adapter, folder / "base")
    assert written >= min(len(wanted), 4) - 1
    return {option: raised for option, raised in found.items() if raised}


@pytest.mark.parametrize("name", EVERY_OPTION)
def test_no_alarm_for_any_option(name, tmp_path):
    """An adapter that PEFT wrote raises no alarm, whatever LoRA option it uses."""
    class_name = tiny.ARCHITECTURES[name][2][0]
    every = {"list", *sound.options(sound.build(name, class_name, tmp_path / "probe"))}
    assert wrong(name, class_name, tmp_path, every) == {}


@pytest.mark.parametrize(("name", "class_name"), OTHERS)
def test_no_alarm_for_any_class(name, class_name, tmp_path):
    """An adapter that PEFT wrote raises no alarm, whatever class of model it adapts."""
    assert wrong(name, class_name, tmp_path, SOME_OPTIONS) == {}


@pytest.fixture
def written(tmp_path):
    """Writes a tiny Qwen2 base and an adapter of it; returns both folders."""

    def write(dtype=None, **options):
        model = sound.build("qwen2", "Qwen2ForCausalLM", tmp_path / "base")
        sound.save(model, tmp_path / "a", {"target_modules": ["q_proj"], **options}, dtype)
        return tmp_path / "a", tmp_path / "base"

    return write


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_alarm_for_any_float(written, dtype):
    """Half, bfloat16 and double adapters are as sound as single precision ones."""
    assert alarms(*written(dtype)) == []


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_no_alarm_for_a_quantised_base(written, method):
    """A quantised base has the shapes of the layers before quantisation."""
    adapter, base = written(target_modules="all-linear")
    sound.rewrite(base / "config.json", quantization_config={"quant_method": method})
    assert alarms(adapter, base) == []


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.q_proj"])
def test_no_alarm_for_a_vision_language_base(targets, tmp_path):
    """Tensors of the vision tower are not judged, and the text tower is found by its path."""
    with torch.device("cpu"):
        model = tf.Gemma3ForConditionalGeneration(tiny.vision_configuration("gemma3"))
    model.save_pretrained(tmp_path / "base")
    assert sound.save(model, tmp_path / "a", {"task_type": "CAUSAL_LM", "target_modules": targets})
    assert alarms(tmp_path / "a", tmp_path / "base") == []


def test_no_alarm_for_a_config_of_an_older_release(written):
    """Keys that older PEFT did not write yet are not missed."""
    adapter, base = written()
    recent = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")
    sound.rewrite(adapter / "adapter_config.json", **dict.fromkeys((*recent, "peft_version")))
    assert alarms(adapter, base) == []


def test_no_alarm_for_training_leftovers(written):
    """Pickles of the trainer beside safetensors weights are usual and are not opened."""
    adapter, base = written()
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (adapter / name).write_bytes(b"\x80\x02}q\x00.")
    assert alarms(adapter, base) == []


def test_unknown_architecture_gets_the_checks_that_need_no_shapes(written):
    """An architecture outside the table is reported as unknown and raises no alarm."""
    adapter, base = written()
    sound.rewrite(base / "config.json", model_type="mamba")
    report = inspect_adapter(str(adapter), str(base)).report
    assert (report.base, report.findings, report.verdict) == (None, (), "unchecked")
    assert "shapes were not checked" in report.notes[0]
