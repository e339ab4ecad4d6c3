"""What remains of a decoding sequence once its work items have attended: one output, and every slot's score.

The program that arrives last at its sequence's counter combines the items' outputs. Where all items of a sequence run
at once, each waits for the others and adds its own slots' scores, while the other programs of its processor stream:
what it stashed is then read and its place used again within microseconds, and never leaves the cache. Programs start in
order, so that one that waits never keeps one that it waits for from starting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.decode_scores import UNIT, add, fetch, normaliser

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
def take_turn(turns: tl.tensor, item: tl.tensor, chunks: tl.tensor) -> None:
    """Waits until the items before this one are done with its chunk of the stash."""
    turn = item // chunks
    if turn > 0:
        while tl.atomic_add(turns, 0, sem="acquire") < turn:
            pass


@triton.jit  # type: ignore[untyped-decorator]
def _arrive(arrivals: tl.tensor, parts: tl.tensor, WAIT: tl.constexpr) -> tl.tensor:
    """Whether this is the last of a sequence's ``parts`` to arrive; with WAIT only once all of them have.

    The counter is 0 again when all have left.
    """
    came = tl.atomic_add(arrivals, 1, sem="acq_rel") & _ARRIVED
    last = came == parts - 1
    if WAIT:
        while came < parts:
            came = tl.atomic_add(arrivals, 0, sem="acquire") & _ARRIVED
        if tl.atomic_add(arrivals, _LEAVE, sem="relaxed") // _LEAVE == parts - 1:
            tl.atomic_xchg(arrivals, 0, sem="relaxed")
    else:
        if last:
            tl.atomic_xchg(arrivals, 0, sem="relaxed")
    return last


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
    turns: tl.tensor,
    arrivals: tl.tensor,
    head: tl.tensor,
    sequence: tl.tensor,
    item: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    used: tl.tensor,
    length: tl.tensor,
    size: tl.tensor,
    chunks: tl.tensor,
    chunk_slots: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    SCORE: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Called by every program when it has stored its item of ``size`` slots of the sequence's items [low, high).

    With TOGETHER each adds its own item's scores and then gives its chunk of the stash to the next item, of the
    ``used`` that there are; else the last to arrive adds them all.
    """
    waits: tl.constexpr = SCORE and TOGETHER
    tl.debug_barrier()
    parts = high - low
    last = parts == 1
    if parts > 1:
        last = _arrive(arrivals, parts, waits)
    if last | waits:
        most, inverse = normaliser(peak, total, head, low, high, KV_HEADS, GROUP, LANES)
        if last & (parts > 1):
            _combine(
                out, partial, peak, most, inverse, head, sequence, low, high,
                KV_HEADS, GROUP, DIM, DIM_PAD, LANES, SPLITS,
            )  # fmt: skip
        if SCORE:
            first, stop = low, high
            if TOGETHER:
                first, stop = item, item + 1
            for each in range(first, stop):
                begin = tl.multiple_of((each - low) * size, UNIT)
                end = tl.minimum(tl.minimum(begin + size, length), begin + chunk_slots)
                chunk = ((each % chunks) * KV_HEADS + head).to(tl.int64) * chunk_slots
                shift = tl.multiple_of(chunk, UNIT) - begin
                for at in range(begin, end, TILES * BLOCK):
                    corner = at + tl.arange(0, TILES) * BLOCK
                    live = corner < end
                    place, before, weight, level = fetch(
                        score, pages, stash, stash_peak, head, corner, live, shift, KV_HEADS, PAGE, BLOCK, LANES
                    )  # fmt: skip
                    add(
                        score, place, before, weight, level, most, inverse, corner, live, end,
                        GROUP, TILES, BLOCK, LANES,
                    )  # fmt: skip
    if waits:
        tl.debug_barrier()
        done = tl.where(item + chunks < used, item // chunks + 1, 0)
        tl.atomic_xchg(turns, done, sem="release")
