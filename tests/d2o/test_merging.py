"""Matching, thresholds and the three merges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2o import merging
from d2o.config import D2OConfig, Merge, Scope, Threshold


def matches(similarity: list[list[float]], found: list[list[bool]] | None = None) -> merging.Matches:
    """One row; the nearest survivor is always the first."""
    values = torch.tensor([similarity])
    mask = torch.ones_like(values, dtype=torch.bool) if found is None else torch.tensor([found])
    return merging.Matches(torch.zeros(values.shape, dtype=torch.int64), values, mask)


def all_of(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [1, 31, 32, 33, 100])
def test_match_finds_the_largest_cosine(dtype: torch.dtype, kept: int) -> None:
    keys = torch.randn(2, 3, kept, 16, generator=torch.Generator().manual_seed(kept)).to(dtype)
    lengths = torch.rand(2, 3, kept, 1) + 0.5
    found = merging.match((keys.float() * lengths).to(dtype), keys, all_of(2, 1, kept), all_of(2, 3, kept))
    assert torch.equal(found.nearest, torch.arange(kept).expand(2, 3, kept))
    torch.testing.assert_close(
        found.similarity, torch.ones(2, 3, kept), atol=2e-3 if dtype != torch.float32 else 1e-6, rtol=0
    )


def test_match_skips_survivors_that_are_no_targets() -> None:
    kept = torch.eye(4)[None, None]
    targets = torch.tensor([[[False, True, False, True]]])
    wanted = torch.tensor([[[[1.0, 0.1, 0, 0], [0, 0, 1, 0.2], [-1, -0.1, 0, -1]]]])
    found = merging.match(wanted, kept, all_of(1, 1, 3), targets)
    assert found.nearest.tolist() == [[[1, 3, 1]]]
    assert found.similarity[0, 0, 2] < 0


def test_match_without_targets_finds_nothing() -> None:
    targets = torch.tensor([[[True] * 4], [[False] * 4]])
    found = merging.match(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 4, 4), all_of(2, 1, 3), targets)
    assert found.found.tolist() == [[[True] * 3], [[False] * 3]]


def test_keys_of_no_length_match_with_cosine_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = merging.match(
            torch.zeros(1, 1, 2, 4, dtype=dtype), torch.ones(1, 1, 3, 4, dtype=dtype), all_of(1, 1, 2), all_of(1, 1, 3)
        )
        assert found.similarity.tolist() == [[[0, 0]]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (D2OConfig.paper(), [0.7 * 0.9 + 0.3 * 0.5, 0.7 * 0.6 + 0.3 * 0.5]),
        (D2OConfig.paper(threshold_scope=Scope.LAYER), [0.7 * 0.9 + 0.3 * 0.5] * 2),
        (D2OConfig.authors(), [0.5 * 0.5 + 0.5 * 0.5] * 2),
        (D2OConfig.authors(alpha=0.3, beta=0.7), [0.3 * 0.5 + 0.7 * 0.5] * 2),
        (D2OConfig.authors(threshold_scope=Scope.HEAD), [0.5 * 0.5 + 0.5 * 0.7, 0.5 * 0.5 + 0.5 * 0.3]),
        (D2OConfig(threshold=Threshold.OFF), [0.5, 0.5]),
    ],
)
def test_the_threshold_moves_by_its_rule(config: D2OConfig, expected: list[float]) -> None:
    moved = merging.moved_threshold(matches([[0.5, 0.9], [0.6, 0.0]]), torch.full((1, 2), 0.5), config)
    torch.testing.assert_close(moved, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (D2OConfig.paper(), [0.7, 0.3]),
        (D2OConfig.authors(), [0.5, 0.5]),
        (D2OConfig.paper(threshold_scope=Scope.LAYER), [0.5, 0.5]),
    ],
)
def test_the_first_threshold_is_the_mean(config: D2OConfig, expected: list[float]) -> None:
    moved = merging.moved_threshold(matches([[0.5, 0.9], [0.6, 0.0]]), torch.full((1, 2), math.nan), config)
    torch.testing.assert_close(moved, torch.tensor([expected]))


def test_padding_and_tokens_without_a_match_do_not_move_the_threshold() -> None:
    found = [[True, False], [False, False]]
    values = [[0.5, 99.0], [99.0, 99.0]]
    config = D2OConfig.paper()
    first = merging.moved_threshold(matches(values, found), torch.full((1, 2), math.nan), config)
    torch.testing.assert_close(first, torch.tensor([[0.5, math.nan]]), equal_nan=True)
    later = merging.moved_threshold(matches(values, found), torch.full((1, 2), 0.25), config)
    torch.testing.assert_close(later, torch.tensor([[0.7 * 0.5 + 0.3 * 0.25, 0.25]]))


def test_equal_similarities_all_pass_their_own_mean() -> None:
    for value in torch.rand(50).tolist():
        equal = matches([[value] * 7] * 3)
        for config in (D2OConfig.paper(), D2OConfig.authors()):
            threshold = merging.moved_threshold(equal, torch.full((1, 3), math.nan), config)
            assert merging.passing(equal, threshold, config).all()


def test_the_authors_decide_on_the_mean_over_heads_of_equal_rank() -> None:
    similarity = matches([[0.9, 0.2], [0.1, 0.6]])
    threshold = torch.full((1, 2), 0.45)
    assert merging.passing(similarity, threshold, D2OConfig.authors()).tolist() == [[[True, False], [True, False]]]
    assert merging.passing(similarity, threshold, D2OConfig.paper()).tolist() == [[[True, False], [False, True]]]


def merged(config: D2OConfig, masses: tuple[float, float, float]) -> merging.Weights:
    """Two evicted tokens with similarities 0.8 and 0.6 into one survivor."""
    pairs = merging.pair(matches([[0.8, 0.6]]), torch.ones(1, 1, 2, dtype=torch.bool), 3)
    own, *pulled = masses
    return merging.weights(
        pairs, torch.tensor([0.8, 0.6]), torch.tensor([float(own)]), torch.tensor(pulled).float(), config
    )


def test_paper_weights_are_convex_and_exponential() -> None:
    share = merged(D2OConfig.paper(), (1, 1, 1))
    whole = math.e + math.exp(0.8) + math.exp(0.6)
    torch.testing.assert_close(share.own, torch.tensor([math.e / whole]))
    torch.testing.assert_close(share.pulled, torch.tensor([math.exp(0.8) / whole, math.exp(0.6) / whole]))
    torch.testing.assert_close(share.own + share.pulled.sum(), torch.ones(1))


def test_a_small_survivor_weight_leaves_the_survivor_little() -> None:
    assert merged(D2OConfig.paper(merge_weight=0.1), (1, 1, 1)).own < 0.03


def test_authors_weights_are_a_mean_of_cosine_times_evicted() -> None:
    share = merged(D2OConfig.authors(), (1, 1, 1))
    torch.testing.assert_close(share.own, torch.tensor([1 / 3]))
    torch.testing.assert_close(share.pulled, torch.tensor([0.8 / 3, 0.6 / 3]))


def test_conserving_weights_are_the_attention_received() -> None:
    share = merged(D2OConfig(), (2.0, 1.0, 1.0))
    torch.testing.assert_close(share.own, torch.tensor([0.5]))
    torch.testing.assert_close(share.pulled, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(merging.raised_bias(torch.zeros(1), share, D2OConfig()), torch.tensor([math.log(2)]))


def test_nobody_received_attention_and_the_survivor_stays_as_it_is() -> None:
    share = merged(D2OConfig(), (0.0, 0.0, 0.0))
    assert (share.own.item(), share.pulled.tolist()) == (1, [0, 0])
    assert merging.raised_bias(torch.zeros(1), share, D2OConfig()).item() == 0


def test_the_bias_is_clamped_where_the_survivor_was_worth_nothing() -> None:
    share = merged(D2OConfig(merge=Merge.CONSERVE), (0.0, 1.0, 1.0))
    assert merging.raised_bias(torch.zeros(1), share, D2OConfig(bias_limit=1.5)).item() == 1.5
