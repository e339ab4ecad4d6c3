"""What only the blocking client promises: threads, and closing from another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from d2o_client import Client, ClientClosedError, RequestCancelledError, _sync
from d2o_client._channel import GENERATE, STREAM
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


def as_it_is_sent(method: Any, then: Callable[[], None]) -> SimpleNamespace:
    """The method, but another thread does ``then`` in the last moment before gRPC takes a call, all checks passed."""

    def serialize(request: Any) -> bytes:
        other = threading.Thread(target=then)
        other.start()
        other.join(PATIENCE)
        return bytes(method.serialize(request))

    return SimpleNamespace(path=method.path, serialize=serialize, parse=method.parse)


def test_a_client_may_be_closed_while_a_call_is_sent(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [Client(server.target), Client(server.target)]
    monkeypatch.setattr(_sync, "GENERATE", as_it_is_sent(GENERATE, clients[0].close))
    monkeypatch.setattr(_sync, "STREAM", as_it_is_sent(STREAM, clients[1].close))
    with pytest.raises(ClientClosedError):
        clients[0].generate("Hi")
    with pytest.raises(ClientClosedError):
        clients[1].stream("Hi").result()


def test_a_stream_may_be_closed_while_its_call_is_sent(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script("StreamGenerateText", HANG)
    with Client(server.target) as client:
        monkeypatch.setattr(_sync, "STREAM", as_it_is_sent(STREAM, lambda: stream.close()))
        stream = client.stream("Hi")
        with pytest.raises(RequestCancelledError):
            stream.result()


def test_a_closed_client_refuses_calls(server: ScriptedServer) -> None:
    with Client(server.target) as client:
        stream = client.stream("Hi")
    with pytest.raises(ClientClosedError):
        client.generate("Hi")
    with pytest.raises(ClientClosedError):
        next(stream)
