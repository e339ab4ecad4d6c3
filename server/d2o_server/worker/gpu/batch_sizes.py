"""Which batch sizes are worth a captured decode step, and whose matrix products each is captured with.

What a product costs does not always grow with its rows: libraries choose among kernels by rules of thumb, so at some
sizes a padded batch is the quicker one, and NVIDIA's two libraries choose differently. That goes for the largest batch
too: it may be padded to more sequences than ever run at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from d2o_server.worker.gpu.model import SharedProjection
from d2o_server.worker.tensor_parallel import GatheredLinear, RowwiseLinear

LIBRARIES = ("cublas", "cublaslt")
"""As torch names them; the first is the one that it uses by itself."""

_ROUNDS = 5
# Of a product that keeps the device busy for half a millisecond, so that the host is ahead when what is timed begins.
_BUSY_PRODUCTS, _MOST_BUSY_VALUES = 1.5e11, 1 << 26
_WEIGHTS_A_SHAPE = 4
# What a sequence of padding costs a layer's attention and elementwise kernels.
_ROW_SECONDS = 3e-8
_WORTH = 0.01


@dataclass(frozen=True, slots=True)
class BatchSize:
    """A batch size to capture: rows, and the library whose products are quickest at so many."""

    rows: int
    library: str = LIBRARIES[0]


@contextmanager
def multiplying_by(library: str) -> Iterator[None]:
    """Has torch multiply by one of ``LIBRARIES`` on the GPU; a captured graph keeps the one it was captured with."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def candidates(most: int) -> list[int]:
    """Sizes to capture decode steps of up to ``most`` sequences for, ascending; 1 shares the compiled code of 2."""
    top = largest(most)
    below = [2, 4, *range(8, 256, 8), *range(256, most, 16)]
    above = range(-(-most // 8) * 8, top + 1, 8)
    return sorted({size for size in (*below, max(2, most), *above) if 2 <= size <= top})


def largest(most: int) -> int:
    """Rows of the largest batch that a step of up to ``most`` sequences may be padded to: an eighth more."""
    return max(2, most + most // 8)


def worth_capturing(sizes: Sequence[int], seconds: Mapping[str, Sequence[float]], most: int) -> list[BatchSize]:
    """Those of ``sizes``, ascending, that save a hundredth of their seconds over padding to the next.

    Of those that hold ``most`` rows only the quickest is among them, the last. ``seconds`` is by library, then by
    size; another library than torch's own must save a hundredth, too.
    """
    kept: list[BatchSize] = []
    least = float("inf")
    for nth in reversed(range(len(sizes))):
        library = LIBRARIES[0]
        for other in LIBRARIES[1:]:
            if seconds[other][nth] < seconds[library][nth] * (1 - _WORTH):
                library = other
        cost = seconds[library][nth]
        if cost < least * (1 - _WORTH):
            kept.append(BatchSize(sizes[nth], library))
            least = cost
    enough = next(nth for nth, size in enumerate(reversed(kept)) if size.rows >= most)
    return kept[::-1][: enough + 1]


@torch.inference_mode()
def product_seconds(model: nn.Module, sizes: Sequence[int], layers: int, library: str = LIBRARIES[0]) -> list[float]:
    """How long the matrix products of a decode step take for each number of rows, and what padding rows cost besides.

    Measured on weights that are not in the cache: several of each shape in turn.
    """
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for weight in multiplied_weights(model):
        by_shape[weight.shape].append(weight)
    with multiplying_by(library):
        return [
            layers * size * _ROW_SECONDS + sum(len(group) * _seconds(group, size) for group in by_shape.values())
            for size in sizes
        ]


def multiplied_weights(model: nn.Module) -> list[Tensor]:
    """The weights that a step multiplies by, each once; of a split model this rank's."""
    linear = nn.Linear | SharedProjection | RowwiseLinear | GatheredLinear
    found = (module.weight for module in model.modules() if isinstance(module, linear))
    return list({id(weight): weight for weight in found}.values())


def _seconds(weights: list[Tensor], rows: int) -> float:
    """Of one product, the best of a few rounds; the first has the library choose."""
    some = weights[:_WEIGHTS_A_SHAPE]
    outputs, inputs = some[0].shape
    x = torch.randn(rows, inputs, dtype=some[0].dtype, device=some[0].device)
    for weight in some:
        nn.functional.linear(x, weight)
    busy_rows = int(min(_BUSY_PRODUCTS / (outputs * inputs), _MOST_BUSY_VALUES / max(outputs, inputs))) + 1
    nn.functional.linear(x.new_zeros(busy_rows, inputs), some[0])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
    for mark in marks[:-1]:
        mark.record()
        for weight in some:
            nn.functional.linear(x, weight)
    marks[-1].record()
    marks[-1].synchronize()
    best: float = min(begin.elapsed_time(end) for begin, end in pairwise(marks))
    return best / 1000 / len(some)
