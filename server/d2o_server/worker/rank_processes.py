"""Rank 0's side of the other ranks of its worker, which it has forked: tells them their settings, ends with any."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from d2o_server.engine.messages import WorkerSettings, encode
from d2o_server.worker.process import Place
from d2o_server.worker.ranks import Follower, Leader, Ranks

_SECONDS_TO_STOP = 2.0
_log = logging.getLogger(__name__)


@contextmanager
def ranks_of(socket: zmq.Socket[bytes], settings: WorkerSettings, place: Place) -> Iterator[Ranks]:
    """This process among the ranks of its worker; those that rank 0 has forked are gone afterwards.

    Args:
        socket: to the front, or to rank 0.
        settings: the worker's, or this rank's own.
        place: where this process stands.

    Raises:
        ValueError: rank 0 has forked others than the settings ask for.
    """
    meeting = place.address.removeprefix("ipc://").removesuffix(f"-rank{place.rank}") + "-ranks"
    if place.rank:
        yield Follower(socket, place.rank, settings.tensor_parallel, meeting)
        return
    if len(place.others) != settings.tensor_parallel - 1:
        raise ValueError(f"tensor_parallel: got {settings.tensor_parallel}, and {len(place.others)} other ranks run")
    others = [_Other(rank, process) for rank, process in enumerate(place.others, 1)]
    sockets: list[zmq.Socket[bytes]] = []
    try:
        sockets.extend(
            _told(socket.context, f"{place.address}-rank{rank}", settings.rank(rank))
            for rank in range(1, settings.tensor_parallel)
        )
        yield Leader(sockets, meeting) if sockets else Ranks()
    finally:
        for other in others:
            other.end()
        for other_socket in sockets:
            other_socket.close()


def _told(context: zmq.Context[zmq.Socket[bytes]], address: str, settings: WorkerSettings) -> zmq.Socket[bytes]:
    """A socket to the rank that connects to ``address``, which will find its settings there."""
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.set_hwm(0)
    socket.bind(address)
    socket.send(encode(settings))
    return socket


class _Other:
    """Another rank. Once it is gone this process ends, whatever it is doing: without it no step can end."""

    def __init__(self, rank: int, process: int) -> None:
        self._rank, self._process = rank, process
        self._stopping, self._gone = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """Waits a moment for it to end by itself."""
        self._stopping.set()
        if not self._gone.wait(_SECONDS_TO_STOP):
            os.kill(self._process, signal.SIGKILL)
            self._gone.wait()

    def _watch(self) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        self._gone.set()
        if status == 0:
            # It was told to stop, or agreed on why none can start: this process is about to say so and end as well.
            self._stopping.wait(_SECONDS_TO_STOP)
        if not self._stopping.is_set():
            _log.error("rank %d ended with status %d; so does its worker", self._rank, status)
            os._exit(1)
