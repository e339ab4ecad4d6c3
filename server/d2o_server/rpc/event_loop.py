"""An event loop on which gRPC's completion queue does not stand still.

For each event, a thread of gRPC's writes one byte into a socket, and the loop, woken by it, reads one byte and takes
all events that are there. So bytes pile up while the loop is busy. A Linux socket holds 278 of them; then the thread
sleeps until half of them are read, one a round of the loop, and with it every event, that of a new call too: beside 256
busy streams one waited 100 ms.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeVarTuple

_Arguments = TypeVarTuple("_Arguments")

_AT_ONCE = 4096


class EventLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop, which reads all but one of the bytes before gRPC's handler reads its one.

    An event is there before its byte is written, so what these bytes stand for is taken by this very call.
    """

    def add_reader(self, fd: Any, callback: Callable[[*_Arguments], Any], *args: *_Arguments) -> None:
        """As in asyncio; knows gRPC's handler by its name."""
        if isinstance(fd, socket.socket) and "PollerCompletionQueue._handle_events" in repr(callback):
            callback = _after_draining(fd, callback)
        super().add_reader(fd, callback, *args)


def _after_draining(wakeups: socket.socket, handle: Callable[[*_Arguments], Any]) -> Callable[[*_Arguments], None]:
    def drain_and_handle(*args: *_Arguments) -> None:
        try:
            waiting = len(wakeups.recv(_AT_ONCE, socket.MSG_PEEK))
        except BlockingIOError:
            # gRPC's socket is every loop's of the process: another one was faster, and passes on what is ours.
            return
        if waiting > 1:
            wakeups.recv(waiting - 1)
        handle(*args)

    return drain_and_handle
