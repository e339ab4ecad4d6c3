"""The Triton kernels of :mod:`d2o.kernels.select`. A ``choice`` is a head of a pair, or all heads that share one."""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.pairs import CLASS_SHIFT, SINK, slot_row

_RANK_SHIFT = tl.constexpr(29)
_AGE_MASK = tl.constexpr((1 << 29) - 1)
_QUOTA = tl.constexpr(1)
_RECENT = tl.constexpr(2)
_NOTHING = tl.constexpr((1 << 63) - 1)
_NO_SLOT = tl.constexpr((1 << 31) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _packed(kind: tl.tensor, bits: tl.tensor, place: tl.tensor) -> tl.tensor:
    age = _AGE_MASK - place.to(tl.int64)
    return (kind.to(tl.int64) << CLASS_SHIFT) | (bits.to(tl.int64) << _RANK_SHIFT) | age


@triton.jit  # type: ignore[untyped-decorator]
def _bits(rank: tl.tensor) -> tl.tensor:
    """31 bits that order like the float; what is not positive is 0."""
    return tl.where(rank > 0, rank, 0.0).to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _kth(
    keys: tl.tensor,
    used: tl.tensor,
    wanted: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The cut above which ``wanted`` of ``used`` keys lie, it included; 0 if fewer are not negative."""
    lane = tl.arange(0, BLOCK)
    cut = tl.full((), 0, tl.int64)
    above = tl.full((), -1, tl.int32)
    shift = tl.full((), 60, tl.int64)
    one = tl.full((), 1, tl.int64)
    while shift >= 0:
        step = one << shift
        count1 = tl.zeros((BLOCK,), tl.int32)
        count2 = tl.zeros((BLOCK,), tl.int32)
        count3 = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, used, BLOCK):
            key = tl.load(keys + start + lane, mask=start + lane < used, other=-1)
            count1 += (key >= cut + step).to(tl.int32)
            count2 += (key >= cut + 2 * step).to(tl.int32)
            count3 += (key >= cut + 3 * step).to(tl.int32)
        above1 = tl.sum(count1, 0)
        above2 = tl.sum(count2, 0)
        above3 = tl.sum(count3, 0)
        digit = (above1 >= wanted).to(tl.int64) + (above2 >= wanted).to(tl.int64) + (above3 >= wanted).to(tl.int64)
        above = tl.where(digit == 1, above1, tl.where(digit == 2, above2, tl.where(digit == 3, above3, above)))
        cut = cut + digit * step
        shift = tl.where(above == wanted, -2, shift - 2).to(tl.int64)
    return cut


@triton.jit  # type: ignore[untyped-decorator]
def _kth_held(key: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """As :func:`_kth`, of fewer than 65,536 keys that a program holds, -1 where there is none.

    By thirds: two counts fit one integer, and so one sum over the program's threads.
    """
    cut = tl.full((), 0, tl.int64)
    above = tl.full((), -1, tl.int32)
    width = tl.full((), 1, tl.int64) << 62
    while width > 1:
        third = (width + 2) // 3
        counts = (key >= cut + third).to(tl.int32) + ((key >= cut + 2 * third).to(tl.int32) << 16)
        both = tl.sum(counts, 0)
        above1, above2 = both & 0xFFFF, both >> 16
        digit = (above1 >= wanted).to(tl.int64) + (above2 >= wanted).to(tl.int64)
        above = tl.where(digit == 1, above1, tl.where(digit == 2, above2, above))
        cut = cut + digit * third
        width = tl.where(above == wanted, 1, third).to(tl.int64)
    return cut


@triton.jit(do_not_specialize=["width"])  # type: ignore[untyped-decorator]
def cut_kernel(
    keys: tl.tensor,
    cut: tl.tensor,
    used: tl.tensor,
    wanted: tl.tensor,
    width: tl.tensor,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    choice = tl.program_id(0)
    count = tl.load(wanted + choice // CHOICES)
    found = tl.full((), _NOTHING, tl.int64)
    if count > 0:
        found = _kth(keys + choice.to(tl.int64) * width, tl.load(used + choice // CHOICES), count, BLOCK)
    tl.store(cut + choice, found)


@triton.jit(do_not_specialize=["width", "pages", "blocks", "sinks"])  # type: ignore[untyped-decorator]
def keys_kernel(
    keys: tl.tensor,
    cut: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    pooled: tl.tensor,
    tables: tl.tensor,
    used: tl.tensor,
    seen: tl.tensor,
    recent_from: tl.tensor,
    width: tl.tensor,
    pages: tl.tensor,
    blocks: tl.tensor,
    sinks: tl.tensor,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    PAGE: tl.constexpr,
    SUM: tl.constexpr,
    BLEND: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    choice = tl.program_id(0) // blocks
    pair = choice // (HEADS // SHARED)
    first = choice % (HEADS // SHARED) * SHARED
    slot = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = slot < tl.load(used + pair)
    row = slot_row(tables + pair.to(tl.int64) * pages, slot, inside, first, HEADS, PAGE)
    place = tl.load(position + row, mask=inside, other=0)
    queries = tl.maximum(tl.load(seen + pair) - place, 1).to(tl.float32)
    window = pooled + (pair.to(tl.int64) * HEADS + first) * width + slot
    rank = tl.zeros((BLOCK,), tl.float32)
    near = tl.zeros((BLOCK,), tl.float32)
    for head in range(SHARED):
        by = tl.load(score + row + head * PAGE, mask=inside, other=0.0)
        if BLEND > 0 or not SUM:
            by = tl.div_rn(by, queries)
        if BLEND > 0 or STAGE > 0:
            pool_mean = tl.load(window + head * width, mask=inside, other=0.0)
            near += pool_mean
        if BLEND > 0:
            by += BLEND * (pool_mean - by)
            if SUM:
                by *= queries
        rank += by
    rank = tl.div_rn(rank, tl.full((), SHARED, tl.float32) + tl.zeros_like(rank))
    near = tl.div_rn(near, tl.full((), SHARED, tl.float32) + tl.zeros_like(rank))
    kind = tl.where(place < sinks, SINK, tl.where(place >= tl.load(recent_from + pair), _RECENT, 0))
    if STAGE > 0:
        eligible = inside & (kind == 0)
        quota_key = tl.where(eligible, _packed(kind, _bits(near), place), -1)
    if STAGE == 2:
        saved = eligible & (quota_key >= tl.load(cut + choice))
        kind = tl.where(saved, _QUOTA, kind)
        for head in range(SHARED):
            pool_mean = tl.load(window + head * width, mask=saved, other=0.0)
            old = tl.load(score + row + head * PAGE, mask=saved, other=0.0)
            tl.store(score + row + head * PAGE, tl.maximum(old, pool_mean * queries), mask=saved)
    bits = tl.where(kind == _RECENT, place, tl.where(kind == SINK, 0, _bits(rank)))
    key = tl.where(inside, _packed(kind, bits, place), -1)
    if STAGE == 1:
        key = quota_key
    tl.store(keys + choice.to(tl.int64) * width + slot, key, mask=slot < width)


# All but the block is decided when it runs: each size of it is a kernel of its own already.
@triton.jit(do_not_specialize=["width", "most_kept", "most_evicted", "choices", "into_sinks"])  # type: ignore[untyped-decorator]
def split_kernel(
    keys: tl.tensor,
    cut: tl.tensor,
    kept: tl.tensor,
    evicted: tl.tensor,
    fallback: tl.tensor,
    used: tl.tensor,
    keep: tl.tensor,
    width: tl.tensor,
    most_kept: tl.tensor,
    most_evicted: tl.tensor,
    choices: tl.tensor,
    into_sinks: tl.tensor,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program (choice). HELD: no choice has more than BLOCK slots."""
    choice = tl.program_id(0).to(tl.int64)
    pair = choice // choices
    count, wanted = tl.load(used + pair), tl.load(keep + pair)
    own = keys + choice * width
    lane = tl.arange(0, BLOCK)
    if HELD:
        held = tl.load(own + lane, mask=lane < count, other=-1)
        lowest = _kth_held(held, wanted)
    else:
        lowest = _kth(own, count, wanted, BLOCK)
    tl.store(cut + choice, lowest)
    before = tl.full((), 0, tl.int32)
    first = tl.full((), _NO_SLOT, tl.int32)
    for start in range(0, count, BLOCK):
        slot = start + lane
        key = tl.load(own + slot, mask=slot < count, other=-1)
        survives = key >= lowest
        ones = survives.to(tl.int32)
        rank = before + tl.cumsum(ones, 0) - ones
        goes = (slot < count) & (key < lowest) & (slot - rank < most_evicted)
        tl.store(kept + choice * most_kept + rank, slot, mask=survives & (rank < most_kept))
        tl.store(evicted + choice * most_evicted + (slot - rank), slot, mask=goes)
        before += tl.sum(ones, 0)
        target = survives & ((into_sinks > 0) | ((key >> CLASS_SHIFT) != SINK))
        first = tl.minimum(first, tl.min(tl.where(target, slot, _NO_SLOT), 0))
    tl.store(fallback + choice, tl.where(first == _NO_SLOT, -1, first))
