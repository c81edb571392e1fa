"""What people reported of their adapters, made small: each kind in the forms it takes."""

import json
import math
import re
import warnings

import numpy as np
import pytest
import sound
import torch
import transformers as tf
from handmade import QWEN, SMALL, header, size_of, write
from peft import PeftModel
from safetensors.torch import save_file

from postmortem.checker import adapter as adapter_module
from postmortem.checker.bases import find_base
from postmortem.cli import main
from postmortem.models.changes import edit_config, edit_tensors


def run(capsys, *arguments):
    """The exit code of a check and its JSON."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, arguments), "--format", "json"])
    return stop.value.code, json.loads(capsys.readouterr().out)


def shaped(shapes, rename=str, layers=28):
    """A header of q_proj on every layer with other shapes, or none of a part where it is None."""
    entries, position = {}, 0
    for key in header(layers):
        shape = shapes["lora_A" if "lora_A" in key else "lora_B"]
        if shape is not None:
            end = position + 2 * math.prod(shape)
            entries[rename(key)] = {"dtype": "F16", "shape": shape, "data_offsets": [position, end]}
            position = end
    return entries


def adapter(folder, shapes, rename=str, **config):
    """Write an adapter of such a header, filled with a constant."""
    entries = shaped(shapes, rename)
    data = np.full(size_of(entries) // 2, 0.01, "<f2").tobytes()
    return write(folder, json.dumps(entries).encode(), data, **config)


def found_in(report):
    """The severity of each finding of a report by id."""
    return {finding["id"]: finding["severity"] for finding in report["findings"]}


def unknown_base(folder):
    """A config.json of an architecture that is not described."""
    path = folder / "config.json"
    path.write_text(json.dumps({**QWEN, "model_type": "mamba"}))
    return path


@pytest.mark.parametrize(
    ("changes", "base", "hint"),
    [
        ({"base_model_name_or_path": "acme/unheard-of"}, None, "give --base"),
        ({"base_model_name_or_path": None}, None, "give --base"),
        ({}, unknown_base, "not described here"),
        ({"layer_replication": [[0, 4], [2, 6]]}, None, "layer_replication"),
    ],
)
def test_what_was_not_compared_is_unchecked(changes, base, hint, tmp_path, capsys):
    """Where shapes were compared with no base the verdict is not "fits", and --strict exits 2."""
    arguments = [write(tmp_path / "a", **changes)]
    arguments += ["--base", base(tmp_path)] if base else []
    code, report = run(capsys, *arguments)
    assert (code, report["verdict"], report["error"]) == (0, "unchecked", None)
    assert any(hint in note for note in report["notes"])
    assert run(capsys, *arguments, "--strict")[0] == 2
    assert run(capsys, write(tmp_path / "b"), "--strict")[0] == 0


@pytest.mark.parametrize("make", ["dangling", "outward", "method", "base", "nothing"])
def test_json_is_written_where_nothing_could_be_checked(make, tmp_path, capsys):
    """A refused adapter has the keys of every other, and its error in them."""
    folder = write(tmp_path / "a", **({"peft_type": "IA3"} if make == "method" else {}))
    weights = folder / "adapter_model.safetensors"
    if make in ("dangling", "outward"):
        (tmp_path / "outside").write_bytes(weights.read_bytes())
        weights.unlink()
        weights.symlink_to("nowhere" if make == "dangling" else "../outside")
    arguments = [tmp_path / "none" if make == "nothing" else folder]
    arguments += ["--base", "no-such-thing"] if make == "base" else []
    code, report = run(capsys, *arguments)
    _, sound = run(capsys, write(tmp_path / "b"))
    assert (code, report["verdict"], report["findings"]) == (2, "unchecked", [])
    assert report.keys() == sound.keys()
    assert set(report["error"]) == {"message", "subject", "expected", "found", "remedy"}
    _, both = run(capsys, *arguments, tmp_path / "b")
    assert both[0]["error"]
    assert both[-1]["verdict"] == ("unchecked" if make == "base" else "fits")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", "meta-llama/Meta-Llama-3.1-8B"),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
        ("unsloth/llama-2-7b-chat", "meta-llama/Llama-2-7b-hf"),
        ("unsloth/mistral-7b-bnb-4bit", "mistralai/Mistral-7B-v0.1"),
        ("unsloth/mistral-7b-instruct-v0.3-bnb-4bit", "mistralai/Mistral-7B-v0.3"),
        ("unsloth/tinyllama-chat-bnb-4bit", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("unsloth/tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("unsloth/gemma-2-9b-it-bnb-4bit", "google/gemma-2-9b"),
        ("unsloth/gemma-1.1-2b-it", "google/gemma-2b"),
        ("unsloth/Llama-3.1-8B-Instruct-FP8-Dynamic", "meta-llama/Meta-Llama-3.1-8B"),
        ("NousResearch/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"),
        ("NousResearch/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("mlx-community/Qwen2.5-1.5B-Instruct-4bit", "Qwen/Qwen2.5-1.5B"),
        ("mlx-community/Mistral-7B-Instruct-v0.2-8bit-mlx", "mistralai/Mistral-7B-v0.1"),
        ("TheBloke/Llama-2-7B-Chat-GPTQ", "meta-llama/Llama-2-7b-hf"),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "meta-llama/Meta-Llama-3.1-8B"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "meta-llama/Meta-Llama-3.1-8B"),
        ("gpt2", "openai-community/gpt2"),
        # Copies under a class with other projections, and a fine-tune with a name of its own.
        ("unsloth/phi-4", None),
        ("unsloth/Phi-3-mini-4k-instruct-bnb-4bit", None),
        ("NousResearch/Hermes-3-Llama-3.1-8B", None),
    ],
)
def test_names_of_copies_lead_to_the_known_base(name, known):
    """A renamed repository, a mirror or a quantised copy has the shapes of a known base."""
    found = find_base(name)
    assert (found and found.model_id) == known


@pytest.mark.parametrize(
    ("named", "given", "expected"),
    [
        ("unsloth/Qwen2.5-1.5B-bnb-4bit", "Qwen/Qwen2.5-1.5B", {"quantized-base-mismatch": "info"}),
        ("unsloth/Qwen2.5-1.5B-unsloth-bnb-4bit", None, {}),
        ("mlx-community/Qwen2.5-1.5B-4bit", "config", {"quantized-base-mismatch": "info"}),
        ("Qwen/Qwen2.5-1.5B", "unsloth/Qwen2.5-1.5B-bnb-4bit", {}),
        ("Qwen/Qwen2.5-1.5B", "unsloth/Qwen2.5-1.5B", {}),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-AWQ", {"quantized-base-mismatch": "warning"}),
        ("acme/x-GPTQ-Int4", "config", {"quantized-base-mismatch": "warning"}),
        (
            "unsloth/Qwen2.5-1.5B-Instruct-bnb-4bit",
            "Qwen/Qwen2.5-1.5B",
            {"base-name-mismatch": "warning"},
        ),
    ],
)
def test_a_quantised_name_is_the_base_itself(named, given, expected, tmp_path, capsys):
    """QLoRA's 4-bit base over its 16-bit form is mentioned, another rounding is a warning."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    base = [] if given is None else ["--base", tmp_path / "config.json"]
    base = base if given in (None, "config") else ["--base", given]
    code, report = run(capsys, write(tmp_path / "a", base_model_name_or_path=named), *base)
    assert found_in(report) == expected
    assert code == 0


