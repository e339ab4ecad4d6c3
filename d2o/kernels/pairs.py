"""The (layer, row) pairs that one eviction works on, and how its kernels find their slots."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# A slot's key has its class in the highest bits; sinks are the highest class.
CLASS_SHIFT = tl.constexpr(60)
SINK = tl.constexpr(3)

FEW = 64
"""Evicted tokens of a head that one program holds: what decode evicts at a time is by default no more."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (layer, row) pairs of one call; vectors are [pairs] int32 on the device.

    Attributes:
        places: where each pair stands in the block table, ``layer * rows + row``.
        tables: [pairs, pages] int32, the pages of each pair.
        used, keep, seen: as in :func:`d2o.kernels.evict.evict_in_place`.
        recent_from: the first position of the recent window.
        quota: slots that the window's quota saves.
        most_used, most_kept, most_evicted: of any pair, on the host.
    """

    places: Tensor
    tables: Tensor
    used: Tensor
    keep: Tensor
    seen: Tensor
    recent_from: Tensor
    quota: Tensor
    most_used: int
    most_kept: int
    most_evicted: int

    @property
    def count(self) -> int:
        return self.tables.shape[0]

    @property
    def lanes(self) -> int:
        """Of a program that holds the evicted tokens of a head; few sizes, as each is a kernel of its own."""
        return max(16, int(triton.next_power_of_2(self.most_evicted)))


@triton.jit  # type: ignore[untyped-decorator]
def slot_row(
    table: tl.tensor,
    slot: tl.tensor,
    inside: tl.tensor,
    head: tl.tensor,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
) -> tl.tensor:
    """The row (int64) of a slot in the pool viewed as [pages * kv_heads * page_size, ...]; ``table``: its pair's."""
    page = tl.load(table + slot // PAGE, mask=inside, other=0).to(tl.int64)
    return (page * HEADS + head) * PAGE + slot % PAGE


@triton.jit  # type: ignore[untyped-decorator]
def is_target(key: tl.tensor, cut: tl.tensor, INTO_SINKS: tl.constexpr) -> tl.tensor:
    """Whether a slot survives and may be merged into."""
    survives = key >= cut
    if not INTO_SINKS:
        survives = survives & ((key >> CLASS_SHIFT) != SINK)
    return survives
