"""A worker process: watches the one that started it from its first moment, and serves.

Importing what serves takes seconds, on a busy machine many: a front that is gone by then must not be waited for.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from d2o_server.telemetry import logs

MODULE = "d2o_server.worker.process"
_ORPHAN_POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Which of its worker's ranks a process is, and who tells it what to do.

    Attributes:
        address: where the front listens, or rank 0 for another rank.
        parent: the process that started it, which it does not outlive.
        rank: its number.
        others: process ids of the other ranks, in order, where it is rank 0.
    """

    address: str
    parent: int
    rank: int = 0
    others: tuple[int, ...] = ()


def main() -> None:
    """Entry point of the process: ``python -m d2o_server.worker.process ADDRESS PARENT [RANKS]``.

    It is forked from a template (:mod:`d2o_server.worker.template`), and forks the other ranks of its worker itself.
    """
    call_it("d2o-worker")
    address, parent, ranks, *_ = (*sys.argv[1:], "1")
    place = fork_ranks(address, int(parent), int(ranks))
    logs.configure(os.environ.get("D2O_LOG_LEVEL", "INFO"), os.environ.get("D2O_LOG_FORMAT", "text"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(place.parent,), daemon=True).start()

    with importing():
        from d2o_server.worker.serving import serve

    serve(place)
    end()


def fork_ranks(address: str, parent: int, count: int) -> Place:
    """Forks ranks 1 to ``count`` - 1, in which it returns as well, each with its own place.

    To be called before there is what a fork does not survive: threads, and what is known of a GPU.
    """
    leader, others = os.getpid(), []
    for rank in range(1, count):
        forked = fork()
        if not forked:
            return Place(f"{address}-rank{rank}", leader, rank)
        others.append(forked)
    return Place(address, parent, 0, tuple(others))


def fork() -> int:
    """``os.fork`` of a process that has no thread of its own."""
    with warnings.catch_warnings():
        # Of a linear algebra library's threads, which it ends before a fork by itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def end() -> NoReturn:
    """Ends the process with status 0 once all that was said is written, if anybody reads it.

    An interpreter that comes to its own end takes down every object, which takes a second, and waits for other ranks
    and captured graphs.
    """
    logging.shutdown()
    with suppress(OSError):
        print(end="", flush=True)
    os._exit(0)


@contextmanager
def importing() -> Iterator[None]:
    """While a process imports what it keeps to its end: its garbage collector never walks over that.

    Half a million objects stay, hardly any of them garbage: walking over them is a sixth of the time that importing
    takes, and would give a forked process a copy of its own.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def call_it(name: str) -> None:
    """Gives this process a name, of at most 15 characters, by which ``ps`` and ``top`` know it, where that can be."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _end_with(parent: int) -> None:
    """Ends the process, whatever it is doing, once the one that started it is gone: nobody else would."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_POLL_SECONDS)
    _log.error("the process that started this one is gone; stopping")
    os._exit(1)


if __name__ == "__main__":
    main()
