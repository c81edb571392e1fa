import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from postmortem.case.prompts import Prompt
from postmortem.diagnosis.causes import (
    CAUSES,
    Materials,
    Unavailable,
    _integer_part,
    _rounded,
    _split_layer,
    _two_decimals,
)
from postmortem.models.loading import attached, load_base
from postmortem.models.model_set import digest_model

EVERY = [(name, severity) for name, cause in CAUSES.items() for severity in cause.severities]


@pytest.fixture(scope="module")
def base(untrained):
    """The untrained base, loaded once."""
    return load_base(untrained / "base", device="cpu")


@pytest.fixture
def materials(untrained_world, base, tmp_path):
    """What causes on the silent base are made from."""
    return Materials(untrained_world, "base", base, "silent", 0, tmp_path)


def inject(materials, name, severity=None):
    """One cause at one severity, by default its plainest."""
    cause = CAUSES[name]
    return cause.inject(materials, cause.severities[severity or next(iter(cause.severities))])


def logits(base, adapter, ids=(5, 6, 7), **options):
    """Logits of one short input with an adapter on the base."""
    with attached(base, adapter, **options) as loaded, torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([ids])).logits


def test_there_are_at_least_sixteen_causes_and_one_sound_run():
    """Sixteen causes or more stand beside the sound run, each with a title of its own."""
    assert len(CAUSES) - 1 >= 16
    assert next(iter(CAUSES)) == "healthy"
    assert len({cause.title for cause in CAUSES.values()}) == len(CAUSES)


@pytest.mark.parametrize(("name", "severity"), EVERY)
def test_a_cause_changes_neither_the_base_nor_the_worlds_files(materials, base, name, severity):
    """Injecting leaves the shared base and the folders of the world as they were."""
    before = copy.deepcopy(base.model.state_dict())
    folders = {member.path: member.digest for member in materials.world.replays.values()}
    run = inject(materials, name, severity)
    assert run.adapter is None or materials.scratch in run.adapter.parents
    assert all(torch.equal(before[k], v) for k, v in base.model.state_dict().items())
    assert all(digest_model_of(path) == digest for path, digest in folders.items())
    assert not hasattr(base.model, "peft_config")


def digest_model_of(path):
    """The digest of a folder by its path."""
    from pathlib import Path

    return digest_model(Path(path))


def test_a_sound_run_is_the_same_function_at_every_severity(materials, base):
    """Another alpha with a lora_B that makes up for it changes nothing."""
    found = [
        logits(base, inject(materials, "healthy", severity).adapter)
        for severity in CAUSES["healthy"].severities
    ]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["zero-b", "alpha-zero", "key-prefix", "other-shapes-ignored"])
def test_causes_without_effect_leave_the_base_as_it_answers(materials, base, name):
    """Every severity of a cause that amounts to no adapter gives the base's own logits."""
    with torch.inference_mode():
        alone = base.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    for severity in CAUSES[name].severities:
        run = inject(materials, name, severity)
        ignored = {"ignore_mismatched_sizes": run.ignore_mismatched_sizes}
        torch.testing.assert_close(logits(base, run.adapter, **ignored), alone)


@pytest.mark.parametrize("severity", list(CAUSES["scale-up"].severities))
def test_scaling_up_and_down_undo_each_other(materials, base, severity):
    """The adapter's change in the first layer grows by the factor that the severity names."""
    factor = float(severity.removeprefix("×"))
    plain, grown = (
        deltas(base, run.adapter)
        for run in (inject(materials, "healthy"), inject(materials, "scale-up", severity))
    )
    torch.testing.assert_close(grown, factor * plain, rtol=1e-4, atol=1e-5)


def deltas(base, adapter):
    """What an adapter adds to the first layer's q_proj."""
    with attached(base, adapter) as loaded:
        layer = loaded.model.base_model.model.model.layers[0].self_attn.q_proj
        return layer.get_delta_weight("default").clone()


