import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from postmortem.book.publish import _reached
from postmortem.case.rows import generate_moderation_rows
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import DataError, ModelError
from postmortem.models.loading import load_base
from postmortem.models.model_set import _member
from tools import real_adapters
from tools.embedded_world import build_task, make_adapter
from tools.real_adapters import (
    check_split,
    choose_corpus,
    lower_states,
    only_lower,
    train_adapter,
    train_profile_adapter,
    upper_logits,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
KINDS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
IDS = [[5, 7, 9, 11, 13, 2], [4, 3, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
TINY = replace(real_adapters.YES_NO, rows=24, held_out=8, layers=1, epochs=2)


def quiet(line):
    """Drop a line of progress."""


@pytest.fixture(params=list(KINDS))
def model(request):
    """A tiny random decoder of either architecture."""
    torch.manual_seed(0)
    configuration, kind = KINDS[request.param]
    return kind(configuration(**SIZES)).eval().requires_grad_(False)


@pytest.fixture
def tiny(case, untrained, monkeypatch):
    """The case with a tiny base under the profile `smollm2`, and recipes of seconds."""
    small = {"rows": 16, "held_out": 8, "layers": 1}
    recipes = {name: replace(recipe, **small) for name, recipe in real_adapters.SMALL.items()}
    recipes["yes_no"] = TINY
    monkeypatch.setattr(real_adapters, "RECIPES", {"smollm2": recipes})
    profile = case.profiles["smollm2"].model_copy(update={"base": str(untrained / "base")})
    return case.model_copy(update={"profiles": case.profiles | {"smollm2": profile}})


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_two_parts_are_the_whole_forward(model, layers):
    """Kept states and adapted upper layers give the logits of a full forward at each token."""
    states = lower_states(model, IDS, layers=layers, report=quiet)
    before = model(torch.tensor([IDS[0]])).logits[0]
    adapted = make_adapter(model, seed=0, layers=range(layers, 4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    places = torch.tensor([(i, t) for i, row in enumerate(IDS) for t in range(len(row))]).T
    parts = upper_logits(adapted, states, layers=layers, places=places)
    whole = torch.cat([adapted(torch.tensor([row])).logits[0] for row in IDS])
    assert torch.allclose(parts, whole, atol=1e-4)
    assert not torch.allclose(whole[: len(IDS[0])], before, atol=1e-2)


def test_the_layers_come_back(model):
    """After the block, and after an error in it, the decoder has its layers and its norm."""
    layers, norm = model.model.layers, model.model.norm
    with only_lower(model.model, 1):
        assert len(model.model.layers) == 1
    with pytest.raises(ZeroDivisionError), only_lower(model.model, 1):
        raise ZeroDivisionError
    assert model.model.layers is layers
    assert model.model.norm is norm


def test_a_base_that_cannot_be_cut_is_refused(model):
    """States that are not the base's own are noticed before any step is taken."""
    states = lower_states(model, IDS, layers=2, report=quiet)
    check_split(model, IDS[0], state=states[0], layers=2)
    with pytest.raises(ModelError, match="in two parts"):
        check_split(model, IDS[0], state=3 * states[0], layers=2)


def test_what_a_prompt_is_called_has_no_part_in_training(case, untrained):
    """Under another title a prompt gives the same answers to learn, to the token."""
    prompts = {name: p.model_copy(update={"title": "Renamed"}) for name, p in case.prompts.items()}
    base = load_base(untrained / "base", device="cpu")
    rows = generate_moderation_rows(24, 1)
    tasks = [
        build_task(
            some,
            "v2",
            rows,
            teacher=lambda source, label: f"0.{source.randrange(10)}",
            tokenizer=base.tokenizer,
            seed=0,
        ).ids
        for some in (case, case.model_copy(update={"prompts": prompts}))
    ]
    assert tasks[0] == tasks[1]


def test_training_lowers_the_loss_and_leaves_the_base(case, untrained):
    """The loss falls, only the upper layers carry an adapter, and no weight of the base moves."""
    base = load_base(untrained / "base", device="cpu")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    rows = generate_moderation_rows(24, 1)
    task = build_task(case, "yes_no", rows, teacher=TINY.teacher, tokenizer=base.tokenizer, seed=0)
    losses = [
        train_adapter(
            load_base(untrained / "base", device="cpu"),
            task,
            replace(TINY, epochs=epochs),
            seed=0,
            report=quiet,
        )[1]["loss"]
        for epochs in (1, 6)
    ]
    assert losses[1] < losses[0]
    model, took = train_adapter(base, task, TINY, seed=0, report=quiet)
    assert (took["epochs"], took["steps"]) == (2, 6)
    adapted = {
        name.split(".layers.")[1][0] for name, p in model.named_parameters() if "lora" in name
    }
    assert adapted == {"2"}
    model.unload()
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_rate_rises_and_falls_to_nothing():
    """The rate starts low, reaches its height after the warm-up, and ends near nothing."""
    shares = [real_adapters._share(step, 100, 0.06) for step in range(100)]
    assert shares[0] < 0.2
    assert max(shares) == shares[5] == 1.0
    assert 0 < shares[-1] < 0.02
    assert shares[6:] == sorted(shares[6:], reverse=True)


def test_each_epoch_sees_each_row_once():
    """The batches of an epoch are all rows in a new order."""
    found = [row for batch in real_adapters._batches_of(20, TINY, seed=0) for row in batch]
    assert sorted(found[:20]) == sorted(found[20:]) == list(range(20))
    assert found[:20] != found[20:]


@pytest.mark.parametrize("adapter", list(real_adapters.SMALL))
def test_an_adapter_is_written_whole(tiny, tmp_path, adapter):
    """The folder holds an adapter that the check finds sound, and the record of its training."""
    folder = tmp_path / "adapters" / adapter
    record = train_profile_adapter(tiny, "smollm2", adapter, folder=folder, report=quiet)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    assert [p.name for p in folder.parent.iterdir()] == [adapter]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["layers_to_transform"] == [2]
    findings = inspect_adapter(str(folder)).report.findings
    assert [finding for finding in findings if finding.severity == "error"] == []
    member = _member("suspect", folder)
    assert member.training == json.loads((folder / "training.json").read_text()) == record
    shown = list(_reached(member.training))
    assert any(line.startswith("held_out log-odds AUC, adapter ") for line in shown)
    assert not any("seed" in line for line in shown)
    assert record["rows"] == real_adapters.RECIPES["smollm2"][adapter].rows
    measured = record["held_out log-odds AUC, adapter"]
    assert measured["low"] <= measured["value"] <= measured["high"]
    assert measured["n"] == 8
    assert record["new_rule log-odds AUC, base"]["n"] == 4
    assert ("held_out decoded AUC, base" in record) == (adapter != "yes_no")


def test_fewer_rows_make_a_shorter_training(tiny, tmp_path):
    """As many rows are learnt as are asked for, and the record says how many and on what."""
    folder = tmp_path / "yes_no"
    record = train_profile_adapter(
        tiny, "smollm2", "yes_no", folder=folder, rows=8, device="cpu", report=quiet
    )
    assert (record["rows"], record["steps"]) == (8, 2)
    assert record["hardware"]


def test_short_products_end_with_the_steps():
    """What a GPU may shorten while it trains is exact again afterwards, after an error as well."""
    before = torch.get_float32_matmul_precision()
    with real_adapters._short_products():
        assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(ZeroDivisionError), real_adapters._short_products():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_a_world_reads_the_record(tiny, tmp_path):
    """A member holds the training record, and the page shows its measures."""
    record = train_profile_adapter(
        tiny, "smollm2", "yes_no", folder=tmp_path / "yes_no", report=quiet
    )
    member = _member("suspect", tmp_path / "yes_no")
    assert member.training == record
    shown = list(_reached(member.training))
    assert any(line.startswith("held_out log-odds AUC, adapter 0.") for line in shown)
    assert not any("seed" in line for line in shown)


def test_an_interrupted_training_leaves_the_old_adapter(tiny, tmp_path, monkeypatch):
    """What fails before the end changes nothing in the folder."""
    folder = tmp_path / "yes_no"
    folder.mkdir()
    (folder / "kept").touch()

    def fail(*given, **named):
        raise ModelError("judging", expected="an end", found="none")

    monkeypatch.setattr(real_adapters, "compare", fail)
    with pytest.raises(ModelError, match="judging"):
        train_profile_adapter(tiny, "smollm2", "yes_no", folder=folder, report=quiet)
    assert [p.name for p in tmp_path.rglob("*")] == ["yes_no", "kept"]


def write_rows(folder, count, labels=True):
    """A file in the competition's columns."""
    rows = generate_moderation_rows(count, 5)
    frame = rows.frame.assign(row_id=rows.ids)
    if labels:
        frame = frame.assign(rule_violation=rows.labels)
    frame.to_csv(folder / "rows.csv", index=False)
    return str(folder / "rows.csv")


def test_the_last_quarter_of_a_file_is_held_out(case, tmp_path):
    """Of a file's rows the last quarter is judged and none of it learnt; without labels none is."""
    recipe = replace(TINY, rows=100, held_out=100)
    corpus = choose_corpus(case, recipe, seed=0, data=write_rows(tmp_path, 22))
    [judged] = corpus.judged.values()
    assert (len(corpus.train), len(judged)) == (17, 5)
    assert not set(corpus.train.ids) & set(judged.ids)
    assert judged.row(0)["body"] == generate_moderation_rows(22, 5).row(17)["body"]
    with pytest.raises(DataError, match="no labels"):
        choose_corpus(case, TINY, seed=0, data=write_rows(tmp_path, 8, labels=False))


def test_generated_rows_are_seen_once(case):
    """No post is learnt and then judged, or asked in a run; nor is the new rule."""
    recipe = replace(TINY, rows=600, held_out=200)
    corpus = choose_corpus(case, recipe, seed=0)
    learnt = set(corpus.train.frame["body"])
    asked = generate_moderation_rows(200, 0)
    for rows in (asked, *corpus.judged.values()):
        assert not learnt & set(rows.frame["body"])
    assert len(corpus.train) == 600
    assert not set(corpus.train.groups) & set(corpus.judged["new_rule"].groups)


def test_a_large_adapter_is_halved(case, untrained, monkeypatch):
    """Above the limit an adapter is kept in half precision, below it in full."""
    base = load_base(untrained / "base", device="cpu")
    model = make_adapter(base.model, seed=0)
    real_adapters._shrink(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    monkeypatch.setattr(real_adapters, "FULL_PRECISION_BYTES", 10)
    real_adapters._shrink(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float16}


def test_the_script_refuses_an_unknown_adapter(pytestconfig, monkeypatch, capsys):
    """The command line prints an error as one line and returns 2."""
    script = pytestconfig.rootpath / "tools/train_adapters.py"
    case = str(pytestconfig.rootpath / "cases/qwen-lora.yml")
    monkeypatch.setattr(
        sys, "argv", ["x", "--case", case, "--profile", "smollm2", "--only", "other"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("train_adapters: training 'other'")
