import pandas as pd
import pytest
import torch

from postmortem.case.prompts import Prompt, encode
from postmortem.case.rows import generate_rows
from postmortem.models.loading import load_base
from tools.bench import (
    INCIDENT,
    NUMERIC,
    add_ratios,
    gemm_rate,
    layer_weights,
    log_odds_gap,
    reading_flops,
    ways_of,
)


@pytest.fixture(scope="module")
def base(untrained):
    """The untrained base, loaded."""
    return load_base(untrained / "base", device="cpu")


@pytest.fixture(scope="module")
def prompts(case, base):
    """A few prompts of the second attempt."""
    rows = generate_rows(9, 4)
    return [
        encode(case.prompts["v2"], rows.row(i), tokenizer=base.tokenizer, limit=512)
        for i in range(len(rows))
    ]


def test_every_way_writes_the_same(case, base, prompts):
    """The ways that write text write the same text, row by row."""
    ways = ways_of(base, prompts, case.prompts["v2"])
    texts = {name: run() for name, run in ways.items()}
    assert texts[INCIDENT] == texts[NUMERIC] == texts["batched"]
    assert len(texts["readout"]) == len(prompts)


def test_read_outs_are_those_of_a_plain_forward(base, prompts):
    """Our log-odds differ from one plain forward a row by rounding alone."""
    assert log_odds_gap(base, prompts) < 1e-4


def test_flops_count_a_shared_beginning_once(base):
    """Prompts that begin alike cost less than as many that do not, and one more costs more."""
    alike = [Prompt("", (1, 2, 3, 4, 5, 6, number), 7) for number in range(4)]
    apart = [Prompt("", (number, 2, 3, 4, 5, 6, 7), 7) for number in range(4)]
    assert reading_flops(base.model, alike) < reading_flops(base.model, apart)
    assert reading_flops(base.model, apart[:3]) < reading_flops(base.model, apart)
    assert reading_flops(base.model, apart) < reading_flops(base.model, apart, stems=2)


def test_flops_are_those_of_the_layers(base):
    """One token costs two for each weight of the layers and of the head, and its attention."""
    config = base.model.config
    weights = sum(weight.numel() for weight in layer_weights(base.model))
    head = config.vocab_size * config.hidden_size
    attention = 4 * config.num_hidden_layers * config.hidden_size * 0.5
    found = reading_flops(base.model, [Prompt("", (1,), 1)])
    assert found == pytest.approx(2 * (weights + head) + attention)


def test_the_rate_of_matrix_products_is_measured(base):
    """A rate is a positive number, and nothing of the model is changed."""
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    assert gemm_rate(base.model, 16, seconds=0.01) > 0
    assert all(torch.equal(before[name], p) for name, p in base.model.named_parameters())


def test_a_share_is_of_the_rate_of_its_own_round():
    """A round on a slow machine counts for as much as one on a fast one: the median decides."""
    rounds = pd.DataFrame({"round": [0, 1, 2], "seconds": [1.0, 2.0, 4.0], "gemm": [20, 10, 10]})
    rounds = pd.concat(
        [rounds.assign(prompt="v2", way=INCIDENT), rounds.assign(prompt="v2", way=NUMERIC)],
        ignore_index=True,
    )
    found = add_ratios(rounds, {("v2", INCIDENT): 10.0, ("v2", NUMERIC): 20.0})
    medians = found.groupby("way").share.median()
    assert medians.to_dict() == {INCIDENT: 0.5, NUMERIC: 1.0}
    assert set(found.ratio) == {1.0}
