"""Every status becomes one class of one tree, with the server's words and trailers."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import pytest

import d2o_client
from d2o_client import D2OError, InternalError, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from d2o_client._errors import ERROR_OF_STATUS, from_status
from tests.client.conftest import Connect
from tests.client.scripted_service import Abort, ScriptedServer

FAILURES = sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK}, key=lambda code: code.name)


def test_every_status_but_ok_has_its_class() -> None:
    assert set(ERROR_OF_STATUS) == set(FAILURES)
    assert all(issubclass(kind, D2OError) for kind in ERROR_OF_STATUS.values())


def test_every_error_class_is_public_and_has_a_code() -> None:
    for kind in {*ERROR_OF_STATUS.values(), *D2OError.__subclasses__()}:
        assert getattr(d2o_client, kind.__name__) is kind
        assert kind.code in FAILURES


@pytest.mark.parametrize("code", FAILURES, ids=lambda code: code.name)
def test_a_status_from_the_server_is_raised_as_its_class(connect: Connect, server: ScriptedServer, code: Any) -> None:
    client = connect(server.target, retry=None)
    abort = Abort(code, "what happened", (("x-fact", "7"),))
    server.script("GenerateText", abort)
    server.script("StreamGenerateText", abort)
    for call in (client.generate, lambda prompt: client.stream(prompt).result()):
        with pytest.raises(ERROR_OF_STATUS[code]) as caught:
            call("Hi")
        assert (caught.value.code, caught.value.details) == (code, "what happened")
        assert (caught.value.trailers["x-fact"], caught.value.attempts) == ("7", 1)


@pytest.mark.parametrize(
    ("trailer", "pushback", "retry_after"),
    [(None, None, None), ("1500", 1.5, 1.5), ("0", 0.0, 0.0), ("-1", -0.001, None), ("soon", -1.0, None)],
)
def test_pushback_is_read_from_the_trailer(trailer: str | None, pushback: float | None, retry_after: Any) -> None:
    trailers = [("grpc-retry-pushback-ms", trailer)] if trailer is not None else []
    error = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", trailers)
    assert isinstance(error, ResourceExhaustedError)
    assert (error.pushback, error.retry_after) == (pushback, retry_after)


def test_an_error_says_its_details_and_how_often_it_was_tried() -> None:
    error = UnavailableError("gone")
    assert str(error) == "gone"
    error.attempts = 3
    assert str(error) == "gone (after 3 attempts)"
    assert str(InternalError("")) == "INTERNAL"


@pytest.mark.parametrize("kind", list(dict.fromkeys(ERROR_OF_STATUS.values())))
def test_errors_survive_pickling(kind: type[D2OError]) -> None:
    error = kind("what happened", code=grpc.StatusCode.ABORTED, trailers={"a": "b"})
    error.attempts = 2
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (str(back), back.code, back.trailers) == (str(error), grpc.StatusCode.ABORTED, {"a": "b"})


def test_an_argument_error_is_a_value_error_and_a_timeout_a_timeout_error() -> None:
    assert issubclass(InvalidArgumentError, ValueError)
    assert issubclass(d2o_client.DeadlineExceededError, TimeoutError)
