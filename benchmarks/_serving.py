"""One real server, loads that are run on it from client processes, and what a run gave."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import numpy

from benchmarks._floor import Rates
from benchmarks._load import Load, Outcome, run_load, total_tokens
from benchmarks._prompts import special_ids
from benchmarks._server import RunningServer, open_client, server_process
from d2o_client import AsyncClient, ModelInfo
from d2o_client import Load as ServerLoad

FULL_CACHE: dict[str, Any] = {"policy": "none"}
BY_RATIO: dict[str, Any] = {"policy": "d2o", "ratio": 0.2, "min_budget": 1024}
BY_TOKENS: dict[str, Any] = {"policy": "d2o", "budget_tokens": 1024}
_SAMPLE_SECONDS = 0.25
_SETTLE_SECONDS = 10.0
# Past the first eviction of a budget that the prompt fills.
_WARM_UP_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The time in which every request of a load decoded: from the last first token to the first last token."""

    seconds: float
    tokens: int
    output_tokens_per_second: float
    itl_seconds: dict[str, float]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Window | None:
        """None where a stream had ended before another began."""
        begin = max(outcome.arrivals[0] for outcome in outcomes)
        end = min(outcome.arrivals[-1] for outcome in outcomes)
        if end <= begin:
            return None
        tokens = sum(
            count
            for outcome in outcomes
            for at, count in zip(outcome.arrivals, outcome.counts, strict=True)
            if begin < at <= end
        )
        gaps = (gap for outcome in outcomes for gap in _gaps_within(outcome, begin, end))
        return cls(
            seconds=end - begin,
            tokens=tokens,
            output_tokens_per_second=tokens / (end - begin),
            itl_seconds=percentiles(list(gaps)),
        )


