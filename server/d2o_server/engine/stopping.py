"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Scan(NamedTuple):
    """Text that is safe to send, and the stop string that ended generation, if one did."""

    emit: str
    matched: str | None


class StopMatcher:
    """Finds the stop string that is complete first, however the text is cut into chunks.

    Of stop strings that end at the same character the longest wins. Text that may still become a stop string is
    held back; neither the stop string nor anything after it is ever emitted. Each character costs amortised
    O(number of stop strings) (Knuth, Morris, Pratt, SIAM J. Comput. 6, 1977).
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stop_strings if stop)
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._progress = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> Scan:
        """Takes the next piece of text. After a match the matcher is spent and must not be pushed again."""
        if not self._stops:
            return Scan(text, None)
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            matched = self._advance(character)
            if matched is not None:
                self._held = ""
                return Scan(pending[: end - len(matched)], matched)
        safe = len(pending) - max(self._progress)
        self._held = pending[safe:]
        return Scan(pending[:safe], None)

    def finish(self) -> str:
        """The text still held back, at the end of generation."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Moves every stop string's progress over one character; returns the longest one that is now complete."""
        matched: str | None = None
        for index, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            length = self._progress[index]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            self._progress[index] = length
            if length == len(stop) and (matched is None or length > len(matched)):
                matched = stop
        return matched


def _borders(pattern: str) -> tuple[int, ...]:
    """For every prefix of ``pattern`` the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in pattern[1:]:
        length = borders[-1]
        while length and pattern[length] != character:
            length = borders[length - 1]
        borders.append(length + (pattern[length] == character))
    return tuple(borders)
