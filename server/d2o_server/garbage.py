"""When the front collects its garbage: seldom while it streams, and at once when nothing is asked of it."""

from __future__ import annotations

import asyncio
import ctypes
import gc

from d2o_server.engine.interface import Engine

# 50,000 objects rather than Python's 700 (2,000 since 3.14): a tenth of what a token costs was collecting.
_THRESHOLDS = (50_000, 20, 20)
_POLL_SECONDS = 1.0
# Below that there is nothing to gain: a health check leaves a dozen.
_WORTH_COLLECTING = 1_000


def calm_garbage_collector() -> None:
    """Leaves what a start made out of every later collection, and lets collections under load be seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


async def collect_when_idle(engine: Engine) -> None:
    """Collects, once a second at most, where the engine has nothing to do and there is something to gain.

    What calls leave behind in cycles (gRPC's own do, with all of a call's metadata) would otherwise wait for the next
    50,000 objects, and the heap grow around it. What becomes free goes back to the machine where the C library can
    do that (glibc's malloc_trim).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        if gc.get_count()[0] < _WORTH_COLLECTING or _is_busy(engine):
            continue
        gc.collect()
        if trim is not None:
            trim(0)


def _is_busy(engine: Engine) -> bool:
    load = engine.load()
    return bool(load.running or load.waiting)