def test_the_report_says_whose_shapes_stand_for_a_name(tmp_path, capsys):
    """A base that is known under another name is reported with both, named or given."""
    name = "unsloth/Qwen2.5-1.5B-Instruct-bnb-4bit"
    folder = write(tmp_path / "a", base_model_name_or_path=name)
    expected = f"{name} (shapes of Qwen/Qwen2.5-1.5B)"
    assert run(capsys, folder)[1]["base"] == expected
    assert run(capsys, folder, "--base", name)[1]["base"] == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"unsloth_version": "2026.4.2"}, {"config-unknown-key": "info"}),
        (
            {"lora_dtype": None, "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
            {"config-unknown-key": "info"},
        ),
        ({"axolotl_version": "0.9"}, {"config-unknown-key": "info"}),
        ({"loraplus_lr_ratio": 16}, {"config-unknown-key": "info"}),
        ({"use_turbo_lora": True}, {"config-unknown-key": "warning"}),
        ({"lora_alpha": 32}, {}),
        ({"lora_alpha": 33}, {"scale-unusual": "warning"}),
    ],
)
def test_what_trainers_usually_write_is_no_suspicion(changes, expected, tmp_path, capsys):
    """A trainer's own key is information, and a constant alpha of 32 is nothing on any rank."""
    assert found_in(run(capsys, write(tmp_path / "a", **changes))[1]) == expected


def test_alpha_32_on_rank_1_is_nothing(tmp_path, capsys):
    """The recipe of one alpha for every rank starts at r 1, a scale of 32."""
    shapes = {"lora_A": [1, 1536], "lora_B": [1536, 1]}
    folder = adapter(tmp_path / "a", shapes, r=1, lora_alpha=32)
    assert run(capsys, folder)[1]["findings"] == []


WHOLE = {"lora_A": [2, 1536], "lora_B": [1536, 2]}


def zeroed(folder, **keep):
    """Make zero all rows (columns for "inputs") of a factor but those of a slice."""

    def change(tensors):
        for key, tensor in tensors.items():
            part = keep.get("lora_A" if "lora_A" in key else "lora_B")
            if part is not None:
                kept = torch.zeros_like(tensor)
                kept[part] = tensor[part]
                tensors[key] = kept
        return tensors

    edit_tensors(folder, change)
    return folder


LOST = {"rows-not-saved": "error"}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        # One of eight processes, or of two, the first, a later one or all but one; A with it.
        ({"lora_B": slice(0, 192)}, LOST),
        ({"lora_B": slice(768, None)}, LOST),
        ({"lora_B": slice(192, 384)}, LOST),
        ({"lora_B": np.r_[0:192, 384:1536]}, LOST),
        ({"lora_A": slice(0, 1), "lora_B": slice(0, 768)}, LOST),
        ({"lora_A": slice(1, 2)}, LOST),
        ({"lora_A": (slice(None), slice(0, 768))}, LOST),
        # A rank that is zero in both factors is padding.
        ({"lora_A": slice(0, 1), "lora_B": (slice(None), slice(0, 1))}, {}),
    ],
)
def test_rows_that_no_process_saved(keep, expected, tmp_path, capsys):
    """The same share of every factor exactly zero is a sharded save, named with its rows."""
    folder = zeroed(adapter(tmp_path / "a", WHOLE), **keep)
    for base in ([], ["--base", unknown_base(tmp_path)]):
        _, report = run(capsys, folder, *base)
        assert found_in(report) == expected
        assert all("exactly zero" in f["evidence"] for f in report["findings"])


