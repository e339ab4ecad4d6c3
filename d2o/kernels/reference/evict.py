"""The torch twin of :mod:`d2o.kernels.evict`: gather, :func:`d2o.compressor.compress`, write back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.compressor import Slots, compress
from d2o.config import D2OConfig
from d2o.kernels.paged import PagedTensors


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


def slots_of(pool: PagedTensors, tables: Tensor, used: Tensor) -> Slots:
    """The whole pages of pairs ``tables`` [pairs, pages], side by side."""
    pages = -(-int(used.max()) // pool.page_size)

    def taken(store: Tensor) -> Tensor:
        return store[tables[:, :pages].long()].transpose(1, 2).flatten(2, 3)

    return Slots(
        k=taken(pool.k),
        v=taken(pool.v),
        score=taken(pool.score),
        position=taken(pool.position),
        bias=taken(pool.bias),
        used=used.to(pool.device, torch.int64),
    )


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
) -> Evicted:
    """As :func:`d2o.kernels.evict.evict_in_place`; survivors come in ascending position.

    ``threshold`` is [pairs, kv_heads], on the device, from the previous eviction.
    """
    tables = block_table[layers.long(), rows.long()]
    result = compress(
        slots_of(pool, tables, used),
        keep=keep.to(pool.device, torch.int64),
        seen=seen.to(pool.device, torch.int64),
        config=config,
        threshold=threshold,
        window=window,
    )
    for pair, left in enumerate(keep.tolist()):
        slot = torch.arange(left, device=pool.device)
        page, inner = tables[pair, slot // pool.page_size].long(), slot % pool.page_size
        for name in ("k", "v", "score", "position", "bias"):
            getattr(pool, name)[page, :, inner] = getattr(result.slots, name)[pair, :, :left].transpose(0, 1)
    return Evicted(result.threshold, result.merged, result.dropped)
