"""Adds a decode step's stashed probabilities to the slots' scores, once a sequence's normaliser is known.

Nothing here masks single slots in memory: tiles lie in one page, and a tile is read and written whole, so that every
thread moves several neighbouring slots at once. What a tile holds beyond the sequence's end is written back as it was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.decode_plan import SHARE_SLOTS

# Probabilities relative to a peak are at most 1: this much larger, they use float16's whole range.
STASH_SCALE = tl.constexpr(32768.0)
# Items and chunks of the stash begin at multiples of this: the compiler cannot see it in what it loads.
UNIT = tl.constexpr(SHARE_SLOTS)
_LOOK = tl.constexpr(64)


@triton.jit  # type: ignore[untyped-decorator]
def normaliser(
    peak: tl.tensor,
    total: tl.tensor,
    head: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest logit and inverse sum of exponentials [LANES] over the items [low, high) of a sequence."""
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
    live = row < GROUP
    return tl.where(live, most, 0.0), tl.where(live, 1.0 / tl.where(live, added, 1.0), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def fetch(
    score: tl.tensor,
    pages: tl.tensor,
    stash: tl.tensor,
    stash_peak: tl.tensor,
    head: tl.tensor,
    corner: tl.tensor,
    live: tl.tensor,
    shift: tl.tensor,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Loads the ``live`` [TILES] tiles that begin at the slots ``corner``, and ``shift`` further on in the stash.

    Returns where their scores lie and what they are, [TILES, BLOCK]; the stash [TILES, BLOCK * LANES]; and what it is
    relative to [TILES, LANES]. Lanes beyond the group are garbage.
    """
    row, column, cell = tl.arange(0, LANES), tl.arange(0, BLOCK), tl.arange(0, BLOCK * LANES)
    page = tl.load(pages + corner // PAGE, mask=live, other=0)
    begin = shift + corner
    wanted = live[:, None]
    kept = stash + begin[:, None] * LANES + cell[None, :]
    # Its place is written again before long: it need never leave the cache.
    weight = tl.load(kept, mask=wanted, other=0.0, eviction_policy="evict_last")
    levels = stash_peak + (begin // BLOCK)[:, None] * LANES + row[None, :]
    level = tl.load(levels, mask=wanted, other=float("-inf"), cache_modifier=".cg")
    place = ((page.to(tl.int64) * KV_HEADS + head) * PAGE + corner % PAGE)[:, None] + column[None, :]
    return place, tl.load(score + place, mask=wanted, other=0.0), weight, level


@triton.jit  # type: ignore[untyped-decorator]
def add(
    score: tl.tensor,
    place: tl.tensor,
    before: tl.tensor,
    weight: tl.tensor,
    level: tl.tensor,
    most: tl.tensor,
    inverse: tl.tensor,
    corner: tl.tensor,
    live: tl.tensor,
    limit: tl.tensor,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Adds to what :func:`fetch` gave the probabilities of the slots below ``limit``, summed over the group."""
    real = tl.arange(0, LANES) < GROUP
    factor = tl.where(real[None, :], tl.exp2(level - most[None, :]) * (inverse / STASH_SCALE)[None, :], 0.0)
    relative = tl.reshape(weight, [TILES, BLOCK, LANES]).to(tl.float32)
    if GROUP < LANES:
        relative = tl.where(real[None, None, :], relative, 0.0)
    gained = tl.sum(relative * factor[:, None, :], 2)
    slot = corner[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(score + place, tl.where(slot < limit, before + gained, before), mask=live[:, None])