def test_dead_rows_here_and_there_are_none_of_it(tmp_path, capsys):
    """Rows that no example reached differ from tensor to tensor, and are no finding."""
    folder = adapter(tmp_path / "a", WHOLE)

    def kill(tensors):
        rng = np.random.default_rng(0)
        for key, tensor in tensors.items():
            if "lora_B" in key:
                tensor[rng.choice(1536, rng.integers(300), replace=False)] = 0
        return tensors

    edit_tensors(folder, kill)
    assert run(capsys, folder)[1]["findings"] == []


CUT, TURNED = {"saved-in-shards": "error"}, {"factors-transposed": "error"}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"lora_A": [3072], "lora_B": [3072]}, CUT),
        ({"lora_A": [768], "lora_B": [768]}, CUT),
        ({"lora_A": [0], "lora_B": [384]}, CUT),
        ({"lora_A": [1, 1536], "lora_B": [768, 2]}, CUT),
        ({"lora_A": [1, 1536], "lora_B": [192, 2]}, CUT),
        ({"lora_A": [0, 1536], "lora_B": [192, 2]}, CUT),
        ({"lora_A": [1536, 2], "lora_B": [2, 1536]}, TURNED),
        ({"lora_A": [1536, 2], "lora_B": [1536, 2]}, TURNED),
        ({"lora_A": [2, 1536], "lora_B": [2, 1536]}, TURNED),
        # A rank that both factors agree on is not cut, and another width is another base.
        ({"lora_A": [1, 1536], "lora_B": [1536, 1]}, {"rank-mismatch": "error"}),
    ],
)
def test_factors_of_another_form_are_one_finding(shapes, expected, tmp_path, capsys):
    """Cut, flat and transposed factors are told by their cause, with or without a base."""
    folder = adapter(tmp_path / "a", shapes)
    for base in ([], ["--base", unknown_base(tmp_path)]):
        code, report = run(capsys, folder, *base)
        assert (code, found_in(report)) == (1, expected)


def test_slices_of_tensor_parallelism(tmp_path, capsys):
    """A whole share of the outputs of several kinds of module is one process's slice."""
    folder = adapter(tmp_path / "a", {"lora_A": [2, 1536], "lora_B": [768, 2]})

    def add(tensors):
        more = {
            k.replace("q_proj", "k_proj"): v[:128] if "B" in k else v for k, v in tensors.items()
        }
        return {k: v.clone() for k, v in (tensors | more).items()}

    edit_tensors(folder, add)
    edit_config(folder, target_modules=["q_proj", "k_proj"])
    assert found_in(run(capsys, folder)[1]) == CUT


def test_half_the_modules_zero_are_named(tmp_path, capsys):
    """An adapter of which one kind of module stayed at its start says which, and of how many."""
    folder = adapter(tmp_path / "a", WHOLE)

    def add(tensors):
        more = {k.replace("q_proj", "o_proj"): v for k, v in tensors.items()}
        return tensors | {k: v * ("lora_A" in k) for k, v in more.items()}

    edit_tensors(folder, add)
    edit_config(folder, target_modules=["q_proj", "o_proj"])
    (found,) = run(capsys, folder)[1]["findings"]
    assert (found["id"], found["severity"]) == ("untrained", "warning")
    assert "Some modules" in found["message"]
    assert "o_proj (28 of 28)" in found["message"]


MLX = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 20.0}}
FOREIGN = {
    "MLX": ("model.layers.0.self_attn.q_proj.lora_a", "adapters.safetensors", MLX),
    "MLX numbered": ("model.layers.0.mlp.up_proj.lora_b", "0000100_adapters.safetensors", MLX),
    "MLX renamed": ("model.layers.0.self_attn.q_proj.lora_a", "adapter_model.safetensors", MLX),
    "kohya": ("lora_unet_down_blocks_0_proj.lora_down.weight", "pony.safetensors", None),
    "kohya te": ("lora_te1_text_model_layers_0_fc1.alpha", "my_style.safetensors", None),
    "diffusers": ("unet.mid_block.to_q.lora_A.weight", "pytorch_lora_weights.safetensors", None),
    "diffusers flux": (
        "transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight",
        "pytorch_lora_weights.safetensors",
        None,
    ),
    "diffusers old": (
        "unet.up_blocks.0.processor.to_q_lora.down.weight",
        "pytorch_lora_weights.safetensors",
        None,
    ),
    "diffusers linear": (
        "text_encoder.layers.0.q_proj.lora_linear_layer.up.weight",
        "lora.safetensors",
        None,
    ),
    "llama.cpp": ("x", "adapter-f16.gguf", None),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_tools_folder_is_one_finding(name, tmp_path, capsys):
    """The format is named, with what converting it means, and nothing else is held against it."""
    key, filename, settings = FOREIGN[name]
    entry = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}
    folder = write(tmp_path / "a", json.dumps({key: entry}).encode(), bytes(8))
    (folder / "adapter_model.safetensors").rename(folder / filename)
    if settings is None:
        (folder / "adapter_config.json").unlink()
    else:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    code, report = run(capsys, folder)
    assert (code, found_in(report)) == (1, {"foreign-format": "error"})
    (found,) = report["findings"]
    assert name.split()[0].lower() in found["evidence"].lower()
    assert any(word in found["remedy"] for word in ("transpose", "put", "lora_A", "converted"))


