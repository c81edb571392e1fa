import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.prompts import encode, lead_of
from postmortem.case.rows import generate_rows
from postmortem.checker.errors import ModelError
from postmortem.experiments.ask import BASE, System, ask
from postmortem.models import scoring
from postmortem.models.loading import load_base
from postmortem.models.scoring import (
    NUMBERS,
    batches,
    is_out_of_memory,
    number_read_outs,
    score,
    score_within_memory,
    with_budget,
)


@pytest.fixture(scope="module")
def base(untrained):
    """The untrained base, loaded."""
    return load_base(untrained / "base", device="cpu")


@pytest.fixture(scope="module")
def encoded(case, base):
    """Twelve rows under a prompt of that name."""
    rows = generate_rows(12, 3)

    def encode_all(name):
        return [
            encode(case.prompts[name], rows.row(index), tokenizer=base.tokenizer, limit=512)
            for index in range(len(rows))
        ]

    return encode_all


@pytest.fixture(scope="module")
def prompts(encoded):
    """Prompts of two lengths, the long ones last."""
    return [*encoded("yes_no"), *encoded("v2")]


@pytest.fixture(scope="module")
def longest(prompts):
    """Tokens of the longest prompt."""
    return max(len(prompt.token_ids) for prompt in prompts)


def answer(base, prompts, scorer=score, **options):
    """Score with short answers."""
    settings = {"model": base.model, "lead": "", "max_new_tokens": 6} | options
    return scorer(settings.pop("model"), base.tokenizer, prompts=prompts, **settings)


def test_greedy_text_is_that_of_generate(base, prompts):
    """Batched greedy decoding gives token for token what `generate` gives row by row."""
    found = answer(base, prompts).replies
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
    """A prompt's read-outs are the same alone and padded in a batch, within 1e-4; all are told."""
    seen = []
    together, alone = (
        answer(base, prompts),
        answer(base, prompts, batch_tokens=1, progress=seen.append),
    )
    assert seen == list(range(1, len(prompts) + 1))
    assert np.exp(together.first_log_probs).sum(1) == pytest.approx(np.ones(len(prompts)))
    for one, other in zip(together.replies, alone.replies, strict=True):
        assert one.token_ids == other.token_ids
        assert one.number_log_odds == pytest.approx(other.number_log_odds, abs=1e-4)
        assert one.yes_no_log_odds == pytest.approx(other.yes_no_log_odds, abs=1e-4)


def test_candidates_are_scored_as_whole_strings(base, prompts):
    """The log-probability of each number is the sum over its tokens of a plain forward pass."""
    asked = [prompts[0], prompts[-1]]
    found = answer(base, asked).number_log_probs
    for row, prompt in enumerate(asked):
        for column, text in enumerate(NUMBERS):
            tokens = base.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt.token_ids, *tokens]])
            with torch.inference_mode():
                logits = base.model(ids).logits[0].double().log_softmax(-1)
            start = len(prompt.token_ids) - 1
            expected = sum(float(logits[start + i, token]) for i, token in enumerate(tokens))
            assert found[row, column] == pytest.approx(expected, abs=1e-4)


def test_reading_candidates_leaves_generation_alone(case, base, encoded):
    """A raw prompt with a leading space before its answer is generated as without."""
    raw = encoded("v1")[:4]
    led, plain = (
        answer(base, raw, lead=lead).replies for lead in (lead_of(case.prompts["v1"]), "")
    )
    assert [reply.token_ids for reply in led] == [reply.token_ids for reply in plain]


def test_nothing_to_score_is_refused(base):
    """Scoring no prompts at all is an error and not an empty result."""
    with pytest.raises(ModelError, match="at least one prompt"):
        answer(base, [])


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


class Small:
    """A device that holds so many tokens at a time."""

    def __init__(self, model, room):
        self.model, self.room = model, room
        self.device, self.config = model.device, model.config
        self.generation_config = model.generation_config
        self._supports_attention_backend = True

    def __call__(self, input_ids, **options):
        """Read the tokens, or run out of memory as torch does on a GPU."""
        if input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.model(input_ids=input_ids, **options)


