"""The sampler chooses what the parameters say, exactly, and the same whatever else is in the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2o_server.engine.types import SamplingParams
from d2o_server.worker.sampler import FAILED_TOKEN, RowLogprobs, Sampler, SamplingState, uniform

GREEDY = SamplingParams()
PLAIN = SamplingParams(temperature=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def peaked_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Rows shaped like a language model's: a few likely tokens and a long tail."""
    tail = -1.8 * torch.arange(1, vocabulary + 1.0).log()
    order = torch.stack([torch.randperm(vocabulary, generator=generator(seed + row)) for row in range(rows)])
    return tail[order] + 0.3 * torch.randn(rows, vocabulary, generator=generator(seed))


def state(
    params: SamplingParams, seed: int = 0, prompt: tuple[int, ...] = (), **history: tuple[int, ...]
) -> SamplingState:
    return SamplingState(params, seed=seed, prompt_ids=prompt, **history)


def sample_one(logits: Tensor, one: SamplingState) -> int:
    batch = Sampler(logits.shape[-1]).sample(logits[None], [one])
    assert not batch.failures
    return batch.token_ids[0]


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_takes_the_most_probable_token(self, dtype: torch.dtype) -> None:
        logits = torch.randn(5, 1000, generator=generator()).to(dtype)
        for row in range(5):
            logits[row, 37 * row] = 50.0
        batch = Sampler(1000).sample(logits, [state(GREEDY) for _ in range(5)])
        assert batch.token_ids == [0, 37, 74, 111, 148]

    @pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, logit_bias=((0, 0.0),))])
    def test_gives_ties_to_the_lowest_id(self, params: SamplingParams) -> None:
        logits = torch.zeros(1000)
        logits[[70, 71, 500, 999]] = 3.0
        assert sample_one(logits, state(params)) == 70

    @pytest.mark.parametrize("params", [replace(PLAIN, top_k=1), replace(PLAIN, top_p=1e-9), replace(PLAIN, min_p=1.0)])
    def test_is_what_the_tightest_filters_leave(self, params: SamplingParams) -> None:
        logits = peaked_logits(1, 6000)[0]
        assert {sample_one(logits, state(params, seed)) for seed in range(20)} == {int(logits.argmax())}

    def test_ties_do_not_widen_top_k_and_top_p(self) -> None:
        logits = torch.zeros(6000)
        for params, kept in ((replace(PLAIN, top_k=3), 3), (replace(PLAIN, top_p=0.001), 6)):
            assert {sample_one(logits, state(params, seed)) for seed in range(100)} == set(range(kept))

    def test_temperatures_too_small_for_float32_are_greedy(self) -> None:
        logits = peaked_logits(1, 300)[0]
        assert sample_one(logits, state(replace(PLAIN, temperature=1e-300))) == int(logits.argmax())
        assert sample_one(logits, state(replace(PLAIN, temperature=1.1e-5))) == int(logits.argmax())


MIXTURE = [
    GREEDY,
    PLAIN,
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=3),
    SamplingParams(temperature=1.2, top_k=50, repetition_penalty=1.2),
    SamplingParams(temperature=5.0, top_p=0.97),
    SamplingParams(temperature=0.9, min_p=0.05, presence_penalty=0.5, logprobs=0),
    SamplingParams(temperature=1.0, top_k=3000, top_p=0.99, frequency_penalty=0.3),
    SamplingParams(frequency_penalty=1.0, min_new_tokens=3, logit_bias=((5, 2.0),), logprobs=5),
]


def run(logits: Tensor, members: list[int], steps: int) -> dict[int, list[tuple[int, RowLogprobs | None]]]:
    """Each member's tokens and log probabilities; member m reads logits[:, m]."""
    states = {member: state(MIXTURE[member % len(MIXTURE)], member, (1, 2, member), end_ids=(0,)) for member in members}
    seen: dict[int, list[tuple[int, RowLogprobs | None]]] = {member: [] for member in members}
    sampler = Sampler(logits.shape[-1])
    for step in range(steps):
        batch = sampler.sample(logits[step, members], [states[member] for member in members])
        for member, token, entry in zip(members, batch.token_ids, batch.logprobs, strict=True):
            seen[member].append((token, entry))
    return seen


