"""What a worker said to one request, in order, until the caller reads it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """A queue of one reader on one event loop. It holds at most what one bounded request can produce."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._arrived.set()

    async def get(self) -> Item:
        """The next item; waits for one."""
        while not self._items:
            self._arrived.clear()
            await self._arrived.wait()
        return self._items.popleft()

    def take_while(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Items that are here already, up to the first that is not ``wanted``."""
        taken = []
        while self._items and wanted(self._items[0]):
            taken.append(self._items.popleft())
        return taken