MISPLACED = {"key-prefix": "error"}


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("layers.", "{}", "_orig_mod"),
        (".self_attn", "._checkpoint_wrapped_module.self_attn", "_checkpoint_wrapped_module"),
        (".self_attn", "._fsdp_wrapped_module.self_attn", "_fsdp_wrapped_module"),
        ("q_proj.", "q_proj._orig_mod.", "_orig_mod"),
        (".weight", "._checkpoint_wrapped_module.weight", "_checkpoint_wrapped_module"),
        ("base_model.model.", "_forward_module.base_model.model.", "_forward_module"),
        ("base_model.model.", "_fsdp_wrapped_module.base_model._orig_mod.model.", "_fsdp_wrapped"),
        ("base_model.model.", "module.base_model.model.", "module"),
        ("base_model.model.", "base_model.model.module.", "module"),
    ],
)
def test_a_wrappers_name_in_the_path(old, new, name, tmp_path, capsys):
    """A wrapper's name anywhere in the keys is the one finding, with a base or without."""

    def rename(key):
        if "{}" in new:
            return re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", key)
        return key.replace(old, new, 1)

    folder = adapter(tmp_path / "a", WHOLE, rename)
    for base in ([], ["--base", unknown_base(tmp_path)]):
        code, report = run(capsys, folder, *base)
        assert (code, found_in(report)) == (1, MISPLACED)
        assert name in report["findings"][0]["evidence"]


@pytest.mark.parametrize("name", ["module", "inner"])
def test_an_enclosing_name_inside_the_path(name, tmp_path, capsys):
    """A name that a base could have is a wrapper's where the paths have a place without it."""
    folder = adapter(tmp_path / "a", WHOLE, lambda key: key.replace(".self", f".{name}.self"))
    assert found_in(run(capsys, folder)[1]) == MISPLACED
    unknown = run(capsys, folder, "--base", unknown_base(tmp_path))[1]
    assert found_in(unknown) == ({"key-prefix": "warning"} if name == "module" else {})


def test_a_nested_prefix_with_a_name_is_one_finding(tmp_path, capsys):
    """An adapter inside another that also kept its name in the keys has one cause."""
    nest = ("base_model.model.", "base_model.model.base_model.model.")
    folder = adapter(
        tmp_path / "a", WHOLE, lambda key: key.replace(*nest).replace(".weight", ".sft.weight")
    )
    for base in ([], ["--base", unknown_base(tmp_path)]):
        assert found_in(run(capsys, folder, *base)[1]) == MISPLACED


@pytest.mark.parametrize("make", ["checkpoints", "deeper", "inside", "merged", "merged shards"])
def test_a_folder_near_an_adapter_says_where_it_is(make, tmp_path, capsys):
    """A run's root, a folder inside an adapter and a merged model are told from an adapter."""
    folder = tmp_path / "run"
    folder.mkdir()
    hint = "whole model"
    if make in ("checkpoints", "deeper"):
        below = folder / "out" / "trial" if make == "deeper" else folder
        below.mkdir(parents=True, exist_ok=True)
        write(below / "checkpoint-500")
        write(below / "checkpoint-1000")
        hint = "checkpoint-500"
    if make == "inside":
        write(folder)
        folder, hint = folder / "global_step500", "adapters in .."
        folder.mkdir()
    if make.startswith("merged"):
        (folder / "config.json").write_text(json.dumps(QWEN))
        name = "model-00001-of-00002.safetensors" if "shards" in make else "model.safetensors"
        (folder / name).write_bytes(b"")
    code, report = run(capsys, folder)
    assert code == 2
    assert hint in report["error"]["found"]
    assert make not in ("checkpoints", "deeper") or "checkpoint-1000" in report["error"]["remedy"]


