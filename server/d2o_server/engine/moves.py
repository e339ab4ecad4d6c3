"""Which requests that wait at one worker another could admit now."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

from d2o_server.engine.ticket import Ticket
from d2o_server.engine.worker_client import Worker

# Where thousands wait for more pages than a worker beside them has free, each of its reports would look at all.
_MISSES = 64


@dataclass(slots=True)
class _Room:
    pages: int
    places: int

    def fits(self, ticket: Ticket) -> bool:
        return ticket.pages <= self.pages and self.places > 0

    def take(self, ticket: Ticket) -> None:
        self.pages -= ticket.pages
        self.places -= 1


def moves(workers: Sequence[Worker]) -> list[tuple[Ticket, Worker]]:
    """Requests that cannot be admitted now where they wait, each with a worker that would do so in its next step.

    What a worker will admit of its own is left to it. The others are taken in the order of their turns: one that fits
    nowhere holds back those behind it at its own worker, and no others.
    """
    rooms = {worker: _Room(worker.free_pages, worker.free_places) for worker in workers if worker.serving}
    held_back = [_held_back(worker, room) for worker, room in rooms.items()]
    found, misses = [], 0
    for ticket in heapq.merge(*held_back, key=attrgetter("turn")):
        fitting = [worker for worker, room in rooms.items() if room.fits(ticket)]
        if not fitting:
            rooms.pop(ticket.worker, None)
            misses += 1
            if not rooms or misses == _MISSES:
                break
            continue
        worker = ticket.worker if ticket.worker in fitting else max(fitting, key=lambda each: rooms[each].pages)
        rooms[worker].take(ticket)
        if worker is not ticket.worker:
            found.append((ticket, worker))
    return found


def _held_back(worker: Worker, room: _Room) -> Iterator[Ticket]:
    """Those at a worker that it will not admit in its next step; the others take theirs out of ``room``."""
    line = iter(worker.line)
    for ticket in line:
        if not room.fits(ticket):
            return chain((ticket,), line)
        room.take(ticket)
    return line
