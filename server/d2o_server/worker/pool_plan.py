"""What a page pool looks like for a model and an operator's settings, whatever its size turns out to be."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from d2o.pages import PagePool
from d2o_server.engine.messages import WorkerSettings
from d2o_server.engine.shape import ModelShape
from d2o_server.errors import SettingsError
from d2o_server.worker.ranks import Ranks
from d2o_server.worker.warm_up import OUTPUT, PROMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """``max_model_len``: most tokens of one sequence; ``page_bytes``: the size of a page with all that is in it.

    ``shape`` has the heads of this rank among ``ranks``.
    """

    settings: WorkerSettings
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    page_bytes: int
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def of(
        cls,
        settings: WorkerSettings,
        shape: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> PoolPlan:
        return cls(
            settings=settings,
            shape=shape,
            dtype=dtype,
            device=device,
            max_model_len=min(settings.max_model_len or shape.max_positions, shape.max_positions),
            page_bytes=PagePool.bytes_per_page(shape.kv_heads, shape.head_dim, settings.page_size, dtype),
            ranks=ranks or Ranks(),
        )

    def checked(self, pages: int) -> int:
        """``pages``, or fewer where another rank has room for fewer, if they hold the shortest request.

        Raises:
            SettingsError: they do not.
        """
        pages = self.ranks.least(pages)
        least = self.shape.layers * -(-(PROMPT + OUTPUT) // self.settings.page_size)
        if pages < least:
            raise SettingsError(
                f"num_pages: got {pages}, allowed is at least {least}, which hold"
                f" {PROMPT + OUTPUT} tokens in each of the {self.shape.layers} layers of {self.settings.model}"
            )
        return pages

    def pool(self, pages: int, *, mirrored: bool = False) -> PagePool:
        """A pool of this many pages, with a row for every sequence and, where mirrored, one for padding."""
        return PagePool(
            layers=self.shape.layers,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            page_size=self.settings.page_size,
            num_pages=pages,
            rows=self.settings.max_sequences + mirrored,
            max_slots=self.max_model_len + self.settings.page_size,
            dtype=self.dtype,
            device=self.device,
            mirrored=mirrored,
        )
