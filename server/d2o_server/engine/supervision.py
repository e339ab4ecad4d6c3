"""When a worker counts as hung, and when one that died is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from d2o_server.errors import SettingsError

if TYPE_CHECKING:
    from d2o_server.engine.worker_client import Worker

# A step on a CPU may read 512 tokens of a prompt with a large model.
_GPU_TIMEOUT, _CPU_TIMEOUT = 60.0, 300.0
_CHECKS, _LONGEST_PAUSE = 10, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """What an operator decides of it.

    Attributes:
        worker_timeout: seconds without a sign after which a worker is killed; None is 60 on a GPU and 300 on a CPU.
        worker_restarts: starts in a row that may come to nothing before a worker is given up.
        first_pause, longest_pause: seconds before a start; they double from the one to the other.
        settled: seconds of service after which what was before is forgotten.
    """

    worker_timeout: float | None = None
    worker_restarts: int = 8
    first_pause: float = 0.5
    longest_pause: float = 30.0
    settled: float = 10.0

    def __post_init__(self) -> None:
        if self.worker_timeout is not None and not 1 <= self.worker_timeout < float("inf"):
            raise SettingsError(f"worker_timeout: got {self.worker_timeout}, allowed is at least 1 second")
        if self.worker_restarts < 0:
            raise SettingsError(f"worker_restarts: got {self.worker_restarts}, allowed is at least 0")

    def timeout(self, device: str | None) -> float:
        """Seconds that a worker on ``device`` may be silent; None where it has not told yet."""
        if self.worker_timeout is not None:
            return self.worker_timeout
        return _GPU_TIMEOUT if device is not None and device.startswith("cuda") else _CPU_TIMEOUT


class Keeper(Protocol):
    """Who decides which worker has which requests, and what becomes of those of one that died."""

    def worker_ready(self, worker: Worker) -> None:
        """It serves, for the first time or again; what is in its ``tickets`` it does not know."""

    def pages_freed(self, worker: Worker) -> None:
        """Of its pages more are free than before its last report, and nothing that waits at it has got them."""

    def worker_died(self, worker: Worker) -> None:
        """It does not serve any more; ``tickets`` are what it had."""

    def worker_given_up(self, worker: Worker) -> None:
        """It will not be started again."""


class Restarts:
    """One worker's deaths, and the pauses after them."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._pause = supervision.first_pause
        self.in_a_row = 0

    def pause(self, served: float, *, worked: bool) -> float | None:
        """Seconds until the next start, or None where there is to be none.

        Args:
            served: seconds for which the process that died had been ready.
            worked: it has brought requests further, so that its start has not come to nothing.
        """
        settled = served >= self._supervision.settled
        if settled:
            self._pause = self._supervision.first_pause
        self.in_a_row = 1 if settled or worked else self.in_a_row + 1
        if self.in_a_row > self._supervision.worker_restarts:
            return None
        pause, self._pause = self._pause, min(2 * self._pause, self._supervision.longest_pause)
        return pause


class Silence:
    """How long a number has stayed the same while somebody looked: time in which nobody did does not count."""

    def __init__(self, value: Callable[[], int]) -> None:
        self._value = value
        self._last = value()
        self.seconds = 0.0

    def look(self, elapsed: float, *, expected: bool = True) -> float:
        """Looks again, ``elapsed`` seconds later; silence counts only while something is ``expected``."""
        now = self._value()
        self.seconds = self.seconds + elapsed if expected and now == self._last else 0.0
        self._last = now
        return self.seconds


async def watch(
    *,
    timeout: Callable[[], float],
    beats: Callable[[], int],
    reports: Callable[[], int],
    busy: Callable[[], bool],
) -> str:
    """Returns what is wrong with a process, once something is.

    Args:
        timeout: seconds that it may be silent.
        beats: its :class:`Pulse`, which stops where the whole process does, starved of processors or by a signal.
        reports: how many it has sent, which stops where a step hangs.
        busy: whether it has work, so that reports are expected.
    """
    still, mute = Silence(beats), Silence(reports)
    while True:
        limit = timeout()
        pause = min(_LONGEST_PAUSE, limit / _CHECKS)
        await asyncio.sleep(pause)
        # Where this process itself stood still, for longer than it meant to sleep, the other may well have gone on.
        if still.look(pause) >= limit:
            return f"it did not move for {limit:g} s: stopped, or starved of processors"
        if mute.look(pause, expected=busy()) >= limit:
            return f"its step has not ended within {limit:g} s"
