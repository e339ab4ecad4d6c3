"""The worker process, and a file that says what goes wrong in it.

``refuse`` a start; in a step ``die``, ``hang`` or ``lose`` a page.

Beside it a file ``.taken-down`` appears where the interpreter comes to its own end.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from pathlib import Path

from d2o_server.engine.messages import StepReport
from d2o_server.worker import process
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.warm_up import trial_id

MOOD = "D2O_TEST_MOOD"
_step = WorkerCore.step


def mood() -> str:
    path = Path(os.environ[MOOD])
    return path.read_text() if path.exists() else ""


def step(core: WorkerCore, *early: Callable[[StepReport], None]) -> StepReport:
    # Not in the warm-up, for which no front waits.
    if core.scheduler.find(trial_id(0)) is None:
        if mood() == "die":
            # As a kernel that crashes does, later than the socket's thread has sent what was said before the step.
            time.sleep(0.2)
            os._exit(3)
        if mood() == "lose":
            pool = core.runner.caches.pool
            pool.free_pages = pool.num_pages - int(pool.held.sum()) - 1
        while mood() == "hang":
            time.sleep(0.1)
    return _step(core, *early)


def main() -> None:
    if mood() == "refuse":
        raise SystemExit(4)
    atexit.register(Path(os.environ[MOOD]).with_suffix(".taken-down").touch)
    WorkerCore.step = step  # type: ignore[method-assign, assignment]
    process.main()


if __name__ == "__main__":
    main()
