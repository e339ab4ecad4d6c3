"""The Triton kernels of :mod:`d2o.kernels.fold`. A program's ``owner`` is its head of its pair."""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.pairs import slot_row

_SMALLEST_MASS = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["width", "stride", "nobody"])  # type: ignore[untyped-decorator]
def segments_kernel(
    target: tl.tensor,
    begin: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    nobody: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Where each survivor's members begin in a head's sorted targets, and behind the last where they all end."""
    head = tl.program_id(0).to(tl.int64)
    own = target + head * width
    lane = tl.arange(0, BLOCK)
    before = tl.full((), 0, tl.int32)
    passing = tl.full((), 0, tl.int32)
    for start in range(0, width, BLOCK):
        nth = start + lane
        here = tl.load(own + nth, mask=nth < width, other=nobody)
        previous = tl.load(own + nth - 1, mask=(nth > 0) & (nth < width), other=-1)
        merged = here < nobody
        starts = (merged & (here != previous)).to(tl.int32)
        rank = before + tl.cumsum(starts, 0) - 1
        tl.store(begin + head * stride + rank, nth, mask=starts > 0)
        before += tl.sum(starts, 0)
        passing += tl.sum(merged.to(tl.int32), 0)
    tl.store(begin + head * stride + before, passing)
    tl.store(count + head, before)


@triton.jit  # type: ignore[untyped-decorator]
def _mean_attention(
    score: tl.tensor,
    position: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    seen: tl.tensor,
) -> tl.tensor:
    """Summed and mean attention of slots (ALGORITHM 4b)."""
    total = tl.load(score + row, mask=inside, other=0.0)
    queries = tl.maximum(seen - tl.load(position + row, mask=inside, other=0), 1)
    return total, total / queries.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _pull(
    values: tl.tensor,
    keys: tl.tensor,
    whole: tl.tensor,
    gained: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    evicted: tl.tensor,
    similarity: tl.tensor,
    table: tl.tensor,
    source: tl.tensor,
    inside: tl.tensor,
    head: tl.tensor,
    seen: tl.tensor,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAPER: tl.constexpr,
    CONSERVE: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Adds the members ``source`` of the head's list to a survivor's sums: values, keys, weights and scores."""
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(evicted + source, mask=inside, other=0)
    row = slot_row(table, slot, inside, head, HEADS, PAGE)
    if CONSERVE:
        total, weight = _mean_attention(score, position, row, inside, seen)
        gained += total
        whole += weight
    else:
        weight = tl.load(similarity + source, mask=inside, other=0.0)
        if PAPER:
            weight = tl.where(inside, tl.exp(weight), 0.0)
            whole += weight
        else:
            whole += inside.to(tl.float32)
    mask = inside[:, None] & (d < DIM)[None, :]
    pulled = tl.load(v + row[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
    values += tl.sum(pulled * weight[:, None], 0)
    if KEYS:
        pulled = tl.load(k + row[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
        keys += tl.sum(pulled * weight[:, None], 0)
    return values, keys, whole, gained


@triton.jit  # type: ignore[untyped-decorator]
def _blend(
    values: tl.tensor,
    keys: tl.tensor,
    whole: tl.tensor,
    gained: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    seen: tl.tensor,
    merge_weight: tl.tensor,
    bias_limit: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAPER: tl.constexpr,
    CONSERVE: tl.constexpr,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """Makes the survivor at ``row`` the weighted mean of itself and its members' sums."""
    if CONSERVE:
        total, mean = _mean_attention(score, position, row, row >= 0, seen)
        own = tl.maximum(mean, _SMALLEST_MASS)
        tl.store(score + row, total + tl.sum(gained, 0))
    elif PAPER:
        own = merge_weight
    else:
        own = 1.0
    whole_weight = tl.sum(whole, 0) + own
    d = tl.arange(0, BLOCK_D)
    real = d < DIM
    old = tl.load(v + row * DIM + d, mask=real, other=0.0).to(tl.float32)
    tl.store(v + row * DIM + d, ((values + old * own) / whole_weight).to(v.dtype.element_ty), mask=real)
    if KEYS:
        old = tl.load(k + row * DIM + d, mask=real, other=0.0).to(tl.float32)
        tl.store(k + row * DIM + d, ((keys + old * own) / whole_weight).to(k.dtype.element_ty), mask=real)
    if BIAS:
        raised = tl.load(bias + row) - tl.log(own / whole_weight)
        tl.store(bias + row, tl.minimum(tl.maximum(raised, 0.0), bias_limit))


@triton.jit(do_not_specialize=["pages", "width", "segments", "merge_weight", "bias_limit"])  # type: ignore[untyped-decorator]
def fold_kernel(
    k: tl.tensor,
    v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    bias: tl.tensor,
    tables: tl.tensor,
    seen: tl.tensor,
    evicted: tl.tensor,
    similarity: tl.tensor,
    target: tl.tensor,
    order: tl.tensor,
    begin: tl.tensor,
    count: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    segments: tl.tensor,
    merge_weight: tl.tensor,
    bias_limit: tl.tensor,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAPER: tl.constexpr,
    CONSERVE: tl.constexpr,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """Program (owner, survivor): its members follow one another in the sorted targets."""
    owner = (tl.program_id(0) // segments).to(tl.int64)
    nth = tl.program_id(0) % segments
    if nth >= tl.load(count + owner):
        return
    pair, head, own = owner // HEADS, owner % HEADS, owner * width
    table, queries = tables + pair * pages, tl.load(seen + pair)
    low = tl.load(begin + owner * (segments + 1) + nth)
    high = tl.load(begin + owner * (segments + 1) + nth + 1)
    whole, gained = tl.zeros((MEMBERS,), tl.float32), tl.zeros((MEMBERS,), tl.float32)
    values, keys = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for start in range(low, high, MEMBERS):
        lane = start + tl.arange(0, MEMBERS)
        source = tl.load(order + own + lane, mask=lane < high, other=0)
        values, keys, whole, gained = _pull(
            values, keys, whole, gained, k, v, score, position, evicted + own, similarity + own, table, source,
            lane < high, head, queries, HEADS, PAGE, DIM, BLOCK_D, PAPER, CONSERVE, KEYS,
        )  # fmt: skip
    row = slot_row(table, tl.load(target + own + low), low >= 0, head, HEADS, PAGE)
    _blend(
        values, keys, whole, gained, k, v, score, position, bias, row, queries, merge_weight, bias_limit,
        DIM, BLOCK_D, PAPER, CONSERVE, KEYS, BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pages", "width", "merge_weight", "bias_limit"])  # type: ignore[untyped-decorator]
def fold_few_kernel(
    k: tl.tensor,
    v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    bias: tl.tensor,
    tables: tl.tensor,
    seen: tl.tensor,
    evicted: tl.tensor,
    similarity: tl.tensor,
    nearest: tl.tensor,
    passes: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    merge_weight: tl.tensor,
    bias_limit: tl.tensor,
    EVICTED: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAPER: tl.constexpr,
    CONSERVE: tl.constexpr,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """Program (owner, evicted token): the first that goes to a survivor folds all of those that go there."""
    owner = (tl.program_id(0) // width).to(tl.int64)
    nth = tl.program_id(0) % width
    pair, head, own = owner // HEADS, owner % HEADS, owner * width
    each = tl.arange(0, EVICTED)
    chosen = tl.load(passes + own + each, mask=each < width, other=0) > 0
    target = tl.load(nearest + own + nth)
    member = chosen & (tl.load(nearest + own + each, mask=chosen, other=-1) == target)
    if tl.min(tl.where(member, each, EVICTED), 0) != nth:
        return
    table, queries = tables + pair * pages, tl.load(seen + pair)
    rank, count = tl.cumsum(member.to(tl.int32), 0) - 1, tl.sum(member.to(tl.int32), 0)
    whole, gained = tl.zeros((MEMBERS,), tl.float32), tl.zeros((MEMBERS,), tl.float32)
    values, keys = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, count, MEMBERS):
        lane = start + tl.arange(0, MEMBERS)
        source = tl.sum(tl.where(member[None, :] & (rank[None, :] == lane[:, None]), each[None, :], 0), 1)
        values, keys, whole, gained = _pull(
            values, keys, whole, gained, k, v, score, position, evicted + own, similarity + own, table, source,
            lane < count, head, queries, HEADS, PAGE, DIM, BLOCK_D, PAPER, CONSERVE, KEYS,
        )  # fmt: skip
    row = slot_row(table, target, target >= 0, head, HEADS, PAGE)
    _blend(
        values, keys, whole, gained, k, v, score, position, bias, row, queries, merge_weight, bias_limit,
        DIM, BLOCK_D, PAPER, CONSERVE, KEYS, BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pages", "most_kept", "most_evicted", "blocks"])  # type: ignore[untyped-decorator]
def move_kernel(
    k: tl.tensor,
    v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    bias: tl.tensor,
    tables: tl.tensor,
    kept: tl.tensor,
    evicted: tl.tensor,
    used: tl.tensor,
    keep: tl.tensor,
    pages: tl.tensor,
    most_kept: tl.tensor,
    most_evicted: tl.tensor,
    blocks: tl.tensor,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOVES: tl.constexpr,
) -> None:
    owner = (tl.program_id(0) // blocks).to(tl.int64)
    pair = owner // HEADS
    left = tl.load(keep + pair)
    nth = tl.program_id(0) % blocks * MOVES + tl.arange(0, MOVES)
    listed = (nth < left) & (nth < tl.load(used + pair) - left)
    empty = tl.load(evicted + owner * most_evicted + nth, mask=listed, other=left)
    full = tl.load(kept + owner * most_kept + left - 1 - nth, mask=listed, other=0)
    moves = listed & (empty < left)
    table = tables + pair * pages
    source = slot_row(table, full, moves, owner % HEADS, HEADS, PAGE)
    goal = slot_row(table, empty, moves, owner % HEADS, HEADS, PAGE)
    d = tl.arange(0, BLOCK_D)
    mask = moves[:, None] & (d < DIM)[None, :]
    for_k = tl.load(k + source[:, None] * DIM + d[None, :], mask=mask)
    for_v = tl.load(v + source[:, None] * DIM + d[None, :], mask=mask)
    tl.store(k + goal[:, None] * DIM + d[None, :], for_k, mask=mask)
    tl.store(v + goal[:, None] * DIM + d[None, :], for_v, mask=mask)
    tl.store(score + goal, tl.load(score + source, mask=moves), mask=moves)
    tl.store(position + goal, tl.load(position + source, mask=moves), mask=moves)
    tl.store(bias + goal, tl.load(bias + source, mask=moves), mask=moves)
