"""Which worker a request goes to, also after the one that ran it has died, and how many may wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from d2o_server import errors
from d2o_server.engine.backlog import Backlog
from d2o_server.engine.mailbox import Mailbox, Turns
from d2o_server.engine.messages import Cancel, Failed, Stop, Submit
from d2o_server.engine.moves import moves
from d2o_server.engine.ticket import MOST_DEATHS, Ticket
from d2o_server.engine.worker_client import Worker

_log = logging.getLogger(__name__)


class Dispatcher:
    """Sends every request to the worker with most room; bounds those that have to wait because none has any.

    Those that wait move, in the order of their turns, to a worker that could admit them now: see :mod:`.moves`.
    Requests of a worker that died go to one that serves, or stay with it until one does: see :mod:`.ticket`. ``lost``
    is set once no worker is left, and none will be.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_waiting: int,
        max_waiting_tokens: int,
        max_wait: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = workers
        self.lost = asyncio.Event()
        self._clock = clock
        self._turns = Turns()
        self.backlog = Backlog(
            workers, max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens, max_wait=max_wait, clock=clock
        )
        for worker in workers:
            worker.keeper = self

    @property
    def waiting(self) -> list[Ticket]:
        """Requests that no worker has admitted yet."""
        return [ticket for worker in self.workers for ticket in worker.waiting.values()]

    @property
    def running(self) -> int:
        return sum(len(worker.tickets) - len(worker.waiting) for worker in self.workers)

    def submit(
        self,
        message: Submit,
        pages: int,
        *,
        most_pages: int | None = None,
        owner: str | None = None,
        max_pages: int = 0,
    ) -> Ticket:
        """Sends a request to the serving worker with most room.

        It will hold ``pages``, or ``most_pages`` where auto chooses so. ``max_pages`` is what all requests of its
        ``owner`` may hold; 0 is any number.

        Raises:
            Overloaded: it would have to wait, and the bounded queue is full, or its owner holds too much.
            InvalidRequest: its owner may never hold so much. NoWorker: no worker serves.
        """
        most = pages if most_pages is None else most_pages
        room = self.backlog.check_owner(owner, pages, max_pages)
        if room is not None and message.auto is not None:
            message = msgspec.structs.replace(message, auto=msgspec.structs.replace(message.auto, most_pages=room))
            most = most if most <= room else pages
        worker = self._roomiest(pages)
        if worker is None:
            raise errors.NoWorker("no worker is serving at the moment; it is being restarted")
        queued = not worker.fits(pages)
        if queued:
            self.backlog.check_queue(len(message.prompt))
        ticket = Ticket(
            message,
            pages,
            worker,
            queued,
            most_pages=most,
            sent=self._clock(),
            events=Mailbox(self._turns),
            owner=owner,
        )
        worker.take(ticket)
        worker.send(message)
        if queued:
            self._move_waiting()
        return ticket

    def _roomiest(self, pages: int) -> Worker | None:
        """The serving worker with most room, if any serves."""
        serving = [worker for worker in self.workers if worker.serving]
        return max(serving, key=lambda worker: (worker.fits(pages), worker.room, -len(worker.tickets)), default=None)

    def worker_ready(self, worker: Worker) -> None:
        """Gives it the requests that no worker has, and those that wait elsewhere."""
        self._hand_over([other for other in self.workers if other is worker or not other.serving])

    def pages_freed(self, worker: Worker) -> None:
        """Gives it requests that wait elsewhere."""
        self._move_waiting()

    def worker_died(self, worker: Worker) -> None:
        """Gives its requests to another worker where one serves; those that have seen too many die end."""
        for ticket in list(worker.tickets.values()):
            if ticket.worker_died():
                worker.take(ticket)
            else:
                worker.drop(ticket.run)
                reason = f"{MOST_DEATHS} workers in a row died while they ran the request and brought it no further"
                ticket.end(Failed(ticket.id, errors.WorkerDied.__name__, reason))
        self._hand_over([worker])

    def worker_given_up(self, worker: Worker) -> None:
        """Ends what nobody can go on with once no worker is left."""
        if any(other.given_up is None for other in self.workers):
            return
        for other in self.workers:
            other.fail_tickets("no worker is left to run the request")
        self.lost.set()

    def _hand_over(self, origins: Sequence[Worker]) -> None:
        """Sends requests that are with workers which do not know them to those that serve, by their turns."""
        if not any(worker.serving for worker in self.workers):
            return
        tickets = sorted(
            (ticket for origin in origins for ticket in origin.tickets.values()), key=lambda ticket: ticket.turn
        )
        # Before any is sent: one that serves again is an origin, too, and what it gets now it does know.
        for ticket in tickets:
            ticket.worker.drop(ticket.run)
        for ticket in tickets:
            worker = self._roomiest(ticket.pages) or ticket.worker
            ticket.queued = not worker.fits(ticket.pages)
            self._give(ticket, worker, ticket.continuation())
        if tickets:
            _log.info("%d requests of workers that died go on", len(tickets))
        self._move_waiting()

    def _move_waiting(self) -> None:
        """Has what waits where it cannot be admitted now wait where it can.

        The worker that had it may have admitted it meanwhile: it forgets it, and what it reports of it is nobody's.
        """
        if len(self.workers) == 1 or not any(worker.waiting for worker in self.workers):
            return
        for ticket, worker in moves(self.workers):
            ticket.worker.drop(ticket.run)
            ticket.worker.send(Cancel(ticket.run))
            ticket.moved += 1
            self._give(ticket, worker, ticket.as_it_is())

    @staticmethod
    def _give(ticket: Ticket, worker: Worker, message: Submit) -> None:
        ticket.worker = worker
        worker.take(ticket)
        worker.send(message)
        if ticket.stopping:
            worker.send(Stop(ticket.run))

    def release(self, ticket: Ticket) -> None:
        """Ends a request's stay: cancels it unless it has ended. Its pages are free within one step."""
        if not ticket.done:
            ticket.worker.drop(ticket.run)
            ticket.done = True
            ticket.worker.send(Cancel(ticket.run))
            if ticket.waiting:
                self._move_waiting()
        self.backlog.ended(ticket)

    def stop_string(self, ticket: Ticket) -> None:
        """Ends a request as finished because its text reached a stop string."""
        ticket.stopping = True
        ticket.worker.send(Stop(ticket.run))