class TestBatchInvariance:
    @pytest.mark.parametrize(
        ("vocabulary", "dtype"), [(8192, torch.float32), (50257, torch.bfloat16), (333, torch.float32)]
    )
    def test_a_row_alone_equals_the_row_among_31_others(self, vocabulary: int, dtype: torch.dtype) -> None:
        logits = torch.stack([peaked_logits(32, vocabulary, 100 * step) for step in range(3)]).to(dtype)
        together = run(logits, list(range(32)), steps=3)
        backwards = run(logits, list(reversed(range(32))), steps=3)
        for member in range(32):
            alone = run(logits, [member], steps=3)
            assert alone[member] == together[member] == backwards[member]

    def test_sampling_goes_on_where_it_was_resumed(self) -> None:
        logits = torch.stack([peaked_logits(1, 2000, step)[0] for step in range(12)])
        params = SamplingParams(temperature=1.5, repetition_penalty=1.3, frequency_penalty=0.7, min_new_tokens=8)
        whole = state(params, 7, (4, 5), end_ids=(9,))
        tokens = tuple(sample_one(row, whole) for row in logits)
        resumed = state(params, 7, (4, 5), end_ids=(9,), output_ids=tokens[:5])
        assert tuple(sample_one(row, resumed) for row in logits[5:]) == tokens[5:]

    def test_logits_are_left_unchanged(self) -> None:
        logits = peaked_logits(8, 640)
        before = logits.clone()
        Sampler(640).sample(logits, [state(params, prompt=(1, 2)) for params in MIXTURE])
        assert torch.equal(logits, before)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    wanted = probabilities * counts.sum()
    return float(((counts - wanted) ** 2 / wanted).sum())


class TestRandomness:
    """Bounds are the 0.999 quantiles of chi-square with one degree of freedom less than there are cells."""

    PROBABILITIES = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    BOUND_7 = 24.3
    BOUND_63 = 103.4

    def test_tokens_come_as_often_as_they_are_probable_over_the_steps_of_a_seed(self) -> None:
        one = state(PLAIN, seed=42)
        logits = self.PROBABILITIES.log()
        tokens = [sample_one(logits, one) for _ in range(4000)]
        counts = torch.bincount(torch.tensor(tokens), minlength=8)
        assert chi_square(counts, self.PROBABILITIES) < self.BOUND_7
        assert chi_square(counts, self.PROBABILITIES.flip(0)) > self.BOUND_7

    @pytest.mark.parametrize("params", [PLAIN, replace(PLAIN, top_k=8), replace(PLAIN, top_p=0.9999)])
    def test_tokens_come_as_often_as_they_are_probable_over_seeds(self, params: SamplingParams) -> None:
        logits = self.PROBABILITIES.log().repeat(4000, 1)
        batch = Sampler(8).sample(logits, [state(params, seed) for seed in range(4000)])
        counts = torch.bincount(torch.tensor(batch.token_ids), minlength=8)
        assert chi_square(counts, self.PROBABILITIES) < self.BOUND_7

    @pytest.mark.parametrize(("seed_step", "step_step"), [(0, 1), (1, 0), (2**32, 0), (0x9E3779B97F4A7C15, 1), (-1, 1)])
    def test_neighbouring_numbers_are_independent(self, seed_step: int, step_step: int) -> None:
        pairs = []
        for index in range(20000):
            seed, step = index * 3 % 2**64, index % 50
            other = (seed + seed_step) % 2**64
            pairs.append(8 * int(8 * uniform(seed, step)) + int(8 * uniform(other, step + step_step)))
        assert chi_square(torch.bincount(torch.tensor(pairs), minlength=64), torch.full((64,), 1 / 64)) < self.BOUND_63

    def test_numbers_are_fixed_for_ever(self) -> None:
        assert [uniform(0, 0), uniform(0, 1), uniform(2**64 - 1, 100000)] == FIRST_NUMBERS

    @given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**20))
    def test_numbers_lie_in_the_unit_interval(self, seed: int, step: int) -> None:
        assert 0 <= uniform(seed, step) < 1

    def test_seeds_and_steps_give_different_tokens(self) -> None:
        logits = torch.zeros(4096)
        first = state(PLAIN, seed=1)
        assert len({sample_one(logits, first) for _ in range(20)}) > 15
        assert len({sample_one(logits, state(PLAIN, seed)) for seed in range(20)}) > 15


FIRST_NUMBERS = [0.6524484863740322, 0.7012121095215252, 0.12423738179155697]


