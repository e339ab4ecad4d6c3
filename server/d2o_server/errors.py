"""Everything that can go wrong, in one tree. ``rpc/errors.py`` maps each class to one gRPC status."""

from __future__ import annotations


class ServerError(Exception):
    """Base of every error that d2o-serve raises on purpose."""


class InvalidRequest(ServerError):
    """A request's field is out of bounds; the request can never succeed as it is."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        super().__init__(f"{field}: got {given}, allowed is {allowed}")
        self.field = field


class Overloaded(ServerError):
    """The request would succeed later: a bounded queue or a rate limit is exhausted.

    ``bound`` is a short name of what is exhausted, which refusals are counted by.
    """

    def __init__(self, reason: str, retry_after_ms: int, bound: str = "queue_full") -> None:
        super().__init__(f"{reason}; try again in {retry_after_ms} ms")
        self.retry_after_ms = retry_after_ms
        self.bound = bound


class Unauthenticated(ServerError):
    """A call came without an API key where one is required, or with a wrong one; the message does not say which."""


class DeadlineExceeded(ServerError):
    """The caller's deadline passed while the request was queued or running."""


class OutOfDeviceMemory(ServerError):
    """The device ran out of memory in a step; only the offending request fails."""


class Unavailable(ServerError):
    """No worker can take or finish the request now. ``retry_after_ms``: when that should be different, where known."""

    retry_after_ms: int | None = None


class Draining(Unavailable):
    """The server is shutting down and takes no new requests."""


class NoWorker(Unavailable):
    """No worker serves at the moment; one is being started again."""

    retry_after_ms = 1000


class WorkerDied(Unavailable):
    """The worker that ran the request died, and no other could go on with it."""

    retry_after_ms = 1000


class WorkersLost(Unavailable):
    """No worker is left and none will be: the server ends."""


class EngineFailure(ServerError):
    """A defect of ours: the step that ran the request raised."""


class StartupError(ServerError):
    """The server cannot start as it is configured; the message says what to change."""


class ModelUnsupported(StartupError):
    """The model cannot be served correctly; the message gives the reason."""


class SettingsError(StartupError):
    """A setting is out of bounds."""
