"""A real server process, and a closed set of requests that are all sent to it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from d2o_client import NO_RETRY, AsyncClient, AsyncStream, Compression, Finished, Started

_STOP_SECONDS = 30
# How threads wait for one another, which a worker's process decides where nobody else does.
_OF_THREADS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's import path and environment, and ``extra``; not what a shell says of servers and threads."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("D2O_SERVE_") and name not in _OF_THREADS
    }
    return inherited | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **extra}


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that listens on ``target``, and its front process."""

    target: str
    pid: int

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, which are forks of its template."""
        return [worker for template in psutil.Process(self.pid).children() for worker in template.children()]

    def front_cpu_seconds(self) -> float:
        """Processor time that the front process has taken so far; its workers' is not in it."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running_server(*flags: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """As :func:`server_process`, for those who need ``host:port`` only."""
    with server_process(*flags, environment=environment) as server:
        yield server.target


@contextmanager
def server_process(*flags: str, environment: Mapping[str, str] | None = None) -> Iterator[RunningServer]:
    """Starts ``d2o-serve`` on a free port of this machine and yields it once it listens.

    ``environment`` is added to the process's own. Where the scope is left by an exception what the server wrote goes to
    our own standard error.

    Raises:
        RuntimeError: it did not start.
    """
    command = [
        sys.executable,
        "-m",
        "d2o_server",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--log-level",
        "WARNING",
        *flags,
    ]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=child_environment(environment or {})
        )
        try:
            yield RunningServer(_listening(process), process.pid)
        except BaseException:
            errors.seek(0)
            sys.stderr.write(errors.read())
            raise
        finally:
            _stop(process)


def _listening(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        process.wait()
        raise RuntimeError("the server did not start; it says why above")
    return line.split()[-1]


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def open_client(target: str, api_key: str | None = None) -> AsyncClient:
    """A client that waits as long as it takes and never sends a request twice."""
    return AsyncClient(target, timeout=None, retry=NO_RETRY, api_key=api_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One stream as the client saw it; times are seconds since all requests were submitted.

    ``times`` has each token's arrival, ``starts`` how many `started` events came.
    """

    token_ids: tuple[int, ...]
    times: tuple[float, ...]
    starts: int
    started: Started
    finished: Finished

    @property
    def first_token_at(self) -> float:
        return self.times[0]

    @property
    def admitted_at(self) -> float:
        """When the server admitted the request: its own seconds from there to the first token, on our clock."""
        usage = self.finished.usage
        return max(0.0, self.times[0] - (usage.first_token_seconds - usage.queue_seconds))

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive arrivals; tokens that arrive together are one arrival."""
        arrivals = sorted(set(self.times))
        return [later - earlier for earlier, later in pairwise(arrivals)]


class ClosedSet:
    """Requests that are all submitted at once and run greedily to exactly ``new_tokens`` tokens."""

    def __init__(
        self, client: AsyncClient, prompts: Sequence[Sequence[int]], *, new_tokens: int, compression: Compression
    ) -> None:
        self._followers = [
            _Follower(
                client.stream(
                    prompt,
                    max_new_tokens=new_tokens,
                    temperature=0.0,
                    ignore_end_of_text=True,
                    compression=compression,
                )
            )
            for prompt in prompts
        ]

    @property
    def running(self) -> int:
        """Streams that have started and not finished, as of now."""
        return sum(follower.running for follower in self._followers)

    async def run(self, began: float | None = None) -> list[Reply]:
        """Submits all and reads them to their end, in order of the prompts.

        ``began`` is the reading of ``time.monotonic``, one clock for all processes, that times count from; now if None.
        """
        began = time.monotonic() if began is None else began
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(follower.read(began)) for follower in self._followers]
        return [task.result() for task in tasks]


class _Follower:
    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream
        self._started: Started | None = None
        self._starts = 0

    @property
    def running(self) -> bool:
        self._observe()
        return self._started is not None and self._stream.finished is None

    def _observe(self) -> None:
        """Every `started` event makes a new value, so a second one is noticed."""
        if self._stream.started is not self._started:
            self._started = self._stream.started
            self._starts += 1

    async def read(self, began: float) -> Reply:
        times: list[float] = []
        async with self._stream:
            async for chunk in self._stream:
                times += [time.monotonic() - began] * len(chunk.token_ids)
                self._observe()
            generation = await self._stream.result()
        return Reply(
            token_ids=generation.token_ids,
            times=tuple(times),
            starts=self._starts,
            started=generation.started,
            finished=generation.finished,
        )


def check_complete(replies: Sequence[Reply], new_tokens: int) -> None:
    """Every stream brought exactly its tokens and started once: nothing was cut, preempted or begun again.

    Raises:
        RuntimeError: a stream did otherwise.
    """
    for index, reply in enumerate(replies):
        if len(reply.token_ids) != new_tokens or reply.starts != 1:
            raise RuntimeError(
                f"request {index}: got {len(reply.token_ids)} tokens and {reply.starts} starts, "
                f"expected are {new_tokens} tokens and 1 start"
            )
