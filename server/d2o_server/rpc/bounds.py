"""Checks of single request values. Each names the field, what was given and what is allowed."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from d2o_server.errors import InvalidRequest

_FLOAT32_MAX = 3.4028234663852886e38


def number(field: str, given: float, low: float, high: float, *, above_low: bool = False) -> float:
    """``given`` as the decimal its sender wrote, inside [low, high], or (low, high] with ``above_low``.

    Raises:
        InvalidRequest: out of bounds, infinite or not a number.
    """
    given = shortest_float32(given)
    if not low <= given <= high or (above_low and given == low):
        raise InvalidRequest(field, f"{given:g}", f"{'(' if above_low else '['}{low:g}, {high:g}]")
    return given


def whole(field: str, given: int, low: int, high: int, meaning: str = "") -> int:
    """``given`` inside [low, high]; ``meaning`` says where the upper bound comes from.

    Raises:
        InvalidRequest: out of bounds.
    """
    if not low <= given <= high:
        raise InvalidRequest(field, given, f"[{low}, {high}]" + (f" ({meaning})" if meaning else ""))
    return given


def at_most(field: str, items: int, limit: int, noun: str) -> None:
    """Refuses more than ``limit`` items.

    Raises:
        InvalidRequest: too many.
    """
    if items > limit:
        raise InvalidRequest(field, f"{items} {noun}", f"at most {limit}")


def token_ids(field: str, given: Sequence[int], vocabulary_size: int) -> tuple[int, ...]:
    """``given`` as a tuple of ids of the vocabulary.

    Raises:
        InvalidRequest: an id is outside the vocabulary; the message says which.
    """
    ids = tuple(given)
    if ids and max(ids) >= vocabulary_size:
        index = next(index for index, token in enumerate(ids) if token >= vocabulary_size)
        raise InvalidRequest(f"{field}[{index}]", ids[index], f"[0, {vocabulary_size - 1}] (the vocabulary)")
    return ids


def shortest_float32(value: float) -> float:
    """The shortest decimal that a proto ``float`` may have been written as.

    A sender's 0.4 arrives as 0.4000000059604645, which would round a budget of 0.4 x 1000 slots up to 401.
    """
    wire = struct.pack("<f", value)
    for digits in range(6, 10):
        decimal = float(f"{value:.{digits}g}")
        if abs(decimal) <= _FLOAT32_MAX and struct.pack("<f", decimal) == wire:
            return decimal
    return value
