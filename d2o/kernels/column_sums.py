"""How much attention each key of a prompt received, from the logsumexp that the attention forward left behind.

Transposed: one program owns a block of keys of one head and walks over the queries that see it, so that its sums stay
in registers, need no atomics and are the same in every run. Queries are numbered among the sampled ones only
(``ScoreTarget.stride``); whole tiles need no mask, those on the diagonal and at either end do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o.attention import ScoreTarget

_LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut.

    Attributes:
        keys, queries: of a tile; powers of two, and ``queries`` divides the sampling block or is a multiple of it.
        warps, stages: of Triton's launch; stages of the loop over whole tiles.
        fold: add a tile's columns up at once instead of after the loop: half the registers, a few shuffles a tile.
        poly: so many eighths of the exponentials are polynomials (relative error 1e-4), which leaves the special
            function units to the rest.
        registers: most of a thread, so that more programs share a processor; None leaves it to the compiler.
    """

    keys: int = 256
    queries: int = 64
    warps: int = 8
    stages: int = 3
    fold: bool = True
    poly: int = 0
    registers: int | None = 128

    @classmethod
    def default(cls, dtype: torch.dtype, head_dim: int, tokens: int) -> Tiling:
        """What suits the shape; ``tokens`` are the keys, of which a short prompt needs smaller blocks."""
        if dtype == torch.float32:
            return cls(keys=64, queries=32, warps=4, stages=1, registers=None)
        if head_dim > 128:
            return cls(keys=64, warps=4, stages=2, registers=None)
        return cls() if tokens > 2048 else cls(keys=64, warps=4, registers=None)


