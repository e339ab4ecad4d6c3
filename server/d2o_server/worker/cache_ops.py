"""What the cache manager has done to tokens: the part of it that touches keys, values and scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d2o.compaction import compact
from d2o.config import D2OConfig
from d2o.pages import PagePool
from d2o.ragged import ragged_indices

NO_THRESHOLD = torch.nan


class Span(Protocol):
    """A stretch of work, timed where it ran."""

    def stop(self) -> None: ...

    def seconds(self) -> float: ...


class Fetched(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> tuple[Tensor, ...]: ...


class CacheOps(Protocol):
    """Work on the tokens of a pool's rows. Lengths are the host's: every size is known before the work is done.

    ``layers`` and ``rows`` are [pairs] int64 on the host, ``keep`` and ``seen`` [pairs] likewise.
    """

    pool: PagePool

    def reset(self, row: int) -> None:
        """Forgets what is known of the row's former owner."""
        ...

    def clear_new(self, rows: Tensor, counts: Tensor, seen: Tensor) -> Tensor:
        """Prepares ``counts[i]`` new slots of ``rows[i]``, at positions from ``seen[i]`` on, in every layer.

        Returns the flat slot rows [layers, tokens, kv_heads] to write to, or nothing where attention finds them.
        """
        ...

    def evict(
        self, layers: Tensor, rows: Tensor, *, keep: Tensor, seen: Tensor, config: D2OConfig, window: Tensor | None
    ) -> None:
        """Brings each (layer, row) pair down to ``keep`` slots; lengths and pages of the pool are updated.

        ``window`` is [pairs, kv_heads, prompt] where a prompt is compressed.
        """
        ...

    def store_scores(self, layers: Tensor, row: int, received: Tensor) -> None:
        """Writes ``received`` [layers, kv_heads, tokens] to the first slots of a row."""
        ...

    def read_scores(self, layers: Tensor, row: int, slots: int) -> Tensor:
        """The scores [layers, kv_heads, slots] of a row's first slots."""
        ...

    def fates(self, row: int) -> tuple[list[float], list[float]]:
        """Tokens merged and dropped in each layer, means over KV heads."""
        ...

    def fetch(self, values: Tensor) -> Fetched:
        """Has ``values`` come to the host, behind the work that was launched already."""
        ...

    def span(self) -> Span:
        """Starts a stopwatch."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """Tensors that are on the host."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.tensors


class HostSpan:
    """A span of this process's own time."""

    __slots__ = ("_began", "_seconds")

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._began

    def seconds(self) -> float:
        return self._seconds


class TorchCacheOps:
    """The method in plain torch, for CPUs.

    ``threshold`` [layers, rows, kv_heads] is the moving similarity threshold (NaN: none yet).
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        layers, rows = pool.used.shape
        self.threshold = torch.full((layers, rows, pool.kv_heads), NO_THRESHOLD)
        self._merged = torch.zeros(layers, rows, dtype=torch.float64)
        self._dropped = torch.zeros_like(self._merged)

    def reset(self, row: int) -> None:
        self.threshold[:, row] = NO_THRESHOLD
        self._merged[:, row] = 0
        self._dropped[:, row] = 0

    def clear_new(self, rows: Tensor, counts: Tensor, seen: Tensor) -> Tensor:
        pool = self.pool
        owner, nth = ragged_indices(counts)
        layers = torch.arange(pool.layers)[:, None]
        slots = pool.slot_rows(layers, rows[owner], pool.used[:, rows][:, owner] + nth)
        flat = slots.flatten()
        positions = (seen[owner] + nth).int()
        pool.position.view(-1)[flat] = positions[None, :, None].expand_as(slots).flatten()
        pool.score.view(-1)[flat] = 0.0
        pool.bias.view(-1)[flat] = 0.0
        return slots

    def evict(
        self, layers: Tensor, rows: Tensor, *, keep: Tensor, seen: Tensor, config: D2OConfig, window: Tensor | None
    ) -> None:
        threshold = self.threshold[layers, rows]
        result = compact(
            self.pool, layers, rows, keep=keep, seen=seen, threshold=threshold, config=config, window=window
        )
        self.threshold[layers, rows] = result.threshold
        self._merged[layers, rows] += result.merged
        self._dropped[layers, rows] += result.dropped

    def store_scores(self, layers: Tensor, row: int, received: Tensor) -> None:
        tokens = torch.arange(received.shape[-1])
        rows = self.pool.slot_rows(layers[:, None], torch.tensor(row), tokens)
        self.pool.score.view(-1)[rows] = received.transpose(1, 2)

    def read_scores(self, layers: Tensor, row: int, slots: int) -> Tensor:
        rows = self.pool.slot_rows(layers[:, None], torch.tensor(row), torch.arange(slots))
        return self.pool.score.view(-1)[rows].transpose(1, 2)

    def fates(self, row: int) -> tuple[list[float], list[float]]:
        return self._merged[:, row].tolist(), self._dropped[:, row].tolist()

    def fetch(self, values: Tensor) -> Fetched:
        return Here((values,))

    def span(self) -> Span:
        return HostSpan()
