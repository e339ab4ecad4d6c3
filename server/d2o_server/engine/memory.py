"""How many pages a request can ever need, known before it starts, and the ledger of what was promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from d2o.config import D2OConfig, Policy
from d2o_server.errors import InvalidRequest

MOST_SLACK = 64
"""Slots of a layer's slack by default: as many as one program of decode eviction's kernels takes (docs/adr/0024)."""

_BUDGET_TO_SLACK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What the bound depends on. ``windows`` has each layer's sliding window, or None for full attention."""

    windows: tuple[int | None, ...]
    page_size: int

    @property
    def full_layers(self) -> int:
        """Layers that compression applies to; a sliding-window layer keeps its window."""
        return sum(window is None for window in self.windows)

    def pages(self, slots: int) -> int:
        """Pages that hold this many slots."""
        return -(-slots // self.page_size)

    def slack(self, config: D2OConfig, budget: int) -> int:
        """Slots that a layer may hold above its budget between evictions.

        By default as many whole pages as fit a 64th of the average budget, up to ``MOST_SLACK`` slots, one at least:
        all of a layer is read for an eviction, however few slots it takes.
        """
        pages = max(1, min(MOST_SLACK, budget // _BUDGET_TO_SLACK) // self.page_size)
        return config.evict_interval or pages * self.page_size


class Demand(NamedTuple):
    """Pages that a request will hold at the least and at the most: not the same only where auto may choose."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Pages a sequence may hold: ``peak`` while its prompt is staged, ``resident`` afterwards.

    ``config`` is the policy in force: ``none`` where the budget covers all that the sequence can become, and where
    every layer has a sliding window.
    ``budget`` is the average budget a layer in slots, 0 with the full cache.
    """

    peak: int
    resident: int
    config: D2OConfig
    budget: int

    @property
    def pages(self) -> int:
        """What admission reserves."""
        return max(self.peak, self.resident)


def reserve(shape: CacheShape, config: D2OConfig, prompt_tokens: int, max_new_tokens: int) -> Reservation:
    """Bounds the pages of a request before it starts (DESIGN, a request's life).

    Raises:
        InvalidRequest: dense layers alone need more than the whole budget, or name layers that do not exist.
    """
    total = prompt_tokens + max_new_tokens
    budget = config.average_budget(prompt_tokens)
    if not config.enabled or not shape.full_layers or budget >= total:
        config, budget = config.with_changes(policy=Policy.NONE), 0
    peak = len(shape.windows) * shape.pages(prompt_tokens)
    sliding = sum(shape.pages(min(total, window + shape.page_size)) for window in shape.windows if window is not None)
    whole = shape.full_layers * shape.pages(total)
    if not config.enabled:
        return Reservation(peak=peak, resident=sliding + whole, config=config, budget=0)
    _check_dense_layers(shape, config, total, budget)
    grows = shape.slack(config, budget) if config.evicts_in_decode else max_new_tokens
    # Every layer's budget + slack is rounded up to a page: at most page_size - 1 slots each beyond the exact sum.
    bound = shape.full_layers * (budget + grows + shape.page_size - 1) // shape.page_size
    return Reservation(peak=peak, resident=sliding + min(whole, bound), config=config, budget=budget)


def _check_dense_layers(shape: CacheShape, config: D2OConfig, total: int, budget: int) -> None:
    layers = len(shape.windows)
    if any(layer >= layers for layer in config.dense_layers):
        raise InvalidRequest("compression.dense_layers", config.dense_layers, f"layers from 0 to {layers - 1}")
    dense = sum(shape.windows[layer] is None for layer in config.dense_layers)
    sparse = shape.full_layers - dense
    least = config.sinks + 1
    if dense * total + sparse * least > shape.full_layers * budget:
        raise InvalidRequest(
            "compression.dense_layers",
            f"{config.dense_layers} with an average budget of {budget} slots",
            f"a budget whose total of {shape.full_layers * budget} slots holds {dense} layers of {total} tokens"
            f" and {least} slots in each other layer",
        )


class PageLedger:
    """Pages promised out of a fixed total. Plain integers; the pool itself belongs to the worker."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.reserved = 0

    @property
    def unreserved(self) -> int:
        return self.total - self.reserved

    def fits(self, pages: int) -> bool:
        return pages <= self.unreserved

    def take(self, pages: int) -> None:
        """Promises ``pages``; the caller has checked that they fit."""
        if pages > self.unreserved:
            raise AssertionError(f"{pages} pages promised with {self.unreserved} unreserved")
        self.reserved += pages

    def give_back(self, pages: int) -> None:
        """Takes back a promise of ``pages``."""
        if pages > self.reserved:
            raise AssertionError(f"{pages} pages given back of {self.reserved} reserved")
        self.reserved -= pages
