"""What an engine tells of its requests while it serves them; what becomes of it is the listener's business."""

from __future__ import annotations

from dataclasses import dataclass

from d2o_server.engine.types import CacheFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One generation's life, told when it is over.

    Times are readings of ``time.monotonic``; ``admitted`` and ``first_token`` are None where it did not come so far.
    ``reason`` (a FinishReason) and ``cache`` are None where it was cancelled or failed; ``auto`` (an AutoOutcome) where
    its policy was not chosen for it. ``resumed``: how often it went on after the worker that ran it had died.
    """

    generation_id: str
    arrived: float
    admitted: float | None
    first_token: float | None
    ended: float
    prompt_tokens: int
    completion_tokens: int
    reason: str | None
    cache: CacheFacts | None
    auto: str | None = None
    resumed: int = 0


class Observer:
    """Listens to an engine, on its event loop. This one makes nothing of it: override what is of interest.

    :meth:`tokens` is called once a message and stream, so whatever it does is paid for by every token.
    """

    def admitted(self, queue_seconds: float) -> None:
        """A request was admitted, so long after it had arrived."""

    def first_tokens(self, seconds: float) -> None:
        """A request's first message is on its way, so long after the request had arrived."""

    def tokens(self, count: int, seconds: float) -> None:
        """A later message of ``count`` tokens is on its way, so long after the one before it."""

    def ended(self, timeline: Timeline) -> None:
        """A generation is over, however it ended; called in the task that read it."""

    def worker_restarted(self, index: int) -> None:
        """Worker ``index`` died and is being started again."""
