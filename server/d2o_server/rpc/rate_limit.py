"""How many generations a second one peer may start."""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from asyncio_throttle.throttler import Throttler

from d2o_server.errors import Overloaded

_MOST_PEERS = 10_000
_WINDOW = 1.0


class _Window(Throttler):
    """One peer's sliding window that also tells when it has room: a caller is sent away sooner than kept polling."""

    def seconds_until_free(self) -> float:
        """0 where a start would not wait."""
        self.flush()  # type: ignore[no-untyped-call]
        if len(self._task_logs) < self.rate_limit:
            return 0.0
        return max(self._task_logs[0] + _WINDOW - time.monotonic(), 1e-3)


class RateLimit:
    """A sliding window of one second a peer; a call above the rate is refused with the time until there is room.

    ``per_second`` 0 limits nothing. Peers that have not called for longest are forgotten first.
    """

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._peers: OrderedDict[str, _Window] = OrderedDict()

    async def admit(self, peer: str) -> None:
        """Returns when ``peer`` (grpc's ``ipv4:address:port``) may start a generation.

        Raises:
            Overloaded: the peer has started as many as it may within the last second.
        """
        if not self._per_second:
            return
        address = peer.rpartition(":")[0] or peer
        window = self._peers.setdefault(address, _Window(self._per_second, period=_WINDOW))
        self._peers.move_to_end(address)
        if len(self._peers) > _MOST_PEERS:
            self._peers.popitem(last=False)
        wait = window.seconds_until_free()
        if wait:
            reason = f"more than {self._per_second} generations a second from {address}"
            raise Overloaded(reason, math.ceil(1000 * wait) + 1)
        await window.acquire()  # type: ignore[no-untyped-call]
