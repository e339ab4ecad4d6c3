"""Survivors are those that eviction.choose() takes, whatever the order of slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d2o import eviction
from d2o.config import D2OConfig, Policy, Ranking, Scope
from d2o.kernels import select as kernels
from d2o.kernels.reference.evict import slots_of
from d2o.kernels.select import Selection, select
from tests.d2o.kernels.caches import Case, random_case

SMALL: dict[str, Any] = {"sinks": 2, "window_queries": 5, "window_pool": 3, "window_ahead": 1}
CONFIGS = {
    "window quota": D2OConfig(**SMALL),
    "window blend": D2OConfig(**SMALL, window_quota=0.0, window_blend=0.7),
    "sums, quota and blend": D2OConfig(**SMALL, ranking=Ranking.SUM, window_blend=0.3),
    "sums": D2OConfig.paper(**SMALL),
    "quota of all": D2OConfig(**SMALL, window_quota=0.9, recent_share=0.1),
    "one choice a layer": D2OConfig(**SMALL, heads=Scope.LAYER),
    "streaming": D2OConfig.of(Policy.STREAMING, sinks=2),
    "snapkv": D2OConfig.of(Policy.SNAPKV, window_queries=5, window_pool=3, window_ahead=None),
}


def positions(case: Case, selection: Selection, pair: int) -> tuple[list[list[int]], list[list[int]]]:
    """Sorted positions of the kept and the evicted in every head."""
    position = slots_of(case.pool, case.tables, case.used).position[pair]
    counts = (int(case.keep[pair]), int(case.used[pair] - case.keep[pair]))
    lists = (selection.kept[pair], selection.evicted[pair])
    kept, evicted = (
        position.gather(-1, each[:, :n].long()).sort().values.tolist() for each, n in zip(lists, counts, strict=True)
    )
    return kept, evicted


def assert_agrees(case: Case, config: D2OConfig) -> Selection:
    slots = slots_of(case.pool, case.tables, case.used)
    pairs, choices = case.pairs(config), []
    for pair, used in enumerate(case.used.tolist()):
        score, position = slots.score[pair : pair + 1, :, :used], slots.position[pair : pair + 1, :, :used]
        if case.window is None:
            order = position.argsort(-1)
            score, position = score.gather(-1, order), position.gather(-1, order)
        near = None if case.window is None else case.window[pair : pair + 1, :, :used]
        count, keep, seen = (each[pair : pair + 1].to(score.device) for each in (case.used, case.keep, case.seen))
        choices.append((position, eviction.choose(score, position, count, keep, seen, config, near)))
    selection = select(case.pool, pairs, config, case.window)
    for pair, (position, choice) in enumerate(choices):
        kept, evicted = positions(case, selection, pair)
        assert kept == position[0].gather(-1, choice.kept[0]).tolist()
        assert evicted == position[0].gather(-1, choice.evicted[0]).tolist()
        raised = slots_of(case.pool, case.tables, case.used).score[pair, :, : int(case.used[pair])]
        torch.testing.assert_close(raised.sort().values, choice.score[0].sort().values)
    return selection


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shuffled", [False, True], ids=["prompt", "decode"])
def test_survivors_agree_with_the_twin(config: D2OConfig, shuffled: bool) -> None:
    shared = config.heads is Scope.LAYER
    case = random_case([70, 33, 9], [30, 32, 1], heads=3, shuffled=shuffled, shared=shared, seed=len(str(config)))
    assert_agrees(case, config)


def test_lists_ascend_and_together_hold_every_slot_once() -> None:
    case = random_case([60, 41], [20, 40], heads=2, shuffled=True)
    selection = assert_agrees(case, CONFIGS["sums"])
    for pair, (used, keep) in enumerate(zip(case.used.tolist(), case.keep.tolist(), strict=True)):
        for head in range(2):
            kept = selection.kept[pair, head, :keep].tolist()
            evicted = selection.evicted[pair, head, : used - keep].tolist()
            assert kept == sorted(kept)
            assert evicted == sorted(evicted)
            assert sorted(kept + evicted) == list(range(used))
            assert int(selection.fallback[pair, head]) in kept


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_of_equal_scores_the_older_survive(value: float) -> None:
    case = random_case([50], [20], shuffled=True, seed=2)
    case.pool.score.fill_(value)
    assert_agrees(case, CONFIGS["sums"])


def test_scores_that_differ_in_the_last_bit_are_told_apart() -> None:
    case = random_case([40], [11], heads=1, shuffled=True, seed=3)
    bits = torch.tensor(1.0).view(torch.int32) + torch.randperm(case.pool.score.numel(), dtype=torch.int32)
    case.pool.score.copy_(bits.view(torch.float32).view_as(case.pool.score))
    assert_agrees(case, D2OConfig.of(Policy.H2O, recent_tokens=0))


def test_without_a_survivor_that_may_be_merged_into_there_is_no_fallback() -> None:
    case = random_case([20], [4])
    assert select(case.pool, case.pairs(D2OConfig()), D2OConfig(), None).fallback.tolist() == [[-1, -1]]


@pytest.mark.parametrize("held", [(), ((64, 4),), ((16, 2), (256, 8))], ids=["none", "some", "all"])
def test_keys_are_chosen_from_alike_whether_a_program_holds_them(
    held: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "HELD", held)
    assert_agrees(random_case([70, 33, 9], [30, 32, 1], heads=3, shuffled=True), CONFIGS["sums"])
    assert_agrees(random_case([60], [20], heads=2, seed=4), CONFIGS["window quota"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shuffled", [False, True], ids=["prompt", "decode"])
def test_long_caches_on_the_device(shuffled: bool) -> None:
    for name in ("window quota", "sums"):
        assert_agrees(random_case([9000, 5001], [2000, 4000], heads=3, page=32, shuffled=shuffled), CONFIGS[name])
