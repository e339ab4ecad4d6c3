"""The front's side of the workers: starts them, sends requests to the one with most room, routes what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

from d2o_server import errors
from d2o_server.engine.mailbox import Mailbox
from d2o_server.engine.messages import (
    Admitted,
    Cancel,
    Ended,
    Failed,
    NewToken,
    PoolState,
    Progress,
    Ready,
    Refused,
    Shutdown,
    StepReport,
    Stop,
    Submit,
    ToWorker,
    WorkerSettings,
    decode_from_worker,
    encode,
)

_log = logging.getLogger(__name__)
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 30.0

# Large temporaries come from the heap and stay there: mapping and faulting them anew costs more than using them.
_WORKER_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483648"}

_STARTUP_ERRORS = {kind.__name__: kind for kind in (errors.StartupError, errors.ModelUnsupported, errors.SettingsError)}

TicketEvent = Admitted | NewToken | Ended | Failed


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way through a worker: what comes back, in order."""

    message: Submit
    worker: Worker
    events: Mailbox[TicketEvent] = field(default_factory=Mailbox)
    waiting: bool = True
    done: bool = False

    @property
    def id(self) -> str:
        return self.message.id


class Worker:
    """One worker process and its socket. It is started again with backoff when it dies."""

    def __init__(self, index: int, settings: WorkerSettings, progress: Callable[[str], None]) -> None:
        self.index, self.settings = index, settings
        self.ready: Ready | None = None
        self.pool: PoolState | None = None
        self.tickets: dict[str, Ticket] = {}
        self.restarts = 0
        self._progress = progress
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="d2o-serve-")
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[Ready] | None = None
        self._stopping = False
        self.ended = asyncio.Event()

    @property
    def serving(self) -> bool:
        return self.ready is not None

    @property
    def unpromised(self) -> int:
        """Pages that no admitted request is promised, less what those in the queue will ask for: may be negative."""
        return self.pool.total - self.pool.reserved if self.pool else 0

    async def start(self) -> Ready:
        """Starts the process and waits until it serves.

        Raises:
            StartupError: the worker refused to start; the message says why.
        """
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name=f"worker-{self.index}")
        return await self._first

    async def _run(self) -> None:
        backoff = _FIRST_BACKOFF
        while not self._stopping:
            began = time.monotonic()
            await self._run_once()
            self._lose_everything()
            if self._stopping or (self._first is not None and not self._first.done()):
                break
            if time.monotonic() - began > _LONGEST_BACKOFF:
                backoff = _FIRST_BACKOFF
            self.restarts += 1
            _log.error("worker %d died; starting it again in %.1f s", self.index, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF)
        if self._first is not None and not self._first.done():
            self._first.set_exception(errors.StartupError(f"worker {self.index} died while it started"))
        self.ended.set()

    async def _run_once(self) -> None:
        """One life of the process."""
        address = f"ipc://{Path(self._folder.name) / f'{self.restarts}.sock'}"
        context = zmq.asyncio.Context.instance()
        self._socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "d2o_server.worker.process",
            address,
            env=_WORKER_ENVIRONMENT | dict(os.environ),
            start_new_session=True,
        )
        died = asyncio.create_task(self._process.wait())
        try:
            await self._socket.send(encode(self.settings))
            while not died.done():
                message = asyncio.ensure_future(self._socket.recv())
                await asyncio.wait({message, died}, return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    message.cancel()
                    break
                self._receive(message.result())
        finally:
            if not died.done():
                self._process.kill()
            await died
            self._socket.close()
            self._socket = None

    def _receive(self, data: bytes) -> None:
        message = decode_from_worker(data)
        match message:
            case StepReport():
                self._route(message)
            case Progress():
                self._progress(message.text)
            case Ready():
                self.ready, self.pool = message, message.pool
                if self._first is not None and not self._first.done():
                    self._first.set_result(message)
            case Refused():
                kind = _STARTUP_ERRORS.get(message.error, errors.StartupError)
                if self._first is not None and not self._first.done():
                    self._first.set_exception(kind(message.message))
                self._stopping = True

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
            if ticket := self.tickets.pop(last.id, None):
                ticket.done = True
                ticket.events.put(last)
        for cancelled in report.cancelled:
            self.tickets.pop(cancelled, None)

    def _lose_everything(self) -> None:
        """Every stream of a dead worker ends with UNAVAILABLE."""
        self.ready = self.pool = None
        tickets, self.tickets = self.tickets, {}
        for ticket in tickets.values():
            ticket.done = True
            ticket.events.put(Failed(ticket.id, "WorkerDied", "the worker that ran the request died; try again"))

    async def send(self, message: ToWorker) -> None:
        """Sends a message, if the worker lives."""
        if self._socket is not None:
            await self._socket.send(encode(message))

    async def stop(self) -> None:
        """Ends the process; what still runs is lost."""
        self._stopping = True
        await self.send(Shutdown())
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 5)
            if self._process.returncode is None:
                self._process.kill()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._folder.cleanup()


class Dispatcher:
    """Bounded waiting over all workers."""

    def __init__(self, workers: list[Worker], *, max_waiting: int, max_waiting_tokens: int) -> None:
        self.workers = workers
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._seconds_per_request = 1.0
        self._last_end = time.monotonic()

    @property
    def waiting(self) -> list[Ticket]:
        """Requests that no worker has admitted yet."""
        return [ticket for worker in self.workers for ticket in worker.tickets.values() if ticket.waiting]

    @property
    def running(self) -> int:
        return sum(not ticket.waiting for worker in self.workers for ticket in worker.tickets.values())

    async def submit(self, message: Submit) -> Ticket:
        """Sends a request to the serving worker with most room.

        Raises:
            Overloaded: the bounded queue is full. Unavailable: no worker serves.
        """
        serving = [worker for worker in self.workers if worker.serving]
        if not serving:
            raise errors.Unavailable("no worker is serving at the moment; it is being restarted")
        self._check_queue(len(message.prompt))
        worker = max(serving, key=lambda worker: (worker.unpromised, -len(worker.tickets)))
        ticket = Ticket(message, worker)
        worker.tickets[ticket.id] = ticket
        await worker.send(message)
        return ticket

    def _check_queue(self, prompt_tokens: int) -> None:
        waiting = self.waiting
        if len(waiting) >= self._max_waiting:
            raise errors.Overloaded(f"the queue is full ({len(waiting)} requests wait)", self._retry_after(waiting))
        tokens = sum(len(ticket.message.prompt) for ticket in waiting)
        if waiting and tokens + prompt_tokens > self._max_waiting_tokens:
            raise errors.Overloaded(f"the queue is full ({tokens} prompt tokens wait)", self._retry_after(waiting))

    def _retry_after(self, waiting: list[Ticket]) -> int:
        """Milliseconds until about half of the queue should have been admitted."""
        return int(1000 * min(30.0, max(0.1, self._seconds_per_request * len(waiting) / 2)))

    async def release(self, ticket: Ticket) -> None:
        """Ends a request's stay: cancels it unless it has ended. Its pages are free within one step."""
        if not ticket.done:
            ticket.worker.tickets.pop(ticket.id, None)
            ticket.done = True
            await ticket.worker.send(Cancel(ticket.id))
        now = time.monotonic()
        self._seconds_per_request += 0.2 * (now - self._last_end - self._seconds_per_request)
        self._last_end = now

    async def stop_string(self, ticket: Ticket) -> None:
        """Ends a request as finished because its text reached a stop string."""
        await ticket.worker.send(Stop(ticket.id))
