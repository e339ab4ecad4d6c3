"""How one decode step's slots are shared out among the GPU's programs, decided on the device once a step.

Sequences of one batch differ in length by orders of magnitude, so the split is by equal shares: a layer's slots are cut
into work items of about ``total / target`` slots each, however long the sequences are, but no shorter than starting a
program is worth. A sequence has one item more than its share at most, so ``target + batch`` items always suffice and
the grid is fixed for a batch size.

Programs run in rounds of as many as the GPU holds. Where a last round would be small, as 67 whole sequences are one
full round of 66 and one sequence that all others wait for, the sequences that begin it are cut as finely as fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARE_SLOTS = 128
"""Items begin at multiples of this many slots of their sequence; also the least share."""

WORTH_SLOTS = 2048
"""The best ``worth`` of a grid (docs/adr/0009)."""

ROUNDS = 6
"""Of programs on a GPU that a batch is cut into at most; one round is enough where the parts would be short."""

MOST_AT_ONCE = 8
"""Programs of the attention kernel on a processor that a plan reckons with at most."""

# Programs of it that surely run at once on a processor.
_AT_ONCE = 2
# A last round is filled where it is less full than that, in percent: a fuller one takes no longer than finer parts.
_FILLED_BELOW = tl.constexpr(45)


@dataclass(frozen=True, slots=True)
class DecodeGrid:
    """How many programs a batch size is given on a device.

    Attributes:
        items: work items of the launch, the same for all lengths.
        worth: slots of a sequence that are not split, unless such items leave processors without work.
        at_once: items that run at once, which are not shared out but kept for filling the last round; 0: unknown.
    """

    items: int
    worth: int = WORTH_SLOTS
    at_once: int = 0

    @classmethod
    def of(cls, batch: int, kv_heads: int, device: torch.device, at_once: int = 0) -> DecodeGrid:
        """Up to ``ROUNDS`` rounds of programs on a GPU, and one for each sequence; anything goes elsewhere.

        Args:
            batch, kv_heads: of the attention.
            device: that it runs on.
            at_once: programs that a processor runs at once, as the launches before have shown
                (:attr:`DecodeWorkspace.at_once`); more than ``MOST_AT_ONCE`` count as that.
        """
        if device.type != "cuda":
            return cls(batch + ROUNDS)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        once = min(at_once, MOST_AT_ONCE) * processors // kv_heads
        return cls(batch + -(-ROUNDS * _AT_ONCE * processors // kv_heads) + once, at_once=once)

    @property
    def shares(self) -> int:
        """Items that slots are shared out among, one for each sequence included."""
        return self.items - self.at_once


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The work items of one decode step, for all layers. Shapes depend on layers, batch and grid only.

    Attributes:
        grid: the items that there are.
        lengths: [layers, batch] int32, slots of each sequence, the new token's included; at least 1.
        share: [layers, batch] int32, slots of each of the sequence's items but the last, which may have fewer.
        first: [layers, batch + 1] int32, first item of each sequence; the last entry is the number of items.
        owner: [layers, items] int32, the sequence of each item, -1 past the end.
    """

    grid: DecodeGrid
    lengths: Tensor
    share: Tensor
    first: Tensor
    owner: Tensor

    @classmethod
    def empty(cls, lengths: Tensor, grid: DecodeGrid) -> DecodePlan:
        """A plan around ``lengths`` [layers, batch], to be filled by :func:`plan_decode`."""
        layers, batch = lengths.shape
        return cls(
            grid,
            lengths,
            torch.empty_like(lengths),
            lengths.new_empty(layers, batch + 1),
            lengths.new_empty(layers, grid.items),
        )

    @property
    def batch(self) -> int:
        return self.lengths.shape[1]


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Scratch of :func:`d2o.kernels.decode.decode_attention`; one serves all layers, one after another.

    Attributes:
        partial: [items, kv_heads, group, head_dim] float32, each item's unnormalised output.
        peak, total: [items, kv_heads, group] float32, its largest logit (base 2) and its sum of exponentials.
        arrivals: [items, kv_heads] int32, how many of a sequence's items are done; 0 between launches.
        at_once: programs that a processor runs at once, by whether they keep scores; known once they have run.
    """

    partial: Tensor
    peak: Tensor
    total: Tensor
    arrivals: Tensor
    at_once: dict[bool, int] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls, grid: DecodeGrid, *, heads: int, kv_heads: int, head_dim: int, device: torch.device | str
    ) -> DecodeWorkspace:
        """Scratch for batches up to the one that ``grid`` is of."""
        items, group = grid.items, heads // kv_heads
        return cls(
            torch.empty(items, kv_heads, group, head_dim, dtype=torch.float32, device=device),
            torch.empty(items, kv_heads, group, dtype=torch.float32, device=device),
            torch.empty(items, kv_heads, group, dtype=torch.float32, device=device),
            torch.zeros(items, kv_heads, dtype=torch.int32, device=device),
        )


def plan_decode(lengths: Tensor, grid: DecodeGrid, *, out: DecodePlan | None = None) -> DecodePlan:
    """Shares out a step's slots; one launch for all layers, without waiting for the device.

    Args:
        lengths: [layers, batch] int32, contiguous.
        grid: what there is to share among; more items than sequences.
        out: a plan of the same shapes to fill, made by ``DecodePlan.empty(lengths, grid)`` around the same lengths.

    Raises:
        ValueError: the grid leaves nothing to share out.
    """
    layers, batch = lengths.shape
    items = grid.items
    if grid.shares <= batch:
        raise ValueError(
            f"items: got {items}, {grid.at_once} of them at once, allowed is more than the batch of {batch} beside them"
        )
    plan = DecodePlan.empty(lengths, grid) if out is None else out
    padded = triton.next_power_of_2(batch)
    tile = max(1, min(64, 8192 // padded))
    _plan_kernel[layers, triton.cdiv(items, tile)](
        *(lengths, plan.share, plan.first, plan.owner),
        *(batch, items, grid.shares - batch, grid.at_once, SHARE_SLOTS, grid.worth, ROUNDS, padded, tile),
    )
    return plan


@triton.jit  # type: ignore[untyped-decorator]
def _units(slots: tl.tensor, UNIT: tl.constexpr) -> tl.tensor:
    """Slots rounded up to whole units, of which there is one at least."""
    return tl.maximum(tl.cdiv(slots, UNIT) * UNIT, UNIT)


@triton.jit(do_not_specialize=["batch", "items", "target", "at_once"], do_not_specialize_on_alignment=["lengths"])  # type: ignore[untyped-decorator]
def _plan_kernel(
    lengths: tl.tensor,
    share: tl.tensor,
    first: tl.tensor,
    owner: tl.tensor,
    batch: tl.tensor,
    items: tl.tensor,
    target: tl.tensor,
    at_once: tl.tensor,
    UNIT: tl.constexpr,
    WORTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    BATCH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program (layer, tile of items). Every tile repeats the sums over the batch; the first one stores them."""
    layer, tile = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, BATCH)
    inside = index < batch
    length = tl.load(lengths + layer * batch + index, mask=inside, other=0)
    slots = tl.sum(length, 0)
    once = tl.cdiv(ROUNDS * slots, target)
    limit = _units(tl.maximum(tl.cdiv(slots, target), tl.minimum(WORTH, once)), UNIT)
    even = _units(tl.cdiv(length, tl.maximum(tl.cdiv(length, limit), 1)), UNIT)
    parts = tl.cdiv(length, even)
    # Sequences of a unit, as those that pad a batch, are not cut and hold nobody up.
    counted = tl.where(length > UNIT, parts, 0)
    full = tl.sum(counted, 0) // tl.maximum(at_once, 1) * at_once
    over = tl.sum(counted, 0) - full
    fills = (full > 0) & (over * 100 < at_once * _FILLED_BELOW)
    begins = tl.cumsum(counted, 0) - counted >= full
    finer = _units(tl.cdiv(even * over, tl.maximum(at_once, 1)), UNIT)
    even = tl.where(fills & begins, tl.minimum(even, finer), even)
    stop = tl.cumsum(tl.cdiv(length, even), 0)
    item = tile * TILE + tl.arange(0, TILE)
    before = tl.sum(((stop[None, :] <= item[:, None]) & inside[None, :]).to(tl.int32), 1)
    tl.store(owner + layer * items + item, tl.where(before < batch, before, -1), mask=item < items)
    if tile == 0:
        tl.store(share + layer * batch + index, even, mask=inside)
        tl.store(first + layer * (batch + 1) + index + 1, stop, mask=inside)
        tl.store(first + layer * (batch + 1), 0)
