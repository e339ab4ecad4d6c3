"""What do keys, metrics and traces cost: how much of the rate through gRPC is left with all of them on?

As ``front``: the real engine and RPC server run in this process over a worker that replays steps, and a client process
reads the streams. Each round runs a load with everything off and with everything on (an API key with limits, metrics
that are scraped every second, spans sent over OTLP to a process of their own, access lines as JSON), in turn and turned
around, so that drift cancels. Writes ``observed.json`` with every run and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from benchmarks import _cli
from benchmarks._load import Load, run_load
from benchmarks._server import child_environment
from benchmarks._serving import FULL_CACHE
from benchmarks.front import replaying_engine
from d2o_server.garbage import calm_garbage_collector
from d2o_server.rpc.api_keys import new_key
from d2o_server.rpc.event_loop import EventLoop
from d2o_server.rpc.interceptors import current_ids
from d2o_server.rpc.server import RpcServer, RpcSettings
from d2o_server.settings import TelemetrySettings
from d2o_server.telemetry.logs import JsonFormatter
from d2o_server.telemetry.telemetry import Telemetry

_HOST = "127.0.0.1"
_PROMPT_TOKENS = 16
_VOCABULARY = 512
_SCRAPE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load; ``cpu_us_per_token`` is this process's time, exporter and scrapes included."""

    observed: bool
    tokens: int
    seconds: float
    tokens_per_second: float
    messages_per_second: float
    cpu_us_per_token: float
    spans: int
    scrapes: int


class _Collector(TraceServiceServicer):
    """An OTLP collector that only counts."""

    def __init__(self) -> None:
        self.spans = 0

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
        for resource in request.resource_spans:
            self.spans += sum(len(scope.spans) for scope in resource.scope_spans)
        return ExportTraceServiceResponse()


def collect() -> None:
    """A process that watches: says where it takes spans, reads metrics from the port that stdin names until the next
    line from there, and says how many spans and answers it got.
    """
    collector, over, scrapes = _Collector(), threading.Event(), 0
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add: Any = add_TraceServiceServicer_to_server
    add(collector, server)
    print(server.add_insecure_port(f"{_HOST}:0"), flush=True)
    server.start()
    url = f"http://{_HOST}:{int(sys.stdin.readline())}/metrics"

    def wait() -> None:
        sys.stdin.readline()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    while not over.wait(_SCRAPE_SECONDS):
        with urllib.request.urlopen(url) as answer:
            scrapes += bool(answer.read())
    print(collector.spans, scrapes, flush=True)
    server.stop(0)


