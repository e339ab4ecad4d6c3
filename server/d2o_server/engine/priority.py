"""The order in which requests that wait are admitted: by priority, with ageing, so that nobody starves."""

from __future__ import annotations

from d2o_server.engine.types import MAX_PRIORITY
from d2o_server.errors import InvalidRequest

SECONDS_A_PRIORITY = 10.0


def due(arrived: float, priority: int) -> float:
    """When a request of this priority is due; those that wait are admitted in this order.

    A priority is worth ten seconds of waiting. So a request ages without anybody counting: of all that come later, only
    those can pass it whose priority is higher, and each for ten seconds a priority. After 90 seconds nobody does.
    """
    return arrived - SECONDS_A_PRIORITY * priority


def check_priority(priority: int) -> None:
    """Refuses what is no priority.

    Raises:
        InvalidRequest: it is out of bounds.
    """
    if not 0 <= priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", priority, f"[0, {MAX_PRIORITY}]")
