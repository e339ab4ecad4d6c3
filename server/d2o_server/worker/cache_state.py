"""What is known of one sequence's cache beside its lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from d2o.config import D2OConfig
from d2o_server.worker.cache_ops import Fetched, Span
from d2o_server.worker.prompt_scores import PromptScores


@dataclass(frozen=True, slots=True)
class Heard:
    """Densities of several prompts [prompts, full layers], on their way to the host; one's are at ``place``."""

    fetched: Fetched
    place: int

    def densities(self) -> Tensor:
        """The prompt's [full layers], once they are there."""
        (densities,) = self.fetched.wait()
        return densities[self.place]


@dataclass(slots=True, eq=False)
class SequenceCache:
    """One sequence's place in the pool.

    ``heard``, what its budgets depend on, and ``expected``, slots of the prompt, are there once it has been read and
    until it is compressed. ``spans`` are (time spent on compression, share of it) pairs, of which the first
    ``prompt_spans`` were its prompt's.
    """

    row: int
    config: D2OConfig
    budget: int
    prompt: Sequence[int]
    total_tokens: int
    scores: PromptScores | None = None
    heard: Heard | None = None
    expected: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    compressed: bool = False
    peak_pages: int = 0
    spans: list[tuple[Span, float]] = field(default_factory=list)
    prompt_spans: int = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, slots=True)
class CacheLengths:
    """Slots in use [layers, n] and tokens seen [n] of ``rows`` [n] at one moment."""

    rows: Tensor
    used: Tensor
    seen: Tensor