class _Watcher:
    """That process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._to, self._from = process, process.stdin, process.stdout

    @classmethod
    async def start(cls) -> _Watcher:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-c", "from benchmarks.observed import collect; collect()")
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=child_environment({})))

    async def port(self) -> int:
        """Where it takes spans."""
        return int(await self._from.readline())

    def scrape(self, port: int) -> None:
        """Lets it read metrics from now on."""
        self._to.write(f"{port}\n".encode())

    async def seen(self) -> tuple[int, int]:
        """Ends it; how many spans and answers with metrics it got."""
        self._to.write(b"\n")
        spans, scrapes = map(int, (await self._from.readline()).split())
        await self._process.wait()
        return spans, scrapes


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def _access_log() -> Iterator[None]:
    """Access lines as JSON, written and thrown away."""
    log = logging.getLogger("d2o_server.access")
    with Path(os.devnull).open("w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(JsonFormatter(current_ids))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(logging.WARNING)


def _with_key(folder: Path, streams: int) -> tuple[str, RpcSettings]:
    """A key, and settings that ask for it and hold its owner to limits that the load just keeps."""
    key, stored = new_key("load", rate=1000 * streams, streams=streams, pages=10**9 - 1)
    file = folder / "keys"
    file.write_text(stored.line() + "\n")
    return key, RpcSettings(port=0, api_keys=file)


async def measure(streams: int, tokens: int, step_seconds: float, *, observed: bool) -> Run:
    """One load on an engine and a server of its own."""
    async with AsyncExitStack() as scope:
        telemetry, watcher, key, settings_of_rpc = None, None, None, RpcSettings(port=0)
        if observed:
            key, settings_of_rpc = _with_key(Path(scope.enter_context(tempfile.TemporaryDirectory())), streams)
            watcher, port = await _Watcher.start(), _free_port()
            settings = TelemetrySettings(metrics_port=port, trace=f"http://{_HOST}:{await watcher.port()}")
            telemetry = Telemetry(settings, _HOST, "0")
            scope.push_async_callback(telemetry.close)
            scope.enter_context(_access_log())
        engine = await scope.enter_async_context(replaying_engine(streams, step_seconds, telemetry))
        server = RpcServer(engine, settings_of_rpc, telemetry, telemetry.interceptors if telemetry else ())
        load = Load(
            target=f"{_HOST}:{await server.start()}",
            requests=streams,
            prompt_tokens=_PROMPT_TOKENS,
            new_tokens=tokens,
            compression=FULL_CACHE,
            vocabulary_size=_VOCABULARY,
            api_key=key,
        )
        if telemetry is not None and watcher is not None:
            telemetry.attach(engine)
            watcher.scrape(port)
        before = time.process_time()
        outcomes = await run_load(load, 1)
        busy = time.process_time() - before
        await server.stop(1.0)
        spans, scrapes = (0, 0) if watcher is None else await _last(watcher, telemetry)
    seconds, total = max(outcome.arrivals[-1] for outcome in outcomes), streams * tokens
    return Run(
        observed=observed,
        tokens=total,
        seconds=seconds,
        tokens_per_second=total / seconds,
        messages_per_second=sum(len(outcome.arrivals) for outcome in outcomes) / seconds,
        cpu_us_per_token=1e6 * busy / total,
        spans=spans,
        scrapes=scrapes,
    )


async def _last(watcher: _Watcher, telemetry: Telemetry | None) -> tuple[int, int]:
    """What the watcher has seen, once all spans are sent."""
    if telemetry is not None and telemetry.tracing is not None:
        await telemetry.tracing.close()
    return await watcher.seen()


async def run(parsed: argparse.Namespace) -> list[Run]:
    """Every round, in turn and turned around."""
    order = [observed for turn in range(parsed.repeats) for observed in ((True, False) if turn % 2 else (False, True))]
    return [await measure(parsed.streams, parsed.tokens, parsed.step_seconds, observed=observed) for observed in order]


def ratio(runs: Sequence[Run], name: str) -> float:
    """The medians of ``name``, everything on over everything off."""
    on, off = (median(getattr(one, name) for one in runs if one.observed is observed) for observed in (True, False))
    return float(on / off)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--streams", type=int, default=256, help="requests at once")
    parser.add_argument("--tokens", type=int, default=400, help="of each request")
    parser.add_argument("--step-seconds", type=float, default=0.008, help="0 is as fast as it goes")
    parser.add_argument("--repeats", type=int, default=14, help="runs of each kind")
    parsed = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runs = runner.run(run(parsed))
    ratios = {name: ratio(runs, name) for name in ("tokens_per_second", "cpu_us_per_token")}
    chosen = ("streams", "tokens", "step_seconds", "repeats")
    result: dict[str, Any] = {
        "settings": {name: getattr(parsed, name) for name in chosen},
        "observed_over_not": ratios,
        "runs": [asdict(one) for one in runs],
    }
    path = _cli.write_json(parsed.out, "observed", result)
    head = ("all of it", "seconds", "tokens/s", "messages/s", "CPU us/token", "spans", "scrapes")
    rows = [("on" if one.observed else "off", *list(asdict(one).values())[2:]) for one in runs]
    _cli.print_table(head, rows)
    rate, busy = ratios.values()
    print(f"on over off: {rate:.3f} of the rate, {busy:.3f} of the CPU time")
    print(f"written: {path.name}")


if __name__ == "__main__":
    calm_garbage_collector()
    main()
