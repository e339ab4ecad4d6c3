"""Pages are taken and given back exactly, and the integrity check finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o.pages import PagePool, PoolExhausted

LAYERS, HEADS, DIM, PAGE = 2, 3, 4, 8


def make(pages: int = 20, rows: int = 4) -> PagePool:
    return PagePool(
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=DIM,
        page_size=PAGE,
        num_pages=pages,
        rows=rows,
        max_slots=20 * PAGE,
        dtype=torch.float32,
    )


def grow(pool: PagePool, row: int, slots: int) -> None:
    """Takes slots in every layer, as a step does."""
    rows, counts = torch.tensor([row]), torch.tensor([slots])
    pool.grow(rows, counts)
    pool.used[:, rows] += counts


def shrink(pool: PagePool, layer: int, row: int, slots: int) -> None:
    pool.used[layer, row] = slots
    pool.release(torch.tensor([layer]), torch.tensor([row]))


def snapshot(pool: PagePool) -> tuple[object, ...]:
    return (
        pool.block_table.tolist(),
        pool.used.tolist(),
        pool.held.tolist(),
        pool.free_pages,
        pool.free_rows,
        pool._free[: pool.free_pages].tolist(),
        pool.k.sum().item(),
    )


@pytest.mark.parametrize(("slots", "pages"), [(1, 1), (8, 1), (9, 2), (64, 8)])
def test_a_row_takes_whole_pages_in_every_layer(slots: int, pages: int) -> None:
    pool = make()
    row = pool.open_row()
    grow(pool, row, slots)
    assert pool.row_pages(row) == pool.used_pages == LAYERS * pages
    pool.check_integrity()


def test_a_mirrored_pool_tells_what_its_copy_lacks_and_has_a_page_for_padding() -> None:
    pool = PagePool(
        layers=LAYERS, kv_heads=HEADS, head_dim=DIM, page_size=PAGE, num_pages=20, rows=4, max_slots=20 * PAGE,
        dtype=torch.float32, mirrored=True,
    )  # fmt: skip
    copy = torch.full_like(pool.block_table, -1)
    first, second = pool.open_row(), pool.open_row()
    for row, slots in ((first, 9), (second, 3), (first, 20)):
        grow(pool, row, slots)
        places, pages = pool.take_changes()
        copy.view(-1)[places] = pages
    held = torch.arange(copy.shape[2]) < pool.held[..., None]
    assert torch.equal(copy[held], pool.block_table[held])
    assert pool.take_changes()[0].numel() == 0
    assert len(pool.k) == 21
    assert not (pool.block_table[held] == 20).any()
    pool.check_integrity()


def test_growing_within_a_page_takes_nothing() -> None:
    pool = make()
    row = pool.open_row()
    grow(pool, row, 3)
    grow(pool, row, 5)
    assert pool.used_pages == LAYERS
    grow(pool, row, 1)
    assert pool.used_pages == 2 * LAYERS


def test_rows_of_one_call_grow_each_by_its_own_count() -> None:
    pool = make()
    rows = torch.tensor([pool.open_row(), pool.open_row(), pool.open_row()])
    pool.grow(rows, torch.tensor([1, 17, 8]))
    assert pool.held[:, rows].tolist() == [[1, 3, 1]] * LAYERS
    pool.check_integrity()


def test_releasing_gives_back_the_pages_that_are_empty_and_keeps_the_rest() -> None:
    pool = make()
    row = pool.open_row()
    grow(pool, row, 40)
    first = pool.block_table[0, row, :2].tolist()
    shrink(pool, 0, row, 9)
    assert pool.held[:, row].tolist() == [2, 5]
    assert pool.block_table[0, row, :2].tolist() == first
    assert pool.used_pages == 7
    pool.check_integrity()


def test_a_closed_row_gives_everything_back_and_can_be_opened_again() -> None:
    pool = make(rows=1)
    row = pool.open_row()
    grow(pool, row, 80)
    assert pool.free_pages == 0
    pool.close_row(row)
    assert (pool.free_pages, pool.free_rows, pool.row_pages(row)) == (20, 1, 0)
    pool.check_integrity()
    assert pool.open_row() == row


def test_no_more_rows_than_there_are() -> None:
    pool = make(rows=2)
    pool.open_row()
    pool.open_row()
    with pytest.raises(PoolExhausted, match="every row"):
        pool.open_row()


def test_an_exhausted_pool_is_left_as_it_was() -> None:
    pool = make()
    first, second = pool.open_row(), pool.open_row()
    grow(pool, first, 60)
    grow(pool, second, 3)
    before = snapshot(pool)
    with pytest.raises(PoolExhausted, match="4 pages are needed and 2 are free"):
        pool.grow(torch.tensor([first, second]), torch.tensor([5, 6]))
    assert snapshot(pool) == before
    pool.check_integrity()
    grow(pool, second, 6)
    assert pool.free_pages == 0


def test_what_a_new_page_has_beyond_its_slots_is_zero() -> None:
    """Attention reads whole pages, and a mask does not hide a NaN."""
    pool = make(pages=4)
    for store in (pool.k, pool.v, pool.bias):
        store.fill_(torch.nan)
    row = pool.open_row()
    grow(pool, row, 11)
    last = pool.block_table[:, row, 1]
    for store in (pool.k, pool.v, pool.bias):
        assert bool((store[last][:, :, 3:] == 0).all())


def test_slots_and_pages_have_flat_places() -> None:
    pool = make()
    row = pool.open_row()
    grow(pool, row, 20)
    pool.position.copy_(torch.arange(pool.position.numel()).view(pool.position.shape))
    for layer in range(LAYERS):
        for slot in (0, 7, 8, 19):
            page = int(pool.block_table[layer, row, slot // PAGE])
            places = pool.slot_rows(torch.tensor(layer), torch.tensor(row), torch.tensor(slot))
            assert pool.position.view(-1)[places].tolist() == pool.position[page, :, slot % PAGE].tolist()
    pages = pool.block_table[:, row, :3]
    whole = pool.position.view(-1, PAGE)[pool.page_rows(pages)]
    assert torch.equal(whole.transpose(1, 2), pool.position[pages])


def test_a_page_has_the_bytes_that_it_is_said_to_have() -> None:
    pool = make(pages=1)
    stores = (pool.k, pool.v, pool.score, pool.position, pool.bias)
    held = sum(store.numel() * store.element_size() for store in stores)
    assert PagePool.bytes_per_page(HEADS, DIM, PAGE, torch.float32) == held


@pytest.mark.parametrize("field", ["num_pages", "page_size", "rows"])
def test_an_empty_pool_is_refused_by_name(field: str) -> None:
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 1, "num_pages": 2, "page_size": 2, "rows": 2, "max_slots": 8}
    build: Callable[..., PagePool] = PagePool
    with pytest.raises(ValueError, match=f"{field}: got 0"):
        build(**shape | {field: 0}, dtype=torch.float32)


def _lose_a_page(pool: PagePool) -> None:
    pool.free_pages -= 1


def _own_a_page_twice(pool: PagePool) -> None:
    pool.block_table[1, 3, 0] = pool.block_table[0, 3, 0]


def _own_a_free_page(pool: PagePool) -> None:
    pool.block_table[0, 3, 0] = pool._free[0]


def _use_more_than_is_held(pool: PagePool) -> None:
    pool.used[0, 3] = 17


def _forget_a_held_page(pool: PagePool) -> None:
    pool.held[0, 3] -= 1


def _free_an_owning_row(pool: PagePool) -> None:
    pool._free_rows.append(3)


@pytest.mark.parametrize(
    "corrupt",
    [
        _lose_a_page,
        _own_a_page_twice,
        _own_a_free_page,
        _use_more_than_is_held,
        _forget_a_held_page,
        _free_an_owning_row,
    ],
)
def test_the_integrity_check_finds_it(corrupt: Callable[[PagePool], None]) -> None:
    pool = make()
    # Rows are handed out in order; the fourth is the one that is corrupted.
    for _ in range(4):
        row = pool.open_row()
    assert row == 3
    grow(pool, row, 11)
    pool.check_integrity()
    corrupt(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


OPERATION = st.tuples(st.sampled_from(["open", "close", "grow", "shrink"]), st.integers(0, 9), st.integers(0, 60))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(OPERATION, max_size=40))
def test_no_sequence_of_operations_loses_or_shares_a_page(operations: list[tuple[str, int, int]]) -> None:
    pool = make()
    lengths: dict[int, list[int]] = {}
    for kind, which, amount in operations:
        if kind == "open" and len(lengths) < 4:
            lengths[pool.open_row()] = [0] * LAYERS
        elif lengths:
            row = sorted(lengths)[which % len(lengths)]
            if kind == "close":
                pool.close_row(row)
                del lengths[row]
            elif kind == "grow":
                try:
                    grow(pool, row, amount)
                    lengths[row] = [used + amount for used in lengths[row]]
                except PoolExhausted:
                    pass
            elif kind == "shrink":
                layer = amount % LAYERS
                lengths[row][layer] = min(lengths[row][layer], amount)
                shrink(pool, layer, row, lengths[row][layer])
        pool.check_integrity()
        assert {row: pool.used[:, row].tolist() for row in lengths} == lengths
        wanted = sum(-(-slots // PAGE) for each in lengths.values() for slots in each)
        assert pool.used_pages == wanted
    for row in lengths:
        pool.close_row(row)
    assert pool.free_pages == pool.num_pages


def test_a_large_pool_takes_memory_only_as_it_is_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = PagePool(
        layers=1, kv_heads=4, head_dim=64, page_size=32, num_pages=20_000, rows=1, max_slots=64, dtype=torch.float32
    )
    assert not pool.k[123].any()
    held = 20_000 * PagePool.bytes_per_page(4, 64, 32, torch.float32)
    assert process.memory_info().rss - before < held // 10
