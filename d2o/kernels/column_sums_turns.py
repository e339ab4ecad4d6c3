"""The kernel of :mod:`d2o.kernels.column_sums` for long prompts on Hopper, whose groups of warps take turns.

In :mod:`d2o.kernels.column_sums_kernels` all warps multiply, then all take exponentials, and two programs of a
processor keep both of its units busy when they happen to be out of step. Here it is written down, in Gluon, Triton's
language of layouts and asynchronous instructions: three groups of four warps own 128 keys each, one warp more fetches
the queries, which all three read, and a group may multiply once the one before it is half done (ADR 0025). For nothing
else does a group wait for another, so that two take their exponentials while the third multiplies.

Barriers count in phases: ``full`` that a tile has come, ``empty`` that all groups have multiplied it, ``turns`` that a
group may multiply.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from d2o.kernels.column_sums_kernels import sampled_before
from d2o.kernels.launch import Launcher

GROUPS: tl.constexpr = tl.constexpr(3)
WARPS: tl.constexpr = tl.constexpr(4)
SWIZZLED = gl.NVMMASharedLayout(128, element_bitwidth=16, rank=3)

# Its name up to Triton 3.6, and since.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


def described(q: Tensor, queries: int) -> TensorDescriptor:
    """Queries [heads, tokens, head_dim] of half precision, as the kernel takes them: by tiles of so many of a head."""
    return TensorDescriptor(q, list(q.shape), list(q.stride()), [1, queries, q.shape[2]], SWIZZLED)


@gluon.jit  # type: ignore[untyped-decorator]
def _position(
    tile: tl.tensor, queries: tl.tuple, SAMPLE: tl.constexpr, BLOCK_Q: tl.constexpr, EXTRA: tl.constexpr
) -> tl.tensor:
    """Of a tile's first query. ``queries``: number of the first, tiles of sampled ones, stride, extra."""
    begin, sampled, stride, extra = queries
    number = begin + tile * BLOCK_Q
    position = number // SAMPLE * (SAMPLE * stride) + number % SAMPLE
    if EXTRA > 0:
        position = gl.where(tile >= sampled, extra + (tile - sampled) * BLOCK_Q, position)
    return position


