"""The front's side of one worker process: keeps it running, sends to it, and routes what it reports."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

from d2o_server import errors
from d2o_server.engine.mailbox import Mailbox
from d2o_server.engine.messages import (
    Admitted,
    Ended,
    Failed,
    NewToken,
    PoolState,
    Progress,
    Ready,
    Refused,
    Shutdown,
    StepReport,
    Submit,
    ToWorker,
    WorkerSettings,
    decode_from_worker,
    encode,
)

_log = logging.getLogger(__name__)
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 30.0
_SECONDS_TO_STOP = 5.0
# How long what a process said before it died may still be on its way.
_LAST_WORDS = 0.1

# Large temporaries come from the heap and stay there: mapping and faulting them anew costs more than using them.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483648"}

_STARTUP_ERRORS = {kind.__name__: kind for kind in (errors.StartupError, errors.ModelUnsupported, errors.SettingsError)}

TicketEvent = Admitted | NewToken | Ended | Failed


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way through a worker: what comes back, in order.

    ``pages`` is what admission will reserve for it. ``queued``: there was no room for it when it came.
    """

    message: Submit
    pages: int
    worker: Worker
    queued: bool
    sent: float = field(default_factory=time.monotonic)
    events: Mailbox[TicketEvent] = field(default_factory=Mailbox)
    waiting: bool = True
    done: bool = False

    @property
    def id(self) -> str:
        return self.message.id


