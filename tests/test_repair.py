import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from postmortem.checker.checks import inspect_adapter
from postmortem.checker.serving import Serving
from postmortem.cli import main
from postmortem.models.changes import edit_config, edit_tensors

PREFIX = "base_model.model."
FILES = {"adapter_config.json", "adapter_model.safetensors", "FIXED.md"}
PATTERNS = {
    "rank_pattern": {"v_proj": 8, r"layers\.0\..*q_proj": 2},
    "alpha_pattern": {"v_proj": 3},
}


@pytest.fixture(scope="module")
def base(untrained_world):
    """The folder of a tiny base."""
    return untrained_world.path("base")


@pytest.fixture
def save(base, tmp_path):
    """Write an adapter with PEFT whose effect on the logits is large."""

    def write(**options):
        torch.manual_seed(3)
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
        options = {"task_type": "CAUSAL_LM"} | options
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return write


def logits(base, adapter):
    """What a base says with an adapter, or with none."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(1, 13)[None]).logits


def run(*arguments):
    """The exit code of a check."""
    with pytest.raises(SystemExit) as exit_info:
        main(["check", *map(str, arguments)])
    return exit_info.value.code


def files_of(folder):
    """The bytes of each file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def found(adapter, base, *runtimes):
    """The ids of the findings."""
    report = inspect_adapter(str(adapter), str(base), serving=Serving(runtimes)).report
    return {finding.id for finding in report.findings}


def renaming(change):
    """A fault of the keys."""
    return lambda folder: edit_tensors(folder, lambda t: {change(k): v for k, v in t.items()})


def turning(part):
    """A fault of one factor's layout."""
    return lambda folder: edit_tensors(
        folder, lambda tensors: {k: v.T if part in k else v for k, v in tensors.items()}
    )


def in_layers(name):
    """A wrapper around each layer."""
    return renaming(lambda key: re.sub(r"\.(\d+)\.", rf".\1.{name}.", key, count=1))


def both(folder):
    """Three faults at once."""
    turning("lora_A")(folder)
    renaming(lambda key: f"_orig_mod.{key}")(folder)
    edit_config(folder, _note="twice")


FAULTS = {
    "prefix lost": ("key-prefix", renaming(lambda k: k.removeprefix(PREFIX))),
    "prefix doubled": ("key-prefix", renaming(lambda k: k.replace(PREFIX, PREFIX * 2))),
    "half of the prefix": ("key-prefix", renaming(lambda k: k.removeprefix("base_model."))),
    "compiled": ("key-prefix", renaming(lambda k: f"_orig_mod.{k}")),
    "distributed": ("key-prefix", renaming(lambda k: f"module.{k}")),
    "layers compiled": ("key-prefix", in_layers("_orig_mod")),
    "layers checkpointed": ("key-prefix", in_layers("_checkpoint_wrapped_module")),
    "an adapter's name": ("key-prefix", renaming(lambda k: k.replace("A.w", "A.default.w"))),
    "A transposed": ("factors-transposed", turning("lora_A")),
    "both transposed": ("factors-transposed", turning("lora_")),
    "another base named": (
        "base-name-mismatch",
        lambda folder: edit_config(folder, base_model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct"),
    ),
    "a fork's option": (
        "config-unknown-key",
        lambda folder: edit_config(folder, use_turbo_lora=True, _note=""),
    ),
    "a part of two faults": ("key-prefix", both),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mechanical_fault_is_mended(name, base, save, tmp_path, capsys):
    """What was found is gone from the new folder, which says what the sound adapter said."""
    finding, break_it = FAULTS[name]
    adapter = save()
    sound = logits(base, adapter)
    assert (sound - logits(base, None)).abs().max() > 1e-2
    break_it(adapter)
    before = files_of(adapter)
    assert finding in found(adapter, base)
    out = tmp_path / "out"
    assert run(adapter, "--base", base, "--fix", out) == 0
    assert found(out, base) == set()
    assert {path.name for path in out.iterdir()} == FILES
    assert (logits(base, out) - sound).abs().max() < 1e-5
    assert files_of(adapter) == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}
    printed = capsys.readouterr().out
    assert f"fixed  {finding}: " in printed
    assert f"fits: {out}" in printed
    assert finding in (out / "FIXED.md").read_text()


EMBEDDING = {
    "target_modules": ["q_proj", "v_proj", "embed_tokens"],
    "rank_pattern": PATTERNS["rank_pattern"],
    "alpha_pattern": {"v_proj": 3, "embed_tokens": 5},
}


# PEFT warns of LoRA on a tied embedding, and takes its own biases for misshapen matrices.
@pytest.mark.filterwarnings(
    "ignore:Model has .tie_word",
    "ignore:Setting .save_embedding_layers",
    "ignore:Adapter 'default'",
)
@pytest.mark.parametrize(
    ("runtime", "key", "options"),
    [
        ("sglang", "use_rslora", {"use_rslora": True}),
        ("llama.cpp", "alpha_pattern", {"alpha_pattern": PATTERNS["alpha_pattern"]}),
        ("tgi", "rank_pattern", PATTERNS),
        ("sglang", "use_rslora", {"use_rslora": True, **PATTERNS}),
        ("tgi", "rank_pattern", EMBEDDING),
        ("tgi", "alpha_pattern", {"lora_bias": True, **PATTERNS}),
        ("tgi", "alpha_pattern", {"use_dora": True, **PATTERNS}),
    ],
)
def test_a_scale_that_is_not_read_is_folded(runtime, key, options, base, save, tmp_path):
    """One r and one alpha stand for all patterns, and PEFT computes what it computed before."""
    adapter, out = save(**options), tmp_path / "out"
    assert "serving-rescales" in found(adapter, base, runtime)
    run(adapter, "--base", base, "--for", runtime, "--fix", out)
    assert "serving-rescales" not in found(out, base, runtime)
    config = json.loads((out / "adapter_config.json").read_text())
    assert not any(config[name] for name in ("use_rslora", "alpha_pattern", "rank_pattern"))
    assert (logits(base, out) - logits(base, adapter)).abs().max() < 1e-5
    assert key in (out / "FIXED.md").read_text()


def test_half_precision_is_kept_where_scaling_it_is_exact(base, save, tmp_path):
    """A lora_B of 16 bits is scaled in 16 bits by a power of two, and in 32 by anything else."""
    adapter, out = save(alpha_pattern={"v_proj": 4, "q_proj": 3}), tmp_path / "out"
    edit_tensors(adapter, lambda tensors: {k: t.bfloat16() for k, t in tensors.items()})
    run(adapter, "--base", base, "--for", "tgi", "--fix", out)
    kinds = {k.split(".")[-3] + k[-8]: t.dtype for k, t in load_file(out / WEIGHTS).items()}
    half, whole = torch.bfloat16, torch.float32
    assert kinds == {"q_projA": half, "v_projA": half, "v_projB": half, "q_projB": whole}


WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def as_pickle(folder, content=None):
    """Put a pickle in the place of the weights."""
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / PICKLE)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_pickle_of_tensors_is_converted(kind, base, save, tmp_path):
    """A pickle of names and tensors becomes a safetensors file of the same tensors."""
    adapter, out = save(), tmp_path / "out"
    sound, tensors = logits(base, adapter), load_file(adapter / WEIGHTS)
    as_pickle(adapter, kind(tensors))
    assert run(adapter, "--base", base, "--fix", out) == 0
    assert found(out, base) == set()
    assert (logits(base, out) - sound).abs().max() < 1e-5