@gluon.jit  # type: ignore[untyped-decorator]
def _load_rows(
    lse: tl.tensor,
    tile: tl.tensor,
    nth: tl.tensor,
    queries: tl.tuple,
    chunk: tl.tuple,
    SAMPLE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    EXTRA: tl.constexpr,
) -> tl.tensor:
    """The logsumexp of a tile's queries, [BLOCK_Q]; of any others in place of those that are not of the chunk."""
    start, _, end = chunk
    place = _position(tile, queries, SAMPLE, BLOCK_Q, EXTRA) - start + nth
    place = gl.minimum(gl.maximum(place, 0), end - start - 1)
    # Triton 3.6 fails to compile a loop that carries the result of a load of its own.
    return gl.inline_asm_elementwise(
        "ld.global.f32 $0, [$1];", "=f,l", [lse + place], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit  # type: ignore[untyped-decorator]
def _fetch(
    described_q: tl.tensor,
    row: tl.tensor,
    tiles: tl.tensor,
    q_tiles: gl.shared_memory_descriptor,
    barriers: tl.tuple,
    queries: tl.tuple,
    start: tl.tensor,
    SAMPLE: tl.constexpr,
    EXTRA: tl.constexpr,
) -> None:
    """What the warp that fetches does: copies the queries of one tile after another, where there is room."""
    full, empty, _ = barriers
    STAGES: tl.constexpr = q_tiles.shape[0]
    BLOCK_Q: tl.constexpr = q_tiles.shape[2]
    for tile in range(tiles):
        slot = tile % STAGES
        # Nobody reads what has never been filled: a phase that has not begun counts as over.
        mbarrier.wait(empty.index(slot), (tile // STAGES + 1) & 1)
        mbarrier.expect(full.index(slot), described_q.block_type.nbytes)
        place = _position(tile, queries, SAMPLE, BLOCK_Q, EXTRA) - start
        tma.async_copy_global_to_shared(described_q, [row, place, 0], full.index(slot), q_tiles.index(slot))


@gluon.jit  # type: ignore[untyped-decorator]
def _multiplied(
    tile: tl.tensor,
    q_tile: gl.shared_memory_descriptor,
    key_tile: gl.shared_memory_descriptor,
    spare: tl.tensor,
    turns: gl.shared_memory_descriptor,
    GROUP: tl.constexpr,
) -> tl.tuple:
    """Begins the product [BLOCK_Q, BLOCK_K] when it is the group's turn, in two halves of the inner dimension."""
    HALF: tl.constexpr = q_tile.shape[1] // 2
    # The first group does not wait for its first turn.
    FIRST: tl.constexpr = 1 if GROUP == 0 else 0
    mbarrier.wait(turns.index(GROUP), (tile + FIRST) & 1)
    low, high = q_tile.slice(0, HALF, 1), q_tile.slice(HALF, HALF, 1)
    low_key, high_key = key_tile.slice(0, HALF, 1).permute((1, 0)), key_tile.slice(HALF, HALF, 1).permute((1, 0))
    half = warpgroup_mma(low, low_key, spare, use_acc=False, is_async=True)
    return warpgroup_mma(high, high_key, half, is_async=True)


@gluon.jit  # type: ignore[untyped-decorator]
def _step(
    tile: tl.tensor,
    carried: tl.tuple,
    spare: tl.tensor,
    key_tile: gl.shared_memory_descriptor,
    key: tl.tensor,
    nth: tl.tensor,
    q_tiles: gl.shared_memory_descriptor,
    barriers: tl.tuple,
    lse: tl.tensor,
    factor: tl.tensor,
    queries: tl.tuple,
    chunk: tl.tuple,
    GROUP: tl.constexpr,
    SAMPLE: tl.constexpr,
    EXTRA: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tuple:
    """Adds a tile's probabilities; ``WHOLE`` tiles need no mask. Carried: the sums, the tile's logsumexp."""
    BLOCK_Q: tl.constexpr = spare.shape[0]
    BLOCK_K: tl.constexpr = spare.shape[1]
    STAGES: tl.constexpr = q_tiles.shape[0]
    sums, row_lse = carried
    full, empty, turns = barriers
    slot = tile % STAGES
    mbarrier.wait(full.index(slot), (tile // STAGES) & 1)
    product = _multiplied(tile, q_tiles.index(slot), key_tile, spare, turns, GROUP)
    b = gl.expand_dims(row_lse * -1.4426950408889634, 1)
    row_lse = _load_rows(lse, tile + 1, nth, queries, chunk, SAMPLE, BLOCK_Q, EXTRA)
    product = warpgroup_mma_wait(1, deps=[product])
    mbarrier.arrive(turns.index((GROUP + 1) % GROUPS), count=1)
    logits = warpgroup_mma_wait(0, deps=[product])
    barrier()
    mbarrier.arrive(empty.index(slot), count=1)
    if WHOLE:
        p = gl.exp2(logits * factor + b)
    else:
        _, first, end = chunk
        position = _position(tile, queries, SAMPLE, BLOCK_Q, EXTRA) + nth
        position = gl.expand_dims(gl.where((position >= first) & (position < end), position, -1), 1)
        seen = gl.expand_dims(key, 0) <= position
        p = gl.exp2(gl.where(seen, logits * factor + b, float("-inf")))
        if EXTRA > 0:
            p *= gl.where(tile >= queries[1], 1.0 / queries[2], 1.0)
    sums += gl.sum(gl.reshape(p, [BLOCK_Q // 16, 2, 8, BLOCK_K]), 1)
    return sums, row_lse


@gluon.jit  # type: ignore[untyped-decorator]
def _score(
    k: tl.tensor,
    k_token: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    low_key: tl.tensor,
    tiles: tl.tensor,
    q_tiles: gl.shared_memory_descriptor,
    key_tiles: gl.shared_memory_descriptor,
    barriers: tl.tuple,
    factor: tl.tensor,
    queries: tl.tuple,
    chunk: tl.tuple,
    GROUP: tl.constexpr,
    SAMPLE: tl.constexpr,
    EXTRA: tl.constexpr,
) -> None:
    """What one of the three groups does: adds to ``out`` what its keys receive from all tiles."""
    BLOCK_Q: tl.constexpr = q_tiles.shape[1]
    BLOCK_K: tl.constexpr = key_tiles.shape[1]
    D: tl.constexpr = key_tiles.shape[2]
    MMA: tl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_K, 16]
    )
    ROWS: tl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    begin, sampled, stride, _ = queries
    _, first, end = chunk
    low = low_key + GROUP * BLOCK_K
    key_tile = key_tiles.index(GROUP)
    key = gl.minimum(low + gl.arange(0, BLOCK_K, gl.SliceLayout(1, ROWS)), end - 1)
    column = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    key_tile.store(gl.load(k + gl.expand_dims(key.to(gl.int64) * k_token, 1) + gl.expand_dims(column, 0)))
    fence_async_shared()
    barrier()

    # The tiles that see all of the group's keys.
    whole = gl.cdiv(sampled_before(gl.maximum(first, low + BLOCK_K - 1), stride, SAMPLE) - begin, BLOCK_Q)
    whole = gl.minimum(gl.maximum(whole, 0), sampled)
    whole_end = gl.maximum(whole, (sampled_before(end, stride, SAMPLE) - begin) // BLOCK_Q)

    key = low + gl.arange(0, BLOCK_K, gl.SliceLayout(0, MMA))
    nth = gl.arange(0, BLOCK_Q, gl.SliceLayout(1, MMA))
    spare = gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, MMA)
    sums = gl.sum(gl.reshape(spare, [BLOCK_Q // 16, 2, 8, BLOCK_K]), 1)
    carried = (sums, _load_rows(lse, 0, nth, queries, chunk, SAMPLE, BLOCK_Q, EXTRA))
    for tile in range(whole):
        carried = _step(
            tile, carried, spare, key_tile, key, nth, q_tiles, barriers, lse, factor, queries, chunk,
            GROUP, SAMPLE, EXTRA, WHOLE=False,
        )  # fmt: skip
    for tile in range(whole, whole_end):
        carried = _step(
            tile, carried, spare, key_tile, key, nth, q_tiles, barriers, lse, factor, queries, chunk,
            GROUP, SAMPLE, EXTRA, WHOLE=True,
        )  # fmt: skip
    for tile in range(whole_end, tiles):
        carried = _step(
            tile, carried, spare, key_tile, key, nth, q_tiles, barriers, lse, factor, queries, chunk,
            GROUP, SAMPLE, EXTRA, WHOLE=False,
        )  # fmt: skip
    received = gl.convert_layout(gl.sum(gl.sum(carried[0], 1), 0), gl.SliceLayout(0, MMA)) * stride
    gl.store(out + key, gl.load(out + key, mask=key < end, other=0.0) + received, mask=key < end)


@gluon.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=list(range(5, 15)),  # all numbers
    do_not_specialize_on_alignment=["lse", "out"],
)
def turns_kernel(
    q: tl.tensor,
    described_q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    k_head8: tl.tensor,
    k_token8: tl.tensor,
    lse_head: tl.tensor,
    out_row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    extra: tl.tensor,
    factor: tl.tensor,
    HEADS_A_KEY: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SAMPLE: tl.constexpr,
    EXTRA: tl.constexpr,
    STAGES: tl.constexpr,
    REGISTERS: tl.constexpr,
) -> None:
    """One program: 3 BLOCK_K keys of one head, from the diagonal to the end of the chunk.

    The grid and the arguments are those of :func:`d2o.kernels.column_sums_kernels.column_sums_kernel`, of which ``q``
    is only for the launcher. ``STAGES`` tiles of queries, a power of two, are held or on their way; ``REGISTERS`` of a
    thread that scores.
    """
    row = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    low_key = gl.program_id(1) * (GROUPS * BLOCK_K)
    k += (row // HEADS_A_KEY).to(gl.int64) * k_head8 * 8
    lse += row.to(gl.int64) * lse_head
    out += row.to(gl.int64) * out_row

    # Numbers of sampled queries that see any of the keys.
    begin = sampled_before(gl.maximum(first, low_key), stride, SAMPLE) // BLOCK_Q * BLOCK_Q
    sampled = gl.maximum(gl.cdiv(sampled_before(end, stride, SAMPLE) - begin, BLOCK_Q), 0)
    tiles = sampled + EXTRA
    queries = (begin, sampled, stride, extra)
    chunk = (start, first, end)

    TILE: tl.constexpr = gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2)
    fetched = gl.allocate_shared_memory(k.dtype.element_ty, [STAGES, 1, BLOCK_Q, D], described_q.layout)
    q_tiles = fetched._reinterpret(k.dtype.element_ty, [STAGES, BLOCK_Q, D], TILE)
    key_tiles = gl.allocate_shared_memory(k.dtype.element_ty, [GROUPS, BLOCK_K, D], TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    barriers = (full, empty, turns)
    k_token = k_token8 * 8
    gl.warp_specialize(
        [
            (_score, (k, k_token, lse, out, low_key, tiles, q_tiles, key_tiles, barriers, factor, queries, chunk,
                      0, SAMPLE, EXTRA)),
            (_score, (k, k_token, lse, out, low_key, tiles, q_tiles, key_tiles, barriers, factor, queries, chunk,
                      1, SAMPLE, EXTRA)),
            (_score, (k, k_token, lse, out, low_key, tiles, q_tiles, key_tiles, barriers, factor, queries, chunk,
                      2, SAMPLE, EXTRA)),
            (_fetch, (described_q, row, tiles, fetched, barriers, queries, start, SAMPLE, EXTRA)),
        ],
        [WARPS, WARPS, 1],
        [REGISTERS, REGISTERS, 24],
    )  # fmt: skip


launch = Launcher(turns_kernel)
