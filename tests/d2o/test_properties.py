"""ALGORITHM.md section 7, for whatever hypothesis thinks of."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2o.compressor import Compressed, Slots, compress
from d2o.config import D2OConfig, Policy
from tests.d2o.batches import Batch, random_batch

METHODS = [
    D2OConfig(window_queries=8),
    D2OConfig.paper(),
    D2OConfig.authors(),
    D2OConfig.of(Policy.H2O),
    D2OConfig.of(Policy.STREAMING),
    D2OConfig.of(Policy.SNAPKV, window_queries=8),
]
methods = st.sampled_from(METHODS)
used_slots = st.lists(st.integers(6, 60), min_size=1, max_size=5)
seeds = st.integers(0, 10_000)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def budgets(draw: st.DrawFn) -> tuple[list[int], Tensor]:
    used = draw(used_slots)
    return used, torch.tensor([draw(st.integers(5, count + 2)) for count in used])


def survivors(result: Compressed, row: int, head: int) -> list[int]:
    positions: list[int] = result.slots.position[row, head, : int(result.slots.used[row])].tolist()
    return positions


@given(batch=budgets(), config=methods, heads=st.integers(1, 4), seed=seeds, began=st.booleans())
@settings(deadline=None)
def test_every_head_keeps_exactly_its_budget_of_slots_that_were_there(
    batch: tuple[list[int], Tensor], config: D2OConfig, heads: int, seed: int, began: bool
) -> None:
    used, keep = batch
    given_in = random_batch(used, heads=heads, seed=seed, began=began)
    result = given_in.compress(keep, config)
    assert result.slots.used.tolist() == [min(k, u) for k, u in zip(keep.tolist(), used, strict=True)]
    torch.testing.assert_close(result.merged + result.dropped, (torch.tensor(used) - keep).clamp_min(0).float())
    for row, count in enumerate(used):
        for head in range(heads):
            positions = survivors(result, row, head)
            assert positions == sorted(set(positions))
            assert set(positions) <= set(given_in.slots.position[row, head, :count].tolist())


@given(batch=budgets(), config=methods, seed=seeds)
@settings(deadline=None)
def test_sinks_and_the_recent_window_survive(batch: tuple[list[int], Tensor], config: D2OConfig, seed: int) -> None:
    used, keep = batch
    given_in = random_batch(used, seed=seed)
    result = given_in.compress(keep, config)
    for row, count in enumerate(used):
        recent = min(int(int(keep[row]) * config.recent_share + 1e-6), int(keep[row]) - config.sinks)
        for head in range(2):
            before = given_in.slots.position[row, head, :count].tolist()
            must = {p for p in before if p < config.sinks or p >= int(given_in.seen[row]) - recent}
            assert must <= set(survivors(result, row, head))


@given(batch=budgets(), config=methods, seed=seeds)
@settings(deadline=None)
def test_a_sequence_alone_is_the_same_as_in_a_batch(
    batch: tuple[list[int], Tensor], config: D2OConfig, seed: int
) -> None:
    used, keep = batch
    together = random_batch(used, dim=16, seed=seed)
    result = together.compress(keep, config)
    for row in range(len(used)):
        alone = together.row(row).compress(keep[row : row + 1], config)
        left = int(alone.slots.used)
        for name in ("position", "k", "v", "score", "bias"):
            ours, lone = getattr(result.slots, name)[row, :, :left], getattr(alone.slots, name)[0, :, :left]
            torch.testing.assert_close(ours, lone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.threshold[row], alone.threshold[0], rtol=1e-6, atol=1e-6, equal_nan=True)


@given(used=used_slots, config=methods, seed=seeds, dtype=TYPES)
@settings(deadline=None)
def test_a_budget_of_all_changes_no_bit(used: list[int], config: D2OConfig, seed: int, dtype: torch.dtype) -> None:
    batch = random_batch(used, seed=seed, dtype=dtype)
    assert batch.compress(torch.tensor(used), config).slots is batch.slots


@given(batch=budgets(), seed=seeds, dtype=TYPES, merge_weight=st.floats(0.01, 10), large=st.booleans())
@settings(deadline=None)
def test_paper_merges_stay_between_the_smallest_and_largest_that_went_in(
    batch: tuple[list[int], Tensor], seed: int, dtype: torch.dtype, merge_weight: float, large: bool
) -> None:
    used, keep = batch
    given_in = random_batch(used, seed=seed, dtype=dtype)
    if large:
        given_in.slots.k.mul_(1e4)
        given_in.slots.v.mul_(1e4)
    result = given_in.compress(keep, D2OConfig.paper(merge_weight=merge_weight))
    for row, (count, left) in enumerate(zip(used, result.slots.used.tolist(), strict=True)):
        for name in ("k", "v"):
            before = getattr(given_in.slots, name)[row, :, :count].float()
            after = getattr(result.slots, name)[row, :, :left].float()
            slack = 1e-2 * before.abs().amax(1, keepdim=True)
            assert (after <= before.amax(1, keepdim=True) + slack).all()
            assert (after >= before.amin(1, keepdim=True) - slack).all()


@given(batch=budgets(), config=methods, seed=seeds, dtype=TYPES)
@settings(deadline=None)
def test_half_precision_stays_finite_for_the_largest_values(
    batch: tuple[list[int], Tensor], config: D2OConfig, seed: int, dtype: torch.dtype
) -> None:
    used, keep = batch
    given_in = random_batch(used, seed=seed, dtype=dtype)
    given_in.slots.k.mul_(9e3)
    given_in.slots.v.mul_(9e3)
    result = given_in.compress(keep, config)
    for row, left in enumerate(result.slots.used.tolist()):
        assert result.slots.k[row, :, :left].isfinite().all()
        assert result.slots.v[row, :, :left].isfinite().all()
        assert (result.slots.bias[row, :, :left] <= max(config.bias_limit, 0.3)).all()


@given(batch=budgets(), seed=seeds)
@settings(deadline=None)
def test_conserving_merges_lose_no_score_but_that_of_dropped_tokens(batch: tuple[list[int], Tensor], seed: int) -> None:
    used, keep = batch
    given_in = random_batch(used, seed=seed)
    result = given_in.compress(keep, D2OConfig(threshold="off"), windowed=False)  # type: ignore[arg-type]
    for row, (count, left) in enumerate(zip(used, result.slots.used.tolist(), strict=True)):
        before = given_in.slots.score[row, :, :count].sum(-1)
        torch.testing.assert_close(result.slots.score[row, :, :left].sum(-1), before, rtol=1e-5, atol=1e-5)


def attention(slots: Slots, query: Tensor) -> Tensor:
    logits = slots.k[0] @ query.unsqueeze(-1) / math.sqrt(query.shape[-1]) + slots.bias[0].unsqueeze(-1)
    return (logits.softmax(1) * slots.v[0]).sum(1)


def twins(seed: int, copies: int) -> tuple[Batch, Tensor]:
    """A recent token, and before it ``copies`` equal tokens of equal mean attention."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, 1, 2, 8, generator=generator) for _ in "kv")
    index = torch.tensor([0] * copies + [1])
    count = copies + 1
    position = torch.arange(count, dtype=torch.int32)
    seen = torch.tensor([count])
    # Equal mean attention, a little more for the newer, so that the recent token and the last copy survive.
    score = (0.5 * (seen - position).float() * torch.linspace(1, 1 + 1e-5, count))[None, None]
    slots = Slots(
        k=k[:, :, index],
        v=v[:, :, index],
        score=score,
        position=position[None, None],
        bias=torch.zeros(1, 1, count),
        used=torch.tensor([count]),
    )
    batch = Batch(slots, seen, torch.zeros(1, 1, count), torch.full((1, 1), math.nan))
    return batch, torch.randn(1, 8, generator=generator)


