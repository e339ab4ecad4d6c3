"""The kernel of :mod:`d2o.kernels.decode`. Logits are kept in base 2: ``exp2`` is the hardware's own.

Slots lie on the first axis of every product (keys times queries, values transposed times weights): a group's few query
heads then pad the short axis of the tensor cores' tiles to eight, not to sixteen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.decode_finish import arrive, combine
from d2o.kernels.decode_plan import SHARE_SLOTS
from d2o.kernels.paged import whole_rows
from d2o.kernels.pending import LOG2E, capped, given, leave, recall

# Items begin at multiples of this: the compiler cannot see it in what it loads.
_UNIT = tl.constexpr(SHARE_SLOTS)
_COUNTS = ["layer", "batch", "items", "table_rows", "table_columns"]
# Where these begin is the caller's business: a kernel for each alignment would only be compiled in mid-service.
_CALLERS = ["q", "k_new", "v_new", "positions", "rows"]
_STRIDES = ["q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head", "window"]


@triton.jit  # type: ignore[untyped-decorator]
def _append(
    key: tl.tensor,
    value: tl.tensor,
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
    """Writes the new token to the slot with flat index ``place``; other threads must not read it before a barrier."""
    dim = tl.arange(0, DIM_PAD)
    inside = dim < DIM
    tl.store(k + place * DIM + dim, key.to(k.dtype.element_ty), mask=inside)
    tl.store(v + place * DIM + dim, value.to(v.dtype.element_ty), mask=inside)
    tl.store(position + place, current)
    tl.store(bias + place, 0.0)
    if RESET:
        tl.store(score + place, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    source: tl.tensor,
    described: tl.tensor,
    place: tl.tensor,
    live: tl.tensor,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Keys or values [BLOCK, DIM_PAD] of the slots from flat index ``place``; zero where a slot is not live."""
    dim, column = tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    if WHOLE and DESCRIBED:
        return described.load([place, 0])
    spot = place.to(tl.int64) * DIM + column[:, None] * DIM + dim[None, :]
    if WHOLE:
        return whole_rows(source + spot, DIM, DIM_PAD)
    return tl.load(source + spot, mask=live[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _step(
    query: tl.tensor,
    late_query: tl.tensor,
    late_level: tl.tensor,
    late_end: tl.tensor,
    most: tl.tensor,
    added: tl.tensor,
    result: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    described_k: tl.tensor,
    described_v: tl.tensor,
    score: tl.tensor,
    bias: tl.tensor,
    position: tl.tensor,
    place: tl.tensor,
    slot: tl.tensor,
    length: tl.tensor,
    oldest: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LATE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over the BLOCK slots ``slot`` from flat index ``place``: new peak, sums [BLOCK, ROWS] and output.

    With LATE their scores receive what the pending queries give, each to the slots before its ``late_end``.
    """
    column = tl.arange(0, BLOCK)
    live = slot < length
    key = _tile(k, described_k, place, live, DIM, DIM_PAD, BLOCK, DESCRIBED, WHOLE)
    value = _tile(v, described_v, place, live, DIM, DIM_PAD, BLOCK, DESCRIBED, WHOLE)
    lift = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        lift = tl.load(bias + place + column) if WHOLE else tl.load(bias + place + column, mask=live, other=0.0)
        lift *= LOG2E
    if LATE:
        before = tl.load(score + place + column) if WHOLE else tl.load(score + place + column, mask=live, other=0.0)
        gained = given(key, late_query, late_level, late_end, lift, slot, scale, softcap, SOFTCAP)
        tl.store(score + place + column, before + gained, mask=live)
    logits = tl.dot(key, query, input_precision="ieee") * scale
    if SOFTCAP:
        logits = capped(logits, softcap)
    if BIAS:
        logits += lift[:, None]
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
    return top, added, result


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    query: tl.tensor,
    late_query: tl.tensor,
    late_level: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    described_k: tl.tensor,
    described_v: tl.tensor,
    score: tl.tensor,
    bias: tl.tensor,
    position: tl.tensor,
    pages: tl.tensor,
    page: tl.tensor,
    head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    length: tl.tensor,
    count: tl.tensor,
    oldest: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LATE_ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LATE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Peak, sums [BLOCK, ROWS] and output of the slots [begin, end): whole tiles, then the one with the newest slot.

    A tile lies in one page, whose id is loaded a step ahead: no key's address waits for memory. ``page`` is the first.
    """
    column = tl.arange(0, BLOCK)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    added = tl.zeros([BLOCK, ROWS], tl.float32)
    result = tl.zeros([DIM_PAD, ROWS], tl.float32)
    # A query of a step ago has seen all slots but the newest, one of two steps ago all but two.
    late_end = length - count + tl.arange(0, LATE_ROWS) // LANES
    whole = tl.where(end == length, (length - 1) // BLOCK * BLOCK, end)
    for start in range(begin, whole, BLOCK):
        place = (page * KV_HEADS + head) * PAGE + start % PAGE
        most, added, result = _step(
            query, late_query, late_level, late_end, most, added, result, k, v, described_k, described_v,
            score, bias, position, place, start + column, length, oldest, scale, softcap,
            DIM, DIM_PAD, BLOCK, DESCRIBED, WINDOW, SOFTCAP, BIAS, LATE, True,
        )  # fmt: skip
        page = tl.load(pages + tl.minimum(start + BLOCK, length - 1) // PAGE)
    if end == length:
        tl.debug_barrier()
        place = (page * KV_HEADS + head) * PAGE + whole % PAGE
        most, added, result = _step(
            query, late_query, late_level, late_end, most, added, result, k, v, described_k, described_v,
            score, bias, position, place, whole + column, length, oldest, scale, softcap,
            DIM, DIM_PAD, BLOCK, DESCRIBED, WINDOW, SOFTCAP, BIAS, LATE, False,
        )  # fmt: skip
    return most, added, result


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
    layer: tl.tensor,
    batch: tl.tensor,
    items: tl.tensor,
    partial: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    arrivals: tl.tensor,
    late_query: tl.tensor,
    late_level: tl.tensor,
    late_count: tl.tensor,
    clock: tl.tensor,
    late_rule: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    LATE_ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    RESET: tl.constexpr,
    SCORE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Program (KV head, item): stores the new token, attends, then what its sequence still needs.

    First of all it asks for all that it needs to know, and only for what it knows by then where to find: programs start
    together, and while they wait for one answer after another nobody reads keys.
    """
    head, item = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(owner + layer * items + item)
    if sequence < 0:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    at, whole = layer * batch + sequence, sequence.to(tl.int64)
    spot = layer.to(tl.int64) * table_rows + tl.load(rows + sequence)
    length, current = tl.load(lengths + at), tl.load(positions + sequence)
    size = tl.multiple_of(tl.load(share + at), _UNIT)
    low, high = tl.load(first + at + layer), tl.load(first + at + layer + 1)
    wanted = (row < GROUP)[None, :] & (dim < DIM)[:, None]
    queries = q + whole * q_batch + (head * GROUP + row)[None, :] * q_head
    query = tl.load(queries + dim[:, None], mask=wanted, other=0.0).to(k.dtype.element_ty)
    key = tl.load(k_new + whole * k_batch + head * k_head + dim, mask=dim < DIM, other=0.0)
    value = tl.load(v_new + whole * v_batch + head * v_head + dim, mask=dim < DIM, other=0.0)
    begin = tl.multiple_of((item - low) * size, _UNIT)
    end = tl.minimum(begin + size, length)
    pages = table + spot * table_columns
    page, newest = tl.load(pages + begin // PAGE), tl.load(pages + (length - 1) // PAGE)
    if SCORE:
        counter = late_count + spot * KV_HEADS + head
        count, turn = tl.load(counter), tl.load(clock) % DEPTH == DEPTH - 1
        adds = (count == DEPTH) | (turn & (count > 0))
        nth = tl.where(adds, 0, count)
    else:
        count = 0
        adds: tl.constexpr = False  # type: ignore[no-redef]
    if end == length:
        place = (newest.to(tl.int64) * KV_HEADS + head) * PAGE + (length - 1) % PAGE
        _append(key, value, k, v, score, position, bias, place, current, DIM, DIM_PAD, RESET)
    oldest = current - window + 1
    if adds:
        earlier, level = recall(
            late_query, late_level, spot, count, head, KV_HEADS, GROUP, DIM, DIM_PAD, LANES, DEPTH, LATE_ROWS
        )
        most, added, result = _attend(
            query, earlier, level, k, v, described_k, described_v, score, bias, position, pages, page,
            head, begin, end, length, count, oldest, scale, softcap,
            KV_HEADS, PAGE, DIM, DIM_PAD, BLOCK, DESCRIBED, ROWS, LANES, LATE_ROWS, WINDOW, SOFTCAP, BIAS, True,
        )  # fmt: skip
    else:
        most, added, result = _attend(
            query, query, query, k, v, described_k, described_v, score, bias, position, pages, page,
            head, begin, end, length, count, oldest, scale, softcap,
            KV_HEADS, PAGE, DIM, DIM_PAD, BLOCK, DESCRIBED, ROWS, LANES, LATE_ROWS, WINDOW, SOFTCAP, BIAS, False,
        )  # fmt: skip
    sums = tl.sum(added, 0)
    whole = whole * KV_HEADS + head
    if high - low == 1:
        sums = tl.where(row < GROUP, sums, 1.0)
        scaled = (result / sums[None, :]).to(out.dtype.element_ty)
        tl.store(out + (whole * GROUP + row)[None, :] * DIM + dim[:, None], scaled, mask=wanted)
        if SCORE:
            leave(
                late_query, late_level, counter, late_rule, query, most + tl.log2(sums), spot, nth, head,
                layer, scale, softcap, KV_HEADS, GROUP, DIM, DIM_PAD, ROWS, ROWS, DEPTH,
            )  # fmt: skip
    else:
        index = (item * KV_HEADS + head) * GROUP + row
        tl.store(peak + index, most, mask=row < GROUP)
        tl.store(total + index, sums, mask=row < GROUP)
        tl.store(partial + index[None, :] * DIM + dim[:, None], result, mask=wanted)
        tl.debug_barrier()
        if arrive(arrivals + whole, high - low):
            level = combine(
                out, partial, peak, total, head, sequence, low, high, KV_HEADS, GROUP, DIM, DIM_PAD, LANES, SPLITS
            )
            if SCORE:
                leave(
                    late_query, late_level, counter, late_rule, query, level, spot, nth, head,
                    layer, scale, softcap, KV_HEADS, GROUP, DIM, DIM_PAD, ROWS, LANES, DEPTH,
                )  # fmt: skip
