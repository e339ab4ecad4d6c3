"""A worker process: loads the model, then alternates between messages and steps until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import sys

import torch
import zmq

from d2o_server.engine.messages import (
    Progress,
    Ready,
    Refused,
    Shutdown,
    WorkerSettings,
    decode_settings,
    decode_to_worker,
    encode,
)
from d2o_server.errors import StartupError
from d2o_server.worker.build import build_worker
from d2o_server.worker.core import WorkerCore

_IDLE_POLL_MS = 1000
_log = logging.getLogger(__name__)


def main() -> None:
    """Entry point of the process: ``python -m d2o_server.worker.process ADDRESS``."""
    logging.basicConfig(level=os.environ.get("D2O_LOG_LEVEL", "INFO"), format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(sys.argv[1])
    try:
        _serve(socket)
    finally:
        socket.close()
        context.term()


def _serve(socket: zmq.Socket[bytes]) -> None:
    settings = decode_settings(socket.recv())
    core = _start(socket, settings)
    if core is None:
        return
    parent = os.getppid()
    while True:
        while socket.poll(0 if core else _IDLE_POLL_MS):
            message = decode_to_worker(socket.recv())
            if isinstance(message, Shutdown):
                return
            core.handle(message)
        if core:
            socket.send(encode(core.step()))
        if os.getppid() != parent:
            _log.error("the front process is gone; stopping")
            return


def _start(socket: zmq.Socket[bytes], settings: WorkerSettings) -> WorkerCore | None:
    def progress(text: str) -> None:
        socket.send(encode(Progress(text)))

    try:
        worker = build_worker(settings, progress)
    except StartupError as error:
        socket.send(encode(Refused(type(error).__name__, str(error))))
        return None
    except Exception as error:  # noqa: BLE001  the front must hear of whatever happened
        _log.exception("the worker could not start")
        socket.send(encode(Refused("StartupError", f"the worker could not start: {type(error).__name__}: {error}")))
        return None
    ready = Ready(
        shape=worker.shape,
        page_size=settings.page_size,
        page_bytes=worker.page_bytes,
        pool=worker.core.pool_state(),
        max_model_len=worker.max_model_len,
    )
    socket.send(encode(ready))
    torch.set_num_threads(settings.threads)
    return worker.core


if __name__ == "__main__":
    main()
