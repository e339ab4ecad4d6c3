"""What remains of a decoding sequence once its work items have attended: one output, and every slot's score.

The program that arrives last at its sequence's counter combines the items' outputs, and adds the scores: other
sequences' keys stream meanwhile. At the end of the launch nothing streams any more, so there the work is shared: the
last ``waiting`` items, as many as surely run at once, wait for their sequence and score their own slots. Programs start
in order, so a program that waits never keeps one that it waits for from starting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.decode_scores import add, fetch, normaliser

# A counter's low half counts arrivals; the high half counts those that waited and need the arrivals no longer.
_LEAVE = tl.constexpr(1 << 16)
_ARRIVED = tl.constexpr((1 << 16) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(
    out: tl.tensor,
    partial: tl.tensor,
    peak: tl.tensor,
    most: tl.tensor,
    inverse: tl.tensor,
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
) -> None:
    """The sequence's output from those of its items [low, high)."""
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
    result = (result * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(out + target[:, None] * DIM + dim[None, :], result, mask=wanted)


@triton.jit  # type: ignore[untyped-decorator]
def finish(
    out: tl.tensor,
    score: tl.tensor,
    pages: tl.tensor,
    partial: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    stash: tl.tensor,
    stash_peak: tl.tensor,
    arrivals: tl.tensor,
    head: tl.tensor,
    sequence: tl.tensor,
    item: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    edge: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    length: tl.tensor,
    size: tl.tensor,
    drawer: tl.tensor,
    origin: tl.tensor,
    room: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    SCORE: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Called by every program when it has stored its item [begin, end) of the sequence's items [low, high).

    Without SCORE the last to arrive only combines the outputs. With it, items from ``edge`` on wait for the others of
    their sequence. The counter is 0 again when all have left.
    """
    tl.debug_barrier()
    parts = high - low
    edge = tl.minimum(tl.maximum(edge, low), high)
    waits = (item >= edge) & SCORE
    last = (parts == 1) & SCORE
    if parts > 1:
        came = tl.atomic_add(arrivals, 1, sem="acq_rel")
        last = (came & _ARRIVED) == parts - 1
        if waits:
            while (came & _ARRIVED) < parts:
                came = tl.atomic_add(arrivals, 0, sem="acquire")
            if tl.atomic_add(arrivals, _LEAVE, sem="relaxed") // _LEAVE == high - edge - 1:
                tl.atomic_xchg(arrivals, 0, sem="relaxed")
        elif last & ((edge == high) | (not SCORE)):
            tl.atomic_xchg(arrivals, 0, sem="relaxed")
    if last | waits:
        most, inverse = normaliser(peak, total, head, low, high, KV_HEADS, GROUP, LANES)
        if last & (parts > 1):
            _combine(
                out, partial, peak, most, inverse, head, sequence, low, high,
                KV_HEADS, GROUP, DIM, DIM_PAD, LANES, SPLITS,
            )  # fmt: skip
        if SCORE:
            left = tl.where(last, (edge - low) * size, 0)
            own = tl.where(waits, begin, (high - low) * size)
            work = tl.minimum(left, length) + tl.where(waits, end - begin, 0)
            for at in range(0, work, TILES * BLOCK):
                corner = at + tl.arange(0, TILES) * BLOCK
                limit = tl.where(corner < left, length, end)
                corner = tl.where(corner < left, corner, corner - left + own)
                live = corner < tl.minimum(limit, room - origin)
                place, before, weight, level = fetch(
                    score, pages, stash, stash_peak, head, corner, live, drawer, KV_HEADS, PAGE, BLOCK, LANES
                )  # fmt: skip
                add(
                    score, place, before, weight, level, most, inverse, corner, live, limit[:, None],
                    GROUP, TILES, BLOCK, LANES,
                )  # fmt: skip
