import json
import subprocess
import sys

import pytest
import sound
import torch
from handmade import QWEN, header, size_of, write

from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import SEVERITIES, catalogue
from postmortem.cli import main
from postmortem.models.changes import edit_config, edit_tensors


def ids(adapter, base=None, **options):
    """Check an adapter and return the severity of each finding by id."""
    findings = inspect_adapter(str(adapter), base and str(base), **options).report.findings
    return {finding.id: finding.severity for finding in findings}


def renamed(old, new, layers=28):
    """The sound header with a part of every key replaced, as JSON."""
    entries = {key.replace(old, new): entry for key, entry in header(layers).items()}
    return json.dumps(entries).encode()


PREFIX, LAYERS = "base_model.model.", "base_model.model.model."
MISPLACED = {"key-prefix": "error"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # However the path to the layers was changed, or as other tools write it.
        (PREFIX, "", MISPLACED),
        (PREFIX, "base_model.", MISPLACED),
        (LAYERS, PREFIX, MISPLACED),
        (LAYERS, f"{LAYERS}model.", MISPLACED),
        (LAYERS, f"{PREFIX}transformer.", MISPLACED),
        (f"{LAYERS}layers.", f"{PREFIX}transformer.h.", MISPLACED),
        (PREFIX, f"{PREFIX}{PREFIX}", MISPLACED),
        (PREFIX, f"module.{PREFIX}", MISPLACED),
        (PREFIX, f"{PREFIX}module.", MISPLACED),
        (PREFIX, f"_orig_mod.{PREFIX}", MISPLACED),
        (PREFIX, "base_model.model._orig_mod.", MISPLACED),
        (LAYERS, f"{LAYERS}decoder.", MISPLACED),
        ("lora_A", "lora_down", {"foreign-format": "error"}),
        # A leftover adapter name works on current PEFT and is only mentioned.
        (".weight", ".default.weight", {"key-prefix": "info"}),
        # Layers beyond the base's are one finding, which shapes that fit do not hide.
        ("layers.27.", "layers.28.", {"layer-out-of-range": "error", "missing-tensors": "error"}),
    ],
)
def test_changed_keys_are_one_finding(tmp_path, old, new, expected):
    """Keys that find no module are told by what is wrong with them, and by nothing more."""
    assert ids(write(tmp_path / "a", renamed(old, new))) == expected


NAME, BASE = "base_model_name_or_path", "Qwen/Qwen2.5-1.5B"
OTHER_NAME = {"base-name-mismatch": "warning"}


@pytest.mark.parametrize(
    ("changes", "base", "expected"),
    [
        # PEFT leaves a target that no layer holds at zero.
        ({"target_modules": ["q_proj", "v_proj"]}, None, {"missing-tensors": "warning"}),
        # One shape finding and no flood, at another width and depth.
        ({}, "Qwen/Qwen2.5-3B", {"shape-mismatch": "error", **OTHER_NAME}),
        # A path says nothing about the base; another hub id is another base.
        ({NAME: "/kaggle/input/qwen2.5/transformers/1.5b-instruct/1"}, BASE, {}),
        ({NAME: "./models/qwen"}, BASE, {}),
        ({NAME: "C:\\models\\qwen"}, BASE, {}),
        ({NAME: BASE}, BASE, {}),
        ({NAME: "Qwen/Qwen2.5-Coder-1.5B"}, BASE, OTHER_NAME),
        ({NAME: "Qwen/Qwen2.5-1.5B-Instruct"}, BASE, OTHER_NAME),
        ({NAME: "Qwen/Qwen2.5-1.5B-GPTQ-Int4"}, BASE, {"quantized-base-mismatch": "warning"}),
        # A key of a release after this table is no alarm while it is null or empty.
        ({"use_next_year": None, "next_year_list": []}, None, {"config-unknown-key": "info"}),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, changes, base, expected):
    """Targets, the name of the base and unknown keys are held against the base and the tensors."""
    assert ids(write(tmp_path / "a", **changes), base) == expected


def test_deeper_base_leaves_layers_without_tensors(tmp_path):
    """An adapter that stops short of the base's last layers was made for another base."""
    adapter = write(tmp_path / "a", renamed("", "", layers=20), bytes(size_of(header(20))))
    assert ids(adapter, header_only=True) == {"missing-tensors": "error"}


def test_null_targets_mean_the_defaults_of_peft(tmp_path):
    """Without target_modules PEFT adapts q and v, whatever the file holds."""
    adapter = write(tmp_path / "a", renamed("q_proj", "o_proj"), target_modules=None)
    assert "unexpected-tensors" in ids(adapter)


def test_keys_of_a_bare_model_fit_its_task(tmp_path):
    """Keys that find no module in a causal model are right when the task is feature extraction."""
    text = renamed(LAYERS, PREFIX)
    assert ids(write(tmp_path / "a", text, task_type="FEATURE_EXTRACTION")) == {}


@pytest.mark.parametrize(
    ("changes", "old", "new", "expected"),
    [
        # Which path a text tower has depends on the transformers version, not on the adapter.
        (
            {"model_type": "qwen2_5_vl"},
            LAYERS,
            f"{PREFIX}language_model.model.",
            {"key-prefix": "warning"},
        ),
        # The adapter names the published plain base.
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "",
            "",
            {"quantized-base-mismatch": "warning"},
        ),
    ],
)
def test_a_base_beside_the_named_one_is_a_warning(tmp_path, changes, old, new, expected):
    """A base of the same shapes in another form is no error."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN | changes))
    found = ids(write(tmp_path / "a", renamed(old, new)), tmp_path / "config.json")
    assert found == expected


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
def test_sizes_in_names(folder, expected, tmp_path):
    """A size in the adapter's name that contradicts its base's name is a warning."""
    assert ids(write(tmp_path / folder)) == expected


def test_incident_size_contradicts_its_config(tmp_path):
    """The incident's 50 MB cannot be r=16 on q and v of a 1.5B base."""
    folder = write(tmp_path / "a", r=16, target_modules=["q_proj", "v_proj"])
    (folder / "adapter_model.safetensors").unlink()
    found = ids(folder, stated_bytes=50_000_000)
    assert found == {"missing-weights": "error", "size-conflict": "warning"}
    assert "size-conflict" not in ids(folder, stated_bytes=8_700_000)
    assert "size-conflict" not in ids(folder, stated_bytes=4_400_000)


