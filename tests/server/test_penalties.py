"""Penalties, bias and masked ends change exactly the logits that they name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from d2o_server.engine.types import SamplingParams
from d2o_server.worker.penalties import LogitEdits, apply_edits
from d2o_server.worker.sampler import Sampler, SamplingState

GREEDY = SamplingParams()
PLAIN = SamplingParams(temperature=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(
    params: SamplingParams, seed: int = 0, prompt: tuple[int, ...] = (), **history: tuple[int, ...]
) -> SamplingState:
    return SamplingState(params, seed=seed, prompt_ids=prompt, **history)


def sample_one(logits: Tensor, one: SamplingState) -> int:
    batch = Sampler(logits.shape[-1]).sample(logits[None], [one])
    assert not batch.failures
    return batch.token_ids[0]


def edited(logits: Tensor, params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]) -> Tensor:
    edits = LogitEdits.of(params, prompt, output, ends=(0,))
    assert edits is not None
    changed = logits[None].clone()
    apply_edits(changed, [(0, edits)], [len(output)])
    return changed[0]


tokens = st.lists(st.integers(1, 63), max_size=150).map(tuple)


class TestPenalties:
    @settings(deadline=None, max_examples=30)
    @given(prompt=tokens, output=tokens, penalty=st.sampled_from([0.5, 1.1, 3.0]))
    def test_repetition_equals_that_of_transformers(
        self, prompt: tuple[int, ...], output: tuple[int, ...], penalty: float
    ) -> None:
        logits = torch.randn(64, generator=generator())
        seen = torch.tensor([[*prompt, *output]], dtype=torch.int64)
        peer: Any = RepetitionPenaltyLogitsProcessor(penalty)
        wanted = peer(seen, logits[None].clone())[0]
        torch.testing.assert_close(edited(logits, SamplingParams(repetition_penalty=penalty), prompt, output), wanted)

    @settings(deadline=None, max_examples=30)
    @given(prompt=tokens, output=tokens)
    def test_presence_and_frequency_count_the_output_alone(
        self, prompt: tuple[int, ...], output: tuple[int, ...]
    ) -> None:
        logits = torch.randn(64, generator=generator())
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=64)
        params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25)
        wanted = logits - 0.5 * (counts > 0) + 0.25 * counts
        torch.testing.assert_close(edited(logits, params, prompt, output), wanted)

    @pytest.mark.parametrize("params", [GREEDY, PLAIN, replace(PLAIN, top_k=2)])
    @pytest.mark.parametrize("repetition", [5e-324, 1e-45, 1e-9])
    def test_extreme_penalties_keep_a_token_to_choose(self, params: SamplingParams, repetition: float) -> None:
        logits = torch.tensor([-3.0, 0.0, 3.0, -math.inf])
        assert sample_one(logits, state(replace(params, repetition_penalty=repetition), prompt=(0, 1, 2, 3))) == 2

    def test_a_frequency_penalty_grows_with_every_sampled_token(self) -> None:
        logits = torch.tensor([2.0, 1.1, 0.0])
        one = state(SamplingParams(frequency_penalty=0.5))
        assert [sample_one(logits, one) for _ in range(6)] == [0, 0, 1, 0, 1, 0]

    def test_more_different_tokens_than_a_history_starts_with_are_all_counted(self) -> None:
        one = state(SamplingParams(frequency_penalty=2.0))
        logits = torch.zeros(300)
        assert [sample_one(logits, one) for _ in range(300)] == list(range(300))

    def test_bias_is_added_to_the_named_tokens(self) -> None:
        logits = torch.tensor([5.0, 4.0, 3.0])
        assert sample_one(logits, state(SamplingParams(logit_bias=((2, 2.5),)))) == 2
        assert sample_one(logits, state(SamplingParams(logit_bias=((0, -100.0), (1, -1.5))))) == 2

    @pytest.mark.parametrize("params", [GREEDY, PLAIN, replace(PLAIN, top_k=2)])
    def test_no_end_before_min_new_tokens(self, params: SamplingParams) -> None:
        one = state(replace(params, min_new_tokens=3, stop_token_ids=(7,)), end_ids=(2,))
        logits = torch.zeros(10)
        logits[[2, 7]] = 50.0
        sampled = [sample_one(logits, one) for _ in range(5)]
        assert not {2, 7} & set(sampled[:3])
        assert set(sampled[3:]) <= {2, 7}

    def test_penalties_come_before_temperature(self) -> None:
        """Presence 1 at temperature 0.1 moves odds by exp(10), not by exp(1)."""
        params = SamplingParams(temperature=0.1, presence_penalty=1.0)
        logits = torch.zeros(2)
        assert all(sample_one(logits, state(params, seed, output_ids=(0,))) == 1 for seed in range(200))
