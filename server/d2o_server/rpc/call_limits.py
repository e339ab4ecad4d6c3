"""What one caller may start and run, whatever the server could take."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from d2o_server.errors import Overloaded
from d2o_server.rpc.auth import Caller
from d2o_server.rpc.rate_limit import RateLimit

RETRY_AFTER_MS = 1000


class CallLimits:
    """Rates of generations and of tokenizations, each by itself, and how many generations run at once."""

    def __init__(self) -> None:
        self._generations, self._tokenizations = RateLimit(), RateLimit("tokenizations")
        self._running: dict[str, int] = {}

    @asynccontextmanager
    async def generation(self, caller: Caller) -> AsyncIterator[None]:
        """A scope in which a generation of ``caller`` may run.

        Raises:
            Overloaded: it has as many as it may already, or has started too many within a second.
        """
        running = self._running.get(caller.name, 0)
        if caller.named and caller.streams and running >= caller.streams:
            reason = f"{running} generations of {caller.name} are running, as many as it may"
            raise Overloaded(reason, RETRY_AFTER_MS, "client_streams")
        await self._generations.admit(caller.name, caller.rate)
        self._running[caller.name] = self._running.get(caller.name, 0) + 1
        try:
            yield
        finally:
            self._running[caller.name] -= 1
            if not self._running[caller.name]:
                del self._running[caller.name]

    async def tokenization(self, caller: Caller) -> None:
        """Returns when ``caller`` may have something tokenized.

        Raises:
            Overloaded: it has started too many within a second.
        """
        await self._tokenizations.admit(caller.name, caller.rate)
