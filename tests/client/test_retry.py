"""Which failures are tried again, when, and for how long."""

from __future__ import annotations

import itertools
import time
from typing import Any

import grpc
import pytest

from d2o_client import (
    NO_RETRY,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    RetryPolicy,
    UnavailableError,
)
from d2o_client._core import Attempts
from d2o_inference.v1 import inference_service_pb2 as pb
from tests.client.conftest import Connect, Retries
from tests.client.scripted_service import STARTED, Abort, ScriptedServer, Wait, chunk

QUICK = RetryPolicy(initial_backoff=0.01, max_backoff=0.05)
GONE = Abort(grpc.StatusCode.UNAVAILABLE, "gone")


def pushback(milliseconds: object) -> Abort:
    trailer = ("grpc-retry-pushback-ms", str(milliseconds))
    return Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", (trailer,))


@pytest.fixture
def client(connect: Connect, server: ScriptedServer) -> Any:
    return connect(server.target, timeout=20, retry=QUICK)


@pytest.mark.parametrize("failure", [GONE, Abort(grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_a_call_is_sent_again_until_it_succeeds(client: Any, server: ScriptedServer, failure: Abort) -> None:
    for method in ("GenerateText", "StreamGenerateText"):
        server.script(method, failure)
        server.script(method, failure)
    assert client.generate("Hi").text == "Hello world"
    assert client.stream("Hi").result().text == "Hello world"
    assert len(server.calls) == 6


def test_attempts_are_bounded_and_counted(client: Any, server: ScriptedServer) -> None:
    for _ in range(QUICK.max_attempts):
        server.script("GenerateText", GONE)
    with pytest.raises(UnavailableError, match="after 5 attempts") as caught:
        client.generate("Hi")
    assert caught.value.attempts == len(server.calls) == QUICK.max_attempts


def test_a_failed_attempt_and_its_pause_are_logged(client: Any, server: ScriptedServer, retries: Retries) -> None:
    server.script("GenerateText", pushback(20))
    client.generate("Hi")
    assert retries.messages == ["attempt 1 of 5 failed with RESOURCE_EXHAUSTED: busy; the next one begins in 0.02 s"]


def test_other_failures_are_not_tried_again(client: Any, server: ScriptedServer) -> None:
    server.script("GenerateText", Abort(grpc.StatusCode.INTERNAL))
    with pytest.raises(InternalError):
        client.generate("Hi")
    assert len(server.calls) == 1


LARGE = "x" * 5_000_000
TO_THE_SERVER = r"^request: got 50000\d\d bytes, allowed is at most 4194304, the server's limit \("
TO_THE_CLIENT = r"^answer: got 50000\d\d bytes, allowed is at most 1000000, this client's max_message_bytes \("
BY_THE_CLIENT = r"^request: got 50000\d\d bytes, allowed is at most 1000000, this client's max_message_bytes \("


@pytest.mark.parametrize(
    ("most", "prompt", "answer", "message", "calls"),
    [
        (64_000_000, LARGE, "", TO_THE_SERVER, 0),
        (1_000_000, LARGE, "", BY_THE_CLIENT, 0),
        (1_000_000, "Hi", LARGE, TO_THE_CLIENT, 1),
    ],
    ids=["request-to-the-server", "request-by-the-client", "answer"],
)
def test_a_message_above_a_limit_is_not_sent_again(
    connect: Connect, server: ScriptedServer, most: int, prompt: str, answer: str, message: str, calls: int
) -> None:
    client = connect(server.target, timeout=20, retry=QUICK, max_message_bytes=most)
    server.script("GenerateText", pb.GenerateTextResponse(text=answer))
    server.script("StreamGenerateText", STARTED, chunk(answer, 1))
    for call in (lambda: client.generate(prompt), client.stream(prompt).result):
        with pytest.raises(ResourceExhaustedError, match=message) as caught:
            call()
        assert (caught.value.attempts, caught.value.retry_after) == (1, None)
    assert len(server.calls) == 2 * calls


def test_a_stream_starts_again_after_its_start_but_not_after_its_first_token(
    client: Any, server: ScriptedServer
) -> None:
    server.script("StreamGenerateText", STARTED, GONE)
    server.script("StreamGenerateText", STARTED, chunk("", 1), GONE)
    with pytest.raises(UnavailableError) as caught:
        client.stream("Hi").result()
    assert caught.value.attempts == len(server.calls) == 2


def test_a_pause_that_the_server_names_is_kept(client: Any, server: ScriptedServer) -> None:
    server.script("GenerateText", pushback(300))
    begin = time.monotonic()
    client.generate("Hi")
    assert 0.3 <= time.monotonic() - begin < 5


@pytest.mark.parametrize("word", [-1, "never"])
def test_a_server_can_forbid_retries(client: Any, server: ScriptedServer, word: object) -> None:
    server.script("StreamGenerateText", pushback(word))
    with pytest.raises(ResourceExhaustedError) as caught:
        client.stream("Hi").result()
    assert (caught.value.retry_after, len(server.calls)) == (None, 1)


def test_a_pause_beyond_the_timeout_is_not_begun(client: Any, server: ScriptedServer) -> None:
    server.script("GenerateText", pushback(60_000))
    begin = time.monotonic()
    with pytest.raises(ResourceExhaustedError) as caught:
        client.generate("Hi", timeout=5)
    assert caught.value.retry_after == 60
    assert time.monotonic() - begin < 2


def test_the_timeout_counts_over_all_attempts(client: Any, server: ScriptedServer) -> None:
    for _ in range(2):
        server.script("GenerateText", Wait(0.4), GONE)
    server.script("GenerateText", Wait())
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        client.generate("Hi", timeout=1.2)
    assert 1.1 < time.monotonic() - begin < 3
    remaining = [call.time_remaining or 0 for call in server.calls]
    assert remaining == sorted(remaining, reverse=True)
    assert remaining[-1] < 0.5


def test_retries_can_be_turned_off(connect: Connect, server: ScriptedServer) -> None:
    for policy in (None, NO_RETRY):
        server.script("GenerateText", GONE)
        with pytest.raises(UnavailableError):
            connect(server.target, retry=policy).generate("Hi")
    assert len(server.calls) == 2


def test_a_server_that_nobody_runs_is_unavailable(connect: Connect) -> None:
    with ScriptedServer() as server:
        target = server.target
    with pytest.raises(UnavailableError) as caught:
        connect(target, retry=QUICK).model_info()
    assert caught.value.attempts == QUICK.max_attempts


def test_the_backoff_grows_to_its_bound_within_its_jitter() -> None:
    policy = RetryPolicy(initial_backoff=1, multiplier=2, max_backoff=5, jitter=0.1)
    for attempt, middle in ((1, 1), (2, 2), (3, 4), (4, 5), (10_000, 5)):
        pauses = [policy.backoff(attempt) for _ in range(50)]
        assert all(0.9 * middle <= pause <= 1.1 * middle for pause in pauses)
        assert len(set(pauses)) > 1


def test_time_that_ran_out_between_attempts_names_the_last_failure() -> None:
    clock = itertools.chain([0.0, 0.0, 0.5], itertools.repeat(9.0))
    attempts = Attempts(QUICK, 1.0, lambda: next(clock))
    attempts.begin()
    attempts.pause_after(UnavailableError("gone"))
    with pytest.raises(DeadlineExceededError, match=r"1 s.*gone"):
        attempts.begin()


@pytest.mark.parametrize(
    ("field", "given"),
    [("max_attempts", 0), ("max_attempts", 1.5), ("initial_backoff", -1), ("multiplier", 0.5), ("jitter", 2)],
)
def test_a_wrong_policy_is_refused(field: str, given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        RetryPolicy(**{field: given})
