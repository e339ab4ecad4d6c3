"""Starts worker processes, from the front: all of them are forks of one template, which this module starts as well.

The other side is :mod:`d2o_server.worker.template`.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

_TEMPLATE_MODULE = "d2o_server.worker.template"
_KILLED = -signal.SIGKILL
# From the end of a template's connections to its own.
_SECONDS_TO_END = 2.0

# Large temporaries come from the heap and stay there: mapping and faulting them anew costs more than using them.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483648"}
# A thread that waits for the others of its loop soon sleeps: where one of them has no core, it may stand in its way.
_OPENMP = {"GOMP_SPINCOUNT": "1000"}


def process_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` and, where it does not say otherwise, what memory and threads of a worker do best with."""
    defaults = _MALLOC if "OMP_WAIT_POLICY" in environment else _MALLOC | _OPENMP
    return defaults | dict(environment)


class WorkerProcess:
    """A worker's process, from the order for it to its end; of ``ranks`` processes it starts the others itself.

    ``pid`` is None until it has been forked, and again once it has ended; then ``status`` is its exit status, negative
    for a signal. Where the template ends that is the template's.
    """

    def __init__(self, module: str, address: str, environment: Mapping[str, str], ranks: int = 1) -> None:
        self.pid: int | None = None
        self.status: int | None = None
        self._group: int | None = None
        variables = process_environment(os.environ | dict(environment))
        order = {
            "module": module,
            "address": address,
            "directory": str(Path.cwd()),
            "environment": variables,
            "ranks": ranks,
        }
        self._order = json.dumps(order).encode() + b"\n"
        self._template = _Template.current()
        self._connection = self._template.connect()

    async def wait(self) -> int:
        """Orders the process, and returns its status once it has ended; to be awaited once."""
        reader, writer = await asyncio.open_connection(sock=self._connection)
        writer.write(self._order)
        with suppress(ConnectionError):
            while self.status is None and (line := await reader.readline()):
                if self._group is None:
                    self.pid = self._group = int(line)
                    self._template.has_forked = True
                else:
                    self.status = int(line)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        if self.status is None:
            self.kill()
            self.status = await asyncio.to_thread(self._template.status)
        self.pid = None
        return self.status

    def kill(self) -> None:
        """Ends it and what it has started, which may not notice by itself: it may be stopped."""
        if self._group is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)
        elif self.status is None:
            self._template.abandon()
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)


class _Template:
    """The process that workers are forked from; one serves all workers of this process, in all of their lives.

    Raises:
        OSError: it cannot be started.
    """

    _current: _Template | None = None
    _abandoned: ClassVar[list[_Template]] = []

    def __init__(self) -> None:
        self.has_forked = False
        self._control, theirs = socket.socketpair()
        with theirs:
            command = (sys.executable, "-m", _TEMPLATE_MODULE, str(theirs.fileno()), str(os.getpid()))
            self._process = subprocess.Popen(
                command, env=process_environment(os.environ), pass_fds=(theirs.fileno(),), start_new_session=True
            )

    @classmethod
    def current(cls) -> _Template:
        """The one that runs; it is started where there is none."""
        if cls._current is not None and cls._current._process.poll() is not None:
            cls._current.end()
            cls._current = None
        cls._current = cls._current or cls()
        return cls._current

    def connect(self) -> socket.socket:
        """A connection for one order; it is at its end where the template is."""
        ours, theirs = socket.socketpair()
        with theirs, suppress(ConnectionError):
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        ours.setblocking(False)
        return ours

    def abandon(self) -> None:
        """Sees to it that one that does not answer is not asked again; what it has forked goes on."""
        if _Template._current is self:
            _Template._current = None
            if self.has_forked:
                _Template._abandoned.append(self)
            else:
                self.end()

    def status(self) -> int:
        """Its exit status; that of a process that was killed where it goes on, and only a connection has ended."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_SECONDS_TO_END)
        return _KILLED

    def end(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    @classmethod
    def end_all(cls) -> None:
        for template in (cls._current, *cls._abandoned):
            if template is not None:
                template.end()


atexit.register(_Template.end_all)
