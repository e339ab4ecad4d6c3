"""Who survives, by the parts of a layer's budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2o import eviction
from d2o.config import D2OConfig, Policy, Scope


def survivors(score: list[float], keep: int, config: D2OConfig, window: list[float] | None = None) -> list[int]:
    """Positions that survive in one head whose slots are positions 0, 1, ..."""
    count = len(score)
    choice = eviction.choose(
        torch.tensor([[score]]),
        torch.arange(count, dtype=torch.int32)[None, None],
        torch.tensor([count]),
        torch.tensor([keep]),
        torch.tensor([count]),
        config,
        None if window is None else torch.tensor([[window]]),
    )
    gone = choice.evicted[0, 0].tolist()
    kept: list[int] = choice.kept[0, 0].tolist()
    assert sorted(kept + gone) == list(range(count))
    return kept


def test_sinks_recent_and_heavy_hitters_share_the_budget() -> None:
    score = [0.0, 0.0, 1.0, 9.0, 3.0, 8.0, 2.0, 0.0, 0.0, 0.0]
    assert survivors(score, 6, D2OConfig.paper(sinks=2, recent_tokens=2)) == [0, 1, 3, 5, 8, 9]


def test_ranking_by_the_mean_does_not_favour_old_tokens() -> None:
    score = [0.0, 4.0, 0.5, 3.0, 0.0, 0.0]
    config = D2OConfig(sinks=0, recent_share=0.0, window_quota=0.0)
    # Position 3 was seen by three queries only: mean 1.0 against 0.8.
    assert survivors(score, 1, config) == [3]
    assert survivors(score, 1, D2OConfig.of("h2o", recent_share=0.0)) == [1]


def test_equal_ranks_keep_the_older_slot() -> None:
    config = D2OConfig.of("h2o", recent_share=0.0)
    assert survivors([1.0] * 6, 3, config) == [0, 1, 2]
    assert survivors([1.0] * 6, 5, config) == [0, 1, 2, 3, 4]


def test_scores_that_are_no_numbers_rank_last() -> None:
    config = D2OConfig.of("h2o", recent_share=0.0)
    assert survivors([torch.nan, 1.0, 2.0, torch.nan, 0.5], 3, config) == [1, 2, 4]


def test_the_recent_window_counts_positions_not_slots() -> None:
    choice = eviction.choose(
        torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0]]]),
        torch.tensor([[[0, 3, 7, 8, 19]]], dtype=torch.int32),
        torch.tensor([5]),
        torch.tensor([3]),
        torch.tensor([20]),
        D2OConfig.paper(sinks=0, recent_tokens=2),
    )
    # Positions 18 and 19 are recent, of which only one is here; slots 2 to 4 are not.
    assert choice.kept.tolist() == [[[0, 1, 4]]]


def test_the_quota_saves_by_window_and_raises_the_score() -> None:
    window = [0.0, 0.0, 8.0, 0.0, 0.0, 0.0]
    config = D2OConfig(
        sinks=1,
        recent_tokens=1,
        recent_share=0.0,
        window_quota=0.25,
        window_queries=2,
        window_pool=1,
        window_ahead=None,
    )
    score = torch.tensor([[[9.0, 5.0, 0.4, 3.0, 0.1, 0.1]]])
    choice = eviction.choose(
        score,
        torch.arange(6, dtype=torch.int32)[None, None],
        torch.tensor([6]),
        torch.tensor([4]),
        torch.tensor([6]),
        config,
        torch.tensor([[window]]),
    )
    # The recent token is 5, the quota's is 2 (window mean 8 / 2 over the 4 queries that saw it), by rank comes 1 or 3.
    assert choice.kept.tolist() == [[[0, 1, 2, 5]]]
    assert choice.score.tolist() == [[[9.0, 5.0, 16.0, 3.0, pytest.approx(0.1), pytest.approx(0.1)]]]


def test_a_row_that_evicts_nothing_has_no_score_raised() -> None:
    score, window = torch.rand(2, 1, 8), torch.full((2, 1, 8), 50.0)
    choice = eviction.choose(
        score,
        torch.arange(8, dtype=torch.int32).expand(2, 1, 8),
        torch.tensor([8, 8]),
        torch.tensor([4, 8]),
        torch.tensor([8, 8]),
        D2OConfig(sinks=1, window_queries=2, window_quota=0.5),
        window,
    )
    assert not torch.equal(choice.score[0], score[0])
    assert torch.equal(choice.score[1], score[1])


def test_streaming_keeps_sinks_and_the_newest() -> None:
    assert survivors([9.0] * 9, 5, D2OConfig.of(Policy.STREAMING, sinks=2)) == [0, 1, 6, 7, 8]


def test_snapkv_keeps_its_window_and_the_best_by_it() -> None:
    config = D2OConfig.of(Policy.SNAPKV, window_queries=3, window_pool=1, window_ahead=None)
    window = [0.0, 7.0, 0.0, 1.0, 5.0, 0.0, 0.1, 0.1, 0.1]
    assert survivors([9.0, 0, 9, 9, 0, 9, 0, 0, 0], 5, config, window) == [1, 4, 6, 7, 8]


def test_h2o_splits_its_budget_in_half() -> None:
    assert survivors([1.0, 5.0, 4.0, 3.0, 0.0, 0.0, 0.0, 0.0], 4, D2OConfig.of(Policy.H2O)) == [1, 2, 6, 7]


@pytest.mark.parametrize("keep", range(1, 8))
def test_budgets_that_cannot_hold_every_part_keep_sinks_first_and_then_the_newest(keep: int) -> None:
    config = D2OConfig.paper(sinks=3, recent_tokens=3)
    expected = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 9], [0, 1, 2, 8, 9], [0, 1, 2, 7, 8, 9], [0, 1, 2, 4, 7, 8, 9]]
    assert survivors([0.0, 0, 0, 1, 5, 0, 0, 0, 0, 0], keep, config) == expected[keep - 1]


def test_heads_choose_alone_or_together() -> None:
    score = torch.tensor([[[3.0, 0.0, 2.0, 1.0], [0.0, 3.0, 2.5, 1.0]]])
    position = torch.arange(4, dtype=torch.int32).expand(1, 2, 4)

    def kept(config: D2OConfig) -> Tensor:
        count = torch.tensor([4])
        return eviction.choose(score, position, count, torch.tensor([1]), count, config).kept

    alone = D2OConfig.of(Policy.H2O, recent_share=0.0)
    assert kept(alone).tolist() == [[[0], [1]]]
    assert kept(alone.with_changes(heads=Scope.LAYER)).tolist() == [[[2], [2]]]


@pytest.mark.parametrize(
    ("config", "keep", "recent"),
    [
        (D2OConfig.paper(), 16, 4),
        (D2OConfig.paper(), 19, 4),
        (D2OConfig.paper(recent_tokens=9), 16, 9),
        (D2OConfig.paper(recent_tokens=90), 16, 12),
        (D2OConfig.of(Policy.STREAMING), 16, 12),
        (D2OConfig.of(Policy.SNAPKV), 100, 32),
        (D2OConfig.of(Policy.SNAPKV), 20, 20),
        (D2OConfig.of(Policy.H2O), 16, 8),
        (D2OConfig(sinks=4), 3, 0),
    ],
)
def test_the_recent_window_of_a_budget(config: D2OConfig, keep: int, recent: int) -> None:
    assert eviction.recent_tokens(torch.tensor([keep]), config).tolist() == [recent]
