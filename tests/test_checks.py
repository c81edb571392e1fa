import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sound
from handmade import CONFIG, header, write

from postmortem.checker.catalogue import SEVERITIES, catalogue
from postmortem.checker.checks import inspect_adapter
from postmortem.cli import main
from postmortem.models.changes import edit_config, edit_tensors


def ids(adapter: Path, base: str | None = None, **options: Any) -> dict[str, str]:
    """Check an adapter and return the severity of each finding by id."""
    return {
        f.id: f.severity for f in inspect_adapter(str(adapter), base, **options).report.findings
    }


def rename(entries: dict[str, Any], old: str, new: str) -> bytes:
    """Return the header with a part of every key replaced, as JSON."""
    return json.dumps({key.replace(old, new): entry for key, entry in entries.items()}).encode()


def test_shallower_base_is_the_wrong_base(tmp_path: Path) -> None:
    """Layers beyond the base's are one finding; shapes that fit do not hide them."""
    adapter = write(tmp_path / "a", rename(header(), "layers.27.", "layers.28."))
    assert ids(adapter) == {"layer-out-of-range": "error", "missing-tensors": "error"}


def test_deeper_base_leaves_layers_without_tensors(tmp_path: Path) -> None:
    """An adapter that stops short of the base's last layers was made for another base."""
    text = json.dumps(header(20)).encode()
    data = bytes(header(20)[list(header(20))[-1]]["data_offsets"][1])
    adapter = write(tmp_path / "a", text, data)
    assert ids(adapter, header_only=True) == {"missing-tensors": "error"}


def test_other_size_of_the_family_is_one_finding(tmp_path: Path) -> None:
    """Against a base of other width and depth there is one shape finding and no flood."""
    assert ids(write(tmp_path / "a"), "Qwen/Qwen2.5-3B") == {
        "shape-mismatch": "error",
        "base-name-mismatch": "warning",
    }


def test_targets_beyond_the_file_are_a_warning(tmp_path: Path) -> None:
    """A target that no layer holds changes nothing at load time: PEFT leaves it at zero."""
    adapter = write(tmp_path / "a", target_modules=["q_proj", "v_proj"])
    assert ids(adapter) == {"missing-tensors": "warning"}


def test_null_targets_mean_the_defaults_of_peft(tmp_path: Path) -> None:
    """Without target_modules PEFT adapts q and v, whatever the file holds."""
    text = rename(header(), "q_proj", "o_proj")
    assert "unexpected-tensors" in ids(write(tmp_path / "a", text, target_modules=None))


def test_adapter_of_a_bare_model_on_a_causal_one(tmp_path: Path) -> None:
    """Keys of an AutoModel adapter find no module in a causal model."""
    text = rename(header(), "base_model.model.model.", "base_model.model.")
    assert ids(write(tmp_path / "a", text)) == {"key-prefix": "error"}


def test_adapter_of_a_bare_model_for_feature_extraction(tmp_path: Path) -> None:
    """The same keys are right when the task is feature extraction."""
    text = rename(header(), "base_model.model.model.", "base_model.model.")
    assert ids(write(tmp_path / "a", text, task_type="FEATURE_EXTRACTION")) == {}


def test_moved_language_model_path_is_a_warning(tmp_path: Path) -> None:
    """Which path a text tower has depends on the transformers version, not on the adapter."""
    text = rename(header(), "base_model.model.model.", "base_model.model.language_model.model.")
    config: dict[str, Any] = {"model_type": "qwen2_5_vl", "hidden_size": 1536}
    config |= {"num_hidden_layers": 28, "intermediate_size": 8960}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = ids(write(tmp_path / "a", text), str(tmp_path / "config.json"))
    assert found["key-prefix"] == "warning"


def test_key_formats_of_other_tools(tmp_path: Path) -> None:
    """Keys as kohya or diffusers write them are one finding."""
    text = rename(header(), "lora_A", "lora_down")
    assert ids(write(tmp_path / "a", text)) == {"key-prefix": "error"}