def add_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: ScoreTarget,
    *,
    start: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Adds one chunk's attention to what ``target`` has received (ALGORITHM section 1), in place.

    ``target.received[h, j] += sum_i w_i exp(q_i . k_j * scale - lse_i)`` over the chunk's queries i, with the weights
    of ``target``; likewise ``target.window``. No synchronisation.

    Args:
        q: [heads, chunk, head_dim], queries at positions ``start`` to ``start + chunk``; any strides but the last (1).
        k: [kv_heads, >= start + chunk, head_dim], in order of position; any strides but the last (1).
        lse: [heads, chunk] float32, natural logarithm of the sum of exponentials of each query's logits.
        target: where the sums go; its tensors are on the same device.
        start: position of the first query.
        scale, softcap, window: as in :class:`d2o.attention.AttentionRule`.
        tiling: how to cut the work; by default what suits head_dim and dtype.
    """
    tiling = tiling or Tiling.default(q.dtype, q.shape[2], start + q.shape[1])
    chunk = _Chunk(q, k, lse, start, scale, softcap, window, tiling)
    last = (target.prompt_tokens - 1) // target.block
    extra = last * target.block if target.stride > 1 and last % target.stride else None
    chunk.add(target.received, 1, target.first_query, target.stride, target.block, extra)
    if target.window is not None:
        chunk.add(target.window, q.shape[0] // k.shape[0], target.window_start, 1, target.block, None)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The arguments of :func:`add_column_sums` that do not depend on the queries that count."""

    q: Tensor
    k: Tensor
    lse: Tensor
    start: int
    scale: float
    softcap: float | None
    window: int | None
    tiling: Tiling

    def add(self, out: Tensor, heads: int, first: int, stride: int, block: int, extra: int | None) -> None:
        """Adds to ``out`` [rows, prompt] the sums of ``heads`` query heads a row over the queries from ``first`` on.

        ``extra``: position of a block that counts once although it is not sampled.
        """
        q, k, tiling = self.q, self.k, self.tiling
        end, first = self.start + q.shape[1], max(first, self.start)
        sampled = first < end and _sampled(first, stride, block) < _sampled(end, stride, block)
        extra = extra if extra is not None and max(extra, first) < min(extra + block, end) else None
        if not sampled and extra is None:
            return
        factor = self.scale * _LOG2E if self.softcap is None else 2 * _LOG2E * self.scale / self.softcap
        _column_sums_kernel[(triton.cdiv(end, tiling.keys), q.shape[0] // heads)](
            q,
            k,
            self.lse,
            out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            self.lse.stride(0),
            out.stride(0),
            self.start,
            end,
            first,
            stride,
            -1 if extra is None else extra,
            factor,
            0.0 if self.softcap is None else self.softcap * _LOG2E,
            HEADS=heads,
            GROUP=q.shape[0] // k.shape[0],
            D=q.shape[2],
            BLOCK_D=triton.next_power_of_2(q.shape[2]),
            BLOCK_K=tiling.keys,
            BLOCK_Q=tiling.queries,
            SAMPLE=tiling.queries if stride == 1 else block,
            EXTRA=0 if extra is None else triton.cdiv(block, tiling.queries),
            SOFTCAP=self.softcap is not None,
            WINDOW=self.window or 0,
            FOLD=tiling.fold,
            POLY=tiling.poly,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            STAGES=tiling.stages,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            maxnreg=tiling.registers,
        )


def _sampled(position: int, stride: int, block: int) -> int:
    """How many sampled queries stand before a position."""
    return position // (block * stride) * block + min(position % (block * stride), block)


@triton.jit  # type: ignore[untyped-decorator]
def _sampled_before(position: tl.tensor, stride: tl.tensor, SAMPLE: tl.constexpr) -> tl.tensor:
    return position // (SAMPLE * stride) * SAMPLE + tl.minimum(position % (SAMPLE * stride), SAMPLE)


@triton.jit  # type: ignore[untyped-decorator]
def _exp2_polynomial(x: tl.tensor) -> tl.tensor:
    """2**x without the special function unit: 2**round(x) by the exponent, the rest by a minimax cubic."""
    x = tl.maximum(x, -126.0)
    shifted = x + 12582912.0
    rest = x - (shifted - 12582912.0)
    power = 0.99992807 + rest * (0.69326099 + rest * (0.24261113 + rest * 0.05517167))
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _exponents(
    key_tile: tl.tensor,
    q: tl.tensor,
    lse: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """log2 of the probabilities [keys, queries] of one tile."""
    logits = tl.dot(key_tile, tl.trans(q), input_precision=PRECISION)
    logits *= factor
    if SOFTCAP:
        logits = cap * (1.0 - 2.0 / (1.0 + tl.exp2(tl.minimum(logits, 64.0))))
    return logits - (lse * 1.4426950408889634)[None, :]


@triton.jit(do_not_specialize=["start", "end", "first", "stride", "extra"])  # type: ignore[untyped-decorator]
def _column_sums_kernel(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    lse_head: tl.tensor,
    out_row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    stride: tl.tensor,
    extra: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
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
    FOLD: tl.constexpr,
    POLY: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One program: BLOCK_K keys of HEADS query heads, from the diagonal to the end of the chunk."""
    low_key = tl.program_id(0) * BLOCK_K
    row = tl.program_id(1)
    key = low_key + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_D)
    nth = tl.arange(0, BLOCK_Q)
    inner = nth // SAMPLE * (SAMPLE * stride) + nth % SAMPLE
    k += tl.cast(row * HEADS // GROUP, tl.int64) * k_head
    key_mask = (key < end)[:, None] & (column < D)[None, :]
    key_tile = tl.load(k + key.to(tl.int64)[:, None] * k_token + column, mask=key_mask, other=0.0)

    # Numbers of sampled queries: those that see any of the keys, and among them the tiles that see them all.
    last_seen, last_whole = end, end
    if WINDOW > 0:
        last_seen = tl.minimum(end, low_key + BLOCK_K - 1 + WINDOW)
        last_whole = tl.minimum(end, low_key + WINDOW)
    begin = _sampled_before(tl.maximum(first, low_key), stride, SAMPLE) // BLOCK_Q * BLOCK_Q
    finish = tl.cdiv(_sampled_before(last_seen, stride, SAMPLE), BLOCK_Q) * BLOCK_Q
    whole = tl.cdiv(_sampled_before(tl.maximum(first, low_key + BLOCK_K - 1), stride, SAMPLE), BLOCK_Q) * BLOCK_Q
    whole = tl.minimum(whole, finish)
    whole_end = tl.maximum(whole, _sampled_before(last_whole, stride, SAMPLE) // BLOCK_Q * BLOCK_Q)
    before = tl.maximum(whole - begin, 0) // BLOCK_Q
    partial = before + tl.maximum(finish - whole_end, 0) // BLOCK_Q

    sums = tl.zeros([BLOCK_K], tl.float32)
    tile_sums = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for head in range(HEADS):
        q_rows = q + tl.cast(row * HEADS + head, tl.int64) * q_head
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
            x = _exponents(key_tile, q_tile, row_lse, factor, cap, SOFTCAP, PRECISION)
            seen = counts[None, :] & (key[:, None] <= position[None, :])
            if WINDOW > 0:
                seen &= key[:, None] > position[None, :] - WINDOW
            p = tl.exp2(tl.where(seen, x, float("-inf"))) * weight
            if FOLD:
                sums += tl.sum(p, 1)
            else:
                tile_sums += p
        q_inner = inner[:, None] * q_token + column[None, :]
        for number in tl.range(whole, whole_end, BLOCK_Q, num_stages=STAGES):
            place = number // SAMPLE * (SAMPLE * stride) + number % SAMPLE - start
            q_at = q_rows + tl.cast(place, tl.int64) * q_token + q_inner
            q_tile = tl.load(q_at) if D == BLOCK_D else tl.load(q_at, mask=(column < D)[None, :], other=0.0)
            row_lse = tl.load(lse_row + place + inner)
            x = _exponents(key_tile, q_tile, row_lse, factor, cap, SOFTCAP, PRECISION)
            p = tl.exp2(x)
            if POLY > 0:
                p = tl.where((nth // 8 % 8 < POLY)[None, :], _exp2_polynomial(x), p)
            if FOLD:
                sums += tl.sum(p, 1)
            else:
                tile_sums += p
    if not FOLD:
        sums = tl.sum(tile_sums, 1)
    at = out + tl.cast(row, tl.int64) * out_row + key
    tl.store(at, tl.load(at, mask=key < end, other=0.0) + sums * stride, mask=key < end)
