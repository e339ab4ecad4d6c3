"""What a load is made of: lengths, bursts, shares of misbehaving clients, and how an ended call counts."""

from __future__ import annotations

import math
import random
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import grpc

PUSHBACK = "grpc-retry-pushback-ms"
# What a server that is not defective may say to a client that behaves: come back later, or your time is up.
_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens; ``most`` is its upper end."""

    FORMS: ClassVar[str] = "N, LOW-HIGH (uniform) or lognormal:MEDIAN,SIGMA,MOST"
    draw: Callable[[random.Random], int]
    most: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Reads one of ``FORMS``.

        Raises:
            ArgumentTypeError: it is none of them.
        """
        try:
            if text.startswith("lognormal:"):
                median, sigma, most = text.removeprefix("lognormal:").split(",")
                return cls._lognormal(int(median), float(sigma), int(most))
            low, dash, high = text.partition("-")
            return cls._uniform(int(low), int(high if dash else low))
        except ValueError:
            allowed = f"{cls.FORMS} with 1 <= LOW <= HIGH, 1 <= MEDIAN <= MOST, SIGMA >= 0"
            raise ArgumentTypeError(f"got {text!r}, allowed is {allowed}") from None

    @classmethod
    def _uniform(cls, low: int, high: int) -> Lengths:
        if not 1 <= low <= high:
            raise ValueError
        return cls(lambda source: source.randint(low, high), high)

    @classmethod
    def _lognormal(cls, median: int, sigma: float, most: int) -> Lengths:
        if not (1 <= median <= most and 0 <= sigma < math.inf):
            raise ValueError
        mean = math.log(median)
        return cls(lambda source: min(most, max(1, round(source.lognormvariate(mean, sigma)))), most)


@dataclass(frozen=True, slots=True)
class Burst:
    """``size`` requests more, at once, every ``seconds``."""

    size: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Burst:
        """Reads ``SIZE/SECONDS``.

        Raises:
            ArgumentTypeError: it is something else.
        """
        size, _, seconds = text.partition("/")
        try:
            burst = cls(int(size), float(seconds))
        except ValueError:
            burst = cls(0, 0)
        if burst.size < 1 or not 0 < burst.seconds < math.inf:
            raise ArgumentTypeError(f"got {text!r}, allowed is SIZE/SECONDS, such as 50/10, both positive")
        return burst


def share(text: str) -> float:
    """Reads a share of all requests.

    Raises:
        ArgumentTypeError: it is no number in [0, 1].
    """
    return _number(text, "a number in [0, 1]", lambda value: 0 <= value <= 1)


def positive(text: str) -> float:
    """Reads a positive number.

    Raises:
        ArgumentTypeError: it is none.
    """
    return _number(text, "a positive number", lambda value: 0 < value < math.inf)


def _number(text: str, allowed: str, valid: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not valid(value):
        raise ArgumentTypeError(f"got {text!r}, allowed is {allowed}")
    return value


class Manner(StrEnum):
    """How a client treats its stream."""

    READS = "stream"
    CANCELS = "cancelled by the client"
    READS_SLOWLY = "slow reader"
    ASKS_TOO_MUCH = "over-long prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """Shares of those that misbehave; the rest reads its stream as it comes.

    Raises:
        ValueError: they are more than all.
    """

    cancel: float
    slow: float
    too_long: float

    def __post_init__(self) -> None:
        total = self.cancel + self.slow + self.too_long
        if total > 1:
            raise ValueError(f"--cancel-share, --slow-share, --too-long-share: got {total:g} together, allowed is 1")

    def draw(self, source: random.Random) -> Manner:
        """How the next client behaves."""
        at = source.random()
        shares = (self.cancel, self.slow, self.too_long)
        for manner, part in zip((Manner.CANCELS, Manner.READS_SLOWLY, Manner.ASKS_TOO_MUCH), shares, strict=True):
            if at < part:
                return manner
            at -= part
        return Manner.READS


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an error status counts: as a refusal of its own ``kind``, or as a failure that says why."""

    kind: str
    failure: str | None = None


def verdict(code: grpc.StatusCode, details: str, pushback: str | None, manner: Manner) -> Verdict:
    """What a call that ended with ``code`` says about the server.

    Refusals and a deadline that passed are what an overloaded server should say, and INVALID_ARGUMENT is the right
    answer to an over-long prompt. A refusal without a pushback, a lost connection and every other status are failures.
    """
    expected_invalid = manner is Manner.ASKS_TOO_MUCH and code is grpc.StatusCode.INVALID_ARGUMENT
    if expected_invalid or code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Verdict("REFUSED")
    if code not in _REFUSALS:
        return Verdict("E2E", f"{code.name}: {details}")
    if pushback is None or not pushback.isdecimal():
        return Verdict("REFUSED", f"{code.name} with a pushback of {pushback}: {details}")
    return Verdict("REFUSED")
