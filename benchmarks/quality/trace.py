"""What was seen of a continuation, whoever decoded it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one contender made of one continuation; ``slots`` is what a layer held at the end, on average.

    ``loss`` [tokens] float32 is the negative log-likelihood of each token in nats, ``hit`` [tokens] whether greedy
    decoding would have chosen it, ``divergence`` [tokens] the KL in nats from the full cache's distribution.
    """

    loss: Tensor
    hit: Tensor
    divergence: Tensor
    slots: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnWords:
    """What one contender said when nobody told it what to say; ``slots`` as in :class:`Trace`.

    ``tokens`` are those it drew, ``loss`` [tokens] float32 the negative log-likelihood that it gave each, in nats.
    """

    tokens: tuple[int, ...]
    loss: Tensor
    slots: float
