import re
from dataclasses import replace

import pytest
from handmade import write

from postmortem.checker.adapter import Adapter, Tensor, open_source, read_adapter
from postmortem.checker.bases import BaseModel, describe, find_base, known_bases
from postmortem.checker.checks import check
from postmortem.checker.config import sort_keys
from postmortem.checker.fit import find_targets
from postmortem.checker.identify import identify

# A base of each family, and a size of it that another model has.
FAMILIES = {
    "Qwen/Qwen3-30B-A3B": {"hidden_size": 4096},
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {"linear_num_value_heads": 16},
    "Qwen/Qwen3.5-4B": {"hidden_size": 4096},
    "Qwen/Qwen3.5-35B-A3B": {"num_attention_heads": 32},
    "meta-llama/Llama-3.3-70B-Instruct": {"num_key_value_heads": 16},
    "meta-llama/Llama-4-Scout-17B-16E": {"hidden_size": 4096},
    "google/gemma-3-27b-it": {"hidden_size": 3840},
    "google/gemma-4-E2B": {"hidden_size": 2560},
    "google/gemma-4-31B": {"global_head_dim": 256},
    "google/gemma-4-26B-A4B": {"intermediate_size": 6144},
    "mistralai/Mixtral-8x7B-v0.1": {"hidden_size": 6144},
    "mistralai/Ministral-3-8B-Base-2512": {"intermediate_size": 9216},
    "openai/gpt-oss-20b": {"num_attention_heads": 32},
    "zai-org/GLM-4-9B-0414": {"num_key_value_heads": 4},
    "zai-org/GLM-4.5-Air": {"hidden_size": 5120},
    "zai-org/GLM-4.7-Flash": {"q_lora_rank": 1536},
    "deepseek-ai/DeepSeek-V2-Lite": {"kv_lora_rank": 256},
    "deepseek-ai/DeepSeek-V3": {"v_head_dim": 192},
    "ibm-granite/granite-3.3-8b-instruct": {"intermediate_size": 8192},
    "ibm-granite/granite-3.1-3b-a800m-instruct": {"hidden_size": 1024},
    "allenai/Olmo-3-1025-7B": {"hidden_size": 5120},
    "allenai/OLMoE-1B-7B-0125": {"num_attention_heads": 32, "head_dim": 128},
}


def described(name: str, **changes: object) -> BaseModel:
    """Describe a known base, or one that differs from it."""
    known = find_base(name)
    assert known is not None
    base = describe({**known.config, **changes}, name=name, kind="causal")
    assert base is not None
    return base


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Read an adapter whose configuration the others take over."""
    return read_adapter(open_source(str(write(tmp_path_factory.mktemp("made") / "a"))))


def made_for(base: BaseModel, example: Adapter) -> Adapter:
    """Make the header that PEFT would write for every linear module of a base."""
    assert example.config is not None
    config = replace(example.config, target_modules="all-linear", base_name=base.name, r=2)
    tensors = {}
    for path, target in find_targets(config, base).items():
        for part, shape in target.shapes(config).items():
            sizes = tuple(size or 0 for size in shape)
            tensors[f"base_model.model.{path}.{part}.weight"] = Tensor("F32", sizes, 0, 0)
    return replace(example, config=config, tensors=tensors, contents=sort_keys(tensors))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_the_base_fits(name: str, example: Adapter) -> None:
    """An adapter of a base's own shapes has no finding on it, and identify names the base."""
    adapter = made_for(described(name), example)
    report = check(adapter, described(name))
    assert [f for f in report.findings if f.severity != "info"] == []
    assert name in identify(adapter).fits


@pytest.mark.parametrize(("name", "changes"), FAMILIES.items())
def test_an_adapter_of_another_size_does_not_fit(
    name: str, changes: dict[str, int], example: Adapter
) -> None:
    """An adapter of a base of another size is an error, and identify excludes the base."""
    adapter = made_for(described(name, **changes), example)
    report = check(adapter, described(name))
    assert "shape-mismatch" in {f.id for f in report.findings}
    assert name not in identify(adapter).fits


def parameters(base: BaseModel) -> int:
    """Count what a description says of a model's weights: all but norms and convolutions."""
    counts = {p: (m.inputs or 0) * (m.outputs or 0) for p, m in base.modules.items()}
    total = sum(n for p, n in counts.items() if not (base.ties_weights and p.endswith("lm_head")))
    if base.experts is None:
        return total
    one = 3 * base.experts.width * base.experts.inner
    return total + len(base.experts.paths) * base.experts.count * one


def stated_sizes(model_id: str) -> list[str]:
    """Read the billions of parameters that a name states."""
    return re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)B", model_id)


# Two sizes are those of a mixture whose first is not the sum, and so is the first of Llama 4.
SIZED = [
    b for b in known_bases() if len(stated_sizes(b.model_id)) == 1 and "Llama-4" not in b.model_id
]


@pytest.mark.parametrize("known", SIZED, ids=lambda known: known.model_id)
def test_a_row_has_the_size_of_its_name(known) -> None:
    """The parameters of a row add up to the billions that its name states, roughly."""
    (stated,) = stated_sizes(known.model_id)
    base = describe(known.config, name=known.model_id, kind=None)
    assert base is not None
    assert parameters(base) / 1e9 == pytest.approx(float(stated), rel=0.25, abs=0.7)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unsloth/gpt-oss-20b-unsloth-bnb-4bit", "openai/gpt-oss-20b"),
        ("mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit", "Qwen/Qwen3-30B-A3B"),
        ("google/gemma-4-E2B-it", "google/gemma-4-E2B"),
        ("unsloth/gemma-4-31B-it-unsloth-bnb-4bit", "google/gemma-4-31B"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Scout-17B-16E"),
        ("Qwen/Qwen3.5-27B-FP8", "Qwen/Qwen3.5-27B"),
        ("unsloth/Llama-3.3-70B-Instruct-bnb-4bit", "meta-llama/Llama-3.3-70B-Instruct"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3"),
        ("THUDM/glm-4-9b-chat", None),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", "Qwen/Qwen2.5-72B-Instruct-AWQ"),
    ],
)
def test_copies_resolve(name: str, expected: str | None) -> None:
    """Copies and tuned siblings find their row; what is of another architecture does not."""
    found = find_base(name)
    assert (found.model_id if found else None) == expected
