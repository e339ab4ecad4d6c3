"""Compression and decode-time eviction inside the page pool, without copying caches (ALGORITHM 3 to 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o import eviction, merging, scores
from d2o.config import D2OConfig, Merge, Scope, Threshold
from d2o.kernels.fold import fold, move
from d2o.kernels.nearest import DIRECT_EVICTED, nearest, staged_bytes
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pairs import Pairs
from d2o.kernels.select import Selection, select

SCRATCH_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Evicted:
    """What became of each pair, all on the device.

    Attributes:
        threshold: [pairs, kv_heads] float32, the moved similarity threshold.
        merged, dropped: [pairs] float32, evicted tokens that were merged and dropped, means over KV heads.
    """

    threshold: Tensor
    merged: Tensor
    dropped: Tensor


def evict_in_place(
    pool: PagedTensors,
    block_table: Tensor,
    layers: Tensor,
    rows: Tensor,
    *,
    used: Tensor,
    keep: Tensor,
    seen: Tensor,
    threshold: Tensor,
    config: D2OConfig,
    window: Tensor | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Evicted:
    """Brings each (layer, row) pair from ``used`` slots down to ``keep``, in place.

    Afterwards a pair's survivors are its first ``keep`` slots, in no particular order; what its slots from there on
    hold is stale. The caller owns the lengths and frees the pages. Agrees with :func:`d2o.compaction.compact`.
    Never waits for the device.

    Args:
        pool: the pages; k, v, score, position and bias are written.
        block_table: [layers, rows, pages_per_row] int32, on the device.
        layers, rows: [pairs] int32 or int64, on the device; unique pairs.
        used, keep, seen: [pairs] integers on the host: slots in use; the budget, at least 1 and below ``used``; tokens
            of the sequence so far. Keep and used may differ between pairs.
        threshold: [pairs, kv_heads] float32, on the device, from the previous eviction; NaN where there was none.
        config: the method.
        window: [pairs, kv_heads, prompt] float32, on the device, attention summed over the last
            ``config.window_queries`` prompt queries and the group, not pooled; given when a prompt is compressed. Slots
            must then be in ascending position. It may be narrower than the longest ``used``.
        scratch_bytes: about how much memory may be used at once; pairs are worked on in chunks that fit.

    Raises:
        ValueError: a budget is not in [1, used).
    """
    host = _Host.of(used, keep, seen, config)
    done = []
    for part in _chunks(pool, host, config, scratch_bytes, window is not None):
        near = None if window is None else window[part]
        pairs = host.on_device(part, block_table[layers[part].long(), rows[part].long()], pool)
        done.append(_evict(pool, pairs, threshold[part], config, near))
    if len(done) == 1:
        return done[0]
    return Evicted(
        torch.cat([each.threshold for each in done]),
        torch.cat([each.merged for each in done]),
        torch.cat([each.dropped for each in done]),
    )


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
    host = _Host.of(used, keep, seen, config)
    return host.on_device(slice(None), block_table[layers.long(), rows.long()], pool)


def _evict(pool: PagedTensors, pairs: Pairs, threshold: Tensor, config: D2OConfig, window: Tensor | None) -> Evicted:
    """Evicts from the pairs of one chunk."""
    selection = select(pool, pairs, config, window)
    gone = pairs.used - pairs.keep
    merged = torch.zeros_like(gone, dtype=torch.float32)
    if config.merge is not Merge.NONE:
        evicted = _matching_order(pool, pairs, selection, config)
        slot, similarity = nearest(pool, pairs, selection, evicted, into_sinks=config.merge_into_sinks)
        threshold, passes = judged(pairs, selection, slot, similarity, threshold, config)
        fold(pool, pairs, evicted, slot, similarity, passes, config)
        merged = passes.sum(-1).float().mean(-1)
    move(pool, pairs, selection)
    return Evicted(threshold, merged, gone - merged)


def judged(
    pairs: Pairs, selection: Selection, slot: Tensor, similarity: Tensor, threshold: Tensor, config: D2OConfig
) -> tuple[Tensor, Tensor]:
    """The moved threshold [pairs, kv_heads], and which evicted tokens are merged [pairs, kv_heads, most_evicted]."""
    real = _listed(pairs)
    matches = merging.Matches(slot, similarity, real & (selection.fallback >= 0).unsqueeze(-1))
    threshold = merging.moved_threshold(matches, threshold, config)
    return threshold, merging.passing(matches, threshold, config)


def _listed(pairs: Pairs) -> Tensor:
    """Which entries of the lists of evicted slots are real: [pairs, 1, most_evicted]."""
    nth = torch.arange(pairs.most_evicted, device=pairs.used.device)
    return nth < (pairs.used - pairs.keep).view(-1, 1, 1)


def _matching_order(pool: PagedTensors, pairs: Pairs, selection: Selection, config: D2OConfig) -> Tensor:
    """The evicted slots, by position where the n-th of all heads are judged together, else by slot."""
    if config.threshold is not Threshold.AUTHORS or config.threshold_scope is not Scope.LAYER:
        return selection.evicted
    slot = torch.where(_listed(pairs), selection.evicted, 0).long()
    page = pairs.tables.long().unsqueeze(1).expand(-1, pool.kv_heads, -1).gather(-1, slot // pool.page_size)
    head = torch.arange(pool.kv_heads, device=pool.device).view(1, -1, 1)
    position = pool.position[page, head, slot % pool.page_size]
    last = torch.iinfo(torch.int32).max
    order = torch.where(_listed(pairs), position, last).argsort(dim=-1, stable=True)
    return selection.evicted.gather(-1, order)


@dataclass(frozen=True, slots=True)
class _Host:
    """Counts of all pairs on the host: [5, pairs] int32 and two lists."""

    counts: Tensor
    used: list[int]
    keep: list[int]

    @classmethod
    def of(cls, used: Tensor, keep: Tensor, seen: Tensor, config: D2OConfig) -> _Host:
        used, keep, seen = (torch.as_tensor(each, dtype=torch.int64, device="cpu") for each in (used, keep, seen))
        if bool(((keep < 1) | (keep >= used)).any()):
            raise ValueError(f"keep: got {keep.tolist()}, allowed is 1 to used - 1 of {used.tolist()}")
        recent = eviction.recent_tokens(keep, config)
        free = (keep - config.sinks - recent).clamp_min(0)
        quota = torch.minimum(scores.share_of(keep, config.window_quota), free)
        counts = torch.stack([used, keep, seen, seen - recent, quota]).int()
        return cls(counts, used.tolist(), keep.tolist())

    def on_device(self, part: slice, tables: Tensor, pool: PagedTensors) -> Pairs:
        """The pairs of ``part``, whose pages are ``tables``; uploads the counts in one copy that nobody waits for."""
        counts = self.counts[:, part]
        count = counts.shape[1]
        # Each vector begins at a multiple of 16 bytes, so that kernels are not compiled anew for another alignment.
        padded = torch.nn.functional.pad(counts, (0, -count % 4))
        if pool.device.type == "cuda":
            padded = padded.pin_memory()
        used, keep, seen, recent_from, quota = padded.to(pool.device, non_blocking=True)[:, :count]
        used_here, keep_here = self.used[part], self.keep[part]
        return Pairs(
            tables=tables,
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
        each += pool.kv_heads * 60 * gone + (staged_bytes(pool, kept) if gone > DIRECT_EVICTED else 0)
    parts = -(-len(host.used) * each // scratch_bytes)
    step = -(-len(host.used) // min(parts, len(host.used)))
    return (slice(start, start + step) for start in range(0, len(host.used), step))
