"""What a worker said to one request, in order, until the caller reads it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")

# A message costs some 0.1 ms to write, so that a round of the event loop takes some 1 ms; a new call takes ten rounds.
_READERS_A_ROUND = 8


class Turns:
    """Lets so many of those that ask go on in each round of the event loop, in the order in which they asked.

    A new call takes gRPC some ten rounds, one after another, from the wire to its handler, and is taken alone. Were all
    streams to write what a step brought in one round, each of these rounds would be as long as all their messages.
    """

    def __init__(self, a_round: int = _READERS_A_ROUND) -> None:
        self._a_round = a_round
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._giving = False

    def ask(self, reader: asyncio.Future[None]) -> None:
        """Sets ``reader``'s result when it is its turn, in a later round; one that is done by then takes none."""
        self._waiting.append(reader)
        if not self._giving:
            self._giving = True
            reader.get_loop().call_soon(self._give)

    def _give(self) -> None:
        left = self._a_round
        while self._waiting and left:
            reader = self._waiting.popleft()
            if not reader.done():
                reader.set_result(None)
                left -= 1
        self._giving = bool(self._waiting)
        if self._giving:
            self._waiting[0].get_loop().call_soon(self._give)


class Mailbox(Generic[Item]):
    """A queue of one reader on one event loop. It holds at most what one bounded request can produce.

    It is passed through once a token and stream, so it has one bare future for its reader and one timer a request.
    Readers of mailboxes with the same ``turns`` get what is there in turn; meanwhile more may come.
    """

    def __init__(self, turns: Turns | None = None) -> None:
        self._turns = turns or Turns()
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._asked = False
        self._expired = False

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._ask()

    async def get(self) -> Item:
        """The next item; waits for one.

        Raises:
            TimeoutError: the mailbox has expired.
        """
        if not self._expired:
            self._reader, self._asked = asyncio.get_running_loop().create_future(), False
            if self._items:
                self._ask()
            await self._reader
        if self._expired:
            raise TimeoutError
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

    def _ask(self) -> None:
        if self._reader is not None and not self._asked:
            self._asked = True
            self._turns.ask(self._reader)

    def _expire(self) -> None:
        self._expired = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
