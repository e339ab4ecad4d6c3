"""Which slots survive, chosen where they lie: :func:`d2o.eviction.choose` without a sort (ALGORITHM 3).

A slot's class, rank and age make one 62-bit integer that no two slots of a head share; the ``keep`` highest survive.
The lowest of these is found two bits at a time, by counting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from d2o import scores
from d2o.config import D2OConfig, Ranking, Scope
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pairs import Pairs
from d2o.kernels.select_kernels import cut_kernel, keys_kernel, split_kernel

_BLOCK = 2048
HELD = ((2048, 4), (4096, 8), (8192, 8))
"""Most keys that a program holds in registers, with how many warps; longer lists it reads again for every two bits."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Survivors and the others, by slot; lists are ascending and what follows a pair's own count is undefined.

    Attributes:
        kept: [pairs, kv_heads, most_kept] int32.
        evicted: [pairs, kv_heads, most_evicted] int32.
        fallback: [pairs, kv_heads] int32, a survivor that may be merged into; -1 where there is none.
        keys: [pairs, kv_heads, most_used] int64; -1 for padding.
        cut: [pairs, kv_heads] int64; a slot survives if its key is at least that.
    """

    kept: Tensor
    evicted: Tensor
    fallback: Tensor
    keys: Tensor
    cut: Tensor


def select(pool: PagedTensors, pairs: Pairs, config: D2OConfig, window: Tensor | None) -> Selection:
    """Chooses ``keep`` survivors for every head of every pair.

    The scores of slots that the window's quota saves are raised, in the pool, to the larger of their two means.

    Args:
        pool: the pages.
        pairs: what to choose from; all have ``used > keep``.
        config: what survives.
        window: as in :func:`d2o.kernels.evict.evict_in_place`.
    """
    heads = pool.kv_heads
    choices = 1 if config.heads is Scope.LAYER else heads
    windowed = window is not None and bool(config.window_quota or config.window_blend)
    pooled = _pooled(pool, pairs, config, window) if window is not None and windowed else None
    keys = torch.empty(pairs.count, choices, pairs.most_used, dtype=torch.int64, device=pool.device)
    cut = torch.empty(pairs.count, choices, dtype=torch.int64, device=pool.device)
    stage = 0
    if pooled is not None and config.window_quota:
        _write_keys(pool, pairs, config, pooled, keys, cut, stage=1)
        cut_kernel[(cut.numel(),)](
            keys, cut, pairs.used, pairs.quota, pairs.most_used, CHOICES=choices, BLOCK=_BLOCK, num_warps=8
        )
        stage = 2
    _write_keys(pool, pairs, config, pooled, keys, cut, stage=stage)
    return split(pairs, keys, cut, heads, config.merge_into_sinks)


def _pooled(pool: PagedTensors, pairs: Pairs, config: D2OConfig, window: Tensor) -> Tensor:
    """The pooled means of the observation window [pairs, kv_heads, most_used]."""
    pages = -(-pairs.most_used // pool.page_size)
    position = pool.position[pairs.tables[:, :pages].long()].transpose(1, 2).flatten(2)[..., : pairs.most_used]
    window = torch.nn.functional.pad(window, (0, pairs.most_used - window.shape[-1]))
    return scores.pooled_window_mean(window, position, pairs.used, pairs.seen, config).contiguous()


def _write_keys(
    pool: PagedTensors,
    pairs: Pairs,
    config: D2OConfig,
    pooled: Tensor | None,
    keys: Tensor,
    cut: Tensor,
    *,
    stage: int,
) -> None:
    """Stage 1: the keys among which the quota is chosen; 2: all keys, given the quota's cut; 0: there is no quota."""
    block = 1024
    blocks = triton.cdiv(pairs.most_used, block)
    keys_kernel[(cut.numel() * blocks,)](
        keys,
        cut,
        pool.score,
        pool.position,
        pool.score if pooled is None else pooled,
        pairs.tables,
        pairs.used,
        pairs.seen,
        pairs.recent_from,
        pairs.most_used,
        pairs.tables.shape[1],
        blocks,
        config.sinks,
        HEADS=pool.kv_heads,
        SHARED=pool.kv_heads // cut.shape[1],
        PAGE=pool.page_size,
        SUM=config.ranking is Ranking.SUM,
        BLEND=0.0 if pooled is None else config.window_blend,
        STAGE=stage,
        BLOCK=block,
        num_warps=4,
    )


def split(pairs: Pairs, keys: Tensor, cut: Tensor, heads: int, into_sinks: bool) -> Selection:
    """Tells survivors from the others by their keys [pairs, choices, most_used]; writes ``cut`` [pairs, choices]."""

    def lists(width: int) -> Tensor:
        return torch.empty(*cut.shape, width, dtype=torch.int32, device=cut.device)

    kept, evicted = lists(pairs.most_kept), lists(pairs.most_evicted)
    fallback = torch.empty_like(cut, dtype=torch.int32)
    block, warps = next(((block, warps) for block, warps in HELD if pairs.most_used <= block), (_BLOCK, 8))
    split_kernel[(cut.numel(),)](
        keys,
        cut,
        kept,
        evicted,
        fallback,
        pairs.used,
        pairs.keep,
        pairs.most_used,
        pairs.most_kept,
        pairs.most_evicted,
        cut.shape[1],
        int(into_sinks),
        HELD=pairs.most_used <= block,
        BLOCK=block,
        num_warps=warps,
    )

    def each(of: Tensor) -> Tensor:
        return of.expand(-1, heads, *of.shape[2:]).contiguous()

    return Selection(each(kept), each(evicted), each(fallback), each(keys), each(cut))
