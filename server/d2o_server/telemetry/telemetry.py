"""Metrics and traces of one server, behind what its engine and its RPC layer tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from d2o_server.engine.observer import Observer, Timeline
from d2o_server.settings import TelemetrySettings
from d2o_server.telemetry.calls import CallObserver
from d2o_server.telemetry.metrics import Metrics, MetricsServer, Source

if TYPE_CHECKING:
    from d2o_server.telemetry.tracing import Tracing


class Telemetry(Observer, CallObserver):
    """Counts what it is told and, where ``settings`` name a target, traces it. Make it on the server's event loop.

    ``metrics_server`` is None where the port is 0. ``host`` is the address that metrics are served on.

    Raises:
        StartupError: the metrics' port cannot be bound.
    """

    def __init__(self, settings: TelemetrySettings, host: str, version: str) -> None:
        self.metrics = Metrics()
        self.tracing: Tracing | None = None
        self.metrics_server: MetricsServer | None = None
        if settings.trace is not None:
            # Takes a while to import, and is seldom wanted.
            from d2o_server.telemetry import tracing

            self.tracing = tracing.Tracing(settings.trace, version)
            self.trace_id = tracing.trace_id  # type: ignore[method-assign]
        if settings.metrics_port:
            self.metrics_server = MetricsServer(self.metrics.registry, host, settings.metrics_port)
        # Called once a message and stream: no call in between.
        self.tokens = self.metrics.between_tokens  # type: ignore[method-assign]

    @property
    def interceptors(self) -> tuple[grpc.aio.ServerInterceptor, ...]:
        """What goes around all other interceptors of the RPC server."""
        return () if self.tracing is None else (self.tracing.interceptor(),)

    def attach(self, engine: Source) -> None:
        """From now on the metrics show what ``engine`` holds."""
        self.metrics.attach(engine)

    async def close(self) -> None:
        """Stops serving metrics and sends the last spans."""
        if self.metrics_server is not None:
            await self.metrics_server.close()
        if self.tracing is not None:
            await self.tracing.close()

    def admitted(self, queue_seconds: float) -> None:
        """See :class:`Observer`."""
        self.metrics.queue.observe(queue_seconds)

    def first_tokens(self, seconds: float) -> None:
        """See :class:`Observer`."""
        self.metrics.first_token.observe(seconds)

    def ended(self, timeline: Timeline) -> None:
        """See :class:`Observer`."""
        self.metrics.ended(timeline)
        if self.tracing is not None:
            self.tracing.ended(timeline)

    def worker_restarted(self, index: int) -> None:
        """See :class:`Observer`."""
        self.metrics.worker_restarted()

    def call_ended(self, method: str, status: str, rejection: str | None) -> None:
        """See :class:`CallObserver`."""
        self.metrics.call_ended(method, status, rejection)
        if self.tracing is not None:
            self.tracing.call_ended(status, rejection)
