"""What the sync and the asyncio client share: settings, attempts and retries, and a stream's progress.

Sans-IO: nothing here sleeps, sends or reads; :mod:`d2o_client._sync` and :mod:`d2o_client._async` do.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import grpc

from d2o_client._channel import TLS, ChannelSettings, LoadBalancing
from d2o_client._errors import D2OError, DeadlineExceededError, InternalError, invalid, is_too_large
from d2o_client._options import check_whole
from d2o_client._responses import chunk_value, finished_value, started_value
from d2o_client._types import Chunk, Finished, Generation, Started, TokenLogprob
from d2o_inference.v1 import inference_service_pb2 as pb

LOG = logging.getLogger("d2o_client")
RETRYABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})
DEFAULT_TIMEOUT = 600.0
DEFAULT_KEEPALIVE = 60.0
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
Metadata = Mapping[str, str] | Iterable[tuple[str, str]]


class Default(Enum):
    """The value of an argument that was left out, where None means something else."""

    TIMEOUT = "the client's timeout"


USE_DEFAULT: Final = Default.TIMEOUT
Timeout = float | Default | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a call is sent again: on UNAVAILABLE and RESOURCE_EXHAUSTED, and only before its first token arrived.

    A message that is larger than one end takes is RESOURCE_EXHAUSTED too, to gRPC, and never sent again.
    The pause before attempt n + 1 is ``initial_backoff * multiplier ** (n - 1)`` seconds, at most ``max_backoff``,
    and spread by ``jitter`` to both sides. Where the server names a pause (``grpc-retry-pushback-ms``) that one is
    kept instead; where it forbids a retry there is none. No pause goes beyond the call's timeout.
    """

    max_attempts: int = 5
    initial_backoff: float = 0.2
    max_backoff: float = 10.0
    multiplier: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        check_whole("retry.max_attempts", self.max_attempts, bits=32)
        if self.max_attempts < 1:
            raise invalid("retry.max_attempts", self.max_attempts, "at least 1; 1 turns retries off")
        for name, low in (("initial_backoff", 0), ("max_backoff", 0), ("multiplier", 1)):
            if not getattr(self, name) >= low:
                raise invalid(f"retry.{name}", getattr(self, name), f"a number of at least {low}")
        if not 0 <= self.jitter <= 1:
            raise invalid("retry.jitter", self.jitter, "a number in [0, 1]")

    def backoff(self, attempt: int) -> float:
        """Seconds to wait after this attempt, the first being 1."""
        try:
            pause = min(self.max_backoff, self.initial_backoff * self.multiplier ** (attempt - 1))
        except OverflowError:
            pause = self.max_backoff
        return pause * random.uniform(1 - self.jitter, 1 + self.jitter)  # noqa: S311 - spreads load, hides nothing


NO_RETRY: Final = RetryPolicy(max_attempts=1)


