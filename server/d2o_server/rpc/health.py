"""grpc.health.v1 for one process: every service has the same status, and watchers never delay a shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):
    """Answers Check and Watch for ``services``; NOT_SERVING until told otherwise.

    The servicer that comes with grpcio-health-checking forgets the other watchers of a service when one leaves, and
    its watches last as long as a server's grace.
    """

    def __init__(self, services: Collection[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._closed = False
        self._changed = asyncio.Condition()

    async def set_serving(self, serving: bool) -> None:
        """Sets the status of every service and tells the watchers."""
        async with self._changed:
            self._serving = serving and not self._closed
            self._changed.notify_all()

    async def close(self) -> None:
        """NOT_SERVING for good; running watches end after saying so."""
        async with self._changed:
            self._serving = False
            self._closed = True
            self._changed.notify_all()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not known."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: got {request.service!r}, which is not served")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """The status now and at every change."""
        last: int | None = None
        while not self._closed or last != self._status(request.service):
            status = self._status(request.service)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            async with self._changed:
                if not self._closed and self._status(request.service) == last:
                    await self._changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._serving:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING
