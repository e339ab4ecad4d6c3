"""What only the blocking client promises: threads, and closing from another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from d2o_client import Client, ClientClosedError, RequestCancelledError
from tests.client.conftest import Retries
from tests.client.scripted_service import HANG, LATER, PATIENCE, PAUSE, STARTED, ScriptedServer, chunk


def test_one_client_serves_many_threads(server: ScriptedServer) -> None:
    with Client(server.target) as client, ThreadPoolExecutor(8) as threads:
        streams = threads.map(lambda _: client.stream("Hi").result().text, range(40))
        answers = threads.map(lambda _: client.generate("Hi").text, range(40))
        assert {*streams, *answers} == {"Hello world"}
    assert len(server.calls) == 80


def once(event: Callable[[], object], then: Callable[[], None]) -> None:
    """Has another thread do ``then`` as soon as ``event`` returns."""

    def follow() -> None:
        event()
        then()

    threading.Thread(target=follow, daemon=True).start()


def arrival(server: ScriptedServer) -> None:
    """Returns once the server has seen a call."""
    end = time.monotonic() + PATIENCE
    while not server.calls and time.monotonic() < end:
        time.sleep(0.01)


def test_another_thread_can_close_a_stream_that_waits_for_a_chunk(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    with Client(server.target) as client:
        stream = client.stream("Hi")
        next(stream)
        threading.Timer(0.1, stream.close).start()
        with pytest.raises(RequestCancelledError):
            next(stream)


def test_closing_a_stream_ends_its_wait_for_the_next_attempt(server: ScriptedServer, retries: Retries) -> None:
    server.script("StreamGenerateText", LATER)
    begin = time.monotonic()
    with Client(server.target) as client:
        stream = client.stream("Hi")
        once(retries.wait, stream.close)
        with pytest.raises(RequestCancelledError, match="closed"):
            next(stream)
    assert time.monotonic() - begin < PAUSE
    assert len(server.calls) == 1


def test_closing_the_client_ends_a_calls_wait_for_the_next_attempt(server: ScriptedServer, retries: Retries) -> None:
    server.script("GenerateText", LATER)
    client = Client(server.target)
    begin = time.monotonic()
    once(retries.wait, client.close)
    with pytest.raises(ClientClosedError):
        client.generate("Hi")
    assert time.monotonic() - begin < PAUSE
    assert len(server.calls) == 1


def test_closing_the_client_ends_a_streams_wait_for_the_next_attempt(server: ScriptedServer, retries: Retries) -> None:
    server.script("StreamGenerateText", LATER)
    client = Client(server.target)
    begin = time.monotonic()
    once(retries.wait, client.close)
    with pytest.raises(ClientClosedError):
        client.stream("Hi").result()
    assert time.monotonic() - begin < PAUSE


def test_closing_the_client_ends_what_still_runs(server: ScriptedServer) -> None:
    server.script("GenerateText", HANG)
    client = Client(server.target)
    once(lambda: arrival(server), client.close)
    with pytest.raises(RequestCancelledError):
        client.generate("Hi")


def test_a_closed_client_refuses_calls(server: ScriptedServer) -> None:
    with Client(server.target) as client:
        stream = client.stream("Hi")
    with pytest.raises(ClientClosedError):
        client.generate("Hi")
    with pytest.raises(ClientClosedError):
        next(stream)
