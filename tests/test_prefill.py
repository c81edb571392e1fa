import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, configuration
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from postmortem.models.prefill import (
    Reader,
    SharedLayers,
    layers_below,
    log_softmax,
    lowest_adapted_layer,
    prefix_length,
)

KINDS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def make_model(kind):
    """A random model of four layers."""
    torch.manual_seed(0)
    config, model = KINDS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return model(config(**sizes, **heads)).eval()


def adapt(model, layers):
    """A random adapter on the given layers."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return adapted.eval()


def plainly(model, row):
    """Log-probabilities of the next token by one forward over the whole row."""
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0, -1].double(), -1)


# Every described architecture that writes text, and what is rarer: attention that sees the last
# few tokens alone, and positions that are a bias on the scores.
# Not so with linear attention: here the log-probabilities of such rows differ by up to 0.007.
LINEAR = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
DECODERS = {
    name: configuration(name)
    for name, (_, _, classes) in ARCHITECTURES.items()
    if classes[0].endswith(("ForCausalLM", "LMHeadModel")) and name not in LINEAR
} | {
    "mistral, window 4": MistralConfig(**ARCHITECTURES["mistral"][1], sliding_window=4),
    "mpt": MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=64),
}


@pytest.mark.parametrize("usual", [True, False], ids=["as it comes", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_answers_as_it_does_row_by_row(name, usual):
    """Rows of unlike length, read together, and two more tokens give each row's own answers."""
    torch.manual_seed(0)
    settings = {} if usual else {"attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(DECODERS[name], **settings).eval()
    rows = [[5, 7, 9, 11, 13, 21], [4, 3, 8], [17]]
    with torch.inference_mode():
        reader = Reader(model)
        assert not (reader.plain and not usual)
        state = reader.read([rows[:1], rows[1:]] if reader.plain else [rows], room=3)
        state.step(torch.tensor([[30, 31]] * 3))
        state.forget(2)
        after = log_softmax(state.step(torch.tensor([[7, 6]] * 3)))
        last = log_softmax(state.step(torch.tensor([[9]] * 3)))[:, -1]
    for place, row in enumerate(rows):
        np.testing.assert_allclose(state.log_probs[place], plainly(model, row), atol=1e-5)
        np.testing.assert_allclose(after[place, 1], plainly(model, [*row, 7, 6]), atol=1e-5)
        np.testing.assert_allclose(last[place], plainly(model, [*row, 7, 6, 9]), atol=1e-5)


rows_of_tokens = st.lists(
    st.lists(st.integers(3, 49), min_size=1, max_size=12), min_size=1, max_size=5
)


@given(
    start=st.lists(st.integers(3, 49), min_size=1, max_size=6),
    ends=rows_of_tokens,
    turned=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_a_prefix_read_once_changes_nothing(start, ends, turned):
    """Rows read after one of two beginnings, in batches, joined, answer as each row read alone."""
    model = make_model("qwen2")
    starts = [start[::-1] if other else start for other in turned]
    rows = [begin + end for begin, end in zip(starts, ends, strict=False)]
    with torch.inference_mode():
        reader = Reader(model, prefix=len(start))
        state = reader.read([batch for batch in (rows[:1], rows[1:]) if batch], room=1)
        after = log_softmax(state.step(torch.tensor([[7]] * len(rows))))[:, -1]
    for place, row in enumerate(rows):
        np.testing.assert_allclose(state.log_probs[place], plainly(model, row), atol=1e-5)
        np.testing.assert_allclose(after[place], plainly(model, [*row, 7]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_shared_layers_change_nothing(kind, prefix):
    """Base and adapter answer the same whether the lower layers run or are taken from memory."""
    base = make_model(kind)
    rows = [[5, 6, 7, 8, 9], [5, 6, 11, 12], [5, 6, 13]]
    adapted, shared = adapt(base, [2, 3]), SharedLayers(2, limit=1 << 20)
    with torch.inference_mode():
        for disabled in (True, False, True):
            with adapted.disable_adapter() if disabled else nullcontext():
                state = Reader(adapted, prefix=prefix, shared=shared).read([rows], room=1)
                after = log_softmax(state.step(torch.tensor([[7]] * 3)))[:, -1]
                for place, row in enumerate(rows):
                    expected = plainly(adapted, row), plainly(adapted, [*row, 7])
                    np.testing.assert_allclose(state.log_probs[place], expected[0], atol=1e-5)
                    np.testing.assert_allclose(after[place], expected[1], atol=1e-5)


def test_lower_layers_run_once_for_all_systems():
    """What lies below every adapter is computed for the first system alone."""
    base = make_model("qwen2")
    calls = []
    base.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    shared = SharedLayers(2, limit=1 << 20)
    adapted = adapt(base, [2, 3])
    with torch.inference_mode():
        for disabled in (True, False):
            with adapted.disable_adapter() if disabled else nullcontext():
                Reader(adapted, prefix=0, shared=shared).read([[[5, 6, 7]]], room=0)
    assert len(calls) == 1


def test_an_adapter_in_the_lower_layers_is_not_served():
    """Layers that an answering adapter changes are never taken from memory."""
    adapted = adapt(make_model("qwen2"), [1, 3])
    assert lowest_adapted_layer(adapted) == 1
    assert not SharedLayers(2, limit=1 << 20).serve(adapted)
    assert SharedLayers(1, limit=1 << 20).serve(adapted)
    with adapted.disable_adapter():
        assert lowest_adapted_layer(adapted) == 4
    # An adapter on the embedding changes what every layer reads.
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    assert lowest_adapted_layer(get_peft_model(make_model("qwen2"), config)) == 0


def test_what_is_kept_stays_within_its_limit():
    """Over the limit the first state goes, and the last one always stays."""
    shared = SharedLayers(1, limit=100)
    for key in "abc":
        shared.put(key, torch.zeros(10), [(torch.zeros(5), torch.zeros(5))])
    assert [shared.get(key) is not None for key in "abc"] == [False, False, True]


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6))
def test_a_prefix_leaves_a_token_to_every_row(rows):
    """The shared beginning is shorter than every row, and nothing is shared by a single row."""
    length = prefix_length(rows)
    assert length < min(map(len, rows))
    assert len(rows) > 1 or length == 0


def test_layers_below_adapters_come_from_their_configs(tmp_path):
    """The lowest layer that any config names counts, and one that names none counts as all."""
    folders = []
    for number, layers in enumerate(([22, 23], 24, None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"layers_to_transform": layers}))
        folders.append(folder)
    assert layers_below(folders[:2]) == 22
    assert layers_below(folders) == 0
    assert layers_below([]) == 0
