"""What remains of a decoding sequence once its work items have attended: one output, and every slot's score.

The program that arrives last at its sequence's counter combines the items' outputs, and adds the scores: other
sequences' keys stream meanwhile. At the end of the launch nothing streams any more, so there the work is shared: the
last ``waiting`` items, as many as surely run at once, wait for their sequence and score their own slots. Programs start
in order, so a program that waits never keeps one that it waits for from starting.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Probabilities relative to a peak are at most 1: this much larger, they use float16's whole range.
STASH_SCALE = tl.constexpr(32768.0)
# A counter's low half counts arrivals; the high half counts those that waited and need the arrivals no longer.
_LEAVE = tl.constexpr(1 << 16)
_ARRIVED = tl.constexpr((1 << 16) - 1)
_LOOK = tl.constexpr(32)


@triton.jit  # type: ignore[untyped-decorator]
def _normaliser(
    peak: tl.tensor,
    total: tl.tensor,
    head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest logit and inverse sum of exponentials [LANES] over the items [begin, end) of a sequence."""
    row = tl.arange(0, LANES)
    most = tl.full([LANES], float("-inf"), tl.float32)
    added = tl.zeros([LANES], tl.float32)
    for start in range(begin, end, _LOOK):
        item = start + tl.arange(0, _LOOK)
        wanted = (item < end)[:, None] & (row < GROUP)[None, :]
        index = (item * KV_HEADS + head)[:, None] * GROUP + row[None, :]
        tops = tl.load(peak + index, mask=wanted, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(total + index, mask=wanted, other=0.0, cache_modifier=".cg")
        top = tl.maximum(most, tl.max(tops, 0))
        level = tl.where(top == float("-inf"), 0.0, top)
        added = added * tl.exp2(most - level) + tl.sum(sums * tl.exp2(tops - level[None, :]), 0)
        most = top
    live = row < GROUP
    return tl.where(live, most, 0.0), tl.where(live, 1.0 / tl.where(live, added, 1.0), 0.0)


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
def _add_scores(
    score: tl.tensor,
    pages: tl.tensor,
    stash: tl.tensor,
    stash_peak: tl.tensor,
    most: tl.tensor,
    inverse: tl.tensor,
    head: tl.tensor,
    corner: tl.tensor,
    limit: tl.tensor,
    drawer: tl.tensor,
    free: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    POLICY: tl.constexpr,
) -> None:
    """Adds the probabilities of the tiles that begin at the slots ``corner`` [TILES] and end at ``limit`` or before."""
    row, column = tl.arange(0, LANES), tl.arange(0, BLOCK)
    slot = corner[:, None] + column[None, :]
    live = (slot < limit[:, None]) & free[:, None]
    page = tl.load(pages + corner // PAGE, mask=(corner < limit) & free, other=0)
    place = ((page.to(tl.int64) * KV_HEADS + head) * PAGE + corner % PAGE)[:, None] + column[None, :]
    before = tl.load(score + place, mask=live, other=0.0)
    kept = live[:, :, None] & (row < GROUP)[None, None, :]
    cells = stash + (drawer + slot)[:, :, None] * LANES + row[None, None, :]
    weight = tl.load(cells, mask=kept, other=0.0, eviction_policy=POLICY).to(tl.float32)
    level_cells = stash_peak + ((drawer + corner) // BLOCK)[:, None] * LANES + row[None, :]
    held = ((corner < limit) & free)[:, None] & (row < GROUP)[None, :]
    level = tl.load(level_cells, mask=held, other=float("-inf"), cache_modifier=".cg")
    factor = tl.exp2(level - most[None, :]) * (inverse / STASH_SCALE)[None, :]
    tl.store(score + place, before + tl.sum(weight * factor[:, None, :], 2), mask=live)


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
    STAGES: tl.constexpr,
    LOAD_POLICY: tl.constexpr,
) -> None:
    """Called by every program when it has stored its item [begin, end) of the sequence's items [low, high).

    Items from ``edge`` on wait for the others of their sequence. The counter is 0 again when all have left.
    """
    tl.debug_barrier()
    parts = high - low
    edge = tl.minimum(tl.maximum(edge, low), high)
    waits = (item >= edge) & SCORE
    last = parts == 1
    if parts > 1:
        before = tl.atomic_add(arrivals, 1, sem="acq_rel")
        last = (before & _ARRIVED) == parts - 1
        if waits:
            while (before & _ARRIVED) < parts:
                before = tl.atomic_add(arrivals, 0, sem="acquire")
            if tl.atomic_add(arrivals, _LEAVE, sem="relaxed") // _LEAVE == high - edge - 1:
                tl.atomic_xchg(arrivals, 0, sem="relaxed")
        elif last & ((edge == high) | (not SCORE)):
            tl.atomic_xchg(arrivals, 0, sem="relaxed")
    if last | waits:
        most, inverse = _normaliser(peak, total, head, low, high, KV_HEADS, GROUP, LANES)
        if last & (parts > 1):
            _combine(
                out, partial, peak, most, inverse, head, sequence, low, high,
                KV_HEADS, GROUP, DIM, DIM_PAD, LANES, SPLITS,
            )  # fmt: skip
        if SCORE:
            left = tl.where(last, tl.minimum((edge - low) * size, length), 0)
            own = tl.where(waits, begin, length)
            for at in tl.range(0, left + tl.where(waits, end - begin, 0), TILES * BLOCK, num_stages=STAGES):
                corner = at + tl.arange(0, TILES) * BLOCK
                limit = tl.where(corner < left, length, end)
                corner = tl.where(corner < left, corner, corner - left + own)
                _add_scores(
                    score, pages, stash, stash_peak, most, inverse, head, corner, limit, drawer, origin + corner < room,
                    KV_HEADS, GROUP, PAGE, BLOCK, LANES, LOAD_POLICY,
                )  # fmt: skip
