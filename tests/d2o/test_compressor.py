"""compress() agrees with the oracle, leaves alone what fits, and does not care how rows are batched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from d2o import compressor, merging
from d2o.compressor import Compressed
from d2o.config import D2OConfig, Merge, Policy, Ranking, Scope, Threshold
from tests.d2o import oracle
from tests.d2o.batches import Batch, random_batch

SMALL: dict[str, Any] = {"sinks": 2, "window_queries": 5, "window_pool": 3, "window_ahead": 1}
CONFIGS = {
    "default": D2OConfig(**SMALL),
    "paper": D2OConfig.paper(**SMALL),
    "authors": D2OConfig.authors(**SMALL),
    "authors with weights that do not sum to one": D2OConfig.authors(**SMALL, alpha=0.3, beta=0.6),
    "authors' threshold a head": D2OConfig.authors(**SMALL, threshold_scope=Scope.HEAD),
    "paper's threshold a layer": D2OConfig.paper(**SMALL, threshold_scope=Scope.LAYER),
    "paper without sinks as targets": D2OConfig.paper(**SMALL, merge_into_sinks=False),
    "conserve, keys too, no bias": D2OConfig(**SMALL, merge_keys=True, merge_bias=False),
    "conserve, everything merged": D2OConfig(**SMALL, threshold=Threshold.OFF),
    "conserve, tight bias": D2OConfig(**SMALL, bias_limit=0.4),
    "sums blended with the window": D2OConfig(**SMALL, ranking=Ranking.SUM, window_blend=0.4),
    "explicit recent": D2OConfig(**SMALL, recent_tokens=3),
    "dropped": D2OConfig(**SMALL, merge=Merge.NONE),
    "h2o": D2OConfig.of(Policy.H2O),
    "streaming": D2OConfig.of(Policy.STREAMING, sinks=2),
    "snapkv": D2OConfig.of(Policy.SNAPKV, window_queries=5, window_pool=3, window_ahead=None),
}


def assert_equals_oracle(batch: Batch, keep: list[int], config: D2OConfig, windowed: bool = True) -> None:
    result = batch.compress(torch.tensor(keep), config, windowed)
    kept = [min(budget, used) for budget, used in zip(keep, batch.slots.used.tolist(), strict=True)]
    assert result.slots.used.tolist() == kept
    for row, budget in enumerate(keep):
        alone = batch.row(row)
        heads = heads_of(alone)
        oracle.evict(heads, budget, int(alone.seen), config, windowed)
        assert_row_equals(result, row, heads)
        merged = sum(head.merged for head in heads) / len(heads)
        assert result.merged[row].item() == pytest.approx(merged)
        assert result.dropped[row].item() == pytest.approx(int(alone.slots.used) - kept[row] - merged)


def heads_of(alone: Batch) -> list[oracle.Head]:
    s = alone.slots
    return [
        oracle.Head(
            [
                oracle.Token(
                    s.k[0, head, i].double(),
                    s.v[0, head, i].double(),
                    float(s.score[0, head, i]),
                    int(s.position[0, head, i]),
                    float(s.bias[0, head, i]),
                    float(alone.window[0, head, i]),
                )
                for i in range(int(s.used))
            ],
            float(alone.threshold[0, head]),
        )
        for head in range(s.k.shape[1])
    ]


def assert_row_equals(result: Compressed, row: int, heads: list[oracle.Head]) -> None:
    used = len(heads[0].tokens)
    for h, head in enumerate(heads):
        assert result.slots.position[row, h, :used].tolist() == [token.position for token in head.tokens]
        for name in ("k", "v"):
            expected = torch.stack([getattr(token, name) for token in head.tokens])
            torch.testing.assert_close(
                getattr(result.slots, name)[row, h, :used].double(), expected, rtol=1e-5, atol=1e-5
            )
        for name in ("score", "bias"):
            values = torch.tensor([getattr(token, name) for token in head.tokens])
            torch.testing.assert_close(getattr(result.slots, name)[row, h, :used], values, rtol=1e-5, atol=1e-6)
        assert result.threshold[row, h].item() == pytest.approx(head.threshold, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("windowed", [True, False], ids=["prompt", "decode"])
@pytest.mark.parametrize("began", [False, True], ids=["first eviction", "later eviction"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ragged_rows_agree_with_the_oracle(config: D2OConfig, began: bool, windowed: bool) -> None:
    batch = random_batch([40, 17, 9, 33, 12], heads=3, began=began, seed=len(str(config)))
    assert_equals_oracle(batch, [16, 16, 12, 30, 9], config, windowed)


@pytest.mark.parametrize("name", ["default", "paper", "authors"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_that_share_one_choice_agree_with_the_oracle(name: str, heads: int) -> None:
    config = CONFIGS[name].with_changes(heads=Scope.LAYER)
    batch = random_batch([31, 20], heads=heads, shared_positions=True, seed=heads)
    assert_equals_oracle(batch, [14, 15], config)
    result = batch.compress(torch.tensor([14, 15]), config)
    assert (result.slots.position == result.slots.position[:, :1]).all()


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_budgets_below_sinks_and_recent_window_are_kept_exactly(keep: int) -> None:
    for name in ("default", "paper", "streaming", "snapkv"):
        assert_equals_oracle(random_batch([24, 11], seed=keep), [keep, keep], CONFIGS[name])


@pytest.mark.parametrize("name", ["default", "paper", "authors"])
def test_small_tiles_and_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, keep = random_batch([70, 20, 65], dim=16, seed=3), torch.tensor([30, 20, 18])
    whole = batch.compress(keep, CONFIGS[name])
    monkeypatch.setattr(merging, "_CPU_TILE", (64, 64))
    monkeypatch.setattr(compressor, "_CPU_CHUNK", 64)
    chunked = batch.compress(keep, CONFIGS[name])
    for row, used in enumerate(whole.slots.used.tolist()):
        for field in ("k", "v", "score", "position", "bias"):
            ours, theirs = (getattr(result.slots, field)[row, :, :used] for result in (whole, chunked))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.threshold, chunked.threshold, equal_nan=True)
    assert torch.equal(whole.merged, chunked.merged)


def test_the_order_of_slots_does_not_matter() -> None:
    batch, keep, config = random_batch([30, 22], seed=5), torch.tensor([12, 22]), CONFIGS["default"]
    order = torch.cat([torch.arange(22).flip(0), torch.arange(22, 32)])
    s = batch.slots
    turned = compressor.Slots(
        k=s.k[:, :, order],
        v=s.v[:, :, order],
        score=s.score[:, :, order],
        position=s.position[:, :, order],
        bias=s.bias[:, :, order],
        used=s.used,
    )
    expected = batch.compress(keep, config)
    result = Batch(turned, batch.seen, batch.window[:, :, order], batch.threshold).compress(keep, config)
    assert torch.equal(result.slots.position[0, :, :12], expected.slots.position[0, :, :12])
    torch.testing.assert_close(result.slots.v[0, :, :12], expected.slots.v[0, :, :12])
    torch.testing.assert_close(result.slots.k[1, :, :22], expected.slots.k[1, :, :22])


def test_nothing_to_evict_returns_the_very_slots() -> None:
    batch = random_batch([10, 20])
    result = batch.compress(torch.tensor([10, 50]), D2OConfig())
    assert result.slots is batch.slots
    assert result.threshold is batch.threshold
    assert result.merged.tolist() == result.dropped.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_within_its_budget_is_untouched_beside_one_that_is_not(dtype: torch.dtype) -> None:
    batch = random_batch([40, 13], dtype=dtype, seed=8)
    result = batch.compress(torch.tensor([12, 13]), D2OConfig(window_queries=4))
    for name in ("k", "v", "score", "position", "bias"):
        assert torch.equal(getattr(result.slots, name)[1, :, :13], getattr(batch.slots, name)[1, :, :13])
    assert result.threshold[1].isnan().all()
    assert result.merged[1] == result.dropped[1] == 0


def test_the_caches_that_were_given_are_not_written_to() -> None:
    batch = random_batch([40], seed=9)
    before = [getattr(batch.slots, name).clone() for name in ("k", "v", "score", "bias")]
    batch.compress(torch.tensor([12]), CONFIGS["default"])
    after = [getattr(batch.slots, name) for name in ("k", "v", "score", "bias")]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def test_without_merging_the_threshold_stays_unset() -> None:
    result = random_batch([40]).compress(torch.tensor([12]), CONFIGS["dropped"])
    assert result.threshold.isnan().all()
    assert result.dropped.tolist() == [28]


def test_with_only_sinks_left_everything_is_dropped_and_the_threshold_stays() -> None:
    batch = random_batch([20], began=True)
    result = batch.compress(torch.tensor([4]), D2OConfig(sinks=4))
    assert result.dropped.tolist() == [16]
    assert torch.equal(result.threshold, batch.threshold)
    assert result.slots.position.tolist() == [[[0, 1, 2, 3]] * 2]


def test_half_precision_merges_round_once() -> None:
    batch, keep, config = random_batch([60], dim=32, seed=2), torch.tensor([20]), D2OConfig.paper(sinks=2)
    rounded = random_batch([60], dim=32, seed=2, dtype=torch.bfloat16)
    exact_of_rounded = Batch(
        compressor.Slots(
            k=rounded.slots.k.float(),
            v=rounded.slots.v.float(),
            score=batch.slots.score,
            position=batch.slots.position,
            bias=batch.slots.bias,
            used=batch.slots.used,
        ),
        batch.seen,
        batch.window,
        batch.threshold,
    ).compress(keep, config)
    half = rounded.compress(keep, config)
    # The search for the nearest runs in bfloat16, so near ties may fall to another survivor: most merges are the same.
    same = (half.slots.v == exact_of_rounded.slots.v.bfloat16()).all(-1).float().mean()
    assert same > 0.8
    torch.testing.assert_close(half.threshold, exact_of_rounded.threshold, rtol=0.01, atol=0.01)
    assert math.isfinite(float(half.slots.v.float().sum()))
