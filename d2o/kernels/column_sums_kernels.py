"""The kernel of :mod:`d2o.kernels.column_sums`: one program owns a block of keys and walks over the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from d2o.kernels.column_sums_exp2 import exp2_by


@triton.jit  # type: ignore[untyped-decorator]
def sampled_before(position: tl.tensor, stride: tl.tensor, SAMPLE: tl.constexpr) -> tl.tensor:
    """How many sampled queries stand before a position."""
    return position // (SAMPLE * stride) * SAMPLE + tl.minimum(position % (SAMPLE * stride), SAMPLE)


@triton.jit  # type: ignore[untyped-decorator]
def _exponents(
    q: tl.tensor,
    key_tile: tl.tensor,
    lse: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """log2 of the probabilities [queries, keys] of one tile."""
    logits = tl.dot(q, tl.trans(key_tile), input_precision=PRECISION)
    logits *= factor
    if SOFTCAP:
        logits = cap * (1.0 - 2.0 / (1.0 + tl.exp2(tl.minimum(logits, 64.0))))
    return logits - (lse * 1.4426950408889634)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _folded(p: tl.tensor, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """Sums of rows 8 apart, [BLOCK_Q / 16, 8, BLOCK_K]: those that the same thread holds after a product."""
    return tl.sum(tl.reshape(p, [BLOCK_Q // 16, 2, 8, BLOCK_K]), 1)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=list(range(6, 20)),  # all numbers
    do_not_specialize_on_alignment=["lse", "out", "table"],
)
def column_sums_kernel(
    q: tl.tensor,
    described_q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    q_head8: tl.tensor,
    q_token8: tl.tensor,
    k_head8: tl.tensor,
    k_token8: tl.tensor,
    lse_head: tl.tensor,
    out_row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    extra: tl.tensor,
    layer: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    PACKED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SAMPLE: tl.constexpr,
    EXTRA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    EXP2: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
) -> None:
    """One program: BLOCK_K keys of HEADS query heads, from the diagonal to the end of the chunk.

    The grid is (rows side by side, blocks of keys, groups of such rows). ``EXP2``: PTX of whole tiles' exponentials
    (:func:`d2o.kernels.column_sums_exp2.exp2_assembly`), or "".
    ``DESCRIBED``: whole tiles are loaded of ``described_q``, the queries [heads, tokens, D], by the copy engine.
    ``PACKED``: the program's line of ``table`` [lines, 8] int64 says which prompt it serves: where that begins, its
    length, first key, the address of its layer 0 of [layers, rows, length] float32, first query, stride, extra.
    """
    row = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    q_token, k_token = q_token8 * 8, k_token8 * 8
    if PACKED:
        line = table + tl.program_id(1) * 8
        rows = tl.num_programs(0) * tl.num_programs(2)
        begins = tl.load(line)
        end = tl.load(line + 1).to(tl.int32)
        low_key = tl.load(line + 2).to(tl.int32)
        address = tl.load(line + 3) + (tl.cast(layer, tl.int64) * rows + row) * end * 4
        out = address.to(tl.pointer_type(tl.float32))
        first = tl.load(line + 4).to(tl.int32)
        stride = tl.load(line + 5).to(tl.int32)
        extra = tl.load(line + 6).to(tl.int32)
        q += begins * q_token
        k += begins * k_token
        lse += begins
    else:
        low_key = tl.program_id(1) * BLOCK_K
        out += tl.cast(row, tl.int64) * out_row
    key = low_key + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_D)
    nth = tl.arange(0, BLOCK_Q)
    inner = nth // SAMPLE * (SAMPLE * stride) + nth % SAMPLE
    k += tl.cast(row * HEADS // GROUP, tl.int64) * k_head8 * 8
    key_mask = (key < end)[:, None] & (column < D)[None, :]
    key_tile = tl.load(k + key.to(tl.int64)[:, None] * k_token + column, mask=key_mask, other=0.0)

    # Numbers of sampled queries: those that see any of the keys, and among them the tiles that see them all.
    last_seen, last_whole = end, end
    if WINDOW > 0:
        last_seen = tl.minimum(end, low_key + BLOCK_K - 1 + WINDOW)
        last_whole = tl.minimum(end, low_key + WINDOW)
    begin = sampled_before(tl.maximum(first, low_key), stride, SAMPLE) // BLOCK_Q * BLOCK_Q
    finish = tl.cdiv(sampled_before(last_seen, stride, SAMPLE), BLOCK_Q) * BLOCK_Q
    whole = tl.cdiv(sampled_before(tl.maximum(first, low_key + BLOCK_K - 1), stride, SAMPLE), BLOCK_Q) * BLOCK_Q
    whole = tl.minimum(whole, finish)
    whole_end = tl.maximum(whole, sampled_before(last_whole, stride, SAMPLE) // BLOCK_Q * BLOCK_Q)
    before = tl.maximum(whole - begin, 0) // BLOCK_Q
    partial = before + tl.maximum(finish - whole_end, 0) // BLOCK_Q

    sums = tl.zeros([BLOCK_Q // 16, 8, BLOCK_K], tl.float32)
    for head in range(HEADS):
        q_rows = q + tl.cast(row * HEADS + head, tl.int64) * q_head8 * 8
        lse_row = lse + tl.cast(row * HEADS + head, tl.int64) * lse_head
        for i in tl.range(0, partial + EXTRA, num_stages=1):
            number = tl.where(i < before, begin + i * BLOCK_Q, whole_end + (i - before) * BLOCK_Q)
            position = number // SAMPLE * (SAMPLE * stride) + number % SAMPLE + inner
            weight = 1.0
            if EXTRA > 0:  # the prompt's last block: nothing follows it that could count
                is_extra = i >= partial
                position = tl.where(is_extra, extra + (i - partial) * BLOCK_Q + nth, position)
                weight = tl.where(is_extra, 1.0 / stride, 1.0)
            counts = (position >= first) & (position < end)
            place = (position - start).to(tl.int64)
            q_mask = counts[:, None] & (column < D)[None, :]
            q_tile = tl.load(q_rows + place[:, None] * q_token + column, mask=q_mask, other=0.0)
            row_lse = tl.load(lse_row + place, mask=counts, other=0.0)
            x = _exponents(q_tile, key_tile, row_lse, factor, cap, SOFTCAP, PRECISION)
            seen = key[None, :] <= tl.where(counts, position, -1)[:, None]
            if WINDOW > 0:
                seen &= key[None, :] > (position - WINDOW)[:, None]
            p = tl.exp2(tl.where(seen, x, float("-inf")))
            sums += _folded(p if EXTRA == 0 else p * weight, BLOCK_Q, BLOCK_K)
        q_inner = inner[:, None] * q_token + column[None, :]
        for number in tl.range(whole, whole_end, BLOCK_Q, num_stages=STAGES):
            place = number // SAMPLE * (SAMPLE * stride) + number % SAMPLE - start
            q_at = q_rows + tl.cast(place, tl.int64) * q_token + q_inner
            if DESCRIBED:
                q_tile = described_q.load([row * HEADS + head, place, 0]).reshape(BLOCK_Q, D)
            elif D == BLOCK_D:
                q_tile = tl.load(q_at)
            else:
                q_tile = tl.load(q_at, mask=(column < D)[None, :], other=0.0)
            row_lse = tl.load(lse_row + place + (nth if DESCRIBED else inner))
            if EXP2 != "" and not SOFTCAP:
                logits = tl.dot(q_tile, tl.trans(key_tile), input_precision=PRECISION)
                p = exp2_by(EXP2, logits, factor, (row_lse * -1.4426950408889634)[:, None])
            else:
                p = tl.exp2(_exponents(q_tile, key_tile, row_lse, factor, cap, SOFTCAP, PRECISION))
            sums += _folded(p, BLOCK_Q, BLOCK_K)
    received = tl.sum(tl.sum(sums, 0), 0) * stride
    tl.store(out + key, tl.load(out + key, mask=key < end, other=0.0) + received, mask=key < end)
