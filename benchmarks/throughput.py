"""How many tokens a second does the server give on five loads, with and without D2O, beside what vLLM gave?

One server serves every load in turn. The requests of a load, random tokens that run past the end of text, are all
submitted at once over gRPC from client processes and read to their end, while the server's load is sampled. Writes
``throughput.json`` anew after every run, so that a run that is cut keeps what it measured.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy

from benchmarks import _cli
from benchmarks._load import Load, Outcome, run_load, total_tokens
from benchmarks._prompts import special_ids
from benchmarks._server import RunningServer, open_client, server_process
from d2o_client import AsyncClient, ModelInfo
from d2o_client import Load as ServerLoad

_GPU_MODEL = "random:llama-3.1-8b"
_SAMPLE_SECONDS = 0.25
_SETTLE_SECONDS = 10.0
# Past the first eviction of a budget that the prompt fills.
_WARM_UP_TOKENS = 128
_FULL_CACHE = {"policy": "none"}
_BY_RATIO = {"policy": "d2o", "ratio": 0.2, "min_budget": 1024}
_BY_TOKENS = {"policy": "d2o", "budget_tokens": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``requests`` prompts of ``prompt_tokens``, each answered with ``new_tokens``; ``d2o`` is its compression.

    ``vllm``: output tokens a second of vLLM 0.25.1 on one H200 with Llama-3.1-8B's shape in bfloat16.
    """

    prompt_tokens: int
    new_tokens: int
    requests: int
    d2o: dict[str, Any]
    vllm: float

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}+{self.new_tokens}"

    def scaled(self, scale: float) -> int:
        """The number of requests at this scale."""
        return max(1, math.ceil(self.requests * scale))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(prompt_tokens=512, new_tokens=256, requests=512, d2o=_BY_RATIO, vllm=10_069),
        Workload(prompt_tokens=8192, new_tokens=1024, requests=96, d2o=_BY_RATIO, vllm=1_872),
        Workload(prompt_tokens=32768, new_tokens=256, requests=32, d2o=_BY_RATIO, vllm=165),
        Workload(prompt_tokens=1024, new_tokens=3072, requests=200, d2o=_BY_TOKENS, vllm=7_779),
        Workload(prompt_tokens=1024, new_tokens=4096, requests=400, d2o=_BY_TOKENS, vllm=6_616),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One workload under one policy. Rates count from the submission of all requests to the last token.

    ``over_vllm`` compares output rates, and says something at scale 1 only. ``itl_seconds`` are between consecutive
    messages of a stream, ``tokens_per_message`` of which come together; ``seconds_per_token`` is a stream's average.
    ``at_once`` and ``peak_pages_in_use`` are sampled; ``front_busy`` is the share of the time in which the front
    process computed, above 1 where its threads did at the same time.
    """

    policy: str
    compression: dict[str, Any]
    requests: int
    seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    total_tokens_per_second: float
    over_vllm: float
    ttft_seconds: dict[str, float]
    itl_seconds: dict[str, float]
    seconds_per_token: dict[str, float]
    tokens_per_message: float
    queue_seconds: dict[str, float]
    at_once: int
    peak_pages_in_use: int
    peak_pages_a_request: int
    mean_ratio_reached: float
    front_busy: float


async def measure(
    server: RunningServer, client: AsyncClient, workload: Workload, load: Load, *, policy: str, processes: int
) -> Run:
    """Runs a load and waits until nothing is held.

    Raises:
        RuntimeError: a stream did not bring its tokens, or pages were still held afterwards.
    """
    samples: list[ServerLoad] = []
    sampler = asyncio.create_task(_sample(client, samples))
    before = server.front_cpu_seconds()
    try:
        outcomes = await run_load(load, processes)
    finally:
        sampler.cancel()
        with suppress(asyncio.CancelledError):
            await sampler
    busy = server.front_cpu_seconds() - before
    await _settle(client)
    return _run(workload, load, policy, outcomes, samples, busy)


async def _sample(client: AsyncClient, samples: list[ServerLoad]) -> None:
    while True:
        samples.append(await client.load())
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _settle(client: AsyncClient) -> None:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (load := await client.load()).pages_reserved or load.pages_used or load.running:
        if time.monotonic() > deadline:
            raise RuntimeError(f"pages leaked: {load.pages_used} used, {load.pages_reserved} reserved after the run")
        await asyncio.sleep(_SAMPLE_SECONDS)


def _run(
    workload: Workload,
    load: Load,
    policy: str,
    outcomes: Sequence[Outcome],
    samples: Sequence[ServerLoad],
    busy: float,
) -> Run:
    seconds = max(outcome.arrivals[-1] for outcome in outcomes)
    output = total_tokens(outcomes)
    return Run(
        policy=policy,
        compression=load.compression,
        requests=load.requests,
        seconds=seconds,
        output_tokens_per_second=output / seconds,
        requests_per_second=load.requests / seconds,
        total_tokens_per_second=(output + load.requests * load.prompt_tokens) / seconds,
        over_vllm=output / seconds / workload.vllm,
        ttft_seconds=_percentiles([outcome.arrivals[0] for outcome in outcomes]),
        itl_seconds=_percentiles([gap for outcome in outcomes for gap in outcome.gaps]),
        seconds_per_token=_percentiles([outcome.seconds_per_token for outcome in outcomes]),
        tokens_per_message=output / sum(len(outcome.arrivals) for outcome in outcomes),
        queue_seconds=_percentiles([outcome.queue_seconds for outcome in outcomes]),
        at_once=max(sample.running for sample in samples),
        peak_pages_in_use=max(sample.pages_used for sample in samples),
        peak_pages_a_request=max(outcome.peak_pages for outcome in outcomes),
        mean_ratio_reached=mean(outcome.ratio_reached for outcome in outcomes),
        front_busy=busy / seconds,
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": float(numpy.percentile(values, share)) if values else 0.0 for share in (50, 95, 99)}


class Benchmark:
    """The chosen workloads and policies on one server, and what they have given so far."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self._parsed = parsed
        self._excluded = special_ids(parsed.model)
        self._cells = _cells(parsed)
        self.runs: dict[str, list[Run]] = {name: [] for name, _ in self._cells}

    async def run(self) -> Path:
        """Runs everything; returns the file with the results."""
        with server_process(*self._flags()) as server:
            async with open_client(server.target) as client:
                info = await client.model_info()
                for name, policy in self._cells:
                    run = await self._cell(server, client, info, WORKLOADS[name], policy)
                    self.runs[name].append(run)
                    path = _cli.write_json(self._parsed.out, self._parsed.name, self._report(info))
                    _say(name, run)
        return path

    def _flags(self) -> list[str]:
        """All requests may wait, and as many run as the largest workload has."""
        chosen = [WORKLOADS[name] for name in self.runs]
        most = max(workload.scaled(self._parsed.scale) for workload in chosen)
        tokens = max(workload.scaled(self._parsed.scale) * workload.prompt_tokens for workload in chosen)
        flags = ["--model", self._parsed.model, "--dtype", self._parsed.dtype, "--threads", str(self._parsed.threads)]
        flags += ["--max-sequences", str(most), "--max-waiting", str(most), "--max-waiting-tokens", str(tokens)]
        return flags + shlex.split(self._parsed.server_flags)

    async def _cell(
        self, server: RunningServer, client: AsyncClient, info: ModelInfo, workload: Workload, policy: str
    ) -> Run:
        load = Load(
            target=server.target,
            requests=workload.scaled(self._parsed.scale),
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            compression=workload.d2o if policy == "d2o" else _FULL_CACHE,
            vocabulary_size=info.vocabulary_size,
            excluded=self._excluded,
            seed=self._parsed.seed,
        )
        if self._parsed.warm_up:
            await run_load(_warm_up(load, self._parsed.warm_up), 1)
            await _settle(client)
        return await measure(server, client, workload, load, policy=policy, processes=self._parsed.client_processes)

    def _report(self, info: ModelInfo) -> dict[str, Any]:
        chosen = ("model", "threads", "server_flags", "client_processes", "warm_up", "scale", "seed")
        return {
            "settings": {name: getattr(self._parsed, name) for name in chosen}
            | {
                "dtype": info.dtype,
                "page_size": info.page_size,
                "pool_pages": info.total_pages,
                "pool_full_cache_tokens": info.total_pages // info.layers * info.page_size,
                "pool_bytes": info.total_pages * info.page_bytes,
            },
            "workloads": [
                {"name": name} | asdict(WORKLOADS[name]) | {"runs": [asdict(run) for run in runs]}
                for name, runs in self.runs.items()
            ],
        }


