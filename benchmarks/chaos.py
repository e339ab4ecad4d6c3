"""Does any stream lose or double a token where callers leave at random and workers are killed and stopped meanwhile?

Some kinds of requests run alone first. Then very many of them run at once, a share of which is cancelled after a random
number of tokens, while workers are killed (SIGKILL) or stopped (SIGSTOP). Every stream that ended must have brought
what its kind brought alone, and one that was cut the beginning of it. Writes ``chaos.json``; ends with status 1 where
anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks import _cli
from benchmarks._memory import SECONDS_TO_TIDY_UP
from benchmarks._server import RunningServer, server_process
from d2o_client import AsyncClient, Compression, D2OError, RetryPolicy

_PATIENT = RetryPolicy(max_attempts=100, max_backoff=2.0)
_SHARE_BEFORE_MEMORY_COUNTS = 0.5
_SECONDS_TO_IDLE = 10.0


@dataclass(frozen=True, slots=True)
class Kind:
    """What a caller asks for."""

    prompt: tuple[int, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a stream brought: all of it that can be compared."""

    token_ids: tuple[int, ...]
    text: str
    reason: str


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    endings: Counter[str] = field(default_factory=Counter)
    resumed: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0

    @property
    def over(self) -> int:
        return self.endings.total()


def kinds(count: int, seed: int) -> list[Kind]:
    """Prompts and answers of all lengths, every policy, greedy and seeded, with and without penalties and stops."""
    dice = random.Random(seed)
    return [_kind(dice, index) for index in range(count)]


def _kind(dice: random.Random, index: int) -> Kind:
    length = int(dice.choice((10, 60, 200)) * dice.uniform(0.3, 1.5)) + 1
    options: dict[str, Any] = {
        "max_new_tokens": dice.randint(5, 80),
        "ignore_end_of_text": dice.random() < 0.8,
        "seed": index,
        "compression": Compression(
            policy=dice.choice(("none", "d2o", "d2o", "h2o", "streaming", "snapkv")),
            ratio=dice.uniform(0.1, 0.6),
            min_budget=dice.choice((8, 32)),
        ),
    }
    if index % 3 == 1:
        options |= {"temperature": dice.uniform(0.3, 1.2), "top_p": dice.choice((0.8, 1.0))}
    if index % 4 == 2:
        options |= {"repetition_penalty": 1.2, "frequency_penalty": 0.2, "min_new_tokens": 3}
    if index % 5 == 3:
        options |= {"stop": [dice.choice("aeiou")], "min_new_tokens": 4}
    return Kind(tuple(dice.randrange(3, 500) for _ in range(length)), options)


