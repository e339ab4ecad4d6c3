"""Paged split decode attention that appends the new token and adds up the attention each slot receives.

A program takes one work item (:mod:`d2o.kernels.decode_plan`) of one KV head, all query heads of its group at once, and
leaves its unnormalised output, peak and sum. The program that finishes a sequence last combines its items
(flash-decoding's log-sum-exp rule). Scores receive what a query gives when one of a later step reads the same keys
(:mod:`d2o.kernels.pending`): by then its normaliser is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from d2o.kernels.decode_kernels import attend_kernel
from d2o.kernels.decode_plan import SHARE_SLOTS, DecodeGrid, DecodePlan, DecodeWorkspace, plan_decode
from d2o.kernels.launch import programs_at_once
from d2o.kernels.paged import PagedTensors, described
from d2o.kernels.pending import LOG2E, Pending

__all__ = ["DecodeConfig", "DecodeGrid", "DecodePlan", "DecodeWorkspace", "decode_attention", "plan_decode"]

_TILE_BYTES = 1 << 14
# Values a warp holds of the items' outputs that it combines at once.
_COMBINED = 2048


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is launched; the results do not depend on it.

    Attributes:
        block: slots a loop step; a power of two from 16 to ``SHARE_SLOTS``, and no more than a page's.
        stages: depth of the loop's pipeline; keys and values of ``stages - 1`` steps lie in shared memory.
        warps: of a program.
    """

    block: int
    stages: int = 3
    warps: int = 2

    @classmethod
    def choose(cls, head_dim: int, dtype: torch.dtype, page_size: int) -> DecodeConfig:
        """Tiles of at most 16 KiB of keys and as much of values, so that several programs fit a processor."""
        slot_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
        block = max(16, min(page_size, SHARE_SLOTS, _TILE_BYTES // slot_bytes))
        # Float32 has no tensor cores here: its products need the threads and the registers.
        warps = 4 if dtype == torch.float32 else 2
        return cls(block, warps=warps)


def decode_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    pool: PagedTensors,
    block_table: Tensor,
    rows: Tensor,
    positions: Tensor,
    plan: DecodePlan,
    layer: int,
    *,
    workspace: DecodeWorkspace,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: bool,
    pending: Pending | None,
    reset: bool = True,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Appends one token a sequence to a layer's cache and attends over all of the layer's slots.

    Never waits for the device, so it can be captured in a CUDA graph. Several entries of the batch may share one
    padding row of length 1: they overwrite each other's slot.

    Args:
        q: [batch, heads, head_dim], any strides but the last.
        k_new, v_new: [batch, kv_heads, head_dim], likewise; written to slot ``plan.lengths[layer, b] - 1``.
        block_table: [layers, rows, pages_per_row] int32, contiguous.
        rows: [batch] int32, each sequence's row of the table.
        positions: [batch] int32, of the new tokens.
        plan: the step's split, from :func:`plan_decode`.
        workspace: scratch with room for the plan's items.
        scale: factor on q.k.
        window: slots at positions <= the new token's - window are hidden; None is off.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before the bias; None is off.
        bias: add the slots' logit biases (ALGORITHM section 4b); False only where all of them are 0.
        pending: the newest queries of the table's rows, which the new ones join; where they are as many as fit, and in
            every so many-th step by its clock, each slot's probability under them, summed over them and the group, is
            added to ``pool.score`` first. None: scores stay as they are.
        reset: set the new slot's score to 0 first; False where a step is repeated.

    Returns:
        [batch, heads, head_dim], contiguous, in q's dtype.

    Raises:
        ValueError: the workspace has no room for the plan's items; a tile is larger than a page; or scores are wanted
            of a layer with a window, whose slots leave by age alone.
    """
    grid = plan.grid
    if grid.items > len(workspace.partial):
        raise ValueError(f"plan: got {grid.items} items, allowed are the workspace's {len(workspace.partial)}")
    if pending is not None and window is not None:
        raise ValueError(f"pending: got scores with a window of {window}, allowed is None there")
    batch, heads, head_dim = q.shape
    kv_heads, group = pool.kv_heads, heads // pool.kv_heads
    chosen = config or DecodeConfig.choose(head_dim, pool.k.dtype, pool.page_size)
    if chosen.block > pool.page_size:
        raise ValueError(f"block: got {chosen.block} slots, allowed are a page's {pool.page_size}")
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    lanes, dim_pad = triton.next_power_of_2(group), triton.next_power_of_2(head_dim)
    late = (
        (workspace.partial,) * 5
        if pending is None
        else (pending.query, pending.level, pending.count, pending.clock, pending.rule)
    )
    depth = 1 if pending is None else pending.depth
    tiles = [described(each, [chosen.block, dim_pad]) for each in (pool.k, pool.v)]
    launched = attend_kernel[kv_heads, grid.items](
        out,
        q,
        k_new,
        v_new,
        *(q.stride(0), q.stride(1), k_new.stride(0), k_new.stride(1), v_new.stride(0), v_new.stride(1)),
        *tiles,
        *(pool.k, pool.v, pool.score, pool.position, pool.bias),
        positions,
        *(block_table, rows, *block_table.shape[1:]),
        *(plan.lengths, plan.share, plan.first, plan.owner, layer, batch, grid.items),
        *(workspace.partial, workspace.peak, workspace.total, workspace.arrivals, *late),
        float(scale if softcap is not None else scale * LOG2E.value),
        float(softcap or 0.0),
        window or 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        PAGE=pool.page_size,
        DIM=head_dim,
        DIM_PAD=dim_pad,
        BLOCK=chosen.block,
        DESCRIBED=isinstance(tiles[0], TensorDescriptor),
        ROWS=max(8, lanes),
        LANES=lanes,
        DEPTH=depth,
        LATE_ROWS=max(8, depth * lanes),
        SCORE=pending is not None,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        BIAS=bias,
        RESET=reset,
        SPLITS=max(1, _COMBINED * chosen.warps // (lanes * dim_pad)),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    if launched is not None and (pending is not None) not in workspace.at_once:
        workspace.at_once[pending is not None] = programs_at_once(launched, chosen.warps, q.device)
    return out
