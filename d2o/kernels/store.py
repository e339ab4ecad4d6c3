"""Prompt tokens into their pages and back out of them: one launch a layer each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o.kernels.launch import Launcher, Options, eighths
from d2o.kernels.paged import PagedTensors

_BLOCK_TOKENS = 32
_OPTIONS = Options(warps=4)


def store_tokens(
    k: Tensor,
    v: Tensor,
    pool: PagedTensors,
    block_table: Tensor,
    rows: Tensor,
    slots: Tensor,
    positions: Tensor,
    layer: int,
    *,
    clear_tail: bool = True,
) -> None:
    """Writes tokens of one or several sequences into their slots of one layer; score and bias start at 0.

    Tokens of a sequence stand together and in order of slot. No synchronisation, so it may be captured in a graph.

    Args:
        k, v: [kv_heads, tokens, head_dim]; the last stride is 1, the others are multiples of 8, and the memory is
            aligned to 16 bytes.
        pool: where they go; changed in place.
        block_table: [layers, rows, pages_per_row] int32, contiguous.
        rows, slots, positions: [tokens] int32; a token whose slot is negative is padding and goes nowhere.
        layer: index into the block table.
        clear_tail: also zero K, V and bias behind a sequence's last token, up to its page's end.
    """
    kv_heads, tokens, head_dim = k.shape
    if tokens == 0:
        return
    _store(
        (-(-tokens // _BLOCK_TOKENS), kv_heads, 1),
        (k, v, *eighths(k, v), pool.k, pool.v, pool.score,
         pool.position, pool.bias, block_table, rows, slots, positions, layer, tokens, *block_table.shape[1:]),
        (pool.page_size, head_dim, 1 << (head_dim - 1).bit_length(), _BLOCK_TOKENS, clear_tail),
        _OPTIONS,
    )  # fmt: skip


def gather_context(pool: PagedTensors, block_table: Tensor, layer: int, row: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a row's first ``tokens`` slots of one layer, in order of slot.

    Returns:
        k, v: [kv_heads, tokens, head_dim], views of [tokens, kv_heads, head_dim] memory: a slice of the tokens has the
        strides of the whole, so that attention plans that are cached by strides serve every prompt length.
    """
    out_k, out_v = (
        torch.empty(tokens, pool.kv_heads, pool.head_dim, dtype=pool.k.dtype, device=pool.device) for _ in range(2)
    )
    if tokens:
        page, head_dim = pool.page_size, pool.head_dim
        _gather(
            (-(-tokens // page), pool.kv_heads, 1),
            (pool.k, pool.v, out_k, out_v, block_table, layer, row, tokens, *block_table.shape[1:]),
            (page, head_dim, 1 << (head_dim - 1).bit_length()),
            _OPTIONS,
        )
    return out_k.transpose(0, 1), out_v.transpose(0, 1)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["k_head8", "k_token8", "v_head8", "v_token8", "layer", "tokens", "table_rows", "pages_per_row"],
    do_not_specialize_on_alignment=["rows", "slots", "positions"],
)
def _store_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_head8: tl.tensor,
    k_token8: tl.tensor,
    v_head8: tl.tensor,
    v_token8: tl.tensor,
    pool_k: tl.tensor,
    pool_v: tl.tensor,
    score: tl.tensor,
    position: tl.tensor,
    bias: tl.tensor,
    block_table: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    layer: tl.tensor,
    tokens: tl.tensor,
    table_rows: tl.tensor,
    pages_per_row: tl.tensor,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CLEAR: tl.constexpr,
) -> None:
    """One program stores BLOCK_T tokens of one KV head."""
    first = tl.program_id(0) * BLOCK_T
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    table = block_table + tl.cast(layer, tl.int64) * table_rows * pages_per_row
    token = first + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    # The tokens' own loads do not wait for their places.
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    nth = token.to(tl.int64)[:, None]
    key = tl.load(k + tl.cast(head, tl.int64) * k_head8 * 8 + nth * k_token8 * 8 + column, mask=inside)
    value = tl.load(v + tl.cast(head, tl.int64) * v_head8 * 8 + nth * v_token8 * 8 + column, mask=inside)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    row = tl.load(rows + token, mask=token < tokens, other=0).to(tl.int64)
    held = slot >= 0
    page = tl.load(table + row * pages_per_row + slot // PAGE, mask=held, other=0).to(tl.int64)
    place = (page * kv_heads + head) * PAGE + slot % PAGE
    tile = held[:, None] & (column < D)[None, :]
    tl.store(pool_k + place[:, None] * D + column, key, mask=tile)
    tl.store(pool_v + place[:, None] * D + column, value, mask=tile)
    tl.store(position + place, tl.load(positions + token, mask=held, other=0), mask=held)
    tl.store(score + place, tl.zeros([BLOCK_T], tl.float32), mask=held)
    tl.store(bias + place, tl.zeros([BLOCK_T], tl.float32), mask=held)
    if CLEAR:
        more = token + 1 < tokens
        follows = tl.load(slots + token + 1, mask=more, other=-1) >= 0
        ends = held & ((tl.load(rows + token + 1, mask=more, other=-1) != row) | ~follows)
        if tl.sum(ends.to(tl.int32)) > 0:
            for i in range(BLOCK_T):
                _clear_tail(
                    pool_k, pool_v, bias, table, rows, slots, first + i, tokens, pages_per_row, PAGE, D, BLOCK_D
                )


@triton.jit  # type: ignore[untyped-decorator]
def _clear_tail(
    pool_k: tl.tensor,
    pool_v: tl.tensor,
    bias: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    pages_per_row: tl.tensor,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Zeroes what lies behind ``token`` in its page, if it is the last of its sequence."""
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    row = tl.load(rows + token, mask=token < tokens, other=-1)
    more = token + 1 < tokens
    next_row = tl.load(rows + token + 1, mask=more, other=-1)
    next_slot = tl.load(slots + token + 1, mask=more, other=-1)
    if (slot >= 0) & ((next_row != row) | (next_slot < 0)):
        offset = tl.arange(0, PAGE)
        column = tl.arange(0, BLOCK_D)
        page = tl.load(table + tl.cast(row, tl.int64) * pages_per_row + slot // PAGE).to(tl.int64)
        place = (page * tl.num_programs(1) + tl.program_id(1)) * PAGE + offset
        behind = offset > slot % PAGE
        tile = behind[:, None] & (column < D)[None, :]
        zeros = tl.zeros([PAGE, BLOCK_D], pool_k.dtype.element_ty)
        tl.store(pool_k + place[:, None] * D + column, zeros, mask=tile)
        tl.store(pool_v + place[:, None] * D + column, zeros, mask=tile)
        tl.store(bias + place, tl.zeros([PAGE], tl.float32), mask=behind)


@triton.jit(do_not_specialize=["layer", "row", "tokens", "table_rows", "pages_per_row"])  # type: ignore[untyped-decorator]
def _gather_kernel(
    pool_k: tl.tensor,
    pool_v: tl.tensor,
    out_k: tl.tensor,
    out_v: tl.tensor,
    block_table: tl.tensor,
    layer: tl.tensor,
    row: tl.tensor,
    tokens: tl.tensor,
    table_rows: tl.tensor,
    pages_per_row: tl.tensor,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program copies one page of one KV head."""
    nth = tl.program_id(0)
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    entry = (tl.cast(layer, tl.int64) * table_rows + row) * pages_per_row + nth
    page = tl.load(block_table + entry).to(tl.int64)
    offset = tl.arange(0, PAGE)
    column = tl.arange(0, BLOCK_D)
    source = ((page * kv_heads + head) * PAGE + offset)[:, None] * D + column
    slot = nth * PAGE + offset
    tile = (slot < tokens)[:, None] & (column < D)[None, :]
    target = (slot.to(tl.int64) * kv_heads + head)[:, None] * D + column
    tl.store(out_k + target, tl.load(pool_k + source, mask=tile), mask=tile)
    tl.store(out_v + target, tl.load(pool_v + source, mask=tile), mask=tile)


_store, _gather = Launcher(_store_kernel), Launcher(_gather_kernel)
