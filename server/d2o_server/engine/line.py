"""The requests that wait at one worker, in the order in which they are to be admitted."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from d2o_server.engine.ticket import Ticket

_turn = attrgetter("turn")


class Line:
    """Sorted by turn, with the sum of their ``pages``: thousands may wait, and every step may ask."""

    def __init__(self) -> None:
        self.pages = 0
        self._tickets: list[Ticket] = []

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    def add(self, ticket: Ticket) -> None:
        """Puts it behind those with the same turn. Neither turn nor pages may change while it is there."""
        insort(self._tickets, ticket, key=_turn)
        self.pages += ticket.pages

    def remove(self, ticket: Ticket) -> None:
        """Takes out one that is there."""
        first = bisect_left(self._tickets, ticket.turn, key=_turn)
        del self._tickets[self._tickets.index(ticket, first)]
        self.pages -= ticket.pages