def test_shards_of_an_adapter_must_be_joined(tmp_path, capsys):
    """Weights in shards are named as such, with how to join them."""
    folder = write(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model-00001-of-00002.safetensors")
    code, report = run(capsys, folder)
    (found,) = report["findings"]
    assert (code, found["id"]) == (1, "missing-weights")
    assert "Join them" in found["remedy"]


def test_links_below_are_not_followed(tmp_path, capsys):
    """A folder that links to itself or outwards is looked through in the same time."""
    folder = tmp_path / "run"
    folder.mkdir()
    write(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    assert "elsewhere" not in str(run(capsys, folder)[1])


def based(folder, model_type="qwen2", class_name="Qwen2ForCausalLM", **changes):
    """Write a tiny base of a class and return its model and folder; keys of its config change."""
    model = sound.build(model_type, class_name, folder / "base")
    sound.rewrite(folder / "base" / "config.json", **changes)
    return model, folder / "base"


def load(base, adapter, auto):
    """Load an adapter with PEFT on a base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(auto.from_pretrained(base), str(adapter))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modules_to_save": ["embed_tokens"]}, {"tied-weights-split": "warning"}),
        ({"modules_to_save": ["lm_head"]}, {"tied-weights-split": "warning"}),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, {"tied-weights-split": "warning"}),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}),
        ({"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}, {}),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, "info"),
        ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, "info"),
        ({"target_modules": ["q_proj", "lm_head"]}, "info"),
        ({"target_modules": ["q_proj"]}, {}),
    ],
)
def test_tied_weights_saved_apart(options, expected, tmp_path, capsys):
    """A copy of one of two tied modules is a warning unless the tying is ensured."""
    model, base = based(tmp_path)
    assert sound.save(model, tmp_path / "a", {"target_modules": ["q_proj"], **options})
    code, report = run(capsys, tmp_path / "a", "--base", base)
    found = found_in(report)
    assert code == 0
    assert set(found.values()) <= {"info"} if expected == "info" else found == expected
    sound.rewrite(base / "config.json", tie_word_embeddings=False)
    if not options.get("ensure_weight_tying"):
        assert "tied-weights-split" not in found_in(run(capsys, tmp_path / "a", "--base", base)[1])


LOST_HEAD = {"head-dropped": "error"}


def classifier(folder, **options):
    """Write a base without a head, and an adapter that was made on its class with one."""
    model, base = based(folder)
    classifier = tf.Qwen2ForSequenceClassification(model.config)
    classifier.config._name_or_path = classifier.name_or_path = str(base)
    given = {"target_modules": ["q_proj"], "task_type": None, **options}
    assert sound.save(classifier, folder / "a", given)
    return folder / "a", base


def test_a_classifier_without_its_task_has_lost_its_head(tmp_path, capsys):
    """PEFT saves no head without the task, and each load has another: named whatever is given."""
    folder, base = classifier(tmp_path)
    auto = tf.AutoModelForSequenceClassification
    heads = [load(base, folder, auto).base_model.model.score.weight for _ in range(2)]
    assert not torch.equal(*heads)
    assert found_in(run(capsys, folder, "--base", base)[1]) == LOST_HEAD
    edit_config(folder, base_model_name_or_path="acme/unheard-of")
    assert found_in(run(capsys, folder)[1]) == {"head-dropped": "warning"}
    (folder / "score_head.pt").write_bytes(b"")
    (found,) = run(capsys, folder, "--base", base)[1]["findings"]
    assert "score_head.pt" in found["evidence"]
    assert "Load score_head.pt" in found["remedy"]
    sound.rewrite(base / "config.json", architectures=["Qwen2ForSequenceClassification"])
    assert found_in(run(capsys, folder, "--base", base)[1]) == {"side-file": "warning"}


def test_a_saved_head_is_no_lost_one(tmp_path, capsys):
    """With the task, or the head in modules_to_save, nothing is said."""
    for number, options in enumerate(({"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]})):
        (tmp_path / str(number)).mkdir()
        folder, base = classifier(tmp_path / str(number), **options)
        assert found_in(run(capsys, folder, "--base", base)[1]) == {}


@pytest.mark.parametrize("side", [None, "classifier.bin"])
def test_lora_on_a_head_under_the_task_of_a_generator(side, tmp_path, capsys):
    """LoRA on a head that is in no file is a lost head, and no target of another architecture."""
    folder, base = classifier(tmp_path, target_modules=["q_proj", "score"])
    edit_config(folder, task_type="CAUSAL_LM", auto_mapping=None)
    if side:
        (folder / side).write_bytes(b"")
    (found,) = run(capsys, folder, "--base", base)[1]["findings"]
    assert (found["id"], found["severity"]) == ("head-dropped", "error")
    assert side is None or side in found["evidence"]
    sound.rewrite(base / "config.json", architectures=["Qwen2ForSequenceClassification"])
    assert found_in(run(capsys, folder, "--base", base)[1]) == LOST_HEAD
    assert found_in(run(capsys, folder, "--base", unknown_base(tmp_path))[1]) == LOST_HEAD


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("non_lora_trainables.bin", {"side-file": "warning"}),
        ("non_lora_state_dict.bin", {"side-file": "warning"}),
        ("mm_projector.bin", {"side-file": "warning"}),
        ("value_head.safetensors", {"side-file": "warning"}),
        ("trainable_params.bin", {"side-file": "warning"}),
        ("training_args.bin", {}),
        ("optimizer.pt", {}),
        ("scheduler.pt", {}),
        ("rng_state_0.pth", {}),
        ("model.safetensors", {}),
        ("README.md", {}),
    ],
)
def test_files_beside_that_peft_does_not_load(name, expected, tmp_path, capsys):
    """Trained weights in a file of their own are named; a trainer's leftovers are not."""
    folder = write(tmp_path / "a")
    (folder / name).write_bytes(b"")
    report = run(capsys, folder)[1]
    assert found_in(report) == expected
    assert all(name in found["evidence"] for found in report["findings"])


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
        {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
    ],
)
def test_llavas_flat_config_is_the_text_model(changes, tmp_path, capsys):
    """LLaVA's own classes have the text model's paths, and what lies in the tower is not judged."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**QWEN, "num_key_value_heads": 12, **changes}))
    folder = adapter(tmp_path / "a", WHOLE)
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    report = run(capsys, folder, "--base", config)[1]
    assert found_in(report) == {"side-file": "warning"}


@pytest.mark.parametrize(
    ("targets", "unmatched"),
    [
        (["q_proj", "c_attn", "fc1"], ["c_attn", "fc1"]),
        (["q_proj"], []),
        ("all-linear", []),
        (r".*\.q_proj", []),
    ],
)
def test_targets_that_match_nothing_are_named(targets, unmatched, tmp_path, capsys):
    """Names that no module of the base ends with are information, with the names."""
    model, base = based(tmp_path)
    assert sound.save(model, tmp_path / "a", {"target_modules": targets})
    report = run(capsys, tmp_path / "a", "--base", base)[1]
    assert found_in(report) == ({"target-unmatched": "info"} if unmatched else {})
    assert report["verdict"] == "fits"
    assert all(name in report["findings"][0]["evidence"] for name in unmatched)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture(folder, name, class_name, **options):
    """Write a tiny mixture of experts and an adapter of its fused experts."""
    model, base = based(folder, name, class_name)
    given = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, **options}
    assert sound.save(model, folder / "a", given)
    return folder / "a", base


MIXTURES = [
    ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ("qwen2_moe", "Qwen2MoeForCausalLM"),
    ("mixtral", "MixtralForCausalLM"),
]


@pytest.mark.parametrize(("name", "class_name"), MIXTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_parameters": EXPERTS[:1]},
        {"target_parameters": ["down_proj"]},
        {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
        {"rank_pattern": {"gate_up_proj": 2}},
        {"target_modules": []},
        {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
    ],
)
def test_sound_experts_are_compared(name, class_name, options, tmp_path, capsys):
    """Fused experts that PEFT wrote fit their base: compared, and without a finding."""
    folder, base = mixture(tmp_path, name, class_name, **options)
    report = run(capsys, folder, "--base", base)[1]
    assert (report["verdict"], report["findings"], report["notes"]) == ("fits", [], [])


FAMILIES = [
    ("gpt_oss", "GptOssForCausalLM"),
    ("glm4_moe", "Glm4MoeForCausalLM"),
    ("deepseek_v2", "DeepseekV2ForCausalLM"),
    ("deepseek_v3", "DeepseekV3ForCausalLM"),
    ("llama4", "Llama4ForCausalLM"),
    ("granitemoe", "GraniteMoeForCausalLM"),
    ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    ("qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
    ("qwen3_next", "Qwen3NextForCausalLM"),
    ("gemma4", "Gemma4ForCausalLM"),
    ("gemma4-moe", "Gemma4ForCausalLM"),
    ("olmoe", "OlmoeForCausalLM"),
]


@pytest.mark.parametrize(("name", "class_name"), FAMILIES)
def test_sound_adapters_of_every_layer(name, class_name, tmp_path, capsys):
    """What PEFT writes for all linear modules and experts of a base of unlike layers fits it."""
    parameters = [f"experts.{part}_proj" for part in ("gate_up", "down")]
    model, base = based(tmp_path, name, class_name)
    # Whether a router is a linear module differs between releases: those are not described.
    names = [n for n in sound.linear_names(model) if n not in ("gate", "router")]
    given = {"target_modules": names, "target_parameters": parameters}
    assert sound.save(model, tmp_path / "a", given)
    report = run(capsys, tmp_path / "a", "--base", base)[1]
    found = [f for f in report["findings"] if f["severity"] != "info"]
    assert (report["verdict"], found, report["notes"]) == ("fits", [], [])


def exchanged(tensors):
    """The experts' factors in the layout that takes in for out."""
    keys = [k for k in tensors if ".experts" in k and "lora_A" in k]
    other = {k: k.replace("lora_A", "lora_B") for k in keys}
    turned = {k: tensors[other[k]].T for k in keys} | {other[k]: tensors[k].T for k in keys}
    return tensors | turned


def test_the_exchange_of_factors_keeps_the_update():
    """What the remedy computes of the older layout gives the same update in PEFT's of today."""
    experts, r, wide, narrow = 3, 2, 5, 4
    a, b = torch.randn(experts * r, wide), torch.randn(narrow, r * experts)
    old = (b.reshape(narrow, r, experts), a.reshape(experts, r, wide))
    new_a = b.reshape(len(b), r, experts).permute(2, 1, 0).reshape(experts * r, len(b))
    new_b = a.reshape(experts, r, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], r * experts)
    new = (new_b.reshape(wide, r, experts), new_a.reshape(experts, r, narrow))
    expected = torch.einsum("ore,eri->eio", *old)
    torch.testing.assert_close(torch.einsum("ore,eri->eoi", *new), expected)


