"""Every sequence's compressed cache: rows of the page pool, when each layer is due, and what was done to it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o import budget
from d2o.attention import ScoreTarget
from d2o.compaction import compact
from d2o.config import D2OConfig, LayerBudgets, Policy
from d2o.pages import PagePool
from d2o_server.engine.memory import CacheShape, Reservation
from d2o_server.engine.types import CacheFacts, LayerCache
from d2o_server.worker.prompt_scores import PromptScores

_NEVER = 1 << 40
_PAGE_MULTIPLE_FROM = 8

_WINDOW_ONLY = D2OConfig.of(Policy.STREAMING, sinks=0, min_budget=1)


@dataclass(slots=True, eq=False)
class SequenceCache:
    """One sequence's place in the pool. ``merged`` and ``dropped`` are counts by layer, means over KV heads."""

    row: int
    config: D2OConfig
    budget: int
    prompt_tokens: int
    total_tokens: int
    scores: PromptScores | None
    merged: list[float]
    dropped: list[float]
    budgets: list[int] = field(default_factory=list)
    compressed: bool = False
    peak_pages: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheLengths:
    """Slots in use [layers, n] and tokens seen [n] of ``rows`` [n] at one moment."""

    rows: Tensor
    used: Tensor
    seen: Tensor


class CacheManager:
    """Owns the page pool and compresses what lives in it.

    ``limit`` [layers, rows] is the number of slots at which a layer is due for eviction, ``keep`` [layers, rows] the
    budget it goes back to, ``threshold`` [layers, rows, kv_heads] the moving similarity threshold (NaN: none yet).
    """

    def __init__(self, pool: PagePool, shape: CacheShape, query_heads: int) -> None:
        self.pool, self.shape, self.query_heads = pool, shape, query_heads
        layers, rows = pool.used.shape
        device = pool.device
        self.limit = torch.full((layers, rows), _NEVER, dtype=torch.int64, device=device)
        self.keep = torch.zeros((layers, rows), dtype=torch.int64, device=device)
        self.seen = torch.zeros(rows, dtype=torch.int64, device=device)
        self.threshold = torch.full((layers, rows, pool.kv_heads), torch.nan, device=device)
        self.by_row: dict[int, SequenceCache] = {}
        self._full = torch.tensor([i for i, w in enumerate(shape.windows) if w is None], dtype=torch.int64)
        self._sliding = torch.tensor([i for i, w in enumerate(shape.windows) if w is not None], dtype=torch.int64)
        self._windows = torch.tensor([w for w in shape.windows if w is not None], dtype=torch.int64)

    def open(self, reservation: Reservation, prompt_tokens: int, total_tokens: int) -> SequenceCache:
        """Takes a row for a sequence whose pages are reserved."""
        row = self.pool.open_row()
        config, layers = reservation.config, self.pool.layers
        self.limit[:, row] = _NEVER
        self.keep[:, row] = 0
        self.keep[self._sliding, row] = self._windows
        self.seen[row] = 0
        self.threshold[:, row] = torch.nan
        cache = SequenceCache(
            row,
            config,
            reservation.budget,
            prompt_tokens,
            total_tokens,
            PromptScores.stage(
                config, self.pool, self.query_heads, prompt_tokens, compresses=prompt_tokens > reservation.budget
            ),
            [0.0] * layers,
            [0.0] * layers,
        )
        if config.evicts_in_decode and config.enabled and prompt_tokens <= reservation.budget:
            self.limit[self._full, row] = reservation.budget + self.shape.slack(config)
        self.by_row[row] = cache
        return cache

    def close(self, cache: SequenceCache) -> None:
        """Gives everything back."""
        del self.by_row[cache.row]
        self.limit[:, cache.row] = _NEVER
        self.pool.close_row(cache.row)

    def targets(self, cache: SequenceCache) -> tuple[ScoreTarget | None, ...]:
        """Where the prefill of each layer adds its column sums."""
        scores = cache.scores
        return tuple(
            scores.target(layer) if scores is not None and window is None else None
            for layer, window in enumerate(self.shape.windows)
        )

    def append(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Takes ``counts[i]`` new slots in every layer of ``rows[i]``; returns flat slot rows [layers, tokens, heads].

        The new slots' positions follow on from what the sequence has seen; score and bias start at 0.
        """
        pool = self.pool
        pool.grow(rows, counts)
        owner = torch.arange(rows.numel(), device=pool.device).repeat_interleave(counts)
        nth = torch.arange(owner.numel(), device=pool.device) - (counts.cumsum(0) - counts)[owner]
        layers = torch.arange(pool.layers, device=pool.device)[:, None]
        slots = pool.slot_rows(layers, rows[owner], pool.used[:, rows][:, owner] + nth)
        flat = slots.flatten()
        positions = (self.seen[rows][owner] + nth).int()
        pool.position.view(-1)[flat] = positions[None, :, None].expand_as(slots).flatten()
        pool.score.view(-1)[flat] = 0.0
        pool.bias.view(-1)[flat] = 0.0
        pool.used[:, rows] += counts
        self.seen[rows] += counts
        held = pool.held[:, rows].sum(0).tolist()
        for row, pages in zip(rows.tolist(), held, strict=True):
            cache = self.by_row[row]
            cache.peak_pages = max(cache.peak_pages, pages)
        return slots

    def lengths(self, rows: Tensor) -> CacheLengths:
        """How much of each row is filled, for :meth:`take_back`."""
        return CacheLengths(rows, self.pool.used[:, rows], self.seen[rows])

    def take_back(self, before: CacheLengths) -> None:
        """Gives back the slots that rows took since ``before``, and their pages. Nothing was evicted since."""
        pool, rows = self.pool, before.rows
        pool.used[:, rows] = before.used
        self.seen[rows] = before.seen
        layers = torch.arange(pool.layers, device=pool.device)
        pool.release(layers.repeat_interleave(rows.numel()), rows.repeat(pool.layers))

    def restart_prompt(self, cache: SequenceCache) -> None:
        """Forgets the part of a prompt that was read, so that it can be read again from its start."""
        row = torch.tensor([cache.row], device=self.pool.device)
        self.take_back(CacheLengths(row, torch.zeros_like(self.pool.used[:, row]), torch.zeros_like(self.seen[row])))
        if cache.scores is not None:
            cache.scores.clear()

    def finish_prompt(self, cache: SequenceCache) -> int:
        """Compresses a prompt whose last chunk has run; returns the pages that the sequence can still need."""
        began = time.perf_counter()
        scores = cache.scores
        received = None if scores is None else scores.complete()
        if cache.config.enabled and cache.prompt_tokens > cache.budget:
            self._compress_full_layers(cache, received, None if scores is None else scores.window)
        elif received is not None and cache.config.evicts_in_decode:
            self._store_scores(cache.row, received)
        cache.scores = None
        self._trim_windows(cache)
        cache.seconds += time.perf_counter() - began
        return self.pages_needed(cache)

    def pages_needed(self, cache: SequenceCache) -> int:
        """Pages that the sequence can need from now on."""
        if not cache.compressed:
            return -1
        grows = cache.total_tokens - cache.prompt_tokens
        slack = self.shape.slack(cache.config) if cache.config.evicts_in_decode else grows
        total = 0
        for layer, window in enumerate(self.shape.windows):
            most = cache.budgets[layer] + slack if window is None else window + self.shape.page_size
            total += self.shape.pages(min(most, cache.total_tokens))
        return total

    def _group(self, received: Tensor) -> Tensor:
        """Sums query heads [..., heads, tokens] over their KV head: [..., kv_heads, tokens]."""
        heads, tokens = received.shape[-2:]
        grouped = received.view(*received.shape[:-2], self.pool.kv_heads, heads // self.pool.kv_heads, tokens)
        return grouped.sum(-2)

    def _store_scores(self, row: int, received: Tensor) -> None:
        """Writes a prompt's scores to its pages, for a compression that comes later in decode."""
        tokens = torch.arange(received.shape[-1], device=self.pool.device)
        rows = self.pool.slot_rows(self._full[:, None], torch.tensor(row), tokens)
        self.pool.score.view(-1)[rows] = self._group(received[self._full]).transpose(1, 2)

    def _compress_full_layers(self, cache: SequenceCache, received: Tensor | None, window: Tensor | None) -> None:
        """First compression of a sequence: budgets by layer, then eviction and merging down to them."""
        config, layers = cache.config, self._full
        cache.budgets = self._allocate(cache, received)
        cache.compressed = True
        rows = torch.full_like(layers, cache.row)
        self.keep[layers, cache.row] = torch.tensor([cache.budgets[i] for i in layers.tolist()])
        if received is not None:
            self._store_scores(cache.row, received)
        self._evict(layers, rows, config, window)
        if config.evicts_in_decode:
            self.limit[layers, cache.row] = self.keep[layers, cache.row] + self.shape.slack(config)

    def _allocate(self, cache: SequenceCache, received: Tensor | None) -> list[int]:
        """Budgets by layer in slots; 0 for sliding-window layers."""
        config, layers = cache.config, self._full.tolist()
        if config.layer_budgets is LayerBudgets.UNIFORM or received is None:
            densities = torch.zeros(len(layers))
        else:
            densities = torch.stack([budget.density(received[layer], config) for layer in layers])
        average, page = cache.budget, self.shape.page_size
        whole_pages = config.evict_interval is None and average >= _PAGE_MULTIPLE_FROM * page
        dense = tuple(layers.index(i) for i in config.dense_layers if i in layers)
        given = budget.allocate(
            densities,
            average=average,
            floor=max(config.sinks + 1, round(config.layer_floor * cache.prompt_tokens)),
            cap=cache.total_tokens,
            config=config.with_changes(dense_layers=dense),
            multiple=page if whole_pages else 1,
        )
        budgets = [0] * self.pool.layers
        for layer, slots in zip(layers, given, strict=True):
            budgets[layer] = slots
        return budgets

    def _trim_windows(self, cache: SequenceCache) -> None:
        """Frees what left the window of sliding-window layers, from now on whenever a page has left it.

        Not before the prompt is complete: until then every layer's slots must stay in order of position.
        """
        if not self._sliding.numel():
            return
        self.limit[self._sliding, cache.row] = self._windows + self.shape.page_size
        due = self.pool.used[self._sliding, cache.row] >= self.limit[self._sliding, cache.row]
        if bool(due.any()):
            layers = self._sliding[due]
            self._evict(layers, torch.full_like(layers, cache.row), _WINDOW_ONLY, None)

    def evict_due(self) -> None:
        """Evicts in every (layer, sequence) whose slack is full; called after a step's attention."""
        layers, rows = (self.pool.used >= self.limit).nonzero(as_tuple=True)
        if not rows.numel():
            return
        sliding = torch.zeros(self.pool.layers, dtype=torch.bool)
        sliding[self._sliding] = True
        is_sliding = sliding[layers]
        if bool(is_sliding.any()):
            self._evict(layers[is_sliding], rows[is_sliding], _WINDOW_ONLY, None)
        layers, rows = layers[~is_sliding], rows[~is_sliding]
        groups: dict[D2OConfig, list[int]] = {}
        for row in rows.unique().tolist():
            cache = self.by_row[row]
            if cache.compressed:
                groups.setdefault(cache.config, []).append(row)
            else:
                self._compress_late(cache)
        for config, members in groups.items():
            chosen = torch.isin(rows, torch.tensor(members))
            began = time.perf_counter()
            self._evict(layers[chosen], rows[chosen], config, None)
            share = (time.perf_counter() - began) / len(members)
            for row in members:
                self.by_row[row].seconds += share

    def _compress_late(self, cache: SequenceCache) -> None:
        """First compression of a sequence that started below its budget and has now reached it."""
        began = time.perf_counter()
        layers, row = self._full, cache.row
        used = int(self.pool.used[layers[0], row])
        slots = self.pool.slot_rows(layers[:, None], torch.tensor(row), torch.arange(used))
        received = torch.zeros(self.pool.layers, self.pool.kv_heads, used)
        received[layers] = self.pool.score.view(-1)[slots].transpose(1, 2)
        self._compress_full_layers(cache, received, None)
        cache.seconds += time.perf_counter() - began

    def _evict(self, layers: Tensor, rows: Tensor, config: D2OConfig, window: Tensor | None) -> None:
        """Brings each (layer, row) pair back to its ``keep``; ``window`` is [layers, kv_heads, prompt]."""
        result = compact(
            self.pool,
            layers,
            rows,
            keep=self.keep[layers, rows],
            seen=self.seen[rows],
            threshold=self.threshold[layers, rows],
            config=config,
            window=None if window is None else window[layers],
        )
        self.threshold[layers, rows] = result.threshold
        pairs = zip(layers.tolist(), rows.tolist(), result.merged.tolist(), result.dropped.tolist(), strict=True)
        for layer, row, merged, dropped in pairs:
            cache = self.by_row[row]
            cache.merged[layer] += merged
            cache.dropped[layer] += dropped

    def facts(self, cache: SequenceCache) -> CacheFacts:
        """What became of the sequence's tokens, layer by layer."""
        used = self.pool.used[:, cache.row].tolist()
        layers = tuple(
            LayerCache(
                budget=cache.budgets[i] if cache.budgets else 0,
                kept=used[i],
                merged=cache.merged[i],
                dropped=cache.dropped[i],
            )
            for i in range(self.pool.layers)
        )
        seen = int(self.seen[cache.row])
        reached = sum(used) / (seen * self.pool.layers) if seen else 1.0
        return CacheFacts(
            layers=layers, ratio_reached=reached, peak_pages=cache.peak_pages, compression_seconds=cache.seconds
        )