def _warm_up(load: Load, requests: int) -> Load:
    """A few short requests with prompts of the load's length that no request of the load has."""
    return Load(
        **asdict(load)
        | {"first": load.requests, "requests": requests, "new_tokens": min(_WARM_UP_TOKENS, load.new_tokens)}
    )


def _say(name: str, run: Run) -> None:
    rate = f"{run.output_tokens_per_second:.0f} output tokens/s, {run.over_vllm:.2f} x vLLM"
    print(f"{name} {run.policy}: {rate}, {run.seconds:.1f} s, {run.at_once} at once", file=sys.stderr, flush=True)


_HEAD = (
    *("load", "policy", "requests", "seconds", "out tok/s", "vLLM", "ratio", "req/s", "all tok/s"),
    *("TTFT p50", "p95", "p99", "ITL p50", "p95", "p99", "at once", "pages", "front"),
)


def _rows(runs: dict[str, list[Run]]) -> list[tuple[object, ...]]:
    return [
        (
            *(name, run.policy, run.requests, run.seconds, run.output_tokens_per_second),
            *(WORKLOADS[name].vllm, run.over_vllm, run.requests_per_second, run.total_tokens_per_second),
            *run.ttft_seconds.values(),
            *(f"{gap:.4f}" for gap in run.itl_seconds.values()),
            *(run.at_once, run.peak_pages_in_use, run.front_busy),
        )
        for name, cells in runs.items()
        for run in cells
    ]


