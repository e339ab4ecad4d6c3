"""What a worker said to one request, in order, until the caller reads it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """A queue of one reader on one event loop. It holds at most what one bounded request can produce.

    It is passed through once a token and stream, so it has one bare future for its reader and one timer a request.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._expired = False

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._wake()

    async def get(self) -> Item:
        """The next item; waits for one.

        Raises:
            TimeoutError: the mailbox has expired.
        """
        while not self._items or self._expired:
            if self._expired:
                raise TimeoutError
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._items.popleft()

    def take_while(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Items that are here already, up to the first that is not ``wanted``."""
        taken = []
        while self._items and wanted(self._items[0]):
            taken.append(self._items.popleft())
        return taken

    @contextmanager
    def expiring(self, deadline: float | None) -> Iterator[None]:
        """Within this scope nothing can be got any more once ``time.monotonic`` reads ``deadline``."""
        if deadline is None:
            yield
            return
        timer = asyncio.get_running_loop().call_later(deadline - time.monotonic(), self._expire)
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
