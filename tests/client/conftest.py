"""A scripted server, and both clients behind one blocking face, so that one test states what both do."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from d2o_client import AsyncClient, AsyncStream, Client
from tests.client.scripted_service import PATIENCE, ScriptedServer


class Retries(logging.Handler):
    """Listens to a client's log for the pauses before its attempts."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._seen = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self._seen.release()

    def wait(self, count: int = 1) -> None:
        """Until ``count`` more attempts failed and their pauses are about to begin."""
        for _ in range(count):
            assert self._seen.acquire(timeout=PATIENCE), "no attempt failed"


@pytest.fixture
def retries() -> Iterator[Retries]:
    logger, listener = logging.getLogger("d2o_client"), Retries()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    yield listener
    logger.removeHandler(listener)
    logger.setLevel(level)


class BlockingStream:
    """An AsyncStream, driven from outside its loop."""

    def __init__(self, runner: asyncio.Runner, stream: AsyncStream) -> None:
        self._runner = runner
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> Any:
        async def advance() -> Any:
            return await anext(self._stream, None)

        found = self._runner.run(advance())
        if found is None:
            raise StopIteration
        return found

    def result(self) -> Any:
        return self._runner.run(self._stream.result())

    def close(self) -> None:
        self._runner.run(self._stream.aclose())

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlockingClient:
    """An AsyncClient, driven from outside its loop."""

    def __init__(self, target: str, **arguments: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(target, **arguments)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await method(*args, **kwargs)

        return lambda *args, **kwargs: self._runner.run(call(*args, **kwargs))

    def stream(self, *args: Any, **kwargs: Any) -> BlockingStream:
        return BlockingStream(self._runner, self._client.stream(*args, **kwargs))

    def shut(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


Connect = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes a client of either kind; the test's clients are closed after it."""
    clients: list[Any] = []

    def make(target: str, **arguments: Any) -> Any:
        kind = Client if request.param == "sync" else BlockingClient
        clients.append(kind(target, **arguments))
        return clients[-1]

    yield make
    for client in clients:
        client.shut() if isinstance(client, BlockingClient) else client.close()


@pytest.fixture
def client(connect: Connect, server: ScriptedServer) -> Any:
    return connect(server.target, timeout=20)
