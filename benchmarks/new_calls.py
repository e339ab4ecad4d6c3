"""How long does a new call wait beside running streams?

The real engine and RPC server run in this process, over a worker that replays steps instead of running a model; the
streams are read in one client process, the calls come from another. Writes ``new_calls.json``: for every number of
streams, the time of one ``GetLoad``, which does nothing but wait its turn, and of ``--burst`` of them sent together,
until the last has its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from benchmarks import _cli
from benchmarks._load import Load, run_load
from benchmarks._server import child_environment, open_client
from benchmarks._serving import FULL_CACHE
from benchmarks.front import replaying_engine
from d2o_client import AsyncClient
from d2o_server.engine.engine import LocalEngine
from d2o_server.garbage import calm_garbage_collector
from d2o_server.rpc.event_loop import EventLoop
from d2o_server.rpc.server import RpcServer, RpcSettings

_VOCABULARY, _PROMPT_TOKENS = 512, 16
_PROBE = (sys.executable, "-c", "from benchmarks.new_calls import probe; probe()")
_POLL_SECONDS = 0.05
_PATIENCE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What calls took beside so many streams, in milliseconds: each round's, and their medians."""

    streams: int
    one_ms: float
    burst_ms: float
    rounds_one_ms: list[float]
    rounds_burst_ms: list[float]


async def _seconds(client: AsyncClient, calls: int) -> float:
    began = time.monotonic()
    await asyncio.gather(*(client.load() for _ in range(calls)))
    return time.monotonic() - began


async def _probe(target: str, rounds: int, burst: int) -> list[tuple[float, float]]:
    async with open_client(target) as client:
        # The connection is made, and both processes have done once what is timed.
        await _seconds(client, burst)
        return [(await _seconds(client, 1), await _seconds(client, burst)) for _ in range(rounds)]


def probe() -> None:
    """The process that calls: takes target, rounds and burst as JSON from its last argument, prints seconds as JSON."""
    print(json.dumps(asyncio.run(_probe(*json.loads(sys.argv[-1])))))


async def _beside(engine: LocalEngine, streams: int) -> None:
    """Waits until all streams run.

    Raises:
        TimeoutError: they do not.
    """
    async with asyncio.timeout(_PATIENCE):
        while engine.load().running < streams:
            await asyncio.sleep(_POLL_SECONDS)


async def measure(streams: int, parsed: argparse.Namespace) -> Waits:
    """Calls beside ``streams`` streams.

    Raises:
        RuntimeError: the streams ended before the calls did, or the process that calls failed.
    """
    load = Load(
        target="",
        requests=streams,
        prompt_tokens=_PROMPT_TOKENS,
        new_tokens=parsed.tokens,
        compression=FULL_CACHE,
        vocabulary_size=_VOCABULARY,
    )
    async with replaying_engine(max(1, streams), parsed.step_seconds) as engine:
        server = RpcServer(engine, RpcSettings(port=0))
        target = f"127.0.0.1:{await server.start()}"
        reading = asyncio.create_task(run_load(replace(load, target=target), 1)) if streams else None
        await _beside(engine, streams)
        asked = json.dumps([target, parsed.rounds, parsed.burst])
        calling = await asyncio.create_subprocess_exec(
            *_PROBE, asked, stdout=asyncio.subprocess.PIPE, env=child_environment({})
        )
        answer, _ = await calling.communicate()
        running = engine.load().running
        if reading is not None:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
        await server.stop(1.0)
    if not answer:
        raise RuntimeError("the process that calls failed; it says why above")
    if running < streams:
        raise RuntimeError(f"only {running} of {streams} streams still ran when the calls had ended: raise --tokens")
    one, burst = zip(*json.loads(answer), strict=True)
    return Waits(
        streams=streams,
        one_ms=1e3 * median(one),
        burst_ms=1e3 * median(burst),
        rounds_one_ms=[1e3 * seconds for seconds in one],
        rounds_burst_ms=[1e3 * seconds for seconds in burst],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 64, 256, 512], help="that run meanwhile")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each stream, so that it outlasts the calls")
    parser.add_argument("--step-seconds", type=float, default=0.004, help="of the worker; a token a stream in each")
    parser.add_argument("--burst", type=int, default=40, help="calls that are sent together")
    parser.add_argument("--rounds", type=int, default=10, help="of one call and then a burst")
    parsed = parser.parse_args(arguments)
    calm_garbage_collector()
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        waits = [runner.run(measure(streams, parsed)) for streams in parsed.streams]
    chosen = ("tokens", "step_seconds", "burst", "rounds")
    result: dict[str, Any] = {
        "settings": {name: getattr(parsed, name) for name in chosen},
        "waits": [asdict(one) for one in waits],
    }
    path = _cli.write_json(parsed.out, "new_calls", result)
    _cli.print_table(
        ("streams", "one call ms", f"{parsed.burst} at once ms"), [(w.streams, w.one_ms, w.burst_ms) for w in waits]
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
