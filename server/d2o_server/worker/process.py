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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from d2o_server.telemetry import logs

MODULE = "d2o_server.worker.process"
_ORPHAN_POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


def main() -> None:
    """Entry point of the process: ``python -m d2o_server.worker.process ADDRESS PARENT [RANK]``.

    ``RANK`` 0, the default, is forked from a template (:mod:`d2o_server.worker.template`); rank 0 starts the others.
    """
    call_it("d2o-worker")
    address, parent, rank, *_ = (*sys.argv[1:], "0")
    logs.configure(os.environ.get("D2O_LOG_LEVEL", "INFO"), os.environ.get("D2O_LOG_FORMAT", "text"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()

    with importing():
        from d2o_server.worker.serving import serve

    serve(address, int(rank))
    end()


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