def test_incident_as_transcribed(tmp_path):
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


def check(*arguments):
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, arguments)])
    return stop.value.code


def test_json_contract(tmp_path, capsys):
    """The JSON report has the agreed keys, and each finding names where, expected and found."""
    assert check(write(tmp_path / "a", lora_alpha=0), "--format", "json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "broken"
    assert "Qwen/Qwen2.5-Math-1.5B" in report["bases"]
    (found,) = report["findings"]
    assert set(found) == {"id", "severity", "message", "evidence", "remedy"}
    assert "lora_alpha: expected other than 0, found alpha 0" in found["evidence"]


def test_text_report_starts_with_the_verdict(tmp_path, capsys):
    """A reader sees the verdict, then findings with evidence and remedy; no colour in a pipe."""
    check(write(tmp_path / "a", lora_alpha=0, _note="x"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("broken: ")
    assert [line.split()[0] for line in lines if line and line[0] in "ewi"] == ["error", "warning"]
    assert not any("\x1b" in line for line in lines)


def test_the_exit_code_covers_all_adapters_and_is_for_errors_only(tmp_path, capsys):
    """Of several adapters in a call, as a pre-commit hook passes them, one error is enough."""
    suspect, bad = write(tmp_path / "suspect", _note="x"), write(tmp_path / "bad", r=0)
    assert check(suspect) == 0
    assert check(suspect / "adapter_config.json", bad / "adapter_config.json") == 1
    assert capsys.readouterr().out.count("suspect: ") == 2


def test_every_entry_is_explained(capsys):
    """Every id has a complete entry, and --explain prints it."""
    for entry in catalogue().values():
        assert check("--explain", entry.id) == 0
        assert entry.severity in SEVERITIES
        assert all((entry.symptom, entry.cause, entry.settles, entry.remedy, entry.peft))
        assert entry.symptom in capsys.readouterr().out
    assert check("--explain", "nothing") == 2


def test_catalogue_is_the_contract():
    """The ids are those that other tools rely on."""
    assert " ".join(catalogue()) == (
        "shape-mismatch rank-mismatch missing-tensors unexpected-tensors key-prefix "
        "layer-out-of-range target-not-in-base scale-zero scale-unusual untrained non-finite "
        "overflow-risk integer-dtype empty-tensor corrupt-weights unsafe-pickle missing-weights "
        "config-invalid config-unknown-key base-name-mismatch name-size-conflict size-conflict "
        "vocab-mismatch base-weights-in-adapter dora-flag-lost modules-to-save-missing "
        "head-dropped quantized-base-mismatch init-rewrites-base "
        "serving-refuses serving-drops serving-rescales rows-not-saved saved-in-shards "
        "factors-transposed foreign-format side-file tied-weights-split target-unmatched"
    )


@pytest.mark.parametrize(("option", "spared"), [("", ()), ("--header-only", ("numpy",))])
def test_neither_torch_nor_transformers_is_imported(option, spared, tmp_path):
    """A check costs no deep-learning import, nor the hub's client for a folder, nor typer."""
    given = ["check", str(write(tmp_path / "a")), *filter(None, [option])]
    code = (
        "import sys\nfrom postmortem.cli import main\n"
        f"try: main({given!r})\nexcept SystemExit: pass\n"
        f"heavy = {{'torch', 'transformers', 'peft', 'huggingface_hub', 'pandas', *{spared}}}\n"
        "heavy |= {'typer', 'pydantic', 'rich'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64"]
)
def test_values_of_every_float(dtype, tmp_path):
    """NaN is found in every floating-point dtype, and a sound value is not taken for it."""
    folder, entries = write(tmp_path / "a"), header()
    for value, expected in ((0.25, {}), (float("nan"), {"non-finite": "error"})):
        tensors = {key: torch.full(entry["shape"], 0.25) for key, entry in entries.items()}
        tensors[list(entries)[3]].fill_(value)
        edit_tensors(
            folder, lambda _, t=tensors: {key: x.to(getattr(torch, dtype)) for key, x in t.items()}
        )
        assert ids(folder) == expected


def written(folder, class_name="Qwen2ForCausalLM", **options):
    """Write a tiny Qwen2 base and an adapter of it with PEFT."""
    model = sound.build("qwen2", class_name, folder / "base")
    sound.save(model, folder / "a", {"target_modules": ["q_proj", "o_proj"], **options})
    return folder / "a", str(folder / "base")


@pytest.mark.parametrize(
    ("silent", "expected"),
    [
        (["0.self_attn.q_proj.lora_B"], {"untrained": "info"}),
        (["q_proj.lora_B", "k_proj.lora_B"], {"untrained": "warning"}),
    ],
)
def test_partly_untrained_is_not_an_error(tmp_path, silent, expected):
    """One silent pair is information; half of them is a warning."""
    adapter, base = written(tmp_path, target_modules=["q_proj", "k_proj", "v_proj"])

    def silence(tensors):
        return {k: v * (not any(name in k for name in silent)) for k, v in tensors.items()}

    edit_tensors(adapter, silence)
    assert ids(adapter, base) == expected


@pytest.mark.parametrize(
    ("class_name", "changes", "expected"),
    [
        # It loads in silence, and its head does not.
        ("Qwen2ForSequenceClassification", {"task_type": "CAUSAL_LM"}, {"head-dropped": "error"}),
        # Without a task it is suspicious and no more.
        ("Qwen2Model", {}, {"key-prefix": "warning"}),
    ],
)
def test_an_adapter_of_another_class_than_its_base(tmp_path, class_name, changes, expected):
    """What is sound on its own class is told on a base that names a causal one."""
    adapter, base = written(tmp_path, class_name)
    assert ids(adapter, base) == {}
    edit_config(adapter, **changes)
    sound.rewrite(tmp_path / "base" / "config.json", architectures=["Qwen2ForCausalLM"])
    assert ids(adapter, base) == expected


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({}, {"bias": "lora_only"}, {"missing-tensors": "warning"}),
        ({"trainable_token_indices": [1, 2, 3]}, {}, {}),
        (
            {"trainable_token_indices": [1, 2, 3]},
            {"trainable_token_indices": [1, 2]},
            {"shape-mismatch": "error"},
        ),
        (
            {"trainable_token_indices": [1, 2, 3]},
            {"trainable_token_indices": None},
            {"unexpected-tensors": "error"},
        ),
    ],
)
def test_biases_and_tokens_are_those_of_the_config(tmp_path, options, changes, expected):
    """Biases that a config promises are missed, and token deltas have a row for each index."""
    adapter, base = written(tmp_path, **options)
    edit_config(adapter, **changes)
    assert ids(adapter, base) == expected


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
def test_faults_that_need_no_base(changes, expected, tmp_path):
    """Without a base, the configuration is held against the file's own tensors."""
    adapter, _ = written(tmp_path)
    edit_config(adapter, base_model_name_or_path="acme/unheard-of", **changes)
    assert ids(adapter) == expected


def test_lora_on_a_head_that_is_saved_whole(tmp_path):
    """Tensors that early PEFT put on a saved head are dropped today, and the head is loaded."""
    adapter, base = written(tmp_path, "Qwen2ForSequenceClassification")
    pair = {
        "base_model.model.score.lora_A.weight": torch.ones(4, 32),
        "base_model.model.score.lora_B.weight": torch.ones(2, 4),
    }
    edit_tensors(adapter, lambda tensors: tensors | pair)
    assert ids(adapter, base) == {"unexpected-tensors": "warning"}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((98, 32), {"vocab-mismatch": "error"}),
        ((96, 64), {"shape-mismatch": "error"}),
        ((96, 32), {}),
    ],
)
def test_saved_head_of_another_shape(shape, expected, tmp_path):
    """Rows tell the vocabulary, columns the width: another width is another base."""
    adapter, base = written(tmp_path, modules_to_save=["lm_head"])
    sound.rewrite(tmp_path / "base" / "config.json", tie_word_embeddings=False)
    key = "base_model.model.lm_head.weight"
    edit_tensors(adapter, lambda tensors: {**tensors, key: tensors[key].new_ones(shape)})
    assert ids(adapter, base) == expected
