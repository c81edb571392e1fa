import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.prompts import Prompt, encode, lead_of
from postmortem.case.rows import generate_rows
from postmortem.checker.errors import ModelError
from postmortem.models.loading import load_base
from postmortem.models.scoring import NUMBERS, batches, end_tokens, number_read_outs, score


@pytest.fixture(scope="module")
def base(untrained):
    """The untrained base, loaded."""
    return load_base(untrained / "base", device="cpu")


@pytest.fixture(scope="module")
def prompts(case, base):
    """Prompts of two lengths."""
    rows = generate_rows(12, 3)
    return [
        encode(case.prompts[name], rows.row(i), tokenizer=base.tokenizer, limit=512)
        for i in range(len(rows))
        for name in ("v2", "yes_no")
    ]


def ask(base, prompts, **options):
    """Score with short answers."""
    settings = {"lead": "", "max_new_tokens": 6} | options
    return score(base.model, base.tokenizer, prompts=prompts, **settings)


def test_greedy_text_is_that_of_generate(base, prompts):
    """Batched greedy decoding gives token for token what `generate` gives row by row."""
    found = ask(base, prompts).replies
    for prompt, reply in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt.token_ids])
        output = base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=base.tokenizer.eos_token_id,
            pad_token_id=0,
        )
        expected = output[0, ids.shape[1] :].tolist()
        expected = [token for token in expected if token != base.tokenizer.eos_token_id]
        assert list(reply.token_ids) == expected


def test_batching_changes_no_read_out(base, prompts):
    """A prompt's read-outs are the same alone and padded in a batch, within 1e-4."""
    together, alone = ask(base, prompts), ask(base, prompts, batch_tokens=1)
    for one, other in zip(together.replies, alone.replies, strict=True):
        assert one.token_ids == other.token_ids
        assert one.number_log_odds == pytest.approx(other.number_log_odds, abs=1e-4)
        assert one.yes_no_log_odds == pytest.approx(other.yes_no_log_odds, abs=1e-4)


def test_candidates_are_scored_as_whole_strings(base, prompts):
    """The log-probability of each number is the sum over its tokens of a plain forward pass."""
    found = ask(base, prompts[:2]).number_log_probs
    for row, prompt in enumerate(prompts[:2]):
        for column, text in enumerate(NUMBERS):
            answer = base.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt.token_ids, *answer]])
            with torch.inference_mode():
                logits = base.model(ids).logits[0].double().log_softmax(-1)
            start = len(prompt.token_ids) - 1
            expected = sum(float(logits[start + i, token]) for i, token in enumerate(answer))
            assert found[row, column] == pytest.approx(expected, abs=1e-4)


def test_reading_candidates_leaves_generation_alone(case, base):
    """A raw prompt with a leading space before its answer is generated as `generate` does."""
    rows = generate_rows(4, 5)
    raw = [
        encode(case.prompts["v1"], rows.row(i), tokenizer=base.tokenizer, limit=512)
        for i in range(4)
    ]
    first = ask(base, raw, lead=lead_of(case.prompts["v1"])).replies
    assert [r.token_ids for r in first] == [r.token_ids for r in ask(base, raw).replies]


def test_nothing_to_score_is_refused(base):
    """Scoring no prompts at all is an error and not an empty result."""
    with pytest.raises(ModelError, match="at least one prompt"):
        ask(base, [])


def test_turn_ends_at_the_end_token(base):
    """The tokens that end a turn are those of the generation settings and the tokenizer."""
    assert base.tokenizer.eos_token_id in end_tokens(base.model, base.tokenizer)


def test_progress_counts_every_prompt(base, prompts):
    """Progress ends at the number of prompts."""
    seen = []
    ask(base, prompts, batch_tokens=200, progress=seen.append)
    assert seen[-1] == len(prompts)
    assert seen == sorted(seen)


def test_first_token_distribution_is_normalised(base, prompts):
    """The recorded distribution of the first token sums to one in each row."""
    totals = np.exp(ask(base, prompts).first_log_probs).sum(1)
    assert totals == pytest.approx(np.ones(len(prompts)))


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 2000))
def test_batches_hold_each_prompt_once_within_the_budget(lengths, budget):
    """Each prompt is in one batch, and a padded batch of several stays within the budget."""
    found = list(batches(lengths, budget))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


@given(st.lists(st.floats(-700, 0), min_size=11, max_size=11))
def test_log_odds_never_saturate(log_probs):
    """Log-odds stay finite, and agree with the expected value, however small the chances are."""
    value, log_odds = number_read_outs(np.array(log_probs))
    assert np.isfinite(log_odds)
    assert 0 <= value <= 1
    assert value == pytest.approx(1 / (1 + np.exp(-log_odds)))


def test_tied_probabilities_keep_distinct_log_odds():
    """Two near-certain answers that round to the same probability differ in log-odds."""
    low = np.full(11, -800.0)
    low[0] = 0.0
    lower = low.copy()
    lower[1:] = -900.0
    (one, first), (other, second) = number_read_outs(low), number_read_outs(lower)
    assert one == other == 0.0
    assert first > second


def test_an_uncut_prompt_says_so():
    """A prompt is cut when it had more tokens than it has."""
    assert not Prompt("a", (1, 2), 2).cut
    assert Prompt("a", (1, 2), 3).cut