class Anything:
    """An instance of no library."""


class Command:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['REPAIR_MARK']}",)


def truncate(path):
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def plainly(content):
    """A pickle as Python writes it."""
    return lambda path: path.write_bytes(pickle.dumps(content))


HOSTILE = {
    "a command": lambda path: torch.save({"a": Command()}, path),
    "a command in a plain pickle": plainly({"a": Command()}),
    "an instance": lambda path: torch.save({"a": Anything()}, path),
    "a nested dict": lambda path: torch.save({"a": {"b": torch.ones(2)}}, path),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "a number": lambda path: torch.save({"a": 1}, path),
    "a key that is no text": lambda path: torch.save({1: torch.ones(2)}, path),
    "a sparse tensor": lambda path: torch.save({"a": torch.ones(2, 2).to_sparse()}, path),
    "a view far larger than its bytes": lambda path: torch.save(
        {"a": torch.ones(1).expand(1 << 40)}, path
    ),
    "a truncated file": truncate,
    "an empty file": lambda path: path.write_bytes(b""),
    "no pickle": lambda path: path.write_bytes(b"\n\x1b[31mtext\n" * 40),
    "another archive": lambda path: zipfile.ZipFile(path, "w").close(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_any_other_pickle_is_refused(name, base, save, tmp_path, capsys, monkeypatch):
    """What is no flat dict of tensors is refused in one line; nothing runs, nothing is written."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("REPAIR_MARK", str(mark))
    adapter = save()
    as_pickle(adapter, {"a": torch.ones(64, 64)})
    HOSTILE[name](adapter / PICKLE)
    mark.unlink(missing_ok=True)
    before = files_of(adapter)
    assert run(adapter, "--base", base, "--fix", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "expected a flat dict" in error
    assert error[:-1].isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert files_of(adapter) == before


def test_what_cannot_be_mended_is_left_with_its_remedy(base, save, tmp_path, capsys):
    """Nothing is written where nothing is mechanical; beside a fix the rest is listed."""
    adapter, out = save(), tmp_path / "out"
    edit_tensors(adapter, lambda tensors: {k: t * float("nan") for k, t in tensors.items()})
    assert run(adapter, "--base", base, "--fix", out) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert not out.exists()
    edit_config(adapter, _note="left")
    assert run(adapter, "--base", base, "--fix", out) == 1
    changed, _, left = (out / "FIXED.md").read_text().partition("# Left")
    assert "config-unknown-key" in changed
    assert "non-finite" in left


def lose_path(adapter):
    """Keys without PEFT's prefix, under a path that no base is known to have."""
    edit_tensors(adapter, lambda t: {k.replace(PREFIX, "x."): v for k, v in t.items()})


@pytest.mark.parametrize(
    ("break_it", "runtimes", "reason"),
    [
        (lose_path, (), "left   key-prefix: no path of the base is certain"),
        (
            lambda folder: edit_config(folder, use_rslora=True, init_lora_weights="pissa"),
            ("--for", "sglang"),
            "left   serving-rescales: scales are not folded beside init-rewrites-base",
        ),
    ],
)
def test_why_a_fix_is_declined_is_said(break_it, runtimes, reason, save, tmp_path, capsys):
    """What looks mechanical and is left has its reason, also where nothing is written."""
    adapter = save()
    edit_config(adapter, base_model_name_or_path=None)
    break_it(adapter)
    run(adapter, *runtimes, "--fix", tmp_path / "out")
    assert reason in capsys.readouterr().out


def test_a_fixed_configuration_is_written_as_peft_writes_it(base, save, tmp_path):
    """One key a line, in order, so that it can be compared with the one before."""
    adapter, out = save(), tmp_path / "out"
    before = (adapter / "adapter_config.json").read_text()
    edit_config(adapter, _note="x")
    assert run(adapter, "--base", base, "--fix", out) == 0
    assert (out / "adapter_config.json").read_text() == before


def test_what_stands_before_the_prefix_is_dropped_without_a_base(save, tmp_path):
    """No model has PEFT's prefix inside of it, whatever the base is."""
    adapter, out = save(), tmp_path / "out"
    edit_config(adapter, base_model_name_or_path=None)
    edit_tensors(adapter, lambda tensors: {f"state_dict.{k}": v for k, v in tensors.items()})
    assert run(adapter, "--fix", out) == 0
    assert all(key.startswith(PREFIX) for key in load_file(out / WEIGHTS))


def test_a_pickle_that_takes_too_long_is_refused(base, save, tmp_path, capsys, monkeypatch):
    """The process that reads a pickle is ended after its time."""
    monkeypatch.setattr("postmortem.models.repair.PICKLE_SECONDS", 0.01)
    adapter = save()
    as_pickle(adapter, load_file(adapter / WEIGHTS))
    assert run(adapter, "--base", base, "--fix", tmp_path / "out") == 2
    assert "not read in 0.01 seconds" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_wrapper_is_taken_away_without_a_base(base, save, tmp_path):
    """A wrapper's name is one whatever the base, so that no base is needed to mend it."""
    adapter, out = save(), tmp_path / "out"
    sound = load_file(adapter / WEIGHTS)
    renaming(lambda key: f"_orig_mod.{key}")(adapter)
    assert run(adapter, "--fix", out) == 0
    assert load_file(out / WEIGHTS).keys() == sound.keys()


def test_keys_that_would_fall_together_are_left(base, save, tmp_path):
    """Where taking a wrapper's name away would lose a tensor, no key is renamed."""
    adapter, out = save(), tmp_path / "out"
    edit_tensors(adapter, lambda t: {**t, **{f"_orig_mod.{k}": v for k, v in t.items()}})
    run(adapter, "--base", base, "--fix", out)
    assert not out.exists()


def test_a_square_factor_leaves_open_what_is_transposed(base, save, tmp_path):
    """Where one factor is as high as it is wide, whether it was turned cannot be told."""
    adapter, out = save(r=64), tmp_path / "out"
    turning("lora_")(adapter)
    run(adapter, "--base", base, "--fix", out)
    assert not out.exists()


def existing(adapter, tmp_path):
    """A folder in the new one's place."""
    (tmp_path / "out").mkdir()
    return [adapter, "--fix", tmp_path / "out"]


REFUSED = {
    "a folder that exists": existing,
    "a folder inside the adapter": lambda adapter, _: [adapter, "--fix", adapter / "out"],
    "no folder above": lambda adapter, tmp_path: [adapter, "--fix", tmp_path / "a" / "out"],
    "two adapters": lambda adapter, tmp_path: [adapter, adapter, "--fix", tmp_path / "out"],
    "a hub id": lambda _, tmp_path: ["owner/name", "--fix", tmp_path / "out"],
    "json": lambda adapter, out: [adapter, "--fix", out / "out", "--format", "json"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_met_is_refused(name, save, tmp_path, capsys):
    """What cannot be written is said before anything is checked or changed."""
    adapter = save()
    renaming(lambda key: f"_orig_mod.{key}")(adapter)
    before = files_of(adapter)
    assert run(*REFUSED[name](adapter, tmp_path)) == 2
    assert capsys.readouterr().out == ""
    assert files_of(adapter) == before
    assert not any(Path(tmp_path).glob("out/*"))


def test_a_folder_that_the_system_does_not_take_is_refused(save, tmp_path, capsys):
    """A name that no file system takes is one clear line, and leaves nothing behind."""
    adapter = save()
    renaming(lambda key: f"_orig_mod.{key}")(adapter)
    assert run(adapter, "--fix", tmp_path / ("a" * 300)) == 2
    assert "File name too long" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
