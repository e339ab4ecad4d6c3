"""One answer: what a worker says of a request, turned into what the caller is told."""

from __future__ import annotations

import time

from d2o_server import errors
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.messages import Admitted, Ended, Failed, NewToken
from d2o_server.engine.observer import Observer, Timeline
from d2o_server.engine.text import TextCodec, TextStream
from d2o_server.engine.ticket import Ticket, TicketEvent
from d2o_server.engine.types import Chunk, Event, Finished, FinishReason, Started, Usage


class Answer:
    """Turns a ticket's events into the caller's, until it is ``over``. ``arrived``: a reading of ``time.monotonic``."""

    def __init__(
        self, codec: TextCodec, ticket: Ticket, arrived: float, dispatcher: Dispatcher, observer: Observer
    ) -> None:
        self._ticket, self._arrived, self._dispatcher, self._observer = ticket, arrived, dispatcher, observer
        self._text = TextStream.of(codec, ticket.message.sampling, ticket.message.end_ids)
        self._admitted = self._first = self._latest = arrived
        self._finish: Finished | None = None
        self.over = False

    async def next(self) -> tuple[Event, ...]:
        """Waits for the worker's next word: ``Started``, then chunks, and ``Finished`` at the end.

        Raises:
            DeadlineExceeded, WorkerDied, OutOfDeviceMemory, EngineFailure.
        """
        try:
            event = await self._ticket.events.get()
        except TimeoutError:
            where = "queued" if self._ticket.waiting else "running"
            raise errors.DeadlineExceeded(f"the deadline passed while the request was {where}") from None
        if isinstance(event, NewToken):
            return self._tokens(event)
        if isinstance(event, Ended):
            self.over = True
            rest = self._text.finish()
            finished = self._finish = self._finished(event)
            return (Chunk(rest, ()), finished) if rest else (finished,)
        if isinstance(event, Admitted):
            self._admitted = time.monotonic()
            self._observer.admitted(self._admitted - self._arrived)
            return (self._started(event),)
        raise _error(event)

    def _tokens(self, first: NewToken) -> tuple[Event, ...]:
        """One chunk of this token and of those that came while the caller was busy; none after a stop string."""
        new = [first, *(item for item in self._ticket.events.take_while(_is_token) if isinstance(item, NewToken))]
        if self._text.matched is not None:
            return ()
        now = time.monotonic()
        if self._text.tokens:
            self._observer.tokens(len(new), now - self._latest)
        else:
            self._first = now
            self._observer.first_tokens(now - self._arrived)
        self._latest = now
        chunk = self._text.push(new)
        self._ticket.tokens = self._text.tokens
        if self._text.matched is not None:
            self._dispatcher.stop_string(self._ticket)
        return (chunk,)

    def timeline(self) -> Timeline:
        """The generation's life, now that nobody reads it any more."""
        finish = self._finish
        return Timeline(
            generation_id=self._ticket.id,
            arrived=self._arrived,
            admitted=self._admitted if self._ticket.admission is not None else None,
            first_token=self._first if self._text.tokens else None,
            ended=time.monotonic(),
            prompt_tokens=len(self._ticket.message.prompt),
            completion_tokens=self._text.tokens,
            reason=finish.reason if finish else None,
            cache=finish.cache if finish else None,
            auto=None if self._ticket.admission is None else self._ticket.admission.auto,
            resumed=self._ticket.resumed,
        )

    def _started(self, admitted: Admitted) -> Started:
        message = self._ticket.message
        return Started(
            generation_id=message.id,
            prompt_tokens=len(message.prompt),
            reserved_pages=admitted.reserved_pages,
            compression=admitted.config,
            budget_per_layer=admitted.budget,
            seed=message.seed,
            auto=admitted.auto is not None,
        )

    def _finished(self, ended: Ended) -> Finished:
        now = time.monotonic()
        usage = Usage(
            prompt_tokens=len(self._ticket.message.prompt),
            completion_tokens=self._text.tokens,
            queue_seconds=self._admitted - self._arrived,
            first_token_seconds=self._first - self._arrived,
            total_seconds=now - self._arrived,
            resumed=self._ticket.resumed,
        )
        matched = self._text.matched
        return Finished(
            reason=FinishReason.STOP if matched is not None else FinishReason(ended.reason),
            usage=usage,
            cache=ended.facts,
            stop_string=matched,
            stop_token_id=None if matched is not None else ended.stop_token_id,
        )


def _is_token(event: TicketEvent) -> bool:
    return isinstance(event, NewToken)


_WORKER_ERRORS: dict[str, type[errors.ServerError]] = {
    kind.__name__: kind for kind in (errors.OutOfDeviceMemory, errors.EngineFailure, errors.WorkerDied)
}


def _error(failed: Failed) -> errors.ServerError:
    """The exception that a worker named."""
    return _WORKER_ERRORS.get(failed.error, errors.EngineFailure)(failed.message)