class Attempts:
    """One call's attempts and the time left for them all."""

    def __init__(self, retry: RetryPolicy, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry = retry
        self._timeout = timeout
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout
        self._last: D2OError | None = None
        self.sent = 0

    def begin(self) -> float | None:
        """Counts an attempt and returns the seconds that it may take; None is no limit.

        Raises:
            DeadlineExceededError: the time is up.
        """
        left = self._time_left()
        if left is not None and left <= 0:
            because = f"; the last attempt failed with: {self._last}" if self._last else ""
            raise DeadlineExceededError(f"the timeout of {self._timeout:g} s passed before the call was sent{because}")
        self.sent += 1
        return left

    def pause_after(self, error: D2OError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            D2OError: ``error`` itself, where there must not be another attempt.
        """
        error.attempts = self.sent
        self._last = error
        pushback = error.pushback
        refused = (pushback is not None and pushback < 0) or is_too_large(error)
        if error.code not in RETRYABLE or refused or self.sent >= self._retry.max_attempts:
            raise error
        pause = self._retry.backoff(self.sent) if pushback is None else pushback
        left = self._time_left()
        if left is not None and pause >= left:
            raise error
        LOG.info(
            "attempt %d of %d failed with %s: %s; the next one begins in %.2f s",
            self.sent,
            self._retry.max_attempts,
            error.code.name,
            error.details,
            pause,
        )
        return pause

    def fail(self, error: D2OError) -> D2OError:
        """``error`` with its count of attempts, where a retry is out of the question."""
        error.attempts = self.sent
        return error

    def _time_left(self) -> float | None:
        return None if self._deadline is None else self._deadline - self._clock()


class StreamProgress:
    """What a stream has brought so far."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.has_chunks = False
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    def accept(self, message: pb.StreamGenerateTextResponse) -> Chunk | None:
        """Takes one message; returns a chunk where it carries one. Events newer than this client are passed over."""
        match message.WhichOneof("event"):
            case "started":
                self.started = started_value(message.started)
            case "finished":
                self.finished = finished_value(message.finished)
            case "chunk":
                return self._accept_chunk(chunk_value(message.chunk))
        return None

    def _accept_chunk(self, chunk: Chunk) -> Chunk:
        self.has_chunks = True
        self._texts.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        return chunk

    def check_complete(self) -> None:
        """Called at the end of the stream.

        Raises:
            InternalError: the stream ended without its first or its last event.
        """
        for name in ("started", "finished"):
            if getattr(self, name) is None:
                raise InternalError(f"the server ended the stream without its event `{name}`")

    def generation(self) -> Generation:
        """The whole answer.

        Raises:
            InternalError: the stream has not ended as it should.
        """
        if self.started is None or self.finished is None:
            raise InternalError("the stream was closed before it ended; there is no whole answer")
        return Generation(
            text=self.text,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            started=self.started,
            finished=self.finished,
        )


class Settings:
    """A client's arguments, checked: the channel's, and the defaults of every call."""

    def __init__(
        self,
        target: str,
        *,
        tls: TLS | bool | None,
        timeout: float | None,
        retry: RetryPolicy | None,
        load_balancing: LoadBalancing,
        keepalive_seconds: float | None,
        max_message_bytes: int,
        metadata: Metadata,
        api_key: str | None,
    ) -> None:
        self.channel = ChannelSettings(
            target=target,
            tls=TLS() if tls is True else tls or None,
            load_balancing=load_balancing,
            keepalive_seconds=keepalive_seconds,
            max_message_bytes=max_message_bytes,
        )
        self._timeout = _checked_timeout(timeout)
        self._retry = retry or NO_RETRY
        bearer = [("authorization", f"Bearer {api_key}")] if api_key else []
        self._metadata = _checked_metadata([*_pairs(metadata), *bearer])

    def attempts(self, timeout: Timeout) -> Attempts:
        """The attempts of one call."""
        seconds = self._timeout if isinstance(timeout, Default) else _checked_timeout(timeout)
        return Attempts(self._retry, seconds)

    def metadata(self, extra: Metadata) -> tuple[tuple[str, str], ...]:
        """The client's metadata and one call's."""
        return self._metadata + _checked_metadata(_pairs(extra))


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not 0 < timeout < math.inf:
        raise invalid("timeout", timeout, "a positive number of seconds, or None for no limit")
    return timeout


def _pairs(metadata: Metadata) -> Iterable[tuple[str, str]]:
    return metadata.items() if isinstance(metadata, Mapping) else metadata


def _checked_metadata(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    checked = tuple((str(key), str(value)) for key, value in pairs)
    for key, value in checked:
        if not key or key != key.lower() or not key.isascii() or key.startswith("grpc-"):
            raise invalid("metadata", key, "keys in lower-case ASCII that do not begin with grpc-")
        if not (value.isascii() and value.isprintable()):
            # The value may be a secret: only its key is named.
            raise invalid("metadata", key, "a value of printable ASCII")
    return checked
