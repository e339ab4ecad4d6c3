"""The method's kernels applied to the page pool; the block table's copy on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.config import D2OConfig
from d2o.kernels.evict import evict_in_place
from d2o.kernels.history import History
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pending import Pending, settle
from d2o.pages import PagePool
from d2o_server.worker.cache_ops import Fetched, HostSpan, Span
from d2o_server.worker.gpu.device import DeviceSpan, Download, upload


class KernelCacheOps:
    """:class:`d2o_server.worker.cache_ops.CacheOps` by Triton kernels.

    Attributes:
        pool: a mirrored pool.
        paged: its tensors as kernels take them.
        history: thresholds and fates of its rows.
        pending: their newest queries, which their scores have yet to receive.
        table: [layers, rows, pages_per_row] int32, the block table on the device as of the last :meth:`sync_table`.
        padding_row: a row that no sequence has; all of its entries are the pool's spare page.
    """

    def __init__(self, pool: PagePool, query_heads: int) -> None:
        self.pool = pool
        self.paged = PagedTensors(pool.k, pool.v, pool.score, pool.position, pool.bias)
        layers, rows, _ = pool.block_table.shape
        device = pool.device
        self.table = torch.zeros(pool.block_table.shape, dtype=torch.int32, device=device)
        self.padding_row = pool.open_row()
        self.table[:, self.padding_row] = pool.num_pages
        self.history = History.empty(layers, rows, pool.kv_heads, device)
        self.pending = Pending.empty(
            layers,
            rows,
            heads=query_heads,
            kv_heads=pool.kv_heads,
            head_dim=pool.head_dim,
            dtype=pool.k.dtype,
            device=device,
        )
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._evicted: dict[int, torch.cuda.Event | None] = {}

    def sync_table(self) -> None:
        """Brings the device's block table up to date with the pool's."""
        places, pages = self.pool.take_changes()
        if places.numel():
            both = upload(torch.stack([places, pages]), self.pool.device)
            self.table.view(-1)[both[0]] = both[1].int()

    def reset(self, row: int) -> None:
        self.pending.forget(row)
        if row in self._evicted:
            del self._evicted[row]
            self.history.forget(row)

    def clear_new(self, rows: Tensor, counts: Tensor, seen: Tensor) -> Tensor:
        """Nothing: attention's kernels find the new slots from the lengths and set all that is stored of them."""
        return rows[:0]

    def evict(
        self, layers: Tensor, rows: Tensor, *, keep: Tensor, seen: Tensor, config: D2OConfig, window: Tensor | None
    ) -> None:
        pool = self.pool
        over = (pool.used[layers, rows] > keep).nonzero().squeeze(-1)
        if not over.numel():
            return
        if over.numel() < layers.numel():
            layers, rows, keep, seen = layers[over], rows[over], keep[over], seen[over]
            window = None if window is None else window[upload(over, pool.device)]
        evict_in_place(
            self.paged,
            self.table,
            layers,
            rows,
            used=pool.used[layers, rows],
            keep=keep,
            seen=seen,
            history=self.history,
            config=config,
            window=window,
            pending=self.pending,
        )
        pool.used[layers, rows] = keep
        pool.release(layers, rows)
        self._note(rows)

    def _note(self, rows: Tensor) -> None:
        """Remembers when the rows' fates will be known."""
        event = None
        if self._side is not None:
            event = torch.cuda.Event()
            event.record()
        for row in rows.unique().tolist():
            self._evicted[row] = event

    def store_scores(self, layers: Tensor, row: int, received: Tensor) -> None:
        pages, padded = self._pages(layers, row, received.shape[-1])
        whole = torch.nn.functional.pad(received, (0, padded - received.shape[-1]))
        self.pool.score[pages] = whole.unflatten(-1, (-1, self.pool.page_size)).transpose(1, 2)

    def read_scores(self, layers: Tensor, row: int, slots: int) -> Tensor:
        # Two tensors, not rows of one: kernels are compiled anew for vectors that are aligned otherwise.
        places = upload((layers * self.table.shape[1] + row).int(), self.pool.device)
        used = torch.full_like(places, slots)
        settle(self.paged, self.pending, places, self.table.flatten(0, 1)[places], used, most_used=slots)
        pages, _ = self._pages(layers, row, slots)
        return self.pool.score[pages].transpose(1, 2).flatten(2)[..., :slots]

    def _pages(self, layers: Tensor, row: int, slots: int) -> tuple[Tensor, int]:
        """The row's first pages [layers, n] that hold ``slots``, and how many slots they have."""
        count = -(-slots // self.pool.page_size)
        return upload(self.pool.block_table[layers, row, :count], self.pool.device), count * self.pool.page_size

    def fates(self, row: int) -> tuple[list[float], list[float]]:
        if row not in self._evicted:
            return [0.0] * self.pool.layers, [0.0] * self.pool.layers
        event = self._evicted[row]
        if self._side is None or event is None:
            merged, dropped = self.history.fates[:, :, row].tolist()
            return merged, dropped
        # On a stream of its own: the steps that were launched since need not end first.
        with torch.cuda.stream(self._side):
            self._side.wait_event(event)
            merged, dropped = self.history.fates[:, :, row].tolist()
        return merged, dropped

    def fetch(self, values: Tensor) -> Fetched:
        return Download.start(values)

    def span(self) -> Span:
        return HostSpan() if self._side is None else DeviceSpan()
