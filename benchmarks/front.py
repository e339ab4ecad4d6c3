"""What does a token cost the front process, and how many tokens a second does it pass on?

The real engine and RPC server run in this process, over a worker that replays steps instead of running a model. Writes
``front.json``: for every pace of steps, the engine alone (its events read in this process) and the engine behind gRPC
(the streams read in a client process).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import _cli
from benchmarks._load import Load, run_load
from benchmarks._server import child_environment
from benchmarks._serving import FULL_CACHE
from d2o.config import D2OConfig
from d2o_server.engine.admission import EngineDefaults
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.engine import LocalEngine
from d2o_server.engine.observer import Observer
from d2o_server.engine.types import Chunk, GenerationRequest, SamplingParams
from d2o_server.engine.worker_client import Worker
from d2o_server.garbage import calm_garbage_collector
from d2o_server.rpc.event_loop import EventLoop
from d2o_server.rpc.server import RpcServer, RpcSettings
from d2o_server.settings import worker_settings
from d2o_server.tokenizer import Tokenizer

_WORKER = "benchmarks._replay_worker"
_VOCABULARY = 512
_PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """One run. ``cpu_us_per_token`` is this process's time.

    A step of 0 seconds is as fast as the worker can speak, None what a model takes.
    """

    path: str
    step_seconds: float | None
    streams: int
    tokens: int
    messages: int
    seconds: float
    tokens_per_second: float
    messages_per_second: float
    tokens_per_message: float
    cpu_us_per_token: float
    cpu_us_per_message: float


@asynccontextmanager
async def replaying_engine(
    streams: int, step_seconds: float, observer: Observer | None = None
) -> AsyncIterator[LocalEngine]:
    """An engine whose one worker replays; ``observer`` is told of its requests."""
    environment = child_environment({"REPLAY_STREAMS": str(streams), "REPLAY_STEP_SECONDS": str(step_seconds)})
    settings = worker_settings(model="replay", max_sequences=streams)
    worker = Worker(0, settings, lambda _: None, environment, _WORKER, observer)
    await worker.start()
    engine = LocalEngine(
        model="replay",
        codec=Tokenizer.built_in(_VOCABULARY),
        dispatcher=Dispatcher([worker], max_waiting=streams, max_waiting_tokens=streams * _PROMPT_TOKENS),
        defaults=EngineDefaults(),
        version="0",
        observer=observer,
    )
    try:
        yield engine
    finally:
        await engine.close()


async def engine_alone(engine: LocalEngine, load: Load, processes: int = 1) -> tuple[int, float]:
    """Messages that the load's streams brought to readers in this process, and seconds; its target means nothing."""

    async def read(request: GenerationRequest) -> int:
        async with aclosing(engine.generate(request)) as events:
            return sum([isinstance(event, Chunk) async for event in events])

    requests = [
        GenerationRequest(
            prompt=tuple(prompt),
            sampling=SamplingParams(max_new_tokens=load.new_tokens, ignore_end_of_text=True),
            compression=D2OConfig.of(**load.compression),
        )
        for prompt in load.prompts()
    ]
    began = time.monotonic()
    messages = await asyncio.gather(*map(read, requests))
    return sum(messages), time.monotonic() - began


async def behind_grpc(engine: LocalEngine, load: Load, processes: int = 1) -> tuple[int, float]:
    """The same with the readers in other processes; the load's target is where this process then listens."""
    server = RpcServer(engine, RpcSettings(port=0))
    target = f"127.0.0.1:{await server.start()}"
    outcomes = await run_load(replace(load, target=target), processes)
    await server.stop(1.0)
    return sum(len(outcome.arrivals) for outcome in outcomes), max(outcome.arrivals[-1] for outcome in outcomes)


PATHS = {"engine": engine_alone, "grpc": behind_grpc}


async def measure(
    path: str, engine: LocalEngine, load: Load, *, step_seconds: float | None, processes: int = 1
) -> Pace:
    """Runs a load on one of the paths."""
    before = time.process_time()
    messages, seconds = await PATHS[path](engine, load, processes)
    busy = time.process_time() - before
    total = load.requests * load.new_tokens
    return Pace(
        path=path,
        step_seconds=step_seconds,
        streams=load.requests,
        tokens=total,
        messages=messages,
        seconds=seconds,
        tokens_per_second=total / seconds,
        messages_per_second=messages / seconds,
        tokens_per_message=total / messages,
        cpu_us_per_token=1e6 * busy / total,
        cpu_us_per_message=1e6 * busy / messages,
    )


async def replayed(path: str, streams: int, tokens: int, step_seconds: float) -> Pace:
    """Runs ``streams`` streams of ``tokens`` tokens at one pace, on an engine of their own."""
    load = Load(
        target="",
        requests=streams,
        prompt_tokens=_PROMPT_TOKENS,
        new_tokens=tokens,
        compression=FULL_CACHE,
        vocabulary_size=_VOCABULARY,
    )
    async with replaying_engine(streams, step_seconds) as engine:
        return await measure(path, engine, load, step_seconds=step_seconds)


async def run(parsed: argparse.Namespace) -> list[Pace]:
    """Every pace, the engine alone and behind gRPC in turn."""
    return [
        await replayed(path, parsed.streams, parsed.tokens, step_seconds)
        for step_seconds in parsed.step_seconds
        for path in parsed.paths
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--streams", type=int, default=512, help="requests at once")
    parser.add_argument("--tokens", type=int, default=200, help="of each request")
    parser.add_argument(
        "--step-seconds", type=float, nargs="+", default=[0.1, 0.05, 0.025, 0.0], help="0 is as fast as it goes"
    )
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS))
    parsed = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        paces = runner.run(run(parsed))
    settings: dict[str, Any] = {"streams": parsed.streams, "tokens": parsed.tokens}
    path = _cli.write_json(parsed.out, "front", {"settings": settings, "paces": [asdict(pace) for pace in paces]})
    print_paces(paces)
    print(f"written: {path.name}")


def print_paces(paces: Sequence[Pace]) -> None:
    """One row a run."""
    head = ("path", "step s", "seconds", "tokens/s", "messages/s", "tokens/message", "CPU us/token", "CPU us/message")
    rows = [
        (
            *(pace.path, "-" if pace.step_seconds is None else f"{pace.step_seconds:g}", pace.seconds),
            *(pace.tokens_per_second, pace.messages_per_second, pace.tokens_per_message),
            *(pace.cpu_us_per_token, pace.cpu_us_per_message),
        )
        for pace in paces
    ]
    _cli.print_table(head, rows)


if __name__ == "__main__":
    calm_garbage_collector()
    main()
