"""What the `qwen` profile does on a GPU, done on a CPU with a small model of the same kind."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from postmortem.case.prompts import encode
from postmortem.case.rows import generate_rows
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import FLOAT16_LIMIT, FLOAT16_ZERO, ModelError
from postmortem.experiments.ask import BASE, System, ask
from postmortem.models import loading as models
from postmortem.models.loading import GPTQ_PACKAGES, attached, load_base
from postmortem.models.scoring import score

DTYPES = ("float32", "bfloat16", "float16")
GROUP = 32
V_PROJ = "model.layers.0.self_attn.v_proj.weight"


def score_all(case, model, base):
    """Scores of four rows under the second prompt."""
    rows = generate_rows(4, 1)
    prompts = [
        encode(case.prompts["v2"], rows.row(i), tokenizer=base.tokenizer, limit=512)
        for i in range(len(rows))
    ]
    return score(model, base.tokenizer, prompts=prompts, lead="", max_new_tokens=3)


def edited(folder, target, change, file="adapter_model.safetensors"):
    """A copy of a model or adapter whose tensors went through a function of name and tensor."""
    shutil.copytree(folder, target)
    tensors = {name: change(name, value) for name, value in load_file(target / file).items()}
    save_file(tensors, target / file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_path_in_each_dtype(case, untrained, dtype):
    """Base, suspect and reference by path are loaded, told apart and scored, finite throughout."""
    base = load_base(untrained / "base", device="cpu", dtype=dtype)
    found = {"base": score_all(case, base.model, base)}
    for role in ("suspect", "reference"):
        with attached(base, untrained / role) as loaded:
            assert loaded.warnings == loaded.risks == ()
            found[role] = score_all(case, loaded.model, base)
    assert base.dtype == dtype
    for scores in found.values():
        assert np.isfinite(scores.first_log_probs).all()
        assert np.exp(scores.first_log_probs).sum(1) == pytest.approx(np.ones(4))
    spread = [scores.number_log_probs for scores in found.values()]
    assert np.ptp(np.stack(spread), axis=0).max() > 0.1
    assert not np.array_equal(spread[1], spread[2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_as_full_precision_does(case, untrained, dtype):
    """Sixteen bits move the read-outs of a sound base by less than its adapters do."""
    full, half = (load_base(untrained / "base", device="cpu", dtype=d) for d in ("float32", dtype))
    exact, rounded = (score_all(case, b.model, b).number_log_probs for b in (full, half))
    with attached(full, untrained / "suspect") as loaded:
        moved = score_all(case, loaded.model, full).number_log_probs
    assert np.abs(rounded - exact).max() < np.abs(moved - exact).max() / 2


def test_weights_beyond_float16_are_refused(untrained, tmp_path):
    """A base with a value that float16 cannot hold is refused by tensor, value and remedy."""
    big = edited(
        untrained / "base",
        tmp_path / "big",
        lambda name, value: value.float().add(1e5 if name == V_PROJ else 0).bfloat16(),
        "model.safetensors",
    )
    with pytest.raises(ModelError, match=rf"{V_PROJ}: .*65504.*9.98e\+04.*DTYPE=bfloat16"):
        load_base(big, device="cpu", dtype="float16")
    assert load_base(big, device="cpu", dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("factor", "said"), [(1e6, "update norm"), (1e-12, "which float16 rounds to zero")]
)
def test_an_update_out_of_range_is_a_warning_in_float16(untrained, tmp_path, factor, said):
    """An adapter too large or too small for float16 is named on such a base, and on no other."""
    adapter = edited(
        untrained / "suspect", tmp_path / "a", lambda n, v: v * factor if "lora_B" in n else v
    )
    with attached(load_base(untrained / "base", device="cpu", dtype="float16"), adapter) as loaded:
        (risk,) = loaded.risks
    assert said in risk
    assert "lora_B" in risk
    assert "DTYPE=bfloat16" in risk
    with attached(load_base(untrained / "base", device="cpu", dtype="bfloat16"), adapter) as loaded:
        assert loaded.risks == ()


def test_activations_that_overflow_are_a_finding(session, untrained, tmp_path):
    """In float16, an adapter whose read-outs are not finite lacks them, and the risk is said."""
    adapter = edited(
        untrained / "suspect", tmp_path / "a", lambda n, v: v * 1e6 if "lora_B" in n else v
    )
    session.dtype = "float16"
    answers = ask(session, System("suspect", adapter), "v2")
    assert answers.lacking == "log-odds that are not finite on 8 of 8 rows"
    said = session.records_path.with_suffix(".progress").read_text()
    assert "suspect: float16 cannot hold this adapter" in said


def test_a_base_that_overflows_stops_the_session(session):
    """In float16, a base whose read-outs are not finite is one error, which says what to give."""
    session.dtype = "float16"
    with torch.no_grad():
        session.base.model.get_input_embeddings().weight.mul_(6e4)
    with pytest.raises(ModelError, match=r"base on v2: .*of 8 rows, in float16.*DTYPE=bfloat16"):
        ask(session, BASE, "v2")


def test_the_loader_and_the_check_of_files_agree(untrained, tmp_path):
    """Around the limit, the loader warns of exactly the adapters that the check finds at risk."""
    # At the limit of the small end torch rounds to zero, and just above it does not.
    values = torch.tensor([FLOAT16_ZERO, FLOAT16_ZERO * 1.001], dtype=torch.float64)
    assert (values.half() == 0).tolist() == [True, False]
    base = load_base(untrained / "base", device="cpu", dtype="float16")
    with attached(base, untrained / "suspect") as loaded:
        modules = [m for m in loaded.model.modules() if hasattr(m, "lora_B")]
        norms = [
            m.scaling["default"]
            * float(m.lora_A["default"].weight.norm() * m.lora_B["default"].weight.norm())
            for m in modules
        ]
    verdicts = []
    for number, share in enumerate((0.98, 1.02)):
        factor = share * FLOAT16_LIMIT / max(norms)
        adapter = edited(
            untrained / "suspect",
            tmp_path / str(number),
            lambda n, v, factor=factor: v * factor if "lora_B" in n else v,
        )
        report = inspect_adapter(str(adapter), str(untrained / "base")).report
        risk = any(finding.id == "overflow-risk" for finding in report.findings)
        with attached(base, adapter) as loaded:
            assert bool(loaded.risks) == risk
        verdicts.append(risk)
    assert verdicts == [False, True]


def pack(codes):
    """Eight four-bit codes of one column in each int32, the first in the lowest bits."""
    packed = sum(codes[place::8].long() << (4 * place) for place in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().contiguous()


def quantise(folder, target):
    """Write a base in GPTQ's format, rounded to nearest, and return what its weights now are."""
    shutil.copytree(folder, target)
    saved, rounded = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            saved[name] = rounded[name] = value.half()
            continue
        groups = value.float().T.reshape(-1, GROUP, value.shape[0])
        scales = (groups.abs().amax(1) / 7).half()
        codes = (groups / scales.float()[:, None]).round().clamp(-8, 7)
        rounded[name] = (codes * scales.float()[:, None]).reshape(value.T.shape).T.contiguous()
        path = name.removesuffix(".weight")
        saved[f"{path}.qweight"] = pack((codes.long() + 8).reshape(value.T.shape))
        # The format stores zero points less one.
        zeros = torch.full(scales.shape, 7)
        saved[f"{path}.qzeros"] = pack(zeros.T.contiguous()).T.contiguous()
        saved[f"{path}.scales"] = scales
        saved[f"{path}.g_idx"] = (torch.arange(value.shape[1]) // GROUP).int()
    save_file(saved, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        # The other CPU kernels are compiled at first use, which takes minutes.
        "backend": "torch",
    }
    (target / "config.json").write_text(json.dumps(config))
    return rounded


def test_a_quantised_base_names_the_packages_that_it_needs(untrained, tmp_path, monkeypatch):
    """Without its packages a GPTQ base is refused with their names and the command for them."""
    quantise(untrained / "base", tmp_path / "gptq")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"no optimum and no gptqmodel.*pip install.*\[gptq\]"):
        load_base(tmp_path / "gptq", device="cpu")


# The library leaves temporary folders to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_quantised_base_answers_as_its_rounded_weights_do(case, untrained, tmp_path):
    """A GPTQ base, alone and with the reference, scores as a plain base with the same weights."""
    for name in GPTQ_PACKAGES:
        pytest.importorskip(name)
    rounded = quantise(untrained / "base", tmp_path / "gptq")
    plain = load_base(untrained / "base", device="cpu", dtype="float32")
    plain.model.load_state_dict(rounded, strict=False)
    base = load_base(tmp_path / "gptq", device="cpu", dtype="float32")
    expected, found = (score_all(case, b.model, b).number_log_probs for b in (plain, base))
    assert found == pytest.approx(expected, abs=0.02)
    with attached(base, untrained / "reference") as loaded:
        adapted = score_all(case, loaded.model, base).number_log_probs
    with attached(plain, untrained / "reference") as loaded:
        expected = score_all(case, loaded.model, plain).number_log_probs
    assert adapted == pytest.approx(expected, abs=0.02)
    assert np.abs(adapted - found).max() > 0.1
    assert np.array_equal(score_all(case, base.model, base).number_log_probs, found)
