"""What only the blocking client promises: threads, and closing from another thread."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from d2o_client import Client, ClientClosedError, RequestCancelledError, UnavailableError
from tests.client.scripted_service import HANG, STARTED, Abort, ScriptedServer, chunk

LATER = Abort(grpc.StatusCode.UNAVAILABLE, "gone", (("grpc-retry-pushback-ms", "15000"),))


def test_one_client_serves_many_threads(server: ScriptedServer) -> None:
    with Client(server.target) as client, ThreadPoolExecutor(8) as threads:
        streams = threads.map(lambda _: client.stream("Hi").result().text, range(40))
        answers = threads.map(lambda _: client.generate("Hi").text, range(40))
        assert {*streams, *answers} == {"Hello world"}
    assert len(server.calls) == 80


def test_another_thread_can_close_a_stream_that_waits_for_a_chunk(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    with Client(server.target) as client:
        stream = client.stream("Hi")
        next(stream)
        threading.Timer(0.1, stream.close).start()
        with pytest.raises(RequestCancelledError):
            next(stream)


def test_another_thread_can_close_a_stream_that_waits_for_its_next_attempt(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", LATER)
    begin = time.monotonic()
    with Client(server.target) as client:
        stream = client.stream("Hi")
        threading.Timer(0.3, stream.close).start()
        with pytest.raises(RequestCancelledError, match="closed"):
            next(stream)
    assert time.monotonic() - begin < 5


def test_closing_the_client_ends_its_wait_for_the_next_attempt(server: ScriptedServer) -> None:
    server.script("GenerateText", LATER)
    client = Client(server.target)
    threading.Timer(0.3, client.close).start()
    with pytest.raises((ClientClosedError, UnavailableError)):
        client.generate("Hi")
    assert len(server.calls) == 1


def test_closing_the_client_ends_what_still_runs(server: ScriptedServer) -> None:
    server.script("GenerateText", HANG)
    client = Client(server.target)
    threading.Timer(0.2, client.close).start()
    with pytest.raises(RequestCancelledError):
        client.generate("Hi")


def test_a_closed_client_refuses_calls(server: ScriptedServer) -> None:
    with Client(server.target) as client:
        stream = client.stream("Hi")
    with pytest.raises(ClientClosedError):
        client.generate("Hi")
    with pytest.raises(ClientClosedError):
        next(stream)
