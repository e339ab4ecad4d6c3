"""Random page pools whose pairs hold random caches, with NaN wherever nothing is held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from d2o.config import D2OConfig
from d2o.kernels.evict import evict_in_place, pairs_of
from d2o.kernels.history import History
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pairs import Pairs
from d2o.kernels.reference import evict as twin
from d2o.kernels.reference.evict import Evicted
from tests.d2o.batches import random_batch

# What had become of each row's tokens before.
_BEFORE = 4.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """Pairs of one call; ``window`` is None where slots are shuffled."""

    pool: PagedTensors
    block_table: Tensor
    layers: Tensor
    rows: Tensor
    used: Tensor
    keep: Tensor
    seen: Tensor
    threshold: Tensor
    window: Tensor | None

    def copy(self) -> Case:
        return replace(self, pool=PagedTensors(*(getattr(self.pool, f.name).clone() for f in fields(self.pool))))

    def arguments(self, config: D2OConfig) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"config": config}

    def evict(self, config: D2OConfig, **more: Any) -> Evicted:
        history, others = self.history(), self.others()
        arguments = self.arguments(config) | {"history": history}
        del arguments["threshold"]
        evict_in_place(**arguments, **more)
        assert history.threshold.isnan()[others].all()
        assert (history.fates[:, others] == _BEFORE).all()
        merged, dropped = history.fates[:, self.layers, self.rows] - _BEFORE
        return Evicted(history.threshold[self.layers, self.rows], merged, dropped)

    def history(self) -> History:
        """The pairs' thresholds, and fates that are not the first; no other row had an eviction."""
        layers, rows = self.block_table.shape[:2]
        history = History.empty(layers, rows, self.pool.kv_heads, self.pool.device)
        history.threshold[self.layers, self.rows] = self.threshold
        history.fates.fill_(_BEFORE)
        return history

    def others(self) -> Tensor:
        """[layers, rows] bool, where none of the pairs is."""
        others = torch.ones(self.block_table.shape[:2], dtype=torch.bool, device=self.pool.device)
        others[self.layers, self.rows] = False
        return others

    def evict_by_twin(self, config: D2OConfig) -> Evicted:
        return twin.evict_in_place(**self.arguments(config))

    def pairs(self, config: D2OConfig) -> Pairs:
        names = ("pool", "block_table", "layers", "rows", "used", "keep", "seen")
        return pairs_of(**{name: getattr(self, name) for name in names}, config=config)

    @property
    def tables(self) -> Tensor:
        return self.block_table[self.layers, self.rows]

    def survivors(self, pair: int) -> dict[str, Tensor]:
        """The first ``keep`` slots of a pair in ascending position, [kv_heads, keep, ...]."""
        left = int(self.keep[pair])
        slots = twin.slots_of(self.pool, self.tables, self.used)
        position = slots.position[pair, :, :left]
        order = position.argsort(-1)
        out = {}
        for name in ("k", "v", "score", "position", "bias"):
            values = getattr(slots, name)[pair, :, :left]
            index = order.view(*order.shape, *[1] * (values.dim() - 2)).expand_as(values)
            out[name] = values.gather(1, index)
        return out


def random_case(
    used: Sequence[int],
    keep: Sequence[int],
    *,
    heads: int = 2,
    dim: int = 32,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shuffled: bool = False,
    began: bool = False,
    shared: bool = False,
    pages_beside: int = 5,
) -> Case:
    """Pairs with ``used`` slots in pages that are scattered over the pool.

    ``shuffled``: slots in a random order of each head (``shared``: of all), and no window; else in ascending
    position. ``began``: not the first eviction.
    """
    count = len(used)
    batch = random_batch(list(used), heads=heads, dim=dim, seed=seed, dtype=dtype, began=began, shared_positions=shared)
    generator = torch.Generator().manual_seed(seed + 1)
    wide = -(-max(used) // page) + 1
    held = [-(-each // page) for each in used]
    total = sum(held) + pages_beside
    scattered = torch.randperm(total, generator=generator).int()
    block_table = torch.randint(0, total, (3, count + 1, wide), generator=generator, dtype=torch.int32)
    layers, rows = torch.arange(count) % 3, torch.randperm(count + 1, generator=generator)[:count]
    empty = (total, heads, page)
    pool = PagedTensors(
        k=torch.full((*empty, dim), math.nan, dtype=dtype),
        v=torch.full((*empty, dim), math.nan, dtype=dtype),
        score=torch.full(empty, math.nan),
        position=torch.full(empty, 3, dtype=torch.int32),
        bias=torch.full(empty, math.nan),
    )
    taken = 0
    for pair in range(count):
        pages = scattered[taken : taken + held[pair]]
        taken += held[pair]
        block_table[layers[pair], rows[pair], : held[pair]] = pages
        for head in range(heads):
            if head == 0 or not shared:
                slot = torch.randperm(used[pair], generator=generator) if shuffled else torch.arange(used[pair])
            for name in ("k", "v", "score", "position", "bias"):
                store = getattr(pool, name)
                store[pages[slot // page].long(), head, slot % page] = getattr(batch.slots, name)[
                    pair, head, : used[pair]
                ]
    return Case(
        pool=PagedTensors(*(getattr(pool, f.name).to(DEVICE) for f in fields(pool))),
        block_table=block_table.to(DEVICE),
        layers=layers,
        rows=rows,
        used=torch.tensor(used),
        keep=torch.tensor(keep),
        seen=batch.seen,
        threshold=batch.threshold.to(DEVICE),
        window=None if shuffled else batch.window[..., : max(used)].nan_to_num(5.0).to(DEVICE).contiguous(),
    )
