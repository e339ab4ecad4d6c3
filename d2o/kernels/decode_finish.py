"""The output of a sequence that was split into several work items, combined by the program that arrives last."""

from __future__ import annotations

import triton
import triton.language as tl

_LOOK = tl.constexpr(64)


@triton.jit  # type: ignore[untyped-decorator]
def _normaliser(
    peak: tl.tensor,
    total: tl.tensor,
    head: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest logit and sum of exponentials [LANES] over the items [low, high) of a sequence; 1 beyond the group."""
    row = tl.arange(0, LANES)
    most = tl.full([LANES], float("-inf"), tl.float32)
    added = tl.zeros([LANES], tl.float32)
    for start in range(low, high, _LOOK):
        item = start + tl.arange(0, _LOOK)
        wanted = (item < high)[:, None] & (row < GROUP)[None, :]
        index = (item * KV_HEADS + head)[:, None] * GROUP + row[None, :]
        tops = tl.load(peak + index, mask=wanted, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(total + index, mask=wanted, other=0.0, cache_modifier=".cg")
        top = tl.maximum(most, tl.max(tops, 0))
        level = tl.where(top == float("-inf"), 0.0, top)
        added = added * tl.exp2(most - level) + tl.sum(sums * tl.exp2(tops - level[None, :]), 0)
        most = top
    return tl.where(row < GROUP, most, 0.0), tl.where(row < GROUP, added, 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def combine(
    out: tl.tensor,
    partial: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    head: tl.tensor,
    sequence: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """The sequence's output from those of its items [low, high); returns the logsumexp [LANES], base 2."""
    most, added = _normaliser(peak, total, head, low, high, KV_HEADS, GROUP, LANES)
    row, dim = tl.arange(0, LANES), tl.arange(0, DIM_PAD)
    wanted = (row < GROUP)[:, None] & (dim < DIM)[None, :]
    result = tl.zeros([LANES, DIM_PAD], tl.float32)
    for start in range(low, high, SPLITS):
        item = start + tl.arange(0, SPLITS)
        held = (item < high)[:, None] & (row < GROUP)[None, :]
        index = (item * KV_HEADS + head)[:, None] * GROUP + row[None, :]
        tops = tl.load(peak + index, mask=held, other=float("-inf"), cache_modifier=".cg")
        cells = partial + index[:, :, None] * DIM + dim[None, None, :]
        piece = tl.load(cells, mask=held[:, :, None] & wanted[None, :, :], other=0.0, cache_modifier=".cg")
        result += tl.sum(piece * tl.exp2(tops - most[None, :])[:, :, None], 0)
    target = (sequence.to(tl.int64) * KV_HEADS + head) * GROUP + row
    result = (result / added[:, None]).to(out.dtype.element_ty)
    tl.store(out + target[:, None] * DIM + dim[None, :], result, mask=wanted)
    return most + tl.log2(added)


@triton.jit  # type: ignore[untyped-decorator]
def arrive(arrivals: tl.tensor, parts: tl.tensor) -> tl.tensor:
    """Whether this is the last of a sequence's ``parts`` programs to arrive at its counter, which is then 0 again."""
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == parts - 1
    if last:
        tl.atomic_xchg(arrivals, 0, sem="relaxed")
    return last