class Worker:
    """One worker process and its socket. A process that dies is started again with backoff.

    ``tickets`` are the requests that it has and that have not ended; ``pool`` is as of its last report, and None, as
    is ``ready``, while no process serves. ``environment`` is added to what the process inherits; ``module`` is what it
    runs.
    """

    def __init__(
        self,
        index: int,
        settings: WorkerSettings,
        progress: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        module: str = "d2o_server.worker.process",
    ) -> None:
        self.index, self.settings = index, settings
        self.ready: Ready | None = None
        self.pool: PoolState | None = None
        self.tickets: dict[str, Ticket] = {}
        self.restarts = 0
        self._progress, self._environment, self._module = progress, dict(environment or {}), module
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[Ready] | None = None
        self._stop = asyncio.Event()

    @property
    def serving(self) -> bool:
        return self.ready is not None

    @property
    def pid(self) -> int | None:
        """The process's id, where there is one."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def free_pages(self) -> int:
        """Pages that no admitted request is promised."""
        return self.pool.total - self.pool.reserved if self.pool else 0

    @property
    def room(self) -> int:
        """Free pages less what the requests that it has not admitted yet will take; negative where they wait."""
        return self.free_pages - sum(ticket.pages for ticket in self.tickets.values() if ticket.waiting)

    def fits(self, pages: int) -> bool:
        """Whether a request that needs this many pages would be admitted in the next step."""
        return pages <= self.room and len(self.tickets) < self.settings.max_sequences

    async def start(self) -> Ready:
        """Starts the process and waits until it serves.

        Raises:
            StartupError: the worker refused to start or died; the message says why.
        """
        self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(self._started), name=f"worker-{self.index}")
        return await self._started

    def send(self, message: ToWorker) -> None:
        """Sends a message; to a worker that died it says nothing, and its tickets end by themselves."""
        if self._socket is not None:
            with suppress(zmq.Again):
                asyncio.ensure_future(self._socket.send(encode(message), zmq.DONTWAIT)).result()

    async def stop(self) -> None:
        """Ends the process; what still runs ends with an error."""
        self._stop.set()
        if self._supervisor is not None:
            await asyncio.wait({self._supervisor})

    async def _supervise(self, started: asyncio.Future[Ready]) -> None:
        """Keeps a process running. A first start that fails is not tried again."""
        backoff = _FIRST_BACKOFF
        with tempfile.TemporaryDirectory(prefix="d2o-serve-", ignore_cleanup_errors=True) as folder:
            while True:
                began = time.monotonic()
                reason = await self._live(Path(folder) / str(self.restarts), started)
                self._lose_everything()
                if not started.done():
                    started.set_exception(errors.StartupError(f"worker {self.index} did not start: {reason}"))
                if self._stop.is_set() or not self._has_served(started):
                    return
                if time.monotonic() - began > _LONGEST_BACKOFF:
                    backoff = _FIRST_BACKOFF
                _log.error("worker %d: %s; starting it again in %.1f s", self.index, reason, backoff)
                self.restarts += 1
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), backoff)
                backoff = min(2 * backoff, _LONGEST_BACKOFF)

    @staticmethod
    def _has_served(started: asyncio.Future[Ready]) -> bool:
        return not started.cancelled() and started.exception() is None

    async def _live(self, path: Path, started: asyncio.Future[Ready]) -> str:
        """One life of the process; returns how it ended."""
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        try:
            self._socket.bind(f"ipc://{path}")
            return await self._live_on(self._socket, f"ipc://{path}", started)
        except (OSError, zmq.ZMQError) as error:
            return f"{error}; its socket is {path}, set TMPDIR to another folder if that cannot be used"
        finally:
            self._socket.close()
            self._socket = None

    async def _live_on(self, socket: zmq.asyncio.Socket, address: str, started: asyncio.Future[Ready]) -> str:
        command = (sys.executable, "-m", self._module, address, str(os.getpid()))
        environment = _ENVIRONMENT | dict(os.environ) | self._environment
        process = await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)
        self._process = process
        hearing = asyncio.create_task(self._hear(socket, started))
        died, stopping = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        try:
            # Waits inside the socket until the process connects, which one that died never does.
            settings = asyncio.ensure_future(socket.send(encode(self.settings)))
            await asyncio.wait({hearing, died, stopping}, return_when=asyncio.FIRST_COMPLETED)
            settings.cancel()
            if stopping.done() and self.serving:
                self.send(Shutdown())
                await asyncio.wait({died}, timeout=_SECONDS_TO_STOP)
            elif died.done():
                await asyncio.wait({hearing}, timeout=_LAST_WORDS)
        finally:
            if process.returncode is None:
                process.kill()
            status = await died
            hearing.cancel()
            stopping.cancel()
        return await _how_it_ended(hearing, status)

    async def _hear(self, socket: zmq.asyncio.Socket, started: asyncio.Future[Ready]) -> str:
        """Takes what the process says; returns why, once it says that it will not start."""
        while True:
            message = decode_from_worker(await socket.recv())
            match message:
                case StepReport():
                    self._route(message)
                case Progress():
                    self._progress(message.text)
                case Ready():
                    self.ready, self.pool = message, message.pool
                    if not started.done():
                        started.set_result(message)
                case Refused():
                    if not started.done():
                        kind = _STARTUP_ERRORS.get(message.error, errors.StartupError)
                        started.set_exception(kind(message.message))
                    return message.message

    def _route(self, report: StepReport) -> None:
        self.pool = report.pool
        for admitted in report.admitted:
            if ticket := self.tickets.get(admitted.id):
                ticket.waiting = False
                ticket.events.put(admitted)
        for token in report.tokens:
            if ticket := self.tickets.get(token.id):
                ticket.events.put(token)
        endings: tuple[Ended | Failed, ...] = (*report.ended, *report.failed)
        for last in endings:
            self._end(last)

    def _end(self, last: Ended | Failed) -> None:
        if ticket := self.tickets.pop(last.id, None):
            ticket.done = True
            ticket.events.put(last)

    def _lose_everything(self) -> None:
        """Every stream of a dead worker ends with UNAVAILABLE."""
        self.ready = self.pool = None
        for ticket_id in list(self.tickets):
            self._end(Failed(ticket_id, "WorkerDied", "the worker that ran the request died; try again"))


async def _how_it_ended(hearing: asyncio.Task[str], status: int) -> str:
    await asyncio.wait({hearing})
    if hearing.cancelled():
        hint = ", perhaps for want of memory: see num_pages and memory_fraction" if status == -9 else ""
        return f"its process ended with status {status}{hint}"
    if error := hearing.exception():
        _log.error("what the worker said could not be taken", exc_info=error)
        return f"it was stopped after {type(error).__name__}: {error}"
    return hearing.result()
