"""Eviction in place leaves what compress() leaves, for every configuration, on prompts and in decode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from d2o.config import D2OConfig, Merge, Policy, Ranking, Scope, Threshold
from d2o.kernels.reference.evict import Evicted
from tests.d2o.kernels.caches import DEVICE, Case, random_case
from tests.d2o.test_compressor import CONFIGS, SMALL

SHARED = {
    f"{name}, one choice a layer": CONFIGS[name].with_changes(heads=Scope.LAYER)
    for name in ("default", "paper", "authors")
}


def assert_agrees(case: Case, config: D2OConfig, **more: int) -> Evicted:
    expected_case = case.copy()
    expected = expected_case.evict_by_twin(config)
    result = case.evict(config, **more)
    for pair in range(len(case.used)):
        ours, theirs = case.survivors(pair), expected_case.survivors(pair)
        assert torch.equal(ours["position"], theirs["position"])
        for name in ("k", "v", "score", "bias"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.threshold, expected.threshold, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(result.merged, expected.merged)
    torch.testing.assert_close(result.dropped, expected.dropped)
    return result


@pytest.mark.parametrize("config", (CONFIGS | SHARED).values(), ids=CONFIGS | SHARED)
def test_a_prompt_is_compressed_as_by_the_twin(config: D2OConfig) -> None:
    shared = config.heads is Scope.LAYER
    assert_agrees(random_case([85, 30], [14, 12], shared=shared, seed=len(str(config))), config)


@pytest.mark.parametrize("config", (CONFIGS | SHARED).values(), ids=CONFIGS | SHARED)
def test_a_decode_eviction_of_shuffled_slots_agrees_with_the_twin(config: D2OConfig) -> None:
    shared = config.heads is Scope.LAYER
    case = random_case([33, 25], [24, 23], shuffled=True, began=True, shared=shared, seed=len(str(config)) + 1)
    assert_agrees(case, config)


@pytest.mark.parametrize(("dim", "heads", "page"), [(64, 3, 16), (96, 1, 32), (128, 2, 64), (256, 1, 16)])
@pytest.mark.parametrize("evicted", [1, 16, 70])
def test_head_dims_page_sizes_and_amounts(dim: int, heads: int, page: int, evicted: int) -> None:
    case = random_case([100], [100 - evicted], dim=dim, heads=heads, page=page, shuffled=True, seed=dim + evicted)
    assert_agrees(case, D2OConfig(**SMALL, merge_keys=True))


@pytest.mark.parametrize("keep", [1, 3, 5])
@pytest.mark.parametrize("name", ["default", "paper", "streaming", "snapkv"])
def test_budgets_below_sinks_and_recent_window(keep: int, name: str) -> None:
    assert_agrees(random_case([24, 11], [keep, keep], seed=keep), CONFIGS[name])


@pytest.mark.parametrize("ranking", list(Ranking))
def test_of_equal_scores_the_older_survives_in_any_order_of_slots(ranking: Ranking) -> None:
    for shuffled in (False, True):
        case = random_case([40], [20], shuffled=shuffled, seed=4)
        case.pool.score.zero_()
        if case.window is not None:
            case.window.zero_()
        assert_agrees(case, D2OConfig(**SMALL, ranking=ranking))


def test_evictions_in_a_row_move_the_threshold_as_the_twin_does() -> None:
    config = D2OConfig(**SMALL)
    case = random_case([80], [60], shuffled=True, seed=6)
    for keep in (60, 50, 45):
        case = Case(**{**vars(case), "keep": torch.tensor([keep])})
        threshold = assert_agrees(case, config).threshold
        case = Case(**{**vars(case), "used": torch.tensor([keep]), "threshold": threshold})


@pytest.mark.parametrize("name", ["default", "authors"])
def test_chunks_of_one_pair_change_nothing(name: str) -> None:
    assert_agrees(random_case([90, 20, 65], [20, 12, 18], seed=3), CONFIGS[name], scratch_bytes=1)


def test_with_only_sinks_left_everything_is_dropped_and_the_threshold_stays() -> None:
    case = random_case([20], [4], began=True)
    result = assert_agrees(case, D2OConfig(sinks=4))
    assert result.dropped.tolist() == [16]
    assert torch.equal(result.threshold, case.threshold)


# Triton's interpreter multiplies bfloat16 by its bits.
@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("evicted", [20, 80])
def test_half_precision_finds_the_same_survivors_and_nearly_the_same_threshold(
    dtype: torch.dtype, evicted: int
) -> None:
    case = random_case([130], [130 - evicted], dim=64, dtype=dtype, seed=9)
    pool = replace(case.pool, k=case.pool.k.float(), v=case.pool.v.float())
    exact = replace(case, pool=pool).copy()
    expected, result = exact.evict_by_twin(CONFIGS["default"]), case.evict(CONFIGS["default"])
    ours, theirs = case.survivors(0), exact.survivors(0)
    assert torch.equal(ours["position"], theirs["position"])
    torch.testing.assert_close(result.threshold, expected.threshold, rtol=0.01, atol=0.01)
    # Near ties of half-precision cosines may fall to another survivor.
    assert (ours["v"] == theirs["v"].to(dtype)).all(-1).float().mean() > 0.8
    assert ours["v"].isfinite().all()


def test_no_slot_outside_the_pairs_is_written() -> None:
    case = random_case([50, 30], [20, 25], seed=12)
    pages = torch.cat([case.tables[i, : -(-int(case.used[i]) // case.pool.page_size)] for i in range(2)]).long()
    case.evict(CONFIGS["paper"])
    outside = torch.ones(case.pool.k.shape[0], dtype=torch.bool, device=case.pool.device)
    outside[pages] = False
    assert case.pool.k[outside].isnan().all()
    assert case.pool.score[outside].isnan().all()


@pytest.mark.parametrize("keep", [0, 24])
def test_a_budget_that_evicts_nothing_or_all_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="keep"):
        random_case([24], [keep]).evict(D2OConfig())


def test_policies_that_merge_nothing_leave_the_threshold_unset() -> None:
    for config in (D2OConfig.of(Policy.H2O), D2OConfig(**SMALL, merge=Merge.NONE, threshold=Threshold.PAPER)):
        result = assert_agrees(random_case([40], [12], seed=2), config)
        assert result.threshold.isnan().all()
        assert result.dropped.tolist() == [28]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("used", "keep", "shuffled"), [(3000, 700, False), (2032, 2000, True)])
def test_middle_sizes_on_the_device(dim: int, used: int, keep: int, shuffled: bool) -> None:
    case = random_case([used, used - 100], [keep, keep - 90], dim=dim, heads=3, page=32, shuffled=shuffled, seed=dim)
    exact = case.copy()
    expected, result = exact.evict_by_twin(D2OConfig()), case.evict(D2OConfig())
    torch.testing.assert_close(result.threshold, expected.threshold, rtol=1e-4, atol=1e-4)
    for pair in range(2):
        ours, theirs = case.survivors(pair), exact.survivors(pair)
        assert torch.equal(ours["position"], theirs["position"])
        # Of thousands of cosines some are nearly equal, and then either survivor will do.
        same = torch.isclose(ours["v"], theirs["v"], rtol=1e-4, atol=1e-4).all(-1)
        assert same.float().mean() > 0.98