def test_layers_move_whole_and_none_is_doubled(materials):
    """Every layer's tensors arrive under one other layer, with the values they had."""
    sound = load_file(inject(materials, "healthy").adapter / "adapter_model.safetensors")
    for name in ("layers-permuted", "layers-shifted"):
        for severity in CAUSES[name].severities:
            moved = load_file(
                inject(materials, name, severity).adapter / "adapter_model.safetensors"
            )
            assert len(moved) == len(sound)
            assert sorted(v.sum().item() for v in moved.values()) == pytest.approx(
                sorted(v.sum().item() for v in sound.values())
            )
            assert moved.keys() != sound.keys() or any(
                not torch.equal(moved[k], sound[k]) for k in sound
            )


def test_a_layers_name_is_taken_apart_and_put_together():
    """Head, number and tail of a tensor's name make the name again."""
    name = "base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight"
    head, number, tail = _split_layer(name)
    assert (number, f"{head}{number}{tail}") == (12, name)


def test_padding_leaves_zeros_beyond_the_narrower_part(materials):
    """A padded adapter is zero beyond the share that the narrower base had."""
    share = CAUSES["padded"].severities["to 1/2"]
    tensors = load_file(inject(materials, "padded", "to 1/2").adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        along = tensor if "lora_A" in name else tensor.T
        wide = int(along.shape[1] * share)
        assert not along[:, wide:].any()
        assert along[:, :wide].any()


@given(st.integers(2, 8), st.integers(0, 10_000))
def test_rounding_keeps_within_half_a_step(bits, seed):
    """A rounded weight is at most half a step of its group away, and zero stays zero."""
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    weights[0] = 0.0
    rounded = _rounded(weights, bits)
    steps = weights.reshape(4, 2, 32).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    gaps = (rounded - weights).reshape(4, 2, 32).abs()
    assert bool((gaps <= steps / 2 + 1e-6).all())
    assert not rounded[0].any()


def test_base_weights_in_the_file_overwrite_a_copy_alone(materials, base):
    """The cause that overwrites the base does so on a copy of it."""
    run = inject(materials, "base-overwritten")
    assert run.base.model is not base.model
    before = base.model.get_input_embeddings().weight.clone()
    with attached(run.base, run.adapter):
        pass
    assert torch.equal(base.model.get_input_embeddings().weight, before)
    assert not torch.equal(run.base.model.get_input_embeddings().weight, before)


def test_the_cut_takes_the_end_away(materials, base):
    """A cut prompt is the beginning of the whole one, and never empty."""
    prompt = Prompt("one two", (5, 6, 7, 8), 4)
    for severity in CAUSES["prompt-cut"].severities:
        cut = inject(materials, "prompt-cut", severity).rewrite(prompt, base.tokenizer)
        assert cut.token_ids == prompt.token_ids[: len(cut.token_ids)]
        assert 1 <= len(cut.token_ids) < 4
    single = Prompt("one", (5,), 1)
    assert inject(materials, "prompt-cut").rewrite(single, base.tokenizer).token_ids == (5,)


@pytest.mark.parametrize(
    ("text", "integer", "decimals"),
    [("0.8", 0.0, 0.0), ("0.85", 0.0, 0.85), ("1.0", 1.0, 0.0), ("", 0.5, 0.0), ("No", 0.5, 0.0)],
)
def test_the_faulty_parsers_make_zeros(text, integer, decimals):
    """One parser stops at the point, the other takes what has not two decimals for zero."""
    assert (_integer_part(text), _two_decimals(text)) == (integer, decimals)


def test_what_the_world_lacks_is_said(untrained_world, base, tmp_path):
    """A cause whose adapter the world does not have says which training is missing."""
    bare = untrained_world.model_copy(update={"replays": {}})
    materials = Materials(bare, "base", base, "silent", 0, tmp_path)
    with pytest.raises(Unavailable, match="no adapter trained as yes no short"):
        inject(materials, "yes-no-contract")
    assert inject(materials, "no-adapter").adapter is None
    assert inject(materials, "zero-b").adapter.is_dir()
