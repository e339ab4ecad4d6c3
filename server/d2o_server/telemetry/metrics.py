"""Prometheus metrics: what an engine holds is asked of it at each scrape, what happens is counted as it happens."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any, Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from d2o_server.engine.observer import Timeline
from d2o_server.engine.types import AutoOutcome, CacheFacts, Load, ModelInfo, policy_name
from d2o_server.errors import StartupError

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5),
)
_REQUEST = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
_QUEUE = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_COMPRESSION = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# Counted from 0 on, so that the first of its kind shows as a rise; others appear with their first.
_REASONS = (
    *("invalid_request", "unauthenticated", "rate_limit", "call_limit", "client_streams", "client_pages"),
    *("queue_full", "queue_time", "deadline_exceeded", "draining", "unavailable", "out_of_device_memory"),
)
_FATES = ("kept", "merged", "dropped")
_SECONDS_TO_ANSWER = 5.0


class Source(Protocol):
    """What a scrape asks of an engine."""

    def model_info(self) -> ModelInfo: ...

    def load(self) -> Load: ...


class Metrics:
    """All metrics of one server, in a registry of their own. Counting is done on the event loop only."""

    def __init__(self) -> None:
        without_created: Any = disable_created_metrics
        without_created()
        self.registry = CollectorRegistry()
        self._loop = _LoopBound(self.registry)
        self._between = self._loop.between_tokens
        histogram = self._histogram
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first message.", _FIRST_TOKEN)
        self.request = histogram("request_seconds", "From arrival to the end, of requests that finished.", _REQUEST)
        self.queue = histogram("queue_seconds", "From arrival to admission.", _QUEUE)
        self.compression = histogram(
            "compression_seconds", "Spent on compressing a request's cache, where it was compressed.", _COMPRESSION
        )
        self._calls = self._counter("calls", "Calls that ended, by gRPC status.", "method", "code")
        self._rejections = self._counter("rejections", "Calls refused before they ran.", "reason")
        self._auto = self._counter("auto_choices", "Requests in compression auto, by what became of them.", "outcome")
        self._cancellations = self._counter("cancellations", "Calls that their caller cancelled.")
        self._resumed = self._counter("resumptions", "Times that a stream went on after its worker had died.")
        self._restarts = self._counter("worker_restarts", "Workers that died and were started again.")
        fates = self._counter(
            "cache_tokens", "What became of finished requests' tokens in an average layer and head.", "fate"
        )
        for reason in _REASONS:
            self._rejections.labels(reason=reason)
        for outcome in AutoOutcome:
            self._auto.labels(outcome=outcome)
        self._kept, self._merged, self._dropped = (fates.labels(fate=fate) for fate in _FATES)
        ProcessCollector(registry=self.registry)

    def attach(self, engine: Source) -> None:
        """From now on scrapes ask ``engine``, on the event loop that this is called on."""
        info = engine.model_info()
        facts = {
            "version": info.server_version,
            "model": info.model,
            "architecture": info.architecture,
            "dtype": info.dtype,
            "compression": policy_name(info.default_compression),
            "torch": _installed("torch"),
            "transformers": _installed("transformers"),
        }
        Info("d2o_build", "What is served, and by what.", registry=self.registry).info(facts)
        self._loop.attach(engine, info.model)

    def between_tokens(self, count: int, seconds: float) -> None:
        """``count`` tokens came ``seconds`` after those before them."""
        self._between.add(seconds / count, count)

    def ended(self, timeline: Timeline) -> None:
        """Counts a generation that is over."""
        self._resumed.inc(timeline.resumed)
        if timeline.auto is not None:
            self._auto.labels(outcome=timeline.auto).inc()
        if timeline.cache is None:
            return
        self.request.observe(timeline.ended - timeline.arrived)
        if any(layer.budget for layer in timeline.cache.layers):
            self.compression.observe(timeline.cache.compression_seconds)
        kept, merged, dropped = _fates(timeline.cache)
        self._kept.inc(kept)
        self._merged.inc(merged)
        self._dropped.inc(dropped)

    def call_ended(self, method: str, status: str, rejection: str | None) -> None:
        """Counts a call, and why it was refused if it was."""
        self._calls.labels(method=method, code=status).inc()
        if rejection is not None:
            self._rejections.labels(reason=rejection).inc()
        if status == "CANCELLED":
            self._cancellations.inc()

    def worker_restarted(self) -> None:
        """Counts a worker that is started again."""
        self._restarts.inc()

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"d2o_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"d2o_{name}", text, labels, registry=self.registry)


def _fates(cache: CacheFacts) -> tuple[float, float, float]:
    """Tokens kept, merged and dropped in an average layer."""
    kept, merged, dropped = 0, 0.0, 0.0
    for layer in cache.layers:
        kept += layer.kept
        merged += layer.merged
        dropped += layer.dropped
    count = len(cache.layers) or 1
    return kept / count, merged / count, dropped / count


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


class _Gaps:
    """A histogram that many equal values are added to at once: it is passed once a message of every stream."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        edges = [*map(str, self._bounds), "+Inf"]
        return HistogramMetricFamily(
            name, text, buckets=list(zip(edges, accumulate(self._counts), strict=True)), sum_value=self._sum
        )