class Chaos:
    """The callers, and whoever kills workers among them."""

    def __init__(self, server: RunningServer, options: argparse.Namespace) -> None:
        self._server, self._options = server, options
        self._front = psutil.Process(server.pid)
        self._dice = random.Random(options.seed + 1)
        self._kinds = kinds(options.kinds, options.seed)
        self._alone: list[Answer] = []
        self.tally = Tally()
        self.signals: list[str] = []
        self._memory: list[float] = []

    async def run(self) -> dict[str, Any]:
        """All of it; returns the result."""
        options = self._options
        async with AsyncClient(self._server.target, retry=_PATIENT, timeout=None) as client:
            for kind in self._kinds:
                answer = await client.generate(kind.prompt, **kind.options)
                self._alone.append(Answer(answer.token_ids, answer.text, str(answer.finish_reason)))
            # Buffers, caches and arenas grow to their size under load; growth beyond that would be a leak.
            before = int(options.requests * _SHARE_BEFORE_MEMORY_COUNTS)
            await self._load(client, before)
            await asyncio.sleep(SECONDS_TO_TIDY_UP)
            self._memory = [self._front_mib()]
            self.tally = Tally()
            began = time.monotonic()
            killer = asyncio.create_task(self._kill(client))
            await self._load(client, options.requests)
            seconds = time.monotonic() - began
            killer.cancel()
            with suppress(asyncio.CancelledError):
                await killer
            load = await self._idle(client)
            await asyncio.sleep(SECONDS_TO_TIDY_UP)
        self._memory.append(self._front_mib())
        tally = self.tally
        return {
            "seconds": seconds,
            "tokens_per_second": tally.tokens / seconds,
            "endings": dict(sorted(tally.endings.items())),
            "resumed": {str(times): count for times, count in sorted(tally.resumed.items())},
            "signals": dict(Counter(self.signals)),
            "wrong": tally.wrong,
            "left_over": load,
            "front_memory_mib": self._memory,
            "front_memory_growth": self._memory[-1] / self._memory[0] - 1,
        }

    def _front_mib(self) -> float:
        return float(self._front.memory_info().rss) / 2**20

    async def _load(self, client: AsyncClient, count: int) -> None:
        numbers = iter(range(count))

        async def caller() -> None:
            for number in numbers:
                await self._request(client, number)

        await asyncio.gather(*(caller() for _ in range(self._options.at_once)))

    async def _request(self, client: AsyncClient, number: int) -> None:
        kind, alone = self._kinds[number % len(self._kinds)], self._alone[number % len(self._kinds)]
        leaves = self._dice.random() < self._options.cancelled
        after = self._dice.randrange(len(alone.token_ids) + 1) if leaves else len(alone.token_ids) + 1
        seen: list[int] = []
        text = ""
        ending = "ok"
        async with client.stream(kind.prompt, **kind.options) as stream:
            try:
                if after == 0:
                    reading = asyncio.ensure_future(anext(stream))
                    await asyncio.wait({reading}, timeout=self._dice.uniform(0, 0.05))
                    reading.cancel()
                    await asyncio.wait({reading})
                    self.tally.endings["cancelled"] += 1
                    return
                async for chunk in stream:
                    seen += chunk.token_ids
                    text += chunk.text
                    if len(seen) >= after:
                        break
            except D2OError as error:
                ending = type(error).__name__
            finished = stream.finished
        if finished is None and ending == "ok":
            ending = "cancelled"
        self._check(number, tuple(seen), text, None if finished is None else str(finished.reason), alone)
        self.tally.endings[ending] += 1
        self.tally.tokens += len(seen)
        if self.tally.over >= len(self._memory) * self._options.requests / 10:
            self._memory.append(self._front_mib())
        if finished is not None:
            self.tally.resumed[finished.usage.resumed] += 1

    def _check(self, number: int, seen: tuple[int, ...], text: str, reason: str | None, alone: Answer) -> None:
        """A stream that has ended brought everything, one that was cut a beginning."""
        if reason is not None and Answer(seen, text, reason) == alone:
            return
        if reason is None and (seen, text) == (alone.token_ids[: len(seen)], alone.text[: len(text)]):
            return
        self.tally.wrong.append(f"request {number}: {len(seen)} tokens, {reason}, {seen} instead of {alone.token_ids}")

    async def _kill(self, client: AsyncClient) -> None:
        """Spreads its signals over the requests; a stopped worker stays so until the server notices."""
        options = self._options
        for turn in range(options.kills):
            while self.tally.over < (turn + 0.5) * options.requests / options.kills:
                await asyncio.sleep(0.02)
            while not any(worker.serving for worker in (await client.load()).workers):
                await asyncio.sleep(0.05)
            worker = self._dice.choice(self._server.workers())
            number = signal.SIGSTOP if self._dice.random() < options.stopped else signal.SIGKILL
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
                self.signals.append(number.name)

    async def _idle(self, client: AsyncClient) -> dict[str, int]:
        """What is still held once nothing should be, with all workers back."""
        give_up = time.monotonic() + _SECONDS_TO_IDLE + 60
        while True:
            load = await client.load()
            held = {name: getattr(load, name) for name in ("pages_used", "pages_reserved", "running", "waiting")}
            serving = all(worker.serving for worker in load.workers)
            if (serving and not any(held.values())) or time.monotonic() > give_up:
                return held | {"workers_down": sum(not worker.serving for worker in load.workers)}
            await asyncio.sleep(0.05)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs a server of its own and everything against it; ``sound`` says whether all was as it must be."""
    flags = ("--model", options.model, "--device", "cpu", "--dtype", options.dtype, "--threads", str(options.threads))
    supervision = ("--worker-timeout", "3", "--worker-restarts", "20", "--max-waiting", "4096")
    sizes = ("--data-parallel", str(options.workers), "--num-pages", str(options.pages), "--drain-window", "0")
    with server_process(*flags, *supervision, *sizes, "--log-level", "ERROR") as server:
        result = asyncio.run(Chaos(server, options).run())
    done = result["endings"].get("ok", 0) + result["endings"].get("cancelled", 0)
    result["sound"] = not result["wrong"] and not any(result["left_over"].values()) and done == options.requests
    settings = ("requests", "kills", "cancelled", "stopped", "at_once", "workers", "kinds", "pages", "seed")
    return {
        "model": options.model,
        "dtype": options.dtype,
        "settings": {name: getattr(options, name) for name in settings},
    } | result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs it, writes the JSON, prints a table and returns the result."""
    parser = _cli.parser(__doc__ or "")
    parser.set_defaults(model="random:tiny-llama", dtype="float32")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20, help="signals to workers, spread over the requests")
    parser.add_argument("--cancelled", type=float, default=0.3, help="share of requests that their caller leaves")
    parser.add_argument("--stopped", type=float, default=0.25, help="share of signals that are SIGSTOP, not SIGKILL")
    parser.add_argument("--at-once", type=int, default=64, help="callers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", type=int, default=60, help="different requests")
    parser.add_argument("--pages", type=int, default=600, help="of each worker's pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="chaos", help="of the file that is written")
    parsed = parser.parse_args(arguments)
    result = run(parsed)
    path = _cli.write_json(parsed.out, parsed.name, result)
    memory = result["front_memory_mib"]
    rows = [
        ("requests ended as they should", sum(result["endings"].get(name, 0) for name in ("ok", "cancelled"))),
        ("other endings", {k: v for k, v in result["endings"].items() if k not in ("ok", "cancelled")} or "none"),
        ("streams resumed", sum(count for times, count in result["resumed"].items() if times != "0")),
        ("workers killed or stopped", sum(result["signals"].values())),
        ("streams with a wrong token", len(result["wrong"])),
        ("left over", result["left_over"]),
        ("front's memory, MiB", f"{memory[0]:.1f} -> {memory[-1]:.1f}"),
        ("seconds", result["seconds"]),
    ]
    _cli.print_table(("", ""), rows)
    print(f"written: {path.name}")
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["sound"] else 1)
