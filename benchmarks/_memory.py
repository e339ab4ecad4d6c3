"""Resident memory of a server's processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil

MEBIBYTE = 2**20
SECONDS_TO_TIDY_UP = 2.5
"""A front that has nothing to do collects its garbage within a second."""


def reset_peak(pid: int) -> None:
    """Lets the process's peak begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mebibytes(pid: int) -> float:
    """The most memory that the process has held since its start, or since :func:`reset_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class MemorySamples:
    """MiB of the front process, and of its workers together, once a second."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.front: list[float] = []
        self.workers: list[float] = []

    def take(self) -> None:
        """One sample of each."""
        workers = self._process.children(recursive=True)
        self.front.append(self._process.memory_info().rss / MEBIBYTE)
        self.workers.append(sum(worker.memory_info().rss for worker in workers) / MEBIBYTE)


@contextmanager
def watched_memory(pid: int, seconds: float = 1.0) -> Iterator[MemorySamples]:
    """Samples until the scope is left."""
    samples, over = MemorySamples(pid), threading.Event()

    def sample() -> None:
        while not over.wait(seconds):
            samples.take()

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def growth(samples: list[float]) -> float:
    """The median of the last fifth less that of the second, in MiB: the first fifth is warming up."""
    part = max(1, len(samples) // 5)
    return median(samples[-part:]) - median(samples[part : 2 * part] or samples)
