import json
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from handmade import CONFIG, SMALL

from postmortem.checker.adapter import open_source, read_adapter
from postmortem.checker.bases import describe
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import ModelError, catalogue
from postmortem.checker.serving import (
    CONDITIONS,
    EFFECTS,
    ServedAdapter,
    Serving,
    find_places,
    read_added_tokens,
    rules,
    runtimes,
    tabulate,
)

BASE = {**SMALL, "model_type": "llama"}
# Module -> its inputs and outputs.
MODULES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}
TARGETS = [path.rpartition(".")[2] for path in MODULES]
PREFIX, LAYERS = "base_model.model.", "base_model.model.model.layers."
Shapes = dict[str, tuple[int, ...]]


def pair(path: str, inputs: int = 32, outputs: int = 32, rank: int = 16) -> Shapes:
    """The shapes of lora_A and lora_B of one module."""
    return {f"{path}.lora_A.weight": (rank, inputs), f"{path}.lora_B.weight": (outputs, rank)}


def sound() -> Shapes:
    """The shapes of an adapter that every runtime but Ollama and mlx-lm serves as PEFT does."""
    found: Shapes = {}
    for layer in range(2):
        for path, (inputs, outputs) in MODULES.items():
            found |= pair(f"{LAYERS}{layer}.{path}", inputs, outputs)
    return found


def without(part: str) -> Shapes:
    """The sound shapes but those whose key has a part."""
    return {key: shape for key, shape in sound().items() if part not in key}


def renamed(old: str, new: str) -> Shapes:
    """The sound shapes with a part of each key replaced."""
    return {key.replace(old, new): shape for key, shape in sound().items()}


EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": (16, 96),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": (32, 16),
}
HEAD, WHOLE_HEAD = pair(f"{PREFIX}lm_head", 32, 96), {f"{PREFIX}lm_head.weight": (96, 32)}
NORM = {f"{LAYERS}0.input_layernorm.weight": (32,)}
TOWER = pair(f"{PREFIX}model.visual.blocks.0.attn.qkv")
TEXT_LIKE_TOWER = pair(f"{PREFIX}model.vision_tower.encoder.layers.0.self_attn.q_proj")
MAGNITUDE = {f"{LAYERS}0.mlp.experts.0.down_proj.lora_magnitude_vector": (32,)}
EXPERTS = pair(f"{LAYERS}0.mlp.experts.0.w1", rank=8) | pair(f"{LAYERS}0.mlp.experts.1.w1")
MIXTURE = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 48}
QUERY = f"{LAYERS}0.self_attn.q_proj"

