"""Lengths, shares and verdicts of the load are what its flags say; a wrong flag says what is allowed."""

from __future__ import annotations

import random
import re
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from tests.load.workload import Burst, Lengths, Manner, Manners, positive, share, verdict

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("text", "low", "most"),
    [("32", 32, 32), ("8-64", 8, 64), ("lognormal:40,0.8,200", 1, 200), ("lognormal:5,0,9", 5, 9)],
)
def test_lengths_stay_within_their_bounds(text: str, low: int, most: int) -> None:
    lengths, source = Lengths.parse(text), random.Random(1)
    drawn = [lengths.draw(source) for _ in range(500)]
    assert lengths.most == most
    assert low <= min(drawn) <= max(drawn) <= most


def test_a_lognormal_length_has_the_median_it_was_given() -> None:
    lengths, source = Lengths.parse("lognormal:40,0.8,2000"), random.Random(1)
    drawn = sorted(lengths.draw(source) for _ in range(2001))
    assert 36 <= drawn[1000] <= 44


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((Lengths.parse, text) for text in ("", "0", "9-8", "a-b", "8-", "-8", "lognormal:1", "lognormal:9,1,8")),
        *((Burst.parse, text) for text in ("", "50", "0/10", "50/0", "50/inf", "a/b")),
        *((share, text) for text in ("-0.1", "1.1", "nan", "half")),
        *((positive, text) for text in ("0", "-1", "inf", "nan", "fast")),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=re.escape(f"got {text!r}, allowed is ")):
        parse(text)


def test_manners_come_in_their_shares() -> None:
    manners, source = Manners(cancel=0.2, slow=0.1, too_long=0.3), random.Random(1)
    counts = Counter(manners.draw(source) for _ in range(10_000))
    shares = {Manner.CANCELS: 0.2, Manner.READS_SLOWLY: 0.1, Manner.ASKS_TOO_MUCH: 0.3, Manner.READS: 0.4}
    assert all(abs(counts[manner] / 10_000 - expected) < 0.02 for manner, expected in shares.items())


def test_shares_of_more_than_all_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 1\.2 together, allowed is 1"):
        Manners(cancel=0.5, slow=0.4, too_long=0.3)


@pytest.mark.parametrize(
    ("code", "pushback", "manner", "kind", "fails"),
    [
        (Code.RESOURCE_EXHAUSTED, "250", Manner.READS, "REFUSED", False),
        (Code.RESOURCE_EXHAUSTED, None, Manner.READS, "REFUSED", True),
        (Code.RESOURCE_EXHAUSTED, "-1", Manner.READS, "REFUSED", True),
        (Code.UNAVAILABLE, "1000", Manner.READS, "REFUSED", False),
        (Code.UNAVAILABLE, None, Manner.READS, "REFUSED", True),
        (Code.DEADLINE_EXCEEDED, None, Manner.READS, "REFUSED", False),
        (Code.INVALID_ARGUMENT, None, Manner.ASKS_TOO_MUCH, "REFUSED", False),
        (Code.INVALID_ARGUMENT, None, Manner.READS, "E2E", True),
        (Code.INTERNAL, None, Manner.READS, "E2E", True),
        (Code.UNKNOWN, None, Manner.ASKS_TOO_MUCH, "E2E", True),
        (Code.UNAUTHENTICATED, None, Manner.READS, "E2E", True),
    ],
)
def test_a_status_counts_as_refusal_or_failure(
    code: grpc.StatusCode, pushback: str | None, manner: Manner, kind: str, fails: bool
) -> None:
    found = verdict(code, "why", pushback, manner)
    assert (found.kind, found.failure is not None) == (kind, fails)
