"""Column sums on Hopper: a tile's product is under way while the exponentials of the one before are taken.

Both take equally long (a product of head_dim 128 and an exponential a logit), so this nearly halves the time. Keys stay
in registers as the product's left side; tiles of queries pass through a ring in shared memory, filled ahead.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper


@gluon.constexpr_function  # type: ignore[untyped-decorator]
def _rows_layout(warps: int, width: int) -> Any:
    """Rows shared out in pieces of 16 bytes."""
    lanes = min(32, width // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit  # type: ignore[untyped-decorator]
def _sampled_before(position: gl.tensor, stride: gl.tensor, SAMPLE: gl.constexpr) -> gl.tensor:
    return position // (SAMPLE * stride) * SAMPLE + gl.minimum(position % (SAMPLE * stride), SAMPLE)


@gluon.jit  # type: ignore[untyped-decorator]
def _position(number: gl.tensor, stride: gl.tensor, SAMPLE: gl.constexpr) -> gl.tensor:
    return number // SAMPLE * (SAMPLE * stride) + number % SAMPLE


@gluon.jit  # type: ignore[untyped-decorator]
def _copy(
    tiles: gl.shared_memory_descriptor,
    i: gl.tensor,
    rows: gl.tensor,
    token: gl.tensor,
    first: gl.tensor,
    count: gl.tensor,
    D: gl.constexpr,
    wide: gl.constexpr,
) -> None:
    """Begins to fill the ring's i-th place with rows from ``first`` on; those at ``count`` or beyond are 0."""
    block: gl.constexpr = tiles.shape[1]
    width: gl.constexpr = tiles.shape[2]
    row = first + gl.arange(0, block, gl.SliceLayout(1, wide))
    column = gl.arange(0, width, gl.SliceLayout(0, wide))
    mask = ((row >= 0) & (row < count))[:, None] & (column < D)[None, :]
    pointers = rows + row.to(gl.int64)[:, None] * token + column[None, :]
    hopper.async_copy.async_copy_global_to_shared(tiles.index(i % tiles.shape[0]), pointers, mask=mask)
    hopper.async_copy.commit_group()