def _gaps_within(outcome: Outcome, begin: float, end: float) -> Iterator[float]:
    arrivals = outcome.arrivals
    return (
        arrivals[i] - arrivals[i - 1] for i in range(1, len(arrivals)) if begin <= arrivals[i - 1] < arrivals[i] <= end
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run of a load gave. Rates count from the submission of all requests to the last token.

    ``prompts_in`` is the part of it in which every request decoded and no prompt was read. ``itl_seconds`` are between
    consecutive messages of a stream, ``tokens_per_message`` of which come together; ``seconds_per_token`` is a stream's
    average. ``at_once`` and ``peak_pages_in_use`` are sampled; ``front_busy`` is the share of the time in which the
    front process computed, above 1 where its threads did at the same time.
    """

    compression: dict[str, Any]
    requests: int
    seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    total_tokens_per_second: float
    prompts_in: Window | None
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


class Session:
    """A server that runs, a client of it, and the settings that all loads share. ``rates``: None without a GPU."""

    def __init__(
        self,
        parsed: argparse.Namespace,
        server: RunningServer,
        client: AsyncClient,
        info: ModelInfo,
        rates: Rates | None,
    ) -> None:
        self.info, self.rates = info, rates
        self._parsed, self._server, self._client = parsed, server, client
        self._excluded = special_ids(parsed.model)

    @classmethod
    @asynccontextmanager
    async def open(cls, parsed: argparse.Namespace, *flags: str) -> AsyncIterator[Session]:
        """Measures the GPU, and starts a server with ``flags`` and those that ``parsed`` has for every server."""
        rates = Rates.measure_apart(parsed.server_flags)
        with server_process(*model_flags(parsed), *flags, *shlex.split(parsed.server_flags)) as server:
            async with open_client(server.target) as client:
                yield cls(parsed, server, client, await client.model_info(), rates)

    def load(self, *, requests: int, prompt_tokens: int, new_tokens: int, compression: dict[str, Any]) -> Load:
        """Requests to this server."""
        return Load(
            target=self._server.target,
            requests=requests,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            compression=compression,
            vocabulary_size=self.info.vocabulary_size,
            excluded=self._excluded,
            seed=self._parsed.seed,
        )

    async def warm_up(self, load: Load, requests: int) -> None:
        """Runs a few short requests with prompts of the load's length that no request of the load has."""
        new_tokens = min(_WARM_UP_TOKENS, load.new_tokens)
        await run_load(replace(load, first=load.first + load.requests, requests=requests, new_tokens=new_tokens), 1)
        await settled(self._client)

    async def measure(self, load: Load) -> Figures:
        """Runs a load and waits until nothing is held.

        Raises:
            RuntimeError: a stream did not bring its tokens, or pages were still held afterwards.
        """
        samples: list[ServerLoad] = []
        sampler = asyncio.create_task(self._sample(samples))
        before = self._server.front_cpu_seconds()
        try:
            outcomes = await run_load(load, self._parsed.client_processes)
        finally:
            sampler.cancel()
            with suppress(asyncio.CancelledError):
                await sampler
        busy = self._server.front_cpu_seconds() - before
        await settled(self._client)
        return _figures(load, outcomes, samples, busy)

    async def _sample(self, samples: list[ServerLoad]) -> None:
        while True:
            samples.append(await self._client.load())
            await asyncio.sleep(_SAMPLE_SECONDS)

    def facts(self, **more: Any) -> dict[str, Any]:
        """What a result says about GPU, server and clients, and ``more`` settings."""
        chosen = ("model", "threads", "server_flags", "client_processes", "seed")
        info = self.info
        settings = {name: getattr(self._parsed, name) for name in chosen} | {
            "dtype": info.dtype,
            "page_size": info.page_size,
            "pool_pages": info.total_pages,
            "pool_full_cache_tokens": info.total_pages // info.layers * info.page_size,
            "pool_bytes": info.total_pages * info.page_bytes,
        }
        return {"ceilings": self.rates and asdict(self.rates), "settings": settings | more}


def model_flags(parsed: argparse.Namespace) -> list[str]:
    """The server's flags for what every benchmark's command line says about the model."""
    return ["--model", parsed.model, "--dtype", parsed.dtype, "--threads", str(parsed.threads)]


def room_for(requests: int, prompt_tokens: int) -> list[str]:
    """Flags with which all of that many requests may wait, and run where the pool holds them."""
    flags = ["--max-sequences", str(requests), "--max-waiting", str(requests)]
    return [*flags, "--max-waiting-tokens", str(requests * prompt_tokens)]


async def settled(client: AsyncClient) -> ServerLoad:
    """The server's load once nothing is held any more.

    Raises:
        RuntimeError: something still is after ten seconds.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        load = await client.load()
        if not (load.pages_used or load.pages_reserved or load.running or load.waiting):
            return load
        if time.monotonic() > deadline:
            raise RuntimeError(f"pages leaked: {load.pages_used} used, {load.pages_reserved} reserved after the run")
        await asyncio.sleep(_SAMPLE_SECONDS / 5)


def percentiles(values: Sequence[float], shares: Sequence[int] = (50, 95, 99)) -> dict[str, float]:
    """The values' percentiles by name; 0 where there are no values."""
    return {f"p{share}": float(numpy.percentile(values, share)) if values else 0.0 for share in shares}


def _figures(load: Load, outcomes: Sequence[Outcome], samples: Sequence[ServerLoad], busy: float) -> Figures:
    seconds = max(outcome.arrivals[-1] for outcome in outcomes)
    output = total_tokens(outcomes)
    return Figures(
        compression=load.compression,
        requests=load.requests,
        seconds=seconds,
        output_tokens_per_second=output / seconds,
        requests_per_second=load.requests / seconds,
        total_tokens_per_second=(output + load.requests * load.prompt_tokens) / seconds,
        prompts_in=Window.of(outcomes),
        ttft_seconds=percentiles([outcome.arrivals[0] for outcome in outcomes]),
        itl_seconds=percentiles([gap for outcome in outcomes for gap in outcome.gaps]),
        seconds_per_token=percentiles([outcome.seconds_per_token for outcome in outcomes]),
        tokens_per_message=output / sum(len(outcome.arrivals) for outcome in outcomes),
        queue_seconds=percentiles([outcome.queue_seconds for outcome in outcomes]),
        at_once=max(sample.running for sample in samples),
        peak_pages_in_use=max(sample.pages_used for sample in samples),
        peak_pages_a_request=max(outcome.peak_pages for outcome in outcomes),
        mean_ratio_reached=mean(outcome.ratio_reached for outcome in outcomes),
        front_busy=busy / seconds,
    )
