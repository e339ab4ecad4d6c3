"""A process that has imported what a worker needs, and forks a worker whenever the front asks.

Importing torch and transformers takes seconds, a fork none; and what was imported is in memory once for all workers.
Threads and what is known of a GPU do not survive a fork: until then this process has neither.
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from d2o_server.worker import process

_ORPHAN_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A worker to be, of ``ranks`` processes: it runs ``module`` as ``python -m`` does; the front is at ``address``."""

    module: str
    address: str
    directory: str
    environment: dict[str, str]
    ranks: int = 1


class Template:
    """Takes orders and says what becomes of them.

    For each worker the front sends one end of a connection over ``control``, and over the other the order, a line of
    JSON. It hears the process's id and, once that has ended, its status, negative for a signal: a line each. A worker
    whose connection is closed is killed, and all are when ``control`` is.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._workers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)

    def serve(self) -> Order | None:
        """Serves until the front is gone and returns None; in a process that it forked it returns the order."""
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for end in (self._control, self._woken):
            self._selector.register(end, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._bury()
                elif key.fileobj is not self._control:
                    # One that has been buried since this was selected has no connection any more.
                    if key.data in self._workers:
                        self._selector.unregister(key.fileobj)
                        _kill(key.data)
                elif (connection := self._accept()) is None:
                    signal.set_wakeup_fd(-1)
                    for worker in self._workers:
                        _kill(worker)
                    return None
                elif order := self._take(connection):
                    return order

    def _accept(self) -> socket.socket | None:
        """The connection of a worker to be; None where the front is gone."""
        descriptors: list[int] = []
        with suppress(ConnectionError):
            _, descriptors, *_ = socket.recv_fds(self._control, 1, 1)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
            return socket.socket(fileno=descriptor)
        return None

    def _take(self, connection: socket.socket) -> Order | None:
        """Forks what the connection orders; returns the order in the new process, and None in this one."""
        with connection.makefile("rb") as lines:
            line = lines.readline()
        if not line or _is_closed(connection):
            connection.close()
            return None
        worker = process.fork()
        # Both sides do it, so that it has been done whoever goes first: a worker is killed with what it has started.
        with suppress(OSError):
            os.setpgid(worker, worker)
        if not worker:
            self._leave()
            connection.close()
            return Order(**json.loads(line))
        self._workers[worker] = connection
        self._selector.register(connection, selectors.EVENT_READ, worker)
        _say(connection, worker)
        return None

    def _leave(self) -> None:
        """Lets go, in a new process, of what is the template's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for end in (self._control, self._woken, self._waker, *self._workers.values()):
            end.close()

    def _bury(self) -> None:
        """Tells of every worker that has ended."""
        with suppress(BlockingIOError):
            while self._woken.recv(64):
                pass
        while self._workers:
            worker, status = os.waitpid(-1, os.WNOHANG)
            if not worker:
                return
            connection = self._workers.pop(worker)
            with suppress(KeyError):
                self._selector.unregister(connection)
            _say(connection, os.waitstatus_to_exitcode(status))
            connection.close()


def _say(connection: socket.socket, number: int) -> None:
    with suppress(ConnectionError):
        connection.sendall(b"%d\n" % number)


def _is_closed(connection: socket.socket) -> bool:
    with suppress(BlockingIOError):
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    return False


def _kill(worker: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)


@contextmanager
def _ending_with(parent: int) -> Iterator[None]:
    """Ends the process where the one that started it goes while something takes long; leaves no thread behind."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_ORPHAN_POLL_SECONDS):
            if os.getppid() != parent:
                os._exit(1)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


def _become(order: Order, parent: int) -> None:
    import torch

    os.chdir(order.directory)
    os.environ.clear()
    os.environ.update(order.environment)
    sys.argv = [order.module, order.address, str(parent), str(order.ranks)]
    # Should a library have looked for a GPU while it was imported, this process could not use one.
    if torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, "-m", *sys.argv])  # noqa: S606
    if order.module == process.MODULE:
        process.main()
    else:
        runpy.run_module(order.module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Entry point of the process: ``python -m d2o_server.worker.template CONTROL PARENT``.

    ``CONTROL`` is the descriptor of a socket to the front, whose process is ``PARENT``.
    """
    control, parent = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(control, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process.call_it("d2o-template")
    with _ending_with(parent), process.importing():
        import d2o_server.worker.serving  # noqa: F401
    template = os.getpid()
    order = Template(socket.socket(fileno=control)).serve()
    if order is not None:
        _become(order, template)


if __name__ == "__main__":
    main()
