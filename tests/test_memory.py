import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postmortem.case.prompts import encode
from postmortem.case.rows import generate_rows
from postmortem.checker.errors import ModelError
from postmortem.experiments.ask import BASE, System, ask
from postmortem.models import scoring as memory
from postmortem.models.loading import load_base
from postmortem.models.scoring import is_out_of_memory, score, score_within_memory, with_budget

SETTINGS = {"lead": "", "max_new_tokens": 4}


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


@pytest.fixture(scope="module")
def base(untrained):
    """The untrained base, loaded."""
    return load_base(untrained / "base", device="cpu")


@pytest.fixture(scope="module")
def prompts(case, base):
    """Prompts of two lengths, the long ones last."""
    rows = generate_rows(6, 3)
    return [
        encode(case.prompts[name], rows.row(index), tokenizer=base.tokenizer, limit=512)
        for name in ("yes_no", "v2")
        for index in range(len(rows))
    ]


def score_all(model, base, prompts, **options):
    """Score with short answers."""
    settings = {"tell": lambda tokens: None} | SETTINGS | options
    return score_within_memory(model, base.tokenizer, prompts=prompts, **settings)


def test_smaller_batches_give_the_same_answers(base, prompts):
    """Where memory runs out, every row is answered as it is with room enough, in its place."""
    told = []
    longest = max(len(prompt.token_ids) for prompt in prompts)
    found = score_all(Small(base.model, longest), base, prompts, tell=told.append)
    expected = score(base.model, base.tokenizer, prompts=prompts, **SETTINGS)
    assert told
    assert [r.token_ids for r in found.replies] == [r.token_ids for r in expected.replies]
    assert found.first_log_probs == pytest.approx(expected.first_log_probs, abs=1e-4)
    assert found.number_log_probs == pytest.approx(expected.number_log_probs, abs=1e-4)


def test_room_enough_changes_nothing(base, prompts):
    """Without a shortage the scores are those of one call, to the last bit, and nothing is said."""
    told = []
    found = score_all(base.model, base, prompts, tell=told.append)
    expected = score(base.model, base.tokenizer, prompts=prompts, **SETTINGS)
    assert found.replies == expected.replies
    assert np.array_equal(found.first_log_probs, expected.first_log_probs)
    assert told == []


def test_a_finished_batch_is_not_done_again(base, prompts, monkeypatch):
    """After a failure in a later batch, the batches that were finished are kept."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    finished, told, calls = [], [], []

    def fail_at_times(*models, prompts, **options):
        calls.append(len(prompts))
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finished.extend(prompts)
        return score(*models, prompts=prompts, **options)

    monkeypatch.setattr(memory, "score", fail_at_times)
    score_all(base.model, base, prompts, budget=4 * longest, tell=told.append)
    assert told == [2 * longest, longest]
    assert sorted(prompt.text for prompt in finished) == sorted(prompt.text for prompt in prompts)


def test_one_prompt_that_does_not_fit_is_one_clear_error(base, prompts):
    """Where not even one prompt fits, the error names every size that was tried."""
    with pytest.raises(ModelError, match=r"batches of 16384, 8192, .* tokens\. Free memory"):
        score_all(Small(base.model, 3), base, prompts)


def test_other_errors_are_not_taken_for_a_shortage(base, prompts):
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

    monkeypatch.setattr(memory, "score", fail_when_large)
    ask(session, BASE, "v2")
    assert asked[:3] == [16384, 8192, 4096]
    said = session.records_path.with_suffix(".progress").read_text()
    assert "memory ran out; from here on batches of 4096 tokens" in said
    asked.clear()
    ask(session, System("suspect", "suspect"), "v2")
    assert set(asked) == {4096}
