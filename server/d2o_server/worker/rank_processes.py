"""Starts the other ranks of a worker as processes of its own, and ends with the first that ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import zmq

from d2o_server.engine.messages import WorkerSettings, encode
from d2o_server.worker.process import MODULE
from d2o_server.worker.ranks import Follower, Leader, Ranks

_SECONDS_TO_STOP = 2.0
_log = logging.getLogger(__name__)


@contextmanager
def ranks_of(socket: zmq.Socket[bytes], settings: WorkerSettings, address: str, number: int) -> Iterator[Ranks]:
    """This process among the ranks of its worker; rank 0 starts the others, which are gone afterwards.

    Args:
        socket: to the front, or to rank 0.
        settings: the worker's, or this rank's own.
        address: what ``socket`` is connected to.
        number: of this rank.
    """
    meeting = address.removeprefix("ipc://").removesuffix(f"-rank{number}") + "-ranks"
    if number:
        yield Follower(socket, number, settings.tensor_parallel, meeting)
        return
    sockets: list[zmq.Socket[bytes]] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for other in range(1, settings.tensor_parallel):
            sockets.append(socket.context.socket(zmq.PAIR))
            processes.append(_start(sockets[-1], f"{address}-rank{other}", other, settings.rank(other)))
        yield Leader(sockets, meeting) if sockets else Ranks()
    finally:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_STOP)
            process.kill()
        for other_socket in sockets:
            other_socket.close()


def _start(socket: zmq.Socket[bytes], address: str, number: int, settings: WorkerSettings) -> subprocess.Popen[bytes]:
    socket.setsockopt(zmq.LINGER, 0)
    socket.set_hwm(0)
    socket.bind(address)
    process = subprocess.Popen([sys.executable, "-m", MODULE, address, str(os.getpid()), str(number)])
    threading.Thread(target=_end_with, args=(process, number), daemon=True).start()
    socket.send(encode(settings))
    return process


def _end_with(process: subprocess.Popen[bytes], number: int) -> None:
    """Ends this process, whatever it is doing, once a rank is gone: without it no step can end."""
    status = process.wait()
    if status == 0:
        # It was told to stop, or agreed on why none can start: this process is about to say so and end as well.
        time.sleep(_SECONDS_TO_STOP)
    _log.error("rank %d ended with status %d; so does its worker", number, status)
    os._exit(1)
