"""How many calls a second one caller may start."""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from asyncio_throttle.throttler import Throttler

from d2o_server.errors import Overloaded

_MOST_CALLERS = 10_000
_WINDOW = 1.0


class _Window(Throttler):
    """One caller's sliding window that also tells when it has room: one is sent away sooner than kept polling."""

    def seconds_until_free(self) -> float:
        """0 where a start would not wait."""
        self.flush()  # type: ignore[no-untyped-call]
        if len(self._task_logs) < self.rate_limit:
            return 0.0
        return max(self._task_logs[0] + _WINDOW - time.monotonic(), 1e-3)


class RateLimit:
    """A sliding window of one second a caller; a call above the rate is refused with the time until there is room.

    ``what`` names the calls. Callers that have not called for longest are forgotten first.
    """

    def __init__(self, what: str = "generations") -> None:
        self._what = what
        self._callers: OrderedDict[str, _Window] = OrderedDict()

    async def admit(self, caller: str, per_second: int) -> None:
        """Returns when ``caller`` may start a call; ``per_second`` 0 is always.

        Raises:
            Overloaded: it has started as many as it may within the last second.
        """
        if not per_second:
            return
        window = self._callers.setdefault(caller, _Window(per_second, period=_WINDOW))
        # The rate of a key may have changed.
        window.rate_limit = per_second
        self._callers.move_to_end(caller)
        if len(self._callers) > _MOST_CALLERS:
            self._callers.popitem(last=False)
        wait = window.seconds_until_free()
        if wait:
            reason = f"more than {per_second} {self._what} a second from {caller}"
            raise Overloaded(reason, math.ceil(1000 * wait) + 1, "rate_limit")
        await window.acquire()  # type: ignore[no-untyped-call]
