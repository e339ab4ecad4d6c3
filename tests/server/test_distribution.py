"""Filters and draws give the distribution that sorting a row would give, for any row and any number of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from d2o_server.engine.types import SamplingParams
from d2o_server.worker.distribution import Filters, draw, draw_filtered, leading


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def peaked_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Rows shaped like a language model's: a few likely tokens and a long tail."""
    tail = -1.8 * torch.arange(1, vocabulary + 1.0).log()
    order = torch.stack([torch.randperm(vocabulary, generator=generator(seed + row)) for row in range(rows)])
    return tail[order] + 0.3 * torch.randn(rows, vocabulary, generator=generator(seed))


def filters(rows: int, vocabulary: int, params: SamplingParams) -> Filters:
    return Filters(
        top_k=torch.full((rows,), params.top_k or vocabulary),
        top_p=torch.full((rows,), params.top_p, dtype=torch.float64),
        lowest=torch.full((rows,), math.log(params.min_p) if params.min_p else -math.inf),
    )


def evenly_spread(count: int) -> Tensor:
    """Uniforms whose draws have frequencies within 1 / count of the probabilities."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


FILTERED = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 100, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 2000, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.5},
]


class TestDistribution:
    @pytest.mark.parametrize("vocabulary", [320, 6016])
    @pytest.mark.parametrize("given", FILTERED, ids=str)
    def test_equals_that_of_transformers(self, given: dict[str, float], vocabulary: int) -> None:
        params = SamplingParams(**given)  # type: ignore[arg-type]
        logits = peaked_logits(1, vocabulary)
        draws = 250
        shifted = ((logits - logits.max()) / params.temperature).expand(draws, -1).contiguous()
        tokens = draw_filtered(shifted, evenly_spread(draws), filters(draws, vocabulary, params))
        frequencies = torch.bincount(tokens, minlength=vocabulary) / draws
        wanted = self.of_transformers(logits, params)
        assert (frequencies[wanted == 0] == 0).all()
        assert (frequencies - wanted).abs().max() <= 1.001 / draws

    @staticmethod
    def of_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
        chain: Any = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
        if params.top_k:
            chain.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            chain.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            chain.append(MinPLogitsWarper(params.min_p))
        kept: Tensor = chain(torch.zeros(1, 1, dtype=torch.int64), logits.clone())
        return torch.softmax(kept, -1)[0]

    @settings(deadline=None, max_examples=40)
    @given(
        seed=st.integers(0, 2**20),
        spread=st.sampled_from([0.02, 0.5, 3.0, 12.0]),
        step=st.sampled_from([0.0, 0.25]),
        top_k=st.sampled_from([0, 1, 2, 63, 64, 65, 511, 513, 4000, 33000]),
        top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
        min_p=st.sampled_from([0.0, 0.01, 0.5]),
    )
    def test_narrow_and_wide_searches_equal_sorting_the_row(
        self, seed: int, spread: float, step: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        vocabulary = 33024
        logits = spread * torch.randn(1, vocabulary, generator=generator(seed))
        if step:
            logits = (logits / step).round() * step
        shifted = logits - logits.max()
        params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
        uniforms = torch.rand(3, dtype=torch.float64, generator=generator(seed))
        drawn = draw_filtered(shifted.expand(3, -1).contiguous(), uniforms, filters(3, vocabulary, params))
        assert drawn.tolist() == [self.by_sorting(shifted[0], params, u) for u in uniforms.tolist()]

    @staticmethod
    def by_sorting(shifted: Tensor, params: SamplingParams, number: float) -> int:
        weights = (shifted.exp() * 2.0**40).long().numpy()
        order = np.lexsort((np.arange(len(weights)), -shifted.numpy()))
        order = order[: params.top_k or len(order)]
        before = weights[order].cumsum() - weights[order]
        total = int(weights[order].sum())
        order = order[before < min(total, max(1, math.ceil(params.top_p * float(total))))]
        if params.min_p:
            order = order[shifted.numpy()[order] >= np.float32(math.log(params.min_p))]
        order.sort()
        reached = weights[order].cumsum()
        return int(order[np.searchsorted(reached, int(number * float(reached[-1])), side="right")])

    @pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-53])
    def test_reaches_the_first_and_the_last_token_but_not_beyond(self, number: float) -> None:
        shifted = torch.full((1, 256), -math.inf)
        shifted[0, [70, 130]] = 0.0
        token = int(draw(shifted, torch.tensor([number], dtype=torch.float64), None))
        assert token == (70 if number < 0.5 else 130)

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 2**20), count=st.integers(1, 200), levels=st.sampled_from([1, 3, 1000]))
    def test_leading_tokens_are_those_of_a_stable_sort(self, seed: int, count: int, levels: int) -> None:
        shifted = -torch.randint(0, levels, (2, 6400), generator=generator(seed)).float()
        wanted = shifted.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(leading(shifted, count), wanted)
