"""gRPC's events reach a busy loop at once, however many there are."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from d2o_server import __main__
from d2o_server.rpc import event_loop
from d2o_server.rpc.event_loop import EventLoop

_METHOD = "/test.Echo/Echo"
# More than the bytes that gRPC's socket holds, one an event.
_CALLS = 500


class _Echo(grpc.GenericRpcHandler):
    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4), handlers=[_Echo()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


async def _rounds_until_all_have_ended(target: str) -> int:
    """Of a loop that did nothing for a second, so that all answers were there."""
    async with grpc.aio.insecure_channel(target) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_METHOD)
        assert await call(b"connected") == b"connected"

        async def one(number: int) -> bytes:
            answer: bytes = await call(str(number).encode())
            return answer

        waiting = asyncio.gather(*map(one, range(_CALLS)))
        # All are on their way.
        for _ in range(5):
            await asyncio.sleep(0)
        time.sleep(1)  # noqa: ASYNC251 - the loop is busy
        rounds = 0
        while not waiting.done():
            await asyncio.sleep(0)
            rounds += 1
        assert await waiting == [str(number).encode() for number in range(_CALLS)]
        return rounds


@pytest.mark.parametrize(
    ("make", "few"), [(EventLoop, True), (asyncio.SelectorEventLoop, False)], ids=["ours", "asyncio's"]
)
def test_a_busy_loop_takes_all_that_is_there(
    make: Callable[[], asyncio.AbstractEventLoop], few: bool, target: str
) -> None:
    with asyncio.Runner(loop_factory=make) as runner:
        rounds = runner.run(_rounds_until_all_have_ended(target))
    assert (rounds < 100) is few, rounds


def test_the_server_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve(*_: object) -> None:
        loops.append(asyncio.get_running_loop())

    monkeypatch.setattr(__main__, "serve", serve)
    monkeypatch.setattr(__main__, "configure_logs", lambda _: None)
    assert __main__.main([]) == 0
    assert [type(loop) for loop in loops] == [EventLoop]


@pytest.mark.parametrize(("waiting", "left"), [(0, []), (1, [b"1"]), (200, [b"1"])])
def test_one_byte_is_left_to_the_handler_which_is_called_where_there_is_one(waiting: int, left: list[bytes]) -> None:
    seen: list[bytes] = []
    woken, waker = socket.socketpair()
    with woken, waker:
        woken.setblocking(False)
        waker.send(b"1" * waiting)
        event_loop._after_draining(woken, lambda: seen.append(woken.recv(1000)))()
    assert seen == left


def test_other_readers_are_left_alone() -> None:
    async def read_to_the_end() -> bytes:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            rest = await reader.read()
            writer.close()
            return rest

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        assert runner.run(read_to_the_end()) == b""