def test_adapter_name_inside_the_keys_is_information(tmp_path: Path) -> None:
    """A leftover adapter name works on current PEFT and is only mentioned."""
    text = rename(header(), ".weight", ".default.weight")
    assert ids(write(tmp_path / "a", text)) == {"key-prefix": "info"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/kaggle/input/qwen2.5/transformers/1.5b-instruct/1", {}),
        ("./models/qwen", {}),
        ("C:\\models\\qwen", {}),
        ("Qwen/Qwen2.5-Coder-1.5B", {"base-name-mismatch": "warning"}),
        ("Qwen/Qwen2.5-1.5B-Instruct", {"base-name-mismatch": "warning"}),
        ("Qwen/Qwen2.5-1.5B", {}),
        ("Qwen/Qwen2.5-1.5B-GPTQ-Int4", {"quantized-base-mismatch": "warning"}),
    ],
)
def test_names_of_bases(name: str, expected: dict[str, str], tmp_path: Path) -> None:
    """A path says nothing about the base; another hub id is another base."""
    adapter = write(tmp_path / "a", base_model_name_or_path=name)
    assert ids(adapter, "Qwen/Qwen2.5-1.5B") == expected


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("reddit-4b-think", {"name-size-conflict": "warning"}),
        ("qwen_0.5B_lora", {"name-size-conflict": "warning"}),
        ("qwen-1.5b", {}),
        ("qwen-1_5b-4bit", {}),
        ("checkpoint-500", {}),
        ("run-4bit", {}),
        ("a4b", {}),
    ],
)
def test_sizes_in_names(folder: str, expected: dict[str, str], tmp_path: Path) -> None:
    """A size in the adapter's name that contradicts its base's name is a warning."""
    assert ids(write(tmp_path / folder)) == expected


def test_incident_size_contradicts_its_config(tmp_path: Path) -> None:
    """The incident's 50 MB cannot be r=16 on q and v of a 1.5B base."""
    folder = write(tmp_path / "a", r=16, target_modules=["q_proj", "v_proj"])
    (folder / "adapter_model.safetensors").unlink()
    found = ids(folder, stated_bytes=50_000_000)
    assert found == {"missing-weights": "error", "size-conflict": "warning"}
    assert "size-conflict" not in ids(folder, stated_bytes=8_700_000)
    assert "size-conflict" not in ids(folder, stated_bytes=4_400_000)