class TestFailures:
    @pytest.mark.parametrize("params", [GREEDY, PLAIN, replace(PLAIN, top_p=0.5, logprobs=2)])
    @pytest.mark.parametrize(
        ("value", "said"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "every token's logit is -inf")]
    )
    def test_a_broken_row_fails_alone(self, params: SamplingParams, value: float, said: str) -> None:
        logits = peaked_logits(3, 500)
        states = [state(params, seed) for seed in range(3)]
        wanted = Sampler(500).sample(logits, [state(params, seed) for seed in range(3)])
        logits[1, slice(None) if value == -math.inf else slice(77, 78)] = value
        batch = Sampler(500).sample(logits, states)
        assert list(batch.failures) == [1]
        assert said in str(batch.failures[1])
        assert "row 1" in str(batch.failures[1])
        assert batch.token_ids == [wanted.token_ids[0], FAILED_TOKEN, wanted.token_ids[2]]
        assert batch.logprobs == [wanted.logprobs[0], None, wanted.logprobs[2]]
        assert [one.generated for one in states] == [1, 0, 1]

    @pytest.mark.parametrize("params", [GREEDY, PLAIN])
    def test_a_row_that_may_choose_no_token_fails(self, params: SamplingParams) -> None:
        logits = torch.tensor([[0.0, -math.inf, -math.inf]] * 2)
        ruled_out = state(replace(params, min_new_tokens=1, logprobs=1), end_ids=(0,))
        batch = Sampler(3).sample(logits, [ruled_out, state(params)])
        assert batch.token_ids == [FAILED_TOKEN, 0]
        assert "none to choose" in str(batch.failures[0])

    @settings(deadline=None, max_examples=50)
    @given(
        seed=st.integers(0, 2**20),
        possible=st.integers(1, 5),
        top_k=st.sampled_from([0, 3, 100]),
        top_p=st.sampled_from([0.3, 1.0]),
        temperature=st.sampled_from([0.0, 0.01, 1.0, 10.0]),
    )
    def test_never_draws_a_token_of_probability_zero(
        self, seed: int, possible: int, top_k: int, top_p: float, temperature: float
    ) -> None:
        logits = torch.full((5000,), -math.inf)
        ids = torch.randperm(5000, generator=generator(seed))[:possible]
        logits[ids] = torch.randn(possible, generator=generator(seed))
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        assert sample_one(logits, state(params, seed)) in ids.tolist()

    def test_logits_of_another_shape_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"got \(2, 9\), allowed is \(2, 10\)"):
            Sampler(10).sample(torch.zeros(2, 9), [state(GREEDY), state(GREEDY)])

    def test_no_rows_give_no_tokens(self) -> None:
        assert Sampler(10).sample(torch.zeros(0, 10), []).token_ids == []


class TestLogprobs:
    @pytest.mark.parametrize(
        "params", [GREEDY, replace(PLAIN, temperature=0.3, top_k=5), SamplingParams(logit_bias=((9, 100.0),))]
    )
    def test_are_the_models_own_whatever_the_parameters(self, params: SamplingParams) -> None:
        logits = peaked_logits(2, 5000)
        batch = Sampler(5000).sample(logits, [state(replace(params, logprobs=4)), state(params)])
        entry = batch.logprobs[0]
        assert entry is not None
        assert batch.logprobs[1] is None
        wanted = logits[0].double().log_softmax(-1)
        assert entry.logprob == pytest.approx(float(wanted[batch.token_ids[0]]), abs=1e-5)
        best = wanted.topk(4)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)

    def test_each_row_gets_as_many_as_it_asked_for(self) -> None:
        states = [state(replace(GREEDY, logprobs=count)) for count in (0, 1, 5)]
        batch = Sampler(100).sample(peaked_logits(3, 100), states)
        assert [len(entry.top) for entry in batch.logprobs if entry is not None] == [0, 1, 5]

    def test_ties_are_sorted_by_id(self) -> None:
        entry = Sampler(200).sample(torch.zeros(1, 200), [state(replace(GREEDY, logprobs=5))]).logprobs[0]
        assert entry is not None
        assert [token for token, _ in entry.top] == [0, 1, 2, 3, 4]

    def test_tokens_of_probability_zero_and_beyond_the_vocabulary_are_left_out(self) -> None:
        logits = torch.tensor([[1.0, -math.inf, 2.0]])
        entry = Sampler(3).sample(logits, [state(replace(GREEDY, logprobs=20))]).logprobs[0]
        assert entry is not None
        assert [token for token, _ in entry.top] == [2, 0]