# Trait of a rule, or a runtime and its trait -> what gives an adapter this trait.
CASES: dict[str, dict[str, Any]] = {
    "r, lora_alpha or target_modules absent": {"removed": "lora_alpha"},
    "a rank over the server's limit": {"config": {"r": 17}},
    "a rank over 512": {"config": {"rank_pattern": {"q_proj": 513}}},
    "bias": {"config": {"bias": "lora_only"}},
    "use_dora": {"config": {"use_dora": True}},
    "lora_bias": {"config": {"lora_bias": True}},
    "aLoRA, BD-LoRA or QALoRA": {"config": {"use_qalora": True}},
    "tensorrt-llm aLoRA, BD-LoRA or QALoRA": {"config": {"alora_invocation_tokens": [1, 2]}},
    "options of LoRA that are not read": {"config": {"use_bdlora": {"nblocks": 2}}},
    "layer_replication": {"config": {"layer_replication": [[0, 2], [1, 2]]}},
    "an initialisation that changes the base": {"config": {"init_lora_weights": "pissa_niter_4"}},
    "modules_to_save other than a head": {"config": {"modules_to_save": ["score", "lm_head"]}},
    "modules_to_save": {"config": {"modules_to_save": ["score"]}},
    "a classification head on a causal base": {
        "shapes": {**sound(), f"{PREFIX}score.weight": (2, 32)},
        "base": {"architectures": ["LlamaForCausalLM"]},
    },
    "tensors other than lora_A and lora_B": {"shapes": renamed(".weight", ".default.weight")},
    "a whole output matrix": {"shapes": sound() | WHOLE_HEAD},
    "base_layer weights of the embedding or the output": {
        "shapes": {**sound(), f"{PREFIX}lm_head.base_layer.weight": (96, 32)}
    },
    "base_layer weights of adapted modules": {
        "shapes": {**sound(), f"{QUERY}.base_layer.weight": (32, 32)}
    },
    "biases or base weights of adapted modules": {
        "shapes": {**sound(), f"{QUERY}.lora_B.bias": (32,)}
    },
    "vllm LoRA on the embedding or the output": {
        "shapes": sound() | EMBEDDING,
        "base": {"model_type": "qwen2"},
    },
    "llama.cpp LoRA on the embedding or the output": {
        "shapes": sound() | HEAD,
        "base": {"model_type": "gemma2"},
    },
    "LoRA on the embedding or the output": {"shapes": sound() | HEAD},
    "embedding or output outside target_modules": {"shapes": sound() | EMBEDDING},
    "paths that the served model lacks": {"shapes": renamed(f"{PREFIX}model.", PREFIX)},
    "text paths on a multimodal base": {"base": {"model_type": "qwen2_5_vl"}},
    "LoRA on a vision or audio tower": {"shapes": sound() | TOWER},
    "tower and text layers of one index": {"shapes": sound() | TEXT_LIKE_TOWER},
    "paths without layers.<i>": {"shapes": sound() | TOWER},
    "tensors smaller than the base's": {"base": {"hidden_size": 64, "head_dim": 8}},
    "a tensor's rank that is not configured": {"config": {"r": 8}},
    "a tensor's rank other than r": {"shapes": sound() | pair(QUERY, rank=8)},
    "experts of unequal rank in a layer": {"shapes": sound() | EXPERTS},
    "no module that the server was told to adapt": {
        "serving": Serving(("vllm",), target_modules=("qkv_proj",))
    },
    "no tensor at all": {"shapes": {}},
    "lora_alpha absent": {"removed": "lora_alpha"},
    "LoRA on an output tied to the embedding": {
        "shapes": sound() | HEAD,
        "base": {"tie_word_embeddings": True},
    },
    "llama.cpp paths that the served model lacks": {
        "shapes": renamed(f"{PREFIX}model.", f"{PREFIX}model.model.")
    },
    "experts adapted in part": {
        "shapes": sound() | pair(f"{LAYERS}0.mlp.experts.1.down_proj", 48, 32),
        "base": MIXTURE,
    },
    "llama.cpp experts of unequal rank in a layer": {
        "shapes": sound() | EXPERTS,
        "base": MIXTURE,
    },
    "rank_pattern or alpha_pattern": {"config": {"alpha_pattern": {"q_proj": 64}}},
    "rank_pattern": {"config": {"rank_pattern": {"q_proj": 32}}},
    "alpha_pattern": {"config": {"alpha_pattern": {"q_proj": 64}}},
    "use_rslora": {"config": {"use_rslora": True}},
    "no peft_type": {"removed": "peft_type"},
    "target_modules as a regex": {"config": {"target_modules": ".*_proj"}},
    "target_modules null": {"config": {"target_modules": None}},
    "modules that the runtime does not know": {
        "shapes": sound() | pair(f"{LAYERS}0.mlp.router.fc1")
    },
    "added tokens beyond the vocabulary": {"files": {"added_tokens.json": {"<x>": 96}}},
    "q_proj without v_proj in a layer": {"shapes": without("1.self_attn.v_proj")},
    "k_proj or v_proj without q_proj in a layer": {"shapes": without("1.self_attn.q_proj")},
    "up_proj without gate_proj in a layer": {"shapes": without("1.mlp.gate_proj")},
    "layers that the base lacks": {"base": {"num_hidden_layers": 1}},
    "norms": {"shapes": sound() | NORM},
    "lora_alpha of 0": {"config": {"lora_alpha": 0}},
    "lora_A without lora_B, or the reverse": {"shapes": without("1.self_attn.o_proj.lora_B")},
    "LoRA on fused experts": {"shapes": sound() | pair(f"{LAYERS}0.mlp.experts")},
    "vllm LoRA on fused experts": {
        "shapes": sound() | pair(f"{LAYERS}0.mlp.experts"),
        "base": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 48},
    },
    "no usable base name": {"config": {"base_model_name_or_path": "/data/run-7/base"}},
    "only a pickle": {"is_pickle": True},
    "a module adapted in some layers only": {"shapes": without("1.mlp.up_proj")},
    "ranks that differ between layers": {"shapes": sound() | pair(QUERY, rank=8)},
    "a rank that is padded": {"config": {"r": 12}},
    "a folder as PEFT writes it": {},
    "another base than Llama or Gemma 2": {"base": {"model_type": "qwen2"}},
    "lora_alpha that is no whole number": {"config": {"lora_alpha": 22.6}},
    "DoRA on experts": {"shapes": sound() | MAGNITUDE},
}