def test_incident_as_transcribed(tmp_path: Path) -> None:
    """Without peft_type the file loads nowhere, and its names and sizes are still compared."""
    folder = tmp_path / "reddit-4b-think"
    folder.mkdir()
    config = {"base_model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "r": 16, "lora_alpha": 32}
    config |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "_note": "copied"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert ids(folder, stated_bytes=50_000_000) == {
        "config-invalid": "error",
        "missing-weights": "error",
        "config-unknown-key": "warning",
        "name-size-conflict": "warning",
        "size-conflict": "warning",
    }


def test_json_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON report has the agreed keys, and each finding names where, expected and found."""
    with pytest.raises(SystemExit) as stop:
        main(["check", str(write(tmp_path / "a", lora_alpha=0)), "--format", "json"])
    report = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1
    assert report["verdict"] == "broken"
    assert "Qwen/Qwen2.5-Math-1.5B" in report["bases"]
    (found,) = report["findings"]
    assert set(found) == {"id", "severity", "message", "evidence", "remedy"}
    assert "lora_alpha: expected other than 0, found alpha 0" in found["evidence"]


def test_text_report_starts_with_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader sees the verdict, then findings with evidence and remedy; no colour in a pipe."""
    with pytest.raises(SystemExit):
        main(["check", str(write(tmp_path / "a", lora_alpha=0, _note="x"))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("broken: ")
    assert [line.split()[0] for line in lines if line and line[0] in "ewi"] == ["error", "warning"]
    assert not any("\x1b" in line for line in lines)


def test_warning_alone_does_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 is for errors only."""
    with pytest.raises(SystemExit) as stop:
        main(["check", str(write(tmp_path / "a", _note="x"))])
    assert (stop.value.code, capsys.readouterr().out[:7]) == (0, "suspect")


def test_several_adapters_are_checked_in_one_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code covers all adapters of a call, as a pre-commit hook passes them."""
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", r=0)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(good / "adapter_config.json"), str(bad / "adapter_config.json")])
    assert stop.value.code == 1
    assert capsys.readouterr().out.startswith("fits: ")


def test_every_entry_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Every id has a complete entry, and --explain prints it."""
    for entry in catalogue().values():
        with pytest.raises(SystemExit) as stop:
            main(["check", "--explain", entry.id])
        out = capsys.readouterr().out
        assert stop.value.code == 0
        assert entry.severity in SEVERITIES
        assert all((entry.symptom, entry.cause, entry.settles, entry.remedy, entry.peft))
        assert entry.symptom in out
    with pytest.raises(SystemExit) as stop:
        main(["check", "--explain", "nothing"])
    assert stop.value.code == 2


def test_catalogue_is_the_contract() -> None:
    """The ids are those that other tools rely on."""
    assert " ".join(catalogue()) == (
        "shape-mismatch rank-mismatch missing-tensors unexpected-tensors key-prefix "
        "layer-out-of-range target-not-in-base scale-zero scale-unusual untrained non-finite "
        "overflow-risk integer-dtype empty-tensor corrupt-weights unsafe-pickle missing-weights "
        "config-invalid config-unknown-key base-name-mismatch name-size-conflict size-conflict "
        "vocab-mismatch base-weights-in-adapter dora-flag-lost modules-to-save-missing "
        "head-dropped quantized-base-mismatch init-rewrites-base"
    )


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    """A check costs no deep-learning import, nor the hub's client for a folder."""
    folder = write(tmp_path / "a")
    code = (
        "import sys\nfrom postmortem.cli import main\n"
        f"try: main(['check', {str(folder)!r}])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'pandas', 'rich'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "BF16", "F16", "F32", "F64"])
def test_values_of_every_float(name: str, tmp_path: Path) -> None:
    """NaN is found in every floating-point dtype, and a sound value is not taken for it."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    dtypes = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BF16": "bfloat16"}
    dtype = getattr(torch, dtypes.get(name, f"float{name[1:]}"))
    keys = list(header(28))
    for value, expected in ((0.25, {}), (float("nan"), {"non-finite": "error"})):
        folder = write(tmp_path / str(value))
        tensors = {key: torch.full(header()[key]["shape"], 0.25).to(dtype) for key in keys}
        tensors[keys[3]] = torch.full(header()[keys[3]]["shape"], value).to(dtype)
        save_file(tensors, folder / "adapter_model.safetensors")
        assert ids(folder) == expected


def test_partly_untrained_is_not_an_error(tmp_path: Path) -> None:
    """One silent pair is information; half of them is a warning."""
    model = sound.build("qwen2", "Qwen2ForCausalLM", tmp_path / "base")
    sound.save(model, tmp_path / "a", {"target_modules": ["q_proj", "k_proj", "v_proj"]})

    def silence(*names: str) -> dict[str, str]:
        edit_tensors(
            tmp_path / "a",
            lambda t: {k: v * (0 if any(n in k for n in names) else 1) for k, v in t.items()},
        )
        return ids(tmp_path / "a", str(tmp_path / "base"))

    assert silence("0.self_attn.q_proj.lora_B") == {"untrained": "info"}
    assert silence("q_proj.lora_B", "k_proj.lora_B") == {"untrained": "warning"}


def test_quantised_base_for_an_adapter_of_a_known_plain_one(tmp_path: Path) -> None:
    """A GPTQ base under an adapter that names the published plain base is a warning."""
    base = {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "vocab_size": 151936,
    }
    base |= {"num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960}
    (tmp_path / "config.json").write_text(
        json.dumps({**base, "quantization_config": {"quant_method": "gptq"}})
    )
    found = ids(write(tmp_path / "a"), str(tmp_path / "config.json"))
    assert found == {"quantized-base-mismatch": "warning"}


def test_newer_keys_without_a_value_are_information(tmp_path: Path) -> None:
    """A key of a release after this table is no alarm while it is null or empty."""
    folder = write(tmp_path / "a")
    edit_config(folder, use_next_year=None, next_year_list=[])
    assert ids(folder) == {"config-unknown-key": "info"}
    assert "use_next_year" not in CONFIG


def written(folder: Path, class_name: str = "Qwen2ForCausalLM", **options: Any) -> tuple[Path, str]:
    """Write a tiny Qwen2 base and an adapter of it with PEFT."""
    model = sound.build("qwen2", class_name, folder / "base")
    sound.save(model, folder / "a", {"target_modules": ["q_proj", "o_proj"], **options})
    return folder / "a", str(folder / "base")


def test_classifier_declared_a_causal_model_loses_its_head(tmp_path: Path) -> None:
    """A SEQ_CLS adapter under CAUSAL_LM loads in silence, and its head does not."""
    adapter, base = written(tmp_path, "Qwen2ForSequenceClassification")
    assert ids(adapter, base) == {}
    edit_config(adapter, task_type="CAUSAL_LM")
    sound.rewrite(tmp_path / "base" / "config.json", architectures=["Qwen2ForCausalLM"])
    assert ids(adapter, base) == {"head-dropped": "error"}
    assert ids(adapter) == {"head-dropped": "error"}


def test_bare_class_on_a_base_that_names_another(tmp_path: Path) -> None:
    """An AutoModel adapter without a task is suspicious on a base that names a causal class."""
    adapter, base = written(tmp_path, "Qwen2Model")
    assert ids(adapter, base) == {}
    sound.rewrite(tmp_path / "base" / "config.json", architectures=["Qwen2ForCausalLM"])
    assert ids(adapter, base) == {"key-prefix": "warning"}


def test_lost_biases(tmp_path: Path) -> None:
    """Biases that the configuration promises and the file lacks are missed."""
    adapter, base = written(tmp_path)
    edit_config(adapter, bias="lora_only")
    assert ids(adapter, base) == {"missing-tensors": "warning"}


def test_trainable_tokens(tmp_path: Path) -> None:
    """The rows of the token deltas are those of the listed indices."""
    adapter, base = written(tmp_path, trainable_token_indices=[1, 2, 3])
    assert ids(adapter, base) == {}
    edit_config(adapter, trainable_token_indices=[1, 2])
    assert ids(adapter, base) == {"shape-mismatch": "error"}
    edit_config(adapter, trainable_token_indices=None)
    assert ids(adapter, base) == {"unexpected-tensors": "error"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"r": 8}, {"rank-mismatch": "error"}),
        ({"target_modules": ["q_proj"]}, {"unexpected-tensors": "error"}),
        ({"use_dora": True}, {"missing-tensors": "error"}),
        ({"modules_to_save": ["lm_head"]}, {"modules-to-save-missing": "warning"}),
    ],
)
def test_faults_that_need_no_base(
    changes: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    """Without a base, the configuration is held against the file's own tensors."""
    adapter, _ = written(tmp_path)
    edit_config(adapter, base_model_name_or_path="acme/unheard-of", **changes)
    assert ids(adapter) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model."),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.model.", "base_model.model.model.model."),
        ("base_model.model.model.", "base_model.model.transformer."),
        ("base_model.model.model.layers.", "base_model.model.transformer.h."),
        ("base_model.model.", "base_model.model.base_model.model."),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "base_model.model.module."),
        ("base_model.model.", "_orig_mod.base_model.model."),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.model.", "base_model.model.model.decoder."),
    ],
)
def test_kinds_of_prefix(old: str, new: str, tmp_path: Path) -> None:
    """However the path to the layers was changed, that is the one finding."""
    assert ids(write(tmp_path / "a", rename(header(), old, new))) == {"key-prefix": "error"}


def test_lora_on_a_head_that_is_saved_whole(tmp_path: Path) -> None:
    """Tensors that early PEFT put on a saved head are dropped today, and the head is loaded."""
    adapter, base = written(tmp_path, "Qwen2ForSequenceClassification")
    extra = {
        f"base_model.model.score.lora_{e}.weight": s for e, s in (("A", (4, 32)), ("B", (2, 4)))
    }

    def add(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            **tensors,
            **{key: next(iter(tensors.values())).new_ones(s) for key, s in extra.items()},
        }

    edit_tensors(adapter, add)
    assert ids(adapter, base) == {"unexpected-tensors": "warning"}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((98, 32), {"vocab-mismatch": "error"}),
        ((96, 64), {"shape-mismatch": "error"}),
        ((96, 32), {}),
    ],
)
def test_saved_head_of_another_shape(
    shape: tuple[int, int], expected: dict[str, str], tmp_path: Path
) -> None:
    """Rows tell the vocabulary, columns the width: another width is another base."""
    adapter, base = written(tmp_path, modules_to_save=["lm_head"])
    key = "base_model.model.lm_head.weight"
    edit_tensors(adapter, lambda tensors: {**tensors, key: tensors[key].new_ones(shape)})
    assert ids(adapter, base) == expected