@pytest.mark.parametrize(("name", "class_name"), MIXTURES)
@pytest.mark.parametrize(
    ("settings", "change", "expected"),
    [
        ({}, exchanged, {"factors-transposed": "error"}),
        ({"target_parameters": None}, None, {"unexpected-tensors": "error"}),
        ({"target_parameters": EXPERTS[:1]}, None, {"unexpected-tensors": "error"}),
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, None, {"rank-mismatch": "error"}),
        (
            {},
            lambda t: {k.replace("mlp.experts", "mlp.moe.experts"): v for k, v in t.items()},
            MISPLACED,
        ),
        (
            {},
            lambda t: {
                k.replace("model.layers", "model.language_model.layers"): v for k, v in t.items()
            },
            MISPLACED,
        ),
        (
            {},
            lambda t: {k: v for k, v in t.items() if ".experts.base" not in k},
            {"missing-tensors": "error"},
        ),
        (
            {},
            lambda t: {k: v for k, v in t.items() if ".experts" not in k},
            {"missing-tensors": "error"},
        ),
        (
            {},
            lambda t: {
                k: torch.cat([v, v], 1) if "experts.lora_A" in k else v for k, v in t.items()
            },
            {"shape-mismatch": "error"},
        ),
    ],
)
def test_experts_that_do_not_fit(name, class_name, settings, change, expected, tmp_path, capsys):
    """Experts of another layout, path or shape, or that the config lost, are one finding."""
    folder, base = mixture(tmp_path, name, class_name)
    edit_config(folder, **settings)
    if change:
        edit_tensors(folder, change)
    assert found_in(run(capsys, folder, "--base", base)[1]) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.gate_proj", "3.down_proj"], {}),
        (["4.gate_proj"], {"target-not-in-base": "error"}),
        (["0.w9"], {"target-not-in-base": "error"}),
    ],
)
def test_experts_one_by_one(names, expected, tmp_path, capsys):
    """One module for each expert, as releases before the fusion wrote it, is judged as well."""
    folder, base = mixture(tmp_path, *MIXTURES[0], target_parameters=None)

    def add(tensors):
        for name in names:
            ends = (16, 32) if "down" in name else (32, 16)
            path = f"base_model.model.model.layers.0.mlp.experts.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.ones(4, ends[0])
            tensors[f"{path}.lora_B.weight"] = torch.ones(ends[1], 4)
        return tensors

    edit_tensors(folder, add)
    edit_config(folder, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert found_in(run(capsys, folder, "--base", base)[1]) == expected


@pytest.mark.parametrize(("width", "kept"), [(1, []), (1, range(0, 3000, 2)), (3, [2999])])
def test_zero_rows_are_counted_across_the_pieces_of_a_file(width, kept, tmp_path, monkeypatch):
    """Rows are joined over what is read at a time, and of too many runs none is told."""
    monkeypatch.setattr(adapter_module, "CHUNK", 1000)
    tensor = torch.zeros(3000, width)
    tensor[list(kept)] = 1
    save_file({"x": tensor}, tmp_path / "adapter_model.safetensors")
    folder = adapter_module.Folder(tmp_path)
    (stats,) = adapter_module.scan(folder, adapter_module.read_weights(folder)[0]).values()
    expected = {0: ((0, 3000),), 1: ((0, 2999),)}.get(len(kept), ())
    assert stats.zero_rows == expected
    assert stats.zero_columns == (() if kept else ((0, width),))


def tiny_base(folder, name="qwen2", **sizes):
    """The config.json of a small base, with sizes changed."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**SMALL, "model_type": name, **sizes}))
    return path


def pairs_of(paths, inputs, outputs, rank=2):
    """Random factors under these paths."""
    return {
        f"base_model.model.{path}.{part}.weight": torch.randn(*shape) / 50
        for path in paths
        for part, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank)))
    }


def written(folder, tensors, **config):
    """An adapter of these tensors."""
    write(folder, **{"base_model_name_or_path": None, **config})
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


QUERIES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
KEYS = [path.replace("q_proj", "k_proj") for path in QUERIES]


def test_half_the_width_is_another_base_and_no_slice(tmp_path, capsys):
    """Tensor parallelism cuts q and k by their outputs: half of the inputs is a narrower base."""
    folder = written(
        tmp_path / "adapter",
        {**pairs_of(QUERIES, 16, 32), **pairs_of(KEYS, 16, 16)},
        target_modules=["q_proj", "k_proj"],
    )
    report = run(capsys, folder, "--base", tiny_base(tmp_path))[1]
    assert found_in(report) == {"shape-mismatch": "error"}


@pytest.mark.parametrize(
    ("saved", "held", "expected"),
    [
        (["input_layernorm"], ["0.input_layernorm"], {"modules-to-save-missing": "error"}),
        (["input_layernorm"], [], {"modules-to-save-missing": "warning"}),
        (["input_layernorm"], ["0.input_layernorm", "1.input_layernorm"], {}),
        (["adaptor"], [], {"target-unmatched": "info"}),
        (["adaptor", "embed_in", "embed_tokens"], ["embed_tokens"], {}),
    ],
)
def test_saved_modules_that_no_config_describes(saved, held, expected, tmp_path, capsys):
    """A norm that a layer lacks makes PEFT raise; a name that nothing has is only mentioned."""
    weights = {
        f"base_model.model.model.{'layers.' * (name[0] in '01')}{name}.weight": torch.ones(
            *((96, 32) if "embed" in name else (32,))
        )
        for name in held
    }
    folder = written(
        tmp_path / "adapter", {**pairs_of(QUERIES, 32, 32), **weights}, modules_to_save=saved
    )
    base = tiny_base(tmp_path, tie_word_embeddings=False)
    assert found_in(run(capsys, folder, "--base", base)[1]) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": [0, 1, 7]}, {"target-unmatched": "info"}),
        ({"alpha_pattern": {"q_proj": 4000}}, {"scale-unusual": "warning"}),
        ({"alpha_pattern": {"q_proj": 8}}, {}),
        ({"target_modules": ["query", "value"]}, {"target-not-in-base": "error"}),
        ({"trainable_token_indices": [3, 96]}, {"vocab-mismatch": "error"}),
    ],
)
def test_settings_that_the_base_cannot_have(settings, expected, tmp_path, capsys):
    """Layers, scales, names and tokens are held against the base, those of patterns as well."""
    tensors = pairs_of(QUERIES, 32, 32)
    if "trainable_token_indices" in settings:
        tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = (
            torch.ones(2, 32)
        )
    folder = written(tmp_path / "adapter", tensors, **settings)
    assert found_in(run(capsys, folder, "--base", tiny_base(tmp_path))[1]) == expected


def test_a_lost_list_of_targets_is_told_from_the_file(tmp_path, capsys):
    """Where the file's modules are the base's, the remedy names them."""
    folder = written(tmp_path / "adapter", pairs_of(QUERIES, 32, 32), target_modules=["query"])
    report = run(capsys, folder, "--base", tiny_base(tmp_path))[1]
    assert report["findings"][0]["remedy"] == "Restore target_modules: the file has q_proj."


@pytest.mark.parametrize("key", ["lm_head.weight", "model.norm.weight"])
def test_whole_weights_beyond_float16(key, tmp_path, capsys):
    """What is saved whole can overflow as well as the factors."""
    shape = (96, 32) if "head" in key else (32,)
    whole = {f"base_model.model.{key}": torch.full(shape, 7e4)}
    saved = [key.split(".")[-2]]
    folder = written(
        tmp_path / "adapter", {**pairs_of(QUERIES, 32, 32), **whole}, modules_to_save=saved
    )
    base = tiny_base(tmp_path, tie_word_embeddings=False)
    assert found_in(run(capsys, folder, "--base", base)[1]) == {"overflow-risk": "warning"}


@pytest.mark.parametrize(
    ("keys", "mend"),
    [
        (
            "base_model.model._fsdp_wrapped_module._checkpoint_wrapped_module.model.{}",
            "{k.replace('_checkpoint_wrapped_module.', '').replace('_fsdp_wrapped_module.', '')",
        ),
        ("module.base_model.model.model.{}", "{k.removeprefix('module.'): v"),
        ("model.{}", "{'base_model.model.' + k: v"),
    ],
)
def test_the_edit_of_the_keys_is_whole_without_a_base(keys, mend, tmp_path, capsys):
    """Every wrapper's name stands in the edit, and the edit is named where no base is known."""
    tensors = {
        keys.format(key.removeprefix("base_model.model.model.")): value
        for key, value in pairs_of(QUERIES, 32, 32).items()
    }
    folder = written(tmp_path / "adapter", tensors)
    report = run(capsys, folder)[1]
    assert found_in(report) == {"key-prefix": "error"}
    assert mend in report["findings"][0]["remedy"]


@pytest.mark.parametrize(
    ("file", "key", "tool"),
    [
        ("x.safetensors", "diffusion_model.blocks.0.q.lora_A.weight", "ComfyUI"),
        ("x.safetensors", "double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("x.safetensors", "lora_unet_blocks_0_q.hada_w1_a", "LyCORIS"),
        ("adapter_model.safetensors", "layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("adapter_0.pt", "", "torchtune"),
        ("pytorch_adapter.bin", "", "AdapterHub"),
        ("run.nemo", "", "NeMo"),
    ],
)
def test_formats_of_further_tools(file, key, tool, tmp_path, capsys):
    """One finding names the tool, from a key or from the name of a file."""
    (tmp_path / file).write_bytes(b"x")
    if key:
        save_file({key: torch.ones(2, 4)}, tmp_path / file)
    report = run(capsys, tmp_path)[1]
    assert found_in(report) == {"foreign-format": "error"}
    assert tool in report["findings"][0]["evidence"]


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("zero_to_fp32.py", "zero_to_fp32.py"),
        ("__0_0.distcp", "merge-weights"),
        ("adapter.zip", "Unpack"),
        ("consolidated.00.pth", "needs no adapter"),
    ],
)
def test_checkpoints_and_archives_are_no_adapters(file, remedy, tmp_path, capsys):
    """One line says what the folder holds and what makes an adapter of it."""
    (tmp_path / file).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    code, report = run(capsys, tmp_path)
    assert (code, remedy in report["error"]["message"]) == (2, True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: {k: v for k, v in t.items() if "1.mlp" not in k}, {"missing-tensors": "error"}),
        (
            lambda t: {k: v.T if ".experts" in k else v for k, v in t.items()},
            {"factors-transposed": "error"},
        ),
        (
            lambda t: {
                **t,
                **{k.replace("rs.1", "rs.2"): v for k, v in t.items() if "rs.1.mlp" in k},
            },
            {"layer-out-of-range": "error"},
        ),
    ],
)
def test_fused_experts_lost_turned_or_too_deep(change, expected, tmp_path, capsys):
    """A layer without its pair, transposed pairs and a layer too many are told by their kinds."""
    folder, base = mixture(tmp_path, *MIXTURES[0])
    edit_tensors(folder, change)
    assert found_in(run(capsys, folder, "--base", base)[1]) == expected
