"""Tokens land in their slots, come back in order, and leave nothing stale behind them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from d2o.kernels import store
from d2o.kernels.paged import PagedTensors
from d2o.kernels.reference import store as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def scattered_table(layers: int, rows: int, pages_per_row: int) -> Tensor:
    pages = torch.randperm(layers * rows * pages_per_row, dtype=torch.int32)
    return pages.view(layers, rows, pages_per_row).to(DEVICE)


def batch(sequences: list[tuple[int, int, int]], padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, slots and positions of (row, first slot, tokens) sequences, then of padding."""
    rows = [row for row, _, count in sequences for _ in range(count)] + [0] * padding
    slots = [first + i for _, first, count in sequences for i in range(count)] + [-1] * padding
    positions = [slot + 1000 for slot in slots]
    rows_t, slots_t, positions_t = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, slots, positions))
    return rows_t, slots_t, positions_t


def keys_values(kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views as the model makes them: of [tokens, kv_heads, head_dim] projections, and of a contiguous tensor."""
    k = torch.randn(tokens, kv_heads, head_dim, device=DEVICE).to(dtype).transpose(0, 1)
    return k, torch.randn(kv_heads, tokens, head_dim, device=DEVICE).to(dtype)


def assert_same(ours: PagedTensors, theirs: PagedTensors) -> None:
    for name in ("k", "v", "score", "position", "bias"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "dtype"),
    [(64, 16, torch.float32), (96, 32, torch.bfloat16), (128, 64, torch.float16), (256, 16, torch.bfloat16)],
)
@pytest.mark.parametrize("clear_tail", [True, False])
def test_a_ragged_batch_lands_in_its_slots(head_dim: int, page_size: int, dtype: torch.dtype, clear_tail: bool) -> None:
    table = scattered_table(2, 4, 5)
    rows, slots, positions = batch([(2, 0, page_size + 3), (0, 5, 1), (3, page_size - 1, 1), (1, 7, 40)], padding=3)
    k, v = keys_values(3, rows.numel(), head_dim, dtype)
    pool = reference.empty_pool(table.numel(), 3, page_size, head_dim, dtype, DEVICE)
    expected = copy.deepcopy(pool)
    store.store_tokens(k, v, pool, table, rows, slots, positions, 1, clear_tail=clear_tail)
    reference.store_tokens(k, v, expected, table, rows, slots, positions, 1, clear_tail=clear_tail)
    assert_same(pool, expected)


def test_a_batch_of_padding_changes_nothing() -> None:
    table = scattered_table(1, 1, 2)
    pool = reference.empty_pool(2, 1, 16, 64, torch.float32, DEVICE)
    expected = copy.deepcopy(pool)
    rows, slots, positions = batch([], padding=5)
    k, v = keys_values(1, 5, 64, torch.float32)
    store.store_tokens(k, v, pool, table, rows, slots, positions, 0)
    store.store_tokens(k[:, :0], v[:, :0], pool, table, rows[:0], slots[:0], positions[:0], 0)
    assert_same(pool, expected)


@pytest.mark.parametrize(("head_dim", "page_size", "tokens"), [(64, 16, 50), (96, 32, 64), (128, 64, 1), (128, 32, 0)])
def test_what_was_stored_in_chunks_is_gathered_in_order(head_dim: int, page_size: int, tokens: int) -> None:
    table = scattered_table(3, 2, 4)
    pool = reference.empty_pool(table.numel(), 2, page_size, head_dim, torch.bfloat16, DEVICE)
    k, v = keys_values(2, tokens, head_dim, torch.bfloat16)
    cut = tokens // 3
    for low, high in ((0, cut), (cut, tokens)):
        rows, slots, positions = batch([(1, low, high - low)])
        store.store_tokens(k[:, low:high], v[:, low:high], pool, table, rows, slots, positions, 2)
    found_k, found_v = store.gather_context(pool, table, 2, 1, tokens)
    assert torch.equal(found_k, k)
    assert torch.equal(found_v, v)
    for ours, twin in zip((found_k, found_v), reference.gather_context(pool, table, 2, 1, tokens), strict=True):
        assert torch.equal(ours, twin)


def test_a_slice_of_the_context_has_the_strides_of_the_whole() -> None:
    table = scattered_table(1, 1, 4)
    pool = reference.empty_pool(4, 2, 16, 64, torch.bfloat16, DEVICE)
    long, _ = store.gather_context(pool, table, 0, 0, 60)
    short, _ = store.gather_context(pool, table, 0, 0, 20)
    assert long[:, :20].stride() == short.stride()


@pytest.mark.gpu
@needs_gpu
def test_pages_beyond_two_billion_elements_are_reached() -> None:
    page_size, kv_heads, head_dim = 64, 8, 128
    pages = (1 << 31) // (page_size * kv_heads * head_dim) + 40
    table = torch.arange(pages - 33, pages, dtype=torch.int32, device=DEVICE).flip(0).view(1, 1, 33)
    pool = reference.empty_pool(pages, kv_heads, page_size, head_dim, torch.bfloat16, DEVICE)
    rows, slots, positions = batch([(0, 0, 33 * page_size - 5)])
    k, v = keys_values(kv_heads, rows.numel(), head_dim, torch.bfloat16)
    store.store_tokens(k, v, pool, table, rows, slots, positions, 0)
    found_k, found_v = store.gather_context(pool, table, 0, 0, rows.numel())
    assert torch.equal(found_k, k)
    assert torch.equal(found_v, v)
    assert not pool.k[int(table[0, 0, -1]), :, -5:].any()