def _cells(parsed: argparse.Namespace) -> list[tuple[str, str]]:
    """Workloads and policies in the order in which they run.

    Raises:
        SystemExit: a cell names what there is not.
    """
    if parsed.cells is None:
        return [(name, policy) for name in parsed.workloads for policy in parsed.policies]
    cells = [(name, policy) for name, _, policy in (cell.partition(":") for cell in parsed.cells)]
    for name, policy in cells:
        if name not in WORKLOADS or policy not in ("none", "d2o"):
            raise SystemExit(f"cells: got {name}:{policy}, allowed are {', '.join(WORKLOADS)} with :none or :d2o")
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.set_defaults(model=_GPU_MODEL)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--policies", nargs="+", default=["none", "d2o"], choices=["none", "d2o"])
    parser.add_argument("--cells", nargs="+", help="instead of both: workload:policy, in this order")
    parser.add_argument("--scale", type=float, default=1.0, help="of the workloads' numbers of requests")
    parser.add_argument("--server-flags", default="", help="more flags of d2o-serve, in one argument")
    parser.add_argument("--client-processes", type=int, default=4, help="that the requests are sent from")
    parser.add_argument("--warm-up", type=int, default=4, help="short requests before each run; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--name", default="throughput", help="of the file that is written")
    options = parser.parse_args(arguments)
    if options.model == _GPU_MODEL and shutil.which("nvidia-smi") is None:
        print(f"throughput: {_GPU_MODEL} needs a GPU, and there is none here; --model takes a smaller one")
        return
    benchmark = Benchmark(options)
    path = asyncio.run(benchmark.run())
    _cli.print_table(_HEAD, _rows(benchmark.runs))
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
