"""Paged split decode attention that appends the new token and adds up the attention each slot receives.

Two launches a layer. The first attends: a program takes one work item (:mod:`d2o.kernels.decode_plan`) of one KV head,
all query heads of its group at once, and leaves its unnormalised output, peak and sum. With scores it also stashes each
slot's probability relative to the running peak. The second combines the items of a sequence (flash-decoding's
log-sum-exp rule) and, with the normaliser known, adds the stashed probabilities to the slots' scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from d2o.kernels.decode_kernels import attend_kernel, combine_kernel
from d2o.kernels.decode_plan import SHARE_SLOTS, DecodePlan, DecodeWorkspace, decode_items, plan_decode
from d2o.kernels.paged import PagedTensors

__all__ = ["DecodeConfig", "DecodePlan", "DecodeWorkspace", "decode_attention", "decode_items", "plan_decode"]

_LOG2_E = math.log2(math.e)
_STEP_BYTES = 1 << 15


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernels are launched; the results do not depend on it.

    Attributes:
        block: slots a loop step; a power of two from 16 to ``SHARE_SLOTS``.
        stages: loop steps whose keys and values are on their way at once.
        warps: of the attending program.
        pin_stash: ask the L2 cache to keep the stash from the one program to the other while keys stream through.
        combine_slots: slots a loop step of the combining program.
        combine_warps: of the combining program.
    """

    block: int
    stages: int = 3
    warps: int = 4
    pin_stash: bool = True
    combine_slots: int = 512
    combine_warps: int = 4

    @classmethod
    def choose(cls, head_dim: int, dtype: torch.dtype) -> DecodeConfig:
        """Steps of 32 KiB of keys and values: two programs of three stages fit an H200 processor's shared memory."""
        slot_bytes = 2 * triton.next_power_of_2(head_dim) * dtype.itemsize
        return cls(block=max(16, min(SHARE_SLOTS, _STEP_BYTES // slot_bytes)))


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
    score: bool,
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
        workspace: scratch with room for the plan's items and, with ``score``, the layer's slots.
        scale: factor on q.k.
        window: slots at positions <= the new token's - window are hidden; None is off.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before the bias; None is off.
        bias: add the slots' logit biases (ALGORITHM section 4b).
        score: add each slot's probability, summed over the group, to ``pool.score``.
        reset: set the new slot's score to 0 first; False where a step is repeated.

    Returns:
        [batch, heads, head_dim], contiguous, in q's dtype.

    Raises:
        ValueError: the workspace has no room for the plan's items, or none for scores.
    """
    if plan.items > workspace.partial.shape[0]:
        raise ValueError(f"plan: got {plan.items} items, allowed are the workspace's {workspace.partial.shape[0]}")
    if score and not workspace.stash.numel():
        raise ValueError("score: the workspace was made without room for scores; allocate it with slots above 0")
    batch, heads, head_dim = q.shape
    kv_heads, group = pool.kv_heads, heads // pool.kv_heads
    chosen = config or DecodeConfig.choose(head_dim, pool.k.dtype)
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    table = (block_table, rows, *block_table.shape[1:])
    split = (plan.lengths, plan.share, plan.first, plan.base, plan.owner, layer, batch, plan.items)
    scratch = (workspace.partial, workspace.peak, workspace.total, workspace.stash, workspace.stash_peak)
    room = workspace.stash.shape[1] // group
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "PAGE": pool.page_size,
        "DIM": head_dim,
        "BLOCK": chosen.block,
        "SCORE": score,
    }
    attend_kernel[kv_heads, plan.items](
        q,
        k_new,
        v_new,
        *(q.stride(0), q.stride(1), k_new.stride(0), k_new.stride(1), v_new.stride(0), v_new.stride(1)),
        *(pool.k, pool.v, pool.score, pool.position, pool.bias),
        positions,
        *table,
        *split,
        *scratch,
        room,
        float(scale if softcap is not None else scale * _LOG2_E),
        float(softcap or 0.0),
        window or 0,
        **shape,
        DIM_PAD=triton.next_power_of_2(head_dim),
        ROWS=max(16, triton.next_power_of_2(group)),
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        BIAS=bias,
        RESET=reset,
        STORE_POLICY="evict_last" if chosen.pin_stash else "",
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    combine_kernel[kv_heads, plan.items](
        out,
        pool.score,
        *table,
        *split,
        *scratch,
        room,
        **shape,
        ROWS=triton.next_power_of_2(group),
        TILES=max(1, chosen.combine_slots // chosen.block),
        WIDTH=32,
        SPLITS=16,
        LOAD_POLICY="evict_first" if chosen.pin_stash else "",
        num_warps=chosen.combine_warps,
    )
    return out
