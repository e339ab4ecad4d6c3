"""One real server for all that can share it, and the rule that no test leaves a page behind."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import pytest

from d2o_client import NO_RETRY, AsyncClient, Client, D2OError
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.processes import TINY, ServerProcess, end, launch

Launch = Callable[..., ServerProcess]

_SECONDS_TO_IDLE = 5.0


class _Fleet:
    """All servers that run at the moment."""

    def __init__(self, folder: pytest.TempPathFactory) -> None:
        self._folder = folder
        self.servers: list[ServerProcess] = []

    def launch(self, *flags: str) -> ServerProcess:
        self.servers.append(launch(flags, self._folder.mktemp("server") / "log"))
        return self.servers[-1]


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Fleet]:
    running = _Fleet(tmp_path_factory)
    yield running
    for server in running.servers:
        end(server.process)


@pytest.fixture
def launch_server(fleet: _Fleet) -> Iterator[Launch]:
    """Starts further servers; they are gone at the end of the test."""
    before = len(fleet.servers)
    yield fleet.launch
    for server in fleet.servers[before:]:
        end(server.process)


@pytest.fixture(scope="module")
def launch_for_module(fleet: _Fleet) -> Iterator[Launch]:
    """Starts further servers; they are gone at the end of the module."""
    before = len(fleet.servers)
    yield fleet.launch
    for server in fleet.servers[before:]:
        end(server.process)


@pytest.fixture(scope="session")
def server(fleet: _Fleet) -> ServerProcess:
    """A tiny model with random weights; long prompts take many steps, so that every state can be caught."""
    return fleet.launch(*TINY, "--num-pages", "2000", "--prefill-tokens", "64")


@pytest.fixture(scope="session")
def small_server(fleet: _Fleet) -> ServerProcess:
    """A pool of 60 pages, which is 640 tokens of full cache, and a queue of 2 requests or 500 prompt tokens."""
    limits = ("--max-waiting", "2", "--max-waiting-tokens", "500")
    return fleet.launch(*TINY, "--num-pages", "60", "--prefill-tokens", "64", *limits)


@pytest.fixture(autouse=True)
def nothing_is_left(fleet: _Fleet) -> Iterator[None]:
    """After every test the pages come back within a moment, and no server has written a traceback."""
    yield
    for server in fleet.servers:
        if server.running:
            with Client(server.target, retry=None) as client:
                _wait_until_idle(client)
        assert "Traceback" not in server.log.read_text()


def _wait_until_idle(client: Client) -> None:
    give_up = time.monotonic() + _SECONDS_TO_IDLE
    while True:
        try:
            load = client.load(timeout=_SECONDS_TO_IDLE)
        except D2OError:
            return  # it is on its way out, and its pages with it
        held = (load.pages_used, load.pages_reserved, load.running, load.waiting)
        if not any(held):
            return
        assert time.monotonic() < give_up, f"still held: {held} (pages used and reserved, running, waiting)"
        time.sleep(0.02)


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, retry=NO_RETRY, timeout=60) as connected:
        yield connected


@pytest.fixture
async def small_client(small_server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(small_server.target, retry=NO_RETRY, timeout=60) as connected:
        yield connected


@pytest.fixture
async def stub(server: ServerProcess) -> AsyncIterator[InferenceServiceStub]:
    """The bare service, for what the client would not send."""
    async with grpc.aio.insecure_channel(server.target) as channel:
        yield InferenceServiceStub(channel)
