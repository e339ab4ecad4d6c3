"""The front's side of one worker process: keeps it running, sends to it, and routes what it reports."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from d2o_server import errors
from d2o_server.engine.line import Line
from d2o_server.engine.messages import (
    CacheState,
    Ended,
    Failed,
    PoolState,
    Progress,
    Ready,
    Refused,
    Shutdown,
    StepReport,
    ToWorker,
    WorkerSettings,
    decode_from_worker,
    encode,
)
from d2o_server.engine.observer import Observer
from d2o_server.engine.pulse import Pulse, is_stopped, pulse_file
from d2o_server.engine.supervision import Keeper, Restarts, Supervision, watch
from d2o_server.engine.ticket import Ticket
from d2o_server.engine.worker_process import WorkerProcess

_log = logging.getLogger(__name__)
_SECONDS_TO_STOP = 5.0
# Until a process has imported what it needs its pulse does not beat.
_SECONDS_TO_FIRST_BEAT = 300.0
# How long what a process said before it died may still be on its way.
_LAST_WORDS = 0.1

_STARTUP_ERRORS = {kind.__name__: kind for kind in (errors.StartupError, errors.ModelUnsupported, errors.SettingsError)}


class Worker:
    """One worker process and its socket. A process that dies or hangs is started again as ``supervision`` says.

    ``tickets`` are the requests that it has and that have not ended, ``waiting`` those of them that it has not
    admitted, both by their ``run``, and ``line`` these in their order. ``pool`` is as of its last report, and None, as
    are ``ready`` and ``cache``, while no process serves. ``read_tokens`` and ``generated_tokens`` count over all of its
    lives, each of which has pool and type of the first: what was admitted then must still fit. ``given_up`` says why it
    is not started again. ``environment`` is added to what the process inherits; ``module`` is what it runs.
    """

    def __init__(
        self,
        index: int,
        settings: WorkerSettings,
        progress: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        module: str = "d2o_server.worker.process",
        observer: Observer | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        self.index, self.settings = index, settings
        self.ready: Ready | None = None
        self.pool: PoolState | None = None
        self.cache: CacheState | None = None
        self.tickets: dict[str, Ticket] = {}
        self.waiting: dict[str, Ticket] = {}
        self.line = Line()
        self.restarts = self.read_tokens = self.generated_tokens = 0
        self.keeper: Keeper | None = None
        self.given_up: str | None = None
        self._observer = observer or Observer()
        self._supervision = supervision or Supervision()
        self._reports = self._served_from = 0
        self._ready_at: float | None = None
        self._device: str | None = None
        self._progress, self._environment, self._module = progress, dict(environment or {}), module
        self._process: WorkerProcess | None = None
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
        return self._process.pid if self._process else None

    @property
    def free_pages(self) -> int:
        """Pages that no admitted request is promised."""
        return self.pool.total - self.pool.reserved if self.pool else 0

    @property
    def free_places(self) -> int:
        """How many more requests could run beside those that do."""
        return self.settings.max_sequences - len(self.tickets) + len(self.waiting)

    @property
    def room(self) -> int:
        """Free pages less what the requests that it has not admitted yet will take; negative where they wait."""
        return self.free_pages - self.line.pages

    def fits(self, pages: int) -> bool:
        """Whether a request that needs this many pages would be admitted in the next step."""
        return pages <= self.room and len(self.tickets) < self.settings.max_sequences

    def take(self, ticket: Ticket) -> None:
        """Has it among its requests; what the process is told of it is another matter."""
        self.tickets[ticket.run] = ticket
        if ticket.waiting and ticket.run not in self.waiting:
            self.waiting[ticket.run] = ticket
            self.line.add(ticket)

    def drop(self, run: str) -> Ticket | None:
        """Has it no longer; returns it, if it was there."""
        self._leave_line(run)
        return self.tickets.pop(run, None)

    def _leave_line(self, run: str) -> None:
        if ticket := self.waiting.pop(run, None):
            self.line.remove(ticket)

    async def start(self) -> Ready:
        """Starts the process and waits until it serves.

        Raises:
            StartupError: the worker refused to start or died; the message says why.
        """
        self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(self._started), name=f"worker-{self.index}")
        return await self._started

    def send(self, message: ToWorker) -> None:
        """Sends a message; to a worker that died it says nothing, and its keeper sees to its tickets."""
        if self._socket is not None and self.serving:
            with suppress(zmq.Again):
                asyncio.ensure_future(self._socket.send(encode(message), zmq.DONTWAIT)).result()

    async def stop(self) -> None:
        """Ends the process; what still runs ends with an error."""
        self._stop.set()
        if self._supervisor is not None:
            await asyncio.wait({self._supervisor})

    async def _supervise(self, started: asyncio.Future[Ready]) -> None:
        """Keeps a process running. A first start that fails is not tried again."""
        restarts = Restarts(self._supervision)
        with tempfile.TemporaryDirectory(prefix="d2o-serve-", ignore_cleanup_errors=True) as folder:
            while True:
                reason = await self._live(Path(folder) / str(self.restarts), started)
                served, worked = self._end_life()
                if not started.done():
                    started.set_exception(errors.StartupError(f"worker {self.index} did not start: {reason}"))
                if self._stop.is_set() or not self._has_served(started):
                    return
                pause = restarts.pause(served, worked=worked)
                if pause is None:
                    self._give_up(reason, restarts.in_a_row)
                    return
                _log.error("worker %d: %s; starting it again in %.1f s", self.index, reason, pause)
                self.restarts += 1
                self._observer.worker_restarted(self.index)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), pause)

    def _end_life(self) -> tuple[float, bool]:
        """Lets go of what died; returns for how long it had served, and whether any request has got further by it."""
        served = 0.0 if self._ready_at is None else time.monotonic() - self._ready_at
        worked, self._served_from = self.generated_tokens > self._served_from, self.generated_tokens
        self.ready = self.pool = self.cache = self._ready_at = None
        if self._stop.is_set() or self.keeper is None:
            self.fail_tickets("the worker that ran the request died; try again")
        else:
            self.keeper.worker_died(self)
        return served, worked

    def _give_up(self, reason: str, deaths: int) -> None:
        self.given_up = f"worker {self.index} is given up after {deaths} deaths in a row; the last: {reason}"
        _log.error("%s", self.given_up)
        if self.keeper is not None:
            self.keeper.worker_given_up(self)

    def fail_tickets(self, message: str) -> None:
        """Every stream of it ends with UNAVAILABLE."""
        for run in list(self.tickets):
            self._end(Failed(run, "WorkerDied", message))

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
        pulse = Pulse(pulse_file(address), create=True)
        ranks = self.settings.tensor_parallel
        self._process = process = WorkerProcess(self._module, address, self._environment, ranks)
        watching = asyncio.create_task(self._watch(pulse))
        hearing = asyncio.create_task(self._hear(socket, started))
        died, stopping = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        try:
            # Waits inside the socket until the process connects, which one that died never does.
            settings = asyncio.ensure_future(socket.send(encode(self.settings)))
            await asyncio.wait({hearing, died, stopping, watching}, return_when=asyncio.FIRST_COMPLETED)
            settings.cancel()
            if stopping.done() and self.serving:
                self.send(Shutdown())
                await asyncio.wait({died}, timeout=_SECONDS_TO_STOP)
            elif died.done():
                await asyncio.wait({hearing}, timeout=_LAST_WORDS)
        finally:
            if process.status is None or self.settings.tensor_parallel > 1:
                process.kill()
            status = await died
            for task in (hearing, stopping, watching):
                task.cancel()
            await asyncio.wait({watching})
            pulse.close()
        ended = await _how_it_ended(hearing, status)
        return ended if watching.cancelled() else f"killed, because {watching.result()}"

    async def _watch(self, pulse: Pulse) -> str:
        def timeout() -> float:
            given = self._supervision.timeout(self._device)
            return given if pulse.count or is_stopped(self.pid) else max(given, _SECONDS_TO_FIRST_BEAT)

        return await watch(
            timeout=timeout,
            beats=lambda: pulse.count,
            reports=lambda: self._reports,
            busy=lambda: self.serving and bool(self.tickets),
        )

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
                    self._begin(message)
                    if not started.done():
                        started.set_result(message)
                case Refused():
                    if not started.done():
                        kind = _STARTUP_ERRORS.get(message.error, errors.StartupError)
                        started.set_exception(kind(message.message))
                    return message.message

    def _begin(self, ready: Ready) -> None:
        self.ready, self.pool = ready, ready.pool
        self._ready_at, self._device = time.monotonic(), ready.device
        self.settings = msgspec.structs.replace(self.settings, num_pages=ready.pool.total, dtype=ready.dtype)
        if self.keeper is not None:
            self.keeper.worker_ready(self)

    def _route(self, report: StepReport) -> None:
        self._reports += 1
        free_before = self.free_pages
        self.pool = report.pool
        self.cache = report.cache or self.cache
        self.generated_tokens += len(report.tokens)
        for admitted in report.admitted:
            ticket = self.tickets.get(admitted.id)
            self._leave_line(admitted.id)
            if ticket is not None and ticket.admit(admitted):
                self.read_tokens += len(ticket.message.prompt)
        for token in report.tokens:
            if ticket := self.tickets.get(token.id):
                ticket.take(token)
        endings: tuple[Ended | Failed, ...] = (*report.ended, *report.failed)
        for last in endings:
            self._end(last)
        if self.free_pages > free_before and self.keeper is not None:
            self.keeper.pages_freed(self)

    def _end(self, last: Ended | Failed) -> None:
        if ticket := self.drop(last.id):
            ticket.end(last)


async def _how_it_ended(hearing: asyncio.Task[str], status: int) -> str:
    await asyncio.wait({hearing})
    if hearing.cancelled():
        hint = ", perhaps for want of memory: see num_pages and memory_fraction" if status == -9 else ""
        return f"its process ended with status {status}{hint}"
    if error := hearing.exception():
        _log.error("what the worker said could not be taken", exc_info=error)
        return f"it was stopped after {type(error).__name__}: {error}"
    return hearing.result()
