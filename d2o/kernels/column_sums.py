"""How much attention each key of a prompt received, from the logsumexp that the attention forward left behind.

One program owns a block of keys of one head and walks over the queries that see it, so that its sums stay in
registers, need no atomics and are the same in every run. Queries are numbered among the sampled ones only
(``ScoreTarget.stride``); whole tiles need no mask, those on the diagonal and at either end do.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from d2o.attention import ScoreTarget
from d2o.kernels.column_sums_exp2 import exp2_assembly
from d2o.kernels.column_sums_kernels import column_sums_kernel
from d2o.kernels.launch import Launcher, Options, eighths, fetches_tiles, multiplies_by_warp_groups

_LOG2E = math.log2(math.e)
_SHORT, _LONG, _MANY, _PROGRAMS = 1024, 8192, 1024, 512
launch = Launcher(column_sums_kernel)
# Gluon is experimental: the versions of Triton that have compiled the kernel.
turns: ModuleType | None = None
if triton.__version__.startswith(("3.6.", "3.7.")):
    turns = importlib.import_module("d2o.kernels.column_sums_turns")


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut.

    Attributes:
        keys, queries: of a tile; powers of two, and ``queries`` divides the sampling block or is a multiple of it.
        warps, stages: of the launch; stages of the loop over whole tiles.
        registers: most of a thread, so that more programs share a processor; None leaves it to the compiler.
        adjacent: so many heads' programs of the same keys follow one another (their greatest common divisor with the
            heads does); 1: all programs of a head do. The more, the better long and short programs even out.
        polynomial: of eight exponentials of a whole tile, how many are multiplied out; none in the interpreter.
        described: the GPU fetches tiles of queries by itself, where it can (:meth:`_Chunk._lies_in_tiles`).
        turns: by the kernel for Hopper of :mod:`d2o.kernels.column_sums_turns`, where it can
            (:meth:`_Chunk._takes_turns`; LONG stands in elsewhere). ``keys`` are those of its three groups of
            ``warps``, ``registers`` those of a thread that scores.
    """

    keys: int
    queries: int
    warps: int
    stages: int
    registers: int | None = None
    adjacent: int = 1
    polynomial: int = 0
    described: bool = True
    turns: bool = False

    @classmethod
    def default(cls, dtype: torch.dtype, head_dim: int, tokens: int, queries: int, rows: int) -> Tiling:
        """What suits the shape; ``tokens`` are the keys, ``queries`` those between the first and the last that count.

        Few of either need smaller tiles, and so do few ``rows`` of sums: there must be several programs a processor.
        """
        if dtype == torch.float32:
            return cls(keys=64, queries=32, warps=4, stages=1)
        if head_dim > 128:
            return cls(keys=64, queries=64, warps=4, stages=2)
        if tokens <= _SHORT or queries < _MANY:
            return SHORT
        if tokens <= _LONG:
            return MIDDLE
        return TURNS if rows * tokens >= _PROGRAMS * TURNS.keys else LONG

    @classmethod
    def defaults(cls, dtype: torch.dtype, head_dim: int, tokens: int) -> set[Tiling]:
        """All that :meth:`default` chooses for prompts of up to so many tokens."""
        lengths = (1, *(each + 1 for each in (_SHORT, _LONG) if each < tokens))
        return {cls.default(dtype, head_dim, each, each, rows) for each in lengths for rows in (1, _PROGRAMS)}


