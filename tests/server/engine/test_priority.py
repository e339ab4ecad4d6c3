"""Priorities with ageing: who is urgent goes first, who waits long enough goes before anybody, nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o_server.engine.priority import SECONDS_A_PRIORITY, check_priority, due
from d2o_server.engine.scheduler import Scheduler
from d2o_server.engine.sequence import Sequence
from d2o_server.engine.types import DEFAULT_PRIORITY, MAX_PRIORITY
from d2o_server.errors import InvalidRequest
from tests.server.engine.test_scheduler import names, scheduler, sequence


def waiting(name: str, arrived: float, priority: int = DEFAULT_PRIORITY, pages: int = 1) -> Sequence:
    return sequence(name, pages=pages, due=due(arrived, priority))


def queue_of(*sequences: Sequence) -> Scheduler:
    engine = scheduler(pages=1)
    for each in sequences:
        engine.add(each)
    return engine


def test_the_higher_priority_goes_first_and_equals_in_the_order_they_came() -> None:
    arrivals = (("low", 1), ("first", 5), ("high", 9), ("second", 5))
    engine = queue_of(*(waiting(name, 0, priority) for name, priority in arrivals))
    assert names(list(engine.waiting)) == ["high", "first", "second", "low"]


def test_a_resumed_request_goes_before_every_priority() -> None:
    engine = queue_of(waiting("high", 0, 9), sequence("resumed", due=due(0, 0), resumed=True))
    assert names(list(engine.waiting)) == ["resumed", "high"]


def test_a_request_that_has_waited_ten_seconds_a_priority_is_not_passed_any_more() -> None:
    engine = queue_of(
        waiting("old", 0, 5), waiting("early", 39.9, 9), waiting("late", 40.1, 9), waiting("lowest", -50.2, 0)
    )
    assert names(list(engine.waiting)) == ["lowest", "early", "old", "late"]


@given(st.lists(st.tuples(st.floats(0, 500), st.integers(0, MAX_PRIORITY)), max_size=60))
def test_nothing_passes_what_came_ninety_seconds_before_it(requests: list[tuple[float, int]]) -> None:
    requests.sort()
    arrived = {str(index): at for index, (at, _) in enumerate(requests)}
    engine = queue_of(*(waiting(str(index), at, priority) for index, (at, priority) in enumerate(requests)))
    order = [arrived[name] for name in names(list(engine.waiting))]
    for place, at in enumerate(order):
        assert at - min(order[place:]) <= MAX_PRIORITY * SECONDS_A_PRIORITY + 1e-6


def test_a_large_request_of_the_lowest_priority_runs_under_constant_load_of_the_highest() -> None:
    """Twenty requests a second of priority 9, each of a second and a page, for ten pages; the other wants eight."""
    engine = scheduler(pages=10, sequences=100)
    ends: list[tuple[float, Sequence]] = []
    admitted_at = None
    for tick in range(1, 2000):
        now = tick / 10
        for _, done in [end for end in ends if end[0] <= now]:
            engine.remove(done)
        ends = [end for end in ends if end[0] > now]
        for index in range(2):
            engine.add(waiting(f"high-{tick}-{index}", now, 9))
        if tick == 20:
            engine.add(waiting("low", now, 0, pages=8))
        for each in engine.admit():
            ends.append((now + 1, each))
            if each.id == "low":
                admitted_at = now
    assert admitted_at is not None
    # After 90 seconds nobody passes it any more; the 1,840 that came until then take 184 seconds.
    assert 180 < admitted_at < 190
    assert engine.ledger.reserved <= 10


@pytest.mark.parametrize("priority", [-1, 10])
def test_what_is_no_priority_is_refused(priority: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"^priority: got {priority}, allowed is \[0, 9\]$"):
        check_priority(priority)
