"""Servers as processes of their own, started as an operator starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PATIENCE = 60
TINY = ("--model", "random:tiny-llama", "--device", "cpu", "--dtype", "float32", "--threads", "1", "--check-integrity")
# Takes seconds to load, so that it can be caught at it.
SLOW_TO_LOAD = (*TINY, "--model", "random:smollm2-135m")


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that listens on ``target``; ``log`` is what it wrote to standard error."""

    process: subprocess.Popen[str]
    target: str
    log: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def worker(self) -> psutil.Process:
        """Its worker process."""
        return worker_of(self.process.pid)

    def terminate(self) -> int:
        """Asks it to stop and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def workers_of(front: int) -> list[psutil.Process]:
    """The worker processes of a server; they are its template's children."""
    try:
        return [worker for template in psutil.Process(front).children() for worker in template.children()]
    except psutil.NoSuchProcess:
        return []


def worker_of(front: int) -> psutil.Process:
    (worker,) = workers_of(front)
    return worker


def starting(front: int, stage: str, count: int = 1) -> list[psutil.Process]:
    """Processes of a server that starts, once there are so many: its ``template`` or its ``worker`` processes."""
    deadline = time.monotonic() + PATIENCE
    while len(found := psutil.Process(front).children() if stage == "template" else workers_of(front)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def spawn(flags: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts the server with its standard error in ``log``."""
    # Servers of tests run beside each other: metrics, which have a port of their own, only where a flag asks for it.
    variables = os.environ | {"OMP_NUM_THREADS": "1", "D2O_SERVE_METRICS_PORT": "0"} | dict(environment or {})
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "d2o_server", *flags], stdout=subprocess.PIPE, stderr=file, text=True, env=variables
        )


def launch(flags: Sequence[str], log: Path) -> ServerProcess:
    """Starts the server on a free port and waits for the line that says where it listens."""
    process = spawn((*flags, "--port", "0"), log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " is listening on " in line, f"the server did not start:\n{log.read_text()}"
    except BaseException:  # whatever ends the wait, a time limit too, the server must not outlive it
        end(process)
        raise
    return ServerProcess(process, line.split()[-1], log)


def end(process: subprocess.Popen[str]) -> None:
    """Kills what a test left running, workers first."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait(PATIENCE)
    if process.stdout is not None:
        process.stdout.close()