def test_smaller_batches_give_the_same_answers(base, prompts, longest):
    """Where memory runs out, every row is answered as it is with room enough, in its place."""
    told = []
    small = Small(base.model, longest)
    found = answer(base, prompts, score_within_memory, model=small, tell=told.append)
    expected = answer(base, prompts)
    assert told
    assert [r.token_ids for r in found.replies] == [r.token_ids for r in expected.replies]
    assert found.first_log_probs == pytest.approx(expected.first_log_probs, abs=1e-4)
    assert found.number_log_probs == pytest.approx(expected.number_log_probs, abs=1e-4)


def test_room_enough_changes_nothing(base, prompts):
    """Without a shortage the scores are those of one call, to the last bit, and nothing is said."""
    told = []
    found = answer(base, prompts, score_within_memory, tell=told.append)
    expected = answer(base, prompts)
    assert found.replies == expected.replies
    assert np.array_equal(found.first_log_probs, expected.first_log_probs)
    assert told == []


def test_a_finished_batch_is_not_done_again(base, prompts, longest, monkeypatch):
    """After a failure in a later batch, the batches that were finished are kept."""
    finished, told, calls = [], [], []

    def fail_at_times(*models, prompts, **options):
        calls.append(len(prompts))
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finished.extend(prompts)
        return score(*models, prompts=prompts, **options)

    monkeypatch.setattr(scoring, "score", fail_at_times)
    answer(base, prompts, score_within_memory, budget=4 * longest, tell=told.append)
    assert told == [2 * longest, longest]
    assert sorted(prompt.text for prompt in finished) == sorted(prompt.text for prompt in prompts)


def test_one_prompt_that_does_not_fit_is_one_clear_error(base, prompts):
    """Where not even one prompt fits, the error names every size that was tried."""
    small = Small(base.model, 3)
    with pytest.raises(ModelError, match=r"batches of 16384, 8192, .* tokens\. Free memory"):
        answer(base, prompts, score_within_memory, model=small, tell=[].append)


def test_other_errors_are_not_taken_for_a_shortage():
    """An error that is not about memory is raised as it is, at the first time."""
    calls = []

    def work(tokens):
        calls.append(tokens)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        with_budget(work, budget=64, least=1, tell=calls.append)
    assert calls == [64]


def test_a_shortage_on_a_cpu_is_one():
    """What torch raises on a CPU for a tensor that no machine holds counts as a shortage."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@given(st.integers(1, 20_000), st.integers(1, 500), st.integers(0, 20_000))
def test_the_budget_ends_at_the_first_that_fits(budget, least, room):
    """Budgets fall, never below the least, and the first that fits is used."""
    tried = []

    def work(tokens):
        tried.append(tokens)
        if tokens > room:
            raise torch.OutOfMemoryError
        return tokens

    told = []
    if room < min(least, budget):
        with pytest.raises(ModelError, match="one prompt at a time"):
            with_budget(work, budget=budget, least=least, tell=told.append)
        assert tried[-1] == min(least, budget)
    else:
        assert with_budget(work, budget=budget, least=least, tell=told.append) <= room
    assert tried == sorted(set(tried), reverse=True)
    assert told == tried[1:]


def test_a_session_goes_on_in_smaller_batches(session, monkeypatch):
    """After a shortage a session says so, and scores what comes later in small batches at once."""
    asked = []

    def fail_when_large(*models, joined_tokens, **options):
        asked.append(joined_tokens)
        if joined_tokens > 5000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(*models, joined_tokens=joined_tokens, **options)

    monkeypatch.setattr(scoring, "score", fail_when_large)
    ask(session, BASE, "v2")
    assert asked[:3] == [16384, 8192, 4096]
    said = session.records_path.with_suffix(".progress").read_text()
    assert "memory ran out; from here on batches of 4096 tokens" in said
    asked.clear()
    ask(session, System("suspect", "suspect"), "v2")
    assert set(asked) == {4096}
