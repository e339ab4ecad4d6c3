"""One request on its way through the workers, and all that is needed to go on with it where one of them died."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from d2o_server.engine.mailbox import Mailbox
from d2o_server.engine.messages import Admitted, Ended, Failed, NewToken, Submit

if TYPE_CHECKING:
    from d2o_server.engine.worker_client import Worker

TicketEvent = Admitted | NewToken | Ended | Failed

MOST_DEATHS = 3
"""Workers in a row that may die while they run a request which none of them brought further: it may be the cause."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way through a worker: what comes back, in order.

    ``pages`` is what admission will reserve for it, in auto at least, and then what it did; ``most_pages`` what it
    might. ``queued``: there was no room for it when it came. ``tokens``: how many its reader has got. ``owner``: whose
    pages they are. ``admitted`` and ``ended``: when it got and gave back its pages.

    ``moved`` counts the times that it was taken, still waiting, from a worker that serves and given to another.

    With ``output``, the tokens that workers have reported, and ``stopping``, that its text has reached a stop string,
    another worker goes on with it. ``resumed`` counts how often one has; ``deaths`` those workers in a row that died
    while they ran it and brought it no further than ``resumed_at`` tokens.
    """

    message: Submit
    pages: int
    worker: Worker
    queued: bool
    most_pages: int
    sent: float = field(default_factory=time.monotonic)
    events: Mailbox[TicketEvent] = field(default_factory=Mailbox)
    admission: Admitted | None = None
    tokens: int = 0
    waiting: bool = True
    done: bool = False
    owner: str | None = None
    admitted: float | None = None
    ended: float | None = None
    output: list[int] = field(default_factory=list)
    stopping: bool = False
    resumed: int = 0
    resumed_at: int = 0
    deaths: int = 0
    moved: int = 0

    @property
    def id(self) -> str:
        return self.message.id

    @property
    def run(self) -> str:
        """What its worker calls it. A new name after each move: what the one before still reports is then nobody's."""
        return f"{self.id}.{self.moved}" if self.moved else self.id

    @property
    def turn(self) -> tuple[bool, float, float]:
        """Sorts those that wait into the order of their admission: resumed ones first, then as they are due."""
        return self.admission is None, self.message.due, self.sent

    def admit(self, admission: Admitted) -> bool:
        """Notes that a worker has begun; returns whether that is news for the reader."""
        first = self.admission is None
        self.waiting = False
        if first:
            self.admission, self.admitted = admission, time.monotonic()
            self.pages = self.most_pages = admission.reserved_pages
            self.events.put(admission)
        return first

    def take(self, token: NewToken) -> None:
        self.output.append(token.token)
        self.events.put(token)

    def end(self, last: Ended | Failed) -> None:
        """Tells the reader that nothing follows; the worker holds nothing of it any more."""
        self.done, self.ended = True, time.monotonic()
        self.events.put(last)

    def worker_died(self) -> bool:
        """Notes that; returns whether another worker may go on with it."""
        if not self.waiting:
            self.deaths = self.deaths + 1 if len(self.output) == self.resumed_at else 0
        self.waiting = True
        return self.deaths < MOST_DEATHS

    def continuation(self) -> Submit:
        """The message that has a worker go on where the last one stopped."""
        self.resumed_at = len(self.output)
        if self.admission is not None:
            self.resumed += 1
        return self.as_it_is()

    def as_it_is(self) -> Submit:
        """The message by which a worker gets it."""
        message = msgspec.structs.replace(self.message, id=self.run)
        if self.admission is None:
            return message
        if message.auto is not None:
            # Another choice would be another stream: it asks for what was chosen.
            message = msgspec.structs.replace(message, config=self.admission.config, auto=None)
        return msgspec.structs.replace(message, output=tuple(self.output), resumed=True)
