"""How one decode step's slots are shared out among the GPU's programs, decided on the device once a step.

Sequences of one batch differ in length by orders of magnitude, so the split is by equal shares: a layer's slots are cut
into work items of about ``total / target`` slots each, however long the sequences are, but no shorter than starting a
program is worth. A sequence has one item more than its share at most, so ``target + batch`` items always suffice and
the grid is fixed for a batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARE_SLOTS = 128
"""Items begin at multiples of this many slots of their sequence; also the least share."""

WORTH_SLOTS = 512
"""Slots worth a program of their own, unless even such items leave processors without work."""

_PROGRAMS_PER_PROCESSOR = 2
_WAVES = 8


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The work items of one decode step, for all layers. Shapes depend on layers, batch and items only.

    Attributes:
        lengths: [layers, batch] int32, slots of each sequence, the new token's included; at least 1.
        share: [layers, batch] int32, slots of each of the sequence's items but the last, which may have fewer.
        first: [layers, batch + 1] int32, first item of each sequence; the last entry is the number of items.
        base: [layers, batch] int32, the sequence's first slot in :class:`DecodeWorkspace`'s stash.
        owner: [layers, items] int32, the sequence of each item, -1 past the end.
    """

    lengths: Tensor
    share: Tensor
    first: Tensor
    base: Tensor
    owner: Tensor

    @classmethod
    def empty(cls, lengths: Tensor, items: int) -> DecodePlan:
        """A plan around ``lengths`` [layers, batch], to be filled by :func:`plan_decode`."""
        layers, batch = lengths.shape
        return cls(
            lengths,
            torch.empty_like(lengths),
            lengths.new_empty(layers, batch + 1),
            torch.empty_like(lengths),
            lengths.new_empty(layers, items),
        )

    @property
    def batch(self) -> int:
        return self.lengths.shape[1]

    @property
    def items(self) -> int:
        return self.owner.shape[1]


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Scratch of :func:`d2o.kernels.decode.decode_attention`; one serves all layers, one after another.

    The stash holds each slot's unnormalised probability by query head until all items of its sequence are done. It is
    sized for one layer's largest total, not for the pool: ``slots + batch * SHARE_SLOTS`` slots. Slots beyond that get
    no score (and nothing is overwritten): the caller sizes it for what it admits.

    Attributes:
        partial: [items, kv_heads, group, head_dim] float32, each item's unnormalised output.
        peak, total: [items, kv_heads, group] float32, its largest logit (base 2) and its sum of exponentials.
        stash: [kv_heads, stash_slots * lanes] float16, lanes being the group rounded up to a power of two; stash_peak:
            [kv_heads, stash_slots * lanes / 16] float32, what each tile of the stash is relative to. Both are empty
            without scores.
        arrivals: [items, kv_heads] int32, how many of a sequence's items are done; all 0 between launches.
    """

    partial: Tensor
    peak: Tensor
    total: Tensor
    stash: Tensor
    stash_peak: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(
        cls, *, batch: int, items: int, heads: int, kv_heads: int, head_dim: int, slots: int, device: torch.device | str
    ) -> DecodeWorkspace:
        """Scratch for batches up to ``batch`` and ``items``, and layers of up to ``slots`` slots in all sequences.

        ``slots`` 0 is for a workspace that never serves scores.
        """
        group = heads // kv_heads
        lanes = triton.next_power_of_2(group)
        padded = (-(-slots // SHARE_SLOTS) + batch) * SHARE_SLOTS if slots else 0
        return cls(
            torch.empty(items, kv_heads, group, head_dim, dtype=torch.float32, device=device),
            torch.empty(items, kv_heads, group, dtype=torch.float32, device=device),
            torch.empty(items, kv_heads, group, dtype=torch.float32, device=device),
            torch.empty(kv_heads, padded * lanes, dtype=torch.float16, device=device),
            torch.empty(kv_heads, padded * lanes // 16, dtype=torch.float32, device=device),
            torch.zeros(items, kv_heads, dtype=torch.int32, device=device),
        )


def decode_items(batch: int, kv_heads: int, processors: int, *, waves: int = _WAVES) -> int:
    """Work items of a batch size: about ``waves`` rounds of programs on ``processors``, and one for each sequence."""
    return -(-waves * _PROGRAMS_PER_PROCESSOR * processors // kv_heads) + batch


def plan_decode(lengths: Tensor, *, items: int, out: DecodePlan | None = None) -> DecodePlan:
    """Shares out a step's slots; one launch for all layers, without waiting for the device.

    Args:
        lengths: [layers, batch] int32, contiguous.
        items: grid size, more than batch: see :func:`decode_items`.
        out: a plan of the same shapes to fill, made by ``DecodePlan.empty(lengths, items)`` around the same lengths.

    Raises:
        ValueError: ``items`` leaves nothing to share out.
    """
    layers, batch = lengths.shape
    if items <= batch:
        raise ValueError(f"items: got {items}, allowed is more than the batch of {batch}")
    plan = DecodePlan.empty(lengths, items) if out is None else out
    padded = triton.next_power_of_2(batch)
    tile = max(1, min(64, 8192 // padded))
    _plan_kernel[layers, triton.cdiv(items, tile)](
        lengths, plan.share, plan.first, plan.base, plan.owner, batch, items, SHARE_SLOTS, WORTH_SLOTS, padded, tile
    )
    return plan


@triton.jit(do_not_specialize=["batch", "items"], do_not_specialize_on_alignment=["lengths"])  # type: ignore[untyped-decorator]
def _plan_kernel(
    lengths: tl.tensor,
    share: tl.tensor,
    first: tl.tensor,
    base: tl.tensor,
    owner: tl.tensor,
    batch: tl.tensor,
    items: tl.tensor,
    UNIT: tl.constexpr,
    WORTH: tl.constexpr,
    BATCH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program (layer, tile of items). Every tile repeats the sums over the batch; the first one stores them."""
    layer, tile = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, BATCH)
    inside = index < batch
    length = tl.load(lengths + layer * batch + index, mask=inside, other=0)
    slots = tl.sum(length, 0)
    limit = tl.maximum(tl.cdiv(slots, items - batch), tl.minimum(WORTH, tl.cdiv(4 * slots, items - batch)))
    limit = tl.maximum(tl.cdiv(limit, UNIT) * UNIT, UNIT)
    even = tl.cdiv(length, tl.maximum(tl.cdiv(length, limit), 1))
    even = tl.maximum(tl.cdiv(even, UNIT) * UNIT, UNIT)
    stop = tl.cumsum(tl.cdiv(length, even), 0)
    item = tile * TILE + tl.arange(0, TILE)
    before = tl.sum(((stop[None, :] <= item[:, None]) & inside[None, :]).to(tl.int32), 1)
    tl.store(owner + layer * items + item, tl.where(before < batch, before, -1), mask=item < items)
    if tile == 0:
        padded = tl.cdiv(length, UNIT) * UNIT
        tl.store(share + layer * batch + index, even, mask=inside)
        tl.store(base + layer * batch + index, tl.cumsum(padded, 0) - padded, mask=inside)
        tl.store(first + layer * (batch + 1) + index + 1, stop, mask=inside)
        tl.store(first + layer * (batch + 1), 0)
