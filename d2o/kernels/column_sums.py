"""How much attention each key of a prompt received, from the logsumexp that the attention forward left behind.

Transposed: one program owns a block of keys of one head and walks over the queries that see it, so that its sums stay
in registers, need no atomics and are the same in every run. Queries are numbered among the sampled ones only
(``ScoreTarget.stride``); whole tiles need no mask, those on the diagonal and at either end do.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2o.attention import ScoreTarget
from d2o.kernels.column_sums_kernels import column_sums_kernel
from d2o.kernels.launch import Launcher, Options, eighths

_LOG2E = math.log2(math.e)
_LONG = 2048
_PIPELINED_CHUNK = 1024
launch = Launcher(column_sums_kernel)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut.

    Attributes:
        keys, queries: of a tile; powers of two, and ``queries`` divides the sampling block or is a multiple of it.
        warps, stages: of the launch; stages of the loop over whole tiles.
        fold: add a tile's columns up at once instead of after the loop: half the registers, a few shuffles a tile.
        poly: so many eighths of the exponentials are polynomials (relative error 1e-4), which leaves the special
            function units to the rest.
        registers: most of a thread, so that more programs share a processor; None leaves it to the compiler.
        pipelined: use the kernel that multiplies a tile while it takes the exponentials of the one before, where the
            device and the attention allow it (:mod:`d2o.kernels.column_sums_hopper`).
        ordered: of the pipelined kernel: issue a whole product before the first exponential, instead of mixing them.
    """

    keys: int = 128
    queries: int = 128
    warps: int = 8
    stages: int = 2
    fold: bool = True
    poly: int = 0
    registers: int | None = 128
    pipelined: bool = False
    ordered: bool = True

    @classmethod
    def default(cls, dtype: torch.dtype, head_dim: int, tokens: int, stride: int = 1) -> Tiling:
        """What suits the shape; ``tokens`` are the keys, of which a short prompt needs smaller blocks."""
        if dtype == torch.float32:
            return cls(keys=64, queries=32, warps=4, stages=1, registers=None)
        if head_dim > 128:
            return cls(keys=64, queries=64, warps=4, stages=2, registers=None)
        if tokens <= _LONG:
            return SHORT
        return replace(PIPELINED, queries=64) if stride > 1 else PIPELINED

    def without_pipeline(self, stride: int) -> Tiling:
        """The same work for the kernel of every device."""
        if stride > 1:
            return Tiling(keys=128, queries=64, warps=4, stages=2, fold=False, registers=None)
        return Tiling()


SHORT = Tiling(keys=64, queries=64, warps=4, stages=3, registers=None)
PIPELINED = Tiling(keys=256, queries=64, warps=8, stages=4, registers=None, pipelined=True)


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
        tiling = self.tiling or Tiling.default(self.q.dtype, self.q.shape[2], end, stride)
        sample = tiling.queries if stride == 1 else block
        numbers = (self.start, end, first, stride, -1 if extra is None else extra)
        if tiling.pipelined:
            if self._pipelines(end - first, heads, sample % tiling.queries):
                self._launch_pipelined(out, numbers, sample, extra is not None, tiling, block)
                return
            tiling = SHORT if end - first < _PIPELINED_CHUNK else tiling.without_pipeline(stride)
            sample = tiling.queries if stride == 1 else block
        self._launch(out, heads, numbers, sample, 0 if extra is None else -(-block // tiling.queries), tiling)

    def _pipelines(self, queries: int, heads: int, rest: int) -> bool:
        plain = self.softcap is None and (self.window is None or self.window >= self.start + self.q.shape[1])
        fits = heads == 1 and not rest and queries >= _PIPELINED_CHUNK and self.q.shape[2] <= 128
        return plain and fits and self.q.is_cuda and is_hopper(self.q.device) and self.q.dtype != torch.float32

    def _launch(
        self, out: Tensor, heads: int, numbers: tuple[int, ...], sample: int, extra_tiles: int, tiling: Tiling
    ) -> None:
        launch(
            (-(-numbers[1] // tiling.keys), self.q.shape[0] // heads, 1),
            (self.q, self.k, self.lse, out, self.lse, *eighths(self.q, self.k), self.lse.stride(0), out.stride(0),
             *numbers, 0, *factors(self.scale, self.softcap)),
            constants(
                self.q, self.k, tiling, packed=False, heads=heads, sample=sample, extra=extra_tiles,
                softcap=self.softcap is not None, window=self.window or 0,
            ),
            Options(tiling.warps, tiling.stages, tiling.registers),
        )  # fmt: skip

    def _launch_pipelined(
        self, out: Tensor, numbers: tuple[int, ...], sample: int, extra: bool, tiling: Tiling, block: int
    ) -> None:
        heads, _, head_dim = self.q.shape
        _pipelined_launcher()(
            (-(-numbers[1] // tiling.keys), heads, 1),
            (self.q, self.k, self.lse, out, *eighths(self.q, self.k), self.lse.stride(0), out.stride(0), *numbers,
             self.scale * _LOG2E),
            (heads // self.k.shape[0], head_dim, 64 if head_dim <= 64 else 128, tiling.keys, tiling.queries, sample,
             block // tiling.queries if extra else 0, tiling.stages, tiling.poly, tiling.ordered),
            Options(tiling.warps, tiling.stages, tiling.registers),
        )  # fmt: skip


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
        tiling.fold,
        tiling.poly,
        "ieee" if q.dtype == torch.float32 else "tf32",
        tiling.stages,
    )


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device has the matrix instructions of compute capability 9.0."""
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _pipelined_launcher() -> Launcher:
    from d2o.kernels.column_sums_hopper import pipelined_kernel

    return Launcher(pipelined_kernel)


def _sampled(position: int, stride: int, block: int) -> int:
    """How many sampled queries stand before a position."""
    return position // (block * stride) * block + min(position % (block * stride), block)
