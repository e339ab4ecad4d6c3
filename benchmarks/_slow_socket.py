"""Streams whose reader takes what it wants from its socket: all there is, now and then, or one byte a second.

No gRPC library can be told to read so slowly, so this is HTTP/2 by hand (RFC 9113, headers by RFC 7541 without a
table): the request is sent whole, settings are acknowledged unseen, and what comes back is bytes that are counted.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterable

from d2o_inference.v1 import inference_service_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _WINDOW_UPDATE = 0x0, 0x1, 0x4, 0x8
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_INITIAL_WINDOW_SIZE = 0x4
_MOST_WINDOW = 2**31 - 1
_FIRST_WINDOW = 2**16 - 1
_PATH = "/d2o_inference.v1.InferenceService/StreamGenerateText"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _header_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Literal fields with new names, which are not indexed; each string is shorter than 127 bytes."""
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
    )


def _call(target: str, request: pb.StreamGenerateTextRequest, window: int) -> bytes:
    """All that a client says, with room for ``window`` bytes of the answer."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", _PATH),
        (":authority", target),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
    message = request.SerializeToString()
    frames = [
        _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)),
        _frame(_SETTINGS, _ACK, 0, b""),
        _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _MOST_WINDOW - _FIRST_WINDOW)),
        _frame(_HEADERS, _END_HEADERS, 1, _header_block(fields)),
        _frame(_DATA, _END_STREAM, 1, struct.pack(">BI", 0, len(message)) + message),
    ]
    return _PREFACE + b"".join(frames)


class SocketStream:
    """One stream on a connection of its own; ``taken`` bytes of it were read."""

    _SLOW_WINDOW, _LITTLE = 1024, 2048
    # Often enough that the server never waits for it, seldom enough that who measures has time for other things.
    _PAUSE = 0.2

    def __init__(self, target: str, request: pb.StreamGenerateTextRequest, *, slow: bool) -> None:
        self._target, self._slow, self.taken = target, slow, 0
        self._call = _call(target, request, self._SLOW_WINDOW if slow else _MOST_WINDOW)

    async def run(self) -> None:
        """Sends the request, then reads until it is cancelled or the server hangs up."""
        loop = asyncio.get_running_loop()
        host, _, port = self._target.rpartition(":")
        with socket.socket() as connection:
            connection.setblocking(False)
            if self._slow:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._LITTLE)
            await loop.sock_connect(connection, (host, int(port)))
            await loop.sock_sendall(connection, self._call)
            while part := await loop.sock_recv(connection, 1 if self._slow else 2**16):
                self.taken += len(part)
                await asyncio.sleep(1 if self._slow else self._PAUSE)
