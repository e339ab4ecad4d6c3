"""Clients in processes of their own, so that reading many streams costs neither the server nor who measures."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import Any

from benchmarks._server import ClosedSet, Reply, check_complete, child_environment, open_client
from d2o_client import Compression

_CHILD = (sys.executable, "-c", "from benchmarks._load import main; main()")
_READY = b"ready\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests ``first`` to ``first + requests``, submitted at once and read greedily to exactly ``new_tokens`` tokens.

    Prompts are drawn evenly from the vocabulary less ``excluded``; a request's depends on ``seed`` and its number only.
    ``compression`` has the client's arguments; ``api_key`` goes with every call.
    """

    target: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    compression: dict[str, Any]
    vocabulary_size: int
    excluded: tuple[int, ...] = ()
    seed: int = 0
    first: int = 0
    api_key: str | None = None

    def prompts(self) -> list[list[int]]:
        """The requests' token ids."""
        allowed = sorted(set(range(self.vocabulary_size)).difference(self.excluded))
        numbers = range(self.first, self.first + self.requests)
        return [random.Random(f"{self.seed}-{i}").choices(allowed, k=self.prompt_tokens) for i in numbers]

    def split(self, parts: int) -> list[Load]:
        """The same requests in at most ``parts`` loads of nearly equal size."""
        sizes = [self.requests // parts + (part < self.requests % parts) for part in range(parts)]
        starts = accumulate(sizes, initial=self.first)
        return [replace(self, first=first, requests=size) for first, size in zip(starts, sizes, strict=False) if size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One stream: when messages with tokens came (seconds since all were submitted) and how many tokens each had."""

    arrivals: array[float]
    counts: array[int]
    queue_seconds: float
    peak_pages: int
    ratio_reached: float

    @classmethod
    def of(cls, reply: Reply) -> Outcome:
        """What counts of a reply."""
        messages = [(at, sum(1 for _ in same)) for at, same in groupby(reply.times)]
        return cls(
            arrivals=array("d", [at for at, _ in messages]),
            counts=array("i", [tokens for _, tokens in messages]),
            queue_seconds=reply.finished.usage.queue_seconds,
            peak_pages=reply.finished.cache.peak_pages,
            ratio_reached=reply.finished.cache.ratio_reached,
        )

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive messages."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def seconds_per_token(self) -> float:
        """After the first message, on average; 0 where there is nothing after it."""
        later = self.tokens - self.counts[0]
        return (self.arrivals[-1] - self.arrivals[0]) / later if later else 0.0


async def run_load(load: Load, processes: int) -> list[Outcome]:
    """Runs ``load`` from this many client processes; what comes back is in order of the requests.

    Raises:
        RuntimeError: a client failed, or a stream did not bring exactly its tokens; what went wrong is on stderr.
    """
    clients = [await _ClientProcess.start(part) for part in load.split(processes)]
    try:
        for client in clients:
            await client.ready()
        began = time.monotonic()
        for client in clients:
            client.go(began)
        outcomes = await asyncio.gather(*(client.outcomes() for client in clients))
        return [outcome for part in outcomes for outcome in part]
    finally:
        for client in clients:
            await client.end()


class _ClientProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._to, self._from = process, process.stdin, process.stdout

    @classmethod
    async def start(cls, load: Load) -> _ClientProcess:
        pipe = asyncio.subprocess.PIPE
        made = cls(
            await asyncio.create_subprocess_exec(*_CHILD, stdin=pipe, stdout=pipe, env=child_environment(_QUIET))
        )
        made._to.write(pickle.dumps(load))
        return made

    async def ready(self) -> None:
        if await self._from.readline() != _READY:
            raise RuntimeError("a client process did not get ready")

    def go(self, began: float) -> None:
        self._to.write(pickle.dumps(began))

    async def outcomes(self) -> list[Outcome]:
        result = await self._from.read()
        if not result:
            raise RuntimeError("a client process failed")
        outcomes: list[Outcome] = pickle.loads(result)
        return outcomes

    async def end(self) -> None:
        if self._process.returncode is None:
            if not self._from.at_eof():
                self._process.kill()
            await self._process.wait()


_QUIET = {"GRPC_VERBOSITY": "ERROR"}


def main() -> None:
    """A client process: takes a Load and the moment of submission from stdin, writes its outcomes to stdout."""
    load: Load = pickle.load(sys.stdin.buffer)
    outcomes = asyncio.run(_replies(load))
    pickle.dump(outcomes, sys.stdout.buffer)
    sys.stdout.flush()
    # The result is out: there is nothing left that a slow end of the interpreter could add.
    os._exit(0)


async def _replies(load: Load) -> list[Outcome]:
    prompts = load.prompts()
    async with open_client(load.target, load.api_key) as client:
        await client.model_info()
        requests = ClosedSet(client, prompts, new_tokens=load.new_tokens, compression=Compression(**load.compression))
        sys.stdout.buffer.write(_READY)
        sys.stdout.flush()
        began: float = await asyncio.to_thread(pickle.load, sys.stdin.buffer)
        replies = await requests.run(began)
    check_complete(replies, load.new_tokens)
    return [Outcome.of(reply) for reply in replies]


def total_tokens(outcomes: Sequence[Outcome]) -> int:
    """Output tokens of all streams."""
    return sum(outcome.tokens for outcome in outcomes)
