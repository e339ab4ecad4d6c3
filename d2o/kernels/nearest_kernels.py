"""The Triton kernels of :mod:`d2o.kernels.nearest`. A program's ``owner`` is its head of its pair."""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.pairs import is_target, slot_row

_SMALLEST_NORM = tl.constexpr(1e-12)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit  # type: ignore[untyped-decorator]
def _kept_slot(
    keys: tl.tensor,
    kept: tl.tensor,
    fallback: tl.tensor,
    nth: tl.tensor,
    keep: tl.tensor,
    INTO_SINKS: tl.constexpr,
) -> tl.tensor:
    """The slot of the ``nth`` survivor of a head, or of its fallback where that is padding or no target."""
    listed = nth < keep
    slot = tl.load(kept + nth, mask=listed, other=0)
    target = listed & is_target(tl.load(keys + slot, mask=listed, other=0), 0, INTO_SINKS)
    return tl.where(target, slot, tl.maximum(fallback, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _cosine(
    k: tl.tensor,
    row: tl.tensor,
    other: tl.tensor,
    inside: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """The float32 cosine of keys ``row`` and ``other``, 16 dimensions at a time to spare registers."""
    product = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    other_square = tl.zeros((ROWS,), tl.float32)
    for first in tl.static_range(0, DIM, 16):
        d = first + tl.arange(0, 16)
        mask = inside[:, None] & (d < DIM)[None, :]
        a = tl.load(k + row[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(k + other[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
        product += tl.sum(a * b, 1)
        square += tl.sum(a * a, 1)
        other_square += tl.sum(b * b, 1)
    return product / tl.maximum(tl.sqrt(square) * tl.sqrt(other_square), _SMALLEST_NORM)


@triton.jit  # type: ignore[untyped-decorator]
def _row_maximum(cosine: tl.tensor, ROWS: tl.constexpr, SLOTS: tl.constexpr) -> tl.tensor:
    """Each row's maximum, whose lowest bits name its column: column bits 1 and 2, then 3 and up, then 0.

    The names follow the tensor cores' layout, where bits 1 and 2 tell four threads apart: within a thread a name is a
    constant, so that an element costs one logical operation, (bits & -SLOTS) | name, and one comparison.
    """
    thread = tl.arange(0, 4)[None, :] * (SLOTS // 4)
    name = (tl.arange(0, SLOTS // 8)[:, None] * 2 + tl.arange(0, 2)[None, :])[None, :, None, :]
    bits = tl.reshape(cosine.to(tl.int32, bitcast=True), (ROWS, SLOTS // 8, 4, 2))
    if _INTERPRETED:
        named = (bits & -SLOTS) | name
    else:
        named = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [bits, tl.zeros_like(bits) - SLOTS, name],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    top = tl.max(tl.max(named.to(tl.float32, bitcast=True), 3), 1)
    return tl.max((top.to(tl.int32, bitcast=True) | thread).to(tl.float32, bitcast=True), 1)


@triton.jit(do_not_specialize=["pages", "width", "most_kept", "padded"])  # type: ignore[untyped-decorator]
def stage_kernel(
    staged: tl.tensor,
    k: tl.tensor,
    tables: tl.tensor,
    keys: tl.tensor,
    kept: tl.tensor,
    fallback: tl.tensor,
    keep: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    most_kept: tl.tensor,
    padded: tl.tensor,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTO_SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = padded // BLOCK
    owner = (tl.program_id(0) // blocks).to(tl.int64)
    pair = owner // HEADS
    nth = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    spare = tl.load(fallback + owner)
    slot = _kept_slot(keys + owner * width, kept + owner * most_kept, spare, nth, tl.load(keep + pair), INTO_SINKS)
    row = slot_row(tables + pair * pages, slot, slot >= 0, owner % HEADS, HEADS, PAGE)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(k + row[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0).to(tl.float32)
    unit = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), _SMALLEST_NORM)[:, None]
    out = staged + (owner * padded + nth)[:, None] * BLOCK_D + d[None, :]
    tl.store(out, unit.to(staged.dtype.element_ty))


@triton.jit(do_not_specialize=["pages", "width", "most_evicted", "most_kept", "padded", "blocks"])  # type: ignore[untyped-decorator]
def staged_kernel(
    nearest: tl.tensor,
    similarity: tl.tensor,
    k: tl.tensor,
    tables: tl.tensor,
    keys: tl.tensor,
    evicted: tl.tensor,
    used: tl.tensor,
    keep: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    most_evicted: tl.tensor,
    staged: tl.tensor,
    kept: tl.tensor,
    fallback: tl.tensor,
    most_kept: tl.tensor,
    padded: tl.tensor,
    blocks: tl.tensor,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTO_SINKS: tl.constexpr,
    EVICTED: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    owner = (tl.program_id(0) // blocks).to(tl.int64)
    pair = owner // HEADS
    left = tl.load(keep + pair)
    gone = tl.load(used + pair) - left
    first = tl.program_id(0) % blocks * EVICTED
    if first >= gone:
        return
    nth = first + tl.arange(0, EVICTED)
    inside = nth < gone
    table = tables + pair * pages
    slot = tl.load(evicted + owner * most_evicted + nth, mask=inside, other=0)
    row = slot_row(table, slot, inside, owner % HEADS, HEADS, PAGE)
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < DIM)[None, :]
    wanted = tl.load(k + row[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    tile = staged + owner * padded * BLOCK_D + tl.arange(0, SLOTS)[:, None] * BLOCK_D + d[None, :]
    best = tl.full((EVICTED,), -float("inf"), tl.float32)
    at = tl.zeros((EVICTED,), tl.int32)
    for start in range(0, left, SLOTS):
        units = tl.load(tile + start * BLOCK_D)
        cosine = tl.dot(wanted, tl.trans(units), input_precision="ieee")
        top = _row_maximum(cosine, EVICTED, SLOTS)
        at = tl.where(top > best, start, at)
        best = tl.maximum(top, best)
    low = best.to(tl.int32, bitcast=True) & (SLOTS - 1)
    name = low % (SLOTS // 4)
    found = at + name // 2 * 8 + low // (SLOTS // 4) * 2 + name % 2
    spare = tl.load(fallback + owner)
    target = _kept_slot(keys + owner * width, kept + owner * most_kept, spare, found, left, INTO_SINKS)
    other = slot_row(table, target, inside, owner % HEADS, HEADS, PAGE)
    out = owner * most_evicted + nth
    tl.store(nearest + out, target, mask=inside)
    tl.store(similarity + out, _cosine(k, row, other, inside, DIM, EVICTED), mask=inside)


@triton.jit(do_not_specialize=["pages", "width", "most_evicted"])  # type: ignore[untyped-decorator]
def direct_kernel(
    nearest: tl.tensor,
    similarity: tl.tensor,
    k: tl.tensor,
    tables: tl.tensor,
    keys: tl.tensor,
    evicted: tl.tensor,
    used: tl.tensor,
    keep: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    most_evicted: tl.tensor,
    cut: tl.tensor,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTO_SINKS: tl.constexpr,
    EVICTED: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    owner = tl.program_id(0).to(tl.int64)
    pair = owner // HEADS
    count = tl.load(used + pair)
    nth = tl.arange(0, EVICTED)
    inside = nth < count - tl.load(keep + pair)
    table = tables + pair * pages
    gone = tl.load(evicted + owner * most_evicted + nth, mask=inside, other=0)
    row = slot_row(table, gone, inside, owner % HEADS, HEADS, PAGE)
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < DIM)[None, :]
    wanted = tl.trans(tl.load(k + row[:, None] * DIM + d[None, :], mask=mask, other=0.0))
    lowest = tl.load(cut + owner)
    lane = tl.arange(0, SLOTS)
    best = tl.full((SLOTS, EVICTED), -float("inf"), tl.float32)
    at = tl.zeros((SLOTS, EVICTED), tl.int32)
    # Rows are looked up one tile ahead: an address that hangs on a load of the same step is not pipelined.
    place = slot_row(table, lane, lane < count, owner % HEADS, HEADS, PAGE)
    for start in range(0, count, SLOTS):
        slot = start + lane
        held = slot < count
        tile = tl.load(k + place[:, None] * DIM + d[None, :], mask=held[:, None] & (d < DIM)[None, :], other=0.0)
        target = is_target(tl.load(keys + owner * width + slot, mask=held, other=-1), lowest, INTO_SINKS)
        place = slot_row(table, slot + SLOTS, slot + SLOTS < count, owner % HEADS, HEADS, PAGE)
        wide = tile.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), _SMALLEST_NORM)
        cosine = tl.dot(tile, wanted, input_precision="ieee") * (1.0 / length)[:, None]
        cosine = tl.where(target[:, None], cosine, -float("inf"))
        at = tl.where(cosine > best, start, at)
        best = tl.maximum(cosine, best)
    top = tl.max(best, 0)
    found = tl.min(tl.where(best == top[None, :], at + lane[:, None], count - 1), 0)
    other = slot_row(table, found, inside, owner % HEADS, HEADS, PAGE)
    out = owner * most_evicted + nth
    tl.store(nearest + out, found, mask=inside)
    tl.store(similarity + out, _cosine(k, row, other, inside, DIM, EVICTED), mask=inside)
