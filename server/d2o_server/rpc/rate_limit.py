"""How many generations a second one peer may start."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from asyncio_throttle.throttler import Throttler

from d2o_server.errors import Overloaded

_MOST_PEERS = 10_000
_LONGEST_WAIT = 1.0


class RateLimit:
    """A sliding window a peer. A call above the rate waits up to a second for its turn and is then refused.

    ``per_second`` 0 limits nothing. Peers that have not called for longest are forgotten first.
    """

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._peers: OrderedDict[str, Throttler] = OrderedDict()

    async def admit(self, peer: str) -> None:
        """Returns when ``peer`` (grpc's ``ipv4:address:port``) may start a generation.

        Raises:
            Overloaded: not within a second.
        """
        if not self._per_second:
            return
        address = peer.rpartition(":")[0] or peer
        throttler = self._peers.pop(address, None) or Throttler(self._per_second)
        self._peers[address] = throttler
        if len(self._peers) > _MOST_PEERS:
            self._peers.popitem(last=False)
        try:
            async with asyncio.timeout(_LONGEST_WAIT):
                await throttler.acquire()  # type: ignore[no-untyped-call]
        except TimeoutError:
            reason = f"more than {self._per_second} generations a second from {address}"
            raise Overloaded(reason, int(1000 * _LONGEST_WAIT)) from None
