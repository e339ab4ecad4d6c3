"""The two Triton kernels of :mod:`d2o.kernels.decode`. Logits are kept in base 2: ``exp2`` is the hardware's own."""

from __future__ import annotations

import math

import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))
# Probabilities relative to a peak are at most 1: this much larger, they use float16's whole range.
_STASH_SCALE = tl.constexpr(32768.0)
_COUNTS = ["layer", "batch", "items", "table_rows", "table_columns", "room"]
# Where these begin is the caller's business: a kernel for each alignment would only be compiled in mid-service.
_CALLERS = ["q", "k_new", "v_new", "positions", "rows"]
_STRIDES = ["q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head", "window"]


@triton.jit  # type: ignore[untyped-decorator]
def _item(
    item: tl.tensor,
    sequence: tl.tensor,
    lengths: tl.tensor,
    share: tl.tensor,
    first: tl.tensor,
    base: tl.tensor,
    layer: tl.tensor,
    batch: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The item's slots [begin, end), its sequence's length and where the sequence begins in the stash."""
    at = layer * batch + sequence
    length = tl.load(lengths + at)
    size = tl.load(share + at)
    begin = (item - tl.load(first + at + layer)) * size
    return begin, tl.minimum(begin + size, length), length, tl.load(base + at)


@triton.jit  # type: ignore[untyped-decorator]
def _append(
    k_new: tl.tensor,
    v_new: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    bias: tl.tensor,
    place: tl.tensor,
    current: tl.tensor,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    RESET: tl.constexpr,
) -> None:
    """Writes the new token to the slot with flat index ``place``, for all threads of the program to read."""
    dim = tl.arange(0, DIM_PAD)
    inside = dim < DIM
    key = tl.load(k_new + dim, mask=inside, other=0.0)
    value = tl.load(v_new + dim, mask=inside, other=0.0)
    tl.store(k + place * DIM + dim, key.to(k.dtype.element_ty), mask=inside)
    tl.store(v + place * DIM + dim, value.to(v.dtype.element_ty), mask=inside)
    tl.store(position + place, current)
    tl.store(bias + place, 0.0)
    if RESET:
        tl.store(score + place, 0.0)
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def _place(page: tl.tensor, head: tl.tensor, slot: tl.tensor, KV_HEADS: tl.constexpr, PAGE: tl.constexpr) -> tl.tensor:
    """Flat index of a slot in tensors viewed as [pages * kv_heads * page_size, ...]."""
    return (page.to(tl.int64) * KV_HEADS + head) * PAGE + slot % PAGE


@triton.jit(do_not_specialize=_COUNTS + _STRIDES, do_not_specialize_on_alignment=_CALLERS)  # type: ignore[untyped-decorator]
def attend_kernel(
    q: tl.tensor,
    k_new: tl.tensor,
    v_new: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    bias: tl.tensor,
    positions: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    table_rows: tl.tensor,
    table_columns: tl.tensor,
    lengths: tl.tensor,
    share: tl.tensor,
    first: tl.tensor,
    base: tl.tensor,
    owner: tl.tensor,
    layer: tl.tensor,
    batch: tl.tensor,
    items: tl.tensor,
    partial: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    stash: tl.tensor,
    stash_peak: tl.tensor,
    room: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    RESET: tl.constexpr,
    STORE_POLICY: tl.constexpr,
) -> None:
    """Program (KV head, item). Page ids are loaded a step ahead: no key's address waits for memory."""
    head, item = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(owner + layer * items + item)
    if sequence < 0:
        return
    begin, end, length, origin = _item(item, sequence, lengths, share, first, base, layer, batch)
    current = tl.load(positions + sequence)
    pages = table + (layer.to(tl.int64) * table_rows + tl.load(rows + sequence)) * table_columns
    if end == length:
        place = _place(tl.load(pages + (length - 1) // PAGE), head, length - 1, KV_HEADS, PAGE)
        new_key = k_new + sequence.to(tl.int64) * k_batch + head * k_head
        new_value = v_new + sequence.to(tl.int64) * v_batch + head * v_head
        _append(new_key, new_value, k, v, score, position, bias, place, current, DIM, DIM_PAD, RESET)
    row, dim, column = tl.arange(0, ROWS), tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    wanted = (row < GROUP)[:, None] & (dim < DIM)[None, :]
    queries = q + sequence.to(tl.int64) * q_batch + (head * GROUP + row)[:, None] * q_head
    query = tl.load(queries + dim[None, :], mask=wanted, other=0.0).to(k.dtype.element_ty)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    added = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM_PAD], tl.float32)
    page = tl.load(pages + (begin + column) // PAGE, mask=begin + column < end, other=0)
    for start in range(begin, end, BLOCK):
        live = start + column < end
        place = _place(page, head, start + column, KV_HEADS, PAGE)
        spot = place[:, None] * DIM + dim[None, :]
        inside = live[:, None] & (dim < DIM)[None, :]
        key = tl.load(k + spot, mask=inside, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            logits = (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / softcap))) * (softcap * _LOG2E)
        if BIAS:
            logits += (tl.load(bias + place, mask=live, other=0.0) * _LOG2E)[None, :]
        seen = live
        if WINDOW:
            seen = live & (tl.load(position + place, mask=live, other=0) > current - window)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        top = tl.maximum(most, tl.max(logits, 1))
        level = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(logits - level[:, None])
        shrink = tl.exp2(most - level)
        most = top
        added = added * shrink + tl.sum(weight, 1)
        value = tl.load(v + spot, mask=inside, other=0.0)
        result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
        if SCORE:
            tile = (head.to(tl.int64) * room + origin + start) // BLOCK * GROUP + row
            kept = (row < GROUP) & (origin + start < room)
            cells = stash + tile[:, None] * BLOCK + column[None, :]
            tl.store(cells, (weight * _STASH_SCALE).to(tl.float16), mask=kept[:, None], eviction_policy=STORE_POLICY)
            tl.store(stash_peak + tile, level, mask=kept)
        after = start + BLOCK + column
        page = tl.load(pages + after // PAGE, mask=after < end, other=0)
    index = (item * KV_HEADS + head) * GROUP + row
    tl.store(partial + index[:, None] * DIM + dim[None, :], result, mask=wanted)
    tl.store(peak + index, most, mask=row < GROUP)
    tl.store(total + index, added, mask=row < GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _normaliser(
    peak: tl.tensor,
    total: tl.tensor,
    head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest logit and inverse sum of exponentials [ROWS] over the items [begin, end) of a sequence."""
    row = tl.arange(0, ROWS)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    added = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, SPLITS):
        item = start + tl.arange(0, SPLITS)
        wanted = (item < end)[:, None] & (row < GROUP)[None, :]
        index = (item * KV_HEADS + head)[:, None] * GROUP + row[None, :]
        tops = tl.load(peak + index, mask=wanted, other=float("-inf"))
        sums = tl.load(total + index, mask=wanted, other=0.0)
        top = tl.maximum(most, tl.max(tops, 0))
        level = tl.where(top == float("-inf"), 0.0, top)
        added = added * tl.exp2(most - level) + tl.sum(sums * tl.exp2(tops - level[None, :]), 0)
        most = top
    live = row < GROUP
    return tl.where(live, most, 0.0), tl.where(live, 1.0 / tl.where(live, added, 1.0), 0.0)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=["rows"])  # type: ignore[untyped-decorator]
def combine_kernel(
    out: tl.tensor,
    score: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    table_rows: tl.tensor,
    table_columns: tl.tensor,
    lengths: tl.tensor,
    share: tl.tensor,
    first: tl.tensor,
    base: tl.tensor,
    owner: tl.tensor,
    layer: tl.tensor,
    batch: tl.tensor,
    items: tl.tensor,
    partial: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    stash: tl.tensor,
    stash_peak: tl.tensor,
    room: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    LOAD_POLICY: tl.constexpr,
) -> None:
    """Program (KV head, item): its part of the sequence's output columns, then the scores of its own slots."""
    head, item = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(owner + layer * items + item)
    if sequence < 0:
        return
    begin, end, _, origin = _item(item, sequence, lengths, share, first, base, layer, batch)
    low = tl.load(first + layer * (batch + 1) + sequence)
    high = tl.load(first + layer * (batch + 1) + sequence + 1)
    row = tl.arange(0, ROWS)
    most, inverse = _normaliser(peak, total, head, low, high, KV_HEADS, GROUP, ROWS, SPLITS)
    for part in range(item - low, (DIM + WIDTH - 1) // WIDTH, high - low):
        dim = part * WIDTH + tl.arange(0, WIDTH)
        wanted = (row < GROUP)[:, None] & (dim < DIM)[None, :]
        result = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(low, high, SPLITS):
            split = start + tl.arange(0, SPLITS)
            held = (split < high)[:, None] & (row < GROUP)[None, :]
            index = (split * KV_HEADS + head)[:, None] * GROUP + row[None, :]
            factor = tl.exp2(tl.load(peak + index, mask=held, other=float("-inf")) - most[None, :])
            piece = tl.load(
                partial + index[:, :, None] * DIM + dim[None, None, :],
                mask=held[:, :, None] & (dim < DIM)[None, None, :],
                other=0.0,
            )
            result += tl.sum(piece * factor[:, :, None], 0)
        target = (sequence.to(tl.int64) * KV_HEADS + head) * GROUP + row
        result = (result * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(out + target[:, None] * DIM + dim[None, :], result, mask=wanted)
    if SCORE:
        pages = table + (layer.to(tl.int64) * table_rows + tl.load(rows + sequence)) * table_columns
        column = tl.arange(0, BLOCK)
        for start in range(begin, end, TILES * BLOCK):
            corner = start + tl.arange(0, TILES) * BLOCK
            tile = (head.to(tl.int64) * room + origin + corner) // BLOCK
            cell = tile[:, None] * GROUP + row[None, :]
            kept = ((corner < end) & (origin + corner < room))[:, None] & (row < GROUP)[None, :]
            level = tl.load(stash_peak + cell, mask=kept, other=float("-inf"))
            factor = tl.exp2(level - most[None, :]) * (inverse / _STASH_SCALE)[None, :]
            slot = corner[:, None] + column[None, :]
            page = tl.load(pages + slot // PAGE, mask=slot < end, other=0)
            place = _place(page, head, slot, KV_HEADS, PAGE)
            cells = stash + cell[:, :, None] * BLOCK + column[None, None, :]
            weight = tl.load(cells, mask=kept[:, :, None], other=0.0, eviction_policy=LOAD_POLICY).to(tl.float32)
            received = tl.sum(weight * factor[:, :, None], 1)
            before = tl.load(score + place, mask=slot < end, other=0.0)
            tl.store(score + place, before + received, mask=slot < end)
