"""What a worker process does: loads the model, then alternates between messages and steps until it is told to stop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq

from d2o_server.engine.messages import (
    FromWorker,
    Progress,
    Ready,
    Refused,
    Shutdown,
    StepReport,
    WorkerSettings,
    decode_settings,
    decode_to_worker,
    encode,
)
from d2o_server.engine.pulse import keep_beating, pulse_file
from d2o_server.errors import StartupError
from d2o_server.worker.build import build_worker
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.dtype import dtype_name
from d2o_server.worker.process import Place
from d2o_server.worker.rank_processes import ranks_of
from d2o_server.worker.ranks import Ranks

# A step that fails because another process has died says so in words that do not help: who watches it knows better.
_SECONDS_FOR_CAUSE = 1.5
_log = logging.getLogger(__name__)


def serve(place: Place) -> None:
    """Serves the front, or rank 0, until it says to stop."""
    if place.rank == 0:
        keep_beating(pulse_file(place.address))
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(place.address)
    try:
        _serve(socket, place)
    finally:
        socket.close()
        context.term()


def _serve(socket: zmq.Socket[bytes], place: Place) -> None:
    def say(message: FromWorker) -> None:
        if place.rank == 0:
            socket.send(encode(message))

    settings = decode_settings(socket.recv())
    with ranks_of(socket, settings, place) as ranks:
        core = _start(say, settings if place.rank else settings.rank(0), ranks)
        if core is not None:
            with _failing_as_one(ranks):
                _run(socket, say, core, ranks)


@contextmanager
def _failing_as_one(ranks: Ranks) -> Iterator[None]:
    """Ends the process at once where other ranks, which wait inside the step that failed, depend on that."""
    try:
        yield
    except Exception:
        if ranks.count == 1:
            raise
        time.sleep(_SECONDS_FOR_CAUSE)
        _log.exception("rank %d fails, and its worker with it", ranks.number)
        os._exit(1)


def _run(socket: zmq.Socket[bytes], say: Callable[[FromWorker], None], core: WorkerCore, ranks: Ranks) -> None:
    def tell(report: StepReport) -> None:
        ranks.note(report)
        say(report)

    while True:
        for data in ranks.take(lambda: _received(socket, wait=not core)):
            message = decode_to_worker(data)
            if isinstance(message, Shutdown):
                return
            core.handle(message)
        if core:
            if admission := core.admit():
                say(admission)
            tell(core.step(tell))
            if not core:
                core.check_integrity()


def _received(socket: zmq.Socket[bytes], *, wait: bool) -> list[bytes]:
    """What the front has sent; ``wait``: at least one message."""
    messages = [socket.recv()] if wait else []
    while socket.poll(0):
        messages.append(socket.recv())
    return messages


def _start(say: Callable[[FromWorker], None], settings: WorkerSettings, ranks: Ranks) -> WorkerCore | None:
    def progress(text: str) -> None:
        say(Progress(text))

    try:
        worker = build_worker(settings, progress, ranks)
    except StartupError as error:
        say(Refused(type(error).__name__, str(error)))
        return None
    except Exception as error:  # noqa: BLE001  the front must hear of whatever happened
        _log.exception("the worker could not start")
        say(Refused("StartupError", f"the worker could not start: {type(error).__name__}: {error}"))
        return None
    pool = worker.core.runner.caches.pool
    ready = Ready(
        shape=worker.shape,
        page_size=settings.page_size,
        page_bytes=worker.page_bytes,
        pool=worker.core.pool_state(),
        max_model_len=worker.max_model_len,
        device=str(pool.device),
        dtype=dtype_name(pool.k.dtype),
    )
    say(ready)
    return worker.core