@gluon.jit  # type: ignore[untyped-decorator]
def _exp2(x: gl.tensor, POLY: gl.constexpr) -> gl.tensor:
    """2**x; POLY eighths of the columns by a minimax cubic instead of the special function unit."""
    p = gl.exp2(x)
    if POLY > 0:
        y = gl.maximum(x, -126.0)
        shifted = y + 12582912.0
        rest = y - (shifted - 12582912.0)
        power = 0.99992807 + rest * (0.69326099 + rest * (0.24261113 + rest * 0.05517167))
        bits = power.to(gl.int32, bitcast=True) + (shifted.to(gl.int32, bitcast=True) << 23)
        nth = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
        p = gl.where((nth // 8 % 8 < POLY)[None, :], bits.to(gl.float32, bitcast=True), p)
    return p


@gluon.jit  # type: ignore[untyped-decorator]
def _folded(p: gl.tensor) -> gl.tensor:
    """Sums over the columns that one thread holds: [keys, 4]."""
    pieces = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(pieces, 3), 1)


@gluon.jit  # type: ignore[untyped-decorator]
def _probabilities(logits: gl.tensor, row_lse: gl.tensor, factor: gl.tensor, POLY: gl.constexpr) -> gl.tensor:
    return _exp2(logits * factor - (row_lse * 1.4426950408889634)[None, :], POLY)


@gluon.jit  # type: ignore[untyped-decorator]
def _added(
    sums: gl.tensor,
    logits: gl.tensor,
    row_lse: gl.tensor,
    position: gl.tensor,
    factor: gl.tensor,
    POLY: gl.constexpr,
    ORDERED: gl.constexpr,
) -> gl.tensor:
    """Sums with one more tile. ORDERED: the product under way is issued as a whole before the first exponential.

    No position is negative, but the compiler does not know; it moves nothing across the branch.
    """
    if ORDERED:
        if position >= 0:
            sums += _folded(_probabilities(logits, row_lse, factor, POLY))
    else:
        sums += _folded(_probabilities(logits, row_lse, factor, POLY))
    return sums


@gluon.jit  # type: ignore[untyped-decorator]
def _begin(keys: gl.tensor, tiles: gl.shared_memory_descriptor, i: gl.tensor, zeros: gl.tensor) -> gl.tensor:
    """Begins the product of the keys and the ring's i-th tile."""
    tile = tiles.index(i % tiles.shape[0]).permute((1, 0))
    return hopper.warpgroup_mma(keys, tile, zeros, use_acc=False, is_async=True)


@gluon.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=list(range(4, 16)),  # all numbers
    do_not_specialize_on_alignment=["lse", "out"],
)
def pipelined_kernel(
    q: gl.tensor,
    k: gl.tensor,
    lse: gl.tensor,
    out: gl.tensor,
    q_head8: gl.tensor,
    q_token8: gl.tensor,
    k_head8: gl.tensor,
    k_token8: gl.tensor,
    lse_head: gl.tensor,
    out_row: gl.tensor,
    start: gl.tensor,
    end: gl.tensor,
    first: gl.tensor,
    stride: gl.tensor,
    extra: gl.tensor,
    factor: gl.tensor,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    SAMPLE: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
    POLY: gl.constexpr,
    ORDERED: gl.constexpr,
) -> None:
    """One program: BLOCK_K keys of one query head; tiles that need masks first, then the others."""
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, BLOCK_Q, 16])
    wide: gl.constexpr = _rows_layout(warps, BLOCK_D)
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_Q, BLOCK_D], q.dtype.element_ty)
    low_key = gl.program_id(0) * BLOCK_K
    head = gl.program_id(1)
    count = end - start
    q_token = q_token8.to(gl.int64) * 8

    key_row = low_key + gl.arange(0, BLOCK_K, gl.SliceLayout(1, wide))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, wide))
    key_at = (head // GROUP).to(gl.int64) * k_head8 * 8 + key_row.to(gl.int64)[:, None] * k_token8 * 8 + column[None, :]
    key_mask = (key_row < end)[:, None] & (column < D)[None, :]
    key_tile = gl.load(k + key_at, mask=key_mask, other=0.0)
    keys_shared = gl.allocate_shared_memory(q.dtype.element_ty, [BLOCK_K, BLOCK_D], shared, key_tile)
    keys = keys_shared.load(gl.DotOperandLayout(0, mma, 2))
    tiles = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES, BLOCK_Q, BLOCK_D], shared)

    begin = _sampled_before(gl.maximum(first, low_key), stride, SAMPLE) // BLOCK_Q * BLOCK_Q
    seen_end = _sampled_before(end, stride, SAMPLE)
    finish = gl.cdiv(seen_end, BLOCK_Q) * BLOCK_Q
    whole = gl.cdiv(_sampled_before(gl.maximum(first, low_key + BLOCK_K - 1), stride, SAMPLE), BLOCK_Q) * BLOCK_Q
    whole = gl.minimum(whole, finish)
    whole_end = gl.maximum(whole, seen_end // BLOCK_Q * BLOCK_Q)
    before = gl.maximum(whole - begin, 0) // BLOCK_Q
    partial = before + gl.maximum(finish - whole_end, 0) // BLOCK_Q
    masked = partial + EXTRA
    total = masked + (whole_end - whole) // BLOCK_Q

    q_rows = q + head.to(gl.int64) * q_head8 * 8
    lse_row = lse + head.to(gl.int64) * lse_head
    inner = gl.arange(0, BLOCK_Q, gl.SliceLayout(0, mma))
    key = low_key + gl.arange(0, BLOCK_K, gl.SliceLayout(1, mma))
    zeros = gl.zeros([BLOCK_K, BLOCK_Q], gl.float32, mma)
    sums = _folded(zeros)

    for i in gl.static_range(STAGES - 1):
        place = _place(i, start, begin, before, whole, whole_end, partial, extra, stride, SAMPLE, BLOCK_Q, EXTRA)
        _copy(tiles, i, q_rows, q_token, place, gl.where(i < total, count, 0), D, wide)
    for i in range(masked):
        hopper.async_copy.wait_group(STAGES - 2)
        hopper.fence_async_shared()
        ahead = i + STAGES - 1
        place = _place(ahead, start, begin, before, whole, whole_end, partial, extra, stride, SAMPLE, BLOCK_Q, EXTRA)
        _copy(tiles, ahead, q_rows, q_token, place, gl.where(ahead < total, count, 0), D, wide)
        place = _place(i, start, begin, before, whole, whole_end, partial, extra, stride, SAMPLE, BLOCK_Q, EXTRA)
        position = start + place + inner
        counts = (position >= first) & (position < end)
        row_lse = gl.load(lse_row + place + inner, mask=counts, other=0.0)
        logits = hopper.warpgroup_mma_wait(0, [_begin(keys, tiles, i, zeros)])
        weight = 1.0
        if EXTRA > 0:
            weight = gl.where(i >= partial, 1.0 / stride, 1.0)
        seen = counts[None, :] & (key[:, None] <= position[None, :])
        p = gl.where(seen, _probabilities(logits, row_lse, factor, 0), 0.0)
        sums += _folded(p) * weight

    if total > masked:
        token, row_lse = _next(
            keys, tiles, masked, masked, total, whole, count, start, stride, q_rows, q_token, lse_row, inner, zeros,
            D, SAMPLE, BLOCK_Q, STAGES, wide,
        )  # fmt: skip
        logits = hopper.warpgroup_mma_wait(0, [token])
        rest = total - masked - 1
        for pair in range(rest // 2):
            i = masked + 1 + 2 * pair
            token, odd_lse = _next(
                keys, tiles, i, masked, total, whole, count, start, stride, q_rows, q_token, lse_row, inner, zeros,
                D, SAMPLE, BLOCK_Q, STAGES, wide,
            )  # fmt: skip
            sums = _added(sums, logits, row_lse, _position(i, stride, SAMPLE), factor, POLY, ORDERED)
            odd_logits = hopper.warpgroup_mma_wait(0, [token])
            token, row_lse = _next(
                keys, tiles, i + 1, masked, total, whole, count, start, stride, q_rows, q_token, lse_row, inner, zeros,
                D, SAMPLE, BLOCK_Q, STAGES, wide,
            )  # fmt: skip
            sums = _added(sums, odd_logits, odd_lse, _position(i + 1, stride, SAMPLE), factor, POLY, ORDERED)
            logits = hopper.warpgroup_mma_wait(0, [token])
        if rest % 2 == 1:
            token, odd_lse = _next(
                keys, tiles, total - 1, masked, total, whole, count, start, stride, q_rows, q_token, lse_row, inner,
                zeros, D, SAMPLE, BLOCK_Q, STAGES, wide,
            )  # fmt: skip
            sums += _folded(_probabilities(logits, row_lse, factor, POLY))
            logits = hopper.warpgroup_mma_wait(0, [token])
            row_lse = odd_lse
        sums += _folded(_probabilities(logits, row_lse, factor, POLY))
    hopper.async_copy.wait_group(0)
    added = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, mma)) * stride
    at = out + head.to(gl.int64) * out_row + key
    gl.store(at, gl.load(at, mask=key < end, other=0.0) + added, mask=key < end)