@given(seed=seeds, copies=st.integers(2, 7))
@settings(deadline=None)
def test_equal_tokens_become_one_whose_log_bias_counts_them(seed: int, copies: int) -> None:
    batch, query = twins(seed, copies)
    config = D2OConfig(sinks=0, window_quota=0.0, recent_share=0.0, threshold="off")  # type: ignore[arg-type]
    result = batch.compress(torch.tensor([2]), config, windowed=False)
    assert survivors(result, 0, 0) == [copies - 1, copies]
    torch.testing.assert_close(attention(result.slots, query), attention(batch.slots, query), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.slots.bias.max(), torch.tensor(math.log(copies)), rtol=1e-4, atol=1e-4)


@given(seed=seeds, copies=st.integers(2, 7))
@settings(deadline=None)
def test_the_papers_merge_of_equal_tokens_changes_neither_key_nor_value(seed: int, copies: int) -> None:
    batch, _ = twins(seed, copies)
    result = batch.compress(torch.tensor([2]), D2OConfig.paper(sinks=0, recent_tokens=1), windowed=False)
    assert result.merged.item() == copies - 1
    for name in ("k", "v"):
        after, before = getattr(result.slots, name)[0, 0], getattr(batch.slots, name)[0, 0]
        torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-6)


@given(config=methods, seed=seeds, steps=st.integers(1, 12), interval=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_decode_never_holds_more_than_budget_and_interval(
    config: D2OConfig, seed: int, steps: int, interval: int
) -> None:
    batch, budget = random_batch([24], gap=0, seed=seed), 12
    result = batch.compress(torch.tensor([budget]), config)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        slots, threshold = appended(result.slots, 24 + step, generator), result.threshold
        assert int(slots.used) <= budget + interval
        due = int(slots.used) == budget + interval
        keep = torch.tensor([budget if due else budget + interval])
        result = compress(slots, keep=keep, seen=torch.tensor([25 + step]), config=config, threshold=threshold)
        if due:
            assert int(result.slots.used) == budget
        assert survivors(result, 0, 0)[-1] == 24 + step or config.recent_share == 0


def appended(slots: Slots, position: int, generator: torch.Generator) -> Slots:
    """The cache after one more decode step."""

    def grown(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new.to(old.dtype)], 2)

    shape = (1, slots.k.shape[1], 1)
    return Slots(
        k=grown(slots.k, torch.randn(*shape, slots.k.shape[-1], generator=generator)),
        v=grown(slots.v, torch.randn(*shape, slots.k.shape[-1], generator=generator)),
        score=grown(slots.score + 0.01, torch.rand(shape, generator=generator)),
        position=grown(slots.position, torch.full(shape, position)),
        bias=grown(slots.bias, torch.zeros(shape)),
        used=slots.used + 1,
    )