TURNS = Tiling(keys=384, queries=64, warps=4, stages=4, registers=160, adjacent=8, turns=True)
LONG = Tiling(keys=256, queries=64, warps=8, stages=2, registers=128, adjacent=4, polynomial=1)
MIDDLE = Tiling(keys=128, queries=64, warps=4, stages=2, registers=168, adjacent=32, polynomial=1)
SHORT = Tiling(keys=64, queries=64, warps=4, stages=2)


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
        q: [heads, chunk, head_dim], queries at positions ``start`` to ``start + chunk``. Of q and k: the last stride
            is 1, the others are multiples of 8, and the memory is aligned to 16 bytes.
        k: [kv_heads, >= start + chunk, head_dim], in order of position.
        lse: [heads, chunk] float32, natural logarithm of the sum of exponentials of each query's logits.
        target: where the sums go; its tensors are on the same device.
        start: position of the first query.
        scale, softcap, window: as in :class:`d2o.attention.AttentionRule`.
        tiling: how to cut the work; by default what suits head_dim and dtype.
    """
    chunk = _Chunk(q, k, lse, start, scale, softcap, window, tiling)
    chunk.add(target.received, 1, target.first_query, target.stride, target.block, extra_block(target))
    if target.window is not None:
        chunk.add(target.window, q.shape[0] // k.shape[0], target.window_start, 1, target.block, None)


def extra_block(target: ScoreTarget) -> int | None:
    """Position of the block that counts once although it is not sampled: the last, if it is not."""
    last = (target.prompt_tokens - 1) // target.block
    return last * target.block if target.stride > 1 and last % target.stride else None


def factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """What the kernel multiplies q.k and a capped logit by, to get a power of two."""
    if softcap is None:
        return scale * _LOG2E, 0.0
    return 2 * _LOG2E * scale / softcap, softcap * _LOG2E


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
    tiling: Tiling | None

    def add(self, out: Tensor, heads: int, first: int, stride: int, block: int, extra: int | None) -> None:
        """Adds to ``out`` [rows, prompt] the sums of ``heads`` query heads a row over the queries from ``first`` on.

        ``extra``: position of a block that counts once although it is not sampled.
        """
        chunk = self.q.shape[1]
        end, first = self.start + chunk, max(first, self.start)
        sampled = first < end and _sampled(first, stride, block) < _sampled(end, stride, block)
        extra = extra if extra is not None and max(extra, first) < min(extra + block, end) else None
        if not sampled and extra is None:
            return
        rows = self.q.shape[0] // heads
        tiling = self.tiling or Tiling.default(self.q.dtype, self.q.shape[2], end, end - first, rows)
        if tiling.turns and not self._takes_turns(heads, stride, block):
            tiling = LONG
        adjacent, sample = math.gcd(rows, tiling.adjacent), tiling.queries if stride == 1 else block
        grid = (adjacent, -(-end // tiling.keys), rows // adjacent)
        strides = self.lse.stride(0), out.stride(0)
        chosen = self.start, end, first, stride, -1 if extra is None else extra
        extras = 0 if extra is None else -(-block // tiling.queries)
        if tiling.turns and turns is not None:
            turns.launch(
                grid,
                (self.q, turns.described(self.q, tiling.queries), self.k, self.lse, out,
                 *eighths(self.k), *strides, *chosen, factors(self.scale, None)[0]),
                turns_constants(self.q, self.k, tiling, sample=sample, extra=extras),
                Options(tiling.warps),
            )  # fmt: skip
            return
        described = tiling.described and self._lies_in_tiles(tiling, sample)
        launch(
            grid,
            (self.q, self._tiles(tiling) if described else self.q, self.k, self.lse, out, self.lse,
             *eighths(self.q, self.k), *strides, *chosen, 0, *factors(self.scale, self.softcap)),
            constants(
                self.q, self.k, tiling, packed=False, heads=heads, sample=sample, extra=extras,
                softcap=self.softcap is not None, window=self.window or 0, described=described,
            ),
            Options(tiling.warps, tiling.stages, tiling.registers),
        )  # fmt: skip

    def _lies_in_tiles(self, tiling: Tiling, sample: int) -> bool:
        """Whether the copy engine can fetch whole tiles: half precision, and all queries of one follow each other."""
        head_dim, able = self.q.shape[2], not self.q.is_cuda or fetches_tiles(self.q.device)
        return able and self.q.element_size() == 2 and not head_dim & (head_dim - 1) and not sample % tiling.queries

    def _takes_turns(self, heads: int, stride: int, block: int) -> bool:
        """Whether the kernel for Hopper can do this: a head a row, nothing capped or out of sight, heads of 128."""
        plain = heads == 1 and self.softcap is None and self.window is None and self.q.shape[2] == 128
        hopper = self.q.is_cuda and multiplies_by_warp_groups(self.q.device)
        return (
            turns is not None
            and plain
            and hopper
            and self._lies_in_tiles(TURNS, TURNS.queries if stride == 1 else block)
        )

    def _tiles(self, tiling: Tiling) -> TensorDescriptor:
        return TensorDescriptor(self.q, list(self.q.shape), list(self.q.stride()), [1, tiling.queries, self.q.shape[2]])


def constants(
    q: Tensor,
    k: Tensor,
    tiling: Tiling,
    *,
    packed: bool,
    heads: int,
    sample: int,
    extra: int,
    softcap: bool,
    window: int,
    described: bool,
) -> tuple[object, ...]:
    """Of :func:`d2o.kernels.column_sums_kernels.column_sums_kernel`, in order. q and k: [heads, tokens, head_dim]."""
    head_dim = q.shape[2]
    return (
        packed,
        heads,
        q.shape[0] // k.shape[0],
        head_dim,
        1 << (head_dim - 1).bit_length(),
        tiling.keys,
        tiling.queries,
        sample,
        extra,
        softcap,
        window,
        exp2_assembly(tiling.polynomial if q.is_cuda else 0),
        "ieee" if q.dtype == torch.float32 else "tf32",
        tiling.stages,
        described,
    )


def turns_constants(q: Tensor, k: Tensor, tiling: Tiling, *, sample: int, extra: int) -> tuple[int | None, ...]:
    """Of :func:`d2o.kernels.column_sums_turns.turns_kernel`, in order."""
    group, keys = q.shape[0] // k.shape[0], tiling.keys // 3
    return group, q.shape[2], keys, tiling.queries, sample, extra, tiling.stages, tiling.registers


def _sampled(position: int, stride: int, block: int) -> int:
    """How many sampled queries stand before a position."""
    return position // (block * stride) * block + min(position % (block * stride), block)
