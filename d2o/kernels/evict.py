"""Compression and decode-time eviction inside the page pool, without copying caches (ALGORITHM 3 to 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o import eviction, scores
from d2o.config import D2OConfig, Merge, Scope, Threshold
from d2o.kernels.fold import fold, move
from d2o.kernels.history import History
from d2o.kernels.judge import judge, listed
from d2o.kernels.nearest import nearest, staged_bytes
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pairs import FEW, Pairs
from d2o.kernels.pending import Pending, settle
from d2o.kernels.select import Selection, select

SCRATCH_BYTES = 1 << 30


def evict_in_place(
    pool: PagedTensors,
    block_table: Tensor,
    layers: Tensor,
    rows: Tensor,
    *,
    used: Tensor,
    keep: Tensor,
    seen: Tensor,
    history: History,
    config: D2OConfig,
    window: Tensor | None = None,
    pending: Pending | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> None:
    """Brings each (layer, row) pair from ``used`` slots down to ``keep``, in place.

    Afterwards a pair's survivors are its first ``keep`` slots, in no particular order; what its slots from there on
    hold is stale. The caller owns the lengths and frees the pages. Agrees with :func:`d2o.compaction.compact`.
    Never waits for the device.

    Args:
        pool: the pages; k, v, score, position and bias are written.
        block_table: [layers, rows, pages_per_row] int32, on the device, contiguous.
        layers, rows: [pairs] integers on the host; unique pairs.
        used, keep, seen: likewise: slots in use; the budget, at least 1 and below ``used``; tokens of the sequence so
            far. Keep and used may differ between pairs.
        history: of the same layers and rows as the block table; the pairs' thresholds and fates are written.
        config: the method.
        window: [pairs, kv_heads, prompt] float32, on the device, attention summed over the last
            ``config.window_queries`` prompt queries and the group, not pooled; given when a prompt is compressed. Slots
            must then be in ascending position. It may be narrower than the longest ``used``.
        pending: decoded queries that the scores have yet to receive; those of the pairs are settled first.
        scratch_bytes: about how much memory may be used at once; pairs are worked on in chunks that fit.

    Raises:
        ValueError: a budget is not in [1, used).
    """
    host = _Host.of(block_table, layers, rows, used=used, keep=keep, seen=seen, config=config)
    for part in _chunks(pool, host, config, scratch_bytes, window is not None):
        pairs = host.on_device(part, block_table, pool)
        if pending is not None:
            settle(pool, pending, pairs.places, pairs.tables, pairs.used, most_used=pairs.most_used)
        _evict(pool, pairs, history, config, None if window is None else window[part])


def pairs_of(
    pool: PagedTensors,
    block_table: Tensor,
    layers: Tensor,
    rows: Tensor,
    *,
    used: Tensor,
    keep: Tensor,
    seen: Tensor,
    config: D2OConfig,
) -> Pairs:
    """What the stages take, for all pairs at once; arguments as for :func:`evict_in_place`."""
    host = _Host.of(block_table, layers, rows, used=used, keep=keep, seen=seen, config=config)
    return host.on_device(slice(None), block_table, pool)


def _evict(pool: PagedTensors, pairs: Pairs, history: History, config: D2OConfig, window: Tensor | None) -> None:
    """Evicts from the pairs of one chunk."""
    selection = select(pool, pairs, config, window)
    if config.merge is Merge.NONE:
        gone = (pairs.used - pairs.keep).float()
        history.note(pairs.places, None, torch.zeros_like(gone), gone)
    else:
        evicted = _matching_order(pool, pairs, selection, config)
        slot, similarity = nearest(pool, pairs, selection, evicted, into_sinks=config.merge_into_sinks)
        passes = judge(pairs, selection, slot, similarity, history, config)
        fold(pool, pairs, evicted, slot, similarity, passes, config)
    move(pool, pairs, selection)


def _matching_order(pool: PagedTensors, pairs: Pairs, selection: Selection, config: D2OConfig) -> Tensor:
    """The evicted slots, by position where the n-th of all heads are judged together, else by slot."""
    if config.threshold is not Threshold.AUTHORS or config.threshold_scope is not Scope.LAYER:
        return selection.evicted
    slot = torch.where(listed(pairs), selection.evicted, 0).long()
    page = pairs.tables.long().unsqueeze(1).expand(-1, pool.kv_heads, -1).gather(-1, slot // pool.page_size)
    head = torch.arange(pool.kv_heads, device=pool.device).view(1, -1, 1)
    position = pool.position[page, head, slot % pool.page_size]
    last = torch.iinfo(torch.int32).max
    order = torch.where(listed(pairs), position, last).argsort(dim=-1, stable=True)
    return selection.evicted.gather(-1, order)


@dataclass(frozen=True, slots=True)
class _Host:
    """Numbers of all pairs on the host: [6, pairs] int32 and two lists."""

    numbers: Tensor
    used: list[int]
    keep: list[int]

    @classmethod
    def of(
        cls,
        block_table: Tensor,
        layers: Tensor,
        rows: Tensor,
        *,
        used: Tensor,
        keep: Tensor,
        seen: Tensor,
        config: D2OConfig,
    ) -> _Host:
        given = (layers, rows, used, keep, seen)
        layers, rows, used, keep, seen = (torch.as_tensor(each, dtype=torch.int64, device="cpu") for each in given)
        if bool(((keep < 1) | (keep >= used)).any()):
            raise ValueError(f"keep: got {keep.tolist()}, allowed is 1 to used - 1 of {used.tolist()}")
        places = layers * block_table.shape[1] + rows
        recent = eviction.recent_tokens(keep, config)
        free = (keep - config.sinks - recent).clamp_min(0)
        quota = torch.minimum(scores.share_of(keep, config.window_quota), free)
        numbers = torch.stack([places, used, keep, seen, seen - recent, quota]).int()
        return cls(numbers, used.tolist(), keep.tolist())

    def on_device(self, part: slice, block_table: Tensor, pool: PagedTensors) -> Pairs:
        """The pairs of ``part``; uploads their numbers in one copy that nobody waits for."""
        numbers = self.numbers[:, part]
        count = numbers.shape[1]
        # Each vector begins at a multiple of 16 bytes, so that kernels are not compiled anew for another alignment.
        padded = torch.nn.functional.pad(numbers, (0, -count % 4))
        if pool.device.type == "cuda":
            padded = padded.pin_memory()
        places, used, keep, seen, recent_from, quota = padded.to(pool.device, non_blocking=True)[:, :count]
        used_here, keep_here = self.used[part], self.keep[part]
        return Pairs(
            places=places,
            tables=block_table.flatten(0, 1).index_select(0, places),
            used=used,
            keep=keep,
            seen=seen,
            recent_from=recent_from,
            quota=quota,
            most_used=max(used_here),
            most_kept=max(keep_here),
            most_evicted=max(a - b for a, b in zip(used_here, keep_here, strict=True)),
        )


def _chunks(pool: PagedTensors, host: _Host, config: D2OConfig, scratch_bytes: int, windowed: bool) -> Iterator[slice]:
    """Runs of pairs, equally long, whose scratch stays near ``scratch_bytes``."""
    used, kept = max(host.used), max(host.keep)
    gone = max(a - b for a, b in zip(host.used, host.keep, strict=True))
    each = pool.kv_heads * ((48 if windowed else 8) * used + 4 * kept + 4 * gone)
    if config.merge is not Merge.NONE:
        each += pool.kv_heads * 60 * gone + (staged_bytes(pool, kept) if gone > FEW else 0)
    parts = -(-len(host.used) * each // scratch_bytes)
    step = -(-len(host.used) // min(parts, len(host.used)))
    return (slice(start, start + step) for start in range(0, len(host.used), step))
