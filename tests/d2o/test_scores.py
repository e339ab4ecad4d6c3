"""Means, pools and ranks of attention."""

from __future__ import annotations

import pytest
import torch

from d2o import scores
from d2o.config import D2OConfig, Ranking, Scope, ScoreQueries

SEEN = torch.tensor([10])
POSITION = torch.tensor([[[0, 1, 8, 9]]], dtype=torch.int32)
SCORE = torch.tensor([[[5.0, 3.0, 2.0, 1.0]]])


def test_a_share_that_is_a_fraction_of_the_budget_gives_whole_tokens() -> None:
    budgets = torch.arange(1, 200)
    for part in range(1, 12):
        exact = budgets[budgets >= part]
        got = torch.stack([scores.share_of(budget[None], part / int(budget)) for budget in exact])
        assert (got == part).all()


def test_a_share_is_rounded_down() -> None:
    assert scores.share_of(torch.tensor([19, 49]), 0.25).tolist() == [4, 12]


def test_mean_attention_divides_by_the_queries_that_saw_the_slot() -> None:
    assert scores.mean_attention(SCORE, POSITION, SEEN).tolist() == [[[0.5, pytest.approx(1 / 3), 1.0, 1.0]]]


def test_last_queries_are_scaled_to_all_that_saw_the_slot() -> None:
    config = D2OConfig(score_queries=ScoreQueries(kind="last", count=4))
    scaled = scores.extrapolate(SCORE, POSITION, SEEN, config)
    assert scaled.tolist() == [[[12.5, 6.75, 2.0, 1.0]]]
    assert scores.extrapolate(SCORE, POSITION, SEEN, D2OConfig()) is SCORE


def test_the_window_is_averaged_over_its_queries_and_pooled_inside_the_row() -> None:
    window = torch.tensor([[[8.0, 4.0, 2.0, 3.0, torch.nan]]])
    position = torch.tensor([[[0, 1, 8, 9, 3]]], dtype=torch.int32)
    config = D2OConfig(window_queries=4, window_pool=3, window_ahead=None)
    pooled = scores.pooled_window_mean(window, position, torch.tensor([4]), SEEN, config)
    # Means 2, 1, 1 (seen by two queries), 3 (seen by one).
    torch.testing.assert_close(pooled, torch.tensor([[[1.5, 4 / 3, 5 / 3, 2.0, 0.0]]]))


def test_a_pool_may_lie_before_its_slot() -> None:
    window = torch.tensor([[[8.0, 4.0, 2.0, 3.0, torch.nan]]])
    position = torch.tensor([[[0, 1, 8, 9, 3]]], dtype=torch.int32)
    config = D2OConfig(window_queries=4, window_pool=3, window_ahead=0)
    pooled = scores.pooled_window_mean(window, position, torch.tensor([4]), SEEN, config)
    torch.testing.assert_close(pooled, torch.tensor([[[2.0, 1.5, 4 / 3, 5 / 3, 0.0]]]))
    evenly = [config.with_changes(window_ahead=ahead) for ahead in (1, None)]
    one, other = (scores.pooled_window_mean(window, position, torch.tensor([4]), SEEN, each) for each in evenly)
    assert torch.equal(one, other)


def test_without_pooling_the_window_is_the_mean() -> None:
    config = D2OConfig(window_queries=4, window_pool=1, window_ahead=0)
    pooled = scores.pooled_window_mean(SCORE, POSITION, torch.tensor([4]), SEEN, config)
    torch.testing.assert_close(pooled, torch.tensor([[[1.25, 0.75, 1.0, 1.0]]]))


def test_sums_rank_old_tokens_above_means() -> None:
    by_sum = scores.rank(SCORE, POSITION, SEEN, None, D2OConfig(ranking=Ranking.SUM))
    by_mean = scores.rank(SCORE, POSITION, SEEN, None, D2OConfig())
    assert by_sum.argmax() == 0
    assert by_mean.argmax() == 2


def test_a_blend_of_one_ranks_by_the_window_alone() -> None:
    pooled = torch.tensor([[[0.1, 0.9, 0.2, 0.3]]])
    config = D2OConfig(window_blend=1.0)
    assert torch.equal(scores.rank(SCORE, POSITION, SEEN, pooled, config), pooled)
    half = scores.rank(SCORE, POSITION, SEEN, pooled, config.with_changes(window_blend=0.5))
    torch.testing.assert_close(half, (pooled + scores.mean_attention(SCORE, POSITION, SEEN)) / 2)


def test_heads_of_a_layer_may_share_their_rank() -> None:
    score = torch.rand(2, 3, 4)
    position = POSITION.expand(2, 3, 4)
    rank = scores.rank(score, position, torch.tensor([10, 10]), None, D2OConfig(heads=Scope.LAYER, ranking=Ranking.SUM))
    torch.testing.assert_close(rank, score.mean(1, keepdim=True))