def write(
    folder: Path,
    *,
    shapes: Shapes | None = None,
    config: dict[str, Any] | None = None,
    removed: str = "",
    files: dict[str, Any] | None = None,
    is_pickle: bool = False,
) -> Path:
    """Write an adapter for the tiny base, changed as a case says."""
    folder.mkdir()
    settings = {**CONFIG, "r": 16, "lora_alpha": 32, "target_modules": TARGETS, **(config or {})}
    settings.pop(removed, None)
    for name, content in {"adapter_config.json": settings, **(files or {})}.items():
        (folder / name).write_text(json.dumps(content))
    entries, position = {}, 0
    for key, shape in (sound() if shapes is None else shapes).items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        offsets = [position, position + size]
        entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
        position += size
    text = json.dumps(entries).encode()
    body = struct.pack("<Q", len(text)) + text + b"\x01\x20" * (position // 2)
    name, content = ("bin", b"\x80\x02") if is_pickle else ("safetensors", body)
    (folder / f"adapter_model.{name}").write_bytes(content)
    return folder


def read(folder: Path, base: dict[str, Any], serving: Serving) -> ServedAdapter:
    """What the rules are applied to."""
    source = open_source(str(folder))
    adapter = read_adapter(source)
    assert adapter.config is not None
    model = describe({**BASE, **base}, name="tiny", kind="causal")
    return ServedAdapter(adapter, adapter.config, model, serving, read_added_tokens(source))


def of_rule(rule) -> dict[str, Any]:
    """What gives an adapter the trait of a rule."""
    return CASES.get(f"{rule.runtime} {rule.trait}") or CASES[rule.trait]


NAMED = {f"{rule.runtime} {rule.versions} {rule.effect}: {rule.trait}": rule for rule in rules()}


@pytest.mark.parametrize("rule", NAMED.values(), ids=NAMED)
def test_an_adapter_with_the_trait_is_found_and_a_sound_one_is_not(rule, tmp_path):
    """Each rule finds an adapter that has its trait, and passes one that has not."""
    case = dict(of_rule(rule))
    base, serving = case.pop("base", {}), case.pop("serving", Serving())
    found = find_places(rule, read(write(tmp_path / "a", **case), base, serving))
    assert found
    # Ollama refuses each folder that PEFT writes; mlx-lm those that are not its own.
    own = {"config": {"num_layers": 2}} if rule.runtime == "mlx-lm" else {}
    fits = read(write(tmp_path / "b", **own), {}, Serving())
    assert find_places(rule, fits) == (found if rule.condition == "always" else [])


@pytest.mark.parametrize(
    ("trait", "serving"),
    [
        ("a rank over the server's limit", Serving(max_lora_rank=32)),
        ("LoRA on a vision or audio tower", Serving(tower_lora=True)),
    ],
)
def test_a_server_that_is_told_to_serves_it(trait, serving, tmp_path):
    """A condition that a server's setting lifts is no finding under that setting."""
    rule = next(r for r in rules() if (r.runtime, r.trait) == ("vllm", trait))
    assert find_places(rule, read(write(tmp_path / "a", **CASES[trait]), {}, serving)) == []


@pytest.mark.parametrize(("rank", "devices", "is_padded"), [(8, 1, False), (8, 2, True)])
def test_ranks_are_padded_by_the_number_of_devices(rank, devices, is_padded, tmp_path):
    """TGI's padding depends on how many devices share a layer."""
    rule = next(r for r in rules() if r.condition == "padded rank")
    serving = Serving(("tgi",), tensor_parallel=devices)
    subject = read(write(tmp_path / "a", config={"r": rank}), {}, serving)
    assert bool(find_places(rule, subject)) is is_padded


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_either_half_of_a_pair_is_missed(part, tmp_path):
    """llama.cpp's converter stops at a lora_B without lora_A as at the reverse."""
    rule = next(r for r in rules() if r.condition == "half pair")
    folder = write(tmp_path / "a", shapes=without(f"1.self_attn.o_proj.{part}"))
    assert find_places(rule, read(folder, {}, Serving()))


@pytest.mark.parametrize(
    ("shapes", "model_type", "effect"),
    [
        (WHOLE_HEAD, "gemma2", "drops"),
        ({f"{PREFIX}lm_head.modules_to_save.default.weight": (96, 32)}, "gemma2", "refuses"),
        ({f"{LAYERS}0.input_layernorm.modules_to_save.x.weight": (32,)}, "llama", "refuses"),
        (pair(f"{PREFIX}model.patch_embed.proj"), "llama", "drops"),
    ],
)
def test_what_the_converter_filters_is_no_refusal(shapes, model_type, effect, tmp_path):
    """llama.cpp's converter drops names before it looks at their ending, and stops at others."""
    subject = read(
        write(tmp_path / "a", shapes=sound() | shapes), {"model_type": model_type}, Serving()
    )
    assert {r.effect for r in rules() if r.runtime == "llama.cpp" and find_places(r, subject)} == {
        effect
    }


def test_the_table_is_complete():
    """Each row names a known condition and effect, has words for all, and is the only one such."""
    assert {rule.condition.partition(": ")[0] for rule in rules()} == set(CONDITIONS)
    assert {rule.effect for rule in rules()} == set(EFFECTS)
    assert {rule.verified for rule in rules()} == {"run", "yes", "no"}
    assert all(rule.happens and rule.remedy and rule.source for rule in rules())
    same = Counter((rule.runtime, rule.versions, rule.effect, rule.trait) for rule in rules())
    assert max(same.values()) == 1
    assert set(CASES) <= {r.trait for r in rules()} | {f"{r.runtime} {r.trait}" for r in rules()}


def inspect(folder, *names):
    """The findings of a check for runtimes, against the tiny base."""
    base = folder.parent / "config.json"
    base.write_text(json.dumps({**BASE, "_name_or_path": CONFIG["base_model_name_or_path"]}))
    return inspect_adapter(str(folder), str(base), serving=Serving(names)).report


def test_a_refusal_is_an_error_of_a_runtime_that_was_named(tmp_path):
    """The same refusal is information among all runtimes, an error where one was asked for."""
    folder = write(tmp_path / "a")
    assert inspect(folder).verdict == "fits"
    assert [f.severity for f in inspect(folder, "all").findings] == ["info", "info"]
    named = inspect(folder, "mlx-lm", "vllm")
    assert (named.verdict, [f.severity for f in named.findings]) == ("broken", ["error"])


def test_a_finding_names_runtime_version_condition_and_remedy(tmp_path):
    """The remedy for rank-stabilised scale is a number: alpha times the root of r."""
    folder = write(tmp_path / "a", config={"use_rslora": True})
    (found,) = inspect(folder, "sglang").findings
    assert (found.id, found.severity) == ("serving-rescales", "warning")
    assert found.evidence.startswith("use_rslora: True: sglang 0.5.23 divides alpha by r")
    assert "lora_alpha to 128," in found.remedy


def test_what_was_not_verified_says_so(tmp_path):
    """A rule that was inferred from a runtime's source is marked in the finding."""
    (found,) = inspect(write(tmp_path / "a", config={"r": 12}, shapes={}), "tgi").findings[-1:]
    assert found.evidence.endswith("(read in the source, not run)")


def test_what_newer_versions_do_otherwise_is_information(tmp_path):
    """A rule of past versions is no warning."""
    folder = write(tmp_path / "a", config={"alpha_pattern": {"q_proj": 64}})
    (found,) = inspect(folder, "vllm").findings
    assert (found.severity, "up to 0.31" in found.evidence) == ("info", True)


def test_without_a_usable_configuration_no_rule_is_applied(tmp_path):
    """An unusable configuration is its own finding, and a note says what was not done."""
    report = inspect(write(tmp_path / "a", config={"r": 0}), "all")
    assert {found.id for found in report.findings} == {"config-invalid"}
    assert any("runtimes" in note for note in report.notes)


def test_an_unknown_runtime_is_refused():
    """Whoever misspells a runtime is told which there are."""
    with pytest.raises(ModelError, match="expected one of vllm, sglang"):
        Serving(("vlm",))


@pytest.mark.parametrize("content", [[1], {"<x>": "96"}, {"<x>": True}])
def test_tokens_of_another_form_are_none(content, tmp_path):
    """A hostile list of tokens is read as an empty one."""
    folder = write(tmp_path / "a", files={"added_tokens.json": content})
    assert read_added_tokens(open_source(str(folder))) == -1


@pytest.mark.parametrize("effect", EFFECTS)
def test_each_effect_has_an_entry_and_a_table(effect):
    """Each effect is a finding of the catalogue, and its table has a column for each runtime."""
    assert f"serving-{effect}" in catalogue()
    table = tabulate([rule for rule in rules() if rule.effect == effect], lambda rule: "x")
    assert all(len(row) == len(runtimes()) and any(row) for row in table.values())


@pytest.mark.parametrize("part", ["1.", "layers.1.", "layernorm", "experts.", ".norm", "lm_head."])
def test_long_names_are_searched_in_linear_time(part, tmp_path):
    """A name of a million characters is searched by every rule; in squared time none would end."""
    key = f"{LAYERS}0.{part * (1_000_000 // len(part))}lora_A.weight"
    folder = write(tmp_path / "a", shapes={key: (16, 1)})
    command = [sys.executable, "-m", "postmortem", "check", str(folder), "--for", "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith(("broken: ", "unchecked: "))
