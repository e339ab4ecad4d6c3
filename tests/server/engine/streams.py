"""Small workers, and what comes back from them: for tests over real worker processes."""

from __future__ import annotations

import asyncio

from d2o_server.engine.messages import Ended, Failed, NewToken, WorkerSettings
from d2o_server.engine.ticket import Ticket, TicketEvent
from d2o_server.settings import worker_settings


def tiny_settings(**changes: object) -> WorkerSettings:
    tiny: dict[str, object] = {"model": "random:tiny-llama", "dtype": "float32", "threads": 1}
    return worker_settings(**(tiny | {"check_integrity": True} | changes))


def silent(_: str) -> None:
    """Progress that nobody wants to see."""


async def events(ticket: Ticket) -> list[TicketEvent]:
    """All that comes of a request."""
    came: list[TicketEvent] = []
    async with asyncio.timeout(60):
        while not came or not isinstance(came[-1], (Ended, Failed)):
            came.append(await ticket.events.get())
    return came


def tokens(came: list[TicketEvent]) -> list[int]:
    return [event.token for event in came if isinstance(event, NewToken)]


async def until_it_has(ticket: Ticket, count: int) -> None:
    async with asyncio.timeout(60):
        while len(ticket.output) < count:
            await asyncio.sleep(0.002)
