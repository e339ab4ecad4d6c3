"""Compression in place: gathers the slots of (layer, row) pairs from their pages, compresses, and writes them back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.compressor import Slots, compress
from d2o.config import D2OConfig
from d2o.pages import PagePool

_BYTES_AT_ONCE = 24 << 20


@dataclass(frozen=True, slots=True)
class Compacted:
    """What became of each pair: threshold [pairs, kv_heads]; merged and dropped [pairs], means over KV heads."""

    threshold: Tensor
    merged: Tensor
    dropped: Tensor


def compact(
    pool: PagePool,
    layers: Tensor,
    rows: Tensor,
    *,
    keep: Tensor,
    seen: Tensor,
    threshold: Tensor,
    config: D2OConfig,
    window: Tensor | None = None,
) -> Compacted:
    """Brings each (layer, row) pair down to ``keep`` slots and frees the pages that this leaves empty.

    Args:
        layers, rows: [pairs] int64, unique pairs.
        keep, seen, threshold, window: see :func:`d2o.compressor.compress`; a row there is a pair here.
    """
    longest = int(pool.used[layers, rows].max())
    each = 2 * longest * pool.kv_heads * pool.head_dim * pool.k.element_size()
    done = []
    for part in torch.arange(layers.numel(), device=pool.device).split(max(1, _BYTES_AT_ONCE // each)):
        left = torch.minimum(pool.used[layers[part], rows[part]], keep[part])
        result = compress(
            _gather(pool, layers[part], rows[part]),
            keep=keep[part],
            seen=seen[part],
            config=config,
            threshold=threshold[part],
            window=None if window is None else window[part],
        )
        _scatter(pool, layers[part], rows[part], result.slots, left)
        pool.used[layers[part], rows[part]] = left
        pool.release(layers[part], rows[part])
        done.append(result)
    return Compacted(
        torch.cat([result.threshold for result in done]),
        torch.cat([result.merged for result in done]),
        torch.cat([result.dropped for result in done]),
    )


def _gather(pool: PagePool, layers: Tensor, rows: Tensor) -> Slots:
    """The pairs' whole pages, side by side; a pair with fewer pages than the longest repeats its last one."""
    used = pool.used[layers, rows]
    pages = -(-int(used.max()) // pool.page_size)
    index = torch.arange(pages, device=pool.device)[None]
    last = (pool.held[layers, rows] - 1).clamp_(min=0)[:, None]
    flat = pool.page_rows(pool.block_table[layers[:, None], rows[:, None], torch.minimum(index, last)]).flatten()

    def taken(store: Tensor) -> Tensor:
        whole = store.view(-1, *store.shape[2:]).index_select(0, flat)
        return whole.view(layers.numel(), pool.kv_heads, -1, *store.shape[3:])

    return Slots(
        k=taken(pool.k),
        v=taken(pool.v),
        score=taken(pool.score),
        position=taken(pool.position),
        bias=taken(pool.bias),
        used=used,
    )


def _scatter(pool: PagePool, layers: Tensor, rows: Tensor, slots: Slots, left: Tensor) -> None:
    """Writes the first ``left`` slots of each pair to the front of its pages."""
    index = torch.arange(slots.score.shape[-1], device=pool.device)[None].expand(layers.numel(), -1)
    valid = index < left[:, None]
    safe = torch.minimum(index, (left - 1)[:, None])
    flat = pool.slot_rows(layers[:, None], rows[:, None], safe)[valid].flatten()
    for store, new in (
        (pool.k, slots.k),
        (pool.v, slots.v),
        (pool.score, slots.score),
        (pool.position, slots.position),
        (pool.bias, slots.bias),
    ):
        picked = new.transpose(1, 2)[valid].flatten(0, 1)
        store.view(-1, *store.shape[3:]).index_copy_(0, flat, picked.to(store.dtype))
