"""What waits for pages, within its bounds, and when those who find it full should come back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from d2o_server import errors
from d2o_server.engine.forecast import Admission, Holding, Pace, Waiting, admissions, seconds_until
from d2o_server.engine.ticket import Ticket
from d2o_server.engine.worker_client import Worker

_LEAST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0
# So that those who were refused together do not come back together.
_SPREAD = 0.25
# A flood of refusals must not keep the loop busy with the same forecast.
_FORECAST_SECONDS = 0.1


class Backlog:
    """Bounds on requests, prompt tokens and seconds in the queue, and on the pages of one owner.

    ``max_wait`` None is as long as it takes.
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
        self._workers, self._clock, self.max_wait = workers, clock, max_wait
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._pace = Pace()
        self._forecast: list[Admission] = []
        self._forecast_at = -_FORECAST_SECONDS

    def check_owner(self, owner: str | None, pages: int, max_pages: int) -> int | None:
        """The pages left to an owner, None for any number; refuses ``pages`` more where they are too few.

        Requests that wait count by the most that they may get.

        Raises:
            InvalidRequest: the request alone is too much. Overloaded: with what else it has running and waiting.
        """
        if owner is None or not max_pages:
            return None
        if pages > max_pages:
            allowed = f"requests of at most {max_pages} pages for this caller; shorten the prompt or the output"
            raise errors.InvalidRequest("prompt", f"a request that needs {pages} cache pages", allowed)
        own = [ticket for worker in self._workers for ticket in worker.tickets.values() if ticket.owner == owner]
        held = sum(ticket.most_pages for ticket in own)
        if held + pages > max_pages:
            seconds = seconds_until(held + pages - max_pages, [self._holding(ticket) for ticket in own])
            reason = f"{held} cache pages are reserved for this caller, {pages} more would be above its {max_pages}"
            raise errors.Overloaded(reason, _milliseconds(seconds), "client_pages")
        return max_pages - held

    def check_queue(self, prompt_tokens: int) -> None:
        """Refuses a request that would have to wait where the queue is full.

        Raises:
            Overloaded: with the time at which half of the queue, or as much as is in the way, should be admitted.
        """
        queue = [ticket for worker in self._workers for ticket in worker.waiting.values() if ticket.queued]
        if len(queue) >= self._max_waiting:
            seconds = self._seconds_until_admitted(max(1, len(queue) // 2), 0)
            raise errors.Overloaded(f"the queue is full ({len(queue)} requests wait)", _milliseconds(seconds))
        tokens = sum(len(ticket.message.prompt) for ticket in queue)
        if queue and tokens + prompt_tokens > self._max_waiting_tokens:
            seconds = self._seconds_until_admitted(1, tokens + prompt_tokens - self._max_waiting_tokens)
            raise errors.Overloaded(f"the queue is full ({tokens} prompt tokens wait)", _milliseconds(seconds))

    def waited_too_long(self, ticket: Ticket) -> errors.Overloaded:
        """The error of a request that was not admitted within ``max_wait``."""
        seconds = self._seconds_until_admitted(1, len(ticket.message.prompt))
        return errors.Overloaded(f"waited {self.max_wait:g} s for cache pages", _milliseconds(seconds), "queue_time")

    def ended(self, ticket: Ticket) -> None:
        """Learns from a request that holds its pages no longer."""
        if ticket.admitted is not None:
            ended = self._clock() if ticket.ended is None else ticket.ended
            self._pace.ended(ended - ticket.admitted, ticket.message.max_new_tokens)

    def _seconds_until_admitted(self, requests: int, tokens: int) -> float:
        """Seconds until at least so many waiting requests, with so many prompt tokens, should be admitted."""
        if self._clock() - self._forecast_at >= _FORECAST_SECONDS:
            self._forecast_at = self._clock()
            expected = [admission for worker in self._workers for admission in self._admissions(worker)]
            self._forecast = sorted(expected, key=lambda admission: admission.seconds)
        seconds = 0.0
        for admission in self._forecast:
            if requests <= 0 and tokens <= 0:
                break
            seconds, requests, tokens = admission.seconds, requests - 1, tokens - admission.prompt_tokens
        return seconds

    def _admissions(self, worker: Worker) -> list[Admission]:
        running = [ticket for ticket in worker.tickets.values() if not ticket.waiting]
        waiting = worker.line
        return admissions(
            worker.free_pages,
            worker.settings.max_sequences - len(running),
            map(self._holding, running),
            (Waiting(t.pages, len(t.message.prompt), self._pace.seconds(t.message.max_new_tokens)) for t in waiting),
        )

    def _holding(self, ticket: Ticket) -> Holding:
        held = 0.0 if ticket.admitted is None else self._clock() - ticket.admitted
        return Holding(self._pace.seconds_left(ticket.message.max_new_tokens, held), ticket.pages)


def _milliseconds(seconds: float) -> int:
    spread = seconds * random.uniform(1, 1 + _SPREAD)  # noqa: S311 - spreads load, hides nothing
    return int(1000 * min(_LONGEST_PAUSE, max(_LEAST_PAUSE, spread)))
