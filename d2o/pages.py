"""The page pool: where every cached key and value lives, and which page belongs to whom.

A page holds ``page_size`` slots of one layer of one sequence for all of its KV heads. Layers of one sequence may hold
different numbers of slots, so every (layer, row) has its own block table; a row is one sequence's place in the tables.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from d2o.ragged import ragged_indices


class PoolExhausted(RuntimeError):
    """More pages were asked for than are free: a reservation was not honoured."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros. On a CPU memory is taken only as it is written, so that gigabytes of pages are there at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class PagePool:
    """Keys, values and bookkeeping of all cached tokens, by page.

    What tokens are is on the device; how many there are and which page is whose are integers of the host, so that
    nobody waits for a device to learn them.

    Shapes:
        k, v: [pages, kv_heads, page_size, head_dim], model dtype, on the device.
        score: [pages, kv_heads, page_size] float32, attention the slot has received, on the device.
        position: [pages, kv_heads, page_size] int32, logical position of the slot's token, on the device.
        bias: [pages, kv_heads, page_size] float32, added to the slot's attention logit, on the device.
        block_table: [layers, rows, pages_per_row] int64; used, held: [layers, rows] int64 (slots, pages); on the host.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        num_pages: int,
        rows: int,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        mirrored: bool = False,
    ) -> None:
        """Args:
        max_slots: most slots of a row.
        mirrored: kernels read a copy of the block table on the device; :meth:`take_changes` says what it lacks. They
            mask what lies beyond a row's slots, so that pages need not be cleared when they change hands. There is
            one page more, number ``num_pages``, which is nobody's: what pads a batch is written there.
        """
        for name, given in (("num_pages", num_pages), ("page_size", page_size), ("rows", rows)):
            if given < 1:
                raise ValueError(f"{name}: got {given}, allowed is at least 1")
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.page_size, self.num_pages = page_size, num_pages
        slots = (num_pages + mirrored, kv_heads, page_size)
        self.k = _zeros((*slots, head_dim), dtype, device)
        self.v = _zeros((*slots, head_dim), dtype, device)
        self.score = _zeros(slots, torch.float32, device)
        self.position = _zeros(slots, torch.int32, device)
        self.bias = _zeros(slots, torch.float32, device)
        pages_per_row = -(-max_slots // page_size)
        self.block_table = torch.zeros(layers, rows, pages_per_row, dtype=torch.int64)
        self.used = torch.zeros(layers, rows, dtype=torch.int64)
        self.held = torch.zeros(layers, rows, dtype=torch.int64)
        self._free = torch.arange(num_pages - 1, -1, -1, dtype=torch.int64)
        self.free_pages = num_pages
        self._free_rows = list(range(rows - 1, -1, -1))
        self._heads = torch.arange(kv_heads)
        self._mirrored = mirrored
        self._changes: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def bytes_per_page(kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page, its score, position and bias included."""
        return kv_heads * page_size * (2 * head_dim * dtype.itemsize + 12)

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def used_pages(self) -> int:
        return self.num_pages - self.free_pages

    def open_row(self) -> int:
        """Takes an empty row of the tables."""
        if not self._free_rows:
            raise PoolExhausted("every row of the block table is taken")
        return self._free_rows.pop()

    def close_row(self, row: int) -> None:
        """Gives the row and all of its pages back."""
        self.used[:, row] = 0
        self.release(torch.arange(self.layers), torch.full((self.layers,), row))
        self._free_rows.append(row)

    def row_pages(self, row: int) -> int:
        """Pages that the row holds over all layers."""
        return int(self.held[:, row].sum())

    def grow(self, rows: Tensor, counts: Tensor) -> None:
        """Makes room for ``counts[i]`` more slots in every layer of ``rows[i]`` (both [n] int64).

        The caller fills them in order; unless the pool is mirrored, what its last page has beyond them is 0, because
        torch's attention reads whole pages and a mask does not hide a NaN that a former owner left.

        Raises:
            PoolExhausted: nothing is changed.
        """
        wanted = (self.used[:, rows] + counts + self.page_size - 1) // self.page_size
        missing = (wanted - self.held[:, rows]).clamp_(min=0)
        total = int(missing.sum())
        if total == 0:
            return
        if total > self.free_pages:
            raise PoolExhausted(f"{total} pages are needed and {self.free_pages} are free")
        pages = self._free[self.free_pages - total : self.free_pages].clone()
        self.free_pages -= total
        layer, column = missing.nonzero(as_tuple=True)
        count = missing[layer, column]
        owner, nth = ragged_indices(count)
        layer, row = layer[owner], rows[column[owner]]
        place = self.held[layer, row] + nth
        self.block_table[layer, row, place] = pages
        self.held[:, rows] += missing
        if self._mirrored:
            _, width, depth = self.block_table.shape
            self._changes.append(((layer * width + row) * depth + place, pages))
            return
        last = pages[(count.cumsum(0) - 1)]
        for store in (self.k, self.v, self.bias):
            store.index_fill_(0, last, 0)

    def take_changes(self) -> tuple[Tensor, Tensor]:
        """Flat indices into the block table [n] and the pages that stand there now [n], since the last call."""
        changes, self._changes = self._changes, []
        if not changes:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        return torch.cat([index for index, _ in changes]), torch.cat([pages for _, pages in changes])

    def release(self, layers: Tensor, rows: Tensor) -> None:
        """Gives back the pages that the ``used`` slots of unique (layer, row) pairs ([n] int64 each) leave empty."""
        keep = (self.used[layers, rows] + self.page_size - 1) // self.page_size
        spare = (self.held[layers, rows] - keep).clamp_(min=0)
        total = int(spare.sum())
        if total == 0:
            return
        owner, nth = ragged_indices(spare)
        pages = self.block_table[layers[owner], rows[owner], keep[owner] + nth]
        self._free[self.free_pages : self.free_pages + total] = pages
        self.free_pages += total
        self.held[layers, rows] = torch.minimum(self.held[layers, rows], keep)

    def slot_rows(self, layers: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        """Flat indices [..., kv_heads] of slots into tensors viewed as [pages * kv_heads * page_size, ...].

        ``layers``, ``rows`` and ``slots`` broadcast against each other.
        """
        page = self.block_table[layers, rows, slots // self.page_size]
        flat = (page[..., None] * self.kv_heads + self._heads) * self.page_size
        return flat + (slots % self.page_size)[..., None]

    def page_rows(self, pages: Tensor) -> Tensor:
        """Flat indices [n, kv_heads, m] of pages [n, m] into tensors viewed as [pages * kv_heads, ...]."""
        return pages[:, None, :] * self.kv_heads + self._heads[:, None]

    def check_integrity(self) -> None:
        """Raises AssertionError unless free + owned = all pages, no page is owned twice and lengths fit."""
        layer, row = self.held.nonzero(as_tuple=True)
        owner, nth = ragged_indices(self.held[layer, row])
        free, owned = self._free[: self.free_pages], self.block_table[layer[owner], row[owner], nth]
        pages = torch.cat([free, owned])
        if pages.numel() != self.num_pages or not bool(pages.bincount(minlength=self.num_pages).eq(1).all()):
            raise AssertionError(
                f"pages: {free.numel()} free and {owned.numel()} owned are not the {self.num_pages} pages"
            )
        if bool((self.used > self.held * self.page_size).any()):
            raise AssertionError("a (layer, row) uses more slots than its pages hold")
        if self._free_rows and bool(self.held[:, self._free_rows].any()):
            raise AssertionError("a free row still owns pages")
