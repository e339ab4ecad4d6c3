"""The most similar survivor of every evicted key: a matrix product with its argmax, never an N x S matrix (eq. 8, 9).

Many evicted keys (a prompt): the survivors' unit keys are first laid out densely, and a tile's maximum carries its
column in the value's lowest bits. A page's worth or less (decode): one pass over the pages, which memory bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from d2o.kernels.nearest_kernels import direct_kernel, stage_kernel, staged_kernel
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pairs import FEW, Pairs
from d2o.kernels.select import Selection

# Staged survivors are padded to the largest tile of a sweep.
_PADDED = 256


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut: evicted keys (of the direct kernel: a power of two from 16) and slots of a tile."""

    evicted: int
    slots: int
    warps: int
    stages: int


def nearest(
    pool: PagedTensors,
    pairs: Pairs,
    selection: Selection,
    evicted: Tensor,
    *,
    into_sinks: bool,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """The slot of the nearest survivor, int32, and the float32 cosine to it, float32: both [pairs, kv_heads, evicted].

    The search runs in the keys' type; the cosine of the pair that it finds is taken in float32. Entries beyond a pair's
    own count are undefined, as are those of heads without a survivor that may be merged into.

    Args:
        pool: the pages.
        pairs: what is evicted from.
        selection: survivors.
        evicted: [pairs, kv_heads, most_evicted] int32, ``selection.evicted`` in any order.
        into_sinks: whether sinks may be found.
        tiling: how to cut the work; by default what suits head_dim and dtype.
    """
    direct = evicted.shape[-1] <= FEW
    tiling = tiling or (_direct_tiling(pool, pairs.lanes) if direct else _staged_tiling(pool))
    slot = torch.empty_like(evicted)
    similarity = torch.empty_like(evicted, dtype=torch.float32)
    common = (
        slot,
        similarity,
        pool.k,
        pairs.tables,
        selection.keys,
        evicted,
        pairs.used,
        pairs.keep,
        pairs.tables.shape[1],
        pairs.most_used,
        pairs.most_evicted,
    )
    sizes = {
        "HEADS": pool.kv_heads,
        "PAGE": pool.page_size,
        "DIM": pool.head_dim,
        "BLOCK_D": triton.next_power_of_2(pool.head_dim),
        "INTO_SINKS": into_sinks,
    }
    cut = {
        "EVICTED": tiling.evicted,
        "SLOTS": tiling.slots,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    programs = pairs.count * pool.kv_heads
    if direct:
        direct_kernel[(programs,)](*common, selection.cut, **sizes, **cut)
        return slot, similarity
    staged = _staged(pool, pairs, selection, sizes)
    blocks = triton.cdiv(pairs.most_evicted, tiling.evicted)
    staged_kernel[(programs * blocks,)](
        *common,
        staged,
        selection.kept,
        selection.fallback,
        pairs.most_kept,
        staged.shape[1],
        blocks,
        **sizes,
        **cut,
    )
    return slot, similarity


def _staged(pool: PagedTensors, pairs: Pairs, selection: Selection, sizes: dict[str, int]) -> Tensor:
    """Unit keys of the survivors [pairs * kv_heads, padded, BLOCK_D]; what is no target is a copy of the fallback."""
    padded = triton.cdiv(pairs.most_kept, _PADDED) * _PADDED
    programs = pairs.count * pool.kv_heads
    staged = torch.empty(programs, padded, sizes["BLOCK_D"], dtype=pool.k.dtype, device=pool.device)
    block = 32
    stage_kernel[(programs * (padded // block),)](
        staged,
        pool.k,
        pairs.tables,
        selection.keys,
        selection.kept,
        selection.fallback,
        pairs.keep,
        pairs.tables.shape[1],
        pairs.most_used,
        pairs.most_kept,
        padded,
        **sizes,
        BLOCK=block,
        num_warps=4,
    )
    return staged


def staged_bytes(pool: PagedTensors, most_kept: int) -> int:
    """Bytes of one pair's staged keys."""
    padded = triton.cdiv(most_kept, _PADDED) * _PADDED
    return int(pool.kv_heads * padded * triton.next_power_of_2(pool.head_dim) * pool.k.element_size())


def _direct_tiling(pool: PagedTensors, lanes: int) -> Tiling:
    if pool.k.element_size() == 4:
        return Tiling(lanes, 32, 4, 2)
    if lanes >= FEW and pool.head_dim <= 128:
        return Tiling(lanes, 128, 8, 3)
    return Tiling(lanes, 64, 4, 3)


def _staged_tiling(pool: PagedTensors) -> Tiling:
    if pool.k.element_size() == 4:
        return Tiling(64, 32, 4, 2)
    return Tiling(128, 128 if pool.head_dim <= 128 else 64, 8, 2)
