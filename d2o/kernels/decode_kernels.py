"""The kernel of :mod:`d2o.kernels.decode`. Logits are kept in base 2: ``exp2`` is the hardware's own.

Slots lie on the first axis of every product (keys times queries, values transposed times weights): a group's few query
heads then pad the short axis of the tensor cores' tiles to eight, not to sixteen.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from d2o.kernels.decode_finish import finish, take_turn
from d2o.kernels.decode_scores import STASH_SCALE, UNIT

_LOG2E = tl.constexpr(math.log2(math.e))
_COUNTS = ["layer", "batch", "items", "table_rows", "table_columns", "chunks", "room"]
# Where these begin is the caller's business: a kernel for each alignment would only be compiled in mid-service.
_CALLERS = ["q", "k_new", "v_new", "positions", "rows"]
_STRIDES = ["q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head", "window"]


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
def _tile(
    source: tl.tensor,
    described: tl.tensor,
    place: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Keys or values [BLOCK, DIM_PAD] of the slots from flat index ``place``; zero where a slot is not live."""
    dim, column = tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    if WHOLE:
        return described.load([place, 0])
    spot = place.to(tl.int64) * DIM + column[:, None] * DIM + dim[None, :]
    return tl.load(source + spot, mask=live[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _keep(
    stash: tl.tensor,
    stash_peak: tl.tensor,
    slot: tl.tensor,
    weight: tl.tensor,
    top: tl.tensor,
    free: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Stashes a tile's weights [BLOCK, ROWS] from stash slot ``slot`` on, where there is room."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    kept = (row < GROUP) & free
    cells = stash + (slot + column)[:, None] * LANES + row[None, :]
    tl.store(cells, (weight * STASH_SCALE).to(tl.float16), mask=kept[None, :], eviction_policy="evict_last")
    tl.store(stash_peak + slot // BLOCK * LANES + row, top, mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _step(
    query: tl.tensor,
    most: tl.tensor,
    added: tl.tensor,
    result: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    described_k: tl.tensor,
    described_v: tl.tensor,
    bias: tl.tensor,
    position: tl.tensor,
    stash: tl.tensor,
    stash_peak: tl.tensor,
    place: tl.tensor,
    live: tl.tensor,
    oldest: tl.tensor,
    slot: tl.tensor,
    free: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STASH: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over the BLOCK slots from flat index ``place``: new peak, sums [BLOCK, ROWS] and output."""
    column = tl.arange(0, BLOCK)
    key = _tile(k, described_k, place, live, DIM, DIM_PAD, BLOCK, WHOLE)
    value = _tile(v, described_v, place, live, DIM, DIM_PAD, BLOCK, WHOLE)
    logits = tl.dot(key, query, input_precision="ieee") * scale
    if SOFTCAP:
        logits = (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / softcap))) * (softcap * _LOG2E)
    if BIAS:
        lift = tl.load(bias + place + column) if WHOLE else tl.load(bias + place + column, mask=live, other=0.0)
        logits += (lift * _LOG2E)[:, None]
    if WINDOW:
        seen = tl.load(position + place + column, mask=live, other=0) >= oldest
        logits = tl.where((seen & live)[:, None], logits, float("-inf"))
    elif not WHOLE:
        logits = tl.where(live[:, None], logits, float("-inf"))
    top = tl.maximum(most, tl.max(logits, 0))
    level = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(logits - level[None, :])
    shrink = tl.exp2(most - level)
    added = added * shrink[None, :] + weight
    result = tl.dot(tl.trans(value), weight.to(value.dtype), result * shrink[None, :], input_precision="ieee")
    if STASH:
        _keep(stash, stash_peak, slot, weight, top, free, GROUP, BLOCK, ROWS, LANES)
    return top, added, result


@triton.jit(do_not_specialize=_COUNTS + _STRIDES, do_not_specialize_on_alignment=_CALLERS)  # type: ignore[untyped-decorator]
def attend_kernel(
    out: tl.tensor,
    q: tl.tensor,
    k_new: tl.tensor,
    v_new: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    described_k: tl.tensor,
    described_v: tl.tensor,
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
    owner: tl.tensor,
    widest: tl.tensor,
    layer: tl.tensor,
    batch: tl.tensor,
    items: tl.tensor,
    partial: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    stash: tl.tensor,
    stash_peak: tl.tensor,
    turns: tl.tensor,
    arrivals: tl.tensor,
    chunks: tl.tensor,
    room: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    RESET: tl.constexpr,
    STASH: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """Program (KV head, item): whole tiles first, then the one with the new token, then what its sequence still needs.

    A tile lies in one page, whose id is loaded a step ahead: no key's address waits for memory.
    """
    head, item = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(owner + layer * items + item)
    if sequence < 0:
        return
    at = layer * batch + sequence
    length = tl.load(lengths + at)
    size = tl.multiple_of(tl.load(share + at), UNIT)
    begin = tl.multiple_of((item - tl.load(first + at + layer)) * size, UNIT)
    end = tl.minimum(begin + size, length)
    current = tl.load(positions + sequence)
    pages = table + (layer.to(tl.int64) * table_rows + tl.load(rows + sequence)) * table_columns
    page = tl.load(pages + begin // PAGE)
    row, dim, column = tl.arange(0, ROWS), tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    queries = q + sequence.to(tl.int64) * q_batch + (head * GROUP + row)[None, :] * q_head
    query = tl.load(queries + dim[:, None], mask=(row < GROUP)[None, :] & (dim < DIM)[:, None], other=0.0)
    query = query.to(k.dtype.element_ty)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    added = tl.zeros([BLOCK, ROWS], tl.float32)
    result = tl.zeros([DIM_PAD, ROWS], tl.float32)
    live = column >= 0
    chunk = (item % chunks) * KV_HEADS + head
    chunk_slots = tl.multiple_of(tl.minimum(tl.load(widest + layer), room), UNIT)
    shift = tl.multiple_of(chunk.to(tl.int64) * chunk_slots, UNIT) - begin
    full = begin + chunk_slots
    if STASH and TOGETHER:
        take_turn(turns + chunk, item, chunks)
    oldest = current - window + 1
    whole = tl.where(end == length, (length - 1) // BLOCK * BLOCK, end)
    for start in range(begin, whole, BLOCK):
        place = (page * KV_HEADS + head) * PAGE + start % PAGE
        most, added, result = _step(
            query, most, added, result, k, v, described_k, described_v, bias, position, stash, stash_peak,
            place, live, oldest, shift + start, start < full, scale, softcap,
            GROUP, DIM, DIM_PAD, BLOCK, ROWS, LANES, STASH, WINDOW, SOFTCAP, BIAS, True,
        )  # fmt: skip
        page = tl.load(pages + tl.minimum(start + BLOCK, length - 1) // PAGE)
    if end == length:
        place = (page * KV_HEADS + head) * PAGE + whole % PAGE
        new_key = k_new + sequence.to(tl.int64) * k_batch + head * k_head
        new_value = v_new + sequence.to(tl.int64) * v_batch + head * v_head
        newest = place.to(tl.int64) + (length - 1 - whole)
        _append(new_key, new_value, k, v, score, position, bias, newest, current, DIM, DIM_PAD, RESET)
        most, added, result = _step(
            query, most, added, result, k, v, described_k, described_v, bias, position, stash, stash_peak,
            place, whole + column < length, oldest, shift + whole, whole < full, scale, softcap,
            GROUP, DIM, DIM_PAD, BLOCK, ROWS, LANES, STASH, WINDOW, SOFTCAP, BIAS, False,
        )  # fmt: skip
    index = (item * KV_HEADS + head) * GROUP + row
    sums = tl.sum(added, 0)
    tl.store(peak + index, most, mask=row < GROUP)
    tl.store(total + index, sums, mask=row < GROUP)
    low, high = tl.load(first + at + layer), tl.load(first + at + layer + 1)
    wanted = (row < GROUP)[None, :] & (dim < DIM)[:, None]
    if high - low == 1:
        target = (sequence.to(tl.int64) * KV_HEADS + head) * GROUP + row
        final = result / tl.where(row < GROUP, sums, 1.0)[None, :]
        tl.store(out + target[None, :] * DIM + dim[:, None], final.to(out.dtype.element_ty), mask=wanted)
    else:
        tl.store(partial + index[None, :] * DIM + dim[:, None], result, mask=wanted)
    used = tl.load(first + layer * (batch + 1) + batch)
    finish(
        out, score, pages, partial, peak, total, stash, stash_peak, turns + chunk,
        arrivals + sequence * KV_HEADS + head, head, sequence, item, low, high, used, length, size, chunks, chunk_slots,
        KV_HEADS, GROUP, PAGE, DIM, DIM_PAD, BLOCK, LANES, STASH, TOGETHER, TILES, SPLITS,
    )  # fmt: skip
