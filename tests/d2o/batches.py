"""Random ragged batches of caches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.compressor import Compressed, Slots, compress
from d2o.config import D2OConfig


@dataclass(frozen=True)
class Batch:
    """Rows that have seen more tokens than they hold, with garbage (NaN) in their padding."""

    slots: Slots
    seen: Tensor
    window: Tensor
    threshold: Tensor

    def compress(self, keep: Tensor, config: D2OConfig, windowed: bool = True) -> Compressed:
        window = self.window if windowed else None
        return compress(self.slots, keep=keep, seen=self.seen, config=config, threshold=self.threshold, window=window)

    def row(self, index: int) -> Batch:
        """One row alone, without padding."""
        part, used = slice(index, index + 1), int(self.slots.used[index])
        s = self.slots
        slots = Slots(
            k=s.k[part, :, :used],
            v=s.v[part, :, :used],
            score=s.score[part, :, :used],
            position=s.position[part, :, :used],
            bias=s.bias[part, :, :used],
            used=s.used[part],
        )
        return Batch(slots, self.seen[part], self.window[part, :, :used], self.threshold[part])


def random_batch(
    used: list[int],
    *,
    heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    gap: int = 3,
    dtype: torch.dtype = torch.float32,
    began: bool = False,
    shared_positions: bool = False,
) -> Batch:
    """Each head holds ``used[row]`` random positions, sinks and the last token among them, of ``used + gap`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(used), max(used) + 2
    k, v = (torch.full((rows, heads, width, dim), math.nan) for _ in "kv")
    score, bias, window = (torch.full((rows, heads, width), math.nan) for _ in range(3))
    position = torch.full((rows, heads, width), 7, dtype=torch.int32)
    for row, count in enumerate(used):
        shape = (heads, count)
        # A common direction makes similarities high enough for some to pass a threshold.
        k[row, :, :count] = torch.randn(*shape, dim, generator=generator) + 1
        v[row, :, :count] = torch.randn(*shape, dim, generator=generator)
        score[row, :, :count] = torch.rand(shape, generator=generator) + 0.01
        window[row, :, :count] = torch.rand(shape, generator=generator)
        bias[row, :, :count] = torch.rand(shape, generator=generator) * 0.3
        for head in range(heads):
            if head == 0 or not shared_positions:
                fixed = min(4, count - 1)
                chosen = torch.randperm(count + gap - 1 - fixed, generator=generator)[: count - 1 - fixed] + fixed
                places = torch.cat([torch.arange(fixed), chosen.sort().values, torch.tensor([count + gap - 1])])
            position[row, head, :count] = places.int()
    slots = Slots(k=k.to(dtype), v=v.to(dtype), score=score, position=position, bias=bias, used=torch.tensor(used))
    threshold = torch.full((rows, heads), 0.6 if began else math.nan)
    return Batch(slots, torch.tensor(used) + gap, window, threshold)