class _LoopBound(Collector):
    """What only the event loop may look at; scrapes come in threads of their own, and wait for it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.between_tokens = _Gaps(_BETWEEN_TOKENS)
        self._engine: Source | None = None
        self._model = ""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        registry.register(self)

    def attach(self, engine: Source, model: str) -> None:
        self._engine, self._model = engine, model

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        if threading.get_ident() == self._thread:
            yield from self._families()
        else:
            yield from asyncio.run_coroutine_threadsafe(self._answer(), self._loop).result(_SECONDS_TO_ANSWER)

    async def _answer(self) -> list[Metric]:
        return self._families()

    def _families(self) -> list[Metric]:
        between = self.between_tokens.family("d2o_inter_token_seconds", "Between a stream's messages, a token.")
        return [between] if self._engine is None else [between, *_load_families(self._engine.load(), self._model)]


def _load_families(load: Load, model: str) -> Iterator[Metric]:
    taken = 1 - load.pages_free / load.pages_total if load.pages_total else 1.0
    yield _gauge("d2o_requests_running", "Requests that workers have admitted.", load.running)
    yield _gauge("d2o_requests_waiting", "Requests that wait for pages.", load.waiting)
    yield _gauge("d2o_waiting_prompt_tokens", "Prompt tokens of requests that wait.", load.waiting_prompt_tokens)
    pages = {"free": load.pages_free, "used": load.pages_used, "reserved": load.pages_reserved}
    yield _gauges("d2o_pages", "Cache pages: filled, promised but not filled, and free.", "state", pages)
    tokens = {"logical": load.logical_tokens, "physical": load.physical_tokens}
    yield _gauges("d2o_tokens", "Tokens of running requests, and slots that an average layer has.", "kind", tokens)
    serving = sum(worker.serving for worker in load.workers)
    states = {"serving": serving, "down": len(load.workers) - serving}
    yield _gauges("d2o_workers", "Worker processes.", "state", states)
    yield _gauge("d2o_draining", "1 while the server takes no new requests.", load.draining)
    if load.layers:
        budgets = {str(layer): of.budget for layer, of in enumerate(load.layers)}
        slots = {str(layer): of.slots for layer, of in enumerate(load.layers)}
        yield _gauges("d2o_layer_budget_slots", "Mean budget of compressed requests.", "layer", budgets)
        yield _gauges("d2o_layer_used_slots", "Slots that running requests hold.", "layer", slots)
    yield CounterMetricFamily("d2o_prompt_tokens", "Prompt tokens of admitted requests.", load.read_tokens)
    yield CounterMetricFamily("d2o_generated_tokens", "New tokens.", load.generated_tokens)
    aliases = (("num_requests_running", load.running), ("num_requests_waiting", load.waiting))
    for name, value in (*aliases, ("kv_cache_usage_perc", taken)):
        text = f"As vLLM spells it, for gateways that read it{'; promised pages count' if value is taken else ''}."
        yield _gauges(f"vllm:{name}", text, "model_name", {model: value})


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, float(value))


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], float(value))
    return family


class MetricsServer:
    """Serves a registry at ``/metrics``, from a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Listens at once.

        Raises:
            StartupError: the address cannot be bound.
        """
        start: Callable[..., tuple[WSGIServer, threading.Thread]] = start_http_server
        try:
            self._server, self._thread = start(port, host, registry)
        except OSError as error:
            allowed = f"a free port of {host}, or 0 for no metrics ({error.strerror or error})"
            raise StartupError(f"metrics_port: got {port}, allowed is {allowed}") from error

    @property
    def port(self) -> int:
        """The port that is bound."""
        address: Any = self._server.server_address
        return int(address[1])

    async def close(self) -> None:
        """Ends the thread. Scrapes that run meanwhile still get their answer from the event loop."""
        await asyncio.to_thread(self._server.shutdown)
        with suppress(OSError):
            self._server.server_close()
