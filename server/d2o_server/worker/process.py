"""A worker process: loads the model, then alternates between messages and steps until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

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

_ORPHAN_POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


def main() -> None:
    """Entry point of the process: ``python -m d2o_server.worker.process ADDRESS PARENT``."""
    logging.basicConfig(level=os.environ.get("D2O_LOG_LEVEL", "INFO"), format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(sys.argv[1])
    try:
        _serve(socket)
    finally:
        socket.close()
        context.term()


def _end_with(parent: int) -> None:
    """Ends the process, whatever it is doing, once the front process is gone: nobody else would."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_POLL_SECONDS)
    _log.error("the front process is gone; stopping")
    os._exit(1)


def _serve(socket: zmq.Socket[bytes]) -> None:
    settings = decode_settings(socket.recv())
    core = _start(socket, settings)
    if core is None:
        return
    while True:
        while socket.poll(0 if core else None):
            message = decode_to_worker(socket.recv())
            if isinstance(message, Shutdown):
                return
            core.handle(message)
        if core:
            if admission := core.admit():
                socket.send(encode(admission))
            socket.send(encode(core.step()))


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
