"""Every sequence's compressed cache: rows of the page pool, when each layer is due, and what was done to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from d2o import budget
from d2o.attention import ScoreTarget
from d2o.config import D2OConfig, LayerBudgets, Policy
from d2o.recurrence import expect, slots_to_expect
from d2o_server.engine.memory import CacheShape, Reservation
from d2o_server.engine.messages import CacheState
from d2o_server.engine.types import CacheFacts, LayerCache
from d2o_server.worker.cache_ops import CacheOps, Fetched
from d2o_server.worker.cache_state import CacheLengths, Heard, SequenceCache
from d2o_server.worker.out_of_memory import is_out_of_memory
from d2o_server.worker.prompt_scores import PromptScores
from d2o_server.worker.ranks import Ranks

_NEVER = 1 << 40
_PAGE_MULTIPLE_FROM = 8

_WINDOW_ONLY = D2OConfig.of(Policy.STREAMING, sinks=0, min_budget=1)


class CacheManager:
    """Owns the lengths of all caches and decides when each is compressed, and to what; ``ops`` does it.

    On the host: ``limit`` [layers, rows] is the number of slots at which a layer is due for eviction, ``keep``
    [layers, rows] the budget it goes back to, ``seen`` [rows] the tokens of a sequence so far. Heads may be spread over
    ``ranks``, which hold the same number of slots: only densities depend on all of them.
    """

    def __init__(self, ops: CacheOps, shape: CacheShape, query_heads: int) -> None:
        self.ops, self.pool, self.shape, self.query_heads = ops, ops.pool, shape, query_heads
        layers, rows = self.pool.used.shape
        self.limit = torch.full((layers, rows), _NEVER, dtype=torch.int64)
        self.keep = torch.zeros((layers, rows), dtype=torch.int64)
        self.seen = torch.zeros(rows, dtype=torch.int64)
        self.by_row: dict[int, SequenceCache] = {}
        self.ranks = Ranks()
        self._full = torch.tensor([i for i, w in enumerate(shape.windows) if w is None], dtype=torch.int64)
        self._full_on_device = self._full.to(self.pool.device)
        self._sliding = torch.tensor([i for i, w in enumerate(shape.windows) if w is not None], dtype=torch.int64)
        self._windows = torch.tensor([w for w in shape.windows if w is not None], dtype=torch.int64)

    def open(self, reservation: Reservation, prompt: Sequence[int], total_tokens: int) -> SequenceCache:
        """Takes a row for a sequence whose pages are reserved."""
        row = self.pool.open_row()
        config = reservation.config
        self.limit[:, row] = _NEVER
        self.keep[:, row] = 0
        self.keep[self._sliding, row] = self._windows
        self.seen[row] = 0
        self.ops.reset(row)
        cache = SequenceCache(row, config, reservation.budget, prompt, total_tokens)
        if config.evicts_in_decode and config.enabled and len(prompt) <= reservation.budget:
            self.limit[self._full, row] = reservation.budget + self.shape.slack(config, reservation.budget)
        self.by_row[row] = cache
        return cache

    def close(self, cache: SequenceCache) -> None:
        """Gives everything back."""
        del self.by_row[cache.row]
        self.limit[:, cache.row] = _NEVER
        self.pool.close_row(cache.row)

    def targets(self, cache: SequenceCache) -> tuple[ScoreTarget | None, ...]:
        """Where the prefill of each layer adds its column sums; makes room for them when it is first asked."""
        if cache.scores is None:
            cache.scores = PromptScores.stage(
                cache.config,
                self.pool,
                self.query_heads,
                cache.prompt_tokens,
                compresses=cache.prompt_tokens > cache.budget,
            )
        scores = cache.scores
        return tuple(
            scores.target(layer) if scores is not None and window is None else None
            for layer, window in enumerate(self.shape.windows)
        )

    def append(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Takes ``counts[i]`` new slots in every layer of ``rows[i]``; returns what :meth:`CacheOps.clear_new` does.

        The new slots' positions follow on from what the sequence has seen; score and bias start at 0.
        """
        pool = self.pool
        pool.grow(rows, counts)
        slots = self.ops.clear_new(rows, counts, self.seen[rows])
        pool.used[:, rows] += counts
        self.seen[rows] += counts
        held = pool.held[:, rows].sum(0).tolist()
        for row, pages in zip(rows.tolist(), held, strict=True):
            cache = self.by_row[row]
            cache.peak_pages = max(cache.peak_pages, pages)
        return slots

    def newest_scores(self, layer: int, rows: Tensor) -> Tensor:
        """The scores [rows, kv_heads] of each row's newest slot in a layer."""
        return self.pool.score.view(-1)[self._newest(layer, rows)]

    def set_newest_scores(self, layer: int, rows: Tensor, scores: Tensor) -> None:
        """Writes what :meth:`newest_scores` gives."""
        self.pool.score.view(-1)[self._newest(layer, rows)] = scores

    def _newest(self, layer: int, rows: Tensor) -> Tensor:
        pool = self.pool
        return pool.slot_rows(torch.tensor(layer), rows, pool.used[layer, rows] - 1).to(pool.device)

    def lengths(self, rows: Tensor) -> CacheLengths:
        """How much of each row is filled, for :meth:`take_back`."""
        return CacheLengths(rows, self.pool.used[:, rows], self.seen[rows])

    def take_back(self, before: CacheLengths) -> None:
        """Gives back the slots that rows took since ``before``, and their pages. Nothing was evicted since."""
        pool, rows = self.pool, before.rows
        pool.used[:, rows] = before.used
        self.seen[rows] = before.seen
        layers = torch.arange(pool.layers)
        pool.release(layers.repeat_interleave(rows.numel()), rows.repeat(pool.layers))

    def restart_prompt(self, cache: SequenceCache) -> None:
        """Forgets the part of a prompt that was read, so that it can be read again from its start."""
        row = torch.tensor([cache.row])
        self.take_back(CacheLengths(row, torch.zeros_like(self.pool.used[:, row]), torch.zeros_like(self.seen[row])))
        if cache.scores is not None:
            cache.scores.clear()

    def hear_prompts(self, caches: list[SequenceCache]) -> None:
        """Has the device say what the budgets of prompts depend on whose last chunk was launched; nobody waits.

        Before :meth:`finish_prompt`; what the prompts' ends lead to expect is looked for while the device works.
        """
        due = [cache for cache in caches if self.compresses(cache)]
        if not due:
            return
        with self._timed(due):
            fetched = self._hear(due, [self._received(cache) for cache in due])
        for place, cache in enumerate(due):
            cache.heard = Heard(fetched, place)
            if cache.scores is not None and cache.scores.window is not None:
                cache.expected = slots_to_expect(cache.prompt, cache.budget, cache.config)

    def finish_prompt(self, cache: SequenceCache) -> int:
        """Compresses a prompt whose last chunk was launched; returns the pages that the sequence can still need.

        The host waits for that chunk where the prompt :meth:`compresses`.
        """
        if self.compresses(cache) and cache.heard is None:
            self.hear_prompts([cache])
        densities = None if cache.heard is None else cache.heard.densities()
        with self._timed([cache]):
            if densities is not None:
                self._fix_budgets(cache, densities)
            received = self._received(cache)
            if received is not None and (cache.compressed or cache.config.evicts_in_decode):
                self.ops.store_scores(self._full, cache.row, self._group(received))
            if cache.compressed:
                scores, layers = cache.scores, self._full
                window = None if scores is None or scores.window is None else self._of_full_layers(scores.window)
                if window is not None:
                    expect(window, cache.expected, self.query_heads // self.pool.kv_heads, cache.config)
                self._evict(layers, torch.full_like(layers, cache.row), cache.config, window)
            cache.scores, cache.heard, cache.expected = None, None, []
            self._trim_windows(cache)
        cache.prompt_spans = len(cache.spans) if cache.compressed else 0
        return self.pages_needed(cache)

    @staticmethod
    def compresses(cache: SequenceCache) -> bool:
        """Whether its prompt is compressed once it has been read."""
        return cache.config.enabled and cache.prompt_tokens > cache.budget

    def _received(self, cache: SequenceCache) -> Tensor | None:
        """The attention [full layers, heads, prompt] that a complete prompt's tokens received, if it was counted."""
        return None if cache.scores is None else self._of_full_layers(cache.scores.complete())

    @contextmanager
    def _timed(self, caches: list[SequenceCache]) -> Iterator[None]:
        """Charges what happens inside to ``caches`` in equal shares."""
        span = self.ops.span()
        yield
        span.stop()
        for cache in caches:
            cache.spans.append((span, 1 / len(caches)))

    def pages_needed(self, cache: SequenceCache) -> int:
        """Pages that the sequence can need from now on."""
        if not cache.compressed:
            return -1
        grows = cache.total_tokens - cache.prompt_tokens
        slack = self.shape.slack(cache.config, cache.budget) if cache.config.evicts_in_decode else grows
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

    def _of_full_layers(self, values: Tensor) -> Tensor:
        """``values`` [layers, ...] of the layers that compression applies to."""
        if not self._sliding.numel():
            return values
        return values[self._full if values.device == self._full.device else self._full_on_device]

    def _hear(self, caches: list[SequenceCache], received: Sequence[Tensor | None]) -> Fetched:
        """The densities [caches, full layers] of the attention [full layers, heads, tokens] received.

        Budgets depend on them, so whoever fixes those waits for the device: once for all of them.
        """
        none = torch.zeros(self._full.numel(), device=self.pool.device)
        pairs = zip(caches, received, strict=True)
        of_all = [none if of is None else self._densities(of, cache.config) for cache, of in pairs]
        return self.ops.fetch(torch.stack(of_all))

    def _fix_budgets(self, cache: SequenceCache, densities: Tensor) -> None:
        """Fixes what each layer of a cache goes back to from now on."""
        layers = self._full
        cache.budgets = self._allocate(cache, densities)
        cache.compressed = True
        self.keep[layers, cache.row] = torch.tensor([cache.budgets[i] for i in layers.tolist()])
        if cache.config.evicts_in_decode:
            self.limit[layers, cache.row] = self.keep[layers, cache.row] + self.shape.slack(cache.config, cache.budget)

    def _densities(self, received: Tensor, config: D2OConfig) -> Tensor:
        """The density [full layers] of all ranks' heads."""
        if config.layer_budgets is LayerBudgets.UNIFORM:
            return received.new_zeros(len(received))
        return budget.density_of(self.ranks.all_heads(budget.by_head(received, config)), config)

    def _allocate(self, cache: SequenceCache, densities: Tensor) -> list[int]:
        """Budgets by layer in slots; 0 for sliding-window layers."""
        config, layers = cache.config, self._full.tolist()
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

    def must_wait(self) -> bool:
        """Whether budgets are about to be fixed in :meth:`evict_due`."""
        due = self._of_full_layers(self.pool.used) >= self._of_full_layers(self.limit)
        return any(not self.by_row[row].compressed for row in due.any(0).nonzero().flatten().tolist())

    def evict_due(self) -> set[int]:
        """Evicts in every (layer, sequence) whose slack is full; called after a step's attention.

        Returns the rows that memory ran out for: what was to be moved there may have been, in part. Close them.
        """
        layers, rows = (self.pool.used >= self.limit).nonzero(as_tuple=True)
        lost: set[int] = set()
        if not rows.numel():
            return lost
        sliding = torch.zeros(self.pool.layers, dtype=torch.bool)
        sliding[self._sliding] = True
        is_sliding = sliding[layers]
        if bool(is_sliding.any()):
            windows = partial(self._evict, layers[is_sliding], rows[is_sliding], _WINDOW_ONLY, None)
            lost |= self._lost_by(windows, rows[is_sliding])
        layers, rows = layers[~is_sliding], rows[~is_sliding]
        caches = [self.by_row[row] for row in rows.unique().tolist()]
        lost |= self._compress_late([cache for cache in caches if not (cache.compressed or cache.row in lost)])
        groups: dict[D2OConfig, list[SequenceCache]] = {}
        for cache in caches:
            if cache.row not in lost:
                groups.setdefault(cache.config, []).append(cache)
        for config, members in groups.items():
            chosen = torch.isin(rows, torch.tensor([cache.row for cache in members]))
            evict = partial(self._evict, layers[chosen], rows[chosen], config, None)
            with self._timed(members):
                lost |= self._lost_by(evict, rows[chosen])
        return lost

    def _lost_by(self, evict: Callable[[], None], rows: Tensor) -> set[int]:
        """The rows among which ``evict`` ran out of memory: none or all."""
        try:
            evict()
        except Exception as error:
            if not self.survives(error):
                raise
            return set(rows.tolist())
        return set()

    def survives(self, error: Exception) -> bool:
        """Whether memory ran out and only this process knows: other ranks go on with what fails here."""
        return self.ranks.count == 1 and is_out_of_memory(error)

    def _compress_late(self, caches: list[SequenceCache]) -> set[int]:
        """Fixes the budgets of sequences that started below them and have reached them now, in all layers at once.

        Returns the rows that memory ran out for, each tried by itself.
        """
        if not caches:
            return set()
        lost = self._lost_by(partial(self._fix_late, caches), torch.tensor([cache.row for cache in caches]))
        if not lost or len(caches) == 1:
            return lost
        return set().union(*(self._compress_late([cache]) for cache in caches))

    def _fix_late(self, caches: list[SequenceCache]) -> None:
        with self._timed(caches):
            used = self.pool.used[self._full[0]].tolist()
            received = [self.ops.read_scores(self._full, cache.row, used[cache.row]) for cache in caches]
            (densities,) = self._hear(caches, received).wait()
            for cache, of in zip(caches, densities, strict=True):
                self._fix_budgets(cache, of)

    def _evict(self, layers: Tensor, rows: Tensor, config: D2OConfig, window: Tensor | None) -> None:
        """Brings each (layer, row) pair that holds more back to its ``keep``; ``window``: [pairs, kv_heads, prompt]."""
        self.ops.evict(
            layers,
            rows,
            keep=self.keep[layers, rows],
            seen=self.seen[rows],
            config=config,
            window=window,
        )

    def state(self) -> CacheState:
        """What all open caches hold at this moment."""
        compressed = [cache.row for cache in self.by_row.values() if cache.compressed]
        budgets = self.keep[:, compressed].double().mean(1).tolist() if compressed else [0.0] * self.pool.layers
        return CacheState(
            tokens=int(self.seen[list(self.by_row)].sum()),
            compressed=len(compressed),
            slots=tuple(self.pool.used.sum(1).tolist()),
            budgets=tuple(budgets),
        )

    def facts(self, cache: SequenceCache) -> CacheFacts:
        """What became of the sequence's tokens, layer by layer."""
        used = self.pool.used[:, cache.row].tolist()
        fates = self.ops.fates(cache.row)
        merged, dropped = map(self.ranks.mean, fates) if cache.config.enabled else fates
        layers = tuple(
            LayerCache(
                budget=cache.budgets[i] if cache.budgets else 0,
                kept=used[i],
                merged=merged[i],
                dropped=dropped[i],
            )
            for i in range(self.pool.layers)
        )
        seen = int(self.seen[cache.row])
        reached = sum(used) / (seen * self.pool.layers) if seen else 1.0
        seconds = [share * span.seconds() for span, share in cache.spans]
        return CacheFacts(
            layers=layers,
            ratio_reached=reached,
            peak_pages=cache.peak_pages,
            compression_seconds=sum(seconds),
            prompt_compression_seconds=sum(seconds[: cache.prompt_spans]),
        )