@gluon.jit  # type: ignore[untyped-decorator]
def _place(
    i: gl.tensor,
    start: gl.tensor,
    begin: gl.tensor,
    before: gl.tensor,
    whole: gl.tensor,
    whole_end: gl.tensor,
    partial: gl.tensor,
    extra: gl.tensor,
    stride: gl.tensor,
    SAMPLE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    EXTRA: gl.constexpr,
) -> gl.tensor:
    """Where in the chunk the i-th tile begins: those on the diagonal, cut at the end, extra, then the whole ones."""
    number = gl.where(i < before, begin + i * BLOCK_Q, whole_end + (i - before) * BLOCK_Q)
    number = gl.where(i < partial + EXTRA, number, whole + (i - partial - EXTRA) * BLOCK_Q)
    position = _position(number, stride, SAMPLE)
    if EXTRA > 0:
        is_extra = (i >= partial) & (i < partial + EXTRA)
        position = gl.where(is_extra, extra + (i - partial) * BLOCK_Q, position)
    return position - start


@gluon.jit  # type: ignore[untyped-decorator]
def _next(
    keys: gl.tensor,
    tiles: gl.shared_memory_descriptor,
    i: gl.tensor,
    masked: gl.tensor,
    total: gl.tensor,
    whole: gl.tensor,
    count: gl.tensor,
    start: gl.tensor,
    stride: gl.tensor,
    q_rows: gl.tensor,
    q_token: gl.tensor,
    lse_row: gl.tensor,
    inner: gl.tensor,
    zeros: gl.tensor,
    D: gl.constexpr,
    SAMPLE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr,
    wide: gl.constexpr,
) -> gl.tensor:
    """Begins the i-th tile's product, a whole one's, and a copy ahead; (token of the product, its logsumexps).

    The copy overwrites tile i - 1, whose product every warp had waited for before it came to the barrier in the wait.
    """
    hopper.async_copy.wait_group(STAGES - 2)
    hopper.fence_async_shared()
    ahead = i + STAGES - 1
    place = _position(whole + (ahead - masked) * BLOCK_Q, stride, SAMPLE) - start
    _copy(tiles, ahead, q_rows, q_token, place, gl.where(ahead < total, count, 0), D, wide)
    token = _begin(keys, tiles, i, zeros)
    place = _position(whole + (i - masked) * BLOCK_Q, stride, SAMPLE) - start
    return token, gl.load(lse_row + place + inner)
