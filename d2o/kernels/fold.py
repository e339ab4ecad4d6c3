"""Evicted tokens folded into their survivors, and survivors moved to the front, in place (eq. 11, 12; ALGORITHM 4b)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from d2o.config import D2OConfig, Merge
from d2o.kernels.fold_kernels import fold_few_kernel, fold_kernel, move_kernel, segments_kernel
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pairs import FEW, Pairs
from d2o.kernels.select import Selection

# A program folds this many members of one survivor at once; most survivors have few.
_MEMBERS = 8
_MOVES = 32


def fold(
    pool: PagedTensors,
    pairs: Pairs,
    evicted: Tensor,
    nearest: Tensor,
    similarity: Tensor,
    passes: Tensor,
    config: D2OConfig,
    *,
    members: int = _MEMBERS,
    warps: int = 1,
) -> None:
    """Merges every evicted token that passes into its nearest survivor, at that survivor's slot.

    Evicted slots are only read and survivors only written, each by one program, in a fixed order and in float32:
    nothing depends on timing, and sums are rounded once.

    Args:
        pool: the pages; changed in place.
        pairs: what is evicted from.
        evicted, nearest: [pairs, kv_heads, most_evicted] int32 slots.
        similarity: the same shape, float32.
        passes: the same shape, bool; false for padding.
        config: the rule.
        members, warps: how the kernel is cut.
    """
    conserves = config.merge is Merge.CONSERVE
    rule = {
        "HEADS": pool.kv_heads,
        "PAGE": pool.page_size,
        "DIM": pool.head_dim,
        "BLOCK_D": triton.next_power_of_2(pool.head_dim),
        "PAPER": config.merge is Merge.PAPER,
        "CONSERVE": conserves,
        "KEYS": not conserves or config.merge_keys,
        "BIAS": conserves and config.merge_bias,
        "MEMBERS": members,
        "num_warps": warps,
    }
    cache = (pool.k, pool.v, pool.score, pool.position, pool.bias, pairs.tables, pairs.seen, evicted, similarity)
    heads, width, pages = passes.shape[0] * passes.shape[1], passes.shape[-1], pairs.tables.shape[1]
    weights = (config.merge_weight, config.bias_limit)
    if width <= FEW:
        few = (nearest, passes.view(torch.uint8), pages, width)
        fold_few_kernel[(heads * width,)](*cache, *few, *weights, EVICTED=pairs.lanes, **rule)
        return
    nobody = pairs.most_used
    target, order = torch.where(passes, nearest, nobody).sort(dim=-1, stable=True)
    segments = min(width, pairs.most_kept)
    begin = torch.empty(heads, segments + 1, dtype=torch.int32, device=pool.device)
    count = torch.empty(heads, dtype=torch.int32, device=pool.device)
    segments_kernel[(heads,)](target, begin, count, width, segments + 1, nobody, BLOCK=2048, num_warps=8)
    lists = (target, order, begin, count, pages, width, segments)
    fold_kernel[(heads * segments,)](*cache, *lists, *weights, **rule)


def move(pool: PagedTensors, pairs: Pairs, selection: Selection) -> None:
    """Moves the survivors at or behind slot ``keep`` into the evicted slots before it, of which there are as many."""
    most = min(pairs.most_kept, pairs.most_evicted)
    blocks = triton.cdiv(most, _MOVES)
    move_kernel[(pairs.count * pool.kv_heads * blocks,)](
        pool.k,
        pool.v,
        pool.score,
        pool.position,
        pool.bias,
        pairs.tables,
        selection.kept,
        selection.evicted,
        pairs.used,
        pairs.keep,
        pairs.tables.shape[1],
        pairs.most_kept,
        pairs.most_evicted,
        blocks,
        HEADS=pool.kv_heads,
        PAGE=pool.page_size,
        DIM=pool.head_dim,
        BLOCK_D=triton.next_power_of_2(pool.head_dim),
        MOVES=_MOVES,
        num_warps=4,
    )
