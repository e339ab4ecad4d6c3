"""How many pages hold so many tokens, and how many equal requests hold so many pages: before a server runs."""

from __future__ import annotations

from typing import Any

from d2o.config import D2OConfig
from d2o_server.engine.memory import CacheShape, reserve
from d2o_server.models.describe import describe
from d2o_server.models.source import resolve
from d2o_server.worker.loader import load_config


def cache_shape(model: str, page_size: int) -> CacheShape:
    """The model's cache as the server's admission sees it."""
    return CacheShape(windows=describe(load_config(resolve(model))).windows, page_size=page_size)


def pool_pages(shape: CacheShape, tokens: int) -> int:
    """Pages that hold the full cache of this many tokens."""
    return len(shape.windows) * shape.pages(tokens)


def most_at_once(
    shape: CacheShape, pages: int, *, prompt_tokens: int, new_tokens: int, compression: dict[str, Any]
) -> int:
    """Equal requests that decode together from a pool of ``pages``; ``compression`` has the client's arguments.

    All but one hold what they need for good, and the last still has its prompt in full.
    """
    need = reserve(shape, D2OConfig.of(**compression), prompt_tokens, new_tokens)
    return 1 + (pages - need.pages) // need.resident if need.pages <= pages else 0
