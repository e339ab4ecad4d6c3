"""When pages are expected to come free: what those who must come back later are told."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holding:
    """Pages that are held, and seconds until they are expected back."""

    seconds: float
    pages: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue: the pages that it waits for, its prompt, and the seconds that it will then hold them."""

    pages: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Admission:
    """Seconds until a waiting request is expected to be admitted, and the prompt tokens that then wait no more."""

    seconds: float
    prompt_tokens: int


def admissions(free: int, places: int, holdings: Iterable[Holding], queue: Iterable[Waiting]) -> list[Admission]:
    """Plays one worker's queue, in its order, against what runs there.

    ``free`` pages and ``places`` for further sequences are there now. What a request holds comes back at its end.
    """
    ends = [(holding.seconds, holding.pages) for holding in holdings]
    heapq.heapify(ends)
    now, expected = 0.0, []
    for request in queue:
        while ends and (request.pages > free or places < 1):
            now, pages = heapq.heappop(ends)
            free, places = free + pages, places + 1
        expected.append(Admission(now, request.prompt_tokens))
        free, places = free - request.pages, places - 1
        heapq.heappush(ends, (now + request.seconds, request.pages))
    return expected


def seconds_until(pages: int, holdings: Iterable[Holding]) -> float:
    """Seconds until so many pages of ``holdings`` are back; until all are where they are fewer."""
    seconds = 0.0
    for holding in sorted(holdings, key=lambda holding: holding.seconds):
        if pages <= 0:
            break
        seconds, pages = holding.seconds, pages - holding.pages
    return seconds


class Pace:
    """How long requests hold their pages, learnt from those that ended: seconds for each token they might write.

    An answer that ends before its bound, and a prompt that takes long to read, are in that number too.
    """

    _WEIGHT = 0.2
    _FIRST_GUESS = 0.02

    def __init__(self) -> None:
        self._seconds_a_token = self._FIRST_GUESS
        self._ended = 0

    def ended(self, seconds: float, max_new_tokens: int) -> None:
        """A request that might have written so many tokens held its pages so long."""
        self._ended += 1
        # The mean of the first few, then one that forgets.
        weight = max(self._WEIGHT, 1 / self._ended)
        self._seconds_a_token += weight * (seconds / max_new_tokens - self._seconds_a_token)

    def seconds(self, max_new_tokens: int) -> float:
        """How long such a request holds its pages."""
        return self._seconds_a_token * max_new_tokens

    def seconds_left(self, max_new_tokens: int, held: float) -> float:
        """How long one that has held them for ``held`` seconds still does; one that is late, a tenth of its time."""
        whole = self.seconds(max_new_tokens)
        return max(whole - held, 0.1 * whole)
