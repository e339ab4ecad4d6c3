"""Which worker a request goes to, and how many may wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from d2o_server import errors
from d2o_server.engine.messages import Cancel, Stop, Submit
from d2o_server.engine.worker_client import Ticket, Worker

_LEAST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0


class Dispatcher:
    """Sends every request to the worker with most room; bounds those that have to wait because none has any."""

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_waiting: int,
        max_waiting_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = workers
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._clock = clock
        self._seconds_per_request = 1.0
        self._last_end = clock()

    @property
    def waiting(self) -> list[Ticket]:
        """Requests that no worker has admitted yet."""
        return [ticket for worker in self.workers for ticket in worker.tickets.values() if ticket.waiting]

    @property
    def running(self) -> int:
        return sum(not ticket.waiting for worker in self.workers for ticket in worker.tickets.values())

    def submit(self, message: Submit, pages: int) -> Ticket:
        """Sends a request, which will hold ``pages`` pages at most, to the serving worker with most room.

        Raises:
            Overloaded: it would have to wait, and the bounded queue is full. Unavailable: no worker serves.
        """
        serving = [worker for worker in self.workers if worker.serving]
        if not serving:
            raise errors.Unavailable("no worker is serving at the moment; it is being restarted")
        worker = max(serving, key=lambda worker: (worker.fits(pages), worker.room, -len(worker.tickets)))
        queued = not worker.fits(pages)
        if queued:
            self._check_queue(len(message.prompt))
        ticket = Ticket(message, pages, worker, queued, sent=self._clock())
        worker.tickets[ticket.id] = ticket
        worker.send(message)
        return ticket

    def _check_queue(self, prompt_tokens: int) -> None:
        queue = [ticket for ticket in self.waiting if ticket.queued]
        if len(queue) >= self._max_waiting:
            raise errors.Overloaded(f"the queue is full ({len(queue)} requests wait)", self._retry_after(len(queue)))
        tokens = sum(len(ticket.message.prompt) for ticket in queue)
        if queue and tokens + prompt_tokens > self._max_waiting_tokens:
            raise errors.Overloaded(f"the queue is full ({tokens} prompt tokens wait)", self._retry_after(len(queue)))

    def _retry_after(self, waiting: int) -> int:
        """Milliseconds until about half of the queue should have been admitted."""
        return int(1000 * min(_LONGEST_PAUSE, max(_LEAST_PAUSE, self._seconds_per_request * waiting / 2)))

    def release(self, ticket: Ticket) -> None:
        """Ends a request's stay: cancels it unless it has ended. Its pages are free within one step."""
        if not ticket.done:
            ticket.worker.tickets.pop(ticket.id, None)
            ticket.done = True
            ticket.worker.send(Cancel(ticket.id))
        now = self._clock()
        # Time in which nothing ran says nothing about how fast requests end.
        seconds = now - max(self._last_end, ticket.sent)
        self._seconds_per_request += 0.2 * (seconds - self._seconds_per_request)
        self._last_end = now

    def stop_string(self, ticket: Ticket) -> None:
        """Ends a request as finished because its text reached a stop string."""
        ticket.worker.send(Stop(ticket.id))
