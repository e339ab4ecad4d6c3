"""One answer: what a worker says of a request, turned into what the caller is told, within the caller's deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from d2o_server import errors
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.messages import Admitted, Ended, Failed, NewToken
from d2o_server.engine.text import TextCodec, TextStream
from d2o_server.engine.types import Chunk, Event, Finished, FinishReason, Started, Usage
from d2o_server.engine.worker_client import Ticket, TicketEvent


class Answer:
    """Turns one ticket's events into the caller's. ``deadline`` and ``arrived`` are readings of ``time.monotonic``."""

    def __init__(
        self, codec: TextCodec, ticket: Ticket, deadline: float | None, arrived: float, dispatcher: Dispatcher
    ) -> None:
        self._ticket, self._deadline, self._arrived, self._dispatcher = ticket, deadline, arrived, dispatcher
        self._text = TextStream.of(codec, ticket.message.sampling, ticket.message.end_ids)
        self._admitted = self._first = arrived

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields ``Started``, chunks and ``Finished``.

        Raises:
            DeadlineExceeded, WorkerDied, OutOfDeviceMemory, EngineFailure.
        """
        stopped = False
        while True:
            event = await self._next()
            match event:
                case Admitted():
                    self._admitted = time.monotonic()
                    yield self._started(event)
                case NewToken():
                    # Tokens that came while the caller was busy go out together.
                    more = self._ticket.events.take_while(lambda item: isinstance(item, NewToken))
                    if self._text.matched is None:
                        yield self._chunk([event, *more])
                    if self._text.matched is not None and not stopped:
                        stopped = True
                        self._dispatcher.stop_string(self._ticket)
                case Ended():
                    rest = self._text.finish()
                    if rest:
                        yield Chunk(rest, ())
                    yield self._finished(event)
                    return
                case Failed():
                    raise _error(event)

    def _chunk(self, tokens: list[TicketEvent]) -> Chunk:
        if not self._text.tokens:
            self._first = time.monotonic()
        return self._text.push([token for token in tokens if isinstance(token, NewToken)])

    async def _next(self) -> TicketEvent:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(left):
                return await self._ticket.events.get()
        except TimeoutError:
            where = "queued" if self._ticket.waiting else "running"
            raise errors.DeadlineExceeded(f"the deadline passed while the request was {where}") from None

    def _started(self, admitted: Admitted) -> Started:
        message = self._ticket.message
        return Started(
            generation_id=message.id,
            prompt_tokens=len(message.prompt),
            reserved_pages=admitted.reserved_pages,
            compression=admitted.config,
            budget_per_layer=admitted.budget,
            seed=message.seed,
        )

    def _finished(self, ended: Ended) -> Finished:
        now = time.monotonic()
        usage = Usage(
            prompt_tokens=len(self._ticket.message.prompt),
            completion_tokens=self._text.tokens,
            queue_seconds=self._admitted - self._arrived,
            first_token_seconds=self._first - self._arrived,
            total_seconds=now - self._arrived,
        )
        matched = self._text.matched
        return Finished(
            reason=FinishReason.STOP if matched is not None else FinishReason(ended.reason),
            usage=usage,
            cache=ended.facts,
            stop_string=matched,
            stop_token_id=None if matched is not None else ended.stop_token_id,
        )


_WORKER_ERRORS: dict[str, type[errors.ServerError]] = {
    kind.__name__: kind for kind in (errors.OutOfDeviceMemory, errors.EngineFailure, errors.WorkerDied)
}


def _error(failed: Failed) -> errors.ServerError:
    """The exception that a worker named."""
    return _WORKER_ERRORS.get(failed.error, errors.EngineFailure)(failed.message)
